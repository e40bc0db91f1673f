# SPDX-License-Identifier: Apache-2.0
# Sourced by the tests of octet-console after lib.sh: a terminal in tmux.
export LC_ALL=C.UTF-8
console=$builddir/octet-console
tm() { tmux -f /dev/null -S "$scratch/tmux" "$@"; }
screen() { tm capture-pane -p -t t; }
keys() { tm send-keys -t t "$@"; }
seen() { screen | grep -qE -- "$1"; }
unseen() { ! seen "$1"; }
shows() { wait_for 30 seen "$1" || { screen; return 1; }; }
gone() { wait_for 30 unseen "$1" || { screen; return 1; }; }
# Between tests: says nothing, or fails.
until_shows() { wait_for 30 seen "$1" || ok "in time: $1" eval 'screen; false'; }
until_gone() { wait_for 30 unseen "$1" || ok "gone in time: $1" eval 'screen; false'; }
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
	until_shows '^shell>$'
}
# run COMMAND: with the console's path as $console, and what became of it after "left with".
run() { keys "clear; $*; echo left with \$?" Enter; }
trap 'tm kill-server 2>/dev/null; cleanup' EXIT

# The console is the child of the terminal's shell.
console_pid() { pgrep -P "$(tm display -p -t t '#{pane_pid}')" | tail -1; }

# contrast BACKGROUND: the least contrast of what is on the screen, by WCAG 2, where the terminal's own ground is black or
# white; and the two colours. Blocks are no text, but count.
contrast() {
	tm capture-pane -e -p -t t | awk -v ground="$1" '
	function linear(c) { c /= 255; return c <= 0.04045 ? c / 12.92 : exp(2.4 * log((c + 0.055) / 1.055)) }
	function step(n) { return n > 0 ? 55 + 40 * n : 0 }
	function light(n) {
		if (n < 0) return (n == -1) == (ground == "black") # -1: the text, -2: the ground
		if (n >= 232) return linear(8 + 10 * (n - 232))
		n -= 16
		return 0.2126 * linear(step(int(n / 36))) + 0.7152 * linear(step(int(n / 6) % 6)) + 0.0722 * linear(step(n % 6))
	}
	function of(a, b, x) { a = light(a); b = light(b); if (a < b) { x = a; a = b; b = x } return (a + 0.05) / (b + 0.05) }
	function sgr(s, v, n, i) {
		n = split(s, v, ";")
		if (n == 0) { fg = -1; bg = -2 }
		for (i = 1; i <= n; i++) {
			if (v[i] == 0) { fg = -1; bg = -2 }
			else if (v[i] == 39) fg = -1
			else if (v[i] == 49) bg = -2
			else if (v[i] == 38) { fg = v[i + 2]; i += 2 }
			else if (v[i] == 48) { bg = v[i + 2]; i += 2 }
		}
	}
	BEGIN { fg = -1; bg = -2; least = 99 }
	{
		while (length($0) > 0) {
			if (match($0, /^\033\[[0-9;]*m/)) { sgr(substr($0, 3, RLENGTH - 3)); $0 = substr($0, RLENGTH + 1); continue }
			match($0, /^[^\033]+/)
			if (substr($0, 1, RLENGTH) !~ /^ *$/ && of(fg, bg) < least) { least = of(fg, bg); pair = fg " on " bg }
			$0 = substr($0, RLENGTH + 1)
		}
	}
	END { printf "%.1f: %s\n", least, pair }'
}
# What a person can read: 3 at the least.
readable() { contrast "$1" | tee /dev/stderr | awk '{ exit !($1 + 0 >= 3) }'; }

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
