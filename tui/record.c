/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/record.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GAP 16u /* equal bytes that are not worth a run of their own */
#define FRAME_MAX (2u * (uint32_t)sizeof(struct octet_page) + 4096u)

static const char magic[8] = "OCTETREC";
static const uint32_t head[4] = {1, PAGE_VERSION, sizeof(struct octet_page), 0};

struct record {
	FILE *f;
	char *path;
	struct octet_page last;
	uint8_t frame[FRAME_MAX];
};

static void
free_record(struct record **rp)
{
	free((*rp)->path);
	free(*rp);
	*rp = NULL;
}

int
record_open(struct record **out, const char *path, struct err *err)
{
	struct record *r = calloc(1, sizeof(*r));
	int rc = 0;

	*out = NULL;
	if (r == NULL || (r->path = strdup(path)) == NULL) {
		free(r);
		return err_set(err, -ENOMEM, "out of memory");
	}
	r->f = fopen(path, "we");
	if (r->f == NULL || fwrite(magic, sizeof(magic), 1, r->f) != 1 || fwrite(head, sizeof(head), 1, r->f) != 1)
		rc = err_set(err, -errno, "%s: %s", path, strerror(errno));
	if (rc != 0) {
		if (r->f != NULL)
			fclose(r->f);
		free_record(&r);
	}
	*out = r;
	return rc;
}

static uint32_t
put_run(uint8_t *to, const uint8_t *page, uint32_t from, uint32_t len)
{
	memcpy(to, &from, 4);
	memcpy(to + 4, &len, 4);
	memcpy(to + 8, page + from, len);
	return 8 + len;
}

int
record_put(struct record *r, const struct octet_page *page, struct err *err)
{
	const uint8_t *now = (const uint8_t *)page, *was = (const uint8_t *)&r->last;
	uint32_t n = 0, from = 0, last = 0;
	bool open = false;

	for (uint32_t i = 0; i < sizeof(*page); i++) {
		if (now[i] == was[i])
			continue;
		if (open && i - last > GAP)
			n += put_run(r->frame + n, now, from, last + 1 - from), open = false;
		if (!open)
			from = i, open = true;
		last = i;
	}
	if (open)
		n += put_run(r->frame + n, now, from, last + 1 - from);
	r->last = *page;
	if (fwrite(&n, 4, 1, r->f) != 1 || (n > 0 && fwrite(r->frame, n, 1, r->f) != 1) || fflush(r->f) != 0)
		return err_set(err, -errno, "%s: %s", r->path, strerror(errno));
	return 0;
}

int
record_close(struct record **rp, struct err *err)
{
	int rc = 0;

	if (*rp == NULL)
		return 0;
	if (fclose((*rp)->f) != 0)
		rc = err_set(err, -errno, "%s: %s", (*rp)->path, strerror(errno));
	free_record(rp);
	return rc;
}

/* ---- reading ---- */

struct replay {
	FILE *f;
	char *path;
	uint64_t n;             /* frames read */
	struct octet_page page;
	uint8_t frame[FRAME_MAX];
};

void
replay_close(struct replay **rp)
{
	if (*rp == NULL)
		return;
	if ((*rp)->f != NULL)
		fclose((*rp)->f);
	free((*rp)->path);
	free(*rp);
	*rp = NULL;
}

static int
check_head(struct replay *r, struct err *err)
{
	char m[sizeof(magic)];
	uint32_t h[4];

	if (fread(m, sizeof(m), 1, r->f) != 1 || memcmp(m, magic, sizeof(m)) != 0 || fread(h, sizeof(h), 1, r->f) != 1)
		return err_set(err, -EPROTO, "%s: is no file of octet-console --record", r->path);
	if (memcmp(h, head, sizeof(h)) != 0)
		return err_set(err, -EPROTO, "%s: was recorded by another version (its status page is %u, %u bytes; here %u, %u)", r->path,
		    h[1], h[2], head[1], head[2]);
	return 0;
}

int
replay_open(struct replay **out, const char *path, struct err *err)
{
	struct replay *r = calloc(1, sizeof(*r));
	int rc;

	*out = NULL;
	if (r == NULL || (r->path = strdup(path)) == NULL) {
		free(r);
		return err_set(err, -ENOMEM, "out of memory");
	}
	r->f = fopen(path, "re");
	rc = r->f == NULL ? err_set(err, -errno, "%s: %s", path, strerror(errno)) : check_head(r, err);
	if (rc != 0)
		replay_close(&r);
	*out = r;
	return rc;
}

/* The runs of a frame, onto the page before. */
static int
apply(struct replay *r, uint32_t n, struct err *err)
{
	for (uint32_t at = 0; at < n;) {
		uint32_t from, len;

		if (n - at < 8)
			return err_set(err, -EPROTO, "%s: frame %llu ends within a run", r->path, (unsigned long long)r->n);
		memcpy(&from, r->frame + at, 4);
		memcpy(&len, r->frame + at + 4, 4);
		at += 8;
		if (len > n - at || from > sizeof(r->page) || len > sizeof(r->page) - from)
			return err_set(err, -EPROTO, "%s: frame %llu has a run outside the page", r->path, (unsigned long long)r->n);
		memcpy((uint8_t *)&r->page + from, r->frame + at, len);
		at += len;
	}
	if (r->page.magic != PAGE_MAGIC || r->page.version != PAGE_VERSION)
		return err_set(err, -EPROTO, "%s: frame %llu is no status page", r->path, (unsigned long long)r->n);
	return 0;
}

int
replay_next(struct replay *r, const struct octet_page **page, struct err *err)
{
	uint32_t n;
	int rc;

	if (fread(&n, 4, 1, r->f) != 1)
		return 0;
	if (n > FRAME_MAX)
		return err_set(err, -EPROTO, "%s: frame %llu has %u bytes", r->path, (unsigned long long)r->n, n);
	if (n > 0 && fread(r->frame, n, 1, r->f) != 1)
		return 0;
	rc = apply(r, n, err);
	r->n++;
	*page = &r->page;
	return rc == 0 ? 1 : rc;
}
