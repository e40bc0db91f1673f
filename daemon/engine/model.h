/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_MODEL_H
#define OCTET_MODEL_H
/*
 * A model: shape from config.json, weights from safetensors, packed once into
 * nested planes. Immutable after model_load(), readable from any thread. It
 * knows nothing of plans, requests or tokenizers.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "client/err.h"
#include "daemon/engine/config.h"
#include "daemon/engine/packed.h"
#include "daemon/engine/plan.h"
#include "daemon/engine/team.h"
#include "kernels/kernels.h"

struct model_layer {
	float *input_norm, *post_norm;       /* [hidden] */
	float *q_norm, *k_norm;              /* [head_dim]; NULL: none */
	struct k_weight linear[GROUP_DOWN + 1]; /* by enum plan_group */
	float *bias[GROUP_DOWN + 1];         /* [output channels]; NULL: none */
};

struct model {
	char *path, *name;           /* name: the last part of the path */
	struct model_shape shape;
	uint64_t digest;             /* of config.json and the safetensors headers and sizes */
	struct model_layer *layer;   /* [n_layers] */
	struct k_weight lm_head;     /* [vocab, hidden]; also the embedding if tied */
	uint16_t *embed;             /* [vocab, hidden] BF16; NULL if tied */
	float *final_norm;           /* [hidden] */
	float *rope_cos, *rope_sin;  /* [max_context, head_dim / 2] */
	uint64_t weights_bytes;      /* planes, scales, flags, exceptions, embedding, norms, biases */
	uint64_t n_exceptions;
	void *arena; size_t arena_bytes; /* of the weights; of memory, or in the file that is mapped */
	void *rope;                  /* of rope_cos and rope_sin */
	uint64_t files;              /* names, sizes and times of the checkpoint's files */
	struct packed packed;
	struct err packed_why;       /* why a packed file that is there was not taken; empty: it was, or there is none */
	bool from_checkpoint;        /* set before model_pack(): a packed file is not taken */
	char *tokenizer_json, *tokenizer_config_json, *chat_template; /* whole files; the last two may be NULL */
	size_t tokenizer_json_len, tokenizer_config_json_len, chat_template_len;
	struct model_source *source; /* until it is packed */
};

/* Bytes the weights will take, from config.json alone. */
uint64_t model_plan_bytes(const struct model_shape *);

/* Reads the shape, the tokenizer's texts and the headers of the weights. max_context: 0, or a bound below the file's. */
int model_open(struct model **out, const char *dir, uint32_t max_context, struct err *);
/* Takes the weights from PACKED_NAME of the same directory, if that is of this checkpoint. Else checks them, then packs
 * them with the team (NULL: this thread), once. What model_open() read stays as it is: other
 * threads may read it meanwhile. check_only stops after the checks, NaN and Inf included, and frees nothing less: it is then
 * a model without planes, for its shape. progress (may be NULL) is called from this thread with 0..100.
 * extra_bytes: what else will be allocated (KV pool); the sum is checked against the memory available, -ENOMEM with both
 * numbers. After an error the model is only good for model_free(). */
int model_pack(struct model *, struct team *, uint64_t extra_bytes, bool check_only, void (*progress)(void *, int percent),
    void *arg, struct err *);
/* Both. */
int model_load(struct model **out, const char *dir, struct team *, uint32_t max_context,
    uint64_t extra_bytes, bool check_only, void (*progress)(void *, int percent), void *arg, struct err *);
/* Writes PACKED_NAME, of a model that was packed from its checkpoint. */
int model_write_packed(const struct model *, struct team *, struct err *);
void model_free(struct model **);
/* The embedding row of a token, FP32 [hidden]. */
void model_embed(const struct model *, uint32_t token, float *out);
#endif
