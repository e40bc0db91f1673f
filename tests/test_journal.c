/* SPDX-License-Identifier: Apache-2.0 */
/* The journal: what was written is read, and no damage is taken for it. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sha2.h>
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
	char *whole, flipped;
	size_t n;
	int fd, rc;

	(void)state;
	assert_int_equal(append(j, JOURNAL_START, 1, "start"), 0);
	assert_int_equal(append(j, JOURNAL_START, 2, "start"), 0);
	journal_close(&j);
	whole = read_file(&n);
	fd = open(file, O_WRONLY);
	assert_true(fd >= 0);
	for (size_t i = 0; i < n * 8; i++) {
		flipped = whole[i / 8] ^ (char)(1 << i % 8);
		assert_int_equal(pwrite(fd, &flipped, 1, (off_t)(i / 8)), 1);
		rc = journal_open(&j, dir, LAYERS, &torn, &err);
		assert_int_equal(pwrite(fd, &whole[i / 8], 1, (off_t)(i / 8)), 1);
		if (rc != 0) {
			assert_int_equal(rc, -EINVAL);
			assert_non_null(strstr(err.text, "the record is damaged, and others follow it: move the file away"));
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
	assert_int_equal(close(fd), 0);
	free(whole);
}

static void
refused(const char *state_dir, int rc, const char *fmt, const char *arg)
{
	struct journal *j = NULL;
	uint64_t torn;
	struct err err = {""};
	char want[256];

	assert_int_equal(journal_open(&j, state_dir, LAYERS, &torn, &err), rc);
	assert_null(j);
	snprintf(want, sizeof(want), fmt, arg);
	assert_string_equal(err.text, want);
}

static void
test_locked(void **state)
{
	struct journal *j = open_journal(0);

	(void)state;
	refused(dir, -EBUSY, "state_dir %s is in use by another octetd", dir);
	journal_close(&j);
	j = open_journal(0);
	journal_close(&j);
}

/* Where it may not write, and what is no journal. */
static void
test_places(void **state)
{
	bool root = geteuid() == 0;
	char path[64], deep[64], lock[80];
	struct journal *j;
	struct stat st;
	uint64_t torn;
	struct err err;

	(void)state;
	write_file("", 0);
	refused(file, -ENOTDIR, "state_dir %s: Not a directory", file);
	unlink(file);
	assert_int_equal(symlink("/dev/null", file), 0);
	refused(dir, -ELOOP, "%s: Too many levels of symbolic links", file);
	unlink(file);
	assert_int_equal(mkfifo(file, 0600), 0);
	refused(dir, -EINVAL, "%s: no regular file of at most 4 GiB", file);
	unlink(file);

	snprintf(path, sizeof(path), "%s/a", dir);
	snprintf(deep, sizeof(deep), "%s/a/b", dir);
	snprintf(lock, sizeof(lock), "%s/lock", deep);
	assert_int_equal(journal_open(&j, deep, LAYERS, &torn, &err), 0); /* made on the way */
	journal_close(&j);
	assert_int_equal(stat(deep, &st), 0);
	assert_int_equal(st.st_mode & 07777, 0700);
	/* Root may write anywhere. */
	assert_int_equal(unlink(lock), 0);
	assert_int_equal(chmod(dir, 0755), 0);
	assert_int_equal(chmod(deep, 0555), 0);
	assert_int_equal(root ? seteuid(65534) : 0, 0);
	refused(deep, -EACCES, "%s: Permission denied", lock);
	assert_int_equal(root ? seteuid(0) : 0, 0);
	assert_int_equal(chmod(dir, 0700), 0);
	assert_int_equal(chmod(deep, 0700), 0);
}

/* A later version's record is no damage: it must not be cut off. */
static void
test_later_version(void **state)
{
	static const char json[] = "{\"epoch\":2,\"kind\":\"later\"}";
	struct journal *j = open_journal(0);
	uint8_t sum[SHA256_DIGEST_LENGTH];
	size_t n, n_after;
	char *before, *after;
	SHA2_CTX sha;
	FILE *f;

	(void)state;
	assert_int_equal(append(j, JOURNAL_START, 1, "start"), 0);
	journal_close(&j);
	SHA256Init(&sha);
	SHA256Update(&sha, (const uint8_t *)json, strlen(json));
	SHA256Final(sum, &sha);
	f = fopen(file, "a");
	assert_non_null(f);
	fprintf(f, "%s ", json);
	for (int i = 0; i < 8; i++)
		fprintf(f, "%02x", sum[i]);
	fputc('\n', f);
	assert_int_equal(fclose(f), 0);
	before = read_file(&n);
	refused(dir, -EPROTO, "%s:3: a record of a kind that this version does not know", file);
	after = read_file(&n_after);
	assert_int_equal(n_after, n);
	assert_memory_equal(after, before, n);
	free(before), free(after);
}

/* The model was exchanged: the history stays; a plan that names layers comes back
 * with the old model, one that does not fits any. */
static void
test_other_model(void **state)
{
	struct plan_rule rule = {"mlp.*@1", "fp8", 0};
	struct journal_record r = {.kind = JOURNAL_START, .epoch = 2};
	struct journal *j = open_journal(0);
	struct journal_entry *e;
	struct plan *layered, *p;
	uint64_t torn;
	struct err err;

	(void)state;
	assert_int_equal(plan_derive(&layered, NULL, LAYERS, &rule, 1, &err), 0);
	assert_int_equal(append(j, JOURNAL_START, 1, "start"), 0);
	assert_int_equal(journal_append(j, &r, layered, &err), 0);
	journal_close(&j);
	assert_int_equal(journal_open(&j, dir, LAYERS + 1, &torn, &err), 0);
	assert_null(journal_plan(j, layered->digest));
	p = journal_plan(j, plans[1]->digest);
	assert_non_null(p);
	assert_int_equal(p->n_layers, LAYERS + 1);
	plan_unref(&p);
	assert_int_equal(journal_history(j, &e), 2);
	free(e);
	assert_int_equal(append(j, JOURNAL_START, 3, "start"), 0);
	journal_close(&j);
	j = open_journal(0);
	p = journal_plan(j, layered->digest);
	assert_non_null(p);
	assert_int_equal(plan_distance(p, layered), 0);
	plan_unref(&p), plan_unref(&layered);
	assert_int_equal(journal_last_epoch(j), 3);
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
	char want[128];
	struct err err;

	(void)state;
	assert_int_equal(append(j, JOURNAL_START, 1, "start"), 0);
	assert_int_equal(stat(file, &before), 0);
	assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
	tight = old;
	tight.rlim_cur = (rlim_t)before.st_size + 20;
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &tight), 0);
	assert_int_equal(journal_append(j, &late, plans[1], &err), -EFBIG);
	assert_int_equal(journal_flush(j, &err), 0); /* nothing waits */
	journal_remember(j, &late, plans[1]);
	assert_int_equal(journal_flush(j, &err), -EFBIG);
	snprintf(want, sizeof(want), "%s: File too large", file);
	assert_string_equal(err.text, want);
	assert_int_equal(journal_unwritten(j), 1);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
	assert_int_equal(stat(file, &after), 0);
	assert_int_equal(after.st_size, before.st_size);
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

#define N_BUSY 100u

static uint32_t n_appended; /* atomic */

static void *
append_many(void *arg)
{
	void *failed = NULL;

	for (uint64_t e = 0; e < N_BUSY; e++) {
		if (append(arg, JOURNAL_START, 1000 + e, "thread") != 0)
			failed = arg;
		__atomic_store_n(&n_appended, (uint32_t)e + 1, __ATOMIC_RELEASE);
	}
	return failed;
}

/* While one thread writes, another keeps plans and remembers records: none is
 * lost, and memory has them in the order of the file. */
static void
test_meanwhile(void **state)
{
	struct journal *j = open_journal(0);
	struct journal_record r = {.kind = JOURNAL_START, .why = "memory", .plan = plans[0]->digest};
	struct journal_entry *before, *after;
	struct plan *kept[N_BUSY], *p;
	pthread_t thread;
	struct err err;
	void *failed;

	(void)state;
	assert_int_equal(pthread_create(&thread, NULL, append_many, j), 0);
	for (uint32_t i = 0; i < N_BUSY; i++) {
		struct plan_rule rule[7];
		char selector[7][32];
		uint32_t n = 0;

		for (int g = GROUP_Q; g <= GROUP_DOWN; g++)
			if (i >> g & 1) {
				snprintf(selector[n], sizeof(selector[n]), "%s@1", plan_group_name(g));
				rule[n] = (struct plan_rule){selector[n], "fp8w", 0};
				n++;
			}
		assert_int_equal(plan_derive(&kept[i], NULL, LAYERS, rule, n, &err), 0);
		while (__atomic_load_n(&n_appended, __ATOMIC_ACQUIRE) < i) /* one for each write */
			sched_yield();
		journal_keep(j, kept[i]);
		r.epoch = 1 + i;
		journal_remember(j, &r, plans[0]);
	}
	assert_int_equal(pthread_join(thread, &failed), 0);
	assert_null(failed);
	assert_int_equal(journal_flush(j, &err), 0);
	assert_int_equal(journal_unwritten(j), 0);
	assert_int_equal(journal_history(j, &before), 2 * N_BUSY);
	journal_close(&j);
	j = open_journal(0);
	assert_int_equal(journal_history(j, &after), 2 * N_BUSY);
	for (uint32_t i = 0; i < 2 * N_BUSY; i++) {
		assert_int_equal(after[i].r.epoch, before[i].r.epoch);
		assert_string_equal(after[i].r.why, before[i].r.why);
		assert_false(before[i].r.unjournaled);
	}
	for (uint32_t i = 0; i < N_BUSY; i++) {
		p = journal_plan(j, kept[i]->digest);
		assert_non_null(p);
		plan_unref(&p), plan_unref(&kept[i]);
	}
	free(before), free(after);
	journal_close(&j);
}

static void
change(struct journal *j, uint64_t epoch, uint64_t undoes, uint64_t back_to)
{
	struct journal_record r = {.kind = epoch == 1 ? JOURNAL_START : JOURNAL_APPLIED, .epoch = epoch, .undoes = undoes,
	    .back_to = back_to, .plan = epoch};

	journal_remember(j, &r, NULL);
}

/* want_undoes 0: nothing is left. */
static void
target(struct journal *j, uint64_t want_undoes, uint64_t want_back_to)
{
	uint64_t undoes = 0, back_to = 0, plan = 0;
	struct err err = {""};

	assert_int_equal(journal_rollback_target(j, &undoes, &back_to, &plan, &err), want_undoes != 0 ? 0 : -ENOENT);
	assert_string_equal(err.text, want_undoes != 0 ? "" : "there is no change left to take back");
	assert_int_equal(undoes, want_undoes);
	assert_int_equal(back_to, want_back_to);
	assert_int_equal(plan, want_back_to);
}

/* The table at the head of journal.c, and jumps. */
static void
test_rollback_table(void **state)
{
	struct journal *j = open_journal(0);

	(void)state;
	target(j, 0, 0);
	change(j, 1, 0, 0);
	target(j, 0, 0);
	change(j, 2, 0, 0);
	change(j, 3, 0, 0);
	target(j, 3, 2);
	change(j, 4, 3, 2);
	target(j, 2, 1);
	change(j, 5, 2, 1);
	target(j, 0, 0);
	change(j, 7, 0, 0);
	target(j, 7, 5);
	change(j, 8, 7, 5);
	target(j, 0, 0);
	change(j, 9, 0, 0), change(j, 10, 0, 0), change(j, 11, 0, 0);
	change(j, 12, 0, 9); /* --to 9 jumps over 10 and 11 */
	target(j, 9, 8);
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
	struct err err;

	(void)state;
	for (uint64_t i = 1; i <= N; i++) {
		r.kind = JOURNAL_INTENT, r.epoch = i;
		journal_remember(j, &r, plans[0]);
		r.kind = i % 3 ? JOURNAL_APPLIED : JOURNAL_FAILED;
		snprintf(r.result, sizeof(r.result), "%s", i % 3 ? "" : "why");
		journal_remember(j, &r, plans[0]);
		*r.result = '\0';
	}
	for (int again = 0; again < 2; again++) {
		assert_int_equal(journal_history(j, &e), N);
		for (uint32_t i = 0; i < N; i++) {
			assert_int_equal(e[i].r.epoch, i + 1);
			assert_string_equal(e[i].outcome, (i + 1) % 3 ? "applied" : "failed: why");
			assert_int_equal(e[i].r.unjournaled, !again);
		}
		free(e);
		/* And the same from the file. */
		assert_int_equal(journal_flush(j, &err), 0);
		journal_close(&j);
		j = open_journal(0);
		assert_int_equal(journal_close_intents(j, &err), 0);
	}
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
		cmocka_unit_test_setup(test_places, fresh),
		cmocka_unit_test_setup(test_later_version, fresh),
		cmocka_unit_test_setup(test_other_model, fresh),
		cmocka_unit_test_setup(test_full, fresh),
		cmocka_unit_test_setup(test_keep, fresh),
		cmocka_unit_test_setup(test_meanwhile, fresh),
		cmocka_unit_test_setup(test_rollback_walk, fresh),
		cmocka_unit_test_setup(test_rollback_table, fresh),
		cmocka_unit_test_setup(test_many, fresh),
	};

	return cmocka_run_group_tests_name("journal", tests, setup, teardown);
}
