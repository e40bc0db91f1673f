#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# octetd on the CUDA plugin against the CPU: tokens, log-probabilities, eval, flips under load. On the plugin that
# tests/gpu/emu runs on the CPU, or on the one of $OCTET_TEST_PLUGIN and a card.
. "${srcdir:-.}/tests/lib.sh"
plugin=${OCTET_TEST_PLUGIN-$builddir/tests/gpu/octet-cuda-emu.so}
unset OCTET_PLUGIN
for tool in jq; do command -v $tool >/dev/null || { skip "the CUDA plugin" "no $tool"; finish; exit 0; }; done
[ -f "$plugin" ] || { skip "the CUDA plugin" "it was not built: no C++ compiler"; finish; exit 0; }
head -c "${text_bytes-100}" "$srcdir/models/proof/eval/prose.txt" >"$scratch/text"
policies='
[policy kv8]
kv_cache = fp8
[policy fp8t]
* = fp8t
[policy fp8b]
* = fp8b
[policy mixed]
* = fp8
attention.q_proj = fp8w
mlp.up_proj@0-2 = bf16
mlp.down_proj = fp8b
attention.v_proj@1,2 = fp8b
attention.k_proj@2 = fp8b
lm_head = fp8t
kv_cache@1,3 = fp8'
plans=${plans-bf16 mixed}

# Tokens of a few requests under each plan; log-probabilities of a text; a measurement.
answers() {
	for plan in $plans; do
		octetctl use "$plan" >/dev/null 2>&1 || [ "$(octetctl --json status | jq -r .policy)" = "$plan" ] || ok "use $plan" false
		octet complete --json --ignore-eos --max-tokens "${tokens-6}" "She go to school every day and" | tail -1 | jq -c .tokens >>"$scratch/$1.$plan"
		octet complete --json --temperature 0.8 --top-p 0.95 --top-k 30 --repetition-penalty 1.2 --seed 7 --max-tokens 4 --ignore-eos "It work" |
			tail -1 | jq -c '[.tokens, .prompt_tokens]' >>"$scratch/$1.drawn"
	done
	octetctl use bf16 >/dev/null 2>&1
	[ "$2" != both ] || octetctl eval --candidate fp8 --text "$scratch/text" --json >"$scratch/$1.eval"
}
# What FP8 makes of inputs: of a prompt's rows, one a step, and of those behind it.
evidence() {
	octet complete --ignore-eos --max-tokens 6 "She go to school every day and I" >/dev/null
	octetctl --json status | jq -c '[.groups[].evidence | .absmax, .zero, .saturated]' >"$scratch/$1.evidence"
}
near() { jq -en "($1 - $2 | if . < 0 then -. else . end) <= $3"; }

engine_options='backend = cpu' config <<END
$policies
END
start || exit 1
answers cpu both
is "the CPU answered" "$(jq length "$scratch/cpu.bf16") $(wc -l <"$scratch/cpu.drawn")" "${tokens-6} $(echo $plans | wc -w)"
stop
rm -rf "$scratch/state"
engine_options='backend = cpu
evidence_steps = 1' config </dev/null
start
evidence cpu
stop

engine_options='backend = cuda' config </dev/null
for fault in none:"no card" driver:"no NVIDIA driver" old:"driver is too old: it speaks CUDA 11.4" chip:"has no FP8"; do
	[ -z "${OCTET_TEST_PLUGIN-}" ] || break
	has "backend = cuda: ${fault#*:}" "$(OCTET_EMU_FAULT=${fault%%:*} OCTET_PLUGIN=$plugin "$builddir/octetd" --config "$scratch/octet.ini" 2>&1)" "backend = cuda: .*${fault#*:}"
done
has "no plugin" "$(OCTET_PLUGIN=/nonexistent "$builddir/octetd" --config "$scratch/octet.ini" 2>&1)" "no cuda plugin: /nonexistent"
has "no plugin of ours" "$(OCTET_PLUGIN=$scratch/octet.ini "$builddir/octetd" --config "$scratch/octet.ini" 2>&1)" "plugin does not load"
[ -n "${OCTET_TEST_PLUGIN-}" ] ||
	has "a card that is too small" "$(OCTET_EMU_MEMORY=20000000 OCTET_PLUGIN=$plugin "$builddir/octetd" --config "$scratch/octet.ini" 2>&1)" "too small|out of memory"
engine_options='backend = auto' config </dev/null
OCTET_PLUGIN=/nonexistent
export OCTET_PLUGIN
ok "auto without a plugin" start
is "falls back with one line" "$(grep -c 'backend backend=cpu' "$scratch/log")" 1
stop

if [ -z "${OCTET_TEST_PLUGIN-}" ]; then
	: >"$scratch/log"
	OCTET_PLUGIN=$plugin OCTET_EMU_MEMORY=100000000
	export OCTET_EMU_MEMORY
	ok "auto with too small a card" start
	is "falls back with one line too" "$(grep 'backend backend=cpu' "$scratch/log" | grep -c 'too small')" 1
	stop
	unset OCTET_EMU_MEMORY
	OCTET_EMU_FAULT=capture
	export OCTET_EMU_FAULT
	ok "start where graphs come to nothing" start
	octet complete --ignore-eos --max-tokens 6 "It work" >"$scratch/eager"
	is "steps run eagerly" "$(octetctl --json status | jq -c '.device | [.graphs, .eager_steps > 4, .failure]')" '[0,true,""]'
	stop
	rm -rf "$scratch/state"
	OCTET_EMU_FAULT=choices OCTET_EMU_LATE=1 # memory grows while a step has yet to run
	export OCTET_EMU_LATE
	engine_options='backend = cuda
fast_accumulation = yes
max_batch = 16
max_batch_tokens = 16' config </dev/null
	ok "start with products to choose from" start
	"$builddir/octet" complete --ignore-eos --max-tokens 200 "She go" >/dev/null 2>&1 &
	one=$!
	wait_for 10 sh -c "'$builddir/octetctl' --json status | jq -e '.requests.running > 0'"
	is "16 rows" "$(octet bench --clients 16 --requests 16 --prompt-tokens 4 --output-tokens 3 --json | jq -c '[.failed, .tokens]')" "[0,48]"
	kill $one
	stop
	unset OCTET_EMU_LATE
	set -- "$scratch"/state/cublaslt-*
	is "a line for each product" "$(wc -l <"$1")" 10
	has "of a file for fast accumulation" "$1" "cublaslt-[0-9]*-fast-emulation"
	sed 's/ [0-9a-f]* \([0-9a-f]*\)\( 0 0 0 0 0 0\)$/ 0 \1\2/' "$1" >"$scratch/lines" # algorithms that the library does not know
	cp "$scratch/lines" "$1"
	ok "start with a file that is wrong" start
	octetctl use fp8 >/dev/null
	has "status tells of fast accumulation" "$(octetctl --json status | jq -r '.groups[] | select(.name == "mlp.up_proj") | .kernels[0] | tostring')" "fast accumulation"
	octetctl use bf16 >/dev/null
	stop
	is "it was timed again" "$(cmp -s "$1" "$scratch/lines" && echo same)$(wc -l <"$1")" 10
	unset OCTET_EMU_FAULT
	rm -rf "$scratch/state"
fi
OCTET_PLUGIN=$plugin
rm -rf "$scratch/state"
engine_options='backend = cuda
evidence_steps = 1' config </dev/null
start
evidence gpu
is "evidence of every site" "$(jq '[.[] | length > 0 and all(. != null)] | all' "$scratch/gpu.evidence")" true
is "it is the CPU's" "$(jq -n --slurpfile a "$scratch/cpu.evidence" --slurpfile b "$scratch/gpu.evidence" \
	'[$a, $b | flatten] | transpose | map(.[0] - .[1] | fabs) as $off | [transpose[0], $off] | transpose | map(.[1] <= 0.003 + 0.01 * .[0]) | all')" true
is "none of these steps was a graph's" "$(octetctl --json status | jq .device.graph_launches)" 0
stop
for residency in both sites nested; do
	rm -rf "$scratch/state"
	rm -f "$scratch"/gpu.*
	options="residency = $residency"
	[ $residency != sites ] || options="nested_sites = attention.k_proj mlp.up_proj@0-1 lm_head"
	engine_options="backend = cuda
evidence_steps = 3
$options" config <<END
$policies
END
	ok "$residency: start" start
	is "$residency: the backend" "$(octetctl --json status | jq -r .backend)" cuda
	answers gpu $residency
	for plan in $plans; do
		is "$residency: greedy tokens under $plan are the CPU's" "$(cat "$scratch/gpu.$plan")" "$(cat "$scratch/cpu.$plan")"
	done
	is "$residency: so are drawn ones" "$(cat "$scratch/gpu.drawn")" "$(cat "$scratch/cpu.drawn")"
	case $residency in
	nested) break ;;
	sites)
		is "sites: told before loading" "$(sed -n 's/.*device.weights group=\([^ ]*\) takes="\(.*\)" both="\(.*\)" nested="\(.*\)"/\1|\2|\3|\4/p' "$scratch/log" | tail -8 |
			awk -F'|' '{ print $1, ($2 == $4) + 2 * ($2 == $3) }' | tr '\n' ' ')" "attention.q_proj 2 attention.k_proj 1 attention.v_proj 2 attention.o_proj 2 mlp.gate_proj 2 mlp.up_proj 0 mlp.down_proj 2 lm_head 1 "
		has "sites: as their kernels say" "$(octetctl --json status | jq -r '.groups[] | select(.name == "mlp.up_proj") | .kernels | tostring')" "nested.*plain|plain.*nested"
		stop
		continue
		;;
	esac
	ppl=$(jq .text.perplexity.baseline "$scratch/cpu.eval") got=$(jq .text.perplexity.baseline "$scratch/gpu.eval")
	ok "perplexity: $got, the CPU's $ppl" near "$got" "$ppl" "$ppl * 0.005"
	ppl=$(jq .text.kl.mean "$scratch/cpu.eval") got=$(jq .text.kl.mean "$scratch/gpu.eval")
	ok "KL of fp8: $got, the CPU's $ppl" near "$got" "$ppl" "$ppl * 0.1"
	octet complete --json --ignore-eos --max-tokens "${beside-50}" "She go to school every day and" | tail -1 | jq -c .tokens >"$scratch/alone"
	octet complete --json --ignore-eos --max-tokens "${beside-50}" "She go to school every day and" >"$scratch/beside" &
	beside_one=$!
	got=$(octetctl eval --candidate fp8 --text "$scratch/text" --json | jq .text.kl.mean)
	wait $beside_one
	ok "KL beside a request: $got" near "$got" "$ppl" "$ppl * 0.1"
	is "which has the tokens that it has alone" "$(tail -1 "$scratch/beside" | jq -c .tokens)" "$(cat "$scratch/alone")"
	drawn() { octet complete --temperature 1.5 --seed 3 --ignore-eos --max-tokens "${long-12}" "It work"; }
	is "a seed repeats itself" "$(drawn)" "$(drawn)"
	octet bench --clients 4 --requests 6 --prompt-tokens 8 --output-tokens 4 --json >"$scratch/bench" &
	bench=$!
	for i in 1 2; do
		octetctl set '*=fp8' kv_cache=fp8 >/dev/null
		octetctl set '*=bf16' kv_cache=bf16 >/dev/null
	done
	wait $bench
	is "flips under load fail no request" "$(jq -c '[.failed, .tokens]' "$scratch/bench")" "[0,24]"
	is "graphs were captured" "$(octetctl --json status | jq '.device.graphs > 0 and .device.graph_launches > 0')" true
	# Requests of several kinds and three plans (two are what a pass takes there), that come while others run: each has the
	# tokens that it has alone. One of them goes away.
	several() {
		"$builddir/octet" complete --ignore-eos --max-tokens 400 "She go to" >/dev/null 2>&1 &
		gone=$!
		wait_for 10 sh -c "'$builddir/octetctl' --json status | jq -e '.requests.running > 0'"
		for i in 1 2 3 4 5; do
			set -- --ignore-eos
			case $i in 1 | 5) set -- --ignore-eos --policy $([ $i = 1 ] && echo fp8t || echo kv8) ;; 2) set -- --repetition-penalty 1.3 --presence-penalty 0.5 ;; 3) set -- --temperature 0.9 --seed 5 --frequency-penalty 0.3 ;; 4) set -- --stop e ;; esac
			octet complete --json --max-tokens $((3 + i)) "$@" "$(head -c $((6 * i)) "$scratch/text")" | tail -1 | jq -c .tokens >"$scratch/$when.$i" &
			[ $when = together ] && [ $i -lt 5 ] || wait $!
			[ $i -ne 2 ] || kill -TERM $gone
		done
		wait $gone
		wait_for 20 sh -c "'$builddir/octetctl' --json status | jq -e '.requests.running == 0'"
		cat "$scratch/$when".*
	}
	when=alone
	several >"$scratch/alone"
	when=together
	several >"$scratch/together"
	is "side by side, and one that goes away: the same tokens" "$(cat "$scratch/together")" "$(cat "$scratch/alone")"
	before=$(octetctl --json status | jq .device.graphs)
	after=$before
	for i in 1 2 3 4 5; do # a card is quick: the two may not meet
		[ "$after" = "$before" ] || break
		octet complete --policy fp8 --ignore-eos --max-tokens "${long-16}" "She go" >"$scratch/other" &
		other=$!
		octet complete --ignore-eos --max-tokens "${long-16}" "She go" >/dev/null
		wait $other
		after=$(octetctl --json status | jq .device.graphs)
	done
	ok "rows of two plans get a graph" [ "$after" -gt "$before" ]
	is "and the same tokens" "$(cat "$scratch/other")" "$(octet complete --policy fp8 --ignore-eos --max-tokens "${long-16}" "She go")"
	is "each site names its kernel" "$(octetctl --json status | jq '[.groups[] | .kernels | length > 0] | all')" true
	stop
done
ok "it stops" stop
# Half a minute of emulation: nine architectures, each against its golden, in both residencies.
if [ -n "${OCTET_LONG-}" ] && [ -x "$builddir/tests/test_golden" ]; then
	ok "goldens" env OCTET_TEST_PLUGIN="$plugin" "$builddir/tests/test_golden"
	ok "goldens, nested" env OCTET_TEST_NESTED=1 OCTET_TEST_PLUGIN="$plugin" "$builddir/tests/test_golden"
fi
finish
