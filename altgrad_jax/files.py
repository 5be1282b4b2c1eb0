"""Reading files that another program, or nobody, may have written; bringing what is written to the disk.

What is no regular file is never opened: a pipe would be waited for without end, a device read without end.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock

from altgrad_jax.errors import UserError

MAX_JSON_BYTES = 2**28
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
# What the system says where a file system, such as some network ones, has no locks. Where it has no such call at all
# (ENOSYS), filelock keeps a marker file by itself.
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})


@contextlib.contextmanager
def locked(path: Path, what: str, *, waits_for: str = "") -> Iterator[None]:
    """Holds the lock file `path`, which is gone afterwards. The lock ends with the process.

    Where the file system has no locks, a note says that nothing keeps a second process away from `what`.

    Args:
      waits_for: what another holder does, for the line that says it is waited for; without it nothing is.

    Raises:
      filelock.Timeout: another process holds it.
      OSError: the file cannot be made.
    """
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        if not waits_for:
            raise
        print(f"waiting for {waits_for}", file=sys.stderr, flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"note: the file system of {what} has no locks: keep other processes away from it", file=sys.stderr)
    try:
        yield
    finally:
        # Before the lock is let go: whoever waits for it sees that the file is gone, and makes a new one.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def shipped(folder: str) -> Path:
    """The folder `scripts` or `configs` of this package: inside it in a wheel, else beside it, in a checkout."""
    inside = Path(__file__).parent / f"_{folder}"
    return inside if inside.is_dir() else Path(__file__).parent.parent / folder


def require_file(path, fix):
    """UserError unless `path` is a file, or a link to one. fix: what to do, the end of the sentence."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {fix}") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): {fix}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is a {_KINDS.get(stat.S_IFMT(mode), 'special file')}, not a file: {fix}")


def read_json(path, fix):
    """The value of a JSON file; UserError where there is none to be read. fix: what to do, the end of the sentence."""
    try:
        with open_file(path, fix) as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise UserError(f"{path} cannot be read (more than {MAX_JSON_BYTES // 2**20} MiB): {fix}")
        return json.loads(data.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {fix}") from None
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{path} cannot be read (not valid JSON: nested too deeply): {fix}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read (not valid JSON: {str(error).splitlines()[0]}): {fix}") from None


def open_file(path, fix):
    """A file, opened to read bytes; UserError where there is none that can be read. fix: as in `require_file`."""
    require_file(path, fix)
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {fix}") from None


def sync(path):
    """Brings a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(path, fix):
    """A context in which failing to write, for want of rights, room or a folder, is a UserError about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): {fix}") from None


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file so that a reader, or a restart after a power cut, sees the old contents or the new ones.

    Raises:
      OSError: it names `path`.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # Python does not name the file of a write that failed
        raise
    sync(path.parent)
