/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/config.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/engine/safetensors.h"

#define MAX_TEXT_FILE (64u << 20)
#define MAX_HIDDEN 65536u
#define MAX_INTERMEDIATE (1u << 20)
#define MAX_HEADS 1024u
#define MAX_VOCAB (1u << 20)
#define MAX_CONTEXT (1u << 24)

/* ---- files ---- */

static int
read_fd(int fd, const char *path, char **out, size_t *len, struct err *err)
{
	struct stat st;
	size_t at = 0;
	ssize_t n = 1;
	char *text;

	if (fstat(fd, &st) != 0)
		return err_set(err, -errno, "%s: %s", path, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return err_set(err, -EINVAL, "%s: not a regular file", path);
	if (st.st_size > MAX_TEXT_FILE)
		return err_set(err, -EFBIG, "%s: %lld bytes, at most %u are read", path, (long long)st.st_size,
		    MAX_TEXT_FILE);
	text = malloc((size_t)st.st_size + 1);
	if (text == NULL)
		return err_set(err, -ENOMEM, "%s: out of memory", path);
	while (n > 0 && at < (size_t)st.st_size) {
		do
			n = read(fd, text + at, (size_t)st.st_size - at);
		while (n < 0 && errno == EINTR);
		at += n > 0 ? (size_t)n : 0;
	}
	if (n < 0) {
		int rc = err_set(err, -errno, "%s: %s", path, strerror(errno));

		free(text);
		return rc;
	}
	text[at] = '\0';
	*out = text;
	*len = at;
	return 0;
}

int
config_read_file(const char *dir, const char *file, bool optional, char **out, size_t *len, struct err *err)
{
	char *path;
	int fd, rc;

	if (asprintf(&path, "%s/%s", dir, file) < 0)
		return err_set(err, -ENOMEM, "%s: out of memory", file);
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang us */
	if (fd >= 0) {
		rc = read_fd(fd, path, out, len, err);
		close(fd);
	} else if (optional && errno == ENOENT)
		rc = 0;
	else
		rc = err_set(err, -errno, "%s: %s", path, strerror(errno));
	free(path);
	return rc;
}

/* ---- config.json ---- */

static const json_t *
get(const json_t *o, const char *key)
{
	const json_t *v = json_object_get(o, key);

	return json_is_null(v) ? NULL : v;
}

static int
get_u32(const json_t *o, const char *key, uint32_t max, const uint32_t *fallback, uint32_t *out, struct err *err)
{
	const json_t *v = get(o, key);

	if (v == NULL && fallback != NULL) {
		*out = *fallback;
		return 0;
	}
	if (v == NULL)
		return err_set(err, -EINVAL, "%s is missing", key);
	if (!json_is_integer(v))
		return err_set(err, -EINVAL, "%s is no integer", key);
	if (json_integer_value(v) < 1 || json_integer_value(v) > max)
		return err_set(err, -EINVAL, "%s = %" JSON_INTEGER_FORMAT " is not from 1 to %u", key,
		    json_integer_value(v), max);
	*out = (uint32_t)json_integer_value(v);
	return 0;
}

/* fallback NAN: it must be there. */
static int
get_double(const json_t *o, const char *key, double min, double max, double fallback, double *out, struct err *err)
{
	const json_t *v = get(o, key);

	*out = v == NULL ? fallback : json_number_value(v);
	if (v != NULL && !json_is_number(v))
		return err_set(err, -EINVAL, "%s is no number", key);
	if (isnan(*out))
		return err_set(err, -EINVAL, "%s is missing", key);
	if (!(*out >= min && *out <= max))
		return err_set(err, -EINVAL, "%s = %g is not from %g to %g", key, *out, min, max);
	return 0;
}

/* null, one id or a list; duplicates count once. */
static int
get_eos(const json_t *o, struct model_shape *s, struct err *err)
{
	const json_t *v = get(o, "eos_token_id");
	size_t n = json_is_array(v) ? json_array_size(v) : v != NULL;

	if (n == 0)
		return 0;
	s->n_eos = 0;
	for (size_t i = 0; i < n; i++) {
		const json_t *e = json_is_array(v) ? json_array_get(v, i) : v;
		json_int_t id = json_integer_value(e);
		uint32_t seen = 0;

		if (!json_is_integer(e))
			return err_set(err, -EINVAL, "eos_token_id is no token id or list of them");
		if (id < 0 || id >= s->vocab)
			return err_set(err, -EINVAL, "eos_token_id %" JSON_INTEGER_FORMAT " is not below vocab_size %u",
			    id, s->vocab);
		while (seen < s->n_eos && s->eos[seen] != id)
			seen++;
		if (seen < s->n_eos)
			continue;
		if (s->n_eos == sizeof(s->eos) / sizeof(*s->eos))
			return err_set(err, -EINVAL, "eos_token_id has more than %zu tokens",
			    sizeof(s->eos) / sizeof(*s->eos));
		s->eos[s->n_eos++] = (uint32_t)id;
	}
	return 0;
}

/* Missing is false. */
static int
get_bool(const json_t *o, const char *key, bool *out, struct err *err)
{
	const json_t *v = get(o, key);

	*out = json_is_true(v);
	return v == NULL || json_is_boolean(v) ? 0 : err_set(err, -EINVAL, "%s is neither true nor false", key);
}

static int
refuse_true(const json_t *o, const char *key, struct err *err)
{
	bool on;
	int rc = get_bool(o, key, &on, err);

	return rc != 0 || !on ? rc : err_set(err, -ENOTSUP, "%s is not supported", key);
}

/* A string that must be what octet does, where it is there at all. */
static int
want_text(const json_t *v, const char *key, const char *only, struct err *err)
{
	char shown[ST_PRINTABLE];

	if (v != NULL && !json_is_string(v))
		return err_set(err, -EINVAL, "%s is no string", key);
	if (v == NULL || strcmp(json_string_value(v), only) == 0)
		return 0;
	return err_set(err, -ENOTSUP, "%s '%s' is not supported (%s is)", key,
	    safetensors_printable(json_string_value(v), shown), only);
}

/* ---- RoPE ---- */

/* Keys as in Hugging Face's modeling_rope_utils.py. */
static int
parse_scaling(const json_t *v, struct model_shape *s, struct err *err)
{
	int rc = get_double(v, "factor", 1, 1e6, NAN, &s->rope_factor, err);

	if (rc != 0 || s->rope_type == ROPE_LINEAR)
		return rc;
	if ((rc = get_double(v, "low_freq_factor", 1e-6, 1e6, NAN, &s->rope_low, err)) != 0 ||
	    (rc = get_double(v, "high_freq_factor", 1e-6, 1e6, NAN, &s->rope_high, err)) != 0 ||
	    (rc = get_u32(v, "original_max_position_embeddings", MAX_CONTEXT, NULL, &s->rope_original, err)) != 0)
		return rc;
	if (s->rope_low >= s->rope_high)
		return err_set(err, -EINVAL, "low_freq_factor %g is not below high_freq_factor %g", s->rope_low,
		    s->rope_high);
	return 0;
}

/* rope_scaling, or rope_parameters as newer files write it, with rope_theta in it. */
static int
parse_rope(const json_t *o, const char *key, struct model_shape *s, struct err *err)
{
	static const char *const name[] = {"default", "linear", "llama3"};
	const json_t *v = get(o, key), *type = get(v, "rope_type");
	enum rope_type before = s->rope_type;
	char shown[ST_PRINTABLE];
	int rc;

	if (v == NULL)
		return 0;
	if (type == NULL)
		type = get(v, "type");
	if (!json_is_string(type))
		return err_set(err, -EINVAL, "%s has no rope_type", key);
	for (s->rope_type = ROPE_DEFAULT; s->rope_type <= ROPE_LLAMA3; s->rope_type++)
		if (strcmp(json_string_value(type), name[s->rope_type]) == 0)
			break;
	if (s->rope_type > ROPE_LLAMA3)
		return err_set(err, -ENOTSUP, "%s of type '%s' is not supported (default, linear and llama3 are)", key,
		    safetensors_printable(json_string_value(type), shown));
	if (s->rope_type == ROPE_DEFAULT) {
		s->rope_type = before;
		return 0;
	}
	if (before != ROPE_DEFAULT)
		return err_set(err, -EINVAL, "rope_scaling and %s both scale", key);
	if ((rc = parse_scaling(v, s, err)) != 0)
		err_prefix(err, "%s", key);
	return rc;
}

static int
parse_ropes(const json_t *o, double default_theta, struct model_shape *s, struct err *err)
{
	const json_t *parameters = get(o, "rope_parameters");
	const json_t *with_theta = get(parameters, "rope_theta") != NULL ? parameters : o;
	double part;
	int rc;

	if ((rc = parse_rope(o, "rope_scaling", s, err)) != 0 || (rc = parse_rope(o, "rope_parameters", s, err)) != 0 ||
	    (rc = get_double(with_theta, "rope_theta", 1, 1e15, default_theta, &s->rope_theta, err)) != 0)
		return rc;
	for (int i = 0; i < 2; i++) {
		rc = get_double(i == 0 ? o : parameters, "partial_rotary_factor", 0, 1, 1, &part, err);
		if (rc == 0 && part != 1)
			rc = err_set(err, -ENOTSUP, "partial_rotary_factor %g is not supported (1 is)", part);
		if (rc != 0)
			return rc;
	}
	return 0;
}

/* theta^(-2i/head_dim) (Su et al., RoFormer), in double. linear: Chen et al.,
 * Position Interpolation. llama3: wavelengths above original / low are
 * stretched by factor, those below original / high are kept, between the two
 * it changes linearly in original / wavelength (Llama 3.1, models/llama3/model.py). */
double
config_rope_freq(const struct model_shape *s, uint32_t i)
{
	double freq = pow(s->rope_theta, -2.0 * i / s->head_dim), turns, keep;

	if (s->rope_type == ROPE_DEFAULT)
		return freq;
	if (s->rope_type == ROPE_LINEAR)
		return freq / s->rope_factor;
	turns = s->rope_original * freq / (2 * M_PI); /* over the original context */
	keep = (turns - s->rope_low) / (s->rope_high - s->rope_low);
	keep = keep < 0 ? 0 : keep > 1 ? 1 : keep;
	return (1 - keep) * freq / s->rope_factor + keep * freq;
}

/* ---- architectures ---- */

/* What the name alone decides, as Hugging Face's modeling files of these names have it. */
static const struct arch {
	const char *name;
	bool qkv_bias;       /* always, whatever attention_bias says */
	bool attention_bias; /* the key counts: q, k, v and o */
	bool mlp_bias;       /* the key counts */
	bool qk_norm;
	bool window;         /* sliding_window counts for all layers, 4096 where it is missing */
	bool plain;          /* num_key_value_heads may be left out */
	bool no_rope;        /* no_rope_layers counts, every fourth where it is missing */
	bool tied;           /* where tie_word_embeddings is missing */
} archs[] = {
	{.name = "LlamaForCausalLM", .attention_bias = true, .mlp_bias = true, .plain = true},
	{.name = "MistralForCausalLM", .window = true},
	{.name = "Qwen2ForCausalLM", .qkv_bias = true},
	{.name = "Qwen3ForCausalLM", .attention_bias = true, .qk_norm = true},
	{.name = "SmolLM3ForCausalLM", .attention_bias = true, .mlp_bias = true, .no_rope = true, .tied = true},
};
#define N_ARCHS (sizeof(archs) / sizeof(*archs))

static int
find_arch(const json_t *o, const struct arch **out, struct err *err)
{
	const json_t *all = get(o, "architectures"), *v;
	char shown[ST_PRINTABLE], known[256];
	size_t at = 0, i;

	if (!json_is_string(json_array_get(all, 0)))
		return err_set(err, -EINVAL, "architectures is missing");
	json_array_foreach(all, i, v) {
		for (*out = archs; *out < archs + N_ARCHS; (*out)++)
			if (json_is_string(v) && strcmp(json_string_value(v), (*out)->name) == 0)
				return 0;
	}
	for (i = 0; i < N_ARCHS; i++)
		at += (size_t)snprintf(known + at, sizeof(known) - at, "%s%s", i > 0 ? ", " : "", archs[i].name);
	return err_set(err, -ENOTSUP, "architecture '%s' is not supported (%s are)",
	    safetensors_printable(json_string_value(json_array_get(all, 0)), shown), known);
}

static int
parse_biases(const json_t *o, const struct arch *a, struct model_shape *s, struct err *err)
{
	bool attention = false;
	int rc = 0;

	if (a->attention_bias)
		rc = get_bool(o, "attention_bias", &attention, err);
	else if (!a->qkv_bias)
		rc = refuse_true(o, "attention_bias", err);
	if (rc != 0)
		return rc;
	s->qkv_bias = a->qkv_bias || attention;
	s->o_bias = attention;
	return a->mlp_bias ? get_bool(o, "mlp_bias", &s->mlp_bias, err) : refuse_true(o, "mlp_bias", err);
}

/* Needs max_context: a window that covers it is none. */
static int
parse_window(const json_t *o, const struct arch *a, struct model_shape *s, struct err *err)
{
	static const uint32_t missing = 4096;
	const json_t *types = get(o, "layer_types"), *v;
	size_t i;
	int rc;

	json_array_foreach(types, i, v)
		if ((rc = want_text(v, "layer_types", "full_attention", err)) != 0)
			return rc;
	if ((rc = refuse_true(o, "use_sliding_window", err)) != 0 || !a->window)
		return rc;
	v = json_object_get(o, "sliding_window");
	if (!json_is_null(v) && (rc = get_u32(o, "sliding_window", MAX_CONTEXT, &missing, &s->window, err)) != 0)
		return rc;
	if (s->window >= s->max_context)
		s->window = 0;
	return 0;
}

/* no_rope_layers: one number for each layer, 0 where q and k stay as they are. */
static int
parse_no_rope(const json_t *o, const struct arch *a, struct model_shape *s, struct err *err)
{
	static const uint32_t missing = 4;
	const json_t *list = get(o, "no_rope_layers");
	uint32_t interval;
	int rc;

	if (!a->no_rope)
		return 0;
	if ((rc = get_u32(o, "no_rope_layer_interval", UINT32_MAX, &missing, &interval, err)) != 0)
		return rc;
	if (list != NULL && json_array_size(list) < s->n_layers)
		return err_set(err, -EINVAL, "no_rope_layers is no list of %u layers", s->n_layers);
	for (uint32_t l = 0; l < s->n_layers; l++) {
		const json_t *v = json_array_get(list, l);

		if (v != NULL && !json_is_integer(v))
			return err_set(err, -EINVAL, "no_rope_layers is no list of %u layers", s->n_layers);
		s->no_rope[l] = list != NULL ? json_integer_value(v) == 0 : (l + 1) % interval == 0;
	}
	return 0;
}

/* Every product of two of the bounds fits 64 bits with room for all layers. */
static int
parse_sizes(const json_t *o, const struct arch *a, struct model_shape *s, struct err *err)
{
	const uint32_t *kv_heads = a->plain ? &s->n_heads : NULL;
	uint32_t hd;
	int rc;

	if ((rc = get_u32(o, "hidden_size", MAX_HIDDEN, NULL, &s->hidden, err)) != 0 ||
	    (rc = get_u32(o, "intermediate_size", MAX_INTERMEDIATE, NULL, &s->intermediate, err)) != 0 ||
	    (rc = get_u32(o, "num_hidden_layers", CONFIG_MAX_LAYERS, NULL, &s->n_layers, err)) != 0 ||
	    (rc = get_u32(o, "num_attention_heads", MAX_HEADS, NULL, &s->n_heads, err)) != 0 ||
	    (rc = get_u32(o, "num_key_value_heads", MAX_HEADS, kv_heads, &s->n_kv_heads, err)) != 0 ||
	    (rc = get_u32(o, "vocab_size", MAX_VOCAB, NULL, &s->vocab, err)) != 0 ||
	    (rc = get_u32(o, "max_position_embeddings", MAX_CONTEXT, NULL, &s->max_context, err)) != 0)
		return rc;
	if (get(o, "head_dim") == NULL && a->qk_norm)
		return err_set(err, -EINVAL, "head_dim is missing");
	if (get(o, "head_dim") == NULL && s->hidden % s->n_heads != 0)
		return err_set(err, -EINVAL, "hidden_size %u is no multiple of num_attention_heads %u", s->hidden,
		    s->n_heads);
	hd = s->hidden / s->n_heads;
	if ((rc = get_u32(o, "head_dim", CONFIG_MAX_HEAD_DIM, &hd, &s->head_dim, err)) != 0)
		return rc;
	if (s->head_dim > CONFIG_MAX_HEAD_DIM || s->head_dim % 2 != 0)
		return err_set(err, -EINVAL, "head_dim %u is not even or over %u", s->head_dim, CONFIG_MAX_HEAD_DIM);
	if (s->n_heads % s->n_kv_heads != 0)
		return err_set(err, -EINVAL, "num_attention_heads %u is no multiple of num_key_value_heads %u",
		    s->n_heads, s->n_kv_heads);
	return 0;
}

static int
parse_config(const json_t *o, struct model_shape *s, struct err *err)
{
	const struct arch *a;
	double eps;
	int rc;

	if ((rc = find_arch(o, &a, err)) != 0)
		return rc;
	s->arch = a->name;
	s->qk_norm = a->qk_norm;
	if (get(o, "quantization_config") != NULL)
		return err_set(err, -ENOTSUP, "quantization_config is not supported (F32, F16 and BF16 weights are)");
	if ((rc = want_text(get(o, "hidden_act"), "hidden_act", "silu", err)) != 0 ||
	    (rc = refuse_true(o, "use_mrope", err)) != 0 || (rc = parse_biases(o, a, s, err)) != 0 ||
	    (rc = parse_sizes(o, a, s, err)) != 0 || (rc = parse_window(o, a, s, err)) != 0 ||
	    (rc = get_double(o, "rms_norm_eps", 1e-30, 1, 1e-6, &eps, err)) != 0 ||
	    (rc = parse_ropes(o, a->no_rope ? 2e6 : 1e4, s, err)) != 0 || (rc = parse_no_rope(o, a, s, err)) != 0 ||
	    (rc = get_bool(o, "tie_word_embeddings", &s->tied, err)) != 0)
		return rc;
	if (get(o, "tie_word_embeddings") == NULL)
		s->tied = a->tied;
	s->rms_eps = (float)eps;
	return get_eos(o, s, err);
}

static int
parse_json(const char *file, const char *text, size_t len, struct model_shape *s,
    int (*parse)(const json_t *, struct model_shape *, struct err *), struct err *err)
{
	char why[ST_PRINTABLE];
	json_error_t je;
	json_t *o = json_loadb(text, len, JSON_REJECT_DUPLICATES, &je);
	int rc;

	if (o == NULL)
		return err_set(err, -EINVAL, "%s:%d: %s", file, je.line, safetensors_printable(je.text, why));
	if (!json_is_object(o))
		rc = err_set(err, -EINVAL, "%s: not a JSON object", file);
	else if ((rc = parse(o, s, err)) != 0)
		err_prefix(err, "%s", file);
	json_decref(o);
	return rc;
}

/* The end tokens of generation_config.json, where there are some, replace those of config.json. */
int
config_read(struct model_shape *s, const char *dir, char **text, size_t *len, struct err *err)
{
	char *config = NULL, *generation = NULL;
	size_t config_len = 0, generation_len = 0;
	int rc;

	memset(s, 0, sizeof(*s));
	if ((rc = config_read_file(dir, "config.json", false, &config, &config_len, err)) == 0 &&
	    (rc = parse_json("config.json", config, config_len, s, parse_config, err)) == 0 &&
	    (rc = config_read_file(dir, "generation_config.json", true, &generation, &generation_len, err)) == 0 &&
	    generation != NULL)
		rc = parse_json("generation_config.json", generation, generation_len, s, get_eos, err);
	free(generation);
	if (rc != 0 || text == NULL) {
		free(config);
		return rc;
	}
	*text = config;
	*len = config_len;
	return 0;
}
