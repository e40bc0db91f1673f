/* SPDX-License-Identifier: Apache-2.0 */
/* tokenizer.json, then a zero byte and a text that goes through it. */
#include "tests/fuzz/fuzz.h"
#include "client/tok.h"

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	const uint8_t *zero = memchr(data, 0, n);
	size_t json = zero != NULL ? (size_t)(zero - data) : n, text = n - json;
	void *blob = NULL;
	struct tok *t = NULL;
	struct err err;
	size_t len;

	if (tok_compile((const char *)data, json, NULL, 0, 400, &blob, &len, &err) != 0)
		return 0;
	if (tok_open(&t, blob, len, &err) != 0)
		abort(); /* we made it */
	if (text > 1) {
		uint32_t ids[512];
		char back[2048];
		int64_t k = tok_encode(t, (const char *)zero + 1, text - 1, TOK_SPECIAL | TOK_BOS, ids, 512);

		for (int64_t i = 0; i < k && i < 512; i++)
			if (ids[i] >= 400)
				abort();
		if (k > 0 && k <= 512)
			tok_decode(t, ids, (size_t)k, false, back, sizeof(back));
	}
	tok_free(&t);
	free(blob);
	return 0;
}
