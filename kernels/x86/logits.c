/* SPDX-License-Identifier: Apache-2.0 */
/* What ref.c does to rows of logits, eight or sixteen lanes at once in vectors that the compiler cuts to the level's width. */
#include "kernels/internal.h"

typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
/* In arrays. Not for variables: gcc's sanitizer puts them where it then does not take them from. */
typedef double f64x8_at __attribute__((vector_size(64), aligned(8)));
typedef float f32x8_at __attribute__((vector_size(32), aligned(4)));
typedef float f32x16_at __attribute__((vector_size(64), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

INLINE void
exp_lanes(const f64x8 *of, f64x8 *out)
{
	static const double c[] = EXP64_C;
	const f64x8 zero = {0}, least = zero + EXP64_MIN;
	i64x8 low = *of < least;
	f64x8 x = (f64x8)((low & (i64x8)least) | (~low & (i64x8)*of));
	f64x8 t = x * EXP64_LOG2E + EXP64_ROUND, n = t - EXP64_ROUND, r = x - n * EXP64_LN2_HI - n * EXP64_LN2_LO, p = zero + c[0];

	UNROLL
	for (int i = 1; i < EXP64_N; i++)
		p = p * r + c[i];
	*out = (f64x8)((i64x8)p + ((i64x8)t << 52));
}

INLINE void
add_lanes(const float *a, const float *b, float max_a, float max_b, const i64x8 *here, f64x8 sum[3])
{
	f64x8 x = __builtin_convertvector(*(const f32x8_at *)(const void *)a, f64x8) - max_a, p;
	f64x8 y = __builtin_convertvector(*(const f32x8_at *)(const void *)b, f64x8) - max_b, q;

	exp_lanes(&x, &p);
	exp_lanes(&y, &q);
	sum[0] += (f64x8)(*here & (i64x8)p);
	sum[1] += (f64x8)(*here & (i64x8)q);
	sum[2] += (f64x8)(*here & (i64x8)(p * (x - y)));
}

INLINE double
fold(const f64x8 *of)
{
	f64x8 v = *of;

	return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

/* Of eight. */
INLINE void
weigh(const float *x, float max, double temperature, double least, f64x8 *out)
{
	f64x8 v = (__builtin_convertvector(*(const f32x8_at *)(const void *)x, f64x8) - max) / temperature, w;

	exp_lanes(&v, &w);
	*out = (f64x8)((w >= least) & (i64x8)w);
}

INLINE void
divergence(const float *a, const float *b, uint32_t n, float max_a, float max_b, double out[3])
{
	f64x8 sum[3] = {{0}};
	float rest[2][8] = {{0}};
	i64x8 here = {0}, all = ~here;
	uint32_t i;

	for (i = 0; i + 8 <= n; i += 8)
		add_lanes(a + i, b + i, max_a, max_b, &all, sum);
	for (uint32_t j = 0; i + j < n; j++)
		rest[0][j] = a[i + j], rest[1][j] = b[i + j], here[j] = -1;
	if (i < n)
		add_lanes(rest[0], rest[1], max_a, max_b, &here, sum);
	for (int s = 0; s < 3; s++)
		out[s] = fold(&sum[s]);
}

INLINE double
weights(const float *x, uint32_t n, float max, double temperature, double least, double *p)
{
	f64x8 sum = {0}, w;
	float rest[8] = {0};
	uint32_t i;

	for (i = 0; i + 8 <= n; i += 8) {
		weigh(x + i, max, temperature, least, &w);
		*(f64x8_at *)(void *)(p + i) = w;
		sum += w;
	}
	for (uint32_t j = 0; i + j < n; j++)
		rest[j] = x[i + j];
	if (i < n)
		weigh(rest, max, temperature, least, &w);
	for (uint32_t j = 0; i + j < n; j++)
		p[i + j] = w[j], sum[j] += w[j];
	return fold(&sum);
}

INLINE bool
scan(const float *x, uint32_t n, float *max)
{
	const i32x16 inf = (i32x16){0} + 0x7f800000;
	i32x16 bad = {0}, more;
	int32_t any = 0;

	for (uint32_t from = 0; from < n; from += K_SCAN) {
		uint32_t to = from + K_SCAN < n ? from + K_SCAN : n, i = from;
		f32x16 m = (f32x16){0} + x[from];
		float best;

		for (; i + 16 <= to; i += 16) {
			f32x16 v = *(const f32x16_at *)(const void *)(x + i);

			bad |= ((i32x16)v & inf) == inf;
			more = v > m;
			m = (f32x16)((more & (i32x16)v) | (~more & (i32x16)m));
		}
		best = m[0];
		for (int j = 1; j < 16; j++)
			best = m[j] > best ? m[j] : best;
		for (; i < to; i++) {
			any |= !(x[i] - x[i] == 0);
			best = x[i] > best ? x[i] : best;
		}
		max[from / K_SCAN] = best + 0.0f;
	}
	for (int j = 0; j < 16; j++)
		any |= bad[j];
	return any == 0;
}

__attribute__((target("avx2"))) void
divergence_avx2(const float *a, const float *b, uint32_t n, float max_a, float max_b, double out[3])
{
	divergence(a, b, n, max_a, max_b, out);
}

__attribute__((target("avx512f,avx512dq"))) void
divergence_avx512(const float *a, const float *b, uint32_t n, float max_a, float max_b, double out[3])
{
	divergence(a, b, n, max_a, max_b, out);
}

__attribute__((target("avx2"))) double
weights_avx2(const float *x, uint32_t n, float max, double temperature, double least, double *p)
{
	return weights(x, n, max, temperature, least, p);
}

__attribute__((target("avx2"))) bool
scan_avx2(const float *x, uint32_t n, float *max)
{
	return scan(x, n, max);
}

__attribute__((target("avx512f,avx512dq"))) double
weights_avx512(const float *x, uint32_t n, float max, double temperature, double least, double *p)
{
	return weights(x, n, max, temperature, least, p);
}

__attribute__((target("avx512f,avx512dq"))) bool
scan_avx512(const float *x, uint32_t n, float *max)
{
	return scan(x, n, max);
}
