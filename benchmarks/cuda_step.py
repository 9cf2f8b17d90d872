"""A whole training step in transformers, and the figures of moe-train's own, for `cuda_step.sh`.

    python3 benchmarks/cuda_step.py tokens VOCABULARY PREFIX     random tokens, as a dataset of Megatron's
    python3 benchmarks/cuda_step.py ours mixtral|qwen3 FOLDER true|false     the figures of a run of moe-train, with this `train.deterministic`
    python3 benchmarks/cuda_step.py --compile|--eager mixtral|qwen3      the same of transformers

Both train on 4 sequences of 4096 random tokens: forward, backward, AdamW. transformers has weights, gradients and moments in bf16, PyTorch's
fused AdamW, its grouped products for the experts, no loss but that of the tokens and no clipping; moe-train has weights in bf16 beside
master weights, gradients and moments in f32, the load-balancing loss and clipping. Times are medians of 8 steps after 6 (4 of transformers).
The share of the GPU's peak (MFU) counts what `docs/semantics.md` counts: causal attention once, the experts that a token goes to, nothing
that is computed again. Tab-separated: whose, model, milliseconds, tokens/s, MFU, peak memory in GB of tensors (ours also of all
that the process takes), least and largest load of an expert of any layer in multiples of a balanced one, in the last step.
"""

import array
import json
import pathlib
import random
import statistics
import struct
import sys

BATCH, LENGTH, PEAK = 4, 4096, 989.5e12
MODELS = {
    "mixtral": dict(
        kind="Mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=3, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    ),
    "qwen3": dict(
        kind="Qwen3Moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=8,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    ),
}  # fmt: skip


def flops(model):
    """Floating-point operations of a step."""
    c = MODELS[model]
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    head = c.get("head_dim", hidden // heads)
    projections = 4 * hidden * heads * head + 4 * hidden * c["num_key_value_heads"] * head
    attention = 2 * LENGTH * heads * head
    experts = 6 * hidden * c["num_experts_per_tok"] * c.get("moe_intermediate_size", c["intermediate_size"])
    token = c["num_hidden_layers"] * (projections + attention + experts) + 2 * hidden * c["vocab_size"]
    return 3 * token * BATCH * LENGTH


def line(whose, model, seconds, gigabytes, loads):
    mfu = flops(model) / seconds / PEAK
    rate = BATCH * LENGTH / seconds
    print(f"{whose}\t{model}\t{1e3 * seconds:.1f} ms\t{rate:.0f} tokens/s\t{100 * mfu:.1f}%\t{gigabytes}\t{loads[0]:.2f}-{loads[1]:.2f}", flush=True)


def write_tokens(vocabulary, prefix):
    """One document of 16 steps' worth of tokens, and another."""
    lengths = [16 * BATCH * LENGTH + 1, 16]
    random.seed(0)
    tokens = array.array("i", (random.randrange(vocabulary) for _ in range(sum(lengths))))
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(lengths), len(lengths) + 1)
    index += struct.pack("<2i2q3q", *lengths, 0, 4 * lengths[0], 0, 1, 2)
    pathlib.Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    pathlib.Path(f"{prefix}.idx").write_bytes(index)


def ours(model, folder, deterministic):
    folder = pathlib.Path(folder)
    records = [json.loads(text) for text in (folder / "run/metrics.jsonl").read_text().splitlines()]
    seconds = [BATCH * LENGTH / record["tokens_per_second"] for record in records[6:]]
    used = [int(text) for text in (folder / "memory").read_text().split()]
    loads = [load * len(layer) for layer in records[-1]["expert_load"] for load in layer]
    whose = "moe-train" if deterministic == "true" else "moe-train, any order"
    peak = f"{records[-1]['peak_memory_bytes'] / 1e9:.1f} (allocated; {max(used) * 2**20 / 1e9:.1f} by nvidia-smi)"
    line(whose, model, statistics.median(seconds), peak, (min(loads), max(loads)))


def peer(model, compiled):
    import torch
    import transformers

    config = dict(MODELS[model])
    kind = config.pop("kind")
    config = getattr(transformers, f"{kind}Config")(**config)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    net.train()
    forward = torch.compile(net) if compiled else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH), device="cuda")
    seconds = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    peak = torch.cuda.max_memory_allocated() / 1e9
    with torch.no_grad():
        chosen = [
            logits.topk(config.num_experts_per_tok).indices.flatten().bincount(minlength=logits.shape[1])
            for logits in net(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
        ]
    loads = [count / counts.float().mean().item() for counts in chosen for count in counts.tolist()]
    whose = f"transformers {transformers.__version__}, {'compiled' if compiled else 'eager'}"
    line(whose, model, statistics.median(seconds[4:]), f"{peak:.1f} (allocated)", (min(loads), max(loads)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tokens", vocabulary, prefix]:
            write_tokens(int(vocabulary), prefix)
        case ["ours", model, folder, deterministic]:
            ours(model, folder, deterministic)
        case ["--compile" | "--eager" as how, model]:
            peer(model, how == "--compile")
        case _:
            sys.exit(__doc__)
