"""Which of the layers of an Equinox model bears a recipe worst? Compares the gradient in MXFP4 with the exact one.

Command: python examples/equinox_transformer.py       Time: half a minute on two cores. Needs: pip install equinox
Result:  how far the gradient of each weight is from the one in float32, with all layers quantized.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax import instrument

WIDTH, HEADS, LENGTH = 64, 4, 32


class Block(eqx.Module):
    """Attention and a multilayer perceptron on one sequence [L, D]."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: list

    def __init__(self, key):
        of_attention, of_mlp = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=of_attention)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=of_mlp)
        self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]

    def __call__(self, x_LD):
        h_LD = jax.vmap(self.norms[0])(x_LD)
        x_LD = x_LD + self.attention(h_LD, h_LD, h_LD, mask=jnp.tri(len(x_LD), dtype=bool))
        return x_LD + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x_LD))


def loss_of(static, params, x_BLD):
    """Mean squared error of the next vector."""
    y_BLD = x_BLD
    for block in eqx.combine(params, static):
        y_BLD = jax.vmap(block)(y_BLD)
    return jnp.mean((y_BLD[:, :-1] - x_BLD[:, 1:]) ** 2)


def distance(a, b):
    """|a - b| / |b|"""
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--recipe", default="mxfp4")
    flags.add_argument("--blocks", type=int, default=2)
    given = flags.parse_args()
    model = [Block(key) for key in jax.random.split(jax.random.key(0), given.blocks)]
    params, static = eqx.partition(model, eqx.is_array)
    loss_fn = jax.tree_util.Partial(loss_of, static)
    x_BLD = np.random.default_rng(0).normal(size=(4, LENGTH, WIDTH)).cumsum(1).astype(np.float32) / LENGTH

    inst = instrument(loss_fn, params, x_BLD, recipe=given.recipe, keep=())
    print(inst.layers, "\n")
    step = jax.jit(inst.value_and_grad)
    (loss, _), grads, _, statistics = step(params, x_BLD, inst.init(params), key=jax.random.key(0))
    exact = jax.grad(loss_fn)(params, x_BLD)
    print(f"loss {loss:.5f}\n\n{'weight':42}{'gradient off by':>16}{'share of zeros made':>22}")
    paths = jax.tree_util.tree_flatten_with_path(grads)[0]
    for (path, own), other in zip(paths, jax.tree.leaves(exact)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in inst.layers.names:
            print(f"{name:42}{distance(own, other):16.1%}{float(statistics[f'underflow/{name}/wgrad.g']):22.1%}")
