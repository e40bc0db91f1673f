/* SPDX-License-Identifier: Apache-2.0 */
/* Reload, for the verb and for SIGHUP: the whole file or nothing of it. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/control.h"
#include "daemon/log.h"
#include "daemon/octetd.h"

struct reload {
	struct octetd *d;
	struct conf *next;
	struct conf_change *diff;
	size_t n_diff;
	json_t *changes;
	bool flips; /* the active policy changed in the file */
	reload_done done;
	void *arg;
};

static void
reload_free(struct reload *r)
{
	conf_free(&r->next);
	conf_changes_free(r->diff, r->n_diff);
	json_decref(r->changes);
	free(r);
}

static void
add_change(json_t *list, const char *key, const char *from, const char *to, bool applied)
{
	json_array_append_new(list, json_pack("{s:o,s:o,s:o,s:b}", "key", json_lossy(key), "from", json_lossy(from), "to",
	    json_lossy(to), "applied", applied));
}

/* A policy's definition is not in conf_diff(): told by the digests of its plan. */
static void
policy_text(const struct reload *r, const struct conf *c, const char *name, char out[17])
{
	struct plan *plan = NULL;
	struct err err;

	strcpy(out, "");
	if (conf_policy(c, name) == NULL)
		return;
	if (octetd_policy_plan(c, name, r->d->model->shape.n_layers, &plan, &err) == 0)
		snprintf(out, 17, "%016" PRIx64, plan->digest);
	plan_unref(&plan);
}

static void
add_policy_change(struct reload *r, const char *name)
{
	char key[96], from[17], to[17];

	policy_text(r, r->d->conf, name, from);
	policy_text(r, r->next, name, to);
	snprintf(key, sizeof(key), "policy %.80s", name);
	if (strcmp(from, to) != 0)
		add_change(r->changes, key, from, to, true);
}

static int
list_changes(struct reload *r, struct err *err)
{
	const struct conf *old = r->d->conf, *next = r->next;

	if (conf_diff(old, next, &r->diff, &r->n_diff) != 0 || (r->changes = json_array()) == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (size_t i = 0; i < r->n_diff; i++)
		add_change(r->changes, r->diff[i].key, r->diff[i].from, r->diff[i].to, r->diff[i].live);
	for (size_t i = 0; i < next->n_policies; i++)
		add_policy_change(r, next->policies[i].name);
	for (size_t i = 0; i < old->n_policies; i++)
		if (conf_policy(next, old->policies[i].name) == NULL)
			add_policy_change(r, old->policies[i].name);
	return 0;
}

/* Its turn in the flip queue: everything that can fail happens here. */
static int
prepare(void *arg, struct plan **plan, char policy[64], uint64_t *file_policy, struct err *err)
{
	struct reload *r = arg;
	struct octetd *d = r->d;
	struct plan *active = NULL;
	int rc;

	if ((rc = conf_load(&r->next, d->conf_path, err)) != 0 || (rc = octetd_conf_check(r->next, err)) != 0 ||
	    (rc = octetd_clients_resolve(r->next, err)) != 0 ||
	    (rc = octetd_policies_check(r->next, d->model->shape.n_layers, &active, err)) != 0 ||
	    (rc = list_changes(r, err)) != 0) {
		plan_unref(&active);
		return rc;
	}
	if (conf_keep_restart_only(r->next, d->conf) != 0) {
		plan_unref(&active);
		return err_set(err, -ENOMEM, "out of memory");
	}
	/* Against the file as last loaded: what operators did since then stays,
	 * unless the file has a newer opinion. */
	r->flips = active->digest != flipper_file_policy(d->flips) || strcmp(r->next->policy, d->conf->policy) != 0;
	*file_policy = active->digest;
	snprintf(policy, 64, "%.63s", r->next->policy);
	if (r->flips)
		*plan = active;
	else
		plan_unref(&active);
	return 0;
}

static void
apply(struct reload *r)
{
	struct octetd *d = r->d;
	struct engine_config engine;
	struct server_config server;
	struct conf *old = d->conf;

	d->conf = r->next;
	r->next = NULL;
	octetd_keep_policies(d);
	octetd_engine_config(d, d->conf, &engine);
	octetd_server_config(d, d->conf, &server);
	engine_configure(d->engine, &engine);
	server_configure(d->server, &server);
	team_set_spin(d->team, engine.spin_us);
	log_set_level_name(d->conf->log_level);
	conf_free(&old);
}

static void
tell(const struct reload *r, int rc, const struct err *err, const struct flip_result *result)
{
	size_t i;
	json_t *c;

	if (rc != 0) {
		log_error("reload.failed", "why=%s", LOG_Q(err->text));
		return;
	}
	json_array_foreach(r->changes, i, c)
		log_info("reload.change", "key=%s from=%s to=%s applied=%s",
		    LOG_Q(json_string_value(json_object_get(c, "key"))), LOG_Q(json_string_value(json_object_get(c, "from"))),
		    LOG_Q(json_string_value(json_object_get(c, "to"))),
		    json_is_true(json_object_get(c, "applied")) ? "true" : "\"needs restart\"");
	log_info("reload", "changes=%zu epoch=%" PRIu64 " policy=%s", json_array_size(r->changes), result->epoch,
	    LOG_Q(result->policy));
}

static void
on_done(void *arg, int rc, const struct err *err, const struct flip_result *result)
{
	struct reload *r = arg;

	if (rc == 0)
		apply(r);
	octetd_notify("READY=1");
	tell(r, rc, err, result);
	r->done(r->arg, rc, err, r->changes, result);
	reload_free(r);
}

void
reload_start(struct octetd *d, const struct flip_who *who, reload_done done, void *arg)
{
	struct flip_ask ask = {.kind = FLIP_RELOAD, .who = *who, .prepare = prepare};
	struct reload *r = calloc(1, sizeof(*r));
	struct timespec now;
	char state[64];
	struct err err;

	if (r == NULL) {
		err_set(&err, -ENOMEM, "out of memory");
		done(arg, -ENOMEM, &err, NULL, NULL);
		return;
	}
	r->d = d, r->done = done, r->arg = arg;
	clock_gettime(CLOCK_MONOTONIC, &now);
	snprintf(state, sizeof(state), "RELOADING=1\nMONOTONIC_USEC=%lld",
	    (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000);
	octetd_notify(state);
	ask.prepare_arg = r;
	flip_ask(d->flips, &ask, on_done, r);
}

/* ---- the verb ---- */

static void
on_verb_done(void *arg, int rc, const struct err *err, const json_t *changes, const struct flip_result *result)
{
	struct call *call = arg;
	json_t *list, *c;
	size_t i;

	if (rc != 0) {
		call_refuse(call, rc, err->text);
		return;
	}
	list = json_deep_copy(changes);
	json_array_foreach(list, i, c)
		if (!json_is_true(json_object_get(c, "applied")))
			json_object_set_new(c, "note", json_string("needs restart"));
	call_reply(call, json_pack("{s:o,s:I,s:b,s:i,s:o,s:o}", "changes", list, "epoch", (json_int_t)result->epoch,
	    "changed", result->changed, "sites", (int)result->sites, "change", json_lossy(result->change), "policy",
	    json_lossy(result->policy)));
}

static int
exec_reload(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	const struct peer *p = call_peer(call);
	struct flip_who who = {.uid = p->uid, .pid = (uint32_t)p->pid};

	(void)request, (void)reply, (void)err;
	snprintf(who.program, sizeof(who.program), "%s", p->program);
	reload_start(d, &who, on_verb_done, call);
	return VERB_LATER;
}

const struct verb verb_reload = {"reload", true, {{0}}, exec_reload};
