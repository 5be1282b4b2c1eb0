"""Weights at rest, the update ledger and the format-aware optimizers as optax transformations.

    optimizer = optax.chain(optax.adamw(1e-3), stored_weights("E4M3", rounding="stochastic"))
    updates, state = optimizer.update(grads, state, params)
    statistics = optax.tree_utils.tree_get(state, "statistics")

They act on the arrays that `quantized` names: a tree of booleans like the parameters, or a function that makes it of
them; by default every array with two or more axes. An array has one format, and one scale per tensor, a power of two,
unless `stacked` (a tree or function likewise) says that its first axis counts tensors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from altgrad_jax.errors import UserError
from altgrad_jax.instrumentation.measure import name_of
from altgrad_jax.numerics import ledger as of_update
from altgrad_jax.numerics import optimizers
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.products import scale_for
from altgrad_jax.numerics.rounding import FormatParams, Grid, format_params, stochastic_seed
from altgrad_jax.numerics.rules import AT_REST
from altgrad_jax.step.metrics import Columns, joined, over, scalars
from altgrad_jax.step.update import AT_REST_STREAM, OPTIMIZER_STREAM

# A tree of booleans like the parameters, or a function that makes it of them.
Which = Any
ROUNDINGS = tuple(way for way in AT_REST if way != "float32")


class WeightsState(NamedTuple):
    """What `stored_weights` and `ledger` carry: tuples over the quantized arrays, and the last update's statistics."""

    count: jax.Array  # int32: updates
    scale: tuple  # float32 [n] of stored weights, else ()
    residual: tuple  # bfloat16, of the array's shape, of error feedback
    age: tuple  # uint16, of the array's shape: updates since a weight's code changed
    statistics: Columns  # as the built-in step's ledger has them: update_gain/ARRAY, not_flipped/ARRAY, ...


class _Weights(NamedTuple):
    """Static choices. rounding: None for float32 master weights, which are only watched."""

    format: FormatParams
    rounding: str | None
    seed: int
    quantized: Which
    stacked: Which


def stored_weights(
    format: str, *, rounding: str = "nearest", seed: int = 0, quantized: Which = None, stacked: Which = None
) -> optax.GradientTransformation:
    """Weights that exist on the grid of a format only (numerics.ledger); the last transformation of a chain.

    The update becomes the one that leads to the next number on the grid. Start from weights that are on it, which
    `quantize(w, format)` makes. An update that is not finite goes on as it is: optax.apply_if_finite skips such steps.

    Args:
      format: a name of numerics.formats.
      rounding: nearest; stochastic, E[w'] = w + u; or error_feedback, which carries what is missing in bfloat16.
      seed: of stochastic rounding. quantized, stacked: see the top of this module.

    Returns:
      A transformation whose state is a WeightsState. Parameters are float32.

    Raises:
      UserError: a format or rounding that does not exist.
    """
    if rounding not in ROUNDINGS:
        raise UserError(f"there is no rounding {rounding!r} of stored weights: give one of {', '.join(ROUNDINGS)}")
    return _transformation(_Weights(format_params(get_format(format)), rounding, seed, quantized, stacked))


def ledger(format: str, *, quantized: Which = None, stacked: Which = None) -> optax.GradientTransformation:
    """What of each update reaches the numbers that products in a format compute with, for float32 weights.

    It changes no update, and is the last transformation of a chain. The operand's scale is that of its current amax, as
    of `instrument(..., recipe=format)`. `stored_weights` keeps these statistics, too.

    Args, Returns, Raises: as of `stored_weights`.
    """
    return _transformation(_Weights(format_params(get_format(format)), None, 0, quantized, stacked))


def format_aware(
    name: str,
    learning_rate: float | Callable,
    format: str,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    *,
    seed: int = 0,
    quantized: Which = None,
    stacked: Which = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that knows the number format of the weights (numerics.optimizers); defaults are optax.adamw's.

    Args:
      name: one of rules.OPTIMIZERS, such as ulp_adamw or grid.
      learning_rate: a number, or an optax schedule. weight_decay: of arrays with two or more axes.
      format: of the quantized arrays; the others get AdamW. seed, quantized, stacked: as of `stored_weights`.

    `update` takes `grids` in place of those that format and current amax give: a tree with a rounding.Grid or None.

    Raises:
      UserError: a name or format that does not exist.
    """
    inner = optimizers.make(
        name,
        beta1=b1,
        beta2=b2,
        eps=eps,
        weight_decay=weight_decay,
        is_quantized=partial(_which, quantized, otherwise=optimizers.is_decayed),
        stacked=partial(_which, stacked, otherwise=_none),
    )
    grids_of = partial(_grids, format_params(get_format(format)), quantized, stacked)
    return optax.GradientTransformationExtraArgs(
        lambda params: AwareState(jnp.int32(0), inner.init(params)),
        partial(_aware_update, inner, learning_rate, grids_of, seed),
    )


class AwareState(NamedTuple):
    """State of `format_aware`."""

    count: jax.Array  # int32: updates
    inner: Any  # of the optimizer of numerics.optimizers


def _aware_update(inner, learning_rate, grids_of, seed, updates, state, params=None, *, grids=None, **_):
    params = _given(params)
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    rate = jnp.asarray(rate, jnp.float32)
    directions, after = inner.update(
        updates,
        state.inner,
        params,
        grids=grids_of(params) if grids is None else grids,
        learning_rate=rate,
        seed=stochastic_seed(seed, state.count, OPTIMIZER_STREAM),
    )
    return jax.tree.map(lambda d: -rate * d, directions), AwareState(state.count + 1, after)


def _none(params) -> Any:
    return jax.tree.map(lambda leaf: False, params)


def _which(given: Which, params, otherwise: Callable) -> Any:
    """Tree of booleans."""
    if given is None:
        return otherwise(params)
    return given(params) if callable(given) else given


def _given(params) -> Any:
    if params is None:
        raise UserError("this transformation needs the parameters: call update(updates, state, params)")
    return params


class _Array(NamedTuple):
    """A quantized array among the leaves of the parameters."""

    index: int
    name: str
    shape: tuple[int, ...]
    n: int  # tensors
    stacked: bool

    def apart(self, leaf) -> jax.Array:
        """The tensors, [n, ...]."""
        return leaf if self.stacked else leaf[None]


def _arrays(quantized: Which, stacked: Which, params) -> list[_Array]:
    chosen = jax.tree.leaves(_which(quantized, params, optimizers.is_decayed))
    several = jax.tree.leaves(_which(stacked, params, _none))
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    found = []
    for i, (path, leaf) in enumerate(leaves):
        if chosen[i]:
            if leaf.dtype != jnp.float32:
                raise UserError(f"{name_of(path)} is {leaf.dtype}, and weights that are quantized are float32")
            n = len(leaf) if several[i] else 1
            found.append(_Array(i, name_of(path), leaf.shape, n, bool(several[i])))
    if not found:
        raise UserError("no array of the parameters has two axes: name some in quantized")
    return found


def _scales(fmt: FormatParams, w_n) -> jax.Array:
    """float32 [n] from the current amax of each tensor."""
    return jax.vmap(lambda w: scale_for(jnp.max(jnp.abs(w)), fmt))(w_n)


def _grids(fmt: FormatParams, quantized: Which, stacked: Which, params) -> Any:
    """Tree with a Grid, or None."""
    grids: list[Grid | None] = [None] * len(leaves := jax.tree.leaves(params))
    for array in _arrays(quantized, stacked, params):
        scale_n = _scales(fmt, array.apart(leaves[array.index]))
        many = jax.tree.map(lambda field: np.broadcast_to(field, array.n), fmt)
        grids[array.index] = Grid(many, scale_n) if array.stacked else Grid(fmt, scale_n[0])
    return jax.tree.structure(params).unflatten(grids)


def _transformation(choices: _Weights) -> optax.GradientTransformation:
    return optax.GradientTransformation(partial(_init, choices), partial(_update, choices))


def _init(choices: _Weights, params) -> Any:
    arrays, leaves = _arrays(choices.quantized, choices.stacked, params), jax.tree.leaves(params)
    stored = choices.rounding is not None
    sums = jnp.zeros((sum(array.n for array in arrays), len(of_update.FIELDS)), jnp.float32)
    return WeightsState(
        count=jnp.int32(0),
        scale=tuple(_scales(choices.format, a.apart(leaves[a.index])) for a in arrays) if stored else (),
        residual=tuple(jnp.zeros(a.shape, jnp.bfloat16) for a in arrays)
        if choices.rounding == "error_feedback"
        else (),
        age=tuple(jnp.zeros(a.shape, jnp.uint16) for a in arrays),
        statistics=_columns(arrays, sums, stored),
    )


def _columns(arrays, sums_SF, stored: bool) -> Columns:
    names = [f"{a.name}/{i}" if a.stacked else a.name for a in arrays for i in range(a.n)]
    named, of_all = of_update.ledger_metrics(sums_SF, stored=stored, ages=True)
    return joined([over(names, named), scalars(of_all)])


def _update(choices: _Weights, updates, state, params=None) -> tuple[Any, Any]:
    params = _given(params)
    arrays = _arrays(choices.quantized, choices.stacked, params)
    weights, steps, structure = jax.tree.leaves(params), jax.tree.leaves(updates), jax.tree.structure(updates)
    scale, residual, age, sums, stream = [], [], [], [], 0
    for i, array in enumerate(arrays):
        w, u = (array.apart(leaves[array.index]) for leaves in (weights, steps))
        owed = array.apart(state.residual[i]) if state.residual else None
        seeds = None
        if choices.rounding == "stochastic":
            streams = AT_REST_STREAM + stream + np.arange(array.n, dtype=np.uint32)
            seeds = jax.vmap(partial(stochastic_seed, choices.seed, state.count))(streams)
        stream += array.n
        after = _stored(choices, w, u, state.scale[i] if state.scale else None, owed, seeds)
        taken, unlost = after.weights, None
        if choices.rounding == "error_feedback":
            unlost = after.residual != owed
        elif choices.rounding == "stochastic":
            unlost = jax.vmap(of_update.expected_to_move)(w, u, after.next)
        own, new_age = jax.vmap(of_update.entries)(
            w,
            taken,
            u,
            after.next if choices.rounding else after.grid,
            age=array.apart(state.age[i]),
            unlost=unlost,
        )
        rows = (w if choices.rounding else taken).reshape(array.n, 1, -1)
        flips = of_update.scale_flips(rows, after.grid, after.next)
        sums.append(of_update.with_scale_flips(own, flips))
        age.append(jnp.reshape(jnp.asarray(new_age), array.shape))
        if choices.rounding:
            steps[array.index] = (taken - w).reshape(array.shape)
            scale.append(after.next.scale)
        if owed is not None:
            residual.append(jnp.reshape(after.residual, array.shape))
    statistics = _columns(arrays, jnp.concatenate(sums), choices.rounding is not None)
    after = WeightsState(state.count + 1, tuple(scale), tuple(residual), tuple(age), statistics)
    return structure.unflatten(steps), after


class _After(NamedTuple):
    """Tensors after an update, [n, ...], and their grids before and after it, leaves [n]."""

    weights: jax.Array
    residual: Any
    grid: Grid
    next: Grid


def _stored(choices: _Weights, w, u, scale, residual, seeds) -> _After:
    n = len(w)
    fmt = jax.tree.map(lambda field: np.broadcast_to(field, n), choices.format)
    if choices.rounding is None:
        new = w + u
        grids = (Grid(fmt, _scales(choices.format, tensors)) for tensors in (w, new))
        return _After(new, None, *grids)
    grid = Grid(fmt, scale)
    after = jax.vmap(of_update.store)(w, u, grid, fmt, residual=residual, seed=seeds)
    return _After(after.weights, after.residual, grid, after.grid)
