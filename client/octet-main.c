/* SPDX-License-Identifier: Apache-2.0 */
/* octet: the command-line client. Finds the verb and hands over. */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/cmd.h"

static const struct cmd *const cmds[] = {&cmd_complete, &cmd_tokenize, &cmd_score, &cmd_chat, &cmd_proofread, &cmd_bench};

int
cmd_fail(const char *fmt, ...)
{
	va_list ap;

	fflush(stdout);
	fprintf(stderr, "octet: ");
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\n");
	return 1;
}

int
cmd_usage(const struct cmd *cmd, const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "octet %s: ", cmd->name);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\nusage: octet %s %s\n", cmd->name, cmd->args);
	return 2;
}

int
cmd_u64(const struct cmd *cmd, const char *option, const char *text, uint64_t min, uint64_t max, uint64_t *out)
{
	char *end;

	errno = 0;
	*out = strtoull(text, &end, 10);
	if (errno != 0 || end == text || *end != '\0' || *text == '-' || *out < min || *out > max)
		return cmd_usage(cmd, "%s '%s' is no number from %llu to %llu", option, text, (unsigned long long)min,
		    (unsigned long long)max);
	return 0;
}

int
cmd_float(const struct cmd *cmd, const char *option, const char *text, double min, double max, float *out)
{
	char *end;
	double v = strtod(text, &end);

	if (end == text || *end != '\0' || !isfinite(v) || v < min || v > max)
		return cmd_usage(cmd, "%s '%s' is no number from %g to %g", option, text, min, max);
	*out = (float)v;
	return 0;
}

octet *
cmd_open(const char *socket)
{
	char why[256];
	octet *o;

	if (octet_open(&o, socket, why, sizeof(why)) != 0) {
		cmd_fail("%s", why);
		return NULL;
	}
	return o;
}

double
cmd_now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec / 1e6;
}

int
cmd_read_file(const char *path, char **out, size_t *len)
{
	FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "r");
	size_t cap = 0, n;

	*out = NULL;
	*len = 0;
	if (f == NULL)
		return cmd_fail("%s: %s", path, strerror(errno));
	do {
		char *more = *out;

		if (cap - *len < 4096) {
			cap = cap == 0 ? 16384 : cap * 2;
			more = realloc(*out, cap);
		}
		if (more == NULL) {
			free(*out);
			*out = NULL;
			return cmd_fail("%s: out of memory", path);
		}
		*out = more;
		n = fread(*out + *len, 1, cap - *len - 1, f);
		*len += n;
	} while (n > 0);
	(*out)[*len] = '\0';
	n = ferror(f) != 0;
	if (f != stdin)
		fclose(f);
	return n == 0 ? 0 : cmd_fail("%s: %s", path, strerror(EIO));
}

static void
usage(FILE *to)
{
	fprintf(to, "usage: octet [--socket PATH] VERB ...\n");
	for (size_t i = 0; i < sizeof(cmds) / sizeof(*cmds); i++)
		fprintf(to, "  %-9s %s\n            %s\n", cmds[i]->name, cmds[i]->help, cmds[i]->args);
	fprintf(to, "See octet(1).\n");
}

int
main(int argc, char **argv)
{
	const char *socket = NULL;
	char name[64];
	int i = 1;

	for (; i < argc && argv[i][0] == '-'; i++) {
		if (strcmp(argv[i], "--socket") == 0 && i + 1 < argc)
			socket = argv[++i];
		else if (strncmp(argv[i], "--socket=", 9) == 0)
			socket = argv[i] + 9;
		else if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
			usage(stdout);
			return 0;
		} else if (strcmp(argv[i], "--version") == 0) {
			printf("octet %s\n", OCTET_VERSION);
			return 0;
		} else {
			fprintf(stderr, "octet: unknown option '%s'\n", argv[i]);
			usage(stderr);
			return 2;
		}
	}
	if (i == argc) {
		usage(stderr);
		return 2;
	}
	for (size_t c = 0; c < sizeof(cmds) / sizeof(*cmds); c++) {
		if (strcmp(argv[i], cmds[c]->name) != 0)
			continue;
		if (i + 1 < argc && strcmp(argv[i + 1], "--help") == 0)
			return printf("usage: octet %s %s\n", cmds[c]->name, cmds[c]->args) < 0;
		snprintf(name, sizeof(name), "octet %s", cmds[c]->name);
		argv[i] = name; /* as getopt's messages begin */
		return cmds[c]->run(argc - i, argv + i, socket);
	}
	fprintf(stderr, "octet: unknown verb '%s'\n", argv[i]);
	usage(stderr);
	return 2;
}
