#!/usr/bin/env bash
# The losses on held-out text that a configuration comes to on the CPU, as it is and in f32, and on one GPU in f32 and bf16: for three
# seeds, which draw the weights and the order of samples (the CPU's and the GPU's alike). Needs a GPU, NVRTC and cuBLASLt where the loader finds them
# (LD_LIBRARY_PATH), and python3. All nine runs go at once.
#     PYTHON=python3 benchmarks/same_losses.sh [CONFIG [OPTION…]]      options of `moe-train train`, for instance --set train.steps=200
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:-examples/quickstart.toml}
shift $(($# > 0))
program=${MOE_TRAIN:-${CARGO_TARGET_DIR:-target}/release/moe-train}
[ -n "${MOE_TRAIN:-}" ] || cargo build --release --quiet --features cuda

mkdir -p runs
runs=$(mktemp -d runs/same_losses.XXXXXX)
trap 'rm -r "$runs"' EXIT
alone=(--set parallel.world_size=1)
for axis in tp cp cp_ulysses pp vpp ep etp; do alone+=(--set parallel.$axis=1); done
run() { # NAME SEED OPTIONS…
    local out=$runs/$1.$2 seed=$2
    shift 2
    "$program" train "$config" "$@" --set train.seed="$seed" --set train.output="$out" --set train.keep_checkpoints=0 \
        --set train.eval_interval=0 > "$out.log" 2>&1 || { tail "$out.log" >&2; return 1; }
}
processes=()
begin() { run "$@" & processes+=($!); }
end() { for process in "${processes[@]}"; do wait "$process"; done; }
for seed in 1 2 3; do begin cpu-f32 $seed "$@" --set train.dtype=f32; done
for dtype in f32 bf16; do
    for seed in 1 2 3; do
        begin gpu-$dtype $seed "$@" "${alone[@]}" --set train.device=cuda --set train.dtype=$dtype
    done
done
end
"${PYTHON:-python3}" - "$runs" << 'END'
import json, pathlib, statistics, sys

runs = pathlib.Path(sys.argv[1])
losses = {}
for kind in ("cpu-f32", "gpu-f32", "gpu-bf16"):
    lines = [(runs / f"{kind}.{seed}" / "metrics.jsonl").read_text().splitlines() for seed in (1, 2, 3)]
    losses[kind] = [json.loads(run[-1])["val_loss"] for run in lines]
for kind, of in losses.items():
    mean = statistics.mean(of)
    beside = mean - statistics.mean(losses["cpu-f32"])
    print(f"{kind:9}" + "".join(f"{loss:9.4f}" for loss in of) + f"   mean {mean:.4f}   {beside:+.4f}")
sys.exit(any(abs(statistics.mean(of) - statistics.mean(losses["cpu-f32"])) > 0.02 for of in losses.values()))
END
