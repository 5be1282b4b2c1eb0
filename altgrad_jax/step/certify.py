"""The certificate of a run's recipe: bias and variance of its products, and the gradient's error beside its noise.

Three kinds of passes over a few windows, at fixed weights (numerics.bias has the definitions):

products   one that hands on exact gradients, in which every layer is computed by the recipe N times, in two halves of
           the batch (certified_products)
whole      WHOLE_DRAWS as training makes them
reference  one of the float32 model for each window

Axes: Q quantized layers, S layers with parameters, F fields of packed bias.Sums.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.models.config import ModelConfig
from altgrad_jax.models.linear import Quantized
from altgrad_jax.models.model import init_params
from altgrad_jax.numerics import bias, slots
from altgrad_jax.numerics.certified_products import Certified, Draws
from altgrad_jax.numerics.layers import is_attention
from altgrad_jax.numerics.recipes import PRODUCTS
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.numerics.slot_quantization import Slot
from altgrad_jax.step import metrics, quantization, recipe, update
from altgrad_jax.step.mesh import gather
from altgrad_jax.step.update import Step

WHOLE_DRAWS = 2
# A stream of random bits beside those of a step (update).
_CERTIFICATE_STREAM = 2**27


class Certificate(NamedTuple):
    """What `certify` measures; float32 sums."""

    sums_QF: Any  # of the layers `certified_layers`
    whole: bias.WholeSums  # [S], of the layers metrics.layer_names


def certified_layers(options: recipe.RecipeOptions) -> tuple[str, ...]:
    """The layers whose products are measured: those with weights."""
    return tuple(layer for layer in options.names if not is_attention(layer))


def _certified_model(plain: ModelConfig, options: recipe.RecipeOptions, n_draws: int) -> ModelConfig:
    """The model that measures its products; those of attention follow the recipe, unmeasured."""
    features = _unmeasured(options).features
    draws = Draws(n_draws, 2, features)
    own = {group.name: features for group in recipe.groups(options, plain.segments)}
    own |= {group.name: draws for group in _certified_groups(plain, options)}
    return dataclasses.replace(plain, rules=tuple(own.items()))


def _certified_groups(plain, options):
    return tuple(group for group in recipe.groups(options, plain.segments) if not is_attention(group.name))


def _unmeasured(options: recipe.RecipeOptions) -> recipe.RecipeOptions:
    """The options without the statistics of slots."""
    return dataclasses.replace(
        options, features=tuple(dataclasses.replace(of_slot, statistics=False) for of_slot in options.features)
    )


def certify(step: Step, n_draws: int, params, windows, seed, quant_state, table) -> Certificate:
    """The certificate of these parameters, which are not stacked, on windows [E, L+1].

    Signal and noise of the gradient are taken over all windows; draws are made on the first `windows_of(step)`.

    Args:
      seed: int32, of the run; draws differ from one update to the next. quant_state, table: TrainState.quant and
        Inputs.formats.
    """
    plain, options = step.plain, step.recipe
    assert options is not None, "made for a step with a recipe"
    params = gather(params, step.mesh)
    probes = {
        group.name: jnp.zeros((len(group.rows), bias.n_fields(n_draws)), jnp.float32)
        for group in _certified_groups(plain, options)
    }
    model = _certified_model(plain, options, n_draws)
    words = stochastic_seed(seed, quant_state.number, _CERTIFICATE_STREAM)
    given = partial(_given, plain, options, recipe.slots_of_phase(table, quant_state), words)
    n_looked_at = windows_of(step)
    exact, of_batch = _reference(step.reference, params, windows, n_looked_at)

    def loss(params, probes, number):
        return update.loss(model, params, windows[:n_looked_at], None, Quantized(given(number), probes))[0]

    def add(carry, number):
        total, squares_S, measured = carry
        grads, found = jax.grad(loss, argnums=(0, 1))(params, probes, number)
        error = jax.tree.map(lambda g, r: jnp.where(number > 0, g - r, 0.0), grads, exact)
        measured = jax.tree.map(lambda old, new: jnp.where(number > 0, old, new), measured, found)
        return (jax.tree.map(jnp.add, total, error), squares_S + _by_layer(jnp.square, error), measured), None

    nothing = jax.tree.map(jnp.zeros_like, exact), jnp.zeros(len(metrics.layer_names(exact))), probes
    (total, squares_S, measured), _ = jax.lax.scan(add, nothing, jnp.arange(1 + WHOLE_DRAWS))
    whole = bias.WholeSums(
        **of_batch,
        energy=_by_layer(jnp.square, exact),
        square=squares_S / WHOLE_DRAWS,
        pairs=(_by_layer(jnp.square, total) - squares_S) / (WHOLE_DRAWS * (WHOLE_DRAWS - 1)),
    )
    groups = _certified_groups(plain, options)
    return Certificate(quantization.in_layer_order(groups, [measured[group.name] for group in groups]), whole)


def _given(plain, options, slots_Q6: Slot, words, number) -> dict[str, Any]:
    """{group: what its layers are given in pass `number`}."""
    seeds_Q2 = jnp.stack([stochastic_seed(words[0], words[1], q) for q in range(len(options.names))])
    certified = Certified(slots_Q6, seeds_Q2, jnp.broadcast_to(number, len(options.names)))
    drawn_Q6 = jax.vmap(slots.redraw)(slots_Q6, seeds_Q2 ^ number.astype(jnp.uint32))
    return {
        group.name: group.of(drawn_Q6 if is_attention(group.name) else certified)
        for group in recipe.groups(options, plain.segments)
    }


def _reference(model: ModelConfig, params, windows, n_looked_at: int) -> tuple[Any, dict[str, jax.Array]]:
    """(mean gradient of the first windows, {field of WholeSums: [S]} of their signal and noise), of a model."""

    def add(carry, item):
        window, i = item
        g = jax.grad(lambda params: update.loss(model, params, window[None], None)[0])(params)
        first, total, squares_S = carry
        first = jax.tree.map(lambda a, b: a + jnp.where(i < n_looked_at, b / n_looked_at, 0.0), first, g)
        return (first, jax.tree.map(jnp.add, total, g), squares_S + _by_layer(jnp.square, g)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    start, n = (zeros, zeros, jnp.zeros(len(metrics.layer_names(zeros)))), len(windows)
    (first, total, squares_S), _ = jax.lax.scan(add, start, (windows, jnp.arange(n)))
    signal_S = (_by_layer(jnp.square, total) - squares_S) / (n * (n - 1))
    return first, {"signal": signal_S, "noise": (squares_S / n - signal_S) / n_looked_at}


def _by_layer(function, *trees):
    """float32 [S]: sums of function(*arrays) over the arrays of each layer of trees like the parameters."""
    groups = metrics.by_group(jax.tree.map(function, *trees))
    found = jnp.stack([sum(jnp.sum(array) for array in arrays.values()) for arrays in groups.values()])
    return found[metrics.in_model_order(groups)[1]]


# ------------------------------------------------------------------------------------------------------- on the host


def biases(certificate: Certificate, options: recipe.RecipeOptions, n_draws: int) -> dict[str, bias.Bias]:
    """{layer, and `all` for all of them weighted by energy: Bias with arrays [R, P]}."""
    sums_Q = bias.unpacked(certificate.sums_QF, n_draws)
    found = {
        layer: bias.bias_of(bias.Sums(*(leaf[q] for leaf in sums_Q)), n_draws)
        for q, layer in enumerate(certified_layers(options))
    }
    return found | {"all": bias.bias_of(bias.Sums(*(leaf.sum(0) for leaf in sums_Q)), n_draws)}


def metrics_of(certificate: Certificate, step: Step) -> dict[str, float]:
    """{name: value} for the record (docs/bias.md); what does not apply is left out."""
    return {name: float(value) for name, value in _named(certificate, step).items() if not np.isnan(value)}


def metric_names(step: Step) -> list[str]:
    """Every name that `metrics_of` may give."""
    assert step.recipe is not None, "made for a step with a recipe"
    shape = len(certified_layers(step.recipe)), bias.n_fields(step.options.certify_draws)
    nothing = bias.WholeSums(*[np.zeros(len(_layers(step)))] * 5)
    return list(_named(Certificate(np.zeros(shape), nothing), step))


def _layers(step: Step) -> tuple[str, ...]:
    """The layers with parameters, in the model's order."""
    shapes = jax.eval_shape(partial(init_params, step.plain), 0)
    return metrics.layer_names(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes))


def is_exhausted(found: dict[str, float]) -> bool:
    """Whether the metrics of a certificate say that the format is exhausted."""
    return found.get("grad_signal_to_error", np.inf) < bias.EXHAUSTED


def _named(certificate: Certificate, step: Step) -> dict[str, Any]:
    assert step.recipe is not None, "made for a step with a recipe"
    found = {}
    for layer, of in biases(certificate, step.recipe, step.options.certify_draws).items():
        for p, product in enumerate(PRODUCTS):
            where = f"{layer}/{product}"
            found |= {
                f"grad_bias/{where}": of.bias[0, p],
                f"grad_bias_se/{where}": of.bias_se[0, p],
                f"grad_variance/{where}": of.variance[0, p],
                f"grad_shrinkage/{where}": of.shrinkage[0, p],
                f"grad_bias_float32/{where}": of.bias[1, p],
                f"grad_bias_float32_se/{where}": of.bias_se[1, p],
                f"grad_persistent_bias/{where}": of.persistent[0, p],
                f"grad_persistent_bias_float32/{where}": of.persistent[1, p],
            }
    share = windows_of(step) / step.options.batch_size
    layers, whole = _layers(step), certificate.whole
    for name, values in bias.whole_of(whole, share).items():
        found |= {f"{name}/{layer}": value for layer, value in zip(layers, values, strict=True)}
    return found | bias.whole_of(bias.WholeSums(*(np.sum(leaf, dtype=np.float64) for leaf in whole)), share)


def require_windows(step: Step) -> None:
    """UserError unless an evaluation's batch holds as many windows as a certificate looks at."""
    if step.eval_batch_size < windows_of(step):
        raise UserError(
            f"a certificate looks at {windows_of(step)} windows at once, and the validation data give batches of "
            f"{step.eval_batch_size}: give more validation data, or set certify_draws=0"
        )


def windows_of(step: Step) -> int:
    """Windows that a certificate looks at."""
    return 2 * step.options.certify_half
