/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/team.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/kernels.h"

/* Spins of 64 pauses, some 100 us, before others may have the core: sooner helps where only apps compete for it, and
 * costs a slice of time at each barrier where something else does. */
#define TURNS_ALONE 50u

/*
 * A round is published by adding one to `round`; a worker that saw it runs its
 * part and adds one to `finished`. Whoever waits spins first: waking an idle
 * core costs about 60 us, more than most phases take.
 */
struct team {
	uint32_t size;
	bool alone;                     /* caller's */
	bool pinned;
	uint32_t spin_us;
	team_fn fn;
	void *arg;
	_Alignas(64) uint32_t round;    /* atomic */
	_Alignas(64) uint32_t finished; /* atomic */
	uint32_t sleepers;              /* atomic: workers inside the mutex */
	bool stop;                      /* published by round */
	pthread_mutex_t lock;
	pthread_cond_t wake;
	pthread_t *thread;
};

struct worker {
	struct team *team;
	uint32_t part;
};

static uint64_t
now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void
wait_for_round(struct team *t, uint32_t seen)
{
	uint64_t end = now_ns() + 1000u * __atomic_load_n(&t->spin_us, __ATOMIC_RELAXED);

	for (uint32_t turn = 0; turn == 0 || now_ns() < end; turn++) {
		for (int i = 0; i < 64; i++) {
			if (__atomic_load_n(&t->round, __ATOMIC_ACQUIRE) != seen)
				return;
			__builtin_ia32_pause();
		}
		if (turn > TURNS_ALONE)
			sched_yield();
	}

	pthread_mutex_lock(&t->lock);
	__atomic_add_fetch(&t->sleepers, 1, __ATOMIC_SEQ_CST);
	while (__atomic_load_n(&t->round, __ATOMIC_SEQ_CST) == seen)
		pthread_cond_wait(&t->wake, &t->lock);
	__atomic_sub_fetch(&t->sleepers, 1, __ATOMIC_SEQ_CST);
	pthread_mutex_unlock(&t->lock);
}

/* The calling thread to the n-th CPU of those it may run on. */
static void
pin(uint32_t n)
{
	cpu_set_t set, one;
	int cpu = 0;

	if (sched_getaffinity(0, sizeof(set), &set) != 0)
		return;
	while (cpu < CPU_SETSIZE && (!CPU_ISSET(cpu, &set) || n-- > 0))
		cpu++;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	sched_setaffinity(0, sizeof(one), &one);
}

static void *
worker_main(void *arg)
{
	struct worker w = *(struct worker *)arg;
	struct team *t = w.team;
	uint32_t seen = 0;

	free(arg);
	if (t->pinned)
		pin(w.part);
	kernels_thread_init();
	for (;;) {
		wait_for_round(t, seen);
		seen++;
		if (t->stop)
			return NULL;
		t->fn(t->arg, w.part, t->size);
		__atomic_add_fetch(&t->finished, 1, __ATOMIC_RELEASE);
	}
}

static void
publish_round(struct team *t)
{
	__atomic_store_n(&t->finished, 0, __ATOMIC_RELAXED);
	__atomic_add_fetch(&t->round, 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&t->sleepers, __ATOMIC_SEQ_CST) == 0)
		return;
	/* A worker that counted itself holds the lock until it waits. */
	pthread_mutex_lock(&t->lock);
	pthread_cond_broadcast(&t->wake);
	pthread_mutex_unlock(&t->lock);
}

static uint32_t
affinity_cpus(void)
{
	cpu_set_t set;

	if (sched_getaffinity(0, sizeof(set), &set) != 0)
		return 1;
	return CPU_COUNT(&set) > 0 ? (uint32_t)CPU_COUNT(&set) : 1;
}

int
team_thread(pthread_t *thread, void *(*fn)(void *), void *arg)
{
	sigset_t all, old;
	int rc;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	rc = -pthread_create(thread, NULL, fn, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return rc;
}

int
team_new(struct team **out, uint32_t n, uint32_t spin_us)
{
	uint32_t cpus = affinity_cpus();
	struct team *t;
	int rc = 0;

	*out = NULL;
	if (n == 0 || n > cpus)
		n = cpus;
	t = aligned_alloc(64, sizeof(*t));
	if (t == NULL)
		return -ENOMEM;
	*t = (struct team){.size = 1, .pinned = n == cpus && n > 1, .spin_us = spin_us};
	pthread_mutex_init(&t->lock, NULL);
	pthread_cond_init(&t->wake, NULL);
	t->thread = calloc(n, sizeof(*t->thread));
	if (t->thread == NULL)
		rc = -ENOMEM;

	while (rc == 0 && t->size < n) {
		struct worker *w = malloc(sizeof(*w));

		if (w == NULL) {
			rc = -ENOMEM;
			break;
		}
		*w = (struct worker){t, t->size};
		rc = team_thread(&t->thread[t->size], worker_main, w);
		if (rc != 0)
			free(w);
		else
			t->size++;
	}
	if (rc != 0)
		team_free(&t);
	*out = t;
	return rc;
}

void
team_free(struct team **tp)
{
	struct team *t = *tp;

	if (t == NULL)
		return;
	t->stop = true;
	publish_round(t);
	for (uint32_t i = 1; i < t->size; i++)
		pthread_join(t->thread[i], NULL);
	pthread_cond_destroy(&t->wake);
	pthread_mutex_destroy(&t->lock);
	free(t->thread);
	free(t);
	*tp = NULL;
}

void
team_pin_caller(const struct team *t)
{
	if (t != NULL && t->pinned)
		pin(0);
}

uint32_t
team_size(const struct team *t)
{
	return t == NULL ? 1 : t->size;
}

uint32_t
team_parts(const struct team *t)
{
	return t == NULL || t->alone ? 1 : t->size;
}

void
team_set_spin(struct team *t, uint32_t spin_us)
{
	__atomic_store_n(&t->spin_us, spin_us, __ATOMIC_RELAXED);
}

void
team_set_alone(struct team *t, bool alone)
{
	if (t != NULL)
		t->alone = alone;
}

void
team_run(struct team *t, team_fn fn, void *arg)
{
	if (t == NULL || t->size == 1 || t->alone) {
		fn(arg, 0, 1);
		return;
	}
	t->fn = fn;
	t->arg = arg;
	publish_round(t);
	fn(arg, 0, t->size);
	for (uint32_t i = 0; __atomic_load_n(&t->finished, __ATOMIC_ACQUIRE) != t->size - 1; i++) {
		/* Shared machines: let a worker that lost its core have ours. */
		if (i > 64 * TURNS_ALONE)
			sched_yield();
		else
			__builtin_ia32_pause();
	}
}
