/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What to know of a card before believing any plan for it, in about a minute:
 *   1 which scale modes of cuBLASLt run for the shapes of an 8B model, with how many rows, how fast, fast accumulation off and on
 *   2 what reading memory reaches
 *   3 unpacking E4M3: the conversion instruction against moving bits and multiplying
 *   4 a graph's cost: capture, instantiation, launch; a node disabled and enabled again, another graph taken over
 *   5 own linear kernels by rows and format, over weights that no cache holds, and attention over BF16 and over FP8 pages
 */
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
	static const char *const names[] = {"bf16", "scalar", "outer", "square", "outer16"}; /* outer16: the same with BF16 out */
	static void *w = make((size_t)28672 * 4096 * 2), *x = make((size_t)2048 * 14336 * 2), *y = make((size_t)2048 * 28672 * 4),
	    *s = make((size_t)2048 * 112 * 4);
	cublasLtMatmulDesc_t d;
	cublasLtMatrixLayout_t a, b, c;
	cublasLtMatmulPreference_t pref;
	cublasLtMatmulHeuristicResult_t r[8];
	cublasOperation_t yes = CUBLAS_OP_T;
	cudaDataType_t type = mode == 0 ? CUDA_R_16BF : CUDA_R_8F_E4M3;
	int32_t sm = mode == 3 ? CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F : CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
	int32_t sx = mode == 3 ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F : CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
	int8_t f = fast;
	size_t bytes = (size_t)32 << 20;
	float one = 1, zero = 0, best = -1;
	int got = 0, ran = 0;

	cublasLtMatmulDescCreate(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F);
	cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSA, &yes, sizeof(yes));
	if (mode >= 2) {
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &sm, sizeof(sm));
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &sx, sizeof(sx));
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &s, sizeof(s));
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &s, sizeof(s));
	}
	if (mode > 0)
		cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &f, sizeof(f));
	cublasLtMatrixLayoutCreate(&a, type, k, n, k);
	cublasLtMatrixLayoutCreate(&b, type, k, t, k);
	cublasLtMatrixLayoutCreate(&c, mode == 4 ? CUDA_R_16BF : CUDA_R_32F, n, t, n);
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
	printf("lt %-7s %-4s n=%-6d k=%-6d t=%-5d heuristic %2d, %d found, %d ran, best %8.2f us", names[mode], fast ? "fast" : "", n, k, t,
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
	static const int rows[] = {1, 16, 32, 48, 64, 128, 256, 512, 2048};
	cublasLtHandle_t lt;
	void *ws = make((size_t)32 << 20);

	if (cublasLtCreate(&lt) != CUBLAS_STATUS_SUCCESS) {
		printf("cuBLASLt does not start\n");
		exit(1);
	}
	printf("cuBLASLt %zu\n", cublasLtGetVersion());
	for (auto &s : shape)
		for (int t : rows)
			for (int m = 0; m < 5; m++)
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
	/* A flip by switching nodes off and on (all of them, as a flip of every site would), or by updating the whole graph. */
	cudaGraphNode_t node[nodes];
	cudaGraphExecUpdateResultInfo info;
	size_t n = nodes;

	MUST(cudaGraphGetNodes(g, node, &n));
	cudaEventRecord(a, 0);
	cudaEventSynchronize(a);
	for (size_t i = 0; i < n; i++)
		MUST(cudaGraphNodeSetEnabled(x, node[i], i % 2));
	cudaEventRecord(b, 0);
	cudaEventSynchronize(b);
	MUST(cudaGraphExecUpdate(x, g, &info));
	cudaEventRecord(c, 0);
	cudaEventSynchronize(c);
	cudaEventElapsedTime(&capture, a, b);
	cudaEventElapsedTime(&instantiate, b, c);
	printf("switching %zu nodes %.0f us, updating the graph %.0f us\n", n, capture * 1e3, instantiate * 1e3);
	cudaGraphExecDestroy(x), cudaGraphDestroy(g);
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
	graphs();
	own_linears();
	own_attention();
	products();
	return 0;
}
