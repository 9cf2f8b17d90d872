#!/usr/bin/env bash
# A whole training step on one GPU beside PyTorch's (transformers, compiled): 3 layers of Mixtral-8x7B, 8 of Qwen3-30B-A3B.
# Needs a GPU of 141 GB, NVRTC and cuBLASLt where the loader finds them (LD_LIBRARY_PATH), and python3 with torch and transformers.
# Takes about ten minutes, most of them in PyTorch's compiler.
#     PYTHON=python3 benchmarks/cuda_step.sh [mixtral|qwen3] [--ours|--eager]
# --ours leaves PyTorch out, --eager does not compile it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
models=() peer=(--compile)
for argument; do
    case $argument in
        mixtral | qwen3) models+=("$argument") ;;
        --ours) peer=() ;;
        --eager) peer=(--eager) ;;
        *) echo "unknown argument $argument" >&2; exit 2 ;;
    esac
done
[ ${#models[@]} -gt 0 ] || models=(mixtral qwen3)
program=${MOE_TRAIN:-${CARGO_TARGET_DIR:-target}/release/moe-train}
[ -n "${MOE_TRAIN:-}" ] || cargo build --release --quiet --features cuda

mkdir -p runs
for model in "${models[@]}"; do
    case $model in
        mixtral) config=examples/gpu/mixtral_3_layers.toml vocabulary=32000 ;;
        qwen3) config=examples/gpu/qwen3_8_layers.toml vocabulary=151936 ;;
    esac
    "$python" benchmarks/cuda_step.py tokens $vocabulary runs/random_tokens_$vocabulary
    # PyTorch's attention adds the gradient of queries in any order: ours does so only if asked to, which the second run does.
    for deterministic in true false; do
        output=$(mktemp -d runs/cuda_step.XXXXXX)
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=200 > "$output/memory" & watcher=$!
        "$program" train "$config" --set train.output="$output/run" --set train.deterministic=$deterministic > "$output/log" \
            || { kill $watcher; tail "$output/log"; exit 1; }
        kill $watcher
        "$python" benchmarks/cuda_step.py ours $model "$output" $deterministic
        rm -r "$output"
    done
    [ ${#peer[@]} -eq 0 ] || "$python" benchmarks/cuda_step.py "${peer[@]}" $model
done
