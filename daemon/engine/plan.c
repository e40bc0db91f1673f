/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/plan.h"

#include <errno.h>
#include <sha2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LAYERS 65536u /* more than any model; keeps sizes far from overflow */
#define MAX_WORD 64u      /* a glob or one item of a layer list */

static const char *const group_names[N_GROUPS] = {
	[GROUP_Q] = "attention.q_proj",
	[GROUP_K] = "attention.k_proj",
	[GROUP_V] = "attention.v_proj",
	[GROUP_O] = "attention.o_proj",
	[GROUP_GATE] = "mlp.gate_proj",
	[GROUP_UP] = "mlp.up_proj",
	[GROUP_DOWN] = "mlp.down_proj",
	[GROUP_LM_HEAD] = "lm_head",
	[GROUP_KV_CACHE] = "kv_cache",
};

static const char *const format_names[N_FORMATS] = {
	[FORMAT_BF16] = "bf16",
	[FORMAT_FP8] = "fp8",
	[FORMAT_FP8W] = "fp8w",
	[FORMAT_FP8T] = "fp8t",
	[FORMAT_FP8B] = "fp8b",
};

/* Ranges of groups that plan_diff() may name as one; wider ones first. */
static const struct {
	const char *name;
	enum plan_group first, last;
} families[] = {
	{"*", GROUP_Q, GROUP_LM_HEAD},
	{"attention.*", GROUP_Q, GROUP_O},
	{"mlp.*", GROUP_GATE, GROUP_DOWN},
};

const char *
plan_group_name(enum plan_group g)
{
	return group_names[g];
}

const char *
plan_format_name(enum plan_format f)
{
	return format_names[f];
}

bool
plan_group_has(enum plan_group g, enum plan_format f)
{
	return g == GROUP_KV_CACHE ? f == FORMAT_BF16 || f == FORMAT_FP8 : f < N_FORMATS;
}

/* What somebody typed, made fit for one line of a message. */
static const char *
shown(char out[MAX_WORD], const char *s)
{
	size_t n = 0;

	for (; *s != '\0' && n + 1 < MAX_WORD; s++)
		out[n++] = *s < ' ' || *s > '~' ? '?' : *s;
	out[n] = '\0';
	return out;
}

/* The formats of a group, or all of them if g is N_GROUPS. */
static const char *
format_list(char out[MAX_WORD], enum plan_group g)
{
	size_t n = 0;

	out[0] = '\0';
	for (int f = 0; f < N_FORMATS && n < MAX_WORD; f++)
		if (g == N_GROUPS || plan_group_has(g, f))
			n += (size_t)snprintf(out + n, MAX_WORD - n, "%s%s", n > 0 ? ", " : "", format_names[f]);
	return out;
}

int
plan_format_parse(const char *name, struct err *e)
{
	char word[MAX_WORD], list[MAX_WORD];

	for (int f = 0; f < N_FORMATS; f++)
		if (strcmp(name, format_names[f]) == 0)
			return f;
	return err_set(e, -EINVAL, "\"%s\" is no format (%s)", shown(word, name), format_list(list, N_GROUPS));
}

static uint32_t
group_layers(const struct plan *p, enum plan_group g)
{
	return g == GROUP_LM_HEAD ? 1 : p->n_layers;
}

static void
set_layers(struct plan *p, enum plan_group g, uint32_t lo, uint32_t hi, enum plan_format f)
{
	memset(&p->format[(size_t)g * p->n_layers + lo], f, hi - lo + 1);
}

/* Copies [s, s+len) without the blanks around it; false if it does not fit. */
static bool
trim(char out[MAX_WORD], const char *s, size_t len)
{
	while (len > 0 && (*s == ' ' || *s == '\t'))
		s++, len--;
	while (len > 0 && (s[len - 1] == ' ' || s[len - 1] == '\t'))
		len--;
	if (len >= MAX_WORD)
		return false;
	memcpy(out, s, len);
	out[len] = '\0';
	return true;
}

static bool
glob_match(const char *glob, const char *s)
{
	const char *star = NULL, *from = NULL;

	while (*s != '\0') {
		if (*glob == '*') {
			star = glob++;
			from = s;
		} else if (*glob == *s) {
			glob++, s++;
		} else if (star != NULL) {
			glob = star + 1;
			s = ++from;
		} else {
			return false;
		}
	}
	while (*glob == '*')
		glob++;
	return *glob == '\0';
}

static unsigned
min_u(unsigned a, unsigned b)
{
	return a < b ? a : b;
}

/* Levenshtein distance in which a '*' stands for any run at no cost. */
static unsigned
glob_distance(const char *glob, const char *name)
{
	unsigned row[MAX_WORD];
	size_t n = strlen(name);

	for (size_t j = 0; j <= n; j++)
		row[j] = (unsigned)j;
	for (; *glob != '\0'; glob++) {
		unsigned diagonal = row[0], above;

		row[0] += *glob != '*';
		for (size_t j = 1; j <= n; j++) {
			above = row[j];
			if (*glob == '*')
				row[j] = min_u(above, row[j - 1]);
			else
				row[j] = min_u(min_u(above, row[j - 1]) + 1, diagonal + (*glob != name[j - 1]));
			diagonal = above;
		}
	}
	return row[n];
}

/* "q_proj" should find attention.q_proj, so a part of a name counts as near. */
static const char *
nearest_group(const char *glob)
{
	unsigned best = ~0u, d;
	char part[MAX_WORD + 2];
	int at = 0;

	snprintf(part, sizeof(part), "*%s*", glob);
	for (int g = 0; g < N_GROUPS; g++) {
		d = min_u(glob_distance(glob, group_names[g]), glob_distance(part, group_names[g]) + 1);
		if (d < best) {
			best = d;
			at = g;
		}
	}
	return group_names[at];
}

/* Which groups a glob selects: linear groups and lm_head by pattern, kv_cache by its own name alone. */
static int
match_groups(const char *glob, bool match[N_GROUPS], struct err *e)
{
	char word[MAX_WORD];
	bool any = false;

	if (*glob == '\0')
		return err_set(e, -EINVAL, "no layer group is named; for all of them write *");
	for (int g = 0; g < N_GROUPS; g++) {
		match[g] = g == GROUP_KV_CACHE ? strcmp(glob, group_names[g]) == 0 : glob_match(glob, group_names[g]);
		any |= match[g];
	}
	if (!any)
		return err_set(e, -EINVAL, "no layer group matches \"%s\"; the nearest is %s", shown(word, glob),
		    nearest_group(glob));
	return 0;
}

/* "7", or "-2" counted from the end, checked against the model. */
static int
parse_layer(const char **s, uint32_t n_layers, const char *item, uint32_t *layer, struct err *e)
{
	const char *start = *s, *p = start + (*start == '-');
	uint64_t v = 0;

	if (*p < '0' || *p > '9')
		goto syntax;
	for (; *p >= '0' && *p <= '9'; p++)
		v = v > MAX_LAYERS ? v : v * 10 + (uint64_t)(*p - '0');
	if (*start == '-' && v == 0)
		goto syntax;
	*s = p;
	if (*start == '-' ? v > n_layers : v >= n_layers)
		return err_set(e, -EINVAL, "no layer %.*s: the model has layers 0 to %u", (int)(p - start), start, n_layers - 1);
	*layer = *start == '-' ? n_layers - (uint32_t)v : (uint32_t)v;
	return 0;
syntax:
	return err_set(e, -EINVAL, "\"%s\" is no layer: write N, N-M, N- or -N (from the end)", item);
}

/* One item of a layer list. */
static int
parse_range(const char *s, size_t len, uint32_t n_layers, uint32_t *lo, uint32_t *hi, struct err *e)
{
	char word[MAX_WORD], item[MAX_WORD];
	const char *p = item;
	int rc;

	if (!trim(item, s, len))
		return err_set(e, -EINVAL, "an item of the layer list is longer than %u characters", MAX_WORD - 1);
	shown(word, item);
	if ((rc = parse_layer(&p, n_layers, word, lo, e)) != 0)
		return rc;
	*hi = *lo;
	if (*p == '-' && *++p == '\0')
		*hi = n_layers - 1;
	else if (p[0] != '\0' && p[-1] == '-' && (rc = parse_layer(&p, n_layers, word, hi, e)) != 0)
		return rc;
	if (*p != '\0')
		return err_set(e, -EINVAL, "\"%s\" is no layer: write N, N-M, N- or -N (from the end)", word);
	if (*hi < *lo)
		return err_set(e, -EINVAL, "layers %s run backwards", word);
	return 0;
}

/* layers: what follows the '@'. */
static int
set_list(struct plan *p, const bool match[N_GROUPS], const char *layers, enum plan_format f, struct err *e)
{
	uint32_t lo, hi;
	size_t len;
	int rc;

	for (;; layers += len + 1) {
		len = strcspn(layers, ",");
		if ((rc = parse_range(layers, len, p->n_layers, &lo, &hi, e)) != 0)
			return rc;
		for (int g = 0; g < N_GROUPS; g++)
			if (match[g])
				set_layers(p, g, lo, hi, f);
		if (layers[len] == '\0')
			return 0;
	}
}

static int
apply_selector(struct plan *p, const char *selector, enum plan_format f, struct err *e)
{
	const char *at = strchr(selector, '@');
	bool match[N_GROUPS], layered = false;
	char glob[MAX_WORD], list[MAX_WORD];
	int rc;

	if (!trim(glob, selector, at != NULL ? (size_t)(at - selector) : strlen(selector)))
		return err_set(e, -EINVAL, "the name of the layer group is longer than %u characters", MAX_WORD - 1);
	if ((rc = match_groups(glob, match, e)) != 0)
		return rc;
	for (int g = 0; g < N_GROUPS; g++) {
		if (match[g] && !plan_group_has(g, f))
			return err_set(e, -EINVAL, "%s cannot be %s in this version (%s)", group_names[g], format_names[f],
			    format_list(list, g));
		layered |= match[g] && g != GROUP_LM_HEAD;
	}
	if (at != NULL) {
		if (!layered)
			return err_set(e, -EINVAL, "lm_head has no layer; write it without @");
		match[GROUP_LM_HEAD] = false;
		return set_list(p, match, at + 1, f, e);
	}
	for (int g = 0; g < N_GROUPS; g++)
		if (match[g])
			set_layers(p, g, 0, group_layers(p, g) - 1, f);
	return 0;
}

static int
apply_rule(struct plan *p, const struct plan_rule *r, struct err *e)
{
	char word[MAX_WORD];
	int f = plan_format_parse(r->format, e), rc = f;

	if (f >= 0)
		rc = apply_selector(p, r->selector, f, e);
	if (rc >= 0)
		return 0;
	if (r->selector[0] != '\0')
		err_prefix(e, "%s", shown(word, r->selector));
	if (r->line != 0)
		err_prefix(e, "line %d", r->line);
	return rc;
}

static int
new_plan(struct plan **out, const struct plan *base, uint32_t n_layers, struct err *e)
{
	size_t sites = (size_t)N_GROUPS * n_layers;
	struct plan *p;

	if (n_layers == 0 || n_layers > MAX_LAYERS)
		return err_set(e, -EINVAL, "a plan cannot have %u layers", n_layers);
	if (base != NULL && base->n_layers != n_layers)
		return err_set(e, -EINVAL, "the plan below has %u layers, the model %u", base->n_layers, n_layers);
	if ((p = calloc(1, sizeof(*p) + sites)) == NULL)
		return err_set(e, -ENOMEM, "no memory for a plan");
	p->refs = 1;
	p->n_layers = n_layers;
	if (base != NULL)
		memcpy(p->format, base->format, sites);
	*out = p;
	return 0;
}

/* The plan is complete: give it its digest. */
static int
seal(struct plan *p, struct err *e)
{
	uint8_t sha[SHA256_DIGEST_LENGTH];
	char *text = plan_text(p);
	SHA2_CTX ctx;

	if (text == NULL)
		return err_set(e, -ENOMEM, "no memory for a plan");
	SHA256Init(&ctx);
	SHA256Update(&ctx, (const uint8_t *)text, strlen(text));
	SHA256Final(sha, &ctx);
	free(text);
	p->digest = 0;
	for (int i = 0; i < 8; i++)
		p->digest = p->digest << 8 | sha[i];
	return 0;
}

int
plan_derive(struct plan **out, const struct plan *base, uint32_t n_layers, const struct plan_rule *rules, size_t n_rules,
    struct err *e)
{
	struct plan *p = NULL;
	int rc = new_plan(&p, base, n_layers, e);

	for (size_t i = 0; i < n_rules && rc == 0; i++)
		rc = apply_rule(p, &rules[i], e);
	if (rc == 0)
		rc = seal(p, e);
	if (rc == 0)
		*out = p;
	else
		plan_unref(&p);
	return rc;
}

/* Cuts one "selector = format" line off text; false at its end or where there is no such line. */
static bool
next_rule(char **text, struct plan_rule *r)
{
	char *line = strsep(text, "\n"), *equals;

	if (line == NULL || (equals = strstr(line, " = ")) == NULL)
		return false;
	*equals = '\0';
	r->selector = line;
	r->format = equals + 3;
	r->line++;
	return true;
}

int
plan_parse(struct plan **out, uint32_t n_layers, const char *text, struct err *e)
{
	char *copy = strdup(text), *rest = copy, *again = NULL;
	struct plan_rule r = {0};
	struct plan *p = NULL;
	int rc = copy == NULL ? err_set(e, -ENOMEM, "no memory for a plan") : new_plan(&p, NULL, n_layers, e);

	while (rc == 0 && next_rule(&rest, &r))
		rc = apply_rule(p, &r, e);
	if (rc == 0)
		rc = seal(p, e);
	/* Only text that plan_text() wrote for this many layers says all that it means. */
	if (rc == 0 && (again = plan_text(p)) == NULL)
		rc = err_set(e, -ENOMEM, "no memory for a plan");
	if (rc == 0 && strcmp(again, text) != 0)
		rc = err_set(e, -EINVAL, "not the text of a plan of %u layers", n_layers);
	if (rc == 0)
		*out = p;
	else
		plan_unref(&p);
	free(again);
	free(copy);
	return rc;
}

struct plan *
plan_ref(struct plan *p)
{
	__atomic_fetch_add(&p->refs, 1, __ATOMIC_RELAXED);
	return p;
}

void
plan_unref(struct plan **p)
{
	if (*p != NULL && __atomic_fetch_sub(&(*p)->refs, 1, __ATOMIC_ACQ_REL) == 1)
		free(*p);
	*p = NULL;
}

/* Layers that follow lo, lo included, for which key() stays the same. */
static void
put_layers(FILE *f, char before, uint32_t lo, uint32_t hi)
{
	fprintf(f, lo == hi ? "%c%u" : "%c%u-%u", before, lo, hi);
}

char *
plan_text(const struct plan *p)
{
	char *text = NULL;
	size_t size;
	FILE *f = open_memstream(&text, &size);

	if (f == NULL)
		return NULL;
	for (int g = 0; g < N_GROUPS; g++) {
		uint32_t n = group_layers(p, g), end;

		for (uint32_t l = 0; l < n; l = end) {
			for (end = l + 1; end < n && plan_at(p, g, end) == plan_at(p, g, l);)
				end++;
			fputs(group_names[g], f);
			if (end - l < n)
				put_layers(f, '@', l, end - 1);
			fprintf(f, " = %s\n", format_names[plan_at(p, g, l)]);
		}
	}
	if (fclose(f) != 0) {
		free(text);
		return NULL;
	}
	return text;
}

static bool
moves(const struct plan *from, const struct plan *to, enum plan_group g, uint32_t layer, int a, int b)
{
	return (int)plan_at(from, g, layer) == a && (int)plan_at(to, g, layer) == b;
}

/* The layers of a group that went from format a to b: "@0-3,30", "" if all. Their number. */
static uint32_t
put_moved(FILE *f, const struct plan *from, const struct plan *to, enum plan_group g, int a, int b)
{
	uint32_t n = group_layers(from, g), moved = 0, end;

	for (uint32_t l = 0; l < n; l++)
		moved += moves(from, to, g, l, a, b);
	if (moved == n || f == NULL)
		return moved;
	for (uint32_t l = 0, runs = 0; l < n; l = end) {
		for (end = l; end < n && moves(from, to, g, end, a, b);)
			end++;
		if (end > l)
			put_layers(f, runs++ == 0 ? '@' : ',', l, end - 1);
		else
			end++;
	}
	return moved;
}

/* Does this group change in the layers where group g goes from a to b, likewise, and nowhere else? */
static bool
moves_alike(const struct plan *from, const struct plan *to, enum plan_group g, enum plan_group other, int a, int b)
{
	uint32_t n = group_layers(from, other);

	/* lm_head is of no layer: only all of the others is alike. */
	if (n != group_layers(from, g))
		return put_moved(NULL, from, to, g, a, b) == group_layers(from, g) && put_moved(NULL, from, to, other, a, b) == n;
	for (uint32_t l = 0; l < n; l++) {
		bool here = moves(from, to, g, l, a, b);

		if (moves(from, to, other, l, a, b) != here || (!here && plan_at(from, other, l) != plan_at(to, other, l)))
			return false;
	}
	return true;
}

/* The widest family from group g on that changes alike, from format a to b; its index, or -1. */
static int
moved_family(const struct plan *from, const struct plan *to, enum plan_group g, int *a, int *b)
{
	uint32_t l = 0, n = group_layers(from, g);

	while (l < n && plan_at(from, g, l) == plan_at(to, g, l))
		l++;
	if (l == n)
		return -1;
	*a = plan_at(from, g, l), *b = plan_at(to, g, l);
	for (size_t i = 0; i < sizeof(families) / sizeof(families[0]); i++) {
		enum plan_group at = families[i].first;

		while (families[i].first == g && at <= families[i].last && moves_alike(from, to, g, at, *a, *b))
			at++;
		if (at > families[i].last)
			return (int)i;
	}
	return -1;
}

static void
put_transition(FILE *f, int a, int b)
{
	fprintf(f, " %s->%s", format_names[a], format_names[b]);
}

static void
put_diff(FILE *f, const struct plan *from, const struct plan *to)
{
	const char *comma = "";

	for (int g = 0; g < N_GROUPS; g++) {
		int was, is, family = moved_family(from, to, g, &was, &is);

		if (family >= 0) {
			fprintf(f, "%s%s", comma, families[family].name);
			put_moved(f, from, to, g, was, is);
			put_transition(f, was, is);
			comma = ", ";
			g = families[family].last;
			continue;
		}
		for (int a = 0; a < N_FORMATS; a++) {
			for (int b = 0; b < N_FORMATS; b++) {
				if (a == b || put_moved(NULL, from, to, g, a, b) == 0)
					continue;
				fprintf(f, "%s%s", comma, group_names[g]);
				put_moved(f, from, to, g, a, b);
				put_transition(f, a, b);
				comma = ", ";
			}
		}
	}
}

char *
plan_diff(const struct plan *from, const struct plan *to)
{
	char *text = NULL;
	size_t size;
	FILE *f = open_memstream(&text, &size);

	if (f == NULL)
		return NULL;
	if (from->n_layers == to->n_layers)
		put_diff(f, from, to);
	else
		fprintf(f, "%u->%u layers", from->n_layers, to->n_layers);
	if (fclose(f) != 0) {
		free(text);
		return NULL;
	}
	return text;
}

uint32_t
plan_distance(const struct plan *a, const struct plan *b)
{
	uint32_t n = 0;

	for (int g = 0; g < N_GROUPS; g++) {
		uint32_t n_layers = group_layers(b, g);

		for (uint32_t l = 0; l < n_layers; l++)
			n += a->n_layers != b->n_layers || plan_at(a, g, l) != plan_at(b, g, l);
	}
	return n;
}
