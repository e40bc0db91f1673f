/* SPDX-License-Identifier: Apache-2.0 */
/* The tile kernels over emulated tiles, for checkkernels. */
#define AMX_EMULATED
#include "kernels/x86/amx.c"
