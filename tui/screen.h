/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_SCREEN_H
#define OCTET_SCREEN_H
/*
 * The terminal: a canvas through ncurses, keys and the mouse as codes of ui.h.
 * The only file that knows curses, and the only one that knows colours. Only
 * cells that changed are handed to curses, and it sends only what differs.
 */
#include "client/err.h"
#include "tui/ui.h"

int screen_open(struct err *);
void screen_close(void); /* the terminal as it was; may be called twice */
void screen_size(int *width, int *height);
void screen_show(const struct canvas *);
/* Waiting no time. -1: none; the pointer goes into ui. */
int screen_key(struct ui *);
void screen_theme(enum theme);
void screen_mouse(bool);
void screen_repaint(void);
void screen_suspend(void); /* until the shell continues us */
void screen_resume(void);  /* we were stopped and continued without it */
#endif
