"""The scale by which a tensor, or a block of it, is multiplied before it is rounded onto a format's grid. No jax.

A scale maps an amax (largest magnitude) to at most a *target*: the format's largest number, or 2^16 where that is less,
for the sum of products would overflow float32 otherwise. The *encode scale* multiplies an element, the *decode scale*
gives its value back.

`scale_for` is the scale of a whole tensor, row or column. Blocks have a decode scale by one of `RULES`:

    floor     2^(floor(log2 amax) - emax)           OCP Microscaling 1.0, 6.3: an amax above the largest is clipped
    rceil     2^(ceil(log2(amax / target)))         nothing is clipped; cuBLAS and Transformer Engine's MXFP8
    ceil      2^(ceil(log2 amax) - emax)            torchao
    even      floor of the amax rounded to the element's mantissa bits     torchao, Quark
    float32   amax / target                         per tensor, row or tile
    two_level one scale on an 8-bit format per block, and one float32 per tensor    NVFP4 (arXiv 2509.25149)

emax is the exponent of the target. Exponents are read from the bits, for log2 is inexact in XLA: rceil is that of the
exact quotient. Each function computes alike in NumPy and in jax: `xp` is the library, `bitcast` its reinterpretation of
bits.
"""

from collections.abc import Callable
from types import ModuleType

import numpy as np

LARGEST_SCALED = 2.0**16
RULES = ("floor", "rceil", "ceil", "even", "float32", "two_level")
FLOOR, RCEIL, CEIL, EVEN, FLOAT32, TWO_LEVEL = range(len(RULES))  # as data of a compiled program
FOUR_SIX = 1.5  # the second candidate of 4/6 (arXiv 2512.02010): the unrounded block scale times 6/4
_SMALLEST_NORMAL, _INFINITY = 0x00800000, 0x7F800000  # bits of float32
_MAX = np.float32(np.finfo(np.float32).max)


def _view(x, dtype):
    return np.asarray(x).view(dtype)


def scale_for(amax, fmt, power_of_two: bool = True, *, xp: ModuleType = np, bitcast: Callable = _view):
    """The largest power of two s with amax * s <= min(largest finite number, 2^16).

    Args:
      amax: of any shape, not negative; taken as float32.
      fmt: a FloatFormat or FormatParams; only `max_finite` is read.
      power_of_two: False gives the quotient of the two as float32 instead.
      xp, bitcast: the array library that computes, and its reinterpretation of bits; products.scale_for is jax's.

    Returns:
      float32 of that shape, from 2^-126 to 2^126, so that 1/s is exact too. (An amax beyond 2^125 is therefore clipped
      in formats with a largest number near 1.) 1 where amax is 0, below 2^-126 or not finite.
    """
    amax = xp.asarray(amax, xp.float32)
    bits = bitcast(amax, xp.int32)
    largest = xp.minimum(xp.asarray(fmt.max_finite, xp.float32), LARGEST_SCALED)
    usable = (bits >= _SMALLEST_NORMAL) & (bits < _INFINITY)
    if not power_of_two:
        return xp.where(usable, xp.clip(largest / xp.where(usable, amax, 1.0), 2.0**-126, 2.0**126), 1.0)
    largest = bitcast(largest, xp.int32)
    # Exponents by their fields, for log2 is inexact in XLA; one less where amax has the larger mantissa.
    exponent = (largest >> 23) - (bits >> 23) - ((bits & 0x7FFFFF) > (largest & 0x7FFFFF))
    scale = bitcast((xp.clip(exponent, -126, 126) + 127) << 23, xp.float32)
    return xp.where(usable, scale, 1.0)


def mx_exponent(amax, target, mantissa_bits, rule, *, xp: ModuleType = np, bitcast: Callable = _view):
    """The exponent e of a block's decode scale 2^e, exactly, by one of the four rules of powers of two.

    Args:
      amax: largest magnitude of each block, of any shape; taken as float32. Not negative.
      target: float32, what the largest element is mapped to; its exponent is emax.
      mantissa_bits: of the element format, read by EVEN.
      rule: FLOOR, RCEIL, CEIL or EVEN; may be traced.
      xp, bitcast: as in scale_for.

    Returns:
      int32 of that shape, from -126 (2^-127 is a subnormal float32, which XLA flushes on a CPU) to 126. An amax below
      2^-126 counts as zero, which has the smallest. The exponent of an amax that is not finite means nothing.
    """
    bits = bitcast(xp.asarray(amax, xp.float32), xp.int32)
    top = bitcast(xp.asarray(target, xp.float32), xp.int32)
    bits = xp.where(bits < _SMALLEST_NORMAL, 0, bits)
    field, mantissa = bits >> 23, bits & 0x7FFFFF
    up = xp.where(rule == RCEIL, mantissa > (top & 0x7FFFFF), (rule == CEIL) & (mantissa > 0))
    half_ulp = xp.asarray(1, xp.int32) << (22 - xp.asarray(mantissa_bits, xp.int32))
    field = xp.where(rule == EVEN, (bits + half_ulp) >> 23, field + up)
    return xp.clip(field - (top >> 23), -126, 126).astype(xp.int32)


def power_of_two(exponent, *, xp: ModuleType = np, bitcast: Callable = _view):
    """float32 2^exponent, exactly; exponents of int32 from -126 to 127."""
    return bitcast(((exponent + 127) << 23).astype(xp.int32), xp.float32)


def tensor_scale(amax, target, bound, *, xp: ModuleType = np):
    """The first level of two: the float32 encode scale that maps a tensor's amax to target * bound.

    min(bound * target / amax, largest float32); 1 where the amax is 0. Target and bound: what the largest element and
    the largest block scale become, 6 and 448 in NVFP4. Where the amax is below 2^-114 the inverse of this scale is a
    subnormal float32, which XLA flushes on a CPU: such a tensor becomes 0.
    """
    amax, target, bound = (xp.asarray(v, xp.float32) for v in (amax, target, bound))
    with np.errstate(over="ignore"):
        scale = xp.minimum(bound * target / xp.where(amax == 0, 1, amax), _MAX)
    return xp.where((amax == 0) | (scale == 0), xp.asarray(1, xp.float32), scale)


def block_scale(amax, tensor, target, factor=1.0, *, xp: ModuleType = np):
    """The second level before it is rounded onto its format: factor * (amax * (tensor * (1 / target))), float32.

    The order of the operations decides ties, and is that of Transformer Engine. `tensor` is tensor_scale's result;
    `factor` is FOUR_SIX for the other candidate of 4/6.
    """
    amax, tensor, target, factor = (xp.asarray(v, xp.float32) for v in (amax, tensor, target, factor))
    return factor * (amax * (tensor * (1 / target)))


def encode_scale(block, tensor, *, xp: ModuleType = np):
    """float32 encode scale of elements under two levels: min(1 / (block * (1 / tensor)), largest); 0 where block is 0.

    `block` is the rounded block scale, `tensor` the tensor's. An element is then q * block / tensor.
    """
    decode = xp.asarray(block, xp.float32) * (1 / xp.asarray(tensor, xp.float32))
    with np.errstate(divide="ignore", over="ignore"):
        return xp.where(decode >= 0, xp.where(block > 0, xp.minimum(1 / decode, _MAX), 0), decode).astype(xp.float32)
