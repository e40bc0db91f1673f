/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/shards.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/config.h"

static int
open_file(struct shards *s, const char *dir, const char *file, struct err *err)
{
	char *path;
	int rc;

	if (asprintf(&path, "%s/%s", dir, file) < 0)
		return err_set(err, -ENOMEM, "%s: out of memory", file);
	rc = safetensors_open(&s->file[s->n], path, err);
	free(path);
	if (rc == 0)
		s->n++;
	return rc;
}

/* ---- the index ---- */

/* A file of the same directory. */
static bool
plain_name(const char *name)
{
	for (const char *p = name; *p != '\0'; p++)
		if (*p <= 0x20 || *p > 0x7e || *p == '/')
			return false;
	return name[0] != '\0' && strstr(name, "..") == NULL;
}

static int
compare_strings(const void *a, const void *b)
{
	return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The names of the files, each once, into file[size of map]. */
static int
list_files(json_t *map, const char **file, size_t *n_files, struct err *err)
{
	char shown[2][ST_PRINTABLE];
	size_t n = 0, unique = 0;
	const char *tensor;
	json_t *v;

	json_object_foreach(map, tensor, v) {
		if (!json_is_string(v))
			return err_set(err, -EINVAL, SHARDS_INDEX ": tensor '%s' has no file",
			    safetensors_printable(tensor, shown[0]));
		if (!plain_name(json_string_value(v)))
			return err_set(err, -EINVAL, SHARDS_INDEX ": tensor '%s' is in '%s', which is no plain file name",
			    safetensors_printable(tensor, shown[0]), safetensors_printable(json_string_value(v), shown[1]));
		file[n++] = json_string_value(v);
	}
	if (n == 0)
		return err_set(err, -EINVAL, SHARDS_INDEX ": weight_map is empty");
	qsort(file, n, sizeof(*file), compare_strings);
	for (size_t i = 0; i < n; i++)
		if (unique == 0 || strcmp(file[unique - 1], file[i]) != 0)
			file[unique++] = file[i];
	*n_files = unique;
	return 0;
}

/* Every tensor of the files is listed, in that file. */
static int
check_files(const struct shards *s, const json_t *map, struct err *err)
{
	char shown[ST_PRINTABLE];

	for (size_t i = 0; i < s->n; i++) {
		for (size_t j = 0; j < s->file[i].n; j++) {
			const struct st_tensor *t = &s->file[i].tensor[j];
			const char *listed = json_string_value(json_object_get(map, t->name));

			safetensors_printable(t->name, shown);
			if (listed == NULL)
				return err_set(err, -EINVAL, "%s: tensor '%s' is not in " SHARDS_INDEX, t->file, shown);
			for (size_t k = 0; k < s->n; k++)
				if (k != i && safetensors_find(&s->file[k], t->name) != NULL)
					return err_set(err, -EINVAL, "%s: tensor '%s' is in %s too", t->file, shown,
					    s->file[k].file);
			if (strcmp(listed, t->file) != 0)
				return err_set(err, -EINVAL, "%s: tensor '%s' should be in %s by " SHARDS_INDEX, t->file,
				    shown, listed);
		}
	}
	return 0;
}

/* Every listed tensor is there. */
static int
check_list(const struct shards *s, json_t *map, struct err *err)
{
	char shown[ST_PRINTABLE];
	const char *tensor;
	json_t *v;

	json_object_foreach(map, tensor, v)
		if (shards_find(s, tensor) == NULL)
			return err_set(err, -EINVAL, "%s: tensor '%s' is missing, " SHARDS_INDEX " lists it",
			    json_string_value(v), safetensors_printable(tensor, shown));
	return 0;
}

static int
open_listed(struct shards *s, const char *dir, json_t *map, struct err *err)
{
	const char **file;
	size_t n_files = 0;
	int rc;

	if (!json_is_object(map))
		return err_set(err, -EINVAL, SHARDS_INDEX ": no weight_map");
	file = calloc(json_object_size(map) + 1, sizeof(*file));
	if (file == NULL)
		return err_set(err, -ENOMEM, SHARDS_INDEX ": out of memory");
	if ((rc = list_files(map, file, &n_files, err)) == 0) {
		s->file = calloc(n_files, sizeof(*s->file));
		if (s->file == NULL)
			rc = err_set(err, -ENOMEM, SHARDS_INDEX ": out of memory");
	}
	for (size_t i = 0; i < n_files && rc == 0; i++)
		rc = open_file(s, dir, file[i], err);
	free(file);
	if (rc != 0 || (rc = check_files(s, map, err)) != 0)
		return rc;
	return check_list(s, map, err);
}

static int
open_index(struct shards *s, const char *dir, const char *text, size_t len, struct err *err)
{
	char why[ST_PRINTABLE];
	json_error_t je;
	json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, &je);
	int rc;

	s->list = SHARDS_INDEX;
	if (root == NULL)
		return err_set(err, -EINVAL, SHARDS_INDEX ":%d: %s", je.line, safetensors_printable(je.text, why));
	rc = open_listed(s, dir, json_object_get(root, "weight_map"), err);
	json_decref(root);
	return rc;
}

int
shards_open(struct shards *s, const char *dir, struct err *err)
{
	char *text = NULL;
	struct err why = {""};
	size_t len = 0;
	int rc;

	*s = (struct shards){.list = SHARDS_SINGLE, .file = calloc(1, sizeof(*s->file))};
	if (s->file == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	rc = open_file(s, dir, SHARDS_SINGLE, &why);
	if (rc == -ENOENT && (rc = config_read_file(dir, SHARDS_INDEX, true, &text, &len, &why)) == 0 && text == NULL)
		rc = err_set(&why, -ENOENT, "%s: neither " SHARDS_SINGLE " nor " SHARDS_INDEX, dir);
	if (text != NULL) {
		free(s->file);
		s->file = NULL;
		rc = open_index(s, dir, text, len, &why);
	}
	free(text);
	if (rc != 0) {
		shards_close(s);
		err_set(err, rc, "%s", why.text);
	}
	return rc;
}

void
shards_close(struct shards *s)
{
	for (size_t i = 0; i < s->n; i++)
		safetensors_close(&s->file[i]);
	free(s->file);
	*s = (struct shards){0};
}

struct st_tensor *
shards_find(const struct shards *s, const char *name)
{
	struct st_tensor *t = NULL;

	for (size_t i = 0; i < s->n && t == NULL; i++)
		t = safetensors_find(&s->file[i], name);
	return t;
}
