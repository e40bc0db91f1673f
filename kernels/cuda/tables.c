/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Page tables on the card. A table stays where it is from step to step, and a step sends what is new of it: the block that
 * was the last one, and those after it. Blocks before that do not change while a table keeps its number; when its sequence
 * gives its pages back it gets another. Where the room ends, all is forgotten and sent again.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/plugin.h"

#define LEAST_BLOCKS 8u

struct table {
	uint64_t id;             /* 0: none */
	uint32_t at;             /* first entry there */
	uint32_t room, sent;     /* blocks */
};

int
tables_new(struct tables *t, uint32_t max_rows)
{
	for (t->n_slots = 4096; t->n_slots < 4 * (uint64_t)max_rows;)
		t->n_slots *= 2;
	t->slot = calloc(t->n_slots, sizeof(*t->slot));
	return t->slot != NULL ? 0 : -ENOMEM;
}

void
tables_free(struct tables *t)
{
	cudaFree(t->dev);
	free(t->slot);
	memset(t, 0, sizeof(*t));
}

static void
forget(struct tables *t)
{
	memset(t->slot, 0, t->n_slots * sizeof(*t->slot));
	t->used = t->n_tables = 0;
}

static struct table *
find(const struct tables *t, uint64_t id)
{
	uint32_t i = (uint32_t)(id * 0x9E3779B97F4A7C15u >> 32) & (t->n_slots - 1);

	while (t->slot[i].id != 0 && t->slot[i].id != id)
		i = (i + 1) & (t->n_slots - 1);
	return &t->slot[i];
}

static uint32_t
blocks_of(const struct kd_row *r)
{
	return r->pos / K_BLOCK + 1;
}

/* Rows whose tables are one; the last of them needs the most of it. */
static uint32_t
same_table(const struct kd_row *row, uint32_t i, uint32_t n)
{
	uint32_t end = i + 1;

	while (end < n && row[end].table_id == row[i].table_id)
		end++;
	return end;
}

static size_t
room_for(uint32_t blocks)
{
	uint32_t room = LEAST_BLOCKS;

	while (room < blocks)
		room *= 2;
	return room;
}

/* Where a table of so many blocks lies, with room for them; NULL: there is none. */
static struct table *
place(struct tables *t, uint64_t id, uint32_t blocks, uint32_t n_layers)
{
	struct table *table = find(t, id);
	size_t room = room_for(blocks);

	if (table->id == id && table->room >= blocks)
		return table;
	if (t->used + room * n_layers > t->cap || t->n_tables > t->n_slots / 2)
		return NULL;
	t->n_tables += table->id == 0;
	*table = (struct table){id, (uint32_t)t->used, (uint32_t)room, 0};
	t->used += room * n_layers;
	return table;
}

/* Places all tables of a step and notes what is new of each; false: there is no room. */
static bool
place_all(struct kd_device *d, const struct kd_row *row, uint32_t n)
{
	struct tables *t = &d->tables;
	uint32_t layers = d->m.n_layers;

	t->n_new = t->n_patches = 0;
	for (uint32_t i = 0, end; i < n; i = end) {
		uint32_t blocks, from;
		struct table *table;

		end = same_table(row, i, n);
		blocks = blocks_of(&row[end - 1]);
		if ((table = place(t, row[i].table_id, blocks, layers)) == NULL)
			return false;
		for (uint32_t r = i; r < end; r++)
			d->host->first[r] = table->at;
		if (blocks < table->sent)
			continue;
		from = table->sent > 0 ? table->sent - 1 : 0;
		d->host->patch[t->n_patches++] = (struct cu_patch){table->at + from * layers, (uint32_t)t->n_new, (blocks - from) * layers, i};
		t->n_new += (size_t)(blocks - from) * layers;
		table->sent = blocks;
	}
	return true;
}

/* Room for four times what the step needs. */
static int
grow_tables(struct kd_device *d, const struct kd_row *row, uint32_t n, char *why, size_t why_len)
{
	struct tables *t = &d->tables;
	size_t need = 0;
	int rc;

	for (uint32_t i = 0, end; i < n; i = end) {
		end = same_table(row, i, n);
		need += room_for(blocks_of(&row[end - 1])) * d->m.n_layers;
	}
	if (need > t->cap / 2) {
		if (4 * need > UINT32_MAX)
			return snprintf(why, why_len, "page tables of %zu entries", need), -ENOMEM;
		step_free_graphs(d); /* they know the old address */
		cudaFree(t->dev);
		t->dev = NULL, t->cap = 0;
		if ((rc = cu_failed(cudaMalloc((void **)&t->dev, 4 * need * sizeof(*t->dev)), "memory for page tables", why, why_len)) != 0)
			return rc;
		t->cap = 4 * need;
	}
	forget(t);
	return 0;
}

/* Decides what a step sends and puts it into pinned memory. */
int
tables_stage(struct kd_device *d, const struct kd_row *row, uint32_t n, char *why, size_t why_len)
{
	struct tables *t = &d->tables;
	int rc;

	if (!place_all(d, row, n)) {
		if ((rc = grow_tables(d, row, n, why, why_len)) != 0)
			return rc;
		if (!place_all(d, row, n))
			return snprintf(why, why_len, "more sequences in a step than rows"), -EINVAL;
	}
	if ((rc = step_grow(d, false, (void **)&d->host->block, &d->host->cap_block, t->n_new, sizeof(*d->host->block), why, why_len)) != 0 ||
	    (rc = step_grow(d, true, (void **)&d->dev.block, &d->dev.cap_block, t->n_new, sizeof(*d->dev.block), why, why_len)) != 0)
		return rc;
	for (uint32_t i = 0; i < t->n_patches; i++) {
		const struct cu_patch *p = &d->host->patch[i];
		const struct table *table = find(t, row[p->row].table_id);

		memcpy(d->host->block + p->from, row[p->row].table + (p->at - table->at), p->n * sizeof(*d->host->block));
	}
	return 0;
}

/* On the stream, behind the copy of the step's rows. */
void
tables_send(struct kd_device *d)
{
	struct tables *t = &d->tables;

	if (t->n_patches == 0)
		return;
	cudaMemcpyAsync(d->dev.block, d->host->block, t->n_new * sizeof(*d->host->block), cudaMemcpyHostToDevice, d->stream);
	cu_patch_tables(d->dev.patch, t->n_patches, d->dev.block, t->dev, d->stream);
}
