"""The three products of a linear layer, held to a float64 NumPy emulation of the rounding rule."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from altgrad_jax.numerics.products import quant_dot

M, K, N = 24, 40, 16


def rounded(x, compute_dtype):
    """float64 array of x rounded (nearest, ties to even) to the compute dtype."""
    if compute_dtype == "bfloat16":
        x = np.asarray(x).astype(ml_dtypes.bfloat16)
    return np.asarray(x).astype(np.float64)


def reference(x_MK, w_KN, g_MN, compute_dtype):
    """y, dx, dw in float64: exact products of the rounded operands, straight through the rounding."""
    x, w, g = (rounded(a, compute_dtype) for a in (x_MK, w_KN, g_MN))
    return x @ w, g @ w.T, x.T @ g


def operands(seed=0, rows=M):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((rows, K), np.float32),
        rng.standard_normal((K, N), np.float32),
        rng.standard_normal((rows, N), np.float32),
    )


def products(x, w_KN, g, w_is_NK, compute_dtype):
    """(y, dx, dw [K, N]) from quant_dot and jax.vjp, with w laid out as w_is_NK says."""
    w = jnp.asarray(w_KN.T if w_is_NK else w_KN)
    y, vjp = jax.vjp(lambda x, w: quant_dot(x, w, w_is_NK=w_is_NK, compute_dtype=compute_dtype), jnp.asarray(x), w)
    dx, dw = vjp(jnp.asarray(g))
    return y, dx, dw.T if w_is_NK else dw


def assert_accumulated(got, want, terms):
    """float32 result of a sum of `terms` products of order 1: error a few float32 ulps of the sum's size."""
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=2.0**-23 * terms)


@pytest.mark.parametrize("w_is_NK", [False, True])
@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_three_products_are_those_of_the_rounded_operands(w_is_NK, compute_dtype):
    x, w, g = operands()
    for got, want, terms in zip(
        products(x, w, g, w_is_NK, compute_dtype), reference(x, w, g, compute_dtype), (K, N, M)
    ):
        assert_accumulated(got, want, terms)


def test_the_bound_tells_rounded_operands_from_unrounded_ones():
    x, w, g = operands()
    exact = reference(x, w, g, "float32")
    for got, want, terms in zip(products(x, w, g, False, "bfloat16"), exact, (K, N, M)):
        assert np.abs(np.asarray(got) - want).max() > 100 * 2.0**-23 * terms


def test_bfloat16_results_and_gradients_are_not_rounded_to_bfloat16():
    x, w, g = operands()
    for got in products(x, w, g, False, "bfloat16"):
        on_the_grid = np.asarray(got) == rounded(got, "bfloat16")
        assert on_the_grid.mean() < 0.01


@pytest.mark.parametrize("leading", [(), (M,), (2, 12), (2, 3, 4)])
def test_leading_axes_are_rows(leading):
    x, w, g = operands(rows=int(np.prod(leading, dtype=int)))
    y, dx, dw = products(x.reshape(*leading, K), w, g.reshape(*leading, N), False, "bfloat16")
    assert (y.shape, dx.shape, dw.shape) == ((*leading, N), (*leading, K), (K, N))
    want_y, want_dx, want_dw = reference(x, w, g, "bfloat16")
    assert_accumulated(y, want_y.reshape(y.shape), K)
    assert_accumulated(dx, want_dx.reshape(dx.shape), N)
    assert_accumulated(dw, want_dw, M)


def test_grad_of_a_loss_is_the_straight_through_gradient():
    x, w, target = operands(1)

    def loss(x, w):
        return 0.5 * jnp.sum(jnp.square(quant_dot(x, w) - target))

    y, _, _ = reference(x, w, target, "bfloat16")
    # The output gradient is float32 before it becomes an operand, so the residual is taken from our own
    # forward.
    residual = np.asarray(quant_dot(jnp.asarray(x), jnp.asarray(w))) - target
    assert_accumulated(residual, y - target, K)
    _, want_dx, want_dw = reference(x, w, residual, "bfloat16")
    dx, dw = jax.grad(loss, argnums=(0, 1))(x, w)
    # residuals are of order sqrt(K), so the products are that much larger
    assert_accumulated(dx, want_dx, 8 * N)
    assert_accumulated(dw, want_dw, 8 * M)


def test_operands_round_ties_to_even():
    # 1 + 2^-8 and 1 + 3 * 2^-8 lie halfway between neighbours of bfloat16.
    x = jnp.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8]])
    np.testing.assert_array_equal(np.asarray(quant_dot(x, jnp.eye(2)))[0], [1.0, 1 + 2.0**-6])


@pytest.mark.parametrize("w_is_NK", [False, True])
def test_jit_and_vmap_give_the_same_products(w_is_NK):
    x, w, g = operands()
    x3, g3 = np.stack([x, 2 * x, -x]), np.stack([g, g, 3 * g])
    w3 = np.stack([w, w + 1, w / 3])

    def three(x, w_KN, g):
        w = w_KN.T if w_is_NK else w_KN
        y, vjp = jax.vjp(lambda x, w: quant_dot(x, w, w_is_NK=w_is_NK), x, w)
        dx, dw = vjp(g)
        return y, dx, dw.T if w_is_NK else dw

    batched = jax.jit(jax.vmap(three))(x3, w3, g3)
    for i in range(3):
        wanted = reference(x3[i], w3[i], g3[i], "bfloat16")
        for got, want, terms in zip(batched, wanted, (K, N, M)):
            assert_accumulated(got[i], want, 8 * terms)
