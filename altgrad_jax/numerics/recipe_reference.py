"""Recipes in NumPy: slow, obvious arithmetic that the compiled slots are held to. No jax.

Elements and powers of two are computed in float64, where they are exact. Where a definition rounds in float32 (scales
of two levels, float32 scales) the same operations are written out in NumPy's float32. Rotations are not in here: what
is quantized has been rotated before.
"""

from collections.abc import Callable

import numpy as np

from altgrad_jax.numerics import formats
from altgrad_jax.numerics.formats import FloatFormat, decode, get_format, get_scale_format, round_reference
from altgrad_jax.numerics.recipes import EDEN_GROUP, FIRST_COPY, SLOTS, Recipe, SlotSpec

_MAX = np.float32(np.finfo(np.float32).max)
_ONE = np.float32(1)


def over_blocks(a, sides: tuple[int, int], axis: int, reduce: np.ufunc) -> np.ndarray:
    """A statistic of every block, given to each of its elements. sides: (along `axis`, across it), 0 for all."""
    for side, along in zip(sides, (axis, 1 - axis), strict=True):
        side = side or a.shape[along]
        starts = np.arange(0, a.shape[along], side)
        lengths = np.minimum(side, a.shape[along] - starts)
        a = np.repeat(reduce.reduceat(a, starts, axis=along), lengths, axis=along)
    return a


def exponent(amax, target: float, fmt: FloatFormat, rule: str) -> np.ndarray:
    """The exponent of a block's decode scale, from -126 to 126, by a rule of scales.RULES; an amax of 0 has -126."""
    amax = np.asarray(amax, np.float64)
    size = np.where(amax > 0, amax, 1.0)
    floor, emax = np.frexp(size)[1] - 1, np.frexp(target)[1] - 1
    if rule == "floor":
        e = floor - emax
    elif rule == "ceil":
        e = floor - emax + (np.ldexp(1.0, floor) < size)
    elif rule == "even":
        steps = np.round(np.ldexp(size, fmt.mantissa_bits - floor))  # halves to even
        e = np.frexp(np.ldexp(steps, floor - fmt.mantissa_bits))[1] - 1 - emax
    else:
        e = floor - emax - 1
        while np.any(above := np.ldexp(target, e) < size):
            e = e + above
    return np.where(amax > 0, np.clip(e, -126, 126), -126)


def random_bits(shape, seed) -> np.ndarray:
    """uint32 of this shape, those of rounding.random_bits."""
    h = np.arange(np.prod(shape), dtype=np.uint64).astype(np.uint32).reshape(shape) + np.uint32(seed[0])
    h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
    h = ((h ^ (h >> 15)) + np.uint32(seed[1])) * np.uint32(0x846CA68B)
    return h ^ (h >> 16)


def stochastic(fmt: FloatFormat, x, noise) -> np.ndarray:
    """float64 x rounded to a neighbour, up if the fraction passed and the highest bits of the noise carry."""
    size = np.abs(x)
    values = decode(fmt, np.arange(fmt.max_code + 1))
    below = np.searchsorted(values, size, side="right") - 1
    above = np.minimum(below + 1, fmt.max_code)
    gap = np.where(above > below, values[above] - values[below], 1.0)
    normal = size >= fmt.smallest_normal if fmt.exponent_bits else np.zeros(size.shape, bool)
    bits = np.where(normal, 23 - fmt.mantissa_bits, min(23, 30 - fmt.mantissa_bits))
    fraction = np.floor(np.ldexp(np.minimum((size - values[below]) / gap, 1), bits))
    up = fraction + (noise.astype(np.int64) >> (32 - bits)) >= 2.0**bits
    return np.copysign(values[np.where(up, above, below)], x)


def _rounded(fmt, scaled, spec, seed):
    """float64 of float32 scaled elements, on the grid."""
    scaled = scaled.astype(np.float64)
    if spec.rounding == "nearest":
        return round_reference(fmt, scaled)
    return stochastic(fmt, scaled, random_bits(scaled.shape, seed))


def two_level(v, fmt: FloatFormat, spec: SlotSpec, axis: int, seed=(0, 0), given: float = 0.0) -> np.ndarray:
    """float64 values of a float32 matrix by NVFP4's two levels of scales, and by 4/6 or MS-EDEN."""
    grid = get_scale_format(spec.scale).grid
    assert grid is not None
    target, bound = np.float32(spec.target), np.float32(spec.bound)
    size = np.abs(v)
    largest = np.float32(given) if given else size.max()
    tensor = _ONE
    if largest > 0:
        with np.errstate(over="ignore"):
            tensor = np.minimum(bound * target / largest, _MAX)
    unrounded = over_blocks(size, spec.sides, axis, np.maximum) * (tensor * (_ONE / target))
    six = round_reference(grid, np.minimum(unrounded, bound)).astype(np.float32)
    block, q = six, _rounded(fmt, v * _encode(six, tensor), spec, seed)
    row = np.float64(_ONE / tensor)
    if spec.correction == "four_six":
        four = round_reference(grid, np.float32(1.5) * unrounded).astype(np.float32)
        q_four = _rounded(fmt, v * _encode(four, tensor), spec, seed)
        errors = [
            over_blocks(np.square(a * s * row - v), spec.sides, axis, np.add) for a, s in ((q, six), (q_four, four))
        ]
        block, q = np.where(errors[1] < errors[0], four, block), np.where(errors[1] < errors[0], q_four, q)
    if spec.correction == "ms_eden":
        block = _eden(v, q * block * row, block, grid, spec, axis, seed)
    return q * block.astype(np.float64) * row


def _encode(block, tensor):
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(block > 0, np.minimum(_ONE / (block * (_ONE / tensor)), _MAX), np.float32(0))


def _eden(v, q, block, grid, spec, axis, seed):
    group = (EDEN_GROUP, 1)
    xx, xq = (over_blocks(v.astype(np.float64) * other, group, axis, np.add) for other in (v, q))
    corrected = block * np.where(xq > 0, xx / np.where(xq > 0, xq, 1), 1).astype(np.float32)
    first = (
        (slice(None, None, spec.sides[0]), slice(None))
        if axis == 0
        else (slice(None), slice(None, None, spec.sides[0]))
    )
    rounded = stochastic(grid, corrected[first].astype(np.float64), random_bits(corrected[first].shape, seed))
    return np.repeat(rounded, spec.sides[0], axis=axis)


def quantize(v, spec: SlotSpec, axis: int, seed=(0, 0), given: float = 0.0) -> np.ndarray:
    """float64 values of a float32 matrix as the operand of a product that contracts `axis`.

    seed: of stochastic rounding, uint32 [2]. given: the amax of earlier steps, 0 for its own.
    """
    fmt = get_format(spec.element)
    if spec.high:
        return round_reference(formats.FORMATS["BF16"], v)
    if spec.rule == "two_level":
        return two_level(v, fmt, spec, axis, seed, given)
    amax = np.full_like(v, given) if given else over_blocks(np.abs(v), spec.sides, axis, np.maximum)
    shrink = np.float32(spec.shrink)
    if spec.rule == "float32":
        usable = amax >= np.float32(2.0**-126)
        factor = np.float32(spec.target) / np.where(usable, amax, _ONE)
        factor = np.where(usable, np.clip(factor, np.float32(2.0**-126), np.float32(2.0**126)), _ONE)
        return _rounded(fmt, v * (factor / shrink), spec, seed) * np.float64((_ONE / factor) * shrink)
    scale = np.ldexp(1.0, exponent(amax, float(np.float32(spec.target)), fmt, spec.rule))
    encode = (1 / scale).astype(np.float32) / shrink
    return _rounded(fmt, v * encode, spec, seed) * scale * np.float64(shrink)


def operands(x_MK, w_KN, g_MN, recipe: Recipe, seeds, rotate: Callable, given=(0.0,) * 6) -> list[np.ndarray]:
    """float64 values of the six operands, rotated, in the order of SLOTS.

    seeds: uint32 [6, 2]. rotate: of (float32 matrix, slot index, axis), the rotation of that slot.
    """
    tensors, axes = (x_MK, w_KN, g_MN, w_KN, x_MK, g_MN), (1, 0, 1, 1, 0, 0)
    found: list[np.ndarray] = []
    for i, spec in enumerate(recipe.slots):
        if spec.source == "shared":
            found.append(found[FIRST_COPY[i]])
            continue
        v = found[FIRST_COPY[i]].astype(np.float32) if spec.source == "fprop" else tensors[i]
        v = rotate(v, i, axes[i]) if spec.rotation else v
        found.append(quantize(v, spec, axes[i], seeds[i], given[i]))
    assert len(found) == len(SLOTS)
    return found
