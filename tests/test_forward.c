/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The forward pass of models of random shapes and weights: the logits of every
 * position have the same bits whatever the number of rows in a batch, the cut of
 * the prompts, the company, the threads and the level. What they are compared
 * with is level ref, one thread, one row at a time.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/forward.h"

#define SEQS 70u      /* more than the most rows of a batch */
#define TOKENS 75u    /* the longest: three pages */

struct some_model {
	struct model m;
	struct k_weight *weight[2 * (GROUP_DOWN + 1) + 1]; /* for their memory */
	void *mem[2 * (GROUP_DOWN + 1) + 1];
	uint32_t n_weights;
	struct plan *plan[2];
	uint32_t token[SEQS][TOKENS], len[SEQS];
};

static uint64_t state;

static uint32_t
below(uint32_t n)
{
	state = state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)((state >> 33) % n);
}

/* Of about 1, with an outlier now and then. */
static float
value(void)
{
	float v = ((float)below(20001) - 1e4f) * 1e-4f;

	return below(200) == 0 ? v * 16 : v;
}

static float *
values(uint32_t n, float around)
{
	float *v = malloc(n * sizeof(*v));

	assert_non_null(v);
	for (uint32_t i = 0; i < n; i++)
		v[i] = around + 0.5f * value();
	return v;
}

static void
make_weight(struct some_model *s, struct k_weight *w, uint32_t n, uint32_t k)
{
	size_t bytes = k_weight_plan(w, n, k);
	uint16_t *rows = malloc((size_t)K_PANEL * k * sizeof(*rows));
	struct k_exception *exc = NULL;
	uint32_t n_exc = 0, cap = 0, bad_row, bad_col;
	float by = 1.5f / sqrtf((float)k);
	void *mem = aligned_alloc(64, (bytes + 63) & ~(size_t)63);

	assert_non_null(rows);
	assert_non_null(mem);
	memset(mem, 0, bytes);
	k_weight_place(w, mem);
	for (uint32_t p = 0; p < w->n_pad / K_PANEL; p++) {
		for (uint32_t i = 0; i < K_PANEL * k; i++)
			rows[i] = k_bf16_from_float(below(300) == 0 ? by * 1e-6f * value() : by * value());
		assert_int_equal(k_pack_panel(w, p, rows, &exc, &n_exc, &cap, &bad_row, &bad_col), 0);
	}
	w->exc = exc;
	w->n_exc = n_exc;
	k_weight_finish(w);
	free(rows);
	s->mem[s->n_weights] = mem;
	s->weight[s->n_weights++] = w;
}

static void
make_rope(struct model *m)
{
	uint32_t half = m->shape.head_dim / 2;

	m->rope_cos = malloc((size_t)m->shape.max_context * half * sizeof(float));
	m->rope_sin = malloc((size_t)m->shape.max_context * half * sizeof(float));
	assert_true(m->rope_cos != NULL && m->rope_sin != NULL);
	for (uint32_t i = 0; i < m->shape.max_context * half; i++) {
		double a = i / half * config_rope_freq(&m->shape, i % half);

		m->rope_cos[i] = (float)cos(a);
		m->rope_sin[i] = (float)sin(a);
	}
}

static struct plan *
some_plan(uint32_t n_layers)
{
	static const char *const selector[] = {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
	    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "lm_head", "kv_cache"};
	struct plan_rule rule[N_GROUPS];
	struct plan *p = NULL;
	struct err err = {""};

	for (uint32_t g = 0; g < N_GROUPS; g++) {
		enum plan_format f;

		do
			f = (enum plan_format)below(N_FORMATS);
		while (!plan_group_has((enum plan_group)g, f));
		rule[g] = (struct plan_rule){selector[g], plan_format_name(f), 0};
	}
	if (plan_derive(&p, NULL, n_layers, rule, N_GROUPS, &err) != 0)
		fail_msg("%s", err.text);
	return p;
}

static void
make_model(struct some_model *s, uint32_t context)
{
	static const uint32_t head_dims[] = {2, 6, 16, 24, 32, 40, 64, 80};
	struct model *m = &s->m;
	struct model_shape *sh = &m->shape;

	memset(s, 0, sizeof(*s));
	sh->head_dim = head_dims[below(8)];
	sh->n_kv_heads = 1 + below(3);
	sh->n_heads = sh->n_kv_heads * (1 + below(4));
	sh->hidden = 1 + below(100);
	sh->intermediate = 1 + below(140);
	sh->n_layers = 1 + below(2);
	sh->vocab = 2 + below(70);
	sh->max_context = context;
	sh->window = below(2) == 0 ? 0 : 1 + below(context);
	sh->rms_eps = 1e-5f;
	sh->rope_theta = 10000;
	m->layer = calloc(sh->n_layers, sizeof(*m->layer));
	assert_non_null(m->layer);
	for (uint32_t l = 0; l < sh->n_layers; l++) {
		struct model_layer *x = &m->layer[l];
		uint32_t q = sh->n_heads * sh->head_dim, kv = sh->n_kv_heads * sh->head_dim;

		x->input_norm = values(sh->hidden, 1), x->post_norm = values(sh->hidden, 1);
		if (below(2) == 0)
			x->q_norm = values(sh->head_dim, 1), x->k_norm = values(sh->head_dim, 1);
		make_weight(s, &x->linear[GROUP_Q], q, sh->hidden);
		make_weight(s, &x->linear[GROUP_K], kv, sh->hidden);
		make_weight(s, &x->linear[GROUP_V], kv, sh->hidden);
		make_weight(s, &x->linear[GROUP_O], sh->hidden, q);
		make_weight(s, &x->linear[GROUP_GATE], sh->intermediate, sh->hidden);
		make_weight(s, &x->linear[GROUP_UP], sh->intermediate, sh->hidden);
		make_weight(s, &x->linear[GROUP_DOWN], sh->hidden, sh->intermediate);
		if (below(2) == 0)
			x->bias[GROUP_V] = values(kv, 0);
	}
	make_weight(s, &m->lm_head, sh->vocab, sh->hidden);
	m->embed = malloc((size_t)sh->vocab * sh->hidden * sizeof(*m->embed));
	assert_non_null(m->embed);
	for (uint32_t i = 0; i < sh->vocab * sh->hidden; i++)
		m->embed[i] = k_bf16_from_float(value());
	m->final_norm = values(sh->hidden, 1);
	make_rope(m);
	for (uint32_t i = 0; i < 2; i++)
		s->plan[i] = some_plan(sh->n_layers);
	for (uint32_t i = 0; i < SEQS; i++) {
		s->len[i] = 1 + below(below(4) == 0 ? TOKENS : 4);
		for (uint32_t j = 0; j < s->len[i]; j++)
			s->token[i][j] = below(sh->vocab);
	}
}

static void
free_model(struct some_model *s)
{
	struct model *m = &s->m;

	for (uint32_t i = 0; i < s->n_weights; i++) {
		free(s->weight[i]->exc);
		free(s->mem[i]);
	}
	for (uint32_t l = 0; l < m->shape.n_layers; l++) {
		struct model_layer *x = &m->layer[l];

		free(x->input_norm), free(x->post_norm), free(x->q_norm), free(x->k_norm), free(x->bias[GROUP_V]);
	}
	free(m->layer), free(m->embed), free(m->final_norm), free(m->rope_cos), free(m->rope_sin);
	for (uint32_t i = 0; i < 2; i++)
		plan_unref(&s->plan[i]);
}

/* The next rows of sequences until there are n: of one plan first, then of the other, each as long a run as it happens. */
static uint32_t
some_rows(const struct some_model *s, const struct kv_seq *kv, uint32_t done[SEQS], uint32_t n, struct forward_row *row,
    uint32_t *who)
{
	uint32_t at = 0;

	for (uint32_t plan = 0; plan < 2; plan++) {
		uint32_t to = plan == 1 ? n : at + below(n - at + 1), first = below(SEQS);

		for (uint32_t i = 0; i < SEQS && at < to; i++) {
			uint32_t q = (first + i) % SEQS, left = s->len[q] - done[q], run;

			if (q % 2 != plan || left == 0)
				continue;
			run = 1 + below(below(2) == 0 ? left : 1);
			for (; run > 0 && at < to; run--, at++, done[q]++) {
				row[at] = (struct forward_row){.token = s->token[q][done[q]], .pos = done[q], .kv = &kv[q], .plan = s->plan[plan],
				    .wants_logits = true};
				who[at] = q;
			}
		}
	}
	return at;
}

/* What runs a model, and its sequences. */
struct rig {
	struct kv_seq kv[SEQS];
	uint32_t n_seqs;
	struct kv_pool pool;
	struct forward *f;
	struct team *team;
};

static void
set_up(struct rig *g, const struct some_model *s, const char *level, uint32_t threads, uint32_t rows, uint32_t n_seqs, uint32_t tokens)
{
	char why[256] = "";
	const struct k_ops *ops = kernels_select(level, why, sizeof(why));
	struct err err = {""};

	assert_non_null(ops);
	assert_int_equal(team_new(&g->team, threads, 50), 0);
	assert_int_equal(kv_new(&g->pool, &s->m.shape, 64u << 20, &err), 0);
	assert_int_equal(forward_new(&g->f, &s->m, ops, g->team, &g->pool, rows, &err), 0);
	g->n_seqs = n_seqs;
	for (uint32_t i = 0; i < n_seqs; i++)
		assert_int_equal(kv_seq_new(&g->kv[i], s->m.shape.n_layers, tokens), 0);
}

static void
tear_down(struct rig *g)
{
	for (uint32_t i = 0; i < g->n_seqs; i++) {
		kv_close(&g->pool, &g->kv[i]);
		kv_seq_free(&g->kv[i]);
	}
	forward_free(&g->f);
	kv_free(&g->pool);
	team_free(&g->team);
}

/* Logits of every position, [SEQS][TOKENS][vocab]: batches of n rows. */
static void
run(const struct some_model *s, const char *level, uint32_t threads, uint32_t n, float *logits)
{
	uint32_t done[SEQS] = {0}, got, who[64], vocab = s->m.shape.vocab;
	struct forward_row row[64];
	struct rig g;

	set_up(&g, s, level, threads, n, SEQS, TOKENS);
	while ((got = some_rows(s, g.kv, done, n, row, who)) > 0 || memcmp(done, s->len, sizeof(done)) != 0) {
		const float *y;

		if (got == 0) /* all left are of the other plan */
			continue;
		for (uint32_t i = 0; i < got; i++)
			assert_int_equal(kv_open(&g.pool, &g.kv[who[i]], row[i].plan, row[i].pos), 0);
		team_set_alone(g.team, below(2) == 0);
		y = forward_run(g.f, row, got);
		for (uint32_t i = 0; i < got; i++)
			memcpy(logits + ((size_t)who[i] * TOKENS + row[i].pos) * vocab, y + (size_t)i * vocab, vocab * sizeof(*y));
	}
	tear_down(&g);
}

static void
compare(const struct some_model *s, const float *want, const float *got, const char *level, uint32_t threads, uint32_t n)
{
	uint32_t vocab = s->m.shape.vocab;

	for (uint32_t i = 0; i < SEQS; i++)
		for (uint32_t j = 0; j < s->len[i] * vocab; j++)
			if (memcmp(&want[i * TOKENS * vocab + j], &got[i * TOKENS * vocab + j], sizeof(*got)) != 0)
				fail_msg("%s, %u threads, %u rows: sequence %u, position %u, logit %u: %a, not %a", level, threads, n, i,
				    j / vocab, j % vocab, (double)got[i * TOKENS * vocab + j], (double)want[i * TOKENS * vocab + j]);
}

static void
check_model(uint64_t seed)
{
	static const uint32_t rows[] = {1, 2, 7, 16, 33, 64};
	struct some_model s;
	char why[256];
	size_t bytes;
	float *want, *got;

	state = seed;
	make_model(&s, TOKENS);
	print_message("seed %llu: hidden %u, %u/%u heads of %u, intermediate %u, vocab %u, window %u, %u layers\n",
	    (unsigned long long)seed, s.m.shape.hidden, s.m.shape.n_heads, s.m.shape.n_kv_heads, s.m.shape.head_dim,
	    s.m.shape.intermediate, s.m.shape.vocab, s.m.shape.window, s.m.shape.n_layers);
	bytes = (size_t)SEQS * TOKENS * s.m.shape.vocab * sizeof(float);
	want = calloc(1, bytes), got = calloc(1, bytes);
	assert_true(want != NULL && got != NULL);
	run(&s, "ref", 1, 1, want);
	for (size_t l = 0; kernels_level(l) != NULL; l++) {
		if (kernels_select(kernels_level(l), why, sizeof(why)) == NULL)
			continue;
		for (uint32_t i = l == 0 ? 5 : 0; i < sizeof(rows) / sizeof(*rows); i++) { /* ref is slow */
			uint32_t threads = 1 + below(2);

			memset(got, 0xff, bytes);
			run(&s, kernels_level(l), threads, rows[i], got);
			compare(&s, want, got, kernels_level(l), threads, rows[i]);
		}
	}
	free(want), free(got);
	free_model(&s);
}

/* ---- contexts so long that threads share out a KV head's blocks ---- */

#define LONG 1300u    /* more than 2 * 16 blocks */
#define DECODED 12u

/* Logits of the last positions of two sequences, [2][DECODED][vocab], decoded a row each at a time. */
static void
run_long(const struct some_model *s, const uint32_t *token, const char *level, uint32_t threads, float *logits)
{
	uint32_t vocab = s->m.shape.vocab;
	struct forward_row row[64];
	struct rig g;

	set_up(&g, s, level, threads, 64, 2, LONG);
	for (uint32_t q = 0; q < 2; q++)
		for (uint32_t pos = 0, n; pos < LONG - DECODED - q; pos += n) {
			for (n = 0; n < 64 && pos + n < LONG - DECODED - q; n++) {
				row[n] = (struct forward_row){.token = token[pos + n], .pos = pos + n, .kv = &g.kv[q], .plan = s->plan[q]};
				assert_int_equal(kv_open(&g.pool, &g.kv[q], s->plan[q], pos + n), 0);
			}
			forward_run(g.f, row, n);
		}
	for (uint32_t i = 0; i < DECODED; i++) {
		const float *y;

		for (uint32_t q = 0; q < 2; q++) {
			uint32_t pos = LONG - DECODED - q + i;

			row[q] = (struct forward_row){.token = token[pos], .pos = pos, .kv = &g.kv[q], .plan = s->plan[q], .wants_logits = true};
			assert_int_equal(kv_open(&g.pool, &g.kv[q], s->plan[q], pos), 0);
		}
		y = forward_run(g.f, row, 2);
		for (uint32_t q = 0; q < 2; q++)
			memcpy(logits + (q * DECODED + i) * vocab, y + (size_t)q * vocab, vocab * sizeof(*y));
	}
	tear_down(&g);
}

static void
test_long(void **unused)
{
	static uint32_t token[LONG];
	char why[256];

	(void)unused;
	kernels_thread_init();
	/* Small heads: ref takes its time. */
	for (uint64_t seed = 105; seed <= 106; seed++) {
		struct some_model s;
		size_t bytes;
		float *want, *got;

		state = seed;
		make_model(&s, LONG);
		s.m.shape.window = seed % 2 == 0 ? 0 : LONG - 100; /* either is long */
		print_message("seed %llu: %u/%u heads of %u, window %u\n", (unsigned long long)seed, s.m.shape.n_heads,
		    s.m.shape.n_kv_heads, s.m.shape.head_dim, s.m.shape.window);
		for (uint32_t i = 0; i < LONG; i++)
			token[i] = below(s.m.shape.vocab);
		bytes = 2 * (size_t)DECODED * s.m.shape.vocab * sizeof(float);
		want = calloc(1, bytes), got = calloc(1, bytes);
		assert_true(want != NULL && got != NULL);
		run_long(&s, token, "ref", 1, want);
		for (size_t l = 0; kernels_level(l) != NULL; l++)
			for (uint32_t threads = 1; threads <= 2; threads++) {
				if (kernels_select(kernels_level(l), why, sizeof(why)) == NULL || (l == 0 && threads == 1))
					continue;
				memset(got, 0xff, bytes);
				run_long(&s, token, kernels_level(l), threads, got);
				for (size_t i = 0; i < bytes / sizeof(*got); i++)
					if (memcmp(&want[i], &got[i], sizeof(*got)) != 0)
						fail_msg("%s, %u threads: logit %zu is %a, not %a", kernels_level(l), threads, i, (double)got[i], (double)want[i]);
			}
		free(want), free(got);
		free_model(&s);
	}
}

static void
test_any_cut(void **unused)
{
	const char *many = getenv("OCTET_LONG");
	uint64_t n = many != NULL && *many ? 100 : 4;

	(void)unused;
	kernels_thread_init();
	for (uint64_t seed = 1; seed <= n; seed++)
		check_model(seed);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_any_cut), cmocka_unit_test(test_long)};

	return cmocka_run_group_tests_name("forward", tests, NULL, NULL);
}
