"""Numbers for every time that a product is computed: which layer it is, its random numbers, and how results combine.

A *site* is one computation of a product: one round of its loops and one index of its batch. Layers have rows, Q in all,
in the order in which they are first computed. Sites of one layer (rounds with the same weight) share its row, its amax
history and its statistics, and have random numbers of their own.

Axes: Q layers, O operands of a layer, S fields of a vector of statistics, H steps of an amax history.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.instrumentation.plan import Layer, Product, layers_of
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.numerics.sums import Fields, combine_all


class Extra(NamedTuple):
    """What one product is given besides its operands; every array has the product's axes in front, None is absent."""

    seed: jax.Array | None = None  # uint32 [O, 2] of stochastic rounding
    signs: jax.Array | None = None  # float32 [6, hadamard.LARGEST] of transforms that are redrawn
    given: jax.Array | None = None  # float32 [O]: scales, or a recipe's amaxes, from earlier steps
    kept: jax.Array | None = None  # bool: whether this layer of a stack stays in the compute dtype
    probe: jax.Array | None = None  # float32 [..., S]; the gradient with respect to it is statistics


@dataclass(frozen=True)
class Sites:
    """The products that are computed in other numbers, and their layers."""

    products: tuple[Product, ...]
    layers: tuple[Layer, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers, [Q]."""
        return tuple(layer.name for layer in self.layers)

    def rows(self, product: Product) -> np.ndarray:
        """int64 [*product.axes]: the row of each site's layer."""
        row = {layer.index: q for q, layer in enumerate(self.layers) if layer.product.name == product.name}
        own = np.array([row[index] for index in np.ndindex(*product.layers)], int)
        shape = tuple(n if differs else 1 for n, differs in zip(product.axes, product.differs))
        return np.broadcast_to(own.reshape(shape), product.axes)


def sites_of(products: Sequence[Product]) -> Sites:
    """The sites of these products."""
    return Sites(tuple(products), tuple(layers_of(products)))


def rounds(product: Product) -> np.ndarray:
    """int64 [*product.axes]: 0, or for a weight that is used again the number of the round, from 1."""
    if not product.reused:
        return np.zeros(product.axes, int)
    again = tuple(product.axes[i] if i in product.reused else 1 for i in range(len(product.axes)))
    return np.broadcast_to(1 + np.arange(math.prod(again)).reshape(again), product.axes)


def of_rows(sites: Sites, array_Q) -> dict[str, jax.Array]:
    """{product: [*axes, ...]} from an array [Q, ...]."""
    return {product.name: jnp.asarray(array_Q)[sites.rows(product)] for product in sites.products}


def seeds(sites: Sites, words, streams: int) -> dict[str, jax.Array]:
    """{product: uint32 [*axes, streams, 2]}: a seed for each operand of each site.

    Stream i of row q is `stochastic_seed(words[0], words[1], streams * q + i)`, as in the built-in step; in a round of
    a weight that is used again, with the words of that round.

    Args:
      words: uint32 [2], other for every step.
    """
    of_round = jax.vmap(stochastic_seed, in_axes=(None, None, 0))
    of_stream = jax.vmap(jax.vmap(stochastic_seed, in_axes=(None, None, 0)))
    found = {}
    for product in sites.products:
        row, again = sites.rows(product).reshape(-1), rounds(product).reshape(-1)
        own = (
            of_round(words[0], words[1], again.astype(np.uint32)) if product.reused else jnp.tile(words, (row.size, 1))
        )
        numbers = streams * row[:, None] + np.arange(streams)
        found[product.name] = of_stream(own[:, 0], own[:, 1], numbers.astype(np.uint32)).reshape(
            *product.axes, streams, 2
        )
    return found


def combined(sites: Sites, fields: Fields, nothing, found: Mapping[str, jax.Array]) -> jax.Array:
    """float32 [Q, O, S] from {product: [*axes, O, S]}: the sites of a layer taken together.

    Args:
      nothing: float32 [S] that changes nothing when combined. It stands for a site that was not computed (the other
        branch of a cond), whose count is 0.
    """
    count = list(fields).index("count")
    parts, rows = [], []
    for product in sites.products:
        v = found[product.name]
        v = jnp.where(v[..., count, None] > 0, v, nothing)
        again = tuple(product.axes[i] for i in product.reused)
        v = jnp.moveaxis(v, product.reused, tuple(range(len(again)))).reshape(-1, *product.layers, *v.shape[-2:])
        parts.append(_as_one(fields, v).reshape(-1, *v.shape[-2:]))
        rows += [q for q, layer in enumerate(sites.layers) if layer.product.name == product.name]
    return jnp.concatenate(parts)[np.argsort(rows)]


def _as_one(fields: Fields, vectors) -> jax.Array:
    """combine_all of vectors that may have counts behind their fields, which are added."""
    rest = jnp.sum(vectors[..., len(fields) :], axis=0)
    return jnp.concatenate([combine_all(fields, vectors), rest], axis=-1)
