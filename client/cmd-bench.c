/* SPDX-License-Identifier: Apache-2.0 */
/* octet bench: many sessions in one process, each with one request in flight or several. */
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "client/cmd.h"

#define SPIN_MS 0.05 /* without an event, before it sleeps */

/* A request at a time; those of a session share its handle. */
struct session {
	octet *o;
	int request;         /* -1: none */
	double start, last;  /* of the request; of its newest token */
	uint32_t n_tokens;
};

struct samples {
	double *v;
	size_t n, cap;
};

struct bench {
	uint64_t clients, in_flight, requests, prompt_tokens, output_tokens;
	uint64_t n; /* clients * in_flight */
	bool json, poll;
	struct session *session;
	uint32_t *ids;
	uint64_t sent, done, failed, tokens, rng;
	char failure[160];
	struct samples ttft, gap, total;
};

static void
sample(struct samples *s, double v)
{
	if (s->n == s->cap) {
		size_t cap = s->cap == 0 ? 1024 : s->cap * 2;
		double *more = realloc(s->v, cap * sizeof(*more));

		if (more == NULL)
			return;
		s->v = more;
		s->cap = cap;
	}
	s->v[s->n++] = v;
}

static int
by_value(const void *pa, const void *pb)
{
	double a = *(const double *)pa, b = *(const double *)pb;

	return a < b ? -1 : a > b;
}

static double
percentile(const struct samples *s, int p)
{
	return s->n == 0 ? 0 : s->v[(s->n - 1) * (size_t)p / 100];
}

static void
submit(struct bench *b, struct session *s)
{
	struct octet_sampling sampling = {.max_tokens = (uint32_t)b->output_tokens, .top_p = 1, .ignore_eos = 1};
	uint32_t vocab = octet_info(s->o)->vocab;

	for (uint64_t i = 0; i < b->prompt_tokens; i++) {
		b->rng = b->rng * 6364136223846793005u + 1442695040888963407u;
		b->ids[i] = (uint32_t)(b->rng >> 33) % vocab;
	}
	s->start = cmd_now_ms();
	s->n_tokens = 0;
	s->request = octet_submit(s->o, b->ids, b->prompt_tokens, &sampling);
	b->sent++;
	if (s->request < 0) {
		b->failed++;
		snprintf(b->failure, sizeof(b->failure), "%s", octet_error(s->o));
	}
}

/* Takes what is there: the number of events, negative when the connection is lost. */
static int
take(struct bench *b, struct session *s)
{
	struct octet_event ev[64];
	int n = octet_read(s->o, s->request, ev, 64, 0);
	double now = cmd_now_ms();

	if (n < 0) {
		snprintf(b->failure, sizeof(b->failure), "%s", octet_error(s->o));
		return n;
	}
	for (int i = 0; i < n; i++) {
		if (ev[i].kind == OCTET_TOKEN) {
			sample(s->n_tokens == 0 ? &b->ttft : &b->gap, now - (s->n_tokens == 0 ? s->start : s->last));
			s->last = now;
			s->n_tokens++;
			b->tokens++;
		} else if (ev[i].kind == OCTET_DONE) {
			sample(&b->total, now - s->start);
			if (ev[i].finish == OCTET_FAILED) {
				b->failed++;
				memcpy(b->failure, ev[i].message, sizeof(ev[i].message));
			} else
				b->done++;
			s->request = -1;
		}
	}
	return n;
}

/* One turn over all sessions: how many have a request, or negative when a connection is lost. */
static int64_t
turn(struct bench *b, double *last_event)
{
	int64_t busy = 0;

	for (uint64_t i = 0; i < b->n; i++) {
		struct session *s = &b->session[i];
		int n = s->request >= 0 ? take(b, s) : 0;

		if (n < 0)
			return n;
		if (n > 0)
			*last_event = cmd_now_ms();
		if (s->request < 0 && b->sent < b->requests)
			submit(b, s);
		busy += s->request >= 0;
	}
	return busy;
}

static void
sleep_on(struct bench *b, struct pollfd *fds)
{
	for (uint64_t i = 0; i < b->n; i += b->in_flight)
		if (octet_arm(b->session[i].o) != 0)
			return;
	poll(fds, b->clients, 1000);
}

static bool
serve(struct bench *b, struct pollfd *fds)
{
	double last_event = cmd_now_ms();
	int64_t busy;

	while ((busy = turn(b, &last_event)) > 0 || (busy == 0 && b->sent < b->requests)) {
		if (b->poll || cmd_now_ms() - last_event < SPIN_MS)
			sched_yield(); /* the daemon may have no other core */
		else if (busy > 0)
			sleep_on(b, fds);
	}
	return busy == 0;
}

static void
report(struct bench *b, double ms)
{
	struct samples *all[] = {&b->ttft, &b->gap, &b->total};
	double s = ms / 1000;

	for (size_t i = 0; i < 3; i++)
		if (all[i]->n > 0)
			qsort(all[i]->v, all[i]->n, sizeof(double), by_value);
	if (b->json) {
		json_t *j = json_pack("{s:I,s:I,s:I,s:I,s:I,s:I,s:f,s:f,s:f,s:f,s:{s:f,s:f},s:{s:f,s:f},s:{s:f,s:f}}", "clients",
		    (json_int_t)b->clients, "requests", (json_int_t)b->done, "failed", (json_int_t)b->failed, "prompt_tokens",
		    (json_int_t)b->prompt_tokens, "output_tokens", (json_int_t)b->output_tokens, "tokens",
		    (json_int_t)b->tokens, "seconds", s, "requests_per_s", b->done / s, "output_tokens_per_s", b->tokens / s,
		    "prompt_tokens_per_s", (double)(b->done * b->prompt_tokens) / s, "ttft_ms", "p50", percentile(&b->ttft, 50),
		    "p99", percentile(&b->ttft, 99), "inter_token_ms", "p50", percentile(&b->gap, 50), "p99",
		    percentile(&b->gap, 99), "total_ms", "p50", percentile(&b->total, 50), "p99", percentile(&b->total, 99));

		json_dumpf(j, stdout, JSON_INDENT(1));
		printf("\n");
		json_decref(j);
		return;
	}
	printf("%llu clients, %llu requests of %llu tokens in and %llu out, %.2f s, %llu failed\n",
	    (unsigned long long)b->clients, (unsigned long long)b->done, (unsigned long long)b->prompt_tokens,
	    (unsigned long long)b->output_tokens, s, (unsigned long long)b->failed);
	printf("requests/s        %10.1f\n", b->done / s);
	printf("output tokens/s   %10.1f\n", b->tokens / s);
	printf("prompt tokens/s   %10.1f\n", (double)(b->done * b->prompt_tokens) / s);
	printf("                         p50        p99\n");
	printf("first token ms    %10.3f %10.3f\n", percentile(&b->ttft, 50), percentile(&b->ttft, 99));
	printf("between tokens ms %10.3f %10.3f\n", percentile(&b->gap, 50), percentile(&b->gap, 99));
	printf("whole request ms  %10.3f %10.3f\n", percentile(&b->total, 50), percentile(&b->total, 99));
}

static int
parse(struct bench *b, int argc, char **argv)
{
	static const struct option longs[] = {{"clients", required_argument, NULL, 'c'}, {"in-flight", required_argument, NULL, 'f'},
	    {"requests", required_argument, NULL, 'n'}, {"prompt-tokens", required_argument, NULL, 'p'},
	    {"output-tokens", required_argument, NULL, 'o'}, {"json", no_argument, NULL, 'j'}, {"poll", no_argument, NULL, 'P'}, {NULL, 0, NULL, 0}};
	int rc = 0, ch;

	optind = 1;
	while (rc == 0 && (ch = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		switch (ch) {
		case 'c': rc = cmd_u64(&cmd_bench, "--clients", optarg, 1, 1024, &b->clients); break;
		case 'f': rc = cmd_u64(&cmd_bench, "--in-flight", optarg, 1, 64, &b->in_flight); break;
		case 'n': rc = cmd_u64(&cmd_bench, "--requests", optarg, 1, 1u << 30, &b->requests); break;
		case 'p': rc = cmd_u64(&cmd_bench, "--prompt-tokens", optarg, 1, 1u << 20, &b->prompt_tokens); break;
		case 'o': rc = cmd_u64(&cmd_bench, "--output-tokens", optarg, 1, 1u << 20, &b->output_tokens); break;
		case 'j': b->json = true; break;
		case 'P': b->poll = true; break;
		default: return 2;
		}
	}
	if (rc == 0 && optind < argc)
		return cmd_usage(&cmd_bench, "unexpected '%s'", argv[optind]);
	return rc;
}

static int
run(int argc, char **argv, const char *socket)
{
	struct bench b = {.clients = 1, .in_flight = 1, .requests = 100, .prompt_tokens = 50, .output_tokens = 50, .rng = 1};
	struct pollfd *fds = NULL;
	int rc = parse(&b, argc, argv);
	bool ok = true;
	double start;

	if (rc != 0)
		return rc;
	b.n = b.clients * b.in_flight;
	b.session = calloc(b.n, sizeof(*b.session));
	b.ids = calloc(b.prompt_tokens, sizeof(*b.ids));
	fds = calloc(b.clients, sizeof(*fds));
	if (b.session == NULL || b.ids == NULL || fds == NULL)
		return cmd_fail("out of memory");
	for (uint64_t i = 0; ok && i < b.n; i++) {
		b.session[i].request = -1;
		b.session[i].o = i % b.in_flight == 0 ? cmd_open(socket) : b.session[i - 1].o;
		ok = b.session[i].o != NULL;
		if (ok)
			fds[i / b.in_flight] = (struct pollfd){.fd = octet_fd(b.session[i].o), .events = POLLIN};
	}
	if (ok) {
		start = cmd_now_ms();
		ok = serve(&b, fds);
		report(&b, cmd_now_ms() - start);
		if (*b.failure != '\0')
			cmd_fail("%s", b.failure);
	}
	for (uint64_t i = 0; i < b.n; i += b.in_flight)
		octet_close(&b.session[i].o);
	free(b.session), free(b.ids), free(fds), free(b.ttft.v), free(b.gap.v), free(b.total.v);
	return !ok || b.failed > 0;
}

const struct cmd cmd_bench = {"bench",
    "[--clients C] [--in-flight F] [--requests N] [--prompt-tokens P] [--output-tokens O] [--poll] [--json]",
    "measures the daemon: requests/s, tokens/s, latencies", run};
