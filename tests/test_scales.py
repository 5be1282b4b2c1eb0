"""The scale of a tensor: against a search, and equal in NumPy and in JAX."""

import numpy as np
import pytest
from test_products_formats import reference_scale

from altgrad_jax.numerics import formats, products
from altgrad_jax.numerics.formats import DEFAULT_8BIT, get_format
from altgrad_jax.numerics.rounding import format_params, round_to_format
from altgrad_jax.numerics.scales import scale_for

UNUSABLE = np.float32([0, np.inf, np.nan, 1e-40])


def in_jax(amax, fmt, power_of_two=True):
    return np.asarray(products.scale_for(amax, format_params(fmt), power_of_two))


def test_scales_against_a_search():
    rng = np.random.default_rng(0)
    amax = np.concatenate([2.0 ** rng.uniform(-110, 120, 200), 2.0 ** np.arange(-100, 100, 7)]).astype(np.float32)
    for name in (*DEFAULT_8BIT, "BF16", "FP16", "E0M15"):
        fmt = get_format(name)
        largest = np.float32(min(fmt.max_finite, 2.0**16))
        edges = np.float32([np.nextafter(largest, np.float32(0)), largest, np.nextafter(largest, np.float32(np.inf))])
        a = np.concatenate([amax, edges, edges * 2.0**-30])
        np.testing.assert_array_equal(in_jax(a, fmt), [reference_scale(float(v), fmt) for v in a])


def test_scale_of_what_has_none_and_of_extremes():
    fmt = get_format("E0M7")
    np.testing.assert_array_equal(in_jax(UNUSABLE, fmt), 1.0)
    np.testing.assert_array_equal(
        in_jax(np.float32([2.0**-126, 3e38]), get_format("E7M0")), np.float32([2.0**126, 2.0**-112])
    )
    assert in_jax(np.float32(3e38), fmt) == 2.0**-126


def test_a_float32_scale_brings_the_amax_to_the_largest_number():
    amax = np.float32(2.0) ** np.random.default_rng(0).uniform(-60, 60, 1000).astype(np.float32)
    for name in ("E4M3", "E0M7", "E7M0"):
        fmt = get_format(name)
        got = np.float64(in_jax(amax, fmt, power_of_two=False))
        np.testing.assert_allclose(got * amax, min(fmt.max_finite, 2.0**16), rtol=1e-7)
        np.testing.assert_array_equal(in_jax(UNUSABLE, fmt, power_of_two=False), 1)


@pytest.mark.parametrize("name", formats.DEFAULT_8BIT)
def test_numpy_and_jax_give_one_scale(name):
    fmt = get_format(name)
    rng = np.random.default_rng(1)
    edges = np.float32([0, 1e-42, 2.0**-126, 3e38, np.inf, np.nan, fmt.max, 2.0**16, *2.0 ** np.arange(-126.0, 128)])
    with np.errstate(invalid="ignore", over="ignore"):
        neighbours = [np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))]
        amax = np.concatenate([edges, *neighbours, rng.integers(0, 2**31, 2000, dtype=np.uint32).view(np.float32)])
        in_numpy = scale_for(amax, fmt)
        np.testing.assert_array_equal(in_numpy, in_jax(amax, fmt))
    assert in_numpy.dtype == np.float32 and scale_for(float(amax[-1]), fmt) == in_numpy[-1]


def test_powers_of_two_cost_fixed_point_grids_decibels_and_floating_ones_none():
    """The figures of docs/numerics.md: Gaussian operands whose amax takes all mantissas, 2^16 elements each."""
    cost_MF = np.array([_cost_of_powers_of_two(2 ** (m / 32)) for m in range(32)])
    mean, most = (dict(zip(DEFAULT_8BIT, of(0))) for of in (cost_MF.mean, cost_MF.max))
    assert 2.5 < mean["E0M7"] < 3.5 and mean["E1M6"] == pytest.approx(mean["E0M7"], abs=0.01) and most["E0M7"] > 5.5
    assert 1.0 < mean["E2M5"] < 2.0 and most["E2M5"] < 4.0
    assert all(abs(mean[name]) < 0.1 for name in DEFAULT_8BIT[3:])


def _cost_of_powers_of_two(size):
    """Decibels of SQNR that a power-of-two scale costs, in each of DEFAULT_8BIT; float64 [formats]."""
    x = np.float32(np.random.default_rng(0).standard_normal(2**16) * size)

    def noise(fmt, power_of_two):
        s = np.float32(scale_for(np.abs(x).max(), fmt, power_of_two))
        q = np.asarray(round_to_format(x * s, format_params(fmt)), np.float64) / s
        return np.sum((q - x) ** 2)

    formats_of = map(get_format, DEFAULT_8BIT)
    return np.array([10 * np.log10(noise(fmt, True) / noise(fmt, False)) for fmt in formats_of])
