/* SPDX-License-Identifier: Apache-2.0 */
/* The sampling options that `octet complete` and `octet chat` share. */
#include <stdlib.h>
#include <string.h>

#include "client/cmd.h"

/* ID=VALUE */
static int
add_bias(const struct cmd *cmd, struct cmd_sampling *c, char *arg)
{
	struct octet_bias *b = &c->bias[c->s.n_bias];
	char *equals = strchr(arg, '=');
	uint64_t id;
	int rc;

	if (c->s.n_bias == CMD_MAX_BIAS)
		return cmd_usage(cmd, "more than %d --logit-bias", CMD_MAX_BIAS);
	if (equals == NULL)
		return cmd_usage(cmd, "--logit-bias '%s' is not ID=VALUE", arg);
	*equals = '\0';
	if ((rc = cmd_u64(cmd, "--logit-bias", arg, 0, UINT32_MAX, &id)) != 0 ||
	    (rc = cmd_float(cmd, "--logit-bias", equals + 1, -100, 100, &b->value)) != 0)
		return rc;
	b->id = (uint32_t)id;
	c->s.bias = c->bias;
	c->s.n_bias++;
	return 0;
}

static int
add_stop(const struct cmd *cmd, struct cmd_sampling *c, const char *arg)
{
	if (*arg == '\0')
		return cmd_usage(cmd, "--stop is empty");
	if (c->n_stops == CMD_MAX_STOPS)
		return cmd_usage(cmd, "more than %d --stop strings", CMD_MAX_STOPS);
	c->stop[c->n_stops++] = arg;
	return 0;
}

int
cmd_sampling_option(const struct cmd *cmd, struct cmd_sampling *c, int ch, char *arg)
{
	uint64_t n = 0;
	int rc = 0;

	switch (ch) {
	case CMD_MAX_TOKENS:
		rc = cmd_u64(cmd, "--max-tokens", arg, 1, UINT32_MAX, &n);
		c->s.max_tokens = (uint32_t)n;
		break;
	case CMD_TEMPERATURE: rc = cmd_float(cmd, "--temperature", arg, 0, 100, &c->s.temperature); break;
	case CMD_TOP_P: rc = cmd_float(cmd, "--top-p", arg, 1e-9, 1, &c->s.top_p); break;
	case CMD_TOP_K:
		rc = cmd_u64(cmd, "--top-k", arg, 0, UINT32_MAX, &n);
		c->s.top_k = (uint32_t)n;
		break;
	case CMD_SEED: rc = cmd_u64(cmd, "--seed", arg, 0, UINT64_MAX, &c->s.seed); break;
	case CMD_STOP: rc = add_stop(cmd, c, arg); break;
	case CMD_IGNORE_EOS: c->s.ignore_eos = 1; break;
	case CMD_MIN_P: rc = cmd_float(cmd, "--min-p", arg, 0, 1, &c->s.min_p); break;
	case CMD_REPETITION:
		rc = cmd_float(cmd, "--repetition-penalty", arg, 0.01, 100, &c->s.repetition_penalty);
		break;
	case CMD_PRESENCE: rc = cmd_float(cmd, "--presence-penalty", arg, -100, 100, &c->s.presence_penalty); break;
	case CMD_FREQUENCY: rc = cmd_float(cmd, "--frequency-penalty", arg, -100, 100, &c->s.frequency_penalty); break;
	case CMD_BIAS: rc = add_bias(cmd, c, arg); break;
	case CMD_POLICY: c->s.policy = arg; break;
	default: return -1;
	}
	return rc;
}
