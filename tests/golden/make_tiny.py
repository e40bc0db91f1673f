#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the goldens of small models with random weights, one file for each architecture. Needs numpy.

  make_tiny.py OUT_DIR [--models DIR]

A golden holds config.json, how to make each weight and the logits of reference.py at every position, so that
tests/test_golden.c makes the same model without Python. Element i of tensor t of the list is
  j = (splitmix64(t << 32 | i) >> 56) - 128, from -128 to 127
  a matrix or bias: j * 2^-shift; a norm (shift -1): 1 + (j & ~1) / 256
all of which are exact in BF16. --models keeps the directories.
"""
import argparse, json, os, shutil, struct, tempfile
import numpy as np
from reference import Model

PLANS = ["bf16", "fp8w", "fp8"]
POSITIONS = 72
PROBES = 6

BASE = {"hidden_size": 60, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 10, "vocab_size": 67, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 2, "torch_dtype": "bfloat16"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}

MODELS = {
    # wavelengths 6.3 (kept), 40 (between 16 and 64), 250 and above (stretched)
    "llama3": dict(BASE, architectures=["LlamaForCausalLM"], model_type="llama", rope_scaling=LLAMA3),
    "linear": dict(BASE, architectures=["LlamaForCausalLM"], model_type="llama",
                   rope_scaling={"type": "linear", "factor": 2.5}, attention_bias=True, mlp_bias=True),
    "mistral": dict(BASE, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None, head_dim=14,
                    num_hidden_layers=3),
    "mistral-window": dict(BASE, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=21),
    "qwen2": dict({k: v for k, v in BASE.items() if k != "head_dim"}, architectures=["Qwen2ForCausalLM"], model_type="qwen2",
                  rope_theta=1000000.0, use_sliding_window=False, sliding_window=16, tie_word_embeddings=True, hidden_size=72),
    "qwen3": dict(BASE, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=16, rope_theta=1000000.0,
                  attention_bias=False, tie_word_embeddings=True),
    "qwen3-bias": dict(BASE, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=18, attention_bias=True),
    "smollm": dict({k: v for k, v in BASE.items() if k != "head_dim"}, architectures=["LlamaForCausalLM"], model_type="llama",
                   hidden_size=54, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=3,
                   tie_word_embeddings=True, attention_bias=False),
    "smollm3": dict({k: v for k, v in BASE.items() if k != "head_dim"}, architectures=["SmolLM3ForCausalLM"], model_type="smollm3",
                    num_hidden_layers=3, no_rope_layers=[1, 0, 1], tie_word_embeddings=True, use_sliding_window=False,
                    bos_token_id=1, pad_token_id=0),
}


def tensors(c):
    """[name, dims, shift]"""
    h, m, v, n, kv = (c[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads"))
    hd = c.get("head_dim") or h // n
    arch, out = c["architectures"][0], [["model.embed_tokens.weight", [v, h], 7]]
    biased = lambda part: (arch == "Qwen2ForCausalLM" and part in "qkv") or (c.get("attention_bias") and part in "qkvo")
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out += [[p + "input_layernorm.weight", [h], -1], [p + "post_attention_layernorm.weight", [h], -1]]
        for part, a, b in ("q", n * hd, h), ("k", kv * hd, h), ("v", kv * hd, h), ("o", h, n * hd):
            out.append([p + f"self_attn.{part}_proj.weight", [a, b], 9])
            if biased(part):
                out.append([p + f"self_attn.{part}_proj.bias", [a], 7])
        if arch == "Qwen3ForCausalLM":
            out += [[p + "self_attn.q_norm.weight", [hd], -1], [p + "self_attn.k_norm.weight", [hd], -1]]
        for part, a, b in ("gate", m, h), ("up", m, h), ("down", h, m):
            out.append([p + f"mlp.{part}_proj.weight", [a, b], 9])
            if c.get("mlp_bias"):
                out.append([p + f"mlp.{part}_proj.bias", [a], 7])
    out.append(["model.norm.weight", [h], -1])
    if not c["tie_word_embeddings"]:
        out.append(["lm_head.weight", [v, h], 8])
    return out


def splitmix64(x):
    with np.errstate(over="ignore"):
        z = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def elements(t, n, shift):
    j = (splitmix64(np.uint64(t << 32) | np.arange(n, dtype=np.uint64)) >> np.uint64(56)).astype(np.int64) - 128
    return 1 + (j & ~1) / 256.0 if shift < 0 else j * 2.0**-shift


def write_model(path, c, listed):
    header, data, at = {}, [], 0
    for t, (name, dims, shift) in enumerate(listed):
        f = elements(t, int(np.prod(dims)), shift).astype(np.float32)
        bits = f.view(np.uint32)
        assert not (bits & 0xFFFF).any(), name
        data.append((bits >> 16).astype("<u2").tobytes())
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + len(data[-1])]}
        at += len(data[-1])
    head = json.dumps(header).encode()
    os.makedirs(path, exist_ok=True)
    with open(path + "/model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head + b"".join(data))
    with open(path + "/config.json", "w") as f:
        json.dump(c, f, indent=1)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("out")
    ap.add_argument("--models")
    a = ap.parse_args()
    keep = a.models or tempfile.mkdtemp()
    for name, c in MODELS.items():
        listed, path = tensors(c), f"{keep}/{name}"
        write_model(path, c, listed)
        tokens = [int(v) for v in splitmix64(np.arange(POSITIONS, dtype=np.uint64)) % np.uint64(c["vocab_size"])]
        probe = [int(v) for v in np.linspace(0, c["vocab_size"] - 1, PROBES)]
        logits = {}
        for plan in PLANS:
            m = Model(path, plan if plan == "bf16" else plan + "-all")
            logits[plan] = [[float(f"{v:.5g}") for v in row[probe]] for row in m.rows(tokens, [])]
        with open(f"{a.out}/tiny-{name}.json", "w") as f:
            json.dump({"config": c, "tensors": listed, "tokens": tokens, "probe": probe, "logits": logits}, f,
                      separators=(",", ":"))
            f.write("\n")
        print(f"{name}: bf16 logits from {np.min(logits['bf16']):.3g} to {np.max(logits['bf16']):.3g}")
    if not a.models:
        shutil.rmtree(keep)


if __name__ == "__main__":
    main()
