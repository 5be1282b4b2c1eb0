"""A dot_general of any layout as the products x w of matrices that the numerics know, and back."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from altgrad_jax.instrumentation.plan import Product


class Matrices(NamedTuple):
    """The operands of a product, B being its batch axes; of two activations a single one, of all heads."""

    x: jax.Array  # [*B, M, K]
    w: jax.Array  # [*B, K, N], or [*B, N, K]
    w_is_NK: bool


def _free(operands, dimension_numbers):
    """For each operand, its axes that are neither contracted nor batch."""
    contract, batch = dimension_numbers
    return [[d for d in range(v.ndim) if d not in (*contract[s], *batch[s])] for s, v in enumerate(operands)]


def as_matrices(product: Product, eqn, operands: Sequence[Any]) -> Matrices:
    """The operands as matrices. The weight's axes stay in the order in which they lie."""
    side, other, (contract, batch) = product.side, 1 - product.side, eqn.params["dimension_numbers"]
    free = _free(operands, eqn.params["dimension_numbers"])
    w_is_NK = bool(free[side]) and min(free[side]) < min(contract[side], default=0)
    x = lax.transpose(operands[other], (*batch[other], *free[other], *contract[other]))
    order = (free[side], contract[side]) if w_is_NK else (contract[side], free[side])
    w = lax.transpose(operands[side], (*batch[side], *order[0], *order[1]))
    sizes = (product.N, product.K) if w_is_NK else (product.K, product.N)
    outer = [*product.batch, math.prod(product.heads)] if product.is_pair else product.batch
    return Matrices(x.reshape(*outer, product.M, product.K), w.reshape(*outer, *sizes), w_is_NK)


def as_result(product: Product, eqn, operands: Sequence[Any], y) -> jax.Array:
    """Y [*B, M, N] in the shape and dtype that the equation has."""
    free = _free(operands, eqn.params["dimension_numbers"])
    rows, columns = ([operands[s].shape[d] for d in free[s]] for s in (1 - product.side, product.side))
    outer = *product.batch, *product.heads
    y, b, r = y.reshape(*outer, *rows, *columns), len(outer), len(rows)
    if product.side == 0:
        y = lax.transpose(y, (*range(b), *range(b + r, y.ndim), *range(b, b + r)))
    return y.astype(eqn.outvars[0].aval.dtype)
