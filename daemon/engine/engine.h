/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_ENGINE_H
#define OCTET_ENGINE_H
/*
 * The engine: one thread that steps the batch. The front (the loop thread)
 * posts requests, cancels and flips, and reaps what is finished; all functions
 * here are called from the loop thread unless said otherwise. No libuv, no
 * sockets: tokens leave through a request's sink, on the engine thread.
 *
 *   request:  posted -> queued -> running <-> parked -> finished -> reaped
 *                         ^---------'----------'  preempted: its pages went to
 *                       others; it is computed again under its own segments
 */
#include <stdbool.h>
#include <stdint.h>
#include "client/err.h"
#include "client/wire.h"
#include "daemon/engine/model.h"
#include "daemon/engine/plan.h"

struct device;
struct device_options;
struct engine;

/* Where a request's events go. Called on the engine thread, never blocks. */
struct sink {
	/* Events that fit now. The engine parks a request with less than
	 * SINK_ROOM, and sets *parked so that the reader kicks it. */
	uint32_t (*room)(void *arg);
	void (*put)(void *arg, const struct wire_event *);  /* room was checked */
	void (*set_parked)(void *arg, bool parked);
	/* End of a step's puts for this request: ring a bell if the reader sleeps. */
	void (*flush)(void *arg);
	void *arg;
};
#define SINK_ROOM 4u /* and one event for each alternative of a token */

struct logit_bias {
	uint32_t id;
	float value;
};

/* In the order of their use: repetition_penalty, presence and frequency, bias;
 * then greedy, or temperature, min_p, top_k, top_p. */
struct sampling {
	uint32_t max_tokens; /* 0 with prompt_logprobs: score only */
	uint32_t top_k;
	uint64_t seed;
	float temperature, top_p, min_p;
	float repetition_penalty, presence_penalty, frequency_penalty; /* 1 or 0, 0, 0: off */
	struct logit_bias *bias; /* [n_bias] malloc'd; freed by request_free() */
	uint32_t n_bias;
	uint32_t top_logprobs;   /* alternatives, up to WIRE_MAX_TOP */
	bool ignore_eos, logprobs, prompt_logprobs;
};

/* Positions from `from` on ran, or are to run, under a plan. */
struct segment {
	uint32_t from;
	struct plan *plan;   /* a reference */
	uint64_t epoch;
};

/* Made by the front with its own validated copies; lent to the engine from
 * engine_submit() until it comes back from engine_reap(). */
struct request {
	uint64_t id;
	uint64_t client;     /* for fairness */
	uint32_t serial;     /* echoed in events */
	uint32_t *prompt, n_prompt; /* malloc'd; freed by request_free() */
	struct sampling sampling;
	struct plan *plan;   /* its own policy, a reference; NULL: follows the active plan */
	bool rollout;        /* the plan is a rollout's candidate */
	uint64_t plan_epoch; /* epoch of that policy's plan */
	struct segment *replay; /* [n_replay] malloc'd: runs under these, the first from 0; NULL: no replay */
	uint32_t n_replay;
	uint64_t scope;      /* prefix blocks are shared within it; below 2^63 */
	struct sink sink;
	void *owner;         /* the front's */
	void (*done)(struct request *); /* who takes it back; NULL: the server */
	/* Set by the engine before it comes back. */
	uint32_t n_output;
	double submitted_ms, first_ms, done_ms; /* monotonic; of the first token */
	enum wire_finish finish;
	int error;
	/* The engine's own. */
	struct request *next;
	struct request *last, *next_client; /* of the first that a client has waiting */
	uint32_t cancelled;  /* atomic */
	struct seq *seq;
};
void request_free(struct request **);
/* Of one that came back: prompt and output; what ran where. Borrowed. */
const uint32_t *request_tokens(const struct request *, uint32_t *n);
uint32_t request_segments(const struct request *, const struct segment **);

struct flip {
	struct plan *plan;   /* the flip holds a reference */
	uint64_t epoch;
	void *owner;
	bool force;          /* move pinned sequences too: rollback, guardrail */
	bool retire_rollout; /* changes no plan: requests of a rollout follow the active one from here on */
	void (*done)(struct flip *); /* who takes it back; NULL: the flipper */
	uint64_t step;       /* set when applied: first step that runs the plan */
	struct flip *next;
};

struct engine_config {
	uint32_t threads, spin_us;
	struct device *device;            /* loads the model and runs it; borrowed; NULL: the CPU */
	const struct device_options *device_options;
	uint64_t kv_bytes;
	uint32_t max_batch_tokens, max_batch, max_queue, step_target_ms;
	bool pin;                         /* on_flip = pin */
	bool prefix_cache;
	uint32_t evidence_steps;          /* one row of one step in so many is measured; 0: none */
	void (*notify)(void *arg);        /* engine thread: something to reap */
	void *notify_arg;
};

struct engine_stats {
	uint64_t step, done, failed, prompt_tokens, output_tokens;
	uint32_t running, queued, batch_rows;
	uint32_t kv_pages, kv_pages_used, kv_pages_cached, kv_page_tokens;
	uint64_t prefix_hit_tokens, prefix_evictions, preemptions;
	double queue_ms;                  /* how long the oldest waits that does not run */
	uint64_t kv_bytes;
	double step_ms_p50, step_ms_p90, step_ms_p99, step_ms_max; /* last 1024 steps */
	double forward_s, host_s;         /* in forward passes, ever; of steps beside them, or beside waiting for a device */
	uint64_t epoch, plan_digest;      /* what the last step ran */
};

/* model and plan outlive nothing: the engine takes a reference to the plan and
 * borrows the model until engine_free(). ops from kernels_select(). team is
 * borrowed too: only the engine thread runs it from here on. */
int engine_new(struct engine **, const struct model *, const struct k_ops *, struct team *,
    const struct engine_config *, struct plan *, uint64_t epoch, struct err *);
void engine_free(struct engine **); /* stops the thread; unfinished requests end as cancelled */

/* Bytes the KV pool of this configuration will take, for the memory plan. */
uint64_t engine_kv_bytes(const struct model_shape *, const struct engine_config *);

/* 0, -EBUSY when the queue is full, -E2BIG when it could never fit the KV cache. */
int engine_submit(struct engine *, struct request *, struct err *);
void engine_cancel(struct engine *, struct request *);
void engine_kick(struct engine *);          /* a parked reader made room */
void engine_flip(struct engine *, struct flip *); /* takes effect between two steps */
void engine_configure(struct engine *, const struct engine_config *); /* live options only */

/* Since the last call there was something to notify of: for a front that looks by itself. */
bool engine_has_news(struct engine *);
struct request *engine_reap(struct engine *);  /* list by ->next, or NULL */
struct flip *engine_reap_flips(struct engine *);
void engine_stats(struct engine *, struct engine_stats *); /* any thread */
/* What FP8 would do to the inputs of a site; any thread. */
struct evidence_site;
void engine_evidence(struct engine *, enum plan_group, uint32_t layer, struct evidence_site *);
/* Format that runs at a site under a plan on this backend. */
enum plan_format engine_executed(const struct engine *, const struct plan *, enum plan_group, uint32_t layer);
/* NULL: the CPU runs it. Its device_status() may be asked from any thread. */
struct device *engine_device(const struct engine *);
#endif
