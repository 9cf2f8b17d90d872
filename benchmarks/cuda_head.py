"""Norm, language-model head and cross-entropy in PyTorch, eager and compiled: beside the example `cuda_head` of moe-model.

    python3 benchmarks/cuda_head.py [SHAPE]      only the shapes that begin with SHAPE

`cross_entropy(linear(rms_norm(x)))` in bf16, by the same clock: the host's, from one synchronisation to another, the median of
batches of runs. Logits stay in bf16 (transformers widens them to f32, which is slower), gradients of weights are bf16 tensors
made anew, where ours are added to f32. Lines are separated by tabs: shape, what, milliseconds, TFLOP/s of the products with the
vocabulary's matrix, and the peak of memory above what lives between passes in GiB.
"""

import sys

import torch
import torch.nn.functional as F
from cuda_moe_layer import seconds

# hidden, vocabulary, tokens: those of the example
SHAPES = {"qwen3-30b-a3b": (2048, 151936, 16384), "mixtral-8x7b": (4096, 32000, 16384)}


def head(x, norm, matrix, labels):
    return F.cross_entropy(F.linear(F.rms_norm(x, x.shape[-1:], norm, 1e-6), matrix), labels)


def main(only=""):
    torch.manual_seed(0)
    print(f"# torch {torch.__version__} on {torch.cuda.get_device_name()}")
    for name, (hidden, vocab, tokens) in SHAPES.items():
        if not name.startswith(only):
            continue
        options = dict(device="cuda", dtype=torch.bfloat16)
        operands = [
            torch.randn(tokens, hidden, **options).requires_grad_(),
            torch.ones(hidden, **options, requires_grad=True),
            (torch.randn(vocab, hidden, **options) * 0.02).requires_grad_(),
        ]
        labels = torch.randint(vocab, (tokens,), device="cuda")
        flops = 2 * tokens * hidden * vocab
        torch._dynamo.reset()
        for how, function in ("eager", head), ("compiled", torch.compile(head, dynamic=False)):

            def loss():
                with torch.no_grad():
                    function(*operands, labels)

            def both():
                for operand in operands:
                    operand.grad = None
                function(*operands, labels).backward()

            for what, run, factor in ("loss", loss, 1), ("loss and gradients", both, 3):
                for operand in operands:
                    operand.grad = None
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                took = seconds(run)
                gib = (torch.cuda.max_memory_allocated() - before) / 2**30
                rate = factor * flops / took / 1e12
                print(f"{name}\t{how} {what}\t{took * 1e3:.2f}\t{rate:.0f}\t{gib:.2f}", flush=True)
        del operands, labels


if __name__ == "__main__":
    main(*sys.argv[1:])
