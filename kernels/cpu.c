/* SPDX-License-Identifier: Apache-2.0 */
/* Which kernels this machine can run. C fills the table, levels overwrite upward. */
#include <cpuid.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xmmintrin.h>

#include "kernels/internal.h"

#define FTZ_DAZ 0x8040u

#define AVX512_BF16 (1u << 5) /* of leaf 7, part 1, EAX */
#define AMX_BF16 (1u << 22) /* of leaf 7, EDX */
#define AMX_TILE (1u << 24)
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_TILE_DATA 18

/* What a machine lacks for a level, NULL if it has all. */
static const char *
lacks_nothing(void)
{
	return NULL;
}

static const char *
lacks_avx2(void)
{
	if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
		return NULL;
	return "needs AVX2 and FMA, which this machine lacks";
}

bool
kernels_have_avx512(void)
{
	return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static const char *
lacks_avx512(void)
{
	return kernels_have_avx512() ? NULL : "needs AVX-512 F, BW, VL and DQ, which this machine lacks";
}

/* In a state of floating point as kernels have it. */
static bool
checked(bool (*agrees)(void))
{
	uint32_t csr = _mm_getcsr();
	bool ok;

	kernels_thread_init();
	ok = agrees();
	_mm_setcsr(csr);
	return ok;
}

static const char *
lacks_avx512bf16(void)
{
	uint32_t a, b, c, d;

	if (lacks_avx512() != NULL || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & AVX512_BF16) == 0)
		return "needs AVX512-BF16 and AVX-512, which this machine lacks";
	return checked(avx512bf16_agrees) ? NULL : "is refused: VDPBF16PS of this machine does not sum as 'ref' does";
}

static const char *
lacks_amx(void)
{
	uint32_t a, b, c, d;

	if (lacks_avx512() != NULL || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & AMX_TILE) == 0 ||
	    (d & AMX_BF16) == 0)
		return "needs AMX-TILE, AMX-BF16 and AVX-512, which this machine lacks";
	/* Linux saves tiles only for processes that asked. */
	if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) != 0)
		return "needs AMX tiles, which the operating system of this machine does not grant";
	return checked(amx_agrees) ? NULL : "is refused: the tiles of this machine do not sum as 'ref' does";
}

static const struct level {
	const char *name;
	const char *(*lacks)(void);
	void (*fill)(struct k_ops *);
	bool (*pays)(void); /* NULL: always */
} levels[] = {
	{"ref", lacks_nothing, kernels_fill_ref, NULL},
	{"avx2", lacks_avx2, kernels_fill_avx2, NULL},
	{"avx512", lacks_avx512, kernels_fill_avx512, NULL},
	{"avx512bf16", lacks_avx512bf16, kernels_fill_avx512bf16, avx512bf16_pays},
	{"amx", lacks_amx, kernels_fill_amx, NULL},
};
#define N_LEVELS (sizeof(levels) / sizeof(*levels))

static struct k_ops table[N_LEVELS]; /* level i and all below it that exist and pay here */
static const char *lacks[N_LEVELS];
static size_t best;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void
fill_tables(void)
{
	__builtin_cpu_init();
	for (size_t i = 0; i < N_LEVELS; i++) {
		table[i] = table[best];
		lacks[i] = levels[i].lacks();
		if (lacks[i] == NULL) {
			levels[i].fill(&table[i]);
			best = levels[i].pays == NULL || levels[i].pays() ? i : best;
		}
		table[i].name = levels[i].name;
	}
}

const struct k_ops *
kernels_select(const char *level, char *why, size_t why_len)
{
	pthread_once(&once, fill_tables);
	if (level == NULL || *level == '\0')
		return &table[best];
	for (size_t i = 0; i < N_LEVELS; i++) {
		if (strcmp(level, levels[i].name) != 0)
			continue;
		if (lacks[i] == NULL)
			return &table[i];
		snprintf(why, why_len, "CPU level '%s' %s", level, lacks[i]);
		return NULL;
	}
	snprintf(why, why_len, "unknown CPU level '%s' (ref, avx2, avx512, avx512bf16, amx)", level);
	return NULL;
}

const char *
kernels_level(size_t i)
{
	return i < N_LEVELS ? levels[i].name : NULL;
}

void
kernels_thread_init(void)
{
	_mm_setcsr(_mm_getcsr() | FTZ_DAZ);
}
