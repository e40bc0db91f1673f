/* SPDX-License-Identifier: Apache-2.0 */
/* The verbs that look: status, plan, clients, history, page. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon/control.h"
#include "daemon/engine/evidence.h"
#include "daemon/engine/kv.h"
#include "daemon/octetd.h"
#include "daemon/rollout.h"
#include "daemon/shadow.h"
#include "daemon/status.h"

#define HISTORY_MAX 20000u

static json_t *
digest_json(uint64_t digest)
{
	char hex[17];

	snprintf(hex, sizeof(hex), "%016" PRIx64, digest);
	return json_string(hex);
}

static json_t *
number(uint64_t n)
{
	return json_integer((json_int_t)n);
}

static int
whole(json_t **reply, struct err *err)
{
	return *reply != NULL ? 0 : err_set(err, -ENOMEM, "out of memory");
}

/* ---- status ---- */

/* Lists by layer; null where nothing was measured yet. */
static json_t *
evidence_json(struct octetd *d, enum plan_group g, uint32_t n_layers)
{
	json_t *absmax = json_array(), *zero = json_array(), *saturated = json_array();
	struct evidence_site s;

	for (uint32_t l = 0; l < n_layers; l++) {
		engine_evidence(d->engine, g, l, &s);
		json_array_append_new(absmax, s.n > 0 ? json_real(s.absmax) : json_null());
		json_array_append_new(zero, s.n > 0 ? json_real(s.zero) : json_null());
		json_array_append_new(saturated, s.n > 0 ? json_real(s.saturated) : json_null());
	}
	return json_pack("{s:o,s:o,s:o}", "absmax", absmax, "zero", zero, "saturated", saturated);
}

static json_t *
kernel_json(const struct octetd *d, enum plan_group g, uint32_t layer, enum plan_format f)
{
	char name[128];

	device_kernel(d->device, g, layer, f, name, sizeof(name));
	return json_string(name);
}

/* null: the CPU runs the model. Numbers that the driver does not tell are 0. */
static json_t *
device_json(const struct octetd *d)
{
	struct kd_status s;

	if (d->device == NULL)
		return json_null();
	device_status(d->device, &s);
	return json_pack("{s:s,s:s,s:I,s:I,s:i,s:i,s:i,s:i,s:i,s:i,s:I,s:I,s:I,s:f,s:f,s:f,s:s}", "name", s.device, "versions", s.kernels,
	    "memory_used", (json_int_t)s.mem_used, "memory_total", (json_int_t)s.mem_total, "sm_mhz", (int)s.sm_mhz, "memory_mhz",
	    (int)s.mem_mhz, "watts", (int)s.watts, "limit_watts", (int)s.limit_watts, "busy_percent", (int)s.busy_percent, "celsius",
	    (int)s.celsius, "graphs", (json_int_t)s.graphs, "graph_launches", (json_int_t)s.graph_launches, "eager_steps",
	    (json_int_t)s.eager_steps, "host_us", s.host_us, "device_us", s.device_us, "busy_s", s.busy_s,
	    "failure", s.failure);
}

static json_t *
groups_json(struct octetd *d)
{
	const struct plan *plan = flipper_plan(d->flips);
	json_t *groups = json_array();

	for (int g = 0; g < N_GROUPS; g++) {
		json_t *wanted = json_array(), *executed = json_array(), *kernels = json_array(), *o;

		for (uint32_t l = 0; l < (g == GROUP_LM_HEAD ? 1 : plan->n_layers); l++) {
			json_array_append_new(wanted, json_string(plan_format_name(plan_at(plan, g, l))));
			json_array_append_new(executed, json_string(plan_format_name(engine_executed(d->engine, plan, g, l))));
			if (d->device != NULL)
				json_array_append_new(kernels, kernel_json(d, g, l, plan_at(plan, g, l)));
		}
		o = json_pack("{s:s,s:o,s:o,s:o}", "name", plan_group_name(g), "wanted", wanted, "executed", executed, "evidence",
		    evidence_json(d, g, g == GROUP_LM_HEAD ? 1 : plan->n_layers));
		if (d->device != NULL)
			json_object_set(o, "kernels", kernels);
		json_decref(kernels);
		json_array_append_new(groups, o);
	}
	return groups;
}

static int
exec_status(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	struct engine_stats st = {0};
	uint32_t block_pages, left;
	uint64_t epoch;
	json_t *r;

	(void)call, (void)request;
	engine_stats(d->engine, &st);
	r = json_pack("{s:s,s:o,s:s,s:s,s:i,s:I,s:o,s:o,s:o,s:o}", "version", OCTET_VERSION, "model",
	    json_lossy(d->model->name), "backend", d->backend, "cpu_level", d->ops->name, "pid", (int)getpid(), "uptime_s",
	    (json_int_t)((octetd_now_us() - d->started_us) / 1000000), "epoch", number(flipper_epoch(d->flips)), "policy",
	    json_lossy(flipper_policy(d->flips)), "plan_digest", digest_json(flipper_plan(d->flips)->digest), "groups",
	    groups_json(d));
	json_object_set_new(r, "device", device_json(d));
	json_object_set_new(r, "weights_bytes", number(d->model->weights_bytes));
	block_pages = kv_block_pages(flipper_plan(d->flips), d->model->shape.n_layers);
	json_object_set_new(r, "kv", json_pack("{s:i,s:i,s:i,s:i,s:i,s:o,s:o}", "pages_total", (int)st.kv_pages, "pages_used",
	    (int)st.kv_pages_used, "pages_cached", (int)st.kv_pages_cached, "page_tokens", (int)st.kv_page_tokens,
	    "block_pages", (int)block_pages, "capacity_tokens",
	    number((uint64_t)(st.kv_pages / block_pages) * st.kv_page_tokens), "bytes", number(st.kv_bytes)));
	json_object_set_new(r, "prefix_cache", json_pack("{s:o,s:o,s:o}", "hit_tokens", number(st.prefix_hit_tokens),
	    "evictions", number(st.prefix_evictions), "preemptions", number(st.preemptions)));
	json_object_set_new(r, "requests", json_pack("{s:i,s:i,s:o,s:o}", "running", (int)st.running, "queued",
	    (int)st.queued, "done", number(st.done), "failed", number(st.failed)));
	json_object_set_new(r, "tokens", json_pack("{s:o,s:o}", "prompt", number(st.prompt_tokens), "output",
	    number(st.output_tokens)));
	json_object_set_new(r, "step_ms", json_pack("{s:f,s:f,s:f,s:f}", "p50", st.step_ms_p50, "p90", st.step_ms_p90,
	    "p99", st.step_ms_p99, "max", st.step_ms_max));
	json_object_set_new(r, "step", number(st.step));
	json_object_set_new(r, "forward_s", json_real(st.forward_s));
	json_object_set_new(r, "host_s", json_real(st.host_s));
	epoch = flipper_unconfirmed(d->flips, &left);
	json_object_set_new(r, "unconfirmed", epoch == 0 ? json_null() : json_pack("{s:o,s:i}", "epoch", number(epoch),
	    "seconds_left", (int)left));
	json_object_set_new(r, "queue_ms", json_real(st.queue_ms));
	json_object_set_new(r, "measuring", json_integer(d->measuring));
	json_object_set_new(r, "shadow", shadow_json(d->shadow));
	json_object_set_new(r, "rollout", rollout_json(d->rollout));
	json_object_set_new(r, "surge", surge_json(d->rollout));
	json_object_set_new(r, "clients", number(server_clients(d->server, NULL, 0)));
	json_object_set_new(r, "draining", json_boolean(d->draining || d->drained));
	json_object_set_new(r, "journal", json_pack("{s:o,s:i}", "path", json_lossy(d->conf->state_dir), "unjournaled",
	    (int)flipper_unjournaled(d->flips)));
	json_object_set_new(r, "socket", json_lossy(d->conf->socket));
	*reply = r;
	return whole(reply, err);
}

const struct verb verb_status = {"status", false, {{0}}, exec_status};

/* ---- plan ---- */

/* plan_text() as rules; cuts the text up. */
static json_t *
rules_json(char *text)
{
	json_t *rules = json_array();
	char *line;

	while ((line = strsep(&text, "\n")) != NULL) {
		char *equals = strstr(line, " = ");

		if (equals == NULL)
			continue;
		*equals = '\0';
		json_array_append_new(rules, json_pack("{s:s,s:s}", "selector", line, "format", equals + 3));
	}
	return rules;
}

static int
exec_plan(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	const struct plan *plan = flipper_plan(d->flips);
	char *text = plan_text(plan), *ini = NULL;

	(void)call, (void)request;
	if (text == NULL || asprintf(&ini, "[policy live]\n%s", text) < 0) {
		free(text);
		return err_set(err, -ENOMEM, "out of memory");
	}
	*reply = json_pack("{s:o,s:o,s:o,s:o,s:s}", "epoch", number(flipper_epoch(d->flips)), "policy",
	    json_lossy(flipper_policy(d->flips)), "plan_digest", digest_json(plan->digest), "rules", rules_json(text), "ini",
	    ini);
	free(text);
	free(ini);
	return whole(reply, err);
}

const struct verb verb_plan = {"plan", false, {{0}}, exec_plan};

/* ---- clients ---- */

static int
exec_clients(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	uint32_t cap = (uint32_t)d->conf->max_clients + PAGE_CLIENTS, n; /* it may have been lowered while they were here */
	struct page_client *c = calloc(cap, sizeof(*c));
	json_t *list = json_array();

	(void)call, (void)request;
	if (c == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	n = server_clients(d->server, c, cap);
	for (uint32_t i = 0; i < n && i < cap; i++)
		json_array_append_new(list, json_pack("{s:o,s:I,s:I,s:o,s:i,s:i,s:o,s:o,s:o,s:b}", "id", number(c[i].id), "uid",
		    (json_int_t)c[i].uid, "pid", (json_int_t)c[i].pid, "program", json_lossy(c[i].program), "running",
		    (int)c[i].running, "queued", (int)c[i].queued, "requests", number(c[i].requests), "tokens",
		    number(c[i].tokens), "policy", c[i].policy[0] != '\0' ? json_lossy(c[i].policy) : json_null(), "candidate",
		    c[i].candidate != 0));
	free(c);
	*reply = json_pack("{s:o}", "clients", list);
	return whole(reply, err);
}

const struct verb verb_clients = {"clients", false, {{0}}, exec_clients};

/* ---- history ---- */

/* "2026-01-31T12:00:00.123Z" */
static json_t *
time_json(int64_t us)
{
	time_t seconds = us / 1000000;
	char day[32], text[48];
	struct tm tm;

	gmtime_r(&seconds, &tm);
	strftime(day, sizeof(day), "%Y-%m-%dT%H:%M:%S", &tm);
	snprintf(text, sizeof(text), "%s.%03dZ", day, (int)(us / 1000 % 1000));
	return json_string(text);
}

static json_t *
entry_json(const struct journal_entry *e)
{
	json_t *j = json_pack("{s:o,s:o,s:I,s:I,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o}", "epoch", number(e->r.epoch), "time",
	    time_json(e->r.time_us), "uid", (json_int_t)e->r.uid, "pid", (json_int_t)e->r.pid, "program",
	    json_lossy(e->r.program), "why", json_lossy(e->r.why), "change", json_lossy(e->r.change), "result",
	    json_lossy(e->outcome), "step", number(e->r.step), "policy", json_lossy(e->r.policy), "plan_digest",
	    digest_json(e->r.plan), "undoes", number(e->r.undoes), "back_to", number(e->r.back_to));

	if (e->r.unjournaled)
		json_object_set_new(j, "unjournaled", json_true());
	return j;
}

static int
exec_history(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	const json_t *limit = json_object_get(request, "limit");
	uint64_t most = limit != NULL ? (uint64_t)json_integer_value(limit) : HISTORY_MAX;
	struct journal_entry *list = NULL;
	uint32_t n = journal_history(d->journal, &list);
	json_t *out = json_array();

	(void)call;
	if (most > HISTORY_MAX)
		most = HISTORY_MAX;
	for (uint32_t i = n > most ? n - (uint32_t)most : 0; i < n; i++)
		json_array_append_new(out, entry_json(&list[i]));
	free(list);
	*reply = json_pack("{s:o}", "history", out);
	return whole(reply, err);
}

const struct verb verb_history = {"history", false, {{"limit", FIELD_NUMBER, false}}, exec_history};

/* ---- page ---- */

static int
exec_page(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	(void)request;
	*reply = json_pack("{s:i,s:b}", "bytes", (int)sizeof(struct octet_page), "operator", call_is_operator(call));
	if (*reply == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	call_watch(call, status_fd(d->status));
	return 0;
}

const struct verb verb_page = {"page", false, {{0}}, exec_page};
