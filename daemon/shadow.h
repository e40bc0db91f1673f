/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_SHADOW_H
#define OCTETD_SHADOW_H
/*
 * Shadow and guardrail. A sample of finished requests is scored again under the
 * baseline policy, as probes of the lowest priority, and a sequential test per
 * plan compares the divergence with its bound.
 *
 * The test: each scored request gives one X in [0, 1] (its mean KL per output
 * token, cut at 1 nat; its share of tokens with another first choice). The
 * hypothesis is mean X <= bound. A gambler's capital that starts at 1 is
 * multiplied by 1 + l * (X - bound), where l is chosen before X is seen; under
 * the hypothesis its expectation never grows, so by Ville's inequality the
 * chance that it EVER reaches 1000 is at most 1 in 1000, however often one looks
 * (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
 * betting", JRSS B 2024). At 1000 the guardrail acts. Loop thread only.
 */
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include "daemon/engine/engine.h"

struct octetd;
struct shadow;

int shadow_new(struct shadow **, struct octetd *, struct err *);
void shadow_free(struct shadow **); /* after the engine gave everything back */
/* A request ended; may take a copy of it. */
void shadow_take(struct shadow *, const struct request *);
/* What is known of a plan: {"requests", "tokens", "kl", "agree", ...}. */
json_t *shadow_plan_json(const struct shadow *, uint64_t digest);
json_t *shadow_json(const struct shadow *);
/* Bounds for one plan in place of those of [shadow]; 0: those. The plan is
 * measured with at least that share of its requests. Forgets what was measured. */
void shadow_guard(struct shadow *, uint64_t digest, double max_kl, double min_agree, double sample);

/* ---- the test, for its own tests ---- */

struct bet {
	double bound, log_capital;
	double sum, squares; /* of X */
	uint64_t n;
};
#define BET_LIMIT 6.907755278982137 /* log 1000 */
void bet_take(struct bet *, double x); /* x in [0, 1] */
#endif
