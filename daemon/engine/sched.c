/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/sched.h"

#include <stddef.h>

/* Tokens of one prefill turn: small enough that clients alternate within a
 * step, large enough that a chunk fills the tile kernels. */
#define SCHED_CHUNK 64u

/* The oldest sequence with prefill left of the first client after `turn`. */
static struct sched_seq *
next_prefill(struct sched_seq *seq, uint32_t n, uint64_t turn)
{
	struct sched_seq *best = NULL;

	for (uint32_t i = 0; i < n; i++) {
		struct sched_seq *s = &seq[i];
		/* Distance on the circle of client numbers, turn itself last. */
		uint64_t d = s->client - turn - 1, bd;

		if (s->parked || s->pending <= 1 || s->rows == s->pending)
			continue;
		bd = best == NULL ? 0 : best->client - turn - 1;
		if (best == NULL || d < bd || (d == bd && s->order < best->order))
			best = s;
	}
	return best;
}

uint32_t
sched_pick(struct sched_seq *seq, uint32_t n, const struct sched_limits *lim, uint64_t *turn)
{
	uint32_t budget = lim->target_rows < lim->max_rows ? lim->target_rows : lim->max_rows, used = 0;
	struct sched_seq *s;

	for (uint32_t i = 0; i < n; i++) {
		seq[i].rows = 0;
		if (!seq[i].parked && seq[i].pending == 1 && used < lim->max_rows) {
			seq[i].rows = 1;
			used++;
		}
	}
	/* Prefill is never starved by decode: it gets at least one chunk. */
	if (budget < used + SCHED_CHUNK)
		budget = used + SCHED_CHUNK < lim->max_rows ? used + SCHED_CHUNK : lim->max_rows;
	while (used < budget && (s = next_prefill(seq, n, *turn)) != NULL) {
		uint32_t want = s->pending - s->rows;

		if (want > SCHED_CHUNK)
			want = SCHED_CHUNK;
		if (want > budget - used)
			want = budget - used;
		s->rows += want;
		used += want;
		*turn = s->client;
	}
	return used;
}

int64_t
sched_admit(const struct sched_waiting *w, uint32_t n)
{
	int64_t best = -1;

	for (uint32_t i = 0; i < n; i++) {
		if (best < 0 || w[i].client_running < w[best].client_running ||
		    (w[i].client_running == w[best].client_running && w[i].order < w[best].order))
			best = i;
	}
	return best;
}
