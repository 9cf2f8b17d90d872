#!/usr/bin/env bash
# Norm, language-model head and cross-entropy on one GPU beside PyTorch's: time and memory of the loss, and with all gradients.
# Needs a GPU, NVRTC and cuBLASLt where the loader finds them (LD_LIBRARY_PATH), and python3 with torch. Takes two minutes.
#     PYTHON=python3 benchmarks/cuda_head.sh [SHAPE]      only the shapes that begin with SHAPE
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --quiet -p moe-model --features cuda --example cuda_head
"${CARGO_TARGET_DIR:-target}/release/examples/cuda_head" "$@"
"${PYTHON:-python3}" benchmarks/cuda_head.py "$@"
