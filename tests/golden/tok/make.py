#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the tokenizer goldens with Hugging Face `tokenizers` (0.23.3 made the committed ones).

usage: make.py PROOF_DIR STORIES_DIR [OUT_DIR]
       make.py families [OUT_DIR]      see families.py
       make.py chats [OUT_DIR]         see chats.py

proof.jsonl, stories260k.jsonl: {"text", "ids", "plain"?, "bos"?}: ids with special tokens recognised; "plain" where they are not and it
differs; "bos" what add_special_tokens puts around it, where it differs.
variants.jsonl: {"name", "base", "patch", "cases": [[text, ids, decoded?], ...]}: ids with special tokens and BOS, "decoded" where
it is not the text; a base model's tokenizer.json with top-level keys replaced
("model" merged key by key, "vocab" too), so that every supported family is compared without its files.
"""
import copy
import json
import random
import sys
from tokenizers import Tokenizer

WORDS = """the a of to and in is it you that he was for on are with as his they be at one have this from or had by hot but some what there we
can out other were all your when up use word how said an each she which do their time if will way about many then them would write like so
these her long make thing see him two has look more day could go come did my sound no most number who over know water than call first
people may down side been now find any new work part take get place made live where after back little only round man year came show every
good me give our under name very through just form much great think say help low line before turn cause same mean differ move right boy old
too does tell sentence set three want air well also play small end put home read hand port large spell add even land here must big high such
follow act why ask men change went light kind off need house picture try us again animal point mother world near build self earth father
octet daemon tokenizer precision Lily Tom Timmy bird happy garden once upon""".split()
FIXED = ["", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \t \n ", "a", " a", "a ", " a ", "  a  b   c    d", "x\n y\n  z\n",
    "it's we're I've I'm you'll he'd don't IT'S We'Re", "'s't're've'm'll'd", "''", "'", "O'Reilly's", "1", "12", "123", "1234567890",
    "3.14159", "1,000,000", "0x1f", "2024-01-31 23:59:59", "v1.2.3-rc4", "Hello, world!", "Hello world", "hello   world", "HELLO",
    "int main(void)\n{\n\treturn 0;\n}\n", "for (i = 0; i < n; i++) { a[i] += b[i] * 2; }", "def f(x):\n    return x ** 2\n",
    "#include <stdio.h>", "if (a && b || !c) x->y = &z;", "{\"key\": [1, 2.5, null, true]}", "SELECT * FROM t WHERE a='b';",
    "<html><body class=\"x\">hi</body></html>", "a_b_c CamelCase snake_case kebab-case", "http://example.com/a?b=c&d=%20#e",
    "user@example.com", "\u00e9\u00e8\u00ea\u00eb", "na\u00efve caf\u00e9 \u00dcber stra\u00dfe", "e\u0301 a\u0308\u0323 o\u0302\u0301",
    "q\u0323\u0307 q\u0307\u0323", "\u212b \u2126 \ufb01 \u00bd \u2460 \u3392", "\u4f60\u597d\uff0c\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u30c6\u30b9\u30c8",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5", "\u1112\u1161\u11ab", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u0661\u0662\u0663", "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600", "\U0001f600\U0001f601 \U0001f602", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\u2764\ufe0f", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd",
    "\u00a0", "a\u00a0b", "\u2003x\u2003", "\u3000\u4e2d\u3000", "\u180e", "a\u180eb \u180e c", "\u200b", "\ufeffbom", "\u2028x\u2029", "\x85y",
    "\x00", "a\x00b", "\x01\x02\x1f\x7f", "\u2581", "\u2581a", "a\u2581b", "\u2581\u2581", " \u2581 ", "\u0120the", "\u010a", "\u00ad\u00a1\u00ff\u0100",
    "<0x41>", "<0xFF><0x00>", "<", "<|", "|>", "<|x|>", "\U0010ffff", "\ue000", "\ufffd", "\ufffe", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abababababababababababab", "the the the the", "thethethethe", "-----", "======", "...", "?!?!", "\u2026", "\u2014 \u2013 \u201cquoted\u201d \u2018x\u2019",
    "\u00b2\u00b3\u00b9 \u2155 \u2167", "\u017f's 'S '\u017f", "t\u0065\u0301\u0301\u0301", "tab\tsep\tvals\n1\t2\t3", "\n\n\n  \n\t\n x", "trailing   \n", "end\u2003\u2003"]
CHUNKS = ["\u00e9", "\u4e2d\u6587", "\U0001f642", "\u0639\u0631\u0628", "\u0301", "'s", "'ll", "42", "7", "  ", "\t", "\n", " \n ", "!", "...", "(", ")", "==", "->", "#", "\u2581", "\u00a0", "_", "\u30ab", "\ud55c", "\x00", "/*", "*/", "0.5", "A", "Zz"]


def lines(rng, specials, n=560):
    out = list(FIXED)
    for s in specials:
        out += [s, " " + s, s + " ", "a" + s + "b", "Hi " + s + " there", s + s, s[:-1], s[1:], s.upper(), "x  " + s + "  y"]
    while len(out) < n:
        kind = rng.randrange(5)
        if kind == 0:
            w = [rng.choice(WORDS) for _ in range(rng.randrange(3, 14))]
            out.append(w[0].capitalize() + " " + " ".join(w[1:]) + rng.choice(".!?"))
        elif kind == 1:
            out.append("".join(rng.choice(CHUNKS + specials + [" " + rng.choice(WORDS), rng.choice(WORDS)]) for _ in range(rng.randrange(2, 12))))
        elif kind == 2:
            out.append("".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xa0, 0x600), rng.randrange(0x2000, 0x2100), rng.randrange(0x4e00, 0x9fff),
                rng.randrange(0x1f300, 0x1f650)])) for _ in range(rng.randrange(1, 12))))
        elif kind == 3:
            out.append("%s %s %d%s%s = %s(%d, \"%s\");" % (rng.choice(["int", "let", "\tconst", "  x"]), rng.choice(WORDS), rng.randrange(10 ** rng.randrange(1, 7)),
                rng.choice(["", "  ", "\n", "\n\t"]), rng.choice("+-*/%"), rng.choice(WORDS), rng.randrange(1000), rng.choice(WORDS)))
        else:
            out.append("".join(rng.choice([" ", " ", "\n", "\t", "\r", "\u3000", "w", "\u00a0"]) for _ in range(rng.randrange(1, 12))))
    return list(dict.fromkeys(out))


def encode(tok, text, bos=False, plain=False):
    tok.encode_special_tokens = plain
    return tok.encode(text, add_special_tokens=bos).ids


def write(path, rows):
    with open(path, "w", encoding="ascii") as f:
        for r in rows:
            f.write(json.dumps(r, separators=(",", ":")) + "\n")
    print(path, len(rows))


def golden(directory, path, seed):
    tok = Tokenizer.from_file(directory + "/tokenizer.json")
    specials = [t.content for t in tok.get_added_tokens_decoder().values()]
    rows = []
    for text in lines(random.Random(seed), specials):
        ids, plain, bos = encode(tok, text), encode(tok, text, plain=True), encode(tok, text, bos=True)
        rows.append({"text": text, "ids": ids} | ({"plain": plain} if plain != ids else {}) | ({"bos": bos} if bos != ids else {}))
    write(path, rows)


def tokn(i, content, **kw):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False} | kw


def more(base, *tokens):
    """Added tokens with the ids Hugging Face gives them: the vocabulary's, else the next free ones."""
    out, vocab, nxt = list(base["added_tokens"]), base["model"]["vocab"], len(base["model"]["vocab"])
    for content, kw in tokens:
        out.append(tokn(vocab.get(content, nxt), content, **kw))
        nxt += content not in vocab
    return {"added_tokens": out}


def split(pat, behavior, invert=False, regex=True):
    return {"type": "Split", "pattern": {"Regex" if regex else "String": pat}, "behavior": behavior, "invert": invert}


BL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def seq(*parts):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)}}


def template(pre, post):
    sp = lambda t: {"SpecialToken": {"id": t, "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [sp(t) for t, _ in pre] + [{"Sequence": {"id": "A", "type_id": 0}}] + [sp(t) for t, _ in post], "pair": [],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in pre + post}}


def variants(proof, stories):
    sa = stories["added_tokens"]
    bl = lambda **kw: {"pre_tokenizer": BL | kw}
    yield "gpt2", "proof", bl(use_regex=True)
    yield "gpt2-prefix-space", "proof", bl(use_regex=True, add_prefix_space=True)
    yield "split-then-prefix-space", "proof", seq(split(" ", "MergedWithPrevious", regex=False), BL | {"add_prefix_space": True})
    yield "llama3", "proof", seq(split(LLAMA3, "Isolated"), BL) | {"model": {"ignore_merges": True}} | {"post_processor": {"type": "Sequence",
        "processors": [BL, template([("<|in|>", 1)], [("<|end|>", 3)])]}}
    yield "qwen2-nfc", "proof", seq(split(QWEN2, "Isolated"), BL) | {"normalizer": {"type": "NFC"}}
    yield "o200k", "proof", seq(split(O200K, "Removed", invert=True), BL)
    yield "smollm-digits", "proof", seq({"type": "Digits", "individual_digits": True}, BL | {"use_regex": True})
    yield "digit-runs", "proof", seq({"type": "Digits", "individual_digits": False}, BL)
    for b in ("Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"):
        yield "split-" + b, "proof", seq(split(r"\s|[.!?]|\d", b), BL)
        yield "split-invert-" + b, "proof", seq(split(r"[a-z]+", b, invert=True), BL)
        yield "split-string-" + b, "proof", seq(split("e", b, regex=False), BL)
    yield "split-empty-matches", "proof", seq(split(r"\s*", "Isolated"), BL)
    yield "split-lines", "proof", seq(split(r"^ |o$|\w+", "MergedWithNext"), BL)
    for n in ("NFC", "NFD", "NFKC", "NFKD"):
        yield n, "proof", {"normalizer": {"type": n}}
    yes = lambda *names: {n: True for n in names}
    yield "added", "proof", more(proof, ("lo", yes("single_word")), ("<L>", yes("lstrip")), ("<R>", yes("rstrip")), ("<LR>", yes("lstrip", "rstrip", "special")),
        ("<", {}), ("<|en", {}), ("\u00e9", {}), ("  ", {}), ("\n", {}))
    yield "added-normalized", "proof", more(proof, ("lo", yes("normalized")), ("caf\u0065\u0301", yes("normalized")), ("wor", yes("normalized", "single_word")),
        ("<N>", yes("normalized", "special", "lstrip"))) | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"},
        {"type": "Replace", "pattern": {"String": "o"}, "content": "00"}]}}
    yield "sp-added-normalized", "stories260k", more(stories | {"added_tokens": sa[:2] + [sa[2] | yes("normalized")]}, ("the", yes("normalized")), ("a", {}))
    yield "sp-fuse-unk", "stories260k", {"model": {"byte_fallback": False}}
    yield "sp-unk", "stories260k", {"model": {"byte_fallback": False, "fuse_unk": False}}
    yield "sp-no-unk", "stories260k", {"model": {"byte_fallback": False, "unk_token": None}}
    yield "sp-ignore-merges", "stories260k", {"model": {"ignore_merges": True}}
    dec = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    for scheme in ("always", "first", "never"):
        for sp in (True, False):
            m = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": sp}
            yield "metaspace-%s-%s" % (scheme, sp), "stories260k", {"normalizer": None, "pre_tokenizer": m, "decoder": dec | {"prepend_scheme": scheme}}
    yield "gemma", "stories260k", {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": split(" ", "MergedWithPrevious", regex=False), "decoder": {"type": "Sequence", "decoders": stories["decoder"]["decoders"][:3]}}
    yield "templates", "stories260k", {"post_processor": {"type": "Sequence", "processors": [template([("<s>", 1), ("</s>", 2)], [("</s>", 2)])]}}


def patched(base, patch):
    j = copy.deepcopy(base)
    for k, v in patch.items():
        j[k] = j[k] | v if k == "model" else v
    return j


def case(tok, text):
    ids = encode(tok, text, bos=True)
    decoded = tok.decode(ids, skip_special_tokens=False)
    if "\ufffd" not in text:  # Hugging Face takes the e acute of an added token for a byte-level spelling; octet gives the token's text
        decoded = decoded.replace("\ufffd", "\u00e9")
    return [text, ids] + ([decoded] if decoded != text else [])


def write_variants(proof_dir, stories_dir, path):
    bases = {"proof": json.load(open(proof_dir + "/tokenizer.json")), "stories260k": json.load(open(stories_dir + "/tokenizer.json"))}
    rows = []
    for i, (name, base, patch) in enumerate(variants(bases["proof"], bases["stories260k"])):
        tok = Tokenizer.from_str(json.dumps(patched(bases[base], patch)))
        added = [t.content for t in tok.get_added_tokens_decoder().values()]
        rng = random.Random(1000 + i)
        texts = lines(rng, added, 400)
        always = FIXED[21:25]
        if "added" in name:
            texts = [t for t in texts if any(a in t for a in added)]
            always = ["lo lo. loo slo lo", "a <L>b<L>  <L>", "x<R>  y <R>\n <R>", " <LR>  <LR> z", "\u4e2dlo lo\u4e2d lo_", "<R>   lo", "w <LR>\t<L>\t<R>\tw", "<|end", "<|enx",
                "hello world cafe\u0301 caf\u00e9", "lolo 00", "  <N>  the a</s> thea"]
        pick = always + rng.sample(texts, min(len(texts), 28))
        rows.append({"name": name, "base": base, "patch": patch, "cases": [case(tok, t) for t in dict.fromkeys(pick)]})
    write(path, rows)


def main():
    if sys.argv[1] in ("families", "chats"):
        __import__(sys.argv[1]).write(sys.argv[2] if len(sys.argv) > 2 else ".")
        return
    proof, stories = sys.argv[1:3]
    out = sys.argv[3] if len(sys.argv) > 3 else "."
    golden(proof, out + "/proof.jsonl", 1)
    golden(stories, out + "/stories260k.jsonl", 2)
    write_variants(proof, stories, out + "/variants.jsonl")


main()
