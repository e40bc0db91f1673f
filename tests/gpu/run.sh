#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The CUDA backend on a card.
#
#   tests/gpu/run.sh pack             where octet is built: programs and libraries to carry, in build-gpu/carry (below 64 MiB)
#   tests/gpu/run.sh [STAGE...]       on a machine with the card: check bench serve fast torch, then the tables
#
#   check  what the card does (measure), every kernel against ref, a few under compute-sanitizer, octetd against the CPU:
#          proof, and stories260k if it was there to be packed
#   bench  octetd --bench on random weights in the shape of Llama-3.1-8B, made here: 17 GB in $OCTET_GPU_TMP
#   serve  50 tokens in, 50 out, a 1B shape, as many clients as help; 1,000 flips under 32 clients
#   fast   fast accumulation off and on: KL of FP8 linears and of FP8 KV, a 1B shape, steps of more than 64 rows
#   torch  PyTorch on the same card, the same shapes
#
# Each stage takes less than ten minutes, fails alone, and leaves a file in build-gpu/out (small: take it along to the next
# machine if stages run on several); of whichever there are tests/gpu/results/DATE.md is made (and copied to $OUT, if set) and
# two tables, printed last: what octet does, and what its choices rest on. It needs no package of a distribution and builds
# nothing: Python 3 and CUDA's libraries, the rest is packed. With OCTET_GPU_DRY=1 the plugin of tests/gpu/emu takes the card's
# place and a tiny model the large ones', and the file is build-gpu/out/dry.md: that shows whether this script works, and
# nothing else.
set -u
cd "$(dirname "$0")/../.." || exit 1
top=$PWD
build=${OCTET_GPU_BUILD:-$top/build-gpu}
carry=$top/build-gpu/carry
out=$top/build-gpu/out
tmp=${OCTET_GPU_TMP:-/tmp/octet-gpu}
dry=${OCTET_GPU_DRY-}
stories=$carry/stories260k

die() {
	echo "run.sh: $*" >&2
	exit 1
}

# ---- pack ----

# Copies programs with what they link, libc too: the other machine's may be older.
pack() {
	mkdir -p "$build" "$carry/real" "$carry/lib" "$carry/tests/gpu"
	[ -x configure ] || autoreconf -i || die "autoreconf"
	[ -f "$build/Makefile" ] || (cd "$build" && "$top/configure" --with-cuda="${CUDA_HOME:-yes}" >configure.log 2>&1) || die "see $build/configure.log"
	make -C "$build" -j"$(nproc)" all tests/gpu/octet-cuda-emu.so tests/gpu/checkcuda gpu-programs >"$build/make.log" 2>&1 || die "see $build/make.log"
	for p in octetd octet octetctl octet-console tests/gpu/checkcuda tests/gpu/checkcuda-card tests/gpu/measure; do
		real=$build/$p
		[ -x "$build/.libs/$p" ] && real=$build/.libs/$p
		install -s "$real" "$carry/real/$(basename "$p")" || die "$p"
	done
	install -s "$build/octet-cuda.so" "$carry/octet-cuda.so"
	cp "$build/tests/gpu/octet-cuda-emu.so" "$carry/"
	jq=$(command -v jq) && cp "$jq" "$carry/real/"
	for f in "$carry"/real/* "$carry/octet-cuda.so" "$carry/octet-cuda-emu.so"; do
		LD_LIBRARY_PATH=$build/.libs ldd "$f"
	done | awk '/=> \// { print $3 } /^\t\// { print $1 }' | sort -u | grep -v 'libcublas\|libcuda\.\|libnvidia' | while read -r lib; do
		cp -L "$lib" "$carry/lib/"
	done
	from=${OCTET_STORIES:-$top/../shared/models/stories260k}
	if [ -d "$from" ]; then
		mkdir -p "$stories" && cp -L "$from"/*.json "$from"/*.safetensors "$stories/" || die "$from"
	fi
	mib=$(($(du -sk "$carry" | cut -f1) / 1024 + 1))
	[ $mib -lt 64 ] || die "$carry has $mib MiB, 64 is what may be carried"
	echo "packed: $mib MiB in $carry"
}

# ---- on the machine ----

# cuBLASLt is too large to carry: the toolkit's, or the one that came with PyTorch.
cuda_libraries() {
	for d in "${CUDA_HOME:-/usr/local/cuda}/lib64" /usr/local/cuda*/lib64 /usr/local/cuda*/targets/*/lib \
	    "$(python3 -c 'import nvidia.cublas, os; print(os.path.join(list(nvidia.cublas.__path__)[0], "lib"))' 2>/dev/null)" \
	    "$(python3 -c 'import nvidia, os; print(os.path.join(list(nvidia.__path__)[0], "cu13", "lib"))' 2>/dev/null)"; do
		if [ -e "$d/libcublasLt.so.13" ]; then
			echo "$d"
			return
		fi
	done
}

# Wrappers that run what was packed, by the packed loader where the machine's libc is too old.
unpack() {
	[ -x "$carry/real/octetd" ] || die "nothing is packed: run 'tests/gpu/run.sh pack' where octet builds, and carry build-gpu/carry"
	cuda=$(cuda_libraries)
	[ -n "$cuda" ] || [ -n "$dry" ] || die "no libcublasLt.so.13 on this machine: set CUDA_HOME"
	libs=$carry/lib${cuda:+:$cuda}
	loader=
	LD_LIBRARY_PATH=$libs "$carry/real/octetd" --version >/dev/null 2>&1 || loader="$carry/lib/ld-linux-x86-64.so.2"
	for p in "$carry"/real/*; do
		name=$(basename "$p")
		if [ -n "$loader" ]; then
			set -- "$loader" --library-path "$libs:/usr/lib/x86_64-linux-gnu:/usr/local/nvidia/lib64:/usr/lib64" "$p"
			printf '#!/bin/sh\nexec %s %s %s %s "$@"\n' "$@" >"$carry/$name"
		else
			printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$libs" "$p" >"$carry/$name"
		fi
		chmod +x "$carry/$name"
	done
	plugin=$carry/octet-cuda.so
	[ -z "$dry" ] || plugin=$carry/octet-cuda-emu.so
	PATH=$carry:$PATH
	export PATH
}

# within SECONDS COMMAND...: the emulation is given ten times as long.
within() {
	seconds=$1
	shift
	[ -z "$dry" ] || seconds=$((seconds * 10))
	timeout "$seconds" "$@"
}

card() {
	nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu --format=csv,noheader 2>/dev/null ||
		echo "no nvidia-smi"
}

model() {
	shape=$1
	[ -z "$dry" ] || shape=tiny
	[ -f "$tmp/$shape/done" ] || { python3 tests/gpu/synth.py "$shape" "$tmp/$shape" && touch "$tmp/$shape/done"; } || die "cannot make a model in $tmp"
	echo "$tmp/$shape"
}

# against_cpu NAME SECONDS: tokens, log-probabilities and KL of both backends.
against_cpu() {
	(cd "$carry" && within "$2" env srcdir="$top" OCTET_TEST_PLUGIN="$plugin" "$top/tests/e2e-cuda.sh") >"$out/e2e.$1" 2>&1
	echo "$1: exit $?, $(grep -c '^ok' "$out/e2e.$1") ok, $(grep -c '^not ok' "$out/e2e.$1") not ok"
	grep '^not ok' -A3 "$out/e2e.$1" | head -30
	grep "the CPU's" "$out/e2e.$1" | grep 'KL\|perplexity'
}

stage_check() {
	{
		echo "## The card"
		card
		echo "## What to know of it first: reading, unpacking, graphs, own kernels, attention, products of cuBLASLt"
		[ -n "$dry" ] || timeout 90 measure || echo "FAILED: measure"
		echo "## Kernels against ref"
		if [ -z "$dry" ]; then
			for seed in 1 2 3; do
				timeout 40 checkcuda-card $seed >"$out/kernels.$seed" 2>&1
				echo "seed $seed: exit $?, $(grep -c '^ok' "$out/kernels.$seed") ok, $(grep -c '^not ok' "$out/kernels.$seed") not ok"
				grep '^not ok\|^Bail' "$out/kernels.$seed" | head -20
			done
			sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
			for tool in memcheck racecheck synccheck; do
				[ -n "$sanitizer" ] || { echo "no compute-sanitizer"; break; }
				OCTET_CHECK_SHORT=1 LD_LIBRARY_PATH=$libs timeout 40 "$sanitizer" --tool $tool --error-exitcode 9 "$carry/real/checkcuda-card" 4 \
					>"$out/$tool" 2>&1
				echo "compute-sanitizer $tool: exit $?, $(grep 'SUMMARY' "$out/$tool" | tail -1)"
			done
		else
			within 40 env OCTET_CHECK_SHORT=1 checkcuda 1 >"$out/kernels.1" 2>&1
			echo "emulated: exit $?, $(grep -c '^ok' "$out/kernels.1") ok, $(grep -c '^not ok' "$out/kernels.1") not ok"
		fi
		echo "## octetd against the CPU"
		if [ -z "$dry" ]; then
			export plans="bf16 fp8 fp8t fp8b kv8 mixed" tokens=40 text_bytes=3000 long=400
		fi
		against_cpu proof 150
		if [ -d "$stories" ]; then
			export model="$stories"
			against_cpu stories260k 80
		fi
	} >"$out/check.txt" 2>&1
}

stage_bench() {
	rm -f "$out/bench.txt"
	dir=$(model 8b) || exit 1
	{
		echo "## octetd --bench, the shape of Llama-3.1-8B, context 1024"
		card
		only='' limit=360
		[ -z "$dry" ] || only='decode 1'
		for fast in 0 1; do
			echo "fast accumulation $fast"
			[ $fast = 0 ] || set -- --fast-accumulation
			within $limit env OCTET_PLUGIN="$plugin" octetd --bench "$dir" --backend cuda --context 1024 --only "$only" "$@" 2>&1 ||
				echo "FAILED: $?"
			[ -z "$dry" ] || break
			only='fp8 prefill' limit=120
		done
		card
	} >"$out/bench.txt" 2>&1
}

# serving POLICY [LINE]: a daemon on the model of the stage; a line of [engine].
serving() {
	scratch=$(mktemp -d)
	OCTET_SOCKET=$scratch/s OCTET_CONTROL_SOCKET=$scratch/c
	export OCTET_SOCKET OCTET_CONTROL_SOCKET
	cat >"$scratch/ini" <<-END
	[daemon]
	socket = $OCTET_SOCKET
	control_socket = $OCTET_CONTROL_SOCKET
	state_dir = $scratch/state
	max_clients = 512
	max_clients_per_uid = 512
	max_requests_per_uid = 4096
	[model]
	path = $dir
	[engine]
	backend = cuda
	kv_cache_bytes = $kv
	max_batch = 256
	max_batch_tokens = 1024
	${2-}
	[precision]
	policy = $1
	[policy linears]
	* = fp8
	[policy all]
	* = fp8
	kv_cache = fp8
	END
	OCTET_PLUGIN=$plugin octetd --config "$scratch/ini" >"$scratch/log" 2>&1 &
	daemon=$!
	tries=0
	until octet tokenize x >/dev/null 2>&1 || [ $tries -gt 600 ]; do tries=$((tries + 1)); sleep 0.2; done
}

stop_serving() {
	octetctl --json status 2>/dev/null | jq -c '[.step_ms, .device]'
	kill -TERM $daemon 2>/dev/null
	wait $daemon
	tail -2 "$scratch/log"
	rm -rf "$scratch"
}

# What a flip costs those who wait, and whether many leave anything behind.
flips() {
	serving bf16
	some() { within 90 octet bench --clients "$flip_clients" --requests $((flip_clients * $1)) --prompt-tokens 50 --output-tokens 50 --json; }
	told() { printf '%s' "$2" | jq -r --arg w "$1" '"flips \($w): failed \(.failed), ms between tokens p50 \(.inter_token_ms.p50) p99 \(.inter_token_ms.p99)"'; }
	memory() { octetctl --json status | jq .device.memory_used; }
	some 1 >/dev/null
	for p in '*=fp8' '*=bf16'; do octetctl set "$p" >/dev/null; some 1 >/dev/null; done # both plans' graphs
	told none "$(some $each)"
	before=$(memory)
	some $((each * 4)) >"$scratch/under" &
	load=$!
	i=0
	while [ $i -lt $n_flips ]; do
		octetctl set '*=fp8' >/dev/null && octetctl set '*=bf16' >/dev/null || { echo "FAILED: a flip"; break; }
		i=$((i + 2))
	done
	wait $load
	told "$i" "$(cat "$scratch/under")"
	echo "flips $i: device memory $before before, $(memory) after"
	stop_serving
}

# What a load took, between two states of the daemon: the host's time for a step beside waiting, the card's share of all time.
used() { octetctl --json status | jq -c '[now, .device.busy_s, .host_s, .step]'; }
share() {
	jq -rn --argjson a "$1" --argjson b "$2" '"host_us \(($b[2] - $a[2]) / ([$b[3] - $a[3], 1] | max) * 1e6 | round) busy \(($b[1] - $a[1]) / ($b[0] - $a[0]) * 100 | round)%"'
}

# One daemon a policy; clients grow while it helps.
stage_serve() {
	rm -f "$out/serve.txt"
	dir=$(model 1b) || exit 1
	clients_list='1 8 32 128 256' each=6 kv=16G flip_clients=32 n_flips=1000
	[ -z "$dry" ] || clients_list='1 2' each=1 kv=64M flip_clients=2 n_flips=4
	{
		echo "## 50 tokens in, 50 out, a 1B shape: requests/s"
		card
		for policy in bf16 linears all; do
			serving $policy
			for clients in $clients_list; do
				before=$(used)
				r=$(within 30 octet bench --clients "$clients" --requests $((clients * each)) --prompt-tokens 50 --output-tokens 50 --json 2>&1)
				echo "serve $policy $clients $(printf '%s' "$r" | jq -er '"\(.requests_per_s) failed \(.failed)"' 2>/dev/null || echo "FAILED: ${r:-no time}") $(share "$before" "$(used)")"
			done
			stop_serving
		done
		echo "## Flips of all linears under load"
		flips
	} >"$out/serve.txt" 2>&1
}

# KL between plans of random weights says nothing of a model, but which sum is nearer: both differ from bf16 by their rounding, and one
# by its sum too.
stage_fast() {
	rm -f "$out/fast.txt"
	dir=$(model 1b) || exit 1
	kv=8G
	[ -z "$dry" ] || kv=64M
	{
		echo "## KL of eval, fast accumulation off and on, a 1B shape"
		card
		head -c "$([ -n "$dry" ] && echo 200 || echo 6000)" models/proof/eval/prose.txt >"$tmp/text"
		for fast in no yes; do
			serving bf16 "fast_accumulation = $fast"
			for candidate in linears all; do
				r=$(within 100 octetctl eval --candidate $candidate --text "$tmp/text" --json 2>&1)
				echo "kl $fast $candidate $(printf '%s' "$r" | jq -er '.text | "\(.kl.mean) top1 \(.top1) tokens \(.tokens)"' 2>/dev/null || echo "FAILED: ${r:-no time}")"
			done
			octetctl use linears >/dev/null
			octetctl --json status | jq -r '.groups[] | select(.name == "mlp.up_proj") | "runs \(.kernels[0])"'
			stop_serving
		done
	} >"$out/fast.txt" 2>&1
}

stage_torch() {
	{
		echo "## PyTorch, linears and attention of the same shape, context 1024"
		timeout 540 python3 tests/gpu/torch_compare.py
	} >"$out/torch.txt" 2>&1
}

versions() {
	octetd --version
	nvidia-smi 2>/dev/null | sed -n 's/.*\(Driver Version[^|]*[^ |]\).*/\1/p'
	grep -h '^cuBLASLt\|^device ' "$out/check.txt" "$out/bench.txt" 2>/dev/null | sort -u
	python3 -c 'import torch; print("PyTorch", torch.__version__)' 2>/dev/null
}

# Decode steps of octet beside PyTorch's, formats beside each other; what went wrong; requests/s.
table() {
	[ -z "$dry" ] || printf '**A dry run**: emulated kernels on a CPU, a tiny model. No number below is of a card.\n\n'
	echo '| decode, context 1k | octet bf16 ms | octet fp8 ms | ratio | torch bf16 ms | torch fp8 ms |'
	echo '|---|---|---|---|---|---|'
	for n in 1 8 32 128; do
		step() { sed '/^fast accumulation 1/,$d' "$out/bench.txt" 2>/dev/null | awk -v f="$1" -v n=$n '$1 == f && $2 == "decode" && $3 == n { print $5; exit }'; }
		other() { awk -v f="$1" -v n=$n '$1 == "torch" && $2 == f && $4 == n { print $5; exit }' "$out/torch.txt" 2>/dev/null; }
		b=$(step bf16) f=$(step fp8)
		echo "| $n | $b | $f | $(awk -v b="${b:-0}" -v f="${f:-0}" 'BEGIN { if (f > 0) printf "%.2f", b / f }') | $(other bf16) | $(other fp8) |"
	done
	echo
	echo '| 50 in, 50 out, clients | bf16 requests/s | linears fp8, KV bf16 | linears and KV fp8 |'
	echo '|---|---|---|---|'
	for n in 1 2 8 32 128 256; do
		of() { awk -v p="$1" -v n=$n '$1 == "serve" && $2 == p && $3 == n && $5 == "failed" { printf "%.1f%s", $4, $6 != 0 ? " (" $6 " failed)" : ""; exit }' "$out/serve.txt" 2>/dev/null; }
		[ -z "$(of bf16)$(of linears)$(of all)" ] || echo "| $n | $(of bf16) | $(of linears) | $(of all) |"
	done
	echo
	awk '$1 == "serve" && $7 == "host_us" { print $2 ", " $3 " clients: host " $8 " us a step, card busy " $10 }' "$out/serve.txt" 2>/dev/null
	echo
	grep -h '^flips' "$out/serve.txt" 2>/dev/null
	choices
	for s in check bench serve fast torch; do
		[ -f "$out/$s.txt" ] || { echo "$s: did not run"; continue; }
		grep -h '^not ok\|FAILED\|exit [1-9]' "$out/$s.txt" | sed "s/^/$s: /" | head -20
	done
}

# What the choices rest on: medians of ratios over shapes, the best number of splits, the rest as it was printed.
choices() {
	[ -f "$out/check.txt" ] || [ -f "$out/fast.txt" ] || return
	echo
	echo '| choice | measured |'
	echo '|---|---|'
	cat "$out/check.txt" "$out/fast.txt" 2>/dev/null | awk '
	function median(list, n,   v, i, j, t) {
		split(list, v, " ")
		for (i = 2; i <= n; i++)
			for (j = i; j > 1 && v[j - 1] + 0 > v[j] + 0; j--) {
				t = v[j]
				v[j] = v[j - 1]
				v[j - 1] = t
			}
		return n ? v[int((n + 1) / 2)] : 0
	}
	function rows(t) { return t <= 64 ? "to 64 rows" : "more rows" }
	$1 == "lt" && $16 == "first" {
		at = $2 " " $5 " " $7 " " $9
		gain[rows($9)] = gain[rows($9)] " " $17 / $20
		n_gain[rows($9)]++
		if ($3 == "plain")
			plain[at] = $20
		else if (plain[at] > 0) {
			which = $2 ", " rows($9)
			ratio[which] = ratio[which] " " plain[at] / $20
			n_ratio[which]++
		}
	}
	$1 == "lt" && $15 == 0 { refused[$2 " " $3]++ }
	$1 == "off" { sub(/^off /, ""); off[++n_off] = $0 }
	$1 == "graph" { sub(/^graph /, ""); graph[++n_graph] = $0 }
	$1 == "unpack" { sub(/^unpack /, ""); unpack[++n_unpack] = $0 }
	$1 == "attend" {
		at = $3 " batch " $6
		if (!(at in seen))
			order[++n_order] = at
		seen[at] = 1
		if (!(($2, at) in best) || $9 + 0 < best[$2, at]) {
			best[$2, at] = $9 + 0
			splits[$2, at] = $8
		}
	}
	$1 == "kl" { kl[++n_kl] = "FP8 " ($3 == "all" ? "linears and KV" : "linears") ", fast accumulation " $2 ": " $4 ", the same first choice " $6 }
	END {
		for (i = 1; i <= split("scalar outer outer16", mode, " "); i++)
			for (j = 1; j <= 2; j++) {
				which = mode[i] ", " (j == 1 ? "to 64 rows" : "more rows")
				if (n_ratio[which])
					printf "| fast accumulation, speed: %s | x%.2f |\n", which, median(ratio[which], n_ratio[which])
			}
		for (i = 1; i <= n_off; i++)
			print "| sums off FP64 by | " off[i] " |"
		for (i = 1; i <= n_kl; i++)
			print "| KL against bf16 | " kl[i] " |"
		for (i = 1; i <= n_graph; i++)
			print "| graph | " graph[i] " |"
		for (i = 1; i <= n_unpack; i++)
			print "| unpacking E4M3 | " unpack[i] " |"
		for (i = 1; i <= n_order; i++) {
			at = order[i]
			split(at, head, /[\/ ]/)
			printf "| KV, GQA %d, %s | bf16 %.1f us (%d splits), fp8 %.1f us (%d): x%.2f |\n", head[1] / head[2], substr(at, index(at, "batch")), best["bf16", at],
			    splits["bf16", at], best["fp8", at], splits["fp8", at], (best["fp8", at] ? best["bf16", at] / best["fp8", at] : 0)
		}
		for (j = 1; j <= 2; j++) {
			which = j == 1 ? "to 64 rows" : "more rows"
			if (n_gain[which])
				printf "| timing eight algorithms, %s | the best is x%.2f of the first |\n", which, median(gain[which], n_gain[which])
		}
		for (which in refused)
			printf "| cuBLASLt refuses, %s | %d shapes |\n", which, refused[which]
	}'
	echo
}

results() {
	file=$top/tests/gpu/results/$(date -u +%Y-%m-%d).md
	[ -z "$dry" ] || file=$out/dry.md
	{
		echo "# $(date -u +%Y-%m-%d), ${dry:+dry run, }$(card)"
		echo
		echo "\`tests/gpu/run.sh $*\`"
		echo '```'
		versions
		echo '```'
		table
		for s in check bench serve fast torch; do
			[ -f "$out/$s.txt" ] || continue
			echo '```'
			cat "$out/$s.txt"
			echo '```'
		done
	} >"$file"
	[ -z "${OUT-}" ] || cp "$file" "$out"/*.txt "$OUT/"
	printf 'written: %s\n\n' "${file#"$top"/}"
	table
}

if [ "${1-}" = pack ]; then
	pack
	exit
fi
for s in "$@"; do
	case $s in check | bench | serve | fast | torch | table) ;; *) sed -n '5,/^set -u/s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
done
mkdir -p "$out" "$tmp"
unpack
[ $# -gt 0 ] || set -- check bench serve fast torch
for s in "$@"; do
	[ "$s" = table ] || ("stage_$s") || echo "FAILED: $s ended before its time" >>"$out/$s.txt"
done
results "$@"
