/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_KV_H
#define OCTET_KV_H
/*
 * The paged KV cache: a pool of equal pages. A page holds one absolute block
 * of KV_PAGE_TOKENS positions of one sequence, all layers, in BF16. Engine
 * thread only.
 */
#include <stdint.h>
#include "daemon/engine/model.h"

#define KV_PAGE_TOKENS K_BLOCK

struct kv_pool {
	uint16_t *mem;       /* [n_pages][n_layers][layer_elems] */
	uint64_t bytes;
	uint32_t n_pages, n_used, n_layers;
	size_t layer_elems, page_elems;
	uint32_t hd_pad;
	uint32_t *free_list; /* page numbers; [n_pages - n_used] valid */
};

/* Bytes of one page; of a pool of at most budget bytes. */
uint64_t kv_page_bytes(const struct model_shape *);
uint32_t kv_pages_for(uint32_t tokens);

int kv_new(struct kv_pool *, const struct model_shape *, uint64_t budget, struct err *);
void kv_free(struct kv_pool *);
/* Takes n pages into out[n]: 0, or -ENOSPC and none taken. */
int kv_take(struct kv_pool *, uint32_t n, uint32_t *out);
void kv_give(struct kv_pool *, const uint32_t *pages, uint32_t n);

static inline uint16_t *
kv_layer(const struct kv_pool *kv, uint32_t page, uint32_t layer)
{
	return kv->mem + (size_t)page * kv->page_elems + (size_t)layer * kv->layer_elems;
}
#endif
