/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/packed.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define MAGIC "octetpk\n"
#define VERSION 2u          /* of the layout below, of the planes, and of what packing makes of a weight */
#define HUGE_PAGE (2u << 20)
#define PART (8u << 20)     /* bytes that are hashed at a time */
#define TABLE_AT 4096u
#define ORDER 0x01020304u    /* of bytes: the file is as memory is */

/* At 0; the table follows, then the arena at a multiple of a huge page. */
struct header {
	char magic[8];
	uint32_t version, order;         /* ORDER */
	uint64_t digest, files;
	uint64_t table_bytes, arena_at, arena_bytes;
	uint64_t table_hash, arena_hash; /* XXH3 of the table; of the XXH3 of the arena's parts */
	uint64_t hash;                   /* XXH3 of what is above */
};

/* Of the table: its exceptions follow. */
struct entry {
	uint32_t n_exc;
	float tensor_scale;
};

/* ---- hashing ---- */

struct hashing {
	const char *arena;
	uint64_t bytes;
	uint64_t *part; /* [parts] */
	uint32_t n, next; /* next: atomic */
};

static void
hash_parts(void *arg, uint32_t part, uint32_t parts)
{
	struct hashing *h = arg;
	uint32_t i;

	(void)part, (void)parts;
	while ((i = __atomic_fetch_add(&h->next, 1, __ATOMIC_RELAXED)) < h->n) {
		uint64_t at = (uint64_t)i * PART;

		h->part[i] = XXH3_64bits(h->arena + at, h->bytes - at < PART ? h->bytes - at : PART);
	}
}

static int
hash_arena(const void *arena, uint64_t bytes, struct team *team, uint64_t *out)
{
	struct hashing h = {.arena = arena, .bytes = bytes, .n = (uint32_t)((bytes + PART - 1) / PART)};

	h.part = malloc((h.n + 1) * sizeof(*h.part));
	if (h.part == NULL)
		return -ENOMEM;
	team_run(team, hash_parts, &h);
	*out = XXH3_64bits(h.part, h.n * sizeof(*h.part));
	free(h.part);
	return 0;
}

static uint64_t
hash_header(const struct header *h)
{
	return XXH3_64bits(h, offsetof(struct header, hash));
}

/* ---- reading ---- */

/* At a multiple of a huge page, so that the file system's huge pages can be mapped as such. */
static int
map_file(struct packed *p, int fd, struct err *err)
{
	char *room = mmap(NULL, p->bytes + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	size_t before;

	if (room == MAP_FAILED)
		return err_set(err, -errno, "mmap: %s", strerror(errno));
	before = (HUGE_PAGE - (uintptr_t)room % HUGE_PAGE) % HUGE_PAGE;
	if (before > 0)
		munmap(room, before);
	munmap(room + before + ((p->bytes + 4095) & ~(size_t)4095), HUGE_PAGE - before);
	p->map = mmap(room + before, p->bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
	if (p->map == MAP_FAILED) {
		int rc = err_set(err, -errno, "mmap: %s", strerror(errno));

		munmap(room + before, p->bytes);
		p->map = NULL;
		return rc;
	}
	madvise(p->map, p->bytes, MADV_HUGEPAGE); /* does without */
	return 0;
}

static int
check(struct packed *p, const struct packed_key *key, uint64_t arena_bytes, struct team *team, struct err *err)
{
	struct header h;
	uint64_t hash = 0;

	memcpy(&h, p->map, sizeof(h));
	if (memcmp(h.magic, MAGIC, sizeof(h.magic)) != 0 || h.hash != hash_header(&h))
		return err_set(err, -EINVAL, "no header of such a file");
	if (h.version != VERSION || h.order != ORDER)
		return err_set(err, -EINVAL, "version %u, this octet has %u", h.version, VERSION);
	if (h.digest != key->digest || h.files != key->files || h.arena_bytes != arena_bytes)
		return err_set(err, -EINVAL, "made of another checkpoint: the model's digest, or a file's name, size or time differs");
	if (h.table_bytes > p->bytes || h.arena_at % HUGE_PAGE != 0 || h.arena_at < TABLE_AT + h.table_bytes || h.arena_at > p->bytes ||
	    p->bytes - h.arena_at != arena_bytes)
		return err_set(err, -EINVAL, "%zu bytes: cut short, or longer than it says", p->bytes);
	p->next = p->map + TABLE_AT, p->end = p->next + h.table_bytes;
	p->arena = p->map + h.arena_at;
	if (XXH3_64bits(p->next, h.table_bytes) != h.table_hash)
		return err_set(err, -EINVAL, "the table of exceptions does not have its hash");
	if (hash_arena(p->arena, arena_bytes, team, &hash) != 0)
		return err_set(err, -ENOMEM, "out of memory");
	return hash == h.arena_hash ? 0 : err_set(err, -EINVAL, "the weights do not have their hash");
}

int
packed_open(struct packed *p, const char *path, const struct packed_key *key, uint64_t arena_bytes, struct team *team,
    struct err *err)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), rc = 0;
	struct stat st;

	memset(p, 0, sizeof(*p));
	if (fd < 0)
		return err_set(err, -errno, "%s: %s", path, strerror(errno));
	if (fstat(fd, &st) != 0)
		rc = err_set(err, -errno, "%s", strerror(errno));
	else if (!S_ISREG(st.st_mode) || st.st_size < (off_t)TABLE_AT)
		rc = err_set(err, -EINVAL, "no header of such a file");
	else {
		p->bytes = (size_t)st.st_size;
		if ((rc = map_file(p, fd, err)) == 0)
			rc = check(p, key, arena_bytes, team, err);
	}
	close(fd);
	if (rc == 0)
		return 0;
	packed_close(p);
	err_prefix(err, "%s", path);
	return rc;
}

int
packed_take(struct packed *p, struct k_weight *w, struct err *err)
{
	uint64_t blocks = (uint64_t)(w->n_pad / K_PANEL) * (w->k_pad / K_BLOCK);
	const struct k_exception *x;
	struct entry e;

	if ((size_t)(p->end - p->next) < sizeof(e))
		return err_set(err, -EINVAL, PACKED_NAME ": the table ends early");
	memcpy(&e, p->next, sizeof(e));
	p->next += sizeof(e);
	if (!isfinite(e.tensor_scale) || e.tensor_scale < 0 || e.n_exc > (size_t)(p->end - p->next) / sizeof(*x))
		return err_set(err, -EINVAL, PACKED_NAME ": a weight's entry is broken");
	x = (const struct k_exception *)(const void *)p->next;
	for (uint32_t i = 0; i < e.n_exc; i++)
		if (x[i].block >= blocks || x[i].index >= 1024 || (i > 0 && (x[i].block < x[i - 1].block ||
		    (x[i].block == x[i - 1].block && x[i].index <= x[i - 1].index))))
			return err_set(err, -EINVAL, PACKED_NAME ": exception %u of a weight is out of its place", i);
	p->next += e.n_exc * sizeof(*x);
	w->tensor_scale = e.tensor_scale;
	w->n_exc = e.n_exc;
	w->exc = (struct k_exception *)(uintptr_t)x; /* nobody writes there */
	return 0;
}

void
packed_close(struct packed *p)
{
	if (p->map != NULL)
		munmap(p->map, p->bytes);
	memset(p, 0, sizeof(*p));
}

/* ---- writing ---- */

static int
put(int fd, const void *from, uint64_t bytes)
{
	const char *p = from;

	while (bytes > 0) {
		ssize_t n = write(fd, p, bytes < 1u << 30 ? bytes : 1u << 30);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n == 0 ? -EIO : -errno;
		p += n, bytes -= (uint64_t)n;
	}
	return 0;
}

static char *
make_table(const struct k_weight *const *w, uint32_t n, uint64_t *bytes)
{
	char *table, *at;

	*bytes = 0;
	for (uint32_t i = 0; i < n; i++)
		*bytes += sizeof(struct entry) + (uint64_t)w[i]->n_exc * sizeof(*w[i]->exc);
	at = table = malloc(*bytes + 1);
	for (uint32_t i = 0; table != NULL && i < n; i++) {
		struct entry e = {w[i]->n_exc, w[i]->tensor_scale};

		memcpy(at, &e, sizeof(e));
		at += sizeof(e);
		if (e.n_exc > 0)
			memcpy(at, w[i]->exc, e.n_exc * sizeof(*w[i]->exc));
		at += e.n_exc * sizeof(*w[i]->exc);
	}
	return table;
}

static int
write_all(int fd, const struct header *h, const char *table, const void *arena)
{
	int rc = put(fd, h, sizeof(*h));

	if (rc == 0 && lseek(fd, TABLE_AT, SEEK_SET) < 0)
		rc = -errno;
	if (rc != 0 || (rc = put(fd, table, h->table_bytes)) != 0)
		return rc;
	if (lseek(fd, (off_t)h->arena_at, SEEK_SET) < 0)
		return -errno;
	if ((rc = put(fd, arena, h->arena_bytes)) == 0 && fsync(fd) != 0)
		rc = -errno;
	return rc;
}

int
packed_write(const char *path, const struct packed_key *key, const void *arena, uint64_t arena_bytes,
    const struct k_weight *const *w, uint32_t n, struct team *team, struct err *err)
{
	struct header h = {.magic = MAGIC, .version = VERSION, .order = ORDER, .digest = key->digest, .files = key->files,
	    .arena_bytes = arena_bytes};
	char *table = make_table(w, n, &h.table_bytes), *temporary = NULL;
	int fd = -1, rc = -ENOMEM;

	if (table == NULL || asprintf(&temporary, "%s.new", path) < 0 || hash_arena(arena, arena_bytes, team, &h.arena_hash) != 0) {
		free(table), free(temporary);
		return err_set(err, rc, "%s: out of memory", path);
	}
	h.table_hash = XXH3_64bits(table, h.table_bytes);
	h.arena_at = (TABLE_AT + h.table_bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
	h.hash = hash_header(&h);
	unlink(temporary); /* of one that was killed */
	fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	rc = fd < 0 ? -errno : write_all(fd, &h, table, arena);
	if (fd >= 0 && close(fd) != 0 && rc == 0)
		rc = -errno;
	if (rc == 0 && rename(temporary, path) != 0)
		rc = -errno;
	if (rc != 0 && fd >= 0)
		unlink(temporary);
	if (rc != 0)
		err_set(err, rc, "%s: %s", path, strerror(-rc));
	free(table), free(temporary);
	return rc;
}
