/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_SHARDS_H
#define OCTET_SHARDS_H
/*
 * The weights of a model directory: model.safetensors, or the files that
 * model.safetensors.index.json lists, checked against that list: each tensor
 * in the file that it names and in no other. Opened by one thread, read from any.
 */
#include "daemon/engine/safetensors.h"

#define SHARDS_SINGLE "model.safetensors"
#define SHARDS_INDEX "model.safetensors.index.json"

struct shards {
	struct safetensors *file; /* [n] ascending by name */
	size_t n;
	const char *list;         /* the file that says which tensors there are, for messages */
};

/* Where both are there, model.safetensors is read. */
int shards_open(struct shards *, const char *dir, struct err *);
void shards_close(struct shards *);
struct st_tensor *shards_find(const struct shards *, const char *name);
#endif
