#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""octetctl eval against an independent float64 forward pass, and against float64 on octet's own logits. Needs numpy.

  eval_reference.py MODEL_DIR TEXT BUILD_DIR [--bos ID] [--context N] [--tokens N] CANDIDATE...

A daemon with that model must run ($OCTET_SOCKET, $OCTET_CONTROL_SOCKET). CANDIDATE is what eval takes: fp8, fp8w, kv_cache=fp8,
mlp.*=fp8, or several of them with commas; the baseline is bf16. TEXT is cut to so many tokens' worth of characters.
"""
import argparse, fnmatch, json, subprocess, sys, tempfile
import numpy as np
from reference import Model, GROUPS, e4m3_rows

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
                m.cooked[n] = e4m3_rows(t, m.format[g] == "fp8t")
    return m


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(a, b, ids):
    """Logits [n, vocab] of both; the tokens that came."""
    a, b = log_softmax(np.asarray(a, np.float64)), log_softmax(np.asarray(b, np.float64))
    kl = (np.exp(a) * (a - b)).sum(-1)
    at = np.arange(len(ids))
    return {"kl": kl.mean(), "max": kl.max(), "base": np.exp(-a[at, ids].mean()), "cand": np.exp(-b[at, ids].mean()),
            "top1": (a.argmax(-1) == b.argmax(-1)).mean(), "nll": -b[at, ids]}


def forward(m, chunks, bos):
    out = []
    for c in chunks:
        cache = [([], []) for _ in range(m.c["num_hidden_layers"])]
        c = ([bos] if bos is not None else []) + c
        out += [m.step(t, i, cache) for i, t in enumerate(c[:-1])]
    return np.stack(out)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model"), ap.add_argument("text"), ap.add_argument("build"), ap.add_argument("candidate", nargs="+")
    ap.add_argument("--bos", type=int), ap.add_argument("--context", type=int, default=256)
    ap.add_argument("--tokens", type=int, default=400)
    o = ap.parse_args()
    text = open(o.text).read()[: o.tokens * 3]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as f:
        f.write(text), f.flush()
        tokens = subprocess.run([o.build + "/octet", "tokenize", "--ids", text], capture_output=True, text=True, check=True)
        ids = [int(t) for t in tokens.stdout.split()]
        room = o.context - (o.bos is not None)
        chunks = [ids[i:i + room] for i in range(0, len(ids), room)]
        scored = sum([c if o.bos is not None else c[1:] for c in chunks], [])
        base = forward(model(o.model, []), chunks, o.bos)
        print(f"{'candidate':34} {'':9} {'KL':>12} {'max KL':>10} {'ppl bf16':>11} {'ppl':>11} {'top-1':>8}")
        for cand in o.candidate:
            npy = f.name + ".npy"
            r = json.loads(subprocess.run([o.build + "/octetctl", "eval", "--candidate", cand, "--text", f.name, "--context",
                           str(o.context), "--dump-logits", npy, "--json"], capture_output=True, text=True, check=True).stdout)["text"]
            got = {"kl": r["kl"]["mean"], "max": r["kl"]["max"], "base": r["perplexity"]["baseline"],
                   "cand": r["perplexity"]["candidate"], "top1": r["top1"]}
            logits = np.load(npy)
            own = compare(logits[0], logits[1], scored)
            ref = compare(base, forward(model(o.model, cand.split(",")), chunks, o.bos), scored)
            for name, v in (("octet", got), ("own f64", own), ("reference", ref)):
                print(f"{cand:34} {name:9} {v['kl']:12.8f} {v['max']:10.6f} {v['base']:11.5f} {v['cand']:11.5f} {100 * v['top1']:7.2f}%")
            worst = max(abs(got[k] - own[k]) / max(own[k], 1e-30) for k in ("kl", "max", "base", "cand") if abs(got[k] - own[k]) > 1e-8) \
                if any(abs(got[k] - own[k]) > 1e-8 for k in ("kl", "max", "base", "cand")) else 0
            off = own["nll"] - ref["nll"]  # pairs: what rounding the other way moves by chance
            print(f"{'':34} own logits: within {worst:.1e}; reference: KL {100 * (got['kl'] / ref['kl'] - 1):+.2f} %, perplexity "
                  f"{100 * (got['cand'] / ref['cand'] - 1):+.4f} % (standard error {100 * off.std() / len(off)**.5:.4f} %), {len(off)} tokens")
            assert worst <= 1e-4, "differs from its own logits"
            sys.stdout.flush()


main()
