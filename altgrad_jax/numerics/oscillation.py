"""Whether quantized weights oscillate: their rounded values go back and forth while the weights hardly move.

Over a window of updates, for each weight w with Q its rounding in the forward pass (arXiv 2510.27527):

    ratio = sum |Q(w_t) - Q(w_{t-1})| / sum |w_t - w_{t-1}|        oscillating from OSCILLATING on

A weight that moves through many bins has a ratio of about 1, one that trembles across an edge a large one.

TetraJet-v2's OsciReset sets weights that oscillate to the centre of their bin, Q(w), while a run goes on (`Reset`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

OSCILLATING = 16.0
# Beyond this share of half a bin's width a weight is near the edge. Of evenly spread weights 1 - NEAR are.
NEAR = 0.8


class Reset(NamedTuple):
    """When weights are watched and reset: from the update `start` on, those of the first quarter of every `period`
    updates are watched, and after the last of them what has a ratio of `threshold` or more is reset."""

    period: int
    start: int
    threshold: float

    def watches(self, number) -> tuple[jax.Array, jax.Array]:
        """(whether this update is watched, whether it is the last of its window), from its number."""
        place, window = (number - self.start) % self.period, -(-self.period // 4)
        return (number >= self.start) & (place < window), (number >= self.start) & (place == window - 1)


class Watch(NamedTuple):
    """Sums over the updates of a window, of one matrix of weights; float32 of its shape, but for `edge`."""

    w: Any
    q: Any
    moved: Any  # sum |w_t - w_{t-1}|
    rounded_moved: Any  # sum |Q(w_t) - Q(w_{t-1})|
    flips: Any  # updates at which Q(w) changed
    edge: Any  # float32 scalar: sum over the updates of the share of weights near an edge
    n: Any  # float32 scalar: updates


def begin(w, q) -> Watch:
    """Before the first update."""
    zeros = jnp.zeros_like(w)
    return Watch(w, q, zeros, zeros, zeros, jnp.float32(0), jnp.float32(0))


def watch(before: Watch, w, quantize) -> Watch:
    """After one more update to w; quantize(w) is Q(w), float32."""
    q = quantize(w)
    # Moved further from its number by this, what is near the edge of a bin crosses it.
    near = quantize(w + (w - q) * (1 / NEAR - 1)) != q
    return Watch(
        w,
        q,
        before.moved + jnp.abs(w - before.w),
        before.rounded_moved + jnp.abs(q - before.q),
        before.flips + (q != before.q),
        before.edge + jnp.mean(near, dtype=jnp.float32),
        before.n + 1,
    )


def oscillates(moved, rounded_moved, threshold: float = OSCILLATING) -> jax.Array:
    """bool: which weights oscillate, from the sums of a Watch."""
    return (rounded_moved >= threshold * moved) & (rounded_moved > 0)


def named(of: Watch) -> dict[str, jax.Array]:
    """`weight_oscillation` (the ratio, of all weights together), `weight_oscillating` (share of the weights that
    oscillate), `weight_flips` (an update, mean over weights) and `weight_near_edge` (share, mean over updates)."""
    total = jnp.sum(of.moved)
    ratio = jnp.sum(of.rounded_moved) / jnp.where(total > 0, total, jnp.nan)
    oscillating = oscillates(of.moved, of.rounded_moved)
    return {
        "weight_oscillation": ratio,
        "weight_oscillating": jnp.mean(oscillating, dtype=jnp.float32),
        "weight_flips": jnp.mean(of.flips) / of.n,
        "weight_near_edge": of.edge / of.n,
    }
