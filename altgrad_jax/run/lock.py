"""The lock on a run's folder: one process trains into it at a time."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from altgrad_jax import files
from altgrad_jax.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Makes the run folder, and keeps other processes from training into it. The lock ends with the process.

    Raises:
      UserError: the folder is a file, cannot be written to, or another process trains into it.
    """
    with contextlib.ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if not os.access(run_dir, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no permission to write")
            held.callback(_remove_if_empty, run_dir)  # a run that was refused leaves no trace
            held.enter_context(files.locked(run_dir / LOCK, str(run_dir)))
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{run_dir} is a file or lies below one: give a folder with --workdir") from None
        except filelock.Timeout:
            raise UserError(
                f"{run_dir} is being trained into by another process: wait for it, stop it, or give another folder "
                "with --workdir"
            ) from None
        except OSError as error:
            raise UserError(
                f"{run_dir} cannot be written to ({error.strerror}): give another folder with --workdir"
            ) from None
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def is_empty(run_dir: Path) -> bool:
    """Whether nothing is in the folder but its lock."""
    return all(path.name == LOCK for path in run_dir.iterdir())
