"""What saving and restoring checkpoints costs, here and in another checkout, in processes of their own, alternating.

`python -P altgrad_jax/bench/checkpoint.py SHAPES.json FOLDER` is one such process: it knows no config and imports only
the checkpoints of whichever checkout PYTHONPATH names.
"""

import importlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

SAVES = 6
ROOT = Path(__file__).resolve().parents[2]


def shapes_of(config: Any) -> dict[str, list[int]]:
    """{name: shape} of the parameters of `config`'s model."""
    from altgrad_jax.models.model import init_params
    from altgrad_jax.step.from_config import model_config

    shapes = jax.eval_shape(lambda: init_params(model_config(config, jax.devices()[0]), 0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape) for path, leaf in leaves}


def make_state(shapes: dict[str, list[int]]) -> dict[str, Any]:
    """float32 parameters and two moments of noise, so that nothing about them compresses, and a counter."""
    rng = np.random.default_rng(0)
    noise = {
        kind: {name: jax.device_put(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
        for kind in ("params", "mu", "nu")
    }
    return {**noise, "step": jax.numpy.int32(1)}


def measure(shapes: dict[str, list[int]], folder: Path) -> dict[str, float]:
    """Seconds of each part, medians or means over SAVES saves, with the checkpoints that PYTHONPATH names."""
    rooms = importlib.util.find_spec("altgrad_jax.run")  # older checkouts have no rooms
    checkpoint = importlib.import_module("altgrad_jax.run.checkpoint" if rooms else "altgrad_jax.checkpoint")
    state = jax.block_until_ready(make_state(shapes))
    checkpoints = checkpoint.open_checkpoints(folder, 3)
    for step in range(1, SAVES + 1):
        checkpoints.save(step, state, {}, 1.0)
        checkpoints.wait()
    apart = checkpoints.check()
    started = time.perf_counter()
    for step in range(SAVES + 1, 2 * SAVES + 1):
        checkpoints.save(step, state, {}, 1.0)
    checkpoints.wait()
    burst_s, burst = time.perf_counter() - started, checkpoints.check()
    started = time.perf_counter()
    checkpoints.restore(2 * SAVES, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    restore_s = time.perf_counter() - started
    checkpoints.close()
    if errors := [outcome.error for outcome in (*apart, *burst) if outcome.error]:
        raise SystemExit(errors[0])
    return {
        "apart: the caller is held, per save": statistics.median(outcome.blocked_s for outcome in apart),
        "apart: a save takes": statistics.median(outcome.background_s for outcome in apart),
        "without pause: the caller is held, per save": statistics.mean(outcome.blocked_s for outcome in burst),
        "without pause: seconds per save": burst_s / SAVES,
        "a restore takes": restore_s,
    }


def bench_checkpoint(config: Any, *, folder: str | Path, rounds: int, against: str | Path | None = None) -> None:
    """Prints a table for a state of the shape of `config`'s.

    Args:
      folder: on the disk to measure; left empty.
      rounds: how often each checkout is measured; the order changes from round to round.
      against: another checkout to compare with, or None.
    """
    folder, shapes = Path(folder).absolute(), shapes_of(config)
    checkouts = [ROOT] if against is None else [ROOT, Path(against).absolute()]
    n_bytes = 3 * 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {n_bytes / 1e6:.0f} MB in {3 * len(shapes) + 1} "
        f"arrays, {rounds} rounds of {SAVES} saves apart and {SAVES} without pause, median (range) in s\n"
    )
    found: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "shapes.json").write_text(json.dumps(shapes))
        for number in range(rounds):
            for checkout in checkouts[:: 1 if number % 2 else -1]:
                os.sync()  # what the last one left in the page cache is not this one's to write
                arguments = [sys.executable, "-P", __file__, f"{scratch}/shapes.json", str(folder / "run")]
                environment = {**os.environ, "PYTHONPATH": str(checkout)}
                found[checkout].append(json.loads(subprocess.check_output(arguments, env=environment)))
                shutil.rmtree(folder / "run")
    print("| | " + " | ".join(map(str, checkouts)) + " | ratio |\n" + "|---" * (len(checkouts) + 2) + "|")
    for part in found[ROOT][0]:
        times = [[one[part] for one in found[checkout]] for checkout in checkouts]
        cells = [f"{statistics.median(all_s):.3f} ({min(all_s):.3f}-{max(all_s):.3f})" for all_s in times]
        ratio = statistics.median(a / b for a, b in zip(times[0], times[-1], strict=True))
        print(f"| {part} | {' | '.join(cells)} | {ratio:.2f} |")


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))))
