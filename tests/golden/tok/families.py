# SPDX-License-Identifier: Apache-2.0
"""The tokenizer families: small tokenizers with a family's exact configuration, trained on the lines made here, and what Hugging Face
`tokenizers` makes of 2,400 lines. Run by `make.py families OUT_DIR`.

families/NAME.json: the tokenizers (their tokenizer.json). families/lines.jsonl: the lines, a JSON string each. families/hashes.txt: a line for
each of them, a column for each name in its first line: FNV-1a 64 of three runs, folded to 32 bits by xor of its halves, of
 - the ids, as four bytes each, little-endian, with special tokens recognised and what add_special_tokens puts around,
 - 0xffffffff and the ids with special tokens taken as text and nothing around,
 - 0xffffffff and the UTF-8 bytes that these decode to.
"""
import collections
import json
import os
import random
import re
import unicodedata
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = """The old lighthouse keeper counted the ships twice, because nobody had told him how many there should be.
I'm sure we'll find out why they've gone; she'd said it's nothing, but it wasn't.
WE'RE LATE, THEY'LL SAY, AND I'VE NO EXCUSE. IT'S TRUE, ISN'T IT?
Der schnelle Zug f\u00e4hrt \u00fcber die gro\u00dfe Br\u00fccke nach K\u00f6ln, \u00dcbermorgen vielleicht auch weiter.
Le gar\u00e7on a mang\u00e9 une cr\u00eape \u00e0 l'\u00e9rable; c'\u00e9tait d\u00e9j\u00e0 l'\u00e9t\u00e9, n'est-ce pas ?
El ni\u00f1o pregunt\u00f3: \u00bfcu\u00e1ndo llegar\u00e1 la cig\u00fce\u00f1a? \u00a1Ma\u00f1ana!
Zo\u00eb's co\u00f6perative caf\u00e9 na\u00efvely served 12 cr\u00e8mes br\u00fbl\u00e9es for \u20ac4.50 each.
W Szczebrzeszynie chrz\u0105szcz brzmi w trzcinie, a \u017c\u00f3\u0142w \u015bpi.
P\u0159\u00edli\u0161 \u017elu\u0165ou\u010dk\u00fd k\u016f\u0148 \u00fap\u011bl \u010f\u00e1belsk\u00e9 \u00f3dy.
\u0130stanbul'da ya\u011fmur ya\u011f\u0131yor, \u0131l\u0131k bir g\u00fcn; i\u015fler iyi.
Ti\u1ebfng Vi\u1ec7t c\u00f3 nhi\u1ec1u d\u1ea5u thanh: m\u00e1, m\u00e0, m\u1ea3, m\u00e3, m\u1ea1.
\u041e\u0434\u043d\u0430\u0436\u0434\u044b \u0432 \u0441\u0442\u0443\u0434\u0451\u043d\u0443\u044e \u0437\u0438\u043c\u043d\u044e\u044e \u043f\u043e\u0440\u0443 \u044f \u0438\u0437 \u043b\u0435\u0441\u0443 \u0432\u044b\u0448\u0435\u043b; \u0431\u044b\u043b \u0441\u0438\u043b\u044c\u043d\u044b\u0439 \u043c\u043e\u0440\u043e\u0437.
\u0412\u0438 \u0431\u0430\u0447\u0438\u043b\u0438 \u0457\u0436\u0430\u043a\u0430? \u041d\u0456, \u0430\u043b\u0435 \u043c\u0438 \u0447\u0443\u043b\u0438 \u0491\u0430\u0432\u0443.
\u0397 \u03b8\u03ac\u03bb\u03b1\u03c3\u03c3\u03b1 \u03ae\u03c4\u03b1\u03bd \u03ae\u03c1\u03b5\u03bc\u03b7, \u03ba\u03b9 \u03bf \u03bf\u03c5\u03c1\u03b1\u03bd\u03cc\u03c2 \u03b3\u03b1\u03bb\u03ac\u03b6\u03b9\u03bf\u03c2.
\u05d4\u05d9\u05dc\u05d3 \u05e8\u05e5 \u05d0\u05dc \u05d4\u05d9\u05dd, \u05d5\u05d4\u05db\u05dc\u05d1 \u05d0\u05d7\u05e8\u05d9\u05d5. \u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd
\u0643\u0627\u0646 \u0627\u0644\u0628\u064a\u062a \u0627\u0644\u0642\u062f\u064a\u0645 \u0639\u0644\u0649 \u0627\u0644\u062a\u0644\u060c \u0648\u0641\u064a\u0647 \u0663\u0664 \u0646\u0627\u0641\u0630\u0629. \u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f
\u06af\u0631\u0628\u0647 \u0631\u0648\u06cc \u062f\u06cc\u0648\u0627\u0631 \u0646\u0634\u0633\u062a\u0647\u200c\u0627\u0633\u062a \u0648 \u06f1\u06f2 \u067e\u0631\u0646\u062f\u0647 \u0645\u06cc\u200c\u0628\u06cc\u0646\u062f.
\u0928\u0926\u0940 \u0915\u0947 \u0915\u093f\u0928\u093e\u0930\u0947 \u090f\u0915 \u092a\u0941\u0930\u093e\u0928\u093e \u092a\u0947\u0921\u093c \u0939\u0948; \u0935\u0939\u093e\u0901 \u0967\u0968\u0969 \u0924\u094b\u0924\u0947 \u0930\u0939\u0924\u0947 \u0939\u0948\u0902\u0964
\u0986\u09ae\u09be\u09b0 \u09b8\u09cb\u09a8\u09be\u09b0 \u09ac\u09be\u0982\u09b2\u09be \u09e7\u09e8
\u0bae\u0bb4\u0bc8 \u0baa\u0bc6\u0baf\u0bcd\u0b95\u0bbf\u0bb1\u0ba4\u0bc1, \u0b95\u0bc1\u0bb4\u0ba8\u0bcd\u0ba4\u0bc8 \u0b9a\u0bbf\u0bb0\u0bbf\u0b95\u0bcd\u0b95\u0bbf\u0bb1\u0ba4\u0bc1.
\u0e27\u0e31\u0e19\u0e19\u0e35\u0e49\u0e1d\u0e19\u0e15\u0e01\u0e2b\u0e19\u0e31\u0e01\u0e21\u0e32\u0e01 \u0e40\u0e23\u0e32\u0e08\u0e30\u0e44\u0e21\u0e48\u0e44\u0e1b\u0e15\u0e25\u0e32\u0e14 \u0e51\u0e52\u0e53
\u4eca\u5929\u7684\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u5427\u3002\u4e00\u5171\u67093\u4e2a\u4eba\u3001\uff12\u53ea\u72d7\u3002
\u732b\u306f\u5eca\u4e0b\u3067\u5bdd\u3066\u3044\u308b\u3002\u30b3\u30fc\u30d2\u30fc\u3092\uff12\u676f\u3001\u30d1\u30f3\u3092\u4e00\u3064\u304f\u3060\u3055\u3044\u3002
\uac15\uc544\uc9c0\uac00 \ub9c8\ub2f9\uc5d0\uc11c \ub6f0\uc5b4\ub180\uace0 \uc788\ub2e4. \uac12\uc740 3,000\uc6d0\uc774\uc5d0\uc694!
\u10d7\u10d1\u10d8\u10da\u10d8\u10e1\u10d8 \u10da\u10d0\u10db\u10d0\u10d6\u10d8\u10d0, \u0535\u0580\u0587\u0561\u0576\u0568 \u0576\u0578\u0582\u0575\u0576\u057a\u0565\u057d:
int main(int argc, char **argv)\\n{\\n\\tfor (int i = 0; i < argc; i++)\\n\\t\\tprintf("%s\\\\n", argv[i]);\\n\\treturn 0;\\n}
def fib(n):\\n    a, b = 0, 1\\n    while n > 0:\\n        a, b, n = b, a + b, n - 1\\n    return a
SELECT name, COUNT(*) AS n FROM users WHERE age >= 21 AND city != 'Oslo' GROUP BY name;
<div class="row">\\r\\n  <a href='/x?y=1&amp;z=2#top'>it's</a>\\r\\n</div>\\r\\n
{"id": 17, "tags": ["a", "b"], "ratio": -0.125e-3, "ok": true, "none": null}
if (x->y != NULL && !(flags & ~0x1fULL)) { *p++ |= 1 << 3; } // don't touch
https://example.org/a/b_c-d.html?q=100%25&lang=fr-CA and user.name+tag@example.co.uk
$ ls -la /usr/local/bin | grep -v '^d' | awk '{print $9}' > out.txt 2>&1
x = [i**2 for i in range(10) if i % 3 == 0]  # squares
fn main() { let v: Vec<u8> = b"\\\\x00\\\\xff".to_vec(); println!("{:?}", v); }
camelCaseName HTTPServerError snake_case_name SCREAMING_CASE iPhone15ProMax x86_64 IPv6
1 12 123 1234 12345 123456 1234567 3.14159 1,000,000.00 2024-02-29T23:59:59Z +1-555-0199 0xDEADBEEF 6.02e23""".replace("\\r", "\r").replace("\\n", "\n").replace("\\t", "\t").split("\n")
SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r\n\r\n", "\r", "\u00a0", "\u3000", "\u2003", "\u2009", "\u2028", "\u2029", "\x85", "\v", "\f", "    ", "\t\t", " \n", "\n ", "\u200a ", "\u202f", "\u205f", "\u1680"]
EMOJI = ["\U0001f600", "\U0001f602", "\U0001f680", "\u2764\ufe0f", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f469\U0001f3fd\u200d\U0001f4bb", "\U0001f44d\U0001f3fb", "\U0001f1ee\U0001f1f8", "\U0001f1eb\U0001f1ee\U0001f1f8", "1\ufe0f\u20e3",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", "\u2615", "\u00a9\ufe0f", "\u2122", "\u200d", "\ufe0f"]
MARKS = ["e\u0301", "a\u0308\u0304", "o\u0323\u0302", "q\u0307\u0323", "\u1e9b\u0323", "n\u0303", "A\u030a", "\u212b", "\u2126", "\u1112\u1161\u11ab", "\u0915\u093c", "\u0958", "\u0301", "\u0327\u0301x", "\ufb01", "\u0344", "\u2adc", "\u0f73", "Z\u0351\u036b\u0343\u036a\u0302\u036b", "\u00e9", "\u1ea5", "\u30ab\u3099", "\ufb1d"]
DIGITS = ["0", "7", "42", "007", "1234", "99999", "1234567890", "\u0663\u0664\u0665", "\u096b", "\uff11\uff12\uff13\uff14", "\u00b2\u00b3", "\u00bd", "\u2167", "\u2460\u2461", "\u3007", "\U0001d7d8\U0001d7d9", "1.5", "1,000", "-3", "0x1F", "1e9", "10%", "\u00b9\u2044\u2082", "\u4e09\u5341"]
BITS = ["'s", "'S", "'t", "'T", "'re", "'RE", "'Re", "'ve", "'VE", "'m", "'M", "'ll", "'LL", "'lL", "'d", "'D", "'\u017f", "\u2019s", "''", "'", "\"", "(", ")", "[", "]", "{", "}", "<", ">", "=", "==", "!=", "->", "...", "\u2026", "--", "\u2014", "/", "//", "\\", "_", "__", "#", "##", "@",
    "$", "%", "&", "*", "**", "+", ",", ";", ":", "?", "!", "|", "||", "~", "`", "```", "^", "\u2581", "\u2581\u2581", "\u0120", "\u010a", "\x00", "\x01", "\x1c", "\x7f", "\ufeff", "\u200b", "\u00ad", "\u180e", "\ufffd", "\ue000", "\U0010fffd", "<0x41>", "<0xE2>", "\u02bb", "\u02bcs", "\u01c5", "\u2160", "\u216f", "\u24d0", "\u00aa", "\u212a", "\u0130", "\u0131"]
TOKENS = ["<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>", "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "<|L|>", "<|R|>", "<|LR|>",
    "word", "<n\u00e9>", "<|im_", "im_end|>", "<|", "|>", "</", "<s", "[IN", "ST]", "<repo_name>"]


def words():
    return re.findall(r"\S+", " ".join(SENTENCES))


def any_char(rng):
    """A character that Unicode 14 has assigned, so that the tables of all the libraries agree on it."""
    while True:
        c = chr(rng.choice([rng.randrange(32, 0x250), rng.randrange(0x250, 0x1400), rng.randrange(0x1e00, 0x2c00), rng.randrange(0x3000, 0xa000), rng.randrange(0xa000, 0xffff), rng.randrange(0x10000, 0x20000)]))
        if unicodedata.category(c) not in ("Cn", "Cs") and unicodedata.unidata_version == "14.0.0":
            return c


def make_lines(seed, n):
    rng, ws = random.Random(seed), words()
    pick = lambda v, a, b: [rng.choice(v) for _ in range(rng.randrange(a, b))]
    kinds = [
        lambda: " ".join(pick(ws, 2, 9)),
        lambda: rng.choice(SENTENCES)[rng.randrange(0, 12):][: rng.randrange(4, 60)],
        lambda: "".join(pick(SPACES, 1, 7)) + rng.choice(ws) + "".join(pick(SPACES, 0, 5)) + rng.choice(ws) + "".join(pick(SPACES, 0, 4)),
        lambda: "".join(pick(SPACES, 1, 10)),
        lambda: "".join(x for w in pick(ws, 1, 5) for x in (w, rng.choice(BITS), rng.choice(["", " "]))),
        lambda: "".join(pick(EMOJI + EMOJI + [" ", "a", "!"], 1, 8)),
        lambda: "".join(x for d in pick(DIGITS, 1, 6) for x in (d, rng.choice(["", "", " ", "a", ".", "\n"]))),
        lambda: "".join(x for m in pick(MARKS, 1, 6) for x in (m, rng.choice(["", "", " ", "b"]))),
        lambda: "".join(pick(BITS, 1, 9)),
        lambda: "".join(any_char(rng) for _ in range(rng.randrange(1, 10))),
        lambda: "".join(x for t in pick(TOKENS, 1, 4) for x in (rng.choice(["", " ", "  ", "\n", "a", "\u00e9 ", rng.choice(ws)]), t, rng.choice(["", " ", " \n", "z", ".", rng.choice(ws)]))),
        lambda: "".join(pick(SPACES + EMOJI + MARKS + DIGITS + BITS + ws + TOKENS, 2, 12)),
        lambda: rng.choice("abe \n\t.1-=") * rng.randrange(2, 40) + rng.choice(ws),
        lambda: "%s%s(%s, %d)%s" % (rng.choice(["", "\t", "    ", "\r\n  "]), rng.choice(ws), rng.choice(ws).upper(), rng.randrange(10 ** rng.randrange(1, 8)), rng.choice([";", " {\n", "  # " + rng.choice(ws), "\r\n"])),
    ]
    out = {"": 0}
    while len(out) < n:
        out[rng.choice(kinds)()] = 0
    return list(out)


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = [r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]


def byte_level(use_regex=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def isolated(*res):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r), "isolated") for r in res] + [byte_level()])


def special(*names, **kw):
    return [AddedToken(n, special=True, **{"normalized": False} | kw) for n in names]


def plain(*names, **kw):
    return [AddedToken(n, special=False, **{"normalized": False} | kw) for n in names]


def bos(tok, name):
    return processors.TemplateProcessing(single=name + " $A", pair=name + " $A " + name + " $B", special_tokens=[(name, tok.token_to_id(name))])


def train_bytes(pre, specials, vocab=1400, normalizer=None, ignore_merges=False):
    tok = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tok.normalizer = normalizer
    tok.pre_tokenizer, tok.decoder, tok.post_processor = pre, decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    tok.train_from_iterator(make_lines(7, 5000), trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    for s in specials:
        (tok.add_special_tokens if s.special else tok.add_tokens)([s])
    return tok


def train_sentencepiece(specials, vocab=1500):
    """Pieces do not cross spaces in training; the file then has no such pre-tokenizer, as the converted ones have not."""
    bytes_ = ["<0x%02X>" % b for b in range(256)]
    tok = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    names = [s.content for s in specials]
    lines = [t for t in make_lines(7, 5000) if "<0x" not in t]  # or merges would spell byte tokens
    count = collections.Counter("".join(lines).replace("\0", ""))
    letters = set(sorted(count, key=lambda ch: (-count[ch], ch))[:500])  # the trainer's own limit breaks ties at random
    tok.train_from_iterator(["".join(ch for ch in t if ch in letters) for t in lines], trainers.BpeTrainer(vocab_size=vocab, special_tokens=names + bytes_, show_progress=False))
    j = json.loads(tok.to_str())
    j["added_tokens"] = j["added_tokens"][:len(names)]
    tok = Tokenizer.from_str(json.dumps(j))
    tok.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tok


def gpt2():
    return train_bytes(byte_level(True), special("<|endoftext|>", normalized=True))


def llama3():
    tok = train_bytes(isolated(LLAMA3), special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ignore_merges=True)
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos(tok, "<|begin_of_text|>")])
    return tok


def qwen():
    return train_bytes(isolated(QWEN), special("<|endoftext|>", "<|im_start|>", "<|im_end|>") + plain("<tool_call>", "</tool_call>", "<think>", "</think>"), normalizer=normalizers.NFC())


def smollm():
    pre = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])
    return train_bytes(pre, special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"))


def tekken():
    tok = train_bytes(isolated(TEKKEN), special("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"), ignore_merges=True)
    tok.post_processor = bos(tok, "<s>")
    return tok


def deepseek():
    return train_bytes(isolated(*DEEPSEEK), special("<|endoftext|>"), vocab=1000)


def added():
    """Every rule of an added token, in a normalizer that changes them."""
    return train_bytes(byte_level(True), special("<|endoftext|>") + special("<|L|>", lstrip=True) + plain("<|R|>", rstrip=True) + special("<|LR|>", lstrip=True, rstrip=True, normalized=True)
        + plain("word", single_word=True) + plain("the", single_word=True, normalized=True) + plain("<n\u00e9>", normalized=True) + plain("   ", "\n\n") + plain("\t\t", lstrip=True),
        vocab=700, normalizer=normalizers.NFD())


def llama2():
    tok = train_sentencepiece(special("<unk>", "<s>", "</s>"))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tok.pre_tokenizer = None
    tok.post_processor = bos(tok, "<s>")
    return tok


def mistral():
    tok = train_sentencepiece(special("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    tok.post_processor = bos(tok, "<s>")
    return tok


FAMILIES = [gpt2, llama3, qwen, smollm, tekken, deepseek, added, llama2, mistral]


def fnv(h, data):
    for b in data:
        h = (h ^ b) * 0x100000001b3 & 0xffffffffffffffff
    return h


def row(tok, text):
    le = lambda ids: b"".join(i.to_bytes(4, "little") for i in ids)
    tok.encode_special_tokens = False
    h = fnv(0xcbf29ce484222325, le(tok.encode(text, add_special_tokens=True).ids))
    tok.encode_special_tokens = True
    ids = tok.encode(text, add_special_tokens=False).ids
    h = fnv(h, b"\xff\xff\xff\xff" + le(ids) + b"\xff\xff\xff\xff" + tok.decode(ids, skip_special_tokens=False).encode())
    return "%08x" % (h >> 32 ^ h & 0xffffffff)


def write(out):
    out += "/families"
    os.makedirs(out, exist_ok=True)
    lines, columns = make_lines(11, 2400), []
    for f in FAMILIES:
        tok = f()
        with open("%s/%s.json" % (out, f.__name__), "w", encoding="utf-8") as file:
            json.dump(json.loads(tok.to_str()), file, ensure_ascii=False, separators=(",", ":"))
        columns.append([row(tok, t) for t in lines])
    with open(out + "/lines.jsonl", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(t, ensure_ascii=False) + "\n" for t in lines)
    with open(out + "/hashes.txt", "w", encoding="ascii") as file:
        file.write(" ".join(f.__name__ for f in FAMILIES) + "\n")
        file.writelines(" ".join(r) + "\n" for r in zip(*columns))
    print(out, len(lines), "lines,", len(FAMILIES), "families")
