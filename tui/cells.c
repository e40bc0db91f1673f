/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/cells.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>

int
cells_resize(struct cells *s, int width, int height)
{
	size_t n = (size_t)width * (size_t)height;

	if (width != s->width || height != s->height) {
		struct cell *more = realloc(s->cell, (n > 0 ? n : 1) * sizeof(*more));

		if (more == NULL)
			return -ENOMEM;
		s->cell = more;
		s->width = width;
		s->height = height;
	}
	for (size_t i = 0; i < n; i++)
		s->cell[i] = (struct cell){' ', ROLE_TEXT};
	return 0;
}

void
cells_free(struct cells *s)
{
	free(s->cell);
	*s = (struct cells){0};
}

int
cells_put(struct cells *s, int y, int x, int role, const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (y < 0 || y >= s->height)
		return x;
	for (const char *p = text; *p != '\0' && x < s->width; p++, x++) {
		/* Names come from other programs: nothing may steer the terminal. */
		if (x >= 0)
			s->cell[(size_t)y * (size_t)s->width + (size_t)x] =
			    (struct cell){*p >= ' ' && *p < 127 ? *p : '?', (unsigned char)role};
	}
	return x;
}

void
cells_print(const struct cells *s, FILE *to)
{
	int last = 0;

	for (int y = 0; y < s->height; y++)
		for (int x = 0; x < s->width; x++)
			if (s->cell[(size_t)y * (size_t)s->width + (size_t)x].c != ' ')
				last = y + 1;
	for (int y = 0; y < last; y++) {
		const struct cell *row = s->cell + (size_t)y * (size_t)s->width;
		int end = s->width;

		while (end > 0 && row[end - 1].c == ' ')
			end--;
		for (int x = 0; x < end; x++)
			fputc(row[x].c, to);
		fputc('\n', to);
	}
}
