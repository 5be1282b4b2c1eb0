"""The form in which Adam's two moments are kept between updates: float32, bfloat16, or 8 bits in blocks.

An update is computed from the float32 moments of its own step. Only what the next step finds is rounded, as in
bitsandbytes. Everything here is emulated: a kept moment is a float32 number on the grid of its form, so it shows what
the form does to training and saves no memory.

A *block* is a run of neighbours along the last axis of one tensor. It never crosses a row, and the last block of a row
is short where the row's length is no multiple of the block's. Where it is one, these are the blocks of the flattened
tensor. With v a moment and amax the largest finite magnitude of its block:

    bfloat16    v rounded to bfloat16; no block
    E4M3:B      round(v / s) * s, s = amax * (1/448), 448 the largest number of E4M3; blocks of B
    dynamic8    map(v / s) * s, s = amax; blocks of 256

s is a float32 number, at least 2^-126, so that a block of zeros is zeros. 1/448 is the float32 number nearest to it,
because XLA makes this product of a division. `map` takes a number to an entry of the dynamic map (`dynamic_map`), the
signed one for the first moment and the unsigned one for the second.

To nearest: ties go to the even code, in the dynamic map to the smaller entry. bitsandbytes also moves a negative first
moment off the entry 0; this is not done here. Stochastically: up or down with the probabilities whose mean is v. What
lies beyond the last number of a grid goes to it in both: in the signed map that is v / s below -0.99297.

A moment that cannot be used, not finite or a negative second one, stays what it is, so that it is seen.

Sources: Dettmers, Lewis, Shleifer & Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization" (blocks of 2048;
bitsandbytes, whose blocks are of 256, has the maps as `create_dynamic_map`); torchao's `AdamWFp8` for E4M3 in blocks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.numerics.blocks import of_neighbours
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.rounding import format_params, random_bits, round_to_format
from altgrad_jax.numerics.rules import MOMENTS

DYNAMIC_BLOCK = 256
_DECADES = 7
_TINY = np.float32(2.0**-126)  # the smallest normal number: compiled code may flush what is below to 0


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """float32 [256], rising: the numbers of the dynamic 8-bit map.

    Zero, one, and in decade d = 0 ... 6 the middles of equal parts of [0.1, 1] * 10^(d - 6): 2^d parts with both signs
    in the signed map, 2^(d + 1) in the unsigned one. So the signed map has 1 and not -1. Computed in float64; PyTorch's
    own map, computed in float32, can differ in the last bit.
    """
    numbers = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = np.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - _DECADES + 1)
        numbers += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(numbers, np.float32))


@functools.cache
def _midpoints(signed: bool) -> np.ndarray:
    """float32 [255]: the largest numbers that are not above the exact middle of two neighbours of the map."""
    numbers = dynamic_map(signed).astype(np.float64)
    exact = (numbers[:-1] + numbers[1:]) / 2
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def to_dynamic_map(x, signed: bool, seed=None) -> jax.Array:
    """x, float32 of any shape, as numbers of the dynamic map, float32 of that shape.

    Args:
      seed: None rounds to nearest, ties to the smaller number. uint32 [2], as rounding.stochastic_seed gives it, rounds
        stochastically, with 24 random bits an element.
    """
    numbers = jnp.asarray(dynamic_map(signed))
    if seed is None:
        return numbers[jnp.searchsorted(jnp.asarray(_midpoints(signed)), x, side="left")]
    below = jnp.clip(jnp.searchsorted(numbers, x, side="right") - 1, 0, len(numbers) - 2)
    low, high = numbers[below], numbers[below + 1]
    share = (random_bits(x.shape, seed) >> 8).astype(jnp.float32) * np.float32(2.0**-24)
    return jnp.where(share * (high - low) < x - low, high, low)


def keep(x, form: str, *, signed: bool, seed=None) -> jax.Array:
    """One moment of one tensor as it is kept.

    Args:
      x: float32 [..., N], at least one axis; blocks run along the last.
      form: one of rules.MOMENTS.
      signed: whether it is a first moment; decides the dynamic map, and whether a negative number can be used.
      seed: None rounds to nearest; uint32 [2], as from rounding.stochastic_seed, stochastically. Each tensor, moment
        and update needs its own.

    Returns:
      float32 [..., N] on the grid of the form.

    Raises:
      UserError: there is no such form.
    """
    if form not in MOMENTS:
        raise UserError(f"moments={form!r} cannot be used: give one of {', '.join(MOMENTS)}")
    if form == "float32":
        return x
    usable = jnp.isfinite(x) if signed else jnp.isfinite(x) & (x >= 0)
    name, _, block = form.partition(":")
    if name == "bfloat16":
        kept = round_to_format(x, format_params(get_format("BF16")), seed=seed)
    elif name == "dynamic8":
        scale = jnp.maximum(_amax(x, usable, DYNAMIC_BLOCK), _TINY)
        kept = to_dynamic_map(x / scale, signed, seed) * scale
    else:
        fmt = get_format(name)
        scale = jnp.maximum(_amax(x, usable, int(block)) * np.float32(1 / fmt.max_finite), _TINY)
        kept = round_to_format(x / scale, format_params(fmt), seed=seed) * scale
    return jnp.where(usable, kept, x)


def _amax(x, usable, block: int) -> jax.Array:
    """float32 of the shape of x, or [..., 1] where a row is one block: the largest usable magnitude of each block."""
    return of_neighbours(jnp.where(usable, jnp.abs(x), 0.0), block, x.ndim - 1, jnp.max)


def adam_direction(mu, nu, count, *, beta1: float, beta2: float, eps: float) -> jax.Array:
    """Adam's direction of one tensor, without weight decay: m_hat / (sqrt(v_hat) + eps) (Kingma & Ba 2015).

    Args:
      mu, nu: float32, its moments after `count` updates, at least one; m_hat and v_hat are bias-corrected.
    """
    t = jnp.asarray(count, jnp.float32)
    return mu / (1 - beta1**t) / (jnp.sqrt(nu / (1 - beta2**t)) + eps)
