#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# tests/bench/peer.sh BUILD_DIR LLAMA_BIN_DIR MODEL_DIR [ROUNDS]: octet beside llama.cpp on the same weights, on all CPUs.
#
# MODEL_DIR holds model.safetensors and model-bf16.gguf of the same weights; model-F16.gguf and model-Q8_0.gguf, made from the latter
# by llama-quantize, are measured too where they are. A round runs every test once with each program and each type, one after the
# other; medians over the rounds, and medians of the ratios within a round, are printed: machines change their speed meanwhile.
# TESTS picks: "prefill 512" "decode 32" and so on; "requests 32" is requests/s of 50 tokens in and 50 out from so many clients of a
# daemon, beside so many sequences of llama-batched-bench, which serves nobody. The 8-bit rows have every linear layer and lm_head in 8
# bits, the KV cache in 16. Builds nothing. Needs jq.
. "$(dirname "$0")/lib.sh"
[ $# -ge 3 ] || usage
build=$1 llama=$2 model=$(realpath "$3") rounds=${4-5}
: "${TESTS=prefill 128,prefill 512,prefill 2048,decode 1,decode 4,decode 8,decode 16,decode 32}"
threads=$(nproc)

note() { echo "$3" >>"$dir/$1.$2"; } # type, test (no blanks), tokens/s

serve() { # format, clients
	printf '[engine]\nprefix_cache = off\n[precision]\npolicy = all\n[policy all]\n* = %s\n' "$1" | config
	start
	bench --clients "$2" --requests $(($2 * 2)) | jq .requests_per_s
	stop
}

octet_runs() { # prefill|decode|requests N
	if [ "$1" = requests ]; then
		for format in bf16 fp8 fp8w; do note "$format" "$1-$2" "$(serve "$format" "$2")"; done
		return
	fi
	"$build/octetd" --bench "$model" --rounds 1 --only "$1 $2" --json >"$dir/json"
	for format in bf16 fp8 fp8w; do
		note "$format" "$1-$2" "$(jq -r ".results[] | select(.format == \"$format\") | .tokens_s" "$dir/json")"
	done
}

peer_runs() { # prefill|decode|requests N
	for gguf in "$model"/model-*.gguf; do
		type=${gguf##*/model-} type=${type%.gguf}
		if [ "$1" = prefill ]; then
			value=$("$llama/llama-bench" -m "$gguf" -t "$threads" -p "$2" -n 0 -r 1 -o json 2>/dev/null | jq '.[0].avg_ts')
		elif [ "$1" = requests ]; then
			value=$("$llama/llama-batched-bench" -m "$gguf" -t "$threads" -tb "$threads" -c $((128 * $2)) -b 2048 -ub 512 -npp 50 -ntg 50 \
			    -npl "$2" --output-format jsonl 2>/dev/null | jq -s --argjson n "$2" '[.[] | .t // empty][0] | $n / .')
		else
			value=$("$llama/llama-batched-bench" -m "$gguf" -t "$threads" -tb "$threads" -c $((160 * $2)) -b 2048 -ub 512 -npp 128 -pps \
			    -ntg 16 -npl "$2" --output-format jsonl 2>/dev/null | jq -s '[.[] | .speed_tg // empty][0]')
		fi
		note "peer-$type" "$1-$2" "$value"
	done
}

ratio() { # ours, theirs, test
	[ -f "$dir/peer-$2.$3" ] || return 0
	printf '  %s/%s %s' "$1" "$2" "$(paste "$dir/$1.$3" "$dir/peer-$2.$3" | awk '{ print $1 / $2 }' | median)"
}

old_ifs=$IFS
for round in $(seq "$rounds"); do
	IFS=,
	for test in $TESTS; do
		IFS=$old_ifs
		echo "round $round: $test" >&2
		octet_runs ${test% *} ${test#* }
		peer_runs ${test% *} ${test#* }
	done
done

"$build/octetd" --version
"$llama/llama-bench" --version 2>&1 | head -1
echo "$threads threads, $rounds rounds, medians, tokens/s or requests/s"
IFS=,
for test in $TESTS; do
	IFS=$old_ifs
	key=$(echo "$test" | tr ' ' -)
	printf '%-13s' "$test"
	for file in bf16 fp8 fp8w peer-bf16 peer-F16 peer-Q8_0; do
		[ ! -f "$dir/$file.$key" ] || printf ' %s %s' "$file" "$(median <"$dir/$file.$key")"
	done
	printf '\n%13s' ''
	ratio bf16 bf16 "$key"
	ratio bf16 F16 "$key"
	ratio fp8 Q8_0 "$key"
	ratio fp8w Q8_0 "$key"
	printf '\n'
done
