/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/flip.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon/log.h"

#define RETRY_MS 2000u

/*   IDLE -> INTENT -> ENGINE -> APPLIED -> IDLE   a change
 *           INTENT -> IDLE                        the journal refused it
 *   IDLE -> RETRY -> IDLE                         records that wait for the journal
 * INTENT, APPLIED and RETRY run on the thread pool. */
enum state { FLIP_IDLE, FLIP_INTENT, FLIP_ENGINE, FLIP_APPLIED, FLIP_RETRY };

struct job {
	struct job *next;
	struct flip_ask ask;
	flip_done done;
	void *arg;

	struct plan *plan;         /* what will be active */
	char *change;              /* plan_diff() */
	uint32_t sites;
	uint64_t file_policy;
	bool unjournaled;          /* a rollback whose intent could not be written */
	struct journal_record rec;
	struct flip flip;
	int rc;                    /* of the work */
	struct err err;
};

struct flipper {
	struct flip_config cfg;
	uv_timer_t retry, confirm;
	int closing;               /* timers that are not closed yet */
	uint64_t unconfirmed;      /* epoch, 0: none */
	uv_work_t work;
	enum state state;
	bool dispatching, draining;
	struct job *now, *queue, **queue_end;
	uint32_t n_unwritten;      /* changes that the journal has in memory only */
	uint64_t last_epoch, changes;

	struct plan *active;
	uint64_t epoch, file_policy;
	char policy[64];
};

static const char *const kind_names[] = {"set", "use", "rollback", "reload", "confirm", "note"};

static void dispatch(struct flipper *);

static void
set_state(struct flipper *f, enum state to)
{
	static const bool may[5][5] = {
		[FLIP_IDLE] = {[FLIP_INTENT] = true, [FLIP_RETRY] = true},
		[FLIP_INTENT] = {[FLIP_ENGINE] = true, [FLIP_IDLE] = true},
		[FLIP_ENGINE] = {[FLIP_APPLIED] = true},
		[FLIP_APPLIED] = {[FLIP_IDLE] = true},
		[FLIP_RETRY] = {[FLIP_IDLE] = true},
	};

	if (!may[f->state][to])
		abort(); /* our own bug */
	f->state = to;
}

/* Copies what fits, in whole characters; bytes that are no UTF-8 become '?'. */
static void
copy_text(char *to, size_t len, const char *from)
{
	size_t n = strlen(from);
	json_t *valid;

	if (n >= len)
		for (n = len - 1; n > 0 && ((unsigned char)from[n] & 0xc0) == 0x80;)
			n--;
	memcpy(to, from, n);
	to[n] = '\0';
	valid = json_stringn(to, n);
	for (size_t i = 0; i < n; i++)
		if ((unsigned char)to[i] < ' ' || to[i] == 0x7f || (valid == NULL && (unsigned char)to[i] > '~'))
			to[i] = '?';
	json_decref(valid);
}

void
flip_rules_free(char ***rule, size_t n)
{
	if (*rule == NULL)
		return;
	for (size_t i = 0; i < n; i++)
		free((*rule)[i]);
	free(*rule);
	*rule = NULL;
}

static void
job_free(struct job **jp)
{
	struct job *j = *jp;

	if (j == NULL)
		return;
	flip_rules_free(&j->ask.rule, j->ask.n_rules);
	plan_unref(&j->plan);
	plan_unref(&j->ask.note_plan);
	free(j->change);
	free(j);
	*jp = NULL;
}

static int64_t
now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

/* ---- what the new plan is, and its label ---- */

/* "fp8" -> "fp8 + 1 change" -> "fp8 + 2 changes" */
static void
label_one_more(char *out, size_t len, const char *old)
{
	const char *plus = strstr(old, " + ");
	unsigned n = 0, name;
	char tail[32];

	if (plus == NULL || sscanf(plus, " + %u change", &n) != 1)
		plus = old + strlen(old);
	snprintf(tail, sizeof(tail), " + %u change%s", n + 1, n == 0 ? "" : "s");
	name = (unsigned)(plus - old);
	if (name > len - 1 - strlen(tail))
		name = (unsigned)(len - 1 - strlen(tail));
	snprintf(out, len, "%.*s%s", (int)name, old, tail);
}

static char *
trimmed(char *s)
{
	size_t n;

	while (*s == ' ' || *s == '\t')
		s++;
	for (n = strlen(s); n > 0 && (s[n - 1] == ' ' || s[n - 1] == '\t');)
		s[--n] = '\0';
	return s;
}

static int
derive_set(struct flipper *f, struct job *j, struct err *err)
{
	struct plan_rule *rules;
	int rc = 0;

	if (j->ask.n_rules == 0)
		return err_set(err, -EINVAL, "no rule: write SELECTOR=FORMAT");
	rules = calloc(j->ask.n_rules, sizeof(*rules));
	if (rules == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (size_t i = 0; i < j->ask.n_rules && rc == 0; i++) {
		char *equals = strrchr(j->ask.rule[i], '=');

		if (equals == NULL) {
			rc = err_set(err, -EINVAL, "rule '%.60s': write SELECTOR=FORMAT", j->ask.rule[i]);
			break;
		}
		*equals = '\0';
		rules[i].selector = trimmed(j->ask.rule[i]);
		rules[i].format = trimmed(equals + 1);
	}
	if (rc == 0)
		rc = plan_derive(&j->plan, f->active, f->cfg.n_layers, rules, j->ask.n_rules, err);
	free(rules);
	label_one_more(j->rec.policy, sizeof(j->rec.policy), f->policy);
	return rc;
}

/* The record of an epoch as the history has it. */
static int
find_epoch(struct flipper *f, uint64_t epoch, struct journal_record *out, struct err *err)
{
	struct journal_entry *list = NULL;
	uint32_t n = journal_history(f->cfg.journal, &list);
	int rc = err_set(err, -ENOENT, "epoch %" PRIu64 " is not in the journal", epoch);

	for (uint32_t i = 0; i < n; i++) {
		if (list[i].r.epoch != epoch)
			continue;
		*out = list[i].r;
		rc = 0;
		if (list[i].r.kind == JOURNAL_ROLLOUT)
			rc = err_set(err, -EINVAL, "epoch %" PRIu64 " is a step of a rollout, not a plan", epoch);
		if (strcmp(list[i].outcome, "applied") != 0)
			rc = err_set(err, -EINVAL, "epoch %" PRIu64 " never ran: %s", epoch, list[i].outcome);
	}
	free(list);
	return rc;
}

static int
derive_rollback(struct flipper *f, struct job *j, struct err *err)
{
	struct journal_record back = {0};
	uint64_t digest = 0;
	int rc;

	if (j->ask.has_to)
		j->rec.back_to = j->ask.to;
	else if ((rc = journal_rollback_target(f->cfg.journal, &j->rec.undoes, &j->rec.back_to, &digest, err)) != 0)
		return rc;
	rc = find_epoch(f, j->rec.back_to, &back, err);
	if (rc != 0)
		return rc;
	j->plan = journal_plan(f->cfg.journal, j->ask.has_to ? back.plan : digest);
	if (j->plan == NULL)
		return err_set(err, -ENOENT, "the plan of epoch %" PRIu64 " is of another model", j->rec.back_to);
	copy_text(j->rec.policy, sizeof(j->rec.policy), back.policy);
	return 0;
}

static int
derive(struct flipper *f, struct job *j, struct err *err)
{
	char label[sizeof(j->rec.policy)] = "";
	int rc = 0;

	j->file_policy = f->file_policy;
	switch (j->ask.kind) {
	case FLIP_SET: return derive_set(f, j, err);
	case FLIP_ROLLBACK: return derive_rollback(f, j, err);
	case FLIP_USE:
		rc = f->cfg.policy_plan(f->cfg.policy_arg, j->ask.policy, &j->plan, err);
		copy_text(j->rec.policy, sizeof(j->rec.policy), j->ask.policy);
		break;
	case FLIP_CONFIRM: break;
	case FLIP_NOTE:
		j->plan = plan_ref(j->ask.note_plan);
		copy_text(j->rec.policy, sizeof(j->rec.policy), j->ask.policy);
		break;
	case FLIP_RELOAD:
		rc = j->ask.prepare(j->ask.prepare_arg, &j->plan, label, &j->file_policy, err);
		copy_text(j->rec.policy, sizeof(j->rec.policy), label);
		break;
	}
	return rc;
}

/* ---- ends ---- */

/* Answers and frees the job. */
static void
finish(struct flipper *f, struct job *j, int rc, bool changed)
{
	struct flip_result r = {.epoch = j->ask.kind == FLIP_NOTE && rc == 0 ? j->rec.epoch : f->epoch, .changed = changed,
	    .dry_run = j->ask.dry_run, .sites = j->sites, .unjournaled = changed && j->unjournaled,
	    .change = j->change != NULL ? j->change : "", .policy = f->policy, .step = changed ? j->flip.step : 0,
	    .plan_digest = f->active->digest};
	const struct flip_who *w = &j->ask.who;

	if (rc == 0 && j->ask.dry_run && j->plan != NULL) {
		r.policy = j->rec.policy;
		r.plan_digest = j->plan->digest;
	}
	if (rc != 0)
		log_warn("flip.refused", "verb=%s uid=%u pid=%u program=%s why=%s", kind_names[j->ask.kind], w->uid, w->pid,
		    LOG_Q(w->program), LOG_Q(j->err.text));
	else if (changed)
		log_info("flip", "epoch=%" PRIu64 " verb=%s uid=%u pid=%u program=%s policy=%s plan=%016" PRIx64
		    " sites=%u change=%s step=%" PRIu64 "%s", f->epoch, kind_names[j->ask.kind], w->uid, w->pid,
		    LOG_Q(w->program), LOG_Q(f->policy), f->active->digest, j->sites, LOG_Q(j->rec.change), j->flip.step,
		    j->unjournaled ? " unjournaled=true" : "");
	j->done(j->arg, rc, &j->err, &r);
	job_free(&j);
}

/* ---- on the thread pool ---- */

static void
work_intent(uv_work_t *w)
{
	struct flipper *f = w->data;
	struct job *j = f->now;

	j->rc = journal_append(f->cfg.journal, &j->rec, j->plan, &j->err);
}

static void
work_applied(uv_work_t *w)
{
	struct flipper *f = w->data;
	struct job *j = f->now;

	j->rc = j->unjournaled ? -EAGAIN : journal_append(f->cfg.journal, &j->rec, j->plan, &j->err);
}

static void
work_retry(uv_work_t *w)
{
	struct flipper *f = w->data;
	struct err err;

	journal_flush(f->cfg.journal, &err);
}

/* ---- back on the loop ---- */

static void
count_unwritten(struct flipper *f)
{
	uint32_t n = journal_unwritten(f->cfg.journal);

	if (n == 0 && f->n_unwritten > 0) {
		log_info("journal.caught_up", "epoch=%" PRIu64, f->epoch);
		uv_timer_stop(&f->retry);
	}
	if (n != f->n_unwritten)
		f->changes++;
	f->n_unwritten = n;
}

static void
after_retry(uv_work_t *w, int status)
{
	struct flipper *f = w->data;

	(void)status;
	set_state(f, FLIP_IDLE);
	count_unwritten(f);
	dispatch(f);
}

static void
on_retry(uv_timer_t *t)
{
	struct flipper *f = t->data;

	if (f->state != FLIP_IDLE || f->n_unwritten == 0)
		return; /* an intent takes them along */
	set_state(f, FLIP_RETRY);
	if (uv_queue_work(f->cfg.loop, &f->work, work_retry, after_retry) != 0)
		set_state(f, FLIP_IDLE);
}

/* Keeps an applied change for later; what runs is the truth. */
static void
remember(struct flipper *f, const struct job *j, bool needs_intent)
{
	struct journal_record intent = j->rec;

	log_error("journal.unwritten", "epoch=%" PRIu64 " why=%s", j->rec.epoch, LOG_Q(j->err.text));
	intent.kind = JOURNAL_INTENT;
	if (needs_intent)
		journal_remember(f->cfg.journal, &intent, j->plan);
	journal_remember(f->cfg.journal, &j->rec, j->plan);
	uv_timer_start(&f->retry, on_retry, RETRY_MS, RETRY_MS);
}

static void
on_expired_done(void *arg, int rc, const struct err *err, const struct flip_result *r)
{
	(void)arg, (void)rc, (void)err, (void)r; /* both ends are logged */
}

/* Nobody confirmed it in time. */
static void
on_expired(uv_timer_t *t)
{
	struct flipper *f = t->data;
	struct flip_ask ask = {.kind = FLIP_ROLLBACK, .expired = true, .has_if_epoch = true, .if_epoch = f->unconfirmed,
	    .who = {.uid = getuid(), .pid = (uint32_t)getpid(), .program = "octetd"}};

	snprintf(ask.why, sizeof(ask.why), "rollback: epoch %" PRIu64 " was not confirmed", f->unconfirmed);
	flip_ask(f, &ask, on_expired_done, NULL);
}

/* What was just applied settles what waited, and may wait itself. */
static void
settle(struct flipper *f, const struct job *j)
{
	uv_timer_stop(&f->confirm);
	f->unconfirmed = j->rec.confirm_s != 0 ? f->epoch : 0;
	if (f->unconfirmed != 0)
		uv_timer_start(&f->confirm, on_expired, (uint64_t)j->rec.confirm_s * 1000, 0);
}

static void
after_applied(uv_work_t *w, int status)
{
	struct flipper *f = w->data;
	struct job *j = f->now;

	(void)status;
	if (j->rc != 0) {
		bool needs_intent = j->unjournaled;

		j->unjournaled = true;
		remember(f, j, needs_intent);
	}
	count_unwritten(f);
	settle(f, j);
	f->changes++;
	f->now = NULL;
	set_state(f, FLIP_IDLE);
	finish(f, j, 0, true);
	dispatch(f);
}

void
flipper_reaped(struct flipper *f, struct flip *list)
{
	struct job *j = f->now;

	if (list == NULL)
		return;
	/* One change at a time: the list has one. */
	plan_unref(&j->flip.plan);
	plan_unref(&f->active);
	f->active = plan_ref(j->plan);
	f->epoch = j->flip.epoch;
	f->file_policy = j->file_policy;
	memcpy(f->policy, j->rec.policy, sizeof(f->policy));
	j->rec.kind = JOURNAL_APPLIED;
	j->rec.step = j->flip.step;
	j->rec.time_us = now_us();
	set_state(f, FLIP_APPLIED);
	if (uv_queue_work(f->cfg.loop, &f->work, work_applied, after_applied) != 0) {
		j->rc = err_set(&j->err, -ENOMEM, "no thread for the journal");
		after_applied(&f->work, 0);
	}
}

static void
refuse_unjournaled(struct flipper *f, struct job *j)
{
	char why[sizeof(j->err.text)];

	snprintf(why, sizeof(why), "%.490s", j->err.text);
	err_set(&j->err, j->rc, "%s%.480s: nothing changed", strstr(why, "journal") != NULL ? "" : "journal: ", why);
	f->now = NULL;
	set_state(f, FLIP_IDLE);
	finish(f, j, j->rc, false);
	dispatch(f);
}

static void
after_intent(uv_work_t *w, int status)
{
	struct flipper *f = w->data;
	struct job *j = f->now;

	(void)status;
	count_unwritten(f);
	if (j->rc != 0 && j->ask.kind != FLIP_ROLLBACK) {
		refuse_unjournaled(f, j);
		return;
	}
	if (j->ask.kind == FLIP_CONFIRM) {
		uv_timer_stop(&f->confirm);
		f->unconfirmed = 0;
		f->changes++;
		f->now = NULL;
		set_state(f, FLIP_IDLE);
		finish(f, j, 0, false);
		dispatch(f);
		return;
	}
	if (j->ask.kind == FLIP_NOTE) {
		f->changes++;
		f->now = NULL;
		set_state(f, FLIP_IDLE);
		finish(f, j, 0, false);
		dispatch(f);
		return;
	}
	j->unjournaled = j->rc != 0;
	j->flip = (struct flip){.plan = plan_ref(j->plan), .epoch = j->rec.epoch, .owner = j,
	    .force = j->ask.kind == FLIP_ROLLBACK};
	set_state(f, FLIP_ENGINE);
	engine_flip(f->cfg.engine, &j->flip);
}

/* ---- the queue ---- */

static void
fill_record(struct flipper *f, struct job *j)
{
	struct journal_record *r = &j->rec;

	r->kind = JOURNAL_INTENT;
	if (j->ask.kind == FLIP_CONFIRM) {
		r->kind = JOURNAL_CONFIRMED;
		r->epoch = f->unconfirmed;
	} else
		r->epoch = ++f->last_epoch;
	if (j->ask.kind == FLIP_NOTE)
		r->kind = JOURNAL_ROLLOUT;
	r->confirm_s = j->ask.confirm_s;
	r->time_us = now_us();
	r->uid = j->ask.who.uid;
	r->pid = j->ask.who.pid;
	copy_text(r->program, sizeof(r->program), j->ask.who.program);
	copy_text(r->why, sizeof(r->why), *j->ask.why != '\0' ? j->ask.why : kind_names[j->ask.kind]);
	copy_text(r->change, sizeof(r->change), j->change);
	if (strlen(j->change) >= sizeof(r->change))
		memcpy(r->change + sizeof(r->change) - 4, "...", 4);
	r->plan = j->plan->digest;
	r->file_policy = j->file_policy;
}

/* Everything that can refuse a change without touching anything. */
static int
check(struct flipper *f, struct job *j)
{
	int rc = 0;

	if (j->ask.has_if_epoch && j->ask.if_epoch != f->epoch)
		return err_set(&j->err, -ESTALE, "epoch is %" PRIu64 ", not %" PRIu64 ": somebody changed the plan in between",
		    f->epoch, j->ask.if_epoch);
	if (j->ask.expired && f->unconfirmed != j->ask.if_epoch)
		return err_set(&j->err, -ESTALE, "epoch %" PRIu64 " was confirmed", j->ask.if_epoch);
	if (j->ask.kind == FLIP_CONFIRM && (f->unconfirmed == 0 || (j->ask.has_to && j->ask.to != f->unconfirmed)))
		return f->unconfirmed == 0 ? err_set(&j->err, -ENOENT, "no change waits for a confirmation")
		                           : err_set(&j->err, -ESTALE, "epoch %" PRIu64 " waits for a confirmation, not %" PRIu64,
		                                 f->unconfirmed, j->ask.to);
	if (j->ask.kind == FLIP_CONFIRM)
		j->plan = plan_ref(f->active);
	rc = derive(f, j, &j->err);
	if (rc != 0 || j->plan == NULL)
		return rc;
	if (f->unconfirmed != 0 && j->ask.kind != FLIP_ROLLBACK && j->ask.kind != FLIP_CONFIRM &&
	    j->ask.kind != FLIP_NOTE)
		return err_set(&j->err, -EBUSY, "epoch %" PRIu64 " waits for its confirmation: confirm it or roll it back first",
		    f->unconfirmed);
	j->change = j->ask.kind == FLIP_NOTE ? strdup(j->ask.note) : plan_diff(f->active, j->plan);
	if (j->change == NULL)
		return err_set(&j->err, -ENOMEM, "out of memory");
	j->sites = plan_distance(f->active, j->plan);
	return 0;
}

static void
start(struct flipper *f, struct job *j)
{
	bool same;

	j->rc = check(f, j);
	/* A plain rollback walks on even over a change that left no trace, or
	 * it could never get behind it. */
	same = j->ask.kind != FLIP_CONFIRM && j->ask.kind != FLIP_NOTE &&
	    (j->plan == NULL || (j->plan->digest == f->active->digest && j->rec.undoes == 0));
	if (j->rc == 0 && !j->ask.dry_run && same)
		f->file_policy = j->file_policy;
	if (j->rc != 0 || j->ask.dry_run || same) {
		finish(f, j, j->rc, false);
		return;
	}
	fill_record(f, j);
	f->now = j;
	set_state(f, FLIP_INTENT);
	if (uv_queue_work(f->cfg.loop, &f->work, work_intent, after_intent) != 0) {
		j->rc = err_set(&j->err, -ENOMEM, "no thread for the journal");
		after_intent(&f->work, 0);
	}
}

static void
dispatch(struct flipper *f)
{
	if (f->dispatching)
		return;
	f->dispatching = true;
	while (f->state == FLIP_IDLE && f->queue != NULL) {
		struct job *j = f->queue;

		f->queue = j->next;
		if (f->queue == NULL)
			f->queue_end = &f->queue;
		start(f, j);
	}
	f->dispatching = false;
}

void
flip_ask(struct flipper *f, struct flip_ask *ask, flip_done done, void *arg)
{
	struct job *j = calloc(1, sizeof(*j));
	struct flip_result none = {.epoch = f->epoch, .change = "", .policy = f->policy, .plan_digest = f->active->digest};
	struct err err;
	int rc = 0;

	if (j == NULL)
		rc = err_set(&err, -ENOMEM, "out of memory");
	else if (f->draining)
		rc = err_set(&err, -ESHUTDOWN, "octetd is stopping");
	if (rc != 0) {
		flip_rules_free(&ask->rule, ask->n_rules);
		plan_unref(&ask->note_plan);
		free(j);
		done(arg, rc, &err, &none);
		return;
	}
	j->ask = *ask;
	ask->rule = NULL;
	j->done = done, j->arg = arg;
	*f->queue_end = j;
	f->queue_end = &j->next;
	dispatch(f);
}

/* ---- life ---- */

int
flipper_new(struct flipper **out, const struct flip_config *cfg, struct plan *active, uint64_t epoch, const char *policy,
    uint64_t file_policy, struct err *err)
{
	struct flipper *f = calloc(1, sizeof(*f));

	*out = NULL;
	if (f == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	f->cfg = *cfg;
	f->queue_end = &f->queue;
	f->active = plan_ref(active);
	f->epoch = f->last_epoch = epoch;
	f->file_policy = file_policy;
	copy_text(f->policy, sizeof(f->policy), policy);
	uv_timer_init(cfg->loop, &f->retry);
	uv_timer_init(cfg->loop, &f->confirm);
	f->retry.data = f->confirm.data = f->work.data = f;
	*out = f;
	return 0;
}

static void
on_closed(uv_handle_t *h)
{
	struct flipper *f = h->data;

	if (--f->closing == 0)
		free(f);
}

void
flipper_free(struct flipper **fp)
{
	struct flipper *f = *fp;
	struct err err;

	if (f == NULL)
		return;
	if (f->n_unwritten > 0 && journal_flush(f->cfg.journal, &err) != 0)
		log_error("journal.lost", "epoch=%" PRIu64 " why=%s", f->epoch, LOG_Q(err.text));
	plan_unref(&f->active);
	f->closing = 2;
	uv_close((uv_handle_t *)&f->retry, on_closed);
	uv_close((uv_handle_t *)&f->confirm, on_closed);
	*fp = NULL;
}

void
flipper_drain(struct flipper *f)
{
	f->draining = true;
}

bool
flipper_idle(const struct flipper *f)
{
	return f->state == FLIP_IDLE && f->queue == NULL;
}

struct plan *
flipper_plan(const struct flipper *f)
{
	return f->active;
}

struct plan *
flipper_next(const struct flipper *f)
{
	return (f->state == FLIP_INTENT || f->state == FLIP_ENGINE) && f->now->plan != NULL ? f->now->plan : f->active;
}

uint64_t
flipper_epoch(const struct flipper *f)
{
	return f->epoch;
}

const char *
flipper_policy(const struct flipper *f)
{
	return f->policy;
}

uint64_t
flipper_file_policy(const struct flipper *f)
{
	return f->file_policy;
}

uint64_t
flipper_unconfirmed(const struct flipper *f, uint32_t *seconds_left)
{
	*seconds_left = f->unconfirmed != 0 ? (uint32_t)((uv_timer_get_due_in(&f->confirm) + 999) / 1000) : 0;
	return f->unconfirmed;
}

uint32_t
flipper_unjournaled(const struct flipper *f)
{
	return f->n_unwritten;
}

uint64_t
flipper_changes(const struct flipper *f)
{
	return f->changes;
}
