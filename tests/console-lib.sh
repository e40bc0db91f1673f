# SPDX-License-Identifier: Apache-2.0
# Sourced by the tests of octet-console after lib.sh: a terminal in tmux.
export LC_ALL=C.UTF-8
console=$builddir/octet-console
tm() { tmux -f /dev/null -S "$scratch/tmux" "$@"; }
screen() { tm capture-pane -p -t t; }
keys() { tm send-keys -t t "$@"; }
seen() { screen | grep -qE -- "$1"; }
unseen() { ! seen "$1"; }
shows() { wait_for 30 seen "$1"; }
gone() { wait_for 30 unseen "$1"; }
resize() { tm resize-window -t t -x "$1" -y "$2"; }
# terminal WIDTH HEIGHT: a shell in a new terminal.
terminal() {
	if tm has-session -t t 2>/dev/null; then
		resize "$1" "$2"
		tm respawn-window -k -t t "env LC_ALL=$LC_ALL sh"
	else
		tm new-session -d -s t -x "$1" -y "$2" "env LC_ALL=$LC_ALL sh"
	fi
	keys "PS1='shell> '; clear" Enter
	shows '^shell>$'
}
# run COMMAND: with the console's path as $console, and what became of it after "left with".
run() { keys "clear; $*; echo left with \$?" Enter; }
trap 'tm kill-server 2>/dev/null; cleanup' EXIT

# golden NAME: what is on the screen, in tests/golden/console/NAME.
# OCTET_GOLDEN=write writes it: read the difference before you commit it.
text_of() { screen | sed 's/ *$//'; }
same_as() { text_of | cmp -s - "$1"; }
written=
golden() {
	file=$srcdir/tests/golden/console/$1
	case "${OCTET_GOLDEN-},$written," in
	write,*,$1,*) ;; # once
	write,*) sleep 1; text_of >"$file"; written=$written,$1 ;;
	esac
	tests=$((tests + 1))
	if wait_for 30 same_as "$file"; then
		echo "ok $tests - golden $1"
	else
		echo "not ok $tests - golden $1"
		text_of | diff "$file" - | sed 's/^/# /' | head -40
	fi
}
