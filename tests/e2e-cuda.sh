#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# octetd on the CUDA plugin, against the CPU. $OCTET_PLUGIN of the caller: that one (a card); else the plugin that
# tests/gpu/emu runs on the CPU.
. "${srcdir:-.}/tests/lib.sh"
plugin=${OCTET_PLUGIN-$builddir/tests/gpu/octet-cuda-emu.so}
unset OCTET_PLUGIN
if [ ! -f "$plugin" ]; then
	skip "the CUDA plugin" "no C++ compiler"
	finish
	exit 0
fi
finish
