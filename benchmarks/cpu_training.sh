#!/usr/bin/env bash
# One training step on two CPU cores, moe-train beside PyTorch, in alternation so that both see the same machine.
# PYTHON is an interpreter with torch (any CPU build).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
cargo build --release --quiet -p moe-train --example cpu_training
bin=${CARGO_TARGET_DIR:-target}/release/examples/cpu_training
for _ in 1 2 3; do
    "$bin" "${STEPS:-12}"
    "$python" benchmarks/torch_train.py --threads 2 --steps "${STEPS:-12}"
done
