/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/batch.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/device.h"

static void
free_segments(struct segment *seg, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		plan_unref(&seg[i].plan);
	free(seg);
}

static void
seq_free(struct seq *s)
{
	if (s == NULL)
		return;
	plan_unref(&s->plan);
	free_segments(s->seg, s->n_seg);
	kv_seq_free(&s->kv);
	free(s->token);
	free(s);
}

void
request_free(struct request **rp)
{
	struct request *r = *rp;

	if (r == NULL)
		return;
	seq_free(r->seq);
	plan_unref(&r->plan);
	free_segments(r->replay, r->n_replay);
	free(r->sampling.bias);
	free(r->prompt);
	free(r);
	*rp = NULL;
}

const uint32_t *
request_tokens(const struct request *r, uint32_t *n)
{
	*n = r->seq->n_known;
	return r->seq->token;
}

uint32_t
request_segments(const struct request *r, const struct segment **seg)
{
	*seg = r->seq->seg;
	return r->seq->n_seg;
}

/* ---- between steps ---- */

/* Those of a rollout follow the active plan from here on. */
static void
retire(struct engine *e, struct request *r)
{
	if (!r->rollout || r->plan == NULL)
		return;
	plan_unref(&r->plan);
	if (r->seq->plan != NULL)
		seq_set_plan(r->seq, e->plan, e->epoch);
}

static void
retire_rollout(struct engine *e)
{
	for (uint32_t i = 0; i < e->n_running; i++)
		retire(e, e->running[i]->req);
	FOR_EACH_WAITING(e, r)
		retire(e, r);
}


static void
apply_flip(struct engine *e, struct flip *f)
{
	if (f->retire_rollout) {
		retire_rollout(e);
		return;
	}
	plan_unref(&e->plan);
	e->plan = plan_ref(f->plan);
	e->epoch = f->epoch;
	for (uint32_t i = 0; i < e->n_running; i++) {
		struct seq *s = e->running[i];

		if (!seq_has_own_plan(s) && (!e->cfg.pin || f->force))
			seq_set_plan(s, e->plan, e->epoch);
	}
	/* Preempted sequences are among those that wait. */
	FOR_EACH_WAITING(e, r)
		if (r->seq->plan != NULL && !seq_has_own_plan(r->seq) && (!e->cfg.pin || f->force))
			seq_set_plan(r->seq, e->plan, e->epoch);
	f->step = e->step + 1;
}

static bool
is_cancelled(const struct request *r)
{
	return __atomic_load_n(&r->cancelled, __ATOMIC_ACQUIRE) != 0;
}

/* Returns false when the engine is to stop. */
static bool
take_mail(struct engine *e)
{
	struct request *posted;
	struct flip *flips;
	struct probe *probes;
	bool stop;

	if (!__atomic_exchange_n(&e->mail, 0, __ATOMIC_ACQUIRE))
		return true;
	pthread_mutex_lock(&e->lock);
	posted = e->posted, flips = e->flips, probes = e->probes_posted, stop = e->stop;
	e->posted = NULL, e->posted_end = &e->posted;
	e->probes_posted = NULL, e->probes_posted_end = &e->probes_posted;
	e->flips = NULL, e->flips_end = &e->flips;
	if (e->new_cfg) {
		e->cfg = e->front_cfg;
		e->new_cfg = false;
	}
	pthread_mutex_unlock(&e->lock);

	for (struct request *r = posted, *next; r != NULL; r = next) {
		next = r->next;
		seq_set_state(r->seq, SEQ_QUEUED);
		batch_queue(e, r, false);
		if (is_cancelled(r))
			e->n_cancels--; /* it may have been looked for before it came */
	}
	if (probes != NULL) {
		struct probe **end = &e->probes;

		while (*end != NULL)
			end = &(*end)->next;
		*end = probes;
	}
	if (flips != NULL) {
		struct flip **end = &flips;

		for (struct flip *f = flips; f != NULL; f = f->next) {
			apply_flip(e, f);
			end = &f->next;
		}
		pthread_mutex_lock(&e->lock);
		*e->applied_end = flips;
		e->applied_end = end;
		pthread_mutex_unlock(&e->lock);
		pthread_mutex_lock(&e->stats_lock);
		e->stats.epoch = e->epoch;
		e->stats.plan_digest = e->plan->digest;
		pthread_mutex_unlock(&e->stats_lock);
		engine_notify(e);
	}
	return !stop;
}

static void
drop_cancelled_waiting(struct engine *e)
{
	for (struct request **first = &e->waiting; *first != NULL;) {
		struct request *head = *first, *r, *last = head;

		if (is_cancelled(head)) {
			batch_unqueue(first);
			__atomic_sub_fetch(&e->n_queued, 1, __ATOMIC_RELAXED);
			batch_finish(e, head, WIRE_FINISH_CANCELLED, 0);
			continue;
		}
		while ((r = last->next) != NULL) {
			if (!is_cancelled(r)) {
				last = r;
				continue;
			}
			last->next = r->next;
			__atomic_sub_fetch(&e->n_queued, 1, __ATOMIC_RELAXED);
			batch_finish(e, r, WIRE_FINISH_CANCELLED, 0);
		}
		head->last = last;
		first = &head->next_client;
	}
}

static void
drop_cancelled(struct engine *e)
{
	uint32_t cancels = __atomic_load_n(&e->cancels, __ATOMIC_ACQUIRE);

	probe_drop_cancelled(e);
	if (cancels == e->n_cancels)
		return;
	e->n_cancels = cancels;
	for (uint32_t i = 0; i < e->n_running;) {
		struct request *r = e->running[i]->req;

		if (is_cancelled(r))
			batch_end(e, r->seq, WIRE_FINISH_CANCELLED, 0);
		else
			i++;
	}
	drop_cancelled_waiting(e);
}

static void
wait_for_mail(struct engine *e)
{
	double end = engine_now_ms() + e->cfg.spin_us / 1e3;

	do {
		for (int i = 0; i < 64; i++) {
			if (__atomic_load_n(&e->mail, __ATOMIC_ACQUIRE))
				return;
			__builtin_ia32_pause();
		}
		sched_yield(); /* where cores are few, to the app that is about to post */
	} while (engine_now_ms() < end);
	pthread_mutex_lock(&e->lock);
	e->sleeping = true;
	while (!__atomic_load_n(&e->mail, __ATOMIC_ACQUIRE))
		pthread_cond_wait(&e->wake, &e->lock);
	e->sleeping = false;
	pthread_mutex_unlock(&e->lock);
}

/* How long the oldest request waits. */
static double
oldest_ms(const struct engine *e)
{
	const struct request *oldest = e->waiting;

	for (const struct request *r = oldest; r != NULL; r = r->next_client)
		if (r->submitted_ms < oldest->submitted_ms)
			oldest = r;
	return oldest == NULL ? 0 : engine_now_ms() - oldest->submitted_ms;
}

static void
note_state(struct engine *e)
{
	pthread_mutex_lock(&e->stats_lock);
	e->stats.step = e->step - e->n_under_way;
	e->stats.running = e->n_running;
	e->stats.queued = __atomic_load_n(&e->n_queued, __ATOMIC_RELAXED);
	e->stats.kv_pages_used = e->kv.n_used - e->kv.n_idle_pages;
	e->stats.kv_pages_cached = e->kv.n_idle_pages;
	e->stats.prefix_hit_tokens = e->kv.hit_tokens;
	e->stats.prefix_evictions = e->kv.evictions;
	e->stats.preemptions = e->preemptions;
	e->stats.queue_ms = oldest_ms(e);
	pthread_mutex_unlock(&e->stats_lock);
}

static void *
engine_main(void *arg)
{
	struct engine *e = arg;

	team_pin_caller(e->team);
	kernels_thread_init();
	while (take_mail(e)) {
		drop_cancelled(e);
		batch_admit(e);
		note_state(e);
		if (!step_run(e))
			wait_for_mail(e);
	}
	step_finish(e);
	while (e->n_running > 0)
		batch_end(e, e->running[0], WIRE_FINISH_CANCELLED, 0);
	while (e->waiting != NULL) {
		struct request *r = e->waiting;

		batch_unqueue(&e->waiting);
		batch_finish(e, r, WIRE_FINISH_CANCELLED, 0);
	}
	probe_finish_all(e, -ECANCELED);
	return NULL;
}

/* ---- the front's side ---- */

uint64_t
engine_kv_bytes(const struct model_shape *s, const struct engine_config *cfg)
{
	uint64_t page = kv_page_bytes(s), pages = cfg->kv_bytes / page;

	return pages < (uint64_t)2 * s->n_layers ? 0 : pages * page;
}

static int
allocate(struct engine *e, struct err *err)
{
	uint32_t parts = team_size(e->team), rows = e->cfg.max_batch_tokens;
	int rc = kv_new(&e->kv, &e->m->shape, e->cfg.kv_bytes, err);

	if (rc != 0)
		return rc;
	rc = forward_new(&e->forward, e->m, e->ops, e->team, &e->kv, rows, err);
	if (rc != 0)
		return rc;
	if (e->cfg.device != NULL) {
		rc = device_load(e->cfg.device, e->m, &e->kv, rows, e->cfg.device_options, err);
		if (rc != 0)
			return rc;
		forward_use_device(e->forward, e->cfg.device);
	}
	e->running = calloc(e->max_seqs, sizeof(*e->running));
	e->pick = calloc(e->max_seqs, sizeof(*e->pick));
	e->row = calloc(rows, sizeof(*e->row));
	e->result = calloc(rows, sizeof(*e->result));
	e->scratch = calloc(parts, sizeof(*e->scratch));
	if (evidence_new(&e->evidence, e->m->shape.n_layers) != 0 ||
	    evidence_new(&e->evidence_seen, e->m->shape.n_layers) != 0)
		return err_set(err, -ENOMEM, "no memory for evidence");
	for (uint32_t i = 0; i < KD_AHEAD; i++) {
		e->steps[i].part = calloc(e->max_seqs, sizeof(*e->steps[i].part));
		e->steps[i].want = calloc(rows, sizeof(*e->steps[i].want));
		if (e->steps[i].part == NULL || e->steps[i].want == NULL)
			return err_set(err, -ENOMEM, "no memory for a batch of %u rows", rows);
	}
	if (e->running == NULL || e->pick == NULL || e->row == NULL || e->result == NULL || e->scratch == NULL)
		return err_set(err, -ENOMEM, "no memory for a batch of %u rows", rows);
	for (uint32_t i = 0; i < parts; i++)
		if (sample_scratch_new(&e->scratch[i], e->ops, e->m->shape.vocab) != 0)
			return err_set(err, -ENOMEM, "no memory for sampling");
	return 0;
}

int
engine_new(struct engine **out, const struct model *m, const struct k_ops *ops, struct team *team,
    const struct engine_config *cfg, struct plan *plan, uint64_t epoch, struct err *err)
{
	struct engine *e = calloc(1, sizeof(*e));
	int rc;

	*out = NULL;
	if (e == NULL)
		return err_set(err, -ENOMEM, "no memory for the engine");
	e->m = m, e->ops = ops, e->team = team, e->cfg = e->front_cfg = *cfg, e->epoch = epoch;
	e->max_seqs = cfg->max_batch < cfg->max_batch_tokens ? cfg->max_batch : cfg->max_batch_tokens;
	e->plan = plan_ref(plan);
	e->posted_end = &e->posted, e->flips_end = &e->flips;
	e->finished_end = &e->finished, e->applied_end = &e->applied;
	e->probes_posted_end = &e->probes_posted, e->probes_done_end = &e->probes_done;
	pthread_mutex_init(&e->lock, NULL);
	pthread_cond_init(&e->wake, NULL);
	pthread_mutex_init(&e->stats_lock, NULL);

	rc = allocate(e, err);
	if (rc == 0) {
		e->stats = (struct engine_stats){.epoch = epoch, .plan_digest = plan->digest, .kv_pages = e->kv.n_pages,
		    .kv_page_tokens = KV_PAGE_TOKENS, .kv_bytes = e->kv.bytes};
		rc = team_thread(&e->thread, engine_main, e);
		e->started = rc == 0;
		if (rc != 0)
			err_set(err, rc, "engine thread: %s", strerror(-rc));
	}
	if (rc != 0)
		engine_free(&e);
	*out = e;
	return rc;
}

/* Call with the lock held. */
static void
post(struct engine *e)
{
	__atomic_store_n(&e->mail, 1, __ATOMIC_RELEASE);
	if (e->sleeping)
		pthread_cond_signal(&e->wake);
}

void
engine_free(struct engine **ep)
{
	struct engine *e = *ep;

	if (e == NULL)
		return;
	if (e->started) {
		pthread_mutex_lock(&e->lock);
		e->stop = true;
		post(e);
		pthread_mutex_unlock(&e->lock);
		pthread_join(e->thread, NULL);
	}
	forward_free(&e->forward);
	kv_free(&e->kv);
	evidence_free(&e->evidence);
	evidence_free(&e->evidence_seen);
	for (uint32_t i = 0; e->scratch != NULL && i < team_size(e->team); i++)
		sample_scratch_free(&e->scratch[i]);
	plan_unref(&e->plan);
	pthread_mutex_destroy(&e->lock);
	pthread_cond_destroy(&e->wake);
	pthread_mutex_destroy(&e->stats_lock);
	free(e->running), free(e->pick), free(e->row), free(e->result), free(e->scratch);
	for (uint32_t i = 0; i < KD_AHEAD; i++)
		free(e->steps[i].part), free(e->steps[i].want);
	free(e);
	*ep = NULL;
}

/* Of a sequence in BF16; a window bounds it. */
static uint64_t
most_pages(const struct engine *e, uint32_t tokens)
{
	uint32_t window = e->m->shape.window;

	if (window != 0 && tokens > window + e->front_cfg.max_batch_tokens + KV_PAGE_TOKENS)
		tokens = window + e->front_cfg.max_batch_tokens + KV_PAGE_TOKENS;
	return (uint64_t)kv_blocks_for(tokens) * 2 * e->m->shape.n_layers;
}

/* A replay knows all its segments from the start; the last has no end. */
static int
take_replay(struct seq *s, const struct request *r)
{
	for (uint32_t i = 0; i < r->n_replay; i++)
		if (seq_add_segment(s, r->replay[i].from, r->replay[i].plan, r->replay[i].epoch) != 0)
			return -ENOMEM;
	if (r->n_replay > 0) {
		s->n_fixed = UINT32_MAX;
		s->plan = plan_ref(r->replay[0].plan);
		s->epoch = r->replay[0].epoch;
	}
	return 0;
}

int
engine_submit(struct engine *e, struct request *r, struct err *err)
{
	uint32_t context = e->m->shape.max_context, n_max;
	struct seq *s;

	if (r->n_prompt == 0 || r->n_prompt > context - (r->sampling.max_tokens > 0))
		return err_set(err, -E2BIG, "prompt of %u tokens: the context holds %u with at least one of output",
		    r->n_prompt, context);
	n_max = r->sampling.max_tokens < context - r->n_prompt ? r->n_prompt + r->sampling.max_tokens : context;
	if (most_pages(e, n_max) > e->kv.n_pages)
		return err_set(err, -E2BIG, "%u tokens of prompt and output: the KV cache holds %llu", n_max,
		    (unsigned long long)(e->kv.n_pages / (2 * e->m->shape.n_layers)) * KV_PAGE_TOKENS);
	if (__atomic_load_n(&e->n_queued, __ATOMIC_RELAXED) >= e->front_cfg.max_queue)
		return err_set(err, -EBUSY, "busy: %u requests are queued", e->front_cfg.max_queue);

	s = calloc(1, sizeof(*s));
	if (s == NULL)
		return err_set(err, -ENOMEM, "no memory for a request");
	s->token = malloc((size_t)n_max * sizeof(*s->token));
	if (s->token == NULL || kv_seq_new(&s->kv, e->m->shape.n_layers, n_max) != 0 || take_replay(s, r) != 0) {
		seq_free(s);
		return err_set(err, -ENOMEM, "no memory for a request of %u tokens", n_max);
	}
	memcpy(s->token, r->prompt, (size_t)r->n_prompt * sizeof(*s->token));
	s->req = r, s->n_known = r->n_prompt, s->n_max = n_max;
	r->seq = s;
	r->submitted_ms = engine_now_ms();
	r->next = NULL;
	__atomic_add_fetch(&e->n_queued, 1, __ATOMIC_RELAXED);
	pthread_mutex_lock(&e->lock);
	s->order = e->order++;
	*e->posted_end = r;
	e->posted_end = &r->next;
	post(e);
	pthread_mutex_unlock(&e->lock);
	return 0;
}

void
engine_cancel(struct engine *e, struct request *r)
{
	__atomic_store_n(&r->cancelled, 1, __ATOMIC_RELEASE);
	__atomic_add_fetch(&e->cancels, 1, __ATOMIC_RELEASE);
	engine_kick(e);
}

void
engine_kick(struct engine *e)
{
	pthread_mutex_lock(&e->lock);
	post(e);
	pthread_mutex_unlock(&e->lock);
}

void
engine_flip(struct engine *e, struct flip *f)
{
	f->next = NULL;
	pthread_mutex_lock(&e->lock);
	*e->flips_end = f;
	e->flips_end = &f->next;
	post(e);
	pthread_mutex_unlock(&e->lock);
}

void
engine_configure(struct engine *e, const struct engine_config *cfg)
{
	struct engine_config next = *cfg;

	/* What buffers were sized by stays. */
	next.max_batch_tokens = e->front_cfg.max_batch_tokens;
	next.max_batch = e->front_cfg.max_batch;
	next.kv_bytes = e->front_cfg.kv_bytes;
	next.threads = e->front_cfg.threads;
	next.device = e->front_cfg.device;
	pthread_mutex_lock(&e->lock);
	e->front_cfg = next;
	e->new_cfg = true;
	post(e);
	pthread_mutex_unlock(&e->lock);
}

bool
engine_has_news(struct engine *e)
{
	return __atomic_load_n(&e->back, __ATOMIC_RELAXED) != 0 && __atomic_exchange_n(&e->back, 0, __ATOMIC_SEQ_CST) != 0;
}

struct request *
engine_reap(struct engine *e)
{
	struct request *r;

	pthread_mutex_lock(&e->lock);
	r = e->finished;
	e->finished = NULL, e->finished_end = &e->finished;
	pthread_mutex_unlock(&e->lock);
	return r;
}

struct flip *
engine_reap_flips(struct engine *e)
{
	struct flip *f;

	pthread_mutex_lock(&e->lock);
	f = e->applied;
	e->applied = NULL, e->applied_end = &e->applied;
	pthread_mutex_unlock(&e->lock);
	return f;
}

static int
by_value(const void *pa, const void *pb)
{
	float a = *(const float *)pa, b = *(const float *)pb;

	return a < b ? -1 : a > b;
}

void
engine_stats(struct engine *e, struct engine_stats *out)
{
	float ms[STEP_WINDOW];
	uint32_t n;

	pthread_mutex_lock(&e->stats_lock);
	*out = e->stats;
	n = e->n_step_ms < STEP_WINDOW ? e->n_step_ms : STEP_WINDOW;
	memcpy(ms, e->step_ms, n * sizeof(*ms));
	pthread_mutex_unlock(&e->stats_lock);
	if (n == 0)
		return;
	qsort(ms, n, sizeof(*ms), by_value);
	out->step_ms_p50 = ms[n / 2];
	out->step_ms_p90 = ms[n * 9 / 10];
	out->step_ms_p99 = ms[n * 99 / 100];
	out->step_ms_max = ms[n - 1];
}

void
engine_evidence(struct engine *e, enum plan_group g, uint32_t layer, struct evidence_site *out)
{
	pthread_mutex_lock(&e->stats_lock);
	evidence_read(e->evidence_seen, g, layer, out);
	pthread_mutex_unlock(&e->stats_lock);
}

enum plan_format
engine_executed(const struct engine *e, const struct plan *p, enum plan_group g, uint32_t layer)
{
	enum plan_format f = plan_at(p, g, layer);

	/* The CPU runs every format at every site. */
	return e->front_cfg.device != NULL ? device_executes(e->front_cfg.device, g, layer, f) : f;
}

struct device *
engine_device(const struct engine *e)
{
	return e->front_cfg.device;
}
