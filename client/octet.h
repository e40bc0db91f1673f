/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_H
#define OCTET_H
/*
 * liboctet: submit token sequences to the octetd on this host and read the
 * answers, through shared memory. A handle belongs to one thread at a time;
 * handles are independent of each other. Nothing blocks unless a timeout asks
 * for it. Functions return 0 or a count, or -errno; octet_error() has the text
 * of the last failure of a handle.
 */
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct octet octet;

struct octet_info {
	char model[128];
	uint32_t vocab;        /* token ids are below this */
	uint32_t max_context;  /* prompt and output tokens of one request */
	uint32_t max_requests; /* requests in flight on one handle */
	uint64_t client_id;    /* as `octetctl clients` lists it */
};

struct octet_bias {
	uint32_t id;
	float value;        /* -100..100, added to the token's logit */
};

/* A replayed request runs positions from first on under a plan that once ran. */
struct octet_segment {
	uint32_t first;     /* 0 in the first segment, ascending */
	uint64_t plan, epoch; /* as an OCTET_SEGMENT event gave them */
};

/* All zero is greedy with max_tokens 0: set max_tokens. The order of use:
 * repetition, presence and frequency penalty, bias; then greedy, or temperature,
 * min_p, top_k, top_p. What is pointed to is copied. */
struct octet_sampling {
	uint32_t max_tokens; /* 0: score the prompt only (with prompt_logprobs) */
	float temperature;  /* 0: greedy */
	float top_p;        /* 0 or 1: off */
	uint32_t top_k;     /* 0: off */
	uint64_t seed;
	int ignore_eos;
	int logprobs;       /* 1: OCTET_TOKEN carries the log-probability of its token */
	float min_p;        /* 0: off; tokens less likely than min_p times the likeliest are out */
	float repetition_penalty; /* 0 or 1: off; tokens of prompt and output */
	float presence_penalty, frequency_penalty; /* 0: off; tokens of the output */
	int top_logprobs;   /* 1..20: so many OCTET_ALTERNATIVE follow each token; implies logprobs */
	int prompt_logprobs; /* 1: an OCTET_PROMPT for each prompt token but the first */
	const struct octet_bias *bias;
	size_t n_bias;      /* up to 1024 */
	const char *policy; /* run under this policy of octetd's configuration, where that is allowed; NULL: not */
	const struct octet_segment *replay;
	size_t n_replay;    /* up to 4096; 0: no replay */
	uint64_t reserved[4]; /* zero */
};

enum octet_event_kind { OCTET_SEGMENT = 1, OCTET_TOKEN, OCTET_DONE, OCTET_PROMPT, OCTET_ALTERNATIVE };
enum octet_finish { OCTET_STOP = 1, OCTET_LENGTH, OCTET_CANCELLED, OCTET_FAILED };

struct octet_event {
	enum octet_event_kind kind;
	uint32_t token;      /* OCTET_TOKEN, OCTET_PROMPT, OCTET_ALTERNATIVE */
	uint32_t position;   /* of the token; OCTET_SEGMENT: first position of the segment */
	float logprob;       /* of the token, natural log, if asked for */
	uint64_t plan;       /* OCTET_SEGMENT: plan digest */
	uint64_t epoch;      /* OCTET_SEGMENT */
	enum octet_finish finish; /* OCTET_DONE */
	int error;           /* OCTET_DONE with OCTET_FAILED: -errno */
	char message[128];   /* OCTET_DONE with OCTET_FAILED: why */
};

/* Connects to PATH, or to $OCTET_SOCKET, else $XDG_RUNTIME_DIR/octet/octet.sock,
 * else /run/octet/octet.sock. On failure *out is NULL and, where why is not
 * NULL, its why_len bytes say the cause: -EBUSY and -EDQUOT when the daemon or this
 * user has too many clients, -ETIMEDOUT. May block for 5 s. */
int octet_open(octet **out, const char *path, char *why, size_t why_len);

/* Cancels what is in flight and frees the handle; *o is nulled. NULL is fine. */
void octet_close(octet **o);

const char *octet_error(const octet *o);
const struct octet_info *octet_info(const octet *o);

/* Queues ids[n]; the ids are copied before it returns. Returns a request number
 * >= 0 that is valid until its OCTET_DONE was read, or -EBUSY (max_requests in
 * flight or the submission ring is full: read, then try again), -E2BIG, -EINVAL,
 * -EPIPE (the daemon is gone). */
int octet_submit(octet *o, const uint32_t *ids, size_t n, const struct octet_sampling *s);

/* Reads up to n events of one request. Waits up to timeout_ms (0: not at all,
 * -1: without end) for the first. Returns their number, 0 on timeout, -EPIPE
 * when the daemon is gone, -ENOENT for an unknown request, -EINTR for a signal. */
int octet_read(octet *o, int request, struct octet_event *ev, size_t n, int timeout_ms);

/* Asks for an early end; its OCTET_DONE still comes. */
int octet_cancel(octet *o, int request);

/* For poll loops: readable when events may have come. Before poll() call
 * octet_arm(): 1 means events are there already (do not sleep), 0 that a bell
 * will ring the descriptor; octet_read() ends that. The descriptor stays the
 * handle's. */
int octet_fd(const octet *o);
int octet_arm(octet *o);
/* Waits until any request has events: 1, 0 on timeout, -EPIPE. */
int octet_wait(octet *o, int timeout_ms);

/* Text to token ids and back, in this process. flags: OCTET_SPECIAL recognises
 * special tokens written in the text, OCTET_BOS adds what the model expects
 * before a plain text. Returns the number of ids needed, which may exceed cap
 * (then nothing past cap is written), or -errno. */
enum { OCTET_SPECIAL = 1, OCTET_BOS = 2 };
int64_t octet_tokenize(octet *o, const char *text, size_t len, unsigned flags, uint32_t *ids, size_t cap);
/* One user message through the model's chat template. -ENOTSUP: unknown template. */
int64_t octet_template(octet *o, const char *text, size_t len, uint32_t *ids, size_t cap);

/* A conversation through the model's chat template. The template's special
 * tokens are ids; a message is text, whatever special tokens it spells. With
 * add_generation_prompt it ends with what comes before an answer. Counts as
 * octet_tokenize does; -ENOTSUP: no template or an unknown one; -EINVAL: the
 * template does not take such messages, octet_error() says why. */
enum octet_role { OCTET_SYSTEM, OCTET_USER, OCTET_ASSISTANT };
struct octet_message {
	enum octet_role role;
	const char *text;
	size_t len;
};
int64_t octet_chat_tokens(octet *o, const struct octet_message *msgs, size_t n, int add_generation_prompt,
    uint32_t *ids, size_t cap);
/* What the model's template takes: OCTET_CHAT_SINGLE is one user message alone. */
enum octet_chat { OCTET_CHAT_NONE, OCTET_CHAT_UNKNOWN, OCTET_CHAT_SINGLE, OCTET_CHAT_TURNS };
enum octet_chat octet_chat_kind(const octet *o);

int64_t octet_detokenize(octet *o, const uint32_t *ids, size_t n, int skip_special, char *out, size_t cap);
const char *octet_piece(octet *o, uint32_t id, size_t *len);

/* A running text of one request: turns ids into whole UTF-8 characters and
 * watches for stop strings, holding back what may be the start of one. */
typedef struct octet_text octet_text;
/* is_continuation: the ids go on from a prompt, so a leading space is text. The
 * stop strings are copied. 0, -EINVAL for an empty stop string, -ENOMEM. */
int octet_text_new(octet_text **t, octet *o, int is_continuation, const char *const *stops, size_t n_stops);
void octet_text_free(octet_text **t);
/* Gives the text that is now certain: *out is valid until the next call, *len
 * its bytes. Returns 1 when a stop string was met (the text ends before it; the
 * caller cancels the request), 0 otherwise, -errno. id may be a special token:
 * it adds no text. */
int octet_text_push(octet_text *t, uint32_t id, const char **out, size_t *len);
/* What is still held back, at the end of a request. */
int octet_text_flush(octet_text *t, const char **out, size_t *len);

#ifdef __cplusplus
}
#endif
#endif
