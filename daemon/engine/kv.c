/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/kv.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MAX_PREFIX (1u << 20)

/* A published block. Its parent is named by uid, which is never used again, so
 * a chain through an evicted block cannot be followed by mistake. */
struct kv_prefix {
	uint64_t uid, parent, digest;
	uint32_t token[KV_PAGE_TOKENS];
	uint32_t refs;          /* sequences that hold it */
	uint32_t chain;         /* next in its bucket; next free entry */
	uint32_t older, newer;  /* while refs is 0 */
};

static size_t
page_elems(const struct model_shape *s)
{
	return (size_t)s->n_kv_heads * ((s->head_dim + 31) & ~31u) * KV_PAGE_TOKENS;
}

static size_t
scale_elems(const struct model_shape *s)
{
	return (size_t)2 * s->n_kv_heads * KV_PAGE_TOKENS;
}

uint64_t
kv_page_bytes(const struct model_shape *s)
{
	return page_elems(s) * sizeof(uint16_t) + scale_elems(s) * sizeof(float);
}

uint32_t
kv_block_pages(const struct plan *p, uint32_t n_layers)
{
	uint32_t n = 0;

	for (uint32_t l = 0; l < n_layers; l++)
		n += p != NULL && plan_at(p, GROUP_KV_CACHE, l) == FORMAT_FP8 ? 1 : 2;
	return n;
}

uint32_t
kv_blocks_for(uint32_t tokens)
{
	return (uint32_t)(((uint64_t)tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS);
}

static void *
map(size_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return NULL;
	madvise(p, bytes, MADV_HUGEPAGE);
	return p;
}

int
kv_new(struct kv_pool *kv, const struct model_shape *s, uint64_t budget, struct err *err)
{
	uint64_t page = kv_page_bytes(s), pages = budget / page;

	memset(kv, 0, sizeof(*kv));
	if (pages < (uint64_t)2 * s->n_layers)
		return err_set(err, -EINVAL, "engine.kv_cache_bytes = %llu: %u tokens take %llu bytes",
		    (unsigned long long)budget, KV_PAGE_TOKENS, (unsigned long long)page * 2 * s->n_layers);
	if (pages > UINT32_MAX / 2)
		pages = UINT32_MAX / 2;
	kv->page_elems = page_elems(s);
	kv->scale_elems = scale_elems(s);
	kv->n_layers = s->n_layers;
	kv->n_kv_heads = s->n_kv_heads;
	kv->hd_pad = (s->head_dim + 31) & ~31u;
	kv->bytes = pages * page;
	kv->n_pages = (uint32_t)pages;
	kv->max_prefix = kv->n_pages / s->n_layers < MAX_PREFIX ? kv->n_pages / s->n_layers : MAX_PREFIX;
	for (kv->n_buckets = 1; kv->n_buckets < kv->max_prefix;)
		kv->n_buckets *= 2;
	kv->free_list = malloc(pages * sizeof(*kv->free_list));
	kv->prefix = calloc(kv->max_prefix, sizeof(*kv->prefix));
	kv->prefix_block = calloc((size_t)kv->max_prefix * s->n_layers, sizeof(*kv->prefix_block));
	kv->bucket = malloc(kv->n_buckets * sizeof(*kv->bucket));
	/* Zero pages: what was never written reads as 0, never as NaN. */
	kv->mem = map(pages * kv->page_elems * sizeof(*kv->mem));
	kv->scale = map(pages * kv->scale_elems * sizeof(*kv->scale));
	if (kv->free_list == NULL || kv->prefix == NULL || kv->prefix_block == NULL || kv->bucket == NULL ||
	    kv->mem == NULL || kv->scale == NULL) {
		err_set(err, -ENOMEM, "no memory for a KV cache of %llu bytes", (unsigned long long)kv->bytes);
		kv_free(kv);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < kv->n_pages; i++)
		kv->free_list[i] = kv->n_pages - 1 - i;
	for (uint32_t i = 0; i < kv->n_buckets; i++)
		kv->bucket[i] = KV_NONE;
	for (uint32_t i = 0; i < kv->max_prefix; i++)
		kv->prefix[i].chain = i + 1 < kv->max_prefix ? i + 1 : KV_NONE;
	kv->oldest = kv->newest = KV_NONE;
	kv->next_uid = 1;
	return 0;
}

void
kv_free(struct kv_pool *kv)
{
	if (kv->mem != NULL)
		munmap(kv->mem, kv->n_pages * kv->page_elems * sizeof(*kv->mem));
	if (kv->scale != NULL)
		munmap(kv->scale, kv->n_pages * kv->scale_elems * sizeof(*kv->scale));
	free(kv->free_list);
	free(kv->prefix);
	free(kv->prefix_block);
	free(kv->bucket);
	memset(kv, 0, sizeof(*kv));
}

uint32_t
kv_available(const struct kv_pool *kv)
{
	return kv->n_pages - kv->n_used + kv->n_idle_pages;
}

/* ---- published blocks ---- */

static struct kv_block *
prefix_blocks(const struct kv_pool *kv, uint32_t i)
{
	return kv->prefix_block + (size_t)i * kv->n_layers;
}

/* FNV-1a over what an entry is found by. */
static uint32_t
bucket_of(const struct kv_pool *kv, uint64_t parent, uint64_t digest, const uint32_t *token)
{
	uint64_t h = 0xcbf29ce484222325u;

	h = (h ^ parent) * 0x100000001b3u;
	h = (h ^ digest) * 0x100000001b3u;
	for (uint32_t i = 0; i < KV_PAGE_TOKENS; i++)
		h = (h ^ token[i]) * 0x100000001b3u;
	return (uint32_t)(h >> 32 ^ h) & (kv->n_buckets - 1);
}

static uint32_t
find(const struct kv_pool *kv, uint64_t parent, uint64_t digest, const uint32_t *token)
{
	uint32_t i = kv->bucket[bucket_of(kv, parent, digest, token)];

	while (i != KV_NONE && (kv->prefix[i].parent != parent || kv->prefix[i].digest != digest ||
	    memcmp(kv->prefix[i].token, token, sizeof(kv->prefix[i].token)) != 0))
		i = kv->prefix[i].chain;
	return i;
}

static uint32_t
pages_of(const struct kv_pool *kv, const struct kv_block *b)
{
	uint32_t n = 0;

	for (uint32_t l = 0; l < kv->n_layers; l++)
		n += (b[l].k != KV_NONE) + (b[l].v != KV_NONE) + (b[l].q != KV_NONE);
	return n;
}

static void
take_idle(struct kv_pool *kv, uint32_t i)
{
	struct kv_prefix *p = &kv->prefix[i];

	*(p->older == KV_NONE ? &kv->oldest : &kv->prefix[p->older].newer) = p->newer;
	*(p->newer == KV_NONE ? &kv->newest : &kv->prefix[p->newer].older) = p->older;
	kv->n_idle_pages -= pages_of(kv, prefix_blocks(kv, i));
}

static void
hold(struct kv_pool *kv, uint32_t i)
{
	if (kv->prefix[i].refs++ == 0)
		take_idle(kv, i);
}

static void
let_go(struct kv_pool *kv, uint32_t i)
{
	struct kv_prefix *p = &kv->prefix[i];

	if (--p->refs > 0)
		return;
	p->older = kv->newest;
	p->newer = KV_NONE;
	*(kv->newest == KV_NONE ? &kv->oldest : &kv->prefix[kv->newest].newer) = i;
	kv->newest = i;
	kv->n_idle_pages += pages_of(kv, prefix_blocks(kv, i));
}

/* ---- pages ---- */

static void
give(struct kv_pool *kv, uint32_t *page)
{
	if (*page == KV_NONE)
		return;
	kv->n_used--;
	kv->free_list[kv->n_pages - kv->n_used - 1] = *page;
	*page = KV_NONE;
}

static void
give_block(struct kv_pool *kv, struct kv_block *b)
{
	for (uint32_t l = 0; l < kv->n_layers; l++)
		give(kv, &b[l].k), give(kv, &b[l].v), give(kv, &b[l].q);
}

static void
evict_oldest(struct kv_pool *kv)
{
	uint32_t i = kv->oldest, *at;
	struct kv_prefix *p = &kv->prefix[i];

	take_idle(kv, i);
	for (at = &kv->bucket[bucket_of(kv, p->parent, p->digest, p->token)]; *at != i; at = &kv->prefix[*at].chain)
		;
	*at = p->chain;
	give_block(kv, prefix_blocks(kv, i));
	p->uid = 0;
	p->chain = kv->free_prefix;
	kv->free_prefix = i;
	kv->evictions++;
}

static bool
take(struct kv_pool *kv, uint32_t *page)
{
	if (*page != KV_NONE)
		return true;
	if (kv->n_used == kv->n_pages) {
		if (kv->oldest == KV_NONE)
			return false;
		evict_oldest(kv);
	}
	*page = kv->free_list[kv->n_pages - ++kv->n_used];
	return true;
}

/* ---- sequences ---- */

static uint64_t
new_uid(void)
{
	static uint64_t last;

	return __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
}

int
kv_seq_new(struct kv_seq *s, uint32_t n_layers, uint32_t tokens)
{
	uint32_t n = kv_blocks_for(tokens);

	*s = (struct kv_seq){.max_blocks = n, .n_layers = n_layers, .uid = new_uid()};
	s->block = malloc((size_t)n * n_layers * sizeof(*s->block));
	s->prefix = malloc((size_t)n * sizeof(*s->prefix));
	if (s->block != NULL && s->prefix != NULL)
		return 0;
	kv_seq_free(s);
	return -ENOMEM;
}

void
kv_seq_free(struct kv_seq *s)
{
	free(s->block);
	free(s->prefix);
	memset(s, 0, sizeof(*s));
}

static struct kv_block *
seq_blocks(const struct kv_seq *s, uint32_t block)
{
	return s->block + (size_t)block * s->n_layers;
}

int
kv_open(struct kv_pool *kv, struct kv_seq *s, const struct plan *plan, uint32_t pos)
{
	uint32_t n = pos / KV_PAGE_TOKENS, bit = 1u << pos % KV_PAGE_TOKENS;
	struct kv_block *b = seq_blocks(s, n);

	if (n == s->n_blocks) {
		for (uint32_t l = 0; l < kv->n_layers; l++)
			b[l] = (struct kv_block){KV_NONE, KV_NONE, KV_NONE, 0};
		s->prefix[n] = KV_NONE;
		s->n_blocks++;
	}
	for (uint32_t l = 0; l < kv->n_layers; l++) {
		if (plan_at(plan, GROUP_KV_CACHE, l) == FORMAT_FP8) {
			if (!take(kv, &b[l].q))
				return -ENOSPC;
			b[l].fp8 |= bit;
		} else {
			if (!take(kv, &b[l].k))
				return -ENOSPC;
			/* K and V come together, or the page would be there for one of them. */
			if (!take(kv, &b[l].v)) {
				give(kv, &b[l].k);
				return -ENOSPC;
			}
			b[l].fp8 &= ~bit;
		}
	}
	return 0;
}

static void
close_block(struct kv_pool *kv, struct kv_seq *s, uint32_t n)
{
	if (s->prefix[n] != KV_NONE)
		let_go(kv, s->prefix[n]);
	else
		give_block(kv, seq_blocks(s, n));
}

/* Last block first: of a chain that nobody holds, its end goes first. */
void
kv_close(struct kv_pool *kv, struct kv_seq *s)
{
	while (s->n_blocks > s->n_dropped)
		close_block(kv, s, --s->n_blocks);
	s->n_blocks = s->n_dropped = s->n_published = 0;
	s->uid = new_uid();
}

void
kv_drop_before(struct kv_pool *kv, struct kv_seq *s, uint32_t pos)
{
	while (s->n_dropped < pos / KV_PAGE_TOKENS && s->n_dropped < s->n_blocks)
		close_block(kv, s, s->n_dropped++);
}

/* The root of a scope is a parent that no uid equals. */
static uint64_t
root(uint64_t scope)
{
	return scope | (uint64_t)1 << 63;
}

uint32_t
kv_match(struct kv_pool *kv, struct kv_seq *s, uint64_t scope, uint64_t digest, const uint32_t *tokens, uint32_t n)
{
	uint64_t parent = root(scope);
	uint32_t i;

	for (uint32_t b = 0; (b + 1) * KV_PAGE_TOKENS <= n; b++) {
		i = find(kv, parent, digest, tokens + b * KV_PAGE_TOKENS);
		if (i == KV_NONE)
			break;
		hold(kv, i);
		parent = kv->prefix[i].uid;
		memcpy(seq_blocks(s, b), prefix_blocks(kv, i), kv->n_layers * sizeof(struct kv_block));
		s->prefix[b] = i;
		s->n_blocks = s->n_published = b + 1;
	}
	kv->hit_tokens += s->n_blocks * KV_PAGE_TOKENS;
	return s->n_blocks * KV_PAGE_TOKENS;
}

void
kv_publish(struct kv_pool *kv, struct kv_seq *s, uint64_t scope, uint64_t digest, const uint32_t *tokens)
{
	uint32_t b = s->n_published, i = kv->free_prefix, same, *head;
	const uint32_t *token = tokens + b * KV_PAGE_TOKENS;
	struct kv_prefix *p;
	uint64_t parent;

	if (b < s->n_dropped || (b > 0 && b - 1 < s->n_dropped))
		return;
	parent = b == 0 ? root(scope) : kv->prefix[s->prefix[b - 1]].uid;
	same = find(kv, parent, digest, token);

	if (same != KV_NONE) {
		/* Another sequence was first: its block has the same bits. */
		hold(kv, same);
		give_block(kv, seq_blocks(s, b));
		memcpy(seq_blocks(s, b), prefix_blocks(kv, same), kv->n_layers * sizeof(struct kv_block));
		s->prefix[b] = same;
		s->n_published++;
		s->uid = new_uid();
		return;
	}
	if (i == KV_NONE)
		return;
	p = &kv->prefix[i];
	kv->free_prefix = p->chain;
	p->uid = kv->next_uid++;
	p->parent = parent;
	p->digest = digest;
	memcpy(p->token, token, sizeof(p->token));
	p->refs = 1;
	head = &kv->bucket[bucket_of(kv, parent, digest, token)];
	p->chain = *head;
	*head = i;
	memcpy(prefix_blocks(kv, i), seq_blocks(s, b), kv->n_layers * sizeof(struct kv_block));
	s->prefix[b] = i;
	s->n_published++;
}
