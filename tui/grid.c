/* SPDX-License-Identifier: Apache-2.0 */
/* The grid of layers and groups: what is selected in it, what it shows, drawing it. */
#include <math.h>
#include <stdlib.h>
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

/* NAN: not measured. of: what was flipped for it, a sweep's numbers of more sites than one are shared out among them. */
struct value {
	double v, error;
	enum measured_of of;
};

static struct value
swept(const struct octet_page *p, enum shows what, uint32_t g, uint32_t l)
{
	struct measured m;

	site_measured(p, g, l, &m);
	return (struct value){(what == SHOWS_KL ? m.kl : m.saved_us) / m.n, m.saved_error_us / m.n, m.of};
}

static struct value
value_of(const struct octet_page *p, enum shows what, uint32_t g, uint32_t l)
{
	struct value v = {NAN, NAN, MEASURED_SITE};

	switch (what) {
	case SHOWS_KL:
	case SHOWS_TIME: return swept(p, what, g, l);
	case SHOWS_BYTES: v.v = (double)p->read_bytes[g][p->wanted[g][l]]; break;
	case SHOWS_ABSMAX: v.v = p->absmax[g][l] >= 0 ? (double)p->absmax[g][l] : NAN; break;
	case SHOWS_ZERO: v.v = p->absmax[g][l] >= 0 ? 100 * (double)p->zero[g][l] : NAN; break;
	case SHOWS_SATURATED: v.v = p->absmax[g][l] >= 0 ? 100 * (double)p->saturated[g][l] : NAN; break;
	case SHOWS_FORMAT:
	case N_SHOWS: break;
	}
	return v;
}

struct range {
	double low, high;
	bool logarithmic;
	bool shared; /* a value is a share of more sites' */
};

static struct range
range_of(const struct octet_page *p, enum shows what)
{
	struct range r = {INFINITY, 0, shows[what].logarithmic, false};

	for (uint32_t g = 0; g < p->n_groups; g++) {
		for (uint32_t l = 0; l < p->n_layers; l++) {
			struct value v;

			if (!site_is(p, g, l))
				continue;
			v = value_of(p, what, g, l);
			r.shared = r.shared || v.of > MEASURED_SITE;
			if (v.v > 0)
				r.low = fmin(r.low, v.v), r.high = fmax(r.high, v.v);
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

/* What is within twice its error, or has none, says so, and glows not. */
static bool
is_sure(const struct value *v, enum shows what)
{
	return what != SHOWS_TIME || fabs(v->v) >= 2 * v->error;
}

static void
text_value(const struct value *v, enum shows what, char buf[NUMBER_TEXT])
{
	char *end;

	if (what != SHOWS_TIME || fabs(v->v) >= 9999.5)
		text_number(v->v, buf);
	else
		snprintf(buf, NUMBER_TEXT, fabs(v->v) < 9.95 ? "%.1f" : "%.0f", v->v);
	/* "85.1u" is too long with a sign before it. */
	if (v->of > MEASURED_SITE && strlen(buf) > 4) {
		double number = strtod(buf, &end);
		char unit = *end;

		snprintf(buf, NUMBER_TEXT, "%.0f%.*s", number, unit != '\0', &unit);
	}
}

static void
draw_value(const struct pane *p, int y, int x, const struct value *v, const struct look *k)
{
	static const char *const sign[] = {[MEASURED_LAYER] = "=", [MEASURED_GROUP] = "|"};
	bool sure = is_sure(v, k->what), share = v->of > MEASURED_SITE;
	int level = sure ? heat_level(&k->range, v->v) : 0;
	char buf[NUMBER_TEXT];

	if (isnan(v->v)) {
		put(p, y, x + 1, STYLE_DIM, "-");
		return;
	}
	text_value(v, k->what, buf);
	put_heat(p, y, x, level);
	put(p, y, x + 1, !sure || share ? STYLE_DIM : v->v < 0 ? STYLE_BAD : STYLE_HEAT0 + (unsigned)level, "%s%s%s", share ? sign[v->of] : "", buf,
	    sure ? "" : "?");
}

/* Of folded layers, the largest. */
static struct value
row_value(const struct octet_page *page, const struct look *k, uint32_t g, uint32_t row)
{
	uint32_t from = group_is_one(page, g) ? 0 : k->rows.from[row], to = group_is_one(page, g) ? 0 : k->rows.to[row];
	struct value most = value_of(page, k->what, g, from);

	for (uint32_t l = from + 1; l <= to; l++) {
		struct value v = value_of(page, k->what, g, l);

		if (v.v > most.v || isnan(most.v))
			most = v;
	}
	return most;
}

/* The cursor leaves the glow: inverted it would be another. */
static void
mark_site(const struct pane *p, int y, int x, const struct look *k, bool selected, bool cursor)
{
	int glow = k->what != SHOWS_FORMAT;

	mark(p, y, x, k->cell_w - 1, selected ? MARK_SELECTED : 0);
	mark(p, y, x + glow, k->cell_w - 1 - glow, cursor ? MARK_CURSOR : 0);
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
		struct value v = row_value(page, k, g, row);

		draw_value(p, y, x, &v, k);
	}
	for (uint32_t i = l; i <= (group_is_one(page, g) ? 0 : k->rows.to[row]); i++)
		selected = selected || k->selected.at[g][i];
	cursor = g == ui->grid.group && (group_is_one(page, g) || rows_find(&k->rows, ui->grid.layer) == row);
	if (!ui->batch)
		mark_site(p, y, x, k, selected, cursor);
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
		struct value v = {(double)page->group_saved_us[g], (double)page->group_saved_error_us[g], MEASURED_SITE};

		if (k->what == SHOWS_KL)
			v.v = page->group_kl[g] < 0 ? NAN : (double)page->group_kl[g];
		draw_value(p, y, LAYER_W + (int)g * k->cell_w, &v, k);
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

/* Only what finds room as a whole. */
static void
add_title(char title[160], int width, const char *text)
{
	size_t n = strlen(title);

	if ((int)(n + strlen(text)) + 5 <= width)
		snprintf(title + n, 160 - n, "%s", text);
}

static void
text_title(const struct ui *ui, const struct pane *p, const struct look *k, char title[160])
{
	const struct octet_page *page = &ui->data.page;
	bool sweep = k->what == SHOWS_KL || k->what == SHOWS_TIME;
	char when[NUMBER_TEXT], text[80];

	snprintf(title, 160, "%s", k->what == SHOWS_KL && k->range.shared ? "KL of a site" : shows[k->what].title);
	if (sweep && page->sweep_us == 0) {
		add_title(title, p->width, ": no sweep yet");
		add_title(title, p->width, " (:sweep --by site --text FILE)");
		return;
	}
	if (ui->grid.folded && !sweep)
		add_title(title, p->width, k->what == SHOWS_FORMAT ? ", equal layers folded" : ", the largest of folded layers");
	if (k->what == SHOWS_FORMAT)
		add_title(title, p->width, "   ~ on its way   ! runs as   > candidate");
	if (!sweep)
		return;
	snprintf(text, sizeof(text), " in %s", page->sweep_format);
	add_title(title, p->width, text);
	if (k->range.shared)
		add_title(title, p->width, "   share of = layer | group");
	if (k->what == SHOWS_TIME)
		add_title(title, p->width, "   ? unsure");
	if (ui->grid.folded)
		add_title(title, p->width, "   the largest of folded");
	snprintf(text, sizeof(text), "   sweep of %s", text_date(page->sweep_us, when) + 5);
	add_title(title, p->width, text);
	if (k->what == SHOWS_KL)
		add_title(title, p->width, "   m 1e-3  u 1e-6");
}

static void
draw_title(struct ui *ui, const struct pane *p, const struct look *k)
{
	char title[160];

	text_title(ui, p, k, title);
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
