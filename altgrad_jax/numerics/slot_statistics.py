"""What the quantization of a slot did, as one float32 vector per slot: counts, energies and block scales.

The vectors of micro-batches, or of devices, combine field by field (`FIELDS`); `named` turns them into shares and
ratios. A block counts once for each grain and row that it covers (numerics/blocks.py), so that shares are of elements
where a tensor ends in short blocks. Slots in the compute dtype have no block scales.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.numerics.sums import extremes, sums

N_BINS = 16
# A block's amax counts as clipped beyond the largest number by more than what rounding of its scale in float32 does.
_TOLERANCE = np.float32(1 + 2.0**-20)
FIELDS = {
    "count": jnp.add,  # elements
    "amax": jnp.maximum,  # largest magnitude, after the transform
    "smallest_log2": jnp.minimum,  # log2 of the smallest decode scale that is not 0; infinity without blocks
    "largest_log2": jnp.maximum,  # of the largest; -infinity without blocks
    "blocks": jnp.add,  # decode scales, one for each grain and row
    "zero_scale": jnp.add,  # those that are 0: every element of the block becomes 0
    "clipped": jnp.add,  # those whose amax lies beyond the largest number
    "log2_sum": jnp.add,  # sum of log2 of the decode scales that are positive
    "log2_square": jnp.add,  # sum of its squares
    "top_code": jnp.add,  # elements at the largest number
    "flushed": jnp.add,  # elements that are not 0 and became 0
    "signal": jnp.add,  # <x, x>
    "missing": jnp.add,  # <x, x - q>
    "noise": jnp.add,  # |q - x|^2
    "fourth": jnp.add,  # kurtosis times elements
    "compared": jnp.add,  # <x, x> where the tensor has a first copy
    "distance": jnp.add,  # |second copy - first copy|^2, both rotated back
    **{f"bin_{i}": jnp.add for i in range(N_BINS)},  # scales from 2^-i to 2^-(i+1) of the tensor's largest one
}
_IDENTITY = {jnp.add: 0.0, jnp.maximum: -np.inf, jnp.minimum: np.inf}
_SIGNAL, _COMPARED, _DISTANCE = map(list(FIELDS).index, ("signal", "compared", "distance"))


def empty() -> np.ndarray:
    """float32 [S] that changes nothing when combined."""
    return np.array([_IDENTITY[combine] for combine in FIELDS.values()], np.float32)


def measure(grains, stored, slot, amax_of_all, amax, encode, block, decode, row, *, axis: int) -> jax.Array:
    """float32 [S] of one operand.

    Args:
      grains: what was quantized, float32, its contracted axis split into grains at `axis`.
      stored: the operand as it enters the product, of that shape.
      slot: the traced slot, of which the largest number is read, and whether it is quantized.
      amax_of_all: float32, the largest magnitude. amax: float32 per grain and row, of its block.
      encode, block, decode: float32 scales per grain and row: that which multiplies an element, that which is in the
        operand, and that of the value.
      row: float32 that broadcasts to them: what results are multiplied by.
    """
    stored = stored.astype(jnp.float32)
    (largest_scale,), (smallest_scale,) = extremes(decode)
    top = jnp.expand_dims(jnp.where(block > 0, slot.format.max_finite * block, jnp.inf), axis + 1)
    q = stored * jnp.expand_dims(jnp.where(slot.high, 1.0, row), axis + 1)
    # The fourth power of a gradient may be no float32.
    square = jnp.square(grains / jnp.where(amax_of_all > 0, amax_of_all, 1.0))
    of_elements = sums(
        jnp.abs(stored) >= top,
        (q == 0) & (grains != 0),
        jnp.square(grains),
        grains * (grains - q),
        jnp.square(q - grains),
        square,
        jnp.square(square),
    )
    count = jnp.float32(grains.size)
    fourth = count * count * of_elements[6] / jnp.square(of_elements[5])
    clipped = amax * encode > slot.format.max_finite * _TOLERANCE
    of_scales = _of_scales(decode, clipped, largest_scale, smallest_scale)
    zero = jnp.float32(0)
    found = jnp.concatenate([of_elements[:5], jnp.stack([count, amax_of_all, fourth, zero, zero]), of_scales])
    # A slot that is not quantized has no scales.
    return jnp.where(slot.high & _IS_OF_SCALES, empty(), found[_ORDER])


# What `measure` computes, in its order, and where the fields stand there.
_ELEMENTS = ("top_code", "flushed", "signal", "missing", "noise", "count", "amax", "fourth", "compared", "distance")
_SCALES = ("zero_scale", "clipped", "log2_sum", "log2_square", *(f"bin_{i}" for i in range(N_BINS)))
_MEASURED = (*_ELEMENTS, *_SCALES, "smallest_log2", "largest_log2", "blocks")
_ORDER = np.array([_MEASURED.index(name) for name in FIELDS])
_IS_OF_SCALES = np.array([name == "top_code" or name not in _ELEMENTS for name in FIELDS])


def _of_scales(decode, clipped, largest_scale, smallest_scale):
    """float32: the fields of the decode scales and of which blocks are clipped, _SCALES and the three after them.
    smallest_scale: of those that are not 0."""
    positive = decode > 0
    log2 = jnp.where(positive, jnp.log2(jnp.where(positive, decode, 1.0)), 0.0)
    ratio = largest_scale / jnp.where(positive, decode, 1.0)
    octave = (lax.bitcast_convert_type(ratio, jnp.int32) >> 23) - 127  # the floor of its log2, exactly
    octave = jnp.where(positive, jnp.clip(octave, 0, N_BINS - 1), N_BINS)
    # One array, so that all are one reduction.
    counted = jnp.stack([decode == 0, clipped, log2, jnp.square(log2)]).astype(jnp.float32)
    bins = octave == np.arange(N_BINS).reshape(-1, *[1] * octave.ndim)
    term = jnp.concatenate([counted, bins.astype(jnp.float32)])
    ends = jnp.log2(jnp.stack([smallest_scale, largest_scale]))
    return jnp.concatenate([sums(term, lead=1)[0], ends, jnp.full(1, decode.size, jnp.float32)])


def with_distance(statistics_S, first, second) -> jax.Array:
    """The vector of a tensor's second copy with its distance from the first; both float32, dequantized, not rotated."""
    distance = jnp.sum(jnp.square(second - first))
    return compared(statistics_S).at[_DISTANCE].set(distance)


def compared(statistics_S) -> jax.Array:
    """The vector of a first copy as that of a second one that is the same."""
    return statistics_S.at[_COMPARED].set(statistics_S[_SIGNAL])


def named(vector) -> dict[str, jax.Array]:
    """{name: float32 [...]} from vectors [..., S]; `scale_histogram` is [..., 16].

    `zero_scale`, `clipped`: shares of blocks whose scale is 0, and whose amax was clipped.
    `decode_scale_log2_mean`, `_std`, `_min`, `_max`: of log2 of the decode scales. `scale_histogram`: share of the
    scales from 2^-i to 2^-(i+1) of the tensor's largest one, the last bin everything below. `top_code`: share of
    elements at the largest number. `underflow`: share of elements that were not 0 and became 0. `shrinkage`:
    1 - <x, q> / <x, x>. `sqnr_db`: 10 log10(<x, x> / |q - x|^2), infinite where nothing was rounded. `amax`.
    `copy_distance`: |second - first copy|^2 / <x, x>; NaN for a tensor's first copy. `kurtosis`: mean x^4 over the
    square of mean x^2 (3 for Gaussian numbers; the mean over micro-batches, weighted by elements). NaN where nothing
    counts: blocks of a slot that is not quantized, energies of zeros.
    """
    f = {name: vector[..., i] for i, name in enumerate(FIELDS)}
    scaled = f["blocks"] - f["zero_scale"]
    mean = f["log2_sum"] / scaled
    return {
        "zero_scale": f["zero_scale"] / f["blocks"],
        "clipped": f["clipped"] / f["blocks"],
        "decode_scale_log2_mean": mean,
        "decode_scale_log2_std": jnp.sqrt(jnp.maximum(f["log2_square"] / scaled - jnp.square(mean), 0.0)),
        "decode_scale_log2_min": jnp.where(scaled > 0, f["smallest_log2"], jnp.nan),
        "decode_scale_log2_max": jnp.where(scaled > 0, f["largest_log2"], jnp.nan),
        "scale_histogram": jnp.stack([f[f"bin_{i}"] for i in range(N_BINS)], -1) / scaled[..., None],
        "top_code": f["top_code"] / jnp.where(f["blocks"] > 0, f["count"], 0.0),
        "underflow": f["flushed"] / f["count"],
        "shrinkage": f["missing"] / f["signal"],
        "sqnr_db": 10 * (jnp.log10(f["signal"]) - jnp.log10(f["noise"])),
        "amax": f["amax"],
        "copy_distance": f["distance"] / f["compared"],
        "kurtosis": f["fourth"] / f["count"],
    }
