/* SPDX-License-Identifier: Apache-2.0 */
/* octetctl eval, evals, sweep, rollout: what precision costs and saves. */
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "client/ctl-cmd.h"

#define PIECE 16384u /* bytes of text in one request: JSON may make each of them six */
#define POLL_MS 100
#define MAX_SITES 4096u
#define LEAST_SAVED 0.5 /* us */

static volatile sig_atomic_t interrupted;

static void
on_interrupt(int signum)
{
	(void)signum;
	interrupted = 1;
}

/* Takes the request; the reply may be NULL. */
static int
ask(struct ctl *ctl, json_t *request, json_t **reply, struct err *err)
{
	json_t *ignored = NULL;
	int rc = request == NULL ? err_set(err, -ENOMEM, "out of memory")
	                         : ctl_call(ctl, request, reply != NULL ? reply : &ignored, CALL_TIMEOUT_MS, err);

	json_decref(request);
	json_decref(ignored);
	return rc;
}

/* ---- files ---- */

/* malloc'd, terminated. */
static char *
read_file(const char *path, size_t *len, struct err *err)
{
	FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "re");
	char *data = NULL;
	size_t cap = 0;

	*len = 0;
	while (f != NULL) {
		size_t n;

		if (*len + 4096 > cap) {
			char *more = realloc(data, cap = 2 * cap + 8192);

			if (more == NULL)
				break;
			data = more;
		}
		n = fread(data + *len, 1, cap - *len - 1, f);
		*len += n;
		if (n == 0)
			break;
	}
	if (f == NULL || ferror(f)) {
		err_set(err, -errno, "%s: %s", path, strerror(errno));
		free(data);
		data = NULL;
	} else
		data[*len] = '\0';
	if (f != NULL && f != stdin)
		fclose(f);
	return data;
}

/* No character is cut in two. */
static size_t
piece_length(const char *s, size_t left)
{
	size_t n = left < PIECE ? left : PIECE;

	while (n < left && n > 1 && ((unsigned char)s[n] & 0xc0) == 0x80)
		n--;
	return n;
}

static int
send_text(struct ctl *ctl, const char *path, struct err *err)
{
	size_t len;
	char *data = read_file(path, &len, err);
	int rc = data == NULL ? -EIO : 0;

	for (size_t at = 0, n; rc == 0 && at < len; at += n) {
		json_t *text;

		n = piece_length(data + at, len - at);
		text = json_stringn(data + at, n);
		if (text == NULL || memchr(data + at, '\0', n) != NULL) {
			json_decref(text);
			rc = err_set(err, -EINVAL, "%s: is no UTF-8 text, near byte %zu", path, at);
			break;
		}
		rc = ask(ctl, json_pack("{s:s,s:s,s:s,s:o}", "verb", "eval", "op", "text", "file", path, "data", text), NULL, err);
	}
	if (rc == 0 && len == 0)
		rc = err_set(err, -EINVAL, "%s: is empty", path);
	free(data);
	return rc;
}

static int
send_items(struct ctl *ctl, const char *path, json_t **items, struct err *err)
{
	int rc = json_array_size(*items) == 0
	    ? 0
	    : ask(ctl, json_pack("{s:s,s:s,s:s,s:O}", "verb", "eval", "op", "task", "file", path, "items", *items), NULL, err);

	json_array_clear(*items);
	return rc;
}

/* JSON lines of {"input", "expected"}. */
static int
send_task(struct ctl *ctl, const char *path, struct err *err)
{
	size_t len, bytes = 0;
	char *data = read_file(path, &len, err), *save = NULL;
	json_t *items = json_array();
	int rc = data == NULL ? -EIO : 0, line = 0, n = 0;

	for (char *l = data != NULL ? strtok_r(data, "\n", &save) : NULL; l != NULL && rc == 0; l = strtok_r(NULL, "\n", &save)) {
		json_error_t je;
		json_t *j;

		line++;
		if (l[strspn(l, " \t\r")] == '\0')
			continue;
		j = json_loads(l, JSON_REJECT_DUPLICATES, &je);
		if (!json_is_object(j) || !json_is_string(json_object_get(j, "input")) ||
		    !json_is_string(json_object_get(j, "expected"))) {
			json_decref(j);
			rc = err_set(err, -EINVAL, "%s:%d: is no JSON object with the strings \"input\" and \"expected\"", path, line);
			break;
		}
		if (bytes + strlen(l) > PIECE)
			rc = send_items(ctl, path, &items, err), bytes = 0;
		json_array_append_new(items, j);
		bytes += strlen(l);
		n++;
	}
	if (rc == 0)
		rc = send_items(ctl, path, &items, err);
	if (rc == 0 && n == 0)
		rc = err_set(err, -EINVAL, "%s: is empty", path);
	json_decref(items);
	free(data);
	return rc;
}

/* ---- one eval ---- */

static void
progress(const char *what, const json_t *r)
{
	int width = 30, full = num(r, "total") > 0 ? (int)(width * num(r, "done") / num(r, "total")) : 0;
	double left = real(r, "seconds_left");

	if (!isatty(STDERR_FILENO))
		return;
	fprintf(stderr, "\r%-24.24s [%.*s%*s] %3d %%", what, full, "##############################", width - full, "",
	    num(r, "total") > 0 ? (int)(100 * num(r, "done") / num(r, "total")) : 0);
	if (left >= 0)
		fprintf(stderr, ", %d:%02d left ", (int)left / 60, (int)left % 60);
	fputs("\033[K", stderr);
}

static int
save_logits(struct ctl *ctl, const char *path, struct err *err)
{
	int from = ctl_take_fd(ctl), rc = 0;
	char buf[65536];
	FILE *to = from >= 0 ? fopen(path, "we") : NULL;
	off_t at = 0;
	ssize_t n;

	if (from < 0)
		return err_set(err, -EIO, "the daemon sent no logits");
	while (to != NULL && (n = pread(from, buf, sizeof(buf), at)) > 0 && fwrite(buf, 1, (size_t)n, to) == (size_t)n)
		at += n;
	if (to == NULL || ferror(to) || fflush(to) != 0)
		rc = err_set(err, -errno, "%s: %s", path, strerror(errno));
	if (to != NULL)
		fclose(to);
	close(from);
	return rc;
}

/* Candidate against baseline on the files of the command line. */
static int
measure(const struct options *o, struct ctl *ctl, const char *candidate, const char *what, bool sweep, json_t **result,
    struct err *err)
{
	json_t *start, *reply = NULL;
	int rc = 0;

	*result = NULL;
	for (unsigned i = 0; i < o->n_files && rc == 0; i++)
		rc = (o->is_task[i] ? send_task : send_text)(ctl, o->file[i], err);
	start = json_pack("{s:s,s:s,s:s,s:b,s:b,s:b,s:b,s:s}", "verb", "eval", "op", "start", "candidate", candidate, "exclusive",
	    o->exclusive, "dump_logits", o->dump != NULL, "sweep", sweep, "reuse", sweep && !o->again, "name",
	    o->name != NULL ? o->name : "");
	if (o->baseline != NULL)
		json_object_set_new(start, "baseline", json_string(o->baseline));
	if (o->context > 0)
		json_object_set_new(start, "context", json_integer(o->context));
	if (o->stop != NULL)
		json_object_set_new(start, "stop", json_string(o->stop));
	if (rc == 0)
		rc = ask(ctl, json_incref(start), NULL, err);
	json_decref(start);
	while (rc == 0 && *result == NULL) {
		rc = ask(ctl, json_pack("{s:s,s:s}", "verb", "eval", "op", "poll"), &reply, err);
		if (rc == 0 && strcmp(str(reply, "state"), "done") == 0)
			*result = json_incref(json_object_get(reply, "result"));
		else if (rc == 0) {
			progress(what, reply);
			usleep(POLL_MS * 1000);
		}
		json_decref(reply);
		reply = NULL;
		if (rc == 0 && interrupted && *result == NULL)
			rc = err_set(err, -EINTR, "interrupted");
	}
	if (isatty(STDERR_FILENO))
		fputs("\r\033[K", stderr);
	if (rc == 0 && o->dump != NULL)
		rc = save_logits(ctl, o->dump, err);
	if (rc == 0)
		rc = ask(ctl, json_pack("{s:s,s:s}", "verb", "eval", "op", "cancel"), NULL, err);
	return rc;
}

static void
print_text(const json_t *t)
{
	const json_t *p = json_object_get(t, "perplexity"), *kl = json_object_get(t, "kl"), *s = json_object_get(t, "tokens_s"),
	             *w;
	size_t i;

	printf("scored      %lld tokens\n", (long long)num(t, "tokens"));
	printf("perplexity  %.4f +- %.4f  ->  %.4f +- %.4f   change %+.3f %% (95 %%: %+.3f to %+.3f)\n", real(p, "baseline"),
	    real(p, "baseline_se"), real(p, "candidate"), real(p, "candidate_se"), real(p, "change_percent"),
	    real(p, "change_low"), real(p, "change_high"));
	printf("KL          mean %.6f +- %.6f, median %.6f, p99 %.6f, p99.9 %.6f, max %.6f\n", real(kl, "mean"),
	    real(kl, "mean_se"), real(kl, "median"), real(kl, "p99"), real(kl, "p99_9"), real(kl, "max"));
	printf("agreement   top-1 %.2f %%, top-5 %.2f %%\n", 100 * real(t, "top1"), 100 * real(t, "top5"));
	if (real(s, "baseline") > 0)
		printf("prefill     %.0f  ->  %.0f tokens/s\n", real(s, "baseline"), real(s, "candidate"));
	json_array_foreach(json_object_get(t, "worst"), i, w) {
		char *before = json_dumps(json_object_get(w, "before"), JSON_ENCODE_ANY);

		if (i == 0)
			printf("worst tokens\n  %8s  %-14s %8s %8s  %-14s %-14s after\n", "KL", "token", "p", "-> p", "first", "-> first");
		printf("  %8.4f  %-14s %8.4f %8.4f  %-14s %-14s %s\n", real(w, "kl"), str(w, "token"), real(w, "p_baseline"),
		    real(w, "p_candidate"), str(w, "first_baseline"), str(w, "first_candidate"), before != NULL ? before : "");
		free(before);
	}
}

static void
print_task(const json_t *t)
{
	const json_t *b = json_object_get(t, "baseline"), *c = json_object_get(t, "candidate");

	printf("task        %lld pairs\n", (long long)num(t, "pairs"));
	printf("exact match %lld (%.1f %%)  ->  %lld (%.1f %%)\n", (long long)num(b, "exact"), 100 * real(b, "exact_share"),
	    (long long)num(c, "exact"), 100 * real(c, "exact_share"));
	printf("word errors %lld  ->  %lld  (before: %lld); edit distance %lld  ->  %lld\n", (long long)num(b, "word_errors"),
	    (long long)num(c, "word_errors"), (long long)num(t, "word_errors_before"), (long long)num(b, "edit_distance"),
	    (long long)num(c, "edit_distance"));
	printf("changed     %lld answers; %lld became right, %lld wrong (McNemar p = %.3f)\n", (long long)num(t, "changed"),
	    (long long)num(t, "better"), (long long)num(t, "worse"), real(t, "mcnemar_p"));
}

static void
print_result(const json_t *r)
{
	const json_t *step = json_object_get(r, "step_us"), *c;
	size_t i;

	printf("eval %lld  %s%s%s\n", (long long)num(r, "id"), str(r, "time"), *str(r, "name") != '\0' ? "  " : "",
	    str(r, "name"));
	printf("plans       %s  ->  %s  (%lld sites)\n", str(r, "baseline"), str(r, "candidate"), (long long)num(r, "sites"));
	json_array_foreach(json_object_get(r, "corpora"), i, c)
		printf("%-11s %s, %lld bytes\n", str(c, "kind"), str(c, "file"), (long long)num(c, "bytes"));
	if (step != NULL)
		printf("decode step %.1f  ->  %.1f us at batch 1 (saves %.1f +- %.1f)\n", real(step, "baseline"),
		    real(step, "candidate"), real(step, "saved"), real(step, "saved_error"));
	if (json_object_get(r, "text") != NULL)
		print_text(json_object_get(r, "text"));
	if (json_object_get(r, "task") != NULL)
		print_task(json_object_get(r, "task"));
}

static int
open_ctl(const struct options *o, struct ctl **ctl, struct err *err)
{
	struct sigaction sa = {.sa_handler = on_interrupt};

	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);
	return ctl_open(ctl, o->socket, err);
}

static int
no_files(const char *verb, struct err *err)
{
	return err_set(err, -EINVAL, "%s needs --text FILE or --task FILE", verb);
}

int
cmd_eval(const struct options *o, char **args, int n)
{
	struct ctl *ctl = NULL;
	struct err err = {""};
	json_t *result = NULL;
	int rc;

	(void)args, (void)n;
	if (o->candidate == NULL)
		rc = err_set(&err, -EINVAL, "eval needs --candidate POLICY");
	else if (o->n_files == 0)
		rc = no_files("eval", &err);
	else if ((rc = open_ctl(o, &ctl, &err)) == 0)
		rc = measure(o, ctl, o->candidate, "eval", false, &result, &err);
	if (rc == 0 && o->json) {
		json_dumpf(result, stdout, JSON_INDENT(1));
		printf("\n");
	} else if (rc == 0)
		print_result(result);
	json_decref(result);
	ctl_close(&ctl);
	return rc != 0 ? complain(&err) : fflush(stdout) != 0;
}

/* ---- stored results ---- */

static void
print_list(const json_t *list)
{
	const json_t *e;
	size_t i;

	printf("%-5s %-20s %-16s %-28s %5s %10s %9s %8s %s\n", "id", "time", "baseline", "candidate", "sites", "KL", "ppl", "top-1",
	    "name");
	json_array_foreach((json_t *)(uintptr_t)list, i, e) {
		printf("%-5lld %-20s %-16.16s %-28.28s %5lld", (long long)num(e, "id"), str(e, "time"), str(e, "baseline"),
		    str(e, "candidate"), (long long)num(e, "sites"));
		if (json_object_get(e, "kl_mean") != NULL)
			printf(" %10.6f %+7.3f %% %6.2f %%", real(e, "kl_mean"), real(e, "change_percent"), 100 * real(e, "top1"));
		else
			printf(" %10s %9s %8s", "-", "-", "-");
		printf(" %s\n", str(e, "name"));
	}
}

static void
print_pair(const char *name, double a, double b, const char *unit)
{
	if (!isnan(a) && !isnan(b))
		printf("%-24s %14.6f %14.6f %+14.6f %s\n", name, a, b, b - a, unit);
}

static double
deep(const json_t *r, const char *a, const char *b, const char *c)
{
	const json_t *o = json_object_get(json_object_get(r, a), b);

	return c != NULL ? real(o, c) : json_is_number(o) ? json_number_value(o) : NAN;
}

static void
print_compare(const json_t *reply)
{
	const json_t *a = json_object_get(reply, "a"), *b = json_object_get(reply, "b");

	printf("%-24s %14lld %14lld %14s\n", "eval", (long long)num(a, "id"), (long long)num(b, "id"), "difference");
	printf("%-24s %14.14s %14.14s\n", "candidate", str(a, "candidate"), str(b, "candidate"));
	print_pair("perplexity", deep(a, "text", "perplexity", "candidate"), deep(b, "text", "perplexity", "candidate"), "");
	print_pair("KL mean", deep(a, "text", "kl", "mean"), deep(b, "text", "kl", "mean"), "");
	print_pair("KL p99", deep(a, "text", "kl", "p99"), deep(b, "text", "kl", "p99"), "");
	print_pair("top-1", deep(a, "text", "top1", NULL), deep(b, "text", "top1", NULL), "");
	print_pair("decode step", deep(a, "step_us", "candidate", NULL), deep(b, "step_us", "candidate", NULL), "us");
	print_pair("exact match", deep(a, "task", "candidate", "exact_share"), deep(b, "task", "candidate", "exact_share"), "");
	print_pair("word errors", deep(a, "task", "candidate", "word_errors"), deep(b, "task", "candidate", "word_errors"), "");
}

static bool
parse_id(const char *s, json_int_t *out)
{
	char *end;

	*out = strtoll(s, &end, 10);
	return end != s && *end == '\0' && *out > 0;
}

/* A result by its id, or by the name that it was saved under: the newest. */
static int
id_of(struct ctl *ctl, const char *text, json_int_t *id, struct err *err)
{
	json_t *reply = NULL, *e;
	bool found = parse_id(text, id);
	size_t i;
	int rc = 0;

	if (found)
		return 0;
	if ((rc = ask(ctl, json_pack("{s:s,s:s,s:b}", "verb", "evals", "op", "list", "all", 1), &reply, err)) != 0)
		return rc;
	json_array_foreach(json_object_get(reply, "evals"), i, e) {
		const char *name = json_string_value(json_object_get(e, "name"));

		if (name != NULL && strcmp(name, text) == 0) {
			*id = json_integer_value(json_object_get(e, "id"));
			found = true;
		}
	}
	json_decref(reply);
	return found ? 0 : err_set(err, -ENOENT, "evals: no result has the id or the name '%s'", text);
}

int
cmd_evals(const struct options *o, char **args, int n)
{
	const char *op = n > 0 ? args[0] : "list";
	int want = strcmp(op, "list") == 0 ? 1 : strcmp(op, "compare") == 0 ? 3 : 2, rc = 0;
	json_t *request = json_pack("{s:s,s:s}", "verb", "evals", "op", op), *reply = NULL;
	struct ctl *ctl = NULL;
	struct err err = {""};
	json_int_t id;

	if (n > 0 && n != want)
		rc = err_set(&err, -EINVAL, "evals: list, show ID, compare ID ID or delete ID; a name does for an ID");
	if (rc == 0)
		rc = open_ctl(o, &ctl, &err);
	for (int i = 1; i < n && rc == 0; i++)
		if ((rc = id_of(ctl, args[i], &id, &err)) == 0)
			json_object_set_new(request, i == 1 ? "id" : "with", json_integer(id));
	if (o->all)
		json_object_set_new(request, "all", json_true());
	if (rc == 0)
		rc = ask(ctl, json_incref(request), &reply, &err);
	json_decref(request);
	if (rc == 0 && o->json) {
		json_object_del(reply, "ok");
		json_dumpf(strcmp(op, "list") == 0 ? json_object_get(reply, "evals") : reply, stdout, JSON_INDENT(1));
		printf("\n");
	} else if (rc == 0 && strcmp(op, "list") == 0)
		print_list(json_object_get(reply, "evals"));
	else if (rc == 0 && strcmp(op, "show") == 0)
		print_result(reply);
	else if (rc == 0 && strcmp(op, "compare") == 0)
		print_compare(reply);
	json_decref(reply);
	ctl_close(&ctl);
	return rc != 0 ? complain(&err) : fflush(stdout) != 0;
}

/* ---- sweep ---- */

struct trial {
	char rule[96];     /* selector = format, as the INI has it */
	char selector[64];
	char group[32];
	int layer;         /* -1: all, or none */
	double kl, ppl, top1; /* ppl: change in per cent */
	double saved, error;  /* us of a decode step, and its standard error */
	json_int_t id;
	bool chosen;
};

struct sweep {
	const struct options *o;
	struct ctl *ctl;
	struct trial *t;
	size_t n;
	unsigned layers;
	char group[32][32];
	unsigned n_groups;
	json_t *whole;     /* the result of the chosen policy */
	double predicted_kl, predicted_saved;
};

static void
add_trial(struct sweep *s, const char *group, int layer)
{
	const char *format = s->o->format != NULL ? s->o->format : "fp8";
	struct trial *t = s->n < MAX_SITES ? &s->t[s->n] : NULL;

	if (t == NULL)
		return;
	*t = (struct trial){.layer = layer};
	snprintf(t->group, sizeof(t->group), "%s", group);
	if (layer >= 0)
		snprintf(t->selector, sizeof(t->selector), "%s@%d", group, layer);
	else
		snprintf(t->selector, sizeof(t->selector), "%s", group);
	snprintf(t->rule, sizeof(t->rule), "%s=%s", t->selector, format);
	s->n++;
}

/* What there is to flip, from the daemon's status. */
static int
list_trials(struct sweep *s, struct err *err)
{
	const char *by = s->o->by != NULL ? s->o->by : "group";
	json_t *status = NULL, *g;
	size_t i;
	int rc = ask(s->ctl, json_pack("{s:s}", "verb", "status"), &status, err);

	s->t = calloc(MAX_SITES, sizeof(*s->t));
	if (rc != 0 || s->t == NULL)
		return rc;
	json_array_foreach(json_object_get(status, "groups"), i, g) {
		unsigned n = (unsigned)json_array_size(json_object_get(g, "wanted"));

		if (i >= 32)
			break;
		snprintf(s->group[s->n_groups++], sizeof(s->group[0]), "%s", str(g, "name"));
		s->layers = n > s->layers ? n : s->layers;
		if (strcmp(by, "group") == 0 || (strcmp(by, "site") == 0 && n == 1))
			add_trial(s, str(g, "name"), -1);
		else if (strcmp(by, "site") == 0)
			for (unsigned l = 0; l < n; l++)
				add_trial(s, str(g, "name"), (int)l);
	}
	if (strcmp(by, "layer") == 0)
		for (unsigned l = 0; l < s->layers; l++)
			add_trial(s, "*", (int)l);
	json_decref(status);
	return s->n > 0 ? 0 : err_set(err, -EINVAL, "sweep: --by is group, layer or site, not '%s'", by);
}

static int
read_trial(struct trial *t, const json_t *r, struct err *err)
{
	t->kl = deep(r, "text", "kl", "mean");
	t->ppl = deep(r, "text", "perplexity", "change_percent");
	t->top1 = deep(r, "text", "top1", NULL);
	t->saved = deep(r, "step_us", "saved", NULL);
	t->error = deep(r, "step_us", "saved_error", NULL);
	t->id = num(r, "id");
	return !isnan(t->kl) && !isnan(t->saved) ? 0 : err_set(err, -EINVAL, "the files have nothing to score");
}

/* Less than half a microsecond, or two standard errors, cannot be told from nothing. */
static bool
saves(const struct trial *t)
{
	return t->saved >= fmax(LEAST_SAVED, 2 * t->error);
}

/* Divergence per microsecond saved. */
static double
price(const struct trial *t)
{
	return t->kl / fmax(t->saved, LEAST_SAVED);
}

/* The dearest first. */
static int
by_price(const void *pa, const void *pb)
{
	double x = price(pa), y = price(pb);

	return x > y ? -1 : x < y;
}

static double
cost(const struct sweep *s, const struct trial *t)
{
	return s->o->budget_kl >= 0 ? t->kl : fmax(0, t->ppl);
}

static double
budget(const struct sweep *s)
{
	return s->o->budget_kl >= 0 ? s->o->budget_kl : s->o->budget_ppl;
}

/* The rules that are chosen, as eval takes them. malloc'd, "" if none. */
static char *
chosen_rules(const struct sweep *s)
{
	size_t cap = s->n * sizeof(s->t[0].rule) + 1;
	char *text = calloc(1, cap), *at = text;

	for (size_t i = 0; text != NULL && i < s->n; i++)
		if (s->t[i].chosen)
			at += sprintf(at, "%s%s", at > text ? "," : "", s->t[i].rule);
	return text;
}

/* Adds the cheapest first while the sum of what each costs alone fits, then
 * measures the whole; what it costs more than its parts is taken back, the
 * dearest first, until it fits. */
static int
choose(struct sweep *s, struct err *err)
{
	double sum = 0;
	int rc = 0;

	for (size_t i = s->n; i-- > 0;) {
		s->t[i].chosen = saves(&s->t[i]) && sum + cost(s, &s->t[i]) <= budget(s);
		sum += s->t[i].chosen ? cost(s, &s->t[i]) : 0;
	}
	for (size_t dearest = 0; rc == 0;) {
		char *rules = chosen_rules(s);
		struct trial whole = {0};

		if (rules == NULL || *rules == '\0') {
			free(rules);
			return 0;
		}
		rc = measure(s->o, s->ctl, rules, "the chosen policy", true, &s->whole, err);
		free(rules);
		if (rc != 0)
			break;
		if ((rc = read_trial(&whole, s->whole, err)) != 0)
			break;
		if (cost(s, &whole) <= budget(s))
			break;
		json_decref(s->whole);
		s->whole = NULL;
		while (!s->t[dearest].chosen)
			dearest++;
		s->t[dearest].chosen = false;
	}
	return rc;
}

static void
print_sweep(const struct sweep *s)
{
	printf("%-4s %-28s %12s %10s %8s %17s %14s\n", "rank", "flipped alone", "KL mean", "ppl", "top-1", "saved us", "KL per us");
	for (size_t i = 0; i < s->n; i++) {
		const struct trial *t = &s->t[i];

		printf("%-4zu %-28s %12.8f %+8.3f %% %6.2f %% %8.2f +- %5.2f %14.3e%s\n", i + 1, t->rule, t->kl, t->ppl, 100 * t->top1,
		    t->saved, t->error, price(t), t->chosen ? "  chosen" : !saves(t) ? "  saves nothing" : "");
	}
}

static const char *
policy_name(const struct sweep *s)
{
	return s->o->name != NULL ? s->o->name : "swept";
}

static void
print_policy(const struct sweep *s)
{
	struct trial whole = {0};

	if (budget(s) < 0)
		return;
	if (s->whole == NULL) {
		printf("\nnothing fits the budget: stay with the baseline\n");
		return;
	}
	read_trial(&whole, s->whole, &(struct err){""});
	printf("\n; %s %g; measured as a whole (eval %lld): KL %.8f, perplexity %+.3f %%, top-1 %.2f %%,\n; a decode step %.1f -> %.1f us\n",
	    s->o->budget_kl >= 0 ? "KL budget" : "perplexity budget in per cent", budget(s), (long long)whole.id, whole.kl, whole.ppl,
	    100 * whole.top1, deep(s->whole, "step_us", "baseline", NULL), deep(s->whole, "step_us", "candidate", NULL));
	printf("[policy %s]\n", policy_name(s));
	for (size_t i = 0; i < s->n; i++)
		if (s->t[i].chosen)
			printf("%s = %s\n", s->t[i].selector, strrchr(s->t[i].rule, '=') + 1);
}

static json_t *
sweep_json(const struct sweep *s)
{
	json_t *list = json_array(), *rules = json_array(), *all;

	for (size_t i = 0; i < s->n; i++) {
		const struct trial *t = &s->t[i];

		json_array_append_new(list, json_pack("{s:s,s:s,s:f,s:f,s:f,s:f,s:f,s:b,s:I}", "selector", t->selector, "format",
		    strrchr(t->rule, '=') + 1, "kl_mean", t->kl, "change_percent", t->ppl, "top1", t->top1, "saved_us", t->saved,
		    "saved_error_us", t->error, "chosen", t->chosen, "eval", t->id));
		if (t->chosen)
			json_array_append_new(rules, json_string(t->rule));
	}
	all = json_pack("{s:o}", "trials", list);
	if (budget(s) >= 0)
		json_object_set_new(all, "policy", json_pack("{s:s,s:o,s:O?}", "name", policy_name(s), "rules", rules, "eval", s->whole));
	else
		json_decref(rules);
	return all;
}

/* ---- a picture of it ---- */

#define CELL_W 44
#define CELL_H 18
#define LEFT 120
#define TOP 46

static void
svg_cell(FILE *f, int x, int y, const struct trial *t, double min, double max)
{
	double heat = max > min && t->kl > 0 ? (log(t->kl) - log(min)) / (log(max) - log(min)) : 0;
	int level = (int)(heat * 200);

	fprintf(f, "<rect x='%d' y='%d' width='%d' height='%d' fill='rgb(255,%d,%d)' stroke='#888'/>\n", x, y, CELL_W, CELL_H,
	    245 - level, 235 - level);
	fprintf(f, "<text x='%d' y='%d' font-size='9' text-anchor='middle'%s>%.1e</text>\n", x + CELL_W / 2, y + 13,
	    t->chosen ? " font-weight='bold' text-decoration='underline'" : "", t->kl);
}

static void
svg_curve(FILE *f, const struct sweep *s, int top, int width)
{
	double kl = 0, saved = 0, all_kl = 0, all_saved = 0;

	for (size_t i = 0; i < s->n; i++)
		if (s->t[i].saved >= LEAST_SAVED)
			all_kl += s->t[i].kl, all_saved += s->t[i].saved;
	fprintf(f, "<text x='10' y='%d' font-size='13'>KL summed over time saved per decode step, cheapest first</text>\n", top);
	fprintf(f, "<path fill='none' stroke='#000' d='M %d %d V %d H %d'/>\n", LEFT, top + 14, top + 174, width - 20);
	fprintf(f, "<path fill='none' stroke='#b00' stroke-width='2' d='M %d %d", LEFT, top + 174);
	for (size_t i = s->n; i-- > 0;) {
		if (s->t[i].saved < LEAST_SAVED)
			continue;
		kl += s->t[i].kl, saved += s->t[i].saved;
		fprintf(f, " L %.1f %.1f", LEFT + (width - 20 - LEFT) * saved / all_saved, top + 174 - (all_kl > 0 ? 160 * kl / all_kl : 0));
	}
	fprintf(f, "'/>\n<text x='%d' y='%d' font-size='11' text-anchor='end'>%.1f us saved</text>\n", width - 20, top + 190, all_saved);
	fprintf(f, "<text x='%d' y='%d' font-size='11' text-anchor='end'>KL %.2e</text>\n", LEFT - 6, top + 22, all_kl);
}

static int
write_svg(const struct sweep *s, struct err *err)
{
	bool by_site = s->o->by != NULL && strcmp(s->o->by, "site") == 0;
	int rows = by_site ? (int)s->layers : (int)s->n, cols = by_site ? (int)s->n_groups : 1, width, height, rc = 0;
	double min = INFINITY, max = 0;
	FILE *f = fopen(s->o->svg, "we");

	if (f == NULL)
		return err_set(err, -errno, "%s: %s", s->o->svg, strerror(errno));
	for (size_t i = 0; i < s->n; i++) {
		min = s->t[i].kl > 0 && s->t[i].kl < min ? s->t[i].kl : min;
		max = s->t[i].kl > max ? s->t[i].kl : max;
	}
	width = LEFT + cols * CELL_W + 20 < 520 ? 520 : LEFT + cols * CELL_W + 20;
	height = TOP + rows * CELL_H + 240;
	fprintf(f, "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' font-family='sans-serif'>\n"
	    "<rect width='100%%' height='100%%' fill='#fff'/>\n<text x='10' y='18' font-size='13'>KL of each %s flipped alone to %s; "
	    "chosen ones are underlined</text>\n", width, height, by_site ? "site" : s->o->by != NULL ? s->o->by : "group",
	    s->o->format != NULL ? s->o->format : "fp8");
	for (unsigned g = 0; by_site && g < s->n_groups; g++)
		fprintf(f, "<text x='%d' y='38' font-size='9' text-anchor='middle'>%.9s</text>\n", LEFT + (int)g * CELL_W + CELL_W / 2,
		    strchr(s->group[g], '.') != NULL ? strchr(s->group[g], '.') + 1 : s->group[g]);
	for (int l = 0; by_site && l < rows; l++)
		fprintf(f, "<text x='%d' y='%d' font-size='10' text-anchor='end'>layer %d</text>\n", LEFT - 8, TOP + l * CELL_H + 13, l);
	for (size_t i = 0; i < s->n; i++) {
		const struct trial *t = &s->t[i];
		int x = LEFT, y = TOP + (int)i * CELL_H;

		if (by_site) {
			unsigned g = 0;

			while (g < s->n_groups && strcmp(s->group[g], t->group) != 0)
				g++;
			x = LEFT + (int)g * CELL_W, y = TOP + (t->layer > 0 ? t->layer : 0) * CELL_H;
		} else
			fprintf(f, "<text x='%d' y='%d' font-size='10' text-anchor='end'>%s</text>\n", LEFT - 8, y + 13, t->selector);
		svg_cell(f, x, y, t, min, max);
	}
	svg_curve(f, s, TOP + rows * CELL_H + 34, width);
	fprintf(f, "</svg>\n");
	if (ferror(f) || fclose(f) != 0)
		rc = err_set(err, -errno, "%s: %s", s->o->svg, strerror(errno));
	return rc;
}

int
cmd_sweep(const struct options *o, char **args, int n)
{
	struct sweep s = {.o = o};
	struct err err = {""};
	char what[128];
	int rc;

	(void)args, (void)n;
	if (o->n_files == 0)
		rc = no_files("sweep", &err);
	else if ((rc = open_ctl(o, &s.ctl, &err)) == 0)
		rc = list_trials(&s, &err);
	for (size_t i = 0; i < s.n && rc == 0; i++) {
		json_t *r = NULL;

		snprintf(what, sizeof(what), "%zu/%zu %s", i + 1, s.n, s.t[i].selector);
		rc = measure(o, s.ctl, s.t[i].rule, what, true, &r, &err);
		if (rc == 0)
			rc = read_trial(&s.t[i], r, &err);
		json_decref(r);
	}
	if (rc == 0) {
		qsort(s.t, s.n, sizeof(*s.t), by_price);
		if (budget(&s) >= 0)
			rc = choose(&s, &err);
	}
	if (rc == 0 && o->svg != NULL)
		rc = write_svg(&s, &err);
	if (rc == 0 && o->json) {
		json_t *j = sweep_json(&s);

		json_dumpf(j, stdout, JSON_INDENT(1));
		printf("\n");
		json_decref(j);
	} else if (rc == 0) {
		print_sweep(&s);
		print_policy(&s);
	} else if (rc == -EINTR)
		err_set(&err, rc, "interrupted; the same command goes on from there");
	json_decref(s.whole);
	ctl_close(&s.ctl);
	free(s.t);
	return rc != 0 ? complain(&err) : fflush(stdout) != 0;
}

/* ---- rollout ---- */

static void
print_sides(const json_t *r)
{
	const json_t *g = json_object_get(r, "guard"), *b = json_object_get(r, "baseline"), *c = json_object_get(r, "candidate"),
	             *s = json_object_get(r, "shadow");

	printf("rollout of %s: %g %% by %s, epoch %lld\n", str(r, "policy"), real(r, "percent"), str(r, "by"), (long long)num(r, "epoch"));
	printf("%-16s %12s %12s\n", "", "active", "candidate");
	printf("%-16s %12lld %12lld\n", "requests", (long long)num(b, "requests"), (long long)num(c, "requests"));
	printf("%-16s %12lld %12lld\n", "tokens", (long long)num(b, "tokens"), (long long)num(c, "tokens"));
	printf("%-16s %12lld %12lld\n", "failed", (long long)num(b, "failed"), (long long)num(c, "failed"));
	printf("%-16s %12.2f %12.2f  ms p50\n", "first token", real(b, "ttft_ms_p50"), real(c, "ttft_ms_p50"));
	printf("%-16s %12.2f %12.2f  ms p99\n", "", real(b, "ttft_ms_p99"), real(c, "ttft_ms_p99"));
	printf("%-16s %12.2f %12.2f  ms p50\n", "each token", real(b, "token_ms_p50"), real(c, "token_ms_p50"));
	printf("%-16s %12.2f %12.2f  ms p99\n", "", real(b, "token_ms_p99"), real(c, "token_ms_p99"));
	if (json_is_object(s))
		printf("shadow: KL %.6f, top-1 %.2f %% over %lld requests\n", real(s, "kl"), 100 * real(s, "agree"),
		    (long long)num(s, "requests"));
	if (real(g, "kl") > 0 || real(g, "agree") > 0 || real(g, "p99_ms") > 0)
		printf("guard: KL %g, agreement %g, p99 %+g %% (0: none)\n", real(g, "kl"), real(g, "agree"), 100 * real(g, "p99_ms"));
}

int
cmd_rollout(const struct options *o, char **args, int n)
{
	const char *op = n > 0 ? args[0] : "status";
	bool takes = strcmp(op, "start") == 0 || strcmp(op, "percent") == 0;
	json_t *request = json_pack("{s:s,s:s}", "verb", "rollout", "op", op), *reply = NULL;
	struct ctl *ctl = NULL;
	struct err err = {""};
	int rc = 0;

	if (n > 0 && n != 1 + takes)
		rc = err_set(&err, -EINVAL, "rollout: start POLICY --percent P, percent P, promote, abort or status");
	if (rc == 0 && takes)
		json_object_set_new(request, strcmp(op, "start") == 0 ? "policy" : "percent", json_string(args[1]));
	if (o->percent != NULL)
		json_object_set_new(request, "percent", json_string(o->percent));
	if (o->by != NULL)
		json_object_set_new(request, "by", json_string(o->by));
	if (o->guard != NULL)
		json_object_set_new(request, "guard", json_string(o->guard));
	if (rc == 0 && (rc = open_ctl(o, &ctl, &err)) == 0)
		rc = ask(ctl, json_incref(request), &reply, &err);
	json_decref(request);
	if (rc == 0 && o->json) {
		json_dumpf(json_object_get(reply, "rollout"), stdout, JSON_INDENT(1) | JSON_ENCODE_ANY);
		printf("\n");
	} else if (rc == 0 && json_is_object(json_object_get(reply, "rollout")))
		print_sides(json_object_get(reply, "rollout"));
	else if (rc == 0)
		printf("there is no rollout\n");
	json_decref(reply);
	ctl_close(&ctl);
	return rc != 0 ? complain(&err) : fflush(stdout) != 0;
}
