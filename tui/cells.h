/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CELLS_H
#define OCTET_CELLS_H
/*
 * A screen as an array of cells with a meaning each. Views draw into it; it is
 * then shown by ncurses or printed by --batch. ASCII text only.
 */
#include <stdio.h>

enum role {
	ROLE_TEXT, ROLE_TITLE, ROLE_DIM, ROLE_ERROR, ROLE_ASK,
	ROLE_FORMAT0, /* + format index, up to 7 */
	ROLE_N = ROLE_FORMAT0 + 8
};
#define CELL_CURSOR 0x40   /* selected */
#define CELL_PENDING 0x80  /* wanted and executed differ */

struct cell {
	char c;
	unsigned char role; /* enum role | CELL_ flags */
};

struct cells {
	int width, height;
	struct cell *cell; /* [height, width] */
};

int cells_resize(struct cells *, int width, int height); /* and clears */
void cells_free(struct cells *);
/* Prints at (y, x), cut at the edge; returns the column after it. */
int cells_put(struct cells *, int y, int x, int role, const char *fmt, ...) __attribute__((format(printf, 5, 6)));
/* Plain text, without trailing blanks and blank lines at the end. */
void cells_print(const struct cells *, FILE *);
#endif
