"""Where the time of a run went: every second is booked once, by whatever way the run ends."""

import json
import signal
import subprocess
import sys
import time

import pytest
from test_training import make_data, tiny

from altgrad_jax import train
from altgrad_jax.run import goodput
from altgrad_jax.run.record import read_timing
from altgrad_jax.run.signals import process_age
from altgrad_jax.step.program import Program


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def accounts_of(run_dir):
    return [event for event in read_timing(run_dir)[1] if event["event"] == "goodput"]


def test_every_second_is_booked_once_also_in_nested_contexts():
    now = [100.0]
    clock = goodput.Goodput(before=4.0, clock=lambda: now[0])
    now[0] += 1
    with clock.spend("save_blocked"):
        now[0] += 2
        with clock.spend("logging_blocked"):
            now[0] += 3
        now[0] += 0.25
    clock.enter("other")
    with pytest.raises(KeyError), clock.spend("step"):
        now[0] += 10
        raise KeyError
    clock.move("step", "replayed", 7.5)
    now[0] += 0.5
    assert clock.account() == {
        "wall_s": 20.75,
        "step_s": 2.5,
        "start_up_s": 5.0,
        "compile_s": 0.0,
        "evaluation_s": 0.0,
        "save_blocked_s": 2.25,
        "logging_blocked_s": 3.0,
        "replayed_s": 7.5,
        "other_s": 0.5,
    }


def test_the_line_and_the_sum_over_starts():
    account = {
        "wall_s": 10.0,
        "step_s": 8.25,
        "start_up_s": 1.0,
        "compile_s": 0.5,
        "evaluation_s": 0.25,
        "save_blocked_s": 0.0,
        "logging_blocked_s": 0.0,
        "replayed_s": 0.0,
        "other_s": 0.0,
    }
    assert goodput.describe(account) == (
        "goodput: 82% of 10.0 s in steps; start-up 1.0 s, compile 0.5 s, evaluation 0.2 s, save-blocked 0.0 s, "
        "logging-blocked 0.0 s, replayed 0.0 s, other 0.0 s"
    )
    events = [
        {"event": "start"},
        {"event": "goodput", **account},
        {"event": "resume"},
        {"event": "resume"},
        {"event": "goodput", **account},
    ]
    summed = goodput.total(events)
    assert summed["wall_s"] == 20.0 and summed["step_s"] == 16.5
    assert (summed["starts"], summed["starts_without"]) == (3, 1)
    assert goodput.total([{"event": "start"}, {"event": "eval"}]) is None


def test_a_run_accounts_for_its_time_and_for_steps_made_twice(data_dir, tmp_path, capsys):
    run_dir = tmp_path / "a"
    # A weight decay of its own makes a program that this process has not compiled before (conftest).
    config = tiny(max_steps=20, checkpoint_interval=10, eval_interval=10, diagnostic_interval=10, weight_decay=0.11)
    started = time.perf_counter()
    result = train(config, data_dir=data_dir, workdir=run_dir, age=2.0)
    seconds = time.perf_counter() - started + 2.0
    (first,) = accounts_of(run_dir)
    spent = {name: first[f"{name}_s"] for name in goodput.CATEGORIES}
    assert first["wall_s"] == pytest.approx(sum(spent.values()), abs=1e-6)
    assert seconds - 0.5 < first["wall_s"] <= seconds
    assert spent["start_up"] > 2.0 and spent["replayed"] == 0
    assert min(spent[name] for name in ("step", "compile", "evaluation", "save_blocked", "logging_blocked")) > 0
    assert goodput.describe(first) in capsys.readouterr().out
    assert result.verdict["goodput"] == json.loads((run_dir / "verdict.json").read_text())["goodput"]
    assert result.verdict["goodput"] == {key: first[key] for key in first if key.endswith("_s")} | {
        "starts": 1,
        "starts_without": 0,
    }

    # Back to step 10: the ten steps behind it are made again; then ten new ones.
    config.max_steps = 30
    result = train(config, data_dir=data_dir, workdir=run_dir, resume=10)
    rows, events = read_timing(run_dir)
    again = sum(row["step_time_s"] for row in rows[20:] if row["step"] <= 20)
    new = sum(row["step_time_s"] for row in rows[20:] if row["step"] > 20)
    second = accounts_of(run_dir)[-1]
    assert second["replayed_s"] == pytest.approx(again, abs=0.01) and second["step_s"] == pytest.approx(new, abs=0.01)
    assert result.verdict["goodput"]["starts"] == 2
    assert result.verdict["goodput"]["wall_s"] == pytest.approx(first["wall_s"] + second["wall_s"], abs=2e-3)


def test_a_run_that_fails_or_is_interrupted_leaves_its_account(data_dir, tmp_path, monkeypatch, capsys):
    advance = Program.advance

    def fails(self, state, *arguments):
        if int(state.step) >= 10:
            raise RuntimeError("the device is gone")
        return advance(self, state, *arguments)

    monkeypatch.setattr(Program, "advance", fails)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train(tiny(), data_dir=data_dir, workdir=tmp_path / "b")
    (account,) = accounts_of(tmp_path / "b")
    assert account["step"] == 10 and account["step_s"] > 0

    def interrupted(self, state, tokens, n_R, inputs):
        if int(state.step) + n_R[0] >= 15:
            signal.raise_signal(signal.SIGTERM)
        return advance(self, state, tokens, n_R, inputs)

    monkeypatch.setattr(Program, "advance", interrupted)
    result = train(tiny(), data_dir=data_dir, workdir=tmp_path / "b")
    assert result.exit_code == 143 and result.verdict is None
    assert len(accounts_of(tmp_path / "b")) == 2
    assert goodput.describe(accounts_of(tmp_path / "b")[-1]) in capsys.readouterr().out


def test_the_age_of_a_process_counts_its_interpreters_start():
    before = time.time()
    script = "import time; time.sleep(0.3); from altgrad_jax.run.signals import process_age; print(process_age())"
    age = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert 0.3 <= age <= time.time() - before + 0.02
    assert process_age() > 0
