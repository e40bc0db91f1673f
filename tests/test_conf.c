/* SPDX-License-Identifier: Apache-2.0 */
/* The configuration file: what is taken, and what every bad line says. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "conf/conf.h"

static char dir[] = "/tmp/octet-conf.XXXXXX", file[64], saved[64];

static void
write_file(const char *path, const char *text, size_t n)
{
	FILE *f = fopen(path, "w");

	assert_non_null(f);
	assert_int_equal(fwrite(text, 1, n, f), n);
	assert_int_equal(fclose(f), 0);
}

static int
load_n(struct conf **c, const char *text, size_t n, struct err *err)
{
	write_file(file, text, n);
	return conf_load(c, file, err);
}

static struct conf *
load(const char *text)
{
	struct conf *c = NULL;
	struct err err;

	if (load_n(&c, text, strlen(text), &err) != 0)
		fail_msg("%s", err.text);
	return c;
}

/* The message is exactly "FILE:LINE: want", or "FILE: want" for line 0. */
static void
refused_n(const char *text, size_t n, int line, const char *want)
{
	struct conf *c = NULL;
	char all[600];
	struct err err = {""};

	if (load_n(&c, text, n, &err) != -EINVAL)
		fail_msg("taken: %s", text);
	assert_null(c);
	if (line > 0)
		snprintf(all, sizeof(all), "%s:%d: %s", file, line, want);
	else
		snprintf(all, sizeof(all), "%s: %s", file, want);
	assert_string_equal(err.text, all);
}

static void
refused(const char *text, int line, const char *want)
{
	refused_n(text, strlen(text), line, want);
}

static void
test_values(void **state)
{
	struct conf *c = load("\xef\xbb\xbf[daemon]\r\nsocket = /a/b.sock\r\n; comment\n# another = one\n\n[model]\npath = /m\n"
	    "[engine]\nkv_cache_bytes = 3G\nthreads = 5\nbackend = cpu\nprefix_cache = all\n[precision]\non_flip = pin\n"
	    "policy = mine\n[policy mine]\nattention.* = fp8\nmlp.*@0-1 = fp8w\nattention.* = bf16\n[policy fp8]\nlm_head = fp8");
	const struct conf_policy *p;

	(void)state;
	assert_string_equal(c->socket, "/a/b.sock");
	assert_string_equal(c->control_socket, "/a/b-control.sock");
	assert_true(c->kv_cache_bytes == (uint64_t)3 << 30);
	assert_int_equal(c->threads, 5);
	assert_int_equal(c->backend, CONF_BACKEND_CPU);
	assert_int_equal(c->on_flip, CONF_ON_FLIP_PIN);
	assert_int_equal(c->prefix_cache, CONF_PREFIX_ALL);
	assert_int_equal(c->max_clients, 64);
	assert_int_equal(c->socket_mode, 0660);
	p = conf_policy(c, "mine");
	assert_non_null(p);
	assert_int_equal(p->n_rules, 3); /* in their order */
	assert_string_equal(p->rules[0].selector, "attention.*");
	assert_string_equal(p->rules[2].format, "bf16");
	assert_int_equal(p->rules[1].line, 18);
	assert_int_equal(conf_policy(c, "fp8")->n_rules, 1); /* redefined */
	assert_int_equal(conf_policy(c, "bf16")->n_rules, 2);
	assert_null(conf_policy(c, "nosuch"));
	conf_free(&c);
	assert_null(c);
}

#define MODEL "[model]\npath = /m\n"

static void
test_refused(void **state)
{
	static const char zero[] = "[model]\npath = /m\0x\n";
	struct conf *c = NULL;
	struct err err;

	(void)state;
	refused("", 0, "[model] path is missing");
	refused("[daemon]\nsocket = /a\n", 0, "[model] path is missing");
	refused("[model]\npath =\n", 2, "path is empty");
	refused(MODEL "nosuch = 1\n", 3, "unknown key 'nosuch' in [model]");
	refused(MODEL "[engine]\nthread = 1\n", 4, "unknown key 'thread' in [engine]: did you mean 'threads'?");
	refused(MODEL "[engine]\nThreads = 1\n", 4, "unknown key 'Threads' in [engine]: did you mean 'threads'?");
	refused(MODEL "[engine]\nsocket = /a\n", 4, "unknown key 'socket' in [engine]");
	refused(MODEL "[nosuch]\na = 1\n", 4, "unknown section [nosuch]");
	refused("path = /m\n", 1, "'path' stands before any section");
	refused("[model]\npath\n", 2, "neither '[section]' nor 'key = value'");
	refused("[model\npath = /m\n", 1, "neither '[section]' nor 'key = value'");
	refused(MODEL "[engine]\nthreads = 1\n# between\nthreads = 1\n", 6, "threads is set twice, first in line 4");
	refused(MODEL "[engine]\nthreads = 1\n[daemon]\n[engine]\nthreads = 1\n", 7, "threads is set twice, first in line 4");
	refused(MODEL "[policy ]\na = fp8\n", 4, "[policy] has no name");
	refused(MODEL "[policy]\na = fp8\n", 4, "[policy] has no name");
	refused(MODEL "[clients]\nuser = fp8\n", 4,
	    "'user' in [clients]: write user:NAME, group:NAME, uid:N, gid:N or * = POLICY");
	refused(MODEL "[daemon]\nsocket = /a\ncontrol_socket = /a\n", 0, "socket and control_socket are the same path");
	/* The first error is the one that is told. */
	refused(MODEL "[engine]\nthreads = x\nnosuch\nspin_us = x\n", 4, "threads 'x' is no number");
	refused("nosuch\n" MODEL "[engine]\nthreads = x\n", 1, "neither '[section]' nor 'key = value'");
	refused_n(zero, sizeof(zero) - 1, 2, "a zero byte: not a text file");

	assert_int_equal(conf_load(&c, "/nosuch/octet.ini", &err), -ENOENT);
	assert_string_equal(err.text, "/nosuch/octet.ini: No such file or directory");
	assert_int_equal(conf_load(&c, "/tmp", &err), -EISDIR);
	assert_string_equal(err.text, "/tmp: Is a directory");
	assert_null(c);
}

/* How lines are cut. */
static void
test_lines(void **state)
{
	char text[400];
	struct conf *c;

	(void)state;
	/* Indentation is no continuation; a comment may follow a value after a blank; '#' and ';' within are text. */
	c = load("  [model]\n\tpath = /m#1;2 ; comment\n  [engine]\n  threads = 2\n  spin_us = 3\n\t; comment\n  # comment\n   \n"
	    "  [policy m]\n  mlp.* = fp8\n\n\tattention.* = bf16\n[clients]\n  user:a = fp8\n  uid:7=m\n  * = bf16");
	assert_string_equal(c->model_path, "/m#1;2");
	assert_int_equal(c->threads, 2);
	assert_int_equal(c->spin_us, 3);
	assert_int_equal(conf_policy(c, "m")->n_rules, 2);
	assert_string_equal(conf_policy(c, "m")->rules[1].selector, "attention.*");
	assert_string_equal(conf_policy(c, "m")->rules[1].format, "bf16");
	assert_int_equal(conf_policy(c, "m")->rules[1].line, 12);
	assert_int_equal(c->n_clients, 3);
	assert_string_equal(c->clients[0].who, "user:a");
	assert_string_equal(c->clients[0].policy, "fp8");
	assert_string_equal(c->clients[1].who, "uid:7");
	assert_string_equal(c->clients[1].policy, "m");
	assert_string_equal(c->clients[2].who, "*");
	assert_int_equal(c->clients[2].line, 16);
	conf_free(&c);
	/* A BOM only where it belongs. */
	c = load("\xef\xbb\xbf  [model]\r\n  path: /m\r\n");
	assert_string_equal(c->model_path, "/m");
	conf_free(&c);
	refused("[model]\n\xef\xbb\xbf[engine]\n", 2, "neither '[section]' nor 'key = value'");

	/* 198 characters and the newline are the longest line. */
	for (int n = 197; n <= 199; n++) {
		snprintf(text, sizeof(text), "[model]\npath = /%0*d\n", n - 8, 0);
		if (n == 199)
			refused(text, 2, "longer than 198 characters");
		else {
			c = load(text);
			assert_int_equal(strlen(c->model_path), n - 7);
			conf_free(&c);
		}
	}
	/* A section's name is taken whole or not at all. */
	snprintf(text, sizeof(text), MODEL "[policy %042d]\na = fp8\n", 7);
	c = load(text);
	snprintf(text, sizeof(text), "%042d", 7);
	assert_non_null(conf_policy(c, text));
	conf_free(&c);
	snprintf(text, sizeof(text), MODEL "[policy %043d]\na = fp8\n", 7);
	refused(text, 3, "the name of a section is longer than 49 characters");
}

/* What every option takes and what it does not. */
static void
test_options(void **state)
{
	static const struct {
		const char *section, *key, *good[5], *bad[8]; /* bad: value, message, ... */
	} options[] = {
		{"daemon", "socket", {"/a", "a.sock"}, {"", "socket is empty"}},
		{"daemon", "socket_mode", {"0", "600", "0777"}, {"1000", "socket_mode '1000' is not between 0 and 0777", "8",
		    "socket_mode '8' is no octal mode", "-1", "socket_mode '-1' is no octal mode"}},
		{"daemon", "control_socket", {"/a"}, {"", "control_socket is empty"}},
		{"daemon", "control_mode", {"0", "777"}, {"01000", "control_mode '01000' is not between 0 and 0777"}},
		{"daemon", "state_dir", {"/a"}, {"", "state_dir is empty"}},
		{"daemon", "policies_file", {"/a"}, {"", "policies_file is empty"}},
		{"daemon", "max_clients", {"1", "4096"}, {"0", "max_clients '0' is not between 1 and 4096", "4097",
		    "max_clients '4097' is not between 1 and 4096", "", "max_clients '' is no number"}},
		{"daemon", "max_clients_per_uid", {"1", "4096"}, {"0", "max_clients_per_uid '0' is not between 1 and 4096", "4097",
		    "max_clients_per_uid '4097' is not between 1 and 4096"}},
		{"daemon", "max_requests", {"1", "64"}, {"0", "max_requests '0' is not between 1 and 64", "65",
		    "max_requests '65' is not between 1 and 64"}},
		{"daemon", "max_requests_per_uid", {"1", "1000000"}, {"0",
		    "max_requests_per_uid '0' is not between 1 and 1000000", "1000001",
		    "max_requests_per_uid '1000001' is not between 1 and 1000000"}},
		{"daemon", "max_queue", {"1", "1000000"}, {"0", "max_queue '0' is not between 1 and 1000000", "1000001",
		    "max_queue '1000001' is not between 1 and 1000000", "1K", "max_queue '1K' is no number"}},
		{"daemon", "handshake_timeout_ms", {"10", "60000"}, {"9", "handshake_timeout_ms '9' is not between 10 and 60000",
		    "60001", "handshake_timeout_ms '60001' is not between 10 and 60000"}},
		{"daemon", "drain_timeout_s", {"0", "3600"}, {"3601", "drain_timeout_s '3601' is not between 0 and 3600"}},
		{"daemon", "log_level", {"error", "warn", "info", "debug"}, {"loud",
		    "log_level 'loud' is none of error, warn, info, debug", "Info",
		    "log_level 'Info' is none of error, warn, info, debug"}},
		{"model", "path", {"/a"}, {"", "path is empty"}},
		{"engine", "backend", {"auto", "cpu", "cuda"}, {"gpu", "backend 'gpu' is none of auto, cpu, cuda", "",
		    "backend '' is none of auto, cpu, cuda"}},
		{"engine", "device", {"0", "255"}, {"256", "device '256' is not between 0 and 255"}},
		{"engine", "residency", {"both", "nested"}, {"fp8", "residency 'fp8' is none of both, nested"}},
		{"engine", "nested_sites", {"mlp.* attention.q_proj@0-3,-1", ""}, {NULL}},
		{"engine", "fast_accumulation", {"no", "yes"}, {"1", "fast_accumulation '1' is none of no, yes"}},
		{"engine", "threads", {"0", "1024"}, {"1025", "threads '1025' is not between 0 and 1024", "+1",
		    "threads '+1' is no number", "1.5", "threads '1.5' is no number", "18446744073709551616",
		    "threads '18446744073709551616' is no number"}},
		{"engine", "kv_cache_bytes", {"1", "32M", "1G", "2KiB", "4611686018427387903"}, {"0",
		    "kv_cache_bytes '0' is not between 1 and 4611686018427387903", "4611686018427387904",
		    "kv_cache_bytes '4611686018427387904' is not between 1 and 4611686018427387903", "3X",
		    "kv_cache_bytes '3X' is no size (like 512M)", "16777216T",
		    "kv_cache_bytes '16777216T' is no size (like 512M)"}},
		{"engine", "max_batch_tokens", {"1", "65536"}, {"0", "max_batch_tokens '0' is not between 1 and 65536", "65537",
		    "max_batch_tokens '65537' is not between 1 and 65536"}},
		{"engine", "max_batch", {"1", "512"}, {"0", "max_batch '0' is not between 1 and 4096", "4097",
		    "max_batch '4097' is not between 1 and 4096"}},
		{"engine", "max_context", {"0", "1048576"}, {"1048577", "max_context '1048577' is not between 0 and 1048576"}},
		{"engine", "step_target_ms", {"0", "60000"}, {"60001", "step_target_ms '60001' is not between 0 and 60000"}},
		{"engine", "spin_us", {"0", "1000000"}, {"1000001", "spin_us '1000001' is not between 0 and 1000000"}},
		{"engine", "prefix_cache", {"off", "user", "all"}, {"on", "prefix_cache 'on' is none of off, user, all"}},
		{"engine", "evidence_steps", {"0", "1000000"}, {"1000001", "evidence_steps '1000001' is not between 0 and 1000000"}},
		{"precision", "policy", {"bf16", "any name"}, {NULL}},
		{"precision", "on_flip", {"switch", "pin"}, {"wait", "on_flip 'wait' is none of switch, pin"}},
		{"shadow", "sample", {"0", "1%", "0.25", "1"}, {"101%", "sample '101%' is not between 0 and 1"}},
		{"shadow", "baseline", {"bf16", "any name"}, {NULL}},
		{"shadow", "share", {"0", "5%"}, {"x", "share 'x' is no share (like 1% or 0.01)"}},
		{"shadow", "max_kl", {"0", "0.000001"}, {"-1", "max_kl '-1' is no share (like 1% or 0.01)"}},
		{"shadow", "min_agree", {"0", "0.98"}, {"1.5", "min_agree '1.5' is not between 0 and 1"}},
		{"shadow", "cooldown_s", {"0", "86400"}, {"86401", "cooldown_s '86401' is not between 0 and 86400"}},
		{"surge", "policy", {"", "any name"}, {NULL}},
		{"surge", "enter_queue_ms", {"1", "3600000"}, {"0", "enter_queue_ms '0' is not between 1 and 3600000"}},
		{"surge", "leave_queue_ms", {"0", "3600000"}, {"x", "leave_queue_ms 'x' is no number"}},
		{"surge", "min_hold_s", {"0", "86400"}, {"86401", "min_hold_s '86401' is not between 0 and 86400"}},
		{"access", "operators", {"", "user:a, group:b *"}, {NULL}},
		{"access", "viewers", {"", "*"}, {NULL}},
		{"access", "request_policies", {"", "uid:7"}, {NULL}},
	};
	static const char live[] = " max_clients max_clients_per_uid max_requests max_requests_per_uid max_queue handshake_timeout_ms drain_timeout_s log_level "
	    "step_target_ms spin_us prefix_cache evidence_steps policy on_flip sample baseline share max_kl min_agree cooldown_s "
	    "enter_queue_ms leave_queue_ms min_hold_s operators viewers request_policies ";
	const size_t n = sizeof(options) / sizeof(*options);
	const char *section, *key;
	char text[300];

	(void)state;
	for (size_t i = 0; (key = conf_option_name(i, &section)) != NULL || i < n; i++) {
		uint32_t changed;
		bool path;

		/* A new option wants a line above. */
		assert_true(key != NULL && i < n);
		assert_string_equal(section, options[i].section);
		assert_string_equal(key, options[i].key);
		path = strcmp(section, "model") == 0;
		changed = 0;
		for (size_t k = 0; k < 5 && options[i].good[k] != NULL; k++) {
			struct conf *c, *d;
			struct conf_change *change;
			size_t n_changes;

			snprintf(text, sizeof(text), "%s[%s]\n%s = %s\n", path ? "" : MODEL, section, key, options[i].good[k]);
			c = load(text), d = load(MODEL);
			assert_int_equal(conf_diff(d, c, &change, &n_changes), 0);
			/* What is the default is no change; control_socket follows socket, max_batch max_batch_tokens. */
			assert_true(n_changes <= (strcmp(key, "socket") == 0 || strcmp(key, "max_batch_tokens") == 0 ? 2 : 1));
			if (n_changes > 0) {
				snprintf(text, sizeof(text), "%s.%s", section, key);
				assert_string_equal(change[0].key, text);
				snprintf(text, sizeof(text), " %s ", key);
				assert_int_equal(change[0].live, strstr(live, text) != NULL);
				changed++;
			}
			conf_changes_free(change, n_changes);
			conf_free(&c), conf_free(&d);
		}
		assert_true(changed > 0);
		for (size_t k = 0; k < 8 && options[i].bad[k] != NULL; k += 2) {
			snprintf(text, sizeof(text), "%s[%s]\n%s = %s\n", path ? "" : MODEL, section, key, options[i].bad[k]);
			refused(text, path ? 2 : 4, options[i].bad[k + 1]);
		}
	}
}

static void
test_sizes(void **state)
{
	static const struct {
		const char *text;
		uint64_t bytes;
	} sizes[] = {{"7", 7}, {"1K", 1 << 10}, {"1k", 1 << 10}, {"32M", 32 << 20}, {"1G", 1 << 30}, {"3GiB", 3ull << 30},
	    {"3GB", 3ull << 30}, {"2T", 2ull << 40}, {"4194303T", 4194303ull << 40}};
	char text[100];

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		struct conf *c;

		snprintf(text, sizeof(text), MODEL "[engine]\nkv_cache_bytes = %s\n", sizes[i].text);
		c = load(text);
		assert_true(c->kv_cache_bytes == sizes[i].bytes);
		conf_free(&c);
	}
	refused(MODEL "[engine]\nkv_cache_bytes = 1MM\n", 4, "kv_cache_bytes '1MM' is no size (like 512M)");
	refused(MODEL "[engine]\nkv_cache_bytes = 1 M\n", 4, "kv_cache_bytes '1 M' is no size (like 512M)");
	refused(MODEL "[engine]\nkv_cache_bytes = -1\n", 4, "kv_cache_bytes '-1' is no size (like 512M)");
	refused(MODEL "[engine]\nkv_cache_bytes = M\n", 4, "kv_cache_bytes 'M' is no size (like 512M)");
}

static void
test_defaults(void **state)
{
	struct conf *c;

	(void)state;
	setenv("XDG_RUNTIME_DIR", "/run/user/7", 1);
	setenv("XDG_STATE_HOME", "/home/a/.state", 1);
	c = load("[model]\npath = models/x\n[engine]\nmax_batch_tokens = 16\n");
	assert_string_equal(c->file, file);
	assert_string_equal(c->socket, "/run/user/7/octet/octet.sock");
	assert_string_equal(c->control_socket, "/run/user/7/octet/octet-control.sock");
	assert_string_equal(c->state_dir, "/home/a/.state/octet");
	assert_string_equal(c->policies_file, saved);
	assert_memory_equal(c->model_path, dir, strlen(dir)); /* beside the file */
	assert_string_equal(c->model_path + strlen(dir), "/models/x");
	assert_string_equal(c->log_level, "info");
	assert_string_equal(c->policy, "bf16");
	assert_string_equal(c->operators, "");
	assert_string_equal(c->viewers, "*");
	assert_int_equal(c->control_mode, 0660);
	assert_int_equal(c->max_queue, 1024);
	assert_true(c->kv_cache_bytes == 256 << 20);
	assert_int_equal(c->max_batch, 16); /* not more than rows */
	assert_int_equal(c->on_flip, CONF_ON_FLIP_SWITCH);
	assert_int_equal(c->prefix_cache, CONF_PREFIX_USER);
	assert_int_equal(c->n_policies, 2);
	assert_int_equal(c->policies[0].line, 0);
	assert_string_equal(c->policies[0].name, "bf16");
	assert_string_equal(c->policies[1].name, "fp8");
	conf_free(&c);
	setenv("OCTET_SOCKET", "/o", 1);
	unsetenv("XDG_RUNTIME_DIR");
	c = load(MODEL);
	assert_string_equal(c->socket, "/o");
	assert_string_equal(c->control_socket, "/o-control.sock");
	conf_free(&c);
	unsetenv("OCTET_SOCKET");
	c = load(MODEL);
	assert_string_equal(c->socket, "/run/octet/octet.sock");
	conf_free(&c);
}

/* Policies that octetctl saved. */
static void
test_saved(void **state)
{
	struct conf *c = NULL;
	char want[300];
	struct err err;

	(void)state;
	write_file(saved, "[policy s]\nmlp.* = fp8\n[policy fp8]\n* = fp8\n", 43);
	c = load(MODEL "[policy m]\nmlp.* = fp8\n");
	assert_true(conf_policy(c, "s")->saved);
	assert_false(conf_policy(c, "m")->saved);
	assert_int_equal(conf_policy(c, "fp8")->n_rules, 1);
	conf_free(&c);
	assert_int_equal(load_n(&c, MODEL "[policy s]\nmlp.* = fp8\n", 41, &err), -EEXIST);
	snprintf(want, sizeof(want), "%s:2: policy 's' is defined in %s, line 4", saved, file);
	assert_string_equal(err.text, want);
	write_file(saved, "[engine]\nthreads = 1\n", 21);
	assert_int_equal(load_n(&c, MODEL, strlen(MODEL), &err), -EINVAL);
	snprintf(want, sizeof(want), "%s:2: only [policy NAME] sections stand in this file", saved);
	assert_string_equal(err.text, want);
	assert_null(c);
	assert_int_equal(unlink(saved), 0);
}

static void
test_diff(void **state)
{
	struct conf *a = load("[model]\npath = /m\n[engine]\nthreads = 2\nspin_us = 10\n");
	struct conf *b = load("[model]\npath = /m\n[engine]\nthreads = 4\nspin_us = 20\n");
	struct conf_change *d;
	size_t n;

	(void)state;
	assert_int_equal(conf_diff(a, b, &d, &n), 0);
	assert_int_equal(n, 2);
	assert_string_equal(d[0].key, "engine.threads");
	assert_string_equal(d[0].from, "2");
	assert_string_equal(d[0].to, "4");
	assert_false(d[0].live);
	assert_string_equal(d[1].key, "engine.spin_us");
	assert_true(d[1].live);
	conf_changes_free(d, n);
	assert_int_equal(conf_keep_restart_only(b, a), 0);
	assert_int_equal(b->threads, 2);
	assert_int_equal(b->spin_us, 20);
	conf_free(&a), conf_free(&b);
}

static int
setup(void **state)
{
	(void)state;
	unsetenv("OCTET_SOCKET");
	if (mkdtemp(dir) == NULL)
		return -1;
	snprintf(file, sizeof(file), "%s/octet.ini", dir);
	snprintf(saved, sizeof(saved), "%s/policies.ini", dir);
	return 0;
}

static int
teardown(void **state)
{
	(void)state;
	unlink(saved);
	return unlink(file) != 0 || rmdir(dir) != 0;
}

int
main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_values), cmocka_unit_test(test_refused),
	    cmocka_unit_test(test_lines), cmocka_unit_test(test_options), cmocka_unit_test(test_sizes),
	    cmocka_unit_test(test_defaults), cmocka_unit_test(test_saved), cmocka_unit_test(test_diff)};

	return cmocka_run_group_tests_name("conf", tests, setup, teardown);
}
