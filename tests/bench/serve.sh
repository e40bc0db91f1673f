#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# tests/bench/serve.sh BUILD_DIR MODEL_DIR [ROUNDS]: what serving costs beside the forward pass, best seen with a tiny model.
#
# With a daemon as it comes: requests of 4 tokens in and 1 out, from 1 and from 8 sessions of one process; the
# forward pass is what the engine says of itself. With a daemon that never spins, so that waiting costs no CPU time: its CPU time less its
# forward passes, per request and per token of long answers, to readers that poll and to some that sleep, whom a bell wakes for each
# token. Its system calls per token while an app polls. Medians over the rounds. Needs jq; strace for the last line.
. "$(dirname "$0")/lib.sh"
[ $# -ge 2 ] || usage
build=$1 model=$(realpath "$2") rounds=${3-5}
ticks=$(getconf CLK_TCK)

spin() { printf '[engine]\nspin_us = %s\n' "$1" | config; }
requests() { # clients, requests, output tokens, ...
	clients=$1 n=$2 output=$3
	shift 3
	bench --clients "$clients" --requests "$n" --prompt-tokens 4 --output-tokens "$output" "$@"
}
passes() { octetctl status --json | jq -r '"\(.forward_s) \(.step)"'; }
spent() { # seconds of CPU time beside forward passes
	awk -v hz="$ticks" -v f="$(octetctl status --json | jq .forward_s)" '{ print ($14 + $15) / hz - f }' "/proc/$daemon/stat"
}
show() { printf '%-64s %s\n' "$1" "$(median <"$2")"; }

spin 50
start
requests 1 1000 1 >/dev/null
for round in $(seq "$rounds"); do
	before=$(passes)
	requests 1 10000 1 | jq .total_ms.p50 >"$dir/p50"
	echo $before $(passes) $(cat "$dir/p50") | awk '{ print $5 - 1e3 * ($3 - $1) / ($4 - $2) }' >>"$dir/overhead"
	cat "$dir/p50" >>"$dir/latency"
	requests 8 40000 1 | jq .requests_per_s >>"$dir/rate"
done
stop
show "1 client, 4 tokens in, 1 out: latency, ms p50" "$dir/latency"
show "the same less the mean forward pass: overhead, ms" "$dir/overhead"
show "8 clients: requests/s" "$dir/rate"

spin 0
start
for round in $(seq "$rounds"); do
	before=$(spent)
	requests 8 40000 1 >/dev/null
	spent | awk -v b="$before" '{ print ($1 - b) / 40000 * 1e6 }' >>"$dir/request"
	for how in polled asleep; do
		poll=--poll
		[ $how = polled ] || poll=
		before=$(spent)
		requests 8 400 500 $poll >/dev/null
		spent | awk -v b="$before" '{ print ($1 - b) / 200000 * 1e6 }' >>"$dir/$how"
	done
done
stop
show "CPU beside forward and waiting, 8 clients: us a request" "$dir/request"
show "the same, 500 tokens out, readers that poll: us a token" "$dir/polled"
show "readers that sleep" "$dir/asleep"

strace -f -o /dev/null true 2>/dev/null || exit 0
spin 50
for tokens in 1000 8000; do
	start strace -f -c -o "$dir/calls.$tokens"
	requests 1 1 "$tokens" --poll >/dev/null
	stop
	awk '$NF == "total" { print $4 }' "$dir/calls.$tokens" >"$dir/n.$tokens"
done
paste "$dir/n.1000" "$dir/n.8000" | awk '{ print ($2 - $1) / 7000 }' >"$dir/calls"
show "1 client that polls: system calls of the daemon a token" "$dir/calls"
