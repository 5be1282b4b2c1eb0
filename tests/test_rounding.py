"""Rounding in JAX against the float64 oracle, ml_dtypes and gfloat; its properties; the canary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding_oracles

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import formats, rounding
from altgrad_jax.numerics.formats import DEFAULT_8BIT, FORMATS, get_format
from altgrad_jax.numerics.rounding import (
    Grid,
    format_params,
    from_codes,
    quantize_ste,
    round_to_format,
    stochastic_seed,
    to_codes,
    to_grid,
    ulp,
)

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
nearest = jax.jit(round_to_format)
stochastic = jax.jit(lambda x, params, seed: round_to_format(x, params, seed=seed))


def inputs_of(fmt):
    return np.concatenate(list(formats.critical_inputs(fmt).values()))


def neighbours(fmt, x):
    """The numbers of the format below and above |x|, saturating, with the sign of x."""
    values = formats.decode(fmt, np.arange(fmt.max_code + 1))
    below = np.searchsorted(values, np.abs(x.astype(np.float64)), side="right") - 1
    above = np.where(values[below] == np.abs(x), below, np.minimum(below + 1, fmt.max_code))
    return np.copysign(values[below], x), np.copysign(values[above], x)


@every_format
def test_no_mismatch_with_any_oracle(fmt):
    x = inputs_of(fmt)
    for saturate in rounding_oracles.switches(fmt):
        own = nearest(x, format_params(fmt, saturate=saturate))
        for name, oracle in rounding_oracles.oracles_of(fmt).items():
            assert rounding_oracles.mismatches(own, oracle(fmt, x, saturate)) == 0, (name, saturate)


@every_format
def test_idempotent_monotone_odd(fmt):
    params = format_params(fmt)
    x = np.sort(inputs_of(fmt)[~np.isnan(inputs_of(fmt))])
    q = np.asarray(nearest(x, params))
    assert rounding_oracles.mismatches(nearest(q, params), q) == 0
    assert np.all(np.diff(q) >= 0)
    np.testing.assert_array_equal(nearest(-x, params), -q)


def test_minus_zero_subnormals_infinities_and_nan():
    x = np.float32([-0.0, -1e-30, 1e-40, -1e-40, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(
        np.asarray(nearest(x, format_params(get_format("E4M3")))).view(np.uint32)[:6],
        np.float32([-0.0, -0.0, 0, -0.0, 448, -448]).view(np.uint32),
    )
    assert np.isnan(nearest(x, format_params(get_format("E2M5")))[6])
    bf16_subnormal = np.uint32([0x00010000, 0x00018000, 0x00008000, 0x80038000]).view(np.float32)
    q = np.asarray(nearest(bf16_subnormal, format_params(get_format("BF16")))).view(np.uint32)
    assert q.tolist() == [0x00010000, 0x00020000, 0, 0x80040000]
    assert not np.signbit(nearest(x, format_params(get_format("P3109_P4"))))[:2].any()


def test_one_program_serves_every_format_and_switch():
    f = jax.jit(lambda x, params: round_to_format(x, params))
    g = jax.jit(lambda x, params, seed: round_to_format(x, params, seed=seed))
    x = np.float32([1.3, -700])
    for fmt in FORMATS.values():
        for saturate in rounding_oracles.switches(fmt):
            f(x, format_params(fmt, saturate=saturate))
            g(x, format_params(fmt, saturate=saturate), stochastic_seed(1, 2, 3))
    assert f._cache_size() == g._cache_size() == 1


def test_formats_side_by_side_under_vmap():
    x = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    chosen = [format_params(fmt) for fmt in FORMATS.values()]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *chosen)
    q_FMN = jax.jit(jax.vmap(round_to_format, (None, 0)))(x, stacked)
    for q_MN, params in zip(q_FMN, chosen):
        np.testing.assert_array_equal(q_MN, nearest(x, params))


def test_a_format_that_is_a_constant_of_the_program_rounds_alike():
    for name in DEFAULT_8BIT:
        fmt = get_format(name)
        x = inputs_of(fmt)
        constant = jax.jit(lambda x: round_to_format(x, format_params(fmt)))
        assert rounding_oracles.mismatches(constant(x), nearest(x, format_params(fmt))) == 0


def test_narrow_dtypes_are_taken_as_they_are_and_others_refused():
    params = format_params(get_format("E3M4"))
    for dtype in (jnp.bfloat16, jnp.float16):
        q = round_to_format(jnp.asarray([1.29, 3.3], dtype), params)
        assert q.dtype == jnp.float32 and q.tolist() == [1.3125, 3.25]
    with pytest.raises(TypeError, match="not int32"):
        round_to_format(jnp.arange(3), params)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_e0m7_and_e1m6_are_one_grid_when_scaled_by_amax(power_of_two):
    x = np.random.default_rng(1).normal(size=20_000).astype(np.float32)

    def scaled(name):
        fmt = get_format(name)
        scale = np.float32(fmt.max) / np.max(np.abs(x))
        scale = 2 ** np.floor(np.log2(scale)) if power_of_two else scale
        return np.asarray(nearest(x * scale, format_params(fmt))) / scale

    assert rounding_oracles.mismatches(scaled("E0M7"), scaled("E1M6")) == 0


@every_format
def test_stochastic_rounding_takes_a_neighbour_and_leaves_the_grid_alone(fmt):
    x = inputs_of(fmt)
    x = x[np.isfinite(x)]
    q = np.asarray(stochastic(x, format_params(fmt), stochastic_seed(0, 1, 2)))
    below, above = neighbours(fmt, x)
    assert np.all((q == below) | (q == above))
    grid = formats.decode(fmt, np.arange(fmt.max_code + 1)).astype(np.float32)
    np.testing.assert_array_equal(stochastic(-grid, format_params(fmt), stochastic_seed(0, 1, 2)), -grid)


@pytest.mark.parametrize("name", [*DEFAULT_8BIT, "P3109_P1", "P3109_P8", "BF16", "FP16", "E0M15"])
def test_stochastic_rounding_is_unbiased(name):
    """4096 points, 512 draws each: the standardised errors have mean 0 and variance 1, and no outlier."""
    fmt, n_points, n_draws = get_format(name), 4096, 512
    rng = np.random.default_rng(5)
    values = formats.decode(fmt, np.arange(fmt.max_code + 1))
    code = rng.integers(0, fmt.max_code, n_points)
    fraction = rng.integers(26, 231, n_points) / 256  # 0.1 to 0.9
    x = (values[code] + fraction * (values[code + 1] - values[code])) * rng.choice([-1, 1], n_points)
    x = x.astype(np.float32)
    below, above = neighbours(fmt, x)
    seeds = jax.vmap(lambda step: stochastic_seed(0, step, 0))(np.arange(n_draws))
    q_DN = np.asarray(jax.jit(jax.vmap(stochastic, (None, None, 0)))(x, format_params(fmt), seeds))
    up_DN = q_DN == above
    p = (x - below) / (above - below)
    z = (up_DN.mean(0) - p) / np.sqrt(p * (1 - p) / n_draws)
    assert abs(z.mean()) < 4 / np.sqrt(n_points) and abs(z.var() - 1) < 5 * np.sqrt(2 / n_points)
    assert np.max(np.abs(z)) < 5
    # No draw goes with its neighbour in the array, or with the same element of the next step.
    centred = (up_DN - p) / np.sqrt(p * (1 - p))
    limit = 5 / np.sqrt(up_DN.size)
    assert abs(np.mean(centred[:, 1:] * centred[:, :-1])) < limit
    assert abs(np.mean(centred[1:] * centred[:-1])) < limit


def test_random_bits_follow_the_seed_and_spread_evenly():
    shape = (64, 512)

    def bits(*seed):
        return np.asarray(rounding.random_bits(shape, stochastic_seed(*seed)))

    base = bits(1, 2, 3)
    np.testing.assert_array_equal(base, bits(1, 2, 3))
    np.testing.assert_array_equal(base.ravel(), rounding.random_bits((64 * 512,), stochastic_seed(1, 2, 3)))
    for other in (bits(2, 2, 3), bits(1, 3, 3), bits(1, 2, 4), bits(2, 1, 3)):
        assert np.mean(other == base) < 1e-3
    neighbouring = [np.asarray(rounding.random_bits((1000,), np.uint32(seed))) for seed in ([5, 1], [6, 2])]
    assert not np.any(neighbouring[0][1:] == neighbouring[1][:-1])  # no shifted copy, which would correlate steps
    ones = np.mean((base.ravel()[:, None] >> np.arange(32, dtype=np.uint32)) & 1, axis=0)
    assert np.max(np.abs(ones - 0.5)) < 5 * 0.5 / np.sqrt(base.size)


def test_tiny_numbers_are_not_pulled_up_by_stochastic_rounding():
    x = np.full(100_000, 1e-12, np.float32)
    assert not np.any(stochastic(x, format_params(get_format("E4M3")), stochastic_seed(0, 0, 0)))


def test_straight_through_value_is_on_the_grid_and_the_gradient_of_clipped_values_is_as_stated():
    params = format_params(get_format("E4M3"))
    x = jnp.float32([0.3, -1000.0, 448.0, 460.0])
    g = jnp.float32([1.0, 2.0, 3.0, 4.0])

    for clipped_gradient, expected in {"pass": [1, 2, 3, 4], "zero": [1, 0, 3, 0]}.items():
        f = jax.jit(lambda x, p: quantize_ste(x, p, clipped_gradient=clipped_gradient))
        q, vjp = jax.vjp(lambda x: f(x, params), x)
        np.testing.assert_array_equal(q, nearest(x, params))
        np.testing.assert_array_equal(vjp(g)[0], expected)
    seed = stochastic_seed(0, 0, 0)
    q, vjp = jax.vjp(lambda x: quantize_ste(x, params, seed=seed), x)
    np.testing.assert_array_equal(q, stochastic(x, params, seed))
    np.testing.assert_array_equal(vjp(g)[0], g)
    with pytest.raises(UserError, match="give 'pass' or 'zero'"):
        quantize_ste(x, params, clipped_gradient="none")


@pytest.mark.parametrize("name", [*DEFAULT_8BIT, "BF16", "FP16"])
def test_the_canary_passes_where_rounding_works(name):
    report = rounding.canary(get_format(name))
    assert report["image_sha256"] == formats.certificate(get_format(name))["image_sha256"]
    assert report["n_changed"] > 1000


@pytest.mark.parametrize("name", ["E4M3", "BF16", "FP16"])
def test_the_canary_catches_rounding_that_does_not_happen(name):
    with pytest.raises(UserError, match=f"rounding to {name} is wrong on .*: of .* 0 changed"):
        rounding.canary(get_format(name), round_fn=lambda x, params: x)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda x, q: jnp.where(x == 17.0, 18.0, q), "2 results are wrong, and the image differs"),
        (lambda x, q: jnp.where((x > 17.0) & (x < 17.001), 16.0, q), "1 results are wrong, and the image equals"),
        (lambda x, q: jnp.where(q == 0, 0.0, q), "0 results are wrong, and the image differs"),  # -0 became 0
    ],
)
def test_the_canary_catches_a_single_wrong_result(wrong, message):
    with pytest.raises(UserError, match=message):
        rounding.canary(get_format("E4M3"), round_fn=lambda x, params: wrong(x, round_to_format(x, params)))


def test_saturation_cannot_be_switched_off_where_every_code_is_a_number():
    with pytest.raises(UserError, match="E7M0 cannot be used with saturate=False"):
        format_params(get_format("E7M0"), saturate=False)


@pytest.mark.parametrize("name", [*formats.DEFAULT_8BIT, "E4M3_IEEE", "P3109_P4", "BF16", "FP16", "E0M15"])
def test_codes_are_the_float64_oracle_s(name):
    """Every finite code there and back, and the ULP as the distance to the next number."""
    fmt = formats.get_format(name)
    params = format_params(fmt)
    magnitude = np.arange(fmt.max_code + 1)
    value = formats.decode(fmt, magnitude).astype(np.float32)
    tiny = np.abs(value) < 2.0**-126  # BF16's subnormals: float32's own, which the CPU flushes in arithmetic
    for sign in (1, -1):
        codes = np.asarray(jax.jit(to_codes)(sign * value, params))
        np.testing.assert_array_equal(codes, sign * magnitude)
        back = np.asarray(jax.jit(from_codes)(codes, params))
        np.testing.assert_array_equal(back[~tiny], sign * value[~tiny])
    assert float(from_codes(jnp.int32(2**22), params)) == fmt.max_finite
    gaps = np.diff(value.astype(np.float64))
    for scale in (1.0, 4.0):
        ulps = np.asarray(jax.jit(ulp)(value / np.float32(scale), Grid(params, scale)))[:-1]
        usable = ~tiny[:-1] & (gaps / scale >= 2.0**-126) & (value[:-1] / scale >= 2.0**-126)
        np.testing.assert_array_equal(ulps[usable], (gaps / scale)[usable].astype(np.float32))


def test_a_grid_is_the_format_scaled():
    params = format_params(formats.get_format("E4M3"))
    x = np.float32([0.3, -7.1, 1e-9, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(to_grid(x[:3], Grid(params, 8.0)), round_to_format(x[:3] * 8, params) / 8)
    np.testing.assert_array_equal(to_grid(x[3:], Grid(params, 8.0)), x[3:])


def test_formats_with_one_grid_round_stochastically_alike():
    """E1M6's numbers are E0M7's times 4, though most of E0M7's are subnormal in the formula and E1M6's are not."""
    x = np.random.default_rng(5).normal(0, 0.3, 200_000).astype(np.float32)
    x[:1000] *= 2.0 ** np.random.default_rng(6).integers(-20, 0, 1000).astype(np.float32)
    seed = stochastic_seed(1, 2, 3)
    a, b = (
        stochastic(x * scale, format_params(get_format(name)), seed) / scale
        for name, scale in (("E0M7", 1), ("E1M6", 4))
    )
    np.testing.assert_array_equal(a, b)
