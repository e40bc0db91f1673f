/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_ENGINE_DEVICE_H
#define OCTET_ENGINE_DEVICE_H
/*
 * A device that runs the forward pass instead of the CPU: finds the plugin,
 * hands it the model, turns the engine's rows and requests into the plugin's
 * plain structs. main() opens it; after device_load() it belongs to the thread
 * that runs forward passes, but for device_status() and what is said to be const.
 */
#include "daemon/engine/forward.h"
#include "daemon/engine/sample.h"
#include "kernels/device.h"

struct device;

/* The plugin "octet-NAME.so": $OCTET_PLUGIN (a file), else the library directory's.
 * -ENOENT: no plugin; -ENODEV: no driver, no card. */
int device_open(struct device **, const char *name, uint32_t index, struct err *);
void device_close(struct device **);
const char *device_name(const struct device *);    /* "cuda" */

struct device_options {
	bool nested;              /* residency */
	const char *nested_sites; /* selectors, spaces between: nested in any case; NULL: none */
	bool fast_accumulation;
	const char *cache_dir;    /* NULL: none */
	void (*progress)(void *, int percent);
	void *progress_arg;
};

/* What the model and a KV cache of so many bytes will take there, and what is free. -EINVAL: a selector that matches nothing. */
int device_memory(const struct device *, const struct model_shape *, uint64_t kv_bytes, uint32_t max_rows,
    const struct device_options *, struct kd_memory *, struct err *);
/* Copies the model. The pool's pages get their twins on the device; once. */
int device_load(struct device *, const struct model *, const struct kv_pool *, uint32_t max_rows,
    const struct device_options *, struct err *);

/* ---- a step: device_want() or device_score() for each row that wants logits and
 * is no probe's, in row order; forward_start(), forward_wait(); then device_result() of each. KD_AHEAD steps may be
 * started; what is waited for is the oldest ---- */

/* The token at `position` is to be drawn. It is n_known, or n_known + 1 where the row's own token is a drawn one. */
void device_want(struct device *, const struct sampling *, const uint32_t *token, uint32_t n_prompt, uint32_t n_known,
    uint32_t position);
void device_score(struct device *, uint32_t token, uint32_t n_top);
/* Of the step that was waited for. False: a logit was not finite. */
bool device_result(const struct device *, uint32_t i, struct sampled *);
/* Of forward.c. Rows without a device_want() have their logits written, in row order among all that want them. evidence
 * (NULL: none) is of row `sample`, and added when the step was waited for. After a device failed, every result is "not
 * finite" and every logit NaN: requests end with an error, and device_status() says why. */
void device_submit(struct device *, const struct forward_row *, uint32_t n, float *logits,
    struct evidence *evidence, uint32_t sample);
void device_wait(struct device *);
bool device_find_nonfinite(struct device *, const struct forward_row *, struct forward_site *);

/* Any thread. */
enum plan_format device_executes(const struct device *, enum plan_group, uint32_t layer, enum plan_format);
void device_kernel(const struct device *, enum plan_group, uint32_t layer, enum plan_format, char *, size_t);
void device_status(struct device *, struct kd_status *);
#endif
