/* SPDX-License-Identifier: Apache-2.0 */
#define NCURSES_WIDECHAR 1
#include "tui/screen.h"

#include <curses.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <term.h>
#include <termios.h>
#include <unistd.h>

static SCREEN *screen;
static struct canvas shown; /* what curses was told last */
static bool colours;

/* A paste comes between two keys of its own, where the terminal can say so. */
#define PASTE_ON "\033[?2004h"
#define PASTE_OFF "\033[?2004l"
enum { KEY_PASTE = KEY_MAX + 1, KEY_PASTED };

static struct termios before; /* what the terminal was, */
static char leave[256];       /* and what brings its screen back, for on_fault() */

/* ---- themes ---- */

struct look {
	short fg, bg; /* -1: the terminal's own */
	attr_t attr;
};

#define FORMATS(a, b, c, d, e) [STYLE_FORMAT0] = {a, -1, 0}, [STYLE_FORMAT0 + 1] = {b, -1, 0}, [STYLE_FORMAT0 + 2] = {c, -1, 0}, \
	[STYLE_FORMAT0 + 3] = {d, -1, 0}, [STYLE_FORMAT0 + 4] = {e, -1, 0}, [STYLE_FORMAT0 + 5] = {e, -1, 0}, \
	[STYLE_FORMAT0 + 6] = {e, -1, 0}, [STYLE_FORMAT0 + 7] = {e, -1, 0}
#define HEATS(a, b, c, d, e) [STYLE_HEAT0] = {a, -1, 0}, [STYLE_HEAT0 + 1] = {b, -1, 0}, [STYLE_HEAT0 + 2] = {c, -1, 0}, \
	[STYLE_HEAT0 + 3] = {d, -1, 0}, [STYLE_HEAT0 + 4] = {e, -1, A_BOLD}

static const struct look dark[N_STYLES] = {
	[STYLE_TEXT] = {-1, -1, 0}, [STYLE_TITLE] = {-1, -1, A_BOLD}, [STYLE_DIM] = {245, -1, 0},
	[STYLE_TAB] = {250, 236, 0}, [STYLE_TAB_ON] = {231, 25, A_BOLD}, [STYLE_GOOD] = {114, -1, 0}, [STYLE_WARN] = {221, -1, 0},
	[STYLE_BAD] = {203, -1, A_BOLD}, [STYLE_ASK] = {221, -1, 0}, [STYLE_KEY] = {81, -1, 0}, [STYLE_CURVE] = {75, -1, 0},
	[STYLE_EVENT] = {215, -1, 0}, HEATS(245, 110, 179, 208, 196), FORMATS(80, 114, 179, 176, 147),
};
static const struct look light[N_STYLES] = {
	[STYLE_TEXT] = {-1, -1, 0}, [STYLE_TITLE] = {-1, -1, A_BOLD}, [STYLE_DIM] = {242, -1, 0},
	[STYLE_TAB] = {238, 254, 0}, [STYLE_TAB_ON] = {231, 25, A_BOLD}, [STYLE_GOOD] = {28, -1, 0}, [STYLE_WARN] = {130, -1, 0},
	[STYLE_BAD] = {160, -1, A_BOLD}, [STYLE_ASK] = {130, -1, 0}, [STYLE_KEY] = {25, -1, 0}, [STYLE_CURVE] = {25, -1, 0},
	[STYLE_EVENT] = {130, -1, 0}, HEATS(243, 67, 136, 166, 160), FORMATS(24, 28, 94, 90, 60),
};
static const struct look sixteen[N_STYLES] = {
	[STYLE_TEXT] = {-1, -1, 0}, [STYLE_TITLE] = {-1, -1, A_BOLD}, [STYLE_DIM] = {-1, -1, A_DIM},
	[STYLE_TAB] = {-1, -1, A_REVERSE}, [STYLE_TAB_ON] = {COLOR_WHITE, COLOR_BLUE, A_BOLD}, [STYLE_GOOD] = {COLOR_GREEN, -1, 0},
	[STYLE_WARN] = {COLOR_YELLOW, -1, 0}, [STYLE_BAD] = {COLOR_RED, -1, A_BOLD}, [STYLE_ASK] = {COLOR_YELLOW, -1, 0},
	[STYLE_KEY] = {COLOR_CYAN, -1, 0}, [STYLE_CURVE] = {COLOR_BLUE, -1, A_BOLD}, [STYLE_EVENT] = {COLOR_MAGENTA, -1, 0},
	HEATS(-1, COLOR_CYAN, COLOR_GREEN, COLOR_YELLOW, COLOR_RED),
	FORMATS(COLOR_CYAN, COLOR_GREEN, COLOR_YELLOW, COLOR_MAGENTA, COLOR_BLUE),
};
static const struct look mono[N_STYLES] = {
	[STYLE_TITLE] = {-1, -1, A_BOLD}, [STYLE_DIM] = {-1, -1, A_DIM},
	[STYLE_TAB_ON] = {-1, -1, A_REVERSE | A_BOLD}, [STYLE_WARN] = {-1, -1, A_BOLD}, [STYLE_BAD] = {-1, -1, A_BOLD | A_UNDERLINE},
	[STYLE_ASK] = {-1, -1, A_BOLD}, [STYLE_KEY] = {-1, -1, A_BOLD}, [STYLE_HEAT0] = {-1, -1, A_DIM},
	[STYLE_HEAT0 + 4] = {-1, -1, A_BOLD}, [STYLE_FORMAT0] = {-1, -1, 0}, [STYLE_FORMAT0 + 1] = {-1, -1, A_BOLD},
};
static const struct look *looks = mono;

/* "fg;bg", as some terminals say: 7 and 9 to 15 are light grounds. */
static bool
ground_is_light(void)
{
	const char *s = getenv("COLORFGBG"), *semi = s != NULL ? strrchr(s, ';') : NULL;
	int bg = semi != NULL ? atoi(semi + 1) : 0;

	return bg == 7 || (bg >= 9 && bg <= 15);
}

/* What 16 colours have that reads on white. */
static short
darker(short fg)
{
	return fg == COLOR_CYAN ? COLOR_BLUE : fg == COLOR_YELLOW ? COLOR_MAGENTA : fg;
}

/* What is selected must read on its ground, too. */
static short
selected_fg(enum theme t, short style)
{
	if (t == THEME_16)
		return COLOR_WHITE;
	return t == THEME_LIGHT && style >= STYLE_HEAT0 && style < STYLE_FORMAT0 ? -1 : looks[style].fg;
}

void
screen_theme(enum theme t)
{
	const char *no = getenv("NO_COLOR");
	short ground;

	if (t == THEME_AUTO)
		t = !colours || (no != NULL && *no != '\0') ? THEME_MONO : COLORS < 256 ? THEME_16 : ground_is_light() ? THEME_LIGHT : THEME_DARK;
	if (!colours)
		t = THEME_MONO;
	if (COLORS < 256 && (t == THEME_DARK || t == THEME_LIGHT))
		t = THEME_16;
	looks = t == THEME_DARK ? dark : t == THEME_LIGHT ? light : t == THEME_16 ? sixteen : mono;
	ground = t == THEME_DARK ? 18 : t == THEME_LIGHT ? 153 : COLOR_BLUE;
	for (short s = 0; s < N_STYLES && looks != mono; s++) {
		bool swap = t == THEME_16 && looks[s].bg < 0 && ground_is_light();

		init_pair((short)(s + 1), swap ? darker(looks[s].fg) : looks[s].fg, looks[s].bg);
		init_pair((short)(s + 1 + N_STYLES), selected_fg(t, s), ground);
	}
	canvas_free(&shown);
}

static void
look_of(const struct cell *c, attr_t *attr, short *pair)
{
	bool selected = (c->marks & MARK_SELECTED) != 0;

	*attr = looks[c->style].attr;
	*pair = looks == mono ? 0 : (short)(c->style + 1 + (selected ? N_STYLES : 0));
	if (selected)
		*attr = (*attr & ~A_DIM) | (looks == mono ? A_UNDERLINE : 0);
	if (c->marks & MARK_CURSOR)
		*attr = A_REVERSE | A_BOLD, *pair = looks == mono ? 0 : STYLE_TITLE + 1;
	if (c->marks & MARK_PENDING)
		*attr |= A_BOLD;
}

/* ---- life ---- */

static void
say(const char *sequence)
{
	putp(sequence);
	fflush(stdout);
}

/* Only what a signal handler may do. */
static void
on_fault(int sig)
{
	if (write(STDOUT_FILENO, leave, strlen(leave)) >= 0)
		tcsetattr(STDIN_FILENO, TCSANOW, &before);
	raise(sig); /* its default now, once this returns */
}

static void
catch_faults(void)
{
	static const int fault[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
	const char *end = tigetstr("rmcup"), *cursor = tigetstr("cnorm"), *plain = tigetstr("sgr0");
	struct sigaction sa = {.sa_handler = on_fault, .sa_flags = (int)SA_RESETHAND}, old;

	snprintf(leave, sizeof(leave), "%s\033[?1000l\033[?1002l\033[?1006l%s%s%s", PASTE_OFF, plain != NULL ? plain : "",
	    cursor != NULL ? cursor : "", end != NULL ? end : "");
	/* A sanitizer's stay. */
	for (size_t i = 0; i < sizeof(fault) / sizeof(*fault); i++)
		if (sigaction(fault[i], NULL, &old) == 0 && old.sa_handler == SIG_DFL)
			sigaction(fault[i], &sa, NULL);
}

int
screen_open(struct err *err)
{
	const char *term = getenv("TERM");

	if (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO))
		return err_set(err, -ENOTTY, "no terminal; use --batch");
	tcgetattr(STDIN_FILENO, &before);
	screen = newterm(NULL, stdout, stdin);
	/* One that cannot move its cursor shows no grid. */
	if (screen == NULL || tigetstr("cup") == NULL) {
		screen_close();
		return err_set(err, -ENOTSUP, "terminal '%s' is unknown or cannot do this; use --batch", term != NULL ? term : "");
	}
	colours = has_colors() && start_color() == OK;
	if (colours)
		use_default_colors();
	typeahead(-1); /* a frame goes out in one piece */
	cbreak();
	noecho();
	nonl();
	keypad(stdscr, TRUE);
	nodelay(stdscr, TRUE);
	set_escdelay(40);
	mouseinterval(0);
	define_key("\033[200~", KEY_PASTE);
	define_key("\033[201~", KEY_PASTED);
	curs_set(0);
	say(PASTE_ON);
	catch_faults();
	return 0;
}

void
screen_close(void)
{
	if (screen == NULL)
		return;
	mousemask(0, NULL);
	say(PASTE_OFF);
	endwin();
	delscreen(screen);
	screen = NULL;
	canvas_free(&shown);
}

void
screen_size(int *width, int *height)
{
	*width = COLS, *height = LINES;
}

void
screen_mouse(bool on)
{
	mousemask(on ? BUTTON1_PRESSED | BUTTON1_RELEASED | BUTTON1_CLICKED | BUTTON4_PRESSED | BUTTON5_PRESSED : 0, NULL);
}

void
screen_repaint(void)
{
	canvas_free(&shown);
	clearok(curscr, TRUE);
}

/* Whoever stopped us has had the terminal meanwhile, and may have left it otherwise. */
void
screen_resume(void)
{
	reset_prog_mode();
	if (isendwin())
		refresh();
	else {
		say(enter_ca_mode != NULL ? enter_ca_mode : "");
		curs_set(1), curs_set(0);
	}
	say(PASTE_ON);
	screen_repaint();
}

void
screen_suspend(void)
{
	struct sigaction stop = {.sa_handler = SIG_DFL}, own;
	sigset_t open, was;

	say(PASTE_OFF);
	endwin();
	sigaction(SIGTSTP, &stop, &own);
	sigemptyset(&open);
	sigaddset(&open, SIGTSTP);
	sigprocmask(SIG_UNBLOCK, &open, &was);
	raise(SIGTSTP);
	/* Here the shell continues us. */
	sigprocmask(SIG_SETMASK, &was, NULL);
	sigaction(SIGTSTP, &own, NULL);
	screen_resume();
}

/* ---- showing ---- */

static void
show_cell(int y, int x, const struct cell *c)
{
	wchar_t text[2] = {(wchar_t)c->c, 0};
	attr_t attr;
	short pair;
	cchar_t cc;

	look_of(c, &attr, &pair);
	if (setcchar(&cc, text, attr, pair, NULL) == OK)
		mvadd_wch(y, x, &cc);
}

static bool
is_other(const struct cell *a, const struct cell *b)
{
	return a->c != b->c || a->style != b->style || a->marks != b->marks;
}

void
screen_show(const struct canvas *c)
{
	size_t n = (size_t)c->width * (size_t)c->height;
	bool all = shown.width != c->width || shown.height != c->height;

	if (all && canvas_resize(&shown, c->width, c->height) != 0)
		return;
	for (int y = 0; y < c->height; y++) {
		for (int x = 0; x < c->width; x++) {
			size_t at = (size_t)y * (size_t)c->width + (size_t)x;

			if (all || is_other(&shown.cell[at], &c->cell[at]))
				show_cell(y, x, &c->cell[at]);
		}
	}
	memcpy(shown.cell, c->cell, n * sizeof(*c->cell));
	refresh();
}

/* ---- keys ---- */

/* What came in one piece, as over a slow link, is one KEY_MOUSE; getmouse() gives the newest first. */
static MEVENT moves[8];
static int n_moves;

static void
take_moves(void)
{
	while (n_moves < 8 && getmouse(&moves[n_moves]) == OK)
		n_moves++;
}

static int
pointer(struct ui *ui)
{
	MEVENT e;

	if (n_moves == 0)
		return -1;
	e = moves[--n_moves];
	ui->pointer.y = e.y, ui->pointer.x = e.x;
	ui->pointer.pressed = (e.bstate & (BUTTON1_PRESSED | BUTTON1_CLICKED)) != 0;
	ui->pointer.released = (e.bstate & BUTTON1_RELEASED) != 0;
	ui->pointer.wheel = (e.bstate & BUTTON4_PRESSED) != 0 ? -1 : (e.bstate & BUTTON5_PRESSED) != 0 ? 1 : 0;
	return K_MOUSE;
}

int
screen_key(struct ui *ui)
{
	static const struct {
		wint_t from;
		int to;
	} map[] = {
		{KEY_UP, K_UP}, {KEY_DOWN, K_DOWN}, {KEY_LEFT, K_LEFT}, {KEY_RIGHT, K_RIGHT}, {KEY_PPAGE, K_PPAGE}, {KEY_NPAGE, K_NPAGE},
		{KEY_HOME, K_HOME}, {KEY_END, K_END}, {KEY_BTAB, K_BTAB}, {KEY_BACKSPACE, K_BACKSPACE}, {KEY_DC, K_DELETE},
		{KEY_ENTER, K_ENTER}, {KEY_PASTE, K_PASTE}, {KEY_PASTED, K_PASTED},
	};
	wint_t c;
	int rc;

	if (n_moves > 0)
		return pointer(ui);
	rc = get_wch(&c);
	if (rc == ERR)
		return -1;
	if (rc != KEY_CODE_YES)
		return c == '\r' ? K_ENTER : (int)c;
	if (c == KEY_MOUSE) {
		take_moves();
		return pointer(ui);
	}
	for (size_t i = 0; i < sizeof(map) / sizeof(*map); i++)
		if (map[i].from == c)
			return map[i].to;
	if (c >= KEY_F(1) && c <= KEY_F(12))
		return K_F0 + (int)(c - KEY_F(0));
	return 0; /* KEY_RESIZE too: drawn anew */
}
