/* SPDX-License-Identifier: Apache-2.0 */
/* Rows of logits, for both widths. */
#include <string.h>

#include "kernels/internal.h"

#define INLINE static inline __attribute__((always_inline))

#define LANES 4
#define TARGET __attribute__((target("avx2")))
#define OF(name) name##_avx2
#include "kernels/x86/logits.h"

#define LANES 8
#define TARGET __attribute__((target("avx512f,avx512dq")))
#define OF(name) name##_avx512
#include "kernels/x86/logits.h"
