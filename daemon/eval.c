/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/eval.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <sha2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client/tok.h"
#include "daemon/evals.h"
#include "daemon/log.h"
#include "daemon/measure.h"
#include "daemon/octetd.h"

#define MAX_TEXT (64u << 20)
#define MAX_ITEMS 100000u
#define MAX_DUMP ((size_t)1 << 30)
#define PROBES 2u        /* the next is there when one ends */
#define ALONE 8u         /* requests of a task at a time, */
#define BESIDE 1u        /* beside live ones */
#define CONTEXT 512u
#define TIME_ROUNDS 600u
#define TIME_SECONDS 4
#define WORST 10u

/* A file of text, or of a task; digest is over all of its data. */
struct corpus {
	char *name;
	bool task;
	char *data;
	size_t len, cap;
};

/* ids [from, to) in one context, after the first token of the model if `bos`; those from `scored` on count. */
struct chunk {
	uint32_t from, to, scored, bos;
	size_t at; /* in score */
};

struct item {
	char *input, *expected, *template;
	char *output[N_SIDES]; /* NULL until it is there */
};

struct eval;
struct answer {
	struct eval *e;
	struct request *r; /* NULL: free */
	uint32_t item, n;
	int side;
	uint32_t *token;   /* [max_tokens] written by the engine's thread until the request is reaped */
};

struct eval {
	struct probe_owner owner; /* first */
	struct octetd *d;
	bool started, dropped, over;
	uv_work_t work;
	struct err tokenise_error;
	int tokenise_rc;
	bool tokenising;        /* on the thread pool */
	struct err error;
	int rc;

	struct corpus *corpus;
	size_t n_corpora;
	struct item *item;
	uint32_t n_items;
	size_t bytes;

	struct plan *plan[N_SIDES];
	char policy[N_SIDES][96], name[64], stop[64];
	uint32_t context;
	bool exclusive, sweep;
	json_t *key;

	struct tok *tok;
	uint32_t *ids, n_ids, bos;
	bool has_bos;
	struct chunk *chunk;
	uint32_t n_chunks, next_chunk, done_chunks;
	struct probe_score *score;
	size_t n_scores;
	struct probe *probe[PROBES];
	double side_us[N_SIDES];
	uint64_t side_rows[N_SIDES];
	struct probe *timing;   /* in flight */
	bool timed;
	json_t *step;           /* what it found */
	struct answer answer[ALONE];
	uint32_t next_answer, done_answers, running;

	bool wants_dump;
	int dump_fd;
	char *dump;
	size_t dump_bytes, dump_head;
	int64_t started_us;
	json_t *result;
};

static void on_probe(struct probe_owner *, struct probe *);
static void go_on(struct eval *);

int
eval_new(struct eval **out, struct octetd *d, struct err *err)
{
	struct eval *e = calloc(1, sizeof(*e));

	*out = e;
	if (e == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	e->owner.done = on_probe;
	e->d = d;
	e->dump_fd = -1;
	return 0;
}

static void
free_eval(struct eval *e)
{
	for (size_t i = 0; i < e->n_corpora; i++)
		free(e->corpus[i].name), free(e->corpus[i].data);
	for (uint32_t i = 0; i < e->n_items; i++) {
		struct item *it = &e->item[i];

		free(it->input), free(it->expected), free(it->template), free(it->output[0]), free(it->output[1]);
	}
	for (int s = 0; s < N_SIDES; s++)
		plan_unref(&e->plan[s]);
	for (uint32_t i = 0; i < ALONE; i++)
		free(e->answer[i].token);
	if (e->dump != NULL)
		munmap(e->dump, e->dump_bytes);
	if (e->dump_fd >= 0)
		close(e->dump_fd);
	tok_free(&e->tok);
	json_decref(e->key), json_decref(e->step), json_decref(e->result);
	free(e->corpus), free(e->item), free(e->ids), free(e->chunk), free(e->score);
	free(e);
}

static bool
in_flight(const struct eval *e)
{
	bool any = e->tokenising || e->timing != NULL || e->running > 0;

	for (uint32_t i = 0; i < PROBES; i++)
		any |= e->probe[i] != NULL;
	return any;
}

void
eval_drop(struct eval **ep)
{
	struct eval *e = *ep;

	*ep = NULL;
	if (e == NULL)
		return;
	e->dropped = true;
	if (!in_flight(e)) {
		free_eval(e);
		return;
	}
	for (uint32_t i = 0; i < PROBES; i++)
		if (e->probe[i] != NULL)
			engine_cancel_probe(e->d->engine, e->probe[i]);
	if (e->timing != NULL)
		engine_cancel_probe(e->d->engine, e->timing);
	for (uint32_t i = 0; i < ALONE; i++)
		if (e->answer[i].r != NULL)
			engine_cancel(e->d->engine, e->answer[i].r);
}

/* ---- what it is given ---- */

static struct corpus *
find_corpus(struct eval *e, const char *name, bool task)
{
	struct corpus *c = e->n_corpora > 0 ? &e->corpus[e->n_corpora - 1] : NULL, *all;

	if (c != NULL && c->task == task && strcmp(c->name, name) == 0)
		return c;
	all = realloc(e->corpus, (e->n_corpora + 1) * sizeof(*all));
	if (all == NULL)
		return NULL;
	e->corpus = all;
	c = &all[e->n_corpora];
	*c = (struct corpus){.name = strdup(name), .task = task};
	if (c->name == NULL)
		return NULL;
	e->n_corpora++;
	return c;
}

static int
append(struct eval *e, struct corpus *c, const char *data, size_t len, struct err *err)
{
	if (e->started)
		return err_set(err, -EBUSY, "eval: it runs already");
	if (e->bytes + len > MAX_TEXT)
		return err_set(err, -E2BIG, "eval: more than %u bytes of text", MAX_TEXT);
	if (c == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	if (c->len + len > c->cap) {
		size_t cap = 2 * c->cap > c->len + len ? 2 * c->cap : c->len + len;
		char *more = realloc(c->data, cap);

		if (more == NULL)
			return err_set(err, -ENOMEM, "out of memory");
		c->data = more, c->cap = cap;
	}
	memcpy(c->data + c->len, data, len);
	c->len += len;
	e->bytes += len;
	return 0;
}

int
eval_add_text(struct eval *e, const char *file, const char *data, size_t len, struct err *err)
{
	return append(e, find_corpus(e, file, false), data, len, err);
}

static int
add_item(struct eval *e, const json_t *j, struct err *err)
{
	const char *input = json_string_value(json_object_get(j, "input"));
	const char *expected = json_string_value(json_object_get(j, "expected"));
	const char *template = json_string_value(json_object_get(j, "template"));
	struct item *all;

	if (input == NULL || expected == NULL)
		return err_set(err, -EINVAL, "eval: an item needs the strings 'input' and 'expected'");
	if (template != NULL && strstr(template, "{input}") == NULL)
		return err_set(err, -EINVAL, "eval: a template must have {input} in it");
	if (e->n_items == MAX_ITEMS)
		return err_set(err, -E2BIG, "eval: more than %u items", MAX_ITEMS);
	all = realloc(e->item, (e->n_items + 1) * sizeof(*all));
	if (all == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	e->item = all;
	all[e->n_items] = (struct item){.input = strdup(input), .expected = strdup(expected),
	    .template = template != NULL ? strdup(template) : NULL};
	e->n_items++;
	return 0;
}

int
eval_add_task(struct eval *e, const char *file, const json_t *items, struct err *err)
{
	const json_t *j;
	size_t i;
	int rc = 0;

	json_array_foreach((json_t *)(uintptr_t)items, i, j) {
		char *text = json_dumps(j, JSON_COMPACT | JSON_SORT_KEYS);

		rc = text == NULL ? err_set(err, -EINVAL, "eval: an item is an object")
		                  : append(e, find_corpus(e, file, true), text, strlen(text), err);
		free(text);
		if (rc != 0 || (rc = add_item(e, j, err)) != 0)
			break;
	}
	return rc;
}

static void
fail(struct eval *e, int rc, const struct err *err)
{
	if (e->rc != 0)
		return;
	e->rc = rc;
	e->error = *err;
	e->over = true;
}

/* ---- start ---- */

/* The name of a policy or of a format, or SELECTOR=FORMAT,... on top of a plan. */
static int
parse_plan(const struct eval *e, const char *text, const struct plan *base, struct plan **out, struct err *err)
{
	uint32_t layers = e->d->model->shape.n_layers;
	struct plan_rule rule[256];
	char *copy, *at, *word, *save = NULL;
	size_t n = 0;
	int rc = 0;

	if (conf_policy(e->d->conf, text) == NULL && plan_format_parse(text, NULL) >= 0)
		return plan_derive(out, base, layers, &(struct plan_rule){"*", text, 0}, 1, err);
	if (strchr(text, '=') == NULL)
		return octetd_policy_plan(e->d->conf, text, layers, out, err);
	copy = strdup(text);
	/* Between rules; layers have commas too: a rule goes to the comma after its format. */
	for (at = copy; copy != NULL && rc == 0 && (word = strtok_r(at, "=", &save)) != NULL; at = NULL) {
		char *format = strtok_r(NULL, ",", &save);

		if (format == NULL || n == 256)
			rc = err_set(err, -EINVAL, "eval: '%.60s': a rule is SELECTOR=FORMAT, 256 at most", text);
		else
			rule[n++] = (struct plan_rule){word, format, 0};
	}
	if (rc == 0)
		rc = copy == NULL ? err_set(err, -ENOMEM, "out of memory") : plan_derive(out, base, layers, rule, n, err);
	free(copy);
	return rc;
}

static void
digest_of(const struct eval *e, bool task, char hex[17])
{
	uint8_t sum[SHA256_DIGEST_LENGTH];
	SHA2_CTX sha;

	SHA256Init(&sha);
	for (size_t i = 0; i < e->n_corpora; i++) {
		uint64_t len = e->corpus[i].len;

		if (e->corpus[i].task != task)
			continue;
		SHA256Update(&sha, (const uint8_t *)&len, sizeof(len));
		SHA256Update(&sha, (const uint8_t *)e->corpus[i].data, e->corpus[i].len);
	}
	SHA256Final(sum, &sha);
	for (int i = 0; i < 8; i++)
		snprintf(hex + 2 * i, 3, "%02x", sum[i]);
}

static json_t *
make_key(const struct eval *e)
{
	char model[17], plan[N_SIDES][17], text[17] = "", task[17] = "";

	snprintf(model, sizeof(model), "%016" PRIx64, e->d->model->digest);
	for (int s = 0; s < N_SIDES; s++)
		snprintf(plan[s], sizeof(plan[s]), "%016" PRIx64, e->plan[s]->digest);
	for (size_t i = 0; i < e->n_corpora; i++)
		digest_of(e, e->corpus[i].task, e->corpus[i].task ? task : text);
	return json_pack("{s:s,s:s,s:s,s:s,s:s,s:s,s:i,s:s,s:s,s:i}", "model", e->d->model->name, "model_digest", model,
	    "baseline", plan[0], "candidate", plan[1], "text", text, "task", task, "context", (int)e->context, "version",
	    OCTET_VERSION, "cpu_level", e->d->ops->name, "threads", (int)team_size(e->d->team));
}

static uint32_t *prompt_of(const struct eval *, const struct item *, int64_t *n);

static int
add_chunk(struct eval *e, struct chunk c)
{
	struct chunk *all = realloc(e->chunk, (e->n_chunks + 1) * sizeof(*all));

	if (all == NULL)
		return -ENOMEM;
	c.at = e->n_scores;
	e->n_scores += c.to - c.scored;
	e->chunk = all;
	all[e->n_chunks++] = c;
	return 0;
}

static int
add_chunks(struct eval *e, uint32_t from, uint32_t to)
{
	uint32_t room = e->context - e->has_bos;

	for (uint32_t at = from; at < to; at += room) {
		uint32_t end = at + room < to ? at + room : to;

		if (end - at + e->has_bos < 2)
			break;
		if (add_chunk(e, (struct chunk){.from = at, .to = end, .scored = at + !e->has_bos, .bos = e->has_bos}) != 0)
			return -ENOMEM;
	}
	return 0;
}

/* Where there is no text, the answers that are expected, each after its prompt. */
static int
add_items(struct eval *e)
{
	uint32_t context = e->d->model->shape.max_context;

	for (uint32_t i = 0; i < e->n_items; i++) {
		const struct item *it = &e->item[i];
		int64_t n = 0, m = tok_encode(e->tok, it->expected, strlen(it->expected), 0, NULL, 0);
		uint32_t *prompt = prompt_of(e, it, &n), *all;

		/* What is wrong with a prompt is said when it is answered. */
		if (prompt == NULL || n <= 0 || n >= context || m <= 0) {
			free(prompt);
			continue;
		}
		all = realloc(e->ids, (e->n_ids + (size_t)(n + m)) * sizeof(*all));
		if (all == NULL) {
			free(prompt);
			return -ENOMEM;
		}
		e->ids = all;
		memcpy(all + e->n_ids, prompt, (size_t)n * sizeof(*all));
		free(prompt);
		tok_encode(e->tok, it->expected, strlen(it->expected), 0, all + e->n_ids + n, (size_t)m);
		m = m < context - n ? m : context - n;
		if (add_chunk(e, (struct chunk){.from = e->n_ids, .to = e->n_ids + (uint32_t)(n + m),
		    .scored = e->n_ids + (uint32_t)n}) != 0)
			return -ENOMEM;
		e->n_ids += (uint32_t)(n + m);
	}
	return 0;
}

static int
tokenise(struct eval *e, struct err *err)
{
	uint32_t empty[4];
	int64_t n = tok_encode(e->tok, "", 0, TOK_BOS, empty, 4);

	e->has_bos = n > 0;
	e->bos = empty[0];
	for (size_t i = 0; i < e->n_corpora; i++) {
		const struct corpus *c = &e->corpus[i];
		uint32_t *all;

		if (c->task)
			continue;
		n = tok_encode(e->tok, c->data, c->len, 0, NULL, 0);
		if (n < 0 || n > INT32_MAX - e->n_ids)
			return err_set(err, n < 0 ? (int)n : -E2BIG, "%s: cannot be tokenised", c->name);
		all = realloc(e->ids, (e->n_ids + (size_t)n + 1) * sizeof(*all));
		if (all == NULL)
			return err_set(err, -ENOMEM, "out of memory");
		e->ids = all;
		tok_encode(e->tok, c->data, c->len, 0, all + e->n_ids, (size_t)n);
		if (add_chunks(e, e->n_ids, e->n_ids + (uint32_t)n) != 0)
			return err_set(err, -ENOMEM, "out of memory");
		e->n_ids += (uint32_t)n;
	}
	if (e->n_ids == 0 && add_items(e) != 0)
		return err_set(err, -ENOMEM, "out of memory");
	e->score = malloc((e->n_scores + 1) * sizeof(*e->score));
	return e->score != NULL ? 0 : err_set(err, -ENOMEM, "out of memory");
}

/* A NumPy array of FP32 [2 sides, tokens, vocab]. */
static int
make_dump(struct eval *e, struct err *err)
{
	size_t vocab = e->d->model->shape.vocab, data = 2 * e->n_scores * vocab * sizeof(float);
	char head[128];
	int n;

	if (e->n_scores == 0)
		return err_set(err, -EINVAL, "dump_logits needs a text");
	if (data > MAX_DUMP)
		return err_set(err, -E2BIG, "the logits of %zu tokens are %zu bytes: more than %zu", e->n_scores, data, MAX_DUMP);
	memset(head, ' ', sizeof(head));
	memcpy(head, "\x93NUMPY\x01\x00\x76\x00", 10); /* 118 bytes follow */
	n = snprintf(head + 10, sizeof(head) - 10, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, %zu, %zu), }",
	    e->n_scores, vocab);
	head[10 + n] = ' ';
	head[sizeof(head) - 1] = '\n';
	e->dump_head = sizeof(head);
	e->dump_bytes = sizeof(head) + data;
	e->dump_fd = memfd_create("octet-logits", MFD_CLOEXEC);
	if (e->dump_fd < 0 || ftruncate(e->dump_fd, (off_t)e->dump_bytes) != 0)
		return err_set(err, -errno, "logits: %s", strerror(errno));
	e->dump = mmap(NULL, e->dump_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, e->dump_fd, 0);
	if (e->dump == MAP_FAILED) {
		e->dump = NULL;
		return err_set(err, -errno, "logits: %s", strerror(errno));
	}
	memcpy(e->dump, head, sizeof(head));
	return 0;
}

static const char *
get_string(const json_t *request, const char *key, const char *fallback)
{
	const char *s = json_string_value(json_object_get(request, key));

	return s != NULL ? s : fallback;
}

/* Megabytes take seconds, and the loop has clients. */
static void
work_tokenise(uv_work_t *w)
{
	struct eval *e = w->data;

	e->tokenise_rc = tokenise(e, &e->tokenise_error);
}

static void
after_tokenise(uv_work_t *w, int status)
{
	struct eval *e = w->data;
	int rc = e->tokenise_rc;

	(void)status;
	e->tokenising = false;
	e->d->measuring--;
	if (rc == 0 && e->wants_dump)
		rc = make_dump(e, &e->tokenise_error);
	if (rc != 0)
		fail(e, rc, &e->tokenise_error);
	go_on(e);
}

int
eval_start(struct eval *e, const json_t *request, struct err *err)
{
	const char *side[N_SIDES] = {get_string(request, "baseline", "bf16"), get_string(request, "candidate", NULL)};
	uint32_t most = e->d->model->shape.max_context;
	json_int_t context = json_integer_value(json_object_get(request, "context"));
	int rc = 0;

	if (e->started)
		return err_set(err, -EBUSY, "eval: it runs already");
	if (side[1] == NULL)
		return err_set(err, -EINVAL, "eval: 'candidate' is missing");
	if (e->n_corpora == 0)
		return err_set(err, -EINVAL, "eval: there is neither text nor task");
	if (context != 0 && (context < 2 || context > most))
		return err_set(err, -EINVAL, "eval: a context of %lld tokens: this model takes 2 to %u", (long long)context, most);
	e->context = context != 0 ? (uint32_t)context : most < CONTEXT ? most : CONTEXT;
	for (int s = 0; s < N_SIDES && rc == 0; s++) {
		rc = parse_plan(e, side[s], e->plan[0], &e->plan[s], err);
		snprintf(e->policy[s], sizeof(e->policy[s]), "%.95s", side[s]);
	}
	snprintf(e->name, sizeof(e->name), "%.63s", get_string(request, "name", ""));
	snprintf(e->stop, sizeof(e->stop), "%.63s", get_string(request, "stop", ""));
	e->exclusive = json_is_true(json_object_get(request, "exclusive"));
	e->sweep = json_is_true(json_object_get(request, "sweep"));
	if (rc == 0 && (e->key = make_key(e)) == NULL)
		rc = err_set(err, -ENOMEM, "out of memory");
	if (rc == 0 && json_is_true(json_object_get(request, "reuse")) &&
	    (e->result = json_incref(evals_find(e->d->evals, e->key))) != NULL) {
		e->started = e->over = true;
		return 0;
	}
	if (rc == 0)
		rc = tok_open(&e->tok, e->d->tok_blob, e->d->tok_len, err);
	if (rc != 0)
		return rc;
	e->wants_dump = json_is_true(json_object_get(request, "dump_logits"));
	e->started = true;
	e->started_us = octetd_now_us();
	e->work.data = e;
	rc = uv_queue_work(&e->d->loop, &e->work, work_tokenise, after_tokenise);
	if (rc != 0)
		return err_set(err, rc, "eval: %s", uv_strerror(rc));
	e->tokenising = true;
	e->d->measuring++;
	return 0;
}

/* ---- text ---- */

static struct probe *
make_probe(struct eval *e, enum probe_kind kind, const struct chunk *c, struct err *err)
{
	uint32_t n = c->to - c->from + c->bos, *token = malloc((n + 1) * sizeof(*token));
	struct probe *p = NULL;

	if (token != NULL) {
		token[0] = e->bos;
		memcpy(token + c->bos, e->ids + c->from, (c->to - c->from) * sizeof(*token));
		probe_new(&p, kind, token, n, c->scored - c->from + c->bos, e->plan[0], e->plan[1]);
	}
	if (p == NULL) {
		fail(e, err_set(err, -ENOMEM, "out of memory"), err);
		return NULL;
	}
	p->owner = &e->owner;
	p->exclusive = e->exclusive;
	for (int s = 0; s < N_SIDES && e->dump != NULL && kind == PROBE_SCORE; s++)
		p->dump[s] = (float *)(void *)(e->dump + e->dump_head) +
		    ((size_t)s * e->n_scores + c->at) * e->d->model->shape.vocab;
	return p;
}

static bool
post(struct eval *e, struct probe **slot, struct probe *p, struct err *err)
{
	int rc = engine_probe(e->d->engine, p, err);

	if (rc != 0) {
		fail(e, rc, err);
		probe_free(&p);
		return false;
	}
	*slot = p;
	e->d->measuring++;
	return true;
}

/* Nobody is served while it is measured how long a step takes: the longest chunk's end. */
static void
start_timing(struct eval *e)
{
	struct chunk fallback = {0}, *c = e->n_chunks > 0 ? &e->chunk[0] : &fallback;
	struct err err = {""};
	struct probe *p;

	e->timed = true;
	if (c->to - c->from + c->bos < 2 || (p = make_probe(e, PROBE_TIME, c, &err)) == NULL)
		return;
	p->rows = 1, p->rounds = TIME_ROUNDS, p->seconds = TIME_SECONDS;
	post(e, &e->timing, p, &err);
}

static void
start_chunks(struct eval *e)
{
	struct err err = {""};

	for (uint32_t i = 0; i < PROBES && e->rc == 0 && e->next_chunk < e->n_chunks; i++) {
		struct probe *p;

		if (e->probe[i] != NULL)
			continue;
		p = make_probe(e, PROBE_SCORE, &e->chunk[e->next_chunk], &err);
		if (p == NULL || !post(e, &e->probe[i], p, &err))
			return;
		e->next_chunk++;
	}
}

static void
take_timing(struct eval *e, struct probe *p)
{
	struct measure_step t;

	e->timing = NULL;
	measure_steps(p->us[0], p->us[1], p->rounds_run, &t);
	e->step = json_pack("{s:f,s:f,s:f,s:f,s:i}", "saved", t.saved, "saved_error", t.error, "baseline", t.us[0], "candidate",
	    t.us[1], "rounds", (int)p->rounds_run);
}

static void
take_chunk(struct eval *e, struct probe *p)
{
	/* One side after the other, in the order they were posted. */
	const struct chunk *c = &e->chunk[e->done_chunks++];

	for (uint32_t i = 0; i < PROBES; i++)
		if (e->probe[i] == p)
			e->probe[i] = NULL;
	for (int s = 0; s < N_SIDES; s++)
		e->side_us[s] += p->side_us[s], e->side_rows[s] += p->side_rows[s];
	if (p->error == 0)
		memcpy(e->score + c->at, p->score, (p->n - p->from) * sizeof(*p->score));
}

static void
explain(const struct eval *e, const struct probe *p, struct err *err)
{
	if (p->error == -EDOM)
		err_set(err, p->error, "the %s plan (%s) gave a value that is not finite, first at %s@%u, position %u",
		    p->bad_side == 0 ? "baseline" : "candidate", e->policy[p->bad_side], plan_group_name(p->bad_group), p->bad_layer,
		    p->bad_position);
	else
		err_set(err, p->error, p->error == -ENOSPC ? "the KV cache has no room for the eval" : "%s", strerror(-p->error));
}

static void
on_probe(struct probe_owner *o, struct probe *p)
{
	struct eval *e = (struct eval *)o;
	struct err err = {""};

	e->d->measuring--;
	if (p->error != 0 && !e->dropped) {
		explain(e, p, &err);
		fail(e, p->error, &err);
	}
	if (p->kind == PROBE_TIME)
		take_timing(e, p);
	else
		take_chunk(e, p);
	probe_free(&p);
	go_on(e);
}

/* ---- tasks ---- */

static uint32_t
answer_room(void *arg)
{
	(void)arg;
	return UINT32_MAX;
}

static void
answer_put(void *arg, const struct wire_event *ev)
{
	struct answer *a = arg;

	if (ev->kind == WIRE_EV_TOKEN)
		a->token[a->n++] = ev->token;
}

static void
answer_parked(void *arg, bool parked)
{
	(void)arg, (void)parked;
}

static void
answer_flush(void *arg)
{
	(void)arg;
}

static void
trim(char *s)
{
	size_t n = strlen(s);

	while (n > 0 && strchr(" \t\r\n", s[n - 1]) != NULL)
		s[--n] = '\0';
}

/* malloc'd text up to the stop string. */
static char *
answer_text(const struct eval *e, const struct answer *a)
{
	int64_t n = tok_decode(e->tok, a->token, a->n, true, NULL, 0);
	char *text = n >= 0 ? malloc((size_t)n + 1) : NULL, *stop;

	if (text == NULL)
		return NULL;
	tok_decode(e->tok, a->token, a->n, true, text, (size_t)n);
	text[n] = '\0';
	if (*e->stop != '\0' && (stop = strstr(text, e->stop)) != NULL)
		*stop = '\0';
	trim(text);
	return text;
}

static void
on_answer(struct request *r)
{
	struct answer *a = r->owner;
	struct eval *e = a->e;
	struct item *it = &e->item[a->item];
	struct err err = {""};

	e->d->measuring--;
	e->running--;
	a->r = NULL;
	if (r->finish == WIRE_FINISH_ERROR)
		fail(e, r->error, (err_set(&err, r->error, "item %u under %s: %s", a->item + 1, e->policy[a->side], strerror(-r->error)),
		    &err));
	else if (!e->dropped && (it->output[a->side] = answer_text(e, a)) == NULL)
		fail(e, -ENOMEM, (err_set(&err, -ENOMEM, "out of memory"), &err));
	e->done_answers++;
	request_free(&r);
	go_on(e);
}

/* Tokens of an item's prompt, malloc'd. */
static uint32_t *
prompt_of(const struct eval *e, const struct item *it, int64_t *n)
{
	const char *hole = it->template != NULL ? strstr(it->template, "{input}") : NULL;
	char *text = NULL;
	uint32_t *ids = NULL;

	if (hole != NULL && asprintf(&text, "%.*s%s%s", (int)(hole - it->template), it->template, it->input, hole + 7) < 0)
		return NULL;
	for (int pass = 0; pass < 2; pass++) {
		*n = text != NULL ? tok_encode(e->tok, text, strlen(text), TOK_BOS | TOK_SPECIAL, ids, ids != NULL ? (size_t)*n : 0)
		                  : tok_template(e->tok, it->input, strlen(it->input), ids, ids != NULL ? (size_t)*n : 0, NULL);
		if (*n <= 0 || ids != NULL || (ids = malloc((size_t)*n * sizeof(*ids))) == NULL)
			break;
	}
	free(text);
	return ids;
}

static bool
start_answer(struct eval *e, struct answer *a)
{
	uint32_t i = e->next_answer / 2, context = e->d->model->shape.max_context;
	int side = (int)(e->next_answer % 2);
	const struct item *it = &e->item[i];
	int64_t n = 0, most = tok_encode(e->tok, it->expected, strlen(it->expected), 0, NULL, 0);
	uint32_t *prompt = prompt_of(e, it, &n);
	struct err err = {""};
	int rc;

	if (prompt == NULL || n <= 0 || n >= context) {
		rc = n >= context ? -E2BIG : -EINVAL;
		free(prompt);
		fail(e, rc, (err_set(&err, rc, "item %u: the prompt has %lld tokens, the context %u", i + 1, (long long)n, context), &err));
		return false;
	}
	most = 2 * most + 32;
	most = most < context - n ? most : context - n;
	free(a->token);
	*a = (struct answer){.e = e, .item = i, .side = side, .token = malloc((size_t)most * sizeof(uint32_t))};
	a->r = calloc(1, sizeof(*a->r));
	if (a->r == NULL || a->token == NULL) {
		free(a->r), free(prompt);
		a->r = NULL;
		fail(e, -ENOMEM, (err_set(&err, -ENOMEM, "out of memory"), &err));
		return false;
	}
	*a->r = (struct request){.client = UINT64_MAX, .prompt = prompt, .n_prompt = (uint32_t)n, .plan = plan_ref(e->plan[side]),
	    .sampling = {.max_tokens = (uint32_t)most, .top_p = 1},
	    .sink = {answer_room, answer_put, answer_parked, answer_flush, a}, .owner = a, .done = on_answer};
	rc = engine_submit(e->d->engine, a->r, &err);
	if (rc != 0) {
		request_free(&a->r);
		if (rc != -EBUSY)
			fail(e, rc, &err);
		return false;
	}
	e->next_answer++;
	e->running++;
	e->d->measuring++;
	return true;
}

static void
start_answers(struct eval *e)
{
	uint32_t most = server_in_flight(e->d->server) > 0 && !e->exclusive ? BESIDE : ALONE;

	for (uint32_t i = 0; i < ALONE && e->rc == 0 && e->running < most && e->next_answer < 2 * e->n_items; i++)
		if (e->answer[i].r == NULL && !start_answer(e, &e->answer[i]))
			return;
}

/* ---- the result ---- */

static json_t *
text_at(const struct eval *e, uint32_t from, uint32_t to)
{
	int64_t n = tok_decode(e->tok, e->ids + from, to - from, false, NULL, 0);
	char *text = n >= 0 ? malloc((size_t)n + 1) : NULL;
	json_t *j;

	if (text == NULL)
		return json_string("");
	tok_decode(e->tok, e->ids + from, to - from, false, text, (size_t)n);
	text[n] = '\0';
	j = json_lossy(text);
	free(text);
	return j;
}

static json_t *
piece(const struct eval *e, uint32_t id)
{
	char text[64];
	size_t len = 0;
	const char *p = tok_text(e->tok, id, &len);

	snprintf(text, sizeof(text), "%.*s", p == NULL ? 0 : len < 63 ? (int)len : 63, p == NULL ? "" : p);
	return json_lossy(text);
}

static json_t *
worst_tokens(const struct eval *e)
{
	json_t *list = json_array();
	size_t worst[WORST], n = 0;

	for (size_t i = 0; i < e->n_scores; i++) {
		size_t at;

		if (n == WORST && !(e->score[i].kl > e->score[worst[n - 1]].kl))
			continue;
		at = n < WORST ? n++ : WORST - 1;
		for (; at > 0 && e->score[i].kl > e->score[worst[at - 1]].kl; at--)
			worst[at] = worst[at - 1];
		worst[at] = i;
	}
	for (size_t k = 0; k < n && e->score[worst[k]].kl > 0; k++) {
		const struct probe_score *s = &e->score[worst[k]];
		const struct chunk *c = e->chunk;
		uint32_t id, from;

		while (worst[k] >= c->at + (c->to - c->scored))
			c++;
		id = c->scored + (uint32_t)(worst[k] - c->at);
		from = id > c->from + 12 ? id - 12 : c->from;
		json_array_append_new(list, json_pack("{s:I,s:f,s:o,s:o,s:f,s:f,s:o,s:o}", "at", (json_int_t)id, "kl", s->kl, "before",
		    text_at(e, from, id), "token", piece(e, e->ids[id]), "p_baseline", exp(-s->nll[0]), "p_candidate",
		    exp(-s->nll[1]), "first_baseline", piece(e, s->first[0]), "first_candidate", piece(e, s->first[1])));
	}
	return list;
}

static json_t *
task_result(const struct eval *e)
{
	uint32_t exact[N_SIDES] = {0}, better = 0, worse = 0, changed = 0;
	uint64_t edit[N_SIDES] = {0}, words[N_SIDES] = {0}, before = 0;
	json_t *side[N_SIDES];

	for (uint32_t i = 0; i < e->n_items; i++) {
		const struct item *it = &e->item[i];
		bool right[N_SIDES];

		trim(it->expected);
		before += measure_word_errors(it->input, it->expected);
		for (int s = 0; s < N_SIDES; s++) {
			right[s] = strcmp(it->output[s], it->expected) == 0;
			exact[s] += right[s];
			edit[s] += measure_edit_distance(it->output[s], it->expected);
			words[s] += measure_word_errors(it->output[s], it->expected);
		}
		better += right[1] && !right[0];
		worse += right[0] && !right[1];
		changed += strcmp(it->output[0], it->output[1]) != 0;
	}
	for (int s = 0; s < N_SIDES; s++)
		side[s] = json_pack("{s:i,s:f,s:I,s:I}", "exact", (int)exact[s], "exact_share", (double)exact[s] / e->n_items,
		    "edit_distance", (json_int_t)edit[s], "word_errors", (json_int_t)words[s]);
	return json_pack("{s:i,s:I,s:o,s:o,s:i,s:i,s:i,s:f}", "pairs", (int)e->n_items, "word_errors_before", (json_int_t)before,
	    "baseline", side[0], "candidate", side[1], "changed", (int)changed, "better", (int)better, "worse", (int)worse,
	    "mcnemar_p", measure_mcnemar(better, worse));
}

static json_t *
corpora(const struct eval *e)
{
	json_t *list = json_array();

	for (size_t i = 0; i < e->n_corpora; i++)
		json_array_append_new(list, json_pack("{s:o,s:s,s:I}", "file", json_lossy(e->corpus[i].name), "kind",
		    e->corpus[i].task ? "task" : "text", "bytes", (json_int_t)e->corpus[i].len));
	return list;
}

static json_t *
speed(const struct eval *e, int side)
{
	return e->side_us[side] > 0 ? json_real((double)e->side_rows[side] / e->side_us[side] * 1e6) : json_null();
}

static void
finish(struct eval *e)
{
	char *change = plan_diff(e->plan[0], e->plan[1]), when[32];
	time_t now = time(NULL);
	struct tm tm;
	json_t *r;

	strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &tm));
	r = json_pack("{s:s,s:o,s:b,s:o,s:o,s:o,s:i,s:O,s:o,s:f}", "time", when, "name", json_lossy(e->name), "sweep", e->sweep,
	    "baseline", json_lossy(e->policy[0]), "candidate", json_lossy(e->policy[1]), "change",
	    json_lossy(change != NULL ? change : ""), "sites", (int)plan_distance(e->plan[0], e->plan[1]), "key", e->key,
	    "corpora", corpora(e), "seconds", (double)(octetd_now_us() - e->started_us) / 1e6);
	free(change);
	if (e->n_scores > 0) {
		json_t *t = measure_scores(e->score, e->n_scores);

		json_object_set_new(t, "tokens_s", json_pack("{s:o,s:o}", "baseline", speed(e, 0), "candidate", speed(e, 1)));
		json_object_set_new(t, "worst", worst_tokens(e));
		json_object_set_new(r, "text", t);
	}
	if (e->step != NULL)
		json_object_set(r, "step_us", e->step);
	if (e->n_items > 0)
		json_object_set_new(r, "task", task_result(e));
	evals_add(e->d->evals, r);
	e->result = r;
	e->over = true;
	log_info("eval", "id=%" JSON_INTEGER_FORMAT " baseline=%s candidate=%s tokens=%zu pairs=%u",
	    json_integer_value(json_object_get(r, "id")), LOG_Q(e->policy[0]), LOG_Q(e->policy[1]), e->n_scores, e->n_items);
}

/* Text, then time, then tasks. */
static void
go_on(struct eval *e)
{
	if (e->dropped || e->rc != 0) {
		if (e->dropped && !in_flight(e))
			free_eval(e);
		return;
	}
	if (e->done_chunks < e->n_chunks) {
		start_chunks(e);
		return;
	}
	if (!e->timed)
		start_timing(e);
	if (e->timing != NULL)
		return;
	if (e->done_answers < 2 * e->n_items) {
		start_answers(e);
		return;
	}
	if (!e->over)
		finish(e);
}

int
eval_poll(struct eval *e, json_t **reply, struct err *err)
{
	size_t done = e->done_chunks + e->done_answers, total = e->n_chunks + 2 * (size_t)e->n_items;
	double spent = (double)(octetd_now_us() - e->started_us) / 1e6;

	if (!e->started)
		return err_set(err, -EINVAL, "eval: it was not started");
	if (e->rc != 0) {
		*err = e->error;
		return e->rc;
	}
	if (!e->over && !in_flight(e) && e->done_chunks == e->n_chunks)
		go_on(e); /* the queue may have been full */
	*reply = json_pack("{s:s,s:I,s:I,s:f}", "state", e->over ? "done" : "running", "done", (json_int_t)done, "total",
	    (json_int_t)total, "seconds_left", done > 0 ? spent / (double)done * (double)(total - done) : -1.0);
	if (e->over)
		json_object_set(*reply, "result", e->result);
	return *reply != NULL ? 0 : err_set(err, -ENOMEM, "out of memory");
}

int
eval_dump_fd(const struct eval *e)
{
	return e->over && e->rc == 0 ? e->dump_fd : -1;
}
