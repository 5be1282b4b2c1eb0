"""One update of a training run, as pure functions of a `Step` and arrays.

`Step` holds every choice that is static; all else is data. `train_step` is the whole update. The functions it is made
of follow below it in the order in which it calls them; each can be called, traced and tested alone. A step is
compiled by `program`.

A step that is not finite changes nothing but counters. If the loss, a gradient or the gradient norm is not finite, or
no step can be made from an amax history, a scale or a residual, then parameters, moments and Adam's count stay as they
were and `state.step` advances. A damaged moment shows only in the update, when the step is already under way: the
damaged elements are not applied, the others are, and the step counts as non-finite.

Seeds, learning rate and number formats are data (`Inputs`), so that runs which differ in nothing else share one
compiled program. Formats come as a table (quantization.format_table), and the state carries their scales and histories.
Without formats neither exists, and the program is the baseline's. The reference is the gradient of the same parameters
on the same batch in float32 and without formats, computed beside the step's own.

Arrays of neighbouring blocks are stacked here (models.stacking), and dictionaries of layers are keyed by group, with
arrays [n, ...]: `stacked` and `unstacked` go between such a state and one in which every block has its name, as in a
checkpoint. A dispatch stacks once.

Names: `step` is the `Step`, the frozen choices; `state.step` and `number` count updates, as the column `step` of the
record does.

A column `sparse/NAME` stands for the metric NAME. It is NaN where the metric was not measured or does not apply.

Axes: B batch, L block_size, A micro-batches, S layers (of statistics: fields), Q quantized layers, E levels (1 +
emergency formats), n layers of a group.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from altgrad_jax.config import METRIC_GROUPS
from altgrad_jax.models import stacking
from altgrad_jax.models.config import ModelConfig
from altgrad_jax.models.linear import Quantized
from altgrad_jax.models.model import forward, init_params
from altgrad_jax.models.parameters import weights_of, with_weights
from altgrad_jax.models.transformer import ModelOutput
from altgrad_jax.numerics import ledger, moments, optimizers, oscillation
from altgrad_jax.numerics.cross_entropy import cross_entropy, tied_cross_entropy
from altgrad_jax.numerics.layers import HEAD, is_attention
from altgrad_jax.numerics.products import combine_statistics
from altgrad_jax.numerics.rounding import FormatParams, stochastic_seed
from altgrad_jax.step import metrics, quantization, recipe, stability
from altgrad_jax.step.mesh import FSDP, constrain, gather, over_batch, replicated, scatter, split_like_parameters
from altgrad_jax.step.recipe import RecipeOptions

SPARSE, _ALERT = "sparse/", "alert/"
# Streams of random bits beside those of the operands, which are numbered from 0.
AT_REST_STREAM, OPTIMIZER_STREAM, _MOMENTS_STREAM = 2**24, 2**25, 2**26


class TrainState(NamedTuple):
    """Everything a run is, between two steps."""

    step: jax.Array  # int32: updates attempted
    params: Any  # nested dict of float32
    opt_state: Any
    monitor: stability.Monitor
    quant: Any = None  # quantization.QuantState, with a recipe a RecipeState; None without either


class Inputs(NamedTuple):
    """What a run gives the compiled step as data."""

    seed: Any  # int32: of the dropout masks and of stochastic rounding; the initialization has its own, see init
    learning_rate: Any  # float32, the peak
    formats: Any = None  # quantization.format_table, with a recipe a RecipeTable; None without either
    data_seed: Any = np.uint32(0)  # uint32: of the order of the training windows; with data_on_device


@dataclass(frozen=True)
class StepOptions:
    """Choices of a training step; names and units as in the config.

    All are static but for the learning rate, the data seed and the names of the formats, which only enter
    `StepFunctions.inputs`.
    """

    batch_size: int
    steps_per_dispatch: int
    learning_rate: float
    max_steps: int
    warmup_steps: int
    thresholds: stability.Thresholds
    grad_accum_steps: int = 1
    schedule: str = "constant"
    min_lr_ratio: float = 0.1
    decay_steps: int = 1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    moments: str = "float32"
    moments_rounding: str = "nearest"
    grad_clip: float = 1.0
    data_seed: int = 0
    metric_groups: tuple[str, ...] = METRIC_GROUPS
    data_on_device: bool = True  # False: the host brings the batches of each dispatch
    optimizer: str = "adamw"
    quant: quantization.QuantOptions | None = None
    recipe: RecipeOptions | None = None
    reference_gradient: bool = False
    reference_interval: int = 1
    certify_draws: int = 0  # of a certificate, 0 for none
    certify_half: int = 1  # windows in each half of the batch that it looks at


@dataclass(frozen=True)
class Step:
    """Every static choice of a run's compiled functions, hashable; what follows from the choices is a property.

    Attributes:
      plain: the model without formats, its blocks divided as the formats need it (quantization.layout).
      mesh: from mesh.data_mesh; its size must divide batch_size / grad_accum_steps.
      n_train_windows: windows in the training data, for the order of the epochs.
      eval_batch_size: evaluation windows per forward pass; must divide the number of windows given to evaluate.
    """

    plain: ModelConfig
    options: StepOptions
    mesh: Mesh
    n_train_windows: int
    eval_batch_size: int

    @property
    def quant(self) -> quantization.QuantOptions | None:
        """The number formats; None without any."""
        return self.options.quant

    @property
    def model(self) -> ModelConfig:
        """The model that is trained."""
        if self.recipe is not None:
            return recipe.quantized_model(self.plain, self.recipe)
        if self.quant is None:
            return self.plain
        return quantization.quantized_model(self.plain, self.quant)

    @property
    def recipe(self) -> RecipeOptions | None:
        """The recipe; None without one."""
        return self.options.recipe

    @property
    def recipe_groups(self) -> tuple[quantization.Group, ...]:
        """The groups of layers that a recipe quantizes."""
        return () if self.recipe is None else recipe.groups(self.recipe, self.plain.segments)

    @property
    def groups(self) -> tuple[quantization.Group, ...]:
        """The groups of quantized layers."""
        return () if self.quant is None else quantization.groups(self.quant, self.plain.segments)

    @property
    def split(self) -> bool:
        """Whether parameters lie in parts on several devices."""
        return self.mesh.shape[FSDP] > 1

    @property
    def reference(self) -> ModelConfig:
        """The model whose gradient is the reference."""
        return self.plain.exact

    @property
    def stored(self) -> tuple[str, ...]:
        """Layers whose weights are stored on their format's grid."""
        return self.quant.stored if self.quant else ()

    @property
    def ages(self) -> bool:
        """Whether the ages of the weights' codes are kept."""
        return self.quant is not None and "ledger" in self.options.metric_groups

    @property
    def update_rule(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer, up to the learning rate."""
        o = self.options
        return optimizers.make(
            o.optimizer,
            beta1=o.beta1,
            beta2=o.beta2,
            eps=o.adam_eps,
            weight_decay=o.weight_decay,
            is_quantized=partial(_is_quantized, tuple(group.name for group in self.groups if group.has[0])),
            stacked=stacking.stacked_arrays,
        )


def _is_quantized(groups, params):
    """Tree of booleans like the parameters, stacked or not: the weight matrices of these groups."""
    no = jax.tree.map(lambda leaf: False, params)
    is_by_layer = stacking.layers_of(next(iter(groups), "head"))[0].partition("/")[0] in params
    names = [name for group in groups for name in (stacking.layers_of(group) if is_by_layer else (group,))]
    return with_weights(no, dict.fromkeys(names, True))


class Batch(NamedTuple):
    """The windows of an update, and what its dropout masks depend on."""

    windows: Any  # [B, L+1]
    number: Any  # int32: of the update
    seed: Any  # int32


class MicroBatch(NamedTuple):
    """A part of a batch that takes one forward and backward pass."""

    windows: Any  # [B / A, L+1]
    dropout_key: jax.Array | None  # None without dropout
    number: Any  # int32: within the batch


class Formats(NamedTuple):
    """The number formats of an update, before it is made."""

    options: quantization.QuantOptions
    groups: tuple[quantization.Group, ...]
    state: quantization.QuantState  # stacked
    table: FormatParams  # [E, Q, 3], of every level
    in_use_Q3: FormatParams  # at the state's level
    seed: Any  # int32: of the run
    number: Any  # int32: of the update

    def noise(self, stream) -> jax.Array:
        """The seed of stochastic rounding of one tensor: uint32 [2]. No two tensors of an update share a stream."""
        return stochastic_seed(self.seed, self.number, stream)

    # What a pass asks, of formats as of a recipe (recipe.InUse).

    def operands(self, micro_batch) -> dict:
        """{group: Operands} of the training pass over the micro-batch of this number, rounded as the options say."""
        noise = self.noise(micro_batch) if any(self.options.stochastic) else None
        return quantization.operands(self.options, self.groups, self.state, self.in_use_Q3, noise)

    def probes(self) -> dict:
        """quantization.g_probes"""
        return quantization.g_probes(self.groups)

    def gather(self, forward: dict, backward: dict) -> jax.Array:
        """float32 [Q, 3, S]: quantization.gather_statistics"""
        return quantization.gather_statistics(self.groups, forward, backward)

    def no_statistics(self) -> jax.Array:
        """float32 [Q, 3, S] that changes nothing when combined."""
        return quantization.no_statistics(self.options)

    def combine(self, a, b) -> jax.Array:
        """The statistics of two micro-batches as those of both."""
        return combine_statistics(a, b)

    def faults(self) -> dict:
        """quantization.faults"""
        return quantization.faults(self.options, self.groups, self.state)


# What a quantized pass asks: formats, or a recipe.
Numbers = Formats | recipe.InUse


class Gradients(NamedTuple):
    """Means over a batch."""

    loss: jax.Array
    grads: Any
    output: ModelOutput  # without hidden and logits
    statistics: jax.Array | None  # of the quantized operands: [Q, 3, S], of a recipe's slots [Q, 6, S]


class Health(NamedTuple):
    """What is known before the update: of the gradients, and whether a step can be made from them and the state."""

    stats: metrics.LayerStats
    grad_norm: jax.Array
    nonfinite_grads_S: jax.Array
    faults: dict  # quantization.faults
    finite: jax.Array  # bool

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order in which the model applies them."""
        return self.stats.layers


class Update(NamedTuple):
    """The float32 update, and what it leads to if formats do nothing further."""

    learning_rate: jax.Array
    clip_factor: jax.Array
    raw: Any  # as the optimizer gave it, finite or not
    applied: Any  # raw with 0 for elements that are not finite; 0 everywhere at a step that is not finite
    params: Any
    exact_opt_state: Any  # before the moments are rounded to the form in which they are kept
    opt_state: Any


class Counts(NamedTuple):
    """Of the update and of the parameters before it."""

    nonfinite_updates_S: jax.Array
    nonfinite_moments_S: jax.Array
    params: metrics.TreeNorms
    updates: metrics.TreeNorms  # of the update that the optimizer asks for
    bad: jax.Array  # bool: whether the step counts as non-finite


class Change(NamedTuple):
    """An update of the weights that have a format, as it is handed to the functions of the formats."""

    old: dict  # {group: weights [n, K, N] before the update}
    update: dict  # {group: the float32 update}
    finite: jax.Array  # bool: whether the step is finite
    bad: jax.Array  # bool: whether the step counts towards the emergency shift


class AfterFormats(NamedTuple):
    """What number formats make of an update."""

    params: Any  # with stored weights on their grids
    quant: quantization.QuantState
    entries: dict  # {group: ledger entries [n, fields]}
    rises: jax.Array  # bool: whether the emergency level rose
    moved: metrics.TreeNorms | None  # of the update that stored weights and all others took; None without stored ones


class Watched(NamedTuple):
    """What the monitor makes of a step."""

    monitor: stability.Monitor
    loss_zscore: jax.Array
    begins: dict  # {kind of alert: conditions that begin at this step}
    norm_overflow: jax.Array  # 1 where finite gradients have a norm that is not
    neuron_layers: tuple[str, ...]
    dead_shares: jax.Array  # float32 [layers with neurons]
    overflow_names: Any  # the operands that `begins["overflow"]` is about, `layer/operand`


class Outcome(NamedTuple):
    """All that is known of an update once it is made: what its row of metrics is taken from."""

    found: Gradients
    health: Health
    update: Update
    counts: Counts
    after: AfterFormats | None  # None without number formats
    watched: Watched


def loss(
    model: ModelConfig, params, windows, dropout_key, quantized: Quantized | None = None
) -> tuple[jax.Array, ModelOutput]:
    """Mean loss in nats per token of windows [B, L+1]: (float32 scalar, ModelOutput without hidden and logits).

    All logits exist at once only where the head's product is quantized.

    Args:
      dropout_key: None turns dropout off. quantized: the operands of the layers in model.rules.
    """
    whole = "head" in dict(model.rules)
    tokens_BL, targets_BL = windows[:, :-1].astype(jnp.int32), windows[:, 1:].astype(jnp.int32)
    output = forward(model, params, tokens_BL, dropout_key=dropout_key, quantized=quantized, head=whole)
    if whole:
        mean = cross_entropy(output.logits, targets_BL)
    else:
        mean = tied_cross_entropy(
            output.hidden,
            weights_of(params, "head"),
            targets_BL,
            compute_dtype=model.compute_dtype,
            tile_bytes=model.loss_tile_bytes,
        )
    return mean, output._replace(hidden=None, logits=None)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """The sharding of every array of a TrainState (of arrays or of their shapes)."""
    out = jax.tree.map(lambda leaf: replicated(mesh), state)
    quant = out.quant
    if isinstance(state.quant, quantization.QuantState):
        quant = out.quant._replace(
            residual=split_like_parameters(mesh, state.quant.residual), age=split_like_parameters(mesh, state.quant.age)
        )
    return out._replace(
        params=split_like_parameters(mesh, state.params),
        opt_state=split_like_parameters(mesh, state.opt_state),
        quant=quant,
    )


def init(step: Step, seed, table: FormatParams | None = None, params=None) -> TrainState:
    """The state before the first update.

    Args:
      table: the formats (quantization.format_table); None where there are none.
      params: the weights to start from; None: fresh ones, of the seed.
    """
    params = init_params(step.plain, seed) if params is None else params
    quant_state = None
    if step.quant is not None:
        assert table is not None, "a step with number formats is given their table"
        weights = {layer: weights_of(params, layer) for layer in step.quant.weight_layers}
        quant_state, at_rest = quantization.init_state(
            step.quant, weights, quantization.formats_at(table, 0), step.ages
        )
        params = with_weights(params, at_rest)
    if step.recipe is not None:
        quant_state = recipe.init_state(step.recipe)
        if step.recipe.reset is not None:
            layers = [layer for layer in step.recipe.names if not is_attention(layer)]
            nothing = {quantization.key_of(layer): jnp.zeros_like(weights_of(params, layer)) for layer in layers}
            quant_state = quant_state._replace(moved=nothing, rounded_moved=dict(nothing))
    monitor = stability.init_monitor(
        step.options.thresholds,
        metrics.neuron_layers(params),
        len(metrics.layer_names(params)),
        len(step.stored),
        len(quantization.overflow_watched(step.quant)) if step.quant else 0,
    )
    return TrainState(jnp.int32(0), params, step.update_rule.init(params), monitor, quant_state)


def stacked(step: Step, state: TrainState) -> TrainState:
    """The state as `train_step` takes it, from one in which every block has its own arrays."""
    segments = step.plain.segments
    streaks = dict(zip(metrics.neuron_layers(state.params), state.monitor.dead_streak))
    return state._replace(
        params=stacking.stack(state.params, segments),
        opt_state=stacking.stack(state.opt_state, segments),
        monitor=state.monitor._replace(dead_streak=stacking.stack(streaks, segments)),
        quant=_apply_to_numbers(step, state.quant, quantization.stacked, recipe.stacked, segments),
    )


def unstacked(step: Step, state: TrainState) -> TrainState:
    """The inverse of `stacked`."""
    params = stacking.unstack(state.params)
    streaks = stacking.unstack(state.monitor.dead_streak)
    return state._replace(
        params=params,
        opt_state=stacking.unstack(state.opt_state),
        monitor=state.monitor._replace(dead_streak=tuple(streaks[layer] for layer in metrics.neuron_layers(params))),
        quant=_apply_to_numbers(step, state.quant, quantization.unstacked, recipe.unstacked),
    )


def _apply_to_numbers(step: Step, state, of_formats, of_recipe, *args):
    """TrainState.quant by one of two functions; None without number formats and recipe."""
    if step.quant is not None:
        return of_formats(state, *args)
    return None if step.recipe is None else of_recipe(state, *args)


# Jitted, so that it is traced once for the names of its metrics and for the loop over updates.
@partial(jax.jit, static_argnums=0, inline=True)
def train_step(step: Step, state: TrainState, windows, inputs: Inputs) -> tuple[TrainState, metrics.Columns]:
    """One update on windows [B, L+1]: (the next state, its row of metrics). The state is stacked."""
    if step.options.grad_accum_steps == 1:
        windows = constrain(windows, over_batch(step.mesh), step.mesh)
    state = constrain(state, state_shardings(state, step.mesh), step.mesh)
    formats, batch = formats_of(step, state, inputs), Batch(windows, state.step, inputs.seed)

    recipes = recipe.in_use(step.recipe, step.recipe_groups, state.quant, inputs.formats, inputs.seed, state.step)
    found = gradients(step, step.model, state.params, batch, formats or recipes)
    health = judge(step, found, formats or recipes)
    update = propose_update(step, state, inputs, found.grads, health, formats)
    counts = count_nonfinite(step, state, update, health)
    after = None
    if formats is not None:
        change = Change(
            old=_weights(formats.groups, state.params),
            update=_weights(formats.groups, update.applied),
            finite=health.finite,
            bad=counts_towards_shift(step, state.monitor, found.loss, counts),
        )
        after = apply_formats(step, formats, change, update, found.statistics)
    watched = watch(step, state, found, health, counts, after)

    outcome = Outcome(found, health, update, counts, after, watched)
    row = [step_metrics(outcome), *group_metrics(step, outcome)]
    if step.plain.norm_gains != "float32":
        row.append(metrics.gain_metrics(state.params, step.plain.norm_gains))
    if step.options.reference_gradient:
        row.append(reference_metrics(step, state.params, batch, found.grads))
    if formats is not None and formats.options.emergency_formats:
        row.append(metrics.scalars({"format_level": formats.state.level}))
    row += alert_columns(outcome)
    params, quant = update.params, None
    if formats is not None and after is not None:
        row += format_alert_columns(formats, after, outcome)
        params, quant = after.params, after.quant
    if recipes is not None:
        bad = counts_towards_shift(step, state.monitor, found.loss, counts) if recipes.options.waits else None
        row += recipe_columns(step, recipes, outcome, bad)
        quant = recipes.after(found.statistics, health.finite, bad)
        if recipes.options.reset is not None:
            params, quant, n_reset = reset_oscillating(recipes, quant, state.params, params, health.finite)
            row.append(_sparse(metrics.scalars({"weights_reset": n_reset})))
    state = TrainState(state.step + 1, params, update.opt_state, watched.monitor, quant)
    return constrain(state, state_shardings(state, step.mesh), step.mesh), metrics.joined(row)


def reset_oscillating(
    recipes: recipe.InUse, quant: recipe.RecipeState, old, params, finite
) -> tuple[Any, recipe.RecipeState, jax.Array]:
    """(parameters with weights that oscillated at the centre of their bins, state, how many they are) after an update.

    NaN in place of their number where no window ends (oscillation.Reset).

    Args:
      quant: after the update; its sums are those before it. old, params: parameters before and after the update,
        stacked. finite: bool, whether the step is; nothing is reset at one that is not.
    """
    assert recipes.options.reset is not None, "made for a run that resets weights"
    groups = [group for group in recipes.groups if not is_attention(group.name)]
    names = [group.name for group in groups]
    slots_Q6 = recipe.slots_at(recipes.options, recipes.state, recipes.table)
    watched, ends = recipes.options.reset.watches(recipes.number)

    def watch_all(weights, moved, rounded_moved, old):
        out = {}
        for group in groups:
            one = partial(_watch_layer, recipes.options, group.name, ends, finite)
            of = group.of(slots_Q6), old[group.name], weights[group.name], moved[group.key], rounded_moved[group.key]
            out[group.name] = jax.lax.map(one, of)
        weights, moved, rounded_moved, n_reset = zip(*out.values())
        keys = [group.key for group in groups]
        by_group = dict(zip(names, weights)), dict(zip(keys, moved)), dict(zip(keys, rounded_moved))
        return *by_group, sum(jnp.sum(n) for n in n_reset)

    def leave(weights, moved, rounded_moved, old):
        return weights, moved, rounded_moved, jnp.float32(0)

    given = _weights_of(names, params), quant.moved, quant.rounded_moved, _weights_of(names, old)
    weights, moved, rounded_moved, n_reset = jax.lax.cond(watched, watch_all, leave, *given)
    state = quant._replace(moved=moved, rounded_moved=rounded_moved)
    return _with_weights(params, weights), state, jnp.where(ends, n_reset, jnp.nan)


def _watch_layer(options: RecipeOptions, name: str, ends, finite, of) -> tuple:
    """(weights, moved, rounded_moved, how many were reset) of one layer at an update of a window."""
    assert options.reset is not None, "made for a run that resets weights"
    slots_6, old, new, moved, rounded_moved = of
    copy = partial(recipe.forward_copy, options, name, slots_6)
    centre = copy(new)
    moved, rounded_moved = moved + jnp.abs(new - old), rounded_moved + jnp.abs(centre - copy(old))
    found = oscillation.oscillates(moved, rounded_moved, options.reset.threshold)
    reset = found & ends & finite & ~slots_6.high[1]
    sums = (jnp.where(ends, 0.0, total) for total in (moved, rounded_moved))
    return jnp.where(reset, centre, new), *sums, jnp.sum(reset, dtype=jnp.float32)


def formats_of(step: Step, state: TrainState, inputs: Inputs) -> Formats | None:
    """The number formats of the update from this state; None without any."""
    if step.quant is None:
        return None
    assert state.quant is not None and inputs.formats is not None, "made for a step with number formats"
    in_use_Q3 = quantization.formats_at(inputs.formats, state.quant.level)
    return Formats(step.quant, step.groups, state.quant, inputs.formats, in_use_Q3, inputs.seed, state.step)


def numbers_table(options: StepOptions) -> Any:
    """Inputs.formats of these options."""
    if options.recipe is not None:
        return recipe.table_of(options.recipe)
    return None if options.quant is None else quantization.format_table(options.quant)


def inputs_of(options: StepOptions, seed: int) -> Inputs:
    """What a run with these options and this seed gives the compiled step as data; NumPy."""
    table = numbers_table(options)
    return Inputs(np.int32(seed), np.float32(options.learning_rate), table, np.uint32(options.data_seed))


def operands_at(
    plain: ModelConfig,
    quant: quantization.QuantOptions | None,
    recipes: RecipeOptions | None,
    quant_state,
    table,
) -> dict:
    """{group: Operands or Slot} of a pass from this state, which is not stacked, every one rounded to nearest.

    Args:
      quant, recipes: one of them. quant_state, table: TrainState.quant and Inputs.formats.
    """
    if recipes is not None:
        slots_Q6 = recipe.slots_at(recipes, quant_state, table)
        return recipe.operands(recipe.groups(recipes, plain.segments), slots_Q6)
    assert quant is not None, "made for a step with number formats"
    state = quantization.stacked(quant_state, plain.segments)
    formats_Q3 = quantization.formats_at(table, quant_state.level)
    return quantization.operands(quant, quantization.groups(quant, plain.segments), state, formats_Q3)


def gradients(step: Step, model: ModelConfig, params, batch: Batch, numbers: Numbers | None = None) -> Gradients:
    """Mean loss, mean gradient, model output and, with `numbers`, statistics of the operands, over the batch.

    The batch is taken in grad_accum_steps equal micro-batches.

    Args:
      model: trained, plain or reference. numbers: None for a model without formats and recipe.
    """
    mesh, A = step.mesh, step.options.grad_accum_steps
    key = jax.random.fold_in(jax.random.key(batch.seed), batch.number) if model.dropout > 0 else None
    pass_over = partial(_micro_gradients, mesh, model, gather(params, mesh), numbers)
    if A == 1:
        return pass_over(MicroBatch(batch.windows, key, 0))

    layout = replicated(mesh), split_like_parameters(mesh, params)

    def add(carry, item):
        windows, i = item
        windows = constrain(windows, over_batch(mesh), mesh)
        sums, seen = carry
        sums = constrain(sums, layout, mesh)
        found = pass_over(MicroBatch(windows, None if key is None else jax.random.fold_in(key, i), i))
        if numbers is not None and found.statistics is not None:
            seen = numbers.combine(seen, found.statistics)
        return (jax.tree.map(jnp.add, sums, (found.loss, found.grads)), seen), found.output

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    nothing = None if numbers is None else numbers.no_statistics()
    ((total, grads), statistics), outputs = jax.lax.scan(
        add, (zeros, nothing), (batch.windows.reshape(A, len(batch.windows) // A, -1), jnp.arange(A))
    )
    output = outputs._replace(
        act_amax_N=outputs.act_amax_N.max(0), act_rms_N=jnp.sqrt(jnp.square(outputs.act_rms_N).mean(0))
    )
    return Gradients(total / A, jax.tree.map(lambda g: g / A, grads), output, statistics)


def _micro_gradients(mesh: Mesh, model: ModelConfig, params, numbers: Numbers | None, micro: MicroBatch) -> Gradients:
    """`gradients` of one micro-batch, of parameters that are already gathered."""
    # The partitioner forgets inside the loop over micro-batches that they are whole. To repeat it costs nothing.
    whole = gather(params, mesh)
    if numbers is None:
        (mean, output), grads = jax.value_and_grad(partial(loss, model), has_aux=True)(
            whole, micro.windows, micro.dropout_key
        )
        return Gradients(mean, scatter(grads, mesh), output, None)

    def with_probes(params, g_probes):
        operands = numbers.operands(micro.number)
        return loss(model, params, micro.windows, micro.dropout_key, Quantized(operands, g_probes))

    (mean, output), (grads, of_g) = jax.value_and_grad(with_probes, argnums=(0, 1), has_aux=True)(
        whole, numbers.probes()
    )
    statistics = numbers.gather(output.statistics, of_g)
    return Gradients(mean, scatter(grads, mesh), output._replace(statistics={}), statistics)


def judge(step: Step, found: Gradients, numbers: Numbers | None) -> Health:
    """Statistics of the unclipped gradient, and whether a step can be made from it and from the state."""
    stats = metrics.gradient_stats(found.grads, step.split)
    grad_norm = jnp.sqrt(stats.square_sum.sum())
    faults = {} if numbers is None else numbers.faults()
    finite = jnp.isfinite(found.loss) & jnp.isfinite(grad_norm) & (stats.nonfinite.sum() == 0)
    for _, counts in faults.values():
        finite &= counts.sum() == 0
    return Health(stats, grad_norm, stats.nonfinite, faults, finite)


def propose_update(
    step: Step, state: TrainState, inputs: Inputs, grads, health: Health, formats: Formats | None
) -> Update:
    """Clipping, the optimizer and the learning rate; a step that is not finite leaves everything as it was."""
    o = step.options
    factor = optimizers.clip_factor(health.grad_norm, o.grad_clip)
    lr = optimizers.learning_rate(
        state.step,
        peak=inputs.learning_rate,
        warmup_steps=o.warmup_steps,
        max_steps=o.max_steps,
        schedule=o.schedule,
        min_lr_ratio=o.min_lr_ratio,
        decay_steps=o.decay_steps,
    )
    clipped = jax.tree.map(lambda g: g * factor, grads)
    extra = {}
    if o.optimizer != "adamw":
        assert formats is not None, "only adamw trains without number formats"
        weights = _weights(formats.groups, state.params)
        grids = _grids(step, formats, formats.state, formats.in_use_Q3, weights)
        none = jax.tree.map(lambda leaf: None, state.params)
        extra = {
            "grids": _with_weights(none, grids),
            "learning_rate": lr,
            "seed": formats.noise(OPTIMIZER_STREAM),
        }
    directions, opt_state = step.update_rule.update(clipped, state.opt_state, state.params, **extra)
    # Dividing by the root of an infinite second moment gives 0, which would look like a sound update.
    raw = jax.tree.map(
        lambda d, nu: jnp.where(jnp.isfinite(nu), -lr * d, jnp.nan), directions, optimizers.adam_moments(opt_state).nu
    )
    applied = jax.tree.map(lambda u: jnp.where(health.finite & jnp.isfinite(u), u, 0.0), raw)
    params = optax.apply_updates(state.params, applied)
    exact = kept = _where(health.finite, opt_state, state.opt_state)
    if o.moments != "float32":
        # Rounded twice, a moment could move again: at a step that is not finite it stays what it was.
        rounded = keep_moments(o, opt_state, (inputs.seed, state.step))
        kept = _where(health.finite, rounded, state.opt_state)
    return Update(lr, factor, raw, applied, params, exact, kept)


def _where(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def keep_moments(options: StepOptions, opt_state, seed) -> Any:
    """The optimizer's state with Adam's moments in the form in which they are kept (numerics.moments).

    Random bits depend on a tensor's name and not on whether blocks are stacked.

    Args:
      seed: of the run, and the number of the update.
    """
    adam = optimizers.adam_moments(opt_state)
    leaves, structure = jax.tree_util.tree_flatten_with_path(adam.mu)
    names = ["/".join(key.key for key in path) for path, _ in leaves]
    number = {layer: i for i, layer in enumerate(sorted(layer for name in names for layer in stacking.layers_of(name)))}
    kept = []
    for i, moment in enumerate((adam.mu, adam.nu)):
        keep = partial(moments.keep, form=options.moments, signed=i == 0)
        out = []
        for (path, _), name, x in zip(leaves, names, jax.tree.leaves(moment), strict=True):
            x_n = x if stacking.is_stacked(path) else x[None]
            if options.moments_rounding == "stochastic":
                streams = [_MOMENTS_STREAM + 2 * number[layer] + i for layer in stacking.layers_of(name)]
                x_n = jax.vmap(keep)(x_n, seed=quantization.noise_of(seed, streams))
            else:
                x_n = keep(x_n)
            out.append(x_n.reshape(x.shape))
        kept.append(structure.unflatten(out))
    return optimizers.with_moments(opt_state, adam._replace(mu=kept[0], nu=kept[1]))


def count_nonfinite(step: Step, state: TrainState, update: Update, health: Health) -> Counts:
    """What is not finite of the update, the moments after it and the parameters before it, with their statistics."""
    # A damaged moment makes its update non-finite.
    found = metrics.change_norms(
        state.params, update.raw, update.applied, optimizers.adam_moments(update.opt_state), step.split
    )
    nonfinite_updates_S = jnp.where(health.finite, found.updates.nonfinite, 0.0)
    bad = ~health.finite | (nonfinite_updates_S.sum() + found.params.nonfinite.sum() > 0)
    return Counts(nonfinite_updates_S, found.nonfinite_moments, found.params, found.updates, bad)


def counts_towards_shift(step: Step, monitor: stability.Monitor, mean_loss, counts: Counts) -> jax.Array:
    """Whether an update counts towards a shift to another format or recipe.

    Bad is one that is not finite, a loss spike, or one made during divergence.

    The monitor is the one before the update, because the one after it depends on what the formats lose.
    """
    spike = stability.robust_z(mean_loss, monitor.losses_W) > step.options.thresholds.spike_threshold
    return counts.bad | spike | monitor.active["divergence"]


def apply_formats(step: Step, formats: Formats, change: Change, update: Update, statistics_Q3S) -> AfterFormats:
    """What number formats do after the float32 update."""
    params, applied = update.params, update.applied
    options = formats.options
    formats_Q3 = quantization.formats_at(formats.table, formats.state.level)
    level, streak, rises = quantization.next_level(options, formats.state, change.bad)
    next_Q3 = quantization.formats_at(formats.table, level)
    history = quantization.push_history(options, formats.state.amax_history_Q3H, statistics_Q3S, formats_Q3)
    # Where overflow becomes infinity the amax that overflowed enters, or every later step would overflow too.
    if options.saturate:
        history = jnp.where(change.finite, history, formats.state.amax_history_Q3H)
    next_quant = formats.state._replace(amax_history_Q3H=history, level=level, bad_streak=streak)
    grids = _grids(step, formats, formats.state, formats_Q3, change.old)
    if options.stored:
        next_formats = quantization.weight_formats(formats.groups, next_Q3)
        at_rest, next_quant = store_weights(formats, change, grids, next_quant, next_formats, rises)
        params = _with_weights(params, at_rest)
    entries, moved = {}, None
    if options.stored or "ledger" in step.options.metric_groups:
        new = _weights(formats.groups, params)
        next_grids = _grids(step, formats, next_quant, next_Q3, new)
        entries, age = enter_ledger(formats, change, new, next_quant, grids, next_grids, step.split)
        next_quant = next_quant._replace(age=age)
        if options.stored:
            taken = {name: new[name] - change.old[name] for name in new}
            moved = metrics.tree_norms(_with_weights(applied, taken), step.split)
    return AfterFormats(params, next_quant, entries, rises, moved)


def store_weights(
    formats: Formats, change: Change, grids: dict, next_quant: quantization.QuantState, next_formats: dict, rises
) -> tuple[dict, quantization.QuantState]:
    """The stored weights after an update: ({group: weights at rest}, next_quant with their scales and residuals).

    Args:
      grids: {group: Grid} before the update. next_formats: {group: FormatParams} after it.
      rises: bool, whether the formats change at this step.
    """
    options, weights, rest_scale, residual = formats.options, {}, {}, {}
    position = {layer: i for i, layer in enumerate(options.stored)}
    for group in _with_format(formats.groups):
        name, key = group.name, group.key
        noise, owed = None, formats.state.residual.get(key)
        if options.weights_at_rest == "stochastic":
            streams = [AT_REST_STREAM + position[layer] for layer in stacking.layers_of(name)]
            noise = quantization.noise_of((formats.seed, formats.number), streams)
        after = jax.vmap(partial(ledger.store, force=rises))(
            change.old[name], change.update[name], grids[name], next_formats[name], residual=owed, seed=noise
        )
        # A step that is not finite changes nothing, unless the format itself changes after it. The scale before is
        # the state's: `grids` has another where that one cannot be used.
        scale_n = formats.state.rest_scale[key].reshape(grids[name].scale.shape)
        after = jax.tree.map(
            lambda new, before: jnp.where(change.finite | rises, new, before),
            after,
            ledger.Stored(change.old[name], owed, grids[name]._replace(scale=scale_n)),
        )
        weights[name], rest_scale[key] = after.weights, after.grid.scale.reshape(-1)
        if owed is not None:
            residual[key] = after.residual
    return weights, next_quant._replace(rest_scale=rest_scale, residual=residual)


def enter_ledger(
    formats: Formats,
    change: Change,
    new: dict,
    next_quant: quantization.QuantState,
    grids: dict,
    next_grids: dict,
    split: bool,
) -> tuple[dict, dict]:
    """({group: ledger entries}, {key: ages of the codes}) of an update that led to the weights {group: new}.

    Args:
      grids, next_grids: {group: Grid} before and after the update. split: whether weights are split over devices.
    """
    count = jax.vmap(partial(ledger.entries, split=split))
    options, entries, ages = formats.options, {}, {}
    for group in _with_format(formats.groups):
        name, key = group.name, group.key
        old_n, update_n, grid_n, next_n = change.old[name], change.update[name], grids[name], next_grids[name]
        age_n, unlost = formats.state.age.get(key), None
        if options.weights_at_rest == "error_feedback":
            unlost = next_quant.residual[key] != formats.state.residual[key]
        elif options.weights_at_rest == "stochastic":
            unlost = jax.vmap(ledger.expected_to_move)(old_n, update_n, next_n)
        # Stored weights are counted on the grid they end on; operands on the one they were rounded on.
        sums_n, new_age_n = count(
            old_n, new[name], update_n, next_n if options.stored else grid_n, age=age_n, unlost=unlost
        )
        flips_n = ledger.scale_flips(old_n if options.stored else new[name], grid_n, next_n)
        entries[name] = ledger.with_scale_flips(sums_n, flips_n)
        if age_n is not None and new_age_n is not None:
            ages[key] = jnp.where(change.finite, new_age_n, age_n)
    return entries, ages


def watch(
    step: Step, state: TrainState, found: Gradients, health: Health, counts: Counts, after: AfterFormats | None
) -> Watched:
    """The monitor after this step."""
    thresholds = step.options.thresholds
    overflow_names, overflow_O, lost_S, stalled_S = (), None, None, counts.updates.zeros
    if step.quant is not None:
        overflow_names, overflow_O = quantization.overflow_of(step.quant, found.statistics)
    if step.stored and after is not None:
        entries = _by_layer(_with_format(step.groups), after.entries)
        lost_S, stalled_S = ledger.lost_share(entries), stalled_shares(step, counts.updates, entries)
    before = state.monitor.dead_streak
    assert isinstance(before, dict), "the state is stacked"
    streaks, shares = stability.update_dead_streaks(before, health.stats.neuron_square_sum, thresholds, ok=~counts.bad)
    neuron_layers, order = metrics.in_model_order(shares)
    dead_shares = jnp.concatenate(list(shares.values()))[order]
    monitor, z, begins = stability.update_monitor(
        state.monitor,
        row_number=state.step + 1,
        loss=found.loss,
        bad=counts.bad,
        dead_streak=streaks,
        dead_shares=dead_shares,
        stalled_S=stalled_S,
        thresholds=thresholds,
        lost_S=lost_S,
        overflow_O=overflow_O,
    )
    # Elements that are all finite can still have a norm that is not.
    norm_overflow = jnp.float32(~jnp.isfinite(health.grad_norm) & (health.nonfinite_grads_S.sum() == 0))
    return Watched(monitor, z, begins, norm_overflow, neuron_layers, dead_shares, overflow_names)


def stalled_shares(step: Step, updates: metrics.TreeNorms, entries) -> jax.Array:
    """float32 [S]: share of the elements of each layer whose update is 0, or lost because the weight is stored.

    Args:
      updates: what was asked for. entries: of the ledger, [stored layers, fields].
    """
    table = HEAD if HEAD in updates.layers else "embed"  # whose weights the head multiplies with
    at = np.array([updates.layers.index(table if layer == HEAD else layer) for layer in step.stored])
    return updates.zeros.at[at].add(ledger.lost_weights(entries) / updates.size[at])


def step_metrics(outcome: Outcome) -> metrics.Columns:
    """The columns that every run has, whatever its metric groups."""
    found, health, update, counts, _, watched = outcome
    row = {
        "loss": found.loss,
        "perplexity": jnp.exp(found.loss),
        "learning_rate": update.learning_rate,
        "grad_norm": health.grad_norm,
        "grad_norm_clipped": health.grad_norm * update.clip_factor,
        "loss_zscore": watched.loss_zscore,
        "nonfinite_loss": jnp.float32(~jnp.isfinite(found.loss)),
        "nonfinite_grads": health.nonfinite_grads_S.sum(),
        "nonfinite_params": counts.params.nonfinite.sum(),
        "nonfinite_moments": counts.nonfinite_moments_S.sum(),
        "nonfinite_updates": counts.nonfinite_updates_S.sum(),
    }
    return metrics.scalars(row | {kind: faulty.sum() for kind, (_, faulty) in health.faults.items()})


def group_metrics(step: Step, outcome: Outcome) -> list[metrics.Columns]:
    """The columns of the metric groups that are chosen."""
    found, health, update, counts, after, watched = outcome
    o, chosen, row = step.options, step.options.metric_groups, []
    if "grad" in chosen:
        row.append(metrics.gradient_metrics(health.stats))
        adam = optimizers.adam_moments(update.exact_opt_state)
        row.append(_sparse(metrics.gradient_snr(adam, beta1=o.beta1, beta2=o.beta2, split=step.split)))
    if "update" in chosen:
        moved = counts.updates if after is None or after.moved is None else after.moved
        row.append(metrics.update_metrics(moved, counts.params))
        if step.stored:
            row.append(metrics.update_metrics(counts.updates, counts.params, "requested_"))
        if o.moments != "float32":
            row.append(moment_metrics(step, update, health.finite))
    if "param" in chosen:
        row.append(metrics.parameter_metrics(counts.params))
    if "dead" in chosen:
        row.append(metrics.over(watched.neuron_layers, {"dead_neurons": watched.dead_shares}))
    if "activation" in chosen:
        row.append(metrics.activation_metrics(found.output))
    if step.quant is not None and "format" in chosen:
        row.append(_sparse(quantization.format_metrics(step.quant, found.statistics, o.grad_accum_steps)))
    if step.quant is not None and after is not None and after.entries and "ledger" in chosen:
        entries = _by_layer(_with_format(step.groups), after.entries)
        named, of_all = ledger.ledger_metrics(entries, stored=bool(step.stored), ages=step.ages)
        row += [_sparse(metrics.over(step.quant.weight_layers, named)), _sparse(metrics.scalars(of_all))]
    return row


def moment_metrics(step: Step, update: Update, finite) -> metrics.Columns:
    """What the form in which moments are kept loses at this update; `sparse` columns, absent where nothing is kept."""
    o = step.options
    exact, kept = (optimizers.adam_moments(state) for state in (update.exact_opt_state, update.opt_state))
    found = metrics.moment_metrics(exact, kept, beta1=o.beta1, beta2=o.beta2, eps=o.adam_eps, split=step.split)
    return _sparse(metrics.Columns(found.names, jnp.where(finite, found.values, jnp.nan)))


def reference_metrics(step: Step, params, batch: Batch, grads) -> metrics.Columns:
    """Fidelity of the step's gradient, and of the bfloat16 one, to the float32 gradient; `sparse` columns."""

    def measure():
        reference = gradients(step, step.reference, params, batch).grads
        found = [metrics.gradient_fidelity(grads, reference, split=step.split)]
        if step.model != step.plain:
            plain = gradients(step, step.plain, params, batch).grads
            found.append(metrics.gradient_fidelity(plain, reference, f"_{step.model.compute_dtype}", step.split))
        return _sparse(metrics.joined(found))

    interval = step.options.reference_interval
    if interval == 1:
        return measure()
    nothing = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), jax.eval_shape(measure))
    # Row k + 1 is the k-th update's: the reference is taken at rows 1, 1 + interval, ...
    return jax.lax.cond(batch.number % interval == 0, measure, lambda: nothing)


def alert_columns(outcome: Outcome) -> list[metrics.Columns]:
    """Columns `alert/kind[/layer]`: a value where the condition begins at this step, else 0 (see stability)."""
    found, health, _, counts, _, watched = outcome
    layers, begins = health.layers, watched.begins
    of_run = {
        "alert/nonfinite_loss": jnp.float32(~jnp.isfinite(found.loss)),
        "alert/nonfinite_grad_norm": watched.norm_overflow,
        "alert/loss_spike": begins["loss_spike"],
        "alert/divergence": begins["divergence"],
    }
    of_layers = {
        "nonfinite_grads": health.nonfinite_grads_S,
        "nonfinite_params": counts.params.nonfinite,
        "nonfinite_moments": counts.nonfinite_moments_S,
        "nonfinite_updates": counts.nonfinite_updates_S,
        "update_stall": begins["update_stall"],
    }
    return [
        metrics.scalars(of_run),
        metrics.over(layers, of_layers, _ALERT),
        metrics.over(watched.neuron_layers, {"dead_layer": begins["dead_layer"]}, _ALERT),
    ]


def recipe_columns(step: Step, recipes: recipe.InUse, outcome: Outcome, bad) -> list[metrics.Columns]:
    """The columns that only recipes have. `bad`: whether the update was, where a phase waits for that."""
    row, statistics = [], outcome.found.statistics
    if "format" in step.options.metric_groups and statistics is not None:
        names = recipes.options.names
        row.append(_sparse(recipe.format_metrics(names, statistics, step.options.grad_accum_steps)))
    if len(recipes.options.schedule) > 1:
        row.append(metrics.scalars({"recipe_phase": recipes.phase}))
    if recipes.options.waits:
        row.append(metrics.scalars({"alert/format_shift": recipes.begins(bad)}))
    return row + [
        metrics.over(names, {kind: counts}, _ALERT) for kind, (names, counts) in outcome.health.faults.items()
    ]


def format_alert_columns(formats: Formats, after: AfterFormats, outcome: Outcome) -> list[metrics.Columns]:
    """Alerts that only formats raise.

    They are: damaged histories, scales and residuals; clipping; stalls of stored weights; and the moves of their scales
    and of the emergency level.
    """
    options, begins = formats.options, outcome.watched.begins
    columns = [metrics.over(names, {kind: counts}, _ALERT) for kind, (names, counts) in outcome.health.faults.items()]
    columns += [
        metrics.over(names, {kind: begins[kind]}, _ALERT)
        for kind, names in (("overflow", outcome.watched.overflow_names), ("bit_stall", options.stored))
        if names
    ]
    if options.stored:
        of = _with_format(formats.groups)
        before, now = (
            quantization.in_layer_order(of, [state.rest_scale[group.key] for group in of])
            for state in (formats.state, after.quant)
        )
        columns.append(metrics.over(options.stored, {"scale_moved": jnp.where(before != now, now, 0.0)}, _ALERT))
    if options.emergency_formats:
        columns.append(metrics.scalars({"alert/format_shift": jnp.where(after.rises, after.quant.level, 0)}))
    return columns


def _with_format(groups) -> list[quantization.Group]:
    """The groups whose weights have a format."""
    return [group for group in groups if group.has[0]]


def _by_layer(groups, tree: dict):
    """{group: [n, ...]} as one array over these layers, in the order of QuantOptions.layers."""
    return quantization.in_layer_order(groups, [tree[group.name] for group in groups])


def _weights(groups, tree) -> dict:
    """{group: its weights [n, K, N]} of a stacked tree like the parameters, groups whose weights have a format."""
    return _weights_of([group.name for group in _with_format(groups)], tree)


def _weights_of(names, tree) -> dict:
    """{group: its weights [n, K, N]} of these groups."""
    weights = {name: weights_of(tree, name) for name in names}
    return {name: w[None] if name == HEAD else w for name, w in weights.items()}


def _with_weights(params, weights: dict):
    """The stacked tree with something else for the weights of some groups, with leaves [n, ...]."""
    one = {name: jax.tree.map(lambda leaf: leaf[0], w) if name == HEAD else w for name, w in weights.items()}
    return with_weights(params, one)


def _grids(step: Step, formats: Formats, state: quantization.QuantState, formats_Q3: FormatParams, weights: dict):
    return quantization.weight_grids(step.model, formats.options, formats.groups, state, formats_Q3, weights)


def _sparse(columns: metrics.Columns) -> metrics.Columns:
    return metrics.Columns(tuple(SPARSE + name for name in columns.names), columns.values)
