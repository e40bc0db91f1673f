/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar truth. Slow on purpose: every other level is held against it. */
#include <math.h>
#include <string.h>

#include "kernels/internal.h"

static float
float_of(uint32_t u)
{
	float f;

	memcpy(&f, &u, sizeof(f));
	return f;
}

static float
exp_ref(float x)
{
	float n, r, p;

	if (x < EXP_MIN)
		return 0;
	x = x > EXP_MAX ? EXP_MAX : x;
	n = fmaf(x, EXP_LOG2E, EXP_ROUND) - EXP_ROUND;
	r = fmaf(n, -EXP_LN2_LO, fmaf(n, -EXP_LN2_HI, x));
	p = fmaf(EXP_C6, r, EXP_C5);
	p = fmaf(p, r, EXP_C4);
	p = fmaf(p, r, EXP_C3);
	p = fmaf(p, r, EXP_C2);
	p = fmaf(p, r, 1.0f);
	p = fmaf(p, r, 1.0f);
	if (n != n)
		return n;
	return p * float_of((uint32_t)((int32_t)n + 127) << 23);
}

/* Lane i of 16 has its part of a sum; the lanes fold in halves. */
static float
fold16(float *lane)
{
	for (int half = 8; half > 0; half /= 2)
		for (int i = 0; i < half; i++)
			lane[i] = lane[i] + lane[i + half];
	return lane[0];
}

/* The weights of one block as computing values, [32 channels][32 inputs]. */
static void
unpack_block(const struct k_weight *w, uint32_t block, enum k_format format, float out[32][32])
{
	bool bf16 = format == K_BF16;
	const uint8_t *hi = w->hi + (size_t)block * 1024;
	const int8_t *lo = w->lo + (size_t)block * 1024;
	uint32_t panel = block / (w->k_pad / K_BLOCK);

	for (uint32_t i = 0; i < 1024; i++) {
		uint32_t c = i / 512 * 16 + i / 2 % 16, in = i / 32 % 16 * 2 + i % 2;
		float v = k_e4m3_to_float(hi[i]);

		if (bf16) {
			int32_t mag = (hi[i] & 0x7f) == 0 ? 0 : k_bf16_from_float(v) & 0x7fff;

			v = k_bf16_to_float((uint16_t)((uint32_t)(hi[i] & 0x80) << 8 | (uint32_t)(mag + lo[i])));
		} else if (format == K_FP8T) {
			v = k_e4m3_to_float(k_e4m3_from_float(v * (w->scale[panel * K_PANEL + c] / w->tensor_scale)));
		}
		out[c][in] = v;
	}
	if (bf16 && w->flag[block]) {
		uint32_t n;
		const struct k_exception *x = k_find_exceptions(w, block, &n);

		for (uint32_t j = 0; j < n; j++) {
			uint32_t i = x[j].index, c = i / 512 * 16 + i / 2 % 16;

			out[c][i / 32 % 16 * 2 + i % 2] =
			    k_bf16_to_float(k_exception_value(&x[j], w->scale[panel * K_PANEL + c]));
		}
	}
}

#define ROWS 16u /* rows that share one unpacking: only for speed */

static void
linear_rows(const struct k_linear *a, uint32_t panel, uint32_t row, uint32_t rows)
{
	const struct k_weight *w = a->w;
	uint32_t kb_n = w->k_pad / K_BLOCK, first = panel * K_PANEL;
	uint32_t n = w->n - first < K_PANEL ? w->n - first : K_PANEL;
	float weight[32][32], total[ROWS][32] = {{0}};

	for (uint32_t kb = 0; kb < kb_n; kb++) {
		unpack_block(w, panel * kb_n + kb, a->format, weight);
		for (uint32_t r = 0; r < rows; r++) {
			const uint16_t *x = a->x + (row + r) * a->ldx + kb * K_BLOCK;

			for (uint32_t c = 0; c < n; c++) {
				float even = 0, odd = 0;

				for (uint32_t i = 0; i < K_BLOCK; i += 2) {
					even = fmaf(weight[c][i], k_bf16_to_float(x[i]), even);
					odd = fmaf(weight[c][i + 1], k_bf16_to_float(x[i + 1]), odd);
				}
				total[r][c] = total[r][c] + (even + odd);
			}
		}
	}
	for (uint32_t r = 0; r < rows; r++) {
		float *y = a->y + (row + r) * a->ldy + first;

		for (uint32_t c = 0; c < n; c++) {
			float v = total[r][c];

			if (a->x_scale != NULL)
				v = v * a->x_scale[row + r];
			v = v * (a->format == K_FP8T ? w->tensor_scale : w->scale[first + c]);
			y[c] = a->add ? y[c] + v : v;
		}
	}
}

static void
linear_ref(const struct k_linear *a)
{
	for (uint32_t panel = a->panel0; panel < a->panel1; panel++)
		for (uint32_t r = 0; r < a->rows; r += ROWS)
			linear_rows(a, panel, r, a->rows - r < ROWS ? a->rows - r : ROWS);
}

static void
square_codes_ref(const struct k_weight *w, uint32_t block, uint32_t n, float s, uint8_t *out, uint8_t *flag)
{
	const float *scale = w->scale + block / (w->k_pad / K_BLOCK) * K_PANEL;
	float weight[32][32];

	for (uint32_t b = 0; b < n; b++, out += 1024) {
		unpack_block(w, block + b, K_BF16, weight);
		flag[b] = K_HAS_SMALL | K_HAS_SMALL << 1;
		for (uint32_t i = 0; i < 1024; i++) {
			uint32_t c = i / 512 * 16 + i / 2 % 16, in = i / 32 % 16 * 2 + i % 2;

			out[i] = k_e4m3_from_float(weight[c][in] * scale[c] / s);
		}
	}
}

static void
act_bf16_ref(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out)
{
	for (uint32_t i = 0; i < n; i++)
		out[i] = k_bf16_from_float(x[i]);
	memset(out + n, 0, (n_pad - n) * sizeof(*out));
}

static float
absmax_scale(const float *x, uint32_t n)
{
	float max = 0, s;

	for (uint32_t i = 0; i < n; i++) {
		if (x[i] != x[i])
			max = x[i];
		else if (fabsf(x[i]) > max)
			max = fabsf(x[i]);
	}
	s = max / 448.0f;
	return s == 0 ? 1.0f : s;
}

static void
act_fp8_ref(const float *x, uint32_t n, uint32_t n_pad, uint16_t *out, float *scale)
{
	float s = *scale = absmax_scale(x, n);

	for (uint32_t i = 0; i < n; i++)
		out[i] = k_bf16_from_float(k_e4m3_to_float(k_e4m3_from_float(x[i] / s)));
	memset(out + n, 0, (n_pad - n) * sizeof(*out));
}

static void
rmsnorm_ref(const float *x, const float *w, uint32_t n, float eps, float *y)
{
	float lane[16] = {0}, r;

	for (uint32_t i = 0; i < n; i++)
		lane[i % 16] = fmaf(x[i], x[i], lane[i % 16]);
	r = 1.0f / sqrtf(fold16(lane) / (float)n + eps);
	for (uint32_t i = 0; i < n; i++)
		y[i] = x[i] * r * w[i];
}

static void
rope_ref(float *x, uint32_t n_heads, uint32_t head_dim, const float *cos, const float *sin)
{
	uint32_t half = head_dim / 2;

	for (uint32_t h = 0; h < n_heads; h++, x += head_dim) {
		for (uint32_t i = 0; i < half; i++) {
			float a = x[i], b = x[i + half];

			x[i] = fmaf(a, cos[i], -(b * sin[i]));
			x[i + half] = fmaf(b, cos[i], a * sin[i]);
		}
	}
}

static void
silu_mul_ref(const float *gate, const float *up, uint32_t n, float *y)
{
	for (uint32_t i = 0; i < n; i++)
		y[i] = gate[i] / (1.0f + exp_ref(-gate[i])) * up[i];
}

static double
exp64_ref(double x)
{
	static const double c[] = EXP64_C;
	double t, n, r, p = c[0];
	uint64_t bits, shift;

	x = x < EXP64_MIN ? EXP64_MIN : x;
	t = x * EXP64_LOG2E + EXP64_ROUND;
	n = t - EXP64_ROUND;
	r = x - n * EXP64_LN2_HI - n * EXP64_LN2_LO;
	for (int i = 1; i < EXP64_N; i++)
		p = p * r + c[i];
	memcpy(&bits, &p, sizeof(bits));
	memcpy(&shift, &t, sizeof(shift));
	bits += shift << 52;
	memcpy(&p, &bits, sizeof(p));
	return p;
}

static double
fold8(const double *l)
{
	return ((l[0] + l[1]) + (l[2] + l[3])) + ((l[4] + l[5]) + (l[6] + l[7]));
}

/* Element i goes to lane i % 8; lanes fold in pairs. */
static void
divergence_ref(const float *a, const float *b, uint32_t n, float max_a, float max_b, double out[3])
{
	double lane[3][8] = {{0}};

	for (uint32_t i = 0; i < n; i++) {
		double x = (double)a[i] - max_a, y = (double)b[i] - max_b, p = exp64_ref(x);

		lane[0][i % 8] += p;
		lane[1][i % 8] += exp64_ref(y);
		lane[2][i % 8] += p * (x - y);
	}
	for (int s = 0; s < 3; s++)
		out[s] = fold8(lane[s]);
}

static bool
scan_ref(const float *x, uint32_t n, float *max)
{
	bool finite = true;

	for (uint32_t i = 0; i < n; i++) {
		float *m = &max[i / K_SCAN];

		finite &= x[i] - x[i] == 0;
		if (i % K_SCAN == 0 || x[i] > *m)
			*m = x[i] + 0.0f; /* no -0: the order of lanes would show */
	}
	return finite;
}

static double
weights_ref(const float *x, uint32_t n, float max, double temperature, double least, double *p)
{
	double lane[8] = {0};

	for (uint32_t i = 0; i < n; i++) {
		p[i] = exp64_ref(((double)x[i] - max) / temperature);
		p[i] = p[i] >= least ? p[i] : 0;
		lane[i % 8] += p[i];
	}
	return fold8(lane);
}

/* Where element d of a position lies in a head's K, in its V. */
static size_t
k_at(uint32_t d, uint32_t slot)
{
	return (d / 2 * K_BLOCK + slot) * 2 + d % 2;
}

static size_t
v_at(uint32_t d, uint32_t slot, uint32_t hd_pad)
{
	return ((size_t)slot / 2 * hd_pad + d) * 2 + slot % 2;
}

static void
kv_write_fp8(const struct k_kv_block *b, const float *k, const float *v, uint32_t n_kv_heads, uint32_t head_dim,
    uint32_t hd_pad, uint32_t slot)
{
	size_t head = (size_t)hd_pad * K_BLOCK;
	float *ks = b->scale, *vs = b->scale + n_kv_heads * K_BLOCK;

	for (uint32_t h = 0; h < n_kv_heads; h++, k += head_dim, v += head_dim) {
		uint8_t *kh = b->q + h * head, *vh = b->q + (n_kv_heads + h) * head;
		float sk = ks[h * K_BLOCK + slot] = absmax_scale(k, head_dim);
		float sv = vs[h * K_BLOCK + slot] = absmax_scale(v, head_dim);

		for (uint32_t d = 0; d < hd_pad; d++) {
			kh[k_at(d, slot)] = d < head_dim ? k_e4m3_from_float(k[d] / sk) : 0;
			vh[v_at(d, slot, hd_pad)] = d < head_dim ? k_e4m3_from_float(v[d] / sv) : 0;
		}
	}
}

static void
kv_write_ref(const struct k_kv_block *b, const float *k, const float *v, uint32_t n_kv_heads, uint32_t head_dim,
    uint32_t hd_pad, uint32_t slot)
{
	size_t head = (size_t)hd_pad * K_BLOCK;

	if (b->fp8 >> slot & 1) {
		kv_write_fp8(b, k, v, n_kv_heads, head_dim, hd_pad, slot);
		return;
	}
	for (uint32_t h = 0; h < n_kv_heads; h++, k += head_dim, v += head_dim) {
		for (uint32_t d = 0; d < hd_pad; d++) {
			b->k[h * head + k_at(d, slot)] = d < head_dim ? k_bf16_from_float(k[d]) : 0;
			b->v[h * head + v_at(d, slot, hd_pad)] = d < head_dim ? k_bf16_from_float(v[d]) : 0;
		}
	}
}

/* One KV head of a block, wherever its positions lie. */
struct head_page {
	const struct k_kv_block *b;
	size_t head, half;      /* of this head in a page; from K to V in an FP8 page */
	const float *ks, *vs;   /* [32] */
	uint32_t hd_pad;
};

static float
k_value(const struct head_page *p, uint32_t d, uint32_t j)
{
	size_t at = p->head + k_at(d, j);

	return p->b->fp8 >> j & 1 ? k_e4m3_to_float(p->b->q[at]) : k_bf16_to_float(p->b->k[at]);
}

static float
v_value(const struct head_page *p, uint32_t d, uint32_t j)
{
	size_t at = p->head + v_at(d, j, p->hd_pad);

	return p->b->fp8 >> j & 1 ? k_e4m3_to_float(p->b->q[p->half + at]) : k_bf16_to_float(p->b->v[at]);
}

/* Scores, probabilities and output of one head over slots [lo, hi) of a block. */
static void
attend_page(const struct k_attention *a, const float *q, const struct head_page *page, uint32_t lo, uint32_t hi,
    float *max, float *sum, float *out)
{
	float score[32], p[32] = {0}, lane[16];

	*max = -INFINITY;
	for (uint32_t j = lo; j < hi; j++) {
		float total = 0;

		for (uint32_t d0 = 0; d0 < a->head_dim; d0 += K_BLOCK) {
			float even = 0, odd = 0;

			for (uint32_t d = d0; d < d0 + K_BLOCK && d < a->head_dim; d += 2) {
				even = fmaf(k_value(page, d, j), q[d], even);
				odd = fmaf(k_value(page, d + 1, j), q[d + 1], odd);
			}
			total = total + (even + odd);
		}
		if (page->b->fp8 >> j & 1)
			total = total * page->ks[j];
		score[j] = total * a->scale;
		*max = score[j] > *max || score[j] != score[j] ? score[j] : *max;
	}
	for (uint32_t j = lo; j < hi; j++)
		p[j] = k_bf16_to_float(k_bf16_from_float(exp_ref(score[j] - *max)));
	for (uint32_t i = 0; i < 16; i++)
		lane[i] = p[i] + p[i + 16];
	*sum = fold16(lane);
	for (uint32_t j = lo; j < hi; j++)
		if (page->b->fp8 >> j & 1)
			p[j] = k_bf16_to_float(k_bf16_from_float(p[j] * page->vs[j]));
	for (uint32_t d = 0; d < a->head_dim; d++) {
		float even = 0, odd = 0;

		for (uint32_t j = lo; j < hi; j++) {
			if (j % 2 == 0)
				even = fmaf(v_value(page, d, j), p[j], even);
			else
				odd = fmaf(v_value(page, d, j), p[j], odd);
		}
		out[d] = 0.0f + (even + odd); /* +0, never -0, as tiles have it */
	}
}

/* What a head has so far, and the output of a block. */
struct head {
	float out[256], m, l;
};

static void
merge(struct head *to, const struct head *block, uint32_t hd, bool first)
{
	float m, fa, fb;

	if (first) {
		*to = *block;
		return;
	}
	m = block->m > to->m ? block->m : to->m;
	fa = exp_ref(to->m - m), fb = exp_ref(block->m - m);
	to->l = fmaf(to->l, fa, block->l * fb);
	for (uint32_t d = 0; d < hd; d++)
		to->out[d] = fmaf(to->out[d], fa, block->out[d] * fb);
	to->m = m;
}

static void
divide(const struct k_attention *a, uint32_t h, const struct head *from)
{
	for (uint32_t d = 0; d < a->head_dim; d++)
		a->out[(size_t)h * a->head_dim + d] = from->out[d] / from->l;
}

static void
put_part(const struct k_attention *a, uint32_t block, uint32_t h, const struct head *from)
{
	uint32_t i = h - a->head0;
	float *m, *part = k_part_of(a, block, &m);

	memcpy(part + (size_t)i * a->hd_pad, from->out, a->head_dim * sizeof(*part));
	m[i] = from->m, m[K_PART_HEADS + i] = from->l;
}

static void
get_part(const struct k_attention *a, uint32_t block, uint32_t h, struct head *to)
{
	uint32_t i = h - a->head0;
	float *m;
	const float *part = k_part_of(a, block, &m);

	memcpy(to->out, part + (size_t)i * a->hd_pad, a->head_dim * sizeof(*part));
	to->m = m[i], to->l = m[K_PART_HEADS + i];
}

static void
attend_head(const struct k_attention *a, uint32_t h)
{
	uint32_t kvh = h / (a->n_heads / a->n_kv_heads), start = k_window_first(a->pos, a->window), first = start / K_BLOCK;
	size_t head = (size_t)kvh * a->hd_pad * K_BLOCK, half = (size_t)a->n_kv_heads * a->hd_pad * K_BLOCK;
	uint32_t from, end;
	struct head all, block;
	float q[256];

	k_attention_blocks(a, &from, &end);
	for (uint32_t d = 0; d < a->head_dim; d++)
		q[d] = k_bf16_to_float(k_bf16_from_float(a->q[(size_t)h * a->head_dim + d]));
	for (uint32_t b = from; b < end; b++) {
		const float *scale = a->block[b].scale;
		struct head_page page = {&a->block[b], head, half, NULL, NULL, a->hd_pad};
		uint32_t lo = b == first ? start % K_BLOCK : 0;
		uint32_t hi = a->pos - b * K_BLOCK + 1 < K_BLOCK ? a->pos - b * K_BLOCK + 1 : K_BLOCK;

		if (scale != NULL)
			page.ks = scale + kvh * K_BLOCK, page.vs = scale + (a->n_kv_heads + kvh) * K_BLOCK;
		attend_page(a, q, &page, lo, hi, &block.m, &block.l, block.out);
		if (a->parts != NULL)
			put_part(a, b, h, &block);
		else
			merge(&all, &block, a->head_dim, b == first);
	}
	if (a->parts == NULL)
		divide(a, h, &all);
}

static void
attention_merge_ref(const struct k_attention *a)
{
	for (uint32_t h = a->head0; h < a->head1; h++) {
		struct head all, block;

		for (uint32_t b = a->block0; b < a->block1; b++) {
			get_part(a, b, h, &block);
			merge(&all, &block, a->head_dim, b == a->block0);
		}
		divide(a, h, &all);
	}
}

static void
attention_ref(const struct k_attention *a)
{
	for (uint32_t r = 0; r < a->rows; r++) {
		struct k_attention one = k_attention_row(a, r);

		for (uint32_t h = a->head0; h < a->head1; h++)
			attend_head(&one, h);
	}
}

static void
probe_read_ref(const void *mem, size_t bytes)
{
	const uint64_t *p = mem;
	uint64_t s[8] = {0};

	for (size_t i = 0; i < bytes / 8; i += 8)
		for (size_t j = 0; j < 8; j++)
			s[j] += p[i + j];
	__asm__ volatile("" ::"r"(s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7]));
}

static double
probe_fma_ref(uint32_t rounds)
{
	float s[8] = {0};

	for (uint32_t i = 0; i < rounds; i++)
		for (int j = 0; j < 8; j++)
			s[j] = fmaf(s[j], 0.5f, 1.0f);
	__asm__ volatile("" ::"r"(s) : "memory");
	return 16.0 * rounds;
}

void
kernels_fill_ref(struct k_ops *ops)
{
	*ops = (struct k_ops){"ref", linear_ref, square_codes_ref, act_bf16_ref, act_fp8_ref, rmsnorm_ref, rope_ref, silu_mul_ref,
	    kv_write_ref, attention_ref, attention_merge_ref, probe_read_ref, probe_fma_ref, divergence_ref, scan_ref, weights_ref};
}
