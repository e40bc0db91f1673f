/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_ROLLOUT_H
#define OCTETD_ROLLOUT_H
/*
 * A candidate policy for some of the requests, chosen by a stable hash of the
 * client (uid, pid, program) or of the request; both sides side by side; and
 * surge, a faster policy while the queue is long. Every step is a record of the
 * journal, and a start takes up what the last one says. Loop thread only.
 */
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include "client/err.h"
#include "daemon/control.h"
#include "daemon/engine/engine.h"
#include "daemon/listen.h"

struct octetd;
struct rollout;

int rollout_new(struct rollout **, struct octetd *, struct err *); /* goes on where the journal says */
void rollout_free(struct rollout **); /* closes its timer; run the loop afterwards */
/* The candidate's plan (a reference) if this request is to run it, NULL. */
struct plan *rollout_choose(struct rollout *, const struct peer *, uint64_t request, uint64_t *epoch);
/* The candidate's policy if it is given by client, and this one has it; NULL. */
const char *rollout_of_client(const struct rollout *, const struct peer *);
/* A request ended. */
void rollout_take(struct rollout *, const struct request *);
uint64_t rollout_digest(const struct rollout *); /* 0: there is none */
void rollout_breach(struct rollout *, const char *why);
json_t *rollout_json(const struct rollout *); /* null if there is none */
json_t *surge_json(const struct rollout *);
extern const struct verb verb_rollout;
#endif
