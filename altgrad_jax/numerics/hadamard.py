"""Random Hadamard transforms along the contracted axis of a product.

Both operands of a product are multiplied, in blocks of h along the axis that it contracts, by the same matrix
diag(signs) H / sqrt(h). The matrix is orthogonal, so it cancels in exact arithmetic; it spreads outliers over their
block before they are rounded. Signs are *fixed*, one vector for a whole run, or *redrawn*, from a seed, every step.

The size h is data. A program knows the largest one and builds smaller ones as block-diagonal matrices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.numerics.rounding import random_bits

LARGEST = 128  # length of the vectors of signs
# What Transformer Engine ships for its blocks of 16.
_SIGNS_16 = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def fixed_signs(h: int) -> np.ndarray:
    """float32 [LARGEST]: the signs of blocks of h, a power of two, one block after the other."""
    signs = np.array(_SIGNS_16) if h == 16 else np.random.default_rng(h).choice([-1, 1], max(h, 1))
    return np.resize(signs, LARGEST).astype(np.float32)


def drawn_signs(seed, h) -> jax.Array:
    """float32 [LARGEST] of -1 and 1, every block of h alike; `seed` uint32 [2], `h` a power of two, may be traced.

    The signs depend on the seed and h alone, not on the largest size that a program knows.
    """
    index = lax.iota(jnp.int32, LARGEST) & (h - 1)
    negative = jnp.take(random_bits((LARGEST,), seed) >> 31, index) == 1
    return jnp.where(negative, -1.0, 1.0).astype(jnp.float32)


def matrix(h, signs, size: int) -> jax.Array:
    """float32 [size, size]: diag(signs) H_h / sqrt(h) in blocks along the diagonal; h traced, at most size.

    H_h is Sylvester's matrix, (-1)^(number of common bits of row and column).
    """
    i, j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    odd = lax.population_count(i & j & (h - 1)) & 1
    log2_h = lax.population_count(jnp.asarray(h - 1, jnp.int32))
    # By cases, for sqrt and exp2 are not exact on every device.
    norm = jnp.where(log2_h & 1, np.float32(np.sqrt(0.5)), 1.0) / (1 << (log2_h >> 1)).astype(jnp.float32)
    signed = jnp.where(odd == 1, -norm, norm) * signs[:size, None]
    return jnp.where((i ^ j) < h, signed, 0.0)


def rotated(v, matrix, axis: int) -> jax.Array:
    """A float32 matrix with its blocks along an axis multiplied by `matrix` [h, h]; the axis may end in a short block,
    where a smaller h divides it."""
    size, n = matrix.shape[0], v.shape[axis]
    if n % size:
        pad = [(0, 0), (0, 0)]
        pad[axis] = (0, -n % size)
        v = jnp.pad(v, pad)
    highest = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    if axis == 1:
        out = jnp.dot(v.reshape(-1, size), matrix, **highest)
    else:
        blocks = v.reshape(-1, size, v.shape[1])
        out = jnp.einsum("bkh,bhr->bkr", jnp.broadcast_to(matrix.T, (len(blocks), size, size)), blocks, **highest)
    return lax.slice_in_dim(out.reshape(v.shape), 0, n, axis=axis)
