/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_UI_H
#define OCTET_UI_H
/*
 * What the console shows and what keys do to it, without a terminal: a view
 * draws into a pane, a key's action changes struct ui and returns reactions,
 * which main.c alone carries out. Nothing here opens sockets, starts programs
 * or knows curses; --batch, a replay and the fuzzer run all of it.
 *
 *   view-NAME.c   one view each: drawing, its keys, its entry
 *   grid.c        layers x groups: selection, drawing
 *   frame.c       head, tabs, foot, boxes over the view
 *   keys.c        keys of all views, and which table a key goes to
 *   list.c        moving, searching and clicking in views that are lists
 *   ask.c         the one question before something changes; undo, rollback
 *   prompt.c      ":", "/", "s": a line with completion
 *   pager.c       what a command says
 */
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include "tui/canvas.h"
#include "tui/data.h"
#include "tui/sites.h"

/* ---- keys ---- */

enum {
	K_UP = 0x200000, K_DOWN, K_LEFT, K_RIGHT, K_PPAGE, K_NPAGE, K_HOME, K_END, K_BTAB, K_BACKSPACE, K_DELETE, K_MOUSE, K_PASTE, K_PASTED,
	K_F0 = 0x200100 /* + number */
};
#define K_ESC 27
#define K_ENTER '\n'
#define CTRL(c) ((c) & 0x1f)

enum reaction {
	REACT_NONE = 0,
	REACT_DRAW = 1,
	REACT_REPAINT = 2,  /* the terminal's content is not what we believe */
	REACT_SUSPEND = 4,
	REACT_THEME = 8,    /* ui.theme changed */
	REACT_MOUSE = 16,   /* ui.mouse changed */
	REACT_REQUEST = 32, /* ui.request is to be sent */
	REACT_COMMAND = 64, /* ui.command is to be run */
	REACT_STOP = 128,   /* the command that runs is to be stopped */
	REACT_STEP = 256,   /* a replay: the next snapshot */
	REACT_QUIT = 512,
};

struct ui;

/* A table ends with an empty entry. */
struct key {
	int code[4];             /* 0: none */
	const char *name, *help; /* as ? and the manual page say it */
	unsigned (*act)(struct ui *, int arg);
	int arg;
	const char *word;        /* in the foot; "+word": of a wide screen; NULL: not there */
};

/* ---- views ---- */

struct list {
	int at, top, height, count; /* height: rows it was last drawn in, count: of how many */
};

struct view {
	const char *name, *title; /* "precision", "Precision" */
	const char *about;        /* a line of help */
	void (*draw)(struct ui *, const struct pane *);
	const struct key *keys;
	int (*batch_height)(const struct ui *, int width); /* rows it needs; NULL: 19 */
	/* Of lists; NULL: it is none. */
	int (*count)(const struct ui *);
	void (*row_text)(const struct ui *, int row, char *buf, size_t len); /* what / searches */
	/* Where it is no list. 0: not found. */
	bool (*find)(struct ui *, const char *text, int direction);
	unsigned (*click)(struct ui *, const struct cell *, bool released);
	unsigned (*opened)(struct ui *);
	void (*wheel)(struct ui *, int direction);
};
#define MAX_VIEWS 9
extern const struct view *const views[]; /* ends with NULL; keys.c */
extern const struct view view_precision, view_traffic, view_clients, view_quality, view_history, view_log;

/* ---- state ---- */

enum mode { MODE_VIEW, MODE_HELP, MODE_ASK, MODE_PROMPT, MODE_PAGER };
enum theme { THEME_AUTO, THEME_DARK, THEME_LIGHT, THEME_16, THEME_MONO, N_THEMES };
extern const char *const theme_names[N_THEMES];
enum theme theme_find(const char *name); /* N_THEMES: there is none */
enum select { SELECT_CELL, SELECT_LAYER, SELECT_GROUP, SELECT_MODULE, SELECT_BLOCK, SELECT_ALL, SELECT_GLOB, N_SELECTS };
enum shows { SHOWS_FORMAT, SHOWS_KL, SHOWS_TIME, SHOWS_BYTES, SHOWS_ABSMAX, SHOWS_ZERO, SHOWS_SATURATED, N_SHOWS };

struct grid {
	uint32_t layer, group, anchor_layer, anchor_group;
	enum select select;
	char glob[96];
	enum shows shows;
	int fold;            /* -1: as the height needs */
	bool folded;         /* as last drawn */
	struct list rows;
};

enum ask_kind { ASK_NONE, ASK_FLIP, ASK_ROLLBACK };

struct ask {
	enum ask_kind kind;
	bool seen;           /* it was on the screen before the key that answers it came */
	struct sites sites;  /* FLIP: selected */
	uint8_t format;
	struct effect effect;
	uint32_t confirm_s;
	uint64_t epoch;      /* what was active when it was asked: if_epoch */
	bool has_to;         /* ROLLBACK: to this epoch, else the last change */
	uint64_t to;
	uint32_t n;          /* sites, and the change in words */
	char change[2048];
};

#define PROMPT_TEXT 1024u
#define PROMPT_KEPT 32u
struct prompt {
	char kind; /* ':', '/', 's' */
	char text[PROMPT_TEXT];
	size_t len, at;
	char kept[PROMPT_KEPT][PROMPT_TEXT]; /* earlier commands, the i-th at i % PROMPT_KEPT */
	uint32_t n_kept, back;
	char hint[1024];
};

struct pager {
	char title[PROMPT_TEXT + 16];
	char *text; /* malloc'd, terminated */
	size_t len;
	int top, height, lines;
	bool running;
	int status; /* of the command, once it ended */
};

/* What a reply is for. */
enum then { THEN_NOTHING, THEN_FLIPPED, THEN_ASK_ROLLBACK, THEN_UNDONE, THEN_HISTORY };

struct ui {
	struct data data;
	bool ascii, batch, paused, mouse, live; /* live: a daemon, no replay */
	bool pasting;           /* what comes was typed by nobody */
	bool quit_warned;
	bool read_only;
	char read_only_why[96];
	enum theme theme;
	int refresh_ms;
	uint32_t uid, pid;      /* this console's, to know its own changes */
	int view;
	enum mode mode;
	struct list lists[MAX_VIEWS];
	struct grid grid;
	struct ask ask;
	struct prompt prompt;
	struct pager pager;
	int help_top, help_lines, help_height;
	int zoom;               /* traffic: seconds a column */
	int order;              /* clients: sorted by */
	int log_level;          /* log: 0 all, 1 warnings and errors */
	char search[64];
	char message[400];
	bool message_bad;

	/* Every change that is known, newest first: the page's, and older ones asked for. */
	struct page_history *history; /* malloc'd */
	uint32_t n_history;
	bool history_whole;
	uint64_t own_epoch;     /* of the last change that was answered here */
	uint64_t undone, undone_at; /* U: back to this epoch while that one is active; 0: nothing to redo */
	uint32_t child[16], n_children; /* pids of commands, the i-th at i % 16 */
	int pending_ms;         /* how long a request is under way, for the spinner; -1: none */
	struct sites sent;      /* a flip that was sent and is not answered yet */
	bool sending;
	uint8_t sent_format;

	/* Wishes that go with reactions. */
	json_t *request;        /* owned until it is taken */
	enum then request_then;
	char command[PROMPT_TEXT];
	struct {
		int y, x;
		bool pressed, released;
		int wheel; /* -1 up, 1 down */
	} pointer;
	const struct canvas *drawn; /* what the pointer points into */
};

void ui_init(struct ui *);
void ui_free(struct ui *);
/* A snapshot came: what is kept beside it follows. */
unsigned ui_take(struct ui *, const struct octet_page *);
unsigned ui_key(struct ui *, int code);
void ui_draw(struct ui *, struct canvas *);
/* The reply to ui.request; reply may be NULL, err is set if rc != 0. */
unsigned ui_reply(struct ui *, enum then, int rc, const char *why, const json_t *reply);
/* What the command says; status -1: it goes on. */
unsigned ui_output(struct ui *, const char *text, size_t len, int status);
void ui_say(struct ui *, bool bad, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
int ui_find_view(const char *name); /* -1: there is none */
const char *ui_view_names(char *buf, size_t len); /* with blanks between */
unsigned ui_open_view(struct ui *, int view);
int ui_batch_height(const struct ui *, int width);
/* All keys, a line each: "TABLE\tKEY\thelp"; NULL after the last. */
const char *ui_key_line(unsigned i, char *buf, size_t len);
const struct view *ui_view(const struct ui *);
struct list *ui_list(struct ui *);

/* ---- parts of it ---- */

extern const struct key view_keys[], list_keys[], ask_keys[], prompt_keys[], pager_keys[], help_keys[];
const struct key *keys_find(const struct key *, int code);
const struct key *ui_find_key(const struct ui *, int code); /* of the view that is shown */
bool ui_may_change(struct ui *); /* says why not */

/* list.c */
void list_fit(struct list *, int count, int height); /* the cursor is seen */
bool list_search(struct ui *, int direction);
unsigned act_search_next(struct ui *, int direction);
void list_scrollbar(const struct pane *, int y, int x, int height, int top, int count);
bool text_has(const char *text, const char *part); /* without regard to case */

/* ask.c */
unsigned act_undo(struct ui *, int arg);
unsigned act_redo(struct ui *, int arg);
unsigned act_keep(struct ui *, int arg);
unsigned act_rollback(struct ui *, int arg);
unsigned ask_flip(struct ui *);
unsigned ask_rollback_to(struct ui *, uint64_t epoch);
void ask_draw(struct ui *, const struct pane *);

/* prompt.c */
unsigned act_prompt(struct ui *, int kind);
unsigned prompt_key(struct ui *, int code);
void prompt_draw(const struct ui *, const struct pane *, int y);
void prompt_draw_hint(const struct ui *, const struct pane *); /* at its bottom */
/* The words of a command line; cuts text up. -1: a quote is open, or too many. */
#define MAX_WORDS 64
int command_words(char *text, char *word[MAX_WORDS]);
/* As if it was typed after ":". */
unsigned command_run(struct ui *, const char *text);
/* Commands of the console itself. false: it is one of octetctl. */
bool command_own(struct ui *, char **word, int n, unsigned *reaction);

/* pager.c */
unsigned act_output(struct ui *, int arg);
void pager_open(struct ui *, const char *title);
void pager_draw(struct ui *, const struct pane *);

/* grid.c */
int grid_draw(struct ui *, const struct pane *, enum shows); /* the row after it */
void grid_sites(const struct ui *, struct sites *); /* what is selected */
bool grid_select_glob(struct ui *, const char *selector); /* says why not */
/* view-history.c */
void history_take(struct ui *);
void history_reply(struct ui *, const json_t *);
void history_words(const struct page_history *, char *buf, size_t len); /* what it changed */
enum style gain_style(double percent); /* of tokens/s */
double history_gain(const struct ui *, int row); /* what it did to the tokens/s in per cent; NAN: not seen */
const struct page_history *history_of(const struct ui *, uint64_t epoch);
#endif
