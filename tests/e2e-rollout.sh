#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Rollout, shadow, guardrail and surge against a real daemon under load.
. "${srcdir:-.}/tests/lib.sh"
command -v jq >/dev/null || { skip "rollout" "no jq"; finish; exit 0; }
load() { octet bench --clients "${2:-4}" --requests "$1" --prompt-tokens 12 --output-tokens 8 >"$scratch/bench" 2>&1; }
side() { octetctl rollout --json | jq -r "$@"; }
# A request is counted a moment after its client has the last token.
served() { side '.candidate.requests + .baseline.requests'; }
counted() { [ "$(served)" -ge "$1" ]; }

shadow_options='sample = 100%
max_kl = 0.05
cooldown_s = 1'
printf '[shadow]\n%s\n[policy fast]\n* = fp8\n' "$shadow_options" | config
start || exit 1
is "there is none" "$(octetctl rollout)" "there is no rollout"
ok "start" octetctl rollout start fast --percent 10 --by request --guard kl=0.05,agree=0.5
has "another is refused" "$(octetctl rollout start fp8 --percent 1 2>&1)" 'under way'
has "a wrong guard is refused" "$(octetctl rollout abort >/dev/null; octetctl rollout start fast --percent 1 --guard kl=x 2>&1)" 'write kl=0.01'
has "a wrong per cent" "$(octetctl rollout start fast --percent 120 2>&1)" '0 to 100'
octetctl rollout start fast --percent 10% --by request --guard kl=0.05 >/dev/null
load 800
# 800 requests at 10 %: 80, standard deviation 8.5.
wait_for 10 counted 800
n=$(side .candidate.requests)
is "all were counted" "$(served)" 800
ok "the share is what was asked ($n of 800)" test "$n" -ge 46 -a "$n" -le 114
quiet() { [ "$(octetctl status --json | jq .shadow.waiting)" -eq 0 ]; }
wait_for 60 quiet
is "shadow measured the candidate" "$(side '.shadow.requests > 0 and .shadow.kl > 0 and .shadow.kl < 0.05')" true
before=$(side -c '[.policy, .percent, .by, .guard, .epoch]')
running() { [ "$(octetctl status --json | jq .requests.running)" -gt 0 ]; }
octet bench --clients 4 --requests 10000 --prompt-tokens 12 --output-tokens 60 >/dev/null 2>&1 &
client=$!
ok "it is busy" wait_for 10 running
kill -9 "$daemon"
wait "$daemon" $client 2>/dev/null
start || exit 1
is "kill -9 under load: the same state again" "$(side -c '[.policy, .percent, .by, .guard, .epoch]')" "$before"
is "which is what was asked" "$(side '[.policy, .percent, .by, .guard.kl] | @csv')" '"fast",10,"request",0.05'
ok "percent" octetctl rollout percent 0
all=$(served)
load 40
wait_for 10 counted $((all + 40))
is "none at 0 %" "$(side .candidate.requests)" 0
ok "promote" octetctl rollout promote
is "the candidate is active" "$(octetctl --json status | jq -r .policy)" fast
is "and the rollout over" "$(octetctl rollout)" "there is no rollout"
has "history has the steps" "$(octetctl history)" 'rollout +applied: percent=10 .*\(start\)'
is "rollback undoes the promotion" "$(octetctl rollback >/dev/null; octetctl --json status | jq -r .policy)" bf16

# By client: one stays on its side.
octetctl rollout start fast --percent 50 --by client >/dev/null
sides=
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
	was=$(side .candidate.requests) all=$(served)
	load 6 1
	wait_for 10 counted $((all + 6))
	sides="$sides $(($(side .candidate.requests) - was))"
done
is "each of 16 clients stays on its side ($sides)" "$(printf '%s' "$sides" | tr ' ' '\n' | grep -cxE '0|6')" 16
# All on one side: 1 in 32,768.
has "and both sides have some" "$(printf '%s' "$sides" | tr ' ' '\n' | sort -u | xargs)" '^0 6$'

# Abort: running requests go on under the active plan.
# One that ended before the abort came says nothing: again.
octetctl rollout abort >/dev/null
segments=0
for i in 1 2 3 4 5 6 7 8; do
	octetctl rollout start fast --percent 100 --by request >/dev/null
	octet complete --max-tokens 480 --ignore-eos --json "The rain" >"$scratch/long" 2>/dev/null &
	client=$!
	wait_for 2 running
	octetctl rollout abort >/dev/null
	wait $client
	segments=$(tail -1 "$scratch/long" | jq '.segments | length')
	[ "$segments" -ne 1 ] || continue
	break
done
is "a running request follows the abort" "$segments" 2
ok "it stops in order" stop

# No fault, no rollback, however long one looks.
all=300
[ -z "${OCTET_LONG-}" ] || all=10000
printf '[shadow]\nsample = 100%%\nshare = 1\nmax_kl = 0.03\nmin_agree = 0.8\n[policy fast]\n* = fp8\n' | config
start || exit 1
octetctl use fast >/dev/null
scored=0
while [ "$scored" -lt "$all" ]; do
	load 1000 8
	scored=$(octetctl status --json | jq .shadow.scored)
done
is "$scored scored requests of a sound plan: no rollback" "$(octetctl --json status | jq -r .policy)" fast
is "and nothing from the guardrail" "$(octetctl history --json | jq '[.[] | select(.program == "guardrail")] | length')" 0
ok "it stops in order" stop

# A fault is taken back from live traffic, with the numbers, and does not flap.
rm -rf "$scratch/state"
printf '[shadow]\n%s\n[policy fast]\n* = fp8\n' "$shadow_options" | config
OCTET_FAULT=mlp.up_proj@3
export OCTET_FAULT
start || exit 1
octetctl use fast >/dev/null
load 60
back() { [ "$(octetctl --json status | jq -r .policy)" = bf16 ]; }
ok "the guardrail rolls a faulty plan back" wait_for 30 back
h=$(octetctl history -n 1)
has "and says why in the journal" "$h" 'guardrail .*rollback .*KL [0-9.]+, bound 0.05, [0-9]+ requests'
needed=$(printf '%s' "$h" | sed -n 's/.*, \([0-9]*\) requests.*/\1/p')
ok "within 30 scored requests ($needed)" test "${needed:-99}" -le 30
load 40
is "nothing more happens" "$(octetctl history --json | jq '[.[] | select(.program == "guardrail")] | length')" 1
octetctl rollout start fast --percent 50 --by request --guard kl=0.05 >/dev/null
sleep 1.2
load 80
over() { [ "$(octetctl rollout)" = "there is no rollout" ]; }
ok "and a faulty rollout is aborted" wait_for 30 over
has "with the reason" "$(octetctl history -n 1)" 'rollout .*abort: guardrail: KL'
ok "it stops in order" stop
unset OCTET_FAULT

# Surge: in under load, out again, and an operator wins.
rm -rf "$scratch/state"
engine_options='max_batch = 1'
printf '[surge]\npolicy = fast\nenter_queue_ms = 20\nleave_queue_ms = 5\nmin_hold_s = 1\n[policy fast]\n* = fp8w\n' | config
start || exit 1
octet bench --clients 8 --requests 100 --prompt-tokens 40 --output-tokens 30 >/dev/null 2>&1 &
client=$!
fast() { [ "$(octetctl --json status | jq -r .policy)" = fast ]; }
slow() { [ "$(octetctl --json status | jq -r .policy)" = bf16 ]; }
ok "surge comes with the queue" wait_for 20 fast
wait $client
ok "and goes with it" wait_for 20 slow
has "both are in the history" "$(octetctl history)" 'surge +use +applied: .*oldest waits'
octet bench --clients 8 --requests 300 --prompt-tokens 40 --output-tokens 30 >/dev/null 2>&1 &
client=$!
wait_for 20 fast
octetctl set lm_head=bf16 >/dev/null
yielded() { [ "$(octetctl status --json | jq -r .surge.state)" = "yielded to an operator" ]; }
ok "an operator's change wins" wait_for 5 yielded
wait $client
sleep 1.5
has "and stays" "$(octetctl --json status | jq -r .policy)" 'change'
stop
finish
