/* SPDX-License-Identifier: Apache-2.0 */
#ifndef OCTET_WIRE_H
#define OCTET_WIRE_H
/*
 * What crosses between an app and octetd: the handshake frames on the
 * SOCK_SEQPACKET socket and the layout of a session's shared memory.
 * Plain visible data, little-endian host layout, frozen by tests/test_wire.c.
 * Neither side trusts the other's words: each shared word is read once,
 * atomically, into a local and checked there.
 *
 *   app  -> WIRE_HELLO          daemon -> WIRE_WELCOME + fds {session, tokenizer}
 *                                       | WIRE_REFUSED
 *   then one-byte messages only: bells, both ways.
 */
#include <stdint.h>

#define WIRE_MAGIC 0x3154434fu /* "OCT1" */
#define WIRE_VERSION 2u
#define WIRE_SQ 256u    /* submission descriptors, power of two */
#define WIRE_SLOTS 64u  /* requests a session may have in flight */
#define WIRE_EVENTS 256u /* events in a slot's ring, power of two */
#define WIRE_BELL '!'
#define WIRE_MAX_TOP 20u       /* alternatives with their log-probabilities per token */
#define WIRE_MAX_BIAS 1024u
#define WIRE_MAX_SEGMENTS 4096u
#define WIRE_MAX_POLICY 63u    /* bytes of a policy's name */

enum wire_type { WIRE_HELLO = 1, WIRE_WELCOME, WIRE_REFUSED };

struct wire_hello {
	uint32_t magic, version, type;
	uint32_t pid;      /* a claim, for display only */
	char program[64];  /* a claim, for display only */
};

struct wire_welcome {
	uint32_t magic, version, type;
	uint32_t vocab, max_context, max_requests;
	uint64_t session_bytes, tokenizer_bytes;
	uint64_t client_id;
	char model[128];
};

struct wire_refused {
	uint32_t magic, version, type;
	int32_t code; /* -errno */
	char text[256];
};

/* Operations of a submission descriptor. */
enum wire_op { WIRE_SUBMIT = 1, WIRE_CANCEL };

enum wire_flag {
	WIRE_IGNORE_EOS = 1,
	WIRE_LOGPROBS = 2,
	WIRE_PROMPT_LOGPROBS = 4, /* max_tokens may then be 0: score only */
	WIRE_FLAGS = 7,
};

/*
 * 128 bytes. Floats are copied, then range-checked. The words of the prompt
 * ring from prompt_at on: prompt_tokens ids; n_bias x {id, bits of a float};
 * n_segments x struct wire_segment; policy_bytes bytes, up to a whole word.
 */
struct wire_desc {
	uint32_t op, slot;
	uint32_t serial;        /* chosen by the app, echoed in its events */
	uint32_t flags;
	uint32_t prompt_at;     /* free-running index into the prompt ring */
	uint32_t prompt_tokens;
	uint32_t max_tokens, top_k; /* top_k 0: off */
	uint64_t seed;
	float temperature;      /* 0: greedy */
	float top_p;            /* 1: off */
	float min_p;            /* 0: off */
	float repetition_penalty; /* 1: off */
	float presence_penalty, frequency_penalty; /* 0: off */
	uint32_t top_logprobs;  /* alternatives per token, up to WIRE_MAX_TOP */
	uint32_t n_bias, n_segments, policy_bytes;
	uint32_t reserved[12];  /* zero */
};

/* Replay: positions from first on run under the plan of this digest. */
struct wire_segment {
	uint32_t first;
	uint32_t plan[2], epoch[2]; /* low word, high word */
};

enum wire_event_kind {
	WIRE_EV_SEGMENT = 1, /* plan digest, epoch, first position */
	WIRE_EV_TOKEN,
	WIRE_EV_DONE,
	WIRE_EV_PROMPT,      /* a prompt token and its log-probability, from position 1 on */
	WIRE_EV_TOP,         /* an alternative to the TOKEN or PROMPT event before it */
};

enum wire_finish {
	WIRE_FINISH_STOP = 1,  /* an end token of the model */
	WIRE_FINISH_LENGTH,    /* max_tokens or the context is full */
	WIRE_FINISH_CANCELLED,
	WIRE_FINISH_ERROR,     /* code says which */
};

/* 32 bytes. */
struct wire_event {
	uint32_t kind, serial;
	uint32_t token;     /* TOKEN, PROMPT, TOP: id; DONE: enum wire_finish */
	uint32_t position;  /* TOKEN, PROMPT, TOP: of the token; SEGMENT: first position */
	uint64_t a;         /* SEGMENT: plan digest; DONE: site << 32 | -errno */
	union {
		float logprob;  /* natural log of the model's own probability, where asked for */
		uint64_t epoch; /* SEGMENT */
	};
};

/* A slot's ring of events. The daemon publishes tail (release) and keeps its
 * own copy; the app publishes head. Indices run free over 32 bits. */
struct wire_slot {
	_Alignas(64) uint32_t tail; /* daemon writes */
	uint32_t parked;            /* daemon: out of room, ring a bell after reading */
	_Alignas(64) uint32_t head; /* app writes */
	_Alignas(64) struct wire_event event[WIRE_EVENTS];
};

/* The head of a session's memory; slots follow, then the prompt ring. */
struct wire_session {
	uint32_t magic, version;
	uint32_t prompt_ring;  /* tokens in the prompt ring, power of two */
	uint32_t slots_at, prompt_at; /* byte offsets */
	uint32_t pad0[11];
	_Alignas(64) uint32_t sq_tail; /* app writes, release */
	uint32_t app_sleeps;           /* app: ring me when an event is published */
	_Alignas(64) uint32_t sq_head; /* daemon writes: consumed; their prompt space is free again */
	uint32_t daemon_sleeps;        /* daemon: ring me after publishing */
	_Alignas(64) struct wire_desc sq[WIRE_SQ];
};
#endif
