/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_REMOTE_H
#define OCTET_REMOTE_H
/*
 * The daemon as the console reaches it: its status page; a request now and then
 * on a thread of its own, so that the screen goes on; and octetctl's command
 * line in a child process. Main thread only.
 */
#include <jansson.h>
#include <poll.h>
#include <stdbool.h>
#include "client/err.h"
#include "client/page.h"
#include "tui/ui.h"

/* ---- the page ---- */

struct remote;
int remote_new(struct remote **, const char *socket, struct err *);
void remote_free(struct remote **);
/* A copy of the page (connecting first if need be), and what is to be said of
 * the link. Sends the daemon nothing unless it connects. */
enum link remote_read(struct remote *, struct octet_page *, struct err *why);
bool remote_is_operator(const struct remote *);

/* ---- requests ---- */

int call_start(const char *socket, json_t *request, enum then, struct err *); /* takes the reference; one at a time */
int call_fd(void);        /* readable once the reply is there; -1: none is under way */
int64_t call_age_ms(void); /* -1 */
/* The reply is the caller's. */
enum then call_take(int *rc, struct err *, json_t **reply);

/* ---- commands ---- */

int job_start(const char *socket, const char *command, uint32_t *pid, struct err *); /* one at a time */
int job_fd(void);         /* readable: output or its end; -1: none runs */
/* Some output; *status: -1, or how it ended. */
size_t job_read(char *buf, size_t len, int *status);
void job_stop(void);
#endif
