"""Each statistic against its formula in float64 NumPy."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_jax.models.stacking import layers_of, stack
from altgrad_jax.numerics.histograms import rank_health
from altgrad_jax.numerics.layers import model_order
from altgrad_jax.step import metrics

BLOCKS = range(11)


@pytest.fixture(params=[None, ((0, 1), (1, 9), (9, 11))], ids=["apart", "stacked"])
def arrange(request):
    """Every statistic is taken of a tree in which each block has its arrays, and of one with stacked arrays."""
    return lambda tree: tree if request.param is None else stack(tree, request.param)


def named(columns):
    """{name: number} of columns, every one of which is one number."""
    assert columns.values.shape == (len(columns.names),) and columns.values.dtype == jnp.float32
    return dict(zip(columns.names, np.asarray(columns.values), strict=True))


def by_layer(tree):
    """{layer: {array name: array}} of a tree that is not stacked, in the order in which the model applies them."""
    layers = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *layer, name = (key.key for key in path)
        layers.setdefault("/".join(layer), {})[name] = leaf
    return dict(sorted(layers.items(), key=lambda item: model_order(item[0])))


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
            for i in BLOCKS
        },
    }


def flat(arrays):
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays.values()])


def test_layers_come_in_the_order_the_model_applies_them(arrange):
    blocks = [f"block_{i}/{part}" for i in BLOCKS for part in ("ln_1", "mlp_up")]
    tree = arrange(make_tree(0))
    assert metrics.layer_names(tree) == ("embed", "pos_embed", *blocks, "ln_f")
    assert metrics.neuron_layers(tree) == {f"block_{i}/mlp_up": 6 for i in BLOCKS}
    assert list(metrics.neuron_layers(tree)) == [f"block_{i}/mlp_up" for i in BLOCKS]


def test_the_arrays_of_a_group_have_an_axis_of_layers():
    tree = make_tree(0)
    apart, together = metrics.by_group(tree), metrics.by_group(stack(tree, ((0, 2), (2, 11))))
    assert set(apart) == set(by_layer(tree))
    assert set(together) == {"embed", "pos_embed", "ln_f"} | {
        f"block_{segment}/{part}" for segment in ("0:2", "2:11") for part in ("ln_1", "mlp_up")
    }
    assert apart["ln_f"]["scale"].shape == together["ln_f"]["scale"].shape == (1, 4)
    np.testing.assert_array_equal(
        together["block_2:11/mlp_up"]["kernel"], [tree[f"block_{i}"]["mlp_up"]["kernel"] for i in range(2, 11)]
    )
    for layer, arrays in by_layer(tree).items():
        jax.tree.map(lambda one, group: np.testing.assert_array_equal(one, group[0]), arrays, apart[layer])


def test_layers_of_groups_are_brought_into_the_models_order():
    groups = ["ln_f", "block_1:3/mlp_up", "block_1:3/ln_1", "pos_embed", "block_0:1/mlp_up", "embed"]
    in_order = (
        "embed",
        "pos_embed",
        "block_0/mlp_up",
        "block_1/ln_1",
        "block_1/mlp_up",
        "block_2/ln_1",
        "block_2/mlp_up",
        "ln_f",
    )
    layers, order = metrics.in_model_order(groups)
    assert layers == in_order
    given = [
        "ln_f",
        "block_1/mlp_up",
        "block_2/mlp_up",
        "block_1/ln_1",
        "block_2/ln_1",
        "pos_embed",
        "block_0/mlp_up",
        "embed",
    ]
    assert [given[i] for i in order] == list(in_order)


def test_gradient_metrics(arrange):
    grads = make_tree(1)
    stats = metrics.gradient_stats(arrange(grads))
    got = named(metrics.gradient_metrics(stats))
    assert list(stats.layers) == list(by_layer(grads))
    assert set(got) == {
        f"{name}/{layer}" for name in ("grad_norm", "grad_max", "nonfinite_grads") for layer in stats.layers
    }
    for layer, arrays in by_layer(grads).items():
        g = flat(arrays)
        assert got[f"grad_norm/{layer}"] == pytest.approx(np.linalg.norm(g), rel=1e-6)
        assert got[f"grad_max/{layer}"] == np.abs(g).max().astype(np.float32)
        assert got[f"nonfinite_grads/{layer}"] == 0
    squares_of = {
        layer: squares
        for group, squares_nF in stats.neuron_square_sum.items()
        for layer, squares in zip(layers_of(group), squares_nF, strict=True)
    }
    assert set(squares_of) == {f"block_{i}/mlp_up" for i in BLOCKS}
    for layer, squares in squares_of.items():
        arrays = by_layer(grads)[layer]
        columns = np.vstack([np.asarray(arrays["kernel"], np.float64), np.asarray(arrays["bias"], np.float64)])
        np.testing.assert_allclose(squares, (columns**2).sum(0), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_gradients_are_counted_in_their_layer(arrange, value):
    grads = make_tree(1)
    kernel = grads["block_2"]["mlp_up"]["kernel"]
    grads["block_2"]["mlp_up"]["kernel"] = kernel.at[1, 2].set(value).at[3, 3].set(value)
    grads["block_10"]["ln_1"]["scale"] = grads["block_10"]["ln_1"]["scale"].at[1].set(value)
    got = named(metrics.gradient_metrics(metrics.gradient_stats(arrange(grads))))
    counts = {name: v for name, v in got.items() if name.startswith("nonfinite")}
    assert counts.pop("nonfinite_grads/block_2/mlp_up") == 2
    assert counts.pop("nonfinite_grads/block_10/ln_1") == 1
    assert not any(counts.values()) and len(counts) == len(by_layer(grads)) - 2


def moments_after(arrange, stream):
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    state = adam.init(arrange(make_tree(0)))
    for grads in stream:
        _, state = adam.update(arrange(grads), state)
    return state


def test_gradient_snr_is_the_mean_ratio_of_bias_corrected_moments(arrange):
    stream = [make_tree(seed) for seed in range(5)]
    for grads in stream:
        grads["embed"]["embedding"] = grads["embed"]["embedding"].at[0].set(0.0)  # a row that never has a gradient
        kernel = grads["block_1"]["mlp_up"]["kernel"]
        grads["block_1"]["mlp_up"]["kernel"] = kernel.at[:, 1].set(0.0)
    got = named(metrics.gradient_snr(moments_after(arrange, stream), beta1=0.9, beta2=0.95))
    layers_of_stream = [by_layer(grads) for grads in stream]
    assert list(got) == [f"grad_snr/{layer}" for layer in layers_of_stream[0]]
    for layer in layers_of_stream[0]:
        m = v = 0.0
        for layers in layers_of_stream:
            g = flat(layers[layer])
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        m, v = m / (1 - 0.9**5), v / (1 - 0.95**5)
        expected = np.where(v > 0, np.abs(m) / np.sqrt(np.where(v > 0, v, 1)), 0).mean()
        assert got[f"grad_snr/{layer}"] == pytest.approx(expected, rel=1e-5)


def test_gradient_snr_is_one_for_a_constant_gradient(arrange):
    state = moments_after(arrange, [make_tree(7)] * 30)
    for value in named(metrics.gradient_snr(state, beta1=0.9, beta2=0.95)).values():
        assert value == pytest.approx(1.0, rel=1e-4)


def test_gradient_snr_of_one_gradient_is_not_defined(arrange):
    """|m| / sqrt(v) of a single gradient is 1 by construction, whatever the gradient is."""
    state = moments_after(arrange, [make_tree(7)])
    assert all(np.isnan(value) for value in named(metrics.gradient_snr(state, beta1=0.9, beta2=0.95)).values())


def test_unusable_moments_are_counted_in_their_layer(arrange):
    """Not finite in either moment, or a second one below zero; an element counts once."""
    mu, nu = make_tree(0), jax.tree.map(jnp.abs, make_tree(1))
    mu["block_3"]["mlp_up"]["kernel"] = mu["block_3"]["mlp_up"]["kernel"].at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
    nu["block_3"]["mlp_up"]["kernel"] = nu["block_3"]["mlp_up"]["kernel"].at[0, 0].set(jnp.inf).at[2, 2].set(-1.0)
    nu["ln_f"]["bias"] = nu["ln_f"]["bias"].at[3].set(-1e-30)
    state, tree = optax.ScaleByAdamState(jnp.int32(1), arrange(mu), arrange(nu)), arrange(make_tree(2))
    counts = metrics.change_norms(tree, tree, tree, state).nonfinite_moments
    expected = {"block_3/mlp_up": 3, "ln_f": 1}
    np.testing.assert_array_equal(counts, [expected.get(layer, 0) for layer in by_layer(mu)])


def test_update_and_parameter_metrics(arrange):
    params, updates = make_tree(0), make_tree(5, 1e-3)
    updates["block_0"]["mlp_up"]["kernel"] = updates["block_0"]["mlp_up"]["kernel"].at[0].set(0.0)
    params["block_7"]["mlp_up"]["bias"] = params["block_7"]["mlp_up"]["bias"].at[2].set(jnp.nan)
    raw, state = jax.tree.map(jnp.array, updates), moments_after(arrange, [make_tree(7)])
    raw["ln_f"]["bias"] = raw["ln_f"]["bias"].at[1].set(jnp.inf)
    of_params, of_updates, _ = metrics.change_norms(arrange(params), arrange(raw), arrange(updates), state)
    for tree, norms in ((params, of_params), (updates, of_updates)):
        alone = metrics.tree_norms(arrange(tree))
        for field in ("norm", "zeros", "size"):
            np.testing.assert_array_equal(getattr(norms, field), getattr(alone, field))
    np.testing.assert_array_equal(of_updates.nonfinite, [layer == "ln_f" for layer in by_layer(params)])
    got = named(metrics.joined([metrics.update_metrics(of_updates, of_params), metrics.parameter_metrics(of_params)]))
    statistics = ("update_norm", "update_ratio", "zero_update", "param_norm", "nonfinite_params")
    assert set(got) == {f"{name}/{layer}" for name in statistics for layer in by_layer(params)}
    for layer, arrays in by_layer(updates).items():
        u, p = flat(arrays), flat(by_layer(params)[layer])
        norm = pytest.approx(np.linalg.norm(p), rel=1e-6, nan_ok=True)
        ratio = pytest.approx(np.linalg.norm(u) / np.linalg.norm(p), rel=1e-6, nan_ok=True)
        assert got[f"update_norm/{layer}"] == pytest.approx(np.linalg.norm(u), rel=1e-6)
        assert got[f"param_norm/{layer}"] == norm and got[f"update_ratio/{layer}"] == ratio
        assert got[f"zero_update/{layer}"] == pytest.approx((u == 0).mean(), rel=1e-6)
        assert got[f"nonfinite_params/{layer}"] == (layer == "block_7/mlp_up")
    assert got["zero_update/block_0/mlp_up"] == pytest.approx(6 / 30)


def test_ranks_are_those_of_each_matrix_by_itself():
    tree = make_tree(0)
    got = metrics.rank_metrics(tree)
    matrices = {"embed": tree["embed"]["embedding"]} | {
        f"block_{i}/mlp_up": tree[f"block_{i}"]["mlp_up"]["kernel"] for i in BLOCKS
    }
    assert list(got) == [f"{name}/{layer}" for layer in matrices for name in rank_health(tree["embed"]["embedding"])]
    for layer, matrix in matrices.items():
        values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
        assert float(got[f"spectral_norm/{layer}"]) == pytest.approx(values[0], rel=1e-5)
        assert float(got[f"stable_rank/{layer}"]) == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-5)


def test_columns_keep_names_and_values_together():
    columns = jax.jit(lambda x: metrics.scalars({"b": x, "a/c": 2 * x}))(3.0)
    assert named(columns) == {"b": 3.0, "a/c": 6.0} and columns.names == ("b", "a/c")
    assert named(metrics.scalars({"b": 1, "a/c": True})) == {"b": 1.0, "a/c": 1.0}
    assert columns["b"] == 3.0 and columns["a/c"] == 6.0
    with pytest.raises(ValueError):
        columns["c"]


def test_columns_of_layers_go_statistic_by_statistic():
    columns = metrics.over(["y", "x"], {"s": np.float32([1, 2]), "r": jnp.array([True, False])}, "p/")
    assert columns.names == ("p/s/y", "p/s/x", "p/r/y", "p/r/x")
    np.testing.assert_array_equal(columns.values, np.float32([1, 2, 1, 0]))
    assert named(metrics.over([], {"s": np.float32([])})) == {} == named(metrics.over(["x"], {}))
    assert named(metrics.scalars({})) == {}


def test_columns_are_joined_in_their_order_and_no_name_comes_twice():
    a, b = metrics.scalars({"z": 1.0}), metrics.over(["y"], {"s": np.float32([2])})
    joined = metrics.joined(iter([a, b]))
    assert joined.names == ("z", "s/y") and named(joined) == {"z": 1, "s/y": 2}
    with pytest.raises(AssertionError, match="twice"):
        metrics.joined([a, b, a])


def test_activations_are_named_by_block():
    output = SimpleNamespace(act_amax_N=jnp.float32([3, 4]), act_rms_N=jnp.float32([1, 2]))
    got = named(metrics.activation_metrics(output))
    assert got == {"act_amax/block_0": 3, "act_amax/block_1": 4, "act_rms/block_0": 1, "act_rms/block_1": 2}


def fidelity(g, r):
    """By their formulas, in float64."""
    with np.errstate(divide="ignore"):
        return {
            "grad_cosine": g @ r / (np.linalg.norm(g) * np.linalg.norm(r)),
            "grad_sqnr_db": 10 * np.log10((r @ r) / ((g - r) @ (g - r))),
            "grad_flushed": ((g == 0) & (r != 0)).mean(),
        }


def test_gradient_fidelity_by_layer_and_over_all_elements(arrange):
    """Layers of different size, energy and error: over all elements by energy, and a mean of the layers by size."""
    rng = np.random.default_rng(2)

    def spoil(r, share):
        r = np.where(rng.random(r.shape) < 0.1, 0, r)
        g = np.where(rng.random(r.shape) < share, 0, r * (1 + share * rng.standard_normal(r.shape)))
        return jnp.float32(r), jnp.float32(g)

    pairs = {
        group: jax.tree.map(lambda r: spoil(r * 10.0 ** (-k / 2), 0.05 * (k + 1)), arrays)
        for k, (group, arrays) in enumerate(make_tree(1).items())
    }
    reference, grads = (
        jax.tree.map(lambda pair: pair[i], pairs, is_leaf=lambda node: isinstance(node, tuple)) for i in range(2)
    )
    found = named(metrics.gradient_fidelity(arrange(grads), arrange(reference)))
    g_of, r_of = by_layer(grads), by_layer(reference)
    expected = fidelity(*(np.concatenate([flat(arrays) for arrays in of.values()]) for of in (g_of, r_of)))
    for layer, arrays in g_of.items():
        expected |= {f"{name}/{layer}": value for name, value in fidelity(flat(arrays), flat(r_of[layer])).items()}
    sizes = [flat(arrays).size for arrays in g_of.values()]
    cosines, sqnr = ([expected[f"{name}/{layer}"] for layer in g_of] for name in ("grad_cosine", "grad_sqnr_db"))
    noise = np.average(10 ** (-np.array(sqnr) / 10), weights=sizes)
    expected |= {
        "grad_cosine_by_size": np.average(cosines, weights=sizes),
        "grad_sqnr_db_by_size": -10 * np.log10(noise),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5), name
    for name in ("grad_cosine", "grad_sqnr_db", "grad_flushed"):
        mean_of_layers = np.mean([float(found[f"{name}/{layer}"]) for layer in g_of])
        assert float(found[name]) != pytest.approx(mean_of_layers, rel=1e-2)
    assert set(metrics.gradient_fidelity(arrange(grads), arrange(reference), "_x").names) == {
        name.replace(name.split("/")[0], name.split("/")[0] + "_x") for name in expected
    }


def test_the_fidelity_of_a_gradient_to_itself_and_to_its_opposite():
    tree = make_tree(3)
    same = metrics.gradient_fidelity(tree, tree)
    assert same["grad_cosine"] == pytest.approx(1, rel=1e-6) and same["grad_sqnr_db"] == np.inf
    opposite = metrics.gradient_fidelity(jax.tree.map(jnp.negative, tree), tree)
    assert opposite["grad_cosine"] == pytest.approx(-1, rel=1e-6)
    assert opposite["grad_sqnr_db"] == pytest.approx(-20 * np.log10(2), rel=1e-5)
    assert same["grad_cosine_by_size"] == pytest.approx(1, rel=1e-6) and same["grad_sqnr_db_by_size"] == np.inf
    nothing = metrics.gradient_fidelity(jax.tree.map(jnp.zeros_like, tree), tree)
    assert nothing["grad_flushed"] == 1 and nothing["grad_sqnr_db"] == 0
    assert nothing["grad_cosine_by_size"] == 0 and nothing["grad_sqnr_db_by_size"] == 0


def test_a_gradient_most_of_which_has_the_wrong_sign_is_seen_by_size():
    """A layer of 10 large numbers is right, 9990 small ones in another are reversed: 99.9% have the wrong sign."""
    reference = {
        "embed": {"embedding": jnp.full(10, 10.0)},
        "ln_f": {"scale": jnp.full(9990, 1e-3)},
        "pos_embed": {"embedding": jnp.zeros(10)},  # a reference of 0 says nothing
    }
    grads = reference | {"ln_f": {"scale": jnp.full(9990, -1e-3)}}
    found = metrics.gradient_fidelity(grads, reference)
    assert found["grad_cosine"] == pytest.approx(0.99998, abs=1e-5)
    assert found["grad_cosine_by_size"] == pytest.approx((10 - 9990) / 10000)
    assert found["grad_sqnr_db"] > 40 and found["grad_sqnr_db_by_size"] == pytest.approx(-10 * np.log10(4 * 0.999))
    spoilt = grads | {"embed": {"embedding": jnp.full(10, jnp.nan)}}
    assert np.isnan(metrics.gradient_fidelity(spoilt, reference)["grad_cosine_by_size"])
