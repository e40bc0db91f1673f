/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers with 16 output channels across the lanes, included by avx512.c once for each way to take products: STEPS
 * (of a block of 32 inputs), TARGET, OF() for names, and these: multiply() adds the products of two operands of 32 bits a
 * lane; split() makes operands of the even and of the odd chain out of a pair of inputs of 16 channels, or of two;
 * expand() those of a row's inputs, [STEPS][2 chains].
 */
typedef float OF(operands)[2 * STEPS];

/* A tile of 16 pairs of inputs, ld words apart. */
TARGET static inline void
OF(spread)(const uint16_t *word, size_t ld, float out[32 * STEPS])
{
	for (uint32_t i = 0; i < STEPS; i++, word += 16 / STEPS * ld, out += 32) {
		__m512 even, odd;

		OF(split)(_mm512_loadu_si512(word), _mm512_loadu_si512(word + (16 / STEPS - 1) * ld), &even, &odd);
		_mm512_store_ps(out, even);
		_mm512_store_ps(out + 16, odd);
	}
}

/* The operands of a step of a tile. */
TARGET static inline __attribute__((always_inline)) void
OF(step_at)(const struct block *b, enum source from, uint32_t tile, uint32_t step, __m512 *even, __m512 *odd)
{
	const uint32_t each = 512 / STEPS, i = tile * 512 + step * each;

	if (from == OPERANDS) {
		*even = _mm512_load_ps(b->operand + (tile * STEPS + step) * 32);
		*odd = _mm512_load_ps(b->operand + (tile * STEPS + step) * 32 + 16);
	} else if (from == PAGE) {
		size_t at = tile * 32 + step * (16 / STEPS) * b->pair_ld;
		const uint16_t *word = b->word + at;

		for (uint32_t j = 0; j < 16 / STEPS; j++)
			_mm_prefetch((const char *)(b->next + at + j * b->pair_ld), _MM_HINT_T0);
		OF(split)(_mm512_loadu_si512(word), _mm512_loadu_si512(word + (16 / STEPS - 1) * b->pair_ld), even, odd);
	} else {
		__m512i pair = weights_at(b, from, i);

		OF(split)(pair, each == 32 ? pair : weights_at(b, from, i + 32), even, odd);
	}
}

/* One block against n rows (known where it is inlined), whose totals lie ld apart. */
TARGET static inline __attribute__((always_inline)) void
OF(rows_block)(const struct block *b, enum source from, const OF(operands) *x, float *total, size_t ld, const uint32_t n)
{
	__m512 even[FEW][2], odd[FEW][2];

	UNROLL
	for (uint32_t r = 0; r < n; r++)
		even[r][0] = even[r][1] = odd[r][0] = odd[r][1] = _mm512_setzero_ps();
#pragma GCC unroll 2
	for (uint32_t p = 0; p < STEPS; p++) {
		__m512 e0, o0, e1, o1;

		prefetch(b, from, p * (16 / STEPS), 16 / STEPS, from == PLANES ? AHEAD_PLANES : AHEAD);
		OF(step_at)(b, from, 0, p, &e0, &o0);
		OF(step_at)(b, from, 1, p, &e1, &o1);
		UNROLL
		for (uint32_t r = 0; r < n; r++) {
			__m512 xe = broadcast(&x[r][2 * p]), xo = broadcast(&x[r][2 * p + 1]);

			even[r][0] = OF(multiply)(e0, xe, even[r][0]);
			even[r][1] = OF(multiply)(e1, xe, even[r][1]);
			odd[r][0] = OF(multiply)(o0, xo, odd[r][0]);
			odd[r][1] = OF(multiply)(o1, xo, odd[r][1]);
		}
	}
	UNROLL
	for (uint32_t r = 0; r < n; r++)
		UNROLL
		for (uint32_t t = 0; t < 2; t++)
			_mm512_store_ps(total + r * ld + t * 16, _mm512_add_ps(_mm512_load_ps(total + r * ld + t * 16),
			    _mm512_add_ps(even[r][t], odd[r][t])));
}

/* Up to FEW rows: every weight is read once and used at once. */
TARGET static inline __attribute__((always_inline)) void
OF(few_panel)(const struct k_linear *a, uint32_t panel, const uint32_t n, enum source from)
{
	const struct k_weight *w = a->w;
	uint32_t kb_n = w->k_pad / K_BLOCK;
	_Alignas(64) uint16_t word[1024];
	_Alignas(64) OF(operands) x[CHUNK][FEW];
	_Alignas(64) totals total[FEW] = {{0}};

	for (uint32_t kb = 0; kb < kb_n; kb++) {
		struct block b = block_at(w, panel * kb_n + kb, word);
		const OF(operands) *in = (const OF(operands) *)x[kb % CHUNK];

		for (uint32_t i = kb; kb % CHUNK == 0 && i < kb_n && i < kb + CHUNK; i++)
			for (uint32_t r = 0; r < n; r++)
				OF(expand)(a->x + r * a->ldx + i * K_BLOCK, x[i - kb][r]);
		if (from == WORDS || (from == PLANES && w->flag[panel * kb_n + kb] & K_HAS_EXCEPTIONS)) {
			unpack_block(w, panel * kb_n + kb, a->format, word);
			OF(rows_block)(&b, WORDS, in, total[0], K_PANEL, n);
		} else {
			OF(rows_block)(&b, from, in, total[0], K_PANEL, n);
		}
	}
	write_panel(a, panel, 0, n, false, (const totals *)total);
}

#define FEW_ROWS(n) \
	TARGET static void OF(few_##n)(const struct k_linear *a, uint32_t panel) \
	{ \
		if (a->format == K_BF16) \
			OF(few_panel)(a, panel, n, PLANES); \
		else if (a->format == K_FP8T) \
			OF(few_panel)(a, panel, n, WORDS); \
		else \
			OF(few_panel)(a, panel, n, CODES); \
	}
FEW_ROWS(1)
FEW_ROWS(2)
FEW_ROWS(3)
FEW_ROWS(4)
FEW_ROWS(5)
FEW_ROWS(6)
#undef FEW_ROWS

/* Any rows, in even teams; of more than FEW none has fewer than three. */
TARGET static inline __attribute__((always_inline)) void
OF(all_rows)(const struct block *b, enum source from, const OF(operands) *x, float *total, size_t ld, uint32_t rows)
{
	uint32_t teams = (rows + FEW - 1) / FEW;

	for (uint32_t i = 0; i < teams; i++) {
		uint32_t r = rows * i / teams, n = rows * (i + 1) / teams - r;

		if (from == PAGE && n == 1)
			OF(rows_block)(b, from, x + r, total + r * ld, ld, 1);
		if (from == PAGE && n == 2)
			OF(rows_block)(b, from, x + r, total + r * ld, ld, 2);
		switch (n) {
		case 3: OF(rows_block)(b, from, x + r, total + r * ld, ld, 3); break;
		case 4: OF(rows_block)(b, from, x + r, total + r * ld, ld, 4); break;
		case 5: OF(rows_block)(b, from, x + r, total + r * ld, ld, 5); break;
		case 6: OF(rows_block)(b, from, x + r, total + r * ld, ld, 6); break;
		}
	}
}

/* Panels [p0, p1), at most GROUP, for up to ROWS rows, more than FEW. */
TARGET static void
OF(many_panels)(const struct k_linear *a, uint32_t p0, uint32_t p1, uint32_t row, uint32_t rows)
{
	const struct k_weight *w = a->w;
	uint32_t kb_n = w->k_pad / K_BLOCK;
	_Alignas(64) uint16_t word[1024];
	_Alignas(64) float spread[64 * STEPS];
	_Alignas(64) OF(operands) x[CHUNK][ROWS];
	_Alignas(64) totals total[GROUP][ROWS];
	const struct block b = {.operand = spread};

	for (uint32_t p = p0; p < p1; p++)
		memset(total[p - p0], 0, rows * sizeof(**total));
	for (uint32_t kb0 = 0; kb0 < kb_n; kb0 += CHUNK) {
		uint32_t kb1 = kb_n - kb0 < CHUNK ? kb_n : kb0 + CHUNK;

		for (uint32_t r = 0; r < rows; r++)
			for (uint32_t kb = kb0; kb < kb1; kb++)
				OF(expand)(a->x + (row + r) * a->ldx + kb * K_BLOCK, x[kb - kb0][r]);
		for (uint32_t p = p0; p < p1; p++)
			for (uint32_t kb = kb0; kb < kb1; kb++) {
				unpack_block(w, p * kb_n + kb, a->format, word);
				OF(spread)(word, 32, spread);
				OF(spread)(word + 512, 32, spread + 32 * STEPS);
				OF(all_rows)(&b, OPERANDS, (const OF(operands) *)x[kb - kb0], total[p - p0][0], K_PANEL, rows);
			}
	}
	for (uint32_t p = p0; p < p1; p++)
		write_panel(a, p, row, rows, false, (const totals *)total[p - p0]);
}

static void
OF(linear)(const struct k_linear *a)
{
	static void (*const few[FEW])(const struct k_linear *, uint32_t panel) = {OF(few_1), OF(few_2), OF(few_3), OF(few_4),
	    OF(few_5), OF(few_6)};
	uint32_t passes = (a->rows + ROWS - 1) / ROWS;

	if (a->rows == 0)
		return;
	for (uint32_t panel = a->panel0; a->rows <= FEW && panel < a->panel1; panel++)
		few[a->rows - 1](a, panel);
	for (uint32_t p0 = a->panel0; a->rows > FEW && p0 < a->panel1; p0 += GROUP) {
		uint32_t p1 = a->panel1 - p0 < GROUP ? a->panel1 : p0 + GROUP;

		for (uint32_t i = 0; i < passes; i++) {
			uint32_t row = (uint32_t)((uint64_t)a->rows * i / passes);

			OF(many_panels)(a, p0, p1, row, (uint32_t)((uint64_t)a->rows * (i + 1) / passes) - row);
		}
	}
}

/* ---- attention: as a linear layer of the positions of a page, and of its dimensions ---- */

/* Operands of q, [hd_pad / 32][n]. */
TARGET static void
OF(prepare)(const uint16_t *q, uint32_t n, uint32_t hd_pad, float *operands)
{
	OF(operands) *x = (OF(operands) *)(void *)operands;

	for (uint32_t i = 0; i < n; i++)
		for (uint32_t d = 0; d < hd_pad; d += K_BLOCK)
			OF(expand)(q + (size_t)i * hd_pad + d, x[d / K_BLOCK * n + i]);
}

/* 32 positions or dimensions of a page against n vectors: split on the way for fewer than a team, for more once. */
TARGET static void
OF(page_rows)(const struct block *b, const OF(operands) *x, float *total, size_t ld, uint32_t n)
{
	_Alignas(64) float spread[64 * STEPS];
	const struct block once = {.operand = spread};

	if (n <= FEW) {
		OF(all_rows)(b, PAGE, x, total, ld, n);
		return;
	}
	OF(spread)(b->word, b->pair_ld, spread);
	OF(spread)(b->word + 32, b->pair_ld, spread + 32 * STEPS);
	OF(all_rows)(&once, OPERANDS, x, total, ld, n);
}

TARGET static void
OF(score)(const void *q, uint32_t n, uint32_t hd_pad, const uint16_t *k, const uint16_t *next, float (*score)[32])
{
	const OF(operands) *x = q;
	struct block b = {.word = k, .next = next, .pair_ld = 2 * K_BLOCK};

	memset(score, 0, n * sizeof(*score));
	for (uint32_t d = 0; d < hd_pad; d += K_BLOCK, x += n, b.word += K_BLOCK * K_BLOCK, b.next += K_BLOCK * K_BLOCK)
		OF(page_rows)(&b, x, score[0], 32, n);
}

TARGET static void
OF(weigh)(const uint16_t (*p)[32], uint32_t n, uint32_t hd_pad, const uint16_t *v, const uint16_t *next, float *out)
{
	_Alignas(64) OF(operands) x[64];
	struct block b = {.word = v, .next = next, .pair_ld = 2 * hd_pad};

	for (uint32_t i = 0; i < n; i++)
		OF(expand)(p[i], x[i]);
	memset(out, 0, (size_t)n * hd_pad * sizeof(*out));
	for (uint32_t d = 0; d < hd_pad; d += 32, b.word += 64, b.next += 64)
		OF(page_rows)(&b, (const OF(operands) *)x, out + d, hd_pad, n);
}

/* As struct k_ops has probe_fma. */
TARGET static double
OF(probe)(uint32_t rounds)
{
	const __m512 x = _mm512_castsi512_ps(_mm512_set1_epi32(0x3f003f00)); /* about 0.5, as a float or as two BF16 */
	__m512 s[16];

	UNROLL
	for (int j = 0; j < 16; j++)
		s[j] = _mm512_setzero_ps();
	for (uint32_t i = 0; i < rounds; i++) {
		UNROLL
		for (int j = 0; j < 16; j++) {
			s[j] = OF(multiply)(x, x, s[j]);
			__asm__ volatile("" : "+v"(s[j]));
		}
	}
	UNROLL
	for (int j = 0; j < 16; j++)
		__asm__ volatile("" ::"v"(s[j]));
	return 16.0 * 16 * 2 * (16 / STEPS) * rounds;
}

#undef OF
#undef TARGET
#undef STEPS
