"""A text as the tokens of `moe-train trace`, a byte each.
Usage: make_tokens.py OUT TEXT... (PyPI: torch, safetensors)"""
import sys

import torch
from safetensors.torch import save_file

save_file({"input_ids": torch.tensor([list(text.encode()) for text in sys.argv[2:]])}, sys.argv[1])
