/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CUDA_ARCH_CUH
#define OCTET_CUDA_ARCH_CUH
/*
 * The instructions that kernels use beyond C++, by name. tests/gpu/emu has the
 * same names in plain C++, by the PTX documentation: a kernel that calls only
 * these runs on a CPU too. Launches go through CU_LAUNCH for the same reason.
 */
#include <stdint.h>

#define CU_FULL 0xffffffffu

#ifdef OCTET_EMU
#include "tests/gpu/emu/emu.h"
#else
#include <cuda_runtime.h>

#define CU_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
/* Dynamic shared memory, 16-byte aligned. */
#define CU_DYN_SHARED(type, name) \
	extern __shared__ __align__(16) unsigned char cu_dyn_shared_[]; \
	type *name = reinterpret_cast<type *>(cu_dyn_shared_)

/* Bytes of {b, a} picked by four selectors; bit 3 of one replicates the sign of its byte. */
static __device__ __forceinline__ uint32_t
cu_prmt(uint32_t a, uint32_t b, uint32_t sel)
{
	uint32_t d;

	asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sel));
	return d;
}

/* Two FP32 to BF16, nearest even: lo in the lower half. */
static __device__ __forceinline__ uint32_t
cu_bf16x2(float lo, float hi)
{
	uint32_t d;

	asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
	return d;
}

/* Two FP32 to E4M3, nearest even, saturating, NaN 0x7f: lo in the lower byte. */
static __device__ __forceinline__ uint32_t
cu_e4m3x2(float lo, float hi)
{
	uint16_t d;

	asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(hi), "f"(lo));
	return d;
}

/* Products of two pairs of BF16; subnormal operands count (PTX: mul.bf16x2 is fma with -0). */
static __device__ __forceinline__ uint32_t
cu_mul_bf16x2(uint32_t a, uint32_t b)
{
	uint32_t d;

	asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
	return d;
}

/* c [16, 8] += a [16, 16] (rows) * b [16, 8] (columns), BF16 in, FP32 sums. All lanes must meet here: volatile keeps the
 * compiler from moving it under a condition. */
static __device__ __forceinline__ void
cu_mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2])
{
	asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
	    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
	    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* c [16, 8] += a [16, 32] * b [32, 8], E4M3 in. */
static __device__ __forceinline__ void
cu_mma_e4m3(float c[4], const uint32_t a[4], const uint32_t b[2])
{
	asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
	    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
	    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* 16 bytes that are read once; zeros unless `there`. volatile: several shall be on their way before the first is used, which
 * the compiler would rather undo for the sake of registers. */
static __device__ __forceinline__ uint4
cu_stream16(const void *p, bool there)
{
	uint4 v = make_uint4(0, 0, 0, 0);

	asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4]; }"
	    : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"((uint32_t)there));
	return v;
}

/* Every lane gets it. */
static __device__ __forceinline__ float
cu_warp_sum(float v)
{
	for (int o = 16; o > 0; o /= 2)
		v += __shfl_xor_sync(CU_FULL, v, o);
	return v;
}

static __device__ __forceinline__ float
cu_warp_max(float v)
{
	for (int o = 16; o > 0; o /= 2)
		v = fmaxf(v, __shfl_xor_sync(CU_FULL, v, o));
	return v;
}
#endif

/* Of a block of up to 1024 threads; every thread gets it. scratch [33] shared. */
static __device__ __forceinline__ float
cu_block_reduce(float v, bool max, float *scratch)
{
	int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, warps = ((int)blockDim.x + 31) / 32;

	v = max ? cu_warp_max(v) : cu_warp_sum(v);
	__syncthreads(); /* scratch may still be read from before */
	if (lane == 0)
		scratch[warp] = v;
	__syncthreads();
	if (warp == 0) {
		v = lane < warps ? scratch[lane] : 0; /* maxima here are of magnitudes */
		v = max ? cu_warp_max(v) : cu_warp_sum(v);
		if (lane == 0)
			scratch[32] = v;
	}
	__syncthreads();
	return scratch[32];
}

static __device__ __forceinline__ float
cu_float_of_bf16(uint32_t bits)
{
	return __uint_as_float(bits << 16);
}

/* The two of a pair. */
static __device__ __forceinline__ float
cu_lo(uint32_t pair)
{
	return __uint_as_float(pair << 16);
}

static __device__ __forceinline__ float
cu_hi(uint32_t pair)
{
	return __uint_as_float(pair & 0xffff0000u);
}

/* E4M3 moved into the place of a float's bits is its value times 2^-120, subnormals included. NaN becomes 480. */
static __device__ __forceinline__ float
cu_float_of_e4m3(uint32_t c)
{
	return __uint_as_float((c & 0x80) << 24 | (c & 0x7f) << 20) * 0x1p120f;
}

/* Four E4M3 as two pairs of BF16, exact. 2^120 is BF16 0x7b80. */
static __device__ __forceinline__ void
cu_bf16_of_e4m3x4(uint32_t c, uint32_t out[2])
{
	uint32_t a = cu_prmt(c, 0, 0x4140), b = cu_prmt(c, 0, 0x4342); /* 00 c1 00 c0; 00 c3 00 c2 */

	a = (a & 0x00800080u) << 8 | (a & 0x007f007fu) << 4;
	b = (b & 0x00800080u) << 8 | (b & 0x007f007fu) << 4;
	out[0] = cu_mul_bf16x2(a, 0x7b807b80u);
	out[1] = cu_mul_bf16x2(b, 0x7b807b80u);
}

/* Four weights of the nested planes in the scaled domain: the magnitudes of hi plus lo, on the grid of BF16 magnitudes. */
static __device__ __forceinline__ void
cu_nested_x4(uint32_t hi, uint32_t lo, uint32_t out[2])
{
	uint32_t m[2], l[2];

	cu_bf16_of_e4m3x4(hi & 0x7f7f7f7fu, m);
	l[0] = cu_prmt(lo, 0, 0x9180); /* bytes 0, 1 with their signs: selector bit 3 replicates it */
	l[1] = cu_prmt(lo, 0, 0xb3a2);
	/* A sum of magnitudes is never negative and has no carry out of 15 bits: the two halves add as one with the carry of
	 * the lower half of a negative l taken out. */
	for (int i = 0; i < 2; i++) {
		uint32_t a = (m[i] + (l[i] & 0xffffu)) & 0xffffu, b = ((m[i] >> 16) + (l[i] >> 16)) << 16;
		uint32_t s = i == 0 ? (hi & 0x80) << 8 | (hi & 0x8000) << 16 : (hi >> 8 & 0x8000) | (hi & 0x80000000u);

		out[i] = a | b | s;
	}
}

/* The exp of kernels/internal.h, operation by operation: the same bits as on the CPU. */
static __device__ __forceinline__ float
cu_exp(float x)
{
	float n, r, p;

	if (x < -87.0f)
		return 0;
	x = x > 88.0f ? 88.0f : x;
	n = __fadd_rn(fmaf(x, 1.44269504088896341f, 12582912.0f), -12582912.0f);
	r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
	p = fmaf(1.38888889e-3f, r, 8.33333333e-3f);
	p = fmaf(p, r, 4.16666667e-2f);
	p = fmaf(p, r, 1.66666667e-1f);
	p = fmaf(p, r, 0.5f);
	p = fmaf(p, r, 1.0f);
	p = fmaf(p, r, 1.0f);
	if (n != n)
		return n;
	return __fmul_rn(p, __uint_as_float((uint32_t)((int)n + 127) << 23));
}

/* absmax / 448, 1 if that is zero, or subnormal, which a CPU's kernel threads flush: the scale of kernels/ref. */
static __device__ __forceinline__ float
cu_scale_of(float absmax)
{
	float s = __fdiv_rn(absmax, 448.0f);

	return s < 0x1p-126f ? 1.0f : s; /* a NaN stays */
}

/* What E4M3 makes of a value beside the largest magnitude of its row: x / (max / 448) rounds to 0 up to half of 2^-9, and to 448
 * from half way between it and 416. */
static __device__ __forceinline__ bool
cu_becomes_zero(float v, float max)
{
	return v != 0 && fabsf(v) <= __fmul_rn(__fdiv_rn(max, 448.0f), 0x1p-10f);
}

static __device__ __forceinline__ bool
cu_becomes_largest(float v, float max)
{
	return v != 0 && fabsf(v) >= __fmul_rn(__fdiv_rn(max, 448.0f), 432.0f);
}
#endif
