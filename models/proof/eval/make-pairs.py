#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""make-pairs.py: clean.txt -> pairs.jsonl, one kind of slip or two a sentence, every fifth without any. Fixed seed."""
import json, random, re

KEYS = {"a": "sq", "b": "vn", "c": "xv", "d": "sf", "e": "wr", "f": "dg", "g": "fh", "h": "gj", "i": "uo", "k": "jl", "l": "k",
        "m": "n", "n": "bm", "o": "ip", "p": "o", "r": "et", "s": "ad", "t": "ry", "u": "yi", "v": "cb", "w": "qe", "y": "tu"}
CONFUSED = [("their", "there"), ("there", "their"), ("its", "it's"), ("it's", "its"), ("too", "to"), ("than", "then"), ("then", "than"),
            ("your", "you're"), ("you're", "your"), ("whose", "who's"), ("who's", "whose"), ("lose", "loose"), ("were", "was"),
            ("was", "were"), ("have", "has"), ("has", "have"), ("doesn't", "don't"), ("don't", "doesn't"), ("are", "is"), ("is", "are"),
            ("fewer", "less"), ("an", "a"), ("isn't", "aren't"), ("him", "he"), ("written", "wrote"), ("been", "be"), ("we're", "were")]


def swap_word(r, w, old, new):
    at = [i for i, x in enumerate(w) if x.strip(".,?!").lower() == old]
    if not at:
        return False
    i = r.choice(at)
    x = w[i]
    core = x.strip(".,?!")
    w[i] = x.replace(core, new.capitalize() if core[0].isupper() else new)
    return True


def confused(r, w):
    c = CONFUSED[:]
    r.shuffle(c)
    return any(swap_word(r, w, a, b) for a, b in c)


def long_word(r, w):
    at = [i for i, x in enumerate(w) if len(x.strip(".,?!")) >= 4 and x.strip(".,?!").isalpha()]
    return r.choice(at) if at else None


def letters(r, w, change):
    i = long_word(r, w)
    if i is None:
        return False
    k = r.randrange(1, len(w[i].strip(".,?!")) - 1)
    new = change(w[i], k)
    if new == w[i]:
        return False
    w[i] = new
    return True


def key(r, w):
    return letters(r, w, lambda x, k: x[:k] + r.choice(KEYS.get(x[k], x[k])) + x[k + 1:])


def swapped(r, w):
    return letters(r, w, lambda x, k: x[:k] + x[k + 1] + x[k] + x[k + 2:])


def lost(r, w):
    return letters(r, w, lambda x, k: x[:k] + x[k + 1:])


def doubled(r, w):
    return letters(r, w, lambda x, k: x[:k] + x[k] + x[k:])


def apostrophe(r, w):
    at = [i for i, x in enumerate(w) if "'" in x]
    if not at:
        return False
    i = r.choice(at)
    w[i] = w[i].replace("'", "")
    return True


def article(r, w):
    at = [i for i, x in enumerate(w) if x in ("a", "an", "the") and i > 0]
    if not at:
        return False
    i = r.choice(at)
    if w[i] == "the":
        del w[i]
    else:
        w[i] = "a" if w[i] == "an" else "an"
    return True


def ending(r, w):
    at = [i for i, x in enumerate(w) if re.fullmatch(r"[a-z]{3,}(s|ed|ing)[.,?!]?", x)]
    if not at:
        return False
    i = r.choice(at)
    w[i] = re.sub(r"(s|ed|ing)([.,?!]?)$", r"\2", w[i])
    return True


def joined(r, w):
    if len(w) < 4:
        return False
    i = r.randrange(1, len(w) - 2)
    if not (w[i].isalpha() and w[i + 1].isalpha()):
        return False
    w[i:i + 2] = [w[i] + w[i + 1]]
    return True


def case(r, w):
    i = r.randrange(len(w))
    if w[i][0].islower():
        w[i] = w[i].capitalize()
    else:
        w[i] = w[i][0].lower() + w[i][1:]
    return w[i][0].isalpha()


def mark(r, w):
    if w[-1][-1] in ".?":
        w[-1] = w[-1][:-1]
        return True
    return False


def comma(r, w):
    at = [i for i, x in enumerate(w) if x.endswith(",")]
    if not at:
        return False
    i = r.choice(at)
    w[i] = w[i][:-1]
    return True


def repeated(r, w):
    at = [i for i, x in enumerate(w) if x in ("the", "a", "to", "of", "in", "is")]
    if not at:
        return False
    i = r.choice(at)
    w.insert(i, w[i])
    return True


KINDS = [confused, key, swapped, lost, doubled, apostrophe, article, ending, joined, case, mark, comma, repeated]


def main():
    r = random.Random(20261124)
    lines = [x.strip() for x in open("clean.txt") if x.strip()]
    with open("pairs.jsonl", "w") as f:
        for n, line in enumerate(lines):
            w = line.split()
            if n % 5 != 2:
                want, tries = r.choice((1, 1, 2)), 0
                while want > 0 and tries < 50:
                    tries += 1
                    want -= KINDS[(n + tries) % len(KINDS)](r, w) if want == 1 else r.choice(KINDS)(r, w)
            f.write(json.dumps({"input": " ".join(w), "expected": line}) + "\n")


if __name__ == "__main__":
    main()
