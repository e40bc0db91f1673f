/* SPDX-License-Identifier: Apache-2.0 */
/* What a command of ":" says: lines that come while it runs, and how it ended. */
#include <stdlib.h>
#include <string.h>

#include "tui/ui.h"

#define OUTPUT_MAX (1u << 20)

void
pager_open(struct ui *ui, const char *title)
{
	struct pager *g = &ui->pager;

	free(g->text);
	*g = (struct pager){.running = true};
	snprintf(g->title, sizeof(g->title), "%s", title);
	ui->mode = MODE_PAGER;
}

/* A carriage return begins its line anew, as a terminal does: progress. */
static void
add_text(struct pager *g, const char *text, size_t len)
{
	char *more = g->len + len + 1 > OUTPUT_MAX ? NULL : realloc(g->text, g->len + len + 1);

	if (more == NULL)
		return;
	g->text = more;
	for (size_t i = 0; i < len; i++) {
		if (text[i] == '\r') {
			while (g->len > 0 && g->text[g->len - 1] != '\n')
				g->len--;
		} else if (text[i] != '\0')
			g->text[g->len++] = text[i];
	}
	g->text[g->len] = '\0';
}

unsigned
ui_output(struct ui *ui, const char *text, size_t len, int status)
{
	struct pager *g = &ui->pager;

	add_text(g, text, len);
	if (status >= 0)
		g->running = false, g->status = status;
	if (status < 0)
		return REACT_DRAW;
	/* One line that says all there is needs no box. */
	if (ui->mode != MODE_PAGER)
		ui_say(ui, status != 0, "%s (! shows it): %.200s", status == 0 ? "done" : "failed", g->title);
	else if (status == 0 && g->len > 0 && strchr(g->text, '\n') == g->text + g->len - 1) {
		ui_say(ui, false, "%.*s", (int)g->len - 1, g->text);
		ui->mode = MODE_VIEW;
	} else if (status == 0 && g->len == 0)
		ui->mode = MODE_VIEW;
	return REACT_DRAW;
}

static unsigned
act_scroll(struct ui *ui, int arg)
{
	struct pager *g = &ui->pager;
	int page = g->height > 1 ? g->height - 1 : 1, last = g->lines - g->height;
	const int to[] = {g->top - 1, g->top + 1, g->top - page, g->top + page, 0, last};

	g->top = to[arg] > last ? last : to[arg];
	if (g->top < 0)
		g->top = 0;
	return REACT_DRAW;
}

static unsigned
act_leave(struct ui *ui, int arg)
{
	(void)arg;
	if (ui->pager.running)
		ui_say(ui, false, "goes on (! shows it): %.200s", ui->pager.title);
	ui->mode = MODE_VIEW;
	return REACT_DRAW;
}

unsigned
act_output(struct ui *ui, int arg)
{
	(void)arg;
	if (ui->pager.text != NULL || ui->pager.running)
		ui->mode = MODE_PAGER;
	else
		ui_say(ui, true, "no command was run yet");
	return REACT_DRAW;
}

static unsigned
act_stop(struct ui *ui, int arg)
{
	(void)arg;
	ui->mode = MODE_VIEW;
	if (!ui->pager.running)
		return REACT_DRAW;
	ui_say(ui, true, "stopped: %.200s", ui->pager.title);
	ui->pager.running = false;
	return REACT_STOP | REACT_DRAW;
}

const struct key pager_keys[] = {
	{{K_UP, 'k'}, "up, k", "line before", act_scroll, 0, NULL},
	{{K_DOWN, 'j'}, "down, j", "line after", act_scroll, 1, NULL},
	{{K_PPAGE, CTRL('b')}, "page up", "a page up", act_scroll, 2, NULL},
	{{K_NPAGE, CTRL('f'), ' '}, "page down", "a page down", act_scroll, 3, "more"},
	{{K_HOME, 'g'}, "home, g", "to the beginning", act_scroll, 4, NULL},
	{{K_END, 'G'}, "end, G", "to the end", act_scroll, 5, NULL},
	{{'q', K_ESC, K_ENTER, '!'}, "q, esc, enter", "close; a command that still runs goes on", act_leave, 0, "close"},
	{{CTRL('c')}, "^C", "stop the command", act_stop, 0, "stop it"},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

/* Tabs are blanks; what "ESC [" begins is left out (a bar's "clear to the end"). */
static int
plain_line(const char *from, int len, char *to, int room)
{
	int n = 0;

	for (int i = 0; i < len && n + 1 < room; i++) {
		if (from[i] == '\033' && i + 1 < len && from[i + 1] == '[')
			for (i += 2; i < len && (from[i] < '@' || from[i] > '~'); i++)
				;
		else
			to[n++] = from[i] == '\t' ? ' ' : from[i];
	}
	to[n] = '\0';
	return n;
}

/* Long lines go on in the next row; how many rows there are. */
static int
draw_lines(const struct pager *g, const struct pane *in, int top)
{
	const char *s = g->text != NULL ? g->text : "";
	char line[1024];
	int row = 0;

	while (*s != '\0') {
		int len = (int)strcspn(s, "\n"), n = plain_line(s, len, line, sizeof(line)), width = in->width > 8 ? in->width - 2 : 8;

		for (int at = 0; at == 0 || at < n; at += width, row++)
			put(in, row - top, 0, STYLE_TEXT, "%.*s", width, line + at);
		s += len + (s[len] != '\0');
	}
	return row;
}

void
pager_draw(struct ui *ui, const struct pane *p)
{
	struct pager *g = &ui->pager;
	char title[sizeof(g->title) + 64];
	struct pane in, none;

	snprintf(title, sizeof(title), "%s%s", g->running ? "runs; ^C stops it, q lets it go on: " : g->status != 0 ? "Failed: " : "", g->title);
	in = pane_box(p, p->height, p->width, title);
	none = in, none.height = 0;
	g->height = in.height, g->lines = draw_lines(g, &none, 0);
	if (g->running && g->lines > g->height)
		g->top = g->lines - g->height;
	draw_lines(g, &in, g->top);
	list_scrollbar(&in, 0, in.width - 1, in.height, g->top, g->lines);
}
