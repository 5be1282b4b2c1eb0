"""Signals that ask a run to stop."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_IMPORTED = time.monotonic()


def process_age() -> float:
    """Seconds since this process was started; since this module was imported where the system does not tell."""
    imported = time.monotonic() - _IMPORTED
    try:
        # Field 22, counted behind the name, which may hold anything: start in clock ticks after boot.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return imported
    # Some sandboxes give 0 for the start.
    return age if ticks and age > imported else imported


class Interrupted(BaseException):
    """A signal, where there is nothing to save. Not an Exception: code that handles failures must not take it for one.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """A context in which SIGINT, SIGTERM and SIGHUP (a closed terminal) end the program in good order.

    The first signal raises `Interrupted` in the main thread or, within `deferred`, asks the loop to save and stop. It
    also gives the signals back to the system, so that a second one ends the process at once, whatever it is doing.

    Outside the main thread (some notebooks) signals cannot be caught, and nothing is. A SIGHUP that is ignored, as
    under nohup, stays so.

    Args:
      shared: whether several processes must stop at one step; a signal is then acted on when they have agreed.

    Attributes:
      received: the signal that this process was sent; None before.
      number: the signal that the loop is to stop for; None while there is none.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self, shared: bool = False) -> None:
        self.received: int | None = None
        self.number: int | None = None
        self._shared, self._deferred = shared, False
        self._old: dict = {}

    def agree(self, numbers: list[int | None]) -> None:
        """Takes what every process has received as the reason to stop, if one has received anything."""
        self.number = next(filter(None, numbers), None)

    @contextlib.contextmanager
    def deferred(self) -> Iterator["StopRequest"]:
        """A context in which the first signal only sets `number`, and whoever is in it stops where nothing is lost."""
        self._deferred = True
        try:
            yield self
        finally:
            self._deferred = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        self.received = number
        if not self._shared:
            self.number = number
        for caught in self._old:
            signal.signal(caught, signal.SIG_DFL)
        if not self._deferred:
            raise Interrupted(number)
        # Not print: the main thread may be in the middle of one. And the terminal may be the one that was closed.
        with contextlib.suppress(OSError):
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # the live progress line hides the cursor
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: saving after this dispatch, then stopping; once more to leave at once\n".encode())
