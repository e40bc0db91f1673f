/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CONFIG_H
#define OCTET_CONFIG_H
/*
 * config.json and generation_config.json: which architecture, which sizes.
 * Reads no weights, so a shape is known before anything is mapped. Any thread.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "client/err.h"

#define CONFIG_MAX_HEAD_DIM 256u
#define CONFIG_MAX_LAYERS 256u

/* How the angles of RoPE are made; config_rope_freq() knows the formulas. */
enum rope_type { ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3 };

struct model_shape {
	const char *arch;   /* "LlamaForCausalLM", ...; static */
	uint32_t hidden, intermediate, n_layers, n_heads, n_kv_heads, head_dim;
	uint32_t vocab, max_context;
	uint32_t window;    /* a position attends to itself and the window - 1 before it; 0: to all before it */
	float rms_eps;
	double rope_theta;
	enum rope_type rope_type;
	double rope_factor, rope_low, rope_high; /* low and high: llama3 only */
	uint32_t rope_original;                  /* llama3: the context it was first trained on */
	bool no_rope[CONFIG_MAX_LAYERS];         /* layers that leave q and k as they are */
	bool qkv_bias, o_bias, mlp_bias;
	bool qk_norm;       /* RMSNorm of each head of q and k before RoPE */
	bool tied;          /* lm_head is the embedding */
	uint32_t eos[8], n_eos;
};

/* The shape of the model in a directory. text (may be NULL): config.json itself,
 * malloc'd. -ENOTSUP for what octet does not run, -EINVAL for what is wrong. */
int config_read(struct model_shape *, const char *dir, char **text, size_t *len, struct err *);
/* Radians per position of pair i < head_dim / 2. */
double config_rope_freq(const struct model_shape *, uint32_t i);
/* A whole text file, malloc'd and terminated. An optional one that is missing
 * leaves *out as it is. */
int config_read_file(const char *dir, const char *file, bool optional, char **out, size_t *len, struct err *);
#endif
