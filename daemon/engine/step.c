/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/batch.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "daemon/engine/device.h"

/* The step that was chosen last. */
static struct step *
step_last(struct engine *e)
{
	return &e->steps[e->step % KD_AHEAD];
}

static void
sample_part(void *arg, uint32_t part, uint32_t parts)
{
	struct engine *e = arg;
	const struct step *st = step_last(e);
	uint32_t vocab = e->m->shape.vocab, from, to;

	team_share(st->n_want, part, parts, &from, &to);
	for (uint32_t i = from; i < to; i++) {
		float *logits = e->logits + (size_t)i * vocab;
		const struct seq *s = st->want[i].seq;
		struct result *out = &e->result[i];
		uint32_t next = st->want[i].pos + 1;

		if (next < s->n_known)
			out->bad = !sample_score(logits, s->token[next], s->req->sampling.top_logprobs, e->scratch[part], &out->s);
		else
			out->bad = !sample_token(logits, &s->req->sampling, s->token, s->req->n_prompt, s->n_known,
			    e->scratch[part], &out->s);
	}
}

/* A device samples where the logits are: it is told before the pass what to do with them. */
static void
tell_device(struct engine *e, const struct step *st)
{
	for (uint32_t i = 0; i < st->n_want; i++) {
		const struct seq *s = st->want[i].seq;
		uint32_t next = st->want[i].pos + 1;

		if (next < s->n_known)
			device_score(e->cfg.device, s->token[next], s->req->sampling.top_logprobs);
		else
			device_want(e->cfg.device, &s->req->sampling, s->token, s->req->n_prompt, s->n_known, next);
	}
}

static void
sample(struct engine *e, const struct step *st)
{
	if (e->cfg.device == NULL && st->n_want > 0)
		team_run(e->team, sample_part, e);
	for (uint32_t i = 0; e->cfg.device != NULL && i < st->n_want; i++)
		e->result[i].bad = !device_result(e->cfg.device, i, &e->result[i].s);
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
note_segments(struct seq *s, const struct part *p)
{
	const struct segment *last = s->n_seg > 0 ? &s->seg[s->n_seg - 1] : NULL;

	if (p->end > s->n_fixed) {
		if ((last == NULL || last->plan->digest != p->plan->digest || last->epoch != p->epoch) &&
		    seq_add_segment(s, s->n_fixed, p->plan, p->epoch) != 0)
			return -ENOMEM;
		s->n_fixed = p->end;
	}
	for (; s->n_told < s->n_seg && s->seg[s->n_told].from < p->end; s->n_told++)
		batch_put(s->req, (struct wire_event){.kind = WIRE_EV_SEGMENT, .position = s->seg[s->n_told].from,
		    .a = s->seg[s->n_told].plan->digest, .epoch = s->seg[s->n_told].epoch});
	return 0;
}

/* The site of a failed row goes to the app as (group + 1) << 16 | layer. */
static uint64_t
nonfinite_detail(struct engine *e, const struct seq *s, uint32_t pos)
{
	struct forward_row row = {.token = s->token[pos], .pos = pos, .kv = &s->kv, .plan = seq_segment_at(s, pos).plan,
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
	batch_put(r, (struct wire_event){.kind = kind, .token = s->token, .position = position, .logprob = s->logprob});
	for (uint32_t i = 0; i < s->n_top; i++)
		batch_put(r, (struct wire_event){.kind = WIRE_EV_TOP, .token = s->top[i].id, .position = position,
		    .logprob = s->top[i].value});
}

/* Takes what came out at a position: a score, or the next token. Returns false
 * when the request ended: then it may be gone already. */
static bool
take_result(struct engine *e, struct seq *s, uint32_t pos, const struct result *r, uint32_t *tokens)
{
	struct request *req = s->req;

	if (r->bad) {
		batch_end(e, s, WIRE_FINISH_ERROR, nonfinite_detail(e, s, pos));
		return false;
	}
	if (pos + 1 < s->n_known) {
		put_token(req, WIRE_EV_PROMPT, pos + 1, &r->s);
		return true;
	}
	if (!req->sampling.ignore_eos && is_eos(&e->m->shape, r->s.token)) {
		batch_end(e, s, WIRE_FINISH_STOP, 0);
		return false;
	}
	put_token(req, WIRE_EV_TOKEN, s->n_known, &r->s);
	if (req->n_output++ == 0)
		req->first_ms = engine_now_ms();
	(*tokens)++;
	s->token[s->n_known++] = r->s.token;
	s->n_ahead--;
	if (s->n_known == s->n_max) {
		batch_end(e, s, WIRE_FINISH_LENGTH, 0);
		return false;
	}
	return true;
}

/* wait_ms: of the pass, that the host had nothing to do. */
static void
note_step(struct engine *e, const struct step *st, double forward_ms, double wait_ms, uint32_t prompt_rows, uint32_t tokens)
{
	double ms = engine_now_ms() - fmax(st->start_ms, e->taken_ms), per_row = ms / (st->rows + st->probe_rows);

	if (st->probe_rows == 0)
		e->ms_per_row = e->ms_per_row == 0 ? per_row : 0.8 * e->ms_per_row + 0.2 * per_row;
	pthread_mutex_lock(&e->stats_lock);
	e->stats.step = st->number; /* at once: tokens of this step are out */
	e->stats.batch_rows = st->rows;
	e->stats.prompt_tokens += prompt_rows;
	e->stats.output_tokens += tokens;
	e->stats.forward_s += forward_ms / 1e3;
	e->stats.host_s += fmax(0, ms - wait_ms) / 1e3;
	e->step_ms[e->n_step_ms++ % STEP_WINDOW] = (float)ms;
	pthread_mutex_unlock(&e->stats_lock);
}

/* What a step did for one sequence; result: its first. It may be gone when this returns. */
static void
after_step(struct engine *e, const struct part *p, const struct want *want, const struct result *result, uint32_t *prompt_rows,
    uint32_t *tokens)
{
	struct seq *s = p->seq;
	uint32_t n_prompt = s->req->n_prompt, window = e->m->shape.window;

	s->n_owed -= p->n_owed;
	if (note_segments(s, p) != 0) {
		batch_end(e, s, WIRE_FINISH_ERROR, ENOMEM);
		return;
	}
	if (s->n_seen < n_prompt && p->end > s->n_seen)
		*prompt_rows += (p->end < n_prompt ? p->end : n_prompt) - s->n_seen;
	s->n_seen = p->end > s->n_seen ? p->end : s->n_seen;
	batch_publish(e, s, p->end);
	for (uint32_t i = 0; i < p->n_want; i++)
		if (!take_result(e, s, want[i].pos, &result[i], tokens))
			return;
	if (s->req->sampling.max_tokens == 0 && p->end == n_prompt) {
		batch_end(e, s, WIRE_FINISH_LENGTH, 0);
		return;
	}
	if (window != 0 && p->end + 1 > window)
		kv_drop_before(&e->kv, &s->kv, p->end + 1 - window);
	s->flush_due = true;
}

static void
choose_evidence(struct engine *e, struct step *st)
{
	uint32_t steps = e->cfg.evidence_steps;

	st->evidence = st->rows > 0 && steps != 0 && st->number % steps == 0;
	if (st->evidence)
		forward_sample(e->forward, e->evidence, (uint32_t)(st->number / steps % st->rows));
}

static void
note_evidence(struct engine *e)
{
	evidence_next(e->evidence);
	pthread_mutex_lock(&e->stats_lock);
	evidence_copy(e->evidence_seen, e->evidence);
	pthread_mutex_unlock(&e->stats_lock);
}

/* Multiplications of a step that one thread does about as soon as a team: its rounds cost a microsecond each, and the
 * others' cores may be an app's. */
#define SMALL_STEP 4e6

/* Runs a step to its end: the pass on the CPU, what is left of it on a device. Returns the milliseconds it waited. */
static double
pass(struct engine *e, struct step *st)
{
	double start = engine_now_ms(), wait;

	if (e->cfg.device == NULL) {
		st->submitted_ms = start;
		e->logits = forward_run(e->forward, e->row, st->rows + st->probe_rows);
	} else {
		e->logits = forward_wait(e->forward);
	}
	wait = engine_now_ms() - start;
	if (st->evidence)
		note_evidence(e);
	return wait;
}

/* The oldest step that is under way: what came out of it is told, and kept. */
static void
take(struct engine *e)
{
	struct step *st = &e->steps[(e->step - --e->n_under_way) % KD_AHEAD];
	double wait = pass(e, st), ran = engine_now_ms(), forward = ran - fmax(st->submitted_ms, e->ran_ms);
	uint32_t prompt_rows = 0, tokens = 0, want = 0;

	e->ran_ms = ran; /* where another step is under way, it began then */
	sample(e, st);
	/* First: a live row that is not finite is computed again, over the logits. */
	if (st->probe_rows > 0)
		probe_after(e, st->probe_rows, st->rows, e->logits + (size_t)st->n_want * e->m->shape.vocab, forward);
	else
		probe_note_live(e, forward);
	for (uint32_t i = 0; i < st->n_parts; i++) {
		struct part *p = &st->part[i];

		if (p->seq != NULL)
			after_step(e, p, st->want + want, e->result + want, &prompt_rows, &tokens);
		want += p->n_want;
		plan_unref(&p->plan);
	}
	if (e->cfg.device == NULL)
		batch_flush(e);
	if (st->rows > 0)
		note_step(e, st, forward, wait, prompt_rows, tokens);
	e->taken_ms = engine_now_ms();
}

void
step_finish(struct engine *e)
{
	while (e->n_under_way > 0)
		take(e);
}

/* The rows of the next step; false: there are none. Behind another step a probe's rows run only beside live ones, and not
 * behind a probe's: what is next depends on what came out, and there is one place for logits. */
static bool
choose(struct engine *e, struct step *st)
{
	const struct step *before = e->n_under_way > 0 ? step_last(e) : NULL;

	st->n_parts = st->n_want = st->rows = st->probe_rows = 0;
	st->start_ms = engine_now_ms();
	if (before != NULL && probe_alone(e))
		return false;
	if (before == NULL && probe_alone(e))
		st->probe_rows = probe_choose(e, 0);
	if (st->probe_rows == 0) {
		batch_choose(e, st);
		if (before == NULL || (st->rows > 0 && before->probe_rows == 0))
			st->probe_rows = probe_choose(e, st->rows);
	}
	return st->rows + st->probe_rows > 0;
}

bool
step_run(struct engine *e)
{
	struct step *st = &e->steps[(e->step + 1) % KD_AHEAD];
	uint32_t running = e->n_running, under_way = e->n_under_way;

	if (!choose(e, st)) {
		batch_flush(e);
		if (under_way > 0)
			take(e);
		return under_way > 0 || e->n_running != running; /* who was preempted may be admitted again */
	}
	st->number = ++e->step;
	e->n_under_way++;
	choose_evidence(e, st);
	team_set_alone(e->team, (double)(st->rows + st->probe_rows) * (double)e->m->weights_bytes / 2 < SMALL_STEP);
	if (e->cfg.device != NULL) {
		tell_device(e, st);
		st->submitted_ms = engine_now_ms();
		forward_start(e->forward, e->row, st->rows + st->probe_rows);
	}
	batch_flush(e); /* of the step before, while the device runs this one */
	/* A device goes on with this step while the one before is taken; a probe's that runs alone is timed. */
	if (under_way > 0 || e->cfg.device == NULL || st->rows == 0)
		take(e);
	return true;
}
