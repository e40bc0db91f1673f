/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok.h: the tokenizer. octetd compiles a Hugging Face tokenizer.json once into a flat blob; octetd and every app open
 * that blob (apps map it read-only from a sealed memfd), so opening costs a bounds check and a regular expression,
 * never JSON.
 *
 * A struct tok is immutable after tok_open: any number of threads may use one. A tok_stream belongs to one thread at a
 * time. It does not pad, truncate, read files or know any model; `truncation` and `padding` in the file are ignored.
 *
 * Supported, everything else is refused by name:
 *   model          BPE (no dropout, no subword prefix or suffix), byte_fallback, fuse_unk, ignore_merges
 *   normalizer     Prepend, Replace (String), NFC, NFD, NFKC, NFKD, Sequence
 *   pre_tokenizer  ByteLevel, Split, Digits, Metaspace, Sequence (ByteLevel or Metaspace last)
 *   post_processor TemplateProcessing, ByteLevel, Sequence
 *   decoder        ByteLevel, Metaspace, Sequence of Replace, ByteFallback, Fuse, Strip in this order
 *
 * decode(encode(x)) == x for any bytes, with flags 0, except where the file's own rules lose text:
 *   - a normalizer or Metaspace that writes U+2581 for a space: U+2581 in the text comes back as a space;
 *   - Metaspace with a prepend_scheme other than "never": one leading space (or U+2581) of the text is lost;
 *   - ByteLevel with add_prefix_space: a space is put before text that has none, and stays;
 *   - NFC, NFD, NFKC, NFKD: the text comes back normalised; Split with behavior Removed: what it removes stays removed;
 *   - added tokens in the text: lstrip and rstrip eat white space, a normalized one comes back normalised, and text
 *     after one is normalised as a text of its own (SentencePiece prepends its U+2581 again);
 *   - a character that the vocabulary lacks, in a model without byte_fallback: it becomes unk_token or vanishes.
 */
#ifndef OCTET_TOK_H
#define OCTET_TOK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#include "err.h"

#define TOK_SPECIAL 1u /* tok_encode: recognise special tokens in the text (added tokens not special always are) */
#define TOK_BOS 2u     /* tok_encode: add what the post-processor adds around a single sequence */

#define TOK_SKIP_SPECIAL 1u /* tok_stream_new: special tokens give no text */
#define TOK_CONTINUE 2u /* tok_stream_new: the ids continue an earlier text, so a leading space is text and is kept */

struct tok;
struct tok_stream;

/*
 * Parses and checks a tokenizer.json (with tokenizer_config.json and chat_template.jinja) for a model of vocab_size ids and
 * makes a position-independent blob; the caller frees *blob with free(). -EINVAL: the file is wrong, -ENOTSUP: it asks
 * for something not supported, -ENOMEM; the message names the key.
 */
struct tok_source {
	const char *tokenizer, *config, *chat_template; /* the last two may be NULL. chat_template.jinja wins over config's */
	size_t tokenizer_len, config_len, chat_template_len;
};
int tok_compile_source(
    const struct tok_source *src, uint32_t vocab_size, void **blob, size_t *blob_len, struct err *e);
/* The same without a chat_template.jinja */
int tok_compile(const char *tokenizer_json, size_t n, const char *tokenizer_config_json, size_t n2, uint32_t vocab_size,
    void **blob, size_t *blob_len, struct err *e);

/*
 * Opens a blob, which is borrowed until tok_free, must be 8-byte aligned and must not change. Every offset and id in it
 * is checked here, so a wrong blob is refused (-EINVAL), or gives wrong tokens, but never reads outside of it.
 */
int tok_open(struct tok **t, const void *blob, size_t len, struct err *e);
void tok_free(struct tok **t);

/*
 * Text to ids. Any bytes are allowed: invalid UTF-8 becomes byte tokens. Returns the number of ids needed, which may
 * exceed cap (then nothing past cap is written; ids may be NULL when cap is 0), or -errno: -EINVAL unknown flags,
 * -ENOMEM, -E2BIG a text over 1 GiB, -EIO the file's regular expression gave up on this text.
 */
int64_t tok_encode(const struct tok *t, const char *text, size_t len, unsigned flags, uint32_t *ids, size_t cap);

/*
 * Ids to text, not terminated. Returns the bytes needed, which may exceed cap (then nothing past cap is written), or
 * -EINVAL for an id that is not below tok_vocab. An id without a piece gives no text. The text may be invalid UTF-8:
 * byte tokens come out as they are.
 */
int64_t tok_decode(const struct tok *t, const uint32_t *ids, size_t n, bool skip_special, char *out, size_t cap);

/*
 * The same one id at a time. push writes the text that is now complete: whole characters, or bytes that can no longer
 * become one; the start of an unfinished character waits for the next push or for flush. All that push and flush write,
 * put together, is what tok_decode gives. Returns the bytes written; if that is more than cap, nothing was written and
 * nothing consumed: call again with more room (tok_max_text bytes always suffice).
 */
int tok_stream_new(struct tok_stream **s, const struct tok *t, unsigned flags);
void tok_stream_free(struct tok_stream **s);
int64_t tok_stream_push(struct tok_stream *s, uint32_t id, char *out, size_t cap);
int64_t tok_stream_flush(
    struct tok_stream *s, char *out, size_t cap); /* the stream then starts over as a TOK_CONTINUE one */
size_t tok_max_text(const struct tok *t);

const char *tok_piece(
    const struct tok *t, uint32_t id, size_t *len); /* as the file spells it, not terminated; NULL: no such id */
const char *tok_text(
    const struct tok *t, uint32_t id, size_t *len); /* the bytes it decodes to, not terminated; NULL: no such id */
bool tok_is_special(const struct tok *t, uint32_t id);
uint32_t tok_vocab(const struct tok *t);      /* vocab_size of the model; ids at its end may have no piece */
uint32_t tok_n_eos(const struct tok *t);      /* ids that end a text: eos_token of tokenizer_config.json */
const uint32_t *tok_eos(const struct tok *t); /* [tok_n_eos] */

/*
 * A conversation through the model's chat template. What the template itself writes becomes the template's special
 * tokens; the messages are text: a special token that is spelled in one of them stays the letters it is spelled with
 * (Llama 2's [INST] is no special token but letters, which nobody can tell from letters in a message). Otherwise the
 * ids are those of the rendered text.
 */
enum tok_role { TOK_SYSTEM, TOK_USER, TOK_ASSISTANT };
struct tok_message {
	enum tok_role role;
	const char *text;
	size_t len;
};
enum tok_chat_kind {
	TOK_CHAT_NONE,    /* the model has no template */
	TOK_CHAT_UNKNOWN, /* it has one that is not known */
	TOK_CHAT_SINGLE,  /* one user message, no more */
	TOK_CHAT_TURNS
};
enum tok_chat_kind tok_chat_kind(const struct tok *t);
const char *tok_template_name(const struct tok *t); /* "none", "unknown" or a family: "chatml", "llama3", ... */
/*
 * generate: end with what comes before an answer. now: the day for a template that names it, in local time. Returns as
 * tok_encode does; -ENOTSUP no template or an unknown one, -EINVAL messages that this template does not take.
 */
int64_t tok_chat(const struct tok *t, const struct tok_message *m, size_t n, bool generate, time_t now, uint32_t *ids,
    size_t cap, struct err *e);
/* tok_chat of one user message, today. Without a template ("none") it is tok_encode with TOK_BOS. */
int64_t tok_template(const struct tok *t, const char *user_text, size_t len, uint32_t *ids, size_t cap, struct err *e);

/* For tests: the steps (symbols, heap and hash operations) of this thread's last tok_encode. */
uint64_t tok_last_work(void);

#endif
