"""What is looked at between two dispatches: the validation loss, the rank of the weights, the use of the formats."""

import jax
import numpy as np

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError
from altgrad_jax.numerics import rules, whatif
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.run.record import TIMING_KEYS
from altgrad_jax.run.setup import Setup
from altgrad_jax.run.wandb import matching
from altgrad_jax.run.writer import ALERT, ALERT_VALUE
from altgrad_jax.step import certify
from altgrad_jax.step.program import Observed
from altgrad_jax.step.quantization import QuantOptions
from altgrad_jax.step.update import SPARSE


def evaluation_of(loss: float) -> dict[str, float]:
    """The metrics of an evaluation from its mean loss in nats per token."""
    with np.errstate(over="ignore"):
        return {"val_loss": float(loss), "val_perplexity": float(np.exp(np.float32(loss)))}


def diagnosis(quant: QuantOptions, level: int, step: int, observed: Observed) -> tuple[dict[str, float], list[dict]]:
    """({metric: value}, lines for diagnostics.jsonl) of one run's histograms, under the format in use at this level."""
    found, lines = {}, []
    for q, layer in enumerate(quant.layers):
        for i, (operand, name) in enumerate(zip(rules.OPERANDS, layer.wag)):
            if name:
                in_use = quant.emergency_formats[level - 1] if level else name
                codes, magnitudes, scale, amax = (array_Q3[q, i] for array_Q3 in observed)
                row, use = whatif.operand_row(codes, magnitudes, scale, amax, get_format(in_use))
                lines.append({"step": step, "layer": layer.layer, "operand": operand} | row)
                found |= {f"{key}/{layer.layer}/{operand}": value for key, value in use.items()}
    return found, lines


def row_names(setup: Setup) -> list[str]:
    """Every name that a row of the record may have, those of its timing included."""
    functions, step = setup.functions, setup.functions.step
    columns = [name for name in functions.metric_names if not name.startswith((ALERT, ALERT_VALUE))]
    names = [name.removeprefix(SPARSE) for name in columns]
    windows = jax.ShapeDtypeStruct((step.eval_batch_size, step.plain.block_size + 1), np.uint16)
    state, ranks, observed = functions.abstract_state, {}, None
    if setup.config.diagnostic_interval:
        given = state.params, windows, state.quant, functions.inputs.formats
        ranks, observed = jax.eval_shape(functions.diagnose, *given)
    if observed is not None and step.quant is not None:
        nothing = jax.tree.map(lambda array: np.zeros(array.shape), observed)
        names += diagnosis(step.quant, 0, 0, nothing)[0]
    if functions.certify is not None:
        names += certify.metric_names(step)
    return [*names, "val_loss", "val_perplexity", *ranks, *TIMING_KEYS]


def require_wandb_keys(patterns: tuple[str, ...], setup: Setup) -> None:
    """UserError unless each of these patterns matches a name that the program's rows have."""
    names = row_names(setup) if patterns else []
    for pattern in patterns:
        if not matching(names, [pattern]):
            sections = {f"{name.partition('/')[0]}/*" for name in names if "/" in name}
            guess = settings.nearest(pattern, {*names, *sections})
            hint = f"did you mean {guess}?" if guess else "the keys of metrics.jsonl are their names"
            raise UserError(
                f"wandb_keys={pattern} matches no metric of this run: give names or patterns such as loss "
                f"or grad_norm/*; {hint}"
            )
