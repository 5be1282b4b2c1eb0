"""TensorBoard as a sink (sinks.py): event files in the run folder's `tensorboard`, written by tensorboardX."""

import importlib.util
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

    def __init__(self, run_dir: Path):
        self._folder = Path(run_dir) / "tensorboard"

    def start(self, say: Callable[[str], None], warn: Callable[[str], None]) -> int:
        """A resumed run writes the whole record anew: what earlier starts wrote behind its step is made again."""
        from tensorboardX import SummaryWriter

        for path in self._folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = SummaryWriter(str(self._folder), flush_secs=5)
        return -1

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
