#!/usr/bin/env bash
# Everything worth running on a GPU, in one go: the tests that touch the device, the rounding certificates, the whole
# baseline, the benchmark, 8-bit training emulated and native, sixteen runs in one program, the matrix and its report.
#
#   bash scripts/gpu_suite.sh OUT_DIR TOKEN_DIR BYTES_DIR
#
# TOKEN_DIR, BYTES_DIR: token files of the gpt2 and of the bytes tokenizer, from scripts/prepare_data.py. OUT_DIR receives
# logs, tables and records without checkpoints, packed. Uses the python on the PATH; every part runs even if one before it
# failed, and each has a time limit, so that all of it ends within 30 minutes.
set -u
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
data=$2
bytes=$3
runs=$(mktemp -d)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"

pack() { # run folder, name
    tar czf "$out/$2.tar.gz" -C "$1" --exclude='[0-9]*' --exclude=anomaly --exclude=wandb .
}

JAX_PLATFORMS=cuda timeout 240 python3 -m pytest -m "not oracle" tests/test_rounding.py tests/test_products.py \
    tests/test_products_formats.py tests/test_step.py tests/test_step_formats.py tests/test_gpt2.py \
    tests/test_metrics.py tests/test_ledger.py tests/test_histograms.py 2>&1 | tee "$out/tests.log" | tail -n 15

timeout 60 python3 -c '
from altgrad_jax.numerics.formats import FORMATS
from altgrad_jax.numerics.rounding import canary
for fmt in FORMATS.values():
    found = canary(fmt)
    print(fmt.name, found["device"], found["n_inputs"], found["n_changed"], found["image_sha256"], flush=True)
' 2>&1 | tee "$out/canary.log" | tail -n 3

timeout 240 python3 scripts/train.py --config configs/bf16_baseline.py --data_dir "$data" --workdir "$runs/bf16_baseline" \
    --config.wandb_mode=disabled 2>&1 | tee "$out/baseline.log" | tail -n 30
pack "$runs/bf16_baseline" baseline

# Metrics, record, K, peers, formats, attention, sizes; what 330 s do not reach is named in the log.
timeout 380 python3 scripts/bench.py --config configs/bf16_baseline.py --budget_s=330 --json "$out/bench.json" \
    2>&1 | tee "$out/bench.log" | tail -n 40

JAX_PLATFORMS=cuda timeout 90 python3 tests/fault_campaign.py --quick --parts=numerics --out "$out/faults.md" \
    2>&1 | tee "$out/faults.log" | tail -n 5

for how in emulated native; do
    timeout 150 python3 scripts/train.py --config configs/fp8.py:E4M3 --data_dir "$data" --workdir "$runs/fp8-$how" \
        --config.formats=E4M3,block_*:G=E5M2 --config.products=$how --config.max_steps=500 \
        --config.wandb_mode=disabled 2>&1 | tee "$out/fp8-$how.log" | tail -n 20
    pack "$runs/fp8-$how" "fp8-$how"
done

timeout 150 python3 scripts/bench_sweep.py --config configs/bf16_baseline.py --data_dir "$data" --noprocesses \
    --widths=1,4,16 --member_loops=vmap --rounds=5 --json "$out/members.json" 2>&1 | tee "$out/members.log" | tail -n 8

timeout 300 python3 scripts/sweep.py --config configs/matrix.py --data_dir "$bytes" --out "$runs/matrix" 2>&1 \
    | tee "$out/matrix.log" | tail -n 20
python3 scripts/report.py "$runs/matrix" -o "$out/matrix.html" -o "$out/matrix.md" 2>&1 | tee "$out/report.log" | tail -n 8
