/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What ref.c does to rows of logits, included by logits.c once for each level: LANES of FP64 a vector, TARGET, OF() for
 * names. Sums have eight lanes at any width. Vectors wider than the level's would be compared lane by lane by gcc.
 */
#define PARTS (8 / LANES)

typedef double OF(f64) __attribute__((vector_size(8 * LANES)));
typedef int64_t OF(i64) __attribute__((vector_size(8 * LANES)));
typedef float OF(f32) __attribute__((vector_size(8 * LANES)));
typedef int32_t OF(i32) __attribute__((vector_size(8 * LANES)));
/* In arrays. Not for variables: gcc's sanitizer puts them where it then does not take them from. */
typedef double OF(f64_at) __attribute__((vector_size(8 * LANES), aligned(8)));
typedef float OF(f32_at) __attribute__((vector_size(8 * LANES), aligned(4)));
typedef float OF(f32_half_at) __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE void
OF(exp_lanes)(const OF(f64) *of, OF(f64) *out)
{
	static const double c[] = EXP64_C;
	const OF(f64) zero = {0}, least = zero + EXP64_MIN;
	OF(i64) low = *of < least;
	OF(f64) x = (OF(f64))((low & (OF(i64))least) | (~low & (OF(i64))*of));
	OF(f64) t = x * EXP64_LOG2E + EXP64_ROUND, n = t - EXP64_ROUND, r = x - n * EXP64_LN2_HI - n * EXP64_LN2_LO;
	OF(f64) p = zero + c[0];

	UNROLL
	for (int i = 1; i < EXP64_N; i++)
		p = p * r + c[i];
	*out = (OF(f64))((OF(i64))p + ((OF(i64))t << 52));
}

/* A vector of floats less their maximum. */
INLINE void
OF(below)(const float *x, float max, OF(f64) *out)
{
	*out = __builtin_convertvector(*(const OF(f32_half_at) *)(const void *)x, OF(f64)) - max;
}

/* Of eight. */
INLINE void
OF(add_lanes)(const float *a, const float *b, float max_a, float max_b, const OF(i64) here[PARTS], OF(f64) sum[3][PARTS])
{
	UNROLL
	for (int i = 0; i < PARTS; i++) {
		OF(f64) x, y, p, q;

		OF(below)(a + i * LANES, max_a, &x);
		OF(below)(b + i * LANES, max_b, &y);
		OF(exp_lanes)(&x, &p);
		OF(exp_lanes)(&y, &q);
		sum[0][i] += (OF(f64))(here[i] & (OF(i64))p);
		sum[1][i] += (OF(f64))(here[i] & (OF(i64))q);
		sum[2][i] += (OF(f64))(here[i] & (OF(i64))(p * (x - y)));
	}
}

INLINE double
OF(fold)(const OF(f64) of[PARTS])
{
	double v[8];

	memcpy(v, of, sizeof(v));
	return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

TARGET void
OF(divergence)(const float *a, const float *b, uint32_t n, float max_a, float max_b, double out[3])
{
	OF(f64) sum[3][PARTS] = {{{0}}};
	OF(i64) here[PARTS];
	float rest[2][8] = {{0}};
	uint32_t i;

	memset(here, 0xff, sizeof(here));
	for (i = 0; i + 8 <= n; i += 8)
		OF(add_lanes)(a + i, b + i, max_a, max_b, here, sum);
	for (uint32_t j = 0; j < 8; j++) {
		if (i + j < n)
			rest[0][j] = a[i + j], rest[1][j] = b[i + j];
		here[j / LANES][j % LANES] = i + j < n ? -1 : 0;
	}
	if (i < n)
		OF(add_lanes)(rest[0], rest[1], max_a, max_b, here, sum);
	for (int s = 0; s < 3; s++)
		out[s] = OF(fold)(sum[s]);
}

/* Of eight. */
INLINE void
OF(weigh)(const float *x, float max, double temperature, double least, OF(f64) out[PARTS])
{
	UNROLL
	for (int i = 0; i < PARTS; i++) {
		OF(f64) v, w;

		OF(below)(x + i * LANES, max, &v);
		v /= temperature;
		OF(exp_lanes)(&v, &w);
		out[i] = (OF(f64))((w >= least) & (OF(i64))w);
	}
}

TARGET double
OF(weights)(const float *x, uint32_t n, float max, double temperature, double least, double *p)
{
	OF(f64) sum[PARTS] = {{0}}, w[PARTS];
	float rest[8] = {0};
	uint32_t i;

	for (i = 0; i + 8 <= n; i += 8) {
		OF(weigh)(x + i, max, temperature, least, w);
		UNROLL
		for (int j = 0; j < PARTS; j++) {
			*(OF(f64_at) *)(void *)(p + i + j * LANES) = w[j];
			sum[j] += w[j];
		}
	}
	for (uint32_t j = 0; i + j < n; j++)
		rest[j] = x[i + j];
	if (i < n)
		OF(weigh)(rest, max, temperature, least, w);
	for (uint32_t j = 0; i + j < n; j++) {
		p[i + j] = w[j / LANES][j % LANES];
		sum[j / LANES][j % LANES] += p[i + j];
	}
	return OF(fold)(sum);
}

TARGET bool
OF(scan)(const float *x, uint32_t n, float *max)
{
	const OF(i32) inf = (OF(i32)){0} + 0x7f800000;
	OF(i32) bad = {0}, more;
	int32_t any = 0;

	for (uint32_t from = 0; from < n; from += K_SCAN) {
		uint32_t to = from + K_SCAN < n ? from + K_SCAN : n, i = from;
		OF(f32) m = (OF(f32)){0} + x[from];
		float best;

		for (; i + 2 * LANES <= to; i += 2 * LANES) {
			OF(f32) v = *(const OF(f32_at) *)(const void *)(x + i);

			bad |= ((OF(i32))v & inf) == inf;
			more = v > m;
			m = (OF(f32))((more & (OF(i32))v) | (~more & (OF(i32))m));
		}
		best = m[0];
		for (int j = 1; j < 2 * LANES; j++)
			best = m[j] > best ? m[j] : best;
		for (; i < to; i++) {
			any |= !(x[i] - x[i] == 0);
			best = x[i] > best ? x[i] : best;
		}
		max[from / K_SCAN] = best + 0.0f;
	}
	for (int j = 0; j < 2 * LANES; j++)
		any |= bad[j];
	return any == 0;
}

#undef PARTS
#undef LANES
#undef TARGET
#undef OF
