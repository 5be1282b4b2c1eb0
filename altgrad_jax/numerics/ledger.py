"""What became of the update: how much of it reached the numbers that the products compute with.

An update u is applied to every weight, but a weight in a number format moves only when it crosses to another code. For
each layer whose weights have a format, Q rounds onto the grid at a fixed scale, and dQ = Q(w') - Q(w) is what the
products see of u:

flip           share of weights whose code changed
not_flipped    share of weights with u != 0 whose code did not change at this update. It says what one update did, not
               what is lost: a float32 master keeps every update, and stochastic rounding moves a weight later
lost_update    weights stored on the grid: share of weights with u != 0 whose expected move is 0. To nearest these are
               all of not_flipped. With stochastic rounding those where w + u is w in float32, or lies beyond the
               largest number. With error feedback those of not_flipped whose residual did not change either
stall_ratio    1 - (codes changed) / (weights with u != 0), at this update
update_gain    <u, dQ> / <u, u>: 1 where on average all of u arrives, 0 where none does
update_error   |u - dQ| / |u|, a ratio of L2 norms: 0 where u arrives as it is; above 1 where rounding adds more than u
ulps_moved     mean number of codes a weight moved
scale_flip     share of weights whose value on the grid changes because the scale does. No learning, hence not in flip
code_age       mean number of updates since a weight's code last changed

Without a layer they are taken over all elements of those layers together: shares and means are then weighted by size,
update_gain and update_error by the energy of u. stall_ratio alone misranks formats, because a coarse grid changes few
codes, each by a large step: read it together with update_gain.

Weights at rest. With a float32 master w' = w + u, and Q(w) is what the products use. Stored, w is on the grid itself:

nearest         w' = Q(w + u)
stochastic      w' = Q(w + u), rounded up with the probability of the fraction, so that E[w'] = w + u
error_feedback  w' = Q(w + r + u) and the residual r' = w + r + u - w' is kept in bfloat16 (Seide et al. 2014)

The scale of stored weights moves only when it must: when the largest weight lies beyond the largest number by more than
half of the gap there, so that ordinary rounding would not bring it back, or has shrunk so far that the scale could be
four times as large. It then becomes what it would be at the start of a run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from altgrad_jax.numerics.products import scale_for
from altgrad_jax.numerics.rounding import FormatParams, Grid, round_to_format, to_codes, to_grid, ulp
from altgrad_jax.numerics.scales import LARGEST_SCALED
from altgrad_jax.numerics.sums import sums

FIELDS = ("elements", "updates", "flips", "unmoved", "lost", "dot", "energy", "missed", "codes", "scale_flips", "age")
MAX_AGE = 65535


class Stored(NamedTuple):
    """A weight matrix after an update, at rest."""

    weights: jax.Array
    residual: jax.Array | None
    grid: Grid


def store(w, update, old_grid: Grid, fmt: FormatParams, *, residual=None, seed=None, force=False) -> Stored:
    """The stored weights after an update.

    Args:
      w: float32 on `old_grid`. update: float32, finite.
      fmt: FormatParams of the grid from now on. force: bool, whether the scale is chosen anew (the format changed).
      residual: bfloat16 of error feedback, or None.
      seed: uint32 [2] for stochastic rounding, or None.
    """
    target = w + update
    if residual is not None:
        target = w + jnp.where(jnp.isfinite(residual), residual, 0).astype(jnp.float32) + update
    # An element that is not finite must not set the scale of all others.
    amax = jnp.max(jnp.where(jnp.isfinite(target), jnp.abs(target), 0))
    limit = jnp.minimum(fmt.max_finite, LARGEST_SCALED)
    reached = amax * old_grid.scale
    moves = force | (reached > limit + ulp(limit, Grid(fmt, 1.0)) / 2) | (reached <= limit / 4)
    grid = Grid(fmt, jnp.where(moves, scale_for(amax, fmt), old_grid.scale))
    weights = to_grid(target if seed is None else _within(target, grid), grid, seed=seed)
    if residual is not None:
        residual = (target - weights).astype(jnp.bfloat16)
    return Stored(weights, residual, grid)


def _codes_and_values(w, grid):
    rounded = round_to_format(w * grid.scale, grid.format)
    return to_codes(rounded, grid.format), rounded * (1 / grid.scale)


def entries(
    w, new_w, update, grid: Grid, *, age=None, unlost=None, split: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Sums over one weight matrix, float32 [fields], and the ages after the update.

    Args:
      w, new_w, update: float32 [K, N] before and after, and the update that was applied.
      grid: by which codes are counted.
      age: uint16 [K, N] or None.
      unlost: bool [K, N], elements whose update is not lost though their code may not have changed: it lives on in a
        residual, or random bits decided (`expected_to_move`). None: there are none.
      split: whether the matrices may be split over devices.
    """
    code, value = _codes_and_values(w, grid)
    new_code, new_value = _codes_and_values(new_w, grid)
    arrived = new_value - value
    moved = new_code != code
    updated = update != 0
    unmoved = updated & ~moved
    new_age = None
    if age is not None:
        new_age = jnp.where(moved, 0, jnp.minimum(age, MAX_AGE - 1) + 1).astype(jnp.uint16)
    terms = {
        "updates": updated,
        "flips": moved,
        "unmoved": unmoved,
        "lost": unmoved if unlost is None else unmoved & ~unlost,
        "dot": update * arrived,
        "energy": jnp.square(update),
        "missed": jnp.square(update - arrived),
        "codes": jnp.abs(new_code - code),
    } | ({} if new_age is None else {"age": new_age})
    found = {"elements": jnp.float32(w.size)} | dict(zip(terms, sums(*terms.values(), apart=split)))
    return jnp.stack([found.get(field, jnp.float32(0)) for field in FIELDS]), new_age


def expected_to_move(w, update, grid: Grid) -> jax.Array:
    """bool [K, N]: whether stochastic rounding of w + update moves a weight of the grid at all, in the mean.

    The mean is w + update, which is computed in float32, but no larger than the largest number.
    """
    return _within(w + update, grid) != w


def _within(target, grid: Grid) -> jax.Array:
    """What is beyond the largest number as that number; what is not finite stays.

    The scale moves where a weight is beyond it by more than half a gap. One within half a gap, rounded up, would become
    infinity or NaN with saturate=False.
    """
    largest = grid.format.max_finite * (1 / grid.scale)
    return jnp.where(jnp.isfinite(target), jnp.clip(target, -largest, largest), target)


def scale_flips(w, before: Grid, after: Grid) -> jax.Array:
    """How many weights of each matrix lie elsewhere on another grid: float32 [G] from w float32 [G, K, N].

    Arrays of the grids begin with the axis G. Costs a pass over w only where some grid did change.
    """
    changes = jnp.any(before.scale != after.scale) | jnp.any(before.format.mantissa_bits != after.format.mantissa_bits)

    def count():
        return jnp.sum(jax.vmap(to_grid)(w, after) != jax.vmap(to_grid)(w, before), axis=(1, 2), dtype=jnp.float32)

    return jax.lax.cond(changes, count, lambda: jnp.zeros(len(w), jnp.float32))


def with_scale_flips(entries_F, flips) -> jax.Array:
    """Sums of `entries` with the number of scale flips filled in."""
    return entries_F.at[..., FIELDS.index("scale_flips")].set(flips)


def lost_share(entries_SF) -> jax.Array:
    """Share of the weights of each layer whose update is lost; from `entries` [layers, fields]."""
    return lost_weights(entries_SF) / entries_SF[..., 0]


def lost_weights(entries_SF) -> jax.Array:
    """Number of weights of each layer whose update is lost."""
    return entries_SF[..., FIELDS.index("lost")]


def ledger_metrics(entries_SF, *, stored: bool, ages: bool) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """{statistic: [layers]}, and {statistic: scalar} over all layers together, from the layers' `entries`.

    Args:
      entries_SF: float32 [layers, fields].
      stored: whether the weights are stored on the grid. ages: whether ages were kept.
    """
    return _named(entries_SF, stored, ages), _named(entries_SF.sum(0), stored, ages)


def _named(entries_F, stored, ages):
    f = {name: entries_F[..., i] for i, name in enumerate(FIELDS)}
    energy = jnp.where(f["energy"] > 0, f["energy"], jnp.nan)
    out = {
        "flip": f["flips"] / f["elements"],
        "not_flipped": f["unmoved"] / f["elements"],
        "stall_ratio": 1 - f["flips"] / jnp.where(f["updates"] > 0, f["updates"], jnp.nan),
        "update_gain": f["dot"] / energy,
        "update_error": jnp.sqrt(f["missed"] / energy),
        "ulps_moved": f["codes"] / f["elements"],
        "scale_flip": f["scale_flips"] / f["elements"],
    }
    if stored:
        out["lost_update"] = f["lost"] / f["elements"]
    return out | ({"code_age": f["age"] / f["elements"]} if ages else {})
