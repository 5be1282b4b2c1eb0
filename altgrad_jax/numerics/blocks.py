"""Reductions over blocks whose sides are data: one program for blocks of 1x16, 1x32, 16x16, rows and tensors.

Statistics are kept per *grain*: the smallest block side along the contracted axis that a program knows. Every larger
block is a reduction of grains, given back to each of them, so that all blocks have arrays of one shape. A side is data:
an index into ALONG or ACROSS, of which a program knows some.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# Sides of blocks along the contracted axis and across it; 0 is the whole axis. They rise, and each divides the next.
ALONG, ACROSS = (16, 32, 64, 128, 0), (1, 16, 32, 128, 0)


def grains_of(v, axis: int, grain: int) -> jax.Array:
    """A matrix with its axis split into [grains, elements]; a grain of 0 is the whole axis, which it must divide."""
    grain = grain or v.shape[axis]
    return v.reshape(*v.shape[:axis], -1, grain, *v.shape[axis + 1 :])


def of_block(a, along, across, axis: int, known: tuple[tuple[int, ...], tuple[int, ...]], reduce: Callable):
    """Each entry's block, reduced, at the resolution of `a`.

    Args:
      a: one number per grain along `axis` and per row across it, not negative.
      along, across: int32, indices into ALONG and ACROSS; may be traced.
      known: the sides along and across that may occur, rising; the first along is the grain.
      reduce: jnp.max or jnp.sum.
    """
    a = _levels(a, along, ALONG, known[0], known[0][0], axis, reduce)
    return _levels(a, across, ACROSS, known[1], 1, 1 - axis, reduce)


def of_neighbours(a, factor: int, axis: int, reduce: Callable) -> jax.Array:
    """Groups of `factor` neighbours along an axis (from 0), reduced and given back to each of them.

    The last group may be short. Of a single group the axis has length 1, which broadcasts.

    Args:
      a: any number of axes; not negative where `reduce` is jnp.max. reduce: jnp.max or jnp.sum.
    """
    return _repeat(_pool(a, factor, axis, reduce), factor, axis, a.shape[axis])


def _levels(a, index, names, sides, grain, axis, reduce):
    """Every level is made from the one below and unfolded from the one above, so that the small ones cost nothing."""
    levels, size = [a], grain
    for side in sides:
        up = levels[-1]
        if side != size:
            up = reduce(up, axis=axis, keepdims=True) if side == 0 else _pool(up, side // size, axis, reduce)
        levels.append(up)
        size = side
    out = levels.pop()
    for i in reversed(range(1, len(levels))):
        factor = sides[i] // sides[i - 1] if sides[i] else 1
        out = _repeat(out, factor, axis, levels[i].shape[axis])
        out = jnp.where(index > names.index(sides[i - 1]), out, levels[i])
    return out if sides[0] in (0, grain) else _repeat(out, sides[0] // grain, axis, a.shape[axis])


def _pool(a, factor, axis, reduce):
    """Neighbours along an axis reduced, `factor` at a time; the last group may be short, for zeros change nothing."""
    if a.shape[axis] % factor:
        pad = [(0, 0)] * a.ndim
        pad[axis] = (0, -a.shape[axis] % factor)
        a = jnp.pad(a, pad)
    return reduce(a.reshape(*a.shape[:axis], -1, factor, *a.shape[axis + 1 :]), axis=axis + 1)


def _repeat(a, factor, axis, n):
    if a.shape[axis] == 1:
        return a
    wide = (*a.shape[: axis + 1], factor, *a.shape[axis + 1 :])
    a = jnp.broadcast_to(jnp.expand_dims(a, axis + 1), wide).reshape(*a.shape[:axis], -1, *a.shape[axis + 1 :])
    return lax.slice_in_dim(a, 0, n, axis=axis)
