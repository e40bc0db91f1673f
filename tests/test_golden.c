/* SPDX-License-Identifier: Apache-2.0 */
/*
 * octet's forward pass against an independent float64 one (tests/golden):
 * every logit of the probe within the rounding of BF16, every greedy token
 * equal where the reference's choice is no near-tie.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/engine/forward.h"

/* Where bf16 rounds a value to the other side of a tie than float64 does, the
 * difference of one step travels on through the KV cache: measured on these
 * models as at most 0.13 in bf16 and 1.1 where activations are E4M3 (whose steps
 * are 16 times larger), with logits up to 20. */
static const struct { const char *name; double logit, tie; } plans[] = {
	{"bf16", 0.2, 0.05}, {"fp8w", 0.2, 0.05}, {"fp8", 1.5, 0.5},
};

struct fixture {
	struct model *m;
	struct kv_pool kv;
	struct forward *f;
};

static const char *
source_path(const char *rest)
{
	static char path[4096];
	const char *src = getenv("srcdir");

	snprintf(path, sizeof(path), "%s/%s", src != NULL ? src : ".", rest);
	return path;
}

static void
open_model(struct fixture *x, const char *dir)
{
	char why[256];
	struct err err = {""};

	if (model_load(&x->m, dir, NULL, 0, 0, false, NULL, NULL, &err) != 0)
		fail_msg("%s", err.text);
	assert_int_equal(kv_new(&x->kv, &x->m->shape, 20 * 2 * x->m->shape.n_layers * kv_page_bytes(&x->m->shape), &err), 0);
	assert_int_equal(forward_new(&x->f, x->m, kernels_select(NULL, why, sizeof(why)), NULL, &x->kv, 4, &err), 0);
	kernels_thread_init();
}

static void
close_model(struct fixture *x)
{
	forward_free(&x->f);
	kv_free(&x->kv);
	model_free(&x->m);
}

static void
check_case(struct fixture *x, json_t *c, const json_t *probe, const struct plan *plan, size_t which, double *worst,
    uint32_t *ties)
{
	const json_t *prompt = json_object_get(c, "prompt"), *tokens = json_object_get(c, "tokens");
	const json_t *margins = json_object_get(c, "margins"), *want = json_object_get(c, "logits");
	size_t n_prompt = json_array_size(prompt), n = n_prompt + json_array_size(margins) - 1;
	struct kv_seq seq;

	assert_true(n < 20 * KV_PAGE_TOKENS);
	assert_int_equal(kv_seq_new(&seq, x->m->shape.n_layers, (uint32_t)n), 0);
	for (size_t pos = 0; pos < n; pos++) {
		bool in_prompt = pos < n_prompt;
		uint32_t token = (uint32_t)json_integer_value(in_prompt ? json_array_get(prompt, pos)
		                                                        : json_array_get(tokens, pos - n_prompt));
		struct forward_row row = {token, (uint32_t)pos, &seq, plan, pos + 1 >= n_prompt};
		size_t step = pos + 1 - n_prompt, best = 0;
		const float *logits;

		assert_int_equal(kv_open(&x->kv, &seq, plan, (uint32_t)pos), 0);
		logits = forward_run(x->f, &row, 1);
		if (pos + 1 < n_prompt)
			continue;
		for (size_t i = 0; i < json_array_size(probe); i++) {
			json_int_t id = json_integer_value(json_array_get(probe, i));
			double d = fabs(logits[id] - json_number_value(json_array_get(json_array_get(want, step), i)));

			*worst = d > *worst ? d : *worst;
			if (d > plans[which].logit)
				fail_msg("%s: position %zu, token %d: %g off", plans[which].name, pos, (int)id, d);
		}
		for (size_t i = 1; i < x->m->shape.vocab; i++)
			if (logits[i] > logits[best])
				best = i;
		/* The reference's own tokens are fed, so one near-tie hides nothing after it. */
		if (step < json_array_size(tokens) && best != (size_t)json_integer_value(json_array_get(tokens, step))) {
			(*ties)++;
			if (json_number_value(json_array_get(margins, step)) > plans[which].tie)
				fail_msg("%s: another token at position %zu, margin %g", plans[which].name, pos + 1,
				    json_number_value(json_array_get(margins, step)));
		}
	}
	kv_close(&x->kv, &seq);
	kv_seq_free(&seq);
}

static void
check_model(const char *dir, const char *name, uint32_t max_ties)
{
	struct fixture x;

	open_model(&x, dir);
	for (size_t i = 0; i < sizeof(plans) / sizeof(*plans); i++) {
		struct plan_rule rule = {"*", plans[i].name, 0};
		char file[128];
		struct plan *plan;
		double worst = 0;
		uint32_t ties = 0;
		struct err err;
		json_t *golden, *c;
		size_t j;

		snprintf(file, sizeof(file), "tests/golden/%s-%s.json", name, plans[i].name);
		golden = json_load_file(source_path(file), 0, NULL);
		assert_non_null(golden);
		assert_int_equal(plan_derive(&plan, NULL, x.m->shape.n_layers, &rule, 1, &err), 0);
		json_array_foreach(json_object_get(golden, "cases"), j, c)
			check_case(&x, c, json_object_get(golden, "probe"), plan, i, &worst, &ties);
		print_message("%s %s: largest difference of a logit %.4f, %u near-ties\n", name, plans[i].name, worst, ties);
		if (i == 0)
			assert_in_range(ties, 0, max_ties);
		plan_unref(&plan);
		json_decref(golden);
	}
	close_model(&x);
}

static void
test_proof(void **state)
{
	(void)state;
	check_model(source_path("models/proof"), "proof", 0);
}

static void
test_stories(void **state)
{
	const char *dir = getenv("OCTET_STORIES");

	(void)state;
	check_model(dir, "stories260k", 1); /* token 185: margin 0.0035 */
}

int
main(void)
{
	const char *stories = getenv("OCTET_STORIES");
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_proof), cmocka_unit_test(test_stories)};

	/* The second model is not part of the project. */
	if (stories == NULL || access(stories, R_OK) != 0)
		return _cmocka_run_group_tests("golden", tests, 1, NULL, NULL);
	return cmocka_run_group_tests_name("golden", tests, NULL, NULL);
}
