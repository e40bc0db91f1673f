#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# octet proofread: what changes, and that nothing else does.
. "${srcdir:-.}/tests/lib.sh"

config </dev/null
ok "the daemon starts" start
proofread() { octet proofread "$@" 2>"$scratch/err"; }

printf '%s' 'I has seen teh results.' >"$scratch/one"
is "a sentence" "$(proofread "$scratch/one")" "$(octet complete 'I has seen teh results.')"
has "the summary" "$(cat "$scratch/err")" '^1 sentences: 1 corrected \(2 words\), 0 dropped, 0 too long; '
is "from standard input" "$(proofread - <"$scratch/one")" "$(proofread "$scratch/one")"
is "differences without colour" "$(proofread --diff --color never "$scratch/one")" \
    'I [-has-]{+have+} seen [-teh-]{+the+} results.'
is "differences in colour" "$(proofread --diff --color always "$scratch/one" | tr '\033' '~')" \
    'I ~[31;9mhas~[0m~[32mhave~[0m seen ~[31;9mteh~[0m~[32mthe~[0m results.'
is "no terminal, no colour" "$(proofread --diff "$scratch/one")" "$(proofread --diff --color never "$scratch/one")"
is "JSON" "$(proofread --json "$scratch/one" | jq -c '[.text,.sentences,.corrected,.words,.dropped]')" \
    '["I have seen the results.",1,1,2,0]'

# All that is no sentence, byte for byte.
printf '# Teh heading\n\n> quoted teh line\n\n    indented teh code\n\n```\nfenced teh code.\n```\n| teh | table |\n<b>teh</b>\n---\n\t\n  \n12345 67.\n\377\376 teh.\n' >"$scratch/keep"
ok "headings, quotes, code, tables, markup, rubbish stay" sh -c "$builddir/octet proofread $scratch/keep 2>/dev/null | cmp - $scratch/keep"
printf 'I has  seen\nteh   results.  \r\n\r\n- I has a apple.\n2. I has a apple.\n' >"$scratch/space"
is "line breaks, list marks and what stands between sentences stay, wide gaps in them go" "$(proofread "$scratch/space" | od -c)" \
    "$(printf 'I have seen\nthe results.  \r\n\r\n- I have an apple.\n2. I have an apple.\n' | od -c)"
printf 'I has seen `teh_code` at https://teh.example/teh and a@teh.example.' >"$scratch/code"
has "code, addresses and paths stay" "$(proofread "$scratch/code")" '`teh_code` at https://teh.example/teh and a@teh.example.'
printf 'The list is e.g. from Mr. Smith. It has 3.5 pages. Yes! No?' >"$scratch/abbr"
proofread "$scratch/abbr" >/dev/null
has "abbreviations and numbers end no sentence" "$(cat "$scratch/err")" '^4 sentences'
is "nothing in, nothing out" "$(proofread /dev/null | wc -c)" 0
is "no sentence may change" "$(proofread --max-change 0 "$scratch/one")" 'I has seen teh results.'
has "and it is counted" "$(cat "$scratch/err")" '0 corrected \(0 words\), 1 dropped'
head -c 100000 /dev/zero | tr '\0' 'x' >"$scratch/huge"
ok "a line of 100,000 letters stays" sh -c "$builddir/octet proofread $scratch/huge 2>/dev/null | cmp - $scratch/huge"
i=0
while [ $((i += 1)) -le 200 ]; do echo "This is line number $i of a text."; done >"$scratch/many"
is "many at once come in order" "$(proofread --lines "$scratch/many" | grep -oE '[0-9]+' | tr '\n' ' ')" "$(seq 200 | tr '\n' ' ')"
is "the same in any company" "$(for i in 7 8; do proofread "$scratch/one"; done)" "$(proofread "$scratch/one"; proofread "$scratch/one")"
out=$(octet proofread "$scratch/nowhere" 2>&1)
is "a file that is not there" "$? $out" "1 octet: $scratch/nowhere: No such file or directory"
out=$(octet proofread --color blue 2>&1 </dev/null)
is "a bad option" "$?" 2
has "names itself" "$out" "not 'blue'"

i=0
while [ $((i += 1)) -le 40 ]; do cat "$scratch/many"; done >"$scratch/long"
octet proofread "$scratch/long" >"$scratch/part" 2>"$scratch/err" &
client=$!
wait_for 20 test -s "$scratch/part"
kill -9 "$daemon"; wait "$daemon" 2>/dev/null
daemon=
wait "$client"
is "the daemon dies in the middle" "$?" 1
has "it says so" "$(cat "$scratch/err")" '^octet: .*(daemon|octetd)'
finish
