/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CANVAS_H
#define OCTET_CANVAS_H
/*
 * A screen as an array of cells that have a meaning each, not a colour. Views
 * draw into panes of it; screen.c shows it through ncurses, canvas_print()
 * writes it as text. What is written is cut at the pane's edges, and nothing
 * in it steers the terminal: what is no printable character of one column
 * becomes '?'.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum style {
	STYLE_TEXT, STYLE_TITLE, STYLE_DIM, STYLE_TAB, STYLE_TAB_ON, STYLE_GOOD, STYLE_WARN, STYLE_BAD, STYLE_ASK,
	STYLE_KEY, STYLE_CURVE, STYLE_EVENT,
	STYLE_HEAT0, /* to STYLE_HEAT0 + 4, the hottest */
	STYLE_FORMAT0 = STYLE_HEAT0 + 5, /* + format index, up to 7 */
	N_STYLES = STYLE_FORMAT0 + 8
};
#define MARK_CURSOR 1u
#define MARK_SELECTED 2u
#define MARK_PENDING 4u

/* Drawn in UTF-8 or, where it cannot be, in ASCII. */
enum glyph { GLYPH_HLINE, GLYPH_VLINE, GLYPH_TL, GLYPH_TR, GLYPH_BL, GLYPH_BR, GLYPH_DOT, GLYPH_FULL, GLYPH_REST, GLYPH_UP,
	N_GLYPHS };

/* What a cell stands for, so that the mouse needs no geometry of its own. */
enum hit { HIT_NONE, HIT_TAB, HIT_SITE, HIT_LAYER, HIT_GROUP, HIT_ROW };

struct cell {
	uint32_t c;
	uint8_t style, marks, hit;
	uint16_t a, b; /* of hit: view; group, layer; row */
};

struct canvas {
	int width, height;
	bool ascii;
	struct cell *cell; /* [height, width] */
};

/* A rectangle of a canvas; columns and rows count from its corner. */
struct pane {
	struct canvas *on;
	int y, x, height, width;
};

int canvas_resize(struct canvas *, int width, int height); /* and clears */
void canvas_free(struct canvas *);
/* Without trailing blanks and blank lines at the end. */
void canvas_print(const struct canvas *, FILE *);
const struct cell *canvas_at(const struct canvas *, int y, int x); /* NULL: outside */

struct pane pane_all(struct canvas *);
struct pane pane_part(const struct pane *, int y, int x, int height, int width); /* kept inside */
void pane_clear(const struct pane *);
/* Clears a box at the bottom, draws its frame and title; what is inside it. */
struct pane pane_box(const struct pane *, int height, int width, const char *title);

/* Writes at (y, x); returns the column after it. */
int put(const struct pane *, int y, int x, enum style, const char *fmt, ...) __attribute__((format(printf, 5, 6)));
int put_glyph(const struct pane *, int y, int x, enum style, enum glyph);
void put_line(const struct pane *, int y, const char *title); /* across, with a title in it */
/* Words broken into lines; returns the row after the last. */
int put_words(const struct pane *, int y, int x, enum style, const char *text);
void put_gauge(const struct pane *, int y, int x, int width, enum style, double share);
/* Columns of 0 to top from the bottom of [y, y + height); NAN: nothing known. */
void put_graph(const struct pane *, int y, int x, int height, const float *v, int n, double top);
void put_heat(const struct pane *, int y, int x, int level); /* 0 to 4, one column */
void mark(const struct pane *, int y, int x, int width, unsigned marks);
void hit(const struct pane *, int y, int x, int width, enum hit, uint32_t a, uint32_t b);

/* Numbers in few columns, e.g. "12.5", "3.1k", "7.0 MiB", "1.2m". */
#define NUMBER_TEXT 32
const char *text_number(double v, char buf[NUMBER_TEXT]);
const char *text_bytes(double v, char buf[NUMBER_TEXT]);
const char *text_kl(double v, char buf[NUMBER_TEXT]);
const char *text_us(double v, char buf[NUMBER_TEXT]); /* "2.3 us", "1.4 ms", "?" */
const char *text_ms(double v, char buf[NUMBER_TEXT]);    /* "-" below 0 */
const char *text_time(int64_t us, char buf[NUMBER_TEXT]); /* 12:34:56 UTC */
const char *text_date(int64_t us, char buf[NUMBER_TEXT]); /* 2026-01-31 12:34 */
#endif
