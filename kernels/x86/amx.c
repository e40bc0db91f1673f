/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AMX BF16: linear layers of FEWEST rows and more in tiles. A block of 32 inputs
 * is one TDPBF16PS, which sums as ref does; rows of x are A tiles as they lie,
 * unpacked blocks are B tiles. Everything else is avx512.c's.
 *
 * With AMX_EMULATED the tiles are plain C, by the instruction's documentation:
 * checkkernels holds the blocking against ref where there is no AMX.
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/internal.h"

#define FEWEST 8u        /* rows; fewer are quicker without tiles */
#define TEAM 32u         /* rows that run together: two tiles, times two of a panel */
#define ROWS 256u        /* rows that share one unpacking */
#define GROUP 4u         /* panels that share a visit to the inputs */
#define CHUNK 32u        /* blocks of it: 1024 inputs, so that ROWS of them stay in L2 */

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

typedef float totals[K_PANEL];
typedef uint16_t block[1024]; /* two B tiles */

/* Up to 16 rows against blocks of one panel. */
AMX static void
half_team(const uint16_t *x, size_t ldx, const block *w, uint32_t n_blocks, totals *total)
{
	tile_load(0, &total[0][0], sizeof(totals));
	tile_load(1, &total[0][16], sizeof(totals));
	for (uint32_t i = 0; i < n_blocks; i++) {
		tile_load(4, x + i * K_BLOCK, ldx * 2);
		tile_load(6, w[i], 64);
		tile_load(7, w[i] + 512, 64);
		tile_multiply(0, 4, 6);
		tile_multiply(1, 4, 7);
	}
	tile_store(0, &total[0][0], sizeof(totals));
	tile_store(1, &total[0][16], sizeof(totals));
}

/* 17 to 32. */
AMX static void
full_team(const uint16_t *x, size_t ldx, const block *w, uint32_t n_blocks, totals *total)
{
	const uint16_t *x1 = x + 16 * ldx;

	tile_load(0, &total[0][0], sizeof(totals));
	tile_load(1, &total[0][16], sizeof(totals));
	tile_load(2, &total[16][0], sizeof(totals));
	tile_load(3, &total[16][16], sizeof(totals));
	for (uint32_t i = 0; i < n_blocks; i++) {
		tile_load(4, x + i * K_BLOCK, ldx * 2);
		tile_load(6, w[i], 64);
		tile_load(7, w[i] + 512, 64);
		tile_multiply(0, 4, 6);
		tile_load(5, x1 + i * K_BLOCK, ldx * 2);
		tile_multiply(1, 4, 7);
		tile_multiply(2, 5, 6);
		tile_multiply(3, 5, 7);
	}
	tile_store(0, &total[0][0], sizeof(totals));
	tile_store(1, &total[0][16], sizeof(totals));
	tile_store(2, &total[16][0], sizeof(totals));
	tile_store(3, &total[16][16], sizeof(totals));
}

/* All rows against blocks of one panel. Leaves the tiles as configure(TEAM) does. */
AMX static void
panel_rows(const uint16_t *x, size_t ldx, uint32_t rows, const block *w, uint32_t n_blocks, totals *total)
{
	uint32_t r = 0, left = rows % TEAM;

	__asm__ volatile("" ::: "memory");
	for (; r + TEAM <= rows; r += TEAM)
		full_team(x + r * ldx, ldx, w, n_blocks, total + r);
	if (left == 0)
		return;
	configure(left);
	if (left <= 16)
		half_team(x + r * ldx, ldx, w, n_blocks, total + r);
	else
		full_team(x + r * ldx, ldx, w, n_blocks, total + r);
	configure(TEAM);
}

/* Panels [p0, p1), at most GROUP, for up to ROWS rows. */
static void
tile_panels(const struct k_linear *a, uint32_t p0, uint32_t p1, uint32_t row, uint32_t rows)
{
	const struct k_weight *w = a->w;
	const uint16_t *x = a->x + row * a->ldx;
	uint32_t kb_n = w->k_pad / K_BLOCK;
	_Alignas(64) block word[CHUNK];
	_Alignas(64) totals total[GROUP][ROWS];

	for (uint32_t p = p0; p < p1; p++)
		memset(total[p - p0], 0, rows * sizeof(totals));
	for (uint32_t kb = 0; kb < kb_n; kb += CHUNK) {
		uint32_t n = kb_n - kb < CHUNK ? kb_n - kb : CHUNK;

		for (uint32_t p = p0; p < p1; p++) {
			for (uint32_t i = 0; i < n; i++)
				avx512_unpack_block(w, p, p * kb_n + kb + i, a->format, word[i]);
			panel_rows(x + kb * K_BLOCK, a->ldx, rows, (const block *)word, n, total[p - p0]);
		}
	}
	for (uint32_t p = p0; p < p1; p++)
		avx512_write_panel(a, p, row, rows, (const totals *)total[p - p0]);
}

AMX static void
linear_amx(const struct k_linear *a)
{
	uint32_t passes = (a->rows + ROWS - 1) / ROWS, each;

	if (a->rows < FEWEST) {
		linear_avx512(a);
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
	tile_release();
}

/* ---- self-check ---- */

/* Magnitudes from 2^-104 to 2^24, so that products underflow too, subnormals and signed zeros. */
static uint16_t
some_bf16(uint64_t *state)
{
	uint32_t r, exp;

	*state = *state * 6364136223846793005u + 1442695040888963407u;
	r = (uint32_t)(*state >> 33);
	exp = r % 16 == 0 ? 0 : r % 16 < 8 ? 120 + r / 16 % 14 : 23 + r / 16 % 129;
	return (uint16_t)((r >> 15 & 0x8000) | exp << 7 | (r % 32 == 0 ? 0 : r >> 20 & 0x7f));
}

/* Do tiles sum as ref does? The calling thread flushes subnormals. */
AMX bool
amx_agrees(void)
{
	_Alignas(64) uint16_t x[16][32], w[1024];
	_Alignas(64) totals got[16], want[16];
	uint64_t state = 1;

	memset(want, 0, sizeof(want));
	memset(got, 0, sizeof(got));
	configure(16);
	for (int round = 0; round < 64; round++) {
		for (uint32_t i = 0; i < 512; i++)
			x[i / 32][i % 32] = some_bf16(&state);
		for (uint32_t i = 0; i < 1024; i++)
			w[i] = some_bf16(&state);
		for (uint32_t i = 0; i < 512; i++) {
			uint32_t r = i / 32, c = i % 32;
			float sum[2] = {0, 0};

			for (uint32_t k = 0; k < 32; k++)
				sum[k % 2] = fmaf(k_bf16_to_float(w[c / 16 * 512 + k / 2 * 32 + c % 16 * 2 + k % 2]),
				    k_bf16_to_float(x[r][k]), sum[k % 2]);
			want[r][c] = want[r][c] + (sum[0] + sum[1]);
		}
		__asm__ volatile("" ::: "memory");
		half_team(x[0], 32, (const block *)&w, 1, got);
	}
	tile_release();
	return memcmp(got, want, sizeof(got)) == 0;
}

void
kernels_fill_amx(struct k_ops *ops)
{
	ops->linear = linear_amx;
}
