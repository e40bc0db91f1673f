/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/control.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/eval.h"
#include "daemon/log.h"
#include "daemon/octetd.h"
#include "daemon/rollout.h"
#include "daemon/status.h"

#define MAX_LINE 65536u         /* a request, newline included */
#define MAX_REPLY (16u << 20)
#define MAX_CONNS 32u
#define MAX_VIEWERS 24u         /* so that viewers cannot keep operators out */
#define LINES_PER_WAKE 16u
#define ACCEPTS_PER_WAKE 16u

/* A connection is read from only in READING.
 *
 *   READING -> BUSY (a verb answers later) -> WRITING (a reply is unread) -> READING
 *   READING -> WRITING; any -> CLOSED
 */
enum conn_state { CONN_READING, CONN_BUSY, CONN_WRITING, CONN_CLOSED };

struct conn {
	uv_poll_t poll;
	struct control *ctl;
	struct conn *next;
	int fd;
	enum conn_state state;
	struct peer peer;
	bool eof, watches;
	bool last;              /* close once the reply is out */
	bool executing;         /* inside a verb: whoever called it goes on */
	char in[MAX_LINE];
	size_t in_len;
	char *out;
	size_t out_len, out_at;
	struct eval *eval;
	int out_fd;             /* goes with the first byte of out; borrowed, -1: none */
};

struct call {
	struct conn conn;
};

struct control {
	uv_poll_t poll;
	struct octetd *d;
	struct listener listener;
	struct conn *conns;
	uint32_t n_conns;
};

static const struct verb *const verbs[] = {&verb_status, &verb_plan, &verb_set, &verb_use, &verb_rollback, &verb_history,
    &verb_reload, &verb_clients, &verb_page, &verb_confirm, &verb_drain, &verb_resume, &verb_save, &verb_eval,
    &verb_evals, &verb_rollout};

static void conn_run(struct conn *);

static void
conn_set_state(struct conn *c, enum conn_state to)
{
	static const bool may[4][4] = {
		[CONN_READING] = {[CONN_BUSY] = true, [CONN_WRITING] = true, [CONN_CLOSED] = true},
		[CONN_BUSY] = {[CONN_WRITING] = true, [CONN_CLOSED] = true},
		[CONN_WRITING] = {[CONN_READING] = true, [CONN_CLOSED] = true},
	};

	if (!may[c->state][to])
		abort(); /* our own bug */
	c->state = to;
}

static void
on_conn_closed(uv_handle_t *h)
{
	struct conn *c = h->data;

	close(c->fd);
	peer_clear(&c->peer);
	free(c->out);
	free(c);
}

static void
conn_close(struct conn *c)
{
	struct conn **at = &c->ctl->conns;

	if (c->state == CONN_CLOSED)
		return;
	conn_set_state(c, CONN_CLOSED);
	while (*at != c)
		at = &(*at)->next;
	*at = c->next;
	c->ctl->n_conns--;
	if (c->watches)
		status_unwatch(c->ctl->d->status);
	eval_drop(&c->eval);
	uv_close((uv_handle_t *)&c->poll, on_conn_closed);
}

static bool
is_operator(const struct octetd *d, const struct peer *p)
{
	return peer_allowed(p, d->conf->operators) > 0;
}

static bool
is_viewer(const struct octetd *d, const struct peer *p)
{
	return is_operator(d, p) || peer_allowed(p, d->conf->viewers) > 0;
}

/* ---- replies ---- */

json_t *
json_lossy(const char *s)
{
	json_t *j = json_string(s);
	char *copy;

	if (j != NULL || (copy = strdup(s)) == NULL)
		return j;
	for (char *p = copy; *p != '\0'; p++)
		if ((unsigned char)*p > '~')
			*p = '?';
	j = json_string(copy);
	free(copy);
	return j;
}

/* The reply as a line; a fixed one where memory or size does not allow more. */
static char *
reply_line(json_t *reply, size_t *len)
{
	char *text = reply != NULL ? json_dumps(reply, JSON_COMPACT) : NULL, *line;
	const char *instead = NULL;

	if (text == NULL)
		instead = "{\"ok\":false,\"error\":\"out of memory\",\"code\":-12}";
	else if (strlen(text) > MAX_REPLY)
		instead = "{\"ok\":false,\"error\":\"the reply is too long; ask for less with limit\",\"code\":-90}";
	if (instead != NULL) {
		free(text);
		text = strdup(instead);
	}
	if (text == NULL)
		return NULL;
	*len = strlen(text);
	line = realloc(text, *len + 1);
	line[(*len)++] = '\n'; /* takes the place of the terminator */
	return line;
}

/* What was sent already is read, so that close() is no reset to a peer that
 * has not yet read our last word. */
static void
discard_input(int fd)
{
	char sink[4096];

	for (int i = 0; i < 64 && recv(fd, sink, sizeof(sink), MSG_DONTWAIT) > 0;)
		i++;
}

/* Writes what the socket takes. 0 when all is out, -EAGAIN, or an error. */
static int
conn_flush(struct conn *c)
{
	while (c->out_at < c->out_len) {
		_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
		struct iovec iov = {c->out + c->out_at, c->out_len - c->out_at};
		struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
		ssize_t n;

		if (c->out_fd >= 0) {
			struct cmsghdr *h;

			msg.msg_control = control, msg.msg_controllen = sizeof(control);
			h = CMSG_FIRSTHDR(&msg);
			h->cmsg_level = SOL_SOCKET, h->cmsg_type = SCM_RIGHTS, h->cmsg_len = CMSG_LEN(sizeof(int));
			memcpy(CMSG_DATA(h), &c->out_fd, sizeof(int));
		}
		n = sendmsg(c->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		c->out_fd = -1;
		c->out_at += (size_t)n;
	}
	free(c->out);
	c->out = NULL;
	c->out_len = c->out_at = 0;
	return 0;
}

/* Takes the reference. */
static void
conn_reply(struct conn *c, json_t *reply)
{
	conn_set_state(c, CONN_WRITING);
	c->out = reply_line(reply, &c->out_len);
	json_decref(reply);
	if (c->out == NULL)
		conn_close(c);
}

static json_t *
refusal(int code, const char *why)
{
	return json_pack("{s:b,s:o,s:i}", "ok", 0, "error", json_lossy(why), "code", code);
}

const struct peer *
call_peer(const struct call *call)
{
	return &call->conn.peer;
}

bool
call_is_operator(const struct call *call)
{
	return is_operator(call->conn.ctl->d, &call->conn.peer);
}

void
call_reply(struct call *call, json_t *reply)
{
	if (reply != NULL)
		json_object_set_new(reply, "ok", json_true());
	conn_reply(&call->conn, reply);
	if (!call->conn.executing)
		conn_run(&call->conn);
}

void
call_refuse(struct call *call, int code, const char *why)
{
	conn_reply(&call->conn, refusal(code, why));
	if (!call->conn.executing)
		conn_run(&call->conn);
}

void
call_watch(struct call *call, int fd)
{
	struct conn *c = &call->conn;

	c->out_fd = fd;
	if (!c->watches)
		status_watch(c->ctl->d->status);
	c->watches = true;
}

void
call_attach(struct call *call, int fd)
{
	call->conn.out_fd = fd;
}

struct eval **
call_eval(struct call *call)
{
	return &call->conn.eval;
}

/* ---- requests ---- */

static bool
has_type(const json_t *value, enum field_type type)
{
	switch (type) {
	case FIELD_STRING: return json_is_string(value);
	case FIELD_BOOL: return json_is_boolean(value);
	case FIELD_NUMBER: return json_is_integer(value) && json_integer_value(value) >= 0;
	case FIELD_ARRAY: return json_is_array(value);
	}
	return false;
}

/* A field that is misspelt must not be taken for one left out: dry_run. */
static int
check_fields(const struct verb *v, const json_t *request, struct err *err)
{
	static const char *const type_names[] = {"a string", "true or false", "a whole number, not negative", "an array"};
	const char *key;
	json_t *value;

	json_object_foreach((json_t *)(uintptr_t)request, key, value) {
		const struct verb_field *f = v->fields;

		if (strcmp(key, "verb") == 0)
			continue;
		while (f->name != NULL && strcmp(f->name, key) != 0)
			f++;
		if (f->name == NULL)
			return err_set(err, -EINVAL, "%s: unknown field '%.60s'", v->name, key);
		if (!has_type(value, f->type))
			return err_set(err, -EINVAL, "%s: '%s' must be %s", v->name, key, type_names[f->type]);
	}
	for (const struct verb_field *f = v->fields; f->name != NULL; f++)
		if (f->required && json_object_get(request, f->name) == NULL)
			return err_set(err, -EINVAL, "%s: '%s' is missing", v->name, f->name);
	return 0;
}

static const struct verb *
find_verb(const json_t *request, struct err *err)
{
	const json_t *name = json_object_get(request, "verb");

	if (!json_is_string(name)) {
		err_set(err, -EINVAL, "no 'verb' in the request");
		return NULL;
	}
	for (size_t i = 0; i < sizeof(verbs) / sizeof(*verbs); i++)
		if (strcmp(json_string_value(name), verbs[i]->name) == 0)
			return verbs[i];
	err_set(err, -EINVAL, "unknown verb '%.60s'", json_string_value(name));
	return NULL;
}

/* Lists may have changed since the connection came: asked each time. */
static int
check_access(const struct octetd *d, const struct peer *p, const struct verb *v, struct err *err)
{
	if (v->operator && !is_operator(d, p))
		return err_set(err, -EACCES, "verb '%s' needs an operator: uid %u is a viewer", v->name, (unsigned)p->uid);
	if (!is_viewer(d, p))
		return err_set(err, -EACCES, "uid %u is neither viewer nor operator", (unsigned)p->uid);
	return 0;
}

static int
execute(struct conn *c, const json_t *request, json_t **reply, struct err *err)
{
	const struct verb *v = find_verb(request, err);
	int rc;

	if (v == NULL)
		return -EINVAL;
	if ((rc = check_access(c->ctl->d, &c->peer, v, err)) != 0 || (rc = check_fields(v, request, err)) != 0)
		return rc;
	return v->exec(c->ctl->d, (struct call *)c, request, reply, err);
}

static void
take_line(struct conn *c, const char *line, size_t len)
{
	json_t *request, *reply = NULL;
	struct err err = {""};
	json_error_t je;
	int rc;

	request = json_loadb(line, len, JSON_REJECT_DUPLICATES, &je);
	if (request == NULL)
		rc = err_set(&err, -EINVAL, "no JSON: %s", je.text);
	else if (!json_is_object(request))
		rc = err_set(&err, -EINVAL, "a request is a JSON object");
	else {
		/* Before exec, which may answer at once by call_reply(). */
		conn_set_state(c, CONN_BUSY);
		c->executing = true;
		rc = execute(c, request, &reply, &err);
		c->executing = false;
	}
	json_decref(request);
	if (rc == VERB_LATER)
		return;
	if (rc == 0 && reply != NULL)
		json_object_set_new(reply, "ok", json_true());
	conn_reply(c, rc == 0 ? reply : refusal(rc, err.text));
}

/* One line off the input, if there is one. */
static bool
next_line(struct conn *c)
{
	char *nl = memchr(c->in, '\n', c->in_len);
	char line[MAX_LINE];
	size_t len;

	if (nl == NULL && c->in_len == sizeof(c->in)) {
		c->in_len = 0;
		c->last = true;
		conn_reply(c, refusal(-EMSGSIZE, "a request of more than 65536 bytes"));
		return true;
	}
	if (nl == NULL && !(c->eof && c->in_len > 0))
		return false;
	len = nl != NULL ? (size_t)(nl - c->in) : c->in_len;
	memcpy(line, c->in, len);
	c->in_len -= nl != NULL ? len + 1 : len;
	memmove(c->in, c->in + len + 1, c->in_len);
	take_line(c, line, len);
	return true;
}

static void on_conn(uv_poll_t *, int status, int events);

/* Goes on as far as it can, then waits for what it needs. */
static void
conn_run(struct conn *c)
{
	int wait = UV_READABLE, rc;

	for (uint32_t lines = 0;;) {
		if (c->state == CONN_WRITING) {
			rc = conn_flush(c);
			if (rc == -EAGAIN) {
				wait = UV_WRITABLE;
				break;
			}
			if (rc != 0 || c->last) {
				discard_input(c->fd);
				conn_close(c);
				return;
			}
			conn_set_state(c, CONN_READING);
		}
		if (c->state != CONN_READING)
			break;
		if (lines++ == LINES_PER_WAKE) { /* others first */
			wait = UV_WRITABLE;
			break;
		}
		if (!next_line(c)) {
			if (c->eof) {
				conn_close(c);
				return;
			}
			break;
		}
	}
	if (c->state == CONN_BUSY)
		uv_poll_stop(&c->poll);
	else if (c->state != CONN_CLOSED)
		uv_poll_start(&c->poll, wait, on_conn);
}

static void
on_conn(uv_poll_t *h, int status, int events)
{
	struct conn *c = h->data;

	(void)status, (void)events; /* errors show in recv and send */
	if (c->state == CONN_READING && !c->eof && c->in_len < sizeof(c->in)) {
		ssize_t n = recv(c->fd, c->in + c->in_len, sizeof(c->in) - c->in_len, MSG_DONTWAIT);

		if (n == 0)
			c->eof = true;
		else if (n > 0)
			c->in_len += (size_t)n;
		else if (errno != EAGAIN && errno != EINTR) {
			conn_close(c);
			return;
		}
	}
	conn_run(c);
}

/* ---- connections ---- */

static void
turn_away(int fd, int code, const char *why)
{
	size_t len;
	char *line = NULL;
	json_t *j = refusal(code, why);

	line = reply_line(j, &len);
	json_decref(j);
	if (line != NULL && send(fd, line, len, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		log_debug("control.refuse", "error=%s", strerror(errno));
	free(line);
	discard_input(fd);
	close(fd);
}

static int
admit(const struct control *ctl, const struct peer *p, struct err *err)
{
	if (!is_viewer(ctl->d, p))
		return err_set(err, -EACCES, "uid %u is neither viewer nor operator", (unsigned)p->uid);
	if (ctl->n_conns >= (is_operator(ctl->d, p) ? MAX_CONNS : MAX_VIEWERS))
		return err_set(err, -EBUSY, "too many control connections: %u are open", ctl->n_conns);
	return 0;
}

static void
conn_new(struct control *ctl, int fd)
{
	struct peer peer = {0};
	struct err err = {""};
	struct conn *c = NULL;
	int rc = peer_get(&peer, fd);

	if (rc != 0)
		err_set(&err, rc, "who is there: %s", strerror(-rc));
	else
		rc = admit(ctl, &peer, &err);
	if (rc == 0 && (c = calloc(1, sizeof(struct call))) == NULL)
		rc = err_set(&err, -ENOMEM, "out of memory");
	if (rc == 0 && (rc = uv_poll_init(&ctl->d->loop, &c->poll, fd)) != 0)
		err_set(&err, rc, "poll: %s", uv_strerror(rc));
	if (rc != 0) {
		log_warn("control.refuse", "uid=%u pid=%d program=%s why=%s", (unsigned)peer.uid, (int)peer.pid,
		    LOG_Q(peer.program), LOG_Q(err.text));
		peer_clear(&peer);
		free(c);
		turn_away(fd, rc, err.text);
		return;
	}
	c->poll.data = c;
	c->ctl = ctl, c->fd = fd, c->peer = peer, c->out_fd = -1;
	c->next = ctl->conns;
	ctl->conns = c;
	ctl->n_conns++;
	log_debug("control.connect", "uid=%u pid=%d program=%s", (unsigned)peer.uid, (int)peer.pid, LOG_Q(peer.program));
	uv_poll_start(&c->poll, UV_READABLE, on_conn);
}

static void
on_listener(uv_poll_t *h, int status, int events)
{
	struct control *ctl = h->data;

	(void)status, (void)events;
	for (uint32_t i = 0; i < ACCEPTS_PER_WAKE; i++) {
		int fd = listen_accept(&ctl->listener);

		if (fd < 0)
			return;
		conn_new(ctl, fd);
	}
}

int
control_new(struct control **out, struct octetd *d, const char *path, unsigned mode, struct err *err)
{
	struct control *ctl = calloc(1, sizeof(*ctl));
	int rc;

	*out = NULL;
	if (ctl == NULL)
		return err_set(err, -ENOMEM, "no memory for the control socket");
	ctl->d = d;
	rc = listen_open(&ctl->listener, path, SOCK_STREAM, mode, err);
	if (rc != 0) {
		free(ctl);
		return rc;
	}
	rc = uv_poll_init(&d->loop, &ctl->poll, ctl->listener.fd);
	if (rc != 0) {
		listen_close(&ctl->listener);
		free(ctl);
		return err_set(err, rc, "%s: %s", path, uv_strerror(rc));
	}
	ctl->poll.data = ctl;
	uv_poll_start(&ctl->poll, UV_READABLE, on_listener);
	*out = ctl;
	return 0;
}

static void
on_control_closed(uv_handle_t *h)
{
	struct control *ctl = h->data;

	listen_close(&ctl->listener);
	free(ctl);
}

void
control_free(struct control **ctlp)
{
	struct control *ctl = *ctlp;

	if (ctl == NULL)
		return;
	while (ctl->conns != NULL)
		conn_close(ctl->conns);
	uv_close((uv_handle_t *)&ctl->poll, on_control_closed);
	*ctlp = NULL;
}
