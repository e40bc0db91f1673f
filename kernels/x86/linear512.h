/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers with 16 output channels across the lanes, included by avx512.c once for each way to take products: STEPS
 * (of a block of 32 inputs), TARGET, OF() for names, and these: multiply() adds the products of two operands of 32 bits a
 * lane; split() makes operands of the even and of the odd chain out of a pair of inputs of 16 channels, or of two;
 * expand() those of a row's inputs, [STEPS][2 chains].
 */
typedef float OF(operands)[2 * STEPS];

TARGET static inline void
OF(spread_block)(const uint16_t word[1024], float out[64 * STEPS])
{
	for (uint32_t i = 0; i < 1024; i += 512 / STEPS, out += 32) {
		__m512 even, odd;

		OF(split)(_mm512_load_si512(word + i), _mm512_load_si512(word + i + 512 / STEPS - 32), &even, &odd);
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
	} else {
		__m512i pair = weights_at(b, from, i);

		OF(split)(pair, each == 32 ? pair : weights_at(b, from, i + 32), even, odd);
	}
}

/* One block against n rows (known where it is inlined). */
TARGET static inline __attribute__((always_inline)) void
OF(rows_block)(const struct block *b, enum source from, const OF(operands) *x, totals *total, const uint32_t n)
{
	__m512 even[FEW][2], odd[FEW][2];

	UNROLL
	for (uint32_t r = 0; r < n; r++)
		even[r][0] = even[r][1] = odd[r][0] = odd[r][1] = _mm512_setzero_ps();
#pragma GCC unroll 2
	for (uint32_t p = 0; p < STEPS; p++) {
		__m512 e0, o0, e1, o1;

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
			_mm512_store_ps(&total[r][t * 16], _mm512_add_ps(_mm512_load_ps(&total[r][t * 16]),
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
		if (from == WORDS || (from == PLANES && w->flag[panel * kb_n + kb])) {
			unpack_block(w, panel * kb_n + kb, a->format, word);
			OF(rows_block)(&b, WORDS, in, total, n);
		} else {
			OF(rows_block)(&b, from, in, total, n);
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

/* More rows than FEW, in even teams. */
TARGET static inline void
OF(many_rows)(const struct block *b, const OF(operands) *x, totals *total, uint32_t rows)
{
	uint32_t teams = (rows + FEW - 1) / FEW;

	for (uint32_t i = 0; i < teams; i++) {
		uint32_t r = rows * i / teams;

		switch (rows * (i + 1) / teams - r) {
		case 3: OF(rows_block)(b, OPERANDS, x + r, total + r, 3); break;
		case 4: OF(rows_block)(b, OPERANDS, x + r, total + r, 4); break;
		case 5: OF(rows_block)(b, OPERANDS, x + r, total + r, 5); break;
		case 6: OF(rows_block)(b, OPERANDS, x + r, total + r, 6); break;
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

	memset(total, 0, (p1 - p0) * sizeof(*total));
	for (uint32_t kb0 = 0; kb0 < kb_n; kb0 += CHUNK) {
		uint32_t kb1 = kb_n - kb0 < CHUNK ? kb_n : kb0 + CHUNK;

		for (uint32_t r = 0; r < rows; r++)
			for (uint32_t kb = kb0; kb < kb1; kb++)
				OF(expand)(a->x + (row + r) * a->ldx + kb * K_BLOCK, x[kb - kb0][r]);
		for (uint32_t p = p0; p < p1; p++)
			for (uint32_t kb = kb0; kb < kb1; kb++) {
				unpack_block(w, p * kb_n + kb, a->format, word);
				OF(spread_block)(word, spread);
				OF(many_rows)(&b, (const OF(operands) *)x[kb - kb0], total[p - p0], rows);
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

#undef OF
#undef TARGET
#undef STEPS
