/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_H
#define OCTETD_H
/*
 * What the daemon is made of, for its loop thread: main.c makes and frees the
 * parts in order, control verbs and reload reach them through here. Modules
 * that can do with less are handed less.
 */
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <uv.h>
#include "client/err.h"
#include "conf/conf.h"
#include "daemon/engine/device.h"
#include "daemon/engine/engine.h"
#include "daemon/engine/model.h"
#include "daemon/engine/plan.h"
#include "daemon/engine/team.h"
#include "daemon/flip.h"
#include "daemon/journal.h"
#include "daemon/server.h"
#include "kernels/kernels.h"

struct control;
struct evals;
struct rollout;
struct shadow;
struct status;

struct octetd {
	uv_loop_t loop;
	const char *conf_path;
	struct conf *conf;          /* as it runs: restart-only options keep their old value */
	const struct k_ops *ops;
	const char *backend;
	struct device *device;      /* NULL: the CPU runs the model */
	struct device_options device_options;
	struct team *team;
	struct model *model;
	void *tok_blob; size_t tok_len;
	struct journal *journal;
	struct engine *engine;
	struct server *server;
	struct flipper *flips;
	struct control *control;
	struct status *status;
	struct evals *evals;
	struct shadow *shadow;
	struct rollout *rollout;
	uint32_t measuring;         /* probes and requests of evals that the engine has */
	void (*notify)(void *);     /* engine thread: wakes the loop; gets struct octetd */
	bool (*reap)(void *);       /* takes what the engine gave back; gets struct octetd */
	uint32_t awake;             /* atomic: the loop thread looks for that by itself */
	int64_t started_us;         /* Unix time */
	bool draining;              /* stopping */
	bool drained;               /* by an operator: no new requests until resume */
	bool saving;                /* a policy is being written */
};

/* What conf.h says, in the words of engine and server. */
void octetd_engine_config(const struct octetd *, const struct conf *, struct engine_config *);
void octetd_server_config(struct octetd *, const struct conf *, struct server_config *);
/* Checks what conf_load() cannot: user and group names, the backend. */
int octetd_conf_check(const struct conf *, struct err *);
/* Names of [clients] become ids, so that no request waits for a lookup. */
int octetd_clients_resolve(struct conf *, struct err *);
/* Lets the journal keep the plans of all policies: requests may run any of them. */
void octetd_keep_policies(const struct octetd *);
/* Every policy of a file resolved for a model; then the plan of the active one. */
int octetd_policies_check(const struct conf *, uint32_t n_layers, struct plan **active, struct err *);
int octetd_policy_plan(const struct conf *, const char *name, uint32_t n_layers, struct plan **, struct err *);

/* Reads the file again; done is called with 0 or -errno, the list of changes
 * (borrowed) and the flip's result (NULL if it came to none). */
typedef void (*reload_done)(void *arg, int rc, const struct err *, const json_t *changes, const struct flip_result *);
void reload_start(struct octetd *, const struct flip_who *, reload_done, void *arg);

/* Tells the service manager, if there is one ($NOTIFY_SOCKET, sd_notify(3)). */
void octetd_notify(const char *state);
int64_t octetd_now_us(void); /* Unix time */
/* A JSON string of any bytes: what is no UTF-8 becomes '?'. */
json_t *json_lossy(const char *);
#endif
