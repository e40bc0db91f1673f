/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_KERNELS_INTERNAL_H
#define OCTET_KERNELS_INTERNAL_H
/* What the levels share: the tables they fill, and the one exp. */
#include "kernels/kernels.h"

void kernels_fill_ref(struct k_ops *);
void kernels_fill_avx2(struct k_ops *);
void kernels_fill_avx512(struct k_ops *);
void kernels_fill_avx512bf16(struct k_ops *);
void kernels_fill_amx(struct k_ops *);

/* Of avx512.c, for amx.c: weights [from, to) of a block as BF16, [2 tiles][16 input pairs][16 channels][2 inputs], in
 * multiples of 64, the last of them last; totals of a panel, scaled, to y, past the caches if that is wanted: a store fence
 * must follow. */
void avx512_unpack(const struct k_weight *, uint32_t block, enum k_format, uint32_t from, uint32_t to, uint16_t out[1024]);
void avx512_write_panel(const struct k_linear *, uint32_t panel, uint32_t row, uint32_t rows, bool past,
    const float (*total)[K_PANEL]);

/* Also of avx512.c: attention of many query vectors, up to 64 at a time, by these products. q is BF16 [n, hd_pad], or what
 * prepare() made of that; k, v: one KV head of a page in BF16, next: what will be read after it, to be prefetched; score
 * [n][32] and out [n, hd_pad] may be written up to the next 16 vectors. */
struct k_products {
	void (*prepare)(const uint16_t *q, uint32_t n, uint32_t hd_pad, float *operands); /* NULL: nothing to do */
	void (*score)(const void *q, uint32_t n, uint32_t hd_pad, const uint16_t *k, const uint16_t *next,
	    float (*score)[32]);
	void (*weigh)(const uint16_t (*p)[32], uint32_t n, uint32_t hd_pad, const uint16_t *v, const uint16_t *next,
	    float *out);
};
bool avx512_are_many(const struct k_attention *); /* are there enough for that to pay */
void avx512_attend(const struct k_attention *, const struct k_products *);
void attention_avx512(const struct k_attention *);

/* k_pack_panel() without vectors: it defines the bytes. */
int k_pack_panel_ref(struct k_weight *, uint32_t panel, const uint16_t *rows, struct k_exception **exc, uint32_t *n_exc,
    uint32_t *cap, uint32_t *bad_row, uint32_t *bad_col);
bool kernels_have_avx512(void);
/* Of pack.c: the largest magnitude of a row; a tile of 16 channels [16, ld] with their exponents k, except the weights
 * of each pair of inputs that `left` has a bit for. */
struct k_packer {
	uint16_t (*absmax)(const uint16_t *row, uint32_t n);
	void (*tile)(const uint16_t *rows, size_t ld, const int16_t *k, uint8_t *hi, int8_t *lo, uint32_t left[16]);
};
const struct k_packer *kernels_packer(void); /* NULL: this machine has no vectors for it */

/* One of the rows of a call. */
static inline struct k_attention
k_attention_row(const struct k_attention *a, uint32_t row)
{
	struct k_attention one = *a;

	one.q += row * a->ld;
	one.out += row * a->ld;
	one.pos += row;
	one.rows = 1;
	return one;
}

/* Blocks [*from, *end) of a call for one row. */
static inline void
k_attention_blocks(const struct k_attention *a, uint32_t *from, uint32_t *end)
{
	*from = a->parts != NULL ? a->block0 : k_window_first(a->pos, a->window) / K_BLOCK;
	*end = a->parts != NULL ? a->block1 : a->pos / K_BLOCK + 1;
}

/* A block's part: the outputs; *max: its maxima, and its sums K_PART_HEADS behind them. */
static inline float *
k_part_of(const struct k_attention *a, uint32_t block, float **max)
{
	uint32_t heads = a->head1 - a->head0;
	float *part = a->parts + (block - a->block0) * k_part(heads, a->hd_pad);

	*max = part + (size_t)heads * a->hd_pad;
	return part;
}

/* The end of the heads from h on that share its KV head, at most `most` of them. */
static inline uint32_t
k_heads_end(const struct k_attention *a, uint32_t h, uint32_t most)
{
	uint32_t group = a->n_heads / a->n_kv_heads, to = (h / group + 1) * group;

	to = to > a->head1 ? a->head1 : to;
	return to - h > most ? h + most : to;
}

/* Rows of a call from `row` on, and heads [h, to) of one KV head: at most `vectors` of both. */
static inline struct k_attention
k_attention_some(const struct k_attention *a, uint32_t row, uint32_t h, uint32_t to, uint32_t vectors)
{
	struct k_attention some = k_attention_row(a, row);
	uint32_t most = vectors / (to - h);

	some.rows = a->rows - row < most ? a->rows - row : most;
	some.head0 = h, some.head1 = to;
	return some;
}

/* The slots of a block that a row at pos attends to. */
static inline uint32_t
k_slots_of(uint32_t pos, uint32_t window, uint32_t block)
{
	uint32_t at = block * K_BLOCK, first = k_window_first(pos, window), slots = 0xffffffffu;

	if (pos < at || first > at + 31)
		return 0;
	if (pos - at < 31)
		slots &= (2u << (pos - at)) - 1;
	if (first > at)
		slots &= 0xffffffffu << (first - at);
	return slots;
}

/* The same of n vectors, `heads` of each row; returns those that count for all, and in *any for one at least. */
static inline uint32_t
k_set_valid(const struct k_attention *a, uint32_t block, uint32_t heads, uint32_t n, uint32_t *valid, uint32_t *any)
{
	uint32_t all = 0xffffffffu, slots = 0;

	*any = 0;
	for (uint32_t i = 0; i < n; i++) {
		if (i % heads == 0)
			slots = k_slots_of(a->pos + i / heads, a->window, block);
		valid[i] = slots;
		all &= slots, *any |= slots;
	}
	return all;
}

void divergence_avx2(const float *a, const float *b, uint32_t n, float max_a, float max_b, double out[3]);
void divergence_avx512(const float *a, const float *b, uint32_t n, float max_a, float max_b, double out[3]);
double weights_avx2(const float *x, uint32_t n, float max, double temperature, double least, double *p);
double weights_avx512(const float *x, uint32_t n, float max, double temperature, double least, double *p);
bool scan_avx2(const float *x, uint32_t n, float *max);
bool scan_avx512(const float *x, uint32_t n, float *max);

/* Does an instruction sum as ref does? In a thread after kernels_thread_init(). */
bool amx_agrees(void);
bool avx512bf16_agrees(void);
bool avx512bf16_pays(void); /* is VDPBF16PS more than FMA here: it was measured at half of that, and at twice */

/* For these: magnitudes from 2^-104 to 2^24, so that products underflow too, subnormals and signed zeros. */
static inline uint16_t
k_some_bf16(uint64_t *state)
{
	uint32_t r, exp;

	*state = *state * 6364136223846793005u + 1442695040888963407u;
	r = (uint32_t)(*state >> 33);
	exp = r % 16 == 0 ? 0 : r % 16 < 8 ? 120 + r / 16 % 14 : 23 + r / 16 % 129;
	return (uint16_t)((r >> 15 & 0x8000) | exp << 7 | (r % 32 == 0 ? 0 : r >> 20 & 0x7f));
}

/* -O2 leaves short loops alone, and arrays of registers in memory. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

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

/* The same in FP64 for x <= 0, to r^13 and without FMA: within 3e-16 of exp(x). Below EXP64_MIN that of EXP64_MIN. */
#define EXP64_MIN -700.0
#define EXP64_LOG2E 0x1.71547652b82fep0
#define EXP64_LN2_HI 0x1.62e42fee00000p-1 /* 32 bits: n times it is exact */
#define EXP64_LN2_LO 0x1.a39ef35793c76p-33
#define EXP64_ROUND 0x1.8p52
#define EXP64_N 14
#define EXP64_C {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0, 1 / 5040.0, \
    1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 0.5, 1, 1}
#endif
