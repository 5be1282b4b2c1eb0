"""A little of the fault campaign; the whole is tests/fault_campaign.py, its results are docs/results/faults.md."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from campaigns import corruption, environment, kills, runs, soak

from altgrad_jax.run import checkpoint

ROOT = Path(__file__).parents[1]
ENDLESS = runs.Deadline(None)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return runs.make_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture
def short_runs(monkeypatch):
    """The campaign's runs, with steps that take less time and fewer of them."""
    for name, value in dict(block_size=16, batch_size=4, max_steps=120).items():
        monkeypatch.setitem(runs.SMALL, name, value)


def quiet(text):
    pass


def test_killed_runs_end_equal_to_the_bit(short_runs, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "PHASES", ("step", "save"))
    part = kills.run(tmp_path, tokens, kills=2, seed=0, deadline=ENDLESS, say=quiet)
    assert part.failures == [] and part.done == 2
    assert any("1 equal the uninterrupted run" in line for line in part.lines), part.lines


def test_damage_is_found_and_recovered_from(short_runs, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(corruption, "WHOLE_EVERY", 15)
    part = corruption.run(tmp_path, tokens, trials=15, seed=0, deadline=ENDLESS, say=quiet, kinds=("bf16",))
    assert part.failures == [] and part.done == 15
    assert "| together | 15 | 15 |" in part.lines

    # The campaign can fail: without the files' hashes, damage to what restoring does not read goes unseen.
    monkeypatch.setattr(checkpoint, "_damage_in_files", lambda *_: [])
    original, rng = tmp_path / "partial-bf16", random.Random(0)
    wrong = [corruption._trial(tmp_path / f"unseen{i}", original, "missing file", rng)[1] for i in range(6)]
    assert any(problem and problem.startswith("not detected") for problem in wrong)


def test_what_the_machine_does_is_answered(short_runs, tokens, tmp_path):
    part = environment.run(
        tmp_path,
        tokens,
        seed=0,
        deadline=ENDLESS,
        say=quiet,
        with_signals=False,
        scenarios=(environment.full_while_training, environment.read_only),
    )
    assert part.failures == [] and part.done == 2


def test_signals_that_the_budget_leaves_no_time_for_are_missing_from_the_count(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "Bench", lambda *_: None)
    part = environment.run(tmp_path, tmp_path, seed=0, deadline=runs.Deadline(-1), say=quiet)
    assert (part.done, part.wanted) == (0, 22)
    part = environment.run(tmp_path, tmp_path, seed=0, deadline=runs.Deadline(-1), say=quiet, scenarios=())
    assert (part.done, part.wanted) == (0, 15)


def test_a_signal_during_compilation_is_answered_at_once(tokens, tmp_path):
    run_dir = tmp_path / "run"
    slowly = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cold"), "XLA_FLAGS": ""}  # with all of LLVM's optimizations
    process = runs.start(runs.command(tokens, run_dir, n_layer=12), tmp_path / "log", **slowly)
    kills._Moment("compile", run_dir, tmp_path / "log", random.Random(0)).wait(process, 0)
    time.sleep(3)  # traced, and in the compiler's hands
    process.terminate()
    sent = time.monotonic()
    assert process.wait(timeout=60) == 143
    assert time.monotonic() - sent < 5  # the compiler would take longer
    said = (tmp_path / "log").read_text()
    assert "SIGTERM: stopped while no step was under way; the same command starts again" in said
    assert "Traceback" not in said


def test_a_run_does_not_grow(tokens, tmp_path):
    part = soak.run(tmp_path, tokens, steps=2500, deadline=ENDLESS, say=quiet, every_s=0.05)
    assert part.failures == [] and part.done == 2500, part.failures


def test_growth_would_be_seen():
    rise, error = soak.slope([0, 100, 200, 300, 400], [50.0, 51.1, 51.9, 53.0, 54.0])
    assert rise == pytest.approx(0.01, rel=0.05) and error < 0.001
    rng = np.random.default_rng(0)
    # 180 looks at a process with 20 open files; two of three find a save under way, with ten more.
    under_way_N = 20 + 10 * (rng.random(180) < 0.67)
    leak_N = np.arange(180) * 32 // 180  # One at each of 32 checkpoints.
    pool_N = np.where(np.arange(180) < 60, 0, 8)  # Full only after the first third.
    assert soak.grows(np.split(under_way_N + leak_N, 3))
    assert not soak.grows(np.split(under_way_N, 3))
    assert not soak.grows(np.split(under_way_N + pool_N, 3))


def test_the_budget_ends_the_campaign_and_it_says_so(tokens, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "fault_campaign.py"),
            "--parts=kills",
            "--budget_minutes=0",
            f"--data_dir={tokens}",
            f"--folder={tmp_path}",
            f"--out={tmp_path / 'report.md'}",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "| kill -9 | 0 of 1 | 0 |" in report and report.strip() == done.stdout.strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md"]
