/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_KERNELS_DEVICE_H
#define OCTET_KERNELS_DEVICE_H
/*
 * What a device plugin gives: the forward pass of a whole step, and sampling,
 * on a device of its own. Plain structs and one table of functions, since the
 * plugin is loaded at run time and knows nothing of the engine. One thread at a
 * time calls it; but for open() and load(), host memory is allocated only where a
 * step is larger than any before it, or the first of its shape.
 *
 * The host keeps the books of the KV pages (which block of which sequence lies in
 * which page); the device has the pages. A page number means the same on both.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "kernels/kernels.h"

#define KD_ABI 5u
#define KD_SYMBOL "octet_device_api"
#define KD_LM_HEAD 7u   /* groups below are the linear layers of a layer */
#define KD_KV_CACHE 8u
#define KD_GROUPS 9u
#define KD_MAX_TOP 20u
#define KD_AHEAD 2u          /* steps that may be under way */

struct kd_device;

struct kd_layer {
	const float *input_norm, *post_norm; /* [hidden] */
	const float *q_norm, *k_norm;        /* [head_dim]; NULL: none */
	const struct k_weight *linear;       /* [KD_LM_HEAD] by group */
	const float *const *bias;            /* [KD_LM_HEAD]; [n] each, or NULL */
	bool no_rope;
};

enum kd_residency { KD_BOTH, KD_NESTED, KD_RESIDENCIES };

/* Everything is copied by load(); the masters may go after it. */
struct kd_model {
	uint32_t hidden, intermediate, n_layers, n_heads, n_kv_heads, head_dim, vocab, max_context, window;
	float rms_eps;
	const struct kd_layer *layer;        /* [n_layers] */
	const struct k_weight *lm_head;
	const uint16_t *embed;               /* [vocab, hidden] BF16; NULL: lm_head's BF16 */
	const float *final_norm;             /* [hidden] */
	const float *rope_cos, *rope_sin;    /* [max_context, head_dim / 2] */
	const uint8_t *residency;            /* [KD_GROUPS][n_layers] enum kd_residency, lm_head at layer 0; NULL: both */
	bool fast_accumulation;              /* of FP8 products by a library: fewer bits of a sum, if that is faster */
	uint32_t max_rows;                   /* of a step */
	uint32_t n_pages;                    /* of the KV cache, [n_kv_heads * hd_pad * 32] 16-bit values each */
	const char *cache_dir;               /* where found plans of cuBLASLt are kept; NULL: nowhere */
	void (*progress)(void *, int percent);
	void *progress_arg;
};

struct kd_memory {
	uint64_t weights, kv, buffers, free, total; /* bytes; free and total of the device */
	uint64_t group[KD_LM_HEAD + 1];  /* of the weights: what the planes of a group's sites take */
	uint64_t group_as[KD_RESIDENCIES][KD_LM_HEAD + 1]; /* what they would, if all were so */
};

/* Pages of one layer's block, as the engine's struct kv_block; UINT32_MAX: none. */
struct kd_block {
	uint32_t k, v, q, fp8;
};

/* Rows of one sequence and one plan lie together, in ascending positions. */
struct kd_row {
	uint32_t token, pos;                 /* drawn: the token is what the step before drew in its wanted row so numbered */
	const struct kd_block *table;        /* [pos / 32 + 1][n_layers] */
	uint64_t table_id;                   /* not 0. While it stays the same, blocks that were shown change only at the end */
	const uint8_t *plan;                 /* [KD_GROUPS][n_layers] enum k_format */
	uint64_t digest;                     /* equal plans have equal digests */
	bool wants;                          /* logits */
	bool drawn;
};

/* What is to become of the logits of a row that wants them. */
enum kd_want_kind { KD_LOGITS, KD_SCORE, KD_DRAW };

struct kd_edit {                         /* a logit that changes before a token is drawn */
	uint32_t id;
	uint32_t n_output;               /* how often it was output already */
	float bias;
	bool seen;                       /* in prompt or output: repetition applies */
};

struct kd_want {
	enum kd_want_kind kind;
	uint32_t position;               /* of the token to come: Philox' counter */
	uint32_t token;                  /* KD_SCORE: the one that is known */
	uint64_t seed;
	float temperature, top_p, min_p, repetition, presence, frequency;
	uint32_t top_k, n_top;
	bool logprob;
	const struct kd_edit *edit;      /* [n_edit]; without what a drawn row's own token does: it was output once more */
	uint32_t n_edit;
};

struct kd_result {
	uint32_t token;                  /* bad: 0, so that a row of the next step may have it */
	float logprob;
	bool bad;                        /* a logit is not finite */
	uint32_t n_top;
	uint32_t top_id[KD_MAX_TOP];
	float top_logprob[KD_MAX_TOP];
};

/* What FP8 does, or would do, to the inputs of a site of one row, looked at before they are rounded and whatever the site's
 * format, with the scale that fp8 would give them: of the row; for kv_cache of each head's K and V. */
struct kd_evidence {
	float absmax;                    /* largest magnitude */
	uint32_t n, zeros, saturated;    /* values; those other than 0 that become 0; those that become the largest code */
};

struct kd_sample {
	uint32_t row;                    /* of the step; of lm_head it is the first that wants logits */
	struct kd_evidence *site;        /* [KD_GROUPS][n_layers], lm_head at layer 0; n 0: it did not run */
};

struct kd_status {
	char device[64], kernels[128];   /* what it is called; driver and library versions */
	uint64_t mem_used, mem_total;    /* bytes */
	uint32_t sm_mhz, mem_mhz, watts, limit_watts, busy_percent, celsius; /* 0: not known */
	uint64_t graphs, graph_launches, eager_steps;
	double host_us, device_us;       /* of a step, lately: laying out and launching; running */
	double busy_s;                   /* running steps, ever */
	char failure[128];               /* empty: none */
};

struct kd_api {
	uint32_t abi;                    /* KD_ABI; first */
	uint32_t bytes;                  /* sizeof(struct kd_api) */
	const char *name;                /* "cuda" */
	/* 0 or -errno with one line of why. */
	int (*open)(struct kd_device **, uint32_t index, char *why, size_t why_len);
	void (*close)(struct kd_device **);
	bool (*has_fp8)(const struct kd_device *);
	/* The bytes load() would take, by kd_model's sizes alone. */
	void (*plan_memory)(struct kd_device *, const struct kd_model *, struct kd_memory *);
	int (*load)(struct kd_device *, const struct kd_model *, char *why, size_t why_len);
	/* Starts rows [0, n) behind those that were started before; KD_AHEAD steps at most are under way. want [n_wanted] may
	 * be NULL: then all logits are copied. logits: [n_wanted, vocab], the rows of kind KD_LOGITS are written; result
	 * [n_wanted], the others: both, and the sites of a sample (NULL: none), belong to the device until wait(). The rest may
	 * be used again at once, and pages too: rows that are submitted later run later. -EIO: the device failed, for good. */
	int (*submit)(struct kd_device *, const struct kd_row *, uint32_t n, const struct kd_want *, float *logits,
	    struct kd_result *, const struct kd_sample *, char *why, size_t why_len);
	/* Until the oldest step that is under way is done. -EIO as above. */
	int (*wait)(struct kd_device *, char *why, size_t why_len);
	/* One row again, to find where it first goes non-finite: 1 found, 0 not. */
	int (*find_nonfinite)(struct kd_device *, const struct kd_row *, uint32_t *group, uint32_t *layer);
	/* Any thread. The format that runs at a site where `format` is wanted, and in words the kernel that decodes one
	 * row, and many. */
	enum k_format (*executes)(const struct kd_device *, uint32_t group, uint32_t layer, enum k_format);
	void (*kernel_name)(const struct kd_device *, uint32_t group, uint32_t layer, enum k_format, char *, size_t);
	void (*status)(struct kd_device *, struct kd_status *);
};
#endif
