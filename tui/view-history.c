/* SPDX-License-Identifier: Apache-2.0 */
/* History: every change with who made it, and what it did as far as this console saw it. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tui/ui.h"

#define KEPT 1000u
#define FOOT 7

/* ---- what is kept ---- */

static bool
same(const struct page_history *a, const struct page_history *b)
{
	return a->epoch == b->epoch && strcmp(a->result, b->result) == 0;
}

/* The page's, and of what was known what is older. */
void
history_take(struct ui *ui)
{
	const struct octet_page *p = &ui->data.page;
	uint64_t oldest = p->n_history > 0 ? p->history[p->n_history - 1].epoch : 0;
	struct page_history *all;
	uint32_t n = 0;

	if (p->n_history == ui->n_history && p->n_history > 0 && same(&p->history[0], &ui->history[0]))
		return;
	all = calloc(KEPT, sizeof(*all));
	if (all == NULL)
		return;
	for (uint32_t i = 0; i < p->n_history; i++)
		all[n++] = p->history[i];
	for (uint32_t i = 0; i < ui->n_history && n < KEPT; i++)
		if (ui->history[i].epoch < oldest)
			all[n++] = ui->history[i];
	free(ui->history);
	ui->history = all, ui->n_history = n;
}

static int64_t
time_us(const char *text)
{
	struct tm tm = {0};

	return strptime(text, "%Y-%m-%dT%H:%M:%S", &tm) != NULL ? (int64_t)timegm(&tm) * 1000000 : 0;
}

static const char *
text_of(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));

	return s != NULL ? s : "";
}

#define COPY(to, from) snprintf((to), sizeof(to), "%.*s", (int)sizeof(to) - 1, (from))

static void
take_json(struct page_history *h, const json_t *o)
{
	*h = (struct page_history){.epoch = (uint64_t)json_integer_value(json_object_get(o, "epoch")),
	    .step = (uint64_t)json_integer_value(json_object_get(o, "step")), .time_us = time_us(text_of(o, "time")),
	    .uid = (uint32_t)json_integer_value(json_object_get(o, "uid")), .pid = (uint32_t)json_integer_value(json_object_get(o, "pid"))};
	COPY(h->program, text_of(o, "program"));
	COPY(h->why, text_of(o, "why"));
	COPY(h->change, text_of(o, "change"));
	COPY(h->result, text_of(o, "result"));
	COPY(h->policy, text_of(o, "policy"));
}

void
history_reply(struct ui *ui, const json_t *reply)
{
	const json_t *list = json_object_get(reply, "history");
	struct page_history *all = calloc(KEPT, sizeof(*all));
	uint32_t n = 0;

	if (all == NULL)
		return;
	for (size_t i = json_array_size(list); i-- > 0 && n < KEPT;)
		take_json(&all[n++], json_array_get(list, i));
	free(ui->history);
	ui->history = all, ui->n_history = n;
	ui->history_whole = true;
	history_take(ui);
}

const struct page_history *
history_of(const struct ui *ui, uint64_t epoch)
{
	for (uint32_t i = 0; i < ui->n_history; i++)
		if (ui->history[i].epoch == epoch)
			return &ui->history[i];
	return NULL;
}

static unsigned
opened(struct ui *ui)
{
	/* The page has the newest; once, and only if there are more, the daemon is asked. */
	if (!ui->live || ui->history_whole || ui->data.page.n_history < PAGE_HISTORY || ui->pending_ms >= 0 ||
	    ui->data.link != LINK_UP)
		return REACT_DRAW;
	json_decref(ui->request);
	ui->request = json_pack("{s:s,s:i}", "verb", "history", "limit", (int)KEPT), ui->request_then = THEN_HISTORY;
	return ui->request != NULL ? REACT_REQUEST | REACT_DRAW : REACT_DRAW;
}

/* ---- drawing ---- */

static int
count(const struct ui *ui)
{
	return (int)ui->n_history;
}

static void
row_text(const struct ui *ui, int row, char *buf, size_t len)
{
	const struct page_history *h = &ui->history[row];

	snprintf(buf, len, "%" PRIu64 " %s %u %s %s %s %s", h->epoch, h->program, h->uid, h->why, h->result, h->change, h->policy);
}

static bool
is_good(const struct page_history *h)
{
	return strcmp(h->result, "applied") == 0;
}

/* When the next one that changed something was, going by step; 0: there is none. */
static int64_t
neighbour_us(const struct ui *ui, int row, int step)
{
	for (row += step; row >= 0 && row < (int)ui->n_history; row += step)
		if (is_good(&ui->history[row]))
			return ui->history[row].time_us;
	return 0;
}

static void
effect_of(const struct ui *ui, int row, enum series s, double *before, double *after)
{
	data_effect(&ui->data, neighbour_us(ui, row, 1), ui->history[row].time_us, neighbour_us(ui, row, -1), s, before, after);
}

enum style
gain_style(double percent)
{
	return percent < -5 ? STYLE_BAD : percent > 5 ? STYLE_GOOD : STYLE_DIM;
}

static bool
is_rollout(const struct page_history *h)
{
	return strncmp(h->why, "rollout", 7) == 0;
}

/* What it changed: formats, or the terms of a candidate. */
void
history_words(const struct page_history *h, char *buf, size_t len)
{
	if (is_rollout(h))
		snprintf(buf, len, "%s: %s", h->policy, h->change);
	else
		snprintf(buf, len, "%s", *h->change != '\0' ? h->change : h->policy);
}

double
history_gain(const struct ui *ui, int row)
{
	double before, after;

	effect_of(ui, row, SERIES_OUTPUT, &before, &after);
	return before > 0 && isfinite(after) ? round(fmin(100 * (after - before) / before, 9999)) + 0.0 : NAN; /* no "-0" */
}

/* "rollback: what the operator said": the verb in its column, the words at the end. */
static void
draw_row(struct ui *ui, const struct pane *p, int y, int row)
{
	const struct page_history *h = &ui->history[row];
	const char *words = strstr(h->why, ": ");
	int verb = words != NULL ? (int)(words - h->why) : (int)strlen(h->why), x;
	double gain = history_gain(ui, row);
	char when[NUMBER_TEXT], what[320];

	history_words(h, what, sizeof(what));
	put_glyph(p, y, 0, h->epoch == ui->data.page.epoch ? STYLE_GOOD : STYLE_DIM, h->epoch == ui->data.page.epoch ? GLYPH_DOT : GLYPH_VLINE);
	x = put(p, y, 2, is_good(h) ? STYLE_TEXT : STYLE_BAD, "%5" PRIu64 " %s %-13.13s %-9.*s ", h->epoch,
	    text_date(h->time_us, when) + (p->width > 100 ? 0 : 5), h->program, verb < 9 ? verb : 9, h->why);
	if (isfinite(gain))
		put(p, y, x, gain_style(gain), "%+5.0f %%", gain);
	if (is_good(h))
		x = put(p, y, x + 8, STYLE_TEXT, "%s", what);
	else
		x = put(p, y, x + 8, STYLE_BAD, "%s%s%s", h->result, *h->change != '\0' ? ": " : "", h->change);
	if (words != NULL)
		put(p, y, x, STYLE_DIM, "  (%s)", words + 2);
}

static void
draw_effect(struct ui *ui, const struct pane *p, int y, int x, int row, enum series s, const char *what, const char *unit)
{
	double before, after;
	char a[NUMBER_TEXT], b[NUMBER_TEXT];

	effect_of(ui, row, s, &before, &after);
	if (isnan(before) || isnan(after))
		put(p, y, x, STYLE_DIM, "%s: not seen", what);
	else
		put(p, y, x, STYLE_TEXT, "%s %s -> %s%s", what, text_number(before, a), text_number(after, b), unit);
}

/* What was measured of the policy it made active. */
static void
draw_measured(struct ui *ui, const struct pane *p, int y, const struct page_history *h)
{
	const struct octet_page *d = &ui->data.page;
	char kl[NUMBER_TEXT];

	for (uint32_t i = 0; i < d->n_evals; i++) {
		const struct page_eval *e = &d->eval[i];

		if (strcmp(e->candidate, h->policy) != 0)
			continue;
		put(p, y, 1, STYLE_TEXT, "eval %" PRIu64 " of %s against %s: KL %s, top-1 %.2f %%", e->id, e->candidate, e->baseline,
		    text_kl(e->kl_mean, kl), 100 * e->top1);
		return;
	}
	put(p, y, 1, STYLE_DIM, "no eval of policy '%s'", h->policy);
}

static void
draw_foot(struct ui *ui, const struct pane *p, int row)
{
	const struct page_history *h = &ui->history[row];
	struct pane change = pane_part(p, 2, 0, 2, p->width);
	char title[80], when[NUMBER_TEXT], what[320];

	snprintf(title, sizeof(title), "Epoch %" PRIu64, h->epoch);
	put_line(p, 0, title);
	put(p, 1, 1, STYLE_TEXT, "%s UTC: %s; %s, from step %" PRIu64, text_date(h->time_us, when), h->why, h->result, h->step);
	history_words(h, what, sizeof(what));
	put_words(&change, 0, 1, STYLE_TITLE, *h->change != '\0' ? what : "no change of formats");
	draw_effect(ui, p, 4, 1, row, SERIES_OUTPUT, "tokens/s", "");
	draw_effect(ui, p, 4, p->width / 3, row, SERIES_STEP_P50, "step p50", " ms");
	draw_effect(ui, p, 4, 2 * p->width / 3, row, SERIES_TTFT_P50, "first token", " ms");
	put(p, 5, 1, STYLE_TEXT, "by %s, uid %u, pid %u; %s: %s", h->program, h->uid, h->pid,
	    is_rollout(h) ? "the candidate" : "the policy then", h->policy);
	draw_measured(ui, p, 6, h);
}

static void
draw(struct ui *ui, const struct pane *p)
{
	struct list *l = ui_list(ui);
	struct pane foot = pane_part(p, p->height - FOOT, 0, FOOT, p->width);

	list_fit(l, (int)ui->n_history, p->height - 1 - FOOT);
	put(p, 0, 2, STYLE_DIM, "%5s %-*s %-13s %-9s %-7s change", "epoch", p->width > 100 ? 16 : 11, "time UTC", "program", "why", "tok/s");
	for (int i = 0; i < l->height && l->top + i < (int)ui->n_history; i++) {
		draw_row(ui, p, 1 + i, l->top + i);
		if (l->top + i == l->at && !ui->batch)
			mark(p, 1 + i, 1, p->width - 1, MARK_CURSOR);
		hit(p, 1 + i, 0, p->width, HIT_ROW, (uint32_t)(l->top + i), 0);
	}
	list_scrollbar(p, 1, p->width - 1, l->height, l->top, (int)ui->n_history);
	if (ui->n_history > 0)
		draw_foot(ui, &foot, l->at);
}

static int
batch_height(const struct ui *ui, int width)
{
	(void)width;
	return (int)ui->n_history + 1 + FOOT;
}

static unsigned
act_return(struct ui *ui, int arg)
{
	(void)arg;
	return ui->n_history > 0 ? ask_rollback_to(ui, ui->history[ui_list(ui)->at].epoch) : REACT_NONE;
}

static const struct key keys[] = {
	{{K_ENTER, 'r'}, "enter, r", "return to this epoch: shows the difference to now, and asks", act_return, 0, "return"},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

const struct view view_history = {
	.name = "history", .title = "History", .about = "every change, who made it, what it did", .draw = draw, .keys = keys, .count = count,
	.row_text = row_text, .opened = opened, .batch_height = batch_height,
};
