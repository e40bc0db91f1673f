/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/measure.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int
by_double(const void *pa, const void *pb)
{
	double a = *(const double *)pa, b = *(const double *)pb;

	return a < b ? -1 : a > b;
}

static int
by_float(const void *pa, const void *pb)
{
	float a = *(const float *)pa, b = *(const float *)pb;

	return a < b ? -1 : a > b;
}

/* Standard error of the mean of n values from their sum and sum of squares. */
static double
mean_error(double sum, double squares, size_t n)
{
	double mean = sum / (double)n, var = squares / (double)n - mean * mean;

	return n > 1 && var > 0 ? sqrt(var / (double)(n - 1)) : 0;
}

/* Sorts n values. */
static double
lower_quartile(float *v, uint32_t n)
{
	qsort(v, n, sizeof(*v), by_float);
	return v[n / 4];
}

#define BLOCKS 12u

void
measure_steps(const float *baseline, const float *candidate, uint32_t n, struct measure_step *out)
{
	float v[2][1024];
	double sum = 0, squares = 0;
	uint32_t blocks = n < 4 * BLOCKS ? 1 : BLOCKS;

	*out = (struct measure_step){0};
	n = n < 1024 ? n : 1024;
	if (n == 0)
		return;
	for (uint32_t b = 0; b < blocks; b++) {
		uint32_t first = b * n / blocks, len = (b + 1) * n / blocks - first;
		double d;

		memcpy(v[0], baseline + first, len * sizeof(float));
		memcpy(v[1], candidate + first, len * sizeof(float));
		d = lower_quartile(v[0], len) - lower_quartile(v[1], len);
		sum += d, squares += d * d;
	}
	out->saved = sum / blocks;
	out->error = mean_error(sum, squares, blocks);
	memcpy(v[0], baseline, n * sizeof(float));
	memcpy(v[1], candidate, n * sizeof(float));
	out->us[0] = lower_quartile(v[0], n);
	out->us[1] = lower_quartile(v[1], n);
}

static double
quantile(const double *sorted, size_t n, double q)
{
	size_t rank = (size_t)ceil(q * (double)n);

	return sorted[rank > 0 ? rank - 1 : 0];
}

json_t *
measure_scores(const struct probe_score *s, size_t n)
{
	double *kl = malloc((n + 1) * sizeof(*kl));
	double nll[N_SIDES] = {0}, squares[N_SIDES] = {0}, diff = 0, diff2 = 0, kl_sum = 0, kl2 = 0, top1 = 0, top5 = 0, ppl[N_SIDES], d,
	       se;
	json_t *j;

	if (kl == NULL || n == 0) {
		free(kl);
		return NULL;
	}
	for (size_t i = 0; i < n; i++) {
		double x = s[i].nll[SIDE_CANDIDATE] - s[i].nll[SIDE_BASELINE];

		for (int side = 0; side < N_SIDES; side++)
			nll[side] += s[i].nll[side], squares[side] += s[i].nll[side] * s[i].nll[side];
		diff += x, diff2 += x * x;
		kl[i] = s[i].kl;
		kl_sum += kl[i], kl2 += kl[i] * kl[i];
		top1 += s[i].first[0] == s[i].first[1];
		top5 += s[i].common5 / 5.0;
	}
	qsort(kl, n, sizeof(*kl), by_double);
	for (int side = 0; side < N_SIDES; side++)
		ppl[side] = exp(nll[side] / (double)n);
	d = diff / (double)n;
	se = 1.96 * mean_error(diff, diff2, n);
	j = json_pack("{s:I,s:{s:f,s:f,s:f,s:f,s:f,s:f,s:f},s:{s:f,s:f,s:f,s:f,s:f,s:f},s:f,s:f}", "tokens", (json_int_t)n,
	    "perplexity", "baseline", ppl[0], "baseline_se", ppl[0] * mean_error(nll[0], squares[0], n), "candidate", ppl[1],
	    "candidate_se", ppl[1] * mean_error(nll[1], squares[1], n), "change_percent", 100 * expm1(d), "change_low",
	    100 * expm1(d - se), "change_high", 100 * expm1(d + se), "kl", "mean", kl_sum / (double)n, "mean_se",
	    mean_error(kl_sum, kl2, n), "median", quantile(kl, n, 0.5), "p99", quantile(kl, n, 0.99), "p99_9",
	    quantile(kl, n, 0.999), "max", kl[n - 1], "top1", top1 / (double)n, "top5", top5 / (double)n);
	free(kl);
	return j;
}

/* ---- tasks ---- */

static uint32_t
min3(uint32_t a, uint32_t b, uint32_t c)
{
	uint32_t m = a < b ? a : b;

	return m < c ? m : c;
}

struct piece {
	const char *at;
	size_t len;
};

static bool
equal(const struct piece *a, const struct piece *b)
{
	return a->len == b->len && memcmp(a->at, b->at, a->len) == 0;
}

static uint32_t
levenshtein(const struct piece *a, size_t n, const struct piece *b, size_t m)
{
	uint32_t *row = malloc((m + 1) * sizeof(*row)), last;

	if (row == NULL)
		return UINT32_MAX;
	for (size_t j = 0; j <= m; j++)
		row[j] = (uint32_t)j;
	for (size_t i = 1; i <= n; i++) {
		uint32_t diagonal = row[0];

		row[0] = (uint32_t)i;
		for (size_t j = 1; j <= m; j++) {
			uint32_t above = row[j];

			row[j] = min3(above + 1, row[j - 1] + 1, diagonal + !equal(&a[i - 1], &b[j - 1]));
			diagonal = above;
		}
	}
	last = row[m];
	free(row);
	return last;
}

/* malloc'd; words, or single bytes. */
static struct piece *
split(const char *s, bool words, size_t *n)
{
	static const char space[] = " \t\r\n";
	struct piece *p = malloc((strlen(s) + 1) * sizeof(*p));

	*n = 0;
	while (p != NULL && *s != '\0') {
		size_t len = 1;

		if (words) {
			s += strspn(s, space);
			len = strcspn(s, space);
			if (len == 0)
				break;
		}
		p[(*n)++] = (struct piece){s, len};
		s += len;
	}
	return p;
}

static uint32_t
distance(const char *a, const char *b, bool words)
{
	size_t n, m;
	struct piece *pa = split(a, words, &n), *pb = split(b, words, &m);
	uint32_t d = pa != NULL && pb != NULL ? levenshtein(pa, n, pb, m) : UINT32_MAX;

	free(pa);
	free(pb);
	return d;
}

uint32_t
measure_edit_distance(const char *a, const char *b)
{
	return distance(a, b, false);
}

uint32_t
measure_word_errors(const char *a, const char *b)
{
	return distance(a, b, true);
}

double
measure_mcnemar(uint32_t b, uint32_t c)
{
	uint32_t n = b + c, k = b < c ? b : c;
	double p = 0;

	for (uint32_t i = 0; i <= k; i++)
		p += exp(lgamma(n + 1.0) - lgamma(i + 1.0) - lgamma(n - i + 1.0) - n * log(2));
	return fmin(1, 2 * p);
}
