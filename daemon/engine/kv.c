/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/kv.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static size_t
layer_elems(const struct model_shape *s)
{
	uint32_t hd_pad = (s->head_dim + 31) & ~31u;

	return (size_t)s->n_kv_heads * hd_pad * KV_PAGE_TOKENS * 2;
}

uint64_t
kv_page_bytes(const struct model_shape *s)
{
	return (uint64_t)layer_elems(s) * sizeof(uint16_t) * s->n_layers;
}

uint32_t
kv_pages_for(uint32_t tokens)
{
	return (uint32_t)(((uint64_t)tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS);
}

int
kv_new(struct kv_pool *kv, const struct model_shape *s, uint64_t budget, struct err *err)
{
	uint64_t page = kv_page_bytes(s), pages = budget / page;

	memset(kv, 0, sizeof(*kv));
	if (pages == 0)
		return err_set(err, -EINVAL, "engine.kv_cache_bytes = %llu: one page of %u tokens takes %llu bytes",
		    (unsigned long long)budget, KV_PAGE_TOKENS, (unsigned long long)page);
	if (pages > UINT32_MAX / 2)
		pages = UINT32_MAX / 2;
	kv->layer_elems = layer_elems(s);
	kv->page_elems = kv->layer_elems * s->n_layers;
	kv->n_layers = s->n_layers;
	kv->hd_pad = (s->head_dim + 31) & ~31u;
	kv->bytes = pages * page;
	kv->free_list = malloc(pages * sizeof(*kv->free_list));
	if (kv->free_list == NULL)
		return err_set(err, -ENOMEM, "no memory for the KV page list");
	/* Zero pages: what was never written reads as 0, never as NaN. */
	kv->mem = mmap(NULL, kv->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (kv->mem == MAP_FAILED) {
		kv->mem = NULL;
		kv_free(kv);
		return err_set(err, -ENOMEM, "no memory for a KV cache of %llu bytes", (unsigned long long)kv->bytes);
	}
	madvise(kv->mem, kv->bytes, MADV_HUGEPAGE);
	kv->n_pages = (uint32_t)pages;
	for (uint32_t i = 0; i < kv->n_pages; i++)
		kv->free_list[i] = kv->n_pages - 1 - i;
	return 0;
}

void
kv_free(struct kv_pool *kv)
{
	if (kv->mem != NULL)
		munmap(kv->mem, kv->bytes);
	free(kv->free_list);
	memset(kv, 0, sizeof(*kv));
}

int
kv_take(struct kv_pool *kv, uint32_t n, uint32_t *out)
{
	if (n > kv->n_pages - kv->n_used)
		return -ENOSPC;
	for (uint32_t i = 0; i < n; i++)
		out[i] = kv->free_list[kv->n_pages - kv->n_used - 1 - i];
	kv->n_used += n;
	return 0;
}

void
kv_give(struct kv_pool *kv, const uint32_t *pages, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		kv->free_list[kv->n_pages - kv->n_used + i] = pages[i];
	kv->n_used -= n;
}
