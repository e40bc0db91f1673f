#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A Llama checkpoint of a given shape with random weights: for speed only. Needs nothing but Python.

  synth.py 8b|1b|tiny OUT_DIR

Weights are +-0.004 to +-0.03 in BF16, pieces of one random buffer; norms are 1. The tokenizer is byte-level BPE.
"""
import json, os, random, struct, sys

SHAPES = {
    "8b": dict(hidden=4096, layers=32, heads=32, kv=8, hd=128, ffn=14336, vocab=128256, ctx=8192, tied=False),
    "1b": dict(hidden=2048, layers=16, heads=32, kv=8, hd=64, ffn=8192, vocab=128256, ctx=8192, tied=True),
    "tiny": dict(hidden=128, layers=2, heads=4, kv=2, hd=64, ffn=256, vocab=2048, ctx=2048, tied=True),
}


def base(n):
    """n BF16 values, little-endian"""
    r = random.Random(1)
    high = bytes(0x3B + (i & 1) | (0x80 if i & 2 else 0) for i in range(256))
    b = bytearray(2 * n)
    b[0::2] = r.randbytes(n)
    b[1::2] = r.randbytes(n).translate(high)
    return bytes(b)


def tensors(s):
    h, q, kv, f = s["hidden"], s["heads"] * s["hd"], s["kv"] * s["hd"], s["ffn"]
    out = [("model.embed_tokens.weight", (s["vocab"], h)), ("model.norm.weight", (h,))]
    if not s["tied"]:
        out.append(("lm_head.weight", (s["vocab"], h)))
    for l in range(s["layers"]):
        p = f"model.layers.{l}."
        out += [(p + "input_layernorm.weight", (h,)), (p + "post_attention_layernorm.weight", (h,))]
        for n, shape in (("self_attn.q", (q, h)), ("self_attn.k", (kv, h)), ("self_attn.v", (kv, h)), ("self_attn.o", (h, q)),
                         ("mlp.gate", (f, h)), ("mlp.up", (f, h)), ("mlp.down", (h, f))):
            out.append((f"{p}{n}_proj.weight", shape))
    return out


def size(shape):
    n = 2
    for d in shape:
        n *= d
    return n


def write_weights(path, list_):
    header, at = {}, 0
    for name, shape in list_:
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size(shape)]}
        at += size(shape)
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    buf = base(16 << 20)
    with open(path, "wb", buffering=0) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for i, (name, shape) in enumerate(list_):
            left, at = size(shape), 2 * (i * 7919 % (8 << 20))
            if len(shape) == 1:
                f.write(b"\x80\x3f" * shape[0])
                continue
            while left > 0:
                left -= f.write(memoryview(buf)[at:at + left])
                at = 0


def byte_chars():
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    out, n = {b: chr(b) for b in keep}, 0
    for b in range(256):
        if b not in out:
            out[b] = chr(256 + n)
            n += 1
    return [out[b] for b in range(256)]


def write_tokenizer(path, vocab):
    special = ["<|begin|>", "<|end|>"]
    toks, merges, letters = byte_chars(), [], "etaoinshrdlucmfwypvbgkjqxz"
    words = list(letters)
    for w in words:  # longer and longer: each joins a known word and a letter
        for c in letters:
            if len(toks) == vocab - len(special):
                break
            merges.append(f"{w} {c}")
            toks.append(w + c)
            words.append(w + c)
    json.dump({"version": "1.0", "added_tokens": [
        {"id": len(toks) + i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, s in enumerate(special)], "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
                  "vocab": {t: i for i, t in enumerate(toks)}, "merges": merges}}, open(path, "w"))


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    s, d = SHAPES[sys.argv[1]], sys.argv[2]
    os.makedirs(d, exist_ok=True)
    json.dump({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": s["hidden"], "intermediate_size": s["ffn"],
               "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"], "num_key_value_heads": s["kv"], "head_dim": s["hd"],
               "vocab_size": s["vocab"], "max_position_embeddings": s["ctx"], "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
               "tie_word_embeddings": s["tied"], "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
               "bos_token_id": s["vocab"] - 2, "eos_token_id": s["vocab"] - 1, "torch_dtype": "bfloat16"}, open(d + "/config.json", "w"))
    write_tokenizer(d + "/tokenizer.json", s["vocab"])
    write_weights(d + "/model.safetensors", tensors(s))


main()
