"""A transformer in plain JAX, its blocks stacked and looped over by lax.scan, under a recipe of four bits.

Command: python examples/plain_scan_transformer.py       Time: a minute on two cores.
Result:  what NVFP4 does to every layer in each of the three products, and which products it does not reach.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax import instrument

LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY = 4, 64, 4, 32, 64


def init_params(seed=0):
    """Arrays stacked over layers, a table of tokens, and a head."""
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    random = np.random.default_rng(seed)

    def draw(*shape):
        return (random.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)

    blocks = {name: draw(LAYERS, *shape) for name, shape in shapes.items()}
    return {"embed": draw(VOCABULARY, WIDTH), "blocks": blocks, "head": draw(WIDTH, VOCABULARY)}


def norm(x):
    """RMSNorm without gain."""
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def block(x_BLD, w):
    """One block, as lax.scan calls it."""
    q, k, v = jnp.split((norm(x_BLD) @ w["qkv"]).reshape(*x_BLD.shape[:2], HEADS, -1), 3, axis=-1)
    attention = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x_BLD.shape)
    x_BLD = x_BLD + attention @ w["out"]
    return x_BLD + jax.nn.gelu(norm(x_BLD) @ w["up"]) @ w["down"], None


def loss_fn(params, tokens_BL):
    """Mean cross entropy of the next token."""
    x_BLD, _ = lax.scan(jax.checkpoint(block), params["embed"][tokens_BL[:, :-1]], params["blocks"])
    logits_BLV = norm(x_BLD) @ params["head"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), tokens_BL[:, 1:, None], -1).mean()


def batch(seed):
    """Sequences in which every token is the one before plus a step of the sequence's own."""
    start, step = np.random.default_rng(seed).integers(1, 9, (2, 8, 1))
    return ((start + step * np.arange(LENGTH + 1)) % VOCABULARY).astype(np.int32)


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--steps", type=int, default=100)
    flags.add_argument("--recipe", default="nvfp4")
    given = flags.parse_args()
    params = init_params()
    inst = instrument(loss_fn, params, batch(0), recipe=given.recipe, keep=("head", f"blocks/*/{LAYERS - 1}"))
    print(inst.layers, "\n")
    state, step = inst.init(params), jax.jit(inst.value_and_grad)
    for i in range(given.steps):
        (loss, _), grads, state, statistics = step(params, batch(i), state, key=jax.random.key(i))
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
        if i % 20 == 0 or i == given.steps - 1:
            print(f"step {i:4}  loss {loss:.4f}")
    slots = ("fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.x", "wgrad.g")
    print("\nSQNR in dB".ljust(20), *(slot.rjust(8) for slot in slots))
    for name in (f"blocks/{part}/{i}" for i in range(LAYERS) for part in ("qkv", "out", "up", "down")):
        print(name.ljust(19), *(f"{float(statistics[f'sqnr_db/{name}/{slot}']):8.1f}" for slot in slots))
