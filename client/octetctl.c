/* SPDX-License-Identifier: Apache-2.0 */
/* octetctl: the operator's command line over the control socket. */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/ctl-cmd.h"

#define DRAIN_POLL_MS 50

/* One verb: how the command line becomes a request, how its reply is shown. */
struct verb {
	const char *name, *args, *help;
	const char *options;   /* letters of the options it takes, see parse() */
	int min_args, max_args; /* max -1: any */
	const char *list;      /* --json prints this member of the reply alone */
	void (*show)(const json_t *reply, const struct options *);
	int (*run)(const struct options *, char **args, int n); /* in place of one request */
	bool looks;            /* changes nothing, whatever its arguments */
};

const char *
str(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));

	return s == NULL ? "" : s;
}

static const char *
str_or(const json_t *o, const char *key, const char *empty)
{
	const char *s = str(o, key);

	return *s == '\0' ? empty : s;
}

json_int_t
num(const json_t *o, const char *key)
{
	return json_integer_value(json_object_get(o, key));
}

double
real(const json_t *o, const char *key)
{
	const json_t *v = json_object_get(o, key);

	return json_is_number(v) ? json_number_value(v) : NAN;
}

int
complain(const struct err *err)
{
	fprintf(stderr, "octetctl: %s\n", err->text);
	return 1;
}

static const char *
bytes_text(json_int_t n, char buf[32])
{
	static const char *unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
	double v = (double)n;
	int u = 0;

	while (v >= 1024 && u < 4) {
		v /= 1024;
		u++;
	}
	snprintf(buf, 32, u == 0 ? "%.0f %s" : "%.1f %s", v, unit[u]);
	return buf;
}

/* "0-3 fp8, 4-5 bf16", or just "fp8" when all layers agree. */
static void
print_runs(const json_t *formats)
{
	size_t n = json_array_size(formats), from = 0;

	for (size_t i = 1; i <= n; i++) {
		const char *f = json_string_value(json_array_get(formats, from));

		if (i < n && json_equal(json_array_get(formats, i), json_array_get(formats, from)))
			continue;
		if (from == 0 && i == n)
			printf("%s", f != NULL ? f : "-");
		else if (i - from == 1)
			printf("%s%zu %s", from > 0 ? ", " : "", from, f != NULL ? f : "-");
		else
			printf("%s%zu-%zu %s", from > 0 ? ", " : "", from, i - 1, f != NULL ? f : "-");
		from = i;
	}
}

static void
show_status(const json_t *r, const struct options *o)
{
	const json_t *groups = json_object_get(r, "groups"), *kv = json_object_get(r, "kv"), *g,
	    *waits = json_object_get(r, "unconfirmed");
	const json_t *req = json_object_get(r, "requests"), *tok = json_object_get(r, "tokens");
	const json_t *ms = json_object_get(r, "step_ms");
	json_int_t up = num(r, "uptime_s");
	char a[32], b[32];
	size_t i;

	(void)o;
	printf("octetd %s, pid %" JSON_INTEGER_FORMAT ", up %" JSON_INTEGER_FORMAT ":%02d:%02d, backend %s (%s)\n",
	    str(r, "version"), num(r, "pid"), up / 3600, (int)(up / 60 % 60), (int)(up % 60), str(r, "backend"),
	    str(r, "cpu_level"));
	printf("model     %s, weights %s\n", str(r, "model"), bytes_text(num(r, "weights_bytes"), a));
	printf("policy    %s, epoch %" JSON_INTEGER_FORMAT ", plan %s\n", str(r, "policy"), num(r, "epoch"),
	    str(r, "plan_digest"));
	printf("requests  %" JSON_INTEGER_FORMAT " running, %" JSON_INTEGER_FORMAT " queued, %" JSON_INTEGER_FORMAT
	       " done, %" JSON_INTEGER_FORMAT " failed\n", num(req, "running"), num(req, "queued"), num(req, "done"),
	    num(req, "failed"));
	printf("tokens    %" JSON_INTEGER_FORMAT " prompt, %" JSON_INTEGER_FORMAT " output\n", num(tok, "prompt"),
	    num(tok, "output"));
	printf("step      %.2f ms p50, %.2f p90, %.2f p99, %.2f max\n",
	    json_number_value(json_object_get(ms, "p50")), json_number_value(json_object_get(ms, "p90")),
	    json_number_value(json_object_get(ms, "p99")), json_number_value(json_object_get(ms, "max")));
	printf("kv        %" JSON_INTEGER_FORMAT " of %" JSON_INTEGER_FORMAT " pages used, %" JSON_INTEGER_FORMAT
	       " cached; room for %" JSON_INTEGER_FORMAT " tokens, %s\n", num(kv, "pages_used"), num(kv, "pages_total"),
	    num(kv, "pages_cached"), num(kv, "capacity_tokens"), bytes_text(num(kv, "bytes"), b));
	if (json_is_object(waits))
		printf("waiting   epoch %" JSON_INTEGER_FORMAT " is taken back in %" JSON_INTEGER_FORMAT
		       " s unless it is confirmed\n", num(waits, "epoch"), num(waits, "seconds_left"));
	if (json_is_object(json_object_get(r, "rollout")))
		printf("rollout   %s for %g %% of the requests; see octetctl rollout\n", str(json_object_get(r, "rollout"), "policy"),
		    real(json_object_get(r, "rollout"), "percent"));
	if (num(json_object_get(r, "shadow"), "scored") > 0)
		printf("shadow    %" JSON_INTEGER_FORMAT " requests scored against %s, %.1f s of the engine's time\n",
		    num(json_object_get(r, "shadow"), "scored"), str(json_object_get(r, "shadow"), "baseline"),
		    real(json_object_get(r, "shadow"), "seconds"));
	if (json_is_object(json_object_get(json_object_get(r, "shadow"), "active"))) {
		const json_t *seen = json_object_get(json_object_get(r, "shadow"), "active");

		printf("          active plan: KL %.6f, top-1 %.2f %% over %" JSON_INTEGER_FORMAT " tokens\n", real(seen, "kl"),
		    100 * real(seen, "agree"), num(seen, "tokens"));
	}
	if (*str(json_object_get(r, "surge"), "policy") != '\0')
		printf("surge     %s: %s\n", str(json_object_get(r, "surge"), "policy"), str(json_object_get(r, "surge"), "state"));
	if (json_is_true(json_object_get(r, "draining")))
		printf("draining  no new requests are taken\n");
	printf("\n");
	json_array_foreach((json_t *)(uintptr_t)groups, i, g) {
		const json_t *w = json_object_get(g, "wanted"), *e = json_object_get(g, "executed");

		printf("%-20s ", str(g, "name"));
		print_runs(w);
		if (!json_equal(w, e)) {
			printf("  (executed: ");
			print_runs(e);
			printf(")");
		}
		printf("\n");
	}
}

static void
show_plan(const json_t *r, const struct options *o)
{
	const json_t *rules = json_object_get(r, "rules"), *rule;
	size_t i;

	if (o->ini) {
		printf("%s", str(r, "ini"));
		return;
	}
	printf("policy %s, epoch %" JSON_INTEGER_FORMAT ", plan %s\n", str(r, "policy"), num(r, "epoch"),
	    str(r, "plan_digest"));
	json_array_foreach((json_t *)(uintptr_t)rules, i, rule)
		printf("%-28s = %s\n", str(rule, "selector"), str(rule, "format"));
}

static void
show_flip(const json_t *r, const struct options *o)
{
	json_int_t sites = num(r, "sites");

	if (!json_is_true(json_object_get(r, "changed")) && sites == 0)
		printf("no change: epoch %" JSON_INTEGER_FORMAT " has that plan already\n", num(r, "epoch"));
	else if (o->dry_run)
		printf("would change %" JSON_INTEGER_FORMAT " site%s: %s\n", sites, sites == 1 ? "" : "s", str(r, "change"));
	else
		printf("epoch %" JSON_INTEGER_FORMAT ": %" JSON_INTEGER_FORMAT " site%s from step %" JSON_INTEGER_FORMAT
		       ": %s%s\n", num(r, "epoch"), sites, sites == 1 ? "" : "s", num(r, "step"), str(r, "change"),
		    json_is_true(json_object_get(r, "unjournaled")) ? " (not journaled yet)" : "");
}

static void
show_history(const json_t *r, const struct options *o)
{
	const json_t *list = json_object_get(r, "history"), *h;
	size_t i;

	(void)o;
	printf("%-6s %-20s %-6s %-16s %-9s %s\n", "epoch", "time", "uid", "program", "why", "result, change");
	json_array_foreach((json_t *)(uintptr_t)list, i, h) {
		/* "rollback: the operator's words": the verb in its column, the words at the end. */
		const char *why = str(h, "why"), *words = strstr(why, ": ");

		printf("%-6" JSON_INTEGER_FORMAT " %-19.19sZ %-6" JSON_INTEGER_FORMAT " %-16.16s %-9.*s %s%s%s%s%s%s\n",
		    num(h, "epoch"), str(h, "time"), num(h, "uid"), str(h, "program"),
		    words != NULL ? (int)(words - why) : (int)strlen(why), why, str(h, "result"),
		    *str(h, "change") != '\0' ? ": " : "", str(h, "change"), words != NULL ? " (" : "",
		    words != NULL ? words + 2 : "", words != NULL ? ")" : "");
	}
}

static void
show_reload(const json_t *r, const struct options *o)
{
	const json_t *list = json_object_get(r, "changes"), *c;
	size_t i;

	(void)o;
	if (json_array_size(list) == 0)
		printf("reloaded, no option changed");
	json_array_foreach((json_t *)(uintptr_t)list, i, c)
		printf("%s%s: %s -> %s%s", i > 0 ? "\n" : "", str(c, "key"), str_or(c, "from", "(none)"), str_or(c, "to", "(none)"),
		    json_is_true(json_object_get(c, "applied")) ? "" : " (needs a restart)");
	printf("\nepoch %" JSON_INTEGER_FORMAT "\n", num(r, "epoch"));
}

static void
show_clients(const json_t *r, const struct options *o)
{
	const json_t *list = json_object_get(r, "clients"), *c;
	size_t i;

	(void)o;
	printf("%-6s %-6s %-8s %-20s %8s %8s %10s %10s  %s\n", "id", "uid", "pid", "program", "running", "queued", "requests",
	    "tokens", "policy");
	json_array_foreach((json_t *)(uintptr_t)list, i, c)
		printf("%-6" JSON_INTEGER_FORMAT " %-6" JSON_INTEGER_FORMAT " %-8" JSON_INTEGER_FORMAT
		       " %-20.20s %8" JSON_INTEGER_FORMAT " %8" JSON_INTEGER_FORMAT " %10" JSON_INTEGER_FORMAT
		       " %10" JSON_INTEGER_FORMAT "  %s%s\n", num(c, "id"), num(c, "uid"), num(c, "pid"), str(c, "program"),
		    num(c, "running"), num(c, "queued"), num(c, "requests"), num(c, "tokens"), str_or(c, "policy", "active"),
		    json_is_true(json_object_get(c, "candidate")) ? " (rollout)" : "");
}

static void
show_confirm(const json_t *r, const struct options *o)
{
	(void)o;
	printf("epoch %" JSON_INTEGER_FORMAT " stays\n", num(r, "epoch"));
}

static void
show_save(const json_t *r, const struct options *o)
{
	(void)o;
	printf("policy %s is in %s; 'octetctl reload' makes it known\n", str(r, "policy"), str(r, "file"));
}

static void
show_drain(const json_t *r, const struct options *o)
{
	(void)o;
	if (json_is_true(json_object_get(r, "draining")))
		printf("no new requests; %" JSON_INTEGER_FORMAT " still run\n", num(r, "in_flight"));
	else
		printf("requests are taken again\n");
}

static const struct verb verbs[] = {
	{"status", "", "what runs, where, in which formats", "", 0, 0, NULL, show_status, NULL, true},
	{"plan", "[--ini]", "the active plan; --ini: as a policy section to paste", "i", 0, 0, NULL, show_plan, NULL, true},
	{"set", "[--dry-run] [--if-epoch N] [--confirm SECONDS] SELECTOR=FORMAT...", "flip sites on top of the active plan",
	    "dec", 1, -1, NULL, show_flip, NULL, false},
	{"use", "[--dry-run] [--if-epoch N] [--confirm SECONDS] POLICY", "make a policy active", "dec", 1, 1, NULL, show_flip, NULL, false},
	{"confirm", "[EPOCH]", "a change made with --confirm is to stay", "", 0, 1, NULL, show_confirm, NULL, false},
	{"rollback", "[--dry-run] [--to EPOCH]", "undo the last change; repeated, walk further back", "dt", 0, 0, NULL,
	    show_flip, NULL, false},
	{"history", "[-n COUNT]", "every change: who, why, what, result", "n", 0, 0, "history", show_history, NULL, true},
	{"reload", "", "read the configuration file again", "", 0, 0, NULL, show_reload, NULL, false},
	{"save", "NAME", "keep the active plan as a policy", "", 1, 1, NULL, show_save, NULL, false},
	{"drain", "[--timeout SECONDS]", "take no new requests; wait for those that run", "s", 0, 0, NULL, show_drain, NULL, false},
	{"resume", "", "take requests again", "", 0, 0, NULL, show_drain, NULL, false},
	{"eval", "--candidate POLICY [--baseline POLICY] (--text FILE | --task FILE)... [--context N] [--exclusive] "
	    "[--stop TEXT] [--save NAME] [--dump-logits FILE]", "measure a plan against another, beside live traffic", "EBFCXNDS", 0, 0,
	    NULL, NULL, cmd_eval, false},
	{"sweep", "[--by group|layer|site] [--format FORMAT] [--baseline POLICY] (--text FILE | --task FILE)... [--context N] "
	    "[--budget-kl X | --budget-ppl PERCENT] [--save NAME] [--svg FILE] [--again]",
	    "measure each flip alone; choose a policy within a budget", "BFCXNSYRKPGA", 0, 0, NULL, NULL, cmd_sweep, false},
	{"evals", "[list [--all] | show ID | compare ID ID | delete ID]", "stored results", "L", 0, 3, NULL, NULL, cmd_evals, false},
	{"rollout", "[start POLICY --percent P [--by client|request] [--guard kl=0.01,agree=0.98,p99_ms=+10%] | percent P | promote | "
	    "abort | status]", "a candidate policy for some of the requests", "QYU", 0, 2, NULL, NULL, cmd_rollout, false},
	{"clients", "", "who is connected", "", 0, 0, "clients", show_clients, NULL, true},
};

static void
usage(FILE *to)
{
	fprintf(to, "usage: octetctl [--json] [--socket PATH] VERB ...\n");
	for (size_t i = 0; i < sizeof(verbs) / sizeof(*verbs); i++) {
		int n = fprintf(to, "  %s %s", verbs[i].name, verbs[i].args);

		fprintf(to, n < 56 ? "%*s%s\n" : "\n%*s%s\n", n < 56 ? 56 - n : 56, "", verbs[i].help);
	}
	fprintf(to, "A selector is GROUP[@LAYERS]: attention.*, mlp.down_proj@0-3,-1, lm_head. See octetctl(1).\n");
}

static int
bad_usage(const char *fmt, const char *what)
{
	fprintf(stderr, "octetctl: ");
	fprintf(stderr, fmt, what);
	fprintf(stderr, "\nTry 'octetctl --help'.\n");
	return 2;
}

static bool
parse_number(const char *s, int64_t *out)
{
	char *end;

	errno = 0;
	*out = strtoll(s, &end, 10);
	return errno == 0 && end != s && *end == '\0' && *out >= 0;
}

enum { OPT_SOCKET = 256, OPT_INI, OPT_DRY, OPT_EPOCH, OPT_TO, OPT_HELP, OPT_VERSION, OPT_JSON, OPT_CONFIRM,
	OPT_TIMEOUT, OPT_CANDIDATE, OPT_BASELINE, OPT_TEXT, OPT_TASK, OPT_CONTEXT, OPT_EXCLUSIVE, OPT_SAVE, OPT_DUMP, OPT_STOP,
	OPT_BY, OPT_FORMAT, OPT_BUDGET_KL, OPT_BUDGET_PPL, OPT_SVG, OPT_AGAIN, OPT_ALL, OPT_PERCENT, OPT_GUARD };

static bool
parse_real(const char *s, double *out)
{
	char *end;

	*out = strtod(s, &end);
	return end != s && *end == '\0' && isfinite(*out) && *out >= 0;
}

static void
add_file(struct options *o, const char *path, bool is_task)
{
	o->file[o->n_files] = path;
	o->is_task[o->n_files++] = is_task;
}

/* Options may stand before or after the verb. Returns -1 to go on, or an exit status. */
static int
parse(int argc, char **argv, struct options *o, char *used, size_t used_len)
{
	static const struct option longs[] = {
		{"json", no_argument, NULL, OPT_JSON}, {"socket", required_argument, NULL, OPT_SOCKET},
		{"ini", no_argument, NULL, OPT_INI}, {"dry-run", no_argument, NULL, OPT_DRY},
		{"if-epoch", required_argument, NULL, OPT_EPOCH}, {"to", required_argument, NULL, OPT_TO},
		{"confirm", required_argument, NULL, OPT_CONFIRM}, {"timeout", required_argument, NULL, OPT_TIMEOUT},
		{"candidate", required_argument, NULL, OPT_CANDIDATE}, {"baseline", required_argument, NULL, OPT_BASELINE},
		{"text", required_argument, NULL, OPT_TEXT}, {"task", required_argument, NULL, OPT_TASK},
		{"context", required_argument, NULL, OPT_CONTEXT}, {"exclusive", no_argument, NULL, OPT_EXCLUSIVE},
		{"save", required_argument, NULL, OPT_SAVE}, {"dump-logits", required_argument, NULL, OPT_DUMP},
		{"stop", required_argument, NULL, OPT_STOP}, {"by", required_argument, NULL, OPT_BY},
		{"format", required_argument, NULL, OPT_FORMAT}, {"budget-kl", required_argument, NULL, OPT_BUDGET_KL},
		{"budget-ppl", required_argument, NULL, OPT_BUDGET_PPL}, {"svg", required_argument, NULL, OPT_SVG},
		{"again", no_argument, NULL, OPT_AGAIN}, {"all", no_argument, NULL, OPT_ALL},
		{"percent", required_argument, NULL, OPT_PERCENT}, {"guard", required_argument, NULL, OPT_GUARD},
		{"help", no_argument, NULL, OPT_HELP}, {"version", no_argument, NULL, OPT_VERSION}, {NULL, 0, NULL, 0}};
	size_t n = 0;
	int c;

	while ((c = getopt_long(argc, argv, "n:h", longs, NULL)) != -1) {
		int64_t *number = NULL;
		double *share = NULL;
		char letter = 0;

		switch (c) {
		case OPT_JSON: o->json = true; break;
		case OPT_SOCKET: o->socket = optarg; break;
		case OPT_INI: o->ini = true; letter = 'i'; break;
		case OPT_DRY: o->dry_run = true; letter = 'd'; break;
		case OPT_EPOCH: number = &o->if_epoch; letter = 'e'; break;
		case OPT_TO: number = &o->to; letter = 't'; break;
		case OPT_CONFIRM: number = &o->confirm; letter = 'c'; break;
		case OPT_TIMEOUT: number = &o->timeout; letter = 's'; break;
		case OPT_CANDIDATE: o->candidate = optarg; letter = 'E'; break;
		case OPT_BASELINE: o->baseline = optarg; letter = 'B'; break;
		case OPT_TEXT:
		case OPT_TASK:
			if (o->n_files == MAX_FILES)
				return bad_usage("'%s': too many files", optarg);
			add_file(o, optarg, c == OPT_TASK);
			letter = 'F';
			break;
		case OPT_CONTEXT: number = &o->context; letter = 'C'; break;
		case OPT_EXCLUSIVE: o->exclusive = true; letter = 'X'; break;
		case OPT_SAVE: o->name = optarg; letter = 'N'; break;
		case OPT_DUMP: o->dump = optarg; letter = 'D'; break;
		case OPT_STOP: o->stop = optarg; letter = 'S'; break;
		case OPT_BY: o->by = optarg; letter = 'Y'; break;
		case OPT_FORMAT: o->format = optarg; letter = 'R'; break;
		case OPT_BUDGET_KL: share = &o->budget_kl; letter = 'K'; break;
		case OPT_BUDGET_PPL: share = &o->budget_ppl; letter = 'P'; break;
		case OPT_SVG: o->svg = optarg; letter = 'G'; break;
		case OPT_AGAIN: o->again = true; letter = 'A'; break;
		case OPT_PERCENT: o->percent = optarg; letter = 'Q'; break;
		case OPT_GUARD: o->guard = optarg; letter = 'U'; break;
		case OPT_ALL: o->all = true; letter = 'L'; break;
		case 'n': number = &o->limit; letter = 'n'; break;
		case 'h':
		case OPT_HELP: usage(stdout); return 0;
		case OPT_VERSION: printf("octetctl %s\n", OCTET_VERSION); return 0;
		default: fprintf(stderr, "Try 'octetctl --help'.\n"); return 2;
		}
		if (number != NULL && !parse_number(optarg, number))
			return bad_usage("'%s' is no number", optarg);
		if (share != NULL && !parse_real(optarg, share))
			return bad_usage("'%s' is no number, not negative", optarg);
		if (letter != 0 && n + 1 < used_len)
			used[n++] = letter;
	}
	used[n] = '\0';
	return -1;
}

static json_t *
make_request(const struct verb *v, const struct options *o, char **args, int n)
{
	json_t *r = json_pack("{s:s}", "verb", v->name);
	int64_t epoch;

	if (strcmp(v->name, "set") == 0) {
		json_t *rules = json_array();

		for (int i = 0; i < n; i++)
			json_array_append_new(rules, json_string(args[i]));
		json_object_set_new(r, "rules", rules);
	} else if (strcmp(v->name, "use") == 0 || strcmp(v->name, "save") == 0)
		json_object_set_new(r, "policy", json_string(args[0]));
	else if (strcmp(v->name, "confirm") == 0 && n == 1 && parse_number(args[0], &epoch))
		json_object_set_new(r, "epoch", json_integer(epoch));
	if (o->confirm >= 0)
		json_object_set_new(r, "confirm", json_integer(o->confirm));
	if (o->dry_run)
		json_object_set_new(r, "dry_run", json_true());
	if (o->if_epoch >= 0)
		json_object_set_new(r, "if_epoch", json_integer(o->if_epoch));
	if (o->to >= 0)
		json_object_set_new(r, "to", json_integer(o->to));
	if (o->limit >= 0)
		json_object_set_new(r, "limit", json_integer(o->limit));
	return r;
}

static int
call(const struct verb *v, const struct options *o, char **args, int n)
{
	json_t *request = make_request(v, o, args, n), *reply = NULL;
	struct ctl *ctl = NULL;
	struct err err;
	int rc = ctl_open(&ctl, o->socket, &err);

	if (rc == 0)
		rc = ctl_call(ctl, request, &reply, CALL_TIMEOUT_MS, &err);
	/* drain, said again until nothing runs. */
	for (int64_t waited = 0; rc == 0 && o->timeout > 0 && num(reply, "in_flight") > 0; waited += DRAIN_POLL_MS) {
		if (waited >= o->timeout * 1000) {
			rc = err_set(&err, -ETIMEDOUT, "%d requests still run", (int)num(reply, "in_flight"));
			break;
		}
		usleep(DRAIN_POLL_MS * 1000);
		json_decref(reply);
		reply = NULL;
		rc = ctl_call(ctl, request, &reply, CALL_TIMEOUT_MS, &err);
	}
	if (rc != 0)
		fprintf(stderr, "octetctl: %s\n", err.text);
	else if (o->json) {
		json_object_del(reply, "ok");
		json_dumpf(v->list != NULL ? json_object_get(reply, v->list) : reply, stdout, JSON_INDENT(1) | JSON_ENCODE_ANY);
		printf("\n");
	} else
		v->show(reply, o);
	json_decref(reply);
	json_decref(request);
	ctl_close(&ctl);
	return rc != 0 || fflush(stdout) != 0;
}

bool
octetctl_verb(size_t i, struct verb_words *out)
{
	if (i >= sizeof(verbs) / sizeof(*verbs))
		return false;
	*out = (struct verb_words){verbs[i].name, verbs[i].args, verbs[i].help, verbs[i].looks};
	return true;
}

int
octetctl_main(int argc, char **argv)
{
	struct options o = {.if_epoch = -1, .to = -1, .limit = -1, .confirm = -1, .timeout = -1, .budget_kl = -1,
	    .budget_ppl = -1};
	const struct verb *v = NULL;
	char used[64];
	int64_t number;
	int rc = parse(argc, argv, &o, used, sizeof(used)), n;

	if (rc >= 0)
		return rc;
	if (optind == argc) {
		usage(stderr);
		return 2;
	}
	for (size_t i = 0; i < sizeof(verbs) / sizeof(*verbs); i++)
		if (strcmp(argv[optind], verbs[i].name) == 0)
			v = &verbs[i];
	if (v == NULL)
		return bad_usage("unknown verb '%s'", argv[optind]);
	n = argc - optind - 1;
	if (n < v->min_args)
		return bad_usage("%s needs an argument", v->name);
	if (v->max_args >= 0 && n > v->max_args)
		return bad_usage("%s: too many arguments", v->name);
	if (used[strspn(used, v->options)] != '\0')
		return bad_usage("%s does not take that option", v->name);
	if (strcmp(v->name, "confirm") == 0 && n == 1 && !parse_number(argv[optind + 1], &number))
		return bad_usage("'%s' is no number", argv[optind + 1]);
	return (v->run != NULL ? v->run(&o, argv + optind + 1, n) : call(v, &o, argv + optind + 1, n));
}
