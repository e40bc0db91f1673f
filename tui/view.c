/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/view.h"

#include <string.h>
#include <time.h>

#define GRID_X 7
#define GRID_Y 5
#define COLUMN 6
#define MIN_WIDTH 64
#define MIN_HEIGHT 16

static const char *const select_name[] = {"cell", "row", "column", "all"};

/* "attention.q_proj" -> "q": heads of columns. */
static void
short_name(const char *group, char *buf, size_t len)
{
	const char *dot = strchr(group, '.'), *s = dot != NULL ? dot + 1 : group;
	size_t n = strcspn(s, "_");

	if (strcmp(group, "lm_head") == 0 || n == 0)
		n = strlen(s);
	if (n >= len)
		n = len - 1;
	if (n > COLUMN - 1)
		n = COLUMN - 1;
	memcpy(buf, s, n);
	buf[n] = '\0';
	if (strcmp(group, "lm_head") == 0)
		snprintf(buf, len, "head");
}

static bool
has_site(const struct view *v, uint32_t g, uint32_t l)
{
	return g < v->page.n_groups && l < v->page.n_layers && v->page.wanted[g][l] < v->page.n_formats;
}

static bool
is_group(const struct view *v, uint32_t g, const char *name)
{
	return strcmp(v->page.group[g], name) == 0;
}

void
view_move(struct view *v, int layers, int groups)
{
	int64_t l = (int64_t)v->layer + layers, g = (int64_t)v->group + groups;

	if (v->page.n_layers == 0 || v->page.n_groups == 0)
		return;
	if (g < 0)
		g = 0;
	if (g >= v->page.n_groups)
		g = v->page.n_groups - 1;
	if (l < 0)
		l = 0;
	if (l >= v->page.n_layers)
		l = v->page.n_layers - 1;
	v->group = (uint32_t)g;
	v->layer = (uint32_t)l;
}

bool
view_selected(const struct view *v, uint32_t group, uint32_t layer)
{
	if (!has_site(v, group, layer))
		return false;
	/* Globs select linear layers; the KV cache only by its own name. */
	switch (v->select) {
	case SELECT_CELL:
		return group == v->group && (layer == v->layer || is_group(v, group, "lm_head"));
	case SELECT_ROW:
		return layer == v->layer && !is_group(v, group, "lm_head") && !is_group(v, group, "kv_cache");
	case SELECT_COLUMN:
		return group == v->group;
	case SELECT_ALL:
		return !is_group(v, group, "kv_cache");
	}
	return false;
}

void
view_selector(const struct view *v, char *buf, size_t len)
{
	const char *group = v->page.group[v->group];

	if (v->select == SELECT_ALL)
		snprintf(buf, len, "*");
	else if (v->select == SELECT_ROW)
		snprintf(buf, len, "*@%u", v->layer);
	else if (v->select == SELECT_COLUMN || is_group(v, v->group, "lm_head"))
		snprintf(buf, len, "%s", group);
	else
		snprintf(buf, len, "%s@%u", group, v->layer);
}

const char *
view_next_format(const struct view *v)
{
	uint32_t g = v->group, l = is_group(v, g, "lm_head") ? 0 : v->layer;

	if (v->page.n_formats == 0 || !has_site(v, g, l))
		return "bf16";
	for (uint32_t i = 1; i < v->page.n_formats; i++) {
		uint32_t f = (v->page.wanted[g][l] + i) % v->page.n_formats;

		if (v->page.possible[g] >> f & 1)
			return v->page.format[f];
	}
	return v->page.format[v->page.wanted[g][l]];
}

static void
draw_header(const struct view *v, struct cells *s)
{
	const struct octet_page *p = &v->page;
	int64_t up = (p->updated_us - p->started_us) / 1000000;
	int x;

	x = cells_put(s, 0, 0, ROLE_TITLE, "octet %s", p->octet_version);
	x = cells_put(s, 0, x, ROLE_TEXT, "  %s  %s/%s  up %lld:%02d:%02d", p->model, p->backend, p->cpu_level,
	    (long long)(up / 3600), (int)(up / 60 % 60), (int)(up % 60));
	if (!v->connected)
		cells_put(s, 0, x + 2, ROLE_ERROR, "DISCONNECTED");
	x = cells_put(s, 1, 0, ROLE_TEXT, "policy ");
	x = cells_put(s, 1, x, ROLE_TITLE, "%s", p->policy);
	cells_put(s, 1, x, ROLE_TEXT, "  epoch %llu  plan %016llx  %u clients", (unsigned long long)p->epoch,
	    (unsigned long long)p->plan_digest, p->n_clients);
	cells_put(s, 2, 0, ROLE_TEXT, "%.1f tokens/s out, %.1f in  step %.2f/%.2f ms p50/p99  run %u queue %u  KV %u/%u",
	    p->tokens_per_s, p->prompt_per_s, p->step_ms_p50, p->step_ms_p99, p->running, p->queued, p->kv_pages_used,
	    p->kv_pages);
}

static void
draw_site(const struct view *v, struct cells *s, int y, uint32_t g, uint32_t l)
{
	const struct octet_page *p = &v->page;
	int role, x = GRID_X + (int)g * COLUMN;
	bool differs;

	if (!has_site(v, g, l)) {
		cells_put(s, y, x, ROLE_DIM, "%-*s", COLUMN - 1, is_group(v, g, "lm_head") ? "" : "-");
		return;
	}
	differs = p->executed[g][l] != p->wanted[g][l];
	role = ROLE_FORMAT0 + p->wanted[g][l];
	if (view_selected(v, g, l))
		role |= CELL_CURSOR;
	if (differs)
		role |= CELL_PENDING;
	cells_put(s, y, x, role, "%-*s", COLUMN - 1, p->format[p->wanted[g][l]]);
	if (differs)
		cells_put(s, y, x + COLUMN - 1, ROLE_ERROR, "!");
}

static void
draw_grid(struct view *v, struct cells *s, int rows)
{
	const struct octet_page *p = &v->page;
	char name[24];

	cells_put(s, GRID_Y - 1, 0, ROLE_DIM, "layer");
	for (uint32_t g = 0; g < p->n_groups; g++) {
		short_name(p->group[g], name, sizeof(name));
		cells_put(s, GRID_Y - 1, GRID_X + (int)g * COLUMN, g == v->group ? ROLE_TITLE : ROLE_DIM, "%s", name);
	}
	if (v->layer < v->scroll)
		v->scroll = v->layer;
	if (v->layer >= v->scroll + (uint32_t)rows)
		v->scroll = v->layer - (uint32_t)rows + 1;
	for (int i = 0; i < rows && v->scroll + (uint32_t)i < p->n_layers; i++) {
		uint32_t l = v->scroll + (uint32_t)i;

		cells_put(s, GRID_Y + i, 0, l == v->layer ? ROLE_TITLE : ROLE_DIM, "%5u", l);
		for (uint32_t g = 0; g < p->n_groups; g++)
			draw_site(v, s, GRID_Y + i, g, l);
	}
}

static void
draw_history(const struct view *v, struct cells *s, int y, int rows)
{
	for (uint32_t i = 0; i < v->page.n_history && (int)i < rows; i++) {
		const struct page_history *h = &v->page.history[i];
		time_t t = (time_t)(h->time_us / 1000000);
		struct tm tm;

		gmtime_r(&t, &tm);
		cells_put(s, y + (int)i, 0, i == 0 ? ROLE_TEXT : ROLE_DIM, "%6llu %02d:%02d:%02d %-8.8s %-9s %s: %s",
		    (unsigned long long)h->epoch, tm.tm_hour, tm.tm_min, tm.tm_sec, h->program, h->why, h->result, h->change);
	}
}

static void
draw_help(const struct view *v, struct cells *s)
{
	char buf[128];
	const char *line;

	cells_put(s, 0, 0, ROLE_TITLE, "octet-console: keys");
	for (unsigned i = 0; v->help_line != NULL && (line = v->help_line(i, buf, sizeof(buf))) != NULL; i++)
		cells_put(s, 2 + (int)i, 2, ROLE_TEXT, "%s", line);
}

static void
draw_bottom(const struct view *v, struct cells *s)
{
	char selector[64];
	int y = s->height - 1;

	view_selector(v, selector, sizeof(selector));
	if (*v->question != '\0')
		cells_put(s, y - 1, 0, ROLE_ASK, "%s", v->question);
	else if (*v->message != '\0')
		cells_put(s, y - 1, 0, v->message_bad ? ROLE_ERROR : ROLE_TEXT, "%s", v->message);
	cells_put(s, y, 0, ROLE_DIM, "%s %s  space:%s  tab:select  u:rollback  ?:help  q:quit",
	    select_name[v->select], selector, view_next_format(v));
}

void
view_draw(struct view *v, struct cells *s)
{
	int rows, history;

	if (s->width < MIN_WIDTH || s->height < MIN_HEIGHT) {
		cells_put(s, 0, 0, ROLE_ERROR, "too small: %dx%d", s->width, s->height);
		cells_put(s, 1, 0, ROLE_TEXT, "needs %dx%d", MIN_WIDTH, MIN_HEIGHT);
		return;
	}
	if (v->help) {
		draw_help(v, s);
		return;
	}
	view_move(v, 0, 0);
	/* History takes what the grid leaves, at least four lines. */
	rows = s->height - GRID_Y - 2;
	history = rows - (int)v->page.n_layers - 2;
	if (history < 4)
		history = 4;
	rows -= history + 2;
	draw_header(v, s);
	draw_grid(v, s, rows);
	cells_put(s, GRID_Y + rows + 1, 0, ROLE_DIM, " epoch time     program  why       result: change");
	draw_history(v, s, GRID_Y + rows + 2, history);
	draw_bottom(v, s);
}
