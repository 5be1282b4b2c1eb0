"""Cross entropy through the tied output head, without all logits at once.

At a vocabulary of 50,257 the logits are the largest array of a training step by far: float32 and batch 64 x 256 make
3.3 GB, their gradient as much again. Here the sequences are cut into tiles along their length, and a tile's logits are
gone before the next one's come. As the loss is a mean, the gradient of a logit is (softmax - [target]) / tokens
whatever comes after, so it is computed with the loss, in the same tile: three products a tile, as many as without
tiles, and nothing is computed twice. (Computing the gradient with the loss is the idea of Liger-Kernel's fused linear
cross entropy, Hsu et al. 2024, arXiv:2410.10989.)

Operands are rounded as in quant_dot: x, the table, and the gradient of the logits to the compute dtype, sums float32;
maximum, log-sum-exp and softmax are float32. Tiles change the order in which the table's gradient is summed, nothing
else.

The table is padded with rows of zeros to a multiple of 128, a size that matrix units work with undivided (vocabularies
up to 128 are left alone), only as an operand: parameters, moments and checkpoints have the vocabulary's own size.
Padded logits are -inf, so they have no part in the loss.

Axes: B batch, L length, D width, V vocabulary (P padded), N tiles, M tokens of a tile.
"""

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.numerics.products import product, weight_gradient

PADDED_TO = 128


def padded(vocab_size: int) -> int:
    """The vocabulary's size as an operand."""
    return vocab_size if vocab_size < PADDED_TO else -(-vocab_size // PADDED_TO) * PADDED_TO


def tiles(batch: int, length: int, vocab_size: int, tile_bytes: int) -> int:
    """How many tiles the sequences are cut into: the least divisor of `length` with which the float32 logits of a tile
    take at most tile_bytes, or `length` where none does."""
    return next(
        n
        for n in range(1, length + 1)
        if length % n == 0 and (batch * (length // n) * padded(vocab_size) * 4 <= tile_bytes or n == length)
    )


@jax.custom_vjp
def cross_entropy(logits_BLV, targets_BL) -> jax.Array:
    """Mean cross entropy of all logits, float32, at once, in nats per token; rounds as a single tile does."""
    return _cross_entropy_forward(logits_BLV, targets_BL)[0]


def _cross_entropy_forward(logits_BLV, targets_BL):
    # Flat, as in a tile, for the sums to be in its order.
    loss_M, share_MV, hit_MV = _losses(logits_BLV.reshape(-1, logits_BLV.shape[-1]), targets_BL.reshape(-1))
    return loss_M.mean(), ((share_MV - hit_MV) * (1 / targets_BL.size)).reshape(logits_BLV.shape)


cross_entropy.defvjp(_cross_entropy_forward, lambda gradient_BLV, g: (gradient_BLV * g, None))


def tied_cross_entropy(x_BLD, table_VD, targets_BL, *, compute_dtype, tile_bytes: int) -> jax.Array:
    """Mean cross entropy of softmax(x table^T) in nats per token, float32 scalar.

    Args:
      x_BLD: float32, what the head multiplies with the table.
      table_VD: float32, the embedding table.
      targets_BL: int32, below V.
      compute_dtype: dtype of the operands of the three products.
      tile_bytes: limit of the float32 logits that exist at once (see `tiles`).
    """
    B, L, _ = x_BLD.shape
    n = tiles(B, L, table_VD.shape[0], tile_bytes)
    return _tied(x_BLD, table_VD, targets_BL, jnp.dtype(compute_dtype), n)


def _tied_loss(x_BLD, table_VD, targets_BL, compute_dtype, n_tiles) -> jax.Array:
    table_PD = _operand(table_VD, compute_dtype)

    def tile(x_MD, targets_M):
        return _tile_losses(x_MD.astype(compute_dtype), table_PD, targets_M, table_VD.shape[0])[0]

    if n_tiles == 1:
        return tile(*_tiled(x_BLD, targets_BL, 1)).mean()
    return lax.map(lambda item: tile(*item), _tiled(x_BLD, targets_BL, n_tiles)).mean()


def _tied_forward(x_BLD, table_VD, targets_BL, compute_dtype, n_tiles):
    B, L, D = x_BLD.shape
    vocab_size = table_VD.shape[0]
    table_PD = _operand(table_VD, compute_dtype)

    def tile(x_MD, targets_M):
        x_MD = x_MD.astype(compute_dtype)
        loss_M, share_MP, hit_MP = _tile_losses(x_MD, table_PD, targets_M, vocab_size)
        g_MP = ((share_MP - hit_MP) * (1 / (B * L))).astype(compute_dtype)
        return loss_M, product(g_MP, table_PD, 1, 0), weight_gradient(x_MD, g_MP, w_is_NK=n_tiles == 1)

    if n_tiles == 1:
        loss_M, dx_MD, dtable_PD = tile(*_tiled(x_BLD, targets_BL, 1))
        return loss_M.mean(), (dx_MD.reshape(B, L, D), dtable_PD[:vocab_size])

    def body(dtable_DP, item):
        loss_M, dx_MD, more_DP = tile(*item)
        return dtable_DP + more_DP, (loss_M, dx_MD)

    # Transposed once, at the end, instead of in every tile.
    zeros_DP = jnp.zeros(table_PD.shape[::-1], jnp.float32)
    dtable_DP, (loss_NM, dx_NMD) = lax.scan(body, zeros_DP, _tiled(x_BLD, targets_BL, n_tiles))
    dx_BLD = dx_NMD.reshape(n_tiles, B, L // n_tiles, D).swapaxes(0, 1).reshape(B, L, D)
    return loss_NM.mean(), (dx_BLD, dtable_DP.T[:vocab_size])


def _tied_backward(compute_dtype, n_tiles, gradients, g):
    dx_BLD, dtable_VD = gradients
    return dx_BLD * g, dtable_VD * g, None


_tied = jax.custom_vjp(_tied_loss, nondiff_argnums=(3, 4))
_tied.defvjp(_tied_forward, _tied_backward)


def _operand(table_VD, compute_dtype):
    V = table_VD.shape[0]
    return jnp.pad(table_VD.astype(compute_dtype), ((0, padded(V) - V), (0, 0)))


def _tiled(x_BLD, targets_BL, n):
    """(x [N, M, D], targets [N, M]), without the axis N where there is one tile. Every tile holds a part of every
    sequence, so that a batch that is split over devices stays so."""
    B, L, D = x_BLD.shape
    if n == 1:
        return x_BLD.reshape(B * L, D), targets_BL.reshape(B * L)
    return (
        x_BLD.reshape(B, n, L // n, D).swapaxes(0, 1).reshape(n, B * L // n, D),
        targets_BL.reshape(B, n, L // n).swapaxes(0, 1).reshape(n, B * L // n),
    )


def _tile_losses(x_MD, table_PD, targets_M, vocab_size):
    """`_losses` of one tile."""
    logits_MP = product(x_MD, table_PD, 1, 1)
    if table_PD.shape[0] > vocab_size:
        logits_MP = jnp.where(jnp.arange(table_PD.shape[0]) < vocab_size, logits_MP, -jnp.inf)
    return _losses(logits_MP, targets_M)


def _losses(logits, targets):
    """(loss in nats of each token [...], softmax [..., V], whether a column is the token's target [..., V])."""
    # A CPU keeps the exponentials of the sum for the softmax; a GPU computes them twice and reads the logits once less.
    amax, total = lax.platform_dependent(logits, cuda=amax_and_total_in_one_pass, default=amax_and_total)
    e = jnp.exp(logits - amax)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    loss = (jnp.log(total) + amax - target)[..., 0]
    return loss, e * (1 / total), jnp.arange(logits.shape[-1]) == targets[..., None]


def amax_and_total(logits) -> tuple[jax.Array, jax.Array]:
    """(largest logit, sum of exp(logit - largest)) along the last axis, float32 [..., 1]."""
    amax = logits.max(-1, keepdims=True)
    return amax, jnp.exp(logits - amax).sum(-1, keepdims=True)


def amax_and_total_in_one_pass(logits) -> tuple[jax.Array, jax.Array]:
    """`amax_and_total` in one reduction of pairs (Milakov & Gimelshein 2018, arXiv:1805.02867)."""
    start = -jnp.float32(jnp.inf), jnp.float32(0)
    amax, total = lax.reduce((logits, jnp.ones_like(logits)), start, _both, (logits.ndim - 1,))
    return amax[..., None], total[..., None]


def _both(a, b):
    amax = jnp.maximum(a[0], b[0])
    # Where all is -inf so far, a difference would be NaN.
    level = jnp.where(amax == -jnp.inf, 0.0, amax)
    return amax, a[1] * jnp.exp(a[0] - level) + b[1] * jnp.exp(b[0] - level)
