/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/sample.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

struct candidate {
	double p;
	uint32_t id;
};

struct sample_scratch {
	uint32_t vocab;
	struct candidate cand[];
};

int
sample_scratch_new(struct sample_scratch **out, uint32_t vocab)
{
	*out = malloc(sizeof(**out) + (size_t)vocab * sizeof((*out)->cand[0]));
	if (*out == NULL)
		return -ENOMEM;
	(*out)->vocab = vocab;
	return 0;
}

void
sample_scratch_free(struct sample_scratch **s)
{
	free(*s);
	*s = NULL;
}

void
sample_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
	uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
	uint32_t k0 = key[0], k1 = key[1];

	for (int round = 0; round < 10; round++) {
		uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;

		c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
		c1 = (uint32_t)b;
		c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
		c3 = (uint32_t)a;
		k0 += 0x9E3779B9u;
		k1 += 0xBB67AE85u;
	}
	out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

double
sample_uniform(uint64_t seed, uint32_t position)
{
	uint32_t counter[4] = {position, 0, 0, 0}, key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)}, out[4];

	sample_philox(counter, key, out);
	return (double)(((uint64_t)out[0] << 21) ^ (out[1] >> 11)) * 0x1p-53;
}

static uint32_t
argmax(const float *logits, uint32_t vocab)
{
	uint32_t best = 0;

	for (uint32_t i = 1; i < vocab; i++)
		if (logits[i] > logits[best])
			best = i;
	return best;
}

static double
log_sum_exp(const float *logits, uint32_t vocab, float max)
{
	double sum = 0;

	for (uint32_t i = 0; i < vocab; i++)
		sum += exp((double)logits[i] - max);
	return log(sum) + max;
}

/* Highest probability first; equal ones by id, so that the order is total. */
static int
by_probability(const void *pa, const void *pb)
{
	const struct candidate *a = pa, *b = pb;

	if (a->p != b->p)
		return a->p > b->p ? -1 : 1;
	return a->id < b->id ? -1 : a->id > b->id;
}

static uint32_t
draw(const float *logits, uint32_t vocab, const struct sampling *s, uint32_t position, float max,
    struct candidate *cand)
{
	uint32_t n = vocab;
	double sum = 0, kept = 0, u;

	for (uint32_t i = 0; i < vocab; i++)
		cand[i] = (struct candidate){exp(((double)logits[i] - max) / s->temperature), i};
	if (s->top_k != 0 || s->top_p < 1.0f)
		qsort(cand, vocab, sizeof(*cand), by_probability);
	if (s->top_k != 0 && s->top_k < n)
		n = s->top_k;
	for (uint32_t i = 0; i < n; i++)
		sum += cand[i].p;
	if (s->top_p < 1.0f) {
		uint32_t i = 0;

		while (i < n && kept < (double)s->top_p * sum)
			kept += cand[i++].p;
		n = i > 0 ? i : 1;
		sum = 0;
		for (i = 0; i < n; i++)
			sum += cand[i].p;
	}
	u = sample_uniform(s->seed, position) * sum;
	for (uint32_t i = 0; i < n; i++) {
		u -= cand[i].p;
		if (u < 0)
			return cand[i].id;
	}
	return cand[n - 1].id;
}

uint32_t
sample_token(const float *logits, uint32_t vocab, const struct sampling *s, uint32_t position,
    struct sample_scratch *scratch, float *logprob)
{
	uint32_t best = argmax(logits, vocab), token = best;

	if (s->temperature > 0)
		token = draw(logits, vocab, s, position, logits[best], scratch->cand);
	if (logprob != NULL)
		*logprob = (float)((double)logits[token] - log_sum_exp(logits, vocab, logits[best]));
	return token;
}
