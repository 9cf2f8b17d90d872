"""One-rank f32 training of a small Mixtral in eager PyTorch on the CPU: the peer of `moe-train/examples/cpu_training.rs`.

Forward, backward and AdamW of a decoder with RMSNorm, RoPE, causal attention and top-2 experts, tokens grouped by expert.
Prints the median seconds of a step and the tokens per second.

    python3 benchmarks/torch_train.py [--threads 2] [--steps 12]
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, hidden, heads, kv_heads, ffn, experts, top_k):
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, hidden // heads
        self.experts, self.top_k = experts, top_k
        self.norm1 = nn.RMSNorm(hidden, eps=1e-5)
        self.norm2 = nn.RMSNorm(hidden, eps=1e-5)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.kv = nn.Linear(hidden, 2 * kv_heads * self.dim, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * ffn, hidden) * 0.02)
        self.down = nn.Parameter(torch.randn(experts, hidden, ffn) * 0.02)

    def attention(self, x, cos, sin):
        b, s, h = x.shape
        q = self.q(x).view(b, s, self.heads, self.dim).transpose(1, 2)
        k, v = self.kv(x).view(b, s, 2, self.kv_heads, self.dim).permute(2, 0, 3, 1, 4)
        q, k = (t * cos + torch.cat((-t[..., self.dim // 2:], t[..., : self.dim // 2]), -1) * sin for t in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.o(o.transpose(1, 2).reshape(b, s, h))

    def moe(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)
        top, chosen = logits.topk(self.top_k, dim=-1)
        weights = top.softmax(-1)
        order = chosen.flatten().argsort(stable=True)
        token = order // self.top_k
        counts = torch.bincount(chosen.flatten(), minlength=self.experts)
        rows = tokens[token].split(counts.tolist())
        p = weights.flatten()[order].split(counts.tolist())
        out = []
        for e, (r, w) in enumerate(zip(rows, p)):
            gate, up = F.linear(r, self.gate_up[e]).chunk(2, -1)
            out.append(F.linear(F.silu(gate) * up * w[:, None], self.down[e]))
        y = torch.zeros_like(tokens).index_add(0, token, torch.cat(out))
        probs = logits.softmax(-1)
        aux = self.experts / (self.top_k * tokens.shape[0] ** 2) * (counts * probs.sum(0)).sum()
        return y.view_as(x), aux

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        y, aux = self.moe(self.norm2(x))
        return x + y, aux


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed = nn.Embedding(args.vocab, args.hidden)
        self.blocks = nn.ModuleList(
            Block(args.hidden, args.heads, args.kv_heads, args.ffn, args.experts, args.top_k) for _ in range(args.layers)
        )
        self.norm = nn.RMSNorm(args.hidden, eps=1e-5)
        self.head = nn.Linear(args.hidden, args.vocab, bias=False)
        dim = args.hidden // args.heads
        angle = torch.arange(args.seq)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.cos, self.sin = (f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))

    def forward(self, ids, labels):
        x, aux = self.embed(ids), 0.0
        for block in self.blocks:
            x, a = block(x, self.cos, self.sin)
            aux = aux + a
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.01 * aux


def main():
    parser = argparse.ArgumentParser()
    for name, value in dict(
        hidden=256, layers=4, heads=8, kv_heads=4, ffn=512, experts=8, top_k=2, vocab=256, seq=256, batch=8,
        threads=2, steps=12,
    ).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    seconds = []
    for _ in range(args.steps):
        tokens = torch.randint(args.vocab, (args.batch, args.seq + 1))
        start = time.perf_counter()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    print(f"torch {torch.__version__} eager, {args.threads} threads: {median:.4f} s/step, "
          f"{args.batch * args.seq / median:.0f} tokens/s, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
