/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_SCHED_H
#define OCTET_SCHED_H
/*
 * The scheduler: which sequences get how many rows in the next step. A pure
 * function of the state it is shown; the engine keeps the state.
 */
#include <stdbool.h>
#include <stdint.h>

struct sched_seq {
	uint64_t client;
	uint64_t order;     /* of arrival */
	uint32_t pending;   /* known tokens not yet run: 1 decodes, more is prefill */
	bool parked;
	uint32_t rows;      /* out: rows in the next step, 0..pending */
};

struct sched_limits {
	uint32_t max_rows;      /* token budget of a step */
	uint32_t target_rows;   /* what step_target_ms allows now, at least 1 */
};

/* Decoding sequences get their row first. What is left of the budget goes to
 * prefill in chunks: round-robin over clients, oldest request of each client
 * first, so that one client's long prompts cannot hold up another's. `turn` is
 * the client that was served last; it is moved on. Returns the rows in all. */
uint32_t sched_pick(struct sched_seq *, uint32_t n, const struct sched_limits *, uint64_t *turn);

/* Which waiting request is admitted next: the oldest of the client with the
 * fewest running; -1 if there is none. */
struct sched_waiting {
	uint64_t client, order;
	uint32_t client_running;
};
int64_t sched_admit(const struct sched_waiting *, uint32_t n);
#endif
