/* SPDX-License-Identifier: Apache-2.0 */
/* The fake runtime and cuBLASLt of the emulation; see include/. One thread uses it at a time. */
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "cublasLt.h"
extern "C" {
#include "kernels/kernels.h"
}

typedef std::function<void()> work;
struct emu_graph { std::vector<work> list; };
struct emu_graph_exec { std::vector<work> list; };
struct emu_stream { emu_graph *capture; std::deque<work> queue; };
struct emu_event { double us; emu_stream *stream; unsigned to_come; };

static std::vector<emu_stream *> streams; /* but for the default one, which runs at once */
static cudaError_t last_error;

static double
now_us(void)
{
	return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static void
run_next(emu_stream *s)
{
	work w = s->queue.front();

	s->queue.pop_front();
	w();
}

static void
run_all(emu_stream *s)
{
	while (!s->queue.empty())
		run_next(s);
}

/*
 * A device is as slow as may be, and runs what was queued when it is waited for, or as quick, and runs it at once: from
 * one synchronisation to the next either, by a coin, or always slow ($OCTET_EMU_LATE). What is used too early or overwritten too soon
 * is found by one of them.
 */
static bool at_once;

static void
toss(void)
{
	static uint32_t state = 1;

	state ^= state << 13, state ^= state >> 17, state ^= state << 5;
	at_once = state & 1 && getenv("OCTET_EMU_LATE") == nullptr;
}

void
emu_enqueue(cudaStream_t s, work w)
{
	if (s == nullptr) {
		w();
	} else if (s->capture != nullptr) {
		s->capture->list.push_back(w);
	} else {
		s->queue.push_back(w);
		if (at_once)
			run_all(s);
	}
}

/* ---- memory: poisoned, between guards that cudaFree() looks at ---- */

#define GUARD 256u
#define GUARD_BYTE 0xa5
#define POISON 0xff /* NaN in every format here */

static std::map<void *, size_t> blocks;
static std::map<const void *, size_t> pinned;
static size_t used;

static size_t
most(void)
{
	const char *limit = getenv("OCTET_EMU_MEMORY");

	return limit != nullptr ? strtoull(limit, nullptr, 10) : (size_t)64 << 30;
}

static void
die(const char *what)
{
	fprintf(stderr, "emulation: %s\n", what);
	abort();
}

/* CUDA would wait, and not say so. */
static void
must_be_idle(void)
{
	for (const emu_stream *s : streams)
		if (!s->queue.empty())
			die("memory was given back while a stream had work");
}

static bool
is_pinned(const void *p)
{
	auto after = pinned.upper_bound(p);

	return after != pinned.begin() && static_cast<const char *>(p) < static_cast<const char *>((--after)->first) + after->second;
}

extern "C" {
cudaError_t
cudaMalloc(void **p, size_t n)
{
	unsigned char *m;

	*p = nullptr;
	if (used + n > most())
		return last_error = cudaErrorMemoryAllocation;
	m = static_cast<unsigned char *>(aligned_alloc(256, (n + 2 * GUARD + 255) & ~(size_t)255));
	if (m == nullptr)
		return last_error = cudaErrorMemoryAllocation;
	memset(m, GUARD_BYTE, GUARD);
	if (n < (size_t)256 << 20) /* very large ones are touched as they are used */
		memset(m + GUARD, POISON, n);
	memset(m + GUARD + n, GUARD_BYTE, GUARD);
	blocks[m + GUARD] = n;
	used += n;
	*p = m + GUARD;
	return cudaSuccess;
}

cudaError_t
cudaFree(void *p)
{
	unsigned char *m = static_cast<unsigned char *>(p);

	if (p == nullptr)
		return cudaSuccess;
	must_be_idle();
	if (blocks.find(p) == blocks.end())
		die("cudaFree() of what is no allocation");
	size_t n = blocks[p];

	for (unsigned i = 0; i < GUARD; i++)
		if (m[-1 - (int)i] != GUARD_BYTE || m[n + i] != GUARD_BYTE)
			die("something was written beside an allocation");
	blocks.erase(p);
	used -= n;
	free(m - GUARD);
	return cudaSuccess;
}

cudaError_t
cudaMallocHost(void **p, size_t n)
{
	*p = aligned_alloc(256, (n + 255) & ~(size_t)255);
	memset(*p, POISON, n);
	pinned[*p] = n;
	return cudaSuccess;
}
cudaError_t
cudaFreeHost(void *p)
{
	if (p != nullptr)
		must_be_idle();
	pinned.erase(p);
	free(p);
	return cudaSuccess;
}

cudaError_t
cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s)
{
	/* Between the card and memory that is not pinned a copy may wait until all before it has run, or be read later. */
	if (s != nullptr && kind == cudaMemcpyDeviceToHost && !is_pinned(to))
		die("results were copied to memory that is not pinned");
	emu_enqueue(s, [=] { memcpy(to, from, n); });
	return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind) { memcpy(to, from, n); return cudaSuccess; }
cudaError_t
cudaMemsetAsync(void *to, int v, size_t n, cudaStream_t s)
{
	emu_enqueue(s, [=] { memset(to, v, n); });
	return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *f, size_t *t) { *t = most(); *f = *t - used; return cudaSuccess; }

/* ---- the device ---- */

cudaError_t
cudaGetDeviceCount(int *n)
{
	const char *fault = getenv("OCTET_EMU_FAULT"); /* "driver": none, "old": too old */

	*n = 1;
	if (fault != nullptr && (strcmp(fault, "driver") == 0 || strcmp(fault, "old") == 0))
		return cudaErrorInsufficientDriver;
	if (fault != nullptr && strcmp(fault, "none") == 0)
		return cudaErrorNoDevice;
	return cudaSuccess;
}
cudaError_t
cudaDriverGetVersion(int *v)
{
	const char *fault = getenv("OCTET_EMU_FAULT");

	*v = fault != nullptr && strcmp(fault, "driver") == 0 ? 0 : fault != nullptr && strcmp(fault, "old") == 0 ? 11040 : 13000;
	return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t
cudaDeviceReset(void)
{
	if (!blocks.empty())
		die("cudaDeviceReset() with memory that was not given back");
	return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int) { strcpy(p->name, "emulation"); return cudaSuccess; }
cudaError_t
cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int)
{
	const char *fault = getenv("OCTET_EMU_FAULT");
	bool old = fault != nullptr && strcmp(fault, "chip") == 0;

	*v = a == cudaDevAttrMultiProcessorCount ? 4 : a == cudaDevAttrComputeCapabilityMajor ? (old ? 8 : 9) : 0;
	return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int) { if (n > 0) *s = '\0'; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { cudaError_t e = last_error; last_error = cudaSuccess; return e; }
const char *
cudaGetErrorString(cudaError_t e)
{
	return e == cudaSuccess ? "no error" : e == cudaErrorMemoryAllocation ? "out of memory" :
	    e == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "an error of the emulation";
}

/* ---- streams, events, graphs ---- */

cudaError_t
cudaStreamCreateWithFlags(cudaStream_t *s, unsigned)
{
	*s = new emu_stream();
	streams.push_back(*s);
	return cudaSuccess;
}
cudaError_t
cudaStreamDestroy(cudaStream_t s)
{
	run_all(s);
	for (size_t i = 0; i < streams.size(); i++)
		if (streams[i] == s)
			streams.erase(streams.begin() + (long)i);
	delete s;
	return cudaSuccess;
}
cudaError_t
cudaStreamSynchronize(cudaStream_t s)
{
	if (s != nullptr && s->capture != nullptr)
		die("a stream that captures was waited for");
	if (s != nullptr)
		run_all(s);
	toss();
	return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = new emu_event(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }
cudaError_t
cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
	e->stream = s;
	e->to_come++;
	emu_enqueue(s, [=] { e->us = now_us(), e->to_come--; });
	return cudaSuccess;
}
cudaError_t
cudaEventSynchronize(cudaEvent_t e)
{
	while (e->to_come > 0)
		run_next(e->stream);
	toss();
	return cudaSuccess;
}
cudaError_t
cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b)
{
	*ms = (float)((b->us - a->us) / 1e3);
	return a->to_come + b->to_come > 0 ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
cudaError_t
cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode)
{
	s->capture = new emu_graph();
	return cudaSuccess;
}
cudaError_t
cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g)
{
	const char *fault = getenv("OCTET_EMU_FAULT"); /* "capture": it came to nothing */

	*g = s->capture;
	s->capture = nullptr;
	if (fault != nullptr && strcmp(fault, "capture") == 0) {
		delete *g;
		*g = nullptr;
		return last_error = cudaErrorUnknown;
	}
	return cudaSuccess;
}
cudaError_t
cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long)
{
	*x = new emu_graph_exec{g->list};
	return cudaSuccess;
}
cudaError_t
cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s)
{
	for (const work &w : x->list)
		emu_enqueue(s, w);
	return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete g; return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) { delete x; return cudaSuccess; }

/* ---- cuBLASLt: TN, FP32 out, the scale modes that octet uses ---- */

struct emu_lt { int unused; };
struct emu_lt_desc {
	int32_t transa, transb, amode, bmode;
	const float *ascale, *bscale;
};
struct emu_lt_layout {
	cudaDataType_t type;
	uint64_t rows, cols;
	int64_t ld;
};
struct emu_lt_pref { uint32_t aligned; };

cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { *h = new emu_lt(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { delete h; return CUBLAS_STATUS_SUCCESS; }
size_t cublasLtGetVersion(void) { return 130100; }
const char *cublasLtGetStatusString(cublasStatus_t) { return "CUBLAS_STATUS"; }
cublasStatus_t
cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t, cudaDataType_t)
{
	*d = new emu_lt_desc();
	return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { delete d; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t
cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void *v, size_t n)
{
	void *to = nullptr;
	size_t want = 4;

	switch (a) {
	case CUBLASLT_MATMUL_DESC_TRANSA: to = &d->transa; break;
	case CUBLASLT_MATMUL_DESC_TRANSB: to = &d->transb; break;
	case CUBLASLT_MATMUL_DESC_A_SCALE_MODE: to = &d->amode; break;
	case CUBLASLT_MATMUL_DESC_B_SCALE_MODE: to = &d->bmode; break;
	case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER: to = &d->ascale, want = 8; break;
	case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER: to = &d->bscale, want = 8; break;
	case CUBLASLT_MATMUL_DESC_FAST_ACCUM: return n == 1 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
	}
	if (to == nullptr || n != want)
		return CUBLAS_STATUS_INVALID_VALUE;
	memcpy(to, v, n);
	return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t
cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType_t t, uint64_t r, uint64_t c, int64_t ld)
{
	*l = new emu_lt_layout{t, r, c, ld};
	return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { delete l; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) { *p = new emu_lt_pref(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { delete p; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t
cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t a, const void *v, size_t n)
{
	if (n != (a == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? 8u : 4u))
		return CUBLAS_STATUS_INVALID_VALUE;
	if (n == 4)
		memcpy(&p->aligned, v, n);
	return CUBLAS_STATUS_SUCCESS;
}

static bool
supported(const emu_lt_desc *d, const emu_lt_layout *a, const emu_lt_layout *b, const emu_lt_layout *c)
{
	const char *fault = getenv("OCTET_EMU_FAULT"); /* "outer": a library without outer-vector scales */
	bool fp8 = a->type == CUDA_R_8F_E4M3, squares = d->amode == CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;

	return d->transa == CUBLAS_OP_T && d->transb == CUBLAS_OP_N && a->type == b->type && c->type == CUDA_R_32F &&
	    a->rows == b->rows && a->cols == c->rows && b->cols == c->cols && a->ld >= (int64_t)a->rows && b->ld >= (int64_t)b->rows &&
	    c->ld >= (int64_t)c->rows && a->rows % 16 == 0 && c->rows % 8 == 0 &&
	    (squares ? d->bmode == CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F && b->cols % 4 == 0 : d->amode == d->bmode) && (fp8 || d->amode == 0) &&
	    !(fault != nullptr && strcmp(fault, "outer") == 0 && d->amode != CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F);
}

cublasStatus_t
cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t pref, int n,
    cublasLtMatmulHeuristicResult_t *out, int *got)
{
	*got = 0;
	if (!supported(d, a, b, c))
		return CUBLAS_STATUS_NOT_SUPPORTED;
	if (n > 0) {
		out[0] = cublasLtMatmulHeuristicResult_t();
		out[0].algo.data[0] = 7;
		out[0].algo.data[1] = pref->aligned == 0 ? 256 : pref->aligned; /* what the algorithm relies on */
		*got = 1;
	}
	const char *fault = getenv("OCTET_EMU_FAULT"); /* "choices": there are two algorithms, so octet times them */

	if (n > 1 && fault != nullptr && strcmp(fault, "choices") == 0) {
		out[1] = out[0];
		*got = 2;
	}
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t
cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t *algo, cublasLtMatmulHeuristicResult_t *out)
{
	*out = cublasLtMatmulHeuristicResult_t();
	return supported(d, a, b, c) && algo->data[0] == 7 && algo->data[1] != 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

static float
value(const void *p, cudaDataType_t t, size_t i)
{
	return t == CUDA_R_16BF ? k_bf16_to_float(static_cast<const uint16_t *>(p)[i]) : k_e4m3_to_float(static_cast<const uint8_t *>(p)[i]);
}

static void
matmul(emu_lt_desc d, emu_lt_layout a, emu_lt_layout b, emu_lt_layout c, const void *pa, const void *pb, float *y, float alpha,
    float beta)
{
	bool outer = d.amode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F, squares = d.amode == CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
	size_t wide = squares ? 128 : a.rows, stride = ((a.rows + 127) / 128 + 3) / 4 * 4; /* of A's scales: K in blocks, up to a multiple of 4 */
	std::vector<float> w(a.rows), x(b.rows * b.cols);

	for (size_t j = 0; j < b.cols; j++)
		for (size_t i = 0; i < b.rows; i++)
			x[j * b.rows + i] = value(pb, b.type, j * (size_t)b.ld + i);
	for (size_t n = 0; n < a.cols; n++) {
		for (size_t i = 0; i < a.rows; i++)
			w[i] = value(pa, a.type, n * (size_t)a.ld + i);
		for (size_t t = 0; t < b.cols; t++) {
			float s = 0, *to = y + t * (size_t)c.ld + n;

			for (size_t k = 0; k < a.rows; k += wide) {
				float sum[8] = {}, part;

				for (size_t i = k; i < a.rows && i < k + wide; i += 8)
					for (size_t j = 0; j < 8; j++)
						sum[j] += w[i + j] * x[t * b.rows + i + j];
				part = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
				s += squares ? part * (d.ascale[n / 128 * stride + k / 128] * d.bscale[k / 128 * b.cols + t]) : part;
			}
			if (outer)
				s *= d.ascale[n] * d.bscale[t];
			*to = alpha * s + (beta != 0 ? beta * *to : 0);
		}
	}
}

cublasStatus_t
cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void *alpha, const void *pa, cublasLtMatrixLayout_t a,
    const void *pb, cublasLtMatrixLayout_t b, const void *beta, const void *pc, cublasLtMatrixLayout_t c, void *py,
    cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t *algo, void *, size_t, cudaStream_t stream)
{
	emu_lt_desc dd = *d;
	emu_lt_layout la = *a, lb = *b, lc = *c;
	float al = *static_cast<const float *>(alpha), be = *static_cast<const float *>(beta);

	if (!supported(d, a, b, c) || algo->data[0] != 7 || pc != py)
		return CUBLAS_STATUS_NOT_SUPPORTED;
	if (((uintptr_t)pa | (uintptr_t)pb | (uintptr_t)py) % algo->data[1] != 0)
		die("an algorithm of cuBLASLt was given less aligned pointers than it was asked for");
	emu_enqueue(stream, [=] { matmul(dd, la, lb, lc, pa, pb, static_cast<float *>(py), al, be); });
	return CUBLAS_STATUS_SUCCESS;
}
}
