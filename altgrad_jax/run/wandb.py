"""Weights & Biases as a sink (sinks.py), in this process: W&B has a process of its own, wandb-core, that uploads.

What a run's W&B page shows is decided here: the modes, the x-axis, the summaries, and after which row sending begins.
"""

import fnmatch
import os
import shlex
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from altgrad_jax.errors import UserError

MODES = ("online", "offline", "disabled")
SUMMARY = ("sound", "verdict", "best_val_loss")  # of the verdict, in the run's summary
INIT_TIMEOUT_S = 90.0

# Runs of this process that W&B has open. wandb.init and wandb.teardown change state that all of them share.
_open: set["WandbSink"] = set()
_lock = threading.Lock()


def has_wandb_credentials() -> bool:
    """Whether W&B would find a login: an API key or identity token in the environment, or a netrc entry."""
    from requests.utils import get_netrc_auth  # W&B needs requests; takes a tenth of a second

    given = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    return bool(given or get_netrc_auth(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"))


def resolve_wandb_mode(mode: str) -> str:
    """online, offline or disabled, for the setting wandb_mode.

    "auto" follows WANDB_DISABLED=true and WANDB_MODE (in any case; dryrun is offline, run is online), then it is online
    where there are credentials, else offline. The others stay what they are.

    Raises:
      UserError: an unknown mode, or online without credentials.
    """
    name = "wandb_mode"
    if mode == "auto" and os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    if mode == "auto" and os.environ.get("WANDB_MODE"):
        name, mode = "WANDB_MODE", os.environ["WANDB_MODE"].lower()
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode == "auto":
        return "online" if has_wandb_credentials() else "offline"
    if mode not in MODES:
        raise UserError(f"{name} is {mode!r}; allowed are auto, online, offline and disabled")
    if mode == "online" and not has_wandb_credentials():
        raise UserError(
            f"{name} is online but there is no W&B login on this machine: run `wandb login`, set WANDB_API_KEY, or set "
            f"{name} to auto or offline"
        )
    return mode


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that at least one of the shell-style patterns matches."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


class WandbSink:
    """One run on W&B. See sinks.Sink."""

    name, logger = "W&B", "wandb"

    def __init__(self, init: Mapping[str, Any], run_dir: Path, *, mode: str, keys: Sequence[str] = ()):
        """init: arguments of wandb.init. mode: online or offline. keys: patterns of the names that are sent."""
        self._init, self._run_dir, self._mode, self.keys = init, run_dir, mode, keys
        self._sync = f"to send it later: wandb sync {shlex.quote(str(run_dir / 'wandb'))}/offline-run-*"

    def tell_mode(self, asked: str, say: Callable[[str], None]) -> None:
        """Says why the run is offline, if it is, and how to send it."""
        if self._mode == "offline":
            unasked = asked == "auto" and not os.environ.get("WANDB_MODE")
            say(f"W&B is offline ({'no login was found on this machine' if unasked else 'as asked'}); {self._sync}")

    def start(self, say: Callable[[str], None], warn: Callable[[str], None]) -> int:
        """Online, W&B says what it has; offline, the files that earlier starts left behind do."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # at its exit Python would wait 30 s for its server
        import wandb

        with _lock:
            self._run = self._start(wandb, warn)
            _open.add(self)
        # The x-axis is a metric of its own, so that rows may be sent in any order.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("val/loss", step_metric="step", summary="min")
        self._run.define_metric("train/loss", step_metric="step", summary="last")
        if self._mode == "offline":
            return last_stored_step(self._run_dir, self._init["id"])
        say(f"W&B: {self._run.url}")
        return int(self._run.starting_step or 0) - 1

    def _start(self, wandb, warn):
        if "WANDB_MODE" in os.environ:
            os.environ["WANDB_MODE"] = self._mode  # wandb refuses spellings that are heard here
        hooks = sys.exit, sys.excepthook  # wandb replaces them, to learn how the process ends
        try:
            try:
                if self._mode == "online" and any(sink._mode == "offline" for sink in _open):
                    raise ConnectionError("another run of this process could not")  # all runs of a sweep wait once
                return self._wandb_init(wandb)
            except Exception as error:
                if self._mode == "offline":
                    raise
                reason = " ".join(str(error).split())[:200]
                warn(f"the run could not be started online ({reason}), so it is kept offline; {self._sync}")
                if not _open:
                    wandb.teardown()  # or the run's id stays in use
                self._mode = "offline"
                return self._wandb_init(wandb)
        finally:
            sys.exit, sys.excepthook = hooks

    def _wandb_init(self, wandb):
        """wandb.init without console capture or output, and beside other runs of this process."""
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=INIT_TIMEOUT_S,
            reinit="create_new",
            disable_job_creation=True,
        )
        wandb.setup(settings=wandb.Settings(silent=True))
        return wandb.init(**self._init, dir=self._run_dir, mode=self._mode, resume="allow", settings=settings)

    def log(self, step: int, values: Mapping[str, float], alerts: Sequence[tuple[str, str]]) -> None:
        """Sends a row with its step as the metric `step`, and alerts to the people who subscribed to them."""
        if values:
            self._run.log({"step": step, **values}, step=step)
        for kind, text in alerts:
            self._run.alert(title=kind, text=text, level="WARN", wait_duration=0.001)  # 0 is a minute to wandb

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Waits until wandb-core has uploaded everything, and ends it, because the end of Python would wait for it."""
        import wandb

        for key in SUMMARY:
            if key in summary:
                self._run.summary[key] = summary[key]
        self._run.finish()
        with _lock:
            _open.discard(self)
            if not _open and wandb.run is None:  # neither other runs of a sweep nor the user's own
                wandb.teardown()

    def abandon(self) -> None:
        """Kills wandb-core, unless other runs use it still."""
        _open.discard(self)
        setup = sys.modules.get("wandb.sdk.wandb_setup")
        connection = getattr(getattr(setup, "_singleton", None), "_connection", None)
        if setup is not None and connection is not None and not _open:
            connection._cleanup()  # unregisters the waiting at the end of Python
            connection._proc._process.kill()
            # A later run of this process starts another.
            setup._singleton = None  # pyright: ignore[reportAttributeAccessIssue]
            os.environ.pop("WANDB_SERVICE", None)


# ---------------------------------------------------------------------------------------------- what W&B's files hold


def stored_records(path: Path) -> Iterator[Any]:
    """The records (protobuf) of a .wandb file up to its torn end, if it has one.

    The file is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind 7 bytes of header:
    blocks of 32 KiB with chunks of (checksum u32, length u16, kind u8, data); kinds 1 whole, 2 first, 3 middle, 4 last.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left  # padding
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        chunk = data[at + 7 : at + 7 + length]
        if not 1 <= kind <= 4 or len(chunk) < length:
            return
        at += 7 + length
        record = chunk if kind in (1, 2) else record + chunk
        if kind in (1, 4):
            yield Record.FromString(record)


def last_stored_step(run_dir: Path, run_id: str) -> int:
    """The last step in the files that earlier starts of the run left in its folder; -1 where there is none."""
    files = (run_dir / "wandb").glob(f"*run-*/run-{run_id}.wandb")
    records = (record for path in files for record in stored_records(path))
    return max((record.history.step.num for record in records if record.HasField("history")), default=-1)
