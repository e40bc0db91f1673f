/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/forward.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "daemon/engine/device.h"

#define HUGE_PAGE ((size_t)2 << 20)
#define TOGETHER 8u        /* panels of a linear layer that are taken together, at most: tiles share their inputs among so many */
#define ITEMS 4u           /* that a part has of its own, at least, if there are so many */
#define ATTENTION_ROWS 16u /* of one sequence that go through attention together */
#define RANGE_BLOCKS 16u   /* fewer blocks of a row are not worth sharing */
#define BLOCK_PARTS (32u << 20) /* bytes of them at most: where contexts are longer still, nothing is shared */

/* Inputs of linear layers in both encodings; a site's format picks one. */
struct inputs {
	uint16_t *bf16;   /* [max_rows, ld] rounded to BF16 */
	uint16_t *fp8;    /* [max_rows, ld] E4M3 values, as BF16 */
	float *scale;     /* [max_rows] of fp8 */
	uint16_t *fp8b;   /* as fp8, with a scale for each 128 inputs */
	float *square;    /* [max_rows, ld_square] of fp8b */
	size_t ld, ld_square;
};

/* Panels or rows that a part begins with; whoever has done his own takes of the others'. */
struct share {
	_Alignas(64) uint32_t next; /* atomic */
	uint32_t end;
};

struct forward {
	const struct model *m;
	const struct k_ops *ops;
	struct team *team;
	struct kv_pool *kv;
	struct device *device; /* NULL: the CPU runs it */
	uint32_t max_rows;

	float *x;         /* [max_rows, hidden] residual */
	float *q;         /* [max_rows, n_heads * head_dim] */
	float *k, *v;     /* [max_rows, n_kv_heads * head_dim] */
	float *attn;      /* [max_rows, n_heads * head_dim] */
	float *gate, *up; /* [max_rows, intermediate] */
	float *logits;    /* [max_rows, vocab] */
	float *tmp;       /* [parts, max(hidden, intermediate)] */
	size_t tmp_ld;
	struct k_kv_block *block; /* [parts, max_context / 32] of one row */
	size_t block_ld;
	float *block_parts;       /* what attention of a block gives by itself, where ranges of blocks are shared out */
	size_t max_block_parts;   /* floats */
	struct inputs in;

	/* The phase that runs. */
	const struct forward_row *row;
	uint32_t n_rows;
	const struct plan **plan; /* [max_rows] plan of each input row */
	uint32_t layer;
	uint32_t next_item;       /* atomic: of attention, not yet taken */
	uint32_t ranges;          /* of blocks that a row and KV head are cut into; 1: not */
	struct share *share;      /* [parts] of what the phase has to do */
	uint32_t item;            /* so much of it is taken together */
	void (*each_row)(struct forward *, uint32_t part, uint32_t row);

	struct evidence *evidence; /* NULL: none in this run */
	uint32_t sample_row;

	/* $OCTET_FAULT: a site whose FP8 inputs get a wrong scale, for tests of eval and guardrail. */
	int fault_group;  /* -1: none */
	uint32_t fault_layer;
	float *fault_scale; /* [max_rows], then [max_rows, ld_square] */

	/* forward_find_nonfinite(): check after each phase. */
	bool trace, found;
	struct forward_site site;
};

/* One linear layer of a phase. */
struct site {
	enum plan_group group;
	const struct k_weight *w;
	float *y;
	size_t ldy;
	bool add;
};

struct linear_phase {
	struct forward *f;
	const struct site *site;
	uint32_t n_sites, n_rows;
};

/* Zeroed. Large ones in huge pages: a tile has 16 rows, each elsewhere, and they would be 16 misses of the TLB. */
static void *
buffer(size_t n, size_t size, bool *ok)
{
	size_t align = n * size >= HUGE_PAGE ? HUGE_PAGE : 64, bytes = (n * size + align - 1) & ~(align - 1);
	void *p = aligned_alloc(align, bytes == 0 ? align : bytes);

	if (p == NULL) {
		*ok = false;
		return NULL;
	}
	if (align == HUGE_PAGE)
		madvise(p, bytes, MADV_HUGEPAGE);
	memset(p, 0, bytes);
	return p;
}

static uint32_t
max3(uint32_t a, uint32_t b, uint32_t c)
{
	uint32_t m = a > b ? a : b;

	return m > c ? m : c;
}

static void
plant_fault(struct forward *f)
{
	const char *fault = getenv("OCTET_FAULT");

	f->fault_group = -1;
	for (int g = 0; fault != NULL && g <= GROUP_LM_HEAD; g++) {
		size_t len = strlen(plan_group_name((enum plan_group)g));

		if (strncmp(fault, plan_group_name((enum plan_group)g), len) != 0 || (fault[len] != '@' && fault[len] != '\0'))
			continue;
		f->fault_group = g;
		f->fault_layer = fault[len] == '@' ? (uint32_t)strtoul(fault + len + 1, NULL, 10) : 0;
	}
}

/* Heads and rows are fewer than four a thread where ranges of blocks are shared out. */
static size_t
max_block_parts(const struct model_shape *s, const struct kv_pool *kv, uint32_t parts)
{
	uint64_t heads = s->n_heads / s->n_kv_heads, most = BLOCK_PARTS / sizeof(float), all;

	if (parts == 1 || heads >= K_PART_HEADS)
		return 0;
	all = (uint64_t)4 * parts * kv_blocks_for(s->max_context) * k_part((uint32_t)heads, kv->hd_pad);
	return (size_t)(all < most ? all : most) / 16 * 16;
}

int
forward_new(struct forward **out, const struct model *m, const struct k_ops *ops, struct team *team,
    struct kv_pool *kv, uint32_t max_rows, struct err *err)
{
	const struct model_shape *s = &m->shape;
	uint32_t q = s->n_heads * s->head_dim, kvd = s->n_kv_heads * s->head_dim, parts = team_size(team);
	struct forward *f = calloc(1, sizeof(*f));
	bool ok = true;

	*out = NULL;
	if (f == NULL)
		return err_set(err, -ENOMEM, "no memory for the forward pass");
	f->m = m, f->ops = ops, f->team = team, f->kv = kv, f->max_rows = max_rows;
	f->tmp_ld = max3(s->hidden, s->intermediate, q);
	/* An odd number of cache lines: rows at a power of two would share a few sets of the cache. */
	f->in.ld = ((f->tmp_ld + K_BLOCK - 1) / K_BLOCK | 1) * K_BLOCK;
	f->in.ld_square = k_squares((uint32_t)f->in.ld);
	f->block_ld = kv_blocks_for(s->max_context);
	f->x = buffer((size_t)max_rows * s->hidden, sizeof(float), &ok);
	f->q = buffer((size_t)max_rows * q, sizeof(float), &ok);
	f->k = buffer((size_t)max_rows * kvd, sizeof(float), &ok);
	f->v = buffer((size_t)max_rows * kvd, sizeof(float), &ok);
	f->attn = buffer((size_t)max_rows * q, sizeof(float), &ok);
	f->gate = buffer((size_t)max_rows * s->intermediate, sizeof(float), &ok);
	f->up = buffer((size_t)max_rows * s->intermediate, sizeof(float), &ok);
	f->logits = aligned_alloc(64, ((size_t)max_rows * s->vocab * sizeof(float) + 63) & ~(size_t)63); /* touched as used */
	ok = ok && f->logits != NULL;
	f->tmp = buffer((size_t)parts * f->tmp_ld, sizeof(float), &ok);
	f->block = buffer((size_t)parts * f->block_ld, sizeof(*f->block), &ok);
	f->max_block_parts = max_block_parts(s, kv, parts);
	f->block_parts = aligned_alloc(64, f->max_block_parts * sizeof(float) + 64); /* touched as used */
	ok = ok && f->block_parts != NULL;
	f->share = buffer(parts, sizeof(*f->share), &ok);
	f->plan = buffer(max_rows, sizeof(*f->plan), &ok);
	f->in.bf16 = buffer((size_t)max_rows * f->in.ld, sizeof(uint16_t), &ok);
	f->in.fp8 = buffer((size_t)max_rows * f->in.ld, sizeof(uint16_t), &ok);
	f->in.scale = buffer(max_rows, sizeof(float), &ok);
	f->in.fp8b = buffer((size_t)max_rows * f->in.ld, sizeof(uint16_t), &ok);
	f->in.square = buffer((size_t)max_rows * f->in.ld_square, sizeof(float), &ok);
	f->fault_scale = buffer((size_t)max_rows * (f->in.ld_square + 1), sizeof(float), &ok);
	plant_fault(f);
	if (!ok) {
		forward_free(&f);
		return err_set(err, -ENOMEM, "no memory for a batch of %u rows", max_rows);
	}
	*out = f;
	return 0;
}

void
forward_free(struct forward **fp)
{
	struct forward *f = *fp;

	if (f == NULL)
		return;
	free(f->x), free(f->q), free(f->k), free(f->v), free(f->attn), free(f->gate), free(f->up);
	free(f->logits), free(f->tmp), free(f->block), free(f->block_parts), free(f->share), free(f->plan);
	free(f->in.bf16), free(f->in.fp8), free(f->in.scale), free(f->in.fp8b), free(f->in.square), free(f->fault_scale);
	free(f);
	*fp = NULL;
}

void
forward_use_device(struct forward *f, struct device *d)
{
	f->device = d;
}

/* Shares n panels or rows out, to be taken `most` at a time or fewer, so that all parts end together. */
static void
share_out(struct forward *f, uint32_t n, uint32_t parts, uint32_t most)
{
	uint32_t item = n / parts / ITEMS;

	f->item = item == 0 ? 1 : item < most ? item : most;
	for (uint32_t i = 0; i < parts; i++)
		team_share(n, i, parts, &f->share[i].next, &f->share[i].end);
}

/* The next [from, to); `whose` is 0 at first. */
static bool
take(struct forward *f, uint32_t part, uint32_t parts, uint32_t *whose, uint32_t *from, uint32_t *to)
{
	for (; *whose < parts; ++*whose) {
		struct share *s = &f->share[(part + *whose) % parts];

		*from = __atomic_fetch_add(&s->next, f->item, __ATOMIC_RELAXED);
		if (*from < s->end) {
			*to = s->end - *from < f->item ? s->end : *from + f->item;
			return true;
		}
	}
	return false;
}

static void
rows_part(void *arg, uint32_t part, uint32_t parts)
{
	struct forward *f = arg;
	uint32_t whose = 0, from, to;

	while (take(f, part, parts, &whose, &from, &to))
		for (uint32_t r = from; r < to; r++)
			f->each_row(f, part, r);
}

/* Phases over rows: one row needs no barrier. */
static void
run_rows(struct forward *f, uint32_t n, void (*each)(struct forward *, uint32_t part, uint32_t row))
{
	f->n_rows = n;
	f->each_row = each;
	if (n == 1) {
		each(f, 0, 0);
		return;
	}
	share_out(f, n, team_parts(f->team), n);
	team_run(f->team, rows_part, f);
}

enum encoding { IN_BF16, IN_FP8, IN_FP8B };

static enum encoding
encoding_of(enum plan_format f)
{
	return f == FORMAT_FP8B ? IN_FP8B : k_is_w8a8((enum k_format)f) ? IN_FP8 : IN_BF16;
}

static bool
any_encoding(const struct forward *f, uint32_t row, const enum plan_group *group, uint32_t n, enum encoding e)
{
	for (uint32_t i = 0; i < n; i++)
		if (encoding_of(plan_at(f->plan[row], group[i], f->layer)) == e)
			return true;
	return false;
}

/* Encodes a row for the linear layers of these groups, as their formats need it. */
static void
encode(struct forward *f, uint32_t row, const float *h, uint32_t n, const enum plan_group *group, uint32_t n_groups)
{
	uint32_t n_pad = (n + K_BLOCK - 1) & ~(uint32_t)(K_BLOCK - 1);

	if (f->evidence != NULL && row == f->sample_row)
		for (uint32_t i = 0; i < n_groups; i++)
			evidence_add(f->evidence, group[i], f->layer, h, n);
	if (any_encoding(f, row, group, n_groups, IN_BF16))
		f->ops->act_bf16(h, n, n_pad, f->in.bf16 + row * f->in.ld);
	if (any_encoding(f, row, group, n_groups, IN_FP8))
		f->ops->act_fp8(h, n, n_pad, f->in.fp8 + row * f->in.ld, &f->in.scale[row]);
	if (any_encoding(f, row, group, n_groups, IN_FP8B))
		k_act_squares(f->ops, h, n, n_pad, f->in.fp8b + row * f->in.ld, f->in.square + row * f->in.ld_square);
}

/* y = y + bias in FP32, after the scaled sum has been written or added: the one
 * place that does it, so every level has the same bits. */
static void
add_bias(const struct forward *f, const struct site *s, uint32_t row0, uint32_t row1, uint32_t p0, uint32_t p1)
{
	const float *bias = s->group <= GROUP_DOWN ? f->m->layer[f->layer].bias[s->group] : NULL;
	uint32_t to = p1 * K_PANEL < s->w->n ? p1 * K_PANEL : s->w->n;

	if (bias == NULL)
		return;
	for (uint32_t r = row0; r < row1; r++)
		for (uint32_t c = p0 * K_PANEL; c < to; c++)
			s->y[r * s->ldy + c] += bias[c];
}

static bool
is_faulty(const struct forward *f, const struct site *s)
{
	return f->fault_group == (int)s->group && f->fault_layer == f->layer;
}

/* Before a phase with the faulty site: of all rows, then of all squares. */
static void
make_wrong_scales(struct forward *f, uint32_t n_rows)
{
	float *square = f->fault_scale + f->max_rows;

	for (size_t i = 0; i < n_rows; i++)
		f->fault_scale[i] = 4 * f->in.scale[i];
	for (size_t i = 0; i < n_rows * f->in.ld_square; i++)
		square[i] = 4 * f->in.square[i];
}

/* Panels [p0, p1) of a site: a call of the kernel for each run of rows with one format. */
static void
linear_panels(struct forward *f, const struct site *s, uint32_t n_rows, uint32_t p0, uint32_t p1)
{
	for (uint32_t r = 0, end; r < n_rows; r = end) {
		enum plan_format fmt = plan_at(f->plan[r], s->group, f->layer);
		enum encoding e = encoding_of(fmt);
		const float *scale = e == IN_FP8B ? f->in.square : f->in.scale;
		size_t scales = e == IN_FP8B ? f->in.ld_square : 1;

		for (end = r + 1; end < n_rows && plan_at(f->plan[end], s->group, f->layer) == fmt; end++)
			;
		if (is_faulty(f, s))
			scale = e == IN_FP8B ? f->fault_scale + f->max_rows : f->fault_scale;
		k_linear_run(f->ops, &(struct k_linear){
		    .w = s->w, .format = (enum k_format)fmt,
		    .x = (e == IN_FP8B ? f->in.fp8b : e == IN_FP8 ? f->in.fp8 : f->in.bf16) + r * f->in.ld,
		    .x_scale = e != IN_BF16 ? scale + r * scales : NULL, .ld_scale = scales,
		    .rows = end - r, .ldx = f->in.ld,
		    .y = s->y + r * s->ldy, .ldy = s->ldy, .add = s->add,
		    .panel0 = p0, .panel1 = p1});
	}
	add_bias(f, s, 0, n_rows, p0, p1);
}

/* Panels [from, to) of all sites, one after the other. */
static void
linear_sites(const struct linear_phase *p, uint32_t from, uint32_t to)
{
	for (uint32_t i = 0; i < p->n_sites && to > 0; i++) {
		uint32_t panels = p->site[i].w->n_pad / K_PANEL, end = to < panels ? to : panels;

		if (from < end)
			linear_panels(p->f, &p->site[i], p->n_rows, from, end);
		from -= from < panels ? from : panels;
		to -= end;
	}
}

static void
linear_part(void *arg, uint32_t part, uint32_t parts)
{
	const struct linear_phase *p = arg;
	uint32_t whose = 0, from, to;

	while (take(p->f, part, parts, &whose, &from, &to))
		linear_sites(p, from, to);
}

static void
trace(struct forward *f, const float *v, size_t n, enum plan_group group)
{
	if (!f->trace || f->found)
		return;
	for (size_t i = 0; i < n; i++) {
		if (!isfinite(v[i])) {
			f->found = true;
			f->site = (struct forward_site){group, f->layer};
			return;
		}
	}
}

static void
run_linear(struct forward *f, const struct site *site, uint32_t n_sites, uint32_t n_rows)
{
	struct linear_phase p = {f, site, n_sites, n_rows};
	uint32_t panels = 0;

	for (uint32_t i = 0; i < n_sites; i++) {
		panels += site[i].w->n_pad / K_PANEL;
		if (is_faulty(f, &site[i]))
			make_wrong_scales(f, n_rows);
	}
	share_out(f, panels, team_parts(f->team), TOGETHER);
	team_run(f->team, linear_part, &p);
	for (uint32_t i = 0; i < n_sites; i++)
		trace(f, site[i].y, site[i].w->n, site[i].group);
}

static void
embed_row(struct forward *f, uint32_t part, uint32_t r)
{
	(void)part;
	model_embed(f->m, f->row[r].token, f->x + (size_t)r * f->m->shape.hidden);
}

static void
norm_row(struct forward *f, uint32_t part, uint32_t r, const float *weight, const enum plan_group *group, uint32_t n_groups)
{
	uint32_t hidden = f->m->shape.hidden;
	float *h = f->tmp + part * f->tmp_ld;

	f->ops->rmsnorm(f->x + (size_t)r * hidden, weight, hidden, f->m->shape.rms_eps, h);
	encode(f, r, h, hidden, group, n_groups);
}

static void
attn_norm_row(struct forward *f, uint32_t part, uint32_t r)
{
	static const enum plan_group group[] = {GROUP_Q, GROUP_K, GROUP_V};

	norm_row(f, part, r, f->m->layer[f->layer].input_norm, group, 3);
}

static void
mlp_norm_row(struct forward *f, uint32_t part, uint32_t r)
{
	static const enum plan_group group[] = {GROUP_GATE, GROUP_UP};

	norm_row(f, part, r, f->m->layer[f->layer].post_norm, group, 2);
}

static void
final_norm_row(struct forward *f, uint32_t part, uint32_t r)
{
	static const enum plan_group group[] = {GROUP_LM_HEAD};

	norm_row(f, part, r, f->m->final_norm, group, 1);
}

static struct k_kv_block
block_of(const struct forward *f, const struct forward_row *row, uint32_t block)
{
	return kv_pages(f->kv, row->kv->block + (size_t)block * row->kv->n_layers + f->layer);
}

/* RMSNorm of each head, in place; w NULL: none. */
static void
norm_heads(const struct forward *f, float *x, uint32_t n_heads, const float *w)
{
	uint32_t hd = f->m->shape.head_dim;

	for (uint32_t h = 0; h < n_heads && w != NULL; h++)
		f->ops->rmsnorm(x + (size_t)h * hd, w, hd, f->m->shape.rms_eps, x + (size_t)h * hd);
}

static void
rope_row(struct forward *f, uint32_t part, uint32_t r)
{
	const struct model_shape *s = &f->m->shape;
	const struct model_layer *layer = &f->m->layer[f->layer];
	uint32_t half = s->head_dim / 2;
	const struct forward_row *row = &f->row[r];
	const float *cos = f->m->rope_cos + (size_t)row->pos * half;
	const float *sin = f->m->rope_sin + (size_t)row->pos * half;
	float *q = f->q + (size_t)r * s->n_heads * s->head_dim;
	float *k = f->k + (size_t)r * s->n_kv_heads * s->head_dim;
	const float *v = f->v + (size_t)r * s->n_kv_heads * s->head_dim;
	struct k_kv_block block = block_of(f, row, row->pos / KV_PAGE_TOKENS);

	(void)part;
	norm_heads(f, q, s->n_heads, layer->q_norm);
	norm_heads(f, k, s->n_kv_heads, layer->k_norm);
	if (!s->no_rope[f->layer]) {
		f->ops->rope(q, s->n_heads, s->head_dim, cos, sin);
		f->ops->rope(k, s->n_kv_heads, s->head_dim, cos, sin);
	}
	f->ops->kv_write(&block, k, v, s->n_kv_heads, s->head_dim, f->kv->hd_pad, row->pos % KV_PAGE_TOKENS);
	for (uint32_t h = 0; f->evidence != NULL && r == f->sample_row && h < s->n_kv_heads; h++) {
		evidence_add(f->evidence, GROUP_KV_CACHE, f->layer, k + h * s->head_dim, s->head_dim);
		evidence_add(f->evidence, GROUP_KV_CACHE, f->layer, v + h * s->head_dim, s->head_dim);
	}
}

/* Rows of one sequence that follow each other from r on. */
static uint32_t
run_of_rows(const struct forward *f, uint32_t r)
{
	uint32_t end = r + 1;

	while (end < f->n_rows && end - r < ATTENTION_ROWS && f->row[end].kv == f->row[r].kv && f->row[end].pos == f->row[end - 1].pos + 1)
		end++;
	return end;
}

static uint32_t
first_block(const struct forward *f, uint32_t r)
{
	return k_window_first(f->row[r].pos, f->m->shape.window) / KV_PAGE_TOKENS;
}

static uint32_t
blocks_of(const struct forward *f, uint32_t r)
{
	return f->row[r].pos / KV_PAGE_TOKENS + 1 - first_block(f, r);
}

/* Rows from r on, KV heads [head0, head1). */
static struct k_attention
attention_of(const struct forward *f, uint32_t r, uint32_t rows, uint32_t head0, uint32_t head1)
{
	const struct model_shape *s = &f->m->shape;
	uint32_t group = s->n_heads / s->n_kv_heads;
	size_t ld = (size_t)s->n_heads * s->head_dim;

	return (struct k_attention){.q = f->q + r * ld, .out = f->attn + r * ld, .ld = ld, .rows = rows,
	    .n_heads = s->n_heads, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim, .hd_pad = f->kv->hd_pad,
	    .head0 = head0 * group, .head1 = head1 * group, .pos = f->row[r].pos, .window = s->window,
	    .scale = 1.0f / sqrtf((float)s->head_dim)};
}

/* As a call for one row and KV head: the place of its parts, of all its blocks. */
static void
set_parts(const struct forward *f, struct k_attention *a, uint32_t r, uint32_t h)
{
	size_t one = k_part(a->head1 - a->head0, a->hd_pad), at = (size_t)h * blocks_of(f, r);

	for (uint32_t i = 0; i < r; i++)
		at += (size_t)f->m->shape.n_kv_heads * blocks_of(f, i);
	a->parts = f->block_parts + at * one;
	a->block0 = first_block(f, r);
	a->block1 = a->block0 + blocks_of(f, r);
}

static void
attend(struct forward *f, struct k_attention *a, uint32_t r, uint32_t h, uint32_t range, struct k_kv_block *block)
{
	uint32_t from = first_block(f, r), end = (a->pos + a->rows - 1) / KV_PAGE_TOKENS + 1;

	if (f->ranges > 1) {
		uint32_t n = blocks_of(f, r);

		set_parts(f, a, r, h);
		a->block0 = from + n * range / f->ranges, a->block1 = end = from + n * (range + 1) / f->ranges;
		a->parts += (a->block0 - from) * k_part(a->head1 - a->head0, a->hd_pad);
		from = a->block0;
	}
	for (uint32_t b = from; b < end; b++)
		block[b] = block_of(f, &f->row[r], b);
	a->block = block;
	f->ops->attention(a);
}

/* An item is a KV head of a run of rows, so that its pages stay in cache for the next, or all heads of one row where
 * rows are many, or a range of the blocks of a KV head where there are few. Items go to whoever is free: later positions
 * have more before them. */
static void
attention_part(void *arg, uint32_t part, uint32_t parts)
{
	struct forward *f = arg;
	uint32_t kv_heads = f->m->shape.n_kv_heads, item = 0, mine;
	struct k_kv_block *block = f->block + part * f->block_ld;
	bool many = f->n_rows >= 4 * parts;

	mine = __atomic_fetch_add(&f->next_item, 1, __ATOMIC_RELAXED);
	for (uint32_t i = 0; i < kv_heads * f->ranges; i++) {
		uint32_t h = i / f->ranges;

		for (uint32_t r = 0, end; r < f->n_rows; r = end) {
			struct k_attention a;
			bool whole;

			end = run_of_rows(f, r);
			whole = many && end - r == 1;
			if ((whole && h > 0) || item++ != mine)
				continue;
			a = attention_of(f, r, end - r, h, whole ? kv_heads : h + 1);
			attend(f, &a, r, h, i % f->ranges, block);
			mine = __atomic_fetch_add(&f->next_item, 1, __ATOMIC_RELAXED);
		}
	}
}

static void
merge_part(void *arg, uint32_t part, uint32_t parts)
{
	struct forward *f = arg;
	uint32_t kv_heads = f->m->shape.n_kv_heads;

	for (uint32_t i = part; i < f->n_rows * kv_heads; i += parts) {
		struct k_attention a = attention_of(f, i / kv_heads, 1, i % kv_heads, i % kv_heads + 1);

		set_parts(f, &a, i / kv_heads, i % kv_heads);
		f->ops->attention_merge(&a);
	}
}

/* Into how many ranges of blocks is each KV head of each row cut, so that there are four items a thread? */
static uint32_t
choose_ranges(const struct forward *f)
{
	const struct model_shape *s = &f->m->shape;
	uint32_t items = f->n_rows * s->n_kv_heads, wanted = 4 * team_parts(f->team), least = UINT32_MAX, n;
	size_t blocks = 0;

	if (f->max_block_parts == 0 || items >= wanted)
		return 1;
	for (uint32_t r = 0; r < f->n_rows; r++) {
		if (run_of_rows(f, r) != r + 1)
			return 1;
		n = blocks_of(f, r);
		blocks += n;
		least = n < least ? n : least;
	}
	if (blocks * s->n_kv_heads * k_part(s->n_heads / s->n_kv_heads, f->kv->hd_pad) > f->max_block_parts)
		return 1;
	n = (wanted + items - 1) / items;
	n = n < least / RANGE_BLOCKS ? n : least / RANGE_BLOCKS;
	return n < 2 ? 1 : n;
}

static void
run_attention(struct forward *f)
{
	f->next_item = 0;
	f->ranges = choose_ranges(f);
	team_run(f->team, attention_part, f);
	if (f->ranges > 1)
		team_run(f->team, merge_part, f);
}

static void
attn_encode_row(struct forward *f, uint32_t part, uint32_t r)
{
	static const enum plan_group group[] = {GROUP_O};
	uint32_t n = f->m->shape.n_heads * f->m->shape.head_dim;

	(void)part;
	encode(f, r, f->attn + (size_t)r * n, n, group, 1);
}

static void
mlp_encode_row(struct forward *f, uint32_t part, uint32_t r)
{
	static const enum plan_group group[] = {GROUP_DOWN};
	uint32_t n = f->m->shape.intermediate;
	float *h = f->tmp + part * f->tmp_ld;

	f->ops->silu_mul(f->gate + (size_t)r * n, f->up + (size_t)r * n, n, h);
	encode(f, r, h, n, group, 1);
}

static void
run_layer(struct forward *f, uint32_t n)
{
	const struct model_shape *s = &f->m->shape;
	const struct k_weight *w = f->m->layer[f->layer].linear;
	size_t qd = (size_t)s->n_heads * s->head_dim, kvd = (size_t)s->n_kv_heads * s->head_dim;

	run_rows(f, n, attn_norm_row);
	run_linear(f, (struct site[]){
	    {GROUP_Q, &w[GROUP_Q], f->q, qd, false},
	    {GROUP_K, &w[GROUP_K], f->k, kvd, false},
	    {GROUP_V, &w[GROUP_V], f->v, kvd, false}}, 3, n);
	run_rows(f, n, rope_row);
	run_attention(f);
	/* q, k and v were finite: the fault came out of the cache. */
	trace(f, f->attn, qd, GROUP_KV_CACHE);
	run_rows(f, n, attn_encode_row);
	run_linear(f, (struct site[]){{GROUP_O, &w[GROUP_O], f->x, s->hidden, true}}, 1, n);

	run_rows(f, n, mlp_norm_row);
	run_linear(f, (struct site[]){
	    {GROUP_GATE, &w[GROUP_GATE], f->gate, s->intermediate, false},
	    {GROUP_UP, &w[GROUP_UP], f->up, s->intermediate, false}}, 2, n);
	run_rows(f, n, mlp_encode_row);
	run_linear(f, (struct site[]){{GROUP_DOWN, &w[GROUP_DOWN], f->x, s->hidden, true}}, 1, n);
}

/* Moves the rows that want logits to the front of x and plan. */
static uint32_t
keep_wanted(struct forward *f, uint32_t n)
{
	uint32_t hidden = f->m->shape.hidden, kept = 0;

	for (uint32_t r = 0; r < n; r++) {
		if (!f->row[r].wants_logits)
			continue;
		if (kept != r)
			memcpy(f->x + (size_t)kept * hidden, f->x + (size_t)r * hidden, hidden * sizeof(float));
		f->plan[kept++] = f->plan[r];
	}
	return kept;
}

void
forward_start(struct forward *f, const struct forward_row *row, uint32_t n)
{
	device_submit(f->device, row, n, f->logits, f->evidence, f->sample_row);
	f->evidence = NULL;
}

float *
forward_wait(struct forward *f)
{
	device_wait(f->device);
	return f->logits;
}

float *
forward_run(struct forward *f, const struct forward_row *row, uint32_t n)
{
	uint32_t wanted;

	if (f->device != NULL) {
		forward_start(f, row, n);
		return forward_wait(f);
	}
	f->row = row;
	for (uint32_t r = 0; r < n; r++)
		f->plan[r] = row[r].plan;
	run_rows(f, n, embed_row);
	for (f->layer = 0; f->layer < f->m->shape.n_layers; f->layer++)
		run_layer(f, n);

	f->layer = 0; /* lm_head has no layer */
	f->sample_row = 0;
	wanted = keep_wanted(f, n);
	if (wanted > 0) {
		run_rows(f, wanted, final_norm_row);
		run_linear(f, (struct site[]){
		    {GROUP_LM_HEAD, &f->m->lm_head, f->logits, f->m->shape.vocab, false}}, 1, wanted);
	}
	f->evidence = NULL;
	return f->logits;
}

void
forward_sample(struct forward *f, struct evidence *e, uint32_t row)
{
	f->evidence = e;
	f->sample_row = row;
}

bool
forward_find_nonfinite(struct forward *f, const struct forward_row *row, struct forward_site *site)
{
	if (f->device != NULL)
		return device_find_nonfinite(f->device, row, site);
	f->trace = true;
	f->found = false;
	forward_run(f, row, 1);
	f->trace = false;
	*site = f->site;
	return f->found;
}
