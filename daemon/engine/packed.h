/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_PACKED_H
#define OCTET_PACKED_H
/*
 * packed.octet: the weights of a model as they lie in memory once they are packed, in a file beside the checkpoint. A
 * start maps it instead of packing again. It is checked whole (a hash of every byte, the places of the exceptions) and
 * taken only for the checkpoint that it was made of. It knows nothing of models: an arena and a list of weights. One
 * thread opens it, any may read it. A file that is cut short while it is mapped raises SIGBUS: packed_write() replaces
 * it by rename.
 */
#include <stddef.h>
#include <stdint.h>
#include "client/err.h"
#include "daemon/engine/team.h"
#include "kernels/kernels.h"

#define PACKED_NAME "packed.octet"

/* What it was made of. */
struct packed_key {
	uint64_t digest; /* of the model */
	uint64_t files;  /* names, sizes and times of the checkpoint's files */
};

struct packed {
	char *map;       /* NULL: not open */
	size_t bytes;
	char *arena;     /* of the size asked for, 2 MiB aligned, read-only */
	const char *next, *end; /* of the table of weights */
};

/* Maps a file for an arena of so many bytes, and reads it once with the team (NULL: this thread). -ENOENT: there is none;
 * -EINVAL with why: it is of another checkpoint, of another octet, or broken. */
int packed_open(struct packed *, const char *path, const struct packed_key *, uint64_t arena_bytes, struct team *, struct err *);
/* What the next weight, in the order they were written, has beside the arena: w->exc points into the file. -EINVAL if that
 * is not of such a weight. */
int packed_take(struct packed *, struct k_weight *w, struct err *);
void packed_close(struct packed *);

/* Writes a new file in the place of an old one; nothing is left behind when it fails. */
int packed_write(const char *path, const struct packed_key *, const void *arena, uint64_t arena_bytes,
    const struct k_weight *const *w, uint32_t n, struct team *, struct err *);
#endif
