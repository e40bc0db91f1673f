/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/cmd.h"

#define MAX_STOPS 16
#define MAX_BIAS 1024

struct complete {
	struct octet_sampling sampling;
	const char *stop[MAX_STOPS];
	size_t n_stops;
	bool raw, json;
	const char *prompt_arg;

	char *prompt;          /* text */
	size_t prompt_len;
	uint32_t *ids;
	int64_t n_ids;

	char *text;            /* what was shown */
	size_t text_len, text_cap;
	json_t *tokens, *segments, *logprobs, *prompt_logprobs;
	json_t *alternatives;  /* list that OCTET_ALTERNATIVE events go to, borrowed; NULL: none */
	struct octet_bias bias[MAX_BIAS];
	const char *replay_file;
	struct octet_segment *replay;
	json_t *replayed;      /* the summary that is run again */
	uint64_t n_output;
	double start, first;
	const char *finish;
	char error[160];
};

static volatile sig_atomic_t interrupted;

static void
on_interrupt(int sig)
{
	(void)sig;
	interrupted = 1;
}

/* ID=VALUE */
static int
parse_bias(struct complete *c, char *arg)
{
	struct octet_bias *b = &c->bias[c->sampling.n_bias];
	char *equals = strchr(arg, '=');
	uint64_t id;
	int rc;

	if (c->sampling.n_bias == MAX_BIAS)
		return cmd_usage(&cmd_complete, "more than %d --logit-bias", MAX_BIAS);
	if (equals == NULL)
		return cmd_usage(&cmd_complete, "--logit-bias '%s' is not ID=VALUE", arg);
	*equals = '\0';
	if ((rc = cmd_u64(&cmd_complete, "--logit-bias", arg, 0, UINT32_MAX, &id)) != 0 ||
	    (rc = cmd_float(&cmd_complete, "--logit-bias", equals + 1, -100, 100, &b->value)) != 0)
		return rc;
	b->id = (uint32_t)id;
	c->sampling.bias = c->bias;
	c->sampling.n_bias++;
	return 0;
}

static int
parse(struct complete *c, int argc, char **argv)
{
	static const struct option longs[] = {
		{"max-tokens", required_argument, NULL, 'm'}, {"temperature", required_argument, NULL, 't'},
		{"top-p", required_argument, NULL, 'p'}, {"top-k", required_argument, NULL, 'k'},
		{"seed", required_argument, NULL, 's'}, {"stop", required_argument, NULL, 'x'},
		{"min-p", required_argument, NULL, 'n'}, {"repetition-penalty", required_argument, NULL, 'R'},
		{"presence-penalty", required_argument, NULL, 'P'}, {"frequency-penalty", required_argument, NULL, 'F'},
		{"logit-bias", required_argument, NULL, 'b'}, {"prompt-logprobs", no_argument, NULL, 'L'},
		{"policy", required_argument, NULL, 'o'}, {"replay", required_argument, NULL, 'y'},
		{"ignore-eos", no_argument, NULL, 'e'}, {"logprobs", required_argument, NULL, 'l'},
		{"raw", no_argument, NULL, 'r'}, {"json", no_argument, NULL, 'j'}, {NULL, 0, NULL, 0}};
	uint64_t n = 0;
	int rc = 0, ch;

	optind = 1;
	while (rc == 0 && (ch = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		switch (ch) {
		case 'm':
			rc = cmd_u64(&cmd_complete, "--max-tokens", optarg, 1, UINT32_MAX, &n);
			c->sampling.max_tokens = (uint32_t)n;
			break;
		case 't': rc = cmd_float(&cmd_complete, "--temperature", optarg, 0, 100, &c->sampling.temperature); break;
		case 'p': rc = cmd_float(&cmd_complete, "--top-p", optarg, 1e-9, 1, &c->sampling.top_p); break;
		case 'k':
			rc = cmd_u64(&cmd_complete, "--top-k", optarg, 0, UINT32_MAX, &n);
			c->sampling.top_k = (uint32_t)n;
			break;
		case 's': rc = cmd_u64(&cmd_complete, "--seed", optarg, 0, UINT64_MAX, &c->sampling.seed); break;
		case 'x':
			if (*optarg == '\0')
				return cmd_usage(&cmd_complete, "--stop is empty");
			if (c->n_stops == MAX_STOPS)
				return cmd_usage(&cmd_complete, "more than %d --stop strings", MAX_STOPS);
			c->stop[c->n_stops++] = optarg;
			break;
		case 'e': c->sampling.ignore_eos = 1; break;
		case 'n': rc = cmd_float(&cmd_complete, "--min-p", optarg, 0, 1, &c->sampling.min_p); break;
		case 'R':
			rc = cmd_float(&cmd_complete, "--repetition-penalty", optarg, 0.01, 100, &c->sampling.repetition_penalty);
			break;
		case 'P':
			rc = cmd_float(&cmd_complete, "--presence-penalty", optarg, -100, 100, &c->sampling.presence_penalty);
			break;
		case 'F':
			rc = cmd_float(&cmd_complete, "--frequency-penalty", optarg, -100, 100, &c->sampling.frequency_penalty);
			break;
		case 'b': rc = parse_bias(c, optarg); break;
		case 'o': c->sampling.policy = optarg; break;
		case 'y': c->replay_file = optarg; break;
		case 'l':
			/* The chosen token's, and N - 1 alternatives' beside it. */
			rc = cmd_u64(&cmd_complete, "--logprobs", optarg, 0, 20, &n);
			c->sampling.logprobs = n != 0;
			c->sampling.top_logprobs = n > 1 ? (int)n : 0;
			break;
		case 'L': c->sampling.prompt_logprobs = 1; break;
		case 'r': c->raw = true; break;
		case 'j': c->json = true; break;
		default: return 2;
		}
	}
	if (rc == 0 && argc - optind > 1)
		return cmd_usage(&cmd_complete, "more than one PROMPT: put it in quotes");
	c->prompt_arg = optind < argc ? argv[optind] : NULL;
	if (rc == 0 && c->prompt_arg == NULL && isatty(STDIN_FILENO))
		return cmd_usage(&cmd_complete, "PROMPT is missing");
	return rc;
}

static int
read_prompt(struct complete *c)
{
	size_t cap = 0;

	if (c->prompt_arg != NULL && strcmp(c->prompt_arg, "-") != 0) {
		c->prompt = strdup(c->prompt_arg);
		c->prompt_len = strlen(c->prompt_arg);
		return c->prompt == NULL ? -ENOMEM : 0;
	}
	for (;;) {
		ssize_t n;

		if (cap - c->prompt_len < 4096) {
			char *more;

			cap = cap == 0 ? 16384 : cap * 2;
			more = realloc(c->prompt, cap);
			if (more == NULL)
				return -ENOMEM;
			c->prompt = more;
		}
		n = read(STDIN_FILENO, c->prompt + c->prompt_len, cap - c->prompt_len);
		if (n < 0 && errno != EINTR)
			return -errno;
		if (n == 0)
			return 0;
		c->prompt_len += n > 0 ? (size_t)n : 0;
	}
}

static int64_t
encode(struct complete *c, octet *o, uint32_t *ids, size_t cap)
{
	if (c->raw)
		return octet_tokenize(o, c->prompt, c->prompt_len, OCTET_SPECIAL | OCTET_BOS, ids, cap);
	return octet_template(o, c->prompt, c->prompt_len, ids, cap);
}

static int
tokenize(struct complete *c, octet *o)
{
	c->n_ids = encode(c, o, NULL, 0);
	if (c->n_ids < 0)
		return cmd_fail("%s", octet_error(o));
	c->ids = malloc((size_t)(c->n_ids > 0 ? c->n_ids : 1) * sizeof(*c->ids));
	if (c->ids == NULL)
		return cmd_fail("out of memory");
	encode(c, o, c->ids, (size_t)c->n_ids);
	if (c->n_ids == 0)
		return cmd_fail("the prompt is empty");
	return 0;
}

static void
print_json(json_t *o)
{
	json_dumpf(o, stdout, JSON_COMPACT);
	printf("\n");
	fflush(stdout);
	json_decref(o);
}

static json_t *
hex(uint64_t v)
{
	char buf[17];

	snprintf(buf, sizeof(buf), "%016llx", (unsigned long long)v);
	return json_string(buf);
}

/* json_stringn() wants UTF-8; the detokeniser gives whole characters, and what
 * the model made up in bytes that are none is shown as U+FFFD. */
static json_t *
json_text(const char *s, size_t n)
{
	json_t *j = json_stringn(s, n);
	char *safe;
	size_t k = 0;

	if (j != NULL)
		return j;
	safe = malloc(3 * n + 1);
	for (size_t i = 0; safe != NULL && i < n; i++) {
		if ((unsigned char)s[i] < 0x80)
			safe[k++] = s[i];
		else {
			memcpy(safe + k, "\xef\xbf\xbd", 3);
			k += 3;
		}
	}
	j = safe == NULL ? json_string("") : json_stringn(safe, k);
	free(safe);
	return j;
}

static int
show(struct complete *c, const char *s, size_t n)
{
	if (c->text_len + n + 1 > c->text_cap) {
		size_t cap = (c->text_len + n + 1) * 2;
		char *more = realloc(c->text, cap);

		if (more == NULL)
			return -ENOMEM;
		c->text = more;
		c->text_cap = cap;
	}
	memcpy(c->text + c->text_len, s, n);
	c->text_len += n;
	if (!c->json && n > 0) {
		fwrite(s, 1, n, stdout);
		fflush(stdout);
	}
	return 0;
}

/* Returns 1 when a stop string was met. */
static int
take_token(struct complete *c, octet_text *t, const struct octet_event *ev)
{
	const char *s;
	size_t n;
	int stop;

	if (c->first == 0)
		c->first = cmd_now_ms();
	stop = octet_text_push(t, ev->token, &s, &n);
	if (stop < 0 || show(c, s, n) != 0)
		return -ENOMEM;
	c->n_output++;
	json_array_append_new(c->tokens, json_integer(ev->token));
	if (c->sampling.logprobs)
		json_array_append_new(c->logprobs, json_real(ev->logprob));
	if (c->json) {
		json_t *j = json_pack("{s:s,s:i,s:i,s:o}", "event", "token", "id", (int)ev->token, "position",
		    (int)ev->position, "text", json_text(s, n));

		if (c->sampling.logprobs)
			json_object_set_new(j, "logprob", json_real(ev->logprob));
		print_json(j);
	}
	return stop;
}

static void
take_segment(struct complete *c, const struct octet_event *ev)
{
	json_t *j = json_pack("{s:o,s:I,s:i}", "plan", hex(ev->plan), "epoch", (json_int_t)ev->epoch, "first",
	    (int)ev->position);

	json_array_append_new(c->segments, j);
	if (c->json)
		print_json(json_pack("{s:s,s:o,s:I,s:i}", "event", "segment", "plan", hex(ev->plan), "epoch",
		    (json_int_t)ev->epoch, "position", (int)ev->position));
}

/* Reads until the request is done. */
static int
stream(struct complete *c, octet *o, int request, octet_text *t)
{
	static const char *const finish[] = {[OCTET_STOP] = "stop", [OCTET_LENGTH] = "length",
	    [OCTET_CANCELLED] = "cancelled", [OCTET_FAILED] = "error"};
	struct octet_event ev[32];
	bool stopped = false, cancelled = false;

	for (;;) {
		int n = octet_read(o, request, ev, 32, 200);

		if (interrupted && !cancelled) {
			cancelled = true;
			octet_cancel(o, request);
		}
		if (n == -EINTR)
			continue;
		if (n < 0) {
			snprintf(c->error, sizeof(c->error), "%s", octet_error(o));
			c->finish = "error";
			return n;
		}
		for (int i = 0; i < n; i++) {
			if (ev[i].kind == OCTET_SEGMENT && !stopped)
				take_segment(c, &ev[i]);
			else if (ev[i].kind == OCTET_TOKEN && !stopped) {
				if (take_token(c, t, &ev[i]) != 0) {
					stopped = true;
					octet_cancel(o, request);
				}
			} else if (ev[i].kind == OCTET_DONE) {
				c->finish = stopped ? "stop" : finish[ev[i].finish];
				if (ev[i].finish == OCTET_FAILED && !stopped) {
					memcpy(c->error, ev[i].message, sizeof(ev[i].message));
					return ev[i].error;
				}
				return 0;
			}
		}
	}
}

static void
print_summary(struct complete *c)
{
	double end = cmd_now_ms();
	json_t *j = json_pack("{s:s,s:o,s:s,s:I,s:I,s:O,s:O,s:f,s:f}", "event", "summary", "text",
	    json_text(c->text != NULL ? c->text : "", c->text_len), "finish_reason", c->finish, "prompt_tokens",
	    (json_int_t)c->n_ids, "output_tokens", (json_int_t)c->n_output, "tokens", c->tokens, "segments", c->segments,
	    "ttft_ms", c->first > 0 ? c->first - c->start : end - c->start, "total_ms", end - c->start);

	if (c->sampling.logprobs)
		json_object_set(j, "logprobs", c->logprobs);
	if (*c->error != '\0')
		json_object_set_new(j, "error", json_text(c->error, strlen(c->error)));
	print_json(j);
}

static int
complete(struct complete *c, octet *o)
{
	const char *s;
	octet_text *t;
	size_t n;
	int request, rc = tokenize(c, o);

	if (rc != 0)
		return rc;
	if (octet_text_new(&t, o, c->prompt_len > 0, c->stop, c->n_stops) != 0)
		return cmd_fail("out of memory");
	c->start = cmd_now_ms();
	request = octet_submit(o, c->ids, (size_t)c->n_ids, &c->sampling);
	if (request < 0) {
		rc = cmd_fail("%s", octet_error(o));
		octet_text_free(&t);
		return rc;
	}
	rc = stream(c, o, request, t);
	if (octet_text_flush(t, &s, &n) == 0)
		show(c, s, n);
	if (c->json)
		print_summary(c);
	else if (isatty(STDOUT_FILENO))
		printf("\n");
	if (rc != 0)
		cmd_fail("%s", *c->error != '\0' ? c->error : "the request failed");
	octet_text_free(&t);
	return rc != 0 || ferror(stdout) != 0;
}

static int
run(int argc, char **argv, const char *socket)
{
	struct complete c = {.sampling = {.max_tokens = 256, .top_p = 1}, .finish = "error"};
	struct sigaction sa = {.sa_handler = on_interrupt};
	octet *o;
	int rc = parse(&c, argc, argv);

	if (rc != 0)
		return rc;
	rc = read_prompt(&c);
	if (rc != 0)
		rc = cmd_fail("reading the prompt: %s", strerror(-rc));
	else if ((o = cmd_open(socket)) == NULL)
		rc = 1;
	else {
		sigaction(SIGINT, &sa, NULL);
		c.tokens = json_array();
		c.segments = json_array();
		c.logprobs = json_array();
		rc = complete(&c, o);
		octet_close(&o);
	}
	json_decref(c.tokens), json_decref(c.segments), json_decref(c.logprobs);
	free(c.prompt), free(c.ids), free(c.text);
	return rc;
}

const struct cmd cmd_complete = {"complete",
    "[--max-tokens N] [--temperature T] [--top-p P] [--top-k K]\n"
    "            [--seed S] [--stop STR]... [--ignore-eos] [--logprobs N] [--raw] [--json] [PROMPT | -]",
    "streams the model's answer to a prompt", run};
