/* SPDX-License-Identifier: Apache-2.0 */
/* Every file of tests/fuzz/corpus/NAME through one target; NAME is the program's. */
#include <dirent.h>

#include "tests/fuzz/fuzz.h"

int
main(int argc, char **argv)
{
	const char *src = getenv("srcdir"), *slash = strrchr(argv[0], '/'), *name = slash != NULL ? slash + 1 : argv[0];
	static uint8_t data[1 << 20];
	char dir[4096], path[8192];
	unsigned n_files = 0;
	struct dirent *e;
	DIR *d;

	(void)argc, (void)fuzz_file;
	snprintf(dir, sizeof(dir), "%s/tests/fuzz/corpus/%s", src != NULL ? src : ".", name);
	d = opendir(dir);
	while (d != NULL && (e = readdir(d)) != NULL) {
		FILE *f;
		size_t n;

		snprintf(path, sizeof(path), "%s/%s", dir, e->d_name);
		if (e->d_name[0] == '.' || (f = fopen(path, "r")) == NULL)
			continue;
		n = fread(data, 1, sizeof(data), f);
		fclose(f);
		LLVMFuzzerTestOneInput(data, n);
		n_files++;
	}
	if (d != NULL)
		closedir(d);
	printf("%sok 1 - fuzz %s: %u inputs\n1..1\n", n_files > 0 ? "" : "not ", name, n_files);
	return n_files == 0;
}
