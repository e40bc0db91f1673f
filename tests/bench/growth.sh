#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# tests/bench/growth.sh BUILD_DIR MODEL_DIR [ROUNDS]: how cost grows, with a daemon of its own.
#
# Milliseconds a token behind contexts of more and more positions, KV cache in BF16 and in FP8, and the slope beside the bytes that a
# position adds; tokens/s of 1 to 64 sequences; tokens/s of requests while 96 and while 10,016 wait, which the app that waits for
# them asks for from CPUs of its own: its cost is not the daemon's. Rounds go in turns; medians.
# TESTS picks: "context sequences queue"; CONTEXTS has the positions. Needs jq. What sampling costs: tests/check/checkkernels --bench.
. "$(dirname "$0")/lib.sh"
[ $# -ge 2 ] || usage
build=$1 model=$(realpath "$2") rounds=${3-3}
: "${TESTS=context sequences queue}" "${CONTEXTS=128 512 1024 2048 4096 8000}"
half=$(($(nproc) / 2))
settings() { # threads
	config <<END
max_queue = 20000
max_clients = 200
max_clients_per_uid = 200
max_requests = 64
max_requests_per_uid = 20000
[engine]
kv_cache_bytes = 1G
prefix_cache = off
threads = $1
END
}

# Least squares of the medians; a position has K and V of every layer, in FP8 with two scales a head.
contexts() {
	config=$model/config.json
	for format in bf16 fp8; do
		bytes=$(jq --arg f $format '(.head_dim // (.hidden_size / .num_attention_heads)) as $d |
		    2 * .num_hidden_layers * .num_key_value_heads * (if $f == "bf16" then 2 * $d else $d + 4 end)' "$config")
		for n in $CONTEXTS; do
			[ -f "$dir/context.$format.$n" ] || continue
			echo "$n $(median <"$dir/context.$format.$n")"
		done | awk -v f=$format -v b="$bytes" '{ printf "context %5d, KV %s: %s ms a token\n", $1, f, $2
			n++; x += $1; y += $2; xx += $1 * $1; xy += $1 * $2 }
			END { s = (n * xy - x * y) / (n * xx - x * x); i = (y - s * x) / n
			printf "KV %s: %.4g ms + %.4g us a position of %d bytes: %.1f GB/s\n", f, i, s * 1e3, b, b / s / 1e6 }'
	done
}
case $TESTS in *context* | *sequences*)
	settings 0
	start
	for round in $(seq "$rounds"); do
		case $TESTS in *context*)
			for n in $CONTEXTS; do
				for format in bf16 fp8; do
					octetctl set kv_cache=$format >/dev/null 2>&1 || :
					bench --requests 1 --prompt-tokens "$n" --output-tokens 60 |
					    jq "(.total_ms.p50 - .ttft_ms.p50) / 59" >>"$dir/context.$format.$n"
				done
			done
			octetctl set kv_cache=bf16 >/dev/null 2>&1 || : ;;
		esac
		case $TESTS in *sequences*)
			for n in 1 2 4 8 16 32 64; do
				bench --clients "$n" --requests "$n" --prompt-tokens 8 --output-tokens 64 |
				    jq --argjson n "$n" '63e3 * $n / (.total_ms.p50 - .ttft_ms.p50)' >>"$dir/sequences.$n"
			done ;;
		esac
	done
	stop ;;
esac
case $TESTS in *queue*)
	settings "$half"
	start taskset -c "0-$((half - 1))"
	for round in $(seq "$rounds"); do
		for n in 96 10016; do # 64 run; from as many sessions, as each costs bells of its own
			taskset -c "$half-$(($(nproc) - 1))" "$build/octet" bench --json --clients 160 --in-flight $(((n + 64) / 160)) \
			    --requests 12000 --prompt-tokens 4 --output-tokens 60 |
			    jq .output_tokens_per_s >>"$dir/queue.$n"
		done
	done
	stop ;;
esac
case $TESTS in *context*) contexts ;; esac
for f in "$dir"/sequences.* "$dir"/queue.*; do
	[ ! -f "$f" ] || echo "${f##*.} $(median <"$f")" | sed "s/^/$(basename "${f%.*}") /"
done | sort -k1,1 -k2,2n | awk '{ print $1 == "queue" ? $2 " requests wait:" : $2 " sequences:", $3, "tokens/s" }'
