/* SPDX-License-Identifier: Apache-2.0 */
/* Precision: layers x groups, what each site runs; over the same grid what each costs. */
#include <ctype.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tui/ui.h"

#define LAYER_W 8
#define CELL_MIN 6
#define CELL_MAX 11
#define SIDE_W 42
#define SIDE_FROM 112 /* columns from which the side is shown, */
#define TWO_FROM 180  /* and a second grid */
#define FOOT 5
#define BATCH_ROWS 32 /* more layers are folded in --batch */

static const struct {
	const char *title;
	bool logarithmic;
} shows[N_SHOWS] = {
	[SHOWS_FORMAT] = {"Formats", false},
	[SHOWS_KL] = {"KL of each site flipped alone", true},
	[SHOWS_TIME] = {"Time a decode step saves, us", false},
	[SHOWS_BYTES] = {"Bytes a token reads", false},
	[SHOWS_ABSMAX] = {"Largest input", false},
	[SHOWS_ZERO] = {"Inputs that FP8 makes 0, %", true},
	[SHOWS_SATURATED] = {"Inputs at FP8's largest, %", true},
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

static void
draw_value(const struct pane *p, int y, int x, double v, const struct look *k)
{
	char buf[NUMBER_TEXT];

	if (isnan(v)) {
		put(p, y, x + 1, STYLE_DIM, "-");
		return;
	}
	put_heat(p, y, x, heat_level(&k->range, v));
	put(p, y, x + 1, STYLE_HEAT0 + (unsigned)heat_level(&k->range, v), "%s", text_number(v, buf));
}

/* Of folded layers, the largest. */
static double
row_value(const struct octet_page *page, const struct look *k, uint32_t g, uint32_t row)
{
	uint32_t from = group_is_one(page, g) ? 0 : k->rows.from[row], to = group_is_one(page, g) ? 0 : k->rows.to[row];
	double most = value_of(page, k->what, g, from);

	for (uint32_t l = from + 1; l <= to; l++)
		most = fmax(most, value_of(page, k->what, g, l));
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
	else
		draw_value(p, y, x, row_value(page, k, g, row), k);
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
		draw_value(p, y, LAYER_W + (int)g * k->cell_w, v, k);
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
		snprintf(title, sizeof(title), "%s: no sweep yet (octetctl sweep --by site)", shows[k->what].title);
	else if (k->what == SHOWS_KL || k->what == SHOWS_TIME)
		snprintf(title, sizeof(title), "%s (%s, sweep of %s)", shows[k->what].title, page->sweep_format,
		    text_date(page->sweep_us, when));
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
		any = any || (what == SHOWS_KL && page->group_kl[g] >= 0) || (what == SHOWS_TIME && isfinite(page->group_saved_us[g]));
	return any;
}

/* Title, heads and rows; returns the row after it. */
static int
draw_grid(struct ui *ui, const struct pane *p, enum shows what)
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
	char kl[NUMBER_TEXT], us[NUMBER_TEXT];

	if (p->kl[g][l] < 0)
		snprintf(buf, len, "%s", p->sweep_us != 0 ? "the last sweep did not flip it alone" : "no sweep yet");
	else
		snprintf(buf, len, "KL %s, saves %s us in %s", text_number((double)p->kl[g][l], kl),
		    text_number((double)p->saved_us[g][l], us), p->sweep_format);
}

static void
text_inputs(const struct octet_page *p, uint32_t g, uint32_t l, char *buf, size_t len)
{
	char max[NUMBER_TEXT];

	if (p->absmax[g][l] < 0)
		snprintf(buf, len, "inputs not measured");
	else
		snprintf(buf, len, "largest input %s; FP8 makes %.2g %% 0, %.2g %% its largest", text_number((double)p->absmax[g][l], max),
		    100 * (double)p->zero[g][l], 100 * (double)p->saturated[g][l]);
}

static void
draw_foot(struct ui *ui, const struct pane *p)
{
	const struct octet_page *page = &ui->data.page;
	uint32_t g = ui->grid.group, l = group_is_one(page, g) ? 0 : ui->grid.layer;
	char name[64], a[SELECTOR_TEXT], b[160], bytes[NUMBER_TEXT];

	site_name(page, g, l, name, sizeof(name));
	put_line(p, 0, ui->batch ? "Plan" : name);
	text_plan(page, a, sizeof(a));
	if (ui->batch) {
		put(p, 1, 1, STYLE_TEXT, "%s", a);
		return;
	}
	put(p, 4, 1, STYLE_TEXT, "%s", a);
	if (site_is(page, g, l)) {
		text_formats(page, g, l, a, sizeof(a));
		text_sweep(page, g, l, b, sizeof(b));
		put(p, 1, 1, STYLE_TEXT, "%s; reads %s; %s", a, text_bytes((double)page->read_bytes[g][page->wanted[g][l]], bytes), b);
		text_inputs(page, g, l, a, sizeof(a));
		put(p, 2, 1, STYLE_TEXT, "%s", a);
	}
	text_selected(ui, a, sizeof(a));
	put(p, 3, 1, STYLE_KEY, "%s", a);
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

static void
side_changes(struct ui *ui, const struct pane *p, int y)
{
	if (y + 2 > p->height)
		return;
	put_line(p, y++, "Changes");
	for (uint32_t i = 0; i < ui->n_history && y < p->height; i++) {
		const struct page_history *h = &ui->history[i];
		char when[NUMBER_TEXT];

		put(p, y++, 1, i == 0 ? STYLE_TEXT : STYLE_DIM, "%4" PRIu64 " %s %.8s %s", h->epoch, text_time(h->time_us, when), h->program,
		    *h->change != '\0' ? h->change : h->why);
	}
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

/* Beside the grid what the sites cost, and below where there is room, what that saves and how their inputs fit. */
static void
draw_others(struct ui *ui, const struct pane *p, int y, int width)
{
	struct pane more = pane_part(p, 0, width / 2 + 1, p->height, width - width / 2 - 1);

	draw_grid(ui, &more, ui->grid.shows == SHOWS_FORMAT ? SHOWS_KL : SHOWS_FORMAT);
	if (y + 2 + y > p->height)
		return;
	more = pane_part(p, y + 1, 0, p->height - y - 1, width / 2 - 1);
	draw_grid(ui, &more, SHOWS_TIME);
	more = pane_part(p, y + 1, width / 2 + 1, p->height - y - 1, width - width / 2 - 1);
	draw_grid(ui, &more, SHOWS_ZERO);
}

static void
draw(struct ui *ui, const struct pane *p)
{
	bool side = p->width >= SIDE_FROM, two = p->width >= TWO_FROM;
	int foot = side ? 0 : ui->batch ? 2 : FOOT, width = side ? p->width - SIDE_W - 2 : p->width;
	struct pane grid = pane_part(p, 0, 0, p->height - foot, two ? width / 2 - 1 : width), more;
	int y;

	if (ui->data.page.n_layers > 0 && ui->grid.layer >= ui->data.page.n_layers)
		ui->grid.layer = ui->data.page.n_layers - 1;
	if (ui->data.page.n_groups > 0 && ui->grid.group >= ui->data.page.n_groups)
		ui->grid.group = ui->data.page.n_groups - 1;
	choose_folding(ui, grid.height - 2);
	y = draw_grid(ui, &grid, ui->grid.shows);
	if (two)
		draw_others(ui, p, y, width);
	if (side) {
		more = pane_part(p, 0, p->width - SIDE_W, p->height, SIDE_W);
		draw_side(ui, &more);
	} else {
		more = pane_part(p, y < p->height - foot ? y : p->height - foot, 0, foot, p->width);
		draw_foot(ui, &more);
	}
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
	bool digits = *text != '\0' && text[strspn(text, "0123456789")] == '\0';
	char name[64], line[128];

	for (uint32_t i = 1; i <= n; i++) {
		uint32_t at = direction > 0 ? (from + i) % n : (from + n - i) % n, l = at / p->n_groups, g = at % p->n_groups;

		if (digits ? l != strtoul(text, NULL, 10) || g != ui->grid.group : !site_is(p, g, l))
			continue;
		site_name(p, g, l, name, sizeof(name));
		snprintf(line, sizeof(line), "%s %s", name, format_name(p, p->wanted[g][l]));
		if (!digits && !text_has(line, text))
			continue;
		ui->grid.layer = l, ui->grid.group = g;
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
	{{' ', K_ENTER}, "space, enter", "flip the selection: shows what changes, and asks", act_flip, 0},
	{{K_UP, 'k'}, "up, k", "layer before", act_go, GO_UP},
	{{K_DOWN, 'j'}, "down, j", "layer after", act_go, GO_DOWN},
	{{K_LEFT, 'h'}, "left, h", "group before", act_go, GO_LEFT},
	{{K_RIGHT, 'l'}, "right, l", "group after", act_go, GO_RIGHT},
	{{K_PPAGE, CTRL('b')}, "page up", "a page up", act_go, GO_PAGE_UP},
	{{K_NPAGE, CTRL('f')}, "page down", "a page down", act_go, GO_PAGE_DOWN},
	{{K_HOME, 'g'}, "home, g", "first layer", act_go, GO_FIRST},
	{{K_END, 'G'}, "end, G", "last layer", act_go, GO_LAST},
	{{'0', '^'}, "0, ^", "first group", act_go, GO_FIRST_GROUP},
	{{'$'}, "$", "last group", act_go, GO_LAST_GROUP},
	{{'e', K_ESC}, "e, esc", "select the cell", act_select, SELECT_CELL},
	{{'x'}, "x", "select the layer: its linear groups", act_select, SELECT_LAYER},
	{{'c'}, "c", "select the column: the group in all layers", act_select, SELECT_GROUP},
	{{'m'}, "m", "select the module: attention.* or mlp.*", act_select, SELECT_MODULE},
	{{'v'}, "v", "select a block from here to where you move", act_select, SELECT_BLOCK},
	{{'a'}, "a", "select all linear groups and lm_head", act_select, SELECT_ALL},
	{{'s'}, "s", "select by a selector: mlp.*@0-3,-1", act_prompt, 's'},
	{{'d'}, "d", "show formats, KL, time, bytes, inputs in turn", act_shows, 1},
	{{'D'}, "D", "the same backwards", act_shows, -1},
	{{'f'}, "f", "fold layers that are alike, or unfold them", act_fold, 0},
	{{0}, NULL, NULL, NULL, 0},
};

const struct view view_precision = {
	.name = "precision", .title = "Precision", .about = "what each site runs, and what flipping it costs and saves",
	.draw = draw, .keys = keys, .batch_height = batch_height, .find = find, .click = click, .wheel = wheel,
};
