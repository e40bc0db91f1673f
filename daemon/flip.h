/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_FLIP_H
#define OCTETD_FLIP_H
/*
 * The one route by which the active plan changes, for set, use, rollback and
 * reload: a queue, one change at a time. Derive and check the whole new plan,
 * journal the intent (thread pool), post to the engine, journal that it is
 * applied, answer. Refused or failed means nothing changed. Loop thread only.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>
#include "client/err.h"
#include "daemon/engine/engine.h"
#include "daemon/engine/plan.h"
#include "daemon/journal.h"

struct flipper;

struct flip_who {
	uint32_t uid, pid;
	char program[32];
};

enum flip_kind { FLIP_SET, FLIP_USE, FLIP_ROLLBACK, FLIP_RELOAD, FLIP_CONFIRM,
	FLIP_NOTE }; /* a record of its own in the journal; changes no plan */

struct flip_ask {
	enum flip_kind kind;
	struct flip_who who;
	char why[64];               /* empty: the name of the kind */
	bool dry_run, has_if_epoch, has_to;
	uint64_t if_epoch;
	uint64_t to;                /* ROLLBACK, CONFIRM */
	uint32_t confirm_s;         /* SET, USE: taken back after so long unless it is confirmed; 0: stays */
	bool expired;               /* ROLLBACK: nobody confirmed if_epoch */
	char policy[64];            /* USE, NOTE: its name */
	char **rule; size_t n_rules; /* SET: "SELECTOR=FORMAT"; taken over, freed with flip_rules_free() */
	struct plan *note_plan;     /* NOTE: what it is about (a reference, taken over), and in words */
	char note[128];
	/* RELOAD: called when its turn has come. 0 and *plan NULL: nothing to flip. */
	int (*prepare)(void *arg, struct plan **plan, char policy[64], uint64_t *file_policy, struct err *);
	void *prepare_arg;
};
void flip_rules_free(char ***rule, size_t n);

struct flip_result {
	uint64_t epoch;        /* the new one; the active one if nothing changed */
	bool changed, dry_run, unjournaled;
	uint32_t sites;
	const char *change;    /* plan_diff() */
	const char *policy;    /* label after the change */
	uint64_t step, plan_digest;
};
/* rc 0 or -errno with a message; the result is set either way, and borrowed. */
typedef void (*flip_done)(void *arg, int rc, const struct err *, const struct flip_result *);

/* What the flipper needs of the rest; borrowed. */
struct flip_config {
	uv_loop_t *loop;
	struct engine *engine;
	struct journal *journal;
	uint32_t n_layers;
	/* Looks a policy up in the file as it is loaded now. */
	int (*policy_plan)(void *arg, const char *name, struct plan **, struct err *);
	void *policy_arg;
};

/* Starts from an applied plan (a reference is taken); file_policy is the digest
 * of the file's active policy. */
int flipper_new(struct flipper **, const struct flip_config *, struct plan *active, uint64_t epoch, const char *policy,
    uint64_t file_policy, struct err *);
/* Closes its timer; run the loop afterwards. It must be idle. */
void flipper_free(struct flipper **);

/* Queues the change; done is called exactly once, maybe before this returns. */
void flip_ask(struct flipper *, struct flip_ask *, flip_done, void *arg);
/* Takes the list of engine_reap_flips(). */
void flipper_reaped(struct flipper *, struct flip *);
/* From here on everything is refused (-ESHUTDOWN) but what runs already. */
void flipper_drain(struct flipper *);
bool flipper_idle(const struct flipper *);

struct plan *flipper_plan(const struct flipper *); /* borrowed */
struct plan *flipper_next(const struct flipper *); /* on its way to the engine, else the active one; borrowed */
uint64_t flipper_epoch(const struct flipper *);
const char *flipper_policy(const struct flipper *);
uint64_t flipper_file_policy(const struct flipper *);
/* The change that waits for a confirmation, and for how long yet; 0: none. */
uint64_t flipper_unconfirmed(const struct flipper *, uint32_t *seconds_left);
uint32_t flipper_unjournaled(const struct flipper *); /* changes that wait for the journal */
uint64_t flipper_changes(const struct flipper *);     /* counts history changes, for caches */
#endif
