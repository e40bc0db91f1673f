/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Number formats and nested weights: the E4M3 and BF16 codecs, packing a
 * panel into its two planes, reading a weight back.
 */
#include "kernels/internal.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static uint32_t
bits_of(float f)
{
	uint32_t u;

	memcpy(&u, &f, sizeof(u));
	return u;
}

static float
float_of(uint32_t u)
{
	float f;

	memcpy(&f, &u, sizeof(f));
	return f;
}

uint16_t
k_bf16_from_float(float f)
{
	uint32_t u = bits_of(f);

	if ((u & 0x7fffffffu) > 0x7f800000u)
		return (uint16_t)(u >> 16 | 0x40);
	return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

float
k_bf16_to_float(uint16_t b)
{
	return float_of((uint32_t)b << 16);
}

/* The OCP E4M3 (FN) format: bias 7, no infinities, 0x7f is NaN, largest 448. */
float
k_e4m3_to_float(uint8_t c)
{
	uint32_t sign = (uint32_t)(c & 0x80) << 24, mag = c & 0x7f;

	if (mag == 0x7f)
		return float_of(sign | 0x7fc00000u);
	if (mag < 8)
		return float_of(sign | bits_of((float)mag * 0x1p-9f));
	return float_of(sign | (mag + (120u << 3)) << 20);
}

/* Integer arithmetic only: it means the same with FTZ and DAZ on. */
uint8_t
k_e4m3_from_float(float f)
{
	uint32_t u = bits_of(f), mag = u & 0x7fffffffu;
	uint8_t sign = (uint8_t)(u >> 24 & 0x80);

	if (mag > 0x7f800000u)
		return sign | 0x7f;
	if (mag >= bits_of(0x1p-6f)) {
		uint32_t r = mag + 0x7ffffu + (mag >> 20 & 1); /* nearest even at 3 bits */

		r = (r >> 20) - (120u << 3);
		return sign | (uint8_t)(r > 0x7e ? 0x7e : r);
	}
	/* Subnormal: multiples of 2^-9. Below half of one it is zero. */
	uint32_t exp = mag >> 23, frac = (mag & 0x7fffffu) | 0x800000u, shift;
	if (exp < 117)
		return sign;
	shift = 141 - exp; /* value = frac * 2^(exp-150); code = value * 2^9 */
	return sign | (uint8_t)((frac + (1u << (shift - 1)) - 1 + (frac >> shift & 1)) >> shift);
}

/* |w| as a double. By hand, since kernel threads read subnormal floats as 0. */
static double
magnitude(uint16_t bits)
{
	uint32_t exp = bits >> 7 & 0xff, frac = bits & 0x7f;

	return exp == 0 ? ldexp(frac, -133) : ldexp(frac + 128.0, (int)exp - 134);
}

/* ---- layout ---- */

static size_t
align64(size_t n)
{
	return (n + 63) & ~(size_t)63;
}

size_t
k_weight_plan(struct k_weight *w, uint32_t n, uint32_t k)
{
	size_t plane, blocks;

	memset(w, 0, sizeof(*w));
	w->n = n, w->k = k;
	w->n_pad = (n + K_PANEL - 1) / K_PANEL * K_PANEL;
	w->k_pad = (k + K_BLOCK - 1) / K_BLOCK * K_BLOCK;
	plane = (size_t)w->n_pad * w->k_pad;
	blocks = (size_t)(w->n_pad / K_PANEL) * (w->k_pad / K_BLOCK);
	return align64(plane) * 2 + align64(w->n_pad * sizeof(float)) + align64(blocks) +
	    align64((size_t)(w->n_pad / K_PANEL) * k_squares(k) * sizeof(float));
}

void
k_weight_place(struct k_weight *w, void *mem)
{
	size_t plane = align64((size_t)w->n_pad * w->k_pad);
	uint8_t *p = mem;

	w->hi = p;
	w->lo = (int8_t *)(p + plane);
	w->scale = (float *)(void *)(p + 2 * plane);
	w->flag = p + 2 * plane + align64(w->n_pad * sizeof(float));
	w->square = (float *)(void *)(w->flag + align64((size_t)(w->n_pad / K_PANEL) * (w->k_pad / K_BLOCK)));
}

/* Where (channel, input) of a panel lies inside its block. */
static uint32_t
index_in_block(uint32_t channel, uint32_t input)
{
	return (channel / 16 * 16 + input / 2) * 32 + channel % 16 * 2 + input % 2;
}

static uint32_t
block_of(const struct k_weight *w, uint32_t row, uint32_t col)
{
	return row / K_PANEL * (w->k_pad / K_BLOCK) + col / K_BLOCK;
}

/* ---- packing ---- */

static uint16_t
absmax(const uint16_t *row, uint32_t n)
{
	uint16_t max = 0;

	for (uint32_t i = 0; i < n; i++)
		max = (row[i] & 0x7fff) > max ? row[i] & 0x7fff : max;
	return max;
}

/* k = floor(log2(448 / absmax)), exact: 448 = 1.75 * 2^8. */
static int
exponent_for(uint16_t max)
{
	int e, k;

	if (max == 0)
		return 120;
	frexp(magnitude(max), &e); /* max = m * 2^e, m in [0.5, 1) */
	k = 9 - e;
	if (ldexp(magnitude(max), k) > 448)
		k--;
	return k > 120 ? 120 : k < -120 ? -120 : k;
}

static int
push_exception(struct k_exception **exc, uint32_t *n, uint32_t *cap, struct k_exception x)
{
	if (*n == *cap) {
		uint32_t more = *cap == 0 ? 64 : *cap * 2;
		struct k_exception *p = realloc(*exc, more * sizeof(*p));

		if (p == NULL)
			return -ENOMEM;
		*exc = p;
		*cap = more;
	}
	(*exc)[(*n)++] = x;
	return 0;
}

/* Splits one weight; false if it is an exception. Runs with or without FTZ:
 * the product by a power of two is made in double. */
static bool
split_any(uint16_t bits, int k, uint8_t *hi, int8_t *lo)
{
	double v = ldexp(magnitude(bits), k);
	uint8_t sign = (uint8_t)(bits >> 8 & 0x80), c;
	int32_t d;

	*lo = 0;
	if ((bits & 0x7fff) == 0) {
		*hi = sign;
		return true;
	}
	if (v < 0x1p-126) { /* no BF16 normal: far below the smallest code too */
		*hi = sign;
		return false;
	}
	c = k_e4m3_from_float((float)v);
	*hi = sign | c;
	d = (int32_t)(bits_of((float)v) >> 16) - (int32_t)(c == 0 ? 0 : bits_of(k_e4m3_to_float(c)) >> 16);
	if (d < -128 || d > 127)
		return false;
	*lo = (int8_t)d;
	return true;
}

/* The same. A normal weight whose product is a normal E4M3, as nearly all are,
 * needs integers only: k goes onto the exponent, rounding drops 4 bits. */
static inline bool
split(uint16_t bits, int k, uint8_t *hi, int8_t *lo)
{
	int32_t mag = bits & 0x7fff, v = mag + k * 128, c;

	if (mag < 0x80 || v < 0x3c80) /* subnormal; below 2^-6 */
		return split_any(bits, k, hi, lo);
	c = (v + 7 + (v >> 4 & 1)) >> 4;
	*hi = (uint8_t)(bits >> 8 & 0x80) | (uint8_t)(c - (120 << 3));
	*lo = (int8_t)(v - (c << 4));
	return true;
}

struct packing {
	const struct k_packer *by; /* NULL: without vectors */
	struct k_weight *w;
	const uint16_t *rows;
	int16_t k[K_PANEL];
	struct k_exception **exc;
	uint32_t *n_exc, *cap;
};

static int
pack_weight(const struct packing *p, uint32_t block, uint32_t index, uint32_t r, uint32_t i)
{
	size_t at = (size_t)block * K_PANEL * K_BLOCK + index;
	uint16_t bits = p->rows[(size_t)r * p->w->k + i];

	if (split(bits, p->k[r], &p->w->hi[at], &p->w->lo[at]))
		return 0;
	p->w->flag[block] |= K_HAS_EXCEPTIONS;
	return push_exception(p->exc, p->n_exc, p->cap, (struct k_exception){block, (uint16_t)index, bits});
}

/* In index order, so that exceptions come out sorted. */
static int
pack_block(const struct packing *p, uint32_t block, uint32_t kb, uint32_t n)
{
	size_t base = (size_t)block * K_PANEL * K_BLOCK;
	int rc = 0;

	memset(p->w->hi + base, 0, K_PANEL * K_BLOCK);
	memset(p->w->lo + base, 0, K_PANEL * K_BLOCK);
	for (uint32_t index = 0; index < K_PANEL * K_BLOCK && rc == 0; index++) {
		uint32_t r = index / 512 * 16 + index / 2 % 16, i = kb * K_BLOCK + index / 32 % 16 * 2 + index % 2;

		if (r < n && i < p->w->k)
			rc = pack_weight(p, block, index, r, i);
	}
	return rc;
}

/* The same of a block without padding. */
static int
pack_whole_block(const struct packing *p, uint32_t block, uint32_t kb)
{
	size_t base = (size_t)block * K_PANEL * K_BLOCK;
	uint32_t left[16];
	int rc = 0;

	for (uint32_t t = 0; t < 2; t++) {
		p->by->tile(p->rows + (size_t)t * 16 * p->w->k + kb * K_BLOCK, p->w->k, p->k + t * 16,
		    p->w->hi + base + t * 512, p->w->lo + base + t * 512, left);
		for (uint32_t pair = 0; pair < 16; pair++) {
			for (; left[pair] != 0 && rc == 0; left[pair] &= left[pair] - 1) {
				uint32_t lane = (uint32_t)__builtin_ctz(left[pair]);

				rc = pack_weight(p, block, t * 512 + pair * 32 + lane, t * 16 + lane / 2,
				    kb * K_BLOCK + pair * 2 + lane % 2);
			}
		}
	}
	return rc;
}

/* K_HAS_SMALL of the tiles of a block. */
static uint8_t
small_codes(const uint8_t *hi)
{
	const uint64_t exponents = 0x7878787878787878u, ones = 0x0101010101010101u;
	uint8_t flags = 0;

	for (uint32_t t = 0; t < 2; t++) {
		uint64_t zeros = 0;

		/* Eight at a time: is the exponent of one zero? */
		for (uint32_t i = 0; i < 512; i += 8, hi += 8) {
			uint64_t w;

			memcpy(&w, hi, sizeof(w));
			zeros |= (w & exponents) - ones;
		}
		flags |= zeros & ones << 7 ? (uint8_t)(K_HAS_SMALL << t) : 0;
	}
	return flags;
}

/* The largest magnitude of a row; those of its squares go to what the panel has. */
static uint16_t
row_absmax(const struct packing *p, const uint16_t *row, float *square)
{
	const struct k_weight *w = p->w;
	uint16_t all = 0;

	for (uint32_t b = 0; b < k_squares(w->k); b++) {
		uint32_t n = w->k - b * K_SQUARE < K_SQUARE ? w->k - b * K_SQUARE : K_SQUARE;
		uint16_t max = p->by != NULL ? p->by->absmax(row + b * K_SQUARE, n) : absmax(row + b * K_SQUARE, n);

		all = max > all ? max : all;
		if (max >= 0x80 && k_bf16_to_float(max) > square[b])
			square[b] = k_bf16_to_float(max);
	}
	return all;
}

static int
pack_panel(struct packing *p, uint32_t panel, uint32_t *bad_row, uint32_t *bad_col)
{
	struct k_weight *w = p->w;
	float *square = w->square + (size_t)panel * k_squares(w->k);
	uint32_t first = panel * K_PANEL, kb_n = w->k_pad / K_BLOCK;
	uint32_t n = w->n - first < K_PANEL ? w->n - first : K_PANEL;
	int rc = 0;

	memset(square, 0, k_squares(w->k) * sizeof(*square));
	for (uint32_t r = 0; r < n; r++) {
		const uint16_t *row = p->rows + (size_t)r * w->k;
		uint16_t max = row_absmax(p, row, square);

		if (max >= 0x7f80) {
			*bad_row = first + r;
			for (*bad_col = 0; (row[*bad_col] & 0x7f80) != 0x7f80;)
				(*bad_col)++;
			return -EINVAL;
		}
		p->k[r] = (int16_t)exponent_for(max);
	}
	for (uint32_t r = 0; r < K_PANEL; r++)
		w->scale[first + r] = ldexpf(1.0f, -p->k[r]);
	for (uint32_t kb = 0; kb < kb_n && rc == 0; kb++) {
		uint32_t block = panel * kb_n + kb;

		w->flag[block] = 0;
		if (p->by != NULL && n == K_PANEL && (kb + 1) * K_BLOCK <= w->k)
			rc = pack_whole_block(p, block, kb);
		else
			rc = pack_block(p, block, kb, n);
		w->flag[block] |= small_codes(w->hi + (size_t)block * K_PANEL * K_BLOCK);
	}
	return rc;
}

int
k_pack_panel(struct k_weight *w, uint32_t panel, const uint16_t *rows, struct k_exception **exc, uint32_t *n_exc,
    uint32_t *cap, uint32_t *bad_row, uint32_t *bad_col)
{
	struct packing p = {kernels_packer(), w, rows, {0}, exc, n_exc, cap};

	return pack_panel(&p, panel, bad_row, bad_col);
}

int
k_pack_panel_ref(struct k_weight *w, uint32_t panel, const uint16_t *rows, struct k_exception **exc, uint32_t *n_exc,
    uint32_t *cap, uint32_t *bad_row, uint32_t *bad_col)
{
	struct packing p = {NULL, w, rows, {0}, exc, n_exc, cap};

	return pack_panel(&p, panel, bad_row, bad_col);
}

/* Four panels are as high as a square. */
static void
finish_squares(struct k_weight *w)
{
	uint32_t n = k_squares(w->k), panels = w->n_pad / K_PANEL, high = K_SQUARE / K_PANEL;

	for (uint32_t p0 = 0; p0 < panels; p0 += high) {
		for (uint32_t b = 0; b < n; b++) {
			float max = 0;

			for (uint32_t p = p0; p < p0 + high && p < panels; p++)
				max = w->square[(size_t)p * n + b] > max ? w->square[(size_t)p * n + b] : max;
			for (uint32_t p = p0; p < p0 + high && p < panels; p++)
				w->square[(size_t)p * n + b] = max >= 448 * 0x1p-126f ? max / 448.0f : 1.0f;
		}
	}
}

void
k_weight_finish(struct k_weight *w)
{
	finish_squares(w);
	w->tensor_scale = 0;
	for (uint32_t r = 0; r < w->n; r++)
		if (w->scale[r] > w->tensor_scale)
			w->tensor_scale = w->scale[r];
}

const struct k_exception *
k_find_exceptions(const struct k_weight *w, uint32_t block, uint32_t *n)
{
	uint32_t lo = 0, hi = w->n_exc;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (w->exc[mid].block < block)
			lo = mid + 1;
		else
			hi = mid;
	}
	for (*n = 0; lo + *n < w->n_exc && w->exc[lo + *n].block == block;)
		(*n)++;
	return w->exc + lo;
}

uint16_t
k_exception_value(const struct k_exception *x, float scale)
{
	double v = magnitude(x->bits) / scale;

	if (v < 0x1p-126)
		return x->bits & 0x8000;
	return (uint16_t)((x->bits & 0x8000) | bits_of((float)v) >> 16);
}

uint16_t
k_unpack(const struct k_weight *w, uint32_t row, uint32_t col)
{
	uint32_t block = block_of(w, row, col), index = index_in_block(row % K_PANEL, col % K_BLOCK), n;
	size_t at = (size_t)block * K_PANEL * K_BLOCK + index;
	uint8_t c = w->hi[at];
	int32_t mag;

	if (w->flag[block] & K_HAS_EXCEPTIONS) {
		const struct k_exception *x = k_find_exceptions(w, block, &n);

		for (uint32_t i = 0; i < n; i++)
			if (x[i].index == index)
				return x[i].bits;
	}
	mag = (c & 0x7f) == 0 ? 0 : (int32_t)(bits_of(k_e4m3_to_float(c & 0x7f)) >> 16);
	mag += w->lo[at];
	/* Back by the power of two, exact also where the master is subnormal. */
	double v = magnitude((uint16_t)mag) * w->scale[row];
	int e;
	uint16_t out;

	if (mag == 0)
		return (uint16_t)(c & 0x80) << 8;
	frexp(v, &e);
	if (e > -126)
		out = (uint16_t)(bits_of((float)v) >> 16);
	else
		out = (uint16_t)ldexp(v, 133); /* in units of the smallest BF16 subnormal, 2^-133 */
	return (uint16_t)((uint16_t)(c & 0x80) << 8 | out);
}

/* Nearly all are a normal code and a normal master: integers only, as in split(). */
void
k_unpack_row(const struct k_weight *w, uint32_t row, float *y)
{
	int32_t down = ((int32_t)(bits_of(w->scale[row]) >> 23) - 127) * 128;

	for (uint32_t i = 0; i < w->k; i++) {
		uint32_t block = block_of(w, row, i);
		size_t at = (size_t)block * K_PANEL * K_BLOCK + index_in_block(row % K_PANEL, i % K_BLOCK);
		int32_t c = w->hi[at] & 0x7f, mag = ((c + (120 << 3)) << 4) + w->lo[at] + down;

		if (c < 8 || mag < 0x80 || w->flag[block] & K_HAS_EXCEPTIONS)
			y[i] = k_bf16_to_float(k_unpack(w, row, i));
		else
			y[i] = float_of((uint32_t)(w->hi[at] & 0x80) << 24 | (uint32_t)mag << 16);
	}
}
