"""The key-value cache in a number format: what attention reads are the rounded keys and values.

`FORMAT` keeps one float32 scale for each token and head, `FORMAT:1x32` a power of two for every 32 elements of a head
(OCP MX). A scale depends on one token alone, so it does not matter how many tokens are written at once. Emulated: the
rounded numbers are kept in the compute dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp

from altgrad_jax.errors import UserError
from altgrad_jax.numerics.recipes import BLOCKS, Recipe, SlotSpec
from altgrad_jax.numerics.slot_quantization import Features, dequantized, quantize_slot
from altgrad_jax.numerics.slots import slot_of

SIDES = {name: along for name, (along, across) in BLOCKS.items() if along and across == 1}


def cache_spec(text: str, head_width: int) -> SlotSpec:
    """How a cache of this name quantizes, for heads of `head_width` numbers; UserError, one sentence, if it cannot."""
    element, colon, block = text.partition(":")
    if colon and block not in SIDES:
        raise UserError(
            f"a cache {text[:40]!r} has blocks that are not along one head: give one of {', '.join(SIDES)}, such as "
            "E4M3:1x32, or the format alone for one scale per token and head"
        )
    if colon and head_width % SIDES[block]:
        raise UserError(
            f"a cache {text!r} needs heads of a multiple of {SIDES[block]} numbers, and these have {head_width}"
        )
    spec = SlotSpec(element, "E8M0", block, "rceil") if colon else SlotSpec(element, "float32", "rowwise", "float32")
    Recipe(f"of the cache {text}", spec)  # what it says of a slot holds here too
    return spec


def as_cached(x_BTHC, spec: SlotSpec) -> Any:
    """Keys or values as they are read from the cache, in their own dtype: rounded to nearest, ties to even."""
    along, across = spec.sides
    kind = "float32" if spec.rule == "float32" else "power_of_two"
    able = Features((along,), (across,), (kind,), stochastic=False, four_six=False, eden=False, requantize=False,
                    shared=False, rotation=0)  # fmt: skip
    rows = x_BTHC.reshape(-1, x_BTHC.shape[-1])
    slot = jax.tree.map(jnp.asarray, slot_of(spec))
    return (
        dequantized(quantize_slot(rows, slot, 1, able, x_BTHC.dtype)[0], 1).reshape(x_BTHC.shape).astype(x_BTHC.dtype)
    )
