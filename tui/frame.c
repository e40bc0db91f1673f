/* SPDX-License-Identifier: Apache-2.0 */
/* What stands around the views: head, tabs, the last two lines, help. */
#include <inttypes.h>
#include <string.h>

#include "tui/ui.h"

#define MIN_WIDTH 64
#define MIN_HEIGHT 14
#define HEAD 3
#define FOOT 2

/* ---- head ---- */

/* The column they begin at. */
static int
draw_badges(const struct ui *ui, const struct pane *p)
{
	const struct octet_page *d = &ui->data.page;
	char wait[32], now[NUMBER_TEXT];
	const struct {
		bool on;
		enum style style;
		const char *word;
	} badge[] = {
		{ui->data.link == LINK_DOWN, STYLE_BAD, "DISCONNECTED"}, {ui->data.link == LINK_STALE, STYLE_BAD, "STANDS STILL"},
		{!ui->live, STYLE_WARN, "REPLAY"}, {ui->live && ui->read_only, STYLE_WARN, "READ ONLY"}, {ui->paused, STYLE_WARN, "PAUSED"},
		{d->draining != 0, STYLE_WARN, "DRAINING"}, {d->unjournaled > 0, STYLE_BAD, "UNJOURNALED"},
		{d->unconfirmed_epoch != 0, STYLE_WARN, wait}, {ui->pager.running && ui->mode != MODE_PAGER, STYLE_WARN, "COMMAND RUNS"},
	};
	int x = p->width - 13;

	snprintf(wait, sizeof(wait), "UNCONFIRMED %u s", d->unconfirmed_s);
	put(p, 0, x, STYLE_DIM, " %s UTC", text_time(d->updated_us, now));
	for (size_t i = 0; i < sizeof(badge) / sizeof(*badge); i++) {
		if (!badge[i].on)
			continue;
		x -= (int)strlen(badge[i].word) + 3;
		put(p, 0, x, badge[i].style, " [%s]", badge[i].word);
	}
	return x;
}

static void
draw_head(const struct ui *ui, const struct pane *p)
{
	const struct octet_page *d = &ui->data.page;
	int64_t up = d->updated_us > d->started_us ? (d->updated_us - d->started_us) / 1000000 : 0;
	char a[NUMBER_TEXT], kind[48], age[NUMBER_TEXT];
	int x, end = draw_badges(ui, p);
	struct pane left = pane_part(p, 0, 0, 1, end);

	/* Whole words, as many as the badges leave room for. */
	snprintf(kind, sizeof(kind), "  %s/%s", d->backend, d->cpu_level);
	snprintf(age, sizeof(age), "  up %" PRId64 ":%02d:%02d", up / 3600, (int)(up / 60 % 60), (int)(up % 60));
	x = put(&left, 0, 0, STYLE_TITLE, "octet %s", d->octet_version);
	x = put(&left, 0, x, STYLE_TEXT, "  %.*s", p->width > 100 ? 60 : 20, d->model);
	if (x + (int)strlen(kind) <= end)
		x = put(&left, 0, x, STYLE_TEXT, "%s", kind);
	if (x + (int)strlen(age) <= end)
		put(&left, 0, x, STYLE_DIM, "%s", age);
	x = put(p, 1, 0, STYLE_TEXT, "policy ");
	x = put(p, 1, x, STYLE_TITLE, "%.*s", p->width > 100 ? 63 : 20, d->policy);
	x = put(p, 1, x, STYLE_TEXT, "  epoch ");
	x = put(p, 1, x, STYLE_TITLE, "%" PRIu64, d->epoch);
	x = put(p, 1, x, STYLE_TEXT, "  ");
	x = put(p, 1, x, STYLE_TITLE, "%s", text_number(d->tokens_per_s, a));
	x = put(p, 1, x, STYLE_TEXT, " tok/s  step %s  run %u", text_ms(d->step_ms_p50, a), d->running);
	x = put(p, 1, x, d->queued > 0 ? STYLE_WARN : STYLE_TEXT, " wait %u", d->queued);
	if (x + 10 <= p->width)
		put(p, 1, x, STYLE_TEXT, "  KV %.0f %%", d->kv_pages > 0 ? 100.0 * d->kv_pages_used / d->kv_pages : 0);
}

/* What runs beside the active plan, whichever view is shown. */
static void
draw_trials(const struct octet_page *d, const struct pane *p, int from)
{
	char text[100] = "";
	bool wide = p->width > 104, surge = strcmp(d->surge_state, "on") == 0;

	if (*d->rollout != '\0')
		snprintf(text, sizeof(text), wide ? "rollout of %.30s, %g %%%s" : "%.0srollout %g %%%s", d->rollout, d->rollout_percent,
		    surge && wide ? ", surge" : "");
	else if (surge)
		snprintf(text, sizeof(text), "surge");
	if (from + 1 + (int)strlen(text) >= p->width)
		text[strcspn(text, " ")] = '\0';
	if (from + 1 + (int)strlen(text) < p->width)
		put(p, 2, p->width - 1 - (int)strlen(text), surge ? STYLE_WARN : STYLE_TAB, "%s", text);
}

/* The one that is shown stands in brackets: it reads without colour. */
static void
draw_tabs(const struct ui *ui, const struct pane *p)
{
	int x = 0;

	for (int i = 0; views[i] != NULL; i++) {
		bool on = i == ui->view;
		int from = x;

		x = put(p, 2, x, on ? STYLE_TAB_ON : STYLE_TAB, on ? "[%d %s]" : " %d %s ", i + 1, views[i]->title);
		hit(p, 2, from, x - from, HIT_TAB, (uint32_t)i, 0);
	}
	for (int rest = x; rest < p->width; rest++)
		put(p, 2, rest, STYLE_TAB, " ");
	draw_trials(&ui->data.page, p, x);
}

/* ---- the last two lines ---- */

static void
draw_message(const struct ui *ui, const struct pane *p, int y)
{
	const struct octet_page *d = &ui->data.page;

	if (*ui->message != '\0')
		put(p, y, 0, ui->message_bad ? STYLE_BAD : STYLE_GOOD, "%s", ui->message);
	else if (ui->pending_ms > 300)
		put(p, y, 0, STYLE_WARN, "waiting for the daemon's answer, %d s", ui->pending_ms / 1000);
	else if (ui->data.link == LINK_DOWN || ui->data.link == LINK_STALE)
		put(p, y, 0, STYLE_BAD, "%s", ui->data.link_why);
	else if (d->unconfirmed_epoch != 0)
		put(p, y, 0, STYLE_WARN, "epoch %" PRIu64 " is taken back in %u s unless it is kept: K keeps it", d->unconfirmed_epoch, d->unconfirmed_s);
	else if (d->unjournaled > 0)
		put(p, y, 0, STYLE_BAD, "%u changes are not in the journal yet", d->unjournaled);
	else if (ui->data.link == LINK_REPLAY && *ui->data.link_why != '\0')
		put(p, y, 0, STYLE_DIM, "%s", ui->data.link_why);
}

/* Those with a word, and a whole one only; "+word" only where there is room for all. */
static int
draw_key_words(const struct ui *ui, const struct pane *p, int y, int x, const struct key *k)
{
	for (; k != NULL && k->name != NULL; k++) {
		const char *word = k->word;
		int n = (int)strcspn(k->name, ",");

		if (word == NULL || (*word == '+' && p->width < 110) ||
		    (ui->mode == MODE_VIEW && k->code[0] != 0 && ui_find_key(ui, k->code[0]) != k))
			continue;
		word += *word == '+';
		if (x + n + 1 + (int)strlen(word) > p->width)
			continue;
		x = put(p, y, x, STYLE_KEY, "%.*s", n, k->name);
		x = put(p, y, x, STYLE_DIM, " %s  ", word);
	}
	return x;
}

static void
draw_keys(const struct ui *ui, const struct pane *p, int y)
{
	int x = 0;

	switch (ui->mode) {
	case MODE_VIEW:
		x = draw_key_words(ui, p, y, x, ui_view(ui)->keys);
		draw_key_words(ui, p, y, x, view_keys);
		break;
	case MODE_ASK: draw_key_words(ui, p, y, x, ask_keys); break;
	case MODE_PAGER: draw_key_words(ui, p, y, x, pager_keys); break;
	case MODE_HELP: draw_key_words(ui, p, y, x, help_keys); break;
	case MODE_PROMPT: break;
	}
}

/* ---- help ---- */

static int
draw_table(const struct pane *p, int y, int top, const char *title, const struct key *k)
{
	if (k == NULL)
		return y;
	if (y >= top)
		put(p, y - top, 0, STYLE_TITLE, "%s", title);
	y++;
	for (; k->name != NULL; k++, y++) {
		if (y < top)
			continue;
		put(p, y - top, 1, STYLE_KEY, "%s", k->name);
		put(p, y - top, 19, STYLE_TEXT, "%s", k->help);
	}
	return y + 1;
}

static void
draw_help(struct ui *ui, const struct pane *p)
{
	const struct view *v = ui_view(ui);
	struct pane in = pane_box(p, p->height, p->width < 104 ? p->width : 100, "Keys: up and down scroll, q closes");
	int y = 0, top = ui->help_top;
	char title[120];

	snprintf(title, sizeof(title), "%s: %s", v->title, v->about);
	y = draw_table(&in, y, top, title, v->keys != NULL ? v->keys : list_keys);
	if (v->count != NULL && v->keys != NULL)
		y = draw_table(&in, y, top, "In lists", list_keys);
	y = draw_table(&in, y, top, "In all views", view_keys);
	y = draw_table(&in, y, top, "When it asks", ask_keys);
	y = draw_table(&in, y, top, "When it takes a line", prompt_keys);
	y = draw_table(&in, y, top, "When it shows what a command says", pager_keys);
	ui->help_lines = y - 1, ui->help_height = in.height;
	list_scrollbar(&in, 0, in.width - 1, in.height, top, y - 1);
}

/* ---- all of it ---- */

static void
draw_small(const struct pane *p)
{
	put(p, 0, 0, STYLE_BAD, "too small: %dx%d", p->width, p->height);
	put(p, 1, 0, STYLE_TEXT, "needs %dx%d", MIN_WIDTH, MIN_HEIGHT);
}

int
ui_batch_height(const struct ui *ui, int width)
{
	const struct view *v = ui_view(ui);
	int n = v->batch_height != NULL ? v->batch_height(ui, width) : 19;

	return HEAD + (n < 11 ? 11 : n);
}

void
ui_draw(struct ui *ui, struct canvas *c)
{
	struct pane p = pane_all(c), body;

	ui->drawn = c;
	if (p.width < MIN_WIDTH || p.height < MIN_HEIGHT) {
		draw_small(&p);
		return;
	}
	draw_head(ui, &p);
	draw_tabs(ui, &p);
	body = pane_part(&p, HEAD, 0, p.height - HEAD - (ui->batch ? 0 : FOOT), p.width);
	if (ui->data.have)
		ui_view(ui)->draw(ui, &body);
	if (ui->mode == MODE_HELP)
		draw_help(ui, &body);
	else if (ui->mode == MODE_ASK) {
		/* Over the head where it needs that much. */
		body = pane_part(&p, 0, 0, p.height - FOOT, p.width);
		ask_draw(ui, &body);
	} else if (ui->mode == MODE_PAGER)
		pager_draw(ui, &body);
	if (ui->batch)
		return;
	draw_message(ui, &p, p.height - 2);
	body = pane_part(&p, HEAD, 0, p.height - HEAD - 1, p.width);
	prompt_draw_hint(ui, &body);
	if (ui->mode == MODE_PROMPT)
		prompt_draw(ui, &p, p.height - 1);
	else
		draw_keys(ui, &p, p.height - 1);
}
