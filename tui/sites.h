/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_SITES_H
#define OCTET_SITES_H
/*
 * Sites of a page: which there are, sets of them, how a set is said in
 * selectors, and what flipping one would do. Pure functions of the page.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "client/err.h"
#include "client/page.h"

struct sites {
	bool at[PAGE_GROUPS][PAGE_LAYERS];
};

bool site_is(const struct octet_page *, uint32_t group, uint32_t layer);
bool group_is_one(const struct octet_page *, uint32_t group);   /* of no layer: lm_head */
bool group_is_kv(const struct octet_page *, uint32_t group);
/* Heads of columns: "attention.q_proj" -> "q_proj", "q". */
const char *group_short(const struct octet_page *, uint32_t group, size_t width, char buf[24]);
const char *format_name(const struct octet_page *, uint8_t format); /* "-": none */
/* The format after this one that the group can have. */
uint8_t format_after(const struct octet_page *, uint32_t group, uint8_t format);

uint32_t sites_count(const struct sites *);
/* GROUP-GLOB[@LAYERS] as octetd takes it. */
int sites_parse(const struct octet_page *, const char *selector, struct sites *, struct err *);
/* "mlp.up_proj@0-3,7", or "mlp.*@0-3,7", "*" where they say the same; returns how many. */
#define SELECTOR_TEXT 1200u
uint32_t sites_selectors(const struct octet_page *, const struct sites *, char out[PAGE_GROUPS][SELECTOR_TEXT]);

/* What the last sweep says of a site: what it measured of the site alone, else of the smaller whole that was flipped
 * with the site in it. */
enum measured_of { MEASURED_NOTHING, MEASURED_SITE, MEASURED_LAYER, MEASURED_GROUP };
struct measured {
	enum measured_of of;
	uint32_t n;                         /* sites that were flipped together */
	double kl, saved_us, saved_error_us; /* of all of them; NAN: not measured */
};
void site_measured(const struct octet_page *, uint32_t group, uint32_t layer, struct measured *);

/* What a flip of these sites would change. */
struct effect {
	struct sites sites;       /* that change; the rest has the format or cannot have it */
	uint32_t n, same, cannot;
	double read_before, read_after; /* bytes of weights that a token reads, all sites */
	double kv_before, kv_after;     /* bytes of KV that a token reads for each position before it */
	uint32_t n_kl, n_saved;   /* sites that the last sweep measured between these two formats, either way */
	double kl, saved_us;      /* their sums; < 0: kl given back, time lost */
	double saved_error_us;    /* NAN: not known */
};
void effect_measure(const struct octet_page *, const struct sites *, uint8_t format, struct effect *);
double page_read_bytes(const struct octet_page *, bool kv, const struct sites *changed, uint8_t format);

/* Layers in which every site is alike stand in one row. */
struct rows {
	uint16_t from[PAGE_LAYERS], to[PAGE_LAYERS]; /* to inclusive */
	uint32_t n;
};
void rows_make(const struct octet_page *, bool fold, struct rows *);
uint32_t rows_find(const struct rows *, uint32_t layer);
#endif
