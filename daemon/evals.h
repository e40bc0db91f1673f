/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_EVALS_H
#define OCTETD_EVALS_H
/* Stored results of evals: a JSON file each in state_dir/evals, all of them in memory. Loop thread only. */
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <uv.h>
#include "client/err.h"

struct evals;
/* Reads what is there; a file that is no result is left alone and logged. */
int evals_open(struct evals **, uv_loop_t *, const char *state_dir, struct err *);
void evals_close(struct evals **); /* nothing may be being written */
bool evals_idle(const struct evals *);
/* Gives it the next id and keeps it (takes no reference); written by the thread pool. */
uint64_t evals_add(struct evals *, json_t *result);
json_t *evals_get(const struct evals *, uint64_t id); /* borrowed, NULL */
/* The newest with these keys ("key" of the result); borrowed, NULL. */
json_t *evals_find(const struct evals *, const json_t *key);
int evals_delete(struct evals *, uint64_t id, struct err *);
const json_t *evals_all(const struct evals *); /* array, oldest first; borrowed */
uint64_t evals_changes(const struct evals *);
#endif
