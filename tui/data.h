/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_DATA_H
#define OCTET_DATA_H
/*
 * What the console knows: the newest snapshot of the status page, a second by
 * second memory of the last minutes, the log lines that went by. Times are
 * those of the snapshots, so that a replay shows what was seen. Draws nothing,
 * takes no keys, opens no sockets. A page is trusted no more than a file:
 * data_take() makes every number one that may be added, divided and drawn.
 */
#include <stdbool.h>
#include <stdint.h>
#include "client/page.h"

#define DATA_SECONDS 1024u
#define DATA_LOG 1024u

enum series {
	SERIES_OUTPUT, SERIES_PROMPT, SERIES_TTFT_P50, SERIES_TTFT_P99, SERIES_TOKEN_P50, SERIES_TOKEN_P99, SERIES_STEP_P50,
	SERIES_STEP_P99, SERIES_ROWS, SERIES_RUNNING, SERIES_QUEUED, SERIES_KV, SERIES_HITS, N_SERIES
};

/* DOWN: there is no daemon. STALE: it is there, but its page stands still. */
enum link { LINK_DOWN, LINK_UP, LINK_STALE, LINK_REPLAY };

struct data {
	struct octet_page page;
	bool have;              /* a snapshot was taken */
	enum link link;
	char link_why[256];
	struct {
		int64_t second; /* since 1970; -1: none */
		uint32_t n[N_SERIES]; /* snapshots that had a value */
		float sum[N_SERIES];
	} bin[DATA_SECONDS]; /* by second % DATA_SECONDS */
	char log[DATA_LOG][PAGE_LOG_LINE]; /* the i-th ever at i % DATA_LOG */
	uint64_t n_log;
	double client_rate[PAGE_CLIENTS]; /* tokens/s of page.client[i], smoothed */
};

void data_init(struct data *);
/* false: nothing new. */
bool data_take(struct data *, const struct octet_page *);
/* The connection changed; why is for people. */
void data_link(struct data *, enum link, int64_t now_us, const char *why);
/* The newest is 0; NULL after the oldest that is kept. */
const char *data_log(const struct data *, uint64_t i);
uint64_t data_log_count(const struct data *);
bool data_log_is(const char *line, const char *level); /* " warn " */

/* n columns of so many seconds each, the last ends with the newest snapshot;
 * NAN where nothing is known. */
void data_columns(const struct data *, enum series, int64_t seconds, float *out, int n);
int64_t data_column_end(const struct data *, int64_t seconds); /* the second after the last column */
/* The mean of [from, to) in seconds, NAN if unknown. */
double data_mean(const struct data *, enum series, int64_t from, int64_t to);
/* What a series was from the change before (0: none) to this one, and from it to the next (0: none); NAN if not seen. */
void data_effect(const struct data *, int64_t before_us, int64_t time_us, int64_t next_us, enum series, double *before, double *after);
#endif
