"""Logits of a folder of the hub by transformers, beside those that `moe-train trace` wrote.
Usage: check.py FOLDER TRACE (PyPI: torch, transformers, safetensors)"""
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

trace = load_file(sys.argv[2])
model, report = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float64, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
)
problems = {key: value for key, value in report.items() if value}
assert not problems, problems
with torch.no_grad():
    logits = model(input_ids=trace["input_ids"]).logits
difference = (logits - trace["logits"]).abs().max() / logits.abs().max()
print(f"{tuple(logits.shape)} logits, largest {logits.abs().max():.3f}, differ by {difference:.1e} of it")
assert difference < 1e-6
