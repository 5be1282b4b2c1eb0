"""How much of the validation text stands in the training text too.

A loss on text that the model was trained on says less. Two shares of the validation windows are counted at preparation,
of neighbouring windows of WINDOW tokens each:

    verbatim  the whole window occurs in the training tokens, at any position
    near      at least NEAR of its tokens lie in stretches of STRETCH tokens that occur there; so a window in which a
              few tokens differ counts (a stretch may reach into the neighbouring windows)

Stretches are compared by a 64-bit rolling hash, all positions of both files. Memory is bounded by the validation tokens
and a piece of the training tokens; 40 million training tokens take some seconds.
"""

import numpy as np

WINDOW, STRETCH, NEAR = 64, 32, 0.8
_PIECE = 2**22  # training tokens hashed at once
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_FILTER_BITS = np.uint64(24)


def duplicates(train_T: np.ndarray, val_T: np.ndarray) -> dict[str, int | float]:
    """{"window": tokens, "windows": how many, "verbatim": share, "near": share} of the validation windows.

    Args:
      train_T, val_T: uint16 tokens. Shares are 0 where there is no whole window.
    """
    n = len(val_T) // WINDOW
    facts: dict[str, int | float] = {"window": WINDOW, "windows": n, "verbatim": 0.0, "near": 0.0}
    if n:
        occurs = repeated(train_T, val_T, STRETCH)
        # A token is covered where one of the stretches that hold it occurs: those that begin up to STRETCH - 1 before.
        begun = np.concatenate([[0], np.cumsum(np.pad(occurs, (STRETCH - 1, STRETCH - 1)))])
        covered = (begun[STRETCH:] > begun[:-STRETCH])[: n * WINDOW].reshape(n, WINDOW).mean(1)
        facts["verbatim"] = round(float(repeated(train_T, val_T, WINDOW, stride=WINDOW).mean()), 6)
        facts["near"] = round(float((covered >= NEAR).mean()), 6)
    return facts


def repeated(train_T: np.ndarray, val_T: np.ndarray, length: int, stride: int = 1) -> np.ndarray:
    """bool: whether the `length` tokens from positions 0, stride, 2 stride, ... of val_T occur in train_T."""
    wanted, position = np.unique(_hashes(val_T, length)[::stride], return_inverse=True)
    may_occur = np.zeros(2 ** int(_FILTER_BITS), bool)
    may_occur[wanted >> (np.uint64(64) - _FILTER_BITS)] = True
    found = np.zeros(len(wanted), bool)
    for start in range(0, len(train_T) - length + 1, _PIECE):
        hashes = _hashes(train_T[start : start + _PIECE + length - 1], length)
        hashes = hashes[may_occur[hashes >> (np.uint64(64) - _FILTER_BITS)]]
        at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        found[at[wanted[at] == hashes]] = True
    return found[position]


def _hashes(tokens_T: np.ndarray, length: int) -> np.ndarray:
    """uint64 [T - length + 1]: a polynomial of the tokens from each position on, modulo 2^64."""
    values = _mixed(np.asarray(tokens_T, np.uint64) + np.uint64(1))
    powers = np.multiply.accumulate(np.full(len(values), _BASE))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers, dtype=np.uint64)])
    inverse = np.multiply.accumulate(np.full(len(values), np.uint64(pow(int(_BASE), -1, 2**64))))
    n = len(values) - length + 1
    return _mixed((sums[length:] - sums[:-length])[:n] * inverse[:n])


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit over all (splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
