"""TensorBoard as a sink (sinks.py): event files in the run folder's `tensorboard`, written by tensorboardX."""

import importlib.util
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from altgrad_jax.errors import UserError


def require_tensorboard() -> None:
    """UserError unless tensorboardX is installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError(
            "loggers has tensorboard, which needs the package tensorboardX: pip install 'altgrad-jax[tensorboard]', or "
            "leave tensorboard out of loggers"
        )


class TensorBoardSink:
    """One run's event files. See sinks.Sink."""

    name, logger, keys = "TensorBoard", "tensorboard", ()

    def __init__(self, run_dir: Path, resume_step: int | None):
        self._folder = Path(run_dir) / "tensorboard"
        self._resume_step = -1 if resume_step is None else resume_step

    def start(self, say: Callable[[str], None], warn: Callable[[str], None]) -> int:
        """What earlier starts wrote behind the step that is resumed is purged: those steps are made again."""
        from tensorboardX import SummaryWriter

        last = min(self._resume_step, last_written_step(self._folder))
        self._writer = SummaryWriter(str(self._folder), purge_step=last + 1, flush_secs=5)
        return last

    def log(self, step: int, values: Mapping[str, float], alerts: Sequence[tuple[str, str]]) -> None:
        """One event for the whole row, so that a file holds all of it or nothing."""
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        row = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        assert self._writer.file_writer is not None
        self._writer.file_writer.add_summary(row, step, values.get("perf/time"))
        for _, text in alerts:
            self._writer.add_text("alerts", text, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Closes the event file."""
        self._writer.close()

    def abandon(self) -> None:
        """Nothing of it outlives the process."""


def last_written_step(folder: Path) -> int:
    """The last step of a row in the event files of a folder; -1 where there is none.

    A file is a sequence of (length u64, checksum u32, protobuf Event, checksum u32); a torn end is passed over.
    """
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    last = -1
    for path in folder.glob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            if at + 16 + length > len(data):
                break
            event = Event.FromString(data[at + 12 : at + 12 + length])
            last = max(last, event.step if event.HasField("summary") else -1)
            at += 16 + length
    return last
