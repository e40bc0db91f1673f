/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What to know of a card before believing any plan for it, in about a minute:
 *   1 which scale modes of cuBLASLt run for the shapes of an 8B model, with how many rows, how fast, fast accumulation off and on, what
 *     timing its eight choices gains; how far off sums are, fast accumulation off and on, and octet's own kernels'
 *   2 what reading memory reaches
 *   3 unpacking E4M3: the conversion instruction against moving bits and multiplying, as fast as memory and without it
 *   4 what a graph and a flip cost by three ways: (A) a graph a plan, captured or taken over, (B) one with the nodes of both plans, half
 *     of them disabled, (C) one with SWITCH nodes
 *   5 own linear kernels by rows and format, over weights that no cache holds, and attention over BF16 and over FP8 pages
 *
 * tests/gpu/run.sh reads the lines that begin with lt, off, unpack, graph and attend.
 */
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cublasLt.h>
#include <cuda_runtime.h>

#include "kernels/cuda/arch.cuh"
#include "kernels/cuda/cu.h"

static cudaStream_t stream;

static void
must(cudaError_t e, const char *what)
{
	if (e != cudaSuccess) {
		printf("%s: %s\n", what, cudaGetErrorString(e));
		exit(1);
	}
}
#define MUST(x) must(x, #x)

static void *
make(size_t n)
{
	void *p;

	MUST(cudaMalloc(&p, n));
	MUST(cudaMemset(p, 0x11, n)); /* a small number in BF16, E4M3 and FP32 */
	MUST(cudaDeviceSynchronize()); /* the stream does not wait for the default one */
	return p;
}

template <class F> static float
time_us(int runs, F f)
{
	cudaEvent_t a, b;
	float ms;

	f();
	MUST(cudaEventCreate(&a));
	MUST(cudaEventCreate(&b));
	MUST(cudaEventRecord(a, stream));
	for (int i = 0; i < runs; i++)
		f();
	MUST(cudaEventRecord(b, stream));
	MUST(cudaEventSynchronize(b));
	MUST(cudaEventElapsedTime(&ms, a, b));
	cudaEventDestroy(a), cudaEventDestroy(b);
	return ms * 1e3f / runs;
}

/* Of the host, with all that it started. */
template <class F> static double
host_us(F f)
{
	MUST(cudaStreamSynchronize(stream));
	auto from = std::chrono::steady_clock::now();

	f();
	MUST(cudaStreamSynchronize(stream));
	return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - from).count();
}

static __host__ __device__ uint32_t
hash(uint32_t x)
{
	x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu;
	return x ^ x >> 16;
}

/* Words that are numbers below 2 as E4M3 and as BF16: a card is faster on equal ones. */
__global__ void
fill(uint32_t *p, size_t n)
{
	for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
		p[i] = hash((uint32_t)i) & 0xb7b7b7b7u;
}

__global__ void
ones(float *p, size_t n)
{
	for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
		p[i] = 1;
}

static void *
make_filled(size_t n)
{
	void *p = make(n);

	fill<<<1024, 256, 0, stream>>>(static_cast<uint32_t *>(p), n / 4);
	MUST(cudaGetLastError());
	return p;
}

static float *
make_ones(size_t n)
{
	float *p = static_cast<float *>(make(n * sizeof(*p)));

	ones<<<64, 256, 0, stream>>>(p, n);
	MUST(cudaGetLastError());
	return p;
}

/* ---- 1 ---- */

enum mode { BF16, SCALAR, OUTER, SQUARE, OUTER16, MODES }; /* OUTER16: with BF16 out */
static const char *const modes[MODES] = {"bf16", "scalar", "outer", "square", "outer16"};
static const size_t workspace_bytes = (size_t)32 << 20;

/* y [t, n] = x [t, k] w [n, k]^T, and how the library would do that. */
struct product {
	cublasLtHandle_t lt;
	void *workspace;
	cublasLtMatmulDesc_t d;
	cublasLtMatrixLayout_t a, b, c;
	cublasLtMatmulHeuristicResult_t r[8];
	int got;
	cublasStatus_t heuristic;

	product(cublasLtHandle_t lt_, void *ws, enum mode mode, int n, int k, int t, bool fast, const float *w_scale, const float *x_scale)
	    : lt(lt_), workspace(ws), got(0)
	{
		cublasLtMatmulPreference_t pref;
		cublasOperation_t yes = CUBLAS_OP_T;
		cudaDataType_t type = mode == BF16 ? CUDA_R_16BF : CUDA_R_8F_E4M3;
		int32_t sm = mode == SQUARE ? CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F : CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
		int32_t sx = mode == SQUARE ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F : CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
		int8_t f = fast;

		cublasLtMatmulDescCreate(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F);
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSA, &yes, sizeof(yes));
		if (mode >= OUTER) {
			cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &sm, sizeof(sm));
			cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &sx, sizeof(sx));
			cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &w_scale, sizeof(w_scale));
			cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x_scale, sizeof(x_scale));
		}
		if (mode > BF16)
			cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &f, sizeof(f));
		cublasLtMatrixLayoutCreate(&a, type, k, n, k);
		cublasLtMatrixLayoutCreate(&b, type, k, t, k);
		cublasLtMatrixLayoutCreate(&c, mode == OUTER16 ? CUDA_R_16BF : CUDA_R_32F, n, t, n);
		cublasLtMatmulPreferenceCreate(&pref);
		cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, sizeof(workspace_bytes));
		heuristic = cublasLtMatmulAlgoGetHeuristic(lt, d, a, b, c, c, pref, 8, r, &got);
		cublasLtMatmulPreferenceDestroy(pref);
	}

	~product()
	{
		cublasLtMatrixLayoutDestroy(a), cublasLtMatrixLayoutDestroy(b), cublasLtMatrixLayoutDestroy(c);
		cublasLtMatmulDescDestroy(d);
	}

	bool
	run(int i, const void *w, const void *x, void *y)
	{
		float one = 1, zero = 0;

		return cublasLtMatmul(lt, d, &one, w, a, x, b, &zero, y, c, y, c, &r[i].algo, workspace, workspace_bytes, stream) ==
		    CUBLAS_STATUS_SUCCESS;
	}
};

/* The best of its choices, and the one that it names first. */
static void
time_product(cublasLtHandle_t lt, void *ws, enum mode mode, int n, int k, int t, bool fast)
{
	static void *w = make_filled((size_t)28672 * 4096 * 2), *x = make_filled((size_t)2048 * 14336 * 2), *y = make((size_t)2048 * 28672 * 4);
	static float *s = make_ones((size_t)2048 * 112);
	product p(lt, ws, mode, n, k, t, fast, s, s);
	float best = -1, first = -1;
	int ran = 0, which = 0;

	for (int i = 0; i < p.got; i++) {
		if (!p.run(i, w, x, y) || cudaStreamSynchronize(stream) != cudaSuccess)
			continue;
		float us = time_us(20, [&] { p.run(i, w, x, y); });

		first = ran++ == 0 ? us : first;
		if (best < 0 || us < best)
			best = us, which = i;
	}
	printf("lt %s %s n %d k %d t %d heuristic %d found %d ran %d", modes[mode], fast ? "fast" : "plain", n, k, t, (int)p.heuristic, p.got, ran);
	if (ran > 0)
		printf(" first %.2f us best %.2f us choice %d, %.1f GB/s, %.1f TFLOP/s", first, best, which,
		    (double)n * k * (mode == BF16 ? 2 : 1) / best / 1e3, 2.0 * n * k * t / best / 1e6);
	printf("\n");
}

/* Near a normal distribution, scaled so that all codes are in use; outliers: one in 64 is 16 times as large. */
__global__ void
make_codes(uint8_t *p, size_t n, uint32_t seed, bool outliers)
{
	for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
		uint32_t h = hash((uint32_t)i ^ seed), g = hash(h);
		float v = (float)(h & 0xffff) + (float)(h >> 16) + (float)(g & 0xffff) + (float)(g >> 16) - 131070.0f;

		v *= outliers && hash(g) % 64 != 0 ? 1.0f / 2048 : 1.0f / 128; /* a deviation of 148, or of 9 */
		p[i] = (uint8_t)cu_e4m3x2(v * 0.5f, 0);
	}
}

/* A block an output: the sum in FP64. */
__global__ void
exact(const uint8_t *w, const uint8_t *x, int n, int k, double *y)
{
	__shared__ double part[8];
	const uint8_t *wr = w + (size_t)blockIdx.x * k, *xr = x + (size_t)blockIdx.y * k;
	double sum = 0;

	for (int i = threadIdx.x; i < k; i += blockDim.x)
		sum += (double)cu_float_of_e4m3(wr[i]) * cu_float_of_e4m3(xr[i]);
	for (int o = 16; o > 0; o /= 2)
		sum += __shfl_xor_sync(CU_FULL, sum, o);
	if (threadIdx.x % 32 == 0)
		part[threadIdx.x / 32] = sum;
	__syncthreads();
	for (int i = 1; i < 8 && threadIdx.x == 0; i++)
		sum += part[i];
	if (threadIdx.x == 0)
		y[(size_t)blockIdx.y * n + blockIdx.x] = sum;
}

/* out: squares of the errors and of the values, summed; the largest error, as bits. */
__global__ void
compare(const float *y, const double *want, size_t n, double *out)
{
	double e2 = 0, v2 = 0, most = 0;

	for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
		double e = fabs(y[i] - want[i]);

		e2 += e * e, v2 += want[i] * want[i];
		most = e > most || e != e ? e : most;
	}
	atomicAdd(&out[0], e2);
	atomicAdd(&out[1], v2);
	atomicMax(reinterpret_cast<unsigned long long *>(&out[2]), (unsigned long long)__double_as_longlong(most));
}

/* Both by the root of the mean square of what should come out. */
static void
error_of(const float *y, const double *want, size_t n, double *dev, double *rms, double *most)
{
	double out[3];

	MUST(cudaMemsetAsync(dev, 0, sizeof(out), stream));
	compare<<<256, 256, 0, stream>>>(y, want, n, dev);
	MUST(cudaGetLastError());
	MUST(cudaStreamSynchronize(stream));
	MUST(cudaMemcpy(out, dev, sizeof(out), cudaMemcpyDeviceToHost));
	*rms = sqrt(out[0] / out[1]), *most = out[2] / sqrt(out[1] / (double)n);
}

/* Sums of E4M3 products against FP64: the worst of the library's choices, and octet's own kernels. */
static void
errors(cublasLtHandle_t lt, void *ws)
{
	static const int shape[][2] = {{4096, 4096}, {4096, 14336}};
	const int t = 64;

	for (auto &s : shape)
		for (int outliers = 0; outliers < 2; outliers++) {
			const int n = s[0], k = s[1];
			uint8_t *w = static_cast<uint8_t *>(make((size_t)n * k)), *x = static_cast<uint8_t *>(make((size_t)t * k));
			float *y = static_cast<float *>(make((size_t)t * n * 4)), *one = make_ones(n);
			double *want = static_cast<double *>(make((size_t)t * n * 8)), *dev = static_cast<double *>(make(24)), rms, most;
			auto told = [&](const char *who, const char *how, int choices, double r, double m) {
				printf("off %s %s n %d k %d inputs %s: of %d choices rms %.2e largest %.2e\n", who, how, n, k,
				    outliers ? "outliers" : "normal", choices, r, m);
			};

			make_codes<<<1024, 256, 0, stream>>>(w, (size_t)n * k, 1, false);
			make_codes<<<1024, 256, 0, stream>>>(x, (size_t)t * k, 2, outliers != 0);
			exact<<<dim3(n, t), 256, 0, stream>>>(w, x, n, k, want);
			MUST(cudaGetLastError());
			for (enum mode m : {SCALAR, OUTER})
				for (int fast = 0; fast < 2; fast++) {
					product p(lt, ws, m, n, k, t, fast, one, one);
					double worst = 0, largest = 0;
					int ran = 0;

					for (int i = 0; i < p.got; i++) {
						if (!p.run(i, w, x, y) || cudaStreamSynchronize(stream) != cudaSuccess)
							continue;
						error_of(y, want, (size_t)t * n, dev, &rms, &most);
						ran++;
						worst = rms > worst ? rms : worst, largest = most > largest ? most : largest;
					}
					told(modes[m], fast ? "fast" : "plain", ran, worst, largest);
				}
			struct cu_linear a = {};

			a.kind = CU_W_E4M3, a.w8a8 = true, a.hi = w, a.scale = a.tscale = one, a.n = n, a.k = a.ld = k, a.xq = x, a.xs = one, a.ldx = k;
			a.ldxs = 1, a.rows = t, a.y = y, a.ldy = n;
			cu_linear_skinny(&a, stream);
			MUST(cudaGetLastError());
			error_of(y, want, (size_t)t * n, dev, &rms, &most);
			told("own", "mma", 1, rms, most);
			MUST(cudaFree(w));
			MUST(cudaFree(x));
			MUST(cudaFree(y));
			MUST(cudaFree(one));
			MUST(cudaFree(want));
			MUST(cudaFree(dev));
		}
}

static void
products(void)
{
	static const int shape[][2] = {{6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}, {3072, 9216}};
	static const int rows[] = {1, 16, 32, 48, 64, 128, 256, 512, 2048};
	cublasLtHandle_t lt;
	void *ws = make(workspace_bytes);

	if (cublasLtCreate(&lt) != CUBLAS_STATUS_SUCCESS) {
		printf("cuBLASLt does not start\n");
		exit(1);
	}
	printf("cuBLASLt %zu\n", cublasLtGetVersion());
	errors(lt, ws);
	for (auto &s : shape)
		for (int t : rows)
			for (int m = 0; m < MODES; m++)
				for (int fast = 0; fast < (m > 0 ? 2 : 1); fast++)
					time_product(lt, ws, (enum mode)m, s[0], s[1], t, fast);
	cublasLtDestroy(lt);
}

/* ---- 2, 3 ---- */

template <int HOW> /* 0: only reads; 1: bits and a product; 2: the conversion to F16 */
__global__ void
read_e4m3(const uint4 *p, size_t n, float *out)
{
	float sum = 0;

	for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
		uint4 v = __ldcs(p + i);
		uint32_t w[4] = {v.x, v.y, v.z, v.w};

		for (int j = 0; j < 4; j++) {
			if (HOW == 0) {
				sum += __uint_as_float(w[j] & 0x007fffff);
			} else if (HOW == 1) {
				for (int e = 0; e < 4; e++)
					sum += cu_float_of_e4m3(w[j] >> 8 * e);
			} else {
				for (int e = 0; e < 2; e++) {
					uint32_t h;
					uint16_t c = (uint16_t)(w[j] >> 16 * e);

					asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(c));
					asm("{ .reg .f16 a, b; .reg .f32 x, y; mov.b32 {a, b}, %1; cvt.f32.f16 x, a; cvt.f32.f16 y, b;"
					    " add.f32 x, x, y; add.f32 %0, %0, x; }" : "+f"(sum) : "r"(h));
				}
			}
		}
	}
	if (sum == 12345.678f)
		*out = sum;
}

static void
reads(void)
{
	size_t bytes = (size_t)4 << 30;
	uint4 *p = static_cast<uint4 *>(make(bytes));
	float *out = static_cast<float *>(make(4));
	int sms;

	cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
	float a = time_us(5, [&] { read_e4m3<0><<<sms * 8, 256, 0, stream>>>(p, bytes / 16, out); });
	float b = time_us(5, [&] { read_e4m3<1><<<sms * 8, 256, 0, stream>>>(p, bytes / 16, out); });
	float c = time_us(5, [&] { read_e4m3<2><<<sms * 8, 256, 0, stream>>>(p, bytes / 16, out); });

	printf("read %.1f GB/s\n", bytes / a / 1e3);
	printf("unpack FP32 from memory: bits %.1f GB/s, cvt %.1f GB/s\n", bytes / b / 1e3, bytes / c / 1e3);
	MUST(cudaFree(p));
	MUST(cudaFree(out));
}

/* Without memory: codes from a register to what mma takes, BF16 by bits and a product, or F16 by the instruction. What makes the next
 * four codes (0) is the part that both have. */
template <int HOW>
__global__ void
unpack_rate(int rounds, uint32_t *out)
{
	uint32_t c = hash(blockIdx.x * blockDim.x + threadIdx.x), all = 0;

	for (int i = 0; i < rounds; i++) {
		uint32_t pair[2] = {c, 0};

		if (HOW == 1) {
			cu_bf16_of_e4m3x4(c, pair);
		} else if (HOW == 2) {
			asm volatile("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair[0]) : "h"((uint16_t)c));
			asm volatile("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair[1]) : "h"((uint16_t)(c >> 16)));
		}
		all ^= pair[0] + pair[1];
		c = c * 1664525u + 1013904223u;
	}
	if (all == 12345)
		*out = all;
}

static void
unpack_rates(void)
{
	const int rounds = 4096;
	uint32_t *out = static_cast<uint32_t *>(make(4));
	int sms;

	cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
	const double values = (double)sms * 8 * 256 * rounds * 4;
	float a = time_us(5, [&] { unpack_rate<0><<<sms * 8, 256, 0, stream>>>(rounds, out); });
	float b = time_us(5, [&] { unpack_rate<1><<<sms * 8, 256, 0, stream>>>(rounds, out); });
	float c = time_us(5, [&] { unpack_rate<2><<<sms * 8, 256, 0, stream>>>(rounds, out); });

	MUST(cudaGetLastError());
	printf("unpack pairs in registers: bits %.0f G/s, cvt %.0f G/s, neither %.0f G/s\n", values / b / 1e3, values / c / 1e3, values / a / 1e3);
	MUST(cudaFree(out));
}

/* ---- 4 ---- */

__global__ void
nothing(int *)
{
}

__global__ void
choose(cudaGraphConditionalHandle h, const unsigned *which)
{
	cudaGraphSetConditional(h, *which);
}

static const int layers = 32, kernels = 12, sites = 4; /* of a decode step; those that differ between plans, of a layer */

static void
launch_nothing(int n)
{
	for (int i = 0; i < n; i++)
		nothing<<<1, 32, 0, stream>>>(nullptr);
}

template <class F> static cudaGraph_t
captured(F f)
{
	cudaGraph_t g;

	MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
	f();
	MUST(cudaStreamEndCapture(stream, &g));
	return g;
}

static float
launches_us(cudaGraphExec_t x)
{
	return time_us(50, [&] { MUST(cudaGraphLaunch(x, stream)); });
}

/* A graph a plan. A flip is a capture and an instantiation, or the first graph takes the second's nodes. */
static void
graph_a(void)
{
	const int nodes = layers * kernels;
	cudaGraphExecUpdateResultInfo info;
	cudaGraph_t g = nullptr, other = captured([] { launch_nothing(layers * kernels); });
	cudaGraphExec_t x = nullptr;
	double capture = host_us([&] { g = captured([] { launch_nothing(layers * kernels); }); });
	double instantiate = host_us([&] { MUST(cudaGraphInstantiate(&x, g, 0)); });
	double first = host_us([&] { MUST(cudaGraphLaunch(x, stream)); });
	float launch = launches_us(x), eager = time_us(50, [] { launch_nothing(layers * kernels); });
	double update = host_us([&] { MUST(cudaGraphExecUpdate(x, other, &info)); });

	printf("graph A, of %d nodes: capture %.0f us, instantiate %.0f us, first launch %.0f us, launch %.1f us, eagerly %.1f us, update %.0f us\n",
	    nodes, capture, instantiate, first, launch, eager, update);
	cudaGraphExecDestroy(x), cudaGraphDestroy(g), cudaGraphDestroy(other);
}

/* Both plans' nodes at sites that differ, one of each pair disabled. A flip switches every one. */
static void
graph_b(void)
{
	const int nodes = layers * (kernels + sites);
	static cudaGraphNode_t node[layers * (kernels + sites)];
	cudaGraph_t g = captured([] { launch_nothing(layers * (kernels + sites)); });
	cudaGraphExec_t x = nullptr;
	size_t n = nodes;
	double instantiate = host_us([&] { MUST(cudaGraphInstantiate(&x, g, 0)); });

	MUST(cudaGraphGetNodes(g, node, &n));
	auto flip = [&](int to) {
		for (int i = 0; i < layers * sites; i++) {
			MUST(cudaGraphNodeSetEnabled(x, node[2 * i], to == 0));
			MUST(cudaGraphNodeSetEnabled(x, node[2 * i + 1], to != 0));
		}
	};
	flip(0);
	float launch = launches_us(x);
	double flipped = host_us([&] { flip(1); }), first = host_us([&] { MUST(cudaGraphLaunch(x, stream)); });

	printf("graph B, of %zu nodes, %d of them disabled: instantiate %.0f us, launch %.1f us, a flip %.0f us, first launch behind it %.0f us\n",
	    n, layers * sites, instantiate, launch, flipped, first);
	cudaGraphExecDestroy(x), cudaGraphDestroy(g);
}

/* A SWITCH node with two bodies of n kernels, behind what the stream has captured; a kernel sets it from device memory. */
static void
add_switch(cudaGraph_t g, cudaStream_t body, const unsigned *which, int n)
{
	cudaGraphConditionalHandle h;
	cudaGraphNodeParams p = {};
	cudaStreamCaptureStatus status;
	const cudaGraphNode_t *deps;
	cudaGraphNode_t node;
	size_t n_deps;

	MUST(cudaGraphConditionalHandleCreate(&h, g, 0, 0));
	choose<<<1, 1, 0, stream>>>(h, which);
	MUST(cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &deps, nullptr, &n_deps));
	p.type = cudaGraphNodeTypeConditional;
	p.conditional.handle = h, p.conditional.type = cudaGraphCondTypeSwitch, p.conditional.size = 2;
	MUST(cudaGraphAddNode(&node, g, deps, nullptr, n_deps, &p));
	for (int i = 0; i < 2; i++) {
		cudaGraph_t done;

		MUST(cudaStreamBeginCaptureToGraph(body, p.conditional.phGraph_out[i], nullptr, nullptr, 0, cudaStreamCaptureModeRelaxed));
		for (int j = 0; j < n; j++)
			nothing<<<1, 32, 0, body>>>(nullptr);
		MUST(cudaStreamEndCapture(body, &done));
	}
	MUST(cudaStreamUpdateCaptureDependencies(stream, &node, nullptr, 1, cudaStreamSetCaptureDependencies));
}

/* switches: one for a whole step, or one at each site that differs. A flip is a word in device memory. */
static void
graph_c(int switches)
{
	unsigned *which = static_cast<unsigned *>(make(4));
	cudaStream_t body;
	cudaGraph_t g;
	cudaGraphExec_t x = nullptr;

	MUST(cudaStreamCreateWithFlags(&body, cudaStreamNonBlocking));
	MUST(cudaMemset(which, 0, 4));
	MUST(cudaDeviceSynchronize());
	double capture = host_us([&] {
		MUST(cudaGraphCreate(&g, 0));
		MUST(cudaStreamBeginCaptureToGraph(stream, g, nullptr, nullptr, 0, cudaStreamCaptureModeRelaxed));
		for (int i = 0; i < switches; i++) {
			launch_nothing(switches > 1 ? (kernels - sites) / sites : 0);
			add_switch(g, body, which, switches > 1 ? 1 : layers * kernels);
		}
		MUST(cudaStreamEndCapture(stream, &g));
	});
	double instantiate = host_us([&] { MUST(cudaGraphInstantiate(&x, g, 0)); });
	float launch = launches_us(x);
	double flipped = host_us([&] { MUST(cudaMemsetAsync(which, 1, 1, stream)); }), first = host_us([&] { MUST(cudaGraphLaunch(x, stream)); });

	printf("graph C, %d switches: capture %.0f us, instantiate %.0f us, launch %.1f us, a flip %.0f us, first launch behind it %.0f us\n",
	    switches, capture, instantiate, launch, flipped, first);
	cudaGraphExecDestroy(x), cudaGraphDestroy(g);
	MUST(cudaStreamDestroy(body));
	MUST(cudaFree(which));
}

static void
graphs(void)
{
	graph_a();
	graph_b();
	graph_c(1);
	graph_c(layers * sites);
}

/* ---- 5 ---- */

static void
own_linears(void)
{
	static const int shape[][2] = {{6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}};
	static const int rows[] = {1, 2, 4, 8, 16, 32, 48, 64};
	static const struct { const char *name; enum cu_weights kind; bool w8a8; int bytes; } how[] = {
	    {"bf16", CU_W_BF16, false, 2}, {"nested", CU_W_NESTED, false, 2}, {"fp8w", CU_W_E4M3, false, 1}, {"fp8", CU_W_E4M3, true, 1}};
	const size_t all = (size_t)2 << 30;
	char *w = static_cast<char *>(make(all)), *lo = static_cast<char *>(make(all / 2));
	struct cu_linear a = {};

	a.xb = static_cast<uint16_t *>(make(64 * 14336 * 2)), a.xq = static_cast<uint8_t *>(make(64 * 14336));
	a.xs = static_cast<float *>(make(64 * 4)), a.scale = static_cast<float *>(make(28672 * 4)), a.y = static_cast<float *>(make(64 * 28672 * 4));
	for (auto &s : shape)
		for (auto &h : how)
			for (int r : rows) {
				size_t plane = (size_t)s[0] * s[1], step = plane * (h.kind == CU_W_BF16 ? 2 : 1), at = 0;

				a.kind = h.kind, a.w8a8 = h.w8a8, a.n = s[0], a.k = a.ld = s[1], a.ldx = s[1], a.rows = r, a.ldy = s[0];
				float us = time_us(40, [&] {
					at = at + 2 * step <= all / 2 ? at + step : 0;
					a.bf16 = reinterpret_cast<uint16_t *>(w + at), a.hi = reinterpret_cast<uint8_t *>(w + at);
					a.lo = reinterpret_cast<int8_t *>(lo + at);
					cu_linear_skinny(&a, stream);
				});

				MUST(cudaGetLastError());
				printf("own %-6s n=%-6d k=%-6d t=%-5d %8.2f us, %7.1f GB/s\n", h.name, s[0], s[1], r, us, (double)plane * h.bytes / us / 1e3);
			}
	MUST(cudaFree(w)), MUST(cudaFree(lo));
}

/* Decode over a context of 1024: queries of one position each, pages of their own. */
static void
own_attention(void)
{
	static const int heads[] = {32, 64}, batch[] = {1, 8, 32, 128};
	const uint32_t n_kv = 8, hd = 128, blocks = 32;
	const size_t elems = (size_t)n_kv * hd * 32;
	uint16_t *mem = static_cast<uint16_t *>(make(128 * blocks * 2 * elems * 2));
	float *scale = static_cast<float *>(make(128 * blocks * 2 * 2 * n_kv * 32 * 4));

	for (int h : heads)
		for (int n : batch)
			for (int fp8 = 0; fp8 < 2; fp8++) {
				struct cu_attention a = {};
				auto *table = new kd_block[128 * blocks];
				uint32_t first[128], pos[128];
				cu_tile tile[128];

				for (int i = 0; i < n; i++) {
					first[i] = i * blocks, pos[i] = 1023, tile[i] = {(uint32_t)i, 1};
					for (uint32_t b = 0; b < blocks; b++) {
						uint32_t p = (i * blocks + b) * 2;

						table[i * blocks + b] = {p, p + 1, p, fp8 ? ~0u : 0};
					}
				}
				auto put = [](const void *from, size_t bytes) {
					void *to = make(bytes);

					MUST(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
					return to;
				};
				a.kv = {mem, scale, elems, n_kv}, a.n_layers = 1, a.n_heads = h, a.hd = hd, a.rows = n, a.n_tiles = n, a.scale = 0.088f;
				a.table = static_cast<kd_block *>(put(table, sizeof(kd_block) * n * blocks));
				a.first = static_cast<uint32_t *>(put(first, sizeof(first))), a.pos = static_cast<uint32_t *>(put(pos, sizeof(pos)));
				a.tile = static_cast<cu_tile *>(put(tile, sizeof(tile))), a.q = static_cast<uint16_t *>(make((size_t)n * h * hd * 2));
				MUST(cudaDeviceSynchronize());
				for (a.splits = 1; a.splits <= 8; a.splits *= 2) {
					a.part = static_cast<float *>(make((size_t)n * h * a.splits * (hd + 2) * 4));
					float us = time_us(40, [&] { cu_attend(&a, stream); });

					MUST(cudaGetLastError());
					printf("attend %s %d/%u heads, batch %-3d splits %u %8.2f us, %7.1f GB/s\n", fp8 ? "fp8 " : "bf16", h, n_kv, n, a.splits, us,
					    (double)n * blocks * elems * (fp8 ? 2 : 4) / us / 1e3);
					MUST(cudaFree(a.part));
				}
				MUST(cudaFree(a.q)), MUST(cudaFree((void *)a.table)), MUST(cudaFree((void *)a.first));
				MUST(cudaFree((void *)a.pos)), MUST(cudaFree((void *)a.tile));
				delete[] table;
			}
	MUST(cudaFree(mem)), MUST(cudaFree(scale));
}

int
main(void)
{
	cudaDeviceProp p;

	MUST(cudaGetDeviceProperties(&p, 0));
	printf("%s, %d.%d, %d multiprocessors\n", p.name, p.major, p.minor, p.multiProcessorCount);
	MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
	reads();
	unpack_rates();
	graphs();
	own_linears();
	own_attention();
	products();
	return 0;
}
