/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_RECORD_H
#define OCTET_RECORD_H
/*
 * Files of status page snapshots, for bug reports and tests. Of each snapshot
 * only what changed is kept:
 *   file   "OCTETREC" u32 format (1) u32 PAGE_VERSION u32 sizeof(struct octet_page) u32 0, then frames
 *   frame  u32 bytes that follow, then runs: u32 offset in the page, u32 bytes, the bytes
 * A frame starts from the one before, the first from zeros. A file is hostile:
 * runs are checked against the page; what the page then says, data.c checks.
 */
#include "client/err.h"
#include "client/page.h"

struct record;
int record_open(struct record **, const char *path, struct err *); /* makes the file */
int record_put(struct record *, const struct octet_page *, struct err *);
int record_close(struct record **, struct err *);

struct replay;
int replay_open(struct replay **, const char *path, struct err *);
/* 1: the next snapshot, borrowed until the next call; 0: there is no more (a
 * last frame that is cut off is none); -errno. */
int replay_next(struct replay *, const struct octet_page **, struct err *);
void replay_close(struct replay **);
#endif
