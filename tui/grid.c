/* SPDX-License-Identifier: Apache-2.0 */
/* The grid of layers and groups: what is selected in it, what it shows, drawing it. */
#include <math.h>
#include <string.h>

#include "tui/ui.h"

#define LAYER_W 8
#define CELL_MIN 6
#define CELL_MAX 11

static const struct {
	const char *title;
	bool logarithmic;
} shows[N_SHOWS] = {
	[SHOWS_FORMAT] = {"Formats", false},
	[SHOWS_KL] = {"KL of each site alone", true},
	[SHOWS_TIME] = {"us a decode step is shorter", false},
	[SHOWS_BYTES] = {"Bytes a token reads", false},
	[SHOWS_ABSMAX] = {"Largest input", false},
	[SHOWS_ZERO] = {"Inputs that are 0 in FP8, %", true},
	[SHOWS_SATURATED] = {"Inputs at the largest FP8 number, %", true},
};

/* ---- what is selected ---- */

static void
add_group(const struct octet_page *p, struct sites *s, uint32_t g, uint32_t from, uint32_t to)
{
	if (group_is_one(p, g))
		from = to = 0;
	for (uint32_t l = from; l <= to && l < p->n_layers; l++)
		s->at[g][l] = site_is(p, g, l);
}

/* "attention." of "attention.q_proj"; all of a name without a dot. */
static bool
same_module(const char *a, const char *b)
{
	size_t n = strcspn(a, ".");

	return n == strcspn(b, ".") && strncmp(a, b, n) == 0;
}

static void
add_block(const struct ui *ui, const struct rows *r, struct sites *s)
{
	const struct grid *g = &ui->grid;
	uint32_t a = rows_find(r, g->layer), b = rows_find(r, g->anchor_layer), c = g->group, d = g->anchor_group;

	for (uint32_t i = c < d ? c : d; i <= (c < d ? d : c); i++)
		add_group(&ui->data.page, s, i, r->from[a < b ? a : b], r->to[a < b ? b : a]);
}

void
grid_sites(const struct ui *ui, struct sites *s)
{
	const struct octet_page *p = &ui->data.page;
	const struct grid *g = &ui->grid;
	struct rows r;
	uint32_t row;
	struct err err;

	memset(s, 0, sizeof(*s));
	rows_make(p, g->folded, &r);
	if (r.n == 0)
		return;
	row = rows_find(&r, g->layer);
	for (uint32_t i = 0; i < p->n_groups; i++) {
		bool linear = !group_is_kv(p, i), one = group_is_one(p, i);

		if (g->select == SELECT_LAYER && linear && !one)
			add_group(p, s, i, r.from[row], r.to[row]);
		else if ((g->select == SELECT_GROUP && i == g->group) || (g->select == SELECT_ALL && linear) ||
		    (g->select == SELECT_MODULE && same_module(p->group[i], p->group[g->group])))
			add_group(p, s, i, 0, p->n_layers - 1);
	}
	if (g->select == SELECT_CELL)
		add_group(p, s, g->group, r.from[row], r.to[row]);
	else if (g->select == SELECT_BLOCK)
		add_block(ui, &r, s);
	else if (g->select == SELECT_GLOB)
		sites_parse(p, g->glob, s, &err);
}

bool
grid_select_glob(struct ui *ui, const char *selector)
{
	struct sites s;
	struct err err = {""};

	if (sites_parse(&ui->data.page, selector, &s, &err) != 0) {
		ui_say(ui, true, "%s", err.text);
		return false;
	}
	snprintf(ui->grid.glob, sizeof(ui->grid.glob), "%s", selector);
	ui->grid.select = SELECT_GLOB;
	return true;
}

/* ---- values ---- */

/* NAN: not measured. */
static double
value_of(const struct octet_page *p, enum shows what, uint32_t g, uint32_t l)
{
	switch (what) {
	case SHOWS_KL: return p->kl[g][l] >= 0 ? (double)p->kl[g][l] : NAN;
	case SHOWS_TIME: return (double)p->saved_us[g][l];
	case SHOWS_BYTES: return (double)p->read_bytes[g][p->wanted[g][l]];
	case SHOWS_ABSMAX: return p->absmax[g][l] >= 0 ? (double)p->absmax[g][l] : NAN;
	case SHOWS_ZERO: return p->absmax[g][l] >= 0 ? 100 * (double)p->zero[g][l] : NAN;
	case SHOWS_SATURATED: return p->absmax[g][l] >= 0 ? 100 * (double)p->saturated[g][l] : NAN;
	case SHOWS_FORMAT:
	case N_SHOWS: break;
	}
	return NAN;
}

struct range {
	double low, high;
	bool logarithmic;
};

static struct range
range_of(const struct octet_page *p, enum shows what)
{
	struct range r = {INFINITY, 0, shows[what].logarithmic};

	for (uint32_t g = 0; g < p->n_groups; g++) {
		for (uint32_t l = 0; l < p->n_layers; l++) {
			double v = site_is(p, g, l) ? value_of(p, what, g, l) : NAN;

			if (v > 0)
				r.low = fmin(r.low, v), r.high = fmax(r.high, v);
		}
	}
	return r;
}

static int
heat_level(const struct range *r, double v)
{
	double share;

	if (!(v > 0))
		return 0;
	if (!(r->high > r->low))
		return 2;
	share = r->logarithmic ? (log(v) - log(r->low)) / (log(r->high) - log(r->low)) : (v - r->low) / (r->high - r->low);
	return share > 0.999 ? 4 : share > 0 ? (int)(share * 5) : 0;
}

/* ---- the grid ---- */

struct look {
	enum shows what;
	struct range range;
	struct sites selected;
	struct rows rows;
	int cell_w;
};

static void
draw_format(struct ui *ui, const struct pane *p, int y, int x, uint32_t g, uint32_t l, const struct look *k)
{
	const struct octet_page *page = &ui->data.page;
	uint8_t wanted = page->wanted[g][l], next = page->candidate[g][l];
	bool sent = ui->sending && ui->sent.at[g][l];
	int at;

	if (sent)
		wanted = ui->sent_format;
	at = put(p, y, x, STYLE_FORMAT0 + wanted, "%s", format_name(page, wanted));
	if (sent || (page->executed[g][l] != wanted && page->flipping)) {
		put(p, y, at, STYLE_WARN, "~");
		mark(p, y, x, k->cell_w - 1, MARK_PENDING);
	} else if (page->executed[g][l] != wanted)
		put(p, y, at, STYLE_BAD, "!%.*s", k->cell_w - (at - x) - 2, format_name(page, page->executed[g][l]));
	else if (next != PAGE_NONE && next != wanted) {
		at = put(p, y, at, STYLE_WARN, ">");
		if (k->cell_w - (at - x) > (int)strlen(format_name(page, next)))
			put(p, y, at, STYLE_FORMAT0 + next, "%s", format_name(page, next));
	}
}

/* What is within twice its error says so, and glows not. */
static void
draw_time(const struct pane *p, int y, int x, double v, double error, const struct look *k)
{
	bool sure = !(fabs(v) < 2 * error);
	int level = sure ? heat_level(&k->range, v) : 0;
	char buf[NUMBER_TEXT];

	if (fabs(v) < 9.95)
		snprintf(buf, sizeof(buf), "%.1f", v);
	else if (fabs(v) < 9999.5)
		snprintf(buf, sizeof(buf), "%.0f", v);
	else
		text_number(v, buf);
	put_heat(p, y, x, level);
	put(p, y, x + 1, !sure ? STYLE_DIM : v < 0 ? STYLE_BAD : STYLE_HEAT0 + (unsigned)level, "%s%s", buf, sure ? "" : "?");
}

static void
draw_value(const struct pane *p, int y, int x, double v, double error, const struct look *k)
{
	char buf[NUMBER_TEXT];

	if (isnan(v)) {
		put(p, y, x + 1, STYLE_DIM, "-");
		return;
	}
	if (k->what == SHOWS_TIME) {
		draw_time(p, y, x, v, error, k);
		return;
	}
	put_heat(p, y, x, heat_level(&k->range, v));
	put(p, y, x + 1, STYLE_HEAT0 + (unsigned)heat_level(&k->range, v), "%s", text_number(v, buf));
}

/* Of folded layers, the largest; and the error of that. */
static double
row_value(const struct octet_page *page, const struct look *k, uint32_t g, uint32_t row, double *error)
{
	uint32_t from = group_is_one(page, g) ? 0 : k->rows.from[row], to = group_is_one(page, g) ? 0 : k->rows.to[row];
	double most = value_of(page, k->what, g, from);

	*error = (double)page->saved_error_us[g][from];
	for (uint32_t l = from + 1; l <= to; l++) {
		double v = value_of(page, k->what, g, l);

		if (v > most || isnan(most))
			most = v, *error = (double)page->saved_error_us[g][l];
	}
	return most;
}

static void
draw_site(struct ui *ui, const struct pane *p, int y, uint32_t g, uint32_t row, const struct look *k)
{
	const struct octet_page *page = &ui->data.page;
	uint32_t l = group_is_one(page, g) ? 0 : k->rows.from[row];
	int x = LAYER_W + (int)g * k->cell_w;
	bool selected = false, cursor;

	if (!site_is(page, g, l) || (group_is_one(page, g) && row > 0))
		return;
	if (k->what == SHOWS_FORMAT)
		draw_format(ui, p, y, x, g, l, k);
	else {
		double error, v = row_value(page, k, g, row, &error);

		draw_value(p, y, x, v, error, k);
	}
	for (uint32_t i = l; i <= (group_is_one(page, g) ? 0 : k->rows.to[row]); i++)
		selected = selected || k->selected.at[g][i];
	cursor = g == ui->grid.group && (group_is_one(page, g) || rows_find(&k->rows, ui->grid.layer) == row);
	if (!ui->batch)
		mark(p, y, x, k->cell_w - 1, (selected ? MARK_SELECTED : 0) | (cursor ? MARK_CURSOR : 0));
	hit(p, y, x, k->cell_w, HIT_SITE, g, l);
}

static void
draw_row(struct ui *ui, const struct pane *p, int y, uint32_t row, const struct look *k)
{
	const struct octet_page *page = &ui->data.page;
	bool here = rows_find(&k->rows, ui->grid.layer) == row && !ui->batch;
	uint16_t from = k->rows.from[row], to = k->rows.to[row];
	char name[16];

	if (from == to)
		snprintf(name, sizeof(name), "%u", from);
	else
		snprintf(name, sizeof(name), "%u-%u", from, to);
	put(p, y, 0, here ? STYLE_TITLE : STYLE_DIM, "%c%6s", here && strlen(name) < 7 ? '>' : ' ', name);
	hit(p, y, 0, LAYER_W - 1, HIT_LAYER, 0, from);
	for (uint32_t g = 0; g < page->n_groups; g++)
		draw_site(ui, p, y, g, row, k);
}

/* A group flipped in all layers, where the sweep was by group. */
static void
draw_whole(const struct octet_page *page, const struct pane *p, int y, const struct look *k)
{
	put(p, y, 0, STYLE_DIM, "  group");
	for (uint32_t g = 0; g < page->n_groups; g++) {
		double v = k->what == SHOWS_KL ? (double)page->group_kl[g] : (double)page->group_saved_us[g];

		if (k->what == SHOWS_KL && v < 0)
			v = NAN;
		draw_value(p, y, LAYER_W + (int)g * k->cell_w, v, (double)page->group_saved_error_us[g], k);
	}
}

static void
draw_heads(struct ui *ui, const struct pane *p, int y, const struct look *k)
{
	const struct octet_page *page = &ui->data.page;
	char name[24];

	put(p, y, 2, STYLE_DIM, "layer");
	for (uint32_t g = 0; g < page->n_groups; g++) {
		int x = LAYER_W + (int)g * k->cell_w;
		bool here = g == ui->grid.group && !ui->batch;

		put(p, y, x, here ? STYLE_TITLE : STYLE_DIM, "%s", group_short(page, g, (size_t)k->cell_w - 1, name));
		hit(p, y, x, k->cell_w - 1, HIT_GROUP, g, 0);
	}
}

static void
draw_title(struct ui *ui, const struct pane *p, const struct look *k)
{
	const struct octet_page *page = &ui->data.page;
	char title[160], when[NUMBER_TEXT];

	if ((k->what == SHOWS_KL || k->what == SHOWS_TIME) && page->sweep_us == 0)
		snprintf(title, sizeof(title), "%s: no sweep yet (:sweep --by site --text FILE)", shows[k->what].title);
	else if (k->what == SHOWS_KL || k->what == SHOWS_TIME)
		snprintf(title, sizeof(title), "%s in %s, sweep of %s   %s", shows[k->what].title, page->sweep_format,
		    text_date(page->sweep_us, when) + 5, k->what == SHOWS_KL ? "m 1e-3  u 1e-6" : "? within its error");
	else if (k->what == SHOWS_FORMAT)
		snprintf(title, sizeof(title), "Formats%s   ~ on its way   ! runs as   > candidate", ui->grid.folded ? ", equal layers folded" : "");
	else
		snprintf(title, sizeof(title), "%s%s", shows[k->what].title, ui->grid.folded ? ", the largest of folded layers" : "");
	put_line(p, 0, title);
}

static bool
has_whole(const struct octet_page *page, enum shows what)
{
	bool any = false;

	for (uint32_t g = 0; g < page->n_groups; g++)
		any = any || (!group_is_one(page, g) && ((what == SHOWS_KL && page->group_kl[g] >= 0) ||
		    (what == SHOWS_TIME && isfinite(page->group_saved_us[g]))));
	return any;
}

int
grid_draw(struct ui *ui, const struct pane *p, enum shows what)
{
	const struct octet_page *page = &ui->data.page;
	struct list *l = &ui->grid.rows;
	struct look k = {.what = what};
	int whole = has_whole(page, what), height = p->height - 2 - whole, n;

	if (page->n_groups == 0 || page->n_layers == 0)
		return 0;
	k.range = range_of(page, what);
	k.cell_w = (p->width - LAYER_W - 1) / (int)page->n_groups;
	k.cell_w = k.cell_w > CELL_MAX ? CELL_MAX : k.cell_w < CELL_MIN ? CELL_MIN : k.cell_w;
	rows_make(page, ui->grid.folded, &k.rows);
	grid_sites(ui, &k.selected);
	l->at = (int)rows_find(&k.rows, ui->grid.layer);
	list_fit(l, (int)k.rows.n, height);
	n = (int)k.rows.n - l->top < height ? (int)k.rows.n - l->top : height;
	draw_title(ui, p, &k);
	draw_heads(ui, p, 1, &k);
	for (int i = 0; i < n; i++)
		draw_row(ui, p, 2 + i, (uint32_t)(l->top + i), &k);
	list_scrollbar(p, 2, p->width - 1, height, l->top, (int)k.rows.n);
	if (whole)
		draw_whole(page, p, 2 + n, &k);
	return 2 + n + whole;
}
