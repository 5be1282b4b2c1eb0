"""The operating system's side of a run: signals that ask it to stop, and the lock on its folder."""

import contextlib
import errno
import os
import select
import signal
import socket
import sys
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


class Interrupted(BaseException):
    """A signal, where there is nothing to save. Not an Exception: code that handles failures must not take it for one.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """A context in which SIGINT, SIGTERM and SIGHUP (a closed terminal) end the program in good order.

    The first raises `Interrupted` in the main thread or, within `deferred`, asks the loop to save and stop. A second
    one leaves at once. So does the first if the main thread does not get to leave the context within LEAVE_S seconds:
    a Python handler runs only between two bytecodes of the main thread, and that may be deep in a compiler.

    For the same reason a thread reads the signals, from the file descriptor that Python's C handler writes them to.
    Where Python cannot pass an exception on (a callback of its garbage collector, a destructor), it prints and forgets
    it: an `Interrupted` that was raised there is raised again a moment later.

    Outside the main thread (some notebooks) signals cannot be caught, and nothing is. A SIGHUP that is ignored, as
    under nohup, stays so. Such contexts may be nested; the innermost one acts, and tells the outer ones at its end.

    Attributes:
      received: the first signal that this process was sent; None before.
      number: the signal that the loop is to stop for; None while there is none. With `shared`, where several processes
        must stop at one step, it stays None until `agree`.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    LEAVE_S = 8.0
    AGAIN_S = 0.005
    _innermost = None

    def __init__(self, shared=False):
        self.received, self.number, self._shared = None, None, shared
        self._deferred = self._raised = self._told = False
        self._n_again = 0  # how often a signal that was received was raised once more
        self._old, self._outer = {}, None

    def agree(self, received):
        """Takes what every process has received, numbers or None, as the reason to stop, if there is one."""
        self.number = next((number for number in received if number), None)

    @contextlib.contextmanager
    def deferred(self):
        """A context in which the first signal only sets `number`, and whoever is in it stops where nothing is lost."""
        self._deferred = True
        try:
            yield self
        finally:
            self._deferred = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._outer, StopRequest._innermost = StopRequest._innermost, self
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            hangup = getattr(signal, "SIGHUP", None)
            self._old = {
                number: signal.signal(number, self._handle)
                for number in self.SIGNALS
                if not (number == hangup and signal.getsignal(number) is signal.SIG_IGN)
            }
            self._old_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_):
        if self._old:
            StopRequest._innermost = self._outer
            if self._outer is not None and self._outer.received is None:
                self._outer.received = self.received
            sys.unraisablehook = self._old_hook
            for number, handler in self._old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_fd)
            os.close(self._write)  # ends the thread
            self._thread.join()
            os.close(self._read)

    def _handle(self, number, frame):
        if self.received is None:
            self.received = number
        if self._deferred:
            self._ask()
        elif not self._raised:
            self._raised = True
            raise Interrupted(number)

    def _unraisable(self, unraisable):
        if not isinstance(unraisable.exc_value, Interrupted):
            self._old_hook(unraisable)
            return
        self._raised = False
        self._n_again += 1
        # Not from here, for that would be where Python cannot pass it on either.
        again = threading.Timer(self.AGAIN_S, _send, [unraisable.exc_value.number])
        again.daemon = True
        again.start()

    def _ask(self):
        if not self._shared:
            self.number = self.received
        if not self._told:
            self._told = True
            name = signal.Signals(self.received).name
            _write(f"\n{name}: saving after this dispatch, then stopping; once more to leave at once\n")

    def _listen(self):
        first, deadline, n_heard_again = None, None, 0
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                deadline = None
                if self._deferred:  # it came just before
                    self._ask()
                else:
                    _leave(first)
                continue
            received = os.read(self._read, 1)
            if not received:
                return
            number = received[0]
            if number not in self._old:
                continue
            if n_heard_again < self._n_again:  # comes from `_unraisable`, and is no second one
                n_heard_again += 1
                continue
            if first is not None:
                _leave(number)
            first = number
            if self.received is None:
                self.received = number
            if self._deferred:
                self._ask()
            else:
                deadline = time.monotonic() + self.LEAVE_S


def _send(number):
    """Sends the main thread a signal, which also ends a system call that it waits in."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:  # Windows
        signal.raise_signal(number)


def _write(text):
    # Not print: the main thread may be in the middle of one. And the terminal may be the one that was closed.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _leave(number):
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # the live progress line hides the cursor
    os._exit(128 + number)


LOCK = ".lock"


def lock_folder(run_dir, resources):
    """Makes the run folder, and makes sure that no other process trains into it until the ExitStack `resources` closes.

    The lock is on a file in the folder, `.lock`, which says who holds it. It ends with the process, however that ends;
    a file that a killed process left behind locks nothing. UserError where the folder is a file, cannot be written to,
    or is another process's.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write")
        while (lock := _take_lock(run_dir / LOCK)) is None:
            pass
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{run_dir} is a file or lies below one: give a folder with --workdir") from None
    except OSError as error:
        raise UserError(
            f"{run_dir} cannot be written to ({error.strerror}): give another folder with --workdir"
        ) from None
    resources.callback(_release, run_dir, lock)


def _take_lock(path):
    """The open, locked file; None if the one that held it has just removed it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(lock, 4096, 0).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{path.parent} is being trained into by {holder}: wait for it, stop it, or give "
                    "another folder with --workdir"
                ) from None
            except OSError:
                pass  # a file system without locks
        try:
            if os.fstat(lock).st_ino != os.stat(path).st_ino:
                raise FileNotFoundError
        except FileNotFoundError:
            os.close(lock)
            return None
        os.ftruncate(lock, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk keeps the name from being told, not the lock
            os.pwrite(lock, f"another process ({os.getpid()} on {socket.gethostname()}, since {since})\n".encode(), 0)
        return lock
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(lock)
        raise


def _release(run_dir, lock):
    """Before the lock is let go, so that the file is not another's. A run that was refused leaves no folder behind."""
    with contextlib.suppress(OSError):
        (run_dir / LOCK).unlink()
    os.close(lock)
    with contextlib.suppress(OSError):
        run_dir.rmdir()


def is_empty(run_dir):
    """Whether nothing is in the folder but its lock."""
    return all(path.name == LOCK for path in run_dir.iterdir())
