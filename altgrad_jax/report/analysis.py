"""What the runs say: gaps to BF16, ranks, where a format fails first, what the optimizer changed, early warnings.

Gaps are of the last validation loss, in nats per token, to the BF16 run of the same seed and batches. Every arm is
taken at a learning rate of its own, the best of at least MIN_RATES, and so is BF16; an arm with fewer rates is taken
at the rate that it shares with most others, and compared with BF16 at that same rate.

Where a format fails first is a causal claim and comes from ablations: only W, only A, only G in the format, each
against BF16, and weights stored in the format against a float32 master, all at one learning rate and paired by seed.
Which statistic crossed a threshold first is an early warning beside it, not the cause.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from altgrad_jax.numerics.formats import DEFAULT_8BIT
from altgrad_jax.report import statistics
from altgrad_jax.report.runs import FINISHED, LOST, OPERANDS, REFERENCE, Arm, check_comparable, name_variants
from altgrad_jax.run.alerts import is_bottleneck

MIN_RATES = 3
ADAMW = "adamw"
MASTER = "float32"
CAUSES = ("forward (W)", "forward (A)", "gradient (G)", "update")


@dataclass(frozen=True)
class Threshold:
    """A statistic that warns from `value` on: above it, or below it. setting: the config's, where it has one.

    stored: it only says something of weights that are stored in a format (under a master an update that reaches no
    operand yet is kept and adds up).
    """

    statistic: str
    above: bool
    value: float
    unit: str
    setting: str | None = None
    stored: bool = False


# In the order in which they are named where several cross at one step.
THRESHOLDS = (
    Threshold("nonfinite_loss", True, 0, ""),
    Threshold("nonfinite_grads", True, 0, "elements"),
    Threshold("nonfinite_params", True, 0, "elements"),
    Threshold("nonfinite_moments", True, 0, "elements"),
    Threshold("nonfinite_amax", True, 0, "entries of the history"),
    Threshold("nonfinite_scale", True, 0, "scales"),
    Threshold("nonfinite_residual", True, 0, "elements"),
    Threshold("nonfinite_updates", True, 0, "elements"),
    Threshold("lost", True, 0.5, "share of updates", "bit_stall_threshold", stored=True),
    Threshold("effective_lr", False, 0.5, "of the learning rate", stored=True),
    Threshold("overflow", True, 0.01, "share of elements", "overflow_threshold"),
    Threshold("underflow", True, 0.5, "share of elements"),
    Threshold("sqnr_db", False, 10.0, "dB"),
    Threshold("grad_cosine", False, 0.99, "cosine with the float32 gradient"),
    Threshold("stable_rank", False, 0.1, "of its first value after the warm-up", "rank_threshold"),
)


@dataclass(frozen=True)
class Choice:
    """The learning rate an arm is taken at.

    rates: those among which it was chosen, ascending. seeds: those that all of them have. means: {rate: mean loss over
    them, infinite with a lost run}. best: whether it is the best of at least MIN_RATES. works: (lowest, highest) of the
    neighbouring rates around it whose mean is within the noise floor of the best; None without a noise floor or a
    choice.
    """

    rate: float
    rates: tuple
    seeds: tuple
    means: dict
    best: bool
    works: tuple | None = None

    @property
    def at_edge(self):
        """Whether it is the best of several, and the lowest or highest of them."""
        return self.best and self.rate in (self.rates[0], self.rates[-1])


class Comparison:
    """Runs that may be compared, by cell. UserError where they may not; unfinished and damaged ones do not count."""

    def __init__(self, runs):
        self.all_runs = runs
        identified = [run for run in runs if run.arm is not None]
        check_comparable(identified)
        name_variants(identified)
        self.cells, self.duplicates = {}, []
        for run in identified:
            if run.ended:
                cell = self.cells.setdefault((run.arm, run.learning_rate), {})
                if run.seed in cell:
                    self.duplicates.append((run, cell[run.seed]))
                else:
                    cell[run.seed] = run
        self.arms = sorted({arm for arm, _ in self.cells}, key=_order)
        self.reference = Arm(REFERENCE) if Arm(REFERENCE) in self.arms else None
        self.formats = list(dict.fromkeys(arm.format for arm in self.arms if arm.plain and not _is_reference(arm)))
        self._rates_of_arms = Counter(rate for arm, rate in self.cells if arm.plain)
        self._choices = {}
        self.noise = statistics.Noise(math.nan, math.nan, 0)
        if self.reference:
            rate = self.choice(self.reference).rate
            self.noise = statistics.noise_floor(self.losses(self.reference, rate).values())
            self._choices.clear()  # the range of rates that work depends on the noise
        self.primary = self._primary()

    def _primary(self):
        """(at_rest, optimizer) of the treatment that is ranked: a float32 master with AdamW, or the most frequent."""
        kinds = Counter((arm.at_rest, arm.optimizer) for arm in self.arms if arm.plain and arm.format in self.formats)
        return (MASTER, ADAMW) if (MASTER, ADAMW) in kinds or not kinds else max(kinds, key=lambda k: (kinds[k], k))

    # ------------------------------------------------------------------------------------------------- cells

    def cell(self, arm, rate):
        """{seed: run}, by ascending seed."""
        return dict(sorted(self.cells.get((arm, rate), {}).items()))

    def losses(self, arm, rate):
        """{seed: last validation loss}; infinity for a lost run."""
        return {seed: run.val_loss for seed, run in self.cell(arm, rate).items()}

    def rates(self, arm):
        return sorted(rate for other, rate in self.cells if other == arm)

    def choice(self, arm):
        if arm not in self._choices:
            self._choices[arm] = self._choose(arm)
        return self._choices[arm]

    def _choose(self, arm):
        rates = self.rates(arm)
        seeds = set.intersection(*(set(self.cell(arm, rate)) for rate in rates))
        if not seeds:  # a sweep under way: only the rates with the most seeds compete
            most = max(len(self.cell(arm, rate)) for rate in rates)
            full = [rate for rate in rates if len(self.cell(arm, rate)) == most]
            sets = {rate: set(self.cell(arm, rate)) for rate in full}
            rates = [rate for rate in full if sets[rate] == sets[full[0]]]
            seeds = sets[full[0]]
        lost = {rate: sum(not math.isfinite(self.losses(arm, rate)[seed]) for seed in seeds) for rate in rates}
        means = {
            rate: float(np.mean([self.losses(arm, rate)[seed] for seed in seeds], dtype=np.float64)) for rate in rates
        }
        if len(rates) < MIN_RATES:
            own = self.choice(self.reference).rate if self.reference and arm != self.reference else None
            rate = (
                own
                if own is not None and own in rates
                else max(rates, key=lambda rate: (self._rates_of_arms[rate], -rate))
            )
            return Choice(rate, tuple(rates), tuple(sorted(seeds)), means, False)

        def survivors(rate):
            return float(
                np.mean(
                    [v for seed, v in self.losses(arm, rate).items() if seed in seeds and math.isfinite(v)]
                    or [math.inf]
                )
            )

        best = min(rates, key=lambda rate: (lost[rate], survivors(rate)))
        works = None
        if math.isfinite(means[best]) and math.isfinite(self.noise.rms):
            low = high = rates.index(best)
            while low > 0 and means[rates[low - 1]] - means[best] <= self.noise.rms:
                low -= 1
            while high < len(rates) - 1 and means[rates[high + 1]] - means[best] <= self.noise.rms:
                high += 1
            works = rates[low], rates[high]
        return Choice(best, tuple(rates), tuple(sorted(seeds)), means, True, works)

    def reference_rate(self, arm):
        """The learning rate of the BF16 runs that an arm is compared with; None without any."""
        if self.reference is None:
            return None
        own, rate = self.choice(self.reference).rate, self.choice(arm).rate
        return own if self.choice(arm).best or not self.cell(self.reference, rate) else rate

    # --------------------------------------------------------------------------------------------------- gaps

    def difference(self, first, second):
        """The Difference between two (arm, rate)."""
        return statistics.paired(self.losses(*first), self.losses(*second))

    def gap(self, arm):
        """The Difference to BF16, or None where there is no BF16 run."""
        rate = self.reference_rate(arm)
        return None if rate is None else self.difference((arm, self.choice(arm).rate), (self.reference, rate))

    def failures(self, arm, rate=None):
        """(runs that are not sound or did not end, runs), at one learning rate or at all of them."""
        runs = [
            run
            for (other, at), cell in self.cells.items()
            if other == arm and rate in (None, at)
            for run in cell.values()
        ]
        return sum(run.state == LOST or not run.sound for run in runs), len(runs)

    def mean_loss(self, arm):
        """(mean over the seeds that have a loss, seeds that have, seeds) at the arm's learning rate."""
        losses = list(self.losses(arm, self.choice(arm).rate).values())
        finite = [loss for loss in losses if math.isfinite(loss)]
        return float(np.mean(finite)) if finite else math.nan, len(finite), len(losses)

    def ranking(self):
        """[(rank or None, arm)] of the primary treatment and the references, best first.

        A rank is None where no arm has two pairs with its neighbour or a lost run: one seed ranks nothing.
        """
        arms = [
            arm
            for arm in self.arms
            if arm.plain
            and ((arm.at_rest, arm.optimizer) == self.primary or _is_reference(arm) and arm.optimizer == ADAMW)
        ]

        def key(arm):
            mean, ended, n = self.mean_loss(arm)
            gap = self.gap(arm)
            value = mean if gap is None or math.isnan(gap.mean) else gap.mean
            return (n - ended) / n, gap is not None and math.isnan(gap.mean), value if ended else math.inf, _order(arm)

        arms.sort(key=key)

        def between(arm, other):
            return self.difference((arm, self.choice(arm).rate), (other, self.choice(other).rate))

        pairs = [between(arm, other) for other, arm in zip(arms, arms[1:])]
        if not any(pair.n > 1 or pair.sign for pair in pairs):
            return [(None, arm) for arm in arms]
        return list(zip(statistics.rank_groups(arms, lambda arm, other: between(arm, other).sign), arms, strict=True))

    def treatments(self):
        """[(at_rest, optimizer, variant)] of whole formats, the primary first."""
        kinds = {
            (arm.at_rest, arm.optimizer, arm.variant) for arm in self.arms if arm.plain and arm.format in self.formats
        }
        return sorted(kinds, key=lambda kind: (kind[:2] != self.primary, _rest_order(kind[0]), kind[1] != ADAMW, kind))

    def lr_heading(self):
        """How learning rates were chosen, for the headings: one phrase."""
        choices = [self.choice(arm) for _, arm in self.ranking()]
        if choices and all(choice.best for choice in choices):
            counts = sorted({len(choice.rates) for choice in choices})
            return f"each format at its own best of {' or '.join(map(str, counts))} learning rates"
        rates = sorted({choice.rate for choice in choices})
        if not any(choice.best for choice in choices) and len(rates) == 1:
            return f"at learning rate {rates[0]:g}"
        return f"each at its own best learning rate where at least {MIN_RATES} were run, else at the rate in the table"

    # ---------------------------------------------------------------------------------------- what fails first

    def causes(self, name):
        """(learning rate, {cause: Difference}) of a format, from its ablations and stored weights at one rate."""
        by_rate = {}
        for operand, cause in zip(OPERANDS, CAUSES):
            for rate in self.rates(Arm(name, operand)):
                if self.reference and self.cell(self.reference, rate):
                    by_rate.setdefault(rate, {})[cause] = (Arm(name, operand), rate), (self.reference, rate)
        master = Arm(name)
        stored = next(
            (arm for at_rest in ("nearest", "stochastic") for arm in [Arm(name, at_rest=at_rest)] if self.rates(arm)),
            None,
        )
        at_rest_only = next(
            (
                arm
                for arm in self.arms
                if arm.format == name and not arm.operands and arm.optimizer == ADAMW and not arm.variant
            ),
            None,
        )
        for rate in list(by_rate) or (self.rates(stored) if stored else []):
            if at_rest_only and self.cell(at_rest_only, rate) and self.reference and self.cell(self.reference, rate):
                by_rate.setdefault(rate, {})["update"] = (at_rest_only, rate), (self.reference, rate)
            elif stored and self.cell(stored, rate) and self.cell(master, rate):
                by_rate.setdefault(rate, {})["update"] = (stored, rate), (master, rate)
        if not by_rate:
            return None, {}
        found = {
            rate: {cause: self.difference(*pair) for cause, pair in pairs.items()} for rate, pairs in by_rate.items()
        }
        rate = max(found, key=lambda r: (len(found[r]), sum(d.n_pairs for d in found[r].values()), -r))
        return rate, {cause: found[rate][cause] for cause in CAUSES if cause in found[rate]}

    def first_failure(self, name):
        """(words, causes blamed, reservation): the largest cause separated from 0, and those not separated from it."""
        _, causes = self.causes(name)
        if not causes:
            return "not measured", (), "no ablations"
        single = all(d.n_pairs < 2 for d in causes.values())
        if single:  # no interval: the noise floor is all there is to hold a difference against
            if math.isnan(self.noise.rms):
                return "cannot tell", (), "one seed, no noise floor"
            guilty = {c: d for c, d in causes.items() if d.worse or d.mean > self.noise.rms}
        else:
            guilty = {c: d for c, d in causes.items() if d.sign > 0}
        if not guilty:
            return "not separated", (), "one seed, within the noise floor" if single else ""
        worst = max(guilty, key=lambda cause: (len(guilty[cause].worse), guilty[cause].mean))

        def as_bad(cause):
            one, two = guilty[worst], guilty[cause]
            if len(one.worse) != len(two.worse):
                return False
            if single:
                return bool(one.worse) or one.mean - two.mean <= self.noise.rms
            between = statistics.paired(dict(zip(one.seeds, one.values)), dict(zip(two.seeds, two.values)))
            return between.sign <= 0

        blamed = tuple(cause for cause in guilty if cause == worst or as_bad(cause))
        return " or ".join(blamed), blamed, "one seed, above the noise floor" if single else ""

    # -------------------------------------------------------------------------------------------- optimizer

    def optimizer_effects(self):
        """[(format, at_rest, optimizer, learning rate, Difference to AdamW)]: same rate, seeds, format and storage."""
        rows = []
        for arm in self.arms:
            base = Arm(arm.format, arm.operands, arm.at_rest, ADAMW, arm.variant)
            if arm.optimizer == ADAMW or not arm.plain or arm.format not in self.formats or base not in self.arms:
                continue
            own = self.choice(base).rate
            for rate in self.rates(arm):
                if self.cell(base, rate):
                    rows.append((arm, rate, rate == own, self.difference((arm, rate), (base, rate))))
        return rows

    # ------------------------------------------------------------------------------------------------ checks

    def same_grid(self, first, second):
        """(equal, runs compared) of two formats that should give the same losses to the bit; None where none match."""
        equal, n = True, 0
        for arm in [arm for arm in self.arms if arm.format == first]:
            twin = Arm(second, arm.operands, arm.at_rest, arm.optimizer, arm.variant)
            for rate in self.rates(arm) if arm.at_rest == MASTER else []:
                theirs = self.cell(twin, rate)
                for seed, run in self.cell(arm, rate).items():
                    if seed in theirs and run.state == theirs[seed].state == FINISHED:
                        n += 1
                        equal &= _same(run, theirs[seed])
        return (equal, n) if n else None


def _same(run, other):
    """Whether two runs have equal losses at all steps that both recorded, to the bit."""

    def columns(r):
        return dict(zip(r.steps.tolist(), r.losses.view(np.int32).tolist())), dict(
            zip(r.val_steps.tolist(), r.val_losses.view(np.int32).tolist())
        )

    return all(
        mine[step] == theirs[step]
        for mine, theirs in zip(columns(run), columns(other))
        for step in mine.keys() & theirs.keys()
    )


def _is_reference(arm):
    return arm.format in (REFERENCE, "float32", f"{REFERENCE} as a format")


def _rest_order(at_rest):
    order = (MASTER, "nearest", "stochastic", "error_feedback")
    return order.index(at_rest) if at_rest in order else len(order)


def _order(arm):
    """Of arms in lists: references first, then formats by ascending exponent bits, then others by name."""
    if _is_reference(arm):
        place = 0, (REFERENCE, f"{REFERENCE} as a format", "float32").index(arm.format)
    else:
        place = (1, DEFAULT_8BIT.index(arm.format)) if arm.format in DEFAULT_8BIT else (2, 0)
    return (
        *place,
        arm.format,
        -len(arm.operands),
        "WAG".find(arm.operands),
        _rest_order(arm.at_rest),
        arm.optimizer != ADAMW,
        arm.optimizer,
        arm.variant,
    )


# -------------------------------------------------------------------------------------------- early warnings


def layers_of(history, statistic):
    """{layer, with the operand where there is one: column} of a statistic; the total only where no layer has it."""
    columns = {key.partition("/")[2]: column for key, column in history.items() if key.partition("/")[0] == statistic}
    single = {layer: column for layer, column in columns.items() if layer and not layer.startswith("all")}
    return single or {layer or "all": column for layer, column in columns.items()}


def _with_totals(history, statistic):
    """`layers_of`, and the totals in the rows that hold no layer (a record may have layers in every Nth row only)."""
    layers = layers_of(history, statistic)
    recorded = np.any([np.isfinite(column) for column in layers.values()], axis=0) if layers else False
    totals = {}
    for key, column in history.items():
        name, _, layer = key.partition("/")
        if name == statistic and (layer or "all") not in layers:
            totals[layer or "all"] = np.where(recorded, np.nan, column)
    return layers | totals


def first_crossings(history, config, stored):
    """The first crossing of each threshold in one run.

    Args:
      history: from runs.read_statistics. config: the run's. stored: whether its weights are kept in a format.

    Returns:
      {statistic: (step, layer, value, limit, layers that crossed at that step)}; layers in the record's order decide
      which one is named. Of stable_rank, value and limit are shares of the first value after the warm-up.
    """
    found = {}
    for threshold in THRESHOLDS:
        if threshold.stored and not stored:
            continue
        limit = config.get(threshold.setting, threshold.value) if threshold.setting else threshold.value
        crossed = []
        for layer, column in _with_totals(history, threshold.statistic).items():
            values, own_limit = np.asarray(column, np.float64), limit
            if threshold.statistic == "stable_rank":
                values = _share_of_first(history["step"], values, config.get("warmup_steps", 0))
                own_limit = config.get("rank_threshold_strict", limit) if is_bottleneck(layer) else limit
            with np.errstate(invalid="ignore"):  # a nonfinite count may itself be NaN
                beyond = values > own_limit if threshold.above else values < own_limit
            if threshold.statistic.startswith("nonfinite"):
                beyond |= np.isinf(values)
            if beyond.any():
                row = int(np.argmax(beyond))
                crossed.append((int(history["step"][row]), layer, float(values[row]), own_limit))
        if crossed:
            step = min(step for step, *_ in crossed)
            now = [c for c in crossed if c[0] == step]
            found[threshold.statistic] = (*now[0], len(now))
    return found


def _share_of_first(steps, values, after):
    counts = np.isfinite(values) & (steps > after) & (values > 0)
    return values / values[np.argmax(counts)] if counts.any() else np.full(len(values), np.nan)


def early_warning(crossings):
    """The earliest of `first_crossings`: (statistic, crossing), or None. Of equal steps the first in THRESHOLDS."""
    order = [threshold.statistic for threshold in THRESHOLDS]
    return min(crossings.items(), key=lambda item: (item[1][0], order.index(item[0])), default=None)
