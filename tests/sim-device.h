/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_SIM_DEVICE_H
#define OCTET_SIM_DEVICE_H
/*
 * What the device of sim-device.c computes instead of a model, for it and for the
 * test that foretells it. The state of a position is a hash of the state before
 * it, its token and its plan; it lies in the KV pages of all layers, with what it
 * was made of. So a row that finds a page of another, or a token that is not the
 * one drawn, makes another state, and all tokens after it are others.
 */
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define SIM_FAILS 100000u /* a device of this index or a higher one fails for good, with two steps under way */
#define SIM_EOS 3u
#define SIM_BAD_SEED 0xbadbadbadu /* a request with it is not finite at this position */
#define SIM_BAD_POSITION 40u

/* What a sample says of a site. */
#define SIM_SEEN 1024u /* values */
static inline uint32_t sim_zeros(uint32_t group, uint32_t layer) { return 20 * group + layer + 1; }
static inline uint32_t sim_saturated(uint32_t group, uint32_t layer) { return 20 * layer + group + 1; }

static inline uint64_t
sim_mix(uint64_t a, uint64_t b)
{
	a = (a ^ b) * 0x9E3779B97F4A7C15u;
	a = (a ^ a >> 29) * 0xBF58476D1CE4E5B9u;
	return a ^ a >> 32;
}

static inline uint64_t
sim_state(uint64_t before, uint32_t token, uint64_t digest)
{
	return sim_mix(sim_mix(before, token + 1), digest);
}

/* One token among those that penalties and biases change; summed over all of them. */
static inline uint64_t
sim_edit(uint32_t id, uint32_t n_output, bool seen, float bias)
{
	uint32_t bits;

	memcpy(&bits, &bias, sizeof(bits));
	return sim_mix(sim_mix(id, n_output * 2 + seen), bits);
}

struct sim_drawn {
	uint32_t token;
	float logprob;
};

/* The token at `position`; an end token once in 32. */
static inline struct sim_drawn
sim_draw(uint64_t state, uint64_t seed, uint32_t position, uint64_t edits, uint32_t vocab)
{
	uint64_t h = sim_mix(sim_mix(sim_mix(state, seed), position), edits);

	return (struct sim_drawn){h % 32 == 0 ? SIM_EOS : (uint32_t)(h >> 8) % vocab, -(float)(h >> 40) * 0x1p-24f};
}

static inline float
sim_logit(uint64_t state, uint32_t token)
{
	return (float)(sim_mix(state, token) >> 44) * 0x1p-18f;
}

static inline float
sim_score(uint64_t state, uint32_t token)
{
	return -(float)(sim_mix(state, token) >> 40) * 0x1p-24f;
}
#endif
