"""The three products of a linear layer with six quantized slots, each of them data: one program serves every recipe.

    Y[M,N] = X[M,K] W[K,N]      dX = G W^T      dW = X^T G      G = dY

Each product quantizes its two operands for itself, along the axis that it contracts (`recipes.SLOTS`). A tensor's
second copy is made of the original, of the dequantized forward copy, or is the first copy itself. With all second
copies shared the layer is that of `products.quant_dot`, to the bit where all numbers are finite.

A `Slot` is traced, and `Features` are static: the union of what the recipes of a program ask. Recipes of one union
share one compiled program. Two programs of other unions may differ in the last bits of what surrounds a layer.

Axes: M rows (batch and time flattened), K inputs, N outputs, T tiles of a contracted axis, R rows that are not
contracted, P products that are alike, S len(slot_statistics.FIELDS).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import formats, hadamard, recipes, scales, slot_statistics
from altgrad_jax.numerics.blocks import ACROSS, ALONG
from altgrad_jax.numerics.products import product, scaled_columns, unscaled_columns, weight_gradient
from altgrad_jax.numerics.recipes import SLOTS, SOURCES
from altgrad_jax.numerics.rounding import format_params, stochastic_seed
from altgrad_jax.numerics.scales import FLOAT32, TWO_LEVEL
from altgrad_jax.numerics.slot_quantization import (
    KINDS,
    Features,
    Quantized,
    Slot,
    choose,
    first_of,
    in_tensor_basis,
    quantize_slot,
)
from altgrad_jax.numerics.sums import combine_all

ORIGINAL, FPROP, SHARED = range(len(SOURCES))
# The slots whose statistics the forward pass returns, and those whose leave as the gradient of the probe, by row.
FORWARD, BACKWARD = (0, 1, 4), (2, 3, 5)


def slot_of(spec: recipes.SlotSpec, seed: Any = (0, 0)) -> Slot:
    """A SlotSpec as data: a Slot of NumPy leaves. `seed`, uint32 [2], is that of stochastic rounding."""
    grid = formats.get_scale_format(spec.scale).grid if spec.rule == "two_level" else None
    along, across = spec.sides
    return Slot(
        format=format_params(formats.get_format(spec.element)),
        scale_format=format_params(grid or formats.FORMATS["E4M3"]),
        rule=np.int32(scales.RULES.index(spec.rule)),
        along=np.int32(ALONG.index(along)),
        across=np.int32(ACROSS.index(across)),
        target=np.float32(spec.target),
        bound=np.float32(spec.bound),
        shrink=np.float32(spec.shrink),
        given=np.float32(0),
        source=np.int32(SOURCES.index(spec.source)),
        high=np.bool_(spec.high),
        stochastic=np.bool_(spec.rounding == "stochastic"),
        four_six=np.bool_(spec.correction == "four_six"),
        eden=np.bool_(spec.correction == "ms_eden"),
        rotation=np.int32(spec.rotation),
        redrawn=np.bool_(spec.transform.endswith("redrawn")),
        signs=hadamard.fixed_signs(spec.rotation),
        seed=np.asarray(seed, np.uint32),
    )


def slots_of(recipe: recipes.Recipe, seed: Any = (0, 0)) -> Slot:
    """A recipe as data: a Slot whose NumPy leaves have a leading axis [6], in the order of SLOTS.

    `seed`, two numbers of 32 bits, is that of all slots until `redraw` gives each its own.
    """
    six = [slot_of(spec, seed) for spec in recipe.slots]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *six)


def features_of(slots: Sequence[Slot], *, lazy: bool = True, statistics: bool = False) -> tuple[Features, ...]:
    """Six Features: for each slot the union of what these recipes ask of it.

    `slots`: NumPy leaves [6, ...] or [layers, 6, ...]. Members of one program must be compiled with the same features
    to agree to the bit with a run of each alone.
    """
    tiles = any(bool(np.any((s.rule == FLOAT32) & (s.along != ALONG.index(0)) & ~s.high)) for s in slots)
    return tuple(_features_of_slot(slots, i, tiles, lazy, statistics) for i in range(len(SLOTS)))


def _features_of_slot(slots, i, tiles, lazy, statistics):
    asked = ("along", "across", "rule", "high", "stochastic", "four_six", "eden", "source", "rotation")
    leaves = {name: np.concatenate([getattr(s, name).reshape(-1, len(SLOTS))[:, i] for s in slots]) for name in asked}
    quantized = ~leaves["high"]  # a slot in the compute dtype asks for no blocks

    def sides(name, known):
        return tuple(known[k] for k in sorted(set(leaves[name][quantized].tolist()))) or known[-1:]

    return Features(
        along=sides("along", ALONG),
        across=sides("across", ACROSS),
        kinds=_kinds(leaves["rule"][quantized]),
        stochastic=bool(leaves["stochastic"].any()),
        four_six=bool(leaves["four_six"].any()),
        eden=bool(leaves["eden"].any()),
        requantize=bool((leaves["source"] == FPROP).any()),
        shared=bool((leaves["source"] == SHARED).any()),
        rotation=int(leaves["rotation"].max()),
        tiles=tiles,
        lazy=lazy,
        statistics=statistics,
    )


def _kinds(rules) -> tuple[str, ...]:
    """The kinds of scales, of KINDS, that these indices into scales.RULES ask for; one at least."""
    asked = rules < FLOAT32, rules == FLOAT32, rules == TWO_LEVEL
    return tuple(kind for kind, flags in zip(KINDS, asked, strict=True) if flags.any()) or KINDS[:1]


def redraw(slots: Slot, seed) -> Slot:
    """The slots of one step: keys of stochastic rounding for each slot, and new signs where they are redrawn.

    slots: leaves [6, ...]. seed: uint32 [2], other for every layer and step (`rounding.stochastic_seed`). The two
    operands of a product get the same signs. May be traced.
    """
    keys = [stochastic_seed(seed[0], seed[1], i) for i in range(len(SLOTS))]
    of_products = [stochastic_seed(seed[0], seed[1], len(SLOTS) + i // 2) for i in range(len(SLOTS))]
    signs = jax.vmap(hadamard.drawn_signs)(jnp.stack(of_products), slots.rotation)
    redrawn = jnp.asarray(slots.redrawn)[:, None]
    return slots._replace(seed=jnp.stack(keys), signs=jnp.where(redrawn, signs, slots.signs))


class _Copy(NamedTuple):
    """A quantized tensor, its statistics or None, the axis that its product contracts, and the index of its slot."""

    quantized: Quantized
    statistics: jax.Array | None
    axis: int
    index: int


def at(slots: Slot, index: int) -> Slot:
    """The Slot of one operand."""
    return jax.tree.map(lambda leaf: leaf[index], slots)


def _first(v, slots, index, axis, features, dtype):
    quantized, statistics = quantize_slot(v, at(slots, index), axis, features[index], dtype)
    return _Copy(quantized, statistics, axis, index)


def _forward_values(v, quantized, slot, axis, features):
    return in_tensor_basis(quantized, slot, axis, features).astype(v.dtype)


def _own_copy(v, quantized, statistics, slots, *, first, index, axis, features, dtype):
    """(Quantized, statistics) of the second copy of a tensor, made of the original or of the dequantized first copy.

    first: (index, axis) of the first copy.
    """
    slot, able, first_slot = at(slots, index), features[index], at(slots, first[0])
    values = partial(_forward_values, axis=first[1], features=features[first[0]])
    if able.requantize:
        v = choose(able.lazy, slot.source == FPROP, values, first_of, v, quantized, first_slot)
    own, own_statistics = quantize_slot(v, slot, axis, able, dtype)
    if able.statistics:
        own_statistics = slot_statistics.with_distance(
            own_statistics, values(v, quantized, first_slot), in_tensor_basis(own, slot, axis, able)
        )
    rows = v.shape[1 - axis]
    return Quantized(own.q, jnp.broadcast_to(own.row_TR, (own.row_TR.shape[0], rows))), own_statistics


def _shared_copy(v, quantized, statistics, slots, *, shape_TR):
    """The first copy itself: its row factors are one number, or 1."""
    if statistics is not None:
        statistics = slot_statistics.compared(statistics)
    return Quantized(quantized.q, jnp.broadcast_to(quantized.row_TR[:1, :1], shape_TR)), statistics


def _again(v, first: _Copy, slots, index, axis, features, dtype):
    """(Quantized, statistics) of a tensor's second copy, for slot `index`."""
    own = partial(_own_copy, first=(first.index, first.axis), index=index, axis=axis, features=features, dtype=dtype)
    args = v, first.quantized, first.statistics, slots
    if not features[index].shared:
        return own(*args)
    shape_TR = jax.eval_shape(own, *args)[0].row_TR.shape
    shared = partial(_shared_copy, shape_TR=shape_TR)
    return choose(features[index].lazy, slots.source[index] == SHARED, shared, own, *args)


def _scaled_product(multiply, columns_first, q_a, rows_a, q_b, rows_b):
    """The product of one tile, times a factor per row of a and per row of b, which are the result's columns."""
    factors = [rows_a[:, None], rows_b[None, :]]
    y = multiply(q_a, q_b)
    for factor in reversed(factors) if columns_first else factors:
        # One after the other: the product of two scales may lie beyond float32.
        y = y * factor
    return y


def _in_tiles(v, axis, n):
    """A matrix as [n, ...], its axis cut into n tiles."""
    v = v.reshape(*v.shape[:axis], n, -1, *v.shape[axis + 1 :])
    return jnp.moveaxis(v, axis, 0)


def tiled_product(multiply, a: Quantized, axis_a: int, b: Quantized, axis_b: int, columns_first: bool = False):
    """The float32 product of two operands, each with its contracted axis: the sum over its tiles, in their order.

    multiply: the product of two tiles without factors. One tile, the usual case, is one product.
    """
    one = partial(_scaled_product, multiply, columns_first)
    n = max(a.row_TR.shape[0], b.row_TR.shape[0])
    if n == 1:
        return one(a.q, a.row_TR[0], b.q, b.row_TR[0])
    tiles = []
    for (q, row_TR), axis in ((a, axis_a), (b, axis_b)):
        tiles += [_in_tiles(q, axis, n), jnp.broadcast_to(row_TR, (n, row_TR.shape[1]))]
    start = jax.eval_shape(one, *(tile[0] for tile in tiles))
    return lax.scan(lambda y, tile: (y + one(*tile), None), jnp.zeros(start.shape, start.dtype), tiles)[0]


def _stacked(*vectors):
    """float32 [3, S], or None where the program computes no statistics."""
    return jnp.stack(vectors) if all(v is not None for v in vectors) else None


def _axes(w_is_NK):
    """The axis of w that fprop contracts, and that which dgrad does."""
    return (1, 0) if w_is_NK else (0, 1)


def _weight_gradient_NK(g_MN, x_MK):
    return weight_gradient(x_MK, g_MN, w_is_NK=True)


def _unscaled(x: Quantized, columns_K) -> Quantized:
    return x._replace(q=unscaled_columns(x.q, columns_K))


def _fprop(x_MK, w, slots, columns_K, features, w_is_NK, dtype):
    """(y, first copy of x, first copy of w); x is scaled by its columns, and so is its copy."""
    axis_K, _ = _axes(w_is_NK)
    x = _first(x_MK, slots, 0, 1, features, dtype)
    w_first = _first(w, slots, 1, axis_K, features, dtype)
    multiply = partial(product, contract_a=1, contract_b=axis_K)
    y_MN = tiled_product(multiply, _unscaled(x.quantized, columns_K), 1, w_first.quantized, axis_K)
    return y_MN, x, w_first


def _dot(x_MK, w, slots, g_probe, columns_K, features, w_is_NK, dtype):
    # Without a backward pass there is no second copy of x, and M may be any number of tokens.
    y_MN, x, w_first = _fprop(scaled_columns(x_MK, columns_K), w, slots, columns_K, features, w_is_NK, dtype)
    nothing = None if x.statistics is None else jnp.asarray(slot_statistics.empty())
    return y_MN, _stacked(x.statistics, w_first.statistics, nothing)


def _forward(x_MK, w, slots, g_probe, columns_K, features, w_is_NK, dtype):
    x_MK = scaled_columns(x_MK, columns_K)
    y_MN, x, w_first = _fprop(x_MK, w, slots, columns_K, features, w_is_NK, dtype)
    # X is an intermediate: its second copy is made now, so that one in the compute dtype is kept and not a float32 one.
    x_again, x_statistics = _again(x_MK, x, slots, 4, 0, features, dtype)
    statistics = _stacked(x.statistics, w_first.statistics, x_statistics)
    # W is a parameter: the weight itself is kept, and its first copy where the second one is made of it or compared.
    needed = features[3].requantize or features[3].shared or features[3].statistics
    saved_w = w_first.quantized if needed else Quantized(jnp.zeros((), dtype), jnp.zeros((1, 1)))
    return (y_MN, statistics), (
        _unscaled(x_again, columns_K),
        w,
        saved_w,
        w_first.statistics,
        slots,
        g_probe is not None,
    )


def _backward(features, w_is_NK, dtype, saved, cotangents):
    x_again, w, w_quantized, w_statistics, slots, probed = saved
    g_MN, _ = cotangents
    axis_K, axis_N = _axes(w_is_NK)
    g = _first(g_MN, slots, 2, 1, features, dtype)
    w_first = _Copy(w_quantized, w_statistics, axis_K, 1)
    w_again, again_statistics = _again(w, w_first, slots, 3, axis_N, features, dtype)
    dx_MK = tiled_product(partial(product, contract_a=1, contract_b=axis_N), g.quantized, 1, w_again, axis_N)
    g_again, g_statistics = _again(g_MN, g, slots, 5, 0, features, dtype)
    # The factors of g come first, as in products.quant_dot.
    if w_is_NK:
        dw = tiled_product(_weight_gradient_NK, g_again, 0, x_again, 0)
    else:
        dw = tiled_product(weight_gradient, x_again, 0, g_again, 0, columns_first=True)
    probe = _stacked(g.statistics, again_statistics, g_statistics) if probed else None
    return dx_MK, dw, None, probe, None


_slot_dot = jax.custom_vjp(_dot, nondiff_argnums=(5, 6, 7))
_slot_dot.defvjp(_forward, _backward)


# Axes of a Slot of many products, which differ in their random numbers alone.
_AXES: dict[str, Any] = dict.fromkeys(Slot._fields) | {"seed": 0}
_PER_PRODUCT = Slot(**_AXES)


def _seeded(slots, n):
    """The slots of n products, each with random numbers of its own: seed uint32 [n, 6, 2]."""
    of_slots = jax.vmap(lambda seed, i: stochastic_seed(seed[0], seed[1], i), in_axes=(0, None))
    return slots._replace(seed=jax.vmap(of_slots, in_axes=(None, 0))(slots.seed, np.arange(n, dtype=np.uint32)))


def _of_all(statistics):
    return None if statistics is None else combine_all(slot_statistics.FIELDS, statistics)


# vmap stands inside the derivative, so that statistics are combined, where that of a vmapped probe would be added up.
def _dots(x_PMK, w_P, slots, g_probe, features, w_is_NK, dtype):
    one = partial(_dot, g_probe=None, columns_K=None, features=features, w_is_NK=w_is_NK, dtype=dtype)
    y_P, statistics = jax.vmap(one, in_axes=(0, 0, _PER_PRODUCT))(x_PMK, w_P, _seeded(slots, len(x_PMK)))
    return y_P, _of_all(statistics)


def _forwards(x_PMK, w_P, slots, g_probe, features, w_is_NK, dtype):
    def one(x_MK, w, slots):
        made, (*saved, _, _) = _forward(x_MK, w, slots, None, None, features, w_is_NK, dtype)
        return made, saved

    slots = _seeded(slots, len(x_PMK))
    (y_P, statistics), saved = jax.vmap(one, in_axes=(0, 0, _PER_PRODUCT))(x_PMK, w_P, slots)
    return (y_P, _of_all(statistics)), (saved, slots, g_probe)


def _backwards(features, w_is_NK, dtype, saved, cotangents):
    saved_P, slots, g_probe = saved

    def one(saved, slots, g_MN):
        return _backward(features, w_is_NK, dtype, (*saved, slots, g_probe is not None), (g_MN, None))

    dx, dw, _, probes, _ = jax.vmap(one, in_axes=(0, _PER_PRODUCT, 0))(saved_P, slots, cotangents[0])
    return dx, dw, None, _of_all(probes)


_slot_dots = jax.custom_vjp(_dots, nondiff_argnums=(4, 5, 6))
_slot_dots.defvjp(_forwards, _backwards)


def empty_statistics() -> np.ndarray:
    """float32 [3, S] that changes nothing when combined; it also serves as a `g_probe`, whose value is never read."""
    return np.stack([slot_statistics.empty()] * len(BACKWARD))


def slot_dot(
    x_MK,
    w,
    slots: Slot,
    features: tuple[Features, ...],
    g_probe=None,
    w_is_NK: bool = False,
    compute_dtype: Any = jnp.bfloat16,
    columns_K=None,
) -> tuple[jax.Array, jax.Array | None]:
    """Product of activations and a weight matrix by a recipe, with float32 result and float32 gradients.

    Args:
      x_MK: float32 [..., K]; leading axes are flattened for the product.
      w: float32 [K, N], or [N, K] with `w_is_NK`.
      slots: `slots_of` a recipe, after `redraw`; traced leaves [6, ...].
      features: `features_of` all recipes of the program; static.
      g_probe: float32 [3, S]; the gradient with respect to it is the statistics of the slots BACKWARD. Its value is not
        read. None: no such statistics. Each call needs a probe of its own, as in products.quant_dot.
      w_is_NK: whether `w` carries its output axis first.
      compute_dtype: dtype of the operands, in which all quantized numbers are exact: bfloat16 or float32.
      columns_K: as in products.quant_dot; not with a transform of the slot fprop.x, which mixes columns.

    Returns:
      (float32 [..., N], float32 [3, S] statistics of the slots FORWARD or None without `Features.statistics`; without a
      derivative the third is empty, for nothing needs that copy).
      Gradients of x and w are float32, pass straight through the rounding, and are products of the backward slots.

    Raises:
      UserError: a probe without `Features.statistics`. ValueError: a contracted axis that blocks do not divide
      (`recipes.check_dimensions` says so in one sentence, and whose widths they are).
    """
    if g_probe is not None and not features[0].statistics:
        raise UserError("g_probe asks for statistics that this program does not compute: set statistics=True")
    flat, dtype = x_MK.reshape(-1, x_MK.shape[-1]), jnp.dtype(compute_dtype)
    y_MN, statistics = _slot_dot(flat, w, slots, g_probe, columns_K, features, w_is_NK, dtype)
    return y_MN.reshape(*x_MK.shape[:-1], y_MN.shape[-1]), statistics


def slot_dots(
    x_PMK,
    w_P,
    slots: Slot,
    features: tuple[Features, ...],
    g_probe=None,
    w_is_NK: bool = False,
    compute_dtype: Any = jnp.bfloat16,
) -> tuple[jax.Array, jax.Array | None]:
    """P products of matrices by one recipe; the other arguments are those of `slot_dot`.

    Args:
      x_PMK: float32. w_P: float32 [P, K, N], or [P, N, K] with `w_is_NK`.

    Returns:
      (float32 [P, M, N], float32 [3, S] of all products together or None). No two products are rounded by the same
      random numbers.
    """
    slots = jax.tree.map(jnp.asarray, slots)
    return _slot_dots(x_PMK, w_P, slots, g_probe, features, w_is_NK, jnp.dtype(compute_dtype))


def named_slot_statistics(forward, backward=None) -> dict[str, dict[str, jax.Array]]:
    """{slot: {name: float32}} of what slot_dot returned and, where given, of its probe's gradient; as
    slot_statistics.named. Both are float32 [..., 3, S]."""
    found = {}
    for part, indices in ((forward, FORWARD), (backward, BACKWARD)):
        if part is not None:
            found |= {SLOTS[index]: slot_statistics.named(part[..., i, :]) for i, index in enumerate(indices)}
    return {name: found[name] for name in SLOTS if name in found}
