/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fp8b: a scale for each square of 128 channels by 128 inputs, and for each 128 inputs of a row. For comparing what
 * scales cost and bring: there is no plane for it, so the codes of a square are made of its masters each time, and then
 * the level's own linear layer runs over them as over a little matrix.
 */
#include <string.h>

#include "kernels/internal.h"

#define ROWS 128u                     /* that share one making of the codes */
#define BLOCKS (K_SQUARE / K_BLOCK)

/* Of blocks [block, block + n) of a panel, which lie in a square of scale s. */
static void
make_codes(const struct k_ops *ops, const struct k_weight *w, uint32_t block, uint32_t n, float s, uint8_t *out, uint8_t *flag)
{
	ops->square_codes(w, block, n, s, out, flag);
	for (uint32_t b = 0; b < n; b++, out += 1024) {
		uint32_t n_exc = 0;
		const struct k_exception *x = w->flag[block + b] & K_HAS_EXCEPTIONS ? k_find_exceptions(w, block + b, &n_exc) : NULL;

		for (uint32_t j = 0; j < n_exc; j++) {
			/* By the bits: whether subnormals count must not depend on the thread. */
			out[x[j].index] = (x[j].bits & 0x7f80) == 0 ? (uint8_t)(x[j].bits >> 8 & 0x80) :
			    k_e4m3_from_float(k_bf16_to_float(x[j].bits) / s);
			flag[b] |= (uint8_t)(K_HAS_SMALL << x[j].index / 512);
		}
	}
}

static void
add_square(const struct k_ops *ops, const struct k_linear *a, uint32_t panel, uint32_t square, uint32_t row, uint32_t rows,
    float (*total)[K_PANEL])
{
	_Alignas(64) uint8_t codes[BLOCKS * 1024];
	uint8_t flag[BLOCKS];
	_Alignas(64) float y[ROWS][K_PANEL], ones[K_PANEL];
	uint32_t from = square * BLOCKS, left = a->w->k_pad / K_BLOCK - from, n = left < BLOCKS ? left : BLOCKS;
	struct k_weight w = {.n = K_PANEL, .k = n * K_BLOCK, .n_pad = K_PANEL, .k_pad = n * K_BLOCK, .hi = codes, .scale = ones,
	    .flag = flag};
	float s = a->w->square[(size_t)panel * k_squares(a->w->k) + square];

	for (uint32_t c = 0; c < K_PANEL; c++)
		ones[c] = 1;
	make_codes(ops, a->w, panel * (a->w->k_pad / K_BLOCK) + from, n, s, codes, flag);
	ops->linear(&(struct k_linear){.w = &w, .format = K_FP8W, .x = a->x + row * a->ldx + from * K_BLOCK, .ldx = a->ldx,
	    .rows = rows, .y = y[0], .ldy = K_PANEL, .panel1 = 1});
	for (uint32_t r = 0; r < rows; r++) {
		float both = a->x_scale[(row + r) * a->ld_scale + square] * s;

		for (uint32_t c = 0; c < K_PANEL; c++)
			total[r][c] = total[r][c] + y[r][c] * both;
	}
}

static void
linear_squares(const struct k_ops *ops, const struct k_linear *a, uint32_t panel, uint32_t row, uint32_t rows)
{
	uint32_t first = panel * K_PANEL, n = a->w->n - first < K_PANEL ? a->w->n - first : K_PANEL;
	float total[ROWS][K_PANEL];

	memset(total, 0, rows * sizeof(*total));
	for (uint32_t b = 0; b < k_squares(a->w->k); b++)
		add_square(ops, a, panel, b, row, rows, total);
	for (uint32_t r = 0; r < rows; r++) {
		float *y = a->y + (row + r) * a->ldy + first;

		for (uint32_t c = 0; c < n; c++)
			y[c] = a->add ? y[c] + total[r][c] : total[r][c];
	}
}

void
k_linear_run(const struct k_ops *ops, const struct k_linear *a)
{
	if (a->format != K_FP8B) {
		ops->linear(a);
		return;
	}
	for (uint32_t panel = a->panel0; panel < a->panel1; panel++)
		for (uint32_t r = 0; r < a->rows; r += ROWS)
			linear_squares(ops, a, panel, r, a->rows - r < ROWS ? a->rows - r : ROWS);
}

void
k_act_squares(const struct k_ops *ops, const float *x, uint32_t n, uint32_t n_pad, uint16_t *out, float *scale)
{
	for (uint32_t b = 0; b < k_squares(n); b++) {
		uint32_t at = b * K_SQUARE, end = n_pad - at < K_SQUARE ? n_pad : at + K_SQUARE;

		ops->act_fp8(x + at, (n < end ? n : end) - at, end - at, out + at, &scale[b]);
	}
}
