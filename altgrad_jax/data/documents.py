"""Documents in local files: which files of a folder are read, which split each belongs to, the text of each record.

- A folder is read in the order of its paths, links followed. What is not read is named in `Source.skipped`.
- Splits follow the file and folder names that the library `datasets` knows (train, validation, dev, test, ...). The
  test split is left out. Names that look like splits and cannot be used end the preparation.
- Documents are read one at a time, each of at most MAX_DOCUMENT_BYTES, so neither a corpus nor a small file that
  unpacks without end has to fit into memory.
- A record that cannot be read ends the preparation with its file and line. Archives are never unpacked to a disk.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import dataclasses
import functools
import gzip
import importlib
import io
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from altgrad_jax.errors import UserError
from altgrad_jax.files import require_file

MAX_DOCUMENT_BYTES = 256 * 2**20
TEST_SPLIT = "the test split, which stays held out"
SEPARATOR_LINE = "<|endoftext|>"  # alone on a line of a .txt it separates documents, as TinyStories has it

_EURLEX_FIELDS = ("title", "header", "recitals", "main_body")
_USUAL_FIELDS = {"text", "content", "contents", "raw_content", "raw_text", "full_text", "document", "article", "body",
                 "passage", "story"}  # fmt: skip
# Written beside documents by the library datasets: descriptions, no documents.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "devtest"),
}
_SPLIT_OF = {
    word + ending: split
    for split, words in _SPLIT_WORDS.items()
    for word in words
    for ending in ("", "s", "set", "data", "split")
}
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip", b"PAR1": "parquet", b"ARROW1": "Arrow",
          b"\x93NUMPY": "a NumPy array", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"%PDF": "PDF"}  # fmt: skip

_ENCODINGS = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")

Texts = Iterator[tuple[str, str]]  # (where the document stands, its text)


@dataclasses.dataclass(frozen=True)
class Document:
    """One document. split: "train" or "validation" where the source says so, else None. where: its name in messages."""

    split: str | None
    where: str
    text: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus: what it is, and `documents()`, which fetches what it needs and then streams.

    Attributes:
      unit: what one document is. n_documents: how many are expected, for the progress only; None: not known.
      input_name: file or folder name of local documents. left_out: which part of the corpus is not used.
      skipped: files of the folder that are not read. plain_text: all files are .txt, so one alone is a whole corpus.
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
    skipped: tuple[str, ...] = ()
    plain_text: bool = False


def local(path: str | os.PathLike, *, text_field: str | None = None, split_names: bool = True) -> Source:
    """Documents in a file, in a folder of files, or in EURLEX57K's dataset.zip.

    text_field: the field of a record that holds its text; None: as `text_fields` finds it.
    split_names: whether file and folder names of a folder tell the split.

    Raises:
      UserError: nothing there, nothing readable there, or names of splits that cannot be used.
    """
    path = Path(path)
    if text_field == "":
        raise UserError("text_field is empty; name the field that holds the text, or leave --text_field out")
    if not os.path.exists(path):
        raise UserError(f"input {str(path)!r} does not exist; give a file or folder of documents ({KNOWN})")
    left_out, skipped = None, ()
    if path.is_dir():
        listed = _listed(path)
        files = [file for file, is_document in listed if is_document]
        skipped = tuple(file.relative_to(path).as_posix() for file, is_document in listed if not is_document)
        if not files:
            raise UserError(f"the directory {str(path)!r} holds no document files; give one that holds some ({KNOWN})")
        splits = _splits(path, files) if split_names else [None] * len(files)
        left_out = TEST_SPLIT if "test" in splits else None
        parts = [(split, file) for split, file in zip(splits, files) if split != "test"]
        if not any(split == "validation" for split, _ in parts):
            parts = [(None, file) for _, file in parts]
    elif path.name.lower().endswith(".zip"):
        parts, left_out = [("zip", path)], TEST_SPLIT
    elif reader_of(path.name):
        parts = [(None, path)]
    else:
        raise UserError(
            f"input {str(path)!r} is of an unknown kind; it must end in {KNOWN} or .zip, or be a folder of such files"
        )

    def documents() -> Iterator[Document]:
        for split, file in parts:
            if split == "zip":
                yield from read_split_zip(file, text_field)
                continue
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
        skipped=skipped,
        plain_text=all(re.search(r"\.txt(\.\w+)?$", file.name.lower()) for _, file in parts),
    )


# -------------------------------------------------------------------------------------------------- files of a folder


def _listed(root: Path) -> list[tuple[Path, bool]]:
    """(path, whether it is read) of everything below a folder, sorted by path.

    Raises:
      UserError: a folder cannot be listed, or two names lead to one file.
    """
    try:
        found = sorted(_walk(root, ()), key=lambda item: item[0].relative_to(root).as_posix())
    except OSError as error:
        raise UserError(f"cannot list the directory {error.filename} ({error.strerror}); make it readable") from None
    first_of: dict[str, Path] = {}
    for path, is_document in found:
        first = first_of.setdefault(os.path.realpath(path), path)
        if is_document and first != path:
            raise UserError(f"{first} and {path} are one file, which would be read twice; remove one of the two")
    return found


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[tuple[Path, bool]]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back up: what lies there is listed already
        yield folder, False
        return
    for name in os.listdir(folder):
        path = folder / name
        if name.startswith("."):
            yield path, False
        elif path.is_dir():
            yield from _walk(path, (*above, real))
        else:
            yield path, reader_of(name) is not None and name not in _DESCRIPTIONS


def _splits(root: Path, files: Collection[Path]) -> list[str | None]:
    """The split of each file, None for all where no name says one.

    Raises:
      UserError: only some files have one, or none is of the training split.
    """
    names = [path.relative_to(root) for path in files]
    splits = [_split_of(name, root) for name in names]
    found = sorted({split for split in splits if split})
    fix = "rename it or move it elsewhere, or give --nosplit_names where such names mean no splits"
    if found and None in splits:
        raise UserError(
            f"the directory {str(root)!r} has entries named after splits ({', '.join(found)}) and, beside "
            f"them, {names[splits.index(None)].as_posix()!r}, whose split is not known; {fix}"
        )
    if found and "train" not in found:
        raise UserError(
            f"the directory {str(root)!r} has files of the split {' and '.join(found)}, such as "
            f"{names[0].as_posix()!r}, and none of the training split; {fix}"
        )
    return splits


def _split_of(name: Path, root: Path) -> str | None:
    """The split that a path is named after, in a folder or in the file: data/train-00000-of-00001-0a1b2c.parquet,
    acts_dev.jsonl, Test/part.txt. A word counts between the separators of the library datasets, or capital letters."""
    words = re.split(r"[-._ 0-9/]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name.as_posix()).lower())
    found = sorted({_SPLIT_OF[word] for word in words if word in _SPLIT_OF})
    if len(found) > 1:
        raise UserError(
            f"{root / name} is named after two splits, {' and '.join(found)}; rename it, or give --nosplit_names where "
            "such names mean no splits"
        )
    return found[0] if found else None


# ---------------------------------------------------------------------------------------------- documents of one file


def read_file(path: Path, text_field: str | None = None) -> Texts:
    """(where, text) of each document of one file, whose kind follows from its name.

    Raises:
      UserError: the file cannot be opened or decoded, or a record has no text; names the file and the line.
    """
    require_file(path, "give a file of documents, or take it out of the folder")
    reader = reader_of(path.name)
    assert reader is not None, path
    with _reading(path):
        for where, text in reader(path, text_field):
            if text.count("\0") * 50 > len(text):
                raise UserError(f"{where} is full of NUL characters{_seems(text.encode('utf-8', 'replace'))}")
            yield where, text


def reader_of(name: str) -> Callable[[Path, str | None], Texts] | None:
    """What reads a file of this name; None: nothing does."""
    stem, opener = name.lower(), open
    for suffix, unpack in _PACKED.items():
        if stem.endswith(suffix):
            stem, opener = stem.removesuffix(suffix), unpack
    for suffix, read in _READERS.items():
        if stem.endswith(suffix) and (opener is open or read is not _read_table):
            return functools.partial(_read, opener, read)
    return None


def _read(opener: Callable[..., Any], read: Callable[..., Texts], path: Path, text_field: str | None) -> Texts:
    with opener(path, "rb") as stream:
        yield from read(stream, str(path), text_field)


def _lines(stream: BinaryIO | io.BufferedIOBase, name: str, first: bytes = b"") -> Iterator[tuple[str, bytes]]:
    """(`name:line`, its bytes) of each line; `first` is a line that was read already."""
    number = 0
    while line := first or stream.readline(MAX_DOCUMENT_BYTES + 1):
        number, first = number + 1, b""
        if len(line) > MAX_DOCUMENT_BYTES:
            raise UserError(_too_long(f"{name}:{number}"))
        yield f"{name}:{number}", line


def read_jsonl(
    stream: BinaryIO | io.BufferedIOBase, name: str, text_field: str | None = None, first: bytes = b""
) -> Texts:
    """(`name:line`, text) of each line of JSON Lines; blank lines are no documents."""
    for where, line in _lines(stream, name, first):
        if line.strip():
            yield where, document_text(_json(_utf8(line, where), where), where, text_field)


def _read_json(stream: BinaryIO, name: str, text_field: str | None) -> Texts:
    """One object, a list of objects, or JSON Lines under the name .json."""
    first = stream.readline(MAX_DOCUMENT_BYTES + 1)
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(first), dict):
            yield from read_jsonl(stream, name, text_field, first)
            return
    value = _json(_whole(stream, name, first), name)
    for i, record in enumerate(value if isinstance(value, list) else [value]):
        where = f"{name}, item {i + 1}" if isinstance(value, list) else name
        yield where, document_text(record, where, text_field)


def _read_csv(stream: BinaryIO, name: str, text_field: str | None) -> Texts:
    """Rows under a header; separated by the one of comma, semicolon and tab that the header has most of."""
    lines = (_utf8(line, where) for where, line in _lines(stream, name))
    header = next(lines, "")
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    rows = csv.reader(lines, delimiter=max(",;\t", key=header.count), strict=True)
    try:
        names = next(csv.reader([header], delimiter=max(",;\t", key=header.count), strict=True), [])
        for row in rows:
            where = f"{name}:{rows.line_num + 1}"
            if row and len(row) != len(names):
                raise UserError(
                    f"{where} has {len(row)} fields where the header has {len(names)}; mend that row: a "
                    "text that holds the separator or a line break stands in quotation marks"
                )
            if row:
                yield where, document_text(dict(zip(names, row)), where, text_field)
    except csv.Error as error:
        raise UserError(f"{name}:{rows.line_num + 1} is not CSV that can be read ({error}); mend that row") from None


def _read_txt(stream: BinaryIO, name: str, text_field: str | None) -> Texts:
    """The whole file, or what lies between lines of SEPARATOR_LINE."""
    parts = re.split(rf"(?m)^{re.escape(SEPARATOR_LINE)}(?:\r?\n|\Z)", _whole(stream, name))
    for i, part in enumerate(parts):
        yield name if len(parts) == 1 else f"{name}, document {i + 1}", part


def _read_table(stream: BinaryIO, name: str, text_field: str | None) -> Texts:
    """Rows of parquet, or of Arrow as a stream or a file. Of parquet only the text's columns are decoded."""
    pa, pq = (optional(module, f"the input {name}") for module in ("pyarrow", "pyarrow.parquet"))
    row = 0
    try:
        if name.lower().endswith(".parquet"):
            file = pq.ParquetFile(stream)
            names = file.schema_arrow.names
            batches = file.iter_batches(batch_size=256, columns=text_fields(names, text_field) or names)
        else:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(stream)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for record in batch.to_pylist():
                row += 1
                yield f"{name}, row {row}", document_text(record, f"{name}, row {row}", text_field)
    except pa.ArrowException as error:
        raise UserError(
            f"the {name.rpartition('.')[2]} file {name} cannot be read ({first_line(error)}); it is damaged or of "
            "another kind, so fetch it again"
        ) from None


def _open_zst(path: Path, mode: str) -> BinaryIO:
    pa = optional("pyarrow", f"zstd input ({path})")
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), 2**20)  # type: ignore[return-value]


_PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
_READERS: dict[str, Callable[..., Texts]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl"), read_jsonl),
    ".json": _read_json,
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    ".txt": _read_txt,
    **dict.fromkeys((".parquet", ".arrow"), _read_table),
}
KNOWN = f"{', '.join(_READERS)}; all but the last two also with {', '.join(_PACKED)}"


def read_split_zip(path: Path, text_field: str | None = None) -> Iterator[Document]:
    """The acts of EURLEX57K's dataset.zip: train.jsonl and dev.jsonl, in whatever folder the archive has them.

    Raises:
      UserError: no such members, or a damaged archive.
    """
    require_file(path, "give EURLEX57K's dataset.zip")
    with _reading(path), zipfile.ZipFile(path) as archive:
        for base, split in (("train.jsonl", "train"), ("dev.jsonl", "validation")):
            # macOS archives carry __MACOSX/._name beside it.
            found = [member for member in archive.infolist() if member.filename.split("/")[-1] == base]
            if len(found) != 1:
                raise UserError(
                    f"the archive {path} has {len(found)} members called {base!r} where one is expected; give "
                    "EURLEX57K's dataset.zip, or unpack it and give the folder"
                )
            if found[0].flag_bits & 1:  # zipfile would raise a bare RuntimeError
                raise UserError(f"the archive {path} is encrypted; unpack it and give the folder")
            with archive.open(found[0]) as stream:
                # ZipExtFile's own readline is slow when given a limit.
                buffered = io.BufferedReader(stream, 2**20)  # pyright: ignore[reportArgumentType] (not only an IO)
                for where, text in read_jsonl(buffered, f"{path}/{base}", text_field):
                    yield Document(split, where, text)


# ------------------------------------------------------------------------------------------------ the text of a record


def text_fields(names: Collection[str], text_field: str | None = None) -> list[str]:
    """Which fields hold a record's text: text_field if given; else `text`; else EURLEX57K's four; else `content`; else
    the only one with a usual name, such as `body`, `Document` or `raw_content`. Empty where that is not clear."""
    if text_field is not None:
        return [text_field] if text_field in names else []
    if "text" in names:
        return ["text"]
    if "main_body" in names:
        return [name for name in _EURLEX_FIELDS if name in names]
    if "content" in names:
        return ["content"]
    usual = [name for name in names if name.lower() in _USUAL_FIELDS]
    return usual if len(usual) == 1 else []


def document_text(record: object, where: str, text_field: str | None = None) -> str:
    """The text of one record, from the fields that `text_fields` names.

    A list of strings is joined by newlines and a null is empty text. EURLEX57K's header usually repeats the title,
    which then is not taken twice.

    Raises:
      UserError: no such field, or a value that is no text.
    """
    if not isinstance(record, dict):
        raise UserError(
            f"{where} is not a JSON object with a text field but {type(record).__name__}; give one object per document"
        )
    fields = text_fields(record, text_field)
    if not fields:
        wanted = f"field {text_field!r}" if text_field else "field 'text', and not one with another usual name"
        raise UserError(
            f"{where} has no {wanted}; its fields are {', '.join(map(repr, record)) or 'none'}: name the one that "
            "holds the text with --text_field"
        )
    if text_field or "main_body" not in fields:
        return _field_text(record, fields[0], where)
    title, header, recitals, body = (_field_text(record, field, where).strip() for field in _EURLEX_FIELDS)
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


# ------------------------------------------------------------------------------------------- bytes that are not right


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the libraries raise on damaged or unreadable files into one sentence."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as e:
        raise UserError(f"the file {path} is damaged or incomplete ({first_line(e)}); fetch it again") from None
    except NotImplementedError as e:  # zipfile's and Arrow's, of a compression or version that they do not know
        raise UserError(
            f"the file {path} is packed in a way that cannot be read here ({first_line(e)}); unpack it and give the "
            "folder, or fetch it again if it is damaged"
        ) from None
    except OSError as e:
        if e.errno is None:  # Arrow's and bzip2's, of damaged bytes
            raise UserError(f"the file {path} is damaged or incomplete ({first_line(e)}); fetch it again") from None
        raise UserError(f"cannot read {path} ({e.strerror}); check the path and its permissions") from None


def _whole(stream: BinaryIO, name: str, first: bytes = b"") -> str:
    data = first + stream.read(MAX_DOCUMENT_BYTES + 1 - len(first))
    if len(data) > MAX_DOCUMENT_BYTES:
        raise UserError(_too_long(name))
    return _utf8(data, name)


def _utf8(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where} is not valid UTF-8 (byte 0x{data[e.start]:02x} at offset {e.start}){_seems(data)}"
        ) from None
    n_controls = len(data) - len(data.translate(None, _CONTROLS))
    if n_controls * 50 > len(data):
        raise UserError(f"{where} is no text: {n_controls:,} of its {len(data):,} bytes are controls{_seems(data)}")
    return text


def _seems(data: bytes) -> str:
    """The end of a sentence about bytes that are no UTF-8: what they seem to be, and how to convert them."""
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            return f"; it seems to be {what}, so give it the name of such a file, or convert it to UTF-8 text"
    # In the right encoding there are blanks and commas. UTF-32 comes first, because as UTF-16 it has as many.
    usual = {name: sum(map(data[:4096].decode(name, "ignore").count, ' ,."\n')) for name in _ENCODINGS}
    name = max(usual, key=usual.__getitem__)
    if usual[name] * 200 < len(data[:4096]):
        return "; convert it to UTF-8"
    return f"; it seems to be {name}: convert it with iconv -f {name} -t UTF-8"


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
        f"{where} is longer than {MAX_DOCUMENT_BYTES // 2**20} MiB, the limit for one document; cut it into several "
        "documents"
    )


def optional(module: str, what: str):
    """Imports a module of the extra `hub`; UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(
            f'{what} needs the package {module.split(".")[0]!r} ({first_line(e)}); run: pip install "altgrad-jax[hub]"'
        ) from None


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
