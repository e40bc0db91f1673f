/* SPDX-License-Identifier: Apache-2.0 */
/* The views there are, the keys that all of them have, and which table a key goes to. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "tui/ui.h"

const struct view *const views[] = {
	&view_precision, &view_traffic, &view_clients, &view_quality, &view_history, &view_log, NULL,
};

static int
n_views(void)
{
	int n = 0;

	while (views[n] != NULL)
		n++;
	return n;
}

const struct view *
ui_view(const struct ui *ui)
{
	return views[ui->view];
}

struct list *
ui_list(struct ui *ui)
{
	return &ui->lists[ui->view];
}

int
ui_find_view(const char *name)
{
	for (int i = 0; views[i] != NULL; i++)
		if (strcasecmp(views[i]->name, name) == 0)
			return i;
	return -1;
}

const char *
ui_view_names(char *buf, size_t len)
{
	size_t n = 0;

	*buf = '\0';
	for (int i = 0; views[i] != NULL && n < len; i++)
		n += (size_t)snprintf(buf + n, len - n, "%s%s", i > 0 ? " " : "", views[i]->name);
	return buf;
}

unsigned
ui_open_view(struct ui *ui, int view)
{
	if (view < 0 || view >= n_views())
		return REACT_NONE;
	ui->view = view;
	ui->mode = MODE_VIEW;
	return REACT_DRAW | (views[view]->opened != NULL ? views[view]->opened(ui) : 0);
}

void
ui_say(struct ui *ui, bool bad, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(ui->message, sizeof(ui->message), fmt, ap);
	va_end(ap);
	ui->message_bad = bad;
}

bool
ui_may_change(struct ui *ui)
{
	if (!ui->live)
		ui_say(ui, true, "a replay changes nothing");
	else if (ui->read_only)
		ui_say(ui, true, "read only: %s", ui->read_only_why);
	else if (ui->data.link == LINK_DOWN)
		ui_say(ui, true, "not connected");
	else if (ui->paused)
		ui_say(ui, true, "paused: what you see may be over; p goes on");
	else
		return true;
	return false;
}

/* ---- what the keys of all views do ---- */

static unsigned
act_next_view(struct ui *ui, int arg)
{
	return ui_open_view(ui, (ui->view + arg + n_views()) % n_views());
}

static unsigned
act_mode(struct ui *ui, int arg)
{
	ui->mode = (enum mode)arg;
	ui->help_top = 0;
	return REACT_DRAW;
}

static unsigned
act_pause(struct ui *ui, int arg)
{
	(void)arg;
	ui->paused = !ui->paused;
	return REACT_DRAW;
}

static unsigned
act_step(struct ui *ui, int arg)
{
	(void)arg;
	if (ui->live) {
		ui_say(ui, true, "only a replay goes on step by step");
		return REACT_DRAW;
	}
	ui->paused = true;
	return REACT_STEP | REACT_DRAW;
}

static unsigned
act_rate(struct ui *ui, int arg)
{
	static const int ms[] = {100, 250, 500, 1000, 2000, 5000};
	int i = 0;

	while (i < 5 && ms[i] < ui->refresh_ms)
		i++;
	i += arg;
	ui->refresh_ms = ms[i < 0 ? 0 : i > 5 ? 5 : i];
	ui_say(ui, false, "refreshed every %d ms", ui->refresh_ms);
	return REACT_DRAW;
}

const char *const theme_names[N_THEMES] = {"auto", "dark", "light", "16", "mono"};

enum theme
theme_find(const char *name)
{
	int i = 0;

	while (i < N_THEMES && strcmp(name, theme_names[i]) != 0)
		i++;
	return (enum theme)i;
}

static unsigned
act_theme(struct ui *ui, int arg)
{
	ui->theme = (enum theme)(((int)ui->theme + arg) % N_THEMES);
	ui_say(ui, false, "theme %s", theme_names[ui->theme]);
	return REACT_THEME | REACT_DRAW;
}

static unsigned
act_mouse(struct ui *ui, int arg)
{
	(void)arg;
	ui->mouse = !ui->mouse;
	ui_say(ui, false, ui->mouse ? "the mouse selects here" : "the mouse is the terminal's: it copies");
	return REACT_MOUSE | REACT_DRAW;
}

/* A sweep of an hour is not to end by a slip. */
static unsigned
act_quit(struct ui *ui, int arg)
{
	(void)arg;
	if (!ui->pager.running || ui->quit_warned)
		return REACT_QUIT;
	ui->quit_warned = true;
	ui_say(ui, true, "quitting stops what runs: %.100s; q again quits, ! shows it", ui->pager.title);
	return REACT_DRAW;
}

static unsigned
act_react(struct ui *ui, int arg)
{
	(void)ui;
	return (unsigned)arg;
}

const struct key view_keys[] = {
	{{0}, "1 to 9, F1 to F9", "the views by number", NULL, 0, NULL},
	{{'\t'}, "tab", "next view", act_next_view, 1, NULL},
	{{K_BTAB}, "shift tab", "view before", act_next_view, -1, NULL},
	{{'u'}, "u", "undo: at once what was changed here last, else after a question", act_undo, 0, "undo"},
	{{'U'}, "U", "do again what u undid", act_redo, 0, NULL},
	{{'r'}, "r", "roll back: choose an epoch in History", act_rollback, 0, "roll back"},
	{{'K'}, "K", "keep a change that waits for its confirmation", act_keep, 0, NULL},
	{{':'}, ":", "a command: every verb of octetctl, and view, select, theme, rate, quit", act_prompt, ':', "command"},
	{{'!'}, "!", "what the last command said, or says", act_output, 0, NULL},
	{{'/'}, "/", "search", act_prompt, '/', "search"},
	{{'n'}, "n", "search on", act_search_next, 1, NULL},
	{{'N'}, "N", "search backwards", act_search_next, -1, NULL},
	{{'p'}, "p", "pause: the screen stands still, to read and to copy", act_pause, 0, "+pause"},
	{{'>'}, ">", "of a replay, the next snapshot", act_step, 0, NULL},
	{{'+', '='}, "+", "refresh more often", act_rate, -1, NULL},
	{{'-'}, "-", "refresh less often", act_rate, 1, NULL},
	{{'t'}, "t", "next theme: auto, dark, light, 16, mono", act_theme, 1, "+theme"},
	{{'M'}, "M", "mouse on or off: off, the terminal's own selection copies", act_mouse, 0, NULL},
	{{CTRL('l')}, "^L", "draw all anew", act_react, REACT_REPAINT, NULL},
	{{CTRL('z')}, "^Z", "suspend; fg comes back", act_react, REACT_SUSPEND, NULL},
	{{'?'}, "?", "this help", act_mode, MODE_HELP, "help"},
	{{'q', K_F0 + 10}, "q, F10", "quit; asks for a second q while a command runs", act_quit, 0, "quit"},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

/* ---- help ---- */

static unsigned
act_help_scroll(struct ui *ui, int arg)
{
	int last = ui->help_lines - ui->help_height, page = ui->help_height > 1 ? ui->help_height - 1 : 1;
	const int to[] = {ui->help_top - 1, ui->help_top + 1, ui->help_top - page, ui->help_top + page};

	ui->help_top = to[arg] > last ? last : to[arg];
	if (ui->help_top < 0)
		ui->help_top = 0;
	return REACT_DRAW;
}

const struct key help_keys[] = {
	{{K_UP, 'k'}, "up, k", "line before", act_help_scroll, 0, NULL},
	{{K_DOWN, 'j'}, "down, j", "line after", act_help_scroll, 1, NULL},
	{{K_PPAGE, CTRL('b')}, "page up", "a page up", act_help_scroll, 2, NULL},
	{{K_NPAGE, CTRL('f'), ' '}, "page down", "a page down", act_help_scroll, 3, "more"},
	{{'q', K_ESC, '?', CTRL('c')}, "q, esc, ?", "close", act_mode, MODE_VIEW, "close"},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

static const struct table {
	const char *name;
	const struct key *keys;
} tables[] = {
	{"all", view_keys}, {"lists", list_keys}, {"question", ask_keys}, {"line", prompt_keys}, {"output", pager_keys},
	{"help", help_keys},
};
#define N_TABLES (sizeof(tables) / sizeof(*tables))

const char *
ui_key_line(unsigned i, char *buf, size_t len)
{
	for (size_t t = 0; t < N_TABLES + (size_t)n_views(); t++) {
		const struct view *v = t >= N_TABLES ? views[t - N_TABLES] : NULL;
		const struct key *k = v != NULL ? v->keys : tables[t].keys;

		for (; k != NULL && k->name != NULL; k++) {
			if (i-- > 0)
				continue;
			snprintf(buf, len, "%s\t%s\t%s", v != NULL ? v->name : tables[t].name, k->name, k->help);
			return buf;
		}
	}
	return NULL;
}

/* ---- dispatch ---- */

const struct key *
keys_find(const struct key *k, int code)
{
	for (; k != NULL && k->name != NULL; k++)
		for (int i = 0; i < 4; i++)
			if (k->code[i] == code && code != 0)
				return k;
	return NULL;
}

static int
view_of_key(int code)
{
	if (code >= '1' && code <= '9')
		return code - '1';
	return code > K_F0 && code < K_F0 + 10 ? code - K_F0 - 1 : -1;
}

const struct key *
ui_find_key(const struct ui *ui, int code)
{
	const struct key *k = keys_find(ui_view(ui)->keys, code);

	if (k == NULL && ui_view(ui)->count != NULL)
		k = keys_find(list_keys, code);
	return k != NULL ? k : keys_find(view_keys, code);
}

static unsigned
take_pointer(struct ui *ui)
{
	const struct cell *c = ui->drawn != NULL ? canvas_at(ui->drawn, ui->pointer.y, ui->pointer.x) : NULL;
	const struct view *v = ui_view(ui);

	/* A click answers no question. */
	if (ui->mode != MODE_VIEW || c == NULL)
		return REACT_NONE;
	if (ui->pointer.wheel != 0) {
		if (v->wheel != NULL)
			v->wheel(ui, ui->pointer.wheel);
		else if (v->count != NULL)
			keys_find(list_keys, ui->pointer.wheel < 0 ? K_UP : K_DOWN)->act(ui, ui->pointer.wheel < 0 ? 0 : 1);
		return REACT_DRAW;
	}
	if (c->hit == HIT_TAB && ui->pointer.pressed)
		return ui_open_view(ui, c->a);
	if (c->hit == HIT_ROW && ui->pointer.pressed)
		ui_list(ui)->at = c->a;
	else if (v->click != NULL && (ui->pointer.pressed || ui->pointer.released))
		return v->click(ui, c, ui->pointer.released);
	return REACT_DRAW;
}

/* Only a line takes what is pasted, and it is not sent by it: elsewhere every letter is a key. */
static unsigned
take_paste(struct ui *ui, int code)
{
	ui->pasting = code == K_PASTE || (ui->pasting && code != K_PASTED);
	if (ui->mode == MODE_PROMPT)
		return code == K_PASTE || code == K_PASTED ? REACT_NONE : prompt_key(ui, code < ' ' ? ' ' : code);
	if (code == K_PASTE)
		ui_say(ui, true, "what is pasted is taken after : only");
	return REACT_DRAW;
}

unsigned
ui_key(struct ui *ui, int code)
{
	const struct key *k = NULL;

	if (code == K_MOUSE)
		return take_pointer(ui);
	if (code == K_PASTE || code == K_PASTED || ui->pasting)
		return take_paste(ui, code);
	if (ui->mode == MODE_VIEW && code != 'q' && code != K_F0 + 10)
		ui->quit_warned = false;
	switch (ui->mode) {
	case MODE_PROMPT: return prompt_key(ui, code);
	case MODE_ASK: k = keys_find(ask_keys, code); break;
	case MODE_HELP: k = keys_find(help_keys, code); break;
	case MODE_PAGER: k = keys_find(pager_keys, code); break;
	case MODE_VIEW:
		*ui->message = '\0';
		k = ui_find_key(ui, code);
		if (k == NULL && view_of_key(code) >= 0)
			return ui_open_view(ui, view_of_key(code)) | REACT_DRAW;
		break;
	}
	return k != NULL && k->act != NULL ? k->act(ui, k->arg) : REACT_DRAW;
}

/* ---- life ---- */

void
ui_init(struct ui *ui)
{
	memset(ui, 0, sizeof(*ui));
	data_init(&ui->data);
	ui->grid.fold = -1;
	ui->refresh_ms = 250;
	ui->zoom = 1;
	ui->mouse = true;
	ui->pending_ms = -1;
}

void
ui_free(struct ui *ui)
{
	free(ui->history);
	free(ui->pager.text);
	json_decref(ui->request);
}

unsigned
ui_take(struct ui *ui, const struct octet_page *page)
{
	bool same = ui->data.have && ui->data.page.pid == page->pid && ui->data.page.started_us == page->started_us;
	uint64_t epoch = ui->data.page.epoch;

	if (ui->paused || !data_take(&ui->data, page))
		return REACT_NONE;
	if (!same) {
		ui->n_history = 0;
		ui->history_whole = false;
		ui->undone = ui->own_epoch = 0;
	}
	history_take(ui);
	if (ui->live && !ui->batch && same && epoch != ui->data.page.epoch && ui->data.page.n_history > 0 && *ui->message == '\0' && ui->mode == MODE_VIEW) {
		const struct page_history *h = &ui->data.page.history[0];

		ui_say(ui, false, "epoch %" PRIu64 " by %s: %.200s", h->epoch, h->program, *h->change != '\0' ? h->change : h->why);
	}
	return REACT_DRAW;
}
