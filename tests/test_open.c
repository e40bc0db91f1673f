/* SPDX-License-Identifier: Apache-2.0 */
/*
 * liboctet where there is no octetd, or something else in its place: an error
 * that names the cause, within the time octet.h says, no descriptor lost, never
 * a crash of the app.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "client/octet.h"
#include "client/tok.h"
#include "client/wire.h"

#define PROMPT_RING 1024u
#define VOCAB 2048u

static char dir[] = "/tmp/octet-open.XXXXXX";
static char sock[64];
static void *blob;
static size_t blob_bytes;
static const uint32_t ids[] = {1, 44, 583};

static uint64_t rng = 88172645463325252u;

static uint32_t
rnd(void)
{
	rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
	return (uint32_t)(rng >> 32);
}

static int64_t
now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static unsigned
count_fds(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned n = 0;

	assert_non_null(d);
	while (readdir(d) != NULL)
		n++;
	closedir(d);
	return n;
}

static int
listen_at(int type, int backlog)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);

	memcpy(sa.sun_path, sock, sizeof(sock));
	unlink(sock);
	assert_int_equal(bind(fd, (struct sockaddr *)&sa, sizeof(sa)), 0);
	assert_int_equal(listen(fd, backlog), 0);
	return fd;
}

static void
assert_open(const char *path, int rc, const char *text)
{
	char why[256] = "";
	octet *o = (octet *)why;
	int got = octet_open(&o, path, why, sizeof(why));

	if (got != rc || o != NULL || strcmp(why, text) != 0)
		fail_msg("%d \"%s\", want %d \"%s\"", got, why, rc, text);
}

/* ---- nobody there ---- */

static void
test_nobody(void **state)
{
	char text[256], longest[200];
	int fd;

	(void)state;
	unlink(sock);
	snprintf(text, sizeof(text), "cannot connect to %s: No such file or directory: is octetd running?", sock);
	assert_open(sock, -ENOENT, text);
	setenv("OCTET_SOCKET", sock, 1);
	assert_open(NULL, -ENOENT, text);
	unsetenv("OCTET_SOCKET");
	setenv("XDG_RUNTIME_DIR", "/nowhere", 1);
	assert_open(NULL, -ENOENT, "cannot connect to /nowhere/octet/octet.sock: No such file or directory: is octetd running?");
	snprintf(text, sizeof(text), "cannot connect to %s: Connection refused: is octetd running?", sock);
	close(listen_at(SOCK_SEQPACKET, 1)); /* it died: a stale socket */
	assert_open(sock, -ECONNREFUSED, text);
	fd = listen_at(SOCK_STREAM, 1);
	snprintf(text, sizeof(text), "cannot connect to %s: Protocol wrong type for socket", sock);
	assert_open(sock, -EPROTOTYPE, text);
	close(fd);
	memset(longest, 'x', sizeof(longest) - 1);
	longest[sizeof(longest) - 1] = '\0';
	snprintf(text, sizeof(text), "%s: longer than the 107 bytes of a socket path", longest);
	text[255] = '\0';
	assert_open(longest, -ENAMETOOLONG, text);
}

static void *
open_main(void *arg)
{
	char *why = arg;
	octet *o;

	return (void *)(intptr_t)octet_open(&o, sock, why, 256);
}

/* A daemon that hangs: one caller waits for the answer, the next already for a
 * place in the queue of its socket. */
static void
test_hangs(void **state)
{
	int fd = listen_at(SOCK_SEQPACKET, 0);
	static char why[3][256];
	int64_t start = now_ms();
	pthread_t t[3];
	void *rc;

	(void)state;
	for (int i = 0; i < 3; i++)
		assert_int_equal(pthread_create(&t[i], NULL, open_main, why[i]), 0);
	for (int i = 0; i < 3; i++) {
		struct timespec ts;

		clock_gettime(CLOCK_REALTIME, &ts);
		ts.tv_sec += 30;
		assert_int_equal(pthread_timedjoin_np(t[i], &rc, &ts), 0);
		assert_int_equal((intptr_t)rc, -ETIMEDOUT);
		assert_string_equal(why[i], "octetd did not answer in 5000 ms");
	}
	assert_true(now_ms() - start >= 4900);
	close(fd);
}

/* ---- somebody else there ---- */

/* What answers a caller: bytes and up to three descriptors. It holds the
 * connection until the caller hangs up. */
struct liar {
	int listener;
	bool deaf;           /* hangs up without reading the hello */
	_Alignas(8) char answer[512];
	size_t n;
	int fd[3], n_fds;
	uint32_t signals;    /* answers only after so many more of them */
	void (*then)(struct liar *, int fd);
	struct wire_session *shm;
};

static void
send_answer(const struct liar *l, int fd)
{
	union { struct cmsghdr h; char b[CMSG_SPACE(3 * sizeof(int))]; } control = {.b = ""};
	struct iovec iov = {(void *)(uintptr_t)l->answer, l->n};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (l->n_fds > 0) {
		control.h = (struct cmsghdr){.cmsg_len = CMSG_LEN((size_t)l->n_fds * sizeof(int)), .cmsg_level = SOL_SOCKET,
		    .cmsg_type = SCM_RIGHTS};
		memcpy(CMSG_DATA(&control.h), l->fd, (size_t)l->n_fds * sizeof(int));
		msg.msg_control = &control;
		msg.msg_controllen = CMSG_SPACE((size_t)l->n_fds * sizeof(int));
	}
	(void)!sendmsg(fd, &msg, MSG_NOSIGNAL);
}

static uint32_t n_alarms; /* atomic */

static void
on_alarm(int sig)
{
	(void)sig;
	__atomic_add_fetch(&n_alarms, 1, __ATOMIC_RELAXED);
}

static uint32_t
alarms(void)
{
	return __atomic_load_n(&n_alarms, __ATOMIC_RELAXED);
}

static void *
liar_main(void *arg)
{
	struct liar *l = arg;
	char buf[600];
	int fd = accept(l->listener, NULL, NULL);

	if (!l->deaf)
		(void)!recv(fd, buf, sizeof(buf), 0);
	for (uint32_t seen = alarms(); alarms() - seen < l->signals;)
		sched_yield();
	if (l->n > 0) {
		send_answer(l, fd);
		if (l->then != NULL)
			l->then(l, fd);
		while (recv(fd, buf, sizeof(buf), 0) > 0)
			;
	}
	close(fd);
	return NULL;
}

static int
memory(size_t bytes)
{
	int fd = memfd_create("liar", MFD_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
	return fd;
}

static const size_t slots_at = sizeof(struct wire_session);
static const size_t prompt_at = sizeof(struct wire_session) + WIRE_SLOTS * sizeof(struct wire_slot);
#define SESSION_BYTES (prompt_at + PROMPT_RING * 4)

/* An answer as octetd gives it; the test then spoils something. */
static struct wire_welcome *
welcome(struct liar *l)
{
	struct wire_welcome *w = (struct wire_welcome *)(void *)l->answer;

	*w = (struct wire_welcome){.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = WIRE_WELCOME, .vocab = VOCAB,
	    .max_context = 512, .max_requests = 32, .session_bytes = SESSION_BYTES, .tokenizer_bytes = blob_bytes,
	    .client_id = 1};
	memset(w->model, 'm', sizeof(w->model)); /* without an end */
	l->n = sizeof(*w);
	l->n_fds = 2;
	l->fd[0] = memory(SESSION_BYTES);
	l->fd[1] = memory(blob_bytes);
	assert_int_equal(pwrite(l->fd[1], blob, blob_bytes, 0), blob_bytes);
	l->shm = mmap(NULL, SESSION_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, l->fd[0], 0);
	assert_true(l->shm != MAP_FAILED);
	*l->shm = (struct wire_session){.magic = WIRE_MAGIC, .version = WIRE_VERSION, .prompt_ring = PROMPT_RING,
	    .slots_at = (uint32_t)slots_at, .prompt_at = (uint32_t)prompt_at};
	return w;
}

static void
forget(struct liar *l)
{
	for (int i = 0; i < l->n_fds; i++)
		close(l->fd[i]);
	if (l->shm != NULL)
		munmap(l->shm, SESSION_BYTES);
	*l = (struct liar){.listener = l->listener};
}

static int
try_lie(struct liar *l, char why[256])
{
	unsigned fds = count_fds();
	octet *o;
	pthread_t t;
	int rc;

	assert_int_equal(pthread_create(&t, NULL, liar_main, l), 0);
	rc = octet_open(&o, sock, why, 256);
	octet_close(&o);
	pthread_join(t, NULL);
	assert_int_equal(count_fds(), fds);
	forget(l);
	return rc;
}

/* text NULL: only the code is asked. */
static void
assert_lie(struct liar *l, int rc, const char *text)
{
	char why[256] = "";
	int got = try_lie(l, why);

	if (got != rc || (text != NULL && strcmp(why, text) != 0))
		fail_msg("%d \"%s\", want %d \"%s\"", got, why, rc, text != NULL ? text : "");
}

static void
test_answers(void **state)
{
	static const char version[] = "octetd speaks another version", closed[] = "octetd closed the connection";
	struct liar l = {.listener = listen_at(SOCK_SEQPACKET, 8)};
	struct wire_refused *r = (struct wire_refused *)(void *)l.answer;

	(void)state;
	assert_lie(&l, -EPIPE, closed);
	l.deaf = true;
	assert_lie(&l, -EPIPE, closed);
	for (size_t n = 1; n < sizeof(l.answer); n += 37) {
		for (size_t i = 0; i < n; i++)
			l.answer[i] = (char)rnd();
		l.n = n;
		assert_lie(&l, -EPROTO, version);
	}
	welcome(&l)->version++;
	assert_lie(&l, -EPROTO, version);
	welcome(&l);
	l.n--;
	assert_lie(&l, -EPROTO, version);
	welcome(&l);
	close(l.fd[1]);
	l.n_fds = 1;
	assert_lie(&l, -EPROTO, version);
	*r = (struct wire_refused){.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = WIRE_REFUSED, .code = 5};
	memset(r->text, 'x', sizeof(r->text));
	l.n = sizeof(*r);
	assert_lie(&l, -EACCES, NULL);
	welcome(&l);
	l.fd[l.n_fds++] = memory(1); /* one more than asked for: dropped */
	assert_lie(&l, 0, "");
	close(l.listener);
}

/* An app with a profiler, or a timer: no signal may look like a daemon that is silent. */
static void
test_signals(void **state)
{
	struct itimerval often = {{0, 500}, {0, 500}}, off = {{0, 0}, {0, 0}};
	struct sigaction sa = {.sa_handler = on_alarm}, old;
	struct liar l = {.listener = listen_at(SOCK_SEQPACKET, 8)};
	struct octet_event ev;
	sigset_t set;
	char why[256];
	octet *o;
	pthread_t t;
	int rc;

	(void)state;
	sigemptyset(&set);
	sigaddset(&set, SIGALRM);
	sigaction(SIGALRM, &sa, &old); /* no SA_RESTART */
	welcome(&l);
	l.signals = 20;
	pthread_sigmask(SIG_BLOCK, &set, NULL); /* the other thread inherits it: they are all this one's */
	assert_int_equal(pthread_create(&t, NULL, liar_main, &l), 0);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	setitimer(ITIMER_REAL, &often, NULL);
	rc = octet_open(&o, sock, why, sizeof(why));
	if (rc == 0) {
		assert_int_equal(octet_submit(o, ids, 3, &(struct octet_sampling){.max_tokens = 1}), 0);
		assert_int_equal(octet_read(o, 0, &ev, 1, 30000), -EINTR);
	}
	setitimer(ITIMER_REAL, &off, NULL);
	sigaction(SIGALRM, &old, NULL);
	if (rc != 0)
		fail_msg("%s", why);
	octet_close(&o);
	pthread_join(t, NULL);
	forget(&l);
	close(l.listener);
}

static void
test_memory(void **state)
{
	static const char unmapped[] = "octetd gave a session that cannot be mapped";
	static const char layout[] = "octetd gave a session of another layout";
	static const uint64_t sizes[] = {0, 1, 4096, sizeof(struct wire_session) - 1, 1ull << 33, UINT64_MAX};
	struct liar l = {.listener = listen_at(SOCK_SEQPACKET, 8)};
	char why[256];

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		welcome(&l)->session_bytes = sizes[i];
		assert_lie(&l, -EPROTO, unmapped);
	}
	welcome(&l)->tokenizer_bytes++;
	assert_lie(&l, -EPROTO, unmapped);
	welcome(&l)->session_bytes = sizeof(struct wire_session);
	assert_lie(&l, -EPROTO, layout);
	for (uint32_t word = 0; word < 5; word++)
		for (int i = 0; i < 8; i++) {
			/* magic, version (checked at the handshake), prompt_ring, slots_at, prompt_at */
			static const uint32_t bad[] = {0x80000000, 0xffffffff, 0xffffffc0, 0x7fffffff, 1025, 0xc0000000,
			    0x40000001, 0x80000040};

			if (word == 1)
				continue;
			welcome(&l);
			((uint32_t *)(void *)l.shm)[word] = bad[i];
			assert_lie(&l, -EPROTO, layout);
		}
	welcome(&l);
	assert_int_equal(pwrite(l.fd[1], "\0\0\0\0\0\0\0", 8, 0), 8);
	assert_lie(&l, -EINVAL, NULL);
	for (int i = 0; i < 50; i++) { /* refused, or opened with other words in it */
		int rc;

		welcome(&l);
		for (int j = 0; j < 20; j++) {
			uint32_t word = rnd();

			assert_int_equal(pwrite(l.fd[1], &word, 4, rnd() % (blob_bytes - 4)), 4);
		}
		rc = try_lie(&l, why);
		assert_true(rc == 0 || (rc == -EINVAL && strncmp(why, "tokenizer: ", 11) == 0));
	}
	close(l.listener);
}

/* ---- a session whose daemon writes nonsense ---- */

static struct wire_slot *
slot_of(struct liar *l, uint32_t i)
{
	return (struct wire_slot *)(void *)((char *)l->shm + slots_at) + i;
}

static void
scribble(struct liar *l, int fd)
{
	char bell;

	/* The request; then answers to it, mostly. daemon_sleeps is set: it rings. */
	(void)!recv(fd, &bell, 1, 0);
	for (uint32_t i = 0; i < WIRE_EVENTS; i++)
		slot_of(l, 0)->event[i] = (struct wire_event){.kind = rnd() % 8, .serial = rnd() % 4, .token = rnd() % 3000,
		    .position = rnd(), .a = ((uint64_t)rnd() << 32) | rnd(), .epoch = rnd()};
	__atomic_store_n(&slot_of(l, 0)->tail, WIRE_EVENTS, __ATOMIC_RELEASE);
	(void)!send(fd, "!", 1, MSG_NOSIGNAL);
}

static void
leap(struct liar *l, int fd)
{
	char bell;

	(void)!recv(fd, &bell, 1, 0);
	__atomic_store_n(&l->shm->sq_head, 0x80000000u, __ATOMIC_RELEASE);
	__atomic_store_n(&slot_of(l, 0)->tail, WIRE_EVENTS + 1, __ATOMIC_RELEASE);
	(void)!send(fd, "!", 1, MSG_NOSIGNAL);
}

static octet *
open_liar(struct liar *l, pthread_t *t, void (*then)(struct liar *, int))
{
	char why[256];
	octet *o;

	welcome(l);
	l->then = then;
	l->shm->daemon_sleeps = 1;
	assert_int_equal(pthread_create(t, NULL, liar_main, l), 0);
	if (octet_open(&o, sock, why, sizeof(why)) != 0)
		fail_msg("%s", why);
	return o;
}

static void
test_events(void **state)
{
	struct liar l = {.listener = listen_at(SOCK_SEQPACKET, 8)};
	struct octet_sampling s = {.max_tokens = 5};
	struct octet_event ev[64];
	pthread_t t;
	octet *o;

	(void)state;
	for (int round = 0; round < 200; round++) {
		int request, n;

		o = open_liar(&l, &t, scribble);
		assert_int_equal(strlen(octet_info(o)->model), 127);
		request = octet_submit(o, ids, 3, &s);
		assert_int_equal(request, 0);
		assert_int_equal(octet_wait(o, 30000), 1);
		while ((n = octet_read(o, request, ev, 64, 0)) > 0)
			for (int i = 0; i < n; i++) {
				assert_true(ev[i].kind >= OCTET_SEGMENT);
				assert_true(ev[i].kind != OCTET_TOKEN || ev[i].token < VOCAB);
				assert_true(ev[i].kind != OCTET_DONE || (ev[i].finish >= OCTET_STOP && ev[i].finish <= OCTET_FAILED));
				assert_non_null(memchr(ev[i].message, '\0', sizeof(ev[i].message)));
			}
		octet_close(&o);
		pthread_join(t, NULL);
		forget(&l);
	}
	o = open_liar(&l, &t, leap);
	assert_int_equal(octet_submit(o, ids, 3, &s), 0);
	assert_int_equal(octet_wait(o, 30000), 1);
	assert_int_equal(octet_read(o, 0, ev, 64, 0), -EPROTO);
	assert_string_equal(octet_error(o), "octetd wrote an impossible index");
	assert_int_equal(octet_submit(o, ids, 3, &s), -EPIPE);
	octet_close(&o);
	pthread_join(t, NULL);
	forget(&l);
	close(l.listener);
}

/* ---- an app that errs ---- */

static void
hang_on(struct liar *l, int fd)
{
	(void)l, (void)fd;
}

static void
test_arguments(void **state)
{
	struct liar l = {.listener = listen_at(SOCK_SEQPACKET, 8)};
	struct octet_sampling s = {.max_tokens = 5};
	char why[256];
	octet *none = NULL, *o;
	pthread_t t;

	(void)state;
	assert_int_equal(octet_open(NULL, sock, why, sizeof(why)), -EINVAL);
	assert_string_equal(why, "octet_open: out is NULL");
	octet_close(NULL);
	octet_close(&none);
	o = open_liar(&l, &t, hang_on);
	assert_int_equal(octet_submit(o, NULL, 3, &s), -EINVAL);
	assert_string_equal(octet_error(o), "octet_submit: ids or sampling is NULL");
	assert_int_equal(octet_submit(o, ids, 3, NULL), -EINVAL);
	assert_int_equal(octet_submit(o, NULL, 0, &s), -EINVAL);
	assert_string_equal(octet_error(o), "the prompt is empty");
	assert_int_equal(octet_submit(o, ids, 3, &s), 0);
	assert_int_equal(octet_read(o, 0, NULL, 4, 0), -EINVAL);
	assert_int_equal(octet_read(o, 0, NULL, 0, 0), 0);
	assert_int_equal(octet_read(o, 64, NULL, 0, 0), -ENOENT);
	assert_int_equal(octet_cancel(o, 64), -ENOENT);
	assert_int_equal(octet_cancel(o, -1), -ENOENT);
	octet_close(&o);
	assert_null(o);
	pthread_join(t, NULL);
	forget(&l);
	close(l.listener);
}

/* The tokenizer of the embedded model, as octetd hands it out. */
static int
compile(const char *path)
{
	FILE *f = fopen(path, "r");
	char *json = NULL;
	size_t cap = 0;
	ssize_t n = f != NULL ? getdelim(&json, &cap, '\0', f) : -1;
	struct err err = {"cannot be read"};
	int rc = n < 0 ? -EIO : tok_compile(json, (size_t)n, NULL, 0, VOCAB, &blob, &blob_bytes, &err);

	if (rc != 0)
		print_error("%s: %s\n", path, err.text);
	if (f != NULL)
		fclose(f);
	free(json);
	return rc;
}

static int
setup(void **state)
{
	char path[4096];

	(void)state;
	if (mkdtemp(dir) == NULL)
		return -1;
	snprintf(sock, sizeof(sock), "%s/octet.sock", dir);
	snprintf(path, sizeof(path), "%s/models/proof/tokenizer.json", getenv("srcdir") != NULL ? getenv("srcdir") : ".");
	return compile(path);
}

static int
teardown(void **state)
{
	(void)state;
	free(blob);
	unlink(sock);
	return rmdir(dir);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_nobody),
		cmocka_unit_test(test_hangs),
		cmocka_unit_test(test_answers),
		cmocka_unit_test(test_signals),
		cmocka_unit_test(test_memory),
		cmocka_unit_test(test_events),
		cmocka_unit_test(test_arguments),
	};

	signal(SIGPIPE, SIG_IGN);
	return cmocka_run_group_tests_name("open", tests, setup, teardown);
}
