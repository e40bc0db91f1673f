/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers for up to 64 rows, bound by the memory that weights are read from:
 * matrix instructions with the weights as the 16-row operand, for one row too. (A
 * warp an output channel on FP32 spends five instructions a weight to unpack E4M3: three
 * quarters of all a Hopper can issue while it reads them.) And what cuBLASLt needs beside it.
 *
 * The sum over k has no meaning in its order, so a lane takes neighbouring inputs,
 * which one wide load brings, wherever the fragment's layout would have them.
 */
#include "kernels/cuda/arch.cuh"
#include "kernels/cuda/cu.h"

#define WARPS 8         /* share k among them */
#define TILES 2         /* of 16 channels each, in every warp */
#define STEP 64u        /* inputs at a time of a warp: 16 of a lane */

/* The E4M3 code of a weight under the scale of the whole tensor: rounded once more, as kernels/ref does. */
static __device__ __forceinline__ uint32_t
rescale_x4(uint32_t hi, float ratio)
{
	float v[4];

	for (int i = 0; i < 4; i++)
		v[i] = cu_float_of_e4m3(hi >> 8 * i) * ratio;
	return cu_e4m3x2(v[0], v[1]) | cu_e4m3x2(v[2], v[3]) << 16;
}

/* 16 weights of a channel as they lie in memory. */
template <int KIND>
struct raw {
	static constexpr bool code = KIND == CU_W_E4M3 || KIND == CU_W_E4M3T;
	uint4 v[code ? 1 : 2]; /* BF16: 8 and 8; nested: the high plane, the low */
};

template <int KIND>
static __device__ __forceinline__ struct raw<KIND>
load16(const struct cu_linear &a, uint32_t c, uint32_t i)
{
	const size_t at = (size_t)c * a.ld + i;
	const bool there = i < a.ld; /* which is a multiple of 32 only */
	struct raw<KIND> r;

	r.v[0] = KIND == CU_W_BF16 ? cu_stream16(a.bf16 + at, there) : cu_stream16(a.hi + at, there);
	if (!r.code)
		r.v[!r.code] = KIND == CU_W_BF16 ? cu_stream16(a.bf16 + at + 8, there) : cu_stream16(a.lo + at, there);
	return r;
}

/* Weights 8 half .. + 7 of them: four pairs of BF16, or two words of E4M3. */
template <int KIND, bool W8A8>
static __device__ __forceinline__ void
half_of(const struct raw<KIND> &r, int half, float ratio, uint32_t w[4])
{
	const uint4 v = r.v[0], l = r.v[!r.code];

	if (KIND == CU_W_BF16) {
		w[0] = half ? l.x : v.x, w[1] = half ? l.y : v.y, w[2] = half ? l.z : v.z, w[3] = half ? l.w : v.w;
		return;
	}
	uint32_t a = half ? v.z : v.x, b = half ? v.w : v.y;

	if (KIND == CU_W_NESTED) {
		cu_nested_x4(a, half ? l.z : l.x, w);
		cu_nested_x4(b, half ? l.w : l.y, w + 2);
	} else if (W8A8) {
		w[0] = KIND == CU_W_E4M3T ? rescale_x4(a, ratio) : a;
		w[1] = KIND == CU_W_E4M3T ? rescale_x4(b, ratio) : b;
	} else {
		cu_bf16_of_e4m3x4(a, w);
		cu_bf16_of_e4m3x4(b, w + 2);
	}
}

/* What the scaled domain of a channel is worth. */
template <int KIND>
static __device__ __forceinline__ float
out_scale(const struct cu_linear &a, uint32_t c)
{
	return KIND == CU_W_BF16 ? 1.0f : KIND == CU_W_E4M3T ? a.tscale[c] : a.scale[c];
}

template <int KIND>
static __device__ __forceinline__ float
ratio_of(const struct cu_linear &a, uint32_t c)
{
	return KIND == CU_W_E4M3T ? a.scale[c] / a.tscale[c] : 1.0f;
}

static __device__ __forceinline__ void
write_y(const struct cu_linear &a, bool w8a8, uint32_t row, uint32_t c, float v, float scale)
{
	float *y = a.y + row * a.ldy + c;

	if (w8a8)
		v *= a.xs[row];
	v *= scale;
	*y = a.add ? *y + v : v;
}

/*
 * 16 channels a tile, 8 rows of x a column block. Lane (g, t) = (lane / 4, lane % 4) has inputs i + 16 t .. + 15 of channels
 * g, g + 8 and of row g: four BF16 products (slots 2t, 2t+1, 2t+8, 2t+9 of each hold four neighbours), or two of E4M3.
 *
 * What is short is bytes on their way: memory at 4.3 TB/s answers after some 700 ns, so a multiprocessor needs 24 KB of
 * loads in flight. Each lane asks for 128 bytes before it uses the first: 32 KB of a block.
 */
template <int KIND, bool W8A8, int COLS>
__global__ void __launch_bounds__(WARPS * 32)
skinny(struct cu_linear a)
{
	constexpr int DEEP = raw<KIND>::code ? 2 : 1;
	__shared__ float part[WARPS / 2][COLS * 8][TILES * 16 + 1];
	const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	const uint32_t c0 = blockIdx.x * TILES * 16;
	float c[TILES][COLS][4] = {}, ratio[TILES][2];
	uint32_t channel[TILES][2];

#pragma unroll
	for (int m = 0; m < TILES; m++)
#pragma unroll
		for (int h = 0; h < 2; h++) {
			channel[m][h] = min(c0 + m * 16 + h * 8 + g, a.n - 1);
			ratio[m][h] = ratio_of<KIND>(a, channel[m][h]);
		}
	for (uint32_t i = warp * STEP * DEEP; i < a.ld; i += WARPS * STEP * DEEP) {
		struct raw<KIND> r[DEEP][TILES][2];

#pragma unroll
		for (int u = 0; u < DEEP; u++)
#pragma unroll
			for (int m = 0; m < TILES; m++)
#pragma unroll
				for (int h = 0; h < 2; h++)
					r[u][m][h] = load16<KIND>(a, channel[m][h], i + u * STEP + t * 16);
#pragma unroll
		for (int u = 0; u < DEEP * 2; u++) {
			const uint32_t at = i + u / 2 * STEP + t * 16 + u % 2 * 8;
			uint32_t w[TILES][2][4];

#pragma unroll
			for (int m = 0; m < TILES; m++)
#pragma unroll
				for (int h = 0; h < 2; h++)
					half_of<KIND, W8A8>(r[u / 2][m][h], u % 2, ratio[m][h], w[m][h]);
#pragma unroll
			for (int n = 0; n < COLS; n++) {
				uint32_t row = n * 8 + g, x[4] = {0, 0, 0, 0};

				if (row < a.rows && at < a.ld && W8A8) {
					uint2 v = *reinterpret_cast<const uint2 *>(a.xq + row * a.ldx + at);

					x[0] = v.x, x[1] = v.y;
				} else if (row < a.rows && at < a.ld) {
					uint4 v = *reinterpret_cast<const uint4 *>(a.xb + row * a.ldx + at);

					x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
				}
#pragma unroll
				for (int m = 0; m < TILES; m++) {
					uint32_t f[4] = {w[m][0][0], w[m][1][0], w[m][0][1], w[m][1][1]};

					if (W8A8) {
						cu_mma_e4m3(c[m][n], f, x);
					} else {
						uint32_t f2[4] = {w[m][0][2], w[m][1][2], w[m][0][3], w[m][1][3]};

						cu_mma_bf16(c[m][n], f, x);
						cu_mma_bf16(c[m][n], f2, x + 2);
					}
				}
			}
		}
	}
	/* Half of the warps leave their sums, the others add theirs: 48 KB is all there is without asking for more. */
	for (int half = 0; half < 2; half++) {
#pragma unroll
		for (int m = 0; m < TILES; m++)
#pragma unroll
			for (int n = 0; n < COLS; n++)
#pragma unroll
				for (int e = 0; e < 4; e++) {
					float *p = &part[warp % (WARPS / 2)][n * 8 + 2 * t + e % 2][m * 16 + e / 2 * 8 + g];

					if (warp / (WARPS / 2) == (uint32_t)half)
						*p = half == 0 ? c[m][n][e] : *p + c[m][n][e];
				}
		__syncthreads();
	}
	for (uint32_t i = threadIdx.x; i < a.rows * TILES * 16; i += WARPS * 32) {
		uint32_t row = i / (TILES * 16), ch = i % (TILES * 16);
		float v = 0;

#pragma unroll
		for (int p = 0; p < WARPS / 2; p++)
			v += part[p][row][ch];
		if (c0 + ch < a.n)
			write_y(a, W8A8, row, c0 + ch, v, out_scale<KIND>(a, c0 + ch));
	}
}

template <int KIND, bool W8A8>
static void
launch(const struct cu_linear *a, cudaStream_t stream)
{
	dim3 grid((a->n + TILES * 16 - 1) / (TILES * 16));

	/* A comma inside a template's arguments would end the macro's. */
	auto s1 = skinny<KIND, W8A8, 1>, s2 = skinny<KIND, W8A8, 2>, s4 = skinny<KIND, W8A8, 4>, s8 = skinny<KIND, W8A8, 8>;

	if (a->rows <= 8)
		CU_LAUNCH(s1, grid, WARPS * 32, 0, stream, *a);
	else if (a->rows <= 16)
		CU_LAUNCH(s2, grid, WARPS * 32, 0, stream, *a);
	else if (a->rows <= 32)
		CU_LAUNCH(s4, grid, WARPS * 32, 0, stream, *a);
	else
		CU_LAUNCH(s8, grid, WARPS * 32, 0, stream, *a);
}

extern "C" void
cu_linear_skinny(const struct cu_linear *a, cudaStream_t stream)
{
	switch (a->kind) {
	case CU_W_BF16: launch<CU_W_BF16, false>(a, stream); break;
	case CU_W_NESTED: launch<CU_W_NESTED, false>(a, stream); break;
	case CU_W_E4M3:
		if (a->w8a8)
			launch<CU_W_E4M3, true>(a, stream);
		else
			launch<CU_W_E4M3, false>(a, stream);
		break;
	case CU_W_E4M3T: launch<CU_W_E4M3T, true>(a, stream); break;
	}
}

/* ---- weights that do not fit the planes ---- */

__global__ void
exceptions(struct cu_linear a, struct cu_exceptions e)
{
	uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, r = blockIdx.y;
	float sum = 0;

	if (i >= e.n_rows)
		return;
	for (uint32_t j = e.first[i]; j < e.first[i + 1]; j++)
		sum = fmaf(e.delta[j], cu_float_of_bf16(a.xb[r * a.ldx + e.col[j]]), sum);
	a.y[r * a.ldy + e.row[i]] += sum;
}

extern "C" void
cu_exceptions_add(const struct cu_linear *a, const struct cu_exceptions *e, cudaStream_t stream)
{
	if (e->n_rows > 0)
		CU_LAUNCH(exceptions, dim3((e->n_rows + 127) / 128, a->rows), 128, 0, stream, *a, *e);
}

/* ---- weights as cuBLASLt wants them ---- */

__global__ void
unpack(struct cu_linear a, uint16_t *out)
{
	size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
	uint32_t pair[2];

	if (at >= (size_t)a.n * a.ld)
		return;
	if (a.lo != nullptr)
		cu_nested_x4(*reinterpret_cast<const uint32_t *>(a.hi + at), *reinterpret_cast<const uint32_t *>(a.lo + at), pair);
	else
		cu_bf16_of_e4m3x4(*reinterpret_cast<const uint32_t *>(a.hi + at), pair);
	float s = a.scale[at / a.ld];

	*reinterpret_cast<uint2 *>(out + at) = make_uint2(cu_bf16x2(cu_lo(pair[0]) * s, cu_hi(pair[0]) * s),
	    cu_bf16x2(cu_lo(pair[1]) * s, cu_hi(pair[1]) * s));
}

__global__ void
unpack_exceptions(struct cu_exceptions e, uint32_t ld, uint16_t *out)
{
	uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;

	if (i >= e.n_rows)
		return;
	for (uint32_t j = e.first[i]; j < e.first[i + 1]; j++)
		out[(size_t)e.row[i] * ld + e.col[j]] = e.master[j];
}

extern "C" void
cu_unpack_exceptions(const struct cu_exceptions *e, uint32_t ld, uint16_t *out, cudaStream_t stream)
{
	if (e->n_rows > 0)
		CU_LAUNCH(unpack_exceptions, dim3((e->n_rows + 127) / 128), 128, 0, stream, *e, ld, out);
}

extern "C" void
cu_unpack(const struct cu_linear *a, const struct cu_exceptions *e, uint16_t *out, cudaStream_t stream)
{
	CU_LAUNCH(unpack, dim3((unsigned)(((size_t)a->n * a->ld / 4 + 255) / 256)), 256, 0, stream, *a, out);
	if (a->lo != nullptr)
		cu_unpack_exceptions(e, a->ld, out, stream);
}

__global__ void
rescale(struct cu_linear a, uint8_t *out)
{
	size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;

	if (at >= (size_t)a.n * a.ld)
		return;
	*reinterpret_cast<uint32_t *>(out + at) = rescale_x4(*reinterpret_cast<const uint32_t *>(a.hi + at),
	    ratio_of<CU_W_E4M3T>(a, (uint32_t)(at / a.ld)));
}

extern "C" void
cu_rescale_e4m3(const struct cu_linear *a, uint8_t *out, cudaStream_t stream)
{
	CU_LAUNCH(rescale, dim3((unsigned)(((size_t)a->n * a->ld / 4 + 255) / 256)), 256, 0, stream, *a, out);
}

__global__ void
apply_scales(struct cu_linear a, const float *t, size_t ldt, bool tensor)
{
	uint32_t c = blockIdx.x * blockDim.x + threadIdx.x, r = blockIdx.y;

	if (c < a.n)
		write_y(a, true, r, c, t[r * ldt + c], tensor ? a.tscale[c] : a.scale[c]);
}

extern "C" void
cu_apply_scales(const struct cu_linear *a, const float *t, size_t ldt, cudaStream_t stream)
{
	CU_LAUNCH(apply_scales, dim3((a->n + 255) / 256, a->rows), 256, 0, stream, *a, t, ldt, a->kind == CU_W_E4M3T);
}

__global__ void
add_bias(float *y, size_t ldy, uint32_t n, const float *bias)
{
	uint32_t c = blockIdx.x * blockDim.x + threadIdx.x;

	if (c < n)
		y[blockIdx.y * ldy + c] += bias[c];
}

extern "C" void
cu_add_bias(float *y, size_t ldy, uint32_t rows, uint32_t n, const float *bias, cudaStream_t stream)
{
	CU_LAUNCH(add_bias, dim3((n + 255) / 256, rows), 256, 0, stream, y, ldy, n, bias);
}
