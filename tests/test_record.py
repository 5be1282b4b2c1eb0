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
    DIAGNOSTICS,
    MANIFEST,
    METRICS,
    SCHEMA_VERSION,
    TIMING,
    Record,
    Tail,
    count_rows,
    format_row,
    keep_row,
    parse_row,
    read_diagnostics,
    read_manifest,
    read_rows,
    read_timing,
    read_window_losses,
    write_manifest,
    write_window_losses,
)
from altgrad_jax.run.writer import DispatchRecord, Formatter, RunFacts, Writer

LAYER = "block_0/mlp_up"
DEAD = f"dead_layer/{LAYER}"
NAMES = ("loss", f"grad_norm/{LAYER}", "100%s", "sparse/overflow/head/G", "alert/loss_spike", f"alert/{DEAD}",
         f"alert_value/{DEAD}")  # fmt: skip


def strict_json(line):
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def packed(steps):
    """[steps, NAMES] without alerts; a function of the step alone, as in a resumed run."""
    values_KM = np.array([np.random.default_rng(step).standard_normal(len(NAMES)) for step in steps], np.float32)
    values_KM[:, 4:] = 0
    return values_KM


def rows_of(run_dir):
    return [strict_json(line) and parse_row(line) for line in (run_dir / METRICS).read_text().splitlines()]


def bytes_of(run_dir):
    return [(run_dir / name).read_bytes() for name in (METRICS, DIAGNOSTICS) if (run_dir / name).exists()]


def add(path, data):
    with open(path, "ab") as file:
        file.write(data)


def fill(run_dir, last, resume_step=None, log_interval=1, diagnoses=()):
    """Rows up to `last`, and two lines of diagnostics at each of the steps `diagnoses`."""
    record = Record.open(run_dir, resume_step, log_interval=log_interval)
    for step in range(0 if resume_step is None else resume_step + 1, last + 1):
        lines = [{"step": step, "operand": operand} for operand in "WA"]
        record.append_diagnostics(lines if step in diagnoses else [])
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
    assert format_row({"step": 1, "m": np.float32(0.1)}) == '{"step": 1, "m": 0.1}'
    # Shortest: no decimal with fewer digits gives the same float32.
    for text in [str(x) for x in np.abs(back[:2000])]:
        digits = len(text.split("e")[0].replace(".", "").strip("0")) - 1
        assert digits == 0 or np.float32(f"{float(text):.{digits - 1}e}") != np.float32(text)


def test_nonfinite_numbers_are_strings_and_come_back():
    alert = {"kind": "NaN", "layer": None, "value": math.inf}
    line = format_row({"step": 7, "a": math.nan, "b": math.inf, "c": -math.inf, "alerts": [alert]})
    assert line == (
        '{"step": 7, "a": "NaN", "b": "Infinity", "c": "-Infinity", '
        '"alerts": [{"kind": "NaN", "layer": null, "value": "Infinity"}]}'
    )
    back = parse_row(line)
    assert math.isnan(back["a"]) and (back["b"], back["c"], back["alerts"]) == (math.inf, -math.inf, [alert])
    assert format_row(back) == line
    with pytest.raises(ValueError, match="begins with its step"):
        format_row({"loss": 1.0, "step": 1})


@pytest.mark.parametrize(
    "changes", [{}, {1: math.nan}, {3: math.nan}, {0: math.inf, 3: -math.inf}, {2: math.nan, 3: math.nan}]
)
def test_the_fast_formatter_equals_format_row(changes):
    formatter, values = Formatter(NAMES), packed([3])[0]
    for column, value in changes.items():
        values[column] = value
    values[4:] = 2.5, 1.0, 0.25
    alerts = formatter.alerts_of(values)
    assert alerts == [
        {"kind": "loss_spike", "layer": None, "value": 2.5},
        {"kind": "dead_layer", "layer": LAYER, "value": 0.25},
    ]
    evaluation = {"val_loss": 0.1, "code_entropy/head/G": math.nan}
    metrics = dict(zip(("loss", f"grad_norm/{LAYER}", "100%s", "overflow/head/G"), values))
    if math.isnan(values[3]):
        del metrics["overflow/head/G"]  # sparse: it alone is left out where it is NaN
    row = {"step": 3, **metrics, **evaluation, "alerts": alerts}
    assert formatter.line(3, values, evaluation, alerts) == format_row(row)


# ----------------------------------------------------------------------------------------------------- record


@pytest.mark.parametrize("name", [METRICS, DIAGNOSTICS])
def test_a_fresh_run_refuses_an_old_record(tmp_path, name):
    (tmp_path / name).write_text('{"step": 0}\n')
    with pytest.raises(UserError, match=rf"{name} already holds a run: .*--resume=auto.*--workdir"):
        Record.open(tmp_path)
    assert (tmp_path / name).read_text() == '{"step": 0}\n'


def test_a_resumed_record_has_the_bytes_of_an_uninterrupted_one(tmp_path):
    fill(tmp_path / "whole", 20, diagnoses=(0, 8, 16))
    fill(tmp_path / "cut", 17, diagnoses=(0, 8, 16))
    add(tmp_path / "cut" / METRICS, b'{"step": 18, "lo')
    add(tmp_path / "cut" / TIMING, b'{"step": 18, "ti')
    fill(tmp_path / "cut", 20, resume_step=9, diagnoses=(16,))
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    # Every line of timing.jsonl parses again, and the history is kept.
    rows, events = read_timing(tmp_path / "cut")
    assert len((tmp_path / "cut" / TIMING).read_text().splitlines()) == len(rows) + len(events)
    assert [row["step"] for row in rows] == [*range(18), *range(10, 21)]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("resume", 9)]


@pytest.mark.parametrize("torn", [b"", b"\0" * 300, b'{"step": 6, "lo', b"\xff\xfe\n", b'{"st\n{"step": 7}\n'])
def test_any_tail_behind_the_checkpoint_is_cut(tmp_path, torn):
    fill(tmp_path, 5, diagnoses=(0, 5))
    whole = bytes_of(tmp_path)
    for name in (METRICS, DIAGNOSTICS):
        add(tmp_path / name, torn)
    Record.open(tmp_path, 5).close()
    assert bytes_of(tmp_path) == whole and len(whole) == 2


@pytest.mark.parametrize(
    "row",
    [
        b"",
        b'{"step": 4, "lo\n',
        b"\0" * 9 + b"\n",
        b'{"step": 4, "l\0ss": 1.0}\n',
        b'{"step": 4, "val_loss": }\n',
        b'{"step": 4, "val_loss": "x"}\n',
        b'{"step": 4, "stable_rank/embed": null}\n',
        b'{"step": ' + b"9" * 5000 + b"}\n",
    ],
)
def test_missing_and_damaged_rows_are_refused_and_the_folder_left_as_it_was(tmp_path, row):
    fill(tmp_path, 8)
    lines = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    (tmp_path / METRICS).write_bytes(b"".join([*lines[:4], row, *lines[5:]]))
    add(tmp_path / TIMING, b'{"torn')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"metrics.jsonl lacks [15] of the rows up to step 8, the first at step 4"):
        Record.open(tmp_path, 8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_out_of_order_are_refused(tmp_path):
    fill(tmp_path, 3)
    add(tmp_path / METRICS, b'{"step": 2, "loss": 1.0}\n')
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
    fill(tmp_path / "died", 3, diagnoses=(0,))
    Record.open(tmp_path / "died", -1).close()
    assert bytes_of(tmp_path / "died") == [b"", b""]


def test_a_changed_log_interval_is_judged_by_the_rows_that_were_due(tmp_path):
    fill(tmp_path, 20, log_interval=5)
    fill(tmp_path, 30, resume_step=20, log_interval=1)
    fill(tmp_path, 44, resume_step=28, log_interval=2)
    Record.open(tmp_path, 44).close()
    lines = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    (tmp_path / METRICS).write_bytes(b"".join(line for line in lines if b'"step": 23,' not in line))
    with pytest.raises(UserError, match="lacks 1 of the rows up to step 44, the first at step 23"):
        Record.open(tmp_path, 44)


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
    environ = {**os.environ, "PYTHONPATH": str(Path(record_module.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=environ) as child:
        flushed = [child.stdout.readline() for _ in range(40)]
        child.kill()
        flushed += child.stdout.readlines()
    last = int([line for line in flushed if line.endswith(b"\n")][-1])
    Record.open(tmp_path, last).close()
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, last + 1))


# ----------------------------------------------------------------------------------------------------- writer


class ConsoleSpy:
    def __init__(self):
        self.updates, self.alerts, self.alert = [], [], lambda text: self.alerts.append(text)

    def update(self, step, loss, val_loss, tokens_per_s):
        self.updates.append((step, loss, val_loss, tokens_per_s))


def open_writer(run_dir, resume_step=None, *, console=None, rules=(), **facts):
    facts = RunFacts(**{"max_steps": 9, "tokens_per_step": 100} | facts)
    record = Record.open(run_dir, resume_step, log_interval=facts.log_interval)
    return Writer(record, facts, console=console, rules=rules)


def dispatch(first, last=None, **more):
    return DispatchRecord(first_step=first, names=NAMES, values=packed(range(first, (last or first) + 1)), **more)


# {step: (validation loss, stable ranks of two layers)}. The loss rises twice in a row at 15; with `after` 5 the first
# ranks that count are those at 10; half of them is 5, the strict share of `embed` 7.
LOOKS = {
    0: (5.0, 30, 30), 5: (4.0, 20, 20), 10: (4.1, 10, 10), 15: (4.2, 6, 6), 20: (4.3, 4, 8), 25: (4.0, 4, 6),
    30: (3.0, 4, 6), 35: (2.0, 9, 6),
}  # fmt: skip


def run_writer(run_dir, last, resume_step=None, alert_at=(), **more):
    """A whole run, or its continuation, in dispatches of at most 3 steps that end at evaluations."""
    more = {"max_steps": 35, "rules": [ValRising(2), RankFalling(0.5, 0.7, after=5)]} | more
    writer, step = open_writer(run_dir, resume_step, **more), -1 if resume_step is None else resume_step
    while step < last:
        first, step = step + 1, min(step + 3, last, -(-(step + 1) // 5) * 5)
        made = {} if step == 0 else {"names": NAMES, "values": packed(range(first, step + 1)), "seconds": 4.0}
        for at in alert_at:
            if first <= at <= step:
                made["values"][at - first, 4] = 9.5
        if step in LOOKS:
            names = "val_loss", f"stable_rank/{LAYER}", "stable_rank/embed"
            made |= {"evaluation": dict(zip(names, np.float32(LOOKS[step]))), "evaluation_s": 0.5}
            made["diagnostics"] = [{"step": step, "layer": "head", "operand": "W"}]
        writer.submit(DispatchRecord(first_step=first, **made))
    writer.close()


def test_rows_alerts_and_times_of_a_run(tmp_path):
    console = ConsoleSpy()
    run_writer(tmp_path, 35, console=console, alert_at=(3, 6), flops_per_step=50.0, peak_flops=100.0)
    rows, (timing, events) = rows_of(tmp_path), read_timing(tmp_path)
    assert rows == list(read_rows(tmp_path)) and [row["step"] for row in rows] == list(range(36))
    assert rows[0] == pytest.approx({"step": 0, "val_loss": 5.0, f"stable_rank/{LAYER}": 30, "stable_rank/embed": 30})
    for row in rows[1:]:
        expected = dict(zip(("loss", f"grad_norm/{LAYER}", "100%s"), packed([row["step"]])[0]))
        assert {name: np.float32(row[name]) for name in expected} == expected
        assert not any(name.startswith("alert") and name != "alerts" for name in row)
    alerts = {
        row["step"]: [(alert["kind"], alert["layer"], round(alert["value"], 5)) for alert in row["alerts"]]
        for row in rows
        if "alerts" in row
    }
    assert alerts == {
        3: [("loss_spike", None, 9.5)],
        6: [("loss_spike", None, 9.5)],
        15: [("val_rising", None, 4.2), ("rank_falling", "embed", 0.6)],
        20: [("rank_falling", LAYER, 0.4)],
        25: [("rank_falling", "embed", 0.6)],  # re-armed by 8 at step 20
    }
    # The second spike comes within 100 steps of the first: recorded, not shown.
    assert [text.split(",")[0] for text in console.alerts] == [
        "step 3: loss_spike", "step 15: val_rising", "step 15: rank_falling in embed"
    ]  # fmt: skip
    assert [step for step, *_ in console.updates] == list(range(36)) and console.updates[5][2] == 4.0
    assert [row["step"] for row in timing] == list(range(1, 36))
    assert (timing[0]["step_time_s"], timing[0]["tokens_per_s"], timing[0]["mfu"]) == (
        pytest.approx(4 / 3, 1e-5),
        75.0,
        0.375,
    )
    assert [(event["event"], event["step"], event["seconds"]) for event in events[1:]] == [
        ("eval", at, 0.5) for at in LOOKS
    ]


@pytest.mark.parametrize("stop, resume_step", [(7, 2), (12, 9), (17, 15), (22, 20), (29, 16), (34, 29)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop, resume_step):
    run_writer(tmp_path / "whole", 35)
    run_writer(tmp_path / "cut", stop, alert_at=(stop,))
    run_writer(tmp_path / "cut", 35, resume_step)
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def test_intervals_keep_what_matters(tmp_path):
    run_writer(tmp_path / "rows", 34, log_interval=8, alert_at=(7,), rules=())
    assert [row["step"] for row in rows_of(tmp_path / "rows")] == [0, 5, 7, 8, 10, 15, 16, 20, 24, 25, 30, 32]
    Record.open(tmp_path / "rows", 34, log_interval=8).close()  # 34 is where it was interrupted, not its last step
    run_writer(tmp_path / "whole", 35, alert_at=(4,))
    run_writer(tmp_path / "thin", 35, alert_at=(4,), layer_interval=4)
    for before, after in zip(rows_of(tmp_path / "whole")[1:], rows_of(tmp_path / "thin")[1:], strict=True):
        whole = before["step"] % 4 == 1 or before["step"] == 35
        dropped = set() if whole else {f"grad_norm/{LAYER}", "overflow/head/G"}
        assert after == {key: value for key, value in before.items() if key not in dropped}


def test_rows_are_written_beside_the_run_and_at_most_one_dispatch_waits(tmp_path):
    gate, console, submitted = threading.Event(), ConsoleSpy(), []
    console.update = lambda *_: gate.wait(10)
    writer = open_writer(tmp_path, console=console)
    producer = threading.Thread(target=lambda: [submitted.append(writer.submit(dispatch(step))) for step in (1, 2, 3)])
    producer.start()
    producer.join(0.3)
    assert producer.is_alive() and len(submitted) == 1
    gate.set()
    producer.join()
    writer.event("end", 3)
    writer.close()
    writer.event("late", 3)  # after the end: dropped
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    assert [event["event"] for event in read_timing(tmp_path)[1]] == ["start", "end"]


@pytest.mark.parametrize("then", ["submit", "flush", "close"])
def test_a_full_disk_is_raised_at_the_next_call_and_names_the_file(tmp_path, then):
    writer = open_writer(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._record._metrics_fd)
    os.close(full)
    writer.submit(dispatch(1))
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl") as error:
        {"submit": lambda: writer.submit(dispatch(2)), "flush": writer.flush, "close": writer.close}[then]()
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert rows_of(tmp_path) == []


def test_what_a_full_disk_took_of_a_line_is_taken_back(tmp_path, monkeypatch):
    record, write = Record.open(tmp_path), os.write
    before = (tmp_path / TIMING).read_bytes()

    def half(fd, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match=r"timing\.jsonl"):
        record.event("x", 1, reason="y" * 100)
    record.close()
    assert (tmp_path / TIMING).read_bytes() == before


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
    with pytest.raises(ValueError, match=r"float32\[1, 6\], expected float32 \[n, 7\]"):
        writer.close()


def test_rising_validation_begins_once_and_is_rearmed():
    losses = [5, 4, 4.1, 4.2, 4.3, math.nan, 4.4, 4.0, 4.1, math.nan, 4.2]
    rule, never = ValRising(2), ValRising(0)
    assert [i for i, loss in enumerate(losses) if rule.begins(i, {"val_loss": loss})] == [3, 10]
    assert not any(never.begins(i, {"val_loss": i}) for i in range(4)) and not rule.begins(9, {"stable_rank/a": 1.0})


def test_alerts_are_limited_per_kind_and_say_what_was_held_back():
    gate = AlertGate(100)

    def alerts(kind, *layers):
        return [{"kind": kind, "layer": layer, "value": 0.75} for layer in layers]

    assert gate.messages(5, alerts("dead_layer", LAYER, "ln_f") + alerts("loss_spike", None)) == [
        ("dead_layer", f"step 5: dead_layer in {LAYER} and 1 more, value 0.75"),
        ("loss_spike", "step 5: loss_spike, value 0.75"),
    ]
    assert gate.messages(104, alerts("dead_layer", "a", "b")) == []
    assert gate.messages(105, alerts("dead_layer", "c")) == [
        ("dead_layer", "step 105: dead_layer in c, value 0.75 (2 more since step 5)")
    ]


# ----------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "line", [b"{}", b"[1]", b"\xff", b'{"step": 1, "loss": 2.0}', b'{"step": 9, "loss": "x"}', b"\0"]
)
@pytest.mark.parametrize("keys", [None, ("loss",)])
def test_damage_before_the_end_is_named_and_a_torn_end_is_passed_over(tmp_path, line, keys):
    fill(tmp_path, 3)
    add(tmp_path / METRICS, line)
    assert len(list(read_rows(tmp_path, keys))) == 4
    add(tmp_path / METRICS, b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 5"):
        list(read_rows(tmp_path, keys))


def test_the_tail_of_a_growing_record_gives_every_row_once_with_its_last_timing(tmp_path):
    fill(tmp_path, 5)
    fill(tmp_path, 3, resume_step=2)
    tail = Tail(tmp_path, 1)
    assert [(row["step"], timing) for row, timing in tail.rows()] == [(2, {"time": 1.0}), (3, {"time": 1.0})]
    line = format_row({"step": 4, "loss": 1.0}).encode() + b"\n"
    for part, rows in ((line[:9], []), (line[9:], [4]), (b"", [])):
        add(tmp_path / METRICS, part)
        assert [row["step"] for row, _ in tail.rows()] == rows
    tail.close()
    assert count_rows(tmp_path, 2) == 2 and count_rows(tmp_path / "none", 2) == 0


DIAGNOSIS = {"step": 1, "layer": LAYER, "operand": "W", "format": "E4M3", "scale": 1.0, "amax": 1.0}
DIAGNOSIS["magnitudes"] = {"bins": 2220, "first": [1000], "counts": [[5]]}


@pytest.mark.parametrize(
    "line",
    ["\xff", "[]", "{}", "[" * 100_000]
    + [
        json.dumps(DIAGNOSIS | change)
        for change in (
            {"step": "x"},
            {"operand": 5},
            {"amax": -1.0},
            {"magnitudes": 5},
            {"magnitudes": {"bins": 10**15}},
            {"magnitudes": {"bins": 2220, "first": [2219], "counts": [[1, 2]]}},
            {"codes": {"bins": 256, "first": [-5], "counts": [[1]]}},
        )
    ],
)
def test_a_damaged_diagnosis_is_named(tmp_path, line):
    path = tmp_path / DIAGNOSTICS
    path.write_bytes(f"{json.dumps(DIAGNOSIS)}\n{line}\n".encode("latin-1"))
    with pytest.raises(UserError, match="diagnostics.jsonl is damaged in line 2"):
        read_diagnostics(tmp_path)
    path.write_text(json.dumps(DIAGNOSIS) + '\n{"torn')
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
    assert read_manifest(tmp_path) == {**manifest, "schema_version": SCHEMA_VERSION} and SCHEMA_VERSION == 8
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    written = {**manifest, "schema_version": 1}
    for text, error in (
        ('{"schema_version": 9}', "schema_version 9, this program reads 1, 2, 3, 4, 5, 6, 7, 8: use the version"),
        ('{"schema_version": "2"}', "'2'"),
        ("{}", "None"),
        ("[1]", "None"),
        ('{"schema_version": true}', "True"),
        ('{"schema_version": 1', "cannot be read"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps({**written, "config": 5}), "config 5 where an object"),
        (json.dumps({**written, "starts": {}}), "starts {} where a list"),
        (json.dumps({**written, "data": {}}), "the fingerprint of the data"),
        (json.dumps({**written, "run_id": 5}), "the run_id of the run"),
    ):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(UserError, match=error):
            read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(written))
    assert read_manifest(tmp_path) == written  # an earlier version is read as it is
    (tmp_path / MANIFEST).unlink()
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(UserError, match="is a pipe, not a file: restore it"):
        read_manifest(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "f", b"old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "f", "not bytes")
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------- names of earlier versions


OLD_ROW = {"loss": 2.0, "lost": 0.7, f"lost/{LAYER}": 0.8, f"effective_lr/{LAYER}": 0.5, "lost_energy": 1.5,
           f"update_norm/{LAYER}": 3.0, f"zero_update/{LAYER}": 0.0, f"amax/{LAYER}/G": 4.0, f"scale/{LAYER}/W": 8.0,
           f"scale_log2_max/{LAYER}/dgrad.g": -3.0, f"grad_snr/{LAYER}": 1.0, "flip": 0.1}  # fmt: skip
SAME = {"loss": 2.0, f"update_gain/{LAYER}": 0.5, "update_error": 1.5, f"encode_scale/{LAYER}/W": 8.0, "flip": 0.1}
OF_ALL = {f"amax/{LAYER}/G": 4.0, f"decode_scale_log2_max/{LAYER}/dgrad.g": -3.0}
OF_PARTS = {f"micro_batch_amax/{LAYER}/G": 4.0, f"micro_batch_decode_scale_log2_max/{LAYER}/dgrad.g": -3.0}
REQUESTED = {f"requested_update_norm/{LAYER}": 3.0, f"requested_zero_update/{LAYER}": 0.0}
LOST = {"lost_update": 0.7, f"lost_update/{LAYER}": 0.8}
ONE_DRAW = {"not_flipped": 0.7, f"not_flipped/{LAYER}": 0.8}


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, LOST | OF_ALL | {f"update_norm/{LAYER}": 3.0, f"zero_update/{LAYER}": 0.0}),
        ({"weights_at_rest": "nearest"}, LOST | OF_ALL | REQUESTED),
        ({"weights_at_rest": "stochastic", "grad_accum_steps": 4}, ONE_DRAW | OF_PARTS | REQUESTED),
    ],
)
@pytest.mark.parametrize("version", [1, 5])
def test_older_rows_have_the_names_of_today_and_none_whose_definition_changed(tmp_path, config, expected, version):
    manifest = {"config": config, "data": {"fingerprint": "f"}, "starts": [{"step": 0}], "run_id": "r"}
    write_manifest(tmp_path, manifest)
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))
    rows = [{"step": step} | OLD_ROW for step in (1, 2)]
    (tmp_path / METRICS).write_text("".join(format_row(row) + "\n" for row in rows))
    (tmp_path / TIMING).touch()
    first, second = read_rows(tmp_path)
    assert first == {"step": 1} | SAME | expected
    assert second == {"step": 2} | SAME | expected | {f"grad_snr/{LAYER}": 1.0}
    for name, value in second.items():
        (_, cut) = read_rows(tmp_path, [name])
        assert name == "step" or cut == {"step": 2, name: value}
    tail = Tail(tmp_path, 1)
    assert [row for row, _ in tail.rows()] == [second]
    tail.close()
    # A run that this version resumed at step 1: the row behind it is its own, whatever its names.
    starts = [{"step": 0}, {"step": 1, "schema_version": SCHEMA_VERSION}]
    write_manifest(tmp_path, manifest | {"starts": starts})
    resumed = list(read_rows(tmp_path))
    assert resumed == [first, {"step": 2} | OLD_ROW]
    write_manifest(tmp_path, manifest | {"starts": starts[1:]})
    assert list(read_rows(tmp_path)) == [{"step": step} | OLD_ROW for step in (1, 2)]


def test_losses_by_window_come_back_as_they_were(tmp_path):
    assert read_window_losses(tmp_path) is None
    losses = np.float32([2.1, np.nan, 1 / 3, np.inf])
    write_window_losses(tmp_path, 40, losses)
    step, found = read_window_losses(tmp_path)
    assert step == 40 and found.dtype == np.float32
    np.testing.assert_array_equal(found, losses)
    for text in ('{"step": 1, "losses": []}', '{"step": "1", "losses": [1]}', "[1]", '{"step": 1, "losses": ["x"]}'):
        (tmp_path / "window_losses.json").write_text(text)
        with pytest.raises(UserError, match="does not hold a step and a list of losses: delete it"):
            read_window_losses(tmp_path)
