#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""An independent float64 forward pass of a model directory (Llama, Mistral, Qwen2, Qwen3, SmolLM3) under octet's formats.
Needs numpy.

  reference.py MODEL_DIR --plan bf16|fp8|fp8w|fp8t|fp8b|FORMAT-all|exact[+kv8] --tokens N [--eos ID] --out FILE PROMPT_IDS...

Each PROMPT_IDS is a comma list of token ids, one case each. Greedy decoding. Writes one JSON
object: {"plan", "cases": [{"prompt", "tokens", "margins", "probe": [ids], "logits": [[...] per token]}]}.
margins: best minus second logit of each step; logits: those of the probe ids, at each step.

Weights are rounded once to BF16. bf16: inputs of linear layers rounded to BF16. fp8w: weights E4M3 at
a power-of-two scale per output channel, inputs BF16. fp8: the same weights, inputs E4M3 at absmax/448
per token. fp8t: those weights brought to the largest scale of the tensor and rounded to E4M3 again, inputs
as in fp8. fp8b: weights E4M3 at absmax/448 of each square of 128 channels by 128 inputs, inputs E4M3 at absmax/448 of each 128
of a token. +kv8: K and V E4M3 at absmax/448 per position and head. q, K, V and the probabilities of a 32-position block are rounded to BF16; all else is float64.
exact: only weights are rounded, for a comparison with other implementations.
"""
import argparse, json, os, struct
import numpy as np


def bf16(x):
    """Nearest even, as float64."""
    u = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((((u + 0x7FFF + ((u >> 16) & 1)) >> 16) << 16).astype(np.uint32)).view(np.float32).astype(np.float64)


POSITIVE = np.array([m * 2.0**-9 if e == 0 else (8 + m) * 2.0**(e - 10) for e in range(16) for m in range(8)][:127])


def e4m3(x):
    """Nearest even of float64 values, saturating at 448: by search in the list of all values."""
    a = np.minimum(np.abs(x), 448.0)
    hi = np.clip(np.searchsorted(POSITIVE, a), 1, 126)
    lo = hi - 1
    dl, dh = a - POSITIVE[lo], POSITIVE[hi] - a
    pick = np.where((dh < dl) | ((dh == dl) & (hi % 2 == 0)), hi, lo)
    return np.sign(x) * POSITIVE[pick]


def e4m3_rows(w, tensor=False):
    absmax = np.abs(w).max(axis=1)
    k = np.where(absmax > 0, np.floor(np.log2(448 / np.where(absmax > 0, absmax, 1))), 0)
    k = np.where(absmax * 2.0**k > 448, k - 1, k)
    k = np.clip(k, -120, 120)[:, None]
    c = e4m3(w * 2.0**k)
    if tensor:
        t = k[absmax > 0].min()
        return e4m3(c * 2.0**(t - k)) * 2.0**-t
    return c * 2.0**-k


def in_128s(x, axis):
    """Zeros up to a multiple of 128 of an axis, which becomes two."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % 128)
    x = np.pad(x, pad)
    return x.reshape(*x.shape[:axis], -1, 128, *x.shape[axis + 1:])


def e4m3_squares(w):
    b = in_128s(in_128s(w.astype(np.float32), 1), 0)
    s = np.abs(b).max(axis=(1, 3), keepdims=True) / np.float32(448)
    s = np.where(s == 0, np.float32(1), s)
    c = e4m3((b / s).astype(np.float64)) * s.astype(np.float64)
    return c.reshape(c.shape[0] * 128, -1)[:w.shape[0], :w.shape[1]]


def e4m3_weights(w, form):
    return e4m3_squares(w) if form == "fp8b" else e4m3_rows(w, form == "fp8t")


def e4m3_scaled(x):
    """At absmax / 448 of the last axis (a token, or a head of a position), in FP32 as the engine keeps it."""
    x = x.astype(np.float32)
    s = np.abs(x).max(axis=-1, keepdims=True) / np.float32(448)
    s = np.where(s == 0, np.float32(1), s)
    return e4m3((x / s).astype(np.float64)) * s.astype(np.float64)


def safetensors(path):
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(n))
        data = f.read()
    out = {}
    for name, t in header.items():
        if name == "__metadata__":
            continue
        raw = data[t["data_offsets"][0]:t["data_offsets"][1]]
        if t["dtype"] == "BF16":
            a = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            a = np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[t["dtype"]])
        out[name] = bf16(a).reshape(t["shape"])
    return out


def load(path):
    """The tensors of a directory, in one file or in shards."""
    index = path + "/model.safetensors.index.json"
    if os.path.exists(path + "/model.safetensors"):
        return safetensors(path + "/model.safetensors")
    out = {}
    for name in sorted(set(json.load(open(index))["weight_map"].values())):
        out.update(safetensors(path + "/" + name))
    return out


def frequencies(c, hd):
    """Radians per position of each pair."""
    p = c.get("rope_parameters") or {}
    s = c.get("rope_scaling") or p
    theta = p.get("rope_theta") or c.get("rope_theta", 10000.0)
    freq = theta ** (-2.0 * np.arange(hd // 2) / hd)
    kind = s.get("rope_type", s.get("type", "default"))
    if kind == "default":
        return freq
    if kind == "linear":
        return freq / s["factor"]
    assert kind == "llama3", kind
    # transformers/modeling_rope_utils.py, _compute_llama3_parameters
    old, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    wave = 2 * np.pi / freq
    out = np.where(wave > old / low, freq / s["factor"], freq)
    smooth = (old / wave - low) / (high - low)
    medium = ~(wave < old / high) & ~(wave > old / low)
    return np.where(medium, (1 - smooth) * out / s["factor"] + smooth * out, out)


GROUPS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
          "mlp.down_proj", "lm_head"]


class Model:
    def __init__(self, path, plan):
        self.c = c = json.load(open(path + "/config.json"))
        self.w = w = load(path)
        self.hd = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        self.freq = frequencies(c, self.hd)
        self.window = c.get("sliding_window") if c["architectures"][0] == "MistralForCausalLM" else None
        self.round = (lambda x: x) if plan == "exact" else bf16
        self.kv8 = plan.endswith("+kv8")
        plan = plan.replace("exact", "bf16").replace("+kv8", "")
        self.embed = w["model.embed_tokens.weight"]
        if c.get("tie_word_embeddings"):
            w["lm_head.weight"] = self.embed
        base = plan.replace("-all", "")
        self.format = {g: base if base == "bf16" or g != "lm_head" or plan.endswith("-all") else "bf16" for g in GROUPS}
        self.cooked = {}
        for name, t in list(w.items()):
            group = next((g for g in GROUPS if name.endswith(g + ".weight")), None)
            if group:
                self.cooked[name] = t if self.format[group] == "bf16" else e4m3_weights(t, self.format[group])

    def linear(self, name, x):
        """[rows, in] -> [rows, out]"""
        group = next(g for g in GROUPS if name.endswith(g))
        if self.format[group] == "fp8b":
            x = e4m3_scaled(in_128s(x, x.ndim - 1)).reshape(*x.shape[:-1], -1)[..., :x.shape[-1]]
        else:
            x = e4m3_scaled(x) if self.format[group] in ("fp8", "fp8t") else self.round(x)
        y = x @ self.cooked[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["rms_norm_eps"]) * self.w[name]

    def norm_heads(self, x, name):
        """Qwen3: each head of q and k."""
        return self.norm(x, name) if name in self.w else x

    def rope(self, x, pos):
        """[rows, heads, head_dim]"""
        half = self.hd // 2
        angle = pos[:, None, None] * self.freq
        cos, sin = np.cos(angle), np.sin(angle)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, q, K, V, pos):
        """One head, rows at positions pos: blocks of 32 positions, each with its own max and rounded probabilities."""
        m, l, o = np.full((len(q), 1), -np.inf), np.zeros((len(q), 1)), np.zeros(q.shape)
        first = np.maximum(0, pos + 1 - self.window) if self.window else 0 * pos
        for b in range(first.min() // 32 * 32, len(K), 32):
            at = np.arange(b, min(b + 32, len(K)))
            seen = (at <= pos[:, None]) & (at >= first[:, None])
            r = np.flatnonzero(seen.any(1))
            s = np.where(seen[r], q[r] @ K[at].T / np.sqrt(self.hd), -np.inf)
            bm = s.max(1, keepdims=True)
            p = self.round(np.exp(s - bm))
            t = np.maximum(m[r], bm)
            l[r] = l[r] * np.exp(m[r] - t) + p.sum(1, keepdims=True) * np.exp(bm - t)
            o[r] = o[r] * np.exp(m[r] - t) + p @ V[at] * np.exp(bm - t)
            m[r] = t
        return o / l

    def rows(self, tokens, cache):
        """Logits [rows, vocab] of the tokens that follow those in the cache: [K, V] of each layer, or [] at first."""
        c, n, kv = self.c, self.c["num_attention_heads"], self.c["num_key_value_heads"]
        cache += [[np.zeros((0, kv, self.hd))] * 2 for _ in range(0 if cache else c["num_hidden_layers"])]
        pos = len(cache[0][0]) + np.arange(len(tokens))
        x = self.embed[tokens]
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            h = self.norm(x, p + "input_layernorm.weight")
            q, k, v = [self.linear(p + f"self_attn.{a}_proj", h).reshape(len(tokens), -1, self.hd) for a in "qkv"]
            q = self.norm_heads(q, p + "self_attn.q_norm.weight")
            k = self.norm_heads(k, p + "self_attn.k_norm.weight")
            if c.get("no_rope_layers") is None or c["no_rope_layers"][i]:
                q, k = self.rope(q, pos), self.rope(k, pos)
            stored = e4m3_scaled if self.kv8 else self.round
            K, V = cache[i] = [np.concatenate([old, stored(new)]) for old, new in zip(cache[i], (k, v))]
            q = self.round(q)
            a = np.concatenate([self.attention(q[:, j], K[:, j * kv // n], V[:, j * kv // n], pos) for j in range(n)], -1)
            x = x + self.linear(p + "self_attn.o_proj", a)
            h = self.norm(x, p + "post_attention_layernorm.weight")
            g, u = self.linear(p + "mlp.gate_proj", h), self.linear(p + "mlp.up_proj", h)
            x = x + self.linear(p + "mlp.down_proj", g / (1 + np.exp(-g)) * u)
        return self.linear("lm_head", self.norm(x, "model.norm.weight"))


def run(m, prompt, n_tokens, eos, probe):
    cache, tokens, margins, logits = [], [], [], []
    out = m.rows(prompt, cache)[-1]
    while True:
        best = int(out.argmax())
        two = np.partition(out, -2)[-2:]
        logits.append([float(f"{v:.7g}") for v in out[probe]])
        margins.append(float(f"{two[1] - two[0]:.4g}"))
        if best == eos:
            break
        tokens.append(best)
        if len(tokens) == n_tokens:
            break
        out = m.rows([best], cache)[0]
    return {"prompt": prompt, "tokens": tokens, "margins": margins, "logits": logits}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model")
    ap.add_argument("--plan", default="bf16")
    ap.add_argument("--tokens", type=int, default=200)
    ap.add_argument("--eos", type=int, default=-1)
    ap.add_argument("--out", required=True)
    ap.add_argument("prompt", nargs="+")
    a = ap.parse_args()
    m = Model(a.model, a.plan)
    probe = [int(v) for v in np.linspace(0, m.c["vocab_size"] - 1, 12)]
    cases = [run(m, [int(t) for t in p.split(",")], a.tokens, a.eos, probe) for p in a.prompt]
    with open(a.out, "w") as f:
        json.dump({"plan": a.plan, "probe": probe, "cases": cases}, f, separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    main()
