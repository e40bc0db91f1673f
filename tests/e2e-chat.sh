#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# octet chat: with the embedded model, which takes one message at a time, and with the same weights under a template of
# several turns. What it says is of no interest here, only what it depends on.
. "${srcdir:-.}/tests/lib.sh"

config </dev/null
ok "the daemon starts" start
first="I has seen teh results." second="He go to school yesterday."
is "a line is a message" "$(printf '%s\n' "$first" | octet chat 2>"$scratch/err")" "$(octet complete "$first")"
has "it says that nothing is remembered" "$(cat "$scratch/err")" 'one message at a time'
is "every line is answered by itself" "$(printf '%s\n\n%s' "$first" "$second" | octet chat 2>/dev/null)" \
    "$(octet complete "$first"; echo; octet complete "$second")"
is "quit ends" "$(printf '%s\n/quit\n%s\n' "$first" "$second" | octet chat 2>/dev/null)" "$(octet complete "$first")"
is "sampling options are those of complete" "$(printf '%s\n' "$first" | octet chat --temperature 2 --seed 5 --max-tokens 9 2>/dev/null)" \
    "$(octet complete --temperature 2 --seed 5 --max-tokens 9 "$first")"
out=$(echo x | octet chat --system 'Be kind.' 2>&1)
is "a system message is refused" "$? $out" "1 octet: this model's chat template takes one user message and no more"
out=$(octet chat hello 2>&1 </dev/null)
is "no message on the command line" "$?" 2
ok "the daemon ends" stop

# Several turns.
mkdir "$scratch/model"
cp "$srcdir"/models/proof/*.json "$scratch/model"
ln -s "$srcdir/models/proof/model.safetensors" "$scratch/model/"
cat >"$scratch/model/chat_template.jinja" <<'END'
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
END
model=$scratch/model
config </dev/null
ok "chat_template.jinja is read" start
chat() { octet chat --ignore-eos --max-tokens 12 "$@" 2>"$scratch/err"; }
lines() { printf '%s\n' "$@"; }
alone=$(lines "$second" | chat)
is "reset forgets" "$(lines "$first" /reset "$second" | chat | tr '\n' '~')" "$(lines "$first" | chat | tr '\n' '~')$(printf '%s\n' "$alone" | tr '\n' '~')"
wild() { chat --temperature 2 --seed 3; }
ok "the first line is remembered" test "$(lines "$first" "$second" | wild)" != "$(lines "$first" /reset "$second" | wild)"
is "and a seed repeats a conversation" "$(lines "$first" "$second" | wild)" "$(lines "$first" "$second" | wild)"
lines "$first" /reset "$second" | chat >/dev/null
has "reset says so" "$(cat "$scratch/err")" 'begins anew'
is "nothing else is said" "$(lines "$first" | chat >/dev/null; cat "$scratch/err")" ""
ok "a system message counts" test "$(lines "$first" | chat --system "Shout.")" != "$(lines "$first" | chat)"
prompt="<|im_start|>system
Shout.<|im_end|>
<|im_start|>user
$first<|im_end|>
<|im_start|>assistant
"
is "the prompt is the template's" "$(lines "$first" | chat --system "Shout.")" \
    "$(octet complete --raw --ignore-eos --max-tokens 12 "$prompt")"
i=0
while [ $i -lt 20 ]; do
	echo "$i $first $second"
	i=$((i + 1))
done >"$scratch/many"
ok "more than the context holds" sh -c "'$builddir/octet' chat --ignore-eos --max-tokens 20 <'$scratch/many' >'$scratch/many.out' 2>'$scratch/err'"
has "the oldest turns go" "$(cat "$scratch/err")" 'the context of 512 tokens is full: the oldest turn is dropped'
out=$(cat "$scratch/many" "$scratch/many" "$scratch/many" | tr '\n' ' ' | octet chat 2>&1)
is "a message longer than the context" "$? $(echo "$out" | sed 's/of [0-9]* tokens/of N tokens/')" "1 octet: a message of N tokens does not fit the context of 512"

# ^C ends the answer, not the program.
mkfifo "$scratch/in"
octet_at="$builddir/octet"
"$octet_at" chat --ignore-eos --max-tokens 450 <"$scratch/in" >"$scratch/out" 2>"$scratch/err" &
pid=$!
exec 3>"$scratch/in"
echo "$first" >&3
ok "an answer begins" wait_for 20 test -s "$scratch/out"
kill -INT $pid
ok "it is cancelled" wait_for 20 grep -q cancelled "$scratch/err"
size=$(wc -c <"$scratch/out")
echo "$second" >&3
ok "the program goes on" wait_for 20 sh -c "test \$(wc -c <'$scratch/out') -gt $size"
kill -INT $pid
wait_for 20 sh -c "test \$(grep -c cancelled '$scratch/err') = 2"
echo /quit >&3
wait $pid
is "and ends with 0" "$?" 0
exec 3>&-
ok "the end" stop
finish
