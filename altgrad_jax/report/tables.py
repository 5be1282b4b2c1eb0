"""The report's words and tables, the same for HTML and Markdown: what the Comparison found, as text and as CSV."""

import csv
import io
import itertools
import math
from dataclasses import dataclass

import numpy as np

from altgrad_jax.report import analysis, statistics
from altgrad_jax.report.analysis import ADAMW, MASTER, SAME_GRID, THRESHOLDS, base_of, changed
from altgrad_jax.report.needs import MIN_RATES
from altgrad_jax.report.runs import AT_REST_LABELS, DAMAGED, FINISHED, LOST, RECIPE, REFERENCE, UNFINISHED, Arm
from altgrad_jax.report.statistics import (
    BETTER,
    EQUIVALENT,
    FEW,
    INCONCLUSIVE,
    POWER,
    WORSE,
    Judged,
    has_two_clusters,
    pairs_needed,
)

TESTS = ("p", "p_holm", "p_equivalence", "p_equivalence_holm", "p_lost", "p_lost_holm", "class", "two_clusters")
DIFFERENCE = ("mean", "low", "high", "sd", "n", "pairs", "worse_only", "better_only", "neither")


@dataclass(frozen=True)
class Table:
    """A table. rows: [{heading: value}], all of the same headings. aid: one line that says how to read it.

    A Judged is two cells, the difference and its class, and in the CSV a column for each of its numbers.
    """

    name: str
    title: str
    aid: str
    rows: list

    @property
    def headings(self):
        """The names of the columns as shown."""
        judged, first = _judged(self.rows), self.rows[0] if self.rows else {}
        return [name for key in first for name in ((key, "class") if key in judged else (key,))]

    @property
    def cells(self):
        """[[text]], as many as there are headings in each row."""
        judged = _judged(self.rows)
        two = (show_difference, show_class)
        return [
            [show(value) for key, value in row.items() for show in (two if key in judged else (text_of,))]
            for row in self.rows
        ]

    @property
    def key(self):
        """The index of the column that names a row."""
        return self.headings.index("format") if "format" in self.headings else 0

    @property
    def data(self):
        """(file name, CSV text) of the numbers."""
        return f"{self.name}.csv", to_csv(self.rows)


def table(name, title, aid, headings, rows):
    """A Table of rows of values. headings: with bars between."""
    return Table(name, title, aid, [dict(zip(headings.split("|"), row, strict=True)) for row in rows])


def _judged(rows):
    return {key for row in rows for key, value in row.items() if isinstance(value, Judged)}


def text_of(value):
    """A cell's text: numbers in 4 digits, a truth as yes or nothing; nothing for None and NaN."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:.4g}"
    return "" if value is None else str(value)


def flat(rows):
    """Rows without a Judged, which becomes a column for each of its numbers with its heading in front; NaN is None."""
    judged = _judged(rows)
    parts = {key: (*(f"{key}_{part}" for part in DIFFERENCE), *TESTS) for key in judged}

    def number(value):
        return None if isinstance(value, float | np.floating) and math.isnan(value) else value

    for row in rows:
        found = {}
        for key, value in row.items():
            found |= zip(parts[key], map(number, difference_cells(value))) if key in judged else {key: number(value)}
        yield found


def to_csv(rows):
    """CSV text of [{heading: value}]: numbers in the shortest form that reads back as the same, None as nothing."""
    out, writer = io.StringIO(), None
    for row in flat(rows):
        if writer is None:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(name.replace(" ", "_") for name in row)
        writer.writerow(row.values())
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------ words


def signed(value):
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "none"


def show_interval(low, high):
    return f"[{signed(low)}, {signed(high)}]"


def show_difference(judged):
    """A Judged comparison in words: mean, interval, pairs, and every reservation; without its class."""
    if judged is None:
        return ""
    d = judged.d
    if not d.n_pairs:
        return "no common seed"
    if not d.n:
        return f"no loss in {len(d.worse) or len(d.better) or len(d.neither)} of {d.n_pairs}"
    has = math.isfinite(d.low)
    words = signed(d.mean) + (f" {show_interval(d.low, d.high)}" if has else "")
    remarks = [f"n={d.n}" + ("" if has else ", no interval") + (f", fewer than {FEW}" if has and d.n < FEW else "")]
    if d.n < d.n_pairs:
        remarks.append(f"survivors only: both ended in {d.n} of {d.n_pairs} pairs")
    if has_two_clusters(d.values):
        remarks.append("two clusters: do not trust the interval")
    return f"{words} ({'; '.join(remarks)})"


def show_class(judged):
    """The class in words that say no more than the tests do."""
    if judged is None:
        return ""
    if not judged.d.n_pairs:
        return "cannot tell"
    words = judged.kind
    if words == EQUIVALENT:
        words += f" within {judged.margin:g}" + (f", though {_side(judged.sign)} 0" if judged.sign else "")
    if judged.d.n_pairs < 2:
        words += ", one pair"
    return words + show_lost(judged)


def _side(sign):
    return "above" if sign > 0 else "below"


def show_lost(judged):
    d = judged.d
    if not d.n < d.n_pairs:
        return ""
    mine, its = len(d.worse) + len(d.neither), len(d.better) + len(d.neither)
    return f"; {mine} of {d.n_pairs} runs lost against {its} (p {show_p(judged.p_lost, judged.holm_lost)})"


def show_p(raw, corrected):
    """Both p values, or nothing where there was no test."""
    return "" if math.isnan(raw) else f"{raw:.2g}, Holm {corrected:.2g}"


def names(words):
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def treatment(at_rest, optimizer=ADAMW, variant=""):
    own = "" if optimizer == ADAMW else optimizer
    return ", ".join(filter(None, (AT_REST_LABELS.get(at_rest, at_rest), own, variant)))


def show_cost(c, name):
    """What costs most in a format, in words, with its interval and the treatment that it is of."""
    if name not in c.costs:
        return "not measured"
    worst, rivals = c.largest_cost(name)
    if worst is None:
        return "not separated"
    (arm, rate), (base, _) = worst.first, worst.second
    against = treatment(base.at_rest) if base.format == name else base.label
    among = f"; not shown to cost less: {names(rivals)}" if rivals else ""
    among += "; no other part was measured" if len(c.costs[name][1]) == 1 else ""
    compared = {c.choice(Arm(name)).rate, c.reference_rate(Arm(name))} if Arm(name) in c.arms else {rate}
    elsewhere = "" if compared == {rate} else ", not the rates of the gap"
    parts = "; ".join(arm.treatment_parts) or "float32 master"
    return f"{worst.cause} {show_difference(worst.judged)}, {parts} against {against}, at {rate:g}{elsewhere}{among}"


def show_crossing(warning, seed=None):
    """A crossing in words: step, layer, statistic, value and limit."""
    if warning is None:
        return "none"
    statistic, (step, layer, value, limit, n) = warning
    threshold = next(t for t in THRESHOLDS if t.statistic == statistic)
    more = f" and {n - 1} more" if n > 1 else ""
    return f"step {step}, {layer}{more}: {statistic} {value:.3g} {'>' if threshold.above else '<'} {limit:g}" + (
        "" if seed is None else f" (seed {seed})"
    )


def difference_cells(judged):
    if judged is None:
        return [None] * len(DIFFERENCE + TESTS)
    d = judged.d
    lost = [len(d.worse), len(d.better), len(d.neither)]
    ps = [judged.p, judged.holm_p, judged.p_equal, judged.holm_equal, judged.p_lost, judged.holm_lost]
    return [d.mean, d.low, d.high, d.sd, d.n, d.n_pairs, *lost, *ps, judged.kind, has_two_clusters(d.values)]


# ------------------------------------------------------------------------------------------------ the answer


def answer(c):
    """The question answered in plain words: [(heading, sentence)]."""
    if not c.formats:
        return [("Nothing yet", "No finished run in a number format is among these runs.")]
    ranked = [arm for arm in c.ranked if arm.format in c.formats]
    how = f"{treatment(*c.primary)}, {c.lr_heading()}"
    if c.reference is None:
        return [("Gap", f"No finished {REFERENCE} run is among these runs, so there is no gap to show yet ({how}).")]
    gaps = {short(arm, c): c.gap(arm) for arm in ranked}
    parts = [(f"Gap to {REFERENCE} in nats per token ({how})", _by_class(gaps, c.margin))] if ranked else []
    by_cause = {}
    for name in c.costs:
        worst, rivals = c.largest_cost(name)
        words = " or ".join([worst.cause, *rivals]) if worst else "none separated"
        words += ", the only part measured," if worst and len(c.costs[name][1]) == 1 else ""
        by_cause.setdefault(words, []).append(format_name(c, name))
    if by_cause:
        words = "; ".join(f"{cause} in {names(found)}" for cause, found in by_cause.items())
        parts.append(("Largest cost of one part, at the rates and treatments in the table of costs", words + "."))
    by_change = {}
    for (arm, rate), judged in c.effects.items():
        if rate == c.choice(base_of(arm)).rate and judged.d.n_pairs:
            by_change.setdefault((changed(arm), arm.at_rest), {})[format_name(c, arm.format)] = judged
    for (change, at_rest), found in by_change.items():
        heading = f"{change} against the same without it ({treatment(at_rest)}; same format, learning rate and seed)"
        parts.append((heading, _by_class(found, c.margin)))
    return [*parts, *_claims(c), ("Noise", _noise(c))]


def _claims(c):
    """[(heading, sentence)] of the published claims, by verdict; [] without any."""
    by_verdict = {}
    for one in c.findings:
        by_verdict.setdefault(one.verdict, []).append(f"{one.claim.words} ({signed(one.judged.d.mean)})")
    words = "; ".join(f"{verdict}: {', '.join(found)}" for verdict, found in by_verdict.items())
    return [("Published claims, at this size", f"{words}.")] if words else []


def _by_class(judged, margin):
    """{name: Judged} as one sentence, the names by class, and the lost runs apart."""
    groups, lost = {EQUIVALENT: [], BETTER: [], WORSE: [], INCONCLUSIVE: []}, []
    for name, one in judged.items():
        alone = ", one pair" if one.d.n == 1 else ""
        clusters = ", two clusters" if has_two_clusters(one.d.values) else ""
        groups[one.kind].append(f"{name} ({signed(one.d.mean)}{alone}{clusters})" if one.d.n else name)
        if one.d.n < one.d.n_pairs:
            lost.append(f"{name}{show_lost(one).replace('; ', ' ', 1)}")
    words = {EQUIVALENT: f"equivalent within {margin:g}"}
    sentences = [f"{words.get(kind, kind)}: {names(found)}" for kind, found in groups.items() if found]
    return "; ".join(sentences + ([f"lost runs: {names(lost)}"] if lost else [])) + "."


def _noise(c):
    found = {rate: c.noise(rate) for rate in c.rates(c.reference)}
    words = [f"{noise.rms:.4f} at {rate:g} (n={noise.n})" for rate, noise in found.items() if noise.n > 1]
    if not words:
        return f"not measured, {REFERENCE} has one seed at each rate."
    return f"two {REFERENCE} runs of different seeds end this far apart (root mean square): {', '.join(words)}."


def format_name(c, name):
    """A format with its other name where that stands with it, or a recipe."""
    return f"{name} = {c.twin}" if c.twin and name == SAME_GRID[0] else name.removeprefix(RECIPE)


def short(arm, c):
    """The name of an arm among those of the primary treatment."""
    plain = Arm(arm.format, at_rest=c.primary[0], optimizer=c.primary[1])
    return format_name(c, arm.format) if arm == plain else arm.label


def _shares(all_parts):
    """ "a 60%, b 40%" of the sum of [{source: variance}]; "" of nothing."""
    sums = {}
    for parts in all_parts:
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value
    total = sum(sums.values())
    return ", ".join(f"{name} {value / total:.0%}" for name, value in sums.items()) if total else ""


def variation(c):
    """What the intervals hold of what could have come out otherwise: sentences."""
    draws = {draw for cell in c.cells.values() for draw in cell}
    orders = {order for _, order in draws}
    parts = [statistics.variance_parts(one.d.values, one.d.draws) for one in c.gaps.values()]
    shares = _shares(parts) if all(parts) else ""
    if len(orders) < 2:
        held = "The t intervals hold the seed of the weights, not the data order"
    elif shares:
        held = f"The t intervals hold the seed of the weights and the data order; of the variance of one gap: {shares}"
    else:
        held = "The t intervals hold the seed of the weights and the data order together; their parts cannot be told"
    if not c.over_all_windows:
        if any("recorder" in run.manifest for run in c.all_runs):
            return f"{held}. What other validation data would show is in no interval."
        windows = next((run.config["eval_windows"] for run in c.all_runs if run.arm), None)
        return (
            f"{held}. All runs are evaluated on one set of {windows} windows: what other text would show is in no "
            "interval (evaluate_all=True records every window)."
        )
    shares = _shares([one.parts for one in c.spreads.values()])
    of_all = f" The variance of a mean gap, all gaps together: {shares}." if shares else ""
    return (
        f"{held}. All runs are evaluated on every validation window there is: the t intervals are of this text. The "
        f"intervals over windows too hold what other text of its kind would show.{of_all}"
    )


def families(c):
    """The families of comparisons and their sizes, in words."""
    pairs = [both for both in itertools.combinations(c.ranked, 2) if both in c.pairs and c.reference not in both]
    costs = [cost for _, found in c.costs.values() for cost in found]
    found = {"gaps": c.gaps, "gaps at one rate": c.rate_gaps, "pairs of formats": pairs, "costs": costs}
    found |= {"effects of one setting": c.effects, "published claims": c.findings}
    return ", ".join(f"{name} ({len(family)})" for name, family in found.items() if family)


def at_edge(c):
    """Names of the ranked arms whose best learning rate is the lowest or highest that was tried."""
    return [short(arm, c) for arm in c.ranked if c.choice(arm).at_edge]


def any_best(c):
    return any(c.choice(arm).best for arm in c.ranked)


# ---------------------------------------------------------------------------------------------------- tables


def ranking_table(c, warnings):
    """The opening table. warnings: {arm: (seed, (statistic, crossing)) or None}, of arms whose statistics were read."""
    rows = []
    for letters, arm in c.ranking():
        choice, (failed, n), (mean, ended, seeds) = c.choice(arm), c.failures(arm, c.choice(arm).rate), c.mean_loss(arm)
        own, warned = arm.format in c.formats, warnings.get(arm)
        loss = "none" if math.isnan(mean) else f"{mean:.4f}" + ("" if ended == seeds else f" ({ended} of {seeds})")
        cost = show_cost(c, arm.format) if own and not arm.variant else ""
        warning = show_crossing(*(warned[1], warned[0]) if warned else (None,)) if own else ""
        rate = f"{choice.rate:g}{show_works(choice)}"
        rows.append((letters or "-", short(arm, c), c.gap(arm), loss, f"{failed} of {n}", rate, cost, warning))
    return table(
        "ranking",
        f"Formats by validation-loss gap to {REFERENCE}: {treatment(*c.primary)}, {c.lr_heading()}",
        "Above 0 is worse than BF16. Formats that share a letter are not separated. Largest cost: from ablations. "
        "Early warning: the first threshold crossed, which need not be the cause."
        + (f" Scales, where an arm does not say otherwise: {c.scales}." if c.scales else ""),
        f"group|format|gap|validation loss|failed runs|learning rate (range within {c.margin:g})|largest cost|"
        "early warning",
        rows,
    )


def show_works(choice):
    """The neighbouring rates within the margin of the best, in brackets; "" where they are not known."""
    if choice.works is None:
        return ""
    low, high = choice.works
    if low == high:
        return f" (only; next tried: {', '.join(f'{rate:g}' for rate in choice.rates if rate != low)})"
    return f" ({low:g} to {high:g}, {high / low:.3g}x)"


def _of(c, arm):
    return format_name(c, arm.format), treatment(arm.at_rest, arm.optimizer, arm.variant)


def gaps_table(c):
    """Every gap with its tests, and how many pairs would have been needed."""
    rows = []
    for arm, judged in c.gaps.items():
        d, (failed, n) = judged.d, c.failures(arm, c.choice(arm).rate)
        effect, room = (abs(d.mean) / d.sd, c.margin / d.sd) if d.sd > 0 else (math.nan, math.nan)
        needed = pairs_needed(statistics.power, effect), pairs_needed(statistics.power_of_equivalence, room)
        more = f"more than {statistics.MOST_PAIRS}" if d.sd > 0 else None
        ps = show_p(judged.p, judged.holm_p), show_p(judged.p_equal, judged.holm_equal)
        row = *_of(c, arm), c.choice(arm).rate, judged, f"{failed} of {n}", *ps, d.smallest_margin, d.sd
        rows.append((*row, *(more if pairs is None else pairs for pairs in needed), c.onsets.get(arm)))
    return table(
        "gaps",
        f"Every gap to {REFERENCE}, and what its tests say (margin {c.margin:g})",
        "p of a true gap of 0, and of one outside the margin. Smallest margin: within which these pairs alone show "
        f"equivalence, uncorrected. Pairs needed: to reach {POWER:.0%} power with this standard deviation, "
        "uncorrected, for this gap, and for equivalence of a true gap of 0. Separated since: the first evaluation from "
        "which the paired curves stay apart, corrected over the evaluations.",
        "format|treatment|learning rate|gap|failed runs|p of no gap|p of no equivalence|smallest margin|sd of a pair|"
        "pairs needed to separate|pairs needed for equivalence|separated since step",
        rows,
    )


def spread_table(c):
    """What each source adds to the variance of a gap."""
    sources = list(dict.fromkeys(name for spread in c.spreads.values() for name in spread.parts))
    rows = []
    for arm, spread in c.spreads.items():
        d, total = c.gaps[arm].d, sum(spread.parts.values())
        shares = (spread.parts.get(name, math.nan) / total if total else math.nan for name in sources)
        intervals = show_interval(d.low, d.high), show_interval(spread.low, spread.high)
        rows.append((*_of(c, arm), signed(d.mean), *intervals, math.sqrt(total), *shares))
    return table(
        "spread",
        "What the seeds and the validation windows add to a gap",
        "The second interval is of fresh runs and fresh text of the same kind. Then the standard error over both, and "
        "the share of its square that each source has. Weights, data order: their seeds. Windows: a block bootstrap "
        "over neighbouring windows. Pairs by windows: what is left of each pair in each window.",
        "format|treatment|mean gap|t interval|interval over windows too|standard error|" + "|".join(sources),
        rows,
    )


def costs_table(c):
    rows = []
    for name, (rate, causes) in c.costs.items():
        worst, rivals = c.largest_cost(name)
        for cause, one in causes.items():
            first = "largest" if len(causes) > 1 else "only one measured"
            rank = first if one is worst else "not shown to be less" if cause in rivals else ""
            compared = one.first[0].label, one.second[0].label
            rows.append((format_name(c, name), cause, rate, one.judged, rank, *compared))
    return table(
        "costs",
        "What one part of each format costs",
        "Only W, only A, only G in the format, each against BF16; update: weights stored (to nearest, where run) "
        "against a float32 master. At the format's own learning rate if it was run there. The largest is named only "
        "where it is separated from 0, with those that are not shown to cost less.",
        "format|part|learning rate|cost|rank|arm|against",
        rows,
    )


def effects_table(c):
    rows = []
    for (arm, rate), judged in c.effects.items():
        base = base_of(arm)
        rows.append((format_name(c, arm.format), changed(arm), base.label, rate, rate == c.choice(base).rate, judged))
    return table(
        "effects",
        "What one setting changes: the loss with it minus the loss without",
        "Below 0 it helps. Same format, storage, learning rate and seeds. Own rate: that of the arm without it.",
        "format|setting|against|learning rate|own rate|effect",
        rows,
    )


def claims_table(c):
    """Published claims, and what these runs say of each."""
    rows = []
    for one in c.findings:
        arms = (format_name(c, arm.format) for arm in (one.higher, one.lower))
        ps = show_p(one.judged.p, one.judged.holm_p)
        rows.append((one.claim.words, one.claim.source, *arms, one.verdict, one.judged, ps))
    return table(
        "claims",
        "Published claims about recipes, at this size",
        "Each is one paired comparison of two arms that differ in one thing; above 0 is what the claim says. Supported "
        "and contradicted: separated from 0, after correction over the claims of this table. Sources are arXiv "
        "numbers. A claim is about its authors' models: what holds at this size need not hold for theirs.",
        "claim|source|arm|other|verdict|arm minus other|p of no difference",
        rows,
    )


def predictors_table(found):
    """found: [predictors.Predictor]."""
    rows = []
    for one in found:
        of = one.correlation
        rows.append((one.words, one.column, of.rho, show_interval(of.low, of.high), of.n))
    return table(
        "predictors",
        "What goes with the gaps, over the arms",
        "Spearman's rank correlation of a number of the record, its mean over an arm's rows and runs, and the gap. "
        f"The interval is a {statistics.CONFIDENCE:.0%} bootstrap over the arms, uncorrected. What is correlated need "
        "not be a cause.",
        "number|column of the record|rank correlation|interval|arms",
        rows,
    )


def rates_table(c):
    rows = []
    for arm, rate in [(each, rate) for each in c.arms for rate in c.rates(each)]:
        choice, losses = c.choice(arm), list(c.losses(arm, rate).values())
        finite = [loss for loss in losses if math.isfinite(loss)]
        mean = float(np.mean(finite)) if finite else math.nan
        use = "chosen" if rate == choice.rate else "" if rate in choice.rates else "no candidate"
        row = arm.label, rate, mean, len(finite), len(losses), use, statistics.noise(losses).rms
        rows.append((*row, c.rate_gaps.get((arm, rate))))
    return table(
        "learning-rates",
        "Learning rates, and the gaps at each",
        f"Mean validation loss at each rate, and its gap to {REFERENCE} at the same rate: a family of its own. Noise: "
        "root mean square difference of two runs of different seeds. An arm is taken at its best rate if it was run at "
        f"{MIN_RATES} or more.",
        "arm|learning rate|validation loss|ended|runs|choice|noise|gap",
        rows,
    )


def pairwise_table(c):
    pairs = [both for both in itertools.combinations(c.ranked, 2) if both in c.pairs]
    return table(
        "pairs",
        "Every pair of formats",
        f"First minus other, each at the rate of the opening table; pairs with {REFERENCE} are its gaps.",
        "format|other|difference",
        [(short(arm, c), short(other, c), c.pairs[arm, other]) for arm, other in pairs],
    )


def warnings_table(c, crossings):
    """crossings: {arm: {statistic: (seed, crossing)}}, the earliest over the arm's seeds."""
    rows = []
    for arm, found in crossings.items():
        for statistic, (seed, crossing) in sorted(found.items(), key=lambda item: item[1][1][0]):
            rows.append((arm.label, statistic, seed, *crossing))
    config = next((run.config for run in c.all_runs if run.config), {})
    limits = [
        f"{t.statistic} {'>' if t.above else '<'} {config.get(t.setting, t.value):g} {t.unit}" for t in THRESHOLDS
    ]
    return table(
        "early-warnings",
        "Early warnings: when each statistic first crossed its threshold",
        "The earliest of the arm's seeds, on single recorded rows. Early is not the same as harmful: many formats "
        "cross one at step 1 and train all the same. Thresholds, as the first run has them, update_gain and "
        f"lost_update for stored weights only: {'; '.join(limits)}.",
        "arm|statistic|seed|step|layer|value|limit|layers that crossed then",
        rows,
    )


def checks(c):
    """Lines of things that must hold: [(words, "yes" | "no")]."""
    one_grid = f"{names(SAME_GRID)}, one grid, agree to the bit"
    traced = f"{REFERENCE} as a format"
    same = f"{REFERENCE} as a traced format and without any format agree to the bit"
    found = [(c.same_grid(*SAME_GRID), one_grid), (c.same_grid(REFERENCE, traced), same)]
    return [(f"{words} ({result[1]} pairs of runs)", "yes" if result[0] else "no") for result, words in found if result]


def runs_table(c):
    order, rows = {DAMAGED: 0, UNFINISHED: 1, LOST: 2, FINISHED: 3}, []
    for run in sorted(c.all_runs, key=lambda run: order[run.state]):
        identity = (run.arm.label, run.learning_rate, *run.draw) if run.arm else [None] * 4
        state = run.state if run.state != FINISHED or run.sound else "finished, not sound"
        loss = f"{run.val_loss:.4f}" if math.isfinite(run.val_loss) else None
        rows.append((run.name, *identity, state, loss, run.reason))
    return table(
        "runs",
        "All runs",
        "Unfinished and damaged runs are counted nowhere.",
        "run|arm|learning rate|seed|data seed|state|validation loss|remark",
        rows,
    )


def troubles(c):
    """[(names of runs, state, reason)] of what a reader must know: damaged, unfinished and lost runs, duplicates."""
    order, alike = (DAMAGED, UNFINISHED, LOST, FINISHED), {}
    for run in sorted(c.all_runs, key=lambda run: order.index(run.state)):
        if run.reason or run.state != FINISHED:
            alike.setdefault((run.state, run.reason), []).append(run.name)
    return [(_some(names), *what) for what, names in alike.items()] + [
        (run.name, "left out", f"the same arm, learning rate and seed as {other.name}") for run, other in c.duplicates
    ]


def _some(names, most=5):
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def early_warnings(c, reader):
    """({arm: (seed, (statistic, crossing)) or None}, {arm: {statistic: (seed, crossing)}}) of AdamW's arms."""
    first, every = {}, {}
    for arm in c.arms:
        if not arm.plain or arm.format not in c.formats or arm.optimizer != ADAMW:
            continue
        found = {}
        for run in c.cell(arm, c.choice(arm).rate).values():
            history = reader.statistics(run)
            crossings = analysis.first_crossings(history, run.config, arm.at_rest != MASTER) if history else {}
            for statistic, crossing in crossings.items():
                if statistic not in found or crossing[0] < found[statistic][1][0]:
                    found[statistic] = run.seed, crossing
        earliest = analysis.early_warning({name: crossing for name, (_, crossing) in found.items()})
        first[arm] = None if earliest is None else (found[earliest[0]][0], earliest)
        every[arm] = found
    return first, every
