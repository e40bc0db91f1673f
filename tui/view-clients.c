/* SPDX-License-Identifier: Apache-2.0 */
/* Clients: who is connected and what each takes. */
#include <inttypes.h>
#include <stdlib.h>

#include "tui/ui.h"

enum order { ORDER_RATE, ORDER_TOKENS, ORDER_REQUESTS, ORDER_ID, N_ORDERS };

static const char *const order_name[N_ORDERS] = {"tokens/s", "tokens", "requests", "id"};

static double
key_of(const struct ui *ui, uint32_t i)
{
	const struct page_client *c = &ui->data.page.client[i];

	switch (ui->order) {
	case ORDER_RATE: return ui->data.client_rate[i];
	case ORDER_TOKENS: return (double)c->tokens;
	case ORDER_REQUESTS: return (double)c->requests;
	default: return -(double)c->id;
	}
}

/* Indices into the page; equal ones stay in its order. */
static uint32_t
sorted(const struct ui *ui, uint32_t at[PAGE_CLIENTS])
{
	uint32_t n = ui->data.page.n_clients;

	for (uint32_t i = 0; i < n; i++) {
		uint32_t k = i;

		for (; k > 0 && key_of(ui, at[k - 1]) < key_of(ui, i); k--)
			at[k] = at[k - 1];
		at[k] = i;
	}
	return n;
}

static int
count(const struct ui *ui)
{
	return (int)ui->data.page.n_clients;
}

static void
row_text(const struct ui *ui, int row, char *buf, size_t len)
{
	uint32_t at[PAGE_CLIENTS], n = sorted(ui, at);
	const struct page_client *c = &ui->data.page.client[at[(uint32_t)row < n ? (uint32_t)row : 0]];

	snprintf(buf, len, "%" PRIu64 " %u %u %s %s", c->id, c->uid, c->pid, c->program, c->policy);
}

static int
policy_width(const struct pane *p)
{
	return p->width > 100 ? 20 : p->width - 68;
}

/* "active" is the plan of the grid; ">" a rollout's candidate, as there. */
static void
draw_row(const struct pane *p, int y, const struct page_client *c, double rate, double most)
{
	char requests[NUMBER_TEXT], tokens[NUMBER_TEXT], per_s[NUMBER_TEXT];
	int x = put(p, y, 0, STYLE_TEXT, "%5" PRIu64 " %6u %7u %-13.13s %4u %4u %5s %6s %8s  ", c->id, c->uid, c->pid, c->program, c->running,
	    c->queued, text_number((double)c->requests, requests), text_number((double)c->tokens, tokens), text_number(rate, per_s));
	int width = policy_width(p);
	enum style style = *c->policy == '\0' ? STYLE_DIM : c->candidate ? STYLE_WARN : STYLE_TITLE;

	put(p, y, x, style, "%s%.*s", c->candidate ? ">" : "", width - (c->candidate != 0), *c->policy != '\0' ? c->policy : "active");
	x += width;
	if (p->width - x > 10)
		put_gauge(p, y, x + 2, p->width - x - 4 > 60 ? 60 : p->width - x - 4, STYLE_CURVE, most > 0 ? rate / most : 0);
}

static void
draw(struct ui *ui, const struct pane *p)
{
	uint32_t at[PAGE_CLIENTS], n = sorted(ui, at);
	struct list *l = ui_list(ui);
	double most = 0;

	list_fit(l, (int)n, p->height - 1);
	put(p, 0, 0, STYLE_DIM, "%5s %6s %7s %-13s %4s %4s %5s %6s %8s  policy", "id", "uid", "pid", "program", "run", "wait", "reqs", "tokens",
	    "tokens/s");
	if (p->width > 100)
		put(p, 0, p->width - 19, STYLE_DIM, "sorted by %s", order_name[ui->order]);
	if (n == 0)
		put(p, 2, 1, STYLE_DIM, "no client is connected");
	for (uint32_t i = 0; i < n; i++)
		most = ui->data.client_rate[i] > most ? ui->data.client_rate[i] : most;
	for (int i = 0; i < l->height && l->top + i < (int)n; i++) {
		uint32_t c = at[l->top + i];

		draw_row(p, 1 + i, &ui->data.page.client[c], ui->data.client_rate[c], most);
		if (l->top + i == l->at && !ui->batch)
			mark(p, 1 + i, 0, p->width, MARK_CURSOR);
		hit(p, 1 + i, 0, p->width, HIT_ROW, (uint32_t)(l->top + i), 0);
	}
	list_scrollbar(p, 1, p->width - 1, l->height, l->top, (int)n);
}

static unsigned
act_order(struct ui *ui, int arg)
{
	ui->order = (ui->order + arg) % N_ORDERS;
	ui_say(ui, false, "sorted by %s", order_name[ui->order]);
	return REACT_DRAW;
}

static const struct key keys[] = {
	{{'o'}, "o", "sort by tokens/s, tokens, requests, id in turn", act_order, 1, "sort"},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

const struct view view_clients = {
	.name = "clients", .title = "Clients", .about = "who is connected and what each takes", .draw = draw, .keys = keys, .count = count,
	.row_text = row_text,
};
