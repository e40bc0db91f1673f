/* SPDX-License-Identifier: Apache-2.0 */
/* Precision: layers x groups, what each site runs; over the same grid what each costs. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tui/ui.h"

#define SIDE_W 42
#define SIDE_FROM 112 /* columns from which the side is shown, */
#define TWO_FROM 180  /* and a second grid */
#define FOOT 6
#define CHANGE_ROWS 3
#define BATCH_ROWS 32 /* more layers are folded in --batch */

/* ---- words about it ---- */

static const char *
select_word(enum select s)
{
	static const char *const word[N_SELECTS] = {"cell", "layer", "group", "module", "block", "all", "selector"};

	return word[s];
}

static void
text_selected(const struct ui *ui, char *buf, size_t len)
{
	static char name[PAGE_GROUPS][SELECTOR_TEXT];
	struct sites s;
	uint32_t n;
	size_t at = 0;

	grid_sites(ui, &s);
	n = sites_selectors(&ui->data.page, &s, name);
	at = (size_t)snprintf(buf, len, "%s, %u site%s:", select_word(ui->grid.select), sites_count(&s), sites_count(&s) == 1 ? "" : "s");
	for (uint32_t i = 0; i < n && at < len; i++)
		at += (size_t)snprintf(buf + at, len - at, " %s", name[i]);
}

static void
text_plan(const struct octet_page *p, char *buf, size_t len)
{
	double now = page_read_bytes(p, false, NULL, 0), most = 0;
	char a[NUMBER_TEXT], b[NUMBER_TEXT];

	for (uint32_t g = 0; g < p->n_groups; g++)
		for (uint32_t l = 0; l < p->n_layers && !group_is_kv(p, g); l++)
			if (site_is(p, g, l))
				most += (double)p->read_bytes[g][0];
	snprintf(buf, len, "%s of weights a token (%.0f %% of %s), %s of KV a position", text_bytes(now, a),
	    most > 0 ? 100 * now / most : 0, format_name(p, 0), text_bytes(page_read_bytes(p, true, NULL, 0), b));
}

static void
site_name(const struct octet_page *p, uint32_t g, uint32_t l, char *buf, size_t len)
{
	if (group_is_one(p, g))
		snprintf(buf, len, "%s", p->group[g]);
	else
		snprintf(buf, len, "%s@%u", p->group[g], l);
}

static void
text_formats(const struct octet_page *p, uint32_t g, uint32_t l, char *buf, size_t len)
{
	size_t n = (size_t)snprintf(buf, len, "wanted %s, executed %s", format_name(p, p->wanted[g][l]),
	    format_name(p, p->executed[g][l]));

	if (p->candidate[g][l] != PAGE_NONE && n < len)
		snprintf(buf + n, len - n, ", candidate %s", format_name(p, p->candidate[g][l]));
}

static void
text_sweep(const struct octet_page *p, uint32_t g, uint32_t l, char *buf, size_t len)
{
	char kl[NUMBER_TEXT], us[NUMBER_TEXT], error[NUMBER_TEXT], what[48] = "alone";
	struct measured m;

	site_measured(p, g, l, &m);
	if (m.of > MEASURED_SITE)
		snprintf(what, sizeof(what), "its %s's %u sites", m.of == MEASURED_LAYER ? "layer" : "group", m.n);
	if (m.of == MEASURED_NOTHING)
		snprintf(buf, len, "%s", p->sweep_us != 0 ? "the last sweep did not flip it" : "no sweep yet");
	else
		snprintf(buf, len, isnan(m.saved_us) ? "%s in %s: KL %s" : "%s in %s: KL %s; decode step %s +- %s %s", what, p->sweep_format,
		    text_kl(m.kl, kl), text_us(fabs(m.saved_us), us), text_us(m.saved_error_us, error), m.saved_us < 0 ? "longer" : "shorter");
}

static void
text_inputs(const struct octet_page *p, uint32_t g, uint32_t l, char *buf, size_t len)
{
	char max[NUMBER_TEXT];

	if (p->absmax[g][l] < 0)
		snprintf(buf, len, "inputs not measured");
	else
		snprintf(buf, len, "inputs up to %s; in FP8 %.2g %% are 0, %.2g %% its largest number", text_number((double)p->absmax[g][l], max),
		    100 * (double)p->zero[g][l], 100 * (double)p->saturated[g][l]);
}

static void
draw_foot(struct ui *ui, const struct pane *p)
{
	const struct octet_page *page = &ui->data.page;
	uint32_t g = ui->grid.group, l = group_is_one(page, g) ? 0 : ui->grid.layer;
	char name[64], a[SELECTOR_TEXT], bytes[NUMBER_TEXT];

	site_name(page, g, l, name, sizeof(name));
	put_line(p, 0, ui->batch ? "Plan" : name);
	text_plan(page, a, sizeof(a));
	if (ui->batch) {
		put(p, 1, 1, STYLE_TEXT, "%s", a);
		return;
	}
	put(p, 5, 1, STYLE_DIM, "%s", a);
	/* What will be flipped comes first: a low terminal has no room for all. */
	text_selected(ui, a, sizeof(a));
	put(p, 1, 1, STYLE_KEY, "%s", a);
	if (!site_is(page, g, l))
		return;
	text_formats(page, g, l, a, sizeof(a));
	put(p, 2, 1, STYLE_TEXT, "%s; a token reads %s", a, text_bytes((double)page->read_bytes[g][page->wanted[g][l]], bytes));
	text_sweep(page, g, l, a, sizeof(a));
	put(p, 3, 1, STYLE_TEXT, "%s", a);
	text_inputs(page, g, l, a, sizeof(a));
	put(p, 4, 1, STYLE_TEXT, "%s", a);
}

/* ---- the side of a wide screen ---- */

static int
side_site(struct ui *ui, const struct pane *p, int y)
{
	const struct octet_page *page = &ui->data.page;
	uint32_t g = ui->grid.group, l = group_is_one(page, g) ? 0 : ui->grid.layer;
	char a[SELECTOR_TEXT], name[64], bytes[NUMBER_TEXT];

	site_name(page, g, l, name, sizeof(name));
	put_line(p, y++, name);
	if (!site_is(page, g, l)) {
		put(p, y, 1, STYLE_DIM, "there is no such site");
		return y + 2;
	}
	text_formats(page, g, l, a, sizeof(a));
	y = put_words(p, y, 1, STYLE_TEXT, a);
	put(p, y++, 1, STYLE_TEXT, "a token reads %s", text_bytes((double)page->read_bytes[g][page->wanted[g][l]], bytes));
	text_sweep(page, g, l, a, sizeof(a));
	y = put_words(p, y, 1, STYLE_TEXT, a);
	text_inputs(page, g, l, a, sizeof(a));
	return put_words(p, y, 1, STYLE_TEXT, a) + 1;
}

static int
side_series(struct ui *ui, const struct pane *p, int y, enum series s, const char *title, double now)
{
	float v[SIDE_W];
	double top = 0;
	char a[NUMBER_TEXT], b[NUMBER_TEXT];
	int n = p->width - 2 < SIDE_W ? p->width - 2 : SIDE_W;

	if (y + 4 > p->height || n < 1)
		return y;
	data_columns(&ui->data, s, 1, v, n);
	for (int i = 0; i < n; i++)
		top = v[i] > top ? v[i] : top;
	put_line(p, y, "");
	put(p, y, 2, STYLE_TITLE, " %s ", title);
	put(p, y, p->width - 20, STYLE_DIM, " %s, top %s ", text_number(now, a), text_number(top, b));
	put_graph(p, y + 1, 1, 2, v, n, top);
	return y + 4;
}

/* Who and when and what it did to the tokens/s; below, what: words, up to CHANGE_ROWS of them. */
static int
side_change(const struct ui *ui, const struct pane *p, int y, int row)
{
	const struct page_history *h = &ui->history[row];
	bool good = strcmp(h->result, "applied") == 0;
	struct pane what = pane_part(p, y + 1, 0, CHANGE_ROWS, p->width - 1);
	double gain = history_gain(ui, row);
	char when[NUMBER_TEXT], words[320];
	int n;

	put(p, y, 1, !good ? STYLE_BAD : h->epoch == ui->data.page.epoch ? STYLE_TITLE : STYLE_TEXT, "%4" PRIu64 " %s %.15s", h->epoch, text_time(h->time_us, when), h->program);
	if (isfinite(gain))
		put(p, y, p->width - 9, gain_style(gain), "%+6.0f %%", gain);
	history_words(h, words, sizeof(words));
	n = put_words(&what, 0, 6, good ? STYLE_DIM : STYLE_BAD, !good ? h->result : strcmp(h->why, "start") == 0 ? "start" : words);
	if (n > what.height)
		put(&what, what.height - 1, what.width - 4, STYLE_DIM, " ...");
	return y + 1 + (n < what.height ? n : what.height);
}

static void
side_changes(struct ui *ui, const struct pane *p, int y)
{
	if (y + 3 > p->height)
		return;
	put_line(p, y, "Changes");
	put(p, y++, p->width - 9, STYLE_DIM, " tok/s ");
	for (int i = 0; i < (int)ui->n_history && y + 2 <= p->height; i++)
		y = side_change(ui, p, y, i);
}

static void
draw_side(struct ui *ui, const struct pane *p)
{
	const struct octet_page *page = &ui->data.page;
	char a[SELECTOR_TEXT];
	int y = ui->batch ? 0 : side_site(ui, p, 0);

	if (!ui->batch) {
		put_line(p, y++, "Selected");
		text_selected(ui, a, sizeof(a));
		if (strlen(a) > 160)
			snprintf(a + 156, 8, " ...");
		y = put_words(p, y, 1, STYLE_KEY, a) + 1;
	}
	put_line(p, y++, "Plan");
	text_plan(page, a, sizeof(a));
	y = put_words(p, y, 1, STYLE_TEXT, a) + 1;
	y = side_series(ui, p, y, SERIES_OUTPUT, "tokens/s", page->tokens_per_s);
	y = side_series(ui, p, y, SERIES_STEP_P50, "step ms p50", page->step_ms_p50);
	side_changes(ui, p, y);
}

static void
choose_folding(struct ui *ui, int height)
{
	struct grid *g = &ui->grid;

	if (ui->batch)
		height = BATCH_ROWS;
	g->folded = g->fold >= 0 ? g->fold > 0 : g->shows == SHOWS_FORMAT && (int)ui->data.page.n_layers > height;
}

/* What stands beside or below the grid: costs, as far as they are known. */
static enum shows
other_shows(const struct ui *ui)
{
	if (ui->grid.shows != SHOWS_FORMAT)
		return SHOWS_FORMAT;
	return ui->data.page.sweep_us != 0 ? SHOWS_KL : SHOWS_ABSMAX;
}

/* Below the grid, and what is below that, where all of it finds room. */
static void
draw_below(struct ui *ui, const struct pane *p, int y, int rows, int width)
{
	struct pane more = pane_part(p, y, 0, p->height - y, width);

	if (more.height >= rows + 1)
		grid_draw(ui, &more, other_shows(ui));
}

/* Beside the grid what the sites cost, and below where there is room, what that saves and how their inputs fit. */
static void
draw_others(struct ui *ui, const struct pane *p, int y, int width)
{
	struct pane more = pane_part(p, 0, width / 2 + 1, p->height, width - width / 2 - 1);

	grid_draw(ui, &more, other_shows(ui));
	if (y + 2 + y > p->height)
		return;
	more = pane_part(p, y + 1, 0, p->height - y - 1, width / 2 - 1);
	grid_draw(ui, &more, SHOWS_TIME);
	more = pane_part(p, y + 1, width / 2 + 1, p->height - y - 1, width - width / 2 - 1);
	grid_draw(ui, &more, SHOWS_ZERO);
}

static void
draw(struct ui *ui, const struct pane *p)
{
	bool side = p->width >= SIDE_FROM, two = p->width >= TWO_FROM;
	int foot = side ? 0 : ui->batch ? 2 : p->height < 16 ? 3 : FOOT, width = side ? p->width - SIDE_W - 2 : p->width;
	struct pane grid = pane_part(p, 0, 0, p->height - foot, two ? width / 2 - 1 : width), more;
	int y;

	if (ui->data.page.n_layers > 0 && ui->grid.layer >= ui->data.page.n_layers)
		ui->grid.layer = ui->data.page.n_layers - 1;
	if (ui->data.page.n_groups > 0 && ui->grid.group >= ui->data.page.n_groups)
		ui->grid.group = ui->data.page.n_groups - 1;
	choose_folding(ui, grid.height - 2);
	y = grid_draw(ui, &grid, ui->grid.shows);
	if (two)
		draw_others(ui, p, y, width);
	if (side) {
		more = pane_part(p, 0, p->width - SIDE_W, p->height, SIDE_W);
		draw_side(ui, &more);
	} else {
		more = pane_part(p, y < p->height - foot ? y : p->height - foot, 0, foot, p->width);
		draw_foot(ui, &more);
	}
	if (!two && !ui->batch)
		draw_below(ui, p, y + foot + 1, y, width);
}

/* ---- keys ---- */

enum { GO_UP, GO_DOWN, GO_LEFT, GO_RIGHT, GO_PAGE_UP, GO_PAGE_DOWN, GO_FIRST, GO_LAST, GO_FIRST_GROUP, GO_LAST_GROUP };

static unsigned
act_go(struct ui *ui, int arg)
{
	const struct octet_page *p = &ui->data.page;
	struct grid *g = &ui->grid;
	int page = g->rows.height > 1 ? g->rows.height - 1 : 1, row;
	const int down[] = {-1, 1, 0, 0, -page, page, -(int)PAGE_LAYERS, PAGE_LAYERS, 0, 0};
	const int right[] = {0, 0, -1, 1, 0, 0, 0, 0, -(int)PAGE_GROUPS, PAGE_GROUPS};
	int group = (int)g->group + right[arg];
	struct rows r;

	rows_make(p, g->folded, &r);
	if (r.n == 0 || p->n_groups == 0)
		return REACT_NONE;
	row = (int)rows_find(&r, g->layer) + down[arg];
	row = row < 0 ? 0 : row >= (int)r.n ? (int)r.n - 1 : row;
	group = group < 0 ? 0 : group >= (int)p->n_groups ? (int)p->n_groups - 1 : group;
	g->layer = r.from[row], g->group = (uint32_t)group;
	if (g->select == SELECT_GLOB)
		g->select = SELECT_CELL;
	return REACT_DRAW;
}

static unsigned
act_select(struct ui *ui, int arg)
{
	struct grid *g = &ui->grid;

	if (arg == SELECT_BLOCK)
		g->anchor_layer = g->layer, g->anchor_group = g->group;
	g->select = g->select == (enum select)arg && arg != SELECT_BLOCK ? SELECT_CELL : (enum select)arg;
	return REACT_DRAW;
}

static unsigned
act_shows(struct ui *ui, int arg)
{
	ui->grid.shows = (enum shows)(((int)ui->grid.shows + arg + N_SHOWS) % N_SHOWS);
	return REACT_DRAW;
}

static unsigned
act_fold(struct ui *ui, int arg)
{
	(void)arg;
	ui->grid.fold = !ui->grid.folded;
	return REACT_DRAW;
}

static unsigned
act_flip(struct ui *ui, int arg)
{
	(void)arg;
	return ask_flip(ui);
}

static bool
find(struct ui *ui, const char *text, int direction)
{
	const struct octet_page *p = &ui->data.page;
	uint32_t n = p->n_layers * p->n_groups, from = ui->grid.layer * p->n_groups + ui->grid.group;
	struct rows r;
	bool digits = *text != '\0' && text[strspn(text, "0123456789")] == '\0';
	char name[64], line[128];

	rows_make(p, ui->grid.folded, &r);
	for (uint32_t i = 1; i <= n; i++) {
		uint32_t at = direction > 0 ? (from + i) % n : (from + n - i) % n, l = at / p->n_groups, g = at % p->n_groups;

		if (digits ? l != strtoul(text, NULL, 10) || g != ui->grid.group : !site_is(p, g, l))
			continue;
		if (!digits && strchr(text, '@') == NULL && r.from[rows_find(&r, l)] != l)
			continue;
		site_name(p, g, l, name, sizeof(name));
		snprintf(line, sizeof(line), "%s %s", name, format_name(p, p->wanted[g][l]));
		if (!digits && !text_has(line, text))
			continue;
		ui->grid.layer = l, ui->grid.group = g;
		/* A layer was named: not all that is folded with it. */
		if (digits || strchr(text, '@') != NULL)
			ui->grid.fold = 0;
		return true;
	}
	return false;
}

static unsigned
click(struct ui *ui, const struct cell *c, bool released)
{
	struct grid *g = &ui->grid;

	if (c->hit == HIT_LAYER && !released)
		g->layer = c->b, g->select = SELECT_LAYER;
	else if (c->hit == HIT_GROUP && !released)
		g->group = c->a, g->select = SELECT_GROUP;
	else if (c->hit == HIT_SITE && !released) {
		g->group = g->anchor_group = c->a, g->select = SELECT_CELL;
		g->layer = g->anchor_layer = group_is_one(&ui->data.page, c->a) ? g->layer : c->b;
	} else if (c->hit == HIT_SITE && (c->a != g->group || c->b != g->layer) && !group_is_one(&ui->data.page, c->a))
		g->group = c->a, g->layer = c->b, g->select = SELECT_BLOCK;
	return REACT_DRAW;
}

static void
wheel(struct ui *ui, int direction)
{
	act_go(ui, direction < 0 ? GO_UP : GO_DOWN);
}

static int
batch_height(const struct ui *ui, int width)
{
	struct rows r;
	int n;

	rows_make(&ui->data.page, ui->data.page.n_layers > BATCH_ROWS, &r);
	n = (int)r.n + 5;
	return width >= SIDE_FROM && n < 21 ? 21 : n;
}

static const struct key keys[] = {
	{{' ', K_ENTER}, "space, enter", "flip the selection: shows what changes, and asks", act_flip, 0, "flip"},
	{{K_UP, 'k'}, "up, k", "layer before", act_go, GO_UP, NULL},
	{{K_DOWN, 'j'}, "down, j", "layer after", act_go, GO_DOWN, NULL},
	{{K_LEFT, 'h'}, "left, h", "group before", act_go, GO_LEFT, NULL},
	{{K_RIGHT, 'l'}, "right, l", "group after", act_go, GO_RIGHT, NULL},
	{{K_PPAGE, CTRL('b')}, "page up", "a page up", act_go, GO_PAGE_UP, NULL},
	{{K_NPAGE, CTRL('f')}, "page down", "a page down", act_go, GO_PAGE_DOWN, NULL},
	{{K_HOME, 'g'}, "home, g", "first layer", act_go, GO_FIRST, NULL},
	{{K_END, 'G'}, "end, G", "last layer", act_go, GO_LAST, NULL},
	{{'0', '^'}, "0, ^", "first group", act_go, GO_FIRST_GROUP, NULL},
	{{'$'}, "$", "last group", act_go, GO_LAST_GROUP, NULL},
	{{'e', K_ESC}, "e, esc", "select the cell", act_select, SELECT_CELL, NULL},
	{{'x'}, "x", "select the layer: its linear groups", act_select, SELECT_LAYER, NULL},
	{{'c'}, "c", "select the column: the group in all layers", act_select, SELECT_GROUP, NULL},
	{{'m'}, "m", "select the module: attention.* or mlp.*", act_select, SELECT_MODULE, NULL},
	{{'v'}, "v", "select a block from here to where you move", act_select, SELECT_BLOCK, NULL},
	{{'a'}, "a", "select all linear groups and lm_head", act_select, SELECT_ALL, NULL},
	{{'s'}, "s", "select by a selector: mlp.*@0-3,-1", act_prompt, 's', "+select"},
	{{'d'}, "d", "show formats, KL, time, bytes, inputs in turn", act_shows, 1, "show"},
	{{'D'}, "D", "the same backwards", act_shows, -1, NULL},
	{{'f'}, "f", "fold layers that are alike, or unfold them", act_fold, 0, "+fold"},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

const struct view view_precision = {
	.name = "precision", .title = "Precision", .about = "what each site runs, and what flipping it costs and saves",
	.draw = draw, .keys = keys, .batch_height = batch_height, .find = find, .click = click, .wheel = wheel,
};
