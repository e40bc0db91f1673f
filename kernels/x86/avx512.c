/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AVX-512 (F, BW, VL, DQ). 16 output channels, positions or head dimensions lie
 * across the lanes; a 32-bit lane of a plane's tile holds the even and the odd
 * input of its channel, so shift and mask give the two chains of the sum.
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/internal.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX512

#define ROWS 64u         /* rows that share one unpacking */
#define CHUNK 4u         /* blocks unpacked at a time: 8 KiB */
#define AHEAD 2048u      /* bytes of prefetch: one core fills DRAM bandwidth only so */

/* ---- linear ---- */

/* E4M3 codes, one a word, to BF16 magnitudes: 4 bits up and another bias;
 * the eight subnormals by table. */
INLINE __m512i
magnitude(__m512i code)
{
	const __m512i subnormal = _mm512_castsi128_si512(
	    _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
	__m512i w = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
	__m512i normal = _mm512_add_epi16(_mm512_slli_epi16(w, 4), _mm512_set1_epi16(120 << 7));

	return _mm512_mask_permutexvar_epi16(normal, _mm512_cmplt_epu16_mask(w, _mm512_set1_epi16(8)), w, subnormal);
}

/* BF16 magnitudes of E4M3 values, made smaller by 2^-shift (shift << 7 in each
 * word, less than 2^15) and rounded to E4M3 again. */
INLINE __m512i
shrink(__m512i mag, __m512i shift)
{
	const __m512i grid = _mm512_castsi128_si512(
	    _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
	const __m512i one = _mm512_set1_epi16(1);
	__m512i less = _mm512_subs_epu16(mag, shift), exp = _mm512_srli_epi16(less, 7), n, m, q;
	__mmask32 small = _mm512_cmplt_epu16_mask(less, _mm512_set1_epi16(0x3c80)); /* below 2^-6 */

	/* In units of 2^-9: a significand of 8 bits, shifted right by 125 - exponent. */
	m = _mm512_or_si512(_mm512_and_si512(less, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x80));
	n = _mm512_min_epu16(_mm512_sub_epi16(_mm512_set1_epi16(125), exp), _mm512_set1_epi16(15));
	q = _mm512_add_epi16(m, _mm512_sub_epi16(_mm512_sllv_epi16(one, _mm512_sub_epi16(n, one)), one));
	q = _mm512_add_epi16(q, _mm512_and_si512(_mm512_srlv_epi16(m, n), one));
	q = _mm512_srlv_epi16(q, n);
	m = _mm512_permutexvar_epi16(q, grid);
	m = _mm512_mask_mov_epi16(m, _mm512_cmpeq_epi16_mask(q, _mm512_set1_epi16(8)), _mm512_set1_epi16(0x3c80));
	return _mm512_mask_mov_epi16(less, small, m);
}

/* shift << 7 of 16 channels from `first` on, two words each. */
INLINE __m512i
channel_shift(const struct k_weight *w, uint32_t first)
{
	__m512i t = _mm512_castps_si512(_mm512_set1_ps(w->tensor_scale));
	__m512i s = _mm512_srli_epi32(_mm512_sub_epi32(t, _mm512_castps_si512(_mm512_loadu_ps(w->scale + first))), 16);

	return _mm512_or_si512(s, _mm512_slli_epi32(s, 16));
}

/* One block of 1024 weights to BF16 in the same order. */
INLINE void
unpack_block(const struct k_weight *w, uint32_t block, enum k_format format, uint16_t out[1024])
{
	bool bf16 = format == K_BF16;
	uint32_t first = block / (w->k_pad / K_BLOCK) * K_PANEL;
	__m512i shift[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
	const uint8_t *hi = w->hi + (size_t)block * 1024;
	const int8_t *lo = w->lo + (size_t)block * 1024;

	if (format == K_FP8T)
		shift[0] = channel_shift(w, first), shift[1] = channel_shift(w, first + 16);
	for (uint32_t i = 0; i < 1024; i += 32) {
		__m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)(hi + i)));
		__m512i mag = magnitude(code), sign = _mm512_slli_epi16(code, 8);

		if (i % 64 == 0) {
			_mm_prefetch((const char *)hi + i + AHEAD, _MM_HINT_T0);
			if (bf16)
				_mm_prefetch((const char *)lo + i + AHEAD, _MM_HINT_T0);
		}
		if (bf16)
			mag = _mm512_add_epi16(mag,
			    _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)(lo + i))));
		if (format == K_FP8T)
			mag = shrink(mag, shift[i / 512]);
		/* mag | sign & 0x8000 */
		mag = _mm512_ternarylogic_epi32(mag, sign, _mm512_set1_epi16((short)0x8000), 0xf8);
		_mm512_storeu_si512(out + i, mag);
	}
}

static void
patch_block(const struct k_weight *w, uint32_t panel, uint32_t block, uint16_t out[1024])
{
	uint32_t n;
	const struct k_exception *x = k_find_exceptions(w, block, &n);

	for (uint32_t j = 0; j < n; j++) {
		uint32_t i = x[j].index;

		out[i] = k_exception_value(&x[j], w->scale[panel * K_PANEL + i / 512 * 16 + i / 2 % 16]);
	}
}

/* One block against n rows (1, 2 or 4, known where it is inlined). */
INLINE void
rows_block(const uint16_t weight[1024], const float (*x)[CHUNK * K_BLOCK], uint32_t x_at, float (*total)[K_PANEL],
    const uint32_t n)
{
	const __m512i high = _mm512_set1_epi32((int)0xffff0000);
	__m512 acc[4][2][2];

	for (uint32_t r = 0; r < n; r++)
		for (uint32_t t = 0; t < 2; t++)
			acc[r][t][0] = acc[r][t][1] = _mm512_setzero_ps();
	for (uint32_t p = 0; p < 16; p++) {
		for (uint32_t t = 0; t < 2; t++) {
			__m512i w = _mm512_loadu_si512(weight + t * 512 + p * 32);
			__m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
			__m512 odd = _mm512_castsi512_ps(_mm512_and_si512(w, high));

			for (uint32_t r = 0; r < n; r++) {
				acc[r][t][0] = _mm512_fmadd_ps(even, _mm512_set1_ps(x[r][x_at + 2 * p]), acc[r][t][0]);
				acc[r][t][1] = _mm512_fmadd_ps(odd, _mm512_set1_ps(x[r][x_at + 2 * p + 1]), acc[r][t][1]);
			}
		}
	}
	for (uint32_t r = 0; r < n; r++)
		for (uint32_t t = 0; t < 2; t++)
			_mm512_storeu_ps(&total[r][t * 16], _mm512_add_ps(_mm512_loadu_ps(&total[r][t * 16]),
			    _mm512_add_ps(acc[r][t][0], acc[r][t][1])));
}

INLINE void
expand_inputs(const uint16_t *x, size_t ldx, uint32_t rows, uint32_t n, float (*out)[CHUNK * K_BLOCK])
{
	for (uint32_t r = 0; r < rows; r++)
		for (uint32_t i = 0; i < n; i += 16) {
			__m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(x + r * ldx + i)));

			_mm512_storeu_ps(&out[r][i], _mm512_castsi512_ps(_mm512_slli_epi32(u, 16)));
		}
}

INLINE void
write_panel(const struct k_linear *a, uint32_t panel, uint32_t row, uint32_t rows, float (*total)[K_PANEL])
{
	uint32_t first = panel * K_PANEL, n = a->w->n - first < K_PANEL ? a->w->n - first : K_PANEL;
	__mmask32 valid = n == 32 ? 0xffffffffu : (1u << n) - 1;

	for (uint32_t r = 0; r < rows; r++) {
		for (uint32_t t = 0; t < 2; t++) {
			__mmask16 m = (__mmask16)(valid >> (t * 16));
			float *y = a->y + (row + r) * a->ldy + first + t * 16;
			__m512 v = _mm512_loadu_ps(&total[r][t * 16]);

			if (a->x_scale != NULL)
				v = _mm512_mul_ps(v, _mm512_set1_ps(a->x_scale[row + r]));
			v = _mm512_mul_ps(v, a->format == K_FP8T ? _mm512_set1_ps(a->w->tensor_scale)
			                                         : _mm512_loadu_ps(a->w->scale + first + t * 16));
			if (a->add)
				v = _mm512_add_ps(_mm512_maskz_loadu_ps(m, y), v);
			_mm512_mask_storeu_ps(y, m, v);
		}
	}
}

AVX512 static void
linear_rows(const struct k_linear *a, uint32_t panel, uint32_t row, uint32_t rows)
{
	const struct k_weight *w = a->w;
	uint32_t kb_n = w->k_pad / K_BLOCK;
	bool bf16 = a->format == K_BF16;
	_Alignas(64) uint16_t weight[CHUNK][1024];
	_Alignas(64) float x[ROWS][CHUNK * K_BLOCK];
	_Alignas(64) float total[ROWS][K_PANEL];

	memset(total, 0, rows * sizeof(*total));
	for (uint32_t kb = 0; kb < kb_n; kb += CHUNK) {
		uint32_t n = kb_n - kb < CHUNK ? kb_n - kb : CHUNK, r;

		for (uint32_t b = 0; b < n; b++) {
			uint32_t block = panel * kb_n + kb + b;

			unpack_block(w, block, a->format, weight[b]);
			if (bf16 && w->flag[block])
				patch_block(w, panel, block, weight[b]);
		}
		expand_inputs(a->x + row * a->ldx + kb * K_BLOCK, a->ldx, rows, n * K_BLOCK, x);
		for (r = 0; r + 4 <= rows; r += 4)
			for (uint32_t b = 0; b < n; b++)
				rows_block(weight[b], &x[r], b * K_BLOCK, &total[r], 4);
		for (; r < rows; r++)
			for (uint32_t b = 0; b < n; b++)
				rows_block(weight[b], &x[r], b * K_BLOCK, &total[r], 1);
	}
	write_panel(a, panel, row, rows, total);
}

static void
linear_avx512(const struct k_linear *a)
{
	for (uint32_t panel = a->panel0; panel < a->panel1; panel++)
		for (uint32_t r = 0; r < a->rows; r += ROWS)
			linear_rows(a, panel, r, a->rows - r < ROWS ? a->rows - r : ROWS);
}

/* ---- rows ---- */

INLINE __mmask16
tail(uint32_t i, uint32_t n)
{
	return n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
}

INLINE __m512i
absolute(__m512 x)
{
	return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

/* FP32 to BF16, nearest even, NaN quiet; in the low words of 32-bit lanes. */
INLINE __m512i
round_bf16(__m512 x)
{
	__m512i u = _mm512_castps_si512(x), high = _mm512_srli_epi32(u, 16);
	__m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)),
	    _mm512_and_si512(high, _mm512_set1_epi32(1)));
	__mmask16 nan = _mm512_cmpgt_epi32_mask(absolute(x), _mm512_set1_epi32(0x7f800000));

	return _mm512_mask_or_epi32(_mm512_srli_epi32(r, 16), nan, high, _mm512_set1_epi32(0x40));
}

AVX512 static void
act_bf16_avx512(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out)
{
	for (uint32_t i = 0; i < n; i += 16) {
		__mmask16 m = tail(i, n);

		_mm512_mask_cvtepi32_storeu_epi16(out + i, m, round_bf16(_mm512_maskz_loadu_ps(m, x + i)));
	}
	memset(out + n, 0, (n_pad - n) * sizeof(*out));
}

/* To the E4M3 grid, as BF16 bits. */
INLINE __m512i
round_e4m3(__m512 x)
{
	const __m512 magic = _mm512_set1_ps(24576.0f); /* 1.5 * 2^23 * 2^-9: rounds to multiples of 2^-9 */
	__m512i mag = absolute(x), bit = _mm512_and_si512(_mm512_srli_epi32(mag, 20), _mm512_set1_epi32(1));
	__m512i r = _mm512_add_epi32(_mm512_add_epi32(mag, _mm512_set1_epi32(0x7ffff)), bit);
	__m512 sub = _mm512_sub_ps(_mm512_add_ps(_mm512_castsi512_ps(mag), magic), magic);
	__mmask16 small = _mm512_cmplt_epi32_mask(mag, _mm512_castps_si512(_mm512_set1_ps(0x1p-6f)));
	__mmask16 nan = _mm512_cmpgt_epi32_mask(mag, _mm512_set1_epi32(0x7f800000));

	r = _mm512_and_si512(r, _mm512_set1_epi32((int)0xfff00000));
	r = _mm512_min_epu32(r, _mm512_castps_si512(_mm512_set1_ps(448.0f)));
	r = _mm512_mask_mov_epi32(r, small, _mm512_castps_si512(sub));
	r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc00000));
	/* r | sign of x */
	r = _mm512_ternarylogic_epi32(r, _mm512_castps_si512(x), _mm512_set1_epi32((int)0x80000000), 0xf8);
	return _mm512_srli_epi32(r, 16);
}

AVX512 static void
act_fp8_avx512(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out, float *scale)
{
	__m512i max = _mm512_setzero_si512();
	uint32_t bits;
	float s;

	/* Magnitudes compare as integers, and a NaN is above them all. */
	for (uint32_t i = 0; i < n; i += 16)
		max = _mm512_max_epu32(max, absolute(_mm512_maskz_loadu_ps(tail(i, n), x + i)));
	bits = _mm512_reduce_max_epu32(max);
	memcpy(&s, &bits, sizeof(s));
	s = s / 448.0f;
	*scale = s = s == 0 ? 1.0f : s;
	for (uint32_t i = 0; i < n; i += 16) {
		__mmask16 m = tail(i, n);
		__m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(m, x + i), _mm512_set1_ps(s));

		_mm512_mask_cvtepi32_storeu_epi16(out + i, m, round_e4m3(v));
	}
	memset(out + n, 0, (n_pad - n) * sizeof(*out));
}

INLINE float
fold16(__m512 v)
{
	__m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
	__m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));

	b = _mm_add_ps(b, _mm_movehl_ps(b, b));
	return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

AVX512 static void
rmsnorm_avx512(const float *x, const float *w, uint32_t n, float eps, float *y)
{
	__m512 lane = _mm512_setzero_ps(), r;

	for (uint32_t i = 0; i < n; i += 16) {
		__mmask16 m = tail(i, n);
		__m512 v = _mm512_maskz_loadu_ps(m, x + i);

		lane = _mm512_mask3_fmadd_ps(v, v, lane, m);
	}
	r = _mm512_set1_ps(1.0f / sqrtf(fold16(lane) / (float)n + eps));
	for (uint32_t i = 0; i < n; i += 16) {
		__mmask16 m = tail(i, n);

		_mm512_mask_storeu_ps(y + i, m, _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), r),
		    _mm512_maskz_loadu_ps(m, w + i)));
	}
}

AVX512 static void
rope_avx512(float *x, uint32_t n_heads, uint32_t head_dim, const float *cos, const float *sin)
{
	uint32_t half = head_dim / 2;

	for (uint32_t h = 0; h < n_heads; h++, x += head_dim) {
		for (uint32_t i = 0; i < half; i += 16) {
			__mmask16 m = tail(i, half);
			__m512 c = _mm512_maskz_loadu_ps(m, cos + i), s = _mm512_maskz_loadu_ps(m, sin + i);
			__m512 a = _mm512_maskz_loadu_ps(m, x + i), b = _mm512_maskz_loadu_ps(m, x + half + i);

			_mm512_mask_storeu_ps(x + i, m, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
			_mm512_mask_storeu_ps(x + half + i, m, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
		}
	}
}

INLINE __m512
exp_avx512(__m512 x)
{
	const __m512 round = _mm512_set1_ps(EXP_ROUND), one = _mm512_set1_ps(1.0f);
	__mmask16 zero = _mm512_cmp_ps_mask(x, _mm512_set1_ps(EXP_MIN), _CMP_LT_OQ);
	__mmask16 high = _mm512_cmp_ps_mask(x, _mm512_set1_ps(EXP_MAX), _CMP_GT_OQ);
	__m512 n, r, p;
	__m512i e;

	x = _mm512_mask_mov_ps(x, high, _mm512_set1_ps(EXP_MAX));
	n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(EXP_LOG2E), round), round);
	r = _mm512_fmadd_ps(n, _mm512_set1_ps(-EXP_LN2_LO), _mm512_fmadd_ps(n, _mm512_set1_ps(-EXP_LN2_HI), x));
	p = _mm512_fmadd_ps(_mm512_set1_ps(EXP_C6), r, _mm512_set1_ps(EXP_C5));
	p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C4));
	p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C3));
	p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C2));
	p = _mm512_fmadd_ps(p, r, one);
	p = _mm512_fmadd_ps(p, r, one);
	e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
	return _mm512_maskz_mul_ps((__mmask16)~zero, p, _mm512_castsi512_ps(e));
}

AVX512 static void
silu_mul_avx512(const float *gate, const float *up, uint32_t n, float *y)
{
	const __m512 one = _mm512_set1_ps(1.0f);

	for (uint32_t i = 0; i < n; i += 16) {
		__mmask16 m = tail(i, n);
		__m512 g = _mm512_maskz_loadu_ps(m, gate + i);
		__m512 e = exp_avx512(_mm512_xor_ps(g, _mm512_set1_ps(-0.0f)));

		_mm512_mask_storeu_ps(y + i, m, _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(one, e)),
		    _mm512_maskz_loadu_ps(m, up + i)));
	}
}

/* ---- attention ---- */

/* One KV head of a block as BF16, and the scales of its positions (NULL: all BF16). */
struct head_page {
	const uint16_t *k, *v;
	const float *ks, *vs;   /* [32], 1 in BF16 positions */
};

/* 32 E4M3 codes as BF16. */
INLINE __m512i
e4m3_to_bf16(const uint8_t *q)
{
	__m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)q));

	/* magnitude | sign & 0x8000 */
	return _mm512_ternarylogic_epi32(magnitude(code), _mm512_slli_epi16(code, 8), _mm512_set1_epi16((short)0x8000),
	    0xf8);
}

/* The FP8 positions of a head's K and V as BF16 beside those that are BF16 already. */
INLINE void
mix_page(const struct k_attention *a, const struct k_kv_block *b, uint32_t kvh, uint16_t *k, uint16_t *v)
{
	uint32_t size = a->hd_pad * K_BLOCK;
	size_t head = (size_t)kvh * size, half = (size_t)a->n_kv_heads * size;
	bool mixed = b->k != NULL && b->fp8 != 0xffffffffu;

	for (uint32_t i = 0; i < size; i += 32) {
		__m512i kq = e4m3_to_bf16(b->q + head + i), vq = e4m3_to_bf16(b->q + half + head + i);

		if (mixed) {
			/* 16 positions of one pair of dimensions; 16 dimensions of one pair of positions. */
			__mmask16 at = (__mmask16)(b->fp8 >> (i / 32 % 2 * 16));
			uint32_t pair = b->fp8 >> (i / (2 * a->hd_pad) * 2) & 3;
			__mmask32 of = (pair & 1) * 0x55555555u | (pair >> 1) * 0xaaaaaaaau;

			kq = _mm512_mask_mov_epi32(_mm512_loadu_si512(b->k + head + i), at, kq);
			vq = _mm512_mask_mov_epi16(_mm512_loadu_si512(b->v + head + i), of, vq);
		}
		_mm512_store_si512(k + i, kq);
		_mm512_store_si512(v + i, vq);
	}
}

INLINE void
mix_scales(const struct k_attention *a, const struct k_kv_block *b, uint32_t kvh, float *ks, float *vs)
{
	const __m512 one = _mm512_set1_ps(1.0f);

	for (uint32_t t = 0; t < 2; t++) {
		__mmask16 m = (__mmask16)(b->fp8 >> (t * 16));

		_mm512_store_ps(ks + t * 16, _mm512_mask_loadu_ps(one, m, b->scale + kvh * K_BLOCK + t * 16));
		_mm512_store_ps(vs + t * 16,
		    _mm512_mask_loadu_ps(one, m, b->scale + (a->n_kv_heads + kvh) * K_BLOCK + t * 16));
	}
}

/* Scores of the 32 positions of a page, in two registers. */
INLINE void
page_scores(const struct k_attention *a, const float *q, const struct head_page *page, __m512 score[2])
{
	const __m512i high = _mm512_set1_epi32((int)0xffff0000);

	for (uint32_t t = 0; t < 2; t++) {
		__m512 total = _mm512_setzero_ps();

		for (uint32_t d0 = 0; d0 < a->head_dim; d0 += K_BLOCK) {
			__m512 even = _mm512_setzero_ps(), odd = even;

			for (uint32_t d = d0; d < d0 + K_BLOCK && d < a->head_dim; d += 2) {
				__m512i w = _mm512_loadu_si512(page->k + d * K_BLOCK + t * 32);

				even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_set1_ps(q[d]), even);
				odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, high)), _mm512_set1_ps(q[d + 1]),
				    odd);
			}
			total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
		}
		if (page->ks != NULL)
			total = _mm512_mul_ps(total, _mm512_load_ps(page->ks + t * 16));
		score[t] = _mm512_mul_ps(total, _mm512_set1_ps(a->scale));
	}
}

/* Slots [lo, hi) of a block. */
INLINE void
attend_page(const struct k_attention *a, const float *q, const struct head_page *page, uint32_t lo, uint32_t hi,
    float *max, float *sum, float *out)
{
	const __m512i high = _mm512_set1_epi32((int)0xffff0000);
	const __m512 low = _mm512_set1_ps(-INFINITY);
	uint32_t slots = (hi == 32 ? 0xffffffffu : (1u << hi) - 1) & ~((1u << lo) - 1);
	__mmask16 valid[2] = {(__mmask16)slots, (__mmask16)(slots >> 16)};
	__m512 score[2], prob[2];
	_Alignas(64) float p[32];
	__mmask16 nan;

	page_scores(a, q, page, score);
	nan = (__mmask16)(_mm512_mask_cmp_ps_mask(valid[0], score[0], score[0], _CMP_UNORD_Q) |
	    _mm512_mask_cmp_ps_mask(valid[1], score[1], score[1], _CMP_UNORD_Q));
	*max = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_mask_mov_ps(low, valid[0], score[0]),
	    _mm512_mask_mov_ps(low, valid[1], score[1])));
	if (nan)
		*max = NAN;
	for (uint32_t t = 0; t < 2; t++) {
		__m512 e = exp_avx512(_mm512_sub_ps(score[t], _mm512_set1_ps(*max)));

		prob[t] = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(valid[t], round_bf16(e), 16));
	}
	*sum = fold16(_mm512_add_ps(prob[0], prob[1]));
	for (uint32_t t = 0; t < 2; t++) {
		if (page->vs != NULL)
			prob[t] = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(valid[t],
			    round_bf16(_mm512_mul_ps(prob[t], _mm512_load_ps(page->vs + t * 16))), 16));
		_mm512_store_ps(p + t * 16, prob[t]);
	}
	for (uint32_t d = 0; d < a->head_dim; d += 16) {
		__m512 even = _mm512_setzero_ps(), odd = even;

		for (uint32_t j = lo & ~1u; j < hi; j += 2) {
			__m512i w = _mm512_loadu_si512(page->v + (j / 2 * a->hd_pad + d) * 2);

			/* The even slot of the first pair and the odd one of the last may hold anything. */
			if (j >= lo)
				even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_set1_ps(p[j]), even);
			if (j + 1 < hi)
				odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, high)), _mm512_set1_ps(p[j + 1]),
				    odd);
		}
		_mm512_storeu_ps(out + d, _mm512_add_ps(even, odd));
	}
}

INLINE float
exp_one(float x)
{
	return _mm512_cvtss_f32(exp_avx512(_mm512_set1_ps(x)));
}

AVX512 static void
attend_head(const struct k_attention *a, uint32_t h)
{
	uint32_t kvh = h / (a->n_heads / a->n_kv_heads), hd = a->head_dim, first = a->first / K_BLOCK;
	size_t head = (size_t)kvh * a->hd_pad * K_BLOCK;
	_Alignas(64) float q[256], block[256], out[256], ks[32], vs[32];
	_Alignas(64) uint16_t k[256 * K_BLOCK], v[256 * K_BLOCK];
	float m = 0, l = 0;

	for (uint32_t d = 0; d < hd; d += 16)
		_mm512_store_ps(q + d, _mm512_castsi512_ps(_mm512_slli_epi32(
		    round_bf16(_mm512_maskz_loadu_ps(tail(d, hd), a->q + (size_t)h * hd + d)), 16)));
	for (uint32_t b = first; b <= a->pos / K_BLOCK; b++) {
		const struct k_kv_block *kv = &a->block[b];
		struct head_page page = {k, v, ks, vs};
		uint32_t lo = b == first ? a->first % K_BLOCK : 0;
		uint32_t hi = a->pos - b * K_BLOCK + 1 < K_BLOCK ? a->pos - b * K_BLOCK + 1 : K_BLOCK;
		float bm, bl, to, fa, fb;

		if (kv->fp8 == 0) {
			page = (struct head_page){kv->k + head, kv->v + head, NULL, NULL};
		} else {
			mix_page(a, kv, kvh, k, v);
			mix_scales(a, kv, kvh, ks, vs);
		}
		attend_page(a, q, &page, lo, hi, &bm, &bl, b == first ? out : block);
		if (b == first) {
			m = bm, l = bl;
			continue;
		}
		to = bm > m ? bm : m;
		fa = exp_one(m - to), fb = exp_one(bm - to);
		l = fmaf(l, fa, bl * fb);
		for (uint32_t d = 0; d < hd; d += 16)
			_mm512_store_ps(out + d, _mm512_fmadd_ps(_mm512_load_ps(out + d), _mm512_set1_ps(fa),
			    _mm512_mul_ps(_mm512_load_ps(block + d), _mm512_set1_ps(fb))));
		m = to;
	}
	for (uint32_t d = 0; d < hd; d += 16)
		_mm512_mask_storeu_ps(a->out + (size_t)h * hd + d, tail(d, hd),
		    _mm512_div_ps(_mm512_load_ps(out + d), _mm512_set1_ps(l)));
}

static void
attention_avx512(const struct k_attention *a)
{
	for (uint32_t h = a->head0; h < a->head1; h++)
		attend_head(a, h);
}

void
kernels_fill_avx512(struct k_ops *ops)
{
	ops->linear = linear_avx512;
	ops->act_bf16 = act_bf16_avx512;
	ops->act_fp8 = act_fp8_avx512;
	ops->rmsnorm = rmsnorm_avx512;
	ops->rope = rope_avx512;
	ops->silu_mul = silu_mul_avx512;
	ops->attention = attention_avx512;
}
