/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_KERNELS_H
#define OCTET_KERNELS_H
/* placeholder by the lead until the kernels helper writes the final one (same content as specified) */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
enum k_format { K_BF16, K_FP8, K_FP8W, K_N_FORMATS };
#define K_BLOCK 32
#define K_PANEL 32
struct k_exception { uint32_t block; uint16_t index; uint16_t bits; };
struct k_weight {
	uint32_t n, k, n_pad, k_pad;
	uint8_t *hi;
	int8_t *lo;
	float *scale;
	uint8_t *flag;
	struct k_exception *exc; uint32_t n_exc;
};
struct k_linear {
	const struct k_weight *w; enum k_format format;
	const uint16_t *x;
	const float *x_scale;
	uint32_t rows; size_t ldx; float *y; size_t ldy;
	bool add;
	uint32_t panel0, panel1;
};
struct k_attention {
	const float *q;
	float *out;
	const uint16_t *const *pages;
	uint32_t n_heads, n_kv_heads, head_dim, hd_pad, head0, head1, pos;
	float scale;
};
struct k_ops { const char *name;
	void (*linear)(const struct k_linear *);
	void (*act_bf16)(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out);
	void (*act_fp8)(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out, float *scale);
	void (*rmsnorm)(const float *x, const float *w, uint32_t n, float eps, float *y);
	void (*rope)(float *x, uint32_t n_heads, uint32_t head_dim, const float *cos, const float *sin);
	void (*silu_mul)(const float *gate, const float *up, uint32_t n, float *y);
	void (*kv_write)(uint16_t *page, const float *k, const float *v, uint32_t n_kv_heads, uint32_t head_dim, uint32_t hd_pad, uint32_t slot);
	void (*attention)(const struct k_attention *);
};
const struct k_ops *kernels_select(const char *level, char *why, size_t why_len);
void kernels_thread_init(void);
uint8_t k_e4m3_from_float(float);
float k_e4m3_to_float(uint8_t);
uint16_t k_bf16_from_float(float);
float k_bf16_to_float(uint16_t);
size_t k_weight_plan(struct k_weight *w, uint32_t n, uint32_t k);
void k_weight_place(struct k_weight *w, void *mem);
int k_pack_panel(struct k_weight *w, uint32_t panel, const uint16_t *rows, struct k_exception **exc, uint32_t *n_exc, uint32_t *cap, uint32_t *bad_row, uint32_t *bad_col);
uint16_t k_unpack(const struct k_weight *w, uint32_t row, uint32_t col);
void k_unpack_row(const struct k_weight *w, uint32_t row, float *y);
#endif
