/* SPDX-License-Identifier: Apache-2.0 */
/* A selector, a format and the text of a plan, each after a newline. */
#include "tests/fuzz/fuzz.h"
#include "daemon/engine/plan.h"

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	char *text = malloc(n + 1), *selector = text, *format, *plan;
	struct plan *p = NULL, *q = NULL;
	struct err err;

	memcpy(text, data, n);
	text[n] = '\0';
	format = strchr(text, '\n');
	if (format == NULL) {
		free(text);
		return 0;
	}
	*format++ = '\0';
	plan = strchr(format, '\n');
	if (plan != NULL)
		*plan++ = '\0';
	if (plan_derive(&p, NULL, 5, &(struct plan_rule){selector, format, 1}, 1, &err) == 0) {
		/* What was taken must come back from its own text. */
		char *own = plan_text(p);

		if (plan_parse(&q, 5, own, &err) != 0 || q->digest != p->digest)
			abort();
		plan_unref(&q);
		free(own);
	}
	if (plan != NULL && plan_parse(&q, 5, plan, &err) == 0) {
		char *own = plan_text(q);

		if (strcmp(own, plan) != 0)
			abort();
		free(own);
	}
	plan_unref(&p), plan_unref(&q);
	free(text);
	return 0;
}
