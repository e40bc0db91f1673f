/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/sample.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A token in an order: key is the larger the likelier. */
struct ranked {
	uint32_t key, id;
};

struct sample_scratch {
	const struct k_ops *ops;
	uint32_t vocab;
	uint32_t *count;         /* [vocab] all zero between calls */
	float *plain;            /* [vocab] logits before they are changed */
	float *max;              /* [blocks] of each K_SCAN logits */
	double *sum;             /* [blocks] of their weights */
	double *p;               /* [vocab] weights: the likeliest token has 1 */
	struct ranked *ranked, *spare; /* [vocab] */
};

static uint32_t
n_blocks(uint32_t vocab)
{
	return (vocab + K_SCAN - 1) / K_SCAN;
}

int
sample_scratch_new(struct sample_scratch **out, const struct k_ops *ops, uint32_t vocab)
{
	struct sample_scratch *s = calloc(1, sizeof(*s));

	*out = s;
	if (s == NULL)
		return -ENOMEM;
	s->ops = ops;
	s->vocab = vocab;
	s->count = calloc(vocab, sizeof(*s->count));
	s->plain = malloc(vocab * sizeof(*s->plain));
	s->max = malloc(n_blocks(vocab) * sizeof(*s->max));
	s->sum = malloc(n_blocks(vocab) * sizeof(*s->sum));
	s->p = malloc(vocab * sizeof(*s->p));
	s->ranked = malloc(vocab * sizeof(*s->ranked));
	s->spare = malloc(vocab * sizeof(*s->spare));
	if (s->count != NULL && s->plain != NULL && s->max != NULL && s->sum != NULL && s->p != NULL && s->ranked != NULL &&
	    s->spare != NULL)
		return 0;
	sample_scratch_free(out);
	return -ENOMEM;
}

void
sample_scratch_free(struct sample_scratch **sp)
{
	struct sample_scratch *s = *sp;

	if (s == NULL)
		return;
	free(s->count), free(s->plain), free(s->max), free(s->sum), free(s->p), free(s->ranked), free(s->spare);
	free(s);
	*sp = NULL;
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

/* ---- the order of tokens: the likeliest first, equal ones by id ---- */

static uint32_t
key_of(float logit)
{
	float plain = logit + 0.0f; /* -0 equals 0 */
	uint32_t bits;

	memcpy(&bits, &plain, sizeof(bits));
	return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Stable: what comes in the order of ids stays so among equals. */
static void
sort(struct ranked **list, struct ranked **spare, uint32_t n)
{
	enum { DIGIT = 11, RADIX = 1 << DIGIT };

	for (uint32_t shift = 0; shift < 32; shift += DIGIT) {
		uint32_t start[RADIX] = {0}, at = 0;
		struct ranked *from = *list, *to = *spare;

		for (uint32_t i = 0; i < n; i++)
			start[from[i].key >> shift & (RADIX - 1)]++;
		for (uint32_t d = RADIX; d-- > 0;) {
			uint32_t count = start[d];

			start[d] = at;
			at += count;
		}
		for (uint32_t i = 0; i < n; i++)
			to[start[from[i].key >> shift & (RADIX - 1)]++] = from[i];
		*list = to;
		*spare = from;
	}
}

/* The block that has the largest logit, the first of equals. */
static uint32_t
best_block(const struct sample_scratch *c)
{
	uint32_t best = 0;

	for (uint32_t b = 1; b < n_blocks(c->vocab); b++)
		if (c->max[b] > c->max[best])
			best = b;
	return best;
}

static uint32_t
argmax(const struct sample_scratch *c, const float *logits)
{
	uint32_t b = best_block(c), i = b * K_SCAN;

	while (logits[i] != c->max[b])
		i++;
	return i;
}

/* At least n tokens have this logit or a larger one: so many blocks have. */
static float
floor_of(struct sample_scratch *c, uint32_t n)
{
	uint32_t blocks = n_blocks(c->vocab);

	if (n > blocks)
		return -INFINITY;
	for (uint32_t b = 0; b < blocks; b++)
		c->ranked[b] = (struct ranked){key_of(c->max[b]), b};
	sort(&c->ranked, &c->spare, blocks);
	return c->max[c->ranked[n - 1].id];
}

/* Fills ranked with the tokens of a logit and a weight at least so large, likeliest first; returns their number. */
static uint32_t
rank(struct sample_scratch *c, const float *logits, float floor, double least)
{
	uint32_t n = 0;

	for (uint32_t b = 0; b < n_blocks(c->vocab); b++) {
		uint32_t to = (b + 1) * K_SCAN < c->vocab ? (b + 1) * K_SCAN : c->vocab;

		if (c->max[b] < floor)
			continue;
		for (uint32_t i = b * K_SCAN; i < to; i++) {
			c->ranked[n] = (struct ranked){key_of(logits[i]), i};
			n += logits[i] >= floor && c->p[i] >= least;
		}
	}
	sort(&c->ranked, &c->spare, n);
	return n;
}

/* ---- draws ---- */

/* The weights of blocks with a logit from floor on, and their sum. Those below min_p are 0. */
static double
weigh(struct sample_scratch *c, const float *logits, const struct sampling *s, float max, float floor)
{
	double sum = 0, least;

	for (uint32_t b = 0; b < n_blocks(c->vocab); b++) {
		uint32_t from = b * K_SCAN, n = c->vocab - from < K_SCAN ? c->vocab - from : K_SCAN;

		c->sum[b] = 0;
		if (c->max[b] < floor)
			continue;
		least = s->min_p;
		/* Nearly all blocks of a likely row: their best is too unlikely. */
		if (least > 0 && c->ops->weights(&c->max[b], 1, max, s->temperature, 0, &c->p[from]) < least) {
			memset(&c->p[from], 0, n * sizeof(*c->p));
			continue;
		}
		c->sum[b] = c->ops->weights(logits + from, n, max, s->temperature, least, c->p + from);
		sum += c->sum[b];
	}
	return sum;
}

/* In the order of ids. */
static uint32_t
draw_any(struct sample_scratch *c, double u)
{
	uint32_t last = 0, b = 0;

	for (; b + 1 < n_blocks(c->vocab) && u >= c->sum[b]; b++)
		u -= c->sum[b];
	for (uint32_t i = b * K_SCAN; i < c->vocab; i++) {
		if (c->p[i] == 0)
			continue;
		last = i;
		u -= c->p[i];
		if (u < 0)
			return i;
	}
	/* The sum was rounded up. */
	for (uint32_t i = c->vocab; last == 0 && i-- > 0;)
		if (c->p[i] > 0)
			return i;
	return last;
}

/* In the order of likelihood: of the first n in ranked. */
static uint32_t
draw_ranked(const struct sample_scratch *c, const struct sampling *s, uint32_t n, double sum, double u)
{
	double kept = 0;
	uint32_t i = 0;

	if (s->top_p < 1.0f) {
		while (i < n && kept < (double)s->top_p * sum)
			kept += c->p[c->ranked[i++].id];
		n = i > 0 ? i : 1;
		sum = 0;
		for (i = 0; i < n; i++)
			sum += c->p[c->ranked[i].id];
	}
	u *= sum;
	for (i = 0; i < n; i++) {
		u -= c->p[c->ranked[i].id];
		if (u < 0)
			return c->ranked[i].id;
	}
	return c->ranked[n - 1].id;
}

static uint32_t
draw(struct sample_scratch *c, const float *logits, const struct sampling *s, uint32_t position, float max)
{
	double u = sample_uniform(s->seed, position), sum, least = s->min_p;
	float floor = s->top_k != 0 ? floor_of(c, s->top_k) : -INFINITY;
	uint32_t n;

	sum = weigh(c, logits, s, max, floor);
	if (s->top_k == 0 && s->top_p >= 1.0f)
		return draw_any(c, u * sum);
	/* All that are less likely weigh less together than top_p leaves out, since the likeliest alone weighs 1. */
	if (s->top_k == 0)
		least = fmax(least, 0.5 * (1 - (double)s->top_p) / c->vocab);
	n = rank(c, logits, floor, least);
	if (s->top_k != 0) {
		n = s->top_k < n ? s->top_k : n;
		sum = 0;
		for (uint32_t i = 0; i < n; i++)
			sum += c->p[c->ranked[i].id];
	}
	return draw_ranked(c, s, n, sum, u);
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
find_top(const struct sample_scratch *c, const float *logits, uint32_t n, double lse, struct sampled *out)
{
	struct logit_bias *top = out->top;
	uint32_t k = 0;

	n = n < c->vocab ? n : c->vocab;
	for (uint32_t i = 0; i < c->vocab && n > 0; i++) {
		uint32_t at;

		if (k == n && i % K_SCAN == 0 && !(c->max[i / K_SCAN] > top[k - 1].value)) {
			i += K_SCAN - 1;
			continue;
		}
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

/* After scan(). */
static double
log_sum_exp(struct sample_scratch *c, const float *logits)
{
	float max = c->max[best_block(c)];

	return log(c->ops->weights(logits, c->vocab, max, 1, 0, c->p)) + max;
}

bool
sample_score(const float *logits, uint32_t token, uint32_t n_top, struct sample_scratch *c, struct sampled *out)
{
	double lse;

	if (!c->ops->scan(logits, c->vocab, c->max))
		return false;
	lse = log_sum_exp(c, logits);
	out->token = token;
	out->logprob = (float)((double)logits[token] - lse);
	find_top(c, logits, n_top, lse, out);
	return true;
}

bool
sample_token(float *logits, const struct sampling *s, const uint32_t *token, uint32_t n_prompt, uint32_t n_known,
    struct sample_scratch *c, struct sampled *out)
{
	bool logprobs = s->logprobs || s->top_logprobs > 0;
	bool penalties = (s->repetition_penalty != 0 && s->repetition_penalty != 1) || s->presence_penalty != 0 ||
	    s->frequency_penalty != 0;
	double lse = 0;

	if (!c->ops->scan(logits, c->vocab, c->max))
		return false;
	out->n_top = 0;
	if (logprobs) {
		lse = log_sum_exp(c, logits);
		find_top(c, logits, s->top_logprobs, lse, out);
		memcpy(c->plain, logits, c->vocab * sizeof(*logits));
	}
	if (penalties)
		penalise(logits, s, token, n_prompt, n_known, c->count);
	for (uint32_t i = 0; i < s->n_bias; i++)
		logits[s->bias[i].id] += s->bias[i].value;
	if (penalties || s->n_bias > 0)
		c->ops->scan(logits, c->vocab, c->max);
	out->token = s->temperature > 0 ? draw(c, logits, s, n_known, c->max[best_block(c)]) : argmax(c, logits);
	if (logprobs)
		out->logprob = (float)((double)c->plain[out->token] - lse);
	return true;
}
