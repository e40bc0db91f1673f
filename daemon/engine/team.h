/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_TEAM_H
#define OCTET_TEAM_H
/*
 * The worker team: the calling thread plus n-1 workers that run one function
 * together, over a spin-then-sleep barrier. One caller at a time. Workers
 * sleep when nothing runs, and have FTZ/DAZ set. A team as large as its affinity
 * mask has a CPU for each thread: free to move, two of them end up on one CPU
 * whenever something else wants another, and each barrier waits for both.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
/* A thread that takes no signals: they belong to the loop thread. 0 or -errno. */
int team_thread(pthread_t *, void *(*)(void *), void *arg);

struct team;
/* part 0 is the caller. Each part does its share of the work. */
typedef void (*team_fn)(void *arg, uint32_t part, uint32_t parts);
/* n 0: the CPUs of the affinity mask. Never more than those. */
int team_new(struct team **, uint32_t n, uint32_t spin_us);
void team_free(struct team **);
void team_pin_caller(const struct team *); /* the calling thread, which will call from now on, as workers are */
uint32_t team_size(const struct team *);
uint32_t team_parts(const struct team *); /* of the rounds to come: 1 if the caller runs them alone */
void team_set_spin(struct team *, uint32_t spin_us);
/* For the rounds that follow: the caller alone. What takes less than waking and
 * waiting for the others is not worth sharing. */
void team_set_alone(struct team *, bool);
/* Runs fn on all parts and returns when all are done. team NULL: alone. */
void team_run(struct team *, team_fn, void *arg);
/* The share [*from, *to) of n items that part has. */
static inline void
team_share(uint32_t n, uint32_t part, uint32_t parts, uint32_t *from, uint32_t *to)
{
	*from = (uint32_t)((uint64_t)n * part / parts);
	*to = (uint32_t)((uint64_t)n * (part + 1) / parts);
}
#endif
