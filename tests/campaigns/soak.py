"""A long training of a small model, watched from outside: does anything grow that should not?

Every half second (`every_s`) memory (RSS), open files and threads of the training's process are read from /proc. The
first fifth of the steps is left out, in which caches and pools fill. Memory is flat if the line through the rest rises
by less than FLAT_MIB over the whole run. Files and threads leak if there are more of them in each third of the rest
than in the one before (`grows`). W&B records offline beside it, checkpoints and evaluations come often.
"""

import json
import os
import re
import time
from pathlib import Path

import numpy as np

from altgrad_jax.run.record import METRICS
from campaigns.runs import Part, command, n_rows, start, table

FLAT_MIB = 32.0
FEW = 4.0
WARM = 0.2


def _look(pid):
    """(RSS in MiB, open files, threads)."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024
    return rss, len(os.listdir(f"/proc/{pid}/fd")), int(re.search(r"Threads:\s+(\d+)", status)[1])


def watch(process, run_dir, steps, say, deadline, every_s):
    """[(step, RSS, files, threads)] while the run makes steps; without what comes after the last one."""
    seen, told = [], time.monotonic()
    while process.poll() is None:
        time.sleep(every_s)
        step = n_rows(run_dir) - 1
        if deadline.is_over():
            process.terminate()
            break
        try:
            if 0 < step < steps:
                seen.append((step, *_look(process.pid)))
        except (FileNotFoundError, ProcessLookupError, TypeError):
            break
        if seen and time.monotonic() - told > 30:
            told = time.monotonic()
            say("step {} of {}: {:.1f} MiB, {} files, {} threads".format(seen[-1][0], steps, *seen[-1][1:]))
    process.wait()
    return seen


def slope(steps_N, values_N):
    """(least-squares rise per step, its standard error)."""
    (rise, _), covariance = np.polyfit(steps_N, values_N, 1, cov=True)
    return float(rise), float(np.sqrt(covariance[0, 0]))


def grows(thirds):
    """Whether the number of open files or threads rises by more than FEW from each third to the next.

    Compared is the lower decile of each third: a save holds ten files and as many threads while it is under way, and
    how often one is depends on the machine. A pool grows to its size and stays there; what leaks does not stop.

    Args:
      thirds: the samples of the first, the second and the last third.
    """
    floors = [np.quantile(values_N, 0.1) for values_N in thirds]
    return bool(np.all(np.diff(floors) > FEW))


def run(folder, data_dir, *, steps, deadline, say=print, every_s=0.5):
    """Trains `steps` steps of the smallest config and looks at it. Returns a Part."""
    run_dir, log = folder / "soak", folder / "soak.log"
    changes = dict(
        n_embd=16,
        block_size=16,
        batch_size=4,
        max_steps=steps,
        checkpoint_interval=100,
        eval_interval=200,
        diagnostic_interval=500,
        steps_per_dispatch=10,
        wandb_mode="offline",
    )
    started = time.monotonic()
    process = start(command(data_dir, run_dir, **changes), log)
    seen = watch(process, run_dir, steps, say, deadline, every_s)
    failures = []
    if process.returncode != 0:
        failures.append(f"exit code {process.returncode}: {log.read_text(errors='replace')[-500:]}")
    with open(run_dir / METRICS, "rb") as file:
        found = [json.loads(line)["step"] for line in file]
    if found != list(range(len(found))):
        failures.append("the rows are not one per step, in order")
    made = len(found) - 1
    late = [sample for sample in seen if sample[0] >= WARM * steps]
    if len(late) < 10:
        return Part("Soak", ["too few samples"], made, steps, [*failures, f"only {len(late)} samples"])
    steps_N, rss_N, files_N, threads_N = map(np.array, zip(*late))
    rise, error = slope(steps_N, rss_N)
    if rise * steps > FLAT_MIB:
        failures.append(f"memory rises by {rise * steps:.1f} MiB over the run")
    thirds = np.array_split(np.arange(len(late)), 3)
    rows = []
    for name, values_N in (("RSS, MiB", rss_N), ("open files", files_N), ("threads", threads_N)):
        rows.append([name, *(f"{values_N[third].mean():.1f}" for third in thirds), f"{values_N.max():.6g}"])
    for name, values_N in (("open files", files_N), ("threads", threads_N)):
        if grows([values_N[third] for third in thirds]):
            failures.append(f"more {name} in each third than in the one before: {rows}")
    span = f"steps {int(steps_N[0])} to {int(steps_N[-1])}"
    lines = table([span, "first third", "second", "last", "most"], rows)
    lines += [
        "",
        f"{made} steps in {time.monotonic() - started:.0f} s with {made // 100} checkpoints and "
        f"{made // 200} evaluations, W&B offline: {len(found)} rows, one per step from 0. "
        f"Memory rises by {1000 * rise:+.4f} +- {1000 * error:.4f} MiB per 1000 steps ({len(late)} samples).",
    ]
    return Part("Soak", lines, made, steps, failures)
