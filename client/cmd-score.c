/* SPDX-License-Identifier: Apache-2.0 */
/* octet score: how likely a text is to the model. */
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "client/cmd.h"

struct score {
	struct octet_sampling sampling;
	uint32_t context;      /* tokens of a chunk; 0: what the model allows */
	bool json;
	char *text;
	size_t len;
	uint32_t *ids;
	size_t n_ids, next;    /* next: first token that is in no chunk yet */
	bool bos;              /* ids[0] begins every chunk */
	uint64_t tokens, chunks;
	double sum;            /* of natural logarithms */
};

static int
parse(struct score *c, int argc, char **argv)
{
	static const struct option longs[] = {{"context", required_argument, NULL, 'c'},
	    {"policy", required_argument, NULL, 'o'}, {"json", no_argument, NULL, 'j'}, {NULL, 0, NULL, 0}};
	uint64_t n;
	int ch, rc = 0;

	optind = 1;
	while (rc == 0 && (ch = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		switch (ch) {
		case 'c':
			rc = cmd_u64(&cmd_score, "--context", optarg, 2, UINT32_MAX, &n);
			c->context = (uint32_t)n;
			break;
		case 'o': c->sampling.policy = optarg; break;
		case 'j': c->json = true; break;
		default: return 2;
		}
	}
	if (rc == 0 && argc - optind != 1)
		return cmd_usage(&cmd_score, optind < argc ? "more than one FILE" : "FILE is missing");
	return rc;
}

static int
tokenize(struct score *c, octet *o)
{
	const struct octet_info *info = octet_info(o);
	int64_t n = octet_tokenize(o, c->text, c->len, OCTET_BOS, NULL, 0), plain;

	if (n < 0 || (plain = octet_tokenize(o, c->text, c->len, 0, NULL, 0)) < 0)
		return cmd_fail("%s", octet_error(o));
	c->bos = n > plain;
	c->ids = malloc((size_t)(n > 0 ? n : 1) * sizeof(*c->ids));
	if (c->ids == NULL)
		return cmd_fail("out of memory");
	octet_tokenize(o, c->text, c->len, OCTET_BOS, c->ids, (size_t)n);
	c->n_ids = (size_t)n;
	c->next = c->bos;
	if (c->n_ids < 2)
		return cmd_fail("a text of %zu token%s has nothing to score", c->n_ids, c->n_ids == 1 ? "" : "s");
	if (c->context == 0 || c->context > info->max_context)
		c->context = info->max_context;
	return 0;
}

/* Submits the next chunk. Its number, -ENODATA when there is none, -EBUSY. */
static int
submit(struct score *c, octet *o, uint32_t *chunk)
{
	size_t room = c->context - c->bos, left = c->n_ids - c->next, n = left < room ? left : room;
	int rc;

	/* A chunk of one token, not even a BOS before it, has nothing to score. */
	if (n + c->bos < 2)
		return -ENODATA;
	if (c->bos)
		chunk[0] = c->ids[0];
	memcpy(chunk + c->bos, c->ids + c->next, n * sizeof(*chunk));
	rc = octet_submit(o, chunk, n + c->bos, &c->sampling);
	if (rc >= 0) {
		c->next += n;
		c->chunks++;
	}
	return rc;
}

/* Takes what there is of one request; 1 when it is done. */
static int
take(struct score *c, octet *o, int request)
{
	struct octet_event ev[64];
	int n = octet_read(o, request, ev, 64, 0);

	for (int i = 0; i < n; i++) {
		if (ev[i].kind == OCTET_PROMPT) {
			c->sum += ev[i].logprob;
			c->tokens++;
		} else if (ev[i].kind == OCTET_DONE && ev[i].finish == OCTET_FAILED) {
			cmd_fail("%s", ev[i].message);
			return ev[i].error;
		} else if (ev[i].kind == OCTET_DONE)
			return 1;
	}
	if (n < 0)
		cmd_fail("%s", octet_error(o));
	return n < 0 ? n : 0;
}

/* Several chunks are in flight at a time. */
static int
score(struct score *c, octet *o)
{
	uint32_t max = octet_info(o)->max_requests, running = 0;
	uint32_t *chunk = malloc(c->context * sizeof(*chunk));
	bool *busy = calloc(1024, sizeof(*busy));
	int rc = chunk == NULL || busy == NULL ? cmd_fail("out of memory") : 0, got;

	for (bool more = true; rc == 0 && (more || running > 0);) {
		while (more && running < max && (got = submit(c, o, chunk)) != -EBUSY) {
			if (got < 0 && got != -ENODATA)
				rc = cmd_fail("%s", octet_error(o));
			more = got >= 0;
			if (got < 0)
				break;
			busy[got] = true;
			running++;
		}
		for (int i = 0; rc == 0 && i < 1024; i++) {
			if (!busy[i] || (got = take(c, o, i)) == 0)
				continue;
			busy[i] = false;
			running--;
			rc = got < 0;
		}
		if (rc == 0 && running > 0 && octet_wait(o, 1000) < 0)
			rc = cmd_fail("%s", octet_error(o));
	}
	free(chunk);
	free(busy);
	return rc;
}

static int
run(int argc, char **argv, const char *socket)
{
	struct score c = {.sampling = {.prompt_logprobs = 1}};
	octet *o = NULL;
	int rc = parse(&c, argc, argv);

	if (rc != 0)
		return rc;
	if (cmd_read_file(argv[argc - 1], &c.text, &c.len) != 0 || (o = cmd_open(socket)) == NULL)
		rc = 1;
	else if ((rc = tokenize(&c, o)) == 0 && (rc = score(&c, o)) == 0) {
		double ppl = exp(-c.sum / (double)c.tokens);

		if (c.json)
			printf("{\"tokens\": %llu, \"chunks\": %llu, \"logprob\": %.6f, \"perplexity\": %.6f}\n",
			    (unsigned long long)c.tokens, (unsigned long long)c.chunks, c.sum, ppl);
		else
			printf("%llu tokens in %llu chunk%s, sum of log-probabilities %.3f, perplexity %.4f\n",
			    (unsigned long long)c.tokens, (unsigned long long)c.chunks, c.chunks == 1 ? "" : "s", c.sum, ppl);
	}
	octet_close(&o);
	free(c.text), free(c.ids);
	return rc;
}

const struct cmd cmd_score = {"score", "[--context N] [--policy NAME] [--json] FILE | -",
    "prints the log-probability and perplexity of a text", run};
