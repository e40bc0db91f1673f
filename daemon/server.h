/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_SERVER_H
#define OCTETD_SERVER_H
/*
 * The data socket: handshakes, sessions and their shared memory, requests in
 * and events out. Loop thread only, but for the sinks, which the engine thread
 * calls. A session is freed when its socket is closed and its last request was
 * reaped.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>
#include "client/err.h"
#include "client/page.h"
#include "daemon/engine/engine.h"
#include "daemon/listen.h"

struct server;
struct server_config {
	const char *path; unsigned mode;       /* fixed after server_new() */
	uint32_t max_clients, max_requests;    /* sessions in all; requests in flight of one */
	uint32_t max_clients_per_uid;          /* connections of one user, before and after their hello */
	uint32_t max_requests_per_uid;         /* requests in flight of one user */
	uint32_t handshake_timeout_ms, spin_us;
	bool share_prefixes;                   /* between users, too */
	/* The plan of a request that does not follow the active one: of the policy
	 * it names, else (name NULL) of the one for its client. 0 and *plan NULL:
	 * it follows. *rollout: it is a candidate's. -EACCES, -ENOENT. */
	int (*policy)(void *arg, const struct peer *, const char *name, uint64_t request, struct plan **plan,
	    uint64_t *epoch, bool *rollout);
	/* For display: the policy of a client's requests that name none; NULL: they
	 * follow the active plan. *candidate: it is a rollout's. */
	const char *(*client_policy)(void *arg, const struct peer *, bool *candidate);
	/* A request came back, just before it is freed. */
	void (*finished)(void *arg, const struct request *);
	/* A plan that once ran, for a replay; NULL if it is not known. A reference. */
	struct plan *(*plan)(void *arg, uint64_t digest);
	/* Called again and again while the loop thread spins: takes what the engine gave back. True: there was something. */
	bool (*reap)(void *arg);
	uint32_t *awake;                       /* atomic: set while it spins; what reap takes needs no other wake-up */
	void *arg;                             /* fixed after server_new(), like those above */
};
/* Borrows loop, model, engine and the tokenizer blob. */
int server_new(struct server **, uv_loop_t *, const struct server_config *, const struct model *,
    struct engine *, const void *tok_blob, size_t tok_len, struct err *);
void server_configure(struct server *, const struct server_config *);
/* true: refuse new clients and submissions (-ESHUTDOWN); what runs goes on. */
void server_drain(struct server *, bool);
uint32_t server_in_flight(const struct server *);
bool server_idle(const struct server *); /* no request in flight */
/* Takes the list of engine_reap(), frees its requests, frees dead sessions. */
void server_reaped(struct server *, struct request *);
uint32_t server_clients(const struct server *, struct page_client *, uint32_t cap);
/* Cancels what is in flight, waits for it and closes everything. The engine still
 * runs; its notify must reach server_reaped() through the loop. */
void server_free(struct server **);
#endif
