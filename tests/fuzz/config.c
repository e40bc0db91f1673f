/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/fuzz/fuzz.h"
#include "daemon/engine/config.h"

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	struct model_shape s;
	char *text = NULL;
	struct err err;
	size_t len;

	fuzz_file("config.json", data, n);
	if (config_read(&s, fuzz_dir, &text, &len, &err) == 0) {
		/* What is taken can be computed with. */
		if (s.n_heads == 0 || s.n_kv_heads == 0 || s.n_heads % s.n_kv_heads != 0 || s.head_dim == 0 ||
		    s.head_dim > CONFIG_MAX_HEAD_DIM || s.n_layers == 0 || s.n_layers > CONFIG_MAX_LAYERS || s.vocab == 0)
			abort();
		for (uint32_t i = 0; i < s.head_dim / 2; i++)
			config_rope_freq(&s, i);
	}
	free(text);
	return 0;
}
