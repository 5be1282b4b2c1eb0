"""Each statistic against its formula in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_jax.step import metrics


def make_tree(seed, scale=1.0):
    """A tree shaped like the parameters of a model with eleven blocks (block_10 must not sort before block_2)."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "embed": {"embedding": draw(9, 4)},
        "ln_f": {"scale": draw(4), "bias": draw(4)},
        "pos_embed": {"embedding": draw(3, 4)},
        **{
            f"block_{i}": {"mlp_up": {"kernel": draw(4, 6), "bias": draw(6)}, "ln_1": {"scale": draw(4)}}
            for i in (0, 2, 10)
        },
    }


def flat(arrays):
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays.values()])


def test_layers_come_in_the_order_the_model_applies_them():
    assert list(metrics.by_layer(make_tree(0))) == [
        "embed",
        "pos_embed",
        "block_0/ln_1",
        "block_0/mlp_up",
        "block_2/ln_1",
        "block_2/mlp_up",
        "block_10/ln_1",
        "block_10/mlp_up",
        "ln_f",
    ]
    assert metrics.neuron_layers(make_tree(0)) == {f"block_{i}/mlp_up": 6 for i in (0, 2, 10)}


def test_gradient_metrics():
    grads = make_tree(1)
    stats = metrics.gradient_stats(grads)
    got = metrics.gradient_metrics(stats)
    for layer, arrays in metrics.by_layer(grads).items():
        g = flat(arrays)
        assert got[f"grad_norm/{layer}"] == pytest.approx(np.linalg.norm(g), rel=1e-6)
        assert got[f"grad_max/{layer}"] == np.abs(g).max().astype(np.float32)
        assert got[f"nonfinite_grads/{layer}"] == 0
    for layer, squares in stats.neuron_square_sum.items():
        arrays = metrics.by_layer(grads)[layer]
        columns = np.vstack([np.asarray(arrays["kernel"], np.float64), np.asarray(arrays["bias"], np.float64)])
        np.testing.assert_allclose(squares, (columns**2).sum(0), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_gradients_are_counted_in_their_layer(value):
    grads = make_tree(1)
    kernel = grads["block_2"]["mlp_up"]["kernel"]
    grads["block_2"]["mlp_up"]["kernel"] = kernel.at[1, 2].set(value).at[3, 3].set(value)
    got = metrics.gradient_metrics(metrics.gradient_stats(grads))
    counts = {name: float(v) for name, v in got.items() if name.startswith("nonfinite")}
    assert counts.pop("nonfinite_grads/block_2/mlp_up") == 2
    assert not any(counts.values())


def test_gradient_snr_is_the_mean_ratio_of_bias_corrected_moments():
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    params = make_tree(0)
    state = adam.init(params)
    stream = [make_tree(seed) for seed in range(5)]
    for grads in stream:
        grads["embed"]["embedding"] = grads["embed"]["embedding"].at[0].set(0.0)  # a row that never has a gradient
        _, state = adam.update(grads, state)
    got = metrics.gradient_snr(state, beta1=0.9, beta2=0.95)
    for layer in metrics.by_layer(params):
        m = v = 0.0
        for grads in stream:
            g = flat(metrics.by_layer(grads)[layer])
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        m, v = m / (1 - 0.9**5), v / (1 - 0.95**5)
        expected = np.where(v > 0, np.abs(m) / np.sqrt(np.where(v > 0, v, 1)), 0).mean()
        assert got[f"grad_snr/{layer}"] == pytest.approx(expected, rel=1e-5)


def test_gradient_snr_is_one_for_a_constant_gradient():
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    params = make_tree(0)
    state = adam.init(params)
    for _ in range(30):
        _, state = adam.update(make_tree(7), state)
    for value in metrics.gradient_snr(state, beta1=0.9, beta2=0.95).values():
        assert value == pytest.approx(1.0, rel=1e-4)


def test_update_and_parameter_metrics():
    params, updates = make_tree(0), make_tree(5, 1e-3)
    updates["block_0"]["mlp_up"]["kernel"] = updates["block_0"]["mlp_up"]["kernel"].at[0].set(0.0)
    param_stats = metrics.parameter_metrics(params)
    got = metrics.update_metrics(updates, param_stats) | param_stats
    for layer, arrays in metrics.by_layer(updates).items():
        u, p = flat(arrays), flat(metrics.by_layer(params)[layer])
        assert got[f"update_norm/{layer}"] == pytest.approx(np.linalg.norm(u), rel=1e-6)
        assert got[f"param_norm/{layer}"] == pytest.approx(np.linalg.norm(p), rel=1e-6)
        assert got[f"update_ratio/{layer}"] == pytest.approx(np.linalg.norm(u) / np.linalg.norm(p), rel=1e-6)
        assert got[f"zero_update/{layer}"] == pytest.approx((u == 0).mean(), rel=1e-6)
    assert got["zero_update/block_0/mlp_up"] == pytest.approx(6 / 30)


def test_pack_keeps_names_and_values_together():
    names, values = jax.jit(lambda x: metrics.pack({"b": x, "a/c": 2 * x})[1])(3.0), None
    np.testing.assert_array_equal(names, [3.0, 6.0])
    names, values = metrics.pack({"b": 1, "a/c": True})
    assert names == ("b", "a/c") and values.dtype == jnp.float32
    np.testing.assert_array_equal(values, [1.0, 1.0])


def fidelity(g, r):
    """By their formulas, in float64."""
    with np.errstate(divide="ignore"):
        return {
            "grad_cosine": g @ r / (np.linalg.norm(g) * np.linalg.norm(r)),
            "grad_sqnr_db": 10 * np.log10((r @ r) / ((g - r) @ (g - r))),
            "grad_flushed": ((g == 0) & (r != 0)).mean(),
        }


def test_gradient_fidelity_by_layer_and_over_all_elements():
    """Layers of different size, energy and error: over all elements a layer counts by its size."""
    rng = np.random.default_rng(2)

    def spoil(r, share):
        r = np.where(rng.random(r.shape) < 0.1, 0, r)
        g = np.where(rng.random(r.shape) < share, 0, r * (1 + share * rng.standard_normal(r.shape)))
        return jnp.float32(r), jnp.float32(g)

    pairs = {
        group: jax.tree.map(lambda r: spoil(r * 10.0**-k, 0.1 * (k + 1)), arrays)
        for k, (group, arrays) in enumerate(make_tree(1).items())
    }
    reference, grads = (
        jax.tree.map(lambda pair: pair[i], pairs, is_leaf=lambda node: isinstance(node, tuple)) for i in range(2)
    )
    found = metrics.gradient_fidelity(grads, reference)
    g_of, r_of = metrics.by_layer(grads), metrics.by_layer(reference)
    expected = fidelity(*(np.concatenate([flat(arrays) for arrays in of.values()]) for of in (g_of, r_of)))
    for layer, arrays in g_of.items():
        expected |= {f"{name}/{layer}": value for name, value in fidelity(flat(arrays), flat(r_of[layer])).items()}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5), name
    for name in ("grad_cosine", "grad_sqnr_db", "grad_flushed"):
        mean_of_layers = np.mean([float(found[f"{name}/{layer}"]) for layer in g_of])
        assert float(found[name]) != pytest.approx(mean_of_layers, rel=1e-2)
    assert set(metrics.gradient_fidelity(grads, reference, "_x")) == {
        name.replace(name.split("/")[0], name.split("/")[0] + "_x") for name in expected
    }


def test_the_fidelity_of_a_gradient_to_itself_and_to_its_opposite():
    tree = make_tree(3)
    same = metrics.gradient_fidelity(tree, tree)
    assert same["grad_cosine"] == pytest.approx(1, rel=1e-6) and same["grad_sqnr_db"] == np.inf
    opposite = metrics.gradient_fidelity(jax.tree.map(jnp.negative, tree), tree)
    assert opposite["grad_cosine"] == pytest.approx(-1, rel=1e-6)
    assert opposite["grad_sqnr_db"] == pytest.approx(-20 * np.log10(2), rel=1e-5)
    nothing = metrics.gradient_fidelity(jax.tree.map(jnp.zeros_like, tree), tree)
    assert nothing["grad_flushed"] == 1 and nothing["grad_sqnr_db"] == 0
