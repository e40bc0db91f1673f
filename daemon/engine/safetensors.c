/* SPDX-License-Identifier: Apache-2.0 */
/* https://huggingface.co/docs/safetensors: "Format". */
#include "daemon/engine/safetensors.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_HEADER 100000000u /* the format's own limit */

static const struct dtype {
	const char *name;
	uint32_t bytes;
} dtypes[] = {[ST_F32] = {"F32", 4}, [ST_F16] = {"F16", 2}, [ST_BF16] = {"BF16", 2}};
#define N_DTYPES (sizeof(dtypes) / sizeof(*dtypes))

size_t
safetensors_elem_bytes(enum st_dtype d)
{
	return dtypes[d].bytes;
}

const char *
safetensors_printable(const char *s, char buf[ST_PRINTABLE])
{
	size_t n = strlen(s), i;

	for (i = 0; i < n && i < ST_PRINTABLE - 1; i++)
		buf[i] = s[i];
	if (i < n)
		memcpy(buf + i - 3, "...", 3);
	buf[i] = '\0';
	for (i = 0; buf[i] != '\0'; i++)
		if (buf[i] < 0x20 || buf[i] > 0x7e)
			buf[i] = '?';
	return buf;
}

/* ---- header ---- */

static int
map_file(struct safetensors *s, struct err *err)
{
	int fd = open(s->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), rc = 0; /* a FIFO must not hang us */
	struct stat st;
	void *p;

	if (fd < 0)
		return err_set(err, -errno, "%s: %s", s->path, strerror(errno));
	if (fstat(fd, &st) != 0)
		rc = err_set(err, -errno, "%s: %s", s->path, strerror(errno));
	else if (!S_ISREG(st.st_mode))
		rc = err_set(err, -EINVAL, "%s: not a regular file", s->path);
	else if (st.st_size < 8)
		rc = err_set(err, -EINVAL, "%s: a file of %lld bytes holds no safetensors header", s->file,
		    (long long)st.st_size);
	else if ((p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED)
		rc = err_set(err, -errno, "%s: mmap: %s", s->path, strerror(errno));
	else {
		s->map = p;
		s->bytes = (size_t)st.st_size;
		s->changed_ns = (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec;
	}
	close(fd);
	return rc;
}

/* t->name must be set: every message has it. */
static int
bad_tensor(const struct st_tensor *t, struct err *err, const char *what)
{
	char name[ST_PRINTABLE];

	return err_set(err, -EINVAL, "%s: tensor '%s' %s", t->file, safetensors_printable(t->name, name), what);
}

static int
parse_dtype(struct st_tensor *t, const json_t *v, struct err *err)
{
	char what[ST_PRINTABLE + 64], shown[ST_PRINTABLE];
	const char *name = json_string_value(v);

	if (name == NULL)
		return bad_tensor(t, err, "has no dtype");
	for (size_t i = 0; i < N_DTYPES; i++) {
		if (strcmp(name, dtypes[i].name) == 0) {
			t->dtype = (enum st_dtype)i;
			return 0;
		}
	}
	snprintf(what, sizeof(what), "has dtype %s (F32, F16 and BF16 are supported)",
	    safetensors_printable(name, shown));
	return bad_tensor(t, err, what);
}

static int
parse_dims(struct st_tensor *t, const json_t *v, struct err *err)
{
	if (!json_is_array(v) || json_array_size(v) > ST_MAX_DIMS)
		return bad_tensor(t, err, "has no shape of at most 4 dimensions");
	t->n_dims = (uint32_t)json_array_size(v);
	for (uint32_t i = 0; i < t->n_dims; i++) {
		const json_t *d = json_array_get(v, i);

		if (!json_is_integer(d) || json_integer_value(d) < 0)
			return bad_tensor(t, err, "has a shape that is no list of sizes");
		t->dim[i] = (uint64_t)json_integer_value(d);
	}
	return 0;
}

/* Needs dtype and shape. */
static int
parse_offsets(const struct safetensors *s, struct st_tensor *t, const json_t *v, struct err *err)
{
	const json_t *from = json_array_get(v, 0), *to = json_array_get(v, 1);
	uint64_t data = s->bytes - s->header_bytes, need = dtypes[t->dtype].bytes;
	char what[160];

	if (json_array_size(v) != 2 || !json_is_integer(from) || !json_is_integer(to) || json_integer_value(from) < 0 ||
	    json_integer_value(to) < json_integer_value(from))
		return bad_tensor(t, err, "has data_offsets that are no [begin, end]");
	t->from = (uint64_t)json_integer_value(from);
	t->to = (uint64_t)json_integer_value(to);
	if (t->to > data) {
		snprintf(what, sizeof(what), "ends at byte %llu of the data, the file has %llu",
		    (unsigned long long)t->to, (unsigned long long)data);
		return bad_tensor(t, err, what);
	}
	for (uint32_t i = 0; i < t->n_dims; i++)
		if (__builtin_mul_overflow(need, t->dim[i], &need))
			return bad_tensor(t, err, "has a shape without bounds");
	if (t->to - t->from != need) {
		snprintf(what, sizeof(what), "has %llu bytes, its shape takes %llu in %s",
		    (unsigned long long)(t->to - t->from), (unsigned long long)need, dtypes[t->dtype].name);
		return bad_tensor(t, err, what);
	}
	t->data = s->map + s->header_bytes + t->from;
	return 0;
}

static int
add_tensor(struct safetensors *s, const char *name, const json_t *v, struct err *err)
{
	struct st_tensor *t = &s->tensor[s->n];
	int rc;

	t->file = s->file;
	t->name = strdup(name);
	if (t->name == NULL)
		return err_set(err, -ENOMEM, "%s: out of memory", s->file);
	s->n++;
	if (!json_is_object(v))
		return bad_tensor(t, err, "is no JSON object");
	if ((rc = parse_dtype(t, json_object_get(v, "dtype"), err)) != 0 ||
	    (rc = parse_dims(t, json_object_get(v, "shape"), err)) != 0)
		return rc;
	return parse_offsets(s, t, json_object_get(v, "data_offsets"), err);
}

static int
compare_offsets(const void *pa, const void *pb)
{
	const struct st_tensor *a = pa, *b = pb;

	if (a->from != b->from)
		return a->from < b->from ? -1 : 1;
	return a->to < b->to ? -1 : a->to > b->to;
}

static int
compare_names(const void *pa, const void *pb)
{
	const struct st_tensor *const *a = pa, *const *b = pb;

	return strcmp((*a)->name, (*b)->name);
}

/* Every byte of the data part belongs to one tensor. */
static int
check_cover(struct safetensors *s, struct err *err)
{
	uint64_t at = 0, data = s->bytes - s->header_bytes;
	char name[ST_PRINTABLE], what[ST_PRINTABLE + 64];

	qsort(s->tensor, s->n, sizeof(*s->tensor), compare_offsets);
	for (size_t i = 0; i < s->n; i++) {
		const struct st_tensor *t = &s->tensor[i];

		if (t->from < at) {
			snprintf(what, sizeof(what), "overlaps '%s'",
			    safetensors_printable(s->tensor[i - 1].name, name));
			return bad_tensor(t, err, what);
		}
		if (t->from > at)
			return err_set(err, -EINVAL, "%s: hole of %llu bytes before tensor '%s'", s->file,
			    (unsigned long long)(t->from - at), safetensors_printable(t->name, name));
		at = t->to;
	}
	if (at != data)
		return err_set(err, -EINVAL, "%s: %llu bytes after the last tensor", s->file,
		    (unsigned long long)(data - at));
	return 0;
}

static int
parse_tensors(struct safetensors *s, json_t *root, struct err *err)
{
	const char *name;
	json_t *v;
	int rc = 0;

	s->tensor = calloc(json_object_size(root) + 1, sizeof(*s->tensor));
	s->by_name = calloc(json_object_size(root) + 1, sizeof(*s->by_name));
	if (s->tensor == NULL || s->by_name == NULL)
		return err_set(err, -ENOMEM, "%s: out of memory", s->file);
	json_object_foreach(root, name, v) {
		if (strcmp(name, "__metadata__") == 0)
			continue;
		if ((rc = add_tensor(s, name, v, err)) != 0)
			return rc;
	}
	if ((rc = check_cover(s, err)) != 0)
		return rc;
	for (size_t i = 0; i < s->n; i++)
		s->by_name[i] = &s->tensor[i];
	qsort(s->by_name, s->n, sizeof(*s->by_name), compare_names);
	return 0;
}

static int
parse_header(struct safetensors *s, struct err *err)
{
	char why[ST_PRINTABLE];
	json_error_t je;
	json_t *root;
	uint64_t len;
	int rc;

	memcpy(&len, s->map, sizeof(len));
	len = le64toh(len);
	if (len > MAX_HEADER)
		return err_set(err, -EINVAL, "%s: header of %llu bytes, at most %u are read", s->file,
		    (unsigned long long)len, MAX_HEADER);
	if (len > s->bytes - 8)
		return err_set(err, -EINVAL, "%s: header of %llu bytes in a file of %zu", s->file,
		    (unsigned long long)len, s->bytes);
	s->header_bytes = 8 + (size_t)len;
	root = json_loadb((const char *)s->map + 8, (size_t)len, JSON_REJECT_DUPLICATES, &je);
	if (root == NULL)
		rc = err_set(err, -EINVAL, "%s: header, byte %d: %s", s->file, je.position,
		    safetensors_printable(je.text, why));
	else if (!json_is_object(root))
		rc = err_set(err, -EINVAL, "%s: header: not a JSON object", s->file);
	else
		rc = parse_tensors(s, root, err);
	json_decref(root);
	return rc;
}

int
safetensors_open(struct safetensors *s, const char *path, struct err *err)
{
	const char *slash;
	int rc;

	memset(s, 0, sizeof(*s));
	s->path = strdup(path);
	if (s->path == NULL)
		return err_set(err, -ENOMEM, "%s: out of memory", path);
	slash = strrchr(s->path, '/');
	s->file = slash != NULL ? slash + 1 : s->path;
	rc = map_file(s, err);
	if (rc == 0)
		rc = parse_header(s, err);
	if (rc != 0)
		safetensors_close(s);
	return rc;
}

void
safetensors_close(struct safetensors *s)
{
	for (size_t i = 0; i < s->n; i++)
		free(s->tensor[i].name);
	free(s->tensor);
	free(s->by_name);
	free(s->path);
	if (s->map != NULL)
		munmap((void *)(uintptr_t)s->map, s->bytes);
	memset(s, 0, sizeof(*s));
}

struct st_tensor *
safetensors_find(const struct safetensors *s, const char *name)
{
	struct st_tensor key = {.name = (char *)(uintptr_t)name}, *kp = &key, **found;

	if (s->n == 0)
		return NULL;
	found = bsearch(&kp, s->by_name, s->n, sizeof(*s->by_name), compare_names);
	return found != NULL ? *found : NULL;
}

/* ---- elements ---- */

/*
 * Arithmetic on the bits, without FP32 subnormals: kernel threads flush them, the
 * master must keep them. memcpy: nothing aligns tensors in a file. Each of these
 * converts all and says whether one was not finite as BF16.
 */

static bool
read_bf16(const uint8_t *p, uint64_t n, uint16_t *out)
{
	bool bad = false;

	memcpy(out, p, n * sizeof(*out));
	for (uint64_t i = 0; i < n; i++)
		bad |= (out[i] & 0x7f80u) == 0x7f80u;
	return bad;
}

#define CHUNK 256u /* so many at a time: with a bound it knows, the compiler makes vectors of them */

static bool
read_f32(const uint8_t *p, uint64_t n, uint16_t *out)
{
	uint32_t u[CHUNK] = {0}, bad = 0;
	uint16_t b[CHUNK];

	for (uint64_t i = 0; i < n; i += CHUNK) {
		size_t here = n - i < CHUNK ? n - i : CHUNK;

		memcpy(u, p + i * sizeof(*u), here * sizeof(*u));
		for (uint32_t j = 0; j < CHUNK; j++) {
			/* From 0x7f7f8000 on nearest even is Inf, or it was Inf or NaN. */
			bad |= (u[j] & 0x7fffffffu) + 0x808000u;
			b[j] = (uint16_t)((u[j] + 0x7fffu + (u[j] >> 16 & 1)) >> 16);
		}
		memcpy(out + i, b, here * sizeof(*b));
	}
	return bad >> 31;
}

/* Finite halves fit the range of BF16; a subnormal one is a normal there. Without branches: a compiler can make vectors of it. */
static inline uint32_t
f32_from_half(uint16_t h)
{
	uint32_t mag = h & 0x7fffu, small = 0u - (mag < 0x400), infinite = 0u - (mag >= 0x7c00), u;
	float f = (float)(int32_t)mag * 0x1p-24f;

	memcpy(&u, &f, sizeof(u));
	u = (u & small) | (((mag << 13) + (112u << 23)) & ~small);
	return u | (infinite & 0x7f800000u) | (uint32_t)(h & 0x8000u) << 16;
}

static bool
read_f16(const uint8_t *p, uint64_t n, uint16_t *out)
{
	uint16_t h[CHUNK] = {0}, b[CHUNK];
	uint32_t bad = 0;

	for (uint64_t i = 0; i < n; i += CHUNK) {
		size_t here = n - i < CHUNK ? n - i : CHUNK;

		memcpy(h, p + i * sizeof(*h), here * sizeof(*h));
		for (uint32_t j = 0; j < CHUNK; j++) {
			uint32_t u = f32_from_half(h[j]);

			bad |= (h[j] & 0x7c00u) + 0x400u;
			b[j] = (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
		}
		memcpy(out + i, b, here * sizeof(*b));
	}
	return bad >> 15;
}

/* The element as FP32. */
static float
element(const struct st_tensor *t, uint64_t i)
{
	const uint8_t *p = t->data + i * dtypes[t->dtype].bytes;
	uint16_t h = 0;
	uint32_t u;
	float f;

	if (t->dtype == ST_F32)
		memcpy(&u, p, sizeof(u));
	else {
		memcpy(&h, p, sizeof(h));
		u = t->dtype == ST_F16 ? f32_from_half(h) : (uint32_t)h << 16;
	}
	memcpy(&f, &u, sizeof(f));
	return f;
}

/* Says what is wrong with element i, or nothing. */
static bool
tell_bad(const struct st_tensor *t, uint64_t i, struct err *err)
{
	char place[96], what[160];
	float f = element(t, i);
	size_t at = 0;

	if (isfinite(f) && fabsf(f) < 0x1.ffp127f)
		return false;
	for (uint32_t d = 0; d < t->n_dims; d++) {
		uint64_t stride = 1;

		for (uint32_t e = d + 1; e < t->n_dims; e++)
			stride *= t->dim[e];
		at += (size_t)snprintf(place + at, sizeof(place) - at, "%s%llu", d > 0 ? ", " : "",
		    (unsigned long long)(i / stride % t->dim[d]));
	}
	place[at] = '\0';
	if (isfinite(f))
		snprintf(what, sizeof(what), "holds %.9g at [%s], too large for BF16", (double)f, place);
	else
		snprintf(what, sizeof(what), "holds %s at [%s]", isnan(f) ? "NaN" : f < 0 ? "-Inf" : "Inf", place);
	bad_tensor(t, err, what);
	return true;
}

int
safetensors_read_bf16(const struct st_tensor *t, uint64_t at, uint64_t n, uint16_t *out, struct err *err)
{
	static bool (*const read[])(const uint8_t *, uint64_t, uint16_t *) = {
	    [ST_F32] = read_f32, [ST_F16] = read_f16, [ST_BF16] = read_bf16};

	if (!read[t->dtype](t->data + at * dtypes[t->dtype].bytes, n, out))
		return 0;
	for (uint64_t i = at; i < at + n; i++)
		if (tell_bad(t, i, err))
			return -EINVAL;
	return bad_tensor(t, err, "changed while it was read");
}
