"""What the runs say: gaps to BF16, groups, what each part costs, what the optimizer changed, early warnings.

Gaps are of the last validation loss, in nats per token, to the BF16 run of the same draw (seed and data seed). Every
arm is taken at a learning rate of its own, the best of at least MIN_RATES, and so is BF16; an arm with fewer rates is
taken at the rate that it shares with most others, and compared with BF16 at that same rate.

Comparisons that answer one question are one family, and are corrected together (`statistics.judge`):

    gaps       every whole format in every treatment against BF16, each at its own rate
    rate_gaps  the same at every rate, against BF16 at that rate
    pairs      every two of the ranked arms, but for those with BF16, which are gaps
    costs      ablations: only W, only A, only G in the format against BF16, and weights stored in it against a master
    effects    another optimizer, or another setting of the formats, against the same arm without it
    findings   published claims about recipes (`claims.CLAIMS`), of which both arms were run

What a part costs is a causal claim and comes from ablations alone. Which statistic crossed a threshold first is an
early warning beside it, not the cause.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from altgrad_jax.numerics.formats import DEFAULT_8BIT
from altgrad_jax.report import claims, statistics
from altgrad_jax.report.needs import MIN_RATES
from altgrad_jax.report.runs import FINISHED, LOST, OPERANDS, REFERENCE, Arm, check_comparable, name_variants
from altgrad_jax.run.alerts import is_bottleneck

ADAMW = "adamw"
MASTER = "float32"
SAME_GRID = ("E0M7", "E1M6")  # two names of one grid, up to a power of two
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
    Threshold("lost_update", True, 0.5, "share of updates", "bit_stall_threshold", stored=True),
    Threshold("update_gain", False, 0.5, "of the update", stored=True),
    Threshold("overflow", True, 0.01, "share of elements", "overflow_threshold"),
    Threshold("underflow", True, 0.5, "share of elements"),
    Threshold("sqnr_db", False, 10.0, "dB"),
    Threshold("grad_cosine", False, 0.99, "cosine with the float32 gradient"),
    Threshold("stable_rank", False, 0.1, "of its first value after the warm-up", "rank_threshold"),
)


@dataclass(frozen=True)
class Choice:
    """The learning rate an arm is taken at.

    rates: those among which it was chosen, ascending. draws: those that all of them have. means: {rate: mean loss over
    them, infinite with a lost run}. best: whether it is the best of at least MIN_RATES. works: (lowest, highest) of the
    neighbouring rates around it whose mean is within the margin of the best; None with a lost run or without a choice.
    """

    rate: float
    rates: tuple
    draws: tuple
    means: dict
    best: bool
    works: tuple | None = None

    @property
    def at_edge(self):
        """Whether it is the best of several, and the lowest or highest of them."""
        return self.best and self.rate in (self.rates[0], self.rates[-1])


@dataclass(frozen=True)
class Cost:
    """What one part of a format costs: a cause, the two (arm, rate) that were compared, and the Judged comparison."""

    cause: str
    first: tuple
    second: tuple
    judged: statistics.Judged

    @property
    def d(self):
        return self.judged.d

    @property
    def by_draw(self):
        """{draw: cost in nats}; infinity where only the first run has no loss."""
        return dict(zip(self.d.draws, self.d.values)) | dict.fromkeys(self.d.worse, math.inf)


class Comparison:
    """Runs that may be compared, by cell. UserError where they may not; unfinished and damaged ones do not count.

    margin: nats per token within which two losses count as equivalent, > 0. Of SAME_GRID the second name's runs are
    left out of every comparison where all that both have agree to the bit: `twin` is then that name.
    """

    def __init__(self, runs, margin=statistics.MARGIN):
        self.all_runs, self.margin = runs, margin
        identified = [run for run in runs if run.arm is not None]
        check_comparable(identified)
        name_variants(identified)
        self.cells, self.duplicates = {}, []
        for run in identified:
            if run.ended:
                cell = self.cells.setdefault((run.arm, run.learning_rate), {})
                if run.draw in cell:
                    self.duplicates.append((run, cell[run.draw]))
                else:
                    cell[run.draw] = run
        ended = [run for cell in self.cells.values() for run in cell.values()]
        self.over_all_windows = bool(ended) and not any(math.isnan(run.all_windows) for run in ended)
        arms = sorted({arm for arm, _ in self.cells}, key=_order)
        equal = _same_grid(self.cells, *SAME_GRID)
        self.twin = SAME_GRID[1] if equal and equal[0] else None
        self.arms = [arm for arm in arms if arm.format != self.twin]
        self.reference = Arm(REFERENCE) if Arm(REFERENCE) in self.arms else None
        self.formats = list(dict.fromkeys(arm.format for arm in self.arms if arm.plain and not _is_reference(arm)))
        self._rates_of_arms = Counter(rate for arm, rate in self.cells if arm.plain)
        self._choices = {}
        self.primary = self._primary()

    def _primary(self):
        """(at_rest, optimizer) of the treatment that is ranked: a float32 master with AdamW, or the most frequent."""
        kinds = Counter((arm.at_rest, arm.optimizer) for arm in self.arms if arm.plain and arm.format in self.formats)
        return (MASTER, ADAMW) if (MASTER, ADAMW) in kinds or not kinds else max(kinds, key=lambda k: (kinds[k], k))

    @cached_property
    def scales(self):
        """What the scales of most runs in a number format come from, in words; "" without such runs."""
        found = Counter(
            (run.config["scaling"], run.config["amax_history"], run.config["scale_rounding"])
            for run in self.all_runs
            if run.config.get("use_fp8")
        )
        if not found:
            return ""
        scaling, history, rounding = max(found, key=lambda key: (found[key], key))
        over = f" over {history} updates" if "delayed" in scaling else ""
        return f"{scaling}{over}, {'powers of two' if rounding == 'power_of_two' else rounding}"

    # ------------------------------------------------------------------------------------------------- cells

    def cell(self, arm, rate):
        """{draw: run}, by ascending draw."""
        return dict(sorted(self.cells.get((arm, rate), {}).items()))

    def losses(self, arm, rate):
        """{draw: last validation loss, over every window if all runs have it}; infinity for a lost run."""
        every = self.over_all_windows
        return {draw: run.all_windows if every else run.val_loss for draw, run in self.cell(arm, rate).items()}

    def rates(self, arm):
        return sorted(rate for other, rate in self.cells if other == arm)

    def choice(self, arm):
        if arm not in self._choices:
            self._choices[arm] = self._choose(arm)
        return self._choices[arm]

    def _choose(self, arm):
        rates = self.rates(arm)
        draws = set.intersection(*(set(self.cell(arm, rate)) for rate in rates))
        if not draws:  # a sweep under way: only the rates with the most draws compete
            most = max(len(self.cell(arm, rate)) for rate in rates)
            full = [rate for rate in rates if len(self.cell(arm, rate)) == most]
            sets = {rate: set(self.cell(arm, rate)) for rate in full}
            rates = [rate for rate in full if sets[rate] == sets[full[0]]]
            draws = sets[full[0]]
        losses = {rate: [self.losses(arm, rate)[draw] for draw in draws] for rate in rates}
        means = {rate: float(np.mean(losses[rate], dtype=np.float64)) for rate in rates}
        common = tuple(rates), tuple(sorted(draws)), means
        if len(rates) < MIN_RATES:
            own = self.choice(self.reference).rate if self.reference and arm != self.reference else None
            shared = max(rates, key=lambda rate: (self._rates_of_arms[rate], -rate))
            return Choice(own if own is not None and own in rates else shared, *common, False)
        best = min(rates, key=lambda rate: _lost_then_mean(losses[rate]))
        return Choice(best, *common, True, self._works(rates, means, best))

    def _works(self, rates, means, best):
        if not math.isfinite(means[best]):
            return None
        low = high = rates.index(best)
        while low > 0 and means[rates[low - 1]] - means[best] <= self.margin:
            low -= 1
        while high < len(rates) - 1 and means[rates[high + 1]] - means[best] <= self.margin:
            high += 1
        return rates[low], rates[high]

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

    def noise(self, rate):
        """The Noise among the BF16 runs at one learning rate."""
        return statistics.noise(self.losses(self.reference, rate).values())

    @cached_property
    def gaps(self):
        """{arm: Judged gap to BF16} of every whole format and every other reference; {} where there is no BF16 run."""
        arms = [arm for arm in self.arms if self.reference and arm.plain and arm != self.reference]
        return statistics.judge_all({arm: self._gap(arm) for arm in arms}, self.margin)

    def _gap(self, arm):
        return self.difference((arm, self.choice(arm).rate), (self.reference, self.reference_rate(arm)))

    def gap(self, arm):
        """The Judged gap of an arm to BF16; None for BF16 itself, and where there is no BF16 run."""
        return self.gaps.get(arm)

    @cached_property
    def rate_gaps(self):
        """{(arm, rate): Judged gap to BF16 at the same rate}."""
        found = {
            (arm, rate): self.difference((arm, rate), (self.reference, rate))
            for arm in self.gaps
            for rate in self.rates(arm)
            if self.cell(self.reference, rate)
        }
        return statistics.judge_all(found, self.margin)

    @cached_property
    def spreads(self):
        """{arm: Spread of its gap over pairs and windows}, where the losses of every window are known."""
        found = {}
        for arm, judged in self.gaps.items() if self.over_all_windows else ():
            cells = self.cell(arm, self.choice(arm).rate), self.cell(self.reference, self.reference_rate(arm))
            losses = [[cell[draw].window_losses for cell in cells] for draw in judged.d.draws]
            if losses and len({len(one) for pair in losses for one in pair}) == 1:
                gaps_PE = np.array([mine - its for mine, its in losses])
                found[arm] = statistics.spread(judged.d, gaps_PE)
        return {arm: one for arm, one in found.items() if one}

    @cached_property
    def onsets(self):
        """{arm: step}: where the paired validation curves separate from BF16's for good; arms whose gap is separated.

        Corrected over the steps of one curve.
        """
        found = {}
        for arm, judged in self.gaps.items():
            step = statistics.onset(self._curve(arm, judged.d.draws), self.margin) if judged.sign else None
            if step is not None:
                found[arm] = step
        return found

    def _curve(self, arm, draws):
        """{step: Difference} of the validation losses to BF16's, at the steps that all runs of `draws` evaluated."""
        cells = self.cell(arm, self.choice(arm).rate), self.cell(self.reference, self.reference_rate(arm))
        mine, its = ({draw: _validation(cell[draw]) for draw in draws} for cell in cells)
        steps = set.intersection(*map(set, [*mine.values(), *its.values()])) - {0}
        return {
            step: statistics.paired(
                {draw: mine[draw][step] for draw in draws}, {draw: its[draw][step] for draw in draws}
            )
            for step in sorted(steps)
        }

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

    @cached_property
    def ranked(self):
        """The arms of the primary treatment and the references, best first."""
        arms = [
            arm
            for arm in self.arms
            if arm.plain
            and ((arm.at_rest, arm.optimizer) == self.primary or _is_reference(arm) and arm.optimizer == ADAMW)
        ]

        def key(arm):
            mean, ended, n = self.mean_loss(arm)
            gap = self.gap(arm)
            unpaired = gap is not None and not gap.d.n
            value = mean if unpaired or self.reference is None else gap.d.mean if gap else 0.0
            return (n - ended) / n, unpaired, value if ended else math.inf, _order(arm)

        return sorted(arms, key=key)

    @cached_property
    def pairs(self):
        """{(arm, other): Judged}, both ways, of every two of `ranked`. Those with BF16 are the gaps."""
        ranked = self.ranked
        found = {
            (arm, other): self.difference((arm, self.choice(arm).rate), (other, self.choice(other).rate))
            for i, arm in enumerate(ranked)
            for other in ranked[i + 1 :]
            if self.reference not in (arm, other)
        }
        judged = statistics.judge_all(found, self.margin)
        judged |= {(arm, self.reference): gap for arm in ranked if (gap := self.gap(arm))}
        return judged | {(other, arm): one.reversed for (arm, other), one in judged.items()}

    def ranking(self):
        """[(letters or None, arm)] of `ranked`. Two arms share a letter if and only if no test separates them.

        Letters are None where no two arms have two pairs, or a lost run: one draw ranks nothing.
        """
        ranked = self.ranked
        if not any(one.d.n > 1 or one.separated for one in self.pairs.values()):
            return [(None, arm) for arm in ranked]
        apart = [[arm != other and self.pairs[arm, other].separated for other in ranked] for arm in ranked]
        return list(zip(statistics.letters(apart), ranked, strict=True))

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

    # ------------------------------------------------------------------------------------- what each part costs

    def _ablations(self, name):
        """(learning rate, {cause: ((arm, rate), (arm, rate))}) of a format; (None, {}) without.

        At the format's own rate if any was run there, else at the rate with most.
        """
        by_rate = {}
        for operand, cause in zip(OPERANDS, CAUSES):
            for rate in self.rates(Arm(name, operand)):
                if self.reference and self.cell(self.reference, rate):
                    by_rate.setdefault(rate, {})[cause] = (Arm(name, operand), rate), (self.reference, rate)
        master = Arm(name)
        kept = (Arm(name, at_rest=at_rest) for at_rest in ("nearest", "stochastic"))
        stored = next((arm for arm in kept if self.rates(arm)), None)
        alone = [arm for arm in self.arms if arm.format == name and not arm.operands]
        at_rest_only = next((arm for arm in alone if arm.optimizer == ADAMW and not arm.variant), None)
        for rate in list(by_rate) or (self.rates(stored) if stored else []):
            if at_rest_only and self.cell(at_rest_only, rate) and self.reference and self.cell(self.reference, rate):
                by_rate.setdefault(rate, {})["update"] = (at_rest_only, rate), (self.reference, rate)
            elif stored and self.cell(stored, rate) and self.cell(master, rate):
                by_rate.setdefault(rate, {})["update"] = (stored, rate), (master, rate)
        if not by_rate:
            return None, {}
        sizes = {rate: sum(len(self.cell(*first)) for first, _ in found.values()) for rate, found in by_rate.items()}
        own = self.choice(master).rate if master in self.arms else None
        rate = max(by_rate, key=lambda r: (r == own, len(by_rate[r]), sizes[r], -r))
        return rate, {cause: by_rate[rate][cause] for cause in CAUSES if cause in by_rate[rate]}

    @cached_property
    def costs(self):
        """{format: (learning rate, {cause: Cost})} of every format that has ablations or stored weights."""
        found = {name: self._ablations(name) for name in self.formats}
        compared = {(name, cause): pair for name, (_, causes) in found.items() for cause, pair in causes.items()}
        judged = statistics.judge_all({key: self.difference(*pair) for key, pair in compared.items()}, self.margin)
        return {
            name: (rate, {cause: Cost(cause, one, two, judged[name, cause]) for cause, (one, two) in causes.items()})
            for name, (rate, causes) in found.items()
            if causes
        }

    def largest_cost(self, name):
        """(the largest Cost that is separated from 0, or None; causes that are not shown to cost less).

        The causes are compared with the largest over common draws, and corrected among themselves.
        """
        _, causes = self.costs.get(name, (None, {}))
        guilty = [
            one for one in causes.values() if one.judged.separated and (one.judged.sign_lost or one.judged.sign) > 0
        ]
        if not guilty:
            return None, ()
        worst = max(guilty, key=lambda one: (one.judged.sign_lost, np.nan_to_num(one.d.mean)))
        others = [one for one in causes.values() if one is not worst]
        between = statistics.judge([statistics.paired(worst.by_draw, one.by_draw) for one in others], self.margin)
        return worst, tuple(one.cause for one, judged in zip(others, between) if judged.kind != statistics.WORSE)

    # ----------------------------------------------------------------------------------- what one setting changes

    @cached_property
    def effects(self):
        """{(arm, rate): Judged difference to its `base_of`}: same rate, draws, format and storage."""
        found = {
            (arm, rate): self.difference((arm, rate), (base_of(arm), rate))
            for arm in self.arms
            if base_of(arm) != arm and arm.plain
            for rate in self.rates(arm)
            if self.cell(base_of(arm), rate)
        }
        return statistics.judge_all(found, self.margin)

    @cached_property
    def findings(self):
        """[claims.Finding]: what these runs say of published claims."""
        return claims.findings(self)

    # ------------------------------------------------------------------------------------------------ checks

    def same_grid(self, first, second):
        """(equal, runs compared) of two formats that should give the same losses to the bit; None where none match."""
        return _same_grid(self.cells, first, second)


def base_of(arm):
    """The arm without what is special in this one: with AdamW, or if it has AdamW without its variant."""
    variant = arm.variant if arm.optimizer != ADAMW else ""
    return Arm(arm.format, arm.operands, arm.at_rest, ADAMW, variant)


def changed(arm):
    """What `base_of` takes away, in words."""
    return arm.optimizer if arm.optimizer != ADAMW else arm.variant


def _lost_then_mean(losses):
    """(runs without a loss, mean of the others or infinity): what orders learning rates."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return len(losses) - len(finite), float(np.mean(finite)) if finite else math.inf


def _validation(run):
    """{step: validation loss} of a run, in float64."""
    return dict(zip(run.val_steps.tolist(), run.val_losses.astype(np.float64).tolist()))


def _same_grid(cells, first, second):
    """(equal to the bit, runs compared) of two formats' runs with a float32 master; None where none match."""
    equal, n = True, 0
    for (arm, rate), cell in cells.items():
        if arm.format == first and arm.at_rest == MASTER:
            theirs = cells.get((Arm(second, arm.operands, arm.at_rest, arm.optimizer, arm.variant), rate), {})
            for draw, run in cell.items():
                if draw in theirs and run.state == theirs[draw].state == FINISHED:
                    n += 1
                    equal &= _same(run, theirs[draw])
    return (equal, n) if n else None


def _same(run, other):
    """Whether two runs have equal losses at all steps that both recorded, to the bit; False where there is none."""

    def columns(r):
        return dict(zip(r.steps.tolist(), r.losses.view(np.int32).tolist())), dict(
            zip(r.val_steps.tolist(), r.val_losses.view(np.int32).tolist())
        )

    both = list(zip(columns(run), columns(other)))
    found = [(mine[step], theirs[step]) for mine, theirs in both for step in mine.keys() & theirs.keys()]
    return bool(found) and all(mine == theirs for mine, theirs in found)


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
