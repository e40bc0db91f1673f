/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_LOG_H
#define OCTETD_LOG_H
/*
 * The log: one line per event on stderr, "TIME level event key=value ...",
 * each with a single write(2), so lines of several threads never mix. Any
 * thread. What a person typed or a peer sent goes through LOG_Q(); control
 * characters never reach the line. Prompts and tokens are not for logs.
 */
#include <stddef.h>
#include <stdint.h>

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

void log_set_level(enum log_level); /* live; LOG_INFO at start */
enum log_level log_get_level(void);
void log_set_level_name(const char *); /* "error", "warn", "info", "debug"; others change nothing */

__attribute__((format(printf, 3, 4))) void log_event(enum log_level, const char *event, const char *fmt, ...);
#define log_error(...) log_event(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) log_event(LOG_WARN, __VA_ARGS__)
#define log_info(...) log_event(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_event(LOG_DEBUG, __VA_ARGS__)

/* The last lines written, for the status page: the i-th ever at i % LOG_KEPT,
 * cut to LOG_KEPT_LINE. Copies only if there are more than *n; any thread. */
#define LOG_KEPT 64u
#define LOG_KEPT_LINE 240u
void log_recent(char out[LOG_KEPT][LOG_KEPT_LINE], uint64_t *n);

/* A value as key=value takes it: bare if it is a plain word, else in quotes
 * with " and \ escaped. Valid to the end of the enclosing block. */
#define LOG_QUOTED 1100u
#define LOG_Q(s) log_quote((s), (char[LOG_QUOTED]){0}, LOG_QUOTED)
const char *log_quote(const char *s, char *buf, size_t len);
#endif
