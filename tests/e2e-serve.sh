#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A token and a flip, end to end, as a user would try them.
. "${srcdir:-.}/tests/lib.sh"

config <<END
[policy mixed]
* = bf16
mlp.down_proj@0-2,-1 = fp8
lm_head = fp8w
END
ok "the daemon starts" start
wrong="I has seen teh results, and there very good."
out=$(octet complete "$wrong")
has "a sentence is corrected" "$out" '^I have seen the results'
is "the same from standard input" "$(printf %s "$wrong" | octet complete -)" "$out"
is "the same text in JSON" "$(octet complete --json "$wrong" | tail -1 | jq -r .text)" "$out"
summary=$(octet complete --json --logprobs 1 "$wrong" | tail -1)
is "finish reason" "$(echo "$summary" | jq -r .finish_reason)" stop
is "one segment of epoch 1" "$(echo "$summary" | jq -c '[.segments[]|[.epoch,.first]]')" "[[1,0]]"
is "counts agree" "$(echo "$summary" | jq '.output_tokens == (.tokens|length) and .output_tokens == (.logprobs|length)')" true
is "log-probabilities are below zero" "$(echo "$summary" | jq '[.logprobs[]|. <= 0]|all')" true
is "times are there" "$(echo "$summary" | jq '.ttft_ms > 0 and .total_ms >= .ttft_ms')" true
is "max tokens" "$(octet complete --json --max-tokens 3 "$wrong" | tail -1 | jq -c '[.output_tokens,.finish_reason]')" '[3,"length"]'
is "a stop string ends the text before it" "$(octet complete --stop results "$wrong")" "${out%%results*}"
is "a seed repeats itself" "$(octet complete --temperature 1.5 --seed 3 "$wrong")" "$(octet complete --temperature 1.5 --seed 3 "$wrong")"
is "tokens and text agree" "$(octet tokenize --ids 'Hello there.' | wc -w)" "$(octet tokenize 'Hello there.' | wc -l)"
is "special tokens are known" "$(octet tokenize --ids '<|in|><|out|>')" "1 2"

is "status names the policy" "$(octetctl --json status | jq -r .policy)" bf16
is "every group is wanted and executed alike" "$(octetctl --json status | jq '[.groups[]|.wanted==.executed]|all')" true
is "nine groups" "$(octetctl --json status | jq '.groups|length')" 9
has "a dry run changes nothing" "$(octetctl set --dry-run 'attention.*=fp8')" 'would change 24 sites'
is "still epoch 1" "$(epoch)" 1
has "a flip" "$(octetctl set 'attention.*=fp8')" '^epoch 2: 24 sites'
is "status shows it" "$(octetctl --json status | jq -r '.groups[]|select(.name=="attention.q_proj")|.wanted|unique|join(",")')" fp8
is "requests carry the new epoch" "$(octet complete --json "$wrong" | tail -1 | jq -c '[.segments[].epoch]')" "[2]"
has "a flip of one layer" "$(octetctl set mlp.down_proj@1=fp8w)" '^epoch 3: 1 site '
has "the same again is no change" "$(octetctl set mlp.down_proj@1=fp8w)" 'no change'
has "if-epoch guards" "$(octetctl set --if-epoch 2 lm_head=fp8 2>&1)" 'epoch is 3, not 2'
has "a policy" "$(octetctl use mixed)" '^epoch 4'
is "plan as INI reads back" "$(octetctl plan --ini | grep -c =)" "$(octetctl --json plan | jq '.rules|length')"
has "rollback" "$(octetctl rollback)" '^epoch 5'
has "rollback walks further" "$(octetctl rollback)" '^epoch 6'
is "the plan of epoch 2 is back" "$(octetctl --json status | jq -r .plan_digest)" "$(octetctl --json history | jq -r '.[]|select(.epoch==2)|.plan_digest')"
has "rollback to an epoch" "$(octetctl rollback --to 1)" '^epoch 7'
is "the answer is as in the beginning" "$(octet complete "$wrong")" "$out"
has "nothing is left to undo" "$(octetctl rollback; octetctl rollback 2>&1)" 'nothing|no '
is "history lists every epoch once" "$(octetctl --json history | jq -c '[.[].epoch]|.==(unique)')" true
is "history names who" "$(octetctl --json history | jq -r '.[1]|"\(.uid) \(.program) \(.why)"')" "$(id -u) octetctl set"

# A flip during a running request: two segments, nothing lost.
octet complete --json --ignore-eos --max-tokens 400 "$wrong" >"$scratch/long" &
long=$!
wait_for 20 test -s "$scratch/long"
octetctl set 'mlp.*=fp8' >/dev/null
wait "$long"
is "a flip lands inside a request" "$(tail -1 "$scratch/long" | jq '.output_tokens == 400 and (.segments|length) == 2')" true

is "bench runs" "$(octet bench --clients 4 --requests 16 --prompt-tokens 20 --output-tokens 8 --json | jq -c '[.requests,.failed,.tokens]')" "[16,0,128]"

# An app that polls, and the daemon's calls meanwhile but for those by which its threads wait for each other.
calls() { # tokens
	strace -f -c -e trace='!futex,sched_yield' -o "$scratch/calls" -p "$daemon" 2>"$scratch/strace" &
	tracer=$!
	wait_for 20 grep -q attached "$scratch/strace" || return 1
	octet bench --requests 1 --prompt-tokens 4 --output-tokens "$1" --poll >/dev/null
	kill -INT "$tracer"
	wait "$tracer"
	awk '$NF == "total" { n = $4 } END { print n + 0 }' "$scratch/calls"
}
if [ -z "${SANITIZE-}" ] && few=$(calls 20) && many=$(calls 480); then
	ok "no system call for a token: $few for 20, $many for 480" test $((many - few)) -lt 230
else
	skip "no system call for a token" "strace is missing, may not attach, or a sanitizer makes calls"
fi
has "the console prints its grid" "$("$builddir/octet-console" --batch)" 'fp8'
ok "SIGTERM drains and ends with 0" stop
ok "the sockets are gone" test ! -e "$OCTET_SOCKET"

# Restart: the last applied plan comes back.
ok "restart" start
is "epochs go on" "$(octetctl --json status | jq '.epoch > 8')" true
is "the last plan is back" "$(octetctl --json status | jq -r '.groups[]|select(.name=="mlp.up_proj")|.wanted|unique|join(",")')" fp8
sed -i 's/^policy = .*/policy = mixed/' "$scratch/octet.ini"
before=$(epoch)
has "reload takes a new policy" "$(octetctl reload)" 'mixed'
is "as a flip" "$(octetctl --json history | jq -r 'last|"\(.why) \(.policy)"')" "reload mixed"
is "of one epoch" "$(epoch)" $((before + 1))
ok "the end" stop

# From a packed file; then from one that is of another checkpoint, and from a broken one.
mkdir "$scratch/model"
cp "$srcdir"/models/proof/*.json "$srcdir"/models/proof/*.safetensors "$scratch/model"
[ -z "$daemon" ] || stop
has "a model is packed" "$("$builddir/octetd" --pack "$scratch/model" 2>&1)" "$scratch/model/packed.octet: .* in [0-9.]+ s"
model=$scratch/model config </dev/null
from() { sed -n 's/.*info model name=.* from=//p' "$scratch/log" | tail -1; }
ok "a daemon starts from it" start
is "which it says" "$(from)" packed.octet
is "the same text" "$(octet complete "$wrong")" "$out"
octetctl set '*=fp8' >/dev/null
has "in fp8 too" "$(octet complete "$wrong")" '^I have seen the results'
stop
touch "$scratch/model/model.safetensors"
ok "another time of change" start
is "packs the checkpoint" "$(from)" checkpoint
has "and says why" "$(grep model.packed "$scratch/log")" 'made of another checkpoint'
stop
"$builddir/octetd" --pack "$scratch/model" >/dev/null
printf x | dd of="$scratch/model/packed.octet" bs=1 seek=3000000 conv=notrunc 2>/dev/null
ok "a byte that is not what it was" start
has "is seen" "$(grep model.packed "$scratch/log" | tail -1)" 'do not have their hash'
is "and the checkpoint serves" "$(octet complete "$wrong")" "$out"
stop

finish
