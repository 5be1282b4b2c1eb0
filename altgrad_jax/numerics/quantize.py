"""One's own arrays onto the grid of a number format, in blocks."""

from typing import Any

import jax
import jax.numpy as jnp

from altgrad_jax.errors import UserError
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.products import scale_for
from altgrad_jax.numerics.rounding import Grid, format_params, to_grid
from altgrad_jax.numerics.rules import ROUNDINGS


def quantize(
    x, format: str, *, block: tuple[int, int] | None = None, rounding: str = "nearest", key: Any = None
) -> jax.Array:
    """x rounded onto a format's grid, q = round(x * s) / s, with a scale s for each block.

    s is the largest power of two with amax * s <= min(largest finite number, 2^16), of the block's amax (OCP
    Microscaling 1.0 has such scales; this one never clips). What is not finite stays.

    Args:
      x: float32 or bfloat16, of any shape; a block needs two axes; a vector is a single row.
      format: a name of numerics.formats, such as E4M3.
      block: (rows, columns) of the last two axes that share a scale, such as (1, 32); None: one scale for all of x.
      rounding: 'nearest', ties to even, or 'stochastic', which needs `key`, a jax.random key.

    Returns:
      The values, of x's shape and dtype, each exact in the format times a power of two. The gradient passes straight
      through.

    Raises:
      UserError: a format, rounding, dtype or block that cannot be used.
    """
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise UserError(f"quantize takes float32 or bfloat16, and this array is {x.dtype}: convert it first")
    if rounding not in ROUNDINGS:
        raise UserError(f"there is no rounding {rounding!r}: give one of {', '.join(ROUNDINGS)}")
    if (rounding == "stochastic") != (key is not None):
        raise UserError("rounding='stochastic' and key go together: give both, or rounding='nearest' and no key")
    params = format_params(get_format(format))
    blocks, axes = _blocks(x.astype(jnp.float32), block)
    scale = scale_for(jnp.max(jnp.abs(blocks), axis=axes, keepdims=True), params)
    seed = None if key is None else jax.random.bits(key, (2,), jnp.uint32)
    q = to_grid(blocks, Grid(params, scale), seed=seed).reshape(x.shape).astype(x.dtype)
    return straight_through(x, q)


def _blocks(x, block):
    """(x cut into blocks, the axes of a block)."""
    if block is None:
        return x, None
    rows, columns = block
    *outer, R, C = x.shape if x.ndim > 1 else (1, x.size)
    if R % rows or C % columns:
        raise UserError(f"blocks of {block} do not divide the last axes of an array {x.shape}: give sides that do")
    n = len(outer)
    return x.reshape(*outer, R // rows, rows, C // columns, columns), (n + 1, n + 3)


@jax.custom_jvp
def straight_through(x, q):
    """q, with the gradient of x."""
    return q


@straight_through.defjvp
def _(primals, tangents):
    return primals[1], tangents[0]
