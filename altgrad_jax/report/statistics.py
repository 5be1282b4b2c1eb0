"""Paired comparisons of losses: intervals, tests, their correction, and the one class each comparison ends in.

A difference is taken between two runs that saw the same batches from the same initial weights, so that what a draw (the
seed of the weights and that of the data order) does to both cancels. Losses are in nats per token. Every test is at
ALPHA, every interval at CONFIDENCE. With the mean d of n differences, its standard error se and df degrees of freedom:

    interval        d +- t(0.975, df) se                                       (Student 1908)
    difference      two-sided t test of d = 0
    equivalence     two one-sided t tests of |d| >= margin, the larger p       (Schuirmann 1987)
    lost runs       Fisher's exact test of the runs without a loss             (Fisher 1935)
    ranks           Spearman's correlation, bootstrap over the arms             (Spearman 1904)
    text            block bootstrap over the validation windows                (Politis & Romano 1992)

A run without a loss (it diverged, or did not end) is never dropped in silence: its pair is counted apart, and the
interval is over the pairs in which both ended. docs/report.md says the same in plain words.
"""

import bisect
import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
MARGIN = 0.02  # nats per token: the default of the difference that matters
FEW = 5  # pairs; an interval of fewer is marked
RESAMPLES = 2000  # of a bootstrap over arms
MOST_PAIRS = 1000  # more than that are not worth a number
EQUIVALENT, WORSE, BETTER, INCONCLUSIVE = "equivalent", "worse", "better", "inconclusive"
# Largest share of a normal sample's range that lies between two neighbours, exceeded in 1% of samples of each size
# (200,000 draws; docs/results/report-statistics.md).
GAP_SIZES, GAP_SHARES = (4, 5, 6, 8, 10, 16), (0.931, 0.843, 0.764, 0.650, 0.578, 0.466)


# ------------------------------------------------------------------------------------------- one comparison


def half_width(se, df, confidence: float = CONFIDENCE):
    """Half the width of a Student interval; float or arrays of one shape, in the unit of se. NaN where df is."""
    return stats.t.ppf((1 + confidence) / 2, df) * se


def _t(mean, se):
    """mean / se, with 0 / 0 as 0: a difference that is 0 in every pair is no sign of one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(mean, 0), 0.0, np.divide(mean, se))


def p_difference(mean, se, df):
    """Two-sided p of a true mean of 0 (Student's t); float64 arrays of the arguments' shape, NaN where df is."""
    return 2 * stats.t.sf(np.abs(_t(mean, se)), df)


def p_equivalence(mean, se, df, margin: float):
    """p of a true mean outside (-margin, margin): the larger of two one-sided t tests (Schuirmann 1987).

    margin: > 0, in the unit of mean; ValueError otherwise. float64 arrays of the shape of mean, NaN where df is NaN.
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}, and must be > 0")
    return stats.t.sf(_t(margin - np.abs(mean), se), df)


def holm(p) -> np.ndarray:
    """p values corrected for their number, so that P(any false rejection) <= ALPHA (Holm 1979); float64 of p's shape.

    NaN is a test that could not be made: it stays NaN and is not counted.
    """
    p = np.asarray(p, np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = [i for i in np.argsort(p) if not math.isnan(p[i])]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted


def mean_squares(values_AB):
    """(seeds, data seeds, rest): mean squares of a two-way layout [A, B] with one difference a cell, A and B >= 2."""
    a, b = values_AB.shape
    rows, columns, mean = values_AB.mean(1), values_AB.mean(0), values_AB.mean()
    rest = values_AB - rows[:, None] - columns + mean
    return (
        float(b * np.sum((rows - mean) ** 2) / (a - 1)),
        float(a * np.sum((columns - mean) ** 2) / (b - 1)),
        float(np.sum(rest**2) / ((a - 1) * (b - 1))),
    )


def as_grid(values, draws):
    """float64 [A, B] of differences where each of A seeds was run with each of B data seeds, A and B >= 2; or None."""
    seeds, orders = (sorted(set(part)) for part in zip(*draws)) if draws else ((), ())
    if min(len(seeds), len(orders)) < 2 or len(seeds) * len(orders) != len(draws):
        return None
    at = dict(zip(draws, values))
    return np.array([[at[seed, order] for order in orders] for seed in seeds], np.float64)


def variance_parts(values, draws) -> dict[str, float] | None:
    """What each source adds to the variance of one difference, by the analysis of variance (Searle 1971, chapter 9).

    Args:
      values: differences in nats. draws: [(seed, data_seed)], one a value.

    Returns:
      {"weights", "data order", "both together"} in nats squared, never negative; None unless the draws are a grid.
    """
    grid = as_grid(values, draws)
    if grid is None:
        return None
    seeds, orders, rest = mean_squares(grid)
    a, b = grid.shape
    return {"weights": max(0.0, (seeds - rest) / b), "data order": max(0.0, (orders - rest) / a), "both together": rest}


def standard_error(values, draws):
    """(se, df) of the mean of float64 `values`; NaN where the draws allow none.

    Independent draws: s / sqrt(n) with n - 1. A grid of seeds x data seeds shares each of them among several pairs, so
    that the mean squares are combined, with Satterthwaite's (1946) degrees of freedom. Any other sharing has none.
    """
    values, n = np.asarray(values, np.float64), len(values)
    seeds, orders = (len(set(part)) for part in zip(*draws)) if n else (0, 0)
    if n >= 2 and {seeds, orders} <= {1, n}:
        return float(values.std(ddof=1)) / math.sqrt(n), n - 1
    grid = as_grid(values, draws)
    if grid is None:
        return math.nan, math.nan
    squares = np.array(mean_squares(grid))
    freedom = np.array([seeds - 1, orders - 1, (seeds - 1) * (orders - 1)])
    total = squares[0] + squares[1] - squares[2]
    if total <= squares[2]:  # no part beyond the rest was seen
        return math.sqrt(squares[2] / n), int(freedom[2])
    return math.sqrt(total / n), float(total**2 / np.sum(squares**2 / freedom))


@dataclass(frozen=True)
class Difference:
    """Losses of one cell minus those of another, paired by draw.

    draws, values: the pairs in which both runs have a loss: (seed, data_seed), and float64 nats per token. worse,
    better: draws of pairs in which only the first, only the second, has none. neither: those in which both have none.
    mean, se, df: of the values; NaN where there are too few. low, high: the interval.
    """

    draws: tuple
    values: tuple
    worse: tuple = ()
    better: tuple = ()
    neither: tuple = ()
    mean: float = math.nan
    se: float = math.nan
    df: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def n(self):
        return len(self.values)

    @property
    def n_pairs(self):
        return self.n + len(self.worse) + len(self.better) + len(self.neither)

    @property
    def sd(self):
        """Standard deviation that n independent pairs with this standard error would have; NaN without one."""
        return self.se * math.sqrt(self.n)

    @property
    def smallest_margin(self):
        """The smallest margin within which these pairs alone, uncorrected, would show equivalence; NaN without any."""
        return abs(self.mean) + float(half_width(self.se, self.df, 1 - 2 * ALPHA))


def paired(first, second) -> Difference:
    """The Difference first - second of {draw: loss}; a loss that is not finite is that of a run that has none."""
    groups = {"values": [], "worse": [], "better": [], "neither": []}
    for draw in sorted(first.keys() & second.keys()):
        ends = math.isfinite(first[draw]), math.isfinite(second[draw])
        groups[{(1, 1): "values", (0, 1): "worse", (1, 0): "better", (0, 0): "neither"}[ends]].append(draw)
    draws = tuple(groups.pop("values"))
    values = tuple(float(first[draw]) - float(second[draw]) for draw in draws)
    mean = float(np.mean(values)) if values else math.nan
    se, df = standard_error(values, draws)
    half = float(half_width(se, df))
    lost = {name: tuple(group) for name, group in groups.items()}
    return Difference(draws, values, **lost, mean=mean, se=se, df=df, low=mean - half, high=mean + half)


@dataclass(frozen=True)
class Spread:
    """What the mean of a Difference owes to its sources. parts: {source: variance of that mean, nats squared}.

    low, high: the CONFIDENCE interval of the mean over fresh pairs of runs and fresh windows of such text.
    """

    parts: dict
    low: float
    high: float


def block_length(values_E) -> int:
    """Neighbours that a block of the circular block bootstrap holds: Politis & White's (2004) rule for an AR(1) series.

    values_E: [E], a series whose lag-1 autocorrelation is estimated; 1 where it is not above 0. At most a quarter of E.
    """
    centred = np.asarray(values_E, np.float64) - np.mean(values_E)
    power_ = np.sum(centred**2)
    correlation = np.sum(centred[1:] * centred[:-1]) / power_ if power_ > 0 else 0.0
    if correlation <= 0:
        return 1
    length = (1.5 * (2 * correlation / (1 - correlation**2)) ** 2 * len(centred)) ** (1 / 3)
    return max(1, min(math.ceil(length), len(centred) // 4))


def bootstrap_variance(values_PE, block: int):
    """Variance of the mean over the last axis, float64 [...]: the circular block bootstrap's (Politis & Romano 1992).

    It is the limit of infinitely many resamples, in closed form, made unbiased for blocks that are independent.
    """
    values_PE = np.asarray(values_PE, np.float64)
    around = np.concatenate([values_PE, values_PE[..., : block - 1]], -1)
    means = np.lib.stride_tricks.sliding_window_view(around, block, axis=-1).mean(-1)
    return means.var(-1) / (values_PE.shape[-1] / block - 1)


def spread(d: Difference, gaps_PE) -> Spread | None:
    """The Spread of a Difference whose pairs have these gaps, [pairs, windows] in the order of d.draws.

    Pairs and windows are crossed: the variance of the mean is that over pairs, plus that over windows, less what both
    hold, the part of a pair and window together (Searle 1971). Degrees of freedom by Satterthwaite (1946). None
    without a standard error.
    """
    gaps_PE = np.asarray(gaps_PE, np.float64)
    if not d.n >= 2 or math.isnan(d.se) or gaps_PE.shape[1] < 2:
        return None
    block = block_length(gaps_PE.mean(0))
    of_windows, freedom = float(bootstrap_variance(gaps_PE.mean(0), block)), gaps_PE.shape[1] / block - 1
    rest = gaps_PE - gaps_PE.mean(0) - gaps_PE.mean(1, keepdims=True) + gaps_PE.mean()
    both = float(np.sum(bootstrap_variance(rest, block)) / (d.n * (d.n - 1)))
    seeds, orders = (len(set(part)) for part in zip(*d.draws))
    if found := variance_parts(d.values, d.draws):
        pairs = {name: part / n for (name, part), n in zip(found.items(), (seeds, orders, d.n))}
    else:
        pairs = {
            "weights and data order" if min(seeds, orders) > 1 else "weights" if seeds > 1 else "data order": d.se**2
        }
    last = list(pairs)[-1]
    pairs[last] = max(0.0, pairs[last] - both)
    parts = {**pairs, "windows": max(0.0, of_windows - both), "pairs by windows": both}
    total = sum(parts.values())
    terms = d.se**4 / d.df + of_windows**2 / freedom + both**2 / (d.df * freedom)
    half = float(half_width(math.sqrt(total), total**2 / terms if terms else d.df))
    return Spread(parts, d.mean - half, d.mean + half)


def p_lost(d: Difference) -> float:
    """Two-sided p of Fisher's exact test: runs lost by the first and by the second among the pairs.

    NaN where none was lost: such a table can reject nothing and need not be corrected for (Tarone 1990).
    """
    lost = len(d.worse) + len(d.neither), len(d.better) + len(d.neither)
    if not sum(lost):
        return math.nan
    return float(np.asarray(stats.fisher_exact([[n, d.n_pairs - n] for n in lost]))[1])


# ------------------------------------------------------------------------------------ a family of comparisons


@dataclass(frozen=True)
class Judged:
    """A Difference with its tests. p, p_equal, p_lost: raw; the same with `holm_`: corrected within its family."""

    d: Difference
    margin: float
    p: float
    p_equal: float
    p_lost: float
    holm_p: float
    holm_equal: float
    holm_lost: float

    @property
    def sign(self) -> int:
        """1: the first is worse, -1: better, 0: not separated from 0, after correction."""
        return int(np.sign(self.d.mean)) if self.holm_p <= ALPHA else 0

    @property
    def sign_lost(self) -> int:
        """1: more runs of the first were lost, -1: fewer, 0: not separated, after correction."""
        return int(np.sign(len(self.d.worse) - len(self.d.better))) if self.holm_lost <= ALPHA else 0

    @property
    def kind(self) -> str:
        """The class. Lost runs decide where their number is separated; then equivalence; then the difference.

        Survivors that are as good or better do not speak for a cell that lost runs which the other kept: the class is
        then inconclusive.
        """
        only = len(self.d.worse) - len(self.d.better)
        if self.sign_lost:
            return WORSE if self.sign_lost > 0 else BETTER
        if self.holm_equal <= ALPHA:
            return INCONCLUSIVE if only else EQUIVALENT
        if not self.sign or self.sign * only < 0:
            return INCONCLUSIVE
        return WORSE if self.sign > 0 else BETTER

    @property
    def separated(self) -> bool:
        """Whether the two are told apart: worse, better, or equivalent with a side."""
        return self.kind in (WORSE, BETTER) or self.kind == EQUIVALENT and bool(self.sign)

    @property
    def reversed(self) -> "Judged":
        """The same comparison seen from the other side."""
        d = self.d
        flipped = Difference(
            d.draws, tuple(-v for v in d.values), d.better, d.worse, d.neither, -d.mean, d.se, d.df, -d.high, -d.low
        )
        ps = (self.p, self.p_equal, self.p_lost, self.holm_p, self.holm_equal, self.holm_lost)
        return Judged(flipped, self.margin, *ps)


def judge(differences, margin: float = MARGIN) -> list[Judged]:
    """The Judged of each Difference of one family, in order.

    Holm's correction is over the family's tests of a difference, over its tests of equivalence, and over its tests of
    lost runs: three corrections, one for each kind of statement. margin: nats, > 0; ValueError otherwise.
    """
    raw = np.array(
        [
            (float(p_difference(d.mean, d.se, d.df)), float(p_equivalence(d.mean, d.se, d.df, margin)), p_lost(d))
            for d in differences
        ],
        np.float64,
    ).reshape(-1, 3)
    corrected = np.stack([holm(column) for column in raw.T], 1)
    return [Judged(d, margin, *map(float, (*p, *q))) for d, p, q in zip(differences, raw, corrected, strict=True)]


def judge_all(differences: dict, margin: float = MARGIN) -> dict:
    """`judge` of the values of a dict, under the same keys."""
    return dict(zip(differences, judge(list(differences.values()), margin), strict=True))


def letters(separated) -> list[str]:
    """The compact letter display: two names share a letter if and only if they are not separated (Piepho 2004).

    Args:
      separated: bool [N, N], symmetric.

    Returns:
      [letters], one string a name. The letters are the largest sets of names of which no two are separated, in the
      order of their first names.
    """
    apart = np.asarray(separated, bool)
    groups = {frozenset(range(len(apart)))}
    for i, j in zip(*np.nonzero(np.triu(apart))):
        split = {group - {k} if {i, j} <= group else group for group in groups for k in (i, j)}
        groups = {group for group in split if not any(group < other for other in split)}
    ordered = sorted(groups, key=sorted)
    return ["".join(_letter(k) for k, group in enumerate(ordered) if i in group) for i in range(len(apart))]


def _letter(k):
    return chr(ord("a") + k) if k < 26 else f"({k + 1})"


# -------------------------------------------------------------------------------- noise, power, shape, onset


@dataclass(frozen=True)
class Noise:
    """What another draw does, in nats. n: runs of one cell that have a loss.

    rms: root mean square difference of all pairs of them, sqrt(2) times their standard deviation; NaN with fewer than
    2.
    """

    rms: float
    n: int


def noise(losses) -> Noise:
    """The Noise among the losses of one cell; those that are not finite do not count."""
    losses = np.asarray([loss for loss in losses if math.isfinite(loss)], np.float64)
    if losses.size < 2:
        return Noise(math.nan, int(losses.size))
    return Noise(math.sqrt(2) * float(losses.std(ddof=1)), int(losses.size))


def power(n: int, effect: float) -> float:
    """Power of the two-sided paired t test with n pairs whose mean is `effect` standard deviations (noncentral t)."""
    limit, shift = stats.t.ppf(1 - ALPHA / 2, n - 1), min(abs(effect) * math.sqrt(n), 30.0)
    return float(stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift))


def power_of_equivalence(n: int, margin: float) -> float:
    """Power of the two one-sided tests with n pairs, a true mean of 0 and a margin in standard deviations.

    The two tests are taken as exclusive (the noncentral t approximation of Phillips 1990), which is a little too low.
    """
    shift = min(margin * math.sqrt(n), 30.0)
    return max(0.0, 2 * float(stats.nct.sf(stats.t.ppf(1 - ALPHA, n - 1), n - 1, shift)) - 1)


def pairs_needed(power_of, size: float) -> int | None:
    """The fewest pairs with which power_of(n, size) reaches POWER; None above MOST_PAIRS, or where size is NaN or 0.

    power_of: `power` or `power_of_equivalence`. No correction for the number of comparisons is in it.
    """
    if not size > 0 or power_of(MOST_PAIRS, size) < POWER:
        return None
    if math.isinf(size):
        return 2
    counts = range(2, MOST_PAIRS + 1)
    return counts[bisect.bisect_left(counts, POWER, key=lambda n: power_of(n, size))]


def has_two_clusters(values) -> bool:
    """Whether one gap between neighbours takes more of the range than in 99% of normal samples of that size.

    Where it does, the values look like two kinds of runs, and a t interval of their mean covers the truth far less
    often than it says. Fewer than 4 values are never flagged: they cannot tell. Between the sizes of GAP_SIZES the
    limit is interpolated, and beyond the last it stays.
    """
    values = np.sort(np.asarray(values, np.float64))
    if values.size < GAP_SIZES[0] or not np.ptp(values) > 0:
        return False
    return bool(np.diff(values).max() / np.ptp(values) > np.interp(values.size, GAP_SIZES, GAP_SHARES))


def onset(differences: dict, margin: float = MARGIN) -> int | None:
    """The first step from which a paired curve stays separated from 0 on one side, corrected over its steps.

    differences: {step: Difference}, ascending. None where it is not separated at the last step.
    """
    since, last = None, 0
    for step, judged in judge_all(differences, margin).items():
        if judged.sign != last or not judged.sign:
            since = step if judged.sign else None
        last = judged.sign
    return since


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation over n things, with a CONFIDENCE interval by a bootstrap over the things."""

    rho: float
    low: float
    high: float
    n: int


def rank_correlation(x_N, y_N) -> RankCorrelation | None:
    """The RankCorrelation (Spearman 1904) of two float64 series; None below FEW things, or where one is constant.

    Percentiles of RESAMPLES resamples with fixed random numbers; those in which a series is constant say nothing.
    """
    x_N, y_N = np.asarray(x_N, np.float64), np.asarray(y_N, np.float64)
    if len(x_N) < FEW or not (np.ptp(x_N) > 0 and np.ptp(y_N) > 0):
        return None
    chosen_RN = np.random.default_rng(0).integers(len(x_N), size=(RESAMPLES, len(x_N)))
    ranks = [stats.rankdata(series[chosen_RN], axis=1) for series in (x_N, y_N)]
    x_RN, y_RN = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    power_R = (x_RN**2).sum(1) * (y_RN**2).sum(1)
    drawn_R = (x_RN * y_RN).sum(1)[power_R > 0] / np.sqrt(power_R[power_R > 0])
    low, high = np.quantile(drawn_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    rho = float(np.asarray(stats.spearmanr(x_N, y_N))[0])
    return RankCorrelation(rho, float(low), float(high), len(x_N))
