#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The console and a real daemon: flips by keys alone, under load too; undo, return,
# commands; viewers; the daemon killed and restarted.
. "${srcdir:-.}/tests/lib.sh"
. "$srcdir/tests/console-lib.sh"
history_has() { octetctl --json history | jq -e "$1" >/dev/null; }
wait_epoch() { wait_for 30 eval "[ \$(epoch) = $1 ]"; }
load=
trap 'tm kill-server 2>/dev/null; [ -z "$load" ] || kill $load 2>/dev/null; cleanup' EXIT
config </dev/null
ok "start" start
terminal 80 24
run "$console"
ok "the grid" shows '^ +5 bf16   bf16   bf16   bf16   bf16   bf16   bf16          bf16$'
has "model, policy, names of groups" "$(screen)" '^octet .* proof  cpu/'
has "its heads" "$(screen)" '^  layer q_proj k_proj v_proj o_proj gate   up     down   head   kv$'
has "what the keys do" "$(screen)" '^space flip .*\? help  q quit$'
has "--batch has the same grid" "$("$console" --batch)" '^ +5 bf16 +bf16 +bf16'
is "--batch -n 2 prints two" "$("$console" --batch -n 2 | grep -c '^policy bf16')" 2

# ---- asked once, done, undone with one key ----
keys Down Right Space
ok "a cell: asked first" shows 'Flip 1 site\?'
has "the site" "$(screen)" 'sites +attention.k_proj@1 '
has "the formats" "$(screen)" 'format +bf16 -> fp8 '
has "what a token will read" "$(screen)" 'reads +.* MiB of weights a token, now .* MiB \(-0\.[0-9] %\)'
has "no KL is known" "$(screen)" 'KL not known'
is "nothing changed yet" "$(epoch)" 1
keys n
ok "no" shows 'nothing was changed'
keys Space
until_shows 'bf16 -> fp8 '
keys Space
ok "another format" shows 'bf16 -> fp8w'
keys Left
ok "and the one before" shows 'bf16 -> fp8 '
keys c
ok "on probation" shows '30 s, then taken back'
keys c c c
until_shows 'until it is changed'
keys Escape
until_gone 'Flip 1 site'
is "still nothing" "$(epoch)" 1
keys Space
until_shows 'Flip 1 site'
keys y
ok "yes" shows '^> +1 bf16   fp8    bf16'
has "the message has the epoch" "$(screen)" 'epoch 2 \(u undoes it\): attention.k_proj@1 bf16->fp8'
ok "the journal names the operator" history_has 'last | .program == "octet-console" and .result == "applied" and .uid == '"$(id -u)"
keys u
ok "undone with one key" shows '^> +1 bf16   bf16   bf16'
has "and said" "$(screen)" 'epoch 3, undone \(U does it again\)'
keys U
ok "done again" shows '^> +1 bf16   fp8    bf16'
is "three changes" "$(epoch)" 4

# ---- wider selections ----
keys x Space
until_shows 'Flip 7 sites'
keys y
ok "a layer" shows '^> +1 fp8w   fp8w   fp8w   fp8w   fp8w   fp8w   fp8w'
keys e End '$' Space
ok "the KV cache" shows 'bytes of KV|of KV a position, now'
keys y
ok "flipped" shows '^> +5 .* fp8$'
keys a Space
ok "all linear sites" shows 'sites +\* '
keys n e Home 0
until_shows '^> +0'

# ---- what others do ----
octetctl set 'mlp.gate_proj=fp8' >/dev/null
ok "somebody else's flip appears" shows '^ +3 bf16   bf16   bf16   bf16   fp8 '
keys u
ok "somebody else's change is asked about" shows 'Roll back the last change: 6 sites\?'
keys n
keys Space
until_shows 'Flip 1 site'
octetctl set 'mlp.up_proj=fp8' >/dev/null
ok "and in between it says so" shows 'came meanwhile: this will be refused'
keys y
ok "a flip that would surprise is refused" shows 'somebody changed the plan in between'

# ---- return to an epoch ----
before=$(epoch)
keys r
until_shows '\[5 History\]'
keys / 'start' Enter
ok "search an epoch" shows '── Epoch 1 ─'
keys Enter
ok "return to it: asked first" shows 'Return to epoch 1: '
is "not done yet" "$(epoch)" "$before"
keys y
ok "returned" shows '^policy bf16  '
is "by one change" "$(epoch)" $((before + 1))

# ---- commands ----
keys 1 : 'set attention.*@0-2=fp8' Enter
ok ":set" shows '^ +2 fp8    fp8    fp8    fp8    bf16'
keys u
ok "a command is undone with one key" shows '^ +2 bf16   bf16   bf16   bf16   bf16'
keys : 'set nosuch=fp8' Enter
ok "what a command says when it fails" shows 'octetctl: .*nosuch'
keys q
until_gone 'nosuch=fp8'
keys : 'help' Enter
ok "no such verb" shows "there is no command 'help'"
resize 80 16 # it has more lines than that leaves
keys : 'status' Enter
ok ":status; its end" shows 'kv_cache +bf16'
keys g
ok "output: home" shows 'octetd .*, pid '
keys j
ok "output: a line down" gone 'octetd .*, pid '
keys k
ok "output: a line up" shows 'octetd .*, pid '
keys NPage
ok "output: page down" gone 'octetd .*, pid '
keys PPage
ok "output: page up" shows 'octetd .*, pid '
keys G
ok "output: end" shows 'kv_cache +bf16'
keys q
ok "output: closed" gone '^. kv_cache +bf16'
resize 80 24
keys : 'drain --timeout 1' Enter
ok "drained" shows '\[DRAINING\]'
wait_for 30 eval '[ "$(octetctl --json status | jq .draining)" = true ]'
keys Escape : 'resume' Enter
ok "and resumed" gone '\[DRAINING\]'
keys Escape : 'set --confirm 60 lm_head=fp8' Enter
ok "what waits for its confirmation" shows '\[UNCONFIRMED [0-9]+ s\]'
keys K
ok "K keeps it" shows 'epoch [0-9]+ stays'
is "nothing waits" "$(octetctl --json status | jq .unconfirmed)" null
octetctl use bf16 >/dev/null
until_shows '^policy bf16  '

# ---- the other views ----
keys 6
ok "the log" shows 'info  flip epoch=[0-9]+ verb=set .*octet'
octet complete --json --max-tokens 4 secretsecret >/dev/null
is "no prompt is in it" "$("$console" --batch --view log --width 240 | grep -c secretsecret)" 0
keys 4
ok "evals: none yet" shows 'none; :eval'
keys : "eval --candidate fp8 --text $srcdir/models/proof/README.md" Enter
until_shows 'eval --candidate'
keys Escape
ok "an eval beside the screen" shows ' bf16 -> fp8 '
ok "it is said when it is done" shows '^done \(! shows it\): :eval'
keys !
ok "what it said" shows 'plans +bf16 +-> +fp8'
keys Enter
head -c 600 "$srcdir/models/proof/README.md" >"$scratch/text"
keys 1 d
"$builddir/octetctl" sweep --by layer --text "$scratch/text" >/dev/null 2>&1 &
sweep=$!
ok "of a layer that was flipped as a whole, each site has a share" wait_for 120 seen '^> +0 .=[0-9.]+[um]? +.=[0-9.]+'
ok "and it is said what was measured" shows "its layer's 7 sites in fp8: KL [0-9.]+; decode step "
kill $sweep; wait $sweep
"$builddir/octetctl" sweep --text "$scratch/text" >/dev/null 2>&1 &
sweep=$!
ok "a smaller whole says more" wait_for 120 seen '^ +5 .\|[0-9.]+[um]? '
kill $sweep; wait $sweep
keys D c Space
ok "the sweep's numbers in the question" shows 'quality +KL 0\.[0-9]+ more than now: what was flipped alone'
keys n d
ok "and in the grid" shows '^ +group '
keys D e

# ---- under load ----
octet bench --clients 1 --requests 1000000 --prompt-tokens 8 --output-tokens 60 >/dev/null 2>&1 &
load=$!
keys 3
ok "the client and its rate" shows 'octet .* [0-9.]+k? '
ok "first token and time between tokens are measured" wait_for 30 eval \
    '"$console" --batch --view traffic --width 80 | grep -qE "^first token +[0-9.]+ "'
tm pipe-pane -t t "cat >$scratch/stream"
keys 1 0 g v Down Down Down Right Right Right Space
until_shows 'Flip 16 sites'
before=$(epoch)
keys y
ok "a block under load" shows '^> +3 fp8    fp8    fp8    fp8    bf16'
ok "it was seen as wanted before it was executed" wait_for 30 grep -q '~' "$scratch/stream"
ok "the journal has it" wait_for 30 history_has 'last | (.change | . == "attention.*@0-3 bf16->fp8") and .result == "applied" and .program == "octet-console"'
keys u
ok "undone with one key" shows '^> +3 bf16   bf16   bf16   bf16   bf16'
is "in two changes" "$(epoch)" $((before + 2))
tm pipe-pane -t t
is "no flicker: nothing was cleared to be drawn anew" "$(grep -c "$(printf '\033\\[[23]*J')" "$scratch/stream")" 0
rate() { screen | sed -n '2s/.*  \([0-9.k]*\) tok.*/\1/p' | awk '/k/ { print $1 * 1000; next } { print $1 + 0 }'; }
# The console has seen four seconds since the last change: its rate is one over the last second, and what a change
# did to it is told from two seconds on.
clock() { screen | sed -n '1s/.* \([0-9:]*\) UTC.*/\1/p'; }
last_change() { octetctl --json history | jq -r '.[-1].time | sub("[.].*"; "") | sub(".*T"; "")'; }
settled() {
	age=$((($(date -ud "$(clock)" +%s) - $(date -ud "$(last_change)" +%s) + 86400) % 86400))
	[ $age -ge 4 ] && [ $age -lt 43200 ]
}
faster() { awk "BEGIN { exit !($(rate) > 1.2 * $1) }"; }
# From the format that this CPU is slowest in to one that reads half of bf16: twice as fast and more.
octetctl set '*=fp8t' >/dev/null
until_shows '^> +3 fp8t   fp8t   fp8t   fp8t   fp8t '
faster=no
for try in 1 2 3 4 5; do
	wait_for 30 settled
	slow=$(rate)
	if [ $try = 1 ]; then
		keys a Space
		for format in fp8b bf16 fp8; do
			until_shows "fp8t -> $format "
			[ $format = fp8 ] || keys Space
		done
		keys y
	else
		keys U
	fi
	pressed=$(date +%s%N)
	until faster "$slow" || [ $(($(date +%s%N) - pressed)) -gt 2000000000 ]; do
		sleep 0.05
	done
	[ $(($(date +%s%N) - pressed)) -le 2000000000 ] && faster=yes && break
	echo "# try $try: $slow tokens/s before, $(rate) after; load $(cut -d' ' -f1 /proc/loadavg)"
	keys u
	until_shows '^> +3 fp8t   fp8t   fp8t   fp8t   fp8t '
done
until_shows '^> +3 fp8    fp8    fp8    fp8    fp8 '
if [ -n "${SANITIZE-}" ]; then
	skip "more tokens/s within two seconds" "sanitizers take the time"
else
	is "more tokens/s within two seconds" "$faster" yes
fi
keys 5 g
ok "the history says what it did" shows 'tokens/s [0-9.k]+ -> [0-9.k]+'
keys 2
ok "the epoch stands under the curves" shows '^epochs .*▲'

# ---- shadow's gauge, both sides of a rollout, whose policy a client has ----
keys 3
ok "a client that follows the active plan" shows ' octet .* active'
printf '[shadow]\nsample = 1\nmax_kl = 0.9\n' >>"$scratch/octet.ini"
octetctl reload >/dev/null
octetctl set 'attention.*=bf16' >/dev/null
octetctl rollout start fp8 --percent 50 --by request --guard kl=0.5 >/dev/null
keys 4
ok "what runs beside the active plan is said above" shows 'rollout 50 %'
ok "shadow's gauge" shows '^ KL +[█░]+ [0-9.]+ of 0\.90 '
ok "both sides of a rollout" shows '^ requests +[1-9][0-9.k]* +[1-9][0-9.k]*$'
ok "their times" shows '^ each token ms p50 +[0-9.]+ +[0-9.]+ +[-+][0-9.]+ %'
ok "the candidate's gauge" shows '^ KL +[█░]+ [0-9.]+ of 0\.50 '
octetctl rollout abort >/dev/null
ok "aborted" shows 'none; :rollout start'
octetctl rollout start fp8 --percent 100 >/dev/null
keys 3
ok "a client that has the candidate" shows ' octet .* >fp8'
octetctl rollout abort >/dev/null
printf '[clients]\nuid:%s = fp8\n' "$(id -u)" >>"$scratch/octet.ini"
octetctl reload >/dev/null
ok "a client with a policy of its own" shows ' octet .* fp8'
has "octetctl says it too" "$(octetctl clients)" ' octet .* fp8$'
kill $load; wait $load 2>/dev/null
load=

# ---- cheap ----
cpu() { cut -d' ' -f1 "/proc/$1/schedstat"; } # ns
keys 1
until_shows '\[1 Precision\]'
pid=$(console_pid)
a=$(cpu "$pid")
from=$(date +%s%N)
wait_for 20 eval '[ $(($(date +%s%N) - from)) -gt 4000000000 ]'
b=$(cpu "$pid")
percent=$(awk "BEGIN { print ($b - $a) / ($(date +%s%N) - $from) * 100 }")
echo "# $percent % of a core at 4 refreshes a second"
[ -n "${SANITIZE-}" ] && most=100 || most=1
ok "it takes little of a core" awk "BEGIN { exit !($percent < $most) }"

# ---- the daemon goes and comes ----
kill -9 "$daemon"; wait "$daemon" 2>/dev/null
ok "the daemon was killed" shows 'DISCONNECTED'
keys a Space
ok "nothing can be changed then" shows 'not connected'
ok "start again" start
ok "connected again" gone 'DISCONNECTED'
keys 6
ok "the log tells" shows 'console.disconnected'
kill -STOP "$daemon"
ok "a daemon that stands still" shows 'STANDS STILL'
kill -CONT "$daemon"
ok "goes on" gone 'STANDS STILL'
keys q
ok "left" shows '^left with 0'

# ---- recorded ----
run "$console --record $scratch/recorded"
until_shows '\[1 Precision\]'
octetctl set 'attention.*=fp8w' >/dev/null
ok "recorded" shows '^ +3 fp8w   fp8w   fp8w   fp8w '
keys q
until_shows '^left with 0'
has "and replayed" "$("$console" --batch --replay "$scratch/recorded")" '^ +3 fp8w +fp8w +fp8w +fp8w '

# ---- who may only look ----
run "$console --read-only"
ok "read only" shows '\[READ ONLY\]'
keys Space
ok "and says why" shows 'read only: started with --read-only'
keys : 'use fp8' Enter
ok "for commands too" shows 'read only: started with --read-only'
keys : 'clients' Enter
ok "but those that look" shows 'id +uid +pid +program +running'
keys q
until_gone 'id +uid +pid +program +running'
keys q
ok "and left" shows '^left with 0'
if [ "$(id -u)" = 0 ]; then
	printf '[access]\noperators = user:nobody\nviewers = *\n' >>"$scratch/octet.ini"
	octetctl reload >/dev/null
	run "$console"
	until_shows '\[1 Precision\]'
	if seen '\[READ ONLY\]'; then
		keys Space
		ok "a viewer is told" shows 'read only: uid 0 may look'
	else
		skip "a viewer is told" "root may always"
	fi
	keys q
	until_shows '^left with'
fi
kill -TERM "$daemon"; wait "$daemon"; daemon=
has "no daemon" "$("$console" --batch 2>&1)" "cannot connect"
finish
