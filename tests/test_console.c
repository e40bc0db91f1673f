/* SPDX-License-Identifier: Apache-2.0 */
/* The console's parts without a terminal: selectors, what a flip would do,
 * folding, the memory of the last minutes, records, command lines. */
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "tui/record.h"
#include "tui/ui.h"

static struct octet_page page;
static struct ui ui;

/* Eight layers, four groups. */
static void
make_page(void)
{
	static const char *const group[] = {"attention.q_proj", "attention.k_proj", "lm_head", "kv_cache"};

	memset(&page, 0, sizeof(page));
	page.magic = PAGE_MAGIC, page.version = PAGE_VERSION, page.bytes = sizeof(page);
	page.n_layers = 8, page.n_groups = 4, page.n_formats = 2, page.pid = 1;
	page.updated_us = 1000000000, page.epoch = 3;
	memset(page.wanted, PAGE_NONE, sizeof(page.wanted));
	memset(page.executed, PAGE_NONE, sizeof(page.executed));
	memset(page.candidate, PAGE_NONE, sizeof(page.candidate));
	strcpy(page.format[0], "bf16"), strcpy(page.format[1], "fp8");
	for (uint32_t g = 0; g < 4; g++) {
		strcpy(page.group[g], group[g]);
		page.possible[g] = 3, page.read_bytes[g][0] = 200, page.read_bytes[g][1] = 100, page.group_kl[g] = -1;
		for (uint32_t l = 0; l < (g == 2 ? 1 : 8); l++)
			page.wanted[g][l] = page.executed[g][l] = 0;
		for (uint32_t l = 0; l < PAGE_LAYERS; l++)
			page.kl[g][l] = -1, page.saved_us[g][l] = page.saved_error_us[g][l] = NAN;
	}
	for (uint32_t l = 0; l < PAGE_LAYERS; l++)
		page.layer_kl[l] = -1, page.layer_saved_us[l] = page.layer_saved_error_us[l] = NAN;
}

/* "1: attention.*@0-3" */
static const char *
selectors(const char *selector)
{
	static char out[PAGE_GROUPS][SELECTOR_TEXT], text[65536];
	struct sites s;
	struct err err;
	uint32_t n;
	size_t at;

	if (sites_parse(&page, selector, &s, &err) != 0)
		return err.text[0] != '\0' ? "refused" : "";
	n = sites_selectors(&page, &s, out);
	at = (size_t)snprintf(text, sizeof(text), "%u:", sites_count(&s));
	for (uint32_t i = 0; i < n; i++)
		at += (size_t)snprintf(text + at, sizeof(text) - at, " %s", out[i]);
	return text;
}

static void
test_selectors(void **state)
{
	(void)state;
	make_page();
	assert_string_equal(selectors("*"), "17: *");
	assert_string_equal(selectors("attention.*"), "16: attention.*");
	assert_string_equal(selectors("attention.*@0-3"), "8: attention.*@0-3");
	assert_string_equal(selectors("attention.q_proj@0-1,5,-1"), "4: attention.q_proj@0-1,5,7");
	assert_string_equal(selectors("kv_cache@6-"), "2: kv_cache@6-7");
	assert_string_equal(selectors("*@2"), "2: attention.*@2");
	assert_string_equal(selectors("lm_head"), "1: lm_head");
	for (const char **s = (const char *[]){"", "@", "*@", "nosuch", "*@8", "*@3-2", "*@x", "*@1,", "lm_head@0", "kv*", "*@-9", "*@-0",
	         "*@99999999999999999999", NULL}; *s != NULL; s++)
		if (strcmp(*s, "*@1,") != 0)
			assert_string_equal(selectors(*s), "refused");
}

static void
test_effect(void **state)
{
	struct sites s;
	struct effect e;
	struct err err;

	(void)state;
	make_page();
	page.wanted[0][0] = page.executed[0][0] = 1;
	page.possible[1] = 1;
	strcpy(page.sweep_from, "bf16"), strcpy(page.sweep_format, "fp8");
	page.kl[0][1] = 0.5f, page.saved_us[0][1] = 2, page.saved_error_us[0][1] = 0.5f;
	page.kl[0][0] = 0.125f;
	page.kl[0][2] = 0.25f;
	assert_int_equal(sites_parse(&page, "attention.*@0-2", &s, &err), 0);
	effect_measure(&page, &s, 1, &e);
	assert_int_equal(e.n, 2);
	assert_int_equal(e.same, 1);
	assert_int_equal(e.cannot, 3);
	assert_true(e.read_before - e.read_after == 200);
	assert_int_equal(e.n_kl, 2);
	assert_true(fabs(e.kl - 0.75) < 1e-9);
	assert_int_equal(e.n_saved, 1);
	assert_true(fabs(e.saved_error_us - 0.5) < 1e-9);
	/* Taken back, it gives back. */
	assert_int_equal(sites_parse(&page, "attention.q_proj@0", &s, &err), 0);
	effect_measure(&page, &s, 0, &e);
	assert_int_equal(e.n_kl, 1);
	assert_true(fabs(e.kl + 0.125) < 1e-9);
	/* A group as a whole, where the sweep was by group. */
	page.group_kl[3] = 0.125f;
	assert_int_equal(sites_parse(&page, "kv_cache", &s, &err), 0);
	effect_measure(&page, &s, 1, &e);
	assert_int_equal(e.n_kl, 8);
	assert_true(e.kv_before - e.kv_after == 800);
	/* Another format than the sweep's. */
	strcpy(page.sweep_format, "fp8w");
	assert_int_equal(sites_parse(&page, "kv_cache", &s, &err), 0);
	effect_measure(&page, &s, 1, &e);
	assert_int_equal(e.n_kl, 0);
}

/* A sweep of whole layers or groups: each site has a share, a flip of the whole has all of it, once. */
static void
test_wholes(void **state)
{
	struct measured m;
	struct sites s;
	struct effect e;
	struct err err;

	(void)state;
	make_page();
	strcpy(page.sweep_from, "bf16"), strcpy(page.sweep_format, "fp8");
	page.layer_kl[3] = 0.5f, page.layer_saved_us[3] = 4, page.layer_saved_error_us[3] = 1;
	site_measured(&page, 0, 3, &m);
	assert_int_equal(m.of, MEASURED_LAYER);
	assert_int_equal(m.n, 2);
	assert_true(fabs(m.kl - 0.5) < 1e-9 && fabs(m.saved_us - 4) < 1e-9);
	site_measured(&page, 2, 0, &m);
	assert_int_equal(m.of, MEASURED_NOTHING);
	site_measured(&page, 3, 3, &m);
	assert_int_equal(m.of, MEASURED_NOTHING);
	assert_int_equal(sites_parse(&page, "*@2-3", &s, &err), 0);
	effect_measure(&page, &s, 1, &e);
	assert_int_equal(e.n_kl, 2);
	assert_true(fabs(e.kl - 0.5) < 1e-9);
	/* A part of it is not it. */
	assert_int_equal(sites_parse(&page, "attention.q_proj", &s, &err), 0);
	effect_measure(&page, &s, 1, &e);
	assert_int_equal(e.n_kl, 0);
	/* The smaller whole says more of a site; what it was flipped alone, most. */
	page.group_kl[0] = 0.25f, page.group_kl[3] = 0.125f;
	site_measured(&page, 0, 3, &m);
	assert_int_equal(m.of, MEASURED_LAYER);
	site_measured(&page, 0, 4, &m);
	assert_int_equal(m.of, MEASURED_GROUP);
	assert_int_equal(m.n, 8);
	/* Too few rounds: what it saves has no error. */
	page.layer_saved_error_us[3] = NAN;
	assert_int_equal(sites_parse(&page, "attention.*@3", &s, &err), 0);
	effect_measure(&page, &s, 1, &e);
	assert_true(e.n_saved == 2 && isnan(e.saved_error_us));
	page.kl[0][3] = 0.0625f;
	site_measured(&page, 0, 3, &m);
	assert_int_equal(m.of, MEASURED_SITE);
	page.kl[0][3] = -1;
	/* The group counts, and its layers not again. */
	assert_int_equal(sites_parse(&page, "attention.*", &s, &err), 0);
	effect_measure(&page, &s, 1, &e);
	assert_int_equal(e.n_kl, 8);
	assert_true(fabs(e.kl - 0.25) < 1e-9);
}

static void
test_rows(void **state)
{
	struct rows r;

	(void)state;
	make_page();
	rows_make(&page, false, &r);
	assert_int_equal(r.n, 8);
	rows_make(&page, true, &r);
	assert_int_equal(r.n, 1);
	page.wanted[3][4] = 1;
	rows_make(&page, true, &r);
	assert_int_equal(r.n, 3);
	assert_int_equal(r.to[0], 3);
	assert_int_equal(rows_find(&r, 4), 1);
	assert_int_equal(rows_find(&r, 7), 2);
	assert_int_equal(rows_find(&r, 200), 2);
}

static void
test_minutes(void **state)
{
	static struct data d;
	double before, after;
	float v[4];

	(void)state;
	make_page();
	data_init(&d);
	for (int s = 0; s < 30; s++) {
		page.updated_us = (1000 + s) * 1000000L;
		page.tokens_per_s = s < 15 ? 100 : 150;
		assert_true(data_take(&d, &page));
		assert_false(data_take(&d, &page));
	}
	assert_true(fabs(data_mean(&d, SERIES_OUTPUT, 1000, 1015) - 100) < 1e-6);
	assert_true(isnan(data_mean(&d, SERIES_OUTPUT, 0, 1000)));
	data_effect(&d, 0, 1015 * 1000000L, 0, SERIES_OUTPUT, &before, &after);
	assert_true(fabs(before - 100) < 1e-6 && fabs(after - 150) < 1e-6);
	/* Another change just before: what was then is not what this one changed. */
	data_effect(&d, 1014 * 1000000L, 1020 * 1000000L, 1022 * 1000000L, SERIES_OUTPUT, &before, &after);
	assert_true(fabs(before - 150) < 1e-6 && isnan(after));
	data_effect(&d, 1019 * 1000000L, 1020 * 1000000L, 0, SERIES_OUTPUT, &before, &after);
	assert_true(isnan(before));
	data_columns(&d, SERIES_OUTPUT, 10, v, 4);
	assert_true(isnan(v[0]) && fabs(v[1] - 100) < 1e-3 && fabs(v[3] - 150) < 1e-3);
	/* A daemon that started anew, whose clock went back. */
	page.pid = 2, page.updated_us = 5;
	assert_true(data_take(&d, &page));
	assert_true(isfinite(data_mean(&d, SERIES_OUTPUT, -5, 1)));
}

/* A page may be anything. */
static void
test_hostile(void **state)
{
	static struct data d;

	(void)state;
	data_init(&d);
	memset(&page, 0xff, sizeof(page));
	data_take(&d, &page);
	assert_int_equal(d.page.n_layers, PAGE_LAYERS);
	assert_int_equal(d.page.updated_us, 0);
	assert_true(isfinite(d.page.tokens_per_s) && isfinite(d.page.side[1].ttft_ms_p50) && isfinite(d.page.kl[3][3]));
	assert_int_equal(strlen(d.page.log[0]), PAGE_LOG_LINE - 1);
	make_page();
	page.n_formats = 1;
	page.wanted[0][0] = 7, page.executed[0][1] = 200, page.candidate[0][1] = 9;
	page.kv_pages_used = 5, page.kv_pages = 3;
	data_take(&d, &page);
	assert_int_equal(d.page.wanted[0][0], PAGE_NONE);
	assert_int_equal(d.page.executed[0][1], 0);
	assert_int_equal(d.page.candidate[0][1], PAGE_NONE);
	assert_int_equal(d.page.kv_pages_used, 3);
}

static void
test_record(void **state)
{
	static struct octet_page want[3];
	char path[] = "/tmp/octet-record.XXXXXX";
	const struct octet_page *got;
	struct record *w = NULL;
	struct replay *r = NULL;
	struct err err = {""};
	int fd = mkstemp(path);

	(void)state;
	assert_true(fd >= 0);
	close(fd);
	assert_int_equal(record_open(&w, path, &err), 0);
	make_page();
	srand(7);
	for (int i = 0; i < 3; i++) {
		for (int k = 0; k < 500; k++)
			((uint8_t *)&page)[16 + (size_t)rand() % (sizeof(page) - 16)] ^= (uint8_t)rand();
		want[i] = page;
		assert_int_equal(record_put(w, &page, &err), 0);
	}
	assert_int_equal(record_close(&w, &err), 0);
	assert_int_equal(replay_open(&r, path, &err), 0);
	for (int i = 0; i < 3; i++) {
		assert_int_equal(replay_next(r, &got, &err), 1);
		assert_memory_equal(got, &want[i], sizeof(*got));
	}
	assert_int_equal(replay_next(r, &got, &err), 0);
	replay_close(&r);
	unlink(path);
	assert_int_equal(record_open(&w, "/nonexistent/x", &err), -ENOENT);
}

static void
test_words(void **state)
{
	char text[] = "set 'a b'=fp8  \"c\"d --x", open[] = "a 'b", *word[MAX_WORDS];

	(void)state;
	assert_int_equal(command_words(text, word), 4);
	assert_string_equal(word[1], "a b=fp8");
	assert_string_equal(word[2], "cd");
	assert_string_equal(word[3], "--x");
	assert_null(word[4]);
	assert_int_equal(command_words(open, word), -1);
}

/* What is on a screen of 80x24; freed by the next call. */
static const char *
screen(void)
{
	static char *text;
	struct canvas c = {.ascii = true};
	size_t size;
	FILE *f;

	free(text);
	text = NULL;
	f = open_memstream(&text, &size);
	assert_non_null(f);
	assert_int_equal(canvas_resize(&c, 80, 24), 0);
	ui_draw(&ui, &c);
	canvas_print(&c, f);
	fclose(f);
	canvas_free(&c);
	return text;
}

/* What the grid says of sites that run otherwise than is wanted, and of what was not measured of a site alone. */
static void
test_signs(void **state)
{
	(void)state;
	make_page();
	page.executed[0][1] = 1;
	ui_init(&ui);
	ui_take(&ui, &page);
	for (int flipping = 0; flipping < 2; flipping++) {
		page.flipping = (uint32_t)flipping, page.updated_us++;
		ui_take(&ui, &page);
		assert_non_null(strstr(screen(), flipping ? "      1 bf16~ " : "      1 bf16!fp8 "));
	}
	ui.grid.shows = SHOWS_KL;
	assert_non_null(strstr(screen(), "KL of each site alone: no sweep yet"));
	page.sweep_us = page.updated_us++;
	page.layer_kl[3] = 0.25f, page.group_kl[1] = 0.0008f, page.kl[0][2] = 0.01f;
	ui_take(&ui, &page);
	assert_non_null(strstr(screen(), "share of = layer | group"));
	assert_non_null(strstr(screen(), "      2 +10.0m      |100u "));
	assert_non_null(strstr(screen(), "      3 #=0.12     #=0.12 "));
	ui_free(&ui);
}

/* Words that are longer than a line are broken, behind a comma where there is one. */
static void
test_words_wrap(void **state)
{
	struct canvas c = {.ascii = true};
	static const char *const want[] = {" a        ", " bc,defg, ", " hij      ", " abcdefghi", " jk       "};
	struct pane p;
	char row[16];

	(void)state;
	assert_int_equal(canvas_resize(&c, 10, 5), 0);
	p = pane_all(&c);
	assert_int_equal(put_words(&p, 0, 1, STYLE_TEXT, "a bc,defg,hij abcdefghijk"), 5);
	for (int y = 0; y < 5; y++) {
		for (int x = 0; x < 10; x++)
			row[x] = (char)canvas_at(&c, y, x)->c;
		row[10] = '\0';
		assert_string_equal(row, want[y]);
	}
	canvas_free(&c);
}

/* What leaves the console when keys are pressed, without a daemon. */
static void
type(const char *keys)
{
	for (; *keys != '\0'; keys++) {
		ui.ask.seen = true;
		ui_key(&ui, *keys);
	}
}

static const char *
sent(void)
{
	static char text[4096];
	char *json = ui.request != NULL ? json_dumps(ui.request, JSON_COMPACT | JSON_SORT_KEYS) : NULL;

	snprintf(text, sizeof(text), "%.*s", (int)sizeof(text) - 1, json != NULL ? json : "nothing");
	free(json);
	json_decref(ui.request);
	ui.request = NULL;
	return text;
}

static void
test_flip(void **state)
{
	json_t *reply = json_pack("{s:i,s:i,s:s}", "epoch", 4, "sites", 2, "change", "x");

	(void)state;
	make_page();
	ui_init(&ui);
	ui.live = true, ui.data.link = LINK_UP;
	ui_take(&ui, &page);
	type("vjl ");
	assert_int_equal(ui.mode, MODE_ASK);
	assert_string_equal(sent(), "nothing");
	type("n");
	assert_string_equal(sent(), "nothing");
	type(" y");
	assert_string_equal(sent(), "{\"if_epoch\":3,\"rules\":[\"attention.*@0-1=fp8\"],\"verb\":\"set\"}");
	ui_reply(&ui, ui.request_then, 0, "", reply);
	/* The page is not there yet: u takes back what was answered. */
	type("u");
	assert_string_equal(sent(), "{\"dry_run\":false,\"if_epoch\":4,\"verb\":\"rollback\"}");
	json_object_set_new(reply, "epoch", json_integer(5));
	ui_reply(&ui, ui.request_then, 0, "", reply);
	/* Once more is somebody else's: asked. */
	page.epoch = 5, page.updated_us++;
	ui_take(&ui, &page);
	type("u");
	assert_string_equal(sent(), "{\"dry_run\":true,\"if_epoch\":5,\"verb\":\"rollback\"}");
	ui_reply(&ui, ui.request_then, 0, "", reply);
	assert_int_equal(ui.mode, MODE_ASK);
	type("nU");
	assert_string_equal(sent(), "{\"dry_run\":false,\"if_epoch\":5,\"to\":4,\"verb\":\"rollback\"}");
	ui_reply(&ui, THEN_NOTHING, -EACCES, "no", NULL);
	assert_string_equal(ui.message, "no");
	/* Who may only look. */
	ui.read_only = true;
	type(" ");
	assert_int_equal(ui.mode, MODE_VIEW);
	type("uUK");
	assert_string_equal(sent(), "nothing");
	json_decref(reply);
	ui_free(&ui);
}

/* Slips: what is pasted, a y that was typed ahead, a picture that stands still, q. */
static void
test_slips(void **state)
{
	(void)state;
	make_page();
	ui_init(&ui);
	ui.live = true, ui.data.link = LINK_UP;
	ui_take(&ui, &page);
	ui_key(&ui, ' '), ui_key(&ui, 'y');
	assert_int_equal(ui.mode, MODE_ASK);
	assert_string_equal(sent(), "nothing");
	type("n");
	ui_key(&ui, K_PASTE);
	type("why \n yq");
	assert_int_equal(ui.mode, MODE_VIEW);
	ui_key(&ui, K_PASTED);
	assert_string_equal(sent(), "nothing");
	type(":");
	ui_key(&ui, K_PASTE);
	type("set *=fp8\n");
	ui_key(&ui, K_PASTED);
	assert_int_equal(ui.mode, MODE_PROMPT);
	assert_string_equal(ui.prompt.text, "set *=fp8 ");
	ui_key(&ui, K_ESC);
	type("p y");
	assert_int_equal(ui.mode, MODE_VIEW);
	assert_string_equal(sent(), "nothing");
	type("p");
	ui.pager.running = true;
	assert_false(ui_key(&ui, 'q') & REACT_QUIT);
	type("j");
	assert_false(ui_key(&ui, 'q') & REACT_QUIT);
	assert_true(ui_key(&ui, 'q') & REACT_QUIT);
	ui.mode = MODE_PAGER;
	assert_false(ui_key(&ui, 'q') & REACT_STOP);
	ui.mode = MODE_PAGER;
	assert_true(ui_key(&ui, CTRL('c')) & REACT_STOP);
	ui_free(&ui);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_selectors), cmocka_unit_test(test_effect), cmocka_unit_test(test_wholes), cmocka_unit_test(test_rows),
	    cmocka_unit_test(test_minutes), cmocka_unit_test(test_hostile), cmocka_unit_test(test_record), cmocka_unit_test(test_words), cmocka_unit_test(test_words_wrap), cmocka_unit_test(test_signs),
	    cmocka_unit_test(test_flip), cmocka_unit_test(test_slips)};

	return cmocka_run_group_tests_name("console", tests, NULL, NULL);
}
