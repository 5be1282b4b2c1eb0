"""A run's record on disk: how it is written, and the one reader of it. No jax.

Three append-only files in the run folder decide what is true about a run:

metrics.jsonl      Deterministic values only, one row per step. Two runs of one config have equal bytes, and a run that
                   was killed and resumed has the bytes of one that was not. Floats are the shortest decimal that gives
                   the same float32 back (0.1, not 0.10000000149); NaN and infinities, which JSON lacks, are strings.
diagnostics.jsonl  Deterministic too: the histograms of the quantized operands, a line per operand at every diagnosis.
timing.jsonl       Wall-clock values of the same rows, and events ("start", "resume", "eval", ...). A resumed run
                   appends: the timing of a replayed step stands in it twice, and the last one counts.

manifest.json says what the run is, and with evaluate_all window_losses.json how it ended, window by window. A last line
without its end is what a killed run leaves, and every reader passes it over. Damage before the end of metrics.jsonl or
diagnostics.jsonl is an error; damaged lines of timing.jsonl are skipped, because no decision rests on them.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.files import open_file, read_json, require_file, write_atomically
from altgrad_jax.numerics.formats import known_again
from altgrad_jax.numerics.whatif import N_BINS, dense
from altgrad_jax.run.names import Names

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
DIAGNOSTICS = "diagnostics.jsonl"
MANIFEST = "manifest.json"
WINDOW_LOSSES = "window_losses.json"
# 2: settings of number formats in the config (config.ADDED_IN_2 holds what version 1 lacks), more keys in the rows, and
# diagnostics.jsonl. 3: the setting checkpoint_seconds (config.ADDED_IN_3), and in the rows counts of moments, amaxes,
# scales and residuals that are not finite. 4: the setting loggers (config.ADDED_IN_4). 5: recipes, kept moments and
# compiler options (config.ADDED_IN_5), and another order of the keys of a row. 6: other names of metrics and settings
# (run/names.py, config.RENAMED_IN_6, config.ADDED_IN_6), the version in each of `starts`. 7: certificates in
# the rows of diagnoses (docs/bias.md, config.ADDED_IN_7), facts of formats of one's own, jax's environment, and records
# of other loops (run/recorder.py). 8: rounded norm gains, Smooth-SwiGLU and resets of weights (config.ADDED_IN_8).
# Records of earlier
# versions are read under the names of today.
SCHEMA_VERSION = 8
READABLE_VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8)
TIMING_KEYS = ("time", "step_time_s", "tokens_per_s", "mfu")  # of a row of timing.jsonl, beside its step
HISTOGRAM_BINS = {"magnitudes": N_BINS, "codes": 256}

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_STEP = re.compile(rb'\{"step": (\d{1,18})[,}]')
_VALUE = re.compile(rb'"?(-?(?:[0-9][0-9.e+-]*|NaN|Infinity))')
_FROM_A_COPY = "restore it from a copy, or start over in a new folder"

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------- format


def number(value: Any) -> str:
    """Shortest decimal that reads back as the same float32; NaN and infinities as JSON strings."""
    value = np.float32(value)
    if np.isfinite(value):
        return str(value)
    return '"NaN"' if np.isnan(value) else '"Infinity"' if value > 0 else '"-Infinity"'


def fields(row: Mapping[str, Any]) -> Iterator[str]:
    """The members of a row as JSON, in their order. Every number but the step is taken as float32."""
    for key, value in row.items():
        if key == "step":
            yield f'"step": {int(value)}'
        elif key == "alerts":
            alerts = (
                f'{{"kind": {json.dumps(alert["kind"])}, "layer": {json.dumps(alert["layer"])}, '
                f'"value": {number(alert["value"])}}}'
                for alert in value
            )
            yield f'"alerts": [{", ".join(alerts)}]'
        else:
            yield f"{json.dumps(key)}: {number(value)}"


def format_row(row: Mapping[str, Any]) -> str:
    """One line of metrics.jsonl, without the newline, from {"step": int, name: number, ..., "alerts": [...]}.

    The order of the keys is kept, so equal rows give equal bytes.
    """
    if next(iter(row), None) != "step":
        raise ValueError(f"a row begins with its step, not with {next(iter(row), None)!r}")
    return "{" + ", ".join(fields(row)) + "}"


def parse_row(line: bytes | str) -> Row:
    """The row of a line of metrics.jsonl; "NaN" and the infinities become floats again. ValueError if it is none."""
    try:
        row = json.loads(line)
        for holder in (row, *row.get("alerts", ())):
            for key, value in holder.items():
                if isinstance(value, str) and (holder is row or key == "value"):
                    holder[key] = _NONFINITE[value]
        if type(row["step"]) is not int:
            raise ValueError("the step is not a whole number")
        if not all(isinstance(value, int | float) for key, value in row.items() if key != "alerts"):
            raise ValueError("a value is not a number")
        return row
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a row of the record ({error!r})") from None


def keep_row(step: int, *, log_interval: int, max_steps: int | None = None, notable: bool = False) -> bool:
    """Whether the row of this step is recorded: every log_interval steps, the run's last step, and every row that
    carries an alert or an evaluation (`notable`).

    The last step is max_steps, not where a run happens to be interrupted: a resumed record must equal an uninterrupted
    one.
    """
    return notable or step % log_interval == 0 or step == max_steps


# ------------------------------------------------------------------------------------------------------- reading


def whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, which may be growing, from where it stands; it is left before a line without its end."""
    for line in file:
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield line


def _step_of(line: bytes) -> int:
    match = _STEP.match(line)
    if not match or not line.endswith(b"}\n") or b"\0" in line:
        raise ValueError("not a row of the record")
    return int(match[1])


def _cut(line: bytes, keys: Collection[str]) -> Row:
    """The values of these names, cut out of the line without parsing the rest: ten times as fast."""
    row = {}
    for key in keys:
        name = json.dumps(key).encode() + b": "
        at = line.find(name)
        if at >= 0:
            match = _VALUE.match(line, at + len(name))
            if not match:
                raise ValueError(f"{key} is not a number")
            row[key] = float(match[1])
    return row


def _names_of(run_dir: str | Path) -> Names:
    """How the rows of a record are named; as today where no manifest can be read."""
    try:
        return Names.of(read_manifest(run_dir))
    except (UserError, KeyError, TypeError, AttributeError):
        return Names()


def _damaged(path: Path, line: int) -> UserError:
    return UserError(
        f"{path} is damaged in line {line}; restore it from a copy, or resume the run from a checkpoint before that row"
    )


def read_rows(run_dir: str | Path, keys: Collection[str] | None = None) -> Iterator[Row]:
    """The rows of metrics.jsonl in order: {"step": int, name: float, ..., "alerts": [...]}, under the names of today.

    Args:
      keys: the only names wanted beside the step, which is much faster than all (None). Alerts are not among them.

    Raises:
      UserError: the file is missing, or damaged before its end.
    """
    path = Path(run_dir) / METRICS
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist: {run_dir} is not a run folder; give the folder of a run")
    last, names = -1, _names_of(run_dir)
    old_keys = keys and [names.before(key) for key in keys]
    with open_file(path, "restore it from a copy") as file:
        for i, line in enumerate(whole_lines(file), 1):
            try:
                step = _step_of(line)
                wanted = old_keys if step <= names.last_old else keys
                row = parse_row(line) if keys is None else {"step": step} | _cut(line, wanted or ())
                if step <= last:
                    raise ValueError("steps do not increase")
            except ValueError:
                raise _damaged(path, i) from None
            last = step
            yield names.upgraded(row)


def read_history(run_dir: str | Path, keys: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Columns of the record: {"step": int64 [rows], name: float32 [rows], ...}, NaN where a row has no such.

    Args:
      keys: the names wanted; None: every name of any row (alerts are not a column). A name no row has gives all NaN.
    """
    steps: list[int] = []
    columns: dict[str, list[float]] = {key: [] for key in keys or ()}
    for row in read_rows(run_dir, keys):
        for key, value in row.items():
            if key not in ("step", "alerts"):
                column = columns.setdefault(key, [])
                column.extend([math.nan] * (len(steps) - len(column)))
                column.append(value)
        steps.append(row["step"])
    history: dict[str, np.ndarray] = {"step": np.array(steps, np.int64)}
    for key, column in columns.items():
        history[key] = np.array(column + [math.nan] * (len(steps) - len(column)), np.float32)
    return history


def _parse_timing(line: bytes) -> Row | None:
    """A row or an event of timing.jsonl; None where it is damaged."""
    try:
        row = json.loads(line)
        return row if type(row["step"]) is int and isinstance(row["time"], int | float) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_timing(run_dir: str | Path) -> tuple[list[Row], list[Row]]:
    """(rows, events) of timing.jsonl, empty if it is missing. Damaged lines are skipped."""
    path = Path(run_dir) / TIMING
    if not path.exists():
        return [], []
    with open(path, "rb") as file:
        found = [row for row in map(_parse_timing, whole_lines(file)) if row is not None]
    return [row for row in found if "event" not in row], [row for row in found if "event" in row]


def furthest_step(run_dir: str | Path) -> int:
    """The last step that any start of the run has made and timed, by timing.jsonl; 0 where there is none."""
    return max((row["step"] for row in read_timing(run_dir)[0]), default=0)


def read_diagnostics(run_dir: str | Path) -> list[Row]:
    """The lines of diagnostics.jsonl, their histograms as int64 arrays (`magnitudes`, and `codes` of an 8-bit format).

    Raises:
      UserError: there is no such file, or it is damaged before its end.
    """
    path = Path(run_dir) / DIAGNOSTICS
    if not os.path.lexists(path):
        raise UserError(
            f"{path} does not exist: only a run in number formats keeps histograms (formats=BF16 trains as "
            "the baseline does, and keeps them); give such a run's folder"
        )
    lines = []
    with open_file(path, "restore it from a copy") as file:
        for i, text in enumerate(whole_lines(file), 1):
            try:
                line = json.loads(text)
                amax, histograms = line["amax"], {key: line[key] for key in HISTOGRAM_BINS if key in line}
                if (
                    type(line["step"]) is not int
                    or not (isinstance(line["layer"], str) and isinstance(line["format"], str))
                    or line["operand"] not in ("W", "A", "G")
                    or isinstance(amax, float)
                    and amax < 0
                    or "magnitudes" not in line
                    or any(histograms[key]["bins"] != HISTOGRAM_BINS[key] for key in histograms)
                    or any(first < 0 for stored in histograms.values() for first in stored["first"])
                ):
                    raise ValueError
                lines.append(line | {key: dense(stored) for key, stored in histograms.items()})
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
                raise _damaged(path, i) from None
    return lines


class Tail:
    """Follows a record as it grows."""

    def __init__(self, run_dir: str | Path, after: int):
        """Begins with the first row behind step `after`."""
        self._metrics, self._timing = (open(Path(run_dir) / name, "rb") for name in (METRICS, TIMING))
        self._after, self._times, self._names = after, {}, _names_of(run_dir)

    def rows(self, at_most: int = 100) -> Iterator[tuple[Row, Row]]:
        """(row, its timing without the step) for the rows that have come since, as many of them as `at_most`."""
        lines = list(itertools.islice(whole_lines(self._metrics), at_most))
        # The timing of a row is written before it, so that a row that is there finds its timing.
        for timing in map(_parse_timing, whole_lines(self._timing)):
            if timing and "event" not in timing and timing["step"] > self._after:
                self._times[timing.pop("step")] = timing
        for line in lines:
            if _step_of(line) > self._after:
                row = self._names.upgraded(parse_row(line))
                self._after = row["step"]
                yield row, self._times.pop(self._after, {})

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
        self._timing.close()


def count_rows(run_dir: str | Path, after: int) -> int:
    """How many rows of metrics.jsonl lie behind step `after`; 0 where the file cannot be read."""
    with contextlib.suppress(OSError), open(Path(run_dir) / METRICS, "rb") as file:
        return sum(int(match[1]) > after for match in map(_STEP.match, whole_lines(file)) if match)
    return 0


# ------------------------------------------------------------------------------------------------------- writing


class Record:
    """The files of one run folder, open for appending. Not locked: one thread writes.

    Where writing fails, the OSError names the file, and what was written of the line is taken back.

    Attributes:
      last_step: of the last row.
      evaluations: [(step, {"val_loss" or "stable_rank/layer": value})] of the rows that were kept on resume.
    """

    def __init__(self, run_dir: Path, last_step: int, evaluations: list[tuple[int, Row]]):
        self.run_dir, self.last_step, self.evaluations = run_dir, last_step, evaluations
        flags = os.O_WRONLY | os.O_APPEND
        self._metrics_fd, self._timing_fd = os.open(run_dir / METRICS, flags), os.open(run_dir / TIMING, flags)

    @classmethod
    def open(cls, run_dir: str | Path, resume_step: int | None = None, *, log_interval: int = 1) -> "Record":
        """Creates the record of a fresh run (resume_step None), or cuts an existing one back to resume_step.

        The cut truncates in place, at the end of a row: one system call, so a kill leaves the old length or the new
        one, and it needs no second copy of a record that may be gigabytes. resume_step -1 keeps no row: an earlier
        attempt died before its first checkpoint. timing.jsonl keeps its history and gets an event "start" or "resume"
        that says from which step on which log_interval holds.

        Raises:
          UserError: a fresh run finds a record; a resumed one lacks rows up to resume_step.
        """
        run_dir = Path(run_dir)
        files = [run_dir / name for name in (METRICS, TIMING, DIAGNOSTICS)]
        for path in filter(os.path.lexists, files):
            require_file(path, _FROM_A_COPY)
            if resume_step is None and path.stat().st_size:
                raise UserError(
                    f"{path} already holds a run: continue it with --resume=auto, or choose another folder with "
                    "--workdir"
                )
        if resume_step is None:
            run_dir.mkdir(parents=True, exist_ok=True)
        elif resume_step >= 0 and not files[0].exists():
            raise UserError(
                f"{files[0]} is missing, so the run cannot be continued at step {resume_step} with a whole record: "
                "restore the file, or start over in a new folder"
            )
        for path in files[:2]:
            path.touch()
        evaluations = [] if resume_step is None else _cut_back(run_dir, resume_step, log_interval)
        last_step = -1 if resume_step is None else resume_step
        record = cls(run_dir, last_step, evaluations)
        record.event("start" if last_step < 0 else "resume", max(last_step, 0), log_interval=log_interval)
        record.flush(fsync=True)
        return record

    def write(self, rows: Sequence[Row], timing_rows: Sequence[Row] = ()) -> None:
        """Appends rows (see format_row). Their steps must increase."""
        self.append([row["step"] for row in rows], [format_row(row) for row in rows], timing_rows)

    def append(self, steps: Sequence[int], lines: Sequence[str], timing_rows: Sequence[Row] = ()) -> None:
        """Appends formatted rows. Their timing is written first: a reader of a row finds its timing."""
        for step in steps:
            if step <= self.last_step:
                raise ValueError(f"row {step} follows row {self.last_step}: steps must increase")
            self.last_step = step
        self._append(TIMING, self._timing_fd, map(json.dumps, timing_rows))
        self._append(METRICS, self._metrics_fd, lines)

    def append_diagnostics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines to diagnostics.jsonl, which a run without any never gets."""
        if lines:
            fd = os.open(self.run_dir / DIAGNOSTICS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                self._append(DIAGNOSTICS, fd, map(json.dumps, lines))
                os.fsync(fd)
            finally:
                os.close(fd)

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Appends an event to timing.jsonl."""
        row = {"event": kind, "step": int(step), "time": round(time.time(), 3), **values}
        self._append(TIMING, self._timing_fd, [json.dumps(row)])

    def _append(self, name, fd, lines):
        data = memoryview("".join(line + "\n" for line in lines).encode())
        size = os.fstat(fd).st_size
        try:
            while data:
                data = data[os.write(fd, data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            raise OSError(error.errno, error.strerror, str(self.run_dir / name)) from None

    def flush(self, fsync: bool = False) -> None:
        """Rows are with the operating system as soon as they are written; with fsync they survive a power cut too.

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

    def close(self) -> None:
        """Closes the files."""
        os.close(self._metrics_fd)
        os.close(self._timing_fd)


def _cut_back(run_dir, resume_step, log_interval):
    """Keeps the rows and diagnoses up to resume_step; returns the evaluations among them.

    A damaged line is an error only if rows up to resume_step lie behind it: a torn tail is what a killed run leaves.
    Until the folder is known to hold all of them, nothing in it is changed.
    """
    path = run_dir / METRICS
    keep, steps, evaluations = 0, [], []
    with open(path, "rb") as file:
        for line in whole_lines(file):
            try:
                step, evaluation = _step_of(line), _evaluation_of(line)
            except ValueError:
                break
            if step > resume_step:
                break
            if steps and step <= steps[-1]:
                raise UserError(
                    f"{path} is damaged: line {len(steps) + 1} holds step {step} after step {steps[-1]}; {_FROM_A_COPY}"
                )
            evaluations += [(step, evaluation)] if evaluation else []
            steps.append(step)
            keep += len(line)
    _require_rows(path, steps, resume_step, _log_intervals(run_dir, log_interval))
    with open(run_dir / TIMING, "rb") as file:
        whole = sum(map(len, whole_lines(file)))
    os.truncate(run_dir / TIMING, whole)
    os.truncate(path, keep)
    path = run_dir / DIAGNOSTICS
    if path.exists():
        with open(path, "rb") as file:
            matches = ((line, _STEP.match(line)) for line in whole_lines(file))
            kept = itertools.takewhile(lambda found: found[1] and int(found[1][1]) <= resume_step, matches)
            keep = sum(len(line) for line, _ in kept)
        os.truncate(path, keep)
    return evaluations


def _evaluation_of(line):
    """What the rules for alerts look at; nothing is parsed where the row has none of it."""
    if not any(name in line for name in (b'"val_loss"', b'"stable_rank/', b'"grad_signal_to_error"')):
        return {}
    row = parse_row(line)
    alone = "val_loss", "grad_signal_to_error"
    return {name: value for name, value in row.items() if name in alone or name.startswith("stable_rank/")}


def _log_intervals(run_dir, default):
    """[(first step, log_interval)] by which the record was written, from its start and resume events."""
    segments = []
    for event in read_timing(run_dir)[1]:
        if type(interval := event.get("log_interval")) is int:
            start = event["step"] + 1
            segments = [segment for segment in segments if segment[0] < start] + [(start, interval)]
    return segments or [(0, default)]


def _require_rows(path, steps, resume_step, segments):
    present = np.zeros(resume_step + 2, bool)
    present[np.array(steps, int)] = True
    missing = []
    for (start, interval), (end, _) in zip(segments, segments[1:] + [(resume_step + 1, None)], strict=True):
        for step in range(max(start, 1), min(end, resume_step + 1)):
            if keep_row(step, log_interval=interval) and not present[step]:
                missing.append(step)
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the rows up to step {resume_step}, the first at step {missing[0]}: "
            "resume from a checkpoint before it, or start over in a new folder"
        )


# -------------------------------------------------------------------------------------------- losses by window


def write_window_losses(run_dir: str | Path, step: int, losses_E: np.ndarray) -> None:
    """Writes window_losses.json: the loss of every window of val.bin in the order of the file, after `step` updates."""
    text = f'{{"step": {step}, "losses": [{", ".join(map(number, losses_E))}]}}\n'
    write_atomically(Path(run_dir) / WINDOW_LOSSES, text.encode())


def read_window_losses(run_dir: str | Path) -> tuple[int, np.ndarray] | None:
    """(step, float32 [E]) of window_losses.json; None where a run has none.

    Raises:
      UserError: it cannot be read.
    """
    path = Path(run_dir) / WINDOW_LOSSES
    if not os.path.lexists(path):
        return None
    again = "delete it and resume the run, which writes it anew"
    found = read_json(path, again)
    try:
        step, losses = found["step"], [_NONFINITE[x] if isinstance(x, str) else float(x) for x in found["losses"]]
        if type(step) is not int or not losses:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} does not hold a step and a list of losses: {again}") from None
    return step, np.array(losses, np.float32)


# ------------------------------------------------------------------------------------------------------- manifest


def new_run_id() -> str:
    """Eight digits; kept in the manifest so that a resume continues the W&B run."""
    return secrets.token_hex(4)


def write_manifest(run_dir: str | Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json: what the run is (config, versions, device, data), sorted, with SCHEMA_VERSION."""
    text = json.dumps({**manifest, "schema_version": SCHEMA_VERSION}, indent=2, sort_keys=True, allow_nan=False)
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(run_dir) / MANIFEST, (text + "\n").encode())


def read_manifest(run_dir: str | Path) -> dict[str, Any]:
    """The manifest of a run folder. A user's own number formats that it holds are registered.

    Raises:
      UserError: it is missing, broken, of another schema version, or lacks what every reader takes for granted.
    """
    path = Path(run_dir) / MANIFEST
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist: {run_dir} is not a run folder; give the folder of a run")
    manifest = read_json(path, _FROM_A_COPY)
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise UserError(
            f"{path} has schema_version {version!r}, this program reads "
            f"{', '.join(map(str, READABLE_VERSIONS))}: use the version of altgrad_jax that wrote it"
        )
    for key, kind, what in (("config", dict, "an object"), ("data", dict, "an object"), ("starts", list, "a list")):
        if not isinstance(manifest.get(key), kind):
            found = f"{key} {repr(manifest[key])[:80]}" if key in manifest else f"no {key}"
            raise UserError(f"{path} has {found} where {what} is expected: {_FROM_A_COPY}")
    for value, name, what in ((manifest["data"], "fingerprint", "the data"), (manifest, "run_id", "the run")):
        if not isinstance(value.get(name), str):
            raise UserError(f"{path} does not have the {name} of {what}: {_FROM_A_COPY}")
    if isinstance(manifest.get("formats"), dict):
        known_again(manifest["formats"].get("registered"))
    return manifest
