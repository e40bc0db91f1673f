/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AVX2, FMA and F16C. As avx512.c with 8 lanes: a chunk of 32 codes is 16
 * channels and becomes four registers of FP32, even and odd inputs apart. E4M3
 * goes through FP16, whose conversion knows subnormals whatever DAZ says.
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/internal.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) AVX2

#define FEW 3u           /* rows that run together: their chains on 16 channels fill 12 registers */
#define ROWS 96u         /* more rows share one unpacking into memory */
#define GROUP 4u         /* panels that share one expansion of the inputs */
#define CHUNK 4u         /* blocks of it: 128 inputs */
#define AHEAD 2048u      /* bytes of prefetch */

/* ---- numbers ---- */

INLINE __m256i
absolute(__m256 x)
{
	return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}

/* FP32 to BF16, nearest even, NaN quiet; in the low words of 32-bit lanes. */
INLINE __m256i
round_bf16(__m256 x)
{
	__m256i u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
	__m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)),
	    _mm256_and_si256(high, _mm256_set1_epi32(1)));
	__m256i nan = _mm256_cmpgt_epi32(absolute(x), _mm256_set1_epi32(0x7f800000));

	return _mm256_blendv_epi8(_mm256_srli_epi32(r, 16), _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
}

/* The same as a float. */
INLINE __m256
rounded_bf16(__m256 x)
{
	return _mm256_castsi256_ps(_mm256_slli_epi32(round_bf16(x), 16));
}

/* To the E4M3 grid. */
INLINE __m256
round_e4m3(__m256 x)
{
	const __m256 magic = _mm256_set1_ps(24576.0f); /* 1.5 * 2^23 * 2^-9: rounds to multiples of 2^-9 */
	const __m256i sign = _mm256_set1_epi32((int)0x80000000);
	__m256i mag = absolute(x), bit = _mm256_and_si256(_mm256_srli_epi32(mag, 20), _mm256_set1_epi32(1));
	__m256i r = _mm256_add_epi32(_mm256_add_epi32(mag, _mm256_set1_epi32(0x7ffff)), bit);
	__m256 sub = _mm256_sub_ps(_mm256_add_ps(_mm256_castsi256_ps(mag), magic), magic);
	__m256i normal = _mm256_cmpgt_epi32(mag, _mm256_set1_epi32(0x3c7fffff)); /* 2^-6 and above */
	__m256i nan = _mm256_cmpgt_epi32(mag, _mm256_set1_epi32(0x7f800000));

	r = _mm256_and_si256(r, _mm256_set1_epi32((int)0xfff00000));
	r = _mm256_min_epu32(r, _mm256_castps_si256(_mm256_set1_ps(448.0f)));
	r = _mm256_blendv_epi8(_mm256_castps_si256(sub), r, normal);
	r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan);
	return _mm256_castsi256_ps(_mm256_or_si256(r, _mm256_and_si256(_mm256_castps_si256(x), sign)));
}

/* The code of a float on the E4M3 grid, in the low bytes of 32-bit lanes. */
INLINE __m256i
e4m3_code(__m256 x)
{
	__m256i mag = absolute(x), sign = _mm256_srli_epi32(_mm256_andnot_si256(_mm256_set1_epi32(0x7fffffff),
	    _mm256_castps_si256(x)), 24);
	__m256i normal = _mm256_cmpgt_epi32(mag, _mm256_set1_epi32(0x3c7fffff));
	__m256i sub = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(mag), _mm256_set1_ps(512.0f)));
	__m256i code = _mm256_sub_epi32(_mm256_srli_epi32(mag, 20), _mm256_set1_epi32(120 << 3));

	code = _mm256_blendv_epi8(sub, _mm256_min_epi32(code, _mm256_set1_epi32(0x7f)), normal);
	return _mm256_or_si256(code, sign);
}

/* 16-bit lanes with a code in the high byte: as FP16 it is the value times 2^-8. */
INLINE __m256i
e4m3_to_half(__m256i high)
{
	return _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16((short)0xbf80));
}

INLINE void
half_to_float(__m256i half, __m256 out[2])
{
	const __m256 bias = _mm256_set1_ps(256.0f);

	out[0] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), bias);
	out[1] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), bias);
}

INLINE __m256i
tail(uint32_t i, uint32_t n)
{
	const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);

	return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - i < 8 ? (int)(n - i) : 8), lane);
}

/* ---- linear ---- */

enum source { CODES, PLANES, FLOATS };

struct block {
	const uint8_t *hi;
	const int8_t *lo;
	const float *spread;  /* [2 tiles][16 input pairs][2 inputs][16 channels] */
};

INLINE struct block
block_at(const struct k_weight *w, uint32_t block, const float *spread)
{
	return (struct block){w->hi + (size_t)block * 1024, w->lo + (size_t)block * 1024, spread};
}

/* The even and the odd input of 16 channels, from weight i on. */
INLINE void
pair_at(const struct block *b, enum source from, uint32_t i, __m256 even[2], __m256 odd[2])
{
	__m256i code, low;

	if (from == FLOATS) {
		UNROLL
		for (uint32_t t = 0; t < 2; t++) {
			even[t] = _mm256_load_ps(b->spread + i + t * 8);
			odd[t] = _mm256_load_ps(b->spread + i + 16 + t * 8);
		}
		return;
	}
	if (i % 64 == 0) {
		_mm_prefetch((const char *)b->hi + i + AHEAD, _MM_HINT_T0);
		if (from == PLANES)
			_mm_prefetch((const char *)b->lo + i + AHEAD, _MM_HINT_T0);
	}
	code = _mm256_loadu_si256((const __m256i *)(const void *)(b->hi + i));
	half_to_float(e4m3_to_half(_mm256_slli_epi16(code, 8)), even);
	half_to_float(e4m3_to_half(code), odd);
	if (from == CODES)
		return;
	/* The grid of BF16 magnitudes is that of the high words. */
	UNROLL
	for (uint32_t t = 0; t < 2; t++) {
		low = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(b->lo + i + t * 16)));
		even[t] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(even[t]),
		    _mm256_srai_epi32(_mm256_slli_epi32(low, 24), 8)));
		odd[t] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(odd[t]),
		    _mm256_slli_epi32(_mm256_srai_epi32(low, 8), 16)));
	}
}

static void
patch_block(const struct k_weight *w, uint32_t panel, uint32_t block, float spread[1024])
{
	uint32_t n;
	const struct k_exception *x = k_find_exceptions(w, block, &n);

	for (uint32_t j = 0; j < n; j++) {
		uint32_t i = x[j].index, c = i / 2 % 16;

		spread[i / 32 * 32 + i % 2 * 16 + c] =
		    k_bf16_to_float(k_exception_value(&x[j], w->scale[panel * K_PANEL + i / 512 * 16 + c]));
	}
}

INLINE void
spread_from(const struct block *b, enum source from, float spread[1024])
{
	for (uint32_t i = 0; i < 1024; i += 32) {
		__m256 even[2], odd[2];

		pair_at(b, from, i, even, odd);
		UNROLL
		for (uint32_t t = 0; t < 2; t++) {
			_mm256_store_ps(spread + i + t * 8, even[t]);
			_mm256_store_ps(spread + i + 16 + t * 8, odd[t]);
		}
	}
}

/* From the scale of each channel to that of the tensor. */
INLINE void
requantise(const struct k_weight *w, uint32_t panel, float spread[1024])
{
	const __m256 tensor = _mm256_set1_ps(w->tensor_scale);

	for (uint32_t c = 0; c < K_PANEL; c += 8) {
		__m256 ratio = _mm256_div_ps(_mm256_loadu_ps(w->scale + panel * K_PANEL + c), tensor);
		float *at = spread + c / 16 * 512 + c % 16;

		for (uint32_t i = 0; i < 512; i += 16)
			_mm256_store_ps(at + i, round_e4m3(_mm256_mul_ps(_mm256_load_ps(at + i), ratio)));
	}
}

/* One block of 1024 weights to FP32. */
AVX2 static void
unpack_block(const struct k_weight *w, uint32_t panel, uint32_t block, enum k_format format, float spread[1024])
{
	struct block b = block_at(w, block, NULL);

	if (format == K_BF16) {
		spread_from(&b, PLANES, spread);
		if (w->flag[block])
			patch_block(w, panel, block, spread);
		return;
	}
	spread_from(&b, CODES, spread);
	if (format == K_FP8T)
		requantise(w, panel, spread);
}

typedef float inputs[CHUNK * K_BLOCK];
typedef float totals[K_PANEL];

/* One tile of a block against n rows (known where it is inlined). */
INLINE void
rows_tile(const struct block *b, enum source from, uint32_t tile, const inputs *x, uint32_t x_at, totals *total,
    const uint32_t n)
{
	__m256 even[FEW][2], odd[FEW][2];

	UNROLL
	for (uint32_t r = 0; r < n; r++)
		even[r][0] = even[r][1] = odd[r][0] = odd[r][1] = _mm256_setzero_ps();
#pragma GCC unroll 2
	for (uint32_t p = 0; p < 16; p++) {
		__m256 e[2], o[2];

		pair_at(b, from, tile * 512 + p * 32, e, o);
		UNROLL
		for (uint32_t r = 0; r < n; r++) {
			__m256 xe = _mm256_broadcast_ss(&x[r][x_at + 2 * p]);

			even[r][0] = _mm256_fmadd_ps(e[0], xe, even[r][0]);
			even[r][1] = _mm256_fmadd_ps(e[1], xe, even[r][1]);
		}
		UNROLL
		for (uint32_t r = 0; r < n; r++) {
			__m256 xo = _mm256_broadcast_ss(&x[r][x_at + 2 * p + 1]);

			odd[r][0] = _mm256_fmadd_ps(o[0], xo, odd[r][0]);
			odd[r][1] = _mm256_fmadd_ps(o[1], xo, odd[r][1]);
		}
	}
	UNROLL
	for (uint32_t r = 0; r < n; r++) {
		UNROLL
		for (uint32_t t = 0; t < 2; t++) {
			float *to = &total[r][tile * 16 + t * 8];

			_mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), _mm256_add_ps(even[r][t], odd[r][t])));
		}
	}
}

INLINE void
rows_block(const struct block *b, enum source from, const inputs *x, uint32_t x_at, totals *total, const uint32_t n)
{
	rows_tile(b, from, 0, x, x_at, total, n);
	rows_tile(b, from, 1, x, x_at, total, n);
}

INLINE void
expand_inputs(const uint16_t *x, size_t ldx, uint32_t rows, uint32_t n, inputs *out)
{
	for (uint32_t r = 0; r < rows; r++)
		for (uint32_t i = 0; i < n; i += 8) {
			__m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(x + r * ldx + i)));

			_mm256_store_ps(&out[r][i], _mm256_castsi256_ps(_mm256_slli_epi32(u, 16)));
		}
}

INLINE void
write_panel(const struct k_linear *a, uint32_t panel, uint32_t row, uint32_t rows, const totals *total)
{
	uint32_t first = panel * K_PANEL, n = a->w->n - first < K_PANEL ? a->w->n - first : K_PANEL;

	for (uint32_t r = 0; r < rows; r++) {
		for (uint32_t c = 0; c < n; c += 8) {
			__m256i m = tail(c, n);
			float *y = a->y + (row + r) * a->ldy + first + c;
			__m256 v = _mm256_load_ps(&total[r][c]);

			if (a->x_scale != NULL)
				v = _mm256_mul_ps(v, _mm256_set1_ps(a->x_scale[row + r]));
			v = _mm256_mul_ps(v, a->format == K_FP8T ? _mm256_set1_ps(a->w->tensor_scale)
			                                         : _mm256_loadu_ps(a->w->scale + first + c));
			if (a->add)
				v = _mm256_add_ps(_mm256_maskload_ps(y, m), v);
			_mm256_maskstore_ps(y, m, v);
		}
	}
}

/* Up to FEW rows: every weight is read once and used at once. */
INLINE void
few_panel(const struct k_linear *a, uint32_t panel, const uint32_t n, enum source from)
{
	const struct k_weight *w = a->w;
	uint32_t kb_n = w->k_pad / K_BLOCK;
	_Alignas(32) float spread[1024];
	_Alignas(32) inputs x[FEW];
	_Alignas(32) totals total[FEW] = {{0}};

	for (uint32_t kb = 0; kb < kb_n; kb++) {
		struct block b = block_at(w, panel * kb_n + kb, spread);

		if (kb % CHUNK == 0)
			expand_inputs(a->x + kb * K_BLOCK, a->ldx, n, kb_n - kb < CHUNK ? (kb_n - kb) * K_BLOCK : CHUNK * K_BLOCK,
			    x);
		if (from == FLOATS || (from == PLANES && w->flag[panel * kb_n + kb])) {
			unpack_block(w, panel, panel * kb_n + kb, a->format, spread);
			rows_block(&b, FLOATS, (const inputs *)x, kb % CHUNK * K_BLOCK, total, n);
		} else {
			rows_block(&b, from, (const inputs *)x, kb % CHUNK * K_BLOCK, total, n);
		}
	}
	write_panel(a, panel, 0, n, (const totals *)total);
}

#define FEW_ROWS(n) \
	AVX2 static void few_##n(const struct k_linear *a, uint32_t panel) \
	{ \
		if (a->format == K_BF16) \
			few_panel(a, panel, n, PLANES); \
		else if (a->format == K_FP8T) \
			few_panel(a, panel, n, FLOATS); \
		else \
			few_panel(a, panel, n, CODES); \
	}
FEW_ROWS(1)
FEW_ROWS(2)
FEW_ROWS(3)

/* One unpacked block against more than FEW rows, in even teams. */
AVX2 static void
many_block(const float spread[1024], const inputs *x, uint32_t x_at, totals *total, uint32_t rows)
{
	struct block b = {.spread = spread};
	uint32_t teams = (rows + FEW - 1) / FEW;

	for (uint32_t i = 0; i < teams; i++) {
		uint32_t r = rows * i / teams;

		if (rows * (i + 1) / teams - r == 3)
			rows_block(&b, FLOATS, x + r, x_at, total + r, 3);
		else
			rows_block(&b, FLOATS, x + r, x_at, total + r, 2);
	}
}

/* Panels [p0, p1), at most GROUP, for up to ROWS rows, more than FEW. */
AVX2 static void
many_panels(const struct k_linear *a, uint32_t p0, uint32_t p1, uint32_t row, uint32_t rows)
{
	const struct k_weight *w = a->w;
	uint32_t kb_n = w->k_pad / K_BLOCK;
	_Alignas(32) float spread[1024];
	_Alignas(32) inputs x[ROWS];
	_Alignas(32) totals total[GROUP][ROWS];

	memset(total, 0, (p1 - p0) * sizeof(*total));
	for (uint32_t kb0 = 0; kb0 < kb_n; kb0 += CHUNK) {
		uint32_t kb1 = kb_n - kb0 < CHUNK ? kb_n : kb0 + CHUNK;

		expand_inputs(a->x + row * a->ldx + kb0 * K_BLOCK, a->ldx, rows, (kb1 - kb0) * K_BLOCK, x);
		for (uint32_t p = p0; p < p1; p++) {
			for (uint32_t kb = kb0; kb < kb1; kb++) {
				unpack_block(w, p, p * kb_n + kb, a->format, spread);
				many_block(spread, (const inputs *)x, (kb - kb0) * K_BLOCK, total[p - p0], rows);
			}
		}
	}
	for (uint32_t p = p0; p < p1; p++)
		write_panel(a, p, row, rows, (const totals *)total[p - p0]);
}

static void
linear_avx2(const struct k_linear *a)
{
	static void (*const few[FEW])(const struct k_linear *, uint32_t) = {few_1, few_2, few_3};

	if (a->rows == 0)
		return;
	if (a->rows <= FEW) {
		for (uint32_t panel = a->panel0; panel < a->panel1; panel++)
			few[a->rows - 1](a, panel);
		return;
	}
	for (uint32_t p0 = a->panel0; p0 < a->panel1; p0 += GROUP) {
		uint32_t p1 = a->panel1 - p0 < GROUP ? a->panel1 : p0 + GROUP, passes = (a->rows + ROWS - 1) / ROWS;

		for (uint32_t i = 0; i < passes; i++) {
			uint32_t row = (uint32_t)((uint64_t)a->rows * i / passes);

			many_panels(a, p0, p1, row, (uint32_t)((uint64_t)a->rows * (i + 1) / passes) - row);
		}
	}
}

/* ---- rows ---- */

/* The low words of 32-bit lanes to `out`, as many of the eight as there is room for. */
INLINE void
store_words(uint16_t *out, uint32_t room, __m256i v)
{
	__m256i w = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08);
	uint16_t word[8];

	if (room >= 8) {
		_mm_storeu_si128((__m128i *)(void *)out, _mm256_castsi256_si128(w));
		return;
	}
	_mm_storeu_si128((__m128i *)(void *)word, _mm256_castsi256_si128(w));
	memcpy(out, word, room * sizeof(*out));
}

AVX2 static void
act_bf16_avx2(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out)
{
	for (uint32_t i = 0; i < n; i += 8)
		store_words(out + i, n_pad - i, round_bf16(_mm256_maskload_ps(x + i, tail(i, n))));
	memset(out + n, 0, (n_pad - n) * sizeof(*out));
}

/* absmax / 448, or 1. Magnitudes compare as integers, and a NaN is above them all. */
INLINE float
absmax_scale(const float *x, uint32_t n)
{
	__m256i max = _mm256_setzero_si256();
	__m128i m;
	uint32_t bits;
	float s;

	for (uint32_t i = 0; i < n; i += 8)
		max = _mm256_max_epu32(max, absolute(_mm256_maskload_ps(x + i, tail(i, n))));
	m = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
	m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
	m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
	bits = (uint32_t)_mm_cvtsi128_si32(m);
	memcpy(&s, &bits, sizeof(s));
	s = s / 448.0f;
	return s == 0 ? 1.0f : s;
}

AVX2 static void
act_fp8_avx2(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out, float *scale)
{
	const __m256 s = _mm256_set1_ps(*scale = absmax_scale(x, n));

	for (uint32_t i = 0; i < n; i += 8) {
		__m256 v = round_e4m3(_mm256_div_ps(_mm256_maskload_ps(x + i, tail(i, n)), s));

		store_words(out + i, n_pad - i, _mm256_srli_epi32(_mm256_castps_si256(v), 16));
	}
	memset(out + n, 0, (n_pad - n) * sizeof(*out));
}

/* Lanes 0..7 and 8..15. */
INLINE float
fold16(__m256 low, __m256 high)
{
	__m256 a = _mm256_add_ps(low, high);
	__m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));

	b = _mm_add_ps(b, _mm_movehl_ps(b, b));
	return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

AVX2 static void
rmsnorm_avx2(const float *x, const float *w, uint32_t n, float eps, float *y)
{
	__m256 lane[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, r;

	for (uint32_t i = 0; i < n; i += 16) {
		UNROLL
		for (uint32_t t = 0; t < 2; t++) {
			uint32_t at = i + t * 8;
			__m256 v = at < n ? _mm256_maskload_ps(x + at, tail(at, n)) : _mm256_setzero_ps();

			lane[t] = _mm256_fmadd_ps(v, v, lane[t]);
		}
	}
	r = _mm256_set1_ps(1.0f / sqrtf(fold16(lane[0], lane[1]) / (float)n + eps));
	for (uint32_t i = 0; i < n; i += 8) {
		__m256i m = tail(i, n);

		_mm256_maskstore_ps(y + i, m, _mm256_mul_ps(_mm256_mul_ps(_mm256_maskload_ps(x + i, m), r),
		    _mm256_maskload_ps(w + i, m)));
	}
}

AVX2 static void
rope_avx2(float *x, uint32_t n_heads, uint32_t head_dim, const float *cos, const float *sin)
{
	uint32_t half = head_dim / 2;

	for (uint32_t h = 0; h < n_heads; h++, x += head_dim) {
		for (uint32_t i = 0; i < half; i += 8) {
			__m256i m = tail(i, half);
			__m256 c = _mm256_maskload_ps(cos + i, m), s = _mm256_maskload_ps(sin + i, m);
			__m256 a = _mm256_maskload_ps(x + i, m), b = _mm256_maskload_ps(x + half + i, m);

			_mm256_maskstore_ps(x + i, m, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
			_mm256_maskstore_ps(x + half + i, m, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
		}
	}
}

INLINE __m256
exp_avx2(__m256 x)
{
	const __m256 round = _mm256_set1_ps(EXP_ROUND), one = _mm256_set1_ps(1.0f);
	__m256 zero = _mm256_cmp_ps(x, _mm256_set1_ps(EXP_MIN), _CMP_LT_OQ);
	__m256 high = _mm256_cmp_ps(x, _mm256_set1_ps(EXP_MAX), _CMP_GT_OQ);
	__m256 n, r, p;
	__m256i e;

	x = _mm256_blendv_ps(x, _mm256_set1_ps(EXP_MAX), high);
	n = _mm256_sub_ps(_mm256_fmadd_ps(x, _mm256_set1_ps(EXP_LOG2E), round), round);
	r = _mm256_fmadd_ps(n, _mm256_set1_ps(-EXP_LN2_LO), _mm256_fmadd_ps(n, _mm256_set1_ps(-EXP_LN2_HI), x));
	p = _mm256_fmadd_ps(_mm256_set1_ps(EXP_C6), r, _mm256_set1_ps(EXP_C5));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_C4));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_C3));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_C2));
	p = _mm256_fmadd_ps(p, r, one);
	p = _mm256_fmadd_ps(p, r, one);
	e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
	return _mm256_andnot_ps(zero, _mm256_mul_ps(p, _mm256_castsi256_ps(e)));
}

AVX2 static void
silu_mul_avx2(const float *gate, const float *up, uint32_t n, float *y)
{
	const __m256 one = _mm256_set1_ps(1.0f);

	for (uint32_t i = 0; i < n; i += 8) {
		__m256i m = tail(i, n);
		__m256 g = _mm256_maskload_ps(gate + i, m);
		__m256 e = exp_avx2(_mm256_xor_ps(g, _mm256_set1_ps(-0.0f)));

		_mm256_maskstore_ps(y + i, m, _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(one, e)),
		    _mm256_maskload_ps(up + i, m)));
	}
}

/* ---- KV pages ---- */

/* A head as BF16, or with a scale as E4M3 codes; zeros up to hd_pad. */
INLINE void
encode_head(const float *x, uint32_t head_dim, uint32_t hd_pad, const float *scale, uint16_t *out)
{
	for (uint32_t d = 0; d < head_dim; d += 8) {
		__m256 v = _mm256_maskload_ps(x + d, tail(d, head_dim));

		store_words(out + d, 8, scale == NULL ? round_bf16(v)
		                                      : e4m3_code(round_e4m3(_mm256_div_ps(v, _mm256_set1_ps(*scale)))));
	}
	memset(out + head_dim, 0, (hd_pad - head_dim) * sizeof(*out));
}

/* A neighbour may write the other slot of a pair at the same time: nothing but the slot is stored. */
AVX2 static void
kv_write_avx2(const struct k_kv_block *b, const float *k, const float *v, uint32_t n_kv_heads, uint32_t head_dim,
    uint32_t hd_pad, uint32_t slot)
{
	uint32_t size = hd_pad * K_BLOCK;
	bool fp8 = b->fp8 >> slot & 1;
	_Alignas(32) uint16_t word[256];

	for (uint32_t h = 0; h < n_kv_heads; h++, k += head_dim, v += head_dim) {
		uint32_t at = h * size, v_at = at + slot / 2 * hd_pad * 2 + slot % 2;
		float *ks = fp8 ? b->scale + h * K_BLOCK + slot : NULL, *vs = fp8 ? ks + n_kv_heads * K_BLOCK : NULL;

		if (fp8)
			*ks = absmax_scale(k, head_dim), *vs = absmax_scale(v, head_dim);
		encode_head(k, head_dim, hd_pad, ks, word);
		for (uint32_t d = 0; d < hd_pad; d += 2) {
			if (fp8)
				memcpy(b->q + at + d * K_BLOCK + slot * 2, (uint8_t[2]){(uint8_t)word[d], (uint8_t)word[d + 1]}, 2);
			else
				memcpy(b->k + at + d * K_BLOCK + slot * 2, word + d, 4);
		}
		encode_head(v, head_dim, hd_pad, vs, word);
		for (uint32_t d = 0; d < hd_pad; d++) {
			if (fp8)
				b->q[n_kv_heads * size + v_at + d * 2] = (uint8_t)word[d];
			else
				b->v[v_at + d * 2] = word[d];
		}
	}
}

/* ---- attention ---- */

#define HEADS 16u        /* query heads of one KV head that share its unpacking */
#define TEAM 4u          /* of these, those whose chains run together */

/* One KV head of a block as BF16, and the scales of its positions (NULL: all BF16). */
struct head_page {
	const uint16_t *k, *v;
	const float *ks, *vs;   /* [32], 1 in BF16 positions */
	uint32_t lo, hi;        /* slots that count */
};

/* What a query head has so far. */
struct head {
	_Alignas(32) float q[256], out[256], block[256], p[32];
	float m, l, block_m, block_l;
};

/* The words of `now` where the mask has ones, else those of `then`, if any. */
INLINE void
store_mixed(uint16_t *to, __m256i now, const uint16_t *then, __m256i mask)
{
	if (then != NULL)
		now = _mm256_blendv_epi8(_mm256_loadu_si256((const __m256i *)(const void *)then), now, mask);
	_mm256_store_si256((__m256i *)(void *)to, now);
}

/* 32-bit lanes: all ones where a bit of `bits` is set. */
INLINE __m256i
lanes_of(uint32_t bits)
{
	const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);

	return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), bit), bit);
}

/* 16 codes to BF16. */
INLINE __m256i
e4m3_to_bf16(const uint8_t *code)
{
	__m256i c = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)code)), 8);
	__m256 v[2];

	half_to_float(e4m3_to_half(c), v);
	/* pack works on halves of a register */
	return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(_mm256_castps_si256(v[0]), 16),
	    _mm256_srli_epi32(_mm256_castps_si256(v[1]), 16)), 0xd8);
}

/* The FP8 positions of a head's K and V as BF16 beside those that are BF16 already. */
INLINE void
mix_page(const struct k_attention *a, const struct k_kv_block *b, uint32_t kvh, uint16_t *k, uint16_t *v)
{
	uint32_t size = a->hd_pad * K_BLOCK;
	size_t head = (size_t)kvh * size, half = (size_t)a->n_kv_heads * size;
	bool mixed = b->k != NULL && b->fp8 != 0xffffffffu;

	for (uint32_t i = 0; i < size; i += 16) {
		/* 8 positions of one pair of dimensions; 8 dimensions of one pair of positions. */
		uint32_t pair = b->fp8 >> (i / (2 * a->hd_pad) * 2) & 3;
		__m256i of = _mm256_set1_epi32((int)((pair & 1) * 0xffffu | (pair >> 1) * 0xffff0000u));

		store_mixed(k + i, e4m3_to_bf16(b->q + head + i), mixed ? b->k + head + i : NULL,
		    lanes_of(b->fp8 >> (i / 16 % 4 * 8)));
		store_mixed(v + i, e4m3_to_bf16(b->q + half + head + i), mixed ? b->v + head + i : NULL, of);
	}
}

INLINE void
mix_scales(const struct k_attention *a, const struct k_kv_block *b, uint32_t kvh, float *ks, float *vs)
{
	const __m256 one = _mm256_set1_ps(1.0f);

	for (uint32_t t = 0; t < 4; t++) {
		__m256 m = _mm256_castsi256_ps(lanes_of(b->fp8 >> (t * 8)));

		_mm256_store_ps(ks + t * 8, _mm256_blendv_ps(one, _mm256_loadu_ps(b->scale + kvh * K_BLOCK + t * 8), m));
		_mm256_store_ps(vs + t * 8,
		    _mm256_blendv_ps(one, _mm256_loadu_ps(b->scale + (a->n_kv_heads + kvh) * K_BLOCK + t * 8), m));
	}
}

INLINE void
halves(const uint16_t *at, __m256 *even, __m256 *odd)
{
	__m256i w = _mm256_loadu_si256((const __m256i *)(const void *)at);

	*even = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
	*odd = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000)));
}

/* Scores of the 32 positions of a page for n heads, into p. */
INLINE void
page_scores(const struct k_attention *a, const struct head_page *page, struct head *head, const uint32_t n)
{
	for (uint32_t t = 0; t < 4; t++) {
		__m256 total[TEAM], even[TEAM], odd[TEAM], e, o;

		UNROLL
		for (uint32_t h = 0; h < n; h++)
			total[h] = _mm256_setzero_ps();
		for (uint32_t d0 = 0; d0 < a->head_dim; d0 += K_BLOCK) {
			UNROLL
			for (uint32_t h = 0; h < n; h++)
				even[h] = odd[h] = _mm256_setzero_ps();
			for (uint32_t d = d0; d < d0 + K_BLOCK && d < a->head_dim; d += 2) {
				halves(page->k + d * K_BLOCK + t * 16, &e, &o);
				UNROLL
				for (uint32_t h = 0; h < n; h++) {
					even[h] = _mm256_fmadd_ps(e, _mm256_broadcast_ss(&head[h].q[d]), even[h]);
					odd[h] = _mm256_fmadd_ps(o, _mm256_broadcast_ss(&head[h].q[d + 1]), odd[h]);
				}
			}
			UNROLL
			for (uint32_t h = 0; h < n; h++)
				total[h] = _mm256_add_ps(total[h], _mm256_add_ps(even[h], odd[h]));
		}
		UNROLL
		for (uint32_t h = 0; h < n; h++) {
			if (page->ks != NULL)
				total[h] = _mm256_mul_ps(total[h], _mm256_load_ps(page->ks + t * 8));
			_mm256_store_ps(head[h].p + t * 8, _mm256_mul_ps(total[h], _mm256_set1_ps(a->scale)));
		}
	}
}

/* Scores in p to probabilities; their maximum and sum. */
INLINE void
page_softmax(const struct head_page *page, struct head *head)
{
	const __m256 low = _mm256_set1_ps(-INFINITY);
	uint32_t slots = (page->hi == 32 ? 0xffffffffu : (1u << page->hi) - 1) & ~((1u << page->lo) - 1);
	__m256 max = low, nan = _mm256_setzero_ps(), valid[4], prob[4];
	__m128 m;

	UNROLL
	for (uint32_t t = 0; t < 4; t++) {
		__m256 s = _mm256_load_ps(head->p + t * 8);

		valid[t] = _mm256_castsi256_ps(lanes_of(slots >> (t * 8)));
		nan = _mm256_or_ps(nan, _mm256_and_ps(valid[t], _mm256_cmp_ps(s, s, _CMP_UNORD_Q)));
		max = _mm256_max_ps(max, _mm256_blendv_ps(low, s, valid[t]));
	}
	m = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
	m = _mm_max_ps(m, _mm_movehl_ps(m, m));
	m = _mm_max_ss(m, _mm_movehdup_ps(m));
	head->block_m = _mm256_movemask_ps(nan) ? NAN : _mm_cvtss_f32(m);
	UNROLL
	for (uint32_t t = 0; t < 4; t++) {
		__m256 s = _mm256_sub_ps(_mm256_load_ps(head->p + t * 8), _mm256_set1_ps(head->block_m));

		prob[t] = _mm256_and_ps(valid[t], rounded_bf16(exp_avx2(s)));
	}
	head->block_l = fold16(_mm256_add_ps(prob[0], prob[2]), _mm256_add_ps(prob[1], prob[3]));
	UNROLL
	for (uint32_t t = 0; t < 4; t++) {
		if (page->vs != NULL)
			prob[t] = _mm256_and_ps(valid[t], rounded_bf16(_mm256_mul_ps(prob[t], _mm256_load_ps(page->vs + t * 8))));
		_mm256_store_ps(head->p + t * 8, prob[t]);
	}
}

/* The block's output for n heads. */
INLINE void
page_output(const struct k_attention *a, const struct head_page *page, struct head *head, const uint32_t n)
{
	for (uint32_t d = 0; d < a->head_dim; d += 8) {
		__m256 even[TEAM], odd[TEAM], e, o;

		UNROLL
		for (uint32_t h = 0; h < n; h++)
			even[h] = odd[h] = _mm256_setzero_ps();
		for (uint32_t j = page->lo & ~1u; j < page->hi; j += 2) {
			halves(page->v + (j / 2 * a->hd_pad + d) * 2, &e, &o);
			/* The even slot of the first pair and the odd one of the last may hold anything. */
			if (j >= page->lo)
				UNROLL
				for (uint32_t h = 0; h < n; h++)
					even[h] = _mm256_fmadd_ps(e, _mm256_broadcast_ss(&head[h].p[j]), even[h]);
			if (j + 1 < page->hi)
				UNROLL
				for (uint32_t h = 0; h < n; h++)
					odd[h] = _mm256_fmadd_ps(o, _mm256_broadcast_ss(&head[h].p[j + 1]), odd[h]);
		}
		UNROLL
		for (uint32_t h = 0; h < n; h++)
			_mm256_store_ps(head[h].block + d, _mm256_add_ps(_mm256_setzero_ps(), _mm256_add_ps(even[h], odd[h])));
	}
}

INLINE float
exp_one(float x)
{
	return _mm256_cvtss_f32(exp_avx2(_mm256_set1_ps(x)));
}

/* Adds a block to what the head has. */
INLINE void
merge(struct head *h, uint32_t hd, bool first)
{
	float to, fa, fb;

	if (first) {
		h->m = h->block_m, h->l = h->block_l;
		memcpy(h->out, h->block, hd * sizeof(*h->out));
		return;
	}
	to = h->block_m > h->m ? h->block_m : h->m;
	fa = exp_one(h->m - to), fb = exp_one(h->block_m - to);
	h->l = fmaf(h->l, fa, h->block_l * fb);
	for (uint32_t d = 0; d < hd; d += 8)
		_mm256_store_ps(h->out + d, _mm256_fmadd_ps(_mm256_load_ps(h->out + d), _mm256_set1_ps(fa),
		    _mm256_mul_ps(_mm256_load_ps(h->block + d), _mm256_set1_ps(fb))));
	h->m = to;
}

INLINE void
attend_page(const struct k_attention *a, const struct head_page *page, struct head *head, const uint32_t n)
{
	page_scores(a, page, head, n);
	for (uint32_t h = 0; h < n; h++)
		page_softmax(page, &head[h]);
	page_output(a, page, head, n);
}

#define ATTEND(n) \
	AVX2 static void attend_##n(const struct k_attention *a, const struct head_page *page, struct head *head) \
	{ \
		attend_page(a, page, head, n); \
	}
ATTEND(1)
ATTEND(2)
ATTEND(3)
ATTEND(4)

/* The outputs, maxima and sums of a block, between heads and parts. */
AVX2 static void
put_part(const struct k_attention *a, uint32_t block, const struct head *head)
{
	uint32_t n = a->head1 - a->head0;
	float *m, *part = k_part_of(a, block, &m);

	for (uint32_t i = 0; i < n; i++) {
		memcpy(part + (size_t)i * a->hd_pad, head[i].block, a->hd_pad * sizeof(*part));
		m[i] = head[i].block_m, m[K_PART_HEADS + i] = head[i].block_l;
	}
}

AVX2 static void
get_part(const struct k_attention *a, uint32_t block, struct head *head)
{
	uint32_t n = a->head1 - a->head0;
	float *m;
	const float *part = k_part_of(a, block, &m);

	for (uint32_t i = 0; i < n; i++) {
		memcpy(head[i].block, part + (size_t)i * a->hd_pad, a->hd_pad * sizeof(*part));
		head[i].block_m = m[i], head[i].block_l = m[K_PART_HEADS + i];
	}
}

AVX2 static void
divide(const struct k_attention *a, uint32_t h0, uint32_t h1, const struct head *head)
{
	uint32_t hd = a->head_dim;

	for (uint32_t h = h0; h < h1; h++)
		for (uint32_t d = 0; d < hd; d += 8)
			_mm256_maskstore_ps(a->out + (size_t)h * hd + d, tail(d, hd),
			    _mm256_div_ps(_mm256_load_ps(head[h - h0].out + d), _mm256_set1_ps(head[h - h0].l)));
}

/* Heads [h0, h1) of one KV head, at most HEADS. */
AVX2 static void
attend_heads(const struct k_attention *a, uint32_t kvh, uint32_t h0, uint32_t h1)
{
	static void (*const attend[TEAM])(const struct k_attention *, const struct head_page *, struct head *) = {
	    attend_1, attend_2, attend_3, attend_4};
	uint32_t hd = a->head_dim, start = k_window_first(a->pos, a->window), first = start / K_BLOCK;
	uint32_t from, end;
	size_t at = (size_t)kvh * a->hd_pad * K_BLOCK;
	_Alignas(32) uint16_t k[256 * K_BLOCK], v[256 * K_BLOCK];
	_Alignas(32) float ks[32], vs[32];
	struct head head[HEADS];

	k_attention_blocks(a, &from, &end);
	for (uint32_t h = h0; h < h1; h++)
		for (uint32_t d = 0; d < hd; d += 8)
			_mm256_store_ps(head[h - h0].q + d,
			    rounded_bf16(_mm256_maskload_ps(a->q + (size_t)h * hd + d, tail(d, hd))));
	for (uint32_t b = from; b < end; b++) {
		const struct k_kv_block *kv = &a->block[b];
		struct head_page page = {k, v, ks, vs, b == first ? start % K_BLOCK : 0,
		    a->pos - b * K_BLOCK + 1 < K_BLOCK ? a->pos - b * K_BLOCK + 1 : K_BLOCK};

		if (kv->fp8 == 0) {
			page.k = kv->k + at, page.v = kv->v + at;
			page.ks = page.vs = NULL;
		} else {
			mix_page(a, kv, kvh, k, v);
			mix_scales(a, kv, kvh, ks, vs);
		}
		for (uint32_t h = 0; h < h1 - h0; h += TEAM)
			attend[(h1 - h0 - h < TEAM ? h1 - h0 - h : TEAM) - 1](a, &page, head + h);
		if (a->parts != NULL)
			put_part(a, b, head);
		for (uint32_t h = 0; a->parts == NULL && h < h1 - h0; h++)
			merge(&head[h], hd, b == first);
	}
	if (a->parts == NULL)
		divide(a, h0, h1, head);
}

AVX2 static void
attention_merge_avx2(const struct k_attention *a)
{
	struct head head[HEADS];

	for (uint32_t b = a->block0; b < a->block1; b++) {
		get_part(a, b, head);
		for (uint32_t h = 0; h < a->head1 - a->head0; h++)
			merge(&head[h], a->head_dim, b == a->block0);
	}
	divide(a, a->head0, a->head1, head);
}

static void
attention_avx2(const struct k_attention *a)
{
	uint32_t group = a->n_heads / a->n_kv_heads;

	for (uint32_t r = 0; r < a->rows; r++) {
		const struct k_attention one = k_attention_row(a, r);

		for (uint32_t h = a->head0, to; h < a->head1; h = to) {
			to = k_heads_end(a, h, HEADS);
			attend_heads(&one, h / group, h, to);
		}
	}
}

/* ---- probes ---- */

AVX2 static void
probe_read_avx2(const void *mem, size_t bytes)
{
	const char *p = mem;
	__m256i s[8] = {0};

	for (size_t i = 0; i < bytes; i += 256) {
		UNROLL
		for (size_t j = 0; j < 8; j++) {
			if (j % 2 == 0)
				_mm_prefetch(p + i + j * 32 + AHEAD, _MM_HINT_T0);
			s[j] = _mm256_add_epi64(s[j], _mm256_loadu_si256((const __m256i *)(const void *)(p + i + j * 32)));
		}
	}
	UNROLL
	for (size_t j = 0; j < 8; j++)
		__asm__ volatile("" ::"x"(s[j]));
}

AVX2 static double
probe_fma_avx2(uint32_t rounds)
{
	const __m256 half = _mm256_set1_ps(0.5f), one = _mm256_set1_ps(1.0f);
	__m256 s[12];

	UNROLL
	for (int j = 0; j < 12; j++)
		s[j] = one;
	for (uint32_t i = 0; i < rounds; i++) {
		UNROLL
		for (int j = 0; j < 12; j++) {
			s[j] = _mm256_fmadd_ps(s[j], half, one);
			__asm__ volatile("" : "+x"(s[j]));
		}
	}
	UNROLL
	for (int j = 0; j < 12; j++)
		__asm__ volatile("" ::"x"(s[j]));
	return 12.0 * 8 * 2 * rounds;
}

void
kernels_fill_avx2(struct k_ops *ops)
{
	ops->linear = linear_avx2;
	ops->act_bf16 = act_bf16_avx2;
	ops->act_fp8 = act_fp8_avx2;
	ops->rmsnorm = rmsnorm_avx2;
	ops->rope = rope_avx2;
	ops->silu_mul = silu_mul_avx2;
	ops->kv_write = kv_write_avx2;
	ops->attention = attention_avx2;
	ops->attention_merge = attention_merge_avx2;
	ops->probe_read = probe_read_avx2;
	ops->probe_fma = probe_fma_avx2;
	ops->divergence = divergence_avx2;
	ops->scan = scan_avx2;
	ops->weights = weights_avx2;
}
