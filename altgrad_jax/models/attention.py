"""Causal attention, with and without a cache of keys and values.

Axes: B batch, L queries, T keys, H heads of queries, G heads of keys and values (each serves H / G neighbours),
C width of one head, N number of blocks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from altgrad_jax.models.config import Choices, ModelConfig
from altgrad_jax.models.linear import Quantized
from altgrad_jax.numerics.kv_cache import as_cached
from altgrad_jax.numerics.layers import ATTENTION
from altgrad_jax.numerics.slot_attention import slot_attention


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, of all blocks: compute_dtype [N, B, T, G, C]."""

    keys: jax.Array
    values: jax.Array

    def after(self, i, k_BLGC, v_BLGC, position) -> "KVCache":
        """The cache with these keys and values of block i written at `position`."""
        return KVCache(
            *(
                jax.lax.dynamic_update_slice(all_NBTGC, new[None], (i, 0, position, 0, 0))
                for all_NBTGC, new in zip(self, (k_BLGC, v_BLGC))
            )
        )


def empty_cache(config: ModelConfig, batch: int, length: int | None = None) -> KVCache:
    """A cache for `batch` sequences of up to `length` (default block_size) tokens."""
    shape = (config.n_layer, batch, length or config.block_size, config.kv_heads, config.head_width)
    return KVCache(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))


def causal_attention(q_BLHC, k_BTGC, v_BTGC, *, kernel: Any, mask_LT=None) -> jax.Array:
    """softmax(q k^T / sqrt(C), causal) v with a float32 softmax; the output has the operands' dtype.

    `mask_LT` (True = may attend) replaces the causal mask where the queries do not start at key 0 (the cache).
    """
    # float32 operands mean float32 products: without this Hopper would take TF32.
    with jax.default_matmul_precision("highest" if q_BLHC.dtype == jnp.float32 else "default"):
        if mask_LT is None:
            return jax.nn.dot_product_attention(q_BLHC, k_BTGC, v_BTGC, is_causal=True, implementation=kernel)
        return jax.nn.dot_product_attention(q_BLHC, k_BTGC, v_BTGC, mask=mask_LT[None, None], implementation="xla")


def attend(
    config: ModelConfig,
    rules: tuple[tuple[str, Choices], ...],
    q_BLHC,
    k_BLGC,
    v_BLGC,
    cache: KVCache | None,
    i,
    position,
    quantized: Quantized | None,
    statistics: dict,
) -> tuple[jax.Array, KVCache | None]:
    """(output [B, L, H, C], cache with these keys and values of block i): attention to them and to what is cached.

    Args:
      rules: of the block; with those of layers.ATTENTION both products follow the recipe, and their statistics are put
        into `statistics`. q_BLHC, k_BLGC, v_BLGC: operands in compute_dtype. position: index of their first token.
    """
    if config.kv_cache is not None:
        k_BLGC, v_BLGC = (as_cached(x, config.kv_cache) for x in (k_BLGC, v_BLGC))
    if cache is not None:
        cache = cache.after(i, k_BLGC, v_BLGC, position)
        k_BLGC, v_BLGC = cache.keys[i], cache.values[i]
    by_recipe = ATTENTION[0] in dict(rules)
    if cache is None and not by_recipe:
        return causal_attention(q_BLHC, k_BLGC, v_BLGC, kernel=config.attention), None
    may_attend_LT = jnp.arange(k_BLGC.shape[1])[None, :] <= position + jnp.arange(q_BLHC.shape[1])[:, None]
    if not by_recipe:
        return causal_attention(q_BLHC, k_BLGC, v_BLGC, kernel="xla", mask_LT=may_attend_LT), cache
    a_BLHC, found = _by_recipe(config, dict(rules), q_BLHC, k_BLGC, v_BLGC, may_attend_LT, quantized)
    statistics |= found
    return a_BLHC, cache


def _by_recipe(config, rules, q_BLHC, k_BTGC, v_BTGC, may_attend_LT, quantized) -> tuple[jax.Array, dict]:
    """(output, {product: statistics}); every head of queries has its own copy of the keys and values it shares."""
    k_BTHC, v_BTHC = (jnp.repeat(x, config.n_head // config.kv_heads, axis=2) for x in (k_BTGC, v_BTGC))
    a_BLHC, found = slot_attention(
        *(q_BLHC, k_BTHC, v_BTHC, may_attend_LT),
        slots=tuple(quantized.operands[product] for product in ATTENTION),
        features=rules[ATTENTION[0]],
        probes=tuple(quantized.g_probes.get(product) for product in ATTENTION),
        compute_dtype=config.compute_dtype,
    )
    return a_BLHC, dict(zip(ATTENTION, found))
