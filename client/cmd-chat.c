/* SPDX-License-Identifier: Apache-2.0 */
/* octet chat: a conversation, a message a line. */
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/cmd.h"

struct chat {
	octet *o;
	struct cmd_sampling sampling;
	const char *system;
	bool tty, single;           /* single: the template takes one message, nothing is remembered */
	struct octet_message *msgs; /* the texts are ours */
	size_t n, cap, n_system;    /* n_system: 1 where msgs[0] is the system message */
	uint32_t *ids;
	size_t n_ids, ids_cap;
	char *answer;
	size_t len, answer_cap;
};

static volatile sig_atomic_t interrupted;

static void
on_interrupt(int sig)
{
	(void)sig;
	interrupted = 1;
}

static int
parse(struct chat *c, int argc, char **argv)
{
	static const struct option longs[] = {CMD_SAMPLING_LONGS, {"system", required_argument, NULL, 'S'}, {NULL, 0, NULL, 0}};
	int rc = 0, ch;

	optind = 1;
	while (rc == 0 && (ch = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		if (ch == 'S')
			c->system = optarg;
		else
			rc = cmd_sampling_option(&cmd_chat, &c->sampling, ch, optarg);
	}
	if (rc == 0 && optind < argc)
		return cmd_usage(&cmd_chat, "unexpected '%s': messages come from standard input", argv[optind]);
	return rc < 0 ? 2 : rc;
}

/* ---- the conversation ---- */

/* Takes over text, which free() frees; NULL is out of memory. */
static int
add_message(struct chat *c, enum octet_role role, char *text, size_t len)
{
	struct octet_message *more = c->msgs;

	if (text != NULL && c->n == c->cap) {
		more = realloc(c->msgs, (c->cap * 2 + 8) * sizeof(*more));
		if (more != NULL) {
			c->msgs = more;
			c->cap = c->cap * 2 + 8;
		}
	}
	if (text == NULL || more == NULL) {
		free(text);
		return cmd_fail("out of memory");
	}
	c->msgs[c->n++] = (struct octet_message){role, text, len};
	return 0;
}

/* Forgets k messages after the system message. */
static void
forget(struct chat *c, size_t k)
{
	for (size_t i = 0; i < k; i++)
		free((char *)(uintptr_t)c->msgs[c->n_system + i].text);
	c->n -= k;
	memmove(c->msgs + c->n_system, c->msgs + c->n_system + k, (c->n - c->n_system) * sizeof(*c->msgs));
}

static void
forget_last(struct chat *c)
{
	free((char *)(uintptr_t)c->msgs[--c->n].text);
}

static int
encode(struct chat *c)
{
	int64_t n = octet_chat_tokens(c->o, c->msgs, c->n, 1, c->ids, c->ids_cap);

	if (n > (int64_t)c->ids_cap) {
		uint32_t *more = realloc(c->ids, (size_t)n * 2 * sizeof(*more));

		if (more == NULL)
			return cmd_fail("out of memory");
		c->ids = more;
		c->ids_cap = (size_t)n * 2;
		n = octet_chat_tokens(c->o, c->msgs, c->n, 1, c->ids, c->ids_cap);
	}
	if (n < 0)
		return cmd_fail("%s", octet_error(c->o));
	c->n_ids = (size_t)n;
	return 0;
}

/* Encodes, without the oldest turns where the context cannot hold them and an answer. An answer may want all of
 * max_tokens, but turns go for no more than half of the context. */
static int
encode_what_fits(struct chat *c)
{
	uint32_t context = octet_info(c->o)->max_context, want = c->sampling.s.max_tokens;
	size_t dropped = 0;
	int rc;

	want = want < context / 2 ? want : context / 2;
	while ((rc = encode(c)) == 0 && c->n_ids + want > context && c->n - c->n_system > 2) {
		forget(c, 2); /* a message and its answer */
		dropped++;
	}
	if (dropped == 1)
		fprintf(stderr, "octet: the context of %u tokens is full: the oldest turn is dropped\n", context);
	else if (dropped > 1)
		fprintf(stderr, "octet: the context of %u tokens is full: the oldest %zu turns are dropped\n", context, dropped);
	if (rc == 0 && c->n_ids >= context)
		return cmd_fail("a message of %zu tokens does not fit the context of %u", c->n_ids, context);
	return rc;
}

/* ---- an answer ---- */

static int
show(struct chat *c, const char *s, size_t n)
{
	if (c->len + n + 1 > c->answer_cap) {
		char *more = realloc(c->answer, (c->len + n + 1) * 2);

		if (more == NULL)
			return -ENOMEM;
		c->answer = more;
		c->answer_cap = (c->len + n + 1) * 2;
	}
	memcpy(c->answer + c->len, s, n);
	c->len += n;
	if (n > 0) {
		fwrite(s, 1, n, stdout);
		fflush(stdout);
	}
	return 0;
}

/* One event: 1 when the request is done, -errno when it failed. Sets *stop when it should be cancelled. */
static int
take(struct chat *c, octet_text *t, const struct octet_event *ev, bool *stop)
{
	const char *s;
	size_t n;
	int rc;

	if (ev->kind == OCTET_TOKEN && !*stop) {
		rc = octet_text_push(t, ev->token, &s, &n);
		if (rc < 0 || show(c, s, n) != 0)
			return -ENOMEM;
		*stop = rc == 1;
	}
	if (ev->kind != OCTET_DONE)
		return 0;
	if (ev->finish == OCTET_FAILED && !*stop) {
		cmd_fail("%s", ev->message);
		return ev->error;
	}
	return 1;
}

/* Reads until the request is done: 0, or -errno after a message. */
static int
stream(struct chat *c, int request, octet_text *t)
{
	struct octet_event ev[32];
	bool cancelled = false, stop = false;
	int rc = 0;

	while (rc == 0) {
		int n = octet_read(c->o, request, ev, 32, 200);

		if (n < 0 && n != -EINTR) {
			cmd_fail("%s", octet_error(c->o));
			return n;
		}
		for (int i = 0; i < n && rc == 0; i++)
			rc = take(c, t, &ev[i], &stop);
		if (rc == 0 && (interrupted || stop) && !cancelled)
			cancelled = octet_cancel(c->o, request) == 0;
	}
	return rc > 0 ? 0 : rc;
}

static int
answer(struct chat *c)
{
	struct octet_sampling s = c->sampling.s;
	uint32_t room = octet_info(c->o)->max_context - (uint32_t)c->n_ids;
	octet_text *t;
	const char *text;
	size_t n;
	int request, rc;

	s.max_tokens = s.max_tokens < room ? s.max_tokens : room;
	c->len = 0;
	if (octet_text_new(&t, c->o, 1, c->sampling.stop, c->sampling.n_stops) != 0)
		return cmd_fail("out of memory");
	request = octet_submit(c->o, c->ids, c->n_ids, &s);
	rc = request < 0 ? cmd_fail("%s", octet_error(c->o)) : stream(c, request, t);
	if (rc == 0 && octet_text_flush(t, &text, &n) == 0)
		show(c, text, n);
	if (request >= 0)
		printf("\n");
	fflush(stdout);
	octet_text_free(&t);
	if (rc == 0 && interrupted)
		fprintf(stderr, "octet: cancelled\n");
	return rc;
}

/* A message of the user and its answer. What failed is forgotten. */
static int
turn(struct chat *c, const char *line, size_t len)
{
	int rc = add_message(c, OCTET_USER, strndup(line, len), len);

	if (rc != 0)
		return rc;
	interrupted = 0;
	rc = encode_what_fits(c);
	if (rc == 0)
		rc = answer(c);
	interrupted = 0;
	if (rc != 0 || c->single)
		forget_last(c);
	else
		rc = add_message(c, OCTET_ASSISTANT, strndup(c->answer != NULL ? c->answer : "", c->len), c->len);
	return rc;
}

/* ---- lines ---- */

/* 1 and a line, 0 at the end. ^C at the prompt throws away what was typed; without a terminal it is an end. */
static int
next_line(struct chat *c, char **line, size_t *cap, size_t *len)
{
	for (;;) {
		ssize_t n;

		if (c->tty) {
			printf("> ");
			fflush(stdout);
		}
		errno = 0;
		n = getline(line, cap, stdin);
		if (n >= 0) {
			while (n > 0 && ((*line)[n - 1] == '\n' || (*line)[n - 1] == '\r'))
				n--;
			*len = (size_t)n;
			return 1;
		}
		if (errno != EINTR || !c->tty) {
			if (c->tty)
				printf("\n");
			return 0;
		}
		clearerr(stdin);
		fprintf(stderr, "\noctet: ^D or /quit leaves\n");
	}
}

static int
command(struct chat *c, const char *line)
{
	if (strcmp(line, "/reset") == 0) {
		forget(c, c->n - c->n_system);
		fprintf(stderr, "octet: the conversation begins anew\n");
	} else if (strcmp(line, "/help") == 0)
		fprintf(stderr, "octet: a line is a message; /reset forgets, /quit or ^D leaves, ^C ends an answer\n");
	else
		return 0;
	return 1;
}

static int
talk(struct chat *c)
{
	char *line = NULL;
	size_t cap = 0, len;
	int rc = 0;

	while (next_line(c, &line, &cap, &len) == 1) {
		line[len] = '\0';
		if (strcmp(line, "/quit") == 0)
			break;
		if (len == 0 || command(c, line))
			continue;
		/* A line that failed does not end a conversation; a daemon that is gone does. */
		if (turn(c, line, len) != 0) {
			rc = 1;
			if (octet_wait(c->o, 0) == -EPIPE)
				break;
		}
	}
	free(line);
	return rc != 0 || ferror(stdout) != 0;
}

/* Says now what the model cannot do, not after the first message. */
static int
check_template(struct chat *c)
{
	struct octet_message probe[2] = {{OCTET_SYSTEM, "", 0}, {OCTET_USER, "x", 1}};
	size_t skip = c->system == NULL;

	if (octet_chat_tokens(c->o, probe + skip, 2 - skip, 1, NULL, 0) < 0)
		return cmd_fail("%s", octet_error(c->o));
	c->single = octet_chat_kind(c->o) == OCTET_CHAT_SINGLE;
	if (c->single)
		fprintf(stderr, "octet: %s takes one message at a time: every line is answered by itself\n",
		    octet_info(c->o)->model);
	if (c->system == NULL)
		return 0;
	c->n_system = 1;
	return add_message(c, OCTET_SYSTEM, strdup(c->system), strlen(c->system));
}

static int
run(int argc, char **argv, const char *socket)
{
	struct chat c = {.sampling.s = {.max_tokens = 256, .top_p = 1}};
	struct sigaction sa = {.sa_handler = on_interrupt}; /* no SA_RESTART: getline() returns */
	int rc = parse(&c, argc, argv);

	if (rc != 0)
		return rc;
	c.tty = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
	if ((c.o = cmd_open(socket)) == NULL)
		return 1;
	sigaction(SIGINT, &sa, NULL);
	rc = check_template(&c);
	if (rc == 0)
		rc = talk(&c);
	octet_close(&c.o);
	while (c.n > 0)
		forget_last(&c);
	free(c.msgs), free(c.ids), free(c.answer);
	return rc;
}

const struct cmd cmd_chat = {"chat", "[--system TEXT] " CMD_SAMPLING_ARGS,
    "a conversation: a message a line, /reset, /quit; ^C ends an answer", run};
