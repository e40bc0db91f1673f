/* SPDX-License-Identifier: Apache-2.0 */
/*
 * console-replay FILE [LAYERS]: two minutes of a made-up daemon with a model of
 * 80 layers, as octet-console --record would have written them. Goldens and
 * pictures come from it: everything in it is fixed.
 */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tui/record.h"

#define START_US 1769860800000000 /* 2026-01-31 12:00:00 UTC */
#define SECONDS 120
#define GROUPS 9
#define HEAD 7 /* lm_head */
#define KV 8

static struct octet_page p;
static uint32_t n_layers = 80;
static uint32_t seed = 1;

static double
noise(void)
{
	seed = seed * 1664525u + 1013904223u;
	return (double)(seed >> 8) / (double)(1u << 24);
}

static bool
exists(uint32_t g, uint32_t l)
{
	return l < (g == HEAD ? 1 : n_layers);
}

static void
set(uint32_t g, uint32_t from, uint32_t to, uint8_t format)
{
	for (uint32_t l = from; l <= to; l++)
		if (exists(g, l))
			p.wanted[g][l] = p.executed[g][l] = format;
}

static void
log_line(int second, const char *text)
{
	snprintf(p.log[p.n_log++ % PAGE_LOG], PAGE_LOG_LINE, "2026-01-31T12:%02d:%02d.%03dZ %s", second / 60, second % 60,
	    (second * 37) % 1000, text);
}

/* A rollout's step has an epoch and leaves the active plan's. */
static void
change(int second, const char *program, const char *why, const char *what, const char *result, const char *policy)
{
	static uint64_t epoch;
	struct page_history *h = &p.history[0];
	bool rollout = strncmp(why, "rollout", 7) == 0;

	memmove(&p.history[1], h, (PAGE_HISTORY - 1) * sizeof(*h));
	*h = (struct page_history){.epoch = ++epoch, .step = p.step, .time_us = START_US + second * 1000000L, .uid = 1000,
	    .pid = 4242};
	snprintf(h->program, sizeof(h->program), "%s", program);
	snprintf(h->why, sizeof(h->why), "%s", why);
	snprintf(h->change, sizeof(h->change), "%s", what);
	snprintf(h->result, sizeof(h->result), "%s", result);
	snprintf(h->policy, sizeof(h->policy), "%s", policy);
	p.n_history += p.n_history < PAGE_HISTORY;
	if (rollout || strcmp(result, "applied") != 0)
		return;
	snprintf(p.policy, sizeof(p.policy), "%s", policy);
	p.epoch = p.running_epoch = epoch;
}

static void
make_fixed(void)
{
	static const char *const group[GROUPS] = {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
	    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "lm_head", "kv_cache"};
	static const char *const format[] = {"bf16", "fp8", "fp8w", "fp8t", "fp8b"};
	static const uint64_t weights[GROUPS] = {67108864, 8388608, 8388608, 67108864, 234881024, 234881024, 234881024, 1050673152, 4096};

	p.magic = PAGE_MAGIC, p.version = PAGE_VERSION, p.bytes = sizeof(p);
	snprintf(p.octet_version, sizeof(p.octet_version), "0.1.0");
	snprintf(p.model, sizeof(p.model), "example-70b");
	snprintf(p.backend, sizeof(p.backend), "cpu");
	snprintf(p.cpu_level, sizeof(p.cpu_level), "avx512");
	p.pid = 4000, p.n_layers = n_layers, p.n_groups = GROUPS, p.n_formats = 4;
	p.started_us = START_US - 7384000000;
	memset(p.wanted, PAGE_NONE, sizeof(p.wanted));
	memset(p.executed, PAGE_NONE, sizeof(p.executed));
	memset(p.candidate, PAGE_NONE, sizeof(p.candidate));
	for (uint32_t f = 0; f < 4; f++)
		snprintf(p.format[f], sizeof(p.format[f]), "%s", format[f]);
	for (uint32_t g = 0; g < GROUPS; g++) {
		snprintf(p.group[g], sizeof(p.group[g]), "%s", group[g]);
		p.possible[g] = g == KV ? 3 : 15;
		for (uint32_t f = 0; f < 4; f++)
			p.read_bytes[g][f] = f == 0 ? weights[g] : weights[g] / 2;
		set(g, 0, n_layers - 1, 0);
	}
	p.weights_bytes = 141000000000, p.kv_bytes = 17179869184, p.kv_pages = 65536, p.kv_page_tokens = 32;
}

static void
make_sweep(void)
{
	for (uint32_t g = 0; g < GROUPS; g++) {
		p.group_kl[g] = -1, p.group_saved_us[g] = p.group_saved_error_us[g] = NAN;
		for (uint32_t l = 0; l < PAGE_LAYERS; l++) {
			double depth = (double)l / n_layers, hot = (g == 6 ? 6 : g == HEAD ? 20 : g == KV ? 0.3 : 1) * (l < 2 ? 8 : 1);

			p.kl[g][l] = -1, p.saved_us[g][l] = p.saved_error_us[g][l] = NAN;
			p.absmax[g][l] = exists(g, l) ? (float)(4 + 90 * depth * noise()) : -1;
			p.zero[g][l] = (float)(0.002 * noise()), p.saturated[g][l] = (float)(0.00001 * noise());
			if (exists(g, l) && g != KV) {
				p.kl[g][l] = (float)(0.00002 * hot * (0.5 + noise()) * (1 + depth));
				p.saved_us[g][l] = (float)((double)p.read_bytes[g][0] / 4e6 * (0.9 + 0.2 * noise()));
				p.saved_error_us[g][l] = p.saved_us[g][l] * (g == 1 ? 0.7f : 0.1f);
			}
		}
	}
	for (uint32_t l = 0; l < PAGE_LAYERS; l++)
		p.layer_kl[l] = -1, p.layer_saved_us[l] = p.layer_saved_error_us[l] = NAN;
	p.group_kl[KV] = 0.00096f, p.group_saved_us[KV] = 12, p.group_saved_error_us[KV] = 9;
	p.sweep_us = START_US - 3600000000;
	snprintf(p.sweep_from, sizeof(p.sweep_from), "bf16");
	snprintf(p.sweep_format, sizeof(p.sweep_format), "fp8");
}

static void
add_eval(uint64_t id, const char *candidate, double kl, double perplexity, double top1, double speed)
{
	struct page_eval *e = &p.eval[p.n_evals++];

	*e = (struct page_eval){.time_us = START_US - (int64_t)(60 - id) * 600000000, .id = id, .tokens = 20000, .perplexity_base = 8.41,
	    .perplexity = perplexity, .kl_mean = kl, .kl_p99 = kl * 30, .kl_max = kl * 400, .top1 = top1, .tokens_per_s_base = 410,
	    .tokens_per_s = speed};
	snprintf(e->baseline, sizeof(e->baseline), "bf16");
	snprintf(e->candidate, sizeof(e->candidate), "%s", candidate);
	snprintf(e->corpus, sizeof(e->corpus), "/srv/eval/wiki.txt");
}

static void
make_quality(void)
{
	add_eval(58, "swept", 0.0011, 8.43, 0.986, 588);
	add_eval(57, "fp8", 0.0043, 8.49, 0.961, 655);
	add_eval(51, "attention.*=fp8", 0.0009, 8.42, 0.989, 447);
	p.shadow_sample = 0.02, p.shadow_scored = 1840, p.shadow_waiting = 2;
	snprintf(p.shadow_baseline, sizeof(p.shadow_baseline), "bf16");
	p.shadow = (struct page_shadow){412, 51234, 0.0012, 0.984, 0.004, 0.95};
	snprintf(p.rollout, sizeof(p.rollout), "fp8");
	p.rollout_epoch = 8, p.rollout_percent = 10, p.guard_kl = 0.005, p.guard_p99 = 0.1;
	p.side[0] = (struct page_side){2210, 301220, 1, 212, 690, 24.1, 39.5};
	p.side[1] = (struct page_side){251, 33870, 0, 198, 655, 17.3, 30.2};
	p.candidate_shadow = (struct page_shadow){25, 3301, 0.0041, 0.962, 0.005, 0};
	snprintf(p.surge_policy, sizeof(p.surge_policy), "fp8");
	snprintf(p.surge_state, sizeof(p.surge_state), "off");
}

static void
make_clients(int second)
{
	static const char *const program[] = {"proofreadd", "mailfilter", "python3", "indexer", "octet"};
	static const double rate[] = {310, 120, 55, 21, 0};

	p.n_clients = second < 90 ? 4 : 5;
	for (uint32_t i = 0; i < p.n_clients; i++) {
		struct page_client *c = &p.client[i];

		c->id = i + 3, c->uid = 1000 + i % 2, c->pid = 5100 + i * 17;
		c->running = i < 3 ? 3 - i : 0, c->queued = i == 0 && second % 7 == 0;
		c->requests = (uint64_t)(second * (5 - (int)i)), c->tokens = (uint64_t)(second * rate[i]);
		snprintf(c->program, sizeof(c->program), "%s", program[i]);
		snprintf(c->policy, sizeof(c->policy), "%s", i == 3 ? "bf16" : i == 2 && second >= 100 ? "fp8" : "");
		c->candidate = i == 2 && second >= 100;
	}
}

/* What happens, by the second. */
static void
make_second(int s)
{
	if (s == 0) {
		change(-7384, "octetd", "start", "", "applied", "bf16");
		change(-3000, "octetctl", "use: after the sweep", "attention.* bf16->fp8", "applied", "careful");
		set(0, 0, n_layers - 1, 1), set(1, 0, n_layers - 1, 1), set(2, 0, n_layers - 1, 1), set(3, 0, n_layers - 1, 1);
		log_line(0, "info flip epoch=2 uid=1000 program=octetctl sites=320 change=\"attention.* bf16->fp8\"");
	}
	if (s == 40) {
		change(s, "octet-console", "set", "mlp.gate_proj@2-79,mlp.up_proj@2-79 bf16->fp8", "applied", "careful + 1 change");
		set(4, 2, n_layers - 1, 1), set(5, 2, n_layers - 1, 1);
		log_line(s, "info flip epoch=3 uid=1000 program=octet-console sites=156 change=\"mlp.gate_proj@2-79 bf16->fp8, ...\"");
	}
	if (s == 60) {
		change(s, "octetctl", "set", "mlp.down_proj bf16->fp8", "applied", "careful + 2 changes");
		set(6, 0, n_layers - 1, 1);
		log_line(s, "info flip epoch=4 uid=1001 program=octetctl sites=80 change=\"mlp.down_proj bf16->fp8\"");
	}
	if (s == 75) {
		change(s, "guardrail", "rollback: guardrail: KL 0.0061, bound 0.004, 31 requests", "mlp.down_proj fp8->bf16", "applied",
		    "careful + 1 change");
		set(6, 0, n_layers - 1, 0);
		log_line(s, "warn guardrail plan=90acfbe1a9c41a2d why=\"KL 0.0061, bound 0.004, 31 requests\"");
	}
	if (s == 90) {
		change(s, "octetctl", "set", "mlp.down_proj@8-39 bf16->fp8w", "applied", "careful + 2 changes");
		set(6, 8, 39, 2);
		log_line(s, "info session.open uid=1000 pid=5168 program=octet");
	}
	if (s == 100) {
		change(s, "octetctl", "set", "", "failed: no such site", "careful + 2 changes");
		change(s, "octetctl", "rollout: start", "percent=10 by=client kl=0.005 agree=0 p99=0.1", "applied", "fp8");
		for (uint32_t g = 0; g < GROUPS; g++)
			for (uint32_t l = 0; l < n_layers; l++)
				if (exists(g, l))
					p.candidate[g][l] = g < HEAD ? 1 : 0;
		log_line(s, "info rollout step=start policy=fp8 percent=10 uid=1000 program=octetctl");
	}
	if (s == SECONDS - 1) {
		/* A flip is on its way. */
		p.flipping = 1;
		for (uint32_t l = 60; l < 64 && l < n_layers; l++)
			p.wanted[KV][l] = 1;
		p.unconfirmed_epoch = 6, p.unconfirmed_s = 41;
		log_line(s, "error session.closed uid=1001 pid=5117 why=\"impossible index in the ring\"");
	}
}

static void
make_traffic(int s, int half)
{
	double fast = s < 40 ? 400 : s < 60 ? 520 : s < 75 ? 640 : 530, busy = s >= 20 && s < 30 ? 1 : 0;

	p.updated_us = START_US + s * 1000000L + half * 500000L;
	p.seq += 2;
	p.step += 20;
	p.tokens_per_s = fast * (0.95 + 0.1 * noise()), p.prompt_per_s = 900 * (0.5 + noise()) * (1 - 0.7 * busy);
	p.output_tokens += (uint64_t)(p.tokens_per_s / 2), p.prompt_tokens += (uint64_t)(p.prompt_per_s / 2);
	p.prefix_hit_tokens += (uint64_t)(p.prompt_per_s / 2 * (s % 30) / 40);
	p.running = 12 + (uint32_t)(4 * noise()), p.queued = busy > 0 ? 3 + (uint32_t)(6 * noise()) : 0;
	p.queue_ms = busy > 0 ? 420 : 0;
	p.batch_rows = p.running + (uint32_t)(40 * noise()), p.done += 2;
	p.failed = s > 100 ? 1 : 0;
	p.kv_pages_used = 21000 + (uint32_t)s * 150, p.kv_pages_cached = 4000;
	p.step_ms_p50 = 12000 / fast * (0.98 + 0.04 * noise()), p.step_ms_p90 = p.step_ms_p50 * 1.2;
	p.step_ms_p99 = p.step_ms_p50 * 1.6, p.step_ms_max = p.step_ms_p50 * 3;
	p.ttft_ms_p50 = 180 + 400 * busy + 40 * noise(), p.ttft_ms_p99 = p.ttft_ms_p50 * 3;
	p.token_ms_p50 = p.step_ms_p50 * 1.02, p.token_ms_p90 = p.token_ms_p50 * 1.3, p.token_ms_p99 = p.token_ms_p50 * 1.9;
	make_clients(s);
}

int
main(int argc, char **argv)
{
	struct record *r;
	struct err err = {""};
	int rc;

	if (argc < 2)
		return 2;
	if (argc > 2 && atoi(argv[2]) > 0 && atoi(argv[2]) <= (int)PAGE_LAYERS)
		n_layers = (uint32_t)atoi(argv[2]);
	make_fixed();
	make_sweep();
	make_quality();
	rc = record_open(&r, argv[1], &err);
	for (int s = 0; s < SECONDS && rc == 0; s++) {
		make_second(s);
		for (int half = 0; half < 2 && rc == 0; half++) {
			make_traffic(s, half);
			rc = record_put(r, &p, &err);
		}
	}
	if (rc == 0)
		rc = record_close(&r, &err);
	if (rc != 0)
		fprintf(stderr, "console-replay: %s\n", err.text);
	return rc != 0;
}
