"""A model's parameters as a tree: a nested dict {layer: {array name: array}}, whatever the model.

Stacked parameters (models.stacking) have groups in place of layers, with arrays [n, ...].
"""

from typing import Any

import jax

from altgrad_jax.numerics.layers import HEAD


def count_params(params) -> int:
    """Number of scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def weights_of(params, layer: str) -> Any:
    """The weight matrix of a linear layer: its kernel [K, N], or for `head` the table [V, D]. Of a group in stacked
    parameters: [n, K, N]."""
    if layer == HEAD:
        return params[head_table(params)]["embedding"]
    block, part = layer.split("/")
    return params[block][part]["kernel"]


def with_weights(params, weights: dict) -> dict:
    """The parameters with the matrices of some layers or groups replaced: {layer: matrix}, as in `weights_of`."""
    params = {name: dict(group) for name, group in params.items()}
    for layer, matrix in weights.items():
        if layer == HEAD:
            table = head_table(params)
            params[table] = params[table] | {"embedding": matrix}
        else:
            block, part = layer.split("/")
            params[block][part] = params[block][part] | {"kernel": matrix}
    return params


def head_table(params) -> str:
    """The layer whose table the head multiplies with: `head`, or `embed` where the head is tied."""
    return HEAD if HEAD in params else "embed"
