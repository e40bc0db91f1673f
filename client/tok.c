/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok.c: the blob and its checks, lookups, and ids to text. Text to ids is in tok-encode.c, tokenizer.json to a blob in
 * tok-compile.c, which only octetd links. See tok.h.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tok-blob.h"

#include <errno.h>
#include <stdlib.h>

static const char *const template_names[T_COUNT] = {"none", "proof", "chatml", "qwen3", "llama3", "llama2", "mistral",
    "zephyr", "unknown"};
const uint32_t tok_sec_size[S_COUNT] = {
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
    [S_CHAT] = sizeof(struct chat_item),
};

/* Bytes of the first character: 1 to 4; 0: its start, cut short; -1: not UTF-8 (Unicode 15, table 3-7). n > 0. */
int
tok_utf8_step(const char *s, size_t n)
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
chat_ok(const struct head *h)
{
	const struct chat_item *v = section(h, S_CHAT);

	for (size_t i = 0; i < h->sec[S_CHAT].n; i++) {
		bool text = v[i].id == NONE;

		if (v[i].part >= C_COUNT || (i && v[i].part < v[i - 1].part) || (text && !span_ok(h, v[i].text)) ||
		    (!text && v[i].id != CHAT_DATE && v[i].id >= h->vocab))
			return false;
		if ((v[i].part == C_FOLD_PRE || v[i].part == C_FOLD_POST) && !text)
			return false;
	}
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
	    h->strip > 127 || h->chat & ~(uint32_t)CF_ALL)
		return false;
	if (h->unk != NONE && h->unk >= h->vocab)
		return false;
	for (int i = 0; i < 256; i++)
		if (h->byte_id[i] != NONE && h->byte_id[i] >= h->vocab)
			return false;
	for (int i = 0; i < S_COUNT; i++) {
		uint64_t off = h->sec[i].off;

		if (off % 8 || off < sizeof(*h) || off > len || h->sec[i].n > (len - off) / tok_sec_size[i])
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
	return ids_ok(h, S_PREFIX) && ids_ok(h, S_SUFFIX) && ids_ok(h, S_EOS) && chat_ok(h);
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

pcre2_code *
tok_regex_new(const char *s, size_t len, uint32_t options, struct err *e)
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
		t->re[i] = tok_regex_new(
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
		if (tok_utf8_step(tail + n - k, k) == 0)
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
