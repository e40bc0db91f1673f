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

static void
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
}

static void
draw_head(const struct ui *ui, const struct pane *p)
{
	const struct octet_page *d = &ui->data.page;
	int64_t up = d->updated_us > d->started_us ? (d->updated_us - d->started_us) / 1000000 : 0;
	char a[NUMBER_TEXT];
	int x;

	x = put(p, 0, 0, STYLE_TITLE, "octet %s", d->octet_version);
	x = put(p, 0, x, STYLE_TEXT, "  %.*s  %s/%s", p->width > 100 ? 60 : 20, d->model, d->backend, d->cpu_level);
	if (x < p->width - 30)
		put(p, 0, x, STYLE_DIM, "  up %" PRId64 ":%02d:%02d", up / 3600, (int)(up / 60 % 60), (int)(up % 60));
	draw_badges(ui, p);
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
	for (; x < p->width; x++)
		put(p, 2, x, STYLE_TAB, " ");
	if (*ui->data.page.rollout != '\0' && p->width > 104) {
		char text[100];

		snprintf(text, sizeof(text), "rollout of %.30s, %g %%", ui->data.page.rollout, ui->data.page.rollout_percent);
		put(p, 2, p->width - 1 - (int)strlen(text), STYLE_TAB, "%s", text);
	}
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

static void
draw_keys(const struct ui *ui, const struct pane *p, int y)
{
	static const struct {
		int code;
		const char *word;
		bool wide; /* only where there is room */
	} shown[] = {
		{' ', "flip", false}, {'d', "show", false}, {'s', "select", true}, {'f', "fold", true}, {'z', "zoom", false},
		{'o', "sort", false}, {'w', "warnings", false}, {K_ENTER, "return", false}, {'u', "undo", false}, {'r', "roll back", false},
		{':', "command", false}, {'/', "search", false}, {'t', "theme", true}, {'p', "pause", true}, {'?', "help", false},
		{'q', "quit", false},
	};
	const struct key *was = NULL;
	int x = 0;

	for (size_t i = 0; i < sizeof(shown) / sizeof(*shown); i++) {
		const struct key *k = ui_find_key(ui, shown[i].code);

		if (k == NULL || k == was || (shown[i].wide && p->width < 110) ||
		    (shown[i].code == K_ENTER && ui_view(ui)->count == NULL))
			continue;
		was = shown[i].code == K_ENTER ? k : was;
		x = put(p, y, x, STYLE_KEY, "%.*s", (int)strcspn(k->name, ","), k->name);
		x = put(p, y, x, STYLE_DIM, " %s  ", shown[i].word);
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
	else if (ui->mode == MODE_ASK)
		ask_draw(ui, &body);
	else if (ui->mode == MODE_PAGER)
		pager_draw(ui, &body);
	if (ui->batch)
		return;
	draw_message(ui, &p, p.height - 2);
	if (ui->mode == MODE_PROMPT) {
		body = pane_part(&p, p.height - 2, 0, 1, p.width);
		if (*ui->prompt.hint != '\0')
			pane_clear(&body);
		prompt_draw(ui, &p, p.height - 1);
	} else
		draw_keys(ui, &p, p.height - 1);
}
