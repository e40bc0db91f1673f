/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_EVIDENCE_H
#define OCTET_EVIDENCE_H
/*
 * What FP8 does, or would do, to the inputs of each site: measured on one row
 * of one step in many, over the last 32 to 64 samples. The input is looked at
 * before it is rounded, whatever the site's format, with the scale that fp8
 * would give it (absmax / 448 of the row; for kv_cache of each head's K and V).
 * The engine thread and its team write, one row at a time, or what a device found; not locked.
 */
#include <stdint.h>
#include "daemon/engine/plan.h"

struct evidence;

/* Of one site. n 0: nothing was measured yet. */
struct evidence_site {
	uint64_t n;         /* values looked at */
	float absmax;       /* largest magnitude */
	float zero;         /* share of values other than 0 that become 0 */
	float saturated;    /* share of values that become the largest code */
};

int evidence_new(struct evidence **, uint32_t n_layers);
void evidence_free(struct evidence **);
void evidence_add(struct evidence *, enum plan_group, uint32_t layer, const float *x, uint32_t n);
/* Of n values whose largest magnitude is max: those other than 0 that become 0, those that become the largest code. */
void evidence_note(struct evidence *, enum plan_group, uint32_t layer, float max, uint32_t n, uint32_t zeros, uint32_t saturated);
void evidence_next(struct evidence *);  /* a sample is complete */
void evidence_copy(struct evidence *to, const struct evidence *from);
void evidence_read(const struct evidence *, enum plan_group, uint32_t layer, struct evidence_site *);
#endif
