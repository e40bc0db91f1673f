/* SPDX-License-Identifier: Apache-2.0 */
/* Selectors, policies, plans. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "conf/conf.h"
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
	picks("mlp.down_proj@-3-", "mlp.down_proj@7-9");
	picks("mlp.down_proj@-10", "mlp.down_proj@0");
	picks("mlp.down_proj@0-3,9", "mlp.down_proj@0-3 mlp.down_proj@9");
	picks("mlp.down_proj@8,2,1,2-3", "mlp.down_proj@1-3 mlp.down_proj@8");
	picks("mlp.down_proj@0-", "mlp.down_proj");
	picks("kv_cache@-1", "kv_cache@9");
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
	assert_string_equal(err.text, text);
}

static void
test_refused(void **state)
{
	static const struct {
		const char *list, *item;
	} lists[] = {{"", ""}, {"x", "x"}, {"1,,2", ""}, {"1,", ""}, {",1", ""}, {"1x", "1x"}, {"1-2-3", "1-2-3"}, {"-", "-"},
	    {"--1", "--1"}, {"-0", "-0"}, {"1-x", "1-x"}, {"1 - 2", "1 - 2"}, {"+1", "+1"}, {"0x1", "0x1"}, {"1@2", "1@2"},
	    {"1--", "1--"}};
	struct plan_rule lines[] = {{"mlp.*", "fp8", 7}, {"head", "fp8", 8}};
	struct plan *base, *p = NULL;
	char longer[300];
	struct err err;

	(void)state;
	memset(longer, 'a', sizeof(longer) - 1);
	longer[sizeof(longer) - 1] = '\0';
	refused("", "fp8", "no layer group is named; for all of them write *");
	refused("@1", "fp8", "@1: no layer group is named; for all of them write *");
	refused("q_proj", "fp8", "q_proj: no layer group matches \"q_proj\"; the nearest is attention.q_proj");
	refused("kv*", "fp8", "kv*: no layer group matches \"kv*\"; the nearest is kv_cache");
	refused("mlp.up_proj@10", "fp8", "mlp.up_proj@10: no layer 10: the model has layers 0 to 9");
	refused("mlp.up_proj@0-10", "fp8", "mlp.up_proj@0-10: no layer 10: the model has layers 0 to 9");
	refused("mlp.up_proj@-11", "fp8", "mlp.up_proj@-11: no layer -11: the model has layers 0 to 9");
	refused("mlp.up_proj@5-2", "fp8", "mlp.up_proj@5-2: layers 5-2 run backwards");
	refused("mlp.up_proj@-1--2", "fp8", "mlp.up_proj@-1--2: layers -1--2 run backwards");
	refused("lm_head@0", "fp8", "lm_head@0: lm_head has no layer; write it without @");
	refused("mlp.up_proj", "fp9", "mlp.up_proj: \"fp9\" is no format (bf16, fp8, fp8w, fp8t, fp8b)");
	refused("mlp.up_proj", "FP8", "mlp.up_proj: \"FP8\" is no format (bf16, fp8, fp8w, fp8t, fp8b)");
	refused("mlp.up_proj", "", "mlp.up_proj: \"\" is no format (bf16, fp8, fp8w, fp8t, fp8b)");
	refused("kv_cache", "fp8w", "kv_cache: kv_cache cannot be fp8w in this version (bf16, fp8)");
	refused("mlp.\x1b[31m", "fp8", "mlp.?[31m: no layer group matches \"mlp.?[31m\"; the nearest is mlp.gate_proj");
	/* What is no list of layers. */
	for (size_t i = 0; i < sizeof(lists) / sizeof(*lists); i++) {
		char selector[64], want[200];

		snprintf(selector, sizeof(selector), "mlp.up_proj@%s", lists[i].list);
		snprintf(want, sizeof(want), "mlp.up_proj@%s: \"%s\" is no layer: write N, N-M, N- or -N (from the end)",
		    lists[i].list, lists[i].item);
		refused(selector, "fp8", want);
	}
	refused(longer, "fp8", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa: "
	    "the name of the layer group is longer than 63 characters");
	memcpy(longer, "mlp.*@", 6);
	memset(longer + 6, '1', 70);
	longer[76] = '\0';
	refused(longer, "fp8", "mlp.*@111111111111111111111111111111111111111111111111111111111: "
	    "an item of the layer list is longer than 63 characters");
	refused("*@99999999999999999999", "fp8",
	    "*@99999999999999999999: no layer 99999999999999999999: the model has layers 0 to 9");

	/* A file's line is named; a failed plan leaves nothing, whatever came before. */
	assert_int_equal(plan_derive(&p, NULL, LAYERS, lines, 2, &err), -EINVAL);
	assert_string_equal(err.text, "line 8: head: no layer group matches \"head\"; the nearest is lm_head");
	assert_null(p);
	assert_int_equal(plan_derive(&p, NULL, 0, NULL, 0, &err), -EINVAL);
	assert_string_equal(err.text, "a plan cannot have 0 layers");
	assert_int_equal(plan_derive(&p, NULL, 65537, NULL, 0, &err), -EINVAL);
	assert_string_equal(err.text, "a plan cannot have 65537 layers");
	base = derive(NULL, NULL, 0);
	assert_int_equal(plan_derive(&p, base, LAYERS + 1, NULL, 0, &err), -EINVAL);
	assert_string_equal(err.text, "the plan below has 10 layers, the model 11");
	assert_null(p);
	plan_unref(&base);
}

/* The globs against a plain recursive matcher, over all words of some letters. */
static bool
matches(const char *glob, const char *s)
{
	if (*glob == '*')
		return matches(glob + 1, s) || (*s != '\0' && matches(glob, s + 1));
	return *glob == *s && (*s == '\0' || matches(glob + 1, s + 1));
}

static void
test_globs(void **state)
{
	static const char *const parts[] = {"", "*", "mlp", ".", "attention", "_proj", "q", "up", "o", "lm_head", "kv_cache"};
	const uint32_t n = sizeof(parts) / sizeof(*parts);
	uint32_t taken = 0;

	(void)state;
	for (uint32_t word = 0; word < n * n * n * n; word++) {
		char glob[64] = "";
		struct plan_rule rule = {glob, "fp8", 0};
		struct plan *p = NULL;
		bool any = false;
		int rc;

		for (uint32_t w = word, k = 0; k < 4; k++, w /= n)
			if (strlen(glob) + strlen(parts[w % n]) < sizeof(glob))
				strcat(glob, parts[w % n]);
		rc = plan_derive(&p, NULL, LAYERS, &rule, 1, NULL);
		for (int g = 0; g < N_GROUPS; g++) {
			const char *name = plan_group_name((enum plan_group)g);
			bool want = g == GROUP_KV_CACHE ? strcmp(glob, name) == 0 : matches(glob, name);

			any |= want;
			if (rc == 0 && (plan_at(p, (enum plan_group)g, 0) == FORMAT_FP8) != want)
				fail_msg("%s: %s", glob, name);
		}
		if (rc != (any ? 0 : -EINVAL))
			fail_msg("%s: %d", glob, rc);
		taken += any;
		plan_unref(&p);
	}
	assert_true(taken > 100);
}

/* Journals of all versions must find their plans: these never change. */
static void
test_builtin(void **state)
{
	static const struct {
		const char *name, *text;
		uint64_t digest;
	} policies[] = {
		{"bf16", "attention.q_proj = bf16\nattention.k_proj = bf16\nattention.v_proj = bf16\nattention.o_proj = bf16\n"
		    "mlp.gate_proj = bf16\nmlp.up_proj = bf16\nmlp.down_proj = bf16\nlm_head = bf16\nkv_cache = bf16\n",
		    0xeba2558dbd5e5dcau},
		{"fp8", "attention.q_proj = fp8\nattention.k_proj = fp8\nattention.v_proj = fp8\nattention.o_proj = fp8\n"
		    "mlp.gate_proj = fp8\nmlp.up_proj = fp8\nmlp.down_proj = fp8\nlm_head = bf16\nkv_cache = bf16\n",
		    0x1dba1007ad635989u},
	};
	char file[] = "/tmp/octet-plan.XXXXXX";
	struct conf *c;
	struct err err = {""};
	int fd = mkstemp(file);

	(void)state;
	assert_true(fd >= 0);
	assert_int_equal(write(fd, "[model]\npath = /m\n", 18), 18);
	assert_int_equal(close(fd), 0);
	assert_int_equal(conf_load(&c, file, &err), 0);
	assert_int_equal(unlink(file), 0);
	for (size_t i = 0; i < sizeof(policies) / sizeof(*policies); i++) {
		const struct conf_policy *policy = conf_policy(c, policies[i].name);
		struct plan_rule rule[8];
		struct plan *p;
		char *text;

		assert_non_null(policy);
		assert_in_range(policy->n_rules, 1, 8);
		for (size_t k = 0; k < policy->n_rules; k++)
			rule[k] = (struct plan_rule){policy->rules[k].selector, policy->rules[k].format, 0};
		p = derive(NULL, rule, policy->n_rules);
		text = plan_text(p);
		assert_string_equal(text, policies[i].text);
		if (p->digest != policies[i].digest)
			fail_msg("%s: 0x%016" PRIx64, policies[i].name, p->digest);
		free(text);
		plan_unref(&p);
	}
	conf_free(&c);
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
	assert_string_equal(text, "mlp.*@0,2-9 bf16->fp8, kv_cache@9 bf16->fp8");
	free(text);
	plan_unref(&p), plan_unref(&again);
}

/* Any plan is what its text says, and two plans with one text are one. */
static void
test_round_trips(void **state)
{
	uint64_t x = 88172645463325252u, last = 0;

	(void)state;
	print_message("# seed %" PRIu64 "\n", x);
	for (uint32_t i = 0; i < 500; i++) {
		char selector[6][64];
		struct plan_rule rule[6];
		struct plan *p, *again = NULL;
		struct err err = {""};
		char *text;

		for (uint32_t k = 0; k < 6; k++) {
			uint32_t g, lo, hi;

			x ^= x << 13, x ^= x >> 7, x ^= x << 17;
			g = x % N_GROUPS, lo = x / 16 % LAYERS, hi = lo + x / 256 % (LAYERS - lo);
			rule[k] = (struct plan_rule){selector[k], plan_format_name(g == GROUP_KV_CACHE ? FORMAT_FP8 :
			    (enum plan_format)(x / 65536 % N_FORMATS)), 0};
			snprintf(selector[k], sizeof(selector[k]), g == GROUP_LM_HEAD ? "%s" : "%s@%u-%u",
			    plan_group_name((enum plan_group)g), lo, hi);
		}
		p = derive(NULL, rule, 6);
		text = plan_text(p);
		if (plan_parse(&again, LAYERS, text, &err) != 0)
			fail_msg("%s: %s", err.text, text);
		assert_int_equal(plan_distance(p, again), 0);
		assert_memory_equal(p->format, again->format, (size_t)N_GROUPS * LAYERS);
		assert_true(p->digest == again->digest && p->digest != last);
		last = p->digest;
		free(text);
		plan_unref(&p), plan_unref(&again);
	}
}

static void
diff(const char *selector, const char *format, const char *want, uint32_t sites)
{
	struct plan_rule rule = {selector, format, 0};
	struct plan *from = derive(NULL, NULL, 0), *to = derive(NULL, &rule, 1);
	char *text = plan_diff(from, to);

	assert_string_equal(text, want);
	assert_int_equal(plan_distance(from, to), sites);
	free(text);
	plan_unref(&from), plan_unref(&to);
}

static void
test_diff(void **state)
{
	struct plan *ten = derive(NULL, NULL, 0), *one, *held;
	struct err err;
	char *text;

	(void)state;
	diff("*", "fp8", "* bf16->fp8", 71);
	diff("attention.*", "fp8w", "attention.* bf16->fp8w", 40);
	diff("mlp.*", "fp8t", "mlp.* bf16->fp8t", 30);
	diff("attention.*@0-3,7", "fp8", "attention.*@0-3,7 bf16->fp8", 20);
	diff("*@2", "fp8", "attention.*@2 bf16->fp8, mlp.*@2 bf16->fp8", 7);
	diff("lm_head", "fp8", "lm_head bf16->fp8", 1);
	diff("kv_cache@0,5-", "fp8", "kv_cache@0,5-9 bf16->fp8", 6);
	diff("mlp.up_proj", "bf16", "", 0);
	assert_int_equal(plan_derive(&one, NULL, 1, NULL, 0, &err), 0);
	text = plan_diff(ten, one);
	assert_string_equal(text, "10->1 layers");
	free(text);
	assert_int_equal(plan_distance(ten, one), 9);
	held = plan_ref(one);
	plan_unref(&one);
	assert_null(one);
	assert_int_equal(held->n_layers, 1);
	plan_unref(&held), plan_unref(&ten);
	plan_unref(&held); /* nothing */
}

int
main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_selectors), cmocka_unit_test(test_refused),
	    cmocka_unit_test(test_globs), cmocka_unit_test(test_builtin), cmocka_unit_test(test_last_wins), cmocka_unit_test(test_text),
	    cmocka_unit_test(test_round_trips), cmocka_unit_test(test_diff)};

	return cmocka_run_group_tests_name("plan", tests, NULL, NULL);
}
