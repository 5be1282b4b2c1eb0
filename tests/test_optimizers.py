"""Schedules, clipping and the optimizers against optax, NumPy in float64 and the tables of the formats."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import formats, optimizers
from altgrad_jax.numerics.products import scale_for
from altgrad_jax.numerics.rounding import Grid, format_params, stochastic_seed, to_grid
from altgrad_jax.numerics.rules import SCHEDULES

SETTINGS = dict(peak=6e-4, warmup_steps=10, max_steps=100, min_lr_ratio=0.1, decay_steps=20)


def rates(schedule, **overrides):
    return np.array([optimizers.learning_rate(k, schedule=schedule, **{**SETTINGS, **overrides}) for k in range(100)])


@pytest.mark.parametrize("schedule", SCHEDULES)
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
    ours = optimizers.adamw(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    theirs = optax.adamw(
        lambda k: 1e-2 * jnp.minimum(1.0, (k + 1) / 5),
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        mask={"a": {"kernel": True, "bias": False}},
    )
    params = reference = tree(0)
    state, their_state = ours.init(params), theirs.init(params)
    for k in range(20):
        grads = tree(k + 1)
        direction, state = ours.update(grads, state, params)
        rate = optimizers.learning_rate(
            k, peak=1e-2, warmup_steps=5, max_steps=20, schedule="constant", min_lr_ratio=0.1, decay_steps=20
        )
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        updates, their_state = theirs.update(grads, their_state, reference)
        reference = optax.apply_updates(reference, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7), params, reference)
    assert optimizers.adam_moments(state).count == 20


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
def test_clipping_is_optax_clip_by_global_norm(scale):
    grads = tree(3, scale)
    factor = optimizers.clip_factor(optax.tree.norm(grads), 1.0)
    expected, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g * factor, e, rtol=1e-6), grads, expected)


def test_clipping_can_be_turned_off_and_survives_a_zero_gradient():
    assert optimizers.clip_factor(jnp.float32(1e9), 0.0) == 1.0
    assert optimizers.clip_factor(jnp.float32(0.0), 1.0) == 1.0


# The optimizers that know the format. One matrix has a grid, another and a vector have none.

ADAM = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
QUANTIZED = {"a": True, "b": False, "bias": False}
NO_GRIDS = dict.fromkeys(QUANTIZED)
RATE = 6e-4


def model_tree(seed, scale):
    rng = np.random.default_rng(seed)
    shapes = {"a": (6, 8), "b": (5, 7), "bias": (7,)}
    return {name: jnp.asarray(rng.normal(0, scale, shape), jnp.float32) for name, shape in shapes.items()}


def grid_of(name, w):
    params = format_params(formats.get_format(name))
    return Grid(params, scale_for(jnp.max(jnp.abs(w)), params))


def make(name):
    return optimizers.make(name, **ADAM, is_quantized=QUANTIZED)


def extra(k=0, **given):
    return dict(learning_rate=RATE, seed=stochastic_seed(0, k, 0)) | given


def numbers_of(name):
    """The magnitudes of a format by code, float64."""
    fmt = formats.get_format(name)
    return formats.decode(fmt, np.arange(fmt.max_code + 1))


def reference_ulp(name, scale, w):
    """Distance from the number at or below |w| to the next one, from the table of the format, float64."""
    numbers = numbers_of(name)
    below = np.searchsorted(numbers, np.abs(np.float64(w)) * float(scale), side="right") - 1
    return np.diff(numbers)[np.minimum(below, numbers.size - 2)] / float(scale)


def reference_codes(name, scale, w):
    """Signed codes of weights on the grid, and a failure for those that are not."""
    x = np.float64(w) * float(scale)
    numbers = numbers_of(name)
    codes = np.searchsorted(numbers, np.abs(x))
    np.testing.assert_array_equal(numbers[codes], np.abs(x))
    return np.where(x < 0, -codes, codes)


class ReferenceAdam:
    """Kingma & Ba 2015, algorithm 1, in float64, up to the step size."""

    def __init__(self):
        self.t, self.m, self.v = 0, 0.0, 0.0

    def __call__(self, g):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.95 * self.v + 0.05 * g**2
        return self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.95**self.t)) + 1e-8)


def bits(tree):
    return [np.asarray(leaf).view(np.uint32) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_without_grids_is_adamw_bit_for_bit(name):
    plain = optimizers.adamw(**ADAM)
    own = optimizers.make(name, **ADAM, is_quantized=lambda params: jax.tree.map(lambda _: False, params))
    params = model_tree(0, 0.02)
    plain_state, state = plain.init(params), own.init(params)
    plain_update, update = jax.jit(plain.update), jax.jit(own.update)
    for k in range(5):
        grads = model_tree(k + 1, 1e-3)
        expected, plain_state = plain_update(grads, plain_state, params)
        direction, state = update(grads, state, params, grids=NO_GRIDS, **extra(k))
        for a, b in zip(bits(direction), bits(expected), strict=True):
            np.testing.assert_array_equal(a, b)
        params = jax.tree.map(lambda p, d: p - RATE * d, params, expected)
    moments = optimizers.adam_moments(plain_state)
    for a, b in zip(bits(optimizers.adam_moments(state)), bits(moments), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_tensors_without_a_grid_get_adamw_beside_one_that_has(name):
    params, grads = model_tree(0, 0.02), model_tree(1, 1e-3)
    plain, own = optimizers.adamw(**ADAM), make(name)
    expected, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    grids = NO_GRIDS | {"a": grid_of("E4M3", params["a"])}
    direction, _ = jax.jit(own.update)(grads, own.init(params), params, grids=grids, **extra())
    for leaf in ("b", "bias"):
        np.testing.assert_array_equal(direction[leaf], expected[leaf])
    assert np.array_equal(direction["a"], expected["a"]) == (name == "adamw")


def test_adamw_by_name_has_the_state_of_adamw():
    params = model_tree(0, 0.02)
    assert jax.tree.structure(make("adamw").init(params)) == jax.tree.structure(optimizers.adamw(**ADAM).init(params))


def test_preconditioned_gradients_then_adamw_as_in_float64():
    """The largest weight and two small ones are clamped, zero to the lower end."""
    clamp = (2.0**-12, 2.0**-8)
    opt = optimizers.ulp_precondition_before_adam(**ADAM, clamp=clamp)
    params = model_tree(0, 0.02)
    params["a"] = params["a"].at[0, :4].set(jnp.float32([0.0, 1e-5, -1e-40, 0.5]))
    grids = NO_GRIDS | {"a": grid_of("E4M3", params["a"])}
    state, adam, update = opt.init(params), ReferenceAdam(), jax.jit(opt.update)
    for k in range(6):
        grads = model_tree(k + 1, 1e-3)
        w = np.float64(params["a"])
        exponent = np.frexp(w)[1] - 1  # frexp's mantissa lies in [0.5, 1)
        factor = np.clip(np.where(w == 0, 0, 2.0 ** (exponent - 3)), *clamp)
        if k == 0:
            assert np.all(factor[0, :4] == [clamp[0], clamp[0], clamp[0], clamp[1]])
            assert set(np.unique(factor)) == {2.0**e for e in range(-12, -7)}
        expected = adam(factor * np.float64(grads["a"])) + 0.1 * w
        direction, state = update(grads, state, params, grids=grids)
        np.testing.assert_allclose(direction["a"], expected, rtol=2e-5, atol=1e-6)
        params = jax.tree.map(lambda p, d: p - 5e-3 * d, params, direction)
    assert optimizers.adam_moments(state).count == 6


def test_preconditioning_reads_exponents_exactly():
    """Powers of two and the float32 numbers below them, over the whole range of the default clamp."""
    power = 2.0 ** np.arange(-13, 4, dtype=np.float32)
    w = jnp.asarray(np.concatenate([power, np.nextafter(power, np.float32(0))]))
    opt = optimizers.ulp_precondition_before_adam(**ADAM, grids=Grid(format_params(formats.get_format("E4M3")), 1.0))
    _, state = opt.update(jnp.ones_like(w), opt.init(w), w)
    below = np.maximum(power / 2, 2.0**-13)
    np.testing.assert_allclose(optimizers.adam_moments(state).mu, 0.1 * np.concatenate([power, below]) / 8, rtol=1e-6)


@pytest.mark.parametrize(
    "name, floor, equal",
    [("E4M3", 2.0**-8, "rms"), ("E5M2", 2.0**-3, "rms"), ("E2M5", 0.0, "rms"), ("E7M0", 2.0**-8, "mean")],
)
def test_ulp_adamw_as_in_float64(name, floor, equal):
    opt = optimizers.ulp_adamw(**ADAM, floor=floor, equal=equal)
    params = model_tree(0, 0.02)
    params["a"] = params["a"].at[0, :2].set(jnp.float32([0.0, 1e-5]))
    grids = NO_GRIDS | {"a": grid_of(name, params["a"])}
    state, adam, update = opt.init(params), ReferenceAdam(), jax.jit(opt.update)
    for k in range(6):
        grads = model_tree(k + 1, 1e-3)
        ulps = reference_ulp(name, grids["a"].scale, params["a"])
        u = np.maximum(ulps, floor * ulps.max())
        size = u.mean() if equal == "mean" else np.sqrt(np.mean(u**2))
        expected = adam(np.float64(grads["a"])) * u / size + 0.1 * np.float64(params["a"])
        direction, state = update(grads, state, params, grids=grids)
        np.testing.assert_allclose(direction["a"], expected, rtol=2e-5, atol=1e-6)
        params = jax.tree.map(lambda p, d: p - 5e-3 * d, params, direction)
    assert optimizers.adam_moments(state).count == 6


def test_ulp_adamw_keeps_the_rms_of_adams_step_and_ulp_adamw_mean_its_mean_size():
    """Of a gradient that has nothing to do with the weights: 1.27 is what the RMS was before."""
    params, grads = {"a": jnp.float32(0.02) * jax.random.normal(jax.random.key(0), (256, 256))}, {}
    grads["a"] = jax.random.normal(jax.random.key(1), (256, 256))
    grids, settings = {"a": grid_of("E4M3", params["a"])}, ADAM | {"weight_decay": 0.0}
    step = {}
    for name in ("adamw", "ulp_adamw", "ulp_adamw_mean"):
        opt = optimizers.make(name, **settings, is_quantized=True)
        step[name] = np.float64(opt.update(grads, opt.init(params), params, grids=grids)[0]["a"])
    rms = {name: np.sqrt(np.mean(d**2)) / np.sqrt(np.mean(step["adamw"] ** 2)) for name, d in step.items()}
    mean = {name: np.abs(d).mean() / np.abs(step["adamw"]).mean() for name, d in step.items()}
    assert rms["ulp_adamw"] == pytest.approx(1, abs=0.01) and rms["ulp_adamw_mean"] == pytest.approx(1.27, abs=0.03)
    assert mean["ulp_adamw_mean"] == pytest.approx(1, abs=0.01)
    with pytest.raises(UserError, match="equal='max' cannot be used: give rms or mean"):
        optimizers.ulp_adamw(**ADAM, equal="max")


def test_ulp_adamw_on_a_fixed_point_grid_is_adamw():
    params = model_tree(0, 0.02)
    plain, own = optimizers.adamw(**ADAM), make("ulp_adamw")
    plain_state, state = plain.init(params), own.init(params)
    for k in range(3):
        grads = model_tree(k + 1, 1e-3)
        expected, plain_state = plain.update(grads, plain_state, params)
        direction, state = own.update(grads, state, params, grids=NO_GRIDS | {"a": grid_of("E0M7", params["a"])})
        np.testing.assert_allclose(direction["a"], expected["a"], rtol=1e-6)


def test_adam_divides_a_scaling_of_the_gradient_out_again_but_not_one_of_its_step():
    """60 noisy gradients of one matrix, whose weights pass powers of two on the way: mean cosine with AdamW's step."""
    settings = ADAM | {"weight_decay": 0.0}
    names = ("adamw", "ulp_precondition_before_adam", "ulp_adamw")
    opts = {name: optimizers.make(name, **settings, is_quantized=True) for name in names}
    rng = np.random.default_rng(0)
    w, mean = jnp.asarray(rng.normal(0, 0.02, (64, 64)), jnp.float32), rng.normal(0, 1e-3, (64, 64))
    states = {name: opt.init(w) for name, opt in opts.items()}

    @jax.jit
    def step(grads, states, w):
        grids = grid_of("E4M3", w)
        out = {name: opt.update(grads, states[name], w, grids=grids) for name, opt in opts.items()}
        directions = {name: direction for name, (direction, _) in out.items()}
        plain = directions["adamw"]
        cosine = {
            name: jnp.vdot(d, plain) / (jnp.linalg.norm(d) * jnp.linalg.norm(plain)) for name, d in directions.items()
        }
        return cosine, {name: state for name, (_, state) in out.items()}, w - RATE * plain

    start, cosines = w, []
    for _ in range(60):
        grads = jnp.asarray(mean + rng.normal(0, 5e-3, w.shape), jnp.float32)
        cosine, states, w = step(grads, states, w)
        cosines.append(cosine)
    mean_cosine = {name: np.mean([cosine[name] for cosine in cosines]) for name in names}
    assert np.mean(np.frexp(start)[1] != np.frexp(w)[1]) > 0.1  # S did change
    assert mean_cosine["ulp_precondition_before_adam"] >= 0.95
    assert 0.5 < mean_cosine["ulp_adamw"] < 0.9


def on_grid_tree(name, seed=0, scale=0.02):
    """Params whose matrix `a` lies on its grid, and the grids; zero and, of a narrow format, both its ends included."""
    params = model_tree(seed, scale)
    grid = grid_of(name, params["a"])
    top = min(grid.format.max_finite / grid.scale, jnp.max(jnp.abs(params["a"])) * 2)
    params["a"] = to_grid(params["a"].at[0, :3].set(jnp.float32([0.0, top, -top])), grid)
    return params, NO_GRIDS | {"a": grid}


@pytest.mark.parametrize(
    "name, max_codes, rate, clips",
    [
        ("E4M3", 1, 6e-4, True),
        ("E4M3", 5, 2e-2, True),
        ("E0M7", 1, 6e-4, True),
        ("E7M0", 1, 6e-4, False),
        ("BF16", 64, 6e-4, False),
    ],
)
def test_grid_moves_weights_by_whole_codes_with_the_mean_of_float64(name, max_codes, rate, clips):
    """Four updates from the momentum on, each drawn with 2000 seeds, one of which decides where the next starts."""
    opt = optimizers.grid(**ADAM, max_codes=max_codes, is_quantized=QUANTIZED)
    params, grids = on_grid_tree(name)
    grid, n_draws = grids["a"], 2000
    state, momentum, n_clipped = opt.init(params), 0.0, 0
    draw = jax.jit(
        jax.vmap(
            lambda grads, state, params, seed: opt.update(
                grads, state, params, grids=grids, learning_rate=rate, seed=seed
            ),
            (None, None, None, 0),
            (0, None),
        )
    )
    for t in range(1, 5):
        grads, w = model_tree(t, 1e-3), params["a"]
        momentum = 0.9 * momentum + 0.1 * np.float64(grads["a"])
        m_hat = momentum / (1 - 0.9**t)
        ulps = reference_ulp(name, grid.scale, w)
        c = m_hat / (np.sqrt(np.mean(m_hat**2)) + 1e-8) / ulps.mean() + 0.1 * np.float64(w) / ulps
        n_clipped += np.sum(np.abs(rate * c) > max_codes)
        c = np.clip(-rate * c, -max_codes, max_codes)
        seeds = jax.vmap(lambda i: stochastic_seed(1, t, i))(jnp.arange(n_draws))
        directions, state = draw(grads, state, params, seeds)

        raw = w + (-rate * directions["a"])
        new = np.asarray(to_grid(raw, grid))
        largest = np.maximum(np.abs(new), np.abs(w))
        assert np.all(np.abs(raw - new) <= np.spacing(largest))
        old_codes = reference_codes(name, grid.scale, w)
        n = reference_codes(name, grid.scale, new) - old_codes
        free = np.abs(old_codes) <= numbers_of(name).size - 1 - max_codes
        if name == "BF16":
            free &= old_codes != 0  # its subnormals divided by the scale are zero in float32
        near = np.abs(c - np.round(c)) < 1e-4  # float32 may see such a number on the other side of a whole one
        assert np.all(((n == np.floor(c)) | (n == np.ceil(c)) | near)[:, free]) and np.max(np.abs(n)) <= max_codes
        p = c - np.floor(c)
        error = np.sqrt(p * (1 - p) / n_draws)
        assert np.all((np.abs(n.mean(0) - c) <= 4 * error + 1e-4)[free])
        outward = ~free & (c * np.asarray(w) > 0)
        assert np.all(np.abs(new)[:, outward] <= numbers_of(name)[-1] / float(grid.scale))
        params = params | {"a": jnp.asarray(new[0])}
    assert (n_clipped > 0) == clips
    moments = optimizers.adam_moments(state)
    np.testing.assert_allclose(moments.mu["a"], momentum, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(moments.nu["a"], 0.0)
    assert moments.count == 4


def test_grid_saturates_at_the_largest_number():
    params, grids = on_grid_tree("E4M3")
    grads = jax.tree.map(lambda w: -jnp.sign(w), params)  # outwards
    opt = optimizers.grid(**ADAM | {"weight_decay": 0.0}, max_codes=3, is_quantized=QUANTIZED)
    direction, _ = opt.update(grads, opt.init(params), params, grids=grids, **extra(learning_rate=1.0))
    new = params["a"] - direction["a"]
    top = grids["a"].format.max_finite / grids["a"].scale
    np.testing.assert_array_equal(new[0, :3], jnp.float32([0.0, top, -top]))
    old_codes = reference_codes("E4M3", grids["a"].scale, params["a"])
    expected = np.clip(old_codes + 3 * np.sign(old_codes), -126, 126)
    np.testing.assert_array_equal(reference_codes("E4M3", grids["a"].scale, new), expected)


def test_grid_moves_weights_off_the_grid_by_whole_ulps():
    params = model_tree(0, 0.02)
    params["a"] = params["a"].at[0, 0].set(0.5)  # beyond the largest number of the grid
    grids = NO_GRIDS | {"a": grid_of("E4M3", params["a"][1:])}
    opt = optimizers.grid(**ADAM, max_codes=4, is_quantized=QUANTIZED)
    direction, _ = opt.update(model_tree(1, 1e-3), opt.init(params), params, grids=grids, **extra(learning_rate=5e-3))
    ulps = reference_ulp("E4M3", grids["a"].scale, params["a"])
    n = -5e-3 * np.float64(direction["a"]) / ulps
    np.testing.assert_allclose(n, np.round(n), atol=1e-4)
    assert 1 < np.max(np.abs(n)) < 4.1


def test_grid_is_a_function_of_its_seed_and_draws_for_each_tensor_anew():
    w, grads = jnp.asarray(on_grid_tree("E4M3")[0]["a"]), model_tree(1, 1e-3)["a"]
    params, grads = {"x": w, "y": w}, {"x": grads, "y": grads}
    opt = optimizers.grid(**ADAM, grids=dict.fromkeys("xy", grid_of("E4M3", w)))

    def direction(k):
        return opt.update(grads, opt.init(params), params, **extra(k))[0]

    first = direction(0)
    np.testing.assert_array_equal(first["x"], direction(0)["x"])
    assert np.any(first["x"] != first["y"])
    assert np.any(first["x"] != direction(1)["x"])


def test_grid_at_rate_zero_and_with_no_gradient_stays_and_with_nan_shows_it():
    params, grids = on_grid_tree("E4M3")
    opt = optimizers.grid(**ADAM | {"weight_decay": 0.0}, is_quantized=QUANTIZED)
    for grads, rate in ((model_tree(1, 1e-3), 0.0), (jax.tree.map(jnp.zeros_like, params), RATE)):
        direction, _ = opt.update(grads, opt.init(params), params, grids=grids, **extra(learning_rate=rate))
        np.testing.assert_array_equal(direction["a"], 0.0)
    grads = jax.tree.map(lambda g: g.at[0].set(jnp.nan), params)
    direction, _ = opt.update(grads, opt.init(params), params, grids=grids, **extra())
    assert np.all(np.isnan(direction["a"])) and np.isnan(direction["bias"]).tolist() == [True] + 6 * [False]


def test_grid_shows_an_infinite_momentum_in_the_whole_tensor():
    """Its RMS is infinite: divided by it every other element would pass for one that stays."""
    params, grids = on_grid_tree("E4M3")
    opt = optimizers.grid(**ADAM, is_quantized=QUANTIZED)
    state = opt.init(params)
    state = state._replace(momentum=state.momentum | {"a": state.momentum["a"].at[0, 0].set(np.inf)})
    direction, _ = opt.update(model_tree(1, 1e-3), state, params, grids=grids, **extra())
    assert np.isnan(direction["a"]).all()
    assert all(np.isfinite(direction[name]).all() for name in direction if name != "a")


def test_grid_keeps_no_second_moment_where_there_is_a_grid():
    params = model_tree(0, 0.02)
    state = make("grid").init(params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes == sorted([params["a"].size] + 2 * [params["b"].size] + 2 * [params["bias"].size] + [1])
    moments = optimizers.adam_moments(state)
    assert jax.tree.map(jnp.shape, moments.mu) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, moments.nu) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_states_are_named_arrays(name):
    """Checkpoints name an array by the fields, dict keys and positions on the way to it."""
    state = make(name).init(model_tree(0, 0.02))
    named = (jax.tree_util.GetAttrKey, jax.tree_util.DictKey, jax.tree_util.SequenceKey)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        assert isinstance(leaf, jax.Array) and all(isinstance(key, named) for key in path)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_formats_side_by_side_under_vmap(name):
    params, grads, opt = model_tree(0, 0.02), model_tree(1, 1e-3), make(name)
    state = opt.init(params)
    chosen = [NO_GRIDS | {"a": grid_of(fmt, params["a"])} for fmt in ("E4M3", "E5M2", "E0M7", "E7M0")]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chosen)
    update = jax.jit(lambda grids: opt.update(grads, state, params, grids=grids, **extra()))
    together = jax.vmap(update)(stacked)
    for i, grids in enumerate(chosen):
        one = update(grids)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-5), together, one)


@pytest.mark.parametrize("name", ["ulp_precondition_before_adam", "ulp_adamw", "grid"])
def test_in_an_ordinary_optax_loop_the_loss_falls(name):
    """A quadratic in one matrix on E4M3's grid, one vector without; the grids are given at construction."""
    goal = model_tree(1, 0.02)
    params, grids = on_grid_tree("E4M3")
    rate = 2e-3
    opt = optax.chain(
        getattr(optimizers, name)(**ADAM | {"weight_decay": 0.0}, grids=grids), optax.scale_by_learning_rate(rate)
    )

    def loss(params):
        return sum(jnp.sum(jnp.square(params[k] - goal[k])) for k in params)

    @jax.jit
    def step(params, state, k):
        given = extra(k, learning_rate=rate) if name == "grid" else {}
        updates, state = opt.update(jax.grad(loss)(params), state, params, **given)
        params = optax.apply_updates(params, updates)
        return (params | {"a": to_grid(params["a"], grids["a"])} if name == "grid" else params), state

    start, state = loss(params), opt.init(params)
    for k in range(60):
        params, state = step(params, state, k)
    assert loss(params) < 0.2 * start


def test_grids_of_a_call_win_over_those_of_the_construction():
    params, grads = model_tree(0, 0.02), model_tree(1, 1e-3)
    fine, coarse = (NO_GRIDS | {"a": grid_of(fmt, params["a"])} for fmt in ("E0M7", "E4M3"))
    built = optimizers.ulp_adamw(**ADAM, grids=fine)
    state = built.init(params)
    expected, _ = make("ulp_adamw").update(grads, state, params, grids=coarse)
    np.testing.assert_array_equal(built.update(grads, state, params, grids=coarse)[0]["a"], expected["a"])
    assert np.any(built.update(grads, state, params)[0]["a"] != expected["a"])


@pytest.mark.parametrize("name", ["ulp_precondition_before_adam", "ulp_adamw", "grid"])
def test_missing_and_unfit_arguments_of_a_call_are_named(name):
    params, opt = model_tree(0, 0.02), make(name)
    state, grid = opt.init(params), grid_of("E4M3", params["a"])

    def refused(match, params=params, **given):
        with pytest.raises(UserError, match=match):
            opt.update(model_tree(1, 1e-3), state, params, **extra() | given)

    refused("needs the grids of the weights: give grids")
    refused("needs the parameters", params=None, grids=NO_GRIDS | {"a": grid})
    refused("another structure than the params", grids={"a": grid})
    refused("grids holds a str", grids=NO_GRIDS | {"a": "E4M3"})
    refused("dtype bfloat16", params=params | {"a": params["a"].astype(jnp.bfloat16)}, grids=NO_GRIDS | {"a": grid})
    if name == "grid":
        refused("grids does not fit is_quantized", grids=NO_GRIDS)
        refused("grids does not fit is_quantized", grids=NO_GRIDS | {"a": grid, "b": grid})
        refused("needs learning_rate and seed", grids=NO_GRIDS | {"a": grid}, seed=None)
        refused("needs learning_rate and seed", grids=NO_GRIDS | {"a": grid}, learning_rate=None)


def test_unusable_settings_are_named():
    with pytest.raises(UserError, match="no optimizer 'lion': give one of adamw, ulp_precondition_before_adam, ulp_ad"):
        optimizers.make("lion", **ADAM, is_quantized=QUANTIZED)
    for clamp in ((0.0, 1.0), (1.0, 0.5), (1.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(UserError, match="clamp="):
            optimizers.ulp_precondition_before_adam(**ADAM, clamp=clamp)
    for floor in (-0.1, 1.1, np.nan):
        with pytest.raises(UserError, match="floor="):
            optimizers.ulp_adamw(**ADAM, floor=floor)
    for max_codes in (0, 1.5, 2**22 + 1, np.nan):
        with pytest.raises(UserError, match="max_codes="):
            optimizers.grid(**ADAM, max_codes=max_codes, is_quantized=QUANTIZED)
    with pytest.raises(UserError, match="give is_quantized or grids"):
        optimizers.grid(**ADAM)
    with pytest.raises(UserError, match="is_quantized has another structure"):
        optimizers.grid(**ADAM, is_quantized={"a": True}).init(model_tree(0, 0.02))
