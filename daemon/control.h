/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_CONTROL_H
#define OCTETD_CONTROL_H
/*
 * The control socket: connections, lines, access, and the table of verbs
 * (verb-*.c). One JSON object a line each way, replies in order: a connection
 * whose verb answers later, or whose reply is not yet read, is not read from.
 * Loop thread only.
 */
#include <jansson.h>
#include <stdbool.h>
#include "client/err.h"
#include "daemon/listen.h"

struct octetd;
struct control;
struct call; /* one request on its way to its reply */

enum field_type { FIELD_STRING, FIELD_BOOL, FIELD_NUMBER, FIELD_ARRAY };

struct verb_field {
	const char *name;
	enum field_type type;
	bool required;
};

#define VERB_LATER 1 /* exec: call_reply() or call_refuse() will follow */

struct verb {
	const char *name;
	bool operator; /* changes something */
	struct verb_field fields[14]; /* checked before exec; the last is empty */
	/* 0 and *reply (an object, "ok" is added), VERB_LATER, or -errno with a message. */
	int (*exec)(struct octetd *, struct call *, const json_t *request, json_t **reply, struct err *);
};

/* Opens the socket and starts to listen. */
int control_new(struct control **, struct octetd *, const char *path, unsigned mode, struct err *);
/* Closes all; run the loop afterwards. No call may be pending. */
void control_free(struct control **);

const struct peer *call_peer(const struct call *);
bool call_is_operator(const struct call *);
void call_reply(struct call *, json_t *reply); /* takes the reference */
void call_refuse(struct call *, int code, const char *why);
/* Sends a descriptor (borrowed) with the reply and counts the connection as a
 * watcher of the status page. */
void call_watch(struct call *, int fd);
/* Sends a descriptor (borrowed) with the reply. */
void call_attach(struct call *, int fd);
/* The eval of this connection: dropped with it. */
struct eval;
struct eval **call_eval(struct call *);

extern const struct verb verb_status, verb_plan, verb_clients, verb_history, verb_page;
extern const struct verb verb_eval, verb_evals;
extern const struct verb verb_set, verb_use, verb_rollback, verb_reload, verb_confirm, verb_drain, verb_resume, verb_save;
#endif
