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

from altgrad_jax.numerics import bias, certified_products, oscillation, rounding, slots
from altgrad_jax.numerics.bias import bias_of, unpacked, whole_of
from altgrad_jax.numerics.certified_products import Certified, Draws, certified_dot
from altgrad_jax.numerics.recipes import PRODUCTS, RECIPES, Recipe, get_recipe

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
    dx, dw, vector = _measured(x, w, g, own, draws=Draws(n, 2, slots.features_of([own])))
    return bias_of(unpacked(vector, n), n), dx, dw


@partial(jax.jit, static_argnames="draws")
def _measured(x, w, g, own, draws):
    given, probe = Certified(own, jnp.uint32([1, 2]), jnp.int32(0)), jnp.zeros(bias.n_fields(draws.n))
    return jax.vjp(lambda x, w, probe: certified_dot(x, w, given, draws, probe), x, w, probe)[1](g)


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
DRAWS = 192


def _planted_redraw(slots_6, seed):
    drawn, given = slots.redraw(slots_6, seed), jnp.asarray(slots_6.given)[:, None]
    keys = jnp.where(given == REPEATS, jnp.uint32([1, 2]), drawn.seed)
    return drawn._replace(seed=jnp.where(given == TO_ZERO, _SENTINEL, keys))


def _planted_bits(random_bits, shape, seed):
    return jnp.where(jnp.all(seed == _SENTINEL), jnp.uint32(0), random_bits(shape, seed))


N_LAYERS, WIDTH = 4, 64


class Stack(NamedTuple):
    """Layers one after the other, each measured; compiled once for all slots and seeds."""

    features: tuple
    program: object

    def slots(self, recipe):
        """A recipe in every layer: leaves [layers, 6, ...]."""
        own = slots.slots_of(recipe)
        return jax.tree.map(lambda leaf: np.stack([leaf] * N_LAYERS), own)

    def flagged(self, of_layers, reference, seed):
        """{(layer, dgrad or wgrad): bias} where it is shown."""
        vectors = self.program(of_layers, np.uint32(seed))
        found = [bias_of(unpacked(vector, DRAWS), DRAWS) for vector in np.asarray(vectors)]
        cells = [(q, p) for q in range(N_LAYERS) for p in (DGRAD, WGRAD)]
        return {(q, p): found[q].bias[reference, p] for q, p in cells if found[q].biased[reference, p]}


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
    """Its features are its own (no slot has blocks of 128 across), so that no program traced with the planted functions
    is another test's."""
    known = [slots.slots_of(own) for own in (FOUR_SIX, *(fault.recipe for fault in FAULTS.values()))]
    features = tuple(
        dataclasses.replace(of_slot, across=(*of_slot.across, 128)) for of_slot in slots.features_of(known)
    )
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
    # Rounding to nearest is never quite without bias: a fault is ten times that.
    without = stack.flagged(of_layers, fault.reference, seed) if fault.reference == FLOAT32 else {}
    for leaf, value in fault.leaves.items():
        getattr(of_layers, leaf)[q, which] = value
    found = stack.flagged(of_layers, fault.reference, seed + 1)
    located = {cell for cell, size in found.items() if size > 10 * without.get(cell, 0)}
    assert located == {(q, product)}, (
        f"ALTGRAD_JAX_SEED={SEED}: planted in layer {q}, {PRODUCTS[product]}, slots {which}"
    )


def test_an_unbiased_recipe_is_silent_for_ten_seeds(stack):
    for seed in range(10):
        assert stack.flagged(stack.slots(UNBIASED), STRAIGHT, 100 + SEED + seed) == {}, f"seed {seed}"


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
