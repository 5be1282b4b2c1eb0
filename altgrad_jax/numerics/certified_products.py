"""`slot_dot` that measures itself in its backward pass: N draws of all three products of a layer, against exact ones.

The operands of a layer's products are known together only within its backward pass: x, w and the output gradient G. So
the measurement is made there, and leaves it as the gradient of a probe, as statistics do. What is handed on to the
layers before is then the exact gradient: each layer is measured by itself, undisturbed by what later layers round.

The same program, told so by data, also makes a pass as training does, which hands on the gradient of one draw: every
slot is compiled once for both.

The batch is taken in halves, each quantized as a batch by itself.

Axes: H halves of the batch, R references, K groups of draws; others as in slots.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.numerics import bias
from altgrad_jax.numerics.products import product, scaled_columns, unscaled_columns, weight_gradient
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.numerics.slot_quantization import Features, Slot, in_tensor_basis, quantize_slot
from altgrad_jax.numerics.slots import at, redraw, slot_dot

# Draws of passes that hand on a draw, beside those that are measured.
_OF_PASSES = 2**20


class Draws(NamedTuple):
    """How a layer is measured. Static.

    n: draws. halves: 2, so that persistent bias can be told; or 1. features: of the layer's six slots.
    """

    n: int
    halves: int
    features: tuple[Features, ...]


class Certified(NamedTuple):
    """What a measured layer is given; traced."""

    slots: Slot  # leaves [6, ...], `slots_of` a recipe, not redrawn
    seed: Any  # uint32 [2]: of this layer's draws
    number: Any  # int32: 0 measures; n > 0 hands on draw n, and measures nothing
    columns_K: Any = None  # float32: as in products.quant_dot, of the whole batch


class _Static(NamedTuple):
    """Static choices of a call."""

    draws: Draws
    w_is_NK: bool
    dtype: Any


class _Products(NamedTuple):
    """The results of the three products."""

    y_MN: Any
    dx_MK: Any
    dw: Any


def _drawn(given: Certified, number, half) -> Slot:
    """The slots with the random numbers of a draw."""
    return redraw(given.slots, stochastic_seed(given.seed[0], given.seed[1], 2 * number + half))


def _exact(x_MK, w, g_MN, w_is_NK) -> _Products:
    """Products of these operands in float32."""
    axis_K, axis_N = (1, 0) if w_is_NK else (0, 1)
    return _Products(
        product(x_MK, w, 1, axis_K), product(g_MN, w, 1, axis_N), weight_gradient(x_MK, g_MN, w_is_NK=w_is_NK)
    )


def _forward_half(static: _Static, w, given: Certified, half):
    """float32: (y, x and w as fprop multiplies them). half: (x_MK, its number)."""
    x_MK, number = half
    slots, axis_K = _drawn(given, _OF_PASSES + given.number, number), 1 if static.w_is_NK else 0
    copies = []
    for i, (v, axis) in enumerate(((scaled_columns(x_MK, given.columns_K), 1), (w, axis_K))):
        slot, features = at(slots, i), static.draws.features[i]
        quantized, _ = quantize_slot(v, slot, axis, features, static.dtype)
        copies.append(in_tensor_basis(quantized, slot, axis, features))
    x_copy, w_copy = unscaled_columns(copies[0], given.columns_K), copies[1]
    return product(x_copy, w_copy, 1, axis_K), x_copy, w_copy


def _one_draw(static: _Static, x_MK, w, g_MN, slots, columns_K) -> _Products:
    """The three products as training computes them."""
    choices = dict(features=static.draws.features, w_is_NK=static.w_is_NK, compute_dtype=static.dtype)
    dot = partial(slot_dot, slots=slots, columns_K=columns_K, **choices)
    y_MN, pull, _ = jax.vjp(lambda x, w: dot(x, w), x_MK, w, has_aux=True)
    return _Products(y_MN, *pull(g_MN))


def _backward_half(static: _Static, w, given: Certified, half):
    """(Sums without cross_RK, errors [R, K, ...] of the groups' means of wgrad, dX, dW) of one half of the batch.

    half: (x_MK, g_MN, x and w as fprop multiplied them, its number).
    """
    x_MK, g_MN, x_copy_MK, w_copy, number = half
    n, K = static.draws.n, bias.groups_of(static.draws.n)
    is_measured = given.number == 0
    own = _exact(x_MK, w, g_MN, static.w_is_NK)
    references = _exact(x_copy_MK, w_copy, g_MN, static.w_is_NK)._replace(y_MN=own.y_MN), own

    def draw(i, carry):
        total, square_RP = carry
        slots = _drawn(given, jnp.where(is_measured, i, _OF_PASSES + given.number), number)
        found = _one_draw(static, x_MK, w, g_MN, slots, given.columns_K)
        square_RP += jnp.stack([_squares(found, exact) for exact in references])
        return jax.tree.map(jnp.add, total, found), square_RP

    def group(k):
        nothing = jax.tree.map(jnp.zeros_like, own), jnp.zeros((len(references), len(own)))
        one = jnp.where(k == 0, 1, 0)
        return lax.fori_loop(k * (n // K), k * (n // K) + jnp.where(is_measured, n // K, one), draw, nothing)

    totals, squares_KRP = lax.map(group, jnp.arange(K))
    means = jax.tree.map(lambda t: t / (n // K), totals)
    sums = _sums(means, references)._replace(square_RP=squares_KRP.sum(0) / n)
    errors_RK = jnp.stack([means.dw - reference.dw for reference in references])
    dx_MK, dw = (
        jnp.where(is_measured, exact, total_K[0]) for exact, total_K in zip(references[0][1:], totals[1:], strict=True)
    )
    return sums, errors_RK, dx_MK, dw


def _squares(found: _Products, exact: _Products):
    return jnp.stack([jnp.sum(jnp.square(a - b)) for a, b in zip(found, exact, strict=True)])


def _sums(means: _Products, references) -> bias.Sums:
    """Sums [R, P, ...] of the groups' means [K, ...]; square_RP and cross_RK are not among them."""
    cells = [[_of_product(*pair) for pair in zip(means, exact, strict=True)] for exact in references]
    energy, gram, dot = (jnp.stack([jnp.stack([cell[i] for cell in row]) for row in cells]) for i in range(3))
    return bias.Sums(energy, None, gram, dot, None)


def _of_product(mean_K, exact):
    """(|y|^2, Gram matrix of the errors [K, K], <m_k, y> [K])."""
    flat = (mean_K - exact).reshape(len(mean_K), -1)
    gram = lax.dot(flat, flat.T, precision=lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(exact)), gram, jnp.sum(mean_K * exact, axis=tuple(range(1, mean_K.ndim)))


def _dot(x_MK, w, given, probe, static):
    return _forward(x_MK, w, given, probe, static)[0]


def _in_halves(static, v):
    return v.reshape(static.draws.halves, -1, *v.shape[1:])


def _forward(x_MK, w, given, probe, static):
    halves = _in_halves(static, x_MK), jnp.arange(static.draws.halves)
    y_HMN, x_H, w_H = lax.map(partial(_forward_half, static, w, given), halves)
    return y_HMN.reshape(-1, y_HMN.shape[-1]), (x_MK, w, x_H, w_H, given)


def _backward(static, saved, g_MN):
    x_MK, w, x_H, w_H, given = saved
    halves = _in_halves(static, x_MK), _in_halves(static, g_MN), x_H, w_H, jnp.arange(static.draws.halves)
    sums, errors, dx, dw = lax.map(partial(_backward_half, static, w, given), halves)
    cross_RK = jnp.full((len(bias.REFERENCES), bias.groups_of(static.draws.n)), jnp.nan)
    if static.draws.halves == 2:
        cross_RK = jnp.sum(errors[0] * errors[1], axis=(-2, -1))
    total = jax.tree.map(lambda leaf: leaf.sum(0), sums)
    return dx.reshape(x_MK.shape), dw.sum(0), None, bias.packed(total._replace(cross_RK=cross_RK), jnp)


_certified_dot = jax.custom_vjp(_dot, nondiff_argnums=(4,))
_certified_dot.defvjp(_forward, _backward)


def certified_dot(x, w, given: Certified, draws: Draws, probe, w_is_NK: bool = False, dtype: Any = jnp.bfloat16):
    """The product by a recipe, float32 [..., N]; the gradient of `probe` is what the backward pass measured.

    Gradients of x and w are the exact ones of the forward pass's own operands, or those of draw `given.number`.

    Args:
      x: float32 [..., K]; its rows are a multiple of 2, and each half of them is what blocks and rotations divide.
      probe: float32 [bias.n_fields]; its value is not read, its gradient is packed bias.Sums, without meaning in a pass
        that measures nothing.
      w_is_NK, dtype: as in slot_dot.
    """
    flat = x.reshape(-1, x.shape[-1])
    y_MN = _certified_dot(flat, w, given, probe, _Static(draws, w_is_NK, jnp.dtype(dtype)))
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])
