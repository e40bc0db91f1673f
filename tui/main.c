/* SPDX-License-Identifier: Apache-2.0 */
/*
 * octet-console: options, where snapshots come from (the daemon's status page or
 * a file), and the one place that carries out what keys ask for.
 */
#include <errno.h>
#include <getopt.h>
#include <langinfo.h>
#include <locale.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "tui/record.h"
#include "tui/remote.h"
#include "tui/screen.h"
#include "tui/ui.h"

#define BATCH_SECOND_MS 1100 /* rates are of a second */

struct console {
	struct ui ui;
	struct canvas canvas;
	struct remote *remote;   /* or */
	struct replay *replay;
	struct record *record;
	double speed;            /* of a replay; 0: to its end at once */
	int64_t replay_from_ms, replay_first_us;
	const struct octet_page *ahead; /* read, and not yet due */
	uint64_t n_snapshots;
	bool read_only, ended, quit;
	/* options */
	const char *socket, *record_path, *replay_path;
	bool batch;
	long count, width, height;
};

static volatile sig_atomic_t stop_signal, suspend_signal, resume_signal;

static void
on_stop(int sig)
{
	stop_signal = sig;
}

static void
on_suspend(int sig)
{
	suspend_signal = sig;
}

static void
on_resume(int sig)
{
	resume_signal = sig;
}

static int
fail(const char *why)
{
	fprintf(stderr, "octet-console: %s\n", why);
	return 1;
}

static int64_t
now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int64_t
unix_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* ---- snapshots from the daemon ---- */

static void
take_rights(struct console *c)
{
	struct ui *ui = &c->ui;

	ui->read_only = c->read_only || !remote_is_operator(c->remote);
	if (c->read_only)
		snprintf(ui->read_only_why, sizeof(ui->read_only_why), "started with --read-only");
	else
		snprintf(ui->read_only_why, sizeof(ui->read_only_why), "uid %u may look, not change ([access] operators)", ui->uid);
}

static int
put_record(struct console *c, const struct octet_page *page)
{
	struct err err = {""};

	if (c->record == NULL || record_put(c->record, page, &err) == 0)
		return 0;
	ui_say(&c->ui, true, "no more is recorded: %s", err.text);
	record_close(&c->record, &err);
	return -EIO;
}

static unsigned
read_daemon(struct console *c)
{
	static struct octet_page page;
	int64_t before = page.updated_us;
	enum link was = c->ui.data.link;
	struct err why = {""};
	enum link link = remote_read(c->remote, &page, &why);

	if (link != LINK_UP || was != link)
		data_link(&c->ui.data, link, unix_us(), why.text);
	if (link == LINK_DOWN)
		return was != link ? REACT_DRAW : REACT_NONE;
	take_rights(c);
	if (page.updated_us != before)
		put_record(c, &page);
	return ui_take(&c->ui, &page) | (was != link ? REACT_DRAW : 0);
}

/* ---- snapshots from a file ---- */

static void
say_replay(struct console *c, const char *what)
{
	const char *slash = strrchr(c->replay_path, '/');
	char text[200];

	snprintf(text, sizeof(text), "replay of %.80s, snapshot %llu%.80s", slash != NULL ? slash + 1 : c->replay_path,
	    (unsigned long long)c->n_snapshots, what);
	data_link(&c->ui.data, LINK_REPLAY, 0, text);
}

/* The next into c->ahead. */
static bool
read_ahead(struct console *c)
{
	struct err err = {""};
	int rc;

	if (c->ahead != NULL || c->ended)
		return c->ahead != NULL;
	rc = replay_next(c->replay, &c->ahead, &err);
	if (rc > 0)
		return true;
	c->ahead = NULL;
	c->ended = true;
	say_replay(c, ", the last");
	if (rc < 0)
		ui_say(&c->ui, true, "%s", err.text);
	return false;
}

static unsigned
take_ahead(struct console *c)
{
	bool paused = c->ui.paused;
	unsigned r;

	c->ui.paused = false;
	r = ui_take(&c->ui, c->ahead);
	c->ui.paused = paused;
	c->ahead = NULL;
	c->n_snapshots++;
	say_replay(c, "");
	return r;
}

static unsigned
read_replay(struct console *c)
{
	unsigned r = REACT_NONE;

	while (!c->ui.paused && read_ahead(c)) {
		double due;

		if (c->n_snapshots == 0)
			c->replay_from_ms = now_ms(), c->replay_first_us = c->ahead->updated_us;
		due = ((double)c->ahead->updated_us - (double)c->replay_first_us) / 1000;
		if (c->speed > 0 && (double)(now_ms() - c->replay_from_ms) * c->speed < due)
			break;
		r |= take_ahead(c) | REACT_DRAW;
	}
	return r;
}

static unsigned
step_replay(struct console *c)
{
	return c->replay != NULL && read_ahead(c) ? take_ahead(c) : REACT_NONE;
}

static unsigned
read_snapshot(struct console *c)
{
	return c->replay != NULL ? read_replay(c) : read_daemon(c);
}

/* ---- what keys ask for ---- */

static void
start_call(struct console *c)
{
	json_t *request = c->ui.request;
	struct err err = {""};

	c->ui.request = NULL;
	c->ui.pending_ms = 0;
	if (call_start(c->socket, request, c->ui.request_then, &err) != 0)
		ui_reply(&c->ui, c->ui.request_then, -EIO, err.text, NULL);
}

static void
start_job(struct console *c)
{
	struct err err = {""};
	uint32_t pid;

	if (job_start(c->socket, c->ui.command, &pid, &err) != 0)
		ui_output(&c->ui, err.text, strlen(err.text), 1);
	else
		c->ui.child[c->ui.n_children++ % 16] = pid;
}

static void
draw(struct console *c)
{
	int width, height;

	screen_size(&width, &height);
	if (canvas_resize(&c->canvas, width, height) != 0)
		return;
	ui_draw(&c->ui, &c->canvas);
	screen_show(&c->canvas);
}

/* The one place where reactions become deeds. */
static void
carry_out(struct console *c, unsigned r)
{
	if (r & REACT_QUIT)
		c->quit = true;
	if (r & REACT_STEP)
		r |= step_replay(c);
	if (r & REACT_STOP)
		job_stop();
	if (r & REACT_REQUEST && c->ui.request != NULL)
		start_call(c);
	if (r & REACT_COMMAND)
		start_job(c);
	if (r & REACT_THEME)
		screen_theme(c->ui.theme);
	if (r & REACT_MOUSE)
		screen_mouse(c->ui.mouse);
	if (r & (REACT_REPAINT | REACT_THEME))
		screen_repaint();
	if (r & REACT_SUSPEND)
		screen_suspend();
	if (r != REACT_NONE && !c->quit)
		draw(c);
}

/* ---- the loop ---- */

static unsigned
take_call(struct console *c)
{
	struct err err = {""};
	json_t *reply = NULL;
	int rc;
	enum then then = call_take(&rc, &err, &reply);
	unsigned r = ui_reply(&c->ui, then, rc, err.text, reply) | read_snapshot(c);

	json_decref(reply);
	return r;
}

static unsigned
take_job(struct console *c)
{
	char buf[4096];
	int status;
	size_t n = job_read(buf, sizeof(buf), &status);

	return ui_output(&c->ui, buf, n, status);
}

static unsigned
take_keys(struct console *c)
{
	unsigned r = REACT_NONE;
	int code;

	/* What a key asks for is done before the next one. */
	while (!c->quit && (code = screen_key(&c->ui)) >= 0)
		carry_out(c, r = ui_key(&c->ui, code) | REACT_DRAW);
	return REACT_NONE;
}

/* Waits for a key, a reply, output, or the next refresh. */
static void
wait_for_something(struct console *c, int64_t next_ms, struct pollfd p[3])
{
	int64_t left = next_ms - now_ms();
	struct timespec ts = {0};
	sigset_t open;

	left = left < 0 ? 0 : left;
	ts.tv_sec = left / 1000, ts.tv_nsec = left % 1000 * 1000000;
	p[0] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
	p[1] = (struct pollfd){.fd = call_fd(), .events = POLLIN};
	p[2] = (struct pollfd){.fd = job_fd(), .events = POLLIN};
	sigemptyset(&open);
	if (stop_signal == 0 && suspend_signal == 0 && resume_signal == 0 && ppoll(p, 3, &ts, &open) < 0)
		p[0].revents = p[1].revents = p[2].revents = 0;
	/* The terminal went, and no SIGHUP said so. */
	if (p[0].revents & (POLLHUP | POLLERR | POLLNVAL))
		c->quit = true;
}

static void
take_signals(struct console *c)
{
	if (resume_signal != 0) {
		resume_signal = 0;
		screen_resume();
		carry_out(c, REACT_DRAW);
	}
	if (suspend_signal != 0) {
		suspend_signal = 0;
		carry_out(c, REACT_SUSPEND);
	}
	/* ^C leaves a question, a line, a command first; where there is none, the console. */
	if (stop_signal == SIGINT && c->ui.mode != MODE_VIEW) {
		stop_signal = 0;
		carry_out(c, ui_key(&c->ui, CTRL('c')));
	}
}

static void
loop(struct console *c)
{
	int64_t next_ms = now_ms(), key_ms = next_ms;
	int shown_s = -1;

	while (!c->quit && stop_signal == 0) {
		unsigned r = REACT_NONE;
		struct pollfd p[3];

		if (now_ms() >= next_ms) {
			r |= read_snapshot(c);
			c->ui.pending_ms = (int)call_age_ms();
			/* While a request waits, for how long. */
			if (c->ui.pending_ms / 1000 != shown_s)
				r |= REACT_DRAW, shown_s = c->ui.pending_ms / 1000;
			next_ms = now_ms() + c->ui.refresh_ms;
		}
		carry_out(c, r);
		c->ui.ask.seen = c->ui.mode == MODE_ASK;
		wait_for_something(c, next_ms, p);
		/* Its end may get lost: keys must not stay dead. */
		if (p[0].revents != 0)
			key_ms = now_ms();
		else if (now_ms() - key_ms > 2000)
			c->ui.pasting = false;
		r = p[1].revents != 0 ? take_call(c) : REACT_NONE;
		if (p[2].revents != 0)
			r |= take_job(c);
		carry_out(c, r);
		/* A resize interrupts the wait and is a key of curses. */
		carry_out(c, take_keys(c));
		take_signals(c);
	}
}

static void
catch_signals(void)
{
	static const int stops[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
	struct sigaction sa = {.sa_handler = on_stop}, suspend = {.sa_handler = on_suspend}, resume = {.sa_handler = on_resume};
	sigset_t blocked;

	sigemptyset(&blocked);
	for (size_t i = 0; i < sizeof(stops) / sizeof(*stops); i++) {
		sigaddset(&blocked, stops[i]);
		sigaction(stops[i], &sa, NULL);
	}
	sigaddset(&blocked, SIGTSTP), sigaddset(&blocked, SIGCONT);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	sigaction(SIGCONT, &resume, NULL);
	sigaction(SIGTSTP, &suspend, NULL); /* before curses, whose handler would do in a signal what the loop does */
	signal(SIGPIPE, SIG_IGN);
}

static int
run_screen(struct console *c)
{
	struct err err = {""};

	catch_signals();
	if (screen_open(&err) != 0)
		return fail(err.text);
	screen_theme(c->ui.theme);
	screen_mouse(c->ui.mouse);
	carry_out(c, read_snapshot(c) | ui_open_view(&c->ui, c->ui.view));
	loop(c);
	screen_close();
	job_stop();
	return 0;
}

/* ---- batch ---- */

static int
print_view(struct console *c)
{
	int height = c->height > 0 ? (int)c->height : ui_batch_height(&c->ui, (int)c->width);

	if (canvas_resize(&c->canvas, (int)c->width, height) != 0)
		return fail("out of memory");
	ui_draw(&c->ui, &c->canvas);
	canvas_print(&c->canvas, stdout);
	return ferror(stdout) != 0;
}

static void
sleep_ms(long ms)
{
	struct timespec pause = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};

	nanosleep(&pause, NULL);
}

static int
batch_live(struct console *c)
{
	int64_t from = now_ms();
	int rc = 0;

	/* Before that there would be no rates. */
	while (stop_signal == 0 && now_ms() - from < BATCH_SECOND_MS) {
		read_snapshot(c);
		sleep_ms(100);
	}
	for (long i = 0; i < c->count && stop_signal == 0 && rc == 0; i++) {
		if (i > 0) {
			sleep_ms(c->ui.refresh_ms);
			printf("\n");
		}
		read_snapshot(c);
		if (c->ui.data.link == LINK_DOWN)
			return fail(c->ui.data.link_why);
		rc = print_view(c);
	}
	return rc;
}

/* The last snapshots of the file. */
static int
batch_replay(struct console *c)
{
	uint64_t total = 0;
	struct err err = {""};
	int rc = 0;

	while (step_replay(c) || !c->ended)
		total++;
	if (*c->ui.message != '\0')
		return fail(c->ui.message);
	if (total == 0)
		return fail("the file has no snapshot");
	if (c->count == 1)
		return print_view(c);
	replay_close(&c->replay);
	if (replay_open(&c->replay, c->replay_path, &err) != 0)
		return fail(err.text);
	data_init(&c->ui.data);
	c->ended = false;
	for (uint64_t i = 0; i < total && rc == 0; i++) {
		step_replay(c);
		if (i + (uint64_t)c->count < total)
			continue;
		rc = print_view(c);
		if (i + 1 < total)
			printf("\n");
	}
	return rc;
}

static int
run_batch(struct console *c)
{
	int rc;

	c->ui.batch = true;
	rc = c->replay != NULL ? batch_replay(c) : batch_live(c);
	return fflush(stdout) != 0 ? 1 : rc;
}

/* ---- options ---- */

static const char usage[] =
    "usage: octet-console [--socket CONTROL_PATH] [--view NAME] [--theme NAME] [--ascii] [--rate MS]\n"
    "                     [--read-only] [--no-mouse] [--record FILE]\n"
    "       octet-console --replay FILE [--speed X]\n"
    "       octet-console --batch [-n COUNT] [--width COLUMNS] [--height ROWS] [--view NAME] [--replay FILE]\n"
    "       octet-console --keys\n";

enum { OPT_SOCKET = 256, OPT_BATCH, OPT_VIEW, OPT_WIDTH, OPT_HEIGHT, OPT_RECORD, OPT_REPLAY, OPT_SPEED, OPT_THEME, OPT_ASCII,
	OPT_MOUSE, OPT_READ_ONLY, OPT_RATE, OPT_KEYS, OPT_HELP, OPT_VERSION };

static const struct option longs[] = {
	{"socket", required_argument, NULL, OPT_SOCKET}, {"batch", no_argument, NULL, OPT_BATCH},
	{"view", required_argument, NULL, OPT_VIEW}, {"width", required_argument, NULL, OPT_WIDTH},
	{"height", required_argument, NULL, OPT_HEIGHT}, {"record", required_argument, NULL, OPT_RECORD},
	{"replay", required_argument, NULL, OPT_REPLAY}, {"speed", required_argument, NULL, OPT_SPEED},
	{"theme", required_argument, NULL, OPT_THEME}, {"ascii", no_argument, NULL, OPT_ASCII},
	{"no-mouse", no_argument, NULL, OPT_MOUSE}, {"read-only", no_argument, NULL, OPT_READ_ONLY},
	{"rate", required_argument, NULL, OPT_RATE}, {"keys", no_argument, NULL, OPT_KEYS}, {"help", no_argument, NULL, OPT_HELP},
	{"version", no_argument, NULL, OPT_VERSION}, {NULL, 0, NULL, 0}};

static int
bad(const char *what, const char *value)
{
	fprintf(stderr, "octet-console: %s '%s'\n%s", what, value, usage);
	return 2;
}

static int
bad_view(const char *name)
{
	char names[200], what[240];

	snprintf(what, sizeof(what), "views are %s; not", ui_view_names(names, sizeof(names)));
	return bad(what, name);
}

static int
take_number(const char *what, const char *text, long min, long max, long *out)
{
	char *end;

	*out = strtol(text, &end, 10);
	return *end != '\0' || end == text || *out < min || *out > max ? bad(what, text) : -1;
}

static int
take_theme(struct console *c, const char *name)
{
	if (theme_find(name) == N_THEMES)
		return bad("themes are auto, dark, light, 16, mono; not", name);
	c->ui.theme = theme_find(name);
	return -1;
}

static int
print_keys(void)
{
	char line[256];

	for (unsigned i = 0; ui_key_line(i, line, sizeof(line)) != NULL; i++)
		puts(line);
	return fflush(stdout) != 0;
}

/* -1 to go on, or an exit status. */
static int
take_option(struct console *c, int option)
{
	char *end;
	long n;
	int rc = -1;

	switch (option) {
	case 'n': return take_number("-n: no count", optarg, 1, 1000000000, &c->count);
	case OPT_SOCKET: c->socket = optarg; break;
	case OPT_BATCH: c->batch = true; break;
	case OPT_VIEW:
		c->ui.view = ui_find_view(optarg);
		return c->ui.view < 0 ? bad_view(optarg) : -1;
	case OPT_WIDTH: return take_number("--width: 64 to 1000, not", optarg, 64, 1000, &c->width);
	case OPT_HEIGHT: return take_number("--height: 14 to 1000, not", optarg, 14, 1000, &c->height);
	case OPT_RECORD: c->record_path = optarg; break;
	case OPT_REPLAY: c->replay_path = optarg; break;
	case OPT_SPEED:
		c->speed = strtod(optarg, &end);
		return *end != '\0' || end == optarg || !(c->speed >= 0 && c->speed <= 1e6) ? bad("--speed: 0 to a million, not", optarg) : -1;
	case OPT_THEME: return take_theme(c, optarg);
	case OPT_ASCII: c->ui.ascii = c->canvas.ascii = true; break;
	case OPT_MOUSE: c->ui.mouse = false; break;
	case OPT_READ_ONLY: c->read_only = true; break;
	case OPT_RATE:
		rc = take_number("--rate: milliseconds, 50 to 60000, not", optarg, 50, 60000, &n);
		c->ui.refresh_ms = (int)n;
		break;
	case OPT_KEYS: return print_keys();
	case 'h':
	case OPT_HELP: return printf("%s", usage) < 0;
	case OPT_VERSION: return printf("octet-console %s\n", OCTET_VERSION) < 0;
	default: fprintf(stderr, "%s", usage); return 2;
	}
	return rc;
}

static int
open_source(struct console *c)
{
	struct err err = {""};
	int rc = 0;

	if (c->replay_path != NULL)
		rc = replay_open(&c->replay, c->replay_path, &err);
	else
		rc = remote_new(&c->remote, c->socket, &err);
	if (rc == 0 && c->record_path != NULL)
		rc = record_open(&c->record, c->record_path, &err);
	return rc != 0 ? fail(err.text) : 0;
}

int
main(int argc, char **argv)
{
	static struct console c;
	struct err err = {""};
	int ch, rc;

	setlocale(LC_ALL, "");
	setlocale(LC_NUMERIC, "C");
	ui_init(&c.ui);
	c.ui.ascii = c.canvas.ascii = strcmp(nl_langinfo(CODESET), "UTF-8") != 0;
	c.ui.uid = (uint32_t)getuid(), c.ui.pid = (uint32_t)getpid();
	c.speed = 1, c.count = 1, c.width = 100;
	while ((ch = getopt_long(argc, argv, "n:h", longs, NULL)) != -1)
		if ((rc = take_option(&c, ch)) >= 0)
			return rc;
	if (optind < argc)
		return bad("unexpected", argv[optind]);
	c.ui.live = c.replay_path == NULL;
	if (!c.batch && (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO)))
		return fail("no terminal; use --batch");
	rc = open_source(&c);
	if (rc == 0)
		rc = c.batch ? run_batch(&c) : run_screen(&c);
	if (record_close(&c.record, &err) != 0)
		rc = fail(err.text);
	remote_free(&c.remote);
	replay_close(&c.replay);
	canvas_free(&c.canvas);
	ui_free(&c.ui);
	return rc;
}
