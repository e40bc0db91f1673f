#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# eval, evals, sweep against a real daemon: what they print, what they keep, what a planted fault does to them.
. "${srcdir:-.}/tests/lib.sh"
for tool in jq; do command -v $tool >/dev/null || { skip "eval" "no $tool"; finish; exit 0; }; done
head -c 3000 "$srcdir/models/proof/eval/prose.txt" >"$scratch/text"
head -20 "$srcdir/models/proof/eval/pairs.jsonl" >"$scratch/pairs"

config
start || exit 1
r=$(octetctl eval --candidate fp8 --text "$scratch/text" --task "$scratch/pairs" --dump-logits "$scratch/logits.npy" --save first --json)
is "the KL is that of an FP8 plan" "$(printf '%s' "$r" | jq '.text.kl.mean > 0.001 and .text.kl.mean < 0.1 and .text.kl.max >= .text.kl.p99 and .text.kl.p99 >= .text.kl.median')" true
is "perplexities and their interval" "$(printf '%s' "$r" | jq '.text.perplexity | .baseline > 10 and .change_low < .change_percent and .change_percent < .change_high')" true
is "ten worst tokens, the worst first" "$(printf '%s' "$r" | jq '(.text.worst | length) == 10 and .text.worst[0].kl == .text.kl.max')" true
is "all pairs were answered" "$(printf '%s' "$r" | jq '.task.pairs == 20 and .task.baseline.word_errors < .task.word_errors_before')" true
is "both speeds and the step" "$(printf '%s' "$r" | jq '.text.tokens_s.baseline > 0 and .text.tokens_s.candidate > 0 and .step_us.baseline > 0 and .step_us.rounds > 1')" true
is "what was measured is named" "$(printf '%s' "$r" | jq -r '[.key.model, .key.cpu_level, (.key.model_digest | length), (.key.text | length)] | @csv' | sed 's/"//g' | cut -d, -f1,3,4)" "proof,16,16"
want=$((128 + 2 * 4 * 2048 * $(printf '%s' "$r" | jq .text.tokens)))
is "the logits are a NumPy array of all tokens" "$(stat -c %s "$scratch/logits.npy") $(head -c 6 "$scratch/logits.npy" | tail -c 5)" "$want NUMPY"
again=$(octetctl eval --candidate fp8 --text "$scratch/text" --task "$scratch/pairs" --json)
is "the same numbers again" "$(printf '%s' "$again" | jq -c '[.text.kl, .text.perplexity, .task]')" "$(printf '%s' "$r" | jq -c '[.text.kl, .text.perplexity, .task]')"
is "a plan against itself: nothing" "$(octetctl eval --baseline fp8w --candidate fp8w --text "$scratch/text" --json | jq '.text.kl.max == 0 and .text.perplexity.change_percent == 0 and .text.top1 == 1')" true
has "people read it too" "$(octetctl eval --candidate 'mlp.*=fp8,attention.q_proj@0-2,4=fp8w' --text "$scratch/text")" '^perplexity .* change .* %'

# Errors name their cause.
has "no candidate" "$(octetctl eval --text "$scratch/text" 2>&1)" 'needs --candidate'
has "an unknown policy" "$(octetctl eval --candidate nosuch --text "$scratch/text" 2>&1)" "'nosuch' is not defined"
has "a selector of no site" "$(octetctl eval --candidate mpl.*=fp8 --text "$scratch/text" 2>&1)" 'mpl'
has "no such file" "$(octetctl eval --candidate fp8 --text /nonexistent 2>&1)" '/nonexistent: No such file'
printf 'a\377b' >"$scratch/bytes"
has "no text" "$(octetctl eval --candidate fp8 --text "$scratch/bytes" 2>&1)" 'no UTF-8'
printf '{"input": 1}\n' >"$scratch/bad"
has "no task" "$(octetctl eval --candidate fp8 --task "$scratch/bad" 2>&1)" 'bad:1: is no JSON object'
has "a context that is too long" "$(octetctl eval --candidate fp8 --text "$scratch/text" --context 100000 2>&1)" 'this model takes 2 to'

# What is kept.
id=$(octetctl evals list --json | jq '[.[] | select(.name == "first")][0].id')
has "the list" "$(octetctl evals)" '^id +time'
is "one of them whole" "$(octetctl evals show "$id" --json | jq -r .name)" first
has "two of the same text compare" "$(octetctl evals compare "$id" $((id + 1)))" 'KL mean'
is "a task alone: its expected answers are scored" "$(octetctl eval --candidate fp8 --task "$scratch/pairs" --json | jq '.text.tokens > 100 and .text.kl.mean > 0.0001 and .text.perplexity.baseline < 3 and .step_us.rounds > 1 and .task.pairs == 20')" true
other=$(octetctl evals list --json | jq '.[-1].id')
has "two of different texts do not" "$(octetctl evals compare "$id" "$other" 2>&1)" 'different texts'
ok "delete" octetctl evals delete "$other"
has "it is gone" "$(octetctl evals show "$other" 2>&1)" "no eval $other"
stop
start || exit 1
is "results outlive the daemon" "$(octetctl evals show "$id" --json | jq -r .name)" first

# Loss of the client leaves nothing behind.
cat "$srcdir/models/proof/eval/prose.txt" "$srcdir/models/proof/eval/prose.txt" "$srcdir/models/proof/eval/prose.txt" >"$scratch/long"
n=$(octetctl evals list --json | jq length)
octetctl eval --candidate fp8 --text "$scratch/long" >/dev/null 2>&1 &
client=$!
busy() { [ "$(octetctl status --json | jq .kv.pages_used)" -gt 0 ]; }
quiet() { [ "$(octetctl status --json | jq .kv.pages_used)" -eq 0 ]; }
ok "an eval runs" wait_for 20 busy
kill -9 $client
ok "its client dies: the pages come back" wait_for 20 quiet
is "and no result is kept" "$(octetctl evals list --json | jq length)" "$n"

# A sweep goes on where it was interrupted.
octetctl sweep --text "$scratch/text" >/dev/null 2>&1 &
client=$!
three() { [ "$(octetctl evals list --all --json | jq length)" -ge $((n + 3)) ]; }
ok "a sweep runs" wait_for 300 three
kill -INT $client
wait $client
had=$(octetctl evals list --all --json | jq length)
s=$(octetctl sweep --text "$scratch/text" --budget-kl 0.003 --save lean --svg "$scratch/sweep.svg")
is "it measures what was left, no more" "$(octetctl evals list --all --json | jq "[.[] | select(.sites > 0)] | group_by([.candidate, .corpora]) | map(length) | max <= 2")" true
# On a busy machine no time saved may stand out from its error.
has "the policy is an INI section" "$s" '^\[policy lean\]|^nothing fits the budget'
is "what is chosen saves time, and the whole keeps the budget" "$(octetctl sweep --text "$scratch/text" --budget-kl 0.003 --json | jq 'all(.trials[]; (.chosen | not) or .saved_us >= 2 * .saved_error_us) and (.policy.eval == null or .policy.eval.text.kl.mean <= 0.003) and (.trials | length) == 9')" true
has "the picture is there" "$(head -1 "$scratch/sweep.svg")" '<svg'
printf '%s\n' "$s" | sed -n '/^\[policy/,$p' >"$scratch/section"
stop
config <"$scratch/section"
ok "and the section works as it is" "$builddir/octetd" --check --config "$scratch/octet.ini"

# A fault is found, and by its name.
OCTET_FAULT=mlp.up_proj@3
export OCTET_FAULT
start || exit 1
is "eval sees it" "$(octetctl eval --candidate fp8 --text "$scratch/text" --json | jq '.text.kl.mean > 0.1')" true
is "but not where nothing is FP8" "$(octetctl eval --candidate fp8w --text "$scratch/text" --json | jq '.text.kl.mean < 0.05')" true
head -c 600 "$scratch/text" >"$scratch/short"
dearest() { octetctl sweep --by "$1" --text "$scratch/short" --json | jq -r '.trials | max_by(.kl_mean).selector'; }
is "sweep finds its group and its layer the dearest" "$(dearest group) $(dearest layer)" "mlp.up_proj *@3"
[ -z "${OCTET_LONG-}" ] || is "and the site itself" "$(dearest site)" mlp.up_proj@3
stop
finish
