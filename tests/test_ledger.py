"""The update ledger and the storing of weights against NumPy in float64, one weight at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.numerics import ledger
from altgrad_jax.numerics.formats import DEFAULT_8BIT, decode, encode, get_format, round_reference
from altgrad_jax.numerics.products import scale_for
from altgrad_jax.numerics.rounding import Grid, format_params, stochastic_seed, to_grid, ulp

WIDE_AND_NARROW = ("E0M7", "E4M3", "E5M2", "E7M0")

store = jax.jit(ledger.store)
entries = jax.jit(ledger.entries)
scale_flips = jax.jit(ledger.scale_flips)


def normal(seed, shape, std):
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def code_of(fmt, x):
    """Signed code of one number, by the table of the format."""
    code = int(encode(fmt, x))
    return -(code - fmt.n_magnitudes) if code >= fmt.n_magnitudes else code


def grid_for(name, w):
    params = format_params(get_format(name))
    return Grid(params, scale_for(jnp.max(jnp.abs(w)), params))


def on_grid(fmt, scale, w):
    return round_reference(fmt, np.float64(w) * float(scale)) / float(scale)


def reference(fmt, scale, w, new_w, update, age, unlost):
    """Sums by name over one matrix, and the new ages: a Python loop over its weights."""
    ages = []
    sums = dict.fromkeys(("elements", "updates", "flips", "stay", "lost", "dot", "energy", "missed", "codes"), 0.0)
    for old, new, u, updates, owed in zip(w.flat, new_w.flat, update.flat, age.flat, unlost.flat, strict=True):
        codes = [code_of(fmt, float(v) * scale) for v in (old, new)]
        arrived = np.diff(round_reference(fmt, np.float64([old, new]) * scale) / scale)[0]
        moved = codes[0] != codes[1]
        ages.append(0 if moved else min(int(updates) + 1, 65535))
        u = float(u)
        for name, value in (("elements", 1), ("updates", u != 0), ("flips", moved), ("dot", u * arrived),
                            ("stay", u != 0 and not moved), ("energy", u * u),
                            ("lost", u != 0 and not moved and not owed), ("missed", (u - arrived) ** 2),
                            ("codes", abs(codes[1] - codes[0]))):  # fmt: skip
            sums[name] += value
    return sums | {"age": sum(ages), "scale_flips": 3.0}, np.reshape(ages, age.shape)


def expected_metrics(s):
    return {"flip": s["flips"] / s["elements"], "not_flipped": s["stay"] / s["elements"],
            "stall_ratio": 1 - s["flips"] / s["updates"], "update_gain": s["dot"] / s["energy"],
            "update_error": np.sqrt(s["missed"] / s["energy"]), "ulps_moved": s["codes"] / s["elements"],
            "scale_flip": s["scale_flips"] / s["elements"], "code_age": s["age"] / s["elements"]}  # fmt: skip


def of_one(sums):
    """The metrics of one stored layer, which are those of all layers together too."""
    (named, together) = ledger.ledger_metrics(sums[None], stored=True, ages=False)
    assert set(named) == set(together)
    for key, values in named.items():
        np.testing.assert_array_equal(values, [together[key]])
    return together


def layer(name, shape, seed):
    """w, new_w, update, age, unlost of a layer: master weights off the grid, some at zero, some without an update."""
    rng = np.random.default_rng(seed)
    w, update = normal(seed, shape, 0.02), normal(seed + 1, shape, 2e-3)
    w[0, :3] = 0.0
    update[rng.random(shape) < 0.2] = 0.0
    age = rng.choice(np.uint16([0, 3, 65534, 65535]), shape)
    return w, w + update, update, age, rng.random(shape) < 0.3


@pytest.mark.parametrize("name", WIDE_AND_NARROW)
def test_entries_and_metrics_are_those_of_a_loop_over_the_weights(name):
    """Two layers of different size, with a scale each: the totals are over all weights, not a mean of layers."""
    fmt = get_format(name)
    sums, expected, totals = [], {}, {}
    for label, shape, seed in (("a", (4, 5), 1), ("b", (12, 20), 2)):
        w, new_w, update, age, unlost = layer(label, shape, seed)
        grid = grid_for(name, w * 4)  # a coarse scale, so that weights stay in E0M7 too
        got, new_age = entries(w, new_w, update, grid, age=age, unlost=unlost)
        sums.append(ledger.with_scale_flips(got, 3.0))
        wanted, ages = reference(fmt, float(grid.scale), w, new_w, update, age, unlost)
        np.testing.assert_array_equal(new_age, ages.reshape(shape))
        assert new_age.dtype == jnp.uint16
        assert 0 < wanted["flips"] < wanted["updates"] < wanted["elements"]
        assert float(ledger.lost_share(got)) == pytest.approx(wanted["lost"] / wanted["elements"], rel=1e-6)
        totals = {key: totals.get(key, 0) + value for key, value in wanted.items()}
        for key, value in expected_metrics(wanted).items():
            expected.setdefault(key, []).append(value)
    sums_SF = jnp.stack(sums)
    together = expected_metrics(totals)
    found, overall = ledger.ledger_metrics(sums_SF, stored=False, ages=True)
    assert set(found) == set(overall) == set(expected) == set(together)
    for key, values in expected.items():
        assert found[key].shape == (2,) and overall[key].shape == ()
        np.testing.assert_allclose(found[key], values, rtol=2e-5, err_msg=key)
        assert float(overall[key]) == pytest.approx(together[key], rel=2e-5), key
    of_stored, all_stored = ledger.ledger_metrics(sums_SF, stored=True, ages=False)
    assert set(of_stored) == set(all_stored) == set(expected) - {"code_age"} | {"lost_update"}
    np.testing.assert_array_equal(of_stored["lost_update"], ledger.lost_share(sums_SF))
    assert float(all_stored["lost_update"]) == pytest.approx(totals["lost"] / totals["elements"], rel=1e-6)
    assert (of_stored["lost_update"] < of_stored["not_flipped"]).all()


def test_without_residuals_every_update_that_moves_no_code_is_lost():
    w = np.float32([[0.5, 0.5, 0.25, 0.0]])
    update = np.float32([[0.4, 0.001, 0.0, 1e-6]])
    got, age = entries(w, w + update, update, Grid(format_params(get_format("E0M7")), 1.0))
    assert age is None
    found = of_one(got)
    assert (
        found["lost_update"] == found["not_flipped"] == 2 / 4
        and found["flip"] == 1 / 4
        and found["ulps_moved"] == round(0.4 * 128) / 4
    )
    assert found["stall_ratio"] == pytest.approx(2 / 3)


def test_without_any_update_ratios_are_not_applicable():
    w = normal(0, (4, 4), 0.02)
    got, _ = entries(w, w, 0 * w, grid_for("E4M3", w))
    found = of_one(got)
    assert found["flip"] == found["lost_update"] == found["not_flipped"] == 0
    assert all(np.isnan(found[name]) for name in ("stall_ratio", "update_gain", "update_error"))


def test_scale_flips_are_the_weights_that_lie_elsewhere_on_the_new_grid():
    """Three matrices at once: the scale of one does not change; those of the others halve and grow fourfold."""
    w = normal(3, (3, 8, 9), 0.02)
    for name in WIDE_AND_NARROW:
        fmt = get_format(name)
        before = np.asarray(jax.vmap(lambda w: grid_for(name, w).scale)(w))
        after = before * np.float32([1, 0.5, 4])
        params = jax.tree.map(lambda leaf: np.stack([leaf] * 3), format_params(fmt))
        grids = [Grid(params, scale.reshape(3, 1, 1)) for scale in (before, after)]
        expected = [np.sum(on_grid(fmt, b, m) != on_grid(fmt, a, m)) for b, a, m in zip(before, after, w)]
        np.testing.assert_array_equal(scale_flips(w, *grids), expected)
        assert expected[0] == 0 and (name == "E7M0" or expected[2] > 0) and (name != "E0M7" or expected[1] > 0)
        np.testing.assert_array_equal(scale_flips(w, grids[0], grids[0]), 0)


def test_another_format_at_the_same_scale_flips_too():
    w = normal(4, (1, 8, 9), 0.02)
    grids = [Grid(jax.tree.map(lambda leaf: np.stack([leaf]), format_params(get_format(name))),
                  np.full((1, 1, 1), 1024, np.float32)) for name in ("E5M2", "E4M3")]  # fmt: skip
    expected = np.sum(on_grid(get_format("E5M2"), 1024, w) != on_grid(get_format("E4M3"), 1024, w))
    assert 0 < expected == scale_flips(w, *grids)[0]


# One update of stored weights.


def stored_weights(name, seed=5, shape=(24, 32), std=0.02):
    w = normal(seed, shape, std)
    grid = grid_for(name, w)
    return np.asarray(to_grid(w, grid)), grid


@pytest.mark.parametrize("name", DEFAULT_8BIT)
def test_nearest_stores_the_number_nearest_to_the_sum(name):
    w, grid = stored_weights(name)
    update = normal(6, w.shape, 1e-3)
    update[np.abs(w) == np.abs(w).max()] = 0
    after = store(w, update, grid, grid.format)
    assert after.residual is None and after.grid.scale == grid.scale
    np.testing.assert_array_equal(after.weights, on_grid(get_format(name), grid.scale, w + update))
    assert (after.weights != w).any()


@pytest.mark.parametrize("name", WIDE_AND_NARROW)
def test_stochastic_storing_takes_a_neighbour_and_is_unbiased(name):
    fmt, n_draws = get_format(name), 400
    w, grid = stored_weights(name)
    update = np.where(np.abs(w) == np.abs(w).max(), 0, normal(7, w.shape, 5e-4)).astype(np.float32)
    draw = jax.jit(jax.vmap(lambda seed: ledger.store(w, update, grid, grid.format, seed=seed).weights))
    seeds = jax.vmap(lambda step: stochastic_seed(0, step, 0))(jnp.arange(n_draws))
    q_DN = np.asarray(draw(seeds)).reshape(n_draws, -1).astype(np.float64)
    np.testing.assert_array_equal(q_DN, draw(seeds).reshape(n_draws, -1))
    target = (w + update).ravel().astype(np.float64)
    values = decode(fmt, np.arange(fmt.max_code + 1)) / float(grid.scale)
    below = np.clip(np.searchsorted(values, np.abs(target), side="right") - 1, 0, len(values) - 2)
    low, high = np.sort(np.sign(target) * [values[below], values[below + 1]], axis=0)
    assert np.all((q_DN == low) | (q_DN == high)) and (q_DN[0] != q_DN[1]).any()
    sd = np.sqrt(np.maximum((target - low) * (high - target), 1e-30) / n_draws)
    z = (q_DN.mean(0) - target) / sd
    assert abs(z[sd > 1e-12].mean()) < 5 / np.sqrt((sd > 1e-12).sum())
    # Rare jumps have long tails, so single weights are held to five standard errors only where some draws do jump.
    common = np.minimum(target - low, high - target) > 0.05 * (high - low)
    assert common.sum() > 20 and np.abs(z[common]).max() < 5


@pytest.mark.parametrize("name", WIDE_AND_NARROW)
def test_error_feedback_keeps_what_nearest_loses(name):
    """Fifty equal steps of a fortieth of the smallest gap beside any weight."""
    w, grid = stored_weights(name)
    fmt = get_format(name)
    values = decode(fmt, np.arange(fmt.max_code + 1)) / float(grid.scale)
    gap = np.diff(values)[np.maximum(np.searchsorted(values, np.abs(w)), 1) - 1]
    update = (np.where(w > 0, -1, 1) * np.where(w == 0, 0, gap) / 40).astype(np.float32)  # towards zero
    nearest = store(w, update, grid, grid.format)
    fed = nearest._replace(weights=w, residual=jnp.zeros(w.shape, jnp.bfloat16))
    nearest = nearest._replace(weights=w)
    rounding = 0.0
    for _ in range(50):
        nearest = store(nearest.weights, update, nearest.grid, grid.format)
        fed = store(fed.weights, update, fed.grid, grid.format, residual=fed.residual)
        rounding = rounding + np.abs(np.float64(fed.residual)) * 2.0**-8
    np.testing.assert_array_equal(nearest.weights, w)
    assert (np.asarray(fed.weights) != w)[update != 0].all()
    kept = np.float64(fed.weights) + np.float64(fed.residual)
    master = np.float64(w) + 50 * np.float64(update)
    assert np.all(np.abs(kept - master) <= rounding + 50 * np.spacing(np.abs(w)))
    assert np.median(np.abs(kept - master)[update != 0] / np.abs(50 * update)[update != 0]) < 0.02


@pytest.mark.parametrize("name", WIDE_AND_NARROW)
def test_error_feedback_follows_a_float32_master_within_the_error_of_its_residual(name):
    w, grid = stored_weights(name)
    master, weights, residual, bound = np.float64(w), w, jnp.zeros(w.shape, jnp.bfloat16), 0.0
    for step in range(60):
        update = normal(100 + step, w.shape, 1e-3)
        master = master + update
        weights, residual, grid = store(weights, update, grid, grid.format, residual=residual)
        bound = bound + np.abs(np.float64(residual)) * 2.0**-8 + np.spacing(np.float32(0.2))
        np.testing.assert_array_equal(weights, on_grid(get_format(name), grid.scale, weights))
    assert residual.dtype == jnp.bfloat16
    assert np.all(np.abs(np.float64(weights) + np.float64(residual) - master) <= bound)
    assert np.linalg.norm(np.float64(weights) + np.float64(residual) - master) < 0.1 * np.linalg.norm(w - master)


@pytest.mark.parametrize("name, limit", [("E0M7", 127 / 128), ("E4M3", 448.0), ("E5M2", 57344.0), ("E7M0", 65536.0)])
def test_the_scale_moves_exactly_when_it_must(name, limit):
    """The largest magnitude after the update, beside both ends of what the scale 2^9 holds."""
    limit, scale = np.float32(limit), np.float32(512)
    grid = Grid(format_params(get_format(name)), scale)
    quarter = limit / 4
    just = partial(np.nextafter, dtype=np.float32)
    gap = np.float32(ulp(limit, Grid(grid.format, 1.0)))
    for amax, factor in ((limit, 1), (just(limit, np.float32(np.inf)), 1), (limit + gap / 2, 1),
                         (just(limit + gap / 2, np.float32(np.inf)), 0.5), (2 * limit, 0.5),
                         (9 * limit, 1 / 16), (limit / 2, 1), (just(quarter, np.float32(np.inf)), 1), (quarter, 4),
                         (quarter / 2, 8), (quarter * 0.75, 4)):  # fmt: skip
        target = np.float32([0.3 * limit * min(1, amax / limit), -amax]) / scale
        after = store(target / 4, target * 0.75, grid, grid.format)  # sums that are exact
        assert after.grid.scale == factor * scale, (name, amax)
        assert factor == 1 or after.grid.scale == scale_for(np.abs(target).max(), grid.format)
        np.testing.assert_array_equal(after.weights, on_grid(get_format(name), after.grid.scale, target))


def test_a_new_format_takes_a_new_scale_only_when_forced():
    w, grid = stored_weights("E4M3")
    finer = format_params(get_format("E3M4"))
    after = store(w, 0 * w, grid, finer, force=True)
    assert after.grid.scale == scale_for(np.abs(w).max(), finer) != grid.scale
    np.testing.assert_array_equal(after.weights, on_grid(get_format("E3M4"), after.grid.scale, w))
    small = w / np.float32(2)  # the scale could be twice as large, which is no reason to move it
    assert store(small, 0 * w, grid, grid.format).grid.scale == grid.scale
    assert store(small, 0 * w, grid, grid.format, force=True).grid.scale == 2 * grid.scale


@pytest.mark.parametrize("name", DEFAULT_8BIT)
def test_updates_of_zero_leave_weights_on_the_grid_alone(name):
    w, grid = stored_weights(name)
    for seed in (None, stochastic_seed(1, 2, 3)):
        for residual in (None, jnp.zeros(w.shape, jnp.bfloat16)):
            after = store(w, np.zeros_like(w), grid, grid.format, seed=seed, residual=residual)
            np.testing.assert_array_equal(after.weights, w)
            assert after.grid.scale == grid.scale and not np.any(after.residual)


# What one step of AdamW at a learning rate of 6e-4 does to GPT-2's initial weights, N(0, 0.02), stored to nearest.
# Adam's directions have an rms near 1/2, so u is N(0, 3e-4): shares lost and effective learning rates.
PUBLISHED = {"E0M7": (0.90, 0.69), "E2M5": (0.62, 0.95), "E4M3": (0.79, 0.49), "E5M2": (0.89, 0.26)}


@pytest.mark.parametrize("damaged", ["weight", "residual"])
def test_one_element_that_is_not_finite_harms_no_other_when_the_format_changes(damaged):
    w, grid = stored_weights("E4M3")
    fmt, update, residual = format_params(get_format("E3M4")), np.zeros_like(w), np.zeros(w.shape, jnp.bfloat16)
    clean = store(w, update, grid, fmt, residual=residual, force=True)
    i = np.unravel_index(np.argmin(np.abs(w)), w.shape)
    if damaged == "weight":
        spoilt = store(np.where(w == w[i], np.nan, w), update, grid, fmt, residual=residual, force=True)
    else:
        residual[i] = np.inf
        spoilt = store(w, update, grid, fmt, residual=residual, force=True)
    others = w != w[i]
    assert spoilt.grid.scale == clean.grid.scale
    np.testing.assert_array_equal(spoilt.weights[others], clean.weights[others])
    assert np.isnan(spoilt.weights[i]) == (damaged == "weight") and np.isfinite(spoilt.weights[others]).all()
    if damaged == "residual":
        np.testing.assert_array_equal(spoilt.weights, clean.weights)
        np.testing.assert_array_equal(spoilt.residual, clean.residual)


def one_step(name, update):
    w, grid = stored_weights(name, shape=(384, 384))
    after = store(w, update, grid, grid.format)
    found = of_one(entries(w, after.weights, update, after.grid)[0])
    return float(found["lost_update"]), float(found["update_gain"])


def test_shares_lost_and_effective_learning_rates_rank_formats_differently():
    found = {name: one_step(name, normal(8, (384, 384), 3e-4)) for name in PUBLISHED}
    for name, (lost, effective) in PUBLISHED.items():
        assert found[name][0] == pytest.approx(lost, abs=0.02), name
        assert found[name][1] == pytest.approx(effective, abs=0.03), name
    assert sorted(found, key=lambda name: found[name][0]) == ["E2M5", "E4M3", "E5M2", "E0M7"]
    assert sorted(found, key=lambda name: -found[name][1]) == ["E2M5", "E0M7", "E4M3", "E5M2"]


def test_stochastic_rounding_loses_only_what_no_draw_can_move():
    """Against the share of 2,000 draws that move a weight. One draw leaves most weights where they are, in E4M3."""
    w, grid = stored_weights("E4M3", shape=(64, 64))
    w, update = np.array(w), normal(8, w.shape, 3e-4)
    target = np.argmin(np.abs(w - np.median(np.abs(w)))), np.argmax(w)
    w.flat[target[1]] = 448 / float(grid.scale)
    update.flat[target[0]], update.flat[target[1]] = 1e-12, 1e-4  # swamped in float32; beyond the largest number
    update[5] = 0
    draw = jax.jit(lambda i: ledger.store(w, update, grid, grid.format, seed=stochastic_seed(1, i, 0)).weights != w)
    moves = sum(np.asarray(draw(i), int) for i in range(2000)) / 2000
    after = store(w, update, grid, grid.format, seed=stochastic_seed(1, 2, 3))
    may_move = jax.jit(ledger.expected_to_move)(w, update, after.grid)
    certain = np.abs(update) > 1e-5  # moved with a chance that 2,000 draws show
    certain.flat[target[1]] = False
    np.testing.assert_array_equal(may_move[certain], moves[certain] > 0)
    assert not np.asarray(may_move).flat[list(target)].any() and after.grid.scale == grid.scale
    found = of_one(entries(w, after.weights, update, after.grid, unlost=may_move)[0])
    assert found["not_flipped"] > 0.6 and found["lost_update"] < 0.01  # until version 6 the first was called lost
    assert abs(found["update_gain"] - 1) < 0.2


def test_a_weight_within_half_a_gap_of_the_largest_number_is_never_rounded_up_to_infinity():
    fmt = format_params(get_format("E5M2"), saturate=False)
    w, update = np.full((64, 64), 57344, np.float32), np.full((64, 64), 2000, np.float32)
    after = store(w, update, Grid(fmt, np.float32(1)), fmt, seed=stochastic_seed(1, 2, 3))
    assert after.grid.scale == 1 and np.all(after.weights == 57344)


def test_equal_steps_are_all_or_nothing_on_an_even_grid():
    """Stored weights of E0M7 lie half a gap from every midpoint: u of 6e-4 in gaps of 2^-10 moves all, of 4e-4 none."""
    sign = np.sign(normal(9, (384, 384), 1))
    lost, effective = one_step("E0M7", np.float32(6e-4 * sign))
    assert lost < 1e-3 and effective == pytest.approx(2.0**-10 / 6e-4, rel=1e-3)
    assert one_step("E0M7", np.float32(4e-4 * sign)) == (1.0, 0.0)
