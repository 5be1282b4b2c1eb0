"""The monitor against plain Python loops that keep whole histories."""

import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.step import stability

LAYERS = ("embed", "block_0/mlp_up")
THRESHOLDS = stability.Thresholds(
    nan_patience=3,
    bit_stall_threshold=0.5,
    dead_neuron_threshold=1e-3,
    dead_neuron_window=4,
    spike_window=30,
    spike_threshold=8.0,
    stall_window=5,
)


def run_monitor(losses, *, bad=None, neuron_norms=None, zero_update=None):
    """Feeds a history to the monitor; returns the last monitor and one dict of alerts that begin per step."""
    n = len(losses)
    bad = np.zeros(n, bool) if bad is None else np.asarray(bad)
    neuron_norms = np.ones((n, 2)) if neuron_norms is None else np.asarray(neuron_norms)
    zero_update = np.zeros((n, 2)) if zero_update is None else np.asarray(zero_update)
    monitor = stability.init_monitor(THRESHOLDS, {"block_0/mlp_up": 2}, n_layers=2)
    monitor = monitor._replace(dead_streak={"block_0:1/mlp_up": monitor.dead_streak[0][None]})
    begun, shares, scores = [], [], []
    for k in range(n):
        is_bad = jnp.asarray(bad[k])
        streak, dead = stability.update_dead_streaks(
            monitor.dead_streak, {"block_0:1/mlp_up": jnp.float32(neuron_norms[k : k + 1] ** 2)}, THRESHOLDS, ok=~is_bad
        )
        assert streak["block_0:1/mlp_up"].dtype == jnp.int32 and list(streak) == list(dead) == ["block_0:1/mlp_up"]
        share = dead["block_0:1/mlp_up"]
        monitor, z, begins = stability.update_monitor(
            monitor,
            row_number=k + 1,
            loss=jnp.float32(losses[k]),
            bad=is_bad,
            dead_streak=streak,
            dead_shares=share,
            stalled_S=jnp.float32(zero_update[k]),
            thresholds=THRESHOLDS,
        )
        begun.append({kind: np.asarray(value) for kind, value in begins.items() if np.any(value)})
        shares.append(float(share[0]))
        scores.append(float(z))
    return monitor, begun, shares, scores


def test_a_neuron_is_dead_after_the_whole_window_and_alive_again_at_once():
    norms = np.ones((12, 2))
    norms[2:9, 0] = 1e-4  # dead from its fourth small step (index 5) to index 8
    norms[4:8, 1] = 1e-4  # four small steps: dead at index 7 only
    _, begun, shares, _ = run_monitor(np.linspace(3, 2, 12), neuron_norms=norms)
    assert shares == [0, 0, 0, 0, 0, 0.5, 0.5, 1.0, 0.5, 0, 0, 0]
    assert [k for k, alerts in enumerate(begun) if "dead_layer" in alerts] == [7]


def test_the_threshold_is_on_the_norm_and_a_non_finite_step_leaves_the_streak():
    norms = np.full((7, 2), 0.99e-3)
    bad = [False, True, False, False, False, True, False]
    _, _, shares, _ = run_monitor(np.ones(7), neuron_norms=norms, bad=bad)
    assert shares == [0, 0, 0, 0, 1, 1, 1]
    assert run_monitor(np.ones(6), neuron_norms=np.full((6, 2), 1.01e-3))[2] == [0] * 6


def test_the_streaks_of_several_layers_do_not_mix():
    """Two groups of three layers and of one, against a loop over their neurons."""
    rng = np.random.default_rng(1)
    shapes = {"block_0:3/mlp_up": (3, 5), "block_3:4/attn_out": (1, 2)}
    streaks = {group: jnp.zeros(shape, jnp.int32) for group, shape in shapes.items()}
    counted = {group: np.zeros(shape, int) for group, shape in shapes.items()}
    seen_shares = set()
    for k in range(12):
        small = {group: rng.random(shape) < 0.9 for group, shape in shapes.items()}
        ok = k % 5 != 3
        squares = {group: jnp.where(is_small, 1e-8, 1.0).astype(jnp.float32) for group, is_small in small.items()}
        streaks, shares = stability.update_dead_streaks(streaks, squares, THRESHOLDS, ok=jnp.asarray(ok))
        for group, (n, outputs) in shapes.items():
            for i in range(n):
                for j in range(outputs) if ok else ():
                    counted[group][i, j] = min(counted[group][i, j] + 1, 4) if small[group][i, j] else 0
            np.testing.assert_array_equal(streaks[group], counted[group])
            np.testing.assert_allclose(shares[group], (counted[group] >= 4).mean(1), rtol=1e-6)
            seen_shares |= set(np.asarray(shares[group]).tolist())
    assert len(seen_shares) > 4


def test_robust_z_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    losses = 5 + 0.1 * rng.standard_normal(60)
    losses[45] = 9.0
    _, begun, _, scores = run_monitor(losses)
    for k in range(60):
        past = np.float32(losses[max(0, k - 30) : k])
        expected = 0.0
        if len(past) >= stability.MIN_LOSSES:
            median = np.median(past)
            spread = 1.4826 * np.median(np.abs(past - median))
            expected = (np.float32(losses[k]) - median) / max(spread, 1e-3 * median)
        assert scores[k] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert [k for k, alerts in enumerate(begun) if "loss_spike" in alerts] == [45]
    assert begun[45]["loss_spike"] == pytest.approx(scores[45])


def test_a_spike_that_lasts_begins_once():
    losses = np.r_[np.full(30, 4.0), 9.0, 9.0, 9.0, 4.0, 9.0]
    _, begun, _, _ = run_monitor(losses)
    assert [k for k, alerts in enumerate(begun) if "loss_spike" in alerts] == [30, 34]


def test_divergence_begins_when_the_median_rises_above_the_first_loss():
    losses = np.r_[np.full(25, 4.0) - np.arange(25) * 0.01, np.full(40, 6.0)]
    _, begun, _, _ = run_monitor(losses)
    expected = [k for k in range(20, 65) if np.median(losses[max(0, k - 29) : k + 1]) > 4.0][:1]
    assert [k for k, alerts in enumerate(begun) if "divergence" in alerts] == expected


def test_stalled_updates_are_averaged_over_the_window_and_re_armed():
    shares = np.zeros((24, 2))
    shares[6:12, 1] = 1.0
    shares[17:, 1] = 0.9
    _, begun, _, _ = run_monitor(np.linspace(3, 2, 24), zero_update=shares)
    expected = []
    above = False
    for k in range(24):
        now = k >= 4 and shares[k - 4 : k + 1, 1].mean() > 0.5
        if now and not above:
            expected.append(k)
        above = now
    assert len(expected) == 2
    assert [k for k, alerts in enumerate(begun) if "update_stall" in alerts] == expected
    assert begun[expected[0]]["update_stall"].tolist() == [0.0, pytest.approx(0.6)]


def test_bad_steps_are_counted_and_patience_is_in_a_row():
    losses = np.ones(8)
    bad = [True, True, False, True, False, True, True, True]
    losses[[k for k, b in enumerate(bad) if b]] = np.nan
    monitor, *_ = run_monitor(losses, bad=bad)
    assert (int(monitor.bad_steps), int(monitor.first_bad_step), int(monitor.bad_streak)) == (6, 1, 3)
    assert bool(stability.is_frozen(monitor, THRESHOLDS))
    monitor, *_ = run_monitor(losses[:7], bad=bad[:7])
    assert not bool(stability.is_frozen(monitor, THRESHOLDS))
    assert float(monitor.initial_loss) == 1.0 and int(monitor.seen) == 2


def run_format_monitor(lost=None, overflow=None, bad=None):
    """The bit_stall and overflow alerts that begin at each step, for two stored layers and two operands."""
    n = len(lost if lost is not None else overflow)
    lost = np.zeros((n, 2)) if lost is None else lost
    overflow = np.zeros((n, 2)) if overflow is None else overflow
    bad = np.zeros(n, bool) if bad is None else bad
    monitor = stability.init_monitor(THRESHOLDS, {}, n_layers=2, n_stored=2, n_operands=2)
    begun = {"bit_stall": [], "overflow": []}
    for k in range(n):
        monitor, _, begins = stability.update_monitor(
            monitor,
            row_number=k + 1,
            loss=jnp.float32(3 - 0.01 * k),
            bad=jnp.asarray(bad[k]),
            dead_streak=(),
            dead_shares=jnp.zeros(0),
            stalled_S=jnp.zeros(2),
            thresholds=THRESHOLDS,
            lost_S=jnp.float32(lost[k]),
            overflow_O=jnp.float32(overflow[k]),
        )
        for kind, values in begun.items():
            values.append(np.asarray(begins[kind]))
    return {kind: np.stack(values) for kind, values in begun.items()}


def test_bit_stall_begins_when_the_mean_lost_share_exceeds_the_threshold_and_is_re_armed():
    lost = np.random.default_rng(0).uniform(0, 0.4, (30, 2))
    lost[3:9, 1] = lost[20:24, 1] = 0.95
    lost[10:16, 0] = 0.9
    bad = np.zeros(30, bool)
    bad[[5, 12]] = True  # what a non-finite step lost does not count
    begun = run_format_monitor(lost=lost, bad=bad)["bit_stall"]
    expected, above = np.zeros((30, 2)), np.zeros(2, bool)
    for k in range(30):
        past = lost[: k + 1][~bad[: k + 1]][-THRESHOLDS.stall_window :]
        if bad[k]:
            continue
        mean = past.mean(0)
        now = (mean > THRESHOLDS.bit_stall_threshold) & (len(past) == THRESHOLDS.stall_window)
        expected[k] = np.where(now & ~above, mean, 0)
        above = now
    assert (expected > 0).sum(0).tolist() == [1, 2]
    np.testing.assert_allclose(begun, expected, rtol=1e-6)


def test_bit_stall_waits_for_a_full_window():
    begun = run_format_monitor(lost=np.ones((6, 2)))["bit_stall"]
    assert np.flatnonzero(begun[:, 0]).tolist() == [THRESHOLDS.stall_window - 1]


def test_overflow_begins_above_the_threshold_with_its_share_and_is_re_armed():
    assert THRESHOLDS.overflow_threshold == 0.01
    overflow = np.zeros((10, 2))
    overflow[:, 0] = [0, 0.01, 0.02, 0.03, 0.005, 0.02, 0.02, 0, 0.5, 0]
    overflow[3, 1] = 0.2
    bad = np.zeros(10, bool)
    bad[8] = True  # decides nothing
    begun = run_format_monitor(overflow=overflow, bad=bad)["overflow"]
    expected = np.zeros((10, 2))
    expected[2, 0], expected[5, 0], expected[3, 1] = 0.02, 0.02, 0.2
    np.testing.assert_allclose(begun, expected, rtol=1e-6)


def test_without_formats_there_is_nothing_to_watch():
    monitor = stability.init_monitor(THRESHOLDS, {"block_0/mlp_up": 2}, n_layers=2)
    assert monitor.lost_WS is None and not {"bit_stall", "overflow"} & set(monitor.active)


# The first cause.


HEALTHY = {
    "loss": 5.0,
    "act_amax/block_0": 1.0,
    "act_amax/block_1": 2.0,
    "alert/nonfinite_loss": 0.0,
    "alert/nonfinite_grad_norm": 0.0,
    **{
        f"alert/{kind}/{layer}": 0.0
        for kind in (
            "nonfinite_grads",
            "nonfinite_params",
            "nonfinite_moments",
            "nonfinite_updates",
            "nonfinite_scale",
            "nonfinite_residual",
        )
        for layer in ("embed", "block_0/mlp_up", "block_1/mlp_up", "block_1/mlp_down", "ln_f")
    },
    **{f"alert/nonfinite_amax/block_1/mlp_up/{operand}": 0.0 for operand in "WAG"},
}
ALL_GRADS = {name: 4.0 for name in HEALTHY if name.startswith("alert/nonfinite_grads")}
NO_LOSS = {"loss": np.nan, "alert/nonfinite_loss": 1.0}
NO_FORWARD = {**NO_LOSS, "act_amax/block_0": np.nan, "act_amax/block_1": np.nan, **ALL_GRADS}
CAUSES = [
    ({}, None),
    (
        {"alert/nonfinite_params/block_1/mlp_up": 1.0, "alert/nonfinite_moments/embed": 1.0, **NO_FORWARD},
        "1 non-finite parameter in block_1/mlp_up",
    ),
    (
        {f"alert/nonfinite_params/{layer}": 2.0 for layer in ("embed", "block_0/mlp_up", "block_1/mlp_up", "ln_f")},
        "8 non-finite parameters in embed, block_0/mlp_up, block_1/mlp_up and 1 more",
    ),
    (
        {"alert/nonfinite_moments/block_0/mlp_up": 2.0, "alert/nonfinite_updates/block_0/mlp_up": 2.0, **NO_LOSS},
        "2 unusable moments of the optimizer in block_0/mlp_up",
    ),
    (
        {"alert/nonfinite_amax/block_1/mlp_up/A": 2.0, **NO_FORWARD},
        "2 non-finite amaxes in the history of block_1/mlp_up/A",
    ),
    (
        {"alert/nonfinite_scale/block_1/mlp_up": 1.0, **NO_FORWARD},
        "1 unusable scale of the stored weights of block_1/mlp_up",
    ),
    ({"alert/nonfinite_residual/block_0/mlp_up": 1.0}, "1 non-finite residual of the stored weights of block_0/mlp_up"),
    (NO_FORWARD, "activations that are not finite, from block_0 on"),
    (
        {**NO_FORWARD, "act_amax/block_0": 7.0, "act_amax/block_1": np.inf},
        "activations that are not finite, from block_1 on",
    ),
    (
        {**NO_LOSS, **ALL_GRADS},
        "a loss that is not finite while the activations of every block are: the head or the batch",
    ),
    (
        {
            "alert/nonfinite_grads/block_1/mlp_up": 3.0,
            "alert/nonfinite_grads/block_0/mlp_up": 16.0,
            "alert/nonfinite_grads/embed": 16.0,
        },
        "3 non-finite gradient elements in block_1/mlp_up, and backward from there in 2 more layers",
    ),
    ({"alert/nonfinite_grads/block_1/mlp_down": 1.0}, "1 non-finite gradient element in block_1/mlp_down"),
    ({"alert/nonfinite_grad_norm": 1.0}, "a gradient norm that overflows while every element is finite"),
    ({"alert/nonfinite_updates/ln_f": 1.0}, "non-finite updates in ln_f while loss, gradient and moments are finite"),
]


@pytest.mark.parametrize("row, cause", CAUSES)
def test_the_first_cause_is_named(row, cause):
    assert stability.locate(HEALTHY | row) == cause
    # Recorded or not, activations say nothing where something else is to blame.
    bare = {name: value for name, value in (HEALTHY | row).items() if not name.startswith("act_")}
    in_forward = cause and ("activations" in cause)
    assert stability.locate(bare) == (
        "a loss that is not finite (activations were not recorded)" if in_forward else cause
    )
