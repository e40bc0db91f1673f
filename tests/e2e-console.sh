#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The console over a made-up daemon's two minutes (tests/console-replay.c): every
# view at three sizes, every key, themes, resizing, terminals that cannot.
. "${srcdir:-.}/tests/lib.sh"
. "$srcdir/tests/console-lib.sh"
replay=$scratch/replay
"$builddir/tests/console-replay" "$replay" || exit 1
views="precision traffic clients quality history log"

# ---- without a terminal ----
has "no terminal" "$("$console" </dev/null 2>&1)" "no terminal; use --batch"
has "no daemon" "$("$console" --batch 2>&1)" "cannot connect to .*octet-control.sock"
has "unknown option" "$("$console" --nonsense 2>&1)" "usage:"
has "unknown view" "$("$console" --view nosuch 2>&1)" "views are precision"
has "unknown theme" "$("$console" --theme pink 2>&1)" "themes are auto"
has "no count" "$("$console" --batch -n 0 2>&1)" "no count"
is "--batch -n 3 prints three" "$("$console" --batch -n 3 --replay "$replay" | grep -c '^policy ')" 3
has "a replay's last snapshot" "$("$console" --batch --replay "$replay")" '^octet 0\.1\.0 .*12:01:59 UTC$'
is "--batch in the C locale is ASCII" "$(LC_ALL=C "$console" --batch --replay "$replay" --view traffic | LC_ALL=C grep -c '[^ -~]')" 0
widest=$("$console" --batch --width 64 --ascii --replay "$replay" | awk '{ if (length($0) > n) n = length($0) } END { print n }')
ok "--width bounds the lines" test "$widest" -le 64
"$builddir/tests/console-replay" "$scratch/small" 6

# ---- files that are no replays ----
printf 'hello' >"$scratch/bad"
has "no replay file" "$("$console" --batch --replay "$scratch/bad" 2>&1)" 'is no file of octet-console --record'
has "no such file" "$("$console" --batch --replay "$scratch/nosuch" 2>&1)" 'No such file'
head -c 24 "$replay" >"$scratch/bad"
has "no snapshot" "$("$console" --batch --replay "$scratch/bad" 2>&1)" 'has no snapshot'
head -c 110000 "$replay" >"$scratch/bad"
has "a file that is cut off ends before the cut" "$("$console" --batch --replay "$scratch/bad" 2>&1)" '^policy '
{ head -c 24 "$replay"; printf '\377\377\377\377'; } >"$scratch/bad"
has "an impossible frame" "$("$console" --batch --replay "$scratch/bad" 2>&1)" 'frame 0 has 4294967295 bytes'
{ head -c 24 "$replay"; printf '\011\0\0\0\377\377\377\0\001\0\0\0x'; } >"$scratch/bad"
has "a run outside the page" "$("$console" --batch --replay "$scratch/bad" 2>&1)" 'frame 0 has a run outside the page'
{ head -c 8 "$replay"; printf '\001\0\0\0\003\0\0\0'; tail -c +17 "$replay"; } >"$scratch/bad"
has "another version's" "$("$console" --batch --replay "$scratch/bad" 2>&1)" 'recorded by another version'

# ---- recording a replay gives it back ----
"$console" --batch -n 1000 --replay "$replay" >"$scratch/all"
is "all snapshots play" "$(grep -c '^policy ' "$scratch/all")" 240

# ---- every view at three sizes ----
terminal 80 24
run "$console --replay $replay --speed 0"
n=0
for view in $views; do
	n=$((n + 1))
	keys $n
	for size in 80x24 120x40 200x60; do
		resize "${size%x*}" "${size#*x}"
		golden "$view-$size"
	done
done
resize 80 24

# ---- every key: press TABLE NAME-OF-KEY KEY PATTERN ----
press() {
	printf '%s\t%s\n' "$1" "$2" >>"$scratch/pressed"
	keys "$3"
	ok "$1: $2" shows "$4"
}
# The same, where what it does is seen elsewhere in the test.
pressed() { printf '%s\t%s\n' "$1" "$2" >>"$scratch/pressed"; }
at() { printf '^── %s ─' "$1"; } # the cursor's site

press all "1 to 9, F1 to F9" F2 '\[2 Traffic\]'
press all "tab" Tab '\[3 Clients\]'
press all "shift tab" BTab '\[2 Traffic\]'
press traffic z z '2 s a column'
press traffic Z Z '1 s a column'
keys F1
until_shows '\[1 Precision\]'
press precision "down, j" j "$(at attention.q_proj@2)"
press precision "up, k" k "$(at attention.q_proj@0)"
press precision "right, l" l "$(at attention.k_proj@0)"
press precision "left, h" h "$(at attention.q_proj@0)"
press precision '$' '$' "$(at kv_cache@0)"
press precision "0, ^" 0 "$(at attention.q_proj@0)"
press precision "end, G" G "$(at attention.q_proj@64)"
press precision "home, g" g "$(at attention.q_proj@0)"
press precision f f 'Formats   ~'
press precision "page down" NPage "$(at attention.q_proj@1[0-9])"
press precision "page up" PPage "$(at attention.q_proj@0)"
press precision x x 'layer, 7 sites: attention.\*@0 mlp.\*@0$'
press precision c c 'group, 80 sites: attention.q_proj$'
press precision m m 'module, 320 sites: attention.\*$'
press precision a a 'all, 561 sites: \*$'
press precision "e, esc" e 'cell, 1 site: attention.q_proj@0$'
press precision v v 'block, 1 site'
keys j j l
ok "a block" shows 'block, 6 sites: attention.q_proj@0-2 attention.k_proj@0-2$'
press precision s s '^select:'
keys 'mlp.down_proj@8-10,-1' Enter
ok "a selector" shows 'selector, 4 sites: mlp.down_proj@8-10,79$'
keys s 'nosuch*' Enter
ok "a selector that selects nothing" shows 'nosuch\* selects no site'
keys e g 0
press precision d d 'KL of a site in fp8   share of = layer'
press precision D D 'Formats   ~'
keys f
ok "folded again" shows 'equal layers folded'
press precision "space, enter" Space 'a replay changes nothing'
press all u u 'a replay changes nothing'
press all U U 'a replay changes nothing'
press all K K 'a replay changes nothing'
press all r r '\[5 History\]'
keys 4
press quality enter Enter 'a replay has no daemon'
keys 5
until_shows '\[5 History\]'
press history "enter, r" Enter 'epoch 8 is active|a replay changes nothing'
press lists "down, j" j '── Epoch 7 ─'
press lists "up, k" k '── Epoch 8 ─'
press lists "end, G" G '── Epoch 1 ─'
press lists "home, g" g '── Epoch 8 ─'
press lists "page down" NPage '── Epoch 1 ─'
press lists "page up" PPage '── Epoch 8 ─'
press all '!' '!' 'no command was run yet'
press all / / '^/'
keys guardrail Enter
ok "search" shows '── Epoch 5 ─'
keys / nosuch Enter
ok "search that finds nothing" shows "nothing here has 'nosuch'"
keys / octetctl Enter
until_shows '── Epoch 4 ─'
press all n n '── Epoch 2 ─'
press all N N '── Epoch 4 ─'
keys 3
press clients o o 'sorted by tokens$'
keys 6
until_shows 'info  session.open'
press log w w '12:01:59.* error'
ok "only warnings" gone ' info '
keys w
press all p p '\[PAUSED\]'
keys p
until_gone 'PAUSED'
press all '>' '>' '\[PAUSED\]'
keys p
press all '+' + 'refreshed every 100 ms'
press all - - 'refreshed every 250 ms'
press all t t 'theme dark'
keys t t t t
until_shows 'theme auto'
press all M M "the mouse is the terminal's"
keys M
press all '^L' C-l '\[6 Log\]'
press all '?' '?' 'Keys: up and down'
press help "page down" NPage '  K  +keep'
press help "page up" PPage "Log: octetd's last lines"
press help "down, j" j ' w  '
press help "up, k" k "Log: octetd's last lines"
press help "q, esc, ?" q '\[6 Log\]'
until_gone 'Keys: up and down'
press all : : '^:'
press line tab Tab 'status plan set use'
keys 'vi'
press line tab Tab '^:view$'
keys 'prx'
press line backspace BSpace '^:view pr *$'
press line tab Tab '^:view precision$'
press line "home, ^A" Home '^:view precision'
press line right Right '^:view precision'
press line left Left '^:view precision'
press line "delete, ^D" DC '^:iew precision'
press line "end, ^E" End '^:iew precision'
press line "^W" C-w '^:iew *$'
press line "^U" C-u '^:$'
keys 'theme ' Tab
ok "completion of the console's own words" shows '^auto dark light 16 mono'
keys C-u
keys 'view traffic'
press line enter Enter '\[2 Traffic\]'
keys :
press line up Up '^:view traffic'
press line down Down '^:$'
press line esc Escape 'quit$'
keys : 'set mlp.up_proj=fp8' Enter
ok "a command that changes" shows 'a replay changes nothing'
keys : 'nosuch' Enter
ok "no such command" shows "there is no command 'nosuch'"
keys : 'view "a b' Enter
ok "an open quote" shows 'a quote is not closed'
keys : 'select mlp.*@3' Enter
ok ":select" shows 'selector, 3 sites: mlp.\*@3$'
keys : 'theme mono' Enter : 'rate 100' Enter 1
until_shows '\[1 Precision\]'
for name in "y" "n, esc" "space, right" "left" "c"; do pressed question "$name"; done                             # e2e-console-live.sh
for name in "up, k" "down, j" "page up" "page down" "home, g" "end, G" "q, esc, enter" "^C"; do pressed output "$name"; done # and these
pressed all '^Z'
press all "q, F10" q '^left with 0'
"$console" --keys | cut -f1,2 | sort -u >"$scratch/keys"
sort -u "$scratch/pressed" >"$scratch/done"
is "every key was pressed" "$(comm -3 "$scratch/keys" "$scratch/done")" ""

# ---- the manual page has these keys, and its pictures are true ----
awk '/^\.SH/ { on = /KEYS/ } on && /^\.\\" keys / { table = $3 } on && /^\.TP/ { getline; name = $0; sub(/^\.B "?/, "", name); sub(/"$/, "", name)
	getline; print table "\t" name "\t" $0 }' "$srcdir/man/octet-console.1" | sed 's/\\-/-/g; s/\\(ha/^/g; s/\\(aq/'"'"'/g; s/\\&//g' >"$scratch/man-keys"
is "the manual page lists them" "$("$console" --keys | diff "$scratch/man-keys" -)" ""
for view in $views; do
	sed -n "/^\.\\\\\" picture $view\$/,/^\.\\\\\" end/p" "$srcdir/man/octet-console.1" | sed '/^\./d; s/^\\&//; s/\\-/-/g; s/\\(ha/^/g; s/\\(ti/~/g; s/\\(aq/'"'"'/g; s/\\e/\\/g' >"$scratch/picture"
	is "the manual page's picture of $view" "$("$console" --batch --ascii --width 76 --view "$view" --replay "$scratch/small" | diff "$scratch/picture" -)" ""
done
"$console" --batch --ascii --width 76 --replay "$scratch/small" | sed 's/^/    /' >"$scratch/picture"
is "README's picture" "$(sed -n '/^    octet [0-9]/,/^$/p' "$srcdir/README.md" | sed '/^$/d' | diff - "$scratch/picture")" ""

# ---- mouse ----
terminal 80 24
run "$console --replay $replay --speed 0"
until_shows '\[1 Precision\]'
# What the terminal says (SGR): pressed at row and column from 1, let go there or elsewhere; the wheel.
drag() { keys -l "$(printf '\033[<0;%d;%dM\033[<0;%d;%dm' "$2" "$1" "$4" "$3")"; }
wheel() { keys -l "$(printf '\033[<%d;%d;%dM' "$1" 20 10)"; }
click() { drag "$1" "$2" "$1" "$2"; }
if tm show -gv mouse >/dev/null 2>&1 && [ "$(tm display -p -t t '#{mouse_any_flag}')" = 1 ]; then
	x10() { printf '\033[M%b%b%b' "\\0$(printf %o $((32 + $1)))" "\\0$(printf %o $((32 + $3)))" "\\0$(printf %o $((32 + $2)))"; }
	case $(tm display -p -t t '#{mouse_sgr_flag}') in
	1) ;;
	*)
		drag() { keys -l "$(x10 0 "$1" "$2")$(x10 3 "$3" "$4")"; }
		wheel() { keys -l "$(x10 "$1" 10 20)"; }
		;;
	esac
	click 8 26
	ok "a click on a site" shows "$(at attention.v_proj@8)"
	click 5 30
	ok "a click on a group's head" shows 'group, 80 sites: attention.o_proj$'
	click 7 5
	ok "a click on a layer" shows 'layer, 42 sites: '
	drag 6 12 7 20
	ok "a block, pressed on one site and let go on another" shows 'block, 16 sites: attention.q_proj@0-7 attention.k_proj@0-7$'
	wheel 65
	ok "the wheel down" shows "$(at attention.k_proj@8)"
	wheel 64
	ok "and up" shows "$(at attention.k_proj@2)"
	click 3 20
	ok "a click on a tab" shows '\[2 Traffic\]'
else
	skip "a click on a site" "this tmux takes no mouse"
	skip "heads, blocks, the wheel, tabs" "this tmux takes no mouse"
fi
keys q
until_shows '^left with 0'

# ---- resizing while it draws ----
run "$console --replay $replay --speed 50 --rate 50"
until_shows '\[REPLAY\]'
for size in 200x60 81x25 120x40 64x14 63x14 20x5 100x30 132x50 80x24 30x10 160x20 79x24 80x24; do
	resize "${size%x*}" "${size#*x}"
done
golden precision-80x24
resize 20 5
ok "too small" shows '^too small: 20x5'
resize 80 24
golden precision-80x24
keys q
until_shows '^left with 0'
resize 20 5
run "$console --replay $replay --speed 0"
ok "started in a terminal that is too small" shows '^too small: 20x5'
resize 80 24
golden precision-80x24
keys q
until_shows '^left with 0'

# ---- without colour, without UTF-8 ----
run "$console --replay $replay --speed 0 --theme mono"
golden precision-80x24
ok "mono sets no colour" test -z "$(tm capture-pane -e -p -t t | head -20 | grep -E "$(printf '\033')\[[0-9;]*(3[0-7]|38;5)" || true)"
keys q
until_shows '^left with 0'
run "TERM=screen-256color $console --replay $replay --speed 0 --theme dark"
golden precision-80x24
if TERM=screen-256color tput colors 2>/dev/null | grep -q 256; then
	ok "dark has 256 colours" eval 'tm capture-pane -e -p -t t | grep -q "38;5;114"'
	for theme in dark:black light:white; do
		keys : "theme ${theme%:*}" Enter
		until_shows "^theme ${theme%:*}"
		for view in 1 2 3 4 5 6; do
			keys $view
			until_shows "\[$view "
			ok "$view is readable in ${theme%:*}" readable "${theme#*:}"
		done
		keys 1 a # all of it selected, then its KL
		until_shows 'all, 561 sites'
		ok "what is selected is readable in ${theme%:*}" readable "${theme#*:}"
		keys d
		until_shows 'KL of a site'
		ok "and its KL" readable "${theme#*:}"
		keys D e
		until_shows 'cell, '
	done
	keys : 'theme 16' Enter
	until_shows '^theme 16'
	ok "16 colours are 16" eval '! tm capture-pane -e -p -t t | grep -q "8;5;[0-9][0-9]"'
	ok "and there are some" eval 'tm capture-pane -e -p -t t | grep -q "\[[0-9;]*36m"'
	keys p p
	golden precision-80x24
fi
keys q
until_shows '^left with 0'
run "COLORFGBG='0;15' TERM=screen $console --replay $replay --speed 0"
golden precision-80x24
ok "8 colours on white: no yellow, no cyan" eval '! tm capture-pane -e -p -t t | grep -q "\[[0-9;]*3[36]m"'
keys q
until_shows '^left with 0'
run "NO_COLOR=1 $console --replay $replay --speed 0"
golden precision-80x24
keys q
until_shows '^left with 0'
run "LC_ALL=C $console --replay $replay --speed 0"
golden precision-ascii
keys 2
golden traffic-ascii
keys 4
golden quality-ascii
keys q
until_shows '^left with 0'

# ---- terminals that cannot ----
for term in vt100 dumb nosuchterm; do
	run "TERM=$term $console --replay $replay --speed 0"
	case $term in
	vt100) golden precision-80x24; keys q ;;
	*) ok "TERM=$term" shows 'octet-console: .*(terminal|TERM)' ;;
	esac
	until_shows '^left with'
done

# ---- it leaves the terminal as it was ----
keys "clear; stty -a >$scratch/before" Enter
wait_for 30 test -s "$scratch/before"
for sig in TERM HUP INT QUIT; do
	run "$console --replay $replay --speed 0"
	until_shows '\[1 Precision\]'
	kill -$sig "$(console_pid)"
	ok "SIG$sig" shows "^left with 0"
	keys "stty -a >$scratch/after.$sig" Enter
	wait_for 30 test -s "$scratch/after.$sig"
	ok "leaves the terminal clean" cmp "$scratch/before" "$scratch/after.$sig"
done
# A fault, with what a signal handler may do.
if [ -n "${SANITIZE-}" ]; then
	skip "SIGSEGV" "the sanitizer takes it"
else
	run "$console --replay $replay --speed 0"
	until_shows '\[1 Precision\]'
	kill -SEGV "$(console_pid)"
	ok "SIGSEGV" shows '^left with 139'
	keys "stty -a >$scratch/after.SEGV" Enter
	wait_for 30 test -s "$scratch/after.SEGV"
	ok "leaves the terminal clean" cmp "$scratch/before" "$scratch/after.SEGV"
	is "the cursor, the screen, the mouse too" "$(tm display -p -t t '#{cursor_flag} #{alternate_on} #{mouse_any_flag}')" "1 0 0"
fi
# ---- what is pasted is no command ----
run "$console --replay $replay --speed 0"
until_shows '\[1 Precision\]'
tm set-buffer 'why not:
quit
q'
tm paste-buffer -p -t t
ok "a paste does nothing" shows 'what is pasted is taken after : only'
keys :
tm set-buffer 'view
traffic'
tm paste-buffer -p -t t
ok "but into a line" shows '^:view traffic'
keys Enter
until_shows '\[2 Traffic\]'
keys q
until_shows '^left with 0'
# ---- stopped behind its back, and continued ----
if command -v bash >/dev/null; then
	keys "exec bash --norc" Enter "PS1='shell> '; clear" Enter
	until_shows '^shell> *$'
	run "$console --replay $replay --speed 0"
	until_shows '\[1 Precision\]'
	kill -STOP "$(console_pid)"
	wait_for 30 eval 'ps -o stat= -p "$(console_pid)" | grep -q T'
	keys fg Enter
	golden precision-80x24
	keys q
	ok "it still has its keys" gone '\[1 Precision\]'
	keys "exec sh" Enter # bash would take what is typed ahead with it
	until_shows '^[^ ]*[#$] *$'
	keys "PS1='shell> '; clear" Enter
	until_shows '^shell> *$'
fi
run "$console --replay $replay --speed 0"
until_shows '\[1 Precision\]'
keys C-z
ok "suspended" shows '^left with 1'
keys "fg" Enter
ok "resumed" shows '\[1 Precision\]'
keys j
ok "and takes keys" shows "$(at attention.q_proj@2)"
keys q
until_gone '\[1 Precision\]'
keys "clear; stty -a >$scratch/after" Enter
wait_for 30 test -s "$scratch/after"
ok "the terminal is as before" cmp "$scratch/before" "$scratch/after"
# ---- its window is closed ----
run "exec $console --replay $replay --speed 0"
until_shows '\[1 Precision\]'
pid=$(tm display -p -t t '#{pane_pid}')
tm kill-window -t t
ok "it does not outlive its terminal" wait_for 30 eval "! kill -0 $pid"
finish
