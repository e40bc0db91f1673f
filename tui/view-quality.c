/* SPDX-License-Identifier: Apache-2.0 */
/* Quality: the guardrail's gauge, both sides of a rollout, evals. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "tui/ui.h"

static int
count(const struct ui *ui)
{
	return (int)ui->data.page.n_evals;
}

static void
row_text(const struct ui *ui, int row, char *buf, size_t len)
{
	const struct page_eval *e = &ui->data.page.eval[row];

	snprintf(buf, len, "%" PRIu64 " %s %s %s", e->id, e->baseline, e->candidate, e->corpus);
}

/* ---- shadow ---- */

/* How much of its bound is used up. */
static void
draw_gauge(const struct pane *p, int y, const char *what, double got, double bound, const char *text)
{
	double share = bound > 0 ? got / bound : 0;
	enum style style = share >= 1 ? STYLE_BAD : share > 0.7 ? STYLE_WARN : STYLE_GOOD;
	int width = p->width > 100 ? 40 : p->width < 80 ? 18 : 24;

	put(p, y, 1, STYLE_TEXT, "%-10s", what);
	if (bound > 0) {
		put_gauge(p, y, 12, width, style, share);
		put(p, y, 13 + width, style, "%s (%.0f %% of the bound)", text, 100 * fmin(share, 99));
	} else
		put(p, y, 12, STYLE_TEXT, "%s, no bound", text);
}

static int
draw_measured(const struct pane *p, int y, const struct page_shadow *s, bool is_baseline)
{
	char kl[NUMBER_TEXT], bound[NUMBER_TEXT], text[96];

	if (s->requests == 0) {
		put(p, y, 1, STYLE_DIM, is_baseline ? "it is the baseline: nothing to measure" : "not measured yet");
		return y + 1;
	}
	snprintf(text, sizeof(text), "%s of %s", text_kl(s->kl, kl), s->max_kl > 0 ? text_kl(s->max_kl, bound) : "any");
	draw_gauge(p, y++, "KL", s->kl, s->max_kl, text);
	if (s->min_agree > 0)
		snprintf(text, sizeof(text), "%.2f %%, least %.2f %%", 100 * s->agree, 100 * s->min_agree);
	else
		snprintf(text, sizeof(text), "%.2f %%", 100 * s->agree);
	draw_gauge(p, y++, "agreement", 1 - s->agree, s->min_agree > 0 ? 1 - s->min_agree : 0, text);
	return y;
}

static int
draw_shadow(struct ui *ui, const struct pane *p, int y)
{
	const struct octet_page *d = &ui->data.page;
	char title[120], a[NUMBER_TEXT];

	snprintf(title, sizeof(title), "Shadow: the active plan against %s", *d->shadow_baseline != '\0' ? d->shadow_baseline : "the baseline");
	put_line(p, y++, title);
	if (d->shadow_sample <= 0 && d->shadow_scored == 0) {
		put(p, y, 1, STYLE_DIM, "off: [shadow] sample in octet.ini(5) is 0");
		return y + 1;
	}
	y = draw_measured(p, y, &d->shadow, strcmp(d->policy, d->shadow_baseline) == 0);
	put(p, y, 1, STYLE_DIM, "%.3g %% of the requests are scored: %s so far, %" PRIu64 " wait, %" PRIu64 " dropped", 100 * d->shadow_sample,
	    text_number((double)d->shadow_scored, a), d->shadow_waiting, d->shadow_dropped);
	if (d->shadow_cooldown_s > 0)
		put(p, y, p->width - 26, STYLE_WARN, "guardrail acted, %u s rest", d->shadow_cooldown_s);
	return y + 1;
}

/* ---- rollout ---- */

static void
draw_pair(const struct pane *p, int y, const char *what, double a, double b, bool more_is_worse)
{
	double by = a > 0 ? 100 * (b - a) / a : 0;
	char ta[NUMBER_TEXT], tb[NUMBER_TEXT];

	/* Times of nothing are none. */
	put(p, y, 1, STYLE_TEXT, "%-18s %10s %10s", what, text_number(more_is_worse && a <= 0 ? NAN : a, ta),
	    text_number(more_is_worse && b <= 0 ? NAN : b, tb));
	if (more_is_worse && a > 0 && b > 0)
		put(p, y, 42, by > 5 ? STYLE_BAD : by < -5 ? STYLE_GOOD : STYLE_DIM, "%+7.1f %%", by);
}

static void
draw_guard(const struct octet_page *d, const struct pane *p, int y)
{
	int x = put(p, y, 1, STYLE_DIM, "guard:");

	if (d->guard_kl > 0)
		x = put(p, y, x, STYLE_DIM, " KL %g", d->guard_kl);
	if (d->guard_agree > 0)
		x = put(p, y, x, STYLE_DIM, " agreement %g", d->guard_agree);
	if (d->guard_p99 > 0)
		x = put(p, y, x, STYLE_DIM, " p99 %+g %%", 100 * d->guard_p99);
	if (d->guard_kl <= 0 && d->guard_agree <= 0 && d->guard_p99 <= 0)
		put(p, y, x, STYLE_WARN, " none");
}

static int
draw_rollout(struct ui *ui, const struct pane *p, int y)
{
	const struct octet_page *d = &ui->data.page;
	const struct page_side *a = &d->side[0], *b = &d->side[1];
	char title[160];

	if (*d->rollout == '\0') {
		put_line(p, y++, "Rollout");
		put(p, y, 1, STYLE_DIM, "none; :rollout start POLICY --percent P");
		return y + 1;
	}
	snprintf(title, sizeof(title), "Rollout of %s: %g %% by %s, epoch %" PRIu64, d->rollout, d->rollout_percent,
	    d->rollout_by_request ? "request" : "client", d->rollout_epoch);
	put_line(p, y++, title);
	put(p, y++, 20, STYLE_DIM, "%10s %10s", "active", "candidate");
	draw_pair(p, y++, "requests", (double)a->requests, (double)b->requests, false);
	draw_pair(p, y++, "failed", (double)a->failed, (double)b->failed, false);
	draw_pair(p, y++, "first token ms p50", a->ttft_ms_p50, b->ttft_ms_p50, true);
	draw_pair(p, y++, "first token ms p99", a->ttft_ms_p99, b->ttft_ms_p99, true);
	draw_pair(p, y++, "each token ms p50", a->token_ms_p50, b->token_ms_p50, true);
	draw_pair(p, y++, "each token ms p99", a->token_ms_p99, b->token_ms_p99, true);
	y = draw_measured(p, y, &d->candidate_shadow, strcmp(d->rollout, d->shadow_baseline) == 0);
	draw_guard(d, p, y);
	return y + 1;
}

static int
draw_surge(struct ui *ui, const struct pane *p, int y)
{
	const struct octet_page *d = &ui->data.page;

	if (*d->surge_policy == '\0')
		return y;
	put(p, y, 1, strcmp(d->surge_state, "on") == 0 ? STYLE_WARN : STYLE_DIM, "surge to %s: %s, %" PRIu64 " so far", d->surge_policy,
	    d->surge_state, d->surges);
	return y + 1;
}

/* ---- evals ---- */

/* Of "baseline -> candidate". */
static int
pair_width(const struct pane *p)
{
	return p->width <= 100 ? 23 : p->width < 140 ? 30 : 44;
}

static void
draw_eval(const struct pane *p, int y, const struct page_eval *e)
{
	double ppl = e->perplexity_base > 0 ? 100 * (e->perplexity - e->perplexity_base) / e->perplexity_base : 0;
	double speed = e->tokens_per_s_base > 0 ? 100 * (e->tokens_per_s - e->tokens_per_s_base) / e->tokens_per_s_base : 0;
	char when[NUMBER_TEXT], kl[NUMBER_TEXT], p99[NUMBER_TEXT], tokens[NUMBER_TEXT], pair[140];
	bool wide = p->width > 100;
	int pair_w = pair_width(p);
	const char *slash = strrchr(e->corpus, '/');

	snprintf(pair, sizeof(pair), "%s -> %s", e->baseline, e->candidate);
	put(p, y, 0, STYLE_TEXT, "%5" PRIu64 " %s %-*.*s", e->id, text_date(e->time_us, when) + (wide ? 0 : 5), pair_w, pair_w, pair);
	put(p, y, pair_w + (wide ? 24 : 19), STYLE_TEXT, "%7s %+7.2f %%  %6.2f %% %+6.1f %%", text_kl(e->kl_mean, kl), ppl, 100 * e->top1, speed);
	if (wide)
		put(p, y, pair_w + 62, STYLE_DIM, "%8s %7s  %s", text_kl(e->kl_p99, p99), text_number((double)e->tokens, tokens), slash != NULL ? slash + 1 : e->corpus);
}

static void
draw_evals(struct ui *ui, const struct pane *p)
{
	const struct octet_page *d = &ui->data.page;
	struct list *l = ui_list(ui);
	bool wide = p->width > 100;
	int pair_w = pair_width(p);

	put_line(p, 0, "Evals");
	put(p, 1, 0, STYLE_DIM, "%5s %-*s %s", "id", wide ? 16 : 11, "time UTC", "baseline -> candidate");
	put(p, 1, pair_w + (wide ? 24 : 19), STYLE_DIM, "%7s %9s  %8s %8s", "KL", "ppl", "top-1", "speed");
	if (wide)
		put(p, 1, pair_w + 62, STYLE_DIM, "%8s %7s  %s", "KL p99", "tokens", "text");
	list_fit(l, (int)d->n_evals, p->height - 2);
	if (d->n_evals == 0)
		put(p, 2, 1, STYLE_DIM, "none; :eval --candidate POLICY --text FILE, :sweep --by site --text FILE");
	for (int i = 0; i < l->height && l->top + i < (int)d->n_evals; i++) {
		draw_eval(p, 2 + i, &d->eval[l->top + i]);
		if (l->top + i == l->at && !ui->batch)
			mark(p, 2 + i, 0, p->width, MARK_CURSOR);
		hit(p, 2 + i, 0, p->width, HIT_ROW, (uint32_t)(l->top + i), 0);
	}
	list_scrollbar(p, 2, p->width - 1, l->height, l->top, (int)d->n_evals);
}

static void
draw(struct ui *ui, const struct pane *p)
{
	struct pane left = *p, rest;
	int y;

	if (p->width >= 150) {
		left = pane_part(p, 0, 0, p->height, p->width / 2 - 1);
		y = draw_shadow(ui, &left, 0);
		draw_surge(ui, &left, y);
		left = pane_part(p, 0, p->width / 2 + 1, p->height, p->width - p->width / 2 - 1);
		y = draw_rollout(ui, &left, 0);
		y = y < 7 ? 7 : y;
	} else
		y = draw_rollout(ui, p, draw_surge(ui, p, draw_shadow(ui, p, 0)));
	rest = pane_part(p, y < p->height - 4 ? y : p->height - 4, 0, p->height, p->width);
	pane_clear(&rest);
	draw_evals(ui, &rest);
}

static int
batch_height(const struct ui *ui, int width)
{
	(void)width;
	return 18 + (int)ui->data.page.n_evals;
}

static unsigned
act_show(struct ui *ui, int arg)
{
	char command[64];

	(void)arg;
	if (ui->data.page.n_evals == 0)
		return REACT_NONE;
	snprintf(command, sizeof(command), "evals show %" PRIu64, ui->data.page.eval[ui_list(ui)->at].id);
	return command_run(ui, command);
}

static const struct key keys[] = {
	{{K_ENTER}, "enter", "all that the eval measured: octetctl evals show", act_show, 0, "show"},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

const struct view view_quality = {
	.name = "quality", .title = "Quality", .about = "the guardrail's gauge, rollout, evals", .draw = draw, .keys = keys, .count = count,
	.row_text = row_text, .batch_height = batch_height,
};
