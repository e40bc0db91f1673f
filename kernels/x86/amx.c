/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AMX BF16: linear layers in tiles, one row too (the tiles take less of the core
 * than FMA do, so that unpacking keeps up with memory), and attention of FEWEST
 * query vectors and more. A block of 32 inputs is one TDPBF16PS, which sums as
 * ref does; rows of x are A tiles as they lie, unpacked blocks, K and V of a
 * page are B tiles. Everything else is avx512.c's.
 *
 * With AMX_EMULATED the tiles are plain C, by the instruction's documentation:
 * checkkernels holds the blocking against ref where there is no AMX.
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/internal.h"

#define FEWEST 16u       /* query vectors that attention takes through tiles; fewer are quicker without */
#define TEAM 32u         /* rows that run together: two tiles, times two of a panel */
#define ROWS 512u        /* rows that share one unpacking */
#define GROUP 8u         /* panels that share a visit to the inputs */
#define CHUNK 8u         /* blocks of it: what is unpacked stays in L1, 256 inputs of ROWS rows in L2 */
#define RING 4u          /* blocks unpacked for one team: one is ahead of the tiles, its stores are through then */

/* What LDTILECFG reads. */
struct tile_config {
	uint8_t palette, start_row, reserved[14];
	uint16_t row_bytes[16];
	uint8_t rows[16];
};

#ifdef AMX_EMULATED
#define AMX __attribute__((target("fma")))
#define kernels_fill_amx kernels_fill_amx_emulated
#define amx_agrees amx_agrees_emulated

static _Thread_local struct tile_config tiles;
static _Thread_local uint8_t tile[8][16][64];

static void
tile_config(const struct tile_config *c)
{
	tiles = *c;
	memset(tile, 0, sizeof(tile));
}

static void
tile_release(void)
{
	memset(&tiles, 0, sizeof(tiles));
}

static void
tile_load(int t, const void *from, size_t stride)
{
	memset(tile[t], 0, sizeof(tile[t]));
	for (size_t r = 0; r < tiles.rows[t]; r++)
		memcpy(tile[t][r], (const char *)from + r * stride, tiles.row_bytes[t]);
}

static void
tile_store(int t, void *to, size_t stride)
{
	for (size_t r = 0; r < tiles.rows[t]; r++)
		memcpy((char *)to + r * stride, tile[t][r], tiles.row_bytes[t]);
}

static void
tile_zero(int t)
{
	memset(tile[t], 0, sizeof(tile[t]));
}

/* Each FMA and each sum flushes subnormals, as the calling thread does. */
AMX static void
tile_multiply(int c, int a, int b)
{
	for (size_t m = 0; m < tiles.rows[c]; m++) {
		float sum[16][2] = {{0}}, total[16];
		uint16_t x[32], w[32];

		memcpy(x, tile[a][m], sizeof(x));
		for (size_t k = 0; k < tiles.row_bytes[a] / 4u; k++) {
			memcpy(w, tile[b][k], sizeof(w));
			for (size_t n = 0; n < 32; n++)
				sum[n / 2][n % 2] = __builtin_fmaf(k_bf16_to_float(x[2 * k + n % 2]), k_bf16_to_float(w[n]),
				    sum[n / 2][n % 2]);
		}
		memcpy(total, tile[c][m], sizeof(total));
		for (size_t n = 0; n < 16; n++)
			total[n] = total[n] + (sum[n][0] + sum[n][1]);
		memcpy(tile[c][m], total, sizeof(total));
	}
}
#else
#define AMX __attribute__((target("amx-tile,amx-bf16")))
#define tile_load _tile_loadd
#define tile_store _tile_stored
#define tile_multiply _tile_dpbf16ps
#define tile_zero _tile_zero
#define tile_release _tile_release

/* gcc's intrinsics say of no operand in memory that they read it (8 bytes of this
 * one): without the barriers, here and in team(), stores before them may be dropped. */
AMX static inline void
tile_config(const struct tile_config *c)
{
	__asm__ volatile("" ::"r"(c) : "memory");
	_tile_loadconfig(c);
}
#endif

/* Tiles 0..3 are sums, [2 of rows][2 of channels]; 4, 5 inputs; 6, 7 weights. */
AMX static void
configure(uint32_t rows)
{
	struct tile_config c = {.palette = 1};
	uint8_t n[2] = {(uint8_t)(rows < 16 ? rows : 16), (uint8_t)(rows < 16 ? 0 : rows - 16)};

	for (int t = 0; t < 8; t++) {
		c.rows[t] = t >= 6 ? 16 : n[t < 4 ? t / 2 : t - 4];
		c.row_bytes[t] = c.rows[t] == 0 ? 0 : 64;
	}
	tile_config(&c);
}

/* Sums of 16 vectors, and of 32: those that are configured. */
AMX static inline void
zero_two(void)
{
	tile_zero(0);
	tile_zero(1);
}

AMX static inline void
zero_four(void)
{
	zero_two();
	tile_zero(2);
	tile_zero(3);
}

typedef float totals[K_PANEL];
typedef uint16_t block[1024]; /* two B tiles */

/* ---- linear ---- */

/* Blocks as BF16, in a ring, some weights at a time: the tiles leave the core room for it. */
struct unpacking {
	const struct k_linear *a;
	uint32_t block, end;   /* the next, that after the last */
	uint32_t at, step;     /* weights of it that are done, that a step does */
	uint32_t done, mask;   /* blocks done; of the ring */
	block *word;           /* [mask + 1] */
};

static void
unpack_step(struct unpacking *u)
{
	if (u->block == u->end)
		return;
	avx512_unpack(u->a->w, u->block, u->a->format, u->at, u->at + u->step, u->word[u->done & u->mask]);
	u->at += u->step;
	if (u->at == 1024)
		u->at = 0, u->block++, u->done++;
}

static void
unpack_all(struct unpacking *u)
{
	while (u->block != u->end)
		unpack_step(u);
}

/* Rows [0, TEAM) against some blocks of one panel; the tiles are configured for their number. */
struct team {
	const uint16_t *x;     /* of the first row and block */
	size_t ldx;
	uint32_t n, first;     /* blocks; the first one's number in the ring */
	struct unpacking *ahead; /* runs beside */
	bool from_zero;
};

AMX static void
load_weights(const struct team *t, uint32_t i)
{
	const uint16_t *word = t->ahead->word[(t->first + i) & t->ahead->mask];

	__asm__ volatile("" ::: "memory");
	tile_load(6, word, 64);
	tile_load(7, word + 512, 64);
}

/* Up to 16 rows. */
AMX static void
half_team(const struct team *t, totals *total)
{
	if (t->from_zero) {
		zero_two();
	} else {
		tile_load(0, &total[0][0], sizeof(totals));
		tile_load(1, &total[0][16], sizeof(totals));
	}
	for (uint32_t i = 0; i < t->n; i++) {
		unpack_step(t->ahead);
		load_weights(t, i);
		tile_load(4, t->x + i * K_BLOCK, t->ldx * 2);
		tile_multiply(0, 4, 6);
		tile_multiply(1, 4, 7);
	}
	tile_store(0, &total[0][0], sizeof(totals));
	tile_store(1, &total[0][16], sizeof(totals));
}

/* 17 to 32. */
AMX static void
full_team(const struct team *t, totals *total)
{
	if (t->from_zero) {
		zero_four();
	} else {
		tile_load(0, &total[0][0], sizeof(totals));
		tile_load(1, &total[0][16], sizeof(totals));
		tile_load(2, &total[16][0], sizeof(totals));
		tile_load(3, &total[16][16], sizeof(totals));
	}
	for (uint32_t i = 0; i < t->n; i++) {
		const uint16_t *x = t->x + i * K_BLOCK;

		unpack_step(t->ahead);
		load_weights(t, i);
		tile_load(4, x, t->ldx * 2);
		tile_multiply(0, 4, 6);
		tile_load(5, x + 16 * t->ldx, t->ldx * 2);
		tile_multiply(1, 4, 7);
		tile_multiply(2, 5, 6);
		tile_multiply(3, 5, 7);
	}
	tile_store(0, &total[0][0], sizeof(totals));
	tile_store(1, &total[0][16], sizeof(totals));
	tile_store(2, &total[16][0], sizeof(totals));
	tile_store(3, &total[16][16], sizeof(totals));
}

AMX static void
run_team(const struct team *t, uint32_t rows, totals *total)
{
	__asm__ volatile("" ::: "memory");
	if (rows <= 16)
		half_team(t, total);
	else
		full_team(t, total);
}

static uint32_t
chunk_at(uint32_t kb_n, uint32_t kb)
{
	return kb_n - kb < CHUNK ? kb_n - kb : CHUNK;
}

/* The CHUNK of a panel from kb on, in so many steps; what is left is done after them. */
static void
unpack_next(struct unpacking *u, uint32_t panel, uint32_t kb, uint32_t steps)
{
	uint32_t kb_n = u->a->w->k_pad / K_BLOCK, each;

	u->block = panel * kb_n + kb;
	u->end = u->block + chunk_at(kb_n, kb);
	each = ((u->end - u->block) * 1024 + steps - 1) / steps;
	for (u->step = 64; u->step < each && u->step < 1024; u->step *= 2)
		;
}

/* Panels [p0, p1), at most GROUP, for up to ROWS rows. The tiles are configured for TEAM rows, before and after. */
AMX static void
tile_panels(const struct k_linear *a, uint32_t p0, uint32_t p1, uint32_t row, uint32_t rows)
{
	uint32_t kb_n = a->w->k_pad / K_BLOCK, last = rows / TEAM * TEAM, left = rows - last, teams = (rows + TEAM - 1) / TEAM;
	const uint16_t *x = a->x + row * a->ldx;
	_Alignas(64) block word[2 * CHUNK];
	_Alignas(64) totals total[GROUP][ROWS];
	struct unpacking ahead = {.a = a, .word = word, .mask = 2 * CHUNK - 1};

	unpack_next(&ahead, p0, 0, 1);
	for (uint32_t kb = 0; kb < kb_n; kb += CHUNK) {
		for (uint32_t p = p0; p < p1; p++) {
			struct team t = {x + kb * K_BLOCK, a->ldx, chunk_at(kb_n, kb), 0, &ahead, kb == 0};

			unpack_all(&ahead);
			t.first = ahead.done - t.n;
			if (p + 1 < p1)
				unpack_next(&ahead, p + 1, kb, teams * t.n);
			else if (kb + CHUNK < kb_n)
				unpack_next(&ahead, p0, kb + CHUNK, teams * t.n);
			for (uint32_t r = 0; r < last; r += TEAM, t.x += TEAM * a->ldx)
				run_team(&t, TEAM, total[p - p0] + r);
			if (left != 0) {
				configure(left);
				run_team(&t, left, total[p - p0] + last);
				configure(TEAM);
			}
		}
	}
	for (uint32_t p = p0; p < p1; p++)
		avx512_write_panel(a, p, row, rows, !a->add, (const totals *)total[p - p0]);
}

/* One team: its sums stay in tiles, and each weight is read once. */
AMX static void
tile_stream(const struct k_linear *a)
{
	uint32_t kb_n = a->w->k_pad / K_BLOCK;
	_Alignas(64) block word[RING];
	_Alignas(64) totals total[TEAM];
	struct unpacking ahead = {.a = a, .block = a->panel0 * kb_n, .end = a->panel1 * kb_n, .step = 1024, .word = word,
	    .mask = RING - 1};
	struct team t = {a->x, a->ldx, kb_n, 0, &ahead, true};

	configure(a->rows);
	unpack_step(&ahead);
	for (uint32_t p = a->panel0; p < a->panel1; p++, t.first += kb_n) {
		run_team(&t, a->rows, total);
		avx512_write_panel(a, p, 0, a->rows, false, (const totals *)total);
	}
}

AMX static void
linear_amx(const struct k_linear *a)
{
	uint32_t passes = (a->rows + ROWS - 1) / ROWS, each;

	if (a->rows == 0)
		return;
	if (a->rows <= TEAM) {
		tile_stream(a);
		tile_release();
		return;
	}
	each = (a->rows + passes - 1) / passes;
	each = (each + TEAM - 1) / TEAM * TEAM;
	configure(TEAM);
	for (uint32_t p0 = a->panel0; p0 < a->panel1; p0 += GROUP) {
		uint32_t p1 = a->panel1 - p0 < GROUP ? a->panel1 : p0 + GROUP;

		for (uint32_t row = 0; row < a->rows; row += each)
			tile_panels(a, p0, p1, row, a->rows - row < each ? a->rows - row : each);
	}
	_mm_sfence();
	tile_release();
}

/* ---- attention ---- */

/* One KV head of a block. */
struct head_page {
	const uint16_t *k, *v;
	const float *ks, *vs;   /* NULL: all positions are BF16 */
};

/* Scores of up to two tiles of vectors against a page. */
AMX static void
score_page(const uint16_t *q, uint32_t ld, bool two, const struct head_page *page, float (*score)[32])
{
	zero_four();
	for (uint32_t d = 0; d < ld; d += K_BLOCK) {
		tile_load(6, page->k + d * K_BLOCK, 4 * K_BLOCK);
		tile_load(7, page->k + d * K_BLOCK + 32, 4 * K_BLOCK);
		tile_load(4, q + d, ld * 2);
		tile_multiply(0, 4, 6);
		tile_multiply(1, 4, 7);
		if (two) {
			tile_load(5, q + 16 * ld + d, ld * 2);
			tile_multiply(2, 5, 6);
			tile_multiply(3, 5, 7);
		}
	}
	tile_store(0, &score[0][0], sizeof(score[0]));
	tile_store(1, &score[0][16], sizeof(score[0]));
	if (two) {
		tile_store(2, &score[16][0], sizeof(score[0]));
		tile_store(3, &score[16][16], sizeof(score[0]));
	}
}

/* Their sums over V. */
AMX static void
weigh_page(const uint16_t (*p)[32], uint32_t ld, bool two, const struct head_page *page, float *out)
{
	tile_load(4, p[0], sizeof(p[0]));
	if (two)
		tile_load(5, p[16], sizeof(p[0]));
	for (uint32_t d = 0; d < ld; d += 32) {
		tile_load(6, page->v + d * 2, ld * 4);
		tile_load(7, page->v + d * 2 + 32, ld * 4);
		zero_four();
		tile_multiply(0, 4, 6);
		tile_multiply(1, 4, 7);
		tile_store(0, out + d, ld * 4);
		tile_store(1, out + d + 16, ld * 4);
		if (two) {
			tile_multiply(2, 5, 6);
			tile_multiply(3, 5, 7);
			tile_store(2, out + 16 * ld + d, ld * 4);
			tile_store(3, out + 16 * ld + d + 16, ld * 4);
		}
	}
}

/* All vectors against a page, each stage for all of them, so that one waits for the one before only once. What the tiles
 * hold beyond the last vector is computed too, and not read. */
AMX static void
attend_page(struct k_vectors *s, const uint16_t *q, const struct head_page *page, float scale)
{
	uint32_t ld = s->hd_pad;
	_Alignas(64) float score[K_VECTORS][32], out[32 * 256];
	_Alignas(64) uint16_t p[K_VECTORS][32];

	for (uint32_t from = 0; from < s->n; from += 32)
		score_page(q + (size_t)from * ld, ld, s->n - from > 16, page, score + from);
	__asm__ volatile("" ::: "memory");
	avx512_softmax(s, 0, s->n, score, scale, page->ks, page->vs, p);
	__asm__ volatile("" ::: "memory");
	for (uint32_t from = 0; from < s->n; from += 32) {
		weigh_page((const uint16_t (*)[32])p + from, ld, s->n - from > 16, page, out);
		__asm__ volatile("" ::: "memory");
		avx512_merge(s, from, s->n - from < 32 ? s->n : from + 32, out);
	}
}

/* Which slots of a block count for each vector; is that all of them for all? */
static bool
set_valid(const struct k_attention *a, struct k_vectors *s, uint32_t block, uint32_t heads)
{
	uint32_t at = block * K_BLOCK, all = 0xffffffffu, last = a->pos + a->rows - 1;

	if (a->pos >= at + 31 && k_window_first(last, a->window) <= at) {
		memset(s->valid, 0xff, s->n * sizeof(*s->valid));
		return true;
	}
	for (uint32_t i = 0; i < s->n; i++) {
		uint32_t pos = a->pos + i / heads, first = k_window_first(pos, a->window);

		s->valid[i] = pos < at || first > at + 31 ? 0 : 0xffffffffu;
		if (pos >= at && pos - at < 31)
			s->valid[i] &= (2u << (pos - at)) - 1;
		if (first > at && first < at + K_BLOCK)
			s->valid[i] &= 0xffffffffu << (first - at);
		all &= s->valid[i];
	}
	return all == 0xffffffffu;
}

/* Rows of one call, with heads [h0, h1) of one KV head: K_VECTORS in all at most. False if a value that does not count
 * is not finite: with tiles it would. */
AMX static bool
attend_vectors(const struct k_attention *a, uint32_t h0, uint32_t h1)
{
	uint32_t heads = h1 - h0, last = a->pos + a->rows - 1, kvh = h0 / (a->n_heads / a->n_kv_heads);
	size_t at = (size_t)kvh * a->hd_pad * K_BLOCK;
	_Alignas(64) uint16_t q[K_VECTORS * 256], k[256 * K_BLOCK], v[256 * K_BLOCK], trimmed[256 * K_BLOCK];
	_Alignas(64) float ks[32], vs[32];
	struct k_vectors s;

	s.n = a->rows * heads, s.hd_pad = a->hd_pad;
	memset(s.l, 0, sizeof(s.l));
	memset(s.valid, 0, sizeof(s.valid));
	for (uint32_t i = 0; i < s.n; i++)
		avx512_round(a->q + i / heads * a->ld + (size_t)(h0 + i % heads) * a->head_dim, a->head_dim, a->hd_pad,
		    q + (size_t)i * a->hd_pad);
	for (uint32_t b = k_window_first(a->pos, a->window) / K_BLOCK; b <= last / K_BLOCK; b++) {
		const struct k_kv_block *kv = &a->block[b];
		struct head_page page = {k, v, ks, vs};

		if (kv->fp8 == 0)
			page = (struct head_page){kv->k + at, kv->v + at, NULL, NULL};
		else
			avx512_mix_page(a, kv, kvh, k, v, ks, vs);
		if (!set_valid(a, &s, b, heads)) {
			uint32_t left = last - b * K_BLOCK;

			if (!avx512_trim_page(page.v, a->hd_pad, left < 31 ? left : 31, trimmed))
				return false;
			page.v = trimmed;
		}
		attend_page(&s, q, &page, a->scale);
	}
	for (uint32_t i = 0; i < s.n; i++)
		avx512_divide(&s, i, a->head_dim, a->out + i / heads * a->ld + (size_t)(h0 + i % heads) * a->head_dim);
	return true;
}

AMX static void
attention_amx(const struct k_attention *a)
{
	uint32_t group = a->n_heads / a->n_kv_heads, to;

	if (a->rows * (group < a->head1 - a->head0 ? group : a->head1 - a->head0) < FEWEST) {
		attention_avx512(a);
		return;
	}
	configure(TEAM);
	for (uint32_t h = a->head0; h < a->head1; h = to) {
		uint32_t rows;

		to = k_heads_end(a, h, K_VECTORS);
		rows = K_VECTORS / (to - h);
		for (uint32_t r = 0; r < a->rows; r += rows) {
			struct k_attention some = k_attention_row(a, r);

			some.rows = a->rows - r < rows ? a->rows - r : rows;
			some.head0 = h, some.head1 = to;
			if (!attend_vectors(&some, h, to))
				attention_avx512(&some);
		}
	}
	tile_release();
}

/* ---- self-check ---- */

/* Do tiles sum as ref does? The calling thread flushes subnormals. */
AMX bool
amx_agrees(void)
{
	_Alignas(64) uint16_t x[16][32];
	_Alignas(64) block w;
	_Alignas(64) totals got[16], want[16];
	struct unpacking ahead = {.word = &w}; /* nothing */
	uint64_t state = 1;

	memset(want, 0, sizeof(want));
	memset(got, 0, sizeof(got));
	configure(16);
	for (int round = 0; round < 64; round++) {
		for (uint32_t i = 0; i < 512; i++)
			x[i / 32][i % 32] = k_some_bf16(&state);
		for (uint32_t i = 0; i < 1024; i++)
			w[i] = k_some_bf16(&state);
		for (uint32_t i = 0; i < 512; i++) {
			uint32_t r = i / 32, c = i % 32;
			float sum[2] = {0, 0};

			for (uint32_t k = 0; k < 32; k++)
				sum[k % 2] = fmaf(k_bf16_to_float(w[c / 16 * 512 + k / 2 * 32 + c % 16 * 2 + k % 2]),
				    k_bf16_to_float(x[r][k]), sum[k % 2]);
			want[r][c] = want[r][c] + (sum[0] + sum[1]);
		}
		__asm__ volatile("" ::: "memory");
		half_team(&(struct team){.x = x[0], .ldx = 32, .n = 1, .ahead = &ahead}, got);
	}
	tile_release();
	return memcmp(got, want, sizeof(got)) == 0;
}

/* ---- probes ---- */

AMX static double
probe_tiles(uint32_t rounds)
{
	configure(TEAM);
	zero_four();
	tile_zero(4);
	tile_zero(5);
	tile_zero(6);
	tile_zero(7);
	for (uint32_t i = 0; i < rounds; i++) {
		tile_multiply(0, 4, 6);
		tile_multiply(1, 4, 7);
		tile_multiply(2, 5, 6);
		tile_multiply(3, 5, 7);
	}
	tile_release();
	return 4.0 * 16 * 16 * 32 * 2 * rounds;
}

void
kernels_fill_amx(struct k_ops *ops)
{
	ops->probe_fma = probe_tiles;
	ops->linear = linear_amx;
	ops->attention = attention_amx;
}
