"""Schedules, AdamW and clipping against optax and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_jax import optimizer

SETTINGS = dict(peak=6e-4, warmup_steps=10, max_steps=100, min_lr_ratio=0.1, decay_steps=20)


def rates(schedule, **overrides):
    return np.array([optimizer.learning_rate(k, schedule=schedule, **{**SETTINGS, **overrides}) for k in range(100)])


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_update(schedule):
    np.testing.assert_allclose(rates(schedule)[:10], 6e-4 * np.arange(1, 11) / 10, rtol=1e-6)


def test_constant_stays_at_the_peak():
    np.testing.assert_array_equal(rates("constant")[10:], np.float32(6e-4))


def test_no_warm_up_starts_at_the_peak():
    assert rates("constant", warmup_steps=0)[0] == np.float32(6e-4)


def test_cosine_is_optax_cosine_after_the_warm_up():
    reference = optax.cosine_decay_schedule(6e-4, decay_steps=89, alpha=0.1)
    np.testing.assert_allclose(rates("cosine")[10:], [reference(k) for k in range(90)], rtol=1e-5)
    assert rates("cosine")[-1] == pytest.approx(6e-5)


def test_wsd_is_flat_then_linear_to_the_floor():
    got = rates("wsd")
    np.testing.assert_array_equal(got[10:81], np.float32(6e-4))
    np.testing.assert_allclose(np.diff(got[80:]), np.full(19, -0.9 * 6e-4 / 19), rtol=1e-3)
    assert got[-1] == pytest.approx(6e-5)


def tree(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 2)
    kernel, bias = jax.random.normal(keys[0], (5, 7)), jax.random.normal(keys[1], (7,))
    return {"a": {"kernel": scale * kernel, "bias": scale * bias}}


def test_adamw_times_the_rate_is_optax_adamw():
    """Twenty updates, decay on matrices only, against optax's own AdamW with the same schedule and mask."""
    ours = optimizer.adamw(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    theirs = optax.adamw(lambda k: 1e-2 * jnp.minimum(1.0, (k + 1) / 5), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1,
                         mask={"a": {"kernel": True, "bias": False}})
    params = reference = tree(0)
    state, their_state = ours.init(params), theirs.init(params)
    for k in range(20):
        grads = tree(k + 1)
        direction, state = ours.update(grads, state, params)
        rate = optimizer.learning_rate(k, peak=1e-2, warmup_steps=5, max_steps=20, schedule="constant",
                                       min_lr_ratio=0.1, decay_steps=20)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        updates, their_state = theirs.update(grads, their_state, reference)
        reference = optax.apply_updates(reference, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7), params, reference)
    assert optimizer.adam_moments(state).count == 20


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
def test_clipping_is_optax_clip_by_global_norm(scale):
    grads = tree(3, scale)
    factor = optimizer.clip_factor(optax.tree.norm(grads), 1.0)
    expected, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g * factor, e, rtol=1e-6), grads, expected)


def test_clipping_can_be_turned_off_and_survives_a_zero_gradient():
    assert optimizer.clip_factor(jnp.float32(1e9), 0.0) == 1.0
    assert optimizer.clip_factor(jnp.float32(0.0), 1.0) == 1.0
