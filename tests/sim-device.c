/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A plugin as kernels/device.h wants it, for tests of what the engine does with
 * one: sim-device.h says what it computes. Steps run in their order, at once or
 * as late as wait() allows, by a coin. What a caller may not do is an abort:
 * more steps than may be under way, a page that is not its position's, a table
 * that changed where it said it had not.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels/device.h"
#include "tests/sim-device.h"

#define TABLES 512u
#define PLACE 32u /* positions of a page */

struct entry {
	uint64_t state, before;
	uint32_t pos, token;
};

struct row {
	struct kd_row r;
	struct kd_block *table; /* a copy */
	uint32_t want;
};

struct step {
	struct row *row;
	struct kd_want *want;   /* with copies of the edits */
	uint32_t n, n_wanted;
	float *logits;
	struct kd_result *result;
	struct kd_evidence *site; /* NULL: no sample */
	bool copies;            /* logits */
};

struct kd_device {
	struct kd_model m;
	struct entry *page;     /* [n_pages][PLACE] */
	struct step step[KD_AHEAD];
	uint64_t n_submitted, n_run, n_waited;
	uint32_t *drawn;        /* [max_rows] by the step that ran last */
	struct table {
		uint64_t id;
		struct kd_block *block;
		uint32_t n;     /* blocks */
	} table[TABLES];
	uint32_t next_table, coin;
	uint64_t fails_at;      /* this wait */
	uint64_t behind, drawn_rows; /* steps that were submitted while one was under way; rows of a drawn token */
};

static void
die(const char *what)
{
	fprintf(stderr, "sim-device: %s\n", what);
	abort();
}

static uint32_t
toss(struct kd_device *d)
{
	d->coin ^= d->coin << 13, d->coin ^= d->coin >> 17, d->coin ^= d->coin << 5;
	return d->coin & 1;
}

static void *
copy(const void *from, size_t bytes)
{
	void *to = malloc(bytes > 0 ? bytes : 1);

	if (to == NULL)
		die("out of memory");
	return bytes > 0 ? memcpy(to, from, bytes) : to;
}

/* ---- running ---- */

static struct entry *
entry_at(struct kd_device *d, const struct row *r, uint32_t layer, uint32_t pos, bool v)
{
	const struct kd_block *b = &r->table[(size_t)(pos / PLACE) * d->m.n_layers + layer];
	uint32_t page = b->fp8 >> pos % PLACE & 1 ? b->q : v ? b->v : b->k;

	if (page >= d->m.n_pages)
		die("a position has no page");
	return &d->page[(size_t)page * PLACE + pos % PLACE];
}

/* All that attention would read: each position made of the one before it. */
static uint64_t
state_before(struct kd_device *d, const struct row *r)
{
	uint32_t first = d->m.window != 0 && r->r.pos >= d->m.window ? r->r.pos + 1 - d->m.window : 0;
	const struct entry *e, *last = NULL;

	for (uint32_t pos = first; pos < r->r.pos; pos++, last = e) {
		e = entry_at(d, r, 0, pos, false);
		if (e->pos != pos || (last != NULL && e->before != last->state) || (pos == 0 && e->before != 0))
			die("a page that is read has another's positions");
		for (uint32_t l = 0; l < d->m.n_layers; l++)
			if (memcmp(entry_at(d, r, l, pos, false), e, sizeof(*e)) != 0 || memcmp(entry_at(d, r, l, pos, true), e, sizeof(*e)) != 0)
				die("layers do not agree");
	}
	return last == NULL ? 0 : last->state;
}

static uint64_t
edits_of(const struct row *r, const struct kd_want *w)
{
	bool count = r->r.drawn && (w->repetition != 1 || w->presence != 0 || w->frequency != 0);
	uint64_t sum = 0;

	for (uint32_t i = 0; i < w->n_edit; i++) {
		bool same = count && w->edit[i].id == r->r.token;

		sum += sim_edit(w->edit[i].id, w->edit[i].n_output + same, w->edit[i].seen || same, w->edit[i].bias);
		count = count && !same;
	}
	return sum + (count ? sim_edit(r->r.token, 1, true, 0) : 0);
}

static struct kd_result
result_of(const struct kd_device *d, const struct row *r, const struct kd_want *w, uint64_t state)
{
	struct kd_result out = {.token = w->token, .logprob = sim_score(state, w->token)};
	struct sim_drawn drawn;

	for (uint32_t i = 0; i < w->n_top; i++)
		out.top_id[i] = i, out.n_top = i + 1;
	if (w->kind == KD_SCORE)
		return out;
	if (w->seed == SIM_BAD_SEED && w->position == SIM_BAD_POSITION)
		return (struct kd_result){.bad = true};
	drawn = sim_draw(state, w->seed, w->position, edits_of(r, w), d->m.vocab);
	out.token = drawn.token, out.logprob = drawn.logprob;
	return out;
}

static void
run(struct kd_device *d)
{
	struct step *s = &d->step[d->n_run++ % KD_AHEAD];
	uint32_t *drew = calloc(d->m.max_rows, sizeof(*drew));

	for (uint32_t i = 0; i < s->n; i++) {
		struct row *r = &s->row[i];
		struct entry e = {.pos = r->r.pos};

		if (r->r.drawn)
			r->r.token = d->drawn[r->r.token];
		if (r->r.token >= d->m.vocab)
			die("a token that there is not");
		e.token = r->r.token, e.before = state_before(d, r), e.state = sim_state(e.before, e.token, r->r.digest);
		for (uint32_t l = 0; l < d->m.n_layers; l++)
			*entry_at(d, r, l, e.pos, false) = *entry_at(d, r, l, e.pos, true) = e;
		if (!r->r.wants)
			continue;
		if (s->want[r->want].kind == KD_LOGITS) {
			for (uint32_t v = 0; v < d->m.vocab; v++)
				s->logits[(size_t)r->want * d->m.vocab + v] = sim_logit(e.state, v);
			continue;
		}
		s->result[r->want] = result_of(d, r, &s->want[r->want], e.state);
		drew[r->want] = s->result[r->want].token;
	}
	for (uint32_t i = 0; s->site != NULL && i < KD_GROUPS * d->m.n_layers; i++) {
		uint32_t g = i / d->m.n_layers, l = i % d->m.n_layers;
		bool ran = g != KD_LM_HEAD || (l == 0 && s->n_wanted > 0);

		s->site[i] = ran ? (struct kd_evidence){(float)(100 * g + l + 1), SIM_SEEN, sim_zeros(g, l), sim_saturated(g, l)} : (struct kd_evidence){0};
	}
	free(d->drawn);
	d->drawn = drew;
	for (uint32_t i = 0; i < s->n; i++)
		free(s->row[i].table);
	for (uint32_t i = 0; i < s->n_wanted; i++)
		free((void *)(uintptr_t)s->want[i].edit);
	free(s->row), free(s->want);
}

static void
run_all(struct kd_device *d)
{
	while (d->n_run < d->n_submitted)
		run(d);
}

/* ---- the table of calls ---- */

static struct table *
table_of(struct kd_device *d, uint64_t id)
{
	struct table *t;

	for (uint32_t i = 0; i < TABLES; i++)
		if (d->table[i].id == id)
			return &d->table[i];
	t = &d->table[d->next_table++ % TABLES];
	free(t->block);
	*t = (struct table){.id = id};
	return t;
}

/* While a table has its number, blocks before the last one that was shown stay as they were. */
static void
check_table(struct kd_device *d, const struct kd_row *r)
{
	uint32_t blocks = r->pos / PLACE + 1, first = d->m.window != 0 && r->pos >= d->m.window ? (r->pos + 1 - d->m.window) / PLACE : 0;
	size_t layers = d->m.n_layers;
	struct table *t = table_of(d, r->table_id);

	for (size_t i = first * layers; t->n > 0 && i < (t->n - 1) * layers; i++)
		if (memcmp(&t->block[i], &r->table[i], sizeof(*t->block)) != 0)
			die("a table changed where it was full");
	free(t->block);
	t->block = copy(r->table, blocks * layers * sizeof(*t->block));
	t->n = blocks;
}

static int
sim_submit(struct kd_device *d, const struct kd_row *row, uint32_t n, const struct kd_want *want, float *logits,
    struct kd_result *result, const struct kd_sample *sample, char *why, size_t why_len)
{
	struct step *s = &d->step[d->n_submitted % KD_AHEAD];
	bool copies = false;
	uint32_t w = 0;

	(void)why, (void)why_len;
	if (d->n_submitted - d->n_waited == KD_AHEAD)
		die("more steps than may be under way");
	if (n == 0 || n > d->m.max_rows)
		die("no rows, or too many");
	d->behind += d->n_submitted > d->n_waited;
	for (uint32_t i = 0, of = 0; i < n; of += row[i++].wants) {
		if (!row[i].wants || want[of].kind != KD_LOGITS)
			continue;
		if (d->n_submitted > d->n_waited && d->step[(d->n_submitted - 1) % KD_AHEAD].copies)
			die("logits of two steps at a time, of which the engine has room for one's");
		copies = true;
		memset(logits + (size_t)of * d->m.vocab, 0xee, d->m.vocab * sizeof(*logits));
	}
	if (sample != NULL && sample->row >= n)
		die("a sample of a row that there is not");
	*s = (struct step){.row = calloc(n, sizeof(*s->row)), .n = n, .logits = logits, .result = result,
	    .site = sample != NULL ? sample->site : NULL, .copies = copies};
	for (uint32_t i = 0; i < n; i++) {
		size_t blocks = row[i].pos / PLACE + 1;

		check_table(d, &row[i]);
		d->drawn_rows += row[i].drawn;
		s->row[i] = (struct row){row[i], copy(row[i].table, blocks * d->m.n_layers * sizeof(struct kd_block)), w};
		w += row[i].wants;
	}
	s->n_wanted = w;
	s->want = copy(want, w * sizeof(*want));
	for (uint32_t i = 0; i < w; i++)
		s->want[i].edit = copy(want[i].edit, want[i].n_edit * sizeof(*want[i].edit));
	memset(result, 0xee, w * sizeof(*result)); /* nobody may look before wait() */
	if (s->site != NULL)
		memset(s->site, 0xee, KD_GROUPS * (size_t)d->m.n_layers * sizeof(*s->site));
	d->n_submitted++;
	if (toss(d))
		run_all(d);
	return 0;
}

static int
sim_wait(struct kd_device *d, char *why, size_t why_len)
{
	if (d->n_waited == d->n_submitted)
		return 0;
	if (d->n_waited == d->fails_at) {
		run_all(d);
		d->n_waited = d->n_submitted;
		return snprintf(why, why_len, "as it was told"), -EIO;
	}
	while (d->n_run <= d->n_waited)
		run(d);
	d->n_waited++;
	if (toss(d))
		run_all(d);
	return 0;
}

static int
sim_find_nonfinite(struct kd_device *d, const struct kd_row *row, uint32_t *group, uint32_t *layer)
{
	struct row r = {*row, copy(row->table, (row->pos / PLACE + 1) * (size_t)d->m.n_layers * sizeof(struct kd_block)), 0};

	run_all(d);
	state_before(d, &r);
	free(r.table);
	*group = 5, *layer = 1;
	return 1;
}

static int
sim_open(struct kd_device **out, uint32_t index, char *why, size_t why_len)
{
	(void)why, (void)why_len;
	*out = calloc(1, sizeof(**out));
	if (*out == NULL)
		return -ENOMEM;
	(*out)->coin = index % SIM_FAILS + 1;
	(*out)->fails_at = index >= SIM_FAILS ? 20 : UINT64_MAX;
	return 0;
}

static void
sim_close(struct kd_device **dp)
{
	struct kd_device *d = *dp;

	if (d->n_waited < d->n_submitted)
		die("closed with a step under way");
	for (uint32_t i = 0; i < TABLES; i++)
		free(d->table[i].block);
	free(d->drawn), free(d->page), free(d);
	*dp = NULL;
}

static int
sim_load(struct kd_device *d, const struct kd_model *m, char *why, size_t why_len)
{
	(void)why, (void)why_len;
	d->m = *m;
	d->page = calloc((size_t)m->n_pages * PLACE, sizeof(*d->page));
	return d->page != NULL ? 0 : -ENOMEM;
}

static bool sim_has_fp8(const struct kd_device *d) { return d != NULL; }

static void
sim_plan_memory(struct kd_device *d, const struct kd_model *m, struct kd_memory *out)
{
	(void)d, (void)m;
	memset(out, 0, sizeof(*out));
}

static enum k_format
sim_executes(const struct kd_device *d, uint32_t group, uint32_t layer, enum k_format f)
{
	(void)d, (void)group, (void)layer;
	return f;
}

static void
sim_kernel_name(const struct kd_device *d, uint32_t group, uint32_t layer, enum k_format f, char *out, size_t len)
{
	(void)d, (void)group, (void)layer, (void)f;
	snprintf(out, len, "none");
}

/* graphs: steps submitted while one was under way; graph_launches: rows of a drawn token; eager_steps: all. */
static void
sim_status(struct kd_device *d, struct kd_status *out)
{
	out->graphs = d->behind, out->graph_launches = d->drawn_rows, out->eager_steps = d->n_submitted;
}

static const struct kd_api api = {KD_ABI, sizeof(struct kd_api), "sim", sim_open, sim_close, sim_has_fp8, sim_plan_memory, sim_load,
    sim_submit, sim_wait, sim_find_nonfinite, sim_executes, sim_kernel_name, sim_status};

extern const struct kd_api *const octet_device_api;
const struct kd_api *const octet_device_api = &api;
