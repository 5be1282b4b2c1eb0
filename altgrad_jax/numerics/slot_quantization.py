"""One quantized operand of one product, as data: what a slot is, and how it quantizes a matrix.

    value = q * block * row

q lies on the element format's grid. `block` is one scale per block along the contracted axis, a power of two or a
number of an 8-bit scale format: q * block is exact in bfloat16 and is what enters the product. `row` is a float32 per
index that is not contracted, and multiplies the product's result. By rule (`scales.RULES`):

    floor rceil ceil even   block = 2^e, row = 1                 MX, tiles of powers of two, scales per row and tensor
    float32                 block = 1, row = amax / target       per tensor and per row, and an amax from earlier steps
    two_level               block on the scale format, row = 1 / the tensor's scale      NVFP4

float32 scales that vary along the contracted axis (tiles of DeepSeek-V3) fit neither factor: with `Features.tiles`
there is one `row` per K-tile of 128, and the product is a sum over tiles.

A `Slot` is traced. `Features` is static: what the program can do.

Infinities and NaN stay what they are; an amax that is not finite makes its block's other elements NaN (under two levels
those of the tensor), so that it is seen. Under an amax from earlier steps (`given`) elements saturate instead.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.numerics import hadamard, scales, slot_statistics
from altgrad_jax.numerics.blocks import ACROSS, ALONG, grains_of, of_block, of_neighbours
from altgrad_jax.numerics.products import scale_for
from altgrad_jax.numerics.recipes import EDEN_GROUP
from altgrad_jax.numerics.rounding import FormatParams, round_to_format
from altgrad_jax.numerics.scales import FLOAT32, TWO_LEVEL

TILE = 128
# Scales that are powers of two, float32 per row and tensor, and of two levels.
KINDS = ("power_of_two", "float32", "two_level")
_in_jax: dict[str, Any] = {"xp": jnp, "bitcast": lax.bitcast_convert_type}


class Slot(NamedTuple):
    """Everything about one operand of one product, traced. Leaves may carry leading axes, [6] or [layers, 6]."""

    format: FormatParams
    scale_format: FormatParams  # of the block scales of TWO_LEVEL
    rule: Any  # int32, index into scales.RULES
    along: Any  # int32, index into blocks.ALONG
    across: Any  # int32, index into blocks.ACROSS
    target: Any  # float32: what an amax is mapped to
    bound: Any  # float32: what the largest block scale of TWO_LEVEL is mapped to
    shrink: Any  # float32: what a scaled element is divided by, and the result multiplied by
    given: Any  # float32: the tensor's amax from earlier steps; 0: its own
    source: Any  # int32, index into recipes.SOURCES
    high: Any  # bool: not quantized
    stochastic: Any  # bool
    four_six: Any  # bool
    eden: Any  # bool: MS-EDEN's corrected block scales
    rotation: Any  # int32: size of the Hadamard blocks, 0 for none
    redrawn: Any  # bool: whether `redraw` draws new signs
    signs: Any  # float32 [hadamard.LARGEST]
    seed: Any  # uint32 [2] of stochastic rounding


@dataclass(frozen=True)
class Features:
    """What the program of one slot can do; static.

    along, across: sides of blocks that occur, rising, 0 for all; the smallest along is the grain of the statistics of
    blocks. kinds: the kinds of scales that occur, of KINDS. rotation: the largest Hadamard blocks, 0 for none.
    requantize: whether some copy is made of the forward copy; shared: whether some copy is the first one. tiles:
    whether products are sums over K-tiles. lazy: whether what a slot does not use is skipped (lax.cond) or computed and
    dropped (for vmap, where cond computes both anyway).
    statistics: whether block statistics are computed; they change no result.
    """

    along: tuple[int, ...] = ALONG
    across: tuple[int, ...] = ACROSS
    kinds: tuple[str, ...] = KINDS
    stochastic: bool = True
    four_six: bool = True
    eden: bool = True
    requantize: bool = True
    shared: bool = True
    rotation: int = hadamard.LARGEST
    tiles: bool = False
    lazy: bool = True
    statistics: bool = False


class Quantized(NamedTuple):
    """An operand as it enters a product."""

    q: jax.Array  # of the operand's shape, in the compute dtype
    row_TR: jax.Array  # float32 [tiles, rows]: what the results of a tile's product are multiplied by


def choose(lazy, flag, yes, no, *args):
    """yes(*args) where the traced flag is set, else no(*args)."""
    if lazy:
        return lax.cond(flag, yes, no, *args)
    return jax.tree.map(partial(jnp.where, flag), yes(*args), no(*args))


class _Scales(NamedTuple):
    """Per grain along the contracted axis and row across it; `row` broadcasts to that."""

    amax: jax.Array  # of the block
    tensor: Any  # the tensor's encode scale, of TWO_LEVEL
    encode: jax.Array  # what elements are multiplied by
    block: jax.Array
    row: jax.Array


def _scales_of(own, tensor_amax, slot, axis, features):
    """_Scales of amaxes of blocks; NaN where an amax that counts is not finite."""
    two, power = slot.rule == TWO_LEVEL, slot.rule < FLOAT32
    amax = jnp.where((slot.given > 0) & ~two, slot.given, own)
    # Without tiles a float32 scale belongs to whole rows, whose grains have one amax.
    of_row = amax if features.tiles else lax.slice_in_dim(amax, 0, 1, axis=axis)
    of_kind = {}  # (what elements are multiplied by, block before its division, row)
    tensor = jnp.float32(1)
    if "float32" in features.kinds:
        factor = scale_for(of_row, slot.format._replace(max_finite=slot.target), power_of_two=False)
        of_kind["float32"] = factor, jnp.float32(1), 1 / factor
    if "power_of_two" in features.kinds:
        exponent = scales.mx_exponent(amax, slot.target, slot.format.mantissa_bits, slot.rule, **_in_jax)
        of_kind["power_of_two"] = scales.power_of_two(-exponent, **_in_jax), jnp.float32(1), jnp.float32(1)
    if "two_level" in features.kinds:
        tensor_amax = jnp.where(slot.given > 0, slot.given, tensor_amax)
        tensor = scales.tensor_scale(tensor_amax, slot.target, slot.bound, xp=jnp)
        on_format = jnp.minimum(scales.block_scale(amax, tensor, slot.target, xp=jnp), slot.bound)
        on_format = round_to_format(on_format, slot.scale_format)
        of_kind["two_level"] = scales.encode_scale(on_format, tensor, xp=jnp), on_format, 1 / tensor
    encode, block, row = _chosen(of_kind, {"power_of_two": power, "two_level": two})
    # Both end in a division: XLA's CPU backend computes no division again for each of the elements that read it,
    # whereas it would a chain of cheap operations, and drops an optimization_barrier before it decides so.
    block = block / jnp.where(power, encode, 1.0)
    block = jnp.where(amax < jnp.inf, block, jnp.nan)
    row = jnp.broadcast_to(row * slot.shrink, of_row.shape)
    return _Scales(amax, tensor, encode / slot.shrink, block, row)


def _chosen(of_kind, flags):
    """The values of the kind whose flag is set; of the first one where none is."""
    names = list(of_kind)
    found = of_kind[names[0]]
    for name in names[1:]:
        found = tuple(jnp.where(flags[name], new, old) for new, old in zip(of_kind[name], found, strict=True))
    return found


def _scaled(grains, encode, axis):
    return grains * jnp.expand_dims(encode, axis + 1)


def _rounded(grains, encode, slot, axis):
    return round_to_format(_scaled(grains, encode, axis), slot.format)


def _of_block(a, slot, axis, features, reduce):
    return of_block(a, slot.along, slot.across, axis, (features.along, features.across), reduce)


def _four_or_six(grains, found, slot, axis, features):
    """(encode, block) of the candidate with the smaller squared error over the block; ties to 6."""
    four = scales.block_scale(found.amax, found.tensor, slot.target, scales.FOUR_SIX, xp=jnp)
    four = round_to_format(four, slot.scale_format)
    pairs = (found.encode, found.block), (scales.encode_scale(four, found.tensor, xp=jnp), four)
    errors = []
    for encode, block in pairs:
        error = _scaled(_rounded(grains, encode, slot, axis), block * found.row, axis) - grains
        errors.append(_of_block(jnp.sum(jnp.square(error), axis + 1), slot, axis, features, jnp.sum))
    return tuple(jnp.where(errors[1] < errors[0], b, a) for a, b in zip(*pairs, strict=True))


def _eden(grains, found, slot, axis):
    """Block scales times <x,x> / <x,q> of their group, stochastically rounded onto the scale format (MS-EDEN)."""
    q = _scaled(_rounded(grains, found.encode, slot, axis), found.block * found.row, axis)
    per = max(EDEN_GROUP // grains.shape[axis + 1], 1)
    xx, xq = (of_neighbours(jnp.sum(grains * other, axis + 1), per, axis, jnp.sum) for other in (grains, q))
    correction = jnp.where(xq > 0, xx / jnp.where(xq > 0, xq, 1.0), 1.0)
    return round_to_format(found.block * correction, slot.scale_format, seed=slot.seed)


def _elements(grains, encode, block, slot, axis, dtype, stochastic):
    """q * block in the compute dtype; unrounded what is not finite, and in slots that are not quantized."""
    keep = slot.high | ~jnp.isfinite(grains)
    q = round_to_format(_scaled(grains, encode, axis), slot.format, seed=slot.seed if stochastic else None)
    return jnp.where(keep, grains, _scaled(q, block, axis)).astype(dtype)


def first_of(a, *_):
    return a


def rotate(v, slot, axis, size, inverse=False):
    matrix = hadamard.matrix(slot.rotation, slot.signs, size)
    return hadamard.rotated(v, matrix.T if inverse else matrix, axis)


def _of_tiles(row, axis, grain):
    """[tiles, rows] of factors per grain and row, or of one per row, which is then that of every tile."""
    row = row if axis == 0 else row.T
    return row[:: TILE // grain] if row.shape[0] > 1 else row


# Jitted, so that a slot of one shape is traced and lowered once, however often a derivative passes.
@partial(jax.jit, static_argnames=("axis", "features", "dtype"))
def quantize_slot(v, slot: Slot, axis: int, features: Features = Features(), dtype: Any = jnp.bfloat16):
    """A matrix as the operand of a product that contracts `axis`.

    Args:
      v: float32 [rows, columns].
      slot: of scalars (signs [hadamard.LARGEST], seed [2]); `source` is not read.
      axis: 0 or 1. dtype: the compute dtype, bfloat16 or float32.

    Returns:
      (Quantized, statistics float32 [S] or None without `features.statistics`).

    Raises:
      ValueError: the axis is no multiple of the smallest block that the program knows.
    """
    v = v.astype(jnp.float32)
    lazy, grain = features.lazy, features.along[0] or v.shape[axis]
    if v.shape[axis] % grain:
        raise ValueError(f"the contracted axis has {v.shape[axis]} elements: give a multiple of {grain}")
    if features.rotation:
        turned = partial(rotate, axis=axis, size=features.rotation)
        v = choose(lazy, slot.rotation > 0, turned, first_of, v, slot)
    grains = grains_of(v, axis, grain)
    # By bits: no negative number, and NaN above infinity.
    size = jnp.max(lax.bitcast_convert_type(grains, jnp.int32) & 0x7FFFFFFF, axis=axis + 1)
    as_float = partial(lax.bitcast_convert_type, new_dtype=jnp.float32)
    own = as_float(_of_block(size, slot, axis, features, jnp.max))
    tensor_amax = as_float(jnp.max(size))
    found = _scales_of(own, tensor_amax, slot, axis, features)
    if features.four_six:
        better = partial(_four_or_six, axis=axis, features=features)
        encode, block = choose(lazy, slot.four_six, better, lambda g, f, s: (f.encode, f.block), grains, found, slot)
        found = found._replace(encode=encode, block=block)
    if features.eden:
        block = choose(lazy, slot.eden, partial(_eden, axis=axis), lambda g, f, s: f.block, grains, found, slot)
        found = found._replace(block=block)
    nearest, stochastic = (partial(_elements, axis=axis, dtype=dtype, stochastic=s) for s in (False, True))
    args = grains, found.encode, found.block, slot
    stored = choose(lazy, slot.stochastic, stochastic, nearest, *args) if features.stochastic else nearest(*args)
    row_TR = _of_tiles(found.row, axis, grain)
    quantized = Quantized(stored.reshape(v.shape), jnp.where(slot.high, 1.0, row_TR))
    if not features.statistics:
        return quantized, None
    decode = jnp.broadcast_to(found.block * found.row, found.block.shape)
    scales_of = tensor_amax, own, found.encode, found.block, decode, found.row
    return quantized, slot_statistics.measure(grains, stored, slot, *scales_of, axis=axis)


def dequantized(quantized: Quantized, axis: int) -> jax.Array:
    """float32 values of an operand whose product contracts `axis`, rotated as it is."""
    q, row_TR = quantized.q.astype(jnp.float32), quantized.row_TR
    rows = jnp.repeat(row_TR, q.shape[axis] // row_TR.shape[0], axis=0)
    return q * (rows if axis == 0 else rows.T)


def in_tensor_basis(quantized: Quantized, slot: Slot, axis: int, features: Features) -> jax.Array:
    """float32 values of an operand with its rotation undone."""
    v = dequantized(quantized, axis)
    if not features.rotation:
        return v
    back = partial(rotate, axis=axis, size=features.rotation, inverse=True)
    return choose(features.lazy, slot.rotation > 0, back, first_of, v, slot)
