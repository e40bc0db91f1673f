/* SPDX-License-Identifier: Apache-2.0 */
/* Views that are lists: moving, searching, clicking. */
#include <ctype.h>
#include <string.h>

#include "tui/ui.h"

void
list_fit(struct list *l, int count, int height)
{
	l->height = height > 0 ? height : 1;
	l->count = count;
	if (l->at >= count)
		l->at = count - 1;
	if (l->at < 0)
		l->at = 0;
	if (l->at < l->top)
		l->top = l->at;
	if (l->at >= l->top + l->height)
		l->top = l->at - l->height + 1;
	if (l->top > count - l->height)
		l->top = count - l->height;
	if (l->top < 0)
		l->top = 0;
}

void
list_scrollbar(const struct pane *p, int y, int x, int height, int top, int count)
{
	int size, at;

	if (count <= height || height < 2)
		return;
	size = height * height / count > 0 ? height * height / count : 1;
	at = (height - size) * top / (count - height);
	for (int i = 0; i < height; i++)
		put_glyph(p, y + i, x, STYLE_DIM, i >= at && i < at + size ? GLYPH_FULL : GLYPH_VLINE);
}

bool
text_has(const char *text, const char *part)
{
	size_t n = strlen(part);

	for (; *text != '\0'; text++)
		if (strncasecmp(text, part, n) == 0)
			return true;
	return n == 0;
}

/* From the row after the cursor on, once around. */
static bool
find_row(struct ui *ui, int direction)
{
	const struct view *v = ui_view(ui);
	struct list *l = ui_list(ui);
	int n = v->count(ui);
	char text[600];

	for (int i = 1; i <= n; i++) {
		int row = ((l->at + direction * i) % n + n) % n;

		v->row_text(ui, row, text, sizeof(text));
		if (text_has(text, ui->search)) {
			l->at = row;
			return true;
		}
	}
	return false;
}

bool
list_search(struct ui *ui, int direction)
{
	const struct view *v = ui_view(ui);
	bool found = false;

	if (v->find != NULL)
		found = v->find(ui, ui->search, direction);
	else if (v->count != NULL && v->count(ui) > 0)
		found = find_row(ui, direction);
	if (!found)
		ui_say(ui, true, "nothing here has '%s'", ui->search);
	return found;
}

unsigned
act_search_next(struct ui *ui, int direction)
{
	if (*ui->search == '\0')
		ui_say(ui, true, "nothing was searched yet: / searches");
	else
		list_search(ui, direction);
	return REACT_DRAW;
}

enum { MOVE_UP, MOVE_DOWN, MOVE_PAGE_UP, MOVE_PAGE_DOWN, MOVE_FIRST, MOVE_LAST };

static unsigned
act_move(struct ui *ui, int arg)
{
	struct list *l = ui_list(ui);
	int n = ui_view(ui)->count(ui), page = l->height > 1 ? l->height - 1 : 1;
	const int to[] = {l->at - 1, l->at + 1, l->at - page, l->at + page, 0, n - 1};

	l->at = to[arg];
	list_fit(l, n, l->height);
	return REACT_DRAW;
}

const struct key list_keys[] = {
	{{K_UP, 'k'}, "up, k", "line before", act_move, MOVE_UP, NULL},
	{{K_DOWN, 'j'}, "down, j", "line after", act_move, MOVE_DOWN, NULL},
	{{K_PPAGE, CTRL('b')}, "page up", "a page up", act_move, MOVE_PAGE_UP, NULL},
	{{K_NPAGE, CTRL('f')}, "page down", "a page down", act_move, MOVE_PAGE_DOWN, NULL},
	{{K_HOME, 'g'}, "home, g", "first line", act_move, MOVE_FIRST, NULL},
	{{K_END, 'G'}, "end, G", "last line", act_move, MOVE_LAST, NULL},
	{{0}, NULL, NULL, NULL, 0, NULL},
};
