/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/kernels.h"

#define MAX_HEADER (100u << 20)

static const struct dtype {
	const char *name;
	uint32_t bytes;
} dtypes[] = {[ST_F32] = {"F32", 4}, [ST_F16] = {"F16", 2}, [ST_BF16] = {"BF16", 2}};

static int
map_file(struct safetensors *s, const char *path, struct err *err)
{
	struct stat st;
	int fd = open(path, O_RDONLY | O_CLOEXEC), rc = 0;
	void *p;

	if (fd < 0)
		return err_set(err, -errno, "%s: %s", path, strerror(errno));
	if (fstat(fd, &st) != 0)
		rc = err_set(err, -errno, "%s: %s", path, strerror(errno));
	else if (!S_ISREG(st.st_mode))
		rc = err_set(err, -EINVAL, "%s: not a regular file", path);
	else if (st.st_size < 8)
		rc = err_set(err, -EINVAL, "%s: %lld bytes are no safetensors file", path, (long long)st.st_size);
	else {
		p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
		if (p == MAP_FAILED)
			rc = err_set(err, -errno, "%s: mmap: %s", path, strerror(errno));
		else {
			s->map = p;
			s->bytes = (size_t)st.st_size;
		}
	}
	close(fd);
	return rc;
}

/* Shape and offsets of one entry. */
static int
parse_tensor(struct safetensors *s, struct st_tensor *t, const char *name, json_t *v, struct err *err)
{
	json_t *dtype = json_object_get(v, "dtype"), *shape = json_object_get(v, "shape");
	json_t *offsets = json_object_get(v, "data_offsets");
	uint64_t data = s->bytes - s->header_bytes, elems = 1;
	json_int_t from, to;
	bool known = false;

	if (!json_is_string(dtype) || !json_is_array(shape) || !json_is_array(offsets) || json_array_size(offsets) != 2 ||
	    !json_is_integer(json_array_get(offsets, 0)) || !json_is_integer(json_array_get(offsets, 1)))
		return err_set(err, -EINVAL, "tensor '%s': needs dtype, shape and data_offsets", name);
	for (size_t i = 0; i < sizeof(dtypes) / sizeof(*dtypes); i++) {
		if (strcmp(json_string_value(dtype), dtypes[i].name) == 0) {
			t->dtype = (enum st_dtype)i;
			known = true;
		}
	}
	if (!known)
		return err_set(err, -EINVAL, "tensor '%s': dtype '%s' is not supported (F32, F16, BF16)", name,
		    json_string_value(dtype));
	if (json_array_size(shape) > 4)
		return err_set(err, -EINVAL, "tensor '%s': more than 4 dimensions", name);
	t->n_dims = (uint32_t)json_array_size(shape);
	for (uint32_t i = 0; i < t->n_dims; i++) {
		json_t *d = json_array_get(shape, i);

		if (!json_is_integer(d) || json_integer_value(d) < 0 || json_integer_value(d) > INT32_MAX)
			return err_set(err, -EINVAL, "tensor '%s': bad shape", name);
		t->dim[i] = (uint64_t)json_integer_value(d);
		if (__builtin_mul_overflow(elems, t->dim[i], &elems))
			return err_set(err, -EINVAL, "tensor '%s': bad shape", name);
	}
	from = json_integer_value(json_array_get(offsets, 0));
	to = json_integer_value(json_array_get(offsets, 1));
	if (from < 0 || to < from || (uint64_t)to > data)
		return err_set(err, -EINVAL, "tensor '%s': bytes %lld to %lld lie outside the %llu of the file", name,
		    (long long)from, (long long)to, (unsigned long long)data);
	if (elems > data || (uint64_t)(to - from) != elems * dtypes[t->dtype].bytes)
		return err_set(err, -EINVAL, "tensor '%s': %lld bytes do not fit its shape and dtype %s", name,
		    (long long)(to - from), dtypes[t->dtype].name);
	t->from = (uint64_t)from, t->to = (uint64_t)to;
	t->data = s->map + s->header_bytes + from;
	t->name = strdup(name);
	return t->name == NULL ? err_set(err, -ENOMEM, "out of memory") : 0;
}

static int
by_offset(const void *pa, const void *pb)
{
	const struct st_tensor *a = pa, *b = pb;

	if (a->from != b->from)
		return a->from < b->from ? -1 : 1;
	return a->to < b->to ? -1 : a->to > b->to;
}

/* Every byte of the data part belongs to one tensor. */
static int
check_cover(struct safetensors *s, struct err *err)
{
	uint64_t at = 0, data = s->bytes - s->header_bytes;

	qsort(s->tensor, s->n, sizeof(*s->tensor), by_offset);
	for (size_t i = 0; i < s->n; i++) {
		if (s->tensor[i].from < at)
			return err_set(err, -EINVAL, "tensor '%s' overlaps '%s'", s->tensor[i].name, s->tensor[i - 1].name);
		if (s->tensor[i].from > at)
			return err_set(err, -EINVAL, "a hole of %llu bytes before tensor '%s'",
			    (unsigned long long)(s->tensor[i].from - at), s->tensor[i].name);
		at = s->tensor[i].to;
	}
	if (at != data)
		return err_set(err, -EINVAL, "%llu bytes after the last tensor", (unsigned long long)(data - at));
	return 0;
}

static int
parse_header(struct safetensors *s, struct err *err)
{
	json_error_t je;
	uint64_t len;
	json_t *root, *v;
	const char *name;
	int rc = 0;

	memcpy(&len, s->map, sizeof(len));
	if (len > MAX_HEADER || len > s->bytes - 8)
		return err_set(err, -EINVAL, "a header of %llu bytes does not fit a file of %zu", (unsigned long long)len,
		    s->bytes);
	s->header_bytes = 8 + (size_t)len;
	root = json_loadb((const char *)s->map + 8, (size_t)len, JSON_REJECT_DUPLICATES, &je);
	if (!json_is_object(root)) {
		json_decref(root);
		return err_set(err, -EINVAL, "header: %s", root == NULL ? je.text : "no JSON object");
	}
	s->tensor = calloc(json_object_size(root) + 1, sizeof(*s->tensor));
	if (s->tensor == NULL)
		rc = err_set(err, -ENOMEM, "out of memory");
	json_object_foreach(root, name, v) {
		if (rc != 0)
			break;
		if (strcmp(name, "__metadata__") == 0)
			continue;
		rc = parse_tensor(s, &s->tensor[s->n], name, v, err);
		if (rc == 0)
			s->n++;
	}
	json_decref(root);
	return rc != 0 ? rc : check_cover(s, err);
}

int
safetensors_open(struct safetensors *s, const char *path, struct err *err)
{
	int rc;

	memset(s, 0, sizeof(*s));
	rc = map_file(s, path, err);
	if (rc != 0)
		return rc;
	s->path = strdup(path);
	rc = s->path == NULL ? err_set(err, -ENOMEM, "out of memory") : parse_header(s, err);
	if (rc != 0) {
		err_prefix(err, "%s", path);
		safetensors_close(s);
	}
	return rc;
}

void
safetensors_close(struct safetensors *s)
{
	for (size_t i = 0; i < s->n; i++)
		free(s->tensor[i].name);
	free(s->tensor);
	free(s->path);
	if (s->map != NULL)
		munmap((void *)(uintptr_t)s->map, s->bytes);
	memset(s, 0, sizeof(*s));
}

struct st_tensor *
safetensors_find(struct safetensors *s, const char *name)
{
	for (size_t i = 0; i < s->n; i++)
		if (strcmp(s->tensor[i].name, name) == 0)
			return &s->tensor[i];
	return NULL;
}

/* By hand on the bits: kernel threads flush subnormals, the master must not. */
static uint16_t
bf16_from_half(uint16_t h)
{
	uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = h >> 10 & 0x1f, frac = h & 0x3ff, u;

	if (exp == 0x1f)
		u = 0x7f800000u | frac << 13;
	else if (exp != 0)
		u = (exp + 112) << 23 | frac << 13;
	else if (frac == 0)
		u = 0;
	else {
		uint32_t shift = (uint32_t)__builtin_clz(frac) - 21;

		u = (113 - shift) << 23 | (frac << shift & 0x3ff) << 13;
	}
	u |= sign;
	return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

void
st_read_bf16(const struct st_tensor *t, uint64_t at, uint64_t n, uint16_t *out)
{
	const uint8_t *p = (const uint8_t *)t->data + at * dtypes[t->dtype].bytes;

	/* memcpy: nothing aligns tensors in a file. */
	switch (t->dtype) {
	case ST_BF16:
		memcpy(out, p, n * 2);
		break;
	case ST_F16:
		for (uint64_t i = 0; i < n; i++) {
			uint16_t h;

			memcpy(&h, p + 2 * i, sizeof(h));
			out[i] = bf16_from_half(h);
		}
		break;
	case ST_F32:
		for (uint64_t i = 0; i < n; i++) {
			uint32_t u;

			memcpy(&u, p + 4 * i, sizeof(u));
			/* NaN keeps being one whatever its payload. */
			if ((u & 0x7fffffffu) > 0x7f800000u)
				out[i] = 0x7fc0;
			else
				out[i] = (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
		}
		break;
	}
}
