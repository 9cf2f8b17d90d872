"""A random Qwen3-30B-A3B, cut to some layers, in bf16: its folder, and whether another folder has its weights.

    real_size.py make DIR [--layers 2]
    real_size.py same DIR [--layers 2]                  every tensor of DIR has the bytes that `make` writes
    real_size.py stepped DIR --lr 1e-3 [--layers 2]     DIR, in f32, is one step of AdamW from there

Weights are made again instead of read, chunk by chunk, so that the folder need not be kept. Needs NumPy.
"""

import argparse
import json
import struct
from pathlib import Path

import numpy as np

HIDDEN, VOCAB, EXPERTS, WIDTH, HEADS, KV_HEADS, HEAD = 2048, 151936, 128, 768, 32, 4, 128
CHUNK = 1 << 22
SHARDS = 2


def config(layers):
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": WIDTH,
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    }


def shapes(layers):
    """Names with shapes, in the order of the files."""
    tensors = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        tensors[layer + "input_layernorm.weight"] = (HIDDEN,)
        tensors[layer + "self_attn.q_proj.weight"] = (HEADS * HEAD, HIDDEN)
        tensors[layer + "self_attn.k_proj.weight"] = (KV_HEADS * HEAD, HIDDEN)
        tensors[layer + "self_attn.v_proj.weight"] = (KV_HEADS * HEAD, HIDDEN)
        tensors[layer + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD)
        tensors[layer + "self_attn.q_norm.weight"] = (HEAD,)
        tensors[layer + "self_attn.k_norm.weight"] = (HEAD,)
        tensors[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
        tensors[layer + "mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            for projection in ("gate", "up"):
                tensors[f"{layer}mlp.experts.{e}.{projection}_proj.weight"] = (WIDTH, HIDDEN)
            tensors[f"{layer}mlp.experts.{e}.down_proj.weight"] = (HIDDEN, WIDTH)
    tensors["model.norm.weight"] = (HIDDEN,)
    tensors["lm_head.weight"] = (VOCAB, HIDDEN)
    return tensors


def chunks(name, shape):
    """The bits of a tensor's elements, some at a time, each with its place."""
    size = int(np.prod(shape))
    random = np.random.default_rng(np.frombuffer(name.encode(), dtype=np.uint8))
    mean, std = (1.0, 0.1) if len(shape) == 1 else (0.0, 0.02)
    for at in range(0, size, CHUNK):
        values = random.standard_normal(min(CHUNK, size - at), dtype=np.float32) * np.float32(std) + np.float32(mean)
        bits = values.view(np.uint32)
        yield at, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make(folder, layers):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2) + "\n")
    names = list(shapes(layers).items())
    total = sum(2 * int(np.prod(shape)) for _, shape in names)
    shards, size = [[]], 0
    for name, shape in names:
        if size >= total / SHARDS:
            shards, size = [*shards, []], 0
        shards[-1].append((name, shape))
        size += 2 * int(np.prod(shape))
    places = {}
    for n, shard in enumerate(shards, start=1):
        file = f"model-{n:05}-of-{len(shards):05}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard:
            start, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            places[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, shape in shard:
                for _, bits in chunks(name, shape):
                    out.write(bits.tobytes())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def stored(folder, layers):
    """The tensors of a folder as arrays, mapped; there are to be those of the model."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, info in header.items():
            dtype = {"BF16": np.uint16, "F32": np.float32}[info["dtype"]]
            start, end = info["data_offsets"]
            count = (end - start) // np.dtype(dtype).itemsize
            tensors[name] = info, np.memmap(path, dtype, "r", 8 + length + start, (count,))
    want = {name: list(shape) for name, shape in shapes(layers).items()}
    found = {name: info["shape"] for name, (info, _) in tensors.items()}
    assert found == want, f"{folder}: not the tensors of the model: {sorted(set(found.items()) ^ set(want.items()))[:3]}"
    return {name: array for name, (_, array) in tensors.items()}


def same(folder, layers):
    tensors = stored(folder, layers)
    for name, shape in shapes(layers).items():
        for at, bits in chunks(name, shape):
            assert np.array_equal(tensors[name][at : at + len(bits)], bits), f"{name} differs"
    print(f"{folder}: {len(tensors)} tensors, all bytes the same")


def stepped(folder, layers, lr, decay):
    """|θ' − (1 − lr·λ)·θ| ≤ lr: the first update of AdamW is lr times m̂/√v̂, which is the gradient's sign."""
    tensors = stored(folder, layers)
    learnt, largest = 0, 0.0
    for name, shape in shapes(layers).items():
        keep = 1.0 - lr * decay if len(shape) == 2 else 1.0
        moved = 0.0
        for at, bits in chunks(name, shape):
            old = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            new = tensors[name][at : at + len(bits)].astype(np.float64)
            assert np.isfinite(new).all(), f"{name} is not finite"
            moved = max(moved, float(np.abs(new - keep * old).max()))
        assert moved <= lr * 1.001 + 1e-6, f"{name} moved by {moved}"
        expert = ".experts." in name
        assert expert or moved > 0.5 * lr, f"{name} did not learn: {moved}"
        learnt += moved > 0.5 * lr
        largest = max(largest, moved)
    print(f"{folder}: {len(tensors)} tensors, all finite, {learnt} with a gradient; largest update {largest:.3e}")


parser = argparse.ArgumentParser()
parser.add_argument("action", choices=["make", "same", "stepped"])
parser.add_argument("dir", type=Path)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--lr", type=float)
parser.add_argument("--decay", type=float, default=0.1)
arguments = parser.parse_args()
match arguments.action:
    case "make":
        make(arguments.dir, arguments.layers)
    case "same":
        same(arguments.dir, arguments.layers)
    case "stepped":
        stepped(arguments.dir, arguments.layers, arguments.lr, arguments.decay)
