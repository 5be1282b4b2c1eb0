"""Small trainings in processes of their own, for campaigns that kill, stop and starve them, and how to compare two.

Two kinds of run: `bf16`, and `E4M3` with delayed scaling, weights stored with error feedback and the ULP-scaled AdamW,
whose state holds everything a run can carry: amax histories, scales, residuals, ages of codes.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from altgrad_jax.run.checkpoint import list_steps, read_document
from altgrad_jax.run.record import DIAGNOSTICS, METRICS, TIMING

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(
    tokenizer="bytes",
    vocab_size=256,
    n_layer=1,
    n_head=2,
    n_embd=64,
    block_size=64,
    batch_size=16,
    max_steps=300,
    warmup_steps=10,
    learning_rate=2e-3,
    checkpoint_interval=20,
    eval_interval=40,
    eval_windows=16,
    eval_batch_size=8,
    diagnostic_interval=60,
    dead_neuron_window=20,
    steps_per_dispatch=2,
    run_name="fault",
    tags="fault",
    wandb_mode="disabled",
    console="plain",
)
KINDS = {
    "bf16": {},
    "E4M3": dict(
        use_fp8="true", formats="E4M3", weights_at_rest="error_feedback", optimizer="ulp_adamw", amax_history=8
    ),
}
# A start that hangs is a failure, not a reason to wait for ever.
PATIENCE_S = 600.0


@dataclasses.dataclass
class Part:
    """What one part of the campaign found.

    Attributes:
      title: its heading.
      lines: Markdown lines.
      done, wanted: trials made and asked for.
      failures: a line for each trial that was not answered as it should be.
      seconds: wall time, filled in by the script.
    """

    title: str
    lines: list
    done: int
    wanted: int
    failures: list
    seconds: float = 0.0


def table(columns, rows):
    """Markdown lines."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows),
    ]


class Deadline:
    """A budget of wall time, in seconds; None is no end. What is not begun when it is spent is not done."""

    def __init__(self, seconds):
        self._ends = None if seconds is None else time.monotonic() + seconds

    def is_over(self):
        return self._ends is not None and time.monotonic() > self._ends


def command(data_dir, run_dir, kind="bf16", **changes):
    """The command line of a training."""
    settings = SMALL | KINDS[kind] | changes
    return [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        f"--config={ROOT / 'configs' / 'smoke.py'}",
        f"--data_dir={data_dir}",
        f"--workdir={run_dir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def environment(**changes):
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **changes}


def start(arguments, log, **changes):
    """Starts a process whose output goes to the file `log`, in a process group of its own."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(**changes),
            start_new_session=True,
        )


def finish(arguments, log, **changes):
    """Runs a command to its end; (exit code, what it printed)."""
    before = log.stat().st_size if log.exists() else 0
    process = start(arguments, log, **changes)
    try:
        code = process.wait(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None, "it did not end"
    return code, log.read_bytes()[before:].decode(errors="replace")


def n_rows(run_dir):
    try:
        return (run_dir / METRICS).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def last_row(run_dir):
    """The step of the last whole row of metrics.jsonl; -1 where there is none."""
    try:
        *lines, _ = (run_dir / METRICS).read_bytes().split(b"\n")
    except FileNotFoundError:
        return -1
    return json.loads(lines[-1])["step"] if lines else -1


def events(run_dir, *names):
    """The events of timing.jsonl with one of these names, in order; damaged lines are passed over."""
    found = []
    for line in (run_dir / TIMING).read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("event") in names:
            found.append(row)
    return found


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """All that two equal runs have in common: the records' bytes, the steps that are kept, and the sha256 of every
    array of the last checkpoint (parameters, moments, amax histories, scales, monitor)."""

    record: bytes
    diagnostics: bytes
    steps: list
    arrays: dict


def fingerprint(run_dir):
    steps = list_steps(run_dir)
    document = read_document(run_dir / str(steps[-1]))
    diagnostics = run_dir / DIAGNOSTICS
    return Fingerprint(
        (run_dir / METRICS).read_bytes(),
        diagnostics.read_bytes() if diagnostics.exists() else b"",
        steps,
        {name: array["sha256"] for name, array in document["arrays"].items()},
    )


def differences(found, expected):
    """What differs between two fingerprints, in words; empty where nothing does."""
    out = [name for name in ("record", "diagnostics", "steps") if getattr(found, name) != getattr(expected, name)]
    names = found.arrays.keys() | expected.arrays.keys()
    return out + sorted(name for name in names if found.arrays.get(name) != expected.arrays.get(name))


def reference(folder, data_dir, kind="bf16", **changes):
    """(run folder, Fingerprint) of an uninterrupted run."""
    run_dir = folder / f"whole-{kind}"
    code, output = finish(command(data_dir, run_dir, kind, **changes), folder / f"whole-{kind}.log")
    if code != 0:
        raise RuntimeError(f"the uninterrupted run ended with code {code}: {output[-2000:]}")
    return run_dir, fingerprint(run_dir)


def make_tokens(folder, seed=0):
    """Token files of pseudo-sentences, for a campaign that is given none."""
    import numpy as np

    from altgrad_jax.data.prepare import prepare
    from altgrad_jax.data.sources import local
    from altgrad_jax.data.tokenizer import get_tokenizer

    rng = np.random.default_rng(seed)
    words = ["the", "council", "shall", "adopt", "article", "of", "regulation", "member", "states", "and"]
    source = folder / "text"
    source.mkdir(parents=True)
    for i in range(12):
        (source / f"{i}.txt").write_text(" ".join(rng.choice(words, 8000)))
    prepare(local(source), folder / "tokens", get_tokenizer("bytes"), val_fraction=0.2, progress=False)
    return folder / "tokens"


def summary(parts):
    """Markdown lines: a table of the parts, then each of them."""
    rows = [
        [part.title, f"{part.done} of {part.wanted}", len(part.failures), f"{part.seconds / 60:.1f}"] for part in parts
    ]
    lines = table(["part", "done", "not answered as it should be", "minutes"], rows)
    for part in parts:
        lines += ["", f"## {part.title}", "", *part.lines]
        if part.failures:
            lines += [
                "",
                f"Not answered as it should be ({len(part.failures)}):",
                "",
                *(f"- {' '.join(failure.split())}" for failure in part.failures),
            ]
    return lines
