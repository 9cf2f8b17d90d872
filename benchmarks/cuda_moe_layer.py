"""An MoE layer in PyTorch, eager and compiled: the times beside those of the example `cuda_moe_layer` of moe-model.

    python3 benchmarks/cuda_moe_layer.py [SHAPE]      only the shapes that begin with SHAPE

The same layer in bf16, `x + experts(rms_norm(x))`, its experts as `torch._grouped_mm`, by the same clock: the host's, from one
synchronisation to another, the median of batches of runs. Its gradients of weights are bf16 tensors made anew, ours are
in f32 and written anew. Lines are separated by tabs: shape, what, milliseconds, TFLOP/s of the experts' products.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F

# hidden, inner, experts, top-k, tokens: those of the example
SHAPES = {
    "mixtral-8x7b": (4096, 14336, 8, 2, 16384),
    "mixtral-8x22b": (6144, 16384, 8, 2, 16384),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 32768),
    "qwen2-57b-a14b": (3584, 2560, 64, 8, 16384),
    "mixtral-8x22b-g8t8": (6144, 2048, 64, 8, 16384),
}


def layer(x, norm, gate, gate_up, down, top_k):
    """`x: [tokens, hidden]`; `gate_up: [experts, hidden, 2·inner]`, `down: [experts, inner, hidden]`."""
    experts = gate.shape[0]
    h = F.rms_norm(x, x.shape[-1:], norm, 1e-5)
    scores, chosen = (h @ gate.t()).float().topk(top_k, dim=-1)
    weights = scores.softmax(dim=-1).flatten()
    chosen = chosen.flatten()
    order = chosen.argsort(stable=True)
    tokens = order // top_k
    ends = torch.bincount(chosen, minlength=experts).cumsum(0).to(torch.int32)
    g, u = torch._grouped_mm(h[tokens], gate_up, offs=ends).chunk(2, dim=-1)
    # As ours: the probability scales what goes into the last product.
    activated = (F.silu(g.float()) * u.float() * weights[order, None]).to(x.dtype)
    out = torch._grouped_mm(activated, down, offs=ends)
    return x.index_add(0, tokens, out)


def seconds(run, batches=7, least=0.04):
    def batch(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    batch(2)
    runs = max(2, round(2 * least / batch(2)))
    return statistics.median(batch(runs) for _ in range(batches)) / runs


def main(only=""):
    torch.manual_seed(0)
    print(f"# torch {torch.__version__} on {torch.cuda.get_device_name()}")
    for name, (hidden, inner, experts, top_k, tokens) in SHAPES.items():
        if not name.startswith(only):
            continue

        def normal(*shape, std=1.0):
            return (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * std).requires_grad_()

        operands = [
            normal(tokens, hidden),
            torch.ones(hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True),
            normal(experts, hidden, std=0.02),
            normal(experts, hidden, 2 * inner, std=0.02),
            normal(experts, inner, hidden, std=0.02),
        ]
        torch._dynamo.reset()  # it compiles a function for so many shapes only
        dy = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        flops = 6 * tokens * top_k * hidden * inner
        for how, function in ("eager", layer), ("compiled", torch.compile(layer, dynamic=False)):

            def forward():
                with torch.no_grad():
                    function(*operands, top_k)

            def both():
                for operand in operands:
                    operand.grad = None
                function(*operands, top_k).backward(dy)

            for what, run, factor in ("forward", forward, 1), ("forward+backward", both, 3):
                took = seconds(run)
                print(f"{name}\t{how} {what}\t{took * 1e3:.3f}\t{factor * flops / took / 1e12:.0f}", flush=True)
        del operands, dy
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
