/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/batch.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "daemon/engine/device.h"

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

		if (next < s->n_known)
			out->bad = !sample_score(logits, s->token[next], s->req->sampling.top_logprobs, e->scratch[part], &out->s);
		else
			out->bad = !sample_token(logits, &s->req->sampling, s->token, s->req->n_prompt, s->n_known,
			    e->scratch[part], &out->s);
	}
}

/* A device samples where the logits are: it is told before the pass what to do with them. */
static void
tell_device(struct engine *e)
{
	for (uint32_t i = 0; i < e->n_want; i++) {
		const struct seq *s = e->want[i].seq;
		uint32_t next = e->want[i].pos + 1;

		if (next < s->n_known)
			device_score(e->cfg.device, s->token[next], s->req->sampling.top_logprobs);
		else
			device_want(e->cfg.device, &s->req->sampling, s->token, s->req->n_prompt, s->n_known);
	}
}

static void
sample(struct engine *e)
{
	if (e->cfg.device == NULL) {
		team_run(e->team, sample_part, e);
		return;
	}
	for (uint32_t i = 0; i < e->n_want; i++)
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
note_segments(struct seq *s, uint32_t rows)
{
	uint32_t end = s->n_run + rows;
	const struct segment *last = s->n_seg > 0 ? &s->seg[s->n_seg - 1] : NULL;

	if (end > s->n_fixed) {
		if ((last == NULL || last->plan->digest != s->plan->digest || last->epoch != s->epoch) &&
		    seq_add_segment(s, s->n_fixed, s->plan, s->epoch) != 0)
			return -ENOMEM;
		s->n_fixed = end;
	}
	for (; s->n_told < s->n_seg && s->seg[s->n_told].from < end; s->n_told++)
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
		batch_finish(e, req, WIRE_FINISH_ERROR, nonfinite_detail(e, s, pos));
		return false;
	}
	if (pos + 1 < s->n_known) {
		put_token(req, WIRE_EV_PROMPT, pos + 1, &r->s);
		return true;
	}
	if (!req->sampling.ignore_eos && is_eos(&e->m->shape, r->s.token)) {
		batch_finish(e, req, WIRE_FINISH_STOP, 0);
		return false;
	}
	put_token(req, WIRE_EV_TOKEN, s->n_known, &r->s);
	if (req->n_output++ == 0)
		req->first_ms = engine_now_ms();
	(*tokens)++;
	s->token[s->n_known++] = r->s.token;
	if (s->n_known == s->n_max) {
		batch_finish(e, req, WIRE_FINISH_LENGTH, 0);
		return false;
	}
	return true;
}

static void
note_step(struct engine *e, uint32_t rows, uint32_t probe_rows, double ms, double forward_ms, uint32_t prompt_rows,
    uint32_t tokens)
{
	double per_row = ms / rows;

	if (probe_rows == 0)
		e->ms_per_row = e->ms_per_row == 0 ? per_row : 0.8 * e->ms_per_row + 0.2 * per_row;
	pthread_mutex_lock(&e->stats_lock);
	e->stats.step = e->step; /* at once: tokens of this step are out */
	e->stats.batch_rows = rows;
	e->stats.prompt_tokens += prompt_rows;
	e->stats.output_tokens += tokens;
	e->stats.forward_s += forward_ms / 1e3;
	e->step_ms[e->n_step_ms++ % STEP_WINDOW] = (float)ms;
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
		batch_finish(e, r, WIRE_FINISH_ERROR, ENOMEM);
		return false;
	}
	if (s->n_seen < n_prompt && end > s->n_seen)
		*prompt_rows += (end < n_prompt ? end : n_prompt) - s->n_seen;
	s->n_seen = end > s->n_seen ? end : s->n_seen;
	s->n_run = end;
	batch_publish(e, s);
	for (uint32_t i = first; i < *want; i++)
		if (!take_result(e, s, e->want[i].pos, &e->result[i], tokens))
			return false;
	if (r->sampling.max_tokens == 0 && s->n_run == n_prompt) {
		batch_finish(e, r, WIRE_FINISH_LENGTH, 0);
		return false;
	}
	if (window != 0 && end + 1 > window)
		kv_drop_before(&e->kv, &s->kv, end + 1 - window);
	s->flush_due = true;
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

/* Multiplications of a step that one thread does about as soon as a team: its rounds cost a microsecond each, and the
 * others' cores may be an app's. */
#define SMALL_STEP 4e6

/* Returns false when there was nothing to run. */
bool
step_run(struct engine *e)
{
	double start = engine_now_ms(), forward;
	uint32_t rows = 0, probe_rows, prompt_rows = 0, tokens = 0, want = 0, running = e->n_running;
	bool evidence;

	e->n_want = 0;
	probe_rows = probe_alone(e) ? probe_choose(e, 0) : 0;
	if (probe_rows == 0) {
		rows = batch_choose(e);
		probe_rows = probe_choose(e, rows);
	}
	if (rows + probe_rows == 0) {
		batch_flush(e);
		return e->n_running != running; /* who was preempted may be admitted again */
	}
	e->step++;
	evidence = rows > 0 && e->cfg.evidence_steps != 0 && e->step % e->cfg.evidence_steps == 0;
	if (evidence)
		forward_sample(e->forward, e->evidence, (uint32_t)(e->step / e->cfg.evidence_steps % rows));
	if (e->cfg.device != NULL)
		tell_device(e);
	team_set_alone(e->team, (double)(rows + probe_rows) * (double)e->m->weights_bytes / 2 < SMALL_STEP);
	forward = engine_now_ms();
	forward_start(e->forward, e->row, rows + probe_rows);
	batch_flush(e); /* of the step before, while the device runs this one */
	e->logits = forward_run(e->forward, e->row, rows + probe_rows);
	forward = engine_now_ms() - forward;
	if (evidence)
		note_evidence(e);
	if (e->n_want > 0)
		sample(e);
	/* First: a live row that is not finite is computed again, over the logits. */
	if (probe_rows > 0)
		probe_after(e, probe_rows, rows, e->logits + (size_t)e->n_want * e->m->shape.vocab, forward);
	else
		probe_note_live(e, forward);

	for (uint32_t i = 0; i < e->n_running && rows > 0; i++) {
		uint32_t n = e->pick[i].rows;

		if (n > 0 && !after_step(e, e->running[i], n, &want, &prompt_rows, &tokens))
			e->running[i] = NULL;
	}
	batch_drop_gone(e);
	if (e->cfg.device == NULL)
		batch_flush(e);
	if (rows > 0)
		note_step(e, rows, probe_rows, engine_now_ms() - start, forward, prompt_rows, tokens);
	return true;
}
