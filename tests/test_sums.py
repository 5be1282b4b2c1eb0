"""Several reductions of arrays in few passes, as a CPU and as a GPU makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.numerics import sums as module
from altgrad_jax.numerics.sums import extremes, sums

SHAPES = ((5, 300), (6, 24, 16), (3, 16, 40), (2, 4, 8, 200), (1, 1))


@pytest.fixture(params=["cpu", "default"])
def platform(request, monkeypatch):
    """The program of a CPU, and that of any other device."""
    monkeypatch.setattr(module.lax, "platform_dependent", lambda *arrays, **branches: branches[request.param](*arrays))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [0, 1])
def test_sums_are_those_of_float64(platform, shape, lead):
    rng = np.random.default_rng(0)
    values, mask = rng.standard_normal(shape).astype(np.float32), rng.random(shape) < 0.3
    found = jax.jit(lambda *terms: sums(*terms, lead=lead))(values, mask, *[values] * 4)
    axes = tuple(range(lead, len(shape)))
    assert found.dtype == jnp.float32 and found.shape == (6, *shape[:lead])
    np.testing.assert_allclose(found[0], values.sum(axes, dtype=np.float64), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(found[1], mask.sum(axes))


@pytest.mark.parametrize("shape", SHAPES)
def test_extremes_are_exact_and_keep_nan(shape):
    size = np.abs(np.random.default_rng(1).standard_normal(shape)).astype(np.float32)
    zeros, some_zero, with_nan = np.zeros_like(size), size.copy(), size.copy()
    some_zero.flat[-1], with_nan.flat[0] = 0, np.nan
    largest, smallest = jax.jit(extremes)(size, zeros, some_zero, with_nan)
    np.testing.assert_array_equal(largest, [size.max(), 0, some_zero.max(), np.nan])
    of_positive = min(some_zero[some_zero > 0], default=np.inf)
    np.testing.assert_array_equal(smallest[:3], [size.min(), np.inf, of_positive])
    others = with_nan.flat[1:]
    np.testing.assert_array_equal(smallest[3], others.min() if others.size else np.inf)


def test_counts_beyond_float32s_whole_numbers_are_exact():
    """One accumulator would stop at 2^24."""
    assert sums(jnp.ones((4097, 4096), jnp.uint8))[0] == 4097 * 4096


@pytest.mark.parametrize("n, reductions", [(5, 1), (7, 7)])
def test_a_gpu_has_one_reduction_for_five_terms_and_one_for_each_of_more(n, reductions):
    """Reductions of several arrays are counted as one when XLA merges kernels, and ptxas refuses what comes of it."""
    traced = jax.jit(lambda *terms: sums(*terms)).trace(*[jnp.ones((256, 384))] * n)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.reduce(") == reductions + 1
    assert traced.lower(lowering_platforms=("cpu",)).as_text().count("stablehlo.reduce(") == 1 + 1
