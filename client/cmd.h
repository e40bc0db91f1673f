/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CMD_H
#define OCTET_CMD_H
/* The verbs of the octet command: one const entry each, one file each. */
#include <getopt.h>
#include <stdint.h>
#include <stdio.h>
#include "client/octet.h"

struct cmd {
	const char *name, *args, *help;
	int (*run)(int argc, char **argv, const char *socket); /* argv[0] is the verb; an exit status */
};
extern const struct cmd cmd_complete, cmd_tokenize, cmd_score, cmd_chat, cmd_bench, cmd_proofread;

/* Prints "octet: ..." and returns 1, or 2 for usage. */
int cmd_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int cmd_usage(const struct cmd *, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* 0, or 2 after a message that names the option. */
int cmd_u64(const struct cmd *, const char *option, const char *text, uint64_t min, uint64_t max, uint64_t *out);
int cmd_float(const struct cmd *, const char *option, const char *text, double min, double max, float *out);

/* The sampling options, for getopt_long: put CMD_SAMPLING_LONGS among a verb's own and hand over what comes. */
#define CMD_MAX_STOPS 16
#define CMD_MAX_BIAS 1024
enum {
	CMD_MAX_TOKENS = 1000, CMD_TEMPERATURE, CMD_TOP_P, CMD_TOP_K, CMD_SEED, CMD_STOP, CMD_IGNORE_EOS, CMD_MIN_P,
	CMD_REPETITION, CMD_PRESENCE, CMD_FREQUENCY, CMD_BIAS, CMD_POLICY
};
#define CMD_SAMPLING_LONGS                                                                                             \
	{"max-tokens", required_argument, NULL, CMD_MAX_TOKENS}, {"temperature", required_argument, NULL, CMD_TEMPERATURE}, \
	{"top-p", required_argument, NULL, CMD_TOP_P}, {"top-k", required_argument, NULL, CMD_TOP_K},                  \
	{"seed", required_argument, NULL, CMD_SEED}, {"stop", required_argument, NULL, CMD_STOP},                      \
	{"ignore-eos", no_argument, NULL, CMD_IGNORE_EOS}, {"min-p", required_argument, NULL, CMD_MIN_P},              \
	{"repetition-penalty", required_argument, NULL, CMD_REPETITION},                                               \
	{"presence-penalty", required_argument, NULL, CMD_PRESENCE},                                                   \
	{"frequency-penalty", required_argument, NULL, CMD_FREQUENCY}, {"logit-bias", required_argument, NULL, CMD_BIAS}, \
	{"policy", required_argument, NULL, CMD_POLICY}
#define CMD_SAMPLING_ARGS                                                                                              \
	"[--max-tokens N] [--temperature T] [--top-p P] [--top-k K]\n"                                                 \
	"            [--min-p P] [--repetition-penalty R] [--presence-penalty A] [--frequency-penalty A]\n"            \
	"            [--logit-bias ID=A]... [--seed S] [--stop STR]... [--ignore-eos] [--policy NAME]"
struct cmd_sampling {
	struct octet_sampling s;
	const char *stop[CMD_MAX_STOPS];
	size_t n_stops;
	struct octet_bias bias[CMD_MAX_BIAS];
};
/* 0, 2 after a message, or -1: ch is none of them. The struct must stay where it is. */
int cmd_sampling_option(const struct cmd *, struct cmd_sampling *, int ch, char *arg);

/* Connects, or says why not and returns NULL. */
octet *cmd_open(const char *socket);
double cmd_now_ms(void);
/* A whole file, "-" is standard input: malloc'd, a NUL after it; 1 after a message. */
int cmd_read_file(const char *path, char **out, size_t *len);
#endif
