"""The built-in model written with plain products and put under `instrument` is the built-in step, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_instrument import differing
from test_recipe_step import SMALL, make
from test_training import tiny

from altgrad_jax import Formats, instrument
from altgrad_jax.config import validate
from altgrad_jax.models import gpt2
from altgrad_jax.step import quantization, recipe, update
from altgrad_jax.step.from_config import model_config

WINDOWS = np.random.default_rng(1).integers(0, 256, (2, 33)).astype(np.uint16)
LAYERS = [f"block_{i}/{part}" for i in range(2) for part in ("attn_qkv", "attn_out", "mlp_up", "mlp_down")]


def plain_dot(x, w, *, w_is_NK=False, compute_dtype=jnp.bfloat16):
    """A product as a user writes it: operands cast to the compute dtype."""
    x, w = x.astype(compute_dtype), w.astype(compute_dtype)
    return lax.dot_general(x, w, (((x.ndim - 1,), (1 if w_is_NK else 0,)), ((), ())), preferred_element_type=jnp.float32)


def built_in(changes, seed):
    """(loss, gradients, columns of statistics) of the first update of the built-in step."""
    functions = make(batch_size=2, **changes)
    step = functions.step
    state = update.stacked(step, functions.init(42, functions.inputs.formats))
    inputs = functions.inputs

    def first(params, windows):
        numbers = update.formats_of(step, state, inputs) or recipe.in_use(
            step.recipe, step.recipe_groups, state.quant, inputs.formats, inputs.seed, state.step
        )
        found = update.gradients(step, step.model, params, update.Batch(windows, state.step, inputs.seed), numbers)
        if step.recipe:
            return found.loss, found.grads, recipe.format_metrics(step.recipe.names, found.statistics)
        return found.loss, found.grads, quantization.format_metrics(step.quant, found.statistics)

    return state.params, jax.jit(first)(state.params, WINDOWS), update.stochastic_seed(inputs.seed, 0, 0)


CASES = {
    "nvfp4": (dict(recipe=("nvfp4",)), "nvfp4", ("block_0:2/*/kernel/1",)),
    "formats": (
        dict(use_fp8=True, formats=("E4M3", "*:G=E5M2"), scaling="tensor", operand_rounding="stochastic"),
        Formats("E4M3", "E4M3", "E5M2", rounding="stochastic"),
        (),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_built_in_step(case, monkeypatch):
    changes, choice, keep = CASES[case]
    params, (loss, grads, columns), words = built_in(changes, 3)
    monkeypatch.setattr(gpt2, "quant_dot", plain_dot)
    config = tiny(**SMALL | dict(batch_size=2))
    validate(config)
    model = model_config(config, jax.devices()[0])

    def loss_fn(params, windows):
        return update.loss(model, params, windows, None)[0]

    inst = instrument(loss_fn, params, WINDOWS, recipe=choice, keep=keep)
    (value, _), own, _, statistics = jax.jit(inst.value_and_grad)(params, WINDOWS, inst.init(params), key=words)
    assert differing((value, own), (loss, grads)) == 0
    # The same columns, by the names of stacked parameters.
    stacked = {layer: f"block_0:2/{layer.split('/')[1]}/kernel/{layer[6]}" for layer in LAYERS}
    names = [name for name in columns.names]
    for layer, ours in stacked.items():
        names = [name.replace(f"/{layer}/", f"/{ours}/") for name in names]
    assert statistics.names == tuple(names)
    assert differing(statistics.values, columns.values) == 0
