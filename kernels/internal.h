/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_KERNELS_INTERNAL_H
#define OCTET_KERNELS_INTERNAL_H
/* What the levels share: the tables they fill, and the one exp. */
#include "kernels/kernels.h"

void kernels_fill_ref(struct k_ops *);
void kernels_fill_avx2(struct k_ops *);
void kernels_fill_avx512(struct k_ops *);

/*
 * exp(x) for x <= 0 and a little above: 2^n * p(r), r = x - n ln 2 in two steps
 * (Cody and Waite), p the Taylor polynomial to r^6 by Horner. The levels do
 * exactly these operations in this order. Below EXP_MIN the result is 0, above
 * EXP_MAX it is that of EXP_MAX; NaN stays NaN.
 */
#define EXP_MIN -87.0f
#define EXP_MAX 88.0f
#define EXP_LOG2E 1.44269504088896341f
#define EXP_LN2_HI 0.693359375f
#define EXP_LN2_LO -2.12194440e-4f
#define EXP_ROUND 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer */
#define EXP_C6 1.38888889e-3f
#define EXP_C5 8.33333333e-3f
#define EXP_C4 4.16666667e-2f
#define EXP_C3 1.66666667e-1f
#define EXP_C2 0.5f
#endif
