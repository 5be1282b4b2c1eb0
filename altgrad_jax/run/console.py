"""What a person sees while the run goes: one live line on a terminal, a few plain lines in a file or a pipe.

Consoles with one interface: update(step, loss, val_loss, tokens_per_s), message(text), alert(text), working(what),
close(). They are called from the host loop and from the writer's thread, so each call takes a lock. Which
plain lines appear depends on step numbers only, never on the clock: a log is the same length on a slow
machine and on a fast one. A console whose reader has gone (`| head`, a closed terminal) falls silent; it
never ends the run, as rich by itself would.
"""

import contextlib
import io
import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from altgrad_jax.errors import UserError

MODES = ("auto", "live", "plain", "quiet")
PLAIN_LINES = 50  # of a run, beside evaluations and alerts
_SETTLE_S = 0.05  # rows of one dispatch arrive closer together than this


def make_console(mode: str, max_steps: int, stream: Any = None, clock: Callable[[], float] = time.monotonic):
    """A console on `stream` (default: standard output). `auto`: live where it is a terminal, else plain.

    `quiet` prints alerts alone.

    Raises:
      UserError: an unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"console is {mode!r}; allowed are {', '.join(MODES)}")
    stream = Lasting(sys.stdout if stream is None else stream)
    if mode == "quiet":
        return QuietConsole(stream)
    if mode == "live" or (
        mode == "auto"
        and stream.isatty()
        and Console(file=stream).is_terminal
        and not Console(file=stream).is_dumb_terminal
    ):
        return LiveConsole(max_steps, stream, clock)
    return PlainConsole(max_steps, stream, clock)


class Lasting:
    """A text stream that takes writes in silence once the one behind it is broken or closed, or where there is none.

    What the stream's encoding lacks is written as escapes. The stream needs no method but `write`.
    """

    def __init__(self, stream):
        self._stream = io.StringIO() if stream is None else stream  # None: Python found descriptor 1 closed

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self._stream.isatty()
        return False


def brief(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def tell(text: str) -> None:
    """Prints a line on standard output, if there is one that takes it."""
    print(text, file=Lasting(sys.stdout), flush=True)


def show_rate(tokens_per_s):
    """1234567 -> "1.23M tok/s"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens_per_s >= size:
            return f"{tokens_per_s / size:.3g}{unit} tok/s"
    return f"{tokens_per_s:.3g} tok/s"


def show_duration(seconds):
    """3725 -> "1:02:05"; "-" where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class _Progress:
    """The last known numbers. The pace counts from the end of the first dispatch, which held the
    compilation."""

    def __init__(self, max_steps, clock):
        self.max_steps, self._clock = max_steps, clock
        self.step, self.loss, self.val_loss, self.tokens_per_s, self.alerts = 0, None, None, None, 0
        self._base = None  # (step, time) from which the pace is measured

    def update(self, step, loss, val_loss, tokens_per_s):
        now = self._clock()
        if loss is not None and (self._base is None or now - self._base[1] < _SETTLE_S):
            self._base = step, now
        self.step = step
        self.loss = self.loss if loss is None else loss
        self.val_loss = self.val_loss if val_loss is None else val_loss
        self.tokens_per_s = self.tokens_per_s if tokens_per_s is None else tokens_per_s

    def eta(self):
        """Seconds left, or None."""
        if self._base is None or self.step <= self._base[0]:
            return 0.0 if self.step >= self.max_steps else None
        step, since = self._base
        return (self.max_steps - self.step) * (self._clock() - since) / (self.step - step)


def _parts(loss, val_loss, tokens_per_s, eta):
    """The parts of a line of progress behind the step; what is None is left out."""
    parts = [] if loss is None else [f"loss {loss:.4f}"]
    parts += [] if val_loss is None else [f"val_loss {val_loss:.4f}"]
    parts += [] if tokens_per_s is None else [show_rate(tokens_per_s)]
    return "  ".join(parts if eta is None else [*parts, f"ETA {show_duration(eta)}"])


class PlainConsole:
    """Text without escape codes: the first step, every evaluation, about fifty steps, messages, alerts."""

    def __init__(self, max_steps, stream, clock):
        self._progress = _Progress(max_steps, clock)
        self._every = max(1, math.ceil(max_steps / PLAIN_LINES))
        self._stream = stream
        self._lock = threading.RLock()

    def update(self, step, loss=None, val_loss=None, tokens_per_s=None):
        with self._lock:
            first = self._progress.loss is None and loss is not None
            # Steps of a sweep come by the dozen: what counts is whether a multiple was passed.
            passed = step // self._every > (step - 1 if first else self._progress.step) // self._every
            self._progress.update(step, loss, val_loss, tokens_per_s)
            if first or val_loss is not None or passed or step == self._progress.max_steps:
                last = self._progress.max_steps
                eta = self._progress.eta() if step < last else None
                # Only what this step measured: an old validation loss on a new line reads as a new one.
                self._print(f"step {step:>{len(str(last))}}/{last}  {_parts(loss, val_loss, tokens_per_s, eta)}")

    def message(self, text):
        with self._lock:
            self._print(text)

    def alert(self, text):
        with self._lock:
            self._progress.alerts += 1
            self._print(f"ALERT {text}")

    @contextlib.contextmanager
    def working(self, what):
        """A context in which the program is busy with `what`: says so, and the time it took."""
        started = time.monotonic()
        self.message(f"{what} ...")
        yield
        self.message(f"{what} took {time.monotonic() - started:.1f} s")

    def close(self):
        """Nothing to put back."""

    def _print(self, text):
        print(text, file=self._stream, flush=True)


class QuietConsole:
    """Alerts alone."""

    def __init__(self, stream):
        self._stream = stream

    def update(self, step, loss=None, val_loss=None, tokens_per_s=None):
        pass

    def message(self, text):
        pass

    def alert(self, text):
        print(f"ALERT {text}", file=self._stream, flush=True)

    @contextlib.contextmanager
    def working(self, what):
        yield

    def close(self):
        pass


class LiveConsole:
    """One line at the bottom of a terminal, redrawn five times a second; the rest scrolls above it."""

    def __init__(self, max_steps, stream, clock):
        self._progress = _Progress(max_steps, clock)
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._lock = threading.RLock()
        self._activity = None  # (what, since when) while the program is busy with something else than steps
        # Rich redraws in a thread of its own; print() from elsewhere (warnings, absl) lands above the line.
        self._live = Live(console=self._console, get_renderable=self._line, refresh_per_second=5)
        self._live.start()
        self._open = True

    def _line(self):
        with self._lock:
            p = self._progress
            if self._activity is not None:
                what, started = self._activity
                return Text(f" {what} ... {time.monotonic() - started:.0f} s", no_wrap=True, overflow="ellipsis")
            parts = _parts(p.loss, p.val_loss, p.tokens_per_s, p.eta())
            text = Text(f" {p.step:>{len(str(p.max_steps))}}/{p.max_steps}  {parts}", no_wrap=True, overflow="ellipsis")
            if p.alerts:
                text.append(f"  {p.alerts} alert{'s' if p.alerts > 1 else ''}", style="bold yellow")
            if self._console.width < 90:
                return text
            line = Table.grid()
            line.add_row(ProgressBar(total=max(p.max_steps, 1), completed=p.step, width=20), text)
            return line

    def update(self, step, loss=None, val_loss=None, tokens_per_s=None):
        with self._lock:
            self._progress.update(step, loss, val_loss, tokens_per_s)

    @contextlib.contextmanager
    def working(self, what):
        """A context in which the line shows `what` the program is busy with, and for how long."""
        started = time.monotonic()
        self._activity = what, started
        try:
            yield
            self.message(f"{what} took {time.monotonic() - started:.1f} s")
        finally:
            self._activity = None

    def message(self, text):
        self._print(Text(text))

    def alert(self, text):
        with self._lock:
            self._progress.alerts += 1
        self._print(Text.assemble(("ALERT ", "bold yellow"), text))

    def close(self):
        """Leave the last state of the line on the screen and give the terminal back."""
        if self._open:
            self._open = False
            self._live.stop()

    def _print(self, text):
        # Not under our lock: rich takes its own, which its redrawing thread holds while it asks for ours.
        self._console.print(text)
