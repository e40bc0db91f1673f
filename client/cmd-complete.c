/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <jansson.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/cmd.h"

struct complete {
	struct cmd_sampling sampling;
	bool raw, json;
	const char *prompt_arg;

	char *prompt;          /* text */
	size_t prompt_len;
	uint32_t *ids;
	int64_t n_ids;

	char *text;            /* what was shown */
	size_t text_len, text_cap;
	json_t *tokens, *segments, *logprobs, *prompt_logprobs;
	json_t *held;          /* token or prompt event that waits for its alternatives; NULL: none */
	const char *replay_file;
	struct octet_segment *replay;
	json_t *replayed;      /* the summary that is run again */
	uint64_t n_output;
	double start, first;
	const char *finish;
	bool stopped;          /* by a stop string */
	char error[160];
};

static volatile sig_atomic_t interrupted;

static void
on_interrupt(int sig)
{
	(void)sig;
	interrupted = 1;
}

static int
parse(struct complete *c, int argc, char **argv)
{
	static const struct option longs[] = {CMD_SAMPLING_LONGS, {"prompt-logprobs", no_argument, NULL, 'L'},
	    {"replay", required_argument, NULL, 'y'}, {"logprobs", required_argument, NULL, 'l'},
	    {"raw", no_argument, NULL, 'r'}, {"json", no_argument, NULL, 'j'}, {NULL, 0, NULL, 0}};
	uint64_t n = 0;
	int rc = 0, ch;

	optind = 1;
	while (rc == 0 && (ch = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		rc = cmd_sampling_option(&cmd_complete, &c->sampling, ch, optarg);
		if (rc >= 0)
			continue;
		rc = 0;
		switch (ch) {
		case 'y': c->replay_file = optarg; break;
		case 'l':
			/* The chosen token's, and those of the N most likely. */
			rc = cmd_u64(&cmd_complete, "--logprobs", optarg, 0, 20, &n);
			c->sampling.s.logprobs = 1;
			c->sampling.s.top_logprobs = (int)n;
			break;
		case 'L': c->sampling.s.prompt_logprobs = 1; break;
		case 'r': c->raw = true; break;
		case 'j': c->json = true; break;
		default: return 2;
		}
	}
	if (rc == 0 && argc - optind > 1)
		return cmd_usage(&cmd_complete, "more than one PROMPT: put it in quotes");
	c->prompt_arg = optind < argc ? argv[optind] : NULL;
	if (rc == 0 && c->replay_file != NULL && (c->prompt_arg != NULL || c->sampling.s.policy != NULL))
		return cmd_usage(&cmd_complete, "--replay brings its own prompt and plans");
	if (rc == 0 && c->replay_file == NULL && c->prompt_arg == NULL && isatty(STDIN_FILENO))
		return cmd_usage(&cmd_complete, "PROMPT is missing");
	return rc;
}

static int
read_prompt(struct complete *c)
{
	if (c->prompt_arg == NULL || strcmp(c->prompt_arg, "-") == 0)
		return cmd_read_file("-", &c->prompt, &c->prompt_len);
	c->prompt = strdup(c->prompt_arg);
	c->prompt_len = strlen(c->prompt_arg);
	return c->prompt == NULL ? cmd_fail("out of memory") : 0;
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

/* A seed may need more than a JSON integer's 63 bits. */
static json_t *
seed_json(uint64_t seed)
{
	char buf[24];

	snprintf(buf, sizeof(buf), "%llu", (unsigned long long)seed);
	return json_string(buf);
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

/* What one token is, with the text it stands for by itself. */
static json_t *
token_json(octet *o, const struct octet_event *ev)
{
	char text[256];
	int64_t n = octet_detokenize(o, &ev->token, 1, 0, text, sizeof(text));

	n = n < 0 ? 0 : n > (int64_t)sizeof(text) ? (int64_t)sizeof(text) : n;
	return json_pack("{s:i,s:o,s:f}", "id", (int)ev->token, "text", json_text(text, (size_t)n), "logprob", ev->logprob);
}

/* Events that may have alternatives are printed when these have come. */
static void
print_held(struct complete *c)
{
	if (c->held != NULL)
		print_json(c->held);
	c->held = NULL;
}

static void
take_alternative(struct complete *c, octet *o, const struct octet_event *ev)
{
	json_t *top;

	if (c->held == NULL)
		return;
	top = json_object_get(c->held, "top");
	if (top == NULL) {
		top = json_array();
		json_object_set_new(c->held, "top", top);
	}
	json_array_append_new(top, token_json(o, ev));
}

static void
take_prompt(struct complete *c, octet *o, const struct octet_event *ev)
{
	json_array_append_new(c->prompt_logprobs, json_real(ev->logprob));
	if (!c->json)
		return;
	c->held = token_json(o, ev);
	json_object_set_new(c->held, "event", json_string("prompt"));
	json_object_set_new(c->held, "position", json_integer(ev->position));
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
	if (c->sampling.s.logprobs)
		json_array_append_new(c->logprobs, json_real(ev->logprob));
	if (c->json) {
		json_t *j = json_pack("{s:s,s:i,s:i,s:o}", "event", "token", "id", (int)ev->token, "position",
		    (int)ev->position, "text", json_text(s, n));

		if (c->sampling.s.logprobs)
			json_object_set_new(j, "logprob", json_real(ev->logprob));
		c->held = j;
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
	bool cancelled = false;

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
			if (ev[i].kind == OCTET_ALTERNATIVE) {
				take_alternative(c, o, &ev[i]);
				continue;
			}
			print_held(c);
			if (ev[i].kind == OCTET_SEGMENT && !c->stopped)
				take_segment(c, &ev[i]);
			else if (ev[i].kind == OCTET_PROMPT && !c->stopped)
				take_prompt(c, o, &ev[i]);
			else if (ev[i].kind == OCTET_TOKEN && !c->stopped) {
				if (take_token(c, t, &ev[i]) != 0) {
					c->stopped = true;
					octet_cancel(o, request);
				}
			} else if (ev[i].kind == OCTET_DONE) {
				c->finish = c->stopped ? "stop" : finish[ev[i].finish];
				if (ev[i].finish == OCTET_FAILED && !c->stopped) {
					memcpy(c->error, ev[i].message, sizeof(ev[i].message));
					return ev[i].error;
				}
				return 0;
			}
		}
	}
}

static json_t *
ids_json(const uint32_t *ids, size_t n)
{
	json_t *j = json_array();

	for (size_t i = 0; i < n; i++)
		json_array_append_new(j, json_integer(ids[i]));
	return j;
}

/* Numbers as the request had them, so that it can be run again. */
static json_t *
sampling_json(const struct octet_sampling *s)
{
	json_t *bias = json_array();

	for (size_t i = 0; i < s->n_bias; i++)
		json_array_append_new(bias, json_pack("[if]", (int)s->bias[i].id, s->bias[i].value));
	return json_pack("{s:I,s:f,s:f,s:I,s:o,s:b,s:f,s:f,s:f,s:f,s:o}", "max_tokens", (json_int_t)s->max_tokens,
	    "temperature", s->temperature, "top_p", s->top_p, "top_k", (json_int_t)s->top_k, "seed",
	    seed_json(s->seed), "ignore_eos", s->ignore_eos, "min_p", s->min_p, "repetition_penalty",
	    s->repetition_penalty, "presence_penalty", s->presence_penalty, "frequency_penalty", s->frequency_penalty,
	    "logit_bias", bias);
}

static void
print_summary(struct complete *c)
{
	double end = cmd_now_ms();
	json_t *j = json_pack("{s:s,s:o,s:s,s:I,s:I,s:O,s:O,s:f,s:f}", "event", "summary", "text",
	    json_text(c->text != NULL ? c->text : "", c->text_len), "finish_reason", c->finish, "prompt_tokens",
	    (json_int_t)c->n_ids, "output_tokens", (json_int_t)c->n_output, "tokens", c->tokens, "segments", c->segments,
	    "ttft_ms", c->first > 0 ? c->first - c->start : end - c->start, "total_ms", end - c->start);

	json_object_set_new(j, "prompt_ids", ids_json(c->ids, (size_t)c->n_ids));
	json_object_set_new(j, "sampling", sampling_json(&c->sampling.s));
	if (c->sampling.s.logprobs)
		json_object_set(j, "logprobs", c->logprobs);
	if (c->sampling.s.prompt_logprobs)
		json_object_set(j, "prompt_logprobs", c->prompt_logprobs);
	if (c->stopped)
		json_object_set_new(j, "stopped", json_true());
	if (*c->error != '\0')
		json_object_set_new(j, "error", json_text(c->error, strlen(c->error)));
	print_json(j);
}

/* ---- replay ---- */

/* The last summary of what `octet complete --json` printed. */
static json_t *
read_summary(const char *path)
{
	FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "r");
	json_t *found = NULL, *line;

	if (f == NULL) {
		cmd_fail("%s: %s", path, strerror(errno));
		return NULL;
	}
	while ((line = json_loadf(f, JSON_DISABLE_EOF_CHECK, NULL)) != NULL) {
		const char *event = json_string_value(json_object_get(line, "event"));

		if (event != NULL && strcmp(event, "summary") == 0) {
			json_decref(found);
			found = json_incref(line);
		}
		json_decref(line);
	}
	if (f != stdin)
		fclose(f);
	if (found == NULL)
		cmd_fail("%s: no summary of 'octet complete --json' in it", path);
	return found;
}

static bool
read_ids(const json_t *list, uint32_t **out, int64_t *n)
{
	*n = (int64_t)json_array_size(list);
	*out = malloc((size_t)(*n > 0 ? *n : 1) * sizeof(**out));
	for (int64_t i = 0; *out != NULL && i < *n; i++) {
		json_int_t id = json_integer_value(json_array_get(list, (size_t)i));

		if (id < 0 || id > UINT32_MAX)
			return false;
		(*out)[i] = (uint32_t)id;
	}
	return *out != NULL && *n > 0;
}

static bool
read_sampling(struct complete *c, json_t *from)
{
	struct octet_sampling *s = &c->sampling.s;
	const char *seed;
	json_t *bias, *pair;
	double temperature, top_p, min_p, repetition, presence, frequency;
	json_int_t max_tokens, top_k;
	size_t i;

	if (json_unpack(from, "{s:I,s:F,s:F,s:I,s:s,s:b,s:F,s:F,s:F,s:F,s:o}", "max_tokens", &max_tokens, "temperature",
	    &temperature, "top_p", &top_p, "top_k", &top_k, "seed", &seed, "ignore_eos", &s->ignore_eos, "min_p", &min_p,
	    "repetition_penalty", &repetition, "presence_penalty", &presence, "frequency_penalty", &frequency, "logit_bias",
	    &bias) != 0 || json_array_size(bias) > CMD_MAX_BIAS)
		return false;
	s->max_tokens = (uint32_t)max_tokens, s->top_k = (uint32_t)top_k, s->seed = strtoull(seed, NULL, 10);
	s->temperature = (float)temperature, s->top_p = (float)top_p, s->min_p = (float)min_p;
	s->repetition_penalty = (float)repetition;
	s->presence_penalty = (float)presence, s->frequency_penalty = (float)frequency;
	json_array_foreach(bias, i, pair) {
		c->sampling.bias[i].id = (uint32_t)json_integer_value(json_array_get(pair, 0));
		c->sampling.bias[i].value = (float)json_number_value(json_array_get(pair, 1));
	}
	s->bias = c->sampling.bias;
	s->n_bias = json_array_size(bias);
	return true;
}

static bool
read_segments(struct complete *c, const json_t *list)
{
	struct octet_sampling *s = &c->sampling.s;
	json_t *at;
	size_t i;

	c->replay = calloc(json_array_size(list) + 1, sizeof(*c->replay));
	if (c->replay == NULL || json_array_size(list) == 0)
		return false;
	json_array_foreach(list, i, at) {
		const char *plan;
		json_int_t epoch, first;

		if (json_unpack(at, "{s:s,s:I,s:I}", "plan", &plan, "epoch", &epoch, "first", &first) != 0)
			return false;
		c->replay[i] = (struct octet_segment){(uint32_t)first, strtoull(plan, NULL, 16), (uint64_t)epoch};
	}
	s->replay = c->replay;
	s->n_replay = json_array_size(list);
	return true;
}

/* Takes prompt, sampling and segments from a summary. */
static int
load_replay(struct complete *c)
{
	json_t *j = c->replayed = read_summary(c->replay_file);

	if (j == NULL)
		return 1;
	if (!read_ids(json_object_get(j, "prompt_ids"), &c->ids, &c->n_ids) ||
	    !read_sampling(c, json_object_get(j, "sampling")) || !read_segments(c, json_object_get(j, "segments")))
		return cmd_fail("%s: its summary is incomplete", c->replay_file);
	/* A stop string ended it where the tokens end. */
	if (json_array_size(json_object_get(j, "tokens")) > 0 && json_object_get(j, "stopped") != NULL)
		c->sampling.s.max_tokens = (uint32_t)json_array_size(json_object_get(j, "tokens"));
	return 0;
}

/* 0 if the run gave what the file says. */
static int
compare_replay(const struct complete *c)
{
	const json_t *want = json_object_get(c->replayed, "tokens");
	size_t n = json_array_size(want), got = json_array_size(c->tokens), at = 0;

	while (at < n && at < got && json_integer_value(json_array_get(want, at)) ==
	    json_integer_value(json_array_get(c->tokens, at)))
		at++;
	if (at < n || at < got)
		return cmd_fail("replay: token %zu differs: %lld then, %lld now", at + 1,
		    at < n ? (long long)json_integer_value(json_array_get(want, at)) : -1LL,
		    at < got ? (long long)json_integer_value(json_array_get(c->tokens, at)) : -1LL);
	fprintf(stderr, "replay: the same %zu tokens under %zu segment%s\n", n, c->sampling.s.n_replay,
	    c->sampling.s.n_replay == 1 ? "" : "s");
	return 0;
}

static int
complete(struct complete *c, octet *o)
{
	const char *s;
	octet_text *t;
	size_t n;
	int request, rc = c->replay_file != NULL ? load_replay(c) : tokenize(c, o);

	if (rc != 0)
		return rc;
	if (octet_text_new(&t, o, c->replay_file != NULL || c->prompt_len > 0, c->sampling.stop, c->sampling.n_stops) != 0)
		return cmd_fail("out of memory");
	c->start = cmd_now_ms();
	request = octet_submit(o, c->ids, (size_t)c->n_ids, &c->sampling.s);
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
	else if (c->replay_file != NULL)
		rc = compare_replay(c);
	octet_text_free(&t);
	return rc != 0 || ferror(stdout) != 0;
}

static int
run(int argc, char **argv, const char *socket)
{
	struct complete c = {.sampling.s = {.max_tokens = 256, .top_p = 1}, .finish = "error"};
	struct sigaction sa = {.sa_handler = on_interrupt};
	octet *o;
	int rc = parse(&c, argc, argv);

	if (rc != 0)
		return rc;
	rc = c.replay_file != NULL ? 0 : read_prompt(&c);
	if (rc == 0 && (o = cmd_open(socket)) == NULL)
		rc = 1;
	if (rc == 0) {
		sigaction(SIGINT, &sa, NULL);
		c.tokens = json_array();
		c.segments = json_array();
		c.logprobs = json_array();
		c.prompt_logprobs = json_array();
		rc = complete(&c, o);
		octet_close(&o);
	}
	json_decref(c.tokens), json_decref(c.segments), json_decref(c.logprobs), json_decref(c.prompt_logprobs);
	json_decref(c.replayed);
	free(c.prompt), free(c.ids), free(c.text), free(c.replay);
	return rc;
}

const struct cmd cmd_complete = {"complete",
    CMD_SAMPLING_ARGS "\n            [--logprobs N] [--prompt-logprobs] [--raw] [--json] [--replay FILE | PROMPT | -]",
    "streams the model's answer to a prompt", run};
