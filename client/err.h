/* SPDX-License-Identifier: Apache-2.0 */
/*
 * err.h: one message for a person, written once by the deepest function that knows the cause and carried up by value.
 * Owned by the caller, no allocation, no thread of its own. It does not log: the boundary that gets the error does.
 */
#ifndef OCTET_ERR_H
#define OCTET_ERR_H

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

struct err {
	char text[512]; /* always a terminated string, cut if too long; never ends in a newline */
};

/* Writes the message and returns `code` (a -errno), so that a caller can say `return err_set(e, -EINVAL, ...)`. e may
 * be NULL. */
__attribute__((format(printf, 3, 4), unused)) static inline int
err_set(struct err *e, int code, const char *fmt, ...)
{
	va_list ap;

	if (!e)
		return code;
	va_start(ap, fmt);
	if (vsnprintf(e->text, sizeof(e->text), fmt, ap) < 0)
		e->text[0] = '\0';
	va_end(ap);
	return code;
}

/* Puts "context: " before the message already there. e may be NULL. */
__attribute__((format(printf, 2, 3), unused)) static inline void
err_prefix(struct err *e, const char *fmt, ...)
{
	char old[sizeof(e->text)];
	va_list ap;
	size_t n;
	int len;

	if (!e)
		return;
	memcpy(old, e->text, sizeof(old));
	old[sizeof(old) - 1] = '\0';
	va_start(ap, fmt);
	len = vsnprintf(e->text, sizeof(e->text), fmt, ap);
	va_end(ap);
	n = len < 0 ? 0 : (size_t)len;
	if (n > sizeof(e->text) - 1)
		n = sizeof(e->text) - 1;
	e->text[n] = '\0';
	snprintf(e->text + n, sizeof(e->text) - n, ": %s", old);
}

#endif
