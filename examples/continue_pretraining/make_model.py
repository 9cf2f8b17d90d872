"""A small Qwen3-MoE over bytes with random weights, in bf16, as a folder of the hub.
Usage: make_model.py FOLDER (PyPI: torch, transformers)"""
import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.manual_seed(1)
config = Qwen3MoeConfig(
    vocab_size=257, hidden_size=64, intermediate_size=128, moe_intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
    norm_topk_prob=True, mlp_only_layers=[0], max_position_embeddings=128, output_router_logits=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1], max_shard_size="200KB")
