/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A line is JSON, a blank, 16 hex digits of the SHA-256 of the JSON. Only the
 * last line may be torn; a bad line with whole ones after it is corruption and
 * refused, since it cannot be told what it said.
 *
 * Rollback, on the list of applied changes:
 *   1 start A | 2 set B | 3 set C | 4 rollback -> B (undoes 3) | 5 rollback -> A (undoes 2) | 6 rollback: nothing left
 *   then 7 set D | 8 rollback -> A (undoes 7) | 9: nothing left
 */
#include "daemon/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <pthread.h>
#include <sha2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_JOURNAL (1ll << 32)

static const char *const kind_name[] = {
	[JOURNAL_START] = "start", [JOURNAL_INTENT] = "intent", [JOURNAL_APPLIED] = "applied", [JOURNAL_FAILED] = "failed",
	[JOURNAL_CONFIRMED] = "confirmed", [JOURNAL_ROLLOUT] = "rollout"};
#define N_KINDS (sizeof(kind_name) / sizeof(*kind_name))

struct known_plan {
	uint64_t digest;
	struct plan *plan; /* NULL: of another shape */
	bool written;
};

struct journal {
	pthread_mutex_t lock;
	int dir_fd, lock_fd, fd;
	char *path;
	uint32_t n_layers;
	off_t end;                   /* of the last whole record */
	struct journal_record *rec;
	size_t n, cap, n_written;    /* the first n_written are in the file */
	struct known_plan *plan;
	size_t n_plans;
};

/* ---- memory ---- */

static int
remember(struct journal *j, const struct journal_record *r)
{
	if (j->n == j->cap) {
		size_t cap = j->cap == 0 ? 64 : j->cap * 2;
		struct journal_record *more = realloc(j->rec, cap * sizeof(*more));

		if (more == NULL)
			return -ENOMEM;
		j->rec = more;
		j->cap = cap;
	}
	j->rec[j->n++] = *r;
	return 0;
}

static struct known_plan *
find_plan(struct journal *j, uint64_t digest)
{
	for (size_t i = 0; i < j->n_plans; i++)
		if (j->plan[i].digest == digest)
			return &j->plan[i];
	return NULL;
}

/* Takes the reference. */
static int
add_plan(struct journal *j, uint64_t digest, struct plan *plan, bool written)
{
	struct known_plan *more = realloc(j->plan, (j->n_plans + 1) * sizeof(*more));

	if (more == NULL) {
		plan_unref(&plan);
		return -ENOMEM;
	}
	j->plan = more;
	j->plan[j->n_plans++] = (struct known_plan){digest, plan, written};
	return 0;
}

/* ---- records as JSON ---- */

static json_t *
hex(uint64_t v)
{
	char buf[17];

	snprintf(buf, sizeof(buf), "%016" PRIx64, v);
	return json_string(buf);
}

/* Names come from other processes: what is no UTF-8 becomes '?'. */
static json_t *
text(const char *s)
{
	json_t *o = json_string(s);
	char copy[512];

	if (o != NULL)
		return o;
	snprintf(copy, sizeof(copy), "%s", s);
	for (char *p = copy; *p != '\0'; p++)
		if ((unsigned char)*p >= 0x80)
			*p = '?';
	return json_string(copy);
}

static json_t *
to_json(const struct journal_record *r)
{
	return json_pack("{s:s,s:I,s:I,s:I,s:I,s:o,s:o,s:o,s:o,s:o,s:I,s:I,s:o,s:I,s:I,s:o}", "kind", kind_name[r->kind], "epoch",
	    (json_int_t)r->epoch, "time_us", (json_int_t)r->time_us, "uid", (json_int_t)r->uid, "pid", (json_int_t)r->pid,
	    "program", text(r->program), "why", text(r->why), "change", text(r->change), "policy", text(r->policy), "plan",
	    hex(r->plan), "undoes", (json_int_t)r->undoes, "back_to", (json_int_t)r->back_to, "file_policy",
	    hex(r->file_policy), "step", (json_int_t)r->step, "confirm_s", (json_int_t)r->confirm_s, "result",
	    text(r->result));
}

static uint64_t
get_hex(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));

	return s == NULL ? 0 : strtoull(s, NULL, 16);
}

static void
get_text(const json_t *o, const char *key, char *out, size_t len)
{
	const char *s = json_string_value(json_object_get(o, key));

	snprintf(out, len, "%s", s == NULL ? "" : s);
}

#define GET(key) json_integer_value(json_object_get(o, key))
#define GET_TEXT(field) get_text(o, #field, r->field, sizeof(r->field))

/* 0, or -EPROTO for a record that says nothing we know. */
static int
from_json(const json_t *o, struct journal_record *r)
{
	const char *kind = json_string_value(json_object_get(o, "kind"));

	memset(r, 0, sizeof(*r));
	for (size_t i = 0; kind != NULL && i < N_KINDS; i++) {
		if (strcmp(kind, kind_name[i]) != 0)
			continue;
		r->kind = (enum journal_kind)i;
		r->epoch = (uint64_t)GET("epoch");
		r->time_us = GET("time_us");
		r->uid = (uint32_t)GET("uid");
		r->pid = (uint32_t)GET("pid");
		r->undoes = (uint64_t)GET("undoes");
		r->back_to = (uint64_t)GET("back_to");
		r->step = (uint64_t)GET("step");
		r->confirm_s = (uint32_t)GET("confirm_s");
		r->plan = get_hex(o, "plan");
		r->file_policy = get_hex(o, "file_policy");
		GET_TEXT(program), GET_TEXT(why), GET_TEXT(change), GET_TEXT(policy), GET_TEXT(result);
		return 0;
	}
	return -EPROTO;
}

static void
checksum(const char *s, size_t n, char out[17])
{
	uint8_t sum[SHA256_DIGEST_LENGTH];
	SHA2_CTX sha;

	SHA256Init(&sha);
	SHA256Update(&sha, (const uint8_t *)s, n);
	SHA256Final(sum, &sha);
	for (int i = 0; i < 8; i++)
		snprintf(out + 2 * i, 3, "%02x", sum[i]);
}

/* ---- reading ---- */

/* One whole line without its newline. */
static int
take_line(struct journal *j, const char *line, size_t n)
{
	struct journal_record r;
	char sum[17];
	json_t *o;
	int rc;

	if (n < 18 || line[n - 17] != ' ')
		return -EINVAL;
	checksum(line, n - 17, sum);
	if (memcmp(line + n - 16, sum, 16) != 0)
		return -EINVAL;
	o = json_loadb(line, n - 17, JSON_REJECT_DUPLICATES, NULL);
	if (o == NULL)
		return -EPROTO;
	if (json_object_get(o, "text") != NULL) {
		const char *t = json_string_value(json_object_get(o, "text"));
		uint64_t digest = get_hex(o, "plan");
		struct plan *plan = NULL;

		if (t != NULL && plan_parse(&plan, j->n_layers, t, NULL) == 0 && plan->digest != digest)
			plan_unref(&plan);
		rc = find_plan(j, digest) != NULL ? (plan_unref(&plan), 0) : add_plan(j, digest, plan, true);
	} else {
		rc = from_json(o, &r);
		if (rc == 0)
			rc = remember(j, &r);
	}
	json_decref(o);
	return rc;
}

static int
parse(struct journal *j, const char *buf, size_t n, uint64_t *torn, struct err *err)
{
	size_t at = 0, line = 0;

	while (at < n) {
		const char *nl = memchr(buf + at, '\n', n - at);
		int rc;

		line++;
		rc = nl == NULL ? -EINVAL : take_line(j, buf + at, (size_t)(nl - buf) - at);
		if (rc == -ENOMEM)
			return err_set(err, rc, "out of memory");
		if (rc == -EPROTO) /* whole, so no torn write: never cut it off */
			return err_set(err, rc, "%s:%zu: a record of a kind that this version does not know", j->path, line);
		if (rc != 0) {
			if (nl != NULL && nl + 1 != buf + n)
				return err_set(err, -EINVAL, "%s:%zu: the record is damaged, and others follow it: move the file away to "
				    "start anew", j->path, line);
			break; /* torn: the write that a crash cut off */
		}
		at = (size_t)(nl - buf) + 1;
	}
	j->end = (off_t)at;
	*torn = n - at;
	return 0;
}

static int
read_all(struct journal *j, uint64_t *torn, struct err *err)
{
	struct stat st;
	char *buf;
	size_t at = 0;
	int rc;

	if (fstat(j->fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size > MAX_JOURNAL)
		return err_set(err, -EINVAL, "%s: no regular file of at most 4 GiB", j->path);
	buf = malloc((size_t)st.st_size + 1);
	if (buf == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	while (at < (size_t)st.st_size) {
		ssize_t n = pread(j->fd, buf + at, (size_t)st.st_size - at, (off_t)at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		at += (size_t)n;
	}
	rc = at < (size_t)st.st_size ? err_set(err, -EIO, "%s: cannot be read", j->path) : parse(j, buf, at, torn, err);
	free(buf);
	j->n_written = j->n;
	return rc;
}

static int
make_dirs(const char *dir, struct err *err)
{
	char *p = strdup(dir);

	if (p == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (char *s = p + 1;; s++) {
		if (*s != '/' && *s != '\0')
			continue;
		char c = *s;

		*s = '\0';
		if (mkdir(p, c == '\0' ? 0700 : 0755) != 0 && errno != EEXIST) {
			int rc = err_set(err, -errno, "state_dir %s: %s", p, strerror(errno));

			free(p);
			return rc;
		}
		*s = c;
		if (c == '\0')
			break;
	}
	free(p);
	return 0;
}

int
journal_open(struct journal **out, const char *state_dir, uint32_t n_layers, uint64_t *torn, struct err *err)
{
	struct journal *j = calloc(1, sizeof(*j));
	int rc;

	*out = NULL;
	*torn = 0;
	if (j == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	pthread_mutex_init(&j->lock, NULL);
	j->n_layers = n_layers;
	j->dir_fd = j->lock_fd = j->fd = -1;
	rc = make_dirs(state_dir, err);
	if (rc == 0 && asprintf(&j->path, "%s/journal", state_dir) < 0) {
		j->path = NULL;
		rc = err_set(err, -ENOMEM, "out of memory");
	}
	if (rc == 0 && (j->dir_fd = open(state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
		rc = err_set(err, -errno, "state_dir %s: %s", state_dir, strerror(errno));
	if (rc == 0 && (j->lock_fd = openat(j->dir_fd, "lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600)) < 0)
		rc = err_set(err, -errno, "%s/lock: %s", state_dir, strerror(errno));
	if (rc == 0 && flock(j->lock_fd, LOCK_EX | LOCK_NB) != 0)
		rc = err_set(err, -EBUSY, "state_dir %s is in use by another octetd", state_dir);
	if (rc == 0 && (j->fd = openat(j->dir_fd, "journal", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600)) < 0)
		rc = err_set(err, -errno, "%s: %s", j->path, strerror(errno));
	if (rc == 0)
		rc = read_all(j, torn, err);
	if (rc == 0)
		fsync(j->dir_fd); /* the file's own name */
	if (rc != 0)
		journal_close(&j);
	*out = j;
	return rc;
}

void
journal_close(struct journal **jp)
{
	struct journal *j = *jp;

	if (j == NULL)
		return;
	for (size_t i = 0; i < j->n_plans; i++)
		plan_unref(&j->plan[i].plan);
	if (j->fd >= 0)
		close(j->fd);
	if (j->lock_fd >= 0)
		close(j->lock_fd);
	if (j->dir_fd >= 0)
		close(j->dir_fd);
	pthread_mutex_destroy(&j->lock);
	free(j->plan), free(j->rec), free(j->path);
	free(j);
	*jp = NULL;
}

/* ---- writing ---- */

static int
write_line(struct journal *j, json_t *o, off_t *end)
{
	char *s = o == NULL ? NULL : json_dumps(o, JSON_COMPACT | JSON_SORT_KEYS), *line, sum[17];
	size_t at = 0;
	int n, rc = 0;

	json_decref(o);
	if (s == NULL)
		return -ENOMEM;
	checksum(s, strlen(s), sum);
	n = asprintf(&line, "%s %s\n", s, sum);
	free(s);
	if (n < 0)
		return -ENOMEM;
	while (at < (size_t)n && rc == 0) {
		ssize_t k = pwrite(j->fd, line + at, (size_t)n - at, *end + (off_t)at);

		if (k < 0 && errno != EINTR)
			rc = -errno;
		at += k > 0 ? (size_t)k : 0;
	}
	free(line);
	if (rc == 0)
		*end += n;
	return rc;
}

static int
write_plan(struct journal *j, const struct plan *plan, off_t *end)
{
	char *t = plan_text(plan);
	json_t *o = t == NULL ? NULL : json_pack("{s:o,s:s}", "plan", hex(plan->digest), "text", t);

	free(t);
	return write_line(j, o, end);
}

/* What one write puts into the file, taken under the lock: meanwhile the loop
 * may remember more. */
struct batch {
	struct plan **plan;         /* referenced */
	struct journal_record *rec;
	size_t n_plans, n;
};

static void
batch_free(struct batch *b)
{
	for (size_t i = 0; i < b->n_plans; i++)
		plan_unref(&b->plan[i]);
	free(b->plan), free(b->rec);
}

/* Every plan and record that the file lacks, and plan (NULL: none) if it is new. */
static int
batch_take(struct journal *j, struct batch *b, const struct plan *plan)
{
	int rc = 0;

	*b = (struct batch){0};
	pthread_mutex_lock(&j->lock);
	b->plan = malloc((j->n_plans + 1) * sizeof(*b->plan));
	b->rec = malloc((j->n - j->n_written + 1) * sizeof(*b->rec));
	if (b->plan == NULL || b->rec == NULL)
		rc = -ENOMEM;
	for (size_t i = 0; i < j->n_plans && rc == 0; i++)
		if (!j->plan[i].written && j->plan[i].plan != NULL)
			b->plan[b->n_plans++] = plan_ref(j->plan[i].plan);
	for (size_t i = j->n_written; i < j->n && rc == 0; i++)
		b->rec[b->n++] = j->rec[i];
	if (plan != NULL && rc == 0 && find_plan(j, plan->digest) == NULL)
		b->plan[b->n_plans++] = plan_ref((struct plan *)(uintptr_t)plan);
	pthread_mutex_unlock(&j->lock);
	return rc;
}

/* The batch and r (NULL: none) as one: all of it or nothing. Without the lock,
 * so that history can be read meanwhile. */
static int
write_out(struct journal *j, const struct batch *b, const struct journal_record *r)
{
	off_t end = j->end;
	int rc = ftruncate(j->fd, end) != 0 ? -errno : 0; /* a torn tail */

	for (size_t i = 0; i < b->n_plans && rc == 0; i++)
		rc = write_plan(j, b->plan[i], &end);
	for (size_t i = 0; i < b->n && rc == 0; i++)
		rc = write_line(j, to_json(&b->rec[i]), &end);
	if (rc == 0 && r != NULL)
		rc = write_line(j, to_json(r), &end);
	if (rc == 0 && fsync(j->fd) != 0)
		rc = -errno;
	if (rc == 0)
		j->end = end;
	else if (ftruncate(j->fd, j->end) != 0)
		return rc; /* cut off as torn at the next open */
	return rc;
}

/* The batch and r are in the file. */
static int
note_written(struct journal *j, const struct batch *b, const struct journal_record *r)
{
	int rc = 0;

	for (size_t i = 0; i < b->n_plans && rc == 0; i++) {
		struct known_plan *k = find_plan(j, b->plan[i]->digest);

		if (k != NULL)
			k->written = true;
		else
			rc = add_plan(j, b->plan[i]->digest, plan_ref(b->plan[i]), true);
	}
	for (size_t i = 0; i < b->n; i++)
		j->rec[j->n_written++].unjournaled = false;
	if (rc == 0 && r != NULL)
		rc = remember(j, r);
	if (rc != 0 || r == NULL)
		return rc;
	/* As in the file: before what was remembered during the write. */
	memmove(&j->rec[j->n_written + 1], &j->rec[j->n_written], (j->n - 1 - j->n_written) * sizeof(*j->rec));
	j->rec[j->n_written++] = *r;
	return 0;
}

static int
put(struct journal *j, const struct journal_record *r, const struct plan *plan, struct err *err)
{
	struct batch b;
	int rc = batch_take(j, &b, plan);

	if (rc == 0 && (r != NULL || b.n > 0 || b.n_plans > 0)) {
		rc = write_out(j, &b, r);
		if (rc == 0) {
			pthread_mutex_lock(&j->lock);
			rc = note_written(j, &b, r);
			pthread_mutex_unlock(&j->lock);
		}
	}
	batch_free(&b);
	return rc == 0 ? 0 : err_set(err, rc, "%s: %s", j->path, strerror(-rc));
}

int
journal_append(struct journal *j, const struct journal_record *r, const struct plan *plan, struct err *err)
{
	return put(j, r, plan, err);
}

int
journal_flush(struct journal *j, struct err *err)
{
	return put(j, NULL, NULL, err);
}

void
journal_remember(struct journal *j, const struct journal_record *r, const struct plan *plan)
{
	struct journal_record copy = *r;

	copy.unjournaled = true;
	pthread_mutex_lock(&j->lock);
	if (plan != NULL && find_plan(j, plan->digest) == NULL)
		add_plan(j, plan->digest, plan_ref((struct plan *)(uintptr_t)plan), false);
	remember(j, &copy);
	pthread_mutex_unlock(&j->lock);
}

/* ---- asking ---- */

/* A record and where it stands; for sorting. */
struct place {
	uint64_t epoch;
	size_t at;
};

static int
by_epoch(const void *pa, const void *pb)
{
	const struct place *a = pa, *b = pb;

	if (a->epoch != b->epoch)
		return a->epoch < b->epoch ? -1 : 1;
	return a->at < b->at ? -1 : a->at > b->at;
}

/* For each record the one that has its outcome: of an intent its last APPLIED
 * or FAILED (n: none yet), itself otherwise; n + 1: it belongs to an intent. */
static bool
find_outcomes(const struct journal *j, size_t *outcome)
{
	size_t n = j->n;
	struct place *p = malloc((n + 1) * sizeof(*p));

	if (p == NULL)
		return false;
	for (size_t i = 0; i < n; i++)
		p[i] = (struct place){j->rec[i].epoch, i};
	qsort(p, n, sizeof(*p), by_epoch);
	for (size_t i = 0, end; i < n; i = end) {
		size_t last = n;
		bool intent = false;

		for (end = i; end < n && p[end].epoch == p[i].epoch; end++) {
			enum journal_kind kind = j->rec[p[end].at].kind;

			intent |= kind == JOURNAL_INTENT;
			if (kind == JOURNAL_APPLIED || kind == JOURNAL_FAILED)
				last = p[end].at;
		}
		for (size_t k = i; k < end; k++) {
			enum journal_kind kind = j->rec[p[k].at].kind;

			outcome[p[k].at] = kind == JOURNAL_INTENT ? last
			    : kind == JOURNAL_CONFIRMED || (intent && kind != JOURNAL_START) ? n + 1 : p[k].at;
		}
	}
	free(p);
	return true;
}

uint32_t
journal_history(struct journal *j, struct journal_entry **out)
{
	size_t *outcome;
	uint32_t n = 0;

	pthread_mutex_lock(&j->lock);
	*out = calloc(j->n + 1, sizeof(**out));
	outcome = malloc((j->n + 1) * sizeof(*outcome));
	if (*out == NULL || outcome == NULL || !find_outcomes(j, outcome)) {
		free(*out);
		*out = NULL;
	}
	for (size_t i = 0; *out != NULL && i < j->n; i++) {
		const struct journal_record *o = outcome[i] < j->n ? &j->rec[outcome[i]] : NULL;
		struct journal_entry *e = &(*out)[n];

		/* A change stands where its intent does; one without an intent where it was applied. */
		if (outcome[i] == j->n + 1)
			continue;
		e->r = j->rec[i];
		if (o == NULL)
			snprintf(e->outcome, sizeof(e->outcome), "pending");
		else if (o->kind == JOURNAL_FAILED)
			snprintf(e->outcome, sizeof(e->outcome), "%s%s", strcmp(o->result, "not applied") == 0 ? "" : "failed: ",
			    o->result);
		else {
			e->r.step = o->step;
			e->r.unjournaled = o->unjournaled;
			snprintf(e->outcome, sizeof(e->outcome), "applied");
		}
		n++;
	}
	free(outcome);
	pthread_mutex_unlock(&j->lock);
	return n;
}

void
journal_keep(struct journal *j, const struct plan *plan)
{
	pthread_mutex_lock(&j->lock);
	if (find_plan(j, plan->digest) == NULL)
		add_plan(j, plan->digest, plan_ref((struct plan *)(uintptr_t)plan), false);
	pthread_mutex_unlock(&j->lock);
}

struct plan *
journal_plan(struct journal *j, uint64_t digest)
{
	struct known_plan *k;
	struct plan *plan = NULL;

	pthread_mutex_lock(&j->lock);
	k = find_plan(j, digest);
	if (k != NULL && k->plan != NULL)
		plan = plan_ref(k->plan);
	pthread_mutex_unlock(&j->lock);
	return plan;
}

uint64_t
journal_last_epoch(struct journal *j)
{
	uint64_t max = 0;

	pthread_mutex_lock(&j->lock);
	for (size_t i = 0; i < j->n; i++)
		if (j->rec[i].epoch > max)
			max = j->rec[i].epoch;
	pthread_mutex_unlock(&j->lock);
	return max;
}

static bool
is_active(const struct journal_record *r)
{
	return r->kind == JOURNAL_START || r->kind == JOURNAL_APPLIED;
}

uint32_t
journal_unwritten(struct journal *j)
{
	uint32_t n = 0;

	pthread_mutex_lock(&j->lock);
	for (size_t i = j->n_written; i < j->n; i++)
		n += is_active(&j->rec[i]);
	pthread_mutex_unlock(&j->lock);
	return n;
}

bool
journal_last_applied(struct journal *j, struct journal_record *out)
{
	bool found = false;

	pthread_mutex_lock(&j->lock);
	for (size_t i = j->n; i-- > 0 && !found;) {
		if (is_active(&j->rec[i])) {
			*out = j->rec[i];
			found = true;
		}
	}
	pthread_mutex_unlock(&j->lock);
	return found;
}

bool
journal_last_rollout(struct journal *j, struct journal_record *out)
{
	bool found = false;

	pthread_mutex_lock(&j->lock);
	for (size_t i = j->n; i-- > 0 && !found;) {
		found = j->rec[i].kind == JOURNAL_ROLLOUT;
		if (found)
			*out = j->rec[i];
	}
	pthread_mutex_unlock(&j->lock);
	return found;
}

bool
journal_unconfirmed(struct journal *j)
{
	bool waits = false, confirmed = false;
	uint64_t epoch = 0;

	pthread_mutex_lock(&j->lock);
	for (size_t i = j->n; i-- > 0;) {
		if (j->rec[i].kind == JOURNAL_CONFIRMED && epoch == 0)
			epoch = j->rec[i].epoch;
		if (!is_active(&j->rec[i]))
			continue;
		waits = j->rec[i].confirm_s != 0;
		confirmed = epoch == j->rec[i].epoch;
		break;
	}
	pthread_mutex_unlock(&j->lock);
	return waits && !confirmed;
}

/* One pass from the newest record: a change is undone by a rollback after it
 * that restored an epoch before it, be it its own or one further back. */
int
journal_rollback_target(struct journal *j, uint64_t *undoes, uint64_t *back_to, uint64_t *plan, struct err *err)
{
	const struct journal_record *change = NULL;
	uint64_t restored = UINT64_MAX; /* the furthest back of the rollbacks seen */
	int rc = -ENOENT;

	pthread_mutex_lock(&j->lock);
	for (size_t i = j->n; i-- > 0 && rc != 0;) {
		const struct journal_record *r = &j->rec[i];

		if (!is_active(r))
			continue;
		if (change != NULL) { /* the plan before it: of what was active then */
			*undoes = change->epoch;
			*back_to = r->epoch;
			*plan = r->plan;
			rc = 0;
		} else if (r->back_to != 0 && r->back_to < restored)
			restored = r->back_to;
		else if (r->kind == JOURNAL_APPLIED && r->undoes == 0 && r->back_to == 0 && r->epoch <= restored)
			change = r;
	}
	pthread_mutex_unlock(&j->lock);
	return rc == 0 ? 0 : err_set(err, rc, "there is no change left to take back");
}

uint32_t
journal_close_intents(struct journal *j, struct err *err)
{
	size_t n = j->n, *outcome = malloc((n + 1) * sizeof(*outcome));
	uint32_t closed = 0;

	if (outcome == NULL || !find_outcomes(j, outcome)) {
		free(outcome);
		err_set(err, -ENOMEM, "out of memory");
		return 0;
	}
	for (size_t i = 0; i < n; i++) {
		struct journal_record r = j->rec[i];

		if (r.kind != JOURNAL_INTENT || outcome[i] != n)
			continue;
		r.kind = JOURNAL_FAILED;
		snprintf(r.result, sizeof(r.result), "not applied");
		if (journal_append(j, &r, NULL, err) != 0)
			break;
		closed++;
	}
	free(outcome);
	return closed;
}
