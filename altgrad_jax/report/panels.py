"""The report's figures: which numbers each shows, and the same numbers as CSV."""

import gzip
import math
from dataclasses import dataclass

import numpy as np

from altgrad_jax.numerics.layers import BLOCK_LAYERS, HEAD
from altgrad_jax.report import figures
from altgrad_jax.report.analysis import ADAMW, MASTER, layers_of
from altgrad_jax.report.runs import LOST, OPERANDS, Arm
from altgrad_jax.report.tables import difference_cells, show_class, to_csv, treatment

POINTS = 100  # of a curve, at most; columns of a heat map

# statistic -> (words, share of badness from 0 to 1, words at the two ends of the colours)
HEAT = {
    "overflow": ("overflow", lambda v: (np.log10(np.maximum(v, 1e-6)) + 6) / 6, "0 or 1e-6", "all clipped"),
    "underflow": ("underflow", lambda v: (np.log10(np.maximum(v, 1e-6)) + 6) / 6, "0 or 1e-6", "all flushed"),
    "sqnr_db": ("SQNR", lambda v: 1 - v / 50, "50 dB", "0 dB"),
    "grad_cosine": (
        "1 \N{MINUS SIGN} cosine with the reference gradient",
        lambda v: (np.log10(np.maximum(1 - v, 1e-5)) + 5) / 5,
        "1e-5",
        "1",
    ),
    "update_gain": ("update gain", lambda v: 1 - v, "1 or more", "0"),
    "lost_update": ("lost updates", lambda v: v, "none", "all"),
    "not_flipped": ("codes not flipped by one update", lambda v: v, "none", "all"),
}


@dataclass(frozen=True)
class Figure:
    """Panels (SVG) under one heading. aid: one line that says how to read them. data: [(file name, bytes)]."""

    title: str
    aid: str
    legend: list  # [(CSS class, dashed, words)]
    panels: list
    data: list


def style(arm):
    known = arm.at_rest if arm.at_rest in (MASTER, "nearest", "stochastic", "error_feedback") else "other"
    return {
        "class": f"s-{known}",
        "dashed": arm.optimizer != ADAMW or bool(arm.variant),
        "label": treatment(arm.at_rest, arm.optimizer, arm.variant),
    }


def _legend(arms, *extra):
    seen = dict.fromkeys((one["class"], one["dashed"], one["label"]) for one in map(style, arms))
    return [*extra, *seen]


def binned(steps, columns_NS, points=POINTS):
    """Means of equally many neighbouring steps.

    Args:
      steps: int64 [S]. columns_NS: [N, S], NaN where missing.

    Returns:
      (first steps [B], last steps [B], means [N, B], float64; NaN where a bin holds no number). One step a bin, and so
      the numbers themselves, where S <= points.
    """
    columns_NS = np.atleast_2d(np.asarray(columns_NS, np.float64))
    if not len(steps):
        return steps, steps, columns_NS
    size = math.ceil(len(steps) / points)
    starts = np.arange(0, len(steps), size)
    finite = np.isfinite(columns_NS)
    total = np.add.reduceat(np.where(finite, columns_NS, 0), starts, axis=1)
    count = np.add.reduceat(finite, starts, axis=1, dtype=np.int64)
    means = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return steps[starts], steps[np.minimum(starts + size, len(steps)) - 1], means


def _matrix(curves):
    """(steps [S], [N, S]) of N curves (steps, values); NaN where one has no value."""
    steps = np.unique(np.concatenate([s for s, _ in curves])) if curves else np.array([], np.int64)
    columns = np.full((len(curves), len(steps)), np.nan)
    for row, (s, values) in zip(columns, curves):
        row[np.searchsorted(steps, s)] = values
    return steps, columns


def _over_seeds(columns_NB):
    """(mean, lowest, highest, count) over the first axis; NaN where there is none."""
    finite = np.isfinite(columns_NB)
    count = finite.sum(0)
    mean = np.divide(np.where(finite, columns_NB, 0).sum(0), count, out=np.full(count.shape, np.nan), where=count > 0)
    low = np.where(finite, columns_NB, np.inf).min(0, initial=np.inf)
    high = np.where(finite, columns_NB, -np.inf).max(0, initial=-np.inf)
    return mean, np.where(count > 0, low, np.nan), np.where(count > 0, high, np.nan), count


def _series(arm, curves, **more):
    """(series of figures.lines, CSV rows) of the curves of an arm's seeds."""
    firsts, lasts, means = binned(*_matrix(curves))
    mean, low, high, count = _over_seeds(means)
    rows = [
        [arm.label, int(first), int(last), *(float(f"{number:.9g}") for number in numbers), int(n)]
        for first, last, *numbers, n in zip(firsts, lasts, mean, low, high, count)
        if n
    ]
    several = (count > 1).any()
    return {
        **style(arm),
        "x": (firsts + lasts) / 2,
        "y": mean,
        "low": low if several else None,
        "high": high if several else None,
        **more,
    }, rows


_CURVE_COLUMNS = "arm first_step last_step mean lowest highest seeds"


def _arms_of(c, name):
    return [arm for arm in c.arms if arm.format == name and arm.plain]


def _csv_number(value, exact):
    """A recorded number as it is; a mean of several in 5 digits, which keeps the page small."""
    return np.float32(value) if exact else float(f"{value:.5g}")


def _lost_at(c, arm):
    return [
        (run.last_step, float(run.losses[np.isfinite(run.losses)][-1]))
        for run in c.cell(arm, c.choice(arm).rate).values()
        if run.state == LOST and np.isfinite(run.losses).any()
    ]


def _x_range(c):
    return 0, max((run.last_step for run in c.all_runs if run.ended), default=1)


# ------------------------------------------------------------------------------------------------- intervals


def gaps(c):
    """Gap of every format, a panel per treatment."""
    entries, data = {}, []
    for at_rest, optimizer, variant in c.treatments():
        rows = []
        for name in c.formats:
            arm = Arm(name, at_rest=at_rest, optimizer=optimizer, variant=variant)
            if arm in c.arms and (judged := c.gap(arm)) is not None:
                d = judged.d
                data.append([arm.label, *difference_cells(judged)])
                lost = f"{len(d.worse)} of {d.n_pairs} lost" if d.worse else ""
                look = {"label": name, "class": style(arm)["class"], "hollow": style(arm)["dashed"]}
                note = lost or f"{d.mean:+.4f}, n={d.n}: {show_class(judged)}"
                rows.append({**look, "mean": d.mean, "low": d.low, "high": d.high, "note": note})
        if rows:
            entries[at_rest, optimizer, variant] = rows
    numbers = [row[name] for rows in entries.values() for row in rows for name in ("mean", "low", "high")]
    ends = [value for value in numbers if math.isfinite(value)]
    if not ends:
        return None
    # One far outlier must not squeeze the others into a line: it is drawn as an arrow.
    high = min(max(ends), max(4 * float(np.median(np.abs(ends))), 3 * c.margin, 0.05))
    low = max(min(ends), -high)
    low, high = min(low, -1.3 * c.margin) - 0.04 * (high - low), max(high, 1.3 * c.margin) * 1.04
    panels = []
    for kind, rows in entries.items():
        rows.sort(key=lambda row: (math.isnan(row["mean"]), row["mean"]))
        panels.append(figures.intervals(treatment(*kind), rows, x_range=(low, high), margin=c.margin))
    return Figure(
        "Gap to BF16 at the end",
        "A dot is the mean over seeds, the line its 95% interval (none with one seed), uncorrected. Left of 0 is "
        "better than BF16; the grey band is the margin within which losses count as equivalent.",
        [],
        panels,
        [("gaps.csv", to_csv("arm *", data).encode())],
    )


# ---------------------------------------------------------------------------------------------------- curves


def losses(c):
    """Training loss over steps, a panel per format."""
    everything, rows = {}, []
    for arm in [a for a in c.arms if a.plain]:
        curves = [(run.steps, run.losses) for run in c.cell(arm, c.choice(arm).rate).values()]
        everything[arm], its_rows = _series(arm, curves, crosses=_lost_at(c, arm))
        rows += its_rows
    drawn = c.reference if c.reference else next(iter(everything), None)
    if drawn is None or not c.formats:
        return None
    reference = everything[drawn]
    finite = reference["y"][np.isfinite(reference["y"])]
    lows = [np.nanmin(one["y"]) for one in everything.values() if np.isfinite(one["y"]).any()]
    ends = [one["y"][np.isfinite(one["y"])][-1] for one in everything.values() if np.isfinite(one["y"]).any()]
    top = float(finite[min(len(finite) - 1, math.ceil(0.08 * len(finite)))])
    high = max(top, min(1.05 * max(ends), 1.5 * top))
    y_range = float(min(lows)) - 0.03 * (high - min(lows)), high
    panels = []
    for name in c.formats:
        series = [everything[arm] for arm in _arms_of(c, name)]
        grey = [{**reference, "class": "s-ref", "label": drawn.label, "dashed": False}] if c.reference else []
        panels.append(figures.lines(name, grey + series, x_range=_x_range(c), y_range=y_range))
    arms = [arm for arm in c.arms if arm.plain and arm.format in c.formats]
    return Figure(
        "Training loss",
        "Mean over seeds, the band from the lowest to the highest seed; lower is better. The first steps "
        "lie above the panel. A cross marks a run that was lost.",
        _legend(arms, *([("s-ref", False, "BF16")] if c.reference else [])),
        panels,
        [("losses.csv", to_csv(_CURVE_COLUMNS, rows).encode())],
    )


def gaps_over_steps(c, validation):
    """Gap to BF16 over steps, of the validation or the training loss, a panel per format."""
    if c.reference is None or not c.formats:
        return None

    def which(run):
        steps, values = (run.val_steps, run.val_losses) if validation else (run.steps, run.losses)
        return steps[steps > 0], values[steps > 0].astype(np.float64)

    everything, rows = {}, []
    for arm in [arm for arm in c.arms if arm.plain and arm.format in c.formats]:
        theirs = c.cell(c.reference, c.reference_rate(arm))
        curves = []
        for draw, run in c.cell(arm, c.choice(arm).rate).items():
            if draw in theirs:
                (s, v), (s_ref, v_ref) = which(run), which(theirs[draw])
                common, mine, its = np.intersect1d(s, s_ref, return_indices=True)
                curves.append((common, v[mine] - v_ref[its]))
        everything[arm], its_rows = _series(
            arm, curves, dots=validation, crosses=[(x, math.inf) for x, _ in _lost_at(c, arm)]
        )
        rows += its_rows
    values = np.concatenate([one["y"][len(one["y"]) // 10 :] for one in everything.values()] or [np.zeros(1)])
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    high = float(min(values.max(), max(4 * np.percentile(np.abs(values), 80), 0.05)))
    low = float(max(values.min(), -high))
    pad = 0.06 * (high - low)
    for one in everything.values():
        one["crosses"] = [(x, high) for x, _ in one["crosses"]]
    panels = [
        figures.lines(
            name,
            [everything[arm] for arm in _arms_of(c, name)],
            x_range=_x_range(c),
            y_range=(low - pad, high + pad),
            zero=True,
        )
        for name in c.formats
    ]
    what = "validation" if validation else "training"
    aid = "at every evaluation" if validation else "paired batch by batch, means of neighbouring steps"
    return Figure(
        f"Gap of the {what} loss to BF16 over steps",
        f"Paired by seed, {aid}; above the line is worse than BF16. The band goes "
        "from the lowest to the highest pair: it is no test.",
        _legend(everything),
        panels,
        [(f"gap-{what}.csv", to_csv(_CURVE_COLUMNS, rows).encode())],
    )


# --------------------------------------------------------------------------------------------------- heat maps


def representative(c, arm):
    """The run that stands for an arm in figures of one run: its first seed at its learning rate, finished if any is."""
    runs = list(c.cell(arm, c.choice(arm).rate).values())
    return next((run for run in runs if run.state != LOST), runs[0])


def _depth(layer):
    """Sorts layers as the signal passes them: embeddings, blocks, the last norm, the head."""
    block, _, name = layer.partition("/")
    if block.startswith("block_") and block[6:].isdecimal():
        return 1, int(block[6:]), BLOCK_LAYERS.index(name) if name in BLOCK_LAYERS else len(BLOCK_LAYERS), name
    return (2 if layer in ("ln_f", "norm_f", HEAD) else 0), 0, 0, layer


def short_layer(layer):
    return layer.removeprefix("block_").replace("/", " ")


def heat(c, reader, arm):
    """(panels, CSV rows) of one arm's representative: layer x step, a panel per statistic and operand."""
    history = reader.statistics(representative(c, arm))
    panels, rows = [], []
    for statistic, (words, share, *_) in HEAT.items():
        columns = layers_of(history, statistic) if history else {}
        has_operands = any(layer.endswith(tuple(f"/{operand}" for operand in OPERANDS)) for layer in columns)
        for operand in OPERANDS if has_operands else ("",):
            own = {
                layer.removesuffix(f"/{operand}") if operand else layer: column
                for layer, column in columns.items()
                if not operand or layer.endswith(f"/{operand}")
            }
            if not own:
                continue
            own = dict(sorted(own.items(), key=lambda item: _depth(item[0])))
            values = np.array(list(own.values()))
            keep = np.isfinite(values).any(0)
            if not keep.any():
                continue
            steps = history["step"][keep]
            firsts, lasts, means = binned(steps, values[:, keep])
            with np.errstate(invalid="ignore"):
                shares = share(means)
            title = f"{words}, {operand}" if operand else words
            panels.append(
                figures.heat_map(title, [int(firsts[0]), int(lasts[-1])], list(map(short_layer, own)), shares)
            )
            rows += [
                [statistic, layer, operand, int(first), int(last), _csv_number(value, first == last)]
                for layer, line in zip(own, means)
                for first, last, value in zip(firsts, lasts, line)
                if math.isfinite(value)
            ]
    return panels, rows


def heat_csv(arm, rows):
    name = "-".join(filter(None, (arm.format, arm.at_rest, arm.variant))).replace(" ", "").replace("/", "_")
    text = to_csv("statistic layer operand first_step last_step mean", rows)
    return f"heat-{name}.csv.gz", gzip.compress(text.encode(), mtime=0)


# --------------------------------------------------------------------------------------- codes, rank, speed


def code_use(c, reader):
    """Histograms of the 8-bit codes at the last diagnosis, over all layers: a panel per format and operand."""
    panels, rows = [], []
    # In the order of the numbers: negative codes have the highest bit set, and code 0 is zero.
    order = np.concatenate([np.arange(255, 128, -1), np.arange(128)])
    signed_codes = np.concatenate([np.arange(-127, 0), np.arange(128)])
    for name in c.formats:
        arm = Arm(name, at_rest=c.primary[0], optimizer=c.primary[1])
        if arm not in c.arms:
            continue
        step, histograms = reader.codes(representative(c, arm))
        for operand in OPERANDS:
            counts = [h for (_, o), (fmt, h) in histograms.items() if o == operand and fmt == name and len(h) == 256]
            if not counts:
                continue
            total = np.sum(counts, axis=0)[order]
            used = np.flatnonzero(total)
            reach = max(abs(int(signed_codes[used[0]])), abs(int(signed_codes[used[-1]])), 1) if used.size else 127
            inside = np.abs(signed_codes) <= reach
            share = total / max(1, total.sum())
            entropy = -np.sum(share[share > 0] * np.log2(share[share > 0]))
            panels.append(
                figures.bars(
                    f"{name}, {operand}",
                    signed_codes[inside],
                    total[inside],
                    x_label="code, with its sign",
                    note=f"{used.size} codes, {entropy:.2f} bits, step {step}",
                )
            )
            rows += [[name, operand, step, int(code), int(n)] for code, n in zip(signed_codes, total)]
    if not panels:
        return None
    return Figure(
        "Use of the codes",
        "How often each code occurs, all layers together, on a logarithmic scale. A peak at 0 is flushed "
        "values, peaks at the ends are clipped ones, gaps are codes the format has for nothing.",
        [],
        panels,
        [("codes.csv", to_csv("format operand step code count", rows).encode())],
    )


def rank_health(c, reader):
    """Stable rank and participation ratio as shares of BF16's, a panel per format."""
    if c.reference is None:
        return None
    panels, rows = [], []
    theirs = c.cell(c.reference, c.choice(c.reference).rate)
    for name in c.formats:
        arm = Arm(name, at_rest=c.primary[0], optimizer=c.primary[1])
        if arm not in c.arms:
            continue
        run = representative(c, arm)
        other = theirs.get(run.draw) or next(iter(theirs.values()))
        mine, its = reader.statistics(run), reader.statistics(other)
        series = []
        for statistic, cls, dashed in (
            ("stable_rank", "s-float32", False),
            ("participation_ratio", "s-stochastic", True),
        ):
            ratios, steps = [], np.zeros(0, np.int64)
            for layer, column in layers_of(mine, statistic).items() if mine and its else ():
                key = f"{statistic}/{layer}"
                if key not in its:
                    continue
                common, i, j = np.intersect1d(mine["step"], its["step"], return_indices=True)
                a, b = column[i].astype(np.float64), its[key][j].astype(np.float64)
                keep = np.isfinite(a) & np.isfinite(b) & (b > 0)
                if keep.any():
                    steps = steps if ratios else common
                    ratios.append(np.where(keep, np.divide(a, b, out=np.full(a.shape, np.nan), where=keep), np.nan))
                    rows += [
                        [name, statistic, layer, int(s), float(x), float(y)]
                        for s, x, y in zip(common[keep], column[i][keep], its[key][j][keep])
                    ]
            if ratios:
                ratios = np.array(ratios)
                keep = np.isfinite(ratios).any(0)
                _, low, high, _ = _over_seeds(ratios[:, keep])
                look = {"class": cls, "dashed": dashed, "label": statistic, "dots": True}
                middle = np.nanmedian(ratios[:, keep], 0)
                series.append({**look, "x": steps[keep], "y": middle, "low": low, "high": high})
        if series:
            panels.append((name, series))
    if not panels:
        return None
    highs = [np.nanmax(one["high"]) for _, series in panels for one in series]
    lows = [np.nanmin(one["low"]) for _, series in panels for one in series]
    y_range = (max(0.0, min(lows) - 0.05), min(max(highs) + 0.05, 3.0))
    drawn = [figures.lines(name, series, x_range=_x_range(c), y_range=y_range) for name, series in panels]
    return Figure(
        "Rank of the weights, as a share of BF16's",
        "Line: median over layers; band: from the lowest to the highest layer; 1 "
        "is BF16 of the same seed at the same step. Below 1 the weights use fewer directions.",
        [("s-float32", False, "stable rank"), ("s-stochastic", True, "participation ratio")],
        drawn,
        [("rank.csv", to_csv("format statistic layer step value bf16_value", rows).encode())],
    )
