"""Attention by a recipe, against a loop over heads in NumPy float64 and against plain attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.numerics import recipe_reference, slots
from altgrad_jax.numerics.recipes import get_recipe
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.numerics.slot_attention import slot_attention

B, L, H, C = 2, 32, 3, 32
CAUSAL = np.tril(np.ones((L, L), bool))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((B, L, H, C)).astype(np.float32) * scale for scale in (2, 2, 1, 1)]


def slots_and_features(name, seed=(1, 2), **able):
    own = slots.slots_of(get_recipe(name), seed)
    return own, slots.features_of([own], **able)


def head_by_head(q, k, v, name, seed):
    """O in float64, its operands quantized by the NumPy reference."""
    spec = dict(zip(("x", "w"), get_recipe(name).slots[:2]))
    out = np.zeros(q.shape)
    for b in range(B):
        for h in range(H):
            key = [np.asarray(stochastic_seed(np.uint32(seed[0]), np.uint32(seed[1]), np.uint32(b * H + h)))] * 2

            def quantized(values, operand, axis, key=key):
                return recipe_reference.quantize(values, spec[operand], axis, key[0], 0.0).astype(np.float64)

            qh, kh, vh = (x[b, :, h] for x in (q, k, v))
            scores = quantized(qh, "x", 1) @ quantized(kh, "w", 1).T / np.sqrt(C)
            scores[~CAUSAL] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
            out[b, :, h] = quantized(weights, "x", 1) @ quantized(vh, "w", 0)
    return out


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "rowwise", "te_current", "fp4_all_the_way"])
def test_the_forward_products_are_those_of_every_head_quantized_by_the_reference(name):
    q, k, v, _ = inputs()
    own, features = slots_and_features(name)
    got, statistics = slot_attention(q, k, v, CAUSAL, (own, own), features)
    assert statistics == (None, None)
    # A weight near a tie may round to either side, for softmax in float32 is not NumPy's.
    want = head_by_head(q, k, v, name, (1, 2))
    assert np.mean(np.abs(got - want) > 1e-4) < 0.02
    np.testing.assert_allclose(got, want, atol=0.2)
    plain = head_by_head(q, k, v, "bf16", (1, 2))
    assert np.abs(want - plain).max() > 20 * np.median(np.abs(got - want))


def test_without_quantized_slots_it_is_plain_attention_and_so_are_its_gradients():
    q, k, v, g = inputs()
    own, features = slots_and_features("bf16")

    def ours(q, k, v):
        return jnp.sum(slot_attention(q, k, v, CAUSAL, (own, own), features, compute_dtype=jnp.float32)[0] * g)

    def plain(q, k, v):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla") * g)

    for got, want in zip(jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(plain, (0, 1, 2))(q, k, v)):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_statistics_are_those_of_all_heads_and_change_no_gradient():
    q, k, v, g = inputs()
    own, features = slots_and_features("mxfp4", statistics=True)
    probe = slots.empty_statistics()

    def loss(q, k, v, probes):
        y, found = slot_attention(q, k, v, CAUSAL, (own, own), features, probes)
        return jnp.sum(y * g), found

    (gradients, (of_scores, of_values)) = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, (probe, probe))
    named = slots.named_slot_statistics(of_scores, gradients[3][0])
    assert set(named) == set(get_recipe("mxfp4").slots and slots.SLOTS)
    assert named["fprop.x"]["amax"] == np.abs(q).max() and named["fprop.w"]["amax"] == np.abs(k).max()
    values = slots.named_slot_statistics(of_values, gradients[3][1])
    assert values["fprop.w"]["amax"] == np.abs(v).max() and values["dgrad.g"]["amax"] == np.abs(g).max()
    assert 5 < named["dgrad.g"]["sqnr_db"] < 40

    _, able = slots_and_features("mxfp4")
    plain = jax.jit(jax.grad(lambda *x: jnp.sum(slot_attention(*x, CAUSAL, (own, own), able)[0] * g), (0, 1, 2)))
    for got, want in zip(gradients, plain(q, k, v)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_no_two_heads_are_rounded_by_the_same_random_numbers():
    q, k, v, g = (np.broadcast_to(x[:1, :, :1], x.shape) for x in inputs())
    own, features = slots_and_features("fp4_all_the_way")

    def loss(q):
        return jnp.sum(slot_attention(q, k, v, CAUSAL, (own, own), features)[0] * g)

    dq = np.asarray(jax.grad(loss)(q)).swapaxes(1, 2).reshape(B * H, L, C)
    assert len({head.tobytes() for head in dq}) == B * H
    # Each is another draw about the same gradient.
    assert np.linalg.norm(dq[0] - dq[1]) < np.linalg.norm(dq[0])


@pytest.mark.parametrize("name", ["nvfp4_redrawn", "mxfp8", "quartet_2"])
def test_many_products_are_each_alone_to_the_bit_and_their_statistics_combine(name):
    rng = np.random.default_rng(1)
    x, w, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 128, 128), (3, 128, 128), (3, 128, 128)))
    own, features = slots_and_features(name, statistics=True)

    def many(x, w, probe):
        y, found = slots.slot_dots(x, w, own, features, probe)
        return jnp.sum(y * g), found

    def alone(x, w, probe, i):
        seeds = jnp.stack([stochastic_seed(*seed, i) for seed in own.seed])
        y, found = slots.slot_dot(x, w, own._replace(seed=seeds), features, probe)
        return jnp.sum(y * jnp.asarray(g)[i]), found

    probe = slots.empty_statistics()
    (dx, dw, of_g), forward = jax.jit(jax.grad(many, (0, 1, 2), has_aux=True))(x, w, probe)
    of_one = jax.jit(jax.grad(alone, (0, 1, 2), has_aux=True))
    each = [of_one(x[i], w[i], probe, np.uint32(i)) for i in range(3)]
    for i, ((dx_i, dw_i, _), _) in enumerate(each):
        np.testing.assert_array_equal(dx[i], dx_i)
        np.testing.assert_array_equal(dw[i], dw_i)
    fields = slots.slot_statistics.FIELDS
    for together, parts in ((forward, [f for _, f in each]), (of_g, [gradients[2] for gradients, _ in each])):
        want = slots.combine_all(fields, jnp.stack(parts))
        np.testing.assert_allclose(together, want, rtol=1e-5, atol=1e-6)
