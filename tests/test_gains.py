"""Gains of norms in blocks of a format, held to a NumPy loop over the format's table (OCP MX 1.0, 6.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_llama import SIZES, random_params, windows_of

from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.models.llama import LlamaConfig
from altgrad_jax.models.model import forward
from altgrad_jax.numerics import gains
from altgrad_jax.numerics.formats import get_format, round_reference
from altgrad_jax.numerics.recipes import GAINS, get_recipe
from altgrad_jax.step.metrics import gain_metrics

RNG = np.random.default_rng(0)
GAIN = np.exp(0.05 * RNG.standard_normal(96) - 0.05 + np.repeat([0, 0.3, -2], 32)).astype(np.float32)
GAIN[:32] = np.minimum(GAIN[:32], 0.99)  # the largest of the first block lies above 448 / 512


def by_a_loop(gain, recipe):
    """(values, shares of the largest number and of blocks of one value)"""
    spec = get_recipe(recipe).fprop_w
    fmt = get_format(spec.element)
    out, top, one = [], [], []
    for block in gain.astype(np.float64).reshape(-1, 32):
        amax = np.abs(block).max()
        if spec.rule == "floor":
            exponent = np.floor(np.log2(amax)) - np.floor(np.log2(fmt.max_finite))
        else:
            exponent = np.ceil(np.log2(amax / fmt.max_finite))
        q = round_reference(fmt, block / 2**exponent)
        out.append(q * 2**exponent)
        top.append(np.abs(q) == fmt.max_finite)
        one.append(len(set(q.tolist())) == 1)
    return np.concatenate(out), np.mean(top), np.mean(one)


@pytest.mark.parametrize("recipe", GAINS)
def test_values_and_statistics_are_those_of_the_loop(recipe):
    want, top, one = by_a_loop(GAIN, recipe)
    np.testing.assert_array_equal(gains.rounded(GAIN, recipe), want.astype(np.float32))
    found = gains.statistics(jnp.stack([GAIN, GAIN]), recipe)
    np.testing.assert_allclose(found["gain_top_code"], [top, top])
    np.testing.assert_allclose(found["gain_one_value"], [one, one], rtol=1e-6)
    assert (top > 0) == (recipe != "mxfp8")  # scales rounded up clip nothing


def test_close_gains_all_become_the_largest_number_by_the_floor_rule_and_the_gradient_passes():
    close = np.linspace(0.9, 0.97, 32, dtype=np.float32)  # above 448 / 512
    assert set(np.asarray(gains.rounded(close, "mxfp8_floor")).tolist()) == {0.875}
    assert gains.statistics(close, "mxfp8_floor") == {"gain_top_code": 1, "gain_one_value": 1}
    slopes = np.arange(32, dtype=np.float32)
    np.testing.assert_array_equal(jax.grad(lambda g: jnp.dot(gains.rounded(g, "mxfp8_floor"), slopes))(close), slopes)
    bad = np.where(np.arange(32) == 3, np.nan, close).astype(np.float32)
    assert np.isnan(gains.rounded(bad, "mxfp8")[3])


@pytest.mark.parametrize("kind", [GPTConfig, LlamaConfig])
def test_the_model_multiplies_with_the_rounded_gains(kind):
    # The step's model with rounded gains is the plain model with gains that were rounded before.
    config, plain = kind(**SIZES, norm_gains="mxfp4"), kind(**SIZES)
    params, tokens = random_params(plain), windows_of(plain)[:, :-1].astype(np.int32)
    before = jax.tree.map_with_path(
        lambda path, leaf: gains.rounded(leaf, "mxfp4") if path[-1].key == "scale" else leaf, params
    )
    got = forward(config, params, tokens).logits
    np.testing.assert_allclose(got, forward(plain, before, tokens).logits, rtol=0, atol=1e-6)
    assert np.abs(got - forward(plain, params, tokens).logits).max() > 1e-3
    row = gain_metrics(params, "mxfp4")
    norm = "block_1/ln_2" if kind is GPTConfig else "block_1/norm_2"
    own = by_a_loop(np.asarray(params["block_1"][norm[8:]]["scale"]), "mxfp4")
    assert (row[f"gain_top_code/{norm}"], row[f"gain_one_value/{norm}"]) == pytest.approx(own[1:])
    norms = [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "scale"]
    assert row["gain_top_code/all"] == pytest.approx(by_a_loop(np.concatenate(norms), "mxfp4")[1])
