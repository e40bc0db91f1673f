/* SPDX-License-Identifier: Apache-2.0 */
#include "client/ctl.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define CTL_MAX_REPLY (64u << 20)

struct ctl {
	int fd;
	int page_fd;        /* last descriptor received, -1 */
	bool operator;      /* as the daemon said with the page */
	char *buf;          /* bytes received and not yet a line */
	size_t len, cap;
};

char *
ctl_default_path(int data)
{
	const char *set = getenv(data ? "OCTET_SOCKET" : "OCTET_CONTROL_SOCKET"), *run = getenv("XDG_RUNTIME_DIR");
	char *path = NULL, *base = NULL;
	size_t n;

	if (set != NULL && *set != '\0')
		return strdup(set);
	if (!data) {
		/* Beside the data socket: X.sock -> X-control.sock. */
		base = ctl_default_path(1);
		if (base == NULL)
			return NULL;
		n = strlen(base);
		if (n > 5 && strcmp(base + n - 5, ".sock") == 0)
			n -= 5;
		if (asprintf(&path, "%.*s-control.sock", (int)n, base) < 0)
			path = NULL;
		free(base);
		return path;
	}
	if (run != NULL && *run != '\0') {
		if (asprintf(&path, "%s/octet/octet.sock", run) < 0)
			return NULL;
		return path;
	}
	return strdup("/run/octet/octet.sock");
}

int
ctl_open(struct ctl **out, const char *path, struct err *err)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	char *def = NULL;
	struct ctl *c;
	int rc = 0;

	*out = NULL;
	if (path == NULL)
		path = def = ctl_default_path(0);
	c = calloc(1, sizeof(*c));
	if (path == NULL || c == NULL) {
		free(def), free(c);
		return err_set(err, -ENOMEM, "out of memory");
	}
	c->page_fd = -1;
	c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (c->fd < 0)
		rc = err_set(err, -errno, "socket: %s", strerror(errno));
	else if (strlen(path) >= sizeof(sa.sun_path))
		rc = err_set(err, -ENAMETOOLONG, "%s: longer than the %zu bytes of a socket path", path,
		    sizeof(sa.sun_path) - 1);
	else {
		strcpy(sa.sun_path, path);
		if (connect(c->fd, (struct sockaddr *)&sa, sizeof(sa)) != 0) {
			int e = errno;

			rc = err_set(err, -e, "cannot connect to %s: %s%s", path, strerror(e),
			    e == ENOENT || e == ECONNREFUSED ? ": is octetd running?" : "");
		}
	}
	free(def);
	if (rc != 0)
		ctl_close(&c);
	*out = c;
	return rc;
}

void
ctl_close(struct ctl **cp)
{
	struct ctl *c = *cp;

	if (c == NULL)
		return;
	if (c->fd >= 0)
		close(c->fd);
	if (c->page_fd >= 0)
		close(c->page_fd);
	free(c->buf);
	free(c);
	*cp = NULL;
}

static int64_t
now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* Waits for the socket until the deadline (-1: none). */
static int
ctl_wait(struct ctl *c, short events, int64_t deadline)
{
	struct pollfd p = {.fd = c->fd, .events = events};

	for (;;) {
		int64_t left = deadline < 0 ? -1 : deadline - now_ms();
		int n;

		if (deadline >= 0 && left < 0)
			left = 0;
		n = poll(&p, 1, (int)left);
		if (n > 0)
			return 0;
		if (n == 0)
			return -ETIMEDOUT;
		if (errno != EINTR)
			return -errno;
	}
}

static int
ctl_send(struct ctl *c, const char *text, size_t n, int64_t deadline)
{
	while (n > 0) {
		ssize_t k = send(c->fd, text, n, MSG_NOSIGNAL | MSG_DONTWAIT);
		int rc;

		if (k > 0) {
			text += k;
			n -= (size_t)k;
		} else if (errno != EAGAIN && errno != EINTR)
			return -errno;
		else if ((rc = ctl_wait(c, POLLOUT, deadline)) != 0)
			return rc;
	}
	return 0;
}

/* Keeps the one descriptor a message may carry. */
static void
keep_fd(struct ctl *c, struct msghdr *msg)
{
	for (struct cmsghdr *h = CMSG_FIRSTHDR(msg); h != NULL; h = CMSG_NXTHDR(msg, h)) {
		if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS || h->cmsg_len != CMSG_LEN(sizeof(int)))
			continue;
		if (c->page_fd >= 0)
			close(c->page_fd);
		memcpy(&c->page_fd, CMSG_DATA(h), sizeof(int));
	}
}

static int
ctl_receive(struct ctl *c, int64_t deadline)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
	struct iovec iov;
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	ssize_t n;
	int rc;

	if (c->cap - c->len < 4096) {
		size_t cap = c->cap == 0 ? 16384 : c->cap * 2;
		char *buf;

		if (cap > CTL_MAX_REPLY)
			return -EMSGSIZE;
		buf = realloc(c->buf, cap);
		if (buf == NULL)
			return -ENOMEM;
		c->buf = buf;
		c->cap = cap;
	}
	if ((rc = ctl_wait(c, POLLIN, deadline)) != 0)
		return rc;
	iov = (struct iovec){c->buf + c->len, c->cap - c->len};
	n = recvmsg(c->fd, &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (n == 0)
		return -EPIPE;
	keep_fd(c, &msg);
	c->len += (size_t)n;
	return 0;
}

static int
ctl_receive_line(struct ctl *c, int64_t deadline, json_t **reply, struct err *err)
{
	json_error_t je;
	char *nl;

	while (c->len == 0 || (nl = memchr(c->buf, '\n', c->len)) == NULL) {
		int rc = ctl_receive(c, deadline);

		if (rc == -EPIPE)
			return err_set(err, rc, "octetd closed the connection");
		if (rc == -ETIMEDOUT)
			return err_set(err, rc, "octetd did not answer in time");
		if (rc != 0)
			return err_set(err, rc, "receive: %s", strerror(-rc));
	}
	*reply = json_loadb(c->buf, (size_t)(nl - c->buf), 0, &je);
	c->len -= (size_t)(nl + 1 - c->buf);
	memmove(c->buf, nl + 1, c->len);
	if (*reply == NULL || !json_is_object(*reply)) {
		json_decref(*reply);
		*reply = NULL;
		return err_set(err, -EPROTO, "octetd sent no JSON object: %s", je.text);
	}
	return 0;
}

int
ctl_call(struct ctl *c, json_t *request, json_t **reply, int timeout_ms, struct err *err)
{
	int64_t deadline = timeout_ms < 0 ? -1 : now_ms() + timeout_ms;
	char *text = json_dumps(request, JSON_COMPACT), *line = NULL;
	int n, rc;

	*reply = NULL;
	if (text == NULL || (n = asprintf(&line, "%s\n", text)) < 0) {
		free(text);
		return err_set(err, -ENOMEM, "out of memory");
	}
	free(text);
	rc = ctl_send(c, line, (size_t)n, deadline);
	free(line);
	/* A daemon that refuses us may have answered before it closed. */
	if (rc != 0 && rc != -EPIPE)
		return err_set(err, rc, "send: %s", strerror(-rc));
	rc = ctl_receive_line(c, deadline, reply, err);
	if (rc != 0)
		return rc;
	if (json_is_true(json_object_get(*reply, "ok")))
		return 0;
	rc = (int)json_integer_value(json_object_get(*reply, "code"));
	err_set(err, rc < 0 ? rc : -EREMOTEIO, "%s",
	    json_is_string(json_object_get(*reply, "error")) ? json_string_value(json_object_get(*reply, "error"))
	                                                     : "refused without a reason");
	return rc < 0 ? rc : -EREMOTEIO;
}

int
ctl_page(struct ctl *c, const struct octet_page **out, struct err *err)
{
	json_t *request = json_pack("{s:s}", "verb", "page"), *reply = NULL;
	struct stat st;
	void *p;
	int rc, seals;

	*out = NULL;
	if (request == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	rc = ctl_call(c, request, &reply, 5000, err);
	json_decref(request);
	c->operator = json_is_true(json_object_get(reply, "operator"));
	json_decref(reply);
	if (rc != 0)
		return rc;
	if (c->page_fd < 0)
		return err_set(err, -EPROTO, "octetd sent no status page");
	if (fstat(c->page_fd, &st) != 0 || (uint64_t)st.st_size < sizeof(struct octet_page))
		rc = err_set(err, -EPROTO, "the status page is too short: octetd of another version?");
	else if ((seals = fcntl(c->page_fd, F_GET_SEALS)) < 0 || !(seals & F_SEAL_SHRINK))
		rc = err_set(err, -EPROTO, "the status page could shrink while it is read: not sealed");
	if (rc == 0) {
		p = mmap(NULL, sizeof(struct octet_page), PROT_READ, MAP_SHARED, c->page_fd, 0);
		if (p == MAP_FAILED)
			rc = err_set(err, -errno, "status page: %s", strerror(errno));
		else
			*out = p;
	}
	close(c->page_fd);
	c->page_fd = -1;
	if (rc == 0 && ((*out)->magic != PAGE_MAGIC || (*out)->version != PAGE_VERSION)) {
		ctl_page_free(out);
		rc = err_set(err, -EPROTO, "the status page is of another version");
	}
	return rc;
}

int
ctl_take_fd(struct ctl *c)
{
	int fd = c->page_fd;

	c->page_fd = -1;
	return fd;
}

bool
ctl_operator(const struct ctl *c)
{
	return c->operator;
}

bool
ctl_alive(const struct ctl *c)
{
	struct pollfd p = {.fd = c->fd, .events = POLLIN};

	/* It speaks only when asked: readable means that it closed. */
	return poll(&p, 1, 0) == 0;
}

void
ctl_page_free(const struct octet_page **page)
{
	if (*page != NULL)
		munmap((void *)(uintptr_t)*page, sizeof(**page));
	*page = NULL;
}

#define TERMINATE(s) ((s)[sizeof(s) - 1] = '\0')

void
page_sanitise(struct octet_page *p)
{
	TERMINATE(p->octet_version), TERMINATE(p->model), TERMINATE(p->backend), TERMINATE(p->cpu_level);
	TERMINATE(p->policy), TERMINATE(p->sweep_from), TERMINATE(p->sweep_format), TERMINATE(p->shadow_baseline);
	TERMINATE(p->rollout), TERMINATE(p->surge_policy), TERMINATE(p->surge_state);
	if (p->n_layers > PAGE_LAYERS)
		p->n_layers = PAGE_LAYERS;
	if (p->n_groups > PAGE_GROUPS)
		p->n_groups = PAGE_GROUPS;
	if (p->n_formats > PAGE_FORMATS)
		p->n_formats = PAGE_FORMATS;
	if (p->n_history > PAGE_HISTORY)
		p->n_history = PAGE_HISTORY;
	if (p->n_clients > PAGE_CLIENTS)
		p->n_clients = PAGE_CLIENTS;
	if (p->n_evals > PAGE_EVALS)
		p->n_evals = PAGE_EVALS;
	for (uint32_t i = 0; i < PAGE_GROUPS; i++)
		TERMINATE(p->group[i]);
	for (uint32_t i = 0; i < PAGE_FORMATS; i++)
		TERMINATE(p->format[i]);
	for (uint32_t i = 0; i < PAGE_HISTORY; i++) {
		struct page_history *h = &p->history[i];

		TERMINATE(h->program), TERMINATE(h->why), TERMINATE(h->change), TERMINATE(h->result), TERMINATE(h->policy);
	}
	for (uint32_t i = 0; i < PAGE_CLIENTS; i++)
		TERMINATE(p->client[i].program), TERMINATE(p->client[i].policy);
	for (uint32_t i = 0; i < PAGE_EVALS; i++)
		TERMINATE(p->eval[i].baseline), TERMINATE(p->eval[i].candidate), TERMINATE(p->eval[i].corpus);
	for (uint32_t i = 0; i < PAGE_LOG; i++)
		TERMINATE(p->log[i]);
}

int
page_read(const struct octet_page *page, struct octet_page *copy)
{
	for (int tries = 0; tries < 1000; tries++) {
		uint32_t seq = __atomic_load_n(&page->seq, __ATOMIC_ACQUIRE);

		if (seq % 2 == 0) {
			memcpy(copy, page, sizeof(*copy));
			__atomic_thread_fence(__ATOMIC_ACQUIRE);
			if (__atomic_load_n(&page->seq, __ATOMIC_RELAXED) == seq) {
				page_sanitise(copy);
				return 0;
			}
		}
		__builtin_ia32_pause();
	}
	return -EAGAIN;
}
