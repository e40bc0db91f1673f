/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_STATUS_H
#define OCTETD_STATUS_H
/*
 * The status page (client/page.h): a memfd that only the daemon can write. It
 * is refreshed while at least one control connection watches. Loop thread only.
 */
#include "client/err.h"

struct octetd;
struct request;
struct status;

int status_new(struct status **, struct octetd *, struct err *);
/* Closes its timer; run the loop afterwards. */
void status_free(struct status **);
int status_fd(const struct status *); /* read-only; stays the status' own */
void status_watch(struct status *);   /* one watcher more: refreshes at once */
void status_unwatch(struct status *);
void status_take(struct status *, const struct request *); /* one of an app's ended: its times */
#endif
