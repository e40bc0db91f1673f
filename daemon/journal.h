/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_JOURNAL_H
#define OCTETD_JOURNAL_H
/*
 * The append-only journal in state_dir: one JSON object a line, closed by a
 * checksum of the line. It keeps every plan by digest, every intent, and what
 * became of it. Reading stops at the last whole record; what follows (a torn
 * write) is cut off at the next append and reported. journal_append() calls
 * fsync: never on the loop or the engine thread (uv_queue_work); one thread at
 * a time appends, flushes or closes intents, the others may do the rest meanwhile.
 */
#include <stdbool.h>
#include <stdint.h>
#include "client/err.h"
#include "daemon/engine/plan.h"

enum journal_kind {
	JOURNAL_START,    /* a daemon start: epoch and plan it runs */
	JOURNAL_INTENT,   /* a flip is about to be posted */
	JOURNAL_APPLIED,  /* it runs since step */
	JOURNAL_FAILED,   /* it does not, and why */
	JOURNAL_CONFIRMED, /* a change made with confirm_s is to stay */
	JOURNAL_ROLLOUT,  /* a step of a rollout: policy and plan are the candidate's, change its terms; the active plan stays */
};

struct journal_record {
	enum journal_kind kind;
	uint64_t epoch;           /* of the change; grows, never reused */
	int64_t time_us;
	uint32_t uid, pid;
	char program[32];
	char why[64];             /* set, use, rollback, reload, start ... */
	char change[256];         /* plan_diff(), cut if long */
	char policy[64];          /* label of the plan: "fp8", "bf16 + 2 changes" */
	uint64_t plan;            /* digest after the change */
	uint64_t undoes;          /* rollback: the epoch it took back, else 0 */
	uint64_t back_to;         /* rollback: epoch whose plan it restored, else 0 */
	uint64_t file_policy;     /* plan digest of the INI's active policy when written */
	uint64_t step;            /* APPLIED */
	uint32_t confirm_s;       /* not 0: it is to be taken back unless CONFIRMED follows in this time */
	char result[64];          /* FAILED: why */
	bool unjournaled;         /* applied though the journal could not be written (in memory only) */
};

struct journal;
/* Makes state_dir (0700) if missing, locks it (-EBUSY: another octetd), reads
 * the journal. n_layers: plans of other shapes are kept but not offered.
 * *torn: bytes after the last whole record that were dropped. */
int journal_open(struct journal **, const char *state_dir, uint32_t n_layers, uint64_t *torn, struct err *);
void journal_close(struct journal **);
/* Writes the record, before it the plan if the journal has it not yet, and
 * fsyncs. The in-memory list grows only if that worked. */
int journal_append(struct journal *, const struct journal_record *, const struct plan *, struct err *);
/* Retry path: add to memory only, marked unjournaled; written before the next
 * record, or by journal_flush(). */
void journal_remember(struct journal *, const struct journal_record *, const struct plan *);
/* Writes what is in memory only and fsyncs, all of it or nothing; 0 if there is nothing. */
int journal_flush(struct journal *, struct err *);
/* Changes that run or ran and are in memory only. */
uint32_t journal_unwritten(struct journal *);
/* Keeps a plan that only some requests run: known at once, written with the next record. */
void journal_keep(struct journal *, const struct plan *);
/* Any thread, under the journal's own lock; copies out. Effective history, oldest first: each change
 * merged with its outcome (result "applied", "failed: ...", "not applied"). */
struct journal_entry { struct journal_record r; char outcome[80]; };
uint32_t journal_history(struct journal *, struct journal_entry **out); /* malloc'd */
/* The plan of an applied epoch or by digest, with a reference; NULL if unknown. */
struct plan *journal_plan(struct journal *, uint64_t digest);
/* Highest epoch ever seen (intents too); 0 if none. */
uint64_t journal_last_epoch(struct journal *);
/* The last applied change (start included): false if none. */
bool journal_last_applied(struct journal *, struct journal_record *);
bool journal_last_rollout(struct journal *, struct journal_record *);
/* Does the last applied change still wait for its confirmation? */
bool journal_unconfirmed(struct journal *);
/* Where a plain rollback goes from here: the change to undo and the epoch whose
 * plan to restore. Repeated rollbacks walk further back: a rollback undoes the
 * newest applied change that is no rollback, no start and not undone yet.
 * -ENOENT when there is nothing left to undo. */
int journal_rollback_target(struct journal *, uint64_t *undoes, uint64_t *back_to, uint64_t *plan, struct err *);
/* Closes intents without a result as not applied (after a crash); count. */
uint32_t journal_close_intents(struct journal *, struct err *);
#endif
