/* SPDX-License-Identifier: Apache-2.0 */
/*
 * liboctet. The daemon's words are read once and checked, as it does with
 * ours: a broken daemon gives errors, never a crash in the app.
 */
#include "client/octet.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "client/tok.h"
#include "client/wire.h"

#define HANDSHAKE_MS 5000
#define SPIN_NS 50000
#define LOOK_NS 1000000 /* who only polls looks at the socket so often: octetd may be gone */
#define MAX_MAP (1ull << 32)

struct slot {
	bool used;
	uint32_t serial, head;
};

struct octet {
	int fd;
	struct octet_info info;
	struct wire_session *shm;
	size_t shm_bytes;
	void *blob;
	size_t blob_bytes;
	struct tok *tok;
	struct wire_slot *slots;  /* in shm */
	uint32_t *prompt;         /* in shm */
	uint32_t prompt_ring, prompt_head, prompt_tail, sq_head, sq_tail;
	uint32_t desc_end[WIRE_SQ]; /* prompt_tail after each descriptor in flight */
	struct slot slot[WIRE_SLOTS];
	uint32_t n_used, serial;
	bool armed;               /* app_sleeps is set */
	bool rung;                /* and was since the socket was last read: bells may be there */
	int64_t looked;           /* at the socket, ns */
	bool dead;
	char error[256];
};

static int
fail(octet *o, int rc, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(o->error, sizeof(o->error), fmt, ap);
	va_end(ap);
	return rc;
}

const char *
octet_error(const octet *o)
{
	return o->error;
}

const struct octet_info *
octet_info(const octet *o)
{
	return &o->info;
}

int
octet_fd(const octet *o)
{
	return o->fd;
}

/* ---- opening ---- */

static int64_t
now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static void
default_path(char *buf, size_t len)
{
	const char *set = getenv("OCTET_SOCKET"), *run = getenv("XDG_RUNTIME_DIR");

	if (set != NULL && *set != '\0')
		snprintf(buf, len, "%s", set);
	else if (run != NULL && *run != '\0')
		snprintf(buf, len, "%s/octet/octet.sock", run);
	else
		snprintf(buf, len, "/run/octet/octet.sock");
}

/* A daemon that hangs accepts nobody, and connect() waits for a place in its
 * queue: for as long as may be sent. */
static int
connect_until(int fd, const struct sockaddr_un *sa, int64_t end)
{
	for (;;) {
		int64_t left = end - now_ns();
		struct timeval tv = {.tv_sec = left / 1000000000, .tv_usec = left % 1000000000 / 1000};

		if (left < 1000) /* 0 would mean without end */
			return -ETIMEDOUT;
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv));
		if (connect(fd, (const struct sockaddr *)sa, sizeof(*sa)) == 0)
			return 0;
		if (errno != EINTR && errno != EAGAIN)
			return -errno;
	}
}

static int
no_answer(octet *o)
{
	return fail(o, -ETIMEDOUT, "octetd did not answer in %d ms", HANDSHAKE_MS);
}

static int
connect_to(octet *o, const char *path, int64_t end)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	int rc;

	if (strlen(path) >= sizeof(sa.sun_path))
		return fail(o, -ENAMETOOLONG, "%s: longer than the %zu bytes of a socket path", path, sizeof(sa.sun_path) - 1);
	strcpy(sa.sun_path, path);
	o->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (o->fd < 0)
		return fail(o, -errno, "socket: %s", strerror(errno));
	rc = connect_until(o->fd, &sa, end);
	if (rc == -ETIMEDOUT)
		return no_answer(o);
	return rc == 0 ? 0 : fail(o, rc, "cannot connect to %s: %s%s", path, strerror(-rc),
	    rc == -ENOENT || rc == -ECONNREFUSED ? ": is octetd running?" : "");
}

static void
say_hello(octet *o)
{
	struct wire_hello h = {.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = WIRE_HELLO, .pid = (uint32_t)getpid()};

	snprintf(h.program, sizeof(h.program), "%s", program_invocation_short_name);
	/* A daemon that refuses at once has closed by now; its reason is in the queue. */
	send(o->fd, &h, sizeof(h), MSG_NOSIGNAL);
}

static void
close_fds(const int *fds, int n)
{
	for (int i = 0; i < n; i++)
		close(fds[i]);
}

static bool
wait_answer(int fd, int64_t end)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};
	int rc = -1;

	errno = EINTR;
	while (rc < 0 && errno == EINTR) {
		int64_t left = end - now_ns();

		rc = poll(&p, 1, left > 0 ? (int)((left + 999999) / 1000000) : 0);
	}
	return rc > 0;
}

/* The answer to hello: the descriptors of the session and the tokenizer. */
static int
receive_welcome(octet *o, struct wire_welcome *w, int fds[2], int64_t end)
{
	union {
		struct wire_welcome welcome;
		struct wire_refused refused;
	} msg = {0};
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))];
	struct iovec iov = {&msg, sizeof(msg)};
	struct msghdr hdr = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	struct cmsghdr *c;
	int n_fds = 0;
	ssize_t n;

	if (!wait_answer(o->fd, end))
		return no_answer(o);
	n = recvmsg(o->fd, &hdr, MSG_CMSG_CLOEXEC);
	if (n <= 0)
		return fail(o, -EPIPE, "octetd closed the connection");
	c = CMSG_FIRSTHDR(&hdr);
	if (c != NULL && c->cmsg_type == SCM_RIGHTS && c->cmsg_len <= CMSG_LEN(2 * sizeof(int))) {
		n_fds = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(c), (size_t)n_fds * sizeof(int));
	}
	if ((size_t)n >= sizeof(msg.refused) && msg.refused.magic == WIRE_MAGIC && msg.refused.type == WIRE_REFUSED) {
		close_fds(fds, n_fds);
		msg.refused.text[sizeof(msg.refused.text) - 1] = '\0';
		return fail(o, msg.refused.code < 0 ? msg.refused.code : -EACCES, "%.240s", msg.refused.text);
	}
	if ((size_t)n < sizeof(msg.welcome) || msg.welcome.magic != WIRE_MAGIC || msg.welcome.version != WIRE_VERSION ||
	    msg.welcome.type != WIRE_WELCOME || n_fds != 2) {
		close_fds(fds, n_fds);
		return fail(o, -EPROTO, "octetd speaks another version");
	}
	*w = msg.welcome;
	return 0;
}

static void *
map_fd(int fd, uint64_t bytes, int prot)
{
	struct stat st;
	void *p;

	if (bytes == 0 || bytes > MAX_MAP || fstat(fd, &st) != 0 || (uint64_t)st.st_size < bytes)
		return NULL;
	p = mmap(NULL, bytes, prot, MAP_SHARED, fd, 0);
	return p == MAP_FAILED ? NULL : p;
}

/* Where things lie in the session's memory, checked against its size. */
static int
check_layout(octet *o)
{
	uint64_t slots = o->shm->slots_at, prompt = o->shm->prompt_at, ring = o->shm->prompt_ring;

	if (o->shm->magic != WIRE_MAGIC || slots % 64 != 0 || prompt % 64 != 0 || ring == 0 || (ring & (ring - 1)) != 0 ||
	    slots + WIRE_SLOTS * sizeof(struct wire_slot) > o->shm_bytes || prompt + ring * 4 > o->shm_bytes)
		return fail(o, -EPROTO, "octetd gave a session of another layout");
	o->slots = (struct wire_slot *)(void *)((char *)o->shm + slots);
	o->prompt = (uint32_t *)(void *)((char *)o->shm + prompt);
	o->prompt_ring = (uint32_t)ring;
	return 0;
}

static int
handshake(octet *o, int64_t end)
{
	struct wire_welcome w = {0};
	struct err err;
	int fds[2], rc;

	say_hello(o);
	rc = receive_welcome(o, &w, fds, end);
	if (rc != 0)
		return rc;
	w.model[sizeof(w.model) - 1] = '\0';
	memcpy(o->info.model, w.model, sizeof(o->info.model));
	o->info.vocab = w.vocab;
	o->info.max_context = w.max_context;
	o->info.max_requests = w.max_requests < WIRE_SLOTS ? w.max_requests : WIRE_SLOTS;
	o->info.client_id = w.client_id;
	o->shm = map_fd(fds[0], w.session_bytes, PROT_READ | PROT_WRITE);
	o->shm_bytes = w.session_bytes;
	o->blob = map_fd(fds[1], w.tokenizer_bytes, PROT_READ);
	o->blob_bytes = w.tokenizer_bytes;
	close_fds(fds, 2);
	if (o->shm == NULL || o->blob == NULL || o->shm_bytes < sizeof(*o->shm))
		return fail(o, -EPROTO, "octetd gave a session that cannot be mapped");
	if ((rc = check_layout(o)) != 0)
		return rc;
	if ((rc = tok_open(&o->tok, o->blob, o->blob_bytes, &err)) != 0)
		return fail(o, rc, "tokenizer: %.200s", err.text);
	return 0;
}

int
octet_open(octet **out, const char *path, char *why, size_t why_len)
{
	int64_t end = now_ns() + HANDSHAKE_MS * 1000000ll;
	octet *o = NULL;
	char def[256];
	int rc;

	if (out == NULL) {
		if (why != NULL)
			snprintf(why, why_len, "octet_open: out is NULL");
		return -EINVAL;
	}
	*out = NULL;
	o = calloc(1, sizeof(*o));
	if (o == NULL) {
		if (why != NULL)
			snprintf(why, why_len, "out of memory");
		return -ENOMEM;
	}
	o->fd = -1;
	if (path == NULL) {
		default_path(def, sizeof(def));
		path = def;
	}
	rc = connect_to(o, path, end);
	if (rc == 0)
		rc = handshake(o, end);
	if (rc != 0) {
		if (why != NULL)
			snprintf(why, why_len, "%s", o->error);
		octet_close(&o);
		return rc;
	}
	*out = o;
	return 0;
}

void
octet_close(octet **op)
{
	octet *o = op != NULL ? *op : NULL;

	if (o == NULL)
		return;
	if (o->fd >= 0)
		close(o->fd);
	tok_free(&o->tok);
	if (o->shm != NULL)
		munmap(o->shm, o->shm_bytes);
	if (o->blob != NULL)
		munmap(o->blob, o->blob_bytes);
	free(o);
	*op = NULL;
}

/* ---- bells ---- */

static void
ring(octet *o)
{
	char bell = WIRE_BELL;

	/* EAGAIN: it is ringing already. */
	if (send(o->fd, &bell, 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno != EAGAIN && errno != EINTR)
		o->dead = true;
}

static void
ring_if_asleep(octet *o)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&o->shm->daemon_sleeps, __ATOMIC_RELAXED))
		ring(o);
}

/* Takes bells off the socket; sees the daemon's end. */
static void
take_bells(octet *o)
{
	char buf[8];
	ssize_t n;

	o->rung = false;
	while ((n = recv(o->fd, buf, sizeof(buf), MSG_DONTWAIT)) > 0)
		;
	if (n == 0 || (errno != EAGAIN && errno != EINTR))
		o->dead = true;
}

static void
arm(octet *o)
{
	if (o->rung)
		take_bells(o);
	o->armed = o->rung = true;
	__atomic_store_n(&o->shm->app_sleeps, 1, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Awake: whoever reads needs no bell, and octetd sends none. */
static void
disarm(octet *o)
{
	if (!o->armed)
		return;
	o->armed = false;
	__atomic_store_n(&o->shm->app_sleeps, 0, __ATOMIC_RELAXED);
}

/* ---- requests ---- */

/* Is there room for n tokens in the prompt ring? What consumed descriptors
 * pointed at is free again. */
static bool
prompt_room(octet *o, size_t n)
{
	uint32_t head = __atomic_load_n(&o->shm->sq_head, __ATOMIC_ACQUIRE);

	if (head != o->sq_head && head - o->sq_head <= o->sq_tail - o->sq_head) {
		o->prompt_head = o->desc_end[(head - 1) % WIRE_SQ];
		o->sq_head = head;
	}
	return n <= o->prompt_ring - (o->prompt_tail - o->prompt_head);
}

static void
publish(octet *o, const struct wire_desc *d)
{
	o->shm->sq[o->sq_tail % WIRE_SQ] = *d;
	o->desc_end[o->sq_tail % WIRE_SQ] = o->prompt_tail;
	o->sq_tail++;
	__atomic_store_n(&o->shm->sq_tail, o->sq_tail, __ATOMIC_RELEASE);
	ring_if_asleep(o);
}

static bool
queue_full(const octet *o)
{
	return o->sq_tail - __atomic_load_n(&o->shm->sq_head, __ATOMIC_ACQUIRE) >= WIRE_SQ;
}

static void
put_word(octet *o, uint32_t w)
{
	o->prompt[o->prompt_tail++ & (o->prompt_ring - 1)] = w;
}

static void
put_u64(octet *o, uint64_t v)
{
	put_word(o, (uint32_t)v);
	put_word(o, (uint32_t)(v >> 32));
}

/* Prompt, biases, segments and policy, in the order of struct wire_desc. */
static void
put_payload(octet *o, const uint32_t *ids, size_t n, const struct octet_sampling *s, size_t policy_bytes)
{
	for (size_t i = 0; i < n; i++)
		put_word(o, ids[i]);
	for (size_t i = 0; i < s->n_bias; i++) {
		uint32_t bits;

		memcpy(&bits, &s->bias[i].value, sizeof(bits));
		put_word(o, s->bias[i].id);
		put_word(o, bits);
	}
	for (size_t i = 0; i < s->n_replay; i++) {
		put_word(o, s->replay[i].first);
		put_u64(o, s->replay[i].plan);
		put_u64(o, s->replay[i].epoch);
	}
	for (size_t i = 0; i < policy_bytes; i += 4) {
		uint32_t word = 0;

		memcpy(&word, s->policy + i, policy_bytes - i < 4 ? policy_bytes - i : 4);
		put_word(o, word);
	}
}

/* What the daemon would refuse with a bare -EINVAL. */
static int
check_submit(octet *o, const uint32_t *ids, size_t n, const struct octet_sampling *s)
{
	bool score = s->max_tokens == 0;

	if (n == 0)
		return fail(o, -EINVAL, "the prompt is empty");
	if (score && !s->prompt_logprobs)
		return fail(o, -EINVAL, "max_tokens is 0");
	if (n > o->info.max_context - !score)
		return fail(o, -E2BIG, "prompt of %zu tokens: the context holds %u%s", n, o->info.max_context,
		    score ? "" : " with at least one of output");
	for (size_t i = 0; i < n; i++)
		if (ids[i] >= o->info.vocab)
			return fail(o, -EINVAL, "token id %u: the model has %u", ids[i], o->info.vocab);
	if (s->n_bias > WIRE_MAX_BIAS)
		return fail(o, -EINVAL, "%zu logit biases, %u are allowed", s->n_bias, WIRE_MAX_BIAS);
	if (s->n_replay > WIRE_MAX_SEGMENTS)
		return fail(o, -EINVAL, "%zu segments, %u are allowed", s->n_replay, WIRE_MAX_SEGMENTS);
	if (s->top_logprobs < 0 || s->top_logprobs > (int)WIRE_MAX_TOP)
		return fail(o, -EINVAL, "top_logprobs is %d, %u are allowed", s->top_logprobs, WIRE_MAX_TOP);
	if (s->policy != NULL && (*s->policy == '\0' || strlen(s->policy) > WIRE_MAX_POLICY))
		return fail(o, -EINVAL, "the name of a policy has 1 to %u bytes", WIRE_MAX_POLICY);
	if (s->policy != NULL && s->n_replay > 0)
		return fail(o, -EINVAL, "a replay cannot have a policy too");
	for (size_t i = 0; i < sizeof(s->reserved) / sizeof(*s->reserved); i++)
		if (s->reserved[i] != 0)
			return fail(o, -EINVAL, "reserved fields of struct octet_sampling are not zero");
	return 0;
}

int
octet_submit(octet *o, const uint32_t *ids, size_t n, const struct octet_sampling *s)
{
	size_t policy_bytes = s != NULL && s->policy != NULL ? strlen(s->policy) : 0;
	struct wire_desc d = {.op = WIRE_SUBMIT};
	uint32_t slot = 0;
	int rc;

	if (o->dead)
		return fail(o, -EPIPE, "octetd is gone");
	if (s == NULL || (ids == NULL && n > 0))
		return fail(o, -EINVAL, "octet_submit: ids or sampling is NULL");
	if ((rc = check_submit(o, ids, n, s)) != 0)
		return rc;
	if (o->n_used >= o->info.max_requests || queue_full(o) ||
	    !prompt_room(o, n + 2 * s->n_bias + 5 * s->n_replay + (policy_bytes + 3) / 4))
		return fail(o, -EBUSY, "busy: %u requests are in flight on this connection", o->n_used);
	while (o->slot[slot].used)
		slot++;
	d.slot = slot;
	d.serial = ++o->serial;
	d.flags = (s->ignore_eos ? WIRE_IGNORE_EOS : 0u) | (s->logprobs || s->top_logprobs > 0 ? WIRE_LOGPROBS : 0u) |
	    (s->prompt_logprobs ? WIRE_PROMPT_LOGPROBS : 0u);
	d.prompt_at = o->prompt_tail;
	d.prompt_tokens = (uint32_t)n;
	d.max_tokens = s->max_tokens;
	d.top_k = s->top_k;
	d.seed = s->seed;
	d.temperature = s->temperature;
	d.top_p = s->top_p == 0 ? 1 : s->top_p;
	d.min_p = s->min_p;
	d.repetition_penalty = s->repetition_penalty == 0 ? 1 : s->repetition_penalty;
	d.presence_penalty = s->presence_penalty;
	d.frequency_penalty = s->frequency_penalty;
	d.top_logprobs = (uint32_t)s->top_logprobs;
	d.n_bias = (uint32_t)s->n_bias;
	d.n_segments = (uint32_t)s->n_replay;
	d.policy_bytes = (uint32_t)policy_bytes;
	put_payload(o, ids, n, s, policy_bytes);
	o->slot[slot] = (struct slot){.used = true, .serial = d.serial, .head = o->slot[slot].head};
	o->n_used++;
	publish(o, &d);
	return (int)slot;
}

static int
check_request(octet *o, int request)
{
	if (request < 0 || request >= (int)WIRE_SLOTS || !o->slot[request].used)
		return fail(o, -ENOENT, "there is no request %d", request);
	return 0;
}

int
octet_cancel(octet *o, int request)
{
	int rc = check_request(o, request);

	if (rc != 0)
		return rc;
	if (o->dead)
		return fail(o, -EPIPE, "octetd is gone");
	if (queue_full(o))
		return fail(o, -EBUSY, "busy: the submission ring is full");
	publish(o, &(struct wire_desc){.op = WIRE_CANCEL, .slot = (uint32_t)request, .serial = o->slot[request].serial});
	return 0;
}

static void
explain(const octet *o, uint64_t detail, struct octet_event *ev)
{
	static const char *const group[] = {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
	    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "lm_head", "kv_cache"};
	uint32_t code = (uint32_t)detail, site = (uint32_t)(detail >> 32), g = site >> 16;

	ev->error = code > 0 && code < 4096 ? -(int)code : -EIO;
	switch (-ev->error) {
	case EDOM:
		if (g >= 1 && g <= sizeof(group) / sizeof(*group))
			snprintf(ev->message, sizeof(ev->message), "the model's values are not finite, first at %s@%u",
			    group[g - 1], site & 0xffff);
		else
			snprintf(ev->message, sizeof(ev->message), "the model's values are not finite");
		break;
	case EBUSY:
		snprintf(ev->message, sizeof(ev->message), "busy: too many requests are queued");
		break;
	case EDQUOT:
		snprintf(ev->message, sizeof(ev->message),
		    "busy: too many requests of this user are in flight (max_requests_per_uid)");
		break;
	case E2BIG:
		snprintf(ev->message, sizeof(ev->message), "too long: prompt and output do not fit the context of %u tokens or the "
		    "KV cache", o->info.max_context);
		break;
	case ESHUTDOWN:
		snprintf(ev->message, sizeof(ev->message), "octetd takes no new requests: it is drained or stopping");
		break;
	case EACCES:
		snprintf(ev->message, sizeof(ev->message), "this client may not choose a policy");
		break;
	case ENOENT:
		snprintf(ev->message, sizeof(ev->message), "octetd knows no such policy or plan");
		break;
	case ENOSPC:
		snprintf(ev->message, sizeof(ev->message), "the KV cache is full");
		break;
	case EINVAL:
		snprintf(ev->message, sizeof(ev->message), "a token id or a sampling value is out of range");
		break;
	default:
		snprintf(ev->message, sizeof(ev->message), "%s", strerror(-ev->error));
	}
}

/* One event of the ring in the app's words; false for one that is not ours. */
static bool
translate(octet *o, struct slot *s, const struct wire_event *w, struct octet_event *ev)
{
	if (w->serial != s->serial)
		return false;
	*ev = (struct octet_event){.position = w->position};
	switch (w->kind) {
	case WIRE_EV_SEGMENT:
		ev->kind = OCTET_SEGMENT;
		ev->plan = w->a;
		ev->epoch = w->epoch;
		return true;
	case WIRE_EV_TOKEN:
		ev->kind = OCTET_TOKEN;
		ev->token = w->token < o->info.vocab ? w->token : 0;
		ev->logprob = w->logprob;
		return true;
	case WIRE_EV_PROMPT:
	case WIRE_EV_TOP:
		ev->kind = w->kind == WIRE_EV_TOP ? OCTET_ALTERNATIVE : OCTET_PROMPT;
		ev->token = w->token < o->info.vocab ? w->token : 0;
		ev->logprob = w->logprob;
		return true;
	case WIRE_EV_DONE:
		ev->kind = OCTET_DONE;
		ev->finish = w->token >= WIRE_FINISH_STOP && w->token <= WIRE_FINISH_ERROR ? (enum octet_finish)w->token
		                                                                        : OCTET_FAILED;
		if (ev->finish == OCTET_FAILED)
			explain(o, w->a, ev);
		s->used = false;
		o->n_used--;
		return true;
	default:
		return false;
	}
}

static int
read_now(octet *o, int request, struct octet_event *ev, size_t n)
{
	struct wire_slot *ring_of = &o->slots[request];
	struct slot *s = &o->slot[request];
	uint32_t tail = __atomic_load_n(&ring_of->tail, __ATOMIC_ACQUIRE), got = 0;

	if (tail - s->head > WIRE_EVENTS) {
		o->dead = true;
		return fail(o, -EPROTO, "octetd wrote an impossible index");
	}
	while (s->head != tail && got < n && s->used) {
		struct wire_event w = ring_of->event[s->head % WIRE_EVENTS];

		s->head++;
		if (translate(o, s, &w, &ev[got]))
			got++;
	}
	__atomic_store_n(&ring_of->head, s->head, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&ring_of->parked, __ATOMIC_RELAXED))
		ring(o);
	return (int)got;
}

static bool
has_events(const octet *o, uint32_t slot)
{
	return o->slot[slot].used && __atomic_load_n(&o->slots[slot].tail, __ATOMIC_ACQUIRE) != o->slot[slot].head;
}

/* slot -1: any. */
static bool
any_events(const octet *o, int slot)
{
	if (slot >= 0)
		return has_events(o, (uint32_t)slot);
	for (uint32_t i = 0; i < WIRE_SLOTS; i++)
		if (has_events(o, i))
			return true;
	return false;
}

/* Waits for events: a short spin, then sleep on the bell. 1, 0 or -errno. */
static int
wait_events(octet *o, int slot, int timeout_ms)
{
	int64_t start = now_ns(), end = timeout_ms < 0 ? INT64_MAX : start + (int64_t)timeout_ms * 1000000, now = start;

	do {
		for (int i = 0; i < 32; i++) {
			if (any_events(o, slot))
				return 1;
			__builtin_ia32_pause();
		}
		now = now_ns();
	} while (now - start < SPIN_NS && now < end);

	for (;;) {
		struct pollfd p = {.fd = o->fd, .events = POLLIN};
		int rc;

		arm(o);
		rc = any_events(o, slot) ? 1 : o->dead ? -EPIPE : 0;
		if (rc == 0 && end > now)
			rc = poll(&p, 1, timeout_ms < 0 ? -1 : (int)((end - now + 999999) / 1000000)) < 0 ? -errno : 0;
		disarm(o);
		if (rc != 0)
			return rc == -EPIPE ? fail(o, rc, "octetd is gone: the connection is closed") : rc;
		if (any_events(o, slot))
			return 1;
		now = now_ns();
		if (now >= end) {
			take_bells(o);
			return any_events(o, slot) ? 1 : o->dead ? fail(o, -EPIPE, "octetd is gone: the connection is closed") : 0;
		}
	}
}

/* Nothing was there. A bell may have brought us here, or octetd's end. */
static void
look(octet *o)
{
	int64_t now = now_ns();

	if (!o->rung && now - o->looked < LOOK_NS)
		return;
	o->looked = now;
	take_bells(o);
}

int
octet_read(octet *o, int request, struct octet_event *ev, size_t n, int timeout_ms)
{
	int rc = check_request(o, request);

	if (rc != 0)
		return rc;
	if (n == 0)
		return 0;
	if (ev == NULL)
		return fail(o, -EINVAL, "octet_read: ev is NULL");
	disarm(o);
	for (;;) {
		rc = read_now(o, request, ev, n);
		if (rc != 0)
			return rc;
		if (timeout_ms == 0 && !o->dead)
			look(o);
		if (timeout_ms == 0 && has_events(o, (uint32_t)request))
			continue;
		if (o->dead)
			return fail(o, -EPIPE, "octetd is gone: the connection is closed");
		if (timeout_ms == 0)
			return 0;
		rc = wait_events(o, request, timeout_ms);
		if (rc <= 0)
			return rc;
	}
}

int
octet_wait(octet *o, int timeout_ms)
{
	return wait_events(o, -1, timeout_ms);
}

int
octet_arm(octet *o)
{
	arm(o);
	return any_events(o, -1) || o->dead;
}

/* ---- text ---- */

int64_t
octet_tokenize(octet *o, const char *text, size_t len, unsigned flags, uint32_t *ids, size_t cap)
{
	int64_t n = tok_encode(o->tok, text, len,
	    (flags & OCTET_SPECIAL ? TOK_SPECIAL : 0) | (flags & OCTET_BOS ? TOK_BOS : 0), ids, cap);

	return n < 0 ? fail(o, (int)n, "tokenizer: %s", strerror((int)-n)) : n;
}

int64_t
octet_template(octet *o, const char *text, size_t len, uint32_t *ids, size_t cap)
{
	struct err err = {""};
	int64_t n = tok_template(o->tok, text, len, ids, cap, &err);

	return n < 0 ? fail(o, (int)n, "%.250s", *err.text != '\0' ? err.text : strerror((int)-n)) : n;
}

_Static_assert((int)OCTET_SYSTEM == TOK_SYSTEM && (int)OCTET_USER == TOK_USER && (int)OCTET_ASSISTANT == TOK_ASSISTANT,
    "the roles are those of tok.h");
_Static_assert((int)OCTET_CHAT_NONE == TOK_CHAT_NONE && (int)OCTET_CHAT_TURNS == TOK_CHAT_TURNS,
    "the kinds are those of tok.h");

int64_t
octet_chat_tokens(octet *o, const struct octet_message *msgs, size_t n, int add_generation_prompt, uint32_t *ids,
    size_t cap)
{
	struct tok_message *m = calloc(n > 0 ? n : 1, sizeof(*m));
	struct err err = {""};
	int64_t got = -ENOMEM;

	for (size_t i = 0; m != NULL && i < n; i++)
		m[i] = (struct tok_message){(enum tok_role)msgs[i].role, msgs[i].text, msgs[i].len};
	if (m != NULL)
		got = tok_chat(o->tok, m, n, add_generation_prompt != 0, time(NULL), ids, cap, &err);
	free(m);
	return got < 0 ? fail(o, (int)got, "%.250s", *err.text != '\0' ? err.text : strerror((int)-got)) : got;
}

enum octet_chat
octet_chat_kind(const octet *o)
{
	return (enum octet_chat)tok_chat_kind(o->tok);
}

int64_t
octet_detokenize(octet *o, const uint32_t *ids, size_t n, int skip_special, char *out, size_t cap)
{
	int64_t got = tok_decode(o->tok, ids, n, skip_special != 0, out, cap);

	return got < 0 ? fail(o, (int)got, "detokenize: a token id is out of range") : got;
}

const char *
octet_piece(octet *o, uint32_t id, size_t *len)
{
	return tok_piece(o->tok, id, len);
}

struct octet_text {
	struct tok_stream *stream;
	char **stop;
	size_t n_stops;
	char *buf;            /* text not given out yet */
	size_t len, given, cap; /* given: bytes handed out by the last call */
	size_t max_piece;
	bool stopped;
};

int
octet_text_new(octet_text **out, octet *o, int is_continuation, const char *const *stops, size_t n_stops)
{
	octet_text *t = calloc(1, sizeof(*t));
	int rc = t == NULL ? -ENOMEM : 0;

	*out = NULL;
	if (rc == 0)
		rc = tok_stream_new(&t->stream, o->tok, TOK_SKIP_SPECIAL | (is_continuation ? TOK_CONTINUE : 0));
	if (rc == 0 && n_stops > 0 && (t->stop = calloc(n_stops, sizeof(*t->stop))) == NULL)
		rc = -ENOMEM;
	for (size_t i = 0; i < n_stops && rc == 0; i++) {
		rc = *stops[i] == '\0' ? -EINVAL : (t->stop[i] = strdup(stops[i])) == NULL ? -ENOMEM : 0;
		t->n_stops += rc == 0;
	}
	if (rc != 0) {
		octet_text_free(&t);
		return rc;
	}
	t->max_piece = tok_max_text(o->tok);
	*out = t;
	return 0;
}

void
octet_text_free(octet_text **tp)
{
	octet_text *t = *tp;

	if (t == NULL)
		return;
	tok_stream_free(&t->stream);
	for (size_t i = 0; i < t->n_stops; i++)
		free(t->stop[i]);
	free(t->stop);
	free(t->buf);
	free(t);
	*tp = NULL;
}

/* Drops what the last call gave out, makes room for one more piece. */
static int
make_room(octet_text *t)
{
	if (t->given > 0)
		memmove(t->buf, t->buf + t->given, t->len - t->given);
	t->len -= t->given;
	t->given = 0;
	if (t->cap - t->len < t->max_piece) {
		size_t cap = (t->len + t->max_piece) * 2;
		char *more = realloc(t->buf, cap);

		if (more == NULL)
			return -ENOMEM;
		t->buf = more;
		t->cap = cap;
	}
	return 0;
}

/* How much of the buffer is certain. Sets stopped when a stop string is there. */
static size_t
certain(octet_text *t)
{
	size_t first = t->len, keep = 0;

	for (size_t i = 0; i < t->n_stops; i++) {
		size_t n = strlen(t->stop[i]);
		const char *hit = memmem(t->buf, t->len, t->stop[i], n);

		if (hit != NULL && (size_t)(hit - t->buf) <= first) {
			first = (size_t)(hit - t->buf);
			t->stopped = true;
		}
		/* The longest end of the text that may be the start of a stop string. */
		for (size_t k = n - 1 < t->len ? n - 1 : t->len; k > keep; k--)
			if (memcmp(t->buf + t->len - k, t->stop[i], k) == 0)
				keep = k;
	}
	return t->stopped ? first : t->len - keep;
}

static int
give(octet_text *t, bool all, const char **out, size_t *len)
{
	size_t n = certain(t);

	if (all && !t->stopped)
		n = t->len;
	*out = t->buf;
	*len = n;
	t->given = n;
	if (t->stopped) {
		t->given = t->len; /* what follows a stop string is dropped */
		return 1;
	}
	return 0;
}

int
octet_text_push(octet_text *t, uint32_t id, const char **out, size_t *len)
{
	int64_t n;

	*out = "";
	*len = 0;
	if (t->stopped)
		return 1;
	if (make_room(t) != 0)
		return -ENOMEM;
	n = tok_stream_push(t->stream, id, t->buf + t->len, t->cap - t->len);
	if (n < 0)
		return (int)n;
	t->len += (size_t)n;
	return give(t, false, out, len);
}

int
octet_text_flush(octet_text *t, const char **out, size_t *len)
{
	int64_t n;

	*out = "";
	*len = 0;
	if (t->stopped)
		return 0;
	if (make_room(t) != 0)
		return -ENOMEM;
	n = tok_stream_flush(t->stream, t->buf + t->len, t->cap - t->len);
	if (n < 0)
		return (int)n;
	t->len += (size_t)n;
	give(t, true, out, len);
	return 0;
}
