"""PyTorch's times for the work of the CUDA backend's memory-bound kernels, beside ours.

    python3 benchmarks/cuda_kernels.py OURS      OURS is what the example `cuda_kernels` of moe-kernels prints

For every line there for which PyTorch has an equal, it is timed by events (the median of several runs) as it is and, but where
that makes no difference, compiled; the faster counts. Bytes are those of our table: every operand once.
"""

import statistics
import sys

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F

torch._functorch.config.donated_buffer = False  # backward runs several times
torch._dynamo.config.cache_size_limit = 64
device = torch.device("cuda")
bf16, f32 = torch.bfloat16, torch.float32


def random(*shape, dtype=bf16, grad=False):
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)


def forward_and_backward(function, inputs, dy, backward):
    """Functions that run `function` or its backward: as it is, and compiled."""
    for f in (function, torch.compile(function, dynamic=False)):
        if backward:
            y = f(*inputs)
            wanted = [x for x in inputs if x.requires_grad]
            yield lambda y=y: torch.autograd.grad(y, wanted, dy, retain_graph=True)
        else:
            detached = [x.detach() for x in inputs]
            yield lambda f=f: f(*detached)


def rms_norm(shape, backward):
    n, h = map(int, shape.split("x"))
    function = lambda x, w: F.rms_norm(x, (h,), w, 1e-6)
    return forward_and_backward(function, [random(n, h, grad=True), random(h, grad=True)], random(n, h), backward)


def rms_norm_residual(shape):
    n, h = map(int, shape.split("x"))

    def function(x, r, w):
        x = x + r
        return x, F.rms_norm(x, (h,), w, 1e-6)

    return forward_and_backward(function, [random(n, h), random(n, h), random(h)], None, False)


def rms_norm_backward_residual(shape):
    n, h = map(int, shape.split("x"))
    function = lambda x, w: (F.rms_norm(x, (h,), w, 1e-6), x.view_as(x))
    inputs, gradients = [random(n, h, grad=True), random(h, grad=True)], [random(n, h), random(n, h)]
    for f in (function, torch.compile(function, dynamic=False)):
        yield lambda y=f(*inputs): torch.autograd.grad(y, inputs, gradients, retain_graph=True)


def swiglu(shape, backward):
    n, width = map(int, shape.split("x"))

    def function(gate_up, p):
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate.float()) * up.float() * p[:, None]).to(bf16)

    inputs = [random(n, 2 * width, grad=True), random(n, dtype=f32, grad=True)]
    return forward_and_backward(function, inputs, random(n, width), backward)


def rope(shape, adjacent):
    n, heads, head_dim = map(int, shape.split("x"))
    x, tables = random(n, heads, head_dim), random(2, 8192, head_dim // 2, dtype=f32)
    positions = torch.arange(n, device=device) % 8192

    def function(x, tables, positions):
        cos, sin = tables[0][positions][:, None], tables[1][positions][:, None]
        a, b = (x[..., 0::2], x[..., 1::2]) if adjacent else x.chunk(2, dim=-1)
        a, b = a * cos - b * sin, b * cos + a * sin
        return (torch.stack((a, b), -1).flatten(-2) if adjacent else torch.cat((a, b), -1)).to(bf16)

    return forward_and_backward(function, [x, tables, positions], None, False)


def qk_norm_rope(shape, backward):
    n, heads, head_dim = map(int, shape.split("x"))
    tables, positions = random(2, 8192, head_dim // 2, dtype=f32), torch.arange(n, device=device) % 8192

    def function(x, w):
        cos, sin = tables[0][positions][:, None], tables[1][positions][:, None]
        a, b = F.rms_norm(x, (head_dim,), w, 1e-6).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(bf16)

    inputs = [random(n, heads, head_dim, grad=True), random(head_dim, grad=True)]
    return forward_and_backward(function, inputs, random(n, heads, head_dim), backward)


def cross_entropy(shape, backward):
    n, vocabulary = map(int, shape.split("x"))
    labels = torch.randint(vocabulary, (n,), device=device)
    function = lambda logits: F.cross_entropy(logits, labels, reduction="none")
    dy = random(n)
    return forward_and_backward(function, [random(n, vocabulary, grad=True)], dy, backward)


def embed(shape, _):
    rows, vocabulary = shape.split(" of ")
    n, h = map(int, rows.split("x"))
    ids = torch.randint(int(vocabulary), (n,), device=device)
    return forward_and_backward(F.embedding, [ids, random(int(vocabulary), h)], None, False)


def gather_rows(shape):
    tokens, k, h = map(int, shape.split("x"))
    index = torch.rand(tokens, 64, device=device).topk(k, dim=1).indices.flatten().sort(stable=True).indices // k
    return [lambda x=random(tokens, h), out=random(tokens * k, h): torch.index_select(x, 0, index, out=out)]


def gather_sum(shape):
    tokens, k, h = map(int, shape.split("x"))
    index = torch.randperm(tokens * k, device=device)
    of_token = index // k
    return [
        lambda x=random(tokens * k, h), y=random(tokens, h): y.zero_().index_add_(0, of_token, x),
        lambda x=random(tokens * k, h): x[index].view(tokens, k, h).sum(1),
    ]


def router(shape):
    tokens, experts, _, k = shape.replace("x", " ").split()
    return random(int(tokens), int(experts), dtype=f32), int(k)


def route(shape):
    logits, k = router(shape)

    def function(logits):
        probs = logits.softmax(-1)
        weights, experts = probs.topk(k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), experts.int(), probs, logits.logsumexp(-1)

    return forward_and_backward(function, [logits], None, False)


def sort_by_expert(shape):
    logits, k = router(shape)
    experts = logits.topk(k, dim=-1).indices.int().flatten()

    def function(experts):
        _, order = experts.sort(stable=True)
        position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        counts = torch.bincount(experts, minlength=logits.shape[1])
        return order, order // k, position, counts.cumsum(0)

    return [lambda: function(experts)]


def sums(function, dtype):
    return lambda shape: [lambda x=random(*map(int, shape.split(" ")[0].split("x")), dtype=dtype): function(x)]


def converted(to, dtype):
    return lambda shape: [lambda x=random(int(shape), dtype=dtype), y=random(int(shape), dtype=to): y.copy_(x)]


def parameters(shape):
    """One tensor of so many elements in f32, or all those of so many layers of a model."""
    if shape.isdigit():
        return [random(int(shape), dtype=f32)]
    h, queries, keys, experts, width = 2048, 4096, 512, 128, 768
    layer = [h * queries, h * keys, h * keys, h * queries, h * experts, h, h, 128, 128] + [h * width] * (3 * experts)
    return [random(n, dtype=f32) for n in layer * int(shape.split(" ")[0])]


def adamw(shape):
    master, grad, m = (parameters(shape) for _ in range(3))
    v, steps = [x.abs() for x in m], [torch.ones((), device=device) for _ in m]
    settings = dict(lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False)
    # Without the weights in bf16, which cost PyTorch a copy more.
    return [lambda: torch._fused_adamw_(master, grad, m, v, [], steps, **settings)]


def sums_of_squares(shape):
    grads = parameters(shape)
    return [lambda: torch.nn.utils.get_total_norm(grads, foreach=True)]


def copy(shape):
    elements = int(shape.split(" ")[0]) << 19
    return [lambda a=random(elements), b=random(elements): b.copy_(a)]


# By the names of our table; of embed_backward there is no equal (PyTorch's writes the whole table's gradient).
PEERS = {
    "copy": copy,
    "rms_norm": lambda shape: rms_norm(shape, False),
    "rms_norm_backward": lambda shape: rms_norm(shape, True),
    "rms_norm_residual": rms_norm_residual,
    "rms_norm_backward_residual": rms_norm_backward_residual,
    "qk_norm_rope": lambda shape: qk_norm_rope(shape, False),
    "qk_norm_rope_backward": lambda shape: qk_norm_rope(shape, True),
    "rope_halves": lambda shape: rope(shape, False),
    "rope_adjacent": lambda shape: rope(shape, True),
    "swiglu": lambda shape: swiglu(shape, False),
    "swiglu_backward": lambda shape: swiglu(shape, True),
    "cross_entropy": lambda shape: cross_entropy(shape, False),
    "cross_entropy_backward": lambda shape: cross_entropy(shape, True),
    "embed": lambda shape: embed(shape, False),
    "gather_rows": gather_rows,
    "gather_sum": gather_sum,
    "route_softmax": route,
    "sort_by_expert": sort_by_expert,
    "column_sums": sums(lambda x: x.sum(0), f32),
    "sum_of_squares": sums(torch.linalg.vector_norm, f32),
    "add": lambda shape: [lambda a=random(int(shape)), b=random(int(shape)), y=random(int(shape)): torch.add(a, b, out=y)],
    "widen": converted(f32, bf16),
    "narrow": converted(bf16, f32),
    "adamw": adamw,
    "sums_of_squares": sums_of_squares,
}


def microseconds(run):
    for _ in range(3):
        run()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # the launches are all there before the first begins
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def main():
    lines = [line.rstrip("\n").split("\t") for line in open(sys.argv[1])]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| kernel | shape | ours, us | TB/s | of copy | torch, us | ours faster |")
    print("|---|---|---|---|---|---|---|")
    for name, shape, us, rate, share in lines[1:]:
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        peers = [microseconds(run) for run in PEERS[name](shape)] if name in PEERS else []
        theirs, ratio = (f"{min(peers):.1f}", f"{min(peers) / float(us):.2f}×") if peers else ("", "")
        print(f"| {name} | {shape} | {us} | {rate} | {share} | {theirs} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
