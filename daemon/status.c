/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/evals.h"
#include "daemon/status.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client/page.h"
#include "daemon/engine/evidence.h"
#include "daemon/log.h"
#include "daemon/octetd.h"
#include "daemon/rollout.h"
#include "daemon/shadow.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

#define REFRESH_MS 100u
#define RATE_SAMPLES 11u /* ten intervals: the last second */
#define TIMES 1024u      /* requests whose times are kept, */
#define TIMES_NS 10000000000u /* as long as they ended in the last 10 s */
#define SLOW_EVERY 5u    /* refreshes: what takes sorting or other modules' JSON */

_Static_assert(LOG_KEPT == PAGE_LOG && LOG_KEPT_LINE == PAGE_LOG_LINE, "the page has the log as log.c keeps it");

struct sample {
	uint64_t at_ns, output, prompt;
};

struct times {
	uint64_t at_ns;
	float first_ms, token_ms; /* token_ms < 0: of one token only */
};

struct status {
	uv_timer_t timer;
	struct octetd *d;
	int fd, read_fd;
	struct octet_page *page;   /* shared */
	struct octet_page next;    /* made here, then copied in one go */
	uint32_t watchers;
	struct sample sample[RATE_SAMPLES];
	uint32_t n_samples;
	struct times times[TIMES];
	uint64_t n_times;          /* ever */
	uint64_t refreshes;
	uint64_t seen_changes;     /* flipper_changes() + 1 the history was copied at */
	uint64_t seen_evals;    /* the same of evals */
};

/* ---- filling ---- */

/* Bytes that one token reads of a site in a format. */
static uint64_t
read_bytes(const struct model_shape *m, enum plan_group g, enum plan_format f)
{
	uint64_t q = (uint64_t)m->n_heads * m->head_dim, kv = (uint64_t)m->n_kv_heads * m->head_dim;
	uint64_t each = f == FORMAT_BF16 || f == FORMAT_FP8B ? 2 : 1;

	switch (g) {
	case GROUP_Q: case GROUP_O: return each * q * m->hidden;
	case GROUP_K: case GROUP_V: return each * kv * m->hidden;
	case GROUP_GATE: case GROUP_UP: case GROUP_DOWN: return each * m->intermediate * m->hidden;
	case GROUP_LM_HEAD: return each * m->vocab * m->hidden;
	case GROUP_KV_CACHE: return 2 * kv * each + (f == FORMAT_BF16 ? 0 : 2 * m->n_kv_heads * sizeof(float));
	case N_GROUPS: break;
	}
	return 0;
}

static void
forget_sweep(struct octet_page *p)
{
	for (uint32_t g = 0; g < PAGE_GROUPS; g++) {
		p->group_kl[g] = -1, p->group_saved_us[g] = p->group_saved_error_us[g] = NAN;
		for (uint32_t l = 0; l < PAGE_LAYERS; l++)
			p->kl[g][l] = -1, p->saved_us[g][l] = p->saved_error_us[g][l] = NAN;
	}
	for (uint32_t l = 0; l < PAGE_LAYERS; l++)
		p->layer_kl[l] = -1, p->layer_saved_us[l] = p->layer_saved_error_us[l] = NAN;
}

static void
fill_fixed(struct status *s)
{
	const struct octetd *d = s->d;
	struct octet_page *p = &s->next;
	uint32_t n_layers = d->model->shape.n_layers;

	p->magic = PAGE_MAGIC, p->version = PAGE_VERSION, p->bytes = sizeof(*p);
	snprintf(p->octet_version, sizeof(p->octet_version), "%s", OCTET_VERSION);
	snprintf(p->model, sizeof(p->model), "%s", d->model->name);
	snprintf(p->backend, sizeof(p->backend), "%s", d->backend);
	snprintf(p->cpu_level, sizeof(p->cpu_level), "%s", d->ops->name);
	p->pid = (uint32_t)getpid();
	p->n_layers = n_layers < PAGE_LAYERS ? n_layers : PAGE_LAYERS;
	p->n_groups = N_GROUPS;
	p->n_formats = N_FORMATS;
	p->started_us = d->started_us;
	for (int g = 0; g < N_GROUPS; g++)
		snprintf(p->group[g], sizeof(p->group[g]), "%s", plan_group_name(g));
	for (int f = 0; f < N_FORMATS; f++)
		snprintf(p->format[f], sizeof(p->format[f]), "%s", plan_format_name(f));
	for (int g = 0; g < N_GROUPS; g++)
		for (int f = 0; f < N_FORMATS; f++)
			if (plan_group_has(g, f)) {
				p->possible[g] |= 1u << f;
				p->read_bytes[g][f] = read_bytes(&d->model->shape, g, f);
			}
	p->weights_bytes = d->model->weights_bytes;
	memset(p->wanted, PAGE_NONE, sizeof(p->wanted));
	memset(p->executed, PAGE_NONE, sizeof(p->executed));
	memset(p->candidate, PAGE_NONE, sizeof(p->candidate));
	forget_sweep(p);
}

static void
fill_plan(struct status *s)
{
	const struct octetd *d = s->d;
	const struct plan *plan = flipper_plan(d->flips), *next = flipper_next(d->flips);
	struct octet_page *p = &s->next;
	struct evidence_site site;

	for (int g = 0; g < N_GROUPS; g++) {
		for (uint32_t l = 0; l < (g == GROUP_LM_HEAD ? 1 : p->n_layers); l++) {
			p->wanted[g][l] = (uint8_t)plan_at(next, g, l);
			p->executed[g][l] = (uint8_t)engine_executed(d->engine, plan, g, l);
			engine_evidence(d->engine, g, l, &site);
			p->absmax[g][l] = site.n > 0 ? site.absmax : -1;
			p->zero[g][l] = site.zero, p->saturated[g][l] = site.saturated;
		}
	}
	p->epoch = flipper_epoch(d->flips);
	p->plan_digest = plan->digest;
	snprintf(p->policy, sizeof(p->policy), "%s", flipper_policy(d->flips));
	p->unconfirmed_epoch = flipper_unconfirmed(d->flips, &p->unconfirmed_s);
	p->unjournaled = flipper_unjournaled(d->flips);
	p->draining = d->draining || d->drained;
	p->flipping = next != plan;
}

/* Over the last second, or since the first watcher came. */
static void
fill_rates(struct status *s)
{
	struct octet_page *p = &s->next;
	struct sample now = {uv_hrtime(), p->output_tokens, p->prompt_tokens}, old;
	double seconds;

	s->sample[s->n_samples++ % RATE_SAMPLES] = now;
	old = s->sample[s->n_samples < RATE_SAMPLES ? 0 : s->n_samples % RATE_SAMPLES];
	seconds = (double)(now.at_ns - old.at_ns) / 1e9;
	p->tokens_per_s = seconds > 0 ? (double)(now.output - old.output) / seconds : 0;
	p->prompt_per_s = seconds > 0 ? (double)(now.prompt - old.prompt) / seconds : 0;
}

static void
fill_stats(struct status *s)
{
	struct octet_page *p = &s->next;
	struct engine_stats st = {0};

	engine_stats(s->d->engine, &st);
	p->step = st.step, p->running_epoch = st.epoch;
	p->kv_pages_cached = st.kv_pages_cached, p->prefix_hit_tokens = st.prefix_hit_tokens;
	p->prefix_evictions = st.prefix_evictions, p->preemptions = st.preemptions;
	p->kv_bytes = st.kv_bytes, p->kv_pages = st.kv_pages, p->kv_pages_used = st.kv_pages_used;
	p->kv_page_tokens = st.kv_page_tokens;
	p->running = st.running, p->queued = st.queued, p->batch_rows = st.batch_rows;
	p->done = st.done, p->failed = st.failed;
	p->prompt_tokens = st.prompt_tokens, p->output_tokens = st.output_tokens;
	p->step_ms_p50 = st.step_ms_p50, p->step_ms_p90 = st.step_ms_p90;
	p->step_ms_p99 = st.step_ms_p99, p->step_ms_max = st.step_ms_max;
	p->queue_ms = st.queue_ms;
}

/* ---- times of requests ---- */

void
status_take(struct status *s, const struct request *r)
{
	if (s == NULL || r->n_output == 0 || r->replay != NULL || r->done != NULL)
		return;
	s->times[s->n_times++ % TIMES] = (struct times){uv_hrtime(), (float)(r->first_ms - r->submitted_ms),
	    r->n_output > 1 ? (float)((r->done_ms - r->first_ms) / (r->n_output - 1)) : -1};
}

static int
by_float(const void *pa, const void *pb)
{
	float a = *(const float *)pa, b = *(const float *)pb;

	return a < b ? -1 : a > b;
}

/* Of sorted ones; -1: there are none. */
static double
percentile(const float *v, uint32_t n, double q)
{
	return n > 0 ? (double)v[(uint32_t)(q * (n - 1) + 0.5)] : -1;
}

static void
fill_times(struct status *s)
{
	struct octet_page *p = &s->next;
	uint32_t n = s->n_times < TIMES ? (uint32_t)s->n_times : TIMES, n_first = 0, n_token = 0;
	uint64_t now = uv_hrtime();
	float first[TIMES], token[TIMES];

	for (uint32_t i = 0; i < n; i++) {
		if (now - s->times[i].at_ns > TIMES_NS)
			continue;
		first[n_first++] = s->times[i].first_ms;
		if (s->times[i].token_ms >= 0)
			token[n_token++] = s->times[i].token_ms;
	}
	qsort(first, n_first, sizeof(*first), by_float);
	qsort(token, n_token, sizeof(*token), by_float);
	p->ttft_ms_p50 = percentile(first, n_first, 0.5), p->ttft_ms_p99 = percentile(first, n_first, 0.99);
	p->token_ms_p50 = percentile(token, n_token, 0.5), p->token_ms_p90 = percentile(token, n_token, 0.9);
	p->token_ms_p99 = percentile(token, n_token, 0.99);
}

/* The precision lets gcc see that cutting is meant. */
#define COPY(to, from) snprintf((to), sizeof(to), "%.*s", (int)sizeof(to) - 1, (from))

static void
fill_history(struct status *s)
{
	struct journal_entry *list = NULL;
	struct octet_page *p = &s->next;
	uint32_t n;

	if (s->seen_changes == flipper_changes(s->d->flips) + 1)
		return;
	s->seen_changes = flipper_changes(s->d->flips) + 1;
	n = journal_history(s->d->journal, &list);
	p->n_history = n < PAGE_HISTORY ? n : PAGE_HISTORY;
	for (uint32_t i = 0; i < p->n_history; i++) {
		struct journal_entry *e = &list[n - 1 - i];
		struct page_history *h = &p->history[i];

		*h = (struct page_history){.epoch = e->r.epoch, .step = e->r.step, .time_us = e->r.time_us, .uid = e->r.uid,
		    .pid = e->r.pid};
		COPY(h->program, e->r.program);
		COPY(h->why, e->r.why);
		COPY(h->change, e->r.change);
		if (strlen(e->r.change) >= sizeof(h->change))
			memcpy(h->change + sizeof(h->change) - 4, "...", 4);
		COPY(h->result, e->r.unjournaled ? "unjournaled" : e->outcome);
		COPY(h->policy, e->r.policy);
	}
	free(list);
}

static double
deep(const json_t *r, const char *a, const char *b, const char *c)
{
	const json_t *v = json_object_get(json_object_get(json_object_get(r, a), b), c);

	return json_number_value(c != NULL ? v : json_object_get(json_object_get(r, a), b));
}

static int64_t
unix_us(const char *text)
{
	struct tm tm = {0};

	return text != NULL && strptime(text, "%Y-%m-%dT%H:%M:%SZ", &tm) != NULL ? (int64_t)timegm(&tm) * 1000000 : 0;
}

static float
real_of(const json_t *o, const char *key)
{
	const json_t *v = json_object_get(o, key);

	return json_is_number(v) ? (float)json_number_value(v) : NAN;
}

/* "attention.*@0 bf16->fp8, mlp.*@0 bf16->fp8": false if not all went from one format to one other. */
static bool
one_flip(const char *change, char from[12], char to[12])
{
	char a[12], b[12];

	for (const char *part = change; part != NULL;) {
		if (sscanf(part, "%*s %11[^-]->%11[^,]", a, b) != 2 || (part != change && (strcmp(a, from) != 0 || strcmp(b, to) != 0)))
			return false;
		memcpy(from, a, sizeof(a)), memcpy(to, b, sizeof(b));
		part = strstr(part, ", ");
		part += part != NULL ? 2 : 0;
	}
	return true;
}

struct measured {
	float kl, us, error;
};

static void
put_layer(struct octet_page *p, uint32_t l, const struct measured *m)
{
	p->layer_kl[l] = m->kl, p->layer_saved_us[l] = m->us, p->layer_saved_error_us[l] = m->error;
}

static void
put_group(struct octet_page *p, uint32_t g, const struct measured *m)
{
	p->group_kl[g] = m->kl, p->group_saved_us[g] = m->us, p->group_saved_error_us[g] = m->error;
}

static void
put_site(struct octet_page *p, uint32_t g, uint32_t l, const struct measured *m)
{
	p->kl[g][l] = m->kl, p->saved_us[g][l] = m->us, p->saved_error_us[g][l] = m->error;
}

/* What a sweep flipped alone: "mlp.up_proj@3=fp8", a site; "mlp.up_proj=fp8", a group; "*@3=fp8", a layer. What
 * others measured of other formats is not put beside it. */
static void
fill_trial(struct octet_page *p, const json_t *r, int64_t at)
{
	const char *rule = json_string_value(json_object_get(r, "candidate")), *change = json_string_value(json_object_get(r, "change"));
	const json_t *step = json_object_get(r, "step_us");
	struct measured m = {(float)deep(r, "text", "kl", "mean"), real_of(step, "saved"), real_of(step, "saved_error")};
	char name[32], from[12] = "", to[12] = "";
	unsigned l = PAGE_LAYERS;
	int n;

	if (rule == NULL || change == NULL || !one_flip(change, from, to))
		return;
	if (!(m.error > 0)) /* too few rounds to know it */
		m.error = NAN;
	n = sscanf(rule, "%31[^@=]@%u", name, &l);
	if (n < 1 || (n > 1 && l >= p->n_layers))
		return;
	if (strcmp(p->sweep_from, from) != 0 || strcmp(p->sweep_format, to) != 0)
		forget_sweep(p);
	p->sweep_us = at > p->sweep_us ? at : p->sweep_us;
	COPY(p->sweep_from, from);
	COPY(p->sweep_format, to);
	if (n > 1 && strcmp(name, "*") == 0)
		put_layer(p, l, &m);
	for (uint32_t g = 0; g < p->n_groups; g++) {
		if (strcmp(name, p->group[g]) != 0)
			continue;
		if (n == 1)
			put_group(p, g, &m);
		if (json_integer_value(json_object_get(r, "sites")) == 1 && (n > 1 || p->wanted[g][1] == PAGE_NONE))
			put_site(p, g, n == 1 ? 0 : l, &m);
	}
}

/* Only what measured the model that runs. */
static void
fill_evals(struct status *s)
{
	struct octet_page *p = &s->next;
	const json_t *all = evals_all(s->d->evals);
	char digest[17];

	if (s->seen_evals == evals_changes(s->d->evals) + 1)
		return;
	s->seen_evals = evals_changes(s->d->evals) + 1;
	snprintf(digest, sizeof(digest), "%016" PRIx64, s->d->model->digest);
	p->n_evals = 0;
	for (size_t i = 0; i < json_array_size(all); i++) {
		const json_t *r = json_array_get(all, i), *corpus = json_array_get(json_object_get(r, "corpora"), 0);
		const json_t *model = json_object_get(json_object_get(r, "key"), "model_digest");
		int64_t at = unix_us(json_string_value(json_object_get(r, "time")));
		struct page_eval *e = &p->eval[0];

		if (!json_is_string(model) || strcmp(json_string_value(model), digest) != 0 || json_object_get(r, "text") == NULL)
			continue;
		if (json_is_true(json_object_get(r, "sweep"))) {
			fill_trial(p, r, at);
			continue;
		}
		memmove(&p->eval[1], &p->eval[0], (PAGE_EVALS - 1) * sizeof(*e));
		p->n_evals += p->n_evals < PAGE_EVALS;
		*e = (struct page_eval){.time_us = at, .id = (uint64_t)json_integer_value(json_object_get(r, "id")),
		    .tokens = (uint64_t)json_integer_value(json_object_get(json_object_get(r, "text"), "tokens")),
		    .perplexity_base = deep(r, "text", "perplexity", "baseline"), .perplexity = deep(r, "text", "perplexity", "candidate"),
		    .kl_mean = deep(r, "text", "kl", "mean"), .kl_p99 = deep(r, "text", "kl", "p99"), .kl_max = deep(r, "text", "kl", "max"),
		    .top1 = deep(r, "text", "top1", NULL), .tokens_per_s_base = deep(r, "text", "tokens_s", "baseline"),
		    .tokens_per_s = deep(r, "text", "tokens_s", "candidate")};
		COPY(e->baseline, json_string_value(json_object_get(r, "baseline")));
		COPY(e->candidate, json_string_value(json_object_get(r, "candidate")));
		COPY(e->corpus, corpus != NULL ? json_string_value(json_object_get(corpus, "file")) : "");
	}
}

/* ---- shadow, rollout, surge ---- */

static double
number_of(const json_t *o, const char *key)
{
	return json_number_value(json_object_get(o, key));
}

static uint64_t
count_of(const json_t *o, const char *key)
{
	return (uint64_t)json_integer_value(json_object_get(o, key));
}

static const char *
text_of(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));

	return s != NULL ? s : "";
}

static struct page_shadow
shadow_of(const json_t *o)
{
	return (struct page_shadow){count_of(o, "requests"), count_of(o, "tokens"), number_of(o, "kl"), number_of(o, "agree"),
	    number_of(o, "max_kl"), number_of(o, "min_agree")};
}

static struct page_side
side_of(const json_t *o)
{
	return (struct page_side){count_of(o, "requests"), count_of(o, "tokens"), count_of(o, "failed"), number_of(o, "ttft_ms_p50"),
	    number_of(o, "ttft_ms_p99"), number_of(o, "token_ms_p50"), number_of(o, "token_ms_p99")};
}

static void
fill_candidate(struct status *s)
{
	struct plan *plan = journal_plan(s->d->journal, rollout_digest(s->d->rollout));
	struct octet_page *p = &s->next;

	memset(p->candidate, PAGE_NONE, sizeof(p->candidate));
	for (int g = 0; plan != NULL && g < N_GROUPS; g++)
		for (uint32_t l = 0; l < (g == GROUP_LM_HEAD ? 1 : p->n_layers); l++)
			p->candidate[g][l] = (uint8_t)plan_at(plan, g, l);
	plan_unref(&plan);
}

static void
fill_trials(struct status *s)
{
	struct octet_page *p = &s->next;
	json_t *shadow = shadow_json(s->d->shadow), *rollout = rollout_json(s->d->rollout), *surge = surge_json(s->d->rollout);
	const json_t *guard = json_object_get(rollout, "guard");

	p->shadow_sample = number_of(shadow, "sample");
	COPY(p->shadow_baseline, text_of(shadow, "baseline"));
	p->shadow_scored = count_of(shadow, "scored"), p->shadow_waiting = count_of(shadow, "waiting");
	p->shadow_dropped = count_of(shadow, "dropped"), p->shadow_cooldown_s = (uint32_t)count_of(shadow, "cooldown_s");
	p->shadow = shadow_of(json_object_get(shadow, "active"));
	COPY(p->rollout, text_of(rollout, "policy"));
	p->rollout_epoch = count_of(rollout, "epoch"), p->rollout_percent = number_of(rollout, "percent");
	p->rollout_by_request = strcmp(text_of(rollout, "by"), "request") == 0;
	p->guard_kl = number_of(guard, "kl"), p->guard_agree = number_of(guard, "agree"), p->guard_p99 = number_of(guard, "p99_ms");
	p->side[0] = side_of(json_object_get(rollout, "baseline")), p->side[1] = side_of(json_object_get(rollout, "candidate"));
	p->candidate_shadow = shadow_of(json_object_get(rollout, "shadow"));
	COPY(p->surge_policy, text_of(surge, "policy"));
	COPY(p->surge_state, text_of(surge, "state"));
	p->surges = count_of(surge, "surges");
	json_decref(shadow), json_decref(rollout), json_decref(surge);
	fill_candidate(s);
}

/* Readers copy until seq is even and unchanged. */
static void
publish(struct status *s)
{
	struct octet_page *p = s->page;
	uint32_t seq = __atomic_load_n(&p->seq, __ATOMIC_RELAXED);

	s->next.updated_us = octetd_now_us();
	s->next.seq = seq + 1;
	__atomic_store_n(&p->seq, seq + 1, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	memcpy(p, &s->next, sizeof(*p));
	__atomic_store_n(&p->seq, seq + 2, __ATOMIC_RELEASE);
}

static void
refresh(struct status *s)
{
	fill_plan(s);
	fill_stats(s);
	fill_rates(s);
	fill_history(s);
	fill_evals(s);
	s->next.n_clients = server_clients(s->d->server, s->next.client, PAGE_CLIENTS);
	if (s->next.n_clients > PAGE_CLIENTS)
		s->next.n_clients = PAGE_CLIENTS;
	if (s->refreshes++ % SLOW_EVERY == 0) {
		fill_times(s);
		fill_trials(s);
	}
	log_recent(s->next.log, &s->next.n_log);
	publish(s);
}

static void
on_timer(uv_timer_t *t)
{
	refresh(t->data);
}

/* ---- life ---- */

static int
make_page(struct status *s, struct err *err)
{
	char self[64];
	void *p;

	s->fd = memfd_create("octet-status", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (s->fd < 0)
		return err_set(err, -errno, "status page: %s", strerror(errno));
	if (ftruncate(s->fd, sizeof(*s->page)) != 0)
		return err_set(err, -errno, "status page: %s", strerror(errno));
	p = mmap(NULL, sizeof(*s->page), PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
	if (p == MAP_FAILED)
		return err_set(err, -errno, "status page: %s", strerror(errno));
	s->page = p;
	if (fcntl(s->fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
		return err_set(err, -errno, "status page: cannot be sealed (Linux 5.1 or later is needed): %s",
		    strerror(errno));
	/* The seal holds for every descriptor; a read-only one is only cleaner. */
	snprintf(self, sizeof(self), "/proc/self/fd/%d", s->fd);
	s->read_fd = open(self, O_RDONLY | O_CLOEXEC);
	return 0;
}

static void
on_closed(uv_handle_t *h)
{
	struct status *s = h->data;

	if (s->page != NULL)
		munmap(s->page, sizeof(*s->page));
	if (s->fd >= 0)
		close(s->fd);
	if (s->read_fd >= 0)
		close(s->read_fd);
	free(s);
}

int
status_new(struct status **out, struct octetd *d, struct err *err)
{
	struct status *s = calloc(1, sizeof(*s));
	int rc;

	*out = NULL;
	if (s == NULL)
		return err_set(err, -ENOMEM, "no memory for the status page");
	s->d = d;
	s->fd = s->read_fd = -1;
	uv_timer_init(&d->loop, &s->timer);
	s->timer.data = s;
	rc = make_page(s, err);
	if (rc != 0) {
		status_free(&s);
		return rc;
	}
	fill_fixed(s);
	*out = s;
	return 0;
}

void
status_free(struct status **sp)
{
	if (*sp != NULL)
		uv_close((uv_handle_t *)&(*sp)->timer, on_closed);
	*sp = NULL;
}

int
status_fd(const struct status *s)
{
	return s->read_fd >= 0 ? s->read_fd : s->fd;
}

void
status_watch(struct status *s)
{
	if (s->watchers++ == 0) {
		s->n_samples = 0, s->refreshes = 0;
		uv_timer_start(&s->timer, on_timer, REFRESH_MS, REFRESH_MS);
	}
	refresh(s);
}

void
status_unwatch(struct status *s)
{
	if (--s->watchers == 0)
		uv_timer_stop(&s->timer);
}
