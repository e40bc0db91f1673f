/* SPDX-License-Identifier: Apache-2.0 */
/* Freezes every layout that two programs share. A change here is a new version of the wire or the page. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <stdint.h>

#include "client/octet.h"
#include "client/page.h"
#include "client/wire.h"

#define SIZE(type, bytes) assert_int_equal(sizeof(struct type), bytes)
#define AT(type, field, offset) assert_int_equal(offsetof(struct type, field), offset)

static void
test_wire(void **state)
{
	(void)state;
	assert_int_equal(WIRE_MAGIC, 0x3154434f);
	assert_int_equal(WIRE_VERSION, 2);
	assert_int_equal(WIRE_SQ, 256);
	assert_int_equal(WIRE_SLOTS, 64);
	assert_int_equal(WIRE_EVENTS, 256);
	SIZE(wire_hello, 80);
	AT(wire_hello, pid, 12);
	AT(wire_hello, program, 16);
	SIZE(wire_welcome, 176);
	AT(wire_welcome, vocab, 12);
	AT(wire_welcome, session_bytes, 24);
	AT(wire_welcome, client_id, 40);
	AT(wire_welcome, model, 48);
	SIZE(wire_refused, 272);
	AT(wire_refused, code, 12);
	AT(wire_refused, text, 16);
	SIZE(wire_desc, 128);
	AT(wire_desc, flags, 12);
	AT(wire_desc, prompt_at, 16);
	AT(wire_desc, max_tokens, 24);
	AT(wire_desc, seed, 32);
	AT(wire_desc, temperature, 40);
	AT(wire_desc, min_p, 48);
	AT(wire_desc, repetition_penalty, 52);
	AT(wire_desc, top_logprobs, 64);
	AT(wire_desc, n_bias, 68);
	AT(wire_desc, policy_bytes, 76);
	AT(wire_desc, reserved, 80);
	SIZE(wire_segment, 20);
	SIZE(wire_event, 32);
	AT(wire_event, token, 8);
	AT(wire_event, a, 16);
	AT(wire_event, logprob, 24);
	AT(wire_event, epoch, 24);
	SIZE(wire_slot, 128 + 256 * 32);
	AT(wire_slot, parked, 4);
	AT(wire_slot, head, 64);
	AT(wire_slot, event, 128);
	SIZE(wire_session, 192 + 256 * 128);
	AT(wire_session, prompt_ring, 8);
	AT(wire_session, prompt_at, 16);
	AT(wire_session, sq_tail, 64);
	AT(wire_session, app_sleeps, 68);
	AT(wire_session, sq_head, 128);
	AT(wire_session, daemon_sleeps, 132);
	AT(wire_session, sq, 192);
	assert_int_equal(WIRE_SUBMIT, 1);
	assert_int_equal(WIRE_CANCEL, 2);
	assert_int_equal(WIRE_EV_TOP, 5);
	assert_int_equal(WIRE_FINISH_ERROR, 4);
}

static void
test_page(void **state)
{
	(void)state;
	assert_int_equal(PAGE_MAGIC, 0x4750434f);
	assert_int_equal(PAGE_VERSION, 6);
	SIZE(page_history, 456);
	SIZE(page_client, 144);
	AT(page_client, policy, 72);
	SIZE(page_eval, 280);
	SIZE(page_side, 56);
	SIZE(page_shadow, 48);
	AT(octet_page, seq, 12);
	AT(octet_page, updated_us, 16);
	AT(octet_page, octet_version, 24);
	AT(octet_page, pid, 216);
	AT(octet_page, group, 240);
	AT(octet_page, possible, 720);
	AT(octet_page, wanted, 784);
	AT(octet_page, executed, 4880);
	AT(octet_page, candidate, 8976);
	AT(octet_page, read_bytes, 13072);
	AT(octet_page, absmax, 14096);
	AT(octet_page, kl, 63248);
	AT(octet_page, saved_us, 79696);
	AT(octet_page, layer_kl, 112592);
	AT(octet_page, sweep_us, 115664);
	AT(octet_page, epoch, 115696);
	AT(octet_page, flipping, 115748);
	AT(octet_page, policy, 115752);
	AT(octet_page, ttft_ms_p50, 115968);
	AT(octet_page, shadow, 116120);
	AT(octet_page, rollout, 116168);
	AT(octet_page, side, 116272);
	AT(octet_page, surge_policy, 116432);
	AT(octet_page, history, 116544);
	AT(octet_page, client, 131136);
	AT(octet_page, eval, 140352);
	AT(octet_page, n_log, 144832);
	AT(octet_page, log, 144840);
	SIZE(octet_page, 160200);
}

/* What apps are compiled against. */
static void
test_library(void **state)
{
	(void)state;
	SIZE(octet_info, 152);
	SIZE(octet_bias, 8);
	SIZE(octet_segment, 24);
	SIZE(octet_sampling, 128);
	AT(octet_sampling, seed, 16);
	AT(octet_sampling, min_p, 32);
	AT(octet_sampling, bias, 56);
	AT(octet_sampling, policy, 72);
	AT(octet_sampling, reserved, 96);
	SIZE(octet_event, 168);
	AT(octet_event, plan, 16);
	AT(octet_event, message, 40);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_wire), cmocka_unit_test(test_page),
	    cmocka_unit_test(test_library)};

	return cmocka_run_group_tests_name("wire", tests, NULL, NULL);
}
