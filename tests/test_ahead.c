/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine with a device, where the next step is chosen while one runs: on the
 * device of sim-device.c, whose every token can be foretold from the prompt and
 * the segments that the app was told of. Requests of all kinds come, go, are
 * cancelled, preempted, parked, and flips fall in between.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/engine/device.h"
#include "daemon/engine/engine.h"
#include "daemon/engine/evidence.h"
#include "daemon/engine/probe.h"
#include "tests/sim-device.h"

#define MAX_EVENTS 2048u /* of MAX_PROMPT + MAX_OUTPUT tokens with six alternatives, and segments */
#define MAX_PROMPT 150u
#define MAX_OUTPUT 80u
#define REQUESTS 48u
#define MAX_FLIPS 1000u

enum { PLANS = 5 };

/* A request with what is known of it, and its sink: a ring that holds `cap` events more than were read. */
struct asked {
	struct fixture *f;
	struct request *r;
	uint32_t prompt[MAX_PROMPT], n_prompt, at;
	struct sampling sampling;
	struct wire_event ev[MAX_EVENTS];
	uint32_t n, read, cap, parked; /* atomic but for cap */
	struct probe *probe; /* posted at the fifth token, over before the last */
	bool fails;
};

struct fixture {
	struct team *team;
	struct device *device;
	struct engine *e;
	pthread_mutex_t lock;
	pthread_cond_t cond;
	bool notified;
	struct asked *asked; /* [n_asked] */
	uint32_t n_asked, n_back, n_probes;
	struct probe *probe; /* the last that is out */
	struct flip **flip;  /* [n_flips] all that were posted; NULL: it is back */
	uint32_t n_flips;
	uint64_t epoch, random;
};

static struct model *model;
static struct plan *plans[PLANS];

static uint32_t
pick(struct fixture *f, uint32_t n)
{
	f->random = f->random * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(f->random >> 33) % n;
}

static void
notify(void *arg)
{
	struct fixture *f = arg;

	pthread_mutex_lock(&f->lock);
	f->notified = true;
	pthread_cond_signal(&f->cond);
	pthread_mutex_unlock(&f->lock);
}

static void
wait_notified(struct fixture *f)
{
	struct timespec ts;
	int rc = 0;

	clock_gettime(CLOCK_REALTIME, &ts);
	ts.tv_sec += 120;
	pthread_mutex_lock(&f->lock);
	while (!f->notified && rc == 0)
		rc = pthread_cond_timedwait(&f->cond, &f->lock, &ts);
	f->notified = false;
	pthread_mutex_unlock(&f->lock);
	assert_int_equal(rc, 0);
}

/* ---- sinks ---- */

static uint32_t
sink_room(void *arg)
{
	struct asked *a = arg;

	return a->cap - (__atomic_load_n(&a->n, __ATOMIC_ACQUIRE) - __atomic_load_n(&a->read, __ATOMIC_ACQUIRE));
}

static void
sink_put(void *arg, const struct wire_event *ev)
{
	struct asked *a = arg;

	if (sink_room(a) == 0 || a->n == MAX_EVENTS)
		abort(); /* the engine had to look */
	if (a->probe != NULL && a->n == 5 && engine_probe(a->f->e, a->probe, NULL) != 0)
		abort();
	if (a->probe != NULL && ev->kind == WIRE_EV_DONE && a->probe->n_scored + 1 < a->probe->n)
		abort();
	a->ev[a->n] = *ev;
	__atomic_store_n(&a->n, a->n + 1, __ATOMIC_RELEASE);
}

static void
sink_parked(void *arg, bool parked)
{
	struct asked *a = arg;

	__atomic_store_n(&a->parked, parked, __ATOMIC_SEQ_CST);
	if (parked)
		notify(a->f);
}

static void sink_flush(void *arg) { (void)arg; }

static void
read_all(struct fixture *f)
{
	bool parked = false;

	for (uint32_t i = 0; i < f->n_asked; i++) {
		struct asked *a = &f->asked[i];

		__atomic_store_n(&a->read, __atomic_load_n(&a->n, __ATOMIC_ACQUIRE), __ATOMIC_SEQ_CST);
		parked |= __atomic_load_n(&a->parked, __ATOMIC_SEQ_CST) != 0;
	}
	if (parked)
		engine_kick(f->e);
}

/* ---- what must have come out ---- */

static uint64_t
digest_at(const struct asked *a, uint32_t pos)
{
	uint64_t digest = 0;

	for (uint32_t i = 0; i < a->n; i++)
		if (a->ev[i].kind == WIRE_EV_SEGMENT && a->ev[i].position <= pos)
			digest = a->ev[i].a;
	assert_true(digest != 0);
	return digest;
}

static uint64_t
edits(const struct asked *a, const uint32_t *token, uint32_t n)
{
	static uint32_t count[65536];
	static bool seen[65536];
	uint64_t sum = 0;

	if (a->sampling.repetition_penalty == 0)
		return 0;
	for (uint32_t i = 0; i < n; i++)
		count[token[i]] = 0, seen[token[i]] = false;
	for (uint32_t i = a->n_prompt; i < n; i++)
		count[token[i]]++;
	for (uint32_t i = 0; i < n; i++) {
		if (!seen[token[i]])
			sum += sim_edit(token[i], count[token[i]], true, 0);
		seen[token[i]] = true;
	}
	return sum;
}

static void
check(const struct asked *a)
{
	const struct wire_event *done = &a->ev[a->n - 1];
	uint32_t token[MAX_PROMPT + MAX_OUTPUT], n = a->n_prompt, n_prompt_events = 0, n_segments = 0, n_top = a->sampling.top_logprobs, finish;
	const struct segment *seg;
	uint64_t state = 0;
	uint32_t ran = 0;
	struct sim_drawn next;

	assert_true(a->n > 0);
	assert_int_equal(done->kind, WIRE_EV_DONE);
	finish = done->token;
	memcpy(token, a->prompt, n * sizeof(*token));
	for (uint32_t i = 0; i + 1 < a->n; i++) {
		const struct wire_event *ev = &a->ev[i];

		n_segments += ev->kind == WIRE_EV_SEGMENT;
		if (ev->kind == WIRE_EV_SEGMENT)
			continue;
		if (ev->kind == WIRE_EV_TOP) {
			assert_int_equal(ev->token, n_top++);
			continue;
		}
		assert_int_equal(n_top, a->sampling.top_logprobs);
		n_top = 0;
		for (; ran < ev->position; ran++)
			state = sim_state(state, token[ran], digest_at(a, ran));
		if (ev->kind == WIRE_EV_PROMPT) {
			assert_int_equal(ev->position, ++n_prompt_events);
			assert_int_equal(ev->token, token[ev->position]);
			assert_true(ev->logprob == sim_score(state, ev->token));
			continue;
		}
		assert_int_equal(ev->kind, WIRE_EV_TOKEN);
		assert_int_equal(ev->position, n);
		next = sim_draw(state, a->sampling.seed, n, edits(a, token, n), model->shape.vocab);
		assert_int_equal(ev->token, next.token);
		assert_true(ev->logprob == next.logprob);
		assert_true(a->sampling.ignore_eos || ev->token != SIM_EOS);
		assert_false(a->sampling.seed == SIM_BAD_SEED && n == SIM_BAD_POSITION);
		token[n++] = ev->token;
	}
	assert_int_equal(a->r->n_output, n - a->n_prompt);
	if (a->fails)
		assert_int_equal(finish, WIRE_FINISH_ERROR);
	if (finish == WIRE_FINISH_CANCELLED || a->fails)
		return;
	assert_int_equal(request_segments(a->r, &seg), a->r->n_replay > 0 ? a->r->n_replay : n_segments);
	if (a->sampling.prompt_logprobs)
		assert_int_equal(n_prompt_events, a->n_prompt - 1);
	if (finish == WIRE_FINISH_LENGTH) {
		assert_int_equal(n, a->n_prompt + a->sampling.max_tokens);
		return;
	}
	for (; ran < n; ran++)
		state = sim_state(state, token[ran], digest_at(a, ran));
	if (finish == WIRE_FINISH_ERROR) {
		assert_true(a->sampling.seed == SIM_BAD_SEED);
		assert_int_equal(n, SIM_BAD_POSITION);
		assert_int_equal(done->a, (uint64_t)(6 << 16 | 1) << 32 | EDOM);
		return;
	}
	assert_int_equal(finish, WIRE_FINISH_STOP);
	next = sim_draw(state, a->sampling.seed, n, edits(a, token, n), model->shape.vocab);
	assert_int_equal(next.token, SIM_EOS);
}

/* Frees the logits that a probe kept. */
static void
check_probe(const struct probe *p)
{
	for (int s = 0; s < N_SIDES && p->error == 0 && p->dump[s] != NULL; s++) {
		uint64_t state = 0;

		for (uint32_t i = 0; i + 1 < p->n; i++) {
			state = sim_state(state, p->token[i], p->plan[s]->digest);
			for (uint32_t v = 0; v < model->shape.vocab; v++)
				assert_true(p->dump[s][(size_t)i * model->shape.vocab + v] == sim_logit(state, v));
		}
	}
	free(p->dump[0]), free(p->dump[1]);
}

/* ---- an engine, and what is asked of it ---- */

static void
start(struct fixture *f, struct engine_config *cfg, uint64_t seed)
{
	static const struct device_options options;
	struct err err;

	memset(f, 0, sizeof(*f));
	f->random = seed;
	f->asked = calloc(REQUESTS, sizeof(*f->asked));
	f->flip = calloc(MAX_FLIPS, sizeof(*f->flip));
	pthread_mutex_init(&f->lock, NULL);
	pthread_cond_init(&f->cond, NULL);
	if (device_open(&f->device, "sim", (uint32_t)seed, &err) != 0)
		fail_msg("%s", err.text);
	assert_int_equal(team_new(&f->team, 1, 50), 0);
	cfg->device = f->device, cfg->device_options = &options;
	cfg->spin_us = 20, cfg->max_queue = REQUESTS, cfg->notify = notify, cfg->notify_arg = f;
	f->epoch = 1;
	if (engine_new(&f->e, model, kernels_select(NULL, NULL, 0), f->team, cfg, plans[0], f->epoch, &err) != 0)
		fail_msg("%s", err.text);
}

static void
free_flip(struct flip **at)
{
	if (*at == NULL)
		return;
	plan_unref(&(*at)->plan);
	free(*at);
	*at = NULL;
}

static void
reap(struct fixture *f)
{
	struct request *r = engine_reap(f->e);
	struct flip *fl = engine_reap_flips(f->e);
	struct probe *p = engine_reap_probes(f->e);

	for (struct request *next; r != NULL; r = next) {
		struct asked *a = r->owner;

		next = r->next;
		check(a);
		request_free(&a->r);
		f->n_back++;
	}
	for (struct flip *next; fl != NULL; fl = next) {
		next = fl->next;
		free_flip(fl->owner);
	}
	for (struct probe *next; p != NULL; p = next) {
		next = p->next;
		assert_true(p->error == 0 || p->error == -ECANCELED || p->error == -ENOSPC);
		check_probe(p);
		f->probe = f->probe == p ? NULL : f->probe;
		f->n_probes--;
		if (p->owner == NULL) /* else its request looks at it yet */
			probe_free(&p);
	}
}

static void
reap_all(struct fixture *f)
{
	for (;;) {
		read_all(f);
		reap(f);
		if (f->n_back == f->n_asked && f->n_probes == 0)
			return;
		wait_notified(f);
	}
}

static void
stop(struct fixture *f, struct kd_status *status)
{
	engine_free(&f->e);
	device_status(f->device, status);
	device_close(&f->device);
	team_free(&f->team);
	for (uint32_t i = 0; i < f->n_asked; i++) /* those that were under way */
		request_free(&f->asked[i].r);
	if (f->probe != NULL)
		check_probe(f->probe);
	probe_free(&f->probe);
	for (uint32_t i = 0; i < f->n_flips; i++)
		free_flip(&f->flip[i]);
	free(f->flip);
	free(f->asked);
}

static struct asked *
ask(struct fixture *f, uint32_t n_prompt, uint32_t max_tokens)
{
	struct asked *a = &f->asked[f->n_asked];

	a->f = f, a->cap = MAX_EVENTS, a->n_prompt = n_prompt;
	for (uint32_t i = 0; i < n_prompt; i++) /* beginnings are often those of others */
		a->prompt[i] = i < 100 ? 10 + i % 7 : pick(f, model->shape.vocab);
	a->sampling = (struct sampling){.max_tokens = max_tokens, .top_p = 1, .ignore_eos = true, .logprobs = true};
	return a;
}

static void
submit(struct fixture *f, struct asked *a)
{
	struct request *r = a->r = calloc(1, sizeof(*r));
	struct err err;

	r->prompt = malloc(a->n_prompt * sizeof(*r->prompt));
	memcpy(r->prompt, a->prompt, a->n_prompt * sizeof(*r->prompt));
	r->n_prompt = a->n_prompt, r->sampling = a->sampling, r->owner = a;
	r->client = f->n_asked % 3, r->serial = f->n_asked;
	r->sink = (struct sink){sink_room, sink_put, sink_parked, sink_flush, a};
	f->n_asked++;
	if (engine_submit(f->e, r, &err) != 0)
		fail_msg("%s", err.text);
}

static void
flip_to(struct fixture *f, struct plan *plan)
{
	struct flip *fl = calloc(1, sizeof(*fl));

	assert_true(f->n_flips < MAX_FLIPS);
	fl->plan = plan_ref(plan);
	fl->epoch = ++f->epoch;
	f->flip[f->n_flips] = fl;
	fl->owner = &f->flip[f->n_flips++];
	engine_flip(f->e, fl);
}

static struct engine_config
config(uint64_t kv_bytes)
{
	return (struct engine_config){.kv_bytes = kv_bytes, .max_batch_tokens = 64, .max_batch = 16};
}

/* ---- tests ---- */

/* Each step but the first is submitted while the one before it runs, and no row is run for nothing. */
static void
test_behind(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(16 << 20);
	struct kd_status st;

	(void)state;
	start(&f, &cfg, 1);
	submit(&f, ask(&f, 20, 50));
	reap_all(&f);
	stop(&f, &st);
	assert_int_equal(st.eager_steps, 50);
	assert_int_equal(st.graphs, 49);
	assert_int_equal(st.graph_launches, 49);
}

/* One step in so many has a row measured, behind another or before; what came back is told by site. */
static void
test_evidence(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(16 << 20);
	struct evidence_site site;
	struct kd_status st;

	(void)state;
	cfg.evidence_steps = 7;
	start(&f, &cfg, 5);
	submit(&f, ask(&f, 20, 50));
	reap_all(&f);
	for (uint32_t g = 0; g < N_GROUPS; g++)
		for (uint32_t l = 0; l < (g == GROUP_LM_HEAD ? 1 : model->shape.n_layers); l++) {
			engine_evidence(f.e, (enum plan_group)g, l, &site);
			assert_int_equal(site.n, 50 / 7 * SIM_SEEN);
			assert_true(site.absmax == (float)(100 * g + l + 1));
			assert_true(site.zero == (float)sim_zeros(g, l) / SIM_SEEN && site.saturated == (float)sim_saturated(g, l) / SIM_SEEN);
		}
	stop(&f, &st);
	assert_int_equal(st.graphs, 49); /* it holds nobody up */
}

/* Penalties count a token that the host does not know yet; who has them holds nobody up. */
static void
test_penalties(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(16 << 20);
	struct kd_status st;

	(void)state;
	start(&f, &cfg, 2);
	for (int i = 0; i < 4; i++) {
		struct asked *a = ask(&f, 3, 60);

		if (i > 0)
			a->sampling.repetition_penalty = 1.1f, a->sampling.presence_penalty = 0.5f, a->sampling.seed = 9;
		submit(&f, a);
	}
	reap_all(&f);
	stop(&f, &st);
	assert_int_equal(st.graph_launches, 4 * 59);
	assert_true(st.graphs + 1 == st.eager_steps || st.graphs + 4 >= st.eager_steps);
}

/* A probe that asks for steps of its own has them, however busy the device is kept. */
static void
test_probe(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(16 << 20);
	struct kd_status st;

	(void)state;
	start(&f, &cfg, 3);
	for (int round = 0; round < 4; round++) {
		uint32_t *ids = calloc(100, sizeof(*ids));
		struct asked *a = ask(&f, 30, 70);

		assert_int_equal(probe_new(&a->probe, PROBE_SCORE, ids, 100, 1, plans[0], plans[1]), 0);
		a->probe->exclusive = true, a->probe->owner = a;
		f.n_probes++;
		submit(&f, a);
		reap_all(&f);
		probe_free(&a->probe);
	}
	stop(&f, &st);
	assert_true(st.graphs > 0 && st.graphs < st.eager_steps);
}

/* One that runs beside live rows does not hold them up: each step is behind another, those with its rows and those after them. */
static void
test_probe_behind(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(16 << 20);
	struct kd_status st;
	uint32_t *ids = calloc(15, sizeof(*ids));
	struct asked *a;

	(void)state;
	start(&f, &cfg, 4);
	a = ask(&f, 30, 80);
	assert_int_equal(probe_new(&a->probe, PROBE_SCORE, ids, 15, 1, plans[0], plans[1]), 0);
	a->probe->max_rows = 1, a->probe->share = 1e6, a->probe->owner = a; /* a row in every step that may have one */
	for (int s = 0; s < N_SIDES; s++)
		a->probe->dump[s] = malloc((size_t)14 * model->shape.vocab * sizeof(float));
	f.n_probes++;
	submit(&f, a);
	reap_all(&f);
	assert_int_equal(a->probe->error, 0);
	probe_free(&a->probe);
	stop(&f, &st);
	assert_int_equal(st.eager_steps, 80);
	assert_int_equal(st.graphs, 79);
}

/* A device that fails ends what runs, and what comes after, with an error. */
static void
test_failure(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(16 << 20);
	struct kd_status st;

	(void)state;
	start(&f, &cfg, SIM_FAILS);
	for (int i = 0; i < 4; i++) {
		submit(&f, ask(&f, 5, 80));
		f.asked[i].fails = true;
	}
	reap_all(&f);
	submit(&f, ask(&f, 5, 80));
	f.asked[4].fails = true;
	reap_all(&f);
	stop(&f, &st);
	assert_int_equal(st.eager_steps, 22); /* the 21st fails */
}

/* Two plans on some tokens; all logits are kept. */
static void
probe_any(struct fixture *f)
{
	uint32_t n = 2 + pick(f, 120), *ids = malloc(n * sizeof(*ids));
	struct probe *p;
	struct err err;

	for (uint32_t i = 0; i < n; i++)
		ids[i] = pick(f, model->shape.vocab);
	assert_int_equal(probe_new(&p, PROBE_SCORE, ids, n, 1, plans[pick(f, PLANS)], plans[pick(f, PLANS)]), 0);
	p->exclusive = pick(f, 4) == 0;
	for (int s = 0; s < N_SIDES; s++)
		p->dump[s] = malloc((size_t)n * model->shape.vocab * sizeof(float));
	f->probe = p;
	f->n_probes++;
	if (engine_probe(f->e, p, &err) != 0)
		fail_msg("%s", err.text);
}

/* A request of any kind. */
static void
ask_any(struct fixture *f)
{
	struct asked *a = ask(f, 1 + pick(f, MAX_PROMPT), 1 + pick(f, MAX_OUTPUT));

	a->sampling.ignore_eos = pick(f, 2);
	a->sampling.temperature = (float)pick(f, 2);
	a->sampling.seed = pick(f, 8) == 0 ? SIM_BAD_SEED : pick(f, 1000);
	if (pick(f, 3) == 0)
		a->sampling.repetition_penalty = 1.2f, a->sampling.frequency_penalty = 0.5f;
	if (pick(f, 4) == 0)
		a->sampling.prompt_logprobs = true;
	if (pick(f, 8) == 0)
		a->sampling.prompt_logprobs = true, a->sampling.max_tokens = 0;
	if (pick(f, 4) == 0)
		a->sampling.top_logprobs = 1 + pick(f, 6);
	if (pick(f, 3) == 0)
		a->cap = SINK_ROOM + 2 * (1 + a->sampling.top_logprobs) + pick(f, 20);
	submit(f, a);
}

static void
do_anything(struct fixture *f)
{
	struct asked *a = f->n_asked > 0 ? &f->asked[pick(f, f->n_asked)] : NULL;

	switch (pick(f, 12)) {
	case 0: case 1: case 2: case 3: case 4: ask_any(f); break;
	case 5: case 6: flip_to(f, plans[pick(f, PLANS)]); break;
	case 7: if (a != NULL && a->r != NULL) engine_cancel(f->e, a->r); break;
	case 8: read_all(f), reap(f); break;
	case 10: if (f->probe == NULL) probe_any(f); break;
	case 11: if (f->probe != NULL && pick(f, 2)) engine_cancel_probe(f->e, f->probe); break;
	case 9: for (uint32_t i = pick(f, 2000); i > 0; i--) sched_yield(); break;
	}
}

/* kv_blocks: of BF16; window: 0, none; whole: to the end of all requests. */
static void
run_any(uint64_t seed, uint32_t kv_blocks, uint32_t window, bool whole, struct kd_status *st, uint64_t *preempted)
{
	struct fixture f;
	struct engine_config cfg = config(kv_page_bytes(&model->shape) * 2 * model->shape.n_layers * kv_blocks);
	struct engine_stats stats;

	model->shape.window = window;
	cfg.prefix_cache = seed % 3 != 0;
	cfg.pin = seed % 5 == 0;
	cfg.evidence_steps = seed % 4;
	start(&f, &cfg, seed);
	while (f.n_asked < REQUESTS)
		do_anything(&f);
	if (whole) {
		reap_all(&f);
		do
			engine_stats(f.e, &stats);
		while (stats.running > 0 || stats.kv_pages_used > 0); /* said after the last request is back */
		*preempted += stats.preemptions;
	}
	stop(&f, st);
	model->shape.window = 0;
}

static void
test_any(void **state)
{
	uint64_t behind = 0, drawn = 0, preempted = 0;
	struct kd_status st;

	(void)state;
	for (uint64_t seed = 1; seed <= (getenv("OCTET_LONG") != NULL && *getenv("OCTET_LONG") != '\0' ? 2000 : 60); seed++) {
		print_message("seed %llu\n", (unsigned long long)seed);
		run_any(seed, seed % 2 ? 16 : 400, seed % 4 == 0 ? 40 : 0, seed % 7 != 0, &st, &preempted);
		behind += st.graphs, drawn += st.graph_launches;
	}
	print_message("%llu steps ran behind others, %llu rows had a token that was just drawn, %llu times pages were taken\n",
	    (unsigned long long)behind, (unsigned long long)drawn, (unsigned long long)preempted);
	assert_true(behind > 1000 && drawn > 1000 && preempted > 20);
}

static int
setup(void **state)
{
	static const struct plan_rule rules[PLANS][2] = {{{"lm_head", "bf16", 0}}, {{"*", "fp8", 0}}, {{"kv_cache", "fp8", 0}},
	    {{"kv_cache@0,2-", "fp8", 0}, {"mlp.up_proj", "fp8w", 0}}, {{"*", "fp8", 0}, {"kv_cache", "fp8", 0}}};
	const char *src = getenv("srcdir");
	struct team *team;
	char path[4096];
	struct err err;
	int rc;

	(void)state;
	setenv("OCTET_PLUGIN", "tests/octet-sim.so", 1);
	snprintf(path, sizeof(path), "%s/models/proof", src != NULL ? src : ".");
	assert_int_equal(team_new(&team, 0, 50), 0);
	rc = model_load(&model, path, team, 0, 0, false, NULL, NULL, &err);
	team_free(&team);
	if (rc != 0) {
		print_error("%s\n", err.text);
		return rc;
	}
	for (int i = 0; i < PLANS; i++)
		assert_int_equal(plan_derive(&plans[i], NULL, model->shape.n_layers, rules[i], rules[i][1].selector != NULL ? 2 : 1, &err), 0);
	model->shape.n_eos = 1, model->shape.eos[0] = SIM_EOS;
	return 0;
}

static int
teardown(void **state)
{
	(void)state;
	for (int i = 0; i < PLANS; i++)
		plan_unref(&plans[i]);
	model_free(&model);
	return 0;
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_behind),
		cmocka_unit_test(test_evidence),
		cmocka_unit_test(test_penalties),
		cmocka_unit_test(test_probe),
		cmocka_unit_test(test_probe_behind),
		cmocka_unit_test(test_failure),
		cmocka_unit_test(test_any),
	};

	return cmocka_run_group_tests_name("ahead", tests, setup, teardown);
}
