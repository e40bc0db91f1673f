/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/engine.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/engine/forward.h"
#include "daemon/engine/kv.h"
#include "daemon/engine/sample.h"
#include "daemon/engine/sched.h"

#define STEP_WINDOW 1024u

enum seq_state { SEQ_POSTED, SEQ_QUEUED, SEQ_RUNNING, SEQ_PARKED, SEQ_FINISHED };

/* A request's state inside the engine; made by engine_submit(), so that the
 * engine thread allocates nothing. */
struct seq {
	struct request *req;
	enum seq_state state;
	uint64_t order;
	uint32_t *token;      /* [n_max] prompt, then output */
	uint32_t n_known, n_run, n_max;
	uint32_t n_seen;      /* positions that were ever run: they are counted, and scored, once */
	struct kv_seq kv;
	struct plan *plan;    /* what its next new position runs; a reference, NULL before it is admitted */
	uint64_t epoch;
	struct segment *seg;  /* [n_seg] */
	uint32_t n_seg, cap_seg, n_told; /* the app knows the first n_told */
	uint32_t n_fixed;     /* positions below run under seg[], whatever the plan is now */
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
	bool new_cfg_set;
	struct engine_config new_cfg;
	struct request *finished, **finished_end;
	struct flip *applied, **applied_end;
	uint32_t n_queued;          /* atomic: posted or waiting */
	uint64_t order;

	/* Engine thread. */
	struct plan *plan;
	uint64_t epoch, step, turn;
	struct kv_pool kv;
	struct forward *forward;
	uint32_t max_seqs;
	struct seq **running;       /* [max_seqs] */
	uint32_t n_running;
	struct request *waiting;    /* by ->next, oldest first */
	struct sched_seq *pick;     /* [max_seqs] */
	struct forward_row *row;    /* [max_batch_tokens] */
	struct want { struct seq *seq; uint32_t pos; } *want; /* [max_batch_tokens] logits of a position */
	struct result { struct sampled s; bool bad; } *result; /* [max_batch_tokens] of each */
	struct sample_scratch **scratch; /* [parts] */
	float *logits;
	uint32_t n_want;
	uint64_t preemptions;
	double ms_per_row;

	struct evidence *evidence;

	pthread_mutex_t stats_lock;
	struct engine_stats stats;
	struct evidence *evidence_seen; /* a copy for others */
	float step_ms[STEP_WINDOW];
	uint32_t n_step_ms;
};

static double
now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec / 1e6;
}

static void
free_segments(struct segment *seg, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		plan_unref(&seg[i].plan);
	free(seg);
}

static void
seq_free(struct seq *s)
{
	if (s == NULL)
		return;
	plan_unref(&s->plan);
	free_segments(s->seg, s->n_seg);
	kv_seq_free(&s->kv);
	free(s->token);
	free(s);
}

void
request_free(struct request **rp)
{
	struct request *r = *rp;

	if (r == NULL)
		return;
	seq_free(r->seq);
	plan_unref(&r->plan);
	free_segments(r->replay, r->n_replay);
	free(r->sampling.bias);
	free(r->prompt);
	free(r);
	*rp = NULL;
}

/* ---- state of a sequence ---- */

static void
seq_set_state(struct seq *s, enum seq_state to)
{
	static const bool may[5][5] = {
		[SEQ_POSTED] = {[SEQ_QUEUED] = true, [SEQ_FINISHED] = true},
		[SEQ_QUEUED] = {[SEQ_RUNNING] = true, [SEQ_FINISHED] = true},
		[SEQ_RUNNING] = {[SEQ_PARKED] = true, [SEQ_QUEUED] = true, [SEQ_FINISHED] = true},
		[SEQ_PARKED] = {[SEQ_RUNNING] = true, [SEQ_QUEUED] = true, [SEQ_FINISHED] = true},
	};

	if (!may[s->state][to])
		abort(); /* our own bug */
	s->state = to;
}

static void
put(struct request *r, struct wire_event ev)
{
	ev.serial = r->serial;
	r->sink.put(r->sink.arg, &ev);
}

/* Ends a request: pages back, DONE out (its room was kept by SINK_ROOM), and
 * over to the front. The request may be freed as soon as the lock is released. */
static void
finish(struct engine *e, struct request *r, enum wire_finish how, uint64_t detail)
{
	struct seq *s = r->seq;

	if (s->state == SEQ_PARKED)
		r->sink.set_parked(r->sink.arg, false);
	seq_set_state(s, SEQ_FINISHED);
	kv_close(&e->kv, &s->kv);
	r->finish = how;
	r->error = how == WIRE_FINISH_ERROR ? -(int)(uint32_t)detail : 0;
	put(r, (struct wire_event){.kind = WIRE_EV_DONE, .token = how, .a = detail});
	r->sink.flush(r->sink.arg);

	pthread_mutex_lock(&e->stats_lock);
	if (how == WIRE_FINISH_ERROR)
		e->stats.failed++;
	else
		e->stats.done++;
	pthread_mutex_unlock(&e->stats_lock);

	r->next = NULL;
	pthread_mutex_lock(&e->lock);
	*e->finished_end = r;
	e->finished_end = &r->next;
	pthread_mutex_unlock(&e->lock);
	e->cfg.notify(e->cfg.notify_arg);
}

static void
drop_running(struct engine *e, uint32_t i)
{
	e->running[i] = e->running[--e->n_running];
}

/* ---- between steps ---- */

static bool
has_own_plan(const struct seq *s)
{
	return s->req->plan != NULL || s->req->replay != NULL;
}

static void
seq_set_plan(struct seq *s, struct plan *p, uint64_t epoch)
{
	plan_unref(&s->plan);
	s->plan = plan_ref(p);
	s->epoch = epoch;
}

static void
apply_flip(struct engine *e, struct flip *f)
{
	plan_unref(&e->plan);
	e->plan = plan_ref(f->plan);
	e->epoch = f->epoch;
	for (uint32_t i = 0; i < e->n_running; i++) {
		struct seq *s = e->running[i];

		if (!has_own_plan(s) && (!e->cfg.pin || f->force))
			seq_set_plan(s, e->plan, e->epoch);
	}
	/* Preempted sequences are among those that wait. */
	for (struct request *r = e->waiting; r != NULL; r = r->next)
		if (r->seq->plan != NULL && !has_own_plan(r->seq) && (!e->cfg.pin || f->force))
			seq_set_plan(r->seq, e->plan, e->epoch);
	f->step = e->step + 1;
}

/* Returns false when the engine is to stop. */
static bool
take_mail(struct engine *e)
{
	struct request *posted;
	struct flip *flips;
	bool stop;

	if (!__atomic_exchange_n(&e->mail, 0, __ATOMIC_ACQUIRE))
		return true;
	pthread_mutex_lock(&e->lock);
	posted = e->posted, flips = e->flips, stop = e->stop;
	e->posted = NULL, e->posted_end = &e->posted;
	e->flips = NULL, e->flips_end = &e->flips;
	if (e->new_cfg_set) {
		e->cfg = e->new_cfg;
		e->new_cfg_set = false;
	}
	pthread_mutex_unlock(&e->lock);

	if (posted != NULL) {
		struct request **end = &e->waiting;

		while (*end != NULL)
			end = &(*end)->next;
		*end = posted;
		for (struct request *r = posted; r != NULL; r = r->next)
			seq_set_state(r->seq, SEQ_QUEUED);
	}
	if (flips != NULL) {
		struct flip **end = &flips;

		for (struct flip *f = flips; f != NULL; f = f->next) {
			apply_flip(e, f);
			end = &f->next;
		}
		pthread_mutex_lock(&e->lock);
		*e->applied_end = flips;
		e->applied_end = end;
		pthread_mutex_unlock(&e->lock);
		pthread_mutex_lock(&e->stats_lock);
		e->stats.epoch = e->epoch;
		e->stats.plan_digest = e->plan->digest;
		pthread_mutex_unlock(&e->stats_lock);
		e->cfg.notify(e->cfg.notify_arg);
	}
	return !stop;
}

static bool
is_cancelled(const struct request *r)
{
	return __atomic_load_n(&r->cancelled, __ATOMIC_ACQUIRE) != 0;
}

static void
drop_cancelled(struct engine *e)
{
	for (uint32_t i = 0; i < e->n_running;) {
		struct request *r = e->running[i]->req;

		if (is_cancelled(r)) {
			drop_running(e, i);
			finish(e, r, WIRE_FINISH_CANCELLED, 0);
		} else
			i++;
	}
	for (struct request **rp = &e->waiting; *rp != NULL;) {
		struct request *r = *rp;

		if (is_cancelled(r)) {
			*rp = r->next;
			__atomic_sub_fetch(&e->n_queued, 1, __ATOMIC_RELAXED);
			finish(e, r, WIRE_FINISH_CANCELLED, 0);
		} else
			rp = &r->next;
	}
}

static uint32_t
running_of(const struct engine *e, uint64_t client)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < e->n_running; i++)
		n += e->running[i]->req->client == client;
	return n;
}

/* The waiting request that sched_admit() would choose, looking at the oldest
 * request of each client only: the queue is scanned once. */
static struct request **
next_waiting(struct engine *e)
{
	struct request **best = NULL;
	struct sched_waiting pair[2];

	for (struct request **rp = &e->waiting; *rp != NULL; rp = &(*rp)->next) {
		struct sched_waiting w = {(*rp)->client, (*rp)->seq->order, 0};

		if (best != NULL && w.client == pair[0].client)
			continue;
		w.client_running = running_of(e, w.client);
		pair[1] = w;
		if (best == NULL || sched_admit(pair, 2) == 1) {
			best = rp;
			pair[0] = w;
		}
		if (pair[0].client_running == 0)
			break;
	}
	return best;
}

/* Pages that a sequence still lacks for what is known of it and one token more. */
static uint32_t
pages_wanted(const struct engine *e, const struct seq *s)
{
	uint32_t blocks = kv_blocks_for(s->n_known + 1), window = e->m->shape.window;

	if (window != 0 && blocks > kv_blocks_for(window + e->cfg.max_batch_tokens) + 1)
		blocks = kv_blocks_for(window + e->cfg.max_batch_tokens) + 1;
	blocks = blocks > s->kv.n_blocks - s->kv.n_dropped ? blocks - (s->kv.n_blocks - s->kv.n_dropped) : 0;
	return blocks * kv_block_pages(s->plan, e->m->shape.n_layers);
}

static uint32_t
first_segment_end(const struct seq *s)
{
	return s->n_seg > 1 ? s->seg[1].from : UINT32_MAX;
}

static int
add_segment(struct seq *s, uint32_t from, struct plan *plan, uint64_t epoch)
{
	if (s->n_seg == s->cap_seg) {
		uint32_t cap = s->cap_seg == 0 ? 4 : s->cap_seg * 2;
		struct segment *seg = realloc(s->seg, cap * sizeof(*seg));

		if (seg == NULL)
			return -ENOMEM;
		s->seg = seg;
		s->cap_seg = cap;
	}
	s->seg[s->n_seg++] = (struct segment){from, plan_ref(plan), epoch};
	return 0;
}

/* Starts at what the prefix cache has; one token at least is left to run. */
static void
match_prefix(struct engine *e, struct seq *s)
{
	struct plan *plan = s->n_seg > 0 ? s->seg[0].plan : s->plan;
	uint32_t n = s->n_known - 1;

	if (!e->cfg.prefix_cache || s->req->sampling.prompt_logprobs)
		return;
	if (n > first_segment_end(s))
		n = first_segment_end(s);
	s->n_run = kv_match(&e->kv, &s->kv, s->req->scope, plan->digest, s->token, n);
	if (s->n_run == 0 || s->n_fixed >= s->n_run)
		return;
	if (s->n_seg == 0 && add_segment(s, 0, s->plan, s->epoch) != 0) {
		kv_close(&e->kv, &s->kv);
		s->n_run = 0;
		return;
	}
	s->n_fixed = s->n_run;
}

static void
publish(struct engine *e, struct seq *s)
{
	uint32_t end;

	while (e->cfg.prefix_cache && (end = (s->kv.n_published + 1) * KV_PAGE_TOKENS) <= s->n_run &&
	    end <= first_segment_end(s)) {
		kv_publish(&e->kv, &s->kv, s->req->scope, s->seg[0].plan->digest, s->token);
		if (s->kv.n_published * KV_PAGE_TOKENS != end)
			return;
	}
}

/* A request is admitted when the pages for all that is known of those that run,
 * and of it, are there. What they generate may still use them up: then the
 * youngest is preempted. */
static void
admit(struct engine *e)
{
	struct request **rp, *r;
	uint64_t promised = 0;

	for (uint32_t i = 0; e->waiting != NULL && i < e->n_running; i++)
		promised += pages_wanted(e, e->running[i]);
	while (e->n_running < e->max_seqs && (rp = next_waiting(e)) != NULL) {
		struct seq *s = (*rp)->seq;

		if (s->plan == NULL && s->req->plan != NULL)
			seq_set_plan(s, s->req->plan, s->req->plan_epoch);
		else if (s->plan == NULL || (!has_own_plan(s) && !e->cfg.pin))
			seq_set_plan(s, e->plan, e->epoch);
		promised += pages_wanted(e, s);
		if (e->n_running > 0 && promised > kv_available(&e->kv))
			return;
		r = *rp;
		*rp = r->next;
		__atomic_sub_fetch(&e->n_queued, 1, __ATOMIC_RELAXED);
		match_prefix(e, s);
		seq_set_state(s, SEQ_RUNNING);
		e->running[e->n_running++] = s;
	}
}

/* Takes its pages; it waits again, in front, and is computed again later. */
static void
preempt(struct engine *e, struct seq *s)
{
	if (s->state == SEQ_PARKED)
		s->req->sink.set_parked(s->req->sink.arg, false);
	seq_set_state(s, SEQ_QUEUED);
	kv_close(&e->kv, &s->kv);
	s->n_run = 0;
	s->req->next = e->waiting;
	e->waiting = s->req;
	__atomic_add_fetch(&e->n_queued, 1, __ATOMIC_RELAXED);
	e->preemptions++;
}

/* Events that a step may put, but for those of scored prompt tokens: one of
 * these takes token_events(). */
static uint32_t
token_events(const struct seq *s)
{
	return 1 + s->req->sampling.top_logprobs;
}

static uint32_t
least_room(const struct seq *s)
{
	return SINK_ROOM + token_events(s) + (s->req->sampling.prompt_logprobs ? token_events(s) : 0);
}

static void
park_or_not(struct seq *s)
{
	struct sink *k = &s->req->sink;
	bool room = k->room(k->arg) >= least_room(s);

	if (!room && s->state == SEQ_RUNNING) {
		seq_set_state(s, SEQ_PARKED);
		k->set_parked(k->arg, true);
		/* The reader may have made room before it could see the flag. */
		room = k->room(k->arg) >= least_room(s);
	}
	if (room && s->state == SEQ_PARKED) {
		seq_set_state(s, SEQ_RUNNING);
		k->set_parked(k->arg, false);
	}
}

/* ---- one step ---- */

static int
by_plan(const void *pa, const void *pb)
{
	const struct seq *a = *(struct seq *const *)pa, *b = *(struct seq *const *)pb;

	if (a->plan->digest != b->plan->digest)
		return a->plan->digest < b->plan->digest ? -1 : 1;
	return a->order < b->order ? -1 : a->order > b->order;
}

static struct segment
segment_at(const struct seq *s, uint32_t pos)
{
	uint32_t i = s->n_seg;

	if (pos >= s->n_fixed)
		return (struct segment){pos, s->plan, s->epoch};
	while (s->seg[i - 1].from > pos)
		i--;
	return s->seg[i - 1];
}

/* Who loses its pages: one that cannot run, else the youngest. */
static uint32_t
victim(const struct engine *e)
{
	uint32_t best = UINT32_MAX;

	for (uint32_t i = 0; i < e->n_running; i++) {
		const struct seq *s = e->running[i], *b;

		if (s == NULL || s->kv.n_blocks == 0)
			continue;
		b = best == UINT32_MAX ? NULL : e->running[best];
		if (b == NULL || (s->state == SEQ_PARKED) > (b->state == SEQ_PARKED) ||
		    ((s->state == SEQ_PARKED) == (b->state == SEQ_PARKED) && s->order > b->order))
			best = i;
	}
	return best;
}

/* Pages for the rows that were picked; fewer rows, or none, where they do not suffice. */
static void
reserve(struct engine *e, uint32_t i)
{
	for (;;) {
		struct seq *s = e->running[i];
		uint32_t got = 0, v;

		while (got < e->pick[i].rows) {
			uint32_t pos = s->n_run + got;

			if (kv_open(&e->kv, &s->kv, segment_at(s, pos).plan, pos) != 0)
				break;
			got++;
		}
		if (got > 0 || e->pick[i].rows == 0) {
			e->pick[i].rows = got;
			return;
		}
		v = victim(e);
		if (v == i && e->n_running == 1) {
			/* Alone, and blocks in two formats took what the bound of engine_submit() left out. */
			finish(e, s->req, WIRE_FINISH_ERROR, ENOSPC);
		} else {
			preempt(e, e->running[v]);
		}
		e->running[v] = NULL;
		e->pick[v].rows = 0;
		if (v == i)
			return;
	}
}

static void
drop_gone(struct engine *e)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < e->n_running; i++) {
		if (e->running[i] == NULL)
			continue;
		e->running[n] = e->running[i];
		e->pick[n++] = e->pick[i];
	}
	e->n_running = n;
}

/* Rows that a sequence may have in a step: its sink must have room for what the
 * step tells; of a replay that is two new segments at most. */
static uint32_t
pending(const struct seq *s)
{
	uint32_t n = s->n_known - s->n_run, next = s->n_told + 1;

	/* The prefix cache may have covered the first segment to its end. */
	while (next < s->n_seg && s->seg[next].from <= s->n_run)
		next++;
	if (next < s->n_seg && s->seg[next].from - s->n_run < n)
		n = s->seg[next].from - s->n_run;
	if (s->req->sampling.prompt_logprobs && s->state == SEQ_RUNNING) {
		uint32_t room = s->req->sink.room(s->req->sink.arg);
		uint32_t most = room > least_room(s) ? (room - least_room(s)) / token_events(s) + 1 : 1;

		n = n < most ? n : most;
	}
	return n;
}

/* Are the logits of a position wanted: to sample what follows, or to score it. */
static bool
wants_logits(const struct seq *s, uint32_t pos)
{
	const struct request *r = s->req;

	if (pos + 1 == s->n_known)
		return r->sampling.max_tokens > 0;
	return r->sampling.prompt_logprobs && pos + 1 < r->n_prompt && pos >= s->n_seen;
}

/* Fills rows; returns their number. */
static uint32_t
choose_batch(struct engine *e)
{
	struct sched_limits lim = {e->cfg.max_batch_tokens, e->cfg.max_batch_tokens};
	uint32_t n = 0;

	qsort(e->running, e->n_running, sizeof(*e->running), by_plan);
	for (uint32_t i = 0; i < e->n_running; i++) {
		struct seq *s = e->running[i];

		park_or_not(s);
		e->pick[i] = (struct sched_seq){.client = s->req->client, .order = s->order, .pending = pending(s),
		    .parked = s->state == SEQ_PARKED};
	}
	if (e->cfg.step_target_ms > 0 && e->ms_per_row > 0) {
		double rows = e->cfg.step_target_ms / e->ms_per_row;

		lim.target_rows = rows < 1 ? 1 : rows < lim.max_rows ? (uint32_t)rows : lim.max_rows;
	}
	sched_pick(e->pick, e->n_running, &lim, &e->turn);
	for (uint32_t i = 0; i < e->n_running; i++)
		if (e->running[i] != NULL)
			reserve(e, i);
	drop_gone(e);

	e->n_want = 0;
	for (uint32_t i = 0; i < e->n_running; i++) {
		struct seq *s = e->running[i];

		for (uint32_t j = 0; j < e->pick[i].rows; j++) {
			uint32_t pos = s->n_run + j;
			bool wants = wants_logits(s, pos);

			e->row[n++] = (struct forward_row){.token = s->token[pos], .pos = pos, .kv = &s->kv,
			    .plan = segment_at(s, pos).plan, .wants_logits = wants};
			if (wants)
				e->want[e->n_want++] = (struct want){s, pos};
		}
	}
	return n;
}

static void
sample_part(void *arg, uint32_t part, uint32_t parts)
{
	struct engine *e = arg;
	uint32_t vocab = e->m->shape.vocab, from, to;

	team_share(e->n_want, part, parts, &from, &to);
	for (uint32_t i = from; i < to; i++) {
		float *logits = e->logits + (size_t)i * vocab;
		const struct seq *s = e->want[i].seq;
		struct result *out = &e->result[i];
		uint32_t next = e->want[i].pos + 1;
		float sum = 0;

		/* One pass: x * 0 is 0 for finite x, NaN for the rest. */
		for (uint32_t j = 0; j < vocab; j++)
			sum += logits[j] * 0.0f;
		out->bad = !(sum == 0.0f);
		if (out->bad)
			continue;
		if (next < s->n_known)
			sample_score(logits, vocab, s->token[next], s->req->sampling.top_logprobs, &out->s);
		else
			sample_token(logits, vocab, &s->req->sampling, s->token, s->req->n_prompt, s->n_known,
			    e->scratch[part], &out->s);
	}
}

static bool
is_eos(const struct model_shape *shape, uint32_t token)
{
	for (uint32_t i = 0; i < shape->n_eos; i++)
		if (shape->eos[i] == token)
			return true;
	return false;
}

/* Notes under which plan the rows ran, and tells the app of new segments. */
static int
note_segments(struct seq *s, uint32_t rows)
{
	uint32_t end = s->n_run + rows;
	const struct segment *last = s->n_seg > 0 ? &s->seg[s->n_seg - 1] : NULL;

	if (end > s->n_fixed) {
		if ((last == NULL || last->plan->digest != s->plan->digest || last->epoch != s->epoch) &&
		    add_segment(s, s->n_fixed, s->plan, s->epoch) != 0)
			return -ENOMEM;
		s->n_fixed = end;
	}
	for (; s->n_told < s->n_seg && s->seg[s->n_told].from < end; s->n_told++)
		put(s->req, (struct wire_event){.kind = WIRE_EV_SEGMENT, .position = s->seg[s->n_told].from,
		    .a = s->seg[s->n_told].plan->digest, .epoch = s->seg[s->n_told].epoch});
	return 0;
}

/* The site of a failed row goes to the app as (group + 1) << 16 | layer. */
static uint64_t
nonfinite_detail(struct engine *e, const struct seq *s, uint32_t pos)
{
	struct forward_row row = {.token = s->token[pos], .pos = pos, .kv = &s->kv, .plan = segment_at(s, pos).plan,
	    .wants_logits = true};
	struct forward_site site;
	uint64_t at = 0;

	if (forward_find_nonfinite(e->forward, &row, &site))
		at = ((uint64_t)site.group + 1) << 16 | site.layer;
	return at << 32 | EDOM;
}

static void
put_token(struct request *r, enum wire_event_kind kind, uint32_t position, const struct sampled *s)
{
	put(r, (struct wire_event){.kind = kind, .token = s->token, .position = position, .logprob = s->logprob});
	for (uint32_t i = 0; i < s->n_top; i++)
		put(r, (struct wire_event){.kind = WIRE_EV_TOP, .token = s->top[i].id, .position = position,
		    .logprob = s->top[i].value});
}

/* Takes what came out at a position: a score, or the next token. Returns false
 * when the request ended: then it may be gone already. */
static bool
take_result(struct engine *e, struct seq *s, uint32_t pos, const struct result *r, uint32_t *tokens)
{
	struct request *req = s->req;

	if (r->bad) {
		finish(e, req, WIRE_FINISH_ERROR, nonfinite_detail(e, s, pos));
		return false;
	}
	if (pos + 1 < s->n_known) {
		put_token(req, WIRE_EV_PROMPT, pos + 1, &r->s);
		return true;
	}
	if (!req->sampling.ignore_eos && is_eos(&e->m->shape, r->s.token)) {
		finish(e, req, WIRE_FINISH_STOP, 0);
		return false;
	}
	put_token(req, WIRE_EV_TOKEN, s->n_known, &r->s);
	req->n_output++;
	(*tokens)++;
	s->token[s->n_known++] = r->s.token;
	if (s->n_known == s->n_max) {
		finish(e, req, WIRE_FINISH_LENGTH, 0);
		return false;
	}
	return true;
}

static void
note_step(struct engine *e, uint32_t rows, double ms, uint32_t prompt_rows, uint32_t tokens)
{
	double per_row = ms / rows;

	e->ms_per_row = e->ms_per_row == 0 ? per_row : 0.8 * e->ms_per_row + 0.2 * per_row;
	pthread_mutex_lock(&e->stats_lock);
	e->stats.step = e->step;
	e->stats.batch_rows = rows;
	e->stats.prompt_tokens += prompt_rows;
	e->stats.output_tokens += tokens;
	e->step_ms[e->n_step_ms++ % STEP_WINDOW] = (float)ms;
	pthread_mutex_unlock(&e->stats_lock);
}

static void
note_state(struct engine *e)
{
	pthread_mutex_lock(&e->stats_lock);
	e->stats.running = e->n_running;
	e->stats.queued = __atomic_load_n(&e->n_queued, __ATOMIC_RELAXED);
	e->stats.kv_pages_used = e->kv.n_used - e->kv.n_idle_pages;
	e->stats.kv_pages_cached = e->kv.n_idle_pages;
	e->stats.prefix_hit_tokens = e->kv.hit_tokens;
	e->stats.prefix_evictions = e->kv.evictions;
	e->stats.preemptions = e->preemptions;
	pthread_mutex_unlock(&e->stats_lock);
}

/* What a step did for one sequence; *want moves over its results. Returns false when it ended. */
static bool
after_step(struct engine *e, struct seq *s, uint32_t rows, uint32_t *want, uint32_t *prompt_rows, uint32_t *tokens)
{
	uint32_t n_prompt = s->req->n_prompt, window = e->m->shape.window, end = s->n_run + rows, first = *want;
	struct request *r = s->req;

	while (*want < e->n_want && e->want[*want].seq == s)
		(*want)++;
	if (note_segments(s, rows) != 0) {
		finish(e, r, WIRE_FINISH_ERROR, ENOMEM);
		return false;
	}
	if (s->n_seen < n_prompt && end > s->n_seen)
		*prompt_rows += (end < n_prompt ? end : n_prompt) - s->n_seen;
	s->n_seen = end > s->n_seen ? end : s->n_seen;
	s->n_run = end;
	publish(e, s);
	for (uint32_t i = first; i < *want; i++)
		if (!take_result(e, s, e->want[i].pos, &e->result[i], tokens))
			return false;
	if (r->sampling.max_tokens == 0 && s->n_run == n_prompt) {
		finish(e, r, WIRE_FINISH_LENGTH, 0);
		return false;
	}
	if (window != 0 && end + 1 > window)
		kv_drop_before(&e->kv, &s->kv, end + 1 - window);
	r->sink.flush(r->sink.arg);
	return true;
}

static void
note_evidence(struct engine *e)
{
	evidence_next(e->evidence);
	pthread_mutex_lock(&e->stats_lock);
	evidence_copy(e->evidence_seen, e->evidence);
	pthread_mutex_unlock(&e->stats_lock);
}

/* Returns false when there was nothing to run. */
static bool
run_step(struct engine *e)
{
	double start = now_ms();
	uint32_t rows, prompt_rows = 0, tokens = 0, want = 0, running = e->n_running;
	bool sample;

	rows = choose_batch(e);
	if (rows == 0)
		return e->n_running != running; /* who was preempted may be admitted again */
	e->step++;
	sample = e->cfg.evidence_steps != 0 && e->step % e->cfg.evidence_steps == 0;
	if (sample)
		forward_sample(e->forward, e->evidence, (uint32_t)(e->step / e->cfg.evidence_steps % rows));
	e->logits = forward_run(e->forward, e->row, rows);
	if (sample)
		note_evidence(e);
	if (e->n_want > 0)
		team_run(e->team, sample_part, e);

	for (uint32_t i = 0; i < e->n_running; i++) {
		uint32_t n = e->pick[i].rows;

		if (n > 0 && !after_step(e, e->running[i], n, &want, &prompt_rows, &tokens))
			e->running[i] = NULL;
	}
	drop_gone(e);
	note_step(e, rows, now_ms() - start, prompt_rows, tokens);
	return true;
}

static void
wait_for_mail(struct engine *e)
{
	double end = now_ms() + e->cfg.spin_us / 1e3;

	do {
		for (int i = 0; i < 64; i++) {
			if (__atomic_load_n(&e->mail, __ATOMIC_ACQUIRE))
				return;
			__builtin_ia32_pause();
		}
	} while (now_ms() < end);
	pthread_mutex_lock(&e->lock);
	e->sleeping = true;
	while (!__atomic_load_n(&e->mail, __ATOMIC_ACQUIRE))
		pthread_cond_wait(&e->wake, &e->lock);
	e->sleeping = false;
	pthread_mutex_unlock(&e->lock);
}

static void *
engine_main(void *arg)
{
	struct engine *e = arg;

	kernels_thread_init();
	while (take_mail(e)) {
		drop_cancelled(e);
		admit(e);
		note_state(e);
		if (!run_step(e))
			wait_for_mail(e);
	}
	for (uint32_t i = 0; i < e->n_running; i++)
		finish(e, e->running[i]->req, WIRE_FINISH_CANCELLED, 0);
	e->n_running = 0;
	while (e->waiting != NULL) {
		struct request *r = e->waiting;

		e->waiting = r->next;
		finish(e, r, WIRE_FINISH_CANCELLED, 0);
	}
	return NULL;
}

/* ---- the front's side ---- */

uint64_t
engine_kv_bytes(const struct model_shape *s, const struct engine_config *cfg)
{
	uint64_t page = kv_page_bytes(s), pages = cfg->kv_bytes / page;

	return pages < (uint64_t)2 * s->n_layers ? 0 : pages * page;
}

static int
allocate(struct engine *e, struct err *err)
{
	uint32_t parts = team_size(e->team), rows = e->cfg.max_batch_tokens;
	int rc = kv_new(&e->kv, &e->m->shape, e->cfg.kv_bytes, err);

	if (rc != 0)
		return rc;
	rc = forward_new(&e->forward, e->m, e->ops, e->team, &e->kv, rows, err);
	if (rc != 0)
		return rc;
	e->running = calloc(e->max_seqs, sizeof(*e->running));
	e->pick = calloc(e->max_seqs, sizeof(*e->pick));
	e->row = calloc(rows, sizeof(*e->row));
	e->want = calloc(rows, sizeof(*e->want));
	e->result = calloc(rows, sizeof(*e->result));
	e->scratch = calloc(parts, sizeof(*e->scratch));
	if (evidence_new(&e->evidence, e->m->shape.n_layers) != 0 ||
	    evidence_new(&e->evidence_seen, e->m->shape.n_layers) != 0)
		return err_set(err, -ENOMEM, "no memory for evidence");
	if (e->running == NULL || e->pick == NULL || e->row == NULL || e->want == NULL || e->result == NULL ||
	    e->scratch == NULL)
		return err_set(err, -ENOMEM, "no memory for a batch of %u rows", rows);
	for (uint32_t i = 0; i < parts; i++)
		if (sample_scratch_new(&e->scratch[i], e->m->shape.vocab) != 0)
			return err_set(err, -ENOMEM, "no memory for sampling");
	return 0;
}

int
engine_new(struct engine **out, const struct model *m, const struct k_ops *ops, struct team *team,
    const struct engine_config *cfg, struct plan *plan, uint64_t epoch, struct err *err)
{
	struct engine *e = calloc(1, sizeof(*e));
	sigset_t all, old;
	int rc;

	*out = NULL;
	if (e == NULL)
		return err_set(err, -ENOMEM, "no memory for the engine");
	e->m = m, e->ops = ops, e->team = team, e->cfg = *cfg, e->epoch = epoch;
	e->max_seqs = cfg->max_batch < cfg->max_batch_tokens ? cfg->max_batch : cfg->max_batch_tokens;
	e->plan = plan_ref(plan);
	e->posted_end = &e->posted, e->flips_end = &e->flips;
	e->finished_end = &e->finished, e->applied_end = &e->applied;
	pthread_mutex_init(&e->lock, NULL);
	pthread_cond_init(&e->wake, NULL);
	pthread_mutex_init(&e->stats_lock, NULL);

	rc = allocate(e, err);
	if (rc == 0) {
		e->stats = (struct engine_stats){.epoch = epoch, .plan_digest = plan->digest, .kv_pages = e->kv.n_pages,
		    .kv_page_tokens = KV_PAGE_TOKENS, .kv_bytes = e->kv.bytes};
		sigfillset(&all);
		pthread_sigmask(SIG_BLOCK, &all, &old);
		rc = -pthread_create(&e->thread, NULL, engine_main, e);
		pthread_sigmask(SIG_SETMASK, &old, NULL);
		e->started = rc == 0;
		if (rc != 0)
			err_set(err, rc, "engine thread: %s", strerror(-rc));
	}
	if (rc != 0)
		engine_free(&e);
	*out = e;
	return rc;
}

/* Call with the lock held. */
static void
post(struct engine *e)
{
	__atomic_store_n(&e->mail, 1, __ATOMIC_RELEASE);
	if (e->sleeping)
		pthread_cond_signal(&e->wake);
}

void
engine_free(struct engine **ep)
{
	struct engine *e = *ep;

	if (e == NULL)
		return;
	if (e->started) {
		pthread_mutex_lock(&e->lock);
		e->stop = true;
		post(e);
		pthread_mutex_unlock(&e->lock);
		pthread_join(e->thread, NULL);
	}
	forward_free(&e->forward);
	kv_free(&e->kv);
	evidence_free(&e->evidence);
	evidence_free(&e->evidence_seen);
	for (uint32_t i = 0; e->scratch != NULL && i < team_size(e->team); i++)
		sample_scratch_free(&e->scratch[i]);
	plan_unref(&e->plan);
	pthread_mutex_destroy(&e->lock);
	pthread_cond_destroy(&e->wake);
	pthread_mutex_destroy(&e->stats_lock);
	free(e->running), free(e->pick), free(e->row), free(e->want), free(e->result), free(e->scratch);
	free(e);
	*ep = NULL;
}

/* Of a sequence in BF16; a window bounds it. */
static uint64_t
most_pages(const struct engine *e, uint32_t tokens)
{
	uint32_t window = e->m->shape.window;

	if (window != 0 && tokens > window + e->cfg.max_batch_tokens + KV_PAGE_TOKENS)
		tokens = window + e->cfg.max_batch_tokens + KV_PAGE_TOKENS;
	return (uint64_t)kv_blocks_for(tokens) * 2 * e->m->shape.n_layers;
}

/* A replay knows all its segments from the start; the last has no end. */
static int
take_replay(struct seq *s, const struct request *r)
{
	for (uint32_t i = 0; i < r->n_replay; i++)
		if (add_segment(s, r->replay[i].from, r->replay[i].plan, r->replay[i].epoch) != 0)
			return -ENOMEM;
	if (r->n_replay > 0) {
		s->n_fixed = UINT32_MAX;
		s->plan = plan_ref(r->replay[0].plan);
		s->epoch = r->replay[0].epoch;
	}
	return 0;
}

int
engine_submit(struct engine *e, struct request *r, struct err *err)
{
	uint32_t context = e->m->shape.max_context, n_max;
	struct seq *s;

	if (r->n_prompt == 0 || r->n_prompt > context - (r->sampling.max_tokens > 0))
		return err_set(err, -E2BIG, "prompt of %u tokens: the context holds %u with at least one of output",
		    r->n_prompt, context);
	n_max = r->sampling.max_tokens < context - r->n_prompt ? r->n_prompt + r->sampling.max_tokens : context;
	if (most_pages(e, n_max) > e->kv.n_pages)
		return err_set(err, -E2BIG, "%u tokens of prompt and output: the KV cache holds %llu", n_max,
		    (unsigned long long)(e->kv.n_pages / (2 * e->m->shape.n_layers)) * KV_PAGE_TOKENS);
	if (__atomic_load_n(&e->n_queued, __ATOMIC_RELAXED) >= e->cfg.max_queue)
		return err_set(err, -EBUSY, "busy: %u requests are queued", e->cfg.max_queue);

	s = calloc(1, sizeof(*s));
	if (s == NULL)
		return err_set(err, -ENOMEM, "no memory for a request");
	s->token = malloc((size_t)n_max * sizeof(*s->token));
	if (s->token == NULL || kv_seq_new(&s->kv, e->m->shape.n_layers, n_max) != 0 || take_replay(s, r) != 0) {
		seq_free(s);
		return err_set(err, -ENOMEM, "no memory for a request of %u tokens", n_max);
	}
	memcpy(s->token, r->prompt, (size_t)r->n_prompt * sizeof(*s->token));
	s->req = r, s->n_known = r->n_prompt, s->n_max = n_max;
	r->seq = s;
	r->next = NULL;
	__atomic_add_fetch(&e->n_queued, 1, __ATOMIC_RELAXED);
	pthread_mutex_lock(&e->lock);
	s->order = e->order++;
	*e->posted_end = r;
	e->posted_end = &r->next;
	post(e);
	pthread_mutex_unlock(&e->lock);
	return 0;
}

void
engine_cancel(struct engine *e, struct request *r)
{
	__atomic_store_n(&r->cancelled, 1, __ATOMIC_RELEASE);
	engine_kick(e);
}

void
engine_kick(struct engine *e)
{
	pthread_mutex_lock(&e->lock);
	post(e);
	pthread_mutex_unlock(&e->lock);
}

void
engine_flip(struct engine *e, struct flip *f)
{
	f->next = NULL;
	pthread_mutex_lock(&e->lock);
	*e->flips_end = f;
	e->flips_end = &f->next;
	post(e);
	pthread_mutex_unlock(&e->lock);
}

void
engine_configure(struct engine *e, const struct engine_config *cfg)
{
	pthread_mutex_lock(&e->lock);
	e->new_cfg = *cfg;
	/* What buffers were sized by stays. */
	e->new_cfg.max_batch_tokens = e->cfg.max_batch_tokens;
	e->new_cfg.max_batch = e->cfg.max_batch;
	e->new_cfg.kv_bytes = e->cfg.kv_bytes;
	e->new_cfg.threads = e->cfg.threads;
	e->new_cfg_set = true;
	post(e);
	pthread_mutex_unlock(&e->lock);
}

struct request *
engine_reap(struct engine *e)
{
	struct request *r;

	pthread_mutex_lock(&e->lock);
	r = e->finished;
	e->finished = NULL, e->finished_end = &e->finished;
	pthread_mutex_unlock(&e->lock);
	return r;
}

struct flip *
engine_reap_flips(struct engine *e)
{
	struct flip *f;

	pthread_mutex_lock(&e->lock);
	f = e->applied;
	e->applied = NULL, e->applied_end = &e->applied;
	pthread_mutex_unlock(&e->lock);
	return f;
}

static int
by_value(const void *pa, const void *pb)
{
	float a = *(const float *)pa, b = *(const float *)pb;

	return a < b ? -1 : a > b;
}

void
engine_stats(struct engine *e, struct engine_stats *out)
{
	float ms[STEP_WINDOW];
	uint32_t n;

	pthread_mutex_lock(&e->stats_lock);
	*out = e->stats;
	n = e->n_step_ms < STEP_WINDOW ? e->n_step_ms : STEP_WINDOW;
	memcpy(ms, e->step_ms, n * sizeof(*ms));
	pthread_mutex_unlock(&e->stats_lock);
	if (n == 0)
		return;
	qsort(ms, n, sizeof(*ms), by_value);
	out->step_ms_p50 = ms[n / 2];
	out->step_ms_p90 = ms[n * 9 / 10];
	out->step_ms_p99 = ms[n * 99 / 100];
	out->step_ms_max = ms[n - 1];
}

void
engine_evidence(struct engine *e, enum plan_group g, uint32_t layer, struct evidence_site *out)
{
	pthread_mutex_lock(&e->stats_lock);
	evidence_read(e->evidence_seen, g, layer, out);
	pthread_mutex_unlock(&e->stats_lock);
}

enum plan_format
engine_executed(const struct engine *e, const struct plan *p, enum plan_group g, uint32_t layer)
{
	(void)e; /* the CPU backend runs every format at every site */
	return plan_at(p, g, layer);
}
