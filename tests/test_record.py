"""The record holds every step to the bit through kills and resumes, and W&B can do nothing to the run."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.run import logger
from altgrad_jax.run.logger import DispatchRecord, Record, ValRising, Writer, format_row, keep_row, parse_row
from altgrad_jax.run.rank_alerts import RankFalling

NAMES = (
    "loss",
    "grad_norm/block_0/mlp_up",
    "100%s",
    "alert/loss_spike",
    "alert/dead_layer/block_0/mlp_up",
    "alert_value/dead_layer/block_0/mlp_up",
)


def _refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def strict_json(line):
    return json.loads(line, parse_constant=_refuse_constant)


def packed(steps, seed=0):
    """[steps, NAMES] without alerts; a function of the step alone, as in a resumed run."""
    values = [np.random.default_rng([seed, step]).standard_normal(len(NAMES)) for step in steps]
    values_KM = np.array(values, np.float32).reshape(-1, len(NAMES))
    values_KM[:, 3:] = 0
    return values_KM


def rows_of(run_dir):
    return [parse_row(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timing_of(run_dir):
    return [json.loads(line) for line in (run_dir / "timing.jsonl").read_text().splitlines()]


def record_bytes(run_dir):
    return (run_dir / "metrics.jsonl").read_bytes()


def fill(run_dir, last, resume_step=None, log_interval=1):
    record = Record.open(run_dir, resume_step, log_interval=log_interval)
    for step in range(0 if resume_step is None else resume_step + 1, last + 1):
        if keep_row(step, log_interval=log_interval):
            record.write([{"step": step, "loss": 1 / (step + 1)}], [{"step": step, "time": 1.0}])
    record.close()


# ------------------------------------------------------------------------------------------------------- rows


def test_numbers_are_the_shortest_float32():
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    bits = np.concatenate([bits, [0, 0x80000000, 1, 0x7F7FFFFF, 0x00800000, 0x3DCCCCCD]]).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    row = strict_json(format_row({"step": 1, **{f"m/{i}": x for i, x in enumerate(values)}}))
    back = np.array([row[f"m/{i}"] for i in range(len(values))])
    assert (back.astype(np.float32).view(np.uint32) == values.view(np.uint32)).all()
    assert '"m/0": 0.1}' in format_row({"step": 1, "m/0": np.float32(0.1)})
    # Shortest: no decimal with fewer digits gives the same float32.
    for text in [str(x) for x in np.abs(back[:2000])]:
        digits = len(text.split("e")[0].replace(".", "").strip("0")) - 1
        assert digits == 0 or np.float32(f"{float(text):.{digits - 1}e}") != np.float32(text)


def test_nonfinite_numbers_are_strings_and_come_back():
    row = {
        "step": 7,
        "a": math.nan,
        "b": math.inf,
        "c": -math.inf,
        "alerts": [{"kind": "x", "layer": None, "value": math.inf}],
    }
    line = format_row(row)
    assert line == (
        '{"step": 7, "a": "NaN", "b": "Infinity", "c": "-Infinity", '
        '"alerts": [{"kind": "x", "layer": null, "value": "Infinity"}]}'
    )
    strict_json(line)
    back = parse_row(line)
    assert math.isnan(back["a"]) and (back["b"], back["c"]) == (math.inf, -math.inf)
    assert back["alerts"][0]["value"] == math.inf
    assert format_row(back) == line


def test_a_row_begins_with_its_step():
    with pytest.raises(ValueError, match="begins with its step"):
        format_row({"loss": 1.0, "step": 1})


def test_the_fast_formatter_equals_format_row():
    formatter = logger._Formatter(NAMES)
    for seed, nonfinite in ((0, None), (1, math.nan), (2, -math.inf)):
        values = packed([seed])[0]
        if nonfinite is not None:
            values[1] = nonfinite
        values[3:] = 2.5, 1.0, 0.25
        alerts = formatter.alerts_of(values)
        assert alerts == [
            {"kind": "loss_spike", "layer": None, "value": 2.5},
            {"kind": "dead_layer", "layer": "block_0/mlp_up", "value": 0.25},
        ]
        evaluation = {"val_loss": 0.1, "val_perplexity": math.inf}
        row = {"step": 3, **dict(zip(NAMES[:3], values)), **evaluation, "alerts": alerts}
        assert formatter.line(3, values, evaluation, alerts) == format_row(row)


SPARSE_NAMES = ("loss", "sparse/overflow/head/G", "grad_norm", "sparse/100%s", "alert/overflow/head/G")


def sparse_row(step, values, alerts=()):
    """The row that these values of SPARSE_NAMES are to give."""
    keys = ("loss", "overflow/head/G", "grad_norm", "100%s")
    kept = {key: value for key, value in zip(keys, values) if key in ("loss", "grad_norm") or not math.isnan(value)}
    return {"step": step, **kept} | ({"alerts": list(alerts)} if alerts else {})


@pytest.mark.parametrize(
    "values",
    [
        [1.5, 0.25, 2.0, 0.1, 0],
        [1.5, math.nan, 2.0, 0.1, 0],
        [1.5, 0.25, 2.0, math.nan, 0],
        [1.5, math.nan, 2.0, math.nan, 0],
        [math.nan, math.nan, math.inf, math.nan, 0],
        [math.nan, math.inf, math.nan, -math.inf, 0],
        [1.5, math.nan, 2.0, 0.1, 0.5],
    ],
)
def test_a_sparse_metric_is_left_out_where_it_is_nan_and_nowhere_else(values):
    formatter = logger._Formatter(SPARSE_NAMES)
    values = np.array(values, np.float32)
    alerts = formatter.alerts_of(values)
    assert alerts == ([{"kind": "overflow", "layer": "head/G", "value": 0.5}] if values[4] else [])
    line = formatter.line(3, values, None, alerts)
    assert line == format_row(sparse_row(3, values, alerts))
    strict_json(line)
    evaluation = {"val_loss": 0.1, "code_entropy/head/G": math.nan}
    assert parse_row(formatter.line(3, values, evaluation, []))["val_loss"] == 0.1


def test_rows_of_one_dispatch_may_have_different_metrics(tmp_path):
    values = np.ones((6, 5), np.float32)
    values[:, 4] = 0
    values[[0, 2, 4], 1] = math.nan
    values[3:, 3] = math.nan
    writer = Writer(Record.open(tmp_path), max_steps=9, tokens_per_step=1)
    writer.submit(DispatchRecord(1, SPARSE_NAMES, values))
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [format_row(sparse_row(step, row)) for step, row in zip(range(1, 7), values)]
    assert len({tuple(parse_row(line)) for line in lines}) == 4


def test_a_template_is_made_once_for_each_set_of_metrics():
    plain, mixed = logger._Formatter(NAMES), logger._Formatter(SPARSE_NAMES)
    for step in range(20):
        plain.line(step, packed([step])[0], None, [])
        mixed.line(step, np.array([1, math.nan if step % 3 else 1, 1, 1, 0], np.float32), None, [])
    assert (len(plain.templates), len(mixed.templates)) == (1, 2)


def test_which_rows_are_kept():
    kept = [step for step in range(26) if keep_row(step, log_interval=10, max_steps=25, notable=step == 7)]
    assert kept == [0, 7, 10, 20, 25]
    assert all(keep_row(step, log_interval=1) for step in range(5))


# ----------------------------------------------------------------------------------------------------- record


def test_a_fresh_run_refuses_an_old_record(tmp_path):
    fill(tmp_path / "run", 3)
    with pytest.raises(UserError, match=r"metrics\.jsonl already holds a run.*--resume=auto"):
        Record.open(tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == 4


def test_a_resumed_record_has_the_bytes_of_an_uninterrupted_one(tmp_path):
    fill(tmp_path / "whole", 20)
    fill(tmp_path / "cut", 17)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "lo')
    with open(tmp_path / "cut" / "timing.jsonl", "a") as file:
        file.write('{"step": 18, "ti')
    fill(tmp_path / "cut", 20, resume_step=9)
    assert record_bytes(tmp_path / "cut") == record_bytes(tmp_path / "whole")
    timing = timing_of(tmp_path / "cut")  # every line parses again, and the history is kept
    assert [row["step"] for row in timing if "event" not in row] == [*range(18), *range(10, 21)]
    assert [(row["event"], row["step"]) for row in timing if "event" in row] == [("start", 0), ("resume", 9)]


@pytest.mark.parametrize("torn", [b"", b"\0" * 300, b'{"step": 6, "loss": 0.1}', b"\xff\xfe\n", b'{"st\n{"step": 7}\n'])
def test_any_tail_behind_the_checkpoint_is_cut(tmp_path, torn):
    fill(tmp_path, 5)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
    Record.open(tmp_path, 5).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:4] + lines[5:],
        lambda lines: lines[:4] + [b'{"step": 4, "lo\n'] + lines[5:],
        lambda lines: lines[:4] + [b"\0" * len(lines[4][:-1]) + b"\n"] + lines[5:],
        lambda lines: lines[:4] + [lines[4].replace(b"loss", b"\0\0\0\0")] + lines[5:],
        lambda lines: lines[:4],
    ],
)
def test_missing_rows_are_named(tmp_path, damage):
    fill(tmp_path, 8)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = b"".join(damage(lines))
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    with pytest.raises(UserError, match="rows up to step 8, the first at step 4"):
        Record.open(tmp_path, 8)
    assert (tmp_path / "metrics.jsonl").read_bytes() == damaged  # refused before anything was cut


def test_rows_out_of_order_are_refused(tmp_path):
    fill(tmp_path, 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 1.0}\n')
    with pytest.raises(UserError, match="line 5 holds step 2 after step 3"):
        Record.open(tmp_path, 3)
    record = Record.open(tmp_path / "other")
    record.write([{"step": 1}])
    with pytest.raises(ValueError, match="row 1 follows row 1"):
        record.write([{"step": 1}])
    record.close()


def test_a_missing_record_is_an_error_unless_nothing_is_kept(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing"):
        Record.open(tmp_path, 5)
    fill(tmp_path / "died", 3)
    Record.open(tmp_path / "died", -1).close()
    assert (tmp_path / "died" / "metrics.jsonl").read_bytes() == b""


def test_a_changed_log_interval_is_judged_by_the_rows_that_were_due(tmp_path):
    fill(tmp_path, 20, log_interval=5)
    fill(tmp_path, 30, resume_step=20, log_interval=1)
    fill(tmp_path, 44, resume_step=28, log_interval=2)
    Record.open(tmp_path, 44).close()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(line for line in lines if b'"step": 23,' not in line))
    with pytest.raises(UserError, match="lacks 1 of the rows up to step 44, the first at step 23"):
        Record.open(tmp_path, 44)


def diagnose(run_dir, steps, resume_step=None):
    """A record with rows to the last of these steps and two lines of diagnostics at each of them."""
    record = Record.open(run_dir, resume_step)
    first = 0 if resume_step is None else resume_step + 1
    for step in range(first, max(steps) + 1):
        if step in steps:
            record.append_diagnostics(
                [{"step": step, "layer": "head", "operand": operand, "amax": 0.1} for operand in "WA"]
            )
        record.append([step], [format_row({"step": step, "loss": 1.0})])
    record.close()


def diagnostics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "diagnostics.jsonl").read_text().splitlines()]


def test_a_run_without_diagnoses_has_no_file_for_them(tmp_path):
    fill(tmp_path, 3)
    fill(tmp_path, 5, resume_step=2)
    record = Record.open(tmp_path, 5)
    record.append_diagnostics([])
    record.close()
    assert not (tmp_path / "diagnostics.jsonl").exists()


@pytest.mark.parametrize("torn", [b"", b'{"step": 12}\n{"step": 12, "lay', b'{"step": 8, "lay', b"\0" * 300, b'{"st\n'])
def test_diagnostics_are_cut_back_to_the_step_that_is_resumed(tmp_path, torn):
    diagnose(tmp_path / "whole", (0, 4, 8, 12))
    whole = (tmp_path / "whole" / "diagnostics.jsonl").read_bytes()
    assert [(row["step"], row["operand"]) for row in diagnostics_of(tmp_path / "whole")] == [
        (step, operand) for step in (0, 4, 8, 12) for operand in "WA"
    ]
    diagnose(tmp_path / "cut", (0, 4, 8))
    with open(tmp_path / "cut" / "diagnostics.jsonl", "ab") as file:
        file.write(torn)
    Record.open(tmp_path / "cut", 8).close()  # nothing that the checkpoint has seen is lost
    assert (tmp_path / "cut" / "diagnostics.jsonl").read_bytes() == b"".join(whole.splitlines(True)[:6])
    diagnose(tmp_path / "cut", (8, 12), resume_step=6)
    assert (tmp_path / "cut" / "diagnostics.jsonl").read_bytes() == whole
    assert record_bytes(tmp_path / "cut") == record_bytes(tmp_path / "whole")


def test_a_run_that_starts_again_starts_its_diagnostics_again(tmp_path):
    diagnose(tmp_path, (0, 3))
    Record.open(tmp_path, -1).close()
    assert (tmp_path / "diagnostics.jsonl").read_bytes() == record_bytes(tmp_path) == b""


def test_a_fresh_run_refuses_old_diagnostics(tmp_path):
    (tmp_path / "diagnostics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match=r"diagnostics\.jsonl already holds a run.*--workdir"):
        Record.open(tmp_path)


KILLED = """
import sys, numpy as np
from altgrad_jax.run.logger import *
writer = Writer(Record.open(sys.argv[1]), max_steps=10**9, tokens_per_step=1)
names = ("loss",) + tuple(f"norm/{i}" for i in range(99))
for start in range(1, 10**9, 10):
    writer.submit(DispatchRecord(start, names, np.full((10, 100), start, np.float32)))
    writer.flush(fsync=False)
    print(start + 9, flush=True)
"""


def test_kill_9_loses_nothing_that_was_flushed(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(logger.__file__).parent.parent)},
    )
    with child:
        flushed = [child.stdout.readline() for _ in range(40)]
        child.kill()
        flushed += child.stdout.readlines()
    last = int([line for line in flushed if line.endswith(b"\n")][-1])
    Record.open(tmp_path, last).close()
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, last + 1))


# ----------------------------------------------------------------------------------------------------- writer


class ConsoleSpy:
    def __init__(self):
        self.updates, self.alerts = [], []

    def update(self, step, loss, val_loss, tokens_per_s):
        self.updates.append((step, loss, val_loss))

    def alert(self, text):
        self.alerts.append(text)


class NotReady:
    """An array that is computed while somebody waits for it."""

    def __init__(self, array, seconds=0.0):
        self.array, self.seconds, self.thread = array, seconds, None

    def __array__(self, dtype=None, copy=None):
        self.thread = threading.current_thread()
        time.sleep(self.seconds)
        return np.asarray(self.array)


def run_writer(
    run_dir, steps, *, resume_step=None, per_dispatch=4, eval_every=5, val=lambda step: 5.0, alert_at=(), **settings
):
    first = 1 if resume_step is None else resume_step + 1
    record = Record.open(run_dir, resume_step, log_interval=settings.get("log_interval", 1))
    writer = Writer(
        record,
        max_steps=settings.pop("max_steps", steps),
        tokens_per_step=100,
        val_rising=ValRising(2, record.val_losses),
        **settings,
    )
    if resume_step is None:
        writer.submit(DispatchRecord(0, evaluation={"val_loss": np.float32(val(0))}))
    while first <= steps:
        last = min(steps, first + per_dispatch - 1, (first - 1) // eval_every * eval_every + eval_every)
        values = packed(range(first, last + 1))
        for step in alert_at:
            if first <= step <= last:
                values[step - first, 3] = 9.5
        due = last % eval_every == 0 or last == steps
        evaluation = {"val_loss": NotReady(np.float32(val(last)))} if due else None
        writer.submit(DispatchRecord(first, NAMES, values, None, evaluation, time.perf_counter()))
        first = last + 1
    return writer


def test_rows_of_a_run(tmp_path):
    console = ConsoleSpy()
    run_writer(tmp_path, 12, console=console, alert_at=(3, 6)).close()
    rows = rows_of(tmp_path)
    assert rows[0] == {"step": 0, "val_loss": 5.0}
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 5, 10, 12]
    assert [row["step"] for row in rows if "alerts" in row] == [3, 6]
    assert rows[3]["alerts"] == [{"kind": "loss_spike", "layer": None, "value": 9.5}]
    for row in rows[1:]:
        expected = packed([row["step"]])[0]
        assert [np.float32(row[name]) for name in NAMES[:3]] == list(expected[:3])
        assert not any(name.startswith("alert") and name != "alerts" for name in row)
    assert [step for step, *_ in console.updates] == list(range(13))
    # The second one comes within 100 steps of the first: recorded, not told.
    assert console.alerts == ["step 3: loss_spike, value 9.5"]
    timing = timing_of(tmp_path)
    assert [row["step"] for row in timing if "event" not in row] == list(range(1, 13))
    assert [row["step"] for row in timing if row.get("event") == "eval"] == [0, 5, 10, 12]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    # Rises at 10 and, after the resume, at 15: the count must survive it, and begin once.
    val = {0: 5.0, 5: 4.0, 10: 4.1, 15: 4.2, 20: 4.3}.get
    run_writer(tmp_path / "whole", 20, val=val).close()
    run_writer(
        tmp_path / "cut", 13, val=lambda step: val(step, 9.0), max_steps=20, per_dispatch=3, alert_at=(12,)
    ).close()
    run_writer(tmp_path / "cut", 20, val=val, resume_step=10).close()
    assert record_bytes(tmp_path / "cut") == record_bytes(tmp_path / "whole")
    alerts = {row["step"]: row["alerts"] for row in rows_of(tmp_path / "whole") if "alerts" in row}
    assert alerts == {15: [{"kind": "val_rising", "layer": None, "value": pytest.approx(4.2)}]}


# Stable ranks by step. With `after` 5 the first one counts at 10; half of it is 5, the strict share 7.
RANKS = {0: (30, 30), 5: (20, 20), 10: (10, 10), 15: (6, 6), 20: (4, 8), 25: (4, 6), 30: (4, 6), 35: (9, 6)}


def run_diagnosed(run_dir, steps, resume_step=None):
    record = Record.open(run_dir, resume_step)
    writer = Writer(record, max_steps=35, tokens_per_step=1, rank_falling=RankFalling(0.5, 0.7, record.ranks, after=5))
    for step in range(0 if resume_step is None else resume_step + 1, steps + 1):
        found = None
        if step in RANKS:
            found = dict(zip(("stable_rank/block_0/mlp_up", "stable_rank/embed"), np.float32(RANKS[step])))
            found = {"spectral_norm/embed": 1.0, **found}
        lines = [{"step": step, "layer": "head", "operand": "W"}] if found else []
        if step:
            writer.submit(DispatchRecord(step, NAMES, packed([step]), None, found, diagnostics=lines))
        else:
            writer.submit(DispatchRecord(0, evaluation=found, diagnostics=lines))
    writer.close()


def test_a_falling_rank_is_an_alert_of_the_row_that_diagnosed_it(tmp_path):
    run_diagnosed(tmp_path, 35)
    rows = rows_of(tmp_path)
    assert {
        row["step"]: [(alert["kind"], alert["layer"], round(alert["value"], 5)) for alert in row["alerts"]]
        for row in rows
        if "alerts" in row
    } == {
        15: [("rank_falling", "embed", 0.6)],
        20: [("rank_falling", "block_0/mlp_up", 0.4)],
        25: [("rank_falling", "embed", 0.6)],
    }  # re-armed by 8 at step 20
    assert [row["step"] for row in diagnostics_of(tmp_path)] == list(RANKS)
    assert rows[10]["stable_rank/embed"] == 10.0 and "loss" in rows[10]
    # A row without a validation loss is timed as what it was.
    assert {row["event"] for row in timing_of(tmp_path) if "event" in row} == {"start", "diagnosis"}


@pytest.mark.parametrize("stop, resume_step", [(7, 2), (12, 9), (17, 15), (22, 20), (29, 16), (34, 29)])
def test_a_resumed_run_warns_of_ranks_as_an_uninterrupted_one(tmp_path, stop, resume_step):
    run_diagnosed(tmp_path / "whole", 35)
    run_diagnosed(tmp_path / "cut", stop)
    run_diagnosed(tmp_path / "cut", 35, resume_step)
    assert record_bytes(tmp_path / "cut") == record_bytes(tmp_path / "whole")
    assert diagnostics_of(tmp_path / "cut") == diagnostics_of(tmp_path / "whole")


def test_log_interval_keeps_what_matters(tmp_path):
    console = ConsoleSpy()
    run_writer(tmp_path, 33, log_interval=10, eval_every=15, alert_at=(7,), console=console).close()
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 7, 10, 15, 20, 30, 33]
    assert [row["step"] for row in timing_of(tmp_path) if "event" not in row] == [7, 10, 15, 20, 30, 33]
    assert [step for step, *_ in console.updates] == list(range(34))
    Record.open(tmp_path, 33, log_interval=10).close()


def test_layer_interval_thins_the_layers_out_and_nothing_else(tmp_path):
    names = ("loss", "grad_l2/block_0", "sparse/sqnr_db/head/W", "sparse/sqnr_db", "alert/dead_layer/block_0")
    values = np.arange(50, dtype=np.float32).reshape(10, 5) + 1
    values[:, 4] = 0
    values[1, 4] = 7
    for interval in (1, 4):
        writer = Writer(Record.open(tmp_path / str(interval)), max_steps=10, tokens_per_step=1, layer_interval=interval)
        writer.submit(DispatchRecord(1, names, values, evaluation={"val_loss": 5.0, "stable_rank/head": 2.0}))
        writer.close()
    whole, thin = (rows_of(tmp_path / str(interval)) for interval in (1, 4))
    for before, after in zip(whole, thin, strict=True):
        dropped = set() if before["step"] in (1, 5, 9, 10) else {"grad_l2/block_0", "sqnr_db/head/W"}
        assert after == {key: value for key, value in before.items() if key not in dropped}
    assert "stable_rank/head" in thin[-1] and thin[1]["alerts"] == [
        {"kind": "dead_layer", "layer": "block_0", "value": 7.0}
    ]


def test_an_interruption_is_not_the_last_step(tmp_path):
    run_writer(tmp_path, 7, log_interval=5, eval_every=100, max_steps=20, val=lambda step: 5.0).close()
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 5, 7]  # 7: it was evaluated
    writer = Writer(Record.open(tmp_path / "x", log_interval=5), max_steps=20, tokens_per_step=1, log_interval=5)
    writer.submit(DispatchRecord(1, NAMES, packed(range(1, 8))))
    writer.close()
    assert [row["step"] for row in rows_of(tmp_path / "x")] == [5]


def test_only_the_steps_that_were_made_become_rows(tmp_path):
    writer = Writer(Record.open(tmp_path), max_steps=9, tokens_per_step=1)
    writer.submit(DispatchRecord(1, NAMES, packed(range(1, 9)), n_rows=NotReady(np.int32(3))))
    writer.submit(DispatchRecord(4, NAMES, packed(range(4, 9)), n_rows=0, evaluation={"val_loss": 1.0}))
    writer.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_waiting_for_the_device_happens_on_the_thread(tmp_path):
    writer = Writer(Record.open(tmp_path), max_steps=9, tokens_per_step=1)
    slow = NotReady(packed([1]), seconds=0.5)
    start = time.perf_counter()
    writer.submit(DispatchRecord(1, NAMES, slow))
    assert time.perf_counter() - start < 0.4
    writer.flush()
    assert slow.thread is not threading.main_thread() and len(rows_of(tmp_path)) == 1
    writer.close()


def test_step_time_counts_from_the_dispatch_or_the_one_before(tmp_path):
    now = iter([12.0, 18.0, 19.0])
    writer = Writer(
        Record.open(tmp_path),
        max_steps=9,
        tokens_per_step=100,
        flops_per_step=50.0,
        peak_flops=100.0,
        clock=lambda: next(now),
    )
    # Ready at 12, 18 and 19; the second was dispatched while the first ran, the third after a pause.
    for first, dispatched_at in ((1, 10.0), (3, 11.0), (5, 18.5)):
        writer.submit(DispatchRecord(first, NAMES, packed([first, first + 1]), dispatched_at=dispatched_at))
    writer.close()
    rows = [row for row in timing_of(tmp_path) if "event" not in row]
    assert [row["step_time_s"] for row in rows] == [1.0, 1.0, 3.0, 3.0, 0.25, 0.25]
    assert rows[0]["tokens_per_s"] == 100.0 and rows[0]["mfu"] == 0.5


def test_a_full_queue_blocks_and_drops_nothing(tmp_path):
    writer = Writer(Record.open(tmp_path), max_steps=99, tokens_per_step=1, queue_size=2)
    gate = threading.Event()
    writer.submit(gate.wait)
    submitted = []

    def produce():
        for step in range(1, 21):
            writer.submit(DispatchRecord(step, NAMES, packed([step])))
            submitted.append(step)

    producer = threading.Thread(target=produce)
    producer.start()
    producer.join(0.3)
    assert producer.is_alive() and len(submitted) <= 3
    gate.set()
    producer.join()
    writer.close()
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 21))


@pytest.mark.parametrize("then", ["submit", "flush", "close"])
def test_an_error_on_the_thread_reaches_the_caller(tmp_path, then):
    writer = Writer(Record.open(tmp_path), max_steps=99, tokens_per_step=1, queue_size=2)
    writer.submit(DispatchRecord(1, NAMES, packed([1])))
    writer.flush()

    def fail():
        raise OSError(28, "No space left on device")

    writer.submit(fail)
    for step in range(2, 4):
        writer._queue.put(DispatchRecord(step, NAMES, packed([step])))
    wait_for(lambda: writer._error is not None)
    with pytest.raises(OSError, match="No space left"):
        {"submit": lambda: writer.submit(print), "flush": writer.flush, "close": writer.close}[then]()
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1]


def test_a_full_disk_is_told_and_waited_for(tmp_path):
    run = tmp_path / "run"
    record = Record.open(run)
    kept = os.dup(record._metrics_fd)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, record._metrics_fd)
    os.close(full)
    told = []
    console = types.SimpleNamespace(alert=told.append, update=lambda *_: None)
    writer = Writer(record, max_steps=9, tokens_per_step=1, console=console)
    writer.submit(DispatchRecord(1, NAMES, packed([1])))
    wait_for(lambda: told)
    os.dup2(kept, record._metrics_fd)  # space again
    os.close(kept)
    writer.submit(DispatchRecord(2, NAMES, packed([2])))
    writer.close()
    assert [row["step"] for row in rows_of(run)] == [1, 2]
    (text,) = told
    assert text.startswith(f"the disk of {run} is full: the run waits up to 10 minutes")


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_record_that_is_taken_away_is_noticed_at_the_next_flush(tmp_path, what):
    record = Record.open(tmp_path)
    record.flush()
    (tmp_path / logger.METRICS).unlink()
    if what == "replaced":
        (tmp_path / logger.METRICS).touch()
    with pytest.raises(OSError, match=r"removed or replaced while the run wrote to it.*metrics\.jsonl"):
        record.flush()
    record.close()


@pytest.mark.parametrize("why", ["a signal", "patience"])
def test_a_full_disk_that_stays_full_ends_the_waiting_and_names_the_file(tmp_path, monkeypatch, why):
    record = Record.open(tmp_path / "run")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, record._metrics_fd)
    os.close(full)
    if why == "patience":
        monkeypatch.setattr(logger, "SPACE_PATIENCE_S", 0.0)
    writer = Writer(record, max_steps=9, tokens_per_step=1, hurried=lambda: why == "a signal")
    writer.submit(DispatchRecord(1, NAMES, packed([1])))
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl") as error:
        writer.flush(fsync=False)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_wrong_shapes_are_an_error(tmp_path):
    writer = Writer(Record.open(tmp_path), max_steps=9, tokens_per_step=1)
    writer.submit(DispatchRecord(1, NAMES, packed([1])[:, :-1]))
    with pytest.raises(ValueError, match=r"float32\[1, 5\], expected float32 \[>= 1, 6\]"):
        writer.close()


# ----------------------------------------------------------------------------------------------------- alerts


def test_rising_validation_begins_once_and_is_rearmed():
    losses = [5, 4, 4.1, 4.2, 4.3, math.nan, 4.4, 4.0, 4.1, math.nan, 4.2]
    rule = ValRising(2)
    assert [i for i, loss in enumerate(losses) if rule.begins(loss)] == [3, 10]
    assert not any(ValRising(0).begins(loss) for loss in (1, 2, 3, 4))


def test_alerts_are_limited_per_kind_and_say_what_was_held_back():
    gate = logger.AlertGate(100)

    def alerts(kind, *layers):
        return [{"kind": kind, "layer": layer, "value": 0.75} for layer in layers]

    assert gate.messages(5, alerts("dead_layer", "block_0/mlp_up", "ln_f") + alerts("loss_spike", None)) == [
        ("dead_layer", "step 5: dead_layer in block_0/mlp_up and 1 more, value 0.75"),
        ("loss_spike", "step 5: loss_spike, value 0.75"),
    ]
    assert gate.messages(104, alerts("dead_layer", "a", "b")) == []
    assert gate.messages(105, alerts("dead_layer", "c")) == [
        ("dead_layer", "step 105: dead_layer in c, value 0.75 (2 more since step 5)")
    ]


# --------------------------------------------------------------------------------------------------- manifest


def test_manifest_round_trip_and_its_errors(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        logger.read_manifest(tmp_path)
    manifest = {"config": {"lr": 6e-4}, "a": [1, "é"], "data": {"fingerprint": "f"}, "starts": [], "run_id": "r"}
    logger.write_manifest(tmp_path, manifest)
    assert logger.read_manifest(tmp_path) == {**manifest, "schema_version": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    for text, error in (
        ('{"schema_version": 4}', "schema_version 4, this program reads 1, 2, 3: use the version"),
        ('{"schema_version": "2"}', "'2'"),
        ("{}", "None"),
        ("[1]", "None"),
        ('{"schema_version": true}', "True"),
        ('{"schema_version": 1', "cannot be read"),
        ("[" * 100_000, "nested too deeply"),
        *(
            (json.dumps({**manifest, "schema_version": 2, key: value}), error)
            for key, value, error in (
                ("config", 5, "config 5 where an object"),
                ("data", None, "data None where an object"),
                ("starts", {}, "starts {} where a list"),
                ("data", {}, "the fingerprint of the data"),
                ("run_id", 5, "the run_id of the run"),
            )
        ),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=error):
            logger.read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="is a pipe, not a file: restore it"):
        logger.read_manifest(tmp_path)


def test_a_manifest_of_version_1_is_read_as_it_is_and_written_as_the_present_one(tmp_path):
    written = {"schema_version": 1, "config": {"seed": 1}, "data": {"fingerprint": "f"}, "starts": [], "run_id": "r"}
    (tmp_path / "manifest.json").write_text(json.dumps(written))
    manifest = logger.read_manifest(tmp_path)
    assert manifest == written
    logger.write_manifest(tmp_path, manifest)
    assert logger.read_manifest(tmp_path)["schema_version"] == logger.SCHEMA_VERSION == 3


@pytest.mark.parametrize(
    "row",
    [
        '{"step": 2, "val_loss": }',
        '{"step": 2, "val_loss": "x"}',
        '{"step": 2, "stable_rank/embed": null}',
        '{"step": ' + "9" * 5000 + "}",
    ],
)
def test_a_damaged_row_is_refused_and_the_folder_left_as_it_was(tmp_path, row):
    record = logger.Record.open(tmp_path)
    record.write([{"step": 0, "val_loss": 5.5}, {"step": 1, "loss": 5.5}])
    record.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(row + "\n")
    with open(tmp_path / "timing.jsonl", "a") as file:
        file.write('{"torn')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="metrics.jsonl lacks 1 of the rows up to step 2, the first at step 2"):
        logger.Record.open(tmp_path, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    logger.write_atomically(tmp_path / "f", b"old")
    with pytest.raises(TypeError):
        logger.write_atomically(tmp_path / "f", "not bytes")
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
