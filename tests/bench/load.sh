#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# tests/bench/load.sh BUILD_DIR LLAMA_BIN_DIR MODEL_DIR [ROUNDS]: from the start of the program until it answers, octetd and
# llama-server in turns, with the files in the page cache.
#
# MODEL_DIR holds model.safetensors and, of the same weights, model-bf16.gguf. Also prints the largest memory octetd had by then over
# its weights: its KV cache is not touched before the first request. Medians; of the ratio within a round too. Needs curl and jq.
set -eu
[ $# -ge 3 ] || { sed -n '3,7s/^# \{0,1\}//p' "$0"; exit 2; }
build=$1 llama=$2 model=$(realpath "$3") rounds=${4-5}
dir=$(mktemp -d)
server=
trap 'kill $server 2>/dev/null || :; rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
export OCTET_SOCKET="$dir/s" OCTET_CONTROL_SOCKET="$dir/c"
printf '[daemon]\nsocket = %s\ncontrol_socket = %s\nstate_dir = %s/state\n[model]\npath = %s\n' "$OCTET_SOCKET" "$OCTET_CONTROL_SOCKET" "$dir" \
    "$model" >"$dir/octet.ini"
cat "$model/model.safetensors" "$model/model-bf16.gguf" >/dev/null

now() { date +%s.%N; }
until_ready() { # name, command that tests
	start=$(now)
	until eval "$2" >/dev/null 2>&1; do kill -0 "$server" || { tail -3 "$dir/log"; exit 1; }; sleep 0.01; done
	echo "$start $(now)" | awk '{ print $2 - $1 }' >>"$dir/$1"
}
median() { sort -g | awk '{ v[NR] = $1 } END { printf "%.3f", NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }

for round in $(seq "$rounds"); do
	"$build/octetd" --config "$dir/octet.ini" 2>"$dir/log" &
	server=$!
	until_ready octet '"$build/octet" tokenize x'
	awk -v w="$("$build/octetctl" status --json | jq .weights_bytes)" '/VmHWM/ { print $2 * 1024 / w }' "/proc/$server/status" >>"$dir/memory"
	kill "$server"; wait "$server" || :
	"$llama/llama-server" -m "$model/model-bf16.gguf" -t "$(nproc)" -c 2048 --host 127.0.0.1 --port 18431 >"$dir/log" 2>&1 &
	server=$!
	until_ready peer 'curl -sf http://127.0.0.1:18431/health'
	kill "$server"; wait "$server" || :
done
server=
echo "octetd $(median <"$dir/octet") s, llama-server $(median <"$dir/peer") s; $(paste "$dir/octet" "$dir/peer" | awk '{ print $1 / $2 }' | median) times"
echo "largest memory until then: $(median <"$dir/memory") times the weights"
