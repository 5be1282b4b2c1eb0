"""Differences paired by seed, their Student t intervals, and ranks that do not claim more than the intervals do.

A difference is taken between two runs that saw the same batches from the same initial weights, so that what a seed does
to both cancels. With pairs d_1 ... d_n, their mean d and standard deviation s (n - 1 in the denominator), the
interval is

    d +- t s / sqrt(n),    t the (1 + CONFIDENCE) / 2 quantile of Student's distribution with n - 1 degrees of freedom.

Fewer than 2 pairs have no interval. A run without a loss (it diverged, or did not end) is worse than any number: its
pair counts as infinite, is never dropped, and the interval is over the others and says so. No correction for the number
of comparisons is made.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
FEW = 5  # pairs; an interval of fewer is marked


@dataclass(frozen=True)
class Difference:
    """Losses of one cell minus those of another, paired by seed.

    seeds, values: the pairs in which both runs have a loss (float64, nats per token). worse, better: seeds of pairs in
    which only the first, only the second, has none. neither: seeds in which both have none.
    mean: of the values; NaN without any. low, high: the interval; NaN with fewer than 2 values.
    """

    seeds: tuple
    values: tuple
    worse: tuple = ()
    better: tuple = ()
    neither: tuple = ()
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def n(self):
        return len(self.values)

    @property
    def n_pairs(self):
        return self.n + len(self.worse) + len(self.better) + len(self.neither)

    @property
    def sign(self):
        """1: the first is worse, -1: better, 0: not separated (or too few pairs to tell).

        A cell of which more seeds have no loss is worse than one of which fewer have none.
        """
        if len(self.worse) != len(self.better):
            return 1 if len(self.worse) > len(self.better) else -1
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def interval(values):
    """(mean, low, high) of float64 values; NaN where there are too few."""
    values = np.asarray(values, np.float64)
    if not values.size:
        return math.nan, math.nan, math.nan
    mean = float(values.mean())
    if values.size < 2:
        return mean, math.nan, math.nan
    half = (
        float(stats.t.ppf((1 + CONFIDENCE) / 2, values.size - 1)) * float(values.std(ddof=1)) / math.sqrt(values.size)
    )
    return mean, mean - half, mean + half


def paired(first, second):
    """The Difference first - second of {seed: loss}; a loss that is not finite is that of a run that has none."""
    groups = {"values": [], "worse": [], "better": [], "neither": []}
    for seed in sorted(first.keys() & second.keys()):
        ends = math.isfinite(first[seed]), math.isfinite(second[seed])
        groups[{(1, 1): "values", (0, 1): "worse", (1, 0): "better", (0, 0): "neither"}[ends]].append(seed)
    seeds = tuple(groups.pop("values"))
    values = tuple(float(first[seed]) - float(second[seed]) for seed in seeds)
    return Difference(
        seeds,
        values,
        **{name: tuple(group) for name, group in groups.items()},
        **dict(zip(("mean", "low", "high"), interval(values), strict=True)),
    )


@dataclass(frozen=True)
class Noise:
    """What another seed does: absolute differences of the losses of all pairs of seeds of one cell.

    rms: root mean square over the pairs (sqrt(2) times the standard deviation of the seeds); largest; n_seeds.
    NaN with fewer than 2 seeds.
    """

    rms: float
    largest: float
    n_seeds: int


def noise_floor(losses):
    """The Noise among losses of one cell; those that are not finite do not count."""
    losses = np.asarray([loss for loss in losses if math.isfinite(loss)], np.float64)
    if losses.size < 2:
        return Noise(math.nan, math.nan, int(losses.size))
    differences = np.abs(losses[:, None] - losses)[np.triu_indices(losses.size, 1)]
    return Noise(float(np.sqrt(np.mean(differences**2))), float(differences.max()), int(losses.size))


def rank_groups(names, sign):
    """[rank] for names in order, best first: a new rank begins only where a name is worse than its upper neighbour.

    Args:
      sign: of (name, upper neighbour), as Difference.sign. Ranks count names: after two names of rank 1 comes 3.
    """
    ranks = []
    for i, name in enumerate(names):
        ranks.append(1 if not i else i + 1 if sign(name, names[i - 1]) > 0 else ranks[-1])
    return ranks
