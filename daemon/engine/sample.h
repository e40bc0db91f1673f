/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_SAMPLE_H
#define OCTET_SAMPLE_H
/*
 * From logits to a token. Every choice is a pure function of the logits, the
 * tokens before it, (seed, position) and the request's settings, so the company
 * of a batch cannot change it. Any thread with its own scratch.
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/engine/engine.h"
#include "kernels/kernels.h"

struct sample_scratch;
int sample_scratch_new(struct sample_scratch **, const struct k_ops *, uint32_t vocab);
void sample_scratch_free(struct sample_scratch **);

struct sampled {
	uint32_t token;
	float logprob;       /* log-softmax of the token under the untouched logits, FP64 inside; if asked for */
	uint32_t n_top;
	struct logit_bias top[WIRE_MAX_TOP]; /* ids and log-probabilities, highest first */
};

/* logits [vocab] of the scratch; changed in place. False: one is not finite. Draws the token of position
 * n_known from what follows token [n_known], of which the first n_prompt are the
 * prompt. Ties go to the lowest id. Penalties as in the CTRL paper (Keskar et
 * al., 2019; prompt and output) and OpenAI's API (output only); min_p as in
 * Nguyen et al., 2024. */
bool sample_token(float *logits, const struct sampling *, const uint32_t *token, uint32_t n_prompt, uint32_t n_known,
    struct sample_scratch *, struct sampled *);
/* The log-probability of a known token, and the alternatives. False: as above. */
bool sample_score(const float *logits, uint32_t token, uint32_t n_top, struct sample_scratch *, struct sampled *);

/* Philox4x32-10 (Salmon et al., SC 2011): the first word of the block at
 * counter `position` under key `seed`, as a double in [0, 1). */
double sample_uniform(uint64_t seed, uint32_t position);
void sample_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);
#endif
