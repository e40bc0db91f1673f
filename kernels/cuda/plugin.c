/* SPDX-License-Identifier: Apache-2.0 */
/* The plugin's table: opening a card, what it tells of itself, NVML. */
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/plugin.h"

static uint32_t opened[256]; /* of each card: by this process */

#define FP8_CAPABILITY 89u /* Ada, then Hopper and what follows */

int
cu_failed(cudaError_t e, const char *what, char *why, size_t why_len)
{
	if (e == cudaSuccess)
		return 0;
	if (e == cudaErrorMemoryAllocation) {
		snprintf(why, why_len, "the card is out of memory: %s", what);
		return -ENOMEM;
	}
	snprintf(why, why_len, "CUDA: %s: %s", what, cudaGetErrorString(e));
	return -EIO;
}

/* ---- NVML: clocks and power, if its library is there ---- */

struct nvml_memory { unsigned long long total, free, used; };
struct nvml_use { unsigned gpu, memory; };

static void *
nvml_call(const struct kd_device *d, const char *name)
{
	return d->nvml != NULL ? dlsym(d->nvml, name) : NULL;
}

static void
open_nvml(struct kd_device *d)
{
	int (*init)(void), (*by_bus)(const char *, void **);
	char bus[32] = "";

	d->nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
	*(void **)(&init) = nvml_call(d, "nvmlInit_v2");
	*(void **)(&by_bus) = nvml_call(d, "nvmlDeviceGetHandleByPciBusId_v2");
	if (init == NULL || by_bus == NULL || cudaDeviceGetPCIBusId(bus, sizeof(bus), d->index) != cudaSuccess || init() != 0 ||
	    by_bus(bus, &d->nvml_device) != 0)
		d->nvml_device = NULL;
}

/* A number of NVML's by the name of its call; kind: its second argument where there is one, else -1. */
static uint32_t
nvml_number(const struct kd_device *d, const char *name, int kind)
{
	int (*plain)(void *, unsigned *), (*of_kind)(void *, int, unsigned *), rc;
	unsigned v = 0;

	*(void **)(&plain) = nvml_call(d, name);
	*(void **)(&of_kind) = nvml_call(d, name);
	if (d->nvml_device == NULL || plain == NULL)
		return 0;
	rc = kind < 0 ? plain(d->nvml_device, &v) : of_kind(d->nvml_device, kind, &v);
	return rc == 0 ? v : 0;
}

static void
close_nvml(struct kd_device *d)
{
	int (*shutdown)(void);

	*(void **)(&shutdown) = nvml_call(d, "nvmlShutdown");
	if (d->nvml_device != NULL && shutdown != NULL)
		shutdown();
	if (d->nvml != NULL)
		dlclose(d->nvml);
}

/* ---- opening ---- */

static int
find_card(struct kd_device *d, char *why, size_t why_len)
{
	struct cudaDeviceProp prop;
	int n = 0, driver = 0, runtime = 0, major = 0, minor = 0, sms = 0, rc;
	cudaError_t e = cudaGetDeviceCount(&n);

	cudaDriverGetVersion(&driver);
	cudaRuntimeGetVersion(&runtime);
	if (e == cudaErrorInsufficientDriver && driver == 0)
		return snprintf(why, why_len, "no NVIDIA driver on this machine"), -ENODEV;
	if (e == cudaErrorInsufficientDriver)
		return snprintf(why, why_len, "the NVIDIA driver is too old: it speaks CUDA %d.%d, this plugin needs %d.%d", driver / 1000,
		    driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10), -ENODEV;
	if (e != cudaSuccess)
		return snprintf(why, why_len, "no card: %s", cudaGetErrorString(e)), -ENODEV;
	if (d->index >= n)
		return snprintf(why, why_len, "device = %d: this machine has %d", d->index, n), -ENODEV;
	if ((rc = cu_failed(cudaSetDevice(d->index), "choosing the card", why, why_len)) != 0 ||
	    (rc = cu_failed(cudaGetDeviceProperties(&prop, d->index), "asking the card", why, why_len)) != 0)
		return rc;
	opened[d->index]++, d->counted = true;
	cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d->index);
	cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, d->index);
	cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, d->index);
	snprintf(d->name, sizeof(d->name), "%.63s", prop.name);
	d->capability = (uint32_t)(major * 10 + minor), d->sm_count = (uint32_t)sms;
	snprintf(d->kernels, sizeof(d->kernels), "CUDA %d.%d, driver %d.%d, cuBLASLt %zu, sm_%u", runtime / 1000, runtime % 1000 / 10,
	    driver / 1000, driver % 1000 / 10, cublasLtGetVersion(), d->capability);
	if (d->capability < FP8_CAPABILITY)
		return snprintf(why, why_len, "%s has no FP8: it is of compute capability %d.%d, 8.9 is needed", d->name, major, minor),
		    -ENODEV;
	return 0;
}

static cudaEvent_t *
event_of(struct kd_device *d, uint32_t i)
{
	return i % 2 == 0 ? &d->flight[i / 2].begin : &d->flight[i / 2].end;
}

static void
plugin_close(struct kd_device **dp)
{
	struct kd_device *d = *dp;

	if (d == NULL)
		return;
	cudaSetDevice(d->index);
	if (d->stream != NULL)
		step_free_graphs(d);
	lt_free(&d->lt);
	weights_free(d);
	for (uint32_t i = 0; i < 2 * KD_AHEAD; i++) {
		cudaEvent_t *e = event_of(d, i);

		if (*e != NULL)
			cudaEventDestroy(*e);
	}
	if (d->stream != NULL)
		cudaStreamDestroy(d->stream);
	close_nvml(d);
	/* The context holds some hundred MB of the card, which a daemon that fell back to its CPU has no use for. */
	if (d->counted && --opened[d->index] == 0)
		cudaDeviceReset();
	free(d);
	*dp = NULL;
}

static int
plugin_open(struct kd_device **out, uint32_t index, char *why, size_t why_len)
{
	struct kd_device *d = calloc(1, sizeof(*d));
	int rc;

	*out = NULL;
	if (d == NULL)
		return snprintf(why, why_len, "out of memory"), -ENOMEM;
	d->index = (int)index;
	if (index >= sizeof(opened) / sizeof(*opened)) {
		free(d);
		return snprintf(why, why_len, "device = %u: there are not so many", index), -ENODEV;
	}
	if ((rc = find_card(d, why, why_len)) != 0 ||
	    (rc = cu_failed(cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking), "a stream", why, why_len)) != 0) {
		plugin_close(&d);
		return rc;
	}
	for (uint32_t i = 0; i < 2 * KD_AHEAD; i++)
		if ((rc = cu_failed(cudaEventCreate(event_of(d, i)), "an event", why, why_len)) != 0) {
			plugin_close(&d);
			return rc;
		}
	open_nvml(d);
	*out = d;
	return 0;
}

static bool
plugin_has_fp8(const struct kd_device *d)
{
	return d->capability >= FP8_CAPABILITY;
}

static int
plugin_load(struct kd_device *d, const struct kd_model *m, char *why, size_t why_len)
{
	size_t free_now = 0, total = 0;
	int rc;

	cudaSetDevice(d->index);
	/* Its workspace before the KV pool has all that is left. */
	if ((rc = lt_new(&d->lt, m->cache_dir, d->name, m->fast_accumulation, why, why_len)) != 0 ||
	    (rc = weights_load(d, m, why, why_len)) != 0 ||
	    (rc = cu_failed(cudaGetLastError(), "loading the model", why, why_len)) != 0)
		return rc;
	step_tune(d);
	cudaMemGetInfo(&free_now, &total);
	__atomic_store_n(&d->mem_used, total - free_now, __ATOMIC_RELAXED);
	return 0;
}

/* ---- what it tells ---- */

static enum k_format
plugin_executes(const struct kd_device *d, uint32_t group, uint32_t layer, enum k_format f)
{
	(void)d, (void)group, (void)layer; /* own kernels take what cuBLASLt does not */
	return f;
}

/* What takes more rows than own kernels do: as it was found when the model was loaded. */
static const char *
library_of(const struct kd_device *d, const struct bundle *b, uint32_t layer, enum k_format f)
{
	static const char *const names[][2] = {[LT_BF16] = {"cuBLASLt bf16", "cuBLASLt bf16"},
	    [LT_FP8_OUTER] = {"cuBLASLt e4m3 outer-vector", "cuBLASLt e4m3 outer-vector, fast accumulation"},
	    [LT_FP8_SCALAR] = {"cuBLASLt e4m3 unit scales", "cuBLASLt e4m3 unit scales, fast accumulation"},
	    [LT_FP8_SQUARES] = {"cuBLASLt e4m3 blk128x128", "cuBLASLt e4m3 blk128x128"}};
	enum k_format as = f == K_FP8W ? K_BF16 : f == K_FP8T ? K_FP8 : f;
	uint8_t took = b == NULL ? 0 : d->took[b->head ? N_BUNDLES : b - d->layer[layer].b][as];

	return took == TOOK_NONE ? "the same, 64 at a time" : took == 0 ? "cuBLASLt" : names[took - 1][d->m.fast_accumulation];
}

static void
plugin_kernel_name(const struct kd_device *d, uint32_t group, uint32_t layer, enum k_format f, char *out, size_t len)
{
	bool any = (d->m.head_dim != 64 && d->m.head_dim != 128) || d->m.n_heads / (d->m.n_kv_heads + !d->m.n_kv_heads) > 16;

	uint32_t part = 0;
	const struct bundle *b = group <= KD_LM_HEAD && d->layer != NULL ? weights_of(d, group, layer, &part) : NULL;
	bool nested = b != NULL && b->lo[part] != NULL;
	const char *library = library_of(d, b, layer, f);

	if (group == KD_KV_CACHE)
		snprintf(out, len, "%s, %s pages", any ? "attend_any" : "attend (mma)", f == K_FP8 ? "E4M3" : "BF16");
	else if (f == K_BF16)
		snprintf(out, len, "mma bf16 %s to 64 rows, then %s%s", nested ? "nested" : "plain", library, nested ? " of unpacked planes" : "");
	else if (f == K_FP8W)
		snprintf(out, len, "mma e4m3 x bf16 to 64 rows, then %s of unpacked codes", library);
	else if (f == K_FP8B)
		snprintf(out, len, "e4m3 of masters each time: mma by squares to 64 rows, then %s", library);
	else
		snprintf(out, len, "mma e4m3 to 64 rows, then %s%s", library, f == K_FP8T ? " of rescaled codes" : "");
}

static void
plugin_status(struct kd_device *d, struct kd_status *out)
{
	*out = (struct kd_status){.sm_mhz = nvml_number(d, "nvmlDeviceGetClockInfo", 1), .mem_mhz = nvml_number(d, "nvmlDeviceGetClockInfo", 2),
	    .watts = nvml_number(d, "nvmlDeviceGetPowerUsage", -1) / 1000,
	    .limit_watts = nvml_number(d, "nvmlDeviceGetEnforcedPowerLimit", -1) / 1000,
	    .celsius = nvml_number(d, "nvmlDeviceGetTemperature", 0), .graphs = __atomic_load_n(&d->captured, __ATOMIC_RELAXED),
	    .graph_launches = __atomic_load_n(&d->graph_launches, __ATOMIC_RELAXED),
	    .eager_steps = __atomic_load_n(&d->eager_steps, __ATOMIC_RELAXED),
	    .host_us = __atomic_load_n(&d->host_us, __ATOMIC_RELAXED), .device_us = __atomic_load_n(&d->device_us, __ATOMIC_RELAXED),
	    .busy_s = (double)__atomic_load_n(&d->busy_us, __ATOMIC_RELAXED) / 1e6};
	int (*use)(void *, struct nvml_use *), (*memory)(void *, struct nvml_memory *);
	struct nvml_memory mem = {0};
	struct nvml_use u = {0};

	*(void **)(&use) = nvml_call(d, "nvmlDeviceGetUtilizationRates");
	*(void **)(&memory) = nvml_call(d, "nvmlDeviceGetMemoryInfo");
	if (d->nvml_device != NULL && use != NULL && use(d->nvml_device, &u) == 0)
		out->busy_percent = u.gpu;
	out->mem_used = __atomic_load_n(&d->mem_used, __ATOMIC_RELAXED);
	if (d->nvml_device != NULL && memory != NULL && memory(d->nvml_device, &mem) == 0)
		out->mem_used = mem.used, out->mem_total = mem.total;
	snprintf(out->device, sizeof(out->device), "%s", d->name);
	snprintf(out->kernels, sizeof(out->kernels), "%s", d->kernels);
	if (__atomic_load_n(&d->failed, __ATOMIC_ACQUIRE))
		snprintf(out->failure, sizeof(out->failure), "%s", d->failure);
}

static const struct kd_api api = {KD_ABI, sizeof(struct kd_api), "cuda", plugin_open, plugin_close, plugin_has_fp8,
    weights_memory, plugin_load, step_submit, step_wait, step_find_nonfinite, plugin_executes, plugin_kernel_name, plugin_status};

__attribute__((visibility("default"))) extern const struct kd_api *const octet_device_api;
const struct kd_api *const octet_device_api = &api;
