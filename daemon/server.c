/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/server.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client/wire.h"
#include "daemon/listen.h"
#include "daemon/log.h"

#define BELLS_PER_WAKE 32
#define SPIN_SLICE_NS 50000u
/* Words: the prompts of some requests, and all else that a request may carry. */
#define PROMPT_RING_MIN 65536u

/*
 * hello -> open -> closed. A closed session lives on, its memory mapped and its
 * descriptor open, until the engine gave its last request back.
 */
enum session_state { SESSION_HELLO, SESSION_OPEN, SESSION_CLOSED };

/* A slot's ring as we know it; what the app can write is never trusted. */
struct slot {
	struct session *session;
	struct wire_slot *shm;
	uint32_t tail;            /* ours; engine thread while a request runs */
	struct request *request;  /* loop thread; NULL: free */
};

/* What one user holds. A session counts until its memory is gone, a request
 * until the engine gave it back: with the size of both given by the model, this
 * bounds the bytes too. */
struct user {
	struct user *next;
	uid_t uid;
	uint32_t sessions, in_flight;
};

struct session {
	struct server *server;
	struct session *next;
	struct user *user;
	enum session_state state;
	uint64_t id;
	struct peer peer;
	int fd;
	uv_poll_t poll;
	uv_timer_t timer;         /* handshake */
	int handles;              /* open libuv handles */
	int memfd;
	struct wire_session *shm;
	size_t shm_bytes;
	uint32_t *prompt;         /* in shm */
	uint32_t sq_head;         /* ours */
	uint32_t in_flight;
	uint32_t broken;          /* atomic; engine thread: the app wrote nonsense */
	uint64_t requests, tokens;
	struct slot slot[WIRE_SLOTS];
};

struct server {
	struct server_config cfg;
	uv_loop_t *loop;
	const struct model *model;
	struct engine *engine;
	struct listener listener;
	uv_poll_t accept_poll;
	uv_idle_t spin;           /* polls submission rings for a while after traffic */
	uv_async_t broken_async;
	bool spinning, draining;
	uint64_t spin_until;
	int tok_fd;
	size_t tok_len;
	uint32_t prompt_ring;
	struct session *sessions;
	struct user *users;
	uint32_t n_open, in_flight;
	uint64_t next_id, next_request;
};

/* ---- memory ---- */

static int
sealed_memfd(const char *name, size_t bytes, const void *content, int seals)
{
	int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING), rc = 0;
	size_t at = 0;

	if (fd < 0)
		return -errno;
	if (ftruncate(fd, (off_t)bytes) != 0)
		rc = -errno;
	while (rc == 0 && content != NULL && at < bytes) {
		ssize_t n = pwrite(fd, (const char *)content + at, bytes - at, (off_t)at);

		if (n < 0 && errno != EINTR)
			rc = -errno;
		at += n > 0 ? (size_t)n : 0;
	}
	if (rc == 0 && fcntl(fd, F_ADD_SEALS, seals) != 0)
		rc = -errno;
	if (rc != 0) {
		close(fd);
		return rc;
	}
	return fd;
}

static int
make_memory(struct session *s)
{
	size_t slots_at = (sizeof(struct wire_session) + 63) & ~(size_t)63;
	size_t prompt_at = slots_at + WIRE_SLOTS * sizeof(struct wire_slot);

	s->shm_bytes = (prompt_at + (size_t)s->server->prompt_ring * sizeof(uint32_t) + 4095) & ~(size_t)4095;
	s->memfd = sealed_memfd("octet-session", s->shm_bytes, NULL, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	if (s->memfd < 0)
		return s->memfd;
	s->shm = mmap(NULL, s->shm_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, s->memfd, 0);
	if (s->shm == MAP_FAILED) {
		s->shm = NULL;
		return -errno;
	}
	s->shm->magic = WIRE_MAGIC;
	s->shm->version = WIRE_VERSION;
	s->shm->prompt_ring = s->server->prompt_ring;
	s->shm->slots_at = (uint32_t)slots_at;
	s->shm->prompt_at = (uint32_t)prompt_at;
	s->shm->daemon_sleeps = 1;
	s->prompt = (uint32_t *)(void *)((char *)s->shm + prompt_at);
	for (uint32_t i = 0; i < WIRE_SLOTS; i++) {
		s->slot[i].session = s;
		s->slot[i].shm = (struct wire_slot *)(void *)((char *)s->shm + slots_at) + i;
	}
	return 0;
}

/* ---- the sink: engine thread ---- */

static void
mark_broken(struct session *s)
{
	if (!__atomic_exchange_n(&s->broken, 1, __ATOMIC_ACQ_REL))
		uv_async_send(&s->server->broken_async);
}

static uint32_t
sink_room(void *arg)
{
	struct slot *slot = arg;
	uint32_t used = slot->tail - __atomic_load_n(&slot->shm->head, __ATOMIC_ACQUIRE);

	if (used <= WIRE_EVENTS)
		return WIRE_EVENTS - used;
	mark_broken(slot->session);
	return WIRE_EVENTS; /* the loop ends it; until then its events go nowhere */
}

static void
sink_put(void *arg, const struct wire_event *ev)
{
	struct slot *slot = arg;

	slot->shm->event[slot->tail % WIRE_EVENTS] = *ev;
	slot->tail++;
	__atomic_store_n(&slot->shm->tail, slot->tail, __ATOMIC_RELEASE);
}

static void
sink_set_parked(void *arg, bool parked)
{
	struct slot *slot = arg;

	__atomic_store_n(&slot->shm->parked, parked, __ATOMIC_SEQ_CST);
}

static void
sink_flush(void *arg)
{
	struct slot *slot = arg;
	char bell = WIRE_BELL;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&slot->session->shm->app_sleeps, __ATOMIC_RELAXED))
		send(slot->session->fd, &bell, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* ---- users ---- */

/* Counts one more session of uid; NULL: out of memory. */
static struct user *
user_hold(struct server *v, uid_t uid)
{
	struct user *u = v->users;

	while (u != NULL && u->uid != uid)
		u = u->next;
	if (u == NULL && (u = calloc(1, sizeof(*u))) != NULL) {
		u->uid = uid;
		u->next = v->users;
		v->users = u;
	}
	if (u != NULL)
		u->sessions++;
	return u;
}

static void
user_drop(struct server *v, struct user *u)
{
	struct user **up = &v->users;

	if (--u->sessions > 0)
		return;
	while (*up != u)
		up = &(*up)->next;
	*up = u->next;
	free(u);
}

/* delta: 1 or -1. */
static void
count_request(struct server *v, struct session *s, int delta)
{
	s->in_flight += (uint32_t)delta;
	s->user->in_flight += (uint32_t)delta;
	v->in_flight += (uint32_t)delta;
}

/* ---- the end of a session ---- */

static void
maybe_free(struct session *s)
{
	struct session **sp = &s->server->sessions;

	if (s->state != SESSION_CLOSED || s->in_flight > 0 || s->handles > 0)
		return;
	while (*sp != s)
		sp = &(*sp)->next;
	*sp = s->next;
	close(s->fd);
	if (s->shm != NULL)
		munmap(s->shm, s->shm_bytes);
	if (s->memfd >= 0)
		close(s->memfd);
	user_drop(s->server, s->user);
	peer_clear(&s->peer);
	free(s);
}

static void
on_handle_closed(uv_handle_t *h)
{
	struct session *s = h->data;

	s->handles--;
	maybe_free(s);
}

/* cause NULL: the app left by itself. */
static void
session_close(struct session *s, const char *cause)
{
	if (s->state == SESSION_CLOSED)
		return;
	if (cause != NULL)
		log_warn("session_closed", "client=%llu uid=%u pid=%d cause=%s", (unsigned long long)s->id, s->peer.uid,
		    (int)s->peer.pid, LOG_Q(cause));
	else
		log_debug("session_closed", "client=%llu", (unsigned long long)s->id);
	if (s->state == SESSION_OPEN)
		s->server->n_open--;
	s->state = SESSION_CLOSED;
	for (uint32_t i = 0; i < WIRE_SLOTS; i++)
		if (s->slot[i].request != NULL)
			engine_cancel(s->server->engine, s->slot[i].request);
	shutdown(s->fd, SHUT_RDWR);
	uv_close((uv_handle_t *)&s->poll, on_handle_closed);
	uv_close((uv_handle_t *)&s->timer, on_handle_closed);
}

/* ---- requests in ---- */

static void
refuse(struct slot *slot, uint32_t serial, int rc)
{
	sink_put(slot, &(struct wire_event){.kind = WIRE_EV_DONE, .serial = serial, .token = WIRE_FINISH_ERROR,
	    .a = (uint64_t)(uint32_t)-rc});
	sink_flush(slot);
}

/* Words of the prompt ring, each read once. */
struct reader {
	const struct session *s;
	uint32_t at;
};

static uint32_t
next_word(struct reader *r)
{
	return __atomic_load_n(&r->s->prompt[r->at++ & (r->s->server->prompt_ring - 1)], __ATOMIC_RELAXED);
}

static int
read_prompt(struct reader *in, const struct wire_desc *d, struct request *r)
{
	uint32_t vocab = in->s->server->model->shape.vocab;

	r->prompt = malloc((size_t)d->prompt_tokens * sizeof(*r->prompt));
	if (r->prompt == NULL)
		return -ENOMEM;
	r->n_prompt = d->prompt_tokens;
	for (uint32_t i = 0; i < d->prompt_tokens; i++)
		if ((r->prompt[i] = next_word(in)) >= vocab)
			return -EINVAL;
	return 0;
}

static int
read_bias(struct reader *in, const struct wire_desc *d, struct request *r)
{
	struct sampling *sp = &r->sampling;

	if (d->n_bias == 0)
		return 0;
	sp->bias = malloc(d->n_bias * sizeof(*sp->bias));
	if (sp->bias == NULL)
		return -ENOMEM;
	for (; sp->n_bias < d->n_bias; sp->n_bias++) {
		uint32_t id = next_word(in), bits = next_word(in);
		float value;

		memcpy(&value, &bits, sizeof(value));
		if (id >= in->s->server->model->shape.vocab || !isfinite(value) || fabsf(value) > 100)
			return -EINVAL;
		sp->bias[sp->n_bias] = (struct logit_bias){id, value};
	}
	return 0;
}

static uint64_t
next_u64(struct reader *in)
{
	uint64_t low = next_word(in);

	return low | (uint64_t)next_word(in) << 32;
}

static int
read_segments(struct reader *in, const struct wire_desc *d, struct request *r)
{
	const struct server_config *cfg = &in->s->server->cfg;

	if (d->n_segments == 0)
		return 0;
	r->replay = calloc(d->n_segments, sizeof(*r->replay));
	if (r->replay == NULL)
		return -ENOMEM;
	for (; r->n_replay < d->n_segments; r->n_replay++) {
		struct segment *g = &r->replay[r->n_replay];
		uint64_t digest;

		g->from = next_word(in);
		digest = next_u64(in);
		g->epoch = next_u64(in);
		if (r->n_replay == 0 ? g->from != 0 : g->from <= g[-1].from)
			return -EINVAL;
		g->plan = cfg->plan(cfg->arg, digest);
		if (g->plan == NULL)
			return -ENOENT;
	}
	return 0;
}

static int
read_policy(struct reader *in, const struct wire_desc *d, struct request *r)
{
	const struct server_config *cfg = &in->s->server->cfg;
	char name[WIRE_MAX_POLICY + 5] = "";

	for (uint32_t i = 0; i < d->policy_bytes; i += 4) {
		uint32_t word = next_word(in);

		memcpy(name + i, &word, 4);
	}
	name[d->policy_bytes] = '\0';
	if (r->replay != NULL)
		return d->policy_bytes == 0 ? 0 : -EINVAL;
	return cfg->policy(cfg->arg, &in->s->peer, d->policy_bytes == 0 ? NULL : name, in->s->server->next_request + 1, &r->plan,
	    &r->plan_epoch, &r->rollout);
}

static bool
within(float v, float min, float max)
{
	return isfinite(v) && v >= min && v <= max;
}

static int
check_desc(const struct session *s, const struct wire_desc *d)
{
	bool score = d->max_tokens == 0;
	uint32_t context = s->server->model->shape.max_context;

	if (s->server->draining)
		return -ESHUTDOWN;
	if (s->in_flight >= s->server->cfg.max_requests)
		return -EBUSY;
	if (s->user->in_flight >= s->server->cfg.max_requests_per_uid)
		return -EDQUOT;
	if (d->prompt_tokens == 0 || (d->flags & ~(uint32_t)WIRE_FLAGS) != 0 ||
	    (score && (d->flags & WIRE_PROMPT_LOGPROBS) == 0))
		return -EINVAL;
	if (d->prompt_tokens > context - !score)
		return -E2BIG;
	if (!within(d->temperature, 0, 100) || !within(d->top_p, 0, 1) || d->top_p == 0 || !within(d->min_p, 0, 1) ||
	    !within(d->repetition_penalty, 0.01f, 100) || !within(d->presence_penalty, -100, 100) ||
	    !within(d->frequency_penalty, -100, 100))
		return -EINVAL;
	if (d->top_logprobs > WIRE_MAX_TOP || d->n_bias > WIRE_MAX_BIAS || d->n_segments > WIRE_MAX_SEGMENTS ||
	    d->policy_bytes > WIRE_MAX_POLICY)
		return -EINVAL;
	for (size_t i = 0; i < sizeof(d->reserved) / sizeof(*d->reserved); i++)
		if (d->reserved[i] != 0)
			return -EINVAL;
	return 0;
}

static int
read_request(struct session *s, const struct wire_desc *d, struct request *r)
{
	struct reader in = {s, d->prompt_at};
	int rc = check_desc(s, d);

	r->sampling = (struct sampling){.max_tokens = d->max_tokens, .top_k = d->top_k, .seed = d->seed,
	    .temperature = d->temperature, .top_p = d->top_p, .min_p = d->min_p,
	    .repetition_penalty = d->repetition_penalty, .presence_penalty = d->presence_penalty,
	    .frequency_penalty = d->frequency_penalty, .top_logprobs = d->top_logprobs,
	    .ignore_eos = (d->flags & WIRE_IGNORE_EOS) != 0, .logprobs = (d->flags & WIRE_LOGPROBS) != 0,
	    .prompt_logprobs = (d->flags & WIRE_PROMPT_LOGPROBS) != 0};
	if (rc == 0)
		rc = read_prompt(&in, d, r);
	if (rc == 0)
		rc = read_bias(&in, d, r);
	if (rc == 0)
		rc = read_segments(&in, d, r);
	if (rc == 0)
		rc = read_policy(&in, d, r);
	return rc;
}

static void
submit(struct session *s, const struct wire_desc *d)
{
	struct slot *slot = &s->slot[d->slot];
	struct request *r = calloc(1, sizeof(*r));
	int rc = r == NULL ? -ENOMEM : read_request(s, d, r);

	if (rc == 0) {
		r->id = ++s->server->next_request;
		r->client = s->id;
		r->serial = d->serial;
		r->scope = s->server->cfg.share_prefixes ? 0 : (uint64_t)s->peer.uid + 1;
		r->sink = (struct sink){sink_room, sink_put, sink_set_parked, sink_flush, slot};
		r->owner = slot;
		/* Before it is posted: it may be done before we are back. */
		slot->request = r;
		count_request(s->server, s, 1);
		rc = engine_submit(s->server->engine, r, NULL);
		if (rc == 0) {
			s->requests++;
			return;
		}
		slot->request = NULL;
		count_request(s->server, s, -1);
	}
	if (r != NULL)
		request_free(&r);
	refuse(slot, d->serial, rc);
}

/* The app may see DONE and use the slot again before the loop reaped the old
 * request: its descriptor waits, server_reaped() looks again. */
static bool
must_wait(const struct session *s, const struct wire_desc *d)
{
	return d->op == WIRE_SUBMIT && d->slot < WIRE_SLOTS && s->slot[d->slot].request != NULL;
}

/* Returns what the app did wrong, NULL if nothing. */
static const char *
take_desc(struct session *s, const struct wire_desc *d)
{
	struct slot *slot;

	if (d->slot >= WIRE_SLOTS)
		return "slot out of range";
	slot = &s->slot[d->slot];
	switch (d->op) {
	case WIRE_SUBMIT:
		/* Room for the answer, at the very least. */
		if (sink_room(slot) < SINK_ROOM)
			return "slot has unread events";
		submit(s, d);
		return NULL;
	case WIRE_CANCEL:
		/* It may have ended by itself in the meantime. */
		if (slot->request != NULL && slot->request->serial == d->serial)
			engine_cancel(s->server->engine, slot->request);
		return NULL;
	default:
		return "unknown operation";
	}
}

/* True if there was something. */
static bool
take_submissions(struct session *s)
{
	uint32_t tail = __atomic_load_n(&s->shm->sq_tail, __ATOMIC_ACQUIRE);
	uint32_t before = s->sq_head;

	if (tail - s->sq_head > WIRE_SQ) {
		session_close(s, "impossible index of the submission ring");
		return false;
	}
	while (s->state == SESSION_OPEN && s->sq_head != tail) {
		struct wire_desc d = *(volatile struct wire_desc *)&s->shm->sq[s->sq_head % WIRE_SQ];
		const char *wrong;

		if (must_wait(s, &d))
			break;
		wrong = take_desc(s, &d);
		s->sq_head++;
		__atomic_store_n(&s->shm->sq_head, s->sq_head, __ATOMIC_RELEASE);
		if (wrong != NULL)
			session_close(s, wrong);
	}
	return s->sq_head != before;
}

/* ---- spinning: while there is traffic the rings are polled, not belled ---- */

static void
set_sleeps(struct server *v, uint32_t sleeps)
{
	for (struct session *s = v->sessions; s != NULL; s = s->next)
		if (s->state == SESSION_OPEN)
			__atomic_store_n(&s->shm->daemon_sleeps, sleeps, __ATOMIC_RELAXED);
	if (v->cfg.awake != NULL)
		__atomic_store_n(v->cfg.awake, !sleeps, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static bool
take_all(struct server *v)
{
	bool any = v->cfg.reap != NULL && v->cfg.reap(v->cfg.arg);

	for (struct session *s = v->sessions, *next; s != NULL; s = next) {
		next = s->next;
		if (s->state == SESSION_OPEN)
			any |= take_submissions(s);
	}
	return any;
}

/* Not through libuv each time, which asks the kernel for what is ready; but now and then. */
static void
on_spin(uv_idle_t *h)
{
	struct server *v = h->data;
	uint64_t now = uv_hrtime(), back = now + SPIN_SLICE_NS;

	while (now < v->spin_until && now < back) {
		if (take_all(v))
			v->spin_until = now + 1000ull * v->cfg.spin_us;
		else
			sched_yield(); /* where cores are few, to those who work */
		now = uv_hrtime();
	}
	if (now < v->spin_until)
		return;
	set_sleeps(v, 1);
	if (take_all(v)) { /* somebody published before they could see it */
		set_sleeps(v, 0);
		v->spin_until = now + 1000ull * v->cfg.spin_us;
		return;
	}
	v->spinning = false;
	uv_idle_stop(&v->spin);
}

static void
start_spin(struct server *v)
{
	v->spin_until = uv_hrtime() + 1000ull * v->cfg.spin_us;
	if (v->spinning || v->cfg.spin_us == 0)
		return;
	v->spinning = true;
	set_sleeps(v, 0);
	uv_idle_start(&v->spin, on_spin);
}

/* ---- handshake ---- */

static void
send_refusal(int fd, int code, const char *fmt, unsigned n)
{
	struct wire_refused r = {.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = WIRE_REFUSED, .code = code};

	/* The formats are ours: one number at most. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
	snprintf(r.text, sizeof(r.text), fmt, n);
#pragma GCC diagnostic pop
	send(fd, &r, sizeof(r), MSG_DONTWAIT | MSG_NOSIGNAL);
}

static int
send_welcome(struct session *s)
{
	struct wire_welcome w = {.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = WIRE_WELCOME,
	    .vocab = s->server->model->shape.vocab, .max_context = s->server->model->shape.max_context,
	    .max_requests = s->server->cfg.max_requests, .session_bytes = s->shm_bytes,
	    .tokenizer_bytes = s->server->tok_len, .client_id = s->id};
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {0};
	struct iovec iov = {&w, sizeof(w)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
	int fds[2] = {s->memfd, s->server->tok_fd};

	snprintf(w.model, sizeof(w.model), "%s", s->server->model->name);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(fds));
	memcpy(CMSG_DATA(c), fds, sizeof(fds));
	return sendmsg(s->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

static void
take_hello(struct session *s)
{
	struct server *v = s->server;
	struct wire_hello h;
	ssize_t n = recv(s->fd, &h, sizeof(h), MSG_DONTWAIT | MSG_TRUNC);
	int rc;

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		session_close(s, NULL);
		return;
	}
	if (n != sizeof(h) || h.magic != WIRE_MAGIC || h.type != WIRE_HELLO || h.version != WIRE_VERSION) {
		send_refusal(s->fd, -EPROTO, "octetd speaks version %u of the protocol", WIRE_VERSION);
		session_close(s, "no valid hello");
		return;
	}
	if (v->draining || v->n_open >= v->cfg.max_clients) {
		if (v->draining)
			send_refusal(s->fd, -ESHUTDOWN, "octetd takes no new clients: it is drained or stopping", 0);
		else
			send_refusal(s->fd, -EBUSY, "too many clients: max_clients is %u", v->cfg.max_clients);
		session_close(s, v->draining ? "draining" : "too many clients");
		return;
	}
	rc = make_memory(s);
	if (rc == 0)
		rc = send_welcome(s);
	if (rc != 0) {
		send_refusal(s->fd, rc, "octetd has no memory for a session", 0);
		session_close(s, strerror(-rc));
		return;
	}
	h.program[sizeof(h.program) - 1] = '\0';
	snprintf(s->peer.program, sizeof(s->peer.program), "%.31s", h.program);
	uv_timer_stop(&s->timer);
	s->state = SESSION_OPEN;
	v->n_open++;
	if (v->spinning)
		__atomic_store_n(&s->shm->daemon_sleeps, 0, __ATOMIC_RELAXED);
	log_debug("session_open", "client=%llu uid=%u pid=%d program=%s", (unsigned long long)s->id, s->peer.uid,
	    (int)s->peer.pid, LOG_Q(s->peer.program));
}

static void
take_bells(struct session *s)
{
	char buf[16];

	for (int i = 0; i < BELLS_PER_WAKE; i++) {
		/* No control buffer: descriptors an app sends are dropped by the kernel. */
		ssize_t n = recv(s->fd, buf, sizeof(buf), MSG_DONTWAIT);

		if (n > 0)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			break;
		session_close(s, NULL);
		return;
	}
	take_submissions(s);
	if (s->state == SESSION_OPEN && s->in_flight > 0)
		engine_kick(s->server->engine); /* it may have made room */
	start_spin(s->server);
}

static void
on_readable(uv_poll_t *h, int status, int events)
{
	struct session *s = h->data;

	(void)events;
	if (status < 0)
		session_close(s, NULL); /* libuv says EBADF for a socket that hung up */
	else if (s->state == SESSION_HELLO)
		take_hello(s);
	else if (s->state == SESSION_OPEN)
		take_bells(s);
}

static void
on_handshake_timeout(uv_timer_t *h)
{
	session_close(h->data, "no hello in time");
}

/* Refuses a caller that has no session. Its hello is taken off the socket:
 * closed with a message unread, the caller would get ECONNRESET in place of the
 * reason. */
static void
turn_away(int fd, int code, const char *fmt, unsigned n)
{
	struct wire_hello h;

	send_refusal(fd, code, fmt, n);
	shutdown(fd, SHUT_RD);
	while (recv(fd, &h, sizeof(h), MSG_DONTWAIT) > 0)
		;
	close(fd);
}

static void
accept_one(struct server *v, int fd)
{
	struct session *s = calloc(1, sizeof(*s));

	if (s == NULL || peer_get(&s->peer, fd) != 0 || (s->user = user_hold(v, s->peer.uid)) == NULL)
		goto fail;
	if (s->user->sessions > v->cfg.max_clients_per_uid) {
		log_warn("session_refused", "uid=%u pid=%d cause=%s", s->peer.uid, (int)s->peer.pid,
		    LOG_Q("too many clients of one user"));
		turn_away(fd, -EDQUOT, "too many clients of this user: max_clients_per_uid is %u", v->cfg.max_clients_per_uid);
		fd = -1;
		goto fail;
	}
	s->server = v;
	s->fd = fd;
	s->memfd = -1;
	s->id = ++v->next_id;
	if (uv_poll_init(v->loop, &s->poll, fd) != 0)
		goto fail;
	uv_timer_init(v->loop, &s->timer);
	s->handles = 2;
	s->poll.data = s->timer.data = s;
	s->next = v->sessions;
	v->sessions = s;
	uv_poll_start(&s->poll, UV_READABLE | UV_DISCONNECT, on_readable);
	uv_timer_start(&s->timer, on_handshake_timeout, v->cfg.handshake_timeout_ms, 0);
	return;
fail:
	if (s != NULL) {
		if (s->user != NULL)
			user_drop(v, s->user);
		peer_clear(&s->peer);
		free(s);
	}
	if (fd >= 0)
		close(fd);
}

static void
on_accept(uv_poll_t *h, int status, int events)
{
	struct server *v = h->data;
	int fd;

	(void)status;
	(void)events;
	for (int i = 0; i < 32 && (fd = listen_accept(&v->listener)) >= 0; i++)
		accept_one(v, fd);
}

static void
on_broken(uv_async_t *h)
{
	struct server *v = h->data;

	for (struct session *s = v->sessions, *next; s != NULL; s = next) {
		next = s->next;
		if (s->state == SESSION_OPEN && __atomic_load_n(&s->broken, __ATOMIC_ACQUIRE))
			session_close(s, "impossible index of an event ring");
	}
}

/* ---- lifecycle ---- */

int
server_new(struct server **out, uv_loop_t *loop, const struct server_config *cfg, const struct model *model,
    struct engine *engine, const void *tok_blob, size_t tok_len, struct err *err)
{
	struct server *v = calloc(1, sizeof(*v));
	int rc;

	*out = NULL;
	if (v == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	v->cfg = *cfg, v->loop = loop, v->model = model, v->engine = engine, v->tok_len = tok_len;
	v->prompt_ring = PROMPT_RING_MIN;
	while (v->prompt_ring < 2 * model->shape.max_context)
		v->prompt_ring *= 2;
	v->tok_fd = sealed_memfd("octet-tokenizer", tok_len, tok_blob,
	    F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
	if (v->tok_fd < 0) {
		rc = err_set(err, v->tok_fd, "tokenizer memory: %s", strerror(-v->tok_fd));
		free(v);
		return rc;
	}
	rc = listen_open(&v->listener, cfg->path, SOCK_SEQPACKET, cfg->mode, err);
	if (rc != 0) {
		close(v->tok_fd);
		free(v);
		return rc;
	}
	uv_poll_init(loop, &v->accept_poll, v->listener.fd);
	uv_idle_init(loop, &v->spin);
	uv_async_init(loop, &v->broken_async, on_broken);
	v->accept_poll.data = v->spin.data = v->broken_async.data = v;
	uv_poll_start(&v->accept_poll, UV_READABLE, on_accept);
	*out = v;
	return 0;
}

void
server_configure(struct server *v, const struct server_config *cfg)
{
	struct server_config old = v->cfg;

	v->cfg = *cfg;
	v->cfg.path = old.path;
	v->cfg.mode = old.mode;
}

void
server_drain(struct server *v, bool draining)
{
	v->draining = draining;
}

uint32_t
server_in_flight(const struct server *v)
{
	return v->in_flight;
}

bool
server_idle(const struct server *v)
{
	return v->in_flight == 0;
}

void
server_reaped(struct server *v, struct request *r)
{
	for (struct request *next; r != NULL; r = next) {
		struct slot *slot = r->owner;
		struct session *s = slot->session;

		next = r->next;
		slot->request = NULL;
		count_request(v, s, -1);
		s->tokens += r->n_output;
		if (v->cfg.finished != NULL)
			v->cfg.finished(v->cfg.arg, r);
		request_free(&r);
		if (s->state == SESSION_OPEN)
			take_submissions(s);
		maybe_free(s);
	}
}

static void
name_policy(const struct server *v, const struct session *s, struct page_client *out)
{
	bool candidate = false;
	const char *name = v->cfg.client_policy != NULL ? v->cfg.client_policy(v->cfg.arg, &s->peer, &candidate) : NULL;

	snprintf(out->policy, sizeof(out->policy), "%s", name != NULL ? name : "");
	out->candidate = candidate;
}

uint32_t
server_clients(const struct server *v, struct page_client *out, uint32_t cap)
{
	uint32_t n = 0;

	for (const struct session *s = v->sessions; s != NULL; s = s->next) {
		if (s->state != SESSION_OPEN)
			continue;
		if (n < cap) {
			out[n] = (struct page_client){.id = s->id, .requests = s->requests, .tokens = s->tokens,
			    .uid = s->peer.uid, .pid = (uint32_t)s->peer.pid, .running = s->in_flight};
			memcpy(out[n].program, s->peer.program, sizeof(out[n].program));
			name_policy(v, s, &out[n]);
		}
		n++;
	}
	return n;
}

/* The server goes when its own three handles are closed and no session is left. */
static void
on_server_handle_closed(uv_handle_t *h)
{
	struct server *v = h->data;

	if (--v->next_id == 0)
		free(v);
}

void
server_free(struct server **vp)
{
	struct server *v = *vp;

	if (v == NULL)
		return;
	while (v->sessions != NULL) {
		for (struct session *s = v->sessions, *next; s != NULL; s = next) {
			next = s->next;
			session_close(s, NULL);
		}
		uv_run(v->loop, UV_RUN_NOWAIT);
	}
	if (v->cfg.awake != NULL)
		__atomic_store_n(v->cfg.awake, 0, __ATOMIC_SEQ_CST);
	listen_close(&v->listener);
	close(v->tok_fd);
	v->next_id = 3;
	uv_close((uv_handle_t *)&v->accept_poll, on_server_handle_closed);
	uv_close((uv_handle_t *)&v->spin, on_server_handle_closed);
	uv_close((uv_handle_t *)&v->broken_async, on_server_handle_closed);
	*vp = NULL;
}
