"""Which number format can a Flax model be trained in? Trains one multilayer perceptron in five and prints a table.

Command: python examples/flax_mlp.py       Time: half a minute on two cores.
Result:  the loss of each, and the error of each operand; with --record=runs/mlp folders for scripts/report.py.
"""

import argparse
import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from altgrad_jax import Recorder, instrument


class Mlp(nn.Module):
    """Two hidden layers; nothing in it knows of number formats."""

    width: int = 128

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(8)(x)


def loss_fn(params, batch):
    """Mean cross entropy."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(Mlp().apply(params, x), y).mean()


def data(seed, n=256):
    """Points of 32 numbers, and in which of 8 classes a fixed random map puts them."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 32)).astype(np.float32)
    return x, np.argmax(np.tanh(x @ np.random.default_rng(0).normal(size=(32, 8))), axis=1)


def train(recipe, steps, folder):
    """(loss of the last step, its statistics) in a format."""
    params = Mlp().init(jax.random.key(0), data(0)[0])
    inst = instrument(loss_fn, params, data(0), recipe=recipe, keep=("Dense_2",))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, moments, state, batch, key):
        (loss, _), grads, state, statistics = inst.value_and_grad(params, batch, state, key=key)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(params, updates), moments, state, loss, statistics

    moments, state, loss, statistics = optimizer.init(params), inst.init(params), jnp.nan, None
    kept = {"data": "points", "max_steps": steps, "learning_rate": 3e-3}
    with Recorder(f"{folder}/{recipe}", inst, **kept) if folder else contextlib.nullcontext() as recorder:
        for i in range(steps):
            params, moments, state, loss, statistics = step(params, moments, state, data(i), jax.random.key(i))
            if recorder:
                recorder.row(loss, statistics, learning_rate=3e-3)
        if recorder:
            recorder.evaluation(float(loss_fn(params, data(steps))))
    return inst, float(loss), statistics


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--steps", type=int, default=200)
    flags.add_argument("--formats", nargs="+", default=["E4M3", "E5M2", "E2M3", "E2M1"])
    flags.add_argument("--record", default="", help="folder for the records of all runs")
    given = flags.parse_args()
    for number, recipe in enumerate(("BF16", *given.formats)):
        inst, loss, statistics = train(recipe, given.steps, given.record)
        if number == 0:
            print(inst.layers, f"\n\n{'format':8}  {'loss':>7}  SQNR in dB of  W      A      G")
        sqnr = [f"{float(statistics[f'sqnr_db/all/{operand}']):7.1f}" for operand in "WAG"]
        print(f"{recipe:8}  {loss:7.4f}              {''.join(sqnr)}")
