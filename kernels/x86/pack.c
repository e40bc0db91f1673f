/* SPDX-License-Identifier: Apache-2.0 */
/* Packing with AVX-512: what nested.c does weight by weight, for those that need integers only. */
#include <immintrin.h>

#include "kernels/internal.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))

AVX512 uint16_t
avx512_absmax(const uint16_t *row, uint32_t n)
{
	const __m512i magnitude = _mm512_set1_epi16(0x7fff);
	__m512i max = _mm512_setzero_si512();
	__m256i m;

	for (uint32_t i = 0; i < n; i += 32) {
		__mmask32 here = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1;

		max = _mm512_max_epu16(max, _mm512_and_si512(_mm512_maskz_loadu_epi16(here, row + i), magnitude));
	}
	m = _mm256_max_epu16(_mm512_castsi512_si256(max), _mm512_extracti64x4_epi64(max, 1));
	/* minpos finds the least */
	m = _mm256_xor_si256(m, _mm256_set1_epi16(-1));
	return (uint16_t)~_mm_extract_epi16(_mm_minpos_epu16(_mm_min_epu16(_mm256_castsi256_si128(m),
	    _mm256_extracti128_si256(m, 1))), 0);
}

/* 16 x 16 of 32 bits, in place: halves of 2, 4, 8 and 16 swap across the diagonal. */
AVX512 static inline __attribute__((always_inline)) void
transpose(__m512i v[16])
{
	const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);

	UNROLL
	for (int s = 1; s < 16; s *= 2) {
		__mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(s));
		__m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - s));
		__m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(s)), upper, lane,
		    _mm512_set1_epi32(16));

		UNROLL
		for (int i = 0; i < 16; i++) {
			__m512i a, b;

			if (i & s)
				continue;
			a = v[i], b = v[i + s];
			v[i] = _mm512_permutex2var_epi32(a, low, b);
			v[i + s] = _mm512_permutex2var_epi32(a, high, b);
		}
	}
}

AVX512 void
avx512_pack_tile(const uint16_t *rows, size_t ld, const int16_t *k, uint8_t *hi, int8_t *lo, uint32_t left[16])
{
	const __m512i one = _mm512_set1_epi16(1), magnitude = _mm512_set1_epi16(0x7fff);
	__m512i v[16], up = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)k));

	up = _mm512_slli_epi16(_mm512_or_si512(_mm512_and_si512(up, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(up, 16)),
	    7);
	UNROLL
	for (int c = 0; c < 16; c++)
		v[c] = _mm512_loadu_si512(rows + (size_t)c * ld);
	transpose(v);
	UNROLL
	for (int p = 0; p < 16; p++) {
		__m512i sign = _mm512_srli_epi16(_mm512_andnot_si512(magnitude, v[p]), 8);
		__m512i mag = _mm512_and_si512(v[p], magnitude), to = _mm512_add_epi16(mag, up), c;
		__mmask32 some = _mm512_test_epi16_mask(mag, mag);
		__mmask32 fast = _mm512_cmpge_epu16_mask(mag, _mm512_set1_epi16(0x80)) &
		    _mm512_cmpge_epi16_mask(to, _mm512_set1_epi16(0x3c80));

		c = _mm512_and_si512(_mm512_srli_epi16(to, 4), one);
		c = _mm512_srli_epi16(_mm512_add_epi16(_mm512_add_epi16(to, _mm512_set1_epi16(7)), c), 4);
		_mm256_storeu_si256((__m256i *)(void *)(hi + p * 32), _mm512_cvtepi16_epi8(_mm512_or_si512(sign,
		    _mm512_maskz_sub_epi16(fast, c, _mm512_set1_epi16(120 << 3)))));
		_mm256_storeu_si256((__m256i *)(void *)(lo + p * 32),
		    _mm512_cvtepi16_epi8(_mm512_maskz_sub_epi16(fast, to, _mm512_slli_epi16(c, 4))));
		left[p] = some & ~fast;
	}
}
