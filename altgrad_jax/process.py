"""The operating system's side of a run: signals that ask it to stop, and the lock on its folder."""

import contextlib
import errno
import os
import signal
import threading
import time
from pathlib import Path

from altgrad_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two processes on one folder are then the user's to avoid
    fcntl = None

_IMPORTED = time.monotonic()


def process_age():
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


class StopRequest:
    """Catches SIGINT and SIGTERM: the first asks the loop to save and stop, a second one leaves at once.

    A Python handler runs only when the main thread is between two bytecodes, and the main thread waits for the device
    most of the time. So a thread reads the signals from the file descriptor that Python's C handler writes them to.
    Outside the main thread (some notebooks) signals cannot be caught, and nothing is.

    Attributes:
      received: the first signal that this process was sent; None before.
      number: the signal that the loop is to stop for; None while there is none. With `shared`, where several processes
        must stop at one step, it stays None until `agree`.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, shared=False):
        self.received, self.number, self._shared = None, None, shared
        self._old = {}

    def agree(self, received):
        """Takes what every process has received, numbers or None, as the reason to stop, if there is one."""
        self.number = next((number for number in received if number), None)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._old = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_):
        if self._old:
            for number, handler in self._old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_fd)
            os.close(self._write)  # ends the thread
            self._thread.join()
            os.close(self._read)

    def _listen(self):
        while received := os.read(self._read, 1):
            number = received[0]
            if number not in self.SIGNALS:
                continue
            if self.received is not None:
                if os.isatty(1):
                    os.write(1, b"\x1b[?25h\n")  # the live progress line hides the cursor
                os._exit(128 + number)
            self.received = number
            if not self._shared:
                self.number = number
            # Not print: the main thread may be in the middle of one.
            os.write(2, f"\n{signal.Signals(number).name}: saving after this dispatch, then stopping; once more to "
                        "leave at once\n".encode())


def lock_folder(run_dir, resources):
    """Makes the run folder, and makes sure that no other process trains into it until the ExitStack `resources` closes.

    The lock is on the folder itself: it leaves no file behind, and ends with the process. UserError where the folder is
    a file, cannot be written to, or is another process's.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write")
        folder = os.open(run_dir, os.O_RDONLY)
    except FileExistsError:
        raise UserError(f"{run_dir} is a file: give a folder with --workdir") from None
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written to ({error.strerror}): give another folder with "
                        "--workdir") from None
    resources.callback(os.close, folder)
    resources.callback(_remove_if_empty, run_dir)
    if fcntl is not None:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir} is being trained into by another process: wait for it, stop it, or give "
                            "another folder with --workdir") from None
        except OSError:
            pass  # a file system without locks


def _remove_if_empty(folder):
    """A run that was refused leaves no folder behind."""
    with contextlib.suppress(OSError):
        folder.rmdir()
