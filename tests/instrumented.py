"""Small models for the tests of `instrument`, each written with a product that a test can choose.

A model is a function of (dot, params, batch) -> loss, where dot(name, x, w, index) computes x w; `index` is the number
of the layer or round, possibly traced. With `plain` it is the model as a user would write it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.numerics import slots
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.products import Operand, Operands, Rule, quant_dot
from altgrad_jax.numerics.recipes import get_recipe
from altgrad_jax.numerics.rounding import format_params, stochastic_seed

M, D, F, L, E, T = 32, 32, 64, 2, 2, 2  # tokens, width, hidden, layers, experts, rounds


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(0, 0.2, shape).astype(np.float32)


def plain(name, x, w, index=0):
    return x @ w


class ByHand(NamedTuple):
    """Products of a recipe or a format, placed by hand. first: {name: row of its first layer}; stride: rows of a round;
    reused: names whose weight is the same in every round."""

    choice: str
    first: dict
    words: Any = None
    stride: int = 1
    reused: tuple = ()

    def __call__(self, name, x, w, index=0):
        if name not in self.first:
            return x @ w
        # As a recurrent net is written that does not keep a rounded copy of its weight for every round.
        dot = jax.checkpoint(self._dot, static_argnums=0) if name in self.reused else self._dot
        return dot(name, x, w, index)

    def _dot(self, name, x, w, index):
        if self.choice == "E4M3":
            operand = Operand(format_params(get_format("E4M3")))
            operands, rule = Operands(operand, operand, operand), Rule("current", "current", "current")
            return quant_dot(x, w, operands=operands, rule=rule, compute_dtype=jnp.float32)[0]
        own, words = slots.slots_of(get_recipe(self.choice)), self.words
        row = self.first[name] if name in self.reused else self.first[name] + self.stride * index
        if name in self.reused:
            words = stochastic_seed(words[0], words[1], index + 1)
        drawn = slots.redraw(own, stochastic_seed(words[0], words[1], row))
        return slots.slot_dot(x, w, drawn, slots.features_of([own]), compute_dtype=jnp.float32)[0]


def cross_entropy(y, targets):
    return jnp.mean(jax.nn.logsumexp(y, -1) - jnp.take_along_axis(y, targets[:, None], 1)[:, 0])


TARGETS = np.arange(M) % D
BATCH = {"x": normal(9, M, D), "y": TARGETS}


def stacked(dot, params, batch):
    """Blocks in a dictionary of stacked arrays, a scan with remat, and a head."""

    def block(h, item):
        i, w = item
        return h + dot("down", jax.nn.gelu(dot("up", h, w["up"], i)), w["down"], i), None

    h, _ = lax.scan(jax.checkpoint(block), batch["x"], (jnp.arange(L), params["blocks"]))
    return cross_entropy(dot("head", h, params["head"]), batch["y"])


STACKED = {"blocks": {"up": normal(0, L, D, F), "down": normal(1, L, F, D)}, "head": normal(2, D, D)}


def experts(dot, params, batch):
    """A mixture of experts: every token through every expert in batched products, weighted by a router."""
    gate = jax.nn.softmax(dot("router", batch["x"], params["router"]))
    x = jnp.einsum("me,md->emd", gate, batch["x"])
    if dot is plain:
        h = jnp.einsum("emd,edf->emf", x, params["up"])
        y = jnp.einsum("emf,efd->emd", jax.nn.relu(h), params["down"])
    else:
        h = lax.map(lambda item: dot("up", *item), (x, params["up"], jnp.arange(E)))
        y = lax.map(lambda item: dot("down", *item), (jax.nn.relu(h), params["down"], jnp.arange(E)))
    return cross_entropy(jnp.einsum("me,emd->md", gate, y), batch["y"])


EXPERTS = {"router": normal(3, D, E), "up": normal(4, E, D, F), "down": normal(5, E, F, D)}


def recurrent(dot, params, batch):
    """One weight in every round."""

    def cell(h, i):
        return jnp.tanh(dot("w", h, params["w"], i) + params["b"]), None

    h, _ = lax.scan(cell, batch["x"], jnp.arange(T))
    return cross_entropy(h, batch["y"])


RECURRENT = {"w": normal(6, D, D), "b": normal(7, D)}


class Model(NamedTuple):
    loss: Any
    params: Any
    first: dict  # rows in the order in which layers are first computed
    stride: int = 1
    reused: tuple = ()
    keep: tuple = ()

    def plain(self, params, batch):
        return self.loss(plain, params, batch)

    def by_hand(self, choice, words=None):
        dot = ByHand(choice, self.first, words, self.stride, self.reused)
        return lambda params, batch: self.loss(dot, params, batch)


MODELS = {
    "stacked": Model(stacked, STACKED, {"up": 0, "down": 1, "head": 2 * L}, stride=2),
    "experts": Model(experts, EXPERTS, {"up": 0, "down": E}, keep=("router",)),
    "recurrent": Model(recurrent, RECURRENT, {"w": 0}, reused=("w",)),
}


B, H, C = 2, 2, 32  # sequences, heads, width of a head


def attention(dot, pair, params, batch):
    """A loop over blocks of attention alone. pair(i, x, w, transposed) computes x w, or x w^T, for every head."""

    def block(x_BTD, item):
        i, w = item
        q, k, v = (t.reshape(B, M, H, C).swapaxes(1, 2) for t in jnp.split(dot("qkv", x_BTD, w["qkv"], i), 3, -1))
        p_BHTS = jax.nn.softmax(pair(2 * i, q, k, True) / np.float32(C**0.5))
        y_BTD = pair(2 * i + 1, p_BHTS, v, False).swapaxes(1, 2).reshape(x_BTD.shape)
        return x_BTD + dot("out", y_BTD, w["out"], i), None

    x, _ = lax.scan(block, batch["x"], (jnp.arange(L), params))
    return jnp.mean(x**2)


def plain_pair(row, x, w, transposed):
    return jnp.einsum("bhmk,bhnk->bhmn" if transposed else "bhmk,bhkn->bhmn", x, w)


def pair_by_hand(name, words, row, x, w, transposed):
    own = slots.slots_of(get_recipe(name))
    drawn = slots.redraw(own, stochastic_seed(words[0], words[1], row))
    x_P, w_P = (v.reshape(-1, *v.shape[2:]) for v in (x, w))
    y = slots.slot_dots(x_P, w_P, drawn, slots.features_of([own]), None, transposed, jnp.float32)[0]
    return y.reshape(B, H, *y.shape[1:])


ATTENTION = {"qkv": normal(10, L, H * C, 3 * H * C), "out": normal(11, L, H * C, H * C)}
SEQUENCES = {"x": normal(12, B, M, H * C)}
