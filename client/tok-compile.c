/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok-compile.c: tokenizer.json and tokenizer_config.json to a blob. octetd only: an app needs neither this nor
 * jansson. See tok.h.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tok-compile.h"

#include <errno.h>
#include <stdlib.h>
#include <utf8proc.h>

/* A string of the file made fit for a message: short, no control characters. The result lives until the eighth call
 * after it. */
const char *
tokc_show(const char *s)
{
	static _Thread_local char text[8][64];
	static _Thread_local unsigned turn;
	char *out = text[turn++ % 8];
	size_t n = 0;

	while (s[n]) {
		int k = tok_utf8_step(s + n, strlen(s + n));

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

void *
tokc_grow(struct cc *c, struct buf *b, size_t len)
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

void
tokc_add(struct cc *c, struct buf *b, const void *s, size_t len)
{
	void *p = len ? tokc_grow(c, b, len) : NULL;

	if (p)
		memcpy(p, s, len);
}

void
tokc_add_text(struct cc *c, struct buf *b, const char *s)
{
	tokc_add(c, b, s, strlen(s));
}

static void
add_id(struct cc *c, enum sec s, uint32_t id)
{
	tokc_add(c, &c->sec[s], &id, sizeof(id));
}

struct span
tokc_add_span(struct cc *c, const char *s, size_t len)
{
	struct span sp = {(uint32_t)c->sec[S_STR].n, (uint32_t)len};

	if (c->sec[S_STR].n + len > UINT32_MAX - 1)
		BAD(c, "more than 4 GiB of strings");
	else
		tokc_add(c, &c->sec[S_STR], s, len);
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
		BAD(c, "%s%s%s is missing", where, *where ? "." : "", tokc_show(key));
		return NULL;
	}
	if (type == JSON_TRUE ? !json_is_boolean(j) : json_typeof(j) != type) {
		BAD(c, "%s%s%s must be %s, it is %s", where, *where ? "." : "", tokc_show(key), wanted_name(type),
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
		BAD(c, "id %u is used twice, by '%s' and '%s'", id, tokc_show(en->s), tokc_show(s));
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

		snprintf(what, sizeof(what), "model.vocab['%s']", tokc_show(key));
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
	tokc_add(c, &c->key, part[0], len[0]);
	tokc_add(c, &c->key, part[1], len[1]);
	tokc_add(c, &c->key, "", 1);
	if (c->rc)
		return;
	m.id = vocab_id(c, c->key.p, c->key.n - 1);
	if (m.a == NONE || m.b == NONE)
		BAD(c, "model.merges[%zu]: its %s part is not in the vocab", i, m.a == NONE ? "first" : "second");
	else if (m.id == NONE)
		BAD(c, "model.merges[%zu]: its result '%s' is not in the vocab", i, tokc_show(c->key.p));
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

	m = merges ? tokc_grow(c, &c->sec[S_MERGE], cap * sizeof(*m)) : NULL;
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
		UNSUPPORTED(c, "model type '%s' is not supported", tokc_show(type));
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
			BAD(c, "model.unk_token '%s' is not in the vocab", tokc_show(s));
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

	o.a = tokc_add_span(c, a, a_len);
	o.b = tokc_add_span(c, b, strlen(b));
	tokc_add(c, &c->sec[s], &o, sizeof(o));
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
		UNSUPPORTED(c, "normalizer type '%s' is not supported", tokc_show(type));
	}
}

static void
add_regex(struct cc *c, const char *re, uint32_t how)
{
	struct buf out = {0};

	tokc_regex(c, re, &out);
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
		UNSUPPORTED(c, "pre_tokenizer Split behavior '%s' is not supported", tokc_show(behavior));
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
		UNSUPPORTED(c, "%s Metaspace prepend_scheme '%s' is not supported", where, tokc_show(s));
	return M_NEVER;
}

static const char *
metaspace_sign(struct cc *c, const json_t *j, const char *where)
{
	const char *s = need_string(c, j, where, "replacement");

	if (s && (!*s || (size_t)tok_utf8_step(s, strlen(s)) != strlen(s)))
		BAD(c, "%s.replacement must be one character", where);
	return c->rc ? NULL : s;
}

static void
read_pre_tokenizer(struct cc *c, const json_t *j, const char *where, const char *type)
{
	static const char gpt2[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
	const char *s;

	if (c->head.flags & F_BYTE_LEVEL) {
		UNSUPPORTED(c, "pre_tokenizer '%s' after ByteLevel is not supported", tokc_show(type));
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
		UNSUPPORTED(c, "pre_tokenizer type '%s' is not supported", tokc_show(type));
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
		UNSUPPORTED(c, "decoder '%s' in this place is not supported", tokc_show(type));
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
		UNSUPPORTED(c, "decoder type '%s' is not supported", tokc_show(type));
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

		tokc_add(c, out, &id, sizeof(id));
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
		UNSUPPORTED(c, "post_processor type '%s' is not supported", tokc_show(type));
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
	tokc_add(c, &c->sec[S_PREFIX], side[0].p, side[0].n);
	tokc_add(c, &c->sec[S_SUFFIX], side[1].p, side[1].n);
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
		BAD(c, "%s: '%s' has id %u, in model.vocab it has %u", where, tokc_show(s), a.id, vocab_id(c, s, strlen(s)));
	add_entry(c, a.id, s);
	if (c->entry[a.id].added)
		BAD(c, "%s: '%s' is there twice", where, tokc_show(s));
	c->entry[a.id].added = true;
	c->entry[a.id].special = a.flags & A_SPECIAL;
	a.key = tokc_add_span(c, s, strlen(s));
	tokc_add(c, &c->sec[sec], &a, sizeof(a));
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
		tokc_add(c, &c->key, &b, 1);
	}
	return true;
}

static void
replace_into(struct cc *c, const char *s, size_t len)
{
	struct buf tmp = {0};

	c->key.n = 0;
	tokc_add(c, &c->key, s, len);
	for (size_t r = 0; r < c->n_rep && !c->rc; r++) {
		const char *a = c->rep[r][0], *p, *hit;
		size_t left;

		tmp.n = 0;
		tokc_add(c, &tmp, c->key.p, c->key.n);
		p = tmp.p;
		left = tmp.n;
		c->key.n = 0;
		while (left && (hit = memmem(p, left, a, strlen(a)))) {
			tokc_add(c, &c->key, p, (size_t)(hit - p));
			tokc_add_text(c, &c->key, c->rep[r][1]);
			left -= (size_t)(hit - p) + strlen(a);
			p = hit + strlen(a);
		}
		tokc_add(c, &c->key, p, left);
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
		tokc_add(c, &c->key, &b, 1);
	} else if (!c->dec_byte_level) {
		replace_into(c, en->s, en->len);
	} else if (en->added || !unmap_bytes(c, en->s, en->len)) {
		c->key.n = 0;
		tokc_add(c, &c->key, en->s, en->len);
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
			piece = text = tokc_add_span(c, en->s, en->len);
			id_text(c, en);
			if (!c->rc && (c->key.n != en->len || memcmp(c->key.p, en->s, en->len)))
				text = tokc_add_span(c, c->key.p, c->key.n);
		}
		tokc_add(c, &c->sec[S_PIECE], &piece, sizeof(piece));
		tokc_add(c, &c->sec[S_TEXT], &text, sizeof(text));
		tokc_add(c, &c->sec[S_IDFLAG], &flag, sizeof(flag));
	}
}

static void
make_vocab_table(struct cc *c)
{
	size_t cap = table_size(json_object_size(c->vocab));
	uint32_t *v = c->rc ? NULL : tokc_grow(c, &c->sec[S_VOCAB], cap * sizeof(*v));

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
		FAIL(c, -EINVAL, "tokenizer_config.json: eos_token '%s' is not in the vocab", tokc_show(s));
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

static void
read_template(struct cc *c, const struct tok_source *src)
{
	const char *s = c->rc ? NULL : src->chat_template ? c->jinja : chat_template(c);

	if (!c->rc && s)
		tokc_template(c, s);
}

/* ---- putting it together ---- */

static json_t *
parse(struct cc *c, const char *name, const char *text, size_t n)
{
	json_error_t je;
	json_t *j = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &je);

	if (!j)
		FAIL(c, -EINVAL, "%s: line %d: %s", name, je.line, tokc_show(je.text));
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
		c->head.sec[i].n = c->sec[i].n / tok_sec_size[i];
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
	char *s;
	size_t n;
	int rc = tok_normalize(c->t, en.s, en.len, &s, &n);

	if (rc) {
		FAIL(c, rc, "tokenizer.json: cannot normalize the added token '%s'", tokc_show(en.s));
	} else if (!n) {
		BAD(c, "added token '%s' is empty once normalized", tokc_show(en.s));
	} else {
		a->key = tokc_add_span(c, s, n);
		en.s = s;
		en.len = (uint32_t)n;
		id_text(c, &en);
		text = tokc_add_span(c, c->key.p, c->key.n);
		memcpy(c->sec[S_TEXT].p + a->id * sizeof(text), &text, sizeof(text));
	}
	free(s);
}

static void
normalize_keys(struct cc *c, struct buf *added)
{
	struct added *v = (struct added *)added->p;

	for (size_t i = 0; i < added->n / sizeof(*v) && !c->rc; i++)
		normalize_key(c, &v[i]);
	tokc_add(c, &c->sec[S_NORM], added->p, added->n);
	sort_added(c, S_NORM);
}

static void
compile(struct cc *c, const struct tok_source *src)
{
	struct buf norm;
	const char *v;

	if (has(c->root, "version") && (!(v = need_string(c, c->root, "", "version")) || strcmp(v, "1.0")))
		UNSUPPORTED(c, "version '%s' is not supported", v ? tokc_show(v) : "");
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
	read_template(c, src);
	link_blob(c);
}

static int
read_jinja(struct cc *c, const struct tok_source *src)
{
	if (!src->chat_template)
		return 0;
	c->jinja = strndup(src->chat_template, src->chat_template_len);
	return c->jinja ? 0 : FAIL(c, -ENOMEM, "tokenizer: out of memory");
}

int
tok_compile_source(const struct tok_source *src, uint32_t vocab_size, void **blob, size_t *blob_len, struct err *e)
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
	c.root = parse(&c, "tokenizer.json", src->tokenizer, src->tokenizer_len);
	if (src->config && !c.rc)
		c.config = parse(&c, "tokenizer_config.json", src->config, src->config_len);
	if (!c.rc && !read_jinja(&c, src))
		compile(&c, src);
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
	free(c.jinja);
	json_decref(c.root);
	json_decref(c.config);
	return c.rc;
}

int
tok_compile(const char *tokenizer_json, size_t n, const char *tokenizer_config_json, size_t n2, uint32_t vocab_size,
    void **blob, size_t *blob_len, struct err *e)
{
	struct tok_source src = {.tokenizer = tokenizer_json, .tokenizer_len = n, .config = tokenizer_config_json,
	    .config_len = n2};

	return tok_compile_source(&src, vocab_size, blob, blob_len, e);
}
