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
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/engine/engine.h"
#include "daemon/engine/sample.h"
#include "daemon/engine/forward.h"
#include "daemon/engine/probe.h"
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
static struct plan *bf16, *fp8, *fp8w, *kv8, *mixed; /* kv8: kv_cache = fp8; mixed: some of each */

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

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#endif
#ifdef SANITIZED
#define SLOWER 20u
#else
#define SLOWER 1u
#endif

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
	struct plan *plans[] = {bf16, fp8, fp8w, mixed};

	(void)state;
	for (size_t p = 0; p < 4; p++) {
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
	run_many("ref", 2, 64, 3, true, mixed, NULL, want);
	run_many(best, 2, 64, 3, true, mixed, NULL, got);
	assert_memory_equal(want, got, sizeof(want));
	print_message("ref and %s agree\n", best);
}

/* ---- sampling, against the definition: all weights, one sort ---- */

struct candidate {
	double p;
	uint32_t id;
};

static int
by_probability(const void *pa, const void *pb)
{
	const struct candidate *a = pa, *b = pb;

	if (a->p != b->p)
		return a->p > b->p ? -1 : 1;
	return a->id < b->id ? -1 : a->id > b->id;
}

static uint32_t
plain_draw(const float *logits, uint32_t vocab, const struct sampling *s, uint32_t position)
{
	struct candidate *cand = malloc(vocab * sizeof(*cand));
	double sum = 0, kept = 0, u;
	float max = logits[0];
	uint32_t n = 0, i, got;

	for (i = 1; i < vocab; i++)
		max = fmaxf(max, logits[i]);
	for (i = 0; i < vocab; i++) {
		double p = exp(((double)logits[i] - max) / s->temperature);

		if (p >= s->min_p)
			cand[n++] = (struct candidate){p, i};
	}
	if (s->top_k != 0 || s->top_p < 1.0f)
		qsort(cand, n, sizeof(*cand), by_probability);
	if (s->top_k != 0 && s->top_k < n)
		n = s->top_k;
	for (i = 0; i < n; i++)
		sum += cand[i].p;
	if (s->top_p < 1.0f) {
		for (i = 0; i < n && kept < (double)s->top_p * sum; i++)
			kept += cand[i].p;
		n = i > 0 ? i : 1;
		for (i = 0, sum = 0; i < n; i++)
			sum += cand[i].p;
	}
	u = sample_uniform(s->seed, position) * sum;
	for (i = 0; i < n && (u -= cand[i].p) >= 0; i++)
		;
	got = cand[i < n ? i : n - 1].id;
	free(cand);
	return got;
}

static void
fill_logits(float *logits, uint32_t vocab, uint32_t kind, uint64_t seed)
{
	static const float spread[] = {0.01f, 1, 6, 40};

	for (uint32_t i = 0; i < vocab; i++) {
		double u = sample_uniform(seed, 2 * i), v = sample_uniform(seed, 2 * i + 1);

		logits[i] = kind % 5 == 4 ? (float)(int)(4 * u) - 2 : (float)(sqrt(-2 * log(u + 1e-18)) * cos(6.283185307 * v)) * spread[kind % 5];
	}
	logits[(uint32_t)(sample_uniform(seed, 1u << 31) * vocab)] += kind % 3 == 0 ? 9 : 0;
}

static void
test_draws(void **state)
{
	static const uint32_t vocabs[] = {1, 2, 127, 128, 129, 1024, 5003, 128256}, ks[] = {0, 1, 3, 40, 2000};
	static const float ts[] = {0.3f, 1, 2.5f}, ps[] = {1, 0.9f, 0.3f, 0.999f}, ms[] = {0, 0, 0.05f, 1};
	struct sample_scratch *c;
	struct sampled got;

	(void)state;
	for (size_t v = 0; v < sizeof(vocabs) / sizeof(*vocabs); v++) {
		uint32_t vocab = vocabs[v], cases = (vocab > 100000 ? 60 : 1000) / SLOWER;
		float *logits = malloc(vocab * sizeof(*logits));

		assert_int_equal(sample_scratch_new(&c, kernels_select(NULL, NULL, 0), vocab), 0);
		for (uint32_t i = 0; i < cases; i++) {
			struct sampling s = {.max_tokens = 1, .seed = i, .temperature = ts[i % 3], .top_k = ks[i / 2 % 5], .top_p = ps[i / 3 % 4],
			    .min_p = ms[i / 7 % 4]};
			uint32_t want;

			fill_logits(logits, vocab, i, i + 1);
			want = plain_draw(logits, vocab, &s, i);
			assert_true(sample_token(logits, &s, NULL, 0, i, c, &got));
			if (got.token != want)
				fail_msg("vocab %u, case %u: token %u, not %u", vocab, i, got.token, want);
		}
		sample_scratch_free(&c);
		free(logits);
	}
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

static struct plan *
plan_of(uint64_t digest)
{
	struct plan *all[] = {bf16, fp8, fp8w, kv8, mixed};

	for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
		if (all[i]->digest == digest)
			return all[i];
	fail_msg("a segment names an unknown plan");
	return NULL;
}

/* Runs the recorded tokens of one request again, each position under the plan
 * of its segment, one row at a time, and compares every greedy choice. */
static void
replay(struct forward *fw, struct kv_pool *kv, const struct sunk *s, const uint32_t *ids, uint32_t n_prompt)
{
	uint32_t token[512], n = n_prompt, out[256], n_out = tokens_of(s, out);
	struct kv_seq seq;

	memcpy(token, ids, n_prompt * sizeof(*token));
	memcpy(token + n_prompt, out, n_out * sizeof(*token));
	n += n_out;
	assert_int_equal(kv_seq_new(&seq, model->shape.n_layers, n), 0);
	for (uint32_t pos = 0; pos + 1 < n; pos++) {
		struct forward_row row = {.token = token[pos], .pos = pos, .kv = &seq, .wants_logits = pos + 1 >= n_prompt};
		uint64_t digest = 0;
		const float *logits;
		uint32_t best = 0;

		for (uint32_t i = 0; i < s->n; i++)
			if (s->ev[i].kind == WIRE_EV_SEGMENT && s->ev[i].position <= pos)
				digest = s->ev[i].a;
		row.plan = plan_of(digest);
		assert_int_equal(kv_open(kv, &seq, row.plan, pos), 0);
		logits = forward_run(fw, &row, 1);
		if (!row.wants_logits)
			continue;
		for (uint32_t i = 1; i < model->shape.vocab; i++)
			if (logits[i] > logits[best])
				best = i;
		assert_int_equal(best, token[pos + 1]);
	}
	kv_close(kv, &seq);
	kv_seq_free(&seq);
}

/* A device keeps copies of tables: while a table has its number, full blocks must stay as they were. */
static void
test_table_numbers(void **state)
{
	const uint32_t token[2 * KV_PAGE_TOKENS] = {5, 6, 7};
	uint32_t layers = model->shape.n_layers;
	struct kv_block was[64];
	struct kv_pool kv;
	struct kv_seq a, b;
	struct err err = {""};
	uint64_t first;

	(void)state;
	assert_true(layers <= sizeof(was) / sizeof(*was));
	assert_int_equal(kv_new(&kv, &model->shape, 16 * layers * kv_page_bytes(&model->shape), &err), 0);
	assert_int_equal(kv_seq_new(&a, layers, 3 * KV_PAGE_TOKENS), 0);
	assert_int_equal(kv_seq_new(&b, layers, 3 * KV_PAGE_TOKENS), 0);
	assert_true(a.uid != 0 && b.uid != 0 && a.uid != b.uid);
	first = b.uid;
	for (uint32_t pos = 0; pos <= KV_PAGE_TOKENS; pos++) {
		const struct plan *plan = pos < 7 ? kv8 : bf16;

		assert_int_equal(kv_open(&kv, &a, plan, pos), 0);
		assert_int_equal(kv_open(&kv, &b, plan, pos), 0);
		if (pos == KV_PAGE_TOKENS - 1)
			memcpy(was, b.block, layers * sizeof(*was));
	}
	assert_memory_equal(was, b.block, layers * sizeof(*was));
	kv_publish(&kv, &a, 1, bf16->digest, token);
	assert_int_equal(b.uid, first);
	/* a was first: b takes a's pages. */
	kv_publish(&kv, &b, 1, bf16->digest, token);
	assert_memory_equal(a.block, b.block, layers * sizeof(*was));
	assert_true(memcmp(was, b.block, layers * sizeof(*was)) != 0);
	assert_int_not_equal(b.uid, first);
	first = b.uid;
	kv_close(&kv, &b);
	assert_int_not_equal(b.uid, first);
	kv_close(&kv, &a);
	kv_seq_free(&a);
	kv_seq_free(&b);
	kv_free(&kv);
}

/* The same request once more, under the segments that it told of. */
static struct request *
make_replay(struct sunk *to, const struct sunk *from, const uint32_t *ids, uint32_t n, uint32_t max_tokens)
{
	struct request *r = make_request(to, ids, n, max_tokens, 0);

	r->replay = calloc(from->n, sizeof(*r->replay));
	for (uint32_t i = 0; i < from->n; i++)
		if (from->ev[i].kind == WIRE_EV_SEGMENT)
			r->replay[r->n_replay++] = (struct segment){from->ev[i].position, plan_ref(plan_of(from->ev[i].a)),
			    from->ev[i].epoch};
	return r;
}

static void
assert_same_run(const struct sunk *a, const struct sunk *b)
{
	assert_int_equal(a->n, b->n);
	for (uint32_t i = 0; i < a->n; i++) {
		assert_int_equal(a->ev[i].kind, b->ev[i].kind);
		assert_int_equal(a->ev[i].token, b->ev[i].token);
		assert_int_equal(a->ev[i].position, b->ev[i].position);
		assert_int_equal(a->ev[i].a, b->ev[i].a);
	}
}

struct storm {
	uint32_t flips, clients, tokens;
	uint64_t kv_bytes;     /* little: preemption */
	bool prefix_cache;
};

/*
 * Flips of linears and KV, switch and pin in turn, some clients on policies of
 * their own. Afterwards every token is checked position by position against its
 * segment's plan, and every request is run again by the engine from its segments.
 */
static void
storm(const struct storm *o)
{
	struct plan *plans[] = {bf16, fp8, kv8, fp8w, mixed};
	struct sunk *s = calloc(2 * o->clients, sizeof(*s)), *again = s + o->clients;
	uint32_t (*ids)[128] = calloc(o->clients, sizeof(*ids)), *len = calloc(o->clients, sizeof(*len));
	uint32_t applied = 0, segments = 0, rounds = 0;
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct forward *fw;
	struct kv_pool kv;
	uint64_t epoch = 1, last_step = 0;
	struct engine_stats st;
	struct err err;

	cfg.kv_bytes = o->kv_bytes;
	cfg.prefix_cache = o->prefix_cache;
	start(&f, NULL, 2, &cfg, bf16);
	assert_int_equal(kv_new(&kv, &model->shape, 16 << 20, &err), 0);
	assert_int_equal(forward_new(&fw, model, f.ops, NULL, &kv, 4, &err), 0);
	kernels_thread_init(); /* this thread runs kernels too */
	while (applied < o->flips) {
		for (uint32_t i = 0; i < o->clients; i++) {
			struct request *r;

			/* Half of the prompts come again and again. */
			len[i] = prompt(i % 2 ? i : i + rounds * o->clients, ids[i]);
			r = make_request(&s[i], ids[i], len[i], o->tokens, i);
			if (i % 4 == 3)
				r->plan = plan_ref(plans[i / 4 % 3]);
			assert_int_equal(engine_submit(f.e, r, &err), 0);
		}
		for (uint32_t done = 0; done < o->clients;) {
			struct flip *fl = calloc(1, sizeof(*fl)), *got;
			struct engine_stats before;
			struct request *r, *next;

			engine_stats(f.e, &before);
			fl->plan = plan_ref(plans[epoch % 5]);
			fl->epoch = ++epoch;
			fl->force = epoch % 7 == 0;
			cfg.pin = epoch % 3 == 0;
			engine_configure(f.e, &cfg);
			engine_flip(f.e, fl);
			while ((got = engine_reap_flips(f.e)) == NULL)
				wait_notified(&f);
			assert_ptr_equal(got, fl);
			assert_null(got->next);
			assert_true(got->step >= last_step);
			assert_true(got->step >= before.step + 1);
			last_step = got->step;
			plan_unref(&got->plan);
			free(got);
			applied++;
			for (r = engine_reap(f.e); r != NULL; r = next) {
				next = r->next;
				assert_int_equal(r->finish, WIRE_FINISH_LENGTH);
				assert_int_equal(r->n_output, o->tokens);
				request_free(&r);
				done++;
			}
		}
		for (uint32_t i = 0; i < o->clients; i++) {
			for (uint32_t j = 0; j < s[i].n; j++)
				segments += s[i].ev[j].kind == WIRE_EV_SEGMENT;
			replay(fw, &kv, &s[i], ids[i], len[i]);
			assert_int_equal(engine_submit(f.e, make_replay(&again[i], &s[i], ids[i], len[i], o->tokens), &err), 0);
		}
		reap_all(&f, o->clients);
		for (uint32_t i = 0; i < o->clients; i++)
			assert_same_run(&s[i], &again[i]);
		rounds++;
	}
	do
		engine_stats(f.e, &st);
	while (st.kv_pages_used != 0 || st.running != 0); /* ends: the pages come back */
	print_message("%u flips, %u requests, %u segments, %llu preemptions, %llu tokens from the prefix cache: every token "
	    "right for its segment, twice\n", applied, rounds * o->clients, segments, (unsigned long long)st.preemptions,
	    (unsigned long long)st.prefix_hit_tokens);
	assert_true(segments > rounds * o->clients); /* flips did land inside requests */
	assert_true((st.prefix_hit_tokens > 0) == o->prefix_cache);
	forward_free(&fw);
	kv_free(&kv);
	stop(&f);
	free(s), free(ids), free(len);
}

static bool
is_long(void)
{
	return getenv("OCTET_LONG") != NULL && *getenv("OCTET_LONG");
}

static void
test_flips(void **state)
{
	struct storm o = {.flips = is_long() ? 1000 : 60, .clients = is_long() ? 16 : 8, .tokens = 60, .kv_bytes = 64 << 20};

	(void)state;
	storm(&o);
	o.prefix_cache = true;
	storm(&o);
}

static uint64_t
kv_for(uint32_t tokens)
{
	return (uint64_t)kv_blocks_for(tokens) * 2 * model->shape.n_layers * kv_page_bytes(&model->shape);
}

/* The cache holds two or three of the requests: the rest waits or is preempted. */
static void
test_flips_full(void **state)
{
	struct storm o = {.flips = is_long() ? 300 : 30, .clients = 8, .tokens = 60, .kv_bytes = kv_for(350)};

	(void)state;
	storm(&o);
	o.prefix_cache = true;
	storm(&o);
}

static void
test_preempt(void **state)
{
	static uint32_t want[8][64], got[8][64];
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct sunk *s = calloc(8, sizeof(*s));
	struct engine_stats st;
	uint32_t ids[128];
	struct err err;

	(void)state;
	run_many(NULL, 2, 256, 8, false, mixed, NULL, want);
	cfg.kv_bytes = kv_for(130);
	start(&f, NULL, 2, &cfg, mixed);
	for (uint32_t i = 0; i < 8; i++) /* short prompts: admitted at once, they outgrow the cache */
		assert_int_equal(engine_submit(f.e, make_request(&s[i], ids, prompt(i, ids), 24, i), &err), 0);
	reap_all(&f, 8);
	for (uint32_t i = 0; i < 8; i++) {
		memset(got[i], 0xff, sizeof(got[i]));
		tokens_of(&s[i], got[i]);
	}
	assert_memory_equal(want, got, sizeof(want));
	engine_stats(f.e, &st);
	print_message("%llu preemptions\n", (unsigned long long)st.preemptions);
	assert_true(st.preemptions > 0);
	assert_int_equal(st.prompt_tokens, 1 + 38 + 75 + 22 + 59 + 6 + 43 + 80); /* each counted once */
	stop(&f);
	free(s);
}

static uint64_t
hits(struct engine *e)
{
	struct engine_stats st;

	engine_stats(e, &st);
	return st.prefix_hit_tokens;
}

/* A prefix is found again by the same scope under the same plan, and by nobody else. */
static void
test_prefix(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct sunk s[6];
	struct plan *own[6] = {NULL, NULL, NULL, fp8, fp8, NULL};
	uint64_t scope[6] = {1, 1, 2, 1, 1, 1}, want[6] = {0, 64, 0, 0, 64, 64};
	uint32_t ids[128], a[64], b[64];
	struct err err;

	(void)state;
	assert_int_equal(prompt(2, ids), 75);
	cfg.prefix_cache = true;
	start(&f, NULL, 2, &cfg, bf16);
	for (uint32_t i = 0; i < 6; i++) {
		struct request *r = make_request(&s[i], ids, 75, 24, i);
		uint64_t before = hits(f.e);

		r->scope = scope[i];
		r->plan = own[i] == NULL ? NULL : plan_ref(own[i]);
		if (i == 5) /* nothing past the place where the prompt differs */
			r->prompt[70]++;
		assert_int_equal(engine_submit(f.e, r, &err), 0);
		reap_all(&f, 1);
		assert_int_equal(hits(f.e) - before, want[i]);
	}
	tokens_of(&s[0], a);
	for (uint32_t i = 1; i < 3; i++) {
		tokens_of(&s[i], b);
		assert_memory_equal(a, b, 24 * sizeof(*a));
		assert_same_run(&s[0], &s[i]);
	}
	assert_same_run(&s[3], &s[4]);
	stop(&f);
}

/* A replay whose first segment ends where a cached prefix does. */
static void
test_prefix_replay(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(&f);
	static struct sunk s[3];
	uint32_t ids[128];
	struct request *r;
	struct err err;

	(void)state;
	assert_int_equal(prompt(2, ids), 75);
	cfg.prefix_cache = true;
	start(&f, NULL, 2, &cfg, bf16);
	for (uint32_t i = 0; i < 3; i++) {
		r = make_request(&s[i], ids, 75, 24, i);
		if (i > 0) {
			r->n_replay = 2;
			r->replay = calloc(2, sizeof(*r->replay));
			r->replay[0] = (struct segment){0, plan_ref(bf16), 1};
			r->replay[1] = (struct segment){64, plan_ref(fp8), 2};
		}
		assert_int_equal(engine_submit(f.e, r, &err), 0);
		reap_all(&f, 1);
	}
	assert_int_equal(hits(f.e), 128);
	assert_same_run(&s[1], &s[2]);
	stop(&f);
}

/* A sliding window: pages that fell out of it are given back, and a request of
 * any length fits a cache of window, step and block. */
static void
test_window(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(&f);
	static struct sunk s;
	struct forward *fw;
	struct kv_pool kv;
	uint32_t ids[128], n = prompt(2, ids);
	struct err err;

	(void)state;
	model->shape.window = 20;
	cfg.max_batch_tokens = 16;
	cfg.kv_bytes = kv_for(20 + 16 + 32);
	start(&f, NULL, 2, &cfg, mixed);
	assert_int_equal(engine_submit(f.e, make_request(&s, ids, n, 200, 0), &err), 0);
	reap_all(&f, 1);
	assert_int_equal(kv_new(&kv, &model->shape, 16 << 20, &err), 0);
	assert_int_equal(forward_new(&fw, model, f.ops, NULL, &kv, 4, &err), 0);
	kernels_thread_init();
	replay(fw, &kv, &s, ids, n);
	forward_free(&fw);
	kv_free(&kv);
	stop(&f);
	model->shape.window = 0;
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

/* ---- what a flip of the whole model costs ---- */

struct flipping {
	struct sunk s; /* first */
	struct fixture *f;
	struct plan *plan[2];
	uint32_t posted;
};

/* In the middle of each step a flip is posted; it has the step's number with it. */
static void
put_and_flip(void *arg, const struct wire_event *ev)
{
	struct flipping *p = arg;
	struct engine_stats st;
	struct flip *fl;

	sunk_put(&p->s, ev);
	if (ev->kind != WIRE_EV_TOKEN)
		return;
	engine_stats(p->f->e, &st); /* of the step before */
	fl = calloc(1, sizeof(*fl));
	fl->plan = plan_ref(p->plan[p->posted % 2]);
	fl->epoch = ++p->posted + 1;
	fl->owner = (void *)(uintptr_t)(st.step + 1);
	engine_flip(p->f->e, fl);
}

static uint64_t
resident_kib(void)
{
	FILE *f = fopen("/proc/self/smaps_rollup", "r");
	unsigned long kib = 0;
	char line[160];

	while (f != NULL && fgets(line, sizeof(line), f) != NULL)
		if (sscanf(line, "Rss: %lu", &kib) == 1)
			break;
	if (f != NULL)
		fclose(f);
	return kib;
}

static uint64_t
weights_hash(void)
{
	const uint64_t *w = (const uint64_t *)(const void *)model->arena;
	uint64_t h = 1469598103934665603u;

	for (size_t i = 0; i < model->arena_bytes / sizeof(*w); i++)
		h = (h ^ w[i]) * 1099511628211u;
	return h;
}

/* All sites to fp8 and back at every step: the next step runs it, no weight is touched, nothing is kept. */
static void
test_flip_cost(void **state)
{
	static const struct plan_rule all[] = {{"*", "fp8", 0}};
	enum { TOKENS = 60 };
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct flipping p = {.f = &f};
	struct plan *bf16 = NULL, *fp8 = NULL;
	uint64_t before, kib = 0;
	uint32_t ids[128];
	struct flip *fl;
	struct err err;

	(void)state;
	assert_int_equal(plan_derive(&bf16, NULL, model->shape.n_layers, NULL, 0, &err), 0);
	assert_int_equal(plan_derive(&fp8, bf16, model->shape.n_layers, all, 1, &err), 0);
	p.plan[0] = fp8, p.plan[1] = bf16;
	start(&f, NULL, 2, &cfg, bf16);
	before = weights_hash();
	for (int run = 0; run < 3; run++) {
		struct request *r = make_request(&p.s, ids, prompt(1, ids), TOKENS, 1);
		uint32_t n = 0;

		kib = resident_kib();
		r->sink.put = put_and_flip;
		assert_int_equal(engine_submit(f.e, r, &err), 0);
		reap_all(&f, 1);
		while (n < TOKENS) {
			struct flip *next;

			if ((fl = engine_reap_flips(f.e)) == NULL)
				wait_notified(&f);
			for (; fl != NULL; fl = next, n++) {
				next = fl->next;
				assert_int_equal(fl->step, (uintptr_t)fl->owner + 1);
				plan_unref(&fl->plan);
				free(fl);
			}
		}
	}
	assert_true(weights_hash() == before);
#ifdef SANITIZED
	(void)kib; /* they keep what is freed */
#else
	assert_true(kib > 0 && resident_kib() <= kib + 64);
#endif
	stop(&f);
	plan_unref(&bf16);
	plan_unref(&fp8);
}

struct aborting {
	struct sunk s; /* first */
	struct fixture *f;
	struct flip *abort;
	uint32_t tokens, at;
};

/* The end of the rollout comes in the middle of a step. */
static void
put_and_abort(void *arg, const struct wire_event *ev)
{
	struct aborting *a = arg;

	sunk_put(&a->s, ev);
	if (ev->kind != WIRE_EV_TOKEN || ++a->tokens != 5)
		return;
	a->at = ev->position;
	engine_flip(a->f->e, a->abort);
}

/* A request of a rollout follows the active plan from the next step on; one that chose its policy keeps it. */
static void
test_rollout_abort(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct aborting *a = calloc(2, sizeof(*a));
	uint32_t ids[128], n = prompt(1, ids), segments[2] = {0};
	struct err err;

	(void)state;
	start(&f, NULL, 2, &cfg, bf16);
	for (uint32_t i = 0; i < 2; i++) {
		struct request *r = make_request(&a[i].s, ids, n, 24, i);

		a[i].f = &f;
		r->plan = plan_ref(fp8);
		r->rollout = i == 0;
		if (i == 0) {
			a->abort = calloc(1, sizeof(*a->abort));
			*a->abort = (struct flip){.plan = plan_ref(bf16), .epoch = 1, .retire_rollout = true};
			r->sink.put = put_and_abort;
		}
		assert_int_equal(engine_submit(f.e, r, &err), 0);
	}
	reap_all(&f, 2);
	for (uint32_t i = 0; i < 2; i++)
		for (uint32_t j = 0; j < a[i].s.n; j++) {
			const struct wire_event *ev = &a[i].s.ev[j];

			if (ev->kind != WIRE_EV_SEGMENT)
				continue;
			assert_true(ev->a == (segments[i] == 0 ? fp8 : bf16)->digest);
			assert_int_equal(ev->position, segments[i]++ == 0 ? 0 : a->at);
		}
	assert_int_equal(segments[0], 2);
	assert_int_equal(segments[1], 1);
	stop(&f);
	free(a);
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
test_evidence(void **state)
{
	/* At a scale of 1: 448 and -432 become the largest code, 2^-10 and less become 0, 0 is no loss. */
	const float x[8] = {448, -432, 431, 0x1p-10f, -0x1p-11f, 0x1.8p-10f, 0, 1};
	struct evidence_site site;
	struct evidence *ev;
	struct fixture f;
	struct engine_config cfg = config(&f);
	static struct sunk s;
	uint32_t ids[128];
	struct err err;

	(void)state;
	assert_int_equal(evidence_new(&ev, 3), 0);
	evidence_read(ev, GROUP_UP, 2, &site);
	assert_int_equal(site.n, 0);
	evidence_add(ev, GROUP_UP, 2, x, 8);
	evidence_read(ev, GROUP_UP, 2, &site);
	assert_int_equal(site.n, 8);
	assert_true(site.absmax == 448 && site.zero == 0.25f && site.saturated == 0.25f);
	for (uint32_t i = 0; i < 64; i++) /* falls out of the window */
		evidence_next(ev);
	evidence_read(ev, GROUP_UP, 2, &site);
	assert_int_equal(site.n, 0);
	evidence_free(&ev);

	cfg.evidence_steps = 2;
	start(&f, NULL, 2, &cfg, bf16);
	assert_int_equal(engine_submit(f.e, make_request(&s, ids, prompt(1, ids), 24, 0), &err), 0);
	reap_all(&f, 1);
	for (enum plan_group g = 0; g < N_GROUPS; g++) {
		for (uint32_t l = 0; l < (g == GROUP_LM_HEAD ? 1 : model->shape.n_layers); l++) {
			engine_evidence(f.e, g, l, &site);
			assert_true(site.n > 0 && site.absmax > 0 && site.zero >= 0 && site.zero < 0.5);
			assert_true(site.saturated > 0 && site.saturated < 0.5);
		}
	}
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
	cfg.kv_bytes = 4 * 2 * model->shape.n_layers * kv_page_bytes(&model->shape);
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
	struct plan_rule all8 = {"*", "fp8", 0}, all8w = {"*", "fp8w", 0}, kv = {"kv_cache", "fp8", 0};
	struct plan_rule some[] = {{"attention.*@1-", "fp8", 0}, {"mlp.up_proj", "fp8w", 0}, {"kv_cache@0,2-", "fp8", 0}};
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
	    plan_derive(&fp8w, bf16, model->shape.n_layers, &all8w, 1, &err) != 0 ||
	    plan_derive(&kv8, bf16, model->shape.n_layers, &kv, 1, &err) != 0 ||
	    plan_derive(&mixed, bf16, model->shape.n_layers, some, 3, &err) != 0) {
		print_error("%s\n", err.text);
		return -1;
	}
	return 0;
}

static int
teardown(void **state)
{
	(void)state;
	plan_unref(&bf16), plan_unref(&fp8), plan_unref(&fp8w), plan_unref(&kv8), plan_unref(&mixed);
	model_free(&model);
	return 0;
}

/* ---- the team ---- */

static void
note_cpus(void *arg, uint32_t part, uint32_t parts)
{
	(void)parts;
	assert_int_equal(sched_getaffinity(0, sizeof(cpu_set_t), (cpu_set_t *)arg + part), 0);
}

static void *
call_team(void *arg)
{
	struct team *team;
	uint32_t cpus = (uint32_t)CPU_COUNT((cpu_set_t *)arg);
	cpu_set_t *set = calloc(cpus, sizeof(*set)), all;

	/* As large as the mask: to each its own. */
	assert_int_equal(team_new(&team, 0, 50), 0);
	assert_int_equal(team_size(team), cpus);
	team_pin_caller(team);
	team_run(team, note_cpus, set);
	team_free(&team);
	CPU_ZERO(&all);
	for (uint32_t i = 0; i < cpus; i++) {
		assert_int_equal(CPU_COUNT(&set[i]), 1);
		CPU_OR(&all, &all, &set[i]);
	}
	assert_true(CPU_EQUAL(&all, (cpu_set_t *)arg));

	/* Smaller: wherever there is room. */
	assert_int_equal(sched_setaffinity(0, sizeof(cpu_set_t), arg), 0);
	assert_int_equal(team_new(&team, cpus - 1, 50), 0);
	team_pin_caller(team);
	team_run(team, note_cpus, set);
	team_free(&team);
	for (uint32_t i = 0; i + 1 < cpus; i++)
		assert_true(CPU_EQUAL(&set[i], (cpu_set_t *)arg));
	free(set);
	return NULL;
}

static void
test_team_is_pinned(void **state)
{
	pthread_t thread;
	cpu_set_t set;

	(void)state;
	assert_int_equal(sched_getaffinity(0, sizeof(set), &set), 0);
	if (CPU_COUNT(&set) < 2)
		skip();
	assert_int_equal(team_thread(&thread, call_team, &set), 0);
	pthread_join(thread, NULL);
}

/* ---- probes ---- */

#define PROBE_TOKENS 300u

static struct probe *
make_probe(enum probe_kind kind, uint32_t n, uint32_t from, struct plan *a, struct plan *b)
{
	uint32_t *ids = malloc(n * sizeof(*ids)), x = 99;
	struct probe *p;

	for (uint32_t i = 0; i < n; i++) {
		x = x * 1664525u + 1013904223u;
		ids[i] = (x >> 8) % model->shape.vocab;
	}
	assert_int_equal(probe_new(&p, kind, ids, n, from, a, b), 0);
	return p;
}

static struct probe *
reap_probe(struct fixture *f)
{
	struct probe *p;

	while ((p = engine_reap_probes(f->e)) == NULL)
		wait_notified(f);
	assert_null(p->next);
	return p;
}

/* The definitions, written down once more in long double. */
static void
check_score(const float *a, const float *b, uint32_t token, const struct probe_score *s)
{
	uint32_t vocab = model->shape.vocab, n5 = 0;
	long double za = 0, zb = 0, kl = 0, ma = a[s->first[0]], mb = b[s->first[1]];

	for (uint32_t i = 0; i < vocab; i++) {
		assert_true(a[i] <= ma && b[i] <= mb);
		za += expl(a[i] - ma), zb += expl(b[i] - mb);
	}
	for (uint32_t i = 0; i < vocab; i++) {
		long double p = expl(a[i] - ma) / za, q = expl(b[i] - mb) / zb;
		uint32_t above_a = 0, above_b = 0;

		kl += p > 0 ? p * (logl(p) - logl(q)) : 0;
		if (a[i] < ma - 20 || b[i] < mb - 20)
			continue;
		for (uint32_t j = 0; j < vocab; j++) {
			above_a += a[j] > a[i] || (a[j] == a[i] && j < i);
			above_b += b[j] > b[i] || (b[j] == b[i] && j < i);
		}
		n5 += above_a < 5 && above_b < 5;
	}
	assert_true(fabsl(s->kl - kl) <= 1e-4L * kl + 1e-8L);
	assert_true(fabsl(s->nll[0] + (a[token] - ma - logl(za))) <= 1e-9L);
	assert_true(fabsl(s->nll[1] + (b[token] - mb - logl(zb))) <= 1e-9L);
	assert_int_equal(s->common5, n5);
}

static void
test_probe(void **state)
{
	struct plan *plans[] = {bf16, fp8, fp8w, kv8, mixed};
	struct fixture f;
	struct engine_config cfg = config(&f);
	size_t vocab = model->shape.vocab;
	struct err err;

	(void)state;
	cfg.max_batch_tokens = 77;
	start(&f, NULL, 2, &cfg, fp8);
	for (size_t i = 0; i < 5; i++) {
		struct probe *p = make_probe(PROBE_SCORE, PROBE_TOKENS, i == 0 ? 1 : 120, bf16, plans[i]);
		uint32_t n = p->n - p->from;
		double kl = 0;

		p->dump[0] = malloc(n * vocab * sizeof(float));
		p->dump[1] = malloc(n * vocab * sizeof(float));
		assert_int_equal(engine_probe(f.e, p, &err), 0);
		assert_ptr_equal(reap_probe(&f), p);
		assert_int_equal(p->error, 0);
		assert_int_equal(p->side_rows[0], PROBE_TOKENS - 1);
		assert_int_equal(p->side_rows[1], PROBE_TOKENS - 1);
		for (uint32_t j = 0; j < n; j++)
			kl += p->score[j].kl;
		if (plans[i] == bf16)
			assert_true(kl == 0 && memcmp(p->dump[0], p->dump[1], n * vocab * sizeof(float)) == 0);
		else
			assert_true(kl / n > 1e-6 && kl / n < 1);
		for (uint32_t j = 0; j < n; j += 11)
			check_score(p->dump[0] + j * vocab, p->dump[1] + j * vocab, p->token[p->from + j], &p->score[j]);
		free(p->dump[0]), free(p->dump[1]);
		probe_free(&p);
	}
	stop(&f);
}

/* Live requests come and go and take its pages: the numbers are those of a
 * probe alone, and the tokens those of requests alone. */
static void
test_probe_company(void **state)
{
	static uint32_t want[16][64];
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct sunk *s = calloc(64, sizeof(*s));
	uint32_t ids[128], got[64];
	struct probe *p[2];
	struct engine_stats st;
	struct err err;

	(void)state;
	run_many(NULL, 2, 256, 16, false, fp8, NULL, want);
	for (int alone = 1; alone >= 0; alone--) {
		cfg.kv_bytes = alone ? 64 << 20 : 40 * (uint64_t)model->shape.n_layers * kv_page_bytes(&model->shape);
		start(&f, NULL, 2, &cfg, fp8);
		p[alone] = make_probe(PROBE_SCORE, 200, 1, bf16, fp8);
		p[alone]->share = 1;
		if (!alone)
			for (uint32_t i = 0; i < 64; i++)
				assert_int_equal(engine_submit(f.e, make_request(&s[i], ids, prompt(i % 16, ids), 24, i), &err), 0);
		assert_int_equal(engine_probe(f.e, p[alone], &err), 0);
		if (!alone)
			reap_all(&f, 64);
		assert_ptr_equal(reap_probe(&f), p[alone]);
		assert_int_equal(p[alone]->error, 0);
		do
			engine_stats(f.e, &st);
		while (st.kv_pages_used != 0);
		stop(&f);
	}
	assert_memory_equal(p[0]->score, p[1]->score, 199 * sizeof(*p[0]->score));
	for (uint32_t i = 0; i < 64; i++) {
		tokens_of(&s[i], got);
		assert_memory_equal(got, want[i % 16], 24 * sizeof(*got));
	}
	probe_free(&p[0]), probe_free(&p[1]);
	free(s);
}

static void
test_probe_time_and_cancel(void **state)
{
	struct fixture f;
	struct engine_config cfg = config(&f);
	struct engine_stats st;
	struct probe *p;
	struct err err;

	(void)state;
	start(&f, NULL, 2, &cfg, bf16);
	p = make_probe(PROBE_TIME, 100, 1, bf16, fp8);
	p->rows = 4, p->rounds = 10, p->seconds = 60;
	assert_int_equal(engine_probe(f.e, p, &err), 0);
	assert_ptr_equal(reap_probe(&f), p);
	assert_int_equal(p->error, 0);
	assert_int_equal(p->rounds_run, 10);
	for (uint32_t i = 0; i < 10; i++)
		assert_true(p->us[0][i] > 0 && p->us[1][i] > 0);
	probe_free(&p);

	p = make_probe(PROBE_TIME, 100, 1, bf16, fp8);
	p->rows = 1, p->rounds = UINT32_MAX / 64, p->seconds = 600;
	assert_int_equal(engine_probe(f.e, p, &err), 0);
	do
		engine_stats(f.e, &st);
	while (st.step < 200);
	engine_cancel_probe(f.e, p);
	assert_ptr_equal(reap_probe(&f), p);
	assert_int_equal(p->error, -ECANCELED);
	probe_free(&p);
	do
		engine_stats(f.e, &st);
	while (st.kv_pages_used != 0);

	p = make_probe(PROBE_SCORE, model->shape.max_context + 1, 1, bf16, fp8);
	assert_int_equal(engine_probe(f.e, p, &err), -EINVAL);
	probe_free(&p);
	stop(&f);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_sched),
		cmocka_unit_test(test_table_numbers),
		cmocka_unit_test(test_company),
		cmocka_unit_test(test_levels),
		cmocka_unit_test(test_sampling),
		cmocka_unit_test(test_draws),
		cmocka_unit_test(test_flips),
		cmocka_unit_test(test_flip_cost),
		cmocka_unit_test(test_flips_full),
		cmocka_unit_test(test_preempt),
		cmocka_unit_test(test_prefix),
		cmocka_unit_test(test_prefix_replay),
		cmocka_unit_test(test_window),
		cmocka_unit_test(test_pin),
		cmocka_unit_test(test_park_and_cancel),
		cmocka_unit_test(test_evidence),
		cmocka_unit_test(test_refusals),
		cmocka_unit_test(test_rollout_abort),
		cmocka_unit_test(test_team_is_pinned),
		cmocka_unit_test(test_probe),
		cmocka_unit_test(test_probe_company),
		cmocka_unit_test(test_probe_time_and_cancel),
	};

	return cmocka_run_group_tests_name("engine", tests, setup, teardown);
}
