/* SPDX-License-Identifier: Apache-2.0 */
/* A line to type in: a command, a search, a selector. */
#include <glob.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "client/ctl-cmd.h"
#include "tui/ui.h"

unsigned
act_prompt(struct ui *ui, int kind)
{
	struct prompt *p = &ui->prompt;

	p->kind = (char)kind;
	p->len = p->at = 0;
	p->back = 0;
	p->text[0] = p->hint[0] = '\0';
	ui->mode = MODE_PROMPT;
	return REACT_DRAW;
}

/* ---- words ---- */

int
command_words(char *text, char *word[MAX_WORDS])
{
	char *to = text;
	int n = 0;

	for (char *s = text; *s != '\0';) {
		char quote = 0;

		while (*s == ' ' || *s == '\t')
			s++;
		if (*s == '\0')
			break;
		if (n == MAX_WORDS - 1)
			return -1;
		word[n++] = to;
		for (; *s != '\0' && (quote != 0 || (*s != ' ' && *s != '\t')); s++) {
			if (quote == 0 && (*s == '\'' || *s == '"'))
				quote = *s;
			else if (quote != 0 && *s == quote)
				quote = 0;
			else
				*to++ = *s;
		}
		if (quote != 0)
			return -1;
		s += *s != '\0';
		*to++ = '\0';
	}
	word[n] = NULL;
	return n;
}

/* ---- commands of the console itself ---- */

static unsigned
own_quit(struct ui *ui, const char *arg)
{
	(void)ui, (void)arg;
	return REACT_QUIT;
}

static unsigned
own_view(struct ui *ui, const char *arg)
{
	int view = ui_find_view(arg);

	if (view < 0)
		ui_say(ui, true, "there is no view '%.40s'", arg);
	return view < 0 ? REACT_DRAW : ui_open_view(ui, view);
}

static unsigned
own_theme(struct ui *ui, const char *arg)
{
	if (theme_find(arg) == N_THEMES) {
		ui_say(ui, true, "themes are auto, dark, light, 16, mono");
		return REACT_DRAW;
	}
	ui->theme = theme_find(arg);
	ui_say(ui, false, "theme %s", arg);
	return REACT_THEME | REACT_REPAINT;
}

static unsigned
own_rate(struct ui *ui, const char *arg)
{
	char *end;
	long ms = strtol(arg, &end, 10);

	if (end == arg || *end != '\0' || ms < 50 || ms > 60000)
		ui_say(ui, true, "rate: milliseconds between two refreshes, 50 to 60000");
	else
		ui->refresh_ms = (int)ms;
	return REACT_DRAW;
}

static unsigned
own_select(struct ui *ui, const char *arg)
{
	if (grid_select_glob(ui, arg))
		ui_open_view(ui, ui_find_view("precision"));
	return REACT_DRAW;
}

static const struct own {
	const char *name;
	unsigned (*act)(struct ui *, const char *arg);
} own[] = {
	{"quit", own_quit}, {"q", own_quit}, {"view", own_view}, {"theme", own_theme}, {"rate", own_rate}, {"select", own_select},
};
#define N_OWN (sizeof(own) / sizeof(*own))

bool
command_own(struct ui *ui, char **word, int n, unsigned *reaction)
{
	for (size_t i = 0; i < N_OWN; i++) {
		if (strcmp(word[0], own[i].name) != 0)
			continue;
		*reaction = own[i].act(ui, n > 1 ? word[1] : "");
		return true;
	}
	return false;
}

/* ---- completion ---- */

struct choices {
	const char *begin; /* what is there of the word */
	size_t len;
	char common[256];  /* all that fit begin with it */
	int n;
	char *list;        /* of those, in the hint */
	size_t room;
};

__attribute__((format(printf, 2, 3))) static void
offer(struct choices *c, const char *fmt, ...)
{
	char word[256];
	size_t n = strlen(c->list);
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(word, sizeof(word), fmt, ap);
	va_end(ap);
	if (strncmp(word, c->begin, c->len) != 0)
		return;
	if (c->n++ == 0)
		snprintf(c->common, sizeof(c->common), "%s", word);
	else
		for (size_t i = 0; c->common[i] != '\0'; i++)
			if (c->common[i] != word[i])
				c->common[i] = '\0';
	if (n + strlen(word) + 2 < c->room)
		snprintf(c->list + n, c->room - n, "%s%s", n > 0 ? " " : "", word);
}

/* Words of a usage that are typed as they stand: options, and names in small letters. */
static void
offer_usage(struct choices *c, const char *args)
{
	while (*args != '\0') {
		size_t n = strcspn(args, " []|().");

		if (n > 1 && strchr(args, '=') != args + 1 && (args[0] == '-' || (args[0] >= 'a' && args[0] <= 'z')) &&
		    memchr(args, '=', n) == NULL)
			offer(c, "%.*s", (int)n, args);
		args += n + (args[n] != '\0');
	}
}

static void
offer_rules(const struct octet_page *p, struct choices *c, bool with_format)
{
	const char *equals = memchr(c->begin, '=', c->len);

	if (equals != NULL) {
		for (uint8_t f = 0; f < p->n_formats; f++)
			offer(c, "%.*s=%s", (int)(equals - c->begin), c->begin, format_name(p, f));
		return;
	}
	offer(c, "*%s", with_format ? "=" : "");
	offer(c, "attention.*%s", with_format ? "=" : "");
	offer(c, "mlp.*%s", with_format ? "=" : "");
	for (uint32_t g = 0; g < p->n_groups; g++)
		offer(c, "%s%s", p->group[g], with_format ? "=" : "");
}

/* Policies by name, as far as the page knows any. */
static void
offer_policies(const struct ui *ui, struct choices *c)
{
	offer(c, "bf16");
	offer(c, "fp8");
	for (uint32_t i = 0; i < ui->n_history; i++) {
		const char *name = ui->history[i].policy;
		bool seen = strchr(name, ' ') != NULL || strcmp(name, "bf16") == 0 || strcmp(name, "fp8") == 0;

		for (uint32_t k = 0; k < i && !seen; k++)
			seen = strcmp(name, ui->history[k].policy) == 0;
		if (!seen && *name != '\0')
			offer(c, "%s", name);
	}
}

static void
offer_files(struct choices *c)
{
	char pattern[260];
	glob_t found;

	snprintf(pattern, sizeof(pattern), "%.*s*", (int)(c->len < 255 ? c->len : 255), c->begin);
	if (glob(pattern, GLOB_MARK, NULL, &found) != 0)
		return;
	for (size_t i = 0; i < found.gl_pathc && i < 500; i++)
		offer(c, "%s", found.gl_pathv[i]);
	globfree(&found);
}

static bool
is_one_of(const char *word, const char *list)
{
	size_t n = strlen(word);

	for (const char *s = strstr(list, word); n > 0 && s != NULL; s = strstr(s + 1, word))
		if ((s == list || s[-1] == ' ') && (s[n] == ' ' || s[n] == '\0'))
			return true;
	return false;
}

static void
offer_argument(const struct ui *ui, struct choices *c, const char *verb, const char *before)
{
	struct verb_words w;
	char names[200];

	if (strcmp(verb, "view") == 0)
		offer_usage(c, ui_view_names(names, sizeof(names)));
	for (int i = 0; i < N_THEMES && strcmp(verb, "theme") == 0; i++)
		offer(c, "%s", theme_names[i]);
	if (strcmp(verb, "select") == 0)
		offer_rules(&ui->data.page, c, false);
	if (is_one_of(before, "--text --task --svg --dump-logits")) {
		offer_files(c);
		return;
	}
	if (is_one_of(before, "use start --candidate --baseline")) {
		offer_policies(ui, c);
		return;
	}
	if (strcmp(before, "--to") == 0) {
		for (uint32_t i = 0; i < ui->n_history; i++)
			offer(c, "%llu", (unsigned long long)ui->history[i].epoch);
		return;
	}
	if (strcmp(verb, "set") == 0 && (c->len == 0 || *c->begin != '-'))
		offer_rules(&ui->data.page, c, true);
	for (size_t i = 0; octetctl_verb(i, &w); i++)
		if (strcmp(verb, w.name) == 0)
			offer_usage(c, w.args);
	if (strcmp(verb, "use") == 0)
		offer_policies(ui, c);
}

static void
offer_verbs(struct choices *c)
{
	struct verb_words w;

	for (size_t i = 0; octetctl_verb(i, &w); i++)
		offer(c, "%s", w.name);
	for (size_t i = 0; i < N_OWN; i++)
		offer(c, "%s", own[i].name);
}

static void
insert(struct prompt *p, const char *text, size_t n)
{
	if (p->len + n + 1 > sizeof(p->text))
		return;
	memmove(p->text + p->at + n, p->text + p->at, p->len - p->at + 1);
	memcpy(p->text + p->at, text, n);
	p->at += n, p->len += n;
}

static unsigned
act_complete(struct ui *ui, int arg)
{
	struct prompt *p = &ui->prompt;
	struct choices c = {.list = p->hint, .room = sizeof(p->hint)};
	char left[PROMPT_TEXT], *word[MAX_WORDS];
	size_t from = p->at;
	int n;

	(void)arg;
	p->hint[0] = '\0';
	while (from > 0 && p->text[from - 1] != ' ')
		from--;
	c.begin = p->text + from, c.len = p->at - from;
	snprintf(left, sizeof(left), "%.*s", (int)from, p->text);
	n = command_words(left, word);
	if (p->kind == 's')
		offer_rules(&ui->data.page, &c, false);
	else if (p->kind == ':' && n == 0)
		offer_verbs(&c);
	else if (p->kind == ':' && n > 0)
		offer_argument(ui, &c, word[0], word[n - 1]);
	if (c.n > 0 && strlen(c.common) > c.len) {
		char rest[256];

		snprintf(rest, sizeof(rest), "%s", c.common + c.len);
		insert(p, rest, strlen(rest));
	}
	if (c.n == 1) {
		p->hint[0] = '\0';
		if (p->kind == ':' && p->at > 0 && strchr("=/ ", p->text[p->at - 1]) == NULL)
			insert(p, " ", 1);
	} else if (c.n == 0)
		snprintf(p->hint, sizeof(p->hint), "nothing fits");
	return REACT_DRAW;
}

/* ---- running it ---- */

/* Some verbs look or change by their second word; the daemon has the last say in any case. */
static bool
only_looks(const struct verb_words *w, const char *second)
{
	if (strcmp(w->name, "evals") == 0)
		return strcmp(second, "delete") != 0;
	if (strcmp(w->name, "rollout") == 0)
		return *second == '\0' || strcmp(second, "status") == 0;
	return w->looks;
}

static bool
may_run(struct ui *ui, const char *verb, const char *second)
{
	struct verb_words w;

	for (size_t i = 0; octetctl_verb(i, &w); i++)
		if (strcmp(w.name, verb) == 0)
			return only_looks(&w, second) || ui_may_change(ui);
	ui_say(ui, true, "there is no command '%.60s': tab shows them", verb);
	return false;
}

unsigned
command_run(struct ui *ui, const char *text)
{
	char copy[PROMPT_TEXT], *word[MAX_WORDS], title[PROMPT_TEXT + 2];
	unsigned reaction = REACT_DRAW;
	int n;

	snprintf(copy, sizeof(copy), "%s", text);
	n = command_words(copy, word);
	if (n < 0)
		ui_say(ui, true, "a quote is not closed, or there are too many words");
	if (n <= 0 || command_own(ui, word, n, &reaction) || !may_run(ui, word[0], n > 1 ? word[1] : ""))
		return reaction;
	if (!ui->live) {
		ui_say(ui, true, "a replay has no daemon");
		return reaction;
	}
	if (ui->pager.running) {
		ui_say(ui, true, "another command runs: %.100s", ui->pager.title);
		return reaction;
	}
	snprintf(ui->command, sizeof(ui->command), "%s", text);
	snprintf(title, sizeof(title), ":%s", text);
	pager_open(ui, title);
	return REACT_COMMAND | REACT_DRAW;
}

static unsigned
act_enter(struct ui *ui, int arg)
{
	struct prompt *p = &ui->prompt;

	(void)arg;
	ui->mode = MODE_VIEW;
	if (p->len == 0)
		return REACT_DRAW;
	if (p->kind == 's') {
		grid_select_glob(ui, p->text);
		return REACT_DRAW;
	}
	if (p->kind == '/') {
		snprintf(ui->search, sizeof(ui->search), "%.63s", p->text);
		list_search(ui, 1);
		return REACT_DRAW;
	}
	snprintf(p->kept[p->n_kept++ % PROMPT_KEPT], PROMPT_TEXT, "%s", p->text);
	return command_run(ui, p->text);
}

/* ---- keys ---- */

static unsigned
act_cancel(struct ui *ui, int arg)
{
	(void)arg;
	ui->mode = MODE_VIEW;
	return REACT_DRAW;
}

enum { EDIT_LEFT, EDIT_RIGHT, EDIT_HOME, EDIT_END, EDIT_BACKSPACE, EDIT_DELETE, EDIT_WORD, EDIT_ALL };

static size_t
char_before(const struct prompt *p, size_t at)
{
	if (at > 0)
		at--;
	while (at > 0 && ((unsigned char)p->text[at] & 0xc0) == 0x80)
		at--;
	return at;
}

static size_t
char_after(const struct prompt *p, size_t at)
{
	if (at < p->len)
		at++;
	while (at < p->len && ((unsigned char)p->text[at] & 0xc0) == 0x80)
		at++;
	return at;
}

static void
cut(struct prompt *p, size_t from, size_t to)
{
	memmove(p->text + from, p->text + to, p->len - to + 1);
	p->len -= to - from;
	p->at = from;
}

static unsigned
act_edit(struct ui *ui, int arg)
{
	struct prompt *p = &ui->prompt;
	size_t at = p->at;

	switch (arg) {
	case EDIT_LEFT: p->at = char_before(p, p->at); break;
	case EDIT_RIGHT: p->at = char_after(p, p->at); break;
	case EDIT_HOME: p->at = 0; break;
	case EDIT_END: p->at = p->len; break;
	case EDIT_BACKSPACE:
		if (p->len == 0)
			return act_cancel(ui, 0);
		cut(p, char_before(p, at), at);
		break;
	case EDIT_DELETE: cut(p, at, char_after(p, at)); break;
	case EDIT_WORD:
		while (at > 0 && p->text[at - 1] == ' ')
			at--;
		while (at > 0 && p->text[at - 1] != ' ')
			at--;
		cut(p, at, p->at);
		break;
	case EDIT_ALL: cut(p, 0, p->at); break;
	}
	return REACT_DRAW;
}

static unsigned
act_earlier(struct ui *ui, int direction)
{
	struct prompt *p = &ui->prompt;
	uint32_t most = p->n_kept < PROMPT_KEPT ? p->n_kept : PROMPT_KEPT, back = p->back + (uint32_t)direction;

	if (p->kind != ':' || back > most)
		return REACT_NONE;
	p->back = back;
	snprintf(p->text, sizeof(p->text), "%s", back > 0 ? p->kept[(p->n_kept - back) % PROMPT_KEPT] : "");
	p->len = p->at = strlen(p->text);
	return REACT_DRAW;
}

const struct key prompt_keys[] = {
	{{K_ENTER}, "enter", "do it", act_enter, 0, NULL},
	{{K_ESC, CTRL('c')}, "esc", "leave it", act_cancel, 0, NULL},
	{{'\t'}, "tab", "complete; shows what fits", act_complete, 0, NULL},
	{{K_UP, CTRL('p')}, "up", "the command before", act_earlier, 1, NULL},
	{{K_DOWN, CTRL('n')}, "down", "the command after", act_earlier, -1, NULL},
	{{K_LEFT, CTRL('b')}, "left", "a character back", act_edit, EDIT_LEFT, NULL},
	{{K_RIGHT, CTRL('f')}, "right", "a character on", act_edit, EDIT_RIGHT, NULL},
	{{K_HOME, CTRL('a')}, "home, ^A", "to the beginning", act_edit, EDIT_HOME, NULL},
	{{K_END, CTRL('e')}, "end, ^E", "to the end", act_edit, EDIT_END, NULL},
	{{K_BACKSPACE, 127, CTRL('h')}, "backspace", "delete the character before", act_edit, EDIT_BACKSPACE, NULL},
	{{K_DELETE, CTRL('d')}, "delete, ^D", "delete the character here", act_edit, EDIT_DELETE, NULL},
	{{CTRL('w')}, "^W", "delete the word before", act_edit, EDIT_WORD, NULL},
	{{CTRL('u')}, "^U", "delete all before", act_edit, EDIT_ALL, NULL},
	{{0}, NULL, NULL, NULL, 0, NULL},
};

unsigned
prompt_key(struct ui *ui, int code)
{
	const struct key *k = keys_find(prompt_keys, code);
	char utf8[5] = "";

	ui->prompt.hint[0] = '\0';
	if (k != NULL)
		return k->act(ui, k->arg);
	if (code < ' ' || code == 127 || code > 0x10ffff)
		return REACT_NONE;
	if (code < 0x80)
		utf8[0] = (char)code;
	else if (code < 0x800)
		utf8[0] = (char)(0xc0 | code >> 6), utf8[1] = (char)(0x80 | (code & 0x3f));
	else if (code < 0x10000)
		utf8[0] = (char)(0xe0 | code >> 12), utf8[1] = (char)(0x80 | (code >> 6 & 0x3f)), utf8[2] = (char)(0x80 | (code & 0x3f));
	else
		utf8[0] = (char)(0xf0 | code >> 18), utf8[1] = (char)(0x80 | (code >> 12 & 0x3f)),
		utf8[2] = (char)(0x80 | (code >> 6 & 0x3f)), utf8[3] = (char)(0x80 | (code & 0x3f));
	insert(&ui->prompt, utf8, strlen(utf8));
	return REACT_DRAW;
}

void
prompt_draw(const struct ui *ui, const struct pane *p, int y)
{
	const struct prompt *in = &ui->prompt;
	const char *label = in->kind == ':' ? ":" : in->kind == '/' ? "/" : "select: ";
	int x = put(p, y, 0, STYLE_KEY, "%s", label), room = p->width - x - 1, at = 0;
	size_t from = 0;

	for (size_t i = 0; i < in->at; i = char_after(in, i))
		at++;
	for (; at >= room && room > 0; at--)
		from = char_after(in, from);
	put(p, y, x, STYLE_TEXT, "%s", in->text + from);
	mark(p, y, x + at, 1, MARK_CURSOR);
}

/* What fits the word stands above the line, in as many rows as it takes. */
void
prompt_draw_hint(const struct ui *ui, const struct pane *p)
{
	struct pane none = pane_part(p, 0, 0, 0, p->width), rows;
	int n;

	if (ui->mode != MODE_PROMPT || *ui->prompt.hint == '\0')
		return;
	n = put_words(&none, 0, 0, STYLE_DIM, ui->prompt.hint);
	rows = pane_part(p, p->height - n, 0, n, p->width);
	pane_clear(&rows);
	put_words(&rows, 0, 0, STYLE_DIM, ui->prompt.hint);
}
