/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/fuzz/fuzz.h"
#include "conf/conf.h"

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	const char *path = fuzz_file("octet.ini", data, n);
	struct conf *a = NULL, *b = NULL;
	struct conf_change *change;
	struct err err;
	size_t n_changes;

	if (conf_load(&a, path, &err) == 0 && conf_load(&b, path, &err) == 0) {
		if (conf_diff(a, b, &change, &n_changes) != 0 || n_changes != 0)
			abort();
		conf_changes_free(change, n_changes);
	} else if (*err.text == '\0')
		abort();
	conf_free(&a), conf_free(&b);
	return 0;
}
