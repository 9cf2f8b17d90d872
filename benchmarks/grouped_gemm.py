"""Grouped matrix products on one GPU: checks the kernels of moe-kernels and times them beside torch._grouped_mm.

    python3 benchmarks/grouped_gemm.py [--cubins DIR] [--compile | --check] [--variants NAME[/OP],...]

Compiles kernels/grouped_hopper.cu and what belongs to it with NVRTC (with --compile, does only that, into DIR; no GPU is needed), checks every
variant against f64 on ragged groups with poisoned memory around the operands (--check does no more), then times forward and backward of the two
products of an expert for five models, in turns with torch._grouped_mm and with one dense product of as many operations.
Medians of CUDA events. Needs PyTorch 2.11 or later with CUDA 13.
"""

import argparse
import ctypes
import glob
import hashlib
import os
import pathlib
import sys

KERNELS = pathlib.Path(__file__).resolve().parent.parent / "moe-kernels" / "kernels"
# What moe-kernels puts together (src/cuda/source.rs).
SOURCES = "prelude.cuh", "hopper.cuh", "grouped_tiles.cuh", "gate.cuh", "grouped_epilogue.cuh", "grouped_hopper.cu"
FORWARD, DGRAD, WGRAD = 0, 1, 2
OPS = {"forward": FORWARD, "dgrad": DGRAD, "wgrad": WGRAD}
# `wgrad` adds to what is there, `first` writes.
TIMED = *OPS.items(), ("first", WGRAD)
# How the kernel is built: columns of a tile, stages, buffers, blocks in a cluster, ping-pong.
VARIANTS = {
    "ping192": (192, 4, 4, 2, 1),
    "coop256": (256, 4, 2, 2, 0),
    "alone192": (192, 4, 4, 1, 1),
    "ping128": (128, 6, 2, 2, 1),
}


def chosen(op, n, k):
    """What moe-kernels builds for `n` columns of sums of `k` products (src/cuda/grouped_hopper.rs)."""
    poor_rest = n < 8192 and 1 <= n % 192 <= 64
    return "coop256" if op == DGRAD or poor_rest or (op == FORWARD and k >= 8192) else "ping192"


# hidden, ffn, experts, experts of a token, tokens
SHAPES = {
    "Mixtral-8x7B": (4096, 14336, 8, 2, 16384),
    "Mixtral-8x22B": (6144, 16384, 8, 2, 16384),
    "Qwen3-30B-A3B": (2048, 768, 128, 8, 32768),
    "Qwen2-57B-A14B": (3584, 2560, 64, 8, 16384),
    "Mixtral-8x22B-G8T8": (6144, 2048, 64, 8, 16384),
}
RAGGED, FAR = 1 << 30, 0x7FFF0000


def nvrtc():
    """The library in the packages of PyTorch, with its part that it would look for elsewhere."""
    for path in sys.path:
        found = sorted(glob.glob(os.path.join(path, "nvidia/cu13/lib/libnvrtc*.so*")), key=lambda f: "builtins" not in f)
        for file in found:
            if ".alt." not in file:
                loaded = ctypes.CDLL(file)
        if found:
            return loaded
    return ctypes.CDLL("libnvrtc.so.13")


def compiled(op, variant, cache, glu=0):
    bn, stages, buffers, cluster, pingpong = variant
    defines = dict(OP=op, GLU=glu, BN=bn, STAGES=stages, BUFFERS=buffers, CLUSTER=cluster, PINGPONG=pingpong)
    # A wait without end becomes an error.
    options = [b"--gpu-architecture=sm_90a", b"-DT_BF16", b"-DSPIN_LIMIT=4000000"] + [f"-D{k}={v}".encode() for k, v in defines.items()]
    source = "".join((KERNELS / file).read_text() for file in SOURCES).encode()
    file = cache / (hashlib.sha256(source + b"|".join(options)).hexdigest()[:16] + ".cubin")
    if file.exists():
        return file.read_bytes()
    lib = nvrtc()
    program = ctypes.c_void_p()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), source, b"grouped_hopper.cu", 0, None, None) == 0
    status = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    assert lib.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
    cubin = ctypes.create_string_buffer(size.value)
    assert lib.nvrtcGetCUBIN(program, cubin) == 0
    cache.mkdir(parents=True, exist_ok=True)
    file.write_bytes(cubin.raw)
    return cubin.raw


def ok(code, what):
    if code:
        raise RuntimeError(f"{what}: CUDA error {code}")


class TensorMap:
    """A tensor map of `dims` elements, innermost first, `strides` in bytes of all but the innermost, `box` elements at once."""

    def __init__(self, pointer, size, dims, strides, box):
        memory = ctypes.create_string_buffer(128 + 64)
        self.memory, self.address = memory, (ctypes.addressof(memory) + 63) & ~63
        rank = len(dims)
        code = driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.address), {2: 9, 4: 7}[size], rank, ctypes.c_void_p(pointer),
            (ctypes.c_uint64 * rank)(*dims), (ctypes.c_uint64 * max(rank - 1, 1))(*strides), (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank), 0, {128: 3, 64: 2}[size * box[0]], 3, 0)
        ok(code, f"cuTensorMapEncodeTiled {dims} {strides} {box}")


def ragged(matrix, box):
    """Rows that are addressed by a group's end: what lies past it is outside of the map. The address is
    `(2^30 - left) s + end s + 2^30 (2^34 - s)`, which modulo 2^64 is `(end - left) s`."""
    size, stride = matrix.element_size(), matrix.stride(0) * matrix.element_size()
    return TensorMap(matrix.data_ptr(), size, [matrix.shape[1], RAGGED, FAR, FAR], [stride, stride, (1 << 34) - stride], box + [1, 1])


def rows_map(matrix, box):
    stride = matrix.stride(0) * matrix.element_size()
    return TensorMap(matrix.data_ptr(), matrix.element_size(), [matrix.shape[1], matrix.shape[0]], [stride], box)


def groups_map(matrix, experts, box):
    size, rows = matrix.element_size(), matrix.shape[0] // experts
    stride = matrix.stride(0) * size
    return TensorMap(matrix.data_ptr(), size, [matrix.shape[1], rows, experts], [stride, stride * rows], box + [1])


_driver = None


def driver():
    global _driver
    _driver = _driver or ctypes.CDLL("libcuda.so.1")
    return _driver


class Kernel:
    def __init__(self, name, op, cache):
        self.name, self.op, self.variant = name, op, VARIANTS[name]
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        ok(driver().cuModuleLoadData(ctypes.byref(module), compiled(op, self.variant, cache)), "cuModuleLoadData")
        ok(driver().cuModuleGetFunction(ctypes.byref(self.function), module, b"grouped_hopper"), "cuModuleGetFunction")
        bn, stages, buffers = self.variant[:3]
        self.fixed = stages * (128 + bn) * 128 + 2 * buffers * (8192 + 8) + stages * 16
        ok(driver().cuFuncSetAttribute(self.function, 8, 232448), "cuFuncSetAttribute")
        self.fault = torch.full((1,), -1, dtype=torch.int64, device="cuda")

    def prepare(self, out, a, b, offsets, add=True):
        """forward: out = y, a = x, b = w; dgrad: out = dx, a = dy, b = w; wgrad: out = g, a = dy, b = x, which adds to `out` or writes."""
        bn, cluster = self.variant[0], self.variant[3]
        experts = offsets.numel() - 1
        piece = bn // cluster if self.op == FORWARD else 64
        if self.op == WGRAD:
            m, n, k = a.shape[1], b.shape[1], 0
            maps = ragged(a, [64, 64]), ragged(b, [64, piece]), groups_map(out, experts, [32, 64])
        else:
            m, n, k = 0, out.shape[1], a.shape[1]
            maps = rows_map(a, [64, 128]), groups_map(b, experts, [64, piece]), ragged(out, [64, 64])
        pointer = ctypes.c_void_p(offsets.data_ptr())
        numbers = [ctypes.c_int64(v) for v in (experts, a.shape[0], m, n, k)]
        fault = (ctypes.c_uint64 * 2)(self.fault.data_ptr(), 1)
        keep = [*([ctypes.c_int64(add)] if self.op == WGRAD else []), pointer, *numbers, fault]
        params = (ctypes.c_void_p * 11)(*[t.address for t in maps], *[ctypes.addressof(v) for v in keep])
        shared = self.fixed + (0 if self.op == WGRAD else 4 * experts)
        grid = torch.cuda.get_device_properties(0).multi_processor_count // cluster * cluster
        hold = (maps, keep, params, out, a, b, offsets)

        def launch():
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            ok(driver().cuLaunchKernel(self.function, grid, 1, 1, 384, 1, 1, shared, stream, params, None), "cuLaunchKernel")
            return hold[3]

        return launch


def placed(values, poison):
    """A copy inside a larger matrix of `poison`, with a row stride that is a multiple of 16 bytes."""
    rows, cols = values.shape
    stride = -(-cols // 8) * 8 + 16
    around = torch.full((rows + 2, stride), poison, dtype=values.dtype, device="cuda")
    inner = around[1 : rows + 1, 8 : 8 + cols]
    inner.copy_(values)
    return inner, around


def wrong_at(got, want, bound):
    """How many elements are off, with the ranges of their rows and columns."""
    off = ~((got.double() - want).abs() < 4 * bound * want.abs() + 20 * bound)
    at = off.nonzero()
    spans = [(at[:, d].min().item(), at[:, d].max().item()) for d in (0, 1)] if len(at) else []
    return f"{len(at)} of {got.numel()} in {spans}"


def check(kernels):
    cases = [  # rows of the groups, rows past the last, out, in
        ([3, 0, 5, 1], 2, 8, 5),
        ([0, 0, 9, 0], 0, 7, 16),
        ([0, 0], 3, 8, 24),
        ([13], 0, 24, 17),
        ([300, 2, 0, 517], 4, 9, 72),
        ([6, 7], 1, 304, 3),
        ([0, 700, 0, 0, 0], 9, 320, 200),
        ([128, 129, 127, 1, 64, 65, 63], 5, 520, 136),
        ([1000, 0, 513, 256, 3000], 100, 1024, 768),
        ([37 * (i % 5) for i in range(70)], 1, 264, 392),
    ]
    worst, failures = {}, []
    for counts, tail, n_out, n_in in cases:
        experts, n = len(counts), sum(counts)
        offsets = torch.tensor([0] + counts).cumsum(0).to(torch.int32).cuda()
        ends = offsets.tolist()
        values = lambda r, c: torch.randn(r, c, device="cuda").to(torch.bfloat16)
        nan = float("nan")
        x, dy, w = values(n + tail, n_in), values(n + tail, n_out), values(experts * n_out, n_in)
        x[n:], dy[n:] = nan, nan
        (x, _), (dy, _), (w, _) = placed(x, nan), placed(dy, nan), placed(w, nan)
        g0 = torch.randn(experts * n_out, n_in, device="cuda")
        for kernel in kernels:
            # Whole 16 bytes of a row are written.
            if (n_out if kernel.op == FORWARD else n_in) % 8:
                continue
            if kernel.op == WGRAD:
                want = g0.double()
                for e in range(experts):
                    s = slice(ends[e], ends[e + 1])
                    want[e * n_out : (e + 1) * n_out] += dy[s].double().T @ x[s].double()
                out, around = placed(g0, 77.0)
                args = out, dy, x
            else:
                a = x if kernel.op == FORWARD else dy
                want = torch.full((n + tail, n_out if kernel.op == FORWARD else n_in), 77.0, device="cuda", dtype=torch.float64)
                for e in range(experts):
                    s, we = slice(ends[e], ends[e + 1]), w[e * n_out : (e + 1) * n_out].double()
                    want[s] = a[s].double() @ (we.T if kernel.op == FORWARD else we)
                out, around = placed(torch.full_like(want, 77.0).to(torch.bfloat16), 77.0)
                args = out, a, w
            kernel.prepare(*args, offsets)()
            torch.cuda.synchronize()
            first = out.clone()
            if kernel.op != WGRAD:
                out.fill_(77.0)
                kernel.prepare(*args, offsets)()
            else:
                out.copy_(g0)
                kernel.prepare(*args, offsets)()
            torch.cuda.synchronize()
            error = ((first.double() - want).norm() / want.norm()).item()
            same = torch.equal(first, out)
            if kernel.op == WGRAD:
                # Written, whatever was there; 0 where a group has no rows.
                product = want - g0.double()
                out.fill_(float("nan"))
                kernel.prepare(*args, offsets, add=False)()
                torch.cuda.synchronize()
                error = max(error, ((out.double() - product).norm() / product.norm().clamp(min=1)).item())
                written = out.clone()
                out.fill_(77.0)
                kernel.prepare(*args, offsets, add=False)()
                torch.cuda.synchronize()
                same = same and torch.equal(written, out)
            outside = around.clone()
            outside[1:-1, 8 : 8 + want.shape[1]] = 77.0
            bound = 1e-5 if kernel.op == WGRAD else 4e-3
            key = (kernel.name, kernel.op)
            worst[key] = max(worst.get(key, 0), error)
            if not (error < bound) or not (outside == 77.0).all() or not same:
                failures.append(f"{kernel.name} op {kernel.op} {counts[:8]} {n_in}->{n_out}: error {error:.2e}, around "
                                f"{'kept' if (outside == 77.0).all() else 'WRITTEN'}, {'same' if same else 'OTHER'} bits twice; wrong: {wrong_at(first, want, bound)}")
        wrong = offsets.clone()
        wrong[-1] = n + tail + 1
        for kernel in kernels:
            if kernel.fault.item() != -1:
                failures.append(f"{kernel.name} op {kernel.op} {counts[:8]}: a fault that is none")
            a, b = (dy, x) if kernel.op == WGRAD else (x if kernel.op == FORWARD else dy, w)
            size = {FORWARD: (n + tail, n_out), DGRAD: (n + tail, n_in), WGRAD: (experts * n_out, n_in)}[kernel.op]
            kind = torch.float32 if kernel.op == WGRAD else torch.bfloat16
            out, around = placed(torch.full(size, 77.0, dtype=kind, device="cuda"), 77.0)
            if size[1] % 8 == 0:
                kernel.prepare(out, a, b, wrong)()
            else:
                kernel.fault.zero_()
            torch.cuda.synchronize()
            if kernel.fault.item() == -1 or not (around == 77.0).all():
                failures.append(f"{kernel.name} op {kernel.op} {counts[:8]}: offsets past the rows are not refused")
            kernel.fault.fill_(-1)
    for name in dict.fromkeys(k.name for k in kernels):
        print(f"check {name:14s}", {op: f"{worst[name, code]:.1e}" for op, code in OPS.items() if (name, code) in worst})
    for failure in failures[:12]:
        print("FAILED", failure)
    return not failures


def measure(contenders, rounds):
    """Milliseconds of each, the median of turns."""
    times = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, run in contenders.items():
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            run()
            b.record()
            b.synchronize()
            if turn >= 2:
                times[name].append(a.elapsed_time(b))
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def bench(kernels, rounds, shapes):
    names = list(dict.fromkeys(k.name for k in kernels))
    print(f"\nTFLOP/s{'':38s} torch dense |", " ".join(f"{n:>12s}" for n in names), "| ours/torch")
    for shape, (hidden, ffn, experts, top, tokens) in SHAPES.items():
        if shapes and shape not in shapes:
            continue
        rows = tokens * top
        counts = torch.distributions.Dirichlet(torch.full((experts,), 20.0)).sample()
        counts = (counts * rows).long()
        counts[-1] = rows - counts[:-1].sum()
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(torch.int32).cuda()
        ends = offsets[1:].contiguous()
        for layer, n_in, n_out in (("fc1", hidden, 2 * ffn), ("fc2", ffn, hidden)):
            make = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)
            x, dy = make(rows, n_in), make(rows, n_out)
            w = make(experts * n_out, n_in).mul_(0.02)
            w3 = w.view(experts, n_out, n_in)
            for op_name, op in TIMED:
                mine = [k for k in kernels if k.op == op]
                if not mine:
                    continue
                add = op_name == "wgrad"
                if op == FORWARD:
                    peer, dense = lambda: torch._grouped_mm(x, w3.transpose(-2, -1), offs=ends), lambda: x @ w3[0].T
                    out, a, b = torch.empty_like(dy), x, w
                elif op == DGRAD:
                    peer, dense = lambda: torch._grouped_mm(dy, w3, offs=ends), lambda: dy @ w3[0]
                    out, a, b = torch.empty_like(x), dy, w
                else:
                    peer, dense = lambda: torch._grouped_mm(dy.t(), x, offs=ends), lambda: dy.t() @ x
                    out, a, b = torch.zeros(experts * n_out, n_in, device="cuda"), dy, x
                runs = {"torch": peer, "dense": dense, **{k.name: k.prepare(out, a, b, offsets, add) for k in mine}}
                # Against torch's at full size.
                want = peer().reshape(out.shape).float()
                notes = ""
                for k in mine:
                    out.zero_() if add else out.fill_(float("nan"))
                    runs[k.name]()
                    error = ((out.float() - want).norm() / want.norm()).item()
                    if not error < 5e-3:
                        notes += f" {k.name} WRONG {error:.1e}"
                del want
                t = measure(runs, rounds)
                flops = 2 * rows * n_in * n_out
                tf = {name: flops / ms / 1e9 for name, ms in t.items()}
                ours = chosen(op, out.shape[1], a.shape[1])
                ratio = f"{tf[ours] / tf['torch']:.3f} {ours}" if ours in tf else ""
                cells = " ".join(f"{tf[n]:12.0f}" if n in tf else f"{'':>12s}" for n in names)
                print(f"{shape:20s} {layer} {op_name:8s} {n_in:6d}->{n_out:6d}  {tf['torch']:6.0f} {tf['dense']:5.0f} | {cells} |"
                      f" {ratio}{notes}", flush=True)
                del out, a, b, runs
            del x, dy, w, w3
            torch.cuda.empty_cache()


def main():
    global torch
    parser = argparse.ArgumentParser()
    parser.add_argument("--cubins", type=pathlib.Path, default=pathlib.Path("target/grouped_gemm"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--variants", default="ping192,coop256")
    parser.add_argument("--shapes", default="")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    wanted = [(name.split("/")[0], op) for name in args.variants.split(",") for op_name, op in OPS.items()
              if name.split("/")[1:] in ([], [op_name])]
    if args.compile:
        for name, op in wanted:
            compiled(op, VARIANTS[name], args.cubins)
        return
    import torch

    torch.zeros(1, device="cuda")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    kernels = [Kernel(name, op, args.cubins) for name, op in wanted]
    sound = check(kernels)
    if not args.check:
        bench(kernels, args.rounds, [s for s in args.shapes.split(",") if s])
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
