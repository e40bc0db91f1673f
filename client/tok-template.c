/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok-template.c: which chat template a model has. octetd only. This is no Jinja: the template is brought into a
 * canonical form (canonical()) that has to match a known family from its first to its last character, but for the
 * branches about tools, which octet never takes. What matches gives the parts that tok-chat.c puts together.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tok-compile.h"

#include <errno.h>
#include <stdlib.h>

/* ---- the canonical form ---- */

/*
 * Jinja as chat templates are run: trim_blocks, lstrip_blocks. Tags keep no white space and no "-", comments go, text
 * becomes {{'text'}}, {{a}}{{b}} becomes {{a+b}}, 'a'+'b' becomes 'ab', x['y'] becomes x.y, quotes are single.
 */
struct canon {
	struct cc *c;
	struct buf out;
	size_t str_end; /* offset behind the last string literal */
	size_t tag;     /* offset behind the last "}}" that may be continued */
};

static bool
ends_with(const struct canon *k, const char *s)
{
	size_t n = strlen(s);

	return k->out.n >= n && !memcmp(k->out.p + k->out.n - n, s, n);
}

static void
canon_string(struct canon *k, const char *s, size_t len)
{
	if (k->out.n && k->str_end == k->out.n - 1 && ends_with(k, "'+"))
		k->out.n -= 2;
	else
		tokc_add(k->c, &k->out, "'", 1);
	for (size_t i = 0; i < len; i++) {
		if (s[i] == '\n')
			tokc_add_text(k->c, &k->out, "\\n");
		else if (s[i] == '\'' || s[i] == '\\')
			tokc_add(k->c, &k->out, (char[]){'\\', s[i]}, 2);
		else
			tokc_add(k->c, &k->out, s + i, 1);
	}
	tokc_add(k->c, &k->out, "'", 1);
	k->str_end = k->out.n;
}

static void
canon_open(struct canon *k)
{
	if (k->tag && k->tag == k->out.n && ends_with(k, "}}")) {
		k->out.n -= 2;
		tokc_add(k->c, &k->out, "+", 1);
	} else {
		tokc_add_text(k->c, &k->out, "{{");
	}
}

static void
canon_close(struct canon *k)
{
	tokc_add_text(k->c, &k->out, "}}");
	k->tag = k->out.n;
}

static void
canon_text(struct canon *k, const char *s, size_t len)
{
	if (!len)
		return;
	canon_open(k);
	canon_string(k, s, len);
	canon_close(k);
}

static bool
is_name(const char *s, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (!((s[i] >= 'a' && s[i] <= 'z') || (s[i] >= 'A' && s[i] <= 'Z') || s[i] == '_'))
			return false;
	return len > 0;
}

/* A string literal; s is behind its quote. Returns what follows it, NULL: it does not end. */
static const char *
canon_literal(struct canon *k, const char *s, const char *end, char quote)
{
	char *text = malloc((size_t)(end - s) + 1);
	size_t n = 0;

	for (; text && s < end && *s != quote; s++) {
		if (*s == '\\' && s + 1 < end) {
			s++;
			if (*s == 'n' || *s == 't')
				text[n++] = *s == 'n' ? '\n' : '\t';
			else if (*s == '\\' || *s == '\'' || *s == '"')
				text[n++] = *s;
			else
				break; /* an escape that no known template has */
		} else {
			text[n++] = *s;
		}
	}
	if (!text || s >= end || *s != quote) {
		s = NULL;
	} else {
		s++;
		while (s < end && strchr(" \t\n", *s))
			s++;
		if (s < end && *s == ']' && ends_with(k, "[") && k->out.n > 1 && is_name(text, n) &&
		    (strchr("])", k->out.p[k->out.n - 2]) || is_name(k->out.p + k->out.n - 2, 1))) {
			k->out.p[k->out.n - 1] = '.';
			tokc_add(k->c, &k->out, text, n);
			s++;
		} else {
			canon_string(k, text, n);
		}
	}
	free(text);
	return s;
}

/* The inside of a tag; false: it is not understood */
static bool
canon_tag(struct canon *k, const char *s, const char *end)
{
	while (s && s < end) {
		if (*s == '\'' || *s == '"')
			s = canon_literal(k, s + 1, end, *s);
		else if (strchr(" \t\r\n", *s))
			s++;
		else
			tokc_add(k->c, &k->out, s++, 1);
	}
	return s != NULL;
}

/* The end of a tag that begins at s: strings may hold "}}" */
static const char *
tag_end(const char *s, const char *close, bool strings)
{
	char quote = 0;

	for (; *s; s++) {
		if (quote) {
			if (*s == '\\' && s[1])
				s++;
			else if (*s == quote)
				quote = 0;
		} else if (!strncmp(s, close, 2)) {
			return s;
		} else if (strings && (*s == '\'' || *s == '"')) {
			quote = *s;
		}
	}
	return NULL;
}

static const char *
next_tag(const char *s)
{
	while (*s && !(*s == '{' && strchr("{%#", s[1]) && s[1]))
		s++;
	return s;
}

/* The text in front of a tag (or of the end) at `to`, without what the tags on both sides take */
static void
canon_data(struct canon *k, const char *s, const char *to, char before, bool trimmed, bool *line)
{
	const char *from = s, *nl;
	bool last = !*to;

	if (trimmed) {
		while (from < to && strchr(" \t\r\n", *from))
			from++;
	} else if (before == '%' || before == '#') {
		*line = from < to && *from == '\n';
		from += *line;
	} else if (before) {
		*line = false;
	}
	if (last) { /* Jinja drops the newline at a template's end */
		to -= to > from && to[-1] == '\n';
	} else if (to[2] == '-') {
		while (to > from && strchr(" \t\r\n", to[-1]))
			to--;
	} else if (to[1] != '{' && to[2] != '+') {
		for (nl = to; nl > from && strchr(" \t", nl[-1]); nl--)
			;
		if (nl > from ? nl[-1] == '\n' : *line)
			to = nl;
	}
	canon_text(k, from, (size_t)(to - from));
}

static bool
canonical(struct cc *c, const char *s, struct buf *out)
{
	struct canon k = {.c = c, .str_end = SIZE_MAX};
	char before = 0;
	bool trimmed = false, line = true, ok = true;

	while (ok && *s && !c->rc) {
		const char *tag = next_tag(s), *from, *end;
		char kind = tag[0] ? tag[1] : 0, close[3] = {kind == '{' ? '}' : kind, '}', 0};

		canon_data(&k, s, tag, before, trimmed, &line);
		if (!kind)
			break;
		from = tag + 2 + (tag[2] == '-' || tag[2] == '+');
		end = tag_end(from, close, kind != '#');
		if (!end)
			ok = false;
		else if (kind != '#') {
			trimmed = end > from && end[-1] == '-';
			if (kind == '{')
				canon_open(&k);
			else
				tokc_add_text(c, &k.out, "{%");
			ok = canon_tag(&k, from, end - trimmed);
			if (kind == '{')
				canon_close(&k);
			else
				tokc_add_text(c, &k.out, "%}");
		} else {
			trimmed = end > from && end[-1] == '-';
		}
		before = kind;
		s = end ? end + 2 : s;
	}
	*out = k.out;
	tokc_add(c, out, "", 1);
	return ok && !c->rc;
}

/* ---- the families ---- */

#define Q(s) "\\Q" s "\\E"
#define TEXT "(?:[^'\\\\]|\\\\.)*?"
#define GAP ".*?"
#define TAGS "(?:\\{%(?:(?!%\\}).)*%\\})*?" /* statements that write nothing */
#define NO_GENERATE                                                                                                    \
	"(?:" Q("{%ifnotadd_generation_promptisdefined%}{%setadd_generation_prompt=") "[fF]" Q("alse%}{%endif%}") ")?"
#define BOS "(?<bos>" Q("{{bos_token}}") ")?"
#define IM_SYSTEM Q("{{'<|im_start|>system\\n") "(?<sys>" TEXT ")" Q("<|im_end|>\\n'}}")
#define IM_GENERATE Q("{%ifadd_generation_prompt%}{{'<|im_start|>assistant\\n'}}{%endif%}")
#define L3(role, newline) "<|start_header_id|>" role "<|end_header_id|>" newline newline
#define L3_GENERATE "'" L3("assistant", "\\n") "'}}"
#define ALTERNATE(index)                                                                                               \
	Q("{%if(message.role=='user')!=(" index "%2==0)%}{{raise_exception('") TEXT Q("')}}{%endif%}")
#define SYSTEM_APART                                                                                                   \
	Q("{%ifmessages[0].role=='system'%}{%setsystem_message=messages[0].content%}{%setloop_messages=messages[1:]%}"  \
	  "{%else%}{%setloop_messages=messages%}{%endif%}")
#define REFUSE Q("{%else%}{{raise_exception('") TEXT Q("')}}{%endif%}{%endfor%}")
#define ASSISTANT "(?:'(?<apre> )'\\+)?message\\.content(?<atrim>\\|trim)?\\+eos_token(?:\\+'(?<apost> )')?"

/*
 * Parts: %b and %e are the text of bos_token and eos_token, %d today's date, %D the date that the template has, and
 * others name a group of the pattern: %s sys, %u upre, %v upost, %a apre, %c apost. A part with an unset %s is empty.
 */
static const struct family {
	enum template_kind kind;
	uint32_t flags; /* and by groups: trim, atrim, always */
	const char *re;
	const char *part[C_COUNT];
} families[] = {
    {T_PROOF, CF_SINGLE,
	Q("{%formessageinmessages%}{{") "(?:'(?<upre>" TEXT ")'\\+)?" Q("message.content") "(?:\\+'(?<upost>" TEXT
						  ")')?" Q("}}{%endfor%}"),
	{[C_USER_PRE] = "%u", [C_USER_POST] = "%v"}},
    {T_CHATML, CF_SYS_TURN | CF_SYS_ANYWHERE,
	NO_GENERATE BOS "(?:" Q("{%ifmessages[0].role!='system'%}") IM_SYSTEM Q("{%endif%}") ")?" Q(
	    "{%formessageinmessages%}") "(?:" Q("{%ifloop.firstandmessages[0].role!='system'%}") IM_SYSTEM
	    Q("{%endif%}") ")?" Q("{{'<|im_start|>'+message.role+'\\n'+message.content") "(?<trim>\\|trim)?" Q(
		"+'<|im_end|>\\n'}}{%endfor%}") IM_GENERATE,
	{"%b", "<|im_start|>system\n%s<|im_end|>\n", "<|im_start|>system\n", "<|im_end|>\n", "", "",
	    "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_start|>assistant\n"}},
    {T_CHATML, CF_SYS_TURN | CF_SYS_ANYWHERE,
	Q("{%iftools%}") GAP Q("{%else%}{%ifmessages[0].role=='system'%}{{'<|im_start|>system\\n'+messages[0].content+"
			       "'<|im_end|>\\n'}}{%else%}") IM_SYSTEM Q("{%endif%}{%endif%}{%formessageinmessages%}"
	    "{%if(message.role=='user')or(message.role=='system'andnotloop.first)or(message.role=='assistant'and"
	    "notmessage.tool_calls)%}{{'<|im_start|>'+message.role+'\\n'+message.content+'<|im_end|>\\n'}}{%elif") GAP
	    Q("{%endfor%}") IM_GENERATE,
	{"", "<|im_start|>system\n%s<|im_end|>\n", "<|im_start|>system\n", "<|im_end|>\n", "", "",
	    "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_start|>assistant\n"}},
    {T_QWEN3, CF_SYS_TURN | CF_SYS_ANYWHERE | CF_NO_THOUGHTS,
	Q("{%iftools%}") GAP Q("{%else%}{%ifmessages[0].role=='system'%}{{'<|im_start|>system\\n'+messages[0].content+"
	    "'<|im_end|>\\n'}}{%endif%}{%endif%}{%setns=namespace(multi_step_tool=true,last_query_index=messages|length-1)%}") TAGS
	    Q("{%formessageinmessages%}") TAGS Q("{%if(message.role=='user')or(message.role=='system'andnotloop.first)%}"
	    "{{'<|im_start|>'+message.role+'\\n'+") "(?:message\\.)?" Q("content+'<|im_end|>\\n'}}"
	    "{%elifmessage.role=='assistant'%}") TAGS "(?:\\{%setcontent=)(?:message\\.)?" Q("content.split('</think>')[-1].lstrip('\\n')%}") GAP
	    Q("{%else%}{{'<|im_start|>'+message.role+'\\n'+content}}{%endif%}") GAP Q("{{'<|im_end|>\\n'}}") GAP
	    Q("{%endfor%}{%ifadd_generation_prompt%}{{'<|im_start|>assistant\\n'}}") "(?:" Q(
		"{%ifenable_thinkingisdefinedandenable_thinkingisfalse%}{{'<think>\\n\\n</think>\\n\\n'}}{%endif%}") ")?" Q(
		"{%endif%}"),
	{"", "", "<|im_start|>system\n", "<|im_end|>\n", "", "", "<|im_start|>user\n", "<|im_end|>\n",
	    "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_start|>assistant\n"}},
    {T_LLAMA3, CF_SYS_TURN | CF_SYS_ANYWHERE | CF_TRIM_SYS | CF_TRIM_USER | CF_TRIM_ASST,
	"(?:" Q("{%setloop_messages=messages%}{%formessageinloop_messages%}") "|" Q("{%formessageinmessages%}") ")" Q(
	    "{%setcontent='<|start_header_id|>'+message.role+'<|end_header_id|>\\n\\n'+message.content|trim+'<|eot_id|>'%}"
	    "{%ifloop.index0==0%}{%setcontent=bos_token+content%}{%endif%}{{content}}{%endfor%}") "(?:" Q(
	    "{%ifadd_generation_prompt%}{{" L3_GENERATE "{%endif%}") "|(?<always>" Q("{{" L3_GENERATE) "))",
	{"%b", "", L3("system", "\n"), "<|eot_id|>", "", "", L3("user", "\n"), "<|eot_id|>", L3("assistant", "\n"), "<|eot_id|>",
	    L3("assistant", "\n")}},
    {T_LLAMA3, CF_SYS_TURN | CF_TRIM_SYS | CF_TRIM_USER | CF_TRIM_ASST,
	Q("{{bos_token}}{%ifcustom_toolsisdefined%}{%settools=custom_tools%}{%endif%}") TAGS Q(
	    "{%ifnotdate_stringisdefined%}") "(?:" Q("{%setdate_string='") "(?<date>" TEXT ")" Q("'%}") "|" Q(
	    "{%ifstrftime_nowisdefined%}{%setdate_string=strftime_now('%d %b %Y')%}{%else%}{%setdate_string='") TEXT Q(
	    "'%}{%endif%}") ")" Q("{%endif%}") TAGS Q("{%ifmessages[0].role=='system'%}{%setsystem_message="
	    "messages[0].content|trim%}{%setmessages=messages[1:]%}{%else%}{%setsystem_message=''%}{%endif%}{{'" L3(
		"system", "\\n") "'}}{%if") "(?:(?!" Q("{%endif%}") ").)*tools(?:(?!" Q("{%endif%}") ").)*" Q("{%endif%}") GAP Q(
	    "{{'Cutting Knowledge Date: December 2023\\nToday Date: '+date_string+'\\n\\n'}}{%iftoolsisnotnone") GAP Q(
	    "{%endif%}{{system_message+'<|eot_id|>'}}") GAP Q("{%formessageinmessages%}{%ifnot(message.role=='ipython'or"
	    "message.role=='tool'or'tool_calls'inmessage)%}{{'<|start_header_id|>'+message.role+'<|end_header_id|>\\n\\n'+"
	    "message.content|trim+'<|eot_id|>'}}{%elif") GAP Q("{%endfor%}{%ifadd_generation_prompt%}{{" L3_GENERATE
	    "{%endif%}"),
	{"%b", L3("system", "\n") "Cutting Knowledge Date: December 2023\nToday Date: %D\n\n<|eot_id|>",
	    L3("system", "\n") "Cutting Knowledge Date: December 2023\nToday Date: %D\n\n", "<|eot_id|>", "", "", L3("user", "\n"),
	    "<|eot_id|>", L3("assistant", "\n"), "<|eot_id|>", L3("assistant", "\n")}},
    {T_LLAMA2, CF_FOLD_FIRST | CF_ALTERNATE | CF_TRIM_USER | CF_TRIM_ASST,
	Q("{%ifmessages[0].role=='system'%}{%setloop_messages=messages[1:]%}{%setsystem_message=messages[0].content%}"
	  "{%else%}{%setloop_messages=messages%}{%setsystem_message=false%}{%endif%}{%formessageinloop_messages%}")
	    ALTERNATE("loop.index0") Q("{%ifloop.index0==0andsystem_message!=false%}{%setcontent='<<SYS>>\\n'+"
	    "system_message+'\\n<</SYS>>\\n\\n'+message.content%}{%else%}{%setcontent=message.content%}{%endif%}"
	    "{%ifmessage.role=='user'%}{{bos_token+'[INST] '+content") "(?:" Q(".strip()") "|" Q("|trim") ")" Q(
	    "+' [/INST]'}}") GAP Q("{%elifmessage.role=='assistant'%}{{' '+content") "(?:" Q(".strip()") "|" Q(
	    "|trim") ")" Q("+' '+eos_token}}{%endif%}{%endfor%}"),
	{"", "", "", "", "<<SYS>>\n", "\n<</SYS>>\n\n", "%b[INST] ", " [/INST]", " ", " %e", ""}},
    {T_MISTRAL, CF_ALTERNATE,
	Q("{{bos_token}}{%formessageinmessages%}") ALTERNATE("loop.index0") Q("{%ifmessage.role=='user'%}{{'")
	    "(?<upre> ?\\[INST\\] ?)" Q("'+message.content+'") "(?<upost> ?\\[/INST\\])" Q("'}}"
	    "{%elifmessage.role=='assistant'%}{{") ASSISTANT Q("}}") REFUSE,
	{"%b", "", "", "", "", "", "%u", "%v", "%a", "%e%c", ""}},
    {T_MISTRAL, CF_ALTERNATE | CF_FOLD_FIRST,
	SYSTEM_APART Q("{{bos_token}}{%formessageinloop_messages%}") ALTERNATE("loop.index0") Q(
	    "{%ifmessage.role=='user'%}{%ifloop.firstandsystem_messageisdefined%}{{'") "(?<upre> ?\\[INST\\] ?)" Q(
	    "'+system_message+'\\n\\n'+message.content+'") "(?<upost> ?\\[/INST\\])" Q("'}}{%else%}{{'") "\\k<upre>" Q(
	    "'+message.content+'") "\\k<upost>" Q("'}}{%endif%}{%elifmessage.role=='assistant'%}{{") ASSISTANT Q("}}")
	    REFUSE,
	{"%b", "", "", "", "", "\n\n", "%u", "%v", "%a", "%e%c", ""}},
    {T_MISTRAL, CF_ALTERNATE | CF_FOLD_LAST,
	SYSTEM_APART Q("{%ifnottoolsisdefined%}{%settools=none%}{%endif%}") TAGS ALTERNATE("ns.index") TAGS Q(
	    "{%endfor%}{{bos_token}}{%formessageinloop_messages%}{%ifmessage.role=='user'%}{%iftoolsisnotnoneand") GAP Q(
	    "{%endif%}{%ifloop.lastandsystem_messageisdefined%}{{'") "(?<upre> ?\\[INST\\] ?)" Q(
	    "'+system_message+'\\n\\n'+message.content+'") "(?<upost> ?\\[/INST\\])" Q("'}}{%else%}{{'") "\\k<upre>" Q(
	    "'+message.content+'") "\\k<upost>" Q("'}}{%endif%}{%elif") GAP Q("{%elifmessage.role=='assistant'%}{{")
	    ASSISTANT Q("}}{%elif") GAP REFUSE,
	{"%b", "", "", "", "", "\n\n", "%u", "%v", "%a", "%e%c", ""}},
    {T_ZEPHYR, CF_SYS_TURN | CF_SYS_ANYWHERE,
	Q("{%formessageinmessages%}{%ifmessage.role=='user'%}{{'<|user|>\\n'+message.content+eos_token+'\\n'}}"
	  "{%elifmessage.role=='system'%}{{'<|system|>\\n'+message.content+eos_token+'\\n'}}"
	  "{%elifmessage.role=='assistant'%}{{'<|assistant|>\\n'+message.content+eos_token+'\\n'}}{%endif%}"
	  "{%ifloop.lastandadd_generation_prompt%}{{'<|assistant|>\\n'}}{%endif%}{%endfor%}"),
	{"", "", "<|system|>\n", "%e\n", "", "", "<|user|>\n", "%e\n", "<|assistant|>\n", "%e\n", "<|assistant|>\n"}},
};

/* ---- parts to items ---- */

#define DATE_MARK '\1'

struct match {
	pcre2_code *re;
	pcre2_match_data *md;
	const char *subject;
};

/* A group's text: 0 and nothing if it is not set */
static bool
group(const struct match *m, const char *name, const char **s, size_t *len)
{
	const PCRE2_SIZE *ov = pcre2_get_ovector_pointer(m->md);
	PCRE2_SPTR first, last;
	int size = pcre2_substring_nametable_scan(m->re, (PCRE2_SPTR)name, &first, &last);

	for (PCRE2_SPTR p = first; size > 0 && p <= last; p += size) {
		unsigned n = (unsigned)p[0] << 8 | p[1];

		if (n < pcre2_get_ovector_count(m->md) && ov[2 * n] != PCRE2_UNSET) {
			*s = m->subject + ov[2 * n];
			*len = ov[2 * n + 1] - ov[2 * n];
			return true;
		}
	}
	*s = "";
	*len = 0;
	return false;
}

static bool
add_group(struct cc *c, struct buf *out, const struct match *m, const char *name)
{
	const char *s;
	size_t len;
	bool set = group(m, name, &s, &len);

	for (size_t i = 0; i < len; i++) {
		if (s[i] == '\\' && ++i < len && s[i] == 'n')
			tokc_add(c, out, "\n", 1);
		else if (i < len)
			tokc_add(c, out, s + i, 1);
	}
	return set;
}

/* bos_token or eos_token; Jinja writes nothing for one that is not there */
static void
add_config_token(struct cc *c, struct buf *out, const char *key)
{
	const json_t *j = json_object_get(c->config, key);

	if (json_is_object(j))
		j = json_object_get(j, "content");
	if (json_is_string(j))
		tokc_add_text(c, out, json_string_value(j));
}

static void
expand(struct cc *c, struct buf *out, const struct match *m, const char *part)
{
	static const struct {
		char code;
		const char *group;
	} codes[] = {{'u', "upre"}, {'v', "upost"}, {'a', "apre"}, {'c', "apost"}};

	out->n = 0;
	for (const char *s = part; *s; s++) {
		if (*s != '%') {
			tokc_add(c, out, s, 1);
			continue;
		}
		s++;
		for (size_t i = 0; i < sizeof(codes) / sizeof(*codes); i++)
			if (*s == codes[i].code)
				add_group(c, out, m, codes[i].group);
		if (*s == 'b' || *s == 'e')
			add_config_token(c, out, *s == 'b' ? "bos_token" : "eos_token");
		else if (*s == 'D' && !add_group(c, out, m, "date"))
			tokc_add(c, out, (char[]){DATE_MARK}, 1);
		else if (*s == 's' && !add_group(c, out, m, "sys")) {
			out->n = 0;
			return;
		}
	}
}

/* The longest added token that s begins with, NONE if none does */
static uint32_t
token_at(const struct cc *c, const char *s, size_t len)
{
	uint32_t best = NONE;

	for (uint32_t i = 0; i < c->head.vocab; i++) {
		const struct entry *en = &c->entry[i];

		if (en->added && en->len <= len && !memcmp(en->s, s, en->len) && (best == NONE || en->len > c->entry[best].len))
			best = i;
	}
	return best;
}

static void
put_item(struct cc *c, uint32_t part, uint32_t id, const char *s, size_t len)
{
	struct chat_item item = {.part = part, .id = id};

	if (id == NONE && !len)
		return;
	if (id == NONE)
		item.text = tokc_add_span(c, s, len);
	tokc_add(c, &c->sec[S_CHAT], &item, sizeof(item));
}

static void
put_items(struct cc *c, uint32_t part, const char *s, size_t len)
{
	size_t from = 0, i = 0;

	while (i < len && !c->rc) {
		uint32_t id = s[i] == DATE_MARK ? CHAT_DATE : token_at(c, s + i, len - i);

		if (id == NONE) {
			i++;
			continue;
		}
		put_item(c, part, NONE, s + from, i - from);
		put_item(c, part, id, NULL, 0);
		i += id == CHAT_DATE ? 1 : c->entry[id].len;
		from = i;
	}
	put_item(c, part, NONE, s + from, len - from);
}

/* Marks the tokens that the template writes; false: one takes the white space around it, which nobody does here */
static bool
mark_tokens(struct cc *c)
{
	const struct chat_item *v = (const struct chat_item *)c->sec[S_CHAT].p;

	for (size_t s = S_RAW; s <= S_NORM; s++) {
		struct added *a = (struct added *)c->sec[s].p;

		for (size_t i = 0; i < c->sec[s].n / sizeof(*a); i++)
			for (size_t k = 0; k < c->sec[S_CHAT].n / sizeof(*v); k++) {
				if (v[k].id != a[i].id)
					continue;
				if (a[i].flags & (A_LSTRIP | A_RSTRIP | A_WORD))
					return false;
				a[i].flags |= A_CONTROL;
			}
	}
	return true;
}

/* A family of one free pattern: text that touches the message without a token between could mean anything */
static bool
edges_ok(const struct cc *c)
{
	const struct chat_item *v = (const struct chat_item *)c->sec[S_CHAT].p;
	size_t n = c->sec[S_CHAT].n / sizeof(*v);

	for (size_t i = 0; i < n; i++)
		if ((v[i].part == C_USER_PRE && (i + 1 == n || v[i + 1].part != C_USER_PRE) && v[i].id == NONE) ||
		    (v[i].part == C_USER_POST && (!i || v[i - 1].part != C_USER_POST) && v[i].id == NONE))
			return false;
	return true;
}

static bool
take_family(struct cc *c, const struct family *f, const struct match *m)
{
	struct buf text = {0};
	const char *s;
	size_t len;
	bool ok;

	c->head.chat = f->flags | (group(m, "trim", &s, &len) ? CF_TRIM_SYS | CF_TRIM_USER | CF_TRIM_ASST : 0) |
		       (group(m, "atrim", &s, &len) ? CF_TRIM_ASST : 0) | (group(m, "always", &s, &len) ? CF_GENERATE : 0);
	for (uint32_t p = 0; p < C_COUNT; p++) {
		expand(c, &text, m, f->part[p] ? f->part[p] : "");
		put_items(c, p, text.p, text.n);
	}
	free(text.p);
	ok = !c->rc && mark_tokens(c) && (!(f->flags & CF_SINGLE) || edges_ok(c));
	if (!ok) {
		c->sec[S_CHAT].n = 0;
		c->head.chat = 0;
	}
	return ok;
}

static bool
try_family(struct cc *c, const struct family *f, const char *text)
{
	struct buf re = {0};
	struct match m = {.subject = text};
	bool ok = false;

	tokc_add_text(c, &re, "^(?:");
	tokc_add_text(c, &re, f->re);
	tokc_add_text(c, &re, ")\\z");
	m.re = c->rc ? NULL : tok_regex_new(re.p, re.n, PCRE2_DOTALL | PCRE2_DUPNAMES, c->e);
	m.md = m.re ? pcre2_match_data_create_from_pattern(m.re, NULL) : NULL;
	if (!m.md)
		FAIL(c, -ENOMEM, "tokenizer: out of memory");
	else if (pcre2_match(m.re, (PCRE2_SPTR)text, strlen(text), 0, 0, m.md, NULL) > 0)
		ok = take_family(c, f, &m);
	pcre2_match_data_free(m.md);
	pcre2_code_free(m.re);
	free(re.p);
	return ok;
}

void
tokc_template(struct cc *c, const char *template)
{
	struct buf text = {0};

	if (c->rc)
		return;
	c->head.template = T_UNKNOWN;
	if (canonical(c, template, &text))
		for (size_t i = 0; i < sizeof(families) / sizeof(*families) && c->head.template == T_UNKNOWN; i++)
			if (try_family(c, &families[i], text.p))
				c->head.template = families[i].kind;
	free(text.p);
}
