/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one question before something changes. Its answer carries the epoch that
 * was active when it was asked: what was shown is what is done, or it is refused.
 */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "tui/ui.h"

/* ---- sending ---- */

static unsigned
send_request(struct ui *ui, json_t *request, enum then then)
{
	if (ui->pending_ms >= 0 || request == NULL) {
		json_decref(request);
		ui_say(ui, true, "%s", request == NULL ? "out of memory" : "the last request is not answered yet");
		return REACT_DRAW;
	}
	json_decref(ui->request);
	ui->request = request, ui->request_then = then;
	return REACT_REQUEST | REACT_DRAW;
}

static json_t *
flip_request(const struct ui *ui)
{
	static char name[PAGE_GROUPS][SELECTOR_TEXT];
	const struct ask *a = &ui->ask;
	uint32_t n = sites_selectors(&ui->data.page, &a->effect.sites, name);
	json_t *rules = json_array(), *r;

	for (uint32_t i = 0; i < n; i++)
		json_array_append_new(rules, json_sprintf("%s=%s", name[i], format_name(&ui->data.page, a->format)));
	r = json_pack("{s:s,s:o,s:I}", "verb", "set", "rules", rules, "if_epoch", (json_int_t)a->epoch);
	if (r != NULL && a->confirm_s > 0)
		json_object_set_new(r, "confirm", json_integer(a->confirm_s));
	return r;
}

static json_t *
rollback_request(uint64_t if_epoch, bool has_to, uint64_t to, bool dry)
{
	json_t *r = json_pack("{s:s,s:b,s:I}", "verb", "rollback", "dry_run", dry, "if_epoch", (json_int_t)if_epoch);

	if (r != NULL && has_to)
		json_object_set_new(r, "to", json_integer((json_int_t)to));
	return r;
}

/* ---- asking ---- */

/* The cursor's, if it is selected; else the first. */
static bool
first_site(const struct ui *ui, const struct sites *s, uint32_t *group, uint32_t *layer)
{
	uint32_t g = ui->grid.group, l = group_is_one(&ui->data.page, g) ? 0 : ui->grid.layer;

	*group = g, *layer = l;
	if (g < PAGE_GROUPS && l < PAGE_LAYERS && s->at[g][l])
		return true;
	for (*group = 0; *group < PAGE_GROUPS; ++*group)
		for (*layer = 0; *layer < PAGE_LAYERS; ++*layer)
			if (s->at[*group][*layer])
				return true;
	return false;
}

unsigned
ask_flip(struct ui *ui)
{
	struct ask *a = &ui->ask;
	uint32_t g, l;

	if (!ui_may_change(ui))
		return REACT_DRAW;
	*a = (struct ask){.kind = ASK_FLIP, .epoch = ui->data.page.epoch};
	grid_sites(ui, &a->sites);
	if (!first_site(ui, &a->sites, &g, &l)) {
		ui_say(ui, true, "nothing is selected");
		return REACT_DRAW;
	}
	a->format = format_after(&ui->data.page, g, ui->data.page.wanted[g][l]);
	effect_measure(&ui->data.page, &a->sites, a->format, &a->effect);
	ui->mode = MODE_ASK;
	return REACT_DRAW;
}

/* The daemon says what it would be; the question follows its answer. */
static unsigned
ask_daemon(struct ui *ui, bool has_to, uint64_t to)
{
	if (!ui_may_change(ui))
		return REACT_DRAW;
	ui->ask = (struct ask){.kind = ASK_ROLLBACK, .epoch = ui->data.page.epoch, .has_to = has_to, .to = to};
	return send_request(ui, rollback_request(ui->ask.epoch, has_to, to, true), THEN_ASK_ROLLBACK);
}

unsigned
ask_rollback_to(struct ui *ui, uint64_t epoch)
{
	if (epoch == ui->data.page.epoch) {
		ui_say(ui, false, "epoch %" PRIu64 " is active", epoch);
		return REACT_DRAW;
	}
	return ask_daemon(ui, true, epoch);
}

static bool
is_own(const struct ui *ui, const struct page_history *h)
{
	bool own = h->pid == ui->pid;

	for (uint32_t i = 0; i < 16 && i < ui->n_children; i++)
		own = own || h->pid == ui->child[i];
	return own && h->uid == ui->uid && strcmp(h->result, "applied") == 0 && strncmp(h->why, "rollback", 8) != 0;
}

/* What this console did last goes back at once; what somebody else did, or what
 * is older, only after a question. */
unsigned
act_undo(struct ui *ui, int arg)
{
	const struct octet_page *p = &ui->data.page;
	bool own = ui->own_epoch != 0 && ui->own_epoch >= p->epoch; /* the page may be behind the answer */

	(void)arg;
	if (!ui_may_change(ui))
		return REACT_DRAW;
	if (!own && (p->n_history == 0 || p->history[0].epoch != p->epoch || !is_own(ui, &p->history[0])))
		return ask_daemon(ui, false, 0);
	ui->undone = own ? ui->own_epoch : p->epoch;
	return send_request(ui, rollback_request(ui->undone, false, 0, false), THEN_UNDONE);
}

unsigned
act_redo(struct ui *ui, int arg)
{
	(void)arg;
	if (!ui_may_change(ui))
		return REACT_DRAW;
	if (ui->undone == 0 || ui->undone_at != ui->data.page.epoch) {
		ui_say(ui, true, "nothing was undone here last; r returns to any epoch");
		return REACT_DRAW;
	}
	return send_request(ui, rollback_request(ui->data.page.epoch, true, ui->undone, false), THEN_FLIPPED);
}

unsigned
act_keep(struct ui *ui, int arg)
{
	uint64_t epoch = ui->data.page.unconfirmed_epoch;

	(void)arg;
	if (!ui_may_change(ui))
		return REACT_DRAW;
	if (epoch == 0) {
		ui_say(ui, false, "no change waits for a confirmation");
		return REACT_DRAW;
	}
	return send_request(ui, json_pack("{s:s,s:I}", "verb", "confirm", "epoch", (json_int_t)epoch), THEN_NOTHING);
}

unsigned
act_rollback(struct ui *ui, int arg)
{
	(void)arg;
	ui_say(ui, false, "choose an epoch; enter shows what returning to it changes, and asks");
	return ui_open_view(ui, ui_find_view("history"));
}

/* ---- answers ---- */

static unsigned
act_yes(struct ui *ui, int arg)
{
	struct ask *a = &ui->ask;

	(void)arg;
	if (!a->seen) {
		ui_say(ui, true, "y came before the question could be read: read it, then press y");
		return REACT_DRAW;
	}
	if (a->kind == ASK_FLIP && a->effect.n == 0) {
		ui_say(ui, false, "nothing would change: choose another format with space");
		return REACT_DRAW;
	}
	ui->mode = MODE_VIEW;
	if (a->kind == ASK_ROLLBACK)
		return send_request(ui, rollback_request(a->epoch, a->has_to, a->to, false), THEN_FLIPPED);
	ui->sent = a->effect.sites, ui->sent_format = a->format, ui->sending = true;
	return send_request(ui, flip_request(ui), THEN_FLIPPED);
}

static unsigned
act_no(struct ui *ui, int arg)
{
	(void)arg;
	ui->mode = MODE_VIEW;
	ui_say(ui, false, "nothing was changed");
	return REACT_DRAW;
}

static unsigned
act_format(struct ui *ui, int direction)
{
	const struct octet_page *p = &ui->data.page;
	struct ask *a = &ui->ask;

	if (a->kind != ASK_FLIP || p->n_formats == 0)
		return REACT_NONE;
	a->format = (uint8_t)((a->format + p->n_formats + (uint32_t)direction) % p->n_formats);
	effect_measure(p, &a->sites, a->format, &a->effect);
	return REACT_DRAW;
}

static unsigned
act_probation(struct ui *ui, int arg)
{
	static const uint32_t seconds[] = {0, 30, 120, 600};

	(void)arg;
	if (ui->ask.kind != ASK_FLIP)
		return REACT_NONE;
	for (size_t i = 0; i < 4; i++) {
		if (ui->ask.confirm_s == seconds[i]) {
			ui->ask.confirm_s = seconds[(i + 1) % 4];
			break;
		}
	}
	return REACT_DRAW;
}

const struct key ask_keys[] = {
	{{'y', 'Y'}, "y", "do it", act_yes, 0, "do it"},
	{{'n', K_ESC, 'q', CTRL('c')}, "n, esc", "leave all as it is", act_no, 0, "leave it"},
	{{' ', K_RIGHT, '\t'}, "space, right", "another format", act_format, 1, "other format"},
	{{K_LEFT, K_BTAB}, "left", "the format before", act_format, -1, NULL},
	{{'c'}, "c", "have it taken back by itself unless it is kept (K): 30 s, 2 min, 10 min", act_probation, 0, "taken back unless kept"},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

/* ---- replies ---- */

static const char *
text_of(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));

	return s != NULL ? s : "";
}

static unsigned
show_question(struct ui *ui, const json_t *reply)
{
	struct ask *a = &ui->ask;

	a->n = (uint32_t)json_integer_value(json_object_get(reply, "sites"));
	snprintf(a->change, sizeof(a->change), "%s", text_of(reply, "change"));
	if (a->n == 0)
		ui_say(ui, false, "nothing would change: that plan is active");
	else if (ui->mode == MODE_VIEW) /* or somebody types meanwhile */
		ui->mode = MODE_ASK;
	return REACT_DRAW;
}

unsigned
ui_reply(struct ui *ui, enum then then, int rc, const char *why, const json_t *reply)
{
	int64_t epoch = json_integer_value(json_object_get(reply, "epoch"));

	ui->sending = false;
	ui->pending_ms = -1;
	if (rc != 0) {
		ui_say(ui, true, "%s", why);
		return REACT_DRAW;
	}
	switch (then) {
	case THEN_ASK_ROLLBACK:
		return show_question(ui, reply);
	case THEN_HISTORY:
		history_reply(ui, reply);
		break;
	case THEN_UNDONE:
		ui->undone_at = (uint64_t)epoch, ui->own_epoch = 0;
		ui_say(ui, false, "epoch %" PRId64 ", undone (U does it again): %.250s", epoch, text_of(reply, "change"));
		break;
	case THEN_FLIPPED:
		ui->own_epoch = ui->ask.kind == ASK_FLIP ? (uint64_t)epoch : 0;
		ui_say(ui, false, "epoch %" PRId64 " (u undoes it): %.250s", epoch, text_of(reply, "change"));
		break;
	case THEN_NOTHING:
		ui_say(ui, false, "epoch %" PRId64 " stays", epoch);
		break;
	}
	return REACT_DRAW;
}

/* ---- the box ---- */

static double
percent(double from, double to)
{
	return from > 0 ? 100 * (to - from) / from : 0;
}

static void
text_from(const struct octet_page *p, const struct effect *e, char *buf, size_t len)
{
	uint32_t n[PAGE_FORMATS] = {0};
	size_t at = 0;

	for (uint32_t g = 0; g < p->n_groups; g++)
		for (uint32_t l = 0; l < p->n_layers; l++)
			if (e->sites.at[g][l] && p->wanted[g][l] < PAGE_FORMATS)
				n[p->wanted[g][l]]++;
	*buf = '\0';
	for (uint8_t f = 0; f < p->n_formats; f++)
		if (n[f] > 0 && at < len)
			at += (size_t)snprintf(buf + at, len - at, "%s%s", at > 0 ? ", " : "", format_name(p, f));
}

static int
draw_what(const struct ui *ui, const struct pane *p, int y)
{
	static char name[PAGE_GROUPS][SELECTOR_TEXT];
	const struct octet_page *page = &ui->data.page;
	const struct ask *a = &ui->ask;
	uint32_t n = sites_selectors(page, &a->effect.sites, name);
	char line[1024], from[96];
	size_t at = 0;

	text_from(page, &a->effect, from, sizeof(from));
	*line = '\0';
	for (uint32_t i = 0; i < n && at < 400; i++)
		at += (size_t)snprintf(line + at, sizeof(line) - at, "%s%.380s", i > 0 ? " " : "", name[i]);
	put(p, y, 0, STYLE_DIM, "sites");
	y = put_words(p, y, 9, STYLE_TITLE, a->effect.n > 0 ? line : "none: all have it, or cannot have it");
	put(p, y, 0, STYLE_DIM, "format");
	if (a->effect.n > 0)
		put(p, y++, 9, STYLE_TITLE, "%s -> %s", from, format_name(page, a->format));
	else
		put(p, y++, 9, STYLE_TITLE, "%s", format_name(page, a->format));
	if (a->effect.same + a->effect.cannot > 0)
		put(p, y++, 9, STYLE_DIM, "of the selection, %u already are %s and %u cannot be", a->effect.same, format_name(page, a->format),
		    a->effect.cannot);
	return y;
}

/* What a sweep measured, and whether that is more than its error; else what the bytes allow. */
static void
text_speed(const struct octet_page *page, const struct effect *e, char *line, size_t len)
{
	char a[NUMBER_TEXT], b[NUMBER_TEXT], now[NUMBER_TEXT];

	if (e->n_saved > 0)
		snprintf(line, len, "a decode step at batch 1 %s by %s +- %s (sweep, %u of %u sites); p50 now %s",
		    fabs(e->saved_us) < 2 * e->saved_error_us ? "hardly differs:" : e->saved_us >= 0 ? "shorter" : "longer",
		    text_us(fabs(e->saved_us), a), text_us(e->saved_error_us, b), e->n_saved, e->n,
		    text_ms(page->step_ms_p50 > 0 ? page->step_ms_p50 : -1, now));
	else if (e->read_after > 0 && e->read_before != e->read_after)
		snprintf(line, len, "%s %.2f times at batch 1, by the bytes; not measured%s", e->read_after < e->read_before ? "up to" : "down to",
		    e->read_before / e->read_after, page->sweep_us != 0 ? " by the last sweep" : ": no sweep yet");
	else
		snprintf(line, len, "not measured");
}

static int
draw_cost(const struct ui *ui, const struct pane *p, int y)
{
	const struct octet_page *page = &ui->data.page;
	const struct effect *e = &ui->ask.effect;
	char a[NUMBER_TEXT], b[NUMBER_TEXT], when[NUMBER_TEXT], line[300];

	put(p, y, 0, STYLE_DIM, "reads");
	if (e->read_before != e->read_after || e->kv_before == e->kv_after)
		put(p, y++, 9, STYLE_TEXT, "%s of weights a token, now %s (%+.1f %%)", text_bytes(e->read_after, a),
		    text_bytes(e->read_before, b), percent(e->read_before, e->read_after));
	if (e->kv_before != e->kv_after)
		put(p, y++, 9, STYLE_TEXT, "%s of KV a position, now %s (%+.1f %%)", text_bytes(e->kv_after, a), text_bytes(e->kv_before, b),
		    percent(e->kv_before, e->kv_after));
	put(p, y, 0, STYLE_DIM, "speed");
	text_speed(page, e, line, sizeof(line));
	y = put_words(p, y, 9, STYLE_TEXT, line);
	put(p, y, 0, STYLE_DIM, "quality");
	if (e->n_kl > 0)
		snprintf(line, sizeof(line), "KL %s %s than now: what was flipped alone, added up (sweep of %s, %u of %u sites)",
		    text_kl(fabs(e->kl), a), e->kl >= 0 ? "more" : "less", text_date(page->sweep_us, when), e->n_kl, e->n);
	else
		snprintf(line, sizeof(line), "KL not known: no sweep measured these sites in %s", format_name(page, ui->ask.format));
	return put_words(p, y, 9, STYLE_TEXT, line);
}

static void
draw_answers(const struct ui *ui, const struct pane *p, int y)
{
	const struct key *k = ask_keys;
	int x;

	x = put(p, y, 0, STYLE_KEY, "y");
	x = put(p, y, x, STYLE_TEXT, " do it   ");
	x = put(p, y, x, STYLE_KEY, "n");
	x = put(p, y, x, STYLE_TEXT, " leave it   ");
	if (ui->ask.kind == ASK_FLIP && k != NULL) {
		x = put(p, y, x, STYLE_KEY, "space");
		x = put(p, y, x, STYLE_TEXT, " other format   ");
		x = put(p, y, x, STYLE_KEY, "c");
		put(p, y, x, STYLE_TEXT, " on probation");
	}
}

static int
draw_flip(const struct ui *ui, const struct pane *in)
{
	int y = draw_cost(ui, in, draw_what(ui, in, 0));

	put(in, y, 0, STYLE_DIM, "stays");
	if (ui->ask.confirm_s > 0)
		put(in, y++, 9, STYLE_WARN, "%u s, then taken back unless kept with K", ui->ask.confirm_s);
	else
		put(in, y++, 9, STYLE_TEXT, "until it is changed; u undoes it at once");
	return y;
}

static int
draw_rollback(const struct ui *ui, const struct pane *in)
{
	const struct page_history *h = history_of(ui, ui->ask.has_to ? ui->ask.to : ui->data.page.epoch);
	char line[600], when[NUMBER_TEXT];
	int y = 0;

	if (h != NULL) {
		put(in, y, 0, STYLE_DIM, "%s", ui->ask.has_to ? "to" : "now");
		snprintf(line, sizeof(line), "epoch %" PRIu64 ", %s, by %s: %s", h->epoch, text_date(h->time_us, when), h->program,
		    *h->policy != '\0' ? h->policy : h->change);
		y = put_words(in, y, 9, STYLE_TEXT, line);
	}
	put(in, y, 0, STYLE_DIM, "changes");
	snprintf(line, sizeof(line), "%.500s", ui->ask.change);
	return put_words(in, y, 9, STYLE_TITLE, line);
}

void
ask_draw(struct ui *ui, const struct pane *p)
{
	const struct ask *a = &ui->ask;
	char title[64];
	struct pane in;
	int y;

	if (a->kind == ASK_FLIP)
		snprintf(title, sizeof(title), "Flip %u site%s?", a->effect.n, a->effect.n == 1 ? "" : "s");
	else if (a->has_to)
		snprintf(title, sizeof(title), "Return to epoch %" PRIu64 ": %u site%s?", a->to, a->n, a->n == 1 ? "" : "s");
	else
		snprintf(title, sizeof(title), "Roll back the last change: %u site%s?", a->n, a->n == 1 ? "" : "s");
	/* Drawn into no rows, it says how many it needs. */
	in = pane_part(p, p->height, 0, 0, p->width);
	in.width = p->width < 84 ? p->width - 8 : 76;
	y = a->kind == ASK_FLIP ? draw_flip(ui, &in) : draw_rollback(ui, &in);
	in = pane_box(p, y + 4 + (a->epoch != ui->data.page.epoch), in.width + 4, title);
	y = a->kind == ASK_FLIP ? draw_flip(ui, &in) : draw_rollback(ui, &in);
	if (a->epoch != ui->data.page.epoch)
		put(&in, y, 0, STYLE_BAD, "epoch %" PRIu64 " came meanwhile: this will be refused, ask anew", ui->data.page.epoch);
	draw_answers(ui, &in, in.height - 1);
}
