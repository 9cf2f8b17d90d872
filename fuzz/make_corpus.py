"""Writes the seeds of the fuzz targets: what is read without an error, and inputs near it. Needs the standard library alone.

    python3 fuzz/make_corpus.py
"""

import json
import struct
from pathlib import Path

FUZZ = Path(__file__).parent
FIXTURES = FUZZ.parent / "moe-train/tests/fixtures"
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}

HIDDEN, VOCAB, WIDTH, HEAD = 4, 5, 3, 2
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": [VOCAB, HIDDEN],
    LAYER + "input_layernorm.weight": [HIDDEN],
    LAYER + "self_attn.q_proj.weight": [2 * HEAD, HIDDEN],
    LAYER + "self_attn.k_proj.weight": [HEAD, HIDDEN],
    LAYER + "self_attn.v_proj.weight": [HEAD, HIDDEN],
    LAYER + "self_attn.o_proj.weight": [HIDDEN, 2 * HEAD],
    LAYER + "self_attn.q_norm.weight": [HEAD],
    LAYER + "self_attn.k_norm.weight": [HEAD],
    LAYER + "post_attention_layernorm.weight": [HIDDEN],
    LAYER + "mlp.gate.weight": [2, HIDDEN],
    **{
        f"{LAYER}mlp.experts.{e}.{projection}_proj.weight": [HIDDEN, WIDTH] if projection == "down" else [WIDTH, HIDDEN]
        for e in range(2)
        for projection in ("gate", "up", "down")
    },
    "model.norm.weight": [HIDDEN],
    "lm_head.weight": [VOCAB, HIDDEN],
}


def safetensors(shapes, dtype):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = WIDTHS[dtype] * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(end)


def seed(target, name, data):
    folder = FUZZ / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


for dtype in ("F32", "BF16", "F16"):
    seed("safetensors", dtype.lower(), safetensors(SHAPES, dtype))
whole = safetensors(SHAPES, "BF16")
seed("safetensors", "cut_off", whole[:-1])
seed("safetensors", "no_number", whole[:-2] + b"\xc0\x7f")
huge = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 1 << 63]}}).encode()
seed("safetensors", "huge", struct.pack("<Q", len(huge)) + huge)
seed("safetensors", "long_header", struct.pack("<Q", 1 << 63) + b"{}")

names = list(SHAPES)
shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
(FUZZ / "seeds").mkdir(exist_ok=True)
for file, tensors in shards.items():
    (FUZZ / "seeds" / file).write_bytes(safetensors({name: SHAPES[name] for name in tensors}, "BF16"))
places = {name: file for file, tensors in shards.items() for name in tensors}
for name, weight_map in {
    "whole": places,
    "missing": {name: file for name, file in places.items() if name != "lm_head.weight"},
    "elsewhere": {**places, "lm_head.weight": "../c.safetensors"},
    "other_file": {**places, "lm_head.weight": "a.safetensors"},
}.items():
    seed("shard_index", name, json.dumps({"metadata": {}, "weight_map": weight_map}, separators=(",", ":")).encode())

for config in sorted((FIXTURES / "hf").glob("*/config.json")):
    seed("hub_config", config.parent.name, config.read_bytes())

for idx in sorted((FIXTURES / "megatron").glob("*.idx")):
    length = idx.with_suffix(".bin").stat().st_size
    seed("megatron_idx", idx.stem, struct.pack("<Q", length) + idx.read_bytes())

for version in (1, 2):
    # Six tokens of two bytes in two documents; the target makes the checksum of the header.
    header = b"MOETOKEN" + struct.pack("<IIQQQ", version, 2, 9, 6, 2) + bytes(88)
    body = struct.pack("<6H", *range(6)) + bytes(4) + struct.pack("<3Q", 0, 4, 6)
    seed("token_file", f"version_{version}", header + body + (b"\x3e" + bytes(7)) * (version == 2))


def piece(tensor, rows, part, offset, dtype="f32"):
    return {
        "tensor": tensor, "kind": "param", "dtype": dtype, "dims": [4, 2], "rows": {"start": rows[0], "end": rows[1]},
        "cols": {"start": 0, "end": 2}, "part": {"start": part[0], "end": part[1]}, "offset": offset,
        "bytes": (part[1] - part[0]) * 4, "blake3": f"#{(part[1] - part[0]) * 4}",
    }  # fmt: skip


for name, pieces in {
    "halves": [piece("a", (0, 4), (0, 8), 0), piece("b", (0, 2), (0, 4), 32), piece("b", (2, 4), (0, 4), 48)],
    "overlap": [piece("a", (0, 4), (0, 8), 0), piece("a", (2, 4), (0, 4), 32), piece("b", (2, 4), (0, 4), 48)],
}.items():
    manifest = {"version": 1, "step": 1, "meta": {}, "files": [{"name": "rank-00000.bin", "pieces": pieces}]}
    seed("checkpoint", name, json.dumps(manifest, separators=(",", ":")).encode())

for name, text in {
    "one_f_one_b": "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n",
    "with_messages": "0F0,0SEND_F0,0RECV_B0,0WAIT_RECV_B0,0B0,0WAIT_SEND_F0\n"
    "1RECV_F0,1WAIT_RECV_F0,1F0,1B0,1SEND_B0,1WAIT_SEND_B0\n",
    "overlap": "0F0,3F0,(0F1;3B0)OVERLAP_F_B,3F1,(0F2;0B0)OVERLAP_F_B,3I1,3W1,0B1,3F2,3B2,0B2\n"
    "1F0,2F0,1F1,2B0,2F1,1B0,1F2,2B1,2F2,1B1,2B2,1B2\n",
    "copies": "0F0,3F1,0B0,3B1\n2F1,1F0,1B0,2B1\n",
    "forward_only": ",0F0,,0F1\n1F0,1F1\n",
}.items():
    seed("schedule", name, text.encode())

PAIR = (
    "0I_COMBINE,0F_ATTENTION,0F_DISPATCH,0I_WAIT_COMBINE,0I_EXPERTS,0I_DISPATCH,0F_WAIT_DISPATCH,0F_EXPERTS,0F_COMBINE,"
    "0W_EXPERTS,0I_WAIT_DISPATCH,0I_ATTENTION,0W_ATTENTION,0F_WAIT_COMBINE"
)
seed("woven_order", "pair", PAIR.encode())
seed("woven_order", "dense", b"1I_DENSE,0F_DENSE,1W_DENSE,0I_DENSE,0W_DENSE")
