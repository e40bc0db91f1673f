/* SPDX-License-Identifier: Apache-2.0 */
/* Verbs for whoever keeps octetd running: drain, resume, save. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/control.h"
#include "daemon/log.h"
#include "daemon/octetd.h"

static void
set_drained(struct octetd *d, struct call *call, bool drained)
{
	const struct peer *p = call_peer(call);

	/* Whoever waits for the drain asks again and again. */
	if (d->drained == drained)
		return;
	d->drained = drained;
	server_drain(d->server, drained || d->draining);
	log_info(drained ? "drain" : "resume", "uid=%u pid=%d program=%s in_flight=%u", p->uid, (int)p->pid, LOG_Q(p->program),
	    server_in_flight(d->server));
}

static int
exec_drain(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	(void)request;
	set_drained(d, call, true);
	*reply = json_pack("{s:b,s:i}", "draining", 1, "in_flight", (int)server_in_flight(d->server));
	return *reply != NULL ? 0 : err_set(err, -ENOMEM, "out of memory");
}

static int
exec_resume(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	(void)request;
	if (d->draining)
		return err_set(err, -ESHUTDOWN, "octetd is stopping");
	set_drained(d, call, false);
	*reply = json_pack("{s:b,s:i}", "draining", 0, "in_flight", (int)server_in_flight(d->server));
	return *reply != NULL ? 0 : err_set(err, -ENOMEM, "out of memory");
}

/* ---- save ---- */

struct save {
	uv_work_t work;
	struct octetd *d;
	struct call *call;
	char *path, *text; /* the section without its head */
	char name[64];
	int rc;
	struct err err;
};

static void
save_free(struct save *s)
{
	free(s->path);
	free(s->text);
	free(s);
}

/* Copies the old file but for the section of this name. */
static int
copy_others(const struct save *s, FILE *to)
{
	FILE *from = fopen(s->path, "re");
	char *line = NULL, head[80];
	size_t cap = 0;
	bool skip = false;
	int rc = 0;

	if (from == NULL)
		return errno == ENOENT ? 0 : -errno;
	snprintf(head, sizeof(head), "[policy %s]", s->name);
	while (getline(&line, &cap, from) > 0) {
		if (*line == '[')
			skip = strncmp(line, head, strlen(head)) == 0;
		if (!skip && fputs(line, to) < 0)
			rc = -EIO;
	}
	if (ferror(from))
		rc = -EIO;
	free(line);
	fclose(from);
	return rc;
}

static int
sync_directory(const char *path)
{
	char *dir = strdup(path), *slash = dir != NULL ? strrchr(dir, '/') : NULL;
	int fd, rc = 0;

	if (slash != NULL)
		slash[slash == dir] = '\0';
	fd = open(slash != NULL ? dir : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 || fsync(fd) != 0)
		rc = -errno;
	if (fd >= 0)
		close(fd);
	free(dir);
	return rc;
}

/* On the thread pool: the whole file anew, then in the place of the old one. */
static void
work_save(uv_work_t *w)
{
	struct save *s = w->data;
	char *next = NULL;
	FILE *f;
	int rc;

	if (asprintf(&next, "%s.new", s->path) < 0) {
		s->rc = err_set(&s->err, -ENOMEM, "out of memory");
		return;
	}
	f = fopen(next, "we");
	rc = f == NULL ? -errno : copy_others(s, f);
	if (f != NULL) {
		if (rc == 0 && (fprintf(f, "[policy %s]\n%s", s->name, s->text) < 0 || fflush(f) != 0 || fsync(fileno(f)) != 0))
			rc = -errno;
		if (fclose(f) != 0 && rc == 0)
			rc = -errno;
	}
	if (rc == 0 && rename(next, s->path) != 0)
		rc = -errno;
	if (rc == 0)
		rc = sync_directory(s->path);
	if (rc != 0) {
		err_set(&s->err, rc, "%s: %s", f == NULL ? next : s->path, strerror(-rc));
		if (f != NULL)
			unlink(next);
	}
	s->rc = rc;
	free(next);
}

static void
after_save(uv_work_t *w, int status)
{
	struct save *s = w->data;

	(void)status;
	s->d->saving = false;
	if (s->rc != 0) {
		log_error("save.failed", "policy=%s why=%s", s->name, LOG_Q(s->err.text));
		call_refuse(s->call, s->rc, s->err.text);
	} else {
		log_info("save", "policy=%s file=%s", s->name, LOG_Q(s->path));
		call_reply(s->call, json_pack("{s:s,s:o}", "policy", s->name, "file", json_lossy(s->path)));
	}
	save_free(s);
}

static int
check_name(const struct octetd *d, const char *name, struct err *err)
{
	const struct conf_policy *p = conf_policy(d->conf, name);

	if (*name == '\0' || strlen(name) > 63 || name[strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")] != '\0')
		return err_set(err, -EINVAL, "save: the name of a policy is 1 to 63 letters, digits and . _ -");
	if (p != NULL && !p->saved)
		return p->line == 0 ? err_set(err, -EEXIST, "policy '%s' is built in", name)
		                    : err_set(err, -EEXIST, "policy '%s' is defined in %s, line %d", name, d->conf->file, p->line);
	if (d->saving)
		return err_set(err, -EBUSY, "another policy is being saved");
	return 0;
}

static int
exec_save(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	const char *name = json_string_value(json_object_get(request, "policy"));
	struct save *s;
	int rc = check_name(d, name, err);

	(void)reply;
	if (rc != 0)
		return rc;
	s = calloc(1, sizeof(*s));
	if (s == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	s->d = d, s->call = call, s->work.data = s;
	snprintf(s->name, sizeof(s->name), "%s", name);
	s->path = strdup(d->conf->policies_file);
	s->text = plan_text(flipper_plan(d->flips));
	if (s->path == NULL || s->text == NULL || uv_queue_work(&d->loop, &s->work, work_save, after_save) != 0) {
		save_free(s);
		return err_set(err, -ENOMEM, "out of memory");
	}
	d->saving = true;
	return VERB_LATER;
}

const struct verb verb_drain = {"drain", true, {{0}}, exec_drain};
const struct verb verb_resume = {"resume", true, {{0}}, exec_resume};
const struct verb verb_save = {"save", true, {{"policy", FIELD_STRING, true}}, exec_save};
