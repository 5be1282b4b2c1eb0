"""The report's words and tables, the same for HTML and Markdown: what the Comparison found, as text and as CSV."""

import csv
import io
import itertools
import math
from dataclasses import dataclass, field

import numpy as np

from altgrad_jax.report import analysis, statistics
from altgrad_jax.report.analysis import ADAMW, MASTER, MIN_RATES, SAME_GRID, THRESHOLDS, base_of, changed
from altgrad_jax.report.runs import AT_REST_LABELS, DAMAGED, FINISHED, LOST, REFERENCE, UNFINISHED, Arm
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
    """A table. rows: [{column: value}], all of the same columns. aid: one line that says how to read it.

    show: {heading: column, or function of a row to text} where not every column is shown as `text_of` has it; a Judged
    column is two by default, the difference and its class.
    """

    name: str
    title: str
    aid: str
    rows: list
    show: dict = field(default_factory=dict)

    @property
    def headings(self):
        return tuple(self._shown())

    @property
    def cells(self):
        """[[text]]"""
        return [[show(row) for show in self._shown().values()] for row in self.rows]

    @property
    def data(self):
        """(file name, CSV text) of the numbers."""
        return f"{self.name}.csv", to_csv(self.rows)

    def _shown(self):
        found = {}
        for heading, what in (self.show or {name: name for name in self.rows[0]} if self.rows else {}).items():
            if callable(what):
                found[heading] = what
            elif any(isinstance(row[what], Judged) for row in self.rows):
                found[heading] = lambda row, what=what: show_difference(row[what])
                found["class"] = lambda row, what=what: show_class(row[what])
            else:
                found[heading.replace("_", " ")] = lambda row, what=what: text_of(row[what])
        return found


def text_of(value):
    """A cell's text: numbers in 4 digits, a truth as yes or nothing, a list by commas."""
    if value is None or value is False or isinstance(value, float | np.floating) and math.isnan(value):
        return ""
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return "yes" if value is True else ", ".join(map(text_of, value)) if isinstance(value, tuple) else str(value)


def to_csv(rows):
    """CSV text of [{column: value}]. Numbers in the shortest form that reads back as the same; NaN and None as nothing.

    A column of Judged becomes one column for each of its numbers.
    """
    judged = {name for row in rows for name, value in row.items() if isinstance(value, Judged)}

    def flat(row):
        for name, value in row.items():
            if name in judged:
                yield from zip((*(f"{name}_{part}" for part in DIFFERENCE), *TESTS), difference_cells(value))
            elif isinstance(value, tuple):
                yield name, " ".join(map(str, value))
            else:
                yield name, None if isinstance(value, float | np.floating) and math.isnan(value) else value

    out = io.StringIO()
    found = [dict(flat(row)) for row in rows]
    writer = csv.DictWriter(out, found[0] if found else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------ words


def signed(value):
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "none"


def show_difference(judged):
    """A Judged comparison in words: mean, interval, pairs, and every reservation; without its class."""
    if judged is None:
        return f"no {REFERENCE} run"
    d = judged.d
    if not d.n_pairs:
        return "no common seed"
    if not d.n:
        return f"no loss in {len(d.worse) or len(d.better) or len(d.neither)} of {d.n_pairs}"
    has = math.isfinite(d.low)
    words = signed(d.mean) + (f" [{signed(d.low)}, {signed(d.high)}]" if has else "")
    remarks = [f"n={d.n}" + ("" if has else ", no interval") + (f", fewer than {FEW}" if has and d.n < FEW else "")]
    if d.n < d.n_pairs:
        remarks.append(f"survivors only: both ended in {d.n} of {d.n_pairs} pairs")
    if has_two_clusters(d.values):
        remarks.append("two clusters: do not trust the interval")
    return f"{words} ({'; '.join(remarks)})"


def show_class(judged):
    """The class in words that say no more than the tests do."""
    if judged is None or not judged.d.n_pairs:
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
    return [*parts, ("Noise", _noise(c))]


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
    """A format, and its other name where that stands with it."""
    return f"{name} = {c.twin}" if c.twin and name == SAME_GRID[0] else name


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
    found |= {"effects of one setting": c.effects}
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
        own = arm.format in c.formats
        plain, warned = own and not arm.variant, warnings.get(arm)
        cost = c.largest_cost(arm.format)[0] if plain else None
        row = {"group": letters or "-", "format": short(arm, c), "gap": c.gap(arm), "val_loss": mean, "ended": ended}
        row |= {"seeds": seeds, "failed": failed, "runs": n, "learning_rate": choice.rate, "rates": choice.rates}
        row |= {"best_of_rates": choice.best, "largest_cost": cost.cause if cost else None}
        row |= {"largest_cost_in_words": show_cost(c, arm.format) if plain else ""}
        rows.append(row | {"early_warning": show_crossing(*(warned or (None, None))[::-1]) if own else ""})
    scales = f" Scales, where an arm does not say otherwise: {c.scales}." if c.scales else ""
    works = {short(arm, c): show_works(c.choice(arm)) for arm in c.ranked}
    reference = short(c.reference, c) if c.reference else None

    def show_loss(row):
        some = "" if row["ended"] == row["seeds"] else f" ({row['ended']} of {row['seeds']})"
        return "none" if math.isnan(row["val_loss"]) else f"{row['val_loss']:.4f}{some}"

    def is_reference(row):
        return row["format"] == reference or row["gap"] is None and row["format"] not in c.formats and reference

    return Table(
        "ranking",
        f"Formats by validation-loss gap to {REFERENCE}: {treatment(*c.primary)}, {c.lr_heading()}",
        "Above 0 is worse than BF16. Formats that share a letter are not separated. Largest cost: from ablations. "
        f"Early warning: the first threshold crossed, which need not be the cause.{scales}",
        rows,
        {
            "group": "group",
            "format": "format",
            "gap to BF16, nats per token": lambda r: "reference" if is_reference(r) else show_difference(r["gap"]),
            f"against {REFERENCE}": lambda r: "" if is_reference(r) else show_class(r["gap"]),
            "validation loss": show_loss,
            "failed runs": lambda r: f"{r['failed']} of {r['runs']}",
            f"learning rate (range within {c.margin:g})": lambda r: f"{r['learning_rate']:g}{works[r['format']]}",
            "largest cost": "largest_cost_in_words",
            "early warning": "early_warning",
        },
    )


def show_works(choice):
    """The neighbouring rates within the margin of the best, in brackets; "" where they are not known."""
    if choice.works is None:
        return ""
    low, high = choice.works
    if low == high:
        return f" (only; next tried: {', '.join(f'{rate:g}' for rate in choice.rates if rate != low)})"
    return f" ({low:g} to {high:g}, {high / low:.3g}x)"


def gaps_table(c):
    """Every gap: its tests, how many pairs would have been needed, and what its variance is made of."""
    rows = []
    for arm, judged in c.gaps.items():
        d, spread = judged.d, c.spreads.get(arm)
        effect, room = (abs(d.mean) / d.sd, c.margin / d.sd) if d.sd > 0 else (math.nan, math.nan)
        failed, n = c.failures(arm, c.choice(arm).rate)
        row = {"format": format_name(c, arm.format), "treatment": treatment(arm.at_rest, arm.optimizer, arm.variant)}
        row |= {"learning_rate": c.choice(arm).rate, "best_of_rates": c.choice(arm).best, "gap": judged}
        row |= {"failed": failed, "runs": n, "smallest_margin": d.smallest_margin, "sd_of_a_pair": d.sd}
        row |= {"pairs_to_separate": pairs_needed(statistics.power, effect)}
        row |= {"pairs_for_equivalence": pairs_needed(statistics.power_of_equivalence, room)}
        row |= {"separated_since_step": c.onsets.get(arm)}
        row |= {"low_over_windows_too": spread.low if spread else None}
        row |= {"high_over_windows_too": spread.high if spread else None}
        rows.append(row | {"variance_of_the_mean": _shares([spread.parts]) if spread else None})

    def needed(name):
        return lambda r: "" if not r["gap"].d.sd > 0 else text_of(r[name]) or f"more than {statistics.MOST_PAIRS}"

    def over_all(r):
        low, high = r["low_over_windows_too"], r["high_over_windows_too"]
        return "" if low is None else f"[{signed(low)}, {signed(high)}]"

    columns = {"format": "format", "treatment": "treatment", "gap": lambda r: show_difference(r["gap"])}
    columns |= {"at rate": lambda r: f"{r['learning_rate']:g}", f"against {REFERENCE}": lambda r: show_class(r["gap"])}
    columns |= {"failed": lambda r: f"{r['failed']} of {r['runs']}"}
    columns |= {"p of no gap": lambda r: show_p(r["gap"].p, r["gap"].holm_p)}
    columns |= {"p of no equivalence": lambda r: show_p(r["gap"].p_equal, r["gap"].holm_equal)}
    columns |= {"smallest margin": "smallest_margin", "sd of a pair": "sd_of_a_pair"}
    columns |= {"pairs needed to separate": needed("pairs_to_separate")}
    columns |= {"pairs needed for equivalence": needed("pairs_for_equivalence")}
    columns |= {"separated since step": "separated_since_step"}
    if c.spreads:
        columns |= {"interval over windows too": over_all, "variance of the mean gap": "variance_of_the_mean"}
    return Table(
        "gaps",
        f"Every gap to {REFERENCE}, and what its tests say (margin {c.margin:g})",
        "p of a true gap of 0, and of one outside the margin. Smallest margin: within which these pairs alone show "
        f"equivalence, uncorrected. Pairs needed: to reach {POWER:.0%} power with this standard deviation, "
        "uncorrected, for this gap, and for equivalence of a true gap of 0. Separated since: the first evaluation from "
        "which the paired curves stay apart, corrected over the evaluations.",
        rows,
        columns,
    )


def costs_table(c):
    rows = []
    for name, (rate, causes) in c.costs.items():
        worst, rivals = c.largest_cost(name)
        for cause, one in causes.items():
            row = {"format": format_name(c, name), "part": cause, "learning_rate": rate, "cost": one.judged}
            row |= {"arm": one.first[0].label, "against": one.second[0].label, "largest": one is worst}
            rows.append(row | {"not_shown_to_cost_less": one is not worst and cause in rivals})
    return Table(
        "costs",
        "What one part of each format costs",
        "Only W, only A, only G in the format, each against BF16; update: weights stored (to nearest, where run) "
        "against a float32 master. At the format's own learning rate where it was run there. The largest is named only "
        "where it is separated from 0, with those that are not shown to cost less.",
        rows,
    )


def effects_table(c):
    rows = []
    for (arm, rate), judged in c.effects.items():
        row = {"format": format_name(c, arm.format), "change": changed(arm), "to": base_of(arm).label}
        row |= {"learning_rate": rate, "own_rate": rate == c.choice(base_of(arm)).rate, "effect": judged}
        rows.append(row)
    return Table(
        "effects",
        "What one setting changes: the loss with it minus the loss without",
        "Below 0 it helps. Same format, storage, learning rate and seeds. Own rate: that of the arm without it.",
        rows,
    )


def rates_table(c):
    rows = []
    for arm in c.arms:
        choice = c.choice(arm)
        for rate in c.rates(arm):
            losses = list(c.losses(arm, rate).values())
            finite = [loss for loss in losses if math.isfinite(loss)]
            row = {"arm": arm.label, "learning_rate": rate, "val_loss": float(np.mean(finite)) if finite else None}
            row |= {"ended": len(finite), "runs": len(losses), "chosen": rate == choice.rate}
            row |= {"candidate": rate in choice.rates, "noise_rms": statistics.noise(losses).rms}
            rows.append(row | {"gap": c.rate_gaps.get((arm, rate))})
    columns = {name: name for name in ("arm", "learning_rate", "val_loss", "ended", "runs")}
    columns |= {"chosen": lambda r: "chosen" if r["chosen"] else "" if r["candidate"] else "no candidate"}
    columns |= {"gap at this rate": lambda r: r["gap"] and show_difference(r["gap"]) or ""}
    return Table(
        "learning-rates",
        "Learning rates, and the gaps at each",
        f"Mean validation loss at each rate, and its gap to {REFERENCE} at the same rate: a family of its own. An arm "
        f"is taken at its best rate if it was run at {MIN_RATES} or more.",
        rows,
        columns | {"it is": lambda r: r["gap"] and show_class(r["gap"]) or ""},
    )


def pairwise_table(c):
    place = {arm: i for i, arm in enumerate(c.ranked)}
    rows = [
        {"format": short(arm, c), "other": short(other, c), "difference": judged}
        for (arm, other), judged in c.pairs.items()
        if place[arm] < place[other]
    ]
    return Table(
        "pairs",
        "Every pair of formats",
        f"First minus other, each at the rate of the opening table; pairs with {REFERENCE} are its gaps.",
        rows,
    )


def warnings_table(crossings):
    """crossings: {arm: {statistic: (seed, crossing)}}, the earliest over the arm's seeds."""
    rows = []
    for arm, found in crossings.items():
        for statistic, (seed, crossing) in sorted(found.items(), key=lambda item: item[1][1][0]):
            names = ("step", "layer", "value", "limit", "layers")
            rows.append({"arm": arm.label, "statistic": statistic, "seed": seed, **dict(zip(names, crossing))})
    return Table(
        "early-warnings",
        "Early warnings: when each statistic first crossed its threshold",
        "The earliest of the arm's seeds, on single recorded rows. Early is not the same as harmful: many formats "
        "cross one at step 1 and train all the same.",
        rows,
    )


def thresholds_table(c):
    config, rows = next((run.config for run in c.all_runs if run.config), {}), []
    for t in THRESHOLDS:
        warns = f"{'above' if t.above else 'below'} {config.get(t.setting, t.value):g}"
        if t.statistic == "stable_rank" and "rank_threshold_strict" in config:
            strict = config["rank_threshold_strict"]
            warns += f" ({strict:g} for the head and the projections into the residual stream)"
        source = f"the setting {t.setting}" if t.setting in config else "fixed here"
        row = {"statistic": t.statistic, "warns": warns, "unit": t.unit, "from": source}
        rows.append(row | {"where": "stored weights only" if t.stored else ""})
    return Table(
        "thresholds",
        "Thresholds of the early warnings",
        "A setting's value is taken from each run's own config; shown is the first run's.",
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
    order = {DAMAGED: 0, UNFINISHED: 1, LOST: 2, FINISHED: 3}
    rows = []
    for run in sorted(c.all_runs, key=lambda run: order[run.state]):
        known = run.arm is not None
        row = {"run": run.name, "arm": run.arm.label if known else None}
        row |= {"learning_rate": run.learning_rate if known else None, "seed": run.seed if known else None}
        row |= {"data_seed": run.config["data_seed"] if known else None}
        row |= {"state": run.state if run.state != FINISHED or run.sound else "finished, not sound"}
        row |= {"val_loss": f"{run.val_loss:.4f}" if math.isfinite(run.val_loss) else None, "remark": run.reason}
        rows.append(row)
    return Table("runs", "All runs", "Unfinished and damaged runs are counted nowhere.", rows)


def troubles(c):
    """[(run name, state, reason)] of what a reader must know: damaged, unfinished and lost runs, duplicates."""
    order = (DAMAGED, UNFINISHED, LOST, FINISHED)
    said = [(state, run) for state in order for run in c.all_runs if run.state == state and run.reason]
    return [(run.name, state, run.reason) for state, run in said] + [
        (run.name, "left out", f"the same arm, learning rate and seed as {other.name}") for run, other in c.duplicates
    ]


# ------------------------------------------------------------------------------------------------------ speed


def kind_of_run(run):
    """Words for what decides a run's speed: formats, storage, optimizer, what it measures, and the device."""
    config, arm = run.config, run.arm
    formats = "formats" if arm.plain else "formats, some operands"
    if config.get("recipe"):
        formats = f"recipes of {len(config.get('recipe_program') or config['recipe'])}"
    elif not config.get("use_fp8"):
        formats = f"no format, {arm.format}"
    watch = f"metrics {config.get('metrics', 'all')}" + (
        f", reference gradient every {config['reference_interval']}" if config["reference_gradient"] else ""
    )
    try:
        device = run.manifest["starts"][-1]["device"]["kind"]
    except (KeyError, IndexError, TypeError):
        device = "device not recorded"
    kept = AT_REST_LABELS.get(arm.at_rest, arm.at_rest) if arm.at_rest != MASTER else ""
    return "; ".join(filter(None, (formats, kept, arm.optimizer if arm.optimizer != ADAMW else "", watch, device)))


def speed_table(c, reader):
    """The finished runs' timing by kind."""
    kinds, rows = {}, []
    for run in c.all_runs:
        if run.ended and isinstance(run.verdict.get("step_time_s"), float | int):
            kinds.setdefault(kind_of_run(run), []).append(run)
    for kind, runs in sorted(kinds.items()):
        step_ms = [1e3 * run.verdict["step_time_s"] for run in runs]
        seconds = {"compiled": [], "eval": [], "diagnosis": []}
        for run in runs:
            for event in reader.timing(run)[1]:
                if event["event"] in seconds and isinstance(event.get("seconds"), float | int):
                    seconds[event["event"]].append(event["seconds"])
        rates = [run.verdict["tokens_per_s"] for run in runs if run.verdict.get("tokens_per_s")]
        row = {"kind_of_run": kind, "runs": len(runs), "ms_per_step": float(np.median(step_ms))}
        row |= {"lowest": min(step_ms), "highest": max(step_ms), "tokens_per_s": float(np.median(rates or [math.nan]))}
        rows.append(row | {f"{name}_s": float(np.median(found or [math.nan])) for name, found in seconds.items()})
    return Table(
        "throughput",
        "Throughput, and what measuring costs",
        "Medians over the runs of a kind. A record does not say how much of a step went into its statistics: compare "
        "kinds that differ in the metrics alone, or run scripts/bench.py, which interleaves them. Runs that shared a "
        "machine slowed each other.",
        rows,
    )


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
