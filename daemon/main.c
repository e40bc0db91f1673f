/* SPDX-License-Identifier: Apache-2.0 */
/* octetd: start order, signals, stop order. */
#include <dirent.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "client/tok.h"
#include "daemon/bench.h"
#include "daemon/control.h"
#include "daemon/eval.h"
#include "daemon/evals.h"
#include "daemon/log.h"
#include "daemon/octetd.h"
#include "daemon/rollout.h"
#include "daemon/shadow.h"
#include "daemon/status.h"

#define DRAIN_POLL_MS 10u

/* What only main needs; octetd first, so that the loop's handles find both. */
struct daemon {
	struct octetd d;
	uv_async_t reap;
	uv_signal_t sigterm, sigint, sighup;
	uv_timer_t drain;
	uint64_t drain_until; /* loop time */
	struct plan *file_plan; /* of the file's active policy */
	bool reloading, at_once;
	int64_t shown_us;     /* progress was logged */
	int tokenizer_rc;     /* of compile_tokenizer(), and why */
	struct err tokenizer_err;
};

static const char *
human(uint64_t bytes, char buf[32])
{
	static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
	double v = (double)bytes;
	int u = 0;

	for (; v >= 1024 && u < 4; u++)
		v /= 1024;
	snprintf(buf, 32, u == 0 ? "%.0f %s" : "%.1f %s", v, unit[u]);
	return buf;
}

/* ---- start: what --check does too ---- */

static void
on_progress(void *arg, int percent)
{
	struct daemon *m = arg;
	int64_t now = octetd_now_us();

	if (isatty(STDERR_FILENO)) {
		fprintf(stderr, "\rpacking %s: %d %%%s", m->d.conf->model_path, percent, percent == 100 ? "\n" : "");
		return;
	}
	if (now - m->shown_us < 1000000)
		return;
	m->shown_us = now;
	log_info("model.load", "percent=%d", percent);
}

/* Bytes of the checkpoint's files: the planes take as much as BF16. */
static uint64_t
checkpoint_bytes(const char *dir)
{
	uint64_t sum = 0;
	struct dirent *e;
	struct stat st;
	DIR *at = opendir(dir);

	while (at != NULL && (e = readdir(at)) != NULL) {
		size_t n = strlen(e->d_name);

		if (n > 12 && strcmp(e->d_name + n - 12, ".safetensors") == 0 && fstatat(dirfd(at), e->d_name, &st, 0) == 0)
			sum += (uint64_t)st.st_size;
	}
	if (at != NULL)
		closedir(at);
	return sum;
}

/* auto: a machine without a card, or with too small a one, serves on its CPU, and says why once. */
static void
fall_back(struct octetd *d, struct err *err)
{
	device_close(&d->device);
	d->backend = "cpu";
	log_info("backend", "backend=cpu why=%s", LOG_Q(err->text));
	*err->text = '\0';
}

/* What the card will hold, before anything is read; refused here if it is too much. */
static int
check_device_memory(const struct octetd *d, struct model_shape *s, const struct engine_config *cfg, struct err *err)
{
	char w[32], k[32], b[32], f[32];
	struct kd_memory m;
	int rc;

	if (d->conf->max_context != 0 && d->conf->max_context < s->max_context)
		s->max_context = d->conf->max_context;
	if ((rc = device_memory(d->device, s, cfg->kv_bytes, cfg->max_batch_tokens, &d->device_options, &m, err)) != 0)
		return rc;
	for (uint32_t g = 0; g <= GROUP_LM_HEAD; g++)
		log_info("device.weights", "group=%s takes=%s both=%s nested=%s", plan_group_name((enum plan_group)g),
		    LOG_Q(human(m.group[g], w)), LOG_Q(human(m.group_as[KD_BOTH][g], k)), LOG_Q(human(m.group_as[KD_NESTED][g], b)));
	log_info("device.memory", "weights=%s kv_cache=%s buffers=%s free=%s residency=%s", LOG_Q(human(m.weights, w)),
	    LOG_Q(human(m.kv, k)), LOG_Q(human(m.buffers, b)), LOG_Q(human(m.free, f)),
	    d->device_options.nested ? "nested" : *d->conf->nested_sites != '\0' ? "mixed" : "both");
	if (m.weights + m.kv + m.buffers > m.free)
		return err_set(err, -ENOMEM, "the card is too small: %s of weights, %s of KV cache and %s of buffers, of which %s "
		    "are free; residency = nested takes a third off the weights, nested_sites off some of them", w, k, b, f);
	return 0;
}

/* A thread of its own, beside the packing of the weights: a large vocabulary takes half a second. */
static void *
compile_tokenizer(void *arg)
{
	struct daemon *m = arg;
	struct octetd *d = &m->d;
	const struct model *model = d->model;
	const struct tok_source src = {model->tokenizer_json, model->tokenizer_config_json, model->chat_template,
	    model->tokenizer_json_len, model->tokenizer_config_json_len, model->chat_template_len};
	struct tok *tok = NULL;
	int rc;

	rc = tok_compile_source(&src, model->shape.vocab, &d->tok_blob, &d->tok_len, &m->tokenizer_err);
	if (rc == 0)
		rc = tok_open(&tok, d->tok_blob, d->tok_len, &m->tokenizer_err);
	if (rc != 0)
		err_prefix(&m->tokenizer_err, "%s/tokenizer.json", model->path);
	tok_free(&tok);
	m->tokenizer_rc = rc;
	return NULL;
}

static int
pack_model(struct daemon *m, bool check_only, struct err *err)
{
	pthread_t thread;
	bool beside = team_thread(&thread, compile_tokenizer, m) == 0;
	int rc;

	rc = model_pack(m->d.model, m->d.team, m->d.conf->kv_cache_bytes, check_only, check_only ? NULL : on_progress, m, err);
	if (beside)
		pthread_join(thread, NULL);
	else
		compile_tokenizer(m);
	return rc;
}

static int
load_tokenizer(const struct daemon *m, struct err *err)
{
	*err = m->tokenizer_err;
	return m->tokenizer_rc;
}

static int
load_model(struct daemon *m, bool check_only, struct err *err)
{
	const struct conf *c = m->d.conf;
	struct model_shape shape;
	struct engine_config cfg;
	char a[32], b[32];
	int rc;

	if (!check_only)
		log_info("memory.plan", "checkpoint=%s kv_cache=%s threads=%u cpu=%s model=%s",
		    LOG_Q(human(checkpoint_bytes(c->model_path), a)), LOG_Q(human(c->kv_cache_bytes, b)),
		    team_size(m->d.team), m->d.ops->name, LOG_Q(c->model_path));
	octetd_engine_config(&m->d, c, &cfg);
	if (m->d.device != NULL && (rc = config_read(&shape, c->model_path, NULL, NULL, err)) != 0)
		return rc;
	if (m->d.device != NULL && (rc = check_device_memory(&m->d, &shape, &cfg, err)) != 0) {
		if (c->backend == CONF_BACKEND_CUDA || rc == -EINVAL)
			return rc;
		fall_back(&m->d, err);
	}
	m->shown_us = octetd_now_us();
	if ((rc = model_open(&m->d.model, c->model_path, (uint32_t)c->max_context, err)) != 0)
		return rc;
	if ((rc = pack_model(m, check_only, err)) != 0) {
		model_free(&m->d.model);
		return rc;
	}
	if (engine_kv_bytes(&m->d.model->shape, &cfg) == 0)
		return err_set(err, -EINVAL, "%s: kv_cache_bytes = %" PRIu64 " is less than one page of this model", c->file,
		    c->kv_cache_bytes);
	if (*m->d.model->packed_why.text != '\0')
		log_warn("model.packed", "why=%s", LOG_Q(m->d.model->packed_why.text));
	if (!check_only)
		log_info("model", "name=%s layers=%u vocab=%u context=%u weights=%s kv_cache=%s exceptions=%" PRIu64
		    " digest=%016" PRIx64 " from=%s", LOG_Q(m->d.model->name), m->d.model->shape.n_layers, m->d.model->shape.vocab,
		    m->d.model->shape.max_context, LOG_Q(human(m->d.model->weights_bytes, a)),
		    LOG_Q(human(engine_kv_bytes(&m->d.model->shape, &cfg), b)), m->d.model->n_exceptions, m->d.model->digest,
		    m->d.model->packed.map != NULL ? PACKED_NAME : "checkpoint");
	return 0;
}

static int
start_backend(struct octetd *d, struct err *err)
{
	const struct conf *c = d->conf;
	int rc;

	d->backend = "cpu";
	if (c->backend == CONF_BACKEND_CPU)
		return 0;
	rc = device_open(&d->device, "cuda", c->device, err);
	if (rc == 0) {
		d->backend = device_name(d->device);
		d->device_options = (struct device_options){.nested = c->residency == CONF_RESIDENCY_NESTED, .nested_sites = c->nested_sites,
		    .fast_accumulation = c->fast_accumulation != 0, .cache_dir = c->state_dir};
		return 0;
	}
	if (c->backend == CONF_BACKEND_CUDA) {
		err_prefix(err, "%s: backend = cuda", c->file);
		return rc;
	}
	fall_back(d, err);
	return 0;
}

/* The part of the start that takes no file. */
static int
start_team(struct daemon *m, struct err *err)
{
	struct octetd *d = &m->d;
	char why[256] = "";
	int rc;

	if ((rc = start_backend(d, err)) != 0)
		return rc;
	d->ops = kernels_select(getenv("OCTET_CPU"), why, sizeof(why));
	if (d->ops == NULL)
		return err_set(err, -EINVAL, "OCTET_CPU: %s", why);
	rc = team_new(&d->team, (uint32_t)d->conf->threads, (uint32_t)d->conf->spin_us);
	return rc == 0 ? 0 : err_set(err, rc, "worker threads: %s", strerror(-rc));
}

static int
load(struct daemon *m, struct err *err)
{
	struct octetd *d = &m->d;
	int rc;

	if ((rc = conf_load(&d->conf, d->conf_path, err)) != 0 || (rc = octetd_conf_check(d->conf, err)) != 0 ||
	    (rc = octetd_clients_resolve(d->conf, err)) != 0)
		return rc;
	log_set_level_name(d->conf->log_level);
	if ((rc = start_team(m, err)) != 0 || (rc = load_model(m, false, err)) != 0 || (rc = load_tokenizer(m, err)) != 0)
		return rc;
	return octetd_policies_check(d->conf, d->model->shape.n_layers, &m->file_plan, err);
}

/* ---- --check: all that is wrong, as far as one thing can be told from another ---- */

static void
complain(void *arg, const char *text)
{
	(void)arg;
	fprintf(stderr, "octetd: %s\n", text);
}

/* True: there is something wrong. */
static bool
bad(int rc, const struct err *err)
{
	if (rc != 0)
		complain(NULL, err->text);
	return rc != 0;
}

static int
check_policies(struct daemon *m, struct err *err)
{
	const struct conf *c = m->d.conf;
	uint32_t n_layers = m->d.model->shape.n_layers;
	int n = 0;

	for (size_t i = 0; i < c->n_policies; i++) {
		struct plan *plan = NULL;

		n += bad(octetd_policy_plan(c, c->policies[i].name, n_layers, &plan, err), err);
		plan_unref(&plan);
	}
	return n > 0 ? n : bad(octetd_policies_check(c, n_layers, &m->file_plan, err), err);
}

static int
check(struct daemon *m, struct err *err)
{
	struct octetd *d = &m->d;
	int n = conf_check(&d->conf, d->conf_path, complain, NULL);

	if (n > CONF_PROBLEMS)
		fprintf(stderr, "octetd: and %d more\n", n - CONF_PROBLEMS);
	if (d->conf == NULL)
		return n;
	log_set_level_name(d->conf->log_level);
	n += bad(octetd_conf_check(d->conf, err), err);
	n += bad(octetd_clients_resolve(d->conf, err), err);
	if (d->conf->model_path == NULL)
		return n;
	if (bad(start_team(m, err), err) || bad(load_model(m, true, err), err))
		return n + 1;
	n += bad(load_tokenizer(m, err), err);
	n += check_policies(m, err);
	if (n == 0) {
		printf("%s: ok\n", d->conf_path);
		printf("model %s, %u layers, context %u; policy %s of %zu; CPU level %s; %u threads\n", d->model->name,
		    d->model->shape.n_layers, d->model->shape.max_context, d->conf->policy, d->conf->n_policies, d->ops->name,
		    team_size(d->team));
	}
	return n;
}

/* ---- start: the plan ---- */

struct first_plan {
	struct plan *plan;
	char policy[64];
	uint64_t epoch;
	uint64_t undoes, back_to; /* a change that nobody confirmed */
};

/* The newest decision wins: the journal's last applied plan, unless the file's
 * active policy is another than when that was written. */
/* The daemon died with a change that nobody had confirmed: it may be why. */
static bool
take_back(struct daemon *m, struct first_plan *f)
{
	struct journal_entry *list = NULL;
	uint32_t n = journal_history(m->d.journal, &list);
	uint64_t plan;

	if (!journal_unconfirmed(m->d.journal) ||
	    journal_rollback_target(m->d.journal, &f->undoes, &f->back_to, &plan, NULL) != 0 ||
	    (f->plan = journal_plan(m->d.journal, plan)) == NULL) {
		free(list);
		return false;
	}
	for (uint32_t i = 0; i < n; i++)
		if (list[i].r.epoch == f->back_to)
			memcpy(f->policy, list[i].r.policy, sizeof(f->policy));
	free(list);
	log_warn("unconfirmed", "epoch=%" PRIu64 " back_to=%" PRIu64, f->undoes, f->back_to);
	return true;
}

static void
choose_plan(struct daemon *m, const struct journal_record *last, struct first_plan *f)
{
	if (last != NULL && last->file_policy == m->file_plan->digest) {
		if (take_back(m, f))
			return;
		f->plan = journal_plan(m->d.journal, last->plan);
		memcpy(f->policy, last->policy, sizeof(f->policy));
		if (f->plan != NULL)
			return;
		log_warn("journal.plan", "epoch=%" PRIu64 " plan=%016" PRIx64 " why=\"of another model: the file's policy runs\"",
		    last->epoch, last->plan);
	}
	f->plan = plan_ref(m->file_plan);
	snprintf(f->policy, sizeof(f->policy), "%.63s", m->d.conf->policy);
}

static int
record_start(struct daemon *m, const struct journal_record *last, const struct first_plan *f, struct err *err)
{
	struct journal_record r = {.kind = JOURNAL_START, .epoch = f->epoch, .time_us = octetd_now_us(), .uid = getuid(),
	    .pid = (uint32_t)getpid(), .program = "octetd", .why = "start", .plan = f->plan->digest,
	    .file_policy = m->file_plan->digest, .undoes = f->undoes, .back_to = f->back_to};
	struct plan *before = last != NULL ? journal_plan(m->d.journal, last->plan) : NULL;
	char *change = before != NULL ? plan_diff(before, f->plan) : NULL;

	snprintf(r.policy, sizeof(r.policy), "%s", f->policy);
	if (f->undoes != 0)
		snprintf(r.why, sizeof(r.why), "start: epoch %" PRIu64 " was not confirmed", f->undoes);
	if (change != NULL)
		snprintf(r.change, sizeof(r.change), "%.*s", (int)sizeof(r.change) - 1, change);
	free(change);
	plan_unref(&before);
	return journal_append(m->d.journal, &r, f->plan, err);
}

static int
open_journal(struct daemon *m, struct first_plan *f, struct err *err)
{
	struct journal_record last;
	uint32_t closed;
	uint64_t torn = 0;
	bool known;
	int rc = journal_open(&m->d.journal, m->d.conf->state_dir, m->d.model->shape.n_layers, &torn, err);

	if (rc != 0)
		return rc;
	if (torn > 0)
		log_warn("journal.torn", "bytes=%" PRIu64 " state_dir=%s", torn, LOG_Q(m->d.conf->state_dir));
	*err->text = '\0';
	closed = journal_close_intents(m->d.journal, err);
	if (*err->text != '\0')
		return -EIO;
	if (closed > 0)
		log_warn("journal.intents", "not_applied=%u", closed);
	octetd_keep_policies(&m->d); /* written with the record of the start */
	known = journal_last_applied(m->d.journal, &last);
	choose_plan(m, known ? &last : NULL, f);
	f->epoch = journal_last_epoch(m->d.journal) + 1;
	return record_start(m, known ? &last : NULL, f, err);
}

/* ---- signals, and what the engine sends back ---- */

/* Engine thread. */
static void
wake_loop(void *arg)
{
	struct daemon *m = arg;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!__atomic_load_n(&m->d.awake, __ATOMIC_RELAXED))
		uv_async_send(&m->reap);
}

static bool
reap(void *arg)
{
	struct octetd *d = arg;
	struct request *mine = NULL, **end = &mine;

	if (!engine_has_news(d->engine))
		return false;

	for (struct flip *f = engine_reap_flips(d->engine), *next; f != NULL; f = next) {
		next = f->next;
		f->next = NULL;
		if (f->done != NULL)
			f->done(f);
		else
			flipper_reaped(d->flips, f);
	}
	for (struct request *r = engine_reap(d->engine), *next; r != NULL; r = next) {
		next = r->next;
		r->next = NULL;
		if (r->done != NULL)
			r->done(r);
		else
			*end = r, end = &r->next;
	}
	server_reaped(d->server, mine);
	for (struct probe *p = engine_reap_probes(d->engine), *next; p != NULL; p = next) {
		struct probe_owner *owner = p->owner;

		next = p->next;
		owner->done(owner, p);
	}
	return true;
}

static void
on_reap(uv_async_t *h)
{
	reap(h->data);
}

static void
on_drain(uv_timer_t *t)
{
	struct daemon *m = t->data;
	bool over = m->at_once || uv_now(&m->d.loop) >= m->drain_until;

	/* The journal is never cut off, whoever is in a hurry. */
	if (!flipper_idle(m->d.flips) || m->d.saving || (!over && !server_idle(m->d.server)))
		return;
	uv_stop(&m->d.loop);
}

static void
on_stop(uv_signal_t *h, int signum)
{
	struct daemon *m = h->data;

	log_info("stop", "signal=%d%s", signum, m->d.draining ? " now=true" : "");
	m->at_once = m->d.draining;
	if (!m->d.draining) {
		m->d.draining = true;
		octetd_notify("STOPPING=1");
		server_drain(m->d.server, true);
		flipper_drain(m->d.flips);
		uv_update_time(&m->d.loop);
		m->drain_until = uv_now(&m->d.loop) + m->d.conf->drain_timeout_s * 1000;
		uv_timer_start(&m->drain, on_drain, DRAIN_POLL_MS, DRAIN_POLL_MS);
	}
	on_drain(&m->drain);
}

static void
on_reloaded(void *arg, int rc, const struct err *err, const json_t *changes, const struct flip_result *result)
{
	struct daemon *m = arg;

	(void)rc, (void)err, (void)changes, (void)result; /* logged already */
	m->reloading = false;
}

static void
on_sighup(uv_signal_t *h, int signum)
{
	struct daemon *m = h->data;
	struct flip_who who = {.uid = getuid(), .pid = (uint32_t)getpid(), .program = "SIGHUP"};

	(void)signum;
	if (m->reloading)
		return; /* its turn has not come: it will read the newest file */
	m->reloading = true;
	reload_start(&m->d, &who, on_reloaded, m);
}

/* ---- start: what serves ---- */

static int
policy_plan(void *arg, const char *name, struct plan **out, struct err *err)
{
	const struct octetd *d = arg;

	return octetd_policy_plan(d->conf, name, d->model->shape.n_layers, out, err);
}

static void
start_handles(struct daemon *m)
{
	uv_async_init(&m->d.loop, &m->reap, on_reap);
	uv_timer_init(&m->d.loop, &m->drain);
	uv_signal_init(&m->d.loop, &m->sigterm);
	uv_signal_init(&m->d.loop, &m->sigint);
	uv_signal_init(&m->d.loop, &m->sighup);
	m->reap.data = m->drain.data = m->sigterm.data = m->sigint.data = m->sighup.data = m;
	uv_signal_start(&m->sigterm, on_stop, SIGTERM);
	uv_signal_start(&m->sigint, on_stop, SIGINT);
	uv_signal_start(&m->sighup, on_sighup, SIGHUP);
}

/* The data socket comes last: where it is, everything is ready. */
static int
serve(struct daemon *m, const struct first_plan *f, struct err *err)
{
	struct octetd *d = &m->d;
	struct flip_config flips = {.loop = &d->loop, .journal = d->journal, .n_layers = d->model->shape.n_layers,
	    .policy_plan = policy_plan, .policy_arg = d};
	struct engine_config engine;
	struct server_config server;
	int rc;

	start_handles(m);
	d->notify = wake_loop;
	d->reap = reap;
	octetd_engine_config(d, d->conf, &engine);
	octetd_server_config(d, d->conf, &server);
	if ((rc = engine_new(&d->engine, d->model, d->ops, d->team, &engine, f->plan, f->epoch, err)) != 0)
		return rc;
	flips.engine = d->engine;
	if ((rc = flipper_new(&d->flips, &flips, f->plan, f->epoch, f->policy, m->file_plan->digest, err)) != 0 ||
	    (rc = evals_open(&d->evals, &d->loop, d->conf->state_dir, err)) != 0 ||
	    (rc = shadow_new(&d->shadow, d, err)) != 0 || (rc = rollout_new(&d->rollout, d, err)) != 0 ||
	    (rc = status_new(&d->status, d, err)) != 0 ||
	    (rc = control_new(&d->control, d, d->conf->control_socket, (unsigned)d->conf->control_mode, err)) != 0)
		return rc;
	return server_new(&d->server, &d->loop, &server, d->model, d->engine, d->tok_blob, d->tok_len, err);
}

static void
on_handle(uv_handle_t *h, void *arg)
{
	(void)arg;
	if (!uv_is_closing(h))
		uv_close(h, NULL);
}

static void
close_main_handles(struct daemon *m)
{
	uv_handle_t *h[] = {(uv_handle_t *)&m->reap, (uv_handle_t *)&m->drain, (uv_handle_t *)&m->sigterm,
	    (uv_handle_t *)&m->sigint, (uv_handle_t *)&m->sighup};

	for (size_t i = 0; i < sizeof(h) / sizeof(*h); i++)
		if (m->d.notify != NULL)
			on_handle(h[i], NULL);
}

/* Backwards. The server closes its sessions while the engine still runs: their
 * requests are cancelled, end at the next step and come back by on_reap(). */
static void
free_all(struct daemon *m, struct first_plan *f)
{
	struct octetd *d = &m->d;

	control_free(&d->control);
	while (d->measuring > 0)
		uv_run(&d->loop, UV_RUN_ONCE);
	server_free(&d->server);
	engine_free(&d->engine);
	status_free(&d->status);
	rollout_free(&d->rollout);
	flipper_free(&d->flips);
	close_main_handles(m);
	uv_run(&d->loop, UV_RUN_DEFAULT);
	if (uv_loop_close(&d->loop) != 0)
		log_error("stop", "why=\"a handle is still open\"");
	evals_close(&d->evals);
	shadow_free(&d->shadow);
	journal_close(&d->journal);
	plan_unref(&f->plan);
	plan_unref(&m->file_plan);
	free(d->tok_blob);
	model_free(&d->model);
	device_close(&d->device);
	team_free(&d->team);
	conf_free(&d->conf);
}

static int
run(struct daemon *m, bool check_only)
{
	struct first_plan f = {0};
	struct err err = {""};
	struct octetd *d = &m->d;
	int rc;

	uv_loop_init(&d->loop);
	d->started_us = octetd_now_us();
	if (check_only)
		rc = check(m, &err);
	else if ((rc = load(m, &err)) == 0 && (rc = open_journal(m, &f, &err)) == 0 && (rc = serve(m, &f, &err)) == 0) {
		log_info("ready", "version=%s pid=%d socket=%s control_socket=%s epoch=%" PRIu64 " policy=%s plan=%016" PRIx64,
		    OCTET_VERSION, (int)getpid(), LOG_Q(d->conf->socket), LOG_Q(d->conf->control_socket), f.epoch, LOG_Q(f.policy),
		    f.plan->digest);
		octetd_notify("READY=1");
		uv_run(&d->loop, UV_RUN_DEFAULT);
	}
	if (rc != 0 && !check_only)
		complain(NULL, err.text);
	free_all(m, &f);
	if (rc == 0 && !check_only)
		log_info("stopped", "pid=%d", (int)getpid());
	return rc != 0;
}

static const char usage[] =
    "usage: octetd [--config FILE] [--check] [--help] [--help-options] [--version]\n"
    "       octetd --bench MODEL_DIR [--threads N] [--only WORDS] [--rounds N] [--backend cpu|cuda] [--context N]\n"
    "                                [--fast-accumulation] [--json]\n"
    "       octetd --pack MODEL_DIR [--threads N]\n"
    "  --config FILE   configuration file (default " OCTET_SYSCONFDIR "/octet.ini)\n"
    "  --check         read and check the file, the model and the policies, then end\n"
    "  --bench DIR     measure a model in every format beside the machine's ceilings, serve nobody\n"
    "    --threads N   with so many threads (default: all CPUs)\n"
    "    --only WORDS  the tests whose name has them: \"fp8 decode 1\", \"prefill\"\n"
    "    --rounds N    the median of so many (default: 5)\n"
    "    --backend B   cpu (default) or cuda\n"
    "    --context N   positions behind a decoding sequence (default: 128)\n"
    "    --fast-accumulation  [engine] fast_accumulation = yes\n"
    "    --json        one JSON object\n"
    "  --pack DIR      pack a model once and for all, into DIR/" PACKED_NAME ": the next start maps that\n"
    "  --help-options  every option of the file\n"
    "  --version       the version\n"
    "Signals: SIGHUP reads the file again, SIGTERM and SIGINT stop. See octetd(8).\n";

/* Of a command line, from 1 on. */
static bool
number(const char *option, const char *text, uint32_t max, uint32_t *out)
{
	char *end;
	unsigned long n = strtoul(text, &end, 10);

	if (*text < '0' || *text > '9' || *end != '\0' || n == 0 || n > max) {
		fprintf(stderr, "octetd: %s '%s' is no number from 1 to %u\n", option, text, max);
		return false;
	}
	*out = (uint32_t)n;
	return true;
}

static int
pack_once(const char *dir, uint32_t threads, struct err *err)
{
	double from = (double)octetd_now_us();
	struct model *model = NULL;
	struct team *team;
	int rc = team_new(&team, threads, 0);

	if (rc != 0)
		return err_set(err, rc, "worker threads: %s", strerror(-rc));
	if ((rc = model_open(&model, dir, 0, err)) == 0) {
		model->from_checkpoint = true;
		if ((rc = model_pack(model, team, 0, false, NULL, NULL, err)) == 0)
			rc = model_write_packed(model, team, err);
	}
	if (rc == 0) {
		char size[32];

		printf("%s/" PACKED_NAME ": %s in %.1f s\n", model->path, human(model->weights_bytes, size),
		    ((double)octetd_now_us() - from) / 1e6);
	}
	model_free(&model);
	team_free(&team);
	return rc;
}

int
main(int argc, char **argv)
{
	static const struct option longs[] = {{"config", required_argument, NULL, 'c'}, {"check", no_argument, NULL, 't'},
	    {"bench", required_argument, NULL, 'b'}, {"pack", required_argument, NULL, 'p'}, {"threads", required_argument, NULL, 'n'},
	    {"only", required_argument, NULL, 'y'}, {"rounds", required_argument, NULL, 'r'}, {"backend", required_argument, NULL, 'B'}, {"context", required_argument, NULL, 'C'},
	    {"fast-accumulation", no_argument, NULL, 'f'}, {"json", no_argument, NULL, 'j'},
	    {"help", no_argument, NULL, 'h'}, {"help-options", no_argument, NULL, 'o'}, {"version", no_argument, NULL, 'v'},
	    {NULL, 0, NULL, 0}};
	static struct daemon m;
	struct bench_options bench = {0};
	bool check_only = false, for_bench = false, threads = false;
	const char *pack = NULL;
	struct err err;
	int c, rc;

	m.d.conf_path = OCTET_SYSCONFDIR "/octet.ini";
	while ((c = getopt_long(argc, argv, "c:h", longs, NULL)) != -1) {
		switch (c) {
		case 'c': m.d.conf_path = optarg; break;
		case 't': check_only = true; break;
		case 'b': bench.model = optarg; break;
		case 'p': pack = optarg; break;
		case 'n':
			threads = true;
			if (!number("--threads", optarg, 1024, &bench.threads))
				return 2;
			break;
		case 'r':
			for_bench = true;
			if (!number("--rounds", optarg, BENCH_MAX_ROUNDS, &bench.rounds))
				return 2;
			break;
		case 'y': bench.only = optarg; for_bench = true; break;
		case 'B':
			for_bench = true;
			if (strcmp(optarg, "cpu") != 0 && strcmp(optarg, "cuda") != 0) {
				fprintf(stderr, "octetd: --backend '%s' is none of cpu, cuda\n", optarg);
				return 2;
			}
			bench.cuda = strcmp(optarg, "cuda") == 0;
			break;
		case 'C':
			for_bench = true;
			if (!number("--context", optarg, 1 << 20, &bench.context))
				return 2;
			break;
		case 'f': bench.fast_accumulation = for_bench = true; break;
		case 'j': bench.json = for_bench = true; break;
		case 'h': printf("%s", usage); return 0;
		case 'o': conf_print_options(stdout); return 0;
		case 'v': printf("octetd %s\n", OCTET_VERSION); return 0;
		default: fprintf(stderr, "%s", usage); return 2;
		}
	}
	if (optind < argc) {
		fprintf(stderr, "octetd: unexpected '%s'\n%s", argv[optind], usage);
		return 2;
	}
	if (bench.model == NULL && (for_bench || (threads && pack == NULL))) {
		fprintf(stderr, "octetd: --threads, --only, --rounds, --backend, --context, --fast-accumulation and --json belong to --bench, --threads to --pack too\n%s", usage);
		return 2;
	}
	if (pack != NULL) {
		if (pack_once(pack, bench.threads, &err) == 0)
			return 0;
		complain(NULL, err.text);
		return 1;
	}
	if (bench.model != NULL) {
		if (bench_run(&bench, &err) == 0)
			return 0;
		complain(NULL, err.text);
		return 1;
	}
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN); /* a file size limit is an error of write() */
	signal(SIGHUP, SIG_IGN); /* until it can be taken */
	rc = run(&m, check_only);
	uv_library_shutdown();
	return rc;
}
