/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_KERNELS_H
#define OCTET_KERNELS_H
/*
 * Kernels: plain parameter structs and one table of functions per level of the
 * machine. kernels/ref defines the bits; every level equals it bit for bit.
 * All functions run on the calling thread, touch only what they are given and
 * never allocate. Call kernels_thread_init() once in each thread that runs them.
 *
 * The order of every sum is fixed. Linear layers: blocks of 32 inputs in
 * ascending order; in a block two FP32 FMA chains from zero, even and odd
 * inputs; total = total + (even + odd). It is what AMX TDPBF16PS does.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum k_format { K_BF16, K_FP8, K_FP8W, K_FP8T, K_FP8B, K_N_FORMATS };

/* Are the inputs of a linear layer E4M3 too? */
static inline bool
k_is_w8a8(enum k_format f)
{
	return f == K_FP8 || f == K_FP8T || f == K_FP8B;
}

#define K_SQUARE 128u /* channels and inputs that share a scale in fp8b */

/* So many scales has a row of n inputs in fp8b. */
static inline uint32_t
k_squares(uint32_t n)
{
	return (n + K_SQUARE - 1) / K_SQUARE;
}

#define K_BLOCK 32u /* inputs per block of a sum; positions per KV page */
#define K_SCAN 128u /* logits that scan() takes together */
#define K_PANEL 32u /* output channels per panel of packed weights */

/* ---- number formats (kernels/nested.c) ---- */

uint16_t k_bf16_from_float(float);  /* nearest even; NaN stays a quiet NaN */
float k_bf16_to_float(uint16_t);
uint8_t k_e4m3_from_float(float);   /* OCP E4M3FN, nearest even, saturates at 448; NaN is 0x7f */
float k_e4m3_to_float(uint8_t);

/* ---- nested weights ---- */

/*
 * Channel r has k = floor(log2(448 / absmax)) clamped to +-120. The high plane
 * holds c = E4M3(w * 2^k) with the sign of w, the low plane the distance from c
 * to w * 2^k on the integer grid of BF16 magnitudes (code 0: from 0). Weights
 * whose distance does not fit 8 bits, or whose w * 2^k is neither zero nor a
 * BF16 normal, are exceptions: low 0, the master in a sorted list.
 *
 * fp8t, one scale for the whole tensor, needs no plane of its own: tensor_scale
 * is that of the channel with the largest absmax, and a weight is the high
 * plane's, brought to it by a power of two and rounded to E4M3 once more. What
 * stays normal keeps its three bits, so it is plain E4M3(w / tensor_scale) there;
 * below 2^-6 it was rounded twice, and is at most three quarters of a step off instead of a half.
 *
 * fp8b, a scale for each square of 128 channels by 128 inputs, needs none either: its
 * weights are made of the masters, so it reads both planes. A master that is subnormal is 0.
 */
struct k_exception {
	uint32_t block;  /* panel * (k_pad / 32) + block of inputs */
	uint16_t index;  /* 0..1023 in the byte order of the block */
	uint16_t bits;   /* master BF16 */
};

#define K_HAS_EXCEPTIONS 1u
#define K_HAS_SMALL 2u /* << tile, 0 or 1: codes below 8, which are zero or subnormal; a kernel may leave them out of account elsewhere */

struct k_weight {
	uint32_t n, k;         /* output channels, inputs */
	uint32_t n_pad, k_pad; /* multiples of K_PANEL, K_BLOCK */
	uint8_t *hi;           /* [n_pad/32][k_pad/32][2 tiles][16 input pairs][16 channels][2 inputs]: AMX B tiles */
	int8_t *lo;            /* same order */
	float *scale;          /* [n_pad] 2^-k, applied once to the output; 1 in the padding, 2^-120 for a channel of zeros */
	float tensor_scale;    /* the largest scale of a channel: fp8t; set by k_weight_finish() */
	float *square;         /* [n_pad/32][k_squares(k)] absmax / 448 of the square that a panel lies in, 1 if that is no
	                        * normal: fp8b; absmax of the panel alone until k_weight_finish() */
	uint8_t *flag;         /* [n_pad/32 * k_pad/32] of the block, K_HAS_* */
	struct k_exception *exc; /* [n_exc] ascending by (block, index) */
	uint32_t n_exc;
};

/* Sets the sizes and returns the bytes that k_weight_place() lays out. */
size_t k_weight_plan(struct k_weight *, uint32_t n, uint32_t k);
void k_weight_place(struct k_weight *, void *mem); /* mem: 64-byte aligned */
/* Packs rows [min(32, n - 32 * panel), k] of BF16 masters. Exceptions are added
 * to a malloc'd vector of the caller's. -EINVAL with the place on NaN or Inf. */
int k_pack_panel(struct k_weight *, uint32_t panel, const uint16_t *rows, struct k_exception **exc, uint32_t *n_exc,
    uint32_t *cap, uint32_t *bad_row, uint32_t *bad_col);
void k_weight_finish(struct k_weight *); /* after the last panel */
uint16_t k_unpack(const struct k_weight *, uint32_t row, uint32_t col); /* the exact master */
void k_unpack_row(const struct k_weight *, uint32_t row, float *y);     /* y [k] FP32 */
/* The exceptions of a block; what one is worth in the scaled domain of the
 * planes (BF16 of w * 2^k, a signed zero if that is no normal). */
const struct k_exception *k_find_exceptions(const struct k_weight *, uint32_t block, uint32_t *n);
uint16_t k_exception_value(const struct k_exception *, float scale);

/* ---- operations ---- */

/*
 * y[r][c] (+)= sum over i of x[r][i] * w[c][i], times x_scale[r] for fp8 and fp8t, times scale[c] (fp8t: tensor_scale).
 * fp8b: the sum of each 128 inputs on its own, times (x_scale[r][b] * the square's), is added to the total.
 */
struct k_linear {
	const struct k_weight *w;
	enum k_format format;
	const uint16_t *x;      /* [rows, ldx] BF16, zero from k to k_pad; E4M3 values for fp8, fp8t and fp8b */
	const float *x_scale;   /* [rows] for fp8 and fp8t; [rows, ld_scale] for fp8b; else NULL */
	uint32_t rows;
	size_t ldx;
	float *y;               /* [rows, ldy]; columns >= n are not written */
	size_t ldy;
	bool add;               /* y += */
	uint32_t panel0, panel1; /* computes the channels of panels [panel0, panel1) */
	size_t ld_scale;        /* fp8b alone */
};

/*
 * K and V of one layer over one absolute block of 32 positions. A BF16 page has
 * per KV head K as [hd_pad/2][32 positions][2] and, elsewhere, per KV head V as
 * [16 position pairs][hd_pad][2]; hd_pad is head_dim up to 32. An FP8 page has
 * both in the same orders, one E4M3 code a value, with a scale per position and
 * head. After a flip a block has both, and each position lies in one of them.
 */
struct k_kv_block {
	uint16_t *k, *v;        /* BF16 page: [n_kv_heads][hd_pad * 32] each, or NULL */
	uint8_t *q;             /* FP8 page: K, then V: [2][n_kv_heads][hd_pad * 32], or NULL */
	float *scale;           /* [2][n_kv_heads][32] of the FP8 page */
	uint32_t fp8;           /* bit j: position j lies in the FP8 page */
};

/*
 * Query positions pos, pos + 1 and so on of one sequence, heads [head0, head1).
 * Each block forms its own max, sum and output; blocks merge in ascending order.
 * In an FP8 position the score is (sum * scale of K) * scale, and p * scale of V
 * is rounded to BF16 for the output; the sum of p is that of BF16 p in either format.
 */
struct k_attention {
	const float *q;         /* [rows, ld] of [n_heads, head_dim], RoPE applied; rounded to BF16 here */
	float *out;             /* [rows, ld] of [n_heads, head_dim] */
	size_t ld;
	uint32_t rows;
	const struct k_kv_block *block; /* [(pos + rows - 1) / 32 + 1]; those before the first row's window are not read */
	uint32_t n_heads, n_kv_heads, head_dim, hd_pad;
	uint32_t head0, head1;
	uint32_t pos;           /* of the first row */
	uint32_t window;        /* a row attends to so many positions up to its own, 0: to all; other slots may hold anything */
	float scale;            /* 1 / sqrt(head_dim) */
	/* One row, fewer than K_PART_HEADS heads of one KV head: only blocks [block0, block1), and what each gives by itself goes
	 * to parts for attention_merge(), [block1 - block0][k_part()]: output [heads, hd_pad], maximum and sum [K_PART_HEADS]
	 * each. 64-byte aligned; NULL: all blocks, to out. */
	float *parts;
	uint32_t block0, block1;
};

#define K_PART_HEADS 16u /* of room: a call has fewer */
static inline size_t
k_part(uint32_t heads, uint32_t hd_pad)
{
	return (size_t)heads * hd_pad + 2 * K_PART_HEADS;
}

/* The first position that a row at pos attends to. */
static inline uint32_t
k_window_first(uint32_t pos, uint32_t window)
{
	return window != 0 && pos >= window ? pos - window + 1 : 0;
}

struct k_ops {
	const char *name;
	void (*linear)(const struct k_linear *); /* all but fp8b: k_linear_run() takes that too */
	/* out = E4M3(master / s) of blocks [block, block + n), all of one panel, but for exceptions, where it may be anything;
	 * flag [n]: K_HAS_SMALL where codes may be below 8. */
	void (*square_codes)(const struct k_weight *, uint32_t block, uint32_t n, float s, uint8_t *out, uint8_t *flag);
	/* Rounds x [n] to BF16; zeros up to n_pad. */
	void (*act_bf16)(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out);
	/* s = absmax / 448 (1 if zero); out = E4M3(x / s) as BF16; zeros up to n_pad. A NaN stays one. */
	void (*act_fp8)(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out, float *scale);
	/* y may be x. */
	void (*rmsnorm)(const float *x, const float *w, uint32_t n, float eps, float *y);
	/* Rotate-half RoPE in place: x [n_heads, head_dim], cos and sin [head_dim / 2]. */
	void (*rope)(float *x, uint32_t n_heads, uint32_t head_dim, const float *cos, const float *sin);
	/* y = gate / (1 + exp(-gate)) * up */
	void (*silu_mul)(const float *gate, const float *up, uint32_t n, float *y);
	/* Stores k, v [n_kv_heads, head_dim] at a slot 0..31 of a block, in the page that its bit of fp8 names.
	 * Scales as in act_fp8. */
	void (*kv_write)(const struct k_kv_block *, const float *k, const float *v, uint32_t n_kv_heads,
	    uint32_t head_dim, uint32_t hd_pad, uint32_t slot);
	void (*attention)(const struct k_attention *);
	/* Parts of blocks [block0, block1), all that the row attends to, in ascending order to out. */
	void (*attention_merge)(const struct k_attention *);
	/* What the machine can do, for benchmarks: reads every byte (a multiple of 4096); runs that many rounds of FMA
	 * on registers and returns the operations. */
	void (*probe_read)(const void *, size_t bytes);
	double (*probe_fma)(uint32_t rounds);
	/* Of two rows of logits [n] with x = a - max_a <= 0 and y = b - max_b <= 0, in FP64: the sums of exp(x), of exp(y)
	 * and of exp(x) * (x - y). One that is not finite makes a sum that is not. */
	void (*divergence)(const float *a, const float *b, uint32_t n, float max_a, float max_b, double out[3]);
	/* Of a row of logits [n]: the largest of each K_SCAN, max [n / K_SCAN rounded up]. False: one is not finite. */
	bool (*scan)(const float *x, uint32_t n, float *max);
	/* p [n] = exp((x - max) / temperature) in FP64, x <= max, or 0 if that is less than `least`; returns their sum,
	 * element i in lane i % 8, lanes folded in pairs. */
	double (*weights)(const float *x, uint32_t n, float max, double temperature, double least, double *p);
};

/* Of any format (kernels/squares.c): fp8b is made of a level's other kernels, so its bits are the same at every level. */
void k_linear_run(const struct k_ops *, const struct k_linear *);
/* act_fp8 of each 128 inputs: scale [k_squares(n)]. */
void k_act_squares(const struct k_ops *, const float *x, uint32_t n, uint32_t n_pad, uint16_t *out, float *scale);

/* The best level of this machine, or the named one ("ref", "avx2", "avx512", "avx512bf16", "amx").
 * NULL with why for a level that is unknown or that the machine lacks. */
const struct k_ops *kernels_select(const char *level, char *why, size_t why_len);
const char *kernels_level(size_t i); /* names from the lowest up, NULL past the end; not all may run here */
/* FTZ and DAZ for the calling thread: subnormals are zero at every level. */
void kernels_thread_init(void);
#endif
