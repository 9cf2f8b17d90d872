#!/usr/bin/env bash
# A whole MoE layer on one GPU beside PyTorch's, forward and backward, and the parts of ours.
# Needs a GPU, NVRTC and cuBLASLt where the loader finds them (LD_LIBRARY_PATH), and python3 with torch. Takes a few minutes.
#     PYTHON=python3 benchmarks/cuda_moe_layer.sh [SHAPE]      only the shapes that begin with SHAPE
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --quiet -p moe-model --features cuda --example cuda_moe_layer
"${CARGO_TARGET_DIR:-target}/release/examples/cuda_moe_layer" "$@"
"${PYTHON:-python3}" benchmarks/cuda_moe_layer.py "$@"
