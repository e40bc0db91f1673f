# SPDX-License-Identifier: Apache-2.0
# What the scripts beside share: `need N "$@"` reads BUILD_DIR and MODEL_DIR; a scratch folder, a daemon of their own in it, medians.
set -eu
usage() { # the comment at the head of the script
	awk 'NR > 2 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
	exit 2
}
dir=$(mktemp -d)
daemon= client=
trap 'kill $client $daemon 2>/dev/null || :; rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
export OCTET_SOCKET="$dir/s" OCTET_CONTROL_SOCKET="$dir/c"

octet() { "$build/octet" "$@"; }
octetctl() { "$build/octetctl" "$@"; }
bench() { octet bench --json "$@"; }
ready() { octet tokenize x >/dev/null 2>&1; }
config() { # keys of [daemon], then sections, on stdin
	{
		printf '[daemon]\nsocket = %s\ncontrol_socket = %s\nstate_dir = %s/state\nlog_level = warn\n' "$OCTET_SOCKET" "$OCTET_CONTROL_SOCKET" "$dir"
		cat
		printf '[model]\npath = %s\n' "$model"
	} >"$dir/octet.ini"
}
launch() { # PROGRAM that runs octetd, or nothing
	"$@" "$build/octetd" --config "$dir/octet.ini" 2>"$dir/log" &
	daemon=$!
}
until_ready() { # COMMAND that succeeds then
	until "$@" >/dev/null 2>&1; do
		kill -0 "$daemon" 2>/dev/null || { tail -3 "$dir/log"; exit 1; }
		sleep 0.01
	done
}
start() {
	launch "$@"
	until_ready ready
}
stop() { # the daemon itself, whatever program runs it
	kill "$(octetctl status --json | jq .pid)"
	wait "$daemon" || :
	daemon=
}
median() { sort -g | awk '{ v[NR] = $1 } END { if (NR) printf "%.4g", NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }
