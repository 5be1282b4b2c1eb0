#!/usr/bin/env bash
# What is worth running on a GPU, the most important first, within a number of seconds.
#
#   bash scripts/gpu_suite.sh OUT_DIR TOKEN_DIR BYTES_DIR [SECONDS [FIRST_PART]]
#
# TOKEN_DIR, BYTES_DIR: token files of the gpt2 and of the bytes tokenizer, from scripts/prepare_data.py. SECONDS: 840 if
# not given. A part that has less than half of its limit left is left out, and named. FIRST_PART: where a second call goes
# on. OUT_DIR receives logs, tables and records without checkpoints. Uses the python3 on the PATH; every part runs even if
# one before it failed.
set -u
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
data=$2
bytes=$3
end=$((SECONDS + ${4:-840}))
waiting_for=${5:-}
runs=$(mktemp -d)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 WANDB_MODE=disabled
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"

part() { # name, seconds, command
    local name=$1 limit=$2 left=$((end - SECONDS)) began=$SECONDS
    shift 2
    if [ -n "$waiting_for" ] && [ "$waiting_for" != "$name" ]; then return; fi
    waiting_for=
    if [ "$left" -lt $((limit / 2)) ]; then
        echo "== $name: left out, $left s are left and it may take $limit" | tee -a "$out/parts.txt"
        return
    fi
    timeout $((left < limit ? left : limit)) "$@" > "$out/$name.log" 2>&1
    echo "== $name: exit code $?, $((SECONDS - began)) s" | tee -a "$out/parts.txt"
    tail -n 12 "$out/$name.log"
}

train() { # name, seconds, arguments of scripts/train.py
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" python3 scripts/train.py "$@" --data_dir="$data" --workdir="$runs/$name" --config.console=plain
    if [ -d "$runs/$name" ]; then
        tar czf "$out/$name.tar.gz" -C "$runs/$name" --exclude='[0-9]*' --exclude=anomaly --exclude=wandb .
    fi
}

# Rounding as the device does it, of every format; then one update by every recipe against its float64 reference.
part canary 60 python3 -c '
from altgrad_jax.numerics.formats import FORMATS
from altgrad_jax.numerics.rounding import canary
for fmt in FORMATS.values():
    found = canary(fmt)
    print(fmt.name, found["device"], found["n_inputs"], found["n_changed"], found["image_sha256"], flush=True)'
part recipes-exact 60 python3 scripts/check_recipes.py --rounds=1
mixed=(--config=configs/fp8.py:E4M3 "--config.formats=E4M3,block_*:G=E5M2")
train native 120 "${mixed[@]}" --config.products=native --config.max_steps=100
train baseline 240 --config=configs/bf16_baseline.py
part bench 150 python3 scripts/bench.py --config=configs/bf16_baseline.py --budget_s=120 --json="$out/bench.json"
train emulated 120 "${mixed[@]}" --config.max_steps=300
train mxfp8 120 --config=configs/recipe.py:mxfp8 --config.max_steps=300
train nvfp4 120 --config=configs/recipe.py:nvfp4 --config.max_steps=300
part members 100 python3 scripts/bench_sweep.py --config=configs/bf16_baseline.py --data_dir="$data" --noprocesses \
    --widths=1,4,16 --member_loops=vmap --rounds=3 --json="$out/members.json"
part matrix 200 python3 scripts/sweep.py --config=configs/matrix.py --data_dir="$bytes" --out="$runs/matrix"
part report 60 python3 scripts/report.py "$runs/matrix" -o "$out/matrix.html" -o "$out/matrix.md"
part tests 200 env JAX_PLATFORMS=cuda python3 -m pytest -m "exact and not oracle" tests/test_rounding.py \
    tests/test_products.py tests/test_products_formats.py tests/test_slots.py tests/test_slot_products.py
part faults 90 env JAX_PLATFORMS=cuda python3 tests/fault_campaign.py --quick --parts=numerics --out="$out/faults.md"
