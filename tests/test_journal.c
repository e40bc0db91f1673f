/* SPDX-License-Identifier: Apache-2.0 */
/* The journal: what was written is read, and no damage is taken for it. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/journal.h"

#define LAYERS 3u

static char dir[] = "/tmp/octet-journal.XXXXXX";
static char file[64];
static struct plan *plans[2];

static struct journal *
open_journal(uint64_t want_torn)
{
	struct journal *j;
	uint64_t torn;
	struct err err;

	if (journal_open(&j, dir, LAYERS, &torn, &err) != 0)
		fail_msg("%s", err.text);
	assert_int_equal(torn != 0, want_torn != 0);
	return j;
}

static int
append(struct journal *j, enum journal_kind kind, uint64_t epoch, const char *why)
{
	struct journal_record r = {.kind = kind, .epoch = epoch, .time_us = 1000, .uid = 7, .pid = 8, .step = epoch * 10,
	    .plan = plans[epoch % 2]->digest, .program = "te\"st\\", .policy = "p"};
	struct err err;

	snprintf(r.why, sizeof(r.why), "%s", why);
	snprintf(r.change, sizeof(r.change), "attention.q_proj bf16->fp8");
	return journal_append(j, &r, plans[epoch % 2], &err);
}

static int
fresh(void **state)
{
	(void)state;
	unlink(file);
	return 0;
}

static char *
read_file(size_t *n)
{
	FILE *f = fopen(file, "r");
	char *s = malloc(1 << 20);

	assert_non_null(f);
	assert_non_null(s);
	*n = fread(s, 1, 1 << 20, f);
	fclose(f);
	return s;
}

static void
write_file(const char *s, size_t n)
{
	FILE *f = fopen(file, "w");

	assert_non_null(f);
	assert_int_equal(fwrite(s, 1, n, f), n);
	assert_int_equal(fclose(f), 0);
}

static void
test_round_trip(void **state)
{
	struct journal *j = open_journal(0);
	struct journal_entry *e;
	struct journal_record r;
	struct plan *p;

	(void)state;
	assert_int_equal(journal_last_epoch(j), 0);
	assert_false(journal_last_applied(j, &r));
	assert_int_equal(append(j, JOURNAL_START, 1, "start"), 0);
	assert_int_equal(append(j, JOURNAL_INTENT, 2, "set"), 0);
	assert_int_equal(append(j, JOURNAL_APPLIED, 2, "set"), 0);
	assert_int_equal(append(j, JOURNAL_INTENT, 3, "use"), 0);
	journal_close(&j);

	j = open_journal(0);
	assert_int_equal(journal_last_epoch(j), 3);
	assert_true(journal_last_applied(j, &r));
	assert_int_equal(r.epoch, 2);
	assert_int_equal(r.uid, 7);
	assert_string_equal(r.program, "te\"st\\");
	assert_int_equal(r.plan, plans[0]->digest);
	p = journal_plan(j, plans[1]->digest);
	assert_non_null(p);
	assert_int_equal(plan_distance(p, plans[1]), 0);
	plan_unref(&p);
	assert_null(journal_plan(j, 42));
	/* The daemon died between intent and result. */
	assert_int_equal(journal_close_intents(j, NULL), 1);
	assert_int_equal(journal_history(j, &e), 3);
	assert_string_equal(e[1].outcome, "applied");
	assert_int_equal(e[1].r.step, 20);
	assert_string_equal(e[2].outcome, "not applied");
	free(e);
	journal_close(&j);
}

/* Cut anywhere, the records before the cut are all there and nothing else is. */
static void
test_torn(void **state)
{
	struct journal *j = open_journal(0);
	char *whole;
	size_t n, last = 0, lines = 0;

	(void)state;
	for (uint64_t e = 1; e <= 3; e++)
		assert_int_equal(append(j, JOURNAL_START, e, "start"), 0);
	journal_close(&j);
	whole = read_file(&n);
	for (size_t cut = 0; cut <= n; cut++) {
		uint64_t epochs = 0;

		write_file(whole, cut);
		for (lines = 0, last = 0; last < cut; last++)
			lines += whole[last] == '\n';
		j = open_journal(cut > 0 && whole[cut - 1] != '\n');
		epochs = journal_last_epoch(j);
		/* Two plans and three records: plan 1, start 1, plan 0, start 2, start 3. */
		assert_int_equal(epochs, lines >= 5 ? 3 : lines == 4 ? 2 : lines >= 2 ? 1 : 0);
		/* It goes on from there. */
		assert_int_equal(append(j, JOURNAL_START, epochs + 1, "start"), 0);
		journal_close(&j);
		j = open_journal(0);
		assert_int_equal(journal_last_epoch(j), epochs + 1);
		journal_close(&j);
	}
	free(whole);
}

/* No flipped bit goes unseen: at the end it is a torn write, before good records
 * it is damage that somebody must look at. */
static void
test_bits(void **state)
{
	struct journal *j = open_journal(0);
	struct journal_record r;
	uint32_t damaged = 0, cut = 0;
	uint64_t torn;
	struct err err;
	char *whole;
	size_t n;

	(void)state;
	assert_int_equal(append(j, JOURNAL_START, 1, "start"), 0);
	assert_int_equal(append(j, JOURNAL_START, 2, "start"), 0);
	journal_close(&j);
	whole = read_file(&n);
	for (size_t i = 0; i < n * 8; i += 3) {
		whole[i / 8] ^= (char)(1 << i % 8);
		write_file(whole, n);
		whole[i / 8] ^= (char)(1 << i % 8);
		if (journal_open(&j, dir, LAYERS, &torn, &err) != 0) {
			assert_non_null(strstr(err.text, "the record is damaged, and others follow it"));
			damaged++;
			continue;
		}
		assert_true(torn > 0 && journal_last_epoch(j) < 2);
		if (journal_last_epoch(j) == 1) {
			assert_true(journal_last_applied(j, &r));
			assert_int_equal(r.plan, plans[1]->digest);
		}
		journal_close(&j);
		cut++;
	}
	assert_true(damaged > 0 && cut > 0);
	free(whole);
}

static void
test_locked(void **state)
{
	struct journal *j = open_journal(0), *k;
	uint64_t torn;
	struct err err;

	(void)state;
	assert_int_equal(journal_open(&k, dir, LAYERS, &torn, &err), -EBUSY);
	assert_non_null(strstr(err.text, dir));
	journal_close(&j);
	j = open_journal(0);
	journal_close(&j);
}

/* A full disk: an error, nothing half written, and the record lands later. */
static void
test_full(void **state)
{
	struct rlimit old, tight;
	struct journal *j = open_journal(0);
	struct stat before, after;
	struct journal_entry *e;
	struct journal_record late = {.kind = JOURNAL_APPLIED, .epoch = 3, .plan = plans[1]->digest, .why = "rollback"};

	(void)state;
	assert_int_equal(append(j, JOURNAL_START, 1, "start"), 0);
	assert_int_equal(stat(file, &before), 0);
	assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
	tight = old;
	tight.rlim_cur = (rlim_t)before.st_size + 20;
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &tight), 0);
	assert_true(append(j, JOURNAL_START, 2, "start") < 0);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
	assert_int_equal(stat(file, &after), 0);
	assert_int_equal(after.st_size, before.st_size);
	assert_int_equal(journal_last_epoch(j), 1);

	journal_remember(j, &late, plans[1]);
	assert_int_equal(journal_history(j, &e), 2);
	assert_true(e[1].r.unjournaled);
	free(e);
	assert_int_equal(append(j, JOURNAL_START, 4, "start"), 0);
	assert_int_equal(journal_history(j, &e), 3);
	assert_false(e[1].r.unjournaled);
	free(e);
	journal_close(&j);
	j = open_journal(0);
	assert_int_equal(journal_history(j, &e), 3);
	assert_int_equal(e[1].r.epoch, 3);
	free(e);
	journal_close(&j);
}

/* A plan that only requests run is there after a restart. */
static void
test_keep(void **state)
{
	struct journal *j = open_journal(0);
	struct plan *p;

	(void)state;
	assert_int_equal(append(j, JOURNAL_START, 2, "start"), 0);
	journal_keep(j, plans[1]);
	p = journal_plan(j, plans[1]->digest);
	assert_non_null(p);
	plan_unref(&p);
	assert_int_equal(append(j, JOURNAL_START, 4, "start"), 0);
	journal_close(&j);
	j = open_journal(0);
	p = journal_plan(j, plans[1]->digest);
	assert_non_null(p);
	plan_unref(&p);
	journal_close(&j);
}

static void
test_rollback_walk(void **state)
{
	struct journal *j = open_journal(0);
	struct journal_record r = {.kind = JOURNAL_APPLIED, .why = "rollback", .plan = plans[0]->digest};
	uint64_t undoes, back_to, plan;
	struct err err;

	(void)state;
	for (uint64_t e = 1; e <= 4; e++)
		assert_int_equal(append(j, e == 1 ? JOURNAL_START : JOURNAL_APPLIED, e, e == 1 ? "start" : "set"), 0);
	for (uint64_t e = 4; e >= 2; e--) {
		assert_int_equal(journal_rollback_target(j, &undoes, &back_to, &plan, &err), 0);
		assert_int_equal(undoes, e);
		assert_int_equal(back_to, e - 1);
		assert_int_equal(plan, plans[(e - 1) % 2]->digest);
		r.epoch = 9 - e, r.undoes = undoes, r.back_to = back_to, r.plan = plan;
		assert_int_equal(journal_append(j, &r, plans[(e - 1) % 2], &err), 0);
	}
	assert_int_equal(journal_rollback_target(j, &undoes, &back_to, &plan, &err), -ENOENT);
	journal_close(&j);
}

/* Many records: reading them is no matter of minutes. */
static void
test_many(void **state)
{
	enum { N = 20000 };
	struct journal *j = open_journal(0);
	struct journal_record r = {.kind = JOURNAL_INTENT, .why = "set", .plan = plans[0]->digest};
	struct journal_entry *e;

	(void)state;
	for (uint64_t i = 1; i <= N; i++) {
		r.kind = JOURNAL_INTENT, r.epoch = i;
		journal_remember(j, &r, plans[0]);
		r.kind = i % 3 ? JOURNAL_APPLIED : JOURNAL_FAILED;
		journal_remember(j, &r, plans[0]);
	}
	assert_int_equal(journal_history(j, &e), N);
	for (uint32_t i = 0; i < N; i++) {
		assert_int_equal(e[i].r.epoch, i + 1);
		assert_string_equal(e[i].outcome, (i + 1) % 3 ? "applied" : "failed: ");
	}
	free(e);
	journal_close(&j);
}

static int
setup(void **state)
{
	struct plan_rule rule = {"attention.*", "fp8", 0};

	(void)state;
	if (mkdtemp(dir) == NULL)
		return -1;
	snprintf(file, sizeof(file), "%s/journal", dir);
	signal(SIGXFSZ, SIG_IGN);
	return plan_derive(&plans[0], NULL, LAYERS, NULL, 0, NULL) != 0 ||
	    plan_derive(&plans[1], NULL, LAYERS, &rule, 1, NULL) != 0;
}

static int
teardown(void **state)
{
	char cmd[64];

	(void)state;
	plan_unref(&plans[0]), plan_unref(&plans[1]);
	snprintf(cmd, sizeof(cmd), "rm -rf %s", dir);
	return system(cmd) == 0 ? 0 : -1;
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup(test_round_trip, fresh),
		cmocka_unit_test_setup(test_torn, fresh),
		cmocka_unit_test_setup(test_bits, fresh),
		cmocka_unit_test_setup(test_locked, fresh),
		cmocka_unit_test_setup(test_full, fresh),
		cmocka_unit_test_setup(test_keep, fresh),
		cmocka_unit_test_setup(test_rollback_walk, fresh),
		cmocka_unit_test_setup(test_many, fresh),
	};

	return cmocka_run_group_tests_name("journal", tests, setup, teardown);
}
