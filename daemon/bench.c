/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/bench.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "daemon/engine/device.h"

#define MAX_BATCH 128u
#define MAX_PREFILL 2048u
#define CHUNK 512u            /* rows of a prefill step: the default of engine.max_batch_tokens */
#define CONTEXT 128u          /* positions that a decoding sequence has behind it, unless told */
#define DECODE_ROOM 128u      /* and may take */
#define ROUNDS 5u             /* unless told, each a measurement of every format, one after the other */
#define ROUND_SECONDS 0.5     /* a round goes on so long */
#define TEST_SECONDS 60.0     /* a slow test ends after fewer rounds: all formats together */
#define READ_BYTES ((size_t)1 << 30)

struct test {
	const char *name;
	uint32_t n;               /* tokens of a prefill, sequences of a decode */
	bool decode;
};

static const struct test tests[] = {{"prefill", 128, false}, {"prefill", 512, false}, {"prefill", 2048, false},
    {"decode", 1, true}, {"decode", 4, true}, {"decode", 8, true}, {"decode", 16, true}, {"decode", 32, true},
    {"decode", 64, true}, {"decode", 128, true}};
#define CPU_BATCH 64u
#define N_TESTS (sizeof(tests) / sizeof(*tests))
#define N_LINEAR_FORMATS ((int)K_N_FORMATS)

struct result {
	bool measured;
	double tokens_s, step_ms, gbs, gflops;
};

struct bench {
	const struct bench_options *o;
	const struct k_ops *ops;
	struct team *team;
	struct model *m;
	struct forward *f;
	struct kv_pool kv;
	struct kv_seq seq[MAX_BATCH];
	struct plan *plan[K_N_FORMATS]; /* every linear layer and lm_head so; KV cache BF16 */
	struct forward_row row[CHUNK];
	struct device *device;   /* NULL: the CPU */
	bool under_way;          /* a pass there */
	uint32_t context, batch; /* behind a decoding sequence; sequences at most */

	double read_gbs, fma_gflops, load_s, flip_us, flip_ratio;
	uint64_t rss_loaded, rss_peak;
	int64_t flip_rss;
	struct result result[N_TESTS][K_N_FORMATS];
};

static double
now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static int
by_value(const void *pa, const void *pb)
{
	double a = *(const double *)pa, b = *(const double *)pb;

	return a < b ? -1 : a > b;
}

static double
median(double *v, uint32_t n)
{
	qsort(v, n, sizeof(*v), by_value);
	return v[n / 2];
}

/* A line of /proc/self/status: "VmRSS", "VmHWM". */
static uint64_t
memory_bytes(const char *key)
{
	FILE *f = fopen("/proc/self/status", "r");
	unsigned long kib = 0;
	char line[128];

	while (f != NULL && fgets(line, sizeof(line), f) != NULL)
		if (strncmp(line, key, strlen(key)) == 0)
			sscanf(line + strlen(key), ": %lu", &kib);
	if (f != NULL)
		fclose(f);
	return (uint64_t)kib * 1024;
}

/* From here on, the peak is another one. */
static void
forget_peak(void)
{
	FILE *f = fopen("/proc/self/clear_refs", "w");

	if (f != NULL) {
		fputs("5", f);
		fclose(f);
	}
}

/* ---- ceilings ---- */

struct probe {
	const struct k_ops *ops;
	char *mem;
	double flops[256]; /* by part */
};

static void
read_part(void *arg, uint32_t part, uint32_t parts)
{
	struct probe *p = arg;
	uint32_t from, to;

	team_share(READ_BYTES / 4096, part, parts, &from, &to);
	p->ops->probe_read(p->mem + (size_t)from * 4096, (size_t)(to - from) * 4096);
}

static void
touch_part(void *arg, uint32_t part, uint32_t parts)
{
	struct probe *p = arg;
	uint32_t from, to;

	team_share(READ_BYTES / 4096, part, parts, &from, &to);
	memset(p->mem + (size_t)from * 4096, 1, (size_t)(to - from) * 4096);
}

static void
fma_part(void *arg, uint32_t part, uint32_t parts)
{
	struct probe *p = arg;

	(void)parts;
	p->flops[part % 256] = p->ops->probe_fma(500000); /* milliseconds: waking the team counts too */
}

static int
measure_ceilings(struct bench *b, struct err *err)
{
	struct probe p = {.ops = b->ops};
	double t[7], g[7];

	p.mem = mmap(NULL, READ_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p.mem == MAP_FAILED)
		return err_set(err, -ENOMEM, "no memory to measure reading with");
	madvise(p.mem, READ_BYTES, MADV_HUGEPAGE);
	team_run(b->team, touch_part, &p);
	for (int i = 0; i < 7; i++) {
		double start = now();

		team_run(b->team, read_part, &p);
		t[i] = (double)READ_BYTES / (now() - start) * 1e-9;
		start = now();
		team_run(b->team, fma_part, &p);
		g[i] = now() - start;
		for (uint32_t j = 1; j < team_size(b->team) && j < 256; j++)
			p.flops[0] += p.flops[j];
		g[i] = p.flops[0] / g[i] * 1e-9;
	}
	munmap(p.mem, READ_BYTES);
	/* What the machine can do: the best that was seen. */
	qsort(t, 7, sizeof(*t), by_value);
	qsort(g, 7, sizeof(*g), by_value);
	b->read_gbs = t[6];
	b->fma_gflops = g[6];
	return 0;
}

/* ---- a model and room to run it ---- */

static int
open_positions(struct bench *b, struct kv_seq *s, uint32_t to, struct err *err)
{
	for (uint32_t pos = s->n_blocks * KV_PAGE_TOKENS; pos < to; pos += KV_PAGE_TOKENS)
		if (kv_open(&b->kv, s, b->plan[K_BF16], pos) != 0)
			return err_set(err, -ENOMEM, "the KV cache is too small to measure with");
	return 0;
}

static int
make_room(struct bench *b, struct err *err)
{
	uint32_t layers = b->m->shape.n_layers, each = b->context + DECODE_ROOM, pages;
	int rc;

	for (int f = 0; f < N_LINEAR_FORMATS; f++) {
		const char *name = plan_format_name((enum plan_format)f);
		struct plan_rule rule[] = {{"attention.*", name, 0}, {"mlp.*", name, 0}, {"lm_head", name, 0}};

		if ((rc = plan_derive(&b->plan[f], NULL, layers, rule, 3, err)) != 0)
			return rc;
	}
	if (b->m->shape.max_context < each)
		return err_set(err, -EINVAL, "%s: a context of %u positions is too short to measure with: %u", b->m->path,
		    b->m->shape.max_context, each);
	pages = kv_block_pages(NULL, layers) * (kv_blocks_for(each) * b->batch + kv_blocks_for(MAX_PREFILL));
	if ((rc = kv_new(&b->kv, &b->m->shape, kv_page_bytes(&b->m->shape) * pages, err)) != 0)
		return rc;
	for (uint32_t i = 0; i < b->batch; i++) {
		uint32_t room = i == 0 && b->m->shape.max_context >= MAX_PREFILL && MAX_PREFILL > each ? MAX_PREFILL : each;

		if (kv_seq_new(&b->seq[i], layers, room) != 0)
			return err_set(err, -ENOMEM, "out of memory");
		if ((rc = open_positions(b, &b->seq[i], room, err)) != 0)
			return rc;
	}
	if ((rc = forward_new(&b->f, b->m, b->ops, b->team, &b->kv, CHUNK, err)) != 0 || b->device == NULL)
		return rc;
	rc = device_load(b->device, b->m, &b->kv, CHUNK, &(struct device_options){.fast_accumulation = b->o->fast_accumulation}, err);
	if (rc == 0)
		forward_use_device(b->f, b->device);
	return rc;
}

/* ---- steps ---- */

/* Any ids: what they are does not change the time. */
static uint32_t
some_token(const struct bench *b, uint32_t i)
{
	return (i * 2654435761u) % b->m->shape.vocab;
}

/* A device keeps its logits: it finds the likeliest tokens instead. */
static void
sample_there(struct bench *b, uint32_t n)
{
	static const struct sampling greedy;

	for (uint32_t i = 0; i < n && b->device != NULL; i++)
		device_want(b->device, &greedy, NULL, 0, 0, 0);
}

/* On a device the next pass is started while one runs, as the engine does it. */
static void
run_rows(struct bench *b, uint32_t n)
{
	if (b->device == NULL) {
		forward_run(b->f, b->row, n);
		return;
	}
	forward_start(b->f, b->row, n);
	if (b->under_way)
		forward_wait(b->f);
	b->under_way = true;
}

static void
finish_rows(struct bench *b)
{
	if (b->under_way)
		forward_wait(b->f);
	b->under_way = false;
}

static void
prefill(struct bench *b, const struct plan *plan, uint32_t n)
{
	for (uint32_t done = 0, rows; done < n; done += rows) {
		rows = n - done < CHUNK ? n - done : CHUNK;
		for (uint32_t i = 0; i < rows; i++)
			b->row[i] = (struct forward_row){.token = some_token(b, done + i), .pos = done + i, .kv = &b->seq[0], .plan = plan,
			    .wants_logits = done + i + 1 == n};
		sample_there(b, done + rows == n);
		run_rows(b, rows);
	}
}

static void
decode(struct bench *b, const struct plan *plan, uint32_t n, uint32_t step)
{
	for (uint32_t i = 0; i < n; i++)
		b->row[i] = (struct forward_row){.token = some_token(b, i + step), .pos = b->context + step % DECODE_ROOM, .kv = &b->seq[i],
		    .plan = plan, .wants_logits = true};
	sample_there(b, n);
	run_rows(b, n);
}

/* A row, from beginning to end. */
static void
decode_alone(struct bench *b, const struct plan *plan, uint32_t step)
{
	decode(b, plan, 1, step);
	finish_rows(b);
}

/* Seconds of one prefill, or of one decode step: the mean over a round. */
static double
one_round(struct bench *b, const struct test *t, const struct plan *plan)
{
	double start = now(), end;
	uint32_t n = 0;

	do {
		if (t->decode)
			decode(b, plan, t->n, n);
		else
			prefill(b, plan, t->n);
		n++;
		end = now();
	} while (end - start < ROUND_SECONDS);
	finish_rows(b);
	return (now() - start) / n;
}

/* ---- what a step must read and compute ---- */

static double
layer_weights(const struct bench *b)
{
	double n = 0;

	for (enum plan_group g = GROUP_Q; g <= GROUP_DOWN; g++)
		n += (double)b->m->layer[0].linear[g].n_pad * b->m->layer[0].linear[g].k_pad;
	return n * b->m->shape.n_layers;
}

static void
fill_result(struct bench *b, const struct test *t, int format, double seconds, struct result *r)
{
	const struct model_shape *s = &b->m->shape;
	double head = (double)b->m->lm_head.n_pad * b->m->lm_head.k_pad, linear = layer_weights(b);
	double chunks = t->decode ? 1 : (t->n + CHUNK - 1) / CHUNK, rows = t->n;
	double context = t->decode ? b->context + DECODE_ROOM / 2 : t->n / 2.0, kv_rows = t->decode ? rows : 0;
	double kv = 4.0 * s->n_kv_heads * s->head_dim * s->n_layers * context;
	double bytes = (chunks * linear + head) * (format == K_BF16 || format == K_FP8B ? 2 : 1) + kv_rows * kv;
	double flops = 2 * (linear * rows + head * (t->decode ? rows : 1)) +
	    4.0 * s->n_heads * s->head_dim * s->n_layers * context * rows;

	*r = (struct result){true, rows / seconds, seconds * 1e3, bytes / seconds * 1e-9, flops / seconds * 1e-9};
}

static bool
is_wanted(const struct bench *b, const struct test *t, int format)
{
	char name[64], words[64];

	snprintf(name, sizeof(name), " %s %s %u ", plan_format_name((enum plan_format)format), t->name, t->n);
	snprintf(words, sizeof(words), " %s ", b->o->only == NULL ? "" : b->o->only);
	if (t->decode && t->n > b->batch)
		return false;
	if (format == K_FP8B && strstr(words, "fp8b") == NULL)
		return false; /* so slow that the others would have fewer rounds */
	return (t->decode || t->n <= b->m->shape.max_context) && (b->o->only == NULL || strstr(name, words) != NULL);
}

static void
run_test(struct bench *b, const struct test *t, struct result result[K_N_FORMATS])
{
	double seconds[K_N_FORMATS][BENCH_MAX_ROUNDS], start = now();
	uint32_t round = 0, rounds = b->o->rounds != 0 ? b->o->rounds : ROUNDS;

	for (int f = 0; f < N_LINEAR_FORMATS; f++)
		if (is_wanted(b, t, f))
			decode_alone(b, b->plan[f], 0); /* warm */
	do {
		for (int f = 0; f < N_LINEAR_FORMATS; f++)
			if (is_wanted(b, t, f))
				seconds[f][round] = one_round(b, t, b->plan[f]);
	} while (++round < rounds && now() - start < TEST_SECONDS);
	for (int f = 0; f < N_LINEAR_FORMATS; f++)
		if (is_wanted(b, t, f))
			fill_result(b, t, f, median(seconds[f], round), &result[f]);
}

/* A new plan, and the first step under it, beside a step of either format. */
static int
measure_flip(struct bench *b, struct err *err)
{
	double derive[9], first[9], usual[9];
	uint64_t before = memory_bytes("VmRSS");

	for (uint32_t i = 0; i < 9; i++) {
		const char *name = i % 2 == 0 ? "fp8" : "bf16";
		struct plan_rule rule[] = {{"attention.*", name, 0}, {"mlp.*", name, 0}, {"lm_head", name, 0}};
		struct plan *plan = NULL;
		double start = now();
		int rc = plan_derive(&plan, b->plan[i % 2 == 0 ? K_BF16 : K_FP8], b->m->shape.n_layers, rule, 3, err);

		if (rc != 0)
			return rc;
		derive[i] = now() - start;
		start = now();
		decode_alone(b, plan, 0);
		first[i] = now() - start;
		start = now();
		decode_alone(b, plan, 1);
		usual[i] = first[i] / (now() - start);
		plan_unref(&plan);
	}
	b->flip_us = median(derive, 9) * 1e6;
	b->flip_ratio = median(usual, 9);
	b->flip_rss = (int64_t)memory_bytes("VmRSS") - (int64_t)before;
	return 0;
}

/* ---- what it prints ---- */

static double
mib(uint64_t bytes)
{
	return (double)bytes / 1048576;
}

static void
print_text(const struct bench *b)
{
	printf("model     %s: %.1f MiB of weights, loaded in %.2f s\n", b->m->name, mib(b->m->weights_bytes), b->load_s);
	printf("machine   CPU level %s, %u threads: reads %.1f GB/s, computes %.0f GFLOP/s\n", b->ops->name,
	    team_size(b->team), b->read_gbs, b->fma_gflops);
	if (b->device != NULL) {
		struct kd_status st;

		device_status(b->device, &st);
		printf("device    %s, %s; %u MHz, memory %u MHz, %u of %u W; %% are of the CPU's memory\n", st.device, st.kernels, st.sm_mhz,
		    st.mem_mhz, st.watts, st.limit_watts);
	}
	printf("memory    %.1f MiB resident after loading, %.1f MiB at most, %.1f MiB of it KV cache and its room\n",
	    mib(b->rss_loaded), mib(b->rss_peak), mib(b->kv.bytes));
	printf("flip      %.1f us for a plan of %u layers, first step %.2fx the next one, %+.1f MiB resident\n\n", b->flip_us,
	    b->m->shape.n_layers, b->flip_ratio, mib((uint64_t)llabs(b->flip_rss)) * (b->flip_rss < 0 ? -1 : 1));
	printf("%-6s %-8s %5s %10s %10s %8s %6s %10s %6s\n", "format", "test", "n", "tokens/s", "ms", "GB/s", "%", "GFLOP/s",
	    "%");
	for (size_t t = 0; t < N_TESTS; t++) {
		for (int f = 0; f < N_LINEAR_FORMATS; f++) {
			const struct result *r = &b->result[t][f];

			if (r->measured)
				printf("%-6s %-8s %5u %10.1f %10.2f %8.2f %6.1f %10.1f %6.1f\n", plan_format_name((enum plan_format)f),
				    tests[t].name, tests[t].n, r->tokens_s, r->step_ms, r->gbs, 100 * r->gbs / b->read_gbs, r->gflops,
				    100 * r->gflops / b->fma_gflops);
		}
	}
}

static void
print_json(const struct bench *b)
{
	json_t *list = json_array(), *o;

	for (size_t t = 0; t < N_TESTS; t++) {
		for (int f = 0; f < N_LINEAR_FORMATS; f++) {
			const struct result *r = &b->result[t][f];

			if (r->measured)
				json_array_append_new(list, json_pack("{s:s,s:s,s:i,s:f,s:f,s:f,s:f}", "format",
				    plan_format_name((enum plan_format)f), "test", tests[t].name, "n", (int)tests[t].n, "tokens_s", r->tokens_s,
				    "ms", r->step_ms, "gb_s", r->gbs, "gflop_s", r->gflops));
		}
	}
	o = json_pack("{s:s,s:s,s:s,s:i,s:i,s:{s:f,s:f},s:I,s:f,s:I,s:I,s:I,s:{s:f,s:f,s:I},s:o}", "model", b->m->name, "backend",
	    b->device != NULL ? device_name(b->device) : "cpu", "cpu_level", b->ops->name, "context", (int)b->context, "threads",
	    (int)team_size(b->team), "ceilings", "read_gb_s", b->read_gbs, "gflop_s", b->fma_gflops, "weights_bytes",
	    (json_int_t)b->m->weights_bytes, "load_s", b->load_s, "rss_loaded_bytes", (json_int_t)b->rss_loaded, "rss_peak_bytes",
	    (json_int_t)b->rss_peak, "kv_bytes", (json_int_t)b->kv.bytes, "flip", "derive_us", b->flip_us, "first_step_ratio",
	    b->flip_ratio, "rss_bytes", (json_int_t)b->flip_rss, "results", list);
	json_dumpf(o, stdout, JSON_INDENT(1));
	printf("\n");
	json_decref(o);
}

static int
measure(struct bench *b, struct err *err)
{
	double start;
	int rc;

	if ((rc = measure_ceilings(b, err)) != 0)
		return rc;
	forget_peak();
	start = now();
	if ((rc = model_load(&b->m, b->o->model, b->team, 0, 0, false, NULL, NULL, err)) != 0)
		return rc;
	b->load_s = now() - start;
	b->rss_loaded = memory_bytes("VmRSS");
	if ((rc = make_room(b, err)) != 0)
		return rc;
	kernels_thread_init();
	for (size_t t = 0; t < N_TESTS; t++)
		run_test(b, &tests[t], b->result[t]);
	rc = measure_flip(b, err);
	b->rss_peak = memory_bytes("VmHWM");
	return rc;
}

int
bench_run(const struct bench_options *o, struct err *err)
{
	struct bench *b = calloc(1, sizeof(*b));
	char why[256] = "";
	int rc = 0;

	if (b == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	b->o = o;
	b->context = o->context != 0 ? o->context : CONTEXT;
	b->batch = o->cuda ? MAX_BATCH : CPU_BATCH;
	if (o->cuda && (rc = device_open(&b->device, "cuda", 0, err)) != 0) {
		free(b);
		return rc;
	}
	b->ops = kernels_select(getenv("OCTET_CPU"), why, sizeof(why));
	if (b->ops == NULL)
		rc = err_set(err, -EINVAL, "OCTET_CPU: %s", why);
	else if ((rc = team_new(&b->team, o->threads, 1000)) != 0)
		err_set(err, rc, "worker threads: %s", strerror(-rc));
	team_pin_caller(b->team);
	if (rc == 0 && (rc = measure(b, err)) == 0) {
		if (o->json)
			print_json(b);
		else
			print_text(b);
	}
	for (uint32_t i = 0; i < MAX_BATCH; i++) {
		if (b->seq[i].block != NULL)
			kv_close(&b->kv, &b->seq[i]);
		kv_seq_free(&b->seq[i]);
	}
	for (int f = 0; f < N_LINEAR_FORMATS; f++)
		plan_unref(&b->plan[f]);
	forward_free(&b->f);
	if (b->kv.mem != NULL)
		kv_free(&b->kv);
	device_close(&b->device);
	model_free(&b->m);
	team_free(&b->team);
	free(b);
	return rc;
}
