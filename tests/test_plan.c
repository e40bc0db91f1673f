/* SPDX-License-Identifier: Apache-2.0 */
/* Selectors, policies, plans. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/plan.h"

#define LAYERS 10u

static struct plan *
derive(const struct plan *base, const struct plan_rule *rules, size_t n)
{
	struct plan *p;
	struct err err;

	if (plan_derive(&p, base, LAYERS, rules, n, &err) != 0)
		fail_msg("%s", err.text);
	return p;
}

/* The sites a selector picks, as the text of the plan that makes them fp8. */
static void
picks(const char *selector, const char *text)
{
	struct plan_rule rule = {selector, "fp8", 0};
	struct plan *p = derive(NULL, &rule, 1);
	char *all = plan_text(p), *line, *rest = all, got[512] = "";

	while ((line = strsep(&rest, "\n")) != NULL)
		if (strstr(line, " = fp8") != NULL) {
			*strstr(line, " = fp8") = '\0';
			strcat(got, *got ? " " : "");
			strcat(got, line);
		}
	assert_string_equal(got, text);
	free(all);
	plan_unref(&p);
}

static void
test_selectors(void **state)
{
	(void)state;
	picks("attention.q_proj", "attention.q_proj");
	picks("attention.*", "attention.q_proj attention.k_proj attention.v_proj attention.o_proj");
	picks("*_proj@9", "attention.q_proj@9 attention.k_proj@9 attention.v_proj@9 attention.o_proj@9 mlp.gate_proj@9 "
	    "mlp.up_proj@9 mlp.down_proj@9");
	picks("lm_head", "lm_head");
	picks("lm*", "lm_head");
	picks("kv_cache", "kv_cache");
	picks("kv_cache@4-", "kv_cache@4-9");
	picks("mlp.down_proj@0-3,7", "mlp.down_proj@0-3 mlp.down_proj@7");
	picks("mlp.down_proj@-1", "mlp.down_proj@9");
	picks("mlp.down_proj@-3--1", "mlp.down_proj@7-9");
	picks(" mlp.up_proj @ 0 , 1 ", "mlp.up_proj@0-1");
	/* Globs pick linear layers and lm_head, never the KV cache; with layers no lm_head either. */
	picks("*", "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.gate_proj mlp.up_proj "
	    "mlp.down_proj lm_head");
	picks("*@0-9", "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.gate_proj mlp.up_proj "
	    "mlp.down_proj");
}

static void
refused(const char *selector, const char *format, const char *text)
{
	struct plan_rule rule = {selector, format, 0};
	struct plan *p = NULL;
	struct err err;

	assert_int_equal(plan_derive(&p, NULL, LAYERS, &rule, 1, &err), -EINVAL);
	assert_null(p);
	if (strstr(err.text, text) == NULL)
		fail_msg("\"%s\" has no \"%s\"", err.text, text);
}

static void
test_refused(void **state)
{
	char longer[300];

	(void)state;
	memset(longer, 'a', sizeof(longer) - 1);
	longer[sizeof(longer) - 1] = '\0';
	refused("", "fp8", "no layer group is named");
	refused("q_proj", "fp8", "no layer group matches \"q_proj\"; the nearest is attention.q_proj");
	refused("kv*", "fp8", "no layer group matches \"kv*\"");
	refused("mlp.up_proj@10", "fp8", "no layer 10: the model has layers 0 to 9");
	refused("mlp.up_proj@-11", "fp8", "no layer -11");
	refused("mlp.up_proj@5-2", "fp8", "run backwards");
	refused("mlp.up_proj@", "fp8", "is no layer: write N, N-M, N- or -N");
	refused("mlp.up_proj@x", "fp8", "\"x\" is no layer");
	refused("mlp.up_proj@1,,2", "fp8", "is no layer");
	refused("mlp.up_proj@99999999999999999999", "fp8", "no layer");
	refused("lm_head@0", "fp8", "lm_head has no layer");
	refused("mlp.up_proj", "fp9", "\"fp9\" is no format (bf16, fp8, fp8w, fp8t)");
	refused("kv_cache", "fp8w", "kv_cache cannot be fp8w");
	refused(longer, "fp8", "longer than");
	refused("mlp.\x1b[31m", "fp8", "mlp.?[31m");
}

static void
test_last_wins(void **state)
{
	struct plan_rule rules[] = {{"*", "fp8", 1}, {"mlp.*", "fp8w", 2}, {"mlp.up_proj@2-4", "bf16", 3}, {"*@3", "fp8t", 4}};
	struct plan *p = derive(NULL, rules, 4), *q, *same;

	(void)state;
	assert_int_equal(plan_at(p, GROUP_Q, 0), FORMAT_FP8);
	assert_int_equal(plan_at(p, GROUP_UP, 1), FORMAT_FP8W);
	assert_int_equal(plan_at(p, GROUP_UP, 2), FORMAT_BF16);
	assert_int_equal(plan_at(p, GROUP_UP, 3), FORMAT_FP8T);
	assert_int_equal(plan_at(p, GROUP_LM_HEAD, 0), FORMAT_FP8);
	assert_int_equal(plan_at(p, GROUP_KV_CACHE, 5), FORMAT_BF16);
	/* On top of another plan; the other is untouched. */
	q = derive(p, &(struct plan_rule){"kv_cache@1", "fp8", 0}, 1);
	assert_int_equal(plan_distance(p, q), 1);
	assert_true(p->digest != q->digest);
	assert_int_equal(plan_at(p, GROUP_KV_CACHE, 1), FORMAT_BF16);
	same = derive(q, &(struct plan_rule){"kv_cache", "bf16", 0}, 1);
	assert_true(same->digest == p->digest);
	assert_int_equal(plan_distance(p, same), 0);
	plan_unref(&p), plan_unref(&q), plan_unref(&same);
	assert_null(p);
}

static void
test_text(void **state)
{
	struct plan_rule rules[] = {{"mlp.*@0,2-", "fp8", 0}, {"kv_cache@-1", "fp8", 0}};
	struct plan *p = derive(NULL, rules, 2), *again;
	char *text = plan_text(p), *bad;
	struct err err;

	(void)state;
	assert_int_equal(plan_parse(&again, LAYERS, text, &err), 0);
	assert_true(again->digest == p->digest);
	plan_unref(&again);
	assert_int_equal(plan_parse(&again, LAYERS + 1, text, &err), -EINVAL);
	/* Only the canonical text is the text of a plan. */
	for (size_t i = 0; text[i] != '\0'; i++) {
		bad = strdup(text);
		bad[i] = bad[i] == 'x' ? 'y' : 'x';
		assert_true(plan_parse(&again, LAYERS, bad, &err) < 0);
		free(bad);
	}
	free(text);
	text = plan_diff(p, p);
	assert_string_equal(text, "");
	free(text);
	again = derive(NULL, NULL, 0);
	text = plan_diff(again, p);
	assert_string_equal(text, "mlp.gate_proj@0,2-9 bf16->fp8, mlp.up_proj@0,2-9 bf16->fp8, mlp.down_proj@0,2-9 bf16->fp8, "
	    "kv_cache@9 bf16->fp8");
	free(text);
	plan_unref(&p), plan_unref(&again);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_selectors), cmocka_unit_test(test_refused),
	    cmocka_unit_test(test_last_wins), cmocka_unit_test(test_text)};

	return cmocka_run_group_tests_name("plan", tests, NULL, NULL);
}
