"""The scale by which a tensor is multiplied before it is rounded onto the grid of a format. No jax.

A scale maps an amax (largest magnitude) to at most min(largest finite number, 2^16): for formats with many exponents
the sum of products would overflow float32 otherwise. It is the largest power of two that does.
"""

from collections.abc import Callable
from types import ModuleType

import numpy as np

LARGEST_SCALED = 2.0**16
_SMALLEST_NORMAL, _INFINITY = 0x00800000, 0x7F800000  # bits of float32


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
