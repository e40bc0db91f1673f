#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# tests/bench/load.sh BUILD_DIR LLAMA_BIN_DIR MODEL_DIR [ROUNDS]: from the start of the program until it answers, octetd and
# llama-server in turns, with the files in the page cache.
#
# MODEL_DIR holds model.safetensors and, of the same weights, model-bf16.gguf; octetd starts from packed.octet if that is there
# (octetd --pack). Also prints the largest memory octetd had by then over its weights: its KV cache is not touched before the
# first request. Medians; of the ratio within a round too. Needs curl and jq.
. "$(dirname "$0")/lib.sh"
[ $# -ge 3 ] || usage
build=$1 llama=$2 model=$(realpath "$3") rounds=${4-5}
config </dev/null
from=packed.octet
[ -f "$model/$from" ] || from=model.safetensors
cat "$model/$from" "$model/model-bf16.gguf" >/dev/null

timed() { # name, command that succeeds when it answers
	name=$1 begin=$(date +%s.%N)
	shift
	until_ready "$@"
	echo "$begin $(date +%s.%N)" | awk '{ print $2 - $1 }' >>"$dir/$name"
}

for round in $(seq "$rounds"); do
	launch
	timed octet ready
	awk -v w="$(octetctl status --json | jq .weights_bytes)" '/VmHWM/ { print $2 * 1024 / w }' "/proc/$daemon/status" >>"$dir/memory"
	stop
	"$llama/llama-server" -m "$model/model-bf16.gguf" -t "$(nproc)" -c 2048 --host 127.0.0.1 --port 18431 >"$dir/log" 2>&1 &
	daemon=$!
	timed peer curl -sf http://127.0.0.1:18431/health
	kill $daemon; wait $daemon || :
	daemon=
done
echo "octetd $from $(median <"$dir/octet") s, llama-server $(median <"$dir/peer") s; $(paste "$dir/octet" "$dir/peer" | awk '{ print $1 / $2 }' | median) times"
echo "largest memory until then: $(median <"$dir/memory") times the weights"
