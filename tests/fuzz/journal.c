/* SPDX-License-Identifier: Apache-2.0 */
/* Lines of a journal; their checksums are put right, or nothing would get past them. */
#include <sha2.h>

#include "tests/fuzz/fuzz.h"
#include "daemon/journal.h"

static size_t
with_sum(char *to, const char *line, size_t n)
{
	uint8_t sum[SHA256_DIGEST_LENGTH];
	SHA2_CTX sha;

	SHA256Init(&sha);
	SHA256Update(&sha, (const uint8_t *)line, n);
	SHA256Final(sum, &sha);
	memcpy(to, line, n);
	to[n++] = ' ';
	for (int i = 0; i < 8; i++)
		n += (size_t)sprintf(to + n, "%02x", sum[i]);
	to[n++] = '\n';
	return n;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	char *out = malloc(n * 20 + 64);
	size_t at = 0;
	struct journal *j = NULL;
	struct journal_entry *list = NULL;
	struct journal_record r;
	uint64_t torn, a, b, c;
	struct err err;

	for (size_t i = 0, end; i < n; i = end + 1) {
		const uint8_t *newline = memchr(data + i, '\n', n - i);

		end = newline != NULL ? (size_t)(newline - data) : n;
		/* A line that begins with '!' is damaged. */
		if (data[i] == '!') {
			memcpy(out + at, data + i, end - i);
			at += end - i;
			out[at++] = '\n';
		} else
			at += with_sum(out + at, (const char *)data + i, end - i);
	}
	fuzz_file("journal", (const uint8_t *)out, at);
	free(out);
	if (journal_open(&j, fuzz_dir, 6, &torn, &err) != 0)
		return 0;
	journal_last_applied(j, &r);
	journal_last_epoch(j);
	journal_unconfirmed(j);
	journal_rollback_target(j, &a, &b, &c, &err);
	journal_history(j, &list);
	free(list);
	journal_close_intents(j, &err);
	journal_close(&j);
	return 0;
}
