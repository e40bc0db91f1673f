#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# kill -9 at random moments under load with flips: the last applied plan comes
# back, the journal is clean, clients get an error and can reconnect.
. "${srcdir:-.}/tests/lib.sh"

rounds=10
[ -z "${OCTET_LONG-}" ] || rounds=50
seed=${OCTET_SEED:-1}
echo "# $rounds rounds, seed $seed"
random() { seed=$(((seed * 1103515245 + 12345) % 2147483648)); echo $((seed / 65536 % $1)); }
config
lost=0 wrong=0 hung=0 started=0
round=0
while [ $round -lt $rounds ]; do
	round=$((round + 1))
	start || break
	started=$((started + 1))
	octet bench --clients 4 --requests 100000 --prompt-tokens 20 --output-tokens 40 >"$scratch/bench" 2>&1 &
	bench=$!
	# Applied flips as their operator saw them: epoch and plan.
	(
		i=0
		while :; do
			i=$((i + 1))
			case $((i % 4)) in
			0) rules='attention.*=fp8' ;; 1) rules='mlp.*=fp8w' ;; 2) rules='*=bf16 kv_cache=bf16' ;; 3) rules='kv_cache@0-2=fp8' ;;
			esac
			octetctl --json set $rules 2>/dev/null | jq -r 'select(.changed)|"\(.epoch) \(.plan_digest)"' >>"$scratch/seen"
		done
	) &
	flipper=$!
	wait_for 60 test -s "$scratch/seen"
	sleep "0.$(random 5)$(random 10)"
	kill -9 "$daemon"
	wait "$daemon" 2>/dev/null
	kill "$flipper" 2>/dev/null
	wait "$flipper" 2>/dev/null
	daemon=
	# The clients are told, and end by themselves.
	wait_for 60 sh -c "! kill -0 $bench" || hung=$((hung + 1))
	wait "$bench" 2>/dev/null
	grep -q 'octet: ' "$scratch/bench" || lost=$((lost + 1))
	rm -f "$scratch/seen.last"
	tail -1 "$scratch/seen" >"$scratch/seen.last"
	start || break
	# What the operator was told last is what runs, or a later change whose reply was cut off.
	now=$(octetctl --json history | jq -r 'last|.plan_digest')
	running=$(octetctl --json status | jq -r .plan_digest)
	read -r e d <"$scratch/seen.last"
	applied=$(octetctl --json history | jq -r --argjson e "$e" '[.[]|select(.result=="applied" and .why=="set" and .epoch>=$e)]|last|.plan_digest')
	if [ "$running" != "$applied" ] || [ "$running" != "$now" ]; then
		wrong=$((wrong + 1))
		echo "# round $round: told $e $d, history $applied, runs $running"
	fi
	is_told=$(octetctl --json history | jq -r --argjson e "$e" '.[]|select(.epoch==$e)|"\(.result) \(.plan_digest)"')
	[ "$is_told" = "applied $d" ] || { wrong=$((wrong + 1)); echo "# round $round: epoch $e was told as $d, journal has '$is_told'"; }
	stop || true
done
is "every round started" "$started" "$rounds"
is "the last applied plan came back every time" "$wrong" 0
is "no client hung" "$hung" 0
is "every client was told" "$lost" 0
start
is "the journal is readable to its end" "$(octetctl --json history | jq '[.[].epoch]|.==unique and length > 20')" true
ok "a client serves again" octet complete "It work again."
finish
