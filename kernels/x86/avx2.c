/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AVX2 and FMA. As avx512.c with 8 lanes: a chunk of 32 codes is 16
 * channels and becomes four registers of FP32, even and odd inputs apart.
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/internal.h"

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX2

#define FEW 2u           /* rows that take weights as they are unpacked for others */
#define TEAM 4u          /* that run together */
#define ROWS 192u        /* more rows share one unpacking into memory */
#define GROUP 8u         /* panels that share one expansion of the inputs */
#define CHUNK 4u         /* blocks of it: 128 inputs */
#define DEEP 32u         /* rows whose totals cost more than a chunk unpacked at once */
#define STREAMS 2u       /* panels that a few rows read side by side: one stream does not fill DRAM bandwidth */
#define AHEAD 4096u      /* bytes of prefetch */

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

INLINE __m256i
tail(uint32_t i, uint32_t n)
{
	const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);

	return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - i < 8 ? (int)(n - i) : 8), lane);
}

/* x[i] and what follows of its n, at most eight; zeros for the others. */
INLINE __m256
load_at(const float *x, uint32_t i, uint32_t n)
{
	return n - i >= 8 ? _mm256_loadu_ps(x + i) : _mm256_maskload_ps(x + i, tail(i, n));
}

/* There. On Zen a masked store is dozens of operations. */
INLINE void
store_at(float *x, uint32_t i, uint32_t n, __m256 v)
{
	if (n - i >= 8)
		_mm256_storeu_ps(x + i, v);
	else
		_mm256_maskstore_ps(x + i, tail(i, n), v);
}

/* ---- linear ---- */

/*
 * The 16 channels of a tile lie in two registers: 0..3 and 8..11, and those between. It is the order in which bytes of 16
 * channels become words, and what write_panel() makes an end of.
 */
static inline uint32_t
place_of(uint32_t channel)
{
	return channel / 4 % 2 * 8 + channel / 8 * 4 + channel % 4;
}

INLINE __m256
channels_at(const float *x, uint32_t t)
{
	return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + t * 4)), _mm_loadu_ps(x + 8 + t * 4), 1);
}

/* Exponents of the scales of a tile's channels less that of s, each twice: as the bytes of its weights lie. */
INLINE __m256i
exponents_of(const float *scale, float s)
{
	const __m256i of = _mm256_srli_epi32(_mm256_castps_si256(_mm256_set1_ps(s)), 23);
	__m256i e[2];

	UNROLL
	for (uint32_t t = 0; t < 2; t++)
		e[t] = _mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(channels_at(scale, t)), 23), of);
	e[0] = _mm256_packs_epi32(e[0], e[1]);
	e[0] = _mm256_packs_epi16(e[0], e[0]);
	return _mm256_unpacklo_epi8(e[0], e[0]);
}

enum source { CODES, PLANES, FLOATS, PAGE };

struct block {
	const uint8_t *hi;
	const int8_t *lo;
	const float *spread;  /* [2 tiles][even, odd][16 inputs][16 channels] */
	const uint16_t *word; /* PAGE: [16 input pairs][32 channels][2 inputs], the pairs `ld` apart */
	size_t ld;
	const uint16_t *next; /* prefetched beside */
};

INLINE struct block
block_at(const struct k_weight *w, uint32_t block, const float *spread)
{
	return (struct block){.hi = w->hi + (size_t)block * 1024, .lo = w->lo + (size_t)block * 1024, .spread = spread};
}

/*
 * 32 codes as BF16 words, the even and the odd input of a channel side by side. A code gives four bits to each byte of the
 * word; the subnormals and zero need more, which depends on the magnitude.
 */
INLINE void
words_of(__m256i code, bool small, __m256i word[2])
{
	const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(0x3c, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43,
	    (char)0xbc, (char)0xbd, (char)0xbe, (char)0xbf, (char)0xc0, (char)0xc1, (char)0xc2, (char)0xc3));
	const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, (char)0x80,
	    (char)0x90, (char)0xa0, (char)0xb0, (char)0xc0, (char)0xd0, (char)0xe0, (char)0xf0));
	/* To 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40 and 0x3c60. */
	const __m256i small_high = _mm256_broadcastsi128_si256(_mm_setr_epi8(0x3c, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
	const __m256i small_low = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0x10, (char)0xa0, (char)0xf0, 0x40, 0x70, 0x20,
	    0x10, 0, 0, 0, 0, 0, 0, 0, 0));
	const __m256i nibble = _mm256_set1_epi8(15);
	__m256i h = _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble));
	__m256i l = _mm256_shuffle_epi8(low, _mm256_and_si256(code, nibble));

	if (small) {
		__m256i i = _mm256_min_epu8(_mm256_and_si256(code, _mm256_set1_epi8(0x7f)), _mm256_set1_epi8(8));

		h = _mm256_xor_si256(h, _mm256_shuffle_epi8(small_high, i));
		l = _mm256_xor_si256(l, _mm256_shuffle_epi8(small_low, i));
	}
	word[0] = _mm256_unpacklo_epi8(l, h);
	word[1] = _mm256_unpackhi_epi8(l, h);
}

/* 32 codes and the distances from them. 16 times a normal code and the distance is its word but for sign and bias. */
INLINE void
words_of_planes(__m256i code, __m256i lo, bool small, __m256i word[2])
{
	const __m256i zero = _mm256_setzero_si256(), by = _mm256_set1_epi16(0x1001);
	__m256i high;

	if (small) {
		__m256i sign = _mm256_cmpgt_epi8(zero, lo);

		words_of(code, true, word);
		word[0] = _mm256_add_epi16(word[0], _mm256_unpacklo_epi8(lo, sign));
		word[1] = _mm256_add_epi16(word[1], _mm256_unpackhi_epi8(lo, sign));
		return;
	}
	high = _mm256_blendv_epi8(_mm256_set1_epi8(0x3c), _mm256_set1_epi8((char)0xc4), code);
	word[0] = _mm256_maddubs_epi16(by, _mm256_unpacklo_epi8(lo, code));
	word[1] = _mm256_maddubs_epi16(by, _mm256_unpackhi_epi8(lo, code));
	word[0] = _mm256_add_epi16(word[0], _mm256_unpacklo_epi8(zero, high));
	word[1] = _mm256_add_epi16(word[1], _mm256_unpackhi_epi8(zero, high));
}

INLINE void
fetch_ahead(const struct block *b, enum source from, uint32_t i)
{
	if (i % 64 != 0)
		return;
	_mm_prefetch((const char *)b->hi + i + AHEAD, _MM_HINT_T0);
	if (from == PLANES)
		_mm_prefetch((const char *)b->lo + i + AHEAD, _MM_HINT_T0);
}

/* Words of 32 weights from i on, where they are not FP32 yet. */
INLINE void
words_at(const struct block *b, enum source from, bool small, uint32_t i, __m256i word[2])
{
	if (from == FLOATS)
		return;
	if (from == PAGE) {
		size_t at = i / 32 % 16 * b->ld + i / 512 * 32;

		_mm_prefetch((const char *)(b->next + at), _MM_HINT_T0);
		word[0] = _mm256_loadu_si256((const __m256i *)(const void *)(b->word + at));
		word[1] = _mm256_loadu_si256((const __m256i *)(const void *)(b->word + at + 16));
		return;
	}
	fetch_ahead(b, from, i);
	if (from == PLANES)
		words_of_planes(_mm256_loadu_si256((const __m256i *)(const void *)(b->hi + i)),
		    _mm256_loadu_si256((const __m256i *)(const void *)(b->lo + i)), small, word);
	else
		words_of(_mm256_loadu_si256((const __m256i *)(const void *)(b->hi + i)), small, word);
}

/* The even or the odd inputs of the same, as FP32. */
INLINE void
half_of(const __m256i word[2], bool odd, __m256 out[2])
{
	/* A shuffle, as shifts have one port on Zen. */
	const __m256i up = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, 0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13));

	UNROLL
	for (uint32_t t = 0; t < 2; t++) {
		if (odd)
			out[t] = _mm256_castsi256_ps(_mm256_and_si256(word[t], _mm256_set1_epi32((int)0xffff0000)));
		else
			out[t] = _mm256_castsi256_ps(_mm256_shuffle_epi8(word[t], up));
	}
}

/* Where those of pair j of a tile are in `spread`. */
static inline uint32_t
spread_at(uint32_t tile, bool odd, uint32_t j)
{
	return tile * 512 + odd * 256 + j * 16;
}

INLINE void
inputs_at(const struct block *b, enum source from, uint32_t tile, uint32_t j, const __m256i word[2], bool odd, __m256 out[2])
{
	if (from != FLOATS) {
		half_of(word, odd, out);
		return;
	}
	out[0] = _mm256_load_ps(b->spread + spread_at(tile, odd, j));
	out[1] = _mm256_load_ps(b->spread + spread_at(tile, odd, j) + 8);
}

/* BF16 of a block that has exceptions, to FP32. */
AVX2 static void
spread_block(const struct k_weight *w, uint32_t block, float spread[1024])
{
	const struct block b = block_at(w, block, NULL);
	uint32_t n, panel = block / (w->k_pad / K_BLOCK);
	const struct k_exception *x = k_find_exceptions(w, block, &n);

	for (uint32_t i = 0; i < 1024; i += 32) {
		__m256i word[2];
		__m256 v[2];

		words_at(&b, PLANES, true, i, word);
		UNROLL
		for (uint32_t c = 0; c < 2; c++) {
			float *to = spread + spread_at(i / 512, c, i % 512 / 32);

			half_of(word, c, v);
			_mm256_store_ps(to, v[0]);
			_mm256_store_ps(to + 8, v[1]);
		}
	}
	for (uint32_t j = 0; j < n; j++) {
		uint32_t i = x[j].index, c = i / 2 % 16;

		spread[spread_at(i / 512, i % 2, i % 512 / 32) + place_of(c)] =
		    k_bf16_to_float(k_exception_value(&x[j], w->scale[panel * K_PANEL + i / 512 * 16 + c]));
	}
}

/* 32 codes times 2^-down, nearest even: a normal one that stays so has a smaller exponent, of the others four bits are shifted. */
INLINE __m256i
scale_down(__m256i code, __m256i down, bool *small)
{
	static const uint8_t halves[4][16] = {{0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 8}, {0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4},
	    {0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2}, {0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1}};
	const __m256i sign = _mm256_set1_epi8((char)0x80), one = _mm256_set1_epi8(1), seven = _mm256_set1_epi8(7);
	__m256i mag = _mm256_andnot_si256(sign, code), to = _mm256_subs_epu8(mag, _mm256_slli_epi16(down, 3));

	if (_mm256_movemask_epi8(_mm256_cmpgt_epi8(to, seven)) != -1) {
		/* The exponent, at least 1, in place; the four bits; by how much they are shifted. */
		__m256i exp = _mm256_max_epu8(_mm256_andnot_si256(seven, mag), _mm256_set1_epi8(8));
		__m256i bits = _mm256_add_epi8(_mm256_sub_epi8(mag, exp), _mm256_set1_epi8(8));
		__m256i shift = _mm256_sub_epi8(_mm256_add_epi8(down, one), _mm256_srli_epi16(exp, 3));

		*small = true;
		to = _mm256_and_si256(_mm256_cmpgt_epi8(one, shift), _mm256_sub_epi8(mag, _mm256_slli_epi16(down, 3)));
		UNROLL
		for (int i = 0; i < 4; i++) {
			__m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)halves[i]));

			to = _mm256_or_si256(to, _mm256_and_si256(_mm256_cmpeq_epi8(shift, _mm256_set1_epi8((char)(i + 1))),
			    _mm256_shuffle_epi8(table, bits)));
		}
	}
	return _mm256_or_si256(to, _mm256_and_si256(code, sign));
}

/* The codes of a block by the scale of the tensor, which is that of a channel times a power of two; returns its K_HAS_SMALL. */
AVX2 static uint8_t
tensor_codes(const struct k_weight *w, uint32_t block, uint8_t out[1024])
{
	const float *scale = w->scale + block / (w->k_pad / K_BLOCK) * K_PANEL;
	struct block b = block_at(w, block, NULL);
	uint8_t flags = 0;

	for (uint32_t t = 0; t < 2; t++) {
		__m256i down = _mm256_abs_epi8(exponents_of(scale + t * 16, w->tensor_scale));
		bool small = false;

		down = _mm256_min_epu8(down, _mm256_set1_epi8(31)); /* nothing is left */
#pragma GCC unroll 4
		for (uint32_t i = t * 512, end = i + 512; i < end; i += 32) {
			__m256i code = _mm256_loadu_si256((const __m256i *)(const void *)(b.hi + i));

			fetch_ahead(&b, CODES, i);
			_mm256_store_si256((__m256i *)(void *)(out + i), scale_down(code, down, &small));
		}
		flags |= small ? (uint8_t)(K_HAS_SMALL << t) : 0;
	}
	return flags;
}

typedef float inputs[K_BLOCK];
typedef float totals[K_PANEL];

/*
 * One tile of a block against n rows (known where it is inlined), fewer than TEAM: the even and the odd inputs side by side. The
 * weights go to `spread` too, if that is not NULL.
 */
INLINE void
rows_tile(const struct block *b, enum source from, bool small, uint32_t tile, const inputs *x, totals *total, const uint32_t n,
    float *spread)
{
	__m256 sum[2][TEAM][2];

	UNROLL
	for (uint32_t r = 0; r < n; r++)
		sum[0][r][0] = sum[0][r][1] = sum[1][r][0] = sum[1][r][1] = _mm256_setzero_ps();
#pragma GCC unroll 2
	for (uint32_t j = 0; j < 16; j++) {
		uint32_t i = tile * 512 + j * 32;
		__m256i word[2];
		__m256 w[2];

		words_at(b, from, small, i, word);
		UNROLL
		for (uint32_t c = 0; c < 2; c++) {
			inputs_at(b, from, tile, j, word, c, w);
			if (spread != NULL) {
				_mm256_store_ps(spread + spread_at(tile, c, j), w[0]);
				_mm256_store_ps(spread + spread_at(tile, c, j) + 8, w[1]);
			}
			UNROLL
			for (uint32_t r = 0; r < n; r++) {
				__m256 v = _mm256_broadcast_ss(&x[r][j * 2 + c]);

				sum[c][r][0] = _mm256_fmadd_ps(w[0], v, sum[c][r][0]);
				sum[c][r][1] = _mm256_fmadd_ps(w[1], v, sum[c][r][1]);
			}
		}
	}
	UNROLL
	for (uint32_t r = 0; r < n; r++) {
		UNROLL
		for (uint32_t t = 0; t < 2; t++) {
			float *to = &total[r][tile * 16 + t * 8];

			_mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), _mm256_add_ps(sum[0][r][t], sum[1][r][t])));
		}
	}
}

/* Against more, first the even inputs: the chains of both do not fit into registers, beside unpacking not even those of 3 rows. */
INLINE void
halves_of_tile(const struct block *b, enum source from, bool small, uint32_t tile, const inputs *x, totals *total, const uint32_t n)
{
	_Alignas(32) float even[TEAM][16];
	__m256i word[16][2];

	UNROLL
	for (uint32_t odd = 0; odd < 2; odd++) {
		__m256 sum[TEAM][2];

		UNROLL
		for (uint32_t r = 0; r < n; r++)
			sum[r][0] = sum[r][1] = _mm256_setzero_ps();
#pragma GCC unroll 2
		for (uint32_t j = 0; j < 16; j++) {
			__m256 w[2];

			if (odd == 0)
				words_at(b, from, small, tile * 512 + j * 32, word[j]);
			inputs_at(b, from, tile, j, word[j], odd, w);
			UNROLL
			for (uint32_t r = 0; r < n; r++) {
				__m256 v = _mm256_broadcast_ss(&x[r][j * 2 + odd]);

				sum[r][0] = _mm256_fmadd_ps(w[0], v, sum[r][0]);
				sum[r][1] = _mm256_fmadd_ps(w[1], v, sum[r][1]);
			}
		}
		UNROLL
		for (uint32_t i = 0; i < n * 2; i++) {
			float *to = &total[i / 2][tile * 16 + i % 2 * 8], *first = &even[i / 2][i % 2 * 8];

			if (odd == 0)
				_mm256_store_ps(first, sum[i / 2][i % 2]);
			else
				_mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), _mm256_add_ps(_mm256_load_ps(first), sum[i / 2][i % 2])));
		}
		__asm__ volatile("" ::"r"(even) : "memory"); /* not in registers, which the odd ones need */
	}
}

INLINE void
any_tile(const struct block *b, enum source from, bool small, uint32_t tile, const inputs *x, totals *total, const uint32_t n,
    float *spread)
{
	if (n == TEAM || (from != FLOATS && n > FEW))
		halves_of_tile(b, from, small, tile, x, total, n);
	else
		rows_tile(b, from, small, tile, x, total, n, spread);
}

INLINE void
rows_block(const struct block *b, enum source from, uint8_t flags, const inputs *x, totals *total, const uint32_t n,
    float *spread)
{
	for (uint32_t t = 0; t < 2; t++) {
		if (flags & K_HAS_SMALL << t)
			any_tile(b, from, true, t, x, total, n, spread);
		else
			any_tile(b, from, false, t, x, total, n, spread);
	}
}

INLINE void
team_rows(const struct block *b, enum source from, const inputs *x, totals *total, uint32_t n)
{
	switch (n) {
	case 1: rows_block(b, from, 0, x, total, 1, NULL); break;
	case 2: rows_block(b, from, 0, x, total, 2, NULL); break;
	case 3: rows_block(b, from, 0, x, total, 3, NULL); break;
	case 4: rows_block(b, from, 0, x, total, 4, NULL); break;
	}
}

/* How many of those that are left go next: nobody is left alone. */
static inline uint32_t
next_team(uint32_t left)
{
	return left < TEAM ? left : left == TEAM + 1 ? TEAM - 1 : TEAM;
}

INLINE void
all_rows(const struct block *b, enum source from, const inputs *x, totals *total, uint32_t rows)
{
	for (uint32_t r = 0, n; r < rows; r += n) {
		n = next_team(rows - r);
		team_rows(b, from, x + r, total + r, n);
	}
}

/* A block against n rows as it is unpacked; `keep`: its weights are left in spread. */
INLINE void
unpacked_rows(const struct k_linear *a, uint32_t block, enum source from, const inputs *x, totals *total, const uint32_t n,
    float spread[1024], const bool keep)
{
	_Alignas(32) uint8_t codes[1024];
	struct block b = block_at(a->w, block, spread);
	uint8_t flags = a->w->flag[block];

	if (from == PLANES && flags & K_HAS_EXCEPTIONS) {
		spread_block(a->w, block, spread);
		all_rows(&b, FLOATS, x, total, n);
		return;
	}
	if (a->format == K_FP8T)
		flags = tensor_codes(a->w, block, codes), b.hi = codes;
	rows_block(&b, from, flags, x, total, n, keep ? spread : NULL);
}

/* A row's inputs of a block. */
INLINE void
expand(const uint16_t *x, float *out)
{
	UNROLL
	for (uint32_t i = 0; i < K_BLOCK; i += 8) {
		__m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(x + i)));

		_mm256_store_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(u, 16)));
	}
}

INLINE void
write_panel(const struct k_linear *a, uint32_t panel, uint32_t row, uint32_t rows, const totals *total)
{
	uint32_t first = panel * K_PANEL, n = a->w->n - first < K_PANEL ? a->w->n - first : K_PANEL;

	for (uint32_t r = 0; r < rows; r++) {
		float *y = a->y + (row + r) * a->ldy + first;

		for (uint32_t c = 0; c < n; c += 8) {
			__m256 v = channels_at(&total[r][c / 16 * 16 + c % 16 / 2], 0);

			if (a->x_scale != NULL)
				v = _mm256_mul_ps(v, _mm256_set1_ps(a->x_scale[row + r]));
			v = _mm256_mul_ps(v, a->format == K_FP8T ? _mm256_set1_ps(a->w->tensor_scale)
			                                         : _mm256_loadu_ps(a->w->scale + first + c));
			if (a->add)
				v = _mm256_add_ps(load_at(y, c, n), v);
			store_at(y, c, n, v);
		}
		/* Of a row to come: they lie far apart, and no cache has them. */
		for (uint32_t c = 0; r + 8 < rows && c < n; c += 16)
			_mm_prefetch((const char *)(y + 8 * a->ldy + c), _MM_HINT_T0);
	}
}

/* Up to a team: every weight is read once and used at once. Panels [p0, p1), at most STREAMS, run side by side. */
INLINE void
few_panels(const struct k_linear *a, uint32_t p0, uint32_t p1, const uint32_t n, enum source from)
{
	uint32_t kb_n = a->w->k_pad / K_BLOCK;
	_Alignas(32) float spread[1024];
	_Alignas(32) inputs x[TEAM];
	_Alignas(32) totals total[STREAMS][TEAM] = {{{0}}};

	for (uint32_t kb = 0; kb < kb_n; kb++) {
		for (uint32_t r = 0; r < n; r++)
			expand(a->x + r * a->ldx + kb * K_BLOCK, x[r]);
		for (uint32_t p = p0; p < p1; p++)
			unpacked_rows(a, p * kb_n + kb, from, (const inputs *)x, total[p - p0], n, spread, false);
	}
	for (uint32_t p = p0; p < p1; p++)
		write_panel(a, p, 0, n, (const totals *)total[p - p0]);
}

#define FEW_ROWS(n) \
	AVX2 static void few_##n(const struct k_linear *a, uint32_t p0, uint32_t p1) \
	{ \
		if (a->format == K_BF16) \
			few_panels(a, p0, p1, n, PLANES); \
		else \
			few_panels(a, p0, p1, n, CODES); \
	}
FEW_ROWS(1)
FEW_ROWS(2)
FEW_ROWS(3)
FEW_ROWS(4)

/* Some blocks of a panel, at most CHUNK, for up to ROWS rows, more than FEW; a row's inputs of the next one are ROWS further on. */
AVX2 static void
many_blocks(const struct k_linear *a, uint32_t block, uint32_t blocks, const inputs *x, totals *total, uint32_t rows)
{
	_Alignas(32) float spread[CHUNK][1024];

	for (uint32_t i = 0; i < blocks; i++) {
		if (a->format == K_BF16)
			unpacked_rows(a, block + i, PLANES, x + i * ROWS, total, FEW, spread[i], true);
		else
			unpacked_rows(a, block + i, CODES, x + i * ROWS, total, FEW, spread[i], true);
	}
	for (uint32_t r = FEW, n; r < rows; r += n) {
		n = next_team(rows - r);
		for (uint32_t i = 0; i < blocks; i++) {
			const struct block b = {.spread = spread[i]};

			team_rows(&b, FLOATS, x + i * ROWS + r, total + r, n);
		}
	}
}

/* Panels [p0, p1), at most GROUP, for up to ROWS rows, more than FEW. */
AVX2 static void
many_panels(const struct k_linear *a, uint32_t p0, uint32_t p1, uint32_t row, uint32_t rows)
{
	uint32_t kb_n = a->w->k_pad / K_BLOCK, deep = rows < DEEP ? 1 : CHUNK;
	_Alignas(32) inputs x[CHUNK][ROWS];
	_Alignas(32) totals total[GROUP][ROWS];

	for (uint32_t p = p0; p < p1; p++)
		memset(total[p - p0], 0, rows * sizeof(**total));
	for (uint32_t kb = 0; kb < kb_n; kb += CHUNK) {
		uint32_t n = kb_n - kb < CHUNK ? kb_n - kb : CHUNK;

		for (uint32_t r = 0; r < rows; r++)
			for (uint32_t i = 0; i < n; i++)
				expand(a->x + (row + r) * a->ldx + (kb + i) * K_BLOCK, x[i][r]);
		for (uint32_t p = p0; p < p1; p++)
			for (uint32_t i = 0; i < n; i += deep)
				many_blocks(a, p * kb_n + kb + i, n - i < deep ? n - i : deep, (const inputs *)x[i], total[p - p0], rows);
	}
	for (uint32_t p = p0; p < p1; p++)
		write_panel(a, p, row, rows, (const totals *)total[p - p0]);
}

static void
linear_avx2(const struct k_linear *a)
{
	static void (*const few[TEAM])(const struct k_linear *, uint32_t p0, uint32_t p1) = {few_1, few_2, few_3, few_4};
	uint32_t panels = a->panel1 - a->panel0, most = a->rows <= TEAM ? STREAMS : GROUP, groups = (panels + most - 1) / most;
	uint32_t passes = (a->rows + ROWS - 1) / ROWS;

	if (a->rows == 0)
		return;
	for (uint32_t g = 0; g < groups; g++) {
		uint32_t p0 = a->panel0 + panels * g / groups, p1 = a->panel0 + panels * (g + 1) / groups;

		if (a->rows <= TEAM) {
			few[a->rows - 1](a, p0, p1);
			continue;
		}
		for (uint32_t i = 0; i < passes; i++) {
			uint32_t row = (uint32_t)((uint64_t)a->rows * i / passes);

			many_panels(a, p0, p1, row, (uint32_t)((uint64_t)a->rows * (i + 1) / passes) - row);
		}
	}
}

/* ---- codes of squares ---- */

/*
 * The codes of quotients by s depend on the 7 bits of a master's mantissa, and are the same in each binade. Their thresholds are
 * 8 mantissas and more apart: of eight side by side the first has code `first`, as have `same` behind it, and the rest the next
 * one. Codes count from that of 1/2, for s in [1, 2).
 */
struct steps {
	__m256i first, same;
};

AVX2 static struct steps
steps_of(float s)
{
	const __m256i order = _mm256_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19), one = _mm256_set1_epi32(1);
	__m256i u = _mm256_castps_si256(_mm256_set1_ps(s)), q[4];
	__m256 by;
	_Alignas(32) uint8_t code[128];
	_Alignas(16) uint8_t first[16], same[16];

	by = _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffff)), _mm256_set1_epi32(0x3f800000)));
	for (int i = 0; i < 128; i += 32) {
		UNROLL
		for (int j = 0; j < 4; j++) {
			u = _mm256_slli_epi32(_mm256_add_epi32(order, _mm256_set1_epi32((127 << 7) + i + j * 4)), 16);
			u = _mm256_castps_si256(_mm256_div_ps(_mm256_castsi256_ps(u), by));
			u = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7ffff)), _mm256_and_si256(_mm256_srli_epi32(u, 20), one));
			q[j] = _mm256_sub_epi32(_mm256_srli_epi32(u, 20), _mm256_set1_epi32(126 << 3));
		}
		_mm256_store_si256((__m256i *)(void *)(code + i),
		    _mm256_packus_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])));
	}
	for (int i = 0; i < 16; i++) {
		uint64_t eight;

		memcpy(&eight, code + i * 8, sizeof(eight));
		eight -= code[i * 8] * 0x0101010101010101u; /* a one in each that has the next code */
		first[i] = code[i * 8], same[i] = (uint8_t)(7 - (eight * 0x0101010101010101u >> 56));
	}
	return (struct steps){_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(const void *)first)),
	    _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(const void *)same))};
}

/* 32 weights of a tile from i on, by the division itself. */
AVX2 static void __attribute__((noinline))
codes_by_division(const struct block *b, uint32_t i, const float *scale, float s, uint8_t *out)
{
	const __m256 by = _mm256_set1_ps(s);
	__m256i word[2], pair[2];

	words_at(b, PLANES, true, i, word);
	UNROLL
	for (uint32_t c = 0; c < 2; c++) {
		__m256 v[2];

		half_of(word, c, v);
		UNROLL
		for (uint32_t t = 0; t < 2; t++) {
			__m256i code = e4m3_code(round_e4m3(_mm256_div_ps(_mm256_mul_ps(v[t], channels_at(scale, t)), by)));

			pair[t] = c == 0 ? code : _mm256_or_si256(pair[t], _mm256_slli_epi32(code, 8));
		}
	}
	_mm256_store_si256((__m256i *)(void *)out, _mm256_packus_epi32(pair[0], pair[1]));
}

/*
 * Where the code of the high plane and what becomes of it are normal, twice the code and the upper bits of the distance are the
 * exponent and four bits of the mantissa, which choose the step; the other three say how far it is. Zeros stay zeros. Returns
 * whether all else was normal; *small: whether something was not.
 */
INLINE bool
codes_by_steps(const struct block *b, uint32_t i, const struct steps *steps, __m256i move, uint8_t *out, bool *small)
{
	const __m256i sign = _mm256_set1_epi8((char)0x80), seven = _mm256_set1_epi8(7);
	__m256i h = _mm256_loadu_si256((const __m256i *)(const void *)(b->hi + i));
	__m256i l = _mm256_loadu_si256((const __m256i *)(const void *)(b->lo + i));
	__m256i mag = _mm256_andnot_si256(sign, h), at, code, normal, zero;

	fetch_ahead(b, PLANES, i);
	at = _mm256_and_si256(_mm256_srli_epi16(_mm256_xor_si256(l, sign), 3), _mm256_set1_epi8(31));
	at = _mm256_add_epi8(_mm256_add_epi8(mag, mag), _mm256_sub_epi8(at, _mm256_set1_epi8(16)));
	code = _mm256_and_si256(at, _mm256_set1_epi8(15));
	code = _mm256_sub_epi8(_mm256_shuffle_epi8(steps->first, code),
	    _mm256_cmpgt_epi8(_mm256_and_si256(l, seven), _mm256_shuffle_epi8(steps->same, code)));
	code = _mm256_add_epi8(code, _mm256_and_si256(_mm256_srli_epi16(at, 1), _mm256_set1_epi8(0x78)));
	code = _mm256_xor_si256(_mm256_adds_epi8(_mm256_xor_si256(code, sign), move), sign);
	normal = _mm256_cmpgt_epi8(_mm256_min_epu8(code, mag), seven);
	zero = _mm256_cmpeq_epi8(_mm256_or_si256(mag, l), _mm256_setzero_si256());
	_mm256_store_si256((__m256i *)(void *)out, _mm256_or_si256(_mm256_andnot_si256(zero, code), _mm256_and_si256(h, sign)));
	*small |= _mm256_movemask_epi8(normal) != -1;
	return _mm256_movemask_epi8(_mm256_or_si256(normal, zero)) == -1;
}

AVX2 static void
square_codes_avx2(const struct k_weight *w, uint32_t block, uint32_t n, float s, uint8_t *out, uint8_t *flag)
{
	const float *scale = w->scale + block / (w->k_pad / K_BLOCK) * K_PANEL;
	const struct steps steps = steps_of(s);
	bool steps_do = s >= 0x1p-119f; /* else a subnormal master, which counts as 0, could have a normal code */

	memset(flag, 0, n);
	for (uint32_t t = 0; t < 2; t++, scale += 16) {
		__m256i move = exponents_of(scale, s);

		/* In codes, from that of 1/2 on. Where that is less than a byte holds, all become less than 8 just the same. */
		move = _mm256_max_epi8(_mm256_min_epi8(move, _mm256_set1_epi8(15)), _mm256_set1_epi8(-16));
		move = _mm256_and_si256(_mm256_slli_epi16(move, 3), _mm256_set1_epi8((char)0xf8));
		move = _mm256_adds_epi8(move, _mm256_set1_epi8(-8));
		for (uint32_t j = 0; j < n; j++) {
			struct block b = block_at(w, block + j, NULL);
			bool small = false;

#pragma GCC unroll 4
			for (uint32_t i = t * 512, end = i + 512; i < end; i += 32) {
				uint8_t *to = out + j * 1024 + i;

				if (!codes_by_steps(&b, i, &steps, move, to, &small) || !steps_do)
					codes_by_division(&b, i, scale, s, to), small = true;
			}
			flag[j] |= small ? (uint8_t)(K_HAS_SMALL << t) : 0;
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
		store_words(out + i, n_pad - i, round_bf16(load_at(x, i, n)));
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
		max = _mm256_max_epu32(max, absolute(load_at(x, i, n)));
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
		__m256 v = round_e4m3(_mm256_div_ps(load_at(x, i, n), s));

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
			__m256 v = at < n ? load_at(x, at, n) : _mm256_setzero_ps();

			lane[t] = _mm256_fmadd_ps(v, v, lane[t]);
		}
	}
	r = _mm256_set1_ps(1.0f / sqrtf(fold16(lane[0], lane[1]) / (float)n + eps));
	for (uint32_t i = 0; i < n; i += 8) {
		__m256 v = _mm256_mul_ps(_mm256_mul_ps(load_at(x, i, n), r), load_at(w, i, n));

		store_at(y, i, n, v);
	}
}

AVX2 static void
rope_avx2(float *x, uint32_t n_heads, uint32_t head_dim, const float *cos, const float *sin)
{
	uint32_t half = head_dim / 2;

	for (uint32_t h = 0; h < n_heads; h++, x += head_dim) {
		for (uint32_t i = 0; i < half; i += 8) {
			__m256 c = load_at(cos, i, half), s = load_at(sin, i, half);
			__m256 a = load_at(x, i, half), b = load_at(x + half, i, half);

			store_at(x, i, half, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
			store_at(x + half, i, half, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
		}
	}
}

/* x <= EXP_MAX */
INLINE __m256
exp_low(__m256 x)
{
	const __m256 round = _mm256_set1_ps(EXP_ROUND), one = _mm256_set1_ps(1.0f);
	__m256 zero = _mm256_cmp_ps(x, _mm256_set1_ps(EXP_MIN), _CMP_LT_OQ);
	__m256 n, r, p;
	__m256i e;

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

INLINE __m256
exp_avx2(__m256 x)
{
	__m256 high = _mm256_cmp_ps(x, _mm256_set1_ps(EXP_MAX), _CMP_GT_OQ);

	return exp_low(_mm256_blendv_ps(x, _mm256_set1_ps(EXP_MAX), high));
}

AVX2 static void
silu_mul_avx2(const float *gate, const float *up, uint32_t n, float *y)
{
	const __m256 one = _mm256_set1_ps(1.0f);

	for (uint32_t i = 0; i < n; i += 8) {
		__m256 g = load_at(gate, i, n);
		__m256 e = exp_avx2(_mm256_xor_ps(g, _mm256_set1_ps(-0.0f)));

		store_at(y, i, n, _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(one, e)), load_at(up, i, n)));
	}
}

/* ---- KV pages ---- */

/* A head as BF16, or with a scale as E4M3 codes; zeros up to hd_pad. */
INLINE void
encode_head(const float *x, uint32_t head_dim, uint32_t hd_pad, const float *scale, uint16_t *out)
{
	for (uint32_t d = 0; d < head_dim; d += 8) {
		__m256 v = load_at(x, d, head_dim);

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

/* Query vectors are (row, head) pairs that share a KV head. */

#define VECTORS 32u      /* at most together */
#define HEADS 16u        /* of one row */

/* Vectors lie as [hd_pad / 32][n][32]. */
typedef float vectors[256 / 32 * VECTORS][32];

struct attending {
	_Alignas(32) vectors q, out, block; /* out: so far, block: of this one */
	_Alignas(32) float p[VECTORS][32];  /* scores, then probabilities of the block */
	_Alignas(32) float m[VECTORS], l[VECTORS]; /* maximum and sum so far; l is 0 before the first block */
	_Alignas(32) float block_m[VECTORS], block_l[VECTORS];
	_Alignas(32) uint32_t valid[VECTORS]; /* slots of this block that count */
	uint32_t n, hd_pad;
};

/* One KV head of a block as BF16, what is prefetched beside, and the scales of its positions (NULL: all BF16). */
struct head_page {
	const uint16_t *k, *v, *next_k, *next_v;
	const float *ks, *vs;   /* [32], 1 in BF16 positions */
};

/* 16 words of `to` stay where the mask has ones. */
INLINE void
keep_words(uint16_t *to, const uint16_t *others, __m256i mask)
{
	__m256i *at = (__m256i *)(void *)to;

	_mm256_store_si256(at, _mm256_blendv_epi8(_mm256_loadu_si256((const __m256i *)(const void *)others), _mm256_load_si256(at), mask));
}

/* 32-bit lanes: all ones where a bit of `bits` is set. */
INLINE __m256i
lanes_of(uint32_t bits)
{
	const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);

	return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), bit), bit);
}

/* 32 codes to BF16, in their order. */
INLINE void
e4m3_to_bf16(const uint8_t *code, __m256i out[2])
{
	const __m256i magnitude = _mm256_set1_epi8(0x7f);
	__m256i c = _mm256_loadu_si256((const __m256i *)(const void *)code);
	__m256i small = _mm256_cmpgt_epi8(_mm256_set1_epi8(8), _mm256_and_si256(c, magnitude));

	c = _mm256_permute4x64_epi64(c, 0xd8);
	if (__builtin_expect(_mm256_movemask_epi8(small), 0))
		words_of(c, true, out);
	else
		words_of(c, false, out);
}

/* The same of a head's K, or V. */
INLINE void
words_of_page(const uint8_t *code, const uint8_t *next, uint32_t size, uint16_t *to)
{
	for (uint32_t i = 0; i < size; i += 32) {
		__m256i word[2];

		if (i % 64 == 0)
			_mm_prefetch((const char *)next + i, _MM_HINT_T0);
		e4m3_to_bf16(code + i, word);
		_mm256_store_si256((__m256i *)(void *)(to + i), word[0]);
		_mm256_store_si256((__m256i *)(void *)(to + i + 16), word[1]);
	}
}

/* BF16 words of K and V in place of those of positions that are FP8. */
INLINE void
mix_page(const struct k_kv_block *b, size_t head, uint32_t size, uint32_t hd_pad, uint16_t *k, uint16_t *v)
{
	for (uint32_t i = 0; i < size; i += 16) {
		/* 8 positions of one pair of dimensions; 8 dimensions of one pair of positions. */
		uint32_t pair = b->fp8 >> (i / (2 * hd_pad) * 2) & 3;
		__m256i of = _mm256_set1_epi32((int)((pair & 1) * 0xffffu | (pair >> 1) * 0xffff0000u));

		keep_words(k + i, b->k + head + i, lanes_of(b->fp8 >> (i / 16 % 4 * 8)));
		keep_words(v + i, b->v + head + i, of);
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

/* As round_bf16() of a probability, a float, 0 where it does not count. A NaN comes from values that were rounded before: its
 * low word is 0, it stays NaN. */
INLINE __m256
round_probability(__m256 p, __m256 valid)
{
	__m256i u = _mm256_castps_si256(p), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));

	u = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
	u = _mm256_and_si256(u, _mm256_set1_epi32((int)0xffff0000));
	return _mm256_and_ps(valid, _mm256_castsi256_ps(u));
}

/* Scores p of a vector to probabilities; their maximum and sum. */
INLINE void
page_softmax(const struct head_page *page, uint32_t slots, float p[32], float *maximum, float *sum)
{
	const __m256 low = _mm256_set1_ps(-INFINITY);
	__m256 max = low, nan = _mm256_setzero_ps(), valid[4], prob[4];
	__m128 m;

	UNROLL
	for (uint32_t t = 0; t < 4; t++) {
		__m256 s = _mm256_load_ps(p + t * 8);

		valid[t] = _mm256_castsi256_ps(lanes_of(slots >> (t * 8)));
		prob[t] = _mm256_blendv_ps(low, s, valid[t]);
		nan = _mm256_or_ps(nan, _mm256_cmp_ps(prob[t], prob[t], _CMP_UNORD_Q));
		max = _mm256_max_ps(max, prob[t]);
	}
	m = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
	m = _mm_max_ps(m, _mm_movehl_ps(m, m));
	m = _mm_max_ss(m, _mm_movehdup_ps(m));
	*maximum = _mm256_movemask_ps(nan) ? NAN : _mm_cvtss_f32(m);
	UNROLL
	for (uint32_t t = 0; t < 4; t++)
		prob[t] = round_probability(exp_low(_mm256_sub_ps(prob[t], _mm256_set1_ps(*maximum))), valid[t]);
	*sum = fold16(_mm256_add_ps(prob[0], prob[2]), _mm256_add_ps(prob[1], prob[3]));
	UNROLL
	for (uint32_t t = 0; t < 4; t++) {
		if (page->vs != NULL)
			prob[t] = round_probability(_mm256_mul_ps(prob[t], _mm256_load_ps(page->vs + t * 8)), valid[t]);
		_mm256_store_ps(p + t * 8, prob[t]);
	}
}

/* Adds outputs of a block to what the vectors have: one's lie `each` floats apart, 32 dimensions of it `ld`. */
AVX2 static void
merge(struct attending *s, const float *block, size_t each, size_t ld)
{
	const __m256i none = _mm256_setzero_si256();

	for (uint32_t i = 0; i < s->n; i += 8) {
		__m256 m = _mm256_load_ps(s->m + i), bm = _mm256_load_ps(s->block_m + i);
		__m256 l = _mm256_load_ps(s->l + i), bl = _mm256_load_ps(s->block_l + i);
		__m256 hasnt = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_load_si256((const __m256i *)(const void *)(s->valid + i)),
		    none));
		__m256 had = _mm256_cmp_ps(l, _mm256_setzero_ps(), _CMP_NEQ_UQ);
		__m256 max = _mm256_blendv_ps(m, bm, _mm256_cmp_ps(bm, m, _CMP_GT_OQ));
		__m256 fa = exp_avx2(_mm256_sub_ps(m, max)), fb = exp_avx2(_mm256_sub_ps(bm, max));
		uint32_t has = ~(uint32_t)_mm256_movemask_ps(hasnt), more = (uint32_t)_mm256_movemask_ps(had);
		_Alignas(32) float fas[8], fbs[8];

		max = _mm256_blendv_ps(bm, max, had);
		bl = _mm256_blendv_ps(bl, _mm256_fmadd_ps(l, fa, _mm256_mul_ps(bl, fb)), had);
		_mm256_store_ps(s->m + i, _mm256_blendv_ps(max, m, hasnt));
		_mm256_store_ps(s->l + i, _mm256_blendv_ps(bl, l, hasnt));
		_mm256_store_ps(fas, fa);
		_mm256_store_ps(fbs, fb);
		for (uint32_t j = 0; j < 8 && i + j < s->n; j++) {
			for (uint32_t d = 0; (has >> j & 1) && d < s->hd_pad; d += 8) {
				float *out = &s->out[d / 32 * s->n + i + j][d % 32];
				__m256 v = _mm256_loadu_ps(block + (i + j) * each + d / 32 * ld + d % 32);

				if (more >> j & 1)
					v = _mm256_fmadd_ps(_mm256_load_ps(out), _mm256_set1_ps(fas[j]), _mm256_mul_ps(v, _mm256_set1_ps(fbs[j])));
				_mm256_store_ps(out, v);
			}
		}
	}
}

/* Of a page, the room that its head needs where it has to be made of FP8 first. */
struct page_room {
	_Alignas(32) uint16_t k[256 * K_BLOCK], v[256 * K_BLOCK];
	_Alignas(32) float ks[32], vs[32];
};

INLINE struct head_page
page_at(const struct k_attention *a, uint32_t kvh, uint32_t block, uint32_t end, struct page_room *room)
{
	const struct k_kv_block *b = &a->block[block], *next = block + 1 < end ? b + 1 : b;
	uint32_t size = a->hd_pad * K_BLOCK;
	size_t at = (size_t)kvh * size, v_at = at + (size_t)a->n_kv_heads * size;

	if (b->fp8 == 0) {
		if (next->k == NULL)
			next = b;
		return (struct head_page){b->k + at, b->v + at, next->k + at, next->v + at, NULL, NULL};
	}
	if (next->q == NULL)
		next = b;
	words_of_page(b->q + at, next->q + at, size, room->k);
	words_of_page(b->q + v_at, next->q + v_at, size, room->v);
	if (b->k != NULL && b->fp8 != 0xffffffffu)
		mix_page(b, at, size, a->hd_pad, room->k, room->v);
	mix_scales(a, b, kvh, room->ks, room->vs);
	return (struct head_page){room->k, room->v, room->k, room->v, room->ks, room->vs};
}

/* V with zeros in the slots that do not count; false if what is left is not all finite. */
AVX2 static bool
trim_page(const uint16_t *v, uint32_t hd_pad, uint32_t slots, uint16_t *out)
{
	const __m256i inf = _mm256_set1_epi16(0x7f80);
	__m256i bad = _mm256_setzero_si256();

	for (uint32_t j = 0; j < K_BLOCK / 2; j++, slots >>= 2) {
		__m256i of = _mm256_set1_epi32((int)((slots & 1) * 0xffffu | (slots >> 1 & 1) * 0xffff0000u));

		for (uint32_t i = j * hd_pad * 2, to = i + hd_pad * 2; i < to; i += 16) {
			__m256i w = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(const void *)(v + i)), of);

			bad = _mm256_or_si256(bad, _mm256_cmpeq_epi16(_mm256_and_si256(w, inf), inf));
			_mm256_store_si256((__m256i *)(void *)(out + i), w);
		}
	}
	return _mm256_testz_si256(bad, bad);
}

/* 16 pairs of 32 words, ld words apart, times n vectors, as a linear layer: for a few they are split on the way. */
AVX2 static void
page_rows(const uint16_t *word, size_t ld, const uint16_t *next, const inputs *x, totals *total, uint32_t n)
{
	_Alignas(32) float spread[1024];
	const struct block page = {.word = word, .ld = ld, .next = next}, unpacked = {.spread = spread};

	if (n <= 2 * TEAM) {
		all_rows(&page, PAGE, x, total, n);
		return;
	}
	rows_block(&page, PAGE, 0, x, total, FEW, spread);
	all_rows(&unpacked, FLOATS, x + FEW, total + FEW, n - FEW);
}

/* A page for all vectors. In the slots of V that do not count for one of them there is nothing but finite numbers. */
AVX2 static void
attend_page(const struct k_attention *a, const struct head_page *page, struct attending *s)
{
	memset(s->p, 0, s->n * sizeof(*s->p));
	memset(s->block, 0, s->hd_pad / 32 * s->n * sizeof(*s->block));
	for (uint32_t d = 0; d < s->hd_pad; d += 32)
		page_rows(page->k + d * K_BLOCK, 2 * K_BLOCK, page->next_k + d * K_BLOCK, (const inputs *)s->q[d / 32 * s->n], s->p, s->n);
	for (uint32_t i = 0; i < s->n; i++) {
		for (uint32_t t = 0; t < 32; t += 8) {
			__m256 v = _mm256_load_ps(s->p[i] + t);

			if (page->ks != NULL)
				v = _mm256_mul_ps(v, _mm256_load_ps(page->ks + t));
			_mm256_store_ps(s->p[i] + t, _mm256_mul_ps(v, _mm256_set1_ps(a->scale)));
		}
		page_softmax(page, s->valid[i], s->p[i], &s->block_m[i], &s->block_l[i]);
	}
	for (uint32_t d = 0; d < s->hd_pad; d += 32)
		page_rows(page->v + d * 2, 2 * s->hd_pad, page->next_v + d * 2, (const inputs *)s->p, &s->block[d / 32 * s->n], s->n);
}

/* The outputs, maxima and sums of a block. */
AVX2 static void
put_part(const struct k_attention *a, uint32_t block, const struct attending *s)
{
	float *m, *part = k_part_of(a, block, &m);

	for (uint32_t i = 0; i < s->n; i++)
		for (uint32_t d = 0; d < s->hd_pad; d += 32)
			memcpy(part + i * s->hd_pad + d, s->block[d / 32 * s->n + i], sizeof(*s->block));
	memcpy(m, s->block_m, s->n * sizeof(*m));
	memcpy(m + K_PART_HEADS, s->block_l, s->n * sizeof(*m));
}

/* A block where V of slots that only some rows attend to is not finite, each row by itself: 0 times Inf counts where they do. */
AVX2 static void
attend_apart(const struct k_attention *a, struct head_page *page, uint32_t block, uint32_t heads, const uint16_t *v,
    uint16_t *trimmed, struct attending *s)
{
	page->v = trimmed;
	for (uint32_t r = 0; r < a->rows; r++) {
		uint32_t slots = k_slots_of(a->pos + r, a->window, block);

		for (uint32_t i = 0; i < s->n; i++)
			s->valid[i] = i / heads == r ? slots : 0;
		trim_page(v, s->hd_pad, slots, trimmed);
		attend_page(a, page, s);
		merge(s, s->block[0], 32, s->n * 32);
	}
}

/* A block for all vectors, `heads` of each row. */
AVX2 static void
attend_block(const struct k_attention *a, struct head_page *page, uint32_t block, uint32_t heads, uint16_t *trimmed,
    struct attending *s)
{
	uint32_t any;

	if (k_set_valid(a, block, heads, s->n, s->valid, &any) != 0xffffffffu) {
		const uint16_t *v = page->v;

		if (!trim_page(v, s->hd_pad, any, trimmed) && a->rows > 1) {
			attend_apart(a, page, block, heads, v, trimmed, s);
			return;
		}
		page->v = trimmed;
	}
	attend_page(a, page, s);
	if (a->parts != NULL)
		put_part(a, block, s);
	else
		merge(s, s->block[0], 32, s->n * 32);
}

AVX2 static void
divide(const struct k_attention *a, uint32_t h0, uint32_t heads, const struct attending *s)
{
	for (uint32_t i = 0; i < s->n; i++) {
		float *out = a->out + i / heads * a->ld + (size_t)(h0 + i % heads) * a->head_dim;

		for (uint32_t d = 0; d < a->head_dim; d += 8)
			store_at(out, d, a->head_dim,
			    _mm256_div_ps(_mm256_load_ps(&s->out[d / 32 * s->n + i][d % 32]), _mm256_set1_ps(s->l[i])));
	}
}

/* Heads of one KV head, all rows, at most VECTORS of both. */
AVX2 static void
attend(const struct k_attention *a)
{
	const struct k_attention last = k_attention_row(a, a->rows - 1);
	uint32_t h0 = a->head0, heads = a->head1 - h0, kvh = h0 / (a->n_heads / a->n_kv_heads), from, end, ignored;
	_Alignas(32) uint16_t trimmed[256 * K_BLOCK];
	struct attending s;
	struct page_room room;

	s.n = a->rows * heads, s.hd_pad = a->hd_pad;
	memset(s.l, 0, sizeof(s.l));
	for (uint32_t i = 0; i < s.n; i++) {
		const float *q = a->q + i / heads * a->ld + (size_t)(h0 + i % heads) * a->head_dim;

		for (uint32_t d = 0; d < s.hd_pad; d += 8)
			_mm256_store_ps(&s.q[d / 32 * s.n + i][d % 32], d < a->head_dim ?
			    rounded_bf16(load_at(q, d, a->head_dim)) : _mm256_setzero_ps());
	}
	k_attention_blocks(&last, &ignored, &end);
	k_attention_blocks(a, &from, &ignored);
	for (uint32_t b = from; b < end; b++) {
		struct head_page page = page_at(a, kvh, b, end, &room);

		attend_block(a, &page, b, heads, trimmed, &s);
	}
	if (a->parts == NULL)
		divide(a, h0, heads, &s);
}

AVX2 static void
attention_merge_avx2(const struct k_attention *a)
{
	struct attending s;

	s.n = a->head1 - a->head0, s.hd_pad = a->hd_pad;
	memset(s.l, 0, sizeof(s.l));
	memset(s.valid, 0xff, sizeof(s.valid));
	for (uint32_t b = a->block0; b < a->block1; b++) {
		float *m;
		const float *part = k_part_of(a, b, &m);

		memcpy(s.block_m, m, s.n * sizeof(*m));
		memcpy(s.block_l, m + K_PART_HEADS, s.n * sizeof(*m));
		merge(&s, part, a->hd_pad, 32);
	}
	divide(a, a->head0, s.n, &s);
}

static void
attention_avx2(const struct k_attention *a)
{
	for (uint32_t h = a->head0, to; h < a->head1; h = to) {
		struct k_attention some;

		to = k_heads_end(a, h, HEADS);
		for (uint32_t r = 0; r < a->rows; r += some.rows) {
			some = k_attention_some(a, r, h, to, VECTORS);
			attend(&some);
		}
	}
}

/* ---- probes ---- */

AVX2 static void
probe_read_avx2(const void *mem, size_t bytes)
{
	const size_t part = bytes / 4; /* four streams are the fastest */
	__m256i s[8] = {0};

	for (size_t i = 0; i < bytes; i += 256) {
		const char *p = (const char *)mem + i / 256 % 4 * part + i / 1024 * 256;

		UNROLL
		for (size_t j = 0; j < 8; j++) {
			if (j % 2 == 0)
				_mm_prefetch(p + j * 32 + 2048, _MM_HINT_T0);
			s[j] = _mm256_add_epi64(s[j], _mm256_loadu_si256((const __m256i *)(const void *)(p + j * 32)));
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
	ops->square_codes = square_codes_avx2;
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
