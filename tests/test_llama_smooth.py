"""Smooth-SwiGLU held to its definition in float64 NumPy (arXiv 2409.12517), and to plain SwiGLU without formats.

s_i^-1 Q(s_i h_i) for each column i of mlp_down's input, 1 / s_i its largest magnitude down to a power of two.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_llama import FULL, random_params, windows_of

from altgrad_jax.errors import UserError
from altgrad_jax.models import hf
from altgrad_jax.models.model import forward
from altgrad_jax.numerics import bias, slots
from altgrad_jax.numerics.certified_products import Certified, Draws, certified_dot
from altgrad_jax.numerics.formats import get_format, round_reference
from altgrad_jax.numerics.products import Operand, Operands, Rule, column_scales, quant_dot
from altgrad_jax.numerics.recipes import get_recipe
from altgrad_jax.numerics.rounding import format_params

RNG = np.random.default_rng(0)
# Columns of very different sizes, and one of zeros.
X = (RNG.standard_normal((32, 64)) * np.exp(3 * RNG.standard_normal(64))).astype(np.float32)
X[:, 5] = 0
W, G = RNG.standard_normal((64, 32)).astype(np.float32), RNG.standard_normal((32, 32)).astype(np.float32)
SMOOTH = replace(FULL, smooth_swiglu=True)


def in_float64(round_to_format):
    """s^-1 Q(s x) with one scale for the whole of s x, as `current` has it."""
    amax = np.abs(X.astype(np.float64)).max(0)
    s = np.where(amax > 0, 2.0 ** -np.floor(np.log2(np.where(amax > 0, amax, 1))), 1)
    scaled = X * s
    scale = 2.0 ** np.floor(np.log2(448 / np.abs(scaled).max()))
    return round_to_format(scaled * scale) / scale / s


def test_the_operand_of_formats_is_that_of_the_definition():
    e4m3 = get_format("E4M3")
    want = in_float64(partial(round_reference, e4m3))
    operands = Operands(a=Operand(format_params(e4m3)))
    dot = partial(quant_dot, operands=operands, rule=Rule(a="current"), compute_dtype=jnp.float32)
    y, pull, _ = jax.vjp(lambda x, w: dot(x, w, columns_K=column_scales(x)), X, W, has_aux=True)
    np.testing.assert_allclose(y, want @ W, rtol=0, atol=1e-4 * np.abs(want @ W).max())
    dx, dw = pull(G)
    np.testing.assert_allclose(dw, want.T @ G, rtol=0, atol=1e-5 * np.abs(want.T @ G).max())
    np.testing.assert_allclose(dx, G @ W.T, rtol=1e-4, atol=1e-4)  # straight through
    np.testing.assert_array_equal(dot(np.eye(64, dtype=np.float32), W)[0], W)
    # Without the columns small columns are flushed.
    plain = np.abs(np.asarray(dot(X, np.eye(64, dtype=np.float32))[0]) - X)
    assert np.mean(plain[:, np.abs(X).max(0) < 0.05]) > 3 * np.mean(np.abs(want - X)[:, np.abs(X).max(0) < 0.05])


@pytest.mark.parametrize("name", ["te_delayed", "mxfp4", "mxfp8_floor", "nvfp4"])
def test_a_recipe_quantizes_the_scaled_operand_in_both_products(name):
    own = jax.tree.map(jnp.asarray, slots.slots_of(get_recipe(name)))
    features = slots.features_of([own])
    columns = column_scales(X)
    dot = partial(slots.slot_dot, slots=own, features=features, compute_dtype=jnp.float32)
    smooth, pull, _ = jax.vjp(lambda x, w: dot(x, w, columns_K=columns), X, W, has_aux=True)
    # By the identity as weights, which every format here holds exactly, the product is the operand itself.
    eye = np.eye(64, dtype=np.float32)
    operand = np.asarray(dot(np.asarray(X * columns), eye)[0], np.float64) / np.asarray(columns, np.float64)
    np.testing.assert_array_equal(dot(X, eye, columns_K=columns)[0], operand.astype(np.float32))
    weights = dot(eye, W)[0]
    if name != "nvfp4":  # whose scale of the tensor depends on all of x
        want = operand @ np.asarray(weights, np.float64)
        np.testing.assert_allclose(smooth, want, rtol=0, atol=1e-6 * np.abs(want).max())
    scaled = jax.vjp(lambda x, w: dot(x, w), X * columns, W, has_aux=True)[1](G)
    np.testing.assert_array_equal(pull(G)[0], scaled[0])
    np.testing.assert_allclose(pull(G)[1], np.asarray(scaled[1]) / np.asarray(columns)[:, None], rtol=1e-5, atol=1e-5)


def test_a_certificate_looks_at_the_same_products():
    own = jax.tree.map(jnp.asarray, slots.slots_of(get_recipe("mxfp8")))
    columns, features = column_scales(X), slots.features_of([own])
    given = Certified(own, jnp.zeros(2, jnp.uint32), jnp.int32(1), columns)
    draws, probe = Draws(2, 1, features), jnp.zeros(bias.n_fields(2))
    y, pull = jax.vjp(lambda x, w: certified_dot(x, w, given, draws, probe), X, W)
    want, pull_want, _ = jax.vjp(
        lambda x, w: slots.slot_dot(x, w, own, features, columns_K=columns), X, W, has_aux=True
    )
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-3)
    for found, expected in zip(pull(G), pull_want(G), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_without_formats_it_is_plain_swiglu_and_its_export_too():
    params, tokens = random_params(FULL), windows_of(FULL)[:, :-1].astype(np.int32)
    np.testing.assert_array_equal(forward(SMOOTH, params, tokens).logits, forward(FULL, params, tokens).logits)
    configs = [replace(config, qk_norm=False) for config in (FULL, SMOOTH)]
    exported = [hf.to_hf(params, config) for config in configs]
    assert exported[0][1] == exported[1][1]
    for name, array in exported[0][0].items():
        np.testing.assert_array_equal(exported[1][0][name], array)


def test_native_products_have_no_columns():
    operand = Operand(format_params(get_format("E4M3")))
    rule = Rule("current", "current", "current", native=("float8_e4m3fn",) * 3)
    with pytest.raises(UserError, match="native products have no scales of columns"):
        quant_dot(X, W, operands=Operands(operand, operand, operand), rule=rule, columns_K=column_scales(X))
