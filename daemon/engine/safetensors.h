/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_SAFETENSORS_H
#define OCTET_SAFETENSORS_H
/*
 * One safetensors file, mapped read-only and checked whole before anything is
 * used: header length, JSON, dtypes, shapes against bytes, offsets without
 * overlap or hole. A file that is cut short while it is mapped would raise
 * SIGBUS: checkpoints are replaced by rename, not in place.
 */
#include <stddef.h>
#include <stdint.h>
#include "client/err.h"

enum st_dtype { ST_F32, ST_F16, ST_BF16 };

struct st_tensor {
	char *name;
	enum st_dtype dtype;
	uint32_t n_dims;
	uint64_t dim[4];
	uint64_t from, to;     /* bytes of the data part */
	const void *data;
	uint32_t used;         /* the loader's mark */
};

struct safetensors {
	char *path;
	const uint8_t *map;
	size_t bytes, header_bytes; /* header: 8-byte length and JSON */
	struct st_tensor *tensor;   /* sorted by from */
	size_t n;
};

int safetensors_open(struct safetensors *, const char *path, struct err *);
void safetensors_close(struct safetensors *);
struct st_tensor *safetensors_find(struct safetensors *, const char *name);
/* Elements [at, at + n) rounded once to BF16, nearest even. */
void st_read_bf16(const struct st_tensor *, uint64_t at, uint64_t n, uint16_t *out);
#endif
