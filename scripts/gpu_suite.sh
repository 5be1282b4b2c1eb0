#!/usr/bin/env bash
# Everything worth running on a GPU, in one go: tests on the GPU backend, the whole baseline, the benchmark.
#
#   bash scripts/gpu_suite.sh OUT_DIR TOKEN_DIR      (TOKEN_DIR: GPT-2 token files, from scripts/prepare_data.py)
#
# OUT_DIR receives tests.log, baseline.log, bench.json and baseline.tar.gz (the record without the checkpoints).
# Uses the python on the PATH; every part runs even if one before it failed.
set -u
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
data=$2
run=$(mktemp -d)/bf16_baseline
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"

timeout 240 python3 scripts/train.py --config configs/bf16_baseline.py --data_dir "$data" --workdir "$run" \
    --config.wandb_mode=disabled 2>&1 | tee "$out/baseline.log" | tail -n 30
tar czf "$out/baseline.tar.gz" -C "$run" manifest.json metrics.jsonl timing.jsonl verdict.json loss.png

timeout 150 python3 scripts/bench.py --config configs/bf16_baseline.py --rounds 9 --steps_per_round 25 \
    --json "$out/bench.json" 2>&1 | tee "$out/bench.log" | tail -n 12

JAX_PLATFORMS=cuda timeout 200 python3 -m pytest -m "not oracle" tests/test_step.py tests/test_model.py \
    tests/test_quant_dot.py tests/test_quant_dot_formats.py tests/test_quantize.py tests/test_metrics.py tests/test_stability.py tests/test_training.py 2>&1 \
    | tee "$out/tests.log" | tail -n 15
