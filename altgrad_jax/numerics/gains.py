"""Gains of norms in a block format: y = norm(x) * Q(gain), with the gradient passed straight through Q.

Blocks of 32 gains share a power of two, as the weights of the MX recipes do (`recipes.GAINS`). Gains of a block lie
close together, so by the rule `floor` all of them may lie beyond the largest number and become that one number, the
last bin: the gains then say nothing of their differences (Su et al. 2025, arXiv 2506.20752).

Axes: D width of a norm.
"""

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.numerics import scales
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.quantize import straight_through
from altgrad_jax.numerics.recipes import get_recipe
from altgrad_jax.numerics.rounding import format_params, round_to_format

BLOCK = 32


def _codes(gain, recipe: str):
    """(the numbers of the format that stand for the gains [..., K, 32], decode scales [..., K, 1], largest number)."""
    spec = get_recipe(recipe).fprop_w
    params = format_params(get_format(spec.element))
    blocks = gain.reshape(*gain.shape[:-1], -1, BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    jax_arrays = {"xp": jnp, "bitcast": lax.bitcast_convert_type}
    rule = scales.RULES.index(spec.rule)
    exponent = scales.mx_exponent(amax, spec.target, params.mantissa_bits, rule, **jax_arrays)
    scaled = round_to_format(blocks * scales.power_of_two(-exponent, **jax_arrays), params)
    codes = jnp.where(jnp.isfinite(blocks), scaled, blocks)
    return codes, scales.power_of_two(exponent, **jax_arrays), params.max_finite


def rounded(gain_D, recipe: str) -> jax.Array:
    """float32 [D]: the gains as the weights of a recipe of `recipes.GAINS` are rounded, in blocks of 32 neighbours.

    Args:
      gain_D: float32, D a multiple of 32. What is not finite stays.
    """
    codes, decode, _ = _codes(gain_D, recipe)
    return straight_through(gain_D, (codes * decode).reshape(gain_D.shape))


def statistics(gain, recipe: str) -> dict[str, jax.Array]:
    """{name: float32 [...]} of gains [..., D]: `gain_top_code`, the share of them that are rounded to the largest
    number of their block, the last bin; `gain_one_value`, the share of blocks whose gains all became one number."""
    codes, _, largest = _codes(gain, recipe)
    return {
        "gain_top_code": jnp.mean(jnp.abs(codes) >= largest, axis=(-2, -1), dtype=jnp.float32),
        "gain_one_value": jnp.mean(jnp.all(codes == codes[..., :1], axis=-1), axis=-1, dtype=jnp.float32),
    }
