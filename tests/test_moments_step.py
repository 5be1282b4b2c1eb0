"""Adam's moments as a step keeps them, and what it says of them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import cpu_devices
from test_moments import KEPT, keep, kept_by_numpy
from test_stacking import APART
from test_stacking import step_of as stacking_step
from test_step import MODEL, TOKENS_T, column, make, train
from test_training import TINY
from test_update import state_and_inputs
from test_update import step_of as update_step

from altgrad_jax import config as settings
from altgrad_jax.config import default_config
from altgrad_jax.models import stacking
from altgrad_jax.numerics import optimizers
from altgrad_jax.numerics.rules import ROUNDINGS, resolve_rules
from altgrad_jax.run.sweep import program_key
from altgrad_jax.step import metrics, update
from altgrad_jax.step.mesh import data_mesh, split_like_parameters
from altgrad_jax.step.quantization import QuantOptions

ROOT = Path(__file__).parent.parent
# The group of the moments' metrics. Every setting is named, so that equal ones are one program.
GROUPS = ("update",)


def plain_step():
    return make(metric_groups=GROUPS)


def e4m3_step(rounding="nearest"):
    return make(metric_groups=GROUPS, moments="E4M3:128", moments_rounding=rounding)


def adam_of(state):
    return jax.device_get(optimizers.adam_moments(state.opt_state))


def kept_tree(tree, form, signed):
    return jax.tree.map(lambda x: kept_by_numpy(np.asarray(x), form, signed), tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("form", KEPT)
def test_an_update_is_made_from_exact_moments_and_keeps_them_rounded(form):
    """Parts of a step, each computed by itself, so that equal arithmetic has equal bits."""
    plain, step = update_step(), update_step(moments=form)
    state, inputs = state_and_inputs(step)
    rng = np.random.default_rng(0)
    for _ in range(2):
        grads = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape) * 1e-3), state.params)
        health = update.judge(step, update.Gradients(jnp.float32(1), grads, None, None), None)
        made, exact = (update.propose_update(s, state, inputs, grads, health, None) for s in (step, plain))
        assert_same((made.params, made.exact_opt_state), (exact.params, exact.opt_state))
        adam, kept = optimizers.adam_moments(exact.opt_state), optimizers.adam_moments(made.opt_state)
        assert kept.count == adam.count
        assert_same(kept.mu, kept_tree(adam.mu, form, True))
        assert_same(kept.nu, kept_tree(adam.nu, form, False))
        assert_losses(update.moment_metrics(step, made, health.finite), stacking.unstack(adam), stacking.unstack(kept))
        state = state._replace(params=made.params, opt_state=made.opt_state)


def test_the_row_of_a_compiled_step_has_what_its_states_say():
    """The step with float32 moments, from the same state, gives the moments that are rounded; but for their last bit,
    which two compiled programs may round differently."""
    plain, step = plain_step(), e4m3_step()
    state = step.init(42)
    for _ in range(2):
        before = jax.device_get(state)
        exact, _ = train(plain, [1], state=jax.device_put(before))
        state, row = train(step, [1], state=state)
        assert_losses(metrics.Columns(step.metric_names, row[0]), adam_of(exact), adam_of(state))
        for got, expected in zip(
            jax.tree.leaves((state.params, adam_of(state).mu, adam_of(state).nu)),
            jax.tree.leaves((exact.params, kept_tree(adam_of(exact).mu, "E4M3:128", True),
                             kept_tree(adam_of(exact).nu, "E4M3:128", False))),
            strict=True,
        ):  # fmt: skip
            assert np.isclose(got, expected, rtol=1e-6, atol=0).mean() > 0.99
    assert not any("moment2_underflow" in name or "moments_cosine" in name for name in plain.metric_names)


def assert_losses(columns, adam, kept):
    losses = numpy_losses(adam, kept)
    assert set(losses) == {*metrics.layer_names(adam.mu), ""}
    for layer, (underflow, cosine) in losses.items():
        end = layer and f"/{layer}"
        np.testing.assert_allclose(columns[f"sparse/moment2_underflow{end}"], underflow, atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(columns[f"sparse/moments_cosine{end}"], cosine, rtol=1e-3, atol=1e-6)


def numpy_losses(adam, kept):
    """{layer, and "" for all: (moment2_underflow, moments_cosine)} in float64."""
    t, terms = int(adam.count), {}
    trees = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (adam.mu, adam.nu, kept.mu, kept.nu))
    for of_array in zip(*trees, strict=True):
        layer = "/".join(key.key for key in of_array[0][0][:-1])
        mu, nu, kept_mu, kept_nu = (np.float64(leaf).ravel() for _, leaf in of_array)
        d, k = (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) for m, v in ((mu, nu), (kept_mu, kept_nu)))
        for name in (layer, ""):
            terms.setdefault(name, []).append((d, k, nu, kept_nu))
    out = {}
    for name, arrays in terms.items():
        d, k, nu, kept_nu = map(np.concatenate, zip(*arrays, strict=True))
        lost = np.sum((nu != 0) & (kept_nu == 0)) / max(np.sum(nu != 0), 1)
        out[name] = lost, d @ k / np.sqrt((d @ d) * (k @ k))
    return out


def test_second_moments_underflow_as_far_below_their_block_as_published():
    """The smallest that is kept: half the first code of E4M3, 2^-10 of 448, and of the map, 3.25e-7 of 1."""
    x = np.float32(np.concatenate([[1.0], 10 ** np.linspace(-12, -1, 200)]))
    for form, smallest in {"bfloat16": 0, "E4M3:256": 2**-10 / 448, "dynamic8": 3.25e-7 / 2}.items():
        kept = np.asarray(keep(x, form=form, signed=False))
        np.testing.assert_array_equal(kept > 0, x > smallest)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_run_trains_with_moments_in_e4m3(rounding):
    functions, tokens = e4m3_step(rounding), np.tile(np.arange(61, dtype=np.uint16), 33)
    state, rows = train(functions, [12], data=tokens[: len(TOKENS_T)])
    losses = column(functions, rows, "loss")
    reference = column(plain_step(), train(plain_step(), [12], data=tokens[: len(TOKENS_T)])[1], "loss")
    assert losses[-1] < losses[0] - 0.5 * (reference[0] - reference[-1]) and losses[0] == reference[0]
    nu = adam_of(state).nu["block_1"]["mlp_up"]["kernel"]
    assert len(np.unique(nu[0])) <= 127 and np.unique(nu).size > 127  # a row is a block here


def test_dispatches_of_any_length_give_the_same_bits():
    functions = e4m3_step("stochastic")
    whole, rows = train(functions, [5])
    first, head = train(functions, [2])
    restored = jax.tree.map(jnp.asarray, jax.device_get(first))  # as from a checkpoint
    rest, tail = train(functions, [3], state=restored)
    assert_same(rest, whole)
    np.testing.assert_array_equal(np.concatenate([head, tail]), rows)


def adam_state(seed=0):
    """The state of AdamW for some arrays of three blocks and a table, as positive numbers."""
    rng = np.random.default_rng(seed)
    shapes = {f"block_{i}": {"ln_1": {"scale": (40,)}, "mlp_up": {"kernel": (6, 300)}} for i in range(3)}
    shapes |= {"embed": {"embedding": (5, 20)}}
    mu, nu = (
        jax.tree.map(
            lambda shape: np.float32(rng.lognormal(sigma=4, size=shape)),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        for _ in range(2)
    )
    return (optax.ScaleByAdamState(np.int32(3), mu, nu),)


kept_moments = jax.jit(update.keep_moments, static_argnums=0)


@pytest.mark.parametrize(
    "form, rounding",
    [("E4M3:128", "nearest"), *((form, "stochastic") for form in ("bfloat16", "E4M3:128", "dynamic8"))],
)
def test_stacked_blocks_are_kept_as_each_by_itself(form, rounding):
    options, apart = stacking_step(moments=form, moments_rounding=rounding).options, adam_state()
    trees = apart, stacking.stack(apart, APART), stacking.stack(apart, ((0, 3),))
    kept = [stacking.unstack(kept_moments(options, tree, (7, 3))) for tree in trees]
    assert_same(kept[1], kept[0])
    assert_same(kept[2], kept[0])
    (adam,) = kept[0]
    if rounding == "nearest":
        assert_same(adam.mu, kept_tree(apart[0].mu, form, True))
        assert_same(adam.nu, kept_tree(apart[0].nu, form, False))


def test_no_two_tensors_moments_or_updates_share_their_random_bits():
    options = stacking_step(moments="bfloat16", moments_rounding="stochastic").options
    same = jax.tree.map(lambda leaf: np.full(leaf.shape, 1 + 2.0**-8, np.float32), adam_state())
    drawn = []
    for number in (3, 4):
        (kept,) = kept_moments(options, same, (7, number))
        drawn += [np.asarray(leaf).ravel()[:40] > 1 for leaf in jax.tree.leaves((kept.mu, kept.nu))]
    assert len({bits.tobytes() for bits in drawn}) == len(drawn) == 28
    assert 0.4 < np.mean(drawn) < 0.6


def test_a_step_that_is_not_finite_leaves_the_moments_and_says_nothing_of_them():
    functions = e4m3_step("stochastic")
    state, _ = train(functions, [2])
    params = jax.tree.map(jnp.array, jax.device_get(state.params))
    params["ln_f"]["scale"] = params["ln_f"]["scale"].at[0].set(jnp.nan)
    before = adam_of(state)
    after, row = train(functions, [1], state=state._replace(params=params))
    assert_same(adam_of(after), before)
    assert np.isnan(column(functions, row, "sparse/moments_cosine")).all()
    assert np.isnan(column(functions, row, "sparse/moment2_underflow/ln_f")).all()


def test_a_damaged_moment_stays_and_is_counted():
    functions = e4m3_step()
    state, _ = train(functions, [2])
    host = jax.tree.map(np.array, jax.device_get(state))
    optimizers.adam_moments(host.opt_state).nu["block_0"]["attn_out"]["kernel"][2, 1] = np.nan
    after, row = train(functions, [1], state=jax.tree.map(jnp.asarray, host))
    nu = adam_of(after).nu["block_0"]["attn_out"]["kernel"]
    assert np.isnan(nu[2, 1]) and np.isnan(nu).sum() == 1
    assert column(functions, row, "nonfinite_moments") == column(functions, row, "nonfinite_updates") == 1


def test_a_format_aware_optimizer_keeps_its_moments_too():
    quant = QuantOptions(resolve_rules(("E4M3",), 1), weights_at_rest="nearest")
    one_block = dataclasses.replace(MODEL, n_layer=1)
    functions = make(one_block, moments="bfloat16", quant=quant, optimizer="ulp_adamw", metric_groups=())
    state = functions.init(42, functions.inputs.formats)
    state, _ = functions.run(state, jnp.asarray(TOKENS_T), 2, functions.inputs)
    for leaf in jax.tree.leaves(adam_of(state)[1:]):
        np.testing.assert_array_equal(leaf, leaf.astype(ml_dtypes.bfloat16).astype(np.float32))


# Several devices.


def on_four_devices():
    """Prints how many elements of moments that are split over devices are kept otherwise than whole, as JSON."""
    from altgrad_jax.step import mesh as mesh_module

    mesh_module.MIN_SPLIT_ELEMENTS, mesh = 256, data_mesh(jax.devices(), fsdp=4)
    (adam,) = stacking.stack(adam_state(), ((0, 3),))
    spread = adam._replace(
        **{
            name: jax.device_put(tree, split_like_parameters(mesh, tree))
            for name, tree in (("mu", adam.mu), ("nu", adam.nu))
        }
    )
    differ, n_split = {}, sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((spread.mu, spread.nu)))
    for form in ("bfloat16", "E4M3:128"):
        options = stacking_step(moments=form, moments_rounding="stochastic").options
        whole, split = (jax.tree.leaves(kept_moments(options, (state,), (7, 3))) for state in (adam, spread))
        differ[form] = sum(int((np.asarray(a) != np.asarray(b)).sum()) for a, b in zip(whole, split, strict=True))
    print(json.dumps({"differ": differ, "n_split": n_split, "n_devices": jax.device_count()}))


def test_moments_split_over_devices_are_kept_as_whole_ones():
    environment = os.environ | {"XLA_FLAGS": cpu_devices(4), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.run(
        [sys.executable, "-c", "import test_moments_step; test_moments_step.on_four_devices()"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["n_devices"] == 4 and found["n_split"] == 2
    assert found["differ"] == {"bfloat16": 0, "E4M3:128": 0}


# The settings.


def problems_of(**changes):
    config = default_config()
    config.update(changes)
    return settings.problems(settings.values_of(config))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"moments": "E4M3"},
            "moments='E4M3' cannot be used: give one of float32, bfloat16, E4M3:128, E4M3:256, dynamic8 (the baseline "
            "has 'float32')",
        ),
        (
            {"moments_rounding": "stochastic"},
            "moments_rounding='stochastic' has no effect with moments='float32': set moments, or leave "
            "moments_rounding at 'nearest'",
        ),
        (
            {"moments": "dynamic8", "use_fp8": True, "formats": ("E4M3",), "optimizer": "grid"},
            "moments='dynamic8' is about Adam's two moments, and optimizer='grid' has no second one for weights in a "
            "number format: set moments='float32', or give another optimizer",
        ),
    ],
)
def test_what_cannot_be_used_is_one_sentence(changes, words):
    assert problems_of(**changes) == [words]


def test_every_form_and_rounding_may_be_given():
    for form in KEPT:
        for rounding in ROUNDINGS:
            assert problems_of(moments=form, moments_rounding=rounding) == []
    assert problems_of(moments="dynamic8", use_fp8=True, formats=("E4M3",), optimizer="ulp_adamw") == []


def test_a_form_is_a_program_of_its_own_and_fixed_for_a_run():
    configs = [default_config() for _ in range(3)]
    for config, changes in zip(configs, ({}, {"moments": "dynamic8"}, {"moments": "dynamic8", "seed": 3}), strict=True):
        config.update(TINY | changes)
    keys = [program_key(config) for config in configs]
    assert keys[0] != keys[1] == keys[2]
    assert not {"moments", "moments_rounding"} & settings.RESUMABLE_FIELDS
