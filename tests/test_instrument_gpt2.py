"""The built-in model written with plain products and put under `instrument` is the built-in step, to the bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_instrument import differing
from test_training import tiny

from altgrad_jax import Formats, instrument
from altgrad_jax.config import validate
from altgrad_jax.models import linear, stacking
from altgrad_jax.models.model import init_params
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.step import quantization, recipe, update
from altgrad_jax.step.from_config import model_config, step_options
from altgrad_jax.step.mesh import data_mesh

SEED = 3
WINDOWS = np.random.default_rng(1).integers(0, 256, (2, 33)).astype(np.uint16)
LAYERS = [f"block_{i}/{part}" for i in range(2) for part in ("attn_qkv", "attn_out", "mlp_up", "mlp_down")]


def plain_dot(x, w, *, w_is_NK=False, compute_dtype=jnp.bfloat16):
    """A product as a user writes it: operands cast to the compute dtype."""
    x, w = x.astype(compute_dtype), w.astype(compute_dtype)
    contracted = (x.ndim - 1,), (1 if w_is_NK else 0,)
    return lax.dot_general(x, w, (contracted, ((), ())), preferred_element_type=jnp.float32)


def small(**changes):
    config = tiny(n_layer=2, n_embd=32, block_size=32, batch_size=2, **changes)
    validate(config)
    return config


def parameters(model):
    """Stacked, as the step works on them; drawn by NumPy, which compiles nothing."""
    like = jax.eval_shape(lambda: stacking.stack(init_params(model, 0), model.segments))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32), like)


def first_update(step, table, number_state, params, windows):
    """(loss, gradients, columns of statistics) of the built-in step."""
    state = update.TrainState(jnp.int32(0), params, None, None, number_state)
    inputs = update.Inputs(jnp.int32(SEED), jnp.float32(0), table)
    numbers = update.formats_of(step, state, inputs) or recipe.in_use(
        step.recipe, step.recipe_groups, state.quant, inputs.formats, inputs.seed, state.step
    )
    batch = update.Batch(windows, state.step, inputs.seed)
    found = update.gradients(step, step.model, params, batch, numbers)
    if step.recipe:
        return found.loss, found.grads, recipe.format_metrics(step.recipe.names, found.statistics)
    return found.loss, found.grads, quantization.format_metrics(step.quant, found.statistics)


def built_in(config):
    """(parameters, what `first_update` returns)."""
    options = step_options(config, steps_per_dispatch=1)
    plain = quantization.layout(model_config(config, jax.devices()[0]), options.quant)
    step, params = update.Step(plain, options, data_mesh(jax.devices()[:1]), 100, 4), parameters(plain)
    table = update.numbers_table(options)
    if step.recipe:
        state = recipe.init_state(step.recipe)
    else:
        state, _ = quantization.init_state(step.quant, {}, quantization.formats_at(table, 0), False)
    return params, jax.jit(first_update, static_argnums=0)(step, table, state, params, WINDOWS)


# Of the built-in settings, of `recipe`, and of `keep`.
CASES = {
    "formats": (
        dict(use_fp8=True, formats=("E4M3", "block_*:G=E5M2"), scaling="current", operand_rounding="stochastic"),
        Formats("E4M3", "E4M3", "E5M2", rounding="stochastic"),
        (),
    ),
}


# They compile for minutes: tests/campaigns/instrument_built_in.py compares them, and the tests of this file do not.
LONG_CASES = {
    "mxfp8": (dict(recipe=("mxfp8",)), "mxfp8", ()),
    "nvfp4": (dict(recipe=("nvfp4",)), "nvfp4", ("block_0:2/*/kernel/1",)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_built_in_step(case, monkeypatch):
    compare(*CASES[case], monkeypatch)


def compare(changes, choice, keep, monkeypatch):
    """Asserts equality of loss, gradients and all statistics. changes: of the built-in settings."""
    params, (loss, grads, columns) = built_in(small(metrics="format", **changes))
    monkeypatch.setattr(linear, "quant_dot", plain_dot)
    model, words = model_config(small(), jax.devices()[0]), stochastic_seed(SEED, 0, 0)
    inst = instrument(partial(mean_loss, model), params, WINDOWS, recipe=choice, keep=keep)
    (value, _), own, _, statistics = jax.jit(inst.value_and_grad)(params, WINDOWS, inst.init(params), key=words)
    assert differing((value, own), (loss, grads)) == 0
    # The same columns, by the names of stacked parameters.
    names = columns.names
    for layer in LAYERS:
        block, part = layer.split("/")
        names = [name.replace(f"/{layer}/", f"/block_0:2/{part}/kernel/{block[6:]}/") for name in names]
    assert list(statistics.names) == list(names)
    assert differing(statistics.values, columns.values) == 0


def mean_loss(model, params, windows):
    return update.loss(model, params, windows, None)[0]
