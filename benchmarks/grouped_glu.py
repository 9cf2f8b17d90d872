"""The experts' products with the gated activation, forward and backward, on one GPU: checks the kernels of moe-kernels and times them
beside the product alone and beside PyTorch.

    python3 benchmarks/grouped_glu.py [--cubins DIR] [--compile | --check] [--variants NAME[/OP],...]

Like grouped_gemm.py, whose kernels these are with -DGLU=1: `forward` is gate and up with the activation, `backward` the input gradient
of the last product with the activation's backward. Needs PyTorch 2.11 or later with CUDA 13.
"""

import argparse
import ctypes
import pathlib
import sys

import grouped_gemm
from grouped_gemm import DGRAD, FORWARD, SHAPES, compiled, driver, groups_map, measure, ok, placed, ragged, rows_map, wrong_at

OPS = {"forward": FORWARD, "backward": DGRAD}
# How the kernel is built: columns of a tile, stages, sets of slices, blocks in a cluster, ping-pong.
VARIANTS = {
    "ping192": (192, 4, 2, 2, 1),
    "ping128": (128, 5, 2, 2, 1),
    "coop192": (192, 4, 2, 2, 0),
}
SILU, GELU_TANH = 1, 2


class Kernel:
    def __init__(self, name, op, cache, glu=SILU):
        self.name, self.op, self.variant = name, op, VARIANTS[name]
        module, self.function, self.finish = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        ok(driver().cuModuleLoadData(ctypes.byref(module), compiled(op, self.variant, cache, glu)), "cuModuleLoadData")
        ok(driver().cuModuleGetFunction(ctypes.byref(self.function), module, b"grouped_hopper"), "cuModuleGetFunction")
        if op == DGRAD:
            ok(driver().cuModuleGetFunction(ctypes.byref(self.finish), module, b"probability_gradients"), "cuModuleGetFunction")
        bn, stages, buffers = self.variant[:3]
        self.slice = 32 if op == FORWARD else 64
        sets = 2 * buffers * ((3 if op == FORWARD else 2) * self.slice * 128 + 8)
        self.fixed = stages * ((128 + bn) * 128 + 16) + sets
        ok(driver().cuFuncSetAttribute(self.function, 8, 232448), "cuFuncSetAttribute")
        self.fault = torch.full((1,), -1, dtype=torch.int64, device="cuda")

    def prepare(self, a, w, offsets, p, gate_up, out, dp=None):
        """forward: `a: [n, hidden]`, `gate_up: [n, 2·inner]` and `out: [n, inner]` are written. backward: `a` is the gradient of the
        result, `gate_up` is read, `out: [n, 2·inner]` and `dp: [n]` are written."""
        bn, cluster = self.variant[0], self.variant[3]
        experts, inner = offsets.numel() - 1, gate_up.shape[1] // 2
        box = [self.slice, 64]
        halves = lambda m: (ragged(m[:, :inner], box), ragged(m[:, inner:], box))
        if self.op == FORWARD:
            maps = rows_map(a, [64, 128]), groups_map(w, experts, [64, bn // 2]), *halves(gate_up), ragged(out, box)
            pointers = [p]
        else:
            partial = torch.empty(-(-inner // bn), a.shape[0], device="cuda")
            maps = rows_map(a, [64, 128]), groups_map(w, experts, [64, 64]), *halves(gate_up), *halves(out)
            pointers = [p, partial]
        numbers = [ctypes.c_int64(v) for v in (experts, a.shape[0], 0, inner, a.shape[1])]
        fault = (ctypes.c_uint64 * 2)(self.fault.data_ptr(), 1)
        keep = [*(ctypes.c_void_p(t.data_ptr()) for t in (*pointers, offsets)), *numbers, fault]
        params = (ctypes.c_void_p * 16)(*[t.address for t in maps], *[ctypes.addressof(v) for v in keep])
        shared = self.fixed + 4 * experts
        grid = torch.cuda.get_device_properties(0).multi_processor_count // cluster * cluster
        if dp is not None:
            last = [*(ctypes.c_void_p(t.data_ptr()) for t in (dp, partial, offsets)),
                    *(ctypes.c_int64(v) for v in (experts, a.shape[0], partial.shape[0]))]
            last_params = (ctypes.c_void_p * 6)(*[ctypes.addressof(v) for v in last])
            keep.append(last)
        hold = (maps, keep, a, w, gate_up, out, pointers, offsets, dp)

        def launch():
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            ok(driver().cuLaunchKernel(self.function, grid, 1, 1, 384, 1, 1, shared, stream, params, None), "cuLaunchKernel")
            if dp is not None:
                blocks = -(-hold[2].shape[0] // 256)
                ok(driver().cuLaunchKernel(self.finish, blocks, 1, 1, 256, 1, 1, 0, stream, last_params, None), "cuLaunchKernel")

        return launch


def gate(g, glu):
    return torch.nn.functional.silu(g) if glu == SILU else torch.nn.functional.gelu(g, approximate="tanh")


def check(kernels):
    cases = [  # rows of the groups, rows past the last, hidden, inner
        ([3, 0, 5, 1], 2, 24, 8),
        ([0, 0, 9, 0], 0, 16, 40),
        ([300, 2, 0, 517], 4, 72, 104),
        ([0, 700, 0, 0, 0], 9, 320, 200),
        ([128, 129, 127, 1, 64, 65, 63], 5, 136, 520),
        ([1000, 0, 513, 256, 3000], 100, 768, 1024),
        ([37 * (i % 5) for i in range(70)], 1, 392, 264),
        ([5000, 70], 3, 2048, 768),
    ]
    worst, failures = {}, []
    for counts, tail, hidden, inner in cases:
        experts, n = len(counts), sum(counts)
        offsets = torch.tensor([0] + counts).cumsum(0).to(torch.int32).cuda()
        ends = offsets.tolist()
        groups = [slice(*pair) for pair in zip(ends, ends[1:])]
        of = lambda rows, e: slice(e * rows, (e + 1) * rows)
        values = lambda r, c: torch.randn(r, c, device="cuda").to(torch.bfloat16)
        nan = float("nan")
        p = torch.rand(n + tail, device="cuda")
        x, dy = values(n + tail, hidden), values(n + tail, hidden)
        w1, w2 = values(experts * 2 * inner, hidden), values(experts * hidden, inner)
        w1.mul_(hidden**-0.5), w2.mul_(hidden**-0.5)
        x[n:], dy[n:] = nan, nan
        (x, _), (dy, _), (w1, _), (w2, _) = (placed(m, nan) for m in (x, dy, w1, w2))
        poison = lambda rows, cols: placed(torch.full((rows, cols), 77.0, dtype=torch.bfloat16, device="cuda"), 77.0)
        for kernel, glu in kernels:
            key = (kernel.name, kernel.op, glu)
            what = f"{kernel.name} op {kernel.op} glu {glu} {counts[:8]} {hidden} {inner}"

            def kept(around, width):
                around[1 : 1 + n, 8 : 8 + width] = 77.0
                return bool((around == 77.0).all())

            def compare(name, got, want, bound):
                if not len(got):
                    return
                error = ((got.double() - want.double()).norm() / want.double().norm()).item()
                worst[key] = max(worst.get(key, 0), error)
                if not error < bound:
                    failures.append(f"{what}: {name} error {error:.2e}; wrong: {wrong_at(got, want, bound)}")

            if kernel.op == FORWARD:
                (gate_up, around), (out, around_out) = poison(n + tail, 2 * inner), poison(n + tail, inner)
                run = kernel.prepare(x, w1, offsets, p, gate_up, out)
                run()
                torch.cuda.synchronize()
                first = gate_up.clone(), out.clone()
                want = torch.cat([x[s].double() @ w1[of(2 * inner, e)].double().T for e, s in enumerate(groups)])
                compare("gate and up", gate_up[:n], want, 4e-3)
                g, u = gate_up[:n].float().chunk(2, 1)
                compare("activated", out[:n], gate(g, glu) * u * p[:n, None], 3e-3)
                run()
                torch.cuda.synchronize()
                same = torch.equal(first[0][:n], gate_up[:n]) and torch.equal(first[1][:n], out[:n])
                safe = kept(around, 2 * inner) and kept(around_out, inner)
            else:
                gate_up, _ = placed(values(n + tail, 2 * inner), nan)
                gate_up[n:] = nan
                (out, around), dp = poison(n + tail, 2 * inner), torch.full((n + tail,), 77.0, device="cuda")
                run = kernel.prepare(dy, w2, offsets, p, gate_up, out, dp)
                run()
                torch.cuda.synchronize()
                first = out.clone(), dp.clone()
                d = torch.cat([dy[s].double() @ w2[of(hidden, e)].double() for e, s in enumerate(groups)])
                wide = gate_up[:n].double().requires_grad_()
                g, u = wide.chunk(2, 1)
                pp = p[:n].double().requires_grad_()
                (gate(g, glu) * u * pp[:, None] * d).sum().backward()
                compare("gradients", out[:n], wide.grad, 6e-3)
                compare("gradient of the probabilities", dp[:n, None], pp.grad[:, None], 6e-3)
                run()
                torch.cuda.synchronize()
                same = torch.equal(first[0][:n], out[:n]) and torch.equal(first[1], dp)
                safe = kept(around, 2 * inner) and bool((dp[n:] == 77.0).all())
            if not same or not safe or kernel.fault.item() != -1:
                kept_around = "kept" if safe else "WRITTEN"
                failures.append(f"{what}: {'same' if same else 'OTHER'} bits twice, around {kept_around}, fault {kernel.fault.item()}")
    for name, op, glu in worst:
        print(f"check {name:10s} op {op} glu {glu}: {worst[name, op, glu]:.1e}")
    for failure in failures[:12]:
        print("FAILED", failure)
    return not failures


def bench(kernels, cubins, rounds, shapes):
    plain = {op: grouped_gemm.Kernel(name, op, cubins) for op, name in ((FORWARD, "ping192"), (DGRAD, "coop256"))}
    names = list(dict.fromkeys(k.name for k in kernels))
    print(f"\nmilliseconds{'':28s} alone torch+ |", " ".join(f"{n:>9s}" for n in names), "| best over alone")
    for shape, (hidden, inner, experts, top, tokens) in SHAPES.items():
        if shapes and shape not in shapes:
            continue
        rows = tokens * top
        counts = (torch.distributions.Dirichlet(torch.full((experts,), 20.0)).sample() * rows).long()
        counts[-1] = rows - counts[:-1].sum()
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(torch.int32).cuda()
        ends = offsets[1:].contiguous()
        make = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)
        x, p = make(rows, hidden), torch.rand(rows, device="cuda")
        w1, w2 = make(experts * 2 * inner, hidden).mul_(0.02), make(experts * hidden, inner).mul_(0.02)
        gate_up, out, d_gate_up, dp = make(rows, 2 * inner), make(rows, inner), make(rows, 2 * inner), p.clone()
        for op_name, op in OPS.items():
            mine = [k for k in kernels if k.op == op]
            if not mine:
                continue
            if op == FORWARD:
                w3 = w1.view(experts, 2 * inner, hidden)
                peer = lambda: torch._grouped_mm(x, w3.transpose(-2, -1), offs=ends)
                alone = plain[op].prepare(gate_up, x, w1, offsets)
                runs = {k.name: k.prepare(x, w1, offsets, p, gate_up, out) for k in mine}
            else:
                w3 = w2.view(experts, hidden, inner)
                peer = lambda: torch._grouped_mm(x, w3, offs=ends)
                alone = plain[op].prepare(out, x, w2, offsets)
                runs = {k.name: k.prepare(x, w2, offsets, p, gate_up, d_gate_up, dp) for k in mine}
            t = measure({"alone": alone, "torch": peer, **runs}, rounds)
            cells = " ".join(f"{t[n]:9.3f}" if n in t else f"{'':>9s}" for n in names)
            best = min(runs, key=t.get)
            flops = 2 * rows * hidden * inner * (2 if op == FORWARD else 1)
            print(f"{shape:20s} {op_name:9s} {t['alone']:14.3f} {t['torch']:6.3f} | {cells} | {t[best] / t['alone']:.3f} {best}"
                  f" {flops / t[best] / 1e9:.0f} TF", flush=True)
        del x, w1, w2, w3, gate_up, out, d_gate_up, runs, alone, peer
        torch.cuda.empty_cache()


def main():
    global torch
    parser = argparse.ArgumentParser()
    parser.add_argument("--cubins", type=pathlib.Path, default=pathlib.Path("target/grouped_gemm"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--variants", default="ping192")
    parser.add_argument("--shapes", default="")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    wanted = [(name.split("/")[0], op) for name in args.variants.split(",") for op_name, op in OPS.items()
              if name.split("/")[1:] in ([], [op_name])]
    if args.compile:
        for name, op in wanted:
            for glu in SILU, GELU_TANH:
                compiled(op, VARIANTS[name], args.cubins, glu)
        for op, name in ((FORWARD, "ping192"), (DGRAD, "coop256")):
            compiled(op, grouped_gemm.VARIANTS[name], args.cubins)
        return
    import torch

    grouped_gemm.torch = torch
    torch.zeros(1, device="cuda")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    kernels = [Kernel(name, op, args.cubins) for name, op in wanted]
    checked = [(k, SILU) for k in kernels] + [(Kernel(name, op, args.cubins, GELU_TANH), GELU_TANH) for name, op in wanted]
    sound = check(checked)
    if not args.check:
        bench(kernels, args.cubins, args.rounds, [s for s in args.shapes.split(",") if s])
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
