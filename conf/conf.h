/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_CONF_H
#define OCTET_CONF_H
/*
 * The configuration file: one table of options behind it (conf.c), read whole
 * or not at all. A struct conf is immutable after conf_load() and may be read
 * from any thread; the loop thread owns it.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include "client/err.h"

struct conf_rule {
	char *selector, *format;
	int line;
};

struct conf_policy {
	char *name;
	struct conf_rule *rules;
	size_t n_rules;
	int line;   /* 0: built in */
	bool saved; /* from the policies file */
};

/* [clients]: "user:NAME = POLICY"; the first that matches counts. */
struct conf_client {
	char *who, *policy;
	int line;
};

enum conf_backend { CONF_BACKEND_AUTO, CONF_BACKEND_CPU, CONF_BACKEND_CUDA };
enum conf_residency { CONF_RESIDENCY_BOTH, CONF_RESIDENCY_NESTED };
enum conf_prefix_cache { CONF_PREFIX_OFF, CONF_PREFIX_USER, CONF_PREFIX_ALL };
enum conf_on_flip { CONF_ON_FLIP_SWITCH, CONF_ON_FLIP_PIN };

struct conf {
	char *file;
	/* [daemon] */
	char *socket, *control_socket, *state_dir, *policies_file;
	uint32_t socket_mode, control_mode, max_clients, max_clients_per_uid, max_requests, max_requests_per_uid, max_queue,
	    handshake_timeout_ms, drain_timeout_s;
	char *log_level; /* error, warn, info, debug */
	/* [model] */
	char *model_path;
	/* [engine] */
	uint64_t kv_cache_bytes;
	uint32_t backend, device, residency, fast_accumulation, threads, max_batch_tokens, max_batch, max_context, step_target_ms, spin_us, prefix_cache, evidence_steps;
	char *nested_sites;
	/* [precision] */
	char *policy;
	uint32_t on_flip;
	/* [shadow], [surge]; shares and bounds in millionths */
	char *shadow_baseline, *surge_policy;
	uint32_t shadow_sample, shadow_share, shadow_max_kl, shadow_min_agree, shadow_cooldown_s, surge_enter_queue_ms,
	    surge_leave_queue_ms, surge_min_hold_s;
	/* [access] */
	char *operators, *viewers, *policies_of_requests;
	/* [policy NAME], the built-in ones first unless the file redefines them */
	struct conf_policy *policies;
	size_t n_policies;
	struct conf_client *clients;
	size_t n_clients;
};

/* Errors name FILE:LINE. *out is untouched on failure. */
int conf_load(struct conf **out, const char *path, struct err *);
/* The same for --check: goes on after a problem, tells up to CONF_PROBLEMS of
 * them, returns how many there are. *out is set if the file could be read; then
 * what was wrong has its default (NULL: a required path). */
#define CONF_PROBLEMS 20
typedef void (*conf_tell)(void *arg, const char *text);
int conf_check(struct conf **out, const char *path, conf_tell, void *arg);
void conf_free(struct conf **);
const struct conf_policy *conf_policy(const struct conf *, const char *name);

/* One option whose value differs. */
struct conf_change {
	char key[64]; /* "engine.spin_us" */
	char from[256], to[256];
	bool live;
};
int conf_diff(const struct conf *from, const struct conf *to, struct conf_change **, size_t *n);
void conf_changes_free(struct conf_change *, size_t n);
/* Takes the values of restart-only options from `running`, so that the result
 * describes what runs. */
int conf_keep_restart_only(struct conf *, const struct conf *running);

/* The table, for --help-options and for the tests of the manual and the sample. */
void conf_print_options(FILE *);
const char *conf_option_name(size_t i, const char **section); /* NULL past the end */
#endif
