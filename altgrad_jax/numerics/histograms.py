"""Diagnoses that cost more than a scalar: the rank of weights, the use of codes, the distribution of magnitudes.

Pure functions for the inside of a compiled program of the caller; nothing here compiles. They cost more than the
statistics of `metrics` and are meant for about every hundredth step.

Counts are int32 sums, exact up to 2^31 - 1 elements (float32 counters stop at 2^24) and independent of the order of
summation, so they are equal bit for bit on every device.
"""

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.numerics import whatif
from altgrad_jax.numerics.rounding import Grid, round_to_format, to_codes

_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000
SQUARINGS = 14
_COPIES = 32


def rank_health(w_KN) -> dict[str, jax.Array]:
    """How many directions a matrix uses, float32 scalars, without a singular value decomposition.

    With singular values s_i, largest first:

        spectral_norm         s_1
        stable_rank           sum s_i^2 / s_1^2            from 1 to the rank; few large directions beside many small
                                                           ones make it small
        participation_ratio   (sum s_i^2)^2 / sum s_i^4    from stable_rank to its square, and to the rank; how many
                                                           directions share the energy

    All of them from the Gram matrix G of the smaller side n: sum s_i^2 = tr G and sum s_i^4 = |G|_F^2. For s_1^2, G is
    squared SQUARINGS times, to B = G^p with p = 2^SQUARINGS as from p steps of the power iteration on every starting
    vector at once; the Rayleigh quotient tr(B G B) / tr(B B) is the mean of s_i^2 with weights s_i^(4p). It never
    exceeds s_1^2, and is low by less than 2e-4 relative (s_1 by 1e-4) for any spectrum with n up to 10,000: the worst,
    n - 1 equal values just below the first, gives W((n - 1) / e) / 2p, W being Lambert's function.

    Args:
      w_KN: float32 matrix of either orientation.

    Returns:
      {"stable_rank", "participation_ratio", "spectral_norm"}. All 0 for the zero matrix; all NaN where an element is
      not finite.

    Sources: stable rank, Rudelson & Vershynin 2007, "Sampling from large matrices"; participation ratio of a spectrum,
    Bell & Dean 1970.
    """
    amax = jnp.max(jnp.abs(w_KN))
    w_KN = w_KN / amax  # squares of elements near 1e-20 or 1e20 leave float32
    side = 0 if w_KN.shape[0] < w_KN.shape[1] else 1
    G = lax.dot_general(w_KN, w_KN, (((1 - side,), (1 - side,)), ((), ())), precision=lax.Precision.HIGHEST)
    energy = jnp.trace(G)
    G = G / energy

    def square(_, B):
        B = jnp.matmul(B, B, precision=lax.Precision.HIGHEST)
        return B / jnp.trace(B)

    B = lax.fori_loop(0, SQUARINGS, square, G)
    top = jnp.sum(jnp.matmul(G, B, precision=lax.Precision.HIGHEST) * B) / jnp.sum(jnp.square(B))
    values = {
        "stable_rank": 1 / top,
        "participation_ratio": 1 / jnp.sum(jnp.square(G)),
        "spectral_norm": amax * jnp.sqrt(energy * top),
    }
    return {name: jnp.where(amax == 0, 0, value) for name, value in values.items()}


def _count(bins, n_bins):
    """int32 [n_bins]: how often each bin occurs among `bins` (int32, any shape); others than 0 to n_bins - 1 do not
    count.

    Neighbouring elements count in different copies of the histogram, so that the threads of a GPU do not queue for one
    counter where most elements are equal. Adding integers is associative: deterministic on a GPU, too.
    """
    bins = bins.reshape(-1)
    copy = lax.iota(jnp.int32, bins.size) % _COPIES
    inside = (bins >= 0) & (bins < n_bins)
    place = jnp.where(inside, bins * _COPIES + copy, n_bins * _COPIES)
    counts = jnp.zeros(n_bins * _COPIES, jnp.int32).at[place].add(1, mode="drop")
    return counts.reshape(n_bins, _COPIES).sum(1)


def _size(v):
    """Bits of |v| as float32, as int32: comparing them compares magnitudes, subnormals included."""
    return lax.bitcast_convert_type(v.astype(jnp.float32), jnp.int32) & _MAGNITUDE


def code_histogram(v, grid: Grid) -> jax.Array:
    """How often each code of an 8-bit format occurs when v is rounded to nearest, ties to the even code.

    Args:
      v: float32 of any shape.
      grid: a format of 8 bits, and a scale.

    Returns:
      int32 [256] by code as `formats.encode` gives it, the sign in the highest bit, except that -0 counts as the code 0
      of zero. Beyond the largest number: its code, or the next (infinity or NaN) where the format was made with
      saturate=False. Elements of v that are not finite do not count.
    """
    q = round_to_format(v * grid.scale, grid.format)
    last = to_codes(grid.format.max_finite, grid.format)
    size = jnp.where(jnp.isfinite(q), jnp.abs(to_codes(q, grid.format)), last + 1)
    code = size + jnp.where(q < 0, 128, 0)
    return _count(jnp.where(jnp.isfinite(v), code, -1), 256)


def code_use(counts_C, n_finite: int) -> dict[str, jax.Array]:
    """What a histogram of codes says in three numbers, float32 scalars.

    Args:
      counts_C: [256] from `code_histogram`.
      n_finite: how many different finite numbers the format has (`FloatFormat.n_finite`).

    Returns:
      `codes_used`: how many codes occur; `codes_used_share`: that divided by n_finite; `code_entropy`: Shannon entropy
      of the distribution of codes, in bits, from 0 to log2(n_finite). All 0 for an empty histogram.
    """
    used = jnp.sum(counts_C > 0).astype(jnp.float32)
    counts_C = counts_C.astype(jnp.float32)
    p_C = counts_C / jnp.sum(counts_C)
    entropy = jnp.sum(jnp.where(p_C > 0, -p_C * jnp.log2(p_C), 0))
    return {"codes_used": used, "codes_used_share": used / n_finite, "code_entropy": entropy}


def magnitude_histogram(v) -> jax.Array:
    """int32 [whatif.N_BINS]: the magnitudes of v, fine enough to tell what any 8-bit format would do at any scale.

    Eight bins per power of two, with upper edges at 2^e (2 - 2^-b), which are the places where formats begin to clip;
    the bins are closed above, open below. `altgrad_jax.numerics.whatif` says why, lists the bins and reads the
    histogram. Only bits are compared, so that float32 subnormals count as what they are on devices that take them for
    zero.

    Args:
      v: float32 of any shape.
    """
    size = _size(v)
    # Subnormal numbers are whole multiples of 2^-149, and as such have an exponent: x - 127 in place of x + 22.
    subnormal = size < 0x00800000
    bits = jnp.where(subnormal, lax.bitcast_convert_type(size.astype(jnp.float32), jnp.int32), size) - 1
    x, fraction = (bits >> 23) + jnp.where(subnormal, -127, 22), bits & 0x7FFFFF
    leading_ones = sum((fraction >= (1 << 23) - (1 << (22 - j))).astype(jnp.int32) for j in range(7))
    bins = 2 + 8 * x + leading_ones
    bins = jnp.where(size == 0, whatif.ZERO_BIN, bins)
    bins = jnp.where(size >= _INFINITY, jnp.where(size == _INFINITY, whatif.INFINITY_BIN, whatif.NAN_BIN), bins)
    return _count(bins, whatif.N_BINS)


HISTOGRAMS = 256 + whatif.N_BINS


def observe(v, grid: Grid) -> jax.Array:
    """`code_histogram` and `magnitude_histogram` of an operand as float32 [2 HISTOGRAMS], for quant_dot's Rule.observe.

    Every count as two numbers, count // 2^16 and count % 2^16: a count beyond 2^24 would not be exact in one.
    """
    counts = jnp.concatenate([code_histogram(v, grid), magnitude_histogram(v)])
    return jnp.concatenate([counts >> 16, counts & 0xFFFF]).astype(jnp.float32)


def observed(vector) -> tuple[jax.Array, jax.Array]:
    """(codes int32 [..., 256], magnitudes int32 [..., N_BINS]) from what `observe` gave [..., 2 HISTOGRAMS]."""
    high, low = vector[..., :HISTOGRAMS].astype(jnp.int32), vector[..., HISTOGRAMS:].astype(jnp.int32)
    counts = (high << 16) + low
    return counts[..., :256], counts[..., 256:]
