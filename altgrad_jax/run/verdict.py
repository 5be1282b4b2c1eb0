"""Was the run sound? Decided from its folder alone, so it can be asked again later, on another machine.

A run is sound when it made all its steps, its loss fell, no step was non-finite, and neither `divergence` nor
`val_rising` was raised. "Fell" compares the mean loss of the first 5% of the steps with that of the last 5%
(at least one step each). Alerts of other kinds (a loss spike, a dead layer) are counted and shown, but a run
that took them and still learned is sound.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from altgrad_jax.files import write_atomically
from altgrad_jax.run import goodput
from altgrad_jax.run.console import Lasting, brief, show_duration, show_rate
from altgrad_jax.run.record import MANIFEST, METRICS, read_rows, read_timing, read_window_losses

SHARE = 0.05  # of the steps, at either end
UNSOUND_ALERTS = {"divergence": "the loss rose above where it began", "val_rising": "the validation loss kept rising"}
VERDICT = "verdict.json"
LOSS_PLOT = "loss.png"


# ---------------------------------------------------------------------------------------------------- verdict


def _is_nonfinite(row):
    """Whether the update this row describes was non-finite somewhere."""
    if any(not math.isfinite(row[key]) for key in ("loss", "grad_norm") if key in row):
        return True
    return any(value > 0 or not math.isfinite(value) for key, value in row.items() if key.startswith("nonfinite"))


def _end_means(losses):
    """Means of the finite losses of the first and last SHARE of the steps; None where there is none."""
    n = max(1, round(SHARE * len(losses)))
    means = []
    for part in (losses[:n], losses[-n:]):
        finite = [loss for loss in part if math.isfinite(loss)]
        means.append(math.fsum(finite) / len(finite) if finite else None)
    return means


def _typical_speed(timing, events):
    """Medians of (tokens_per_s, step_time_s) over the last timing of each step, without each process's first
    dispatch: it holds the compilation. (None, None) where nothing else is left."""
    starts = sorted(event["time"] for event in events if event["event"] in ("start", "resume")) or [-math.inf]
    first = {}  # start of a process -> time of its first rows
    for row in timing:
        start = max((s for s in starts if s <= row["time"]), default=starts[0])
        first.setdefault(start, row["time"])
    warm = {row["step"]: row for row in timing if row["time"] not in first.values()}

    def median(key):
        values = [row[key] for row in warm.values() if key in row]
        return statistics.median(values) if values else None

    return median("tokens_per_s"), median("step_time_s")


def _max_steps(run_dir):
    try:
        return json.loads((run_dir / MANIFEST).read_bytes())["config"]["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_verdict(run_dir: str | Path, *, max_steps: int | None = None, stopped: str | None = None) -> dict[str, Any]:
    """What the record in run_dir says about the run, as JSON-serializable facts.

    Args:
      max_steps: steps the run was to make; None: as its manifest says.
      stopped: why it ended early, in a few words ("10 non-finite steps in a row"); None: derived.

    Returns:
      dict with `verdict` ("sound ...", or "not sound: ..."), `sound`, `steps`, `max_steps`, `finished`,
      `stopped`, `loss_fell` (None: too few steps to tell), `loss_first`, `loss_last` (means of the first and
      last 5%), `initial_loss`, `final_loss`, `final_perplexity`, `nonfinite_steps`, `first_nonfinite_step`,
      `first_nonfinite_cause` (stability.locate's sentence; None if the record has none), `alerts`
      ({kind: count}), `validation` ([[step, loss]]), `best_val_loss`, `best_val_step`, `final_val_loss`,
      `final_val_perplexity`, `all_windows` ({"windows": n, "mean_loss": nats} with evaluate_all; else None),
      `checkpoints`, `anomalies` (steps), `tokens_per_s`, `step_time_s`, `goodput` (goodput.total of all starts),
      `paths`. Losses are nats per token; what is not finite is a string.
    """
    run_dir = Path(run_dir)
    max_steps = _max_steps(run_dir) if max_steps is None else max_steps
    steps, losses, validation, alerts, bad = _curves(run_dir)
    first, last = _end_means(losses)
    fell = None if len(losses) < 2 or first is None or last is None else last < first
    finished = max_steps is not None and steps >= max_steps and stopped is None
    timing, events = read_timing(run_dir)
    cause = _first_cause(events, bad)
    reasons = _reasons(steps, max_steps, finished, stopped, fell, first, last, bad, cause, alerts)
    finite_validation = [(loss, step) for step, loss in validation if math.isfinite(loss)]
    best_loss, best_step = min(finite_validation, default=(None, None))
    tokens_per_s, step_time = _typical_speed(timing, events)
    final_loss = losses[-1] if losses else None
    final_val_loss = validation[-1][1] if validation else None
    mild = {kind: n for kind, n in alerts.items() if kind not in UNSOUND_ALERTS}
    remark = f", with alerts: {_count(mild)}" if mild else ""
    found: Any = _jsonable(
        {
            "verdict": "not sound: " + "; ".join(reasons)
            if reasons
            else f"sound: {steps} steps, loss fell from {first:.4f} to {last:.4f}, every step finite{remark}",
            "sound": not reasons,
            "steps": steps,
            "max_steps": max_steps,
            "finished": finished,
            "stopped": stopped or (None if finished else "before its last step"),
            "loss_fell": fell,
            "loss_first": first,
            "loss_last": last,
            "initial_loss": losses[0] if losses else None,
            "final_loss": final_loss,
            "final_perplexity": _exp(final_loss),
            "nonfinite_steps": len(bad),
            "first_nonfinite_step": bad[0] if bad else None,
            "first_nonfinite_cause": cause,
            "alerts": alerts,
            "validation": validation,
            "best_val_loss": best_loss,
            "best_val_step": best_step,
            "final_val_loss": final_val_loss,
            "all_windows": _all_windows(run_dir, steps),
            "final_val_perplexity": _exp(final_val_loss),
            "checkpoints": _step_folders(run_dir),
            "anomalies": _step_folders(run_dir / "anomaly"),
            "tokens_per_s": tokens_per_s,
            "step_time_s": step_time,
            "goodput": goodput.total(events),
            "paths": {
                "run": str(run_dir),
                "record": str(run_dir / METRICS),
                "verdict": str(run_dir / VERDICT),
                "loss_plot": str(run_dir / LOSS_PLOT),
            },
        }
    )
    return found


def _all_windows(run_dir: Path, steps: int) -> dict[str, Any] | None:
    """How many validation windows there are and their mean loss, of window_losses.json of this step."""
    step, losses = read_window_losses(run_dir) or (-1, np.zeros(0))
    if step != steps:
        return None
    return {"windows": len(losses), "mean_loss": float(np.mean(losses, dtype=np.float64))}


def _curves(run_dir: Path) -> tuple[int, list[float], list[tuple[int, float]], dict[str, int], list[int]]:
    """(steps made, losses, (step, validation loss), {kind of alert: count}, steps that were not finite)."""
    steps, losses, validation, alerts, bad = 0, [], [], {}, []
    for row in read_rows(run_dir):
        steps = row["step"]
        if "loss" in row:
            losses.append(row["loss"])
            if _is_nonfinite(row):
                bad.append(row["step"])
        if "val_loss" in row:
            validation.append((row["step"], row["val_loss"]))
        for alert in row.get("alerts", ()):
            alerts[alert["kind"]] = alerts.get(alert["kind"], 0) + 1
    return steps, losses, validation, alerts, bad


def _first_cause(events: list[dict], bad: list[int]) -> str | None:
    """What the latest anomaly event says of the first step that was not finite."""
    causes = (
        event.get("cause")
        for event in reversed(events)
        if event["event"] == "anomaly" and event.get("first_bad_step") in bad[:1]
    )
    return next(causes, None)


def _reasons(steps, max_steps, finished, stopped, fell, first, last, bad, cause, alerts):
    reasons = []
    if not finished:
        of = "" if max_steps is None else f" of {max_steps}"
        reasons.append(f"stopped after {steps}{of} steps" + (f" ({stopped})" if stopped else ""))
    if fell is None:
        reasons.append("too few finite losses to tell whether the loss fell")
    elif not fell:
        reasons.append(f"the loss did not fall (first 5% of the steps {first:.4f}, last 5% {last:.4f})")
    if bad:
        reasons.append(
            f"{len(bad)} non-finite step{'s' if len(bad) > 1 else ''}, the first at step {bad[0]}"
            + (f" ({cause})" if cause else "")
        )
    return reasons + [text for kind, text in UNSOUND_ALERTS.items() if kind in alerts]


def _exp(loss):
    if loss is None:
        return None
    return math.exp(loss) if loss < 700 else math.inf if loss >= 700 else math.nan


def _count(alerts):
    return ", ".join(f"{kind} {n}" for kind, n in sorted(alerts.items()))


def _step_folders(folder):
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch(r"[0-9]+", path.name) and path.is_dir())


def _jsonable(value):
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def write_verdict(run_dir, verdict):
    """Write verdict.json, atomically."""
    write_atomically(
        Path(run_dir) / VERDICT, (json.dumps(verdict, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    )


# --------------------------------------------------------------------------------------------------- printing


def read_verdict(run_dir):
    """verdict.json; None where there is none that can be read: a resume, which makes no step, writes it anew."""
    try:
        found = json.loads((Path(run_dir) / VERDICT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _show(value, digits=4):
    return "-" if value is None else value if isinstance(value, str) else f"{value:.{digits}f}"


def _validation_line(validation, points=6):
    """At most `points` of the curve, evenly spread, ends included."""
    if not validation:
        return "none"
    if len(validation) > points:
        picked = sorted({round(i * (len(validation) - 1) / (points - 1)) for i in range(points)})
        validation = [validation[i] for i in picked]
    return ", ".join(f"{_show(loss, 3)} at {step}" for step, loss in validation)


def _facts(v):
    of = "" if v["max_steps"] is None else f" of {v['max_steps']}"
    fell = {True: "yes", False: "NO", None: "cannot tell"}[v["loss_fell"]]
    bad, best = "none", ""
    if v["nonfinite_steps"]:
        bad = f"{v['nonfinite_steps']}, the first at step {v['first_nonfinite_step']}"
        if v["first_nonfinite_cause"]:
            bad += f": {v['first_nonfinite_cause']}"
    if v["best_val_loss"] is not None:
        best = f"; best {_show(v['best_val_loss'])} at step {v['best_val_step']}"
    first, last = _show(v["loss_first"]), _show(v["loss_last"])
    initial, final = _show(v["initial_loss"]), _show(v["final_loss"])
    yield "steps", f"{v['steps']}{of}" + ("" if v["finished"] else f", stopped: {v['stopped']}")
    yield "loss fell", f"{fell} (first 5% of the steps {first}, last 5% {last})"
    yield "loss", f"{initial} -> {final}, perplexity {_show(v['final_perplexity'], 1)}"
    yield "validation loss", _validation_line(v["validation"]) + best
    yield "validation perplexity", _show(v["final_val_perplexity"], 1)
    if v.get("all_windows"):
        every = v["all_windows"]
        yield "all validation windows", f"loss {_show(every['mean_loss'])}, the mean of {every['windows']:,}"
    yield "non-finite steps", bad
    yield "alerts", _count(v["alerts"]) or "none"
    yield "checkpoints", ", ".join(map(str, v["checkpoints"])) or "none"
    if v["anomalies"]:
        yield "anomaly checkpoints", ", ".join(map(str, v["anomalies"]))
    if v["tokens_per_s"] is not None:
        yield "speed", f"{show_rate(v['tokens_per_s'])}, {1e3 * v['step_time_s']:.4g} ms a step (medians)"
    yield "record", v["paths"]["record"]
    for name, path in (("loss curve", v["paths"]["loss_plot"]), ("this verdict", v["paths"]["verdict"])):
        if Path(path).exists():
            yield name, path


def print_verdict(verdict, stream=None, seconds=None):
    """Print the verdict and its facts: a table on a terminal, aligned text without escape codes elsewhere.

    Args:
      verdict: from make_verdict. seconds: wall time of this process, shown if given.
    """
    facts = list(_facts(verdict))
    if seconds is not None:
        facts.append(("wall time", show_duration(seconds)))
    lasting: Any = Lasting(sys.stdout if stream is None else stream)
    console = Console(file=lasting, highlight=False)
    if console.is_terminal:
        # Long paths fold rather than being cut: they are there to be copied.
        style = "bold green" if verdict["sound"] else "bold red"
        table = Table(
            box=box.ROUNDED, show_header=False, title=Text(verdict["verdict"], style=style), title_justify="left"
        )
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in facts:
            table.add_row(name, Text(text))
        console.print(table)
        return
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {text}" for name, text in facts]
    print("\n".join(["", *lines, "", verdict["verdict"]]), file=console.file, flush=True)


# --------------------------------------------------------------------------------------------------- plotting


def _smooth(losses, window):
    """Centred moving mean over finite values; NaN where a window holds none."""
    finite = np.isfinite(losses)
    kernel = np.ones(window)
    total = np.convolve(np.where(finite, losses, 0.0), kernel)
    count = np.convolve(finite.astype(float), kernel)
    start = (window - 1) // 2
    total, count = total[start : start + len(losses)], count[start : start + len(losses)]
    return np.divide(total, count, out=np.full(len(losses), np.nan), where=count > 0)


INK, FAINT, VALIDATION, ALERT_COLOUR = "#1f4e79", "#9dbbd8", "#c8501e", "#b3261e"


def plot_loss(run_dir, title=None):
    """Draw loss.png: loss (raw, smoothed, validation), learning rate and gradient norm. Returns its path.

    Red ticks at the foot of the loss mark steps with alerts, red lines non-finite steps, grey dotted lines
    resumes.
    """
    import matplotlib.style  # takes half a second, and a run that is resumed a hundred times never draws

    with matplotlib.style.context("default", after_reset=True):  # whatever a matplotlibrc says
        return _plot_loss(Path(run_dir), title)


def try_to_plot(run_dir: Path, title: str, say: Callable[[str], None]) -> None:
    """`plot_loss` at the end of a run. A picture decides nothing about it: that it is missing is told, and no more."""
    try:
        plot_loss(run_dir, title=title)
    except Exception as error:
        say(f"warning: {LOSS_PLOT} was not drawn ({brief(error)}); the run and its record are complete")


def _plot_loss(run_dir: Path, title: str | None) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wanted = ("loss", "val_loss", "learning_rate", "grad_norm", "grad_norm_clipped")
    columns = {key: [] for key in wanted}
    steps, alerts, bad = [], [], []
    for row in read_rows(run_dir):
        steps.append(row["step"])
        for key in wanted:
            columns[key].append(row.get(key, math.nan))
        if row.get("alerts"):
            alerts.append(row["step"])
        if "loss" in row and _is_nonfinite(row):
            bad.append(row["step"])
    steps = np.array(steps)
    column = {key: np.where(np.isfinite(values), values, np.nan) for key, values in columns.items()}
    resumes = sorted({event["step"] for event in read_timing(run_dir)[1] if event["event"] == "resume"})

    # A figure of its own, not pyplot's: no global state, whatever the caller (a notebook) has open.
    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1.2))
    _draw_loss(top, steps, column, alerts, bad, resumes)
    _draw(rate, steps, column["learning_rate"], color=INK, lw=1.3)
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    rate.set_ylim(bottom=0)
    _draw_norm(norm, steps, column["grad_norm"], column["grad_norm_clipped"])
    norm.set_xlabel("step")
    norm.xaxis.get_major_locator().set_params(integer=True)
    for axis in (top, rate, norm):
        axis.grid(True, color="#e6e6e6", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8, loc="upper right")
    top.set_title(title or run_dir.resolve().name, loc="left", fontsize=11, parse_math=False)
    path = run_dir / LOSS_PLOT
    beside = run_dir / f".{LOSS_PLOT}.tmp"
    figure.savefig(beside, format="png")
    beside.replace(path)
    return path


def _draw(axis, steps, values, **style):
    """A line, and a dot where it has a single point, which a line would not show."""
    if np.isfinite(values).any():
        axis.plot(steps, values, marker="o" if np.isfinite(values).sum() == 1 else None, ms=4, **style)


def _draw_with_mean(axis, steps, values, label):
    """The values, and in front of many of them their moving mean."""
    window = max(1, int(np.isfinite(values).sum()) // 50)
    _draw(axis, steps, values, color=FAINT if window > 1 else INK, lw=0.8, label=label)
    if window > 1:
        _draw(axis, steps, _smooth(values, window), color=INK, lw=1.6, label=f"mean of {window} steps")


def _draw_norm(axis, steps, norm, clipped):
    finite = norm[np.isfinite(norm)]
    _draw_with_mean(axis, steps, norm, "gradient norm")
    # Where clipping acts, what is left of the norm is the threshold.
    acts = clipped < norm  # exactly equal where it was not
    if acts.any():
        axis.axhline(
            np.max(clipped[acts]),
            color=VALIDATION,
            lw=1.0,
            ls="--",
            label=f"clipped here ({100 * acts.sum() / len(finite):.0f}% of steps)",
        )
    axis.set_ylabel("gradient norm")
    if len(finite) and finite.min() > 0 and finite.max() > 20 * finite.min():
        axis.set_yscale("log")
        # 0.3, not 3 x 10^-1.
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")


def _draw_loss(axis, steps, column, alerts, bad, resumes):
    loss, validation = column["loss"], column["val_loss"]
    _draw_with_mean(axis, steps, loss, "training loss")
    evaluated = np.isfinite(validation)
    if evaluated.any():
        axis.plot(
            steps[evaluated],
            validation[evaluated],
            color=VALIDATION,
            lw=1.2,
            marker="o",
            ms=4,
            label=f"validation loss (last {validation[evaluated][-1]:.3f})",
        )
    if not np.isfinite(loss).any() and not evaluated.any():
        axis.text(0.5, 0.5, "no finite loss in the record", transform=axis.transAxes, ha="center", color=ALERT_COLOUR)
    for step in resumes:
        axis.axvline(step, color="#888888", lw=0.8, ls=":", label="resumed" if step == resumes[0] else None)
    # In axis coordinates, so that neither moves the limits of the loss.
    foot = axis.get_xaxis_transform()
    if bad:
        axis.vlines(
            bad, 0, 1, transform=foot, color=ALERT_COLOUR, lw=0.6, alpha=0.25, label=f"non-finite step ({len(bad)})"
        )
    if alerts:
        axis.vlines(alerts, 0, 0.04, transform=foot, color=ALERT_COLOUR, lw=1.2, label=f"alert ({len(alerts)} steps)")
    axis.set_ylabel("loss (nats per token)")
