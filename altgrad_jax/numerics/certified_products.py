"""`slot_dot` with an exact backward pass that measures the quantized one: N draws of all three products of a layer.

The operands of a layer's products are known together only within its backward pass: x, w and the output gradient G. So
the measurement is made there, and leaves it as the gradient of a probe, as statistics do. What is handed on to the
layers before is the exact gradient: each layer is measured by itself, undisturbed by what later layers round.

Axes: H halves of the batch, K groups of draws; others as in slots.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.numerics import bias
from altgrad_jax.numerics.products import product, weight_gradient
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.numerics.slot_quantization import Features, Slot, in_tensor_basis, quantize_slot
from altgrad_jax.numerics.slots import at, redraw, slot_dot


class Draws(NamedTuple):
    """How a layer is measured. Static.

    n: draws. halves: 2, each half of the rows for itself, so that persistent bias can be told; or 1.
    features: of the layer's six slots.
    """

    n: int
    halves: int
    features: tuple[Features, ...]


class _Products(NamedTuple):
    """The results of the three products, or errors of them."""

    y_MN: Any
    dx_MK: Any
    dw: Any


def _exact(x_MK, w, g_MN, w_is_NK) -> _Products:
    """Products of these operands in float32."""
    axis_K, axis_N = (1, 0) if w_is_NK else (0, 1)
    return _Products(
        product(x_MK, w, 1, axis_K), product(g_MN, w, 1, axis_N), weight_gradient(x_MK, g_MN, w_is_NK=w_is_NK)
    )


def _forward_copies(x_MK, w, slots, features, w_is_NK, dtype):
    """float32: x and w as fprop multiplies them."""
    found = []
    for i, (v, axis) in enumerate(((x_MK, 1), (w, 1 if w_is_NK else 0))):
        slot = at(slots, i)
        quantized, _ = quantize_slot(v, slot, axis, features[i], dtype)
        found.append(in_tensor_basis(quantized, slot, axis, features[i]))
    return found


def _one_draw(x_MK, w, g_MN, slots, features, w_is_NK, dtype) -> _Products:
    """The three products as training computes them."""
    dot = partial(slot_dot, slots=slots, features=features, w_is_NK=w_is_NK, compute_dtype=dtype)
    y_MN, pull, _ = jax.vjp(lambda x, w: dot(x, w), x_MK, w, has_aux=True)
    return _Products(y_MN, *pull(g_MN))


class _Half(NamedTuple):
    """What is found of one half of the batch."""

    sums: bias.Sums  # without cross_RK
    errors_RK: Any  # float32 [R, K, ...]: of the mean of each group, of wgrad
    exact: _Products  # straight through


def _of_half(w, slots, draws: Draws, w_is_NK, dtype, half) -> _Half:
    """half: (x_MK, g_MN, its number)."""
    x_MK, g_MN, number = half
    K, base = bias.groups_of(draws.n), slots.seed[0]
    copies = _forward_copies(x_MK, w, redraw(slots, base), draws.features, w_is_NK, dtype)
    own = _exact(x_MK, w, g_MN, w_is_NK)
    references = _exact(*copies, g_MN, w_is_NK)._replace(y_MN=own.y_MN), own

    def draw(carry, n):
        total, square_RP = carry
        seed = stochastic_seed(base[0], base[1], 1 + n * draws.halves + number)
        found = _one_draw(x_MK, w, g_MN, redraw(slots, seed), draws.features, w_is_NK, dtype)
        square_RP += jnp.stack([_squares(found, exact) for exact in references])
        return (jax.tree.map(jnp.add, total, found), square_RP), None

    def group(k):
        nothing = jax.tree.map(jnp.zeros_like, own), jnp.zeros((len(references), len(own)))
        (total, square_RP), _ = lax.scan(draw, nothing, k * (draws.n // K) + jnp.arange(draws.n // K))
        return jax.tree.map(lambda t: t / (draws.n // K), total), square_RP

    means, squares_KRP = lax.map(group, jnp.arange(K))
    cells = [[_sums_of(mean, exact) for mean, exact in zip(means, reference)] for reference in references]
    energy_RP, gram_RPKK, dot_RPK = (jnp.stack([jnp.stack([c[i] for c in row]) for row in cells]) for i in range(3))
    errors_RK = jnp.stack([means.dw - reference.dw for reference in references])
    sums = bias.Sums(energy_RP, squares_KRP.sum(0) / draws.n, gram_RPKK, dot_RPK, None)
    return _Half(sums, errors_RK, references[0])


def _squares(found: _Products, exact: _Products):
    return jnp.stack([jnp.sum(jnp.square(a - b)) for a, b in zip(found, exact)])


def _sums_of(mean_K, exact):
    """(|y|^2, Gram matrix of the errors [K, K], <m_k, y> [K])."""
    flat = (mean_K - exact).reshape(len(mean_K), -1)
    gram = lax.dot(flat, flat.T, precision=lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(exact)), gram, jnp.sum(mean_K * exact, axis=tuple(range(1, mean_K.ndim)))


def measure(x_MK, w, g_MN, slots: Slot, draws: Draws, w_is_NK: bool = False, dtype: Any = jnp.bfloat16):
    """The products of one layer: (float32 [bias.n_fields], dX, dW).

    Args:
      x_MK, w, g_MN: float32. slots: `slots_of` a recipe, not redrawn, but for `seed`, whose first row is the seed of
        this layer's draws. dtype: the compute dtype.

    Returns:
      Packed bias.Sums; and the exact gradients of the forward pass's own operands, float32 [M, K] and of w's shape.
    """
    H = draws.halves
    of_half = partial(_of_half, w, slots, draws, w_is_NK, dtype)
    halves = lax.map(of_half, (*(v.reshape(H, -1, v.shape[-1]) for v in (x_MK, g_MN)), jnp.arange(H)))
    cross_RK = jnp.full((len(bias.REFERENCES), bias.groups_of(draws.n)), jnp.nan)
    if H == 2:
        first, second = halves.errors_RK
        cross_RK = jnp.sum(first * second, axis=(-2, -1))
    energy, square, gram, dot = (leaf.sum(0) for leaf in halves.sums[:4])
    sums = bias.packed(bias.Sums(energy, square, gram, dot, cross_RK), jnp)
    return sums, halves.exact.dx_MK.reshape(x_MK.shape), halves.exact.dw.sum(0)


def _dot(x_MK, w, slots, probe, draws, w_is_NK, dtype):
    # The same numbers as `_forward` hands on to the layers after this one.
    return _forward(x_MK, w, slots, probe, draws, w_is_NK, dtype)[0]


def _forward(x_MK, w, slots, probe, draws, w_is_NK, dtype):
    y_MN, _ = slot_dot(x_MK, w, redraw(slots, slots.seed[0]), draws.features, None, w_is_NK, dtype)
    return y_MN, (x_MK, w, slots)


def _backward(draws, w_is_NK, dtype, saved, g_MN):
    x_MK, w, slots = saved
    sums, dx_MK, dw = measure(x_MK, w, g_MN, slots, draws, w_is_NK, dtype)
    return dx_MK, dw, None, sums


_certified_dot = jax.custom_vjp(_dot, nondiff_argnums=(4, 5, 6))
_certified_dot.defvjp(_forward, _backward)


def certified_dot(x, w, slots: Slot, draws: Draws, probe, w_is_NK: bool = False, dtype: Any = jnp.bfloat16):
    """The product by a recipe, float32 [..., N]; the gradient of `probe` is what `measure` found in the backward pass.

    Gradients of x and w are the exact ones of the forward pass's own operands.

    Args:
      x: float32 [..., K]. slots: as in `measure`. probe: float32 [bias.n_fields], whose value is not read.
    """
    flat = x.reshape(-1, x.shape[-1])
    y_MN = _certified_dot(flat, w, slots, probe, draws, w_is_NK, jnp.dtype(dtype))
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])


def empty_probe(draws: Draws) -> np.ndarray:
    """float32 [bias.n_fields]: a probe."""
    return np.zeros(bias.n_fields(draws.n), np.float32)
