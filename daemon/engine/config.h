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

struct model_shape {
	uint32_t hidden, intermediate, n_layers, n_heads, n_kv_heads, head_dim;
	uint32_t vocab, max_context;
	float rms_eps;
	double rope_theta;
	bool tied;          /* lm_head is the embedding */
	uint32_t eos[8], n_eos;
};

/* The shape of the model in a directory. text (may be NULL): config.json itself,
 * malloc'd. -ENOTSUP for what octet does not run, -EINVAL for what is wrong. */
int config_read(struct model_shape *, const char *dir, char **text, size_t *len, struct err *);
/* A whole text file, malloc'd and terminated. An optional one that is missing
 * leaves *out as it is. */
int config_read_file(const char *dir, const char *file, bool optional, char **out, size_t *len, struct err *);
#endif
