"""Attention by a recipe in the training step, and the key-value cache in a number format."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_recipe_step import TOKENS_T, Bench, make
from test_training import tiny

from altgrad_jax.conflicts import of_recipe
from altgrad_jax.errors import UserError
from altgrad_jax.inference.generate import generate
from altgrad_jax.models.attention import empty_cache
from altgrad_jax.models.model import forward, init_params, model_config
from altgrad_jax.numerics.kv_cache import as_cached, cache_spec
from altgrad_jax.numerics.recipe_reference import quantize
from altgrad_jax.numerics.recipes import SLOTS, get_recipe, kept_high
from altgrad_jax.run.sweep import parse_axes

PRODUCTS = [f"block_{i}/{part}" for i in range(2) for part in ("attn_qk", "attn_pv")]


@pytest.fixture(scope="module")
def bench():
    """Two heads of 32 numbers, and recipes of 4 bits with and without attention."""
    return Bench(
        n_embd=64, n_head=2, recipe=("mxfp4", "bf16@3"), recipe_program=("mxfp4_attention", "mxfp4"), batch_size=4
    )


def test_attention_is_quantized_where_the_recipe_says_so_and_nowhere_else(bench):
    plain, with_attention = (bench.train((name, 0), n=2)[1] for name in ("mxfp4", "mxfp4_attention"))
    for product in PRODUCTS:
        for slot in SLOTS:
            assert with_attention[f"sqnr_db/{product}/{slot}"][0] < 25 < 45 < plain[f"sqnr_db/{product}/{slot}"][0]
            assert 0 < with_attention[f"amax/{product}/{slot}"][0] < np.inf
        assert with_attention[f"amax/{product}/fprop.x"][0] <= 1 or "qk" in product  # a softmax
    for layer in ("block_0/attn_qkv", "block_1/mlp_up"):
        assert with_attention[f"sqnr_db/{layer}/fprop.x"][0] < 25
    assert plain["loss"][0] != with_attention["loss"][0] and abs(plain["loss"][0] - with_attention["loss"][0]) < 0.1


def test_names_of_recipes_with_attention():
    assert "block_0/attn_qk" in kept_high(get_recipe("mxfp8"), 2)
    assert kept_high(get_recipe("mxfp8_attention"), 2) == ["head"]
    nvfp4 = get_recipe("nvfp4_attention:fprop")
    assert nvfp4.name == "nvfp4_attention:fprop" and nvfp4.attention and nvfp4.dgrad_g.high
    assert kept_high(nvfp4, 2) == [f"block_1/{part}" for part in (
        "attn_qkv", "attn_qk", "attn_pv", "attn_out", "mlp_up", "mlp_down")] + ["head"]  # fmt: skip
    with pytest.raises(UserError, match="there is no recipe 'mxfp9': give one of mxfp"):
        get_recipe("mxfp9_attention")
    # An axis of a sweep joins the items of one value by +.
    points = parse_axes("recipe=mxfp8,mxfp8_attention,nvfp4_attention+bf16@0.8")
    assert [point["recipe"] for point in points] == [("mxfp8",), ("mxfp8_attention",), ("nvfp4_attention", "bf16@0.8")]


def test_widths_and_kernels_that_attention_by_a_recipe_cannot_have():
    config = tiny(n_layer=2, n_embd=32, n_head=2, block_size=32, recipe=("mxfp8_attention",), amax_history=16)
    said = list(of_recipe(config))
    assert len(said) == 1 and "attn_qk" in said[0] and "K is 16" in said[0] and "width of a head" in said[0]
    config = tiny(n_layer=2, n_embd=64, n_head=2, block_size=32, recipe=("mxfp8_attention",), attention="cudnn")
    assert any("attention='cudnn' computes" in sentence for sentence in of_recipe(config))


def test_grouped_queries_share_their_keys_and_values():
    """A Llama whose heads share keys and values computes what one with copies of them does."""
    own = make(model="llama", n_layer=1, n_embd=64, n_head=2, n_kv_head=1, recipe=("bf16",), batch_size=4)
    by_recipe = make(
        model="llama", n_layer=1, n_embd=64, n_head=2, n_kv_head=1, recipe=("bf16",), batch_size=4,
        recipe_program=("mxfp8_attention",),
    )  # fmt: skip
    losses = []
    for functions in (own, by_recipe):
        state = jax.device_get(functions.init(42, functions.inputs.formats))
        windows = np.resize(TOKENS_T, (4, 33))
        losses.append(float(functions.evaluate(state.params, windows, state.quant, functions.inputs.formats)))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


# --------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("text", ["E4M3", "INT8", "E5M2:1x32", "E2M1:1x16", "e4m3:1x64"])
def test_the_cache_holds_what_the_reference_rounds_to(text):
    spec = cache_spec(text, 64)
    x = np.float32(np.random.default_rng(0).standard_t(3, (2, 5, 3, 64)))
    want = quantize(x.reshape(-1, 64), spec, 1).astype(np.float32).reshape(x.shape)
    np.testing.assert_array_equal(as_cached(jnp.asarray(x), spec), want)
    # One token or all of them, the numbers are the same.
    np.testing.assert_array_equal(as_cached(jnp.asarray(x[:, 2:3]), spec), want[:, 2:3])
    kept = as_cached(jnp.asarray(x, jnp.bfloat16), spec)
    assert kept.dtype == jnp.bfloat16


def test_caches_that_there_are_not():
    for text, said in {
        "E4M3:16x16": "blocks that are not along one head: give one of 1x16, 1x32, 1x64, 1x128",
        "E4M3:1x32": r"needs heads of a multiple of 32 numbers, and these have 48",
        "E9M9": "E9M9",
    }.items():
        with pytest.raises(UserError, match=said):
            cache_spec(text, 48)


def test_text_made_token_by_token_sees_the_cache_of_a_whole_window():
    settings = {"model": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 61,
                "dropout": 0.0, "compute_dtype": "float32", "norm_gains": "float32"}  # fmt: skip
    plain = model_config(settings)
    config = dataclasses.replace(plain, kv_cache=cache_spec("E2M1:1x16", plain.head_width))
    params = init_params(plain, 0)
    params = jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params)  # attention that is not uniform
    tokens = np.random.default_rng(1).integers(0, 61, (1, 16))
    logits = jax.jit(lambda config, tokens, **more: forward(config, params, tokens, **more)[1::3], static_argnums=0)
    whole, _ = logits(config, tokens)
    cache, steps = empty_cache(config, 1), []
    for i in range(16):
        of_token, cache = logits(config, tokens[:, i : i + 1], cache=cache, position=i)
        steps.append(of_token)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=2e-4, atol=2e-4)
    assert np.abs(whole - logits(plain, tokens)[0]).max() > 0.01
    new = generate(params, config, tokens[0, :4], max_new_tokens=5, temperature=0)
    assert len(new) == 5
