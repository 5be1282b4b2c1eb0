"""The loss through the tied head: values and gradients in tiles against the plain one and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_jax.numerics.cross_entropy import cross_entropy, padded, tied_cross_entropy, tiles
from altgrad_jax.numerics.products import quant_dot, weight_gradient

B, L, D = 3, 32, 24


def batch(vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(B, L, D)).astype(np.float32),
        rng.normal(size=(vocab_size, D)).astype(np.float32),
        rng.integers(0, vocab_size, (B, L)).astype(np.int32),
    )


def in_tiles(n, vocab_size, compute_dtype):
    tile_bytes = B * (L // n) * padded(vocab_size) * 4
    assert tiles(B, L, vocab_size, tile_bytes) == n

    def loss(x_BLD, table_VD, targets_BL):
        return tied_cross_entropy(x_BLD, table_VD, targets_BL, compute_dtype=compute_dtype, tile_bytes=tile_bytes)

    return loss


def with_gradients(loss, *arguments):
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arguments)
    return [value, *gradients]


@pytest.mark.parametrize("vocab_size", [257, 384])  # with and without padding
@pytest.mark.parametrize("n", [1, 4, 32])
@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_loss_and_gradients_are_those_of_all_logits_at_once(vocab_size, n, compute_dtype):
    arguments = batch(vocab_size)

    def plain(x_BLD, table_VD, targets_BL):
        logits_BLV = quant_dot(x_BLD, table_VD, w_is_NK=True, compute_dtype=compute_dtype)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL).mean()

    for got, want in zip(
        with_gradients(in_tiles(n, vocab_size, compute_dtype), *arguments),
        with_gradients(plain, *arguments),
        strict=True,
    ):
        # Sums round in another order; an operand of the backward products may round to the next bfloat16 number.
        worst = 2**-8 if compute_dtype == "bfloat16" else 2e-6
        assert np.abs(got - want).max() <= worst * np.abs(want).max()
        assert np.linalg.norm(got - want) <= 1e-6 * max(np.linalg.norm(want), 1)


def test_loss_and_gradients_against_float64():
    x, table, targets = batch(257)
    value, dx, dtable = with_gradients(in_tiles(4, 257, "float32"), x, table, targets)
    x, table = x.reshape(-1, D).astype(np.float64), table.astype(np.float64)
    logits = x @ table.T
    softmax = np.exp(logits - logits.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    rows = np.arange(B * L)
    np.testing.assert_allclose(value, -np.log(softmax[rows, targets.ravel()]).mean(), rtol=1e-6)
    softmax[rows, targets.ravel()] -= 1
    softmax /= B * L
    np.testing.assert_allclose(dx.reshape(-1, D), softmax @ table, atol=1e-6)
    np.testing.assert_allclose(dtable, softmax.T @ x, atol=1e-6)


def test_without_a_gradient_the_loss_is_the_same_to_the_bit():
    arguments = batch(257)
    for n in (1, 4):
        loss = in_tiles(n, 257, "bfloat16")
        assert jax.jit(loss)(*arguments) == with_gradients(loss, *arguments)[0]


@pytest.mark.parametrize("vocab_size", [64, 256])
def test_all_logits_at_once_round_as_a_single_tile_does(vocab_size):
    arguments = batch(vocab_size)

    def whole(x_BLD, table_VD, targets_BL):
        return cross_entropy(quant_dot(x_BLD, table_VD, w_is_NK=True), targets_BL)

    for got, want in zip(
        with_gradients(whole, *arguments), with_gradients(in_tiles(1, vocab_size, "bfloat16"), *arguments), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_cotangent_scales_the_gradients():
    x, table, targets = batch(257)
    loss = in_tiles(4, 257, "float32")
    once = with_gradients(loss, x, table, targets)
    thrice = with_gradients(lambda *arguments: 3 * loss(*arguments), x, table, targets)
    for one, three in zip(once, thrice, strict=True):
        np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_padding_and_size_of_a_tile_stay_within_their_limits():
    assert [padded(n) for n in (2, 64, 128, 256, 50257)] == [2, 64, 128, 256, 50304]
    assert tiles(12, 256, 50257, 2**27) == 8 and tiles(12, 256, 50257, 2**30) == 1
    assert tiles(1, 7, 50257, 2 * 50304 * 4) == 7  # 7 is prime
    assert tiles(64, 8, 50257, 1) == 8  # a tile is at least one token of every sequence


@pytest.mark.parametrize("n_tiles", [1, 8])
def test_the_program_holds_no_more_logits_than_a_tile(n_tiles):
    vocab_size = 4096
    x, table, targets = batch(vocab_size)
    loss = in_tiles(n_tiles, vocab_size, "bfloat16")
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, table, targets).compile()
    whole, tile = f"f32[{B * L},{vocab_size}]", f"f32[{B * L // n_tiles},{vocab_size}]"
    text = compiled.as_text()
    assert tile in text and (n_tiles == 1 or whole not in text)


@pytest.mark.parametrize("shape", [(96, 24, 40), (16, 9, 8), (8, 8, 8), (4, 24, 40), (96, 1, 40)])
@pytest.mark.parametrize("w_is_NK", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weight_gradient_is_the_product_of_its_operands(shape, w_is_NK, dtype):
    M, K, N = shape
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(rng.normal(size=size), dtype) for size in ((M, K), (M, N)))
    got = jax.jit(lambda x, g: weight_gradient(x, g, w_is_NK))(x, g)
    want = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want.T if w_is_NK else want, atol=1e-5)


def test_weight_gradient_converts_no_operand_to_float32_on_a_cpu():
    on_cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    x, g = (jax.ShapeDtypeStruct((96, n), jnp.bfloat16, sharding=on_cpu) for n in (64, 128))
    text = jax.jit(weight_gradient).lower(x, g).compile().as_text()
    assert "bf16[64,96]" in text and "f32[96,128]" not in text
