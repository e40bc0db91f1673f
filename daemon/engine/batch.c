/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/batch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- a sequence ---- */

void
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

void
batch_put(struct request *r, struct wire_event ev)
{
	ev.serial = r->serial;
	r->sink.put(r->sink.arg, &ev);
}

static void
flush(struct seq *s)
{
	if (s->flush_due)
		s->req->sink.flush(s->req->sink.arg);
	s->flush_due = false;
}

void
batch_flush(struct engine *e)
{
	for (uint32_t i = 0; i < e->n_running; i++)
		if (e->running[i] != NULL)
			flush(e->running[i]);
}

/* Its DONE has the room that SINK_ROOM kept. The request may be freed as soon as the lock is released. */
void
batch_finish(struct engine *e, struct request *r, enum wire_finish how, uint64_t detail)
{
	struct seq *s = r->seq;

	if (s->state == SEQ_PARKED)
		r->sink.set_parked(r->sink.arg, false);
	seq_set_state(s, SEQ_FINISHED);
	kv_close(&e->kv, &s->kv);
	r->finish = how;
	r->done_ms = engine_now_ms();
	r->error = how == WIRE_FINISH_ERROR ? -(int)(uint32_t)detail : 0;
	batch_put(r, (struct wire_event){.kind = WIRE_EV_DONE, .token = how, .a = detail});
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
	engine_notify(e);
}

void
batch_end(struct engine *e, struct seq *s, enum wire_finish how, uint64_t detail)
{
	for (uint32_t i = 0; i < e->n_running; i++)
		if (e->running[i] == s)
			e->running[i] = e->running[--e->n_running];
	for (uint32_t i = 0; i < e->n_under_way; i++) {
		struct step *st = &e->steps[(e->step - i) % KD_AHEAD];

		for (uint32_t j = 0; j < st->n_parts; j++)
			if (st->part[j].seq == s)
				st->part[j].seq = NULL;
	}
	batch_finish(e, s->req, how, detail);
}

bool
seq_has_own_plan(const struct seq *s)
{
	return s->req->plan != NULL || s->req->replay != NULL;
}

void
seq_set_plan(struct seq *s, struct plan *p, uint64_t epoch)
{
	plan_unref(&s->plan);
	s->plan = plan_ref(p);
	s->epoch = epoch;
}

/* ---- who runs ---- */

static uint32_t
running_of(const struct engine *e, uint64_t client)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < e->n_running; i++)
		n += e->running[i]->req->client == client;
	return n;
}

void
batch_queue(struct engine *e, struct request *r, bool front)
{
	struct request **first = &e->waiting, *head;

	while (*first != NULL && (*first)->client != r->client)
		first = &(*first)->next_client;
	head = *first;
	r->next = NULL;
	if (head != NULL && !front) {
		head->last->next = r;
		head->last = r;
		return;
	}
	r->next = head;
	r->last = head != NULL ? head->last : r;
	r->next_client = head != NULL ? head->next_client : NULL;
	*first = r;
}

void
batch_unqueue(struct request **first)
{
	struct request *r = *first, *next = r->next;

	*first = next != NULL ? next : r->next_client;
	if (next != NULL) {
		next->last = r->last;
		next->next_client = r->next_client;
	}
}

/* The waiting request that sched_admit() would choose: the first of a client. */
static struct request **
next_waiting(struct engine *e)
{
	struct request **best = NULL;
	struct sched_waiting pair[2];

	for (struct request **rp = &e->waiting; *rp != NULL; rp = &(*rp)->next_client) {
		pair[1] = (struct sched_waiting){(*rp)->client, (*rp)->seq->order, running_of(e, (*rp)->client)};
		if (best == NULL || sched_admit(pair, 2) == 1) {
			best = rp;
			pair[0] = pair[1];
		}
	}
	return best;
}

/* Pages that a sequence still lacks for what is known of it and one token more. */
static uint32_t
pages_wanted(const struct engine *e, const struct seq *s)
{
	uint32_t blocks = kv_blocks_for(s->n_known + s->n_ahead + 1), window = e->m->shape.window;

	if (window != 0 && blocks > kv_blocks_for(window + e->cfg.max_batch_tokens) + 1)
		blocks = kv_blocks_for(window + e->cfg.max_batch_tokens) + 1;
	blocks = blocks > s->kv.n_blocks - s->kv.n_dropped ? blocks - (s->kv.n_blocks - s->kv.n_dropped) : 0;
	return blocks * kv_block_pages(s->plan, e->m->shape.n_layers);
}

static uint32_t
seq_first_segment_end(const struct seq *s)
{
	return s->n_seg > 1 ? s->seg[1].from : UINT32_MAX;
}

int
seq_add_segment(struct seq *s, uint32_t from, struct plan *plan, uint64_t epoch)
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
	if (n > seq_first_segment_end(s))
		n = seq_first_segment_end(s);
	s->n_run = kv_match(&e->kv, &s->kv, s->req->scope, plan->digest, s->token, n);
	if (s->n_run == 0 || s->n_fixed >= s->n_run)
		return;
	if (s->n_seg == 0 && seq_add_segment(s, 0, s->plan, s->epoch) != 0) {
		kv_close(&e->kv, &s->kv);
		s->n_run = 0;
		return;
	}
	s->n_fixed = s->n_run;
}

void
batch_publish(struct engine *e, struct seq *s, uint32_t ran)
{
	uint32_t end;

	while (e->cfg.prefix_cache && (end = (s->kv.n_published + 1) * KV_PAGE_TOKENS) <= ran &&
	    end <= seq_first_segment_end(s)) {
		kv_publish(&e->kv, &s->kv, s->req->scope, s->seg[0].plan->digest, s->token);
		if (s->kv.n_published * KV_PAGE_TOKENS != end)
			return;
	}
}

/* A request is admitted when the pages for all that is known of those that run,
 * and of it, are there. What they generate may still use them up: then the
 * youngest is preempted. */
void
batch_admit(struct engine *e)
{
	struct request **rp;
	uint64_t promised = 0;

	for (uint32_t i = 0; e->waiting != NULL && i < e->n_running; i++)
		promised += pages_wanted(e, e->running[i]);
	while (e->n_running < e->max_seqs && (rp = next_waiting(e)) != NULL) {
		struct seq *s = (*rp)->seq;

		if (s->plan == NULL && s->req->plan != NULL)
			seq_set_plan(s, s->req->plan, s->req->plan_epoch);
		else if (s->plan == NULL || (!seq_has_own_plan(s) && !e->cfg.pin))
			seq_set_plan(s, e->plan, e->epoch);
		promised += pages_wanted(e, s);
		if (e->n_running > 0 && promised > kv_available(&e->kv) &&
		    (probe_alone(e) || !probe_drop_pages(e) || promised > kv_available(&e->kv)))
			return;
		batch_unqueue(rp);
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
	flush(s);
	kv_close(&e->kv, &s->kv);
	s->n_run = 0;
	batch_queue(e, s->req, true);
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

/* What there will be when the steps under way have put their events. */
static uint32_t
room_ahead(const struct seq *s)
{
	uint32_t room = s->req->sink.room(s->req->sink.arg);

	return room > s->n_owed ? room - s->n_owed : 0;
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

static int
by_plan(const void *pa, const void *pb)
{
	const struct seq *a = *(struct seq *const *)pa, *b = *(struct seq *const *)pb;

	if (a->plan->digest != b->plan->digest)
		return a->plan->digest < b->plan->digest ? -1 : 1;
	return a->order < b->order ? -1 : a->order > b->order;
}

struct segment
seq_segment_at(const struct seq *s, uint32_t pos)
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

/* running[] and pick[] without their NULLs. */
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

/* Pages for the rows that were picked; fewer rows, or none, where they do not suffice. False: others would have to
 * give theirs, and may not now. */
static bool
reserve(struct engine *e, uint32_t i)
{
	for (;;) {
		struct seq *s = e->running[i];
		uint32_t got = 0, v;

		while (got < e->pick[i].rows) {
			uint32_t pos = s->n_run + got;

			if (kv_open(&e->kv, &s->kv, seq_segment_at(s, pos).plan, pos) != 0)
				break;
			got++;
		}
		if (got > 0 || e->pick[i].rows == 0) {
			e->pick[i].rows = got;
			return true;
		}
		if (e->n_under_way > 0)
			return false;
		if (probe_drop_pages(e))
			continue;
		v = victim(e);
		if (v == i && e->n_running == 1) {
			/* Alone, and blocks in two formats took what the bound of engine_submit() left out. */
			batch_finish(e, s->req, WIRE_FINISH_ERROR, ENOSPC);
		} else {
			preempt(e, e->running[v]);
		}
		e->running[v] = NULL;
		e->pick[v].rows = 0;
		if (v == i)
			return true;
	}
}

/* Rows that a sequence may have in a step: its sink must have room for what the
 * step tells; of a replay that is two new segments at most. */
static uint32_t
pending(const struct seq *s)
{
	uint32_t total = s->n_known + s->n_ahead, n = total - s->n_run, next = s->n_told + 1;

	if (s->n_ahead > 0 && total == s->n_max)
		return 0; /* nobody asks what follows its last token */
	if (s->n_owed > 0 && room_ahead(s) < least_room(s))
		return 0; /* the reader may make room while the step runs */
	/* The prefix cache may have covered the first segment to its end. */
	while (next < s->n_seg && s->seg[next].from <= s->n_run)
		next++;
	if (next < s->n_seg && s->seg[next].from - s->n_run < n)
		n = s->seg[next].from - s->n_run;
	if (s->req->sampling.prompt_logprobs && s->state == SEQ_RUNNING) {
		uint32_t room = room_ahead(s);
		uint32_t most = room > least_room(s) ? (room - least_room(s)) / token_events(s) + 1 : 1;

		n = n < most ? n : most;
	}
	return n;
}

static bool
draws(const struct seq *s, uint32_t pos)
{
	return pos + 1 == s->n_known + s->n_ahead;
}

/* Are the logits of a position wanted: to sample what follows, or to score it. */
static bool
wants_logits(const struct seq *s, uint32_t pos)
{
	const struct request *r = s->req;

	if (draws(s, pos))
		return r->sampling.max_tokens > 0;
	return r->sampling.prompt_logprobs && pos + 1 < r->n_prompt && pos >= s->n_seen;
}

/* Rows, and the wants among them, of one sequence; returns the rows. */
static uint32_t
fill_part(struct step *st, struct seq *s, uint32_t rows, struct forward_row *row)
{
	struct part *p = &st->part[st->n_parts++];
	uint32_t first = st->n_want;
	bool drew = false;

	*p = (struct part){.seq = s, .plan = plan_ref(s->plan), .epoch = s->epoch, .end = s->n_run + rows};
	for (uint32_t pos = s->n_run; pos < p->end; pos++) {
		bool drawn = pos >= s->n_known, wants = wants_logits(s, pos);

		*row++ = (struct forward_row){.token = drawn ? s->drawn : s->token[pos], .drawn = drawn, .pos = pos, .kv = &s->kv,
		    .plan = seq_segment_at(s, pos).plan, .wants_logits = wants};
		if (!wants)
			continue;
		if (draws(s, pos)) {
			s->drawn = st->n_want;
			drew = true;
		}
		st->want[st->n_want++] = (struct want){s, pos};
	}
	p->n_want = st->n_want - first;
	p->n_owed = 2 + p->n_want * token_events(s); /* two segments */
	s->n_run = p->end;
	s->n_ahead += drew;
	s->n_owed += p->n_owed;
	return rows;
}

void
batch_choose(struct engine *e, struct step *st)
{
	struct sched_limits lim = {e->cfg.max_batch_tokens, e->cfg.max_batch_tokens};
	bool pages = true;

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
	for (uint32_t i = 0; i < e->n_running && pages; i++)
		if (e->running[i] != NULL)
			pages = reserve(e, i);
	drop_gone(e);
	for (uint32_t i = 0; i < e->n_running && pages; i++)
		if (e->pick[i].rows > 0)
			st->rows += fill_part(st, e->running[i], e->pick[i].rows, e->row + st->rows);
}
