"""Several sums over one array in few passes, and vectors of statistics that combine field by field.

XLA computes each reduction of a program by itself, and computes what it reads anew for each: ten statistics of an
operand take ten passes and ten copies of the code that makes it. One reduction of several arrays is one loop with
several accumulators: on a CPU a third of the time, on a GPU one kernel.

On a GPU a kernel has shared memory for 11 accumulators (48 KiB). XLA merges kernels that read the same and counts a
reduction of several arrays as one, so that ptxas refuses what comes of two with seven. More than _AT_ONCE arrays are a
reduction each there, which XLA merges as far as memory goes. A whole array is reduced in two kernels, of which the
second adds up what the blocks of the first found; that of all terms is one kernel, because their sums are one array.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# {field: jnp.add, jnp.maximum or jnp.minimum}, in the order of a vector's last axis.
Fields = Mapping[str, Callable]
_ROW = 128  # elements that are worth a reduction of their own; blocks of recipes are shorter
_AT_ONCE = 5  # arrays of one reduction on a GPU
_INFINITY = np.float32(np.inf).view(np.int32)
_OVER_AXIS: dict[Callable, Callable] = {jnp.add: jnp.sum, jnp.maximum: jnp.max, jnp.minimum: jnp.min}


def combine(fields: Fields, a, b) -> jax.Array:
    """float32 vectors [..., S] of two parts as that of both."""
    return jnp.stack([of_both(a[..., i], b[..., i]) for i, of_both in enumerate(fields.values())], axis=-1)


def combine_all(fields: Fields, vectors) -> jax.Array:
    """float32 vectors [Q, ..., S] of many parts as that of all: [..., S]."""
    columns = [_OVER_AXIS[of_both](vectors[..., i], axis=0) for i, of_both in enumerate(fields.values())]
    return jnp.stack(columns, axis=-1)


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b))


def _larger(a, b):
    return tuple(jnp.maximum(x, y) for x, y in zip(a, b))


def _together(*arrays, lead):
    rows = lax.reduce(arrays, tuple(jnp.float32(0) for _ in arrays), _add, (arrays[0].ndim - 1,))
    return _totals(rows, lead)


def _each(*arrays, lead):
    axes = _rows(arrays[0].shape, lead)
    return _totals([jnp.sum(array, axis=axes) for array in arrays], lead)


def _totals(rows, lead):
    stacked = jnp.stack(rows)
    return jnp.sum(stacked, axis=tuple(range(lead + 1, stacked.ndim)))


def _rows(shape, lead: int) -> tuple[int, ...]:
    """The last axes that are reduced first: of at least _ROW elements, and not all but the first `lead`."""
    axis = len(shape) - 1
    while axis > lead + 1 and math.prod(shape[axis:]) < _ROW:
        axis -= 1
    return tuple(range(axis, len(shape)))


def sums(*terms, lead: int = 0, apart: bool = False) -> jax.Array:
    """float32 [number of terms, ...]: the sums of arrays of one shape over all axes but the first `lead`.

    First over the last axis, then over the others: an accumulator that runs over a whole matrix in float32 would lose
    digits, and what it counts beyond 2^24. Booleans are counted.

    Args:
      apart: one reduction for each, which arrays that are split over devices along a reduced axis need: XLA's
        partitioner gathers what a reduction of several arrays reads.
    """
    arrays = [jnp.asarray(term).astype(jnp.float32) for term in terms]
    if apart or arrays[0].ndim - 1 <= lead:
        return jnp.stack([jnp.sum(array, axis=tuple(range(lead, array.ndim))) for array in arrays])
    together = partial(_together, lead=lead)
    if len(arrays) <= _AT_ONCE:
        return together(*arrays)
    return lax.platform_dependent(*arrays, cpu=together, default=partial(_each, lead=lead))


def extremes(*sizes) -> tuple[jax.Array, jax.Array]:
    """(the largest, the smallest that is not 0) of each of several float32 arrays of magnitudes, both float32 [arrays].

    The smallest is infinity where all are 0. By bits, which order magnitudes with NaN above infinity: of a number and
    NaN XLA for a CPU takes either for the larger.
    """
    axes = _rows(sizes[0].shape, 0)
    bits = [lax.bitcast_convert_type(size, jnp.int32) for size in sizes]
    bits += [-jnp.where(of_size > 0, jnp.minimum(of_size, _INFINITY), _INFINITY) for of_size in bits]
    rows = lax.reduce(tuple(bits), tuple(-_INFINITY for _ in bits), _larger, axes)
    found = jnp.max(jnp.stack(rows).reshape(len(bits), -1), axis=1)
    of_all = lax.bitcast_convert_type(jnp.abs(found), jnp.float32)
    return of_all[: len(sizes)], of_all[len(sizes) :]
