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
#define AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX512

#define FEW 6u           /* rows that run together: their chains fill 24 registers */
#define ROWS 192u        /* rows that share one unpacking into memory; their totals of a panel half fill L1 */
#define GROUP 8u         /* panels that share one expansion of the inputs */
#define CHUNK 8u         /* blocks of it */
#define AHEAD 8192u      /* bytes of prefetch: one core fills DRAM bandwidth only so */
#define AHEAD_PLANES 3072u /* of each of the two */
#define AHEAD_UNPACK 4096u /* for what is unpacked into memory first */

/* ---- linear ---- */

/* E4M3 codes to BF16: four bits up and another bias, that of the eight
 * subnormals by table. The sign comes along by sign extension. */
INLINE __m512i
e4m3_to_bf16(const void *code)
{
	const __m512i bias = _mm512_castsi128_si512(
	    _mm_setr_epi16(0, 0x3af0, 0x3b60, 0x3b90, 0x3bc0, 0x3bd0, 0x3be0, 0x3bf0));
	__m512i c = _mm512_cvtepi8_epi16(_mm256_loadu_si256(code));
	__mmask32 subnormal = _mm512_testn_epi16_mask(c, _mm512_set1_epi16(0x78));

	return _mm512_add_epi16(_mm512_and_si512(_mm512_slli_epi16(c, 4), _mm512_set1_epi16((short)0x87f0)),
	    _mm512_mask_permutexvar_epi16(_mm512_set1_epi16(120 << 7), subnormal, c, bias));
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

/* Where the weights of a block come from. */
enum source { CODES, PLANES, WORDS, OPERANDS, PAGE };

struct block {
	const uint8_t *hi;
	const int8_t *lo;
	const uint16_t *word; /* [1024] unpacked */
	const float *operand; /* [2 tiles][steps][2 chains][16 channels] of words, for many rows */
	size_t pair_ld;       /* PAGE: words between pairs of inputs; the second tile lies 32 behind the first */
	const uint16_t *next; /* PAGE: prefetched beside */
};

/* 32 weights, [16 channels][2 inputs], from i on. */
INLINE __m512i
weights_at(const struct block *b, enum source from, uint32_t i)
{
	if (from == WORDS)
		return _mm512_load_si512(b->word + i);
	if (from == CODES)
		return e4m3_to_bf16(b->hi + i);
	return _mm512_add_epi16(e4m3_to_bf16(b->hi + i),
	    _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)(b->lo + i))));
}

/* Prefetches n lines from line `first` of a plane's block on. Memory likes lines in order: where a kernel reads two tiles
 * at once its reads alone would be four streams of two planes. */
INLINE void
prefetch(const struct block *b, enum source from, uint32_t first, uint32_t n, uint32_t ahead)
{
	for (uint32_t i = first * 64; i < (first + n) * 64 && (from == CODES || from == PLANES); i += 64)
		_mm_prefetch((const char *)b->hi + i + ahead, _MM_HINT_T0);
	for (uint32_t i = first * 64; i < (first + n) * 64 && from == PLANES; i += 64)
		_mm_prefetch((const char *)b->lo + i + ahead, _MM_HINT_T0);
}

INLINE struct block
block_at(const struct k_weight *w, uint32_t block, const uint16_t *word)
{
	return (struct block){w->hi + (size_t)block * 1024, w->lo + (size_t)block * 1024, word, NULL, 0, NULL};
}

static void
patch_block(const struct k_weight *w, uint32_t block, uint16_t out[1024])
{
	uint32_t n, panel = block / (w->k_pad / K_BLOCK);
	const struct k_exception *x = k_find_exceptions(w, block, &n);

	for (uint32_t j = 0; j < n; j++) {
		uint32_t i = x[j].index;

		out[i] = k_exception_value(&x[j], w->scale[panel * K_PANEL + i / 512 * 16 + i / 2 % 16]);
	}
}

/* Weights [from, to) of a block to BF16 in the same order; both are multiples of 64. Exceptions are put in with the last. */
INLINE void
unpack_part(const struct k_weight *w, uint32_t block, enum k_format format, uint32_t from, uint32_t to, uint16_t out[1024])
{
	struct block b = block_at(w, block, NULL);

	if (format == K_FP8T) {
		uint32_t channel = block / (w->k_pad / K_BLOCK) * K_PANEL;
		const __m512i sign = _mm512_set1_epi16((short)0x8000);

		for (uint32_t i = from; i < to; i += 32) {
			__m512i v = weights_at(&b, CODES, i), shift = channel_shift(w, channel + i / 512 * 16);

			prefetch(&b, CODES, i / 64, i % 64 == 0, AHEAD_UNPACK);
			/* magnitude | sign of v */
			_mm512_store_si512(out + i, _mm512_ternarylogic_epi32(shrink(_mm512_andnot_si512(sign, v), shift), v, sign,
			    0xf8));
		}
		return;
	}
	if (format == K_BF16) {
		for (uint32_t i = from; i < to; i += 64) {
			prefetch(&b, PLANES, i / 64, 1, AHEAD_UNPACK);
			_mm512_store_si512(out + i, weights_at(&b, PLANES, i));
			_mm512_store_si512(out + i + 32, weights_at(&b, PLANES, i + 32));
		}
		if (to == 1024 && w->flag[block] & K_HAS_EXCEPTIONS)
			patch_block(w, block, out);
		return;
	}
	for (uint32_t i = from; i < to; i += 64) {
		prefetch(&b, CODES, i / 64, 1, AHEAD_UNPACK);
		_mm512_store_si512(out + i, weights_at(&b, CODES, i));
		_mm512_store_si512(out + i + 32, weights_at(&b, CODES, i + 32));
	}
}

INLINE void
unpack_block(const struct k_weight *w, uint32_t block, enum k_format format, uint16_t out[1024])
{
	unpack_part(w, block, format, 0, 1024, out);
}

typedef float totals[K_PANEL];

/* For two multiplications: a broadcast inside an instruction is one more load, and loads are what is short. */
INLINE __m512
broadcast(const float *x)
{
	__m512 v = _mm512_set1_ps(*x);

	__asm__("" : "+v"(v));
	return v;
}

/* `past`: past the caches, where a line is whole. Many rows of y are more than a cache holds, and to read them first is a
 * third of the traffic. */
INLINE void
write_panel(const struct k_linear *a, uint32_t panel, uint32_t row, uint32_t rows, bool past, const totals *total)
{
	uint32_t first = panel * K_PANEL, n = a->w->n - first < K_PANEL ? a->w->n - first : K_PANEL;
	__mmask32 valid = n == 32 ? 0xffffffffu : (1u << n) - 1;

	for (uint32_t r = 0; r < rows; r++) {
		for (uint32_t t = 0; t < 2; t++) {
			__mmask16 m = (__mmask16)(valid >> (t * 16));
			float *y = a->y + (row + r) * a->ldy + first + t * 16;
			__m512 v = _mm512_load_ps(&total[r][t * 16]);

			if (a->x_scale != NULL)
				v = _mm512_mul_ps(v, _mm512_set1_ps(a->x_scale[row + r]));
			v = _mm512_mul_ps(v, a->format == K_FP8T ? _mm512_set1_ps(a->w->tensor_scale)
			                                         : _mm512_loadu_ps(a->w->scale + first + t * 16));
			if (a->add)
				v = _mm512_add_ps(_mm512_maskz_loadu_ps(m, y), v);
			if (past && m == 0xffff && (uintptr_t)y % 64 == 0)
				_mm512_stream_ps(y, v);
			else
				_mm512_mask_storeu_ps(y, m, v);
		}
	}
}

AVX512 void
avx512_unpack(const struct k_weight *w, uint32_t block, enum k_format format, uint32_t from, uint32_t to, uint16_t out[1024])
{
	unpack_part(w, block, format, from, to, out);
}

AVX512 void
avx512_write_panel(const struct k_linear *a, uint32_t panel, uint32_t row, uint32_t rows, bool past, const totals *total)
{
	write_panel(a, panel, row, rows, past, total);
}

/* FMA: an operand of 32 bits is a float, a step takes one link of each chain. */
#define OF(name) name##_avx512
#define TARGET AVX512
#define STEPS 16u
TARGET static inline __m512
OF(multiply)(__m512 w, __m512 x, __m512 sum)
{
	return _mm512_fmadd_ps(w, x, sum);
}

INLINE void
OF(split)(__m512i pair, __m512i next, __m512 *even, __m512 *odd)
{
	(void)next;
	*even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
	*odd = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE void
OF(expand)(const uint16_t x[K_BLOCK], float *out)
{
	for (uint32_t i = 0; i < K_BLOCK; i += 16)
		_mm512_store_ps(out + i, _mm512_castsi512_ps(_mm512_slli_epi32(
		    _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(x + i))), 16)));
}
#include "kernels/x86/linear512.h"

/*
 * VDPBF16PS adds the product of the high words, then that of the low ones, each rounded as an FMA would. Neighbours in a
 * chain are inputs k and k + 2: with those two in an operand, high and low, a step takes two links of each chain.
 */
#define OF(name) name##_avx512bf16
#define TARGET AVX512BF16
#define STEPS 8u
TARGET static inline __m512
OF(multiply)(__m512 w, __m512 x, __m512 sum)
{
	return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}

INLINE void
OF(split)(__m512i pair, __m512i next, __m512 *even, __m512 *odd)
{
	*even = _mm512_castsi512_ps(_mm512_mask_mov_epi16(_mm512_slli_epi32(pair, 16), 0x55555555u, next));
	*odd = _mm512_castsi512_ps(_mm512_mask_mov_epi16(_mm512_srli_epi32(next, 16), 0xaaaaaaaau, pair));
}

INLINE void
OF(expand)(const uint16_t x[K_BLOCK], float *out)
{
	/* Of four words the third, the first, the fourth, the second. */
	const __m512i order = _mm512_set_epi64(0x001d001f001c001e, 0x0019001b0018001a, 0x0015001700140016, 0x0011001300100012,
	    0x000d000f000c000e, 0x0009000b0008000a, 0x0005000700040006, 0x0001000300000002);

	_mm512_store_ps(out, _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_loadu_si512(x))));
}
#include "kernels/x86/linear512.h"

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

/* To E4M3 codes, in the low bytes of 32-bit lanes. */
INLINE __m512i
e4m3_code(__m512 x)
{
	__m512i r = round_e4m3(x), sign = _mm512_and_si512(_mm512_srli_epi32(r, 8), _mm512_set1_epi32(0x80));
	__m512i mag = _mm512_and_si512(r, _mm512_set1_epi32(0x7fff));
	__m512i code = _mm512_sub_epi32(_mm512_srli_epi32(mag, 4), _mm512_set1_epi32(120 << 3));
	__mmask16 small = _mm512_cmplt_epi32_mask(mag, _mm512_set1_epi32(0x3c80)); /* below 2^-6: multiples of 2^-9 */

	code = _mm512_min_epi32(code, _mm512_set1_epi32(0x7f)); /* NaN */
	code = _mm512_mask_cvtps_epi32(code, small,
	    _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(mag, 16)), _mm512_set1_ps(512.0f)));
	return _mm512_or_si512(code, sign);
}

/* absmax / 448, or 1. Magnitudes compare as integers, and a NaN is above them all. */
INLINE float
absmax_scale(const float *x, uint32_t n)
{
	__m512i max = _mm512_setzero_si512();
	uint32_t bits;
	float s;

	for (uint32_t i = 0; i < n; i += 16)
		max = _mm512_max_epu32(max, absolute(_mm512_maskz_loadu_ps(tail(i, n), x + i)));
	bits = _mm512_reduce_max_epu32(max);
	memcpy(&s, &bits, sizeof(s));
	s = s / 448.0f;
	return s == 0 ? 1.0f : s;
}

AVX512 static void
act_fp8_avx512(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out, float *scale)
{
	const __m512 s = _mm512_set1_ps(*scale = absmax_scale(x, n));

	for (uint32_t i = 0; i < n; i += 16) {
		__mmask16 m = tail(i, n);
		__m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(m, x + i), s);

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

/* x <= EXP_MAX */
INLINE __m512
exp_low(__m512 x)
{
	const __m512 round = _mm512_set1_ps(EXP_ROUND), one = _mm512_set1_ps(1.0f);
	__mmask16 zero = _mm512_cmp_ps_mask(x, _mm512_set1_ps(EXP_MIN), _CMP_LT_OQ);
	__m512 n, r, p;
	__m512i e;

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

INLINE __m512
exp_avx512(__m512 x)
{
	__mmask16 high = _mm512_cmp_ps_mask(x, _mm512_set1_ps(EXP_MAX), _CMP_GT_OQ);

	return exp_low(_mm512_mask_mov_ps(x, high, _mm512_set1_ps(EXP_MAX)));
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

/* ---- KV pages ---- */

/* A head as BF16, or with a scale as E4M3 codes; zeros up to hd_pad. */
INLINE void
encode_head(const float *x, uint32_t head_dim, uint32_t hd_pad, const float *scale, uint16_t *out)
{
	for (uint32_t d = 0; d < hd_pad; d += 16) {
		__mmask16 m = d < head_dim ? tail(d, head_dim) : 0;
		__m512 v = _mm512_maskz_loadu_ps(m, x + d);
		__m512i w = scale == NULL ? round_bf16(v) : e4m3_code(_mm512_div_ps(v, _mm512_set1_ps(*scale)));

		_mm256_store_si256((__m256i *)(void *)(out + d), _mm512_cvtepi32_epi16(_mm512_maskz_mov_epi32(m, w)));
	}
}

/* A neighbour may write the other slot of a pair at the same time: nothing but the slot is stored. */
AVX512 static void
kv_write_avx512(const struct k_kv_block *b, const float *k, const float *v, uint32_t n_kv_heads, uint32_t head_dim,
    uint32_t hd_pad, uint32_t slot)
{
	const __m512i row = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
	    _mm512_set1_epi32(2 * K_BLOCK * sizeof(uint16_t)));
	const uint32_t odd = slot % 2;
	uint32_t size = hd_pad * K_BLOCK;
	bool fp8 = b->fp8 >> slot & 1;
	_Alignas(64) uint16_t word[256];

	for (uint32_t h = 0; h < n_kv_heads; h++, k += head_dim, v += head_dim) {
		uint32_t at = h * size, v_at = at + slot / 2 * hd_pad * 2;
		float *ks = fp8 ? b->scale + h * K_BLOCK + slot : NULL, *vs = fp8 ? ks + n_kv_heads * K_BLOCK : NULL;

		if (fp8)
			*ks = absmax_scale(k, head_dim), *vs = absmax_scale(v, head_dim);
		encode_head(k, head_dim, hd_pad, ks, word);
		for (uint32_t d = 0; d < hd_pad && fp8; d += 2)
			memcpy(b->q + at + d * K_BLOCK + slot * 2, (uint8_t[2]){(uint8_t)word[d], (uint8_t)word[d + 1]}, 2);
		for (uint32_t d = 0; d < hd_pad && !fp8; d += 32)
			_mm512_i32scatter_epi32(b->k + at + d * K_BLOCK + slot * 2, row, _mm512_load_si512(word + d), 1);
		encode_head(v, head_dim, hd_pad, vs, word);
		for (uint32_t d = 0; d < hd_pad; d += 16) {
			__m256i w = _mm256_load_si256((const __m256i *)(const void *)(word + d));

			if (fp8)
				_mm256_mask_storeu_epi8(b->q + n_kv_heads * size + v_at + d * 2, odd ? 0xaaaaaaaau : 0x55555555u,
				    odd ? _mm256_slli_epi16(w, 8) : w);
			else
				_mm512_mask_storeu_epi16(b->v + v_at + d * 2, odd ? 0xaaaaaaaau : 0x55555555u,
				    _mm512_slli_epi32(_mm512_cvtepu16_epi32(w), odd ? 16 : 0));
		}
	}
}

/* ---- attention ---- */

/* One KV head of K as BF16: its FP8 positions beside those that are BF16 already. */
INLINE void
mix_k(const struct k_attention *a, const struct k_kv_block *b, uint32_t kvh, const void *next, uint16_t *k)
{
	uint32_t size = a->hd_pad * K_BLOCK;
	size_t head = (size_t)kvh * size;
	bool mixed = b->k != NULL && b->fp8 != 0xffffffffu;

	for (uint32_t i = 0; i < size; i += 32) { /* 16 positions of one pair of dimensions */
		__m512i q = e4m3_to_bf16(b->q + head + i);

		if (i % 64 == 0)
			_mm_prefetch((const char *)next + i, _MM_HINT_T0);
		if (mixed)
			q = _mm512_mask_mov_epi32(_mm512_loadu_si512(b->k + head + i), (__mmask16)(b->fp8 >> (i / 32 % 2 * 16)), q);
		_mm512_store_si512(k + i, q);
	}
}

INLINE __mmask32
pair_mask(uint32_t slots, uint32_t pair)
{
	return (slots >> (2 * pair) & 1) * 0x55555555u | (slots >> (2 * pair + 1) & 1) * 0xaaaaaaaau;
}

INLINE void
mix_v(const struct k_attention *a, const struct k_kv_block *b, uint32_t kvh, const void *next, uint16_t *v)
{
	uint32_t size = a->hd_pad * K_BLOCK;
	size_t head = (size_t)kvh * size, half = (size_t)a->n_kv_heads * size;
	bool mixed = b->k != NULL && b->fp8 != 0xffffffffu;

	for (uint32_t i = 0; i < size; i += 32) { /* 16 dimensions of one pair of positions */
		__m512i q = e4m3_to_bf16(b->q + half + head + i);

		if (i % 64 == 0)
			_mm_prefetch((const char *)next + i, _MM_HINT_T0);
		if (mixed)
			q = _mm512_mask_mov_epi16(_mm512_loadu_si512(b->v + head + i), pair_mask(b->fp8, i / (2 * a->hd_pad)), q);
		_mm512_store_si512(v + i, q);
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

/* As round_bf16() of a probability, in the high words, 0 in slots that do not count. A NaN comes from values that were
 * rounded before: its low word is 0, it stays NaN. */
INLINE __m512
round_probability(__m512 p, __mmask16 valid)
{
	__m512i u = _mm512_castps_si512(p), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));

	u = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
	return _mm512_castsi512_ps(_mm512_maskz_and_epi32(valid, u, _mm512_set1_epi32((int)0xffff0000)));
}

/* exp(x), x <= 0 */
INLINE __m512
probability(__m512 x, __mmask16 valid)
{
	return round_probability(exp_low(x), valid);
}

INLINE __m512
by_scale(__m512 p, const float *scale, __mmask16 valid)
{
	return round_probability(_mm512_mul_ps(p, _mm512_load_ps(scale)), valid);
}

/* The high words of both. */
INLINE __m512i
high_words(__m512 a, __m512 b)
{
	const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21,
	    19, 17, 15, 13, 11, 9, 7, 5, 3, 1);

	return _mm512_permutex2var_epi16(_mm512_castps_si512(a), odd, _mm512_castps_si512(b));
}

/* Query vectors are (row, head) pairs that share a KV head. */

#define VECTORS 64u      /* at most together */
#define FEWEST 16u       /* that go page by page; fewer take several pages at once */

struct vectors {
	_Alignas(64) float out[VECTORS * 256]; /* [n, hd_pad] so far */
	float m[VECTORS], l[VECTORS];        /* maximum and sum so far; l is 0 before the first block */
	_Alignas(64) float block_m[VECTORS], block_l[VECTORS];
	uint32_t valid[VECTORS];               /* slots of this block that count */
	uint32_t n, hd_pad;
};

/* V of a block with zeros in the slots that do not count; false if what is left is not all finite. */
AVX512 static bool
trim_page(const uint16_t *v, uint32_t hd_pad, uint32_t slots, uint16_t *out)
{
	const __m512i inf = _mm512_set1_epi16(0x7f80);
	__mmask32 bad = 0;

	for (uint32_t j = 0; j < K_BLOCK / 2; j++)
		for (uint32_t i = j * hd_pad * 2, to = i + hd_pad * 2; i < to; i += 32) {
			__m512i w = _mm512_maskz_loadu_epi16(pair_mask(slots, j), v + i);

			bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(w, inf), inf);
			_mm512_store_si512(out + i, w);
		}
	return bad == 0;
}

INLINE __m512
combine(__m512 a, __m512 b, bool sum)
{
	return sum ? _mm512_add_ps(a, b) : _mm512_max_ps(a, b);
}

/* What fold16() or a maximum makes of each of 16 vectors, in their order: each step folds two into one. */
INLINE __m512
fold_all(const __m512 x[16], bool sum)
{
	__m512 q[4], g, h;

	UNROLL
	for (uint32_t j = 0; j < 4; j++) {
		__m512 c = combine(_mm512_shuffle_f32x4(x[j], x[j + 4], 0x44), _mm512_shuffle_f32x4(x[j], x[j + 4], 0xee), sum);
		__m512 d = combine(_mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0x44),
		    _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0xee), sum);

		q[j] = combine(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd), sum);
	}
	g = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(q[0]), _mm512_castps_pd(q[1]))),
	    _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(q[0]), _mm512_castps_pd(q[1]))), sum);
	h = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(q[2]), _mm512_castps_pd(q[3]))),
	    _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(q[2]), _mm512_castps_pd(q[3]))), sum);
	return combine(_mm512_shuffle_ps(g, h, 0x88), _mm512_shuffle_ps(g, h, 0xdd), sum);
}

/* Scales of a vector's K and V, [32] each, 1 in BF16 positions; NULL: all are BF16. */
struct scales {
	const float *k, *v;
};

/* Scales the scores of 16 vectors, -Inf where a slot does not count, and finds their maxima, NaN with any NaN. */
INLINE void
scale_scores(const uint32_t valid[16], float (*score)[32], float scale, const struct scales by[16], float m[16])
{
	const __m512 all = _mm512_set1_ps(scale), low = _mm512_set1_ps(-INFINITY);
	__m512 max[16];
	uint32_t nan = 0;

	for (uint32_t i = 0; i < 16; i++) {
		__m512 v[2];

		UNROLL
		for (uint32_t t = 0; t < 2; t++) {
			v[t] = _mm512_load_ps(score[i] + t * 16);
			if (by[i].k != NULL)
				v[t] = _mm512_mul_ps(v[t], _mm512_load_ps(by[i].k + t * 16));
			v[t] = _mm512_mask_mul_ps(low, (__mmask16)(valid[i] >> (t * 16)), v[t], all);
			_mm512_store_ps(score[i] + t * 16, v[t]);
		}
		nan |= (uint32_t)(_mm512_cmp_ps_mask(v[0], v[1], _CMP_UNORD_Q) != 0) << i;
		max[i] = _mm512_max_ps(v[0], v[1]);
	}
	_mm512_storeu_ps(m, _mm512_mask_mov_ps(fold_all(max, false), (__mmask16)nan, _mm512_set1_ps(NAN)));
}

/* Scores of vectors [at, at + 16), which it scales, to probabilities. */
AVX512 static void
softmax(struct vectors *s, uint32_t at, float (*score)[32], float scale, const struct scales by[16], uint16_t (*p)[32])
{
	const uint32_t *valid = s->valid + at;
	__m512 sum[16];

	scale_scores(valid, score, scale, by, s->block_m + at);
	for (uint32_t j = 0; j < 16; j++) {
		const __m512 m = _mm512_set1_ps(s->block_m[at + j]);
		__m512 v[2];

		UNROLL
		for (uint32_t t = 0; t < 2; t++)
			v[t] = probability(_mm512_sub_ps(_mm512_load_ps(score[j] + t * 16), m), (__mmask16)(valid[j] >> (t * 16)));
		sum[j] = _mm512_add_ps(v[0], v[1]);
		if (by[j].v != NULL) {
			v[0] = by_scale(v[0], by[j].v, (__mmask16)valid[j]);
			v[1] = by_scale(v[1], by[j].v + 16, (__mmask16)(valid[j] >> 16));
		}
		_mm512_store_si512(p[j], high_words(v[0], v[1]));
	}
	_mm512_store_ps(s->block_l + at, fold_all(sum, true));
}

/* Adds the outputs of a block, [n, hd_pad], its maxima, sums and slots, [n] each. */
AVX512 static void
merge(struct vectors *s, const float *block_m, const float *block_l, const uint32_t *valid, const float *block)
{
	for (uint32_t i = 0; i < s->n; i += 16) {
		__mmask16 in = tail(i, s->n);
		__m512 m = _mm512_maskz_loadu_ps(in, s->m + i), bm = _mm512_maskz_loadu_ps(in, block_m + i);
		__m512 l = _mm512_maskz_loadu_ps(in, s->l + i), bl = _mm512_maskz_loadu_ps(in, block_l + i);
		__mmask16 has = _mm512_mask_cmpneq_epi32_mask(in, _mm512_maskz_loadu_epi32(in, valid + i), _mm512_setzero_si512());
		__mmask16 had = has & _mm512_cmp_ps_mask(l, _mm512_setzero_ps(), _CMP_NEQ_UQ);
		__m512 max = _mm512_mask_mov_ps(m, _mm512_cmp_ps_mask(bm, m, _CMP_GT_OQ), bm);
		_Alignas(64) float fa[16], fb[16];

		_mm512_store_ps(fa, exp_avx512(_mm512_sub_ps(m, max)));
		_mm512_store_ps(fb, exp_avx512(_mm512_sub_ps(bm, max)));
		l = _mm512_fmadd_ps(l, _mm512_load_ps(fa), _mm512_mul_ps(bl, _mm512_load_ps(fb)));
		_mm512_mask_storeu_ps(s->m + i, has, _mm512_mask_mov_ps(bm, had, max));
		_mm512_mask_storeu_ps(s->l + i, has, _mm512_mask_mov_ps(bl, had, l));
		for (uint32_t j = 0; j < 16 && i + j < s->n; j++) {
			float *out = s->out + (size_t)(i + j) * s->hd_pad;
			const float *b = block + (size_t)(i + j) * s->hd_pad;

			if (!(has >> j & 1))
				continue;
			if (!(had >> j & 1)) {
				memcpy(out, b, s->hd_pad * sizeof(*out));
				continue;
			}
			for (uint32_t d = 0; d < s->hd_pad; d += 16)
				_mm512_store_ps(out + d, _mm512_fmadd_ps(_mm512_load_ps(out + d), _mm512_set1_ps(fa[j]),
				    _mm512_mul_ps(_mm512_load_ps(b + d), _mm512_set1_ps(fb[j]))));
		}
	}
}

AVX512 static void
divide(const struct vectors *s, uint32_t vector, uint32_t n, float *out)
{
	const float *v = s->out + (size_t)vector * s->hd_pad;

	for (uint32_t d = 0; d < n; d += 16)
		_mm512_mask_storeu_ps(out + d, tail(d, n), _mm512_div_ps(_mm512_load_ps(v + d), _mm512_set1_ps(s->l[vector])));
}

/* BF16 of the heads [h0, h1) of a call's rows, and what the products want of that. */
struct queries {
	_Alignas(64) uint16_t q[VECTORS * 256];
	_Alignas(64) float operands[VECTORS * 256];
};

AVX512 static const void *
prepare(const struct k_attention *a, uint32_t h0, uint32_t h1, const struct k_products *by, struct queries *to)
{
	uint32_t heads = h1 - h0, n = a->rows * heads;

	for (uint32_t i = 0; i < n; i++)
		act_bf16_avx512(a->q + i / heads * a->ld + (size_t)(h0 + i % heads) * a->head_dim, a->head_dim, a->hd_pad,
		    to->q + (size_t)i * a->hd_pad);
	if (by->prepare == NULL)
		return to->q;
	by->prepare(to->q, n, a->hd_pad, to->operands);
	return to->operands;
}

/* ---- few vectors: pages by 16 / vectors, so that softmax takes 16 of these pairs at once ---- */

#define PAGES_AHEAD 2u   /* of K or V, in the order they are read: a burst of prefetches would be dropped */

/* One KV head of K, or of V, of a block, and its scales. */
static const void *
page_of(const struct k_attention *a, const struct k_kv_block *kv, uint32_t kvh, bool v)
{
	size_t size = (size_t)a->hd_pad * K_BLOCK;

	if (kv->fp8 == 0)
		return (v ? kv->v : kv->k) + kvh * size;
	for (uint32_t i = 0; i < K_BLOCK; i += 16)
		_mm_prefetch((const char *)(kv->scale + ((v ? a->n_kv_heads : 0) + kvh) * K_BLOCK + i), _MM_HINT_T0);
	return kv->q + ((v ? a->n_kv_heads : 0) + kvh) * size;
}

/* What is read PAGES_AHEAD after K, or V, of page g of a batch of m from `block` on; at the end that of block `last`. */
static const void *
page_ahead(const struct k_attention *a, uint32_t kvh, uint32_t block, uint32_t last, uint32_t m, uint32_t g, bool v)
{
	uint32_t to = g + PAGES_AHEAD;

	if (to < m)
		return page_of(a, &a->block[block + to], kvh, v);
	if (!v)
		return page_of(a, &a->block[block + (to - m < m ? to - m : m - 1)], kvh, true);
	return page_of(a, &a->block[block + to < last ? block + to : last], kvh, false);
}

/* One row, heads [h0, h1) of one KV head, fewer than FEWEST. */
AVX512 static void
attend_few(const struct k_attention *a, uint32_t h0, uint32_t h1, const struct k_products *by)
{
	uint32_t n = h1 - h0, kvh = h0 / (a->n_heads / a->n_kv_heads), pages = FEWEST / n;
	uint32_t first, end;
	size_t at = (size_t)kvh * a->hd_pad * K_BLOCK;
	_Alignas(64) float score[2 * FEWEST][32], out[FEWEST * 256], ks[FEWEST][32], vs[FEWEST][32];
	_Alignas(64) uint16_t p[FEWEST][32], page[256 * K_BLOCK], trimmed[256 * K_BLOCK];
	struct scales scales[FEWEST] = {{NULL, NULL}};
	struct vectors s;
	struct queries queries;
	const void *q = prepare(a, h0, h1, by, &queries);

	k_attention_blocks(a, &first, &end);
	s.n = n, s.hd_pad = a->hd_pad;
	memset(s.l, 0, sizeof(s.l));
	memset(score, 0, sizeof(score));
	for (uint32_t b = first; b < end; b += pages) {
		uint32_t m = end - b < pages ? end - b : pages;

		memset(s.valid, 0, sizeof(s.valid));
		for (uint32_t g = 0; g < m; g++) {
			const struct k_kv_block *kv = &a->block[b + g];
			const uint16_t *k = kv->fp8 == 0 ? kv->k + at : page;
			const void *next = page_ahead(a, kvh, b, end - 1, m, g, false);

			if (kv->fp8 != 0) {
				mix_k(a, kv, kvh, next, page);
				next = page;
				mix_scales(a, kv, kvh, ks[g], vs[g]);
			}
			by->score(q, n, a->hd_pad, k, next, score + g * n);
			for (uint32_t i = g * n; i < (g + 1) * n; i++) {
				s.valid[i] = k_slots_of(a->pos, a->window, b + g);
				scales[i] = kv->fp8 == 0 ? (struct scales){NULL, NULL} : (struct scales){ks[g], vs[g]};
			}
		}
		softmax(&s, 0, score, a->scale, scales, p);
		for (uint32_t g = 0; g < m; g++) {
			const struct k_kv_block *kv = &a->block[b + g];
			const uint16_t *v = kv->fp8 == 0 ? kv->v + at : page;
			const void *next = page_ahead(a, kvh, b, end - 1, m, g, true);

			if (kv->fp8 != 0) {
				mix_v(a, kv, kvh, next, page);
				next = page;
			}
			if (s.valid[g * n] != 0xffffffffu) {
				trim_page(v, a->hd_pad, s.valid[g * n], trimmed);
				v = trimmed;
			}
			if (a->parts != NULL) {
				float *max, *part = k_part_of(a, b + g, &max);

				by->weigh((const uint16_t (*)[32])p + g * n, n, a->hd_pad, v, next, part);
				memcpy(max, s.block_m + g * n, n * sizeof(*max));
				memcpy(max + K_PART_HEADS, s.block_l + g * n, n * sizeof(*max));
				continue;
			}
			by->weigh((const uint16_t (*)[32])p + g * n, n, a->hd_pad, v, next, out);
			merge(&s, s.block_m + g * n, s.block_l + g * n, s.valid + g * n, out);
		}
	}
	for (uint32_t i = 0; i < n && a->parts == NULL; i++)
		divide(&s, i, a->head_dim, a->out + (size_t)(h0 + i) * a->head_dim);
}

AVX512 static void
attention_merge_avx512(const struct k_attention *a)
{
	static const uint32_t valid[K_PART_HEADS] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
	uint32_t n = a->head1 - a->head0;
	struct vectors s;

	s.n = n, s.hd_pad = a->hd_pad;
	memset(s.l, 0, sizeof(s.l));
	for (uint32_t b = a->block0; b < a->block1; b++) {
		float *max;
		const float *part = k_part_of(a, b, &max);

		merge(&s, max, max + K_PART_HEADS, valid, part);
	}
	for (uint32_t i = 0; i < n; i++)
		divide(&s, i, a->head_dim, a->out + (size_t)(a->head0 + i) * a->head_dim);
}

static void
attend_rows(const struct k_attention *a, const struct k_products *by)
{
	for (uint32_t r = 0; r < a->rows; r++) {
		const struct k_attention one = k_attention_row(a, r);

		for (uint32_t h = a->head0, to; h < a->head1; h = to) {
			to = k_heads_end(a, h, FEWEST - 1);
			attend_few(&one, h, to, by);
		}
	}
}

/* ---- many vectors ---- */

/* All vectors against a page, each stage for all of them, so that one waits for the one before only once. What lies beyond
 * the last vector, to a multiple of 16, is computed too, and not read. */
static void
attend_page(struct vectors *s, const void *q, const uint16_t *k, const uint16_t *v, const struct scales *scales, float scale,
    const struct k_products *by)
{
	_Alignas(64) float score[VECTORS][32], out[VECTORS * 256];
	_Alignas(64) uint16_t p[VECTORS][32];

	for (uint32_t i = s->n; i % 16 != 0; i++)
		memset(score[i], 0, sizeof(score[i]));
	by->score(q, s->n, s->hd_pad, k, k, score);
	for (uint32_t i = 0; i < s->n; i += 16)
		softmax(s, i, score + i, scale, scales, p + i);
	by->weigh((const uint16_t (*)[32])p, s->n, s->hd_pad, v, v, out);
	merge(s, s->block_m, s->block_l, s->valid, out);
}

/* Rows of one call, with heads [h0, h1) of one KV head: VECTORS in all at most. False if a value that does not count for
 * all is not finite: in a product it would. */
AVX512 static bool
attend_vectors(const struct k_attention *a, uint32_t h0, uint32_t h1, const struct k_products *by)
{
	uint32_t heads = h1 - h0, last = a->pos + a->rows - 1, kvh = h0 / (a->n_heads / a->n_kv_heads), any;
	size_t at = (size_t)kvh * a->hd_pad * K_BLOCK;
	_Alignas(64) uint16_t k[256 * K_BLOCK], v[256 * K_BLOCK], trimmed[256 * K_BLOCK];
	_Alignas(64) float ks[32], vs[32];
	struct vectors s;
	struct queries queries;
	const void *q = prepare(a, h0, h1, by, &queries);

	s.n = a->rows * heads, s.hd_pad = a->hd_pad;
	memset(s.l, 0, sizeof(s.l));
	memset(s.valid, 0, sizeof(s.valid));
	for (uint32_t b = k_window_first(a->pos, a->window) / K_BLOCK; b <= last / K_BLOCK; b++) {
		const struct k_kv_block *kv = &a->block[b];
		const uint16_t *pk = kv->fp8 == 0 ? kv->k + at : k, *pv = kv->fp8 == 0 ? kv->v + at : v;
		struct scales scales[16];

		for (uint32_t i = 0; i < 16; i++)
			scales[i] = kv->fp8 == 0 ? (struct scales){NULL, NULL} : (struct scales){ks, vs};
		if (kv->fp8 != 0) {
			mix_k(a, kv, kvh, k, k);
			mix_v(a, kv, kvh, v, v);
			mix_scales(a, kv, kvh, ks, vs);
		}
		if (k_set_valid(a, b, heads, s.n, s.valid, &any) != 0xffffffffu) {
			if (!trim_page(pv, a->hd_pad, any, trimmed))
				return false;
			pv = trimmed;
		}
		attend_page(&s, q, pk, pv, scales, a->scale, by);
	}
	for (uint32_t i = 0; i < s.n; i++)
		divide(&s, i, a->head_dim, a->out + i / heads * a->ld + (size_t)(h0 + i % heads) * a->head_dim);
	return true;
}

bool
avx512_are_many(const struct k_attention *a)
{
	uint32_t group = a->n_heads / a->n_kv_heads, heads = a->head1 - a->head0;

	return a->rows * (group < heads ? group : heads) >= FEWEST;
}

/* Fewer than FEWEST vectors (so always parts), and what products would spoil, by `few`, row by row. */
static void
attend(const struct k_attention *a, const struct k_products *by, const struct k_products *few)
{
	for (uint32_t h = a->head0, to; h < a->head1; h = to) {
		struct k_attention some;

		to = k_heads_end(a, h, VECTORS);
		for (uint32_t r = 0; r < a->rows; r += some.rows) {
			some = k_attention_some(a, r, h, to, VECTORS);
			if (!avx512_are_many(&some) || !attend_vectors(&some, h, to, by))
				attend_rows(&some, few);
		}
	}
}

static const struct k_products fma_products = {prepare_avx512, score_avx512, weigh_avx512};
static const struct k_products dot_products = {prepare_avx512bf16, score_avx512bf16, weigh_avx512bf16};

void
avx512_attend(const struct k_attention *a, const struct k_products *by)
{
	attend(a, by, &fma_products);
}

void
attention_avx512(const struct k_attention *a)
{
	attend(a, &fma_products, &fma_products);
}

static void
attention_avx512bf16(const struct k_attention *a)
{
	attend(a, &dot_products, &dot_products);
}

/* ---- probes ---- */

AVX512 static void
probe_read_avx512(const void *mem, size_t bytes)
{
	const char *p = mem;
	__m512i s[4] = {0};

	for (size_t i = 0; i < bytes; i += 256) {
		UNROLL
		for (size_t j = 0; j < 4; j++) {
			_mm_prefetch(p + i + j * 64 + AHEAD, _MM_HINT_T0);
			s[j] = _mm512_add_epi64(s[j], _mm512_loadu_si512(p + i + j * 64));
		}
	}
	s[0] = _mm512_add_epi64(_mm512_add_epi64(s[0], s[1]), _mm512_add_epi64(s[2], s[3]));
	__asm__ volatile("" ::"v"(s[0]));
}

AVX512BF16 bool
avx512bf16_agrees(void)
{
	__m512 got = _mm512_setzero_ps(), want = got, low[2], high[2];
	_Alignas(64) uint16_t word[2][32];
	uint64_t state = 1;
	bool same = true;

	for (int round = 0; round < 2048; round++) {
		__m512i w, x;

		for (uint32_t i = 0; i < 64; i++)
			word[i / 32][i % 32] = k_some_bf16(&state);
		w = _mm512_load_si512(word[0]), x = _mm512_load_si512(word[1]);
		got = _mm512_dpbf16_ps(got, (__m512bh)w, (__m512bh)x);
		split_avx512(w, w, &low[0], &high[0]);
		split_avx512(x, x, &low[1], &high[1]);
		want = multiply_avx512(low[0], low[1], multiply_avx512(high[0], high[1], want));
		same = same && _mm512_cmpneq_epi32_mask(_mm512_castps_si512(got), _mm512_castps_si512(want)) == 0;
		if (round % 16 == 15)
			got = want = _mm512_setzero_ps();
	}
	return same;
}

static double
ticks_per_operation(double (*probe)(uint32_t))
{
	double best = INFINITY;

	for (int i = 0; i < 8; i++) {
		uint64_t from = __rdtsc();
		double operations = probe(1000), ticks = (double)(__rdtsc() - from);

		best = ticks / operations < best ? ticks / operations : best;
	}
	return best;
}

bool
avx512bf16_pays(void)
{
	return ticks_per_operation(probe_avx512bf16) < 0.8 * ticks_per_operation(probe_avx512);
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
	ops->kv_write = kv_write_avx512;
	ops->attention = attention_avx512;
	ops->attention_merge = attention_merge_avx512;
	ops->probe_read = probe_read_avx512;
	ops->probe_fma = probe_avx512;
	ops->divergence = divergence_avx512;
	ops->scan = scan_avx512;
	ops->weights = weights_avx512;
}

void
kernels_fill_avx512bf16(struct k_ops *ops)
{
	ops->linear = linear_avx512bf16;
	ops->attention = attention_avx512bf16;
	ops->probe_fma = probe_avx512bf16;
}
