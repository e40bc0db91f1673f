/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/model.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <sha2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "daemon/engine/shards.h"

static const char embed_name[] = "model.embed_tokens.weight", head_name[] = "lm_head.weight";

static const char *const linear_name[] = {
	[GROUP_Q] = "self_attn.q_proj", [GROUP_K] = "self_attn.k_proj", [GROUP_V] = "self_attn.v_proj",
	[GROUP_O] = "self_attn.o_proj", [GROUP_GATE] = "mlp.gate_proj", [GROUP_UP] = "mlp.up_proj",
	[GROUP_DOWN] = "mlp.down_proj",
};

/* ---- memory ---- */

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

static bool
has_bias(const struct model_shape *s, enum plan_group g)
{
	return g <= GROUP_V ? s->qkv_bias : g == GROUP_O ? s->o_bias : s->mlp_bias;
}

static uint64_t
align64(uint64_t n)
{
	return (n + 63) & ~(uint64_t)63;
}

static uint64_t
rope_bytes(const struct model_shape *s)
{
	return align64((uint64_t)s->max_context * (s->head_dim / 2) * sizeof(float));
}

uint64_t
model_plan_bytes(const struct model_shape *s)
{
	uint64_t norm = align64(s->hidden * sizeof(float)), layer = 2 * norm, all;
	struct k_weight w;
	uint32_t n, k;

	for (enum plan_group g = GROUP_Q; g <= GROUP_DOWN; g++) {
		linear_dims(s, g, &n, &k);
		layer += k_weight_plan(&w, n, k);
		if (has_bias(s, g))
			layer += align64(n * sizeof(float));
	}
	if (s->qk_norm)
		layer += 2 * align64(s->head_dim * sizeof(float));
	all = layer * s->n_layers + norm + k_weight_plan(&w, s->vocab, s->hidden);
	if (!s->tied)
		all += align64((uint64_t)s->vocab * s->hidden * sizeof(uint16_t));
	return all + 2 * rope_bytes(s);
}

/* The number after key at the start of a line; UINT64_MAX if there is none ("max"). */
static uint64_t
read_number(const char *path, const char *key)
{
	FILE *f = fopen(path, "re");
	uint64_t v = UINT64_MAX;
	char line[256];

	if (f == NULL)
		return v;
	while (fgets(line, sizeof(line), f) != NULL)
		if (strncmp(line, key, strlen(key)) == 0 && sscanf(line + strlen(key), "%" SCNu64, &v) == 1)
			break;
	fclose(f);
	return v;
}

/* What one control group leaves. The page cache is charged to it, the file we
 * are about to pack too, but gives way. */
static uint64_t
cgroup_left(const char *dir)
{
	char path[4400];
	uint64_t max, used, file;

	snprintf(path, sizeof(path), "%s/memory.max", dir);
	max = read_number(path, "");
	snprintf(path, sizeof(path), "%s/memory.current", dir);
	used = read_number(path, "");
	if (max == UINT64_MAX || used == UINT64_MAX)
		return UINT64_MAX;
	snprintf(path, sizeof(path), "%s/memory.stat", dir);
	for (int i = 0; i < 2; i++) {
		file = read_number(path, i == 0 ? "inactive_file " : "active_file ");
		if (file != UINT64_MAX)
			used -= file < used ? file : used;
	}
	return max > used ? max - used : 0;
}

/* MemAvailable, and what our control group (v2) and all above it leave. */
static uint64_t
memory_available(void)
{
	static const char root[] = "/sys/fs/cgroup";
	uint64_t avail = read_number("/proc/meminfo", "MemAvailable:"), left;
	char line[4096], dir[4200];
	FILE *f = fopen("/proc/self/cgroup", "re");

	avail = avail == UINT64_MAX ? avail : avail * 1024;
	snprintf(dir, sizeof(dir), "%s", root);
	while (f != NULL && fgets(line, sizeof(line), f) != NULL) {
		line[strcspn(line, "\n")] = '\0';
		if (strncmp(line, "0::/", 4) == 0)
			snprintf(dir, sizeof(dir), "%s%s", root, line + 3);
	}
	if (f != NULL)
		fclose(f);
	do {
		left = cgroup_left(dir);
		if (left < avail)
			avail = left;
		*strrchr(dir, '/') = '\0';
	} while (strlen(dir) >= sizeof(root) - 1);
	return avail;
}

/* Three digits: "2.47 GB". */
static const char *
human(uint64_t bytes, char buf[32])
{
	static const char *const unit[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
	double v = (double)bytes;
	int u = 0;

	for (; v >= 999.5 && u < 6; u++)
		v /= 1000;
	snprintf(buf, 32, "%.*f %s", u == 0 || v >= 99.95 ? 0 : v >= 9.995 ? 1 : 2, v, unit[u]);
	return buf;
}

static int
check_memory(const struct model *m, uint64_t extra, struct err *err)
{
	uint64_t weights = model_plan_bytes(&m->shape), avail = memory_available();
	char a[32], b[32], c[32];

	if (weights <= avail && extra <= avail - weights)
		return 0;
	return err_set(err, -ENOMEM, "model needs %s of weights and %s of KV cache, %s of memory is available",
	    human(weights, a), human(extra, b), human(avail, c));
}

/* ---- tensors ---- */

/* A tensor of the file and where it goes. */
struct want {
	const struct st_tensor *t;
	struct k_weight *linear;      /* packed into this one, or */
	float **vector;               /* a norm or bias, kept here as FP32, or */
	uint16_t **embed;             /* kept here as BF16, or */
	const struct st_tensor *twin; /* must hold the same bytes as this */
	uint32_t rows, cols;
	uint32_t first_item;
};

/* What one part of the team does at a time: up to 32 rows. */
struct item {
	uint32_t want, panel;
	struct k_exception *exc;
	uint32_t n_exc;
};

struct work {
	struct want *want;
	struct item *item;
	uint32_t n_wants, n_items;
	uint32_t max_cols;
	bool check_only;
	void (*progress)(void *, int);
	void *progress_arg;
	uint32_t next;                /* atomic: the next item to take */
	uint32_t failed;              /* atomic: somebody failed, take no more */
	pthread_mutex_t lock;         /* over what follows */
	uint32_t bad;                 /* the first item that failed */
	int rc;
	struct err err;
};

static struct st_tensor *
find_tensor(const struct shards *st, const char *name, uint32_t n_dims, uint32_t d0, uint32_t d1, struct err *err)
{
	struct st_tensor *t = shards_find(st, name);
	char is[128] = "", expected[64];
	size_t at = 0;

	if (t == NULL) {
		err_set(err, -EINVAL, "%s: tensor '%s' is missing", st->list, name);
		return NULL;
	}
	t->used = true;
	if (t->n_dims == n_dims && t->dim[0] == d0 && (n_dims == 1 || t->dim[1] == d1))
		return t;
	for (uint32_t i = 0; i < t->n_dims; i++)
		at += (size_t)snprintf(is + at, sizeof(is) - at, "%s%" PRIu64, i > 0 ? ", " : "", t->dim[i]);
	snprintf(expected, sizeof(expected), n_dims == 1 ? "[%u]" : "[%u, %u]", d0, d1);
	err_set(err, -EINVAL, "%s: tensor '%s' has shape [%s], expected %s", t->file, name, is, expected);
	return NULL;
}

/* Adds a tensor [rows, cols]; a norm or bias is a [cols]. */
static struct want *
add_want(struct work *w, const struct shards *st, const char *name, bool vector, uint32_t rows, uint32_t cols,
    struct err *err)
{
	struct st_tensor *t = vector ? find_tensor(st, name, 1, cols, 0, err) : find_tensor(st, name, 2, rows, cols, err);
	struct want *want = &w->want[w->n_wants];

	if (t == NULL)
		return NULL;
	*want = (struct want){.t = t, .rows = rows, .cols = cols};
	w->n_wants++;
	if (cols > w->max_cols)
		w->max_cols = cols;
	return want;
}

static int
want_vector(struct work *w, const struct shards *st, const char *name, uint32_t n, float **out, struct err *err)
{
	struct want *want = add_want(w, st, name, true, 1, n, err);

	if (want == NULL)
		return -EINVAL;
	want->vector = out;
	return 0;
}

static int
want_linear(struct work *w, const struct shards *st, const char *name, uint32_t n, uint32_t k,
    struct k_weight *out, struct err *err)
{
	struct want *want = add_want(w, st, name, false, n, k, err);

	if (want == NULL)
		return -EINVAL;
	want->linear = out;
	return 0;
}

static int
want_layer(struct work *w, const struct shards *st, struct model *m, uint32_t l, struct err *err)
{
	struct model_layer *layer = &m->layer[l];
	uint32_t n, k, hidden = m->shape.hidden;
	char name[96];
	int rc;

	snprintf(name, sizeof(name), "model.layers.%u.input_layernorm.weight", l);
	if ((rc = want_vector(w, st, name, hidden, &layer->input_norm, err)) != 0)
		return rc;
	snprintf(name, sizeof(name), "model.layers.%u.post_attention_layernorm.weight", l);
	if ((rc = want_vector(w, st, name, hidden, &layer->post_norm, err)) != 0)
		return rc;
	for (enum plan_group g = GROUP_Q; g <= GROUP_DOWN; g++) {
		linear_dims(&m->shape, g, &n, &k);
		snprintf(name, sizeof(name), "model.layers.%u.%s.weight", l, linear_name[g]);
		if ((rc = want_linear(w, st, name, n, k, &layer->linear[g], err)) != 0)
			return rc;
		snprintf(name, sizeof(name), "model.layers.%u.%s.bias", l, linear_name[g]);
		if (has_bias(&m->shape, g) && (rc = want_vector(w, st, name, n, &layer->bias[g], err)) != 0)
			return rc;
	}
	for (int i = 0; i < 2 && m->shape.qk_norm; i++) {
		snprintf(name, sizeof(name), "model.layers.%u.self_attn.%c_norm.weight", l, "qk"[i]);
		rc = want_vector(w, st, name, m->shape.head_dim, i == 0 ? &layer->q_norm : &layer->k_norm, err);
		if (rc != 0)
			return rc;
	}
	return 0;
}

/* Tied: the embedding is packed as lm_head. Some checkpoints store it twice. */
static int
want_vocabulary(struct work *w, const struct shards *st, struct model *m, struct err *err)
{
	uint32_t vocab = m->shape.vocab, hidden = m->shape.hidden;
	const char *lm_head = m->shape.tied ? embed_name : head_name;
	struct want *want;
	int rc = want_linear(w, st, lm_head, vocab, hidden, &m->lm_head, err);

	if (rc != 0) {
		if (!m->shape.tied && shards_find(st, head_name) == NULL)
			err_set(err, rc, "%s: tensor '%s' is missing, and tie_word_embeddings is not true", st->list,
			    head_name);
		return rc;
	}
	if (m->shape.tied && shards_find(st, head_name) == NULL)
		return 0;
	want = add_want(w, st, m->shape.tied ? head_name : embed_name, false, vocab, hidden, err);
	if (want == NULL)
		return -EINVAL;
	if (m->shape.tied)
		want->twin = shards_find(st, embed_name);
	else
		want->embed = &m->embed;
	return 0;
}

/* Old checkpoints keep the RoPE frequencies as buffers. */
static bool
ignored(const char *name)
{
	static const char end[] = ".rotary_emb.inv_freq";
	size_t n = strlen(name), m = sizeof(end) - 1;

	return n > m && strcmp(name + n - m, end) == 0;
}

static int
check_extra(const struct shards *st, const char *arch, struct err *err)
{
	char shown[ST_PRINTABLE];

	for (size_t i = 0; i < st->n; i++) {
		for (size_t j = 0; j < st->file[i].n; j++) {
			const struct st_tensor *t = &st->file[i].tensor[j];

			if (!t->used && !ignored(t->name))
				return err_set(err, -EINVAL, "%s: tensor '%s' is not part of %s", t->file,
				    safetensors_printable(t->name, shown), arch);
		}
	}
	return 0;
}

static int
compare_places(const void *pa, const void *pb)
{
	const struct want *a = pa, *b = pb;
	int file = strcmp(a->t->file, b->t->file);

	return file != 0 ? file : a->t->from < b->t->from ? -1 : a->t->from > b->t->from;
}

static int
collect(struct work *w, const struct shards *st, struct model *m, struct err *err)
{
	int rc = 0;

	w->want = calloc((size_t)m->shape.n_layers * (2 * (GROUP_DOWN + 1) + 4) + 3, sizeof(*w->want));
	if (w->want == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (uint32_t l = 0; l < m->shape.n_layers && rc == 0; l++)
		rc = want_layer(w, st, m, l, err);
	if (rc != 0 || (rc = want_vector(w, st, "model.norm.weight", m->shape.hidden, &m->final_norm, err)) != 0 ||
	    (rc = want_vocabulary(w, st, m, err)) != 0)
		return rc;
	return check_extra(st, m->shape.arch, err);
}

/* In the order of the files, so that each is read from front to back. */
static int
cut_into_items(struct work *w, struct err *err)
{
	uint64_t n_items = 0;

	qsort(w->want, w->n_wants, sizeof(*w->want), compare_places);
	for (uint32_t i = 0; i < w->n_wants; i++)
		n_items += (w->want[i].rows + K_PANEL - 1) / K_PANEL;
	w->item = calloc(n_items, sizeof(*w->item));
	if (w->item == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (uint32_t i = 0; i < w->n_wants; i++) {
		w->want[i].first_item = w->n_items;
		for (uint32_t panel = 0; panel * K_PANEL < w->want[i].rows; panel++)
			w->item[w->n_items++] = (struct item){.want = i, .panel = panel};
	}
	return 0;
}

/* ---- packing ---- */

/* One memory for all weights: base NULL sets sizes only. With RoPE's tables the sum of model_plan_bytes(). */
static uint64_t
arrange(struct model *m, char *base)
{
	const struct model_shape *s = &m->shape;
	uint64_t at = 0, norm = align64(s->hidden * sizeof(float));
	uint32_t n, k;
#define TAKE(field, bytes) ((field) = base != NULL ? (void *)(base + at) : NULL, at += (bytes))
#define TAKE_LINEAR(w, n, k) do { \
		size_t bytes_ = k_weight_plan(w, n, k); \
		if (base != NULL) \
			k_weight_place(w, base + at); \
		at += bytes_; \
	} while (0)

	TAKE(m->final_norm, norm);
	for (uint32_t l = 0; l < s->n_layers; l++) {
		TAKE(m->layer[l].input_norm, norm);
		TAKE(m->layer[l].post_norm, norm);
		for (enum plan_group g = GROUP_Q; g <= GROUP_DOWN; g++) {
			linear_dims(s, g, &n, &k);
			TAKE_LINEAR(&m->layer[l].linear[g], n, k);
			if (has_bias(s, g))
				TAKE(m->layer[l].bias[g], align64(n * sizeof(float)));
		}
		if (s->qk_norm) {
			TAKE(m->layer[l].q_norm, align64(s->head_dim * sizeof(float)));
			TAKE(m->layer[l].k_norm, align64(s->head_dim * sizeof(float)));
		}
	}
	TAKE_LINEAR(&m->lm_head, s->vocab, s->hidden);
	if (!s->tied)
		TAKE(m->embed, align64((uint64_t)s->vocab * s->hidden * sizeof(uint16_t)));
#undef TAKE
#undef TAKE_LINEAR
	return at;
}

static int
allocate_rope(struct model *m, struct err *err)
{
	m->rope = aligned_alloc(64, 2 * rope_bytes(&m->shape));
	if (m->rope == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	m->rope_cos = m->rope;
	m->rope_sin = (float *)(void *)((char *)m->rope + rope_bytes(&m->shape));
	return 0;
}

static int
allocate(struct model *m, struct err *err)
{
	uint64_t bytes = arrange(m, NULL);
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char a[32];

	if (p == MAP_FAILED)
		return err_set(err, -ENOMEM, "no memory for %s of weights: %s", human(bytes, a), strerror(errno));
	madvise(p, bytes, MADV_HUGEPAGE); /* fewer TLB misses; does without */
	m->arena = p;
	m->arena_bytes = bytes;
	arrange(m, p);
	return 0;
}

static int
pack_item(const struct want *want, struct item *it, const uint16_t *rows, struct err *err)
{
	struct k_exception *exc = NULL;
	uint32_t cap = 0, row, col;
	int rc = k_pack_panel(want->linear, it->panel, rows, &exc, &it->n_exc, &cap, &row, &col);

	if (rc == 0 && it->n_exc > 0) {
		it->exc = malloc(it->n_exc * sizeof(*it->exc));
		if (it->exc == NULL)
			rc = -ENOMEM;
		else
			memcpy(it->exc, exc, it->n_exc * sizeof(*it->exc));
	}
	free(exc);
	return rc == 0 ? 0 : err_set(err, rc, "%s: tensor '%s': %s", want->t->file, want->t->name, strerror(-rc));
}

static int
do_item(struct work *w, struct item *it, uint16_t *buf, struct err *err)
{
	const struct want *want = &w->want[it->want];
	uint32_t row = it->panel * K_PANEL, n = want->rows - row < K_PANEL ? want->rows - row : K_PANEL;
	uint64_t at = (uint64_t)row * want->cols, len = (uint64_t)n * want->cols;
	const uint8_t *here = want->t->data + at * safetensors_elem_bytes(want->t->dtype);
	int rc;

	/* As they lie in the file, where they can be read so: packing finds what is not finite by itself. */
	if (want->linear != NULL && !w->check_only && want->t->dtype == ST_BF16 && (uintptr_t)here % sizeof(uint16_t) == 0) {
		rc = pack_item(want, it, (const uint16_t *)(const void *)here, err);
		if (rc != -EINVAL)
			return rc;
	}
	if (want->twin != NULL) {
		size_t size = safetensors_elem_bytes(want->t->dtype);

		if (want->t->dtype != want->twin->dtype ||
		    memcmp(want->t->data + at * size, want->twin->data + at * size, len * size) != 0)
			return err_set(err, -EINVAL, "%s: tensor '%s' differs from '%s' it is tied to", want->t->file,
			    want->t->name, want->twin->name);
		return 0;
	}
	rc = safetensors_read_bf16(want->t, at, len, buf, err);
	if (rc != 0 || w->check_only)
		return rc;
	if (want->linear != NULL)
		return pack_item(want, it, buf, err);
	if (want->embed != NULL)
		memcpy(*want->embed + at, buf, len * sizeof(*buf));
	else
		for (uint32_t i = 0; i < want->cols; i++)
			(*want->vector)[i] = k_bf16_to_float(buf[i]);
	return 0;
}

/* What was packed is not read again: the file's pages need not stay beside the planes. */
static void
let_go_of_pages(const struct work *w, const struct item *it)
{
	const struct want *want = &w->want[it->want];
	uint32_t row = it->panel * K_PANEL, n = want->rows - row < K_PANEL ? want->rows - row : K_PANEL;
	size_t size = safetensors_elem_bytes(want->t->dtype);
	uintptr_t from = (uintptr_t)(want->t->data + (uint64_t)row * want->cols * size);
	uintptr_t to = from + (uint64_t)n * want->cols * size, page = (uintptr_t)sysconf(_SC_PAGESIZE);

	/* Down at both ends: the last page belongs to the next item too, the first one was left for this. */
	from &= ~(page - 1);
	to &= ~(page - 1);
	if (to > from)
		madvise((void *)from, to - from, MADV_DONTNEED);
}

/* Items are taken in order and whoever took one finishes it: the first bad item
 * of a file is the one that is told, however many threads there are. */
static void
fail(struct work *w, uint32_t item, int rc, const struct err *err)
{
	__atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
	pthread_mutex_lock(&w->lock);
	if (item < w->bad) {
		w->bad = item;
		w->rc = rc;
		w->err = *err;
	}
	pthread_mutex_unlock(&w->lock);
}

static void
work_part(void *arg, uint32_t part, uint32_t parts)
{
	struct work *w = arg;
	uint16_t *buf = malloc((size_t)K_PANEL * w->max_cols * sizeof(*buf));
	struct err err;
	int told = 0;

	(void)parts;
	while (!__atomic_load_n(&w->failed, __ATOMIC_RELAXED)) {
		uint32_t i = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED);
		int rc, percent;

		if (i >= w->n_items)
			break;
		rc = buf == NULL ? err_set(&err, -ENOMEM, "out of memory") : do_item(w, &w->item[i], buf, &err);
		if (rc != 0)
			fail(w, i, rc, &err);
		let_go_of_pages(w, &w->item[i]);
		percent = (int)((uint64_t)i * 100 / w->n_items);
		if (part == 0 && w->progress != NULL && percent > told)
			w->progress(w->progress_arg, told = percent);
	}
	free(buf);
}

/* What needs all panels; then their exceptions, one after the other: ascending. */
static int
finish_linear(const struct work *w, const struct want *want, uint64_t *count, struct err *err)
{
	uint32_t panels = (want->rows + K_PANEL - 1) / K_PANEL;
	struct k_weight *k = want->linear;
	uint64_t n = 0;

	for (uint32_t i = 0; i < panels; i++)
		n += w->item[want->first_item + i].n_exc;
	k_weight_finish(k);
	*count += n;
	if (n == 0)
		return 0;
	k->exc = n > UINT32_MAX ? NULL : malloc(n * sizeof(*k->exc));
	if (k->exc == NULL)
		return err_set(err, -ENOMEM, "no memory for %" PRIu64 " exceptions of tensor '%s'", n, want->t->name);
	for (uint32_t i = 0; i < panels; i++) {
		const struct item *it = &w->item[want->first_item + i];

		if (it->n_exc > 0)
			memcpy(k->exc + k->n_exc, it->exc, it->n_exc * sizeof(*k->exc));
		k->n_exc += it->n_exc;
	}
	return 0;
}

static int
run_work(struct work *w, struct model *m, struct team *team, struct err *err)
{
	int rc = 0;

	w->bad = UINT32_MAX;
	pthread_mutex_init(&w->lock, NULL);
	if (w->progress != NULL)
		w->progress(w->progress_arg, 0);
	team_run(team, work_part, w);
	pthread_mutex_destroy(&w->lock);
	if (w->rc != 0)
		return err_set(err, w->rc, "%s", w->err.text);
	for (uint32_t i = 0; i < w->n_wants && !w->check_only && rc == 0; i++)
		if (w->want[i].linear != NULL)
			rc = finish_linear(w, &w->want[i], &m->n_exceptions, err);
	if (rc == 0 && w->progress != NULL)
		w->progress(w->progress_arg, 100);
	return rc;
}

static void
free_work(struct work *w)
{
	for (uint32_t i = 0; i < w->n_items; i++)
		free(w->item[i].exc);
	free(w->item);
	free(w->want);
}

static void
rope_part(void *arg, uint32_t part, uint32_t parts)
{
	const struct model *m = arg;
	uint32_t half = m->shape.head_dim / 2, from, to;
	double freq[CONFIG_MAX_HEAD_DIM / 2];

	for (uint32_t i = 0; i < half; i++)
		freq[i] = config_rope_freq(&m->shape, i);
	team_share(m->shape.max_context, part, parts, &from, &to);
	for (uint32_t pos = from; pos < to; pos++) {
		for (uint32_t i = 0; i < half; i++) {
			m->rope_cos[(size_t)pos * half + i] = (float)cos(pos * freq[i]);
			m->rope_sin[(size_t)pos * half + i] = (float)sin(pos * freq[i]);
		}
	}
}

static uint32_t
n_linear(const struct model *m)
{
	return m->shape.n_layers * (GROUP_DOWN + 1) + 1;
}

/* By number, lm_head last. */
static struct k_weight *
linear_at(const struct model *m, uint32_t i)
{
	return i / (GROUP_DOWN + 1) < m->shape.n_layers ? &m->layer[i / (GROUP_DOWN + 1)].linear[i % (GROUP_DOWN + 1)] :
	    (struct k_weight *)(uintptr_t)&m->lm_head;
}

static int
packed_path(const struct model *m, char path[4096], struct err *err)
{
	return snprintf(path, 4096, "%s/" PACKED_NAME, m->path) < 4096 ? 0 : err_set(err, -ENAMETOOLONG, "%s: %s", m->path,
	    strerror(ENAMETOOLONG));
}

static struct packed_key
packed_key(const struct model *m)
{
	return (struct packed_key){m->digest, m->files};
}

/* False: there is no packed file of this checkpoint. */
static bool
take_packed(struct model *m, struct team *team)
{
	struct packed_key key = packed_key(m);
	uint64_t bytes = arrange(m, NULL);
	struct err *err = &m->packed_why;
	char path[4096];
	int rc = packed_path(m, path, err);

	if (rc == 0 && (rc = packed_open(&m->packed, path, &key, bytes, team, err)) == 0)
		arrange(m, m->packed.arena);
	for (uint32_t i = 0; rc == 0 && i < n_linear(m); i++) {
		struct k_weight *w = linear_at(m, i);

		if ((rc = packed_take(&m->packed, w, err)) == 0)
			m->n_exceptions += w->n_exc;
	}
	if (rc == 0) {
		m->arena = m->packed.arena;
		m->arena_bytes = bytes;
		return true;
	}
	if (rc == -ENOENT)
		*err->text = '\0';
	packed_close(&m->packed);
	m->n_exceptions = 0;
	return false;
}

int
model_write_packed(const struct model *m, struct team *team, struct err *err)
{
	const struct k_weight **w = calloc(n_linear(m), sizeof(*w));
	struct packed_key key = packed_key(m);
	char path[4096];
	int rc = packed_path(m, path, err);

	if (w == NULL)
		rc = err_set(err, -ENOMEM, "out of memory");
	for (uint32_t i = 0; rc == 0 && i < n_linear(m); i++)
		w[i] = linear_at(m, i);
	if (rc == 0)
		rc = packed_write(path, &key, m->arena, m->arena_bytes, w, n_linear(m), team, err);
	free(w);
	return rc;
}

static int
load_weights(struct model *m, const struct shards *st, struct team *team, uint64_t extra, struct work *w,
    struct err *err)
{
	bool packed;
	int rc;

	m->layer = calloc(m->shape.n_layers, sizeof(*m->layer));
	if (m->layer == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	if ((rc = collect(w, st, m, err)) != 0 || (rc = check_memory(m, extra, err)) != 0 ||
	    (!w->check_only && (rc = allocate_rope(m, err)) != 0))
		return rc;
	packed = !w->check_only && !m->from_checkpoint && take_packed(m, team);
	if (!packed && ((rc = cut_into_items(w, err)) != 0 || (!w->check_only && (rc = allocate(m, err)) != 0) ||
	    (rc = run_work(w, m, team, err)) != 0))
		return rc;
	if (packed && w->progress != NULL)
		w->progress(w->progress_arg, 100);
	if (!w->check_only)
		team_run(team, rope_part, m);
	m->weights_bytes = model_plan_bytes(&m->shape) - 2 * rope_bytes(&m->shape);
	m->weights_bytes += m->n_exceptions * sizeof(struct k_exception);
	return 0;
}

/* ---- the model ---- */

static uint64_t
make_digest(const char *config, size_t len, const struct shards *st)
{
	uint8_t sum[SHA256_DIGEST_LENGTH], size[8];
	uint64_t digest = 0;
	SHA2_CTX sha;

	SHA256Init(&sha);
	SHA256Update(&sha, (const uint8_t *)config, len);
	for (size_t f = 0; f < st->n; f++) {
		for (int i = 0; i < 8; i++)
			size[i] = (uint8_t)((uint64_t)st->file[f].bytes >> (8 * i));
		SHA256Update(&sha, st->file[f].map, st->file[f].header_bytes);
		SHA256Update(&sha, size, sizeof(size));
	}
	SHA256Final(sum, &sha);
	for (int i = 0; i < 8; i++)
		digest = digest << 8 | sum[i];
	return digest;
}

/* Names, sizes and times of change: another checkpoint of the same shape has the same digest. */
static uint64_t
identify(const struct shards *st)
{
	uint64_t sum = 0;

	for (size_t f = 0; f < st->n; f++) {
		const struct safetensors *s = &st->file[f];

		sum = XXH3_64bits_withSeed(s->file, strlen(s->file), sum);
		sum = XXH3_64bits_withSeed((uint64_t[]){s->bytes, (uint64_t)s->changed_ns}, 2 * sizeof(uint64_t), sum);
	}
	return sum;
}

static int
load_files(struct model *m, uint32_t max_context, char **config, size_t *len, struct shards *st, struct err *err)
{
	struct stat dir;
	int rc;

	if (stat(m->path, &dir) != 0)
		return err_set(err, -errno, "%s: %s", m->path, strerror(errno));
	if (!S_ISDIR(dir.st_mode))
		return err_set(err, -ENOTDIR, "%s: %s", m->path, strerror(ENOTDIR));
	if ((rc = config_read(&m->shape, m->path, config, len, err)) != 0)
		return rc;
	if (max_context != 0 && max_context < m->shape.max_context)
		m->shape.max_context = max_context;
	if ((rc = config_read_file(m->path, "tokenizer.json", false, &m->tokenizer_json, &m->tokenizer_json_len, err)) != 0 ||
	    (rc = config_read_file(m->path, "tokenizer_config.json", true, &m->tokenizer_config_json,
	         &m->tokenizer_config_json_len, err)) != 0 ||
	    (rc = config_read_file(m->path, "chat_template.jinja", true, &m->chat_template, &m->chat_template_len, err)) != 0)
		return rc;
	return shards_open(st, m->path, err);
}

static int
set_names(struct model *m, const char *dir, struct err *err)
{
	size_t n = strlen(dir);
	const char *slash;

	while (n > 1 && dir[n - 1] == '/')
		n--;
	m->path = strndup(dir, n);
	if (m->path != NULL) {
		slash = strrchr(m->path, '/');
		m->name = strdup(slash != NULL && slash[1] != '\0' ? slash + 1 : m->path);
	}
	return m->name != NULL ? 0 : err_set(err, -ENOMEM, "out of memory");
}

/* What is open between model_open() and model_pack(). */
struct model_source {
	struct shards shards;
	char *config;
	size_t config_len;
};

static void
close_source(struct model *m)
{
	if (m->source == NULL)
		return;
	shards_close(&m->source->shards);
	free(m->source->config);
	free(m->source);
	m->source = NULL;
}

int
model_open(struct model **out, const char *dir, uint32_t max_context, struct err *err)
{
	struct model *m = calloc(1, sizeof(*m));
	int rc;

	*out = NULL;
	if (m == NULL || (m->source = calloc(1, sizeof(*m->source))) == NULL)
		rc = err_set(err, -ENOMEM, "out of memory");
	else if ((rc = set_names(m, dir, err)) == 0)
		rc = load_files(m, max_context, &m->source->config, &m->source->config_len, &m->source->shards, err);
	if (rc != 0)
		model_free(&m);
	*out = m;
	return rc;
}

int
model_pack(struct model *m, struct team *team, uint64_t extra_bytes, bool check_only, void (*progress)(void *, int), void *arg,
    struct err *err)
{
	struct work w = {.check_only = check_only, .progress = progress, .progress_arg = arg};
	int rc;

	m->digest = make_digest(m->source->config, m->source->config_len, &m->source->shards);
	m->files = identify(&m->source->shards);
	rc = load_weights(m, &m->source->shards, team, extra_bytes, &w, err);
	free_work(&w);
	close_source(m);
	return rc;
}

int
model_load(struct model **out, const char *dir, struct team *team, uint32_t max_context, uint64_t extra_bytes,
    bool check_only, void (*progress)(void *, int), void *arg, struct err *err)
{
	int rc = model_open(out, dir, max_context, err);

	if (rc == 0 && (rc = model_pack(*out, team, extra_bytes, check_only, progress, arg, err)) != 0)
		model_free(out);
	return rc;
}

void
model_free(struct model **mp)
{
	struct model *m = *mp;

	if (m == NULL)
		return;
	close_source(m);
	for (uint32_t i = 0; m->layer != NULL && m->packed.map == NULL && i < n_linear(m); i++)
		free(linear_at(m, i)->exc);
	free(m->layer);
	free(m->rope);
	if (m->arena != NULL && m->packed.map == NULL)
		munmap(m->arena, m->arena_bytes);
	packed_close(&m->packed);
	free(m->tokenizer_json);
	free(m->tokenizer_config_json);
	free(m->chat_template);
	free(m->path);
	free(m->name);
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
