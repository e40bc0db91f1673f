/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From logits to a token, one block a row, as daemon/engine/sample.c does it: the same uniform number of (seed,
 * position), the same order of candidates (probability, then id). Probabilities are whole multiples of 2^-45 of the
 * likeliest here, so that their sums are exact in any order and the choice is the same in every run; what is less likely
 * than that is never drawn.
 *
 * Instead of a sort: the candidates' order is only asked "where does the sum, from the top, reach so much?". Four passes
 * over histograms of 12 bits answer that.
 */
#include "kernels/cuda/arch.cuh"
#include "kernels/cuda/cu.h"

#ifdef OCTET_EMU
#define THREADS 128 /* each is a fiber there */
#else
#define THREADS 1024
#endif
#define WARPS (THREADS / 32)
#define ONE ((uint64_t)1 << 45) /* weight of the likeliest */
#define BITS 12
#define BINS (1 << BITS)

typedef unsigned long long u64;

struct row {
	float *logits;
	u64 *weight;
	uint32_t vocab;
};

struct best {
	float value;
	uint32_t id;
};

struct shared {
	u64 bin[BINS];
	u64 sum[WARPS];
	double dsum[WARPS];
	struct best top[WARPS];
	struct best found;
	u64 word;
	uint32_t id;
};

/* What the threads before this one have, and all together. */
static __device__ u64
sum_before(u64 mine, u64 *all, struct shared &sh)
{
	const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
	u64 v = mine, before = 0, total = 0;

	for (int o = 1; o < 32; o *= 2) {
		u64 up = __shfl_up_sync(CU_FULL, v, o);

		v += lane >= (uint32_t)o ? up : 0;
	}
	if (lane == 31)
		sh.sum[warp] = v;
	__syncthreads();
	for (uint32_t w = 0; w < WARPS; w++) {
		before += w < warp ? sh.sum[w] : 0;
		total += sh.sum[w];
	}
	__syncthreads();
	*all = total;
	return before + v - mine;
}

static __device__ __forceinline__ bool
better(struct best a, struct best b)
{
	return a.value > b.value || (a.value == b.value && a.id < b.id);
}

/* The highest logit behind `after` in the order of value and id. */
static __device__ struct best
next_best(const struct row &r, struct best after, struct shared &sh)
{
	struct best b = {__uint_as_float(0xff800000u), CU_NONE};

#pragma unroll 8
	for (uint32_t i = threadIdx.x; i < r.vocab; i += THREADS) {
		struct best c = {r.logits[i], i};

		if (better(c, b) && better(after, c))
			b = c;
	}
	for (int o = 16; o > 0; o /= 2) {
		struct best c = {__shfl_xor_sync(CU_FULL, b.value, o), __shfl_xor_sync(CU_FULL, b.id, o)};

		b = better(c, b) ? c : b;
	}
	if (threadIdx.x % 32 == 0)
		sh.top[threadIdx.x / 32] = b;
	__syncthreads();
	if (threadIdx.x == 0) {
		for (int i = 1; i < WARPS; i++)
			b = better(sh.top[i], b) ? sh.top[i] : b;
		sh.found = b;
	}
	__syncthreads();
	b = sh.found;
	__syncthreads();
	return b;
}

static __device__ struct best
first_best(const struct row &r, struct shared &sh)
{
	struct best all = {__uint_as_float(0x7f800000u), 0};

	return next_best(r, all, sh);
}

static __device__ double
log_sum_exp(const struct row &r, float max, struct shared &sh)
{
	double sum = 0;

	for (uint32_t i = threadIdx.x; i < r.vocab; i += THREADS)
		sum += exp((double)r.logits[i] - max);
	for (int o = 16; o > 0; o /= 2)
		sum += __shfl_xor_sync(CU_FULL, sum, o);
	if (threadIdx.x % 32 == 0)
		sh.dsum[threadIdx.x / 32] = sum;
	__syncthreads();
	sum = 0;
	for (int w = 0; w < WARPS; w++)
		sum += sh.dsum[w];
	sum = log(sum) + max;
	__syncthreads();
	return sum;
}

/* ids [from, to) of a thread: neighbours, so that sums over threads are sums over ids. */
static __device__ __forceinline__ void
share(const struct row &r, uint32_t *from, uint32_t *to)
{
	uint32_t per = (r.vocab + THREADS - 1) / THREADS;

	*from = min(threadIdx.x * per, r.vocab);
	*to = min(*from + per, r.vocab);
}

/* Of those of one weight w (or, w = 0, of all), the id where the measure, in the order of ids, reaches target. */
static __device__ uint32_t
find_id(const struct row &r, u64 w, u64 target, struct shared &sh)
{
	uint32_t from, to;
	u64 sum = 0;

	share(r, &from, &to);
	for (uint32_t i = from; i < to; i++)
		sum += w == 0 ? r.weight[i] : r.weight[i] == w;
	if (threadIdx.x == 0)
		sh.id = CU_NONE;
	u64 all, at = sum_before(sum, &all, sh);

	if (at < target && at + sum >= target)
		for (uint32_t i = from; i < to; i++) {
			at += w == 0 ? r.weight[i] : r.weight[i] == w;
			if (at >= target) {
				sh.id = i;
				break;
			}
		}
	__syncthreads();
	uint32_t id = sh.id;

	__syncthreads();
	return id;
}

/*
 * The weight at which the measure (how many, or their weights' sum) from the top reaches target; *rest is what those of
 * this weight have to bring.
 */
static __device__ u64
descend(const struct row &r, bool count, u64 target, u64 *rest, struct shared &sh)
{
	u64 prefix = 0;
	const uint32_t per = BINS / THREADS, top = BINS - threadIdx.x * per; /* a thread's bins, from the top */

	for (int shift = 48 - BITS; shift >= 0; shift -= BITS) {
		u64 low = 0, mine = 0, all;

		for (uint32_t i = threadIdx.x; i < BINS; i += THREADS)
			sh.bin[i] = 0;
		__syncthreads();
		for (uint32_t i = threadIdx.x; i < r.vocab; i += THREADS) {
			u64 w = r.weight[i];

			if (w == 0 || w >> shift >> BITS != prefix)
				continue;
			/* Most tokens are unlikely: in bin 0, where all threads would wait for each other. */
			if ((w >> shift & (BINS - 1)) == 0)
				low += count ? (u64)1 : w;
			else
				atomicAdd(&sh.bin[w >> shift & (BINS - 1)], count ? (u64)1 : w);
		}
		sum_before(low, &low, sh); /* its barriers: the bins are complete */
		if (threadIdx.x == 0)
			sh.bin[0] = low, sh.id = 0;
		__syncthreads();
		for (uint32_t b = top - per; b < top; b++)
			mine += sh.bin[b];
		u64 above = sum_before(mine, &all, sh);

		/* The thread in whose bins the target lies; none: bin 0, with all that is above it. */
		if (threadIdx.x == THREADS - 1 && above + mine < target)
			sh.word = above + mine - sh.bin[0];
		if (above < target && above + mine >= target)
			for (uint32_t b = top; b-- > top - per; above += sh.bin[b])
				if (above + sh.bin[b] >= target || b == 0) {
					sh.word = above, sh.id = b;
					break;
				}
		__syncthreads();
		target -= sh.word;
		prefix = prefix << BITS | sh.id;
		__syncthreads();
	}
	*rest = target;
	return prefix;
}

/* What those above a weight sum to, and how many there are of any. */
static __device__ u64
sum_above(const struct row &r, u64 w, u64 *n, struct shared &sh)
{
	u64 sum = 0, count = 0;

	for (uint32_t i = threadIdx.x; i < r.vocab; i += THREADS) {
		sum += r.weight[i] > w ? r.weight[i] : 0;
		count += r.weight[i] > w;
	}
	sum_before(sum, &sum, sh);
	sum_before(count, n, sh);
	return sum;
}

/* Philox4x32-10, the first block at counter `position`: as sample_uniform(). */
static __device__ double
uniform(uint64_t seed, uint32_t position)
{
	uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);

	for (int i = 0; i < 10; i++) {
		uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;

		c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
		c1 = (uint32_t)b;
		c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
		c3 = (uint32_t)a;
		k0 += 0x9E3779B9u;
		k1 += 0xBB67AE85u;
	}
	return (double)(((uint64_t)c0 << 21) ^ (c1 >> 11)) * 0x1p-53;
}

static __device__ uint32_t
draw(const struct row &r, const struct cu_want &w, float max, struct shared &sh)
{
	bool sorted = w.top_k != 0 || w.top_p < 1.0f;
	u64 n, sum, rest, edge;

	for (uint32_t i = threadIdx.x; i < r.vocab; i += THREADS) {
		double p = exp(((double)r.logits[i] - max) / w.temperature);

		r.weight[i] = p >= w.min_p ? (u64)(p * (double)ONE) : 0;
	}
	__syncthreads();
	sum = sum_above(r, 0, &n, sh);
	if (w.top_k != 0 && w.top_k < n) {
		edge = descend(r, true, w.top_k, &rest, sh);
		sum = sum_above(r, edge, &n, sh) + rest * edge;
	}
	if (w.top_p < 1.0f) {
		double want = ceil((double)w.top_p * (double)sum);
		u64 target = want < 1 ? 1 : (u64)want;

		edge = descend(r, false, target < sum ? target : sum, &rest, sh);
		sum = sum_above(r, edge, &n, sh) + (rest + edge - 1) / edge * edge;
	}
	u64 target = (u64)(uniform(w.seed, w.position) * (double)sum) + 1;

	target = target < sum ? target : sum;
	if (!sorted)
		return find_id(r, 0, target, sh);
	edge = descend(r, false, target, &rest, sh);
	return find_id(r, edge, (rest + edge - 1) / edge, sh);
}

/* The token of a drawn row was not known when the edits were made. */
static __device__ void
count_drawn(const struct cu_want &w, struct kd_edit *edit, uint32_t token, struct shared &sh)
{
	const uint32_t last = w.first_edit + w.n_edit - 1;

	if (threadIdx.x == 0)
		sh.id = CU_NONE;
	__syncthreads();
	for (uint32_t i = w.first_edit + threadIdx.x; i < last; i += THREADS)
		if (edit[i].id == token)
			sh.id = i;
	__syncthreads();
	if (threadIdx.x == 0) {
		struct kd_edit *e = &edit[sh.id != CU_NONE ? sh.id : last];

		if (sh.id == CU_NONE)
			e->id = token, e->n_output = 0, e->bias = 0;
		e->seen = true;
		e->n_output++;
	}
	__syncthreads();
}

/* Logits that penalties and biases change; what they were goes to the edit, for the token's log-probability. */
static __device__ void
change(const struct row &r, const struct cu_want &w, struct kd_edit *edit)
{
	for (uint32_t i = threadIdx.x; i < w.n_edit; i += THREADS) {
		struct kd_edit *e = &edit[w.first_edit + i];

		if (e->id == CU_NONE)
			continue;
		float plain = r.logits[e->id], l = plain;

		if (e->seen)
			l = l > 0 ? __fdiv_rn(l, w.repetition) : __fmul_rn(l, w.repetition);
		if (e->n_output > 0)
			l -= __fadd_rn(w.presence, __fmul_rn(w.frequency, (float)e->n_output));
		r.logits[e->id] = l + e->bias;
		e->bias = plain;
	}
	__syncthreads();
}

static __device__ float
plain_logit(const struct row &r, const struct cu_want &w, const struct kd_edit *edit, uint32_t token, struct shared &sh)
{
	if (threadIdx.x == 0)
		sh.found.value = r.logits[token];
	__syncthreads();
	for (uint32_t i = threadIdx.x; i < w.n_edit; i += THREADS)
		if (edit[w.first_edit + i].id == token)
			sh.found.value = edit[w.first_edit + i].bias;
	__syncthreads();
	return sh.found.value;
}

__global__ void __launch_bounds__(THREADS)
sample(float *logits, size_t ld, uint32_t vocab, const struct cu_want *wants, struct kd_edit *edit, const uint32_t *tokens,
    const uint32_t *from, u64 *weight, struct kd_result *results)
{
	__shared__ struct shared sh;
	const struct row r = {logits + blockIdx.x * ld, weight + (size_t)blockIdx.x * vocab, vocab};
	const struct cu_want w = wants[blockIdx.x];
	struct kd_result *out = &results[blockIdx.x];
	struct best first, b;
	double lse = 0;
	bool bad = false;
	uint32_t token;

	if (w.kind != KD_SCORE && w.kind != KD_DRAW)
		return;
#pragma unroll 8
	for (uint32_t i = threadIdx.x; i < vocab; i += THREADS)
		bad |= !(r.logits[i] * 0.0f == 0.0f);
	if (threadIdx.x == 0)
		sh.id = 0;
	__syncthreads();
	if (bad)
		sh.id = 1;
	__syncthreads();
	bad = sh.id != 0;
	__syncthreads();
	if (threadIdx.x == 0)
		out->bad = bad, out->n_top = 0, out->logprob = 0, out->token = 0;
	if (bad)
		return;
	first = first_best(r, sh);
	if (w.logprob)
		lse = log_sum_exp(r, first.value, sh);
	b = first;
	for (uint32_t i = 0; i < w.n_top && i < vocab; i++) {
		if (threadIdx.x == 0)
			out->top_id[i] = b.id, out->top_logprob[i] = (float)(b.value - lse), out->n_top = i + 1;
		b = next_best(r, b, sh);
	}
	if (w.kind == KD_SCORE) {
		token = w.token;
	} else {
		if (w.drawn)
			count_drawn(w, edit, tokens[from[blockIdx.x]], sh);
		if (w.n_edit > 0) {
			change(r, w, edit);
			first = first_best(r, sh);
		}
		token = w.temperature > 0 ? draw(r, w, first.value, sh) : first.id;
	}
	if (w.logprob)
		first.value = w.kind == KD_SCORE ? r.logits[token] : plain_logit(r, w, edit, token, sh);
	if (threadIdx.x == 0) {
		out->token = token;
		if (w.logprob)
			out->logprob = (float)((double)first.value - lse);
	}
}

extern "C" void
cu_sample(float *logits, size_t ld, uint32_t vocab, const struct cu_want *want, struct kd_edit *edit, const uint32_t *token,
    const uint32_t *from, uint32_t rows, uint64_t *weight, struct kd_result *out, cudaStream_t stream)
{
	CU_LAUNCH(sample, dim3(rows), THREADS, 0, stream, logits, ld, vocab, want, edit, token, from, (u64 *)weight, out);
}
