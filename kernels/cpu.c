/* SPDX-License-Identifier: Apache-2.0 */
/* Which kernels this machine can run. C fills the table, levels overwrite upward. */
#include <cpuid.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <xmmintrin.h>

#include "kernels/internal.h"

#define FTZ_DAZ 0x8040u

static bool
always(void)
{
	return true;
}

static bool
has_avx2(void)
{
	uint32_t a, b, c, d;

	/* The builtin of clang 14 does not know F16C. */
	return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
	    (c & bit_F16C) != 0;
}

static bool
has_avx512(void)
{
	return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static const struct level {
	const char *name, *needs;
	bool (*here)(void);
	void (*fill)(struct k_ops *);
} levels[] = {
	{"ref", "", always, kernels_fill_ref},
	{"avx2", "AVX2, FMA and F16C", has_avx2, kernels_fill_avx2},
	{"avx512", "AVX-512 F, BW, VL and DQ", has_avx512, kernels_fill_avx512},
};
#define N_LEVELS (sizeof(levels) / sizeof(*levels))

static struct k_ops table[N_LEVELS]; /* level i and all below it that exist here */
static size_t best;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void
fill_tables(void)
{
	__builtin_cpu_init();
	for (size_t i = 0; i < N_LEVELS; i++) {
		if (i > 0)
			table[i] = table[i - 1];
		if (levels[i].here()) {
			levels[i].fill(&table[i]);
			best = i;
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
		if (levels[i].here())
			return &table[i];
		snprintf(why, why_len, "CPU level '%s' needs %s, which this machine lacks", level, levels[i].needs);
		return NULL;
	}
	snprintf(why, why_len, "unknown CPU level '%s' (ref, avx2, avx512)", level);
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
