#!/usr/bin/env bash
# Tokens of the same JSON lines by `moe-train data prepare` and by the Python tokenizers, in alternation so that both see the same
# machine, on the same cores. WORK keeps corpus, tokenizer and environment; MEGABYTES is the size of the corpus.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${WORK:-${TMPDIR:-/tmp}/data_prepare}
megabytes=${MEGABYTES:-100}
rounds=${ROUNDS:-3}
export RAYON_NUM_THREADS=${THREADS:-$(nproc)}
mkdir -p "$work"
if ! "$work/venv/bin/python" -c 'import numpy, tokenizers' 2>/dev/null; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet tokenizers==0.23.2 numpy
fi
python=$work/venv/bin/python
script=benchmarks/data_prepare.py
[ -f "$work/$megabytes/corpus.jsonl" ] || "$python" $script make "$work/$megabytes" "$megabytes"
cargo build --release --quiet -p moe-train
bin=${CARGO_TARGET_DIR:-target}/release/moe-train
for _ in $(seq "$rounds"); do
    "$python" $script ours "$work/$megabytes" "$bin"
    "$python" $script python "$work/$megabytes"
done | tee "$work/$megabytes/rounds.jsonl"
"$python" $script compare "$work/$megabytes"
