/* SPDX-License-Identifier: Apache-2.0 */
/* The compiled tokenizer, as a lying daemon would send it to an app. */
#include "tests/fuzz/fuzz.h"
#include "client/tok.h"

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static const char text[] = "Hello  w\xc3\xb6rld 123 \xf0\x9f\x98\x80 <s>\n\ttwo";
	void *blob = aligned_alloc(8, (n + 8) & ~(size_t)7);
	struct tok *t = NULL;
	struct err err;

	memcpy(blob, data, n);
	if (tok_open(&t, blob, n, &err) == 0) {
		uint32_t ids[256];
		char back[2048];
		size_t len;
		int64_t k = tok_encode(t, text, sizeof(text) - 1, TOK_SPECIAL | TOK_BOS, ids, 256);

		if (k > 0 && k <= 256)
			tok_decode(t, ids, (size_t)k, true, back, sizeof(back));
		for (uint32_t i = 0; i < tok_vocab(t) && i < 1000; i++)
			tok_piece(t, i, &len), tok_text(t, i, &len);
		tok_free(&t);
	}
	free(blob);
	return 0;
}
