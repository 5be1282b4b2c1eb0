"""Dashboards fed from the record as it grows: Weights & Biases, TensorBoard.

The record is the queue. A daemon thread for each dashboard follows the files that the writer appends to and hands every
new row on. So a slow, hanging or failing dashboard costs its own rows and nothing else, and a resumed run sends what
the dashboard lacks.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from altgrad_jax import config as settings
from altgrad_jax.run.alerts import AlertGate
from altgrad_jax.run.console import brief
from altgrad_jax.run.record import METRICS, TIMING_KEYS, Tail, count_rows
from altgrad_jax.run.tensorboard import TensorBoardSink, require_tensorboard
from altgrad_jax.run.wandb import WandbSink, matching, resolve_wandb_mode

# Failures of one row are retried for five minutes in all.
PAUSES_S = (0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60)
POLL_S = 0.25
_SECTIONS = {"loss": "train/loss", "perplexity": "train/perplexity"} | {name: f"perf/{name}" for name in TIMING_KEYS}

Say = Callable[[str], None]


class Sink(Protocol):
    """A dashboard. Its thread calls start once, log for each row, and finish at the end.

    Attributes:
      name: as people know it. logger: as the setting `loggers` names it.
      keys: shell-style patterns of the record's names that it is given; empty: all.
    """

    name: str
    logger: str
    keys: Sequence[str]

    def start(self, say: Say, warn: Say) -> int:
        """Opens the dashboard; `say` and `warn` show a line to people. Returns the last step it has; -1: none."""
        ...

    def log(self, step: int, values: Mapping[str, float], alerts: Sequence[tuple[str, str]]) -> None:
        """Takes one row, by dashboard names, and the (kind, text) of alerts that begin with it."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Ends the run there. summary: the verdict, empty if there is none."""
        ...

    def abandon(self) -> None:
        """Called instead, from another thread, when there is no more time: the end of Python must not wait for it."""
        ...


def dashboard_name(name: str) -> str:
    """The name on a dashboard of a metric of the record: its first part is the section that it is shown in.

    Metrics of a layer have a section for each statistic already (grad_norm/block_0/mlp_up).
    """
    if name in _SECTIONS or "/" in name:
        return _SECTIONS.get(name, name)
    if name.startswith("val_"):
        return f"val/{name.removeprefix('val_')}"
    return f"optim/{name}" if name.startswith(("learning_rate", "grad_", "update_")) else f"train/{name}"


def require_sinks(config: Any) -> None:
    """UserError unless the dashboards that the settings ask for can be opened."""
    if "wandb" in config.loggers:
        resolve_wandb_mode(config.wandb_mode)
    if "tensorboard" in config.loggers:
        require_tensorboard()


def open_sinks(
    config: Any,
    run_dir: str | Path,
    manifest: Mapping[str, Any],
    *,
    resume_step: int | None,
    say: Say,
    event: Callable[..., None],
) -> "Sinks":
    """Starts feeding the dashboards that the settings ask for from the record in run_dir.

    Args:
      resume_step: the step the run resumes from, None for a fresh run.
      say: called with a line of text now and then, from other threads.
      event: called as event(kind, step, **values) where something went wrong, e.g. Writer.event; likewise.
    """
    run_dir, sinks = Path(run_dir).absolute(), []
    if "wandb" in config.loggers and (mode := resolve_wandb_mode(config.wandb_mode)) != "disabled":
        sinks.append(WandbSink(_wandb_run(config, run_dir, manifest), run_dir, mode=mode, keys=config.wandb_keys))
        sinks[-1].tell_mode(config.wandb_mode, say)
    if "tensorboard" in config.loggers:
        sinks.append(TensorBoardSink(run_dir))
    last = -1 if resume_step is None else resume_step
    return Sinks([Follower(sink, run_dir, last, config.alert_interval, say, event) for sink in sinks])


def _wandb_run(config, run_dir, manifest):
    """The arguments of wandb.init: what the run is called, and what W&B's config shows of it."""

    def heard(name, variable):
        """The setting, or the variable of the environment where the setting was left at its default."""
        default = config[name] == settings.FIELDS[name].default
        return default and os.environ.get(variable) or config[name]

    tags = heard("tags", "WANDB_TAGS")
    if isinstance(tags, str):
        tags = [tag for tag in map(str.strip, tags.split(",")) if tag]
    data, device = manifest["data"], manifest["starts"][-1]["device"]
    n_tokens = data["meta"]["n_tokens"]
    facts = {
        "data": {
            "fingerprint": data["fingerprint"],
            "source": data["meta"]["source"],
            "train_tokens": n_tokens["train"],
            "val_tokens": n_tokens["val"],
        },
        "parameters": manifest["model"]["parameters"],
        "device": f"{device['count']} x {device['kind']} ({device['platform']})",
        "run_dir": str(run_dir),
    }
    return {
        "id": manifest["run_id"],
        "name": config.run_name,
        "project": heard("project", "WANDB_PROJECT"),
        "entity": heard("wandb_entity", "WANDB_ENTITY") or None,
        "group": config.wandb_group or None,
        "tags": [*tags, *(tag for tag in manifest["tags"] if tag not in config.tags)],
        "config": manifest["config"] | facts,
    }


class Sinks:
    """The dashboards of a run."""

    def __init__(self, followers: Sequence["Follower"]):
        self._followers, self._closed = followers, False

    def close(self, drain_timeout: float = 300.0, summary: Mapping[str, Any] | None = None) -> int:
        """Sends what is left and ends the runs there; after Writer.flush. Returns the number of rows not sent.

        Waits drain_timeout seconds at most for all dashboards together, with a line every few seconds. A second call
        does nothing.

        Args:
          summary: the verdict, or None if there is none.
        """
        if self._closed:
            return 0
        self._closed = True
        deadline = time.monotonic() + drain_timeout
        for follower in self._followers:
            follower.ask_to_finish(summary or {})
        return sum(follower.wait(deadline) for follower in self._followers)


class _Abandoned(Exception):
    """Nobody waits for the dashboard any more."""


class Follower:
    """Feeds one dashboard from the record. `last_sent`: the last step that it has."""

    def __init__(self, sink: Sink, run_dir: Path, last: int, alert_interval: int, say: Say, event: Callable[..., None]):
        """Starts the thread. last: the step that last_sent begins with, until the dashboard says what it has."""
        self._sink, self._run_dir, self._say, self._event = sink, run_dir, say, event
        self._gate, self.last_sent = AlertGate(alert_interval), last
        self._finishing, self._abandoned, self._warned = threading.Event(), threading.Event(), False
        self._summary: Mapping[str, Any] = {}
        self._wanted: dict[str, str | None] = {}  # name in the record -> name on the dashboard, None: not wanted
        self._thread = threading.Thread(target=self._work, name=f"{sink.name} follower", daemon=True)
        self._thread.start()

    def ask_to_finish(self, summary: Mapping[str, Any]) -> None:
        """The record is complete; `wait` is called next."""
        self._summary = summary
        self._finishing.set()

    def wait(self, deadline: float) -> int:
        """Waits until the dashboard has everything, or time.monotonic() is `deadline`. Returns the rows not sent."""
        pause = 3.0  # most runs drain at once and need no line
        while self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            self._thread.join(min(pause, left))
            if self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
                self._say(f"{self._sink.name}: {self._unsent()} rows still to be sent; giving up in {left:.0f} s")
                pause = 10.0
        if self._thread.is_alive():
            self._abandoned.set()
            self._sink.abandon()
        unsent = self._unsent()
        if unsent:
            self._say(f"{self._sink.name}: {unsent} rows were not sent; all are in {self._run_dir / METRICS}")
            self._event(f"{self._sink.logger}_unsent", max(self.last_sent, 0), rows=unsent)
        return unsent

    def _unsent(self):
        return count_rows(self._run_dir, self.last_sent)

    def _warn(self, text):
        """One warning for people, every one as an event."""
        if self._abandoned.is_set():
            return
        if not self._warned:
            self._warned = True
            self._say(f"warning: {self._sink.name}: {text}; the run goes on, the local record is complete")
        self._event(f"{self._sink.logger}_failed", max(self.last_sent, 0), reason=text)

    def _work(self):
        try:
            self.last_sent = self._sink.start(self._say, self._warn)
            self._follow()
            self._sink.finish(self._summary)
        except _Abandoned:
            pass
        except BaseException as error:  # wandb may call sys.exit
            self._warn(f"gave up ({brief(error)})")
            self._sink.abandon()

    def _follow(self):
        with contextlib.closing(Tail(self._run_dir, self.last_sent)) as tail:
            while True:
                finishing, last = self._finishing.is_set(), self.last_sent
                for row, timing in tail.rows():
                    self._send(row, timing)
                if self.last_sent == last:
                    if finishing:
                        return
                    self._finishing.wait(POLL_S)

    def _send(self, row, timing):
        step, alerts = row.pop("step"), row.pop("alerts", ())
        values = {}
        for name, value in (row | timing).items():
            if name not in self._wanted:
                wanted = not self._sink.keys or matching([name], self._sink.keys)
                self._wanted[name] = dashboard_name(name) if wanted else None
            if (shown := self._wanted[name]) is not None:
                values[shown] = value
        messages = self._gate.messages(step, alerts)
        for pause in (*PAUSES_S, None):
            if self._abandoned.is_set():
                raise _Abandoned
            try:
                self._sink.log(step, values, messages)
                break
            except Exception as error:
                if pause is None:
                    raise
                if pause == PAUSES_S[0]:
                    self._warn(f"sending failed ({brief(error)})")
                self._abandoned.wait(pause)
        self.last_sent = step
