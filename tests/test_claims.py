"""Published claims: which arms they compare, and what a verdict says."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from altgrad_jax.numerics.recipes import get_recipe
from altgrad_jax.report import statistics
from altgrad_jax.report.claims import CLAIMS, Claim, findings
from altgrad_jax.report.runs import Arm

MARGIN = 0.02
SCATTER = np.array([-1.0, 0.6, -0.2, 0.9, -0.7, 0.1, 0.4, -0.1]) / 1000


class Runs:
    """What a claim asks of a Comparison: {recipe: mean loss} with 8 draws each."""

    margin = MARGIN

    def __init__(self, losses):
        draws = [(seed, seed) for seed in range(8)]
        cells = {name: dict(zip(draws, loss + i * SCATTER)) for i, (name, loss) in enumerate(losses.items(), 1)}
        self.cells = {Arm(f"recipe {name}"): cell for name, cell in cells.items()}
        self.arms = list(self.cells)

    def choice(self, arm):
        return SimpleNamespace(rate=1e-3)

    def difference(self, first, second):
        return statistics.paired(self.cells[first[0]], self.cells[second[0]])


def found(**losses):
    return {one.claim.words: one for one in findings(Runs({name.replace("__", ":"): x for name, x in losses.items()}))}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.words)
def test_every_claim_names_two_recipes(claim):
    assert claim.higher != claim.lower
    for name in (claim.higher, claim.lower):
        get_recipe(name)


@pytest.mark.parametrize(
    ("floor", "verdict"),
    [
        (2.3, "supported"),
        (2.005, "supported, within 0.02"),
        (2.00001, "equivalent within 0.02"),
        (1.995, "contradicted, within 0.02"),
        (1.7, "contradicted"),
    ],
)
def test_a_verdict_follows_the_test(floor, verdict):
    """The difference scatters by less than 0.001, so that 0.005 is separated from 0, and 1e-5 is not."""
    (one,) = found(mxfp8=2.0, mxfp8_floor=floor).values()
    assert one.verdict == verdict
    assert one.judged.d.mean == pytest.approx(floor - 2.0, abs=1e-12) and one.judged.d.n == 8
    assert (one.higher.format, one.lower.format) == ("recipe mxfp8_floor", "recipe mxfp8")


def test_wide_scatter_is_inconclusive():
    runs = Runs({"mxfp8": 2.0, "mxfp8_floor": 2.01})
    (cell,) = [cell for arm, cell in runs.cells.items() if arm.format == "recipe mxfp8_floor"]
    cell |= {draw: loss + 0.2 * (-1) ** draw[0] for draw, loss in cell.items()}
    assert [one.verdict for one in findings(runs)] == ["inconclusive"]


def test_lost_runs_support_that_a_recipe_costs_more():
    runs = Runs({"mxfp8": 2.0, "mxfp8_floor": 2.0})
    (cell,) = [cell for arm, cell in runs.cells.items() if arm.format == "recipe mxfp8_floor"]
    cell |= dict.fromkeys(list(cell)[:7], math.inf)
    assert [one.verdict for one in findings(runs)] == ["supported"]


def test_both_arms_keep_the_same_layers():
    names = ["nvfp4", "nvfp4_headroom~head", "nvfp4_w1x16", "ufp4", "ufp4_no_rht~head"]
    pairs = {(one.higher.format, one.lower.format) for one in findings(Runs(dict.fromkeys(names, 2.0)))}
    assert pairs == {("recipe nvfp4", "recipe nvfp4_w1x16")}
    more = findings(Runs(dict.fromkeys([*names, "nvfp4~head"], 2.0)))
    assert {(one.higher.format, one.lower.format) for one in more} - pairs == {
        ("recipe nvfp4~head", "recipe nvfp4"),
        ("recipe nvfp4~head", "recipe nvfp4_headroom~head"),
    }


def test_claims_are_corrected_together(monkeypatch):
    """The same difference is separated as the only claim, and not as the most doubtful one of many."""
    monkeypatch.setattr("altgrad_jax.report.claims.CLAIMS", (Claim("a", "", "mxfp8_floor", "mxfp8"),))
    runs = Runs({"mxfp8": 2.0, "mxfp8_floor": 2.0009})
    for arm, cell in runs.cells.items():
        if arm.format == "recipe mxfp8_floor":
            cell |= {draw: loss + 1e-3 * (-1) ** draw[0] for draw, loss in cell.items()}
    (alone,) = findings(runs)
    monkeypatch.setattr(
        "altgrad_jax.report.claims.CLAIMS", tuple(Claim(str(i), "", "mxfp8_floor", "mxfp8") for i in range(9))
    )
    assert alone.verdict == "supported, within 0.02"
    assert {one.verdict for one in findings(runs)} == {"equivalent within 0.02"}
