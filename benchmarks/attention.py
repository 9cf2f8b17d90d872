"""Attention on one GPU: checks the kernels of moe-kernels and times them beside torch's.

    python3 benchmarks/attention.py [--only check|time]

Compiles kernels/attention.cu, kernels/attention_flash.cu and the backward beside it with NVRTC, holds them to f64 on random operands in the middle of
NaN (masks, windows, packed documents, grouped queries, lengths around tiles; twice, for the same bits), then times forward and backward
of two models' shapes and some others, in the same run as torch's scaled_dot_product_attention by cuDNN and FlashAttention, with and without
its deterministic algorithms. Medians of CUDA events; causal attention counts half of the products, the backward 2.5 times the forward, whatever
is computed again. Needs a Hopper GPU and PyTorch 2.11 or later with CUDA 13.
"""

import argparse
import ctypes as C
import glob
import math
import os
import pathlib
import sys
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = pathlib.Path(__file__).resolve().parent.parent / "moe-kernels" / "kernels"
DEV = "cuda"
ALL = 1 << 60  # a window of all keys up to the query's own: causal
TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
INT, LONG, FLOAT, DOUBLE = C.c_int, C.c_longlong, C.c_float, C.c_double
torch.zeros(1, device=DEV)  # makes the context
CUDA = C.CDLL("libcuda.so.1")


def check(result, what):
    if result:
        text = C.c_char_p()
        CUDA.cuGetErrorString(result, C.byref(text))
        raise RuntimeError(f"{what}: {result} {text.value}")


def nvrtc():
    """The library in the packages of PyTorch, with its part that it would look for elsewhere."""
    for path in sys.path:
        found = sorted(glob.glob(os.path.join(path, "nvidia/cu13/lib/libnvrtc*.so*")), key=lambda f: "builtins" not in f)
        loaded = [C.CDLL(file) for file in found if ".alt." not in file]
        if loaded:
            return loaded[-1]
    return C.CDLL("libnvrtc.so.13")


class Kernels:
    """Kernels of the last of some files, compiled for one type."""

    def __init__(self, *files, dtype, **definitions):
        source, file = "".join((KERNELS / name).read_text() for name in ("prelude.cuh", *files)), files[-1]
        lib, program = nvrtc(), C.c_void_p()
        options = ["--gpu-architecture=sm_90a", "--std=c++17", f"-DT_{dtype}"] + [f"-D{k}={v}" for k, v in definitions.items()]
        lib.nvrtcCreateProgram(C.byref(program), source.encode(), file.encode(), 0, None, None)
        options, size = (C.c_char_p * len(options))(*(option.encode() for option in options)), C.c_size_t()
        result = lib.nvrtcCompileProgram(program, len(options), options)
        if result:
            lib.nvrtcGetProgramLogSize(program, C.byref(size))
            log = C.create_string_buffer(size.value)
            lib.nvrtcGetProgramLog(program, log)
            raise RuntimeError(log.value.decode())
        lib.nvrtcGetCUBINSize(program, C.byref(size))
        cubin = C.create_string_buffer(size.value)
        lib.nvrtcGetCUBIN(program, cubin)
        self.module, self.functions = C.c_void_p(), {}
        check(CUDA.cuModuleLoadData(C.byref(self.module), cubin), file)

    def launch(self, name, grid, block, arguments, shared=0):
        if name not in self.functions:
            function = C.c_void_p()
            check(CUDA.cuModuleGetFunction(C.byref(function), self.module, name.encode()), name)
            if shared > 48 << 10:
                check(CUDA.cuFuncSetAttribute(function, 8, shared), name)
            self.functions[name] = function
        pointers = (C.c_void_p * len(arguments))(*[C.addressof(a) for a in arguments])
        stream = C.c_void_p(torch.cuda.current_stream().cuda_stream)
        check(CUDA.cuLaunchKernel(self.functions[name], grid, 1, 1, block, 1, 1, shared, stream, pointers, None), name)


def pointer(tensor):
    return C.c_void_p(0 if tensor is None else tensor.data_ptr())


def matrix(tensor):
    return [pointer(tensor), LONG(tensor.stride(0))]


def tensor_map(m, dim, heads, batch, length):
    """Tiled::heads of src/cuda/tensor_map.rs."""
    room = (C.c_uint64 * 32)()
    out = (C.c_uint64 * 16).from_buffer(room, -C.addressof(room) % 64)
    row = 2 * m.stride(0)
    dims, strides = (C.c_uint64 * 4)(dim, length, heads, batch), (C.c_uint64 * 3)(batch * row, 2 * dim, row)
    box, steps = (C.c_uint32 * 4)(64, 64, 1, 1), (C.c_uint32 * 4)(1, 1, 1, 1)
    check(CUDA.cuTensorMapEncodeTiled(out, 9, 4, pointer(m), dims, strides, box, steps, 0, 3, 3, 0), "tensor map")
    return out


class Case:
    """Operands of one call: sequence-major rows in the middle of NaN."""

    def __init__(self, batch, q_len, first_query, kv_len, heads, kv_heads, dim, v_dim, window, documents, dtype, around=(8, 8)):
        self.__dict__.update(locals())
        self.acc = torch.float32 if dtype == torch.bfloat16 else dtype
        self.scale = 1 / math.sqrt(dim)
        rows, keys = q_len * batch, kv_len * batch
        self.whole = {}
        for name, n, cols, dt, random in [
            ("q", rows, heads * dim, dtype, True), ("k", keys, kv_heads * dim, dtype, True), ("v", keys, kv_heads * v_dim, dtype, True),
            ("d_o", rows, heads * v_dim, dtype, True), ("o", rows, heads * v_dim, dtype, False), ("lse", rows, heads, self.acc, False),
            ("dq", rows, heads * dim, dtype, False), ("dk", keys, kv_heads * dim, dtype, False), ("dv", keys, kv_heads * v_dim, dtype, False),
        ]:
            whole = torch.full((n + 2, cols + sum(around)), float("nan"), device=DEV, dtype=dt)
            inside = whole[1 : n + 1, around[0] : around[0] + cols]
            if random:
                inside.copy_(torch.randn(n, cols, device=DEV, dtype=torch.float64).to(dt))
            self.whole[name] = whole
            setattr(self, name, inside)
        self.first_keys = None
        if documents == "documents":
            first = torch.zeros(q_len, batch, dtype=torch.int32)
            for b in range(batch):
                at = 0
                while at < q_len + first_query:
                    length = int(torch.randint(1, max(2, (q_len + first_query) // 2), (1,)))
                    first[max(at - first_query, 0) : max(at + length - first_query, 0), b] = at
                    at += length
            self.first_keys = first.reshape(-1).to(DEV)
        elif documents == "random":
            self.first_keys = torch.randint(0, kv_len // 2 + 1, (rows,), dtype=torch.int32, device=DEV)

    def sizes(self):
        return [INT(x) for x in (self.batch, self.q_len, self.kv_len)]

    def generic(self, kernels):
        """Launches of attention.cu, as src/cuda/attention.rs makes them: forward, backward."""
        tile, span = (32, 64) if self.dtype == torch.float64 else (64, 128)
        tiles = lambda n, dim, heads: -(-n // tile) * -(-dim // span) * heads * self.batch
        rows = self.q_len * self.batch
        end = self.sizes() + [LONG(self.first_query), LONG(self.window)]
        end += [INT(x) for x in (self.heads, self.kv_heads, self.dim, self.v_dim)] + [DOUBLE(self.scale)]
        mats = lambda *names: sum((matrix(getattr(self, name)) for name in names), [])
        delta = torch.full((rows, self.heads), float("nan"), device=DEV, dtype=self.acc)
        first = [pointer(self.first_keys)]

        def forward():
            kernels.launch("attention", tiles(self.q_len, self.v_dim, self.heads), 256, mats("o", "lse", "q", "k", "v") + first + end)

        def backward():
            warps = -(-rows * self.heads // 8)
            kernels.launch("attention_delta", warps, 256, [pointer(delta)] + mats("d_o", "o") + [LONG(rows), INT(self.heads), INT(self.v_dim)])
            middle = mats("d_o", "q", "k", "v", "lse") + [pointer(delta)] + first + end
            kernels.launch("attention_backward_q", tiles(self.q_len, self.dim, self.heads), 256, mats("dq") + middle)
            kernels.launch("attention_backward_kv", tiles(self.kv_len, max(self.dim, self.v_dim), self.kv_heads), 256, mats("dk", "dv") + middle)

        return forward, [backward]

    def flash(self, kernels):
        """Launches of attention_flash.cu, as src/cuda/attention_flash.rs makes them: forward, parts of the backward."""
        (forwards, backwards), dims = kernels[self.dim], self.dim + self.v_dim
        for_queries, for_keys = (self.heads, self.batch, self.q_len), (self.kv_heads, self.batch, self.kv_len)
        q, k = tensor_map(self.q, self.dim, *for_queries), tensor_map(self.k, self.dim, *for_keys)
        v, d_o = tensor_map(self.v, self.v_dim, *for_keys), tensor_map(self.d_o, self.v_dim, *for_queries)
        end = self.sizes() + [INT(self.heads), INT(self.kv_heads), LONG(self.first_query), LONG(self.window), FLOAT(self.scale)]
        first, blocks = [pointer(self.first_keys)], -(-self.q_len // 64) * self.batch
        parts = blocks * self.heads
        statistics = torch.full((parts, 260), float("nan"), device=DEV)
        bounds = torch.full((blocks, 4), -77, dtype=torch.int32, device=DEV)
        sums = torch.full((parts, 64 * self.dim), float("nan"), device=DEV)
        turns = torch.full((1 + parts,), -77, dtype=torch.int32, device=DEV)
        seen = [pointer(statistics), pointer(bounds)] + end
        tiles = lambda n, heads: -(-n // 128) * heads * self.batch

        def forward():
            shared = 2 * (128 * self.dim + 2 * 128 * dims) + 9 * 8
            arguments = matrix(self.o) + matrix(self.lse) + [q, k, v] + first + end
            forwards.launch("flash_forward", tiles(self.q_len, self.heads), 384, arguments, shared)

        def prepare():
            turns.zero_()
            arguments = [pointer(statistics), pointer(bounds)] + matrix(self.d_o) + matrix(self.o) + matrix(self.lse) + first + end
            backwards.launch("flash_statistics", parts, 256, arguments)

        def together():
            buffers = 2 if dims <= 256 else 1
            shared = 2 * (128 + 2 * 64) * dims + buffers * (2 * 128 * 64 + 4 * 64 * self.dim) + 2 * 1040 + (10 + buffers) * 8 + 4 * 4
            arguments = matrix(self.dk) + matrix(self.dv) + [pointer(sums), pointer(turns), d_o, q, k, v] + seen
            backwards.launch("flash_backward", tiles(self.kv_len, self.kv_heads), 384, arguments, shared)
            backwards.launch("flash_backward_q", parts, 256, matrix(self.dq) + [pointer(sums), pointer(bounds)] + end)

        return forward, [prepare, together]

    def reference(self):
        """Results in f64, and what a gradient's rounding is to be measured by where it cancels."""
        wide = lambda m, heads, length: m.double().reshape(length, self.batch, heads, -1).permute(1, 2, 0, 3)
        group = self.heads // self.kv_heads
        q, d_o = wide(self.q, self.heads, self.q_len), wide(self.d_o, self.heads, self.q_len)
        k, v = (wide(m, self.kv_heads, self.kv_len).repeat_interleave(group, 1) for m in (self.k, self.v))
        at = torch.arange(self.q_len, device=DEV)[:, None] + self.first_query
        key = torch.arange(self.kv_len, device=DEV)[None, :]
        seen = (key <= at) & (key > at - self.window) if self.window else (key >= 0).expand(self.q_len, -1)
        seen = seen[None, None]
        if self.first_keys is not None:
            seen = seen & (key >= self.first_keys.reshape(self.q_len, self.batch).T[:, None, :, None])
        scores = (q @ k.mT * self.scale).masked_fill(~seen, -math.inf)
        lse = scores.logsumexp(-1)
        p = (scores - lse[..., None]).exp().masked_fill(~seen, 0)
        o, dp = p @ v, d_o @ v.mT
        mean = (d_o * o).sum(-1, keepdim=True)
        ds, most = p * (dp - mean) * self.scale, p * (dp.abs() + mean.abs()) * self.scale
        flat = lambda m: m.permute(2, 0, 1, 3).reshape(m.shape[2] * self.batch, -1)
        of_keys = lambda m: flat(m.reshape(self.batch, self.kv_heads, group, self.kv_len, -1).sum(2))
        results = dict(o=flat(o), lse=flat(lse[..., None]), dq=flat(ds @ k), dk=of_keys(ds.mT @ q), dv=of_keys(p.mT @ d_o))
        # A single query's few keys may cancel altogether; many keys only in part.
        part = 1 if self.q_len == 1 else 0.05
        scales = dict(dq=flat(most @ k.abs()).norm() * part, dk=of_keys(most.mT @ q.abs()).norm() * part)
        return results, scales | dict(lse=results["lse"].numel() ** 0.5)

    def errors(self):
        """Of every result, relative; infinite where something was written outside."""
        results, scales = self.reference()
        errors = {}
        for name, want in results.items():
            got, unseen = getattr(self, name).double(), want == -math.inf
            assert torch.equal(got == -math.inf, unseen), name
            got, want = got.masked_fill(unseen, 0), want.masked_fill(unseen, 0)
            norm = max(want.norm().item(), float(scales.get(name, 0)), 1e-9)
            errors[name] = (got - want).norm().item() / norm if want.numel() else 0.0
            around = self.whole[name].clone()
            inside = getattr(self, name)
            around.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(math.nan)
            if not around.isnan().all():
                errors[name] = math.inf
        return errors


RESULTS = ("o", "lse", "dq", "dk", "dv")
LENGTHS = [  # batch, q_len, first_query, kv_len, heads, kv_heads
    (1, 1, 0, 1, 1, 1), (2, 67, 0, 67, 2, 1), (1, 131, 0, 131, 4, 2), (2, 64, 0, 129, 2, 2), (2, 66, 63, 129, 2, 1),
    (1, 1, 199, 200, 4, 2), (1, 200, 0, 65, 6, 2), (1, 700, 0, 700, 4, 1), (2, 513, 200, 713, 2, 2),
]


def check_all(path, kernels, dtype, tolerance, dims, around):
    good = total = 0
    worst = 0.0
    for dim, v_dim in dims:
        for lengths in LENGTHS:
            for window in (0, ALL, 2, 100, 300):
                for documents in ("", "documents", "random"):
                    case = Case(*lengths, dim, v_dim, window, documents, dtype, around)
                    forward, backward = getattr(case, path)(kernels)
                    bits = []
                    for _ in range(2):
                        for name in RESULTS:
                            getattr(case, name).fill_(math.nan)
                        for step in [forward, *backward]:
                            step()
                        bits.append([getattr(case, name).clone() for name in RESULTS])
                    same = all(torch.equal(a, b) for a, b in zip(*bits))
                    errors = case.errors()
                    worst = max(worst, *errors.values())
                    total += 1
                    good += same and all(e <= tolerance for e in errors.values())
                    if not same or not all(e <= tolerance for e in errors.values()):
                        print(f"WRONG {path} {dtype} {lengths} {dim} {v_dim} {window} {documents} {errors} {same=}")
    print(f"{path} {str(dtype)[6:]} heads of {dims}: {good} of {total} within {tolerance}, the same bits twice; worst {worst:.1e}", flush=True)
    return good == total


def median(run, n=15, warm=4):
    for _ in range(warm):
        run()
    times = []
    for _ in range(n):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[n // 2]


def time_all(flash, generic):
    print(f"{'':52s} forward ms TFLOP/s  backward ms TFLOP/s")
    for batch, length, heads, kv_heads, dim, v_dim, causal in [
        (4, 4096, 32, 8, 128, 128, True), (1, 16384, 48, 8, 128, 128, True), (4, 4096, 32, 8, 128, 128, False),
        (4, 4096, 32, 8, 64, 64, True), (2, 4096, 32, 32, 192, 128, True),
    ]:
        case = Case(batch, length, 0, length, heads, kv_heads, dim, v_dim, ALL if causal else 0, "", torch.bfloat16, (0, 0))
        products = 2 * batch * heads * length * length * (dim + v_dim) / (2 if causal else 1)

        def line(name, forward, backward):
            print(f"{name:52s} {forward:10.3f} {products / forward / 1e9:7.0f} {backward:12.3f} {2.5 * products / backward / 1e9:7.0f}", flush=True)

        forward, backward = case.flash(flash)
        size = dim if dim == v_dim else f"{dim}/{v_dim}"
        shape = f"{batch} x {length}, {heads}/{kv_heads} heads of {size}{', causal' if causal else ''}"
        line(shape, median(forward), median(lambda: [step() for step in backward]))
        heads_first = lambda m, h: m.reshape(length, batch, h, -1).permute(1, 2, 0, 3).contiguous()
        q, k, v = (heads_first(m, h).requires_grad_() for m, h in ((case.q, heads), (case.k, kv_heads), (case.v, kv_heads)))
        d_o = heads_first(case.d_o, heads)
        attention = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            for deterministic in (True, False):
                torch.use_deterministic_algorithms(deterministic, warn_only=True)
                name = f"  torch, {backend.name.lower()}{', deterministic' if deterministic else ''}"
                try:
                    with sdpa_kernel(backend):
                        with torch.no_grad():
                            forward_ms = median(attention)
                        o = attention()
                        backward_ms = median(lambda: torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True))
                    line(name, forward_ms, backward_ms)
                except RuntimeError as refused:
                    print(name, "refuses:", str(refused).splitlines()[0][:80])
        torch.use_deterministic_algorithms(False)
        del q, k, v, d_o
    case = Case(1, 4096, 0, 4096, 32, 8, 128, 128, ALL, "", torch.bfloat16, (0, 0))
    forward, backward = case.generic(generic)
    products = 4 * 32 * 4096 * 4096 * 128 / 2
    forward, backward = median(forward, 3, 1), median(backward[0], 3, 1)
    print(f"{'1 x 4096, 32/8 heads of 128, causal, attention.cu':52s} {forward:10.3f} {products / forward / 1e9:7.0f} {backward:12.3f} {2.5 * products / backward / 1e9:7.0f}")


def main():
    warnings.simplefilter("ignore")  # of what is not deterministic, which is said beside the times
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("check", "time"))
    only = parser.parse_args().only
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    hopper = lambda dim, *files: Kernels("attention_flash.cuh", "attention_flash_rows.cuh", *files, dtype="BF16", HEAD_DIM=dim, V_HEAD_DIM=min(dim, 128))
    backward_of = lambda dim: hopper(dim, "attention_flash_queries.cuh", "attention_flash_keys.cuh", "attention_flash_backward.cu")
    flash = {dim: [hopper(dim, "attention_flash.cu"), backward_of(dim)] for dim in (64, 128, 192)}
    generic = Kernels("attention.cu", dtype="BF16")
    good = True
    if only != "time":
        good &= check_all("flash", flash, torch.bfloat16, 1.5e-2, [(64, 64), (128, 128), (192, 128)], (8, 8))
        good &= check_all("generic", generic, torch.bfloat16, 1.5e-2, [(128, 128), (192, 128), (3, 5)], (3, 4))
        for name, tolerance in (("F32", 5e-5), ("F64", 1e-12)):
            good &= check_all("generic", Kernels("attention.cu", dtype=name), TYPES[name], tolerance, [(64, 64), (24, 17)], (3, 4))
    if only != "check":
        time_all(flash, generic)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
