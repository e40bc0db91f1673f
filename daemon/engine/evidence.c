/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/evidence.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define WINDOW 32u /* samples of a bucket; the one before it counts too */

struct bucket {
	uint64_t n, zeros, saturated;
	float absmax;
};

struct evidence {
	uint32_t n_layers, samples, now;
	struct bucket bucket[]; /* [2][N_GROUPS][n_layers] */
};

static size_t
n_buckets(const struct evidence *e)
{
	return (size_t)N_GROUPS * e->n_layers;
}

static size_t
index_of(const struct evidence *e, uint32_t half, enum plan_group g, uint32_t layer)
{
	return half * n_buckets(e) + (size_t)g * e->n_layers + layer;
}

int
evidence_new(struct evidence **out, uint32_t n_layers)
{
	size_t bytes = 2 * (size_t)N_GROUPS * n_layers * sizeof(struct bucket);

	*out = calloc(1, sizeof(**out) + bytes);
	if (*out == NULL)
		return -ENOMEM;
	(*out)->n_layers = n_layers;
	return 0;
}

void
evidence_free(struct evidence **e)
{
	free(*e);
	*e = NULL;
}

void
evidence_note(struct evidence *e, enum plan_group g, uint32_t layer, float max, uint32_t n, uint32_t zeros, uint32_t saturated)
{
	struct bucket *b = &e->bucket[index_of(e, e->now, g, layer)];

	b->n += n;
	b->zeros += zeros;
	b->saturated += saturated;
	b->absmax = max > b->absmax ? max : b->absmax;
}

void
evidence_add(struct evidence *e, enum plan_group g, uint32_t layer, const float *x, uint32_t n)
{
	float max = 0, low, high;
	uint32_t zeros = 0, saturated = 0;

	for (uint32_t i = 0; i < n; i++)
		max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
	/* x / (max / 448) rounds to 0 up to half of 2^-9, and to 448 from half way between it and 416. */
	low = max / 448 * 0x1p-10f;
	high = max / 448 * 432;
	for (uint32_t i = 0; i < n; i++) {
		zeros += x[i] != 0 && fabsf(x[i]) <= low;
		saturated += x[i] != 0 && fabsf(x[i]) >= high;
	}
	evidence_note(e, g, layer, max, n, zeros, saturated);
}

void
evidence_next(struct evidence *e)
{
	if (++e->samples % WINDOW != 0)
		return;
	e->now = !e->now;
	memset(&e->bucket[e->now * n_buckets(e)], 0, n_buckets(e) * sizeof(struct bucket));
}

void
evidence_copy(struct evidence *to, const struct evidence *from)
{
	memcpy(to, from, sizeof(*to) + 2 * n_buckets(from) * sizeof(struct bucket));
}

void
evidence_read(const struct evidence *e, enum plan_group g, uint32_t layer, struct evidence_site *out)
{
	struct bucket sum = {0};

	for (uint32_t half = 0; half < 2; half++) {
		const struct bucket *b = &e->bucket[index_of(e, half, g, layer)];

		sum.n += b->n;
		sum.zeros += b->zeros;
		sum.saturated += b->saturated;
		sum.absmax = b->absmax > sum.absmax ? b->absmax : sum.absmax;
	}
	*out = (struct evidence_site){.n = sum.n, .absmax = sum.absmax};
	if (sum.n > 0) {
		out->zero = (float)((double)sum.zeros / (double)sum.n);
		out->saturated = (float)((double)sum.saturated / (double)sum.n);
	}
}
