/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_LISTEN_H
#define OCTETD_LISTEN_H
/*
 * Listening Unix sockets, and who is at the other end. A socket is made under
 * a lock file beside it (PATH.lock, held while we live) with its final mode
 * from the start; a stale one is told from a live one by connecting. Loop
 * thread only.
 */
#include <stdint.h>
#include <sys/types.h>
#include "client/err.h"

struct listener {
	int fd, lock_fd;
	char *path;
};

/* type: SOCK_SEQPACKET or SOCK_STREAM, made non-blocking. Missing parent
 * directories are made (0755). -EADDRINUSE: a live daemon has it. */
int listen_open(struct listener *, const char *path, int type, unsigned mode, struct err *);
void listen_close(struct listener *); /* unlinks socket and lock */
/* A non-blocking connection, -EAGAIN when there is none. Survives EMFILE by
 * closing a reserve descriptor, refusing one caller, and opening it again. */
int listen_accept(struct listener *);

struct peer {
	uid_t uid; gid_t gid; pid_t pid;
	gid_t *groups; uint32_t n_groups; /* SO_PEERGROUPS */
	char program[32];                 /* /proc/PID/comm: for display only */
};
int peer_get(struct peer *, int fd);
void peer_clear(struct peer *);
/* list: "user:NAME, group:NAME, uid:N, gid:N, *". root and our own uid always match. */
int peer_allowed(const struct peer *, const char *list);
/* The same, but root and our own uid are nothing special. */
int peer_matches(const struct peer *, const char *list);
/* 0, or -EINVAL naming the bad entry: for config checks. */
int peer_list_check(const char *list, struct err *);
#endif
