/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/config.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/engine/safetensors.h"

#define MAX_TEXT_FILE (64u << 20)
#define MAX_HIDDEN 65536u
#define MAX_INTERMEDIATE (1u << 20)
#define MAX_LAYERS 256u
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

static int
get_double(const json_t *o, const char *key, double min, double max, double fallback, double *out, struct err *err)
{
	const json_t *v = get(o, key);

	*out = v == NULL ? fallback : json_number_value(v);
	if (v != NULL && !json_is_number(v))
		return err_set(err, -EINVAL, "%s is no number", key);
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

static int
refuse_bias(const json_t *o, const char *key, struct err *err)
{
	const json_t *v = get(o, key);

	return v == NULL || json_is_false(v) ? 0 : err_set(err, -EINVAL, "%s is not supported", key);
}

/* rope_scaling, or rope_parameters as newer files write it, with rope_theta in it. */
static int
check_rope_type(const json_t *o, const char *key, struct err *err)
{
	const json_t *v = get(o, key), *type = get(v, "rope_type");
	char shown[ST_PRINTABLE];

	if (v == NULL)
		return 0;
	if (type == NULL)
		type = get(v, "type");
	if (!json_is_string(type))
		return err_set(err, -EINVAL, "%s has no rope_type", key);
	if (strcmp(json_string_value(type), "default") == 0)
		return 0;
	return err_set(err, -ENOTSUP, "%s of type '%s' is not supported", key,
	    safetensors_printable(json_string_value(type), shown));
}

static int
check_architecture(const json_t *o, struct err *err)
{
	const json_t *all = get(o, "architectures"), *v;
	char shown[ST_PRINTABLE];
	size_t i;

	if (!json_is_string(json_array_get(all, 0)))
		return err_set(err, -EINVAL, "architectures is missing");
	json_array_foreach(all, i, v) {
		if (json_is_string(v) && strcmp(json_string_value(v), "LlamaForCausalLM") == 0)
			return 0;
	}
	return err_set(err, -ENOTSUP, "architecture '%s' is not supported (LlamaForCausalLM is)",
	    safetensors_printable(json_string_value(json_array_get(all, 0)), shown));
}

static int
check_family(const json_t *o, struct err *err)
{
	const json_t *act = get(o, "hidden_act");
	char shown[ST_PRINTABLE];
	int rc = check_architecture(o, err);

	if (rc != 0)
		return rc;
	if (act != NULL && !json_is_string(act))
		return err_set(err, -EINVAL, "hidden_act is no string");
	if (act != NULL && strcmp(json_string_value(act), "silu") != 0)
		return err_set(err, -ENOTSUP, "hidden_act '%s' is not supported (silu is)",
		    safetensors_printable(json_string_value(act), shown));
	if ((rc = refuse_bias(o, "attention_bias", err)) != 0 || (rc = refuse_bias(o, "mlp_bias", err)) != 0 ||
	    (rc = check_rope_type(o, "rope_scaling", err)) != 0)
		return rc;
	return check_rope_type(o, "rope_parameters", err);
}

/* Every product of two of the bounds fits 64 bits with room for all layers. */
static int
parse_sizes(const json_t *o, struct model_shape *s, struct err *err)
{
	uint32_t hd;
	int rc;

	if ((rc = get_u32(o, "hidden_size", MAX_HIDDEN, NULL, &s->hidden, err)) != 0 ||
	    (rc = get_u32(o, "intermediate_size", MAX_INTERMEDIATE, NULL, &s->intermediate, err)) != 0 ||
	    (rc = get_u32(o, "num_hidden_layers", MAX_LAYERS, NULL, &s->n_layers, err)) != 0 ||
	    (rc = get_u32(o, "num_attention_heads", MAX_HEADS, NULL, &s->n_heads, err)) != 0 ||
	    (rc = get_u32(o, "num_key_value_heads", MAX_HEADS, &s->n_heads, &s->n_kv_heads, err)) != 0 ||
	    (rc = get_u32(o, "vocab_size", MAX_VOCAB, NULL, &s->vocab, err)) != 0 ||
	    (rc = get_u32(o, "max_position_embeddings", MAX_CONTEXT, NULL, &s->max_context, err)) != 0)
		return rc;
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
	const json_t *tied = get(o, "tie_word_embeddings"), *rope = get(o, "rope_parameters");
	double eps;
	int rc;

	if ((rc = check_family(o, err)) != 0 || (rc = parse_sizes(o, s, err)) != 0 ||
	    (rc = get_double(o, "rms_norm_eps", 1e-30, 1, 1e-6, &eps, err)) != 0 ||
	    (rc = get_double(get(rope, "rope_theta") != NULL ? rope : o, "rope_theta", 1, 1e15, 10000, &s->rope_theta,
	         err)) != 0)
		return rc;
	s->rms_eps = (float)eps;
	if (tied != NULL && !json_is_boolean(tied))
		return err_set(err, -EINVAL, "tie_word_embeddings is neither true nor false");
	s->tied = json_is_true(tied);
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
