/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/rollout.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/log.h"
#include "daemon/measure.h"
#include "daemon/octetd.h"
#include "daemon/shadow.h"

#define WINDOW 512u      /* requests of a side whose times are kept */
#define LEAST 100u       /* on both sides before their p99 is compared, */
#define LOOK_EVERY 50u   /* so often by requests of the candidate, */
#define LOOKS 3u         /* and so often in a row before the guardrail acts */
#define SURGE_MS 100u

struct side {
	uint64_t requests, tokens, failed;
	float first_ms[WINDOW], token_ms[WINDOW];
	uint32_t n;
};

/*   OFF -> ON -> OFF      the queue grew, and shrank again
 *   ON -> YIELDED -> OFF  an operator flipped: surge waits for the queue to shrink */
enum surge_state { SURGE_OFF, SURGE_ON, SURGE_YIELDED };

struct rollout {
	struct octetd *d;
	struct plan *plan;       /* NULL: no rollout */
	char policy[64];
	double percent, kl, agree, p99; /* guards; 0: none. p99: 0.1 is +10 % */
	bool by_request;
	uint64_t epoch, salt;
	struct side side[N_SIDES];
	uint32_t slow_looks;
	struct flip retire;      /* on its way through the engine */
	bool retiring;

	uv_timer_t timer;
	enum surge_state surge;
	uint64_t surge_epoch, back_to, surges;
	int64_t since_us, not_before_us;
	bool flipping;
};

/* ---- who runs what ---- */

/* SplitMix64's finaliser over FNV-1a. */
static uint64_t
hash(uint64_t h, const void *data, size_t len)
{
	const uint8_t *p = data;

	h ^= 0xcbf29ce484222325u;
	for (size_t i = 0; i < len; i++)
		h = (h ^ p[i]) * 0x100000001b3u;
	h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9u;
	h = (h ^ h >> 27) * 0x94d049bb133111ebu;
	return h ^ h >> 31;
}

static bool
is_chosen(const struct rollout *r, const struct peer *peer, uint64_t request)
{
	uint64_t h = r->salt;

	if (r->plan == NULL)
		return false;
	if (r->by_request)
		h = hash(h, &request, sizeof(request));
	else {
		h = hash(h, &peer->uid, sizeof(peer->uid));
		h = hash(h, &peer->pid, sizeof(peer->pid));
		h = hash(h, peer->program, strlen(peer->program));
	}
	return (double)(h >> 11) * 0x1p-53 * 100 < r->percent;
}

struct plan *
rollout_choose(struct rollout *r, const struct peer *peer, uint64_t request, uint64_t *epoch)
{
	if (!is_chosen(r, peer, request))
		return NULL;
	*epoch = r->epoch;
	return plan_ref(r->plan);
}

const char *
rollout_of_client(const struct rollout *r, const struct peer *peer)
{
	return !r->by_request && is_chosen(r, peer, 0) ? r->policy : NULL;
}

uint64_t
rollout_digest(const struct rollout *r)
{
	return r->plan != NULL ? r->plan->digest : 0;
}

/* ---- both sides ---- */

static int
by_float(const void *pa, const void *pb)
{
	float a = *(const float *)pa, b = *(const float *)pb;

	return a < b ? -1 : a > b;
}

static double
percentile(const float *v, uint32_t n, double q)
{
	float sorted[WINDOW];

	n = n < WINDOW ? n : WINDOW;
	if (n == 0)
		return 0;
	memcpy(sorted, v, n * sizeof(*v));
	qsort(sorted, n, sizeof(*sorted), by_float);
	return sorted[(uint32_t)(q * (n - 1))];
}

static void
look_at_speed(struct rollout *r)
{
	const struct side *a = &r->side[0], *b = &r->side[1];
	double base, cand;
	char why[64];

	if (r->p99 == 0 || a->n < LEAST || b->n < LEAST || b->n % LOOK_EVERY != 0)
		return;
	base = percentile(a->token_ms, a->n, 0.99), cand = percentile(b->token_ms, b->n, 0.99);
	r->slow_looks = cand > base * (1 + r->p99) ? r->slow_looks + 1 : 0;
	if (r->slow_looks < LOOKS)
		return;
	snprintf(why, sizeof(why), "guardrail: p99 %.2f ms a token, baseline %.2f", cand, base);
	rollout_breach(r, why);
}

void
rollout_take(struct rollout *r, const struct request *q)
{
	bool candidate = q->rollout && q->plan != NULL;
	struct side *s = &r->side[candidate];

	if (r->plan == NULL || q->done != NULL || (q->plan != NULL && !q->rollout) || q->replay != NULL)
		return;
	s->requests++;
	s->tokens += q->n_output;
	s->failed += q->finish == WIRE_FINISH_ERROR;
	if (q->n_output > 0) {
		s->first_ms[s->n % WINDOW] = (float)(q->first_ms - q->submitted_ms);
		s->token_ms[s->n % WINDOW] = (float)((q->done_ms - q->submitted_ms) / q->n_output);
		s->n++;
	}
	if (candidate)
		look_at_speed(r);
}

/* ---- steps ---- */

static void
begin(struct rollout *r, struct plan *plan, const char *policy)
{
	plan_unref(&r->plan);
	r->plan = plan_ref(plan);
	snprintf(r->policy, sizeof(r->policy), "%s", policy);
	memset(r->side, 0, sizeof(r->side));
	r->slow_looks = 0;
	r->salt = hash(0, &plan->digest, sizeof(plan->digest));
	if (r->kl > 0 || r->agree > 0)
		shadow_guard(r->d->shadow, plan->digest, r->kl, r->agree, 0.1);
}

static void
on_retired(struct flip *f)
{
	struct rollout *r = f->owner;

	plan_unref(&f->plan);
	r->retiring = false;
	r->d->measuring--;
}

/* From the next step on requests of the candidate follow the active plan. */
static void
end(struct rollout *r)
{
	plan_unref(&r->plan);
	if (r->retiring)
		return;
	r->retire = (struct flip){.plan = plan_ref(flipper_plan(r->d->flips)), .epoch = flipper_epoch(r->d->flips), .owner = r,
	    .retire_rollout = true, .done = on_retired};
	r->retiring = true;
	r->d->measuring++;
	engine_flip(r->d->engine, &r->retire);
}

/* What a start of the daemon reads: rollout_resume(). */
static void
describe(const struct rollout *r, char *out, size_t len)
{
	snprintf(out, len, "percent=%.6g by=%s kl=%.6g agree=%.6g p99=%.6g", r->percent, r->by_request ? "request" : "client", r->kl,
	    r->agree, r->p99);
}

static struct flip_ask
note(const struct rollout *r, const char *step, const struct flip_who *who, struct plan *plan)
{
	struct flip_ask ask = {.kind = FLIP_NOTE, .who = *who, .note_plan = plan_ref(plan)};

	snprintf(ask.why, sizeof(ask.why), "rollout: %.50s", step);
	snprintf(ask.policy, sizeof(ask.policy), "%s", r->policy);
	describe(r, ask.note, sizeof(ask.note));
	return ask;
}

struct step {
	struct rollout *r;
	struct call *call; /* NULL: nobody waits */
};

static void
answer(struct step *s, int rc, const struct err *err)
{
	if (s->call != NULL && rc != 0)
		call_refuse(s->call, rc, err->text);
	else if (s->call != NULL)
		call_reply(s->call, json_pack("{s:o}", "rollout", rollout_json(s->r)));
	free(s);
}

static void
on_noted(void *arg, int rc, const struct err *err, const struct flip_result *result)
{
	struct step *s = arg;

	if (rc == 0)
		s->r->epoch = result->epoch;
	answer(s, rc, err);
}

static void
on_started(void *arg, int rc, const struct err *err, const struct flip_result *result)
{
	struct step *s = arg;

	if (rc != 0)
		end(s->r);
	on_noted(s, rc, err, result);
}

static void
on_promoted(void *arg, int rc, const struct err *err, const struct flip_result *result)
{
	struct step *s = arg;
	struct flip_who who = {.uid = getuid(), .pid = (uint32_t)getpid(), .program = "octetd"};
	struct flip_ask ask;

	(void)result;
	if (rc == 0 && s->r->plan != NULL) {
		ask = note(s->r, "promote", &who, s->r->plan);
		end(s->r);
		flip_ask(s->r->d->flips, &ask, on_noted, s);
		return;
	}
	answer(s, rc, err);
}

static void
write_note(struct rollout *r, struct call *call, const char *what, const struct flip_who *who, struct plan *plan, flip_done done)
{
	struct step *s = calloc(1, sizeof(*s));
	struct flip_ask ask = note(r, what, who, plan);

	if (s == NULL) {
		plan_unref(&ask.note_plan);
		if (call != NULL)
			call_refuse(call, -ENOMEM, "out of memory");
		return;
	}
	*s = (struct step){r, call};
	log_info("rollout", "step=%s policy=%s percent=%g uid=%u program=%s", LOG_Q(what), LOG_Q(r->policy), r->percent, who->uid,
	    LOG_Q(who->program));
	flip_ask(r->d->flips, &ask, done, s);
}

/* The plan first, the journal after it: nothing may delay it. */
static void
abort_rollout(struct rollout *r, struct call *call, const char *what, const struct flip_who *who)
{
	struct plan *plan = plan_ref(r->plan);

	end(r);
	write_note(r, call, what, who, plan, on_noted);
	plan_unref(&plan);
}

void
rollout_breach(struct rollout *r, const char *why)
{
	struct flip_who who = {.uid = getuid(), .pid = (uint32_t)getpid(), .program = "guardrail"};
	char what[64];

	if (r->plan == NULL)
		return;
	snprintf(what, sizeof(what), "abort: %.50s", why);
	abort_rollout(r, NULL, what, &who);
}

/* ---- the verb ---- */

/* "kl=0.01,agree=0.98,p99_ms=+10%" */
static int
parse_guard(const char *text, struct rollout *r, struct err *err)
{
	char copy[128], *save = NULL;

	snprintf(copy, sizeof(copy), "%s", text);
	for (char *w = strtok_r(copy, ",", &save); w != NULL; w = strtok_r(NULL, ",", &save)) {
		double *to = strncmp(w, "kl=", 3) == 0 ? &r->kl : strncmp(w, "agree=", 6) == 0 ? &r->agree
		    : strncmp(w, "p99_ms=", 7) == 0                                          ? &r->p99
		                                                                              : NULL;
		char *value = strchr(w, '='), *stop;
		double v = value != NULL ? strtod(value + 1, &stop) : 0;

		if (to == NULL || stop == value + 1 || !isfinite(v) || v <= 0 || (to == &r->p99 ? strcmp(stop, "%") != 0 : *stop != '\0') ||
		    (to != &r->p99 && v >= 1))
			return err_set(err, -EINVAL, "rollout: guard '%.60s': write kl=0.01, agree=0.98, p99_ms=+10%%", w);
		*to = to == &r->p99 ? v / 100 : v;
	}
	return 0;
}

static struct flip_who
who_of(const struct call *call)
{
	const struct peer *p = call_peer(call);
	struct flip_who who = {.uid = p->uid, .pid = (uint32_t)p->pid};

	snprintf(who.program, sizeof(who.program), "%s", p->program);
	return who;
}

static int
get_percent(const json_t *request, double *out, struct err *err)
{
	const char *text = json_string_value(json_object_get(request, "percent"));
	char *end = NULL;

	*out = text != NULL ? strtod(text, &end) : -1;
	if (text == NULL || end == text || (*end != '\0' && strcmp(end, "%") != 0) || !(*out >= 0 && *out <= 100))
		return err_set(err, -EINVAL, "rollout: a per cent is 0 to 100");
	return 0;
}

static int
start(struct octetd *d, struct call *call, const json_t *request, struct err *err)
{
	const char *policy = json_string_value(json_object_get(request, "policy"));
	const char *by = json_string_value(json_object_get(request, "by")), *guard = json_string_value(json_object_get(request, "guard"));
	struct rollout *r = d->rollout, old = *r;
	struct flip_who who = who_of(call);
	struct plan *plan = NULL;
	int rc;

	if (r->plan != NULL)
		return err_set(err, -EBUSY, "a rollout of %s is under way: promote or abort it first", r->policy);
	if (policy == NULL || strlen(policy) >= sizeof(r->policy))
		return err_set(err, -EINVAL, "rollout: 'policy' is missing");
	if (by != NULL && strcmp(by, "client") != 0 && strcmp(by, "request") != 0)
		return err_set(err, -EINVAL, "rollout: by is client or request");
	r->kl = r->agree = r->p99 = 0;
	if ((rc = get_percent(request, &r->percent, err)) != 0 || (guard != NULL && (rc = parse_guard(guard, r, err)) != 0) ||
	    (rc = octetd_policy_plan(d->conf, policy, d->model->shape.n_layers, &plan, err)) != 0) {
		r->percent = old.percent, r->kl = old.kl, r->agree = old.agree, r->p99 = old.p99;
		return rc;
	}
	r->by_request = by != NULL && strcmp(by, "request") == 0;
	r->epoch = flipper_epoch(d->flips);
	begin(r, plan, policy);
	write_note(r, call, "start", &who, plan, on_started);
	plan_unref(&plan);
	return VERB_LATER;
}

static int
exec_rollout(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	const char *op = json_string_value(json_object_get(request, "op"));
	struct rollout *r = d->rollout;
	struct flip_who who = who_of(call);
	struct flip_ask ask = {.kind = FLIP_USE, .who = who};
	struct step *s;
	double percent;
	int rc;

	if (strcmp(op, "status") == 0) {
		*reply = json_pack("{s:o}", "rollout", rollout_json(r));
		return *reply != NULL ? 0 : err_set(err, -ENOMEM, "out of memory");
	}
	if (!call_is_operator(call))
		return err_set(err, -EACCES, "rollout: to change it needs an operator");
	if (strcmp(op, "start") == 0)
		return start(d, call, request, err);
	if (r->plan == NULL)
		return err_set(err, -ENOENT, "there is no rollout");
	if (strcmp(op, "percent") == 0) {
		if ((rc = get_percent(request, &percent, err)) != 0)
			return rc;
		r->percent = percent;
		write_note(r, call, "percent", &who, r->plan, on_noted);
	} else if (strcmp(op, "abort") == 0)
		abort_rollout(r, call, "abort", &who);
	else if (strcmp(op, "promote") == 0) {
		if ((s = calloc(1, sizeof(*s))) == NULL)
			return err_set(err, -ENOMEM, "out of memory");
		*s = (struct step){r, call};
		snprintf(ask.policy, sizeof(ask.policy), "%s", r->policy);
		snprintf(ask.why, sizeof(ask.why), "use: rollout promoted");
		flip_ask(d->flips, &ask, on_promoted, s);
	} else
		return err_set(err, -EINVAL, "rollout: 'op' is start, percent, promote, abort or status");
	return VERB_LATER;
}

const struct verb verb_rollout = {"rollout", false, {{"op", FIELD_STRING, true}, {"policy", FIELD_STRING, false},
    {"percent", FIELD_STRING, false}, {"by", FIELD_STRING, false}, {"guard", FIELD_STRING, false}}, exec_rollout};

/* ---- what is shown ---- */

static json_t *
side_json(const struct side *s)
{
	return json_pack("{s:I,s:I,s:I,s:f,s:f,s:f,s:f}", "requests", (json_int_t)s->requests, "tokens", (json_int_t)s->tokens,
	    "failed", (json_int_t)s->failed, "ttft_ms_p50", percentile(s->first_ms, s->n, 0.5), "ttft_ms_p99",
	    percentile(s->first_ms, s->n, 0.99), "token_ms_p50", percentile(s->token_ms, s->n, 0.5), "token_ms_p99",
	    percentile(s->token_ms, s->n, 0.99));
}

json_t *
rollout_json(const struct rollout *r)
{
	if (r->plan == NULL)
		return json_null();
	return json_pack("{s:s,s:f,s:s,s:I,s:{s:f,s:f,s:f},s:o,s:o,s:o}", "policy", r->policy, "percent", r->percent, "by",
	    r->by_request ? "request" : "client", "epoch", (json_int_t)r->epoch, "guard", "kl", r->kl, "agree", r->agree, "p99_ms", r->p99,
	    "baseline", side_json(&r->side[0]), "candidate", side_json(&r->side[1]), "shadow",
	    shadow_plan_json(r->d->shadow, r->plan->digest));
}

json_t *
surge_json(const struct rollout *r)
{
	static const char *const names[] = {"off", "on", "yielded to an operator"};

	return json_pack("{s:s,s:s,s:I}", "policy", r->d->conf->surge_policy, "state", names[r->surge], "surges",
	    (json_int_t)r->surges);
}

/* ---- surge ---- */

static void
on_surge_flip(void *arg, int rc, const struct err *err, const struct flip_result *result)
{
	struct rollout *r = arg;

	(void)err;
	r->flipping = false;
	if (r->surge == SURGE_ON) {
		if (rc == 0)
			r->surge = SURGE_OFF;
		else
			r->surge = SURGE_YIELDED; /* gone from the journal, or waits for a confirmation: not ours to force */
	} else if (rc == 0 && result->changed) {
		r->surge = SURGE_ON;
		r->surge_epoch = result->epoch;
		r->surges++;
	}
	r->since_us = octetd_now_us();
	r->not_before_us = r->since_us + (int64_t)r->d->conf->surge_min_hold_s * 1000000;
}

static void
on_surge(uv_timer_t *t)
{
	struct rollout *r = t->data;
	const struct conf *c = r->d->conf;
	struct flip_ask ask = {.who = {.uid = getuid(), .pid = (uint32_t)getpid(), .program = "surge"}};
	struct engine_stats st;

	if (*c->surge_policy == '\0' || r->flipping || r->d->draining)
		return;
	engine_stats(r->d->engine, &st);
	if (r->surge == SURGE_ON && flipper_epoch(r->d->flips) != r->surge_epoch)
		r->surge = SURGE_YIELDED;
	if (r->surge == SURGE_YIELDED && st.queue_ms <= c->surge_leave_queue_ms)
		r->surge = SURGE_OFF;
	if (octetd_now_us() < r->not_before_us)
		return;
	if (r->surge == SURGE_OFF && st.queue_ms > c->surge_enter_queue_ms) {
		ask.kind = FLIP_USE;
		snprintf(ask.policy, sizeof(ask.policy), "%.63s", c->surge_policy);
		snprintf(ask.why, sizeof(ask.why), "use: surge: the oldest waits %.0f ms", st.queue_ms);
		r->back_to = flipper_epoch(r->d->flips);
	} else if (r->surge == SURGE_ON && st.queue_ms <= c->surge_leave_queue_ms) {
		ask.kind = FLIP_ROLLBACK;
		ask.has_to = true, ask.to = r->back_to;
		ask.has_if_epoch = true, ask.if_epoch = r->surge_epoch;
		snprintf(ask.why, sizeof(ask.why), "rollback: surge is over");
	} else
		return;
	r->flipping = true;
	flip_ask(r->d->flips, &ask, on_surge_flip, r);
}

/* ---- life ---- */

static void
resume(struct rollout *r)
{
	struct journal_record last;
	char by[16] = "";
	struct plan *plan;

	if (!journal_last_rollout(r->d->journal, &last) || strncmp(last.why, "rollout: abort", 14) == 0 ||
	    strncmp(last.why, "rollout: promote", 16) == 0 ||
	    sscanf(last.change, "percent=%lf by=%15s kl=%lf agree=%lf p99=%lf", &r->percent, by, &r->kl, &r->agree, &r->p99) != 5)
		return;
	plan = journal_plan(r->d->journal, last.plan);
	if (plan == NULL)
		return;
	r->by_request = strcmp(by, "request") == 0;
	r->epoch = last.epoch;
	begin(r, plan, last.policy);
	log_info("rollout", "step=resume policy=%s percent=%g", LOG_Q(r->policy), r->percent);
	plan_unref(&plan);
}

int
rollout_new(struct rollout **out, struct octetd *d, struct err *err)
{
	struct rollout *r = calloc(1, sizeof(*r));

	*out = r;
	if (r == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	r->d = d;
	uv_timer_init(&d->loop, &r->timer);
	r->timer.data = r;
	uv_timer_start(&r->timer, on_surge, SURGE_MS, SURGE_MS);
	resume(r);
	return 0;
}

static void
on_closed(uv_handle_t *h)
{
	struct rollout *r = h->data;

	plan_unref(&r->plan);
	free(r);
}

void
rollout_free(struct rollout **rp)
{
	if (*rp == NULL)
		return;
	uv_close((uv_handle_t *)&(*rp)->timer, on_closed);
	*rp = NULL;
}
