/* SPDX-License-Identifier: Apache-2.0 */
/*
 * octet-console: connects, refreshes from the status page (no request to the
 * daemon), takes keys. What a key does is in one table, which help is made of.
 */
#include <curses.h>
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <locale.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "client/ctl.h"
#include "tui/view.h"

#define REFRESH_MS 250
#define STALE_US 2000000

/* What is to be done once the question is answered with y. */
enum pending { PENDING_NONE, PENDING_SET, PENDING_ROLLBACK };

struct console {
	const char *socket;
	struct ctl *ctl;
	const struct octet_page *page;
	struct view view;
	struct cells cells;
	enum pending pending;
	char rule[96];
	uint64_t asked_epoch; /* what the question was about */
	bool quit;
};

static volatile sig_atomic_t stop_signal;

static void
on_stop(int sig)
{
	stop_signal = sig;
}

static void
say(struct console *c, bool bad, const char *fmt, const char *text)
{
	snprintf(c->view.message, sizeof(c->view.message), fmt, text);
	c->view.message_bad = bad;
}

static void
disconnect(struct console *c)
{
	ctl_page_free(&c->page);
	ctl_close(&c->ctl);
	c->view.connected = false;
}

static int
connect_daemon(struct console *c, struct err *err)
{
	int rc = ctl_open(&c->ctl, c->socket, err);

	if (rc == 0)
		rc = ctl_page(c->ctl, &c->page, err);
	if (rc != 0) {
		disconnect(c);
		return rc;
	}
	c->view.connected = true;
	return 0;
}

static void
refresh_page(struct console *c)
{
	struct timespec now;
	struct err err;

	if (!c->view.connected && connect_daemon(c, &err) != 0) {
		say(c, true, "%s", err.text);
		return;
	}
	page_read(c->page, &c->view.page);
	clock_gettime(CLOCK_REALTIME, &now);
	if ((int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000 - c->view.page.updated_us > STALE_US) {
		disconnect(c); /* the writer stopped; the next refresh connects anew */
		say(c, true, "%s", "the daemon no longer updates its status page");
	}
}

/* ---- what keys do ---- */

static json_t *
call(struct console *c, json_t *request)
{
	json_t *reply = NULL;
	struct err err;
	int rc = c->ctl == NULL ? err_set(&err, -ENOTCONN, "not connected") : ctl_call(c->ctl, request, &reply, 10000, &err);

	json_decref(request);
	if (rc != 0) {
		say(c, true, "%s", err.text);
		json_decref(reply);
		return NULL;
	}
	return reply;
}

static void
ask(struct console *c, enum pending what, const json_t *dry, const char *verb)
{
	json_int_t sites = json_integer_value(json_object_get(dry, "sites"));
	const char *change = json_string_value(json_object_get(dry, "change"));

	if (sites == 0) {
		say(c, false, "%s", "nothing would change");
		return;
	}
	c->pending = what;
	c->asked_epoch = c->view.page.epoch;
	snprintf(c->view.question, sizeof(c->view.question), "%s %d site%s (y/n)? %.180s", verb, (int)sites,
	    sites == 1 ? "" : "s", change != NULL ? change : "");
}

static void
key_flip(struct console *c, int arg)
{
	char selector[64];
	json_t *dry;

	(void)arg;
	view_selector(&c->view, selector, sizeof(selector));
	snprintf(c->rule, sizeof(c->rule), "%s=%s", selector, view_next_format(&c->view));
	dry = call(c, json_pack("{s:s,s:[s],s:b}", "verb", "set", "rules", c->rule, "dry_run", 1));
	if (dry != NULL)
		ask(c, PENDING_SET, dry, "flip");
	json_decref(dry);
}

static void
key_rollback(struct console *c, int arg)
{
	json_t *dry = call(c, json_pack("{s:s,s:b}", "verb", "rollback", "dry_run", 1));

	(void)arg;
	if (dry != NULL)
		ask(c, PENDING_ROLLBACK, dry, "roll back");
	json_decref(dry);
}

static void
key_answer(struct console *c, bool yes)
{
	json_t *reply, *request;

	*c->view.question = '\0';
	if (!yes)
		say(c, false, "%s", "nothing was changed");
	else {
		/* What was shown is what is done: somebody else's flip in between refuses it. */
		if (c->pending == PENDING_SET)
			request = json_pack("{s:s,s:[s],s:I}", "verb", "set", "rules", c->rule, "if_epoch",
			    (json_int_t)c->asked_epoch);
		else
			request = json_pack("{s:s,s:I}", "verb", "rollback", "if_epoch", (json_int_t)c->asked_epoch);
		reply = call(c, request);
		if (reply != NULL) {
			const char *change = json_string_value(json_object_get(reply, "change"));

			snprintf(c->view.message, sizeof(c->view.message), "epoch %d: %.400s",
			    (int)json_integer_value(json_object_get(reply, "epoch")), change != NULL ? change : "");
			c->view.message_bad = false;
		}
		json_decref(reply);
	}
	c->pending = PENDING_NONE;
}

static void
key_move(struct console *c, int arg)
{
	static const int step[][2] = {{-1, 0}, {1, 0}, {0, -1}, {0, 1}, {-10, 0}, {10, 0}, {-1000, 0}, {1000, 0}};

	view_move(&c->view, step[arg][0], step[arg][1]);
}

static void
key_select(struct console *c, int arg)
{
	c->view.select = arg >= 0 ? (enum view_select)arg : (c->view.select + 1) % (SELECT_ALL + 1);
}

static void
key_help(struct console *c, int arg)
{
	(void)arg;
	c->view.help = !c->view.help;
}

static void
key_quit(struct console *c, int arg)
{
	(void)arg;
	c->quit = true;
}

static const struct key {
	int code, also;
	const char *name, *help;
	void (*act)(struct console *, int arg);
	int arg;
} keys[] = {
	{KEY_UP, 'k', "up, k", "layer before", key_move, 0},
	{KEY_DOWN, 'j', "down, j", "layer after", key_move, 1},
	{KEY_LEFT, 'h', "left, h", "group before", key_move, 2},
	{KEY_RIGHT, 'l', "right, l", "group after", key_move, 3},
	{KEY_PPAGE, -2, "page up", "ten layers up", key_move, 4},
	{KEY_NPAGE, -2, "page down", "ten layers down", key_move, 5},
	{KEY_HOME, 'g', "home, g", "first layer", key_move, 6},
	{KEY_END, 'G', "end, G", "last layer", key_move, 7},
	{'\t', -2, "tab", "select cell, row, column, all in turn", key_select, -1},
	{'e', -2, "e", "select the cell", key_select, SELECT_CELL},
	{'r', -2, "r", "select the row: all linear groups of a layer", key_select, SELECT_ROW},
	{'c', -2, "c", "select the column: a group in all layers", key_select, SELECT_COLUMN},
	{'a', -2, "a", "select all linear groups and lm_head", key_select, SELECT_ALL},
	{' ', '\n', "space", "flip the selection to the next format (shows what changes and asks)", key_flip, 0},
	{'u', 'R', "u, R", "roll back the last change (asks)", key_rollback, 0},
	{'?', KEY_F(1), "?", "this help", key_help, 0},
	{'q', -2, "q", "quit", key_quit, 0},
};

static const char *
help_line(unsigned i, char *buf, size_t len)
{
	if (i >= sizeof(keys) / sizeof(*keys))
		return NULL;
	snprintf(buf, len, "%-10s %s", keys[i].name, keys[i].help);
	return buf;
}

static void
take_key(struct console *c, int code)
{
	if (c->pending != PENDING_NONE) {
		if (code == 'y' || code == 'Y')
			key_answer(c, true);
		else if (code != KEY_RESIZE && code != ERR)
			key_answer(c, false);
		return;
	}
	for (size_t i = 0; i < sizeof(keys) / sizeof(*keys); i++) {
		if (keys[i].code == code || keys[i].also == code) {
			if (c->view.help && keys[i].act != key_quit)
				c->view.help = false;
			else {
				*c->view.message = '\0';
				keys[i].act(c, keys[i].arg);
			}
			return;
		}
	}
}

/* ---- showing ---- */

static void
start_colours(void)
{
	static const short colour[ROLE_N] = {[ROLE_TEXT] = -1, [ROLE_TITLE] = -1, [ROLE_DIM] = -1, [ROLE_ERROR] = COLOR_RED,
	    [ROLE_ASK] = COLOR_YELLOW, [ROLE_FORMAT0] = COLOR_CYAN, [ROLE_FORMAT0 + 1] = COLOR_GREEN,
	    [ROLE_FORMAT0 + 2] = COLOR_YELLOW, [ROLE_FORMAT0 + 3] = COLOR_MAGENTA};

	if (!has_colors())
		return;
	start_color();
	use_default_colors();
	for (short r = 0; r < ROLE_N; r++)
		init_pair((short)(r + 1), colour[r], -1);
}

static attr_t
attributes(unsigned char role)
{
	attr_t a = (attr_t)COLOR_PAIR((role & 0x3f) + 1);

	if ((role & 0x3f) == ROLE_TITLE || (role & 0x3f) == ROLE_ASK)
		a |= A_BOLD;
	if ((role & 0x3f) == ROLE_DIM)
		a |= A_DIM;
	if (role & CELL_CURSOR)
		a |= A_REVERSE;
	if (role & CELL_PENDING)
		a |= A_BLINK;
	return a;
}

static void
show(struct console *c)
{
	if (cells_resize(&c->cells, COLS, LINES) != 0)
		return;
	view_draw(&c->view, &c->cells);
	for (int y = 0; y < c->cells.height; y++) {
		move(y, 0);
		for (int x = 0; x < c->cells.width; x++) {
			struct cell cell = c->cells.cell[(size_t)y * (size_t)c->cells.width + (size_t)x];

			addch((chtype)(unsigned char)cell.c | attributes(cell.role));
		}
	}
	refresh();
}

static int
run_screen(struct console *c)
{
	struct sigaction sa = {.sa_handler = on_stop};
	struct err err;
	SCREEN *screen;

	if (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO)) {
		fprintf(stderr, "octet-console: no terminal; use --batch\n");
		return 1;
	}
	if (connect_daemon(c, &err) != 0) {
		fprintf(stderr, "octet-console: %s\n", err.text);
		return 1;
	}
	screen = newterm(NULL, stdout, stdin);
	/* One that cannot move its cursor shows no grid. */
	if (screen == NULL || tigetstr("cup") == NULL) {
		if (screen != NULL)
			endwin();
		fprintf(stderr, "octet-console: terminal '%s' is unknown or cannot do this; use --batch\n",
		    getenv("TERM") != NULL ? getenv("TERM") : "");
		return 1;
	}
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGHUP, &sa, NULL);
	start_colours();
	cbreak();
	noecho();
	nonl();
	keypad(stdscr, TRUE);
	curs_set(0);
	timeout(REFRESH_MS);
	while (!c->quit && stop_signal == 0) {
		int code;

		refresh_page(c);
		show(c);
		code = getch();
		take_key(c, code == '\r' ? '\n' : code);
	}
	endwin();
	return 0;
}

static int
run_batch(struct console *c, long count)
{
	struct timespec pause = {.tv_nsec = REFRESH_MS * 1000000L};
	struct err err;

	if (connect_daemon(c, &err) != 0) {
		fprintf(stderr, "octet-console: %s\n", err.text);
		return 1;
	}
	for (long i = 0; i < count && stop_signal == 0; i++) {
		if (i > 0) {
			nanosleep(&pause, NULL);
			printf("\n");
		}
		refresh_page(c);
		if (cells_resize(&c->cells, 100, (int)c->view.page.n_layers + 18) != 0)
			return 1;
		c->view.select = SELECT_CELL;
		view_draw(&c->view, &c->cells);
		cells_print(&c->cells, stdout);
		if (!c->view.connected)
			return 1;
	}
	return fflush(stdout) != 0;
}

int
main(int argc, char **argv)
{
	static const struct option longs[] = {{"socket", required_argument, NULL, 's'}, {"batch", no_argument, NULL, 'b'},
	    {"help", no_argument, NULL, 'h'}, {"version", no_argument, NULL, 'v'}, {NULL, 0, NULL, 0}};
	static struct console c;
	const char *usage = "usage: octet-console [--socket CONTROL_PATH] [--batch [-n COUNT]]\n";
	bool batch = false;
	long count = 1;
	int ch, rc;
	char *end;

	setlocale(LC_ALL, "");
	while ((ch = getopt_long(argc, argv, "n:h", longs, NULL)) != -1) {
		switch (ch) {
		case 's': c.socket = optarg; break;
		case 'b': batch = true; break;
		case 'n':
			count = strtol(optarg, &end, 10);
			if (*end != '\0' || end == optarg || count < 1) {
				fprintf(stderr, "octet-console: -n '%s' is no count\n", optarg);
				return 2;
			}
			break;
		case 'h': printf("%s", usage); return 0;
		case 'v': printf("octet-console %s\n", OCTET_VERSION); return 0;
		default: fprintf(stderr, "%s", usage); return 2;
		}
	}
	if (optind < argc) {
		fprintf(stderr, "octet-console: unexpected '%s'\n%s", argv[optind], usage);
		return 2;
	}
	c.view.help_line = help_line;
	rc = batch ? run_batch(&c, count) : run_screen(&c);
	disconnect(&c);
	cells_free(&c.cells);
	return rc;
}
