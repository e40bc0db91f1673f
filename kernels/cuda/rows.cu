/* SPDX-License-Identifier: Apache-2.0 */
/* One block a row: embedding, RMSNorm and SiLU*mul with their output encoded for the linear layers that follow; what FP8
 * makes of one row of it. */
#include "kernels/cuda/arch.cuh"
#include "kernels/cuda/cu.h"

#define THREADS 256

/* Row r as BF16, as E4M3 with scale s, or both; zeros from n to the multiple of 32 that readers go to. get(i): the value. */
template <class F>
static __device__ __forceinline__ void
encode(const struct cu_encoded &e, uint32_t r, uint32_t n, float s, F get)
{
	uint32_t pad = (n + CU_LD - 1) / CU_LD * CU_LD;

	for (uint32_t i = threadIdx.x * 2; i < pad; i += blockDim.x * 2) {
		float a = i < n ? get(i) : 0, b = i + 1 < n ? get(i + 1) : 0;

		if (e.xb != nullptr)
			*reinterpret_cast<uint32_t *>(e.xb + r * e.ld + i) = cu_bf16x2(a, b);
		if (e.xq != nullptr)
			*reinterpret_cast<uint16_t *>(e.xq + r * e.ld + i) = (uint16_t)cu_e4m3x2(__fdiv_rn(a, s), __fdiv_rn(b, s));
	}
}

/* A NaN stays one: it must reach the logits. */
static __device__ __forceinline__ float
absmax(float m, float v)
{
	return v != v || m != m ? __uint_as_float(0x7fc00000u) : fmaxf(m, fabsf(v)); /* fmaxf() would forget it */
}

/* fp8b: a warp takes 128 inputs, four a lane; zeros up to the multiple of 32 that readers go to. */
template <class F>
static __device__ __forceinline__ void
encode_squares(const struct cu_encoded &e, uint32_t r, uint32_t n, F get)
{
	const uint32_t pad = (n + CU_LD - 1) / CU_LD * CU_LD, lane = threadIdx.x % 32;

	for (uint32_t b = threadIdx.x / 32; e.xqb != nullptr && b * K_SQUARE < n; b += blockDim.x / 32) {
		const uint32_t at = b * K_SQUARE + lane * 4;
		float v[4], m = 0, s;

		for (int i = 0; i < 4; i++) {
			v[i] = at + i < n ? get(at + i) : 0;
			m = absmax(m, v[i]);
		}
		const bool nan = __ballot_sync(CU_FULL, m != m) != 0;

		m = cu_warp_max(m != m ? 0 : m);
		s = nan ? __uint_as_float(0x7fc00000u) : cu_scale_of(m);
		if (lane == 0)
			e.xsb[r * e.ldb + b] = s;
		if (at < pad)
			*reinterpret_cast<uint32_t *>(e.xqb + r * e.ld + at) = cu_e4m3x2(__fdiv_rn(v[0], s), __fdiv_rn(v[1], s)) |
			    cu_e4m3x2(__fdiv_rn(v[2], s), __fdiv_rn(v[3], s)) << 16;
	}
}

/* As daemon/engine/evidence.c has it. */
template <class F>
static __device__ __forceinline__ void
observe(struct kd_evidence *seen, uint32_t n, float *scratch, F get)
{
	float m = 0, zeros = 0, saturated = 0;

	for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
		m = fmaxf(m, fabsf(get(i)));
	m = cu_block_reduce(m, true, scratch);
	for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
		float v = get(i);

		zeros += cu_becomes_zero(v, m);
		saturated += cu_becomes_largest(v, m);
	}
	zeros = cu_block_reduce(zeros, false, scratch); /* whole numbers below 2^24: exact */
	saturated = cu_block_reduce(saturated, false, scratch);
	if (threadIdx.x == 0)
		*seen = {m, n, (uint32_t)zeros, (uint32_t)saturated};
}

/* SEEN: kernels of their own, since what a step in many is asked for would take registers of all others. */
template <bool SEEN, class F>
static __device__ __forceinline__ void
finish_row(const struct cu_encoded &e, uint32_t r, uint32_t n, float s, float *scratch, F get)
{
	encode(e, r, n, s, get);
	encode_squares(e, r, n, get);
	if (SEEN && r == e.seen_row)
		observe(e.seen, n, scratch, get);
}

/* The scale of a row from each thread's largest magnitude; NaN if one has it. */
static __device__ __forceinline__ float
row_scale(const struct cu_encoded &e, uint32_t r, float m, float *scratch)
{
	bool nan = m != m;
	float s;

	if (e.xq == nullptr)
		return 1;
	m = cu_block_reduce(nan ? 0 : m, true, scratch);
	nan = cu_block_reduce(nan ? 1.0f : 0.0f, true, scratch) != 0;
	s = nan ? __uint_as_float(0x7fc00000u) : cu_scale_of(m);
	if (threadIdx.x == 0)
		e.xs[r] = s;
	return s;
}

template <bool SEEN>
__global__ void __launch_bounds__(THREADS)
rmsnorm(const float *x, size_t ldx, const uint32_t *from, const float *w, uint32_t n, float eps, struct cu_encoded e)
{
	__shared__ float scratch[33];
	uint32_t r = blockIdx.x;
	const float *v = x + (from != nullptr ? from[r] : r) * ldx;
	float sum = 0, m = 0, f;

	/* One pass: absmax(y) is known up to the factor f. */
	for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
		sum = fmaf(v[i], v[i], sum);
	sum = cu_block_reduce(sum, false, scratch);
	f = __fdiv_rn(1.0f, __fsqrt_rn(sum / (float)n + eps));
	for (uint32_t i = threadIdx.x; e.xq != nullptr && i < n; i += blockDim.x)
		m = absmax(m, __fmul_rn(__fmul_rn(v[i], f), w[i]));
	float s = row_scale(e, r, m, scratch);

	auto get = [=](uint32_t i) { return __fmul_rn(__fmul_rn(v[i], f), w[i]); };

	finish_row<SEEN>(e, r, n, s, scratch, get);
}

extern "C" void
cu_rmsnorm(const float *x, size_t ldx, const uint32_t *from, const float *w, uint32_t n, float eps, uint32_t rows,
    const struct cu_encoded *e, cudaStream_t stream)
{
	auto kernel = e->seen != nullptr ? rmsnorm<true> : rmsnorm<false>;

	CU_LAUNCH(kernel, dim3(rows), THREADS, 0, stream, x, ldx, from, w, n, eps, *e);
}

static __device__ __forceinline__ float
silu_mul_of(const float *gate, uint32_t n, uint32_t i)
{
	return __fmul_rn(__fdiv_rn(gate[i], __fadd_rn(1.0f, cu_exp(-gate[i]))), gate[n + i]);
}

/* Values are made twice where FP8 wants their largest first: an exp costs less than 4 bytes of memory. */
template <bool SEEN>
__global__ void __launch_bounds__(THREADS)
silu_mul(const float *gu, uint32_t n, struct cu_encoded e)
{
	__shared__ float scratch[33];
	uint32_t r = blockIdx.x;
	const float *v = gu + (size_t)r * 2 * n;
	float m = 0;

	for (uint32_t i = threadIdx.x; e.xq != nullptr && i < n; i += blockDim.x)
		m = absmax(m, silu_mul_of(v, n, i));
	float s = row_scale(e, r, m, scratch);

	auto get = [=](uint32_t i) { return silu_mul_of(v, n, i); };

	finish_row<SEEN>(e, r, n, s, scratch, get);
}

extern "C" void
cu_silu_mul(const float *gu, uint32_t n, uint32_t rows, const struct cu_encoded *e, cudaStream_t stream)
{
	auto kernel = e->seen != nullptr ? silu_mul<true> : silu_mul<false>;

	CU_LAUNCH(kernel, dim3(rows), THREADS, 0, stream, gu, n, *e);
}

/* The merge of attention's splits is a row's work too: [n_heads, splits, hd + 2] of output, max and sum. */
static __device__ __forceinline__ float
merged(const float *part, uint32_t splits, uint32_t hd, uint32_t i)
{
	const float *p = part + (size_t)(i / hd) * splits * (hd + 2);
	float m = __uint_as_float(0xff800000u), l = 0, o = 0;

	for (uint32_t s = 0; s < splits; s++, p += hd + 2) {
		float pm = p[hd], to, fa, fb;

		if (p[hd + 1] == 0)
			continue; /* no position of this split */
		to = pm > m ? pm : m;
		fa = l == 0 ? 0 : cu_exp(m - to), fb = cu_exp(pm - to);
		l = fmaf(l, fa, p[hd + 1] * fb);
		o = fmaf(o, fa, p[i % hd] * fb);
		m = to;
	}
	return l == 0 ? 0 : __fdiv_rn(o, l);
}

template <bool SEEN>
__global__ void __launch_bounds__(THREADS)
merge(struct cu_attention a, float *attn, struct cu_encoded e)
{
	__shared__ float scratch[33];
	uint32_t r = blockIdx.x, n = a.n_heads * a.hd;
	const float *part = a.part + (size_t)r * a.n_heads * a.splits * (a.hd + 2);
	float *out = attn + (size_t)r * n, m = 0;

	if (a.first[r] == CU_NONE)
		return;
	for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
		float v = merged(part, a.splits, a.hd, i);

		out[i] = v;
		m = absmax(m, v);
	}
	float s = row_scale(e, r, m, scratch);

	__syncthreads();
	auto get = [=](uint32_t i) { return out[i]; };

	finish_row<SEEN>(e, r, n, s, scratch, get);
}

extern "C" void
cu_attention_merge(const struct cu_attention *a, float *attn, const struct cu_encoded *e, cudaStream_t stream)
{
	auto kernel = e->seen != nullptr ? merge<true> : merge<false>;

	CU_LAUNCH(kernel, dim3(a->rows), THREADS, 0, stream, *a, attn, *e);
}

/* A row's token; what the step before drew is written down for those that read it later. */
static __device__ __forceinline__ uint32_t
token_of(uint32_t *token, const struct kd_result *drawn, uint32_t r, uint32_t vocab)
{
	uint32_t t = token[r];

	if (!(t & CU_DRAWN))
		return t;
	t = drawn[t & ~CU_DRAWN].token;
	t = t < vocab ? t : 0;
	__syncthreads();
	if (threadIdx.x == 0)
		token[r] = t;
	return t;
}

__global__ void
embed_plain(uint32_t *token, const struct kd_result *drawn, const uint16_t *embed, uint32_t hidden, size_t ld, uint32_t vocab,
    float *x)
{
	uint32_t r = blockIdx.x, t = token_of(token, drawn, r, vocab);

	for (uint32_t i = threadIdx.x; i < hidden; i += blockDim.x)
		x[(size_t)r * hidden + i] = cu_float_of_bf16(embed[t * ld + i]);
}

__global__ void
embed_nested(uint32_t *token, const struct kd_result *drawn, struct cu_linear w, struct cu_exceptions e, uint32_t hidden,
    uint32_t vocab, float *x)
{
	uint32_t r = blockIdx.x, t = token_of(token, drawn, r, vocab), lo = 0, hi = e.n_rows;
	const size_t at = (size_t)t * w.ld;

	for (uint32_t i = threadIdx.x * 4; i < hidden; i += blockDim.x * 4) {
		uint32_t pair[2];

		cu_nested_x4(*reinterpret_cast<const uint32_t *>(w.hi + at + i), *reinterpret_cast<const uint32_t *>(w.lo + at + i),
		    pair);
		for (uint32_t j = 0; j < 4 && i + j < hidden; j++)
			x[(size_t)r * hidden + i + j] = (j % 2 ? cu_hi(pair[j / 2]) : cu_lo(pair[j / 2])) * w.scale[t];
	}
	__syncthreads();
	while (lo < hi) {
		uint32_t mid = (lo + hi) / 2;

		if (e.row[mid] < t)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo == e.n_rows || e.row[lo] != t)
		return;
	for (uint32_t j = e.first[lo] + threadIdx.x; j < e.first[lo + 1]; j += blockDim.x)
		x[(size_t)r * hidden + e.col[j]] = cu_float_of_bf16(e.master[j]);
}

extern "C" void
cu_embed(uint32_t *token, const struct kd_result *drawn, uint32_t rows, const uint16_t *embed, const struct cu_linear *nested,
    const struct cu_exceptions *e, uint32_t hidden, size_t ld, uint32_t vocab, float *x, cudaStream_t stream)
{
	if (embed != nullptr)
		CU_LAUNCH(embed_plain, dim3(rows), THREADS, 0, stream, token, drawn, embed, hidden, ld, vocab, x);
	else
		CU_LAUNCH(embed_nested, dim3(rows), THREADS, 0, stream, token, drawn, *nested, *e, hidden, vocab, x);
}

__global__ void
check_finite(const float *v, uint32_t n, uint32_t site, uint32_t *first_bad)
{
	bool bad = false;

	for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
		bad |= !(v[i] * 0.0f == 0.0f);
	if (bad)
		atomicMin(first_bad, site);
}

extern "C" void
cu_check_finite(const float *v, uint32_t n, uint32_t site, uint32_t *first_bad, cudaStream_t stream)
{
	CU_LAUNCH(check_finite, dim3(1), THREADS, 0, stream, v, n, site, first_bad);
}
