/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok-chat.c: a conversation to ids, by the chat template that the compiler took apart (tok-template.c). See tok.h.
 *
 * The template's special tokens go out as ids. What lies between two of them, words of the template and of the
 * messages, is one run of text and is tokenized as one: "user\n" and "\nhi" may merge at their seam.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tok-blob.h"

#include <errno.h>
#include <stdlib.h>

struct chat {
	const struct tok *t;
	struct err *e;
	int rc; /* the first failure */
	uint32_t *ids;
	size_t cap;
	int64_t n;
	char *run, *msg; /* text since the last id; a message with what is folded into it */
	size_t run_len, run_cap, msg_len, msg_cap;
	time_t now;
};

struct text {
	const char *s;
	size_t len;
};

static void
append(struct chat *c, char **buf, size_t *len, size_t *cap, const char *s, size_t n)
{
	size_t want = (*len + n) * 2 + 64;
	char *p;

	if (c->rc || !n)
		return;
	if (*len + n > *cap) {
		p = realloc(*buf, want);
		if (!p) {
			c->rc = err_set(c->e, -ENOMEM, "chat: out of memory");
			return;
		}
		*buf = p;
		*cap = want;
	}
	memcpy(*buf + *len, s, n);
	*len += n;
}

static void
put_text(struct chat *c, struct text x)
{
	append(c, &c->run, &c->run_len, &c->run_cap, x.s, x.len);
}

static void
end_run(struct chat *c)
{
	size_t at = (uint64_t)c->n < c->cap ? (size_t)c->n : c->cap;
	int64_t n;

	if (c->rc || !c->run_len)
		return;
	n = tok_encode_run(c->t, c->run, c->run_len, c->n == 0, c->ids ? c->ids + at : NULL, c->cap - at);
	c->run_len = 0;
	if (n < 0)
		c->rc = err_set(c->e, (int)n, "cannot tokenize this text: %s", tok_encode_error((int)n));
	else
		c->n += n;
}

static void
put_id(struct chat *c, uint32_t id)
{
	end_run(c);
	if (c->rc)
		return;
	if (c->ids && (uint64_t)c->n < c->cap)
		c->ids[c->n] = id;
	c->n++;
}

/* "26 Jul 2024": English whatever the locale is */
static void
put_date(struct chat *c)
{
	static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
	char text[40];
	struct tm tm;

	if (!localtime_r(&c->now, &tm))
		memset(&tm, 0, sizeof(tm));
	snprintf(text, sizeof(text), "%02d %.3s %d", tm.tm_mday, months + 3 * (tm.tm_mon % 12), tm.tm_year + 1900);
	put_text(c, (struct text){text, strlen(text)});
}

static void
put_part(struct chat *c, enum chat_part part)
{
	const struct chat_item *v = section(c->t->h, S_CHAT);

	for (size_t i = 0; i < c->t->h->sec[S_CHAT].n; i++) {
		if (v[i].part != part)
			continue;
		if (v[i].id == NONE)
			put_text(c, (struct text){c->t->str + v[i].text.off, v[i].text.len});
		else if (v[i].id == CHAT_DATE)
			put_date(c);
		else
			put_id(c, v[i].id);
	}
}

/* The text of a part of text only, put into msg */
static void
fold_part(struct chat *c, enum chat_part part)
{
	const struct chat_item *v = section(c->t->h, S_CHAT);

	for (size_t i = 0; i < c->t->h->sec[S_CHAT].n; i++)
		if (v[i].part == part)
			append(c, &c->msg, &c->msg_len, &c->msg_cap, c->t->str + v[i].text.off, v[i].text.len);
}

static struct text
trim(struct text x, bool yes)
{
	size_t k = yes ? tok_space_before(x.s, x.len) : 0;

	x.s += k;
	x.len -= k;
	x.len -= yes ? tok_space_after(x.s, x.len) : 0;
	return x;
}

/* What follows the last </think>, without the lines that it leaves empty */
static struct text
after_thoughts(struct text x)
{
	static const char end[] = "</think>";
	const char *hit, *from = x.s;
	size_t left = x.len;

	while ((hit = left ? memmem(from, left, end, sizeof(end) - 1) : NULL)) {
		from = hit + sizeof(end) - 1;
		left = (size_t)(x.s + x.len - from);
	}
	while (from != x.s && left && *from == '\n') {
		from++;
		left--;
	}
	return (struct text){from, left};
}

static void
put_turn(struct chat *c, const struct tok_message *m, enum chat_part pre, uint32_t trims)
{
	struct text x = {m->text, m->len};

	if (m->role == TOK_ASSISTANT && (c->t->h->chat & CF_NO_THOUGHTS))
		x = after_thoughts(x);
	put_part(c, pre);
	put_text(c, trim(x, c->t->h->chat & trims));
	put_part(c, pre + 1);
}

/* A user message with the system message in it */
static void
put_folded(struct chat *c, const struct tok_message *sys, const struct tok_message *m)
{
	c->msg_len = 0;
	fold_part(c, C_FOLD_PRE);
	append(c, &c->msg, &c->msg_len, &c->msg_cap, sys->text, sys->len);
	fold_part(c, C_FOLD_POST);
	append(c, &c->msg, &c->msg_len, &c->msg_cap, m->text, m->len);
	put_turn(c, &(struct tok_message){TOK_USER, c->msg, c->msg_len}, C_USER_PRE, CF_TRIM_USER);
}

/* What this template does not take, NULL if it takes all of it */
static const char *
objection(uint32_t flags, const struct tok_message *m, size_t n)
{
	size_t first = n && m[0].role == TOK_SYSTEM;

	if (!n)
		return "there is no message";
	if (flags & CF_SINGLE)
		return n > 1 || m[0].role != TOK_USER ? "this model's chat template takes one user message and no more" : NULL;
	if (first && !(flags & (CF_SYS_TURN | CF_FOLD_FIRST | CF_FOLD_LAST)))
		return "this model's chat template takes no system message";
	if (first && n == 1 && (flags & (CF_FOLD_FIRST | CF_FOLD_LAST)))
		return "this model's chat template takes a system message only with a user's";
	for (size_t i = first; i < n; i++) {
		if ((unsigned)m[i].role > TOK_ASSISTANT)
			return "a message has a role that is none";
		if (m[i].role == TOK_SYSTEM && !(flags & CF_SYS_ANYWHERE))
			return "this model's chat template takes a system message only at the beginning";
		if ((flags & CF_ALTERNATE) && (m[i].role == TOK_USER) != ((i - first) % 2 == 0))
			return "in this model's chat template user and assistant take turns, the user begins";
	}
	if ((flags & CF_NO_THOUGHTS) && m[n - 1].role == TOK_ASSISTANT)
		return "in this model's chat template the last message cannot be the assistant's";
	return NULL;
}

static void
put_messages(struct chat *c, const struct tok_message *m, size_t n)
{
	uint32_t flags = c->t->h->chat;
	size_t first = m[0].role == TOK_SYSTEM;

	put_part(c, C_BEGIN);
	if (!first)
		put_part(c, C_SYS0);
	else if (flags & CF_SYS_TURN)
		put_turn(c, &m[0], C_SYS_PRE, CF_TRIM_SYS);
	for (size_t i = first; i < n && !c->rc; i++) {
		bool fold = first && (((flags & CF_FOLD_FIRST) && i == first) || ((flags & CF_FOLD_LAST) && i == n - 1));

		if (m[i].role == TOK_SYSTEM)
			put_turn(c, &m[i], C_SYS_PRE, CF_TRIM_SYS);
		else if (m[i].role == TOK_ASSISTANT)
			put_turn(c, &m[i], C_ASST_PRE, CF_TRIM_ASST);
		else if (fold)
			put_folded(c, &m[0], &m[i]);
		else
			put_turn(c, &m[i], C_USER_PRE, CF_TRIM_USER);
	}
}

int64_t
tok_chat(const struct tok *t, const struct tok_message *m, size_t n, bool generate, time_t now, uint32_t *ids,
    size_t cap, struct err *e)
{
	struct chat c = {.t = t, .e = e, .ids = ids, .cap = ids ? cap : 0, .now = now};
	const char *why;

	if (t->h->template == T_NONE)
		return err_set(e, -ENOTSUP, "this model has no chat template: use --raw and write the whole prompt");
	if (t->h->template == T_UNKNOWN)
		return err_set(e, -ENOTSUP,
		    "this model's chat template is not one that octet knows: use --raw and write the whole prompt");
	why = objection(t->h->chat, m, n);
	if (why)
		return err_set(e, -EINVAL, "%s", why);
	put_messages(&c, m, n);
	if (generate || (t->h->chat & CF_GENERATE))
		put_part(&c, C_GENERATE);
	end_run(&c);
	free(c.run);
	free(c.msg);
	return c.rc ? c.rc : c.n;
}

int64_t
tok_template(const struct tok *t, const char *user_text, size_t len, uint32_t *ids, size_t cap, struct err *e)
{
	int64_t n;

	if (t->h->template != T_NONE)
		return tok_chat(t, &(struct tok_message){TOK_USER, user_text, len}, 1, true, time(NULL), ids, cap, e);
	n = tok_encode(t, user_text, len, TOK_BOS, ids, cap);
	return n < 0 ? err_set(e, (int)n, "cannot tokenize this text: %s", tok_encode_error((int)n)) : n;
}

enum tok_chat_kind
tok_chat_kind(const struct tok *t)
{
	switch (t->h->template) {
	case T_NONE:
		return TOK_CHAT_NONE;
	case T_UNKNOWN:
		return TOK_CHAT_UNKNOWN;
	default:
		return t->h->chat & CF_SINGLE ? TOK_CHAT_SINGLE : TOK_CHAT_TURNS;
	}
}
