/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CTL_H
#define OCTET_CTL_H
/*
 * The control socket's client side, for octetctl and octet-console: one JSON
 * object a line each way over SOCK_STREAM, blocking with a deadline.
 *   request  {"verb": "set", "rules": ["attention.*=fp8"], "dry_run": true, ...}
 *   reply    {"ok": true, ...} | {"ok": false, "error": "...", "code": -22}
 * The verb "page" answers {"ok": true, "bytes": N, "operator": true or false}
 * with the status page's descriptor attached (SCM_RIGHTS) to the first byte of the reply.
 */
#include <jansson.h>
#include <stdbool.h>
#include "client/err.h"
#include "client/page.h"

struct ctl;
/* NULL path: $OCTET_CONTROL_SOCKET, else beside the data socket's default
 * (".../octet.sock" -> ".../octet-control.sock"). */
int ctl_open(struct ctl **, const char *path, struct err *);
void ctl_close(struct ctl **);
/* Steals nothing: request stays the caller's. *reply is a new reference, set
 * also when the daemon refused (then -errno from its code and its text in err). */
int ctl_call(struct ctl *, json_t *request, json_t **reply, int timeout_ms, struct err *);
/* The descriptor that came with the last reply, now the caller's; -1: none. */
int ctl_take_fd(struct ctl *);
/* Maps the status page read-only. */
int ctl_page(struct ctl *, const struct octet_page **, struct err *);
void ctl_page_free(const struct octet_page **);
/* May this user change anything? As the daemon said when it gave the page. */
bool ctl_operator(const struct ctl *);
/* Is the daemon still at the other end? Asks it nothing. */
bool ctl_alive(const struct ctl *);
/* A consistent copy; -EAGAIN if the writer died in the middle. Checks every
 * count and terminates every string. */
int page_read(const struct octet_page *, struct octet_page *copy);
void page_sanitise(struct octet_page *);
/* Default socket paths: data != 0 the data socket. malloc'd. */
char *ctl_default_path(int data);
#endif
