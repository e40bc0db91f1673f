/* SPDX-License-Identifier: Apache-2.0 */
/* A file for octet-console --replay, and keys meanwhile: every view, drawn at
 * three sizes. The first byte counts keys, these follow, then frames. */
#include "tests/fuzz/fuzz.h"
#include "tui/record.h"
#include "tui/ui.h"

#define MOST_FRAMES 8

static const uint32_t head[6] = {0, 0 /* the name goes here */, 1, PAGE_VERSION, sizeof(struct octet_page), 0};

static int
code_of(uint8_t b)
{
	static const int special[] = {K_UP, K_DOWN, K_LEFT, K_RIGHT, K_PPAGE, K_NPAGE, K_HOME, K_END, K_BTAB, K_BACKSPACE, K_DELETE,
	    K_MOUSE, K_F0 + 1, K_F0 + 5, 0x20ac, 0x1f600};

	return b < 0x80 ? b : special[b & 15];
}

static void
draw_all(struct ui *ui, struct canvas *c)
{
	static const int size[][2] = {{80, 24}, {200, 60}, {20, 5}};

	for (int s = 0; s < 3; s++) {
		if (canvas_resize(c, size[s][0], size[s][1]) != 0)
			abort();
		ui_draw(ui, c);
	}
}

static void
press(struct ui *ui, struct canvas *c, int code)
{
	ui->pointer.y = code % 60, ui->pointer.x = code % 200, ui->pointer.pressed = code & 1, ui->pointer.released = code & 2;
	ui->pointer.wheel = code % 5 == 0;
	if (ui_key(ui, code) & REACT_REQUEST) {
		json_t *reply = json_pack("{s:i,s:i,s:s}", "epoch", 7, "sites", 3, "change", "lm_head bf16->fp8");

		json_decref(ui->request);
		ui->request = NULL;
		ui_reply(ui, ui->request_then, 0, "", reply);
		json_decref(reply);
	}
	if (canvas_resize(c, 90, 30) == 0)
		ui_draw(ui, c);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static struct ui ui;
	struct canvas canvas = {0};
	size_t n_keys = n > 0 ? data[0] % 64 : 0, at = 1 + n_keys;
	const struct octet_page *page;
	struct replay *r = NULL;
	struct err err;
	uint8_t *file;

	if (n < at)
		return 0;
	file = malloc(sizeof(head) + n - at);
	memcpy(file, head, sizeof(head));
	memcpy(file, "OCTETREC", 8);
	memcpy(file + sizeof(head), data + at, n - at);
	ui_init(&ui);
	ui.live = data[0] & 0x80;
	ui.data.link = LINK_UP;
	if (replay_open(&r, fuzz_file("replay", file, sizeof(head) + n - at), &err) == 0) {
		for (int i = 0; i < MOST_FRAMES && replay_next(r, &page, &err) > 0; i++) {
			ui_take(&ui, page);
			for (ui.view = 0; views[ui.view] != NULL; ui.view++)
				draw_all(&ui, &canvas);
			ui.view = 0;
			for (size_t k = 0; k < n_keys; k++)
				press(&ui, &canvas, code_of(data[1 + k]));
		}
	}
	replay_close(&r);
	canvas_free(&canvas);
	ui_free(&ui);
	free(file);
	return 0;
}
