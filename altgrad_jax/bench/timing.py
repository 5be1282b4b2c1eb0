"""Interleaved rounds and their summaries: medians, ratios within a round, straight lines. No jax.

Machines are noisy, so a figure alone means little. Everything that is compared is timed once per round, in an order
drawn anew for each round, and a ratio is taken between timings of *one* round; what is reported is the median over
rounds and the quartiles. The probes of the device (product, copy) are rows of the same rounds, so a slow round
slows the limit as it slows the step. Compilation and the first dispatch are timed apart and are in no ratio.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


class Unavailable(Exception):
    """A row that cannot be measured here; the text says why, in one line."""


@dataclass
class Entry:
    """One row to be timed.

    Attributes:
      run: makes `steps` training steps (or whatever a row is made of) and waits for them; returns the seconds they
        took, or None to have the call itself timed.
      prepare: called once before the first timing, outside it: what needs the device's memory.
      rest: called after every timing, outside it: waits for what still works in the background.
      facts: what else the row reports; `compile_s` among it.
      seconds: every timing, seconds a step, in the order of the rounds.
    """

    name: str
    run: Callable[[], float | None]
    steps: int = 1
    prepare: Callable[[], None] = lambda: None
    rest: Callable[[], None] = lambda: None
    facts: dict = field(default_factory=dict)
    seconds: list = field(default_factory=list)


def _once(entry, clock):
    started = clock()
    seconds = entry.run()
    seconds = clock() - started if seconds is None else seconds
    entry.rest()
    return seconds


def warm_up(entries, *, say, clock=time.perf_counter):
    """A first dispatch of each entry; its time goes to facts["first_dispatch_s"]. Returns as time_rounds."""
    able, skipped = [], []
    for entry in entries:
        try:
            entry.prepare()
            entry.facts["first_dispatch_s"] = _once(entry, clock)
            able.append(entry)
        except Unavailable as reason:
            skipped.append((entry.name, str(reason)))
            say(f"{entry.name}: left out, {reason}")
    return able, skipped


def fit_to_budget(entries, rounds, seconds_left, *, keep=2):
    """How many rounds of which entries fit into `seconds_left` (None: no limit), by their first dispatches.

    Entries go from the end, never the first `keep`, until at least one round fits.

    Returns:
      (entries, rounds, names of the entries that were dropped).
    """
    if seconds_left is None:
        return entries, rounds, []
    kept = list(entries)

    def round_s():
        return sum(entry.facts["first_dispatch_s"] for entry in kept)

    while len(kept) > keep and round_s() > seconds_left:
        kept.pop()
    return kept, max(1, min(rounds, int(seconds_left / max(round_s(), 1e-9)))), [e.name for e in entries[len(kept) :]]


def time_rounds(entries, rounds, *, say, clock=time.perf_counter, seed=0):
    """Times every entry once per round, each round in another order; appends to their `seconds`.

    Returns:
      (entries that were timed in every round, [(name, why)] of those that could not go on).
    """
    order, able, skipped = random.Random(seed), list(entries), []
    for number in range(rounds):
        for entry in order.sample(able, len(able)):
            try:
                entry.seconds.append(_once(entry, clock) / entry.steps)
            except Unavailable as reason:
                able.remove(entry)
                skipped.append((entry.name, str(reason)))
                say(f"{entry.name}: left out, {reason}")
        say(
            f"round {number + 1} of {rounds}: "
            + ", ".join(f"{entry.name} {1e3 * entry.seconds[-1]:.4g}" for entry in able)
            + " ms"
        )
    return able, skipped


def quartiles(values):
    """(lower quartile, median, upper quartile)."""
    return tuple(np.percentile(values, [25, 50, 75]).tolist())


def ratios(own, base):
    """(lower quartile, median, upper quartile) over rounds of own / base of the same round."""
    return quartiles([a / b for a, b in zip(own, base, strict=True)])


def time_facts(seconds, base=None, baseline=None):
    """{field: value} of the timings (seconds a step) of one row.

    Args:
      base: timings of the row that `ratio` (with its quartiles) refers to. baseline: likewise of `baseline_ratio`.
    """
    low, middle, high = quartiles(seconds)
    facts = {"ms_per_step": 1e3 * middle, "ms_low": 1e3 * low, "ms_high": 1e3 * high, "rounds_s": list(seconds)}
    if base is not None:
        facts["ratio_low"], facts["ratio"], facts["ratio_high"] = ratios(seconds, base)
    if baseline is not None:
        facts["baseline_ratio"] = statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))
    return facts


def straight_line(x, y):
    """Least squares y = a + b x.

    Returns:
      {"a", "b", "r2", "residuals"}: r2 = 1 - (residual sum of squares) / (sum of squares about the mean), None where y
      does not vary; residuals y - (a + b x), in the order of x.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    (a, b), *_ = np.linalg.lstsq(np.stack([np.ones_like(x), x], 1), y, rcond=None)
    residuals = y - (a + b * x)
    total = np.square(y - y.mean()).sum()
    return {
        "a": float(a),
        "b": float(b),
        "r2": float(1 - np.square(residuals).sum() / total) if total else None,
        "residuals": residuals.tolist(),
    }
