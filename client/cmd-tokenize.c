/* SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "client/cmd.h"

static int
print_ids(octet *o, const uint32_t *ids, int64_t n, int only_ids)
{
	for (int64_t i = 0; i < n; i++) {
		size_t len;
		const char *piece;

		if (only_ids) {
			printf("%s%u", i > 0 ? " " : "", ids[i]);
			continue;
		}
		piece = octet_piece(o, ids[i], &len);
		printf("%u\t%.*s\n", ids[i], (int)len, piece != NULL ? piece : "");
	}
	if (only_ids)
		printf("\n");
	return fflush(stdout) != 0;
}

static int
run(int argc, char **argv, const char *socket)
{
	const char *text = NULL;
	int only_ids = 0, rc = 1;
	uint32_t *ids;
	int64_t n;
	octet *o;

	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--ids") == 0 && text == NULL)
			only_ids = 1;
		else if (strcmp(argv[i], "--") == 0 && text == NULL && i + 1 < argc)
			text = argv[++i];
		else if (text == NULL && argv[i][0] != '-')
			text = argv[i];
		else
			return cmd_usage(&cmd_tokenize, "unexpected '%s'", argv[i]);
	}
	if (text == NULL)
		return cmd_usage(&cmd_tokenize, "TEXT is missing");
	if ((o = cmd_open(socket)) == NULL)
		return 1;
	n = octet_tokenize(o, text, strlen(text), OCTET_SPECIAL, NULL, 0);
	ids = malloc((n > 0 ? (size_t)n : 1) * sizeof(*ids));
	if (n < 0 || ids == NULL)
		cmd_fail("%s", octet_error(o));
	else {
		octet_tokenize(o, text, strlen(text), OCTET_SPECIAL, ids, (size_t)n);
		rc = print_ids(o, ids, n, only_ids);
	}
	free(ids);
	octet_close(&o);
	return rc;
}

const struct cmd cmd_tokenize = {"tokenize", "[--ids] TEXT", "token ids and pieces of a text", run};
