/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/canvas.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <wchar.h>

static const struct {
	uint32_t utf8;
	char ascii;
} glyphs[N_GLYPHS] = {
	[GLYPH_HLINE] = {0x2500, '-'}, [GLYPH_VLINE] = {0x2502, '|'}, [GLYPH_TL] = {0x250c, '+'}, [GLYPH_TR] = {0x2510, '+'},
	[GLYPH_BL] = {0x2514, '+'}, [GLYPH_BR] = {0x2518, '+'}, [GLYPH_DOT] = {0x25cf, '*'},
	[GLYPH_FULL] = {0x2588, '#'}, [GLYPH_REST] = {0x2591, '.'}, [GLYPH_UP] = {0x25b2, '^'},
};

int
canvas_resize(struct canvas *c, int width, int height)
{
	size_t n = (size_t)width * (size_t)height;

	if (width != c->width || height != c->height) {
		struct cell *more = realloc(c->cell, (n > 0 ? n : 1) * sizeof(*more));

		if (more == NULL)
			return -ENOMEM;
		c->cell = more;
		c->width = width;
		c->height = height;
	}
	for (size_t i = 0; i < n; i++)
		c->cell[i] = (struct cell){.c = ' ', .style = STYLE_TEXT};
	return 0;
}

void
canvas_free(struct canvas *c)
{
	free(c->cell);
	*c = (struct canvas){0};
}

static void
print_char(uint32_t c, FILE *to)
{
	if (c < 0x80)
		fputc((int)c, to);
	else if (c < 0x800)
		fprintf(to, "%c%c", 0xc0 | c >> 6, 0x80 | (c & 0x3f));
	else if (c < 0x10000)
		fprintf(to, "%c%c%c", 0xe0 | c >> 12, 0x80 | (c >> 6 & 0x3f), 0x80 | (c & 0x3f));
	else
		fprintf(to, "%c%c%c%c", 0xf0 | c >> 18, 0x80 | (c >> 12 & 0x3f), 0x80 | (c >> 6 & 0x3f), 0x80 | (c & 0x3f));
}

static int
row_end(const struct canvas *c, int y)
{
	const struct cell *row = c->cell + (size_t)y * (size_t)c->width;
	int end = c->width;

	while (end > 0 && row[end - 1].c == ' ')
		end--;
	return end;
}

void
canvas_print(const struct canvas *c, FILE *to)
{
	int last = c->height;

	while (last > 0 && row_end(c, last - 1) == 0)
		last--;
	for (int y = 0; y < last; y++) {
		int end = row_end(c, y);

		for (int x = 0; x < end; x++)
			print_char(c->cell[(size_t)y * (size_t)c->width + (size_t)x].c, to);
		fputc('\n', to);
	}
}

const struct cell *
canvas_at(const struct canvas *c, int y, int x)
{
	return y < 0 || x < 0 || y >= c->height || x >= c->width ? NULL : &c->cell[(size_t)y * (size_t)c->width + (size_t)x];
}

/* ---- panes ---- */

struct pane
pane_all(struct canvas *c)
{
	return (struct pane){c, 0, 0, c->height, c->width};
}

static int
clamp(int v, int lo, int hi)
{
	return v < lo ? lo : v > hi ? hi : v;
}

struct pane
pane_part(const struct pane *p, int y, int x, int height, int width)
{
	y = clamp(y, 0, p->height), x = clamp(x, 0, p->width);
	return (struct pane){p->on, p->y + y, p->x + x, clamp(height, 0, p->height - y), clamp(width, 0, p->width - x)};
}

static struct cell *
cell_at(const struct pane *p, int y, int x)
{
	if (y < 0 || x < 0 || y >= p->height || x >= p->width)
		return NULL;
	return &p->on->cell[(size_t)(p->y + y) * (size_t)p->on->width + (size_t)(p->x + x)];
}

static void
set(const struct pane *p, int y, int x, enum style style, uint32_t c)
{
	struct cell *cell = cell_at(p, y, x);

	if (cell != NULL)
		cell->c = c, cell->style = (uint8_t)style;
}

/* One character off UTF-8; what cannot be shown in one column becomes '?'. */
static uint32_t
next_char(const char **s, bool ascii)
{
	const unsigned char *p = (const unsigned char *)*s;
	int more = *p < 0x80 ? 0 : *p >= 0xf0 ? 3 : *p >= 0xe0 ? 2 : *p >= 0xc2 ? 1 : -1;
	uint32_t c = more == 0 ? *p : *p & (0x3fu >> (more > 0 ? more : 0));

	p++;
	for (int i = 0; i < more; i++, p++) {
		if ((*p & 0xc0) != 0x80) {
			more = -1;
			break;
		}
		c = c << 6 | (*p & 0x3f);
	}
	*s = (const char *)p;
	if (more < 0 || c < ' ' || c == 0x7f || (c >= 0x80 && (ascii || wcwidth((wchar_t)c) != 1)))
		return '?';
	return c;
}

int
put(const struct pane *p, int y, int x, enum style style, const char *fmt, ...)
{
	char text[1024];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	for (const char *s = text; *s != '\0'; x++)
		set(p, y, x, style, next_char(&s, p->on->ascii));
	return x;
}

static uint32_t
glyph_char(const struct pane *p, enum glyph g)
{
	return p->on->ascii ? (uint32_t)glyphs[g].ascii : glyphs[g].utf8;
}

int
put_glyph(const struct pane *p, int y, int x, enum style style, enum glyph g)
{
	set(p, y, x, style, glyph_char(p, g));
	return x + 1;
}

void
put_line(const struct pane *p, int y, const char *title)
{
	for (int x = 0; x < p->width; x++)
		put_glyph(p, y, x, STYLE_DIM, GLYPH_HLINE);
	if (*title != '\0')
		put(p, y, 2, STYLE_TITLE, " %s ", title);
}

/* Of the next word; what is longer than a line is broken, behind a comma if there is one. */
static int
word_bytes(const char *s, int room)
{
	int n = (int)strcspn(s, " \n"), cut = room;

	if (n <= room || room < 1)
		return n;
	while (cut > 1 && s[cut - 1] != ',')
		cut--;
	return cut > 1 ? cut : room;
}

int
put_words(const struct pane *p, int y, int x, enum style style, const char *text)
{
	int at = x;

	for (const char *s = text; *s != '\0';) {
		int n = word_bytes(s, p->width - x);

		if (at > x && at + n > p->width)
			y++, at = x;
		at = put(p, y, at, style, "%.*s", n, s);
		s += n;
		if (*s == '\n')
			y++, at = x;
		else if (*s == ' ' && at < p->width && at > x)
			at = put(p, y, at, style, " ");
		s += *s == '\n' || *s == ' ';
	}
	return y + 1;
}

void
put_gauge(const struct pane *p, int y, int x, int width, enum style style, double share)
{
	int full = share > 0 ? (int)(fmin(share, 1) * width + 0.5) : 0;

	for (int i = 0; i < width; i++)
		put_glyph(p, y, x + i, i < full ? style : STYLE_DIM, i < full ? GLYPH_FULL : GLYPH_REST);
}

/* Eighths of a cell from its bottom. */
static uint32_t
eighths(bool ascii, int n)
{
	return ascii ? (uint32_t)" _.:-=+*#"[n] : n == 0 ? ' ' : 0x2580u + (uint32_t)n;
}

void
put_graph(const struct pane *p, int y, int x, int height, const float *v, int n, double top)
{
	for (int i = 0; i < n; i++) {
		int level;

		if (!isfinite(v[i]))
			continue;
		level = top > 0 ? (int)(fmin(fmax((double)v[i] / top, 0), 1) * 8 * height + 0.5) : 0;
		/* What is not zero shows, and zero is not nothing. */
		if (level < 1)
			level = 1;
		for (int row = height - 1; row >= 0; row--, level -= 8)
			set(p, y + row, x + i, v[i] > 0 ? STYLE_CURVE : STYLE_DIM, eighths(p->on->ascii, clamp(level, 0, 8)));
	}
}

void
put_heat(const struct pane *p, int y, int x, int level)
{
	static const uint32_t utf8[] = {' ', 0x2591, 0x2592, 0x2593, 0x2588};

	level = clamp(level, 0, 4);
	set(p, y, x, STYLE_HEAT0 + (unsigned)level, p->on->ascii ? (uint32_t)" .:+#"[level] : utf8[level]);
}

void
mark(const struct pane *p, int y, int x, int width, unsigned marks)
{
	for (int i = 0; i < width; i++) {
		struct cell *cell = cell_at(p, y, x + i);

		if (cell != NULL)
			cell->marks |= (uint8_t)marks;
	}
}

void
hit(const struct pane *p, int y, int x, int width, enum hit what, uint32_t a, uint32_t b)
{
	for (int i = 0; i < width; i++) {
		struct cell *cell = cell_at(p, y, x + i);

		if (cell != NULL)
			cell->hit = (uint8_t)what, cell->a = (uint16_t)a, cell->b = (uint16_t)b;
	}
}

void
pane_clear(const struct pane *p)
{
	for (int y = 0; y < p->height; y++)
		for (int x = 0; x < p->width; x++)
			*cell_at(p, y, x) = (struct cell){.c = ' ', .style = STYLE_TEXT};
}

struct pane
pane_box(const struct pane *p, int height, int width, const char *title)
{
	struct pane box;

	height = clamp(height, 3, p->height), width = clamp(width, 8, p->width);
	box = pane_part(p, p->height - height, (p->width - width) / 2, height, width);
	pane_clear(&box);
	for (int x = 1; x < width - 1; x++) {
		put_glyph(&box, 0, x, STYLE_ASK, GLYPH_HLINE);
		put_glyph(&box, height - 1, x, STYLE_ASK, GLYPH_HLINE);
	}
	for (int y = 1; y < height - 1; y++) {
		put_glyph(&box, y, 0, STYLE_ASK, GLYPH_VLINE);
		put_glyph(&box, y, width - 1, STYLE_ASK, GLYPH_VLINE);
	}
	put_glyph(&box, 0, 0, STYLE_ASK, GLYPH_TL), put_glyph(&box, 0, width - 1, STYLE_ASK, GLYPH_TR);
	put_glyph(&box, height - 1, 0, STYLE_ASK, GLYPH_BL), put_glyph(&box, height - 1, width - 1, STYLE_ASK, GLYPH_BR);
	put(&box, 0, 2, STYLE_TITLE, " %.*s ", width - 6, title);
	return pane_part(&box, 1, 2, height - 2, width - 4);
}

/* ---- numbers ---- */

const char *
text_number(double v, char buf[NUMBER_TEXT])
{
	static const char up[] = " kMGTP", down[] = " mun";
	double a = fabs(v);
	int u = 0, d = 0;

	if (!isfinite(v)) {
		snprintf(buf, NUMBER_TEXT, "-");
		return buf;
	}
	while (a >= 999.5 && u < 5)
		a /= 1000, v /= 1000, u++;
	while (a > 0 && a < (d == 0 ? 0.0995 : 0.995) && d < 3)
		a *= 1000, v *= 1000, d++;
	if (u == 0 && d == 0)
		snprintf(buf, NUMBER_TEXT, a >= 99.95 || v == (int)v ? "%.0f" : a < 1 ? "%.2f" : "%.1f", v);
	else
		snprintf(buf, NUMBER_TEXT, a >= 99.95 ? "%.0f%c" : "%.1f%c", v, u > 0 ? up[u] : down[d]);
	return buf;
}

const char *
text_bytes(double v, char buf[NUMBER_TEXT])
{
	static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
	int u = 0;

	for (; v >= 1024 && u < 4; u++)
		v /= 1024;
	snprintf(buf, NUMBER_TEXT, u == 0 ? "%.0f %s" : "%.1f %s", v, unit[u]);
	return buf;
}

const char *
text_time(int64_t us, char buf[NUMBER_TEXT])
{
	time_t t = (time_t)(us / 1000000);
	struct tm tm;

	if (gmtime_r(&t, &tm) == NULL)
		snprintf(buf, NUMBER_TEXT, "?");
	else
		snprintf(buf, NUMBER_TEXT, "%02d:%02d:%02d", tm.tm_hour, tm.tm_min, tm.tm_sec);
	return buf;
}

/* As octetctl writes it: "0.0042", two digits that count. */
const char *
text_kl(double v, char buf[NUMBER_TEXT])
{
	int digits = v != 0 ? 1 - (int)floor(log10(fabs(v))) : 0;

	if (!isfinite(v))
		snprintf(buf, NUMBER_TEXT, "-");
	else
		snprintf(buf, NUMBER_TEXT, "%.*f", digits < 0 ? 0 : digits > 8 ? 8 : digits, v);
	return buf;
}

const char *
text_us(double v, char buf[NUMBER_TEXT])
{
	if (!isfinite(v))
		snprintf(buf, NUMBER_TEXT, "?");
	else if (fabs(v) >= 999.5)
		snprintf(buf, NUMBER_TEXT, "%.*f ms", fabs(v) < 99950 ? 1 : 0, v / 1000);
	else
		snprintf(buf, NUMBER_TEXT, "%.*f us", fabs(v) < 9.95 ? 1 : 0, v);
	return buf;
}

const char *
text_ms(double v, char buf[NUMBER_TEXT])
{
	if (!(v >= 0))
		snprintf(buf, NUMBER_TEXT, "-");
	else
		snprintf(buf, NUMBER_TEXT, v < 10 ? "%.2f ms" : v < 1000 ? "%.0f ms" : "%.3g s", v < 1000 ? v : v / 1000);
	return buf;
}

const char *
text_date(int64_t us, char buf[NUMBER_TEXT])
{
	time_t t = (time_t)(us / 1000000);
	struct tm tm;

	if (gmtime_r(&t, &tm) == NULL || strftime(buf, NUMBER_TEXT, "%Y-%m-%d %H:%M", &tm) == 0)
		snprintf(buf, NUMBER_TEXT, "?");
	return buf;
}
