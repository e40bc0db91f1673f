/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_TOK_BLOB_H
#define OCTET_TOK_BLOB_H
/*
 * tok-blob.h: how a tokenizer blob lies in memory, for the files tok*.c only: tok-compile.c writes it, tok.c checks it
 * and the others read it. Everything here is plain data or immutable after tok_open.
 */
#include <pcre2.h>
#include <string.h>

#include "tok.h"

#define MAGIC "octtok1"
#define VERSION 2u
#define NONE UINT32_MAX
#define MAX_VOCAB (1u << 24)
#define MAX_OPS 32u

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
	S_CHAT,   /* struct chat_item, by part: the chat template */
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
enum { A_SPECIAL = 1, A_LSTRIP = 2, A_RSTRIP = 4, A_WORD = 8, A_CONTROL = 16 }; /* control: the chat template writes it */
enum { F_BYTE_LEVEL = 1, F_BYTE_FALLBACK = 2, F_FUSE_UNK = 4, F_IGNORE_MERGES = 8, F_ALL = 15 };
enum { N_PREPEND, N_REPLACE, N_UNICODE, N_COUNT }; /* a; a -> b; arg: U_* */
enum { U_COMPOSE = 1, U_COMPAT = 2 };
enum { P_SPACE, P_META, P_REGEX, P_STRING, P_COUNT }; /* -; arg: M_*, a; arg: behaviour, a */
enum { M_ALWAYS, M_FIRST, M_NEVER };
enum { B_ISOLATED, B_REMOVED, B_CONTIGUOUS, B_PREVIOUS, B_NEXT, B_COUNT, B_INVERT = 16 };
enum template_kind { T_NONE, T_PROOF, T_CHATML, T_QWEN3, T_LLAMA3, T_LLAMA2, T_MISTRAL, T_ZEPHYR, T_UNKNOWN, T_COUNT };

/* The parts of a chat template, in the order of the S_CHAT section */
enum chat_part {
	C_BEGIN,
	C_SYS0, /* in place of a system message */
	C_SYS_PRE,
	C_SYS_POST,
	C_FOLD_PRE, /* around a system message that goes into a user's; text only */
	C_FOLD_POST,
	C_USER_PRE,
	C_USER_POST,
	C_ASST_PRE,
	C_ASST_POST,
	C_GENERATE,
	C_COUNT
};

#define CHAT_DATE (NONE - 1) /* an id: today as "26 Jul 2024" */

struct chat_item {
	uint32_t part, id; /* id NONE: text */
	struct span text;
};

enum {
	CF_SINGLE = 1,        /* one user message, no system message */
	CF_SYS_TURN = 2,      /* a system message is a turn of its own */
	CF_SYS_ANYWHERE = 4,  /* and may come later than first */
	CF_FOLD_FIRST = 8,    /* it goes into the first user message */
	CF_FOLD_LAST = 16,    /* it goes into the last message, if that is a user's */
	CF_ALTERNATE = 32,    /* user and assistant take turns, the user begins */
	CF_TRIM_SYS = 64,
	CF_TRIM_USER = 128,   /* with what is folded into it */
	CF_TRIM_ASST = 256,
	CF_NO_THOUGHTS = 512, /* what an assistant message has up to </think> is left out; the last message is a user's */
	CF_GENERATE = 1024,   /* always ends with C_GENERATE */
	CF_ALL = 2047
};

struct head {
	char magic[8];
	uint32_t version, flags; /* F_* */
	uint64_t len;
	uint32_t vocab, unk;       /* unk NONE: none */
	uint32_t template;         /* enum template_kind */
	uint32_t strip, strip_max; /* decoding drops up to strip_max bytes `strip` at the start */
	uint32_t chat;             /* CF_* */
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

extern const uint32_t tok_sec_size[S_COUNT];

static inline const void *
section(const struct head *h, enum sec s)
{
	return (const char *)h + h->sec[s].off;
}

static inline uint32_t
hash_pair(uint32_t a, uint32_t b)
{
	uint64_t x = ((uint64_t)a << 32 | b) * 0x9e3779b97f4a7c15u;

	x ^= x >> 29;
	return (uint32_t)((x * 0xbf58476d1ce4e5b9u) >> 32);
}

static inline uint32_t
hash_bytes(const char *s, size_t len)
{
	uint64_t x = 0xcbf29ce484222325u; /* FNV-1a */

	for (size_t i = 0; i < len; i++)
		x = (x ^ (unsigned char)s[i]) * 0x100000001b3u;
	return (uint32_t)(x ^ x >> 32);
}

/* GPT-2's table of a printable character for every byte */
static inline unsigned
byte_to_cp(unsigned b)
{
	if ((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174)
		return b;
	if (b <= 32)
		return 256 + b;
	return b == 173 ? 256 + 67 : 256 + 33 + (b - 127); /* 127..160 */
}

/* Bytes of the first character: 1 to 4; 0: its start, cut short; -1: not UTF-8. n > 0. */
int tok_utf8_step(const char *s, size_t n);
/* NULL with *e set where PCRE2 does not take it. The caller frees it. */
pcre2_code *tok_regex_new(const char *s, size_t len, uint32_t options, struct err *e);
/* A text through the normalizer; the caller frees *out. 0 or -errno. */
int tok_normalize(const struct tok *t, const char *s, size_t len, char **out, size_t *out_len);
/*
 * A run of chat text between two special tokens: as tok_encode without flags, but no special token and no token that
 * the chat template writes can come of it (-EINVAL where the vocabulary's own merges spell one). first: nothing came
 * before it.
 */
int64_t tok_encode_run(const struct tok *t, const char *s, size_t len, bool first, uint32_t *ids, size_t cap);
/* Bytes of white space that s begins or ends with, as Python's str.strip() sees it */
size_t tok_space_before(const char *s, size_t len);
size_t tok_space_after(const char *s, size_t len);
const char *tok_encode_error(int rc);

#endif
