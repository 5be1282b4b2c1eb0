"""Bias and variance of quantized products: estimators, known floors, and faults planted, found and located.

The draws' seed is fixed; ALTGRAD_JAX_SEED takes another, which also plants the faults in other layers.
"""

import dataclasses
import os
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import make_data, rows_of, tiny

from altgrad_jax import instrument, train
from altgrad_jax.config import problems, values_of
from altgrad_jax.errors import UserError
from altgrad_jax.inference.certify import as_json, certify_checkpoint, table_lines
from altgrad_jax.numerics import bias, certified_products, oscillation, rounding, slots
from altgrad_jax.numerics.bias import bias_of, unpacked, whole_of
from altgrad_jax.numerics.certified_products import Certified, Draws, certified_dot
from altgrad_jax.numerics.recipes import PRODUCTS, RECIPES, Recipe, get_recipe
from altgrad_jax.run.alerts import FormatExhausted
from altgrad_jax.step import recipe

SEED = int(os.environ.get("ALTGRAD_JAX_SEED", "0"))
M, K, N = 192, 96, 256
STRAIGHT, FLOAT32 = range(2)
FPROP, DGRAD, WGRAD = range(3)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


OPERANDS = normal(M, K), normal(K, N, seed=1), normal(M, N, seed=2)


# ------------------------------------------------------------------------------------------------------ the estimators


def sums_of(draws_NE, exact_E):
    """Sums whose cells are all of one product."""
    groups = bias.groups_of(len(draws_NE))
    means = draws_NE.reshape(groups, -1, exact_E.size).mean(1)
    error = means - exact_E
    cells = [
        np.square(exact_E).sum(), np.square(draws_NE - exact_E).sum(1).mean(), error @ error.T, means @ exact_E,
    ]  # fmt: skip
    return bias.Sums(*(np.broadcast_to(cell, (2, 3, *np.shape(cell))) for cell in cells), np.zeros((2, groups)))


@pytest.mark.parametrize("n", [16, 48])
def test_bias_and_variance_are_the_definition_and_unbiased(n):
    rng, exact = np.random.default_rng(3), np.arange(1.0, 201.0)
    energy, offset, sigma = np.square(exact).sum(), 0.5, 8.0
    true_bias, true_variance = exact.size * offset**2 / energy, exact.size * sigma**2 / energy
    found, intervals = [], []
    for _ in range(300):
        draws = exact + offset + sigma * rng.standard_normal((n, exact.size))
        of = bias_of(sums_of(draws, exact), n)
        e1, en = (np.square(draws - exact).sum(1).mean() / energy, np.square(draws.mean(0) - exact).sum() / energy)
        variance = n / (n - 1) * (e1 - en)
        assert of.variance[0, 0] == pytest.approx(variance)
        assert of.bias[0, 0] == pytest.approx(en - variance / n)
        assert of.shrinkage[0, 0] == pytest.approx(1 - draws.mean(0) @ exact / energy)
        found.append((of.bias[0, 0], of.variance[0, 0]))
        intervals.append(abs(of.bias[0, 0] - true_bias) <= of.half_width[0, 0])
    mean, se = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    assert np.all(np.abs(mean - [true_bias, true_variance]) < 4 * se)
    assert np.mean(intervals) > 0.9


def test_signal_and_noise_of_the_gradient():
    """From two windows they are <g_1, g_2> and |g_1 - g_2|^2 / 4; quantities of an update scale as they should."""
    first, second = normal(50, seed=4) + 1, normal(50, seed=5) + 1
    sums = bias.WholeSums(first @ second, np.square(first - second).sum() / 4, 30.0, 12.0, 4.0)
    found = whole_of(sums, share=0.25)
    assert found["grad_noise_ratio"] == pytest.approx(8 / (np.square(first - second).sum() / 4))
    assert found["grad_signal_to_error"] == pytest.approx(np.sqrt(first @ second) / np.sqrt(4 + 0.25 * 8))
    assert (found["grad_total_bias"], found["grad_total_variance"]) == (pytest.approx(4 / 30), pytest.approx(8 / 30))
    assert whole_of(sums._replace(signal=-1.0))["grad_signal_to_error"] == 0


# ------------------------------------------------------------------------------------------------------ a single layer


def measured(name, n, x=OPERANDS[0], w=OPERANDS[1], g=OPERANDS[2]):
    """(Bias, dX, dW) of one layer."""
    own = slots.slots_of(get_recipe(name))
    draws = Draws(n, 2, slots.features_of([own]))
    given = Certified(own, np.uint32([1, 2]), np.int32(0))
    probe = np.zeros(bias.n_fields(n), np.float32)
    dot = jax.jit(lambda x, w, probe, given: jax.vjp(partial(_dot, draws, given), x, w, probe)[1](g))
    dx, dw, vector = dot(x, w, probe, given)
    return bias_of(unpacked(vector, n), n), dx, dw


def _dot(draws, given, x, w, probe):
    return certified_dot(x, w, given, draws, probe)


def test_fixed_signs_leave_the_bias_that_is_published_and_redrawn_ones_none():
    """8.96e-3 and 1.6e-4 = B + V / 256; stochastic rounding under a clipped scale 2.1e-4 (docs/bias.md)."""
    fixed, redrawn = measured("nvfp4:wgrad", 64)[0], measured("nvfp4_redrawn:wgrad", 64)[0]
    assert fixed.bias[FLOAT32, WGRAD] == pytest.approx(8.96e-3, rel=0.08)
    assert redrawn.bias[FLOAT32, WGRAD] + redrawn.variance[FLOAT32, WGRAD] / 256 == pytest.approx(1.6e-4, rel=0.2)
    assert fixed.biased[FLOAT32, WGRAD] and not redrawn.biased[FLOAT32, WGRAD]
    assert abs(redrawn.persistent[FLOAT32, WGRAD]) < 5 * redrawn.persistent_se[FLOAT32, WGRAD]


def test_a_layer_is_measured_as_slot_dot_computes_it_and_hands_on_exact_gradients():
    """Against float64 of the recipe's own copies; a deterministic recipe has no variance."""
    x, w, g = (v.astype(np.float64) for v in OPERANDS)
    of, dx, dw = measured("mxfp8", 4)
    own = slots.slots_of(get_recipe("mxfp8"))
    y, pull = jax.vjp(lambda x, w: slots.slot_dot(x, w, own, slots.features_of([own]))[0], *OPERANDS[:2])
    exact = [x @ w, g @ w.T, x.T @ g]
    for p, (got, want) in enumerate(zip((y, *pull(OPERANDS[2])), exact)):
        error = np.square(np.asarray(got, np.float64) - want).sum() / np.square(want).sum()
        assert of.bias[FLOAT32, p] == pytest.approx(error, rel=0.03 if p == WGRAD else 1e-3)  # of halves
        assert abs(of.variance[FLOAT32, p]) < 1e-8
        shrinkage = 1 - np.sum(np.asarray(got) * want) / np.square(want).sum()
        assert of.shrinkage[FLOAT32, p] == pytest.approx(shrinkage, abs=5e-4 if p == WGRAD else 1e-5)
    assert of.bias[STRAIGHT, DGRAD] < 0.7 * of.bias[FLOAT32, DGRAD]
    np.testing.assert_allclose(dx, exact[1], atol=0.05 * np.abs(exact[1]).max())
    assert np.square(dw - exact[2]).sum() / np.square(exact[2]).sum() < 2e-3


# ------------------------------------------------------------------------------------------- planted in a whole model

# Marks in `given`, which is read only where it is positive.
REPEATS, TO_ZERO = -8, -10
_SENTINEL = np.uint32([0xFFFFFFFF, 0xFFFFFFFE])


_STOCHASTIC = replace(RECIPES["tetrajet_v2"].slots[2], transform="none")
_AGAIN = replace(_STOCHASTIC, source="fprop")
# Without bias, and without a rotation, which would hide some of it; 4/6 in the program alone.
UNBIASED = Recipe("unbiased", *RECIPES["tetrajet_v2"].slots[:2], _STOCHASTIC, _AGAIN, _AGAIN, _STOCHASTIC)
FOUR_SIX = Recipe("four_six", *UNBIASED.slots[:2], *[replace(_STOCHASTIC, correction="four_six", bound=256.0)] * 4)


class Fault(NamedTuple):
    """Leaves of the slots of one product, both or one of them, that make the fault; seen against `reference`."""

    leaves: dict
    both: bool = False
    recipe: Recipe = UNBIASED
    reference: int = STRAIGHT
    product: int | None = None  # None: dgrad or wgrad


FAULTS = {
    "fixed signs": Fault({"redrawn": False}, True, RECIPES["nvfp4_redrawn"], FLOAT32, WGRAD),
    "stochastic rounding without headroom": Fault({"target": 6.0}, both=True),
    "4/6 under stochastic rounding": Fault({"target": 6.0, "bound": 256.0, "four_six": True}, both=True),
    "zeroed gradients": Fault({"target": 0.1, "stochastic": False}),
    "nearest in the backward pass": Fault({"stochastic": False}, both=True),
    "one biased slot": Fault({"stochastic": False}),
    "a scale too small by 2": Fault({"target": 12.0}),
    "random bits that repeat": Fault({"given": REPEATS}, both=True),
    "signs of one operand only": Fault({"redrawn": False}, recipe=RECIPES["tetrajet_v2"]),
    "rounding toward zero": Fault({"given": TO_ZERO}),
}
DRAWS = 64


def _planted_redraw(slots_6, seed):
    drawn, given = slots.redraw(slots_6, seed), jnp.asarray(slots_6.given)[:, None]
    keys = jnp.where(given == REPEATS, jnp.uint32([1, 2]), drawn.seed)
    return drawn._replace(seed=jnp.where(given == TO_ZERO, _SENTINEL, keys))


def _planted_bits(random_bits, shape, seed):
    return jnp.where(jnp.all(seed == _SENTINEL), jnp.uint32(0), random_bits(shape, seed))


N_LAYERS, WIDTH = 5, 64


class Stack(NamedTuple):
    """Layers one after the other, each measured; compiled once for all slots and seeds."""

    features: tuple
    program: object

    def slots(self, recipe):
        """A recipe in every layer: leaves [layers, 6, ...]."""
        own = slots.slots_of(recipe)
        return jax.tree.map(lambda leaf: np.stack([leaf] * N_LAYERS), own)

    def flagged(self, of_layers, reference, seed):
        """{(layer, dgrad or wgrad)} whose bias is shown."""
        vectors = self.program(of_layers, np.uint32(seed))
        found = [bias_of(unpacked(vector, DRAWS), DRAWS) for vector in np.asarray(vectors)]
        return {(q, p) for q, of in enumerate(found) for p in (DGRAD, WGRAD) if of.biased[reference, p]}


def stack_of(features, of_layers, seed):
    """float32 [layers, F]: packed Sums of layers h + norm(h) w, on random numbers."""
    draws = Draws(DRAWS, 2, features)
    x, w, target = (
        normal(2 * WIDTH, WIDTH),
        normal(N_LAYERS, WIDTH, WIDTH, seed=1) / 8,
        normal(2 * WIDTH, WIDTH, seed=2),
    )
    seeds = jax.vmap(rounding.stochastic_seed, in_axes=(None, None, 0))(seed, 0, jnp.arange(N_LAYERS))

    def layer(h, of):
        w, own, seed, probe = of
        norm = h / jnp.sqrt(jnp.mean(jnp.square(h), 1, keepdims=True))
        return h + certified_dot(norm, w, Certified(own, seed, jnp.int32(0)), draws, probe), None

    def loss(probes):
        return jnp.sum(jax.lax.scan(layer, x, (w, of_layers, seeds, probes))[0] * target)

    return jax.grad(loss)(jnp.zeros((N_LAYERS, bias.n_fields(DRAWS))))


@pytest.fixture(scope="module")
def stack():
    """Its features are its own (`apart` says nothing without statistics), so that no program traced with the planted
    functions is another test's."""
    known = [slots.slots_of(own) for own in (FOUR_SIX, *(fault.recipe for fault in FAULTS.values()))]
    features = tuple(dataclasses.replace(of_slot, apart=True) for of_slot in slots.features_of(known))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certified_products, "redraw", _planted_redraw)
        patch.setattr(rounding, "random_bits", partial(_planted_bits, rounding.random_bits))
        yield Stack(features, jax.jit(partial(stack_of, features)))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_located(stack, name):
    fault, rng = FAULTS[name], np.random.default_rng([SEED, list(FAULTS).index(name)])
    q, seed = int(rng.integers(N_LAYERS)), int(rng.integers(2**31))
    product = int(rng.choice([DGRAD, WGRAD])) if fault.product is None else fault.product
    which = [2 * product, 2 * product + 1]
    if not fault.both:
        which = [int(rng.choice(which))]
    of_layers = stack.slots(fault.recipe)
    # What the recipe itself is biased in, to nearest, is no fault of this layer.
    without = stack.flagged(of_layers, fault.reference, seed) if fault.reference == FLOAT32 else set()
    for leaf, value in fault.leaves.items():
        getattr(of_layers, leaf)[q, which] = value
    found = stack.flagged(of_layers, fault.reference, seed + 1) - without
    assert found == {(q, product)}, f"ALTGRAD_JAX_SEED={SEED}: planted in layer {q}, {PRODUCTS[product]}, slots {which}"


def test_an_unbiased_recipe_is_silent_for_ten_seeds(stack):
    for seed in range(10):
        assert stack.flagged(stack.slots(UNBIASED), STRAIGHT, 100 + SEED + seed) == set(), f"seed {seed}"


# --------------------------------------------------------------------------------------------- an exhausted format


def test_certificates_in_a_row_change_the_recipe():
    config = tiny(recipe=("mxfp8", "rowwise@bad9", "bf16@exhausted2"), certify_draws=2, n_embd=32, block_size=32)
    options = recipe.options_of(config)
    table, state, phases = recipe.table_of(options), recipe.init_state(options), []
    state = state._replace(begun=jnp.int32(1))
    for exhausted in (True, False, True, True, True):
        state = recipe.after_certificate(table, state, exhausted)
        phases.append(int(recipe.phase_at(table, state)))
    assert phases == [1, 1, 1, 2, 2]
    # An update between them changes neither.
    after = recipe.InUse(options, (), state, table, 0, 5).after(None, jnp.bool_(True), False)
    assert (int(after.begun), int(after.exhausted_streak)) == (2, int(state.exhausted_streak))


def test_the_alert_begins_below_the_root_of_three_and_is_armed_again():
    rule = FormatExhausted()
    found = [rule.begins(k, {"grad_signal_to_error": value}) for k, value in enumerate((2, 1.7, 1.6, 1.74, 1.0))]
    assert [bool(alerts) for alerts in found] == [False, True, False, False, True]
    assert found[1] == [{"kind": "format_exhausted", "layer": None, "value": 1.7}]
    assert rule.begins(9, {"val_loss": 3.0}) == []


# ------------------------------------------------------------------------------------------------ any loss function


def test_any_loss_function_has_a_certificate():
    """A loop over two layers, one of them kept: as that layer alone; and nothing is drawn twice."""
    params = {"w": 0.1 * normal(2, 64, 64, seed=6)}
    batch = normal(64, 64, seed=7)

    def loss(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.mean(jnp.square(jax.lax.scan(layer, x, params["w"])[0]))

    own = instrument(loss, params, batch, recipe="nvfp4", keep=["w/1"])
    found = own.certify(params, batch, key=jax.random.key(SEED), draws=32)
    assert list(found) == ["w/0", "w/1"]
    assert found["w/1"].variance[FLOAT32].max() < 1e-8 and not found["w/1"].bias[FLOAT32].max() > 1e-5
    x, w = batch.astype(np.float64), params["w"].astype(np.float64)
    y = np.tanh(x @ w[0])
    z = np.tanh(y @ w[1])
    g = (2 * z / z.size * (1 - z**2)) @ w[1].T * (1 - y**2)
    assert g.shape == (64, 64) and found["w/0"].biased[FLOAT32, WGRAD]
    alone = measured("nvfp4", 32, *(v.astype(np.float32) for v in (x, w[0], g)))[0]
    np.testing.assert_allclose(found["w/0"].variance[FLOAT32], alone.variance[FLOAT32], rtol=0.3, atol=1e-6)
    np.testing.assert_allclose(found["w/0"].bias[FLOAT32], alone.bias[FLOAT32], rtol=0.2)
    with pytest.raises(UserError, match="only a recipe has a certificate"):
        instrument(loss, params, batch, recipe="E4M3").certify(params, batch, key=jax.random.key(0))


# -------------------------------------------------------------------------------------------------------- oscillation


def test_weights_that_tremble_across_an_edge_oscillate():
    """Against the definition in NumPy, with a grid of whole numbers: three weights that tremble, drift and rest."""
    path = np.array([[0.49 + 0.02 * (k % 2), 0.3 * k, 0.2] for k in range(41)], np.float32)
    of = oscillation.begin(path[0], np.round(path[0]))
    for w in path[1:]:
        of = oscillation.watch(of, w, jnp.round)
    moved, rounded = (np.abs(np.diff(values, axis=0)).sum(0) for values in (path, np.round(path)))
    assert rounded[0] / moved[0] > 16 and rounded[1] / moved[1] == pytest.approx(1, abs=0.01)
    found = oscillation.named(of)
    assert found["weight_oscillation"] == pytest.approx(rounded.sum() / moved.sum(), rel=1e-5)
    assert found["weight_oscillating"] == pytest.approx(1 / 3)
    flips = (np.diff(np.round(path), axis=0) != 0).mean()
    assert found["weight_flips"] == pytest.approx(flips, rel=1e-5)
    near = np.abs(path[1:] - np.round(path[1:])) > 0.4
    assert found["weight_near_edge"] == pytest.approx(near.mean(), abs=0.01)


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_certificates_of_a_run_are_in_its_record_and_may_end_its_recipe(tmp_path):
    """At every diagnosis; here all gradients are less than their error, so that the second phase begins with the
    second certificate. Another process sees the same numbers in the checkpoint."""
    config = tiny(n_embd=32, block_size=32, max_steps=4, warmup_steps=1, eval_interval=4, checkpoint_interval=2,
                  diagnostic_interval=2, metrics="none", recipe=("nvfp4_redrawn:wgrad~head", "bf16@exhausted2"),
                  certify_draws=4)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bias, "EXHAUSTED", 1e9)
        assert train(config, data_dir=make_data(tmp_path), workdir=tmp_path / "run") == 0
    rows = {row["step"]: row for row in rows_of(tmp_path / "run")}
    assert [rows[k]["recipe_phase"] for k in range(1, 5)] == [0, 0, 1, 1]
    found = {k: row["grad_bias/block_0/mlp_up/wgrad"] for k, row in rows.items() if "grad_total_bias" in row}
    assert sorted(found) == [0, 2, 4] and abs(found[4]) < 1e-5 < rows[2]["grad_variance/all/wgrad"]
    assert rows[2]["grad_variance/all/dgrad"] < 1e-8 and "grad_persistent_bias/all/dgrad" not in rows[2]
    assert rows[2]["grad_noise_ratio"] > 100 * rows[4]["grad_noise_ratio"]
    again = certify_checkpoint(tmp_path / "run", 4, checkpoint=2)
    # bfloat16 holds from there on.
    assert again.metrics["grad_total_variance"] < 1e-8
    other = certify_checkpoint(tmp_path / "run", 4, checkpoint=2, recipe_item="nvfp4_redrawn:wgrad~head")
    assert other.biases["block_0/mlp_up"].variance[FLOAT32, WGRAD] > 0.01
    assert len(table_lines(other)) == 2 + 3 * 5 and "BIASED" not in table_lines(again)[-1]
    assert as_json(other)["layers"]["all"]["dgrad"]["float32"]["persistent"] is None


def test_what_certificates_need_is_said():
    few = dict(certify_draws=16, recipe=("tetrajet_v2",), eval_windows=2, eval_batch_size=2)
    (sentence,) = problems(values_of(tiny(**few, block_size=8)))
    assert sentence.startswith("certify_draws=16 looks at 4 windows of 8 tokens") and "eval_batch_size=4" in sentence
    (sentence,) = problems(values_of(tiny(recipe=("mxfp8", "bf16@exhausted3"), block_size=32, n_embd=32)))
    assert sentence.endswith("waits for certificates, and certify_draws=0 makes none: set certify_draws=16")
