/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/engine/device.h"

#include <assert.h>
#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static_assert(KD_LM_HEAD == GROUP_LM_HEAD && KD_KV_CACHE == GROUP_KV_CACHE && KD_GROUPS == N_GROUPS, "groups");
static_assert(sizeof(struct kd_block) == sizeof(struct kv_block) && offsetof(struct kd_block, fp8) ==
    offsetof(struct kv_block, fp8), "blocks are handed over as they are");
static_assert((int)K_N_FORMATS == (int)N_FORMATS, "formats");
static_assert(KD_MAX_TOP == WIRE_MAX_TOP, "alternatives");

struct device {
	void *plugin;
	const struct kd_api *api;
	struct kd_device *dev;
	const struct model *m;
	uint32_t max_rows;

	struct kd_row *row;        /* [max_rows] */
	struct kd_want *want;      /* [max_rows]; the first n_want were asked for, those after are KD_LOGITS */
	uint32_t n_want;
	struct flight {            /* of a step that was submitted */
		struct kd_result *result; /* [max_rows] */
		uint32_t n_want, n_wanted;
		float *logits;     /* of those after the first n_want */
		struct kd_evidence *site; /* [KD_GROUPS][n_layers] */
		struct evidence *evidence; /* what those are added to; NULL: there are none */
	} flight[KD_AHEAD];
	uint64_t n_submitted, n_waited; /* flights, in turns */
	struct kd_edit *edit;      /* [cap_edit] of all wants of a step, one after the other */
	uint32_t n_edit, cap_edit;
	uint32_t *at;              /* [vocab] place in edit + 1 of a token of the want that is made; 0: none */
	bool failed;
};

/* ---- finding it ---- */

static int
open_plugin(struct device *d, const char *name, struct err *err)
{
	const char *set = getenv("OCTET_PLUGIN");
	const struct kd_api *const *api;
	char path[4096];

	snprintf(path, sizeof(path), "%s/octet-%s.so", OCTET_PLUGINDIR, name);
	if (set != NULL && *set != '\0')
		snprintf(path, sizeof(path), "%s", set);
	if (access(path, F_OK) != 0)
		return err_set(err, -ENOENT, "no %s plugin: %s: %s", name, path, strerror(errno));
	d->plugin = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (d->plugin == NULL)
		return err_set(err, -ENOENT, "the %s plugin does not load: %s", name, dlerror());
	api = dlsym(d->plugin, KD_SYMBOL);
	if (api == NULL || *api == NULL)
		return err_set(err, -ENOENT, "%s is no plugin of octet", path);
	d->api = *api;
	if (d->api->abi != KD_ABI || d->api->bytes != sizeof(*d->api))
		return err_set(err, -ENOENT, "%s is of another octet: interface %u of %u bytes, wanted %u of %zu", path,
		    d->api->abi, d->api->bytes, KD_ABI, sizeof(*d->api));
	return 0;
}

int
device_open(struct device **out, const char *name, uint32_t index, struct err *err)
{
	struct device *d = calloc(1, sizeof(*d));
	char why[256] = "";
	int rc;

	*out = NULL;
	if (d == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	rc = open_plugin(d, name, err);
	if (rc == 0 && (rc = d->api->open(&d->dev, index, why, sizeof(why))) != 0)
		err_set(err, rc, "%s", why);
	if (rc != 0)
		device_close(&d);
	*out = d;
	return rc;
}

/* The plugin stays mapped: a CUDA runtime that is unloaded leaves handlers behind. */
void
device_close(struct device **dp)
{
	struct device *d = *dp;

	if (d == NULL)
		return;
	if (d->dev != NULL)
		d->api->close(&d->dev);
	for (uint32_t i = 0; i < KD_AHEAD; i++)
		free(d->flight[i].result), free(d->flight[i].site);
	free(d->row), free(d->want), free(d->edit), free(d->at);
	free(d);
	*dp = NULL;
}

const char *
device_name(const struct device *d)
{
	return d->api->name;
}

/* ---- the model ---- */

/* Residency as a plan: fp8 where it is nested. NULL with the reason in err. */
static struct plan *
residency(const struct model_shape *s, const struct device_options *o, struct err *err)
{
	char *list = strdup(o->nested_sites != NULL ? o->nested_sites : ""), *rest = list, *word;
	struct plan_rule *rule = list != NULL ? calloc(strlen(list) + 1, sizeof(*rule)) : NULL;
	struct plan *p = NULL;
	size_t n = 0;
	int rc;

	if (rule == NULL) {
		free(list);
		err_set(err, -ENOMEM, "out of memory");
		return NULL;
	}
	if (o->nested)
		rule[n++] = (struct plan_rule){"*", "fp8", 0};
	while ((word = strsep(&rest, " \t")) != NULL)
		if (*word != '\0')
			rule[n++] = (struct plan_rule){word, "fp8", 0};
	rc = plan_derive(&p, NULL, s->n_layers, rule, n, err);
	if (rc == 0 && plan_at(p, GROUP_KV_CACHE, 0) != FORMAT_BF16) {
		err_set(err, -EINVAL, "kv_cache has no weights");
		plan_unref(&p);
	}
	if (p == NULL)
		err_prefix(err, "nested_sites");
	free(rule), free(list);
	return p;
}

static struct kd_model
sizes(const struct model_shape *s, uint32_t max_rows, uint64_t n_pages, const struct device_options *o, const struct plan *residency)
{
	return (struct kd_model){.hidden = s->hidden, .intermediate = s->intermediate, .n_layers = s->n_layers,
	    .n_heads = s->n_heads, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim, .vocab = s->vocab,
	    .max_context = s->max_context, .window = s->window, .rms_eps = s->rms_eps,
	    .residency = residency->format, .fast_accumulation = o->fast_accumulation, .max_rows = max_rows,
	    .n_pages = (uint32_t)(n_pages < UINT32_MAX / 2 ? n_pages : UINT32_MAX / 2), .cache_dir = o->cache_dir,
	    .progress = o->progress, .progress_arg = o->progress_arg};
}

int
device_memory(const struct device *d, const struct model_shape *s, uint64_t kv_bytes, uint32_t max_rows,
    const struct device_options *o, struct kd_memory *out, struct err *err)
{
	struct plan *p = residency(s, o, err);
	struct kd_model km;
	uint16_t untied = 0;

	if (p == NULL)
		return -EINVAL;
	km = sizes(s, max_rows, kv_bytes / kv_page_bytes(s), o, p);
	if (!s->tied)
		km.embed = &untied; /* only whether there is one */
	d->api->plan_memory(d->dev, &km, out);
	plan_unref(&p);
	return 0;
}

static bool
make_buffers(struct device *d)
{
	d->row = calloc(d->max_rows, sizeof(*d->row));
	d->want = calloc(d->max_rows, sizeof(*d->want));
	d->at = calloc(d->m->shape.vocab, sizeof(*d->at));
	for (uint32_t i = 0; i < KD_AHEAD; i++) {
		struct flight *f = &d->flight[i];

		f->result = calloc(d->max_rows, sizeof(*f->result));
		f->site = calloc((size_t)KD_GROUPS * d->m->shape.n_layers, sizeof(*f->site));
		if (f->result == NULL || f->site == NULL)
			return false;
	}
	return d->row != NULL && d->want != NULL && d->at != NULL;
}

int
device_load(struct device *d, const struct model *m, const struct kv_pool *kv, uint32_t max_rows,
    const struct device_options *o, struct err *err)
{
	struct kd_layer *layer = calloc(m->shape.n_layers, sizeof(*layer));
	struct plan *p = residency(&m->shape, o, err);
	struct kd_model km;
	char why[256] = "";
	int rc;

	d->m = m, d->max_rows = max_rows;
	if (p == NULL) {
		free(layer);
		return -EINVAL;
	}
	km = sizes(&m->shape, max_rows, kv->n_pages, o, p);
	if (layer == NULL || !make_buffers(d)) {
		free(layer);
		plan_unref(&p);
		return err_set(err, -ENOMEM, "no memory for a batch of %u rows", max_rows);
	}
	for (uint32_t l = 0; l < m->shape.n_layers; l++) {
		const struct model_layer *from = &m->layer[l];

		layer[l] = (struct kd_layer){from->input_norm, from->post_norm, from->q_norm, from->k_norm, from->linear,
		    (const float *const *)from->bias, m->shape.no_rope[l]};
	}
	km.layer = layer, km.lm_head = &m->lm_head, km.embed = m->embed, km.final_norm = m->final_norm;
	km.rope_cos = m->rope_cos, km.rope_sin = m->rope_sin;
	rc = d->api->load(d->dev, &km, why, sizeof(why));
	free(layer);
	plan_unref(&p);
	return rc == 0 ? 0 : err_set(err, rc, "%s", why);
}

/* ---- a step ---- */

/* Where the edits of a token are; makes room for one. NULL: no memory. */
static struct kd_edit *
edit_of(struct device *d, uint32_t first, uint32_t id)
{
	if (d->at[id] > first)
		return &d->edit[d->at[id] - 1];
	if (d->n_edit == d->cap_edit) {
		uint32_t cap = d->cap_edit == 0 ? 1024 : d->cap_edit * 2;
		struct kd_edit *edit = realloc(d->edit, cap * sizeof(*edit));

		if (edit == NULL)
			return NULL;
		d->edit = edit;
		d->cap_edit = cap;
	}
	d->edit[d->n_edit++] = (struct kd_edit){.id = id};
	d->at[id] = d->n_edit;
	return &d->edit[d->n_edit - 1];
}

/* What sample_token() does to logits one by one, as a list. */
static bool
make_edits(struct device *d, const struct sampling *s, const uint32_t *token, uint32_t n_prompt, uint32_t n_known)
{
	uint32_t first = d->n_edit;
	bool penalties = (s->repetition_penalty != 0 && s->repetition_penalty != 1) || s->presence_penalty != 0 ||
	    s->frequency_penalty != 0, ok = true;
	struct kd_edit *e;

	for (uint32_t i = 0; penalties && ok && i < n_known; i++) {
		if (!(ok = (e = edit_of(d, first, token[i])) != NULL))
			break;
		e->seen = true;
		e->n_output += i >= n_prompt;
	}
	for (uint32_t i = 0; ok && i < s->n_bias; i++) {
		if (!(ok = (e = edit_of(d, first, s->bias[i].id)) != NULL))
			break;
		e->bias += s->bias[i].value;
	}
	for (uint32_t i = first; i < d->n_edit; i++)
		d->at[d->edit[i].id] = 0;
	return ok;
}

void
device_want(struct device *d, const struct sampling *s, const uint32_t *token, uint32_t n_prompt, uint32_t n_known,
    uint32_t position)
{
	uint32_t first = d->n_edit;
	struct kd_want *w = &d->want[d->n_want++];

	*w = (struct kd_want){.kind = KD_DRAW, .position = position, .seed = s->seed, .temperature = s->temperature,
	    .top_p = s->top_p, .min_p = s->min_p, .repetition = s->repetition_penalty == 0 ? 1 : s->repetition_penalty,
	    .presence = s->presence_penalty, .frequency = s->frequency_penalty, .top_k = s->top_k,
	    .n_top = s->top_logprobs, .logprob = s->logprobs || s->top_logprobs > 0};
	if (!make_edits(d, s, token, n_prompt, n_known))
		d->n_edit = first; /* no memory for the penalties of this token: it goes without */
	w->n_edit = d->n_edit - first;
}

void
device_score(struct device *d, uint32_t token, uint32_t n_top)
{
	d->want[d->n_want++] = (struct kd_want){.kind = KD_SCORE, .token = token, .n_top = n_top, .logprob = true};
}

bool
device_result(const struct device *d, uint32_t i, struct sampled *out)
{
	const struct kd_result *r = &d->flight[(d->n_waited - 1) % KD_AHEAD].result[i];

	if (r->bad)
		return false;
	out->token = r->token;
	out->logprob = r->logprob;
	out->n_top = r->n_top;
	for (uint32_t j = 0; j < r->n_top; j++)
		out->top[j] = (struct logit_bias){r->top_id[j], r->top_logprob[j]};
	return true;
}

static struct kd_row
row_of(const struct forward_row *r)
{
	return (struct kd_row){.token = r->token, .pos = r->pos, .table = (const struct kd_block *)(const void *)r->kv->block, .table_id = r->kv->uid,
	    .plan = r->plan->format, .digest = r->plan->digest, .wants = r->wants_logits, .drawn = r->drawn};
}

static void
give_up(struct device *d, const struct flight *f)
{
	d->failed = true;
	for (uint32_t i = 0; i < f->n_wanted; i++)
		f->result[i].bad = true;
	for (size_t i = f->n_want * (size_t)d->m->shape.vocab; i < f->n_wanted * (size_t)d->m->shape.vocab; i++)
		f->logits[i] = NAN;
}

void
device_submit(struct device *d, const struct forward_row *row, uint32_t n, float *logits, struct evidence *evidence,
    uint32_t sample)
{
	struct flight *f = &d->flight[d->n_submitted++ % KD_AHEAD];
	struct kd_sample s = {sample, f->site};
	uint32_t n_wanted = 0, at = 0;
	char why[256];

	for (uint32_t i = 0; i < n; i++) {
		d->row[i] = row_of(&row[i]);
		n_wanted += row[i].wants_logits;
	}
	for (uint32_t i = 0; i < d->n_want; i++) { /* the list does not move any more */
		d->want[i].edit = d->edit + at;
		at += d->want[i].n_edit;
	}
	for (uint32_t i = d->n_want; i < n_wanted; i++)
		d->want[i] = (struct kd_want){.kind = KD_LOGITS};
	f->n_want = d->n_want, f->n_wanted = n_wanted, f->logits = logits, f->evidence = evidence;
	if (!d->failed)
		d->failed = d->api->submit(d->dev, d->row, n, d->want, logits, f->result, evidence != NULL ? &s : NULL,
		    why, sizeof(why)) != 0;
	d->n_want = d->n_edit = 0;
}

static void
note_evidence(const struct device *d, const struct flight *f)
{
	uint32_t layers = d->m->shape.n_layers;

	for (uint32_t i = 0; i < KD_GROUPS * layers; i++)
		evidence_note(f->evidence, (enum plan_group)(i / layers), i % layers, f->site[i].absmax, f->site[i].n, f->site[i].zeros,
		    f->site[i].saturated);
}

void
device_wait(struct device *d)
{
	const struct flight *f = &d->flight[d->n_waited++ % KD_AHEAD];
	char why[256];

	if (d->failed || d->api->wait(d->dev, why, sizeof(why)) != 0)
		give_up(d, f);
	else if (f->evidence != NULL)
		note_evidence(d, f);
}

bool
device_find_nonfinite(struct device *d, const struct forward_row *row, struct forward_site *site)
{
	struct kd_row r = row_of(row);
	uint32_t group = 0, layer = 0;

	if (d->failed || d->api->find_nonfinite(d->dev, &r, &group, &layer) != 1)
		return false;
	*site = (struct forward_site){(enum plan_group)group, layer};
	return true;
}

/* ---- what operators see ---- */

enum plan_format
device_executes(const struct device *d, enum plan_group g, uint32_t layer, enum plan_format f)
{
	return (enum plan_format)d->api->executes(d->dev, g, layer, (enum k_format)f);
}

void
device_kernel(const struct device *d, enum plan_group g, uint32_t layer, enum plan_format f, char *out, size_t len)
{
	d->api->kernel_name(d->dev, g, layer, (enum k_format)f, out, len);
}

void
device_status(struct device *d, struct kd_status *out)
{
	memset(out, 0, sizeof(*out));
	d->api->status(d->dev, out);
}
