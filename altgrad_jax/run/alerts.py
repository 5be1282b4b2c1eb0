"""Alerts that the host decides from recorded values, and how often alerts are shown to people. No jax.

A rule is an object with `begins(step, evaluation) -> [alert]`. `evaluation` holds what was measured between two updates
(`val_loss`, `stable_rank/layer`); an alert is {"kind": str, "layer": str | None, "value": float}. The state of a rule
follows from the recorded evaluations alone, so a resumed run, which replays them, decides as an uninterrupted one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from altgrad_jax.numerics.bias import EXHAUSTED

Alert = dict[str, Any]

# A block adds to the residual stream only what these two projections let through.
_RESIDUAL_PROJECTIONS = ("/attn_out", "/mlp_down")


class Rule(Protocol):
    """A condition on the evaluations of a run."""

    def begins(self, step: int, evaluation: Mapping[str, float]) -> list[Alert]:
        """Takes one more evaluation, in order of steps; returns the alerts that begin with it."""
        ...


class ValRising:
    """Validation loss rose `patience` evaluations in a row (0: never).

    It begins once and is re-armed by an evaluation that does not rise. A loss that is not finite is passed over: it has
    its own alerts.
    """

    def __init__(self, patience: int):
        self.patience, self.last, self.rises = patience, math.inf, 0

    def begins(self, step: int, evaluation: Mapping[str, float]) -> list[Alert]:
        """See `Rule`."""
        loss = evaluation.get("val_loss", math.nan)
        if not math.isfinite(loss):
            return []
        self.rises = self.rises + 1 if loss > self.last else 0
        self.last = loss
        if self.patience == 0 or self.rises != self.patience:
            return []
        return [{"kind": "val_rising", "layer": None, "value": loss}]


def is_bottleneck(layer: str) -> bool:
    """Whether a loss of rank in this layer cannot be made good by another.

    The product of matrices has no more rank than any of its factors. Within a block the residual projections come last,
    so the rank of all that the block can write is theirs. The table `embed` is the output head: logits lie in the space
    it spans (the softmax bottleneck, Yang et al. 2018), and the gradient of every other layer has passed through it.
    """
    return layer in ("embed", "head") or layer.endswith(_RESIDUAL_PROJECTIONS)


class RankFalling:
    """Stable rank fell below a share of its value at the first observation, per layer.

    The share is `strict_threshold`, the higher one, for the layers of `is_bottleneck`, and `threshold` for the others;
    0 never warns. The first observation of a layer is its first stable rank that is finite and above 0 (no matrix but
    zero has one below 1). NaN and infinities are passed over: such weights have their own alerts. The condition begins
    once, and is re-armed by an observation at or above the threshold. The alert's value is the share.

    Random matrices have the largest stable rank there is, and healthy training takes most of it away in its first
    steps: in a byte-level model of two blocks from 30 to 4-16 within 100 steps, in bfloat16. So observations at steps
    up to `after`, which is the warm-up's length, do not count. From there on the same kind of model fell to 0.26 of the
    first observation at most, and to 0.57 in a bottleneck, over 500 steps at a high learning rate.

    Values are compared as the float32 numbers they are, because the record holds shorter decimals of them.
    """

    def __init__(self, threshold: float, strict_threshold: float, *, after: int = -1):
        self.threshold, self.strict_threshold, self.after = threshold, strict_threshold, after
        self.first: dict[str, float] = {}
        self.fallen: set[str] = set()

    def begins(self, step: int, evaluation: Mapping[str, float]) -> list[Alert]:
        """See `Rule`."""
        begun: list[Alert] = []
        if step <= self.after:
            return begun
        for name, value in evaluation.items():
            statistic, _, layer = name.partition("/")
            value = float(np.float32(value))
            if statistic != "stable_rank" or not math.isfinite(value):
                continue
            if layer not in self.first:
                if value > 0:
                    self.first[layer] = value
                continue
            share = value / self.first[layer]
            if share >= (self.strict_threshold if is_bottleneck(layer) else self.threshold):
                self.fallen.discard(layer)
            elif layer not in self.fallen:
                self.fallen.add(layer)
                begun.append({"kind": "rank_falling", "layer": layer, "value": share})
        return begun


class FormatExhausted:
    """The gradient's signal fell below sqrt(3) times the error of quantization (bias.EXHAUSTED; arXiv 2505.19115).

    It begins once, and is re-armed by a certificate that is not below. The alert's value is signal over error.
    """

    def __init__(self):
        self.holds = False

    def begins(self, step: int, evaluation: Mapping[str, float]) -> list[Alert]:
        """See `Rule`."""
        value = evaluation.get("grad_signal_to_error", math.nan)
        if math.isnan(value):
            return []
        before, self.holds = self.holds, value < EXHAUSTED
        return [{"kind": "format_exhausted", "layer": None, "value": value}] if self.holds and not before else []


def rules_of(config: Any) -> list[Rule]:
    """The rules of a run with these settings, before its first evaluation."""
    return [
        ValRising(config.val_patience),
        RankFalling(config.rank_threshold, config.rank_threshold_strict, after=config.warmup_steps),
        FormatExhausted(),
    ]


class AlertGate:
    """What people are shown: at most one message per kind of alert every `interval` steps."""

    def __init__(self, interval: int):
        self.interval = interval
        self._last: dict[str, int] = {}
        self._held: dict[str, int] = {}

    def messages(self, step: int, alerts: Sequence[Alert]) -> list[tuple[str, str]]:
        """[(kind, text)] to show for the alerts of one row."""
        shown = []
        for kind in dict.fromkeys(alert["kind"] for alert in alerts):
            same = [alert for alert in alerts if alert["kind"] == kind]
            if kind in self._last and step - self._last[kind] < self.interval:
                self._held[kind] = self._held.get(kind, 0) + len(same)
                continue
            where = f" in {same[0]['layer']}" if same[0]["layer"] else ""
            more = f" and {len(same) - 1} more" if len(same) > 1 else ""
            held = self._held.pop(kind, 0)
            before = f" ({held} more since step {self._last[kind]})" if held else ""
            shown.append((kind, f"step {step}: {kind}{where}{more}, value {same[0]['value']:.6g}{before}"))
            self._last[kind] = step
        return shown
