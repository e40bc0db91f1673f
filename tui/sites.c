/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/sites.h"

#include <errno.h>
#include <fnmatch.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool
site_is(const struct octet_page *p, uint32_t g, uint32_t l)
{
	return g < p->n_groups && l < p->n_layers && p->wanted[g][l] < p->n_formats;
}

bool
group_is_one(const struct octet_page *p, uint32_t g)
{
	return g < p->n_groups && strcmp(p->group[g], "lm_head") == 0;
}

bool
group_is_kv(const struct octet_page *p, uint32_t g)
{
	return g < p->n_groups && strcmp(p->group[g], "kv_cache") == 0;
}

const char *
group_short(const struct octet_page *p, uint32_t g, size_t width, char buf[24])
{
	const char *dot = strrchr(p->group[g], '.'), *s = dot != NULL ? dot + 1 : p->group[g];
	size_t n = strlen(s);

	if (n > width && strcmp(s, "lm_head") == 0)
		s = "head", n = 4;
	if (n > width)
		n = strcspn(s, "_");
	snprintf(buf, 24, "%.*s", (int)(n < width ? n : width), s);
	return buf;
}

const char *
format_name(const struct octet_page *p, uint8_t f)
{
	return f < p->n_formats ? p->format[f] : "-";
}

uint8_t
format_after(const struct octet_page *p, uint32_t g, uint8_t f)
{
	for (uint32_t i = 1; g < p->n_groups && i <= p->n_formats; i++) {
		uint32_t next = (f + i) % p->n_formats;

		if (p->possible[g] >> next & 1)
			return (uint8_t)next;
	}
	return f;
}

uint32_t
sites_count(const struct sites *s)
{
	uint32_t n = 0;

	for (uint32_t g = 0; g < PAGE_GROUPS; g++)
		for (uint32_t l = 0; l < PAGE_LAYERS; l++)
			n += s->at[g][l];
	return n;
}

/* ---- selectors ---- */

/* "3", "-1" (the last), "4-", "4-7": one item of a list, up to its comma. */
static int
parse_range(const char **s, uint32_t n_layers, uint32_t *from, uint32_t *to)
{
	const char *p = *s;
	char *end;
	long a, b;

	errno = 0;
	if (*p == '-') {
		a = strtol(p + 1, &end, 10);
		if (end == p + 1)
			return -EINVAL;
		a = b = (long)n_layers - a;
	} else {
		a = b = strtol(p, &end, 10);
		if (end == p)
			return -EINVAL;
		if (*end == '-') {
			p = end + 1;
			b = strtol(p, &end, 10);
			if (end == p)
				b = (long)n_layers - 1;
		}
	}
	if (errno != 0 || a < 0 || b < a || b >= (long)n_layers || (*end != ',' && *end != '\0'))
		return -EINVAL;
	*from = (uint32_t)a, *to = (uint32_t)b, *s = end + (*end == ',');
	return 0;
}

static int
parse_layers(const char *s, uint32_t n_layers, bool layer[PAGE_LAYERS])
{
	memset(layer, *s == '\0', PAGE_LAYERS * sizeof(*layer));
	while (*s != '\0') {
		uint32_t from, to;

		if (parse_range(&s, n_layers, &from, &to) != 0)
			return -EINVAL;
		for (; from <= to; from++)
			layer[from] = true;
	}
	return 0;
}

int
sites_parse(const struct octet_page *p, const char *selector, struct sites *out, struct err *err)
{
	const char *at = strchr(selector, '@');
	int len = at != NULL ? (int)(at - selector) : (int)strlen(selector);
	bool layer[PAGE_LAYERS], any = false;
	char glob[64];

	memset(out, 0, sizeof(*out));
	snprintf(glob, sizeof(glob), "%.*s", len < 63 ? len : 63, selector);
	if (at != NULL && at[1] == '\0')
		return err_set(err, -EINVAL, "%s: no layers after @", selector);
	if (parse_layers(at != NULL ? at + 1 : "", p->n_layers, layer) != 0)
		return err_set(err, -EINVAL, "%s: layers are 0 to %d, as 0-3,7,12-,-1", selector, (int)p->n_layers - 1);
	for (uint32_t g = 0; g < p->n_groups; g++) {
		bool match = group_is_kv(p, g) ? strcmp(glob, p->group[g]) == 0 : fnmatch(glob, p->group[g], FNM_NOESCAPE) == 0;

		if (!match || (at != NULL && group_is_one(p, g)))
			continue;
		for (uint32_t l = 0; l < p->n_layers; l++)
			if (site_is(p, g, l) && layer[l])
				out->at[g][l] = any = true;
	}
	return any ? 0 : err_set(err, -ENOENT, "%s selects no site", selector);
}

/* "@0-3,7" of one group; "" if it is all of it. */
static void
put_layers(const struct octet_page *p, const bool at[PAGE_LAYERS], uint32_t g, char *buf, size_t len)
{
	bool all = true;
	size_t n = 0;

	*buf = '\0';
	for (uint32_t l = 0; l < p->n_layers; l++)
		all = all && (at[l] || !site_is(p, g, l));
	for (uint32_t l = 0, end; !all && l < p->n_layers; l = end) {
		for (end = l + 1; at[l] && end < p->n_layers && at[end]; end++)
			;
		if (at[l] && n + 12 < len)
			n += (size_t)snprintf(buf + n, len - n, end - l > 1 ? "%c%u-%u" : "%c%u", n == 0 ? '@' : ',', l, end - 1);
	}
}

static bool
any_layer(const bool at[PAGE_LAYERS])
{
	for (uint32_t l = 0; l < PAGE_LAYERS; l++)
		if (at[l])
			return true;
	return false;
}

/* Is every linear group selected in all its layers? */
static bool
all_linear(const struct octet_page *p, const struct sites *s)
{
	bool any = false;

	for (uint32_t g = 0; g < p->n_groups; g++) {
		for (uint32_t l = 0; l < p->n_layers && !group_is_kv(p, g); l++) {
			if (site_is(p, g, l) && !s->at[g][l])
				return false;
			any = any || s->at[g][l];
		}
	}
	return any;
}

/* "attention." of "attention.q_proj", if all groups of it are selected in the same layers; 0: no. */
static size_t
whole_module(const struct octet_page *p, const struct sites *s, uint32_t g)
{
	size_t n = strcspn(p->group[g], ".");
	uint32_t groups = 0;

	if (p->group[g][n] == '\0')
		return 0;
	for (uint32_t i = 0; i < p->n_groups; i++) {
		if (strncmp(p->group[i], p->group[g], n + 1) != 0)
			continue;
		if (memcmp(s->at[i], s->at[g], sizeof(s->at[g])) != 0)
			return 0;
		groups++;
	}
	return groups > 1 ? n + 1 : 0;
}

uint32_t
sites_selectors(const struct octet_page *p, const struct sites *s, char out[PAGE_GROUPS][SELECTOR_TEXT])
{
	bool all = all_linear(p, s), said[PAGE_GROUPS] = {false};
	char layers[SELECTOR_TEXT - 32];
	uint32_t n = 0;

	if (all)
		snprintf(out[n++], SELECTOR_TEXT, "*");
	for (uint32_t g = 0; g < p->n_groups; g++) {
		size_t module;

		if (said[g] || !any_layer(s->at[g]) || (all && !group_is_kv(p, g)))
			continue;
		put_layers(p, s->at[g], g, layers, sizeof(layers));
		module = whole_module(p, s, g);
		for (uint32_t i = g; i < p->n_groups; i++)
			said[i] = said[i] || (module > 0 && strncmp(p->group[i], p->group[g], module) == 0);
		if (module > 0)
			snprintf(out[n++], SELECTOR_TEXT, "%.*s*%s", (int)module, p->group[g], layers);
		else
			snprintf(out[n++], SELECTOR_TEXT, "%s%s", p->group[g], layers);
	}
	return n;
}

/* ---- what a flip would do ---- */

double
page_read_bytes(const struct octet_page *p, bool kv, const struct sites *changed, uint8_t format)
{
	double sum = 0;

	for (uint32_t g = 0; g < p->n_groups; g++)
		for (uint32_t l = 0; l < p->n_layers && group_is_kv(p, g) == kv; l++)
			if (site_is(p, g, l))
				sum += (double)p->read_bytes[g][changed != NULL && changed->at[g][l] ? format : p->wanted[g][l]];
	return sum;
}

/* 1: what the sweep did, -1: taken back, 0: something else. */
static int
sweep_sign(const struct octet_page *p, uint8_t from, uint8_t to)
{
	const char *a = format_name(p, from), *b = format_name(p, to);

	if (strcmp(a, p->sweep_from) == 0 && strcmp(b, p->sweep_format) == 0)
		return 1;
	return strcmp(b, p->sweep_from) == 0 && strcmp(a, p->sweep_format) == 0 ? -1 : 0;
}

static void
add_measured(struct effect *e, int sign, uint32_t n, float kl, float saved_us, float error_us)
{
	if (kl >= 0)
		e->kl += sign * (double)kl, e->n_kl += n;
	if (!isfinite(saved_us))
		return;
	e->saved_us += sign * (double)saved_us, e->n_saved += n;
	e->saved_error_us = hypot(e->saved_error_us, (double)error_us);
}

/* Of sites that change together and were swept together; 0: not all change alike, or some have a number of their own. */
static int
sign_of_whole(const struct octet_page *p, const struct effect *e, const struct sites *whole, uint8_t format)
{
	int sign = 0;

	for (uint32_t g = 0; g < p->n_groups; g++) {
		for (uint32_t l = 0; l < p->n_layers; l++) {
			int one = whole->at[g][l] ? sweep_sign(p, p->wanted[g][l], format) : 0;

			if (!whole->at[g][l])
				continue;
			if (one == 0 || (sign != 0 && one != sign) || !e->sites.at[g][l] || p->kl[g][l] >= 0)
				return 0;
			sign = one;
		}
	}
	return sign;
}

static bool
is_of_layer(const struct octet_page *p, uint32_t g, uint32_t l)
{
	return site_is(p, g, l) && !group_is_kv(p, g) && !group_is_one(p, g);
}

/* Groups, then layers of the groups that were not counted as a whole: nothing twice. */
static void
add_wholes(const struct octet_page *p, uint8_t format, struct effect *e)
{
	static struct sites whole;
	bool counted = false;
	int sign;

	for (uint32_t g = 0; g < p->n_groups; g++) {
		memset(&whole, 0, sizeof(whole));
		for (uint32_t l = 0; l < p->n_layers; l++)
			whole.at[g][l] = site_is(p, g, l);
		sign = p->group_kl[g] >= 0 ? sign_of_whole(p, e, &whole, format) : 0;
		if (sign != 0)
			add_measured(e, sign, sites_count(&whole), p->group_kl[g], p->group_saved_us[g], p->group_saved_error_us[g]);
		counted = counted || (sign != 0 && is_of_layer(p, g, 0));
	}
	for (uint32_t l = 0; l < p->n_layers && !counted; l++) {
		memset(&whole, 0, sizeof(whole));
		for (uint32_t g = 0; g < p->n_groups; g++)
			whole.at[g][l] = is_of_layer(p, g, l);
		sign = p->layer_kl[l] >= 0 ? sign_of_whole(p, e, &whole, format) : 0;
		if (sign != 0)
			add_measured(e, sign, sites_count(&whole), p->layer_kl[l], p->layer_saved_us[l], p->layer_saved_error_us[l]);
	}
}

static double
measured_kl(float kl)
{
	return kl >= 0 ? (double)kl : NAN;
}

void
site_measured(const struct octet_page *p, uint32_t g, uint32_t l, struct measured *m)
{
	uint32_t of_layer = 0, of_group = 0;

	if (p->kl[g][l] >= 0) {
		*m = (struct measured){MEASURED_SITE, 1, measured_kl(p->kl[g][l]), (double)p->saved_us[g][l], (double)p->saved_error_us[g][l]};
		return;
	}
	for (uint32_t i = 0; i < p->n_groups && p->layer_kl[l] >= 0 && is_of_layer(p, g, l); i++)
		of_layer += is_of_layer(p, i, l);
	for (uint32_t i = 0; i < p->n_layers && p->group_kl[g] >= 0; i++)
		of_group += site_is(p, g, i);
	*m = (struct measured){MEASURED_NOTHING, 1, NAN, NAN, NAN};
	if (of_layer > 0 && (of_group == 0 || of_layer < of_group))
		*m = (struct measured){MEASURED_LAYER, of_layer, measured_kl(p->layer_kl[l]), (double)p->layer_saved_us[l],
		    (double)p->layer_saved_error_us[l]};
	else if (of_group > 0)
		*m = (struct measured){MEASURED_GROUP, of_group, measured_kl(p->group_kl[g]), (double)p->group_saved_us[g],
		    (double)p->group_saved_error_us[g]};
}

void
effect_measure(const struct octet_page *p, const struct sites *s, uint8_t format, struct effect *e)
{
	memset(e, 0, sizeof(*e));
	for (uint32_t g = 0; g < p->n_groups; g++) {
		for (uint32_t l = 0; l < p->n_layers; l++) {
			int sign;

			if (!s->at[g][l] || !site_is(p, g, l))
				continue;
			if (p->wanted[g][l] == format) {
				e->same++;
				continue;
			}
			if (!(p->possible[g] >> format & 1)) {
				e->cannot++;
				continue;
			}
			e->sites.at[g][l] = true;
			e->n++;
			sign = sweep_sign(p, p->wanted[g][l], format);
			if (sign != 0)
				add_measured(e, sign, 1, p->kl[g][l], p->saved_us[g][l], p->saved_error_us[g][l]);
		}
	}
	add_wholes(p, format, e);
	e->read_before = page_read_bytes(p, false, NULL, 0), e->read_after = page_read_bytes(p, false, &e->sites, format);
	e->kv_before = page_read_bytes(p, true, NULL, 0), e->kv_after = page_read_bytes(p, true, &e->sites, format);
}

/* ---- rows ---- */

static bool
layers_alike(const struct octet_page *p, uint32_t a, uint32_t b)
{
	for (uint32_t g = 0; g < p->n_groups; g++) {
		if (group_is_one(p, g))
			continue;
		if (p->wanted[g][a] != p->wanted[g][b] || p->executed[g][a] != p->executed[g][b] ||
		    p->candidate[g][a] != p->candidate[g][b])
			return false;
	}
	return true;
}

void
rows_make(const struct octet_page *p, bool fold, struct rows *r)
{
	r->n = 0;
	for (uint32_t l = 0; l < p->n_layers; l++) {
		if (fold && r->n > 0 && layers_alike(p, r->from[r->n - 1], l))
			r->to[r->n - 1] = (uint16_t)l;
		else {
			r->from[r->n] = r->to[r->n] = (uint16_t)l;
			r->n++;
		}
	}
}

uint32_t
rows_find(const struct rows *r, uint32_t layer)
{
	uint32_t i = 0;

	while (i + 1 < r->n && r->to[i] < layer)
		i++;
	return i;
}
