/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_BATCH_H
#define OCTET_BATCH_H
/*
 * The inside of the engine, shared by engine.c (mailbox, thread, front), batch.c
 * (who runs: admission, pages, rows) and step.c (one step and what came out of
 * it). Everything here is the engine thread's but for what struct engine keeps
 * under its locks.
 *
 * A step is chosen, runs, and is taken: what came out is told and kept. On the
 * CPU one follows the other. With a device the next step is chosen while one
 * runs, so that the device need not wait for the host. Then a sequence's next
 * token is known by number only, not by value, and what a step turns out to have
 * run for a sequence that ended is nobody's. Pages may go to others at once: rows
 * that are submitted later run later. What such a step must not find changed
 * under it waits until nothing is under way: pages taken from others
 * (preemption), and probes.
 */
#include <pthread.h>
#include <time.h>

#include "daemon/engine/engine.h"
#include "daemon/engine/forward.h"
#include "daemon/engine/kv.h"
#include "daemon/engine/probe.h"
#include "daemon/engine/sample.h"
#include "daemon/engine/sched.h"
#include "kernels/device.h"

#define STEP_WINDOW 1024u

enum seq_state { SEQ_POSTED, SEQ_QUEUED, SEQ_RUNNING, SEQ_PARKED, SEQ_FINISHED };

/* A request's state inside the engine; made by engine_submit(), so that the
 * engine thread allocates nothing. */
struct seq {
	struct request *req;
	enum seq_state state;
	uint64_t order;
	uint32_t *token;      /* [n_max] prompt, then output */
	uint32_t n_known, n_run, n_max; /* tokens, positions that are chosen to run, and the most of both */
	uint32_t n_ahead;     /* tokens behind the known ones that steps under way draw */
	uint32_t drawn;       /* the number of the last of them among its step's wants */
	uint32_t n_owed;      /* events that steps under way may put */
	uint32_t n_seen;      /* positions that were ever run: they are counted, and scored, once */
	struct kv_seq kv;
	struct plan *plan;    /* what its next new position runs; a reference, NULL before it is admitted */
	uint64_t epoch;
	struct segment *seg;  /* [n_seg] */
	uint32_t n_seg, cap_seg, n_told; /* the app knows the first n_told */
	uint32_t n_fixed;     /* positions below run under seg[], whatever the plan is now */
	bool flush_due;       /* its events are put, its reader is not woken yet */
};

/* What a step runs of one sequence. */
struct part {
	struct seq *seq;      /* NULL: it ended meanwhile */
	struct plan *plan;    /* of its new positions, a reference; epoch: of that */
	uint64_t epoch;
	uint32_t end;         /* up to this position */
	uint32_t n_want, n_owed;
};

struct step {
	uint64_t number;
	struct part *part;    /* [max_seqs] */
	struct want { const struct seq *seq; uint32_t pos; } *want; /* [max_batch_tokens] logits of a position; in the order of parts */
	uint32_t n_parts, n_want, rows, probe_rows; /* rows: without the probe's, which come behind them */
	bool evidence;        /* one of its rows is measured */
	double start_ms, submitted_ms;
};

struct engine {
	const struct model *m;
	const struct k_ops *ops;
	struct team *team;
	struct engine_config cfg;   /* the engine thread's copy */
	pthread_t thread;
	bool started;

	/* Mailbox: posted by the front under lock, taken between steps. */
	pthread_mutex_t lock;
	pthread_cond_t wake;
	uint32_t mail;              /* atomic: something below is set */
	bool sleeping, stop;
	struct request *posted, **posted_end;
	struct flip *flips, **flips_end;
	bool new_cfg;
	struct engine_config front_cfg; /* the front's, which alone writes it; cfg becomes it where new_cfg says so */
	struct request *finished, **finished_end;
	struct flip *applied, **applied_end;
	struct probe *probes_posted, **probes_posted_end, *probes_done, **probes_done_end;
	uint32_t n_queued;          /* atomic: posted or waiting */
	uint32_t cancels;           /* atomic: calls of engine_cancel() */
	uint64_t order;
	uint32_t back;              /* atomic: something is to be reaped */

	/* Engine thread. */
	struct plan *plan;
	uint64_t epoch, step, turn; /* step: the last that was chosen */
	struct step steps[KD_AHEAD]; /* in turns, by number */
	uint32_t n_under_way;       /* of them: the last is `step` */
	struct kv_pool kv;
	struct forward *forward;
	uint32_t max_seqs;
	struct seq **running;       /* [max_seqs] */
	uint32_t n_running;
	struct request *waiting;    /* the first of each client, by ->next_client; the client's others by ->next */
	uint32_t n_cancels;         /* those that drop_cancelled() has looked for */
	struct sched_seq *pick;     /* [max_seqs] */
	struct forward_row *row;    /* [max_batch_tokens] of the step that is chosen */
	struct result { struct sampled s; bool bad; } *result; /* [max_batch_tokens] of each want of the step that is taken */
	struct sample_scratch **scratch; /* [parts] */
	float *logits;
	double taken_ms, ran_ms;    /* when the last step was taken; when it was found to have run */
	uint64_t preemptions;
	double ms_per_row;
	struct probe *probes;       /* by ->next; the first runs */
	double live_ms; /* a step without a probe */

	struct evidence *evidence;

	pthread_mutex_t stats_lock;
	struct engine_stats stats;
	struct evidence *evidence_seen; /* a copy for others */
	float step_ms[STEP_WINDOW];
	uint32_t n_step_ms;
};

static inline double
engine_now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec / 1e6;
}

/* Tells the front that something is to be reaped. */
static inline void
engine_notify(struct engine *e)
{
	__atomic_store_n(&e->back, 1, __ATOMIC_SEQ_CST);
	e->cfg.notify(e->cfg.notify_arg);
}

/* ---- a sequence (batch.c) ---- */

void seq_set_state(struct seq *, enum seq_state);
bool seq_has_own_plan(const struct seq *); /* a policy of its own, or a replay */
void seq_set_plan(struct seq *, struct plan *, uint64_t epoch);
int seq_add_segment(struct seq *, uint32_t from, struct plan *, uint64_t epoch); /* -ENOMEM */
struct segment seq_segment_at(const struct seq *, uint32_t pos); /* what a position ran, or will run, under; borrowed */

/* ---- who runs (batch.c) ---- */

void batch_put(struct request *, struct wire_event);
/* Wakes the readers of those that run and have new events. On the CPU at the end of a step; with a device while
 * it runs the next one, so that it does not wait for system calls. */
void batch_flush(struct engine *);
/* Ends a request that no step under way runs: pages back, DONE out, over to the front. It may be gone when this returns. */
void batch_finish(struct engine *, struct request *, enum wire_finish, uint64_t detail);
/* One that runs: it leaves running[], where the last takes its place, and the steps that are under way. */
void batch_end(struct engine *, struct seq *, enum wire_finish, uint64_t detail);
/* Waiting requests: a list a client, so that none of this walks a long queue. */
void batch_queue(struct engine *, struct request *, bool front);
void batch_unqueue(struct request **first); /* a client's first; *first is its next one, or another client's first */
#define FOR_EACH_WAITING(e, r) \
	for (struct request *first_ = (e)->waiting; first_ != NULL; first_ = first_->next_client) \
		for (struct request *(r) = first_; (r) != NULL; (r) = (r)->next)
void batch_admit(struct engine *);
/* Picks sequences, opens their pages, fills rows, parts and wants. While a step is under way it takes no pages from
 * others: where it would have to, there are no rows. */
void batch_choose(struct engine *, struct step *);
void batch_publish(struct engine *, struct seq *, uint32_t end); /* full blocks that ran, before `end`, to the prefix cache */

/* Chooses a step and takes one, the same or, with a device, the one before (step.c). False when there was nothing to run. */
bool step_run(struct engine *);
void step_finish(struct engine *); /* takes those that are under way */
#endif
