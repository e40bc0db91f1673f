/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_KV_H
#define OCTET_KV_H
/*
 * The paged KV cache. A page holds, of one layer and one absolute block of 32
 * positions, K or V in BF16, or both in FP8 (with their scales beside it): all
 * pages are equal, so layers may change format one by one. A sequence's table
 * has the pages of each block and layer; after a flip a block has pages in both
 * formats, and each position is read from the one that it was written to.
 *
 * Prefix cache: a block whose positions, and all before it, ran under one plan
 * may be published under (scope, plan digest, tokens up to its end). It is then
 * shared, read-only; when no sequence holds it, it stays until its pages are
 * needed, the longest unused first. Engine thread only.
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/engine/model.h"
#include "daemon/engine/plan.h"

#define KV_PAGE_TOKENS K_BLOCK
#define KV_NONE UINT32_MAX

/* Pages of one layer's block, or KV_NONE. */
struct kv_block {
	uint32_t k, v;     /* BF16 */
	uint32_t q;        /* FP8, K and V */
	uint32_t fp8;      /* bit j: position j lies in q */
};

/* A sequence's table; all its memory is made by kv_seq_new(). */
struct kv_seq {
	struct kv_block *block; /* [max_blocks][n_layers] */
	uint32_t *prefix;       /* [max_blocks] published entry that holds the block's pages, or KV_NONE */
	uint32_t n_blocks;      /* opened */
	uint32_t n_dropped;     /* blocks before this one fell out of the sliding window */
	uint32_t n_published;   /* blocks at the front that are published */
	uint32_t max_blocks, n_layers;
	uint64_t uid;           /* another one whenever blocks change that were full: copies of the table are stale then */
};

struct kv_prefix;

struct kv_pool {
	uint16_t *mem;          /* [n_pages][page_elems] */
	float *scale;           /* [n_pages][2][n_kv_heads][32], touched for FP8 pages only */
	uint64_t bytes;         /* of both */
	uint32_t n_pages, n_used, n_layers;
	size_t page_elems, scale_elems;
	uint32_t n_kv_heads, hd_pad;
	uint32_t *free_list;    /* page numbers; [n_pages - n_used] valid */

	struct kv_prefix *prefix; /* [max_prefix] */
	struct kv_block *prefix_block; /* [max_prefix][n_layers] */
	uint32_t *bucket;       /* [n_buckets] heads of hash chains */
	uint32_t max_prefix, n_buckets, free_prefix;
	uint32_t oldest, newest; /* entries that nobody holds, in order of use */
	uint32_t n_idle_pages;  /* pages of those: used, but there for the taking */
	uint64_t next_uid, hit_tokens, evictions;
};

/* Bytes of one page with its scales; pages of a block of all layers under a plan (NULL: all BF16). */
uint64_t kv_page_bytes(const struct model_shape *);
uint32_t kv_block_pages(const struct plan *, uint32_t n_layers);
uint32_t kv_blocks_for(uint32_t tokens);

int kv_new(struct kv_pool *, const struct model_shape *, uint64_t budget, struct err *);
void kv_free(struct kv_pool *);
/* Pages that a sequence could get now. */
uint32_t kv_available(const struct kv_pool *);

int kv_seq_new(struct kv_seq *, uint32_t n_layers, uint32_t tokens); /* -ENOMEM; any thread */
void kv_seq_free(struct kv_seq *);  /* its pages must be back; any thread */
/* Makes room for a position in every layer, in the formats of the plan, taking
 * idle published blocks if it must. Call once before the position is written,
 * in ascending order. -ENOSPC: pages got so far stay; call again. */
int kv_open(struct kv_pool *, struct kv_seq *, const struct plan *, uint32_t pos);
/* Gives everything back. */
void kv_close(struct kv_pool *, struct kv_seq *);
/* Gives back blocks that lie wholly before a position. */
void kv_drop_before(struct kv_pool *, struct kv_seq *, uint32_t pos);

/* Fills an empty table with published blocks of the first n tokens; returns the
 * positions they cover, a multiple of 32. */
uint32_t kv_match(struct kv_pool *, struct kv_seq *, uint64_t scope, uint64_t plan_digest, const uint32_t *tokens,
    uint32_t n);
/* Publishes the next block, whose 32 positions are written and, like all before
 * them, ran under the plan. Does nothing if an equal one is there already. */
void kv_publish(struct kv_pool *, struct kv_seq *, uint64_t scope, uint64_t plan_digest, const uint32_t *tokens);

static inline struct k_kv_block
kv_pages(const struct kv_pool *kv, const struct kv_block *b)
{
	struct k_kv_block out = {.fp8 = b->fp8};

	if (b->k != KV_NONE) {
		out.k = kv->mem + (size_t)b->k * kv->page_elems;
		out.v = kv->mem + (size_t)b->v * kv->page_elems;
	}
	if (b->q != KV_NONE) {
		out.q = (uint8_t *)(kv->mem + (size_t)b->q * kv->page_elems);
		out.scale = kv->scale + (size_t)b->q * kv->scale_elems;
	}
	return out;
}
#endif
