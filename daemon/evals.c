/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/evals.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/log.h"

#define MAX_RESULTS 4096u
#define MAX_FILE (8 << 20)

struct evals {
	uv_loop_t *loop;
	char *dir;
	json_t *list;      /* by id */
	uint64_t next_id, changes;
	uint32_t writing;
};

struct write {
	uv_work_t work;
	struct evals *e;
	char *path, *text;
	int rc;
};

static uint64_t
id_of(const json_t *result)
{
	return (uint64_t)json_integer_value(json_object_get(result, "id"));
}

static int
by_id(const void *pa, const void *pb)
{
	uint64_t a = id_of(*(json_t *const *)pa), b = id_of(*(json_t *const *)pb);

	return a < b ? -1 : a > b;
}

static json_t *
read_result(const char *path, uint64_t id)
{
	json_error_t je;
	struct stat st;
	json_t *j = stat(path, &st) == 0 && S_ISREG(st.st_mode) && st.st_size <= MAX_FILE
	    ? json_load_file(path, JSON_REJECT_DUPLICATES, &je)
	    : NULL;

	if (j != NULL && json_is_object(j) && id_of(j) == id && json_is_object(json_object_get(j, "key")) &&
	    json_is_string(json_object_get(j, "time")) && json_is_string(json_object_get(j, "baseline")) &&
	    json_is_string(json_object_get(j, "candidate")))
		return j;
	json_decref(j);
	log_warn("evals.read", "file=%s why=\"no result of an eval\"", LOG_Q(path));
	return NULL;
}

static void
read_all(struct evals *e)
{
	struct dirent *entry;
	DIR *dir = opendir(e->dir);
	json_t **sorted;
	size_t n;

	while (dir != NULL && (entry = readdir(dir)) != NULL) {
		char *end, *path;
		uint64_t id = strtoull(entry->d_name, &end, 10);

		if (end == entry->d_name || strcmp(end, ".json") != 0 || json_array_size(e->list) >= MAX_RESULTS ||
		    asprintf(&path, "%s/%s", e->dir, entry->d_name) < 0)
			continue;
		json_array_append_new(e->list, read_result(path, id)); /* refuses NULL */
		e->next_id = id >= e->next_id ? id + 1 : e->next_id;
		free(path);
	}
	if (dir != NULL)
		closedir(dir);
	n = json_array_size(e->list);
	sorted = malloc((n + 1) * sizeof(*sorted));
	for (size_t i = 0; sorted != NULL && i < n; i++)
		sorted[i] = json_incref(json_array_get(e->list, i));
	if (sorted == NULL)
		return;
	qsort(sorted, n, sizeof(*sorted), by_id);
	json_array_clear(e->list);
	for (size_t i = 0; i < n; i++)
		json_array_append_new(e->list, sorted[i]);
	free(sorted);
}

int
evals_open(struct evals **out, uv_loop_t *loop, const char *state_dir, struct err *err)
{
	struct evals *e = calloc(1, sizeof(*e));

	*out = NULL;
	if (e == NULL || asprintf(&e->dir, "%s/evals", state_dir) < 0) {
		free(e);
		return err_set(err, -ENOMEM, "out of memory");
	}
	e->loop = loop, e->list = json_array(), e->next_id = 1;
	if (e->list == NULL || (mkdir(e->dir, 0700) != 0 && errno != EEXIST)) {
		int rc = e->list == NULL ? -ENOMEM : -errno;

		err_set(err, rc, "%s: %s", e->dir, strerror(-rc));
		evals_close(&e);
		return rc;
	}
	read_all(e);
	*out = e;
	return 0;
}

void
evals_close(struct evals **ep)
{
	struct evals *e = *ep;

	if (e == NULL)
		return;
	json_decref(e->list);
	free(e->dir);
	free(e);
	*ep = NULL;
}

bool
evals_idle(const struct evals *e)
{
	return e->writing == 0;
}

/* ---- writing, on the thread pool ---- */

static void
work_write(uv_work_t *w)
{
	struct write *j = w->data;
	char *next = NULL;
	FILE *f;

	if (asprintf(&next, "%s.new", j->path) < 0) {
		j->rc = -ENOMEM;
		return;
	}
	f = fopen(next, "we");
	if (f == NULL) {
		j->rc = -errno;
	} else {
		if (fputs(j->text, f) < 0 || fflush(f) != 0 || fsync(fileno(f)) != 0)
			j->rc = errno != 0 ? -errno : -EIO;
		if (fclose(f) != 0 && j->rc == 0)
			j->rc = -errno;
		if (j->rc == 0 && rename(next, j->path) != 0)
			j->rc = -errno;
		if (j->rc != 0)
			unlink(next);
	}
	free(next);
}

static void
after_write(uv_work_t *w, int status)
{
	struct write *j = w->data;

	(void)status;
	j->e->writing--;
	if (j->rc != 0)
		log_error("evals.write", "file=%s why=%s", LOG_Q(j->path), LOG_Q(strerror(-j->rc)));
	free(j->path);
	free(j->text);
	free(j);
}

uint64_t
evals_add(struct evals *e, json_t *result)
{
	struct write *w = calloc(1, sizeof(*w));
	uint64_t id = e->next_id++;

	json_object_set_new(result, "id", json_integer((json_int_t)id));
	while (json_array_size(e->list) >= MAX_RESULTS)
		evals_delete(e, id_of(json_array_get(e->list, 0)), NULL);
	json_array_append(e->list, result);
	e->changes++;
	if (w == NULL || asprintf(&w->path, "%s/%llu.json", e->dir, (unsigned long long)id) < 0) {
		free(w);
		return id;
	}
	w->e = e, w->work.data = w;
	w->text = json_dumps(result, JSON_INDENT(1));
	if (w->text == NULL || uv_queue_work(e->loop, &w->work, work_write, after_write) != 0) {
		free(w->path);
		free(w->text);
		free(w);
	} else
		e->writing++;
	return id;
}

/* ---- finding ---- */

json_t *
evals_get(const struct evals *e, uint64_t id)
{
	json_t *r;
	size_t i;

	json_array_foreach(e->list, i, r)
		if (id_of(r) == id)
			return r;
	return NULL;
}

json_t *
evals_find(const struct evals *e, const json_t *key)
{
	for (size_t i = json_array_size(e->list); i-- > 0;) {
		json_t *r = json_array_get(e->list, i);

		if (json_equal(json_object_get(r, "key"), key))
			return r;
	}
	return NULL;
}

int
evals_delete(struct evals *e, uint64_t id, struct err *err)
{
	json_t *r;
	size_t i;

	json_array_foreach(e->list, i, r) {
		char *path;

		if (id_of(r) != id)
			continue;
		if (asprintf(&path, "%s/%llu.json", e->dir, (unsigned long long)id) < 0)
			return err_set(err, -ENOMEM, "out of memory");
		if (unlink(path) != 0 && errno != ENOENT) {
			int rc = err_set(err, -errno, "%s: %s", path, strerror(errno));

			free(path);
			return rc;
		}
		free(path);
		json_array_remove(e->list, i);
		e->changes++;
		return 0;
	}
	return err_set(err, -ENOENT, "there is no eval %llu", (unsigned long long)id);
}

const json_t *
evals_all(const struct evals *e)
{
	return e->list;
}

uint64_t
evals_changes(const struct evals *e)
{
	return e->changes;
}
