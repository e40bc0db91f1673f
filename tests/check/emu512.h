/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_TESTS_EMU512_H
#define OCTET_TESTS_EMU512_H
/*
 * AVX-512 for machines that have none: included before all else where checkkernels-emu and test_kernels-emu compile the
 * levels' sources. SIMD Everywhere has most of the intrinsics; here is what it lacks, and what it is laxer about than the
 * machine: alignment, what a mask leaves in memory, the order of VDPBF16PS.
 */
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "kernels/internal.h"

#pragma GCC system_header /* newer versions of it have what is defined below, and some are macros: no warning of that */

typedef int16_t emu_i16x16 __attribute__((vector_size(32)));
typedef uint16_t emu_u16x16 __attribute__((vector_size(32)));
typedef int16_t emu_i16x32 __attribute__((vector_size(64)));
typedef int32_t emu_i32x16 __attribute__((vector_size(64)));

union emu {
	__m512i i;
	__m512 f;
	__m256i i256[2];
	__m256 f256[2];
	__m128 f128[4];
	uint32_t u32[16];
	uint16_t u16[32];
};

/* ---- memory ---- */

static inline void *
emu_aligned(const void *p)
{
	if ((uintptr_t)p % 64 != 0)
		__builtin_trap();
	return (void *)(uintptr_t)p;
}

static inline __m512
emu_load_ps(__mmask16 m, const void *p)
{
	union emu k = {.i = _mm512_movm_epi32(m)};

	for (int h = 0; h < 2; h++)
		k.f256[h] = _mm256_maskload_ps((const float *)p + 8 * h, k.i256[h]);
	return k.f;
}

static inline void
emu_store_ps(void *p, __mmask16 m, __m512 v)
{
	union emu k = {.i = _mm512_movm_epi32(m)}, of = {.f = v};

	for (int h = 0; h < 2; h++)
		_mm256_maskstore_ps((float *)p + 8 * h, k.i256[h], of.f256[h]);
}

static inline __m512i
emu_load_epi16(__mmask32 m, const void *p)
{
	union emu v = {.i = _mm512_setzero_si512()};

	for (size_t j = 0; j < 32; j++)
		if (m >> j & 1)
			memcpy(&v.u16[j], (const char *)p + 2 * j, 2);
	return v.i;
}

/* `size` bytes of each of n elements, which lie `from` apart. */
static inline void
emu_store(void *p, uint32_t m, const void *v, size_t n, size_t size, size_t from)
{
	for (size_t j = 0; j < n; j++)
		if (m >> j & 1)
			memcpy((char *)p + size * j, (const char *)v + from * j, size);
}

static inline void
emu_scatter(void *p, __m512i at, __m512i v, int scale)
{
	union emu i = {.i = at}, of = {.i = v};

	for (size_t j = 0; j < 16; j++)
		memcpy((char *)p + (int64_t)(int32_t)i.u32[j] * scale, &of.u32[j], 4);
}

#undef _mm512_load_ps
#undef _mm512_load_si512
#undef _mm512_store_ps
#undef _mm512_store_si512
#define _mm512_load_ps(p) simde_mm512_loadu_ps(emu_aligned(p))
#define _mm512_load_si512(p) simde_mm512_loadu_si512(emu_aligned(p))
#define _mm512_store_ps(p, v) simde_mm512_storeu_ps(emu_aligned(p), v)
#define _mm512_store_si512(p, v) simde_mm512_storeu_si512(emu_aligned(p), v)
#define _mm512_stream_ps(p, v) simde_mm512_storeu_ps(emu_aligned(p), v)
#define _mm512_maskz_loadu_ps(m, p) emu_load_ps(m, p)
#define _mm512_mask_loadu_ps(v, m, p) _mm512_mask_mov_ps(v, m, emu_load_ps(m, p))
#define _mm512_mask_storeu_ps(p, m, v) emu_store_ps(p, m, v)
#define _mm512_maskz_loadu_epi32(m, p) _mm512_castps_si512(emu_load_ps(m, p))
#define _mm512_maskz_loadu_epi16(m, p) emu_load_epi16(m, p)
#define _mm512_mask_storeu_epi16(p, m, v) emu_store(p, m, &(union emu){.i = (v)}, 32, 2, 2)
#define _mm512_mask_cvtepi32_storeu_epi16(p, m, v) emu_store(p, m, &(union emu){.i = (v)}, 16, 2, 4)
#define _mm256_mask_storeu_epi8(p, m, v) emu_store(p, m, &(union emu){.i256 = {(v)}}, 32, 1, 1)
#define _mm512_i32scatter_epi32(p, at, v, scale) emu_scatter(p, at, v, scale)

/* ---- masks ---- */

static inline __mmask16
emu_unequal(__mmask16 m, __m512i a, __m512i b)
{
	return m & (__mmask16)~_mm512_cmpeq_epi32_mask(a, b);
}

#define _mm512_cmpeq_epi16_mask(a, b) _mm512_movepi16_mask((__m512i)((emu_i16x32)(a) == (emu_i16x32)(b)))
#define _mm512_cmplt_epu16_mask(a, b) (~_mm512_cmpge_epu16_mask(a, b))
#define _mm512_testn_epi16_mask(a, b) (~_mm512_test_epi16_mask(a, b))
#define _mm512_cmplt_epi32_mask(a, b) _mm512_cmpgt_epi32_mask(b, a)
#define _mm512_cmpneq_epi32_mask(a, b) emu_unequal(0xffff, a, b)
#define _mm512_mask_cmpneq_epi32_mask(m, a, b) emu_unequal(m, a, b)

/* ---- lanes ---- */

static inline __m512i
emu_to_int(__m512 v)
{
	union emu of = {.f = v};

	for (int h = 0; h < 2; h++)
		of.i256[h] = _mm256_cvtps_epi32(of.f256[h]);
	return of.i;
}

static inline uint32_t
emu_max(__m512i v)
{
	union emu of = {.i = v};
	uint32_t max = 0;

	for (int j = 0; j < 16; j++)
		max = of.u32[j] > max ? of.u32[j] : max;
	return max;
}

static inline __m512
emu_shuffle(__m512 a, __m512 b, int how)
{
	union emu from[2] = {{.f = a}, {.f = b}}, to;

	for (int j = 0; j < 4; j++)
		to.f128[j] = from[j / 2].f128[how >> (2 * j) & 3];
	return to.f;
}

/* The sum, the product of the odd words, that of the even ones. */
static inline __m512
emu_dot(__m512 sum, __m512i a, __m512i b)
{
	const __m512i odd = _mm512_set1_epi32((int)0xffff0000);

	sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, odd)), _mm512_castsi512_ps(_mm512_and_si512(b, odd)), sum);
	return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
}

#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(sum, a, b) emu_dot(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_cvtps_epi32(v) emu_to_int(v)
#define _mm512_mask_cvtps_epi32(v, m, a) _mm512_mask_mov_epi32(v, m, emu_to_int(a))
#define _mm512_cvtepi16_epi32(v) ((__m512i)__builtin_convertvector((emu_i16x16)(v), emu_i32x16))
#define _mm512_cvtepu16_epi32(v) ((__m512i)__builtin_convertvector((emu_u16x16)(v), emu_i32x16))
#define _mm512_cvtepi32_epi16(v) ((__m256i)__builtin_convertvector((emu_i32x16)(v), emu_i16x16))
#define _mm512_maskz_sub_epi16(m, a, b) _mm512_maskz_mov_epi16(m, _mm512_sub_epi16(a, b))
#define _mm512_mask3_fmadd_ps(a, b, c, m) _mm512_mask_mov_ps(c, m, _mm512_fmadd_ps(a, b, c))
#define _mm512_reduce_max_epu32(v) emu_max(v)
#define _mm512_shuffle_f32x4(a, b, how) emu_shuffle(a, b, how)
#define _mm512_extractf32x8_ps(v, h) ((union emu){.f = (v)}.f256[h])

/* ---- the sources' own words ---- */

/* Nothing is for another machine. Nothing is inlined or unrolled by order: that took a minute and a half to compile. */
#define target(...)
#define always_inline
#undef UNROLL
#define UNROLL
/* Assembly, which holds values in registers: without `volatile` it goes, with it it is empty. */
#define __asm__(...)
#define volatile(...) ("")
/* The machine has all but what others check: AVX2 without emulation, tiles (not granted) as amx-emulated. */
#define __builtin_cpu_supports(what) (strcmp(what, "avx2") != 0)
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(a) = *(b) = *(c) = *(d) = ~0u, 1)
#define syscall(...) (-1)
#endif
