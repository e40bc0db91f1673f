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

static char file[] = "/tmp/octet-conf.XXXXXX";

static int
load_n(struct conf **c, const char *text, size_t n, struct err *err)
{
	FILE *f = fopen(file, "w");

	assert_non_null(f);
	assert_int_equal(fwrite(text, 1, n, f), n);
	assert_int_equal(fclose(f), 0);
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

/* want follows "FILE:LINE: ". */
static void
refused(const char *text, int line, const char *want)
{
	struct conf *c = NULL;
	char place[64];
	struct err err;

	if (load_n(&c, text, strlen(text), &err) != -EINVAL)
		fail_msg("taken: %s", text);
	assert_null(c);
	snprintf(place, sizeof(place), line > 0 ? "%s:%d: " : "%s: ", file, line);
	if (strncmp(err.text, place, strlen(place)) != 0 || strstr(err.text, want) == NULL)
		fail_msg("\"%s\" is not \"%s ... %s\"", err.text, place, want);
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

static void
test_refused(void **state)
{
	char line[2000], zero[] = "[model]\npath = /m\0x\n";
	struct conf *c = NULL;
	struct err err;

	(void)state;
	refused("[daemon]\nsocket = /a\n", 0, "[model] path is missing");
	refused("[model]\npath = /m\nnosuch = 1\n", 3, "unknown key 'nosuch' in [model]");
	refused("[model]\npath = /m\n[engine]\nthread = 1\n", 4, "unknown key 'thread' in [engine]: did you mean 'threads'?");
	refused("[nosuch]\na = 1\n", 2, "unknown section [nosuch]");
	refused("path = /m\n", 1, "'path' stands before any section");
	refused("[model]\npath\n", 2, "neither '[section]' nor 'key = value'");
	refused("[model]\npath = /m\n[engine]\nthreads = many\n", 4, "threads");
	refused("[model]\npath = /m\n[engine]\nthreads = -1\n", 4, "threads");
	refused("[model]\npath = /m\n[engine]\nthreads = 1025\n", 4, "1024");
	refused("[model]\npath = /m\n[engine]\nkv_cache_bytes = 3X\n", 4, "kv_cache_bytes");
	refused("[model]\npath = /m\n[engine]\nkv_cache_bytes = 99999999999T\n", 4, "kv_cache_bytes");
	refused("[model]\npath = /m\n[engine]\nbackend = gpu\n", 4, "auto, cpu, cuda");
	refused("[model]\npath = /m\n[daemon]\nsocket_mode = 999\n", 4, "socket_mode");
	refused("[model]\npath = /m\n[daemon]\nlog_level = loud\n", 4, "error, warn, info, debug");
	refused("[model]\npath = /m\n[policy ]\na = fp8\n", 4, "[policy] has no name");
	memset(line, 'a', sizeof(line) - 1);
	line[sizeof(line) - 1] = '\0';
	memcpy(line, "[model]\npath = ", 15);
	refused(line, 2, "longer than");
	assert_int_equal(load_n(&c, zero, sizeof(zero) - 1, &err), -EINVAL);
	assert_non_null(strstr(err.text, "a zero byte: not a text file"));
	assert_int_equal(conf_load(&c, "/nosuch/octet.ini", &err), -ENOENT);
	assert_string_equal(err.text, "/nosuch/octet.ini: No such file or directory");
	assert_true(conf_load(&c, "/tmp", &err) < 0);
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
	int fd = mkstemp(file);

	(void)state;
	unsetenv("OCTET_SOCKET");
	return fd < 0 || close(fd) != 0;
}

static int
teardown(void **state)
{
	(void)state;
	return unlink(file);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_values), cmocka_unit_test(test_refused),
	    cmocka_unit_test(test_diff)};

	return cmocka_run_group_tests_name("conf", tests, setup, teardown);
}
