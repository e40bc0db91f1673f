/* SPDX-License-Identifier: Apache-2.0 */
/* divergence() of ref.c, eight lanes at once in vectors that the compiler cuts to the level's width. */
#include "kernels/internal.h"

typedef double f64x8 __attribute__((vector_size(64), aligned(8)));
typedef int64_t i64x8 __attribute__((vector_size(64), aligned(8)));
typedef float f32x8 __attribute__((vector_size(32), aligned(4)));

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
	f64x8 x = __builtin_convertvector(*(const f32x8 *)(const void *)a, f64x8) - max_a, p;
	f64x8 y = __builtin_convertvector(*(const f32x8 *)(const void *)b, f64x8) - max_b, q;

	exp_lanes(&x, &p);
	exp_lanes(&y, &q);
	sum[0] += (f64x8)(*here & (i64x8)p);
	sum[1] += (f64x8)(*here & (i64x8)q);
	sum[2] += (f64x8)(*here & (i64x8)(p * (x - y)));
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
		out[s] = ((sum[s][0] + sum[s][1]) + (sum[s][2] + sum[s][3])) + ((sum[s][4] + sum[s][5]) + (sum[s][6] + sum[s][7]));
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
