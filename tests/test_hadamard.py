"""Random Hadamard transforms, against scipy's matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from altgrad_jax.numerics import hadamard
from altgrad_jax.numerics.rounding import stochastic_seed

matrix = jax.jit(hadamard.matrix, static_argnames="size")
rotated = jax.jit(hadamard.rotated, static_argnames="axis")


@pytest.mark.parametrize("h", [16, 32, 64, 128])
def test_the_matrix_is_scipy_s_with_signs_in_blocks(h):
    signs = hadamard.fixed_signs(h)
    block = np.diag(signs[:h]) @ scipy.linalg.hadamard(h) / np.sqrt(h)
    got = np.asarray(matrix(np.int32(h), signs, size=128))
    np.testing.assert_allclose(got, np.kron(np.eye(128 // h), block), rtol=1e-7)
    np.testing.assert_allclose(got @ got.T, np.eye(128), atol=1e-6)
    np.testing.assert_array_equal(got[:h, :h], matrix(np.int32(h), signs, size=h))


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_along_an_axis_and_back(axis):
    """The axis has 80 elements, five blocks of 16, in a program whose blocks have 64."""
    v = np.random.default_rng(0).standard_normal((80, 80)).astype(np.float32)
    signs = hadamard.fixed_signs(16)
    block = np.kron(np.eye(5), np.diag(signs[:16]) @ scipy.linalg.hadamard(16) / 4)
    transform = matrix(np.int32(16), signs, size=64)
    got = rotated(v, transform, axis=axis)
    np.testing.assert_allclose(got, v @ block if axis else block.T @ v, atol=1e-5)
    np.testing.assert_allclose(rotated(got, transform.T, axis=axis), v, atol=1e-5)


def test_it_cancels_in_a_product():
    a, b = np.random.default_rng(1).standard_normal((2, 96, 24))
    transform = matrix(np.int32(32), hadamard.fixed_signs(32), size=32)
    a_T, b_T = (rotated(v.astype(np.float32), transform, axis=0) for v in (a, b))
    np.testing.assert_allclose(a_T.T @ b_T, a.T @ b, atol=2e-5)


def test_fixed_signs_repeat_and_those_of_16_are_transformer_engine_s():
    assert hadamard.fixed_signs(16)[:16].tolist() == [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    for h in (16, 32, 64, 128):
        signs = hadamard.fixed_signs(h)
        assert set(signs) == {-1, 1} and np.all(signs.reshape(-1, h) == signs[:h])


def test_drawn_signs_follow_the_seed_and_are_fair():
    seeds = jax.vmap(lambda step: stochastic_seed(3, step, 0))(jnp.arange(500))
    for h in (16, 128):
        drawn = np.asarray(jax.jit(jax.vmap(hadamard.drawn_signs, (0, None)))(seeds, np.int32(h)))
        assert set(np.unique(drawn)) == {-1, 1}
        assert np.all(drawn.reshape(500, -1, h) == drawn[:, None, :h])
        assert np.abs(drawn.mean(0)).max() < 5 / np.sqrt(500) and abs(drawn[:, :h].mean()) < 5 / np.sqrt(500 * h)
        pairs = drawn[:, :h].T @ drawn[:, :h] / 500
        assert np.abs(pairs - np.eye(h)).max() < 5.5 / np.sqrt(500)
    assert np.all(
        hadamard.drawn_signs(seeds[0], np.int32(16))[:16] == hadamard.drawn_signs(seeds[0], np.int32(64))[:16]
    )
