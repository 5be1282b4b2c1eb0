"""The matrix product of every linear layer, forward and backward, in one place.

A linear layer is three products: y = x w, dx = g w^T and dw = x^T g. This module decides in which precision each one
runs. With no number format set, as in the baseline:

* a value is rounded to the compute dtype exactly when it becomes an *operand* of a product, and nowhere else;
* every product accumulates in float32 and returns float32, the weight gradient included. (A plain bfloat16 Dense layer
  rounds the weight gradient to bfloat16 on its way out: 8 bits of the quantity this project exists to measure.)
* forward and backward use the same rounded operands: the backward products read the operands the forward pass saved.

With formats, the operands W (w), A (x) and G (g), or some of them, are rounded onto the grid of a format instead, from
float32 and once: q = round(v * s) / s with a power of two s, the *encode scale* (1 / s is the decode scale). Nothing
else changes: an operand without a format is rounded to the compute dtype, results and gradients are float32, and
gradients pass straight through the rounding, a clipped value's too.

Why this is exact. Every number of a format with at most 7 mantissa bits is a bfloat16 number, and dividing it by a
power of two leaves it one. So the scale is put back into the operand, element by element if need be, and the bfloat16
product of such operands is the product a device would compute on codes and rescale, up to the order of its sums.
(Nothing falls below the normal numbers on the way: v is at least 2^-126, and rounding v * s to nearest goes no lower
than 2^-126 * s, unless to zero.) Formats with more mantissa bits take float32 operands at `Precision.HIGHEST`, which is
another program: `Rule.float32_operands`.

A scale comes from an amax, the largest magnitude (scales.scale_for). Which amax is the *scaling*:

    delayed   one scale, given by the caller from amaxes of earlier steps; `current` if it gives 0, as at the first step
    current   one scale, from the operand's own amax
    rowwise   one per output channel of W, and one per row (token) of A and of G
    1x32      one per 32 neighbours, and 1x128: along the contracted axis: K for W and A, N for G (that of dx)
    none      1

Scales that are not powers of two (`Rule.power_of_two=False`) cannot be put back into the operand without rounding it
again. For them, as with native products, the operands are the codes' own values (v * s rounded) and the float32 results
are divided by the scales, which needs one scale per operand: delayed, current or none.

`Rule.native` computes the products on float8 operands (Micikevicius et al. 2022): E4M3 and E5M2 only, the results
divided by the scales. On a CPU it equals the emulation up to the order of its sums; on a GPU of the Hopper generation
or later XLA hands it to cuBLASLt, which takes no product of two E5M2 operands and, with fast accumulation, keeps fewer
bits of the sum.

An operand is rounded once and used in two products, but scales per channel or block fit only one of them: that of y for
W and A, that of dx for G. In the other product they vary from term to term of the sum, which is exact here; a device
that applies scales to sums could not do it without rounding the operand a second time, differently.

Infinities and NaN pass unrounded, as in the baseline. To saturate them would hide a step that must not be applied.

Statistics (`FIELDS`) are reductions over an operand as it is rounded, one float32 vector each. Those of W and A are
returned beside y. G exists only inside the backward pass, so its vector leaves as the *cotangent* of an argument that
is otherwise unused: the gradient with respect to `g_probe` is the vector. Cotangents of one array used twice would be
added, which is wrong for maxima: every call needs a probe of its own (under scan, a row of the scanned input).

Axes: M rows (batch and time flattened), K inputs, N outputs, H steps of an amax history, S len(FIELDS).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import scales
from altgrad_jax.numerics.rounding import FormatParams, Grid, round_to_format
from altgrad_jax.numerics.rules import BLOCK_SIZES, PER_TENSOR, SCALINGS
from altgrad_jax.numerics.sums import combine, extremes, sums

# How the vectors of several micro-batches become one, field by field.
FIELDS = {
    "amax": jnp.maximum,  # largest magnitude
    "scale": jnp.minimum,  # the scale; the smallest, where there are several
    "smallest": jnp.minimum,  # smallest magnitude that is not 0; infinity where all are 0
    "count": jnp.add,  # elements
    "exposed": jnp.add,  # elements whose scale did not come from their own amax: only these can be clipped
    "clipped": jnp.add,  # elements beyond the largest finite number
    "flushed": jnp.add,  # elements that are not 0 and were rounded to 0
    "signal": jnp.add,  # sum of v^2
    "noise": jnp.add,  # sum of (q - v)^2
    "excess": jnp.add,  # sum of (v - clip(v))^2
}
_IDENTITY = {jnp.maximum: 0.0, jnp.minimum: np.inf, jnp.add: 0.0}


class Operand(NamedTuple):
    """A quantized operand as the compiled program sees it: traced scalars, or a leading axis under vmap."""

    format: FormatParams
    scale: Any = 0.0  # float32 from 2^-126 to 2^126, or 0; read by `delayed` only
    seed: jax.Array | None = None  # uint32 [2] rounds stochastically (rounding.stochastic_seed); None to nearest


class Operands(NamedTuple):
    """The three operands of a linear layer; None stays in the compute dtype."""

    w: Operand | None = None
    a: Operand | None = None
    g: Operand | None = None


@dataclass(frozen=True)
class Rule:
    """The static choices: a scaling for each operand, and how the products are computed.

    `float32_operands` must be set where any format has more than 7 mantissa bits, and costs speed elsewhere.
    `power_of_two`: whether scales are rounded down to powers of two. `native`: the float8 dtypes of W, A and G, whose
    formats the operands must then have. `observe`: a function of (elements of an operand, Grid) whose float32 vector is
    appended to the operand's statistics, and to the length of `g_probe`.
    """

    w: str = "delayed"
    a: str = "delayed"
    g: str = "delayed"
    float32_operands: bool = False
    power_of_two: bool = True
    native: tuple[str, str, str] | None = None
    observe: Callable | None = None

    def __post_init__(self):
        for operand in "wag":
            scaling = getattr(self, operand)
            if scaling not in SCALINGS:
                raise UserError(
                    f"there is no scaling {scaling!r} for {operand.upper()}: give one of {', '.join(SCALINGS)}"
                )
            if self.on_results and scaling not in PER_TENSOR:
                raise UserError(
                    f"scaling {scaling!r} of {operand.upper()} has many scales, but "
                    f"{'native products take' if self.native else 'scales that are no powers of two need'} "
                    f"one for each operand: give one of {', '.join(PER_TENSOR)}"
                )

    @property
    def on_results(self) -> bool:
        """Whether scales are taken off the results of the products instead of off the operands."""
        return self.native is not None or not self.power_of_two


class Statistics(NamedTuple):
    """float32 [S] of the operands of the forward product, fields as in FIELDS; None without a format."""

    w: jax.Array | None
    a: jax.Array | None


# scales.scale_for inside a compiled program.
scale_for = partial(scales.scale_for, xp=jnp, bitcast=lax.bitcast_convert_type)


def delayed_scale(history_H, params: FormatParams, power_of_two: bool = True) -> jax.Array:
    """The scale of `delayed` at a step, from the amaxes of the steps before (last axis); 0 while all are 0."""
    amax = jnp.max(history_H, axis=-1)
    return jnp.where(amax > 0, scale_for(amax, params, power_of_two), 0.0)


def push_amax(history_H, amax) -> jax.Array:
    """The history [..., H] with this step's amax [...] at its end and the oldest gone; unchanged by one not finite."""
    pushed_H = jnp.concatenate([history_H[..., 1:], amax[..., None]], axis=-1)
    return jnp.where(jnp.isfinite(amax)[..., None], pushed_H, history_H)


def empty_statistics() -> np.ndarray:
    """float32 [S] that changes nothing when combined. It also serves as a `g_probe`, whose value is never read."""
    return np.array([_IDENTITY[combine] for combine in FIELDS.values()], np.float32)


def combine_statistics(a, b) -> jax.Array:
    """Vectors [..., S] of two parts of a batch as that of both: amax by maximum, counts and energies by sum."""
    return combine(FIELDS, a, b)


def named_statistics(fields_S) -> dict[str, jax.Array]:
    """{name: float32 [...]} from vectors [..., S] of an operand.

    `overflow`: share of elements beyond the largest finite number; NaN, not applicable, where the scale came from the
    current amax, for then there are none by construction. `underflow`: share of elements that are not 0 and became 0.
    `clipped_energy`: |v - clip(v)|^2 / |v|^2. `sqnr_db`: 10 log10(|v|^2 / |q - v|^2), infinite where nothing was
    rounded. `amax`; `encode_scale`; `dynamic_range`: log2(amax / smallest magnitude that is not 0). NaN where all
    elements are 0. Energies are float32: they mean nothing where magnitudes lie below 1e-19.
    """
    f = {name: fields_S[..., i] for i, name in enumerate(FIELDS)}
    return {
        "overflow": f["clipped"] / f["exposed"],
        "underflow": f["flushed"] / f["count"],
        "clipped_energy": f["excess"] / f["signal"],
        "sqnr_db": 10 * (jnp.log10(f["signal"]) - jnp.log10(f["noise"])),
        "amax": f["amax"],
        "encode_scale": f["scale"],
        "dynamic_range": jnp.log2(f["amax"]) - jnp.log2(f["smallest"]),
    }


def _groups(v, scaling, axis, name):
    """v viewed so that elements with a common amax lie along whole axes, and those axes."""
    if scaling not in BLOCK_SIZES:
        return v, (axis,) if scaling == "rowwise" else (0, 1)
    size, block = v.shape[axis], BLOCK_SIZES[scaling]
    if size % block:
        raise UserError(
            f"{scaling} cannot scale operand {name}, whose contracted axis has {size} elements: give a "
            f"model whose dimensions are multiples of {block}, or another scaling"
        )
    return v.reshape(*v.shape[:axis], size // block, block, *v.shape[axis + 1 :]), (axis + 1,)


def column_scales(x) -> jax.Array:
    """float32 [K]: the power of two s by which the largest magnitude of each column of x [..., K] becomes at least 1
    and below 2; 2^126 for a column that is 0 everywhere. No gradient passes through it."""
    amax_K = jnp.max(jnp.abs(lax.stop_gradient(x)), axis=tuple(range(x.ndim - 1)))
    exponent_K = scales.mx_exponent(amax_K, 1.0, 0, scales.FLOOR, xp=jnp, bitcast=lax.bitcast_convert_type)
    return scales.power_of_two(-exponent_K, xp=jnp, bitcast=lax.bitcast_convert_type)


def scaled_columns(x_MK, columns_K):
    """x with its columns multiplied; x itself without scales."""
    return x_MK if columns_K is None else x_MK * columns_K


def unscaled_columns(q_MK, columns_K):
    """The inverse of `scaled_columns` for an operand, exact in its own dtype because the scales are powers of two."""
    return q_MK if columns_K is None else (q_MK.astype(jnp.float32) / columns_K).astype(q_MK.dtype)


def _extremes(size, along):
    """(amax of each group along these axes, the smallest of all that is not 0) of magnitudes."""
    (amax,), (smallest,) = extremes(size)
    if len(along) < size.ndim:
        return jnp.max(size, axis=along, keepdims=True), smallest
    return amax.reshape((1,) * size.ndim), smallest


def _scale_of(amax, operand, scaling, power_of_two):
    """(scale, the given scale or 0) of groups with these amaxes."""
    given = jnp.float32(1.0 if scaling == "none" else operand.scale if scaling == "delayed" else 0.0)
    return jnp.where(given > 0, given, scale_for(amax, operand.format, power_of_two)), given


def weight_scale(w, operand: Operand, rule: Rule, *, w_is_NK: bool = False) -> jax.Array:
    """The scale, or scales, by which quant_dot rounds this weight matrix: float32 that broadcasts to it.

    The ledger needs it to tell which code a weight has. Arguments as in quant_dot.
    """
    axis = 1 if w_is_NK else 0
    grouped, along = _groups(w, rule.w, axis, "W")
    amax = jnp.max(jnp.abs(grouped), axis=along, keepdims=True)
    scale, _ = _scale_of(amax, operand, rule.w, rule.power_of_two)
    if rule.w not in BLOCK_SIZES:
        return scale.reshape(1, 1) if scale.size == 1 else scale
    return jnp.broadcast_to(scale, grouped.shape).reshape(w.shape)


def _quantize(v, operand, scaling, axis, name, dtype, rule):
    """A float32 matrix rounded onto its format's grid, in `dtype`; what its products are divided by, or None where the
    scale is taken off the operand itself; and its statistics [S]. `axis` is contracted."""
    shape = v.shape
    v, along = _groups(v.astype(jnp.float32), scaling, axis, name)
    size = jnp.abs(v)
    amax, smallest = _extremes(size, along)
    scale, given = _scale_of(amax, operand, scaling, rule.power_of_two)
    scaled = v * scale
    if not rule.power_of_two:
        # The amax times its own scale may lie an ulp of float32 beyond the largest number.
        largest = operand.format.max_finite
        scaled = jnp.where(given > 0, scaled, jnp.clip(scaled, -largest, largest))
    scaled = round_to_format(scaled, operand.format, seed=operand.seed)
    stored = scaled * (1 / scale)
    q = jnp.where(jnp.isfinite(v), scaled if rule.on_results else stored, v).astype(dtype)
    descale = (1 / scale).reshape(()) if rule.on_results else None

    if not rule.on_results:
        stored = q.astype(jnp.float32)
    terms = [(stored == 0) & (v != 0), jnp.square(v), jnp.square(stored - v)]
    if scaling in ("delayed", "none"):  # from its own amax nothing is clipped
        limit = operand.format.max_finite / scale
        # With a scale from the own amax the limit may lie an ulp below it, by rounding: no clipping either.
        beyond = (size > limit) & (given > 0)
        terms += [beyond, jnp.where(beyond, jnp.square(size - limit), 0)]
    totals = sums(*terms)
    fields = {
        "amax": jnp.max(amax),
        "scale": jnp.min(scale),
        "smallest": smallest,
        "count": jnp.float32(v.size),
        "exposed": jnp.where(given > 0, jnp.float32(v.size), 0.0),
        "clipped": totals[3] if len(terms) > 3 else jnp.float32(0),
        "flushed": totals[0],
        "signal": totals[1],
        "noise": totals[2],
        "excess": totals[4] if len(terms) > 3 else jnp.float32(0),
    }
    statistics = jnp.stack([fields[field] for field in FIELDS])
    if rule.observe is not None:
        statistics = jnp.concatenate([statistics, rule.observe(v, Grid(operand.format, scale))])
    return q.reshape(shape), descale, statistics


def product(a, b, contract_a: int, contract_b: int, descales=()) -> jax.Array:
    """a . b over one axis of each, accumulated in float32, times `descales` (None: 1). float32 operands stay float32
    (never TF32)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    y = lax.dot_general(
        a, b, (((contract_a,), (contract_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    for descale in descales:
        # One after the other: the product of two scales may lie beyond float32.
        y = y if descale is None else y * descale
    return y


def weight_gradient(x_MK, g_MN, w_is_NK: bool = False, descales=()) -> jax.Array:
    """x^T g, float32 [K, N] or with `w_is_NK` [N, K]; operands and `descales` as in `product`."""

    def direct(x_MK, g_MN):
        return product(g_MN, x_MK, 0, 0, descales) if w_is_NK else product(x_MK, g_MN, 0, 0, descales)

    def transposed(x_MK, g_MN):
        # In halves, or XLA would fold the transpose into the product again.
        half = x_MK.shape[1] // 2
        x_KM = jnp.concatenate([x_MK[:, :half].T, x_MK[:, half:].T])
        # The barrier keeps XLA from folding the transpose of the result in the same way.
        dw_KN = lax.optimization_barrier(product(x_KM, g_MN, 1, 0, descales))
        return dw_KN.T if w_is_NK else dw_KN

    if not (x_MK.dtype == g_MN.dtype == jnp.bfloat16 and min(*x_MK.shape, *g_MN.shape) >= 8):
        return direct(x_MK, g_MN)
    # XLA's CPU backend multiplies bfloat16 matrices directly only where the columns of the left one are contracted. For
    # any other product it converts them to float32 first, at less than half the speed. Transposing x costs little.
    return lax.platform_dependent(x_MK, g_MN, cpu=transposed, default=direct)


def _plain_dot(x_MK, w, w_is_NK, compute_dtype) -> jax.Array:
    return _forward(x_MK, w, w_is_NK, compute_dtype)[0]


def _forward(x_MK, w, w_is_NK, compute_dtype):
    x_MK, w = x_MK.astype(compute_dtype), w.astype(compute_dtype)
    return product(x_MK, w, 1, 1 if w_is_NK else 0), (x_MK, w)


def _backward(w_is_NK, compute_dtype, operands, g_MN):
    x_MK, w = operands
    g_MN = g_MN.astype(compute_dtype)
    dx_MK = product(g_MN, w, 1, 0 if w_is_NK else 1)
    return dx_MK, weight_gradient(x_MK, g_MN, w_is_NK)


_plain_dot_MK = jax.custom_vjp(_plain_dot, nondiff_argnums=(2, 3))
_plain_dot_MK.defvjp(_forward, _backward)


def _as_operand(v, operand, scaling, axis, name, compute_dtype, rule):
    """The operand of a product, what its products are divided by, and its statistics; rounded to the compute dtype,
    None and None without a format."""
    dtype = jnp.dtype(jnp.float32) if rule.float32_operands else compute_dtype
    if operand is None:
        return v.astype(compute_dtype).astype(dtype), None, None
    if rule.native:
        dtype = jnp.dtype(rule.native["WAG".index(name)])
    return _quantize(v, operand, scaling, axis, name, dtype, rule)


def _quant_dot(x_MK, w, operands, g_probe, columns_K, w_is_NK, compute_dtype, rule) -> tuple[jax.Array, Statistics]:
    return _quant_forward(x_MK, w, operands, g_probe, columns_K, w_is_NK, compute_dtype, rule)[0]


def _quant_forward(x_MK, w, operands, g_probe, columns_K, w_is_NK, compute_dtype, rule):
    axis = 1 if w_is_NK else 0
    scaled_MK = scaled_columns(x_MK, columns_K)
    x_MK, a_descale, a_stats = _as_operand(scaled_MK, operands.a, rule.a, 1, "A", compute_dtype, rule)
    x_MK = unscaled_columns(x_MK, columns_K)
    w, w_descale, w_stats = _as_operand(w, operands.w, rule.w, axis, "W", compute_dtype, rule)
    y_MN = product(x_MK, w, 1, axis, (a_descale, w_descale))
    saved = x_MK, a_descale, w, w_descale, operands.g, g_probe is not None
    return (y_MN, Statistics(w_stats, a_stats)), saved


def _quant_backward(w_is_NK, compute_dtype, rule, saved, cotangents):
    x_MK, a_descale, w, w_descale, g_operand, probed = saved
    g_MN, _ = cotangents
    g_MN, g_descale, g_stats = _as_operand(g_MN, g_operand, rule.g, 1, "G", compute_dtype, rule)
    dx_MK = product(g_MN, w, 1, 0 if w_is_NK else 1, (g_descale, w_descale))
    dw = weight_gradient(x_MK, g_MN, w_is_NK, (g_descale, a_descale))
    return dx_MK, dw, None, g_stats if probed else None, None


_quant_dot_MK = jax.custom_vjp(_quant_dot, nondiff_argnums=(5, 6, 7))
_quant_dot_MK.defvjp(_quant_forward, _quant_backward)


def _check(operands, g_probe, columns_K, rule, compute_dtype):
    for name, operand in zip("WAG", operands):
        bits = None if operand is None else operand.format.mantissa_bits
        narrow = compute_dtype != jnp.float32 and not rule.float32_operands
        if narrow and isinstance(bits, (int, np.ndarray, np.generic)) and np.max(bits) > 7:
            raise UserError(
                f"a format with {np.max(bits)} mantissa bits, given for {name}, is not exact in "
                f"{compute_dtype}: set float32_operands=True"
            )
    if rule.native and columns_K is not None:
        raise UserError("native products have no scales of columns: give none, or compute emulated")
    if rule.native and None in operands:
        raise UserError("native products take float8 operands: give W, A and G a format each, or compute emulated")
    if g_probe is not None and operands.g is None:
        raise UserError("g_probe asks for statistics of an output gradient that has no format: give none")


@overload
def quant_dot(
    x, w, *, w_is_NK: bool = ..., compute_dtype=..., operands: None = ..., rule: Rule | None = ...
) -> jax.Array: ...
@overload
def quant_dot(
    x,
    w,
    *,
    w_is_NK: bool = ...,
    compute_dtype=...,
    operands: Operands,
    rule: Rule | None = ...,
    g_probe=...,
    columns_K=...,
) -> tuple[jax.Array, Statistics]: ...
def quant_dot(
    x,
    w,
    *,
    w_is_NK=False,
    compute_dtype=jnp.bfloat16,
    operands: Operands | None = None,
    rule: Rule | None = None,
    g_probe=None,
    columns_K=None,
):
    """Product of activations and a weight matrix, with float32 result and float32 gradients.

    Args:
      x: float32 [..., K]; leading axes are flattened for the product.
      w: float32 [K, N], or [N, K] with `w_is_NK` (the tied output head uses the embedding table as it lies).
      w_is_NK: whether `w` carries its output axis first.
      compute_dtype: dtype the operands x, w and the output gradient are rounded to (nearest even), unless by a format.
      operands: the formats of the three operands, and for `delayed` their scales. None: the layer is not quantized.
      rule: the static choices for these operands; default Rule().
      g_probe: float32 [S]; the gradient with respect to it is the statistics of the output gradient. Its value is not
        read. None: no such statistics.
      columns_K: float32 powers of two (`column_scales`): x is multiplied by them before it is quantized, and divided
        after; its statistics are of what is quantized. None: not. With emulated products only.

    Returns:
      float32 [..., N]; with `operands`, (that, Statistics). Gradients of x and w are float32 and are the exact
      derivatives of the product of the *rounded* operands, passed straight through the rounding. Cotangents of the
      statistics are ignored.

    Raises:
      UserError: blocks that do not divide their axis; a format with more than 7 mantissa bits without
        `float32_operands`, where the format is not traced; a probe without a format for G.
    """
    x_MK, compute_dtype = x.reshape(-1, x.shape[-1]), jnp.dtype(compute_dtype)
    if operands is None:
        y_MN = _plain_dot_MK(x_MK, w, w_is_NK, compute_dtype)
        return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])
    rule = rule or Rule()
    _check(operands, g_probe, columns_K, rule, compute_dtype)
    y_MN, statistics = _quant_dot_MK(x_MK, w, operands, g_probe, columns_K, w_is_NK, compute_dtype, rule)
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1]), statistics
