/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok-regex.c: see tok-compile.h. What the two dialects read differently is spelled out, or refused.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tok-compile.h"

#include <errno.h>
#include <stdlib.h>

#define SPACE_SET "\\x{9}-\\x{d}\\x{20}\\x{85}\\p{Z}" /* White_Space; PCRE2's \s has U+180E too */
#define WORD_SET "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}"

/* A set that PCRE2 reads otherwise, spelled out; false: inside [...] a negated one cannot be */
static bool
re_set(struct cc *c, struct buf *out, const char *set, bool negated, bool in_class)
{
	if (in_class && negated)
		return false;
	tokc_add_text(c, out, in_class ? "" : negated ? "[^" : "[");
	tokc_add_text(c, out, set);
	tokc_add_text(c, out, in_class ? "" : "]");
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
	tokc_add(c, out, s, 3);
	if (*name == '^')
		tokc_add(c, out, name++, 1);
	len = (size_t)(end - name);
	if (len > 2 && memcmp(name, "Any", 3))
		tokc_add_text(c, out, "sc:");
	tokc_add(c, out, name, len + 1);
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
		tokc_add_text(c, out, "\\x{");
		tokc_add(c, out, s + 2, 4);
		tokc_add_text(c, out, "}");
		return s + 6;
	case 'x':
		end = s[2] == '{' ? strchr(s, '}') : NULL;
		tokc_add(c, out, s, end ? (size_t)(end + 1 - s) : 2);
		return end ? end + 1 : s + 2;
	default:
		tokc_add(c, out, s, 2);
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

void
tokc_regex(struct cc *c, const char *re, struct buf *out)
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
				tokc_add(c, out, at, s ? (size_t)(s + 2 - at) : 0);
				s = s ? s + 2 : NULL;
			} else {
				class_start = *s == ']' ? NULL : class_start;
				tokc_add(c, out, s++, 1);
			}
		} else if (*s == '[') {
			s += s[1] == '^' ? 2 : 1;
			tokc_add(c, out, at, (size_t)(s - at));
			class_start = s;
		} else if ((*s == '}' && s[1] == '+') || (*s == '(' && !re_group_ok(s))) {
			s = NULL; /* {n,m}+ is greedy twice in one dialect, possessive in the other */
		} else {
			tokc_add(c, out, s++, 1);
		}
		if (!s)
			UNSUPPORTED(
			    c, "pre_tokenizer Regex: '%s' at byte %zu is not supported", tokc_show(at), (size_t)(at - re));
	}
}
