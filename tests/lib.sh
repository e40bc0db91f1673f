# SPDX-License-Identifier: Apache-2.0
# Sourced by the end-to-end tests: TAP output, a scratch directory, a daemon.
# The programs are those of the build tree ($PWD); sources are under $srcdir.
set -u
srcdir=$(cd "${srcdir:-.}" && pwd)
builddir=$PWD
tests=0
scratch=$(mktemp -d "${TMPDIR:-/tmp}/octet-test.XXXXXX")
chmod 755 "$scratch"
daemon=
export OCTET_SOCKET="$scratch/octet.sock" OCTET_CONTROL_SOCKET="$scratch/octet-control.sock"
unset XDG_STATE_HOME XDG_RUNTIME_DIR

cleanup() {
	[ -z "$daemon" ] || kill -9 "$daemon" 2>/dev/null
	[ -n "${keep-}" ] || rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

# ok NAME COMMAND...: one test.
ok() {
	name=$1
	shift
	tests=$((tests + 1))
	if "$@" >"$scratch/out.$tests" 2>&1; then
		echo "ok $tests - $name"
	else
		echo "not ok $tests - $name"
		echo "# command: $*"
		sed 's/^/# /' "$scratch/out.$tests" | head -30
	fi
}
# is NAME GOT WANT
is() {
	tests=$((tests + 1))
	if [ "$2" = "$3" ]; then
		echo "ok $tests - $1"
	else
		printf 'not ok %d - %s\n' "$tests" "$1"
		printf 'got:  %s\nwant: %s\n' "$2" "$3" | sed 's/^/# /'
	fi
}
# has NAME TEXT PATTERN (grep -E)
has() {
	tests=$((tests + 1))
	if printf '%s\n' "$2" | grep -qE -- "$3"; then
		echo "ok $tests - $1"
	else
		echo "not ok $tests - $1"
		printf 'no match for: %s\nin: %s\n' "$3" "$2" | sed 's/^/# /'
	fi
}
skip() {
	tests=$((tests + 1))
	echo "ok $tests - $1 # SKIP $2"
}
finish() {
	echo "1..$tests"
}
# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
	limit=$(($(date +%s) + $1))
	shift
	until "$@" >/dev/null 2>&1; do
		[ "$(date +%s)" -lt "$limit" ] || return 1
		sleep 0.02
	done
}
# config [EXTRA LINES on stdin]: a configuration of the embedded model.
config() {
	cat >"$scratch/octet.ini" <<-END
	[daemon]
	socket = $OCTET_SOCKET
	control_socket = $OCTET_CONTROL_SOCKET
	state_dir = $scratch/state
	${daemon_options-}
	[model]
	path = ${model-$srcdir/models/proof}
	[engine]
	kv_cache_bytes = ${kv-32M}
	${engine_options-}
	[precision]
	policy = ${policy-bf16}
	END
	[ -t 0 ] || cat >>"$scratch/octet.ini"
}
start() {
	"$builddir/octetd" --config "$scratch/octet.ini" >>"$scratch/log" 2>&1 &
	daemon=$!
	# Not "test -S": kill -9 leaves a stale one behind.
	wait_for 60 "$builddir/octet" tokenize x && return 0
	echo "# the daemon did not start:"
	sed 's/^/# /' "$scratch/log" | tail -5
	return 1
}
stop() {
	kill -TERM "$daemon" 2>/dev/null
	wait "$daemon"
	status=$?
	daemon=
	return $status
}
octet() { "$builddir/octet" "$@"; }
octetctl() { "$builddir/octetctl" "$@"; }
epoch() { octetctl --json status | jq -r .epoch; }
