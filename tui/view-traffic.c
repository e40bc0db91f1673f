/* SPDX-License-Identifier: Apache-2.0 */
/* Traffic: what goes through, as curves over the last minutes; changes of the plan are marked under them. */
#include <inttypes.h>
#include <math.h>

#include "tui/ui.h"

#define LABEL_W 25
#define TWO_FROM 150 /* columns from which curves stand in two columns */

static const struct curve {
	enum series series, second;
	const char *title, *second_word; /* "p99" */
	const char *unit;
} curves[] = {
	{SERIES_OUTPUT, N_SERIES, "tokens/s out", "", ""},
	{SERIES_PROMPT, N_SERIES, "tokens/s in", "", ""},
	{SERIES_TTFT_P50, SERIES_TTFT_P99, "first token", "p99", "ms"},
	{SERIES_TOKEN_P50, SERIES_TOKEN_P99, "between tokens", "p99", "ms"},
	{SERIES_STEP_P50, SERIES_STEP_P99, "step", "p99", "ms"},
	{SERIES_ROWS, N_SERIES, "rows of a step", "", ""},
	{SERIES_QUEUED, SERIES_RUNNING, "waiting", "run", ""},
	{SERIES_KV, N_SERIES, "KV pages used", "", "%"},
	{SERIES_HITS, N_SERIES, "prefix hits", "", "%"},
};
#define N_CURVES (int)(sizeof(curves) / sizeof(*curves))

static double
now_of(const struct data *d, enum series s)
{
	int64_t end = d->page.updated_us / 1000000 + 1;

	return data_mean(d, s, end - 2, end);
}

static void
draw_curve(struct ui *ui, const struct pane *p, const struct curve *c, int64_t seconds)
{
	static float v[1024];
	int n = p->width - LABEL_W - 1;
	char a[NUMBER_TEXT], b[NUMBER_TEXT];
	double top = 0;

	n = n > 1024 ? 1024 : n;
	if (n < 1 || p->height < 1)
		return;
	data_columns(&ui->data, c->series, seconds, v, n);
	for (int i = 0; i < n; i++)
		top = (double)v[i] > top ? (double)v[i] : top;
	put(p, 0, 0, STYLE_TEXT, "%-14.14s", c->title);
	put(p, 0, 15, STYLE_TITLE, "%6s", text_number(now_of(&ui->data, c->series), a));
	put(p, 0, 22, STYLE_DIM, "%s", c->unit);
	if (p->height > 1) {
		if (c->second < N_SERIES)
			put(p, 1, 1, STYLE_DIM, "%s %s", c->second_word, text_number(now_of(&ui->data, c->second), a));
		put(p, p->height > 2 ? p->height - 1 : 1, p->height > 2 ? 1 : 15, STYLE_DIM, "top %s", text_number(top, b));
	}
	put_graph(p, 0, LABEL_W, p->height, v, n, top);
}

/* The epochs that came in this time, under the columns they came in. */
static void
draw_epochs(struct ui *ui, const struct pane *p, int y, int64_t seconds)
{
	int n = p->width - LABEL_W - 1, last = p->width;
	int64_t end = data_column_end(&ui->data, seconds);

	put(p, y, 0, STYLE_DIM, "epochs");
	for (uint32_t i = 0; i < ui->n_history; i++) {
		const struct page_history *h = &ui->history[i];
		int64_t back = (end - 1 - h->time_us / 1000000) / seconds;
		int x = LABEL_W + n - 1 - (int)(back < n ? back : n);
		char text[NUMBER_TEXT];
		int len;

		if (h->time_us / 1000000 >= end || back >= n)
			continue;
		len = snprintf(text, sizeof(text), "%" PRIu64, h->epoch);
		put_glyph(p, y, x, STYLE_EVENT, GLYPH_UP);
		if (x + 1 + len < last) {
			put(p, y, x + 1, STYLE_EVENT, "%s", text);
			last = x;
		}
	}
}

static void
draw_counts(struct ui *ui, const struct pane *p)
{
	const struct octet_page *d = &ui->data.page;
	char a[NUMBER_TEXT], b[NUMBER_TEXT];
	int x;

	x = put(p, 0, 0, STYLE_TEXT, "requests %s done", text_number((double)d->done, a));
	x = put(p, 0, x, d->failed > 0 ? STYLE_BAD : STYLE_TEXT, ", %s failed", text_number((double)d->failed, a));
	x = put(p, 0, x, STYLE_TEXT, ", %u run, %u wait", d->running, d->queued);
	if (d->queue_ms > 0)
		x = put(p, 0, x, STYLE_TEXT, " since %s", text_ms(d->queue_ms, a));
	if (d->preemptions > 0)
		x = put(p, 0, x, STYLE_WARN, "; preempted %s", text_number((double)d->preemptions, a));
	put(p, 0, x, STYLE_DIM, "; KV %s of %s", text_bytes((double)d->kv_bytes * (d->kv_pages > 0 ? (double)d->kv_pages_used / d->kv_pages : 0), a),
	    text_bytes((double)d->kv_bytes, b));
}

static void
draw(struct ui *ui, const struct pane *p)
{
	int columns = p->width >= TWO_FROM ? 2 : 1, rows = (N_CURVES + columns - 1) / columns;
	int width = p->width / columns, height = p->height - 2, y = 0;
	int64_t seconds = ui->zoom;
	struct pane part;

	draw_counts(ui, p);
	for (int row = 0; row < rows; row++) {
		int h = height / rows + (row < height % rows);

		h = h > 8 ? 8 : h;
		for (int c = 0; c < columns && row * columns + c < N_CURVES; c++) {
			part = pane_part(p, 1 + y, c * width, h - (h > 3), width);
			draw_curve(ui, &part, &curves[row * columns + c], seconds);
		}
		y += h;
	}
	for (int c = 0; c < columns; c++) {
		part = pane_part(p, 0, c * width, p->height, width);
		draw_epochs(ui, &part, 1 + y, seconds);
	}
	put(p, 1 + y, 7, STYLE_DIM, "%" PRId64 " s a column", seconds);
}

static unsigned
act_zoom(struct ui *ui, int arg)
{
	static const int steps[] = {1, 2, 5, 10};
	int i = 0;

	while (i < 3 && steps[i] < ui->zoom)
		i++;
	i += arg;
	ui->zoom = steps[i < 0 ? 0 : i > 3 ? 3 : i];
	return REACT_DRAW;
}

static const struct key keys[] = {
	{{'z'}, "z", "more time in the curves", act_zoom, 1, "zoom"},
	{{'Z'}, "Z", "less time in the curves", act_zoom, -1, NULL},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

const struct view view_traffic = {
	.name = "traffic", .title = "Traffic", .about = "requests, tokens, times and memory over the last minutes", .draw = draw,
	.keys = keys,
};
