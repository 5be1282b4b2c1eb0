"""Several sums over one array in one pass.

XLA computes each reduction of a program by itself, and computes what it reads anew for each: ten statistics of an
operand take ten passes and ten copies of the code that makes it. One reduction of several arrays is one loop with
several accumulators: on a CPU a third of the time, on a GPU one kernel.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b))


def sums(terms: Mapping[str, jax.Array], lead: int = 0) -> dict[str, jax.Array]:
    """{name: float32 sum} of arrays of one shape, over all axes but the first `lead`.

    First over all axes but the first of those, then over that one: an accumulator that runs over a whole matrix in
    float32 would lose what it counts beyond 2^24. Booleans are counted.
    """
    arrays = [jnp.asarray(term).astype(jnp.float32) for term in terms.values()]
    axes = tuple(range(lead + 1, arrays[0].ndim))
    if axes:
        arrays = lax.reduce(tuple(arrays), tuple(jnp.float32(0) for _ in arrays), _add, axes)
    totals = jnp.sum(jnp.stack(arrays), axis=lead + 1)
    return {name: totals[i] for i, name in enumerate(terms)}
