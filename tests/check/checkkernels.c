/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Holds every level of this machine against `ref`, bit for bit: odd shapes, all
 * codes, extreme values, buffers that end (or begin) at a page that cannot be
 * touched. TAP on standard output.
 *
 *   checkkernels [--seed N] [--level NAME]   compares
 *   checkkernels --bench [--level NAME]      times every kernel, beside what the machine can do
 */
#include <float.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "daemon/engine/sample.h"
#include "kernels/kernels.h"

#ifndef EMU512
#define EMU512 false
#endif

static uint64_t seed = 1, rng;
static const struct k_ops *ref, *ops;
static unsigned n_tests, n_failed;

static uint32_t
rnd(void)
{
	rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
	return (uint32_t)(rng >> 32);
}

static uint32_t
below(uint32_t n)
{
	return (uint32_t)((uint64_t)rnd() * n >> 32);
}

static float
of_bits(uint32_t u)
{
	float f;

	memcpy(&f, &u, sizeof(f));
	return f;
}

/* Mostly near 1, sometimes anything finite, subnormal and signed zeros too. */
static float
some_float(void)
{
	float f;

	if (below(16) != 0)
		return ((float)below(2000001) - 1e6f) * 2e-6f;
	do
		f = of_bits(rnd());
	while (!isfinite(f));
	return below(4) == 0 ? (rnd() & 1 ? 0.0f : -0.0f) : f;
}

/* ---- memory with guards ---- */

struct guarded {
	char *map;
	size_t map_bytes, bytes;
	char *p;
};

/* tail: the buffer ends at a forbidden page; otherwise it begins after one. */
static void *
guard(struct guarded *g, size_t bytes, bool tail)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = (bytes + page - 1) / page * page;

	inner += inner == 0 ? page : 0;
	g->map_bytes = inner + 2 * page;
	g->map = mmap(NULL, g->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (g->map == MAP_FAILED || mprotect(g->map + page, inner, PROT_READ | PROT_WRITE) != 0) {
		perror("mmap");
		exit(1);
	}
	g->bytes = bytes;
	g->p = g->map + page + (tail ? inner - bytes : 0);
	return g->p;
}

static void
unguard(struct guarded *g)
{
	munmap(g->map, g->map_bytes);
}

static void
ok(bool good, const char *name, const char *shape)
{
	n_tests++;
	n_failed += !good;
	printf("%sok %u - %s %s%s%s\n", good ? "" : "not ", n_tests, ops->name, name, *shape ? " " : "", shape);
	fflush(stdout);
}

/* ---- linear ---- */

struct weights {
	struct k_weight w;
	void *mem;
	struct k_exception *exc;
};

/* Rows of extreme scales, zeros, and values that become exceptions. */
static void
fill_odd(uint16_t *rows, uint32_t n, uint32_t k)
{
	uint32_t kb_n = (k + K_BLOCK - 1) / K_BLOCK;
	bool tame[2 * 1024]; /* tiles of normal codes only, as most have them in real weights */

	for (uint32_t i = 0; i < 2 * kb_n; i++)
		tame[i] = below(2);
	for (uint32_t r = 0; r < n; r++) {
		int shift = below(8) == 0 ? (int)below(160) - 120 : -4;

		for (uint32_t i = 0; i < k; i++) {
			float v = ((float)below(2000001) - 1e6f) * 1e-6f;

			if (tame[r / 16 * kb_n + i / K_BLOCK]) {
				rows[r * k + i] = k_bf16_from_float(ldexpf(v / 2 + copysignf(0.5f, v), shift));
				continue;
			}
			v = ldexpf(v, shift);
			if (below(64) == 0)
				v = ldexpf(v, -(int)below(40));
			rows[r * k + i] = k_bf16_from_float(below(50) == 0 ? -0.0f : v);
		}
	}
}

/* For timing, as real ones are: bells of channels that differ by a factor of 4. */
static void
fill_bells(uint16_t *rows, uint32_t n, uint32_t k)
{
	for (uint32_t r = 0; r < n; r++) {
		float width = 0.01f * exp2f((float)below(2001) * 1e-3f);

		for (uint32_t i = 0; i < k; i++) {
			float v = -6;

			for (int j = 0; j < 12; j++)
				v += (float)below(2000001) * 5e-7f;
			rows[r * k + i] = k_bf16_from_float(v * width);
		}
	}
}

static void
make_weights(struct weights *x, uint32_t n, uint32_t k, void (*fill)(uint16_t *rows, uint32_t n, uint32_t k))
{
	size_t bytes = k_weight_plan(&x->w, n, k);
	uint16_t *rows = malloc((size_t)K_PANEL * k * sizeof(*rows));
	uint32_t n_exc = 0, cap = 0, bad_row, bad_col;

	x->mem = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
	x->exc = NULL;
	memset(x->mem, 0, bytes);
	k_weight_place(&x->w, x->mem);
	for (uint32_t p = 0; p < x->w.n_pad / K_PANEL; p++) {
		fill(rows, n - p * K_PANEL < K_PANEL ? n - p * K_PANEL : K_PANEL, k);
		if (k_pack_panel(&x->w, p, rows, &x->exc, &n_exc, &cap, &bad_row, &bad_col) != 0) {
			fprintf(stderr, "packing failed\n");
			exit(1);
		}
	}
	x->w.exc = x->exc;
	x->w.n_exc = n_exc;
	k_weight_finish(&x->w);
	free(rows);
}

static void
free_weights(struct weights *x)
{
	free(x->mem);
	free(x->exc);
}

static void
make_inputs(uint16_t *x, float *scale, uint32_t rows, uint32_t k, uint32_t k_pad, enum k_format format)
{
	float *row = malloc(k * sizeof(*row));
	size_t scales = format == K_FP8B ? k_squares(k_pad) : 1;

	for (uint32_t r = 0; r < rows; r++) {
		for (uint32_t i = 0; i < k; i++)
			row[i] = ((float)below(2000001) - 1e6f) * 1e-6f;
		scale[r * scales] = 1;
		if (format == K_FP8B)
			k_act_squares(ref, row, k, k_pad, x + (size_t)r * k_pad, &scale[r * scales]);
		else if (k_is_w8a8(format))
			ref->act_fp8(row, k, k_pad, x + (size_t)r * k_pad, &scale[r]);
		else
			ref->act_bf16(row, k, k_pad, x + (size_t)r * k_pad);
	}
	free(row);
}

static bool
linear_agrees(struct weights *w, uint32_t rows, enum k_format format, bool add, bool tail)
{
	struct guarded gx, ga, gb, gs;
	size_t n = w->w.n, y_bytes = rows * n * sizeof(float), scales = format == K_FP8B ? k_squares(w->w.k_pad) : 1;
	uint16_t *x = guard(&gx, (size_t)rows * w->w.k_pad * sizeof(*x), tail);
	float *scale = guard(&gs, rows * scales * sizeof(*scale), tail), *a = guard(&ga, y_bytes, tail), *b = guard(&gb, y_bytes, tail);
	uint32_t panels = w->w.n_pad / K_PANEL, cut = below(panels + 1);
	struct k_linear l = {.w = &w->w, .format = format, .x = x, .rows = rows, .ldx = w->w.k_pad, .ldy = n, .add = add,
	    .x_scale = k_is_w8a8(format) ? scale : NULL, .ld_scale = scales, .panel1 = panels};
	bool same;

	make_inputs(x, scale, rows, w->w.k, w->w.k_pad, format);
	for (size_t i = 0; i < rows * n; i++)
		a[i] = b[i] = some_float();
	l.y = a;
	k_linear_run(ref, &l);
	/* In two parts, as a team runs it. */
	l.y = b;
	l.panel1 = cut;
	k_linear_run(ops, &l);
	l.panel0 = cut, l.panel1 = panels;
	k_linear_run(ops, &l);
	same = memcmp(a, b, y_bytes) == 0;
	unguard(&gx), unguard(&gs), unguard(&ga), unguard(&gb);
	return same;
}

static void
check_linear(void)
{
	static const uint32_t dims[] = {1, 3, 17, 31, 32, 33, 65, 172, 288, 576}, rows[] = {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 65, 130};

	for (size_t i = 0; i < sizeof(dims) / sizeof(*dims); i++) {
		for (size_t j = 0; j < sizeof(dims) / sizeof(*dims); j += 1 + below(3)) {
			struct weights w;
			bool same = true;
			char shape[64];

			make_weights(&w, dims[i], dims[j], fill_odd);
			for (enum k_format f = 0; f < K_N_FORMATS; f++) {
				uint32_t r = rows[below(sizeof(rows) / sizeof(*rows))];

				same &= linear_agrees(&w, r, f, false, true);
				same &= linear_agrees(&w, r, f, true, false);
				same &= linear_agrees(&w, 1, f, below(2), below(2));
			}
			snprintf(shape, sizeof(shape), "n=%u k=%u, %u exceptions", dims[i], dims[j], w.w.n_exc);
			ok(same, "linear", shape);
			free_weights(&w);
		}
	}
}

/* ---- rows ---- */

static const uint32_t lengths[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 65, 172, 576, 2048};
#define N_LENGTHS (sizeof(lengths) / sizeof(*lengths))

typedef void (*row_fn)(const struct k_ops *, const float *x, const float *w, uint32_t n, void *out);

static void
run_bf16(const struct k_ops *o, const float *x, const float *w, uint32_t n, void *out)
{
	(void)w;
	o->act_bf16(x, n, (n + 31) & ~31u, out);
}

/* The scale goes behind the codes. */
static void
run_fp8(const struct k_ops *o, const float *x, const float *w, uint32_t n, void *out)
{
	uint32_t pad = (n + 31) & ~31u;

	(void)w;
	o->act_fp8(x, n, pad, out, (float *)out + pad / 2);
}

static void
run_norm(const struct k_ops *o, const float *x, const float *w, uint32_t n, void *out)
{
	o->rmsnorm(x, w, n, 1e-5f, out);
}

static void
run_silu(const struct k_ops *o, const float *x, const float *w, uint32_t n, void *out)
{
	o->silu_mul(x, w, n, out);
}

static void
run_divergence(const struct k_ops *o, const float *x, const float *w, uint32_t n, void *out)
{
	float max_x = x[0], max_w = w[0];
	double sum[3];

	for (uint32_t i = 1; i < n; i++)
		max_x = fmaxf(max_x, x[i]), max_w = fmaxf(max_w, w[i]);
	o->divergence(x, w, n, max_x, max_w, sum);
	memcpy(out, sum, sizeof(sum));
}

static void
run_scan(const struct k_ops *o, const float *x, const float *w, uint32_t n, void *out)
{
	float *max = out;
	uint32_t blocks = (n + K_SCAN - 1) / K_SCAN;

	max[2 * blocks] = o->scan(x, n, max);
	max[2 * blocks + 1] = o->scan(w, n, max + blocks);
}

static void
run_weights(const struct k_ops *o, const float *x, const float *w, uint32_t n, void *out)
{
	double *p = out, sum;
	float max = x[0];

	for (uint32_t i = 1; i < n; i++)
		max = fmaxf(max, x[i]);
	sum = o->weights(x, n, max, fabsf(w[0]) + 0.1, w[n - 1] > 0 ? 1e-3 : 0, p);
	memcpy(p + n, &sum, sizeof(sum));
}

static size_t
bytes_of(row_fn f, uint32_t n)
{
	uint32_t pad = (n + 31) & ~31u;

	if (f == run_bf16)
		return pad * sizeof(uint16_t);
	if (f == run_divergence)
		return 3 * sizeof(double);
	if (f == run_scan)
		return 2 * ((n + K_SCAN - 1) / K_SCAN + 1) * sizeof(float);
	if (f == run_weights)
		return (n + 1) * sizeof(double);
	return f == run_fp8 ? pad * sizeof(uint16_t) + sizeof(float) : n * sizeof(float);
}

static void
check_rows(const char *name, row_fn f)
{
	for (size_t i = 0; i < N_LENGTHS; i++) {
		uint32_t n = lengths[i];
		bool same = true;
		char shape[32];

		for (int round = 0; round < 6; round++) {
			struct guarded gx, gw, ga, gb;
			bool tail = round % 2;
			float *x = guard(&gx, n * sizeof(*x), tail), *w = guard(&gw, n * sizeof(*w), tail);
			void *a = guard(&ga, bytes_of(f, n), tail), *b = guard(&gb, bytes_of(f, n), tail);

			for (uint32_t j = 0; j < n; j++) {
				x[j] = round < 2 ? 0 : some_float() * (round == 3 ? 40 : 1);
				w[j] = some_float();
			}
			f(ref, x, w, n, a);
			f(ops, x, w, n, b);
			same &= memcmp(a, b, bytes_of(f, n)) == 0;
			unguard(&gx), unguard(&gw), unguard(&ga), unguard(&gb);
		}
		snprintf(shape, sizeof(shape), "n=%u", n);
		ok(same, name, shape);
	}
}

/* One that is not finite, at any place, is seen. */
static void
check_finite(void)
{
	static const float odd[] = {INFINITY, -INFINITY, NAN};
	static float x[300], max[3];
	bool seen = true;

	for (uint32_t i = 0; i < 300; i++)
		x[i] = i % 2 ? FLT_MAX : -FLT_MAX;
	seen &= ops->scan(x, 300, max) && max[0] == FLT_MAX && max[2] == FLT_MAX;
	for (uint32_t i = 0; i < 300; i++) {
		float kept = x[i];

		x[i] = odd[i % 3];
		seen &= !ops->scan(x, 300, max) && !ops->scan(x + i, 1, max);
		x[i] = kept;
	}
	ok(seen, "scan", "not finite");
}

/* Every magnitude that a BF16 has, and its neighbours, through both encoders. */
static void
check_codes(void)
{
	static float x[1024];
	static uint16_t a[1024], b[1024];
	float sa, sb;
	bool same = true;

	for (uint32_t base = 0; base < 0x8000; base += 256) {
		for (uint32_t i = 0; i < 1024; i++)
			x[i] = of_bits(((base + i / 4) << 16) + (i % 4 == 0 ? 0 : i % 4 == 1 ? 0x7fff : i % 4 == 2 ? 0x8000 : 0x8001));
		ref->act_bf16(x, 1024, 1024, a);
		ops->act_bf16(x, 1024, 1024, b);
		same &= memcmp(a, b, sizeof(a)) == 0;
		/* Scale 1: the largest is 448. */
		for (uint32_t i = 0; i < 1024; i++)
			x[i] = fabsf(x[i]) <= 448 ? (i & 1 ? -x[i] : x[i]) : 448;
		x[0] = 448;
		ref->act_fp8(x, 1024, 1024, a, &sa);
		ops->act_fp8(x, 1024, 1024, b, &sb);
		same &= sa == 1 && sb == 1 && memcmp(a, b, sizeof(a)) == 0;
	}
	ok(same, "act_bf16 and act_fp8", "all magnitudes");
}

static void
check_rope(void)
{
	static const uint32_t hd[] = {2, 8, 16, 32, 40, 64, 96, 128, 256};

	for (size_t i = 0; i < sizeof(hd) / sizeof(*hd); i++) {
		uint32_t heads = 1 + below(5), half = hd[i] / 2;
		size_t bytes = (size_t)heads * hd[i] * sizeof(float);
		struct guarded ga, gb, gc, gs;
		float *a = guard(&ga, bytes, true), *b = guard(&gb, bytes, true);
		float *c = guard(&gc, half * sizeof(*c), true), *s = guard(&gs, half * sizeof(*s), true);
		char shape[32];

		for (uint32_t j = 0; j < heads * hd[i]; j++)
			a[j] = b[j] = some_float();
		for (uint32_t j = 0; j < half; j++)
			c[j] = cosf((float)j), s[j] = sinf((float)j);
		ref->rope(a, heads, hd[i], c, s);
		ops->rope(b, heads, hd[i], c, s);
		snprintf(shape, sizeof(shape), "heads=%u head_dim=%u", heads, hd[i]);
		ok(memcmp(a, b, bytes) == 0, "rope", shape);
		unguard(&ga), unguard(&gb), unguard(&gc), unguard(&gs);
	}
}

/* ---- attention ---- */

#define BLOCKS 5u

/* Blocks of one sequence: formats 0 BF16, 1 FP8, 2 a mixture. */
struct cache {
	struct guarded k[BLOCKS], v[BLOCKS], q[BLOCKS], scale[BLOCKS];
	struct k_kv_block block[BLOCKS];
};

static void
make_cache(struct cache *c, uint32_t heads, uint32_t hd_pad, int format)
{
	size_t page = (size_t)heads * hd_pad * K_BLOCK * sizeof(uint16_t);

	for (uint32_t b = 0; b < BLOCKS; b++) {
		struct k_kv_block *kv = &c->block[b];

		kv->fp8 = format == 0 ? 0 : format == 1 ? 0xffffffffu : rnd();
		kv->k = format == 1 ? NULL : guard(&c->k[b], page, true);
		kv->v = format == 1 ? NULL : guard(&c->v[b], page, true);
		kv->q = format == 0 ? NULL : guard(&c->q[b], page, true);
		kv->scale = format == 0 ? NULL : guard(&c->scale[b], 2 * heads * K_BLOCK * sizeof(float), true);
		/* What was never written may hold anything, NaN included. */
		if (kv->k != NULL)
			memset(kv->k, 0xff, page), memset(kv->v, 0xff, page);
		if (kv->q != NULL)
			memset(kv->q, 0xff, page), memset(kv->scale, 0xff, 2 * heads * K_BLOCK * sizeof(float));
	}
}

static void
free_cache(struct cache *c, int format)
{
	for (uint32_t b = 0; b < BLOCKS; b++) {
		if (format != 1)
			unguard(&c->k[b]), unguard(&c->v[b]);
		if (format != 0)
			unguard(&c->q[b]), unguard(&c->scale[b]);
	}
}

/* The last row of a call once more, its blocks in parts: parts of parts of a level must be those of the whole. */
static bool
parts_agree(const struct k_attention *all, const float *want)
{
	uint32_t group = all->n_heads / all->n_kv_heads, heads = group < K_PART_HEADS ? group : K_PART_HEADS - 1;
	struct k_attention at = *all;
	struct guarded gp, go;
	uint32_t from, end;
	float *parts, *out = guard(&go, all->ld * sizeof(*out), true);

	at.pos += at.rows - 1, at.q += (at.rows - 1) * at.ld, at.rows = 1;
	from = k_window_first(at.pos, at.window) / K_BLOCK, end = at.pos / K_BLOCK + 1;
	at.head0 = below(all->n_kv_heads) * group, at.head1 = at.head0 + heads, at.out = out;
	parts = guard(&gp, (end - from) * k_part(heads, at.hd_pad) * sizeof(*parts), true);
	memset(parts, 0xff, (end - from) * k_part(heads, at.hd_pad) * sizeof(*parts));
	for (uint32_t b = from, to; b < end; b = to) {
		to = b + 1 + below(end - b);
		at.parts = parts + (b - from) * k_part(heads, at.hd_pad);
		at.block0 = b, at.block1 = to;
		ops->attention(&at);
	}
	at.parts = parts, at.block0 = from, at.block1 = end;
	ops->attention_merge(&at);
	from = at.head0 * at.head_dim;
	end = memcmp(out + from, want + (all->rows - 1) * all->ld + from, heads * at.head_dim * sizeof(*out));
	unguard(&gp), unguard(&go);
	return end == 0;
}

static bool
attention_agrees(uint32_t kv_heads, uint32_t group, uint32_t hd, int format)
{
	uint32_t hd_pad = (hd + 31) & ~31u, heads = kv_heads * group, n = 1 + below(BLOCKS * K_BLOCK);
	uint32_t window = below(3) == 0 ? 1 + below(n) : 0, rows = 1 + below(below(2) == 0 ? 1 : n < 40 ? n : 40);
	uint32_t first = k_window_first(n - rows, window), compared = rows;
	size_t ld = (size_t)heads * hd + below(3) * 8, bytes = ld * rows * sizeof(float), kv_n = (size_t)kv_heads * hd;
	struct guarded gq, ga, gb, gk;
	float *q = guard(&gq, bytes, true), *a = guard(&ga, bytes, true), *b = guard(&gb, bytes, true);
	float *k = guard(&gk, 2 * kv_n * sizeof(*k), true);
	struct cache c, d;
	struct k_attention at = {.q = q, .n_heads = heads, .n_kv_heads = kv_heads, .head_dim = hd, .hd_pad = hd_pad,
	    .head1 = heads, .ld = ld, .rows = rows, .pos = n - rows, .window = window, .scale = 1.0f / sqrtf((float)hd)};
	bool same;

	make_cache(&c, kv_heads, hd_pad, format);
	make_cache(&d, kv_heads, hd_pad, format);
	for (uint32_t i = 0; i < BLOCKS; i++)
		d.block[i].fp8 = c.block[i].fp8;
	for (uint32_t pos = first; pos < n; pos++) {
		for (size_t i = 0; i < 2 * kv_n; i++)
			k[i] = ((float)below(2000001) - 1e6f) * (below(8) ? 2e-6f : 2e-5f);
		ref->kv_write(&c.block[pos / K_BLOCK], k, k + kv_n, kv_heads, hd, hd_pad, pos % K_BLOCK);
		ops->kv_write(&d.block[pos / K_BLOCK], k, k + kv_n, kv_heads, hd, hd_pad, pos % K_BLOCK);
	}
	for (size_t i = 0; i < ld * rows; i++)
		q[i] = ((float)below(2000001) - 1e6f) * 3e-6f;
	memset(a, 0, bytes), memset(b, 0, bytes);
	/* What only the last row sees must not reach the others. */
	if (rows > 1 && below(3) == 0) {
		k[2 * kv_n - 1] = INFINITY;
		ref->kv_write(&c.block[(n - 1) / K_BLOCK], k, k + kv_n, kv_heads, hd, hd_pad, (n - 1) % K_BLOCK);
		ops->kv_write(&d.block[(n - 1) / K_BLOCK], k, k + kv_n, kv_heads, hd, hd_pad, (n - 1) % K_BLOCK);
		compared = rows - 1;
	}
	at.out = a, at.block = c.block;
	ref->attention(&at);
	at.out = b, at.block = d.block;
	at.head1 = below(heads + 1);
	ops->attention(&at);
	at.head0 = at.head1, at.head1 = heads;
	ops->attention(&at);
	same = memcmp(a, b, ld * compared * sizeof(*a)) == 0;
	at.head0 = 0;
	same &= compared < rows || parts_agree(&at, a);
	for (size_t i = 0; i < ld * compared; i++)
		same &= isfinite(a[i]);
	free_cache(&c, format), free_cache(&d, format);
	unguard(&gq), unguard(&ga), unguard(&gb), unguard(&gk);
	return same;
}

/* One slot of a page whose other bytes must stay. */
static bool
kv_write_agrees(uint32_t heads, uint32_t hd, bool fp8)
{
	uint32_t hd_pad = (hd + 31) & ~31u, slot = below(K_BLOCK);
	size_t n = (size_t)heads * hd, page = (size_t)heads * hd_pad * K_BLOCK * sizeof(uint16_t);
	struct cache c, d;
	struct guarded gk, gv;
	float *k = guard(&gk, n * sizeof(*k), true), *v = guard(&gv, n * sizeof(*v), true);
	bool same = true;

	make_cache(&c, heads, hd_pad, 2);
	make_cache(&d, heads, hd_pad, 2);
	c.block[0].fp8 = d.block[0].fp8 = fp8 ? 1u << slot : ~(1u << slot);
	for (size_t i = 0; i < n; i++)
		k[i] = some_float(), v[i] = below(4) == 0 ? 0 : some_float();
	ref->kv_write(&c.block[0], k, v, heads, hd, hd_pad, slot);
	ops->kv_write(&d.block[0], k, v, heads, hd, hd_pad, slot);
	same &= memcmp(c.block[0].k, d.block[0].k, page) == 0 && memcmp(c.block[0].v, d.block[0].v, page) == 0;
	same &= memcmp(c.block[0].q, d.block[0].q, page) == 0;
	same &= memcmp(c.block[0].scale, d.block[0].scale, 2 * heads * K_BLOCK * sizeof(float)) == 0;
	free_cache(&c, 2), free_cache(&d, 2);
	unguard(&gk), unguard(&gv);
	return same;
}

static void
check_kv_write(void)
{
	static const uint32_t hd[] = {2, 8, 16, 32, 40, 64, 80, 128, 256};

	for (size_t i = 0; i < sizeof(hd) / sizeof(*hd); i++) {
		bool same = true;
		char shape[64];

		for (int round = 0; round < 16; round++)
			same &= kv_write_agrees(1 + below(3), hd[i], round % 2);
		snprintf(shape, sizeof(shape), "head_dim=%u", hd[i]);
		ok(same, "kv_write", shape);
	}
}

static void
check_attention(void)
{
	static const uint32_t hd[] = {2, 8, 16, 32, 40, 64, 80, 128, 256};
	static const char *const format[] = {"bf16", "fp8", "mixed"};

	for (size_t i = 0; i < sizeof(hd) / sizeof(*hd); i++) {
		for (int f = 0; f < 3; f++) {
			bool same = true;
			char shape[64];

			for (int round = 0; round < 8; round++)
				same &= attention_agrees(1 + below(3), 1 + below(round == 0 ? 20 : 5), hd[i], f);
			snprintf(shape, sizeof(shape), "head_dim=%u kv=%s", hd[i], format[f]);
			ok(same, "attention", shape);
		}
	}
}

/* ---- levels ---- */

/* Of amx-emulated.c. */
void kernels_fill_amx_emulated(struct k_ops *);
bool amx_agrees_emulated(void);

#define EMULATED "amx-emulated"

/* Those of the library, and one more. */
static const char *
level_name(size_t i)
{
	const char *name = kernels_level(i);

	return name == NULL && kernels_level(i - 1) != NULL ? EMULATED : name;
}

static const struct k_ops *
select_level(const char *name, char *why, size_t why_len)
{
	static struct k_ops emulated;
	const struct k_ops *below;

	if (strcmp(name, EMULATED) != 0)
		return kernels_select(name, why, why_len);
	below = kernels_select("avx512", why, why_len);
	if (below == NULL)
		return NULL;
	emulated = *below;
	emulated.name = EMULATED;
	kernels_fill_amx_emulated(&emulated);
	return &emulated;
}

static void
check_level(void)
{
	rng = seed * 0x9e3779b97f4a7c15u + 1;
	if (strcmp(ops->name, EMULATED) == 0) {
		ok(amx_agrees_emulated(), "self-check", "");
		check_linear();
		check_attention();
		return;
	}
	check_codes();
	check_rows("act_bf16", run_bf16);
	check_rows("act_fp8", run_fp8);
	check_rows("rmsnorm", run_norm);
	check_rows("silu_mul", run_silu);
	check_rows("divergence", run_divergence);
	check_rows("scan", run_scan);
	check_rows("weights", run_weights);
	check_finite();
	check_rope();
	check_linear();
	check_kv_write();
	check_attention();
}

/* ---- bench ---- */

/* CPU time: one thread does all of this, and others may want the core. */
static double
now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static int
by_value(const void *pa, const void *pb)
{
	double a = *(const double *)pa, b = *(const double *)pb;

	return a < b ? -1 : a > b;
}

/* Median seconds of a call. */
static double
time_of(void (*fn)(void *), void *arg)
{
	double t[9];
	uint32_t reps = 1;

	for (double start = now();; reps *= 2) {
		start = now();
		for (uint32_t i = 0; i < reps; i++)
			fn(arg);
		if (now() - start > 0.01)
			break;
	}
	for (int i = 0; i < 9; i++) {
		double start = now();

		for (uint32_t j = 0; j < reps; j++)
			fn(arg);
		t[i] = (now() - start) / reps;
	}
	qsort(t, 9, sizeof(*t), by_value);
	return t[4];
}

#define STREAM_BYTES ((size_t)256 << 20)

static void
stream(void *arg)
{
	ops->probe_read(arg, STREAM_BYTES);
}

struct linear_bench {
	struct k_linear l;
};

static void
bench_linear(void *arg)
{
	k_linear_run(ops, &((struct linear_bench *)arg)->l);
}

static void
bench_linears(double gbs)
{
	static const char *const names[] = {"bf16", "fp8", "fp8w", "fp8t", "fp8b"};
	static const uint32_t rows[] = {1, 4, 16, 32, 64, 512};
	struct weights w;
	size_t ldx;

	make_weights(&w, 4096, 4096, fill_bells);
	ldx = w.w.k_pad + K_BLOCK; /* as the engine has it: rows in different sets of the cache */
	for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
		for (enum k_format f = 0; f < K_N_FORMATS; f++) {
			uint32_t n = rows[i];
			uint16_t *x = aligned_alloc(64, n * ldx * sizeof(*x));
			size_t scales = f == K_FP8B ? k_squares((uint32_t)ldx) : 1;
			float *scale = calloc(n * scales, sizeof(*scale)), *y = calloc((size_t)n * w.w.n, sizeof(*y));
			struct linear_bench b = {{.w = &w.w, .format = f, .x = x, .x_scale = k_is_w8a8(f) ? scale : NULL, .rows = n,
			    .ldx = ldx, .y = y, .ldy = w.w.n, .ld_scale = scales, .panel1 = w.w.n_pad / K_PANEL}};
			double bytes = (double)w.w.n_pad * w.w.k_pad * (f == K_BF16 || f == K_FP8B ? 2 : 1), t;

			make_inputs(x, scale, n, w.w.k, (uint32_t)ldx, f);
			t = time_of(bench_linear, &b);
			printf("%-8s linear 4096x4096 %-5s rows=%-3u %9.3f ms %7.2f GB/s (%3.0f %% of the stream) %8.1f GFLOP/s\n",
			    ops->name, names[f], n, t * 1e3, bytes / t * 1e-9, 100 * bytes / t * 1e-9 / gbs,
			    2.0 * n * w.w.n * w.w.k / t * 1e-9);
			free(x), free(scale), free(y);
		}
	}
	free_weights(&w);
}

struct attention_bench {
	struct k_attention a;
};

static void
bench_attention(void *arg)
{
	ops->attention(&((struct attention_bench *)arg)->a);
}

static void
bench_attentions(void)
{
	enum { HEADS = 32, KV = 8, HD = 64, N = BLOCKS * K_BLOCK, ROWS = 32 };
	static const char *const format[] = {"bf16", "fp8", "mixed"};
	static float q[ROWS * HEADS * HD], out[ROWS * HEADS * HD], k[2 * KV * HD];

	for (int f = 0; f < 3; f++) {
		struct cache c;
		struct attention_bench b = {{.q = q, .out = out, .block = c.block, .n_heads = HEADS, .n_kv_heads = KV, .head_dim = HD,
		    .hd_pad = HD, .head1 = HEADS, .ld = HEADS * HD, .rows = 1, .pos = N - 1, .scale = 0.125f}};
		double t;

		make_cache(&c, KV, HD, f);
		for (uint32_t pos = 0; pos < N; pos++) {
			for (size_t i = 0; i < sizeof(k) / sizeof(*k); i++)
				k[i] = ((float)below(2001) - 1e3f) * 1e-3f;
			ref->kv_write(&c.block[pos / K_BLOCK], k, k + KV * HD, KV, HD, HD, pos % K_BLOCK);
		}
		t = time_of(bench_attention, &b);
		printf("%-8s attention %d heads, %d KV, %d positions %-5s %9.3f us %7.2f GB/s of KV\n", ops->name, HEADS, KV, N,
		    format[f], t * 1e6, 2.0 * KV * HD * N * (f == 1 ? 1 : 2) / t * 1e-9);
		b.a.rows = ROWS, b.a.pos = N - ROWS;
		t = time_of(bench_attention, &b);
		printf("%-8s attention the same for the last %d positions %-5s %9.3f us %7.2f GFLOP/s\n", ops->name, ROWS, format[f],
		    t * 1e6, 4.0 * HEADS * HD * ROWS * (N - (ROWS - 1) / 2.0) / t * 1e-9);
		free_cache(&c, f);
	}
}

struct kv_bench {
	struct cache c;
	float k[2 * 8 * 64];
};

static void
bench_kv(void *arg)
{
	struct kv_bench *b = arg;

	ops->kv_write(&b->c.block[0], b->k, b->k + 8 * 64, 8, 64, 64, 5);
}

static void
bench_kv_writes(void)
{
	static struct kv_bench b;

	for (size_t i = 0; i < sizeof(b.k) / sizeof(*b.k); i++)
		b.k[i] = ((float)below(2001) - 1e3f) * 1e-3f;
	for (int f = 0; f < 2; f++) {
		make_cache(&b.c, 8, 64, f);
		printf("%-8s kv_write   8 heads of 64 %-4s %9.3f us\n", ops->name, f == 0 ? "bf16" : "fp8",
		    time_of(bench_kv, &b) * 1e6);
		free_cache(&b.c, f);
	}
}

struct row_bench {
	row_fn f;
	float *x, *w;
	void *out;
};

static void
bench_row(void *arg)
{
	struct row_bench *b = arg;

	b->f(ops, b->x, b->w, 4096, b->out);
}

static void
bench_rows(void)
{
	static const struct { const char *name; row_fn f; } rows[] = {{"act_bf16", run_bf16}, {"act_fp8", run_fp8},
	    {"rmsnorm", run_norm}, {"silu_mul", run_silu}, {"divergence", run_divergence}, {"scan", run_scan}, {"weights", run_weights}};
	static float x[4096], w[4096], out[8200];

	for (size_t i = 0; i < 4096; i++)
		x[i] = w[i] = ((float)below(2001) - 1e3f) * 1e-3f;
	for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
		struct row_bench b = {rows[i].f, x, w, out};

		printf("%-8s %-10s n=4096 %9.3f us\n", ops->name, rows[i].name, time_of(bench_row, &b) * 1e6);
	}
}

/* A token of a large vocabulary, as it is sampled. */
struct sample_bench {
	struct sample_scratch *scratch;
	struct sampling s;
	uint32_t vocab, known[1000], position;
	float *plain, *logits;
	struct sampled out;
};

static void
copy_logits(void *arg)
{
	struct sample_bench *b = arg;

	memcpy(b->logits, b->plain, b->vocab * sizeof(*b->logits));
}

static void
sample_once(void *arg)
{
	struct sample_bench *b = arg;

	copy_logits(arg);
	sample_token(b->logits, &b->s, b->known, 500, 1000, b->scratch, &b->out);
	b->s.seed++;
}

static void
bench_sampling(void)
{
	static const struct { const char *name; struct sampling s; } how[] = {
	    {"greedy", {.temperature = 0}}, {"temperature 1", {.temperature = 1, .top_p = 1}},
	    {"top_k 40", {.temperature = 1, .top_p = 1, .top_k = 40}}, {"top_p 0.9", {.temperature = 1, .top_p = 0.9f}},
	    {"min_p 0.05", {.temperature = 1, .top_p = 1, .min_p = 0.05f}},
	    {"penalties", {.top_p = 1, .repetition_penalty = 1.1f, .presence_penalty = 0.5f, .frequency_penalty = 0.1f}},
	    {"top_logprobs 5", {.top_p = 1, .top_logprobs = 5}},
	    {"all of these", {.temperature = 1, .top_p = 0.9f, .top_k = 40, .min_p = 0.05f, .repetition_penalty = 1.1f, .presence_penalty = 0.5f,
	                      .top_logprobs = 5}}};
	struct sample_bench b = {.vocab = 128256};

	b.plain = malloc(b.vocab * sizeof(*b.plain)), b.logits = malloc(b.vocab * sizeof(*b.logits));
	if (b.plain == NULL || b.logits == NULL || sample_scratch_new(&b.scratch, ops, b.vocab) != 0)
		abort();
	for (uint32_t i = 0; i < 1000; i++)
		b.known[i] = below(b.vocab);
	for (int flat = 0; flat < 2; flat++) {
		for (uint32_t i = 0; i < b.vocab; i++) /* a bell, and a few that stand out */
			b.plain[i] = ((float)below(2001) + (float)below(2001) + (float)below(2001) - 3e3f) * 1e-3f * (flat ? 1 : 4) + (!flat && i % 9001 == 0 ? 9 : 0);
		for (size_t i = 0; i < sizeof(how) / sizeof(*how); i++) {
			b.s = how[i].s;
			printf("%-8s sample     %-14s of 128256, %s %9.1f us\n", ops->name, how[i].name, flat ? "flat:  " : "peaked:",
			    (time_of(sample_once, &b) - time_of(copy_logits, &b)) * 1e6);
		}
	}
	sample_scratch_free(&b.scratch);
	free(b.plain), free(b.logits);
}

/* Seconds a weight. */
static double
bench_pack(void)
{
	enum { N = 1024, K = 1024 };
	uint16_t *rows = malloc((size_t)K_PANEL * K * sizeof(*rows));
	struct k_exception *exc = NULL;
	uint32_t n_exc = 0, cap = 0, r, c;
	struct weights w;
	double start;

	make_weights(&w, N, K, fill_bells);
	fill_bells(rows, K_PANEL, K);
	start = now();
	for (uint32_t p = 0; p < N / K_PANEL; p++)
		k_pack_panel(&w.w, p, rows, &exc, &n_exc, &cap, &r, &c);
	start = now() - start;
	free(rows);
	free(exc);
	free_weights(&w);
	return start / (N * K);
}

static void
bench(void)
{
	char *p = malloc(STREAM_BYTES);
	double gbs;

	memset(p, 1, STREAM_BYTES);
	gbs = (double)STREAM_BYTES / time_of(stream, p) * 1e-9;
	free(p);
	printf("one thread reads %.2f GB/s; packing takes %.2f ns a weight\n", gbs, bench_pack() * 1e9);
	bench_linears(gbs);
	bench_attentions();
	bench_kv_writes();
	bench_rows();
	bench_sampling();
}

int
main(int argc, char **argv)
{
	static const struct option longs[] = {{"seed", required_argument, NULL, 's'}, {"level", required_argument, NULL, 'l'},
	    {"bench", no_argument, NULL, 'b'}, {NULL, 0, NULL, 0}};
	const char *only = NULL, *name;
	bool benching = false;
	char why[256] = "";
	int ch;

	while ((ch = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		switch (ch) {
		case 's': seed = strtoull(optarg, NULL, 10); break;
		case 'l': only = optarg; break;
		case 'b': benching = true; break;
		default: return 2;
		}
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	kernels_thread_init();
	ref = kernels_select("ref", why, sizeof(why));
	if (only != NULL && select_level(only, why, sizeof(why)) == NULL) {
		fprintf(stderr, "checkkernels: %s\n", why);
		return 1;
	}
	rng = seed;
	if (!benching)
		printf("# seed %llu\n", (unsigned long long)seed);
	for (size_t i = 0; (name = level_name(i)) != NULL; i++) {
		if ((only != NULL && strcmp(only, name) != 0) || (i == 0 && only == NULL))
			continue;
		ops = select_level(name, why, sizeof(why));
		if (ops == NULL) {
			if (!benching)
				printf("# skipped: %s\n", why);
			n_failed += EMU512 && strncmp(name, "avx512", 6) == 0; /* no hardware to blame */
			continue;
		}
		if (!benching)
			check_level();
		else if (strcmp(name, EMULATED) != 0)
			bench();
	}
	if (!benching) {
		/* On a machine that has no other level, ref against itself still walks the guards. */
		if (n_tests == 0) {
			ops = ref;
			check_level();
		}
		printf("1..%u\n", n_tests);
	}
	return n_failed != 0;
}
