/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_VIEW_H
#define OCTET_VIEW_H
/*
 * What the console knows and shows: a copy of the status page, the selection,
 * a line for messages. Draws into cells; knows neither ncurses nor sockets.
 */
#include <stdbool.h>
#include <stdint.h>
#include "client/page.h"
#include "tui/cells.h"

enum view_select { SELECT_CELL, SELECT_ROW, SELECT_COLUMN, SELECT_ALL };

struct view {
	struct octet_page page;
	bool connected;
	uint32_t group, layer;    /* cursor */
	enum view_select select;
	uint32_t scroll;          /* first layer shown */
	bool help, wide_select;
	char message[512];        /* last answer or error */
	bool message_bad;
	char question[256];       /* asked now; empty if none */
	const char *(*help_line)(unsigned i, char *buf, size_t len); /* NULL ends */
};

/* Moves the cursor, kept inside the grid. */
void view_move(struct view *, int layers, int groups);
/* Is the site part of the selection? */
bool view_selected(const struct view *, uint32_t group, uint32_t layer);
/* The selection as an octet selector, e.g. "mlp.up_proj@3"; what it names in words too. */
void view_selector(const struct view *, char *buf, size_t len);
/* The format after the one under the cursor, of those the group can have. */
const char *view_next_format(const struct view *);
void view_draw(struct view *, struct cells *);
#endif
