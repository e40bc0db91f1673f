/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CUDA_CU_H
#define OCTET_CUDA_CU_H
/*
 * What the C and the .cu files of the plugin share: parameter structs, and the
 * functions that launch kernels. All pointers are of the device unless said
 * otherwise; launches go to a stream and report nothing: cudaGetLastError() of
 * the step does.
 */
#include <cuda_runtime_api.h>
#include "kernels/device.h"
#ifdef __cplusplus
extern "C" {
#endif

#define CU_LD 32u           /* rows of weights and inputs are padded to it with zeros */
#define CU_SKINNY 64u       /* rows that own kernels take at most */
#define CU_NONE UINT32_MAX

/* Entries [from, from + n) of what a step sends go to entries at .. of the tables. */
struct cu_patch {
	uint32_t at, from, n;
	uint32_t row;       /* the host's */
};
void cu_patch_tables(const struct cu_patch *, uint32_t n, const struct kd_block *from, struct kd_block *tables, cudaStream_t);

struct cu_tile {
	uint32_t row, n; /* rows of one sequence, in a row */
};

/* A site, or neighbouring ones, of equal format: y[r][c] (+)= sum of x[r] * w[c], scaled. */
enum cu_weights { CU_W_BF16, CU_W_NESTED, CU_W_E4M3, CU_W_E4M3T, CU_W_E4M3B };
struct cu_linear {
	enum cu_weights kind;
	bool w8a8;              /* x is xq with its scale, else xb */
	const uint16_t *bf16;   /* [n, ld] masters */
	const uint8_t *hi;      /* [n, ld] */
	const int8_t *lo;       /* [n, ld] */
	const float *scale;     /* [n] of the output; CU_W_BF16: not read */
	const float *tscale;    /* [n] CU_W_E4M3T: in its place */
	const float *square;    /* [n / 128 up, ld_square] CU_W_E4M3B: in its place */
	size_t ld_square;       /* ld / 128 up, up to a multiple of 4: cuBLASLt wants that */
	uint32_t n, k, ld;
	const uint16_t *xb;     /* [rows, ldx] BF16 */
	const uint8_t *xq;      /* [rows, ldx] E4M3 */
	const float *xs;        /* [rows, ldxs] */
	size_t ldx, ldxs;       /* ldxs: 1, but for CU_W_E4M3B */
	uint32_t rows;
	float *y;               /* [rows, ldy] */
	size_t ldy;
	bool add;
};
void cu_linear_skinny(const struct cu_linear *, cudaStream_t); /* rows <= CU_SKINNY */

/* Weights of the nested planes that do not fit: the sum lacks (value - what the planes say) * x. */
struct cu_exceptions {
	const uint32_t *row;    /* [n_rows] output channels that have any */
	const uint32_t *first;  /* [n_rows + 1] */
	const uint32_t *col;    /* [first[n_rows]] */
	const float *delta;     /* scaled by 2^-k already */
	const uint16_t *master;
	uint32_t n_rows;
};
void cu_exceptions_add(const struct cu_linear *, const struct cu_exceptions *, cudaStream_t);
/* The masters of [n, ld], into scratch (lo NULL: what FP8 makes of them); E4M3 codes brought to the scale of the tensor. */
void cu_unpack(const struct cu_linear *, const struct cu_exceptions *, uint16_t *out, cudaStream_t);
void cu_unpack_exceptions(const struct cu_exceptions *, uint32_t ld, uint16_t *out, cudaStream_t);
void cu_rescale_e4m3(const struct cu_linear *, uint8_t *out, cudaStream_t);
/* fp8b: E4M3(master / the square's scale) [n, ld], of bf16 or, where that is NULL, of both planes and the exceptions. */
void cu_square_codes(const struct cu_linear *, const struct cu_exceptions *, uint8_t *out, cudaStream_t);
/* Its xs as cuBLASLt wants them: [k / 128 up, t], 1 in the padding. */
void cu_square_inputs(const struct cu_linear *, uint32_t t, float *out, cudaStream_t);
/* y (+)= t * xs[r] * scale[c]: what scalar mode left out. */
void cu_apply_scales(const struct cu_linear *, const float *t, size_t ldt, cudaStream_t);
void cu_add_bias(float *y, size_t ldy, uint32_t rows, uint32_t n, const float *bias, cudaStream_t);

/* [n, ld] from panels of kernels.h's order. */
void cu_untile(const uint8_t *tiled, uint32_t panels, uint32_t n, uint32_t ld, uint8_t *out, cudaStream_t);

/* Where an operation's output goes: either, or both. */
struct cu_encoded {
	uint16_t *xb;           /* [rows, ld]; NULL: not wanted */
	uint8_t *xq;
	float *xs;
	size_t ld;
	uint8_t *xqb;           /* [rows, ld] E4M3 with a scale for each 128 */
	float *xsb;             /* [rows, ldb] */
	size_t ldb;
	struct kd_evidence *seen; /* of row seen_row, before it is encoded; NULL: not wanted */
	uint32_t seen_row;
};
/* x [.., ldx]; from (may be NULL) names the row of x that makes row r. */
void cu_rmsnorm(const float *x, size_t ldx, const uint32_t *from, const float *w, uint32_t n, float eps, uint32_t rows,
    const struct cu_encoded *, cudaStream_t);
/* gu [rows, 2 * n]: gate, then up. */
void cu_silu_mul(const float *gu, uint32_t n, uint32_t rows, const struct cu_encoded *, cudaStream_t);
/* Row r of x from the embedding: BF16 [vocab, ld], or the nested planes of lm_head. A token with CU_DRAWN is a number in
 * drawn, what the step before left; its own token takes its place. */
#define CU_DRAWN 0x80000000u
void cu_embed(uint32_t *token, const struct kd_result *drawn, uint32_t rows, const uint16_t *embed, const struct cu_linear *nested,
    const struct cu_exceptions *, uint32_t hidden, size_t ld, uint32_t vocab, float *x, cudaStream_t);

/* The KV cache. A BF16 page of K is [n_kv][32][hd], of V [n_kv][16 pairs][hd][2]; an FP8 page has both, K then V, a byte
 * a value, with scales [2][n_kv][32]. */
struct cu_kv {
	uint16_t *mem;          /* [n_pages][page_elems] */
	float *scale;           /* [n_pages][2 * n_kv * 32] */
	size_t page_elems;
	uint32_t n_kv;
};

struct cu_attention {
	struct cu_kv kv;
	const struct kd_block *table; /* tables of all sequences of the step */
	const uint32_t *first;  /* [rows] where in table the row's sequence begins; CU_NONE: a padding row */
	const uint32_t *pos;    /* [rows] */
	uint32_t n_layers, layer, n_heads, hd, window;
	float eps;
	uint32_t rows;
	float *qkv;             /* [rows, (n_heads + 2 n_kv) * hd] */
	uint16_t *q;            /* [rows, n_heads * hd] BF16, RoPE applied */
	const float *q_norm, *k_norm;
	const float *cos, *sin; /* [.., hd / 2]; NULL: no RoPE here */
	/* Tiles: rows of one sequence that share what they read. */
	const struct cu_tile *tile; /* [n_tiles] */
	uint32_t n_tiles, splits;
	bool prefill;           /* a warp a tile; else a block a tile */
	float *part;            /* [rows, n_heads, splits, hd + 2]: output, max, sum */
	float scale;
	struct kd_evidence *seen; /* K and V of row seen_row are added to it; NULL: not wanted */
	uint32_t seen_row;
};
void cu_rope_kv(const struct cu_attention *, cudaStream_t);
uint32_t cu_attention_tile_rows(uint32_t n_heads, uint32_t n_kv, uint32_t hd); /* rows of a tile at most */
void cu_attend(const struct cu_attention *, cudaStream_t);
/* Merges the splits; also to attn (NULL: not) [rows, n_heads * hd]. */
void cu_attention_merge(const struct cu_attention *, float *attn, const struct cu_encoded *, cudaStream_t);

/* Sampling: one row of logits each. */
struct cu_want {
	uint32_t kind;          /* enum kd_want_kind, CU_NONE: nothing */
	uint32_t position, token, top_k, n_top, n_edit, first_edit;
	uint32_t logprob;
	uint32_t drawn;         /* its row's token counts as one output more; the last edit, CU_NONE's, is there for it */
	uint64_t seed;
	float temperature, top_p, min_p, repetition, presence, frequency;
};
/* from: the row of the step that row r of logits is of, token: of each row of the step; weight [rows, vocab] scratch. */
void cu_sample(float *logits, size_t ld, uint32_t vocab, const struct cu_want *, struct kd_edit *, const uint32_t *token,
    const uint32_t *from, uint32_t rows, uint64_t *weight, struct kd_result *, cudaStream_t);
/* *first_bad = min(*first_bad, site) if any of v [n] is not finite. */
void cu_check_finite(const float *v, uint32_t n, uint32_t site, uint32_t *first_bad, cudaStream_t);

#ifdef __cplusplus
}
#endif
#endif
