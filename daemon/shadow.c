/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/shadow.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/eval.h"
#include "daemon/log.h"
#include "daemon/octetd.h"
#include "daemon/rollout.h"

#define PLANS 8u
#define MAX_WAITING 64u   /* requests that wait to be scored; more are not taken */
#define PASS_ROWS 64u     /* a live request that comes waits for no more than these */

struct watched {
	uint64_t digest, used;
	double max_kl, min_agree, sample; /* of a rollout; 0: those of [shadow] */
	uint64_t requests, tokens, breaches;
	double kl_sum, same;
	struct bet kl, agree;
};

struct shadow {
	struct probe_owner owner; /* first */
	struct octetd *d;
	struct watched plan[PLANS];
	uint64_t uses, seen, scored, dropped, waiting;
	double us;                /* that it cost the engine */
	int64_t quiet_until_us;   /* cool-down */
};

void
bet_take(struct bet *b, double x)
{
	double n = (double)b->n + 1, mean = (b->bound + b->sum) / n;
	double variance = (b->bound * b->bound + b->squares - 2 * mean * b->sum + (double)b->n * mean * mean) / n;
	double gap = mean - b->bound, stake = gap > 0 ? gap / (fmax(variance, 0) + gap * gap) : 0;

	/* Half of what could be lost at most. */
	stake = fmin(stake, 0.5 / b->bound);
	b->log_capital += log1p(stake * (x - b->bound));
	b->sum += x, b->squares += x * x, b->n++;
}

static void on_probe(struct probe_owner *, struct probe *);

int
shadow_new(struct shadow **out, struct octetd *d, struct err *err)
{
	*out = calloc(1, sizeof(**out));
	if (*out == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	(*out)->owner.done = on_probe;
	(*out)->d = d;
	return 0;
}

void
shadow_free(struct shadow **s)
{
	free(*s);
	*s = NULL;
}

static const struct watched *
find(const struct shadow *s, uint64_t digest)
{
	for (uint32_t i = 0; i < PLANS; i++)
		if (s->plan[i].used != 0 && s->plan[i].digest == digest)
			return &s->plan[i];
	return NULL;
}

/* The longest unused gives way. */
static struct watched *
find_or_make(struct shadow *s, uint64_t digest)
{
	struct watched *w = (struct watched *)(uintptr_t)find(s, digest);

	if (w == NULL) {
		w = &s->plan[0];
		for (uint32_t i = 1; i < PLANS; i++)
			if (s->plan[i].used < w->used)
				w = &s->plan[i];
		*w = (struct watched){.digest = digest};
	}
	w->used = ++s->uses;
	return w;
}

void
shadow_guard(struct shadow *s, uint64_t digest, double max_kl, double min_agree, double sample)
{
	struct watched *w = find_or_make(s, digest);

	*w = (struct watched){.digest = digest, .used = w->used, .max_kl = max_kl, .min_agree = min_agree, .sample = sample};
}

/* ---- the guardrail ---- */

static void
on_rolled_back(void *arg, int rc, const struct err *err, const struct flip_result *r)
{
	struct shadow *s = arg;
	struct flip_ask ask = {.kind = FLIP_USE, .who = {.uid = getuid(), .pid = (uint32_t)getpid(), .program = "guardrail"}};

	(void)err, (void)r;
	/* Nothing to take back: the daemon started with that plan. */
	if (rc != -ENOENT)
		return;
	snprintf(ask.policy, sizeof(ask.policy), "%.63s", s->d->conf->shadow_baseline);
	snprintf(ask.why, sizeof(ask.why), "use: guardrail: nothing to roll back to");
	flip_ask(s->d->flips, &ask, on_rolled_back, s);
}

static void
breach(struct shadow *s, struct watched *w, const char *what, double got, double bound)
{
	struct flip_ask ask = {.kind = FLIP_ROLLBACK, .who = {.uid = getuid(), .pid = (uint32_t)getpid(), .program = "guardrail"}};
	char why[64];

	snprintf(why, sizeof(why), "guardrail: %s %.4f, bound %g, %" PRIu64 " requests", what, got, bound, w->requests);
	if (rollout_digest(s->d->rollout) == w->digest)
		rollout_breach(s->d->rollout, why);
	else if (flipper_plan(s->d->flips)->digest == w->digest) {
		snprintf(ask.why, sizeof(ask.why), "rollback: %.53s", why);
		flip_ask(s->d->flips, &ask, on_rolled_back, s);
	} else
		return;
	log_warn("guardrail", "plan=%016" PRIx64 " why=%s", w->digest, LOG_Q(why));
	s->quiet_until_us = octetd_now_us() + (int64_t)s->d->conf->shadow_cooldown_s * 1000000;
	*w = (struct watched){.digest = w->digest, .used = w->used, .breaches = w->breaches + 1};
}

static void
judge(struct shadow *s, struct watched *w)
{
	if (octetd_now_us() < s->quiet_until_us || w->requests == 0)
		return;
	if (w->kl.log_capital >= BET_LIMIT)
		breach(s, w, "KL", w->kl_sum / (double)w->tokens, w->kl.bound);
	else if (w->agree.log_capital >= BET_LIMIT)
		breach(s, w, "agreement", w->same / (double)w->tokens, 1 - w->agree.bound);
}

/* A bound that changed starts a new test. */
static void
bet(struct bet *b, double bound, double x)
{
	if (bound <= 0 || bound >= 1)
		return;
	if (b->bound != bound)
		*b = (struct bet){.bound = bound};
	bet_take(b, fmin(x, 1));
}

static double
bound_of(double own, uint32_t millionths)
{
	return own > 0 ? own : millionths / 1e6;
}

static void
on_probe(struct probe_owner *o, struct probe *p)
{
	struct shadow *s = (struct shadow *)o;
	uint32_t n = p->n - p->from;
	double kl = 0, same = 0, least;
	struct watched *w;

	s->d->measuring--;
	s->waiting--;
	s->us += p->cost_us;
	if (p->error == 0) {
		w = find_or_make(s, p->plan[SIDE_CANDIDATE]->digest);
		for (uint32_t i = 0; i < n; i++) {
			kl += p->score[i].kl;
			same += p->score[i].first[0] == p->score[i].first[1];
		}
		s->scored++;
		w->requests++, w->tokens += n, w->kl_sum += kl, w->same += same;
		bet(&w->kl, bound_of(w->max_kl, s->d->conf->shadow_max_kl), kl / n);
		least = bound_of(w->min_agree, s->d->conf->shadow_min_agree);
		bet(&w->agree, least > 0 ? 1 - least : 0, 1 - same / n);
		judge(s, w);
	} else
		s->dropped++;
	probe_free(&p);
}

/* ---- what is taken ---- */

/* Spread evenly: every 1/share-th. */
static bool
is_sampled(struct shadow *s, uint64_t digest)
{
	const struct watched *w = find(s, digest);
	double share = s->d->conf->shadow_sample / 1e6;

	if (w != NULL && w->sample > share)
		share = w->sample;
	s->seen++;
	return floor((double)s->seen * share) > floor((double)(s->seen - 1) * share);
}

void
shadow_take(struct shadow *s, const struct request *r)
{
	const struct segment *seg;
	uint32_t n_tokens, n_segments = request_segments(r, &seg), *copy;
	const uint32_t *token = request_tokens(r, &n_tokens);
	struct plan *base = NULL;
	struct probe *p = NULL;

	if ((r->finish != WIRE_FINISH_LENGTH && r->finish != WIRE_FINISH_STOP) || r->n_output == 0 || r->replay != NULL ||
	    n_segments != 1 || s->d->draining || !is_sampled(s, seg[0].plan->digest))
		return;
	if (octetd_policy_plan(s->d->conf, s->d->conf->shadow_baseline, s->d->model->shape.n_layers, &base, NULL) != 0)
		return;
	if (base->digest == seg[0].plan->digest)
		goto out;
	if (s->waiting == MAX_WAITING) {
		s->dropped++;
		goto out;
	}
	copy = malloc(n_tokens * sizeof(*copy));
	if (copy == NULL)
		goto out;
	memcpy(copy, token, n_tokens * sizeof(*copy));
	if (probe_new(&p, PROBE_SCORE, copy, n_tokens, r->n_prompt, base, seg[0].plan) != 0)
		goto out;
	p->owner = &s->owner;
	p->share = s->d->conf->shadow_share / 1e6;
	p->max_rows = PASS_ROWS;
	if (engine_probe(s->d->engine, p, NULL) != 0) {
		s->dropped++;
		probe_free(&p);
	} else
		s->waiting++, s->d->measuring++;
out:
	plan_unref(&base);
}

/* ---- what is shown ---- */

json_t *
shadow_plan_json(const struct shadow *s, uint64_t digest)
{
	const struct watched *w = find(s, digest);

	if (w == NULL || w->requests == 0)
		return json_null();
	return json_pack("{s:I,s:I,s:f,s:f,s:f,s:f}", "requests", (json_int_t)w->requests, "tokens", (json_int_t)w->tokens, "kl",
	    w->kl_sum / (double)w->tokens, "agree", w->same / (double)w->tokens, "max_kl",
	    bound_of(w->max_kl, s->d->conf->shadow_max_kl), "min_agree", bound_of(w->min_agree, s->d->conf->shadow_min_agree));
}

json_t *
shadow_json(const struct shadow *s)
{
	int64_t left = s->quiet_until_us - octetd_now_us();

	return json_pack("{s:f,s:s,s:I,s:I,s:I,s:f,s:I,s:o}", "sample", s->d->conf->shadow_sample / 1e6, "baseline",
	    s->d->conf->shadow_baseline, "scored", (json_int_t)s->scored, "waiting", (json_int_t)s->waiting, "dropped",
	    (json_int_t)s->dropped, "seconds", s->us / 1e6, "cooldown_s", (json_int_t)(left > 0 ? left / 1000000 + 1 : 0), "active",
	    shadow_plan_json(s, flipper_plan(s->d->flips)->digest));
}
