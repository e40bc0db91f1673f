/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_EMU_H
#define OCTET_EMU_H
/*
 * Enough of CUDA's C++ to run kernels/cuda/ on a CPU: the threads of a block are fibers on one stack each, switched at
 * barriers, shuffles and matrix instructions only; blocks run one after the other. The instructions follow the PTX
 * documentation. It proves the logic of a kernel (indices, masks, layouts of fragments, barriers that all threads
 * reach), not the hardware: no races within a warp, no timing, no memory model, one order of the atomics.
 */
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 {
	unsigned x, y, z;
	constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct emu_coords { dim3 thread, block, block_dim, grid_dim; };
extern emu_coords *emu_now;          /* of the thread that runs */
extern unsigned char *emu_shared;    /* dynamic shared memory of the block */
#define threadIdx (emu_now->thread)
#define blockIdx (emu_now->block)
#define blockDim (emu_now->block_dim)
#define gridDim (emu_now->grid_dim)

/* Queues a launch on a stream: runs it, or records it while the stream captures. */
void emu_launch(const char *name, dim3 grid, dim3 block, size_t smem, cudaStream_t, std::function<void()> body);
void emu_block_barrier(void);
/* Puts this lane's words where its warp can see them, waits for all lanes; returns [32][words]. */
const uint32_t *emu_warp_exchange(const uint32_t *mine, unsigned words);

/* Arguments are copied now, as a launch does; the kernel may run later. */
template <class K, class... A> static inline void
emu_launch_with(const char *name, dim3 grid, dim3 block, size_t smem, cudaStream_t stream, K kernel, A... args)
{
	emu_launch(name, grid, block, smem, stream, [=] { kernel(args...); });
}
#define CU_LAUNCH(kernel, grid, block, smem, stream, ...) \
	emu_launch_with(#kernel, grid, block, smem, stream, kernel, __VA_ARGS__)
#define CU_DYN_SHARED(type, name) type *name = reinterpret_cast<type *>(emu_shared)

static inline void __syncthreads(void) { emu_block_barrier(); }
static inline void __syncwarp(unsigned = 0xffffffffu) { uint32_t z = 0; emu_warp_exchange(&z, 1); }

static inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
static inline unsigned long long __double_as_longlong(double d) { unsigned long long u; memcpy(&u, &d, 8); return u; }
static inline double __longlong_as_double(unsigned long long u) { double d; memcpy(&d, &u, 8); return d; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T min(T a, T b) { return a < b ? a : b; }
template <class T> static inline T max(T a, T b) { return a > b ? a : b; }

template <class T> static inline T
emu_shuffle(T v, int from)
{
	uint32_t w[2] = {0, 0};
	const unsigned n = sizeof(T) / 4;
	const uint32_t *all;

	memcpy(w, &v, sizeof(T));
	all = emu_warp_exchange(w, n);
	memcpy(&v, all + (size_t)(from & 31) * n, sizeof(T));
	return v;
}
static inline int emu_lane(void) { return (int)(threadIdx.x & 31); } /* blocks here are one-dimensional */
template <class T> static inline T __shfl_xor_sync(unsigned, T v, int m) { return emu_shuffle(v, emu_lane() ^ m); }
template <class T> static inline T __shfl_sync(unsigned, T v, int from) { return emu_shuffle(v, from); }
template <class T> static inline T
__shfl_up_sync(unsigned, T v, int by)
{
	int from = emu_lane() - by;

	return emu_shuffle(v, from < 0 ? emu_lane() : from);
}
static inline unsigned
__ballot_sync(unsigned, bool p)
{
	uint32_t v = p, out = 0;
	const uint32_t *all = emu_warp_exchange(&v, 1);

	for (int i = 0; i < 32; i++)
		out |= all[i] << i;
	return out;
}
template <class T> static inline T atomicAdd(T *p, T v) { T old = *p; *p = old + v; return old; }
template <class T> static inline T atomicMin(T *p, T v) { T old = *p; *p = v < old ? v : old; return old; }
template <class T> static inline T atomicMax(T *p, T v) { T old = *p; *p = v > old ? v : old; return old; }

/* ---- the names of arch.cuh ---- */

uint32_t cu_prmt(uint32_t a, uint32_t b, uint32_t sel);
uint32_t cu_bf16x2(float lo, float hi);
uint32_t cu_e4m3x2(float lo, float hi);
uint32_t cu_mul_bf16x2(uint32_t a, uint32_t b);
void cu_mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]);
void cu_mma_e4m3(float c[4], const uint32_t a[4], const uint32_t b[2]);
float cu_warp_sum(float);
float cu_warp_max(float);
static inline uint4
cu_stream16(const void *p, bool there)
{
	uint4 v = {0, 0, 0, 0};

	if ((uintptr_t)p % 16 != 0)
		abort(); /* as the card would */
	if (there)
		memcpy(&v, p, sizeof(v));
	return v;
}
#endif
