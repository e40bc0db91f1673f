/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok.c: see tok.h. First the blob and its checks, then encoding (added tokens, normalizer, pre-tokenizer, BPE), then
 * decoding, then the compiler from tokenizer.json, which only octetd needs: -DTOK_NO_COMPILE leaves it out, and jansson
 * with it.
 *
 * The order of steps and their corner cases are those of Hugging Face tokenizers 0.2x (added_vocabulary.rs,
 * normalizer.rs, bpe/word.rs), which define what a model was trained on; tests/golden/tok holds them.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tok.h"

#include <errno.h>
#include <limits.h>
#include <pcre2.h>
#include <stdlib.h>
#include <utf8proc.h>
#ifndef TOK_NO_COMPILE
#include <jansson.h>
#endif

#define MAGIC "octtok1"
#define VERSION 1u
#define NONE UINT32_MAX
#define MAX_VOCAB (1u << 24)
#define MAX_OPS 32u
#define MAX_TEXT ((size_t)1 << 30)

/* ---- the blob: a head, then sections at 8-byte aligned offsets ---- */

enum sec {
	S_STR,    /* bytes of every string */
	S_PIECE,  /* span [vocab]: the file's spelling; offset NONE: no such id */
	S_TEXT,   /* span [vocab]: what the id decodes to */
	S_IDFLAG, /* uint8_t [vocab]: ID_* */
	S_VOCAB,  /* uint32_t [power of two]: open-addressing set of the ids of the BPE vocabulary, by spelling */
	S_MERGE,  /* struct merge [power of two]: open-addressing, by (a, b) */
	S_RAW,    /* struct added, sorted: matched in the text as it came */
	S_NORM,   /* struct added, sorted: matched after the normalizer */
	S_NOP,    /* struct op: normalizer */
	S_POP,    /* struct op: pre-tokenizer */
	S_PREFIX, /* uint32_t: ids that TOK_BOS puts first */
	S_SUFFIX, /* and last */
	S_EOS,    /* uint32_t */
	S_TPRE,   /* uint32_t: ids of the chat template before the user's text */
	S_TSUF,   /* and after */
	S_COUNT
};

struct span {
	uint32_t off, len;
};

struct merge {
	uint32_t a, b, rank, id; /* rank NONE: an empty slot */
};

struct added {
	struct span key;
	uint32_t id, flags; /* A_* */
};

struct op {
	uint32_t kind, arg; /* N_* or P_* */
	struct span a, b;
};

enum { ID_SPECIAL = 1, ID_ADDED = 2 };
enum { A_SPECIAL = 1, A_LSTRIP = 2, A_RSTRIP = 4, A_WORD = 8 };
enum { F_BYTE_LEVEL = 1, F_BYTE_FALLBACK = 2, F_FUSE_UNK = 4, F_IGNORE_MERGES = 8, F_ALL = 15 };
enum { N_PREPEND, N_REPLACE, N_UNICODE, N_COUNT }; /* a; a -> b; arg: U_* */
enum { U_COMPOSE = 1, U_COMPAT = 2 };
enum { P_SPACE, P_META, P_REGEX, P_STRING, P_COUNT }; /* -; arg: M_*, a; arg: behaviour, a */
enum { M_ALWAYS, M_FIRST, M_NEVER };
enum { B_ISOLATED, B_REMOVED, B_CONTIGUOUS, B_PREVIOUS, B_NEXT, B_COUNT, B_INVERT = 16 };
enum template_kind { T_NONE, T_PROOF, T_UNKNOWN, T_COUNT }; /* new kinds go before T_COUNT */

static const char *const template_names[T_COUNT] = {"none", "proof", "unknown"};
static const uint32_t sec_size[S_COUNT] = {
    [S_STR] = 1,
    [S_PIECE] = sizeof(struct span),
    [S_TEXT] = sizeof(struct span),
    [S_IDFLAG] = 1,
    [S_VOCAB] = 4,
    [S_MERGE] = sizeof(struct merge),
    [S_RAW] = sizeof(struct added),
    [S_NORM] = sizeof(struct added),
    [S_NOP] = sizeof(struct op),
    [S_POP] = sizeof(struct op),
    [S_PREFIX] = 4,
    [S_SUFFIX] = 4,
    [S_EOS] = 4,
    [S_TPRE] = 4,
    [S_TSUF] = 4,
};

struct head {
	char magic[8];
	uint32_t version, flags; /* F_* */
	uint64_t len;
	uint32_t vocab, unk;       /* unk NONE: none */
	uint32_t template;         /* enum template_kind */
	uint32_t strip, strip_max; /* decoding drops up to strip_max bytes `strip` at the start */
	uint32_t zero;
	uint32_t byte_id[256]; /* byte level: id of a byte; else id of <0xNN>; NONE: none */
	struct {
		uint64_t off, n;
	} sec[S_COUNT];
};

struct addset {
	const struct added *v;
	size_t n;
	bool first[256]; /* bytes that a key starts with */
};

struct tok {
	const struct head *h;
	const char *str;
	const struct span *piece, *text;
	const uint8_t *id_flag;
	const uint32_t *vocab;
	const struct merge *merge;
	size_t vocab_mask, merge_mask, max_text;
	struct addset raw, norm;
	const struct op *nop, *pop;
	size_t n_nop, n_pop;
	pcre2_code *re[MAX_OPS]; /* of P_REGEX in pop */
};

static _Thread_local uint64_t last_work;

static const void *
section(const struct head *h, enum sec s)
{
	return (const char *)h + h->sec[s].off;
}

static uint32_t
hash_pair(uint32_t a, uint32_t b)
{
	uint64_t x = ((uint64_t)a << 32 | b) * 0x9e3779b97f4a7c15u;

	x ^= x >> 29;
	return (uint32_t)((x * 0xbf58476d1ce4e5b9u) >> 32);
}

static uint32_t
hash_bytes(const char *s, size_t len)
{
	uint64_t x = 0xcbf29ce484222325u; /* FNV-1a */

	for (size_t i = 0; i < len; i++)
		x = (x ^ (unsigned char)s[i]) * 0x100000001b3u;
	return (uint32_t)(x ^ x >> 32);
}

/* Bytes of the first character: 1 to 4; 0: its start, cut short; -1: not UTF-8 (Unicode 15, table 3-7). n > 0. */
static int
utf8_step(const char *s, size_t n)
{
	const unsigned char *p = (const unsigned char *)s;
	unsigned lo = 0x80, hi = 0xbf;
	size_t len;

	if (p[0] < 0x80)
		return 1;
	if (p[0] < 0xc2 || p[0] > 0xf4)
		return -1;
	len = p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
	if (p[0] == 0xe0)
		lo = 0xa0;
	else if (p[0] == 0xed)
		hi = 0x9f;
	else if (p[0] == 0xf0)
		lo = 0x90;
	else if (p[0] == 0xf4)
		hi = 0x8f;
	for (size_t i = 1; i < len; i++, lo = 0x80, hi = 0xbf) {
		if (i >= n)
			return 0;
		if (p[i] < lo || p[i] > hi)
			return -1;
	}
	return (int)len;
}

static size_t
valid_run(const char *s, size_t n)
{
	size_t i = 0;
	int k;

	while (i < n && (k = utf8_step(s + i, n - i)) > 0)
		i += (size_t)k;
	return i;
}

/* ---- tok_open ---- */

static bool
span_ok(const struct head *h, struct span s)
{
	return s.off <= h->sec[S_STR].n && s.len <= h->sec[S_STR].n - s.off;
}

static bool
ids_ok(const struct head *h, enum sec s)
{
	const uint32_t *v = section(h, s);

	for (size_t i = 0; i < h->sec[s].n; i++)
		if (v[i] >= h->vocab)
			return false;
	return true;
}

static bool
power_of_two(uint64_t n)
{
	return n && !(n & (n - 1));
}

static bool
head_ok(const struct head *h, size_t len)
{
	if (len < sizeof(*h) || memcmp(h->magic, MAGIC, sizeof(h->magic)) || h->version != VERSION || h->len != len)
		return false;
	if (h->flags & ~(uint32_t)F_ALL || !h->vocab || h->vocab > MAX_VOCAB || h->template >= T_COUNT ||
	    h->strip > 127)
		return false;
	if (h->unk != NONE && h->unk >= h->vocab)
		return false;
	for (int i = 0; i < 256; i++)
		if (h->byte_id[i] != NONE && h->byte_id[i] >= h->vocab)
			return false;
	for (int i = 0; i < S_COUNT; i++) {
		uint64_t off = h->sec[i].off;

		if (off % 8 || off < sizeof(*h) || off > len || h->sec[i].n > (len - off) / sec_size[i])
			return false;
	}
	return h->sec[S_STR].n <= UINT32_MAX - 1 && h->sec[S_NOP].n <= MAX_OPS && h->sec[S_POP].n <= MAX_OPS;
}

static bool
tables_ok(const struct head *h)
{
	const struct span *piece = section(h, S_PIECE), *text = section(h, S_TEXT);
	const uint32_t *vocab = section(h, S_VOCAB);
	const struct merge *m = section(h, S_MERGE);

	if (h->sec[S_PIECE].n != h->vocab || h->sec[S_TEXT].n != h->vocab || h->sec[S_IDFLAG].n != h->vocab)
		return false;
	if (!power_of_two(h->sec[S_VOCAB].n) || !power_of_two(h->sec[S_MERGE].n))
		return false;
	for (uint32_t i = 0; i < h->vocab; i++)
		if (piece[i].off != NONE && (!span_ok(h, piece[i]) || !span_ok(h, text[i])))
			return false;
	for (size_t i = 0; i < h->sec[S_VOCAB].n; i++)
		if (vocab[i] != NONE && (vocab[i] >= h->vocab || piece[vocab[i]].off == NONE))
			return false;
	for (size_t i = 0; i < h->sec[S_MERGE].n; i++)
		if (m[i].rank != NONE && m[i].id >= h->vocab)
			return false;
	return ids_ok(h, S_PREFIX) && ids_ok(h, S_SUFFIX) && ids_ok(h, S_EOS) && ids_ok(h, S_TPRE) && ids_ok(h, S_TSUF);
}

static int
span_cmp(const char *str, struct span a, struct span b)
{
	int r = memcmp(str + a.off, str + b.off, a.len < b.len ? a.len : b.len);

	return r ? r : (a.len > b.len) - (a.len < b.len);
}

static bool
added_ok(const struct head *h, enum sec s, struct addset *set)
{
	const char *str = section(h, S_STR);

	set->v = section(h, s);
	set->n = h->sec[s].n;
	for (size_t i = 0; i < set->n; i++) {
		if (!span_ok(h, set->v[i].key) || !set->v[i].key.len || set->v[i].id >= h->vocab)
			return false;
		if (i && span_cmp(str, set->v[i - 1].key, set->v[i].key) >= 0)
			return false;
		set->first[(unsigned char)str[set->v[i].key.off]] = true;
	}
	return true;
}

static bool
ops_ok(const struct tok *t)
{
	for (size_t i = 0; i < t->n_nop; i++) {
		const struct op *o = &t->nop[i];

		if (o->kind >= N_COUNT || !span_ok(t->h, o->a) || !span_ok(t->h, o->b) ||
		    (o->kind == N_REPLACE && !o->a.len))
			return false;
	}
	for (size_t i = 0; i < t->n_pop; i++) {
		const struct op *o = &t->pop[i];

		if (o->kind >= P_COUNT || !span_ok(t->h, o->a) || (o->kind != P_SPACE && !o->a.len))
			return false;
		if (o->kind == P_META ? o->arg > M_NEVER : (o->arg & ~(uint32_t)B_INVERT) >= B_COUNT)
			return false;
	}
	return true;
}

static pcre2_code *
re_new(const char *s, size_t len, uint32_t options, struct err *e)
{
	pcre2_compile_context *cc = pcre2_compile_context_create(NULL);
	PCRE2_UCHAR text[160];
	PCRE2_SIZE at = 0;
	pcre2_code *re;
	int code = PCRE2_ERROR_NOMEMORY;

	if (cc)
		pcre2_set_newline(cc, PCRE2_NEWLINE_LF);
	re = cc ? pcre2_compile((PCRE2_SPTR)s, len, options, &code, &at, cc) : NULL;
	pcre2_compile_context_free(cc);
	if (!re) {
		if (pcre2_get_error_message(code, text, sizeof(text)) < 0)
			text[0] = '\0';
		err_set(e, -EINVAL, "regular expression, at byte %zu: %s", (size_t)at, (char *)text);
	}
	return re;
}

static int
open_regexes(struct tok *t, struct err *e)
{
	for (size_t i = 0; i < t->n_pop; i++) {
		const struct op *o = &t->pop[i];

		if (o->kind != P_REGEX)
			continue;
		/* Onigmo's ^ and $ (the engine that wrote these files' rules) match at every line */
		t->re[i] = re_new(
		    t->str + o->a.off, o->a.len, PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, e);
		if (!t->re[i])
			return -EINVAL;
		pcre2_jit_compile(t->re[i], PCRE2_JIT_COMPLETE); /* if it cannot, the interpreter does the same */
	}
	return 0;
}

static bool
tok_attach(struct tok *t)
{
	const struct head *h = t->h;

	t->str = section(h, S_STR);
	t->piece = section(h, S_PIECE);
	t->text = section(h, S_TEXT);
	t->id_flag = section(h, S_IDFLAG);
	t->vocab = section(h, S_VOCAB);
	t->vocab_mask = h->sec[S_VOCAB].n - 1;
	t->merge = section(h, S_MERGE);
	t->merge_mask = h->sec[S_MERGE].n - 1;
	t->nop = section(h, S_NOP);
	t->n_nop = h->sec[S_NOP].n;
	t->pop = section(h, S_POP);
	t->n_pop = h->sec[S_POP].n;
	for (uint32_t i = 0; i < h->vocab; i++)
		if (t->piece[i].off != NONE && t->text[i].len > t->max_text)
			t->max_text = t->text[i].len;
	t->max_text += 3; /* an unfinished character may be waiting */
	return added_ok(h, S_RAW, &t->raw) && added_ok(h, S_NORM, &t->norm) && ops_ok(t);
}

int
tok_open(struct tok **out, const void *blob, size_t len, struct err *e)
{
	struct tok *t;
	int rc;

	*out = NULL;
	if (!blob || (uintptr_t)blob % 8 || !head_ok(blob, len) || !tables_ok(blob))
		return err_set(e, -EINVAL, "tokenizer blob: damaged, or made by another version of octet");
	t = calloc(1, sizeof(*t));
	if (!t)
		return err_set(e, -ENOMEM, "tokenizer: out of memory");
	t->h = blob;
	if (!tok_attach(t)) {
		tok_free(&t);
		return err_set(e, -EINVAL, "tokenizer blob: damaged");
	}
	rc = open_regexes(t, e);
	if (rc) {
		tok_free(&t);
		return rc;
	}
	*out = t;
	return 0;
}

void
tok_free(struct tok **t)
{
	if (!*t)
		return;
	for (size_t i = 0; i < MAX_OPS; i++)
		pcre2_code_free((*t)->re[i]);
	free(*t);
	*t = NULL;
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
		int step = h->flags & F_BYTE_LEVEL ? 1 : utf8_step(s + i, len - i);
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

static unsigned byte_to_cp(unsigned b); /* GPT-2's table of a printable character for every byte */

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

		if (id != NONE) {
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
			at += at < len ? (size_t)utf8_step(s + at, len - at) : 1;
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

	return len && utf8_step(s, len) > 0 &&
		       utf8proc_iterate((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)len, &c) > 0
		   ? c
		   : -1;
}

static int32_t
char_before(const char *s, size_t end)
{
	for (size_t k = 1; k <= 4 && k <= end; k++)
		if (utf8_step(s + end - k, k) == (int)k)
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
		if (!a || ((a->flags & A_SPECIAL) && !(e->flags & TOK_SPECIAL)))
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

static const char *
encode_error(int rc)
{
	return rc == -E2BIG ? "it is too long"
	       : rc == -EIO ? "the tokenizer's regular expression gave up on it"
			    : strerror(-rc);
}

int64_t
tok_template(const struct tok *t, const char *user_text, size_t len, uint32_t *ids, size_t cap, struct err *e)
{
	const struct head *h = t->h;
	uint64_t n_pre = h->sec[S_TPRE].n, n_suf = h->sec[S_TSUF].n, body, at;
	int64_t n;

	if (h->template == T_UNKNOWN)
		return err_set(e, -ENOTSUP,
		    "this model's chat template is not one that octet knows: use --raw and write the whole prompt");
	if (h->template == T_NONE)
		n_pre = n_suf = 0;
	at = n_pre < cap && ids ? n_pre : 0;
	body = at || !n_pre ? cap - at : 0;
	n = tok_encode(t, user_text, len, h->template == T_NONE ? TOK_BOS : 0, body ? ids + at : NULL, body);
	if (n < 0)
		return err_set(e, (int)n, "cannot tokenize this text: %s", encode_error((int)n));
	for (uint64_t i = 0; i < n_pre && i < cap && ids; i++)
		ids[i] = ((const uint32_t *)section(h, S_TPRE))[i];
	for (uint64_t i = 0; i < n_suf && n_pre + (uint64_t)n + i < cap && ids; i++)
		ids[n_pre + (uint64_t)n + i] = ((const uint32_t *)section(h, S_TSUF))[i];
	return (int64_t)(n_pre + (uint64_t)n + n_suf);
}

/* ---- decoding ---- */

struct tok_stream {
	const struct tok *t;
	unsigned flags;
	uint32_t strip; /* leading bytes that may still be dropped */
	char wait[4];   /* the start of a character */
	size_t n_wait;
};

/* The text of an id, without what the decoder's Strip takes from the start of the whole text */
static size_t
next_text(const struct tok *t, uint32_t id, bool skip_special, uint32_t *strip, const char **text)
{
	size_t len, k = 0;

	*text = tok_text(t, id, &len);
	if (!len || (skip_special && (t->id_flag[id] & ID_SPECIAL)))
		return 0;
	while (*strip && k < len && (unsigned char)(*text)[k] == t->h->strip) {
		k++;
		--*strip;
	}
	if (k < len)
		*strip = 0;
	*text += k;
	return len - k;
}

int64_t
tok_decode(const struct tok *t, const uint32_t *ids, size_t n, bool skip_special, char *out, size_t cap)
{
	uint32_t strip = t->h->strip_max;
	size_t total = 0;

	for (size_t i = 0; i < n; i++) {
		const char *text;
		size_t len;

		if (ids[i] >= t->h->vocab)
			return -EINVAL;
		len = next_text(t, ids[i], skip_special, &strip, &text);
		if (out && len && total < cap)
			memcpy(out + total, text, len < cap - total ? len : cap - total);
		total += len;
	}
	return (int64_t)total;
}

int
tok_stream_new(struct tok_stream **s, const struct tok *t, unsigned flags)
{
	*s = NULL;
	if (flags & ~(TOK_SKIP_SPECIAL | TOK_CONTINUE))
		return -EINVAL;
	*s = calloc(1, sizeof(**s));
	if (!*s)
		return -ENOMEM;
	(*s)->t = t;
	(*s)->flags = flags;
	(*s)->strip = flags & TOK_CONTINUE ? 0 : t->h->strip_max;
	return 0;
}

void
tok_stream_free(struct tok_stream **s)
{
	free(*s);
	*s = NULL;
}

/* How many bytes at the end of wait + text begin a character that is not finished: 0 to 3 */
static size_t
unfinished(const struct tok_stream *s, const char *text, size_t len)
{
	char tail[8];
	size_t n = s->n_wait < 4 ? s->n_wait : 3, from;

	memcpy(tail, s->wait, n);
	from =
	    len > 4 ? len - 4 : 0; /* three bytes would do: the characters that end before them are looked at in vain */
	if (from)
		n = 0;
	memcpy(tail + n, text + from, len - from);
	n += len - from;
	for (size_t k = n < 3 ? n : 3; k; k--)
		if (utf8_step(tail + n - k, k) == 0)
			return k;
	return 0;
}

int64_t
tok_stream_push(struct tok_stream *s, uint32_t id, char *out, size_t cap)
{
	uint32_t strip = s->strip;
	const char *text;
	size_t len, keep, give, from_wait;

	if (id >= s->t->h->vocab)
		return -EINVAL;
	len = next_text(s->t, id, s->flags & TOK_SKIP_SPECIAL, &strip, &text);
	if (!len) {
		s->strip = strip;
		return 0;
	}
	keep = unfinished(s, text, len);
	give = s->n_wait + len - keep;
	if (give > cap)
		return (int64_t)give;
	from_wait = give < s->n_wait ? give : s->n_wait;
	if (from_wait)
		memcpy(out, s->wait, from_wait);
	memmove(s->wait, s->wait + from_wait, s->n_wait - from_wait);
	s->n_wait -= from_wait;
	if (give > from_wait)
		memcpy(out + from_wait, text, give - from_wait);
	memcpy(s->wait + s->n_wait, text + (give - from_wait), len - (give - from_wait));
	s->n_wait += len - (give - from_wait);
	s->strip = strip;
	return (int64_t)give;
}

int64_t
tok_stream_flush(struct tok_stream *s, char *out, size_t cap)
{
	size_t n = s->n_wait;

	if (n > cap)
		return (int64_t)n;
	if (n)
		memcpy(out, s->wait, n);
	s->n_wait = 0;
	s->strip = 0;
	return (int64_t)n;
}

size_t
tok_max_text(const struct tok *t)
{
	return t->max_text;
}

static const char *
span_text(const struct tok *t, const struct span *v, uint32_t id, size_t *len)
{
	bool there = id < t->h->vocab && t->piece[id].off != NONE;

	*len = there ? v[id].len : 0;
	return there ? t->str + v[id].off : NULL;
}

const char *
tok_piece(const struct tok *t, uint32_t id, size_t *len)
{
	return span_text(t, t->piece, id, len);
}

const char *
tok_text(const struct tok *t, uint32_t id, size_t *len)
{
	return span_text(t, t->text, id, len);
}

bool
tok_is_special(const struct tok *t, uint32_t id)
{
	return id < t->h->vocab && (t->id_flag[id] & ID_SPECIAL);
}

uint32_t
tok_vocab(const struct tok *t)
{
	return t->h->vocab;
}

uint32_t
tok_n_eos(const struct tok *t)
{
	return (uint32_t)t->h->sec[S_EOS].n;
}

const uint32_t *
tok_eos(const struct tok *t)
{
	return section(t->h, S_EOS);
}

const char *
tok_template_name(const struct tok *t)
{
	return template_names[t->h->template];
}

static unsigned
byte_to_cp(unsigned b)
{
	if ((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174)
		return b;
	if (b <= 32)
		return 256 + b;
	return b == 173 ? 256 + 67 : 256 + 33 + (b - 127); /* 127..160 */
}

/* ---- the compiler ---- */

#ifndef TOK_NO_COMPILE

struct buf {
	char *p;
	size_t n, cap;
};

struct entry {
	const char *s; /* NULL: no such id. Lives in the parsed JSON. */
	uint32_t len;
	bool model, added, special;
};

struct cc {
	struct err *e;
	int rc; /* the first failure */
	json_t *root, *config;
	const json_t *vocab;
	struct entry *entry; /* [head.vocab] */
	struct head head;
	struct buf sec[S_COUNT], key;
	bool dec_byte_level, dec_byte_fallback, dec_fuse;
	const char *rep[8][2]; /* Replace of the decoder */
	size_t n_rep;
	char *blob;
	struct tok *t; /* the blob as it is so far */
};

#define FAIL(c, code, ...) ((c)->rc = (c)->rc ? (c)->rc : err_set((c)->e, code, __VA_ARGS__))
#define BAD(c, ...) FAIL(c, -EINVAL, "tokenizer.json: " __VA_ARGS__)
#define UNSUPPORTED(c, ...) FAIL(c, -ENOTSUP, "tokenizer.json: " __VA_ARGS__)

/* A string of the file made fit for a message: short, no control characters. The result lives until the eighth call
 * after it. */
static const char *
show(const char *s)
{
	static _Thread_local char text[8][64];
	static _Thread_local unsigned turn;
	char *out = text[turn++ % 8];
	size_t n = 0;

	while (s[n]) {
		int k = utf8_step(s + n, strlen(s + n));

		if (k <= 0 || n + (size_t)k > 56)
			break;
		memcpy(out + n, s + n, (size_t)k);
		if ((unsigned char)s[n] < ' ' || s[n] == 0x7f)
			out[n] = '?';
		n += (size_t)k;
	}
	strcpy(out + n, s[n] ? "..." : "");
	return out;
}

static void *
grow(struct cc *c, struct buf *b, size_t len)
{
	size_t cap = b->cap ? b->cap : 256;
	char *p;

	while (cap - b->n < len)
		cap *= 2;
	if (cap != b->cap) {
		p = realloc(b->p, cap);
		if (!p) {
			FAIL(c, -ENOMEM, "tokenizer: out of memory");
			return NULL;
		}
		b->p = p;
		b->cap = cap;
	}
	p = b->p + b->n;
	b->n += len;
	return p;
}

static void
add(struct cc *c, struct buf *b, const void *s, size_t len)
{
	void *p = len ? grow(c, b, len) : NULL;

	if (p)
		memcpy(p, s, len);
}

static void
add_text(struct cc *c, struct buf *b, const char *s)
{
	add(c, b, s, strlen(s));
}

static void
add_id(struct cc *c, enum sec s, uint32_t id)
{
	add(c, &c->sec[s], &id, sizeof(id));
}

static struct span
add_span(struct cc *c, const char *s, size_t len)
{
	struct span sp = {(uint32_t)c->sec[S_STR].n, (uint32_t)len};

	if (c->sec[S_STR].n + len > UINT32_MAX - 1)
		BAD(c, "more than 4 GiB of strings");
	else
		add(c, &c->sec[S_STR], s, len);
	return sp;
}

/* ---- typed access: every failure names the key ---- */

static const char *
type_name(const json_t *j)
{
	static const char *const names[] = {
	    "an object", "an array", "a string", "an integer", "a real", "true", "false", "null"};

	return j ? names[json_typeof(j)] : "missing";
}

static const char *
wanted_name(json_type type)
{
	return type == JSON_OBJECT    ? "an object"
	       : type == JSON_ARRAY   ? "an array"
	       : type == JSON_STRING  ? "a string"
	       : type == JSON_INTEGER ? "an integer"
				      : "true or false";
}

/* The value of a key, or NULL with the failure noted. JSON_TRUE stands for either boolean. */
static const json_t *
need(struct cc *c, const json_t *obj, const char *where, const char *key, json_type type)
{
	const json_t *j = json_object_get(obj, key);

	if (c->rc)
		return NULL;
	if (!j) {
		BAD(c, "%s%s%s is missing", where, *where ? "." : "", show(key));
		return NULL;
	}
	if (type == JSON_TRUE ? !json_is_boolean(j) : json_typeof(j) != type) {
		BAD(c, "%s%s%s must be %s, it is %s", where, *where ? "." : "", show(key), wanted_name(type),
		    type_name(j));
		return NULL;
	}
	return j;
}

static const char *
need_string(struct cc *c, const json_t *obj, const char *where, const char *key)
{
	const json_t *j = need(c, obj, where, key, JSON_STRING);

	if (j && strlen(json_string_value(j)) != json_string_length(j)) {
		BAD(c, "%s.%s holds a NUL character", where, key);
		j = NULL;
	}
	return j ? json_string_value(j) : NULL;
}

static bool
need_bool(struct cc *c, const json_t *obj, const char *where, const char *key)
{
	return json_is_true(need(c, obj, where, key, JSON_TRUE));
}

/* The same for a key that may be missing or null */
static bool
has(const json_t *obj, const char *key)
{
	const json_t *j = json_object_get(obj, key);

	return j && !json_is_null(j);
}

static bool
opt_bool(struct cc *c, const json_t *obj, const char *where, const char *key, bool otherwise)
{
	return has(obj, key) ? need_bool(c, obj, where, key) : otherwise;
}

static uint32_t
need_id(struct cc *c, const json_t *j, const char *what)
{
	json_int_t v = json_integer_value(j);

	if (!json_is_integer(j))
		BAD(c, "%s must be an integer, it is %s", what, type_name(j));
	else if (v < 0 || v >= (json_int_t)c->head.vocab)
		BAD(c, "%s is %lld, the model's ids are 0 to %u", what, (long long)v, c->head.vocab - 1);
	else
		return (uint32_t)v;
	return NONE;
}

/* Id of a spelling in the BPE vocabulary, NONE if it is not there */
static uint32_t
vocab_id(const struct cc *c, const char *s, size_t len)
{
	const json_t *j = json_object_getn(c->vocab, s, len);

	return j ? (uint32_t)json_integer_value(j) : NONE;
}

static uint32_t
any_id(const struct cc *c, const char *s)
{
	uint32_t id = vocab_id(c, s, strlen(s));

	for (uint32_t i = 0; id == NONE && i < c->head.vocab; i++)
		if (c->entry[i].added && !strcmp(c->entry[i].s, s))
			id = i;
	return id;
}

/* ---- model ---- */

static void
add_entry(struct cc *c, uint32_t id, const char *s)
{
	struct entry *en = &c->entry[id];

	if (en->s && strcmp(en->s, s))
		BAD(c, "id %u is used twice, by '%s' and '%s'", id, show(en->s), show(s));
	en->s = s;
	en->len = (uint32_t)strlen(s);
}

static void
read_vocab(struct cc *c, const json_t *model)
{
	const char *key;
	json_t *j;

	c->vocab = need(c, model, "model", "vocab", JSON_OBJECT);
	if (!c->vocab)
		return;
	json_object_foreach((json_t *)(uintptr_t)c->vocab, key, j)
	{
		char what[96];
		uint32_t id;

		snprintf(what, sizeof(what), "model.vocab['%s']", show(key));
		id = need_id(c, j, what);
		if (c->rc)
			return;
		if (!*key)
			BAD(c, "model.vocab has an empty token, id %u", id);
		add_entry(c, id, key);
		c->entry[id].model = true;
	}
}

/* Either "a b" or ["a", "b"] */
static bool
merge_parts(struct cc *c, const json_t *j, size_t i, const char *part[2], size_t len[2])
{
	const char *s, *gap;

	if (json_is_array(j) && json_array_size(j) == 2 && json_is_string(json_array_get(j, 0)) &&
	    json_is_string(json_array_get(j, 1))) {
		for (size_t k = 0; k < 2; k++) {
			part[k] = json_string_value(json_array_get(j, k));
			len[k] = json_string_length(json_array_get(j, k));
		}
		return true;
	}
	s = json_string_value(j);
	gap = s ? strchr(s, ' ') : NULL;
	if (!gap || strchr(gap + 1, ' ')) {
		BAD(c, "model.merges[%zu] must be \"a b\" or [\"a\", \"b\"]", i);
		return false;
	}
	part[0] = s;
	part[1] = gap + 1;
	len[0] = (size_t)(gap - s);
	len[1] = strlen(gap + 1);
	return true;
}

static void
put_merge(struct merge *m, size_t mask, struct merge v)
{
	size_t i = hash_pair(v.a, v.b) & mask;

	while (m[i].rank != NONE && (m[i].a != v.a || m[i].b != v.b))
		i = (i + 1) & mask;
	m[i] = v; /* of two equal merges the later counts, as in Hugging Face */
}

static void
read_merge(struct cc *c, const json_t *j, size_t i, struct merge *table, size_t mask)
{
	struct merge m = {.rank = (uint32_t)i};
	const char *part[2];
	size_t len[2];

	if (!merge_parts(c, j, i, part, len))
		return;
	m.a = vocab_id(c, part[0], len[0]);
	m.b = vocab_id(c, part[1], len[1]);
	c->key.n = 0;
	add(c, &c->key, part[0], len[0]);
	add(c, &c->key, part[1], len[1]);
	add(c, &c->key, "", 1);
	if (c->rc)
		return;
	m.id = vocab_id(c, c->key.p, c->key.n - 1);
	if (m.a == NONE || m.b == NONE)
		BAD(c, "model.merges[%zu]: its %s part is not in the vocab", i, m.a == NONE ? "first" : "second");
	else if (m.id == NONE)
		BAD(c, "model.merges[%zu]: its result '%s' is not in the vocab", i, show(c->key.p));
	else
		put_merge(table, mask, m);
}

static size_t
table_size(size_t n)
{
	size_t cap = 2;

	while (cap < 2 * n)
		cap *= 2;
	return cap;
}

static void
read_merges(struct cc *c, const json_t *model)
{
	const json_t *merges = need(c, model, "model", "merges", JSON_ARRAY);
	size_t cap = table_size(json_array_size(merges));
	struct merge *m;

	m = merges ? grow(c, &c->sec[S_MERGE], cap * sizeof(*m)) : NULL;
	if (!m)
		return;
	memset(m, 0xff, cap * sizeof(*m));
	for (size_t i = 0; i < json_array_size(merges) && !c->rc; i++)
		read_merge(c, json_array_get(merges, i), i, m, cap - 1);
}

static void
read_byte_tokens(struct cc *c)
{
	for (unsigned b = 0; b < 256; b++) {
		char name[8];

		snprintf(name, sizeof(name), "<0x%02X>", b);
		c->head.byte_id[b] = vocab_id(c, name, 6);
	}
}

static void
read_model(struct cc *c)
{
	static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
	const json_t *model = need(c, c->root, "", "model", JSON_OBJECT);
	const char *type =
	    has(model, "type") ? need_string(c, model, "model", "type") : "BPE"; /* GPT-2's own file has none */
	const char *s;

	if (c->rc)
		return;
	if (strcmp(type, "BPE"))
		UNSUPPORTED(c, "model type '%s' is not supported", show(type));
	if (has(model, "dropout") && (!json_is_number(json_object_get(model, "dropout")) ||
					 json_number_value(json_object_get(model, "dropout")) != 0))
		UNSUPPORTED(c, "model.dropout is not supported");
	for (size_t i = 0; i < 2; i++)
		if (has(model, affixes[i]) && (s = need_string(c, model, "model", affixes[i])) && *s)
			UNSUPPORTED(c, "model.%s is not supported", affixes[i]);
	c->head.flags |= opt_bool(c, model, "model", "byte_fallback", false) ? F_BYTE_FALLBACK : 0;
	c->head.flags |= opt_bool(c, model, "model", "fuse_unk", false) ? F_FUSE_UNK : 0;
	c->head.flags |= opt_bool(c, model, "model", "ignore_merges", false) ? F_IGNORE_MERGES : 0;
	read_vocab(c, model);
	read_merges(c, model);
	if (!c->rc && has(model, "unk_token") && (s = need_string(c, model, "model", "unk_token"))) {
		c->head.unk = vocab_id(c, s, strlen(s));
		if (c->head.unk == NONE)
			BAD(c, "model.unk_token '%s' is not in the vocab", show(s));
	}
	if (!c->rc)
		read_byte_tokens(c);
}

/* ---- normalizer, pre-tokenizer, decoder, post-processor: each a tree of {"type": ...} ---- */

typedef void (*part_fn)(struct cc *c, const json_t *j, const char *where, const char *type);

/* Calls fn for the part, or for each part of a Sequence (of Sequences) */
static void
each_part(struct cc *c, const json_t *j, const char *where, const char *list, unsigned depth, part_fn fn)
{
	const char *type;
	const json_t *parts;

	if (c->rc || !j || json_is_null(j))
		return;
	if (!json_is_object(j)) {
		BAD(c, "%s must be an object or null, it is %s", where, type_name(j));
		return;
	}
	type = need_string(c, j, where, "type");
	if (!type)
		return;
	if (strcmp(type, "Sequence")) {
		fn(c, j, where, type);
		return;
	}
	parts = need(c, j, where, list, JSON_ARRAY);
	if (depth > 4)
		BAD(c, "%s: Sequences nested too deeply", where);
	for (size_t i = 0; i < json_array_size(parts) && !c->rc; i++)
		each_part(c, json_array_get(parts, i), where, list, depth + 1, fn);
}

static void
add_op(struct cc *c, enum sec s, uint32_t kind, uint32_t arg, const char *a, size_t a_len, const char *b)
{
	struct op o = {.kind = kind, .arg = arg};

	o.a = add_span(c, a, a_len);
	o.b = add_span(c, b, strlen(b));
	add(c, &c->sec[s], &o, sizeof(o));
	if (c->sec[s].n / sizeof(o) > MAX_OPS)
		BAD(c, "more than %u %s steps", MAX_OPS, s == S_NOP ? "normalizer" : "pre_tokenizer");
}

/* The pattern of a Replace or Split: {"String": s} or {"Regex": s} */
static const char *
pattern(struct cc *c, const json_t *j, const char *where, bool *regex)
{
	const json_t *p = need(c, j, where, "pattern", JSON_OBJECT);
	char path[64];
	const char *s;

	if (!p)
		return NULL;
	snprintf(path, sizeof(path), "%s.pattern", where);
	*regex = json_object_get(p, "Regex") != NULL;
	s = need_string(c, p, path, *regex ? "Regex" : "String");
	if (s && !*s)
		BAD(c, "%s is empty", path);
	return c->rc ? NULL : s;
}

static void
read_normalizer(struct cc *c, const json_t *j, const char *where, const char *type)
{
	static const struct {
		const char *name;
		uint32_t form;
	} forms[] = {{"NFD", 0}, {"NFC", U_COMPOSE}, {"NFKD", U_COMPAT}, {"NFKC", U_COMPOSE | U_COMPAT}};
	bool regex;
	const char *a, *b;

	for (size_t i = 0; i < 4; i++) {
		if (!strcmp(type, forms[i].name)) {
			add_op(c, S_NOP, N_UNICODE, forms[i].form, "", 0, "");
			return;
		}
	}
	if (!strcmp(type, "Prepend")) {
		a = need_string(c, j, where, "prepend");
		if (a)
			add_op(c, S_NOP, N_PREPEND, 0, a, strlen(a), "");
	} else if (!strcmp(type, "Replace")) {
		a = pattern(c, j, where, &regex);
		b = need_string(c, j, where, "content");
		if (a && regex)
			UNSUPPORTED(c, "normalizer Replace with a Regex is not supported");
		if (!c->rc)
			add_op(c, S_NOP, N_REPLACE, 0, a, strlen(a), b);
	} else {
		UNSUPPORTED(c, "normalizer type '%s' is not supported", show(type));
	}
}

/* ---- regular expressions: from Oniguruma's dialect (Ruby syntax) to PCRE2's ---- */

#define SPACE_SET "\\x{9}-\\x{d}\\x{20}\\x{85}\\p{Z}" /* White_Space; PCRE2's \s has U+180E too */
#define WORD_SET "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}"

/* A set that PCRE2 reads otherwise, spelled out; false: inside [...] a negated one cannot be */
static bool
re_set(struct cc *c, struct buf *out, const char *set, bool negated, bool in_class)
{
	if (in_class && negated)
		return false;
	add_text(c, out, in_class ? "" : negated ? "[^" : "[");
	add_text(c, out, set);
	add_text(c, out, in_class ? "" : "]");
	return true;
}

/* \p{Han}: PCRE2 takes a script's name as Script_Extensions, Oniguruma as Script */
static const char *
re_property(struct cc *c, struct buf *out, const char *s)
{
	const char *name = s + 3, *end = strchr(s, '}');
	size_t len;

	if (!end)
		return NULL;
	add(c, out, s, 3);
	if (*name == '^')
		add(c, out, name++, 1);
	len = (size_t)(end - name);
	if (len > 2 && memcmp(name, "Any", 3))
		add_text(c, out, "sc:");
	add(c, out, name, len + 1);
	return end + 1;
}

/* s is at a backslash; returns what follows the escape, or NULL: it means something else in PCRE2, or nothing */
static const char *
re_escape(struct cc *c, struct buf *out, const char *s, bool in_class)
{
	const char *end;

	switch (s[1]) {
	case '\0':
	case 'h':
	case 'H':
	case 'b':
	case 'B':
	case 'K':
	case 'O':
	case 'y':
	case 'Y':
	case 'M':
	case 'C':
	case 'Q':
	case 'E':
	case 'N':
		return NULL;
	case 's':
	case 'S':
		return re_set(c, out, SPACE_SET, s[1] == 'S', in_class) ? s + 2 : NULL;
	case 'w':
	case 'W':
		return re_set(c, out, WORD_SET, s[1] == 'W', in_class) ? s + 2 : NULL;
	case 'p':
	case 'P':
		return s[2] == '{' ? re_property(c, out, s) : NULL;
	case 'u':
		if (strspn(s + 2, "0123456789abcdefABCDEF") < 4)
			return NULL;
		add_text(c, out, "\\x{");
		add(c, out, s + 2, 4);
		add_text(c, out, "}");
		return s + 6;
	case 'x':
		end = s[2] == '{' ? strchr(s, '}') : NULL;
		add(c, out, s, end ? (size_t)(end + 1 - s) : 2);
		return end ? end + 1 : s + 2;
	default:
		add(c, out, s, 2);
		return s + 2;
	}
}

/* Options in (?...) other than i mean other things in the two dialects */
static bool
re_group_ok(const char *s)
{
	const char *o = s + 2;

	if (s[1] != '?')
		return s[1] != '*';
	while ((*o >= 'a' && *o <= 'z') || *o == '-')
		if (*o != 'i' && *o != '-')
			return false;
		else
			o++;
	return o == s + 2 ? strchr(":=!<>", *o) && *o : *o == ':' || *o == ')';
}

static void
re_translate(struct cc *c, const char *re, struct buf *out)
{
	const char *s = re, *class_start = NULL;

	while (s && *s && !c->rc) {
		const char *at = s;

		if (*s == '\\') {
			s = re_escape(c, out, s, class_start != NULL);
		} else if (class_start) {
			if ((*s == '[' && s[1] != ':') || (*s == '&' && s[1] == '&') ||
			    (*s == ']' && s == class_start)) {
				s = NULL; /* sets of sets */
			} else if (*s == '[') {
				s = strstr(s, ":]");
				add(c, out, at, s ? (size_t)(s + 2 - at) : 0);
				s = s ? s + 2 : NULL;
			} else {
				class_start = *s == ']' ? NULL : class_start;
				add(c, out, s++, 1);
			}
		} else if (*s == '[') {
			s += s[1] == '^' ? 2 : 1;
			add(c, out, at, (size_t)(s - at));
			class_start = s;
		} else if ((*s == '}' && s[1] == '+') || (*s == '(' && !re_group_ok(s))) {
			s = NULL; /* {n,m}+ is greedy twice in one dialect, possessive in the other */
		} else {
			add(c, out, s++, 1);
		}
		if (!s)
			UNSUPPORTED(
			    c, "pre_tokenizer Regex: '%s' at byte %zu is not supported", show(at), (size_t)(at - re));
	}
}

static void
add_regex(struct cc *c, const char *re, uint32_t how)
{
	struct buf out = {0};

	re_translate(c, re, &out);
	if (!c->rc)
		add_op(c, S_POP, P_REGEX, how, out.p, out.n, "");
	free(out.p);
}

/* ---- pre-tokenizer ---- */

static void
read_split(struct cc *c, const json_t *j, const char *where)
{
	static const char *const names[B_COUNT] = {
	    "Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"};
	const char *behavior = need_string(c, j, where, "behavior"), *s;
	bool invert = need_bool(c, j, where, "invert"), regex;
	uint32_t how = 0;

	s = pattern(c, j, where, &regex);
	if (c->rc)
		return;
	while (how < B_COUNT && strcmp(behavior, names[how]))
		how++;
	if (how == B_COUNT) {
		UNSUPPORTED(c, "pre_tokenizer Split behavior '%s' is not supported", show(behavior));
		return;
	}
	how |= invert ? B_INVERT : 0;
	if (regex)
		add_regex(c, s, how);
	else
		add_op(c, S_POP, P_STRING, how, s, strlen(s), "");
}

/* Metaspace in pre_tokenizer and decoder alike; old files say add_prefix_space */
static uint32_t
metaspace_scheme(struct cc *c, const json_t *j, const char *where)
{
	static const char *const names[] = {"always", "first", "never"};
	const char *s;

	if (!has(j, "prepend_scheme"))
		return opt_bool(c, j, where, "add_prefix_space", true) ? M_ALWAYS : M_NEVER;
	s = need_string(c, j, where, "prepend_scheme");
	for (uint32_t i = 0; s && i < 3; i++)
		if (!strcmp(s, names[i]))
			return i;
	if (s)
		UNSUPPORTED(c, "%s Metaspace prepend_scheme '%s' is not supported", where, show(s));
	return M_NEVER;
}

static const char *
metaspace_sign(struct cc *c, const json_t *j, const char *where)
{
	const char *s = need_string(c, j, where, "replacement");

	if (s && (!*s || (size_t)utf8_step(s, strlen(s)) != strlen(s)))
		BAD(c, "%s.replacement must be one character", where);
	return c->rc ? NULL : s;
}

static void
read_pre_tokenizer(struct cc *c, const json_t *j, const char *where, const char *type)
{
	static const char gpt2[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
	const char *s;

	if (c->head.flags & F_BYTE_LEVEL) {
		UNSUPPORTED(c, "pre_tokenizer '%s' after ByteLevel is not supported", show(type));
	} else if (!strcmp(type, "ByteLevel")) {
		if (need_bool(c, j, where, "add_prefix_space"))
			add_op(c, S_POP, P_SPACE, 0, "", 0, "");
		if (opt_bool(c, j, where, "use_regex", true))
			add_regex(c, gpt2, B_ISOLATED);
		c->head.flags |= F_BYTE_LEVEL;
	} else if (!strcmp(type, "Split")) {
		read_split(c, j, where);
	} else if (!strcmp(type, "Digits")) {
		add_regex(c, "\\p{N}", need_bool(c, j, where, "individual_digits") ? B_ISOLATED : B_CONTIGUOUS);
	} else if (!strcmp(type, "Metaspace")) {
		uint32_t scheme = metaspace_scheme(c, j, where);

		s = metaspace_sign(c, j, where);
		if (s)
			add_op(c, S_POP, P_META, scheme, s, strlen(s), "");
		if (s && opt_bool(c, j, where, "split", true))
			add_op(c, S_POP, P_STRING, B_NEXT, s, strlen(s), "");
	} else {
		UNSUPPORTED(c, "pre_tokenizer type '%s' is not supported", show(type));
	}
}

/* ---- decoder ---- */

static void
add_replace(struct cc *c, const char *a, const char *b)
{
	if (c->n_rep == sizeof(c->rep) / sizeof(c->rep[0])) {
		UNSUPPORTED(c, "decoder: so many Replace are not supported");
		return;
	}
	c->rep[c->n_rep][0] = a;
	c->rep[c->n_rep++][1] = b;
}

static void
read_strip(struct cc *c, const json_t *j, const char *where)
{
	const char *s = need_string(c, j, where, "content");
	const json_t *start = need(c, j, where, "start", JSON_INTEGER), *stop = need(c, j, where, "stop", JSON_INTEGER);

	if (c->rc)
		return;
	if (strlen(s) != 1 || json_integer_value(stop) || json_integer_value(start) < 0 ||
	    json_integer_value(start) > 1024) {
		UNSUPPORTED(c, "decoder Strip: only one ASCII character at the start is supported");
		return;
	}
	c->head.strip = (uint32_t)s[0];
	c->head.strip_max = (uint32_t)json_integer_value(start);
}

/* The steps must come in the order Replace, ByteFallback, Fuse, Strip: then a token's text does not depend on its
 * neighbours */
static void
read_decoder(struct cc *c, const json_t *j, const char *where, const char *type)
{
	const char *a, *b;
	bool regex;

	if (c->dec_byte_level || c->head.strip_max || (c->dec_byte_fallback && !strcmp(type, "Replace")) ||
	    (c->dec_fuse != !strcmp(type, "Strip") && strcmp(type, "Fuse"))) {
		UNSUPPORTED(c, "decoder '%s' in this place is not supported", show(type));
	} else if (!strcmp(type, "ByteLevel")) {
		c->dec_byte_level = true;
	} else if (!strcmp(type, "ByteFallback")) {
		c->dec_byte_fallback = true;
	} else if (!strcmp(type, "Replace")) {
		a = pattern(c, j, where, &regex);
		b = need_string(c, j, where, "content");
		if (a && regex)
			UNSUPPORTED(c, "decoder Replace with a Regex is not supported");
		if (!c->rc)
			add_replace(c, a, b);
	} else if (!strcmp(type, "Strip")) {
		read_strip(c, j, where);
	} else if (!strcmp(type, "Metaspace")) {
		a = metaspace_sign(c, j, where);
		if (a)
			add_replace(c, a, " ");
		c->head.strip = ' ';
		c->head.strip_max = metaspace_scheme(c, j, where) == M_NEVER ? 0 : 1;
	} else if (!strcmp(type, "Fuse")) {
		c->dec_fuse = true;
	} else {
		UNSUPPORTED(c, "decoder type '%s' is not supported", show(type));
	}
}

static void
check_decoder(struct cc *c)
{
	bool byte_level = c->head.flags & F_BYTE_LEVEL;

	if (c->rc)
		return;
	if (!has(c->root, "decoder"))
		BAD(c, "decoder is %s: ids could not be turned into text",
		    type_name(json_object_get(c->root, "decoder")));
	else if (byte_level != c->dec_byte_level)
		BAD(c, "pre_tokenizer and decoder disagree: only the %s is ByteLevel", byte_level ? "first" : "second");
	for (unsigned b = 0; byte_level && b < 256 && !c->rc; b++) {
		utf8proc_uint8_t u[4];
		utf8proc_ssize_t n = utf8proc_encode_char((utf8proc_int32_t)byte_to_cp(b), u);

		c->head.byte_id[b] = vocab_id(c, (char *)u, (size_t)n);
		if (c->head.byte_id[b] == NONE && c->head.unk == NONE)
			BAD(c, "model.vocab lacks byte 0x%02x ('%.*s'), and there is no unk_token", b, (int)n,
			    (char *)u);
	}
	if (byte_level)
		c->head.flags &= ~(uint32_t)F_BYTE_FALLBACK; /* byte_id holds other ids now, and no character is ever
								unknown by its bytes */
}

/* ---- post-processor ---- */

static void
template_special(struct cc *c, const json_t *j, const json_t *specials, struct buf *out)
{
	const char *name = need_string(c, j, "post_processor.single[].SpecialToken", "id");
	const json_t *special = name ? need(c, specials, "post_processor.special_tokens", name, JSON_OBJECT) : NULL;
	const json_t *ids = special ? need(c, special, "post_processor.special_tokens[]", "ids", JSON_ARRAY) : NULL;

	for (size_t i = 0; i < json_array_size(ids) && !c->rc; i++) {
		uint32_t id = need_id(c, json_array_get(ids, i), "post_processor.special_tokens[].ids[]");

		add(c, out, &id, sizeof(id));
	}
}

static void
read_post_processor(struct cc *c, const json_t *j, const char *where, const char *type)
{
	const json_t *single, *specials, *s;
	struct buf side[2] = {{0}, {0}};
	size_t n_seq = 0;

	if (!strcmp(type, "ByteLevel"))
		return; /* offsets only */
	if (strcmp(type, "TemplateProcessing")) {
		UNSUPPORTED(c, "post_processor type '%s' is not supported", show(type));
		return;
	}
	single = need(c, j, where, "single", JSON_ARRAY);
	specials = need(c, j, where, "special_tokens", JSON_OBJECT);
	for (size_t i = 0; i < json_array_size(single) && !c->rc; i++) {
		const json_t *item = json_array_get(single, i);

		if ((s = json_object_get(item, "Sequence")))
			n_seq += json_is_string(json_object_get(s, "id")) &&
					 !strcmp(json_string_value(json_object_get(s, "id")), "A")
				     ? 1
				     : 2;
		else if ((s = need(c, item, "post_processor.single[]", "SpecialToken", JSON_OBJECT)))
			template_special(c, s, specials, &side[n_seq ? 1 : 0]);
	}
	if (n_seq != 1)
		BAD(c, "post_processor.single must name the Sequence A once");
	if (c->sec[S_PREFIX].n || c->sec[S_SUFFIX].n)
		UNSUPPORTED(c, "post_processor: more than one TemplateProcessing is not supported");
	add(c, &c->sec[S_PREFIX], side[0].p, side[0].n);
	add(c, &c->sec[S_SUFFIX], side[1].p, side[1].n);
	free(side[0].p);
	free(side[1].p);
}

/* ---- added tokens ---- */

static void
read_added_token(struct cc *c, const json_t *j, size_t i)
{
	struct added a = {0};
	char where[40];
	const char *s;
	enum sec sec;

	snprintf(where, sizeof(where), "added_tokens[%zu]", i);
	if (!json_is_object(j))
		BAD(c, "%s must be an object, it is %s", where, type_name(j));
	s = need_string(c, j, where, "content");
	if (s && !*s)
		BAD(c, "%s.content is empty", where);
	strcat(where, ".id");
	a.id = c->rc || !json_object_get(j, "id") ? NONE : need_id(c, json_object_get(j, "id"), where);
	where[strlen(where) - 3] = '\0';
	need(c, j, where, "id", JSON_INTEGER);
	a.flags =
	    (need_bool(c, j, where, "special") ? A_SPECIAL : 0) | (need_bool(c, j, where, "lstrip") ? A_LSTRIP : 0) |
	    (need_bool(c, j, where, "rstrip") ? A_RSTRIP : 0) | (need_bool(c, j, where, "single_word") ? A_WORD : 0);
	sec = need_bool(c, j, where, "normalized") ? S_NORM : S_RAW;
	if (c->rc)
		return;
	if (vocab_id(c, s, strlen(s)) != NONE && vocab_id(c, s, strlen(s)) != a.id)
		BAD(c, "%s: '%s' has id %u, in model.vocab it has %u", where, show(s), a.id, vocab_id(c, s, strlen(s)));
	add_entry(c, a.id, s);
	if (c->entry[a.id].added)
		BAD(c, "%s: '%s' is there twice", where, show(s));
	c->entry[a.id].added = true;
	c->entry[a.id].special = a.flags & A_SPECIAL;
	a.key = add_span(c, s, strlen(s));
	add(c, &c->sec[sec], &a, sizeof(a));
}

struct keyed {
	struct added a;
	const char *s;
	size_t order;
};

static int
keyed_cmp(const void *pa, const void *pb)
{
	const struct keyed *a = pa, *b = pb;
	size_t n = a->a.key.len < b->a.key.len ? a->a.key.len : b->a.key.len;
	int r = memcmp(a->s, b->s, n);

	if (!r)
		r = (a->a.key.len > b->a.key.len) - (a->a.key.len < b->a.key.len);
	return r ? r : (a->order > b->order) - (a->order < b->order);
}

/* Sorts by key. Of equal keys (two tokens that normalise to one text) the first special one wins, else the first, as in
 * Hugging Face. */
static void
sort_added(struct cc *c, enum sec s)
{
	struct added *v = (struct added *)c->sec[s].p;
	size_t n = c->sec[s].n / sizeof(*v), out = 0;
	struct keyed *k;

	if (c->rc || !n)
		return;
	k = calloc(n, sizeof(*k));
	if (!k) {
		FAIL(c, -ENOMEM, "tokenizer: out of memory");
		return;
	}
	for (size_t i = 0; i < n; i++)
		k[i] = (struct keyed){v[i], c->sec[S_STR].p + v[i].key.off, (v[i].flags & A_SPECIAL ? 0 : n) + i};
	qsort(k, n, sizeof(*k), keyed_cmp);
	for (size_t i = 0; i < n; i++)
		if (!i || k[i].a.key.len != k[i - 1].a.key.len || memcmp(k[i].s, k[i - 1].s, k[i].a.key.len))
			v[out++] = k[i].a;
	c->sec[s].n = out * sizeof(*v);
	free(k);
}

static void
read_added(struct cc *c)
{
	const json_t *v;

	if (c->rc || !has(c->root, "added_tokens"))
		return;
	v = need(c, c->root, "", "added_tokens", JSON_ARRAY);
	for (size_t i = 0; i < json_array_size(v) && !c->rc; i++)
		read_added_token(c, json_array_get(v, i), i);
}

/* ---- tables by id ---- */

static bool
byte_token(const char *s, size_t len, unsigned char *b)
{
	static const char hex[] = "0123456789abcdefABCDEF";
	char digits[3] = {0};

	if (len != 6 || memcmp(s, "<0x", 3) || s[5] != '>' || !strchr(hex, s[3]) || !strchr(hex, s[4]))
		return false;
	memcpy(digits, s + 3, 2);
	*b = (unsigned char)strtoul(digits, NULL, 16);
	return true;
}

/* The bytes behind a byte-level spelling, false: it holds a character that stands for none */
static bool
unmap_bytes(struct cc *c, const char *s, size_t len)
{
	c->key.n = 0;
	for (size_t i = 0; i < len;) {
		utf8proc_int32_t cp;
		char b;
		unsigned k;

		i += (size_t)utf8proc_iterate((const utf8proc_uint8_t *)s + i, (utf8proc_ssize_t)(len - i), &cp);
		k = (unsigned)cp < 256   ? (unsigned)cp
		    : (unsigned)cp < 289 ? (unsigned)cp - 256
		    : (unsigned)cp < 323 ? (unsigned)cp - 162
					 : 173;
		if (byte_to_cp(k) != (unsigned)cp)
			return false;
		b = (char)k;
		add(c, &c->key, &b, 1);
	}
	return true;
}

static void
replace_into(struct cc *c, const char *s, size_t len)
{
	struct buf tmp = {0};

	c->key.n = 0;
	add(c, &c->key, s, len);
	for (size_t r = 0; r < c->n_rep && !c->rc; r++) {
		const char *a = c->rep[r][0], *p, *hit;
		size_t left;

		tmp.n = 0;
		add(c, &tmp, c->key.p, c->key.n);
		p = tmp.p;
		left = tmp.n;
		c->key.n = 0;
		while (left && (hit = memmem(p, left, a, strlen(a)))) {
			add(c, &c->key, p, (size_t)(hit - p));
			add_text(c, &c->key, c->rep[r][1]);
			left -= (size_t)(hit - p) + strlen(a);
			p = hit + strlen(a);
		}
		add(c, &c->key, p, left);
	}
	free(tmp.p);
}

/* What an id decodes to, in c->key. An added token is the text it is found as, whatever bytes its characters would
 * stand for. */
static void
id_text(struct cc *c, const struct entry *en)
{
	unsigned char b;

	if (c->dec_byte_fallback && byte_token(en->s, en->len, &b)) {
		c->key.n = 0;
		add(c, &c->key, &b, 1);
	} else if (!c->dec_byte_level) {
		replace_into(c, en->s, en->len);
	} else if (en->added || !unmap_bytes(c, en->s, en->len)) {
		c->key.n = 0;
		add(c, &c->key, en->s, en->len);
	}
}

static void
make_id_tables(struct cc *c)
{
	for (uint32_t i = 0; i < c->head.vocab && !c->rc; i++) {
		const struct entry *en = &c->entry[i];
		struct span piece = {NONE, 0}, text = {NONE, 0};
		uint8_t flag = (uint8_t)((en->special ? ID_SPECIAL : 0) | (en->added ? ID_ADDED : 0));

		if (en->s) {
			piece = text = add_span(c, en->s, en->len);
			id_text(c, en);
			if (!c->rc && (c->key.n != en->len || memcmp(c->key.p, en->s, en->len)))
				text = add_span(c, c->key.p, c->key.n);
		}
		add(c, &c->sec[S_PIECE], &piece, sizeof(piece));
		add(c, &c->sec[S_TEXT], &text, sizeof(text));
		add(c, &c->sec[S_IDFLAG], &flag, sizeof(flag));
	}
}

static void
make_vocab_table(struct cc *c)
{
	size_t cap = table_size(json_object_size(c->vocab));
	uint32_t *v = c->rc ? NULL : grow(c, &c->sec[S_VOCAB], cap * sizeof(*v));

	if (!v)
		return;
	memset(v, 0xff, cap * sizeof(*v));
	for (uint32_t id = 0; id < c->head.vocab; id++) {
		size_t i;

		if (!c->entry[id].model)
			continue;
		i = hash_bytes(c->entry[id].s, c->entry[id].len) & (cap - 1);
		while (v[i] != NONE)
			i = (i + 1) & (cap - 1);
		v[i] = id;
	}
}

/* ---- tokenizer_config.json ---- */

static void
read_eos(struct cc *c)
{
	const json_t *j = json_object_get(c->config, "eos_token");
	const char *s;
	uint32_t id;

	if (c->rc || !j || json_is_null(j))
		return;
	if (json_is_object(j))
		j = json_object_get(j, "content");
	s = json_string_value(j);
	if (!s) {
		FAIL(c, -EINVAL, "tokenizer_config.json: eos_token must be a string or an object with a content");
		return;
	}
	id = any_id(c, s);
	if (id == NONE)
		FAIL(c, -EINVAL, "tokenizer_config.json: eos_token '%s' is not in the vocab", show(s));
	else
		add_id(c, S_EOS, id);
}

/* The template's text, NULL if there is none */
static const char *
chat_template(struct cc *c)
{
	const json_t *j = json_object_get(c->config, "chat_template");

	if (!j || json_is_null(j))
		return NULL;
	if (json_is_string(j))
		return json_string_value(j);
	if (!json_is_array(j)) {
		FAIL(c, -EINVAL, "tokenizer_config.json: chat_template must be a string or an array, it is %s",
		    type_name(j));
		return NULL;
	}
	for (size_t i = 0; i < json_array_size(j); i++) {
		const json_t *item = json_array_get(j, i);
		const char *name = json_string_value(json_object_get(item, "name"));

		if (name && !strcmp(name, "default") && json_is_string(json_object_get(item, "template")))
			return json_string_value(json_object_get(item, "template"));
	}
	return json_array_size(j) ? "{{ none of them is the default }}" : NULL;
}

/* The ids of a template's literal text. Its inner edge must be an added token, or the text beside it could merge with
 * it. */
static bool
template_part(struct cc *c, enum sec sec, const char *s, size_t len, bool inner_end)
{
	int64_t n = tok_encode(c->t, s, len, TOK_SPECIAL, NULL, 0);
	uint32_t *ids, edge;
	size_t key;

	if (n <= 0)
		return n == 0;
	ids = grow(c, &c->sec[sec], (size_t)n * sizeof(*ids));
	if (!ids || tok_encode(c->t, s, len, TOK_SPECIAL, ids, (size_t)n) != n)
		return false;
	edge = ids[inner_end ? n - 1 : 0];
	key = c->entry[edge].len;
	return c->entry[edge].added && key <= len && !memcmp(inner_end ? s + len - key : s, c->entry[edge].s, key);
}

/* A loop that writes literal text, message['content'] and literal text: what the proof model has */
static bool
read_loop_template(struct cc *c, const char *s)
{
	static const char re_text[] = "^\\{%\\s*for\\s+message\\s+in\\s+messages\\s*%\\}((?:(?!\\{[{%#]).)*)"
				      "\\{\\{\\s*message(?:\\['content'\\]|\\[\"content\"\\]|\\.content)\\s*\\}\\}"
				      "((?:(?!\\{[{%#]).)*)\\{%\\s*endfor\\s*%\\}\\n?\\z";
	pcre2_code *re = re_new(re_text, sizeof(re_text) - 1, PCRE2_DOTALL, c->e);
	pcre2_match_data *md = re ? pcre2_match_data_create_from_pattern(re, NULL) : NULL;
	PCRE2_SIZE *ov;
	bool ok = false;
	size_t p, q, end;

	if (md && pcre2_match(re, (PCRE2_SPTR)s, strlen(s), 0, 0, md, NULL) > 0) {
		ov = pcre2_get_ovector_pointer(md);
		p = ov[2] +
		    (ov[2] < ov[3] &&
			s[ov[2]] == '\n'); /* Jinja's trim_blocks and lstrip_blocks, as chat templates are run */
		for (q = end = ov[5]; q > ov[4] && strchr(" \t", s[q - 1]); q--)
			;
		if (q > ov[4] && s[q - 1] == '\n')
			end = q;
		ok = template_part(c, S_TPRE, s + p, ov[3] - p, true) &&
		     template_part(c, S_TSUF, s + ov[4], end - ov[4], false);
	}
	pcre2_match_data_free(md);
	pcre2_code_free(re);
	return ok;
}

static void
read_template(struct cc *c)
{
	const char *s = c->rc ? NULL : chat_template(c);

	if (c->rc || !s)
		return;
	c->head.template = read_loop_template(c, s) ? T_PROOF : T_UNKNOWN;
	if (c->head.template == T_UNKNOWN)
		c->sec[S_TPRE].n = c->sec[S_TSUF].n = 0;
}

/* ---- putting it together ---- */

static json_t *
parse(struct cc *c, const char *name, const char *text, size_t n)
{
	json_error_t je;
	json_t *j = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &je);

	if (!j)
		FAIL(c, -EINVAL, "%s: line %d: %s", name, je.line, show(je.text));
	else if (!json_is_object(j))
		FAIL(c, -EINVAL, "%s: must be an object, it is %s", name, type_name(j));
	return j;
}

/* Writes the blob from what is there by now, and opens it: whatever this compiler makes has passed tok_open */
static void
link_blob(struct cc *c)
{
	uint64_t len = sizeof(c->head);

	if (c->rc)
		return;
	tok_free(&c->t);
	free(c->blob);
	for (int i = 0; i < S_COUNT; i++) {
		len = (len + 7) / 8 * 8;
		c->head.sec[i].off = len;
		c->head.sec[i].n = c->sec[i].n / sec_size[i];
		len += c->sec[i].n;
	}
	c->head.len = len;
	c->blob = calloc(1, len);
	if (!c->blob) {
		FAIL(c, -ENOMEM, "tokenizer: out of memory");
		return;
	}
	memcpy(c->blob, &c->head, sizeof(c->head));
	for (int i = 0; i < S_COUNT; i++)
		if (c->sec[i].n)
			memcpy(c->blob + c->head.sec[i].off, c->sec[i].p, c->sec[i].n);
	c->rc = tok_open(&c->t, c->blob, len, c->e);
	if (c->rc)
		err_prefix(c->e, "tokenizer.json");
}

/* An added token that is matched in normalised text stands for its normalised self, in both directions */
static void
normalize_key(struct cc *c, struct added *a)
{
	struct entry en = c->entry[a->id];
	struct span text;
	struct enc e;
	struct bytes b;

	enc_init(&e, c->t, en.len);
	b = normalize(&e, en.s, en.len);
	if (e.rc) {
		FAIL(c, e.rc, "tokenizer.json: cannot normalize the added token '%s'", show(en.s));
	} else if (!b.n) {
		BAD(c, "added token '%s' is empty once normalized", show(en.s));
	} else {
		a->key = add_span(c, b.p, b.n);
		en.s = b.p;
		en.len = (uint32_t)b.n;
		id_text(c, &en);
		text = add_span(c, c->key.p, c->key.n);
		memcpy(c->sec[S_TEXT].p + a->id * sizeof(text), &text, sizeof(text));
	}
	enc_clear(&e);
}

static void
normalize_keys(struct cc *c, struct buf *added)
{
	struct added *v = (struct added *)added->p;

	for (size_t i = 0; i < added->n / sizeof(*v) && !c->rc; i++)
		normalize_key(c, &v[i]);
	add(c, &c->sec[S_NORM], added->p, added->n);
	sort_added(c, S_NORM);
}

static void
compile(struct cc *c)
{
	struct buf norm;
	const char *v;

	if (has(c->root, "version") && (!(v = need_string(c, c->root, "", "version")) || strcmp(v, "1.0")))
		UNSUPPORTED(c, "version '%s' is not supported", v ? show(v) : "");
	read_model(c);
	read_added(c);
	each_part(c, json_object_get(c->root, "normalizer"), "normalizer", "normalizers", 0, read_normalizer);
	each_part(
	    c, json_object_get(c->root, "pre_tokenizer"), "pre_tokenizer", "pretokenizers", 0, read_pre_tokenizer);
	each_part(
	    c, json_object_get(c->root, "post_processor"), "post_processor", "processors", 0, read_post_processor);
	each_part(c, json_object_get(c->root, "decoder"), "decoder", "decoders", 0, read_decoder);
	check_decoder(c);
	read_eos(c);
	make_id_tables(c);
	make_vocab_table(c);
	sort_added(c, S_RAW);
	norm = c->sec[S_NORM];
	c->sec[S_NORM] = (struct buf){0};
	link_blob(c); /* now it can normalise */
	normalize_keys(c, &norm);
	free(norm.p);
	link_blob(c); /* now it can encode */
	read_template(c);
	link_blob(c);
}

int
tok_compile(const char *tokenizer_json, size_t n, const char *tokenizer_config_json, size_t n2, uint32_t vocab_size,
    void **blob, size_t *blob_len, struct err *e)
{
	struct cc c = {.e = e};

	*blob = NULL;
	*blob_len = 0;
	memcpy(c.head.magic, MAGIC, sizeof(c.head.magic));
	c.head.version = VERSION;
	c.head.vocab = vocab_size;
	c.head.unk = NONE;
	if (!vocab_size || vocab_size > MAX_VOCAB)
		return err_set(
		    e, -EINVAL, "tokenizer: a vocab_size of %u is not supported (1 to %u)", vocab_size, MAX_VOCAB);
	c.entry = calloc(vocab_size, sizeof(*c.entry));
	if (!c.entry)
		return err_set(e, -ENOMEM, "tokenizer: out of memory");
	c.root = parse(&c, "tokenizer.json", tokenizer_json, n);
	if (tokenizer_config_json && !c.rc)
		c.config = parse(&c, "tokenizer_config.json", tokenizer_config_json, n2);
	if (!c.rc)
		compile(&c);
	tok_free(&c.t);
	if (!c.rc) {
		*blob = c.blob;
		*blob_len = c.head.len;
	} else {
		free(c.blob);
	}
	for (int i = 0; i < S_COUNT; i++)
		free(c.sec[i].p);
	free(c.key.p);
	free(c.entry);
	json_decref(c.root);
	json_decref(c.config);
	return c.rc;
}

#endif
