"""Text to token files: `train.bin`, `val.bin` (nanoGPT's layout) and `meta.json`.

- A `.bin` is the tokens and nothing else: uint16, little endian, every document followed by the tokenizer's separator.
- `meta.json` says what they are (source, licence, counts, tokenizer, split, sha256 of both). It holds no time, path or
  version, so preparing the same text again gives the same three files to the byte, on any machine.
- Split. The source's own validation split where it has one. Else `val_fraction` of the *documents*, at least one and at
  most all but one: those with the smallest sha256 of (seed, document number). Documents are never cut, with one
  exception: a single .txt, whose last `val_fraction` of tokens is the validation text.
- Atomic. Everything is written to a hidden directory beside the output, which is renamed when it is complete: a killed
  run leaves nothing that looks finished. The next preparation removes what it left. A lock keeps two of them apart.
- Memory is bounded by a batch of documents: tokens go to the disk as they come. All documents are tokenized into one
  file first, for only then is their number known, and the split with it; the copy into two files costs little.

`resolve` is what a training run calls: it finds prepared data or prepares it.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from altgrad_jax import files
from altgrad_jax.data import sources
from altgrad_jax.data.duplicates import duplicates
from altgrad_jax.data.sources import Source, SourceUnavailable
from altgrad_jax.data.tokenizer import Tokenizer, get_tokenizer
from altgrad_jax.errors import UserError

SCHEMA_VERSION = 1
DATA_SOURCES = ("auto", "prepared", *sources.SOURCES)
SPLIT_SEED = 42
VAL_FRACTION = 0.05
BIN_FILES = ("train.bin", "val.bin")
SHOWN = 12  # names of skipped files

# Characters tokenized in one go: enough documents to keep the threads busy, few enough to hold.
_BATCH_CHARS = 2**22


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A directory of token files. warnings: sentences the user must see. is_sample: it is the small sample, not the
    corpus a result should be based on. skipped: files of a local folder that were not read."""

    dir: Path
    meta: dict
    is_sample: bool
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def prepare(
    source: Source,
    out_dir: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    split_seed: int = SPLIT_SEED,
    val_fraction: float = VAL_FRACTION,
    progress: bool = True,
    force: bool = False,
) -> dict:
    """Tokenizes `source` into `out_dir` and returns the contents of its meta.json.

    split_seed, val_fraction (in (0, 1)): of a source without a split.

    Raises:
      UserError: a bad fraction, no usable documents, a directory that holds something else (or prepared data, without
        `force`), no room to write; and whatever the source raises.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}; it must lie between 0 and 1, e.g. {VAL_FRACTION}")
    out = Path(os.path.realpath(out_dir))
    _check_replaceable(out, force)
    # The first document is taken before anything is written, so that a source that cannot be had leaves no
    # trace.
    documents = source.documents()
    documents = itertools.chain(list(itertools.islice(documents, 1)), documents)
    with _written_atomically(out, force) as work:
        meta = _write(source, documents, work, tokenizer, split_seed, val_fraction, progress)
    return meta


def resolve(
    data_dir: str | os.PathLike | None, data_source: str, tokenizer: str, *, progress: bool = True
) -> PreparedData:
    """The data of a run: what `data_dir` (default data/TOKENIZER) holds, or else prepared there now.

    data_source: "auto", prepared data if there, else eurlex57k, else, with a warning, the sample; "prepared", it must
      be there; or the name of a corpus, which is prepared if not there. Token files without meta.json (nanoGPT's) count
      as prepared under the first two.

    Raises:
      UserError: unknown source; data there that contradicts the request; no data to be had.
    """
    tok = get_tokenizer(tokenizer)
    out = Path(data_dir if data_dir is not None else Path("data") / tok.name)
    if data_source not in DATA_SOURCES:
        raise UserError(
            f"data_source is {data_source!r}; it must be one of {', '.join(map(repr, DATA_SOURCES))} (local "
            "documents are prepared with scripts/prepare_data.py --input, then 'prepared')"
        )
    if not has_tokens(out):
        if data_source == "prepared":
            raise UserError(
                f"data_source is 'prepared' but {str(out)!r} holds no {' and '.join(BIN_FILES)}; run "
                "scripts/prepare_data.py, or let data_source=auto prepare them"
            )
        with contextlib.suppress(AlreadyPrepared):  # by another process, while this one waited for it
            return prepare_source(data_source, out, tok, progress=progress)
    return _found(out, tok.name, None if data_source in ("auto", "prepared") else data_source)


def prepare_source(
    what: str | Path,
    out_dir: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    text_field: str | None = None,
    split_names: bool = True,
    split_seed: int = SPLIT_SEED,
    val_fraction: float = VAL_FRACTION,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    force: bool = False,
) -> PreparedData:
    """`prepare` for a source given by its name (a string, "auto" included) or local documents (a Path).

    text_field, split_names: of local documents, as `documents.local` has them.

    Raises:
      UserError: as `prepare`; under "auto", neither eurlex57k nor the sample can be had; an option of local documents
        for a named source.
    """

    def make(source: Source, *warnings: str) -> PreparedData:
        options: Any = dict(split_seed=split_seed, val_fraction=val_fraction, progress=progress, force=force)
        meta = prepare(source, out_dir, tokenizer, **options)
        return _prepared(Path(out_dir), meta, warnings, source.skipped)

    def get(source_name: str) -> Source:
        return sources.get_source(source_name, cache_dir=cache_dir, progress=progress)

    if isinstance(what, Path):
        return make(sources.local(what, text_field=text_field, split_names=split_names))
    if text_field is not None or not split_names:
        given = f"text_field is {text_field!r}" if text_field is not None else "split_names is False"
        raise UserError(f"{given} but the source is {what!r}; leave it out, it is for --input only")
    if what != "auto":
        return make(get(what))
    try:
        return make(get("eurlex57k"))
    except SourceUnavailable as e:
        if has_tokens(out_dir):
            raise  # --force asked for something better than what is there, not for the sample in its place
        reason = str(e)
    try:
        return make(get("sample"), f"the corpus eurlex57k could not be had: {reason}")
    except SourceUnavailable as e:
        raise UserError(f"no training data: {reason}; and neither could the sample be had: {e}") from None


def has_tokens(data_dir: str | os.PathLike) -> bool:
    """Whether ``data_dir`` holds anything that claims to be prepared data, complete or not."""
    return any(os.path.lexists(Path(data_dir) / name) for name in (*BIN_FILES, "meta.json"))


def read_meta(data_dir: str | os.PathLike) -> dict:
    """The `meta.json` of prepared data; for nanoGPT's token files, which have none, {"source": "unknown", ...}.

    Raises:
        UserError: a file is missing, or ``meta.json`` cannot be read or is of another schema.
    """
    folder = Path(data_dir)
    missing = [name for name in BIN_FILES if not os.path.isfile(folder / name)]
    again = "prepare the data again with scripts/prepare_data.py --force"
    if missing:
        raise UserError(f"the data directory {str(folder)!r} has no {' and no '.join(missing)}; {again}")
    path = folder / "meta.json"
    if not os.path.lexists(path):
        return {"schema_version": SCHEMA_VERSION, "source": "unknown", "licence": "unknown", "tokenizer": None}
    meta = files.read_json(path, again)
    version = meta.get("schema_version") if isinstance(meta, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version!r} where {SCHEMA_VERSION} is expected; {again}")
    right = {
        **{key: ("a name is", lambda value: isinstance(value, str)) for key in ("source", "licence", "tokenizer")},
        "n_tokens": ("whole numbers for train and val are", lambda value: _holds(value, ("train", "val"), int)),
        "sha256": ("texts for train.bin and val.bin are", lambda value: _holds(value, BIN_FILES, str)),
    }
    for key, (what, accepts) in right.items():
        if key not in meta:
            raise UserError(f"{path} has no {key!r}; {again}")
        if not accepts(meta[key]):
            raise UserError(f"{path} has {key} {meta[key]!r} where {what} expected; {again}")
    return meta


def _holds(value: object, names: Sequence[str], kind: type) -> bool:
    return isinstance(value, dict) and all(type(value.get(name)) is kind for name in names)


def summary(out_dir: str | os.PathLike, meta: dict, skipped: Sequence[str] = ()) -> str:
    """What was prepared, in a few lines. skipped: files that were not read."""
    lines = [
        f"{out_dir}: {meta.get('title', meta['source'])}",
        f"  tokenizer {meta['tokenizer']}, licence {meta['licence']}",
    ]
    for split in ("train", "val"):
        documents = f"{meta['n_documents'][split]:>9,} documents  " if "n_documents" in meta else ""
        lines.append(f"  {split + '.bin':<10}{documents}{meta['n_tokens'][split]:>13,} tokens")
    if "duplicates" in meta:
        lines.append(f"  {describe_duplicates(meta['duplicates'])}")
    if "left_out" in meta:
        lines.append(f"  not used: {meta['left_out']}")
    if meta.get("n_empty_documents"):
        lines.append(f"  {meta['n_empty_documents']:,} empty documents were skipped")
    if skipped:
        more = f" and {len(skipped) - SHOWN:,} more" if len(skipped) > SHOWN else ""
        lines.append(f"  not read, {len(skipped):,} of other kinds or hidden: {', '.join(skipped[:SHOWN])}{more}")
    return "\n".join(lines)


def describe_duplicates(facts: dict) -> str:
    """The shares of `duplicates.duplicates`, and the texts in both splits, in a sentence without its full stop."""
    both = facts.get("documents_in_both")
    return (f"{both:,} validation documents are training documents too; " if both else "") + (
        f"{facts['verbatim']:.1%} of the {facts['windows']:,} validation windows of {facts['window']} tokens occur "
        f"verbatim in the training tokens, {facts['near']:.1%} nearly"
    )


def banner(warnings: Iterable[str]) -> str:
    """Sentences in one frame that is not overlooked among other lines."""
    lines = [line for warning in warnings for line in textwrap.wrap(warning, 100)]
    return "\n".join(["!" * 108, *(f"!!! {line:<100} !!!" for line in lines), "!" * 108])


# ----------------------------------------------------------------------------------------------------------


class AlreadyPrepared(UserError):
    """The output directory holds prepared data, and ``force`` was not given."""


def _prepared(out: Path, meta: dict, warnings: tuple[str, ...], skipped: tuple[str, ...] = ()) -> PreparedData:
    is_sample = meta["source"] == "sample"
    if both := meta.get("duplicates", {}).get("documents_in_both"):
        warnings += (
            f"{both:,} of the {meta['n_documents']['val']:,} validation documents have the same text as a training "
            "document, so the validation loss is partly that of text the model was trained on: remove one of the two",
        )
    if is_sample:
        n = meta["n_tokens"]["train"]
        warnings += (
            f"TRAINING ON THE SMALL SAMPLE: {n:,} tokens of {meta.get('title', 'EU acts')}. A model sees each of them "
            "many times and will learn them by heart; loss and perplexity say nothing about EU legislation. For the "
            f"real corpus: scripts/prepare_data.py --source eurlex57k --tokenizer {meta['tokenizer']} --out {out} "
            "--force",
        )
    return PreparedData(out, meta, is_sample, warnings, skipped)


def _found(out: Path, tokenizer: str, source: str | None) -> PreparedData:
    """The data in `out`, which must be what was asked for: a run never trains on another corpus than it names."""
    meta = read_meta(out)
    for key, wanted in (("tokenizer", tokenizer), ("source", source)):
        if wanted is not None and meta.get(key) not in (None, wanted):
            raise UserError(
                f"the data in {str(out)!r} has {key} {meta[key]!r} but {wanted!r} is asked for; choose another "
                "--data_dir, ask for what is there, or prepare it again with scripts/prepare_data.py --force"
            )
    return _prepared(out, meta, ())


def _check_replaceable(out: Path, force: bool) -> None:
    if not os.path.exists(out):
        return
    if not out.is_dir():
        raise UserError(f"the output {str(out)!r} is a file; give a directory with --out")
    others = sorted({p.name for p in out.iterdir()} - {*BIN_FILES, "meta.json"})
    if others:
        raise UserError(
            f"the output directory {str(out)!r} holds other files ({', '.join(others[:3])}); it is replaced"
            " as a whole, so give a new or empty directory with --out"
        )
    if has_tokens(out) and not force:
        raise AlreadyPrepared(
            f"the output directory {str(out)!r} already holds token files; give --force to replace them, "
            "or another --out"
        )


@contextlib.contextmanager
def _written_atomically(out: Path, force: bool) -> Iterator[Path]:
    """A hidden directory beside ``out`` that becomes ``out`` when the block ends well, and is gone when it
    does not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(out.with_name(f".{out.name}.lock"), str(out), waits_for=f"another preparation of {out}"):
            for leftover in out.parent.glob(f".{out.name}.*.tmp"):
                shutil.rmtree(leftover)
            _check_replaceable(out, force)
            work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
            try:
                new, old = work / "new", work / "old"
                new.mkdir()
                yield new
                for path in new.iterdir():
                    files.sync(path)
                if out.exists():  # a directory cannot be renamed onto a full one; between these two nothing is there
                    os.rename(out, old)
                os.rename(new, out)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as e:
        raise UserError(
            f"cannot write the prepared data to {str(out)!r} ({e.strerror}: {e.filename}); make room there or"
            " give another directory with --out"
        ) from None


def _write(
    source: Source,
    documents: Iterable[sources.Document],
    work: Path,
    tok: Tokenizer,
    split_seed: int,
    val_fraction: float,
    progress: bool,
) -> dict:
    """Tokenizes into `work`: train.bin, val.bin, and meta.json last. Returns meta."""
    everything = work / "all.bin"
    ends, splits, digests = [0], [], array.array("Q")
    n_empty, text_digest = 0, hashlib.sha256()
    bar = sources.progress_bar(f"tokenizing {source.title}", source.n_documents, "documents", enabled=progress)
    with open(everything, "wb") as f, bar as advance:
        for batch in _batches(documents):
            kept = [d for d in batch if d.text.strip()]
            n_empty += len(batch) - len(kept)
            for document, ids in zip(kept, _encoded(tok, kept)):
                f.write(np.append(ids, np.uint16(tok.eot)).astype("<u2", copy=False).tobytes())
                ends.append(ends[-1] + len(ids) + 1)
                splits.append(document.split)
                text = document.text.encode("utf-8", "replace")
                text_digest.update(len(text).to_bytes(8, "little") + text)
                digests.append(int.from_bytes(hashlib.blake2b(text.strip(), digest_size=8).digest(), "little"))
            advance(len(batch), f"{ends[-1]:,} tokens")
    if len(splits) == 1 and source.plain_text:
        # nanoGPT's split of one text: its beginning and its end.
        ends.insert(1, ends[1] - min(max(1, round(val_fraction * ends[1])), ends[1] - 1))
        in_val, split = [False, True], "position"
    else:
        in_val, split = _choose_split(splits, split_seed, val_fraction, source.title, n_empty)
    counts = _copy_split(everything, ends, in_val, work)
    everything.unlink()
    train_T, val_T = (np.memmap(work / name, "<u2", mode="r") for name in BIN_FILES)
    facts = duplicates(train_T, val_T)
    if split != "position":
        chosen = np.array(in_val)
        if both := int(np.isin(np.array(digests)[chosen], np.array(digests)[~chosen]).sum()):
            facts["documents_in_both"] = both
    meta = {
        "schema_version": SCHEMA_VERSION,
        "source": source.name,
        "title": source.title,
        "input": source.input_name,
        "licence": source.licence,
        "url": source.url,
        "document": source.unit,
        "left_out": source.left_out,
        "n_documents": {"train": len(in_val) - sum(in_val), "val": sum(in_val)},
        "n_empty_documents": n_empty,
        "n_tokens": {name: counts[name]["n_tokens"] for name in ("train", "val")},
        "tokenizer": tok.name,
        "vocab_size": tok.vocab_size,
        "separator": tok.eot,
        "largest_token": max(c["largest"] for c in counts.values()),
        "dtype": "uint16, little endian",
        "split": split,
        "split_seed": split_seed if split == "seed" else None,
        "val_fraction": None if split == "source" else val_fraction,
        "n_bytes": {f"{name}.bin": 2 * c["n_tokens"] for name, c in counts.items()},
        "sha256": {f"{name}.bin": c["sha256"] for name, c in counts.items()},
        "text_sha256": text_digest.hexdigest(),
        "duplicates": facts,
    }
    meta = {key: value for key, value in meta.items() if value is not None or key in ("split_seed", "val_fraction")}
    (work / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return meta


def _batches(documents: Iterable[sources.Document]) -> Iterator[list[sources.Document]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encoded(tok: Tokenizer, documents: Sequence[sources.Document]) -> list[np.ndarray]:
    try:
        return tok.encode_batch([document.text for document in documents])
    except Exception as error:  # the libraries have no class of their own, and do not say which text it was
        for document in documents:
            try:
                tok.encode(document.text)
            except Exception:
                raise UserError(
                    f"{document.where} cannot be tokenized with {tok.name!r} ({sources.first_line(error)}); mend that "
                    "document, or take it out"
                ) from error
        raise


def _choose_split(
    splits: list[str | None], seed: int, val_fraction: float, title: str, n_empty: int
) -> tuple[list[bool], str]:
    """For each document whether it is validation, and who decided it: "source" or "seed"."""
    skipped = f" ({n_empty:,} empty ones were skipped)" if n_empty else ""
    if len(splits) < 2:
        raise UserError(
            f"{title} has {len(splits)} documents with text{skipped}; at least 2 are needed, one for training"
            " and one for validation: give more"
        )
    if any(splits):
        in_val = [split == "validation" for split in splits]
        if all(in_val) or not any(in_val):
            raise UserError(
                f"{title} has no documents with text in its {'training' if all(in_val) else 'validation'} "
                f"split{skipped}; give documents for both"
            )
        return in_val, "source"
    n_val = min(max(1, round(val_fraction * len(splits))), len(splits) - 1)
    by_hash = sorted(range(len(splits)), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    chosen = set(by_hash[:n_val])
    return [i in chosen for i in range(len(splits))], "seed"


def _copy_split(everything: Path, ends: list[int], in_val: list[bool], work: Path) -> dict[str, dict]:
    """Copies each document's tokens to train.bin or val.bin; count, largest token and sha256 of each. ends: 0, then
    where each document ends."""
    tokens_T = np.memmap(everything, "<u2", mode="r")
    facts = {}
    for name, wanted in (("train", False), ("val", True)):
        path, n_tokens, largest = work / f"{name}.bin", 0, 0
        with open(path, "wb") as f:
            for start, end, val in zip(ends, ends[1:], in_val):
                if val == wanted:
                    f.write(tokens_T[start:end].tobytes())
                    n_tokens, largest = n_tokens + end - start, max(largest, int(tokens_T[start:end].max()))
        facts[name] = {"n_tokens": n_tokens, "largest": largest, "sha256": files.file_sha256(path)}
    return facts
