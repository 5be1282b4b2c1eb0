"""The parts of an update by themselves: no compiled run, and no step around them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import MODEL, THRESHOLDS

from altgrad_jax.models import stacking
from altgrad_jax.models.parameters import weights_of, with_weights
from altgrad_jax.numerics.rounding import FormatParams, Grid, to_grid
from altgrad_jax.numerics.rules import resolve_rules
from altgrad_jax.step import metrics, quantization, update
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.quantization import QuantOptions, format_table
from altgrad_jax.step.update import Inputs, Step, StepOptions

FLOAT32 = dataclasses.replace(MODEL, compute_dtype="float32")
PARTS = ("attn_qkv", "attn_out", "mlp_up", "mlp_down")
QUANT = QuantOptions(resolve_rules(("E4M3",), 2), weights_at_rest="nearest")
WINDOWS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (4, MODEL.block_size + 1)).astype(np.uint16)


def step_of(**options):
    options = StepOptions(
        **dict(
            batch_size=4, steps_per_dispatch=1, learning_rate=1e-2, max_steps=10, warmup_steps=1, thresholds=THRESHOLDS
        )
        | options
    )
    return Step(FLOAT32, options, data_mesh(jax.devices()[:1]), n_train_windows=10, eval_batch_size=4)


def state_and_inputs(step):
    table = None if step.quant is None else format_table(step.quant)
    return update.stacked(step, update.init(step, 0, table)), Inputs(
        np.int32(0), np.float32(step.options.learning_rate), table
    )


def test_step_is_a_static_argument():
    assert step_of() == step_of() and hash(step_of()) == hash(step_of())
    state = jax.jit(update.init, static_argnums=0)(step_of(), 0)
    assert jax.tree.structure(state) == jax.tree.structure(update.init(step_of(), 0))


def test_micro_batches_give_the_gradient_of_the_batch():
    step = step_of()
    state, _ = state_and_inputs(step)
    whole, parts = (
        update.gradients(choices, choices.model, state.params, update.Batch(WINDOWS, number=0, seed=0))
        for choices in (step, step_of(grad_accum_steps=2))
    )
    np.testing.assert_allclose(whole.loss, parts.loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.grads, parts.grads)


@pytest.mark.parametrize("damage", ["loss", "gradient"])
def test_nothing_moves_from_what_is_not_finite(damage):
    step = step_of()
    state, inputs = state_and_inputs(step)
    grads = jax.tree.map(jnp.ones_like, state.params)
    if damage == "gradient":
        grads = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), grads)
    found = update.Gradients(jnp.float32(jnp.nan if damage == "loss" else 1.0), grads, None, None)
    health = update.judge(step, found, None)
    after = update.propose_update(step, state, inputs, grads, health, None)
    assert not health.finite
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))


def test_stored_weights_end_on_their_grid():
    step = step_of(quant=QUANT)
    state, inputs = state_and_inputs(step)
    formats = update.formats_of(step, state, inputs)
    old = {group.name: weights_of(state.params, group.name) for group in step.groups}
    assert [stacking.layers_of(name) for name in old] == [(f"block_0/{part}", f"block_1/{part}") for part in PARTS]
    updates = jax.tree.map(lambda w: jnp.full_like(w, 0.01), old)
    applied = with_weights(jax.tree.map(jnp.zeros_like, state.params), updates)
    params = jax.tree.map(jnp.add, state.params, applied)
    change = update.Change(old, updates, finite=jnp.bool_(True), bad=jnp.bool_(False))
    asked = update.Update(jnp.float32(0), jnp.float32(1), applied, applied, params, None, None)
    after = update.apply_formats(step, formats, change, asked, quantization.no_statistics(QUANT))
    formats_Q3 = jax.tree.map(np.asarray, formats.in_use_Q3)
    for q, layer in enumerate(step.stored):
        group = stacking.group_of(layer, step.plain.segments)
        i = stacking.layers_of(group).index(layer)
        w = weights_of(after.params, group)[i]
        fmt = FormatParams(*(field[q, 0] for field in formats_Q3))
        grid = Grid(fmt, after.quant.rest_scale[quantization.key_of(group)][i])
        np.testing.assert_array_equal(w, to_grid(w, grid))
        assert not np.array_equal(w, old[group][i])
        # What is told of the update is what the weight took, not what was asked for.
        taken = np.linalg.norm(np.float64(w) - old[group][i])
        at = after.moved.layers.index(layer)
        assert after.moved.norm[at] == pytest.approx(taken, rel=1e-5) and taken != pytest.approx(0.01 * np.sqrt(w.size))
        assert after.moved.zeros[at] == pytest.approx((np.sum(w == old[group][i]) + w.shape[1]) / (w.size + w.shape[1]))
    assert set(after.entries) == set(old) and not after.rises
    assert {entries.shape[0] for entries in after.entries.values()} == {MODEL.n_layer}


def test_every_metric_is_a_scalar_without_running_a_step():
    step = step_of(quant=QUANT, reference_gradient=True)
    state, inputs = state_and_inputs(step)
    after, row = jax.eval_shape(lambda *data: update.train_step(step, *data), state, WINDOWS, inputs)
    assert row.values.shape == (len(row.names),) == (len(set(row.names)),) and row.values.dtype == jnp.float32
    assert {f"grad_norm/{layer}" for layer in metrics.layer_names(state.params)} <= set(row.names)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
