"""The statistics of the report: against SciPy's own tests, printed values, simulation, and the published runs."""

import itertools
import math

import numpy as np
import pytest
from campaigns import report_statistics as campaign
from scipy import signal, stats

from altgrad_jax.report import statistics, tables
from altgrad_jax.report.runs import Arm
from altgrad_jax.report.statistics import (
    Judged,
    as_grid,
    block_length,
    bootstrap_variance,
    has_two_clusters,
    holm,
    judge,
    letters,
    noise,
    onset,
    p_difference,
    p_equivalence,
    p_lost,
    paired,
    pairs_needed,
    power,
    power_of_equivalence,
    spread,
    standard_error,
    variance_parts,
)

FORMATS = ("E0M7", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")


def cell(values):
    """{draw: loss}: one seed after the other, all of one data seed."""
    return {(seed, 0): value for seed, value in enumerate(values)}


def against_zero(values):
    return paired(cell(values), cell([0.0] * len(values)))


@pytest.fixture(scope="module")
def published():
    return campaign.published()


# ---------------------------------------------------------------------------------------------- one comparison


def test_interval_p_and_equivalence_are_those_of_scipy():
    rng = np.random.default_rng(1)
    for n, mean, margin in itertools.product((2, 3, 5, 17), (0.0, 0.01, -0.03), (0.005, 0.02, 0.1)):
        first, second = rng.normal(2 + mean, 0.02, n), rng.normal(2, 0.02, n)
        d = paired(cell(first), cell(second))
        test = stats.ttest_rel(first, second)
        interval = test.confidence_interval(0.95)
        np.testing.assert_allclose([d.low, d.high], [interval.low, interval.high], rtol=1e-9)
        np.testing.assert_allclose(p_difference(d.mean, d.se, d.df), test.pvalue, rtol=1e-9)
        sides = (
            stats.ttest_1samp(first - second, -margin, alternative="greater").pvalue,
            stats.ttest_1samp(first - second, margin, alternative="less").pvalue,
        )
        np.testing.assert_allclose(p_equivalence(d.mean, d.se, d.df, margin), max(sides), rtol=1e-9)


def test_interval_with_a_printed_quantile():
    d = against_zero([0.06, 0.04, -0.01, 0.02, 0.07])  # t(0.975, 4) = 2.776 in every table
    half = 2.7764451051977987 * np.std(d.values, ddof=1) / math.sqrt(5)
    np.testing.assert_allclose([d.mean, d.low, d.high], [0.036, 0.036 - half, 0.036 + half], rtol=1e-12)


def test_the_smallest_margin_is_where_equivalence_begins():
    d = against_zero([0.01, -0.02, 0.004, 0.013, 0.0])
    for margin, p_at_most in ((d.smallest_margin * 1.001, 0.05), (d.smallest_margin * 0.999, 0.051)):
        assert p_equivalence(d.mean, d.se, d.df, margin) <= p_at_most
    assert p_equivalence(d.mean, d.se, d.df, d.smallest_margin) == pytest.approx(0.05)


@pytest.mark.parametrize("margin", [0, -1, math.nan])
def test_a_margin_that_is_not_above_0_is_refused(margin):
    with pytest.raises(ValueError, match="must be > 0"):
        p_equivalence(0.0, 1.0, 4, margin)


def test_fewer_than_two_pairs_have_no_test():
    for values in ([], [0.3]):
        d = against_zero(values)
        (judged,) = judge([d])
        assert math.isnan(d.low) and math.isnan(judged.p) and judged.kind == "inconclusive" and not judged.separated
    assert against_zero([0.3]).mean == 0.3 and paired(cell([5.0]), {(7, 0): 1.0}).n_pairs == 0


def test_equal_runs_are_equivalent_and_not_separated():
    (judged,) = judge([against_zero([0.0] * 5)])
    assert (judged.p, judged.p_equal, judged.kind, judged.separated) == (1.0, 0.0, "equivalent", False)


# ------------------------------------------------------------------------------------------------- the classes


def of(mean, sd=0.01, n=5):
    """A Difference with exactly this mean and standard deviation."""
    values = np.linspace(-1, 1, n)
    return against_zero(mean + sd * values / values.std(ddof=1))


@pytest.mark.parametrize(
    "d, kind, sign",
    [
        (of(0.2), "worse", 1),
        (of(-0.2), "better", -1),
        (of(0.0, 0.3), "inconclusive", 0),  # its interval holds 0, which showed nothing: it is not equivalent
        (of(0.0, 0.005), "equivalent", 0),
        (of(0.01, 0.005), "equivalent", 1),  # separated from 0 and inside the margin: equivalent, and the side is said
        (of(0.02, 0.001), "worse", 1),  # at the margin itself
    ],
)
def test_each_class(d, kind, sign):
    (judged,) = judge([d], 0.02)
    assert (judged.kind, judged.sign) == (kind, sign)
    back = judged.reversed
    assert back.kind == {"worse": "better", "better": "worse"}.get(kind, kind) and back.sign == -sign
    np.testing.assert_allclose([back.d.low, back.d.mean, back.d.high], [-d.high, -d.mean, -d.low])
    words = tables.show_class(judged)
    assert words.startswith(kind) and ("though above 0" in words) == (kind == "equivalent" and sign == 1)


def test_the_class_follows_the_corrected_p():
    d = of(0.02, 0.012)
    alone, among = judge([d])[0], judge([d] * 20)[0]
    assert alone.kind == "worse" and among.kind == "inconclusive"
    assert among.p == alone.p and among.holm_p == pytest.approx(20 * alone.p)
    equal = of(0.0, 0.012)
    assert judge([equal])[0].kind == "equivalent" and judge([equal] * 20)[0].kind == "inconclusive"


def test_holm_by_hand():
    """The steps of Holm (1979): 4 x 0.01, 3 x 0.02, 2 x 0.03, 1 x 0.04, and never below an earlier one."""
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, math.nan, 0.9, 0.01]), [1.0, math.nan, 1.0, 0.03])
    assert holm([]).size == 0 and holm([0.03])[0] == 0.03


# ---------------------------------------------------------------------------------------------------- lost runs


def test_a_run_without_a_loss_is_never_dropped():
    inf = math.inf
    d = paired(cell([2.0, inf, 2.1, inf, 2.2]), cell([2.0, 2.0, inf, inf, 2.0]))
    assert [draw for draw, _ in d.draws] == [0, 4] and d.n_pairs == 5
    assert (d.worse, d.better, d.neither) == (((1, 0),), ((2, 0),), ((3, 0),))


@pytest.mark.parametrize("lost", range(1, 6))
def test_lost_runs_are_tested_by_fisher(lost):
    d = paired(cell([math.inf] * lost + [2.0] * (5 - lost)), cell([2.0] * 5))
    # P(k lost of 5 and 0 of 5) is hypergeometric; the other tail mirrors it.
    assert p_lost(d) == pytest.approx(min(1.0, 2 * math.comb(5, lost) / math.comb(10, lost)))
    assert math.isnan(p_lost(against_zero([0.1] * 5)))


def test_one_lost_run_of_five_is_not_worse_by_itself():
    """It made a cell "worse" whatever the other four said."""
    four = [2.0, 2.3, 1.9, 2.1]
    (judged,) = judge([paired(cell([math.inf, *four]), cell([2.0, 2.1, 2.2, 2.0, 2.0]))])
    assert judged.p_lost == 1 and judged.kind == "inconclusive"
    assert "1 of 5 runs lost against 0" in tables.show_class(judged)


def test_survivors_do_not_speak_for_lost_runs():
    reference = [2.0, 2.1, 2.2, 2.0, 2.3]
    for shift, kind in ((0.0, "inconclusive"), (-0.2, "inconclusive"), (0.2, "worse")):
        values = [math.inf, *(loss + shift + 1e-3 * i for i, loss in enumerate(reference[1:]))]
        (judged,) = judge([paired(cell(values), cell(reference))])
        assert judged.kind == kind and judged.reversed.kind == {"worse": "better"}.get(kind, kind)


def test_all_runs_lost_is_worse():
    (judged,) = judge([paired(cell([math.inf] * 5), cell([2.0] * 5))])
    assert judged.kind == "worse" and judged.separated and judged.holm_lost == pytest.approx(2 / 252)


def test_tables_that_can_reject_nothing_are_not_corrected_for():
    lost = paired(cell([math.inf] * 5), cell([2.0] * 5))
    assert judge([lost, *[of(0.1)] * 30])[0].holm_lost == pytest.approx(2 / 252)


# -------------------------------------------------------------------------------------------- groups of equals


def test_no_group_holds_two_that_are_separated():
    """Neighbours a-b and b-c are not separated, a-c is: three of one rank before."""
    assert letters([[0, 0, 1], [0, 0, 0], [1, 0, 0]]) == ["a", "ab", "b"]
    assert letters([]) == [] and letters([[0, 0], [0, 0]]) == ["a", "a"] and letters([[0, 1], [1, 0]]) == ["a", "b"]
    rng = np.random.default_rng(2)
    for n in (3, 6, 9):
        apart = np.triu(rng.random((n, n)) < 0.4, 1)
        apart |= apart.T
        found = [set(word) for word in letters(apart)]
        for i, j in itertools.combinations(range(n), 2):
            assert bool(found[i] & found[j]) != apart[i, j]


def test_published_groups_merge_nothing_that_the_page_separates(published):
    """E6M1 and E0M7 shared rank 6, although their difference was +0.136 [+0.119, +0.152]."""
    groups = {arm.format: set(group) for group, arm in published.ranking()}
    pairs = published.pairs
    for (arm, other), judged in pairs.items():
        assert bool(groups[arm.format] & groups[other.format]) != judged.separated
    one = pairs[Arm("E0M7"), Arm("E6M1")]
    assert one.kind == "worse" and one.d.mean == pytest.approx(0.136, abs=1e-3)
    assert published.twin == "E1M6" and "E1M6" not in groups  # E0M7's grid, at another rate: it had a gap of its own
    assert not groups["E6M1"] & groups["E0M7"]


# ----------------------------------------------------------------------------------------- the published matrix


def test_published_equivalence_needs_a_margin(published):
    """E3M4, E4M3 and E5M2 "trained like BF16", on intervals that support no margin below these."""
    margins = [published.gap(Arm(name)).d.smallest_margin for name in ("E3M4", "E4M3", "E5M2")]
    np.testing.assert_allclose(margins, [0.035, 0.027, 0.037], atol=5e-4)
    kinds = {name: published.gap(Arm(name)).kind for name in FORMATS}
    assert kinds == dict.fromkeys(FORMATS, "inconclusive") | {"E0M7": "worse", "E7M0": "worse"}


def test_published_gaps_before_and_after_holm(published):
    gaps = [judged for arm, judged in published.gaps.items() if arm.format in FORMATS]
    assert len(gaps) == 28 and len(published.gaps) == 29  # float32 is the other
    assert sum(judged.p <= 0.05 for judged in gaps) == 18 and sum(judged.holm_p <= 0.05 for judged in gaps) == 14


def test_published_noise_belongs_to_a_rate(published):
    found = [published.noise(rate).rms for rate in (0.001, 0.002, 0.004)]
    np.testing.assert_allclose(found, [0.0037, 0.0388, 0.0302], atol=1e-4)
    # The gap at 1e-3 is held against its own pairs, not against the noise of 4e-3, which is four times as large.
    gap = published.rate_gaps[Arm("E0M7"), 0.001]
    assert gap.p <= 0.05 and gap.d.mean == pytest.approx(0.0078, abs=1e-4)
    assert published.rate_gaps[Arm("E7M0"), 0.001].kind == "worse"
    assert published.rate_gaps[Arm("E5M2"), 0.001].kind == "equivalent"


def test_published_ablations_of_one_operand_show_nothing(published):
    costs = {(name, cause): cost for name, (_, found) in published.costs.items() for cause, cost in found.items()}
    operands = [cost.judged for (_, cause), cost in costs.items() if cause != "update"]
    assert len(operands) == 21 and not any(judged.separated for judged in operands)
    named = {name: published.largest_cost(name)[0] for name in FORMATS}
    assert {name for name, cost in named.items() if cost is None} == {"E0M7", "E2M5"}  # "update" was said of all seven
    assert all(cost.cause == "update" for cost in named.values() if cost)
    assert "at 0.002, not the rates of the gap" in tables.show_cost(published, "E4M3")


def test_published_cells_of_two_clusters_are_said(published):
    assert has_two_clusters(published.gap(Arm("E2M5")).d.values)
    assert "two clusters" in tables.show_difference(published.gap(Arm("E2M5")))
    assert "E2M5 (+0.091, two clusters)" in tables.answer(published)[0][1]


def test_published_page_says_what_its_intervals_hold(published):
    assert "hold the seed of the weights, not the data order" in tables.variation(published)
    assert "one set of 128 windows" in tables.variation(published)


# ----------------------------------------------------------------------------------------- noise, power, shape


def test_noise_is_over_all_pairs_of_runs():
    losses = [2.0, 2.1, 2.3, math.inf]
    found = noise(losses)
    differences = [abs(a - b) for a, b in itertools.combinations(losses[:3], 2)]
    assert found.n == 3
    assert found.rms == pytest.approx(math.sqrt(sum(x * x for x in differences) / 3))
    assert math.isnan(noise([2.0]).rms)


@pytest.mark.parametrize("effect, n", [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_pairs_needed_are_those_of_the_textbook(effect, n):
    """Cohen's small, medium and large effect, paired, two-sided 5%, power 80%."""
    assert pairs_needed(power, effect) == n and power(n, effect) >= 0.8 > power(n - 1, effect)


def test_power_is_the_share_of_simulated_experiments():
    rng = np.random.default_rng(3)
    for n, size in ((8, 1.2), (20, 0.8)):
        values = rng.normal(size=(100_000, n))
        mean, se = values.mean(1), values.std(1, ddof=1) / math.sqrt(n)
        assert power(n, size) == pytest.approx(np.mean(p_difference(mean + size, se, n - 1) <= 0.05), abs=0.006)
        share = np.mean(p_equivalence(mean, se, n - 1, size) <= 0.05)
        assert share - 0.01 < power_of_equivalence(n, size) < share + 0.006


def test_no_number_of_pairs_where_none_is_enough():
    assert pairs_needed(power, 0.0) is None and pairs_needed(power, math.nan) is None
    assert pairs_needed(power, 1e-3) is None and pairs_needed(power, math.inf) == 2
    assert pairs_needed(power_of_equivalence, 1e-3) is None


def test_two_clusters():
    assert has_two_clusters([0.0, 0.01, 0.02, 0.4]) and has_two_clusters([0, 1, 2, 30, 31, 32, 33, 34])
    assert not has_two_clusters([0.0, 0.0, 9.0]) and not has_two_clusters([1.0] * 5) and not has_two_clusters(range(9))


def test_a_time_of_onset_only_where_the_curve_separates_for_good():
    curve = {100: of(0.2), 200: of(0.0, 0.3), 300: of(0.2), 400: of(0.3)}
    assert onset(curve) == 300 and onset({100: of(0.2), 200: of(0.0, 0.3)}) is None
    assert onset({100: of(-0.2), 200: of(0.2)}) == 200 and onset({}) is None


# --------------------------------------------------------------------------------- seeds of weights and of data


def test_independent_draws_have_the_usual_standard_error():
    values = [0.1, 0.3, 0.2, 0.5]
    for draws in ([(i, 0) for i in range(4)], [(0, i) for i in range(4)], [(i, i) for i in range(4)]):
        se, df = standard_error(values, draws)
        assert se == pytest.approx(stats.sem(values)) and df == 3


def test_a_grid_of_seeds_shares_each_of_them():
    """Seeds that do all, data seeds that do nothing: 2 x 3 pairs are worth 3 seeds, not 6."""
    values, draws = [0.1, 0.1, 0.5, 0.5, 0.9, 0.9], [(i, j) for i in range(3) for j in range(2)]
    se, df = standard_error(values, draws)
    assert se == pytest.approx(stats.sem([0.1, 0.5, 0.9])) and df == pytest.approx(2)
    parts = variance_parts(values, draws)
    assert parts == pytest.approx({"weights": np.var([0.1, 0.5, 0.9], ddof=1), "data order": 0, "both together": 0})
    assert as_grid(values[:5], draws[:5]) is None and math.isnan(standard_error(values[:5], draws[:5])[0])


def test_variance_parts_are_found_again():
    rng = np.random.default_rng(4)
    values = rng.normal(0, 3, 60)[:, None] + rng.normal(0, 2, 60) + rng.normal(0, 1, (60, 60))
    parts = variance_parts(values.ravel(), [(i, j) for i in range(60) for j in range(60)])
    assert list(parts.values()) == pytest.approx([9, 4, 1], rel=0.35)


# --------------------------------------------------------------------------------------------------- simulation


def test_simulated_experiments_keep_what_is_promised():
    """6,000 experiments a line, or 1,500 or 300: a share of 5% has a standard error of 0.28%, 0.56% and 1.3% there."""
    limits = {
        "94% to 96%": (0.94, 0.96),
        "at most 5%": (0, 0.06),
        "about 95%": (0.915, 0.985),
        "about 1%": (0.005, 0.015),
    }
    rows = {}
    for words, promise, share in campaign.simulation_rows(draws=6_000):
        low, high = limits.get(promise, (0, 1))
        assert low <= share <= high, words
        rows[words] = share
    assert rows["the same without the correction, 28 of 28 are 0"] > 0.7
    assert rows["5 pairs, one in five 20 sd off: the interval holds the true gap"] < 0.75
    over_both = [words for words in rows if words.startswith("8 pairs x 400 windows of 10 sd")]
    assert len(over_both) == 2 and rows[over_both[1]] < 0.7  # what the t interval alone leaves out


def test_bootstrap_variance_is_that_of_many_resamples():
    rng = np.random.default_rng(5)
    values, block = rng.normal(size=40).cumsum(), 8
    starts = rng.integers(0, 40, (20_000, 5))
    resampled = values[(starts[..., None] + np.arange(block)) % 40].mean((1, 2))
    assert bootstrap_variance(values, block) == pytest.approx(resampled.var() * 5 / 4, rel=0.03)
    assert bootstrap_variance(values, 1) == pytest.approx(values.var(ddof=1) / 40)


def test_blocks_are_as_long_as_the_text_is_alike():
    """Of an AR(1) series with correlation r, Politis and White's rule in closed form."""
    rng = np.random.default_rng(6)
    assert (
        block_length(rng.normal(size=4000)) <= 5
        and block_length([1.0, -1.0] * 20) == 1
        and block_length([2.0] * 9) == 1
    )
    series = signal.lfilter([1], [1, -0.8], rng.normal(size=20_000))
    assert block_length(series) == pytest.approx((1.5 * (1.6 / 0.36) ** 2 * 20_000) ** (1 / 3), rel=0.1)
    assert block_length(np.arange(40.0)) == 10


def test_variance_of_a_gap_is_split_into_its_sources():
    """60 pairs by 60 windows, sources of 9, 4 and 1: the mean has a 60th of the first two, a 3600th of the third."""
    rng = np.random.default_rng(4)
    gaps_PE = rng.normal(0, 3, 60)[:, None] + rng.normal(0, 2, 60) + rng.normal(0, 1, (60, 60))
    d = paired({(k, k): gap for k, gap in enumerate(gaps_PE.mean(1))}, {(k, k): 0.0 for k in range(60)})
    found = spread(d, gaps_PE)
    expected = {"weights and data order": 9 / 60, "windows": 4 / 60, "pairs by windows": 1 / 3600}
    assert found.parts == pytest.approx(expected, rel=0.3)
    half = stats.t.ppf(0.975, 100) * math.sqrt(sum(found.parts.values()))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.02) and found.low < d.low < d.high < found.high
    assert spread(paired({(1, 1): 0.3}, {(1, 1): 0.0}), gaps_PE[:1]) is None


def test_a_judged_comparison_is_a_value():
    (judged,) = judge([of(0.1)])
    assert isinstance(judged, Judged) and judged.reversed.reversed == judged and statistics.judge([]) == []


def test_rank_correlation_and_its_interval_are_those_of_scipy():
    rng = np.random.default_rng(4)
    x = rng.normal(size=21)
    y = np.exp(x) + rng.normal(size=21)
    found = statistics.rank_correlation(x, y)
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic) and found.n == 21
    bootstrap = stats.bootstrap(
        (x, y), lambda x, y: stats.spearmanr(x, y).statistic, paired=True, n_resamples=2000, method="percentile",
        vectorized=False, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((bootstrap.low, bootstrap.high), abs=0.04)
    assert found.low < found.rho < found.high <= 1
    assert statistics.rank_correlation(x, 3 - x**3).rho == -1


def test_rank_correlation_needs_things_that_differ():
    assert statistics.rank_correlation([1, 2, 3, 4], [1, 2, 3, 4]) is None
    assert statistics.rank_correlation([1] * 6, range(6)) is None
    ties = statistics.rank_correlation([1, 1, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5])  # most resamples are constant in x
    assert -1 <= ties.low <= ties.high <= 1
