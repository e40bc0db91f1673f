#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What keeps operators from harm: confirmation, drain, saved policies, policies of
# clients and requests, a journal that cannot be written, the service manager.
. "${srcdir:-.}/tests/lib.sh"
policy_is() { [ "$(octetctl --json status | jq -r .policy)" = "$1" ]; }
plan_of() { octet complete --json --max-tokens 2 "$@" x | tail -1 | jq -r '.segments[0].plan'; }
active() { octetctl --json status | jq -r .plan_digest; }
me=$(id -un)

config <<-END
	[policy careful]
	attention.* = fp8w
	[access]
	request_policies = *
END
ok "start" start
bf16=$(active)

# --confirm
has "a flip on probation" "$(octetctl set --confirm 1 'attention.*=fp8')" '^epoch 2: 24 sites'
is "status tells" "$(octetctl --json status | jq -c '.unconfirmed | [.epoch, .seconds_left <= 1]')" '[2,true]'
has "nobody builds on it" "$(octetctl set 'lm_head=fp8' 2>&1)" 'epoch 2 waits for its confirmation'
ok "it goes by itself" wait_for 20 sh -c "[ \$($builddir/octetctl --json status | jq .epoch) = 3 ]"
is "the plan is back" "$(active)" "$bf16"
has "history says why" "$(octetctl history)" '^3 .* octetd +rollback +applied: .* \(epoch 2 was not confirmed\)$'
is "the last one alone" "$(octetctl --json history -n 1 | jq -c '[.[].epoch]')" '[3]'
octetctl set --confirm 60 'attention.*=fp8' >/dev/null
has "another epoch" "$(octetctl confirm 2 2>&1)" 'epoch 4 waits for a confirmation, not 2'
has "no epoch" "$(octetctl confirm yes 2>&1)" "'yes' is no number"
is "confirmed" "$(octetctl confirm)" 'epoch 4 stays'
is "nothing waits" "$(octetctl --json status | jq .unconfirmed)" null
has "nothing to confirm" "$(octetctl confirm 2>&1)" 'no change waits'
octetctl use --confirm 60 fp8 >/dev/null
has "a rollback settles it" "$(octetctl rollback)" '^epoch 6'
is "nothing waits then" "$(octetctl --json status | jq .unconfirmed)" null
good=$(active)
octetctl set --confirm 600 'lm_head=fp8' >/dev/null
kill -9 "$daemon"; wait "$daemon" 2>/dev/null
ok "killed while a change waits; start" start
is "the last confirmed plan runs" "$(active)" "$good"
has "history says so" "$(octetctl history | tail -1)" 'start +applied.*\(epoch 7 was'
octetctl set --confirm 600 'lm_head=fp8w' >/dev/null
octetctl confirm >/dev/null
confirmed=$(active)
kill -9 "$daemon"; wait "$daemon" 2>/dev/null
ok "killed after a confirmation; start" start
is "the confirmed plan runs" "$(active)" "$confirmed"

# Policies of requests and clients
octetctl use bf16 >/dev/null
careful=$(plan_of --policy careful)
ok "a request under its own policy" test "$careful" != "$(active)"
is "the active plan is untouched" "$(active)" "$bf16"
octet complete --json --max-tokens 20 --policy careful 'I has a apple' >"$scratch/run.json"
printf '[clients]\nuser:%s = careful\n* = fp8\n' "$me" >>"$scratch/octet.ini"
octetctl reload >/dev/null
is "a client's policy" "$(plan_of)" "$careful"
is "a request's own goes first" "$(plan_of --policy bf16)" "$bf16"
cp "$scratch/octet.ini" "$scratch/good.ini"
echo 'group:nosuchgroup = fp8' >>"$scratch/octet.ini"
has "unknown group, with its line" "$(octetctl reload 2>&1)" "octet.ini:[0-9]+: there is no group 'nosuchgroup'"
sed '$s/.*/uid:5 = nosuch/' "$scratch/octet.ini" >"$scratch/next.ini" && cp "$scratch/next.ini" "$scratch/octet.ini"
has "unknown policy, with its line" "$(octetctl reload 2>&1)" "octet.ini:[0-9]+: policy 'nosuch' is not defined"
# The policy goes; its plan stays known to replays, over a restart too.
sed '/^\[policy careful/,/^attention/d; /careful/d' "$scratch/good.ini" >"$scratch/octet.ini"
octetctl reload >/dev/null
has "replay of a plan whose policy is gone" "$(octet complete --replay "$scratch/run.json" 2>&1)" 'replay: the same [0-9]+ tokens'
ok "stop" stop
ok "start again" start
has "and after a restart" "$(octet complete --replay "$scratch/run.json" 2>&1)" 'replay: the same [0-9]+ tokens'
jq -c 'if .event == "summary" then .tokens[0] += 1 else . end' "$scratch/run.json" >"$scratch/bad.json"
has "a replay that differs says where" "$(octet complete --replay "$scratch/bad.json" 2>&1)" 'token 1 differs'
sed -i '/^\* = fp8/d' "$scratch/octet.ini"

# save
octetctl set 'mlp.*@0-2=fp8' >/dev/null
saved=$(active)
has "save" "$(octetctl save night)" 'policy night is in .*policies.ini'
octetctl use bf16 >/dev/null
has "built-in names are taken" "$(octetctl save bf16 2>&1)" "policy 'bf16' is built in"
has "no name" "$(octetctl save 'a b' 2>&1)" 'letters, digits'
octetctl reload >/dev/null
octetctl use night >/dev/null
is "the saved policy is the same plan" "$(active)" "$saved"
octetctl set 'kv_cache=fp8' >/dev/null
octetctl save night >/dev/null
is "saved again, once in the file" "$(grep -c '^\[policy night\]' "$scratch/policies.ini")" 1
ok "--check reads both files" "$builddir/octetd" --config "$scratch/octet.ini" --check
echo 'nonsense = 1' >>"$scratch/policies.ini"
has "a bad line in it" "$("$builddir/octetd" --config "$scratch/octet.ini" --check 2>&1)" 'nonsense'
sed -i '$d' "$scratch/policies.ini"

# drain
octet complete --json --ignore-eos --max-tokens 400 x >"$scratch/long" &
long=$!
wait_for 60 grep -q token "$scratch/long"
has "drain" "$(octetctl drain)" 'no new requests'
has "no new clients" "$(octet complete x 2>&1)" 'drained or stopping'
is "status shows it" "$(octetctl --json status | jq .draining)" true
has "drain and wait" "$(octetctl drain --timeout 60)" '0 still run'
wait $long
is "what ran has ended well" "$(tail -1 "$scratch/long" | jq -r .finish_reason)" length
octetctl resume >/dev/null
ok "resume" octet complete x

# A journal that cannot be written
octetctl use fp8 >/dev/null
before=$(epoch)
prlimit --pid "$daemon" --fsize="$(stat -c %s "$scratch/state/journal"):"
has "a flip is refused" "$(octetctl set 'lm_head=fp8' 2>&1)" 'journal.*nothing changed'
is "nothing changed" "$(epoch)" "$before"
ok "a rollback is applied" octetctl rollback
is "and shown as unjournaled" "$(octetctl --json history | jq 'last.unjournaled')" true
prlimit --pid "$daemon" --fsize=unlimited:
ok "it is written later" wait_for 60 sh -c "[ \$($builddir/octetctl --json status | jq .journal.unjournaled) = 0 ]"
rolled=$(active)
kill -9 "$daemon"; wait "$daemon" 2>/dev/null
ok "start after that" start
is "the rollback was kept" "$(active)" "$rolled"
ok "stop" stop

# The service manager
if command -v python3 >/dev/null; then
	python3 -c "
import socket,sys
s=socket.socket(socket.AF_UNIX,socket.SOCK_DGRAM);s.bind('$scratch/notify');s.settimeout(60)
while True:
    m=s.recv(1000).decode();print(m.replace('\n',' '),flush=True)
    if m.startswith('STOPPING'):break" >"$scratch/notified" &
	manager=$!
	wait_for 20 test -S "$scratch/notify"
	export NOTIFY_SOCKET="$scratch/notify"
	start
	octetctl reload >/dev/null
	stop
	wait $manager
	is "the service manager heard" "$(sed 's/=[0-9]*$//' "$scratch/notified" | tr '\n' ' ')" \
	    'READY RELOADING=1 MONOTONIC_USEC READY STOPPING '
else
	skip "the service manager heard" "no python3"
fi
finish
