/* SPDX-License-Identifier: Apache-2.0 */
/*
 * octet proofread: the example app of liboctet. Cuts a text into sentences,
 * corrects many at once through one connection, and puts the text together
 * again: whatever is no sentence, and every line break, stays as it was.
 */
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utf8proc.h>

#include "client/cmd.h"

#define MAX_TOKENS 160u  /* of a prompt: the model was trained on sentences of up to about 100 */
#define MAX_CHANGE 50u   /* per cent of the words */
#define FEW_WORDS 3u     /* as many may always change: "she dont like it" */

struct word {
	const char *space, *text; /* what stands before it, and it */
	size_t n_space, len;
	bool same;                /* in both texts */
};

enum state { VERBATIM, WAITING, RUNNING, READY };
enum fate { KEPT, UNCHANGED, CORRECTED, DROPPED };

/* A stretch of the text: a sentence, or what stands between sentences. */
struct piece {
	const char *text;
	size_t len;
	enum state state;
	enum fate fate;
	int request;
	uint32_t *ids;      /* of the answer */
	size_t n_ids, cap_ids;
	char *answer;
	bool stopped;       /* the model came to its end by itself */
};

struct job {
	octet *o;
	bool diff, colour, lines, json;
	uint64_t max_change;
	struct piece *piece;
	size_t n, cap;
	size_t next_submit, next_print, running;
	uint64_t sentences, fate[4], words;
	FILE *out;          /* standard output, or memory for --json */
};

/* ---- 1. the text becomes pieces ---- */

static int
add_piece(struct job *j, const char *text, size_t len, bool sentence)
{
	if (len == 0)
		return 0;
	if (j->n == j->cap) {
		size_t cap = j->cap == 0 ? 256 : j->cap * 2;
		struct piece *more = realloc(j->piece, cap * sizeof(*more));

		if (more == NULL)
			return cmd_fail("out of memory");
		j->piece = more;
		j->cap = cap;
	}
	j->piece[j->n++] = (struct piece){.text = text, .len = len, .state = sentence ? WAITING : VERBATIM, .request = -1};
	j->sentences += sentence;
	return 0;
}

/* Words of valid UTF-8 with at least one letter can be a sentence. */
static bool
is_prose(const char *s, size_t len)
{
	bool letter = false;

	for (size_t i = 0; i < len;) {
		utf8proc_int32_t c;
		utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)s + i, (utf8proc_ssize_t)(len - i), &c);

		if (n <= 0)
			return false;
		switch (utf8proc_category(c)) {
		case UTF8PROC_CATEGORY_LU: case UTF8PROC_CATEGORY_LL: case UTF8PROC_CATEGORY_LO: letter = true; break;
		case UTF8PROC_CATEGORY_CC: if (c != '\t' && c != '\n' && c != '\r') return false; break;
		default: break;
		}
		i += (size_t)n;
	}
	return letter;
}

static bool
is_space(char c)
{
	return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

/* A stop that ends no sentence: "e.g.", "Mr.", an initial, a number. */
static bool
is_abbreviation(const char *from, const char *stop)
{
	static const char *const known[] = {"mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "no", "fig", "approx", "dept",
	    "inc", "ltd", "jr", "sr", "jan", "feb", "aug", "sept", "oct", "nov", "dec", "cf", "al", "min", "max", "est"};
	const char *w = stop;
	size_t n;

	while (w > from && !is_space(w[-1]))
		w--;
	while (w < stop && (*w == '(' || *w == '"' || *w == '\''))
		w++;
	n = (size_t)(stop - w);
	if (n == 0 || (n == 1 && isalpha((unsigned char)*w) && *w != 'I') || memchr(w, '.', n) != NULL)
		return n != 0;
	if (strspn(w, "0123456789") >= n && w == from)
		return true; /* "3." of a list */
	for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++)
		if (strlen(known[i]) == n && strncasecmp(known[i], w, n) == 0)
			return true;
	return false;
}

/* The end of the sentence that starts at s: after its stop and what closes it. */
static const char *
sentence_end(const char *s, const char *end)
{
	for (const char *p = s; p < end; p++) {
		const char *stop = p;

		if (*p != '.' && *p != '!' && *p != '?')
			continue;
		while (p + 1 < end && strchr(".!?)]\"'*_", p[1]) != NULL)
			p++;
		while (end - p > 3 && (memcmp(p + 1, "\xe2\x80\x9d", 3) == 0 || memcmp(p + 1, "\xe2\x80\x99", 3) == 0))
			p += 3;
		if (p + 1 == end || (is_space(p[1]) && (*stop != '.' || !is_abbreviation(s, stop))))
			return p + 1;
	}
	return end;
}

/* Prose in [s, end): sentences, and the space between them. */
static int
cut_prose(struct job *j, const char *s, const char *end)
{
	while (s < end) {
		const char *p = s, *stop;
		int rc;

		while (p < end && is_space(*p))
			p++;
		stop = sentence_end(p, end);
		while (stop > p && is_space(stop[-1]))
			stop--;
		if ((rc = add_piece(j, s, (size_t)(p - s), false)) != 0 ||
		    (rc = add_piece(j, p, (size_t)(stop - p), is_prose(p, (size_t)(stop - p)))) != 0)
			return rc;
		s = stop;
		if (p == end)
			break;
	}
	return 0;
}

/* What a line begins with that is no text: "- ", "12. ", spaces. SIZE_MAX: the whole line is none. */
static size_t
line_mark(const char *s, size_t len)
{
	size_t i = 0, digits;

	while (i < len && s[i] == ' ')
		i++;
	if (i >= 4 || i == len || strchr("\t\r>#|<`~{}=", s[i]) != NULL || strncmp(s + i, "---", 3) == 0 ||
	    strncmp(s + i, "***", 3) == 0)
		return SIZE_MAX;
	if (i + 1 < len && strchr("-*+", s[i]) != NULL && s[i + 1] == ' ')
		return i + 2;
	for (digits = i; digits < len && isdigit((unsigned char)s[digits]);)
		digits++;
	if (digits > i && digits + 1 < len && (s[digits] == '.' || s[digits] == ')') && s[digits + 1] == ' ')
		return digits + 2;
	return i;
}

static bool
is_fence(const char *s, size_t len)
{
	size_t i = 0;

	while (i < len && s[i] == ' ')
		i++;
	return len - i >= 3 && (strncmp(s + i, "```", 3) == 0 || strncmp(s + i, "~~~", 3) == 0);
}

/* Paragraphs, list items and all the rest. A paragraph may go over many lines. */
static int
cut_text(struct job *j, const char *s, size_t len)
{
	const char *end = s + len, *prose = NULL;
	bool fenced = false;
	int rc = 0;

	while (s < end && rc == 0) {
		const char *nl = memchr(s, '\n', (size_t)(end - s)), *next = nl == NULL ? end : nl + 1;
		size_t n = (size_t)((nl == NULL ? end : nl) - s), mark = line_mark(s, n);
		bool fence = is_fence(s, n), text = !fenced && !fence && mark != SIZE_MAX, item = text && mark > 0;

		if (j->lines)
			text = item = n > 0;
		if (prose != NULL && (!text || item)) {
			rc = cut_prose(j, prose, s);
			prose = NULL;
		}
		if (rc == 0 && j->lines)
			rc = add_piece(j, s, n, is_prose(s, n)) != 0 || add_piece(j, s + n, (size_t)(next - s) - n, false) != 0;
		else if (rc == 0 && item)
			rc = add_piece(j, s, mark, false), prose = s + mark;
		else if (rc == 0 && text)
			prose = prose != NULL ? prose : s;
		else if (rc == 0)
			rc = add_piece(j, s, (size_t)(next - s), false);
		fenced = fence ? !fenced : fenced;
		s = next;
	}
	return rc == 0 && prose != NULL ? cut_prose(j, prose, end) : rc;
}

/* ---- 2. sentences become requests, events become answers ---- */

static void
set_fate(struct job *j, struct piece *p, enum fate fate)
{
	p->state = READY;
	p->fate = fate;
	j->fate[fate]++;
}

/* 1: no room for another request now. */
static int
submit(struct job *j, struct piece *p)
{
	struct octet_sampling sampling = {0}; /* greedy */
	uint32_t ids[MAX_TOKENS];
	char *line = malloc(p->len); /* with one space where there are more, or a line ends */
	size_t len = 0;
	int64_t n;

	if (line == NULL) {
		cmd_fail("out of memory");
		return -1;
	}
	for (size_t i = 0; i < p->len; i++)
		if (!is_space(p->text[i]))
			line[len++] = p->text[i];
		else if (i > 0 && !is_space(p->text[i - 1]))
			line[len++] = ' ';
	n = octet_template(j->o, line, len, ids, MAX_TOKENS);
	free(line);
	if (n < 0) {
		cmd_fail("%s", octet_error(j->o));
		return -1;
	}
	sampling.max_tokens = (uint32_t)n + (uint32_t)n / 2 + 16;
	if (n > MAX_TOKENS || (uint32_t)n + sampling.max_tokens > octet_info(j->o)->max_context) {
		set_fate(j, p, KEPT);
		return 0;
	}
	p->request = octet_submit(j->o, ids, (size_t)n, &sampling);
	if (p->request == -EBUSY && j->running > 0)
		return 1;
	if (p->request < 0) {
		cmd_fail("%s", octet_error(j->o));
		return -1;
	}
	p->state = RUNNING;
	j->running++;
	return 0;
}

static int
keep_token(struct piece *p, uint32_t id)
{
	if (p->n_ids == p->cap_ids) {
		size_t cap = p->cap_ids == 0 ? 64 : p->cap_ids * 2;
		uint32_t *more = realloc(p->ids, cap * sizeof(*more));

		if (more == NULL)
			return cmd_fail("out of memory");
		p->ids = more;
		p->cap_ids = cap;
	}
	p->ids[p->n_ids++] = id;
	return 0;
}

/* The tokens of an answer as text. */
static int
finish(struct job *j, struct piece *p)
{
	int64_t n = octet_detokenize(j->o, p->ids, p->n_ids, 1, NULL, 0);

	p->answer = n < 0 ? NULL : calloc(1, (size_t)n + 1);
	if (p->answer == NULL)
		return cmd_fail("out of memory");
	octet_detokenize(j->o, p->ids, p->n_ids, 1, p->answer, (size_t)n);
	p->state = READY;
	p->request = -1;
	j->running--;
	return 0;
}

/* Takes the events of a request that are there. */
static int
take(struct job *j, struct piece *p)
{
	struct octet_event ev[32];
	int n;

	while (p->state == RUNNING && (n = octet_read(j->o, p->request, ev, 32, 0)) != 0) {
		if (n < 0)
			return cmd_fail("%s", octet_error(j->o));
		for (int i = 0; i < n; i++) {
			if (ev[i].kind == OCTET_TOKEN && keep_token(p, ev[i].token) != 0)
				return 1;
			if (ev[i].kind != OCTET_DONE)
				continue;
			if (ev[i].finish == OCTET_FAILED)
				return cmd_fail("%s", ev[i].message);
			p->stopped = ev[i].finish == OCTET_STOP;
			if (finish(j, p) != 0)
				return 1;
		}
	}
	return 0;
}

/* ---- 3. an answer is held against its sentence ---- */

static size_t
split_words(const char *s, size_t len, struct word **out)
{
	size_t n = 0, i = 0;

	*out = calloc(len / 2 + 2, sizeof(**out));
	while (*out != NULL && i < len) {
		struct word *w = &(*out)[n];

		for (w->space = s + i; i < len && is_space(s[i]); i++)
			w->n_space++;
		for (w->text = s + i; i < len && !is_space(s[i]); i++)
			w->len++;
		n += w->len > 0;
	}
	return n;
}

/* Marks the longest common subsequence. */
static bool
align(struct word *a, size_t n, struct word *b, size_t m)
{
	uint32_t *t = calloc((n + 1) * (m + 1), sizeof(*t));
	size_t i, k;

#define T(i, k) t[(i) * (m + 1) + (k)]
#define SAME(i, k) (a[i].len == b[k].len && memcmp(a[i].text, b[k].text, a[i].len) == 0)
	if (t == NULL)
		return false;
	for (i = n; i-- > 0;)
		for (k = m; k-- > 0;)
			T(i, k) = SAME(i, k) ? T(i + 1, k + 1) + 1 : T(i + 1, k) > T(i, k + 1) ? T(i + 1, k) : T(i, k + 1);
	for (i = k = 0; i < n && k < m;) {
		if (SAME(i, k) && T(i, k) == T(i + 1, k + 1) + 1)
			a[i++].same = b[k++].same = true;
		else if (T(i + 1, k) >= T(i, k + 1))
			i++;
		else
			k++;
	}
#undef T
#undef SAME
	free(t);
	return true;
}

/* What a proofreader keeps its hands off: code, addresses, paths. */
static bool
is_code(const struct word *w, size_t n)
{
	for (size_t i = 0; i < n; i++)
		for (size_t k = 0; k < w[i].len; k++)
			if (strchr("`@\\{}<>_|#", w[i].text[k]) != NULL || (w[i].text[k] == '/' && k > 0))
				return true;
	return false;
}

static void
put(FILE *out, const char *s, size_t n)
{
	fwrite(s, 1, n, out);
}

/* The space before a word: a line break stays, anything else is one space. */
static void
put_gap(FILE *out, const struct word *w)
{
	if (w->n_space > 0 && (memchr(w->space, '\n', w->n_space) != NULL))
		put(out, w->space, w->n_space);
	else if (w->n_space > 0)
		fputc(' ', out);
}

static void
put_word(FILE *out, const struct word *w)
{
	put_gap(out, w);
	put(out, w->text, w->len);
}

/* Words under a mark; the space before the first one stands before the mark. */
static void
put_marked(struct job *j, const struct word *w, size_t n, const char *plain, const char *close, const char *colour)
{
	if (n == 0)
		return;
	fputs(j->colour ? colour : plain, j->out);
	put(j->out, w->text, w->len);
	for (size_t i = 1; i < n; i++)
		put_word(j->out, &w[i]);
	fputs(j->colour ? "\033[0m" : close, j->out);
}

/* Old words [0, n) became new words [0, m), at the start of the sentence or not. */
static void
put_hunk(struct job *j, const struct word *a, size_t n, const struct word *b, size_t m, bool first)
{
	if (is_code(a, n)) {
		for (size_t i = 0; i < n; i++)
			put_word(j->out, &a[i]);
		return;
	}
	if (n > 0 && (m > 0 || j->diff))
		put_gap(j->out, a);
	else if (!first && m > 0)
		fputc(' ', j->out);
	if (j->diff) {
		put_marked(j, a, n, "[-", "-]", "\033[31;9m");
		put_marked(j, b, m, "{+", "+}", "\033[32m");
	} else if (m > 0) {
		/* The old gaps as far as they go, for their line breaks. */
		put(j->out, b->text, b->len);
		for (size_t i = 1; i < m; i++) {
			put_gap(j->out, i < n ? &a[i] : &b[i]);
			put(j->out, b[i].text, b[i].len);
		}
	}
	if (first && n == 0 && m > 0)
		fputc(' ', j->out); /* the old first word has no gap */
}

/* Walks the hunks; prints them, or counts the words that change. */
static uint64_t
walk(struct job *j, const struct word *a, size_t n, const struct word *b, size_t m, bool print)
{
	uint64_t changed = 0;
	size_t i = 0, k = 0;

	while (i < n || k < m) {
		size_t i0 = i, k0 = k;

		while (i < n && !a[i].same)
			i++;
		while (k < m && !b[k].same)
			k++;
		if ((i > i0 || k > k0) && print)
			put_hunk(j, a + i0, i - i0, b + k0, k - k0, i0 == 0 && k0 == 0);
		if (!is_code(a + i0, i - i0))
			changed += i - i0 > k - k0 ? i - i0 : k - k0;
		if (i < n) {
			if (print)
				put_word(j->out, &a[i]);
			i++, k++;
		}
	}
	return changed;
}

/* More than a space between two words of a line. */
static bool
has_wide_gaps(const struct word *w, size_t n)
{
	for (size_t i = 1; i < n; i++)
		if (w[i].n_space > 1 && memchr(w[i].space, '\n', w[i].n_space) == NULL)
			return true;
	return false;
}

static bool
is_too_much(const struct job *j, uint64_t changed, size_t n)
{
	return changed * 100 > j->max_change * n && (changed > FEW_WORDS || j->max_change == 0);
}

static int
print_sentence(struct job *j, struct piece *p)
{
	struct word *a = NULL, *b = NULL;
	size_t n, m;
	uint64_t changed;
	int rc = 0;

	if (p->answer == NULL) { /* never asked for */
		put(j->out, p->text, p->len);
		return 0;
	}
	n = split_words(p->text, p->len, &a);
	m = split_words(p->answer, strlen(p->answer), &b);
	if (a == NULL || b == NULL || !align(a, n, b, m)) {
		rc = cmd_fail("out of memory");
	} else {
		changed = walk(j, a, n, b, m, false);
		set_fate(j, p, changed == 0 && p->stopped && !has_wide_gaps(a, n) ? UNCHANGED
		        : !p->stopped || m == 0 || is_too_much(j, changed, n) ? DROPPED : CORRECTED);
		if (p->fate == CORRECTED) {
			walk(j, a, n, b, m, true);
			j->words += changed;
		} else {
			put(j->out, p->text, p->len);
		}
	}
	free(a), free(b);
	return rc;
}

/* In order, as far as they are ready. */
static int
print_ready(struct job *j)
{
	int rc = 0;

	for (; rc == 0 && j->next_print < j->n; j->next_print++) {
		struct piece *p = &j->piece[j->next_print];

		if (p->state == VERBATIM)
			put(j->out, p->text, p->len);
		else if (p->state != READY)
			break;
		else
			rc = print_sentence(j, p);
		free(p->answer), free(p->ids);
		p->answer = NULL, p->ids = NULL;
	}
	if (fflush(j->out) != 0)
		return cmd_fail("standard output: %s", strerror(errno));
	return rc;
}

/* Keeps as many requests in flight as the session has room for. */
static int
proofread(struct job *j)
{
	int rc = 0;

	while (j->next_print < j->n) {
		while (j->next_submit < j->n) {
			struct piece *p = &j->piece[j->next_submit];

			if (p->state == WAITING && (rc = submit(j, p)) != 0)
				break;
			j->next_submit++;
		}
		if (rc < 0)
			return 1;
		for (size_t i = j->next_print; i < j->next_submit; i++)
			if (j->piece[i].state == RUNNING && take(j, &j->piece[i]) != 0)
				return 1;
		if (print_ready(j) != 0)
			return 1;
		if (j->running > 0 && octet_wait(j->o, -1) == -EPIPE)
			return cmd_fail("%s", octet_error(j->o));
	}
	return 0;
}

/* ---- the verb ---- */

static void
summary(const struct job *j, const char *text, size_t len, double seconds)
{
	double rate = seconds > 0 ? (double)j->sentences / seconds : 0;
	json_t *o, *whole;

	if (!j->json) {
		fprintf(stderr, "%llu sentences: %llu corrected (%llu words), %llu dropped, %llu too long; %.2f s, %.1f sentences/s\n",
		    (unsigned long long)j->sentences, (unsigned long long)j->fate[CORRECTED], (unsigned long long)j->words,
		    (unsigned long long)j->fate[DROPPED], (unsigned long long)j->fate[KEPT], seconds, rate);
		return;
	}
	whole = json_stringn(text, len); /* NULL: it is no UTF-8 */
	o = json_pack("{s:o,s:I,s:I,s:I,s:I,s:I,s:I,s:f,s:f}", "text", whole != NULL ? whole : json_null(), "sentences",
	    (json_int_t)j->sentences,
	    "corrected", (json_int_t)j->fate[CORRECTED], "unchanged", (json_int_t)j->fate[UNCHANGED], "dropped",
	    (json_int_t)j->fate[DROPPED], "too_long", (json_int_t)j->fate[KEPT], "words", (json_int_t)j->words, "seconds",
	    seconds, "sentences_per_s", rate);
	json_dumpf(o, stdout, JSON_INDENT(1));
	printf("\n");
	json_decref(o);
}

static int
run_job(struct job *j, const char *path, const char *socket)
{
	char *text = NULL, *memory = NULL;
	size_t len, n_memory = 0;
	double start;
	int rc = cmd_read_file(path, &text, &len);

	if (rc == 0)
		rc = cut_text(j, text, len);
	if (rc == 0 && (j->o = cmd_open(socket)) == NULL)
		rc = 1;
	j->out = rc == 0 && j->json ? open_memstream(&memory, &n_memory) : stdout;
	start = cmd_now_ms();
	if (rc == 0 && (rc = proofread(j)) == 0) {
		if (j->json)
			fflush(j->out);
		summary(j, memory, n_memory, (cmd_now_ms() - start) / 1e3);
	}
	if (j->out != stdout && j->out != NULL)
		fclose(j->out);
	for (size_t i = 0; i < j->n; i++)
		free(j->piece[i].answer), free(j->piece[i].ids);
	octet_close(&j->o);
	free(j->piece), free(memory), free(text);
	return rc;
}

static int
run(int argc, char **argv, const char *socket)
{
	static const struct option longs[] = {{"diff", no_argument, NULL, 'd'}, {"color", required_argument, NULL, 'c'},
	    {"max-change", required_argument, NULL, 'm'}, {"lines", no_argument, NULL, 'l'}, {"json", no_argument, NULL, 'j'},
	    {NULL, 0, NULL, 0}};
	struct job j = {.max_change = MAX_CHANGE, .colour = isatty(STDOUT_FILENO) != 0};
	int ch, rc = 0;

	while (rc == 0 && (ch = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		switch (ch) {
		case 'd': j.diff = true; break;
		case 'l': j.lines = true; break;
		case 'j': j.json = true; break;
		case 'm': rc = cmd_u64(&cmd_proofread, "--max-change", optarg, 0, 1000, &j.max_change); break;
		case 'c':
			if (strcmp(optarg, "always") == 0 || strcmp(optarg, "never") == 0)
				j.colour = *optarg == 'a';
			else if (strcmp(optarg, "auto") != 0)
				rc = cmd_usage(&cmd_proofread, "--color is auto, always or never, not '%s'", optarg);
			break;
		default: rc = cmd_usage(&cmd_proofread, "bad option");
		}
	}
	if (rc != 0)
		return rc;
	if (argc - optind > 1)
		return cmd_usage(&cmd_proofread, "one file at a time");
	return run_job(&j, optind < argc ? argv[optind] : "-", socket);
}

const struct cmd cmd_proofread = {"proofread", "[--diff] [--color auto|always|never] [--max-change PERCENT]\n"
    "            [--lines] [--json] [FILE | -]", "correct the sentences of a text, keep the rest as it is", run};
