/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AMX BF16: linear layers in tiles, one row too (the tiles take less of the core
 * than FMA do, so that unpacking keeps up with memory), and attention of many
 * query vectors. A block of 32 inputs is one TDPBF16PS, which sums as ref does;
 * rows of x are A tiles as they lie, unpacked blocks, K and V of a page are B
 * tiles. Everything else is avx512.c's.
 *
 * With AMX_EMULATED the tiles are plain C, by the instruction's documentation:
 * checkkernels holds the blocking against ref where there is no AMX.
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/internal.h"

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

/* Scores of up to two tiles of vectors against a page. */
AMX static void
score_two(const uint16_t *q, uint32_t ld, bool two, const uint16_t *k, float (*score)[32])
{
	zero_four();
	for (uint32_t d = 0; d < ld; d += K_BLOCK) {
		tile_load(6, k + d * K_BLOCK, 4 * K_BLOCK);
		tile_load(7, k + d * K_BLOCK + 32, 4 * K_BLOCK);
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
weigh_two(const uint16_t (*p)[32], uint32_t ld, bool two, const uint16_t *v, float *out)
{
	tile_load(4, p[0], sizeof(p[0]));
	if (two)
		tile_load(5, p[16], sizeof(p[0]));
	for (uint32_t d = 0; d < ld; d += 32) {
		tile_load(6, v + d * 2, ld * 4);
		tile_load(7, v + d * 2 + 32, ld * 4);
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

/* What the tiles hold beyond the last vector is computed too, and not read. */
AMX static void
score_page(const void *q, uint32_t n, uint32_t ld, const uint16_t *k, const uint16_t *next, float (*score)[32])
{
	(void)next; /* prefetches made it slower */
	for (uint32_t from = 0; from < n; from += 32)
		score_two((const uint16_t *)q + (size_t)from * ld, ld, n - from > 16, k, score + from);
	__asm__ volatile("" ::: "memory");
}

AMX static void
weigh_page(const uint16_t (*p)[32], uint32_t n, uint32_t ld, const uint16_t *v, const uint16_t *next, float *out)
{
	(void)next;
	__asm__ volatile("" ::: "memory");
	for (uint32_t from = 0; from < n; from += 32)
		weigh_two(p + from, ld, n - from > 16, v, out + (size_t)from * ld);
	__asm__ volatile("" ::: "memory");
}

AMX static void
attention_amx(const struct k_attention *a)
{
	static const struct k_products tiles_do = {NULL, score_page, weigh_page};

	if (!avx512_are_many(a)) {
		attention_avx512(a);
		return;
	}
	configure(TEAM);
	avx512_attend(a, &tiles_do);
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
