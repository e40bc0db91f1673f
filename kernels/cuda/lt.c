/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuBLASLt: descriptors and an algorithm for each (kind, shape), made once. Row-major y = x w^T is its D = A^T B with A = w,
 * B = x, D = y, all column-major. The timed choices are kept in a file of the device, its driver's library version and
 * the shape; what is in there for another version is ignored.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/plugin.h"

#define CHOICES 8
#define TIMED 10  /* runs of each choice */
#define BUCKETS 1024u

struct key {
	uint32_t kind, n, k, t, ldx, ldy, add;
	uint32_t aligned; /* of all pointers: 16 or 256. The library assumes 256 unless it is told */
};

struct plan {
	struct key key;
	bool failed;      /* not to be had */
	bool wins;        /* against an own kernel, where there is one: lt_against() */
	float us;         /* 0: not timed */
	cublasLtMatmulDesc_t desc;
	cublasLtMatrixLayout_t a, b, c;
	cublasLtMatmulAlgo_t algo;
	struct plan *next;
};

/* A line of the file. */
struct kept {
	struct key key;
	float us;
	cublasLtMatmulAlgo_t algo;
	struct kept *next;
};

struct lt {
	cublasLtHandle_t handle;
	cublasLtMatmulPreference_t pref[2]; /* pointers aligned to 16, to 256 */
	void *workspace;
	bool fast, dirty;
	struct plan *last; /* that ran */
	struct plan *plan[BUCKETS];
	struct kept *kept;
	char path[4096];
};

static uint32_t
bucket_of(const struct key *k)
{
	uint32_t h = 2166136261u;

	for (size_t i = 0; i < sizeof(*k) / 4; i++)
		h = (h ^ ((const uint32_t *)(const void *)k)[i]) * 16777619u;
	return (h >> 16 ^ h) % BUCKETS;
}

/* ---- the file ---- */

static void
read_kept(struct lt *lt)
{
	FILE *f = *lt->path != '\0' ? fopen(lt->path, "r") : NULL;
	char line[512];

	while (f != NULL && fgets(line, sizeof(line), f) != NULL) {
		struct kept *k = calloc(1, sizeof(*k));
		unsigned long long w[8];

		if (k == NULL)
			break;
		if (sscanf(line, "%u %u %u %u %u %u %u %u %f %llx %llx %llx %llx %llx %llx %llx %llx", &k->key.kind, &k->key.n, &k->key.k,
		    &k->key.t, &k->key.ldx, &k->key.ldy, &k->key.add, &k->key.aligned, &k->us, &w[0], &w[1], &w[2], &w[3], &w[4], &w[5], &w[6],
		    &w[7]) != 17) {
			free(k);
			continue;
		}
		for (int i = 0; i < 8; i++)
			k->algo.data[i] = w[i];
		k->next = lt->kept;
		lt->kept = k;
	}
	if (f != NULL)
		fclose(f);
}

void
lt_save(struct lt *lt)
{
	char temp[4200];
	FILE *f;

	if (!lt->dirty || *lt->path == '\0')
		return;
	snprintf(temp, sizeof(temp), "%s.new", lt->path);
	if ((f = fopen(temp, "w")) == NULL)
		return; /* it is a cache */
	for (const struct kept *k = lt->kept; k != NULL; k = k->next) {
		fprintf(f, "%u %u %u %u %u %u %u %u %.3f", k->key.kind, k->key.n, k->key.k, k->key.t, k->key.ldx, k->key.ldy, k->key.add,
		    k->key.aligned, (double)k->us);
		for (int i = 0; i < 8; i++)
			fprintf(f, " %llx", (unsigned long long)k->algo.data[i]);
		fprintf(f, "\n");
	}
	if (fclose(f) == 0 && rename(temp, lt->path) == 0)
		lt->dirty = false;
	else
		remove(temp);
}

static bool
prefer(cublasLtMatmulPreference_t *p, uint32_t aligned)
{
	static const cublasLtMatmulPreferenceAttributes_t of[] = {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
		CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
	size_t bytes = LT_WORKSPACE;
	bool ok = cublasLtMatmulPreferenceCreate(p) == CUBLAS_STATUS_SUCCESS &&
	    cublasLtMatmulPreferenceSetAttribute(*p, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes)) == CUBLAS_STATUS_SUCCESS;

	for (int i = 0; ok && i < 4; i++)
		ok = cublasLtMatmulPreferenceSetAttribute(*p, of[i], &aligned, sizeof(aligned)) == CUBLAS_STATUS_SUCCESS;
	return ok;
}

int
lt_new(struct lt **out, const char *cache_dir, const char *device, bool fast, char *why, size_t why_len)
{
	struct lt *lt = calloc(1, sizeof(*lt));
	cublasStatus_t s;

	*out = lt;
	if (lt == NULL)
		return snprintf(why, why_len, "out of memory"), -ENOMEM;
	lt->fast = fast;
	if ((s = cublasLtCreate(&lt->handle)) != CUBLAS_STATUS_SUCCESS)
		return snprintf(why, why_len, "cuBLASLt does not start: %s", cublasLtGetStatusString(s)), -ENODEV;
	if (!prefer(&lt->pref[0], 16) || !prefer(&lt->pref[1], 256))
		return snprintf(why, why_len, "cuBLASLt: no preference"), -ENODEV;
	if (cudaMalloc(&lt->workspace, LT_WORKSPACE) != cudaSuccess)
		return snprintf(why, why_len, "the card is out of memory: the workspace of cuBLASLt"), -ENOMEM;
	if (cache_dir != NULL) {
		int n = snprintf(lt->path, sizeof(lt->path), "%s/cublaslt-%zu%s-", cache_dir, cublasLtGetVersion(), fast ? "-fast" : "");

		for (const char *c = device; *c != '\0' && n > 0 && (size_t)n + 1 < sizeof(lt->path); c++)
			lt->path[n++] = (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9') ? *c : '-';
	}
	read_kept(lt);
	return 0;
}

static void
free_plan(struct plan *p)
{
	if (p->desc != NULL)
		cublasLtMatmulDescDestroy(p->desc);
	if (p->a != NULL)
		cublasLtMatrixLayoutDestroy(p->a);
	if (p->b != NULL)
		cublasLtMatrixLayoutDestroy(p->b);
	if (p->c != NULL)
		cublasLtMatrixLayoutDestroy(p->c);
	free(p);
}

void
lt_free(struct lt **ltp)
{
	struct lt *lt = *ltp;

	if (lt == NULL)
		return;
	for (uint32_t b = 0; b < BUCKETS; b++)
		for (struct plan *p = lt->plan[b], *next; p != NULL; p = next) {
			next = p->next;
			free_plan(p);
		}
	for (struct kept *k = lt->kept, *next; k != NULL; k = next) {
		next = k->next;
		free(k);
	}
	for (int i = 0; i < 2; i++)
		if (lt->pref[i] != NULL)
			cublasLtMatmulPreferenceDestroy(lt->pref[i]);
	if (lt->handle != NULL)
		cublasLtDestroy(lt->handle);
	cudaFree(lt->workspace);
	free(lt);
	*ltp = NULL;
}

/* ---- plans ---- */

static bool
set(struct plan *p, cublasLtMatmulDescAttributes_t a, const void *v, size_t n)
{
	return cublasLtMatmulDescSetAttribute(p->desc, a, v, n) == CUBLAS_STATUS_SUCCESS;
}

static bool
has_scales(const struct key *k)
{
	return k->kind == LT_FP8_OUTER || k->kind == LT_FP8_SQUARES;
}

static bool
describe(const struct lt *lt, struct plan *p)
{
	const struct key *k = &p->key;
	cudaDataType_t in = k->kind == LT_BF16 ? CUDA_R_16BF : CUDA_R_8F_E4M3;
	cublasOperation_t yes = CUBLAS_OP_T, no = CUBLAS_OP_N;
	bool outer = k->kind == LT_FP8_OUTER;
	int32_t a_mode = outer ? CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F : CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
	int32_t b_mode = outer ? CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F : CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
	int8_t fast = lt->fast;

	return cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
	    set(p, CUBLASLT_MATMUL_DESC_TRANSA, &yes, sizeof(yes)) && set(p, CUBLASLT_MATMUL_DESC_TRANSB, &no, sizeof(no)) &&
	    (k->kind == LT_BF16 || k->kind == LT_FP8_SQUARES || set(p, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof(fast))) &&
	    (!has_scales(k) || (set(p, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &a_mode, sizeof(a_mode)) &&
	        set(p, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &b_mode, sizeof(b_mode)))) &&
	    cublasLtMatrixLayoutCreate(&p->a, in, k->k, k->n, k->k) == CUBLAS_STATUS_SUCCESS &&
	    cublasLtMatrixLayoutCreate(&p->b, in, k->k, k->t, k->ldx) == CUBLAS_STATUS_SUCCESS &&
	    cublasLtMatrixLayoutCreate(&p->c, CUDA_R_32F, k->n, k->t, k->ldy) == CUBLAS_STATUS_SUCCESS;
}

struct operands {
	const void *w, *x;
	const float *w_scale, *x_scale;
	float *y;
	cudaStream_t stream;
};

static bool
point_at_scales(struct plan *p, const struct operands *o)
{
	return !has_scales(&p->key) || (set(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &o->w_scale, sizeof(o->w_scale)) &&
	    set(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &o->x_scale, sizeof(o->x_scale)));
}

static bool
multiply(const struct lt *lt, struct plan *p, const struct operands *o)
{
	float one = 1, beta = p->key.add ? 1 : 0;

	if (!point_at_scales(p, o))
		return false;
	return cublasLtMatmul(lt->handle, p->desc, &one, o->w, p->a, o->x, p->b, &beta, o->y, p->c, o->y, p->c, &p->algo,
	    lt->workspace, LT_WORKSPACE, o->stream) == CUBLAS_STATUS_SUCCESS;
}

static float
time_choice(struct lt *lt, struct plan *p, const struct operands *o)
{
	cudaEvent_t a = NULL, b = NULL;
	float ms = -1;
	bool ok = multiply(lt, p, o);

	cudaEventCreate(&a), cudaEventCreate(&b);
	cudaEventRecord(a, o->stream);
	for (int i = 0; i < TIMED && ok; i++)
		ok = multiply(lt, p, o);
	cudaEventRecord(b, o->stream);
	if (cudaEventSynchronize(b) != cudaSuccess || cudaEventElapsedTime(&ms, a, b) != cudaSuccess)
		ok = false;
	cudaEventDestroy(a), cudaEventDestroy(b);
	return ok ? ms * 1e3f / TIMED : -1;
}

/* What the file says is asked of the library once more: another card of this name may have it no longer. */
static bool
take_kept(const struct lt *lt, struct plan *p)
{
	cublasLtMatmulHeuristicResult_t r;

	for (const struct kept *k = lt->kept; k != NULL; k = k->next) {
		if (memcmp(&k->key, &p->key, sizeof(p->key)) != 0)
			continue;
		if (cublasLtMatmulAlgoCheck(lt->handle, p->desc, p->a, p->b, p->c, p->c, &k->algo, &r) != CUBLAS_STATUS_SUCCESS ||
		    r.state != CUBLAS_STATUS_SUCCESS || r.workspaceSize > LT_WORKSPACE)
			return false;
		p->algo = k->algo;
		p->us = k->us;
		return true;
	}
	return false;
}

/* To be found by take_kept() and written by lt_save(), before what an older file had. */
static void
keep(struct lt *lt, const struct plan *p, float us)
{
	struct kept *k = calloc(1, sizeof(*k)), *old;

	if (k == NULL)
		return;
	for (struct kept **at = &lt->kept; (old = *at) != NULL; at = &old->next)
		if (memcmp(&old->key, &p->key, sizeof(p->key)) == 0) {
			*at = old->next;
			free(old);
			break;
		}
	*k = (struct kept){p->key, us, p->algo, lt->kept};
	lt->kept = k;
	lt->dirty = true;
}

/* The first that runs; with tune, the fastest. */
static void
choose(struct lt *lt, struct plan *p, const struct operands *o, bool tune)
{
	cublasLtMatmulHeuristicResult_t found[CHOICES];
	cublasLtMatmulAlgo_t best = {{0}};
	float us = -1;
	int n = 0;

	memset(found, 0, sizeof(found));
	p->failed = true;
	if (cublasLtMatmulAlgoGetHeuristic(lt->handle, p->desc, p->a, p->b, p->c, p->c, lt->pref[p->key.aligned == 256], CHOICES, found, &n) !=
	    CUBLAS_STATUS_SUCCESS)
		return;
	tune = tune && n > 1;
	for (int i = 0; i < n; i++) {
		float t;

		if (found[i].state != CUBLAS_STATUS_SUCCESS)
			continue;
		p->algo = found[i].algo;
		if (!tune) {
			p->failed = false;
			return; /* multiply() tells whether it really runs */
		}
		t = time_choice(lt, p, o);
		if (t >= 0 && (us < 0 || t < us))
			best = p->algo, us = t;
	}
	p->failed = us < 0;
	p->algo = best;
	p->us = us;
	if (!p->failed)
		keep(lt, p, us);
}

static struct plan *
find_plan(const struct lt *lt, const struct key *key)
{
	struct plan *p = lt->plan[bucket_of(key)];

	while (p != NULL && memcmp(&p->key, key, sizeof(*key)) != 0)
		p = p->next;
	return p;
}

static struct plan *
plan_for(struct lt *lt, const struct key *key, const struct operands *o, bool tune)
{
	struct plan **at = &lt->plan[bucket_of(key)], *p = find_plan(lt, key);

	if (p != NULL)
		return p;
	p = calloc(1, sizeof(*p));
	if (p == NULL)
		return NULL;
	p->key = *key;
	p->next = *at;
	*at = p;
	/* With its scales: the library is asked about what will run. */
	if (!describe(lt, p) || !point_at_scales(p, o))
		p->failed = true;
	else if (!take_kept(lt, p))
		choose(lt, p, o, tune);
	return p;
}

static int
run(struct lt *lt, const struct key *key, const struct operands *o, bool tune)
{
	struct plan *p;

	if (key->kind == LT_FP8_SQUARES && (key->n % K_SQUARE != 0 || key->k % K_SQUARE != 0))
		return -ENOTSUP;
	if (key->k % 16 != 0 || key->n % 8 != 0 || key->t % 16 != 0 || key->ldy % 4 != 0 || (uintptr_t)o->w % 16 != 0 ||
	    (uintptr_t)o->x % 16 != 0 || (uintptr_t)o->y % 16 != 0 || (uintptr_t)o->w_scale % 16 != 0 || (uintptr_t)o->x_scale % 16 != 0)
		return -ENOTSUP;
	p = plan_for(lt, key, o, tune);
	if (p == NULL || p->failed)
		return -ENOTSUP;
	if (multiply(lt, p, o)) {
		lt->last = p;
		return 0;
	}
	p->failed = true;
	return -ENOTSUP;
}

static struct key
key_of(enum lt_kind kind, const struct operands *o, size_t ldx, size_t ldy, uint32_t n, uint32_t k, uint32_t t, bool add)
{
	uintptr_t all = (uintptr_t)o->w | (uintptr_t)o->x | (uintptr_t)o->y;

	return (struct key){kind, n, k, t, (uint32_t)ldx, (uint32_t)ldy, add, all % 256 == 0 ? 256 : 16};
}

int
lt_run(struct lt *lt, enum lt_kind kind, const void *w, const void *x, size_t ldx, float *y, size_t ldy, uint32_t n,
    uint32_t k, uint32_t t, bool add, const float *w_scale, const float *x_scale, cudaStream_t stream)
{
	struct operands o = {w, x, w_scale, x_scale, y, stream};
	struct key key = key_of(kind, &o, ldx, ldy, n, k, t, add);

	return run(lt, &key, &o, false);
}

int
lt_tune(struct lt *lt, enum lt_kind kind, const void *w, const void *x, size_t ldx, float *y, size_t ldy, uint32_t n,
    uint32_t k, uint32_t t, bool add, const float *w_scale, const float *x_scale, cudaStream_t stream)
{
	struct operands o = {w, x, w_scale, x_scale, y, stream};
	struct key key = key_of(kind, &o, ldx, ldy, n, k, t, add);

	lt->last = NULL;
	return run(lt, &key, &o, true);
}

enum lt_kind
lt_ran(const struct lt *lt)
{
	return (enum lt_kind)lt->last->key.kind;
}

bool
lt_timed(const struct lt *lt)
{
	return lt->last != NULL && lt->last->us > 0;
}

void
lt_against(struct lt *lt, float us)
{
	lt->last->wins = lt->last->us < us;
}

bool
lt_wins(const struct lt *lt, enum lt_kind kind, const void *w, const void *x, size_t ldx, const float *y, size_t ldy,
    uint32_t n, uint32_t k, uint32_t t, bool add)
{
	struct operands o = {w, x, NULL, NULL, (float *)(uintptr_t)y, NULL};
	struct key key = key_of(kind, &o, ldx, ldy, n, k, t, add);
	const struct plan *p = find_plan(lt, &key);

	return p != NULL && p->wins && !p->failed;
}
