/* SPDX-License-Identifier: Apache-2.0 */
/*
 * RoPE with the write of K and V; attention over pages in either format. As on
 * the CPU, each absolute block of 32 positions has its own maximum, its
 * probabilities are rounded to BF16, and blocks merge into a running output: the
 * one difference is the order of sums.
 */
#include "kernels/cuda/arch.cuh"
#include "kernels/cuda/cu.h"

#define WARPS 4
#define INF __uint_as_float(0x7f800000u)

/* ---- q, k, v of a head ---- */

static __device__ __forceinline__ float
head_scale(const float *v, uint32_t hd, uint32_t lane)
{
	float m = 0;
	bool nan = false;

	for (uint32_t d = lane; d < hd; d += 32) {
		nan |= v[d] != v[d];
		m = fmaxf(m, fabsf(v[d]));
	}
	nan = __ballot_sync(CU_FULL, nan) != 0;
	m = cu_warp_max(m);
	return nan ? __uint_as_float(0x7fc00000u) : cu_scale_of(m);
}

/* K pages have a position's values side by side, V pages two positions of a value. */
static __device__ __forceinline__ size_t
page_at(bool is_v, uint32_t head, uint32_t slot, uint32_t d, uint32_t hd)
{
	return (size_t)head * 32 * hd + (is_v ? (slot / 2 * hd + d) * 2 + slot % 2 : slot * hd + d);
}

static __device__ __forceinline__ void
write_kv(const struct cu_attention &a, const struct kd_block &b, bool is_v, uint32_t head, uint32_t slot, const float *v,
    uint32_t lane)
{
	if (b.fp8 >> slot & 1) {
		uint8_t *page = reinterpret_cast<uint8_t *>(a.kv.mem + b.q * a.kv.page_elems) + (is_v ? a.kv.page_elems : 0);
		float s = head_scale(v, a.hd, lane);

		if (lane == 0)
			a.kv.scale[((size_t)b.q * 2 + is_v) * a.kv.n_kv * 32 + head * 32 + slot] = s;
		for (uint32_t d = lane; d < a.hd; d += 32)
			page[page_at(is_v, head, slot, d, a.hd)] = (uint8_t)cu_e4m3x2(__fdiv_rn(v[d], s), 0);
		return;
	}
	uint16_t *page = a.kv.mem + (is_v ? b.v : b.k) * a.kv.page_elems;

	for (uint32_t d = lane; d < a.hd; d += 32)
		page[page_at(is_v, head, slot, d, a.hd)] = (uint16_t)cu_bf16x2(v[d], 0);
}

/* What FP8 makes of a head's values. */
static __device__ __forceinline__ void
observe_head(struct kd_evidence *seen, const float *v, uint32_t hd, uint32_t lane)
{
	float m = 0, zeros = 0, saturated = 0;

	for (uint32_t d = lane; d < hd; d += 32)
		m = fmaxf(m, fabsf(v[d]));
	m = cu_warp_max(m);
	for (uint32_t d = lane; d < hd; d += 32) {
		zeros += cu_becomes_zero(v[d], m);
		saturated += cu_becomes_largest(v[d], m);
	}
	zeros = cu_warp_sum(zeros), saturated = cu_warp_sum(saturated);
	if (lane != 0)
		return;
	atomicMax(reinterpret_cast<uint32_t *>(&seen->absmax), __float_as_uint(m)); /* magnitudes are ordered as their bits are */
	atomicAdd(&seen->n, hd);
	atomicAdd(&seen->zeros, (uint32_t)zeros);
	atomicAdd(&seen->saturated, (uint32_t)saturated);
}

/* A warp a head: those of q, then of k, then of v. SEEN: one row's K and V are measured. */
template <bool SEEN>
__global__ void __launch_bounds__(WARPS * 32)
rope_kv(struct cu_attention a)
{
	__shared__ float heads[WARPS][256];
	const uint32_t lane = threadIdx.x % 32, r = blockIdx.x, half = a.hd / 2;
	const uint32_t n = a.n_heads + 2 * a.kv.n_kv, h = blockIdx.y * WARPS + threadIdx.x / 32;
	float *v = heads[threadIdx.x / 32];

	if (h >= n || a.first[r] == CU_NONE)
		return;
	const bool is_q = h < a.n_heads, is_v = h >= a.n_heads + a.kv.n_kv;
	const float *in = a.qkv + ((size_t)r * n + h) * a.hd, *norm = is_q ? a.q_norm : is_v ? nullptr : a.k_norm;
	const uint32_t pos = a.pos[r];
	float f = 1;

	if (norm != nullptr) {
		float sum = 0;

		for (uint32_t d = lane; d < a.hd; d += 32)
			sum = fmaf(in[d], in[d], sum);
		f = __fdiv_rn(1.0f, __fsqrt_rn(cu_warp_sum(sum) / (float)a.hd + a.eps));
	}
	for (uint32_t d = lane; d < a.hd; d += 32)
		v[d] = norm != nullptr ? __fmul_rn(__fmul_rn(in[d], f), norm[d]) : in[d];
	__syncwarp();
	for (uint32_t d = lane; a.cos != nullptr && !is_v && d < half; d += 32) {
		float c = a.cos[(size_t)pos * half + d], s = a.sin[(size_t)pos * half + d], x = v[d], y = v[d + half];

		v[d] = fmaf(x, c, -__fmul_rn(y, s));
		v[d + half] = fmaf(y, c, __fmul_rn(x, s));
	}
	__syncwarp();
	if (is_q) {
		uint16_t *q = a.q + ((size_t)r * a.n_heads + h) * a.hd;

		for (uint32_t d = lane; d < a.hd; d += 32)
			q[d] = (uint16_t)cu_bf16x2(v[d], 0);
		return;
	}
	write_kv(a, a.table[a.first[r] + (size_t)(pos / 32) * a.n_layers + a.layer], is_v,
	    h - a.n_heads - (is_v ? a.kv.n_kv : 0), pos % 32, v, lane);
	if (SEEN && r == a.seen_row)
		observe_head(a.seen, v, a.hd, lane);
}

extern "C" void
cu_rope_kv(const struct cu_attention *a, cudaStream_t stream)
{
	auto kernel = a->seen != nullptr ? rope_kv<true> : rope_kv<false>;

	CU_LAUNCH(kernel, dim3(a->rows, (a->n_heads + 2 * a->kv.n_kv + WARPS - 1) / WARPS), WARPS * 32, 0, stream, *a);
}

/* ---- reading pages ---- */

struct page_view {
	struct cu_kv kv;
	struct kd_block b;
	uint32_t head, hd;
	uint32_t valid;  /* bit j: position j is one that some row of the tile may see; the rest may hold anything */
};

static __device__ __forceinline__ const uint8_t *
fp8_page(const struct page_view &p, bool is_v)
{
	return reinterpret_cast<const uint8_t *>(p.kv.mem + p.b.q * p.kv.page_elems) + (is_v ? p.kv.page_elems : 0);
}

static __device__ __forceinline__ float
kv_scale(const struct page_view &p, bool is_v, uint32_t slot)
{
	if (!(p.b.fp8 & p.valid & 1u << slot))
		return 1;
	return p.kv.scale[((size_t)p.b.q * 2 + is_v) * p.kv.n_kv * 32 + p.head * 32 + slot];
}

/* Eight values of K from d on, as pairs of BF16. */
static __device__ __forceinline__ uint4
load_k(const struct page_view &p, uint32_t slot, uint32_t d)
{
	size_t at = page_at(false, p.head, slot, d, p.hd);

	if (!(p.valid >> slot & 1))
		return make_uint4(0, 0, 0, 0);
	if (p.b.fp8 >> slot & 1) {
		uint2 v = *reinterpret_cast<const uint2 *>(fp8_page(p, false) + at);
		uint32_t out[4];

		cu_bf16_of_e4m3x4(v.x, out);
		cu_bf16_of_e4m3x4(v.y, out + 2);
		return make_uint4(out[0], out[1], out[2], out[3]);
	}
	return *reinterpret_cast<const uint4 *>(p.kv.mem + p.b.k * p.kv.page_elems + at);
}

static __device__ __forceinline__ uint32_t
v_bits(const struct page_view &p, uint32_t slot, uint32_t d)
{
	size_t at = page_at(true, p.head, slot, d, p.hd);

	if (!(p.valid >> slot & 1))
		return 0;
	if (p.b.fp8 >> slot & 1)
		return cu_bf16x2(cu_float_of_e4m3(fp8_page(p, true)[at]), 0) & 0xffff;
	return p.kv.mem[p.b.v * p.kv.page_elems + at];
}

/* V of positions 2 * pair and the next, at four d from d on: a pair of BF16 each. */
static __device__ __forceinline__ uint4
load_v(const struct page_view &p, uint32_t pair, uint32_t d)
{
	uint32_t out[4], which = p.b.fp8 >> 2 * pair & 3;
	size_t at = page_at(true, p.head, pair * 2, d, p.hd);

	if ((p.valid >> 2 * pair & 3) != 3 || which == 1 || which == 2) {
		for (uint32_t i = 0; i < 4; i++)
			out[i] = v_bits(p, pair * 2, d + i) | v_bits(p, pair * 2 + 1, d + i) << 16;
		return make_uint4(out[0], out[1], out[2], out[3]);
	}
	if (which == 3) {
		uint2 v = *reinterpret_cast<const uint2 *>(fp8_page(p, true) + at);

		cu_bf16_of_e4m3x4(v.x, out);
		cu_bf16_of_e4m3x4(v.y, out + 2);
		return make_uint4(out[0], out[1], out[2], out[3]);
	}
	return *reinterpret_cast<const uint4 *>(p.kv.mem + p.b.v * p.kv.page_elems + at);
}

/* A maximum would lose a NaN; as infinity it makes NaN of the sums, and so of the output. */
static __device__ __forceinline__ float
for_max(float s)
{
	return s != s ? INF : s;
}

/* What every kernel here knows of its tile. */
struct extent {
	uint32_t row0, n, first, last_pos, first_pos;
	uint32_t from, to;  /* blocks of this split */
};

static __device__ __forceinline__ uint32_t
first_seen(const struct cu_attention &a, uint32_t pos)
{
	return a.window != 0 && pos >= a.window ? pos - a.window + 1 : 0;
}

static __device__ __forceinline__ struct extent
extent_of(const struct cu_attention &a, uint32_t tile, uint32_t split)
{
	struct extent x;
	uint32_t lo, hi, per;

	x.row0 = a.tile[tile].row, x.n = a.tile[tile].n;
	x.first = x.n == 0 ? CU_NONE : a.first[x.row0];
	if (x.first == CU_NONE)
		return x;
	x.first_pos = first_seen(a, a.pos[x.row0]);
	x.last_pos = a.pos[x.row0 + x.n - 1];
	lo = x.first_pos / 32, hi = x.last_pos / 32 + 1;
	per = (hi - lo + a.splits - 1) / a.splits;
	x.from = min(lo + split * per, hi), x.to = min(x.from + per, hi);
	return x;
}

static __device__ __forceinline__ struct page_view
view_of(const struct cu_attention &a, const struct extent &x, uint32_t block, uint32_t head)
{
	struct page_view p = {a.kv, a.table[x.first + (size_t)block * a.n_layers + a.layer], head, a.hd, CU_FULL};

	if (block * 32 + 31 > x.last_pos)
		p.valid &= CU_FULL >> (31 - x.last_pos % 32);
	if (block * 32 < x.first_pos)
		p.valid &= CU_FULL << x.first_pos % 32;
	return p;
}

/*
 * 16 rows of queries in the fragments' rows: head i % group of position i / group of the tile, for one KV head. Lane
 * (g, t) of a score has rows g, g + 8 and columns 2t, 2t + 1 of each 8 positions.
 */
template <int HD>
struct state {
	uint32_t q[HD / 16][4];
	float out[HD / 8][4], max[2], sum[2];
};

template <int HD>
static __device__ __forceinline__ void
attend_block(const struct cu_attention &a, const struct page_view &p, uint32_t block, const uint32_t pos[2],
    struct state<HD> &st, uint32_t g, uint32_t t)
{
	float s[4][4] = {}, bm[2], bl[2], o[HD / 8][4] = {}, fa[2], fb[2];
	uint32_t pr[2][4];

#pragma unroll
	for (int n = 0; n < 4; n++)
#pragma unroll
		for (int u = 0; u < HD / 32; u++) {
			uint4 k = load_k(p, n * 8 + g, t * (HD / 4) + u * 8);
			uint32_t b0[2] = {k.x, k.y}, b1[2] = {k.z, k.w};

			cu_mma_bf16(s[n], st.q[2 * u], b0);
			cu_mma_bf16(s[n], st.q[2 * u + 1], b1);
		}
	bm[0] = bm[1] = -INF;
#pragma unroll
	for (int n = 0; n < 4; n++)
#pragma unroll
		for (int e = 0; e < 4; e++) {
			uint32_t slot = n * 8 + 2 * t + e % 2, at = block * 32 + slot;
			bool seen = pos[e / 2] != CU_NONE && at <= pos[e / 2] && at >= first_seen(a, pos[e / 2]);

			s[n][e] = seen ? __fmul_rn(__fmul_rn(s[n][e], kv_scale(p, false, slot)), a.scale) : -INF;
			bm[e / 2] = fmaxf(bm[e / 2], for_max(s[n][e]));
		}
#pragma unroll
	for (int h = 0; h < 2; h++) {
		bm[h] = fmaxf(bm[h], __shfl_xor_sync(CU_FULL, bm[h], 1));
		bm[h] = fmaxf(bm[h], __shfl_xor_sync(CU_FULL, bm[h], 2));
		bl[h] = 0;
	}
#pragma unroll
	for (int n = 0; n < 4; n++)
#pragma unroll
		for (int h = 0; h < 2; h++) {
			float e0 = bm[h] == -INF ? 0 : cu_exp(s[n][2 * h] - bm[h]), e1 = bm[h] == -INF ? 0 : cu_exp(s[n][2 * h + 1] - bm[h]);
			uint32_t v = cu_bf16x2(e0, e1), slot = n * 8 + 2 * t;

			bl[h] += cu_lo(v) + cu_hi(v);
			if (p.b.fp8 & p.valid & 3u << slot)
				v = cu_bf16x2(cu_lo(v) * kv_scale(p, true, slot), cu_hi(v) * kv_scale(p, true, slot + 1));
			pr[n / 2][n % 2 * 2 + h] = v;
		}
#pragma unroll
	for (int k = 0; k < 2; k++)
#pragma unroll
		for (int u = 0; u < HD / 32; u++) {
			uint4 v0 = load_v(p, k * 8 + t, g * (HD / 8) + u * 4), v1 = load_v(p, k * 8 + 4 + t, g * (HD / 8) + u * 4);
			uint32_t b[4][2] = {{v0.x, v1.x}, {v0.y, v1.y}, {v0.z, v1.z}, {v0.w, v1.w}};

#pragma unroll
			for (int i = 0; i < 4; i++)
				cu_mma_bf16(o[4 * u + i], pr[k], b[i]);
		}
#pragma unroll
	for (int h = 0; h < 2; h++) {
		bl[h] += __shfl_xor_sync(CU_FULL, bl[h], 1);
		bl[h] += __shfl_xor_sync(CU_FULL, bl[h], 2);
		float to = bm[h] > st.max[h] ? bm[h] : st.max[h];

		fa[h] = st.sum[h] == 0 ? 0 : cu_exp(st.max[h] - to);
		fb[h] = bm[h] == -INF && bl[h] == 0 ? 0 : cu_exp(bm[h] - to);
		st.sum[h] = fmaf(st.sum[h], fa[h], bl[h] * fb[h]);
		st.max[h] = to;
	}
#pragma unroll
	for (int n = 0; n < HD / 8; n++)
#pragma unroll
		for (int e = 0; e < 4; e++)
			st.out[n][e] = fmaf(st.out[n][e], fa[e / 2], o[n][e] * fb[e / 2]);
}

static __device__ __forceinline__ float *
part_of(const struct cu_attention &a, uint32_t row, uint32_t head, uint32_t split)
{
	return a.part + (((size_t)row * a.n_heads + head) * a.splits + split) * (a.hd + 2);
}

template <int HD, bool PREFILL>
__global__ void __launch_bounds__(WARPS * 32)
attend(struct cu_attention a)
{
	__shared__ float shared[PREFILL ? 1 : WARPS][PREFILL ? 1 : 16][PREFILL ? 1 : HD + 2];
	const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	const uint32_t tile = PREFILL ? blockIdx.x * WARPS + warp : blockIdx.x, kvh = blockIdx.y, split = blockIdx.z;
	const uint32_t group = a.n_heads / a.kv.n_kv;
	struct state<HD> st;
	struct extent x;
	uint32_t pos[2];

	if (tile >= a.n_tiles)
		return;
	x = extent_of(a, tile, split);
	if (x.first == CU_NONE)
		return;
#pragma unroll
	for (int h = 0; h < 2; h++) {
		uint32_t i = g + 8 * h, row = x.row0 + i / group;
		bool real = i < x.n * group;
		const uint16_t *q = a.q + ((size_t)row * a.n_heads + kvh * group + i % group) * HD + t * (HD / 4);

		pos[h] = real ? a.pos[row] : CU_NONE;
		st.max[h] = -INF, st.sum[h] = 0;
#pragma unroll
		for (int j = 0; j < HD / 16; j++) {
			uint2 v = real ? *reinterpret_cast<const uint2 *>(q + 4 * j) : make_uint2(0, 0);

			st.q[j][h] = v.x, st.q[j][2 + h] = v.y;
		}
	}
#pragma unroll
	for (int n = 0; n < HD / 8; n++)
		for (int e = 0; e < 4; e++)
			st.out[n][e] = 0;
	for (uint32_t b = x.from + (PREFILL ? 0 : warp); b < x.to; b += PREFILL ? 1 : WARPS)
		attend_block<HD>(a, view_of(a, x, b, kvh), b, pos, st, g, t);

#pragma unroll
	for (int h = 0; h < 2; h++) {
		uint32_t i = g + 8 * h;
		float *to = PREFILL ? part_of(a, x.row0 + i / group, kvh * group + i % group, split) : shared[warp % (PREFILL ? 1 : WARPS)][PREFILL ? 0 : i];

		if (PREFILL && pos[h] == CU_NONE)
			continue;
#pragma unroll
		for (int n = 0; n < HD / 8; n++) {
			to[2 * t * (HD / 8) + n] = st.out[n][2 * h];
			to[(2 * t + 1) * (HD / 8) + n] = st.out[n][2 * h + 1];
		}
		if (t == 0)
			to[HD] = st.max[h], to[HD + 1] = st.sum[h];
	}
	if (PREFILL)
		return;
	__syncthreads();
	for (uint32_t i = threadIdx.x; i < x.n * group * HD; i += WARPS * 32) {
		uint32_t r = i / HD, d = i % HD;
		float m = -INF, l = 0, o = 0, *to = part_of(a, x.row0 + r / group, kvh * group + r % group, split);

		for (int w = 0; w < WARPS; w++) {
			const float *from = shared[PREFILL ? 0 : w][PREFILL ? 0 : r];
			float wm = from[HD], wl = from[HD + 1], both = wm > m ? wm : m, fa, fb;

			if (wl == 0)
				continue;
			fa = l == 0 ? 0 : cu_exp(m - both), fb = cu_exp(wm - both);
			l = fmaf(l, fa, wl * fb);
			o = fmaf(o, fa, from[d] * fb);
			m = both;
		}
		to[d] = o;
		if (d == 0)
			to[HD] = m, to[HD + 1] = l;
	}
}

/* Any head size and any group, a warp for one row and KV head: slow, for models that have no better here. */
__global__ void __launch_bounds__(32)
attend_any(struct cu_attention a)
{
	__shared__ float q[256], out[256], prob[32];
	const uint32_t lane = threadIdx.x, kvh = blockIdx.y, split = blockIdx.z, group = a.n_heads / a.kv.n_kv;
	const struct extent x = extent_of(a, blockIdx.x, split);

	if (x.first == CU_NONE)
		return;
	for (uint32_t h = kvh * group; h < (kvh + 1) * group; h++) {
		float m = -INF, l = 0, *to = part_of(a, x.row0, h, split);

		for (uint32_t d = lane; d < a.hd; d += 32) {
			q[d] = cu_float_of_bf16(a.q[((size_t)x.row0 * a.n_heads + h) * a.hd + d]);
			out[d] = 0;
		}
		__syncwarp();
		for (uint32_t b = x.from; b < x.to; b++) {
			const struct page_view p = view_of(a, x, b, kvh);
			float s = 0, bm, e, both, fa, fb;

			for (uint32_t d = 0; d < a.hd; d++) {
				size_t at = page_at(false, kvh, lane, d, a.hd);

				if (p.valid >> lane & 1)
					s = fmaf(p.b.fp8 >> lane & 1 ? cu_float_of_e4m3(fp8_page(p, false)[at]) :
					    cu_float_of_bf16(a.kv.mem[p.b.k * a.kv.page_elems + at]), q[d], s);
			}
			s = p.valid >> lane & 1 ? __fmul_rn(__fmul_rn(s, kv_scale(p, false, lane)), a.scale) : -INF;
			bm = for_max(s);
			for (int o = 16; o > 0; o /= 2)
				bm = fmaxf(bm, __shfl_xor_sync(CU_FULL, bm, o));
			e = cu_lo(cu_bf16x2(cu_exp(s - bm), 0));
			prob[lane] = cu_lo(cu_bf16x2(e * kv_scale(p, true, lane), 0));
			e = cu_warp_sum(e);
			__syncwarp(); /* shuffles order no memory */
			both = bm > m ? bm : m;
			fa = l == 0 ? 0 : cu_exp(m - both), fb = cu_exp(bm - both);
			l = fmaf(l, fa, e * fb);
			m = both;
			for (uint32_t d = lane; d < a.hd; d += 32) {
				float o = 0;

				for (uint32_t j = 0; j < 32; j++)
					o = fmaf(cu_float_of_bf16(v_bits(p, j, d)), prob[j], o);
				out[d] = fmaf(out[d], fa, o * fb);
			}
			__syncwarp();
		}
		for (uint32_t d = lane; d < a.hd; d += 32)
			to[d] = out[d];
		if (lane == 0)
			to[a.hd] = m, to[a.hd + 1] = l;
		__syncwarp();
	}
}

extern "C" uint32_t
cu_attention_tile_rows(uint32_t n_heads, uint32_t n_kv, uint32_t hd)
{
	uint32_t group = n_heads / n_kv;

	return (hd == 64 || hd == 128) && group <= 16 ? 16 / group : 1;
}

extern "C" void
cu_attend(const struct cu_attention *a, cudaStream_t stream)
{
	bool any = (a->hd != 64 && a->hd != 128) || a->n_heads / a->kv.n_kv > 16;
	dim3 grid(a->prefill && !any ? (a->n_tiles + WARPS - 1) / WARPS : a->n_tiles, a->kv.n_kv, a->splits);
	auto d64 = attend<64, false>, p64 = attend<64, true>, d128 = attend<128, false>, p128 = attend<128, true>;

	if (any)
		CU_LAUNCH(attend_any, grid, 32, 0, stream, *a);
	else if (a->hd == 64 && a->prefill)
		CU_LAUNCH(p64, grid, WARPS * 32, 0, stream, *a);
	else if (a->hd == 64)
		CU_LAUNCH(d64, grid, WARPS * 32, 0, stream, *a);
	else if (a->prefill)
		CU_LAUNCH(p128, grid, WARPS * 32, 0, stream, *a);
	else
		CU_LAUNCH(d128, grid, WARPS * 32, 0, stream, *a);
}
