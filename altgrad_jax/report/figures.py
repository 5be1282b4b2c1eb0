"""The report's figures as Vega-Lite charts (Altair): which numbers each shows, and how. The numbers are its CSV too."""

import itertools
import math
from dataclasses import dataclass

import altair as alt
import numpy as np

from altgrad_jax.numerics.layers import BLOCK_LAYERS, HEAD
from altgrad_jax.numerics.recipes import PRODUCTS, SLOTS
from altgrad_jax.report.analysis import ADAMW, layers_of
from altgrad_jax.report.runs import LOST, OPERANDS, REFERENCE, Arm
from altgrad_jax.report.statistics import BETTER, CONFIDENCE, EQUIVALENT, INCONCLUSIVE, WORSE
from altgrad_jax.report.tables import flat, format_name, show_class, show_difference, to_csv, treatment

PICTURE_WIDTH = 560  # of a figure outside of the page, in CSS pixels without its labels
POINTS = 100  # of a curve, at most; columns of a heat map
OWN = "its own best"
NUMBER = int | float | np.number
# Colours that stay apart for the colour-blind (Okabe & Ito 2008), and that stand out from white and from black.
CLASSES = {WORSE: "#d55e00", INCONCLUSIVE: "#8b949e", EQUIVALENT: "#2f8fd0", BETTER: "#009e73"}
SERIES = ["#2f8fd0", "#d55e00", "#009e73", "#b3599a", "#e69f00", "#56b4e9", "#8a7a00", "#8b949e", "#c0392b", "#6a5acd"]

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
    "grad_bias_float32": ("bias", lambda v: (np.log10(np.maximum(v, 1e-6)) + 6) / 6, "1e-6 or less", "1"),
    "grad_variance": ("variance", lambda v: (np.log10(np.maximum(v, 1e-6)) + 6) / 6, "1e-6 or less", "1"),
}
# What a statistic of a layer may be of: an operand, a slot or a product.
PLACES = frozenset((*OPERANDS, *SLOTS, *PRODUCTS))


@dataclass(frozen=True)
class Figure:
    """A chart under a heading. rows: [{column: value}], its numbers. aid: one line that says how to read it."""

    name: str
    title: str
    aid: str
    rows: list
    chart: alt.LayerChart | alt.FacetChart

    @property
    def data(self):
        """(file name, CSV text) of the numbers."""
        return f"{self.name}.csv", to_csv(self.rows)

    @property
    def spec(self):
        """The Vega-Lite specification. Its data is the CSV, which the page puts in."""
        numbers = {name for row in flat(self.rows) for name, value in row.items() if isinstance(value, NUMBER)}
        parse = dict.fromkeys(sorted(numbers), "number")
        return self.chart.to_dict() | {"data": {"format": {"type": "csv", "parse": parse}}}

    @property
    def standalone(self):
        """The Vega-Lite specification with its data, on white and as wide as a picture."""
        rows = [{name: value for name, value in row.items() if value is not None} for row in flat(self.rows)]
        return self.chart.to_dict() | {"data": {"values": rows}, "width": PICTURE_WIDTH, "background": "white"}


# ------------------------------------------------------------------------------------------------ parts of charts


def _choice(name, label, options, default=None):
    """A menu that keeps the rows whose `name` is the option chosen."""
    options = list(dict.fromkeys(options))
    menu = alt.binding_select(options=options, name=f"{label} ")
    return alt.param(name=f"choose_{name}", bind=menu, value=default if default in options else options[0])


def _kept(chart, *choices):
    """The chart with the rows that all choices keep."""
    for choice in choices:
        chart = chart.transform_filter(f"datum.{choice.name.removeprefix('choose_')} == {choice.name}")
    return chart


def _page(layers, *params, height):
    """Layers as one chart as wide as its place, over the figure's own data."""
    chart = alt.layer(*layers, data=alt.NamedData(name="rows")).add_params(*params)
    return chart.properties(
        width="container", height=height, autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
    )


def _zoom(*encodings):
    """Drag to move, Alt and the wheel to zoom, so that a page can be scrolled over a chart; double click: as it was."""
    return alt.selection_interval(bind="scales", encodings=list(encodings), zoom="wheel![event.altKey]")


def _toggle(field):
    """(selection, opacity): a click in the legend keeps that entry and fades the others, the next one undoes it."""
    chosen = alt.selection_point(name="legend", fields=[field], bind="legend", toggle="true")
    return chosen, alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.08))


# ------------------------------------------------------------------------------------------------------ intervals


def gaps(c):
    """The forest plot: every gap with its interval and class, at each arm's own rate or at one rate."""
    found = [(arm, OWN, c.choice(arm).rate, judged) for arm, judged in c.gaps.items()]
    found += [(arm, f"{rate:g} for all", rate, judged) for (arm, rate), judged in c.rate_gaps.items()]
    rows = []
    for arm, at, rate, judged in found:
        spread = c.spreads.get(arm) if at == OWN else None
        how, words = treatment(arm.at_rest, arm.optimizer, arm.variant), show_difference(judged)
        row = {"format": format_name(c, arm.format), "treatment": how, "rate": at, "learning_rate": rate, "gap": judged}
        row |= {"all_low": spread.low if spread else None, "all_high": spread.high if spread else None}
        rows.append(row | {"note": "" if judged.d.n else words, "words": words, "verdict": show_class(judged)})
    ends = [x for row in rows for x in (row["gap"].d.mean, row["gap"].d.low, row["gap"].d.high) if math.isfinite(x)]
    if not rows:
        return None
    # One far outlier must not squeeze the others into a line: it is an arrow at the edge, with its number.
    high = min(max(ends, default=0), max(6 * float(np.median(np.abs(ends or [0]))), 3 * c.margin, 0.05))
    low = min(max(min(ends, default=0), -high), -1.3 * c.margin)
    domain = [low - 0.04 * (high - low), max(high, 1.3 * c.margin) * 1.04]
    how = _choice("treatment", "treatment", (row["treatment"] for row in rows), treatment(*c.primary))
    at = _choice("rate", "learning rate", (row["rate"] for row in rows), OWN)
    chosen, opacity = _toggle("class")
    order = list(dict.fromkeys(format_name(c, arm.format) for arm in [*c.ranked, *c.gaps]))
    x_axis = alt.X("gap_mean:Q").scale(domain=domain, nice=False).title("gap to BF16, nats per token")
    y_axis = alt.Y("format:N").sort(order).title(None).axis(labelLimit=150)
    colour = alt.Color("class:N").scale(domain=list(CLASSES), range=list(CLASSES.values()))
    colour = colour.legend(orient="top", title=None, columns=2, symbolOpacity=1)
    tips = [("format:N", "format"), ("treatment:N", "treatment"), ("learning_rate:Q", "learning rate")]
    tips += [("words:N", "gap"), ("verdict:N", "it is")]
    tips = [alt.Tooltip(field, title=title) for field, title in tips]
    rows_kept = _kept(alt.Chart().encode(y=y_axis, color=colour, opacity=opacity, tooltip=tips), how, at)
    beyond = alt.OpacityValue(alt.ExprRef("datum.gap_mean > domain('x')[1] ? 1 : 0"))
    place = alt.Chart(alt.Data(values=[{}]))
    layers = [
        place.mark_rect(opacity=0.18, color="#8b949e", clip=True).encode(
            x=alt.datum(-c.margin), x2=alt.datum(c.margin)
        ),
        place.mark_rule(color="#8b949e", clip=True).encode(x=alt.datum(0)),
        rows_kept.mark_rule(clip=True, size=1).encode(x="all_low:Q", x2="all_high:Q"),
        rows_kept.mark_rule(clip=True, size=3).encode(x="gap_low:Q", x2="gap_high:Q"),
        rows_kept.mark_circle(clip=True, size=80, opacity=1).encode(x=x_axis).add_params(_zoom("x"), chosen),
        rows_kept.transform_calculate(beyond="format(datum.gap_mean, '+.2f') + ' \u25b6'")
        .mark_text(align="right", fontSize=11)
        .encode(x=alt.value("width"), text="beyond:N", opacity=beyond),
        rows_kept.mark_text(align="left", dx=8, fontSize=11).encode(x=alt.datum(0), text="note:N"),
    ]
    return Figure(
        "gap-intervals",
        f"Gap to {REFERENCE} at the end",
        f"A dot is the mean over pairs of runs, the thick line its {CONFIDENCE:.0%} t interval (none with one pair), "
        "uncorrected, the thin line the interval over validation windows too. Left of 0 is better than BF16; the grey "
        f"band is the margin of {c.margin:g}. Click a class in the legend to see it alone; drag to move, "
        "Alt + wheel to zoom.",
        rows,
        _page(layers, how, at, height=alt.Step(22)),
    )


# ------------------------------------------------------------------------------------------------- precision maps

MAP_KINDS = {"map": "#2f8fd0", "rule of thumb": "#d55e00", "random map": "#8b949e", "one part of the recipe": "#009e73"}
_LOWEST, _HIGHEST = -0.75, 1.75  # of the share of the gap that is drawn; intervals end there


def map_curve(recipe: str, trained: list[dict]) -> Figure:
    """What maps of a recipe closed of the loss gap over what they cost: points, and Fieller's intervals.

    Args:
      trained: rows of map_trainings.results; None for an end of an interval that has none.
    """
    rows = []
    for row in sorted(trained, key=lambda row: (row["cost"], row["what"])):
        what, kind = row["what"], _map_kind(row["what"])
        if kind is None or row["closed"] is None:
            continue
        # Maps of one cost stand beside one another.
        at = row["cost"] + 0.012 * sum(abs(other["cost"] - row["cost"]) < 0.005 for other in rows)
        ends = [end if value is None else value for value, end in ((row["low"], _LOWEST), (row["high"], _HIGHEST))]
        label = {"map": "", "one part of the recipe": what}.get(kind, what)
        rows.append({"what": what, "kind": kind, "label": label, "cost": row["cost"], "at": at,
                     "closed": row["closed"], "low": ends[0], "high": ends[1]})  # fmt: skip
    y = alt.Y("closed:Q").scale(domain=[_LOWEST, _HIGHEST], clamp=True).title("share of the loss gap closed")
    x = alt.X("at:Q").scale(domain=[0, max(row["at"] for row in rows) + 0.12], nice=False).axis(format="%")
    x = x.title("share of the blocks' multiplications in bfloat16")
    colour = alt.Color("kind:N").scale(domain=list(MAP_KINDS), range=list(MAP_KINDS.values())).legend(orient="top")
    points = alt.Chart().encode(x=x, y=y, color=colour.title(None))
    maps = points.transform_filter("datum.kind == 'map'")
    layers = [
        *(alt.Chart(alt.Data(values=[{}])).mark_rule(color="#8b949e").encode(y=alt.datum(at)) for at in (0, 1)),
        points.mark_rule(clip=True).encode(y="low:Q", y2="high:Q"),
        maps.mark_line(),
        points.mark_circle(size=70, opacity=1),
        points.mark_text(align="left", dx=6, dy=-6, fontSize=11).encode(text="label:N"),
    ]
    aid = f"A dot is the ratio of means over pairs of runs, the line its {CONFIDENCE:.0%} interval, uncorrected."
    return Figure("map", f"What maps of {recipe} close", aid, rows, _page(layers, height=360))


def _map_kind(what):
    """Of MAP_KINDS; None: not drawn."""
    if what.startswith("only "):
        return "one part of the recipe"
    if what.startswith("random "):
        return "random map"
    if what in ("last 15%", "first and last"):
        return "rule of thumb"
    return "map" if what.startswith("map ") else None


# --------------------------------------------------------------------------------------------------------- curves


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


def _curve_rows(c, arm, curves):
    """Rows of the mean, lowest and highest of an arm's curves (steps, values), and of where its runs were lost."""
    ends = [run.last_step for run in c.cell(arm, c.choice(arm).rate).values() if run.state == LOST]
    rows = []
    for first, last, *values in zip(*(part.T for part in binned(*_matrix(curves)))):
        found = values[0][np.isfinite(values[0])]
        if found.size:
            row = {
                "format": format_name(c, arm.format),
                "treatment": ", ".join(arm.treatment_parts) or "float32 master",
            }
            row |= {"first_step": int(first), "last_step": int(last)}
            numbers = {"mean": found.mean(), "lowest": found.min(), "highest": found.max()}
            row |= {name: float(f"{value:.9g}") for name, value in numbers.items()}
            rows.append(row | {"seeds": found.size, "lost": sum(first <= end <= last for end in ends)})
    return rows


def _domain(values, steps):
    """Of the y axis: what most of a curve's values after the first tenth of its steps take, without far ones."""
    values = np.asarray(values)[np.asarray(steps) > 0.1 * max(steps)]
    middle = float(np.median(values))
    reach = 4 * float(np.percentile(np.abs(values - middle), 80)) + 0.05
    low, high = max(values.min(), middle - reach), min(values.max(), middle + reach)
    return [low - 0.05 * (high - low), high + 0.05 * (high - low)]


def _lines(name, title, aid, rows, y_title, middle="mean", menu="treatment", default=None):
    """A Figure of lines over steps with bands and lost runs, a colour a format; None without rows.

    middle: the column that is the line. menu: the column of which one value is shown at a time, and BF16 always.
    """
    if not rows:
        return None
    how, (chosen, opacity) = _choice(menu, menu, (row[menu] for row in rows), default), _toggle("format")
    chart = alt.Chart().transform_filter(f"datum.{menu} == {how.name} || datum.format == '{REFERENCE}'")
    chart = chart.transform_calculate(step="(datum.first_step + datum.last_step) / 2")
    colour = alt.Color("format:N").legend(orient="top", title=None, columns=4, symbolOpacity=1)
    x_axis = alt.X("step:Q").title("step").scale(domain=[0, max(row["last_step"] for row in rows)])
    shown = alt.Scale(domain=_domain([row[middle] for row in rows], [row["last_step"] for row in rows]), nice=False)
    tips = [alt.Tooltip(key, type="nominal" if isinstance(rows[0][key], str) else "quantitative") for key in rows[0]]
    chart = chart.encode(x=x_axis, color=colour.scale(_palette(rows)), tooltip=tips)
    chart = chart.encode(y=alt.Y(middle, type="quantitative", scale=shown).title(y_title))
    band = alt.when(chosen).then(alt.value(0.13)).otherwise(alt.value(0))
    layers = [
        chart.mark_area(clip=True).encode(alt.Y("lowest:Q", scale=shown), y2="highest:Q", opacity=band),
        chart.mark_line(clip=True, size=2).encode(opacity=opacity).add_params(_zoom("x", "y"), chosen),
        chart.mark_circle(clip=True, size=90, opacity=0),
        chart.transform_filter("datum.lost > 0").mark_point(shape="cross", clip=True, size=60).encode(opacity=opacity),
    ]
    return Figure(name, title, f"{aid} {_HOW}", rows, _page(layers, how, height=300))


def _palette(rows):
    """A colour for each format, grey for BF16."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    colours = itertools.cycle(SERIES)
    return alt.Scale(domain=formats, range=["#8b949e" if name == REFERENCE else next(colours) for name in formats])


_HOW = "Click a format in the legend to see it alone; drag to move, Alt + wheel to zoom."


def gaps_over_steps(c, validation):
    """Paired difference to BF16 over steps: of the validation losses, or of the training losses."""

    def curve(run):
        steps, values = (run.val_steps, run.val_losses) if validation else (run.steps, run.losses)
        return steps[steps > 0], values[steps > 0].astype(np.float64)

    rows = []
    for arm in [arm for arm in c.arms if c.reference and arm.plain and arm.format in c.formats]:
        theirs, curves = c.cell(c.reference, c.reference_rate(arm)), []
        for draw, run in c.cell(arm, c.choice(arm).rate).items():
            if draw in theirs:
                (s, v), (s_ref, v_ref) = curve(run), curve(theirs[draw])
                common, mine, its = np.intersect1d(s, s_ref, return_indices=True)
                curves.append((common, v[mine] - v_ref[its]))
        rows += _curve_rows(c, arm, curves)
    what = "validation" if validation else "training"
    paired = "at every evaluation" if validation else "batch by batch, means of neighbouring steps"
    aid = (
        f"Paired by seed, {paired}; above 0 is worse. The band goes from the lowest to the highest pair: it is no test."
    )
    title = f"Gap of the {what} loss to {REFERENCE} over steps"
    y_title, default = f"gap to {REFERENCE}, nats per token", treatment(*c.primary)
    return _lines(f"gap-{what}", title, aid, rows, y_title, default=default)


def losses(c):
    """Training loss over steps."""
    rows = []
    for arm in [arm for arm in c.arms if c.formats and arm.plain]:
        rows += _curve_rows(c, arm, [(r.steps, r.losses) for r in c.cell(arm, c.choice(arm).rate).values()])
    aid = "Mean over seeds, the band from the lowest to the highest seed; lower is better. A cross marks a lost run."
    default = treatment(*c.primary)
    return _lines("losses", "Training loss", aid, rows, "training loss, nats per token", default=default)


# ------------------------------------------------------------------------------------------------------ heat maps


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


def _heat_rows(history, arm):
    """Rows of one arm's map: a mean for each statistic, operand, layer and bin of steps."""
    for statistic, (words, share, *_) in HEAT.items():
        columns = layers_of(history, statistic) if history else {}
        keep = np.isfinite(list(columns.values())).any(0) if columns else np.zeros(0, bool)
        if not keep.any():
            continue
        firsts, lasts, means = binned(history["step"][keep], np.array(list(columns.values()))[:, keep])
        ends = np.append(firsts[1:], lasts[-1] + 1)
        with np.errstate(invalid="ignore"):
            shares = np.clip(share(means), 0, 1)
        for key, values, badness in zip(columns, means, shares):
            layer, _, operand = key.rpartition("/")
            if operand not in PLACES:
                layer, operand = key, ""
            row = {"arm": arm.label, "what": f"{words}, {operand}" if operand else words}
            row |= {"statistic": statistic, "layer": layer}
            for first, last, end, value, bad in zip(firsts, lasts, ends, values, badness):
                if math.isfinite(value):
                    mean = np.float32(value) if first == last else float(f"{value:.5g}")
                    steps = {"first_step": int(first), "last_step": int(last), "until": int(end)}
                    yield {**row, "operand": operand, **steps, "mean": mean, "badness": float(f"{bad:.3g}")}


def heat(c, reader):
    """Layer by step, one run for each whole format with AdamW, the primary treatment of each first."""
    arms = [arm for arm in c.arms if arm.plain and arm.format in c.formats and arm.optimizer == ADAMW]
    arms.sort(key=lambda arm: (arm.at_rest, arm.optimizer) != c.primary)
    rows = [row for arm in arms for row in _heat_rows(reader.statistics(representative(c, arm)), arm)]
    if not rows:
        return None
    of_arm = _choice("arm", "arm", (row["arm"] for row in rows))
    what = _choice("what", "statistic", (row["what"] for row in rows))
    layers = sorted({row["layer"] for row in rows}, key=_depth)
    colour = alt.Color("badness:Q").scale(scheme="viridis", domain=[0, 1])
    tips = ["layer:N", "what:N", "first_step:Q", "last_step:Q", "mean:Q"]
    chart = (
        _kept(alt.Chart(), of_arm, what)
        .mark_rect(clip=True)
        .encode(
            x=alt.X("first_step:Q").title("step").scale(zero=False, nice=False),
            x2="until:Q",
            y=alt.Y("layer:N").sort(layers).title(None).axis(labelLimit=120),
            tooltip=tips,
            color=colour.legend(orient="top", title="0 fine, 1 bad", gradientLength=120),
        )
        .add_params(_zoom("x"))
    )
    ends = "; ".join(f"{words}: {low} to {high}" for words, _, low, high in HEAT.values())
    return Figure(
        "heat",
        "Where and when: layer by step",
        "One run for each arm; yellow is bad, dark is fine, empty is not measured or not applicable. Overflow is "
        f"absent where the scale comes from the tensor's own amax. From 0 to 1: {ends}.",
        rows,
        _page([chart], of_arm, what, height=alt.Step(14)),
    )


# ------------------------------------------------------------------------------------------------- codes and rank


def _primary_runs(c):
    """(format, representative run) of every format in the primary treatment."""
    for name in c.formats:
        arm = Arm(name, at_rest=c.primary[0], optimizer=c.primary[1])
        if arm in c.arms:
            yield name, representative(c, arm)


def code_use(c, reader):
    """Histograms of the 8-bit codes at the last diagnosis, over all layers, by format and operand."""
    rows = []
    # In the order of the numbers: negative codes have the highest bit set, and code 0 is zero.
    order = np.concatenate([np.arange(255, 128, -1), np.arange(128)])
    codes = np.concatenate([np.arange(-127, 0), np.arange(128)])
    for name, run in _primary_runs(c):
        step, histograms = reader.codes(run)
        for operand in OPERANDS:
            counts = [h for (_, o), (fmt, h) in histograms.items() if o == operand and fmt == name and len(h) == 256]
            if counts:
                total = np.sum(counts, axis=0)[order]
                shares = total / max(1, total.sum())
                bits = -np.sum(shares[shares > 0] * np.log2(shares[shares > 0]))
                note = f"{np.count_nonzero(total)} codes, {bits:.2f} bits, step {step}"
                row = {"of": f"{name}, {operand}", "format": name, "operand": operand, "step": step}
                rows += [
                    {**row, "code": int(code), "count": int(n), "share": float(f"{share:.5g}"), "note": note}
                    for code, n, share in zip(codes, total, shares)
                ]
    if not rows:
        return None
    of = _choice("of", "format and operand", (row["of"] for row in rows))
    chart = _kept(alt.Chart(), of).transform_filter("datum.count > 0")
    y_axis = alt.Y("share:Q").scale(type="log", domain=[1e-6, 1]).title("share of the elements").axis(format="~%")
    bars = chart.mark_rule(size=2, color=SERIES[0]).encode(
        x=alt.X("code:Q").title("code, with its sign"),
        y=y_axis,
        y2=alt.datum(1e-6),
        tooltip=["code:Q", "count:Q", "share:Q"],
    )
    note = chart.transform_window(n="row_number()").transform_filter("datum.n == 1").mark_text(align="right", dy=8)
    layers = [bars.add_params(_zoom("x")), note.encode(x=alt.value("width"), y=alt.value(0), text="note:N")]
    return Figure(
        "codes",
        "Use of the codes",
        "How often each code occurs, all layers together, on a logarithmic scale. A peak at 0 is flushed values, peaks "
        "at the ends are clipped ones, gaps are codes the format has for nothing.",
        rows,
        _page(layers, of, height=220),
    )


def rank_health(c, reader):
    """Stable rank and participation ratio as shares of BF16's, by format."""
    rows = []
    theirs = c.cell(c.reference, c.choice(c.reference).rate) if c.reference else {}
    for name, run in _primary_runs(c) if theirs else ():
        mine, its = reader.statistics(run), reader.statistics(theirs.get(run.draw) or next(iter(theirs.values())))
        if not mine or not its:
            continue
        common, i, j = np.intersect1d(mine["step"], its["step"], return_indices=True)
        for statistic in ("stable_rank", "participation_ratio"):
            layers = [key for key in mine if key.startswith(f"{statistic}/") and key in its]
            with np.errstate(divide="ignore", invalid="ignore"):
                shares = np.array([mine[key][i].astype(float) / its[key][j] for key in layers])
            for step, values in zip(common, shares.T):
                found = values[np.isfinite(values)]
                if found.size:
                    row = {"format": format_name(c, name), "statistic": statistic, "layers": found.size}
                    row |= {"first_step": int(step), "last_step": int(step), "median": float(np.median(found))}
                    rows.append(row | {"lowest": found.min(), "highest": found.max(), "lost": 0})
    aid = (
        "Line: median over layers; band: from the lowest to the highest layer; 1 is BF16 of the same seed at the same "
        "step. Below 1 the weights use fewer directions."
    )
    title = f"Rank of the weights, as a share of {REFERENCE}'s"
    return _lines("rank", title, aid, rows, f"share of {REFERENCE}'s", middle="median", menu="statistic")
