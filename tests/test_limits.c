/* SPDX-License-Identifier: Apache-2.0 */
/* What one user may hold in a real octetd: connections and requests, said clearly when it is too much, and given back. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "client/octet.h"

#define DEADLINE_MS 120000 /* sanitizers are slow */
#define CLIENTS 3          /* max_clients_per_uid */
#define REQUESTS 4         /* max_requests */
#define OF_USER 6          /* max_requests_per_uid */
#define RUNNING 5          /* max_batch */
#define OTHER_UID 65534

static char dir[] = "/tmp/octet-limits.XXXXXX";
static char sock[64];
static pid_t daemon_pid;
static const uint32_t ids[] = {1, 44, 583, 1568, 472, 75, 1192, 86, 15, 289, 539, 739, 841, 17, 2};
#define N_IDS (sizeof(ids) / sizeof(*ids))
/* Longer than a ring of events: unread, it stays in flight. */
static const struct octet_sampling endless = {.max_tokens = 480, .ignore_eos = 1};

static int64_t
now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void
write_config(const char *path)
{
	char *src = realpath(getenv("srcdir") != NULL ? getenv("srcdir") : ".", NULL);
	FILE *f = fopen(path, "w");

	assert_non_null(src);
	assert_non_null(f);
	fprintf(f, "[daemon]\nsocket = %s\nsocket_mode = 0666\ncontrol_socket = %s/control.sock\nstate_dir = %s/state\n"
	    "max_clients_per_uid = %d\nmax_requests = %d\nmax_requests_per_uid = %d\nhandshake_timeout_ms = 60000\n"
	    "log_level = error\n[model]\npath = %s/models/proof\n[engine]\nkv_cache_bytes = 32M\nthreads = 1\nmax_batch = %d\n",
	    sock, dir, dir, CLIENTS, REQUESTS, OF_USER, src, RUNNING);
	free(src);
	assert_int_equal(fclose(f), 0);
}

/* The daemon's socket appears when it is ready. */
static int
setup(void **state)
{
	char path[128];
	struct pollfd p[2];

	(void)state;
	if (mkdtemp(dir) == NULL || chmod(dir, 0755) != 0)
		return -1;
	snprintf(sock, sizeof(sock), "%s/octet.sock", dir);
	snprintf(path, sizeof(path), "%s/octet.ini", dir);
	write_config(path);
	p[0] = (struct pollfd){.fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK), .events = POLLIN};
	inotify_add_watch(p[0].fd, dir, IN_MOVED_TO);
	daemon_pid = fork();
	if (daemon_pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		execl("./octetd", "octetd", "--config", path, (char *)NULL);
		_exit(127);
	}
	p[1] = (struct pollfd){.fd = (int)syscall(SYS_pidfd_open, daemon_pid, 0), .events = POLLIN};
	while (access(sock, F_OK) != 0) {
		char buf[4096];

		if (poll(p, 2, DEADLINE_MS) <= 0 || p[1].revents != 0)
			return -1;
		(void)!read(p[0].fd, buf, sizeof(buf));
	}
	close(p[0].fd);
	close(p[1].fd);
	return 0;
}

static int
teardown(void **state)
{
	char cmd[128];
	int status = -1;

	(void)state;
	kill(daemon_pid, SIGTERM);
	if (waitpid(daemon_pid, &status, 0) != daemon_pid || status != 0)
		return -1; /* a sanitizer had something to say */
	snprintf(cmd, sizeof(cmd), "rm -rf %s", dir);
	return system(cmd) == 0 ? 0 : -1;
}

/* What others gave up is free as soon as the daemon saw them go. */
static octet *
open_soon(void)
{
	int64_t end = now_ms() + DEADLINE_MS;
	char why[256];
	octet *o;
	int rc;

	while ((rc = octet_open(&o, sock, why, sizeof(why))) != 0)
		if (rc != -EDQUOT || now_ms() > end)
			fail_msg("%d: %s", rc, why);
	return o;
}

static void
assert_full(void)
{
	char why[256];
	octet *o;

	assert_int_equal(octet_open(&o, sock, why, sizeof(why)), -EDQUOT);
	assert_null(o);
	assert_string_equal(why, "too many clients of this user: max_clients_per_uid is 3");
}

static int
dial(void)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	memcpy(sa.sun_path, sock, sizeof(sock));
	assert_int_equal(connect(fd, (struct sockaddr *)&sa, sizeof(sa)), 0);
	return fd;
}

static void
read_done(octet *o, int request, struct octet_event *done)
{
	int64_t end = now_ms() + DEADLINE_MS;

	memset(done, 0, sizeof(*done));
	while (done->kind != OCTET_DONE) {
		if (octet_read(o, request, done, 1, 1000) < 0)
			fail_msg("%s", octet_error(o));
		assert_true(now_ms() < end);
	}
}

static int
submit(octet *o, const struct octet_sampling *s)
{
	int request = octet_submit(o, ids, N_IDS, s);

	if (request < 0)
		fail_msg("%s", octet_error(o));
	return request;
}

/* Another user finds a place while this one has none left. */
static void
assert_other_user_served(void)
{
	pid_t pid = fork();
	int status = -1;

	if (pid == 0) {
		struct octet_event ev = {.kind = OCTET_TOKEN};
		octet *o;
		int request;

		if (setgid(OTHER_UID) != 0 || setuid(OTHER_UID) != 0 || octet_open(&o, sock, NULL, 0) != 0)
			_exit(1);
		request = octet_submit(o, ids, N_IDS, &(struct octet_sampling){.max_tokens = 2});
		while (ev.kind != OCTET_DONE)
			if (octet_read(o, request, &ev, 1, DEADLINE_MS) <= 0)
				_exit(2);
		_exit(ev.finish == OCTET_LENGTH ? 0 : 3);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

static void
test_sessions(void **state)
{
	octet *o[CLIENTS];

	(void)state;
	for (int i = 0; i < CLIENTS; i++)
		o[i] = open_soon();
	for (int i = 0; i < 20; i++)
		assert_full();
	if (geteuid() == 0)
		assert_other_user_served();
	octet_close(&o[1]);
	o[1] = open_soon();
	assert_full();
	for (int i = 0; i < CLIENTS; i++)
		octet_close(&o[i]);
}

/* A connection that has a place and says nothing. */
static int
silent(void)
{
	int64_t end = now_ms() + DEADLINE_MS;
	struct pollfd p = {.events = POLLIN};

	for (;;) {
		octet *o;

		p.fd = dial();
		octet_open(&o, sock, NULL, 0); /* callers are met in order: when this one has its answer, so has that one */
		octet_close(&o);
		if (poll(&p, 1, 0) == 0)
			return p.fd;
		close(p.fd); /* turned away */
		assert_true(now_ms() < end);
	}
}

static void
test_silent(void **state)
{
	int fd[CLIENTS];
	octet *o;

	(void)state;
	for (int i = 0; i < CLIENTS; i++)
		fd[i] = silent();
	assert_full();
	for (int i = 0; i < CLIENTS; i++)
		close(fd[i]);
	o = open_soon();
	octet_close(&o);
}

static void
test_requests(void **state)
{
	octet *a = open_soon(), *b = open_soon();
	int of_a[REQUESTS], of_b[REQUESTS], request;
	struct octet_event done;

	(void)state;
	for (int i = 0; i < REQUESTS; i++)
		of_a[i] = submit(a, &endless);
	assert_int_equal(octet_submit(a, ids, N_IDS, &endless), -EBUSY);
	assert_string_equal(octet_error(a), "busy: 4 requests are in flight on this connection");
	for (int i = 0; i < REQUESTS; i++) /* they run: those of b come after them */
		assert_true(octet_read(a, of_a[i], &done, 1, DEADLINE_MS) == 1);
	for (int i = 0; i < OF_USER - REQUESTS; i++)
		of_b[i] = submit(b, &endless);
	request = submit(b, &endless);
	read_done(b, request, &done);
	assert_int_equal(done.finish, OCTET_FAILED);
	assert_int_equal(done.error, -EDQUOT);
	assert_string_equal(done.message, "busy: too many requests of this user are in flight (max_requests_per_uid)");
	if (geteuid() == 0) {
		/* One that waits gets what this user may not take. */
		assert_int_equal(octet_cancel(a, of_a[0]), 0);
		read_done(a, of_a[0], &done);
		assert_int_equal(done.finish, OCTET_CANCELLED);
		assert_int_equal(octet_cancel(b, of_b[0]), 0);
		read_done(b, of_b[0], &done);
		assert_other_user_served();
	}
	octet_close(&a);
	octet_close(&b);
}

/* A session that goes with requests running gives back all it held. */
static void
test_given_back(void **state)
{
	(void)state;
	for (int round = 0; round < 20; round++) {
		octet *a = open_soon(), *b;
		struct octet_event done;
		int64_t end = now_ms() + DEADLINE_MS;

		for (int i = 0; i < REQUESTS; i++)
			submit(a, &endless);
		octet_close(&a);
		b = open_soon();
		do { /* until those of a are gone */
			int request[REQUESTS];

			for (int i = 0; i < REQUESTS; i++)
				request[i] = submit(b, &(struct octet_sampling){.max_tokens = 2, .ignore_eos = 1});
			for (int i = 0; i < REQUESTS; i++)
				read_done(b, request[i], &done);
			assert_true(now_ms() < end);
		} while (done.finish != OCTET_LENGTH);
		octet_close(&b);
	}
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_sessions),
		cmocka_unit_test(test_silent),
		cmocka_unit_test(test_requests),
		cmocka_unit_test(test_given_back),
	};

	return cmocka_run_group_tests_name("limits", tests, setup, teardown);
}
