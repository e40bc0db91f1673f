/* SPDX-License-Identifier: Apache-2.0 */
/* Packing with vectors: what nested.c does weight by weight, for those that need integers only. */
#include <immintrin.h>
#include <string.h>

#include "kernels/internal.h"

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))

/* The largest of 16 words: minpos finds the least. */
AVX2 static inline uint16_t
largest(__m256i v)
{
	v = _mm256_xor_si256(v, _mm256_set1_epi16(-1));
	return (uint16_t)~_mm_extract_epi16(_mm_minpos_epu16(_mm_min_epu16(_mm256_castsi256_si128(v),
	    _mm256_extracti128_si256(v, 1))), 0);
}

AVX2 static uint16_t
avx2_absmax(const uint16_t *row, uint32_t n)
{
	const __m256i magnitude = _mm256_set1_epi16(0x7fff);
	__m256i max = _mm256_setzero_si256();
	uint16_t last[16] = {0};
	uint32_t i = 0;

	for (; n - i >= 16; i += 16)
		max = _mm256_max_epu16(max, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(const void *)(row + i)), magnitude));
	if (i < n) {
		memcpy(last, row + i, (n - i) * sizeof(*last));
		max = _mm256_max_epu16(max, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(const void *)last), magnitude));
	}
	return largest(max);
}

/* Four pairs of inputs of 16 channels: v[pair][0] has channels 0..3 and 8..11, v[pair][1] those between, so that packing
 * both into bytes puts them in order. */
AVX2 static inline __attribute__((always_inline)) void
four_pairs(const uint16_t *rows, size_t ld, __m256i v[4][2])
{
	UNROLL
	for (int t = 0; t < 2; t++) {
		__m256i r[4], low[2], high[2];

		UNROLL
		for (int c = 0; c < 4; c++) {
			const uint16_t *row = rows + (size_t)(t * 4 + c) * ld;

			r[c] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)row)),
			    _mm_loadu_si128((const __m128i *)(const void *)(row + 8 * ld)), 1);
		}
		low[0] = _mm256_unpacklo_epi32(r[0], r[1]), low[1] = _mm256_unpacklo_epi32(r[2], r[3]);
		high[0] = _mm256_unpackhi_epi32(r[0], r[1]), high[1] = _mm256_unpackhi_epi32(r[2], r[3]);
		v[0][t] = _mm256_unpacklo_epi64(low[0], low[1]), v[1][t] = _mm256_unpackhi_epi64(low[0], low[1]);
		v[2][t] = _mm256_unpacklo_epi64(high[0], high[1]), v[3][t] = _mm256_unpackhi_epi64(high[0], high[1]);
	}
}

AVX2 static void
avx2_pack_tile(const uint16_t *rows, size_t ld, const int16_t *k, uint8_t *hi, int8_t *lo, uint32_t left[16])
{
	const __m256i magnitude = _mm256_set1_epi16(0x7fff), one = _mm256_set1_epi16(1), seven = _mm256_set1_epi16(7);
	__m256i all = _mm256_slli_epi16(_mm256_loadu_si256((const __m256i *)(const void *)k), 7);
	__m256i up[2] = {_mm256_unpacklo_epi16(all, all), _mm256_unpackhi_epi16(all, all)};

	for (int p = 0; p < 16; p += 4) {
		__m256i v[4][2];

		four_pairs(rows + p * 2, ld, v);
		UNROLL
		for (int i = 0; i < 4; i++) {
			__m256i code[2], rest[2], slow[2];

			UNROLL
			for (int t = 0; t < 2; t++) {
				__m256i mag = _mm256_and_si256(v[i][t], magnitude), to = _mm256_add_epi16(mag, up[t]), c;
				__m256i fast = _mm256_and_si256(_mm256_cmpgt_epi16(mag, _mm256_set1_epi16(0x7f)),
				    _mm256_cmpgt_epi16(to, _mm256_set1_epi16(0x3c7f)));

				c = _mm256_add_epi16(_mm256_add_epi16(to, seven), _mm256_and_si256(_mm256_srli_epi16(to, 4), one));
				c = _mm256_srli_epi16(c, 4);
				rest[t] = _mm256_and_si256(_mm256_sub_epi16(to, _mm256_slli_epi16(c, 4)), fast);
				c = _mm256_and_si256(_mm256_sub_epi16(c, _mm256_set1_epi16(120 << 3)), fast);
				code[t] = _mm256_or_si256(c, _mm256_srli_epi16(_mm256_andnot_si256(magnitude, v[i][t]), 8));
				slow[t] = _mm256_andnot_si256(fast, _mm256_cmpgt_epi16(mag, _mm256_setzero_si256()));
			}
			_mm256_storeu_si256((__m256i *)(void *)(hi + (p + i) * 32), _mm256_packus_epi16(code[0], code[1]));
			_mm256_storeu_si256((__m256i *)(void *)(lo + (p + i) * 32), _mm256_packs_epi16(rest[0], rest[1]));
			left[p + i] = (uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16(slow[0], slow[1]));
		}
	}
}

AVX512 static uint16_t
avx512_absmax(const uint16_t *row, uint32_t n)
{
	const __m512i magnitude = _mm512_set1_epi16(0x7fff);
	__m512i max = _mm512_setzero_si512();

	for (uint32_t i = 0; i < n; i += 32) {
		__mmask32 here = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1;

		max = _mm512_max_epu16(max, _mm512_and_si512(_mm512_maskz_loadu_epi16(here, row + i), magnitude));
	}
	return largest(_mm256_max_epu16(_mm512_castsi512_si256(max), _mm512_extracti64x4_epi64(max, 1)));
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

AVX512 static void
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

const struct k_packer *
kernels_packer(void)
{
	static const struct k_packer avx2 = {avx2_absmax, avx2_pack_tile}, avx512 = {avx512_absmax, avx512_pack_tile};

	return kernels_have_avx512() ? &avx512 : __builtin_cpu_supports("avx2") ? &avx2 : NULL;
}
