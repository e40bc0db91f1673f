/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/sample.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct candidate {
	double p;
	uint32_t id;
};

struct sample_scratch {
	uint32_t vocab;
	uint32_t *count;         /* [vocab] all zero between calls */
	float *plain;            /* [vocab] logits before they are changed */
	struct candidate cand[];
};

int
sample_scratch_new(struct sample_scratch **out, uint32_t vocab)
{
	*out = malloc(sizeof(**out) + (size_t)vocab * sizeof((*out)->cand[0]));
	if (*out == NULL)
		return -ENOMEM;
	(*out)->vocab = vocab;
	(*out)->count = calloc(vocab, sizeof(*(*out)->count));
	(*out)->plain = malloc(vocab * sizeof(*(*out)->plain));
	if ((*out)->count != NULL && (*out)->plain != NULL)
		return 0;
	sample_scratch_free(out);
	return -ENOMEM;
}

void
sample_scratch_free(struct sample_scratch **s)
{
	if (*s == NULL)
		return;
	free((*s)->count);
	free((*s)->plain);
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
	uint32_t n = 0;
	double sum = 0, kept = 0, u;

	/* The most likely token has p = 1 here. */
	for (uint32_t i = 0; i < vocab; i++) {
		double p = exp(((double)logits[i] - max) / s->temperature);

		if (p >= s->min_p)
			cand[n++] = (struct candidate){p, i};
	}
	if (s->top_k != 0 || s->top_p < 1.0f)
		qsort(cand, n, sizeof(*cand), by_probability);
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

/* Each token is treated once, however often it occurs. */
static void
penalise(float *logits, const struct sampling *s, const uint32_t *token, uint32_t n_prompt, uint32_t n_known,
    uint32_t *count)
{
	const uint32_t seen = (uint32_t)1 << 31;
	float repetition = s->repetition_penalty == 0 ? 1 : s->repetition_penalty;

	for (uint32_t i = n_prompt; i < n_known; i++)
		count[token[i]]++;
	for (uint32_t i = 0; i < n_known; i++) {
		float *l = &logits[token[i]];
		uint32_t n = count[token[i]];

		if (n & seen)
			continue;
		count[token[i]] = n | seen;
		*l = *l > 0 ? *l / repetition : *l * repetition;
		if (n > 0)
			*l -= s->presence_penalty + s->frequency_penalty * (float)n;
	}
	for (uint32_t i = 0; i < n_known; i++)
		count[token[i]] = 0;
}

/* Highest first; equal ones by id. */
static void
find_top(const float *logits, uint32_t vocab, uint32_t n, double lse, struct sampled *out)
{
	struct logit_bias *top = out->top;
	uint32_t k = 0;

	n = n < vocab ? n : vocab;
	for (uint32_t i = 0; i < vocab && n > 0; i++) {
		uint32_t at;

		if (k == n && !(logits[i] > top[k - 1].value))
			continue;
		at = k < n ? k++ : k - 1;
		for (; at > 0 && logits[i] > top[at - 1].value; at--)
			top[at] = top[at - 1];
		top[at] = (struct logit_bias){i, logits[i]};
	}
	for (uint32_t i = 0; i < k; i++)
		top[i].value = (float)(top[i].value - lse);
	out->n_top = k;
}

void
sample_score(const float *logits, uint32_t vocab, uint32_t token, uint32_t n_top, struct sampled *out)
{
	double lse = log_sum_exp(logits, vocab, logits[argmax(logits, vocab)]);

	out->token = token;
	out->logprob = (float)((double)logits[token] - lse);
	find_top(logits, vocab, n_top, lse, out);
}

void
sample_token(float *logits, uint32_t vocab, const struct sampling *s, const uint32_t *token, uint32_t n_prompt,
    uint32_t n_known, struct sample_scratch *scratch, struct sampled *out)
{
	bool logprobs = s->logprobs || s->top_logprobs > 0;
	double lse = logprobs ? log_sum_exp(logits, vocab, logits[argmax(logits, vocab)]) : 0;
	bool penalties = (s->repetition_penalty != 0 && s->repetition_penalty != 1) || s->presence_penalty != 0 ||
	    s->frequency_penalty != 0;
	uint32_t best;

	out->n_top = 0;
	if (s->top_logprobs > 0)
		find_top(logits, vocab, s->top_logprobs, lse, out);
	if (logprobs)
		memcpy(scratch->plain, logits, vocab * sizeof(*logits));
	if (penalties)
		penalise(logits, s, token, n_prompt, n_known, scratch->count);
	for (uint32_t i = 0; i < s->n_bias; i++)
		logits[s->bias[i].id] += s->bias[i].value;
	best = argmax(logits, vocab);
	out->token = s->temperature > 0 ? draw(logits, vocab, s, n_known, logits[best], scratch->cand) : best;
	if (logprobs)
		out->logprob = (float)((double)scratch->plain[out->token] - lse);
}
