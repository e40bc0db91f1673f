/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LINE 2048u

static const char *const names[] = {"error", "warn", "info", "debug"};
static int level_now = LOG_INFO; /* atomic */
static pthread_mutex_t kept_lock = PTHREAD_MUTEX_INITIALIZER;
static char kept[LOG_KEPT][LOG_KEPT_LINE];
static uint64_t n_kept; /* ever */

void
log_set_level(enum log_level level)
{
	__atomic_store_n(&level_now, (int)level, __ATOMIC_RELAXED);
}

enum log_level
log_get_level(void)
{
	return (enum log_level)__atomic_load_n(&level_now, __ATOMIC_RELAXED);
}

void
log_set_level_name(const char *name)
{
	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
		if (strcmp(name, names[i]) == 0)
			log_set_level((enum log_level)i);
}

static bool
is_plain(const char *s)
{
	if (*s == '\0')
		return false;
	for (; *s != '\0'; s++)
		if (*s <= ' ' || *s > '~' || *s == '"' || *s == '\\' || *s == '=')
			return false;
	return true;
}

const char *
log_quote(const char *s, char *buf, size_t len)
{
	size_t n = 0;

	if (is_plain(s) && strlen(s) < len)
		return s;
	buf[n++] = '"';
	for (; *s != '\0' && n + 3 < len; s++) {
		if (*s == '"' || *s == '\\')
			buf[n++] = '\\';
		buf[n++] = *s;
	}
	buf[n++] = '"';
	buf[n] = '\0';
	return buf;
}

/* "2026-01-31T12:00:00.123Z" */
static size_t
put_time(char *buf, size_t len)
{
	struct timespec now;
	struct tm tm;
	size_t n;

	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &tm);
	n = strftime(buf, len, "%Y-%m-%dT%H:%M:%S", &tm);
	return n + (size_t)snprintf(buf + n, len - n, ".%03dZ", (int)(now.tv_nsec / 1000000));
}

static void
keep(const char *line, size_t n)
{
	pthread_mutex_lock(&kept_lock);
	snprintf(kept[n_kept++ % LOG_KEPT], LOG_KEPT_LINE, "%.*s", (int)(n < LOG_KEPT_LINE ? n : LOG_KEPT_LINE - 1), line);
	pthread_mutex_unlock(&kept_lock);
}

void
log_recent(char out[LOG_KEPT][LOG_KEPT_LINE], uint64_t *n)
{
	pthread_mutex_lock(&kept_lock);
	if (n_kept > *n)
		memcpy(out, kept, sizeof(kept));
	*n = n_kept;
	pthread_mutex_unlock(&kept_lock);
}

void
log_event(enum log_level level, const char *event, const char *fmt, ...)
{
	char line[LINE];
	size_t n;
	va_list ap;
	int k;

	if (level > log_get_level())
		return;
	n = put_time(line, sizeof(line));
	n += (size_t)snprintf(line + n, sizeof(line) - n, " %s %s ", names[level], event);
	va_start(ap, fmt);
	k = vsnprintf(line + n, sizeof(line) - n, fmt, ap);
	va_end(ap);
	if (k > 0)
		n += (size_t)k;
	if (n > sizeof(line) - 2)
		n = sizeof(line) - 2;
	while (line[n - 1] == ' ')
		n--;
	for (size_t i = 0; i < n; i++)
		if ((unsigned char)line[i] < ' ' || line[i] == 0x7f)
			line[i] = '?';
	keep(line, n);
	line[n++] = '\n';
	while (write(STDERR_FILENO, line, n) < 0 && errno == EINTR)
		;
}
