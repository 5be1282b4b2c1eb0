"""Which tokens step k sees: token files -> window indices -> windows.

A *window* is block_size + 1 tokens (inputs and targets overlap by all but one) that start at a multiple of
block_size; it crosses documents, whose separator is a token like any other. T tokens hold n = (T - 1) //
block_size windows.

The run consumes windows number i = 0, 1, 2, ... Window number i is entry i mod n of a permutation of [0, n)
that depends on (seed, i div n) alone: each window once per epoch, another order every epoch, and no state to
save. So the batch of step k is a pure function of (seed, k), the same on the host, on the device, after a
resume, in every format.

The permutation is a keyed bijection computed per element, for sorting random keys at every step would cost
O(n log n) and storing a permutation O(n). With a = ceil(sqrt n) and b = ceil(n / a), a number x < a*b is the
pair (x div b, x mod b), and ``ROUNDS`` rounds of an alternating Feistel network

    left  = (left  + F(right)) mod a        right = (right + F(left)) mod b

each undone by a subtraction, permute [0, a*b). F is a 32-bit mixing hash (the constants of "lowbias32", Chris
Wellons, https://nullprogram.com/blog/2018/07/31) keyed by seed, epoch and round. A result >= n is put through
again until it is < n ("cycle walking", Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"),
which leaves a bijection of [0, n). a*b exceeds n by less than a, so walking is rare, unlike on a power of
two, where up to half go on.

The functions that take ``xp`` (numpy, or jax.numpy also inside jit) give the same integers under both.

Axes: B windows, L = block_size + 1 tokens of a window, T tokens of a file.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from altgrad_jax.data.prepare import BIN_FILES, read_meta
from altgrad_jax.data.token_files import open_tokens
from altgrad_jax.data.tokenizer import get_tokenizer, tokenizer_name
from altgrad_jax.errors import UserError

ROUNDS = 8
VALIDATION_SEED = 0x56414C  # fixed: every run on the same data is evaluated on the same windows
_GOLDEN = 0x9E3779B9


@dataclasses.dataclass(frozen=True)
class TokenData:
    """Verified token files. ``train_T`` and ``val_T`` are read-only uint16 memory maps; ``fingerprint`` is a
    sha256 over both files' sha256 and the tokenizer's name: equal fingerprints mean equal data."""

    dir: Path
    train_T: np.ndarray
    val_T: np.ndarray
    meta: dict
    fingerprint: str
    n_train_windows: int
    n_val_windows: int


def load_token_data(
    data_dir: str | os.PathLike, *, vocab_size: int, block_size: int, tokenizer: str | None = None
) -> TokenData:
    """Opens `train.bin` and `val.bin` and checks them: every byte is read once.

    vocab_size: the model's, which may exceed the tokenizer's. tokenizer: the setting; files without `meta.json`
    (nanoGPT's), whose source is "unknown", must hold its tokens, and are looked into (`token_files`).

    Raises:
      UserError: a file is missing, empty, altered since it was prepared, of another tokenizer or type, holds a token
        that the model has no embedding for, or is shorter than one window.
    """
    folder = Path(data_dir)
    meta = read_meta(folder)
    name = None if tokenizer is None else tokenizer_name(tokenizer)
    if name is not None and meta["tokenizer"] not in (None, name):
        raise UserError(
            f"the data in {str(folder)!r} was made by the tokenizer {meta['tokenizer']!r} but {name!r} is asked for; "
            f"set config.tokenizer to {meta['tokenizer']!r} or choose another --data_dir"
        )
    tokens, sha256, largest = {}, {}, {}
    for split in ("train", "val"):
        file = f"{split}.bin"
        tokens[split], sha256[file], largest[split] = _checked(
            folder / file, tokenizer, vocab_size, block_size, meta.get("sha256")
        )
        if meta.get("n_tokens", {}).get(split, len(tokens[split])) != len(tokens[split]):
            raise UserError(
                f"{folder / 'meta.json'} has n_tokens {meta['n_tokens'][split]} for {file}, which holds "
                f"{len(tokens[split])}; prepare the data again with scripts/prepare_data.py --force"
            )
    meta = {
        **meta,
        "n_tokens": {split: len(tokens[split]) for split in tokens},
        "tokenizer": meta["tokenizer"] or name,
        "sha256": sha256,
        "largest_token": max(largest.values()),
    }
    parts = "\n".join([str(meta["tokenizer"]), *sha256.values()])
    return TokenData(
        folder,
        tokens["train"],
        tokens["val"],
        meta,
        hashlib.sha256(parts.encode()).hexdigest(),
        *((len(tokens[split]) - 1) // block_size for split in ("train", "val")),
    )


def open_token_file(
    path: str | os.PathLike, *, vocab_size: int, block_size: int, tokenizer: str | None = None
) -> np.ndarray:
    """One file of tokens as a read-only memory map, checked as `load_token_data` checks its two.

    A meta.json beside it that records the file's sha256 says what it is; without one it is looked into.

    Raises:
      UserError: as `load_token_data`.
    """
    path = Path(path)
    complete = all(path.with_name(file).is_file() for file in (*BIN_FILES, "meta.json"))
    recorded = read_meta(path.parent) if complete and path.name in BIN_FILES else {}
    name = None if tokenizer is None else tokenizer_name(tokenizer)
    if name is not None and recorded.get("tokenizer", name) != name:
        raise UserError(
            f"{path} was made by the tokenizer {recorded['tokenizer']!r}, but the model reads {name!r}; give its tokens"
        )
    return _checked(path, tokenizer, vocab_size, block_size, recorded.get("sha256"))[0]


def _checked(
    path: Path, tokenizer: str | None, vocab_size: int, block_size: int, recorded: Mapping[str, str] | None
) -> tuple[np.ndarray, str, int]:
    """(tokens, their sha256 as uint16, the largest one) of a file. recorded: {file name: sha256} where it is known."""
    known = None if recorded or tokenizer is None else get_tokenizer(tokenizer)
    tokens_T = open_tokens(path, known, trusted=bool(recorded))
    if len(tokens_T) < block_size + 1:
        raise UserError(
            f"{path} holds {len(tokens_T):,} tokens, fewer than one window of block_size + 1 = {block_size + 1}; use a "
            "smaller config.block_size or more text"
        )
    digest, largest = hashlib.sha256(), 0
    for start in range(0, len(tokens_T), 2**22):
        piece = np.ascontiguousarray(tokens_T[start : start + 2**22])
        digest.update(piece.data)
        largest = max(largest, int(piece.max()))
    if recorded and digest.hexdigest() != recorded[path.name]:
        raise UserError(
            f"{path} has changed since it was prepared (sha256 {digest.hexdigest()}, meta.json says "
            f"{recorded[path.name]}); prepare it again with scripts/prepare_data.py --force"
        )
    if largest >= vocab_size:
        raise UserError(
            f"{path} holds the token {largest} but vocab_size is {vocab_size}; set config.vocab_size to at least "
            f"{largest + 1} or choose another --data_dir"
        )
    return tokens_T, digest.hexdigest(), largest


# ----------------------------------------------------------------------------------------------------------
# The order of the windows


def _mix(x, xp):
    """A bijection of uint32 that spreads every input bit over the word (lowbias32)."""
    x = (x ^ (x >> xp.uint32(16))) * xp.uint32(0x7FEB352D)
    x = (x ^ (x >> xp.uint32(15))) * xp.uint32(0x846CA68B)
    return x ^ (x >> xp.uint32(16))


def permute_windows(numbers, n_windows: int, seed: int, xp=np):
    """Window numbers of a run -> indices of windows, int32 of the same shape.

    ``numbers``: integers in [0, 2^32), any shape; number i belongs to epoch i // n_windows, and within an
    epoch the result is a permutation of [0, n_windows). ``n_windows``: a Python int, 1 to 2^31 - 1. ``seed``:
    any Python int (its lower 64 bits count) or, for seeds as traced data, a uint32 scalar, which gives what
    the same Python int gives.
    """
    assert 1 <= n_windows < 2**31, n_windows
    u = xp.uint32
    # Arrays, never NumPy scalars: scalars warn when they wrap around.
    shape = xp.shape(numbers)
    i_N = xp.asarray(numbers).astype(xp.uint32).reshape(-1)
    n = u(n_windows)
    a = math.isqrt(n_windows - 1) + 1
    b = -(-n_windows // a)

    low, high = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF) if isinstance(seed, int) else (seed, 0)
    key_N = _mix(xp.full(i_N.shape, low, xp.uint32), xp) ^ u(high)
    key_N = _mix(_mix(key_N, xp) + i_N // n, xp)
    round_keys = [_mix(key_N + u((r + 1) * _GOLDEN & 0xFFFFFFFF), xp) for r in range(ROUNDS)]

    def feistel(x_N):
        left, right = x_N // u(b), x_N % u(b)
        for r, key in enumerate(round_keys):
            if r % 2 == 0:
                left = (left + _mix(right ^ key, xp) % u(a)) % u(a)
            else:
                right = (right + _mix(left ^ key, xp) % u(b)) % u(b)
        return left * u(b) + right

    def walk(x_N):
        return xp.where(x_N >= n, feistel(x_N), x_N)

    x_N = feistel(i_N % n)
    if xp is np:
        while (x_N >= n).any():
            x_N = walk(x_N)
    else:
        from jax import lax

        x_N = lax.while_loop(lambda x: xp.any(x >= n), walk, x_N)
    return x_N.astype(xp.int32).reshape(shape)


def window_indices(first, count: int, n_windows: int, seed: int, xp=np):
    """The window indices, int32[count], of the run's windows number first .. first + count - 1 (below 2^32).

    A step that consumes B windows has ``first`` = step * B. ``first`` may be traced; ``count`` and
    ``n_windows`` are Python ints.
    """
    first = xp.asarray(first).astype(xp.uint32).reshape(-1)  # one element: a NumPy scalar would warn on wrap-around
    return permute_windows(first + xp.arange(count, dtype=xp.uint32), n_windows, seed, xp)


def validation_windows(n_val_windows: int, count: int) -> np.ndarray:
    """``count`` distinct indices of validation windows, int32[count]: the same for every run on the same
    data.

    A smaller count is a prefix of a larger one.

    Raises:
        UserError: there are fewer than ``count`` windows, or count is not positive.
    """
    if not 1 <= count <= n_val_windows:
        raise UserError(
            f"{count} validation windows are asked for but the validation data holds {n_val_windows}; set "
            f"config.eval_windows to a number from 1 to {n_val_windows}, or prepare more validation text"
        )
    return window_indices(0, count, n_val_windows, VALIDATION_SEED)


def gather_windows(tokens_T, index_B, block_size: int, xp=np):
    """The tokens of windows ``index_B`` (any shape B, values in [0, (T - 1) // block_size)): dtype of
    ``tokens_T``, shape B + [block_size + 1].

    Under jax.numpy positions are int32, so T must be below 2^31 (4 GiB of tokens; ``HostStream`` serves
    larger files).
    """
    if xp is np:
        starts = np.asarray(index_B, np.int64)[..., None] * block_size
        return np.asarray(tokens_T[starts + np.arange(block_size + 1)])
    import jax

    assert tokens_T.shape[0] < 2**31, "token positions must fit int32: stream this file from the host"

    def one(index):
        return jax.lax.dynamic_slice(tokens_T, (index * block_size,), (block_size + 1,))

    index_B = xp.asarray(index_B, xp.int32)
    return jax.vmap(one)(index_B.reshape(-1)).reshape(*index_B.shape, block_size + 1)


def choose_windows(tokens_T, block_size, eval_windows, eval_batch_size):
    """(windows uint16 [E, L+1], batch size): the fixed choice that every evaluation of this file makes.

    E is eval_windows, or as many as the file holds where that is less (None: all), without a last incomplete batch.
    """
    available = (len(tokens_T) - 1) // block_size
    n = available if eval_windows is None else min(eval_windows, available)
    batch_size = min(eval_batch_size, n)
    n -= n % batch_size
    return gather_windows(tokens_T, validation_windows(available, n), block_size, xp=np), batch_size


# ----------------------------------------------------------------------------------------------------------
# From the host, for a corpus too large for the device


class HostStream:
    """The same batches from the file, read ahead by a thread: `get(first_step, n_steps)` -> uint16 [n, B, L].

    batch_size: windows per step. The thread stays up to `depth` steps ahead; asking for a step out of order is allowed.
    `close()` ends the thread.
    """

    def __init__(self, tokens_T: np.ndarray, *, batch_size: int, block_size: int, seed: int, depth: int = 16):
        self._tokens_T, self._block_size, self._seed = tokens_T, block_size, seed
        self._batch_size, self._depth = batch_size, depth
        self._n_windows = (len(tokens_T) - 1) // block_size
        self._ahead: dict[int, concurrent.futures.Future] = {}  # of step
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "token-stream")

    def get(self, first_step: int, n_steps: int) -> np.ndarray:
        """The batches of steps first_step .. first_step + n_steps - 1. Raises what the reading raised."""
        soon = range(first_step, first_step + n_steps + self._depth)
        for step in self._ahead.keys() - set(soon):
            self._ahead.pop(step).cancel()
        for step in soon:
            if step not in self._ahead:
                self._ahead[step] = self._reader.submit(self._batch, step)
        return np.stack([self._ahead.pop(step).result() for step in soon[:n_steps]])

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _batch(self, step: int) -> np.ndarray:
        index_B = window_indices(step * self._batch_size, self._batch_size, self._n_windows, self._seed)
        return np.asarray(gather_windows(self._tokens_T, index_B, self._block_size))
