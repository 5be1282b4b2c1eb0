"""Turns what a dispatch leaves behind into rows of the record, beside the training. No jax.

The rows of a dispatch are formatted and written by one thread while the next dispatch runs. At most one dispatch waits:
`submit` first takes the result of the one before, so a record that cannot keep up slows the run rather than losing
rows, and what went wrong on the thread is raised in the loop's thread at its next call.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from altgrad_jax.run.alerts import Alert, AlertGate, Rule
from altgrad_jax.run.record import Record, fields, keep_row, number

ALERT = "alert/"
ALERT_VALUE = "alert_value/"
SPARSE = "sparse/"


class Console(Protocol):
    """What shows the progress of a run; see console.py."""

    def update(self, step: int, loss: float | None, val_loss: float | None, tokens_per_s: float | None) -> None: ...

    def alert(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class DispatchRecord:
    """What one dispatch of n steps leaves behind.

    Attributes:
      first_step: step of the first row (state.step before the dispatch + 1; 0 for the evaluation at step 0).
      names: names of the M columns. `alert/kind` and `alert/kind/layer` are 0 except where the alert begins; its value
        is that of column `alert_value/kind[/layer]` if there is one, else its own. Neither is a metric of the row.
        `sparse/NAME` is the metric NAME, left out of a row where it is NaN.
      values: float32 [n, M], or None for an evaluation alone.
      seconds: what the n steps took.
      evaluation: {name: scalar} for the last row, or for a row of its own where there are no values.
      evaluation_s: seconds that the evaluation took.
      diagnostics: dicts for diagnostics.jsonl, each with its `step`.
    """

    first_step: int
    names: tuple[str, ...] = ()
    values: Any = None
    seconds: float = 0.0
    evaluation: Mapping[str, Any] | None = None
    evaluation_s: float = 0.0
    diagnostics: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the rows of a run depend on beside its values.

    Attributes:
      max_steps: of the run; the row of the last step is always recorded.
      tokens_per_step: tokens of one update; None: tokens per second are not recorded.
      log_interval: every how many steps a row is recorded.
      layer_interval: rows 1, 1 + layer_interval, ... and the last carry the statistics of layers, the others not.
      alert_interval: fewest steps between two console messages of one kind of alert.
      flops_per_step, peak_flops: for the MFU; None: the MFU is not recorded.
    """

    max_steps: int
    tokens_per_step: int | None
    log_interval: int = 1
    layer_interval: int = 1
    alert_interval: int = 100
    flops_per_step: float | None = None
    peak_flops: float | None = None


class Formatter:
    """Lines of rows with these names. Columns are split once; a number costs 0.5 us (measured)."""

    def __init__(self, names: tuple[str, ...]):
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
        self.templates: dict[bytes, str] = {}  # which keys a row has -> its template; few such sets occur

    def alerts_of(self, values_M: np.ndarray) -> list[Alert]:
        """The alerts that begin in one row of packed values."""
        begins = values_M[self.alert_columns] != 0
        if not begins.any():
            return []
        return [
            {"kind": kind, "layer": layer, "value": float(values_M[value])}
            for (_, kind, layer, value), now in zip(self.alerts, begins, strict=True)
            if now
        ]

    def line(
        self,
        step: int,
        values_M: np.ndarray,
        evaluation: Mapping[str, float] | None,
        alerts: Sequence[Alert],
        of_layers: bool = True,
    ) -> str:
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
        shown = tuple(values) if np.isfinite(values).all() else tuple(map(number, values))
        rest: dict[str, Any] = dict(evaluation or {})
        if alerts:
            rest["alerts"] = alerts
        tail = "".join(", " + field for field in fields(rest))
        return f'{{"step": {step}' + template % shown + tail + "}"


class Writer:
    """Writes dispatches to a record on a thread, and shows them on the console once they are recorded.

    Every method raises what went wrong on the thread with an earlier dispatch, again and again.
    """

    def __init__(self, record: Record, facts: RunFacts, *, console: Console | None = None, rules: Sequence[Rule] = ()):
        """Starts the thread.

        Args:
          record: the open record; the writer closes it. Its evaluations are replayed to the rules.
          rules: conditions on the evaluations that raise alerts (alerts.rules_of).
        """
        self._record, self._facts, self._console, self._rules = record, facts, console, rules
        for step, evaluation in record.evaluations:
            for rule in rules:
                rule.begins(step, evaluation)
        self._gate = AlertGate(facts.alert_interval)
        self._formatter = Formatter(())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record-writer")
        self._pending: Future | None = None
        self._closed = False

    def submit(self, dispatch: DispatchRecord) -> None:
        """Has the rows of a dispatch written; waits for those of the one before."""
        self._settle()
        self._pending = self._thread.submit(self._write, dispatch)

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Has an event written to timing.jsonl behind what was submitted before; from any thread, at any time.

        An event that cannot be written is dropped: what is wrong with the disk is raised where rows are submitted.
        """
        with contextlib.suppress(RuntimeError):  # the writer is closed
            self._thread.submit(self._record.event, kind, step, **values)

    def flush(self, fsync: bool = True) -> None:
        """Waits until everything submitted is in the files (and, with fsync, on the disk)."""
        self._settle()
        self._thread.submit(self._record.flush, fsync).result()

    def close(self) -> None:
        """Writes what was submitted, ends the thread and closes the record. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._thread.shutdown()
            self._record.close()
        self._settle()

    def _settle(self):
        if self._pending is not None:
            self._pending.result()

    def _write(self, item):
        facts, record = self._facts, self._record
        record.append_diagnostics(item.diagnostics)
        values_KM = np.zeros((1, 0), np.float32) if item.values is None else np.asarray(item.values)
        if values_KM.dtype != np.float32 or values_KM.shape[1:] != (len(item.names),):
            raise ValueError(
                f"packed metrics are {values_KM.dtype}{list(values_KM.shape)}, expected float32 [n, {len(item.names)}]"
            )
        if not len(values_KM):
            return
        if self._formatter.names != item.names:
            self._formatter = Formatter(item.names)
        timing = None if item.values is None else self._timing(item.seconds / len(values_KM))
        lines, timing_rows, events, shown = {}, [], [], []
        for step, values_M in enumerate(values_KM, item.first_step):
            evaluation = None
            if item.evaluation and step == item.first_step + len(values_KM) - 1:
                evaluation = {name: float(value) for name, value in item.evaluation.items()}
                events.append(_evaluated(step, evaluation, item.evaluation_s))
            alerts = self._formatter.alerts_of(values_M)
            if evaluation:
                alerts += [alert for rule in self._rules for alert in rule.begins(step, evaluation)]
            notable = bool(alerts or evaluation)
            if keep_row(step, log_interval=facts.log_interval, max_steps=facts.max_steps, notable=notable):
                # Rows 1, 1 + interval, ..., as those of a reference gradient of this interval; and the last.
                of_layers = (step - 1) % facts.layer_interval == 0 or step == facts.max_steps
                lines[step] = self._formatter.line(step, values_M, evaluation, alerts, of_layers)
                if timing is not None:
                    timing_rows.append({"step": step, **timing})
            shown.append((step, values_M, evaluation or {}, alerts))
        record.append(list(lines), list(lines.values()), timing_rows + events)
        if self._console is not None:  # people are shown only what is recorded
            self._show(self._console, shown, (timing or {}).get("tokens_per_s"))

    def _timing(self, step_time):
        timing = {"time": round(time.time(), 3), "step_time_s": _round(step_time)}
        if step_time > 0 and self._facts.tokens_per_step:
            timing["tokens_per_s"] = _round(self._facts.tokens_per_step / step_time)
            if self._facts.flops_per_step and self._facts.peak_flops:
                timing["mfu"] = _round(self._facts.flops_per_step / step_time / self._facts.peak_flops)
        return timing

    def _show(self, console, rows, tokens_per_s):
        names = self._formatter.names
        loss_column = names.index("loss") if "loss" in names else None
        for step, values_M, evaluation, alerts in rows:
            for _, text in self._gate.messages(step, alerts):
                console.alert(text)
            loss = None if loss_column is None else float(values_M[loss_column])
            console.update(step, loss, evaluation.get("val_loss"), tokens_per_s)


def _evaluated(step, evaluation, seconds):
    kind = "eval" if "val_loss" in evaluation else "diagnosis"
    return {"event": kind, "step": step, "time": round(time.time(), 3), "seconds": _round(seconds)}


def _round(value):
    """Six significant digits: wall-clock values carry no more."""
    return float(f"{value:.6g}")
