"""`instrument` on models of Flax (linen and nnx), Equinox and Haiku: every weight product is found by its name, and
without a recipe no bit of the loss and the gradients differs."""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import numpy as np
import pytest
from flax import nnx
from instrumented import BATCH, ByHand, D, L, cross_entropy
from test_instrument import differing, step

from altgrad_jax import instrument

HEADS, SIZE = 2, 8  # heads of the attention; sides of a picture


class Case(NamedTuple):
    loss: Any
    params: Any
    batch: Any
    found: set
    not_covered: set = frozenset()  # reasons


class Mlp(nn.Module):
    dot_general: Any = None

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(D, name="up", dot_general=self.dot_general)(x))
        return nn.Dense(D, name="down", dot_general=self.dot_general)(h)


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        x = nn.LayerNorm()(h)
        h = h + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x, mask=nn.make_causal_mask(x[..., 0]))
        return h + nn.Dense(D, name="mlp")(nn.gelu(h)), None


class Transformer(nn.Module):
    """Blocks by nn.scan over nn.remat."""

    @nn.compact
    def __call__(self, h):
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=L)
        return nn.Dense(D, name="head")(stack(name="blocks")(h, None)[0])


class Vit(nn.Module):
    @nn.compact
    def __call__(self, image):
        patches = nn.Conv(D, (4, 4), (4, 4), name="patches")(image)
        h = patches.reshape(*patches.shape[:-3], -1, D)
        return nn.Dense(D, name="head")(Block(name="block")(h, None)[0].mean(-2))


def drawn(init, *args):
    """Parameters like those that `init` makes, drawn by NumPy, which compiles nothing."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), jax.eval_shape(init, *args))


def linen_loss(model, params, batch):
    return cross_entropy(model.apply(params, batch["x"]).reshape(-1, D), batch["y"])


def linen(model, x, found, not_covered=()):
    batch = {"x": x, "y": BATCH["y"][: x.reshape(-1, D).shape[0]]}
    params = drawn(model.init, jax.random.key(0), x)
    return Case(partial(linen_loss, model), params, batch, {f"params/{name}" for name in found}, set(not_covered))


ATTENTION = {f"attention/{part}/kernel" for part in ("query", "key", "value", "out")}
OF_BLOCK = ATTENTION | {"mlp/kernel"}


def mlp():
    return linen(Mlp(), BATCH["x"], {"up/kernel", "down/kernel"})


def scanned():
    found = {f"blocks/{name}" for name in OF_BLOCK} | {"head/kernel"}
    return linen(Transformer(), BATCH["x"].reshape(2, -1, D), found, {"product of two activations"})


def vit():
    image = np.random.default_rng(0).normal(size=(4, SIZE, SIZE, 3)).astype(np.float32)
    model, found = Vit(), {f"params/block/{name}" for name in OF_BLOCK} | {"params/head/kernel"}
    batch = {"x": image, "y": BATCH["y"][:4]}
    reasons = {"product of two activations", "conv_general_dilated"}
    return Case(partial(linen_loss, model), drawn(model.init, jax.random.key(0), image), batch, found, reasons)


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def of_nnx():
    graph, params = nnx.split(NnxMlp(nnx.Rngs(0)))
    return Case(partial(nnx_loss, graph), params, BATCH, {"up/kernel", "down/kernel"})


def nnx_loss(graph, params, batch):
    return cross_entropy(nnx.merge(graph, params)(batch["x"]), batch["y"])


def of_equinox():
    params, static = eqx.partition(eqx.nn.MLP(D, D, D, 1, key=jax.random.key(0)), eqx.is_array)
    return Case(partial(equinox_loss, static), params, BATCH, {"layers/0/weight", "layers/1/weight"})


def equinox_loss(static, params, batch):
    return cross_entropy(jax.vmap(eqx.combine(params, static))(batch["x"]), batch["y"])


def haiku_mlp(x):
    return hk.nets.MLP([D, D])(x)


def of_haiku():
    model = hk.without_apply_rng(hk.transform(haiku_mlp))
    params = drawn(model.init, jax.random.key(0), BATCH["x"])
    return Case(partial(haiku_loss, model), params, BATCH, {"mlp/~/linear_0/w", "mlp/~/linear_1/w"})


def haiku_loss(model, params, batch):
    return cross_entropy(model.apply(params, batch["x"]), batch["y"])


@pytest.mark.parametrize("make", [mlp, scanned, vit, of_nnx, of_equinox, of_haiku])
def test_finds_every_weight_and_changes_nothing(make):
    case = make()
    inst = instrument(case.loss, case.params, case.batch)
    assert set(inst.layers.names) == case.found
    assert {row.reason for row in inst.layers.not_covered} == case.not_covered
    (loss, _), grads, _, _ = step(inst, case.params, case.batch)
    plain = jax.jit(jax.value_and_grad(case.loss))(case.params, case.batch)
    assert differing((loss, grads), plain) == 0


def test_equals_a_linen_model_with_the_product_put_in_by_hand():
    case, dot = mlp(), ByHand("E4M3", {"": 0})
    model = Mlp(lambda x, w, *_, **__: dot("", x, w))
    inst = instrument(case.loss, case.params, BATCH, recipe="E4M3")
    (loss, _), grads, _, _ = step(inst, case.params)
    by_hand = jax.jit(jax.value_and_grad(partial(linen_loss, model)))(case.params, BATCH)
    assert differing((loss, grads), by_hand) == 0
