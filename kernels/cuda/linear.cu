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
	static constexpr bool code = KIND == CU_W_E4M3 || KIND == CU_W_E4M3T || KIND == CU_W_E4M3B;
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
	return KIND == CU_W_BF16 || KIND == CU_W_E4M3B ? 1.0f : KIND == CU_W_E4M3T ? a.tscale[c] : a.scale[c];
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

/* fp8b: what 128 inputs summed to goes into the total by both scales; all channels of a block lie in one square. */
template <int COLS>
static __device__ __forceinline__ void
add_squares(const struct cu_linear &a, uint32_t c0, uint32_t square, uint32_t t, float (&c)[TILES][COLS][4], float (&total)[TILES][COLS][4])
{
	const float s = a.square[c0 / K_SQUARE * a.ld_square + square];

#pragma unroll
	for (int n = 0; n < COLS; n++)
#pragma unroll
		for (int h = 0; h < 2; h++) {
			uint32_t row = n * 8 + 2 * t + h;
			float both = row < a.rows ? __fmul_rn(a.xs[row * a.ldxs + square], s) : 0;

#pragma unroll
			for (int m = 0; m < TILES; m++)
#pragma unroll
				for (int e = h; e < 4; e += 2) {
					total[m][n][e] = __fadd_rn(total[m][n][e], __fmul_rn(c[m][n][e], both));
					c[m][n][e] = 0;
				}
		}
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
	constexpr bool SQUARES = KIND == CU_W_E4M3B; /* what a warp takes at a time is one square's inputs */
	static_assert(!SQUARES || DEEP * STEP == K_SQUARE, "128 inputs");
	__shared__ float part[WARPS / 2][COLS * 8][TILES * 16 + 1];
	const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	const uint32_t c0 = blockIdx.x * TILES * 16;
	float c[TILES][COLS][4] = {}, total[SQUARES ? TILES : 1][SQUARES ? COLS : 1][4] = {}, ratio[TILES][2];
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
		if constexpr (SQUARES)
			add_squares<COLS>(a, c0, i / K_SQUARE, t, c, total);
	}
	if constexpr (SQUARES)
#pragma unroll
		for (int i = 0; i < TILES * COLS * 4; i++)
			c[i / (COLS * 4)][i / 4 % COLS][i % 4] = total[i / (COLS * 4)][i / 4 % COLS][i % 4];
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
			write_y(a, W8A8 && !SQUARES, row, c0 + ch, v, out_scale<KIND>(a, c0 + ch));
	}
}

template <int KIND, bool W8A8>
static void
launch(const struct cu_linear *a, cudaStream_t stream)
{
	dim3 grid((a->n + TILES * 16 - 1) / (TILES * 16));

	/* A comma inside a template's arguments would end the macro's. */
	auto s1 = skinny<KIND, W8A8, 1>, s2 = skinny<KIND, W8A8, 2>, s4 = skinny<KIND, W8A8, 4>;

	if (a->rows <= 8)
		CU_LAUNCH(s1, grid, WARPS * 32, 0, stream, *a);
	else if (a->rows <= 16)
		CU_LAUNCH(s2, grid, WARPS * 32, 0, stream, *a);
	else if (a->rows <= 32)
		CU_LAUNCH(s4, grid, WARPS * 32, 0, stream, *a);
	else if constexpr (KIND == CU_W_E4M3B) {
		/* Two sums of 64 rows would not fit the registers. */
		struct cu_linear from = *a, rest = *a;

		from.rows = 32, rest.rows -= 32;
		rest.xq += 32 * a->ldx, rest.xs += 32 * a->ldxs, rest.y += 32 * a->ldy;
		launch<KIND, W8A8>(&from, stream);
		launch<KIND, W8A8>(&rest, stream);
	} else {
		auto s8 = skinny<KIND, W8A8, 8>;

		CU_LAUNCH(s8, grid, WARPS * 32, 0, stream, *a);
	}
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
	case CU_W_E4M3B: launch<CU_W_E4M3B, true>(a, stream); break;
	}
}

/* ---- weights that do not fit the planes ---- */

/* Rows go to grid.x here and everywhere: y and z end at 65,535. */

__global__ void
exceptions(struct cu_linear a, struct cu_exceptions e)
{
	uint32_t i = blockIdx.y * blockDim.x + threadIdx.x, r = blockIdx.x;
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
		CU_LAUNCH(exceptions, dim3(a->rows, (e->n_rows + 127) / 128), 128, 0, stream, *a, *e);
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

static __device__ __forceinline__ float
square_of(const struct cu_linear &a, size_t row, uint32_t col)
{
	return a.square[row / K_SQUARE * a.ld_square + col / K_SQUARE];
}

/* A subnormal master is 0, as kernels/squares.c has it. */
static __device__ __forceinline__ float
normal_over(float v, float s)
{
	return __fdiv_rn(fabsf(v) < 0x1p-126f ? copysignf(0.0f, v) : v, s);
}

__global__ void
square_codes(struct cu_linear a, uint8_t *out)
{
	size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
	uint32_t pair[2];

	if (at >= (size_t)a.n * a.ld)
		return;
	const size_t row = at / a.ld;
	const float s = square_of(a, row, (uint32_t)(at % a.ld)), scale = a.bf16 != nullptr ? 1.0f : a.scale[row];

	if (a.bf16 != nullptr)
		pair[0] = reinterpret_cast<const uint32_t *>(a.bf16 + at)[0], pair[1] = reinterpret_cast<const uint32_t *>(a.bf16 + at)[1];
	else
		cu_nested_x4(*reinterpret_cast<const uint32_t *>(a.hi + at), *reinterpret_cast<const uint32_t *>(a.lo + at), pair);
	*reinterpret_cast<uint32_t *>(out + at) =
	    cu_e4m3x2(normal_over(cu_lo(pair[0]) * scale, s), normal_over(cu_hi(pair[0]) * scale, s)) |
	    cu_e4m3x2(normal_over(cu_lo(pair[1]) * scale, s), normal_over(cu_hi(pair[1]) * scale, s)) << 16;
}

__global__ void
square_exceptions(struct cu_linear a, struct cu_exceptions e, uint8_t *out)
{
	uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;

	if (i >= e.n_rows)
		return;
	for (uint32_t j = e.first[i]; j < e.first[i + 1]; j++)
		out[(size_t)e.row[i] * a.ld + e.col[j]] =
		    (uint8_t)cu_e4m3x2(normal_over(cu_float_of_bf16(e.master[j]), square_of(a, e.row[i], e.col[j])), 0);
}

extern "C" void
cu_square_codes(const struct cu_linear *a, const struct cu_exceptions *e, uint8_t *out, cudaStream_t stream)
{
	CU_LAUNCH(square_codes, dim3((unsigned)(((size_t)a->n * a->ld / 4 + 255) / 256)), 256, 0, stream, *a, out);
	if (a->bf16 == nullptr && e->n_rows > 0)
		CU_LAUNCH(square_exceptions, dim3((e->n_rows + 127) / 128), 128, 0, stream, *a, *e, out);
}

__global__ void
square_inputs(const float *xs, size_t ld, uint32_t rows, uint32_t squares, uint32_t t, float *out)
{
	uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;

	if (i < squares * t)
		out[i] = i % t < rows ? xs[i % t * ld + i / t] : 1.0f;
}

extern "C" void
cu_square_inputs(const struct cu_linear *a, uint32_t t, float *out, cudaStream_t stream)
{
	uint32_t squares = k_squares(a->ld);

	CU_LAUNCH(square_inputs, dim3((squares * t + 255) / 256), 256, 0, stream, a->xs, a->ldxs, a->rows, squares, t, out);
}

__global__ void
apply_scales(struct cu_linear a, const float *t, size_t ldt, bool tensor)
{
	uint32_t c = blockIdx.y * blockDim.x + threadIdx.x, r = blockIdx.x;

	if (c < a.n)
		write_y(a, true, r, c, t[r * ldt + c], tensor ? a.tscale[c] : a.scale[c]);
}

extern "C" void
cu_apply_scales(const struct cu_linear *a, const float *t, size_t ldt, cudaStream_t stream)
{
	CU_LAUNCH(apply_scales, dim3(a->rows, (a->n + 255) / 256), 256, 0, stream, *a, t, ldt, a->kind == CU_W_E4M3T);
}

__global__ void
add_bias(float *y, size_t ldy, uint32_t n, const float *bias)
{
	uint32_t c = blockIdx.y * blockDim.x + threadIdx.x;

	if (c < n)
		y[blockIdx.x * ldy + c] += bias[c];
}

extern "C" void
cu_add_bias(float *y, size_t ldy, uint32_t rows, uint32_t n, const float *bias, cudaStream_t stream)
{
	CU_LAUNCH(add_bias, dim3(rows, (n + 255) / 256), 256, 0, stream, y, ldy, n, bias);
}
