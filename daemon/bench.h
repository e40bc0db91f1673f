/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_BENCH_H
#define OCTET_BENCH_H
#include <stdbool.h>
#include <stdint.h>
#include "client/err.h"

#define BENCH_MAX_ROUNDS 100u

/*
 * octetd --bench: loads a model, serves nobody, and prints what its forward
 * pass reaches in every format beside what the machine could do: tokens/s,
 * GB/s, FLOP/s, memory, time of a load and of a flip.
 */
struct bench_options {
	const char *model;   /* directory */
	const char *only;    /* run the tests whose "FORMAT TEST N" has these words in a row; NULL: all */
	uint32_t threads;    /* 0: the CPUs of the affinity mask */
	bool json;
	bool cuda;           /* on the card that CUDA calls 0, beside nobody's ceilings but memory's */
	bool fast_accumulation; /* there */
	uint32_t rounds;     /* of which the median is taken, BENCH_MAX_ROUNDS at most; 0: 5 */
	uint32_t context;    /* positions behind a decoding sequence; 0: 128 */
};

/* Prints to standard output. A negative errno and *err: nothing was measured. */
int bench_run(const struct bench_options *, struct err *);
#endif
