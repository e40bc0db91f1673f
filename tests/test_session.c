/* SPDX-License-Identifier: Apache-2.0 */
/* liboctet against a real octetd on the embedded model; and clients that lie. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "client/octet.h"
#include "client/wire.h"

#define DEADLINE_MS 120000 /* sanitizers are slow */

static char dir[] = "/tmp/octet-session.XXXXXX";
static char sock[64];
static pid_t daemon_pid;

/* ---- a daemon ---- */

static void
write_config(void)
{
	char path[128], *src = realpath(getenv("srcdir") != NULL ? getenv("srcdir") : ".", NULL);
	FILE *f;

	assert_non_null(src);
	snprintf(path, sizeof(path), "%s/octet.ini", dir);
	f = fopen(path, "w");
	assert_non_null(f);
	fprintf(f, "[daemon]\nsocket = %s\ncontrol_socket = %s/control.sock\nstate_dir = %s/state\nmax_clients = 24\n"
	    "handshake_timeout_ms = 200\nlog_level = error\n[model]\npath = %s/models/proof\n[engine]\nkv_cache_bytes = 32M\nthreads = 1\n"
	    "[access]\nrequest_policies = *\n", sock, dir, dir, src);
	free(src);
	assert_int_equal(fclose(f), 0);
}

static int64_t
now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static octet *
open_or_fail(void)
{
	char why[256];
	octet *o;

	if (octet_open(&o, sock, why, sizeof(why)) != 0)
		fail_msg("%s", why);
	return o;
}

static void
start_daemon(void)
{
	int64_t end = now_ms() + DEADLINE_MS;
	char path[128];
	octet *o = NULL;

	snprintf(path, sizeof(path), "%s/octet.ini", dir);
	daemon_pid = fork();
	if (daemon_pid == 0) {
		execl("./octetd", "octetd", "--config", path, (char *)NULL);
		_exit(127);
	}
	while (octet_open(&o, sock, NULL, 0) != 0) {
		assert_int_equal(waitpid(daemon_pid, NULL, WNOHANG), 0);
		assert_true(now_ms() < end);
		usleep(5000);
	}
	octet_close(&o);
}

static void
stop_daemon(int sig, bool clean)
{
	int status = 0;

	kill(daemon_pid, sig);
	assert_int_equal(waitpid(daemon_pid, &status, 0), daemon_pid);
	if (clean)
		assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static int
setup(void **state)
{
	(void)state;
	if (mkdtemp(dir) == NULL)
		return -1;
	snprintf(sock, sizeof(sock), "%s/octet.sock", dir);
	write_config();
	start_daemon();
	return 0;
}

static int
teardown(void **state)
{
	char cmd[128];

	(void)state;
	stop_daemon(SIGTERM, true);
	snprintf(cmd, sizeof(cmd), "rm -rf %s", dir);
	return system(cmd) == 0 ? 0 : -1;
}

/* ---- the library ---- */

struct answer {
	uint32_t token[512];
	float logprob[512];
	uint32_t n, alternatives, prompts, segments;
	double prompt_sum;
	enum octet_finish finish;
	int error;
	char message[128];
	bool done;
};

static void
take(struct answer *a, const struct octet_event *ev, int n)
{
	for (int i = 0; i < n; i++) {
		switch (ev[i].kind) {
		case OCTET_TOKEN:
			assert_true(a->n < 512);
			a->logprob[a->n] = ev[i].logprob;
			a->token[a->n++] = ev[i].token;
			break;
		case OCTET_ALTERNATIVE: a->alternatives++; break;
		case OCTET_PROMPT: a->prompts++, a->prompt_sum += ev[i].logprob; break;
		case OCTET_SEGMENT: a->segments++; break;
		case OCTET_DONE:
			a->done = true;
			a->finish = ev[i].finish;
			a->error = ev[i].error;
			memcpy(a->message, ev[i].message, sizeof(a->message));
		}
	}
}

static void
read_all(octet *o, int request, struct answer *a)
{
	int64_t end = now_ms() + DEADLINE_MS;
	struct octet_event ev[16];

	memset(a, 0, sizeof(*a));
	while (!a->done) {
		int n = octet_read(o, request, ev, 16, 1000);

		if (n < 0)
			fail_msg("%s", octet_error(o));
		take(a, ev, n);
		assert_true(now_ms() < end);
	}
}

static const uint32_t ids[] = {1, 44, 583, 1568, 472, 75, 1192, 86, 15, 289, 539, 739, 841, 17, 2};
#define N_IDS (sizeof(ids) / sizeof(*ids))

static void
run(octet *o, const struct octet_sampling *s, struct answer *a)
{
	int request = octet_submit(o, ids, N_IDS, s);

	if (request < 0)
		fail_msg("%s", octet_error(o));
	read_all(o, request, a);
}

static void
test_complete(void **state)
{
	octet *o = open_or_fail();
	struct octet_sampling s = {.max_tokens = 40, .logprobs = 1};
	struct answer a, b;

	(void)state;
	assert_int_equal(octet_info(o)->vocab, 2048);
	assert_int_equal(octet_info(o)->max_context, 512);
	assert_string_equal(octet_info(o)->model, "proof");
	run(o, &s, &a);
	assert_int_equal(a.finish, OCTET_STOP);
	assert_true(a.n > 5 && a.n < 40);
	assert_int_equal(a.segments, 1);
	for (uint32_t i = 0; i < a.n; i++)
		assert_true(a.logprob[i] <= 0 && isfinite(a.logprob[i]));

	s.max_tokens = 3;
	run(o, &s, &b);
	assert_int_equal(b.finish, OCTET_LENGTH);
	assert_int_equal(b.n, 3);
	assert_memory_equal(a.token, b.token, 3 * sizeof(uint32_t));

	s.max_tokens = 60, s.ignore_eos = 1, s.top_logprobs = 4;
	run(o, &s, &b);
	assert_int_equal(b.finish, OCTET_LENGTH);
	assert_int_equal(b.n, 60);
	assert_int_equal(b.alternatives, 240);
	assert_memory_equal(a.token, b.token, a.n * sizeof(uint32_t));
	assert_memory_equal(a.logprob, b.logprob, a.n * sizeof(float));
	octet_close(&o);
	assert_null(o);
	octet_close(&o);
}

static void
test_sampling(void **state)
{
	octet *o = open_or_fail();
	struct octet_sampling s = {.max_tokens = 40, .temperature = 1.5f, .seed = 3, .ignore_eos = 1};
	struct octet_bias ban;
	struct answer greedy, a, b;

	(void)state;
	run(o, &(struct octet_sampling){.max_tokens = 40, .ignore_eos = 1}, &greedy);
	run(o, &s, &a);
	run(o, &s, &b);
	assert_memory_equal(a.token, b.token, sizeof(a.token));
	s.seed = UINT64_MAX;
	run(o, &s, &b);
	assert_memory_not_equal(a.token, b.token, sizeof(a.token));
	s.min_p = 1; /* only the likeliest is left */
	run(o, &s, &b);
	assert_memory_equal(greedy.token, b.token, sizeof(b.token));

	ban = (struct octet_bias){greedy.token[0], -100};
	s = (struct octet_sampling){.max_tokens = 40, .ignore_eos = 1, .bias = &ban, .n_bias = 1};
	run(o, &s, &b);
	for (uint32_t i = 0; i < b.n; i++)
		assert_int_not_equal(b.token[i], ban.id);
	/* What was said once is never said again. */
	s = (struct octet_sampling){.max_tokens = 40, .ignore_eos = 1, .presence_penalty = 100};
	run(o, &s, &b);
	for (uint32_t i = 0; i < b.n; i++)
		for (uint32_t j = 0; j < i; j++)
			assert_int_not_equal(b.token[i], b.token[j]);
	s = (struct octet_sampling){.max_tokens = 40, .ignore_eos = 1, .repetition_penalty = 50};
	run(o, &s, &b);
	assert_memory_not_equal(greedy.token, b.token, sizeof(b.token));
	octet_close(&o);
}

static void
test_score(void **state)
{
	octet *o = open_or_fail();
	struct octet_sampling s = {.prompt_logprobs = 1};
	uint32_t full[512];
	struct answer a, b;
	int request;

	(void)state;
	run(o, &s, &a);
	assert_int_equal(a.finish, OCTET_LENGTH);
	assert_int_equal(a.n, 0);
	assert_int_equal(a.prompts, N_IDS - 1);
	assert_true(a.prompt_sum < 0);
	run(o, &s, &b);
	assert_true(a.prompt_sum == b.prompt_sum); /* prefix cache or not */
	/* A prompt that fills the context can be scored, and its ring holds fewer events. */
	for (uint32_t i = 0; i < 512; i++)
		full[i] = i * 3 % 2048;
	s.top_logprobs = 20;
	request = octet_submit(o, full, 512, &s);
	assert_true(request >= 0);
	read_all(o, request, &a);
	assert_int_equal(a.prompts, 511);
	assert_int_equal(a.alternatives, 511 * 20);
	octet_close(&o);
}

/* A request under a policy of its own, and again under the segments that it told of. */
static void
test_policy_and_replay(void **state)
{
	octet *o = open_or_fail();
	struct octet_sampling s = {.max_tokens = 40, .ignore_eos = 1, .policy = "fp8"};
	struct octet_segment segment = {0};
	struct octet_event ev[64];
	struct answer plain, a, b;
	int request, n;

	(void)state;
	run(o, &(struct octet_sampling){.max_tokens = 40, .ignore_eos = 1, .logprobs = 1}, &plain);
	request = octet_submit(o, ids, N_IDS, &s);
	assert_true(request >= 0);
	memset(&a, 0, sizeof(a));
	while (!a.done) {
		n = octet_read(o, request, ev, 64, 1000);
		assert_true(n >= 0);
		for (int i = 0; i < n; i++)
			if (ev[i].kind == OCTET_SEGMENT)
				segment = (struct octet_segment){ev[i].position, ev[i].plan, ev[i].epoch};
		take(&a, ev, n);
	}
	assert_int_equal(a.finish, OCTET_LENGTH);
	assert_true(segment.plan != 0);
	s.policy = NULL, s.replay = &segment, s.n_replay = 1;
	run(o, &s, &b);
	assert_memory_equal(a.token, b.token, sizeof(a.token));

	segment.plan ^= 1;
	run(o, &s, &b);
	assert_int_equal(b.error, -ENOENT);
	assert_string_equal(b.message, "octetd knows no such policy or plan");
	s = (struct octet_sampling){.max_tokens = 4, .policy = "nonsense"};
	run(o, &s, &b);
	assert_int_equal(b.error, -ENOENT);
	octet_close(&o);
}

static void
refused(octet *o, const uint32_t *prompt, size_t n, struct octet_sampling s, int rc, const char *text)
{
	int got = octet_submit(o, prompt, n, &s);

	assert_int_equal(got, rc);
	assert_string_equal(octet_error(o), text);
}

static void
test_refusals(void **state)
{
	octet *o = open_or_fail();
	uint32_t *many = calloc(600, sizeof(*many)), bad[] = {5, 2048};
	struct octet_sampling odd[] = {{.max_tokens = 1, .temperature = NAN}, {.max_tokens = 1, .temperature = -1},
	    {.max_tokens = 1, .top_p = 2}, {.max_tokens = 1, .min_p = -1}, {.max_tokens = 1, .repetition_penalty = INFINITY},
	    {.max_tokens = 1, .presence_penalty = 1e9f}};
	struct octet_bias bias = {4000, 1};
	struct answer a;
	char why[256];
	octet *p;

	(void)state;
	refused(o, ids, 0, (struct octet_sampling){.max_tokens = 1}, -EINVAL, "the prompt is empty");
	refused(o, ids, 3, (struct octet_sampling){0}, -EINVAL, "max_tokens is 0");
	refused(o, many, 512, (struct octet_sampling){.max_tokens = 1}, -E2BIG,
	    "prompt of 512 tokens: the context holds 512 with at least one of output");
	refused(o, many, 513, (struct octet_sampling){.prompt_logprobs = 1}, -E2BIG,
	    "prompt of 513 tokens: the context holds 512");
	refused(o, bad, 2, (struct octet_sampling){.max_tokens = 1}, -EINVAL, "token id 2048: the model has 2048");
	refused(o, ids, 3, (struct octet_sampling){.max_tokens = 1, .top_logprobs = 21}, -EINVAL,
	    "top_logprobs is 21, 20 are allowed");
	refused(o, ids, 3, (struct octet_sampling){.max_tokens = 1, .policy = ""}, -EINVAL,
	    "the name of a policy has 1 to 63 bytes");
	refused(o, ids, 3, (struct octet_sampling){.max_tokens = 1, .reserved = {1}}, -EINVAL,
	    "reserved fields of struct octet_sampling are not zero");
	for (size_t i = 0; i < sizeof(odd) / sizeof(*odd); i++) {
		run(o, &odd[i], &a);
		assert_int_equal(a.error, -EINVAL);
		assert_string_equal(a.message, "a token id or a sampling value is out of range");
	}
	run(o, &(struct octet_sampling){.max_tokens = 1, .bias = &bias, .n_bias = 1}, &a);
	assert_int_equal(a.error, -EINVAL);
	assert_int_equal(octet_cancel(o, 7), -ENOENT);
	assert_int_equal(octet_read(o, -1, &(struct octet_event){0}, 1, 0), -ENOENT);
	run(o, &(struct octet_sampling){.max_tokens = 4}, &a); /* and none of it did harm */
	assert_int_equal(a.n, 4);
	octet_close(&o);

	assert_true(octet_open(&p, "/nowhere/octet.sock", why, sizeof(why)) < 0);
	assert_null(p);
	assert_string_equal(why, "cannot connect to /nowhere/octet.sock: No such file or directory: is octetd running?");
	free(many);
}

static void
test_poll_and_cancel(void **state)
{
	octet *o = open_or_fail();
	struct octet_sampling s = {.max_tokens = 400, .ignore_eos = 1};
	struct answer a[4] = {{.n = 0}};
	struct octet_event ev[8];
	int request[4], running = 4, cancelled = 0;
	int64_t end = now_ms() + DEADLINE_MS;

	(void)state;
	for (int i = 0; i < 4; i++)
		assert_true((request[i] = octet_submit(o, ids, N_IDS, &s)) >= 0);
	while (running > 0) {
		struct pollfd p = {octet_fd(o), POLLIN, 0};

		assert_true(now_ms() < end);
		if (octet_arm(o) == 0)
			assert_true(poll(&p, 1, 10000) >= 0);
		for (int i = 0; i < 4; i++) {
			int n = a[i].done ? 0 : octet_read(o, request[i], ev, 8, 0);

			assert_true(n >= 0);
			take(&a[i], ev, n);
			running -= n > 0 && a[i].done;
			if (i == 2 && a[i].n > 20 && cancelled++ == 0)
				assert_int_equal(octet_cancel(o, request[i]), 0);
		}
	}
	assert_int_equal(a[2].finish, OCTET_CANCELLED);
	assert_true(a[2].n < 400);
	for (int i = 0; i < 4; i++) {
		if (i == 2)
			continue;
		assert_int_equal(a[i].finish, OCTET_LENGTH);
		assert_int_equal(a[i].n, 400);
		assert_memory_equal(a[i].token, a[0].token, 400 * sizeof(uint32_t));
	}
	assert_int_equal(octet_wait(o, 0), 0);
	octet_close(&o);
}

static void
test_too_many_requests(void **state)
{
	octet *o = open_or_fail();
	struct octet_sampling s = {.max_tokens = 20, .ignore_eos = 1};
	uint32_t max = octet_info(o)->max_requests;
	int request[64];
	struct answer a;

	(void)state;
	for (uint32_t i = 0; i < max; i++)
		assert_true((request[i] = octet_submit(o, ids, N_IDS, &s)) >= 0);
	assert_int_equal(octet_submit(o, ids, N_IDS, &s), -EBUSY);
	for (uint32_t i = 0; i < max; i++) {
		read_all(o, request[i], &a);
		assert_int_equal(a.n, 20);
	}
	octet_close(&o);
}

static void
test_text(void **state)
{
	octet *o = open_or_fail();
	const char *stops[] = {"zebra"};
	char bytes[512], back[1024];
	uint32_t tokens[600], *some;
	octet_text *t;
	int64_t n;
	bool met = false;

	(void)state;
	for (int i = 0; i < 512; i++)
		bytes[i] = (char)(i * 7);
	n = octet_tokenize(o, bytes, 512, 0, tokens, 600);
	assert_true(n > 0 && n <= 600);
	assert_int_equal(octet_tokenize(o, bytes, 512, 0, NULL, 0), n);
	assert_int_equal(octet_detokenize(o, tokens, (size_t)n, 0, back, sizeof(back)), 512);
	assert_memory_equal(bytes, back, 512);
	assert_int_equal(octet_detokenize(o, tokens, (size_t)n, 0, back, 5), 512); /* what it would take */

	n = octet_tokenize(o, "one zebra two", 13, 0, tokens, 600);
	assert_true(n > 0);
	some = tokens;
	assert_int_equal(octet_text_new(&t, o, 0, stops, 1), 0);
	back[0] = '\0';
	while (n-- > 0 && !met) {
		const char *s;
		size_t len;

		met = octet_text_push(t, *some++, &s, &len) == 1;
		strncat(back, s, len);
	}
	assert_true(met);
	assert_string_equal(back, "one ");
	octet_text_free(&t);
	assert_int_equal(octet_text_new(&t, o, 0, (const char *[]){""}, 1), -EINVAL);
	octet_close(&o);
}

/* Two threads, a handle each. */
static void *
thread_main(void *arg)
{
	octet *o = open_or_fail();

	for (int i = 0; i < 5; i++)
		run(o, &(struct octet_sampling){.max_tokens = 40, .ignore_eos = 1}, arg);
	octet_close(&o);
	return NULL;
}

static void
test_threads(void **state)
{
	static struct answer a[2];
	pthread_t t[2];

	(void)state;
	for (int i = 0; i < 2; i++)
		assert_int_equal(pthread_create(&t[i], NULL, thread_main, &a[i]), 0);
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	assert_memory_equal(a[0].token, a[1].token, sizeof(a[0].token));
}

/* The daemon dies under a stream: an error, and another open works once it is back. */
static void
test_daemon_dies(void **state)
{
	octet *o = open_or_fail();
	struct octet_event ev[8];
	struct answer a;
	int request, n;
	int64_t end = now_ms() + DEADLINE_MS;

	(void)state;
	request = octet_submit(o, ids, N_IDS, &(struct octet_sampling){.max_tokens = 490, .ignore_eos = 1});
	assert_true(request >= 0);
	assert_true(octet_read(o, request, ev, 1, 10000) > 0);
	stop_daemon(SIGKILL, false);
	while ((n = octet_read(o, request, ev, 8, 1000)) >= 0)
		assert_true(now_ms() < end);
	assert_int_equal(n, -EPIPE);
	assert_string_equal(octet_error(o), "octetd is gone: the connection is closed");
	assert_int_equal(octet_submit(o, ids, N_IDS, &(struct octet_sampling){.max_tokens = 1}), -EPIPE);
	octet_close(&o);
	start_daemon();
	o = open_or_fail();
	run(o, &(struct octet_sampling){.max_tokens = 4}, &a);
	assert_int_equal(a.n, 4);
	octet_close(&o);
}

/* ---- clients that lie ---- */

static uint64_t rng = 88172645463325252u;

static uint32_t
rnd(void)
{
	rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
	return (uint32_t)(rng >> 32);
}

struct raw {
	int fd, memfd;
	char *map;
	size_t bytes;
	struct wire_session *shm;
};

static int
dial(void)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	memcpy(sa.sun_path, sock, sizeof(sock));
	assert_true(fd >= 0);
	while (connect(fd, (struct sockaddr *)&sa, sizeof(sa)) != 0)
		assert_true(errno == EAGAIN || errno == EINTR);
	return fd;
}

/* A whole handshake; false when the daemon has no room now. */
static bool
raw_open(struct raw *r)
{
	struct wire_hello hello = {.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = WIRE_HELLO, .pid = 1};
	union { struct wire_welcome w; struct wire_refused r; char b[512]; } in;
	union { struct cmsghdr h; char b[CMSG_SPACE(2 * sizeof(int))]; } control;
	struct iovec iov = {&in, sizeof(in)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	int fds[2] = {-1, -1};
	ssize_t n;

	memset(r, 0, sizeof(*r));
	r->fd = dial();
	if (send(r->fd, &hello, sizeof(hello), MSG_NOSIGNAL) != (ssize_t)sizeof(hello) ||
	    (n = recvmsg(r->fd, &msg, MSG_CMSG_CLOEXEC)) < (ssize_t)sizeof(in.w) || in.w.type != WIRE_WELCOME) {
		close(r->fd);
		return false;
	}
	memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fds));
	close(fds[1]);
	r->memfd = fds[0];
	r->bytes = in.w.session_bytes;
	r->map = mmap(NULL, r->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, r->memfd, 0);
	assert_true(r->map != MAP_FAILED);
	r->shm = (struct wire_session *)(void *)r->map;
	return true;
}

static void
raw_close(struct raw *r)
{
	munmap(r->map, r->bytes);
	close(r->memfd);
	close(r->fd);
}

static void
bell(struct raw *r)
{
	(void)send(r->fd, "!", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static uint32_t
some_word(void)
{
	static const uint32_t edges[] = {0, 1, 2, 63, 64, 255, 256, 257, 2047, 2048, 0x7fffffff, 0x80000000, 0xffffffff, 0x7fc00000,
	    0x7f800000, 0x3f800000};

	return rnd() % 3 == 0 ? rnd() : rnd() % 2 ? edges[rnd() % (sizeof(edges) / sizeof(*edges))] : rnd() % 40;
}

/* A descriptor that is right but for a few words. */
static void
some_desc(struct wire_desc *d, uint32_t wrong)
{
	uint32_t *word = (uint32_t *)(void *)d;

	*d = (struct wire_desc){.op = WIRE_SUBMIT, .slot = rnd() % WIRE_SLOTS, .serial = rnd(), .prompt_tokens = 1 + rnd() % 20,
	    .max_tokens = 1 + rnd() % 8, .top_p = 1, .repetition_penalty = 1};
	if (wrong == 0)
		return;
	while (wrong-- > 0)
		word[rnd() % (sizeof(*d) / 4)] = some_word();
	/* It must not be right by chance: a request that runs is load, not a lie. */
	switch (rnd() % 6) {
	case 0: d->flags |= 1u << 31; break;
	case 1: d->temperature = -1; break;
	case 2: d->top_p = NAN; break;
	case 3: d->reserved[rnd() % 12] = 1 + rnd() % 100; break;
	case 4: d->prompt_tokens = 600 + rnd() % 100000; break;
	default: d->repetition_penalty = INFINITY;
	}
}

/* One lie. Returns false when the session is of no use any more. */
static bool
lie(struct raw *r)
{
	uint32_t tail = r->shm->sq_tail;

	switch (rnd() % 10) {
	case 0: case 1: case 2: case 3: case 4:
		some_desc(&r->shm->sq[tail % WIRE_SQ], 1 + rnd() % 4);
		__atomic_store_n(&r->shm->sq_tail, tail + 1, __ATOMIC_RELEASE);
		bell(r);
		return true;
	case 5: /* words anywhere */
		for (uint32_t i = rnd() % 16; i > 0; i--)
			((uint32_t *)(void *)r->map)[rnd() % (r->bytes / 4)] = some_word();
		bell(r);
		return true;
	case 6:
		return fallocate(r->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(rnd() % (r->bytes / 4096) * 4096),
		    4096 * (1 + rnd() % 8)) == 0 || errno != EBADF;
	case 7:
		for (uint32_t i = rnd() % 200; i > 0; i--)
			bell(r);
		return true;
	case 8: { /* what is no bell */
		char junk[600];

		memset(junk, (int)rnd(), sizeof(junk));
		(void)send(r->fd, junk, rnd() % sizeof(junk), MSG_DONTWAIT | MSG_NOSIGNAL);
		return true;
	}
	default:
		if (rnd() % 4 != 0) {
			__atomic_store_n(&r->shm->sq_tail, rnd() % 2 ? rnd() : tail + rnd() % 300, __ATOMIC_RELEASE);
			bell(r);
			return true;
		}
		shutdown(r->fd, rnd() % 2 ? SHUT_RD : SHUT_RDWR);
		return false;
	}
}

static void
bad_handshake(void)
{
	char junk[600];
	size_t n = rnd() % sizeof(junk);
	struct wire_hello hello = {.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = WIRE_HELLO};
	int fd = dial();

	memset(junk, 0, sizeof(junk));
	memcpy(junk, &hello, sizeof(hello));
	for (uint32_t i = rnd() % 8; i > 0; i--)
		junk[rnd() % 96] = (char)rnd();
	if (rnd() % 3)
		(void)send(fd, junk, rnd() % 2 ? sizeof(hello) : n, MSG_NOSIGNAL | MSG_DONTWAIT);
	close(fd);
}

struct honest {
	struct answer want;
	bool stop;             /* atomic */
	uint32_t streams;
	double gap[1 << 16];   /* ms between tokens */
	uint32_t n_gaps;
};

/* Streams the same request again and again, and times each token. */
static void
stream(struct honest *h)
{
	octet *o = open_or_fail();
	struct octet_sampling s = {.max_tokens = 100, .ignore_eos = 1};

	do {
		int request = octet_submit(o, ids, N_IDS, &s), n;
		struct answer a = {.n = 0};
		struct timespec ts, last = {0, 0};
		struct octet_event ev[16];

		assert_true(request >= 0);
		while (!a.done) {
			n = octet_read(o, request, ev, 16, 60000);
			assert_true(n > 0);
			take(&a, ev, n);
			clock_gettime(CLOCK_MONOTONIC, &ts);
			if (last.tv_sec != 0)
				h->gap[h->n_gaps++ % (1 << 16)] = (double)(ts.tv_sec - last.tv_sec) * 1e3 +
				    (double)(ts.tv_nsec - last.tv_nsec) / 1e6;
			last = ts;
		}
		assert_int_equal(a.finish, OCTET_LENGTH);
		assert_memory_equal(a.token, h->want.token, sizeof(a.token));
		h->streams++;
	} while (!__atomic_load_n(&h->stop, __ATOMIC_ACQUIRE));
	octet_close(&o);
}

static int
by_value(const void *pa, const void *pb)
{
	double a = *(const double *)pa, b = *(const double *)pb;

	return a < b ? -1 : a > b;
}

static double
p99(struct honest *h)
{
	uint32_t n = h->n_gaps < (1 << 16) ? h->n_gaps : 1 << 16;

	qsort(h->gap, n, sizeof(*h->gap), by_value);
	return n == 0 ? 0 : h->gap[n * 99 / 100];
}

/* Sessions that tell n lies in all; polite ones send the same number of requests
 * that are in order, for what a busy but honest neighbour costs; none: a second of rest. */
static uint32_t
tell(uint32_t n, bool polite)
{
	int64_t end = now_ms() + 1000;
	uint32_t sessions = 0;

	while (n == 0 && now_ms() < end)
		usleep(1000);
	for (uint32_t told = 0; told < n;) {
		struct raw r;

		if (!polite && rnd() % 4 == 0) {
			bad_handshake();
			told++;
			continue;
		}
		if (!raw_open(&r)) {
			usleep(1000);
			continue;
		}
		sessions++;
		for (uint32_t i = 1 + rnd() % 60; i > 0; i--, told++) {
			uint32_t tail = r.shm->sq_tail;

			if (!polite) {
				if (!lie(&r))
					break;
				continue;
			}
			some_desc(&r.shm->sq[tail % WIRE_SQ], 0);
			__atomic_store_n(&r.shm->sq_tail, tail + 1, __ATOMIC_RELEASE);
			bell(&r);
		}
		raw_close(&r);
	}
	return sessions;
}

struct neighbours {
	struct honest *h;
	uint32_t n, sessions;
	bool polite;
};

static void *
neighbours_main(void *arg)
{
	struct neighbours *b = arg;

	setpriority(PRIO_PROCESS, 0, 19); /* this thread: its own hunger for a core is not what is measured */
	b->sessions = tell(b->n, b->polite);
	__atomic_store_n(&b->h->stop, true, __ATOMIC_RELEASE);
	return NULL;
}

/* p99 of the honest client's tokens beside such neighbours. */
static double
beside(struct honest *h, uint32_t n, bool polite, uint32_t *sessions)
{
	struct neighbours b = {h, n, 0, polite};
	pthread_t t;

	h->stop = false, h->n_gaps = 0, h->streams = 0;
	assert_int_equal(pthread_create(&t, NULL, neighbours_main, &b), 0);
	stream(h);
	pthread_join(t, NULL);
	*sessions = b.sessions;
	assert_int_equal(waitpid(daemon_pid, NULL, WNOHANG), 0);
	return p99(h);
}

static void
test_hostile(void **state)
{
	static struct honest h;
	const char *is_long = getenv("OCTET_LONG");
	uint32_t lies = is_long != NULL && *is_long ? 100000 : 2000, sessions, none;
	double idle, polite, hostile;
	octet *o = open_or_fail();

	(void)state;
	run(o, &(struct octet_sampling){.max_tokens = 100, .ignore_eos = 1}, &h.want);
	octet_close(&o);
	idle = beside(&h, 0, true, &none);
	polite = beside(&h, lies / 20, true, &none);
	hostile = beside(&h, lies, false, &sessions);
	print_message("%u lies in %u sessions; %u honest streams, all right; p99 between tokens: alone %.2f ms, beside lies "
	    "%.2f, beside busy honest clients %.2f\n", lies, sessions, h.streams, idle, hostile, polite);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_complete),
		cmocka_unit_test(test_sampling),
		cmocka_unit_test(test_score),
		cmocka_unit_test(test_policy_and_replay),
		cmocka_unit_test(test_refusals),
		cmocka_unit_test(test_poll_and_cancel),
		cmocka_unit_test(test_too_many_requests),
		cmocka_unit_test(test_text),
		cmocka_unit_test(test_threads),
		cmocka_unit_test(test_daemon_dies),
		cmocka_unit_test(test_hostile),
	};

	signal(SIGPIPE, SIG_IGN);
	return cmocka_run_group_tests_name("session", tests, setup, teardown);
}
