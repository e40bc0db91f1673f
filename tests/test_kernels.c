/* SPDX-License-Identifier: Apache-2.0 */
/* Number formats and nested weights against arithmetic done another way. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/internal.h"

/* E4M3 by its definition (OCP 8-bit floating point, revision 1.0): bias 7, three
 * bits of fraction, 0x7f is NaN. */
static double
e4m3(uint32_t code)
{
	uint32_t exp = code >> 3 & 15, frac = code & 7;
	double v = exp == 0 ? ldexp(frac, -9) : ldexp(8 + frac, (int)exp - 10);

	return code & 0x80 ? -v : v;
}

/* A BF16 by its definition, subnormal or not. */
static double
bf16(uint16_t bits)
{
	uint32_t exp = bits >> 7 & 0xff, frac = bits & 0x7f;
	double v = exp == 0 ? ldexp(frac, -133) : ldexp(128 + frac, (int)exp - 134);

	return bits & 0x8000 ? -v : v;
}

static void
test_e4m3(void **state)
{
	(void)state;
	for (uint32_t c = 0; c < 256; c++) {
		float f = k_e4m3_to_float((uint8_t)c);

		if ((c & 0x7f) == 0x7f) {
			assert_true(isnan(f));
			assert_int_equal(k_e4m3_from_float(f) & 0x7f, 0x7f);
			continue;
		}
		assert_true((double)f == e4m3(c));
		assert_int_equal(signbit(f) != 0, c >> 7);
		assert_int_equal(k_e4m3_from_float(f), c);
	}
	/* Half way between two codes goes to the even one; a hair beside it to the nearer. */
	for (uint32_t c = 0; c < 0x7e; c++) {
		float mid = (float)((e4m3(c) + e4m3(c + 1)) / 2);

		assert_int_equal(k_e4m3_from_float(mid), c + (c & 1));
		assert_int_equal(k_e4m3_from_float(-mid), 0x80 | (c + (c & 1)));
		assert_int_equal(k_e4m3_from_float(nextafterf(mid, 0)), c);
		assert_int_equal(k_e4m3_from_float(nextafterf(mid, 1e9f)), c + 1);
	}
	assert_int_equal(k_e4m3_from_float(448), 0x7e);
	assert_int_equal(k_e4m3_from_float(1e30f), 0x7e);
	assert_int_equal(k_e4m3_from_float(-INFINITY), 0xfe);
	assert_int_equal(k_e4m3_from_float(1e-45f), 0);
	assert_int_equal(k_e4m3_from_float(-0.0f), 0x80);
}

static void
test_bf16(void **state)
{
	(void)state;
	for (uint32_t b = 0; b < 0x10000; b++) {
		float f = k_bf16_to_float((uint16_t)b);

		if ((b & 0x7fff) > 0x7f80) {
			assert_true(isnan(f) && isnan(k_bf16_to_float(k_bf16_from_float(f))));
			continue;
		}
		assert_int_equal(k_bf16_from_float(f), b);
		if ((b & 0x7fff) >= 0x7f7f)
			continue;
		{ /* ties to even, nearer otherwise */
			uint32_t half = b << 16 | 0x8000;
			float mid, below, above;

			memcpy(&mid, &half, 4);
			half--, memcpy(&below, &half, 4);
			half += 2, memcpy(&above, &half, 4);
			assert_int_equal(k_bf16_from_float(mid), b + (b & 1));
			assert_int_equal(k_bf16_from_float(below), b);
			assert_int_equal(k_bf16_from_float(above), b + 1);
		}
	}
}

struct packed {
	struct k_weight w;
	void *mem;
	struct k_exception *exc;
};

typedef int (*packer)(struct k_weight *, uint32_t panel, const uint16_t *rows, struct k_exception **, uint32_t *n_exc,
    uint32_t *cap, uint32_t *bad_row, uint32_t *bad_col);

static int
pack_by(packer f, struct packed *p, const uint16_t *rows, uint32_t n, uint32_t k, uint32_t *bad_row, uint32_t *bad_col)
{
	size_t bytes = k_weight_plan(&p->w, n, k);
	uint32_t n_exc = 0, cap = 0;
	int rc = 0;

	p->exc = NULL;
	p->mem = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
	assert_non_null(p->mem);
	memset(p->mem, 0xaa, bytes);
	k_weight_place(&p->w, p->mem);
	for (uint32_t i = 0; i < p->w.n_pad / K_PANEL && rc == 0; i++)
		rc = f(&p->w, i, rows + (size_t)i * K_PANEL * k, &p->exc, &n_exc, &cap, bad_row, bad_col);
	p->w.exc = p->exc;
	p->w.n_exc = n_exc;
	if (rc == 0)
		k_weight_finish(&p->w);
	return rc;
}

static int
pack(struct packed *p, const uint16_t *rows, uint32_t n, uint32_t k, uint32_t *bad_row, uint32_t *bad_col)
{
	return pack_by(k_pack_panel, p, rows, n, k, bad_row, bad_col);
}

static void
drop(struct packed *p)
{
	free(p->mem);
	free(p->exc);
}

/* The high plane is E4M3 of w * 2^k, nearest even, with k = floor(log2(448 / absmax)) within +-120. */
static void
check_high(const struct k_weight *w, const uint16_t *rows)
{
	for (uint32_t r = 0; r < w->n; r++) {
		double max = 0, factor;
		int k = 120;

		for (uint32_t i = 0; i < w->k; i++)
			max = fmax(max, fabs(bf16(rows[r * w->k + i])));
		if (max > 0) {
			for (k = -120; k < 120 && max * ldexp(1, k + 1) <= 448; k++)
				;
			if (max * ldexp(1, k) > 448)
				k = -120;
		}
		assert_true((double)w->scale[r] == ldexp(1, -k));
		factor = ldexp(1, k);
		for (uint32_t i = 0; i < w->k; i++) {
			uint32_t in = i % K_BLOCK, c = r % K_PANEL;
			size_t at = ((size_t)(r / K_PANEL) * (w->k_pad / K_BLOCK) + i / K_BLOCK) * 1024 + c / 16 * 512 + in / 2 * 32 +
			    c % 16 * 2 + in % 2;
			double v = bf16(rows[r * w->k + i]) * factor, got = e4m3(w->hi[at]), err = fabs(v - got);
			uint32_t code = w->hi[at] & 0x7f;

			assert_int_equal(w->hi[at] >> 7, rows[r * w->k + i] >> 15);
			if (fabs(v) < 0x1p-126)
				continue; /* an exception, code 0 */
			if (code > 0)
				assert_true(err < fabs(v - e4m3((w->hi[at] & 0x80) | (code - 1))) ||
				    (err == fabs(v - e4m3((w->hi[at] & 0x80) | (code - 1))) && code % 2 == 0));
			if (code < 0x7e)
				assert_true(err < fabs(v - e4m3((w->hi[at] & 0x80) | (code + 1))) ||
				    (err == fabs(v - e4m3((w->hi[at] & 0x80) | (code + 1))) && code % 2 == 0));
		}
	}
}

/* Every finite pattern, in rows of every scale: what goes in comes out. */
static void
test_lossless(void **state)
{
	enum { K = 0x7f80 / 4 }; /* a quarter of all magnitudes a row */
	uint16_t *rows = malloc((size_t)64 * K * sizeof(*rows));
	float *y = malloc(K * sizeof(*y));
	struct packed p;
	uint32_t r, c, n = 0;

	(void)state;
	/* Rows by decades of the exponent: in each, all patterns up to its absmax. */
	for (uint32_t top = 0; top < 64; top++)
		for (uint32_t i = 0; i < K; i++) {
			uint32_t mag = (uint32_t)((uint64_t)(top + 1) * 0x7f80 / 64 * i / K);

			rows[top * K + i] = (uint16_t)(mag | (i & 1) << 15);
		}
	assert_int_equal(pack(&p, rows, 64, K, &r, &c), 0);
	check_high(&p.w, rows);
	for (r = 0; r < 64; r++) {
		k_unpack_row(&p.w, r, y);
		for (c = 0; c < K; c++) {
			assert_int_equal(k_unpack(&p.w, r, c), rows[r * K + c]);
			assert_memory_equal(&y[c], &(float){k_bf16_to_float(rows[r * K + c])}, 4);
		}
	}
	drop(&p);

	/* Each of the 65,280 finite patterns, with the largest, the smallest and a middle absmax beside it. */
	for (uint32_t big = 0; big < 3; big++) {
		for (uint32_t bits = 0; bits < 0x10000; bits += 32) {
			static const uint16_t absmax[] = {0x7f7f, 0x0001, 0x3f80};
			uint16_t small[32 * 2];
			uint32_t rows_n = 0;

			for (uint32_t i = 0; i < 32; i++) {
				if ((bits + i) % 0x8000 >= 0x7f80)
					continue;
				small[2 * rows_n] = (uint16_t)(bits + i);
				small[2 * rows_n + 1] = absmax[big];
				rows_n++;
			}
			if (rows_n == 0)
				continue;
			assert_int_equal(pack(&p, small, rows_n, 2, &r, &c), 0);
			check_high(&p.w, small);
			for (uint32_t i = 0; i < rows_n; i++, n++) {
				assert_int_equal(k_unpack(&p.w, i, 0), small[2 * i]);
				assert_int_equal(k_unpack(&p.w, i, 1), small[2 * i + 1]);
			}
			drop(&p);
		}
	}
	assert_int_equal(n, 3 * 2 * 0x7f80);
	free(rows);
	free(y);
}

static void
check_packers(const uint16_t *rows, uint32_t n, uint32_t k)
{
	struct packed a, b;
	uint32_t r, c;

	assert_int_equal(pack_by(k_pack_panel_ref, &a, rows, n, k, &r, &c), 0);
	assert_int_equal(pack(&b, rows, n, k, &r, &c), 0);
	assert_int_equal(a.w.n_exc, b.w.n_exc);
	assert_memory_equal(a.w.hi, b.w.hi, (size_t)a.w.n_pad * a.w.k_pad);
	assert_memory_equal(a.w.lo, b.w.lo, (size_t)a.w.n_pad * a.w.k_pad);
	assert_memory_equal(a.w.scale, b.w.scale, a.w.n_pad * sizeof(float));
	assert_memory_equal(a.w.flag, b.w.flag, (size_t)a.w.n_pad / K_PANEL * (a.w.k_pad / K_BLOCK));
	for (uint32_t i = 0; i < a.w.n_exc; i++) {
		const struct k_exception *x = &a.exc[i], *y = &b.exc[i];

		assert_true(x->block == y->block && x->index == y->index && x->bits == y->bits);
	}
	drop(&a);
	drop(&b);
}

/* The packer with vectors, if this machine has one, against the plain one: every
 * finite pattern up to absmax, in channels of 32 absmaxes. */
static void
test_packers(void **state)
{
	enum { K = 0x10000 };
	uint16_t *rows = malloc((size_t)K_PANEL * K * sizeof(*rows));

	(void)state;
	for (uint32_t shape = 0; shape < 2; shape++) {
		for (uint32_t r = 0; r < K_PANEL; r++) {
			uint32_t max = shape == 1 ? r * 8 : r == 31 ? 0x7f7f : r == 0 ? 0 : r * 0x7f80 / 32 + r * 37 % 128;

			for (uint32_t i = 0; i < K; i++) {
				uint16_t bits = (uint16_t)(i * (2 * r + 1));

				rows[(size_t)r * K + i] = (bits & 0x7fffu) > max ? (uint16_t)(bits & 0x8000) | (uint16_t)max : bits;
			}
		}
		check_packers(rows, K_PANEL, K);
	}
	check_packers(rows, 31, K - 1);
	check_packers(rows, 40, 77);
	check_packers(rows, 64, 32);
	check_packers(rows, 1, 1);
	free(rows);
}

/* The weights of one output channel, as the computing kernels see them. */
static double
weight_of(const struct k_weight *w, enum k_format f, uint32_t r, uint32_t c)
{
	uint32_t in = c % K_BLOCK, ch = r % K_PANEL;
	size_t at = ((size_t)(r / K_PANEL) * (w->k_pad / K_BLOCK) + c / K_BLOCK) * 1024 + ch / 16 * 512 + in / 2 * 32 +
	    ch % 16 * 2 + in % 2;

	if (f == K_BF16)
		return bf16(k_unpack(w, r, c)) / (double)w->scale[r];
	if (f == K_FP8T)
		return e4m3(k_e4m3_from_float((float)(e4m3(w->hi[at]) * w->scale[r] / w->tensor_scale)));
	return e4m3(w->hi[at]);
}

/* fp8t against E4M3(w / tensor_scale), rounded once: equal above the subnormals,
 * else at most 3/4 of a step of 2^-9 off. */
static void
check_tensor(const struct k_weight *w, const uint16_t *rows)
{
	uint32_t twice = 0;

	for (uint32_t r = 0; r < w->n; r++) {
		assert_true(w->scale[r] <= w->tensor_scale);
		for (uint32_t i = 0; i < w->k; i++) {
			double v = bf16(rows[r * w->k + i]) / w->tensor_scale, got = weight_of(w, K_FP8T, r, i);
			double once = e4m3(k_e4m3_from_float((float)v));

			if (fabs(once) >= 0x1p-6)
				assert_true(got == once);
			else
				assert_true(fabs(v - got) <= 0x1p-9 * 3 / 4);
			twice += got != once;
		}
	}
	print_message("%u of %u weights rounded to a neighbour by the second rounding\n", twice, w->n * w->k);
}

/* The rule of the sum, from plain BF16 and E4M3 values: blocks of 32, an even and an odd chain. */
static float
sum_of(const struct k_weight *w, enum k_format f, uint32_t r, const uint16_t *x)
{
	float total = 0;

	for (uint32_t b = 0; b < w->k; b += K_BLOCK) {
		float chain[2] = {0, 0};

		for (uint32_t i = b; i < b + K_BLOCK; i++)
			if (i < w->k)
				chain[i % 2] = fmaf((float)weight_of(w, f, r, i), (float)bf16(x[i]), chain[i % 2]);
		total = total + (chain[0] + chain[1]);
	}
	return total;
}

/* absmax / 448 of the square of 128 channels by 128 inputs that a weight lies in. */
static float
square_scale(const uint16_t *rows, uint32_t n, uint32_t k, uint32_t r, uint32_t c)
{
	double max = 0;

	for (uint32_t i = r & ~127u; i < n && i < (r & ~127u) + 128; i++)
		for (uint32_t j = c & ~127u; j < k && j < (c & ~127u) + 128; j++)
			max = fmax(max, fabs(bf16(rows[i * k + j])));
	return (float)max / 448.0f;
}

/* fp8b from the masters: each square's sum by the common rule, then by both scales into the total. */
static float
sum_of_squares(const uint16_t *rows, uint32_t n, uint32_t k, uint32_t r, const uint16_t *x, const float *xs)
{
	float total = 0;

	for (uint32_t s = 0; s < k; s += 128) {
		float scale = square_scale(rows, n, k, r, s), sum = 0;

		for (uint32_t b = s; b < k && b < s + 128; b += K_BLOCK) {
			float chain[2] = {0, 0};

			for (uint32_t i = b; i < b + K_BLOCK && i < k; i++)
				chain[i % 2] = fmaf((float)e4m3(k_e4m3_from_float((float)bf16(rows[r * k + i]) / scale)), (float)bf16(x[i]),
				    chain[i % 2]);
			sum = sum + (chain[0] + chain[1]);
		}
		total = total + sum * (xs[s / 128] * scale);
	}
	return total;
}

static void
check_squares(const struct k_ops *ops, const struct k_weight *w, const uint16_t *rows, const float *in)
{
	uint16_t x[320] = {0};
	float xs[3], y[150], plus[150];
	struct k_linear a = {.w = w, .format = K_FP8B, .x = x, .x_scale = xs, .ld_scale = 3, .rows = 1, .ldx = 320, .y = y, .ldy = 150,
	    .panel1 = w->n_pad / K_PANEL};

	k_act_squares(ops, in, w->k, 320, x, xs);
	for (uint32_t b = 0; b < 3; b++) {
		float max = 0;

		for (uint32_t i = b * 128; i < w->k && i < b * 128 + 128; i++)
			max = fmaxf(max, fabsf(in[i]));
		assert_true(xs[b] == max / 448.0f);
		for (uint32_t i = b * 128; i < w->k && i < b * 128 + 128; i++)
			assert_true((float)bf16(x[i]) == (float)e4m3(k_e4m3_from_float(in[i] / xs[b])));
	}
	k_linear_run(ops, &a);
	for (uint32_t r = 0; r < w->n; r++) {
		float want = sum_of_squares(rows, w->n, w->k, r, x, xs);

		assert_memory_equal(&want, &y[r], sizeof(want));
		plus[r] = (float)r;
	}
	a.y = plus, a.add = true;
	k_linear_run(ops, &a);
	for (uint32_t r = 0; r < w->n; r++)
		assert_true(plus[r] == (float)r + y[r]);
}

static void
test_linear(void **state)
{
	enum { N = 150, K = 300, KP = 320 };
	static uint16_t rows[N * K];
	uint16_t x[KP] = {0}, scaled[KP] = {0};
	float in[K], xs, y[N];
	struct packed p;
	uint32_t bad_row, bad_col, seed = 7;
	const char *level;

	(void)state;
	for (uint32_t i = 0; i < N * K; i++) {
		seed = seed * 1664525u + 1013904223u;
		rows[i] = k_bf16_from_float(((float)(seed >> 8) / 8388608.0f - 1) * (i % 97 == 0 ? 1e-6f : 0.05f) /
		    (float)(1 << i / K % 7));
	}
	for (uint32_t i = 0; i < K; i++)
		in[i] = sinf((float)i * 0.7f) * 3;
	assert_int_equal(pack(&p, rows, N, K, &bad_row, &bad_col), 0);
	assert_true(p.w.n_exc > 0);
	check_tensor(&p.w, rows);
	for (size_t l = 0; (level = kernels_level(l)) != NULL; l++) {
		const struct k_ops *ops = kernels_select(level, (char[256]){0}, 256);

		if (ops == NULL)
			continue;
		ops->act_bf16(in, K, KP, x);
		ops->act_fp8(in, K, KP, scaled, &xs);
		check_squares(ops, &p.w, rows, in);
		for (enum k_format f = 0; f < K_FP8B; f++) {
			bool fp8 = k_is_w8a8(f);
			struct k_linear a = {.w = &p.w, .format = f, .x = fp8 ? scaled : x, .x_scale = fp8 ? &xs : NULL, .rows = 1,
			    .ldx = KP, .y = y, .ldy = N, .panel1 = p.w.n_pad / K_PANEL};

			ops->linear(&a);
			for (uint32_t r = 0; r < N; r++) {
				float want = sum_of(&p.w, f, r, a.x);

				if (fp8)
					want *= xs;
				want *= f == K_FP8T ? p.w.tensor_scale : p.w.scale[r];
				assert_memory_equal(&want, &y[r], sizeof(want));
			}
		}
	}
	drop(&p);
}

static void
test_refused(void **state)
{
	uint16_t rows[40 * 3] = {0};
	struct packed p;
	uint32_t r = 0, c = 0;

	(void)state;
	rows[35 * 3 + 1] = 0x7fc0;
	assert_int_equal(pack(&p, rows, 40, 3, &r, &c), -EINVAL);
	assert_int_equal(r, 35);
	assert_int_equal(c, 1);
	drop(&p);
	rows[35 * 3 + 1] = 0;
	rows[2] = 0xff80;
	assert_int_equal(pack(&p, rows, 40, 3, &r, &c), -EINVAL);
	assert_int_equal(r, 0);
	assert_int_equal(c, 2);
	drop(&p);
}

static void
test_levels(void **state)
{
	char why[256] = "";

	(void)state;
	assert_string_equal(kernels_level(0), "ref");
	assert_string_equal(kernels_select("ref", why, sizeof(why))->name, "ref");
	assert_null(kernels_select("sse9", why, sizeof(why)));
	assert_non_null(strstr(why, "unknown CPU level 'sse9' (ref"));
	for (size_t i = 0; kernels_level(i) != NULL; i++) {
		const struct k_ops *ops = kernels_select(kernels_level(i), why, sizeof(why));

		if (ops == NULL)
			assert_non_null(strstr(why, kernels_level(i)));
		else
			assert_string_equal(ops->name, kernels_level(i));
	}
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_e4m3),
		cmocka_unit_test(test_bf16),
		cmocka_unit_test(test_lossless),
		cmocka_unit_test(test_packers),
		cmocka_unit_test(test_linear),
		cmocka_unit_test(test_refused),
		cmocka_unit_test(test_levels),
	};

	return cmocka_run_group_tests_name("kernels", tests, NULL, NULL);
}
