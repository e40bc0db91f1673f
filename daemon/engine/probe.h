/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_PROBE_H
#define OCTET_PROBE_H
/*
 * Probes: two plans measured on the same tokens in the same engine, as work of
 * the lowest priority. A step runs rows of one side: first the baseline's, whose
 * logits are kept, then the candidate's for the same positions, and then the two
 * are compared. Beside live rows a probe gets as many rows as cost `share` of a
 * step without it, or, where one row costs more, one step of 128 that takes twice
 * as long; alone, as many as fit. Live requests take its pages when they
 * need them: it is then computed again, to the same numbers.
 *
 * The front makes probes, posts them with engine_probe() and gets each back once
 * from engine_reap_probes(); in between they are the engine thread's.
 */
#include <stdbool.h>
#include <stdint.h>
#include "client/err.h"
#include "daemon/engine/engine.h"
#include "daemon/engine/kv.h"

enum { SIDE_BASELINE, SIDE_CANDIDATE, N_SIDES };

/* What both sides say of the token at one position, in FP64 from FP32 logits. */
struct probe_score {
	double nll[N_SIDES];     /* -log p(token) */
	double kl;               /* sum over the vocabulary of p_baseline * log(p_baseline / p_candidate) */
	uint32_t first[N_SIDES]; /* the likeliest token; ties go to the lowest id */
	uint32_t common5;        /* tokens that are among the five likeliest of both */
};

/* SCORE compares every position; TIME repeats one step, the sides in turns. */
enum probe_kind { PROBE_SCORE, PROBE_TIME };

struct probe {
	enum probe_kind kind;
	uint32_t *token, n;         /* malloc'd; freed by probe_free() */
	struct plan *plan[N_SIDES]; /* references */
	uint32_t from;              /* SCORE: tokens [from, n) are scored; 1 at least */
	double share;               /* 0.2: steps with live rows take a fifth longer */
	uint32_t max_rows;          /* of a pass; 0: what fits */
	bool exclusive;             /* live requests wait */
	uint32_t rows, rounds;      /* TIME: the last rows positions as one step, so often on each side */
	double seconds;             /* TIME: no more rounds after so long */
	float *dump[N_SIDES];       /* SCORE: [n - from, vocab] borrowed, or NULL */
	void *owner;                /* the front's */
	/* What came out. */
	struct probe_score *score;  /* SCORE: [n - from] */
	float *us[N_SIDES];         /* TIME: [rounds_run] microseconds of each step */
	uint32_t rounds_run;
	double side_us[N_SIDES];    /* SCORE: of the forward passes that ran nothing else, and their rows */
	uint64_t side_rows[N_SIDES];
	double cost_us;             /* SCORE: of its steps; beside live rows what they took more */
	int error;                  /* 0, -ECANCELED, -ENOSPC, -EDOM with where */
	int bad_side;               /* EDOM: first non-finite value */
	enum plan_group bad_group;
	uint32_t bad_layer, bad_position;
	/* The engine's own. */
	struct probe *next;
	uint32_t cancelled;         /* atomic */
	struct kv_seq kv[N_SIDES];
	float *logits;              /* [chunk_max, vocab] of the baseline */
	bool half;                  /* PROBE_TIME: the round has one side yet to run */
	uint32_t chunk_max, chunk;  /* rows of the pass that is under way, 0: none */
	uint32_t n_run, n_scored;   /* positions; n_scored survives preemption */
	double rows_beside, beside_ms; /* rows of a pass beside live ones; what the dearer side of the last cost more */
	bool in_turns;              /* one row costs more than the share: one step of many, then */
	int side;
	bool under_way;             /* rows of it were chosen and not taken yet: it must stay as it is */
};

/* Takes the tokens (malloc'd) in any case, and references to the plans. -ENOMEM. */
int probe_new(struct probe **, enum probe_kind, uint32_t *token, uint32_t n, uint32_t from, struct plan *baseline,
    struct plan *candidate);
void probe_free(struct probe **);
/* KL and the rest of one position, of logits [vocab]; false if one is not finite. */
bool probe_compare(const struct k_ops *, const float *baseline, const float *candidate, uint32_t vocab, uint32_t token,
    struct probe_score *);

/* ---- the front's side, loop thread ---- */

/* -E2BIG when it could never fit the KV cache beside nothing; -EINVAL: too short. */
int engine_probe(struct engine *, struct probe *, struct err *);
void engine_cancel_probe(struct engine *, struct probe *);
struct probe *engine_reap_probes(struct engine *); /* list by ->next, or NULL */

/* ---- the engine's side ---- */

struct forward_row;
/* Does the first probe ask for a step without live rows? That step runs neither behind nor before another. */
bool probe_alone(const struct engine *);
/* Adds rows of the first probe after n_live rows; returns their number. probe_after() before the next call: what a probe runs
 * depends on what came out. */
uint32_t probe_choose(struct engine *, uint32_t n_live);
/* Takes what a step computed: n rows whose logits start at `logits`. ms: of the
 * forward pass; n_live: live rows in it. */
void probe_after(struct engine *, uint32_t n, uint32_t n_live, const float *logits, double ms);
/* A step without probe rows took so long. */
void probe_note_live(struct engine *, double ms);
/* Gives the pages of all probes back, but of one that is under way; false if there were none. */
bool probe_drop_pages(struct engine *);
void probe_drop_cancelled(struct engine *);
void probe_finish_all(struct engine *, int error);
#endif
