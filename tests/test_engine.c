/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine on the embedded model: tokens do not depend on company, cut,
 * threads or instruction set; flips lose nothing and every token is right for
 * the plan that its segment names.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/engine/engine.h"
#include "daemon/engine/forward.h"
#include "daemon/engine/sched.h"

#define MAX_EVENTS 1024u

/* A sink that keeps everything and can pretend to be full. */
struct sunk {
	pthread_mutex_t lock;
	struct wire_event ev[MAX_EVENTS];
	uint32_t n, room;
	bool parked;
};

struct fixture {
	struct model *m;
	struct team *team;
	struct engine *e;
	const struct k_ops *ops;
	pthread_mutex_t lock;
	pthread_cond_t cond;
	uint32_t notified;
};

static struct model *model;
static struct plan *bf16, *fp8, *fp8w;

static const char *
model_dir(void)
{
	static char path[4096];
	const char *src = getenv("srcdir");

	if (getenv("OCTET_PROOF") != NULL)
		return getenv("OCTET_PROOF");
	snprintf(path, sizeof(path), "%s/models/proof", src != NULL ? src : ".");
	return path;
}

static uint32_t
sunk_room(void *arg)
{
	struct sunk *s = arg;
	uint32_t room;

	pthread_mutex_lock(&s->lock);
	room = s->room;
	pthread_mutex_unlock(&s->lock);
	return room;
}

static void
sunk_put(void *arg, const struct wire_event *ev)
{
	struct sunk *s = arg;

	pthread_mutex_lock(&s->lock);
	assert_true(s->n < MAX_EVENTS);
	s->ev[s->n++] = *ev;
	if (s->room < MAX_EVENTS)
		s->room--;
	pthread_mutex_unlock(&s->lock);
}

static void
sunk_parked(void *arg, bool parked)
{
	struct sunk *s = arg;

	pthread_mutex_lock(&s->lock);
	s->parked = parked;
	pthread_mutex_unlock(&s->lock);
}

static void
sunk_flush(void *arg)
{
	(void)arg;
}

static void
notify(void *arg)
{
	struct fixture *f = arg;

	pthread_mutex_lock(&f->lock);
	f->notified++;
	pthread_cond_broadcast(&f->cond);
	pthread_mutex_unlock(&f->lock);
}

/* Waits for the next notification, at most 120 s: sanitizers are slow. */
static void
wait_notified(struct fixture *f)
{
	struct timespec ts;
	int rc = 0;

	clock_gettime(CLOCK_REALTIME, &ts);
	ts.tv_sec += 120;
	pthread_mutex_lock(&f->lock);
	while (f->notified == 0 && rc == 0)
		rc = pthread_cond_timedwait(&f->cond, &f->lock, &ts);
	f->notified = 0;
	pthread_mutex_unlock(&f->lock);
	assert_int_equal(rc, 0);
}

static struct engine_config
config(struct fixture *f)
{
	return (struct engine_config){.kv_bytes = 64 << 20, .max_batch_tokens = 256, .max_batch = 32, .max_queue = 64,
	    .spin_us = 20, .notify = notify, .notify_arg = f};
}

static void
start(struct fixture *f, const char *level, uint32_t threads, const struct engine_config *cfg, struct plan *plan)
{
	char why[256];
	struct err err;

	pthread_mutex_init(&f->lock, NULL);
	pthread_cond_init(&f->cond, NULL);
	f->notified = 0;
	f->ops = kernels_select(level, why, sizeof(why));
	assert_non_null(f->ops);
	assert_int_equal(team_new(&f->team, threads, 50), 0);
	if (engine_new(&f->e, model, f->ops, f->team, cfg, plan, 1, &err) != 0)
		fail_msg("%s", err.text);
}

static void
stop(struct fixture *f)
{
	struct request *r;
	struct flip *fl;

	while ((r = engine_reap(f->e)) != NULL)
		for (struct request *next; r != NULL; r = next) {
			next = r->next;
			request_free(&r);
		}
	while ((fl = engine_reap_flips(f->e)) != NULL)
		for (struct flip *next; fl != NULL; fl = next) {
			next = fl->next;
			plan_unref(&fl->plan);
			free(fl);
		}
	engine_free(&f->e);
	team_free(&f->team);
}

static struct request *
make_request(struct sunk *s, const uint32_t *prompt, uint32_t n, uint32_t max_tokens, uint32_t serial)
{
	struct request *r = calloc(1, sizeof(*r));

	pthread_mutex_init(&s->lock, NULL);
	s->n = 0, s->room = MAX_EVENTS, s->parked = false;
	r->prompt = malloc(n * sizeof(*r->prompt));
	memcpy(r->prompt, prompt, n * sizeof(*r->prompt));
	r->n_prompt = n;
	r->client = serial % 3;
	r->serial = serial;
	r->sampling = (struct sampling){.max_tokens = max_tokens, .top_p = 1, .ignore_eos = true, .logprobs = true};
	r->sink = (struct sink){sunk_room, sunk_put, sunk_parked, sunk_flush, s};
	return r;
}

/* Waits until n requests came back; frees them. */
static void
reap_all(struct fixture *f, uint32_t n)
{
	while (n > 0) {
		struct request *r = engine_reap(f->e), *next;

		if (r == NULL) {
			wait_notified(f);
			continue;
		}
		for (; r != NULL; r = next) {
			next = r->next;
			request_free(&r);
			n--;
		}
	}
}

static uint32_t
tokens_of(const struct sunk *s, uint32_t *out)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < s->n; i++)
		if (s->ev[i].kind == WIRE_EV_TOKEN)
			out[n++] = s->ev[i].token;
	return n;
}

/* Prompts of varied length, any ids of the vocabulary. */
static uint32_t
prompt(uint32_t i, uint32_t *ids)
{
	uint32_t n = 1 + (i * 37) % 90, x = 12345 + i;

	for (uint32_t j = 0; j < n; j++) {
		x = x * 1664525u + 1013904223u;
		ids[j] = (x >> 8) % model->shape.vocab;
	}
	return n;
}

static void
run_many(const char *level, uint32_t threads, uint32_t max_rows, uint32_t n, bool together, struct plan *plan,
    struct sampling *sampling, uint32_t out[][64])
{
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct sunk *s = calloc(n, sizeof(*s));
	uint32_t ids[128];
	struct err err;

	cfg.max_batch_tokens = max_rows;
	start(&f, level, threads, &cfg, plan);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t len = prompt(i, ids);
		struct request *r = make_request(&s[i], ids, len, 24, i);

		if (sampling != NULL)
			r->sampling = *sampling;
		assert_int_equal(engine_submit(f.e, r, &err), 0);
		if (!together)
			reap_all(&f, 1);
	}
	if (together)
		reap_all(&f, n);
	for (uint32_t i = 0; i < n; i++) {
		memset(out[i], 0xff, sizeof(out[i]));
		assert_int_equal(tokens_of(&s[i], out[i]), 24);
	}
	stop(&f);
	free(s);
}

static void
test_company(void **state)
{
	static uint32_t want[16][64], got[16][64];
	struct sampling hot = {.max_tokens = 24, .temperature = 0.9f, .top_p = 0.95f, .top_k = 40, .seed = 7,
	    .ignore_eos = true};
	struct plan *plans[] = {bf16, fp8, fp8w};

	(void)state;
	for (size_t p = 0; p < 3; p++) {
		run_many(NULL, 1, 256, 16, false, plans[p], NULL, want);
		run_many(NULL, 2, 256, 16, true, plans[p], NULL, got);
		assert_memory_equal(want, got, sizeof(want));
		run_many(NULL, 2, 17, 16, true, plans[p], NULL, got);
		assert_memory_equal(want, got, sizeof(want));
	}
	run_many(NULL, 1, 256, 16, false, bf16, &hot, want);
	run_many(NULL, 2, 33, 16, true, bf16, &hot, got);
	assert_memory_equal(want, got, sizeof(want));
}

static void
test_levels(void **state)
{
	static uint32_t want[3][64], got[3][64];
	const char *best = kernels_select(NULL, NULL, 0)->name;

	(void)state;
	run_many("ref", 2, 64, 3, true, fp8, NULL, want);
	run_many(best, 2, 64, 3, true, fp8, NULL, got);
	assert_memory_equal(want, got, sizeof(want));
	print_message("ref and %s agree\n", best);
}

static void
test_sampling(void **state)
{
	static uint32_t a[4][64], b[4][64], c[4][64], greedy[4][64];
	struct sampling s = {.max_tokens = 24, .temperature = 1.5f, .top_p = 1, .seed = 1, .ignore_eos = true};

	(void)state;
	run_many(NULL, 2, 256, 4, true, bf16, NULL, greedy);
	run_many(NULL, 2, 256, 4, true, bf16, &s, a);
	run_many(NULL, 2, 256, 4, true, bf16, &s, b);
	assert_memory_equal(a, b, sizeof(a));
	s.seed = 2;
	run_many(NULL, 2, 256, 4, true, bf16, &s, c);
	assert_memory_not_equal(a, c, sizeof(a));
	assert_memory_not_equal(a, greedy, sizeof(a));
	/* top_k 1 and a vanishing top_p leave the most likely token only. */
	s.top_k = 1;
	run_many(NULL, 2, 256, 4, true, bf16, &s, c);
	assert_memory_equal(c, greedy, sizeof(c));
	s.top_k = 0;
	s.top_p = 1e-6f;
	run_many(NULL, 2, 256, 4, true, bf16, &s, c);
	assert_memory_equal(c, greedy, sizeof(c));
}

/* Runs the recorded tokens of one request again, each position under the plan
 * of its segment, one row at a time, and compares every greedy choice. */
static void
replay(struct forward *fw, struct kv_pool *kv, const struct sunk *s, const uint32_t *ids, uint32_t n_prompt,
    struct plan *const *plans, uint32_t n_plans)
{
	uint32_t token[512], n = n_prompt, out[64], n_out = tokens_of(s, out), page[16], pages;

	memcpy(token, ids, n_prompt * sizeof(*token));
	memcpy(token + n_prompt, out, n_out * sizeof(*token));
	n += n_out;
	pages = kv_pages_for(n);
	assert_int_equal(kv_take(kv, pages, page), 0);
	for (uint32_t pos = 0; pos + 1 < n; pos++) {
		struct forward_row row = {.token = token[pos], .pos = pos, .pages = page, .wants_logits = pos + 1 >= n_prompt};
		uint64_t digest = 0;
		const float *logits;
		uint32_t best = 0;

		for (uint32_t i = 0; i < s->n; i++)
			if (s->ev[i].kind == WIRE_EV_SEGMENT && s->ev[i].position <= pos)
				digest = s->ev[i].a;
		for (uint32_t i = 0; i < n_plans; i++)
			if (plans[i]->digest == digest)
				row.plan = plans[i];
		assert_non_null(row.plan);
		logits = forward_run(fw, &row, 1);
		if (!row.wants_logits)
			continue;
		for (uint32_t i = 1; i < model->shape.vocab; i++)
			if (logits[i] > logits[best])
				best = i;
		assert_int_equal(best, token[pos + 1]);
	}
	kv_give(kv, page, pages);
}

static void
test_flips(void **state)
{
	enum { CLIENTS = 8, TOKENS = 60 };
	struct plan *plans[] = {bf16, fp8, fp8w};
	uint32_t flips = getenv("OCTET_LONG") != NULL && *getenv("OCTET_LONG") ? 1000 : 100, applied = 0;
	struct sunk *s = calloc(CLIENTS, sizeof(*s));
	uint32_t ids[CLIENTS][128], len[CLIENTS], segments = 0, rounds = 0;
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct forward *fw;
	struct kv_pool kv;
	uint64_t epoch = 1, last_step = 0;
	struct err err;

	(void)state;
	start(&f, NULL, 2, &cfg, bf16);
	assert_int_equal(kv_new(&kv, &model->shape, 16 << 20, &err), 0);
	assert_int_equal(forward_new(&fw, model, f.ops, NULL, &kv, 4, &err), 0);
	kernels_thread_init(); /* this thread runs kernels too */
	while (applied < flips) {
		for (uint32_t i = 0; i < CLIENTS; i++) {
			len[i] = prompt(i + rounds * CLIENTS, ids[i]);
			assert_int_equal(engine_submit(f.e, make_request(&s[i], ids[i], len[i], TOKENS, i), &err), 0);
		}
		for (uint32_t done = 0; done < CLIENTS;) {
			struct flip *fl = calloc(1, sizeof(*fl)), *got;
			struct engine_stats before;
			struct request *r, *next;

			engine_stats(f.e, &before);
			fl->plan = plan_ref(plans[epoch % 3]);
			fl->epoch = ++epoch;
			engine_flip(f.e, fl);
			while ((got = engine_reap_flips(f.e)) == NULL)
				wait_notified(&f);
			assert_ptr_equal(got, fl);
			assert_null(got->next);
			/* At most the step that was running when it was posted, and one that
			 * had begun before the mailbox was read. */
			assert_true(got->step > last_step || got->step == last_step);
			assert_true(got->step >= before.step + 1);
			last_step = got->step;
			plan_unref(&got->plan);
			free(got);
			applied++;
			for (r = engine_reap(f.e); r != NULL; r = next) {
				next = r->next;
				assert_int_equal(r->finish, WIRE_FINISH_LENGTH);
				assert_int_equal(r->n_output, TOKENS);
				request_free(&r);
				done++;
			}
		}
		for (uint32_t i = 0; i < CLIENTS; i++) {
			for (uint32_t j = 0; j < s[i].n; j++)
				segments += s[i].ev[j].kind == WIRE_EV_SEGMENT;
			replay(fw, &kv, &s[i], ids[i], len[i], plans, 3);
		}
		rounds++;
	}
	print_message("%u flips, %u requests, %u segments, every token right for its segment\n", applied,
	    rounds * CLIENTS, segments);
	assert_true(segments > rounds * CLIENTS); /* flips did land inside requests */
	forward_free(&fw);
	kv_free(&kv);
	stop(&f);
	free(s);
}

/* Mixed plans in one batch: pinned sequences finish under their own plan, with
 * the tokens they would have had alone. */
static void
test_pin(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct sunk *s = calloc(4, sizeof(*s));
	static uint32_t want[2][4][64];
	uint32_t ids[128], got[64];
	struct flip *fl;
	struct err err;

	(void)state;
	run_many(NULL, 2, 256, 4, false, bf16, NULL, want[0]);
	run_many(NULL, 2, 256, 4, false, fp8, NULL, want[1]);
	cfg.pin = true;
	start(&f, NULL, 2, &cfg, bf16);
	for (uint32_t i = 0; i < 2; i++)
		assert_int_equal(engine_submit(f.e, make_request(&s[i], ids, prompt(i, ids), 24, i), &err), 0);
	for (;;) { /* both are running */
		struct engine_stats st;

		engine_stats(f.e, &st);
		if (st.running == 2 || st.done == 2)
			break;
	}
	fl = calloc(1, sizeof(*fl));
	fl->plan = plan_ref(fp8);
	fl->epoch = 2;
	engine_flip(f.e, fl);
	for (uint32_t i = 2; i < 4; i++)
		assert_int_equal(engine_submit(f.e, make_request(&s[i], ids, prompt(i, ids), 24, i), &err), 0);
	reap_all(&f, 4);
	for (uint32_t i = 0; i < 4; i++) {
		memset(got, 0xff, sizeof(got));
		tokens_of(&s[i], got);
		assert_memory_equal(got, want[i / 2][i], 24 * sizeof(*got));
	}
	stop(&f);
	free(s);
}

static void
test_park_and_cancel(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct sunk s[2];
	static uint32_t want[1][64];
	uint32_t ids[128], got[64];
	struct engine_stats st;
	struct request *r;
	struct err err;

	(void)state;
	run_many(NULL, 2, 256, 1, false, bf16, NULL, want);
	start(&f, NULL, 2, &cfg, bf16);
	r = make_request(&s[0], ids, prompt(0, ids), 24, 0);
	s[0].room = 10;
	assert_int_equal(engine_submit(f.e, r, &err), 0);
	for (;;) {
		bool parked;

		pthread_mutex_lock(&s[0].lock);
		parked = s[0].parked;
		pthread_mutex_unlock(&s[0].lock);
		if (parked)
			break;
	}
	engine_stats(f.e, &st);
	assert_true(st.kv_pages_used > 0); /* parked with its pages */
	pthread_mutex_lock(&s[0].lock);
	assert_true(s[0].n < 10);
	s[0].room = MAX_EVENTS;
	pthread_mutex_unlock(&s[0].lock);
	engine_kick(f.e);
	reap_all(&f, 1);
	assert_int_equal(tokens_of(&s[0], got), 24);
	assert_memory_equal(got, want[0], 24 * sizeof(*got));

	r = make_request(&s[1], ids, prompt(1, ids), 400, 1);
	assert_int_equal(engine_submit(f.e, r, &err), 0);
	engine_cancel(f.e, r);
	reap_all(&f, 1);
	assert_int_equal(s[1].ev[s[1].n - 1].kind, WIRE_EV_DONE);
	assert_int_equal(s[1].ev[s[1].n - 1].token, WIRE_FINISH_CANCELLED);
	do
		engine_stats(f.e, &st);
	while (st.kv_pages_used != 0 || st.running != 0); /* ends: the pages come back */
	stop(&f);
}

static void
test_refusals(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct sunk s[8];
	uint32_t *ids = calloc(600, sizeof(*ids));
	struct request *r;
	struct err err;

	(void)state;
	cfg.kv_bytes = 4 * kv_page_bytes(&model->shape);
	cfg.max_queue = 2;
	start(&f, NULL, 1, &cfg, bf16);
	r = make_request(&s[0], ids, 512, 1, 0);
	assert_int_equal(engine_submit(f.e, r, &err), -E2BIG);
	assert_string_equal(err.text, "prompt of 512 tokens: the context holds 512 with at least one of output");
	request_free(&r);
	r = make_request(&s[0], ids, 100, 100, 0);
	assert_int_equal(engine_submit(f.e, r, &err), -E2BIG);
	assert_string_equal(err.text, "200 tokens of prompt and output: the KV cache holds 128");
	request_free(&r);

	/* One fills the cache and is parked; two queue; the next is refused. */
	r = make_request(&s[0], ids, 100, 28, 0);
	s[0].room = 5;
	assert_int_equal(engine_submit(f.e, r, &err), 0);
	for (struct engine_stats st = {0}; st.running == 0;)
		engine_stats(f.e, &st);
	for (uint32_t i = 1; i < 3; i++)
		assert_int_equal(engine_submit(f.e, make_request(&s[i], ids, 100, 28, i), &err), 0);
	r = make_request(&s[3], ids, 100, 28, 3);
	assert_int_equal(engine_submit(f.e, r, &err), -EBUSY);
	assert_string_equal(err.text, "busy: 2 requests are queued");
	request_free(&r);
	pthread_mutex_lock(&s[0].lock);
	s[0].room = MAX_EVENTS;
	pthread_mutex_unlock(&s[0].lock);
	engine_kick(f.e);
	reap_all(&f, 3); /* the waiting ones run when pages come back */
	stop(&f);
	free(ids);
}

static void
test_sched(void **state)
{
	struct sched_seq s[4] = {
		{.client = 1, .order = 0, .pending = 1},
		{.client = 1, .order = 1, .pending = 500},
		{.client = 2, .order = 2, .pending = 30},
		{.client = 1, .order = 3, .pending = 1, .parked = true},
	};
	struct sched_waiting w[3] = {{1, 5, 2}, {2, 9, 0}, {3, 7, 0}};
	struct sched_limits lim = {.max_rows = 256, .target_rows = 256};
	uint64_t turn = 1;

	(void)state;
	assert_int_equal(sched_pick(s, 4, &lim, &turn), 256);
	assert_int_equal(s[0].rows, 1);
	assert_int_equal(s[1].rows, 225);
	assert_int_equal(s[2].rows, 30); /* client 2's turn came first */
	assert_int_equal(s[3].rows, 0);
	lim.target_rows = 1; /* prefill still gets one chunk */
	turn = 2;
	assert_int_equal(sched_pick(s, 4, &lim, &turn), 65);
	assert_int_equal(s[1].rows, 64);
	assert_int_equal(s[2].rows, 0);
	assert_int_equal(turn, 1);
	lim.max_rows = 1; /* decode goes first */
	assert_int_equal(sched_pick(s, 4, &lim, &turn), 1);
	assert_int_equal(s[0].rows, 1);
	assert_int_equal(sched_admit(w, 3), 2);
	assert_int_equal(sched_admit(w, 1), 0);
	assert_int_equal(sched_admit(w, 0), -1);
}

static int
setup(void **state)
{
	struct plan_rule all8 = {"*", "fp8", 0}, all8w = {"*", "fp8w", 0};
	struct team *team;
	struct err err;
	int rc;

	(void)state;
	assert_int_equal(team_new(&team, 0, 50), 0);
	rc = model_load(&model, model_dir(), team, 0, 0, false, NULL, NULL, &err);
	team_free(&team);
	if (rc != 0) {
		print_error("%s\n", err.text);
		return rc;
	}
	if (plan_derive(&bf16, NULL, model->shape.n_layers, NULL, 0, &err) != 0 ||
	    plan_derive(&fp8, bf16, model->shape.n_layers, &all8, 1, &err) != 0 ||
	    plan_derive(&fp8w, bf16, model->shape.n_layers, &all8w, 1, &err) != 0) {
		print_error("%s\n", err.text);
		return -1;
	}
	return 0;
}

static int
teardown(void **state)
{
	(void)state;
	plan_unref(&bf16), plan_unref(&fp8), plan_unref(&fp8w);
	model_free(&model);
	return 0;
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_sched),
		cmocka_unit_test(test_company),
		cmocka_unit_test(test_levels),
		cmocka_unit_test(test_sampling),
		cmocka_unit_test(test_flips),
		cmocka_unit_test(test_pin),
		cmocka_unit_test(test_park_and_cancel),
		cmocka_unit_test(test_refusals),
	};

	return cmocka_run_group_tests_name("engine", tests, setup, teardown);
}
