/* SPDX-License-Identifier: Apache-2.0 */
#include "conf/conf.h"

#include <ctype.h>
#include <errno.h>
#include <ini.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Debian's inih is built with lines of at most 200 characters. */
#define MAX_LINE 200
#define MAX_SECTION 49 /* it cuts longer names without a word */

enum type { TYPE_STRING, TYPE_WORD, TYPE_PATH, TYPE_NUMBER, TYPE_SIZE, TYPE_MODE, TYPE_ENUM, TYPE_SHARE };

struct option {
	const char *section, *key;
	enum type type;
	size_t at;
	const char *fallback;     /* NULL: worked out by defaults(), or required */
	uint64_t min, max;
	const char *const *choices;
	bool live;
	const char *unit, *help;
};

static const char *const backends[] = {"auto", "cpu", "cuda", NULL};
static const char *const residencies[] = {"both", "nested", NULL};
static const char *const no_yes[] = {"no", "yes", NULL};
static const char *const on_flips[] = {"switch", "pin", NULL};
static const char *const prefix_caches[] = {"off", "user", "all", NULL};
static const char *const log_levels[] = {"error", "warn", "info", "debug", NULL};

#define AT(field) offsetof(struct conf, field)
#define LIVE true
#define RESTART false

/* Adding an option: a line here, a field in struct conf, a paragraph in
 * octet.ini(5), a line in conf/octet.ini. */
static const struct option options[] = {
	{"daemon", "socket", TYPE_PATH, AT(socket), NULL, 0, 0, NULL, RESTART, "", "data socket that apps connect to"},
	{"daemon", "socket_mode", TYPE_MODE, AT(socket_mode), "0660", 0, 0777, NULL, RESTART, "octal", "its permissions"},
	{"daemon", "control_socket", TYPE_PATH, AT(control_socket), NULL, 0, 0, NULL, RESTART, "",
	    "socket of octetctl and octet-console"},
	{"daemon", "control_mode", TYPE_MODE, AT(control_mode), "0660", 0, 0777, NULL, RESTART, "octal", "its permissions"},
	{"daemon", "state_dir", TYPE_PATH, AT(state_dir), NULL, 0, 0, NULL, RESTART, "", "journal and stored results"},
	{"daemon", "policies_file", TYPE_PATH, AT(policies_file), NULL, 0, 0, NULL, RESTART, "",
	    "policies that octetctl save keeps; read after this file"},
	{"daemon", "max_clients", TYPE_NUMBER, AT(max_clients), "64", 1, 4096, NULL, LIVE, "", "sessions at a time"},
	{"daemon", "max_clients_per_uid", TYPE_NUMBER, AT(max_clients_per_uid), "48", 1, 4096, NULL, LIVE, "",
	    "connections of one user at a time"},
	{"daemon", "max_requests", TYPE_NUMBER, AT(max_requests), "32", 1, 64, NULL, LIVE, "",
	    "requests in flight of one session"},
	{"daemon", "max_requests_per_uid", TYPE_NUMBER, AT(max_requests_per_uid), "512", 1, 1000000, NULL, LIVE, "",
	    "requests in flight of all sessions of one user"},
	{"daemon", "max_queue", TYPE_NUMBER, AT(max_queue), "1024", 1, 1000000, NULL, LIVE, "",
	    "requests that may wait; more are refused as busy"},
	{"daemon", "handshake_timeout_ms", TYPE_NUMBER, AT(handshake_timeout_ms), "2000", 10, 60000, NULL, LIVE, "ms",
	    "time a client has to say hello"},
	{"daemon", "drain_timeout_s", TYPE_NUMBER, AT(drain_timeout_s), "30", 0, 3600, NULL, LIVE, "s",
	    "time running requests have to end after SIGTERM"},
	{"daemon", "log_level", TYPE_WORD, AT(log_level), "info", 0, 0, log_levels, LIVE, "", "least severe line that is logged"},
	{"model", "path", TYPE_PATH, AT(model_path), NULL, 0, 0, NULL, RESTART, "", "Hugging Face model directory (required)"},
	{"engine", "backend", TYPE_ENUM, AT(backend), "auto", 0, 0, backends, RESTART, "", "where the model runs"},
	{"engine", "device", TYPE_NUMBER, AT(device), "0", 0, 255, NULL, RESTART, "", "which card, as nvidia-smi counts them"},
	{"engine", "residency", TYPE_ENUM, AT(residency), "both", 0, 0, residencies, RESTART, "",
	    "weights on a card: plain in BF16 and FP8, or the nested planes in the memory of BF16"},
	{"engine", "nested_sites", TYPE_STRING, AT(nested_sites), "", 0, 0, NULL, RESTART, "",
	    "selectors, spaces between: what is nested though residency is both"},
	{"engine", "fast_accumulation", TYPE_ENUM, AT(fast_accumulation), "no", 0, 0, no_yes, RESTART, "",
	    "FP8 products of many rows on a card add with fewer bits"},
	{"engine", "threads", TYPE_NUMBER, AT(threads), "0", 0, 1024, NULL, RESTART, "",
	    "worker threads; 0: the CPUs octetd may use"},
	{"engine", "kv_cache_bytes", TYPE_SIZE, AT(kv_cache_bytes), "256M", 1, UINT64_MAX / 4, NULL, RESTART, "bytes",
	    "memory of the KV cache"},
	{"engine", "max_batch_tokens", TYPE_NUMBER, AT(max_batch_tokens), "512", 1, 65536, NULL, RESTART, "tokens",
	    "rows of one step at most"},
	{"engine", "max_batch", TYPE_NUMBER, AT(max_batch), "64", 1, 4096, NULL, RESTART, "",
	    "sequences that run at a time"},
	{"engine", "max_context", TYPE_NUMBER, AT(max_context), "0", 0, 1 << 20, NULL, RESTART, "tokens",
	    "prompt and output of one request; 0: what the model allows"},
	{"engine", "step_target_ms", TYPE_NUMBER, AT(step_target_ms), "50", 0, 60000, NULL, LIVE, "ms",
	    "prefill is cut so that a step takes about this long; 0: off"},
	{"engine", "spin_us", TYPE_NUMBER, AT(spin_us), "50", 0, 1000000, NULL, LIVE, "us",
	    "time a thread waits awake before it sleeps"},
	{"engine", "prefix_cache", TYPE_ENUM, AT(prefix_cache), "user", 0, 0, prefix_caches, LIVE, "",
	    "whether requests share the KV pages of equal beginnings: not, those of one user, or all"},
	{"engine", "evidence_steps", TYPE_NUMBER, AT(evidence_steps), "64", 0, 1000000, NULL, LIVE, "steps",
	    "one row of one step in so many is measured for what FP8 does to it; 0: none"},
	{"precision", "policy", TYPE_STRING, AT(policy), "bf16", 0, 0, NULL, LIVE, "", "the active policy"},
	{"precision", "on_flip", TYPE_ENUM, AT(on_flip), "switch", 0, 0, on_flips, LIVE, "",
	    "whether running sequences follow a flip or finish under their plan"},
	{"shadow", "sample", TYPE_SHARE, AT(shadow_sample), "0", 0, 1000000, NULL, LIVE, "",
	    "share of finished requests that are scored again under the baseline; 0: none"},
	{"shadow", "baseline", TYPE_STRING, AT(shadow_baseline), "bf16", 0, 0, NULL, LIVE, "", "the policy to compare with"},
	{"shadow", "share", TYPE_SHARE, AT(shadow_share), "0.05", 0, 1000000, NULL, LIVE, "",
	    "what shadow may add to a step with live requests"},
	{"shadow", "max_kl", TYPE_SHARE, AT(shadow_max_kl), "0", 0, 1000000, NULL, LIVE, "",
	    "a plan that diverges more per token is rolled back; 0: never"},
	{"shadow", "min_agree", TYPE_SHARE, AT(shadow_min_agree), "0", 0, 1000000, NULL, LIVE, "",
	    "a plan whose first choices agree less is rolled back; 0: never"},
	{"shadow", "cooldown_s", TYPE_NUMBER, AT(shadow_cooldown_s), "300", 0, 86400, NULL, LIVE, "s",
	    "after the guardrail acted it does not act again for so long"},
	{"surge", "policy", TYPE_STRING, AT(surge_policy), "", 0, 0, NULL, LIVE, "",
	    "a faster policy while requests wait too long; empty: none"},
	{"surge", "enter_queue_ms", TYPE_NUMBER, AT(surge_enter_queue_ms), "1000", 1, 3600000, NULL, LIVE, "ms",
	    "it starts when the oldest request has waited longer"},
	{"surge", "leave_queue_ms", TYPE_NUMBER, AT(surge_leave_queue_ms), "100", 0, 3600000, NULL, LIVE, "ms",
	    "it ends when none has waited longer"},
	{"surge", "min_hold_s", TYPE_NUMBER, AT(surge_min_hold_s), "30", 0, 86400, NULL, LIVE, "s",
	    "and the plan stays at least so long each time"},
	{"access", "operators", TYPE_STRING, AT(operators), "", 0, 0, NULL, LIVE, "",
	    "who may change: user:NAME, group:NAME, uid:N, gid:N, *; root and octetd's own user always may"},
	{"access", "viewers", TYPE_STRING, AT(viewers), "*", 0, 0, NULL, LIVE, "", "who may look"},
	{"access", "request_policies", TYPE_STRING, AT(policies_of_requests), "", 0, 0, NULL, LIVE, "",
	    "who may run a request under a policy of its own choice"},
};
#define N_OPTIONS (sizeof(options) / sizeof(*options))

static char **
string_at(const struct conf *c, const struct option *o)
{
	return (char **)(uintptr_t)((const char *)c + o->at);
}

/* Sizes are 64 bits wide in struct conf, other numbers 32. */
static uint64_t
get_number(const struct conf *c, const struct option *o)
{
	const char *at = (const char *)c + o->at;

	return o->type == TYPE_SIZE ? *(const uint64_t *)(const void *)at : *(const uint32_t *)(const void *)at;
}

static void
set_number(struct conf *c, const struct option *o, uint64_t n)
{
	char *at = (char *)c + o->at;

	if (o->type == TYPE_SIZE)
		*(uint64_t *)(void *)at = n;
	else
		*(uint32_t *)(void *)at = (uint32_t)n;
}

static bool
is_string(const struct option *o)
{
	return o->type == TYPE_STRING || o->type == TYPE_WORD || o->type == TYPE_PATH;
}

const char *
conf_option_name(size_t i, const char **section)
{
	if (i >= N_OPTIONS)
		return NULL;
	*section = options[i].section;
	return options[i].key;
}

/* ---- values ---- */

/* Bytes with an optional K, M, G or T (powers of 1024; Ki, KiB and KB mean the same). */
static bool
parse_size(const char *s, uint64_t *out)
{
	static const char units[] = "KMGT";
	char *end;
	unsigned long long n;

	errno = 0;
	n = strtoull(s, &end, 10);
	if (errno != 0 || end == s || *s == '-' || *s == '+')
		return false;
	if (*end != '\0') {
		const char *u = strchr(units, toupper((unsigned char)*end));
		int shift = u == NULL ? 0 : 10 * (int)(u - units + 1);

		if (u == NULL)
			return false;
		end++;
		if (*end == 'i')
			end++;
		if (*end == 'B')
			end++;
		if (*end != '\0' || n > UINT64_MAX >> shift)
			return false;
		n <<= shift;
	}
	*out = n;
	return true;
}

static bool
parse_digits(const char *s, int base, uint64_t *out)
{
	char *end;

	errno = 0;
	*out = strtoull(s, &end, base);
	return errno == 0 && isdigit((unsigned char)*s) && *end == '\0';
}

/* "0.01" or "1%", in millionths. */
static bool
parse_share(const char *s, uint64_t *out)
{
	char *end;
	double v = strtod(s, &end);

	if (end != s && strcmp(end, "%") == 0)
		v /= 100, end++;
	if (end == s || *end != '\0' || !(v >= 0 && v <= 1000))
		return false;
	*out = (uint64_t)(v * 1e6 + 0.5);
	return true;
}

/* The place of text among the choices. */
static int
find_choice(const struct option *o, const char *text, uint64_t *out, struct err *err)
{
	char list[128] = "";

	for (size_t i = 0; o->choices[i] != NULL; i++) {
		if (strcmp(text, o->choices[i]) == 0) {
			*out = i;
			return 0;
		}
		strncat(list, i > 0 ? ", " : "", sizeof(list) - strlen(list) - 1);
		strncat(list, o->choices[i], sizeof(list) - strlen(list) - 1);
	}
	return err_set(err, -EINVAL, "%s '%s' is none of %s", o->key, text, list);
}

/* Relative paths are relative to the directory of the file. */
static char *
resolve_path(const char *file, const char *text)
{
	const char *slash = strrchr(file, '/');
	char *path;

	if (*text == '/' || slash == NULL)
		return strdup(text);
	return asprintf(&path, "%.*s/%s", (int)(slash - file), file, text) < 0 ? NULL : path;
}

static int
set_option(struct conf *c, const struct option *o, const char *text, struct err *err)
{
	uint64_t n = 0;
	bool ok = true;
	char *s;

	if (o->choices != NULL && find_choice(o, text, &n, err) != 0)
		return -EINVAL;
	switch (o->type) {
	case TYPE_ENUM:
		set_number(c, o, n);
		return 0;
	case TYPE_WORD:
	case TYPE_STRING:
	case TYPE_PATH:
		if (o->type == TYPE_PATH && *text == '\0')
			return err_set(err, -EINVAL, "%s is empty", o->key);
		s = o->type == TYPE_PATH ? resolve_path(c->file, text) : strdup(text);
		if (s == NULL)
			return err_set(err, -ENOMEM, "out of memory");
		free(*string_at(c, o));
		*string_at(c, o) = s;
		return 0;
	case TYPE_SIZE:
		ok = parse_size(text, &n);
		break;
	case TYPE_MODE:
		ok = parse_digits(text, 8, &n);
		break;
	case TYPE_NUMBER:
		ok = parse_digits(text, 10, &n);
		break;
	case TYPE_SHARE:
		ok = parse_share(text, &n);
		break;
	}
	if (!ok)
		return err_set(err, -EINVAL, "%s '%s' is no %s", o->key, text,
		    o->type == TYPE_SIZE ? "size (like 512M)" : o->type == TYPE_MODE ? "octal mode"
		    : o->type == TYPE_SHARE                                                         ? "share (like 1% or 0.01)"
		                                                                                    : "number");
	if (n < o->min || n > o->max) {
		if (o->type == TYPE_MODE)
			return err_set(err, -EINVAL, "%s '%s' is not between 0 and 0777", o->key, text);
		if (o->type == TYPE_SHARE)
			return err_set(err, -EINVAL, "%s '%s' is not between 0 and 1", o->key, text);
		return err_set(err, -EINVAL, "%s '%s' is not between %llu and %llu", o->key, text, (unsigned long long)o->min,
		    (unsigned long long)o->max);
	}
	set_number(c, o, n);
	return 0;
}

static void
print_value(const struct conf *c, const struct option *o, char *buf, size_t len)
{
	if (is_string(o))
		snprintf(buf, len, "%s", *string_at(c, o) != NULL ? *string_at(c, o) : "");
	else if (o->type == TYPE_ENUM)
		snprintf(buf, len, "%s", o->choices[get_number(c, o)]);
	else if (o->type == TYPE_SHARE)
		snprintf(buf, len, "%g", (double)get_number(c, o) / 1e6);
	else
		snprintf(buf, len, o->type == TYPE_MODE ? "0%llo" : "%llu", (unsigned long long)get_number(c, o));
}

/* ---- the file ---- */

#define BOM "\xef\xbb\xbf"

struct text {
	FILE *f;
	int line;
	bool binary, too_long, long_section;
};

struct reader {
	struct conf *c;
	struct text text;
	int line[N_OPTIONS]; /* where it was set, 0: not */
	struct err *err;
	int rc, bad_line;    /* the first error of ours */
	bool saved;          /* reads the policies file */
	struct problems *problems; /* NULL: the first one ends it */
	const char *path;
};

/* conf_check(): told as they are met. */
struct problems {
	conf_tell tell;
	void *arg;
	uint32_t n;
};

static void
tell_problem(struct problems *p, const char *text)
{
	if (p->n++ < CONF_PROBLEMS)
		p->tell(p->arg, text);
}

/* Letters to change to turn one word into the other; for "did you mean". */
static unsigned
distance(const char *a, const char *b)
{
	unsigned d[64], n = (unsigned)strnlen(b, 63);

	for (unsigned j = 0; j <= n; j++)
		d[j] = j;
	for (unsigned i = 1; a[i - 1] != '\0'; i++) {
		unsigned diagonal = d[0];

		d[0] = i;
		for (unsigned j = 1; j <= n; j++) {
			unsigned best = diagonal + (a[i - 1] != b[j - 1]);

			if (d[j] + 1 < best)
				best = d[j] + 1;
			if (d[j - 1] + 1 < best)
				best = d[j - 1] + 1;
			diagonal = d[j];
			d[j] = best;
		}
	}
	return d[n];
}

static int
unknown_key(const char *section, const char *key, struct err *err)
{
	const struct option *near = NULL;
	unsigned least = 4;
	bool known = false;

	for (size_t i = 0; i < N_OPTIONS; i++) {
		if (strcmp(options[i].section, section) != 0)
			continue;
		known = true;
		if (distance(key, options[i].key) < least) {
			least = distance(key, options[i].key);
			near = &options[i];
		}
	}
	if (!known)
		return err_set(err, -EINVAL, "unknown section [%s]", section);
	return err_set(err, -EINVAL, "unknown key '%s' in [%s]%s%s%s", key, section, near != NULL ? ": did you mean '" : "",
	    near != NULL ? near->key : "", near != NULL ? "'?" : "");
}

static struct conf_policy *
find_policy(const struct conf *c, const char *name)
{
	for (size_t i = 0; i < c->n_policies; i++)
		if (strcmp(c->policies[i].name, name) == 0)
			return &c->policies[i];
	return NULL;
}

const struct conf_policy *
conf_policy(const struct conf *c, const char *name)
{
	return find_policy(c, name);
}

static void
clear_rules(struct conf_policy *p)
{
	for (size_t i = 0; i < p->n_rules; i++) {
		free(p->rules[i].selector);
		free(p->rules[i].format);
	}
	free(p->rules);
	p->rules = NULL;
	p->n_rules = 0;
}

static struct conf_policy *
add_policy(struct conf *c, const char *name, int line)
{
	struct conf_policy *more = realloc(c->policies, (c->n_policies + 1) * sizeof(*more)), *p;

	if (more == NULL)
		return NULL;
	c->policies = more;
	p = &c->policies[c->n_policies];
	*p = (struct conf_policy){.name = strdup(name), .line = line};
	if (p->name == NULL)
		return NULL;
	c->n_policies++;
	return p;
}

static int
add_rule(struct conf_policy *p, const char *selector, const char *format, int line)
{
	struct conf_rule *more = realloc(p->rules, (p->n_rules + 1) * sizeof(*more)), *r;

	if (more == NULL)
		return -ENOMEM;
	p->rules = more;
	r = &p->rules[p->n_rules];
	*r = (struct conf_rule){strdup(selector), strdup(format), line};
	if (r->selector == NULL || r->format == NULL) {
		free(r->selector), free(r->format);
		return -ENOMEM;
	}
	p->n_rules++;
	return 0;
}

static int
set_rule(struct reader *r, const char *name, const char *selector, const char *format, int line)
{
	struct conf_policy *p;

	while (*name == ' ')
		name++;
	if (*name == '\0')
		return err_set(r->err, -EINVAL, "[policy] has no name");
	p = find_policy(r->c, name);
	if (p == NULL)
		p = add_policy(r->c, name, line);
	else if (p->line == 0) {
		clear_rules(p); /* the file redefines a built-in one */
		p->line = line;
	} else if (r->saved && !p->saved)
		return err_set(r->err, -EEXIST, "policy '%s' is defined in %s, line %d", name, r->c->file, p->line);
	if (p != NULL)
		p->saved = r->saved;
	if (p == NULL || add_rule(p, selector, format, line) != 0)
		return err_set(r->err, -ENOMEM, "out of memory");
	return 0;
}

/* inih ends a key at ':' too, so "user:NAME = POLICY" arrives as "user" and "NAME = POLICY". */
static int
add_client(struct reader *r, const char *key, const char *value, int line)
{
	struct conf *c = r->c;
	struct conf_client *more = realloc(c->clients, (c->n_clients + 1) * sizeof(*more)), *cl;
	const char *equals = strchr(value, '=');
	int rc;

	if (more == NULL)
		return err_set(r->err, -ENOMEM, "out of memory");
	c->clients = more;
	cl = &c->clients[c->n_clients];
	*cl = (struct conf_client){.line = line};
	if (strcmp(key, "*") == 0)
		rc = asprintf(&cl->who, "*");
	else if (equals == NULL)
		return err_set(r->err, -EINVAL, "'%s' in [clients]: write user:NAME, group:NAME, uid:N, gid:N or * = POLICY", key);
	else {
		int n = (int)(equals - value);

		while (n > 0 && (value[n - 1] == ' ' || value[n - 1] == '\t'))
			n--;
		rc = asprintf(&cl->who, "%s:%.*s", key, n, value);
		for (value = equals + 1; *value == ' ' || *value == '\t';)
			value++;
	}
	cl->policy = strdup(value);
	c->n_clients++;
	return rc < 0 || cl->policy == NULL ? err_set(r->err, -ENOMEM, "out of memory") : 0;
}

static int
take(struct reader *r, const char *section, const char *key, const char *value, int line)
{
	if (strncmp(section, "policy ", 7) == 0 || strcmp(section, "policy") == 0)
		return set_rule(r, section + 6, key, value, line);
	if (r->saved)
		return err_set(r->err, -EINVAL, "only [policy NAME] sections stand in this file");
	if (strcmp(section, "clients") == 0)
		return add_client(r, key, value, line);
	for (size_t i = 0; i < N_OPTIONS; i++) {
		if (strcmp(options[i].section, section) != 0 || strcmp(options[i].key, key) != 0)
			continue;
		if (r->line[i] != 0)
			return err_set(r->err, -EINVAL, "%s is set twice, first in line %d", key, r->line[i]);
		r->line[i] = line;
		return set_option(r->c, &options[i], value, r->err);
	}
	if (*section == '\0')
		return err_set(r->err, -EINVAL, "'%s' stands before any section", key);
	return unknown_key(section, key, r->err);
}

static char *
next_line(char *buf, int size, void *arg)
{
	struct text *t = arg;
	char *whole = NULL, *s;
	size_t cap = 0;
	ssize_t n;

	if (t->binary || t->too_long || t->long_section || (n = getline(&whole, &cap, t->f)) < 0) {
		free(whole);
		return NULL;
	}
	t->line++;
	/* An indented line is a line like others; inih would add it to the one above. */
	s = t->line == 1 && strncmp(whole, BOM, 3) == 0 ? whole + 3 : whole;
	s += strspn(s, " \t");
	if (strlen(whole) != (size_t)n)
		t->binary = true;
	else if (n >= size)
		t->too_long = true;
	else if (*s == '[' && strcspn(s + 1, "]") > MAX_SECTION)
		t->long_section = true;
	else
		memcpy(buf, s, strlen(s) + 1);
	free(whole);
	return t->binary || t->too_long || t->long_section ? NULL : buf;
}

static int
on_ini(void *arg, const char *section, const char *key, const char *value)
{
	struct reader *r = arg;

	if (r->rc != 0)
		return 1;
	r->rc = take(r, section, key, value, r->text.line);
	r->bad_line = r->text.line;
	if (r->rc == -EINVAL && r->problems != NULL) {
		err_prefix(r->err, "%s:%d", r->path, r->text.line);
		tell_problem(r->problems, r->err->text);
		r->rc = 0;
	}
	return r->rc == 0;
}

static int
parse_file(struct reader *r, const char *path)
{
	struct stat st;
	struct text *t = &r->text;
	int line;

	r->path = path;
	t->f = fopen(path, "re");
	if (t->f == NULL)
		return err_set(r->err, -errno, "%s: %s", path, strerror(errno));
	if (fstat(fileno(t->f), &st) == 0 && S_ISDIR(st.st_mode)) {
		fclose(t->f);
		return err_set(r->err, -EISDIR, "%s: Is a directory", path);
	}
	line = ini_parse_stream(next_line, t, on_ini, r);
	fclose(t->f);
	if (r->rc != 0 && line == r->bad_line) {
		err_prefix(r->err, "%s:%d", path, line);
		return r->rc;
	}
	if (line > 0)
		return err_set(r->err, -EINVAL, "%s:%d: neither '[section]' nor 'key = value'", path, line);
	if (t->binary)
		return err_set(r->err, -EINVAL, "%s:%d: a zero byte: not a text file", path, t->line);
	if (t->too_long)
		return err_set(r->err, -EINVAL, "%s:%d: longer than %d characters", path, t->line, MAX_LINE - 2);
	if (t->long_section)
		return err_set(r->err, -EINVAL, "%s:%d: the name of a section is longer than %d characters", path, t->line,
		    MAX_SECTION);
	return line < 0 ? err_set(r->err, -EIO, "%s: cannot be read", path) : 0;
}

/* ---- defaults ---- */

static int
add_builtin_policies(struct conf *c)
{
	static const struct {
		const char *name, *selector, *format;
	} rules[] = {
		{"bf16", "*", "bf16"}, {"bf16", "kv_cache", "bf16"},
		{"fp8", "attention.*", "fp8"}, {"fp8", "mlp.*", "fp8"}, {"fp8", "lm_head", "bf16"}, {"fp8", "kv_cache", "bf16"},
	};

	for (size_t i = 0; i < sizeof(rules) / sizeof(*rules); i++) {
		struct conf_policy *p = find_policy(c, rules[i].name);

		if (p == NULL)
			p = add_policy(c, rules[i].name, 0);
		if (p == NULL || add_rule(p, rules[i].selector, rules[i].format, 0) != 0)
			return -ENOMEM;
	}
	return 0;
}

static char *
default_socket(void)
{
	const char *set = getenv("OCTET_SOCKET"), *run = getenv("XDG_RUNTIME_DIR");
	char *path;

	if (set != NULL && *set != '\0')
		return strdup(set);
	if (run == NULL || *run == '\0')
		return strdup("/run/octet/octet.sock");
	return asprintf(&path, "%s/octet/octet.sock", run) < 0 ? NULL : path;
}

/* Beside the data socket: X.sock -> X-control.sock. */
static char *
default_control(const char *socket)
{
	size_t n = strlen(socket);
	char *path;

	if (n > 5 && strcmp(socket + n - 5, ".sock") == 0)
		n -= 5;
	return asprintf(&path, "%.*s-control.sock", (int)n, socket) < 0 ? NULL : path;
}

static char *
default_state_dir(void)
{
	const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
	char *path;

	if (state != NULL && *state != '\0')
		return asprintf(&path, "%s/octet", state) < 0 ? NULL : path;
	if (geteuid() == 0 || home == NULL || *home == '\0')
		return strdup("/var/lib/octet");
	return asprintf(&path, "%s/.local/state/octet", home) < 0 ? NULL : path;
}

static int
defaults(struct conf *c, struct err *err)
{
	for (size_t i = 0; i < N_OPTIONS; i++)
		if (options[i].fallback != NULL && set_option(c, &options[i], options[i].fallback, err) != 0)
			return -ENOMEM;
	return add_builtin_policies(c);
}

static char *
beside(const char *path, const char *name)
{
	const char *slash = strrchr(path, '/');
	char *out;

	return asprintf(&out, "%.*s%s", slash == NULL ? 0 : (int)(slash - path + 1), path, name) < 0 ? NULL : out;
}

static int
fill_paths(struct conf *c, const char *path, struct err *err)
{
	if (c->socket == NULL)
		c->socket = default_socket();
	if (c->control_socket == NULL && c->socket != NULL)
		c->control_socket = default_control(c->socket);
	if (c->state_dir == NULL)
		c->state_dir = default_state_dir();
	if (c->policies_file == NULL)
		c->policies_file = beside(path, "policies.ini");
	if (c->socket == NULL || c->control_socket == NULL || c->state_dir == NULL || c->policies_file == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	if (strcmp(c->socket, c->control_socket) == 0)
		return err_set(err, -EINVAL, "%s: socket and control_socket are the same path", path);
	if (c->max_batch > c->max_batch_tokens)
		c->max_batch = c->max_batch_tokens;
	if (c->model_path == NULL)
		return err_set(err, -EINVAL, "%s: [model] path is missing", path);
	return 0;
}

/* One stage; with problems, what is wrong in the file is told and the next one runs. */
static int
stage(int rc, struct problems *p, const struct err *err)
{
	if (rc != -EINVAL || p == NULL)
		return rc;
	tell_problem(p, err->text);
	return 0;
}

static int
load(struct conf **out, const char *path, struct problems *p, struct err *err)
{
	struct conf *c = calloc(1, sizeof(*c));
	struct reader r = {.c = c, .err = err, .problems = p}, saved = {.c = c, .err = err, .problems = p, .saved = true};
	int rc = c == NULL || (c->file = strdup(path)) == NULL ? err_set(err, -ENOMEM, "out of memory") : 0;

	if (rc == 0)
		rc = defaults(c, err);
	if (rc == 0)
		rc = stage(parse_file(&r, path), p, err);
	if (rc == 0)
		rc = stage(fill_paths(c, path, err), p, err);
	if (rc == 0 && c->policies_file != NULL && access(c->policies_file, F_OK) == 0)
		rc = stage(parse_file(&saved, c->policies_file), p, err);
	if (rc != 0) {
		conf_free(&c);
		return rc;
	}
	*out = c;
	return 0;
}

int
conf_load(struct conf **out, const char *path, struct err *err)
{
	return load(out, path, NULL, err);
}

int
conf_check(struct conf **out, const char *path, conf_tell tell, void *arg)
{
	struct problems p = {.tell = tell, .arg = arg};
	struct err err = {""};

	if (load(out, path, &p, &err) != 0)
		tell_problem(&p, err.text);
	return (int)p.n;
}

void
conf_free(struct conf **cp)
{
	struct conf *c = *cp;

	if (c == NULL)
		return;
	for (size_t i = 0; i < N_OPTIONS; i++)
		if (is_string(&options[i]))
			free(*string_at(c, &options[i]));
	for (size_t i = 0; i < c->n_policies; i++) {
		clear_rules(&c->policies[i]);
		free(c->policies[i].name);
	}
	free(c->policies);
	for (size_t i = 0; i < c->n_clients; i++) {
		free(c->clients[i].who);
		free(c->clients[i].policy);
	}
	free(c->clients);
	free(c->file);
	free(c);
	*cp = NULL;
}

/* ---- comparing ---- */

int
conf_diff(const struct conf *from, const struct conf *to, struct conf_change **out, size_t *n)
{
	*n = 0;
	*out = calloc(N_OPTIONS, sizeof(**out));
	if (*out == NULL)
		return -ENOMEM;
	for (size_t i = 0; i < N_OPTIONS; i++) {
		struct conf_change *c = &(*out)[*n];

		print_value(from, &options[i], c->from, sizeof(c->from));
		print_value(to, &options[i], c->to, sizeof(c->to));
		if (strcmp(c->from, c->to) == 0)
			continue;
		snprintf(c->key, sizeof(c->key), "%s.%s", options[i].section, options[i].key);
		c->live = options[i].live;
		(*n)++;
	}
	return 0;
}

void
conf_changes_free(struct conf_change *changes, size_t n)
{
	(void)n;
	free(changes);
}

int
conf_keep_restart_only(struct conf *c, const struct conf *running)
{
	for (size_t i = 0; i < N_OPTIONS; i++) {
		const struct option *o = &options[i];

		if (o->live)
			continue;
		if (is_string(o)) {
			char *s = strdup(*string_at(running, o));

			if (s == NULL)
				return -ENOMEM;
			free(*string_at(c, o));
			*string_at(c, o) = s;
		} else
			set_number(c, o, get_number(running, o));
	}
	return 0;
}

/* "ms, 10 to 60000", or the choices. */
static void
print_bounds(FILE *f, const struct option *o)
{
	const char *comma = *o->unit != '\0' ? ", " : "";

	if (*o->unit == '\0' && o->type != TYPE_NUMBER && o->type != TYPE_SHARE && o->choices == NULL)
		return;
	fprintf(f, " (%s", o->unit);
	if (o->type == TYPE_NUMBER)
		fprintf(f, "%s%llu to %llu", comma, (unsigned long long)o->min, (unsigned long long)o->max);
	if (o->type == TYPE_SHARE)
		fprintf(f, "0 to 1");
	for (size_t i = 0; o->choices != NULL && o->choices[i] != NULL; i++)
		fprintf(f, "%s%s", i > 0 ? ", " : "", o->choices[i]);
	fprintf(f, ")");
}

void
conf_print_options(FILE *f)
{
	for (size_t i = 0; i < N_OPTIONS; i++) {
		const struct option *o = &options[i];

		fprintf(f, "[%s] %s = %s", o->section, o->key, o->fallback != NULL ? o->fallback : "(see octet.ini(5))");
		print_bounds(f, o);
		fprintf(f, "\n    %s%s\n", o->help, o->live ? "" : "; needs a restart");
	}
}
