/* SPDX-License-Identifier: Apache-2.0 */
/* Log: octetd's last lines, and what went by since the console came. */
#include <string.h>

#include "tui/ui.h"

#define LINE_H 5 /* of the line under the cursor, in full */

static bool
is_bad(const char *line)
{
	return data_log_is(line, "warn") || data_log_is(line, "error");
}

/* The row-th line from the oldest that is shown. */
static const char *
line_at(const struct ui *ui, int row)
{
	uint64_t n = data_log_count(&ui->data);

	for (uint64_t i = n; i-- > 0;) {
		const char *line = data_log(&ui->data, i);

		if ((ui->log_level == 0 || is_bad(line)) && row-- == 0)
			return line;
	}
	return "";
}

static int
count(const struct ui *ui)
{
	int n = 0;

	for (uint64_t i = 0; i < data_log_count(&ui->data); i++)
		n += ui->log_level == 0 || is_bad(data_log(&ui->data, i));
	return n;
}

static void
row_text(const struct ui *ui, int row, char *buf, size_t len)
{
	snprintf(buf, len, "%s", line_at(ui, row));
}

/* "2026-01-31T12:00:00.123Z info event key=value": the day only where there is room. */
static void
draw_line(const struct pane *p, int y, const char *line)
{
	const char *level = strchr(line, ' '), *event = level != NULL ? strchr(level + 1, ' ') : NULL, *rest;
	enum style style = data_log_is(line, "error") ? STYLE_BAD : data_log_is(line, "warn") ? STYLE_WARN : STYLE_TEXT;
	int x = 0, day = p->width > 100 || strlen(line) < 24 ? 0 : 11;

	if (event == NULL) {
		put(p, y, 0, style, "%s", line);
		return;
	}
	rest = strchr(event + 1, ' ');
	x = put(p, y, x, STYLE_DIM, "%.*s ", (int)(level - line) - day > 0 ? (int)(level - line) - day : 0, line + day);
	x = put(p, y, x, style, "%-5.*s ", (int)(event - level - 1), level + 1);
	x = put(p, y, x, STYLE_TITLE, "%.*s", rest != NULL ? (int)(rest - event - 1) : (int)strlen(event + 1), event + 1);
	if (rest != NULL)
		put(p, y, x, style, "%s", rest);
}

static void
draw(struct ui *ui, const struct pane *p)
{
	struct list *l = ui_list(ui);
	int n = count(ui), foot = ui->batch ? 0 : LINE_H;
	struct pane whole = pane_part(p, p->height - foot, 0, foot, p->width);

	/* Who stands on the last line follows. */
	if (l->at >= l->count - 1 || ui->batch)
		l->at = n - 1;
	list_fit(l, n, p->height - foot);
	if (n == 0)
		put(p, 0, 1, STYLE_DIM, ui->log_level == 0 ? "nothing was logged yet" : "no warning, no error; w shows all");
	for (int i = 0; i < l->height && l->top + i < n; i++) {
		draw_line(p, i, line_at(ui, l->top + i));
		if (l->top + i == l->at && !ui->batch)
			mark(p, i, 0, p->width, MARK_CURSOR);
		hit(p, i, 0, p->width, HIT_ROW, (uint32_t)(l->top + i), 0);
	}
	list_scrollbar(p, 0, p->width - 1, l->height, l->top, n);
	if (n == 0 || foot == 0)
		return;
	put_line(&whole, 0, "The whole line");
	put_words(&whole, 1, 1, STYLE_TEXT, line_at(ui, l->at));
}

static unsigned
act_level(struct ui *ui, int arg)
{
	(void)arg;
	ui->log_level = !ui->log_level;
	*ui_list(ui) = (struct list){0};
	return REACT_DRAW;
}

static const struct key keys[] = {
	{{'w'}, "w", "warnings and errors only, or all", act_level, 0, "warnings"},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

const struct view view_log = {
	.name = "log", .title = "Log", .about = "octetd's last lines; the last one is followed", .draw = draw, .keys = keys, .count = count,
	.row_text = row_text,
};
