"""Texts of equally many tokens as the tokens of `moe-train trace`.
Usage: make_tokens.py FOLDER OUT TEXT... (PyPI: torch, transformers, safetensors)"""
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

folder, out, *texts = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(folder)(texts).input_ids
length = min(map(len, ids))
save_file({"input_ids": torch.tensor([row[:length] for row in ids])}, out)
