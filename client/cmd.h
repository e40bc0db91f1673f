/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CMD_H
#define OCTET_CMD_H
/* The verbs of the octet command: one const entry each, one file each. */
#include <stdint.h>
#include <stdio.h>
#include "client/octet.h"

struct cmd {
	const char *name, *args, *help;
	int (*run)(int argc, char **argv, const char *socket); /* argv[0] is the verb; an exit status */
};
extern const struct cmd cmd_complete, cmd_tokenize, cmd_score, cmd_bench;

/* Prints "octet: ..." and returns 1, or 2 for usage. */
int cmd_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int cmd_usage(const struct cmd *, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* 0, or 2 after a message that names the option. */
int cmd_u64(const struct cmd *, const char *option, const char *text, uint64_t min, uint64_t max, uint64_t *out);
int cmd_float(const struct cmd *, const char *option, const char *text, double min, double max, float *out);
/* Connects, or says why not and returns NULL. */
octet *cmd_open(const char *socket);
double cmd_now_ms(void);
/* A whole file, "-" is standard input: malloc'd, a NUL after it; 1 after a message. */
int cmd_read_file(const char *path, char **out, size_t *len);
#endif
