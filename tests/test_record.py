"""The record holds every step to the bit through kills and resumes; one reader reads it back."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.files import write_atomically
from altgrad_jax.numerics import whatif
from altgrad_jax.run import record as record_module
from altgrad_jax.run.alerts import AlertGate, RankFalling, ValRising
from altgrad_jax.run.record import (
    METRICS,
    SCHEMA_VERSION,
    Record,
    Tail,
    count_rows,
    format_row,
    keep_row,
    parse_row,
    read_diagnostics,
    read_history,
    read_manifest,
    read_rows,
    read_timing,
    write_manifest,
)
from altgrad_jax.run.writer import DispatchRecord, Formatter, RunFacts, Writer

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


def open_writer(run_dir, resume_step=None, *, console=None, rules=(), **facts):
    facts = RunFacts(**{"max_steps": 9, "tokens_per_step": 1} | facts)
    record = Record.open(run_dir, resume_step, log_interval=facts.log_interval)
    return Writer(record, facts, console=console, rules=rules)


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
    formatter = Formatter(NAMES)
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
    formatter = Formatter(SPARSE_NAMES)
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
    writer = open_writer(tmp_path)
    writer.submit(DispatchRecord(first_step=1, names=SPARSE_NAMES, values=values))
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [format_row(sparse_row(step, row)) for step, row in zip(range(1, 7), values)]
    assert len({tuple(parse_row(line)) for line in lines}) == 4


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
from altgrad_jax.run.writer import *
writer = Writer(Record.open(sys.argv[1]), RunFacts(max_steps=10**9, tokens_per_step=1))
names = ("loss",) + tuple(f"norm/{i}" for i in range(99))
for start in range(1, 10**9, 10):
    writer.submit(DispatchRecord(first_step=start, names=names, values=np.full((10, 100), start, np.float32)))
    writer.flush(fsync=False)
    print(start + 9, flush=True)
"""


def test_kill_9_loses_nothing_that_was_flushed(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(record_module.__file__).parents[2])},
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


def run_writer(
    run_dir, steps, *, resume_step=None, per_dispatch=4, eval_every=5, val=lambda step: 5.0, alert_at=(), **more
):
    """A writer that was given the rows up to `steps`; alerts at `alert_at`, evaluations every `eval_every` steps."""
    more = {"rules": [ValRising(2)], "max_steps": steps, "tokens_per_step": 100} | more
    writer = open_writer(run_dir, resume_step, **more)
    if resume_step is None:
        writer.submit(DispatchRecord(first_step=0, evaluation={"val_loss": np.float32(val(0))}))
    first = 1 if resume_step is None else resume_step + 1
    while first <= steps:
        last = min(steps, first + per_dispatch - 1, (first - 1) // eval_every * eval_every + eval_every)
        values = packed(range(first, last + 1))
        values[[step - first for step in alert_at if first <= step <= last], 3] = 9.5
        due = last % eval_every == 0 or last == steps
        evaluation = {"val_loss": np.float32(val(last))} if due else None
        writer.submit(DispatchRecord(first_step=first, names=NAMES, values=values, seconds=1.0, evaluation=evaluation))
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
    writer = open_writer(run_dir, resume_step, max_steps=35, rules=[RankFalling(0.5, 0.7, after=5)])
    for step in range(0 if resume_step is None else resume_step + 1, steps + 1):
        found = None
        if step in RANKS:
            found = dict(zip(("stable_rank/block_0/mlp_up", "stable_rank/embed"), np.float32(RANKS[step])))
            found = {"spectral_norm/embed": 1.0, **found}
        writer.submit(
            DispatchRecord(
                first_step=step,
                names=NAMES if step else (),
                values=packed([step]) if step else None,
                evaluation=found,
                diagnostics=[{"step": step, "layer": "head", "operand": "W"}] if found else [],
            )
        )
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
        writer = open_writer(tmp_path / str(interval), max_steps=10, layer_interval=interval)
        writer.submit(
            DispatchRecord(
                first_step=1, names=names, values=values, evaluation={"val_loss": 5.0, "stable_rank/head": 2.0}
            )
        )
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
    writer = open_writer(tmp_path / "x", max_steps=20, log_interval=5)
    writer.submit(DispatchRecord(first_step=1, names=NAMES, values=packed(range(1, 8))))
    writer.close()
    assert [row["step"] for row in rows_of(tmp_path / "x")] == [5]


def test_times_are_of_a_step_and_their_rates(tmp_path):
    writer = open_writer(tmp_path, tokens_per_step=100, flops_per_step=50.0, peak_flops=100.0)
    evaluated = {"evaluation": {"val_loss": 1.0}, "evaluation_s": 0.5}
    writer.submit(DispatchRecord(first_step=1, names=NAMES, values=packed([1, 2]), seconds=4.0, **evaluated))
    writer.close()
    rows, events = read_timing(tmp_path)
    assert [(row["step"], row["step_time_s"], row["tokens_per_s"], row["mfu"]) for row in rows] == [
        (1, 2.0, 50.0, 0.25),
        (2, 2.0, 50.0, 0.25),
    ]
    assert [(event["event"], event.get("seconds")) for event in events] == [("start", None), ("eval", 0.5)]


def test_rows_are_written_beside_the_run_and_at_most_one_dispatch_waits(tmp_path):
    class Slow:
        def update(self, step, *_):
            assert gate.wait(10)

    gate, submitted = threading.Event(), []
    writer = open_writer(tmp_path, console=Slow())

    def produce():
        for step in (1, 2, 3):
            writer.submit(DispatchRecord(first_step=step, names=NAMES, values=packed([step])))
            submitted.append(step)

    producer = threading.Thread(target=produce)
    producer.start()
    producer.join(0.3)
    assert producer.is_alive() and submitted == [1]
    gate.set()
    producer.join()
    writer.event("end", 3)
    writer.close()
    writer.event("late", 3)  # after the end: dropped
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
    assert [event["event"] for event in read_timing(tmp_path)[1]] == ["start", "end"]


@pytest.mark.parametrize("then", ["submit", "flush", "close"])
def test_a_full_disk_is_raised_at_the_next_call_and_names_the_file(tmp_path, then):
    writer = open_writer(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._record._metrics_fd)
    os.close(full)
    writer.submit(DispatchRecord(first_step=1, names=NAMES, values=packed([1])))
    again = DispatchRecord(first_step=2, names=NAMES, values=packed([2]))
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl") as error:
        {"submit": lambda: writer.submit(again), "flush": writer.flush, "close": writer.close}[then]()
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert list(read_rows(tmp_path)) == []


def test_what_a_full_disk_took_of_a_line_is_taken_back(tmp_path, monkeypatch):
    record = Record.open(tmp_path)
    write, before = os.write, (tmp_path / "timing.jsonl").read_bytes()

    def half(fd, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match=r"timing\.jsonl"):
        record.event("x", 1, reason="y" * 100)
    record.close()
    assert (tmp_path / "timing.jsonl").read_bytes() == before


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_record_that_is_taken_away_is_noticed_at_the_next_flush(tmp_path, what):
    writer = open_writer(tmp_path)
    writer.flush()
    (tmp_path / METRICS).unlink()
    if what == "replaced":
        (tmp_path / METRICS).touch()
    with pytest.raises(OSError, match=r"removed or replaced while the run wrote to it.*metrics\.jsonl") as error:
        writer.flush(fsync=False)
    assert error.value.errno == errno.ESTALE
    writer.close()


def test_wrong_shapes_are_an_error(tmp_path):
    writer = open_writer(tmp_path)
    writer.submit(DispatchRecord(first_step=1, names=NAMES, values=packed([1])[:, :-1]))
    with pytest.raises(ValueError, match=r"float32\[1, 5\], expected float32 \[n, 6\]"):
        writer.close()


# ----------------------------------------------------------------------------------------------------- alerts


def test_rising_validation_begins_once_and_is_rearmed():
    losses = [5, 4, 4.1, 4.2, 4.3, math.nan, 4.4, 4.0, 4.1, math.nan, 4.2]
    rule, never = ValRising(2), ValRising(0)
    assert [i for i, loss in enumerate(losses) if rule.begins(i, {"val_loss": loss})] == [3, 10]
    assert not any(never.begins(i, {"val_loss": i}) for i in range(4)) and not rule.begins(9, {"stable_rank/a": 1.0})


def test_alerts_are_limited_per_kind_and_say_what_was_held_back():
    gate = AlertGate(100)

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


# ----------------------------------------------------------------------------------------------------- reading


def test_history_has_nan_where_a_row_has_no_such_value_and_a_selection_equals_the_whole(tmp_path):
    run_writer(tmp_path, 7, eval_every=3, alert_at=(2,)).close()
    whole = read_history(tmp_path)
    assert whole["step"].dtype == np.int64 and whole["loss"].dtype == np.float32 and len(whole["100%s"]) == 8
    assert np.isfinite(whole["val_loss"]).tolist() == [True, False, False, True, False, False, True, True]
    some = read_history(tmp_path, ["val_loss", "100%s", "nothing"])
    assert list(some) == ["step", "val_loss", "100%s", "nothing"] and np.isnan(some["nothing"]).all()
    for name in ("val_loss", "100%s"):
        np.testing.assert_array_equal(some[name], whole[name])


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "noise", '{"step": 1, "loss": 2.0}', '{"step": 9, "loss": "x"}', "\0" * 9]
)
@pytest.mark.parametrize("keys", [None, ("loss",)])
def test_damage_before_the_end_is_named_and_a_torn_end_is_passed_over(tmp_path, line, keys):
    fill(tmp_path, 3)
    with open(tmp_path / METRICS, "a") as file:
        file.write(line)
    assert len(list(read_rows(tmp_path, keys))) == 4
    with open(tmp_path / METRICS, "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 5"):
        list(read_rows(tmp_path, keys))


def test_the_tail_of_a_growing_record_gives_every_row_once_with_its_last_timing(tmp_path):
    fill(tmp_path, 5)
    fill(tmp_path, 3, resume_step=2)
    tail = Tail(tmp_path, 1)
    seen = [(row["step"], timing) for row, timing in tail.rows()]
    assert seen == [(2, {"time": 1.0}), (3, {"time": 1.0})]
    line = format_row({"step": 4, "loss": 1.0, "alerts": []}) + "\n"
    for part, rows in ((line[:9], []), (line[9:], [4]), ("", [])):
        with open(tmp_path / METRICS, "a") as file:
            file.write(part)
        assert [row["step"] for row, _ in tail.rows()] == rows
    tail.close()
    assert count_rows(tmp_path, 2) == 2 and count_rows(tmp_path / "none", 2) == 0


GOOD_LINE = {
    "step": 1,
    "layer": "block_0/mlp_up",
    "operand": "W",
    "format": "E4M3",
    "scale": 1.0,
    "amax": 1.0,
    "magnitudes": {"bins": 2220, "first": [1000], "counts": [[5]]},
}


@pytest.mark.parametrize(
    "line",
    [
        "\xff",
        "[]",
        "{}",
        "[" * 100_000,
        *(
            json.dumps({**GOOD_LINE, **change})
            for change in (
                {"step": "x"},
                {"operand": 5},
                {"amax": -1.0},
                {"magnitudes": 5},
                {"magnitudes": {"bins": 10**15}},
                {"magnitudes": {"bins": 2220, "first": [2219], "counts": [[1, 2]]}},
                {"magnitudes": {"bins": 2220, "first": [-5], "counts": [[1]]}},
            )
        ),
    ],
)
def test_a_damaged_diagnosis_is_named(tmp_path, line):
    path = tmp_path / "diagnostics.jsonl"
    path.write_bytes(f"{json.dumps(GOOD_LINE)}\n{line}\n".encode("latin-1"))
    with pytest.raises(UserError, match="diagnostics.jsonl is damaged in line 2"):
        read_diagnostics(tmp_path)
    path.write_text(json.dumps(GOOD_LINE) + '\n{"torn')
    lines = read_diagnostics(tmp_path)
    assert whatif.of_diagnoses(lines)[0] == 1 and lines[0]["magnitudes"][1000] == 5
    with pytest.raises(UserError, match="no diagnosis at step 3: give one of 1"):
        whatif.of_diagnoses(lines, 3)


# --------------------------------------------------------------------------------------------------- manifest


def test_manifest_round_trip_and_its_errors(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        read_manifest(tmp_path)
    manifest = {"config": {"lr": 6e-4}, "a": [1, "é"], "data": {"fingerprint": "f"}, "starts": [], "run_id": "r"}
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == {**manifest, "schema_version": SCHEMA_VERSION}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    for text, error in (
        ('{"schema_version": 5}', "schema_version 5, this program reads 1, 2, 3, 4: use the version"),
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
            read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="is a pipe, not a file: restore it"):
        read_manifest(tmp_path)


def test_a_manifest_of_version_1_is_read_as_it_is_and_written_as_the_present_one(tmp_path):
    written = {"schema_version": 1, "config": {"seed": 1}, "data": {"fingerprint": "f"}, "starts": [], "run_id": "r"}
    (tmp_path / "manifest.json").write_text(json.dumps(written))
    manifest = read_manifest(tmp_path)
    assert manifest == written
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path)["schema_version"] == SCHEMA_VERSION == 4


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
    record = Record.open(tmp_path)
    record.write([{"step": 0, "val_loss": 5.5}, {"step": 1, "loss": 5.5}])
    record.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(row + "\n")
    with open(tmp_path / "timing.jsonl", "a") as file:
        file.write('{"torn')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="metrics.jsonl lacks 1 of the rows up to step 2, the first at step 2"):
        Record.open(tmp_path, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "f", b"old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "f", "not bytes")
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
