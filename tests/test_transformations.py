"""Stored weights, the ledger and the format-aware optimizers as optax transformations, against the built-in step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_instrument import differing

from altgrad_jax import format_aware, ledger, quantize, stored_weights
from altgrad_jax.errors import UserError
from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.numerics import ledger as of_update
from altgrad_jax.numerics import optimizers
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.products import scale_for
from altgrad_jax.numerics.rounding import Grid, format_params, stochastic_seed
from altgrad_jax.numerics.rules import resolve_rules
from altgrad_jax.step import quantization, update
from altgrad_jax.step.quantization import QuantOptions

SEED, STEPS, SHAPE = 5, 4, (8, 12)
MODEL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64)
LAYERS = ("block_0/mlp_down", "block_1/mlp_down")
NAMES = tuple(f"{layer}/kernel" for layer in LAYERS)


def normal(seed, size, std=0.02):
    return (std * np.random.default_rng(seed).standard_normal((2, *size))).astype(np.float32)


UPDATES = [normal(i + 1, SHAPE, 0.001 * 8**i) for i in range(STEPS)]  # in the end so large that scales move


def tree(w_nKN):
    return {f"block_{i}": {"mlp_down": {"kernel": w_nKN[i], "bias": w_nKN[i, 0]}} for i in range(2)}


@partial(jax.jit, static_argnums=0)
def built_in_update(options, state, old, steps, number):
    """(weights, state, ledger) after an update, by the functions of the step."""
    segments = ((0, 2),)
    groups, table = quantization.groups(options, segments), quantization.format_table(options)
    in_use = quantization.formats_at(table, 0)
    formats = update.Formats(options, groups, state, table, in_use, SEED, number)
    name = groups[0].name
    change = update.Change({name: old}, {name: steps}, jnp.bool_(True), jnp.bool_(False))
    grids_of = partial(
        quantization.weight_grids, quantization.quantized_model(MODEL, options), options, groups, formats_Q3=in_use
    )
    grids, new, next_quant = grids_of(state, weights=change.old), {name: old + steps}, state
    if options.stored:
        next_formats = quantization.weight_formats(groups, in_use)
        new, next_quant = update.store_weights(formats, change, grids, state, next_formats, jnp.bool_(False))
    next_grids = grids_of(next_quant, weights=new)
    entries, age = update.enter_ledger(formats, change, new, next_quant, grids, next_grids, split=False)
    sums = update._by_layer(groups, entries)
    named = of_update.ledger_metrics(sums, stored=bool(options.stored), ages=True)
    return new[name], next_quant._replace(age=age), named


@pytest.mark.parametrize("rounding", [None, "nearest", "stochastic", "error_feedback"])
def test_equals_the_built_in_step(rounding):
    options = QuantOptions(
        resolve_rules(("block_*/mlp_down:W=E4M3",), 2),
        scaling=("current",) * 3,
        weights_at_rest=rounding or "float32",
    )
    w = normal(0, SHAPE)
    in_use = quantization.formats_at(quantization.format_table(options), 0)
    state, at_rest = quantization.init_state(options, dict(zip(LAYERS, w)), in_use, ages=True)
    state, old = quantization.stacked(state, ((0, 2),)), jnp.stack([at_rest.get(k, v) for k, v in zip(LAYERS, w)])

    ours = ledger("E4M3") if rounding is None else stored_weights("E4M3", rounding=rounding, seed=SEED)
    params = jax.tree.map(lambda leaf: quantize(leaf, "E4M3") if rounding and leaf.ndim == 2 else leaf, tree(w))
    own_state, take = ours.init(params), jax.jit(ours.update)
    for number, steps in enumerate(UPDATES):
        old, state, (of_layers, of_all) = built_in_update(options, state, old, steps, number)
        updates, own_state = take(tree(steps), own_state, params)
        params = optax.apply_updates(params, updates)
        kernels = jnp.stack([params[f"block_{i}"]["mlp_down"]["kernel"] for i in range(2)])
        assert differing(kernels, old) == 0
        np.testing.assert_array_equal(updates["block_0"]["mlp_down"]["bias"], steps[0, 0])
        statistics = optax.tree_utils.tree_get(own_state, "statistics")
        for name, values in of_layers.items():
            own = [statistics[f"{name}/{layer}"] for layer in NAMES]
            np.testing.assert_allclose(own, values, rtol=1e-6, err_msg=name)  # sums in another order
        for name, value in of_all.items():
            np.testing.assert_allclose(statistics[name], value, rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(own_state.age, np.stack([v for v in state.age.values()]).reshape(2, *SHAPE))
    if rounding:
        before = ours.init(tree(w)).scale
        assert differing(own_state.scale, before) > 0  # the case is not empty
        assert "lost_update" in statistics.names


def test_stacked_arrays_are_tensors_by_themselves():
    w = normal(0, SHAPE)
    w[1] *= 100
    together = stored_weights("E5M2", stacked={"w": True})
    (updates, state), apart = jax.jit(together.update)({"w": UPDATES[0]}, together.init({"w": w}), {"w": w}), []
    one = stored_weights("E5M2")
    for own, steps in zip(w, UPDATES[0]):
        found, after = jax.jit(one.update)({"w": steps}, one.init({"w": own}), {"w": own})
        apart.append((found["w"], after.scale[0], after.statistics["update_gain/w"]))
    for i, (step, scale, gain) in enumerate(apart):
        assert differing(updates["w"][i], step) == 0 and state.scale[0][i] == scale[0]
        assert state.statistics[f"update_gain/w/{i}"] == gain


PARAMS = {"w": normal(0, SHAPE)[0], "b": normal(1, SHAPE)[0, 0]}
GRADS = {"w": normal(2, SHAPE)[0], "b": normal(3, SHAPE)[0, 0]}


def test_adamw_is_that_of_optax():
    schedule = optax.linear_schedule(1e-2, 1e-3, 3)
    theirs, ours = optax.adamw(schedule, mask=optimizers.is_decayed), format_aware("adamw", schedule, "E4M3")
    params, state, own = PARAMS, theirs.init(PARAMS), ours.init(PARAMS)
    for _ in range(3):
        updates, state = theirs.update(GRADS, state, params)
        mine, own = ours.update(GRADS, own, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine, updates)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", ["ulp_adamw", "ulp_precondition_before_adam", "grid"])
def test_format_aware_is_the_optimizer_of_the_step(name):
    """As `update.propose_update` calls it, with the grid of the current amax."""
    ours, fmt = format_aware(name, 0.01, "E4M3", seed=SEED), format_params(get_format("E4M3"))
    settings = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-4)
    theirs = optimizers.make(name, is_quantized=optimizers.is_decayed, **settings)
    params, state, own = PARAMS, theirs.init(PARAMS), ours.init(PARAMS)
    for number in range(2):
        grids = {"w": Grid(fmt, scale_for(jnp.max(jnp.abs(params["w"])), fmt)), "b": None}
        extra = {"learning_rate": jnp.float32(0.01), "seed": stochastic_seed(SEED, number, update.OPTIMIZER_STREAM)}
        directions, state = theirs.update(GRADS, state, params, grids=grids, **extra)
        mine, own = ours.update(GRADS, own, params)
        assert differing(mine, jax.tree.map(lambda d: jnp.float32(-0.01) * d, directions)) == 0
        params = optax.apply_updates(params, mine)
    given, _ = ours.update(GRADS, own, params, grids={"w": Grid(fmt, 1.0), "b": None})
    assert name == "ulp_precondition_before_adam" or differing(given, ours.update(GRADS, own, params)[0]) > 0


def test_refuses_in_one_sentence():
    with pytest.raises(UserError, match="no rounding 'up' of stored weights: give one of nearest, stochastic, error"):
        stored_weights("E4M3", rounding="up")
    with pytest.raises(UserError, match="no optimizer 'adam'"):
        format_aware("adam", 1e-3, "E4M3")
    with pytest.raises(UserError, match="needs the parameters"):
        stored_weights("E4M3").update(GRADS, stored_weights("E4M3").init(PARAMS))
    with pytest.raises(UserError, match="w is bfloat16"):
        ledger("E4M3").init({"w": jnp.zeros(SHAPE, jnp.bfloat16)})
    with pytest.raises(UserError, match="no array of the parameters has two axes"):
        ledger("E4M3").init({"b": PARAMS["b"]})
