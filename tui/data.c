/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/data.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "client/ctl.h"

#define LATEST_US ((int64_t)1 << 52) /* in 2112 */
#define EFFECT_S 10
#define SMOOTH_S 3.0

void
data_init(struct data *d)
{
	memset(d, 0, sizeof(*d));
	for (uint32_t i = 0; i < DATA_SECONDS; i++)
		d->bin[i].second = -1;
}

/* ---- a page that may be anything ---- */

static void
fix_time(int64_t *us)
{
	if (*us < 0 || *us > LATEST_US)
		*us = 0;
}

/* Finite and within what is drawn. */
static void
fix(double *v)
{
	if (!(fabs(*v) < 1e15))
		*v = 0;
}

static void
fix_float(float *v, float otherwise)
{
	if (!(fabsf(*v) < 1e15f))
		*v = otherwise;
}

static void
fix_sites(struct octet_page *p)
{
	for (uint32_t l = 0; l < PAGE_LAYERS; l++) {
		fix_float(&p->layer_kl[l], -1);
		fix_float(&p->layer_saved_us[l], NAN), fix_float(&p->layer_saved_error_us[l], NAN);
	}
	for (uint32_t g = 0; g < PAGE_GROUPS; g++) {
		fix_float(&p->group_kl[g], -1);
		fix_float(&p->group_saved_us[g], NAN), fix_float(&p->group_saved_error_us[g], NAN);
		for (uint32_t f = 0; f < PAGE_FORMATS; f++)
			if (p->read_bytes[g][f] > (uint64_t)1 << 50)
				p->read_bytes[g][f] = 0;
		for (uint32_t l = 0; l < PAGE_LAYERS; l++) {
			fix_float(&p->absmax[g][l], -1), fix_float(&p->zero[g][l], 0), fix_float(&p->saturated[g][l], 0);
			fix_float(&p->kl[g][l], -1), fix_float(&p->saved_us[g][l], NAN);
			fix_float(&p->saved_error_us[g][l], NAN);
			if (p->wanted[g][l] >= p->n_formats)
				p->wanted[g][l] = p->executed[g][l] = p->candidate[g][l] = PAGE_NONE;
			if (p->wanted[g][l] != PAGE_NONE && p->executed[g][l] >= p->n_formats)
				p->executed[g][l] = p->wanted[g][l];
			if (p->candidate[g][l] >= p->n_formats)
				p->candidate[g][l] = PAGE_NONE;
		}
	}
}

static void
fix_shadow(struct page_shadow *s)
{
	fix(&s->kl), fix(&s->agree), fix(&s->max_kl), fix(&s->min_agree);
}

static void
fix_numbers(struct octet_page *p)
{
	double *const all[] = {&p->tokens_per_s, &p->prompt_per_s, &p->step_ms_p50, &p->step_ms_p90, &p->step_ms_p99,
	    &p->step_ms_max, &p->ttft_ms_p50, &p->ttft_ms_p99, &p->token_ms_p50, &p->token_ms_p90, &p->token_ms_p99, &p->queue_ms,
	    &p->shadow_sample, &p->rollout_percent, &p->guard_kl, &p->guard_agree, &p->guard_p99};

	for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
		fix(all[i]);
	for (int i = 0; i < 2; i++) {
		fix(&p->side[i].ttft_ms_p50), fix(&p->side[i].ttft_ms_p99);
		fix(&p->side[i].token_ms_p50), fix(&p->side[i].token_ms_p99);
	}
	fix_shadow(&p->shadow), fix_shadow(&p->candidate_shadow);
	for (uint32_t i = 0; i < PAGE_EVALS; i++) {
		struct page_eval *e = &p->eval[i];

		fix_time(&e->time_us);
		fix(&e->perplexity_base), fix(&e->perplexity), fix(&e->kl_mean), fix(&e->kl_p99), fix(&e->kl_max), fix(&e->top1);
		fix(&e->tokens_per_s_base), fix(&e->tokens_per_s);
	}
}

static void
data_fix(struct octet_page *p)
{
	page_sanitise(p);
	fix_time(&p->updated_us), fix_time(&p->started_us), fix_time(&p->sweep_us);
	for (uint32_t i = 0; i < PAGE_HISTORY; i++)
		fix_time(&p->history[i].time_us);
	for (uint32_t g = 0; g < PAGE_GROUPS; g++)
		p->possible[g] &= p->n_formats > 0 ? (1u << p->n_formats) - 1 : 0;
	if (p->kv_pages_used > p->kv_pages)
		p->kv_pages_used = p->kv_pages;
	fix_sites(p);
	fix_numbers(p);
}

/* ---- the last minutes ---- */

static float
measured(double v)
{
	return v < 0 ? NAN : (float)v;
}

/* Prompt tokens that the prefix cache had, of those that came since the last snapshot. */
static float
hit_share(const struct octet_page *p, const struct octet_page *was)
{
	double hit, ran;

	if (p->prefix_hit_tokens < was->prefix_hit_tokens || p->prompt_tokens < was->prompt_tokens)
		return NAN;
	hit = (double)(p->prefix_hit_tokens - was->prefix_hit_tokens), ran = (double)(p->prompt_tokens - was->prompt_tokens);
	return hit + ran > 0 ? (float)(100 * hit / (hit + ran)) : NAN;
}

static void
take_series(struct data *d, const struct octet_page *was)
{
	const struct octet_page *p = &d->page;
	int64_t second = p->updated_us / 1000000;
	uint32_t at = (uint32_t)(second % DATA_SECONDS);
	float v[N_SERIES] = {
		[SERIES_OUTPUT] = measured(p->tokens_per_s), [SERIES_PROMPT] = measured(p->prompt_per_s),
		[SERIES_TTFT_P50] = measured(p->ttft_ms_p50), [SERIES_TTFT_P99] = measured(p->ttft_ms_p99),
		[SERIES_TOKEN_P50] = measured(p->token_ms_p50), [SERIES_TOKEN_P99] = measured(p->token_ms_p99),
		[SERIES_STEP_P50] = measured(p->step_ms_p50), [SERIES_STEP_P99] = measured(p->step_ms_p99),
		[SERIES_ROWS] = (float)p->batch_rows, [SERIES_RUNNING] = (float)p->running, [SERIES_QUEUED] = (float)p->queued,
		[SERIES_KV] = p->kv_pages > 0 ? 100.0f * (float)p->kv_pages_used / (float)p->kv_pages : 0,
		[SERIES_HITS] = was != NULL ? hit_share(p, was) : NAN,
	};

	if (d->bin[at].second != second) {
		memset(&d->bin[at], 0, sizeof(d->bin[at]));
		d->bin[at].second = second;
	}
	for (int i = 0; i < N_SERIES; i++)
		if (isfinite(v[i]))
			d->bin[at].sum[i] += v[i], d->bin[at].n[i]++;
}

double
data_mean(const struct data *d, enum series s, int64_t from, int64_t to)
{
	double sum = 0;
	uint32_t n = 0;

	/* Nothing is older than this. */
	if (from < to - (int64_t)DATA_SECONDS)
		from = to - (int64_t)DATA_SECONDS;
	for (int64_t second = from < 0 ? 0 : from; second < to; second++) {
		uint32_t at = (uint32_t)(second % DATA_SECONDS);

		if (d->bin[at].second != second || d->bin[at].n[s] == 0)
			continue;
		sum += (double)d->bin[at].sum[s] / d->bin[at].n[s];
		n++;
	}
	return n > 0 ? sum / n : NAN;
}

/* Columns begin at multiples of their width, or all would change every second. */
int64_t
data_column_end(const struct data *d, int64_t seconds)
{
	return (d->page.updated_us / 1000000 / seconds + 1) * seconds;
}

void
data_columns(const struct data *d, enum series s, int64_t seconds, float *out, int n)
{
	int64_t end = data_column_end(d, seconds);

	for (int i = 0; i < n; i++) {
		int64_t from = end - (int64_t)(n - i) * seconds;

		out[i] = from + (int64_t)DATA_SECONDS <= end - seconds ? NAN : (float)data_mean(d, s, from, from + seconds);
	}
}

/* The rate is one over the last second: the two around a change belong to neither side. */
void
data_effect(const struct data *d, int64_t before_us, int64_t time_us, int64_t next_us, enum series s, double *before, double *after)
{
	int64_t at = time_us / 1000000, end = next_us > 0 ? next_us / 1000000 : INT64_MAX, from = before_us / 1000000 + 2;

	*before = data_mean(d, s, from > at - EFFECT_S ? from : at - EFFECT_S, at);
	*after = data_mean(d, s, at + 2, at + 2 + EFFECT_S < end ? at + 2 + EFFECT_S : end);
}

/* ---- log ---- */

static void
keep_line(struct data *d, const char *line)
{
	char *to = d->log[d->n_log++ % DATA_LOG];
	size_t n = strnlen(line, PAGE_LOG_LINE - 1);

	memmove(to, line, n);
	to[n] = '\0';
}

/* What the console has to say stands between the daemon's lines. */
static void
own_line(struct data *d, int64_t now_us, const char *level, const char *event, const char *why)
{
	char line[PAGE_LOG_LINE], day[32];
	time_t t = (time_t)(now_us / 1000000);
	struct tm tm;

	if (gmtime_r(&t, &tm) == NULL)
		return;
	strftime(day, sizeof(day), "%Y-%m-%dT%H:%M:%S", &tm);
	snprintf(line, sizeof(line), "%s.%03dZ %s %s %.150s", day, (int)(now_us / 1000 % 1000), level, event, why);
	keep_line(d, line);
}

static void
take_log(struct data *d, uint64_t seen)
{
	const struct octet_page *p = &d->page;

	if (p->n_log < seen)
		seen = 0;
	if (p->n_log - seen > PAGE_LOG)
		seen = p->n_log - PAGE_LOG;
	for (; seen < p->n_log; seen++)
		keep_line(d, p->log[seen % PAGE_LOG]);
}

uint64_t
data_log_count(const struct data *d)
{
	return d->n_log < DATA_LOG ? d->n_log : DATA_LOG;
}

const char *
data_log(const struct data *d, uint64_t i)
{
	return i < data_log_count(d) ? d->log[(d->n_log - 1 - i) % DATA_LOG] : NULL;
}

bool
data_log_is(const char *line, const char *level)
{
	const char *space = strchr(line, ' ');
	size_t n = strlen(level);

	return space != NULL && strncmp(space + 1, level, n) == 0 && space[1 + n] == ' ';
}

void
data_link(struct data *d, enum link link, int64_t now_us, const char *why)
{
	snprintf(d->link_why, sizeof(d->link_why), "%s", why);
	if (d->link == link)
		return;
	d->link = link;
	if (link == LINK_DOWN)
		own_line(d, now_us, "warn", "console.disconnected", why);
	else if (link == LINK_STALE)
		own_line(d, now_us, "warn", "console.stale", why);
}

/* ---- clients ---- */

static void
take_clients(struct data *d, const struct octet_page *was)
{
	const struct octet_page *p = &d->page;
	double seconds = (double)(p->updated_us - was->updated_us) / 1e6, rate[PAGE_CLIENTS] = {0}, share;

	if (seconds <= 0)
		return;
	/* A client's tokens are counted when its request ends: in jumps. */
	share = 1 - exp(-seconds / SMOOTH_S);
	for (uint32_t i = 0; i < p->n_clients; i++)
		for (uint32_t k = 0; k < was->n_clients; k++)
			if (was->client[k].id == p->client[i].id && p->client[i].tokens >= was->client[k].tokens)
				rate[i] = (1 - share) * d->client_rate[k] +
				    share * (double)(p->client[i].tokens - was->client[k].tokens) / seconds;
	memcpy(d->client_rate, rate, sizeof(rate));
}

bool
data_take(struct data *d, const struct octet_page *page)
{
	static struct octet_page was; /* too large for a stack */
	bool same = d->have && d->page.pid == page->pid && d->page.started_us == page->started_us;

	if (same && page->updated_us == d->page.updated_us)
		return false;
	was = d->page;
	d->page = *page;
	data_fix(&d->page);
	take_log(d, same ? was.n_log : 0);
	take_series(d, same ? &was : NULL);
	if (same)
		take_clients(d, &was);
	else
		memset(d->client_rate, 0, sizeof(d->client_rate));
	d->have = true;
	return true;
}
