/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A step: what the engine asks for is laid out in pinned memory, copied, and the kernels of all layers follow on one
 * stream; results come back in one copy, with one synchronisation. The next step may be put behind it meanwhile: its pinned
 * memory is another (a flight), what is on the card is used in the stream's order. Steps that only decode are padded up to a bucket of
 * rows; the second such step of a (bucket, plan, splits) is captured as a graph, and those after it replay that. A flip is
 * a new plan: its first step runs eagerly. Where rows are of several plans, so many of each, the fifth is captured. A step in
 * many measures the inputs of one row, eagerly.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "kernels/cuda/plugin.h"

static double
now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec * 1e6 + (double)ts.tv_nsec * 1e-3;
}

static enum k_format
format_at(const struct kd_device *d, const uint8_t *plan, uint32_t group, uint32_t layer)
{
	return (enum k_format)plan[(size_t)group * d->m.n_layers + (group == KD_LM_HEAD ? 0 : layer)];
}

/* ---- linear layers ---- */

/* One product, or several: neighbouring parts of a bundle, neighbouring rows, one format. */
struct call {
	const struct bundle *b;
	uint32_t part0, part1, row0, rows;
	enum k_format format;
	float *y;
	size_t ldy;
	bool add;
	bool last;     /* no rows behind it: padding may be written */
};

static struct cu_linear
linear_of(const struct kd_device *d, const struct call *c)
{
	const struct bundle *b = c->b;
	uint32_t at = b->at[c->part0], n = b->at[c->part1 - 1] + b->n[c->part1 - 1] - at;
	size_t to = (size_t)at * b->ld;
	bool squares = c->format == K_FP8B, masters = c->format == K_BF16 || squares;

	return (struct cu_linear){.kind = squares ? CU_W_E4M3B : !masters ? (c->format == K_FP8T ? CU_W_E4M3T : CU_W_E4M3) :
	    b->bf16[c->part0] != NULL ? CU_W_BF16 : CU_W_NESTED, .w8a8 = k_is_w8a8(c->format),
	    .bf16 = b->bf16[c->part0], .hi = b->hi + to, .lo = masters ? b->lo[c->part0] : NULL,
	    .scale = b->scale + at, .tscale = b->tscale + at, .square = b->square + (size_t)b->square_at[c->part0] * b->ld_square,
	    .ld_square = b->ld_square, .n = n, .k = b->k, .ld = b->ld, .xb = d->xb + c->row0 * d->ldx,
	    .xq = (squares ? d->xqb : d->xq) + c->row0 * d->ldx, .xs = squares ? d->xsb + c->row0 * d->ldb : d->xs + c->row0,
	    .ldx = d->ldx, .ldxs = squares ? d->ldb : 1, .rows = c->rows, .y = c->y + c->row0 * c->ldy + at, .ldy = c->ldy, .add = c->add};
}

static struct cu_linear
rows_of(const struct cu_linear *a, uint32_t from, uint32_t rows)
{
	struct cu_linear r = *a;

	r.xb += from * a->ldx, r.xq += from * a->ldx, r.xs += from * a->ldxs, r.y += from * a->ldy, r.rows = rows;
	return r;
}

static void
run_skinny(struct kd_device *d, const struct call *c, const struct cu_linear *a)
{
	for (uint32_t r = 0; r < a->rows; r += CU_SKINNY) {
		struct cu_linear some = rows_of(a, r, a->rows - r < CU_SKINNY ? a->rows - r : CU_SKINNY);

		cu_linear_skinny(&some, d->stream);
		for (uint32_t p = c->part0; a->kind == CU_W_NESTED && p < c->part1; p++) {
			struct cu_linear part = some;

			part.y += c->b->at[p] - c->b->at[c->part0];
			cu_exceptions_add(&part, &c->b->exc[p], d->stream);
		}
	}
}

typedef int (*lt_fn)(struct lt *, enum lt_kind, const void *, const void *, size_t, float *, size_t, uint32_t, uint32_t,
    uint32_t, bool, const float *, const float *, cudaStream_t);

/* E4M3 by E4M3: outer-vector scales, else unit scales and the vectors applied by a kernel behind it. */
static int
run_w8a8(struct kd_device *d, const struct cu_linear *a, const uint8_t *w, bool tensor, uint32_t t, lt_fn lt)
{
	const float *scale = tensor ? a->tscale : a->scale;
	struct cu_linear real = *a;

	if (lt(d->lt, LT_FP8_OUTER, w, a->xq, a->ldx, a->y, a->ldy, a->n, a->ld, t, a->add, scale, a->xs,
	    d->stream) == 0)
		return 0;
	if (a->n > d->scalar_n || lt(d->lt, LT_FP8_SCALAR, w, a->xq, a->ldx, d->scalar_y, a->n, a->n, a->ld, t, false, NULL, NULL,
	    d->stream) != 0)
		return -ENOTSUP;
	cu_apply_scales(&real, d->scalar_y, a->n, d->stream);
	return 0;
}

/* -ENOTSUP: own kernels take it. t: rows with their padding, a multiple of 16. */
static int
run_lt(struct kd_device *d, const struct call *c, const struct cu_linear *a, uint32_t t, lt_fn lt)
{
	bool fits = (size_t)a->n * a->ld * sizeof(uint16_t) <= d->scratch_bytes;
	const uint16_t *w = a->bf16;

	switch (a->kind) {
	case CU_W_E4M3B:
		cu_square_inputs(a, t, d->xsb_t, d->stream);
		return lt(d->lt, LT_FP8_SQUARES, a->hi, a->xq, a->ldx, a->y, a->ldy, a->n, a->ld, t, a->add, a->square, d->xsb_t, d->stream);
	case CU_W_E4M3T:
		if (!fits)
			return -ENOTSUP;
		cu_rescale_e4m3(a, d->scratch, d->stream);
		return run_w8a8(d, a, d->scratch, true, t, lt);
	case CU_W_E4M3:
		if (a->w8a8)
			return run_w8a8(d, a, a->hi, false, t, lt);
		/* fall through */
	case CU_W_NESTED:
		if (!fits)
			return -ENOTSUP;
		w = d->scratch;
		for (uint32_t p = c->part0; p < c->part1; p++) {
			uint32_t at = c->b->at[p] - c->b->at[c->part0];
			struct cu_linear part = *a;

			part.n = c->b->n[p], part.hi += (size_t)at * a->ld, part.scale += at;
			part.lo = a->lo != NULL ? a->lo + (size_t)at * a->ld : NULL;
			cu_unpack(&part, &c->b->exc[p], (uint16_t *)d->scratch + (size_t)at * a->ld, d->stream);
		}
		break;
	case CU_W_BF16: break;
	}
	return lt(d->lt, LT_BF16, w, a->xb, a->ldx, a->y, a->ldy, a->n, a->ld, t, a->add, NULL, NULL, d->stream);
}

/* To CU_SKINNY rows own kernels run but where the library was faster when both were timed. */
static bool
own_is_better(const struct kd_device *d, const struct cu_linear *a, uint32_t t)
{
	if (a->rows <= 8 || t < a->rows || (a->kind != CU_W_BF16 && !(a->kind == CU_W_E4M3 && a->w8a8)))
		return true;
	return !lt_wins(d->lt, a->w8a8 ? LT_FP8_OUTER : LT_BF16, a->w8a8 ? (const void *)a->hi : a->bf16,
	    a->w8a8 ? (const void *)a->xq : a->xb, a->ldx, a->y, a->ldy, a->n, a->ld, t, a->add);
}

/* The codes of fp8b take the place of the high plane. */
static void
make_squares(struct kd_device *d, const struct call *c, struct cu_linear *a)
{
	uint8_t *codes = d->scratch;

	for (uint32_t p = c->part0; p < c->part1; p++) {
		uint32_t at = c->b->at[p] - c->b->at[c->part0];
		struct cu_linear part = *a;

		part.n = c->b->n[p], part.hi += (size_t)at * a->ld, part.scale += at;
		part.lo = a->lo != NULL ? a->lo + (size_t)at * a->ld : NULL;
		part.bf16 = a->bf16 != NULL ? a->bf16 + (size_t)at * a->ld : NULL;
		part.square = c->b->square + (size_t)c->b->square_at[p] * a->ld_square;
		cu_square_codes(&part, &c->b->exc[p], codes + (size_t)at * a->ld, d->stream);
	}
	a->hi = codes;
}

static void
run_call(struct kd_device *d, const struct call *c)
{
	struct cu_linear a = linear_of(d, c), rest;
	uint32_t whole = c->last ? (a.rows + 15) & ~15u : a.rows & ~15u;

	if (a.kind == CU_W_E4M3B)
		make_squares(d, c, &a);
	if (a.rows <= CU_SKINNY && own_is_better(d, &a, whole)) {
		run_skinny(d, c, &a);
		return;
	}
	rest = rows_of(&a, whole < a.rows ? whole : a.rows, whole < a.rows ? a.rows - whole : 0);
	if (whole < a.rows)
		a.rows = whole;
	if (run_lt(d, c, &a, whole, lt_run) != 0)
		run_skinny(d, c, &a);
	if (rest.rows > 0)
		run_skinny(d, c, &rest);
}

/* Can part p of a bundle be in one product with the part before it? fp8b: squares end with a part. */
static bool
go_together(const struct bundle *b, uint32_t p, enum k_format f)
{
	return (f != K_FP8B || b->n[p - 1] % K_SQUARE == 0) &&
	    ((f != K_BF16 && f != K_FP8B) || (b->bf16[p] != NULL) == (b->bf16[p - 1] != NULL));
}

/* ranges: of the rows that the inputs are for. */
static void
run_bundle(struct kd_device *d, const struct bundle *b, uint32_t layer, const struct range *range, uint32_t n_ranges,
    float *y, size_t ldy, bool add)
{
	uint32_t total = n_ranges > 0 ? range[n_ranges - 1].row + range[n_ranges - 1].n : 0;

	for (uint32_t p = 0, p1; p < b->parts; p = p1) {
		bool same = true;

		/* Parts go together where they agree for all rows and one product can have them. */
		for (p1 = p + 1; p1 < b->parts && same; p1 += same)
			for (uint32_t i = 0; i < n_ranges; i++) {
				enum k_format f = format_at(d, range[i].plan, b->group[p], layer);

				same = same && format_at(d, range[i].plan, b->group[p1], layer) == f && go_together(b, p1, f);
			}
		for (uint32_t i = 0, j; i < n_ranges; i = j) {
			enum k_format f = format_at(d, range[i].plan, b->group[p], layer);
			uint32_t end;

			for (j = i + 1; j < n_ranges && format_at(d, range[j].plan, b->group[p], layer) == f; j++)
				;
			end = range[j - 1].row + range[j - 1].n;
			run_call(d, &(struct call){b, p, p1, range[i].row, end - range[i].row, f, y, ldy, add, end == total});
		}
	}
	if (b->bias != NULL)
		cu_add_bias(y, ldy, total, b->n_all, b->bias, d->stream);
	for (uint32_t p = 0; d->trace && p < b->parts; p++)
		cu_check_finite(y + b->at[p], b->n[p], (b->head ? d->m.n_layers : layer) * 16 + b->group[p] + (b->group[p] > G_V),
		    d->first_bad, d->stream);
}

/* What the inputs of a bundle must be encoded as; seen: the row of them that is measured. */
static struct cu_encoded
encoding(const struct kd_device *d, const struct bundle *b, uint32_t layer, const struct range *range, uint32_t n, uint32_t seen)
{
	size_t at = b->head ? (size_t)d->m.n_layers * N_SEEN : layer * N_SEEN + (size_t)(b - d->layer[layer].b);
	struct cu_encoded e = {.ld = d->ldx, .ldb = d->ldb, .seen = seen != CU_NONE ? d->seen + at : NULL, .seen_row = seen};

	for (uint32_t i = 0; i < n; i++)
		for (uint32_t p = 0; p < b->parts; p++) {
			enum k_format f = format_at(d, range[i].plan, b->group[p], layer);

			if (f == K_FP8B)
				e.xqb = d->xqb, e.xsb = d->xsb;
			else if (k_is_w8a8(f))
				e.xq = d->xq, e.xs = d->xs;
			else
				e.xb = d->xb;
		}
	return e;
}

/* ---- all layers ---- */

struct shape {
	uint32_t rows;          /* padded */
	uint32_t n_tiles, splits, n_wanted;
	bool prefill, decode;
	size_t edits;
	uint32_t seen_row, seen_wanted; /* whose inputs are measured: of the rows, of those that want logits; CU_NONE: none */
};

static bool
measures(const struct shape *s)
{
	return s->seen_row != CU_NONE || s->seen_wanted != CU_NONE;
}

static void
run_layer(struct kd_device *d, uint32_t l, const struct shape *s)
{
	const struct kd_model *m = &d->m;
	const struct layer *layer = &d->layer[l];
	const struct bundle *b = layer->b;
	uint32_t q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim;
	struct cu_attention a = {.kv = d->kv, .table = d->tables.dev, .first = d->dev.first, .pos = d->dev.pos,
	    .n_layers = m->n_layers, .layer = l, .n_heads = m->n_heads, .hd = m->head_dim, .window = m->window, .eps = m->rms_eps,
	    .rows = s->rows, .qkv = d->qkv, .q = d->q, .q_norm = layer->q_norm, .k_norm = layer->k_norm,
	    .cos = layer->no_rope ? NULL : d->cos, .sin = d->sin, .tile = d->dev.tile, .n_tiles = s->n_tiles, .splits = s->splits,
	    .prefill = s->prefill, .part = d->part, .scale = 1.0f / sqrtf((float)m->head_dim),
	    .seen = s->seen_row != CU_NONE ? d->seen + l * N_SEEN + SEEN_KV : NULL, .seen_row = s->seen_row};
	struct cu_encoded e = encoding(d, &b[B_QKV], l, d->range, d->n_ranges, s->seen_row);

	cu_rmsnorm(d->x, m->hidden, NULL, layer->input_norm, m->hidden, m->rms_eps, s->rows, &e, d->stream);
	run_bundle(d, &b[B_QKV], l, d->range, d->n_ranges, d->qkv, q + 2 * kv, false);
	cu_rope_kv(&a, d->stream);
	cu_attend(&a, d->stream);
	e = encoding(d, &b[B_O], l, d->range, d->n_ranges, s->seen_row);
	cu_attention_merge(&a, d->attn, &e, d->stream);
	if (d->trace)
		cu_check_finite(d->attn, q, l * 16 + G_V + 1, d->first_bad, d->stream);
	run_bundle(d, &b[B_O], l, d->range, d->n_ranges, d->x, m->hidden, true);

	e = encoding(d, &b[B_GU], l, d->range, d->n_ranges, s->seen_row);
	cu_rmsnorm(d->x, m->hidden, NULL, layer->post_norm, m->hidden, m->rms_eps, s->rows, &e, d->stream);
	run_bundle(d, &b[B_GU], l, d->range, d->n_ranges, d->gu, 2 * (size_t)m->intermediate, false);
	e = encoding(d, &b[B_DOWN], l, d->range, d->n_ranges, s->seen_row);
	cu_silu_mul(d->gu, m->intermediate, s->rows, &e, d->stream);
	run_bundle(d, &b[B_DOWN], l, d->range, d->n_ranges, d->x, m->hidden, true);
}

/* The plans of the rows that want logits: ranges of d->range, counted in wanted rows. */
static uint32_t
wanted_ranges(const struct kd_device *d, uint32_t n_wanted, struct range *out)
{
	uint32_t n = 0, r = 0;

	for (uint32_t i = 0; i < n_wanted; i++) {
		while (d->host->from[i] >= d->range[r].row + d->range[r].n)
			r++;
		if (n > 0 && out[n - 1].plan == d->range[r].plan)
			out[n - 1].n++;
		else
			out[n++] = (struct range){d->range[r].plan, i, 1};
	}
	return n;
}

static void
run_layers(struct kd_device *d, const struct shape *s)
{
	const struct kd_model *m = &d->m;
	struct cu_linear table = {.hi = d->head.hi, .lo = d->head.lo[0], .scale = d->head.scale, .ld = d->head.ld};
	struct range range[MAX_RANGES];
	struct cu_encoded e;
	uint32_t n;

	cu_embed(d->dev.token, d->result, s->rows, d->embed, &table, &d->head.exc[0], m->hidden, d->embed_ld, m->vocab, d->x, d->stream);
	for (uint32_t l = 0; l < m->n_layers; l++)
		run_layer(d, l, s);
	if (s->n_wanted == 0)
		return;
	n = wanted_ranges(d, s->n_wanted, range);
	e = encoding(d, &d->head, 0, range, n, s->seen_wanted);
	cu_rmsnorm(d->x, m->hidden, d->dev.from, d->final_norm, m->hidden, m->rms_eps, s->n_wanted, &e, d->stream);
	/* As layer 0 of the plan, but told apart in a trace. */
	run_bundle(d, &d->head, 0, range, n, d->logits, m->vocab, false);
	if (d->trace)
		return;
	cu_sample(d->logits, m->vocab, m->vocab, d->dev.want, d->dev.edit, d->dev.token, d->dev.from, s->n_wanted, d->weight, d->result,
	    d->stream);
}

/* ---- what the engine asks for, laid out ---- */

int
step_grow(struct kd_device *d, bool card, void **mem, size_t *cap, size_t want, size_t size, char *why, size_t why_len)
{
	size_t n = *cap == 0 ? 4096 : *cap;
	int rc;

	if (want <= *cap)
		return 0;
	while (n < want)
		n *= 2;
	if (card) {
		step_free_graphs(d); /* they know the old address */
		cudaFree(*mem);
	} else
		cudaFreeHost(*mem);
	*mem = NULL, *cap = 0;
	if ((rc = cu_failed(card ? cudaMalloc(mem, n * size) : cudaMallocHost(mem, n * size), "memory for a step", why, why_len)) != 0)
		return rc;
	*cap = n;
	return 0;
}

static uint32_t
blocks_of(const struct kd_row *r)
{
	return r->pos / K_BLOCK + 1;
}

/* Tiles hold neighbouring positions of one sequence. */
static uint32_t
stage_tiles(struct kd_device *d, const struct kd_row *row, uint32_t n, uint32_t padded)
{
	uint32_t most = cu_attention_tile_rows(d->m.n_heads, d->m.n_kv_heads, d->m.head_dim), tiles = 0;

	for (uint32_t i = 0, end; i < n; i = end) {
		for (end = i + 1; end < n && end - i < most && row[end].table_id == row[i].table_id && row[end].pos == row[end - 1].pos + 1;)
			end++;
		d->host->tile[tiles++] = (struct cu_tile){i, end - i};
	}
	for (uint32_t i = n; i < padded; i++)
		d->host->tile[tiles++] = (struct cu_tile){i, 1};
	return tiles;
}

/* Penalties of a drawn row's own token are for the card to add. */
static bool
counts_drawn(const struct kd_row *row, const struct kd_want *want)
{
	return row->drawn && want->kind == KD_DRAW && (want->repetition != 1 || want->presence != 0 || want->frequency != 0);
}

static int
stage_wants(struct kd_device *d, const struct kd_row *row, uint32_t n, const struct kd_want *want, uint32_t *n_wanted,
    size_t *n_edits, char *why, size_t why_len)
{
	uint32_t w = 0;
	size_t edits = 0, most;
	int rc;

	for (uint32_t i = 0; i < n; i++)
		if (row[i].wants)
			edits += want != NULL ? want[w].n_edit : 0, d->host->from[w++] = i;
	most = edits + w;
	if ((rc = step_grow(d, false, (void **)&d->host->edit, &d->host->cap_edit, most, sizeof(struct kd_edit), why, why_len)) != 0 ||
	    (rc = step_grow(d, true, (void **)&d->dev.edit, &d->dev.cap_edit, most > 0 ? most : 1, sizeof(struct kd_edit), why, why_len)) != 0)
		return rc;
	edits = 0;
	for (uint32_t i = 0; i < w; i++) {
		const struct kd_want *from = want != NULL ? &want[i] : NULL;
		bool drawn;

		d->host->want[i] = (struct cu_want){.kind = KD_LOGITS};
		if (from == NULL || from->kind == KD_LOGITS)
			continue;
		drawn = counts_drawn(&row[d->host->from[i]], from);
		d->host->want[i] = (struct cu_want){.kind = from->kind, .position = from->position, .token = from->token,
		    .top_k = from->top_k, .n_top = from->n_top, .n_edit = from->n_edit + drawn, .first_edit = (uint32_t)edits,
		    .drawn = drawn, .logprob = from->logprob, .seed = from->seed, .temperature = from->temperature, .top_p = from->top_p,
		    .min_p = from->min_p, .repetition = from->repetition, .presence = from->presence, .frequency = from->frequency};
		if (from->n_edit > 0)
			memcpy(d->host->edit + edits, from->edit, from->n_edit * sizeof(*from->edit));
		edits += from->n_edit;
		if (drawn)
			d->host->edit[edits++] = (struct kd_edit){.id = CU_NONE};
	}
	*n_wanted = w;
	*n_edits = edits;
	return 0;
}

/* Rows of equal plans; false: too many kinds for one pass. */
static bool
find_ranges(struct kd_device *d, const struct kd_row *row, uint32_t n)
{
	d->n_ranges = 0;
	for (uint32_t i = 0; i < n; i++) {
		if (i > 0 && row[i].digest == row[i - 1].digest) {
			d->range[d->n_ranges - 1].n++;
			continue;
		}
		if (d->n_ranges == MAX_RANGES)
			return false;
		d->range[d->n_ranges++] = (struct range){row[i].plan, i, 1};
	}
	return true;
}

/* ---- shapes and graphs ---- */

static uint32_t
bucket_of(uint32_t rows)
{
	return rows <= 2 ? rows : rows <= 4 ? 4 : rows <= 8 ? 8 : rows <= 64 ? (rows + 15) / 16 * 16 : (rows + 31) / 32 * 32;
}

/* One row each, all to be sampled: nearly every step of a busy server. */
static bool
is_decode(const struct kd_row *row, uint32_t n, const struct kd_want *want)
{
	if (want == NULL)
		return false;
	for (uint32_t i = 0; i < n; i++)
		if (!row[i].wants || want[i].kind == KD_LOGITS || (i > 0 && row[i].table_id == row[i - 1].table_id))
			return false;
	return true;
}

/* Enough blocks to fill the card twice, of four KV blocks at least: a power of two, so that few graphs are needed. */
static uint32_t
splits_for(const struct kd_device *d, uint32_t tiles, uint32_t rows, uint32_t context_blocks)
{
	uint32_t s = 1;

	while (s < 64 && (uint64_t)tiles * d->m.n_kv_heads * s < 2ull * d->sm_count && s * 8 <= context_blocks &&
	    (uint64_t)rows * s * 2 <= d->max_part)
		s *= 2;
	return s;
}

/* Which rows are of which plan: one plan's digest is as good as itself. */
static uint64_t
mixed(const struct kd_device *d, const struct kd_row *row)
{
	uint64_t h = row[0].digest;

	for (uint32_t i = 1; i < d->n_ranges; i++) {
		h = (h ^ d->range[i - 1].n) * 0x9E3779B97F4A7C15u;
		h = (h ^ h >> 29 ^ row[d->range[i].row].digest) * 0xBF58476D1CE4E5B9u;
	}
	return h;
}

static struct graph *
find_graph(struct kd_device *d, uint64_t plans, const struct shape *s)
{
	struct graph *oldest = &d->graph[0];

	for (uint32_t i = 0; i < d->n_graphs; i++) {
		struct graph *g = &d->graph[i];

		if (g->plans == plans && g->rows == s->rows && g->splits == s->splits)
			return g;
		oldest = g->used < oldest->used ? g : oldest;
	}
	if (d->n_graphs < MAX_GRAPHS)
		oldest = &d->graph[d->n_graphs++];
	else if (oldest->exec != NULL)
		cudaGraphExecDestroy(oldest->exec); /* where it runs, it goes when it has run */
	*oldest = (struct graph){.plans = plans, .rows = s->rows, .splits = s->splits};
	return oldest;
}

void
step_free_graphs(struct kd_device *d)
{
	cudaStreamSynchronize(d->stream);
	for (uint32_t i = 0; i < d->n_graphs; i++)
		if (d->graph[i].exec != NULL)
			cudaGraphExecDestroy(d->graph[i].exec);
	d->n_graphs = 0;
}

/* A capture that fails leaves this step and those like it to run eagerly. Its error would otherwise be the step's. */
static void
capture(struct kd_device *d, struct graph *g, const struct shape *s)
{
	cudaGraph_t graph = NULL;

	g->tried = true;
	if (cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess) {
		run_layers(d, s);
		if (cudaStreamEndCapture(d->stream, &graph) == cudaSuccess && cudaGraphInstantiate(&g->exec, graph, 0) == cudaSuccess)
			__atomic_add_fetch(&d->captured, 1, __ATOMIC_RELAXED);
		else
			g->exec = NULL;
	}
	if (graph != NULL)
		cudaGraphDestroy(graph);
	if (g->exec == NULL)
		cudaGetLastError();
}

static void
launch(struct kd_device *d, uint64_t plans, const struct shape *s)
{
	struct graph *g = s->decode && !measures(s) ? find_graph(d, plans, s) : NULL;

	if (g != NULL && !g->tried && g->seen++ >= (d->n_ranges == 1 ? 1u : MIXED_SEEN))
		capture(d, g, s);
	if (g != NULL)
		g->used = ++d->clock;
	if (g != NULL && g->exec != NULL) {
		cudaGraphLaunch(g->exec, d->stream);
		__atomic_add_fetch(&d->graph_launches, 1, __ATOMIC_RELAXED);
		return;
	}
	run_layers(d, s);
	__atomic_add_fetch(&d->eager_steps, 1, __ATOMIC_RELAXED);
}

/* ---- a step ---- */

static int
give_up(struct kd_device *d, const char *why)
{
	snprintf(d->failure, sizeof(d->failure), "%.127s", why);
	__atomic_store_n(&d->failed, 1, __ATOMIC_RELEASE);
	return -EIO;
}

static void
copy_in(struct kd_device *d, size_t edits)
{
	cudaMemcpyAsync(d->dev.token, d->host->token, d->host->bytes, cudaMemcpyHostToDevice, d->stream);
	tables_send(d);
	if (edits > 0)
		cudaMemcpyAsync(d->dev.edit, d->host->edit, edits * sizeof(*d->host->edit), cudaMemcpyHostToDevice, d->stream);
}

static uint32_t
token_of(const struct kd_device *d, const struct kd_row *row, const struct kd_result *known)
{
	if (!row->drawn)
		return row->token;
	if (known == NULL)
		return row->token | CU_DRAWN;
	return known[row->token].token < d->m.vocab ? known[row->token].token : 0;
}

/* known: what the step before drew, if the host has to say. */
static int
lay_out(struct kd_device *d, const struct kd_row *row, uint32_t n, const struct kd_want *want, const struct kd_result *known,
    struct shape *s, uint32_t *n_wanted, char *why, size_t why_len)
{
	uint32_t context = 0;
	int rc;

	*s = (struct shape){.rows = n, .seen_row = CU_NONE, .seen_wanted = CU_NONE};
	if ((rc = tables_stage(d, row, n, why, why_len)) != 0 ||
	    (rc = stage_wants(d, row, n, want, n_wanted, &s->edits, why, why_len)) != 0)
		return rc;
	s->decode = !d->trace && is_decode(row, n, want);
	if (s->decode && bucket_of(n) <= ((d->m.max_rows + 15) & ~15u))
		s->rows = bucket_of(n);
	for (uint32_t i = 0; i < n; i++) {
		d->host->token[i] = token_of(d, &row[i], known), d->host->pos[i] = row[i].pos;
		context = blocks_of(&row[i]) > context ? blocks_of(&row[i]) : context;
	}
	s->n_wanted = s->decode ? s->rows : *n_wanted;
	for (uint32_t i = n; i < s->rows; i++) {
		d->host->token[i] = d->host->pos[i] = 0, d->host->first[i] = CU_NONE;
		d->host->want[i].kind = CU_NONE, d->host->from[i] = i;
		d->range[d->n_ranges - 1].n++;
	}
	s->n_tiles = stage_tiles(d, row, n, s->rows);
	s->prefill = s->n_tiles * d->m.n_kv_heads >= 4 * d->sm_count && s->n_tiles < n;
	s->splits = s->prefill ? 1 : splits_for(d, s->n_tiles, s->rows, context);
	return 0;
}

/* Of rows [done, done + n), which are a pass. */
static void
take_sample(const struct flight *f, uint32_t done, uint32_t n, uint32_t n_wanted, struct shape *s)
{
	if (f->seen == NULL)
		return;
	if (f->seen_row >= done && f->seen_row < done + n)
		s->seen_row = f->seen_row - done;
	if (f->n_wanted == 0 && n_wanted > 0)
		s->seen_wanted = 0;
}

/* To pinned memory, since a copy to any other may hold submit() up until the step has run. */
static int
grow_logits(struct kd_device *d, struct flight *f, const struct kd_row *row, uint32_t n, const struct kd_want *want, char *why,
    size_t why_len)
{
	uint32_t wanted = 0, logits = 0;

	for (uint32_t i = 0; i < n; i++)
		if (row[i].wants)
			logits += want == NULL || want[wanted].kind == KD_LOGITS, wanted++;
	return step_grow(d, false, (void **)&f->pinned_logits, &f->cap_logits, (size_t)logits * d->m.vocab, sizeof(*f->pinned_logits), why,
	    why_len);
}

/* What n_wanted rows of a pass came to; before it f->n_wanted were of others. */
static void
copy_out(struct kd_device *d, struct flight *f, uint32_t n_wanted)
{
	size_t vocab = d->m.vocab;

	if (n_wanted > 0)
		cudaMemcpyAsync(f->pinned + f->n_wanted, d->result, n_wanted * sizeof(*f->pinned), cudaMemcpyDeviceToHost, d->stream);
	for (uint32_t i = 0; i < n_wanted; i++) {
		if (d->host->want[i].kind != KD_LOGITS)
			continue;
		cudaMemcpyAsync(f->pinned_logits + f->n_copied * vocab, d->logits + i * vocab, vocab * sizeof(float), cudaMemcpyDeviceToHost,
		    d->stream);
		f->copied[f->n_copied++] = f->n_wanted + i;
	}
}

/* All passes of a step but the last are waited for: what they were laid out in is used again. */
static int
start_passes(struct kd_device *d, struct flight *f, const struct kd_row *row, uint32_t n, const struct kd_want *want,
    const struct kd_result *known, char *why, size_t why_len)
{
	uint32_t done = 0, got;
	struct shape s;
	int rc;

	if ((rc = grow_logits(d, f, row, n, want, why, why_len)) != 0)
		return rc;
	while (done < n) {
		uint32_t some = n - done;

		while (!find_ranges(d, row + done, some))
			some = (some + 1) / 2;
		if (done > 0 && (rc = cu_failed(cudaStreamSynchronize(d->stream), "a step", why, why_len)) != 0)
			return rc;
		if ((rc = lay_out(d, row + done, some, want != NULL ? want + f->n_wanted : NULL, known, &s, &got, why, why_len)) != 0)
			return rc;
		take_sample(f, done, some, got, &s);
		if (done == 0)
			cudaEventRecord(f->begin, d->stream);
		if (done == 0 && f->seen != NULL)
			cudaMemsetAsync(d->seen, 0, seen_bytes(&d->m), d->stream);
		copy_in(d, s.edits);
		launch(d, mixed(d, row + done), &s);
		copy_out(d, f, got);
		done += some;
		f->n_wanted += got;
	}
	if (f->seen != NULL)
		cudaMemcpyAsync(f->pinned_seen, d->seen, seen_bytes(&d->m), cudaMemcpyDeviceToHost, d->stream);
	return 0;
}

int
step_submit(struct kd_device *d, const struct kd_row *row, uint32_t n, const struct kd_want *want, float *logits,
    struct kd_result *result, const struct kd_sample *sample, char *why, size_t why_len)
{
	struct flight *f = &d->flight[d->n_submitted % KD_AHEAD], *before = &d->flight[(d->n_submitted + KD_AHEAD - 1) % KD_AHEAD];
	const struct kd_result *known = NULL;
	double start = now_us();

	if (__atomic_load_n(&d->failed, __ATOMIC_ACQUIRE))
		return snprintf(why, why_len, "%s", d->failure), -EIO;
	if (d->n_submitted - d->n_waited == KD_AHEAD)
		return snprintf(why, why_len, "%u steps are under way", KD_AHEAD), give_up(d, why);
	cudaSetDevice(d->index);
	f->n_wanted = f->n_copied = 0, f->result = result, f->logits = logits;
	f->seen = sample != NULL ? sample->site : NULL, f->seen_row = sample != NULL ? sample->row : CU_NONE;
	d->host = &f->host;
	f->passes = !find_ranges(d, row, n); /* very many plans in one batch */
	if (f->passes || before->passes) {
		if (cu_failed(cudaStreamSynchronize(d->stream), "a step", why, why_len) != 0)
			return give_up(d, why);
		known = before->pinned;
	}
	if (start_passes(d, f, row, n, want, known, why, why_len) != 0)
		return give_up(d, why);
	cudaEventRecord(f->end, d->stream);
	f->host_us = now_us() - start;
	d->n_submitted++;
	return 0;
}

/* By sites: those of a bundle have the same inputs. */
static void
tell_seen(const struct kd_device *d, const struct flight *f)
{
	const uint32_t layers = d->m.n_layers;

	memset(f->seen, 0, (size_t)KD_GROUPS * layers * sizeof(*f->seen));
	for (uint32_t l = 0; l < layers; l++) {
		const struct kd_evidence *from = f->pinned_seen + (size_t)l * N_SEEN;

		for (uint32_t i = 0; i < N_BUNDLES; i++)
			for (uint32_t p = 0; p < d->layer[l].b[i].parts; p++)
				f->seen[d->layer[l].b[i].group[p] * layers + l] = from[i];
		f->seen[KD_KV_CACHE * layers + l] = from[SEEN_KV];
	}
	f->seen[KD_LM_HEAD * layers] = f->pinned_seen[(size_t)layers * N_SEEN];
}

/* The one synchronisation of a step. */
int
step_wait(struct kd_device *d, char *why, size_t why_len)
{
	struct flight *f = &d->flight[d->n_waited % KD_AHEAD];
	float ms = 0;

	if (__atomic_load_n(&d->failed, __ATOMIC_ACQUIRE))
		return snprintf(why, why_len, "%s", d->failure), -EIO;
	if (d->n_waited == d->n_submitted)
		return 0;
	d->n_waited++;
	if (cu_failed(cudaEventSynchronize(f->end), "a step", why, why_len) != 0 ||
	    cu_failed(cudaGetLastError(), "a step", why, why_len) != 0)
		return give_up(d, why);
	if (f->result != NULL)
		memcpy(f->result, f->pinned, f->n_wanted * sizeof(*f->pinned));
	for (uint32_t i = 0; i < f->n_copied; i++)
		memcpy(f->logits + (size_t)f->copied[i] * d->m.vocab, f->pinned_logits + (size_t)i * d->m.vocab, d->m.vocab * sizeof(*f->logits));
	if (f->seen != NULL)
		tell_seen(d, f);
	cudaEventElapsedTime(&ms, f->begin, f->end);
	__atomic_add_fetch(&d->busy_us, (uint64_t)(ms * 1e3f), __ATOMIC_RELAXED);
	__atomic_store_n(&d->device_us, (uint32_t)(ms * 1e3f), __ATOMIC_RELAXED);
	__atomic_store_n(&d->host_us, (uint32_t)f->host_us, __ATOMIC_RELAXED);
	return 0;
}

int
step_find_nonfinite(struct kd_device *d, const struct kd_row *row, uint32_t *group, uint32_t *layer)
{
	static const uint32_t names[] = {G_Q, G_K, G_V, KD_KV_CACHE, G_O, G_GATE, G_UP, G_DOWN};
	uint32_t bad = CU_NONE, got;
	struct shape s;
	char why[128];

	if (__atomic_load_n(&d->failed, __ATOMIC_ACQUIRE))
		return 0;
	cudaSetDevice(d->index);
	cudaStreamSynchronize(d->stream); /* a step that is under way has its results; what it was laid out in is free */
	d->host = &d->flight[d->n_submitted % KD_AHEAD].host;
	find_ranges(d, row, 1);
	d->trace = true;
	cudaMemsetAsync(d->first_bad, 0xff, sizeof(bad), d->stream);
	if (lay_out(d, row, 1, NULL, NULL, &s, &got, why, sizeof(why)) != 0) {
		give_up(d, why);
	} else {
		copy_in(d, s.edits);
		launch(d, row->digest, &s);
		if (cu_failed(cudaStreamSynchronize(d->stream), "a step", why, sizeof(why)) != 0)
			give_up(d, why);
		else
			cudaMemcpy(&bad, d->first_bad, sizeof(bad), cudaMemcpyDeviceToHost);
	}
	d->trace = false;
	if (bad == CU_NONE)
		return 0;
	*group = KD_LM_HEAD, *layer = 0;
	if (bad % 16 < 8)
		*group = names[bad % 16], *layer = bad / 16;
	return 1;
}

/* ---- plans of cuBLASLt for the shapes of this model ---- */

static float
time_own(struct kd_device *d, const struct call *c, const struct cu_linear *a)
{
	enum { RUNS = 10 };
	float ms = 0;

	run_skinny(d, c, a);
	cudaEventRecord(d->flight[0].begin, d->stream);
	for (int i = 0; i < RUNS; i++)
		run_skinny(d, c, a);
	cudaEventRecord(d->flight[0].end, d->stream);
	if (cudaEventSynchronize(d->flight[0].end) != cudaSuccess ||
	    cudaEventElapsedTime(&ms, d->flight[0].begin, d->flight[0].end) != cudaSuccess)
		return 0;
	return ms * 1e3f / RUNS;
}

/* A product of so many rows: tuned, and what takes it noted. fp8b's, for comparing only, is not worth the time. */
static void
tune(struct kd_device *d, int bundle, enum k_format f, uint32_t rows)
{
	const struct bundle *w = bundle == N_BUNDLES ? &d->head : &d->layer[0].b[bundle];
	bool add = bundle == B_O || bundle == B_DOWN;
	float *y = bundle == B_QKV ? d->qkv : bundle == B_GU ? d->gu : bundle == N_BUNDLES ? d->logits : d->x;
	struct call c = {w, 0, w->parts, 0, rows, f, y, add ? d->m.hidden : w->n_all, add, true};
	struct cu_linear a = linear_of(d, &c);
	bool ok;

	for (uint32_t p = 1; p < w->parts; p++)
		if (!go_together(w, p, f))
			c.part1 = 1;
	a = linear_of(d, &c);
	if (f == K_FP8B)
		make_squares(d, &c, &a);
	ok = run_lt(d, &c, &a, rows, f == K_FP8B ? lt_run : lt_tune) == 0;
	d->took[bundle][f] = ok ? (uint8_t)(1 + lt_ran(d->lt)) : TOOK_NONE;
	if (ok && f != K_FP8B && rows <= CU_SKINNY && lt_timed(d->lt))
		lt_against(d->lt, time_own(d, &c, &a));
}

void
step_tune(struct kd_device *d)
{
	static const uint32_t rows[] = {16, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512, 1024, 2048};

	/* On numbers, since a card is faster on zeros: E4M3 1.5, BF16 and FP32 0.0115. */
	cudaMemsetAsync(d->xb, 0x3c, (size_t)d->m.max_rows * d->ldx * sizeof(*d->xb), d->stream);
	cudaMemsetAsync(d->xq, 0x3c, (size_t)d->m.max_rows * d->ldx, d->stream);
	cudaMemsetAsync(d->xs, 0x3c, d->m.max_rows * sizeof(*d->xs), d->stream);
	for (size_t i = 0; i < sizeof(rows) / sizeof(*rows) && rows[i] <= d->m.max_rows; i++)
		for (int b = 0; b <= N_BUNDLES; b++) {
			if (b == N_BUNDLES && rows[i] > 256)
				continue; /* so many rows seldom want logits */
			tune(d, b, K_BF16, rows[i]);
			tune(d, b, K_FP8, rows[i]);
			if (rows[i] == 96 || rows[i] == 16)
				tune(d, b, K_FP8B, rows[i]);
		}
	cudaMemsetAsync(d->x, 0, (size_t)d->m.max_rows * d->m.hidden * sizeof(*d->x), d->stream); /* products were added up */
	cudaStreamSynchronize(d->stream);
	cudaGetLastError();
	lt_save(d->lt);
}
