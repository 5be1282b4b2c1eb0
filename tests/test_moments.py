"""Adam's moments as they are kept: the grids, against NumPy and ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import moments
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.numerics.rules import MOMENTS

KEPT = MOMENTS[1:]
BLOCK = {"bfloat16": 1, "E4M3:128": 128, "E4M3:256": 256, "dynamic8": 256}
TINIEST = np.float32(2.0**-126)
keep = jax.jit(moments.keep, static_argnames=("form", "signed"))


# The dynamic map.


def published_map(signed):
    """Every byte read bit by bit: a sign where there is one, zeros that are decades, a one, and a linear fraction."""
    numbers = []
    for byte in range(256):
        bits = f"{byte:08b}"
        sign, bits = (-1 if signed and bits[0] == "1" else 1), bits[1:] if signed else bits
        decades, fraction = bits.index("1") if "1" in bits else 7, bits.partition("1")[2]
        if decades == 7:  # no fraction is left: the two codes are 0 and 1
            numbers.append(1.0 if (sign == -1 if signed else "1" in bits) else 0.0)
            continue
        middle = (int(fraction or "0", 2) + 0.5) / 2 ** len(fraction)
        numbers.append(sign * (0.1 + 0.9 * middle) / 10**decades)
    return np.sort(numbers)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_the_published_one(signed):
    numbers = moments.dynamic_map(signed)
    assert numbers.dtype == np.float32 and numbers.shape == (256,) and (np.diff(numbers) > 0).all()
    np.testing.assert_allclose(numbers, published_map(signed), rtol=2e-7)
    assert {0.0, 1.0} <= set(numbers.tolist())
    if signed:
        assert numbers[0] == -numbers[-2] == -np.float32(0.99296875) and -1.0 not in numbers
        np.testing.assert_allclose(numbers[numbers > 0][0], 5.5e-7, rtol=1e-6)
        assert (numbers > 0).sum() == 128 and (numbers < 0).sum() == 127
    else:
        assert numbers[0] == 0 and numbers[-2] == np.float32(0.996484375)
        np.testing.assert_allclose(numbers[1], 3.25e-7, rtol=1e-6)


# Rounding, against a loop over blocks.


def kept_by_numpy(x, form, signed):
    """`keep` to nearest, block by block: by ml_dtypes, or the entry of the map at the least distance in float64."""
    out = np.array(x)
    for row, kept in zip(x.reshape(-1, x.shape[-1]), out.reshape(-1, x.shape[-1]), strict=True):
        for first in range(0, len(row), BLOCK[form]):
            part = slice(first, first + BLOCK[form])
            kept[part] = block_by_numpy(row[part], form, signed)
    return out


def block_by_numpy(v, form, signed):
    usable = np.isfinite(v) & (signed | (v >= 0))
    amax = np.abs(v[usable]).max(initial=0)
    if form == "bfloat16":
        kept = v.astype(ml_dtypes.bfloat16).astype(np.float32)
    elif form == "dynamic8":
        scale, numbers = max(amax, TINIEST), moments.dynamic_map(signed).astype(np.float64)
        with np.errstate(invalid="ignore"):
            distances = np.abs((v / scale).astype(np.float64)[:, None] - numbers)
        kept = numbers[np.argmin(distances, axis=1)].astype(np.float32) * scale
    else:
        scale = max(amax * np.float32(1 / 448), TINIEST)
        with np.errstate(invalid="ignore"):
            codes = np.clip(v / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        kept = codes.astype(np.float32) * scale
    return np.where(usable, kept, v)


def sample(shape, signed, seed=0):
    """Magnitudes over fourteen decades, so that every form loses some to 0."""
    rng = np.random.default_rng(seed)
    x = np.float32(rng.choice([-1, 1], shape) * 10 ** rng.uniform(-16, -2, shape))
    x.reshape(-1)[::17] = 0
    return x if signed else np.abs(x)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", KEPT)
@pytest.mark.parametrize("shape", [(7, 256), (3, 5, 300), (40,), (513,)])
def test_to_nearest_is_numpys_to_the_bit(form, signed, shape):
    x = sample(shape, signed)
    np.testing.assert_array_equal(keep(x, form=form, signed=signed), kept_by_numpy(x, form, signed))


@pytest.mark.parametrize("signed", [True, False])
def test_a_tie_of_the_dynamic_map_goes_to_the_smaller_entry_and_a_neighbour_to_its_own(signed):
    numbers = moments.dynamic_map(signed).astype(np.float64)
    middle = (numbers[:-1] + numbers[1:]) / 2
    near = middle.astype(np.float32)
    x = np.concatenate([near, np.nextafter(near, np.float32(2)), np.nextafter(near, np.float32(-2)), numbers])
    x = np.float32(x)
    expected = numbers[np.argmin(np.abs(x.astype(np.float64)[:, None] - numbers), axis=1)]
    got = jax.jit(moments.to_dynamic_map, static_argnums=1)(x, signed)
    np.testing.assert_array_equal(got, expected.astype(np.float32))


def test_float32_is_the_array_itself_and_another_name_is_refused():
    x = jnp.arange(3.0)
    assert moments.keep(x, "float32", signed=True) is x
    with pytest.raises(UserError, match="moments='E4M3:64' cannot be used: give one of float32, bfloat16, E4M3:128"):
        moments.keep(x, "E4M3:64", signed=True)


@pytest.mark.parametrize("form", KEPT)
def test_what_cannot_be_used_stays_and_harms_no_neighbour(form):
    x = sample((2, 40), signed=False)
    bad = x.copy()
    bad[0, 3:7] = np.nan, np.inf, -np.inf, -1e9
    got = np.asarray(keep(bad, form=form, signed=False))
    np.testing.assert_array_equal(got[0, 3:7], bad[0, 3:7])
    x[0, 3:7] = 0
    same = np.ones(x.shape, bool)
    same[0, 3:7] = False
    np.testing.assert_array_equal(got[same], np.asarray(keep(x, form=form, signed=False))[same])
    np.testing.assert_array_equal(keep(np.zeros((2, 3), np.float32), form=form, signed=True), 0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", KEPT)
def test_stochastic_rounding_takes_the_two_neighbours_and_has_the_mean_of_the_moment(form, signed):
    """Over 4000 seeds; within five standard errors, which one of these elements exceeds once in 20,000 such tests."""
    x = np.float32(np.random.default_rng(1).uniform(-1 if signed else 0, 1, 16) ** 3)
    x[5] = 1.0  # the largest: no block then has anything beyond its last number
    seeds = jax.vmap(lambda i: stochastic_seed(3, i, 9))(jnp.arange(4000))
    draws = np.asarray(jax.vmap(lambda seed: moments.keep(x, form, signed=signed, seed=seed))(seeds), np.float64)
    for i, v in enumerate(x.astype(np.float64)):
        taken = np.unique(draws[:, i])
        assert len(taken) <= 2 and taken[0] <= v * (1 + 1e-6 * np.sign(v)) and taken[-1] >= v * (1 - 1e-6 * np.sign(v))
        # A neighbour is no further than the next one to nearest: rounding it again moves nothing.
        gap = taken[-1] - taken[0]
        assert abs(draws[:, i].mean() - v) <= 5 * gap / 2 / np.sqrt(len(draws)) + 1e-7 * abs(v)
    assert (draws.std(0) > 0).sum() >= 12


def test_the_direction_is_optaxs():
    rng = np.random.default_rng(0)
    adam = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8)
    state = adam.init(jnp.zeros(5))
    for _ in range(3):
        expected, state = adam.update(jnp.float32(rng.normal(size=5)), state)
    got = moments.adam_direction(state.mu, state.nu, state.count, beta1=0.9, beta2=0.95, eps=1e-8)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
