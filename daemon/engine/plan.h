/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_PLAN_H
#define OCTET_PLAN_H
/*
 * Layer groups, formats, selectors, plans. A plan is one format per site of a
 * model: immutable and reference-counted, so any thread may hold one; the last
 * plan_unref() frees it. Deriving and parsing happen off the engine thread.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "client/err.h"

enum plan_group {
	GROUP_Q, GROUP_K, GROUP_V, GROUP_O, GROUP_GATE, GROUP_UP, GROUP_DOWN,
	GROUP_LM_HEAD, GROUP_KV_CACHE, N_GROUPS
};

/* The first formats are those of enum k_format, in its order. */
enum plan_format { FORMAT_BF16, FORMAT_FP8, FORMAT_FP8W, FORMAT_FP8T, FORMAT_FP8B, N_FORMATS };

struct plan {
	uint32_t refs;      /* atomic */
	uint32_t n_layers;
	uint64_t digest;    /* first 8 bytes of SHA-256 over plan_text(), big-endian */
	uint8_t format[];   /* [N_GROUPS][n_layers]; lm_head uses layer 0 only */
};

/* One "selector = format". */
struct plan_rule {
	const char *selector, *format;
	int line; /* in its file, 0 if none */
};

const char *plan_group_name(enum plan_group);
const char *plan_format_name(enum plan_format);
int plan_format_parse(const char *name, struct err *); /* enum, or -EINVAL naming the choices */
bool plan_group_has(enum plan_group, enum plan_format); /* can this group ever have it */

/* base (NULL: everything bf16) with the rules on top, the last match wins. A
 * selector that matches no site, a group that cannot have the format: -EINVAL
 * with a message; *out is untouched. */
int plan_derive(struct plan **out, const struct plan *base, uint32_t n_layers,
    const struct plan_rule *, size_t n_rules, struct err *);
/* From plan_text() of a plan of this many layers, as the journal keeps it. */
int plan_parse(struct plan **out, uint32_t n_layers, const char *text, struct err *);
struct plan *plan_ref(struct plan *);
void plan_unref(struct plan **); /* nulls it */

static inline enum plan_format
plan_at(const struct plan *p, enum plan_group g, uint32_t layer)
{
	return (enum plan_format)p->format[(size_t)g * p->n_layers + (g == GROUP_LM_HEAD ? 0 : layer)];
}

/* Canonical text: one "group@layers = format" line per run of equal sites,
 * groups in enum order. malloc'd, NULL without memory. */
char *plan_text(const struct plan *);
/* "attention.q_proj@0-3 bf16->fp8, mlp.*@2 fp8->bf16, ..." malloc'd; "" if equal. */
char *plan_diff(const struct plan *from, const struct plan *to);
/* Number of sites that differ. */
uint32_t plan_distance(const struct plan *, const struct plan *);
#endif
