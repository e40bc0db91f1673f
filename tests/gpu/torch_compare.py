#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The linear layers and attention of one decode step of the 8B shape in PyTorch: compiled BF16, and FP8 linears by
torch._scaled_mm with row-wise scales, under a CUDA graph. A fair opponent, not a server: no sampling, no paging.

  torch_compare.py [--context N] [--batches 1,8,32,128] [--layers N]

Prints "torch FORMAT decode N MS" a line. One set of weights is shared by all layers of a kind where memory would not do.
"""
import argparse, sys, time

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print("torch none: PyTorch is not installed")
    sys.exit(0)

H, FFN, HEADS, KV, HD, VOCAB = 4096, 14336, 32, 8, 128, 128256


class Linear:
    def __init__(self, n, k, fp8):
        w = (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
        self.fp8 = fp8
        if fp8:
            s = w.float().abs().amax(1, keepdim=True) / 448
            self.w, self.s = (w / s).to(torch.float8_e4m3fn), s.t().contiguous()
        else:
            self.w = w

    def __call__(self, x):
        if not self.fp8:
            return F.linear(x, self.w)
        s = (x.abs().amax(1, keepdim=True).float() / 448).clamp(min=1e-12)
        return torch._scaled_mm((x / s).to(torch.float8_e4m3fn), self.w.t(), scale_a=s, scale_b=self.s, out_dtype=torch.bfloat16)


class Model:
    def __init__(self, layers, batch, context, fp8):
        self.layers = [dict(qkv=Linear((HEADS + 2 * KV) * HD, H, fp8), o=Linear(H, HEADS * HD, fp8), gu=Linear(2 * FFN, H, fp8),
                            down=Linear(H, FFN, fp8), k=torch.randn(batch, KV, context, HD, device="cuda", dtype=torch.bfloat16),
                            v=torch.randn(batch, KV, context, HD, device="cuda", dtype=torch.bfloat16)) for _ in range(layers)]
        self.head, self.norm = Linear(VOCAB, H, fp8), torch.ones(H, device="cuda", dtype=torch.bfloat16)

    def step(self, x):
        for l in self.layers:
            qkv = l["qkv"](F.rms_norm(x, (H,), self.norm))
            q = qkv[:, :HEADS * HD].view(-1, HEADS, 1, HD)
            a = F.scaled_dot_product_attention(q, l["k"], l["v"], enable_gqa=True)
            x = x + l["o"](a.reshape(-1, HEADS * HD))
            g, u = l["gu"](F.rms_norm(x, (H,), self.norm)).chunk(2, -1)
            x = x + l["down"](F.silu(g) * u)
        return self.head(F.rms_norm(x, (H,), self.norm)).argmax(-1)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--batches", default="1,8,32,128")
    p.add_argument("--layers", type=int, default=32)
    a = p.parse_args()
    for fp8 in (False, True):
        for batch in map(int, a.batches.split(",")):
            torch.cuda.empty_cache()
            m = Model(a.layers, batch, a.context, fp8)
            x = torch.randn(batch, H, device="cuda", dtype=torch.bfloat16)
            step = torch.compile(m.step, mode="reduce-overhead")
            try:
                with torch.no_grad():
                    for _ in range(5):
                        step(x)
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(30):
                        step(x)
                    torch.cuda.synchronize()
                print(f"torch {'fp8' if fp8 else 'bf16'} decode {batch} {(time.perf_counter() - start) / 30 * 1e3:.3f}", flush=True)
            except Exception as e:
                print(f"torch {'fp8' if fp8 else 'bf16'} decode {batch} failed: {str(e).splitlines()[0][:100]}", flush=True)
            del m, step


main()
