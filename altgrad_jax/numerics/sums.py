"""Several sums over one array in one pass, and vectors of statistics that combine field by field.

XLA computes each reduction of a program by itself, and computes what it reads anew for each: ten statistics of an
operand take ten passes and ten copies of the code that makes it. One reduction of several arrays is one loop with
several accumulators: on a CPU a third of the time, on a GPU one kernel.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

# {field: jnp.add, jnp.maximum or jnp.minimum}, in the order of a vector's last axis.
Fields = Mapping[str, Callable]
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


def sums(*terms, lead: int = 0, apart: bool = False) -> jax.Array:
    """float32 [number of terms, ...]: the sums of arrays of one shape over all axes but the first `lead`.

    First over the last axis, then over the others: an accumulator that runs over a whole matrix in float32 would lose
    digits, and what it counts beyond 2^24. Booleans are counted.

    Args:
      apart: one reduction for each, which arrays that are split over devices along a reduced axis need: XLA's
        partitioner gathers what a reduction of several arrays reads.
    """
    arrays = [jnp.asarray(term).astype(jnp.float32) for term in terms]
    last = arrays[0].ndim - 1
    if apart:
        return jnp.stack([jnp.sum(array, axis=tuple(range(lead, last + 1))) for array in arrays])
    if last > lead:
        arrays = lax.reduce(tuple(arrays), tuple(jnp.float32(0) for _ in arrays), _add, (last,))
    totals = jnp.stack(arrays)
    return jnp.sum(totals, axis=tuple(range(lead + 1, totals.ndim)))
