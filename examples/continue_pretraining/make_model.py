"""A small Qwen3-MoE with random weights, in bf16, and a byte-level BPE that is trained on the texts given, as a folder of the hub.
Usage: make_model.py FOLDER TEXT-FILE... (PyPI: torch, transformers)"""
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

folder, *texts = sys.argv[1:]
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train(texts, trainers.BpeTrainer(
    vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
))
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)

torch.manual_seed(1)
config = Qwen3MoeConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=128, moe_intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
    norm_topk_prob=True, mlp_only_layers=[0], max_position_embeddings=128, output_router_logits=True,
    bos_token_id=None, eos_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
