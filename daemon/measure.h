/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTETD_MEASURE_H
#define OCTETD_MEASURE_H
/* The numbers of an eval: pure functions, any thread. */
#include <jansson.h>
#include <stdint.h>
#include "daemon/engine/probe.h"

/* Of n scored tokens: {"tokens", "perplexity": {...}, "kl": {...}, "top1", "top5"}. Perplexity is exp of the mean
 * -log p; its standard error is by the delta method; the difference is that of the mean log, paired, with a normal
 * 95 % interval, as a per cent of perplexity. Quantiles are the nearest rank. NULL without memory. */
json_t *measure_scores(const struct probe_score *, size_t n);
/* Levenshtein distance in bytes, in words (white space between them); UINT32_MAX without memory. */
uint32_t measure_edit_distance(const char *a, const char *b);
uint32_t measure_word_errors(const char *a, const char *b);
/* McNemar's exact test, two-sided: b and c pairs changed, one way and the other. */
double measure_mcnemar(uint32_t b, uint32_t c);
/* Step times, us, of n rounds of both sides. What disturbs a step only adds to it, so a step takes what its lower quartile
 * says; saved is the mean over blocks of rounds of the difference, error its standard error (0: too few rounds). */
struct measure_step {
	double us[2], saved, error;
};
void measure_steps(const float *baseline, const float *candidate, uint32_t n, struct measure_step *out);
#endif
