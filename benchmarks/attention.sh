#!/usr/bin/env bash
# Attention as the CUDA backend runs it, then its own kernels beside PyTorch's by cuDNN and FlashAttention, on one Hopper GPU.
# Needs cuDNN, NVRTC and cuBLASLt where the loader finds them (LD_LIBRARY_PATH), and python3 with torch. Takes about a minute.
#     PYTHON=python3 benchmarks/attention.sh
set -euo pipefail
cd "$(dirname "$0")/.."
cargo run --release --quiet -p moe-kernels --features cuda-13000 --example cuda_attention
"${PYTHON:-python3}" benchmarks/attention.py --only time
