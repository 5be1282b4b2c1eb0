"""Exact rounding of float32 onto the grid of a number format, with the format as data.

A format enters the compiled program as six scalars (`FormatParams`), so one program serves every format, and changing
the format compiles nothing. The arithmetic is on the bits of float32, whose magnitude s (31 bits, as an integer) rises
with the number. With M mantissa bits, shift = 23 - M and e0 the exponent of the smallest normal number of the format:

    normal     |x| >= 2^e0    nearest     (s + 2^(shift-1) - 1 + lsb) with the low `shift` bits cleared
                              stochastic  (s + r) with the low `shift` bits cleared, r the top `shift` bits of the noise
    subnormal  |x| <  2^e0    nearest     rint(|x| / step) * step                 step = 2^(e0 - M)
                              stochastic  the same addition on |x| as a fixed-point number with F = min(23, 30 - M)
                                          bits below a step

lsb is the lowest bit of the *code*, so ties go to the even code; where M = 0 that bit lies in the exponent field, and a
format whose bias differs in parity from float32's 127 flips it. A carry out of the mantissa runs into the exponent, as
it must. For BF16, e0 is float32's own -126 and the first line is right for subnormals too. No dtype conversion takes
part in rounding: XLA may fold a pair of casts to nothing, and the run would train in bfloat16 under the name of 8 bits.
No magic constant does either, because XLA folds it as well, and no log2 or exp2, which are inexact in XLA.

What happens to special values, exactly:

    -0                   stays -0 (P3109, which has none: +0); so does a negative number that rounds to zero
    float32 subnormals   exact: zero in every format but BF16, which keeps its own subnormals
    beyond max_finite    max_finite; with saturate=False infinity, or NaN in formats without infinity
    infinity             like any number beyond max_finite
    NaN                  NaN, also in formats without a code for it, so that it is seen

Stochastic rounding goes up with the probability of the fraction passed, exactly for normal numbers, and for subnormal
ones rounded down to a multiple of 2^-F of a step. Numbers on the grid stay. Both branches compare the fraction with the
same bits, the highest ones, so that formats with one grid (E0M7, and E1M6 at a quarter of the scale) round alike. The
random bits are a hash of (element index, seed) computed in place: no array of noise and no threefry, which costs
fifteen times as much.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import formats
from altgrad_jax.numerics.formats import FloatFormat

_SIGN, _MAGNITUDE, _INFINITY, _NAN = -(2**31), 0x7FFFFFFF, 0x7F800000, 0x7FC00000


class FormatParams(NamedTuple):
    """A format as a compiled program sees it: scalars of jax or NumPy, or arrays of one shape."""

    mantissa_bits: Any  # int32, 0 to 22
    min_exponent: Any  # int32, exponent of the smallest normal number, at least -126
    max_finite: Any  # float32
    overflow: Any  # float32: what a magnitude beyond max_finite becomes
    flip_parity: Any  # int32: 1 where the lowest bit of the code is not that of float32's exponent field, else 0
    zero_sign: Any  # int32: the sign bit where the format has -0, else 0


def format_params(fmt: FloatFormat, *, saturate: bool = True) -> FormatParams:
    """The scalars of a format, as NumPy scalars: they reach a device only as arguments of a compiled program.

    Raises UserError for saturate=False and a format with neither infinity nor NaN.
    """
    if not saturate:
        formats.require_overflow_code(fmt)
    overflow = fmt.max_finite if saturate else np.inf if fmt.has_inf else np.nan
    return FormatParams(
        mantissa_bits=np.int32(fmt.mantissa_bits),
        min_exponent=np.int32(fmt.minexp),
        max_finite=np.float32(fmt.max_finite),
        overflow=np.float32(overflow),
        flip_parity=np.int32(fmt.mantissa_bits == 0 and (127 - fmt.bias) % 2),
        zero_sign=np.int32(_SIGN if fmt.has_negative_zero else 0),
    )


def _bits(x):
    """Bits as int32: CPUs compare signed integers in fewer instructions, and no magnitude is negative."""
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _power_of_two(exponent):
    """Exact 2^exponent; BF16's subnormal step, which is never used, is out of range and becomes the nearest normal."""
    return _float((jnp.clip(exponent, -126, 127) + 127) << 23)


def round_to_format(x, params: FormatParams, *, seed=None) -> jax.Array:
    """x rounded onto the grid of a format.

    Args:
      x: float32, or bfloat16 or float16 (which are exact in float32), of any shape.
      params: from `format_params`; may be traced.
      seed: None rounds to nearest, ties to the even code. Two uint32, as `stochastic_seed` gives them, round
        stochastically; every element of x and every seed have their own random bits.

    Returns:
      float32 of the shape of x, each number exact in the format.

    Raises:
      TypeError: x has a dtype that float32 does not hold.
    """
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"round_to_format takes float32, bfloat16 or float16, not {x.dtype}")
    bits = _bits(x.astype(jnp.float32))
    size = bits & _MAGNITUDE
    lsb = jnp.int32(1) << (23 - params.mantissa_bits)
    first_normal = _first_normal(params)
    if seed is None:
        even = (size & lsb) == lsb * params.flip_parity
        half = lsb >> 1
        normal = (size + jnp.where(even, half - 1, half)) & -lsb
        step_exponent = params.min_exponent - params.mantissa_bits
        steps = lax.round(_float(size) * _power_of_two(-step_exponent), lax.RoundingMethod.TO_NEAREST_EVEN)
        subnormal = steps * _power_of_two(step_exponent)
    else:
        noise = random_bits(x.shape, seed)

        def highest(n_bits):
            return lax.shift_right_logical(noise, jnp.uint32(32) - n_bits.astype(jnp.uint32)).astype(jnp.int32)

        normal = (size + highest(23 - jnp.asarray(params.mantissa_bits))) & -lsb
        n_fraction = jnp.minimum(23, 30 - jnp.asarray(params.mantissa_bits))  # the sum fits 31 bits
        unit = params.min_exponent - params.mantissa_bits - n_fraction
        fixed = (_float(size) * _power_of_two(-unit)).astype(jnp.int32)
        fixed = (fixed + highest(n_fraction)) & -(jnp.int32(1) << n_fraction)
        subnormal = fixed.astype(jnp.float32) * _power_of_two(unit)
    rounded = jnp.where(size < first_normal, _bits(subnormal), normal)
    sign = bits & jnp.where(rounded == 0, params.zero_sign, _SIGN)
    rounded = jnp.where(rounded > _bits(params.max_finite), _bits(params.overflow), rounded)
    rounded = jnp.where(size > _INFINITY, _NAN, rounded)
    return _float(rounded | sign)


class Grid(NamedTuple):
    """Where the elements of a tensor may lie: at the numbers of a format, divided by a scale."""

    format: FormatParams
    scale: Any  # float32, a power of two; a scalar, or of a shape that broadcasts to the tensor's


def to_grid(x, grid: Grid, *, seed=None) -> jax.Array:
    """x, float32, rounded onto a grid; a value that is not finite stays what it is. `seed`: as in round_to_format."""
    q = round_to_format(x * grid.scale, grid.format, seed=seed) * (1 / jnp.asarray(grid.scale, jnp.float32))
    return jnp.where(jnp.isfinite(x), q, x)


def _first_normal(params):
    return jnp.where(params.min_exponent <= -126, 0, (params.min_exponent + 127) << 23)


def to_codes(q, params: FormatParams) -> jax.Array:
    """Signed codes, int32: the magnitude code of each number with the sign of the number; 0 and -0 are both 0.

    Neighbouring numbers have neighbouring codes, so the difference of two codes is a distance in units in the last
    place (ULPs). `q` is float32 and on the format's grid, scale 1.
    """
    bits = _bits(q)
    size = bits & _MAGNITUDE
    normal = (size >> (23 - params.mantissa_bits)) - ((params.min_exponent + 126) << params.mantissa_bits)
    steps = _float(size) * _power_of_two(params.mantissa_bits - params.min_exponent)
    code = jnp.where(size < _first_normal(params), steps.astype(jnp.int32), normal)
    return jnp.where(bits < 0, -code, code)


def from_codes(codes, params: FormatParams) -> jax.Array:
    """The float32 numbers of signed codes, the inverse of `to_codes`; codes beyond the last number give the last."""
    size = jnp.minimum(jnp.abs(codes), to_codes(params.max_finite, params))
    normal = _float((size + ((params.min_exponent + 126) << params.mantissa_bits)) << (23 - params.mantissa_bits))
    subnormal = size.astype(jnp.float32) * _power_of_two(params.min_exponent - params.mantissa_bits)
    is_subnormal = (size < (1 << params.mantissa_bits)) & (params.min_exponent > -126)
    value = jnp.where(is_subnormal, subnormal, normal)
    return jnp.where(codes < 0, -value, value)


def ulp(x, grid: Grid) -> jax.Array:
    """Distance from the number of a grid at or below |x| to the next larger one, float32 of the shape of x.

    2^(floor(log2 |x|) - M) for normal numbers, the even spacing of the subnormal ones below; beyond the largest number,
    the spacing there. (At a power of two the spacing towards zero is half of it.)
    """
    size = jnp.minimum(jnp.abs(x) * grid.scale, grid.format.max_finite)
    exponent = jnp.maximum((_bits(size) >> 23) - 127, grid.format.min_exponent)
    return _power_of_two(exponent - grid.format.mantissa_bits) * (1 / jnp.asarray(grid.scale, jnp.float32))


def _mix(h):
    """A bijection of 32 bits that spreads every bit over all (Ellis's lowbias32)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def stochastic_seed(seed, step, stream) -> jax.Array:
    """uint32 [2] for `round_to_format`, from a run's seed, the step, and the number of the tensor within the step.

    All three are whole numbers, possibly traced, taken modulo 2^32.
    """
    words = [lax.convert_element_type(jnp.asarray(word), jnp.uint32) for word in (seed, step, stream)]

    def chain(h):
        for word in words:
            h = _mix((h ^ word) + jnp.uint32(0x9E3779B9))
        return h

    return jnp.stack([chain(jnp.uint32(0x243F6A88)), chain(jnp.uint32(0x85A308D3))])


def random_bits(shape, seed):
    """uint32 of this shape: a hash of the row-major index and two seed words.

    One word shifts the index. The other enters between the two rounds of mixing, so that streams whose first words
    lie close together are not shifted copies of each other.
    """
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    h = index + seed[0]
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = ((h ^ (h >> 15)) + seed[1]) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _ste(x, params, seed, clipped_gradient):
    return round_to_format(x, params, seed=seed)


def _ste_forward(x, params, seed, clipped_gradient):
    keep = None
    if clipped_gradient == "zero":
        keep = jnp.abs(x) <= params.max_finite
    return round_to_format(x, params, seed=seed), keep


def _ste_backward(clipped_gradient, keep, g):
    return (g if keep is None else jnp.where(keep, g, 0)), None, None


_ste.defvjp(_ste_forward, _ste_backward)


def quantize_ste(x, params: FormatParams, *, seed=None, clipped_gradient: str = "pass"):
    """`round_to_format` whose gradient passes straight through the rounding.

    Args:
      x: float32 of any shape. params, seed: as in `round_to_format`.
      clipped_gradient: what a value beyond max_finite gets, for which straight-through is a choice. "pass": the
        gradient, unchanged, so that a clipped value can still be moved back. "zero": none, the derivative of the clip.

    Returns:
      float32 exactly on the grid. (The usual x + stop_gradient(q - x) leaves the grid: that sum is rounded again.)
    """
    if clipped_gradient not in ("pass", "zero"):
        raise UserError(f"clipped_gradient={clipped_gradient!r} cannot be used: give 'pass' or 'zero'")
    return _ste(x.astype(jnp.float32), params, seed, clipped_gradient)


def canary(fmt: FloatFormat, *, saturate: bool = True, round_fn=round_to_format) -> dict:
    """Proves, on the default device and under jit, that rounding onto a format happens and is the certified one.

    Two sets of inputs: those of the certificate, whose image must have its hash; and every number and midpoint of the
    format with the float32 numbers beside them, for bfloat16 inputs say little of a format with as many bits.

    Args:
      fmt, saturate: what the run uses.
      round_fn: called as round_fn(x_N, params); a caller hands in its own path to prove that one.

    Returns:
      The certificate, with `n_inputs`, `n_changed` (inputs whose rounding differs from themselves) and `device`.

    Raises:
      UserError: a result differs from the float64 oracle, or the image from the certificate.
    """
    certificate = formats.certificate(fmt, saturate=saturate)
    device = jax.devices()[0].device_kind
    image_x = formats.image_inputs(fmt)
    x_N = np.concatenate([image_x, formats.midpoints(fmt)])
    expected_N = formats.round_reference(fmt, x_N, saturate=saturate).astype(np.float32)
    q_N = np.asarray(jax.jit(lambda x_N, params: round_fn(x_N, params))(x_N, format_params(fmt, saturate=saturate)))
    n_wrong = int(np.sum((q_N != expected_N) & ~(np.isnan(q_N) & np.isnan(expected_N))))
    must_change, changed = (int(np.sum((y_N != x_N) & ~np.isnan(x_N))) for y_N in (expected_N, q_N))
    same_image = formats.image_hash(q_N[: image_x.size]) == certificate["image_sha256"]
    if n_wrong or not same_image:
        raise UserError(
            f"rounding to {fmt.name} is wrong on {device}: of {x_N.size} numbers {changed} changed and {must_change} "
            f"must, {n_wrong} results are wrong, and the image {'equals' if same_image else 'differs from'} the "
            "certificate, so the compiler altered the arithmetic and no result in this format would mean anything: "
            "run with another version of jax or without XLA_FLAGS"
        )
    return {**certificate, "n_inputs": x_N.size, "n_changed": changed, "device": device}
