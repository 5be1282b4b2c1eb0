"""Intervals, noise floor and ranks of the report: against printed tables of the t distribution and float64 NumPy."""

import itertools
import math

import numpy as np
import pytest

from altgrad_jax.report import statistics
from altgrad_jax.report.statistics import (
    interval,
    noise_floor,
    paired,
    rank_groups,
)


def test_paired_interval_equals_numpy_in_float64():
    first = {7: 2.31, 3: 2.35, 1: 2.28, 9: 2.44, 4: 2.39, 100: 1.0}
    second = {1: 2.25, 3: 2.31, 4: 2.36, 7: 2.29, 9: 2.37, 200: 5.0}
    d = paired(first, second)
    values = np.array([first[s] - second[s] for s in (1, 3, 4, 7, 9)])
    half = 2.7764451051977987 * values.std(ddof=1) / np.sqrt(5)
    assert d.seeds == (1, 3, 4, 7, 9) and d.n == d.n_pairs == 5
    np.testing.assert_allclose(
        [d.mean, d.low, d.high], [values.mean(), values.mean() - half, values.mean() + half], rtol=1e-12
    )
    assert d.sign == 1 and paired(second, first).sign == -1


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = sum(low <= 0 <= high for _, low, high in (interval(rng.normal(size=4)) for _ in range(1500)))
    assert 0.935 < covered / 1500 < 0.965


def test_fewer_than_two_pairs_have_no_interval_and_no_sign():
    assert all(map(math.isnan, interval([])))
    mean, low, high = interval([0.3])
    assert mean == 0.3 and math.isnan(low) and math.isnan(high)
    assert paired({1: 5.0}, {1: 1.0}).sign == 0 and paired({1: 5.0}, {2: 1.0}).n_pairs == 0


def test_a_run_without_a_loss_is_never_dropped():
    d = paired({1: 2.0, 2: math.inf, 3: 2.1, 4: math.inf, 5: 2.2}, {1: 2.0, 2: 2.0, 3: math.inf, 4: math.inf, 5: 2.0})
    assert (d.seeds, d.worse, d.better, d.neither, d.n_pairs) == ((1, 5), (2,), (3,), (4,), 5)
    assert d.sign == 0  # as many without a loss on either side, and the others do not tell
    assert paired({1: 1.0, 2: 1.0, 3: math.inf}, {1: 2.0, 2: 2.1, 3: 2.0}).sign == 1  # worse than any number
    assert paired({1: math.inf}, {1: 2.0}).sign == 1


def test_noise_floor_is_over_all_pairs_of_seeds():
    losses = [2.0, 2.1, 2.3, math.inf]
    noise = noise_floor(losses)
    differences = [abs(a - b) for a, b in itertools.combinations(losses[:3], 2)]
    assert noise.n_seeds == 3 and noise.largest == pytest.approx(max(differences))
    assert noise.rms == pytest.approx(math.sqrt(sum(x * x for x in differences) / 3))
    assert noise.rms == pytest.approx(math.sqrt(2) * np.std(losses[:3], ddof=1))
    assert math.isnan(noise_floor([2.0]).rms)


def test_ranks_begin_only_where_neighbours_are_separated():
    separated = {("b", "a"): 0, ("c", "b"): 1, ("d", "c"): 0}
    assert rank_groups("abcd", lambda *pair: separated[pair]) == [1, 1, 3, 3]
    assert rank_groups([], None) == []
    assert statistics.CONFIDENCE == 0.95
