#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Bad input: an error that names the cause, and nothing lost.
. "${srcdir:-.}/tests/lib.sh"

check() { "$builddir/octetd" --config "$scratch/octet.ini" --check 2>&1; }
ini=$scratch/octet.ini

has "no daemon" "$(octet complete x 2>&1)" "cannot connect to $OCTET_SOCKET.*is octetd running"
has "no control socket" "$(octetctl status 2>&1)" "cannot connect to $OCTET_CONTROL_SOCKET.*is octetd running"
has "missing config file" "$("$builddir/octetd" --config /nonexistent.ini --check 2>&1)" '/nonexistent.ini.*No such file'
config
ok "--check of a good file" check
is "--check ends with 0" "$(check >/dev/null; echo $?)" 0
config </dev/null; echo 'nonsense = 1' >>"$ini"
has "unknown key" "$(check)" "octet.ini:[0-9]+: .*nonsense"
is "--check ends with 1" "$(check >/dev/null; echo $?)" 1
engine_options='spin_us = many' config </dev/null
has "bad value, with its line" "$(check)" "octet.ini:10: .*spin_us.*many"
config <<END
[policy p]
attention.x_proj = fp8
END
has "selector that matches nothing" "$(check)" "octet.ini:[0-9]+:.*attention.x_proj"
config <<END
[policy p]
* = fp7
END
has "unknown format" "$(check)" "octet.ini:[0-9]+:.*fp7"
policy=nosuch config </dev/null
has "policy not defined" "$(check)" "nosuch.*not defined"
engine_options='spin_us = many
max_batch = 0' config <<END
no line at all
[policy p]
mlp.* = fp7
[policy q]
attention.x_proj = fp8
END
is "--check names every bad line and policy" "$(check | sed -n 's/^octetd: .*octet.ini:\([0-9]*\): .*/\1/p' | tr '\n' ' ')" "10 11 14 16 18 "
printf '[policy saved]\nattention.x_proj = fp8\n' >"$scratch/policies.ini"
config </dev/null
has "a bad rule of the policies file, with its line" "$(check)" "policies.ini:2: policy 'saved'"
rm "$scratch/policies.ini"
model=/nonexistent config </dev/null
has "missing model" "$(check)" "/nonexistent.*No such file"
kv=9T config </dev/null
has "too large for memory" "$(check)" "memory is available"
engine_options='backend = cuda' config </dev/null
has "no CUDA here" "$(check)" "cuda"
mkdir "$scratch/broken" && cp "$srcdir"/models/proof/* "$scratch/broken/"
head -c 5000 "$srcdir/models/proof/tokenizer.json" >"$scratch/broken/tokenizer.json"
model=$scratch/broken config </dev/null
has "broken tokenizer.json" "$(check)" "tokenizer.json"

daemon_options='max_clients = 3
max_requests = 4' config </dev/null
ok "start" start
has "socket in use" "$("$builddir/octetd" --config "$ini" 2>&1)" 'another|in use'
ok "the first still serves" octet complete "It work."
long=$(printf 'word %.0s' $(seq 600))
has "prompt too long" "$(octet complete --raw "$long" 2>&1)" 'prompt of [0-9]+ tokens: .*512|too long'
ok "the daemon is unharmed" octet complete "It work."
has "too many clients" "$(octet bench --clients 4 --requests 4 2>&1)" 'too many clients.*3'
wait_for 60 sh -c "[ \$($builddir/octetctl --json clients | jq length) = 0 ]"
has "unknown verb" "$(octetctl nosuch 2>&1)" "unknown verb 'nosuch'"
has "set: bad selector" "$(octetctl set nosuch=fp8 2>&1)" "nosuch"
has "set: bad format" "$(octetctl set lm_head=fp9 2>&1)" "fp9"
has "set: layer out of range" "$(octetctl set mlp.up_proj@99=fp8 2>&1)" "99"
has "set: lm_head has no layer" "$(octetctl set lm_head@0=fp8 2>&1)" "lm_head"
has "set: not the shape of a rule" "$(octetctl set nonsense 2>&1)" "nonsense"
has "use: unknown policy" "$(octetctl use nosuch 2>&1)" "nosuch"
has "rollback: unknown epoch" "$(octetctl rollback --to 99 2>&1)" "99"
has "bad number" "$(octet complete --max-tokens -3 x 2>&1)" "max-tokens"
has "bad temperature" "$(octet complete --temperature nan x 2>&1)" "temperature"
is "still epoch 1" "$(epoch)" 1

# A client killed in the middle of a stream leaves nothing behind.
"$builddir/octet" complete --json --ignore-eos --max-tokens 450 x >"$scratch/killed" &
victim=$!
wait_for 60 test -s "$scratch/killed"
kill -9 $victim
ok "its pages come back" wait_for 60 sh -c "[ \$($builddir/octetctl --json status | jq .kv.pages_used) = 0 ]"
ok "and its session" wait_for 60 sh -c "[ \$($builddir/octetctl --json clients | jq length) = 0 ]"

# SIGHUP with a broken file: the old state stays, the message says the line.
cp "$ini" "$scratch/good.ini"
echo 'broken line' >>"$ini"
lines=$(wc -l <"$ini")
kill -HUP "$daemon"
ok "SIGHUP with a broken file is reported with its line" wait_for 60 grep -q "octet.ini:$lines:" "$scratch/log"
has "reload says so too" "$(octetctl reload 2>&1)" "octet.ini:$lines:"
ok "the daemon goes on" octet complete "It work."
sed 's/^policy = .*/policy = fp8/' "$scratch/good.ini" >"$ini"
kill -HUP "$daemon"
ok "a good file is taken" wait_for 60 sh -c "[ \$($builddir/octetctl --json status | jq -r .policy) = fp8 ]"
ok "stop" stop

if [ "$(id -u)" = 0 ] && command -v setpriv >/dev/null; then
	daemon_options='control_mode = 0666' config </dev/null
	start
	other="setpriv --reuid 65534 --regid 65534 --clear-groups"
	if $other "$builddir/octetctl" --version >/dev/null 2>&1; then
		before=$(epoch)
		ok "a viewer may look" $other "$builddir/octetctl" status
		has "a viewer may not flip" "$($other "$builddir/octetctl" set lm_head=fp8 2>&1)" "needs an operator"
		is "and did not" "$(epoch)" "$before"
	else
		skip "a viewer may look" "the build tree is not readable for others"
	fi
	stop
else
	skip "permissions" "needs root and setpriv"
fi
finish
