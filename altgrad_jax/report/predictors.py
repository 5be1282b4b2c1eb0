"""What goes with the gaps: numbers of the record beside the loss, over the arms."""

from dataclasses import dataclass

import numpy as np

from altgrad_jax.numerics.recipes import PRODUCTS, SLOTS
from altgrad_jax.report import statistics
from altgrad_jax.report.runs import OPERANDS, Arm

# {column of the record: what it is}, over all layers.
COLUMNS = {
    "grad_total_bias": "bias of the whole gradient",
    "grad_total_variance": "variance of the whole gradient",
    **{f"grad_bias_float32/all/{product}": f"bias of {product}" for product in PRODUCTS},
    **{f"grad_variance/all/{product}": f"variance of {product}" for product in PRODUCTS},
    "grad_persistent_bias_float32/all/wgrad": "persistent bias of wgrad",
    **{f"sqnr_db/all/{place}": f"SQNR of {place}, dB" for place in (*SLOTS, *OPERANDS)},
}


@dataclass(frozen=True)
class Predictor:
    """A column of the record beside the gap. values: {arm: its mean over the rows and runs at the arm's rate}."""

    column: str
    words: str
    values: dict[Arm, float]
    correlation: statistics.RankCorrelation


def predictors(c, reader) -> list[Predictor]:
    """Every column of COLUMNS that at least statistics.FEW arms with a gap have, and its correlation with the gaps."""
    means = {arm: _means(c, reader, arm) for arm, judged in c.gaps.items() if judged.d.n}
    found = []
    for column, words in COLUMNS.items():
        values = {arm: of[column] for arm, of in means.items() if column in of}
        gaps = [c.gaps[arm].d.mean for arm in values]
        if correlation := statistics.rank_correlation(list(values.values()), gaps):
            found.append(Predictor(column, words, values, correlation))
    return found


def _means(c, reader, arm):
    """{column: mean over the finite rows of a run, and over the runs at the arm's rate}."""
    histories = [reader.statistics(run) for run in c.cell(arm, c.choice(arm).rate).values()]
    found = {}
    for column in COLUMNS:
        rows = [history[column][np.isfinite(history[column])] for history in histories if column in history]
        means = [float(np.mean(values, dtype=np.float64)) for values in rows if values.size]
        if means:
            found[column] = float(np.mean(means))
    return found
