/* SPDX-License-Identifier: Apache-2.0 */
/* A header; its length is put in front of it, and data behind it. */
#include "tests/fuzz/fuzz.h"
#include "daemon/engine/safetensors.h"

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	uint64_t len = n > 0 ? n - 1 : 0;
	size_t behind = n > 0 ? data[0] * 4u : 0;
	uint8_t *file;
	struct safetensors st;
	struct err err;

	if (n == 0)
		return 0;
	file = calloc(1, 8 + n + behind);
	memcpy(file, &len, 8);
	memcpy(file + 8, data + 1, n - 1);
	if (safetensors_open(&st, fuzz_file("model.safetensors", file, 8 + len + behind), &err) == 0) {
		for (size_t i = 0; i < st.n; i++) {
			uint16_t out[4];
			uint64_t elems = (st.tensor[i].to - st.tensor[i].from) / safetensors_elem_bytes(st.tensor[i].dtype);

			if (safetensors_find(&st, st.tensor[i].name) == NULL)
				abort();
			for (uint64_t at = 0; at < elems; at += 4)
				safetensors_read_bf16(&st.tensor[i], at, elems - at < 4 ? elems - at : 4, out, &err);
		}
		safetensors_close(&st);
	}
	free(file);
	return 0;
}
