/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The model loader: the embedded model and small ones made here, bit for bit;
 * a table of broken directories, each with its message; a seeded loop of
 * mutated files that may fail but never crash.
 */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "daemon/engine/model.h"
#include "daemon/engine/safetensors.h"

#define MAX_TENSORS 64

static char scratch[] = "/tmp/octet-model-XXXXXX";
static const char *const files[] = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "model.safetensors", "model.safetensors.index.json", "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors", PACKED_NAME};

/* ---- random numbers: splitmix64 ---- */

static uint64_t rng_state;

static uint64_t
rng(void)
{
	uint64_t z = rng_state += 0x9e3779b97f4a7c15u;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

static uint32_t
below(uint32_t n)
{
	return (uint32_t)(rng() % n);
}

/* ---- a model directory in the making ---- */

struct fake_tensor {
	char name[96], dtype[8];
	char shape[80];      /* as in the header */
	uint32_t rows, cols; /* a norm has one row */
	int64_t from, to;
	uint8_t *data;       /* what the file holds */
	uint16_t *bits;      /* [rows * cols] what it must become */
};

struct fake {
	struct model_shape s;
	char config[2048], index[64], generation[256], tokenizer[64];
	struct fake_tensor t[MAX_TENSORS];
	uint32_t n;
	char *header;        /* replaces what the tensors say */
	uint64_t header_len; /* what the file claims, if not 0 */
	int64_t cut;         /* bytes taken off the file's end, or added to it if negative */
	uint64_t extra;
};

static uint32_t
elem_bytes(const char *dtype)
{
	return strcmp(dtype, "F32") == 0 ? 4 : 2;
}

static double
value_of_bf16(uint16_t b)
{
	uint32_t exp = b >> 7 & 0xff, frac = b & 0x7f;
	double v = exp == 0 ? ldexp(frac, -133) : ldexp(frac + 128.0, (int)exp - 134);

	return b & 0x8000 ? -v : v;
}

static double
value_of_f32(uint32_t u)
{
	uint32_t exp = u >> 23 & 0xff, frac = u & 0x7fffff;
	double v = exp == 0 ? ldexp(frac, -149) : ldexp(frac + 8388608.0, (int)exp - 150);

	return u >> 31 ? -v : v;
}

static double
value_of_f16(uint16_t h)
{
	uint32_t exp = h >> 10 & 0x1f, frac = h & 0x3ff;
	double v = exp == 0 ? ldexp(frac, -24) : ldexp(frac + 1024.0, (int)exp - 25);

	return h & 0x8000 ? -v : v;
}

/* The BF16 pattern nearest to v, the even one of two, by bisection over all
 * magnitudes: another way than the loader's. */
static uint16_t
nearest_bf16(double v, bool negative)
{
	uint32_t lo = 0, hi = 0x7f7f;
	double a = fabs(v), down, up;

	while (hi - lo > 1) {
		uint32_t mid = (lo + hi) / 2;

		if (value_of_bf16((uint16_t)mid) <= a)
			lo = mid;
		else
			hi = mid;
	}
	down = a - value_of_bf16((uint16_t)lo);
	up = value_of_bf16((uint16_t)hi) - a;
	if (up < down || (up == down && hi % 2 == 0))
		lo = hi;
	return (uint16_t)(lo | (negative ? 0x8000u : 0));
}

static void
put_element(struct fake_tensor *t, size_t i, uint32_t u)
{
	uint16_t h = (uint16_t)u;

	if (elem_bytes(t->dtype) == 4)
		memcpy(t->data + 4 * i, &u, 4);
	else
		memcpy(t->data + 2 * i, &h, 2);
}

/* Mostly like weights, some of any size, zeros of both signs, ties. */
static void
random_element(struct fake_tensor *t, size_t i)
{
	bool wild = below(16) == 0;

	if (strcmp(t->dtype, "F32") == 0) {
		uint32_t u = (uint32_t)rng() & 0x80ffffffu, exp = wild ? below(0xfe) : 110 + below(12);

		u = (u & 0x807fffffu) | exp << 23;
		if (below(32) == 0)
			u = (u & 0xffff0000u) | 0x8000u; /* half way */
		if (below(64) == 0)
			u &= 0x80000000u;
		put_element(t, i, u);
		t->bits[i] = nearest_bf16(value_of_f32(u), u >> 31);
	} else if (strcmp(t->dtype, "F16") == 0) {
		uint16_t h = (uint16_t)rng();

		h = (uint16_t)((h & 0x83ffu) | (wild ? below(0x1f) : 4 + below(8)) << 10);
		put_element(t, i, h);
		t->bits[i] = nearest_bf16(value_of_f16(h), h >> 15);
	} else {
		uint16_t b = (uint16_t)((rng() & 0x807fu) | (wild ? below(0xff) : 110 + below(12)) << 7);

		if (below(64) == 0)
			b &= 0x8000;
		put_element(t, i, b);
		t->bits[i] = b;
	}
}

static struct fake_tensor *
fake_tensor(struct fake *f, const char *dtype, uint32_t rows, uint32_t cols, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));

static struct fake_tensor *
fake_tensor(struct fake *f, const char *dtype, uint32_t rows, uint32_t cols, const char *fmt, ...)
{
	struct fake_tensor *t = &f->t[f->n++];
	size_t n = (size_t)rows * cols;
	va_list ap;

	assert_true(f->n <= MAX_TENSORS);
	va_start(ap, fmt);
	vsnprintf(t->name, sizeof(t->name), fmt, ap);
	va_end(ap);
	snprintf(t->dtype, sizeof(t->dtype), "%s", dtype);
	if (rows == 1) /* no matrix of these models has one */
		snprintf(t->shape, sizeof(t->shape), "[%u]", cols);
	else
		snprintf(t->shape, sizeof(t->shape), "[%u, %u]", rows, cols);
	t->rows = rows, t->cols = cols;
	t->data = malloc(n * elem_bytes(dtype));
	t->bits = malloc(n * sizeof(*t->bits));
	assert_true(t->data != NULL && t->bits != NULL);
	for (size_t i = 0; i < n; i++)
		random_element(t, i);
	return t;
}

static void
fake_layout(struct fake *f)
{
	int64_t at = 0;

	for (uint32_t i = 0; i < f->n; i++) {
		f->t[i].from = at;
		at += (int64_t)f->t[i].rows * f->t[i].cols * elem_bytes(f->t[i].dtype);
		f->t[i].to = at;
	}
}

static void
fake_config(struct fake *f)
{
	const struct model_shape *s = &f->s;

	snprintf(f->config, sizeof(f->config),
	    "{\"architectures\": [\"%s\"], \"hidden_size\": %u, \"intermediate_size\": %u,\n"
	    "\"num_hidden_layers\": %u, \"num_attention_heads\": %u, \"num_key_value_heads\": %u, \"head_dim\": %u,\n"
	    "\"vocab_size\": %u, \"max_position_embeddings\": %u, \"rms_norm_eps\": 1e-05, \"rope_theta\": 10000.0,\n"
	    "\"rope_scaling\": null, \"tie_word_embeddings\": %s, \"hidden_act\": \"silu\",\n"
	    "\"attention_bias\": %s, \"mlp_bias\": %s, \"eos_token_id\": 3}\n",
	    s->arch, s->hidden, s->intermediate, s->n_layers, s->n_heads, s->n_kv_heads, s->head_dim, s->vocab, s->max_context,
	    s->tied ? "true" : "false", s->o_bias ? "true" : "false", s->mlp_bias ? "true" : "false");
}

static const struct model_shape small = {
	.arch = "LlamaForCausalLM", .hidden = 36, .intermediate = 172, .n_layers = 2, .n_heads = 6, .n_kv_heads = 2, .head_dim = 10, .vocab = 67,
	.max_context = 48};
static const struct model_shape tiny = {
	.arch = "LlamaForCausalLM", .hidden = 8, .intermediate = 12, .n_layers = 1, .n_heads = 2, .n_kv_heads = 1, .head_dim = 4, .vocab = 34,
	.max_context = 16};

/* dtype NULL: another one for each tensor. */
static const char *
pick_dtype(const char *dtype)
{
	static const char *const mixed[] = {"F32", "BF16", "F16"};

	return dtype != NULL ? dtype : mixed[below(3)];
}

/* What architectures have beyond the first Llama. */
static void
fake_extras(struct fake *f, const char *dtype)
{
	const struct model_shape *s = &f->s;
	uint32_t q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;

	for (uint32_t l = 0; l < s->n_layers; l++) {
		if (s->qk_norm) {
			fake_tensor(f, pick_dtype(dtype), 1, s->head_dim, "model.layers.%u.self_attn.q_norm.weight", l);
			fake_tensor(f, pick_dtype(dtype), 1, s->head_dim, "model.layers.%u.self_attn.k_norm.weight", l);
		}
		if (s->qkv_bias) {
			fake_tensor(f, pick_dtype(dtype), 1, q, "model.layers.%u.self_attn.q_proj.bias", l);
			fake_tensor(f, pick_dtype(dtype), 1, kv, "model.layers.%u.self_attn.k_proj.bias", l);
			fake_tensor(f, pick_dtype(dtype), 1, kv, "model.layers.%u.self_attn.v_proj.bias", l);
		}
		if (s->o_bias)
			fake_tensor(f, pick_dtype(dtype), 1, s->hidden, "model.layers.%u.self_attn.o_proj.bias", l);
		if (s->mlp_bias) {
			fake_tensor(f, pick_dtype(dtype), 1, s->intermediate, "model.layers.%u.mlp.gate_proj.bias", l);
			fake_tensor(f, pick_dtype(dtype), 1, s->intermediate, "model.layers.%u.mlp.up_proj.bias", l);
			fake_tensor(f, pick_dtype(dtype), 1, s->hidden, "model.layers.%u.mlp.down_proj.bias", l);
		}
	}
}

static struct fake *
fake_new(const struct model_shape *shape, const char *dtype, bool tied, uint64_t seed)
{
	struct fake *f = calloc(1, sizeof(*f));
	struct model_shape *s;
	uint32_t q, kv;
#define DTYPE pick_dtype(dtype)

	assert_non_null(f);
	rng_state = seed;
	f->s = *shape;
	s = &f->s;
	s->tied = tied;
	fake_config(f);
	snprintf(f->tokenizer, sizeof(f->tokenizer), "{\"made\": \"by test_model\"}");
	q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
	fake_tensor(f, DTYPE, s->vocab, s->hidden, "model.embed_tokens.weight");
	if (s->qk_norm || s->qkv_bias || s->mlp_bias)
		fake_extras(f, dtype);
	for (uint32_t l = 0; l < s->n_layers; l++) {
		fake_tensor(f, DTYPE, 1, s->hidden, "model.layers.%u.input_layernorm.weight", l);
		fake_tensor(f, DTYPE, q, s->hidden, "model.layers.%u.self_attn.q_proj.weight", l);
		fake_tensor(f, DTYPE, kv, s->hidden, "model.layers.%u.self_attn.k_proj.weight", l);
		fake_tensor(f, DTYPE, kv, s->hidden, "model.layers.%u.self_attn.v_proj.weight", l);
		fake_tensor(f, DTYPE, s->hidden, q, "model.layers.%u.self_attn.o_proj.weight", l);
		fake_tensor(f, DTYPE, 1, s->hidden, "model.layers.%u.post_attention_layernorm.weight", l);
		fake_tensor(f, DTYPE, s->intermediate, s->hidden, "model.layers.%u.mlp.gate_proj.weight", l);
		fake_tensor(f, DTYPE, s->intermediate, s->hidden, "model.layers.%u.mlp.up_proj.weight", l);
		fake_tensor(f, DTYPE, s->hidden, s->intermediate, "model.layers.%u.mlp.down_proj.weight", l);
	}
	fake_tensor(f, DTYPE, 1, s->hidden, "model.norm.weight");
	if (!tied)
		fake_tensor(f, DTYPE, s->vocab, s->hidden, "lm_head.weight");
	fake_layout(f);
	return f;
}

static void
fake_free(struct fake *f)
{
	for (uint32_t i = 0; i < MAX_TENSORS; i++) {
		free(f->t[i].data);
		free(f->t[i].bits);
	}
	free(f->header);
	free(f);
}

static struct fake_tensor *
fake_find(struct fake *f, const char *name)
{
	for (uint32_t i = 0; i < f->n; i++)
		if (strcmp(f->t[i].name, name) == 0)
			return &f->t[i];
	fail_msg("the fake model has no '%s'", name);
	return NULL;
}

static const char *
in_scratch(const char *file)
{
	static char path[4][256];
	static unsigned turn;
	char *p = path[turn++ % 4];

	snprintf(p, sizeof(path[0]), "%s/%s", scratch, file);
	return p;
}

static void
write_file(const char *file, const void *data, size_t len)
{
	FILE *f = fopen(in_scratch(file), "w");

	assert_non_null(f);
	assert_int_equal(fwrite(data, 1, len, f), len);
	assert_int_equal(fclose(f), 0);
}

static void
write_text(const char *file, const char *text)
{
	if (text[0] != '\0')
		write_file(file, text, strlen(text));
}

/* The header as the tensors say, padded as the format advises. */
static char *
fake_header(const struct fake *f)
{
	size_t cap = 64 + f->n * 320, at;
	char *h = malloc(cap);

	assert_non_null(h);
	at = (size_t)snprintf(h, cap, "{\"__metadata__\": {\"format\": \"pt\"}");
	for (uint32_t i = 0; i < f->n; i++)
		at += (size_t)snprintf(h + at, cap - at,
		    ", \"%s\": {\"dtype\": \"%s\", \"shape\": %s, \"data_offsets\": [%" PRId64 ", %" PRId64 "]}",
		    f->t[i].name, f->t[i].dtype, f->t[i].shape, f->t[i].from, f->t[i].to);
	at += (size_t)snprintf(h + at, cap - at, "}");
	while (at % 8 != 3) /* odd on purpose: no alignment may be counted on */
		h[at++] = ' ';
	h[at] = '\0';
	return h;
}

/* The bytes of model.safetensors. */
static uint8_t *
fake_bytes(const struct fake *f, size_t *len, size_t *header_len)
{
	char *header = f->header != NULL ? strdup(f->header) : fake_header(f);
	uint64_t n = strlen(header), claim = f->header_len != 0 ? f->header_len : n;
	size_t data = 0, at = 8 + n;
	uint8_t *bytes;

	for (uint32_t i = 0; i < f->n; i++)
		if (f->t[i].data != NULL)
			data += (size_t)f->t[i].rows * f->t[i].cols * elem_bytes(f->t[i].dtype);
	bytes = calloc(1, 8 + n + data + 64);
	assert_non_null(bytes);
	memcpy(bytes, &claim, 8);
	memcpy(bytes + 8, header, n);
	for (uint32_t i = 0; i < f->n; i++) {
		size_t size = (size_t)f->t[i].rows * f->t[i].cols * elem_bytes(f->t[i].dtype);

		memcpy(bytes + at, f->t[i].data, size);
		at += size;
	}
	assert_true(f->cut >= -64 && f->cut <= (int64_t)at);
	*len = (size_t)((int64_t)at - f->cut);
	*header_len = 8 + n;
	free(header);
	return bytes;
}

static void
clean_scratch(void)
{
	for (size_t i = 0; i < sizeof(files) / sizeof(*files); i++)
		unlink(in_scratch(files[i]));
}

static void
fake_write(const struct fake *f)
{
	size_t len, header_len;
	uint8_t *bytes = fake_bytes(f, &len, &header_len);

	clean_scratch();
	write_text("config.json", f->config);
	write_text("generation_config.json", f->generation);
	write_text("tokenizer.json", f->tokenizer);
	write_text("model.safetensors.index.json", f->index);
	write_file("model.safetensors", bytes, len);
	free(bytes);
}

/* ---- loads that work ---- */

static struct model *
load(const char *dir, struct team *team)
{
	struct model *m;
	struct err err = {""};
	int rc = model_load(&m, dir, team, 0, 0, false, NULL, NULL, &err);

	if (rc != 0)
		fail_msg("%s: %s", dir, err.text);
	return m;
}

/* What a model has of what model_plan_bytes() says. */
static uint64_t
planned(const struct model *m)
{
	uint64_t table = (uint64_t)m->shape.max_context * (m->shape.head_dim / 2) * sizeof(float);

	return m->arena_bytes + 2 * ((table + 63) / 64 * 64);
}

static void
assert_linear(const struct k_weight *w, const uint16_t *bits, uint32_t n, uint32_t k, const char *name)
{
	assert_int_equal(w->n, n);
	assert_int_equal(w->k, k);
	for (uint32_t r = 0; r < n; r++)
		for (uint32_t c = 0; c < k; c++)
			if (k_unpack(w, r, c) != bits[(size_t)r * k + c])
				fail_msg("%s [%u, %u]: %04x, the master is %04x", name, r, c, k_unpack(w, r, c),
				    bits[(size_t)r * k + c]);
	for (uint32_t i = 1; i < w->n_exc; i++)
		assert_true(w->exc[i - 1].block < w->exc[i].block ||
		    (w->exc[i - 1].block == w->exc[i].block && w->exc[i - 1].index < w->exc[i].index));
}

/* Where a tensor went in a model; false for a norm or bias. */
static bool
assert_tensor(const struct model *m, const char *name, const uint16_t *bits, uint32_t rows, uint32_t cols)
{
	static const char *const part[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
	    "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"};
	const float *norm = m->final_norm;
	float *row;
	unsigned l;
	int at = 0;

	if (strcmp(name, "model.embed_tokens.weight") == 0) {
		row = malloc(cols * sizeof(*row));
		for (uint32_t r = 0; r < rows; r++) {
			model_embed(m, r, row);
			for (uint32_t c = 0; c < cols; c++)
				assert_int_equal(k_bf16_from_float(row[c]), bits[(size_t)r * cols + c]);
		}
		free(row);
		if (m->shape.tied)
			assert_linear(&m->lm_head, bits, rows, cols, name);
		return true;
	}
	if (strcmp(name, "lm_head.weight") == 0) {
		assert_linear(&m->lm_head, bits, rows, cols, name);
		return true;
	}
	if (sscanf(name, "model.layers.%u.%n", &l, &at) == 1) {
		for (unsigned g = 0; g < 7; g++) {
			if (strncmp(name + at, part[g], strlen(part[g])) != 0)
				continue;
			norm = m->layer[l].bias[g];
			if (strstr(name, ".bias") != NULL)
				break;
			assert_linear(&m->layer[l].linear[g], bits, rows, cols, name);
			return true;
		}
		if (strstr(name, "norm") != NULL)
			norm = strstr(name, "q_norm") != NULL          ? m->layer[l].q_norm
			    : strstr(name, "k_norm") != NULL          ? m->layer[l].k_norm
			    : strstr(name, "input_layernorm") != NULL ? m->layer[l].input_norm
			                                              : m->layer[l].post_norm;
	}
	for (uint32_t c = 0; c < cols; c++)
		assert_true(norm[c] == (float)value_of_bf16(bits[c]));
	return false;
}

static void
assert_same_model(const struct model *a, const struct model *b)
{
	assert_int_equal(a->arena_bytes, b->arena_bytes);
	assert_memory_equal(a->arena, b->arena, a->arena_bytes);
	assert_int_equal(a->n_exceptions, b->n_exceptions);
	assert_true(a->digest == b->digest);
	for (uint32_t l = 0; l < a->shape.n_layers; l++) {
		for (int g = 0; g <= GROUP_DOWN; g++) {
			const struct k_weight *x = &a->layer[l].linear[g], *y = &b->layer[l].linear[g];

			assert_int_equal(x->n_exc, y->n_exc);
			if (x->n_exc > 0)
				assert_memory_equal(x->exc, y->exc, x->n_exc * sizeof(*x->exc));
		}
	}
	assert_int_equal(a->lm_head.n_exc, b->lm_head.n_exc);
	if (a->lm_head.n_exc > 0)
		assert_memory_equal(a->lm_head.exc, b->lm_head.exc, a->lm_head.n_exc * sizeof(*a->lm_head.exc));
}

static const char *
proof_dir(void)
{
	static char path[4096];
	const char *src = getenv("srcdir");

	snprintf(path, sizeof(path), "%s/models/proof", src != NULL ? src : ".");
	return path;
}

static void
test_proof(void **state)
{
	struct timespec t0, t1;
	struct safetensors st;
	struct team *team;
	struct model *m, *one;
	struct err err;
	char path[4200];
	uint32_t linears = 0;

	(void)state;
	assert_int_equal(team_new(&team, 0, 50), 0);
	clock_gettime(CLOCK_MONOTONIC, &t0);
	m = load(proof_dir(), team);
	clock_gettime(CLOCK_MONOTONIC, &t1);
	print_message("# proof: %.0f ms with %u threads, %" PRIu64 " bytes of weights, %" PRIu64 " exceptions\n",
	    (double)(t1.tv_sec - t0.tv_sec) * 1e3 + (double)(t1.tv_nsec - t0.tv_nsec) / 1e6, team_size(team),
	    m->weights_bytes, m->n_exceptions);
	assert_string_equal(m->name, "proof");
	assert_int_equal(m->shape.hidden, 256);
	assert_int_equal(m->shape.intermediate, 768);
	assert_int_equal(m->shape.n_layers, 6);
	assert_int_equal(m->shape.n_heads, 4);
	assert_int_equal(m->shape.n_kv_heads, 2);
	assert_int_equal(m->shape.head_dim, 64);
	assert_int_equal(m->shape.vocab, 2048);
	assert_int_equal(m->shape.max_context, 512);
	assert_true(m->shape.tied && m->embed == NULL);
	assert_int_equal(m->shape.n_eos, 1);
	assert_int_equal(m->shape.eos[0], 3);
	assert_true(m->shape.rms_eps == 1e-5f && m->shape.rope_theta == 10000);
	assert_true(m->tokenizer_json[0] == '{' && strlen(m->tokenizer_json) == m->tokenizer_json_len);
	assert_true(m->tokenizer_config_json[0] == '{');

	snprintf(path, sizeof(path), "%s/model.safetensors", proof_dir());
	assert_int_equal(safetensors_open(&st, path, &err), 0);
	for (size_t i = 0; i < st.n; i++) {
		const struct st_tensor *t = &st.tensor[i];
		uint16_t *bits = malloc(t->to - t->from);

		assert_int_equal(t->dtype, ST_BF16);
		memcpy(bits, t->data, t->to - t->from);
		linears += assert_tensor(m, t->name, bits, t->n_dims == 1 ? 1 : (uint32_t)t->dim[0],
		    (uint32_t)t->dim[t->n_dims - 1]);
		free(bits);
	}
	assert_int_equal(linears, 6 * 7 + 1);
	safetensors_close(&st);

	one = load(proof_dir(), NULL);
	assert_same_model(m, one);
	model_free(&one);
	model_free(&m);
	assert_null(m);
	team_free(&team);
}

static void
set_config(struct fake *f, const char *key, const char *value)
{
	char old[sizeof(f->config)], *at, quoted[64];
	size_t len;
	int n;

	memcpy(old, f->config, sizeof(old));
	snprintf(quoted, sizeof(quoted), "\"%s\": ", key);
	at = strstr(old, quoted);
	assert_non_null(at);
	len = strlen(quoted);
	len += at[len] == '[' ? strcspn(at + len, "]") + 1 : strcspn(at + len, ",}");
	*at = '\0';
	/* A value NULL takes the key away. */
	if (value == NULL)
		n = snprintf(f->config, sizeof(f->config), "%s%s", old, at + len + 1);
	else
		n = snprintf(f->config, sizeof(f->config), "%s%s%s%s", old, quoted, value, at + len);
	assert_true(n > 0 && n < (int)sizeof(f->config));
}

/* The angles by the words of the papers, in another form than config.c has. */
static double
rope_angle(uint32_t pos, uint32_t i, uint32_t hd, const char *type)
{
	double wave = 2 * M_PI * pow(10000, 2.0 * i / hd), low = 64 / 1.0, high = 64 / 4.0, smooth;

	if (strcmp(type, "linear") == 0)
		return pos / 2.5 / pow(10000, 2.0 * i / hd);
	if (strcmp(type, "default") == 0 || wave < high)
		return 2 * M_PI * pos / wave;
	if (wave > low)
		return 2 * M_PI * pos / wave / 8;
	smooth = (64 / wave - 1) / (4 - 1);
	return (1 - smooth) * 2 * M_PI * pos / wave / 8 + smooth * 2 * M_PI * pos / wave;
}

static void
test_rope(void **state)
{
	static const struct { const char *type, *value; } ropes[] = {
	    {"default", NULL},
	    {"linear", "{\"type\": \"linear\", \"factor\": 2.5}"},
	    {"llama3", "{\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, "
	        "\"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 64}"},
	    {"llama3", "{\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, "
	        "\"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 64, \"rope_theta\": 10000}"},
	};

	(void)state;
	for (size_t n = 0; n < sizeof(ropes) / sizeof(*ropes); n++) {
		struct fake *f = fake_new(&small, "BF16", true, 7);
		struct model *m;
		uint32_t half = f->s.head_dim / 2;
		char value[320];

		/* rope_parameters is added beside a rope_scaling of null. */
		if (ropes[n].value != NULL) {
			snprintf(value, sizeof(value), "%s%s", n == 3 ? "null, \"rope_parameters\": " : "",
			    ropes[n].value);
			set_config(f, "rope_scaling", value);
		}
		fake_write(f);
		m = load(scratch, NULL);
		for (uint32_t pos = 0; pos < f->s.max_context; pos++) {
			for (uint32_t i = 0; i < half; i++) {
				double angle = rope_angle(pos, i, f->s.head_dim, ropes[n].type);

				assert_true(fabs(m->rope_cos[pos * half + i] - cos(angle)) < 1e-7);
				assert_true(fabs(m->rope_sin[pos * half + i] - sin(angle)) < 1e-7);
			}
		}
		assert_true(m->rope_cos[0] == 1 && m->rope_sin[0] == 0);
		model_free(&m);
		fake_free(f);
	}
}

static void
test_dtypes(void **state)
{
	static const char *const dtype[] = {"F32", "F16", "BF16", NULL};
	struct team *team;

	(void)state;
	assert_int_equal(team_new(&team, 2, 50), 0);
	for (uint32_t i = 0; i < 8; i++) {
		struct fake *f = fake_new(&small, dtype[i / 2], i % 2, 100 + i);
		struct model *one, *two;
		uint32_t linears = 0;

		fake_write(f);
		one = load(scratch, NULL);
		two = load(scratch, team);
		for (uint32_t t = 0; t < f->n; t++)
			linears += assert_tensor(one, f->t[t].name, f->t[t].bits, f->t[t].rows, f->t[t].cols);
		assert_int_equal(linears, 2 * 7 + (f->s.tied ? 1 : 2));
		assert_true(one->n_exceptions > 0); /* or the lists are not tested */
		assert_same_model(one, two);
		model_free(&one);
		model_free(&two);
		fake_free(f);
	}
	team_free(&team);
}

/* Every architecture: what it adds is loaded bit for bit, planned exactly and shared out alike. */
static void
test_archs(void **state)
{
	static const struct { struct model_shape s; const char *key, *value; uint32_t window; bool no_rope; } archs[] = {
	    {{.arch = "LlamaForCausalLM", .qkv_bias = true, .o_bias = true}, NULL, NULL, 0, false},
	    {{.arch = "LlamaForCausalLM", .mlp_bias = true}, NULL, NULL, 0, false},
	    {{.arch = "LlamaForCausalLM"}, "eos_token_id", "3, \"sliding_window\": 8, \"use_mrope\": false", 0, false},
	    {{.arch = "MistralForCausalLM"}, "eos_token_id", "3, \"sliding_window\": null", 0, false},
	    {{.arch = "MistralForCausalLM"}, "eos_token_id", "3, \"sliding_window\": 48", 0, false},
	    {{.arch = "MistralForCausalLM"}, "eos_token_id", "3, \"sliding_window\": 47", 47, false},
	    {{.arch = "MistralForCausalLM"}, "max_position_embeddings", "5000", 4096, false},
	    {{.arch = "Qwen2ForCausalLM", .qkv_bias = true}, "eos_token_id",
	        "3, \"sliding_window\": 8, \"use_sliding_window\": false, \"layer_types\": [\"full_attention\"]", 0, false},
	    {{.arch = "Qwen3ForCausalLM", .qk_norm = true}, NULL, NULL, 0, false},
	    {{.arch = "Qwen3ForCausalLM", .qk_norm = true, .qkv_bias = true, .o_bias = true}, NULL, NULL, 0, false},
	    {{.arch = "SmolLM3ForCausalLM"}, "eos_token_id", "3, \"no_rope_layer_interval\": 3", 0, false},
	    {{.arch = "SmolLM3ForCausalLM"}, "eos_token_id", "3, \"no_rope_layer_interval\": 2", 0, true},
	    {{.arch = "SmolLM3ForCausalLM"}, "eos_token_id", "3, \"no_rope_layers\": [1, 0, 1]", 0, true},
	    {{.arch = "Qwen3ForCausalLM", .qk_norm = true}, "eos_token_id", "3, \"no_rope_layers\": [1, 0]", 0, false},
	};
	struct team *team;

	(void)state;
	assert_int_equal(team_new(&team, 2, 50), 0);
	for (size_t i = 0; i < sizeof(archs) / sizeof(*archs); i++) {
		struct model_shape s = small, read;
		struct model *one, *two;
		struct fake *f;
		struct err err;
		uint32_t linears = 0;

		s.arch = archs[i].s.arch, s.qk_norm = archs[i].s.qk_norm;
		s.qkv_bias = archs[i].s.qkv_bias, s.o_bias = archs[i].s.o_bias, s.mlp_bias = archs[i].s.mlp_bias;
		f = fake_new(&s, NULL, i % 2, 300 + i);
		if (archs[i].key != NULL)
			set_config(f, archs[i].key, archs[i].value);
		fake_write(f);
		one = load(scratch, NULL);
		two = load(scratch, team);
		for (uint32_t t = 0; t < f->n; t++)
			linears += assert_tensor(one, f->t[t].name, f->t[t].bits, f->t[t].rows, f->t[t].cols);
		assert_int_equal(linears, 2 * 7 + (i % 2 ? 1 : 2));
		assert_same_model(one, two);
		assert_string_equal(one->shape.arch, s.arch);
		assert_int_equal(one->shape.window, archs[i].window);
		assert_true(!one->shape.no_rope[0] && one->shape.no_rope[1] == archs[i].no_rope);
		for (enum plan_group g = GROUP_Q; g <= GROUP_DOWN; g++)
			assert_true((one->layer[1].bias[g] != NULL) ==
			    (g <= GROUP_V ? s.qkv_bias : g == GROUP_O ? s.o_bias : s.mlp_bias));
		assert_true((one->layer[1].q_norm != NULL) == s.qk_norm);
		/* The shape alone says how much it will be. */
		assert_int_equal(config_read(&read, scratch, NULL, NULL, &err), 0);
		assert_true(model_plan_bytes(&read) == planned(one));
		model_free(&one);
		model_free(&two);
		fake_free(f);
	}
	team_free(&team);
}

struct told {
	int calls, last;
};

static void
on_progress(void *arg, int percent)
{
	struct told *t = arg;

	assert_true(percent >= t->last && percent <= 100);
	t->last = percent;
	t->calls++;
}

/* What is not an error: variants of files, and what is read from them. */
static void
test_variants(void **state)
{
	struct fake *f = fake_new(&small, "BF16", true, 11);
	struct fake_tensor *head;
	struct told told = {0, -1};
	struct model *m;
	struct err err;
	uint64_t digest;

	(void)state;
	fake_write(f);
	m = load(scratch, NULL);
	digest = m->digest;
	assert_true(model_plan_bytes(&m->shape) == planned(m));
	assert_null(m->tokenizer_config_json);
	model_free(&m);

	/* The context can be bounded, and the check gives a shape without planes. */
	assert_int_equal(model_load(&m, scratch, NULL, 16, 0, true, on_progress, &told, &err), 0);
	assert_int_equal(m->shape.max_context, 16);
	assert_true(m->arena == NULL && m->lm_head.hi == NULL && m->rope_cos == NULL);
	assert_true(told.calls > 2 && told.last == 100);
	model_free(&m);
	assert_int_equal(model_load(&m, scratch, NULL, 1u << 30, 0, true, NULL, NULL, &err), 0);
	assert_int_equal(m->shape.max_context, 48);
	model_free(&m);

	/* A second copy of the tied matrix, RoPE buffers, end tokens elsewhere. */
	head = fake_tensor(f, "BF16", f->s.vocab, f->s.hidden, "lm_head.weight");
	memcpy(head->data, f->t[0].data, (size_t)f->s.vocab * f->s.hidden * 2);
	fake_tensor(f, "F32", 1, 5, "model.layers.0.self_attn.rotary_emb.inv_freq");
	fake_layout(f);
	snprintf(f->generation, sizeof(f->generation), "{\"eos_token_id\": [5, 66, 5]}");
	fake_write(f);
	m = load(scratch, NULL);
	assert_int_equal(m->shape.n_eos, 2);
	assert_int_equal(m->shape.eos[0], 5);
	assert_int_equal(m->shape.eos[1], 66);
	assert_true(m->digest != digest);
	assert_tensor(m, f->t[0].name, f->t[0].bits, f->s.vocab, f->s.hidden);
	model_free(&m);

	/* Defaults of what Llama files may leave out; scaling by name none. */
	snprintf(f->generation, sizeof(f->generation), "{\"eos_token_id\": null}");
	snprintf(f->config, sizeof(f->config),
	    "{\"architectures\": [\"LlamaModel\", \"LlamaForCausalLM\"], \"hidden_size\": 36,\n"
	    "\"intermediate_size\": 172, \"num_hidden_layers\": 2, \"num_attention_heads\": 6, \"num_key_value_heads\": 2,\n"
	    "\"head_dim\": 10, \"vocab_size\": 67, \"max_position_embeddings\": 48, \"tie_word_embeddings\": true,\n"
	    "\"eos_token_id\": null, \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 500000}}");
	fake_write(f);
	m = load(scratch, NULL);
	assert_int_equal(m->shape.n_eos, 0);
	assert_true(m->shape.rope_theta == 500000 && m->shape.rms_eps == 1e-6f);
	model_free(&m);

	/* SmolLM3's own. */
	fake_config(f);
	set_config(f, "architectures", "[\"SmolLM3ForCausalLM\"]");
	set_config(f, "rope_theta", NULL);
	set_config(f, "tie_word_embeddings", NULL);
	fake_write(f);
	m = load(scratch, NULL);
	assert_true(m->shape.rope_theta == 2000000 && m->shape.tied);
	model_free(&m);
	fake_free(f);
}

/* ---- loads that must not work ---- */

#define UP1 "model.layers.1.mlp.up_proj.weight"
#define DOWN0 "model.layers.0.mlp.down_proj.weight"

#define BREAK(name) static void break_##name(struct fake *f)
#define CONFIG(name, key, value) BREAK(name) { set_config(f, key, value); }
BREAK(no_config) { f->config[0] = '\0'; }
BREAK(no_tokenizer) { f->tokenizer[0] = '\0'; }
BREAK(generation) { snprintf(f->generation, sizeof(f->generation), "{\"eos_token_id\": [1, 67]}"); }
BREAK(config_json) { snprintf(f->config, sizeof(f->config), "{\"a\": 1,\n\n}"); }
BREAK(config_array) { snprintf(f->config, sizeof(f->config), "[]"); }
BREAK(config_twice) { snprintf(f->config, sizeof(f->config), "{\"a\": 1, \"a\": 2}"); }
BREAK(cut) { f->cut = 1; }
BREAK(cut_short)
{
	f->cut = f->t[f->n - 1].to + 50;
}
BREAK(longer) { f->cut = -5; }
BREAK(header_len) { f->header_len = 1ull << 40; }
BREAK(header_len_wraps) { f->header_len = UINT64_MAX; }
BREAK(header_past_end) { f->header_len = 99999999; }
BREAK(header_json) { f->header = strdup("{\"a\": \x01}"); }
BREAK(header_array) { f->header = strdup("[1]"); }
BREAK(header_empty) { f->header = strdup("{}"); f->n = 0; }
BREAK(header_garbage)
{
	f->header = fake_header(f);
	memcpy(strchr(f->header, '\0') - 2, "xx", 2);
}
BREAK(twice) { snprintf(f->t[2].name, sizeof(f->t[2].name), "%s", f->t[1].name); }
BREAK(overlap)
{
	struct fake_tensor *t = fake_find(f, UP1);
	
	t->from -= 2, t->to -= 2;
}
BREAK(hole)
{
	f->cut = -6;
	for (struct fake_tensor *t = fake_find(f, UP1); t < f->t + f->n; t++)
		t->from += 6, t->to += 6;
}
BREAK(past_end) { fake_find(f, UP1)->to += 1ll << 40; }
BREAK(backwards)
{
	struct fake_tensor *t = fake_find(f, UP1);
	int64_t from = t->from;
	
	t->from = t->to, t->to = from;
}
BREAK(negative) { fake_find(f, UP1)->from = -2; }
BREAK(transposed) { snprintf(fake_find(f, UP1)->shape, 80, "[36, 172]"); }
BREAK(rank1) { snprintf(fake_find(f, UP1)->shape, 80, "[6192]"); }
BREAK(rank3) { snprintf(fake_find(f, UP1)->shape, 80, "[1, 172, 36]"); }
BREAK(rank5) { snprintf(fake_find(f, UP1)->shape, 80, "[1, 1, 1, 172, 36]"); }
BREAK(norm_shape) { snprintf(fake_find(f, "model.norm.weight")->shape, 80, "[2, 18]"); }
BREAK(bytes) { snprintf(fake_find(f, UP1)->shape, 80, "[172, 37]"); }
BREAK(shape_wraps) { snprintf(fake_find(f, UP1)->shape, 80, "[4294967296, 4294967296, 172, 36]"); }
BREAK(shape_negative) { snprintf(fake_find(f, UP1)->shape, 80, "[-172, -36]"); }
BREAK(shape_real) { snprintf(fake_find(f, UP1)->shape, 80, "[172.0, 36]"); }
BREAK(shape_null) { snprintf(fake_find(f, UP1)->shape, 80, "null"); }
BREAK(dtype) { snprintf(fake_find(f, UP1)->dtype, 8, "F8_E4M3"); }
BREAK(missing) { snprintf(fake_find(f, UP1)->name, 96, "model.layers.7.mlp.up_proj.weight"); }
BREAK(extra) { fake_tensor(f, "BF16", 1, 60, "model.layers.0.self_attn.q_proj.bias"); fake_layout(f); }
BREAK(extra_ugly) { fake_tensor(f, "BF16", 1, 60, "a\\u001b[2J\\n\xc2\x9b"); fake_layout(f); }
BREAK(nan) { put_element(fake_find(f, UP1), 171 * 36 + 35, 0xffc1); }
BREAK(inf)
{
	put_element(fake_find(f, UP1), 40, 0x7f80);
	put_element(fake_find(f, UP1), 6100, 0x7f80); /* the first is told */
}
BREAK(minus_inf) { put_element(fake_find(f, "model.embed_tokens.weight"), 36, 0xff80); }
BREAK(norm_nan) { put_element(fake_find(f, "model.norm.weight"), 35, 0x7fff); }
BREAK(half_nan) { put_element(fake_find(f, DOWN0), 172 + 9, 0x7c01); }
BREAK(half_inf) { put_element(fake_find(f, DOWN0), 172 + 9, 0xfc00); }
BREAK(float_nan) { put_element(fake_find(f, DOWN0), 35 * 172 + 171, 0x7fffffff); }
BREAK(float_nan_low) { put_element(fake_find(f, DOWN0), 0, 0xff800001); }
BREAK(float_inf) { put_element(fake_find(f, DOWN0), 2, 0x7f800000); }
BREAK(float_big) { put_element(fake_find(f, DOWN0), 3, 0xff7f8000); }
BREAK(lm_head_nan) { put_element(fake_find(f, "lm_head.weight"), 66 * 36, 0x7fc0); }
BREAK(embed_nan) { put_element(fake_find(f, "model.embed_tokens.weight"), 66 * 36, 0x7fc0); }
BREAK(no_lm_head) { f->n--; fake_layout(f); }
BREAK(tied_differs) { set_config(f, "tie_word_embeddings", "true"); }
BREAK(memory) { f->extra = 1000000000000000; }
BREAK(memory_wraps) { f->extra = UINT64_MAX; }
CONFIG(arch, "architectures", "[\"GPT2LMHeadModel\"]")
BREAK(no_rope)
{
	set_config(f, "architectures", "[\"SmolLM3ForCausalLM\"]");
	set_config(f, "eos_token_id", "3, \"no_rope_layers\": [1]");
}
BREAK(no_rope_text)
{
	set_config(f, "architectures", "[\"SmolLM3ForCausalLM\"]");
	set_config(f, "eos_token_id", "3, \"no_rope_layers\": [1, \"0\"]");
}
BREAK(no_rope_interval)
{
	set_config(f, "architectures", "[\"SmolLM3ForCausalLM\"]");
	set_config(f, "eos_token_id", "3, \"no_rope_layer_interval\": 0");
}
BREAK(smollm3_kv_heads)
{
	set_config(f, "architectures", "[\"SmolLM3ForCausalLM\"]");
	set_config(f, "num_key_value_heads", NULL);
}
BREAK(qwen2_no_bias) { set_config(f, "architectures", "[\"Qwen2ForCausalLM\"]"); }
BREAK(qwen3_no_norm) { set_config(f, "architectures", "[\"Qwen3ForCausalLM\"]"); }
BREAK(qwen3_no_head_dim)
{
	set_config(f, "architectures", "[\"Qwen3ForCausalLM\"]");
	set_config(f, "head_dim", NULL);
}
BREAK(qwen3_norm_shape)
{
	set_config(f, "architectures", "[\"Qwen3ForCausalLM\"]");
	for (uint32_t l = 0; l < 2; l++) {
		fake_tensor(f, "BF16", 1, 10, "model.layers.%u.self_attn.q_norm.weight", l);
		fake_tensor(f, "BF16", 1, l == 0 ? 10 : 60, "model.layers.%u.self_attn.k_norm.weight", l);
	}
	fake_layout(f);
}
BREAK(llama_norm) { fake_tensor(f, "BF16", 1, 10, "model.layers.0.self_attn.q_norm.weight"); fake_layout(f); }
BREAK(bias_shape)
{
	set_config(f, "attention_bias", "true");
	fake_tensor(f, "BF16", 1, 20, "model.layers.0.self_attn.q_proj.bias");
	fake_layout(f);
}
BREAK(bias_nan)
{
	set_config(f, "mlp_bias", "true");
	for (uint32_t l = 0; l < 2; l++) {
		fake_tensor(f, "BF16", 1, 172, "model.layers.%u.mlp.gate_proj.bias", l);
		fake_tensor(f, "BF16", 1, 172, "model.layers.%u.mlp.up_proj.bias", l);
		fake_tensor(f, "BF16", 1, 36, "model.layers.%u.mlp.down_proj.bias", l);
	}
	fake_layout(f);
	put_element(&f->t[f->n - 1], 35, 0x7fc0);
}
BREAK(mistral_bias)
{
	set_config(f, "architectures", "[\"MistralForCausalLM\"]");
	set_config(f, "attention_bias", "true");
}
BREAK(mistral_window)
{
	set_config(f, "architectures", "[\"MistralForCausalLM\"]");
	set_config(f, "eos_token_id", "3, \"sliding_window\": 0");
}
BREAK(mistral_kv_heads)
{
	set_config(f, "architectures", "[\"MistralForCausalLM\"]");
	set_config(f, "num_key_value_heads", NULL);
}
CONFIG(qwen_window, "eos_token_id", "3, \"use_sliding_window\": true")
CONFIG(layer_types, "eos_token_id", "3, \"layer_types\": [\"full_attention\", \"sliding_attention\"]")
CONFIG(quantized, "eos_token_id", "3, \"quantization_config\": {\"quant_method\": \"fp8\"}")
CONFIG(partial, "eos_token_id", "3, \"partial_rotary_factor\": 0.5")
CONFIG(mrope, "eos_token_id", "3, \"use_mrope\": true")
CONFIG(no_arch, "architectures", NULL)
CONFIG(arch_number, "architectures", "[7]")
CONFIG(act, "hidden_act", "\"gelu\"")
CONFIG(attention_bias, "attention_bias", "true")
CONFIG(mlp_bias, "mlp_bias", "true")
CONFIG(rope, "rope_scaling", "{\"rope_type\": \"llama3\"}")
CONFIG(bias_text, "attention_bias", "\"yes\"")
CONFIG(rope_old, "rope_scaling", "{\"type\": \"linear\"}")
CONFIG(rope_yarn, "rope_scaling", "{\"type\": \"yarn\", \"factor\": 4}")
CONFIG(rope_factor, "rope_scaling", "{\"rope_type\": \"linear\", \"factor\": 0.5}")
CONFIG(rope_factor_text, "rope_scaling", "{\"rope_type\": \"linear\", \"factor\": \"2\"}")
CONFIG(rope_low, "rope_scaling", "{\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, "
    "\"high_freq_factor\": 4, \"original_max_position_embeddings\": 32}")
CONFIG(rope_original, "rope_scaling", "{\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, "
    "\"high_freq_factor\": 4}")
CONFIG(rope_both, "rope_scaling", "{\"type\": \"linear\", \"factor\": 2}, "
    "\"rope_parameters\": {\"rope_type\": \"linear\", \"factor\": 2}")
CONFIG(rope_no_type, "rope_scaling", "{\"factor\": 8}")
CONFIG(no_hidden, "hidden_size", NULL)
CONFIG(hidden_text, "hidden_size", "\"36\"")
CONFIG(hidden_zero, "hidden_size", "0")
CONFIG(hidden_negative, "hidden_size", "-36")
CONFIG(hidden_huge, "hidden_size", "65537")
CONFIG(hidden_wraps, "hidden_size", "4294967332")
CONFIG(hidden_real, "hidden_size", "36.0")
CONFIG(hidden_too_big, "hidden_size", "36000000000000000000")
CONFIG(intermediate, "intermediate_size", "2147483648")
CONFIG(layers, "num_hidden_layers", "257")
CONFIG(heads, "num_attention_heads", "0")
CONFIG(kv_heads, "num_key_value_heads", "4")
CONFIG(head_dim, "head_dim", "9")
CONFIG(head_dim_big, "head_dim", "258")
CONFIG(vocab, "vocab_size", "1048577")
CONFIG(context, "max_position_embeddings", "100000000")
CONFIG(eps, "rms_norm_eps", "0")
CONFIG(eps_text, "rms_norm_eps", "\"1e-5\"")
CONFIG(theta, "rope_theta", "-1")
CONFIG(tied_text, "tie_word_embeddings", "\"no\"")
CONFIG(eos, "eos_token_id", "67")
CONFIG(eos_negative, "eos_token_id", "[-1]")
CONFIG(eos_text, "eos_token_id", "\"</s>\"")
CONFIG(eos_many, "eos_token_id", "[1,2,3,4,5,6,7,8,9]")
BREAK(layers_more) { set_config(f, "num_hidden_layers", "3"); }
BREAK(no_head_dim) { set_config(f, "head_dim", NULL); set_config(f, "num_attention_heads", "8"); }

static const struct broken {
	const char *what;
	void (*apply)(struct fake *);
	const char *dtype; /* BF16 if NULL */
	bool untied;
	const char *expect; /* '@': the directory; one '*' matches anything */
} broken[] = {
#define B(name, expect) {#name, break_##name, NULL, false, expect}
#define ST "model.safetensors: "
	B(no_config, "@/config.json: No such file or directory"),
	B(no_tokenizer, "@/tokenizer.json: No such file or directory"),
	B(config_json, "config.json:3: string or '}' expected near '}'"),
	B(config_array, "config.json: not a JSON object"),
	B(config_twice, "config.json:1: duplicate object key near '\"a\"'"),
	B(arch, "config.json: architecture 'GPT2LMHeadModel' is not supported (LlamaForCausalLM, MistralForCausalLM, "
	    "Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM are)"),
	B(no_rope, "config.json: no_rope_layers is no list of 2 layers"),
	B(no_rope_text, "config.json: no_rope_layers is no list of 2 layers"),
	B(no_rope_interval, "config.json: no_rope_layer_interval = 0 is not from 1 to 4294967295"),
	B(smollm3_kv_heads, "config.json: num_key_value_heads is missing"),
	B(qwen2_no_bias, ST "tensor 'model.layers.0.self_attn.q_proj.bias' is missing"),
	B(qwen3_no_norm, ST "tensor 'model.layers.0.self_attn.q_norm.weight' is missing"),
	B(qwen3_no_head_dim, "config.json: head_dim is missing"),
	B(qwen3_norm_shape, ST "tensor 'model.layers.1.self_attn.k_norm.weight' has shape [60], expected [10]"),
	B(llama_norm, ST "tensor 'model.layers.0.self_attn.q_norm.weight' is not part of LlamaForCausalLM"),
	B(bias_shape, ST "tensor 'model.layers.0.self_attn.q_proj.bias' has shape [20], expected [60]"),
	B(bias_nan, ST "tensor 'model.layers.1.mlp.down_proj.bias' holds NaN at [35]"),
	B(mistral_bias, "config.json: attention_bias is not supported"),
	B(mistral_window, "config.json: sliding_window = 0 is not from 1 to 16777216"),
	B(mistral_kv_heads, "config.json: num_key_value_heads is missing"),
	B(qwen_window, "config.json: use_sliding_window is not supported"),
	B(layer_types, "config.json: layer_types 'sliding_attention' is not supported (full_attention is)"),
	B(quantized, "config.json: quantization_config is not supported (F32, F16 and BF16 weights are)"),
	B(partial, "config.json: partial_rotary_factor 0.5 is not supported (1 is)"),
	B(mrope, "config.json: use_mrope is not supported"),
	B(no_arch, "config.json: architectures is missing"),
	B(arch_number, "config.json: architectures is missing"),
	B(act, "config.json: hidden_act 'gelu' is not supported (silu is)"),
	B(attention_bias, ST "tensor 'model.layers.0.self_attn.q_proj.bias' is missing"),
	B(mlp_bias, ST "tensor 'model.layers.0.mlp.gate_proj.bias' is missing"),
	B(bias_text, "config.json: attention_bias is neither true nor false"),
	B(rope, "config.json: rope_scaling: factor is missing"),
	B(rope_old, "config.json: rope_scaling: factor is missing"),
	B(rope_yarn, "config.json: rope_scaling of type 'yarn' is not supported (default, linear and llama3 are)"),
	B(rope_factor, "config.json: rope_scaling: factor = 0.5 is not from 1 to 1e+06"),
	B(rope_factor_text, "config.json: rope_scaling: factor is no number"),
	B(rope_low, "config.json: rope_scaling: low_freq_factor 4 is not below high_freq_factor 4"),
	B(rope_original, "config.json: rope_scaling: original_max_position_embeddings is missing"),
	B(rope_both, "config.json: rope_scaling and rope_parameters both scale"),
	B(rope_no_type, "config.json: rope_scaling has no rope_type"),
	B(no_hidden, "config.json: hidden_size is missing"),
	B(hidden_text, "config.json: hidden_size is no integer"),
	B(hidden_zero, "config.json: hidden_size = 0 is not from 1 to 65536"),
	B(hidden_negative, "config.json: hidden_size = -36 is not from 1 to 65536"),
	B(hidden_huge, "config.json: hidden_size = 65537 is not from 1 to 65536"),
	B(hidden_wraps, "config.json: hidden_size = 4294967332 is not from 1 to 65536"),
	B(hidden_real, "config.json: hidden_size is no integer"),
	B(hidden_too_big, "config.json:1: too big integer near '36000000000000000000'"),
	B(intermediate, "config.json: intermediate_size = 2147483648 is not from 1 to 1048576"),
	B(layers, "config.json: num_hidden_layers = 257 is not from 1 to 256"),
	B(heads, "config.json: num_attention_heads = 0 is not from 1 to 1024"),
	B(kv_heads, "config.json: num_attention_heads 6 is no multiple of num_key_value_heads 4"),
	B(head_dim, "config.json: head_dim 9 is not even or over 256"),
	B(head_dim_big, "config.json: head_dim = 258 is not from 1 to 256"),
	B(no_head_dim, "config.json: hidden_size 36 is no multiple of num_attention_heads 8"),
	B(vocab, "config.json: vocab_size = 1048577 is not from 1 to 1048576"),
	B(context, "config.json: max_position_embeddings = 100000000 is not from 1 to 16777216"),
	B(eps, "config.json: rms_norm_eps = 0 is not from 1e-30 to 1"),
	B(eps_text, "config.json: rms_norm_eps is no number"),
	B(theta, "config.json: rope_theta = -1 is not from 1 to 1e+15"),
	B(tied_text, "config.json: tie_word_embeddings is neither true nor false"),
	B(eos, "config.json: eos_token_id 67 is not below vocab_size 67"),
	B(eos_negative, "config.json: eos_token_id -1 is not below vocab_size 67"),
	B(eos_text, "config.json: eos_token_id is no token id or list of them"),
	B(eos_many, "config.json: eos_token_id has more than 8 tokens"),
	B(generation, "generation_config.json: eos_token_id 67 is not below vocab_size 67"),
	B(cut, ST "tensor 'model.norm.weight' ends at byte 102528 of the data, the file has 102527"),
	B(cut_short, ST "header of * bytes in a file of *"),
	B(longer, ST "5 bytes after the last tensor"),
	B(header_len, ST "header of 1099511627776 bytes, at most 100000000 are read"),
	B(header_len_wraps, ST "header of 18446744073709551615 bytes, at most 100000000 are read"),
	B(header_past_end, ST "header of 99999999 bytes in a file of *"),
	B(header_json, ST "header, byte 7: invalid token near '?'"),
	B(header_array, ST "header: not a JSON object"),
	B(header_empty, ST "tensor 'model.layers.0.input_layernorm.weight' is missing"),
	B(header_garbage, ST "header, byte *near 'xx'"),
	B(twice, ST "header, byte *: duplicate object key"),
	B(overlap, ST "tensor '" UP1 "' overlaps 'model.layers.1.mlp.gate_proj.weight'"),
	B(hole, ST "hole of 6 bytes before tensor '" UP1 "'"),
	B(past_end, ST "tensor '" UP1 "' ends at byte 1099511717848 of the data, the file has 102528"),
	B(backwards, ST "tensor '" UP1 "' has data_offsets that are no [begin, end]"),
	B(negative, ST "tensor '" UP1 "' has data_offsets that are no [begin, end]"),
	B(transposed, ST "tensor '" UP1 "' has shape [36, 172], expected [172, 36]"),
	B(rank1, ST "tensor '" UP1 "' has shape [6192], expected [172, 36]"),
	B(rank3, ST "tensor '" UP1 "' has shape [1, 172, 36], expected [172, 36]"),
	B(rank5, ST "tensor '" UP1 "' has no shape of at most 4 dimensions"),
	B(norm_shape, ST "tensor 'model.norm.weight' has shape [2, 18], expected [36]"),
	B(bytes, ST "tensor '" UP1 "' has 12384 bytes, its shape takes 12728 in BF16"),
	B(shape_wraps, ST "tensor '" UP1 "' has a shape without bounds"),
	B(shape_negative, ST "tensor '" UP1 "' has a shape that is no list of sizes"),
	B(shape_real, ST "tensor '" UP1 "' has a shape that is no list of sizes"),
	B(shape_null, ST "tensor '" UP1 "' has no shape of at most 4 dimensions"),
	B(dtype, ST "tensor '" UP1 "' has dtype F8_E4M3 (F32, F16 and BF16 are supported)"),
	B(missing, ST "tensor '" UP1 "' is missing"),
	B(layers_more, ST "tensor 'model.layers.2.input_layernorm.weight' is missing"),
	B(extra, ST "tensor 'model.layers.0.self_attn.q_proj.bias' is not part of LlamaForCausalLM"),
	B(extra_ugly, ST "tensor 'a?[2J?" "?" "?' is not part of LlamaForCausalLM"),
	B(nan, ST "tensor '" UP1 "' holds NaN at [171, 35]"),
	B(inf, ST "tensor '" UP1 "' holds Inf at [1, 4]"),
	B(minus_inf, ST "tensor 'model.embed_tokens.weight' holds -Inf at [1, 0]"),
	B(norm_nan, ST "tensor 'model.norm.weight' holds NaN at [35]"),
	{"half_nan", break_half_nan, "F16", false, ST "tensor '" DOWN0 "' holds NaN at [1, 9]"},
	{"half_inf", break_half_inf, "F16", false, ST "tensor '" DOWN0 "' holds -Inf at [1, 9]"},
	{"float_nan", break_float_nan, "F32", false, ST "tensor '" DOWN0 "' holds NaN at [35, 171]"},
	{"float_nan_low", break_float_nan_low, "F32", false, ST "tensor '" DOWN0 "' holds NaN at [0, 0]"},
	{"float_inf", break_float_inf, "F32", false, ST "tensor '" DOWN0 "' holds Inf at [0, 2]"},
	{"float_big", break_float_big, "F32", false,
	    ST "tensor '" DOWN0 "' holds -3.39617753e+38 at [0, 3], too large for BF16"},
	{"lm_head_nan", break_lm_head_nan, NULL, true, ST "tensor 'lm_head.weight' holds NaN at [66, 0]"},
	{"embed_nan", break_embed_nan, NULL, true, ST "tensor 'model.embed_tokens.weight' holds NaN at [66, 0]"},
	{"no_lm_head", break_no_lm_head, NULL, true,
	    ST "tensor 'lm_head.weight' is missing, and tie_word_embeddings is not true"},
	{"tied_differs", break_tied_differs, NULL, true,
	    ST "tensor 'lm_head.weight' differs from 'model.embed_tokens.weight' it is tied to"},
	B(memory, "model needs * kB of weights and 1.00 PB of KV cache, * of memory is available"),
	B(memory_wraps, "model needs * kB of weights and 18.4 EB of KV cache, * of memory is available"),
#undef B
};

/* A '*' in the pattern matches as little as it can. */
static bool
matches(const char *text, const char *pattern)
{
	for (; *pattern != '\0'; pattern++, text++) {
		if (*pattern == '*') {
			while (!matches(text, pattern + 1))
				if (*text++ == '\0')
					return false;
			return true;
		}
		if (*text != *pattern)
			return false;
	}
	return *text == '\0';
}

static void
assert_refused(const char *what, const char *dir, struct team *team, uint64_t extra, bool check_only,
    const char *expect)
{
	struct model *m = (struct model *)(uintptr_t)1;
	struct err err = {""};
	char full[512];
	int rc;

	snprintf(full, sizeof(full), "%s%s", expect[0] == '@' ? dir : "", expect + (expect[0] == '@'));
	rc = model_load(&m, dir, team, 0, extra, check_only, NULL, NULL, &err);
	if (rc >= 0)
		fail_msg("%s: was not refused", what);
	if (!matches(err.text, full))
		fail_msg("%s:\n  got      %s\n  expected %s", what, err.text, full);
	assert_null(m);
}

static void
test_broken(void **state)
{
	struct team *team;

	(void)state;
	assert_int_equal(team_new(&team, 2, 50), 0);
	for (size_t i = 0; i < sizeof(broken) / sizeof(*broken); i++) {
		const struct broken *b = &broken[i];
		struct fake *f = fake_new(&small, b->dtype != NULL ? b->dtype : "BF16", !b->untied, 1000 + i);

		b->apply(f);
		fake_write(f);
		assert_refused(b->what, scratch, NULL, f->extra, false, b->expect);
		assert_refused(b->what, scratch, team, f->extra, false, b->expect);
		assert_refused(b->what, scratch, team, f->extra, true, b->expect);
		fake_free(f);
	}
	team_free(&team);
}

static void
test_files(void **state)
{
	struct fake *f = fake_new(&small, "BF16", true, 12);

	(void)state;
	assert_refused("no directory", "/nonexistent/model", NULL, 0, false,
	    "/nonexistent/model: No such file or directory");
	fake_write(f);
	assert_refused("no directory", in_scratch("config.json"), NULL, 0, false, "@: Not a directory");
	unlink(in_scratch("model.safetensors"));
	assert_refused("no weights", scratch, NULL, 0, false,
	    "@: neither model.safetensors nor model.safetensors.index.json");
	write_text("model.safetensors", "1234567");
	assert_refused("7 bytes", scratch, NULL, 0, false,
	    "model.safetensors: a file of 7 bytes holds no safetensors header");
	write_file("model.safetensors", "\0\0\0\0\0\0\0\0", 8);
	assert_refused("empty header", scratch, NULL, 0, false,
	    "model.safetensors: header, byte 0: '[' or '{' expected near end of file");
	fake_write(f);
	unlink(in_scratch("model.safetensors"));
	assert_int_equal(mkfifo(in_scratch("model.safetensors"), 0600), 0);
	assert_refused("FIFO", scratch, NULL, 0, false, "@/model.safetensors: not a regular file");
	fake_write(f);
	unlink(in_scratch("config.json"));
	assert_int_equal(mkfifo(in_scratch("config.json"), 0600), 0);
	assert_refused("FIFO", scratch, NULL, 0, false, "@/config.json: not a regular file");
	fake_write(f);
	assert_int_equal(truncate(in_scratch("tokenizer.json"), (64 << 20) + 1), 0);
	assert_refused("large tokenizer", scratch, NULL, 0, false,
	    "@/tokenizer.json: 67108865 bytes, at most 67108864 are read");
	fake_free(f);
}

/* ---- shards ---- */

#define N_SHARDS 3
#define SHARD(n) "model-0000" #n "-of-00003.safetensors"

static const char *const shard_file[N_SHARDS] = {SHARD(1), SHARD(2), SHARD(3)};

/* A fake model cut into files, and what its index says. */
struct sharded {
	struct fake *f;
	bool in[N_SHARDS][MAX_TENSORS];
	char listed[MAX_TENSORS][160]; /* a JSON value; "": not in the index */
	const char *index;            /* replaces the index */
	const char *unlink;
	int cut;                      /* a shard without its last byte, or -1 */
};

static void
shard_fake(struct sharded *s, struct fake *f)
{
	*s = (struct sharded){.f = f, .cut = -1};
	for (uint32_t i = 0; i < f->n; i++) {
		uint32_t n = i * N_SHARDS / f->n;

		s->in[n][i] = true;
		snprintf(s->listed[i], sizeof(s->listed[i]), "\"%s\"", shard_file[n]);
	}
}

static char *
sharded_index(const struct sharded *s)
{
	size_t cap = 64 + s->f->n * 280, at;
	char *text = malloc(cap);
	const char *comma = "";

	assert_non_null(text);
	at = (size_t)snprintf(text, cap, "{\"metadata\": {\"total_size\": 1}, \"weight_map\": {");
	for (uint32_t i = 0; i < s->f->n; i++) {
		if (s->listed[i][0] == '\0')
			continue;
		at += (size_t)snprintf(text + at, cap - at, "%s\n\"%s\": %s", comma, s->f->t[i].name, s->listed[i]);
		comma = ",";
	}
	snprintf(text + at, cap - at, "}}\n");
	return text;
}

static void
sharded_write(const struct sharded *s)
{
	char *index = sharded_index(s);

	fake_write(s->f);
	unlink(in_scratch("model.safetensors"));
	for (int n = 0; n < N_SHARDS; n++) {
		struct fake *part = calloc(1, sizeof(*part));
		size_t len, header_len;
		uint8_t *bytes;

		assert_non_null(part);
		for (uint32_t i = 0; i < s->f->n; i++)
			if (s->in[n][i])
				part->t[part->n++] = s->f->t[i];
		fake_layout(part);
		part->cut = s->cut == n;
		bytes = fake_bytes(part, &len, &header_len);
		write_file(shard_file[n], bytes, len);
		free(bytes);
		free(part);
	}
	write_text("model.safetensors.index.json", s->index != NULL ? s->index : index);
	if (s->unlink != NULL)
		unlink(in_scratch(s->unlink));
	free(index);
}

/* Tensor 5 of the fake is layer 0's o_proj, in the first file. */
#define O0 "model.layers.0.self_attn.o_proj.weight"
#define INDEX "model.safetensors.index.json: "
#define SBREAK(name) static void shard_##name(struct sharded *s)
#define LIST(name, value) SBREAK(name) { snprintf(s->listed[5], sizeof(s->listed[5]), "%s", value); }
SBREAK(gone) { s->unlink = SHARD(2); }
SBREAK(short) { s->cut = 1; }
LIST(wrong, "\"" SHARD(3) "\"")
LIST(unlisted, "")
LIST(parent, "\"../" SHARD(1) "\"")
LIST(dots, "\"..\"")
LIST(absolute, "\"/etc/passwd\"")
LIST(below, "\"sub/" SHARD(1) "\"")
LIST(empty_name, "\"\"")
LIST(ugly, "\"a\\u001b[2J\"")
LIST(number, "7")
LIST(null, "null")
LIST(other_file, "\"model-00004-of-00003.safetensors\"")
LIST(not_weights, "\"config.json\"")
LIST(twice_listed, "\"" SHARD(1) "\", \"" O0 "\": \"" SHARD(1) "\"")
SBREAK(twice) { s->in[2][5] = true; }
SBREAK(nowhere) { s->in[0][5] = false; }
SBREAK(missing) { s->in[0][5] = false; s->listed[5][0] = '\0'; }
SBREAK(extra) { snprintf(s->f->t[5].name, 96, "model.layers.0.self_attn.o_proj.bias"); }
SBREAK(shape) { snprintf(s->f->t[5].shape, 80, "[60, 36]"); }
SBREAK(nan) { put_element(&s->f->t[s->f->n - 1], 35, 0x7fff); }
SBREAK(json) { s->index = "{\n\n\"weight_map\": {]}"; }
SBREAK(array) { s->index = "[]"; }
SBREAK(no_map) { s->index = "{\"metadata\": {}}"; }
SBREAK(empty_map) { s->index = "{\"weight_map\": {}}"; }

static const struct {
	const char *what;
	void (*apply)(struct sharded *);
	const char *expect;
} broken_shards[] = {
#define S(name, expect) {#name, shard_##name, expect}
	S(gone, "@/" SHARD(2) ": No such file or directory"),
	S(short, SHARD(2) ": tensor '*' ends at byte * of the data, the file has *"),
	S(wrong, SHARD(1) ": tensor '" O0 "' should be in " SHARD(3) " by model.safetensors.index.json"),
	S(unlisted, SHARD(1) ": tensor '" O0 "' is not in model.safetensors.index.json"),
	S(parent, INDEX "tensor '" O0 "' is in '../" SHARD(1) "', which is no plain file name"),
	S(dots, INDEX "tensor '" O0 "' is in '..', which is no plain file name"),
	S(absolute, INDEX "tensor '" O0 "' is in '/etc/passwd', which is no plain file name"),
	S(below, INDEX "tensor '" O0 "' is in 'sub/" SHARD(1) "', which is no plain file name"),
	S(empty_name, INDEX "tensor '" O0 "' is in '', which is no plain file name"),
	S(ugly, INDEX "tensor '" O0 "' is in 'a?[2J', which is no plain file name"),
	S(number, INDEX "tensor '" O0 "' has no file"),
	S(null, INDEX "tensor '" O0 "' has no file"),
	S(other_file, "@/model-00004-of-00003.safetensors: No such file or directory"),
	S(not_weights, "config.json: header of * bytes, at most 100000000 are read"),
	S(twice_listed, "model.safetensors.index.json:7: duplicate object key"),
	S(twice, SHARD(1) ": tensor '" O0 "' is in " SHARD(3) " too"),
	S(nowhere, SHARD(1) ": tensor '" O0 "' is missing, model.safetensors.index.json lists it"),
	S(missing, INDEX "tensor '" O0 "' is missing"),
	S(extra, INDEX "tensor '" O0 "' is missing"),
	S(shape, SHARD(1) ": tensor '" O0 "' has shape [60, 36], expected [36, 60]"),
	S(nan, SHARD(3) ": tensor 'model.norm.weight' holds NaN at [35]"),
	S(json, "model.safetensors.index.json:3: string or '}' expected near ']'"),
	S(array, INDEX "no weight_map"),
	S(no_map, INDEX "no weight_map"),
	S(empty_map, INDEX "weight_map is empty"),
#undef S
};

static void
test_shards(void **state)
{
	struct fake *f = fake_new(&small, "BF16", true, 12);
	struct model *whole, *parts;
	struct team *team;
	struct sharded s;

	(void)state;
	assert_int_equal(team_new(&team, 2, 50), 0);
	assert_string_equal(f->t[5].name, O0);
	fake_write(f);
	whole = load(scratch, NULL);
	shard_fake(&s, f);
	sharded_write(&s);
	parts = load(scratch, team);
	assert_int_equal(whole->arena_bytes, parts->arena_bytes);
	assert_memory_equal(whole->arena, parts->arena, whole->arena_bytes);
	assert_true(whole->digest != parts->digest);
	model_free(&whole);
	model_free(&parts);
	fake_free(f);

	for (size_t i = 0; i < sizeof(broken_shards) / sizeof(*broken_shards); i++) {
		f = fake_new(&small, "BF16", true, 12);
		shard_fake(&s, f);
		broken_shards[i].apply(&s);
		sharded_write(&s);
		assert_refused(broken_shards[i].what, scratch, NULL, 0, false, broken_shards[i].expect);
		assert_refused(broken_shards[i].what, scratch, team, 0, true, broken_shards[i].expect);
		fake_free(f);
	}
	team_free(&team);
}

/* ---- mutations ---- */

/* Changes a file's head: mostly digits, else structure, bits, a piece cut out or doubled. */
static size_t
mutate(uint8_t *p, size_t len, size_t head)
{
	static const char spice[] = "0123456789-.eE{}[]\",:nul\\ \xff\x00";

	for (uint32_t n = 1 + below(3); n > 0 && head > 1; n--) {
		size_t at = below((uint32_t)head), run = 1 + below(12);

		switch (below(16)) {
		case 0: p[at] ^= (uint8_t)(1u << below(8)); break;
		case 1: p[at] = (uint8_t)spice[below(sizeof(spice) - 1)]; break;
		default: /* another digit: numbers stay numbers */
			while (at < head && (p[at] < '0' || p[at] > '9'))
				at++;
			if (at < head)
				p[at] = (uint8_t)('0' + below(10));
			break;
		case 3:
			if (at + run < head) {
				memmove(p + at, p + at + run, len - at - run);
				len -= run, head -= run;
			}
			break;
		case 4:
			if (at + 2 * run < head)
				memcpy(p + at + run, p + at, run);
			break;
		case 5: p[below(8) % head] = (uint8_t)rng(); break; /* length, or the start */
		}
	}
	return len;
}

/* ---- the packed file ---- */

/* From the checkpoint or from the packed file, as it must be, the same weights. */
static void
load_again(const struct model *want, struct team *team, const char *why)
{
	struct model *m = load(scratch, team);

	if (!matches(m->packed_why.text, why) || (m->packed.map == NULL) != (why[0] != '\0'))
		fail_msg("packed: '%s', expected '%s'", m->packed_why.text, why);
	assert_same_model(m, want);
	model_free(&m);
}

/* A file whose hashes are right, with an exception somewhere. */
static void
write_wrong_exception(const struct model *m, struct k_exception x)
{
	const struct k_weight *w[2 * (GROUP_DOWN + 1) + 1];
	struct k_weight one = m->layer[0].linear[0];
	struct packed_key key = {m->digest, m->files};
	uint32_t n = m->shape.n_layers * (GROUP_DOWN + 1);
	struct err err;

	assert_true(n < sizeof(w) / sizeof(*w));
	for (uint32_t i = 0; i < n; i++)
		w[i] = &m->layer[i / (GROUP_DOWN + 1)].linear[i % (GROUP_DOWN + 1)];
	w[n] = &m->lm_head;
	one.exc = &x, one.n_exc = 1;
	w[0] = &one;
	assert_int_equal(packed_write(in_scratch(PACKED_NAME), &key, m->arena, m->arena_bytes, w, n + 1, NULL, &err), 0);
}

static void
test_packed(void **state)
{
	static const char *const broken[] = {"@" PACKED_NAME ": no header of such a file",
	    "@" PACKED_NAME ": the table of exceptions does not have its hash", "@" PACKED_NAME ": the weights do not have their hash"};
	struct fake *f = fake_new(&small, "BF16", false, 31);
	struct team *team;
	struct model *m;
	struct err err = {""};
	struct stat st;
	char expect[3][512];
	int fd;

	(void)state;
	assert_int_equal(team_new(&team, 2, 50), 0);
	for (int i = 0; i < 3; i++)
		snprintf(expect[i], sizeof(expect[i]), "%s/%s", scratch, broken[i] + 1);
	fake_write(f);
	m = load(scratch, team);
	assert_null(m->packed.map);
	assert_true(m->n_exceptions > 0);
	assert_int_equal(model_write_packed(m, team, &err), 0);
	load_again(m, team, "");
	load_again(m, NULL, "");

	/* One byte of each part: header, table, weights; then the end. */
	assert_int_equal(stat(in_scratch(PACKED_NAME), &st), 0);
	fd = open(in_scratch(PACKED_NAME), O_RDWR);
	assert_true(fd >= 0);
	for (uint32_t i = 0; i < 60; i++) {
		uint64_t table = 8 * m->n_exceptions + 8;
		off_t at = i % 3 == 0 ? (off_t)below(80) : i % 3 == 1 ? (off_t)(4096 + below((uint32_t)table)) :
		    st.st_size - 1 - (off_t)below((uint32_t)m->arena_bytes);
		uint8_t old, new;

		assert_int_equal(pread(fd, &old, 1, at), 1);
		new = old ^ (uint8_t)(1 + below(255));
		assert_int_equal(pwrite(fd, &new, 1, at), 1);
		load_again(m, NULL, expect[i % 3]);
		assert_int_equal(pwrite(fd, &old, 1, at), 1);
	}
	load_again(m, NULL, "");
	for (uint32_t i = 0; i < 20; i++) {
		assert_int_equal(model_write_packed(m, NULL, &err), 0);
		assert_int_equal(truncate(in_scratch(PACKED_NAME), i == 0 ? 0 : (off_t)below((uint32_t)st.st_size)), 0);
		load_again(m, NULL, "*");
	}
	close(fd);

	/* Right hashes do not make it safe. */
	write_wrong_exception(m, (struct k_exception){.block = 1u << 30});
	load_again(m, NULL, PACKED_NAME ": exception 0 of a weight is out of its place");
	write_wrong_exception(m, (struct k_exception){.index = 1024});
	load_again(m, NULL, PACKED_NAME ": exception 0 of a weight is out of its place");

	/* Other weights of the same shape, at another time; a directory that cannot be written. */
	assert_int_equal(model_write_packed(m, NULL, &err), 0);
	assert_int_equal(utimensat(AT_FDCWD, in_scratch("model.safetensors"), (struct timespec[]){{1, 0}, {1, 0}}, 0), 0);
	load_again(m, NULL, "*made of another checkpoint*");
	unlink(in_scratch(PACKED_NAME));
	assert_int_equal(mkdir(in_scratch(PACKED_NAME), 0700), 0);
	assert_int_equal(model_write_packed(m, NULL, &err), -EISDIR);
	assert_true(access(in_scratch(PACKED_NAME ".new"), F_OK) != 0);
	assert_int_equal(rmdir(in_scratch(PACKED_NAME)), 0);
	model_free(&m);
	team_free(&team);
	fake_free(f);
	clean_scratch();
}

static void
test_mutations(void **state)
{
	uint32_t rounds = getenv("OCTET_LONG") != NULL && getenv("OCTET_LONG")[0] != '\0' ? 60000 : 4000, loaded = 0;
	struct fake *f = fake_new(&tiny, NULL, false, 20);
	size_t len, head, config_len = strlen(f->config);
	uint8_t *bytes = fake_bytes(f, &len, &head), *copy = malloc(len + 1);
	char config[sizeof(f->config)];
	uint64_t seed = 20261124;

	(void)state;
	print_message("# seed %" PRIu64 ", %u rounds\n", seed, rounds);
	fake_write(f);
	rng_state = seed;
	for (uint32_t i = 0; i < rounds; i++) {
		struct err err = {""};
		struct model *m;
		int rc;

		if (i % 4 == 0) {
			memcpy(config, f->config, sizeof(config));
			write_file("config.json", config, mutate((uint8_t *)config, config_len, config_len));
		} else {
			memcpy(copy, bytes, len);
			write_file("model.safetensors", copy, mutate(copy, len, head));
		}
		rc = model_load(&m, scratch, NULL, 16, 0, i % 2, NULL, NULL, &err);
		if (rc == 0)
			loaded++;
		else if (rc > 0 || m != NULL || err.text[0] == '\0' || strpbrk(err.text, "\n\x1b") != NULL)
			fail_msg("round %u: %d '%s'", i, rc, err.text);
		model_free(&m);
		if (i % 4 == 0)
			write_text("config.json", f->config);
		else if (i % 4 == 3)
			write_file("model.safetensors", bytes, len);
	}
	print_message("# %u of %u mutations loaded all the same\n", loaded, rounds);
	assert_true(loaded > 0 && loaded < rounds);
	free(bytes);
	free(copy);
	fake_free(f);
}

static void
test_index_mutations(void **state)
{
	uint32_t rounds = 1000, loaded = 0;
	struct fake *f = fake_new(&tiny, NULL, false, 21);
	struct sharded s;
	char *text;
	size_t len;

	(void)state;
	shard_fake(&s, f);
	sharded_write(&s);
	text = sharded_index(&s);
	len = strlen(text);
	rng_state = 20261124;
	for (uint32_t i = 0; i < rounds; i++) {
		uint8_t *copy = (uint8_t *)strdup(text);
		struct err err = {""};
		struct model *m;
		int rc;

		write_file("model.safetensors.index.json", copy, mutate(copy, len, len));
		free(copy);
		rc = model_load(&m, scratch, NULL, 16, 0, i % 2, NULL, NULL, &err);
		if (rc == 0)
			loaded++;
		else if (rc > 0 || m != NULL || err.text[0] == '\0' || strpbrk(err.text, "\n\x1b") != NULL)
			fail_msg("round %u: %d '%s'", i, rc, err.text);
		model_free(&m);
	}
	print_message("# %u of %u mutated indexes loaded all the same\n", loaded, rounds);
	assert_true(loaded > 0 && loaded < rounds);
	free(text);
	fake_free(f);
}

static int
setup(void **state)
{
	(void)state;
	return mkdtemp(scratch) != NULL ? 0 : -1;
}

static int
teardown(void **state)
{
	(void)state;
	clean_scratch();
	return rmdir(scratch);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_proof),
		cmocka_unit_test(test_rope),
		cmocka_unit_test(test_dtypes),
		cmocka_unit_test(test_archs),
		cmocka_unit_test(test_variants),
		cmocka_unit_test(test_broken),
		cmocka_unit_test(test_files),
		cmocka_unit_test(test_shards),
		cmocka_unit_test(test_packed),
		cmocka_unit_test(test_mutations),
		cmocka_unit_test(test_index_mutations),
	};

	return cmocka_run_group_tests_name("model", tests, setup, teardown);
}
