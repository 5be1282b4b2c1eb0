"""Campaigns about certificates: what they cost, what a precision map closes, and what predicts the loss gap.

    python tests/campaigns/bias.py cost DATA OUT
    python tests/campaigns/bias.py predict DATA OUT [--seeds=3] [--steps=300]

cost      step time with certificates at the default interval, interleaved with runs without, each of its own process
predict   Spearman's correlation, over recipe variants, of bias, variance, SQNR and squared error with the loss gap
The map is scripts/precision_map.py --train.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from altgrad_jax import config as settings  # noqa: E402
from altgrad_jax.numerics.recipes import get_recipe  # noqa: E402
from altgrad_jax.run.record import read_rows  # noqa: E402
from altgrad_jax.run.sweep import axis, grid, make_members, sweep  # noqa: E402
from altgrad_jax.run.verdict import read_verdict  # noqa: E402

# At least 16, from 8 bits to 4 and by part, so that gaps differ.
VARIANTS = (
    *("mxfp8", "mxfp8_floor", "mxfp6", "mxfp4", "nvfp4", "nvfp4_redrawn", "fp4_all_the_way", "tetrajet_v2", "ufp4"),
    *("mxfp4:fprop", "mxfp4:dgrad", "mxfp4:wgrad", "nvfp4:fprop", "nvfp4:backward", "nvfp4_redrawn:backward"),
    *("tetrajet_v2:backward", "fp4_all_the_way:wgrad", "ufp4:backward"),
)


def small(**changes):
    """configs/small.py without logging."""
    config = settings.default_config()
    own = dict(tokenizer="bytes", n_layer=2, n_head=4, n_embd=128, block_size=128, batch_size=8, max_steps=300,
               warmup_steps=30, learning_rate=2e-3, checkpoint_interval=300, eval_interval=100, eval_windows=64,
               dead_neuron_window=50, loggers=("tensorboard",), console="quiet", metrics="format")  # fmt: skip
    config.update(own | changes)
    return config


def cost(data, out, rounds=3):
    """Prints what one certificate costs over the 100 steps of the default interval, with and without alternating."""
    from altgrad_jax.run.train import train

    seconds, of_steps = {0: [], 16: []}, []
    for i in range(rounds):
        for draws in (0, 16) if i % 2 == 0 else (16, 0):
            config = small(recipe=("nvfp4",), certify_draws=draws, max_steps=200, run_name=f"cost-{draws}-{i}",
                           metrics="none", checkpoint_interval=10**6, eval_interval=10**6)  # fmt: skip
            started = time.perf_counter()
            train(config, data_dir=data, workdir=Path(out) / config.run_name)
            verdict = read_verdict(Path(out) / config.run_name)
            seconds[draws].append(verdict["goodput"]["step_s"] + verdict["goodput"]["evaluation_s"])
            of_steps += [verdict["goodput"]["step_s"]] * (draws == 0)
            print(draws, i, round(seconds[draws][-1], 2), round(time.perf_counter() - started, 1), flush=True)
    # Three certificates, at 0, 100 and 200 updates.
    shares = [(b - a) / 3 / (s / 2) for a, b, s in zip(seconds[0], seconds[16], of_steps, strict=True)]
    print(
        f"a certificate over 100 steps: {', '.join(f'{share:.1%}' for share in shares)}, median "
        f"{statistics.median(shares):.1%}"
    )


def predict(data, out, seeds, steps):
    """Trains every variant and bf16, and prints rank correlations with the loss gap, with bootstrap intervals."""
    config = small(max_steps=steps, certify_draws=16, warmup_steps=steps // 10, checkpoint_interval=steps)
    points = grid(axis("recipe", [(name,) for name in ("bf16", *VARIANTS)], lambda v: v[0].replace(":", "-")),
                  axis("seed", range(seeds)))  # fmt: skip
    members = make_members(config, points, out)
    if code := sweep(members, out, data_dir=data):
        raise SystemExit(code)
    gaps = {name: [] for name in VARIANTS}
    found = {name: [] for name in VARIANTS}
    losses = {(m.config.recipe[0], m.config.seed): read_verdict(m.folder)["final_val_loss"] for m in members}
    for member in members:
        name, seed = member.config.recipe[0], member.config.seed
        if name != "bf16":
            gaps[name].append(losses[name, seed] - losses["bf16", seed])
            found[name].append(predictors(list(read_rows(member.folder))))
    gap = np.array([np.mean(gaps[name]) for name in VARIANTS])
    columns = {
        key: np.array([np.mean([f[key] for f in found[name]]) for name in VARIANTS]) for key in found["mxfp8"][0]
    }
    rng, result = np.random.default_rng(0), {}
    for key, values in columns.items():
        draws = [rng.integers(len(gap), size=len(gap)) for _ in range(2000)]
        low, high = np.nanquantile([stats.spearmanr(values[d], gap[d]).statistic for d in draws], [0.025, 0.975])
        result[key] = [float(stats.spearmanr(values, gap).statistic), float(low), float(high)]
        print(f"{key:<28}{result[key][0]:+.2f}   {low:+.2f} to {high:+.2f}")
    table = {name: {"gap": float(g)} | {k: float(v[i]) for k, v in columns.items()} for i, (name, g) in
             enumerate(zip(VARIANTS, gap, strict=True))}  # fmt: skip
    (Path(out) / "predict.json").write_text(json.dumps({"correlation": result, "recipes": table}, indent=2))


def predictors(rows):
    """What one run's record says early, after a third of it, so that the loss itself does not enter."""
    looks = [row for row in rows if "grad_total_bias" in row]
    look = looks[len(looks) // 3]
    row = min((row for row in rows if "sqnr_db/all/fprop.x" in row), key=lambda row: abs(row["step"] - look["step"]))
    noise = [10 ** (-row[f"sqnr_db/all/{slot}"] / 10) for slot in ("fprop.x", "fprop.w", "dgrad.g", "wgrad.g")]
    return {
        "bias, whole gradient": look["grad_total_bias"],
        "variance, whole gradient": look["grad_total_variance"],
        "squared error, whole": look["grad_total_bias"] + look["grad_total_variance"],
        "bias, wgrad": look["grad_bias_float32/all/wgrad"],
        "persistent bias, wgrad": look["grad_persistent_bias_float32/all/wgrad"],
        "bias, fprop": look["grad_bias/all/fprop"],
        "squared error of operands": float(np.mean(noise)),
        "-SQNR of operands": float(10 * np.log10(np.mean(noise))),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("cost", "predict"))
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    for name in VARIANTS:
        get_recipe(name)
    if args.what == "cost":
        cost(args.data, args.out)
    else:
        predict(args.data, args.out, args.seeds, args.steps)


if __name__ == "__main__":
    main()
