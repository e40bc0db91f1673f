/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_PAGE_H
#define OCTET_PAGE_H
/*
 * The status page: one read-only shared mapping that octetd refreshes while
 * somebody holds it, and octet-console reads. No prompt and no token is in it.
 * A sequence lock guards it: page_read() copies until it saw an even, unchanged
 * seq. Handed out over the control socket by the verb "page".
 */
#include <stdint.h>

#define PAGE_MAGIC 0x4750434fu /* "OCPG" */
#define PAGE_VERSION 6u
#define PAGE_GROUPS 16u
#define PAGE_LAYERS 256u
#define PAGE_FORMATS 8u
#define PAGE_HISTORY 32u
#define PAGE_CLIENTS 64u
#define PAGE_EVALS 16u
#define PAGE_LOG 64u
#define PAGE_LOG_LINE 240u
#define PAGE_NONE 0xffu /* no such site */

struct page_history {
	uint64_t epoch, step;
	int64_t time_us;  /* Unix time */
	uint32_t uid, pid;
	char program[32], why[64], change[240], result[24]; /* what is longer ends with "..." */
	char policy[64];  /* what the plan was called after it */
};

struct page_client {
	uint64_t id, requests, tokens;
	uint32_t uid, pid, running, queued;
	char program[32];
	char policy[64]; /* what its requests run that name none; "": the active plan */
	uint32_t candidate; /* 1: the policy is a rollout's, by client */
};

/* One finished eval: a candidate plan measured against a baseline on a text. */
struct page_eval {
	int64_t time_us;
	uint64_t id, tokens;
	char baseline[64], candidate[64], corpus[64]; /* policies by name, the text's file */
	double perplexity_base, perplexity, kl_mean, kl_p99, kl_max, top1; /* top1: share of equal first choices */
	double tokens_per_s_base, tokens_per_s;
};

/* One side of a rollout. Times of the last 512 requests, a token's from its
 * request's submission to its end, shared out. */
struct page_side {
	uint64_t requests, tokens, failed;
	double ttft_ms_p50, ttft_ms_p99, token_ms_p50, token_ms_p99;
};

/* Finished requests scored again under the baseline. requests 0: the plan was not measured yet. */
struct page_shadow {
	uint64_t requests, tokens;
	double kl, agree;          /* mean KL of a token; share of equal first choices */
	double max_kl, min_agree;  /* the guardrail's bounds; 0: none */
};

struct octet_page {
	uint32_t magic, version, bytes;
	uint32_t seq;          /* odd while the daemon writes */
	int64_t updated_us;    /* Unix time of the last refresh */
	char octet_version[32], model[128], backend[16], cpu_level[16];
	uint32_t pid, n_layers, n_groups, n_formats;
	int64_t started_us;
	char group[PAGE_GROUPS][24];
	char format[PAGE_FORMATS][12];
	uint32_t possible[PAGE_GROUPS]; /* bit f: the group may have format f */
	/* Format index or PAGE_NONE. A flip that is on its way is wanted already. */
	uint8_t wanted[PAGE_GROUPS][PAGE_LAYERS];
	uint8_t executed[PAGE_GROUPS][PAGE_LAYERS];
	uint8_t candidate[PAGE_GROUPS][PAGE_LAYERS]; /* of a rollout; all PAGE_NONE: there is none */
	/* What one token reads of one site: bytes of weights; of kv_cache, bytes of
	 * each position before it. */
	uint64_t read_bytes[PAGE_GROUPS][PAGE_FORMATS];
	/* What FP8 does, or would do, to a site's inputs: largest magnitude, shares
	 * that become 0 and the largest code. absmax < 0: not measured yet. */
	float absmax[PAGE_GROUPS][PAGE_LAYERS], zero[PAGE_GROUPS][PAGE_LAYERS], saturated[PAGE_GROUPS][PAGE_LAYERS];
	/* The last sweep: KL divergence with the site alone flipped; < 0: not
	 * measured. sweep_us 0: no sweep yet. */
	float kl[PAGE_GROUPS][PAGE_LAYERS];
	float group_kl[PAGE_GROUPS]; /* of a group flipped in all layers */
	/* What a decode step at batch 1 gained by it, in us; NAN: not measured. */
	float saved_us[PAGE_GROUPS][PAGE_LAYERS], group_saved_us[PAGE_GROUPS];
	float saved_error_us[PAGE_GROUPS][PAGE_LAYERS], group_saved_error_us[PAGE_GROUPS]; /* its standard error; NAN: not known */
	/* The same of a layer's linear sites flipped together. */
	float layer_kl[PAGE_LAYERS], layer_saved_us[PAGE_LAYERS], layer_saved_error_us[PAGE_LAYERS];
	int64_t sweep_us;
	char sweep_from[12], sweep_format[12]; /* all of the above went from one format to one other */
	uint64_t epoch, plan_digest, step;
	uint64_t running_epoch;   /* what the last step ran: behind epoch until there is a step */
	uint64_t unconfirmed_epoch; /* is taken back in unconfirmed_s; 0: none */
	uint32_t unconfirmed_s, unjournaled, draining;
	uint32_t flipping;        /* a change is on its way: what is not executed will be */
	char policy[64];       /* "bf16", or "bf16 + 2 changes" */
	uint64_t weights_bytes, kv_bytes;
	uint32_t kv_pages, kv_pages_used, kv_pages_cached, kv_page_tokens;
	uint64_t prefix_hit_tokens, prefix_evictions, preemptions;
	uint32_t running, queued, batch_rows;
	uint64_t done, failed, prompt_tokens, output_tokens;
	double tokens_per_s, prompt_per_s;  /* over the last second or so */
	double step_ms_p50, step_ms_p90, step_ms_p99, step_ms_max;
	/* Of requests that ended in the last 10 s; < 0: none did. Submission to first
	 * token; from there on the mean time between the tokens of a request. */
	double ttft_ms_p50, ttft_ms_p99;
	double token_ms_p50, token_ms_p90, token_ms_p99;
	double queue_ms;                    /* how long the oldest request waits that does not run */
	double shadow_sample;               /* share of requests scored again; 0: shadow is off */
	char shadow_baseline[64];
	uint64_t shadow_scored, shadow_waiting, shadow_dropped;
	uint32_t shadow_cooldown_s;         /* after the guardrail acted */
	uint32_t rollout_by_request;
	struct page_shadow shadow;          /* of the active plan */
	char rollout[64];                   /* the candidate's policy; "": there is no rollout */
	uint64_t rollout_epoch;
	double rollout_percent, guard_kl, guard_agree, guard_p99; /* 0: none; p99 0.1: +10 % */
	struct page_side side[2];           /* active, candidate */
	struct page_shadow candidate_shadow;
	char surge_policy[64], surge_state[24];
	uint64_t surges;
	uint32_t n_history, n_clients, n_evals;
	struct page_history history[PAGE_HISTORY];  /* newest first */
	struct page_client client[PAGE_CLIENTS];
	struct page_eval eval[PAGE_EVALS];          /* newest first */
	uint64_t n_log;                             /* lines ever; the i-th is at i % PAGE_LOG */
	char log[PAGE_LOG][PAGE_LOG_LINE];          /* as written, cut; no newline */
};
#endif
