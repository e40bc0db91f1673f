/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CTL_CMD_H
#define OCTET_CTL_CMD_H
/* What octetctl's files share: the options, and the verbs that are more than one request (ctl-eval.c).
 * octet-console runs the same command line in a child process of its own. */
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include "client/ctl.h"

#define MAX_FILES 16u
#define CALL_TIMEOUT_MS 60000

struct options {
	const char *socket;
	bool json, ini, dry_run;
	int64_t if_epoch, to, limit, confirm, timeout; /* -1: not given */
	/* eval, evals, sweep, rollout; NULL or 0: not given */
	const char *candidate, *baseline, *dump, *name, *stop, *by, *format, *svg;
	const char *file[MAX_FILES];
	bool is_task[MAX_FILES];
	unsigned n_files;
	int64_t context;
	bool exclusive, all, again;
	const char *percent, *guard;
	double budget_kl, budget_ppl; /* < 0: not given */
};

/* The whole command line; argv[0] is not used. An exit status. */
int octetctl_main(int argc, char **argv);
/* The i-th verb in words, for completion; false after the last. */
struct verb_words {
	const char *name, *args, *help;
	bool looks; /* changes nothing, whatever its arguments */
};
bool octetctl_verb(size_t i, struct verb_words *);

/* An exit status. */
int cmd_eval(const struct options *, char **args, int n);
int cmd_evals(const struct options *, char **args, int n);
int cmd_sweep(const struct options *, char **args, int n);
int cmd_rollout(const struct options *, char **args, int n);

const char *str(const json_t *o, const char *key);          /* "" if it is none */
json_int_t num(const json_t *o, const char *key);
double real(const json_t *o, const char *key);              /* NAN if it is none */
int complain(const struct err *);                           /* 1 */
#endif
