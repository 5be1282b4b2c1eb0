"""Norms of gradients, parameters and updates, by the names that `instrument` gives layers."""

from typing import Any

import jax
import jax.numpy as jnp

from altgrad_jax.errors import UserError
from altgrad_jax.step.metrics import (
    Columns,
    gradient_metrics,
    gradient_stats,
    joined,
    parameter_metrics,
    scalars,
    tree_norms,
    update_metrics,
)


def name_of(path) -> str:
    """A parameter's path, `blocks/0/kernel`; flax.nnx's `/value` is left out."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") or "params"


def by_name(tree) -> dict[str, dict[str, jax.Array]]:
    """The tree as {path of an array: {"array": it}}, which step.metrics takes for layers of one array each."""
    return {name_of(path): {"array": leaf} for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def measure(*, grads: Any = None, params: Any = None, updates: Any = None) -> Columns:
    """The built-in step's statistics of whole arrays, for a training loop of one's own; pure, for the inside of a jit.

    Args:
      grads: unclipped gradients: `grad_norm` over all, `grad_norm/ARRAY`, `grad_max/ARRAY`, `nonfinite_grads/ARRAY`.
      params: before the update: `param_norm/ARRAY`, `nonfinite_params/ARRAY`.
      updates: what is added to params, which then must be given, too: `update_norm/ARRAY`, `update_ratio/ARRAY`,
        `zero_update/ARRAY`.
      All are float32 trees of one structure. ARRAY is a path as in `Instrument.layers`.

    Returns:
      Columns as of `Instrument.value_and_grad`, for `Recorder.row`.
    """
    row = []
    if grads is not None:
        stats = gradient_stats(by_name(grads))
        total = {"grad_norm": jnp.sqrt(stats.square_sum.sum()), "nonfinite_grads": stats.nonfinite.sum()}
        row += [scalars(total), gradient_metrics(stats)]
    if updates is not None:
        if params is None:
            raise UserError("measure is given updates without params, and their ratio needs both: give params=, too")
        row.append(update_metrics(tree_norms(by_name(updates)), tree_norms(by_name(params))))
    if params is not None:
        row.append(parameter_metrics(tree_norms(by_name(params))))
    return joined(row)
