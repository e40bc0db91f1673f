#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""octetctl eval against an independent float64 forward pass, and against float64 on octet's own logits. Needs numpy.

  eval_reference.py MODEL_DIR TEXT BUILD_DIR [--bos ID] [--context N] [--tokens N] CANDIDATE...

A daemon with that model must run ($OCTET_SOCKET, $OCTET_CONTROL_SOCKET). CANDIDATE is what eval takes: fp8, fp8w, kv_cache=fp8,
mlp.*=fp8, or several of them with commas; the baseline is bf16. Of TEXT the first N tokens or a few more are taken. Standard errors are of the
differences token by token: both round to the same formats, but not the same last bits before, so a value near the middle of two
codes may go either way; what they leave of a difference is chance.
"""
import argparse, fnmatch, json, subprocess, sys, tempfile
import numpy as np
from reference import Model, GROUPS, e4m3_weights

NAMES = {"self_attn": "attention"}


def model(path, rules):
    # The built-in policy fp8 leaves lm_head in bf16; a format's name alone is every linear layer.
    rules = [r.split("=") if "=" in r else ["[am]*" if r == "fp8" else "*", r] for r in rules]
    kv8 = any(s == "kv_cache" and f == "fp8" for s, f in rules)
    m = Model(path, "bf16+kv8" if kv8 else "bf16")
    for g in GROUPS:
        name = ".".join(NAMES.get(p, p) for p in g.split("."))
        for selector, fmt in rules:
            if selector != "kv_cache" and fnmatch.fnmatch(name, selector):
                m.format[g] = fmt
        for n, t in m.w.items():
            if n.endswith(g + ".weight") and m.format[g] != "bf16":
                m.cooked[n] = e4m3_weights(t, m.format[g])
    return m


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(a, b, ids):
    """Logits [n, vocab] of both, the tokens that came: KL, -log p of both, same first choice, each [n]."""
    a, b = log_softmax(np.asarray(a, np.float64)), log_softmax(np.asarray(b, np.float64))
    at = np.arange(len(ids))
    return np.stack([(np.exp(a) * (a - b)).sum(-1), -a[at, ids], -b[at, ids], a.argmax(-1) == b.argmax(-1)], 1)


def summary(t):
    return {"KL": t[:, 0].mean(), "max KL": t[:, 0].max(), "ppl bf16": np.exp(t[:, 1].mean()), "ppl": np.exp(t[:, 2].mean()),
            "top-1": t[:, 3].mean()}


def parts(text, n, octet):
    """Pieces of whole lines, each tokenised on its own, until they have n tokens: [(text, ids)]."""
    out, lines = [], []
    for line in text.splitlines(keepends=True) + [""]:
        lines.append(line)
        if (line and sum(map(len, lines)) < min(100000, 3 * n)) or sum(len(ids) for _, ids in out) >= n:
            continue
        piece = "".join(lines)
        ids = subprocess.run([octet, "tokenize", "--ids", piece], capture_output=True, text=True, check=True).stdout.split()
        out.append((piece, [int(t) for t in ids]))
        lines = []
    return out


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model"), ap.add_argument("text"), ap.add_argument("build"), ap.add_argument("candidate", nargs="+")
    ap.add_argument("--bos", type=int), ap.add_argument("--context", type=int, default=256)
    ap.add_argument("--tokens", type=int, default=6000)
    o = ap.parse_args()
    with tempfile.TemporaryDirectory() as d:
        start, chunks, files = [] if o.bos is None else [o.bos], [], []
        room = o.context - len(start)
        for text, ids in parts(open(o.text).read(), o.tokens, o.build + "/octet"):
            files += ["--text", f"{d}/{len(files)}"]
            open(files[-1], "w").write(text)
            chunks += [start + ids[i:i + room] for i in range(0, len(ids), room) if len(start + ids[i:i + room]) > 1]
        m = model(o.model, [])
        base = [m.rows(c[:-1], []) for c in chunks]
        print(f"{'candidate':34} {'':9} {'KL':>12} {'max KL':>10} {'ppl bf16':>11} {'ppl':>11} {'top-1':>8}")
        for cand in o.candidate:
            r = json.loads(subprocess.run([o.build + "/octetctl", "eval", "--candidate", cand, *files, "--context", str(o.context),
                           "--dump-logits", d + "/npy", "--json"], capture_output=True, text=True, check=True).stdout)["text"]
            got = {"KL": r["kl"]["mean"], "max KL": r["kl"]["max"], "ppl bf16": r["perplexity"]["baseline"],
                   "ppl": r["perplexity"]["candidate"], "top-1": r["top1"]}
            logits, m, own, ref, at = np.load(d + "/npy", mmap_mode="r"), model(o.model, cand.split(",")), [], [], 0
            for c, b in zip(chunks, base):
                here = slice(at, at := at + len(c) - 1)
                own.append(compare(logits[0, here], logits[1, here], c[1:]))
                ref.append(compare(b, m.rows(c[:-1], []), c[1:]))
            assert at == logits.shape[1], "other tokens"
            own, ref = np.concatenate(own), np.concatenate(ref)
            sums = {"octet": got, "own f64": summary(own), "reference": summary(ref)}
            for name, v in sums.items():
                print(f"{cand:34} {name:9} {v['KL']:12.8f} {v['max KL']:10.6f} {v['ppl bf16']:11.5f} {v['ppl']:11.5f} {100 * v['top-1']:7.2f}%")
            off = {k: abs(got[k] - sums["own f64"][k]) for k in got}
            assert all(off[k] <= max(1e-8, 1e-4 * got[k]) for k in got), "differs from its own logits"
            error = (own - ref).std(0) / len(own)**.5
            change = {k: f"{100 * (got[k] / sums['reference'][k] - 1):+.3f} % (standard error {100 * e:.3f})" for k, e in
                      (("KL", error[0] / sums["reference"]["KL"]), ("ppl bf16", error[1]), ("ppl", error[2]))}
            print(f"{'':34} {len(own)} tokens; own logits: within {max(off.values()):.0e}; from the reference: "
                  + ", ".join(f"{k} {v}" for k, v in change.items()))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
