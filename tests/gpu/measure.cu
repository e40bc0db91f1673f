/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What to know of a card before believing any plan for it, in about a minute:
 *   1 which scale modes of cuBLASLt run for the shapes of an 8B model, with how many rows, how fast, fast accumulation off and on
 *   2 what reading memory reaches
 *   3 unpacking E4M3: the conversion instruction against moving bits and multiplying
 *   4 a graph's cost: capture, instantiation, launch
 */
#include <cstdio>
#include <cstdlib>
#include <cublasLt.h>
#include <cuda_runtime.h>

#include "kernels/cuda/arch.cuh"

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
	return p;
}

template <class F> static float
time_us(int runs, F f)
{
	cudaEvent_t a, b;
	float ms;

	f();
	cudaEventCreate(&a), cudaEventCreate(&b);
	cudaEventRecord(a, stream);
	for (int i = 0; i < runs; i++)
		f();
	cudaEventRecord(b, stream);
	cudaEventSynchronize(b);
	cudaEventElapsedTime(&ms, a, b);
	cudaEventDestroy(a), cudaEventDestroy(b);
	return ms * 1e3f / runs;
}

/* ---- 1 ---- */

static void
product(cublasLtHandle_t lt, void *ws, int mode, int n, int k, int t, bool fast)
{
	static const char *const names[] = {"bf16", "scalar", "outer"};
	static void *w = make((size_t)28672 * 4096 * 2), *x = make((size_t)2048 * 14336 * 2), *y = make((size_t)2048 * 28672 * 4),
	    *s = make(28672 * 4);
	cublasLtMatmulDesc_t d;
	cublasLtMatrixLayout_t a, b, c;
	cublasLtMatmulPreference_t pref;
	cublasLtMatmulHeuristicResult_t r[8];
	cublasOperation_t yes = CUBLAS_OP_T;
	cudaDataType_t type = mode == 0 ? CUDA_R_16BF : CUDA_R_8F_E4M3;
	int32_t sm = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
	int8_t f = fast;
	size_t bytes = (size_t)32 << 20;
	float one = 1, zero = 0, best = -1;
	int got = 0, ran = 0;

	cublasLtMatmulDescCreate(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F);
	cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSA, &yes, sizeof(yes));
	if (mode == 2) {
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &sm, sizeof(sm));
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &sm, sizeof(sm));
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &s, sizeof(s));
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &s, sizeof(s));
	}
	if (mode > 0)
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &f, sizeof(f));
	cublasLtMatrixLayoutCreate(&a, type, k, n, k);
	cublasLtMatrixLayoutCreate(&b, type, k, t, k);
	cublasLtMatrixLayoutCreate(&c, CUDA_R_32F, n, t, n);
	cublasLtMatmulPreferenceCreate(&pref);
	cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes));
	cublasStatus_t h = cublasLtMatmulAlgoGetHeuristic(lt, d, a, b, c, c, pref, 8, r, &got);

	for (int i = 0; i < got; i++) {
		auto run = [&] {
			return cublasLtMatmul(lt, d, &one, w, a, x, b, &zero, y, c, y, c, &r[i].algo, ws, bytes, stream);
		};

		if (run() != CUBLAS_STATUS_SUCCESS || cudaStreamSynchronize(stream) != cudaSuccess)
			continue;
		ran++;
		float us = time_us(20, run);

		best = best < 0 || us < best ? us : best;
	}
	printf("lt %-6s %-4s n=%-6d k=%-6d t=%-5d heuristic %2d, %d found, %d ran, best %8.2f us", names[mode], fast ? "fast" : "", n, k, t,
	    (int)h, got, ran, best);
	printf(ran > 0 ? ", %7.1f GB/s, %7.1f TFLOP/s\n" : "\n", (double)n * k * (mode == 0 ? 2 : 1) / best / 1e3,
	    2.0 * n * k * t / best / 1e6);
	cublasLtMatmulPreferenceDestroy(pref);
	cublasLtMatrixLayoutDestroy(a), cublasLtMatrixLayoutDestroy(b), cublasLtMatrixLayoutDestroy(c);
	cublasLtMatmulDescDestroy(d);
}

static void
products(void)
{
	static const int shape[][2] = {{6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}, {3072, 9216}};
	static const int rows[] = {16, 32, 64, 128, 256, 512, 2048};
	cublasLtHandle_t lt;
	void *ws = make((size_t)32 << 20);

	if (cublasLtCreate(&lt) != CUBLAS_STATUS_SUCCESS) {
		printf("cuBLASLt does not start\n");
		exit(1);
	}
	printf("cuBLASLt %zu\n", cublasLtGetVersion());
	for (auto &s : shape)
		for (int t : rows)
			for (int m = 0; m < 3; m++)
				for (int fast = 0; fast < (m > 0 ? 2 : 1); fast++)
					product(lt, ws, m, s[0], s[1], t, fast);
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

	printf("read %.1f GB/s; E4M3 to FP32 by bits %.1f GB/s, by cvt %.1f GB/s\n", bytes / a / 1e3, bytes / b / 1e3, bytes / c / 1e3);
	MUST(cudaFree(p));
}

/* ---- 4 ---- */

__global__ void
nothing(int *)
{
}

static void
graphs(void)
{
	const int nodes = 32 * 9;
	cudaGraph_t g;
	cudaGraphExec_t x;
	cudaEvent_t a, b, c;
	float capture, instantiate;

	cudaEventCreate(&a), cudaEventCreate(&b), cudaEventCreate(&c);
	cudaEventRecord(a, 0);
	cudaEventSynchronize(a);
	MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
	for (int i = 0; i < nodes; i++)
		nothing<<<1, 32, 0, stream>>>(nullptr);
	MUST(cudaStreamEndCapture(stream, &g));
	cudaEventRecord(b, 0);
	cudaEventSynchronize(b);
	MUST(cudaGraphInstantiate(&x, g, 0));
	cudaEventRecord(c, 0);
	cudaEventSynchronize(c);
	cudaEventElapsedTime(&capture, a, b);
	cudaEventElapsedTime(&instantiate, b, c);
	float launch = time_us(50, [&] { cudaGraphLaunch(x, stream); });
	float eager = time_us(50, [&] {
		for (int i = 0; i < nodes; i++)
			nothing<<<1, 32, 0, stream>>>(nullptr);
	});

	printf("graph of %d nodes: capture %.0f us, instantiate %.0f us, a launch %.1f us; eagerly %.1f us\n", nodes, capture * 1e3,
	    instantiate * 1e3, launch, eager);
	cudaGraphExecDestroy(x), cudaGraphDestroy(g);
}

int
main(void)
{
	cudaDeviceProp p;

	MUST(cudaGetDeviceProperties(&p, 0));
	printf("%s, %d.%d, %d multiprocessors\n", p.name, p.major, p.minor, p.multiProcessorCount);
	MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
	reads();
	graphs();
	products();
	return 0;
}
