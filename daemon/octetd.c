/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/octetd.h"

#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdlib.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "daemon/listen.h"
#include "daemon/log.h"
#include "daemon/rollout.h"
#include "daemon/shadow.h"
#include "daemon/status.h"

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
		.device = d->device,
		.device_options = &d->device_options,
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

/* [clients]; NULL: it follows the active plan. */
static const char *
client_policy(const struct octetd *d, const struct peer *peer)
{
	const char *name = NULL;

	for (size_t i = 0; name == NULL && i < d->conf->n_clients; i++)
		if (peer_matches(peer, d->conf->clients[i].who))
			name = d->conf->clients[i].policy;
	return name;
}

static const char *
shown_policy(void *arg, const struct peer *peer, bool *candidate)
{
	const struct octetd *d = arg;
	const char *name = client_policy(d, peer);

	*candidate = name == NULL && (name = rollout_of_client(d->rollout, peer)) != NULL;
	return name;
}

static int
request_policy(void *arg, const struct peer *peer, const char *name, uint64_t request, struct plan **plan, uint64_t *epoch,
    bool *rollout)
{
	const struct octetd *d = arg;

	*plan = NULL;
	if (name != NULL && !peer_allowed(peer, d->conf->policies_of_requests))
		return -EACCES;
	if (name == NULL)
		name = client_policy(d, peer);
	if (name == NULL) {
		*plan = rollout_choose(d->rollout, peer, request, epoch);
		*rollout = *plan != NULL;
		return 0;
	}
	*epoch = flipper_epoch(d->flips);
	if (conf_policy(d->conf, name) == NULL)
		return -ENOENT;
	return octetd_policy_plan(d->conf, name, d->model->shape.n_layers, plan, NULL);
}

static void
request_finished(void *arg, const struct request *r)
{
	const struct octetd *d = arg;

	rollout_take(d->rollout, r);
	shadow_take(d->shadow, r);
	status_take(d->status, r);
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
		.client_policy = shown_policy,
		.finished = request_finished,
		.plan = known_plan,
		.reap = d->reap,
		.awake = &d->awake,
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
			err_prefix(err, "%s:%d: policy '%s'", p->saved ? c->policies_file : c->file, p->rules[i].line, p->name);
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
	for (size_t i = 0; i < c->n_clients; i++)
		if (conf_policy(c, c->clients[i].policy) == NULL)
			return err_set(err, -EINVAL, "%s:%d: policy '%s' is not defined", c->file, c->clients[i].line,
			    c->clients[i].policy);
	if (conf_policy(c, c->shadow_baseline) == NULL)
		return err_set(err, -EINVAL, "%s: [shadow] baseline: policy '%s' is not defined", c->file, c->shadow_baseline);
	if (*c->surge_policy != '\0' && conf_policy(c, c->surge_policy) == NULL)
		return err_set(err, -EINVAL, "%s: [surge] policy '%s' is not defined", c->file, c->surge_policy);
	rc = octetd_policy_plan(c, c->policy, n_layers, active, err);
	if (rc != 0)
		err_prefix(err, "%s: [precision]", c->file);
	return rc;
}

int
octetd_clients_resolve(struct conf *c, struct err *err)
{
	for (size_t i = 0; i < c->n_clients; i++) {
		struct conf_client *cl = &c->clients[i];
		const struct passwd *pw = strncmp(cl->who, "user:", 5) == 0 ? getpwnam(cl->who + 5) : NULL;
		const struct group *gr = strncmp(cl->who, "group:", 6) == 0 ? getgrnam(cl->who + 6) : NULL;
		char *id = NULL;
		int rc = peer_list_check(cl->who, err);

		if (rc != 0) {
			err_prefix(err, "%s:%d", c->file, cl->line);
			return rc;
		}
		if (pw == NULL && gr == NULL)
			continue;
		if ((pw != NULL ? asprintf(&id, "uid:%u", pw->pw_uid) : asprintf(&id, "gid:%u", gr->gr_gid)) < 0)
			return err_set(err, -ENOMEM, "out of memory");
		free(cl->who);
		cl->who = id;
	}
	return 0;
}

void
octetd_keep_policies(const struct octetd *d)
{
	for (size_t i = 0; i < d->conf->n_policies; i++) {
		struct plan *p = NULL;

		if (octetd_policy_plan(d->conf, d->conf->policies[i].name, d->model->shape.n_layers, &p, NULL) == 0)
			journal_keep(d->journal, p);
		plan_unref(&p);
	}
}

void
octetd_notify(const char *state)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	const char *path = getenv("NOTIFY_SOCKET");
	size_t n = path != NULL ? strlen(path) : 0;
	int fd;

	if (n == 0 || n >= sizeof(sa.sun_path) || (*path != '/' && *path != '@'))
		return;
	memcpy(sa.sun_path, path, n);
	if (*path == '@')
		sa.sun_path[0] = '\0';
	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return;
	if (sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&sa,
	    (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n)) < 0)
		log_warn("notify", "why=%s", LOG_Q(strerror(errno)));
	close(fd);
}
