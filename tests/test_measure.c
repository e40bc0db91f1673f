/* SPDX-License-Identifier: Apache-2.0 */
/* The numbers of eval, and the test behind the guardrail. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <string.h>

#include "daemon/engine/sample.h"
#include "daemon/measure.h"
#include "daemon/shadow.h"

static void
test_distances(void **state)
{
	(void)state;
	assert_int_equal(measure_edit_distance("kitten", "sitting"), 3);
	assert_int_equal(measure_edit_distance("", "abc"), 3);
	assert_int_equal(measure_edit_distance("abc", "abc"), 0);
	assert_int_equal(measure_word_errors("the cat sat", " the  cat sat\n"), 0);
	assert_int_equal(measure_word_errors("the cat sat", "a cat sat down"), 2);
	assert_int_equal(measure_word_errors("", ""), 0);
}

/* Sums of the binomial distribution, by hand. */
static void
test_mcnemar(void **state)
{
	(void)state;
	assert_true(measure_mcnemar(0, 0) == 1);
	assert_true(fabs(measure_mcnemar(0, 5) - 0.0625) < 1e-12);
	assert_true(fabs(measure_mcnemar(8, 1) - 20.0 / 512) < 1e-12);
	assert_true(measure_mcnemar(7, 7) == 1);
}

static void
test_scores(void **state)
{
	struct probe_score s[4] = {{{1, 1}, 0.5, {1, 1}, 5}, {{2, 3}, 0.1, {1, 2}, 4}, {{3, 3}, 0.2, {7, 7}, 5}, {{2, 1}, 0, {3, 3}, 1}};
	json_t *j = measure_scores(s, 4), *kl = json_object_get(j, "kl"), *p = json_object_get(j, "perplexity");

	(void)state;
	assert_true(fabs(json_number_value(json_object_get(kl, "mean")) - 0.2) < 1e-15);
	assert_true(json_number_value(json_object_get(kl, "median")) == 0.1);
	assert_true(json_number_value(json_object_get(kl, "max")) == 0.5);
	assert_true(fabs(json_number_value(json_object_get(p, "baseline")) - exp(2)) < 1e-12);
	assert_true(fabs(json_number_value(json_object_get(p, "change_percent"))) < 1e-12);
	assert_true(json_number_value(json_object_get(p, "change_low")) < 0);
	assert_true(json_number_value(json_object_get(j, "top1")) == 0.75);
	assert_true(fabs(json_number_value(json_object_get(j, "top5")) - 0.75) < 1e-15);
	json_decref(j);
}

/* Requests until the guardrail acts, 0: it does not. X is exponential, cut at 1. */
static uint32_t
until_alarm(uint64_t seed, double mean, double bound, uint32_t requests)
{
	struct bet b = {.bound = bound};

	for (uint32_t i = 0; i < requests; i++) {
		bet_take(&b, fmin(1, -mean * log(1 - sample_uniform(seed, i))));
		if (b.log_capital >= BET_LIMIT)
			return i + 1;
	}
	return 0;
}

/* The mean is exactly the bound, the worst case that is no breach: 200 plans of 10,000 requests each. */
static void
test_no_false_alarm(void **state)
{
	uint32_t alarms = 0;

	(void)state;
	for (uint64_t plan = 0; plan < 200; plan++)
		alarms += until_alarm(plan, 0.01, 0.01, 10000) != 0;
	assert_int_equal(alarms, 0);
	assert_int_equal(until_alarm(9, 0.005, 0.01, 10000), 0);
}

static void
test_alarm(void **state)
{
	(void)state;
	for (uint64_t plan = 0; plan < 50; plan++) {
		uint32_t twice = until_alarm(plan, 0.02, 0.01, 10000), far = until_alarm(plan, 0.3, 0.01, 10000);

		assert_true(twice > 0 && twice < 200);
		assert_true(far > 0 && far <= 50);
	}
}

/* What a busy machine adds to some steps says nothing of what a step takes; a difference comes with its error. */
static void
test_steps(void **state)
{
	float us[2][600];
	struct measure_step t;
	uint64_t at = 7;

	(void)state;
	for (uint32_t i = 0; i < 600; i++)
		for (int s = 0; s < 2; s++) {
			at = at * 6364136223846793005u + 1442695040888963407u;
			us[s][i] = (float)(100 - 3 * s + (double)(at >> 40) / (1 << 24) + ((at >> 33) % 3 == 0 ? 500 : 0));
		}
	measure_steps(us[0], us[1], 600, &t);
	assert_true(fabs(t.us[0] - 100.4) < 0.3 && fabs(t.us[1] - 97.4) < 0.3);
	assert_true(t.error > 0 && t.error < 0.2 && fabs(t.saved - 3) < 4 * t.error);
	measure_steps(us[0], us[0], 600, &t);
	assert_true(t.saved == 0 && t.error == 0);
	measure_steps(us[0], us[1], 0, &t);
	assert_true(t.us[0] == 0 && t.saved == 0);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_distances),
		cmocka_unit_test(test_mcnemar),
		cmocka_unit_test(test_scores),
		cmocka_unit_test(test_no_false_alarm),
		cmocka_unit_test(test_alarm),
		cmocka_unit_test(test_steps),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
