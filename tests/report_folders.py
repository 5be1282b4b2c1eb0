"""Run folders for tests of the report, written by the project's own record: no training, and effects that are known."""

import zlib

import numpy as np

from altgrad_jax.config import default_config
from altgrad_jax.numerics.whatif import N_BINS, sparse
from altgrad_jax.run.record import Record, write_manifest, write_window_losses
from altgrad_jax.run.verdict import make_verdict, write_verdict

STEPS, EVERY = 20, 5
SEEDS, RATES = (1, 2, 3, 4, 5), (0.001, 0.002, 0.004)
LAYERS = ("block_0/attn_qkv", "block_0/mlp_up")


def jitter(key, seed, size):
    """A number in [-size, size] that depends on its arguments alone; 0 on average over SEEDS."""
    return size * (-1, 0.5, 0, -0.5, 1)[(seed + zlib.crc32(key.encode())) % 5]


def write_run(
    folder,
    *,
    val,
    statistics=None,
    codes=None,
    steps=STEPS,
    ended=True,
    fingerprint="f" * 64,
    layers=None,
    stopped=None,
    rise=False,
    alerts=None,
    **settings,
):
    """A run folder whose last validation loss is `val`.

    statistics: {key: {step: value}}, or {key: value} for every step. steps: rows written. ended: whether it has a
    verdict. layers: the manifest's list; by default what rules such as E4M3 or block_*:W=E4M3 give both LAYERS.
    """
    config = (
        dict(default_config())
        | {
            "max_steps": STEPS,
            "eval_interval": EVERY,
            "warmup_steps": 2,
            "run_name": folder.name,
            "checkpoint_dir": str(folder),
        }
        | settings
    )
    manifest = {
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "data": {"fingerprint": fingerprint, "meta": {"tokenizer": config["tokenizer"]}},
        "model": {"parameters": 1000},
        "run_id": "r",
        "starts": [{"device": {"kind": "cpu"}}],
    }
    if config["use_fp8"]:
        have = dict.fromkeys("wag")
        for rule in config["formats"]:
            place, _, name = rule.rpartition("=")
            for operand in place.rpartition(":")[2].lower() or "wag":
                have[operand] = name
        manifest["formats"] = {"layers": layers or [{"layer": layer, **have} for layer in LAYERS]}
    write_manifest(folder, manifest)
    record = Record.open(folder)
    rows = [{"step": 0, "val_loss": 5.5}]
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "loss": 5.5 + 1.0 * step if rise else val + 3 * (1 - step / STEPS),
            "grad_norm": 1.0,
            "nonfinite_loss": 0.0,
        }
        for key, value in (statistics or {}).items():
            value = value.get(step) if isinstance(value, dict) else value
            if value is not None:
                row[key] = value
        if step % EVERY == 0:
            row["val_loss"] = val + (1 - step / STEPS)
        if alerts and step in alerts:
            row["alerts"] = [{"kind": alerts[step], "layer": None, "value": 1.0}]
        rows.append(row)
    record.write(
        rows,
        [
            {"step": step, "time": 100.0 + step, "step_time_s": 0.25, "tokens_per_s": 4000.0}
            for step in range(1, steps + 1)
        ],
    )
    record.event("compiled", 0, seconds=3.0)
    record.event("eval", 5, seconds=0.5)
    record.append_diagnostics(
        [
            {
                "step": step,
                "layer": layer,
                "operand": operand,
                "format": fmt,
                "scale": 1.0,
                "amax": 1.0,
                "magnitudes": sparse(np.zeros(N_BINS, int)),
                "codes": sparse(counts),
            }
            for step, layer, operand, fmt, counts in codes or ()
        ]
    )
    record.close()
    if ended:
        write_verdict(folder, make_verdict(folder, stopped=stopped))
    return folder


def rules(name, operand=None):
    return {"use_fp8": True, "formats": (name if operand is None else f"block_*:{operand}={name}",)}


def study(root, formats=("E4M3", "E5M2", "E0M7"), n_windows=64):
    """Runs of BF16 and of formats, seeds that vary with the data seeds, and the losses of every window."""
    rng = np.random.default_rng(0)
    text_E = rng.normal(0, 0.3, n_windows)

    def run(name, val, seed, **settings):
        folder = write_run(root / f"{name}-{seed}", val=val, seed=seed, data_seed=seed, evaluate_all=True, **settings)
        write_window_losses(folder, STEPS, np.float32(val + text_E + rng.normal(0, 0.02, n_windows)))
        write_verdict(folder, make_verdict(folder))

    for seed in SEEDS:
        run("bf16", 2 + jitter("b", seed, 0.1), seed)
        for name, gap in zip(formats, (0.0, 0.03, 0.2)):
            value = 2 + jitter("b", seed, 0.1) + gap + jitter(name, seed, 0.004)
            run(name, value, seed, **rules(name))
            run(f"{name}-float32", value - 0.01, seed, **rules(name), scale_rounding="float32")
    return root
