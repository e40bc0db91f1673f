/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_EVAL_H
#define OCTETD_EVAL_H
/*
 * One eval: two plans over the same text and tasks, as work beside live traffic.
 * It belongs to a control connection and is dropped with it; what the engine
 * still holds of it comes back by itself. Results go to the store (evals.h).
 * Loop thread only.
 */
#include <jansson.h>
#include "client/err.h"
#include "daemon/engine/probe.h"

struct octetd;
struct eval;

/* Who a probe goes back to: probe->owner points to one. */
struct probe_owner {
	void (*done)(struct probe_owner *, struct probe *);
};

int eval_new(struct eval **, struct octetd *, struct err *);
/* Adds to the text of a file; to the items {"input", "expected"[, "template"]} of a task. */
int eval_add_text(struct eval *, const char *file, const char *data, size_t len, struct err *);
int eval_add_task(struct eval *, const char *file, const json_t *items, struct err *);
/* The verb's fields: candidate, baseline, context, exclusive, dump, reuse, name, stop, sweep. */
int eval_start(struct eval *, const json_t *request, struct err *);
/* {"state": "running" or "done", "done", "total", "seconds_left"[, "result"]}, or the error it ended with. */
int eval_poll(struct eval *, json_t **reply, struct err *);
/* Descriptor of the logits that were asked for: a NumPy array file; stays the eval's. -1: none. */
int eval_dump_fd(const struct eval *);
/* Cancels what runs. */
void eval_drop(struct eval **);
#endif
