/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_TOK_COMPILE_H
#define OCTET_TOK_COMPILE_H
/*
 * tok-compile.h: what the files of the compiler share. octetd only, on one thread. Failures are noted once in
 * cc.rc and cc.e; after that every step does nothing.
 */
#include <jansson.h>

#include "tok-blob.h"

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
	char *jinja; /* chat_template.jinja, NULL: none */
	char *blob;
	struct tok *t; /* the blob as it is so far */
};

#define FAIL(c, code, ...) ((c)->rc = (c)->rc ? (c)->rc : err_set((c)->e, code, __VA_ARGS__))
#define BAD(c, ...) FAIL(c, -EINVAL, "tokenizer.json: " __VA_ARGS__)
#define UNSUPPORTED(c, ...) FAIL(c, -ENOTSUP, "tokenizer.json: " __VA_ARGS__)

/* A string of the file made fit for a message: short, no control characters. Lives until the eighth call after it. */
const char *tokc_show(const char *s);
void *tokc_grow(struct cc *c, struct buf *b, size_t len); /* room at the end for len bytes; NULL: failed */
void tokc_add(struct cc *c, struct buf *b, const void *s, size_t len);
void tokc_add_text(struct cc *c, struct buf *b, const char *s);

struct span tokc_add_span(struct cc *c, const char *s, size_t len);

/* Takes a chat template apart: head.template, head.chat, S_CHAT. Needs the added tokens. */
void tokc_template(struct cc *c, const char *template);

/* A regular expression of a pre_tokenizer, from Oniguruma's dialect (Ruby syntax) to PCRE2's, appended to out */
void tokc_regex(struct cc *c, const char *re, struct buf *out);

#endif
