/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok-encode.c: text to ids: added tokens, normalizer, pre-tokenizer, BPE. See tok.h.
 *
 * The order of steps and their corner cases are those of Hugging Face tokenizers 0.2x (added_vocabulary.rs,
 * normalizer.rs, bpe/word.rs), which define what a model was trained on; tests/golden/tok holds them.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tok-blob.h"

#include <errno.h>
#include <stdlib.h>
#include <utf8proc.h>

#define MAX_TEXT ((size_t)1 << 30)

static _Thread_local uint64_t last_work;

static size_t
valid_run(const char *s, size_t n)
{
	size_t i = 0;
	int k;

	while (i < n && (k = tok_utf8_step(s + i, n - i)) > 0)
		i += (size_t)k;
	return i;
}

/* ---- encoding: state of one call ---- */

struct bytes {
	char *p;
	size_t n, cap;
};

struct piece {
	size_t off, len;
};

struct pieces {
	struct piece *p;
	size_t n, cap;
};

struct sym {
	uint32_t id; /* NONE: merged into its left neighbour */
	uint32_t prev, next;
};

struct cand {
	uint32_t rank, pos, id;
};

struct enc {
	const struct tok *t;
	unsigned flags;
	uint32_t *ids; /* [cap] */
	size_t cap;
	int64_t n;
	int rc;           /* the first failure; every step looks before it goes on */
	size_t max_bytes; /* a text may grow to this in normalizer and pre-tokenizer */
	struct bytes norm[2], pre[2], key;
	struct pieces pc[2];
	struct sym *sym;
	size_t sym_cap, n_sym;
	struct cand *heap;
	size_t heap_cap, n_heap;
	int32_t *cp, *marks; /* code points of norm_run */
	size_t cp_cap, marks_cap;
	pcre2_match_data *md;
	pcre2_match_context *mc;
	uint64_t work;
	bool chat; /* special and control tokens are text, and cannot come of text */
};

/* Makes room for need elements; false: out of memory, e->rc is set */
static bool
room(struct enc *e, void *pp, size_t *cap, size_t need, size_t size)
{
	size_t n = *cap ? *cap : 64;
	void *p;

	if (need <= *cap)
		return true;
	while (n < need)
		n *= 2;
	memcpy(&p, pp, sizeof(p));
	p = n > SIZE_MAX / size ? NULL : realloc(p, n * size);
	if (!p) {
		e->rc = -ENOMEM;
		return false;
	}
	memcpy(pp, &p, sizeof(p));
	*cap = n;
	return true;
}

static void
put(struct enc *e, struct bytes *b, const char *s, size_t len)
{
	if (e->rc || !len)
		return;
	if (len > e->max_bytes - b->n) {
		e->rc = -E2BIG;
		return;
	}
	if (!room(e, &b->p, &b->cap, b->n + len, 1))
		return;
	memcpy(b->p + b->n, s, len);
	b->n += len;
}

static void
put_piece(struct enc *e, struct pieces *v, size_t off, size_t len)
{
	if (!e->rc && room(e, &v->p, &v->cap, v->n + 1, sizeof(*v->p)))
		v->p[v->n++] = (struct piece){off, len};
}

static void
emit(struct enc *e, uint32_t id)
{
	if (e->chat && id != e->t->h->unk && (e->t->id_flag[id] & ID_SPECIAL))
		e->rc = e->rc ? e->rc : -EINVAL;
	if ((uint64_t)e->n < e->cap)
		e->ids[e->n] = id;
	e->n++;
}

static void
emit_all(struct enc *e, enum sec s)
{
	const uint32_t *v = section(e->t->h, s);

	for (size_t i = 0; i < e->t->h->sec[s].n; i++)
		emit(e, v[i]);
}

static void
enc_clear(struct enc *e)
{
	for (int i = 0; i < 2; i++) {
		free(e->norm[i].p);
		free(e->pre[i].p);
		free(e->pc[i].p);
	}
	free(e->key.p);
	free(e->sym);
	free(e->heap);
	free(e->cp);
	free(e->marks);
	pcre2_match_data_free(e->md);
	pcre2_match_context_free(e->mc);
}

/* ---- encoding: BPE ---- */

static const struct merge *
find_merge(struct enc *e, uint32_t a, uint32_t b)
{
	const struct tok *t = e->t;
	size_t i = hash_pair(a, b) & t->merge_mask;

	for (size_t left = t->merge_mask + 1; left; left--, i = (i + 1) & t->merge_mask) {
		e->work++;
		if (t->merge[i].rank == NONE)
			return NULL;
		if (t->merge[i].a == a && t->merge[i].b == b)
			return &t->merge[i];
	}
	return NULL;
}

static uint32_t
find_piece(struct enc *e, const char *s, size_t len)
{
	const struct tok *t = e->t;
	size_t i = hash_bytes(s, len) & t->vocab_mask;

	for (size_t left = t->vocab_mask + 1; left; left--, i = (i + 1) & t->vocab_mask) {
		uint32_t id = t->vocab[i];

		e->work++;
		if (id == NONE)
			return NONE;
		if (t->piece[id].len == len && !memcmp(t->str + t->piece[id].off, s, len))
			return id;
	}
	return NONE;
}

static bool
cand_less(struct cand a, struct cand b)
{
	return a.rank != b.rank ? a.rank < b.rank : a.pos < b.pos;
}

static void
heap_push(struct enc *e, struct cand c)
{
	size_t i = e->n_heap;

	if (!room(e, &e->heap, &e->heap_cap, i + 1, sizeof(*e->heap)))
		return;
	e->n_heap++;
	for (; i && cand_less(c, e->heap[(i - 1) / 2]); i = (i - 1) / 2, e->work++)
		e->heap[i] = e->heap[(i - 1) / 2];
	e->heap[i] = c;
}

static struct cand
heap_pop(struct enc *e)
{
	struct cand top = e->heap[0], c = e->heap[--e->n_heap];
	size_t i = 0, k;

	for (; (k = 2 * i + 1) < e->n_heap; i = k, e->work++) {
		if (k + 1 < e->n_heap && cand_less(e->heap[k + 1], e->heap[k]))
			k++;
		if (!cand_less(e->heap[k], c))
			break;
		e->heap[i] = e->heap[k];
	}
	e->heap[i] = c;
	return top;
}

static void
push_pair(struct enc *e, uint32_t pos)
{
	const struct merge *m = find_merge(e, e->sym[pos].id, e->sym[e->sym[pos].next].id);

	if (m)
		heap_push(e, (struct cand){m->rank, pos, m->id});
}

/* Merges the pair of lowest rank, leftmost first, until none is left: O(n log n). A candidate is stale when its pair no
 * longer gives its id. */
static void
merge_all(struct enc *e)
{
	struct sym *s = e->sym;

	e->n_heap = 0;
	for (uint32_t i = 0; i + 1 < e->n_sym && !e->rc; i++)
		push_pair(e, i);
	while (e->n_heap && !e->rc) {
		struct cand c = heap_pop(e);
		uint32_t right = s[c.pos].next;
		const struct merge *m;

		if (s[c.pos].id == NONE || right == NONE)
			continue;
		m = find_merge(e, s[c.pos].id, s[right].id);
		if (!m || m->id != c.id)
			continue;
		s[c.pos].id = c.id;
		s[c.pos].next = s[right].next;
		s[right].id = NONE;
		if (s[right].next != NONE) {
			s[s[right].next].prev = c.pos;
			push_pair(e, c.pos);
		}
		if (s[c.pos].prev != NONE)
			push_pair(e, s[c.pos].prev);
	}
}

static void
put_sym(struct enc *e, uint32_t id)
{
	uint32_t i = (uint32_t)e->n_sym++;

	e->sym[i] = (struct sym){id, i ? i - 1 : NONE, NONE};
	if (i)
		e->sym[i - 1].next = i;
	e->work++;
}

/* All the byte tokens of a character the vocabulary lacks, or none */
static bool
put_byte_tokens(struct enc *e, const char *s, size_t len)
{
	const uint32_t *byte_id = e->t->h->byte_id;

	if (!(e->t->h->flags & F_BYTE_FALLBACK))
		return false;
	for (size_t i = 0; i < len; i++)
		if (byte_id[(unsigned char)s[i]] == NONE)
			return false;
	for (size_t i = 0; i < len; i++)
		put_sym(e, byte_id[(unsigned char)s[i]]);
	return true;
}

/* One symbol a character (byte level: a byte). An unknown one waits in `unk` so that a run of them may be fused. */
static void
put_symbols(struct enc *e, const char *s, size_t len)
{
	const struct head *h = e->t->h;
	uint32_t unk = NONE;

	e->n_sym = 0;
	for (size_t i = 0, k; i < len; i += k) {
		int step = h->flags & F_BYTE_LEVEL ? 1 : tok_utf8_step(s + i, len - i);
		uint32_t id;

		k = step > 0 ? (size_t)step : 1;
		id = h->flags & F_BYTE_LEVEL ? h->byte_id[(unsigned char)s[i]] : find_piece(e, s + i, k);
		if (id == NONE && put_byte_tokens(e, s + i, k))
			continue;
		if (unk != NONE && (id != NONE || !(h->flags & F_FUSE_UNK)))
			put_sym(e, unk);
		unk = id == NONE ? h->unk : NONE;
		if (id != NONE)
			put_sym(e, id);
	}
	if (unk != NONE)
		put_sym(e, unk);
}

static uint32_t
find_whole(struct enc *e, const char *s, size_t len)
{
	if (!(e->t->h->flags & F_BYTE_LEVEL))
		return find_piece(e, s, len);
	e->key.n = 0;
	for (size_t i = 0; i < len; i++) {
		utf8proc_uint8_t u[4];

		put(e, &e->key, (char *)u,
		    (size_t)utf8proc_encode_char((utf8proc_int32_t)byte_to_cp((unsigned char)s[i]), u));
	}
	return e->rc ? NONE : find_piece(e, e->key.p, e->key.n);
}

static void
bpe(struct enc *e, const char *s, size_t len)
{
	if (e->t->h->flags & F_IGNORE_MERGES) {
		uint32_t id = find_whole(e, s, len);

		if (id != NONE && !(e->chat && (e->t->id_flag[id] & ID_SPECIAL))) {
			emit(e, id);
			return;
		}
	}
	if (len > INT32_MAX)
		e->rc = -E2BIG;
	if (e->rc ||
	    !room(e, &e->sym, &e->sym_cap, len + 1, sizeof(*e->sym))) /* +1: an unk may wait behind byte tokens */
		return;
	put_symbols(e, s, len);
	merge_all(e);
	for (uint32_t i = e->n_sym ? 0 : NONE; i != NONE && !e->rc; i = e->sym[i].next)
		emit(e, e->sym[i].id);
}

/* ---- encoding: pre-tokenizer ---- */

struct split {
	struct enc *e;
	struct pieces *out;
	size_t base;  /* offset of this subject in its buffer */
	size_t first; /* its first piece in out */
	uint32_t arg; /* behaviour */
	bool prev;    /* the segment before was a match */
};

/* The next segment of a subject, matching or not, as the behaviour wants it: a piece, part of the piece before, or
 * nothing */
static void
put_segment(struct split *s, size_t from, size_t to, bool match)
{
	uint32_t how = s->arg & ~(uint32_t)B_INVERT;
	bool last = s->out->n > s->first, join;

	if (s->arg & B_INVERT)
		match = !match;
	if (how == B_REMOVED && match)
		return;
	join = last && ((how == B_CONTIGUOUS && match == s->prev) || (how == B_PREVIOUS && match && !s->prev) ||
			   (how == B_NEXT && !match && s->prev));
	if (join)
		s->out->p[s->out->n - 1].len = s->base + to - s->out->p[s->out->n - 1].off;
	else
		put_piece(s->e, s->out, s->base + from, to - from);
	s->prev = match;
}

static void
drop_empty(struct split *s)
{
	size_t n = s->first;

	for (size_t i = s->first; i < s->out->n; i++)
		if (s->out->p[i].len)
			s->out->p[n++] = s->out->p[i];
	s->out->n = n;
}

static int
match_at(struct enc *e, const pcre2_code *re, const char *s, size_t len, size_t at)
{
	int rc;

	e->work++;
	rc = pcre2_match(re, (PCRE2_SPTR)s, len, at, PCRE2_NO_UTF_CHECK, e->md, e->mc);
	if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
		rc = pcre2_match(re, (PCRE2_SPTR)s, len, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, e->md, e->mc);
	if (rc < 0 && rc != PCRE2_ERROR_NOMATCH)
		e->rc = rc == PCRE2_ERROR_NOMEMORY ? -ENOMEM : -EIO;
	return rc;
}

/* s is valid UTF-8. An empty match right behind the last one is passed over, as the Rust onig crate does. */
static void
split_regex(struct split *sp, const pcre2_code *re, const char *s, size_t len)
{
	const PCRE2_SIZE *ov = pcre2_get_ovector_pointer(sp->e->md);
	size_t prev = 0, at = 0, last = SIZE_MAX;

	while (at <= len && match_at(sp->e, re, s, len, at) >= 0) {
		size_t from = ov[0], to = ov[1];

		if (from > to || from < prev) { /* \K, which no file needs */
			sp->e->rc = -EIO;
			return;
		}
		if (from == to && to == last) {
			at += at < len ? (size_t)tok_utf8_step(s + at, len - at) : 1;
			continue;
		}
		if (from > prev)
			put_segment(sp, prev, from, false);
		put_segment(sp, from, to, true);
		at = prev = last = to;
	}
	if (prev < len)
		put_segment(sp, prev, len, false);
}

static void
split_string(struct split *sp, const char *pat, size_t pat_len, const char *s, size_t len)
{
	size_t at = 0;
	const char *hit;

	while ((hit = memmem(s + at, len - at, pat, pat_len))) {
		size_t from = (size_t)(hit - s);

		if (from > at)
			put_segment(sp, at, from, false);
		put_segment(sp, from, from + pat_len, true);
		at = from + pat_len;
	}
	if (at < len)
		put_segment(sp, at, len, false);
}

/* A regular expression sees one valid run at a time; a byte that is no UTF-8 is a piece of its own */
static void
split_piece(struct enc *e, size_t i, const char *buf, struct piece pc, struct pieces *out)
{
	const struct op *o = &e->t->pop[i];

	for (size_t at = 0, run; at < pc.len && !e->rc; at += run) {
		const char *s = buf + pc.off + at;
		struct split sp = {e, out, pc.off + at, out->n, o->arg, false};

		run = o->kind == P_STRING ? pc.len : valid_run(s, pc.len - at);
		if (o->kind == P_STRING)
			split_string(&sp, e->t->str + o->a.off, o->a.len, s, run);
		else if (run)
			split_regex(&sp, e->t->re[i], s, run);
		else
			put_piece(e, out, sp.base, run = 1);
		drop_empty(&sp);
	}
}

static bool
starts_with(const char *s, size_t len, const char *w, size_t w_len)
{
	return len >= w_len && !memcmp(s, w, w_len);
}

static void
replace(struct enc *e, struct bytes *out, const char *s, size_t len, const char *a, size_t a_len, const char *b,
    size_t b_len)
{
	const char *hit;

	while (!e->rc && len && (hit = memmem(s, len, a, a_len))) {
		put(e, out, s, (size_t)(hit - s));
		put(e, out, b, b_len);
		len -= (size_t)(hit - s) + a_len;
		s = hit + a_len;
	}
	put(e, out, s, len);
}

/* The ops that change text: a space before the piece, or Metaspace's signs for spaces. `first`: the piece begins the
 * whole text. */
static void
rewrite_piece(struct enc *e, const struct op *o, const char *s, size_t len, bool first, struct bytes *out)
{
	const char *rep = e->t->str + o->a.off;

	if (o->kind == P_SPACE) {
		if (!starts_with(s, len, " ", 1))
			put(e, out, " ", 1);
		put(e, out, s, len);
		return;
	}
	if ((o->arg == M_ALWAYS || (o->arg == M_FIRST && first)) && !starts_with(s, len, " ", 1) &&
	    !starts_with(s, len, rep, o->a.len))
		put(e, out, rep, o->a.len);
	replace(e, out, s, len, " ", 1, rep, o->a.len);
}

static void
pre_tokenize(struct enc *e, const char *s, size_t len, bool first)
{
	struct pieces *in = &e->pc[0], *out = &e->pc[1], *swap;
	const char *buf = s;
	int flip = 0;

	in->n = 0;
	put_piece(e, in, 0, len);
	for (size_t i = 0; i < e->t->n_pop && !e->rc; i++) {
		const struct op *o = &e->t->pop[i];
		struct bytes *to = &e->pre[flip];

		out->n = to->n = 0;
		for (size_t k = 0; k < in->n && !e->rc; k++) {
			size_t start = to->n;

			if (o->kind == P_REGEX || o->kind == P_STRING) {
				split_piece(e, i, buf, in->p[k], out);
				continue;
			}
			rewrite_piece(e, o, buf + in->p[k].off, in->p[k].len, first && !k, to);
			put_piece(e, out, start, to->n - start);
		}
		if (o->kind == P_SPACE || o->kind == P_META) {
			buf = to->p;
			flip ^= 1;
		}
		swap = in;
		in = out;
		out = swap;
	}
	for (size_t k = 0; k < in->n && !e->rc; k++)
		bpe(e, buf + in->p[k].off, in->p[k].len);
}

/* ---- encoding: normalizer ---- */

/* Canonical order: runs of marks sorted by class, stable. Counting, because insertion is quadratic on a hostile text.
 */
static void
order_run(struct enc *e, int32_t *cp, size_t n)
{
	size_t start[257] = {0};

	if (n < 2 || !room(e, &e->marks, &e->marks_cap, n, sizeof(*e->marks)))
		return;
	for (size_t i = 0; i < n; i++)
		start[(utf8proc_get_property(cp[i])->combining_class & 0xff) + 1]++;
	for (int c = 1; c < 257; c++)
		start[c] += start[c - 1];
	for (size_t i = 0; i < n; i++)
		e->marks[start[utf8proc_get_property(cp[i])->combining_class & 0xff]++] = cp[i];
	memcpy(cp, e->marks, n * sizeof(*cp));
}

static void
order_marks(struct enc *e, int32_t *cp, size_t n)
{
	for (size_t i = 0, k; i < n; i = k + 1) {
		for (k = i; k < n && utf8proc_get_property(cp[k])->combining_class; k++)
			;
		order_run(e, cp + i, k - i);
	}
}

static void
norm_run(struct enc *e, const char *s, size_t len, uint32_t form, struct bytes *out)
{
	utf8proc_option_t opt = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (form & U_COMPAT ? UTF8PROC_COMPAT : 0);
	utf8proc_ssize_t n = 0;

	for (size_t i = 0; i < len && !e->rc;) {
		utf8proc_int32_t c;
		int bound = 0;

		i += (size_t)utf8proc_iterate((const utf8proc_uint8_t *)s + i, (utf8proc_ssize_t)(len - i), &c);
		if (room(e, &e->cp, &e->cp_cap, (size_t)n + 32,
			sizeof(*e->cp))) /* 18 is the longest decomposition there is */
			n += utf8proc_decompose_char(c, e->cp + n, 32, opt, &bound);
	}
	if (e->rc)
		return;
	order_marks(e, e->cp, (size_t)n);
	if (form & U_COMPOSE)
		n = utf8proc_normalize_utf32(e->cp, n, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
	for (utf8proc_ssize_t i = 0; i < n; i++) {
		utf8proc_uint8_t u[4];

		put(e, out, (char *)u, (size_t)utf8proc_encode_char(e->cp[i], u));
	}
}

static void
norm_unicode(struct enc *e, const char *s, size_t len, uint32_t form, struct bytes *out)
{
	for (size_t i = 0, run; i < len && !e->rc; i += run) {
		run = 0;
		while (i + run < len && (unsigned char)s[i + run] < 0x80)
			run++;
		if (i + run == len) { /* ASCII to the end */
			put(e, out, s + i, run);
			continue;
		}
		run = valid_run(s + i, len - i);
		if (run)
			norm_run(e, s + i, run, form, out);
		else
			put(e, out, s + i, run = 1);
	}
}

static struct bytes
normalize(struct enc *e, const char *s, size_t len)
{
	struct bytes cur = {(char *)(uintptr_t)s, len, 0}; /* only read */

	for (size_t i = 0; i < e->t->n_nop && !e->rc; i++) {
		const struct op *o = &e->t->nop[i];
		const char *a = e->t->str + o->a.off;
		struct bytes *out = &e->norm[i & 1];

		out->n = 0;
		if (o->kind == N_REPLACE) {
			replace(e, out, cur.p, cur.n, a, o->a.len, e->t->str + o->b.off, o->b.len);
		} else if (o->kind == N_PREPEND) {
			put(e, out, a, cur.n ? o->a.len : 0);
			put(e, out, cur.p, cur.n);
		} else {
			norm_unicode(e, cur.p, cur.n, o->arg, out);
		}
		cur = *out;
	}
	return cur;
}

/* ---- encoding: added tokens ---- */

static int
key_byte(const struct tok *t, const struct added *a, size_t depth)
{
	return depth < a->key.len ? (unsigned char)t->str[a->key.off + depth] : -1;
}

/* First of [lo, hi) whose byte at depth is at least c; all of them agree before depth */
static size_t
key_bound(const struct tok *t, const struct addset *set, size_t lo, size_t hi, size_t depth, int c)
{
	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (key_byte(t, &set->v[mid], depth) < c)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

/* The longest key that s starts with */
static const struct added *
added_at(struct enc *e, const struct addset *set, const char *s, size_t len)
{
	const struct added *best = NULL;
	size_t lo = 0, hi = set->n;

	e->work++;
	if (!set->first[(unsigned char)s[0]])
		return NULL;
	for (size_t d = 0; lo < hi && d < len; d++) {
		int c = (unsigned char)s[d];

		lo = key_bound(e->t, set, lo, hi, d, c);
		hi = key_bound(e->t, set, lo, hi, d, c + 1);
		if (lo < hi && set->v[lo].key.len == d + 1)
			best = &set->v[lo++];
		e->work++;
	}
	return best;
}

static int32_t
char_after(const char *s, size_t len)
{
	utf8proc_int32_t c;

	return len && tok_utf8_step(s, len) > 0 &&
		       utf8proc_iterate((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)len, &c) > 0
		   ? c
		   : -1;
}

static int32_t
char_before(const char *s, size_t end)
{
	for (size_t k = 1; k <= 4 && k <= end; k++)
		if (tok_utf8_step(s + end - k, k) == (int)k)
			return char_after(s + end - k, k);
	return -1;
}

static bool
is_word(int32_t c)
{
	if (c < 0)
		return false;
	switch (utf8proc_category(c)) {
	case UTF8PROC_CATEGORY_LU:
	case UTF8PROC_CATEGORY_LL:
	case UTF8PROC_CATEGORY_LT:
	case UTF8PROC_CATEGORY_LM:
	case UTF8PROC_CATEGORY_LO:
	case UTF8PROC_CATEGORY_MN:
	case UTF8PROC_CATEGORY_MC:
	case UTF8PROC_CATEGORY_ME:
	case UTF8PROC_CATEGORY_ND:
	case UTF8PROC_CATEGORY_NL:
	case UTF8PROC_CATEGORY_PC:
		return true;
	default:
		return c == 0x200c || c == 0x200d;
	}
}

/* Bytes of a White_Space character, 0 if c is none */
static size_t
space_len(int32_t c)
{
	if ((c >= 9 && c <= 13) || c == ' ')
		return 1;
	if (c == 0x85 || c == 0xa0)
		return 2;
	return c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
		       c == 0x205f || c == 0x3000
		   ? 3
		   : 0;
}

/*
 * Cuts s at the added tokens of a set, leftmost and longest first, and hands what lies between to plain(). A match that
 * is not taken still hides what begins inside it, and one inside white space that rstrip took is taken again: both as
 * Hugging Face does.
 */
static void
cut_added(struct enc *e, const struct addset *set, const char *s, size_t len, bool first,
    void (*plain)(struct enc *, const char *, size_t, bool))
{
	size_t done = 0, pos = 0, k;

	while (set->n && pos < len && !e->rc) {
		const struct added *a = added_at(e, set, s + pos, len - pos);
		size_t from = pos, to = pos + (a ? a->key.len : 1);

		pos = to;
		if (!a || ((a->flags & A_SPECIAL) && !(e->flags & TOK_SPECIAL)) || (e->chat && (a->flags & A_CONTROL)))
			continue;
		if ((a->flags & A_WORD) && (is_word(char_before(s, from)) || is_word(char_after(s + to, len - to))))
			continue;
		while ((a->flags & A_LSTRIP) && from > done && (k = space_len(char_before(s, from))))
			from -= k;
		while ((a->flags & A_RSTRIP) && to < len && (k = space_len(char_after(s + to, len - to))))
			to += k;
		if (done < from)
			plain(e, s + done, from - done, first && !done);
		emit(e, a->id);
		done = to;
	}
	if (done < len && !e->rc)
		plain(e, s + done, len - done, first && !done);
}

static void
encode_plain(struct enc *e, const char *s, size_t len, bool first)
{
	struct bytes b = normalize(e, s, len);

	if (!e->rc && b.n)
		cut_added(e, &e->t->norm, b.p, b.n, first, pre_tokenize);
}

static void
enc_init(struct enc *e, const struct tok *t, size_t len)
{
	uint32_t limit = 10000000;

	*e = (struct enc){.t = t, .max_bytes = 64 * len + 65536};
	if (len > MAX_TEXT) {
		e->rc = -E2BIG;
		return;
	}
	e->md = pcre2_match_data_create(1, NULL);
	e->mc = pcre2_match_context_create(NULL);
	if (!e->md || !e->mc)
		e->rc = -ENOMEM;
	else
		pcre2_set_match_limit(
		    e->mc, limit + 2 * (uint32_t)len); /* a run of white space backtracks once along its length */
}

int64_t
tok_encode(const struct tok *t, const char *text, size_t len, unsigned flags, uint32_t *ids, size_t cap)
{
	struct enc e;

	if (flags & ~(TOK_SPECIAL | TOK_BOS))
		return -EINVAL;
	enc_init(&e, t, len);
	e.flags = flags;
	e.ids = ids;
	e.cap = ids ? cap : 0;
	if (flags & TOK_BOS)
		emit_all(&e, S_PREFIX);
	if (len && !e.rc)
		cut_added(&e, &t->raw, text, len, true, encode_plain);
	if (flags & TOK_BOS)
		emit_all(&e, S_SUFFIX);
	last_work = e.work;
	enc_clear(&e);
	return e.rc ? e.rc : e.n;
}

uint64_t
tok_last_work(void)
{
	return last_work;
}

int
tok_normalize(const struct tok *t, const char *s, size_t len, char **out, size_t *out_len)
{
	struct enc e;
	struct bytes b;

	*out = NULL;
	*out_len = 0;
	enc_init(&e, t, len);
	b = normalize(&e, s, len);
	if (!e.rc) {
		*out = malloc(b.n + 1);
		e.rc = *out ? 0 : -ENOMEM;
	}
	if (*out) {
		memcpy(*out, b.p, b.n);
		*out_len = b.n;
	}
	enc_clear(&e);
	return e.rc;
}

int64_t
tok_encode_run(const struct tok *t, const char *s, size_t len, bool first, uint32_t *ids, size_t cap)
{
	struct enc e;

	enc_init(&e, t, len);
	e.chat = true;
	e.ids = ids;
	e.cap = ids ? cap : 0;
	if (len && !e.rc)
		cut_added(&e, &t->raw, s, len, first, encode_plain);
	enc_clear(&e);
	return e.rc ? e.rc : e.n;
}

const char *
tok_encode_error(int rc)
{
	return rc == -E2BIG    ? "it is too long"
	       : rc == -EIO    ? "the tokenizer's regular expression gave up on it"
	       : rc == -EINVAL ? "its letters spell a special token"
			       : strerror(-rc);
}

static bool
python_space(int32_t c)
{
	return space_len(c) || (c >= 0x1c && c <= 0x1f);
}

size_t
tok_space_before(const char *s, size_t len)
{
	size_t n = 0;
	int32_t c;

	while (n < len && python_space(c = char_after(s + n, len - n)))
		n += space_len(c) ? space_len(c) : 1;
	return n;
}

size_t
tok_space_after(const char *s, size_t len)
{
	size_t n = 0;
	int32_t c;

	while (n < len && python_space(c = char_before(s, len - n)))
		n += space_len(c) ? space_len(c) : 1;
	return n;
}
