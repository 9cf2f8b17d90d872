#!/usr/bin/env bash
# Peak memory with a model of real size: a random Qwen3-30B-A3B cut to two layers (hidden 2048, 128 experts of 768, vocabulary
# 151,936; 1.87 G parameters, 7 GiB in f32) is imported, exported unchanged, trained for a step and exported. Prints the largest
# resident set of each command, and fails beyond LIMIT_GIB (20 unless given). Takes minutes, 16 GiB of memory and 27 GB of disk.
#     PYTHON=python3 benchmarks/real_size.sh [FOLDER]      python3 with numpy; FOLDER is made, and removed
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=${1:-$(mktemp -d)}
layers=${LAYERS:-2}
cargo build --release --quiet -p moe-train
bin=$PWD/${CARGO_TARGET_DIR:-target}/release/moe-train
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT

# Runs a command; its peak and its time go to the table.
measured() {
    local name=$1
    shift
    printf '== %s\n' "$name"
    "$python" - "$name" "$work/table" "${LIMIT_GIB:-20}" "$@" <<'PY'
import resource, subprocess, sys, time
name, table, limit, *command = sys.argv[1:]
start = time.monotonic()
status = subprocess.run(command).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of KiB
with open(table, "a") as out:
    print(f"| {name} | {peak:.2f} GiB | {time.monotonic() - start:.0f} s |", file=out)
sys.exit(status or (f"{name} took {peak:.2f} GiB" if peak > float(limit) else 0))
PY
}

"$python" benchmarks/real_size.py make "$work/hub" --layers "$layers"
measured import "$bin" import "$work/hub" "$work/imported"
rm -rf "$work/hub"
measured "export of what was imported" "$bin" export "$work/imported/step-0" "$work/same"
"$python" benchmarks/real_size.py same "$work/same" --layers "$layers"
rm -rf "$work/same"

"$python" -c 'print("The quick brown fox jumps over the lazy dog.\n" * 2000)' >"$work/text.txt"
cat >"$work/run.toml" <<TOML
[train]
init_checkpoint = "$work/imported/step-0"
steps = 1
global_batch_size = 1
micro_batch_size = 1
sequence_length = 128
output = "$work/run"
eval_batches = 1
deadline_seconds = 900
[optimizer]
lr = 1e-3
lr_schedule = "constant"
warmup_steps = 0
weight_decay = 0.1
clip_grad = 1.0
exp_avg_dtype = "bf16"
exp_avg_sq_dtype = "bf16"
[data]
files = ["$work/text.txt"]
held_out = 0.1
[sample]
prompt = "The "
tokens = 1
temperature = 0.0
TOML
measured "a training step" "$bin" train "$work/run.toml"
rm -rf "$work/imported"
measured "export of the step, in f32" "$bin" export "$work/run" "$work/stepped" --dtype f32
rm -rf "$work/run"
"$python" benchmarks/real_size.py stepped "$work/stepped" --lr 1e-3 --decay 0.1 --layers "$layers"
printf '\n| | peak | time |\n|---|---|---|\n'
cat "$work/table"
