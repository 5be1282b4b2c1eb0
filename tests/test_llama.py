"""Llama held to a float64 NumPy Llama, and what the rest of the program makes of a second model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest

from altgrad_jax.models.attention import empty_cache
from altgrad_jax.models.flops import training_flops_per_token
from altgrad_jax.models.llama import LlamaConfig
from altgrad_jax.models.model import forward, init_params
from altgrad_jax.models.parameters import count_params, weights_of, with_weights
from altgrad_jax.numerics.layers import hidden_width, linear_layers, matrix_sizes
from altgrad_jax.step import metrics
from altgrad_jax.step.update import loss

SIZES = dict(n_layer=2, n_head=4, n_embd=32, block_size=8, vocab_size=31, compute_dtype="float32")
PLAIN = LlamaConfig(**SIZES)
# Every option at once: two heads of queries share one of keys and values, q and k are normed, the head has a table.
FULL = LlamaConfig(**SIZES, n_kv_head=2, tied_head=False, qk_norm=True)
BOTH = pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])


def random_params(config):
    """Parameters with every array random, gains too, and attention far from uniform."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        values = rng.standard_normal(leaf.shape) * {"kernel": 0.25, "embedding": 0.5}.get(path[-1].key, 0.2)
        return jnp.asarray(values + (path[-1].key == "scale"), jnp.float32)

    return jax.tree.map_with_path(fill, jax.eval_shape(partial(init_params, config, 0)))


def as_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def windows_of(config):
    shape = 2, config.block_size + 1
    return np.random.default_rng(1).integers(0, config.vocab_size, shape).astype(np.uint16)


@BOTH
def test_logits_loss_and_gradients_are_those_of_the_reference(config):
    params, windows = random_params(config), windows_of(config)
    heads = config.n_head, config.kv_heads
    exact, tokens_BL, targets_BL = as_float64(params), windows[:, :-1].astype(int), windows[:, 1:].astype(int)
    logits_BLV = jax.jit(lambda p: forward(config, p, tokens_BL).logits)(params)
    want_BLV = [numpy_llama.logits(exact, tokens, *heads) for tokens in tokens_BL]
    np.testing.assert_allclose(logits_BLV, want_BLV, rtol=0, atol=2e-5)

    found, grads = jax.jit(jax.value_and_grad(lambda p: loss(config, p, windows, None)[0]))(params)
    assert found == pytest.approx(numpy_llama.loss(exact, tokens_BL, targets_BL, *heads), rel=1e-6)
    # Along a random direction of every array, against a central difference of the reference.
    rng, leaves = np.random.default_rng(2), jax.tree_util.tree_flatten_with_path(exact)[0]
    for path, leaf in leaves:
        direction = rng.standard_normal(leaf.shape)
        slopes = []
        for sign in (1, -1):
            moved = jax.tree_util.tree_map_with_path(
                lambda p, a, at=path, by=sign * 1e-5 * direction: a + by if p == at else a, exact
            )
            slopes.append(sign * numpy_llama.loss(moved, tokens_BL, targets_BL, *heads) / 2e-5)
        gradient = grads
        for key in path:
            gradient = gradient[key.key]
        name = jax.tree_util.keystr(path)
        assert np.sum(direction * np.asarray(gradient)) == pytest.approx(sum(slopes), rel=2e-4, abs=1e-6), name


def test_a_cache_gives_the_logits_of_the_full_forward_pass():
    params, tokens_BL = random_params(FULL), windows_of(FULL)[:, :-1].astype(np.int32)
    apply = jax.jit(lambda tokens, cache, position: forward(FULL, params, tokens, cache=cache, position=position))
    out = apply(tokens_BL[:, :3], empty_cache(FULL, batch=2), 0)
    pieces = [out.logits]
    for t in range(3, FULL.block_size):
        out = apply(tokens_BL[:, t : t + 1], out.cache, t)
        pieces.append(out.logits)
    assert out.cache.keys.shape == (2, 2, 8, 2, 8)
    want_BLV = forward(FULL, params, tokens_BL).logits
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), want_BLV, rtol=0, atol=2e-5)


@BOTH
def test_layers_sizes_and_operations_are_those_of_the_parameters(config):
    params = random_params(config)
    norms = ["norm_1", "norm_2"] + ["q_norm", "k_norm"] * config.qk_norm
    in_block = {"norm_1", "attn_qkv", "attn_out", "norm_2", "mlp_gate", "mlp_up", "mlp_down", *norms}
    layers = metrics.layer_names(params)
    assert set(layers) == {f"block_{i}/{part}" for i in range(2) for part in in_block} | {
        *("embed", "norm_f"),
        *(() if config.tied_head else ("head",)),
    }
    assert layers[:2] == ("embed", "block_0/norm_1") and layers[-1] == ("norm_f" if config.tied_head else "head")
    shape = dict(n_embd=32, vocab_size=31, model="llama", n_head=4, n_kv_head=config.n_kv_head)
    sizes, matrices = matrix_sizes(**shape), 0
    for layer in linear_layers(2, "llama"):
        found = weights_of(params, layer).shape
        assert sizes[layer.rpartition("/")[2]] == (found[::-1] if layer == "head" else found)
        matrices += found[0] * found[1]
    assert all(set(params[f"block_{i}"][part]) == {"scale"} for i in range(2) for part in norms)
    gains = 2 * 2 * 32 + 32 + (2 * 2 * 8 if config.qk_norm else 0)
    assert count_params(params) == matrices + gains + (0 if config.tied_head else 31 * 32)
    per_token = training_flops_per_token(n_layer=2, block_size=8, **shape)
    assert per_token == 6 * matrices + 2 * 3 * 2 * 2 * 8 * 32


@BOTH
def test_the_heads_weights_are_its_own_table_where_it_has_one(config):
    params = random_params(config)
    changed = with_weights(params, {"head": jnp.zeros((31, 32))})
    assert not weights_of(changed, "head").any() and weights_of(params, "head").all()
    assert bool(changed["embed"]["embedding"].any()) != config.tied_head


def test_the_mlp_is_8_thirds_wide_in_multiples_of_32():
    widths = {12: 32, 16: 64, 96: 256, 384: 1024, 768: 2048, 4096: 10944}
    assert {n_embd: hidden_width(n_embd, "llama") for n_embd in widths} == widths
