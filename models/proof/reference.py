#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""The pairs that `measure` scores, by the independent float64 forward pass of tests/golden.

  reference.py MODEL_DIR PAIRS.jsonl [--plan bf16] [--first N]

Needs numpy and tokenizers. Prints exact matches, word errors before and after,
clean sentences left untouched; nothing of octet is used.
"""
import argparse, json, os, sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../tests/golden"))
import reference
from tokenizers import Tokenizer

IN, OUT, END = 1, 2, 3


def distance(a, b):
    d = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        p, d[0] = d[:], i
        for j, y in enumerate(b, 1):
            d[j] = min(p[j] + 1, d[j - 1] + 1, p[j - 1] + (x != y))
    return d[-1]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model")
    ap.add_argument("pairs")
    ap.add_argument("--plan", default="bf16")
    ap.add_argument("--first", type=int, default=None)
    a = ap.parse_args()
    tok = Tokenizer.from_file(a.model + "/tokenizer.json")
    m = reference.Model(a.model, a.plan)
    n = exact = before = after = clean = kept = 0
    for line in open(a.pairs).readlines()[: a.first]:
        p = json.loads(line)
        ids = tok.encode(p["input"], add_special_tokens=False).ids
        got = reference.run(m, [IN] + ids + [OUT], len(ids) + len(ids) // 2 + 17, END, [0])["tokens"]
        text = tok.decode(got, skip_special_tokens=True).strip()
        n += 1
        exact += text == p["expected"]
        before += distance(p["input"].split(), p["expected"].split())
        after += distance(text.split(), p["expected"].split())
        clean += p["input"] == p["expected"]
        kept += p["input"] == p["expected"] == text
    print(f"{n} pairs | {100 * exact / n:.1f} % | {before} -> {after} | {kept} of {clean}")


if __name__ == "__main__":
    main()
