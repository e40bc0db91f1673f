/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CUDA_PLUGIN_H
#define OCTET_CUDA_PLUGIN_H
/*
 * The host side of the plugin: weights.c puts the model on the card, step.c runs
 * a step (eagerly, or as a graph), lt.c finds and keeps plans of cuBLASLt,
 * plugin.c opens, tells and is the table. One thread at a time, but for
 * what the atomics of struct kd_device are for.
 */
#include <cublasLt.h>
#include <pthread.h>

#include "kernels/cuda/cu.h"

enum { G_Q, G_K, G_V, G_O, G_GATE, G_UP, G_DOWN };
enum bundle_name { B_QKV, B_O, B_GU, B_DOWN, N_BUNDLES };
enum { SEEN_KV = N_BUNDLES, N_SEEN }; /* figures of a layer: the inputs of each bundle, K and V */

/* Sites that read the same inputs, their weights one after the other: where
 * formats agree they are one product. */
struct bundle {
	uint32_t parts, group[3], n[3], at[3]; /* at: first output channel */
	uint32_t n_all, k, ld;
	/* Of each part, [n, ld]: BF16, or the low plane where it is nested; the other is NULL. Neighbours of one residency
	 * lie one after the other. */
	uint16_t *bf16[3];
	int8_t *lo[3];
	uint8_t *hi;            /* [n_all, ld] */
	float *scale, *tscale;  /* [n_all] */
	float *square;          /* [rows of squares of all parts, ld_square]: fp8b */
	uint32_t ld_square, square_at[3];
	float *bias;            /* [n_all] or NULL */
	struct cu_exceptions exc[3];
	bool head;
};

struct layer {
	struct bundle b[N_BUNDLES];
	float *input_norm, *post_norm, *q_norm, *k_norm;
	bool no_rope;
};

/* ---- lt.c ---- */

#define LT_WORKSPACE ((size_t)32 << 20)

enum lt_kind { LT_BF16, LT_FP8_OUTER, LT_FP8_SCALAR, LT_FP8_SQUARES };
struct lt;
int lt_new(struct lt **, const char *cache_dir, const char *device, bool fast, char *why, size_t why_len);
void lt_free(struct lt **);
/* y [t, ldy] FP32 = x [t, ldx] w [n, k]^T, + y if add. Scales as LT_FP8_OUTER has them, [n] and [t]; as LT_FP8_SQUARES,
 * [n / 128, k / 128 up to a multiple of 4] and [k / 128, t]; else NULL. -ENOTSUP: this shape is not to be had. */
int lt_run(struct lt *, enum lt_kind, const void *w, const void *x, size_t ldx, float *y, size_t ldy, uint32_t n, uint32_t k,
    uint32_t t, bool add, const float *w_scale, const float *x_scale, cudaStream_t);
/* The same, and the best of eight algorithms is chosen by timing; y is overwritten. */
int lt_tune(struct lt *, enum lt_kind, const void *w, const void *x, size_t ldx, float *y, size_t ldy, uint32_t n, uint32_t k,
    uint32_t t, bool add, const float *w_scale, const float *x_scale, cudaStream_t);
enum lt_kind lt_ran(const struct lt *); /* what ran last */
/* Whether lt_tune() has a time now; what an own kernel took for the same; whether the library did better. */
bool lt_timed(const struct lt *);
void lt_against(struct lt *, float us);
bool lt_wins(const struct lt *, enum lt_kind, const void *w, const void *x, size_t ldx, const float *y, size_t ldy, uint32_t n,
    uint32_t k, uint32_t t, bool add);
void lt_save(struct lt *); /* what lt_tune() found */

/* ---- the device ---- */

#define MAX_GRAPHS 64u
#ifdef OCTET_EMU
#define MAX_RANGES 2u   /* so that tests have batches of several passes */
#else
#define MAX_RANGES 64u
#endif
#define TOOK_NONE 255u
#define MIXED_SEEN 4u   /* requests come and go: most mixtures of plans do not last */

struct graph {
	uint64_t plans, used;   /* plans: of all rows, as mixed() has it */
	uint32_t rows, splits, seen;
	bool tried;             /* to capture it */
	cudaGraphExec_t exec;   /* NULL: runs eagerly */
};

/* Rows [row, row + n) of one plan. */
struct range {
	const uint8_t *plan;
	uint32_t row, n;
};

/* What a step needs, on the host (pinned) and at fixed places on the device. */
struct staged {
	uint32_t *token, *pos, *first, *from; /* [max_rows] each; from: the rows that want logits */
	struct cu_tile *tile;   /* [max_rows] */
	struct cu_want *want;   /* [max_rows] */
	struct cu_patch *patch; /* [max_rows] */
	size_t bytes;           /* of all these */
	struct kd_edit *edit; size_t cap_edit;    /* these grow */
	struct kd_block *block; size_t cap_block; /* what is new of page tables */
};

/* Page tables (tables.c). */
struct tables {
	struct kd_block *dev;   /* [cap] */
	size_t cap, used;       /* entries */
	struct table *slot;     /* [n_slots] by number */
	uint32_t n_slots, n_tables;
	size_t n_new;           /* entries that a step sends */
	uint32_t n_patches;
};

/* A step that was submitted: the host's side of it, which its copies read and write until it is done. */
struct flight {
	struct staged host;
	struct kd_result *pinned; /* [max_rows] */
	cudaEvent_t begin, end;
	uint32_t n_wanted;
	struct kd_result *result; /* where its results go; NULL: nowhere */
	float *logits;          /* where those that are copied back go: of the wanted rows copied[n_copied] */
	uint32_t *copied, n_copied; /* [max_rows] */
	float *pinned_logits; size_t cap_logits; /* [n_copied, vocab]; grows */
	uint32_t seen_row;
	struct kd_evidence *seen; /* where the figures of that row go; NULL: there are none */
	struct kd_evidence *pinned_seen; /* seen_bytes() */
	double host_us;
	bool passes;            /* it took several: the last one's results alone are on the device */
};

struct kd_device {
	int index;
	bool counted;           /* among those that use this card */
	uint32_t sm_count, capability; /* 90: 9.0 */
	char name[64], kernels[128];
	cudaStream_t stream;
	struct lt *lt;
	void *nvml, *nvml_device; /* NULL: none */

	/* The model. Pointers of the structs in it are NULL. */
	struct kd_model m;
	struct layer *layer;
	struct bundle head;
	uint16_t *embed; size_t embed_ld; /* NULL: nested, from head */
	float *final_norm, *cos, *sin;
	void *weights;          /* one allocation */
	void *exc_mem[16384];   /* of exceptions */
	uint32_t n_exc_mem;
	struct cu_kv kv;

	/* A step's buffers, one allocation; rows padded to 16. */
	void *buffers;
	float *x, *qkv, *attn, *gu, *part, *logits, *xs;
	uint16_t *q, *xb;
	uint8_t *xq, *xqb;
	size_t ldx;             /* of xb, xq and xqb */
	float *xsb, *xsb_t;     /* [max_rows, ldb], and turned round for cuBLASLt */
	size_t ldb;
	uint64_t *weight;       /* of sampling, [max_rows, vocab] */
	void *scratch;          /* a layer's weights unpacked */
	size_t scratch_bytes;
	float *scalar_y;        /* [max_rows, scalar_n] what scalar mode gave; lm_head is larger */
	uint32_t scalar_n;
	struct kd_result *result; /* [max_rows] of the pass that ran last */
	struct kd_evidence *seen; /* [n_layers][N_SEEN], then lm_head's: of a step with a sample */
	uint32_t *first_bad;
	uint32_t max_part;      /* rows * splits that part has room for */

	struct flight flight[KD_AHEAD];
	uint64_t n_submitted, n_waited; /* flights, in turns */
	struct staged *host, dev; /* host: of the step that is laid out */
	struct tables tables;
	struct range range[MAX_RANGES];
	uint32_t n_ranges;
	uint8_t took[N_BUNDLES + 1][K_N_FORMATS]; /* 0: not asked; 1 + enum lt_kind that has many rows; TOOK_NONE */
	struct graph graph[MAX_GRAPHS];
	uint32_t n_graphs;
	uint64_t clock;
	bool trace;

	/* Any thread, atomically. */
	uint64_t mem_used, graph_launches, eager_steps, captured, busy_us;
	uint32_t host_us, device_us, failed;
	char failure[128];
};

/* Of a sample: [n_layers][N_SEEN], then lm_head's. */
static inline size_t
seen_bytes(const struct kd_model *m)
{
	return ((size_t)m->n_layers * N_SEEN + 1) * sizeof(struct kd_evidence);
}

/* Where a group's weights are; its part of that. */
const struct bundle *weights_of(const struct kd_device *, uint32_t group, uint32_t layer, uint32_t *part);
int weights_load(struct kd_device *, const struct kd_model *, char *why, size_t why_len);
void weights_free(struct kd_device *);
void weights_memory(struct kd_device *, const struct kd_model *, struct kd_memory *);
int step_submit(struct kd_device *, const struct kd_row *, uint32_t n, const struct kd_want *, float *logits, struct kd_result *,
    const struct kd_sample *, char *why, size_t why_len);
int step_wait(struct kd_device *, char *why, size_t why_len);
/* Memory of the card, or pinned memory of the step that is laid out, that grows: for at least so many of a size. What was in it
 * is lost. */
int step_grow(struct kd_device *, bool card, void **mem, size_t *cap, size_t want, size_t size, char *why, size_t why_len);
int tables_new(struct tables *, uint32_t max_rows);
void tables_free(struct tables *);
int tables_stage(struct kd_device *, const struct kd_row *, uint32_t n, char *why, size_t why_len);
void tables_send(struct kd_device *);
int step_find_nonfinite(struct kd_device *, const struct kd_row *, uint32_t *group, uint32_t *layer);
void step_tune(struct kd_device *); /* once, after loading: plans for the shapes of this model */
void step_free_graphs(struct kd_device *); /* and waits: they may know what goes next */

/* 0, or -errno with the call and its error in why. */
int cu_failed(cudaError_t, const char *what, char *why, size_t why_len);
#endif
