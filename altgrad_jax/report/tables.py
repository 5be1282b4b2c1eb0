"""The report's words and tables, the same for HTML and Markdown: what the Comparison found, as text and as CSV."""

import csv
import io
import math
from dataclasses import dataclass

import numpy as np

from altgrad_jax.report import analysis, statistics
from altgrad_jax.report.analysis import ADAMW, CAUSES, MASTER, MIN_RATES, SAME_GRID, THRESHOLDS, base_of
from altgrad_jax.report.runs import AT_REST_LABELS, DAMAGED, FINISHED, LOST, REFERENCE, UNFINISHED, Arm
from altgrad_jax.report.statistics import (
    ALPHA,
    BETTER,
    CONFIDENCE,
    EQUIVALENT,
    FEW,
    INCONCLUSIVE,
    POWER,
    WORSE,
    has_two_clusters,
    pairs_needed,
)


@dataclass(frozen=True)
class Table:
    """A table: cells are text. aid: one line that says how to read it. data: (file name, CSV) of its numbers."""

    title: str
    aid: str
    columns: tuple
    rows: list
    data: tuple


TESTS = ("p", "p_holm", "p_equivalence", "p_equivalence_holm", "p_lost", "p_lost_holm", "class", "two_clusters")
DIFFERENCE = ("mean", "low", "high", "sd", "n", "pairs", "worse_only", "better_only", "neither")


def to_csv(columns, rows):
    """CSV text. Numbers in the shortest form that reads back as the same number; NaN and None as nothing.

    columns: names with spaces between; `*` stands for those of `difference_cells`, `gap_*` for the same with a prefix.
    """
    names = []
    for name in columns.split():
        prefix = name.removesuffix("*")
        names += [name] if prefix == name else [*(prefix + part for part in DIFFERENCE), *TESTS]

    def cell(value):
        if value is None or isinstance(value, float | np.floating) and math.isnan(value):
            return ""
        return str(value) if isinstance(value, np.generic) else value

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([[cell(value) for value in row] for row in rows])
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
    gaps = {_short(arm, c): c.gap(arm) for arm in ranked}
    parts = [(f"Gap to {REFERENCE} in nats per token ({how})", _by_class(gaps, c.margin))] if ranked else []
    by_cause = {}
    for name in c.costs:
        worst, rivals = c.largest_cost(name)
        words = " or ".join([worst.cause, *rivals]) if worst else "none separated"
        by_cause.setdefault(words, []).append(_name(c, name))
    if by_cause:
        words = "; ".join(f"{cause} in {names(found)}" for cause, found in by_cause.items())
        parts.append(("Largest cost of one part, at the rates and treatments in the table of costs", words + "."))
    by_optimizer = {}
    for (arm, rate), judged in c.effects.items():
        if rate == c.choice(base_of(arm)).rate and judged.d.n_pairs:
            by_optimizer.setdefault((arm.optimizer, arm.at_rest), {})[_name(c, arm.format)] = judged
    for (optimizer, at_rest), found in by_optimizer.items():
        heading = f"{optimizer} against {ADAMW} ({treatment(at_rest)}; same format, learning rate and seed)"
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


def _name(c, name):
    """A format, and its other name where that stands with it."""
    return f"{name} = {c.twin}" if c.twin and name == SAME_GRID[0] else name


def _short(arm, c):
    plain = Arm(arm.format, at_rest=c.primary[0], optimizer=c.primary[1])
    return _name(c, arm.format) if arm == plain else arm.label


def variation(c):
    """What the intervals hold of what could have come out otherwise: one or two sentences."""
    draws = {draw for cell in c.cells.values() for draw in cell}
    orders = {order for _, order in draws}
    windows = next((f"{run.config['eval_windows']} windows" for run in c.all_runs if run.arm), None)
    if any("recorder" in run.manifest for run in c.all_runs):
        windows = "validation data, by the loops that recorded them"
    if len(orders) < 2:
        held = "The intervals hold the seed of the weights, not the data order"
    elif len(orders) == len(draws) == len({seed for seed, _ in draws}):
        held = "The intervals hold the seed of the weights and the data order together; their parts cannot be told"
    else:
        parts = [statistics.variance_parts(one.d.values, one.d.draws) for one in c.gaps.values()]
        sums = (
            {name: sum(part[name] for part in parts if part) for name in (parts[0] or ())}
            if parts and all(parts)
            else {}
        )
        shares = ", ".join(f"{name} {value / sum(sums.values()):.0%}" for name, value in sums.items() if value)
        held = "The intervals hold the seed of the weights and the data order" + (
            f"; of the variance of one gap: {shares}" if shares else "; their parts cannot be told"
        )
    over = "every validation window there is" if c.over_all_windows else f"one set of {windows}"
    return f"{held}. All runs are evaluated on {over}: what other text would show is not in them."


def caveats(c):
    """What to know before believing the table: sentences."""
    families = {"gaps": c.gaps, "gaps at one rate": c.rate_gaps, "pairs of formats": _half(c.pairs, c)}
    families |= {"costs": [cost for _, found in c.costs.values() for cost in found], "effects": c.effects}
    sizes = ", ".join(f"{name} ({len(family)})" for name, family in families.items() if family)
    parts = [
        f"Every comparison ends in one class. Equivalent: within {c.margin:g} nats of 0 by two one-sided tests. Worse, "
        "better: separated from 0. Inconclusive: neither was shown. A gap that is equivalent and separated is called "
        f"equivalent, and its side is said. All tests are at {ALPHA:.0%}, after Holm's correction.",
        f"Corrected together, differences apart from equivalences apart from lost runs: {sizes}. Each of these "
        f"families holds a false statement of one kind with a chance of at most {ALPHA:.0%}; the page as a whole has "
        "a higher one.",
        f"Intervals are {CONFIDENCE:.0%} Student t intervals of the paired differences, n the number of pairs, each "
        f"for itself and not corrected; fewer than {FEW} pairs are marked.",
        variation(c),
        "Two clusters: one gap between neighbouring values takes more of their range than in 99 of 100 normal samples. "
        "The interval then covers the truth far less often than it says: look at the single runs.",
        f"Two formats that share a letter are not separated by any test; that does not make them equal. Pairs with "
        f"{REFERENCE} are the gaps, the others are a family of their own.",
        "A run that diverged or stopped by itself has no loss: it is counted apart, by Fisher's exact test, and the "
        "gap is of the pairs that ended. A cell that lost runs is called neither equivalent nor better for its "
        "survivors. Failed runs are the lost ones and those that ended but were not sound (non-finite steps, a rising "
        "validation loss).",
    ]
    if any(c.choice(arm).best for arm in c.ranked):
        parts.append(
            "The best learning rate is chosen on the same seeds that give the gap, so the best of k looks a little "
            f"better than a fresh run at it would; {REFERENCE} is favoured in the same way."
        )
    if c.twin:
        n = c.same_grid(*SAME_GRID)[1]
        parts.append(f"{SAME_GRID[0]} and {c.twin} are one grid, and agree in all {n} runs of both: it stands once.")
    at_edge = [_short(arm, c) for arm in c.ranked if c.choice(arm).at_edge]
    if at_edge:
        parts.append(f"At the edge of the rates tried, so that a better one may lie beyond: {', '.join(at_edge)}.")
    return parts


# ---------------------------------------------------------------------------------------------------- tables


def _half(pairs, c):
    """The members of the family of pairs: each once, none with BF16."""
    place = {arm: i for i, arm in enumerate(c.ranked)}
    return [(arm, other) for arm, other in pairs if place[arm] < place[other] and c.reference not in (arm, other)]


RANKING = "group format gap_* val_loss ended seeds failed learning_rate rates best_of_rates largest_cost"


def columns(words):
    """The names of a table's columns, written with bars between."""
    return tuple(words.split("|"))


def ranking_table(c, warnings):
    """The opening table. warnings: {arm: (seed, (statistic, crossing)) or None}, of arms whose statistics were read."""
    found = [_ranked(c, letters, arm, warnings.get(arm)) for letters, arm in c.ranking()]
    return Table(
        f"Formats by validation-loss gap to {REFERENCE}: {treatment(*c.primary)}, {c.lr_heading()}",
        "Above 0 is worse than BF16. Formats that share a letter are not separated. Largest cost: from ablations. "
        "Early warning: the first threshold crossed, which need not be the cause."
        + (f" Scales, where an arm does not say otherwise: {c.scales}." if c.scales else ""),
        columns(
            f"group|format|gap to BF16, nats per token|against {REFERENCE}|validation loss|failed runs|"
            f"learning rate (range within {c.margin:g})|largest cost|early warning"
        ),
        [row for row, _ in found],
        ("ranking.csv", to_csv(RANKING, [numbers for _, numbers in found])),
    )


def _ranked(c, letters, arm, warned):
    """(cells, CSV values) of an arm in the opening table."""
    choice, gap = c.choice(arm), c.gap(arm)
    failed, n = c.failures(arm, choice.rate)
    mean, ended, seeds = c.mean_loss(arm)
    own = arm.format in c.formats
    plain = own and not arm.variant
    cost = c.largest_cost(arm.format)[0] if plain else None
    is_reference = arm == c.reference
    cells = [
        letters or "-",
        _short(arm, c),
        "reference" if is_reference else show_difference(gap),
        "" if is_reference or not own and gap is None else show_class(gap),
        "none" if math.isnan(mean) else f"{mean:.4f}" + ("" if ended == seeds else f" ({ended} of {seeds})"),
        f"{failed} of {n}",
        f"{choice.rate:g}{'' if choice.works is None else _works(choice)}",
        show_cost(c, arm.format) if plain else "",
        show_crossing(*((warned[1], warned[0]) if warned else (None,))) if own else "",
    ]
    numbers = [letters, arm.label, *difference_cells(gap), mean, ended, seeds, failed, choice.rate]
    return cells, [*numbers, " ".join(map(repr, choice.rates)), choice.best, cost.cause if cost else ""]


def tests_table(c):
    """The numbers behind the classes of the gaps, and how many pairs would have been needed."""
    rows, data = [], []
    for arm, judged in c.gaps.items():
        d, step = judged.d, c.onsets.get(arm)
        effect, room = (abs(d.mean) / d.sd, c.margin / d.sd) if d.sd > 0 else (math.nan, math.nan)
        needed = pairs_needed(statistics.power, effect), pairs_needed(statistics.power_of_equivalence, room)
        margin = d.smallest_margin
        rows.append(
            [
                arm.label if arm.format not in SAME_GRID else arm.label.replace(arm.format, _name(c, arm.format), 1),
                show_class(judged),
                show_p(judged.p, judged.holm_p),
                show_p(judged.p_equal, judged.holm_equal),
                "" if math.isnan(margin) else f"{margin:.3f}",
                "" if math.isnan(d.sd) else f"{d.sd:.4f}",
                *(
                    "" if not d.sd > 0 else f"more than {statistics.MOST_PAIRS}" if n is None else str(n)
                    for n in needed
                ),
                "" if step is None else f"step {step}",
            ]
        )
        data.append([arm.label, *difference_cells(judged), margin, *needed, step])
    return Table(
        f"What the tests of the gaps say (margin {c.margin:g})",
        "p of a true gap of 0, and of one outside the margin. Smallest margin: within which these pairs alone show "
        f"equivalence, uncorrected. Pairs needed: to reach {POWER:.0%} power with this standard deviation, "
        "uncorrected, for this gap, and for equivalence of a true gap of 0. Separated since: the first evaluation from "
        "which the paired curves stay apart, corrected over the evaluations.",
        columns(
            f"arm|against {REFERENCE}|p of no gap|p of no equivalence|smallest margin|sd of a pair|"
            "pairs needed to separate|pairs needed for equivalence|separated since"
        ),
        rows,
        (
            "tests.csv",
            to_csv("arm gap_* smallest_margin pairs_to_separate pairs_for_equivalence separated_since", data),
        ),
    )


def _works(choice):
    low, high = choice.works
    if low == high:
        return f" (only; next tried: {', '.join(f'{rate:g}' for rate in choice.rates if rate != low)})"
    return f" ({low:g} to {high:g}, {high / low:.3g}x)"


def treatments_table(c):
    kinds = c.treatments()
    rows, data = [], []
    for name in c.formats:
        row = [_name(c, name)]
        for at_rest, optimizer, variant in kinds:
            arm = Arm(name, at_rest=at_rest, optimizer=optimizer, variant=variant)
            if arm not in c.arms:
                row.append("")
                continue
            gap, choice = c.gap(arm), c.choice(arm)
            failed, n = c.failures(arm, choice.rate)
            words = f"{show_difference(gap)} at {choice.rate:g}: {show_class(gap)}"
            row.append(words + (f"; {failed} of {n} failed" if failed else ""))
            cells = difference_cells(gap)
            data.append([name, at_rest, optimizer, variant, choice.rate, choice.best, *cells, failed, n])
        rows.append(row)
    return Table(
        "Gap to BF16 for every way to keep the weights",
        "A row is a format; read along it to see what storing the weights without a float32 master costs.",
        ("format", *(treatment(*kind) for kind in kinds)),
        rows,
        (
            "treatments.csv",
            to_csv("format at_rest optimizer variant learning_rate best_of_rates gap_* failed runs", data),
        ),
    )


def costs_table(c):
    rows, data = [], []
    for name, (rate, causes) in c.costs.items():
        cells = (
            f"{show_difference(causes[cause].judged)}: {show_class(causes[cause].judged)}"
            if cause in causes
            else "not run"
            for cause in CAUSES
        )
        rows.append([_name(c, name), f"{rate:g}", *cells, show_cost(c, name)])
        worst, rivals = c.largest_cost(name)
        data += [
            [name, rate, cause, one.first[0].label, one.second[0].label, *difference_cells(one.judged), one is worst]
            for cause, one in causes.items()
        ]
    return Table(
        "What one part of each format costs",
        "Only W, only A, only G in the format, each against BF16; update: weights stored (to nearest, where run) "
        "against a float32 master. The largest is named only where it is separated from 0, with those that are not "
        "shown to cost less.",
        ("format", "learning rate", *CAUSES, "largest cost"),
        rows,
        ("costs.csv", to_csv("format learning_rate cause arm against * largest", data)),
    )


def optimizer_table(c):
    found, data = {}, []
    for (arm, rate), judged in c.effects.items():
        found.setdefault(arm, {})[rate] = judged
        own = rate == c.choice(base_of(arm)).rate
        data.append([arm.format, arm.at_rest, arm.optimizer, rate, own, *difference_cells(judged)])
    rows = []
    for arm, by_rate in found.items():
        own = c.choice(base_of(arm)).rate
        rows.append(
            [
                _name(c, arm.format),
                treatment(arm.at_rest, arm.optimizer, arm.variant),
                f"{show_difference(by_rate[own])} at {own:g}" if own in by_rate else "not run",
                show_class(by_rate[own]) if own in by_rate else "",
                "; ".join(f"{rate:g}: {_brief(judged)}" for rate, judged in by_rate.items() if rate != own),
            ]
        )
    return Table(
        "What the format-aware optimizer changed: its loss minus AdamW's",
        "Below 0 it helps. Same format, storage, learning rate and seeds; AdamW's learning rate is the best for it.",
        ("format", "treatment", "at AdamW's learning rate", "it is", "at other rates"),
        rows,
        ("optimizer.csv", to_csv("format at_rest optimizer learning_rate adamw_best_rate *", data)),
    )


def _brief(judged):
    return f"{signed(judged.d.mean) if judged.d.n else 'no loss'} {show_class(judged)}"


def rates_table(c):
    rows, data = [], []
    for arm in c.arms:
        if not arm.plain:
            continue
        choice, cells = c.choice(arm), []
        for rate in c.rates(arm):
            losses = list(c.losses(arm, rate).values())
            finite = [loss for loss in losses if math.isfinite(loss)]
            mean = float(np.mean(finite)) if finite else math.nan
            gap = c.rate_gaps.get((arm, rate))
            data.append(
                [arm.label, rate, mean, len(finite), len(losses), rate == choice.rate, rate in choice.rates]
                + [statistics.noise(losses).rms, *difference_cells(gap)]
            )
            words = f"{rate:g}: {mean:.4f}" if finite else f"{rate:g}: none"
            ended = "" if len(finite) == len(losses) else f", {len(finite)} of {len(losses)} ended"
            words += f" (n={len(losses)}{ended})" + (" chosen" if rate == choice.rate else "")
            cells.append(words + (f", gap {_brief(gap)}" if gap else ""))
        seeds = ", ".join(str(seed) for seed in dict.fromkeys(seed for seed, _ in choice.draws))
        chosen = f"best of {len(choice.rates)}, on seeds {seeds}" if choice.best else f"fewer than {MIN_RATES} rates"
        works = "" if choice.works is None else _works(choice).strip(" ()")
        rows.append([arm.label, "; ".join(cells), chosen, works])
    return Table(
        "Learning rates, and the gaps at each",
        f"Mean validation loss at each rate, and its gap to {REFERENCE} at the same rate: a family of its own. The "
        f"range: neighbouring rates whose mean lies within {c.margin:g} of the best, without a test.",
        ("arm", "rates", "choice", f"range within {c.margin:g}"),
        rows,
        (
            "learning-rates.csv",
            to_csv("arm learning_rate val_loss ended seeds chosen candidate noise_rms gap_*", data),
        ),
    )


def pairwise_table(c):
    rows, data = [], []
    for arm in c.ranked:
        row = [_short(arm, c)]
        for other in c.ranked:
            judged = c.pairs.get((arm, other))
            row.append("" if judged is None else _brief(judged))
            data += [] if judged is None else [[arm.label, other.label, *difference_cells(judged)]]
        rows.append(row)
    return Table(
        "Every pair of formats",
        f"Row minus column, each at the rate of the opening table; pairs with {REFERENCE} are its gaps.",
        ("", *(_short(arm, c) for arm in c.ranked)),
        rows,
        ("pairs.csv", to_csv("arm other *", data)),
    )


def warnings_table(crossings):
    """crossings: {arm: {statistic: (seed, crossing)}}, the earliest over the arm's seeds."""
    rows, data = [], []
    for arm, found in crossings.items():
        for statistic, (seed, crossing) in sorted(found.items(), key=lambda item: item[1][1][0]):
            rows.append([arm.label, show_crossing((statistic, crossing)), str(seed)])
            data.append([arm.label, statistic, seed, *crossing])
    return Table(
        "Early warnings: when each statistic first crossed its threshold",
        "The earliest of the arm's seeds, on single recorded rows. Early is not the same as harmful: many formats "
        "cross one at step 1 and train all the same.",
        ("arm", "first crossing", "seed"),
        rows,
        ("early-warnings.csv", to_csv("arm statistic seed step layer value limit layers", data)),
    )


def thresholds_table(c):
    config = next((run.config for run in c.all_runs if run.config), {})
    rows = []
    for t in THRESHOLDS:
        limit = f"{'above' if t.above else 'below'} {config.get(t.setting, t.value):g}"
        if t.statistic == "stable_rank" and "rank_threshold_strict" in config:
            strict = config["rank_threshold_strict"]
            limit += f" ({strict:g} for the head and the projections into the residual stream)"
        source = f"the setting {t.setting}" if t.setting in config else "fixed here"
        rows.append([t.statistic, limit, t.unit, source, "stored weights only" if t.stored else ""])
    return Table(
        "Thresholds of the early warnings",
        "A setting's value is taken from each run's own config; shown is the first run's.",
        ("statistic", "warns", "unit", "from", "where"),
        rows,
        ("thresholds.csv", to_csv("statistic warns unit from where", rows)),
    )


def checks(c):
    """Lines of things that must hold: [(words, "yes" | "no")]."""
    found = []
    for first, second, words in (
        (*SAME_GRID, f"{' and '.join(SAME_GRID)}, one grid, agree to the bit"),
        (
            REFERENCE,
            f"{REFERENCE} as a format",
            f"{REFERENCE} as a traced format and without any format agree to the bit",
        ),
    ):
        result = c.same_grid(first, second)
        if result:
            found.append((f"{words} ({result[1]} pairs of runs)", "yes" if result[0] else "no"))
    return found


def runs_table(c):
    order = {DAMAGED: 0, UNFINISHED: 1, LOST: 2, FINISHED: 3}
    rows = [
        [
            run.name,
            run.arm.label if run.arm else "",
            f"{run.learning_rate:g}" if run.arm else "",
            str(run.seed) if run.arm else "",
            run.state if run.state != FINISHED or run.sound else "finished, not sound",
            f"{run.val_loss:.4f}" if math.isfinite(run.val_loss) else "",
            run.reason,
        ]
        for run in sorted(c.all_runs, key=lambda run: order[run.state])
    ]
    return Table(
        "All runs",
        "Unfinished and damaged runs are counted nowhere.",
        ("run", "arm", "learning rate", "seed", "state", "validation loss", "remark"),
        rows,
        ("runs.csv", to_csv("run arm learning_rate seed state val_loss remark", rows)),
    )


def troubles(c):
    """[(run name, state, reason)] of what a reader must know: damaged, unfinished and lost runs, duplicates."""
    order = (DAMAGED, UNFINISHED, LOST)
    found = [(run.name, run.state, run.reason) for state in order for run in c.all_runs if run.state == state]
    found += [(run.name, FINISHED, run.reason) for run in c.all_runs if run.state == FINISHED and run.reason]
    return found + [
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
    """(Table, [(kind, median, lowest, highest ms per step)]) of the finished runs' timing."""
    kinds = {}
    for run in c.all_runs:
        if run.ended and isinstance(run.verdict.get("step_time_s"), float | int):
            kinds.setdefault(kind_of_run(run), []).append(run)
    rows, data, drawn = [], [], []
    for kind, runs in sorted(kinds.items()):
        step_ms = [1e3 * run.verdict["step_time_s"] for run in runs]
        rate = float(
            np.median([run.verdict["tokens_per_s"] for run in runs if run.verdict.get("tokens_per_s")] or [math.nan])
        )
        seconds = {"compiled": [], "eval": [], "diagnosis": []}
        for run in runs:
            for event in reader.timing(run)[1]:
                if event["event"] in seconds and isinstance(event.get("seconds"), float | int):
                    seconds[event["event"]].append(event["seconds"])
        medians = {name: float(np.median(values or [math.nan])) for name, values in seconds.items()}
        middle = float(np.median(step_ms))
        rows.append(
            [
                kind,
                str(len(runs)),
                f"{middle:.4g}",
                f"{min(step_ms):.4g} to {max(step_ms):.4g}",
                f"{rate:,.0f}",
                *(f"{value:.3g}" if math.isfinite(value) else "" for value in medians.values()),
            ]
        )
        data.append([kind, len(runs), middle, min(step_ms), max(step_ms), rate, *medians.values()])
        drawn.append((kind, middle, min(step_ms), max(step_ms)))
    return Table(
        "Throughput, and what measuring costs",
        "Medians over the runs of a kind. A record does not say how much of a step went into its statistics: compare "
        "kinds that differ in the metrics alone, or run scripts/bench.py, which interleaves them. Runs that shared a "
        "machine slowed each other.",
        columns("kind of run|runs|ms per step|range|tokens/s|compiling, s|one evaluation, s|one diagnosis, s"),
        rows,
        (
            "throughput.csv",
            to_csv("kind runs ms_per_step lowest highest tokens_per_s compile_s evaluation_s diagnosis_s", data),
        ),
    ), drawn


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
