/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/model.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <sha2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/engine/safetensors.h"

#define MAX_TEXT_FILE (64u << 20)

/* ---- files ---- */

static char *
join(const char *dir, const char *file)
{
	char *path;

	return asprintf(&path, "%s/%s", dir, file) < 0 ? NULL : path;
}

/* A whole text file, terminated; -ENOENT leaves *out NULL. */
static int
read_file(const char *dir, const char *file, char **out, size_t *len, struct err *err)
{
	char *path = join(dir, file);
	struct stat st;
	int fd, rc = 0;
	size_t at = 0;

	*out = NULL;
	if (path == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) != 0)
		rc = err_set(err, -errno, "%s: %s", path, strerror(errno));
	else if (!S_ISREG(st.st_mode) || st.st_size > MAX_TEXT_FILE)
		rc = err_set(err, -EINVAL, "%s: no regular file of at most %u MiB", path, MAX_TEXT_FILE >> 20);
	else if ((*out = malloc((size_t)st.st_size + 1)) == NULL)
		rc = err_set(err, -ENOMEM, "out of memory");
	while (rc == 0 && at < (size_t)st.st_size) {
		ssize_t n = read(fd, *out + at, (size_t)st.st_size - at);

		if (n < 0 && errno != EINTR)
			rc = err_set(err, -errno, "%s: %s", path, strerror(errno));
		else if (n == 0)
			break;
		else
			at += n > 0 ? (size_t)n : 0;
	}
	if (rc == 0) {
		(*out)[at] = '\0';
		*len = at;
	} else {
		free(*out);
		*out = NULL;
	}
	if (fd >= 0)
		close(fd);
	free(path);
	return rc;
}

/* ---- config.json ---- */

static int
get_u32(json_t *o, const char *key, uint32_t min, uint32_t max, const uint32_t *fallback, uint32_t *out, struct err *err)
{
	json_t *v = json_object_get(o, key);
	json_int_t n = json_integer_value(v);

	if ((v == NULL || json_is_null(v)) && fallback != NULL) {
		*out = *fallback;
		return 0;
	}
	if (v == NULL)
		return err_set(err, -EINVAL, "'%s' is missing", key);
	if (!json_is_integer(v) || n < min || n > max)
		return err_set(err, -EINVAL, "'%s' is no integer from %u to %u", key, min, max);
	*out = (uint32_t)n;
	return 0;
}

static int
get_positive(json_t *o, const char *key, double fallback, double *out, struct err *err)
{
	json_t *v = json_object_get(o, key);

	*out = v == NULL || json_is_null(v) ? fallback : json_number_value(v);
	if (!isfinite(*out) || *out <= 0)
		return err_set(err, -EINVAL, "'%s' is no positive number", key);
	return 0;
}

static int
get_eos(json_t *o, struct model_shape *s, struct err *err)
{
	json_t *v = json_object_get(o, "eos_token_id"), *e;
	size_t n = json_is_array(v) ? json_array_size(v) : v == NULL || json_is_null(v) ? 0 : 1;

	if (n > sizeof(s->eos) / sizeof(*s->eos))
		return err_set(err, -EINVAL, "'eos_token_id' has more than 8 tokens");
	for (size_t i = 0; i < n; i++) {
		e = json_is_array(v) ? json_array_get(v, i) : v;
		if (!json_is_integer(e) || json_integer_value(e) < 0 || json_integer_value(e) >= s->vocab)
			return err_set(err, -EINVAL, "'eos_token_id' is no token below %u", s->vocab);
		s->eos[s->n_eos++] = (uint32_t)json_integer_value(e);
	}
	return 0;
}

static int
refuse_unless_false(json_t *o, const char *key, struct err *err)
{
	json_t *v = json_object_get(o, key);

	if (v == NULL || json_is_null(v) || json_is_false(v))
		return 0;
	return err_set(err, -EINVAL, "'%s' is not supported", key);
}

static int
check_family(json_t *o, struct err *err)
{
	json_t *arch = json_object_get(o, "architectures"), *v;
	const char *name = json_string_value(json_is_array(arch) ? json_array_get(arch, 0) : NULL);
	int rc = 0;

	if (name == NULL)
		return err_set(err, -EINVAL, "'architectures' is missing");
	if (strcmp(name, "LlamaForCausalLM") != 0)
		return err_set(err, -EINVAL, "architecture '%s' is not supported (LlamaForCausalLM is)", name);
	v = json_object_get(o, "hidden_act");
	if (v != NULL && (!json_is_string(v) || strcmp(json_string_value(v), "silu") != 0))
		return err_set(err, -EINVAL, "'hidden_act' is not silu");
	v = json_object_get(o, "rope_scaling");
	if (v != NULL && !json_is_null(v)) {
		const char *type = json_string_value(json_object_get(v, "rope_type"));

		if (type == NULL)
			type = json_string_value(json_object_get(v, "type"));
		return err_set(err, -EINVAL, "'rope_scaling' of type '%s' is not supported", type != NULL ? type : "?");
	}
	if ((rc = refuse_unless_false(o, "attention_bias", err)) == 0)
		rc = refuse_unless_false(o, "mlp_bias", err);
	return rc;
}

static int
parse_shape(json_t *o, struct model_shape *s, struct err *err)
{
	uint32_t hd;
	double eps;
	int rc = check_family(o, err);

	if (rc != 0 || (rc = get_u32(o, "hidden_size", 1, 65536, NULL, &s->hidden, err)) != 0 ||
	    (rc = get_u32(o, "intermediate_size", 1, 1 << 20, NULL, &s->intermediate, err)) != 0 ||
	    (rc = get_u32(o, "num_hidden_layers", 1, 256, NULL, &s->n_layers, err)) != 0 ||
	    (rc = get_u32(o, "num_attention_heads", 1, 1024, NULL, &s->n_heads, err)) != 0 ||
	    (rc = get_u32(o, "num_key_value_heads", 1, 1024, &s->n_heads, &s->n_kv_heads, err)) != 0 ||
	    (rc = get_u32(o, "vocab_size", 1, 1 << 20, NULL, &s->vocab, err)) != 0 ||
	    (rc = get_u32(o, "max_position_embeddings", 2, 1 << 20, NULL, &s->max_context, err)) != 0)
		return rc;
	hd = s->hidden / s->n_heads;
	if ((rc = get_u32(o, "head_dim", 2, 256, &hd, &s->head_dim, err)) != 0 ||
	    (rc = get_positive(o, "rms_norm_eps", 1e-6, &eps, err)) != 0 ||
	    (rc = get_positive(o, "rope_theta", 10000, &s->rope_theta, err)) != 0)
		return rc;
	s->rms_eps = (float)eps;
	s->tied = json_is_true(json_object_get(o, "tie_word_embeddings"));
	if (s->head_dim < 2 || s->head_dim > 256 || s->head_dim % 2 != 0)
		return err_set(err, -EINVAL, "'head_dim' %u is not even and at most 256", s->head_dim);
	if (s->n_heads % s->n_kv_heads != 0)
		return err_set(err, -EINVAL, "%u attention heads are no multiple of %u key-value heads", s->n_heads,
		    s->n_kv_heads);
	return get_eos(o, s, err);
}

static int
load_shape(struct model *m, char **text, size_t *len, struct err *err)
{
	json_error_t je;
	json_t *o;
	int rc = read_file(m->path, "config.json", text, len, err);

	if (rc != 0)
		return rc;
	o = json_loadb(*text, *len, JSON_REJECT_DUPLICATES, &je);
	if (!json_is_object(o))
		rc = err_set(err, -EINVAL, "line %d: %s", je.line, o == NULL ? je.text : "no JSON object");
	else
		rc = parse_shape(o, &m->shape, err);
	json_decref(o);
	if (rc != 0)
		err_prefix(err, "%s/config.json", m->path);
	return rc;
}

/* ---- sizes ---- */

static void
linear_dims(const struct model_shape *s, enum plan_group g, uint32_t *n, uint32_t *k)
{
	uint32_t q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;

	switch (g) {
	case GROUP_Q: *n = q, *k = s->hidden; break;
	case GROUP_K:
	case GROUP_V: *n = kv, *k = s->hidden; break;
	case GROUP_O: *n = s->hidden, *k = q; break;
	case GROUP_GATE:
	case GROUP_UP: *n = s->intermediate, *k = s->hidden; break;
	case GROUP_DOWN: *n = s->hidden, *k = s->intermediate; break;
	default: *n = s->vocab, *k = s->hidden; break;
	}
}

uint64_t
model_plan_bytes(const struct model_shape *s)
{
	struct k_weight w;
	uint64_t layer = 0, rest;
	uint32_t n, k;

	for (enum plan_group g = GROUP_Q; g <= GROUP_DOWN; g++) {
		linear_dims(s, g, &n, &k);
		layer += k_weight_plan(&w, n, k);
	}
	layer += 2 * sizeof(float) * (uint64_t)s->hidden;
	rest = k_weight_plan(&w, s->vocab, s->hidden) + sizeof(float) * (uint64_t)s->hidden;
	if (!s->tied)
		rest += (uint64_t)s->vocab * s->hidden * sizeof(uint16_t);
	rest += (uint64_t)s->max_context * s->head_dim * sizeof(float);
	return layer * s->n_layers + rest;
}

static uint64_t
read_number(const char *path, const char *key)
{
	FILE *f = fopen(path, "re");
	char line[256];
	unsigned long long v = UINT64_MAX;

	while (f != NULL && fgets(line, sizeof(line), f) != NULL) {
		size_t n = strlen(key);

		if (strncmp(line, key, n) == 0 && sscanf(line + n, "%llu", &v) == 1)
			break;
	}
	if (f != NULL)
		fclose(f);
	return v;
}

/* What the machine and our cgroup would still give. */
static uint64_t
memory_available(void)
{
	uint64_t avail = read_number("/proc/meminfo", "MemAvailable:");
	uint64_t max = read_number("/sys/fs/cgroup/memory.max", ""), used = read_number("/sys/fs/cgroup/memory.current", "");

	avail = avail == UINT64_MAX ? avail : avail * 1024;
	if (max != UINT64_MAX && used != UINT64_MAX) {
		uint64_t left = max > used ? max - used : 0;

		if (left < avail)
			avail = left;
	}
	return avail;
}

static int
check_memory(const struct model *m, uint64_t weights, uint64_t extra, struct err *err)
{
	uint64_t avail = memory_available();

	if (weights + extra < extra || weights + extra <= avail)
		return weights + extra < extra ? -EOVERFLOW : 0;
	return err_set(err, -ENOMEM, "%s needs %.3f GB of weights and %.3f GB of KV cache; %.3f GB of memory is available",
	    m->name, (double)weights / 1e9, (double)extra / 1e9, (double)avail / 1e9);
}

/* ---- tensors ---- */

static struct st_tensor *
want(struct safetensors *st, const char *name, uint32_t n_dims, uint64_t d0, uint64_t d1, struct err *err)
{
	struct st_tensor *t = safetensors_find(st, name);
	char is[128] = "";
	size_t at = 0;

	if (t == NULL) {
		err_set(err, -EINVAL, "%s: tensor '%s' is missing", st->path, name);
		return NULL;
	}
	t->used = 1;
	if (t->n_dims == n_dims && t->dim[0] == d0 && (n_dims == 1 || t->dim[1] == d1))
		return t;
	for (uint32_t i = 0; i < t->n_dims; i++)
		at += (size_t)snprintf(is + at, sizeof(is) - at, "%s%llu", i > 0 ? ", " : "", (unsigned long long)t->dim[i]);
	if (n_dims == 1)
		err_set(err, -EINVAL, "%s: tensor '%s' has shape [%s], expected [%llu]", st->path, name, is,
		    (unsigned long long)d0);
	else
		err_set(err, -EINVAL, "%s: tensor '%s' has shape [%s], expected [%llu, %llu]", st->path, name, is,
		    (unsigned long long)d0, (unsigned long long)d1);
	return NULL;
}

static int
load_norm(struct safetensors *st, const char *name, uint32_t n, float **out, struct err *err)
{
	struct st_tensor *t = want(st, name, 1, n, 0, err);
	uint16_t bits;

	if (t == NULL)
		return -EINVAL;
	*out = malloc(n * sizeof(**out));
	if (*out == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (uint32_t i = 0; i < n; i++) {
		st_read_bf16(t, i, 1, &bits);
		if ((bits & 0x7f80) == 0x7f80)
			return err_set(err, -EINVAL, "%s: tensor '%s' is not finite at [%u]", st->path, name, i);
		(*out)[i] = k_bf16_to_float(bits);
	}
	return 0;
}

/* One linear layer to pack. */
struct job {
	struct k_weight *w;
	const struct st_tensor *t;
	uint32_t first_panel; /* in the list of all panels */
};

/* What a part of the team did wrong or found. */
struct part {
	struct k_exception **exc; /* per job */
	uint32_t *n_exc, *cap;
	uint16_t *rows;
	int rc;
	uint32_t bad_job, bad_row, bad_col;
};

struct packing {
	struct job *job;
	uint32_t n_jobs, n_panels, next; /* next: atomic */
	uint32_t max_k;
	struct part *part;
};

static uint32_t
job_of(const struct packing *p, uint32_t panel)
{
	uint32_t lo = 0, hi = p->n_jobs - 1;

	while (lo < hi) {
		uint32_t mid = (lo + hi + 1) / 2;

		if (p->job[mid].first_panel <= panel)
			lo = mid;
		else
			hi = mid - 1;
	}
	return lo;
}

/* Takes panels one by one, so that the parts end together. */
static void
pack_part(void *arg, uint32_t part, uint32_t parts)
{
	struct packing *p = arg;
	struct part *me = &p->part[part];
	uint32_t panel;

	(void)parts;
	while (me->rc == 0 && (panel = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->n_panels) {
		uint32_t j = job_of(p, panel), first = (panel - p->job[j].first_panel) * K_PANEL;
		struct k_weight *w = p->job[j].w;
		uint32_t n = w->n - first < K_PANEL ? w->n - first : K_PANEL;

		st_read_bf16(p->job[j].t, (uint64_t)first * w->k, (uint64_t)n * w->k, me->rows);
		me->rc = k_pack_panel(w, first / K_PANEL, me->rows, &me->exc[j], &me->n_exc[j], &me->cap[j], &me->bad_row,
		    &me->bad_col);
		me->bad_job = j;
	}
}

static int
by_place(const void *pa, const void *pb)
{
	const struct k_exception *a = pa, *b = pb;

	if (a->block != b->block)
		return a->block < b->block ? -1 : 1;
	return a->index < b->index ? -1 : a->index > b->index;
}

/* The parts' exceptions of one job, in order. */
static int
join_exceptions(struct packing *p, uint32_t parts, uint32_t j)
{
	struct k_weight *w = p->job[j].w;
	uint32_t n = 0;

	for (uint32_t i = 0; i < parts; i++)
		n += p->part[i].n_exc[j];
	if (n == 0)
		return 0;
	w->exc = malloc(n * sizeof(*w->exc));
	if (w->exc == NULL)
		return -ENOMEM;
	for (uint32_t i = 0; i < parts; i++) {
		memcpy(w->exc + w->n_exc, p->part[i].exc[j], p->part[i].n_exc[j] * sizeof(*w->exc));
		w->n_exc += p->part[i].n_exc[j];
	}
	qsort(w->exc, n, sizeof(*w->exc), by_place);
	return 0;
}

static void
free_parts(struct packing *p, uint32_t parts)
{
	for (uint32_t i = 0; p->part != NULL && i < parts; i++) {
		for (uint32_t j = 0; p->part[i].exc != NULL && j < p->n_jobs; j++)
			free(p->part[i].exc[j]);
		free(p->part[i].exc), free(p->part[i].n_exc), free(p->part[i].cap), free(p->part[i].rows);
	}
	free(p->part);
}

static int
pack_all(struct packing *p, struct team *team, const char *file, struct err *err)
{
	uint32_t parts = team_size(team);
	int rc = 0;

	p->part = calloc(parts, sizeof(*p->part));
	for (uint32_t i = 0; p->part != NULL && i < parts; i++) {
		struct part *t = &p->part[i];

		t->exc = calloc(p->n_jobs, sizeof(*t->exc));
		t->n_exc = calloc(p->n_jobs, sizeof(*t->n_exc));
		t->cap = calloc(p->n_jobs, sizeof(*t->cap));
		t->rows = malloc((size_t)K_PANEL * p->max_k * sizeof(*t->rows));
		if (t->exc == NULL || t->n_exc == NULL || t->cap == NULL || t->rows == NULL)
			rc = -ENOMEM;
	}
	if (p->part == NULL || rc != 0) {
		free_parts(p, parts);
		return err_set(err, -ENOMEM, "out of memory");
	}
	team_run(team, pack_part, p);
	for (uint32_t i = 0; i < parts && rc == 0; i++) {
		struct part *t = &p->part[i];

		if (t->rc == -EINVAL)
			rc = err_set(err, -EINVAL, "%s: tensor '%s' is not finite at [%u, %u]", file, p->job[t->bad_job].t->name,
			    t->bad_row, t->bad_col);
		else if (t->rc != 0)
			rc = err_set(err, t->rc, "out of memory");
	}
	for (uint32_t j = 0; j < p->n_jobs && rc == 0; j++)
		if (join_exceptions(p, parts, j) != 0)
			rc = err_set(err, -ENOMEM, "out of memory");
	free_parts(p, parts);
	return rc;
}

/* Progress is told between slices of the panel list. */
static int
pack_in_slices(struct packing *p, struct team *team, const char *file, void (*progress)(void *, int), void *arg,
    struct err *err)
{
	uint32_t jobs = p->n_jobs, done = 0;
	struct job *all = p->job;
	int rc = 0;

	while (done < jobs && rc == 0) {
		uint32_t n = 0, panels = 0;

		while (done + n < jobs && (n == 0 || panels < 4096)) {
			all[done + n].first_panel = panels;
			panels += all[done + n].w->n_pad / K_PANEL;
			n++;
		}
		p->job = all + done;
		p->n_jobs = n;
		p->n_panels = panels;
		p->next = 0;
		rc = pack_all(p, team, file, err);
		done += n;
		if (progress != NULL)
			progress(arg, (int)(100u * done / jobs));
	}
	p->job = all;
	return rc;
}

static const char *const tensor_of[] = {
	[GROUP_Q] = "self_attn.q_proj", [GROUP_K] = "self_attn.k_proj", [GROUP_V] = "self_attn.v_proj",
	[GROUP_O] = "self_attn.o_proj", [GROUP_GATE] = "mlp.gate_proj", [GROUP_UP] = "mlp.up_proj",
	[GROUP_DOWN] = "mlp.down_proj",
};

static int
add_job(struct packing *p, struct safetensors *st, struct k_weight *w, const char *name, uint32_t n, uint32_t k,
    struct err *err)
{
	const struct st_tensor *t = want(st, name, 2, n, k, err);

	if (t == NULL)
		return -EINVAL;
	if (k > p->max_k)
		p->max_k = k;
	p->job[p->n_jobs++] = (struct job){w, t, 0};
	return 0;
}

static int
collect_layer(struct model *m, struct safetensors *st, uint32_t l, struct packing *p, struct err *err)
{
	struct model_layer *layer = &m->layer[l];
	char name[96];
	uint32_t n, k;
	int rc;

	snprintf(name, sizeof(name), "model.layers.%u.input_layernorm.weight", l);
	if ((rc = load_norm(st, name, m->shape.hidden, &layer->input_norm, err)) != 0)
		return rc;
	snprintf(name, sizeof(name), "model.layers.%u.post_attention_layernorm.weight", l);
	if ((rc = load_norm(st, name, m->shape.hidden, &layer->post_norm, err)) != 0)
		return rc;
	for (enum plan_group g = GROUP_Q; g <= GROUP_DOWN; g++) {
		linear_dims(&m->shape, g, &n, &k);
		snprintf(name, sizeof(name), "model.layers.%u.%s.weight", l, tensor_of[g]);
		if ((rc = add_job(p, st, &layer->linear[g], name, n, k, err)) != 0)
			return rc;
	}
	return 0;
}

static int
load_embedding(struct model *m, struct safetensors *st, struct packing *p, struct err *err)
{
	static const char embed[] = "model.embed_tokens.weight", head[] = "lm_head.weight";
	uint32_t vocab = m->shape.vocab, hidden = m->shape.hidden;
	struct st_tensor *t, *h;
	int rc;

	if (!m->shape.tied && (rc = add_job(p, st, &m->lm_head, head, vocab, hidden, err)) != 0)
		return rc;
	if (m->shape.tied) {
		/* Some tied checkpoints store the same matrix twice. */
		if ((rc = add_job(p, st, &m->lm_head, embed, vocab, hidden, err)) != 0)
			return rc;
		if ((h = safetensors_find(st, head)) == NULL)
			return 0;
		t = safetensors_find(st, embed);
		h->used = 1;
		if (h->dtype != t->dtype || h->to - h->from != t->to - t->from || memcmp(h->data, t->data, t->to - t->from) != 0)
			return err_set(err, -EINVAL, "%s: tensor '%s' differs from the embedding it is tied to", st->path, head);
		return 0;
	}
	if ((t = want(st, embed, 2, vocab, hidden, err)) == NULL)
		return -EINVAL;
	m->embed = malloc((size_t)vocab * hidden * sizeof(*m->embed));
	if (m->embed == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	st_read_bf16(t, 0, (uint64_t)vocab * hidden, m->embed);
	for (size_t i = 0; i < (size_t)vocab * hidden; i++)
		if ((m->embed[i] & 0x7f80) == 0x7f80)
			return err_set(err, -EINVAL, "%s: tensor '%s' is not finite at [%zu, %zu]", st->path, embed, i / hidden,
			    i % hidden);
	return 0;
}

static int
check_extra(const struct safetensors *st, struct err *err)
{
	for (size_t i = 0; i < st->n; i++) {
		const char *name = st->tensor[i].name;
		size_t n = strlen(name);

		if (!st->tensor[i].used && !(n > 8 && strcmp(name + n - 8, "inv_freq") == 0))
			return err_set(err, -EINVAL, "%s: tensor '%s' has no place in this architecture", st->path, name);
	}
	return 0;
}

static int
place_planes(struct model *m, const struct packing *p, struct err *err)
{
	size_t at = 0;

	for (uint32_t j = 0; j < p->n_jobs; j++) {
		uint32_t n = (uint32_t)p->job[j].t->dim[0], k = (uint32_t)p->job[j].t->dim[1];

		m->arena_bytes += k_weight_plan(p->job[j].w, n, k);
	}
	m->arena = mmap(NULL, m->arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (m->arena == MAP_FAILED) {
		m->arena = NULL;
		return err_set(err, -ENOMEM, "no memory for %zu bytes of weights", m->arena_bytes);
	}
	madvise(m->arena, m->arena_bytes, MADV_HUGEPAGE);
	for (uint32_t j = 0; j < p->n_jobs; j++) {
		struct k_weight *w = p->job[j].w;

		k_weight_place(w, (char *)m->arena + at);
		at += k_weight_plan(&(struct k_weight){0}, w->n, w->k);
	}
	return 0;
}

static int
make_rope(struct model *m, struct err *err)
{
	const struct model_shape *s = &m->shape;
	uint32_t half = s->head_dim / 2;

	m->rope_cos = malloc((size_t)s->max_context * half * sizeof(float));
	m->rope_sin = malloc((size_t)s->max_context * half * sizeof(float));
	if (m->rope_cos == NULL || m->rope_sin == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (uint32_t i = 0; i < half; i++) {
		double freq = pow(s->rope_theta, -2.0 * i / s->head_dim);

		for (uint32_t pos = 0; pos < s->max_context; pos++) {
			m->rope_cos[(size_t)pos * half + i] = (float)cos(pos * freq);
			m->rope_sin[(size_t)pos * half + i] = (float)sin(pos * freq);
		}
	}
	return 0;
}

static void
count_bytes(struct model *m)
{
	for (uint32_t l = 0; l < m->shape.n_layers; l++)
		for (enum plan_group g = GROUP_Q; g <= GROUP_DOWN; g++)
			m->n_exceptions += m->layer[l].linear[g].n_exc;
	m->n_exceptions += m->lm_head.n_exc;
	m->weights_bytes = model_plan_bytes(&m->shape) + m->n_exceptions * sizeof(struct k_exception);
}

/* Without planes the masters are still looked at: a bad weight is found by --check. */
static int
check_finite(const struct packing *p, const char *file, struct err *err)
{
	for (uint32_t j = 0; j < p->n_jobs; j++) {
		const struct st_tensor *t = p->job[j].t;
		uint16_t row[1024];

		for (uint64_t at = 0, n = t->dim[0] * t->dim[1]; at < n; at += 1024) {
			uint64_t len = n - at < 1024 ? n - at : 1024;

			st_read_bf16(t, at, len, row);
			for (uint64_t i = 0; i < len; i++)
				if ((row[i] & 0x7f80) == 0x7f80)
					return err_set(err, -EINVAL, "%s: tensor '%s' is not finite at [%llu, %llu]", file, t->name,
					    (unsigned long long)((at + i) / t->dim[1]), (unsigned long long)((at + i) % t->dim[1]));
		}
	}
	return 0;
}

static int
load_weights(struct model *m, struct safetensors *st, struct team *team, bool check_only,
    void (*progress)(void *, int), void *arg, struct err *err)
{
	struct packing p = {0};
	int rc = 0;

	m->layer = calloc(m->shape.n_layers, sizeof(*m->layer));
	p.job = calloc((size_t)m->shape.n_layers * (GROUP_DOWN + 1) + 1, sizeof(*p.job));
	if (m->layer == NULL || p.job == NULL)
		rc = err_set(err, -ENOMEM, "out of memory");
	for (uint32_t l = 0; l < m->shape.n_layers && rc == 0; l++)
		rc = collect_layer(m, st, l, &p, err);
	if (rc == 0)
		rc = load_norm(st, "model.norm.weight", m->shape.hidden, &m->final_norm, err);
	if (rc == 0)
		rc = load_embedding(m, st, &p, err);
	if (rc == 0)
		rc = check_extra(st, err);
	if (rc == 0 && check_only)
		rc = check_finite(&p, st->path, err);
	else if (rc == 0) {
		rc = place_planes(m, &p, err);
		if (rc == 0)
			rc = pack_in_slices(&p, team, st->path, progress, arg, err);
		if (rc == 0)
			rc = make_rope(m, err);
		if (rc == 0)
			count_bytes(m);
	}
	free(p.job);
	return rc;
}

static void
digest(struct model *m, const char *config, size_t len, const struct safetensors *st)
{
	uint8_t out[SHA256_DIGEST_LENGTH];
	uint64_t bytes = st->bytes;
	SHA2_CTX sha;

	SHA256Init(&sha);
	SHA256Update(&sha, (const uint8_t *)config, len);
	SHA256Update(&sha, st->map, st->header_bytes);
	SHA256Update(&sha, (const uint8_t *)&bytes, sizeof(bytes));
	SHA256Final(out, &sha);
	for (int i = 0; i < 8; i++)
		m->digest = m->digest << 8 | out[i];
}

static int
open_weights(const struct model *m, struct safetensors *st, struct err *err)
{
	char *path = join(m->path, "model.safetensors"), *index = join(m->path, "model.safetensors.index.json");
	int rc;

	if (path == NULL || index == NULL)
		rc = err_set(err, -ENOMEM, "out of memory");
	else if (access(path, F_OK) != 0 && access(index, F_OK) == 0)
		rc = err_set(err, -ENOTSUP, "%s: sharded safetensors are not supported", index);
	else
		rc = safetensors_open(st, path, err);
	free(path), free(index);
	return rc;
}

static int
load(struct model *m, struct team *team, uint32_t max_context, uint64_t extra, bool check_only,
    void (*progress)(void *, int), void *arg, struct err *err)
{
	struct safetensors st = {0};
	struct err ignored;
	char *config = NULL;
	size_t len = 0;
	int rc = load_shape(m, &config, &len, err);

	if (rc == 0 && max_context != 0 && max_context < m->shape.max_context)
		m->shape.max_context = max_context;
	if (rc == 0)
		rc = read_file(m->path, "tokenizer.json", &m->tokenizer_json, &m->tokenizer_json_len, err);
	if (rc == 0) {
		int r = read_file(m->path, "tokenizer_config.json", &m->tokenizer_config_json, &m->tokenizer_config_json_len,
		    &ignored);

		if (r != 0 && r != -ENOENT)
			rc = err_set(err, r, "%s", ignored.text);
	}
	if (rc == 0)
		rc = open_weights(m, &st, err);
	if (rc == 0)
		rc = check_memory(m, model_plan_bytes(&m->shape), extra, err);
	if (rc == 0)
		rc = load_weights(m, &st, team, check_only, progress, arg, err);
	if (rc == 0)
		digest(m, config, len, &st);
	safetensors_close(&st);
	free(config);
	return rc;
}

int
model_load(struct model **out, const char *dir, struct team *team, uint32_t max_context, uint64_t extra_bytes,
    bool check_only, void (*progress)(void *, int), void *arg, struct err *err)
{
	struct model *m = calloc(1, sizeof(*m));
	size_t n = strlen(dir);
	const char *name;
	int rc;

	*out = NULL;
	if (m == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	while (n > 1 && dir[n - 1] == '/')
		n--;
	m->path = strndup(dir, n);
	name = m->path == NULL ? NULL : strrchr(m->path, '/');
	m->name = m->path == NULL ? NULL : strdup(name != NULL && name[1] != '\0' ? name + 1 : m->path);
	rc = m->name == NULL ? err_set(err, -ENOMEM, "out of memory")
	                     : load(m, team, max_context, extra_bytes, check_only, progress, arg, err);
	if (rc != 0)
		model_free(&m);
	*out = m;
	return rc;
}

void
model_free(struct model **mp)
{
	struct model *m = *mp;

	if (m == NULL)
		return;
	for (uint32_t l = 0; m->layer != NULL && l < m->shape.n_layers; l++) {
		free(m->layer[l].input_norm), free(m->layer[l].post_norm);
		for (enum plan_group g = GROUP_Q; g <= GROUP_DOWN; g++)
			free(m->layer[l].linear[g].exc);
	}
	free(m->layer), free(m->lm_head.exc), free(m->embed), free(m->final_norm), free(m->rope_cos), free(m->rope_sin);
	if (m->arena != NULL)
		munmap(m->arena, m->arena_bytes);
	free(m->tokenizer_json), free(m->tokenizer_config_json), free(m->path), free(m->name);
	free(m);
	*mp = NULL;
}

void
model_embed(const struct model *m, uint32_t token, float *out)
{
	uint32_t hidden = m->shape.hidden;

	if (m->embed == NULL) {
		k_unpack_row(&m->lm_head, token, out);
		return;
	}
	for (uint32_t i = 0; i < hidden; i++)
		out[i] = k_bf16_to_float(m->embed[(size_t)token * hidden + i]);
}
