"""The two products of attention by a recipe: every head of every sequence is two layers with six slots each.

    S[L,T] = Q K^T / sqrt(C)      P = softmax(S)      O[L,C] = P V

Q and P stand where a linear layer has its activations, K^T and V where it has its weights, so the backward products
dQ = dS K, dK = dS^T Q, dP = dO V^T and dV = P^T dO are the dgrad and wgrad of `slots.slot_dot`. Softmax and its
derivative are float32. A scale per tensor is one per head and sequence.

Axes: B batch, L queries, T keys, H heads, C width of one head, N = B H heads of the batch, S statistics.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.numerics import slot_statistics
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.numerics.slot_quantization import Features, Slot
from altgrad_jax.numerics.slots import slot_dot
from altgrad_jax.numerics.sums import combine_all

_AXES: dict[str, Any] = dict.fromkeys(Slot._fields) | {"seed": 0}
_PER_HEAD = Slot(**_AXES)  # axes of vmap


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _probe_of_each(probe, n: int):
    """The probe for each of n products; what is its gradient combines their statistics, and does not add them up."""
    return jnp.broadcast_to(probe, (n, *probe.shape))


def _probe_of_each_forward(probe, n):
    return _probe_of_each(probe, n), None


def _probe_of_each_backward(n, _, statistics_N3S):
    return (combine_all(slot_statistics.FIELDS, statistics_N3S),)


_probe_of_each.defvjp(_probe_of_each_forward, _probe_of_each_backward)


def _seeds_of_heads(seed_62, n):
    """uint32 [n, 6, 2]: no two heads round by the same random numbers."""
    of_slots = jax.vmap(lambda seed, head: stochastic_seed(seed[0], seed[1], head), in_axes=(0, None))
    return jax.vmap(of_slots, in_axes=(None, 0))(seed_62, np.arange(n, dtype=np.uint32))


def _by_head(x_NMK, w_N, slots, features, probe, w_is_NK, dtype):
    """(float32 [N, M, ...], statistics float32 [3, S] of all heads or None)."""
    n = x_NMK.shape[0]
    of_heads = slots._replace(seed=_seeds_of_heads(slots.seed, n))
    probes = None if probe is None else _probe_of_each(probe, n)
    dot = partial(slot_dot, features=features, w_is_NK=w_is_NK, compute_dtype=dtype)
    in_axes = (0, 0, _PER_HEAD, None if probe is None else 0)
    y, statistics = jax.vmap(lambda x_MK, w, of_head, g_probe: dot(x_MK, w, of_head, g_probe=g_probe), in_axes=in_axes)(
        x_NMK, w_N, of_heads, probes
    )
    return y, None if statistics is None else combine_all(slot_statistics.FIELDS, statistics)


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
    scores_NLT, of_scores = _by_head(q_NLC, k_NTC, slots[0], features, probes[0], True, compute_dtype)
    scores_NLT = jnp.where(may_attend_LT, scores_NLT / np.sqrt(np.float32(C)), -jnp.inf)
    weights_NLT = jax.nn.softmax(scores_NLT, axis=-1)
    y_NLC, of_values = _by_head(weights_NLT, v_NTC, slots[1], features, probes[1], False, compute_dtype)
    return y_NLC.reshape(B, H, L, C).swapaxes(1, 2), (of_scores, of_values)
