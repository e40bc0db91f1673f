/* SPDX-License-Identifier: Apache-2.0 */
/* A submission descriptor and the words of the prompt ring behind it, as an app
 * that lies would write them. The functions are server.c's own. */
#include "daemon/server.c" /* NOLINT */
#include "tests/fuzz/fuzz.h"

#define RING 256u

static struct plan *a_plan;

static int
policy(void *arg, const struct peer *peer, const char *name, uint64_t request, struct plan **plan, uint64_t *epoch,
    bool *rollout)
{
	(void)arg, (void)peer, (void)request, (void)rollout;
	*epoch = 1;
	*plan = name != NULL && *name == 'p' ? plan_ref(a_plan) : NULL;
	if (name != NULL && strlen(name) > WIRE_MAX_POLICY)
		abort();
	return name != NULL && *name == 'x' ? -EACCES : 0;
}

static struct plan *
plan(void *arg, uint64_t digest)
{
	(void)arg;
	return digest % 2 ? plan_ref(a_plan) : NULL;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static struct model model = {.shape = {.vocab = 300, .max_context = 128}};
	static uint32_t ring[RING];
	struct user user = {.uid = 1000};
	struct server v = {.cfg = {.max_requests = 4, .max_requests_per_uid = 4, .policy = policy, .plan = plan}, .model = &model, .prompt_ring = RING};
	struct session s = {.server = &v, .user = &user, .prompt = ring, .state = SESSION_OPEN};
	struct request *r = calloc(1, sizeof(*r));
	struct wire_desc d = {0};
	struct err err;

	if (a_plan == NULL && plan_derive(&a_plan, NULL, 3, NULL, 0, &err) != 0)
		abort();
	memcpy(&d, data, n < sizeof(d) ? n : sizeof(d));
	memset(ring, 0, sizeof(ring));
	if (n > sizeof(d))
		memcpy(ring, data + sizeof(d), n - sizeof(d) < sizeof(ring) ? n - sizeof(d) : sizeof(ring));
	if (read_request(&s, &d, r) == 0) {
		if (r->n_prompt == 0 || r->n_prompt > 128 || r->sampling.n_bias > WIRE_MAX_BIAS ||
		    (r->sampling.max_tokens == 0 && !r->sampling.prompt_logprobs) || !(r->sampling.temperature >= 0) ||
		    r->sampling.top_logprobs > WIRE_MAX_TOP)
			abort();
		for (uint32_t i = 0; i < r->n_prompt; i++)
			if (r->prompt[i] >= 300)
				abort();
		for (uint32_t i = 0; i < r->n_replay; i++)
			if (r->replay[i].plan == NULL || (i == 0) != (r->replay[i].from == 0))
				abort();
	}
	request_free(&r);
	return 0;
}
