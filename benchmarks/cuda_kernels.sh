#!/usr/bin/env bash
# The memory-bound kernels of the CUDA backend beside PyTorch's, on one GPU: time, bandwidth, and that as a share of a copy's.
# Needs a GPU, NVRTC where the loader finds it (LD_LIBRARY_PATH), and python3 with torch. Takes a few minutes.
#     PYTHON=python3 benchmarks/cuda_kernels.sh [NAME...]      only what begins with a NAME
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --quiet -p moe-kernels --features cuda-13000 --example cuda_kernels
ours=$(mktemp)
trap 'rm -f "$ours"' EXIT
"${CARGO_TARGET_DIR:-target}/release/examples/cuda_kernels" "$@" >"$ours"
"${PYTHON:-python3}" benchmarks/cuda_kernels.py "$ours"
