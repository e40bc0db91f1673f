#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The manual, the sample and --help against the programs; the example of
# liboctet(3), compiled and run.
. "${srcdir:-.}/tests/lib.sh"
man=$srcdir/man
# Manual pages escape the hyphen.
plain() { sed 's/\\-/-/g' "$@"; }

# Each option as the table has it: "KEY|DEFAULT|BOUNDS|CHOICES|live".
"$builddir/octetd" --help-options | awk '
	/^\[/ { key = $2; fallback = $0; sub(/^[^=]*= /, "", fallback); bounds = choices = ""
		if (match(fallback, / ?\([^()]*\)$/)) {
			choices = substr(fallback, RSTART); gsub(/[ ()]*[()]/, "", choices); fallback = substr(fallback, 1, RSTART - 1) }
		if (match(choices, /[0-9]+ to [0-9]+$/)) { bounds = substr(choices, RSTART); choices = "" }
		if (choices !~ /,/) choices = ""
		sub(/^\(see .*/, "", fallback); next }
	{ gsub(/,/, "", choices); print key "|" fallback "|" bounds "|" choices "|" (/; needs a restart$/ ? "restart" : "live") }
' >"$scratch/options"
# The paragraph of an option, up to the closing parenthesis; the comment of an option in the sample.
paragraph() { sed -n "/^\.B $1\$/,/^(.*)\$/p" "$man/octet.ini.5"; }
comment() { awk -v key="$1" '/^# /{ c = c " " substr($0, 3); next } $0 ~ "^#?" key " =" { print c; print } { c = "" }' "$srcdir/conf/octet.ini"; }
wrong=
while IFS='|' read -r key fallback bounds choices when; do
	page=$(paragraph "$key" | grep '^(.*)$') sample=$(comment "$key")
	case $page in *"; $when)"*) ;; *) wrong="$wrong page:$key:$when" ;; esac
	case $page in *"$bounds"*) ;; *) wrong="$wrong page:$key:$bounds" ;; esac
	case $page in *"default: ${fallback:-}"*) ;; *) wrong="$wrong page:$key:default" ;; esac
	case $sample in *"$bounds"*) ;; *) wrong="$wrong sample:$key:$bounds" ;; esac
	case $sample in *"$key = $fallback"*) ;; *) wrong="$wrong sample:$key:default" ;; esac
	case $when,$sample in restart,*restart\)*) ;; restart,* | *restart\)*) wrong="$wrong sample:$key:$when" ;; esac
	for choice in $choices; do
		case $page in *"$choice"*) ;; *) wrong="$wrong page:$key:$choice" ;; esac
		case $sample in *"$choice"*) ;; *) wrong="$wrong sample:$key:$choice" ;; esac
	done
	ok "octet.ini(5) has $key" test -n "$page"
	ok "the sample has $key" test -n "$sample"
done <"$scratch/options"
ok "the table was read" test "$(wc -l <"$scratch/options")" -gt 20
is "bounds, choices, defaults, live or restart are those of the table" "$wrong" ""

for option in $("$builddir/octetd" --help | grep -oE -- '--[a-z-]+|\[-[a-z]' | tr -d '[' | sort -u); do
	ok "octetd(8) has $option" eval "plain $man/octetd.8 | grep -qe '$option'"
done
for word in $("$builddir/octet" --help | sed -n 's/^  \([a-z]\{1,\}\) .*/\1/p') \
    $("$builddir/octet" --help | grep -oE -- '--[a-z-]+|\[-[a-z]' | tr -d '[' | sort -u); do
	case $word in -*) at= ;; *) at='^\.SS ' ;; esac
	ok "octet(1) has $word" eval "plain $man/octet.1 | grep -Eqe '$at$word( |\$)'"
done
for word in $("$builddir/octetctl" --help | sed -n 's/^  \([a-z]\{1,\}\) .*/\1/p') \
    $("$builddir/octetctl" --help | grep -oE -- '--[a-z-]+|\[-[a-z]' | tr -d '[' | sort -u); do
	case $word in -*) at= ;; *) at='^\.(B|BI|BR) ' ;; esac
	ok "octetctl(1) has $word" eval "plain $man/octetctl.1 | grep -Eqe '$at$word( |\$|])'"
done
for option in $("$builddir/octet-console" --help | grep -oE -- '--[a-z-]+|\[-[a-z]' | tr -d '[' | sort -u); do
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
