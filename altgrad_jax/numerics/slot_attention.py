"""The two products of attention by a recipe: every head of every sequence is two layers with six slots each.

    S[L,T] = Q K^T / sqrt(C)      P = softmax(S)      O[L,C] = P V

Q and P stand where a linear layer has its activations, K^T and V where it has its weights, so the backward products
dQ = dS K, dK = dS^T Q, dP = dO V^T and dV = P^T dO are the dgrad and wgrad of `slots.slot_dot`. Softmax and its
derivative are float32. A scale per tensor is one per head and sequence.

Axes: B batch, L queries, T keys, H heads, C width of one head, N = B H heads of the batch, S statistics.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.numerics.slot_quantization import Features, Slot
from altgrad_jax.numerics.slots import slot_dots


def _heads_first(x_BLHC):
    x_BHLC = x_BLHC.astype(jnp.float32).swapaxes(1, 2)
    return x_BHLC.reshape(-1, *x_BHLC.shape[2:])


def slot_attention(
    q_BLHC,
    k_BTHC,
    v_BTHC,
    may_attend_LT,
    slots: tuple[Slot, Slot],
    features: tuple[Features, ...],
    probes: tuple[Any, Any] = (None, None),
    compute_dtype: Any = jnp.bfloat16,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Attention whose two products follow a recipe.

    Args:
      q_BLHC, k_BTHC, v_BTHC: queries, keys and values of the same number of heads.
      may_attend_LT: bool, which keys a query sees.
      slots: of Q K^T and of P V, as `slots.slot_dot` takes them; leaves [6, ...].
      features: `slots.features_of` all recipes of the program.
      probes: float32 [3, S] for each product, or None; their gradients are the statistics of the backward slots.
      compute_dtype: dtype of the operands.

    Returns:
      (float32 [B, L, H, C], the statistics of the two products: float32 [3, S] of all heads together, or None).

    Raises:
      ValueError: L, T or C is no multiple of the blocks along it (`recipes.check_dimensions`).
    """
    B, L, H, C = q_BLHC.shape
    q_NLC, k_NTC, v_NTC = (_heads_first(x) for x in (q_BLHC, k_BTHC, v_BTHC))
    scores_NLT, of_scores = slot_dots(q_NLC, k_NTC, slots[0], features, probes[0], True, compute_dtype)
    scores_NLT = jnp.where(may_attend_LT, scores_NLT / np.sqrt(np.float32(C)), -jnp.inf)
    weights_NLT = jax.nn.softmax(scores_NLT, axis=-1)
    y_NLC, of_values = slot_dots(weights_NLT, v_NTC, slots[1], features, probes[1], False, compute_dtype)
    return y_NLC.reshape(B, H, L, C).swapaxes(1, 2), (of_scores, of_values)
