/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_FORWARD_H
#define OCTET_FORWARD_H
/*
 * The forward pass of a batch of rows: each row is one position of one
 * sequence and carries the plan that runs it. Rows of one plan lie together;
 * at each site neighbouring plans that agree run as one matrix product. Engine
 * thread and its team only. Nothing is allocated after forward_new().
 */
#include <stdint.h>
#include "daemon/engine/evidence.h"
#include "daemon/engine/kv.h"
#include "daemon/engine/model.h"
#include "daemon/engine/plan.h"

struct forward_row {
	uint32_t token, pos;      /* drawn: what the step started before draws for its want so numbered */
	const struct kv_seq *kv;  /* opened up to pos */
	const struct plan *plan;
	bool wants_logits;
	bool drawn;               /* on a device only */
};

/* Where a non-finite value appeared first. */
struct forward_site {
	enum plan_group group;
	uint32_t layer;
};

struct forward;
int forward_new(struct forward **, const struct model *, const struct k_ops *, struct team *,
    struct kv_pool *, uint32_t max_rows, struct err *);
void forward_free(struct forward **);
/* From here on a device runs the passes; loaded with the same pool and max_rows, borrowed. */
struct device;
void forward_use_device(struct forward *, struct device *);

/* Runs rows [0, n), n <= max_rows. Writes K and V of every row. Returns logits
 * [n_wanted, vocab] FP32 of the rows that want them, in row order; valid until
 * the next call. */
float *forward_run(struct forward *, const struct forward_row *, uint32_t n);
/* The two halves of it, with a device: KD_AHEAD passes may be started, those that were not waited for. */
void forward_start(struct forward *, const struct forward_row *, uint32_t n);
float *forward_wait(struct forward *);

/* The next forward_run() also notes what FP8 would do to the inputs of one of its rows (of lm_head: of the first that wants
 * logits); or the next forward_start(), once it was waited for. */
void forward_sample(struct forward *, struct evidence *, uint32_t row);

/* Runs one row again and tells where it first went non-finite; false if it did not. */
bool forward_find_nonfinite(struct forward *, const struct forward_row *, struct forward_site *);
#endif
