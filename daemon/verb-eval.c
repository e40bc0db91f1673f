/* SPDX-License-Identifier: Apache-2.0 */
/* The verbs that measure: eval, evals. */
#include <errno.h>
#include <string.h>

#include "daemon/control.h"
#include "daemon/eval.h"
#include "daemon/evals.h"
#include "daemon/octetd.h"

static int
exec_eval(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	const char *op = json_string_value(json_object_get(request, "op"));
	const json_t *file = json_object_get(request, "file"), *data = json_object_get(request, "data");
	const json_t *items = json_object_get(request, "items");
	struct eval **e = call_eval(call);
	int rc = 0;

	if (*e == NULL && strcmp(op, "cancel") != 0 && (rc = eval_new(e, d, err)) != 0)
		return rc;
	if (strcmp(op, "poll") == 0) {
		rc = eval_poll(*e, reply, err);
		if (rc == 0 && json_object_get(*reply, "result") != NULL && eval_dump_fd(*e) >= 0)
			call_attach(call, eval_dump_fd(*e));
		return rc;
	}
	if (strcmp(op, "cancel") == 0)
		eval_drop(e);
	else if (strcmp(op, "start") == 0)
		rc = eval_start(*e, request, err);
	else if (strcmp(op, "text") == 0 && file != NULL && data != NULL)
		rc = eval_add_text(*e, json_string_value(file), json_string_value(data), json_string_length(data), err);
	else if (strcmp(op, "task") == 0 && file != NULL && items != NULL)
		rc = eval_add_task(*e, json_string_value(file), items, err);
	else
		rc = err_set(err, -EINVAL, "eval: 'op' is text (file, data), task (file, items), start, poll or cancel");
	if (rc != 0) {
		eval_drop(e);
		return rc;
	}
	*reply = json_object();
	return *reply != NULL ? 0 : err_set(err, -ENOMEM, "out of memory");
}

/* What a list needs of a result. */
static json_t *
summary(const json_t *r)
{
	const json_t *text = json_object_get(r, "text"), *task = json_object_get(r, "task");
	json_t *s = json_pack("{s:O,s:O,s:O,s:O,s:O,s:O,s:O}", "id", json_object_get(r, "id"), "time", json_object_get(r, "time"),
	    "name", json_object_get(r, "name"), "baseline", json_object_get(r, "baseline"), "candidate",
	    json_object_get(r, "candidate"), "sites", json_object_get(r, "sites"), "corpora", json_object_get(r, "corpora"));

	if (s == NULL)
		return NULL;
	if (text != NULL) {
		json_object_set(s, "kl_mean", json_object_get(json_object_get(text, "kl"), "mean"));
		json_object_set(s, "change_percent", json_object_get(json_object_get(text, "perplexity"), "change_percent"));
		json_object_set(s, "top1", json_object_get(text, "top1"));
	}
	if (task != NULL)
		json_object_set(s, "exact", json_object_get(json_object_get(task, "candidate"), "exact"));
	if (json_object_get(r, "step_us") != NULL)
		json_object_set(s, "saved_us", json_object_get(json_object_get(r, "step_us"), "saved"));
	return s;
}

static int
find(struct octetd *d, const json_t *request, const char *key, json_t **out, struct err *err)
{
	const json_t *id = json_object_get(request, key);

	*out = id != NULL ? evals_get(d->evals, (uint64_t)json_integer_value(id)) : NULL;
	if (id == NULL)
		return err_set(err, -EINVAL, "evals: '%s' is missing", key);
	return *out != NULL ? 0 : err_set(err, -ENOENT, "there is no eval %lld", (long long)json_integer_value(id));
}

/* Two results compare only if they measured the same model on the same text. */
static int
check_alike(const json_t *a, const json_t *b, struct err *err)
{
	static const char *const same[][2] = {{"model_digest", "models"}, {"text", "texts"}, {"task", "tasks"},
	    {"context", "context lengths"}};

	for (size_t i = 0; i < sizeof(same) / sizeof(*same); i++)
		if (!json_equal(json_object_get(json_object_get(a, "key"), same[i][0]),
		    json_object_get(json_object_get(b, "key"), same[i][0])))
			return err_set(err, -EINVAL, "evals %lld and %lld cannot be compared: they are of different %s",
			    (long long)json_integer_value(json_object_get(a, "id")),
			    (long long)json_integer_value(json_object_get(b, "id")), same[i][1]);
	return 0;
}

static int
exec_evals(struct octetd *d, struct call *call, const json_t *request, json_t **reply, struct err *err)
{
	const char *op = json_string_value(json_object_get(request, "op"));
	json_t *a = NULL, *b = NULL, *r, *list;
	size_t i;
	int rc;

	if (strcmp(op, "list") == 0) {
		list = json_array();
		json_array_foreach((json_t *)(uintptr_t)evals_all(d->evals), i, r)
			if (!json_is_true(json_object_get(r, "sweep")) || json_is_true(json_object_get(request, "all")))
				json_array_append_new(list, summary(r));
		*reply = json_pack("{s:o}", "evals", list);
		return *reply != NULL ? 0 : err_set(err, -ENOMEM, "out of memory");
	}
	if ((rc = find(d, request, "id", &a, err)) != 0)
		return rc;
	if (strcmp(op, "show") == 0)
		*reply = json_copy(a);
	else if (strcmp(op, "delete") == 0) {
		if (!call_is_operator(call))
			return err_set(err, -EACCES, "evals: to delete needs an operator");
		rc = evals_delete(d->evals, (uint64_t)json_integer_value(json_object_get(request, "id")), err);
		*reply = json_object();
	} else if (strcmp(op, "compare") == 0) {
		if ((rc = find(d, request, "with", &b, err)) == 0 && (rc = check_alike(a, b, err)) == 0)
			*reply = json_pack("{s:O,s:O}", "a", a, "b", b);
	} else
		rc = err_set(err, -EINVAL, "evals: 'op' is list, show, compare or delete");
	return rc;
}

const struct verb verb_eval = {"eval", true, {{"op", FIELD_STRING, true}, {"file", FIELD_STRING, false},
    {"data", FIELD_STRING, false}, {"items", FIELD_ARRAY, false}, {"candidate", FIELD_STRING, false},
    {"baseline", FIELD_STRING, false}, {"context", FIELD_NUMBER, false}, {"exclusive", FIELD_BOOL, false},
    {"dump_logits", FIELD_BOOL, false}, {"reuse", FIELD_BOOL, false}, {"sweep", FIELD_BOOL, false},
    {"name", FIELD_STRING, false}, {"stop", FIELD_STRING, false}}, exec_eval};
const struct verb verb_evals = {"evals", false, {{"op", FIELD_STRING, true}, {"id", FIELD_NUMBER, false},
    {"with", FIELD_NUMBER, false}, {"all", FIELD_BOOL, false}}, exec_evals};
