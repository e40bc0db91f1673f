#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The manual, the sample and --help against the programs; the example of
# liboctet(3), compiled and run.
. "${srcdir:-.}/tests/lib.sh"
man=$srcdir/man
# Manual pages escape the hyphen.
plain() { sed 's/\\-/-/g' "$@"; }

for section_key in $("$builddir/octetd" --help-options | sed -n 's/^\[\(.*\)\] \([^ ]*\) =.*/\1.\2/p'); do
	key=${section_key#*.}
	ok "octet.ini(5) has $section_key" grep -q "^\.B $key\$" "$man/octet.ini.5"
	ok "the sample has $section_key" grep -Eq "^#?$key = ?" "$srcdir/conf/octet.ini"
done
for option in $("$builddir/octetd" --help | grep -oE -- '--[a-z-]+' | sort -u); do
	ok "octetd(8) has $option" eval "plain $man/octetd.8 | grep -qe '$option'"
done
for word in $("$builddir/octet" --help | sed -n 's/^  \([a-z]\{1,\}\) .*/\1/p') \
    $("$builddir/octet" --help | grep -oE -- '--[a-z-]+' | sort -u); do
	ok "octet(1) has $word" eval "plain $man/octet.1 | grep -qe '$word'"
done
for word in $("$builddir/octetctl" --help | sed -n 's/^  \([a-z]\{1,\}\) .*/\1/p') \
    $("$builddir/octetctl" --help | grep -oE -- '--[a-z-]+' | sort -u); do
	ok "octetctl(1) has $word" eval "plain $man/octetctl.1 | grep -qe '$word'"
done
for option in $("$builddir/octet-console" --help | grep -oE -- '--[a-z-]+' | sort -u); do
	ok "octet-console(1) has $option" eval "plain $man/octet-console.1 | grep -qe '$option'"
done
for name in $(grep -oE '\boctet_[a-z_]+\(' "$srcdir/client/octet.h" | sort -u); do
	ok "liboctet(3) has $name)" grep -qF "$name" "$man/liboctet.3"
done

# Everything that is commented out is a default: taking all of it changes nothing.
sed -E '/^#\[policy/,$ s/^#([^ ])/\1/; s/^#([a-z_]+ = .)/\1/; s|^path = .*|path = '"$srcdir"'/models/proof|; s/^user:[a-z]+/uid:1000/; /^(state_dir|socket|control_socket|policies_file) =/d' \
    "$srcdir/conf/octet.ini" >"$scratch/sample.ini"
ok "the sample is a good file" "$builddir/octetd" --config "$scratch/sample.ini" --check
if command -v groff >/dev/null; then
	for page in "$man"/*; do
		is "$(basename "$page") formats without warnings" "$(groff -man -ww -z "$page" 2>&1)" ""
	done
fi

sed -n '/^\.\\" example.c/,/^\.\\" end/p' "$man/liboctet.3" | sed '/^\./d; s/\\-/-/g; s/\\e/\\/g' >"$scratch/example.c"
mkdir "$scratch/include" && cp "$srcdir/client/octet.h" "$scratch/include"
ok "the example compiles without warnings" ${CC:-cc} -std=c99 -D_DEFAULT_SOURCE -Wall -Wextra -Werror ${SANITIZE-} -I"$scratch/include" \
    -o "$scratch/example" "$scratch/example.c" "$builddir/.libs/liboctet.so" -Wl,-rpath,"$builddir/.libs"
config </dev/null
ok "start" start
is "the example runs" "$("$scratch/example" 2>&1)" "$(octet complete 'I has a apple.')"
ok "stop" stop
finish
