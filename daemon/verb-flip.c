/* SPDX-License-Identifier: Apache-2.0 */
/* The verbs that change the plan: set, use, rollback. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/control.h"
#include "daemon/octetd.h"

#define MAX_RULES 4096u
#define MAX_CONFIRM_S 86400u

static void
on_done(void *arg, int rc, const struct err *err, const struct flip_result *r)
{
	struct call *call = arg;
	char hex[17];
	json_t *j;

	if (rc != 0) {
		call_refuse(call, rc, err->text);
		return;
	}
	snprintf(hex, sizeof(hex), "%016" PRIx64, r->plan_digest);
	j = json_pack("{s:I,s:b,s:b,s:i,s:o,s:I,s:o,s:s}", "epoch", (json_int_t)r->epoch, "changed", r->changed, "dry_run",
	    r->dry_run, "sites", (int)r->sites, "change", json_lossy(r->change), "step", (json_int_t)r->step, "policy",
	    json_lossy(r->policy), "plan_digest", hex);
	if (r->unjournaled)
		json_object_set_new(j, "unjournaled", json_true());
	call_reply(call, j);
}

static bool
get_number(const json_t *request, const char *key, uint64_t *out)
{
	const json_t *n = json_object_get(request, key);

	*out = n != NULL ? (uint64_t)json_integer_value(n) : 0;
	return n != NULL;
}

/* What all three have in common. */
static struct flip_ask
ask_for(struct call *call, enum flip_kind kind, const json_t *request)
{
	struct flip_ask ask = {.kind = kind};
	const struct peer *p = call_peer(call);
	const char *why = json_string_value(json_object_get(request, "why"));
	uint64_t confirm;

	ask.who.uid = p->uid;
	ask.who.pid = (uint32_t)p->pid;
	snprintf(ask.who.program, sizeof(ask.who.program), "%s", p->program);
	if (why != NULL && *why != '\0')
		snprintf(ask.why, sizeof(ask.why), "%s: %s", json_string_value(json_object_get(request, "verb")), why);
	ask.dry_run = json_is_true(json_object_get(request, "dry_run"));
	ask.has_if_epoch = get_number(request, "if_epoch", &ask.if_epoch);
	get_number(request, "confirm", &confirm);
	ask.confirm_s = confirm > MAX_CONFIRM_S ? MAX_CONFIRM_S : (uint32_t)confirm;
	return ask;
}

/* "SELECTOR=FORMAT", or the shape in which the verb plan gives rules. */
static char *
rule_text(const json_t *rule)
{
	const char *selector = json_string_value(json_object_get(rule, "selector"));
	const char *format = json_string_value(json_object_get(rule, "format"));
	char *text;

	if (json_is_string(rule))
		return strdup(json_string_value(rule));
	if (selector == NULL || format == NULL || asprintf(&text, "%s=%s", selector, format) < 0)
		return NULL;
	return text;
}

static int
exec_set(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	struct flip_ask ask = ask_for(call, FLIP_SET, request);
	const json_t *rules = json_object_get(request, "rules");
	size_t n = json_array_size(rules);

	(void)reply;
	if (n == 0 || n > MAX_RULES)
		return err_set(err, -EINVAL, "set: 'rules' must have 1 to %u rules", MAX_RULES);
	ask.rule = calloc(n, sizeof(*ask.rule));
	if (ask.rule == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (ask.n_rules = 0; ask.n_rules < n; ask.n_rules++) {
		ask.rule[ask.n_rules] = rule_text(json_array_get(rules, ask.n_rules));
		if (ask.rule[ask.n_rules] == NULL) {
			flip_rules_free(&ask.rule, ask.n_rules);
			return err_set(err, -EINVAL, "set: a rule is a string SELECTOR=FORMAT");
		}
	}
	flip_ask(d->flips, &ask, on_done, call);
	return VERB_LATER;
}

static int
exec_use(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	struct flip_ask ask = ask_for(call, FLIP_USE, request);
	const char *name = json_string_value(json_object_get(request, "policy"));

	(void)reply;
	if (strlen(name) >= sizeof(ask.policy))
		return err_set(err, -EINVAL, "policy '%.60s...' is not defined", name);
	strcpy(ask.policy, name);
	flip_ask(d->flips, &ask, on_done, call);
	return VERB_LATER;
}

static int
exec_rollback(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	struct flip_ask ask = ask_for(call, FLIP_ROLLBACK, request);

	(void)reply, (void)err;
	ask.has_to = get_number(request, "to", &ask.to);
	flip_ask(d->flips, &ask, on_done, call);
	return VERB_LATER;
}

static int
exec_confirm(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	struct flip_ask ask = ask_for(call, FLIP_CONFIRM, request);

	(void)reply, (void)err;
	ask.has_to = get_number(request, "epoch", &ask.to);
	flip_ask(d->flips, &ask, on_done, call);
	return VERB_LATER;
}

#define COMMON {"dry_run", FIELD_BOOL, false}, {"if_epoch", FIELD_NUMBER, false}, {"why", FIELD_STRING, false}

const struct verb verb_set = {"set", true, {{"rules", FIELD_ARRAY, true}, {"confirm", FIELD_NUMBER, false}, COMMON},
    exec_set};
const struct verb verb_use = {"use", true, {{"policy", FIELD_STRING, true}, {"confirm", FIELD_NUMBER, false}, COMMON},
    exec_use};
const struct verb verb_rollback = {"rollback", true, {{"to", FIELD_NUMBER, false}, COMMON}, exec_rollback};
const struct verb verb_confirm = {"confirm", true, {{"epoch", FIELD_NUMBER, false}}, exec_confirm};
