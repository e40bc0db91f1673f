/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/probe.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/batch.h"

#define LOGITS_BYTES (64u << 20) /* of the side that is kept */
#define TURN 128u                /* what costs more than its share runs in one step of so many, as long as a live one */
#define FIRST_ROWS 1.5           /* a probe that never ran beside live rows: two dear passes and it waits for its turn */
#define BUSY_ROUNDS 96u          /* of timing, where live requests run: each takes two turns */
#define PLAIN_TURN 16u           /* one step of so many runs without a probe, to know what it costs */

int
probe_new(struct probe **out, enum probe_kind kind, uint32_t *token, uint32_t n, uint32_t from, struct plan *baseline,
    struct plan *candidate)
{
	struct probe *p = calloc(1, sizeof(*p));

	*out = NULL;
	if (p == NULL) {
		free(token);
		return -ENOMEM;
	}
	p->kind = kind, p->token = token, p->n = n, p->from = from < 1 ? 1 : from, p->share = 0.2, p->rows_beside = FIRST_ROWS;
	p->plan[SIDE_BASELINE] = plan_ref(baseline), p->plan[SIDE_CANDIDATE] = plan_ref(candidate);
	if (kind == PROBE_SCORE && n > p->from && (p->score = calloc(n - p->from, sizeof(*p->score))) == NULL) {
		probe_free(&p);
		return -ENOMEM;
	}
	*out = p;
	return 0;
}

void
probe_free(struct probe **pp)
{
	struct probe *p = *pp;

	if (p == NULL)
		return;
	for (int s = 0; s < N_SIDES; s++) {
		plan_unref(&p->plan[s]);
		kv_seq_free(&p->kv[s]);
		free(p->us[s]);
	}
	free(p->logits);
	free(p->score);
	free(p->token);
	free(p);
	*pp = NULL;
}

/* ---- comparing ---- */

#define TOP 5u

/* Ids of the highest, highest first; equal ones by id. */
static void
find_top5(const float *v, uint32_t n, uint32_t id[TOP])
{
	uint32_t k = 0;
	float least = 0;

	for (uint32_t i = 0; i < n; i++) {
		uint32_t at;

		if (k == TOP && !(v[i] > least))
			continue;
		at = k < TOP ? k++ : TOP - 1;
		for (; at > 0 && v[i] > v[id[at - 1]]; at--)
			id[at] = id[at - 1];
		id[at] = i;
		least = v[id[k - 1]];
	}
	while (k < TOP)
		id[k++] = UINT32_MAX;
}

bool
probe_compare(const struct k_ops *ops, const float *a, const float *b, uint32_t vocab, uint32_t token, struct probe_score *out)
{
	uint32_t top[N_SIDES][TOP];
	float max[N_SIDES];
	double sum[3], lse[N_SIDES];

	find_top5(a, vocab, top[0]);
	find_top5(b, vocab, top[1]);
	max[0] = a[top[0][0]], max[1] = b[top[1][0]];
	ops->divergence(a, b, vocab, max[0], max[1], sum);
	if (!isfinite(sum[0] + sum[1] + sum[2]))
		return false;
	lse[0] = log(sum[0]), lse[1] = log(sum[1]);
	out->nll[0] = lse[0] + max[0] - a[token];
	out->nll[1] = lse[1] + max[1] - b[token];
	/* What is left of rounding below zero is no divergence. */
	out->kl = fmax(0, sum[2] / sum[0] + lse[1] - lse[0]);
	out->common5 = 0;
	for (uint32_t i = 0; i < TOP; i++)
		for (uint32_t j = 0; j < TOP; j++)
			out->common5 += top[0][i] == top[1][j] && top[0][i] != UINT32_MAX;
	out->first[0] = top[0][0], out->first[1] = top[1][0];
	return true;
}

struct compare {
	struct probe *p;
	const struct k_ops *ops;
	const float *logits; /* of the side that ran */
	uint32_t first, n, vocab; /* positions [first, first + n) have logits */
	uint32_t bad[2];     /* lowest row that is not finite, per side; atomic */
};

static bool
is_finite(const float *v, uint32_t n)
{
	float sum = 0;

	for (uint32_t i = 0; i < n; i++)
		sum += v[i] * 0.0f;
	return sum == 0.0f;
}

static void
note_bad(uint32_t *at, uint32_t row)
{
	uint32_t was = __atomic_load_n(at, __ATOMIC_RELAXED);

	while (row < was && !__atomic_compare_exchange_n(at, &was, row, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

static void
compare_part(void *arg, uint32_t part, uint32_t parts)
{
	struct compare *c = arg;
	struct probe *p = c->p;
	uint32_t from, to;

	team_share(c->n, part, parts, &from, &to);
	for (uint32_t i = from; i < to; i++) {
		const float *a = p->logits + (size_t)i * c->vocab, *b = c->logits + (size_t)i * c->vocab;
		uint32_t token = c->first + i + 1, at = token - p->from;

		if (!probe_compare(c->ops, a, b, c->vocab, p->token[token], &p->score[at]))
			note_bad(&c->bad[is_finite(a, c->vocab)], i);
		if (p->dump[0] != NULL) {
			memcpy(p->dump[0] + (size_t)at * c->vocab, a, c->vocab * sizeof(*a));
			memcpy(p->dump[1] + (size_t)at * c->vocab, b, c->vocab * sizeof(*b));
		}
	}
}

static void
keep_part(void *arg, uint32_t part, uint32_t parts)
{
	const struct compare *c = arg;
	uint32_t from, to;

	team_share(c->n, part, parts, &from, &to);
	memcpy(c->p->logits + (size_t)from * c->vocab, c->logits + (size_t)from * c->vocab,
	    (size_t)(to - from) * c->vocab * sizeof(float));
}

/* ---- the front's side ---- */

int
engine_probe(struct engine *e, struct probe *p, struct err *err)
{
	uint32_t vocab = e->m->shape.vocab, layers = e->m->shape.n_layers, rows;
	uint64_t pages = 0;

	if (p->n < 2 || p->n > e->m->shape.max_context || (p->kind == PROBE_SCORE && p->from >= p->n) ||
	    (p->kind == PROBE_TIME && (p->rows == 0 || p->rows > p->n || p->rows > e->front_cfg.max_batch_tokens)))
		return err_set(err, -EINVAL, "%u tokens: the context holds 2 to %u", p->n, e->m->shape.max_context);
	for (int s = 0; s < N_SIDES; s++)
		pages += (uint64_t)kv_blocks_for(p->n) * kv_block_pages(p->plan[s], layers);
	if (pages > e->kv.n_pages)
		return err_set(err, -E2BIG, "%u tokens under two plans: the KV cache holds %u", p->n,
		    e->kv.n_pages / (4 * layers) * KV_PAGE_TOKENS);
	rows = (uint32_t)(LOGITS_BYTES / ((size_t)vocab * sizeof(float)));
	rows = rows < 1 ? 1 : rows < e->front_cfg.max_batch_tokens ? rows : e->front_cfg.max_batch_tokens;
	p->chunk_max = rows < p->n ? rows : p->n;
	if (p->kind == PROBE_SCORE)
		p->logits = malloc((size_t)p->chunk_max * vocab * sizeof(float));
	for (int s = 0; s < N_SIDES; s++)
		if (kv_seq_new(&p->kv[s], layers, p->n) != 0 ||
		    (p->kind == PROBE_TIME && (p->us[s] = malloc((p->rounds + 1) * sizeof(float))) == NULL))
			return err_set(err, -ENOMEM, "no memory for a probe of %u tokens", p->n);
	if (p->kind == PROBE_SCORE && p->logits == NULL)
		return err_set(err, -ENOMEM, "no memory for the logits of %u rows", p->chunk_max);
	p->next = NULL;
	pthread_mutex_lock(&e->lock);
	*e->probes_posted_end = p;
	e->probes_posted_end = &p->next;
	pthread_mutex_unlock(&e->lock);
	engine_kick(e);
	return 0;
}

void
engine_cancel_probe(struct engine *e, struct probe *p)
{
	__atomic_store_n(&p->cancelled, 1, __ATOMIC_RELEASE);
	engine_kick(e);
}

struct probe *
engine_reap_probes(struct engine *e)
{
	struct probe *p;

	pthread_mutex_lock(&e->lock);
	p = e->probes_done;
	e->probes_done = NULL, e->probes_done_end = &e->probes_done;
	pthread_mutex_unlock(&e->lock);
	return p;
}

/* ---- the engine's side ---- */

static void
drop_pages(struct engine *e, struct probe *p)
{
	for (int s = 0; s < N_SIDES; s++)
		kv_close(&e->kv, &p->kv[s]);
	p->n_run = p->chunk = 0;
	p->side = SIDE_BASELINE;
}

bool
probe_drop_pages(struct engine *e)
{
	bool any = false;

	for (struct probe *p = e->probes; p != NULL; p = p->next) {
		if (p->under_way)
			continue;
		any |= p->kv[0].n_blocks > 0 || p->kv[1].n_blocks > 0;
		drop_pages(e, p);
	}
	return any;
}

static void
finish(struct engine *e, struct probe **pp, int error)
{
	struct probe *p = *pp;

	drop_pages(e, p);
	p->error = error;
	*pp = p->next;
	p->next = NULL;
	pthread_mutex_lock(&e->lock);
	*e->probes_done_end = p;
	e->probes_done_end = &p->next;
	pthread_mutex_unlock(&e->lock);
	engine_notify(e);
}

void
probe_drop_cancelled(struct engine *e)
{
	for (struct probe **pp = &e->probes; *pp != NULL;) {
		if (!(*pp)->under_way && __atomic_load_n(&(*pp)->cancelled, __ATOMIC_ACQUIRE))
			finish(e, pp, -ECANCELED);
		else
			pp = &(*pp)->next;
	}
}

void
probe_finish_all(struct engine *e, int error)
{
	while (e->probes != NULL)
		finish(e, &e->probes, error);
}

bool
probe_alone(const struct engine *e)
{
	const struct probe *p = e->probes;

	return p != NULL && (p->exclusive || (p->kind == PROBE_TIME && e->step % TURN == 0));
}

/* Without live rows in the step; where some wait for it, no more than they take. */
static uint32_t
rows_alone(const struct engine *e, const struct probe *p)
{
	double rows = e->cfg.max_batch_tokens;

	if (e->n_running > 0 && !p->exclusive && e->ms_per_row > 0)
		rows = fmin(rows, e->live_ms / e->ms_per_row);
	return rows < 1 ? 1 : (uint32_t)rows;
}

/* What a pass beside live rows may cost. */
static double
limit_ms(const struct engine *e, const struct probe *p)
{
	return (p->in_turns ? 1 : p->share) * e->live_ms;
}

static uint32_t
rows_beside(const struct engine *e, const struct probe *p)
{
	if (p->kind == PROBE_TIME || e->live_ms == 0 || (p->in_turns ? e->step % TURN != 1 : e->step % PLAIN_TURN == 0))
		return 0;
	return p->rows_beside < 1 ? 1 : p->rows_beside < e->cfg.max_batch_tokens ? (uint32_t)p->rows_beside : e->cfg.max_batch_tokens;
}

/* A pass of the candidate beside live rows ended: how many rows may both sides have next? */
static void
learn_rows(const struct engine *e, struct probe *p)
{
	double fit = limit_ms(e, p) / fmax(p->beside_ms, 1e-6);

	p->beside_ms = 0;
	if (fit > 1 && p->chunk < (uint32_t)p->rows_beside)
		return; /* the text's end */
	p->rows_beside *= (1 + fmin(2, fmax(0.5, fit))) / 2;
	if (p->rows_beside >= 1)
		return;
	p->rows_beside = p->in_turns || e->ms_per_row == 0 ? 1 : fmax(1, e->live_ms / e->ms_per_row / 2);
	p->in_turns = true;
}

/* Opens pages up to a position; false: there are none now. */
static bool
open_pages(struct engine *e, struct probe *p, uint32_t end)
{
	for (uint32_t pos = p->n_run; pos < end; pos++)
		if (kv_open(&e->kv, &p->kv[p->side], p->plan[p->side], pos) != 0)
			return false;
	return true;
}

static bool
is_timing(const struct probe *p)
{
	return p->kind == PROBE_TIME && p->n_run + p->rows >= p->n;
}

uint32_t
probe_choose(struct engine *e, uint32_t n_live)
{
	struct probe *p = e->probes;
	uint32_t n;
	bool timing;

	if (p == NULL)
		return 0;
	timing = is_timing(p);
	if (timing)
		n = n_live == 0 ? p->rows : 0;
	else {
		n = n_live == 0 ? rows_alone(e, p) : rows_beside(e, p);
		n = n < e->cfg.max_batch_tokens - n_live ? n : e->cfg.max_batch_tokens - n_live;
		/* The last token is known: nobody asks what follows it. */
		if (n > p->n - (p->kind == PROBE_TIME ? p->rows : 1) - p->n_run)
			n = p->n - (p->kind == PROBE_TIME ? p->rows : 1) - p->n_run;
		if (n > p->chunk_max)
			n = p->chunk_max;
		if (p->max_rows != 0 && n > p->max_rows)
			n = p->max_rows;
		if (p->chunk > 0) /* the other side of what the baseline ran */
			n = n < p->chunk ? n : p->chunk;
	}
	if (n == 0)
		return 0;
	if (!open_pages(e, p, p->n_run + n)) {
		drop_pages(e, p);
		if (e->n_running == 0)
			finish(e, &e->probes, -ENOSPC);
		return 0;
	}
	p->chunk = n;
	p->under_way = true;
	for (uint32_t i = 0; i < n; i++) {
		uint32_t pos = p->n_run + i;

		e->row[n_live + i] = (struct forward_row){.token = p->token[pos], .pos = pos, .kv = &p->kv[p->side],
		    .plan = p->plan[p->side], .wants_logits = timing || (p->kind == PROBE_SCORE && pos + 1 >= p->from &&
		    pos >= p->n_scored)};
	}
	return n;
}

static void
find_bad(struct engine *e, struct probe *p, int side, uint32_t pos)
{
	struct forward_row row = {.token = p->token[pos], .pos = pos, .kv = &p->kv[side], .plan = p->plan[side],
	    .wants_logits = true};
	struct forward_site site = {0};

	forward_find_nonfinite(e->forward, &row, &site);
	p->bad_side = side, p->bad_position = pos, p->bad_group = site.group, p->bad_layer = site.layer;
}

/* Positions of the chunk whose logits were wanted; they are its last ones. */
static uint32_t
first_wanted(const struct probe *p)
{
	uint32_t first = p->from - 1 > p->n_scored ? p->from - 1 : p->n_scored, end = p->n_run + p->chunk;

	first = first > p->n_run ? first : p->n_run;
	return first < end ? first : end;
}

static void
after_score(struct engine *e, struct probe *p, const float *logits, uint32_t n_live, double ms)
{
	uint32_t end = p->n_run + p->chunk, first = first_wanted(p), vocab = e->m->shape.vocab;
	struct compare c = {p, e->ops, logits, first, end - first, vocab, {UINT32_MAX, UINT32_MAX}};
	double start = engine_now_ms();
	int side = p->side;

	if (c.n > 0)
		team_run(e->team, side == SIDE_BASELINE ? keep_part : compare_part, &c);
	ms += engine_now_ms() - start - (n_live > 0 ? e->live_ms : 0);
	p->cost_us += fmax(0, ms) * 1e3;
	if (n_live > 0) /* the dearer side counts */
		p->beside_ms = fmax(p->beside_ms, ms);
	if (side == SIDE_BASELINE) {
		p->side = SIDE_CANDIDATE;
		return;
	}
	if (n_live > 0)
		learn_rows(e, p);
	if (c.bad[0] != UINT32_MAX || c.bad[1] != UINT32_MAX) {
		side = c.bad[0] <= c.bad[1] ? SIDE_BASELINE : SIDE_CANDIDATE;
		find_bad(e, p, side, first + c.bad[side]);
		finish(e, &e->probes, -EDOM);
		return;
	}
	p->side = SIDE_BASELINE;
	p->chunk = 0;
	p->n_run = end;
	p->n_scored = end > p->n_scored ? end : p->n_scored;
	if (p->n_run == p->n - 1)
		finish(e, &e->probes, 0);
}

static void
after_time(struct engine *e, struct probe *p, bool timing, double ms)
{
	int side = p->side;

	p->half = !p->half;
	/* A round begins with the side that ended the one before: what drifts hits both alike. */
	if (p->half)
		p->side = !side;
	if (!timing) {
		if (!p->half)
			p->n_run += p->chunk, p->chunk = 0;
		return;
	}
	p->us[side][p->rounds_run] = (float)(ms * 1e3);
	p->seconds -= ms / 1e3;
	if (p->half)
		return;
	if (++p->rounds_run == p->rounds || p->seconds <= 0 ||
	    (e->n_running > 0 && !p->exclusive && p->rounds_run >= BUSY_ROUNDS))
		finish(e, &e->probes, 0);
}

void
probe_after(struct engine *e, uint32_t n, uint32_t n_live, const float *logits, double ms)
{
	struct probe *p = e->probes;

	p->under_way = false;
	if (n_live == 0) {
		p->side_us[p->side] += ms * 1e3;
		p->side_rows[p->side] += n;
	}
	if (p->kind == PROBE_SCORE)
		after_score(e, p, logits, n_live, ms);
	else
		after_time(e, p, is_timing(p), ms);
}

void
probe_note_live(struct engine *e, double ms)
{
	e->live_ms = e->live_ms == 0 ? ms : 0.9 * e->live_ms + 0.1 * ms;
}
