/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/octetd.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "daemon/listen.h"

int64_t
octetd_now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

void
octetd_engine_config(const struct octetd *d, const struct conf *c, struct engine_config *out)
{
	*out = (struct engine_config){
		.threads = d->team != NULL ? team_size(d->team) : (uint32_t)c->threads,
		.spin_us = (uint32_t)c->spin_us,
		.kv_bytes = c->kv_cache_bytes,
		.max_batch_tokens = (uint32_t)c->max_batch_tokens,
		.max_batch = (uint32_t)c->max_batch,
		.max_queue = (uint32_t)c->max_queue,
		.step_target_ms = (uint32_t)c->step_target_ms,
		.pin = c->on_flip == CONF_ON_FLIP_PIN,
		.prefix_cache = c->prefix_cache != CONF_PREFIX_OFF,
		.evidence_steps = c->evidence_steps,
		.notify = d->notify,
		.notify_arg = (void *)(uintptr_t)d,
	};
}

static int
request_policy(void *arg, const struct peer *peer, const char *name, struct plan **plan, uint64_t *epoch)
{
	const struct octetd *d = arg;

	*plan = NULL;
	if (name == NULL)
		return 0;
	if (!peer_allowed(peer, d->conf->policies_of_requests))
		return -EACCES;
	*epoch = flipper_epoch(d->flips);
	if (conf_policy(d->conf, name) == NULL)
		return -ENOENT;
	return octetd_policy_plan(d->conf, name, d->model->shape.n_layers, plan, NULL);
}

/* One that ran, or one of the policies that only requests use. */
static struct plan *
known_plan(void *arg, uint64_t digest)
{
	const struct octetd *d = arg;
	struct plan *p = journal_plan(d->journal, digest);

	for (size_t i = 0; p == NULL && i < d->conf->n_policies; i++)
		if (octetd_policy_plan(d->conf, d->conf->policies[i].name, d->model->shape.n_layers, &p, NULL) == 0 &&
		    p->digest != digest)
			plan_unref(&p);
	return p;
}

void
octetd_server_config(struct octetd *d, const struct conf *c, struct server_config *out)
{
	*out = (struct server_config){
		.path = c->socket,
		.mode = (unsigned)c->socket_mode,
		.max_clients = (uint32_t)c->max_clients,
		.max_clients_per_uid = c->max_clients_per_uid,
		.max_requests = (uint32_t)c->max_requests,
		.max_requests_per_uid = c->max_requests_per_uid,
		.handshake_timeout_ms = (uint32_t)c->handshake_timeout_ms,
		.spin_us = (uint32_t)c->spin_us,
		.share_prefixes = c->prefix_cache == CONF_PREFIX_ALL,
		.policy = request_policy,
		.plan = known_plan,
		.arg = d,
	};
}

int
octetd_conf_check(const struct conf *c, struct err *err)
{
	const char *const list[][2] = {{"operators", c->operators}, {"viewers", c->viewers},
	    {"request_policies", c->policies_of_requests}};
	int rc = 0;

	for (size_t i = 0; i < sizeof(list) / sizeof(*list) && rc == 0; i++)
		if ((rc = peer_list_check(list[i][1], err)) != 0)
			err_prefix(err, "%s: %s", c->file, list[i][0]);
	if (rc == 0 && c->backend == CONF_BACKEND_CUDA)
		rc = err_set(err, -ENOTSUP, "%s: backend = cuda: this build has no CUDA backend", c->file);
	return rc;
}

/* Rule by rule, so that an error names its line. */
static int
resolve(const struct conf *c, const struct conf_policy *p, uint32_t n_layers, struct plan **out, struct err *err)
{
	struct plan *plan = NULL;
	int rc = plan_derive(&plan, NULL, n_layers, NULL, 0, err);

	for (size_t i = 0; i < p->n_rules && rc == 0; i++) {
		struct plan_rule rule = {p->rules[i].selector, p->rules[i].format, 0};
		struct plan *next = NULL;

		rc = plan_derive(&next, plan, n_layers, &rule, 1, err);
		if (rc != 0) {
			err_prefix(err, "%s:%d: policy '%s'", c->file, p->rules[i].line, p->name);
			break;
		}
		plan_unref(&plan);
		plan = next;
	}
	if (rc != 0)
		plan_unref(&plan);
	*out = plan;
	return rc;
}

int
octetd_policy_plan(const struct conf *c, const char *name, uint32_t n_layers, struct plan **out, struct err *err)
{
	const struct conf_policy *p = conf_policy(c, name);

	*out = NULL;
	if (p == NULL)
		return err_set(err, -ENOENT, "policy '%s' is not defined", name);
	return resolve(c, p, n_layers, out, err);
}

int
octetd_policies_check(const struct conf *c, uint32_t n_layers, struct plan **active, struct err *err)
{
	int rc;

	*active = NULL;
	for (size_t i = 0; i < c->n_policies; i++) {
		struct plan *plan;

		rc = resolve(c, &c->policies[i], n_layers, &plan, err);
		plan_unref(&plan);
		if (rc != 0)
			return rc;
	}
	rc = octetd_policy_plan(c, c->policy, n_layers, active, err);
	if (rc != 0)
		err_prefix(err, "%s: [precision]", c->file);
	return rc;
}
