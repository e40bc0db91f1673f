# SPDX-License-Identifier: Apache-2.0
# Sourced by ./demo and ./check: the packages a fresh Debian machine lacks, and
# an up-to-date build tree.

packages_build="gcc make autoconf automake libtool pkg-config libuv1-dev libncurses-dev libinih-dev
 libjansson-dev libpcre2-dev libutf8proc-dev libmd-dev libxxhash-dev"
packages_test="libcmocka-dev tmux jq procps g++ strace libsimde-dev"

# setup_packages [test]: apt-get is called only for what is missing.
setup_packages() {
	wanted=$packages_build missing=
	[ "${1-}" = test ] && wanted="$wanted $packages_test"
	for p in $wanted; do
		dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
	done
	[ -n "$missing" ] || return 0
	echo "installing:$missing"
	sudo=
	[ "$(id -u)" = 0 ] || sudo=sudo
	log=$(mktemp)
	# shellcheck disable=SC2086
	if ! { $sudo apt-get update && $sudo env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
		tail -20 "$log" >&2
		rm -f "$log"
		echo "cannot install:$missing" >&2
		return 1
	fi
	rm -f "$log"
}

# setup_build DIR CC [configure options]: configures where that was not done yet
# and leaves the tree ready for make.
setup_build() {
	dir=$1 cc=$2
	shift 2
	if [ ! -x configure ] || [ configure.ac -nt configure ] || [ Makefile.am -nt Makefile.in ]; then
		autoreconf -i >/dev/null 2>&1 || { autoreconf -i; return 1; }
	fi
	mkdir -p "$dir"
	if [ ! -f "$dir/Makefile" ] || [ configure -nt "$dir/Makefile" ]; then
		(cd "$dir" && ../configure CC="$cc" "$@" >configure.log 2>&1) || { tail -5 "$dir/configure.log" >&2; return 1; }
	fi
}
