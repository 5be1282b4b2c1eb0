"""`quantize`: blocks against a NumPy loop over the float64 oracle, rounding, the gradient, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax import quantize
from altgrad_jax.errors import UserError
from altgrad_jax.numerics.formats import get_format, round_reference

X = np.random.default_rng(0).normal(0, 1, (4, 64)).astype(np.float32) * np.logspace(-3, 3, 64, dtype=np.float32)


def by_loop(x, name, rows, columns):
    fmt, out = get_format(name), np.empty_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = x[i : i + rows, j : j + columns].astype(np.float64)
            scale = 2.0 ** np.floor(np.log2(fmt.max_finite / np.abs(block).max()))
            out[i : i + rows, j : j + columns] = round_reference(fmt, block * scale) / scale
    return out


@pytest.mark.parametrize("block", [(1, 32), (2, 16), (4, 64)])
@pytest.mark.parametrize("name", ["E4M3", "E2M1"])
def test_equals_a_loop_over_blocks(name, block):
    np.testing.assert_array_equal(quantize(X, name, block=block), by_loop(X, name, *block))


def test_without_blocks_one_scale_holds_and_a_vector_is_a_row():
    np.testing.assert_array_equal(quantize(X, "E4M3"), by_loop(X, "E4M3", 4, 64))
    np.testing.assert_array_equal(quantize(X[0], "E4M3", block=(1, 32)), by_loop(X[:1], "E4M3", 1, 32)[0])
    assert quantize(X.astype(jnp.bfloat16), "E4M3").dtype == jnp.bfloat16


def test_stochastic_rounding_is_one_of_the_neighbours_and_right_on_average():
    x = np.full((1, 40_000), 1.05, np.float32)  # between 1 and 1.125, 0.4 of the way
    q = np.asarray(quantize(x, "E4M3", rounding="stochastic", key=jax.random.key(0)))
    assert set(np.unique(q)) == {1.0, 1.125}
    np.testing.assert_allclose(q.mean(), 1.05, atol=4 * 0.0613 / 200)  # four standard errors


def test_gradient_passes_straight_through():
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(quantize(x, "E2M1", block=(1, 32)) * X))(X), X)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(format="E4M3", block=(1, 48)), "do not divide"),
        (dict(format="E4M3", rounding="up"), "no rounding 'up'"),
        (dict(format="E4M3", rounding="stochastic"), "key go together"),
        (dict(format="E4M3", key=0), "key go together"),
        (dict(format="E9M9"), "E9M9"),
    ],
)
def test_refuses_in_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        quantize(X, **arguments)
