/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_FUZZ_H
#define OCTET_FUZZ_H
/*
 * One entry point a target, as libFuzzer calls it; replay.c calls the same over
 * the committed corpus. For inputs that are files: fuzz_file() gives a path in a
 * directory of this process, with the input in it.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static char fuzz_dir[] = "/tmp/octet-fuzz.XXXXXX";

static inline void
fuzz_remove(void)
{
	static const char *const made[] = {"config.json", "model.safetensors", "octet.ini", "journal", "lock", "replay"};
	char path[64];

	for (size_t i = 0; i < sizeof(made) / sizeof(*made); i++) {
		snprintf(path, sizeof(path), "%s/%s", fuzz_dir, made[i]);
		unlink(path);
	}
	rmdir(fuzz_dir);
}

static inline const char *
fuzz_file(const char *name, const uint8_t *data, size_t n)
{
	static char path[64];
	static int made;
	FILE *f;

	if (!made && mkdtemp(fuzz_dir) != NULL)
		made = atexit(fuzz_remove) == 0;
	snprintf(path, sizeof(path), "%s/%s", fuzz_dir, name);
	f = fopen(path, "w");
	if (f == NULL || fwrite(data, 1, n, f) != n || fclose(f) != 0)
		abort();
	return path;
}
#endif
