#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# tests/bench/eval.sh BUILD_DIR MODEL_DIR TEXT [ROUNDS]: what measuring costs, with a daemon of its own.
#
# Beside: 8 clients that stream, the time between their tokens, in turns without and with an eval of fp8 against bf16. Alone:
# tokens that an eval runs per second, those of both plans, from the difference between a long and a short text (what is done once
# drops out), against the prompt tokens per second of requests for one token. Medians, of the ratios of neighbours too. Needs jq.
. "$(dirname "$0")/lib.sh"
[ $# -ge 3 ] || usage
build=$1 model=$(realpath "$2") text=$3 rounds=${4-5}
config <<END
[engine]
prefix_cache = off
END
start
for n in 1 3 500; do
	for i in $(seq "$n"); do cat "$text"; done >"$dir/text.$n"
done

eval_of() { octetctl eval --candidate fp8 --text "$dir/text.$1" --context 256 --json; }
stream() { bench --clients 8 --requests 16 --prompt-tokens 16 --output-tokens 200 | jq '.inter_token_ms.p50, .inter_token_ms.p99'; }
prefill() { bench --clients 2 --requests 40 --prompt-tokens 256 --output-tokens 1 | jq .prompt_tokens_per_s; }

stream >/dev/null
for round in $(seq "$rounds"); do
	stream >"$dir/out"
	sed -n 1p "$dir/out" >>"$dir/p50.without"; sed -n 2p "$dir/out" >>"$dir/p99.without"
	"$build/octetctl" eval --candidate fp8 --text "$dir/text.500" --context 256 >/dev/null 2>&1 & # no function: a kill must reach it
	client=$!
	until [ "$(octetctl status --json | jq .kv.pages_used)" -gt 0 ]; do sleep 0.05; done
	stream >"$dir/out"
	sed -n 1p "$dir/out" >>"$dir/p50.with"; sed -n 2p "$dir/out" >>"$dir/p99.with"
	kill $client
	wait $client || :
	client=
	for again in 1 2 3; do
		a=$(prefill)
		b=$(eval_of 1 | jq '.seconds, .text.tokens') c=$(eval_of 3 | jq '.seconds, .text.tokens')
		echo "$a" >>"$dir/prefill"
		echo $b $c | awk '{ print 2 * ($4 - $2) / ($3 - $1) }' >>"$dir/eval"
	done
done
ratio() { paste "$1" "$2" | awk '{ print $2 / $1 }' | median; }
for what in p50 p99; do
	echo "$what between tokens, 8 clients: $(median <"$dir/$what.without") ms without, $(median <"$dir/$what.with") ms beside an eval: $(ratio "$dir/$what.without" "$dir/$what.with") times"
done
echo "tokens/s: prefill $(median <"$dir/prefill"), eval $(median <"$dir/eval"): $(ratio "$dir/prefill" "$dir/eval") times"
