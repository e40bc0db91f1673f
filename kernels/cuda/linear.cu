/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers for few rows, bound by the memory that weights are read from: one
 * warp an output channel to 4 rows, matrix instructions with the weights as the
 * 16-row operand to 64. And what cuBLASLt needs beside it.
 *
 * The sum over k has no meaning in its order, so a lane takes neighbouring inputs,
 * which one wide load brings, wherever the fragment's layout would have them.
 */
#include "kernels/cuda/arch.cuh"
#include "kernels/cuda/cu.h"

#define GEMV_WARPS 4
#define GEMV_CHANNELS 2 /* of a warp: they share what is loaded of x */
#define MMA_WARPS 4     /* share k among them */
#define MMA_TILES 2     /* of 16 channels each, in every warp */

/* The E4M3 code of a weight under the scale of the whole tensor: rounded once more, as kernels/ref does. */
static __device__ __forceinline__ uint32_t
rescale_x4(uint32_t hi, float ratio)
{
	float v[4];

	for (int i = 0; i < 4; i++)
		v[i] = cu_float_of_e4m3(hi >> 8 * i) * ratio;
	return cu_e4m3x2(v[0], v[1]) | cu_e4m3x2(v[2], v[3]) << 16;
}

/* Eight weights of row c from input i on, as four pairs of BF16, or as two words of E4M3. */
template <int KIND>
static __device__ __forceinline__ void
load8(const struct cu_linear &a, uint32_t c, uint32_t i, float ratio, uint32_t pair[4], uint32_t code[2])
{
	size_t at = (size_t)c * a.ld + i;

	if (KIND == CU_W_BF16) {
		uint4 v = cu_stream16(a.bf16 + at);

		pair[0] = v.x, pair[1] = v.y, pair[2] = v.z, pair[3] = v.w;
		return;
	}
	uint2 hi = cu_stream8(a.hi + at);

	if (KIND == CU_W_NESTED) {
		uint2 lo = cu_stream8(a.lo + at);

		cu_nested_x4(hi.x, lo.x, pair);
		cu_nested_x4(hi.y, lo.y, pair + 2);
		return;
	}
	code[0] = KIND == CU_W_E4M3T ? rescale_x4(hi.x, ratio) : hi.x;
	code[1] = KIND == CU_W_E4M3T ? rescale_x4(hi.y, ratio) : hi.y;
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

template <int KIND, bool W8A8, int ROWS>
__global__ void __launch_bounds__(GEMV_WARPS * 32)
gemv(struct cu_linear a)
{
	const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
	const uint32_t c0 = (blockIdx.x * GEMV_WARPS + warp) * GEMV_CHANNELS;
	float sum[GEMV_CHANNELS][ROWS] = {};

	for (uint32_t i = lane * 8; i < a.ld; i += 256) {
		float w[GEMV_CHANNELS][8];

#pragma unroll
		for (int j = 0; j < GEMV_CHANNELS; j++) {
			uint32_t pair[4] = {}, code[2] = {}, c = c0 + j < a.n ? c0 + j : a.n - 1;

			load8<KIND>(a, c, i, ratio_of<KIND>(a, c), pair, code);
			for (int e = 0; e < 8; e++)
				w[j][e] = KIND == CU_W_E4M3 || KIND == CU_W_E4M3T ? cu_float_of_e4m3(code[e / 4] >> 8 * (e % 4)) :
				    e % 2 ? cu_hi(pair[e / 2]) : cu_lo(pair[e / 2]);
		}
#pragma unroll
		for (int r = 0; r < ROWS; r++) {
			float x[8];

			if (W8A8) {
				uint2 v = *reinterpret_cast<const uint2 *>(a.xq + r * a.ldx + i);

				for (int e = 0; e < 8; e++)
					x[e] = cu_float_of_e4m3((e < 4 ? v.x : v.y) >> 8 * (e % 4));
			} else {
				uint4 v = *reinterpret_cast<const uint4 *>(a.xb + r * a.ldx + i);

				x[0] = cu_lo(v.x), x[1] = cu_hi(v.x), x[2] = cu_lo(v.y), x[3] = cu_hi(v.y);
				x[4] = cu_lo(v.z), x[5] = cu_hi(v.z), x[6] = cu_lo(v.w), x[7] = cu_hi(v.w);
			}
#pragma unroll
			for (int j = 0; j < GEMV_CHANNELS; j++)
				for (int e = 0; e < 8; e++)
					sum[j][r] = fmaf(w[j][e], x[e], sum[j][r]);
		}
	}
#pragma unroll
	for (int j = 0; j < GEMV_CHANNELS; j++)
#pragma unroll
		for (int r = 0; r < ROWS; r++) {
			float v = cu_warp_sum(sum[j][r]);

			if (lane == 0 && c0 + j < a.n)
				write_y(a, W8A8, r, c0 + j, v, out_scale<KIND>(a, c0 + j));
		}
}

/*
 * 16 channels a tile, 8 rows of x a column block. Lane (g, t) = (lane / 4, lane % 4) has inputs i + 8 t .. + 7 of channels
 * g, g + 8 and of row g: two BF16 products (slots 2t, 2t+1, 2t+8, 2t+9 of each hold four neighbours), or one of E4M3.
 */
template <int KIND, bool W8A8, int COLS>
__global__ void __launch_bounds__(MMA_WARPS * 32)
skinny(struct cu_linear a)
{
	__shared__ float part[MMA_WARPS][COLS * 8][MMA_TILES * 16 + 1];
	const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	const uint32_t c0 = blockIdx.x * MMA_TILES * 16;
	float c[MMA_TILES][COLS][4] = {}, ratio[MMA_TILES][2];
	uint32_t channel[MMA_TILES][2];

#pragma unroll
	for (int m = 0; m < MMA_TILES; m++)
		for (int h = 0; h < 2; h++) {
			channel[m][h] = min(c0 + m * 16 + h * 8 + g, a.n - 1);
			ratio[m][h] = ratio_of<KIND>(a, channel[m][h]);
		}
	for (uint32_t i = warp * 32 + t * 8; i < a.ld; i += MMA_WARPS * 32) {
		uint32_t w[MMA_TILES][2][4];

#pragma unroll
		for (int m = 0; m < MMA_TILES; m++)
#pragma unroll
			for (int h = 0; h < 2; h++) {
				uint32_t code[2];

				load8<KIND>(a, channel[m][h], i, ratio[m][h], w[m][h], code);
				if (KIND == CU_W_E4M3 || KIND == CU_W_E4M3T) {
					if (W8A8) {
						w[m][h][0] = code[0], w[m][h][1] = code[1];
					} else {
						cu_bf16_of_e4m3x4(code[0], w[m][h]);
						cu_bf16_of_e4m3x4(code[1], w[m][h] + 2);
					}
				}
			}
#pragma unroll
		for (int n = 0; n < COLS; n++) {
			uint32_t row = n * 8 + g, x[4] = {0, 0, 0, 0};

			if (row < a.rows && W8A8) {
				uint2 v = *reinterpret_cast<const uint2 *>(a.xq + row * a.ldx + i);

				x[0] = v.x, x[1] = v.y;
			} else if (row < a.rows) {
				uint4 v = *reinterpret_cast<const uint4 *>(a.xb + row * a.ldx + i);

				x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
			}
#pragma unroll
			for (int m = 0; m < MMA_TILES; m++) {
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
#pragma unroll
	for (int m = 0; m < MMA_TILES; m++)
#pragma unroll
		for (int n = 0; n < COLS; n++)
			for (int e = 0; e < 4; e++)
				part[warp][n * 8 + 2 * t + e % 2][m * 16 + e / 2 * 8 + g] = c[m][n][e];
	__syncthreads();
	for (uint32_t i = threadIdx.x; i < a.rows * MMA_TILES * 16; i += MMA_WARPS * 32) {
		uint32_t row = i / (MMA_TILES * 16), ch = i % (MMA_TILES * 16);
		float v = 0;

		for (int p = 0; p < MMA_WARPS; p++)
			v += part[p][row][ch];
		if (c0 + ch < a.n)
			write_y(a, W8A8, row, c0 + ch, v, out_scale<KIND>(a, c0 + ch));
	}
}

template <int KIND, bool W8A8>
static void
launch(const struct cu_linear *a, cudaStream_t stream)
{
	const uint32_t per = GEMV_WARPS * GEMV_CHANNELS;
	dim3 few((a->n + per - 1) / per), many((a->n + MMA_TILES * 16 - 1) / (MMA_TILES * 16));

	/* A comma inside a template's arguments would end the macro's. */
	auto g1 = gemv<KIND, W8A8, 1>, g2 = gemv<KIND, W8A8, 2>, g4 = gemv<KIND, W8A8, 4>;
	auto s1 = skinny<KIND, W8A8, 1>, s2 = skinny<KIND, W8A8, 2>, s4 = skinny<KIND, W8A8, 4>, s8 = skinny<KIND, W8A8, 8>;

	if (a->rows == 1)
		CU_LAUNCH(g1, few, GEMV_WARPS * 32, 0, stream, *a);
	else if (a->rows == 2)
		CU_LAUNCH(g2, few, GEMV_WARPS * 32, 0, stream, *a);
	else if (a->rows == 4)
		CU_LAUNCH(g4, few, GEMV_WARPS * 32, 0, stream, *a);
	else if (a->rows <= 8)
		CU_LAUNCH(s1, many, MMA_WARPS * 32, 0, stream, *a);
	else if (a->rows <= 16)
		CU_LAUNCH(s2, many, MMA_WARPS * 32, 0, stream, *a);
	else if (a->rows <= 32)
		CU_LAUNCH(s4, many, MMA_WARPS * 32, 0, stream, *a);
	else
		CU_LAUNCH(s8, many, MMA_WARPS * 32, 0, stream, *a);
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
