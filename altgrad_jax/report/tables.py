"""The report's words and tables, the same for HTML and Markdown: what the Comparison found, as text and as CSV."""

import csv
import io
import math
from dataclasses import dataclass

import numpy as np

from altgrad_jax.report import analysis
from altgrad_jax.report.analysis import ADAMW, CAUSES, MASTER, MIN_RATES, THRESHOLDS
from altgrad_jax.report.runs import AT_REST_LABELS, DAMAGED, FINISHED, LOST, REFERENCE, UNFINISHED, Arm
from altgrad_jax.report.statistics import CONFIDENCE, FEW


@dataclass(frozen=True)
class Table:
    """A table: cells are text. aid: one line that says how to read it. data: (file name, CSV) of its numbers."""

    title: str
    aid: str
    columns: tuple
    rows: list
    data: tuple


def to_csv(columns, rows):
    """CSV text. Numbers in the shortest form that reads back as the same number; NaN and None as nothing."""

    def cell(value):
        if value is None or isinstance(value, float | np.floating) and math.isnan(value):
            return ""
        return str(value) if isinstance(value, np.generic) else value

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[cell(value) for value in row] for row in rows])
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------ words


def signed(value):
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "none"


def show_difference(d):
    """A Difference in words: mean, interval, pairs, and every reservation."""
    if d is None:
        return f"no {REFERENCE} run"
    if not d.n_pairs:
        return "no common seed"
    if not d.n:
        return f"no loss in {len(d.worse) or len(d.better) or len(d.neither)} of {d.n_pairs}"
    words = signed(d.mean) + (f" [{signed(d.low)}, {signed(d.high)}]" if d.n > 1 else "")
    remarks = [f"n={d.n}" + (", no interval" if d.n < 2 else f", fewer than {FEW}" if d.n < FEW else "")]
    if d.n < d.n_pairs:
        remarks.append(f"survivors only: both ended in {d.n} of {d.n_pairs} pairs")
    return f"{words} ({'; '.join(remarks)})"


def show_separation(d, better="better", worse="worse"):
    if d is None or not d.n_pairs:
        return "cannot tell"
    if d.n_pairs < 2:
        return "one seed" if not d.sign else better if d.sign < 0 else worse
    return {1: worse, -1: better, 0: "not separated"}[d.sign]


def names(words):
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def treatment(at_rest, optimizer=ADAMW, variant=""):
    words = [
        AT_REST_LABELS.get(at_rest, at_rest),
        *([] if optimizer == ADAMW else [optimizer]),
        *filter(None, [variant]),
    ]
    return ", ".join(words)


def show_failure(c, name):
    """(what fails first in a format, in words, causes blamed)."""
    words, blamed, reservation = c.first_failure(name)
    return words + (f" ({reservation})" if reservation else ""), blamed


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


def difference_columns(prefix=""):
    return [f"{prefix}{name}" for name in ("mean", "low", "high", "n", "pairs", "worse_only", "better_only", "neither")]


def difference_cells(d):
    if d is None:
        return [None] * 8
    return [d.mean, d.low, d.high, d.n, d.n_pairs, len(d.worse), len(d.better), len(d.neither)]


# ------------------------------------------------------------------------------------------------ the answer


def answer(c):
    """The question answered in plain words: [(heading, sentence)]."""
    if not c.formats:
        return [("Nothing yet", "No finished run in a number format is among these runs.")]
    ranked = [arm for _, arm in c.ranking() if arm.format in c.formats]
    how = f"{treatment(*c.primary)}, {c.lr_heading()}"
    if c.reference is None:
        parts = [("Gap", f"No finished {REFERENCE} run is among these runs, so there is no gap to show yet ({how}).")]
    else:
        parts = [(f"Gap to {REFERENCE} in nats per token ({how})", _trainable(c, ranked))] if ranked else []
    by_failure = {}
    for name in c.formats:
        words, _, reservation = c.first_failure(name)
        by_failure.setdefault(reservation, {}).setdefault(words, []).append(name)
    by_failure.pop("no ablations", None)
    if by_failure:
        parts.append(
            (
                "Fails first",
                "; ".join(
                    (f"{reservation}: " if reservation else "")
                    + "; ".join(f"{words} in {names(found)}" for words, found in by.items())
                    for reservation, by in by_failure.items()
                )
                + ".",
            )
        )
    parts += _optimizer(c)
    noise = c.noise
    if math.isfinite(noise.rms):
        parts.append(
            (
                "Noise floor",
                f"two {REFERENCE} runs that differ in the seed alone end {noise.rms:.3f} apart (root mean "
                f"square over all pairs of {noise.n_seeds} seeds; at most {noise.largest:.3f}).",
            )
        )
    elif c.reference:
        parts.append(("Noise floor", f"not measured, {REFERENCE} has one seed."))
    return parts


def _trainable(c, ranked):
    groups, lost, single = {0: [], 1: [], -1: []}, [], []
    for arm in ranked:
        d = c.gap(arm)
        with_gap = f"{_short(arm, c)} ({signed(d.mean)})" if d.n else _short(arm, c)
        if d.worse:
            lost.append(f"{_short(arm, c)} ({len(d.worse)} of {d.n_pairs} seeds)")
        elif d.n_pairs < 2:
            single.append((d, with_gap))
        else:
            groups[d.sign].append(with_gap)
    words = {0: f"not separated from {REFERENCE}", 1: "worse", -1: "better"}
    sentences = [f"{words[sign]}: {names(found)}" for sign, found in groups.items() if found]
    if single and math.isfinite(c.noise.rms):
        within = [text for d, text in single if d.n and abs(d.mean) <= c.noise.rms]
        beyond = [text for d, text in single if d.n and abs(d.mean) > c.noise.rms]
        sentences += [f"one seed, within the noise floor: {names(within)}"] if within else []
        sentences += [f"one seed, beyond the noise floor: {names(beyond)}"] if beyond else []
    elif single:
        sentences.append(f"one seed and no noise floor: {names(text for _, text in single)}")
    if lost:
        sentences.append(f"with runs that were lost: {names(lost)}")
    return "; ".join(sentences) + "."


def _short(arm, c):
    plain = Arm(arm.format, at_rest=c.primary[0], optimizer=c.primary[1])
    return arm.format if arm == plain else arm.label


def _optimizer(c):
    """One entry per optimizer that is not AdamW: what it changed, by the way the weights are kept."""
    found = {}
    for arm, _, own, d in c.optimizer_effects():
        if own and d.n_pairs:
            single = d.n_pairs < 2 and not d.sign
            beyond = math.isfinite(c.noise.rms) and abs(d.mean) > c.noise.rms
            sign = (d.mean > 0) - (d.mean < 0) if single and beyond else d.sign
            found.setdefault(arm.optimizer, {}).setdefault((arm.at_rest, single), {}).setdefault(sign, []).append(
                f"{arm.format} ({signed(d.mean)})" if d.n else arm.format
            )
    words = {-1: "lower loss in", 1: "higher loss in", 0: "not separated in"}
    return [
        (
            f"{optimizer} against {ADAMW} (same format, storage, learning rate and seed)",
            "; ".join(
                treatment(at_rest)
                + (" (one seed, against the noise floor)" if single else "")
                + ": "
                + ", ".join(f"{words[sign]} {names(by_sign[sign])}" for sign in words if sign in by_sign)
                for (at_rest, single), by_sign in kinds.items()
            )
            + ".",
        )
        for optimizer, kinds in found.items()
    ]


def caveats(c):
    """What to know before believing the table: sentences."""
    parts = [
        f"Intervals are {CONFIDENCE:.0%} Student t intervals of the differences paired by seed and data order, n the "
        f"number of pairs; fewer than 2 have none, fewer than {FEW} are marked. They are not corrected for the number "
        "of comparisons.",
        "A rank begins only where the paired difference to the neighbour above is separated from 0; formats of one "
        "rank are not separated from their neighbours.",
        "A run that diverged or stopped by itself has no loss and counts as worse than any number; failed runs are "
        "those and the ones that ended but were not sound (non-finite steps, a rising validation loss).",
    ]
    if any(c.choice(arm).best for _, arm in c.ranking()):
        parts.append(
            "The best learning rate is chosen on the same seeds that give the gap, so the best of k looks a little "
            f"better than a fresh run at it would; {REFERENCE} is favoured in the same way."
        )
    at_edge = [_short(arm, c) for _, arm in c.ranking() if c.choice(arm).at_edge]
    if at_edge:
        parts.append(f"At the edge of the rates tried, so that a better one may lie beyond: {', '.join(at_edge)}.")
    return parts


# ---------------------------------------------------------------------------------------------------- tables


def ranking_table(c, warnings):
    """The opening table. warnings: {arm: (seed, (statistic, crossing)) or None}, of arms whose statistics were read."""
    effects = {}
    for arm, _, own, d in c.optimizer_effects():
        if own:
            effects.setdefault(arm.format, []).append((arm, d))
    ranking = c.ranking()
    ranks = [rank for rank, _ in ranking]
    rows, data = [], []
    for rank, arm in ranking:
        tied = "=" if ranks.count(rank) > 1 and rank is not None else ""
        row, numbers = _ranked(c, rank, tied, arm, warnings.get(arm), effects.get(arm.format, []))
        rows.append(row)
        data.append(numbers)
    return Table(
        f"Formats by validation-loss gap to {REFERENCE}: {treatment(*c.primary)}, {c.lr_heading()}",
        'Above 0 is worse than BF16. "=": not separated from a neighbour. Fails first: from ablations. Early warning: '
        "the first threshold crossed, which need not be the cause.",
        (
            "rank",
            "format",
            "gap to BF16, nats per token",
            f"against {REFERENCE}",
            "validation loss",
            "failed runs",
            "learning rate (range that works)",
            "fails first",
            "early warning",
            "format-aware optimizer against adamw",
        ),
        rows,
        (
            "ranking.csv",
            to_csv(
                [
                    "rank",
                    "format",
                    *difference_columns("gap_"),
                    "val_loss",
                    "ended",
                    "seeds",
                    "failed",
                    "learning_rate",
                    "rates",
                    "best_of_rates",
                    "fails_first",
                ],
                data,
            ),
        ),
    )


def _ranked(c, rank, tied, arm, warned, effects):
    """(cells, CSV values) of an arm in the opening table."""
    choice, d = c.choice(arm), c.gap(arm)
    failed, n = c.failures(arm, choice.rate)
    mean, ended, seeds = c.mean_loss(arm)
    own = arm.format in c.formats
    failure, blamed = show_failure(c, arm.format) if own and not arm.variant else ("", ())
    works = "" if choice.works is None else _works(choice)
    is_reference = arm == c.reference
    cells = [
        f"{rank}{tied}" if rank else "-",
        _short(arm, c),
        "reference" if is_reference else show_difference(d),
        "" if is_reference or not own and d is None else show_separation(d),
        "none" if math.isnan(mean) else f"{mean:.4f}" + ("" if ended == seeds else f" ({ended} of {seeds})"),
        f"{failed} of {n}",
        f"{choice.rate:g}{works}",
        failure,
        "" if not own else show_crossing(*((warned[1], warned[0]) if warned else (None,))),
        "; ".join(
            f"{treatment(a.at_rest, a.optimizer)}: {signed(e.mean)}, {show_separation(e, 'helps', 'hurts')}"
            for a, e in effects
        )
        if own
        else "",
    ]
    numbers = [
        rank,
        arm.label,
        *difference_cells(d),
        mean,
        ended,
        seeds,
        failed,
        choice.rate,
        " ".join(map(repr, choice.rates)),
        choice.best,
        " or ".join(blamed),
    ]
    return cells, numbers


def _works(choice):
    low, high = choice.works
    if low == high:
        return f" (only; next tried: {', '.join(f'{rate:g}' for rate in choice.rates if rate != low)})"
    return f" ({low:g} to {high:g}, {high / low:.3g}x)"


def treatments_table(c):
    kinds = c.treatments()
    rows, data = [], []
    for name in c.formats:
        row = [name]
        for at_rest, optimizer, variant in kinds:
            arm = Arm(name, at_rest=at_rest, optimizer=optimizer, variant=variant)
            if arm not in c.arms:
                row.append("")
                continue
            d, choice = c.gap(arm), c.choice(arm)
            failed, n = c.failures(arm, choice.rate)
            row.append(show_difference(d) + f" at {choice.rate:g}" + (f"; {failed} of {n} failed" if failed else ""))
            data.append([name, at_rest, optimizer, variant, choice.rate, choice.best, *difference_cells(d), failed, n])
        rows.append(row)
    return Table(
        "Gap to BF16 for every way to keep the weights",
        "A row is a format; read along it to see what storing the weights without a float32 master costs.",
        ("format", *(treatment(*kind) for kind in kinds)),
        rows,
        (
            "treatments.csv",
            to_csv(
                [
                    "format",
                    "at_rest",
                    "optimizer",
                    "variant",
                    "learning_rate",
                    "best_of_rates",
                    *difference_columns("gap_"),
                    "failed",
                    "runs",
                ],
                data,
            ),
        ),
    )


def failure_table(c):
    rows, data = [], []
    for name in c.formats:
        rate, causes = c.causes(name)
        if rate is None:
            continue
        sentence, blamed = show_failure(c, name)
        rows.append(
            [
                name,
                f"{rate:g}",
                *(show_difference(causes[cause]) if cause in causes else "not run" for cause in CAUSES),
                sentence,
            ]
        )
        data += [[name, rate, cause, *difference_cells(d), cause in blamed] for cause, d in causes.items()]
    return Table(
        "Where each format fails first: what one part alone costs",
        "Only W, only A, only G in the format, each against BF16; update: weights stored (to nearest, where run) "
        "against a float32 master. The largest that is separated from 0 is blamed, with those not separated from it.",
        ("format", "learning rate", *(f"{cause}" for cause in CAUSES), "fails first"),
        rows,
        ("first-failure.csv", to_csv(["format", "learning_rate", "cause", *difference_columns(), "blamed"], data)),
    )


def optimizer_table(c):
    effects, data = {}, []
    for arm, rate, own, d in c.optimizer_effects():
        effects.setdefault(arm, []).append((rate, own, d))
        data.append([arm.format, arm.at_rest, arm.optimizer, rate, own, *difference_cells(d)])
    rows = []
    for arm, found in effects.items():
        base = Arm(arm.format, arm.operands, arm.at_rest, ADAMW, arm.variant)
        ours, theirs = c.choice(arm), c.choice(base)
        at_own = next(((rate, d) for rate, own, d in found if own), None)
        best = c.difference((arm, ours.rate), (base, theirs.rate)) if ours.best and theirs.best else None
        rows.append(
            [
                arm.format,
                treatment(arm.at_rest, arm.optimizer, arm.variant),
                f"{show_difference(at_own[1])} at {at_own[0]:g}" if at_own else "not run",
                show_separation(at_own[1], "helps", "hurts") if at_own else "",
                "; ".join(f"{rate:g}: {_brief(d)}" for rate, own, d in found if not own),
                f"{show_difference(best)} at {ours.rate:g} against {theirs.rate:g}" if best else "",
            ]
        )
    return Table(
        "What the format-aware optimizer changed: its loss minus AdamW's",
        "Below 0 it helps. Same format, storage, learning rate and seeds; AdamW's learning rate is the best for it.",
        ("format", "treatment", "at AdamW's learning rate", "it", "at other rates", "each at its own best rate"),
        rows,
        (
            "optimizer.csv",
            to_csv(["format", "at_rest", "optimizer", "learning_rate", "adamw_best_rate", *difference_columns()], data),
        ),
    )


def _brief(d):
    return (signed(d.mean) if d.n else "no loss") + {1: " hurts", -1: " helps", 0: ""}[d.sign]


def rates_table(c):
    rows, data = [], []
    for arm in c.arms:
        if not arm.plain:
            continue
        choice = c.choice(arm)
        cells = []
        for rate in c.rates(arm):
            losses = c.losses(arm, rate)
            finite = [loss for loss in losses.values() if math.isfinite(loss)]
            mean = float(np.mean(finite)) if finite else math.nan
            data.append([arm.label, rate, mean, len(finite), len(losses), rate == choice.rate, rate in choice.rates])
            words = f"{rate:g}: {mean:.4f}" if finite else f"{rate:g}: none"
            ended = "" if len(finite) == len(losses) else f", {len(finite)} of {len(losses)} ended"
            cells.append(f"{words} (n={len(losses)}{ended})" + (" chosen" if rate == choice.rate else ""))
        rows.append(
            [
                arm.label,
                "; ".join(cells),
                f"best of {len(choice.rates)}, on seeds {', '.join(map(str, choice.seeds))}"
                if choice.best
                else f"fewer than {MIN_RATES} rates",
                "" if choice.works is None else _works(choice).strip(" ()"),
            ]
        )
    return Table(
        "Learning rates",
        "Mean validation loss at each rate. The range that works: neighbouring rates whose mean lies "
        "within the noise floor of the best.",
        ("arm", "rates", "choice", "range that works"),
        rows,
        (
            "learning-rates.csv",
            to_csv(["arm", "learning_rate", "val_loss", "ended", "seeds", "chosen", "candidate"], data),
        ),
    )


def pairwise_table(c):
    arms = [arm for _, arm in c.ranking()]
    rows, data = [], []
    for arm in arms:
        row = [_short(arm, c)]
        for other in arms:
            if arm == other:
                row.append("")
                continue
            d = c.difference((arm, c.choice(arm).rate), (other, c.choice(other).rate))
            row.append((signed(d.mean) if d.n else "lost") + {1: " worse", -1: " better", 0: ""}[d.sign])
            data.append([arm.label, other.label, *difference_cells(d)])
        rows.append(row)
    return Table(
        "Every pair of formats",
        "Row minus column; a word stands only where the interval excludes 0.",
        ("", *(_short(arm, c) for arm in arms)),
        rows,
        ("pairs.csv", to_csv(["arm", "other", *difference_columns()], data)),
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
        ("early-warnings.csv", to_csv(["arm", "statistic", "seed", "step", "layer", "value", "limit", "layers"], data)),
    )


def thresholds_table(c):
    config = next((run.config for run in c.all_runs if run.config), {})
    rows = [
        [
            t.statistic,
            ("above " if t.above else "below ")
            + f"{config.get(t.setting, t.value):g}"
            + (
                f" ({config['rank_threshold_strict']:g} for the head and the projections into the residual stream)"
                if t.statistic == "stable_rank" and "rank_threshold_strict" in config
                else ""
            ),
            t.unit,
            f"the setting {t.setting}" if t.setting in config else "fixed here",
            "stored weights only" if t.stored else "",
        ]
        for t in THRESHOLDS
    ]
    return Table(
        "Thresholds of the early warnings",
        "A setting's value is taken from each run's own config; shown is the first run's.",
        ("statistic", "warns", "unit", "from", "where"),
        rows,
        ("thresholds.csv", to_csv(["statistic", "warns", "unit", "from", "where"], rows)),
    )


def checks(c):
    """Lines of things that must hold: [(words, "yes" | "no")]."""
    found = []
    for first, second, words in (
        ("E0M7", "E1M6", "E0M7 and E1M6, one grid, agree to the bit"),
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
        ("runs.csv", to_csv(["run", "arm", "learning_rate", "seed", "state", "val_loss", "remark"], rows)),
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
    formats = (
        f"recipes of {len(config.get('recipe_program') or config['recipe'])}"
        if config.get("recipe")
        else f"no format, {arm.format}"
        if not config.get("use_fp8")
        else "formats"
        if arm.plain
        else "formats, some operands"
    )
    watch = f"metrics {config.get('metrics', 'all')}" + (
        f", shadow every {config.get('shadow_interval', 1)}" if config.get("use_shadow") else ""
    )
    try:
        device = run.manifest["starts"][-1]["device"]["kind"]
    except (KeyError, IndexError, TypeError):
        device = "device not recorded"
    parts = [
        formats,
        *([AT_REST_LABELS.get(arm.at_rest, arm.at_rest)] if arm.at_rest != MASTER else []),
        *([arm.optimizer] if arm.optimizer != ADAMW else []),
        watch,
        device,
    ]
    return "; ".join(parts)


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
        (
            "kind of run",
            "runs",
            "ms per step",
            "range",
            "tokens/s",
            "compiling, s",
            "one evaluation, s",
            "one diagnosis, s",
        ),
        rows,
        (
            "throughput.csv",
            to_csv(
                [
                    "kind",
                    "runs",
                    "ms_per_step",
                    "lowest",
                    "highest",
                    "tokens_per_s",
                    "compile_s",
                    "evaluation_s",
                    "diagnosis_s",
                ],
                data,
            ),
        ),
    ), drawn


def early_warnings(c, reader):
    """({arm: (seed, (statistic, crossing)) or None}, {arm: {statistic: (seed, crossing)}}) of AdamW's arms."""
    first, every = {}, {}
    for arm in c.arms:
        if not arm.plain or arm.format not in c.formats or arm.optimizer != ADAMW:
            continue
        found = {}
        for seed, run in c.cell(arm, c.choice(arm).rate).items():
            history = reader.statistics(run)
            crossings = analysis.first_crossings(history, run.config, arm.at_rest != MASTER) if history else {}
            for statistic, crossing in crossings.items():
                if statistic not in found or crossing[0] < found[statistic][1][0]:
                    found[statistic] = seed, crossing
        earliest = analysis.early_warning({name: crossing for name, (_, crossing) in found.items()})
        first[arm] = None if earliest is None else (found[earliest[0]][0], earliest)
        every[arm] = found
    return first, every
