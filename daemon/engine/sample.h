/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_SAMPLE_H
#define OCTET_SAMPLE_H
/*
 * From logits to a token: temperature, then top-k, then top-p over what is
 * left, then one draw. The draw is a pure function of (seed, position), so the
 * company of a batch cannot change it. Any thread with its own scratch.
 */
#include <stdint.h>
#include "daemon/engine/engine.h"

struct sample_scratch;
int sample_scratch_new(struct sample_scratch **, uint32_t vocab);
void sample_scratch_free(struct sample_scratch **);

/* logits [vocab], all finite. Ties go to the lowest id. *logprob (may be NULL):
 * log-softmax of the token under the untouched logits, FP64 inside. */
uint32_t sample_token(const float *logits, uint32_t vocab, const struct sampling *, uint32_t position,
    struct sample_scratch *, float *logprob);

/* Philox4x32-10 (Salmon et al., SC 2011): the first word of the block at
 * counter `position` under key `seed`, as a double in [0, 1). */
double sample_uniform(uint64_t seed, uint32_t position);
void sample_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);
#endif
