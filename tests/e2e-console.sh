#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The console in a real terminal (tmux): what it shows, what keys do, how it ends.
. "${srcdir:-.}/tests/lib.sh"
export LC_ALL=C.UTF-8
tm() { tmux -f /dev/null -S "$scratch/tmux" "$@"; }
screen() { tm capture-pane -p -t t; }
keys() { tm send-keys -t t "$@"; }
shows() { wait_for 20 sh -c "tmux -S $scratch/tmux capture-pane -p -t t | grep -qE -- \"$1\""; }
gone() { wait_for 20 sh -c "! tmux -S $scratch/tmux capture-pane -p -t t | grep -qE -- \"$1\""; }
resize() { tm resize-window -t t -x "$1" -y "$2"; }
trap 'tm kill-server 2>/dev/null; cleanup' EXIT
history_has() { octetctl --json history | jq -e "$1" >/dev/null; }

has "no terminal" "$("$builddir/octet-console" </dev/null 2>&1)" "no terminal; use --batch"
has "no daemon" "$("$builddir/octet-console" --batch 2>&1)" "cannot connect to .*octet-control.sock"
config </dev/null
ok "start" start
batch=$("$builddir/octet-console" --batch)
has "--batch has the grid" "$batch" '^ +0  bf16  bf16  bf16  bf16  bf16  bf16  bf16  bf16  bf16$'
is "--batch -n 2 prints two" "$("$builddir/octet-console" --batch -n 2 | grep -c '^policy bf16')" 2
has "unknown option" "$("$builddir/octet-console" --nonsense 2>&1)" "usage:"

tm new-session -d -s t -x 80 -y 24 "sh"
keys "PS1='shell> '; clear" Enter
ok "a shell" shows '^shell>$'
keys 'stty -a >'"$scratch"'/before; '"$builddir"'/octet-console; echo left with $?' Enter
ok "the grid" shows '^ +5  bf16  bf16'
has "names of groups" "$(screen)" '^layer  q +k +v +o +gate +up +down +head +kv'
has "the model and the policy" "$(screen)" '^policy bf16  epoch 1 '
has "what the keys do" "$(screen)" 'space:fp8.*\?:help.*q:quit'

keys Down Right Space
ok "a cell: asked first" shows 'flip 1 site .y/n.. attention.k_proj@1 bf16->fp8'
is "nothing changed yet" "$(epoch)" 1
keys n
ok "no" shows 'nothing was changed'
keys Space
shows 'y/n'
keys y
ok "yes" shows '^ +1  bf16  fp8   bf16'
has "the message has the epoch" "$(screen)" 'epoch 2: attention.k_proj@1 bf16->fp8'
ok "the journal names the console" history_has 'last | .program == "octet-console" and .result == "applied"'
keys r Space
shows 'y/n'
keys y
ok "a row" shows '^ +1  fp8w  fp8w  fp8w  fp8w  fp8w  fp8w  fp8w '
keys c Down Down Space
shows 'y/n'
keys y
ok "a column" shows '^ +4  bf16  fp8   bf16'
keys e End Right Right Right Right Right Right Right Space
shows 'kv_cache@5 bf16->fp8'
keys y
ok "the KV cache" shows '^ +5  bf16 .* fp8$'
keys Space
ok "it has two formats only" shows 'kv_cache@5 fp8->bf16'
keys n
keys u
shows 'roll back 1 site .y/n.. kv_cache@5'
keys y
ok "rollback" shows '^ +5  bf16 .* bf16$'
keys u
shows 'y/n'
keys y
ok "rolled back further" shows '^ +4  bf16  bf16  bf16'

octetctl set 'mlp.gate_proj=fp8' >/dev/null
ok "somebody else's flip appears" shows '^ +3  bf16  bf16  bf16  bf16  fp8 '
keys g Space
shows 'y/n'
octetctl set 'mlp.up_proj=fp8' >/dev/null
keys y
ok "a flip that would surprise is refused" shows 'somebody changed the plan in between'
keys '?'
ok "help" shows 'roll back the last change'
keys '?'
gone 'roll back the last change'

resize 120 40
ok "larger" shows '^ +5  bf16  bf16'
resize 20 5
ok "too small" shows 'too small: 20x5'
resize 200 60
ok "and back" shows '^ +5  bf16  bf16'
resize 80 24
shows '^ +5  bf16  bf16'

stop
ok "the daemon is gone" shows 'DISCONNECTED'
ok "start again" start
ok "connected again" gone 'DISCONNECTED'
shows '^policy .* epoch'

keys C-z
ok "suspended" shows '^left with 1'
keys fg Enter
ok "resumed" shows '^ +5  bf16  bf16'
keys q
ok "back in the shell" gone '^layer'
keys 'stty -a >'"$scratch"'/after' Enter
wait_for 20 test -s "$scratch/after"
ok "the terminal is as before" cmp "$scratch/before" "$scratch/after"
for sig in TERM HUP INT; do
	keys 'clear; '"$builddir"'/octet-console; echo left by '$sig Enter
	shows '^ +5  bf16  bf16'
	pkill -$sig -P "$(tm list-panes -t t -F '#{pane_pid}')" octet-console
	ok "SIG$sig" shows "^left by $sig"
	keys 'stty -a >'"$scratch/after.$sig" Enter
	wait_for 20 test -s "$scratch/after.$sig"
	ok "leaves the terminal clean" cmp "$scratch/before" "$scratch/after.$sig"
done
for term in vt100 dumb nosuchterm; do
	keys 'clear; TERM='$term' '"$builddir"'/octet-console; echo left' Enter
	case $term in
	vt100) ok "without colours" shows '^ +5  bf16  bf16'; keys q ;;
	*) ok "TERM=$term" shows 'octet-console: .*(terminal|TERM)' ;;
	esac
	shows '^left'
done
ok "stop" stop
finish
