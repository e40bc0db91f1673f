/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_SAFETENSORS_H
#define OCTET_SAFETENSORS_H
/*
 * One safetensors file, mapped read-only and checked whole before anything is
 * used: header length, JSON, dtypes, shapes against bytes, offsets without
 * overlap or hole. Opened by one thread, read from any. It knows nothing of
 * models. A file that is cut short while it is mapped raises SIGBUS: replace
 * checkpoints by rename, never in place.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "client/err.h"

#define ST_MAX_DIMS 4u

enum st_dtype { ST_F32, ST_F16, ST_BF16 };

struct st_tensor {
	char *name;
	const char *file;      /* of the safetensors, for messages */
	enum st_dtype dtype;
	uint32_t n_dims;
	uint64_t dim[ST_MAX_DIMS];
	uint64_t from, to;     /* bytes of the data part */
	const uint8_t *data;   /* no alignment */
	bool used;             /* the loader's mark */
};

struct safetensors {
	char *path;
	const char *file;           /* the last part of path */
	const uint8_t *map;
	size_t bytes, header_bytes; /* header: 8-byte length and JSON */
	int64_t changed_ns;         /* time of its last change */
	struct st_tensor *tensor;   /* [n] in the order of the data */
	struct st_tensor **by_name; /* [n] */
	size_t n;
};

int safetensors_open(struct safetensors *, const char *path, struct err *);
void safetensors_close(struct safetensors *);
struct st_tensor *safetensors_find(const struct safetensors *, const char *name);

/* Elements [at, at + n) rounded once to BF16, nearest even. NaN, Inf and an F32
 * that BF16 cannot hold: -EINVAL, the message names the tensor and the place. */
int safetensors_read_bf16(const struct st_tensor *, uint64_t at, uint64_t n, uint16_t *out, struct err *);
size_t safetensors_elem_bytes(enum st_dtype);

/* A string of a file as a message may show it: printable ASCII, not too long. */
#define ST_PRINTABLE 112
const char *safetensors_printable(const char *, char buf[ST_PRINTABLE]);
#endif
