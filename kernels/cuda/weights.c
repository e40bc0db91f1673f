/* SPDX-License-Identifier: Apache-2.0 */
/* The model on the card: sizes first, one allocation, then plane by plane in pieces. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/plugin.h"

#define PIECE ((size_t)16 << 20) /* of a plane that is copied at a time */
#define N_PIECES 3
#define N_SLOTS 2
#define MAX_PART_ROWS 2048u      /* rows * splits of attention */

static size_t
align256(size_t n)
{
	return (n + 255) & ~(size_t)255;
}

static uint32_t
up(uint32_t n, uint32_t to)
{
	return (n + to - 1) / to * to;
}

/* ---- sizes ---- */

static void
set_bundle(struct bundle *b, const struct kd_model *m, enum bundle_name name)
{
	uint32_t q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim, squares = 0;

	memset(b, 0, sizeof(*b));
	switch (name) {
	case B_QKV: *b = (struct bundle){.parts = 3, .group = {G_Q, G_K, G_V}, .n = {q, kv, kv}, .k = m->hidden}; break;
	case B_O: *b = (struct bundle){.parts = 1, .group = {G_O}, .n = {m->hidden}, .k = q}; break;
	case B_GU: *b = (struct bundle){.parts = 2, .group = {G_GATE, G_UP}, .n = {m->intermediate, m->intermediate},
	    .k = m->hidden}; break;
	case B_DOWN: *b = (struct bundle){.parts = 1, .group = {G_DOWN}, .n = {m->hidden}, .k = m->intermediate}; break;
	default: *b = (struct bundle){.parts = 1, .group = {KD_LM_HEAD}, .n = {m->vocab}, .k = m->hidden, .head = true}; break;
	}
	for (uint32_t p = 0; p < b->parts; p++) {
		b->at[p] = b->n_all;
		b->n_all += b->n[p];
		b->square_at[p] = squares;
		squares += k_squares(b->n[p]);
	}
	b->ld = up(b->k, CU_LD);
	b->ld_square = up(k_squares(b->ld), 4);
}

/* Places things in one allocation; base NULL: sizes only. */
struct arena {
	char *base;
	size_t at;
};

static void *
take(struct arena *a, size_t bytes)
{
	void *p = a->base != NULL ? a->base + a->at : NULL;

	a->at += align256(bytes);
	return p;
}

static enum kd_residency
residency_of(const struct kd_model *m, uint32_t group, uint32_t layer)
{
	return m->residency == NULL ? KD_BOTH : (enum kd_residency)m->residency[(size_t)group * m->n_layers + layer];
}

static void
place_bundle(struct arena *a, struct bundle *b, const struct kd_model *m, uint32_t layer, bool bias)
{
	size_t plane = (size_t)b->n_all * b->ld, nested = 0, at[2] = {0, 0};
	uint16_t *bf16;
	int8_t *lo;

	for (uint32_t p = 0; p < b->parts; p++)
		nested += residency_of(m, b->group[p], layer) == KD_NESTED ? (size_t)b->n[p] * b->ld : 0;
	b->hi = take(a, plane);
	lo = take(a, nested);
	bf16 = take(a, (plane - nested) * 2);
	for (uint32_t p = 0; p < b->parts && a->base != NULL; p++) {
		bool is = residency_of(m, b->group[p], layer) == KD_NESTED;

		b->lo[p] = is ? lo + at[1] : NULL;
		b->bf16[p] = is ? NULL : bf16 + at[0];
		at[is] += (size_t)b->n[p] * b->ld;
	}
	b->scale = take(a, b->n_all * sizeof(float));
	b->tscale = take(a, b->n_all * sizeof(float));
	b->square = take(a, (size_t)(b->square_at[b->parts - 1] + k_squares(b->n[b->parts - 1])) * b->ld_square * sizeof(float));
	if (bias)
		b->bias = take(a, b->n_all * sizeof(float));
}

static bool
has_bias(const struct kd_model *m, uint32_t l, const struct bundle *b)
{
	for (uint32_t p = 0; m->layer != NULL && p < b->parts; p++)
		if (m->layer[l].bias[b->group[p]] != NULL)
			return true;
	return false;
}

/* layer may be NULL: sizes only. */
static size_t
place_weights(struct kd_device *d, const struct kd_model *m, char *base, struct layer *layer)
{
	struct arena a = {base, 0};
	struct layer one;
	struct bundle head;

	for (uint32_t l = 0; l < m->n_layers; l++) {
		struct layer *to = layer != NULL ? &layer[l] : &one;

		memset(to, 0, sizeof(*to));
		for (int n = 0; n < N_BUNDLES; n++) {
			set_bundle(&to->b[n], m, (enum bundle_name)n);
			place_bundle(&a, &to->b[n], m, l, has_bias(m, l, &to->b[n]));
		}
		to->input_norm = take(&a, m->hidden * sizeof(float));
		to->post_norm = take(&a, m->hidden * sizeof(float));
		if (m->layer == NULL)
			continue;
		to->no_rope = m->layer[l].no_rope;
		if (m->layer[l].q_norm != NULL) {
			to->q_norm = take(&a, m->head_dim * sizeof(float));
			to->k_norm = take(&a, m->head_dim * sizeof(float));
		}
	}
	set_bundle(&head, m, N_BUNDLES);
	place_bundle(&a, &head, m, 0, false);
	d->head = head;
	d->embed = m->embed != NULL ? take(&a, (size_t)m->vocab * m->hidden * sizeof(uint16_t)) : NULL;
	d->embed_ld = m->hidden;
	if (m->embed == NULL && head.bf16[0] != NULL)
		d->embed = head.bf16[0], d->embed_ld = head.ld;
	d->final_norm = take(&a, m->hidden * sizeof(float));
	d->cos = take(&a, (size_t)m->max_context * (m->head_dim / 2) * sizeof(float));
	d->sin = take(&a, (size_t)m->max_context * (m->head_dim / 2) * sizeof(float));
	return a.at;
}

static uint32_t
largest_n(const struct kd_model *m)
{
	struct bundle b;
	uint32_t n = 0;

	for (int i = 0; i < N_BUNDLES; i++) {
		set_bundle(&b, m, (enum bundle_name)i);
		n = b.n_all > n ? b.n_all : n;
	}
	return n;
}

static size_t
place_buffers(struct kd_device *d, const struct kd_model *m, char *base)
{
	struct arena a = {base, 0};
	size_t rows = up(m->max_rows, 16), q = (size_t)m->n_heads * m->head_dim, kv = (size_t)m->n_kv_heads * m->head_dim, big = 0;
	struct bundle b;

	for (int i = 0; i < N_BUNDLES; i++) {
		set_bundle(&b, m, (enum bundle_name)i);
		d->ldx = i == 0 || b.ld > d->ldx ? b.ld : d->ldx;
		big = (size_t)b.n_all * b.ld * sizeof(uint16_t) > big ? (size_t)b.n_all * b.ld * sizeof(uint16_t) : big;
	}
	d->x = take(&a, rows * m->hidden * sizeof(float));
	d->qkv = take(&a, rows * (q + 2 * kv) * sizeof(float));
	d->attn = take(&a, rows * q * sizeof(float));
	d->gu = take(&a, rows * 2 * m->intermediate * sizeof(float));
	d->max_part = rows > MAX_PART_ROWS ? (uint32_t)rows : MAX_PART_ROWS;
	d->part = take(&a, (size_t)d->max_part * m->n_heads * (m->head_dim + 2) * sizeof(float));
	d->logits = take(&a, rows * m->vocab * sizeof(float));
	d->weight = take(&a, rows * m->vocab * sizeof(uint64_t));
	d->xs = take(&a, rows * sizeof(float));
	d->q = take(&a, rows * q * sizeof(uint16_t));
	d->xb = take(&a, rows * d->ldx * sizeof(uint16_t));
	d->xq = take(&a, rows * d->ldx);
	d->xqb = take(&a, rows * d->ldx);
	d->ldb = up(k_squares((uint32_t)d->ldx), 4);
	d->xsb = take(&a, rows * d->ldb * sizeof(float));
	d->xsb_t = take(&a, rows * d->ldb * sizeof(float));
	d->scratch = take(&a, big);
	d->scratch_bytes = big;
	d->scalar_n = largest_n(m);
	d->scalar_y = take(&a, rows * d->scalar_n * sizeof(float));
	d->result = take(&a, rows * sizeof(*d->result));
	d->seen = take(&a, seen_bytes(m));
	d->first_bad = take(&a, sizeof(*d->first_bad));
	return a.at;
}

static size_t
page_elems(const struct kd_model *m)
{
	return (size_t)m->n_kv_heads * up(m->head_dim, 32) * K_BLOCK;
}

static size_t
kv_bytes(const struct kd_model *m)
{
	return (size_t)m->n_pages * (page_elems(m) * sizeof(uint16_t) + (size_t)2 * m->n_kv_heads * K_BLOCK * sizeof(float));
}

/* Room for a part of a plane: at least a panel of the widest. */
static size_t
piece_bytes(const struct kd_device *d)
{
	return PIECE + (size_t)K_PANEL * d->ldx;
}

/* BF16 and the high plane, or both planes. */
static void
groups_memory(const struct kd_model *m, struct kd_memory *out)
{
	struct bundle b;

	for (int n = 0; n <= N_BUNDLES; n++) {
		set_bundle(&b, m, (enum bundle_name)n);
		for (uint32_t p = 0; p < b.parts; p++) {
			uint32_t g = b.group[p], layers = g == KD_LM_HEAD ? 1 : m->n_layers;
			uint64_t plane = (uint64_t)b.n[p] * b.ld;

			out->group[g] = 0;
			out->group_as[KD_BOTH][g] = 3 * plane * layers, out->group_as[KD_NESTED][g] = 2 * plane * layers;
			for (uint32_t l = 0; l < layers; l++)
				out->group[g] += residency_of(m, g, l) == KD_NESTED ? 2 * plane : 3 * plane;
		}
	}
}

const struct bundle *
weights_of(const struct kd_device *d, uint32_t group, uint32_t layer, uint32_t *part)
{
	static const uint8_t bundle[] = {[G_Q] = B_QKV, [G_K] = B_QKV, [G_V] = B_QKV, [G_O] = B_O, [G_GATE] = B_GU, [G_UP] = B_GU,
	    [G_DOWN] = B_DOWN};
	const struct bundle *b = group >= KD_LM_HEAD ? &d->head : &d->layer[layer].b[bundle[group]];

	for (*part = 0; b->group[*part] != group && *part + 1 < b->parts;)
		++*part;
	return b;
}

void
weights_memory(struct kd_device *d, const struct kd_model *m, struct kd_memory *out)
{
	struct kd_model sizes = *m;
	struct kd_device unused;
	size_t free_now = 0, total = 0;

	cudaSetDevice(d->index);
	sizes.layer = NULL;
	out->weights = place_weights(&unused, &sizes, NULL, NULL);
	out->buffers = place_buffers(&unused, &sizes, NULL);
	/* What only loading needs, cuBLASLt's workspace; tables, graphs and kernels, which are loaded when they first run. */
	out->buffers += N_SLOTS * N_PIECES * piece_bytes(&unused) + LT_WORKSPACE + ((size_t)128 << 20);
	out->kv = kv_bytes(m);
	groups_memory(m, out);
	cudaMemGetInfo(&free_now, &total);
	out->free = free_now, out->total = total;
}

/* ---- copying ---- */

/* A part of a plane on its way: while one is copied and put into rows, the next is written. */
struct slot {
	uint8_t *pinned[2];       /* of the high and the low plane as packed */
	uint8_t *card[N_PIECES];  /* the same there; of the low by rows */
	cudaEvent_t done;         /* both may be written again */
};

struct loader {
	struct kd_device *d;
	struct slot slot[N_SLOTS];
	uint32_t next;
	char *why;
	size_t why_len;
	int rc;
};

static void
check(struct loader *x, cudaError_t e, const char *what)
{
	if (x->rc == 0)
		x->rc = cu_failed(e, what, x->why, x->why_len);
}

/* On the stream of the kernels that read it. `from` must stay until sent(), or the end of loading. */
static void
copy(struct loader *x, void *to, const void *from, size_t bytes)
{
	check(x, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, x->d->stream), "copying the model");
}

/* What was copied may go. Whether a copy from memory that is not pinned had its own copy made is the driver's to decide. */
static void
sent(struct loader *x)
{
	check(x, cudaStreamSynchronize(x->d->stream), "copying the model");
}

/* A list of a device's own, remembered to be freed. */
static void *
copy_list(struct loader *x, const void *from, size_t bytes)
{
	void *p = NULL;

	if (x->d->n_exc_mem == sizeof(x->d->exc_mem) / sizeof(*x->d->exc_mem)) {
		if (x->rc == 0)
			x->rc = -ENOMEM, snprintf(x->why, x->why_len, "too many lists of exceptions");
		return NULL;
	}
	check(x, cudaMalloc(&p, bytes), "exceptions");
	if (p != NULL)
		x->d->exc_mem[x->d->n_exc_mem++] = p;
	if (x->rc == 0)
		copy(x, p, from, bytes);
	return p;
}

static int
by_place(const void *pa, const void *pb)
{
	const uint32_t *a = pa, *b = pb;

	return a[0] != b[0] ? (a[0] < b[0] ? -1 : 1) : (a[1] > b[1]) - (a[1] < b[1]);
}

/* What the planes say of an exception: the high one's code alone, in the scaled domain. */
static float
plane_value(const struct k_weight *w, const struct k_exception *e)
{
	return k_e4m3_to_float(w->hi[(size_t)e->block * 1024 + e->index]);
}

static void
load_exceptions(struct loader *x, const struct k_weight *w, struct cu_exceptions *out)
{
	struct { uint32_t row, col, i; } *e = calloc(w->n_exc + 1, sizeof(*e));
	uint32_t *row = calloc(w->n_exc + 1, sizeof(*row)), *first = calloc(w->n_exc + 2, sizeof(*first));
	uint32_t *col = calloc(w->n_exc + 1, sizeof(*col));
	float *delta = calloc(w->n_exc + 1, sizeof(*delta));
	uint16_t *master = calloc(w->n_exc + 1, sizeof(*master));
	uint32_t kb = w->k_pad / K_BLOCK, n = 0;

	memset(out, 0, sizeof(*out));
	if (e == NULL || row == NULL || first == NULL || col == NULL || delta == NULL || master == NULL) {
		x->rc = -ENOMEM, snprintf(x->why, x->why_len, "no memory for exceptions");
		goto out;
	}
	for (uint32_t i = 0; i < w->n_exc; i++) {
		uint32_t at = w->exc[i].index;

		e[i].row = w->exc[i].block / kb * K_PANEL + at / 512 * 16 + at / 2 % 16;
		e[i].col = w->exc[i].block % kb * K_BLOCK + at / 32 % 16 * 2 + at % 2;
		e[i].i = i;
	}
	qsort(e, w->n_exc, sizeof(*e), by_place);
	for (uint32_t i = 0; i < w->n_exc; i++) {
		const struct k_exception *from = &w->exc[e[i].i];

		if (n == 0 || row[n - 1] != e[i].row)
			row[n] = e[i].row, first[n++] = i;
		col[i] = e[i].col;
		master[i] = from->bits;
		delta[i] = k_bf16_to_float(from->bits) - plane_value(w, from) * w->scale[e[i].row];
	}
	first[n] = w->n_exc;
	out->n_rows = n;
	if (n > 0) {
		out->row = copy_list(x, row, n * sizeof(*row));
		out->first = copy_list(x, first, (n + 1) * sizeof(*first));
		out->col = copy_list(x, col, w->n_exc * sizeof(*col));
		out->delta = copy_list(x, delta, w->n_exc * sizeof(*delta));
		out->master = copy_list(x, master, w->n_exc * sizeof(*master));
		sent(x);
	}
out:
	free(e), free(row), free(first), free(col), free(delta), free(master);
}

/* Panels [p, p + n) of a site, rows [row, row + rows). */
static void
load_panels(struct loader *x, const struct k_weight *w, struct bundle *b, uint32_t part, uint32_t p, uint32_t n)
{
	struct slot *s = &x->slot[x->next++ % N_SLOTS];
	size_t panel = (size_t)K_PANEL * b->ld;
	uint32_t row = p * K_PANEL, rows = w->n - row < n * K_PANEL ? w->n - row : n * K_PANEL;
	size_t in_part = (size_t)row * b->ld, to = (size_t)b->at[part] * b->ld + in_part;
	int8_t *lo = b->lo[part] != NULL ? b->lo[part] + in_part : (int8_t *)s->card[2];
	struct cu_linear a = {.hi = b->hi + to, .lo = lo, .scale = b->scale + b->at[part] + row, .n = rows, .ld = b->ld};
	struct cu_exceptions none = {0};
	cudaStream_t stream = x->d->stream;

	check(x, cudaEventSynchronize(s->done), "copying the model");
	memcpy(s->pinned[0], w->hi + p * panel, n * panel);
	check(x, cudaMemcpyAsync(s->card[0], s->pinned[0], n * panel, cudaMemcpyHostToDevice, stream), "copying the model");
	cu_untile(s->card[0], n, rows, b->ld, b->hi + to, stream);
	memcpy(s->pinned[1], w->lo + p * panel, n * panel);
	check(x, cudaMemcpyAsync(s->card[1], s->pinned[1], n * panel, cudaMemcpyHostToDevice, stream), "copying the model");
	cu_untile(s->card[1], n, rows, b->ld, (uint8_t *)lo, stream);
	if (b->bf16[part] != NULL)
		cu_unpack(&a, &none, b->bf16[part] + in_part, stream);
	check(x, cudaEventRecord(s->done, stream), "copying the model");
}

static void
load_planes(struct loader *x, const struct k_weight *w, struct bundle *b, uint32_t part)
{
	uint32_t per = (uint32_t)(PIECE / ((size_t)K_PANEL * b->ld)), panels = w->n_pad / K_PANEL;

	per = per < 1 ? 1 : per;
	for (uint32_t p = 0; p < panels && x->rc == 0; p += per)
		load_panels(x, w, b, part, p, panels - p < per ? panels - p : per);
}

/* One row of scales for four panels. */
static void
load_squares(struct loader *x, const struct k_weight *w, const struct bundle *b, uint32_t part)
{
	uint32_t n = k_squares(w->n), wide = k_squares(w->k);
	float *all = calloc((size_t)n * b->ld_square, sizeof(*all));

	if (all == NULL) {
		x->rc = -ENOMEM, snprintf(x->why, x->why_len, "out of memory");
		return;
	}
	for (uint32_t i = 0; i < n; i++)
		memcpy(all + (size_t)i * b->ld_square, w->square + (size_t)i * (K_SQUARE / K_PANEL) * wide, wide * sizeof(*all));
	copy(x, b->square + (size_t)b->square_at[part] * b->ld_square, all, (size_t)n * b->ld_square * sizeof(*all));
	sent(x);
	free(all);
}

static void
load_site(struct loader *x, const struct k_weight *w, struct bundle *b, uint32_t part, const float *bias)
{
	float *t = malloc(w->n * sizeof(*t));

	if (t == NULL) {
		x->rc = -ENOMEM, snprintf(x->why, x->why_len, "out of memory");
		return;
	}
	for (uint32_t i = 0; i < w->n; i++)
		t[i] = w->tensor_scale;
	copy(x, b->scale + b->at[part], w->scale, w->n * sizeof(float));
	copy(x, b->tscale + b->at[part], t, w->n * sizeof(float));
	if (b->bias != NULL && bias != NULL)
		copy(x, b->bias + b->at[part], bias, w->n * sizeof(float));
	else if (b->bias != NULL)
		check(x, cudaMemsetAsync(b->bias + b->at[part], 0, w->n * sizeof(float), x->d->stream), "copying the model");
	load_squares(x, w, b, part);
	sent(x);
	free(t);
	load_planes(x, w, b, part);
	if (w->n_exc == 0 || x->rc != 0)
		return;
	load_exceptions(x, w, &b->exc[part]);
	if (b->bf16[part] != NULL && x->rc == 0) {
		/* Its planes were unpacked without them. */
		cu_unpack_exceptions(&b->exc[part], b->ld, b->bf16[part], x->d->stream);
		check(x, cudaStreamSynchronize(x->d->stream), "exceptions");
		for (uint32_t i = 0; i < 5; i++)
			cudaFree(x->d->exc_mem[--x->d->n_exc_mem]);
		memset(&b->exc[part], 0, sizeof(b->exc[part]));
	}
}

static void
load_layers(struct loader *x, const struct kd_model *m)
{
	struct kd_device *d = x->d;

	for (uint32_t l = 0; l < m->n_layers && x->rc == 0; l++) {
		const struct kd_layer *from = &m->layer[l];
		struct layer *to = &d->layer[l];

		for (int n = 0; n < N_BUNDLES; n++)
			for (uint32_t p = 0; p < to->b[n].parts && x->rc == 0; p++)
				load_site(x, &from->linear[to->b[n].group[p]], &to->b[n], p, from->bias[to->b[n].group[p]]);
		copy(x, to->input_norm, from->input_norm, m->hidden * sizeof(float));
		copy(x, to->post_norm, from->post_norm, m->hidden * sizeof(float));
		if (to->q_norm != NULL) {
			copy(x, to->q_norm, from->q_norm, m->head_dim * sizeof(float));
			copy(x, to->k_norm, from->k_norm, m->head_dim * sizeof(float));
		}
		if (m->progress != NULL)
			m->progress(m->progress_arg, (int)(100 * (l + 1) / (m->n_layers + 1)));
	}
	if (x->rc == 0)
		load_site(x, m->lm_head, &d->head, 0, NULL);
	if (m->embed != NULL)
		copy(x, d->embed, m->embed, (size_t)m->vocab * m->hidden * sizeof(uint16_t));
	copy(x, d->final_norm, m->final_norm, m->hidden * sizeof(float));
	copy(x, d->cos, m->rope_cos, (size_t)m->max_context * (m->head_dim / 2) * sizeof(float));
	copy(x, d->sin, m->rope_sin, (size_t)m->max_context * (m->head_dim / 2) * sizeof(float));
	sent(x);
}

static size_t
place_staged(struct staged *s, uint32_t rows, char *base)
{
	struct arena a = {base, 0};

	s->token = take(&a, rows * sizeof(*s->token));
	s->pos = take(&a, rows * sizeof(*s->pos));
	s->first = take(&a, rows * sizeof(*s->first));
	s->from = take(&a, rows * sizeof(*s->from));
	s->tile = take(&a, rows * sizeof(*s->tile));
	s->want = take(&a, rows * sizeof(*s->want));
	s->patch = take(&a, rows * sizeof(*s->patch));
	return s->bytes = a.at;
}

/* Of the card, or pinned memory of the host; NULL after the first that failed. */
static void *
get(struct loader *x, cudaError_t (*from)(void **, size_t), size_t bytes, const char *what)
{
	void *p = NULL;

	if (x->rc == 0)
		check(x, from(&p, bytes), what);
	return x->rc == 0 ? p : NULL;
}

static cudaError_t on_card(void **p, size_t n) { return cudaMalloc(p, n); }
static cudaError_t pinned(void **p, size_t n) { return cudaMallocHost(p, n); }

static void
allocate(struct loader *x, const struct kd_model *m)
{
	struct kd_device *d = x->d;
	uint32_t rows = up(m->max_rows, 16);
	size_t pages = m->n_pages;

	d->layer = calloc(m->n_layers, sizeof(*d->layer));
	if (d->layer == NULL || tables_new(&d->tables, rows) != 0) {
		x->rc = -ENOMEM, snprintf(x->why, x->why_len, "out of memory");
		return;
	}
	d->weights = get(x, on_card, place_weights(d, m, NULL, d->layer), "memory for the weights");
	d->buffers = get(x, on_card, place_buffers(d, m, NULL), "memory for the buffers of a step");
	d->kv.mem = get(x, on_card, pages * page_elems(m) * sizeof(uint16_t), "memory for the KV cache");
	d->kv.scale = get(x, on_card, pages * 2 * m->n_kv_heads * K_BLOCK * sizeof(float), "memory for the KV cache");
	d->kv.page_elems = page_elems(m), d->kv.n_kv = m->n_kv_heads;
	d->dev.token = get(x, on_card, place_staged(&d->dev, rows, NULL), "memory for the rows of a step");
	for (uint32_t i = 0; i < KD_AHEAD; i++) {
		struct flight *f = &d->flight[i];

		f->host.token = get(x, pinned, place_staged(&f->host, rows, NULL), "pinned memory");
		f->pinned = get(x, pinned, rows * sizeof(*f->pinned), "pinned memory");
		if ((f->copied = calloc(rows, sizeof(*f->copied))) == NULL && x->rc == 0)
			x->rc = -ENOMEM, snprintf(x->why, x->why_len, "out of memory");
		f->pinned_seen = get(x, pinned, seen_bytes(m), "pinned memory");
	}
	for (uint32_t i = 0; i < N_SLOTS * N_PIECES; i++)
		x->slot[i / N_PIECES].card[i % N_PIECES] = get(x, on_card, piece_bytes(d), "memory to load with");
	for (uint32_t i = 0; i < N_SLOTS * 2; i++)
		x->slot[i / 2].pinned[i % 2] = get(x, pinned, piece_bytes(d), "pinned memory to load with");
	for (uint32_t i = 0; i < N_SLOTS && x->rc == 0; i++)
		check(x, cudaEventCreateWithFlags(&x->slot[i].done, cudaEventDisableTiming), "an event");
	if (x->rc != 0)
		return;
	place_staged(&d->dev, rows, (char *)d->dev.token);
	for (uint32_t i = 0; i < KD_AHEAD; i++)
		place_staged(&d->flight[i].host, rows, (char *)d->flight[i].host.token);
	place_weights(d, m, d->weights, d->layer);
	place_buffers(d, m, d->buffers);
	/* What is read before it was written must be finite: rows that pad a batch. */
	check(x, cudaMemsetAsync(d->buffers, 0, place_buffers(d, m, d->buffers), d->stream), "clearing buffers");
	check(x, cudaMemsetAsync(d->kv.mem, 0, pages * d->kv.page_elems * sizeof(uint16_t), d->stream), "clearing the KV cache");
}

static void
free_slot(struct slot *s)
{
	for (int i = 0; i < N_PIECES; i++)
		cudaFree(s->card[i]);
	for (int i = 0; i < 2; i++)
		cudaFreeHost(s->pinned[i]);
	if (s->done != NULL)
		cudaEventDestroy(s->done);
}

int
weights_load(struct kd_device *d, const struct kd_model *m, char *why, size_t why_len)
{
	struct loader x = {.d = d, .why = why, .why_len = why_len};

	d->m = *m;
	allocate(&x, m);
	if (x.rc == 0)
		load_layers(&x, m);
	cudaStreamSynchronize(d->stream); /* after an error too: pinned memory may be on its way */
	for (uint32_t i = 0; i < N_SLOTS; i++)
		free_slot(&x.slot[i]);
	/* The host's structs may go now. */
	d->m.layer = NULL, d->m.lm_head = NULL, d->m.embed = NULL, d->m.final_norm = NULL;
	d->m.rope_cos = d->m.rope_sin = NULL, d->m.cache_dir = NULL, d->m.residency = NULL;
	return x.rc;
}

void
weights_free(struct kd_device *d)
{
	for (uint32_t i = 0; i < d->n_exc_mem; i++)
		cudaFree(d->exc_mem[i]);
	cudaFree(d->weights);
	cudaFree(d->buffers);
	cudaFree(d->kv.mem);
	cudaFree(d->kv.scale);
	cudaFree(d->dev.token);
	cudaFree(d->dev.edit);
	cudaFree(d->dev.block);
	for (uint32_t i = 0; i < KD_AHEAD; i++) {
		struct flight *f = &d->flight[i];

		cudaFreeHost(f->host.token);
		cudaFreeHost(f->host.edit);
		cudaFreeHost(f->host.block);
		cudaFreeHost(f->pinned);
		cudaFreeHost(f->pinned_seen);
		cudaFreeHost(f->pinned_logits);
		free(f->copied);
	}
	tables_free(&d->tables);
	free(d->layer);
}
