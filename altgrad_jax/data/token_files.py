"""What a file of tokens holds, seen from its contents: files of other conventions are read as they are, or refused.

A file whose sha256 stands in its meta.json is what scripts/prepare_data.py wrote. Any other is looked into:

- magic numbers of other kinds of files, and nanoGPT's meta.pkl beside it (never opened), which means another tokenizer;
- the numbers as each type of LAYOUTS. Under the right one the tokens are text of the tokenizer: decoded and encoded
  again, SAME of them come back. Under a wrong type, or of another tokenizer, they do not: neighbours merge otherwise.
"""

from __future__ import annotations

import collections
import os
from pathlib import Path

import numpy as np

from altgrad_jax.data.tokenizer import Tokenizer
from altgrad_jax.errors import UserError
from altgrad_jax.files import require_file

SAME = 0.97  # of the tokens of the median window
_WINDOW, _WINDOWS = 512, 16
CONTROLS = [chr(i) for i in range(32) if chr(i) not in "\t\n\v\f\r\x1b"]
_HEADER = 1024  # bytes of llm.c's, 256 int32
# In the order in which they are taken: as a narrower type the tokens of a wide one are text with zeros between.
LAYOUTS = {"<i8": "int64", ">i8": "big-endian int64", "<u4": "uint32 or int32", ">u4": "big-endian uint32",
           "<u2": "uint16", ">u2": "big-endian uint16", "<f4": "float32", "<f8": "float64", "u1": "uint8"}  # fmt: skip
_MAGIC = {
    b"\x93NUMPY": ("an array of np.save", "np.load({path!r}).astype('<u2').tofile({new!r})"),
    **dict.fromkeys(
        (np.array(number, "<i4").tobytes() for number in (20240520, 20240801)),
        ("a file of llm.c with its header of 1,024 bytes", "np.fromfile({path!r}, '<u2', offset=1024).tofile({new!r})"),
    ),
    b"PK\3\4": ("a zip, such as np.savez or torch.save writes", ""),
    b"MMIDIDX": ("an index of Megatron", ""),
    b"\x1f\x8b": ("gzip", ""),
    b"\x28\xb5\x2f\xfd": ("zstd", ""),
    b"PAR1": ("parquet", ""),
    b"\x89HDF": ("HDF5", ""),
    b"ARROW1": ("Arrow", ""),
    **{bytes([128, protocol]): ("a pickle", "") for protocol in range(2, 6)},
}


def open_tokens(path: Path, tokenizer: Tokenizer | None, *, trusted: bool = False) -> np.ndarray:
    """The tokens of a file as a read-only memory map: uint16 [T], of every second uint16 where the file has uint32.

    tokenizer: whose tokens they should be; None: not known, so that only what can be no uint16 at all is refused.
    trusted: the caller compares the sha256 of the tokens with one that was recorded.

    Raises:
      UserError: it is no file of tokens that can be read here; says what it seems to be, and how to convert it.
    """
    require_file(path, "give a file of uint16 tokens such as val.bin")
    n_bytes = path.stat().st_size
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER)
        if not trusted:
            _refuse_other_kinds(path, head)
        if n_bytes % 2:
            raise UserError(
                f"{path} has {n_bytes:,} bytes, an odd number, so it is no file of uint16 tokens or it was cut off; "
                "prepare it again with scripts/prepare_data.py --force"
            )
        if not n_bytes:
            return np.zeros(0, "<u2")
        tokens_T = np.memmap(path, "<u2", mode="r")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if trusted:
        return tokens_T
    layout = _layout(path, tokens_T, tokenizer)
    if layout == "<u2":
        return tokens_T
    if layout == "<u4":
        if (highest := int(np.max(tokens_T[1::2]))) == 0:
            return tokens_T[::2]
        raise UserError(
            f"{path} holds uint32 tokens up to {highest << 16:,} or more, above the 65,535 that can be used"
        )
    raise UserError(
        f"{path} seems to hold {LAYOUTS[layout]} in place of uint16; convert it: "
        f"{_command('np.fromfile({path!r}, ' + repr(layout) + ').astype({u2!r}).tofile({new!r})', path)}"
    )


def _command(code: str, path: Path) -> str:
    code = code.format(path=path.name, new=f"new-{path.name}", u2="<u2")
    return f'python -c "import numpy as np; {code}"'


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    for magic, (what, code) in _MAGIC.items():
        if head.startswith(magic):
            how = f"convert it: {_command(code, path)}" if code else "prepare the text with scripts/prepare_data.py"
            raise UserError(f"{path} seems to be {what}, not a file of uint16 tokens; {how}")
    if os.path.lexists(path.with_name("meta.pkl")):
        raise UserError(
            f"{path} has a meta.pkl beside it, by which nanoGPT says that its tokens are of another tokenizer, such as "
            "characters; prepare the text itself with scripts/prepare_data.py --input, in another folder"
        )
    printable = sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    if len(head) >= 32 and printable > 0.98 * len(head):
        raise UserError(
            f"{path} seems to be text (or bytes as uint8), not a file of uint16 tokens; prepare it with "
            "scripts/prepare_data.py --input, under a name that ends in .txt"
        )


def _layout(path: Path, tokens_T: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """The type of the numbers; UserError where none makes sense."""
    if tokenizer is None:
        return "<u2"
    seen = {}
    for name in LAYOUTS:
        if (size := np.dtype(name).itemsize) <= tokens_T.nbytes:
            numbers_T = np.memmap(path, name, mode="r", shape=(tokens_T.nbytes // size,))
            seen[name] = plausibility(numbers_T, tokenizer)
    sound = {name: median for name, (share, median) in seen.items() if share >= SAME}
    if {"<u2", ">u2"} <= sound.keys():  # a text of few words, where frequent tokens, those of lower ids, tell the order
        del sound[max("<u2", ">u2", key=sound.__getitem__)]
    if sound:
        return next(iter(sound))
    raise UserError(
        f"{path} holds numbers that are no text of the tokenizer {tokenizer.name!r}: of the tokens of a window "
        f"{max(share for share, _ in seen.values()):.1%} come back when they are decoded and encoded again, where "
        f"{SAME:.0%} should. They are of another tokenizer or type, or random: prepare the text with "
        "scripts/prepare_data.py, or say in a meta.json what the file is (docs/your_data.md)"
    )


def plausibility(numbers_T: np.ndarray, tokenizer: Tokenizer) -> tuple[float, float]:
    """(The share of tokens that come back when they are decoded and encoded again, the median token): medians over
    windows spread over the file. The share is 0 for a window with a number that is no token, with text that is largely
    control characters, or where rare tokens, the upper half of a large vocabulary, are the rule."""
    starts = range(0, max(1, len(numbers_T) - _WINDOW + 1), max(_WINDOW, len(numbers_T) // _WINDOWS))
    seen = [_share(np.asarray(numbers_T[start : start + _WINDOW]), tokenizer) for start in starts]
    shares, medians = zip(*seen)
    return float(np.median(shares)), float(np.median(medians))


def _share(numbers: np.ndarray, tokenizer: Tokenizer) -> tuple[float, float]:
    if not np.all((numbers >= 0) & (numbers < tokenizer.vocab_size)) or np.any(numbers != np.floor(numbers)):
        return 0.0, 0.0
    ids = numbers.astype(np.int64)
    same = most = n_controls = n_characters = 0
    for document in np.split(ids, np.flatnonzero(ids == tokenizer.eot)):
        document = document[document != tokenizer.eot].tolist()
        text = tokenizer.decode(document)
        again = tokenizer.encode(text).tolist()
        overlap = (collections.Counter(document) & collections.Counter(again)).total()
        # Some tokenizers add or drop a blank at either end of a text.
        same += min(len(document), overlap + 2 * (len(document) >= 16))
        most += max(len(document), len(again))
        n_controls += sum(map(text.count, CONTROLS))
        n_characters += len(text)
    median = float(np.median(ids))
    rare = tokenizer.vocab_size > 1000 and median > tokenizer.vocab_size / 2
    return 0.0 if rare or n_controls * 20 > n_characters else same / most if most else 1.0, median
