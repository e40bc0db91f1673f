/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every kernel of kernels/cuda against kernels/ref (sampling: against
 * daemon/engine/sample.c) over odd shapes, all formats, poisoned outputs. Linked
 * with the emulation it runs on any machine; with CUDA, on the card.
 *
 *   checkcuda [SEED]     OCTET_CHECK_SHORT=1: fewer cases, for compute-sanitizer
 *
 * What a kernel sums in another order than ref is held to a tolerance, stated where it is used; what it only rounds must
 * have the same bits.
 */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/evidence.h"
#include "daemon/engine/sample.h"
#include "kernels/cuda/plugin.h"

static uint64_t seed;
static uint32_t n_tests, n_failed;
static const struct k_ops *ref;

static uint32_t
next_random(void)
{
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(seed >> 33);
}

static float
uniform(void)
{
	return (float)next_random() / 2147483648.0f;
}

/* Near a normal distribution, with a few values far out. */
static float
normal(void)
{
	float v = uniform() + uniform() + uniform() + uniform() - 2;

	return next_random() % 64 == 0 ? v * 20 : v;
}

static void
tell(bool ok, const char *name, const char *why)
{
	n_tests++;
	n_failed += !ok;
	if (ok)
		printf("ok %u - %s\n", n_tests, name);
	else
		printf("not ok %u - %s: %s\n", n_tests, name, why);
}

static void
must(cudaError_t e)
{
	if (e == cudaSuccess)
		return;
	printf("Bail out! CUDA: %s\n", cudaGetErrorString(e));
	exit(1);
}

static void *
device(size_t n)
{
	void *p;

	must(cudaMalloc(&p, n));
	must(cudaMemsetAsync(p, 0xff, n, NULL));
	return p;
}

static void *
to_device(const void *from, size_t n)
{
	void *p = device(n);

	must(cudaMemcpy(p, from, n, cudaMemcpyHostToDevice));
	return p;
}

static void
from_device(void *to, const void *from, size_t n)
{
	must(cudaStreamSynchronize(NULL));
	must(cudaGetLastError());
	must(cudaMemcpy(to, from, n, cudaMemcpyDeviceToHost));
}

static void *
host(size_t n)
{
	void *p = aligned_alloc(64, (n + 63) & ~(size_t)63);

	if (p == NULL)
		abort();
	memset(p, 0, n);
	return p;
}

/* ---- weights ---- */

struct weights {
	struct k_weight w;
	struct cu_linear a;      /* with the planes and scales on the device */
	struct cu_exceptions e;
	uint16_t *master;        /* [n, k] */
	uint8_t *codes;          /* on the device: what fp8b makes of them */
	void *mem;
	bool lonely;
};

static void
make_weights(struct weights *x, uint32_t n, uint32_t k, bool lonely)
{
	struct k_exception *exc = NULL;
	uint32_t n_exc = 0, cap = 0, bad[2], rows = 0, *row, *first, *col, kb;
	float *delta, *t;
	uint16_t *bits;

	x->master = host((size_t)(n + 32) * k * 2);
	for (size_t i = 0; i < (size_t)n * k; i++)
		/* Very small ones do not fit the planes. */
		x->master[i] = k_bf16_from_float(normal() * (next_random() % 50 == 0 ? 1e-6f : 0.02f));
	/* One large weight a row, which meets zeros only: what is left are exceptions. */
	for (uint32_t r = 0; lonely && r < n; r++)
		for (uint32_t i = 0; i < k; i++)
			x->master[(size_t)r * k + i] = k_bf16_from_float(i == 0 ? 1 : normal() * 1e-7f);
	x->lonely = lonely;
	x->mem = host(k_weight_plan(&x->w, n, k));
	k_weight_place(&x->w, x->mem);
	for (uint32_t p = 0; p < x->w.n_pad / 32; p++)
		if (k_pack_panel(&x->w, p, x->master + (size_t)p * 32 * k, &exc, &n_exc, &cap, &bad[0], &bad[1]) != 0)
			abort();
	k_weight_finish(&x->w);
	x->w.exc = exc, x->w.n_exc = n_exc;

	uint32_t ld = x->w.k_pad;
	size_t plane = (size_t)x->w.n_pad * ld;
	void *hi = to_device(x->w.hi, plane), *lo = to_device(x->w.lo, plane), *out_hi = device((size_t)n * ld), *out_lo = device((size_t)n * ld);

	cu_untile(hi, x->w.n_pad / 32, n, ld, out_hi, NULL);
	cu_untile(lo, x->w.n_pad / 32, n, ld, out_lo, NULL);
	must(cudaStreamSynchronize(NULL));
	must(cudaFree(hi)), must(cudaFree(lo));
	t = host(n * sizeof(*t));
	for (uint32_t i = 0; i < n; i++)
		t[i] = x->w.tensor_scale;
	float *square = host((size_t)k_squares(n) * ((k_squares(ld) + 3) & ~3u) * 4);

	for (uint32_t i = 0; i < k_squares(n); i++)
		for (uint32_t b = 0; b < k_squares(k); b++)
			square[i * ((k_squares(ld) + 3) & ~3u) + b] = x->w.square[i * 4 * k_squares(k) + b];
	x->a = (struct cu_linear){.square = to_device(square, (size_t)k_squares(n) * ((k_squares(ld) + 3) & ~3u) * 4),
	    .ld_square = (k_squares(ld) + 3) & ~3u, .hi = out_hi, .lo = out_lo, .scale = to_device(x->w.scale, n * 4), .tscale = to_device(t, n * 4), .n = n,
	    .k = k, .ld = ld, .bf16 = device((size_t)n * ld * 2)};

	/* By rows, ascending: exceptions are few, a sort by hand will do. */
	row = host((n_exc + 1) * 4), first = host((n_exc + 2) * 4), col = host((n_exc + 1) * 4), delta = host((n_exc + 1) * 4);
	bits = host((n_exc + 1) * 2), kb = ld / 32;
	for (uint32_t r = 0, at = 0; r < n; r++)
		for (uint32_t i = 0; i < n_exc; i++) {
			uint32_t ix = exc[i].index, c = exc[i].block % kb * 32 + ix / 32 % 16 * 2 + ix % 2;

			if (exc[i].block / kb * 32 + ix / 512 * 16 + ix / 2 % 16 != r)
				continue;
			if (rows == 0 || row[rows - 1] != r)
				row[rows] = r, first[rows++] = at;
			col[at] = c, bits[at] = exc[i].bits;
			delta[at] = k_bf16_to_float(exc[i].bits) -
			    k_e4m3_to_float(x->w.hi[(size_t)exc[i].block * 1024 + ix]) * x->w.scale[r];
			first[rows] = ++at;
		}
	x->e = (struct cu_exceptions){to_device(row, (rows + 1) * 4), to_device(first, (rows + 1) * 4), to_device(col, (n_exc + 1) * 4),
	    to_device(delta, (n_exc + 1) * 4), to_device(bits, (n_exc + 1) * 2), rows};
	free(row), free(first), free(col), free(delta), free(bits), free(t), free(square);
	x->codes = device((size_t)n * ld);
	cu_unpack(&x->a, &x->e, (uint16_t *)(uintptr_t)x->a.bf16, NULL);
}

static void
free_weights(struct weights *x)
{
	const void *p[] = {x->codes, x->a.square, x->a.hi, x->a.lo, x->a.scale, x->a.tscale, x->a.bf16, x->e.row, x->e.first, x->e.col, x->e.delta, x->e.master};

	for (size_t i = 0; i < sizeof(p) / sizeof(*p); i++)
		must(cudaFree((void *)(uintptr_t)p[i]));
	free(x->w.exc), free(x->mem), free(x->master);
}

/* fp8b's codes, of BF16 and of the planes with their exceptions: E4M3(master / scale), to the bit. */
static void
check_squares(struct weights *x, uint8_t *code, char name[96])
{
	for (int nested = 1; nested >= 0; nested--) {
		struct cu_linear a = x->a;
		bool ok = true;

		a.bf16 = nested ? NULL : a.bf16;
		cu_square_codes(&a, &x->e, x->codes, NULL);
		from_device(code, x->codes, (size_t)a.n * a.ld);
		for (uint32_t r = 0; r < a.n; r++)
			for (uint32_t i = 0; i < a.ld; i++) {
				float s = x->w.square[r / 32 * k_squares(a.k) + i / 128];
				uint8_t want = i < a.k ? k_e4m3_from_float(k_bf16_to_float(x->master[(size_t)r * a.k + i]) / s) : 0;

				ok = ok && code[(size_t)r * a.ld + i] == want;
			}
		snprintf(name, 96, "squares of %s %u x %u", nested ? "planes" : "bf16", a.n, a.k);
		tell(ok, name, "codes differ");
	}
}

static void
check_unpack(struct weights *x)
{
	uint16_t *got = host((size_t)x->a.n * x->a.ld * 2);
	char name[96], why[96] = "";
	uint8_t *code = host((size_t)x->a.n * x->a.ld);
	void *dev = device((size_t)x->a.n * x->a.ld);
	bool ok = true;

	from_device(got, x->a.bf16, (size_t)x->a.n * x->a.ld * 2);
	for (uint32_t r = 0; r < x->a.n; r++)
		for (uint32_t i = 0; i < x->a.k; i++)
			if (got[(size_t)r * x->a.ld + i] != x->master[(size_t)r * x->a.k + i]) {
				ok = false;
				snprintf(why, sizeof(why), "[%u][%u] is %04x, was %04x", r, i, got[(size_t)r * x->a.ld + i],
				    x->master[(size_t)r * x->a.k + i]);
			}
	snprintf(name, sizeof(name), "unpack %u x %u, %u exceptions", x->a.n, x->a.k, x->w.n_exc);
	tell(ok, name, why);
	cu_rescale_e4m3(&x->a, dev, NULL);
	from_device(code, dev, (size_t)x->a.n * x->a.ld);
	from_device(got, x->a.hi, (size_t)x->a.n * x->a.ld);
	ok = true;
	for (uint32_t r = 0; r < x->a.n; r++)
		for (uint32_t i = 0; i < x->a.k; i++) {
			size_t at = (size_t)r * x->a.ld + i;
			uint8_t hi = ((uint8_t *)got)[at];
			uint8_t want = k_e4m3_from_float(k_e4m3_to_float(hi) * (x->w.scale[r] / x->w.tensor_scale));

			ok = ok && code[at] == want;
		}
	snprintf(name, sizeof(name), "rescale %u x %u", x->a.n, x->a.k);
	tell(ok, name, "codes differ");
	check_squares(x, code, name);
	must(cudaFree(dev));
	free(got), free(code);
}

static void
check_linear(struct weights *x, enum cu_weights kind, enum k_format format, uint32_t rows, bool add, struct lt *lt)
{
	static const char *const kinds[] = {"bf16", "nested", "e4m3", "e4m3t", "e4m3b"};
	const bool squares = format == K_FP8B;
	uint32_t scales = squares ? (uint32_t)x->a.ld_square + 1 : 1;
	struct cu_linear a = x->a;
	uint32_t n = a.n, k = a.k, ld = a.ld;
	size_t ldy = n + (lt != NULL ? 8 : 3);
	bool w8a8 = k_is_w8a8(format), ok = true;
	uint16_t *enc = host((size_t)rows * ld * 2);
	uint8_t *q = host((size_t)rows * ld);
	float *xs = host(rows * scales * 4), *xs_t = NULL, *want = host(rows * ldy * 4), *got = host(rows * ldy * 4), *in = host(k * 4);
	char name[96], why[96] = "";

	for (uint32_t r = 0; r < rows; r++) {
		for (uint32_t i = 0; i < k; i++)
			in[i] = x->lonely && i == 0 ? 0 : normal();
		if (squares)
			k_act_squares(ref, in, k, ld, enc + r * ld, &xs[r * scales]);
		else if (w8a8)
			ref->act_fp8(in, k, ld, enc + r * ld, &xs[r]);
		else
			ref->act_bf16(in, k, ld, enc + r * ld);
		for (uint32_t i = 0; i < ld; i++)
			q[r * ld + i] = k_e4m3_from_float(k_bf16_to_float(enc[r * ld + i]));
	}
	for (size_t i = 0; i < rows * ldy; i++)
		got[i] = want[i] = add || i % ldy >= n ? normal() : NAN;
	k_linear_run(ref, &(struct k_linear){&x->w, format, enc, w8a8 ? xs : NULL, rows, ld, want, ldy, add, 0, x->w.n_pad / 32, scales});
	a.kind = kind, a.w8a8 = w8a8, a.rows = rows, a.ldx = ld, a.ldy = ldy, a.add = add, a.ldxs = scales;
	if (squares)
		a.hi = x->codes;
	a.xb = to_device(enc, (size_t)rows * ld * 2), a.xq = to_device(q, (size_t)rows * ld), a.xs = to_device(xs, rows * scales * 4);
	a.y = to_device(got, rows * ldy * 4);
	if (lt == NULL)
		cu_linear_skinny(&a, NULL);
	else if (squares) {
		xs_t = device((size_t)k_squares(ld) * rows * 4);
		cu_square_inputs(&a, rows, xs_t, NULL);
		if (lt_run(lt, LT_FP8_SQUARES, a.hi, a.xq, ld, a.y, ldy, n, ld, rows, add, a.square, xs_t, NULL) != 0)
			printf("# cuBLASLt has no product by squares of %u x %u, %u rows\n", n, k, rows), cu_linear_skinny(&a, NULL);
	} else if (lt_run(lt, w8a8 ? LT_FP8_OUTER : LT_BF16, w8a8 ? (const void *)a.hi : a.bf16, w8a8 ? (const void *)a.xq : a.xb, ld, a.y, ldy,
	    n, ld, rows, add, w8a8 ? a.scale : NULL, w8a8 ? a.xs : NULL, NULL) != 0)
		printf("# cuBLASLt has no outer-vector product of %u x %u, %u rows\n", n, k, rows), cu_linear_skinny(&a, NULL);
	if (kind == CU_W_NESTED)
		cu_exceptions_add(&a, &x->e, NULL);
	memcpy(got, want, rows * ldy * 4);
	from_device(got, a.y, rows * ldy * 4);
	for (uint32_t r = 0; r < rows; r++)
		for (uint32_t c = 0; c < ldy; c++) {
			float g = got[r * ldy + c], w = want[r * ldy + c];
			float tolerance = 0, unit = lt != NULL && w8a8 ? 2e-4f : 2e-6f;

			/* Two millionths of the sum of magnitudes, in which the formats' own rounding is small. The library's E4M3 products
			 * keep 13 bits between promotions to FP32. */
			for (uint32_t i = 0; i < k && c < n; i++)
				tolerance += unit * fabsf(k_bf16_to_float(x->master[(size_t)c * k + i]) * k_bf16_to_float(enc[r * ld + i])) *
				    (w8a8 ? xs[r * scales + (squares ? i / 128 : 0)] : 1);
			tolerance += add && c < n ? 2e-7f * fabsf(w) : 0;

			if (!(fabsf(g - w) <= tolerance) && ok) {
				ok = false;
				snprintf(why, sizeof(why), "[%u][%u] is %.9g, ref has %.9g", r, c, (double)g, (double)w);
			}
		}
	snprintf(name, sizeof(name), "%s %s %s %u x %u, %u rows%s", lt != NULL ? "cuBLASLt" : "linear", kinds[kind], w8a8 ? "w8a8" : "w16", n, k, rows, add ? ", added" : "");
	tell(ok, name, why);
	must(cudaFree((void *)(uintptr_t)a.xb)), must(cudaFree((void *)(uintptr_t)a.xq)), must(cudaFree((void *)(uintptr_t)a.xs));
	must(cudaFree(a.y)), must(cudaFree(xs_t));
	free(enc), free(q), free(xs), free(want), free(got), free(in);
}

/* What kernels/cuda/lt.c makes of the library: layouts, scales, adding. */
static void
check_library(void)
{
	struct weights x;
	struct lt *lt;
	char why[256] = "";

	if (lt_new(&lt, NULL, "check", false, why, sizeof(why)) != 0) {
		tell(false, "cuBLASLt", why);
		return;
	}
	make_weights(&x, 128, 320, false);
	for (uint32_t rows = 16; rows <= 80; rows += 32)
		for (int add = 0; add < 2; add++) {
			check_linear(&x, CU_W_BF16, K_BF16, rows, add, lt);
			check_linear(&x, CU_W_E4M3, K_FP8, rows, add, lt);
		}
	free_weights(&x);
	make_weights(&x, 256, 640, false);
	cu_square_codes(&x.a, &x.e, x.codes, NULL);
	for (uint32_t rows = 16; rows <= 80; rows += 32)
		check_linear(&x, CU_W_E4M3B, K_FP8B, rows, rows == 48, lt);
	must(cudaStreamSynchronize(NULL));
	free_weights(&x);
	lt_free(&lt);
}

static void
check_linears(void)
{
	static const uint32_t shape[][2] = {{32, 32}, {7, 40}, {65, 300}, {48, 96}, {33, 64}, {150, 1300}};
	static const uint32_t rows[] = {1, 2, 3, 4, 5, 8, 16, 17, 33, 64};

	for (size_t s = 0; s < sizeof(shape) / sizeof(*shape); s += getenv("OCTET_CHECK_SHORT") != NULL ? 2 : 1) {
		struct weights x;

		make_weights(&x, shape[s][0], shape[s][1], s == 4);
		check_unpack(&x);
		for (size_t r = 0; r < sizeof(rows) / sizeof(*rows); r++) {
			bool add = (r + s) % 2;

			check_linear(&x, CU_W_BF16, K_BF16, rows[r], add, NULL);
			check_linear(&x, CU_W_NESTED, K_BF16, rows[r], add, NULL);
			check_linear(&x, CU_W_E4M3, K_FP8, rows[r], add, NULL);
			check_linear(&x, CU_W_E4M3, K_FP8W, rows[r], add, NULL);
			check_linear(&x, CU_W_E4M3T, K_FP8T, rows[r], add, NULL);
			check_linear(&x, CU_W_E4M3B, K_FP8B, rows[r], add, NULL);
		}
		free_weights(&x);
	}
}

/* ---- encoded outputs ---- */

static void
check_encoded_squares(const char *what, const struct cu_encoded *e, const float *value, uint32_t rows, uint32_t n, int ulp)
{
	uint32_t pad = (n + 31) & ~31u;
	uint16_t *want = host(pad * 2);
	uint8_t *code = host(rows * pad);
	float *s = host(rows * e->ldb * 4), *scale = host(k_squares(n) * 4);
	char name[96], why[96] = "";
	bool ok = true;

	from_device(code, e->xqb, rows * pad), from_device(s, e->xsb, rows * e->ldb * 4);
	for (uint32_t r = 0; r < rows; r++) {
		k_act_squares(ref, value + r * n, n, pad, want, scale);
		for (uint32_t b = 0; b < k_squares(n) && ok; b++)
			if (!(fabsf(s[r * e->ldb + b] - scale[b]) <= (float)ulp * 1e-6f * scale[b])) {
				ok = false;
				snprintf(why, sizeof(why), "scale [%u][%u] is %.9g, ref has %.9g", r, b, (double)s[r * e->ldb + b], (double)scale[b]);
			}
		for (uint32_t i = 0; i < pad && ok; i++)
			if (abs((int)code[r * pad + i] - (int)k_e4m3_from_float(k_bf16_to_float(want[i]))) > ulp) {
				ok = false;
				snprintf(why, sizeof(why), "[%u][%u] is %02x, ref has %02x", r, i, code[r * pad + i],
				    k_e4m3_from_float(k_bf16_to_float(want[i])));
			}
	}
	snprintf(name, sizeof(name), "%s of %u by squares", what, n);
	tell(ok, name, why);
	free(want), free(code), free(s), free(scale);
}

/* ulp: how far a BF16 or an E4M3 may be from ref's, for those whose input was summed in another order. */
static void
check_encoded(const char *what, const struct cu_encoded *e, const float *value, uint32_t rows, uint32_t n, int ulp)
{
	uint32_t pad = (n + 31) & ~31u;
	uint16_t *got = host(rows * pad * 2), *want = host(pad * 2);
	uint8_t *code = host(rows * pad);
	float *s = host(rows * 4), scale;
	char name[96], why[96] = "";
	bool ok = true;

	check_encoded_squares(what, e, value, rows, n, ulp);
	from_device(got, e->xb, rows * pad * 2), from_device(code, e->xq, rows * pad), from_device(s, e->xs, rows * 4);
	for (uint32_t r = 0; r < rows && ok; r++) {
		ref->act_bf16(value + r * n, n, pad, want);
		for (uint32_t i = 0; i < pad && ok; i++)
			if (abs((int)(int16_t)got[r * pad + i] - (int)(int16_t)want[i]) > ulp) {
				ok = false;
				snprintf(why, sizeof(why), "bf16 [%u][%u] is %04x, ref has %04x", r, i, got[r * pad + i], want[i]);
			}
		ref->act_fp8(value + r * n, n, pad, want, &scale);
		if (ok && !(fabsf(s[r] - scale) <= (float)ulp * 1e-6f * scale)) {
			ok = false;
			snprintf(why, sizeof(why), "scale [%u] is %.9g, ref has %.9g", r, (double)s[r], (double)scale);
		}
		for (uint32_t i = 0; i < pad && ok; i++)
			if (abs((int)code[r * pad + i] - (int)k_e4m3_from_float(k_bf16_to_float(want[i]))) > ulp) {
				ok = false;
				snprintf(why, sizeof(why), "e4m3 [%u][%u] is %02x, ref has %02x", r, i, code[r * pad + i],
				    k_e4m3_from_float(k_bf16_to_float(want[i])));
			}
	}
	snprintf(name, sizeof(name), "%s of %u", what, n);
	tell(ok, name, why);
	free(got), free(want), free(code), free(s);
}

/* Figures of FP8 against those of `n` values each from `value` on; far: counts that may differ, where sums had another order. */
static void
check_seen(const char *what, const struct kd_evidence *dev, const float *const *value, uint32_t n_values, uint32_t n, int far)
{
	struct kd_evidence got;
	struct evidence_site want;
	struct evidence *e;
	char name[96], why[160];
	int zeros, saturated;

	if (evidence_new(&e, 1) != 0)
		abort();
	for (uint32_t i = 0; i < n_values; i++)
		evidence_add(e, GROUP_Q, 0, value[i], n);
	evidence_read(e, GROUP_Q, 0, &want);
	evidence_free(&e);
	from_device(&got, dev, sizeof(got));
	zeros = (int)lrintf(want.zero * (float)want.n), saturated = (int)lrintf(want.saturated * (float)want.n);
	snprintf(name, sizeof(name), "%s of %u: what FP8 makes of a row", what, n);
	snprintf(why, sizeof(why), "n %u, absmax %.9g, %u zeros, %u saturated; ref has %u, %.9g, %d, %d", got.n, (double)got.absmax, got.zeros,
	    got.saturated, (unsigned)want.n, (double)want.absmax, zeros, saturated);
	tell(got.n == want.n && fabsf(got.absmax - want.absmax) <= (float)far * 1e-6f * want.absmax && abs((int)got.zeros - zeros) <= far &&
	    abs((int)got.saturated - saturated) <= far, name, why);
}

/* A value that is no number, before others of the same thread: the row's scale must tell. */
static void
check_nan(void)
{
	enum { N = 1024 };
	float *x = host(2 * N * 4), *w = host(N * 4), s[2] = {0, 0};
	struct cu_encoded e = {.xq = device(N), .xs = device(4), .ld = N};
	void *dx, *dw;

	for (uint32_t i = 0; i < 2 * N; i++)
		x[i] = normal(), w[i % N] = 1;
	x[3] = NAN;
	dx = to_device(x, 2 * N * 4), dw = to_device(w, N * 4);
	cu_silu_mul(dx, N, 1, &e, NULL);
	from_device(&s[0], e.xs, 4);
	cu_rmsnorm(dx, N, NULL, dw, N, 1e-5f, 1, &e, NULL);
	from_device(&s[1], e.xs, 4);
	tell(s[0] != s[0] && s[1] != s[1], "NaN reaches the scale of a row", "it was lost");
	must(cudaFree(dx)), must(cudaFree(dw)), must(cudaFree(e.xq)), must(cudaFree(e.xs));
	free(x), free(w);
}

static void
check_rows(uint32_t n)
{
	enum { ROWS = 3 };
	uint32_t pad = (n + 31) & ~31u, from[ROWS] = {2, 0, 1};
	float *x = host(ROWS * n * 2 * 4), *w = host(n * 4), *y = host(ROWS * n * 4);
	struct cu_encoded e = {device(ROWS * pad * 2), device(ROWS * pad), device(ROWS * 4), pad, device(ROWS * pad),
	    device(ROWS * (k_squares(n) + 1) * 4), k_squares(n) + 1, device(sizeof(*e.seen)), 2};
	void *dx, *dw, *df;

	for (uint32_t i = 0; i < ROWS * n * 2; i++)
		x[i] = normal() * (next_random() % 8 == 0 ? 1e-5f : 3); /* some become 0 */
	memset(x, 0, n * 4); /* a row of zeros */
	for (uint32_t i = 0; i < n; i++)
		w[i] = 1 + normal() / 8;
	dx = to_device(x, ROWS * n * 2 * 4), dw = to_device(w, n * 4), df = to_device(from, sizeof(from));
	for (uint32_t r = 0; r < ROWS; r++)
		ref->rmsnorm(x + from[r] * n, w, n, 1e-5f, y + r * n);
	cu_rmsnorm(dx, n, df, dw, n, 1e-5f, ROWS, &e, NULL);
	check_encoded("rmsnorm", &e, y, ROWS, n, 1);
	check_seen("rmsnorm", e.seen, &(const float *){y + 2 * n}, 1, n, 1);
	for (uint32_t r = 0; r < ROWS; r++)
		ref->silu_mul(x + r * 2 * n, x + r * 2 * n + n, n, y + r * n);
	cu_silu_mul(dx, n, ROWS, &e, NULL);
	check_encoded("silu_mul", &e, y, ROWS, n, 0);
	check_seen("silu_mul", e.seen, &(const float *){y + 2 * n}, 1, n, 0);
	must(cudaFree(dx)), must(cudaFree(dw)), must(cudaFree(df)), must(cudaFree(e.xb)), must(cudaFree(e.xq)), must(cudaFree(e.xs));
	must(cudaFree(e.xqb)), must(cudaFree(e.xsb)), must(cudaFree(e.seen));
	free(x), free(w), free(y);
}

/* ---- attention ---- */

struct scene {
	uint32_t n_heads, n_kv, hd, context, rows, window, fp8; /* fp8: bits of every block */
	uint32_t splits;
	bool prefill, norm;
};

static void
check_attention(const struct scene *s)
{
	uint32_t hd_pad = (s->hd + 31) & ~31u, blocks = (s->context + 31) / 32, width = (s->n_heads + 2 * s->n_kv) * s->hd, half = s->hd / 2;
	uint32_t most = cu_attention_tile_rows(s->n_heads, s->n_kv, s->hd), tiles = 0, first_row = s->context - s->rows;
	size_t elems = (size_t)s->n_kv * hd_pad * 32, q = (size_t)s->n_heads * s->hd;
	float *qkv = host(s->context * width * 4), *cos_t = host(s->context * half * 4 + 4), *sin_t = host(s->context * half * 4 + 4);
	float *out = host(s->rows * q * 4), *want = host(s->rows * q * 4), *norm = host(s->hd * 4), vmax = 0, *dpart, *dattn;
	struct k_kv_block *page = host(blocks * sizeof(*page));
	struct kd_block *table = host(blocks * 2 * sizeof(*table));
	uint32_t *pos = host(s->context * 4), *first = host(s->context * 4);
	struct cu_tile *tile = host(s->context * sizeof(*tile));
	struct cu_encoded none = {.seen = device(sizeof(*none.seen)), .seen_row = s->rows - 1};
	const float *last[64]; /* K and V of the heads of the last row */
	float *last_row = NULL;
	char name[160], why[96] = "";
	bool ok = true;

	for (uint32_t i = 0; i < s->context * width; i++)
		qkv[i] = normal() * (next_random() % 16 == 0 ? 1e-6f : 1);
	for (uint32_t i = 0; i < s->context * half; i++)
		cos_t[i] = cosf((float)i), sin_t[i] = sinf((float)i);
	for (uint32_t i = 0; i < s->hd; i++)
		norm[i] = 1 + normal() / 8;
	/* Layer 1 of 2; pages in an order of their own. */
	for (uint32_t b = 0; b < blocks; b++) {
		table[2 * b] = (struct kd_block){UINT32_MAX, UINT32_MAX, UINT32_MAX, 0};
		table[2 * b + 1] = (struct kd_block){b * 3 + 1, b * 3, b * 3 + 2, s->fp8};
		page[b] = (struct k_kv_block){host(elems * 2), host(elems * 2), host(elems * 2), host(s->n_kv * 64 * 4), s->fp8};
	}
	for (uint32_t i = 0; i < s->context; i++)
		pos[i] = i, first[i] = 0;
	for (uint32_t r = 0; r < s->context; r++) {
		float *v = qkv + r * width, *tmp = host(width * 4);

		memcpy(tmp, v, width * 4);
		for (uint32_t h = 0; s->norm && h < s->n_heads + s->n_kv; h++)
			ref->rmsnorm(tmp + h * s->hd, norm, s->hd, 1e-5f, tmp + h * s->hd);
		ref->rope(tmp, s->n_heads + s->n_kv, s->hd, cos_t + r * half, sin_t + r * half);
		ref->kv_write(&page[r / 32], tmp + q, tmp + q + s->n_kv * s->hd, s->n_kv, s->hd, hd_pad, r % 32);
		if (r >= first_row)
			ref->attention(&(struct k_attention){.q = tmp, .out = want + (r - first_row) * q, .rows = 1, .block = page,
			    .n_heads = s->n_heads, .n_kv_heads = s->n_kv, .head_dim = s->hd, .hd_pad = hd_pad, .head1 = s->n_heads,
			    .pos = r, .window = s->window, .scale = 1.0f / sqrtf((float)s->hd)});
		for (uint32_t i = 0; i < s->n_kv * s->hd; i++)
			vmax = fmaxf(vmax, fabsf(v[q + s->n_kv * s->hd + i]));
		free(last_row);
		last_row = tmp;
	}
	for (uint32_t h = 0; h < 2 * s->n_kv; h++)
		last[h] = last_row + q + h * s->hd;

	struct cu_attention a = {.kv = {device(blocks * 3 * elems * 2), device(blocks * 3 * s->n_kv * 64 * 4), elems, s->n_kv},
	    .table = to_device(table, blocks * 2 * sizeof(*table)), .first = to_device(first, s->context * 4), .pos = to_device(pos, s->context * 4),
	    .n_layers = 2, .layer = 1, .n_heads = s->n_heads, .hd = s->hd, .window = s->window, .eps = 1e-5f, .rows = s->context,
	    .qkv = to_device(qkv, s->context * width * 4), .q = device(s->context * q * 2), .cos = to_device(cos_t, s->context * half * 4 + 4),
	    .sin = to_device(sin_t, s->context * half * 4 + 4), .splits = s->splits, .prefill = s->prefill, .scale = 1.0f / sqrtf((float)s->hd),
	    .seen = to_device(&(struct kd_evidence){0}, sizeof(struct kd_evidence)), .seen_row = s->context - 1};

	if (s->norm)
		a.q_norm = a.k_norm = to_device(norm, s->hd * 4);
	cu_rope_kv(&a, NULL);
	must(cudaStreamSynchronize(NULL));
	check_seen("K and V", a.seen, last, 2 * s->n_kv, s->hd, s->norm ? 2 : 0);
	/* The rows that attend come last; the cache has all. */
	for (uint32_t i = 0; i < s->rows; i += tile[tiles - 1].n)
		tile[tiles] = (struct cu_tile){i, s->rows - i < most ? s->rows - i : most}, tiles++;
	dpart = device((size_t)s->rows * s->n_heads * s->splits * (s->hd + 2) * 4), dattn = device(s->rows * q * 4);
	struct cu_attention some = a;

	some.first = a.first + first_row, some.pos = a.pos + first_row, some.q = a.q + first_row * q, some.rows = s->rows;
	some.tile = to_device(tile, tiles * sizeof(*tile)), some.n_tiles = tiles, some.part = dpart;
	cu_attend(&some, NULL);
	cu_attention_merge(&some, dattn, &none, NULL);
	from_device(out, dattn, s->rows * q * 4);
	check_seen("merge", none.seen, &(const float *){out + (s->rows - 1) * q}, 1, (uint32_t)q, 0);
	for (size_t i = 0; i < s->rows * q && ok; i++)
		/* A probability may round to its neighbour in BF16: 2^-8 of the largest value at the very most; q and k too, where a
		 * norm of heads was summed in another order. */
		if (!(fabsf(out[i] - want[i]) <= (s->norm ? 0.03f : 0.008f) * vmax)) {
			ok = false;
			snprintf(why, sizeof(why), "row %zu [%zu] is %.9g, ref has %.9g", i / q, i % q, (double)out[i], (double)want[i]);
		}
	snprintf(name, sizeof(name), "attention %u/%u heads of %u, context %u, %u rows, window %u, fp8 %08x, %u splits%s%s", s->n_heads, s->n_kv,
	    s->hd, s->context, s->rows, s->window, s->fp8, s->splits, s->prefill ? ", prefill" : "", s->norm ? ", norms" : "");
	tell(ok, name, why);

	const void *mem[] = {a.kv.mem, a.kv.scale, a.table, a.first, a.pos, a.qkv, a.q, a.cos, a.sin, a.q_norm, some.tile, dpart, dattn, a.seen, none.seen};

	for (size_t i = 0; i < sizeof(mem) / sizeof(*mem); i++)
		must(cudaFree((void *)(uintptr_t)mem[i]));
	for (uint32_t b = 0; b < blocks; b++)
		free(page[b].k), free(page[b].v), free(page[b].q), free(page[b].scale);
	free(last_row), free(qkv), free(cos_t), free(sin_t), free(out), free(want), free(norm), free(page), free(table), free(pos), free(first), free(tile);
}

static void
check_attentions(void)
{
	static const struct scene scenes[] = {
		{4, 2, 64, 1, 1, 0, 0, 1, false, false}, {4, 2, 64, 33, 1, 0, 0, 1, false, false}, {8, 2, 64, 100, 1, 0, 0, 2, false, false},
		{8, 2, 64, 100, 1, 0, ~0u, 1, false, false}, {8, 2, 64, 100, 1, 0, 0xf0f0fff1, 4, false, false},
		{8, 2, 128, 70, 1, 0, 0, 1, false, false}, {8, 2, 128, 70, 3, 0, ~0u, 2, false, true}, {8, 1, 128, 300, 1, 0, 0x12345678, 8, false, false},
		{4, 4, 64, 50, 20, 0, 0, 1, true, false}, {6, 2, 64, 75, 75, 0, 0, 1, true, false}, {8, 2, 128, 40, 40, 0, 0xffff0000, 1, true, false},
		{6, 2, 64, 75, 75, 0, 0xfffffffe, 1, false, true}, {8, 2, 64, 200, 9, 50, 0, 2, false, false}, {8, 2, 64, 200, 70, 33, ~0u, 1, true, false},
		{8, 4, 8, 45, 5, 0, 0, 1, false, false}, {6, 3, 80, 45, 5, 20, 0x0ff0f00f, 2, false, true}, {32, 1, 64, 40, 2, 0, 0, 1, true, false},
		{2, 2, 256, 40, 2, 0, 7, 1, false, false},
	};

	for (size_t i = 0; i < sizeof(scenes) / sizeof(*scenes); i += getenv("OCTET_CHECK_SHORT") != NULL ? 3 : 1)
		check_attention(&scenes[i]);
}

/* ---- sampling ---- */

static void
check_sample(uint32_t vocab, uint32_t cases)
{
	struct sample_scratch *scratch;
	uint32_t differ = 0, tops = 0;
	char name[96];

	if (sample_scratch_new(&scratch, ref, vocab) != 0)
		abort();
	for (uint32_t c = 0; c < cases; c++) {
		static const float temperatures[] = {0, 0.7f, 1, 3}, ps[] = {1, 0.9f, 0.3f};
		static const uint32_t ks[] = {0, 1, 5, 40};
		struct sampling s = {.max_tokens = 1, .top_k = ks[next_random() % 4], .seed = next_random(), .temperature = temperatures[next_random() % 4],
		    .top_p = ps[next_random() % 3], .min_p = c % 3 == 0 ? 0.05f : 0, .top_logprobs = c % 2 ? 5 : 0, .logprobs = c % 4 != 0,
		    .repetition_penalty = c % 5 == 0 ? 1.3f : 1, .presence_penalty = c % 5 == 0 ? 0.5f : 0,
		    .frequency_penalty = c % 5 == 0 ? 0.25f : 0};
		uint32_t known[8], position = 8;
		float *l = host(vocab * 4), *plain = host(vocab * 4);
		struct kd_edit edit[8];
		struct kd_result r;
		struct sampled want = {0};
		uint32_t n_edit = 0;

		for (uint32_t i = 0; i < vocab; i++)
			l[i] = c % 7 == 0 ? (float)(next_random() % 4) : normal() * (c % 6 == 1 ? 1e-3f : 3); /* ties too, and hardly any difference */
		for (uint32_t i = 0; i < 8; i++)
			known[i] = i * 7 % vocab;
		bool drawn = c % 10 == 5; /* the last one's edit is the card's to make, or to change where it was output before */
		uint32_t row[3] = {0, 0, 0}, from = 2;

		if (c % 20 == 5)
			known[7] = known[5];
		row[from] = known[7];
		if (drawn) { /* once more, no less, is what it takes to be no longer the likeliest; or once more and not twice */
			float most = -INFINITY;

			s.temperature = 0;
			for (uint32_t i = 0; i < vocab; i++)
				most = fmaxf(most, i == known[7] ? -INFINITY : l[i]);
			l[known[7]] = c % 20 == 5 ? 1.3f * (most + (c % 40 == 5 ? 1.1f : 0.875f)) : most + 0.2f;
		}
		for (uint32_t i = 0; i < 8 && c % 5 == 0; i++)
			edit[n_edit++] = drawn && i == 7 ? (struct kd_edit){.id = CU_NONE} : (struct kd_edit){known[i], i >= 3, 0, true};
		struct cu_want w = {.kind = KD_DRAW, .position = position, .top_k = s.top_k, .n_top = s.top_logprobs, .n_edit = n_edit, .logprob =
		    s.logprobs || s.top_logprobs > 0, .seed = s.seed, .temperature = s.temperature, .top_p = s.top_p, .min_p = s.min_p,
		    .repetition = s.repetition_penalty, .presence = s.presence_penalty, .frequency = s.frequency_penalty, .drawn = drawn};
		void *dl = to_device(l, vocab * 4), *dw = to_device(&w, sizeof(w)), *de = to_device(edit, sizeof(edit)), *dx = device(vocab * 8),
		    *dr = device(sizeof(r)), *dt = to_device(row, sizeof(row)), *df = to_device(&from, sizeof(from));

		memcpy(plain, l, vocab * 4);
		cu_sample(dl, vocab, vocab, dw, de, dt, df, 1, dx, dr, NULL);
		from_device(&r, dr, sizeof(r));
		differ += !sample_token(l, &s, known, 3, 8, scratch, &want) || r.bad || r.token != want.token || (w.logprob && fabsf(r.logprob - want.logprob) > 1e-5f);
		tops += r.n_top != want.n_top;
		for (uint32_t i = 0; i < want.n_top && i < r.n_top; i++)
			tops += r.top_id[i] != want.top[i].id || fabsf(r.top_logprob[i] - want.top[i].value) > 1e-5f;
		must(cudaFree(dl)), must(cudaFree(dw)), must(cudaFree(de)), must(cudaFree(dx)), must(cudaFree(dr)), must(cudaFree(dt)), must(cudaFree(df));
		free(l), free(plain);
	}
	snprintf(name, sizeof(name), "sample: %u draws from %u tokens", cases, vocab);
	/* A sum that rounds to the other side of the uniform number may change one in very many. */
	tell(differ == 0, name, "tokens or log-probabilities differ");
	tell(tops == 0, "sample: alternatives", "they differ");
	sample_scratch_free(&scratch);
}

int
main(int argc, char **argv)
{
	char why[256];

	seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
	printf("# seed %llu\n", (unsigned long long)seed);
	kernels_thread_init();
	ref = kernels_select("ref", why, sizeof(why));
	check_linears();
	if (getenv("OCTET_CHECK_SHORT") == NULL)
		check_library();
	check_rows(7);
	check_rows(256);
	check_rows(1000);
	check_nan();
	check_attentions();
	check_sample(100, 60);
	check_sample(3000, 40);
	printf("1..%u\n", n_tests);
	return n_failed != 0;
}
