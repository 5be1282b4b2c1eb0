"""The run's record: one row per step on disk, always; Weights & Biases fed from it, when asked.

The record decides what is true about a run, so it is written first and depends on nothing else. Three
append-only files in the run folder:

metrics.jsonl  deterministic values only, one row per step. Two runs of one config have equal bytes, and a run
               that was killed and resumed has the bytes of one that was not. Floats are the shortest decimal
               that gives the same float32 back (0.1, not 0.10000000149); NaN and infinities, which JSON
               lacks, are strings.
diagnostics.jsonl  deterministic too: the histograms of the quantized operands, a line per operand at every diagnosis.
timing.jsonl   wall-clock values of the same rows, and events ("start", "resume", "eval", ...). A resumed run
               appends: replayed steps stand in it twice, the last one counts.

Who does what: the host loop hands each dispatch, not yet computed, to the `Writer`. Its thread waits for the
numbers, formats them, and writes metrics and timing. W&B lives in a *process* of its own that reads the
record as it grows: the record is its queue. A slow, hanging or failing W&B therefore shares neither the
interpreter lock nor signal handlers, exit hooks or standard output with the training, and after kill -9 of
the training it still sends what was recorded.
"""

import contextlib
import errno
import fnmatch
import functools
import importlib
import json
import math
import netrc
import os
import queue
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.files import read_json, require_file, sync

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
DIAGNOSTICS = "diagnostics.jsonl"
MANIFEST = "manifest.json"
# 2: settings of number formats in the config (config.ADDED_IN_2 holds what version 1 lacks), more keys in the rows, and
# diagnostics.jsonl. 3: the setting checkpoint_seconds (config.ADDED_IN_3), and in the rows counts of moments, amaxes,
# scales and residuals that are not finite. Records of earlier versions are read as they are.
SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)

ALERT = "alert/"
ALERT_VALUE = "alert_value/"
SPARSE = "sparse/"
TIMING_KEYS = ("time", "step_time_s", "tokens_per_s", "mfu")  # of a row of timing.jsonl, beside its step

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_STEP = re.compile(rb'\{"step": (\d{1,18})[,}]')


# ------------------------------------------------------------------------------------------------------- rows


def _number(value):
    """Shortest decimal that reads back as the same float32; NaN and infinities as JSON strings."""
    value = np.float32(value)
    if np.isfinite(value):
        return str(value)
    return '"NaN"' if np.isnan(value) else '"Infinity"' if value > 0 else '"-Infinity"'


def _alert_text(alert):
    return (
        f'{{"kind": {json.dumps(alert["kind"])}, "layer": {json.dumps(alert["layer"])}, '
        f'"value": {_number(alert["value"])}}}'
    )


def _fields(row):
    for key, value in row.items():
        if key == "step":
            yield f'"step": {int(value)}'
        elif key == "alerts":
            yield f'"alerts": [{", ".join(map(_alert_text, value))}]'
        else:
            yield f"{json.dumps(key)}: {_number(value)}"


def format_row(row):
    """One line of metrics.jsonl, without the newline, from {"step": int, name: number, ..., "alerts": [...]}.

    Every number but the step is taken as float32. The order of the keys is kept, so equal rows give equal
    bytes.
    """
    if next(iter(row), None) != "step":
        raise ValueError(f"a row begins with its step, not with {next(iter(row), None)!r}")
    return "{" + ", ".join(_fields(row)) + "}"


def parse_row(line):
    """The row of a line of metrics.jsonl or timing.jsonl; "NaN" and the infinities become floats again."""
    row = json.loads(line)
    for key, value in row.items():
        if isinstance(value, str) and value in _NONFINITE:
            row[key] = _NONFINITE[value]
    for alert in row.get("alerts", ()):
        if isinstance(alert["value"], str):
            alert["value"] = _NONFINITE[alert["value"]]
    return row


class _Formatter:
    """Lines of one dispatch. Columns are split once per tuple of names; a number costs 0.5 us (measured)."""

    def __init__(self, names):
        self.names = names
        self.metrics = np.array([i for i, name in enumerate(names) if not name.startswith((ALERT, ALERT_VALUE))], int)
        self.keys = [names[i].removeprefix(SPARSE) for i in self.metrics]
        self.sparse = np.array([names[i].startswith(SPARSE) for i in self.metrics], bool)
        self.of_layers = np.array(["/" in key for key in self.keys], bool)
        column = {name: i for i, name in enumerate(names)}
        self.alerts = []  # (column, kind, layer, column of the value)
        for i, name in enumerate(names):
            if name.startswith(ALERT):
                kind, _, layer = name[len(ALERT) :].partition("/")
                value = column.get(ALERT_VALUE + name[len(ALERT) :], i)
                self.alerts.append((i, kind, layer or None, value))
        self.alert_columns = np.array([i for i, *_ in self.alerts], int)
        self.fields = [", " + json.dumps(key).replace("%", "%%") + ": %s" for key in self.keys]
        self.templates = {}  # which keys a row has -> its template; few such sets occur

    def alerts_of(self, values_M):
        """The alerts that begin in one row of packed values."""
        begins = values_M[self.alert_columns] != 0
        if not begins.any():
            return []
        return [
            {"kind": kind, "layer": layer, "value": float(values_M[value])}
            for (_, kind, layer, value), now in zip(self.alerts, begins, strict=True)
            if now
        ]

    def line(self, step, values_M, evaluation, alerts, of_layers=True):
        """What format_row gives for the same row, faster; without the statistics of layers unless of_layers."""
        values = values_M[self.metrics]
        present = ~(self.sparse & np.isnan(values))
        if not of_layers:
            present &= ~self.of_layers
        template = self.templates.get(present.tobytes())
        if template is None:
            template = "".join(field for field, there in zip(self.fields, present) if there)
            self.templates[present.tobytes()] = template
        values = values[present]
        # tuple(array) holds np.float32 scalars, whose str() is the shortest float32 form.
        shown = tuple(values) if np.isfinite(values).all() else tuple(map(_number, values))
        rest = dict(evaluation or {})
        if alerts:
            rest["alerts"] = alerts
        tail = "".join(", " + field for field in _fields(rest))
        return f'{{"step": {step}' + template % shown + tail + "}"


def keep_row(step, *, log_interval, max_steps=None, notable=False):
    """Whether the row of this step is recorded: every log_interval steps, the run's last step, and every row
    that carries an alert or a validation loss (`notable`).

    The last step is max_steps, not where a run happens to be interrupted: a resumed record must equal an
    uninterrupted one.
    """
    return notable or step % log_interval == 0 or step == max_steps


# ----------------------------------------------------------------------------------------------------- record


def _repair_tail(path):
    """Cut an unfinished last line off. Returns the size of what is left."""
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
        return end


def _log_intervals(timing_path, default):
    """[(first step, log_interval)] by which the record was written, from its start and resume events."""
    segments = []
    with open(timing_path, "rb") as file:
        for line in file:
            if b'"log_interval"' in line:
                try:
                    event = json.loads(line)
                    start, interval = event["step"] + 1, event["log_interval"]
                except (ValueError, KeyError, TypeError):
                    continue  # a damaged line of the history; the check then asks for the default
                segments = [s for s in segments if s[0] < start] + [(start, interval)]
    return segments or [(0, default)]


def furthest_step(run_dir):
    """The last step that any start of the run has made and timed, by timing.jsonl; 0 where there is none."""
    try:
        with open(Path(run_dir) / TIMING, "rb") as file:
            return max((int(match[1]) for match in map(_STEP.match, file) if match), default=0)
    except FileNotFoundError:
        return 0


def _scan(path, resume_step):
    """Read the record up to resume_step. Returns (bytes to keep, steps, [(step, val_loss)], [(step, {layer: stable
    rank})]).

    Stops at the first row past resume_step. A damaged line is an error only if rows up to resume_step lie
    behind it: a torn tail is what a killed run leaves, and is dropped.
    """
    keep, steps, validation, ranks = 0, [], [], []
    with open(path, "rb") as file:
        for line in file:
            match = _STEP.match(line)
            if not match or not line.endswith(b"}\n") or b"\0" in line:
                break
            step = int(match[1])
            if step > resume_step:
                break
            if steps and step <= steps[-1]:
                raise UserError(
                    f"{path} is damaged: line {len(steps) + 1} holds step {step} after step "
                    f"{steps[-1]}; restore it from a copy, or start over in a new folder"
                )
            if b'"val_loss"' in line or b'"stable_rank/' in line:
                try:
                    row = parse_row(line)
                    found, of_layers = [row[key] for key in ("val_loss",) if key in row], stable_ranks(row)
                    if not all(isinstance(value, float) for value in (*found, *of_layers.values())):
                        break
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    break
                validation += [(step, value) for value in found]
                ranks += [(step, of_layers)] if of_layers else []
            steps.append(step)
            keep += len(line)
    return keep, steps, validation, ranks


def stable_ranks(row):
    """{layer: stable rank} of a row; empty where there was no diagnosis."""
    prefix = "stable_rank/"
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _cut_diagnostics(path, resume_step):
    """Keep the lines of steps up to resume_step."""
    if not path.exists():
        return
    _repair_tail(path)
    keep = 0
    with open(path, "rb") as file:
        for line in file:
            match = _STEP.match(line)
            if not match or int(match[1]) > resume_step:
                break
            keep += len(line)
    if keep < path.stat().st_size:
        os.truncate(path, keep)


class Record:
    """metrics.jsonl and timing.jsonl of one run folder, open for appending. Not locked: one thread writes.

    A full disk is waited for as long as `wait_for_space` allows, a function that waits a moment and says whether to try
    again; None: not at all. Then, and where writing fails otherwise, the OSError names the file.

    val_losses: [(step, validation loss)] of the rows kept on resume; ranks: likewise [(step, {layer: stable rank})].
    """

    def __init__(self, run_dir, metrics_fd, timing_fd, last_step, val_losses, ranks=()):
        self.run_dir, self.last_step, self.val_losses, self.ranks = run_dir, last_step, val_losses, ranks
        self.wait_for_space = None
        self._metrics_fd, self._timing_fd = metrics_fd, timing_fd

    @classmethod
    def open(cls, run_dir, resume_step=None, *, log_interval=1):
        """Create the record of a fresh run (resume_step None), or cut an existing one back to resume_step.

        The cut truncates in place, at the end of a row: one system call, so a kill leaves the old length or
        the new one, and it needs no second copy of a record that may be gigabytes. resume_step -1 keeps no
        row: an earlier attempt died before its first checkpoint. timing.jsonl keeps its history and gets an
        event "start" or "resume" that says from which step on which log_interval holds.

        Raises:
          UserError: a fresh run finds a record; a resumed one lacks rows up to resume_step.
        """
        run_dir = Path(run_dir)
        metrics, timing = run_dir / METRICS, run_dir / TIMING
        for path in (metrics, timing, run_dir / DIAGNOSTICS):
            if os.path.lexists(path):
                require_file(path, "restore it from a copy, or start over in a new folder")
        if resume_step is None:
            for path in (metrics, timing, run_dir / DIAGNOSTICS):
                if path.exists() and path.stat().st_size:
                    raise UserError(
                        f"{path} already holds a run: continue it with --resume=auto, or choose "
                        "another folder with --workdir"
                    )
            run_dir.mkdir(parents=True, exist_ok=True)
            metrics.touch()
            timing.touch()
            last_step, validation, ranks = -1, [], []
        else:
            if not metrics.exists() and resume_step >= 0:
                raise UserError(
                    f"{metrics} is missing, so the run cannot be continued at step {resume_step} "
                    "with a whole record: restore the file, or start over in a new folder"
                )
            timing.touch()
            metrics.touch()
            keep, steps, validation, ranks = _scan(metrics, resume_step)
            _require_rows(metrics, steps, resume_step, _log_intervals(timing, log_interval))
            # From here on the folder is used; before, a refusal leaves it as it was.
            _repair_tail(timing)
            if keep < metrics.stat().st_size:
                os.truncate(metrics, keep)
            _cut_diagnostics(run_dir / DIAGNOSTICS, resume_step)
            last_step = resume_step
        flags = os.O_WRONLY | os.O_APPEND
        record = cls(run_dir, os.open(metrics, flags), os.open(timing, flags), last_step, validation, ranks)
        record.event("start" if last_step < 0 else "resume", max(last_step, 0), log_interval=log_interval)
        record.flush(fsync=True)
        return record

    def write(self, rows, timing_rows=()):
        """Append rows (dicts, see format_row). Their steps must increase."""
        self.append([row["step"] for row in rows], [format_row(row) for row in rows], timing_rows)

    def append(self, steps, lines, timing_rows=()):
        """Append formatted rows. Timing goes first: whoever has read a row finds its timing."""
        for step in steps:
            if step <= self.last_step:
                raise ValueError(f"row {step} follows row {self.last_step}: steps must increase")
            self.last_step = step
        if timing_rows:
            self._append(TIMING, self._timing_fd, "".join(json.dumps(row) + "\n" for row in timing_rows))
        if lines:
            self._append(METRICS, self._metrics_fd, "".join(line + "\n" for line in lines))

    def _append(self, name, fd, text):
        data = text.encode()
        while data:
            try:
                # What a disk that fills up took of it stays; the rest goes behind it.
                data = data[os.write(fd, data) :]
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if not (full and self.wait_for_space and self.wait_for_space()):
                    raise OSError(error.errno, error.strerror, str(self.run_dir / name)) from None

    def append_diagnostics(self, rows):
        """Append lines to diagnostics.jsonl, which a run without any never gets."""
        if rows:
            fd = os.open(self.run_dir / DIAGNOSTICS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                self._append(DIAGNOSTICS, fd, "".join(json.dumps(row) + "\n" for row in rows))
                os.fsync(fd)
            finally:
                os.close(fd)

    def event(self, kind, step, **fields):
        """Append an event row to timing.jsonl."""
        row = {"event": kind, "step": int(step), "time": round(time.time(), 3), **fields}
        self._append(TIMING, self._timing_fd, json.dumps(row) + "\n")

    def flush(self, fsync=False):
        """Rows are with the operating system as soon as they are written; fsync also survives a power cut.

        Raises:
          OSError: the file that is written to is not the one in the run folder any more.
        """
        path = self.run_dir / METRICS
        try:
            there = os.path.samestat(os.stat(path), os.fstat(self._metrics_fd))
        except FileNotFoundError:
            there = False
        if not there:
            raise OSError(errno.ESTALE, "it was removed or replaced while the run wrote to it", str(path))
        if fsync:
            os.fsync(self._metrics_fd)
            os.fsync(self._timing_fd)

    def close(self):
        for fd in (self._metrics_fd, self._timing_fd):
            os.close(fd)


def _require_rows(path, steps, resume_step, segments):
    present = np.zeros(resume_step + 2, bool)
    present[np.array(steps, int)] = True
    missing = []
    for (start, interval), (end, _) in zip(segments, segments[1:] + [(resume_step + 1, None)], strict=True):
        due = [
            step for step in range(max(start, 1), min(end, resume_step + 1)) if keep_row(step, log_interval=interval)
        ]
        missing += [step for step in due if not present[step]]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the rows up to step {resume_step}, the first at "
            f"step {missing[0]}: resume from a checkpoint before it, or start over in a new "
            "folder"
        )


# --------------------------------------------------------------------------------------------------- manifest


def write_atomically(path, data):
    """Write bytes so that a reader, or a restart after a power cut, sees the old file or the new one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # of a write that failed, Python does not tell it
        raise
    sync(path.parent)


def write_manifest(run_dir, manifest):
    """Write manifest.json: what the run is (config, versions, device, data), sorted, with SCHEMA_VERSION."""
    manifest = {**manifest, "schema_version": SCHEMA_VERSION}
    text = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False)
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(run_dir) / MANIFEST, (text + "\n").encode())


def read_manifest(run_dir):
    """The manifest of a run folder. UserError where it is missing, broken, of another schema version, or lacks what
    every reader takes for granted."""
    path = Path(run_dir) / MANIFEST
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist: {run_dir} is not a run folder; give the folder of a run")
    fix = "restore it from a copy, or start over in a new folder"
    manifest = read_json(path, fix)
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise UserError(
            f"{path} has schema_version {version!r}, this program reads "
            f"{', '.join(map(str, READABLE_VERSIONS))}: use the version of altgrad_jax that wrote it"
        )
    for key, kind, what in (("config", dict, "an object"), ("data", dict, "an object"), ("starts", list, "a list")):
        if not isinstance(manifest.get(key), kind):
            found = f"{key} {repr(manifest[key])[:80]}" if key in manifest else f"no {key}"
            raise UserError(f"{path} has {found} where {what} is expected: {fix}")
    for value, name, what in ((manifest["data"], "fingerprint", "the data"), (manifest, "run_id", "the run")):
        if not isinstance(value.get(name), str):
            raise UserError(f"{path} does not have the {name} of {what}: {fix}")
    return manifest


# ----------------------------------------------------------------------------------------------------- alerts


class ValRising:
    """The one condition decided on the host: validation loss rose `patience` evaluations in a row (0: never).

    Its state follows from the validation losses in the record, so a resumed run decides the same. It begins
    once and is re-armed by an evaluation that does not rise. A loss that is not finite is passed over: it has
    its own alerts.
    """

    def __init__(self, patience, val_losses=()):
        self.patience, self.last, self.rises = patience, math.inf, 0
        for _, val_loss in val_losses:
            self.begins(val_loss)

    def begins(self, val_loss):
        """Take one more validation loss; whether the condition begins with it."""
        if not math.isfinite(val_loss):
            return False
        self.rises = self.rises + 1 if val_loss > self.last else 0
        self.last = val_loss
        return self.patience > 0 and self.rises == self.patience


class AlertGate:
    """What is told to people: at most one message per kind every `interval` steps."""

    def __init__(self, interval):
        self.interval, self._last, self._held = interval, {}, {}

    def messages(self, step, alerts):
        """[(kind, text)] to deliver for the alerts of one row."""
        told = []
        for kind in dict.fromkeys(alert["kind"] for alert in alerts):
            same = [alert for alert in alerts if alert["kind"] == kind]
            if kind in self._last and step - self._last[kind] < self.interval:
                self._held[kind] = self._held.get(kind, 0) + len(same)
                continue
            where = f" in {same[0]['layer']}" if same[0]["layer"] else ""
            more = f" and {len(same) - 1} more" if len(same) > 1 else ""
            held = self._held.pop(kind, 0)
            before = f" ({held} more since step {self._last[kind]})" if held else ""
            told.append((kind, f"step {step}: {kind}{where}{more}, value {same[0]['value']:.6g}{before}"))
            self._last[kind] = step
        return told


# ----------------------------------------------------------------------------------------------------- writer


@dataclass(frozen=True)
class DispatchRecord:
    """What one dispatch of n steps leaves behind; arrays may be JAX arrays that are not computed yet.

    Attributes:
      first_step: row number of the first row (state.step before the dispatch + 1; 0 for the evaluation at
        step 0).
      names: names of the M columns. `alert/kind` and `alert/kind/layer` are 0 except where the alert begins;
        its value is that of column `alert_value/kind[/layer]` if there is one, else its own. Neither is a
        metric of the row. `sparse/NAME` is the metric NAME, left out of a row where it is NaN.
      values: float32 [>= n, M], or None for an evaluation alone.
      n_rows: how many leading rows of `values` are steps that were made (int or array); None: all. 0 writes
        nothing.
      evaluation: {name: scalar} for the last row, or for a row of its own where there are no values.
      diagnostics: dicts for diagnostics.jsonl, each with its `step`.
      dispatched_at: time.perf_counter() when the dispatch was handed to the device.
      seconds: what the steps took, where the caller has waited for them himself; else measured on the thread, from
        dispatched_at (or the end of the dispatch before, if later) until the values are there.
      evaluation_s: likewise for the evaluation.
    """

    first_step: int
    names: tuple[str, ...] = ()
    values: Any = None
    n_rows: Any = None
    evaluation: Mapping[str, Any] | None = None
    dispatched_at: float | None = None
    seconds: float | None = None
    evaluation_s: float | None = None
    diagnostics: Sequence[Mapping[str, Any]] = ()


# How long a full disk is waited for.
SPACE_PATIENCE_S = 600.0


class Writer:
    """A thread that turns dispatches into rows, in order; its bounded queue blocks rather than drops.

    An exception on the thread is raised in the caller's thread by the next submit, flush or close, and by
    every one after it; what was queued behind it is discarded, so that nothing waits for ever.

    A full disk is no such failure yet: it is told, and waited for, for up to SPACE_PATIENCE_S. The training waits with
    it once the queue is full.
    """

    def __init__(
        self,
        record,
        *,
        max_steps,
        tokens_per_step,
        log_interval=1,
        layer_interval=1,
        console=None,
        alert_interval=100,
        val_rising=None,
        rank_falling=None,
        flops_per_step=None,
        peak_flops=None,
        on_row=None,
        queue_size=8,
        clock=time.perf_counter,
        hurried=lambda: False,
    ):
        """Start the thread.

        Args:
          record: the open Record; the writer closes it.
          layer_interval: rows 1, 1 + layer_interval, ... and the last carry the statistics of layers, the others not.
          tokens_per_step: tokens of one update, for tokens/s. flops_per_step, peak_flops: for MFU; None: not
            given.
          console: object with update and alert (see console.py), or None.
          alert_interval: fewest steps between two console messages of one kind of alert.
          val_rising: the ValRising rule, or None. rank_falling: the RankFalling rule, or None.
          on_row: called on the thread for every step as on_row(step, {name: float of the evaluation},
            alerts).
          queue_size: dispatches that may wait; more make submit wait.
          hurried: called on the thread while it waits for a full disk; True ends the waiting.
        """
        record.wait_for_space, self._hurried, self._full_since = self._wait_for_space, hurried, None
        self._record, self._console, self._on_row = record, console, on_row
        self._val_rising, self._rank_falling = val_rising, rank_falling
        self._max_steps, self._log_interval, self._layer_interval = max_steps, log_interval, layer_interval
        self._tokens_per_step = tokens_per_step
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._gate = AlertGate(alert_interval)
        self._formatter = _Formatter(())
        self._clock, self._ready_at = clock, None
        self._queue = queue.Queue(queue_size)
        self._error = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="record-writer", daemon=True)
        self._thread.start()

    def submit(self, item):
        """Queue a DispatchRecord, or a callable to run on the thread when what is before it is written."""
        self._check()
        for array in (getattr(item, "values", None), *(getattr(item, "evaluation", None) or {}).values()):
            if hasattr(array, "copy_to_host_async"):  # a JAX array: the copy starts when it is computed
                array.copy_to_host_async()
        self._queue.put(item)

    def event(self, kind, step, **fields):
        """Queue an event row for timing.jsonl, from any thread.

        It is lost without a word once the thread has failed or the writer is closed: the failure itself is
        raised where the rows are submitted.
        """
        if not self._closed and self._error is None:
            self._queue.put(lambda: self._record.event(kind, step, **fields))

    def flush(self, fsync=True):
        """Wait until everything submitted is in the files (and, with fsync, on the disk)."""
        self._check()
        done = threading.Event()
        self._queue.put(lambda: self._record.flush(fsync))
        self._queue.put(done)
        done.wait()
        self._check()

    def close(self):
        """Write what is queued, stop the thread, close the record. Raises what the thread raised."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()
            self._record.close()
        self._check()

    def _check(self):
        if self._error is not None:
            raise self._error

    def _wait_for_space(self):
        now = time.monotonic()
        if self._full_since is None:
            self._full_since = now
            if self._console is not None:
                self._console.alert(
                    f"the disk of {self._record.run_dir} is full: the run waits up to "
                    f"{SPACE_PATIENCE_S / 60:g} minutes for space for its record, then it ends"
                )
        if self._hurried() or now - self._full_since > SPACE_PATIENCE_S:
            return False
        time.sleep(0.5)
        return True

    def _work(self):
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif self._error is None:
                try:
                    if isinstance(item, DispatchRecord):
                        self._write(item)
                    else:
                        item()
                    self._full_since = None
                except BaseException as error:  # handed to the caller's thread, which is waiting for it
                    self._error = error

    def _write(self, item):
        self._record.append_diagnostics(item.diagnostics)
        if item.values is None:
            started = self._clock() if item.dispatched_at is None else item.dispatched_at
            evaluation, event = self._evaluate(item, item.first_step, started)
            rows = [(item.first_step, np.zeros(0, np.float32))]
            self._write_rows(_Formatter(()), rows, evaluation, None, [event])
            return
        values_KM = np.asarray(item.values)  # waits for the device
        n_rows = len(values_KM) if item.n_rows is None else int(np.asarray(item.n_rows))
        ready = self._clock()
        starts = [t for t in (item.dispatched_at, self._ready_at) if t is not None]
        started, self._ready_at = max(starts, default=ready), ready
        if n_rows == 0:
            return
        fits = values_KM.shape[1:] == (len(item.names),) and len(values_KM) >= n_rows
        if values_KM.dtype != np.float32 or not fits:
            raise ValueError(
                f"packed metrics are {values_KM.dtype}{list(values_KM.shape)}, expected float32 "
                f"[>= {n_rows}, {len(item.names)}]"
            )
        if self._formatter.names != item.names:
            self._formatter = _Formatter(item.names)
        timing = self._timing((ready - started if item.seconds is None else item.seconds) / n_rows)
        steps = range(item.first_step, item.first_step + n_rows)
        evaluation, events = None, []
        if item.evaluation is not None:
            evaluation, event = self._evaluate(item, steps[-1], ready)
            events.append(event)
        self._write_rows(self._formatter, list(zip(steps, values_KM)), evaluation, timing, events)

    def _evaluate(self, item, step, started):
        """Wait for an evaluation. Returns ({name: float}, its event row)."""
        numbers = {name: float(np.asarray(value)) for name, value in item.evaluation.items()}
        self._ready_at = self._clock()
        seconds = self._ready_at - started if item.evaluation_s is None else item.evaluation_s
        kind = "eval" if "val_loss" in numbers else "diagnosis"
        return numbers, {"event": kind, "step": step, "time": round(time.time(), 3), "seconds": _round(seconds)}

    def _timing(self, step_time):
        timing = {"time": round(time.time(), 3), "step_time_s": _round(step_time)}
        if step_time > 0:
            timing["tokens_per_s"] = _round(self._tokens_per_step / step_time)
            if self._flops_per_step and self._peak_flops:
                timing["mfu"] = _round(self._flops_per_step / step_time / self._peak_flops)
        return timing

    def _write_rows(self, formatter, rows, evaluation, timing, events):
        loss_column = formatter.names.index("loss") if "loss" in formatter.names else None
        steps, lines, timing_rows, shown = [], [], [], []
        for i, (step, values_M) in enumerate(rows):
            own_evaluation = evaluation if i == len(rows) - 1 else None
            alerts = formatter.alerts_of(values_M)
            val_loss = (own_evaluation or {}).get("val_loss")
            if val_loss is not None and self._val_rising is not None and self._val_rising.begins(val_loss):
                alerts.append({"kind": "val_rising", "layer": None, "value": val_loss})
            ranks = stable_ranks(own_evaluation or {})
            if ranks and self._rank_falling is not None:
                alerts += [
                    {"kind": "rank_falling", "layer": layer, "value": share}
                    for layer, share in self._rank_falling.begins(ranks, step)
                ]
            if keep_row(
                step, log_interval=self._log_interval, max_steps=self._max_steps, notable=bool(alerts or own_evaluation)
            ):
                steps.append(step)
                # Rows 1, 1 + interval, ..., as those of a shadow of this interval; and the last.
                of_layers = (step - 1) % self._layer_interval == 0 or step == self._max_steps
                lines.append(formatter.line(step, values_M, own_evaluation, alerts, of_layers))
                if timing is not None:
                    timing_rows.append({"step": step, **timing})
            loss = None if loss_column is None else float(values_M[loss_column])
            shown.append((step, loss, val_loss, alerts, own_evaluation))
        self._record.append(steps, lines, timing_rows + events)
        # People are told only what is already recorded.
        for step, loss, val_loss, alerts, own_evaluation in shown:
            if self._console is not None:
                for _, text in self._gate.messages(step, alerts):
                    self._console.alert(text)
                self._console.update(step, loss, val_loss, (timing or {}).get("tokens_per_s"))
            if self._on_row is not None:
                self._on_row(step, own_evaluation or {}, alerts)


def _round(value):
    """Six significant digits: wall-clock values carry no more."""
    return float(f"{value:.6g}")


# -------------------------------------------------------------------------------------------------------- W&B


def new_run_id():
    """Eight characters out of a-z and 0-9; kept in the manifest so that a resume continues the W&B run."""
    return "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))


def has_wandb_credentials(environ=os.environ):
    """Whether W&B would find a login: an API key or identity token in the environment, or a netrc entry."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    home = Path(environ.get("HOME") or Path.home())
    for path in [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]:
        try:
            if netrc.netrc(path).hosts.get(host):
                return True
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
    return False


def resolve_wandb_mode(mode, environ=os.environ):
    """auto -> WANDB_MODE if set, else online with credentials, else offline. The others stay what they are.

    Raises:
      UserError: an unknown mode, or online without credentials.
    """
    allowed = ("online", "offline", "disabled")
    if mode == "auto" and environ.get("WANDB_MODE") in allowed:
        mode = environ["WANDB_MODE"]
    if mode == "auto":
        return "online" if has_wandb_credentials(environ) else "offline"
    if mode not in allowed:
        raise UserError(f"wandb_mode is {mode!r}; allowed are auto, online, offline and disabled")
    if mode == "online" and not has_wandb_credentials(environ):
        raise UserError(
            "wandb_mode is online but there is no W&B login on this machine: run `wandb login`, "
            "set WANDB_API_KEY, or set wandb_mode to auto or offline"
        )
    return mode


def open_wandb(
    run_dir,
    *,
    mode,
    run_id,
    project,
    name,
    entity=None,
    group=None,
    tags=(),
    config=None,
    resume_step=None,
    alert_interval=100,
    keys=(),
    say=print,
    event=None,
    module="wandb",
    init_timeout=90.0,
):
    """Start feeding W&B from the record in run_dir. Returns a WandbSink, or None for disabled.

    Args:
      mode: auto, online, offline or disabled (see resolve_wandb_mode).
      run_id: of the W&B run; the same one continues it.
      entity: W&B user or team; None: the account's own. group: of runs shown together, or None.
      config: the run's config, JSON-serializable.
      resume_step: the step the run resumes from, None for a fresh run. Online, sending starts after the last
        step that W&B already has (also when that is earlier: the gap is filled from the record); offline,
        where that is unknown, at resume_step + 1.
      keys: shell-style patterns of the names that are sent, of metrics and of timing; empty: all.
      say: called with one line of text now and then, from another thread. event: called as event(kind, step,
        **fields) where something went wrong, e.g. Writer.event.
      module: name of the module that plays wandb's part.
      init_timeout: seconds for wandb.init; after that the run is recorded in W&B's offline format.
    """
    resolved = resolve_wandb_mode(mode)
    if resolved == "disabled":
        return None
    if resolved == "offline":
        unasked = mode == "auto" and not has_wandb_credentials()
        why = "no login was found on this machine" if unasked else "as asked"
        say(f"W&B is offline ({why}); to send the run later: {_sync_command(run_dir)}")
    init = {
        "project": project,
        "entity": entity,
        "group": group,
        "name": name,
        "tags": list(tags),
        "config": config,
        "id": run_id,
    }
    spec = {
        "run_dir": str(run_dir),
        "init": init,
        "module": module,
        "init_timeout": init_timeout,
        "resume_step": resume_step,
        "alert_interval": alert_interval,
        "keys": list(keys),
        "pid": os.getpid(),
        "program": str(Path(sys.argv[0]).absolute()) if sys.argv and sys.argv[0] else "python",
    }
    return WandbSink(spec, resolved, say, event or (lambda kind, step, **fields: None))


def _sync_command(run_dir):
    return f"wandb sync {shlex.quote(str(Path(run_dir) / 'wandb'))}/offline-run-*"


class WandbSink:
    """The training's end of the process that feeds W&B. Nothing but close ever waits for that process."""

    def __init__(self, spec, mode, say, event):
        self._spec, self._say, self._event = spec, say, event
        self._run_dir = Path(spec["run_dir"])
        self._lock = threading.Lock()
        self._warned = False
        self._ready = self._closing = self._killed = False
        self.last_sent = -1 if spec["resume_step"] is None else spec["resume_step"]
        self._start(mode)
        self._reader = threading.Thread(target=self._listen, name="wandb-listener", daemon=True)
        self._reader.start()

    def _start(self, mode):
        self._mode = mode
        package = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join([package] + [p for p in [os.environ.get("PYTHONPATH")] if p])
        # wandb's own timeout comes first; this one is for an init that ignores it. It starts when the import
        # is done.
        self._watchdog = threading.Timer(1.1 * self._spec["init_timeout"], self._kill_if_not_ready)
        self._watchdog.daemon = True
        # -P: no module of the working directory may stand in for wandb. A session of its own: Ctrl-C at the
        # terminal is the training's business.
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "altgrad_jax.run.logger"],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._child.stdin.write((json.dumps({**self._spec, "mode": mode}) + "\n").encode())
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the listener finds out, and says so

    def _kill_if_not_ready(self):
        with self._lock:
            if not self._ready:
                self._kill()

    def _kill(self):
        self._killed = True
        # The group, since wandb starts a service process of its own.
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _warn(self, text, **fields):
        """One warning for people, every one as an event."""
        if not self._warned:
            self._warned = True
            self._say(f"warning: W&B: {text}; the run goes on, the local record is complete")
        self._event("wandb_failed", max(self.last_sent, 0), reason=text, **fields)

    def _listen(self):
        while True:
            finished = self._listen_to_child()
            self._watchdog.cancel()
            self._child.wait()
            self._child.stdout.close()
            with self._lock:
                again = not finished and not self._ready and not self._closing and self._mode == "online"
                if again:
                    self._child.stdin.close()
                    self._killed = False
                    self._start("offline")
            if again:
                self._warn(
                    f"no answer within {self._spec['init_timeout']:g} s, so this run is kept offline; "
                    f"to send it later: {_sync_command(self._run_dir)}"
                )
                continue
            if not finished and not self._killed:
                self._warn(f"its process ended with code {self._child.returncode}")
            return

    def _listen_to_child(self):
        """Handle the child's messages until it closes its end. Whether it said that it had finished."""
        finished = False
        for line in self._child.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            match message:
                case {"sent": last}:
                    self.last_sent = last
                case {"starting": _}:
                    self._watchdog.start()
                case {"ready": url}:
                    self._ready = True
                    self._watchdog.cancel()
                    if url:
                        self._say(f"W&B: {url}")
                case {"failed": reason}:
                    self._warn(reason)
                case {"offline": reason}:
                    self._warn(
                        f"{reason}, so this run is kept offline; to send it later: {_sync_command(self._run_dir)}"
                    )
                case {"finished": _}:
                    finished = True
        return finished

    def close(self, drain_timeout=300.0, summary=None):
        """Send what is left, and end the W&B run; after Writer.flush. Returns the number of rows not sent.

        Waits at most drain_timeout seconds, with a line every few seconds; then the process is killed. A second call
        does nothing.

        Args:
          summary: {name: value} for the run's summary in W&B.
        """
        if self._closing:
            return 0
        self._closing = True
        deadline = time.monotonic() + drain_timeout
        try:
            order = {"finish": summary or {}, "within": drain_timeout}
            self._child.stdin.write((json.dumps(order) + "\n").encode())
            self._child.stdin.close()
        except (BrokenPipeError, ValueError):
            pass
        pause = 3.0  # most runs drain at once and need no line
        while self._reader.is_alive() and (left := deadline - time.monotonic()) > 0:
            self._reader.join(min(pause, left))
            if self._reader.is_alive() and time.monotonic() < deadline:
                self._say(
                    f"W&B: {self._unsent()} rows still to be sent; giving up in {deadline - time.monotonic():.0f} s"
                )
                pause = 10.0
        if self._reader.is_alive():
            self._kill()
            self._reader.join(10)
        unsent = self._unsent()
        if unsent:
            self._say(f"W&B: {unsent} rows were not sent; all are in {self._run_dir / METRICS}")
            self._event("wandb_unsent", max(self.last_sent, 0), rows=unsent)
        return unsent

    def _unsent(self):
        count = 0
        with open(self._run_dir / METRICS, "rb") as file:
            for line in file:
                match = _STEP.match(line)
                count += bool(match) and int(match[1]) > self.last_sent
        return count


# What follows runs in the process that feeds W&B.


class _Tail:
    """Whole lines of a growing file."""

    def __init__(self, path):
        self._file = open(path, "rb")
        self._rest = b""

    def lines(self, size=4 << 20):
        """Lines that have become whole since the last call, about `size` bytes of them at most."""
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            raise EOFError("the record was cut back: another process has resumed the run")
        *lines, self._rest = (self._rest + self._file.read(size)).split(b"\n")
        return lines


class _Orders(threading.Thread):
    """Listens to the training: {"finish": summary}, or the end of the pipe when the training has died."""

    def __init__(self, stream):
        super().__init__(daemon=True)
        self._stream, self.finish, self.summary = stream, threading.Event(), {}

    def run(self):
        line, within = self._stream.readline(), 60.0
        try:
            order = json.loads(line)
            self.summary, within = order["finish"], order["within"]
        except ValueError:
            pass  # the training was killed: send what is recorded, then end
        self.finish.set()
        time.sleep(within)
        os._exit(1)  # an orphan must not outlive its welcome


def _init_wandb(wandb, spec, mode):
    """Start the W&B run quietly: no console capture, no output, statistics of the training's process."""
    settings = wandb.Settings(
        console="off",
        silent=True,
        init_timeout=spec["init_timeout"],
        program=spec["program"],
        x_stats_pid=spec["pid"],
        disable_job_creation=True,
    )
    return wandb.init(**spec["init"], dir=spec["run_dir"], mode=mode, resume="allow", settings=settings)


_PAUSES_S = (0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60)


def _insist(action, tell, pauses=_PAUSES_S):
    """Do it, again and again with growing pauses (five minutes in all). Raises the last failure.

    Args:
      tell: called with the first failure.
    """
    for attempt, pause in enumerate(pauses):
        try:
            return action()
        except Exception as error:
            if attempt == 0:
                tell(error)
            time.sleep(pause)
    return action()


def matching(names, patterns):
    """The names that at least one of the shell-style patterns matches."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _feed(spec, orders, tell):
    """Send the record's rows to W&B until told to finish and nothing is left."""
    is_sent = functools.cache(lambda name: not spec["keys"] or bool(matching([name], spec["keys"])))
    wandb = importlib.import_module(spec["module"])
    mode = spec["mode"]
    tell(starting=True)
    try:
        run = _init_wandb(wandb, spec, mode)
    except Exception as error:
        if mode == "offline":
            raise
        tell(offline=f"the run could not be started ({_brief(error)})")
        mode = "offline"
        run = _init_wandb(wandb, spec, mode)
    resume_step = -1 if spec["resume_step"] is None else spec["resume_step"]
    last = resume_step
    if mode == "online":
        # What W&B has decides: rows it lacks are sent again, rows it has are not (it would drop them).
        last = int(getattr(run, "starting_step", 0) or 0) - 1
    tell(sent=last)
    tell(ready=getattr(run, "url", None) if mode == "online" else None)
    metrics, timing = _Tail(Path(spec["run_dir"]) / METRICS), _Tail(Path(spec["run_dir"]) / TIMING)
    gate, times, told = AlertGate(spec["alert_interval"]), {}, time.monotonic()
    while True:
        finishing = orders.finish.is_set()
        lines = metrics.lines()
        # After the metrics, before which it was written: every row finds its timing.
        while chunk := timing.lines():
            times.update((row["step"], row) for row in map(_timing_row, chunk) if row and row["step"] > last)
        for line in lines:
            match = _STEP.match(line)
            if match and int(match[1]) > last:
                last = int(match[1])
                row = parse_row(line)
                alerts = row.pop("alerts", ())
                del row["step"]
                seconds = {key: value for key, value in times.pop(last, {}).items() if key != "step"}
                if sent := {key: value for key, value in (row | seconds).items() if is_sent(key)}:
                    _insist(
                        lambda sent=sent: run.log(sent, step=last),
                        lambda error: tell(failed=f"sending failed ({_brief(error)})"),
                    )
                for kind, text in gate.messages(last, alerts):
                    try:
                        run.alert(title=kind, text=text, level="WARN", wait_duration=0)
                    except Exception as error:  # the row is sent; console and record have the alert too
                        tell(failed=f"an alert could not be sent ({_brief(error)})")
                if time.monotonic() - told > 0.5:
                    told = time.monotonic()
                    tell(sent=last)
        if lines:
            tell(sent=last)
        elif finishing:
            break
        else:
            orders.finish.wait(0.25)
    for key, value in orders.summary.items():
        run.summary[key] = value
    run.finish()


def _timing_row(line):
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return None if "event" in row else row


def _brief(error):
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _feed_main():
    # Messages have the real standard output to themselves; what wandb prints goes nowhere.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(**message):
        with lock:
            try:
                print(json.dumps(message), file=pipe, flush=True)
            except BrokenPipeError:
                pass  # the training was killed; go on to the end of its record

    os.nice(10)  # a run on the CPU needs the cores more
    spec = json.loads(sys.stdin.buffer.readline())
    orders = _Orders(sys.stdin.buffer)
    orders.start()
    try:
        _feed(spec, orders, tell)
    except Exception as error:
        tell(failed=f"gave up ({_brief(error)})")
        tell(finished=False)
        os._exit(1)
    tell(finished=True)
    os._exit(0)  # the run is finished; exit hooks could only wait


if __name__ == "__main__":
    _feed_main()
