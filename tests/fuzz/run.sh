#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# tests/fuzz/run.sh SECONDS [TARGET...]: builds the targets with clang's libFuzzer,
# AddressSanitizer and UndefinedBehaviorSanitizer and runs each for so long, two at
# a time, from the committed corpus. New inputs and crashes stay in build-fuzz/.
set -eu
cd "$(dirname "$0")/../.."
seconds=${1:?usage: tests/fuzz/run.sh SECONDS [TARGET...]}
shift
[ $# -gt 0 ] || set -- selector ini journal safetensors config tokenizer blob wire console
out=build-fuzz
mkdir -p $out
sources="client/tok*.c conf/conf.c daemon/engine/*.c kernels/*.c kernels/ref/*.c kernels/x86/*.c daemon/journal.c daemon/listen.c daemon/log.c
 client/ctl.c client/octetctl.c client/ctl-eval.c $(ls tui/*.c | grep -vE '/(main|screen|remote)\.c')"
flags="-g -O1 -std=gnu11 -D_GNU_SOURCE -DOCTET_VERSION=\"fuzz\" -DOCTET_SYSCONFDIR=\"/etc\" -DOCTET_PLUGINDIR=\"/usr/lib/octet\" -I. -ffp-contract=off -pthread
 -fsanitize=address,undefined -fno-sanitize-recover=undefined $(pkg-config --cflags inih jansson libpcre2-8 libutf8proc libuv libxxhash)"
for c in $sources; do
	o=$out/$(echo "$c" | tr / _).o
	[ "$o" -nt "$c" ] || clang $flags -fsanitize=fuzzer-no-link -c -o "$o" "$c"
done
for t in "$@"; do
	clang $flags -fsanitize=fuzzer -o $out/$t tests/fuzz/$t.c $out/*.o $(pkg-config --libs inih jansson libpcre2-8 libutf8proc libuv libxxhash) -lmd -lm
done
status=0
one() {
	mkdir -p $out/new-$1
	if $out/$1 -max_total_time="$seconds" -max_len=16384 -timeout=20 -rss_limit_mb=2048 -artifact_prefix=$out/$1- \
	    -print_final_stats=1 -verbosity=0 $out/new-$1 tests/fuzz/corpus/$1 >$out/$1.log 2>&1; then
		echo "$1: $(sed -n 's/^stat::number_of_executed_units: *//p' $out/$1.log) executions, no finding"
	else
		echo "$1: FINDING, see $out/$1.log"
		touch $out/failed
	fi
}
rm -f $out/failed
while [ $# -gt 0 ]; do
	one "$1" &
	shift
	[ $# -gt 0 ] && { one "$1" & shift; }
	wait
done
[ ! -e $out/failed ]
