"""One update of a training run, as pure functions of a `Step` and arrays.

`Step` holds every choice that is static; all else is data. `train_step` is the whole update; the functions it is made
of are below it in the order in which it calls them, and each can be called, traced and tested by itself. Nothing here
compiles: `program` does.

What a non-finite step does: nothing but be counted. A loss, gradient or gradient norm that is not finite, or an amax
history, scale or residual from which no step can be made, leaves parameters, moments and Adam's count as they were;
`state.step` advances. A damaged moment shows only in the update, which is then under way: its element is not applied,
the others are, and the step counts as non-finite.

Seed, learning rate and number formats are data (`Inputs`), so that runs which differ in nothing else share one compiled
program. Formats come as a table (quantization.format_table), and the state carries what they remember. Without formats
neither exists, and the program is the baseline's. The shadow is the gradient of the same parameters on the same batch
in float32 and without formats, computed beside the step's own.

Columns named `sparse/NAME` stand for the metric NAME where they are not NaN: it was not measured at that step, or does
not apply.

Axes: B batch, L block_size, A micro-batches, S layers (of statistics: fields), Q quantized layers, G matrices of one
shape.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from altgrad_jax.config import METRIC_GROUPS
from altgrad_jax.models.gpt2 import GPT, GPTConfig, GPTOutput, Quantized, init_params, weights_of, with_weights
from altgrad_jax.numerics import ledger, optimizers
from altgrad_jax.numerics.cross_entropy import cross_entropy, tied_cross_entropy
from altgrad_jax.numerics.products import combine_statistics, empty_statistics
from altgrad_jax.numerics.rounding import FormatParams, stochastic_seed
from altgrad_jax.step import metrics, quantization, stability
from altgrad_jax.step.mesh import constrain, gather, over_batch, replicated, scatter, split_like_parameters

SPARSE = "sparse/"
# Streams of random bits beside those of the operands, which are numbered from 0.
_AT_REST_STREAM, _OPTIMIZER_STREAM = 2**24, 2**25


class TrainState(NamedTuple):
    """Everything a run is, between two steps. `step` = updates attempted."""

    step: jax.Array  # int32
    params: Any  # nested dict of float32
    opt_state: Any
    monitor: stability.Monitor
    quant: quantization.QuantState | None = None  # None without number formats


class Inputs(NamedTuple):
    """What a run gives the compiled step as data."""

    seed: Any  # int32: of the dropout masks and of stochastic rounding (the initialization's is an argument of init)
    learning_rate: Any  # float32, the peak
    formats: FormatParams | None = None  # quantization.format_table; None without number formats


@dataclass(frozen=True)
class StepOptions:
    """Choices of a training step; names and units as in the config. Static but for the learning rate and the names of
    the formats, which only enter `StepFunctions.inputs`."""

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
    grad_clip: float = 1.0
    data_seed: int = 0
    metric_groups: tuple = METRIC_GROUPS
    data_on_device: bool = True  # else a dispatch is given its batches by the host
    optimizer: str = "adamw"
    quant: quantization.QuantOptions | None = None
    use_shadow: bool = False
    shadow_interval: int = 1


@dataclass(frozen=True)
class Step:
    """Every static choice of a run's compiled functions, hashable; what follows from the choices is a property.

    plain: the model without formats. mesh: from mesh.data_mesh; its size must divide batch_size / grad_accum_steps.
    n_train_windows: windows in the training data, for the order of the epochs. eval_batch_size: evaluation windows per
    forward pass; must divide the number of windows given to evaluate.
    """

    plain: GPTConfig
    options: StepOptions
    mesh: Mesh
    n_train_windows: int
    eval_batch_size: int

    @property
    def quant(self) -> quantization.QuantOptions | None:
        return self.options.quant

    @property
    def model(self) -> GPTConfig:
        """The model that is trained."""
        if self.quant is None:
            return self.plain
        return dataclasses.replace(self.plain, rules=quantization.rules(self.quant))

    @property
    def shadow(self) -> GPTConfig:
        """The model whose gradient is the reference."""
        return dataclasses.replace(self.plain, compute_dtype="float32", attention="xla")

    @property
    def weight_layers(self) -> tuple[str, ...]:
        """Layers whose weights have a format."""
        return self.quant.weight_layers if self.quant else ()

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
        o = self.options

        def is_quantized(params):
            """Tree of booleans: the weight matrices that have a format."""
            no = jax.tree.map(lambda leaf: False, params)
            return with_weights(no, dict.fromkeys(self.weight_layers, True))

        return optimizers.make(
            o.optimizer,
            beta1=o.beta1,
            beta2=o.beta2,
            eps=o.adam_eps,
            weight_decay=o.weight_decay,
            is_quantized=is_quantized,
        )


class Gradients(NamedTuple):
    """Means over a batch."""

    loss: jax.Array
    grads: Any
    output: GPTOutput  # without hidden and logits
    statistics_Q3S: jax.Array | None  # of the quantized operands


class Health(NamedTuple):
    """What is known before the update: of the gradients, and whether a step can be made from them and the state."""

    stats: metrics.LayerStats
    grad_norm: jax.Array
    nonfinite_grads_S: jax.Array
    faults: dict  # quantization.faults
    finite: jax.Array  # bool

    @property
    def layers(self) -> list[str]:
        return list(self.stats.square_sum)


class Update(NamedTuple):
    """The float32 update, and what it leads to if formats do nothing further."""

    learning_rate: jax.Array
    clip_factor: jax.Array
    raw: Any  # as computed, of whatever values
    applied: Any  # 0 where not finite, and everywhere at a step that is not
    params: Any
    opt_state: Any


class Counts(NamedTuple):
    """Of the update and of the parameters before it."""

    nonfinite_updates_S: jax.Array
    nonfinite_moments_S: jax.Array
    nonfinite_params_S: jax.Array
    zero_update_S: jax.Array
    param_stats: dict
    update_stats: dict
    bad: jax.Array  # bool: whether the step counts as non-finite


class AfterFormats(NamedTuple):
    """What number formats make of an update."""

    params: Any  # with stored weights on their grids
    quant: quantization.QuantState | None
    entries: dict  # {layer: ledger entries}
    rises: jax.Array  # bool: whether the emergency level rose


class Watched(NamedTuple):
    """What the monitor makes of a step."""

    monitor: stability.Monitor
    loss_zscore: jax.Array
    begins: dict  # {kind of alert: conditions that begin at this step}
    norm_overflow: jax.Array  # 1 where finite gradients have a norm that is not
    dead_metrics: dict
    overflow_names: Any  # the operands that `begins["overflow"]` is about, `layer/operand`


def make_loss(model: GPT):
    """loss(params, windows [B, L+1], dropout key or None, Quantized or None) -> (mean, GPTOutput without hidden and
    logits). All logits exist at once only where the head's product is quantized."""
    config = model.config
    whole = "head" in dict(config.rules)

    def loss(params, windows, dropout_key, quantized=None):
        tokens_BL, targets_BL = windows[:, :-1].astype(jnp.int32), windows[:, 1:].astype(jnp.int32)
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        output = model.apply(
            {"params": params}, tokens_BL, train=dropout_key is not None, rngs=rngs, quantized=quantized, head=whole
        )
        if whole:
            mean = cross_entropy(output.logits, targets_BL)
        else:
            mean = tied_cross_entropy(
                output.hidden,
                weights_of(params, "head"),
                targets_BL,
                compute_dtype=config.compute_dtype,
                tile_bytes=config.loss_tile_bytes,
            )
        return mean, output._replace(hidden=None, logits=None)

    return loss


def state_shardings(state, mesh):
    """The sharding of every array of a TrainState (of arrays or of their shapes)."""
    out = jax.tree.map(lambda leaf: replicated(mesh), state)
    quant = state.quant and out.quant._replace(
        residual=split_like_parameters(mesh, state.quant.residual), age=split_like_parameters(mesh, state.quant.age)
    )
    return out._replace(
        params=split_like_parameters(mesh, state.params),
        opt_state=split_like_parameters(mesh, state.opt_state),
        quant=quant,
    )


def init(step: Step, seed, table=None) -> TrainState:
    """The state before the first update. `table`: the formats; left out where there are none."""
    params = init_params(step.model, seed)
    quant_state = None
    if step.quant is not None:
        quant_state, at_rest = quantization.init_state(
            step.quant, _weights(step, params), quantization.formats_at(table, 0), step.ages
        )
        params = with_weights(params, at_rest)
    monitor = stability.init_monitor(
        step.options.thresholds,
        metrics.neuron_layers(params),
        len(metrics.by_layer(params)),
        len(step.stored),
        len(quantization.overflow_watched(step.quant)) if step.quant else 0,
    )
    return TrainState(jnp.int32(0), params, step.update_rule.init(params), monitor, quant_state)


def train_step(step: Step, state: TrainState, windows, inputs: Inputs):
    """One update on windows [B, L+1]: (the next state, its row of metrics {name: float32 scalar})."""
    state = constrain(state, state_shardings(state, step.mesh), step.mesh)
    formats_Q3 = operands = None
    if step.quant is not None:
        formats_Q3 = quantization.formats_at(inputs.formats, state.quant.level)
        operands = partial(noisy_operands, step, state, inputs.seed, formats_Q3)

    found = gradients(step, step.model, state.params, windows, state.step, inputs.seed, operands)
    health = judge(step, state, found)
    update = propose_update(step, state, inputs, found.grads, health, formats_Q3)
    counts = count_nonfinite(state, update, health)

    after = AfterFormats(update.params, state.quant, {}, jnp.bool_(False))
    if step.quant is not None:
        # Judged by the losses before this one, for the monitor comes later: it wants to know what was lost.
        spike = stability.robust_z(found.loss, state.monitor.losses_W) > step.options.thresholds.spike_threshold
        after = apply_formats(
            step,
            state,
            update.params,
            update.applied,
            inputs,
            found.statistics_Q3S,
            ok=health.finite,
            bad=counts.bad | spike | state.monitor.active["divergence"],
        )
    watched = watch(step, state, found, health, counts, after.entries)

    row = step_metrics(found, health, update, counts, watched)
    row |= group_metrics(step, found, health, update, counts, watched, after.entries)
    if step.options.use_shadow:
        row |= shadow_metrics(step, state.params, windows, state.step, inputs.seed, found.grads)
    if step.quant is not None and step.quant.emergency_formats:
        row["format_level"] = state.quant.level.astype(jnp.float32)
    row |= alert_columns(health, counts, watched, row["nonfinite_loss"])
    if step.quant is not None:
        row |= format_alert_columns(step, state.quant, after, watched, health.faults)
    state = TrainState(state.step + 1, after.params, update.opt_state, watched.monitor, after.quant)
    return constrain(state, state_shardings(state, step.mesh), step.mesh), row


def operands_at(quant: quantization.QuantOptions, quant_state, table):
    """{layer: Operands} of a pass from this state, every one rounded to nearest."""
    return quantization.operands(quant, quant_state, quantization.formats_at(table, quant_state.level))


def noisy_operands(step: Step, state: TrainState, seed, formats_Q3, micro_batch):
    """{layer: Operands} of the training pass over a micro-batch, rounded as the options say."""
    noise = None
    if any(step.quant.stochastic):
        noise = stochastic_seed(seed, state.step, micro_batch)
    return quantization.operands(step.quant, state.quant, formats_Q3, noise)


def gradients(step: Step, model: GPTConfig, params, windows, number, seed, operands=None) -> Gradients:
    """Mean loss, mean gradient, model output, and with `operands` the statistics [Q, 3, S], over the batch in A equal
    micro-batches.

    Args:
      model: trained, plain or shadow. number: of the update, for the dropout masks. operands: micro-batch number ->
        {layer: Operands}; None for a model without formats.
    """
    mesh, A = step.mesh, step.options.grad_accum_steps
    key = jax.random.fold_in(jax.random.key(seed), number) if model.dropout > 0 else None
    value_and_grad = partial(_micro_gradients, step, make_loss(GPT(model)), gather(params, mesh), operands)
    if A == 1:
        return value_and_grad(windows, key, 0)

    layout = replicated(mesh), split_like_parameters(mesh, params)

    def micro_batch(carry, item):
        windows, i = item
        windows = constrain(windows, over_batch(mesh), mesh)
        sums, seen_Q3S = carry
        sums = constrain(sums, layout, mesh)
        found = value_and_grad(windows, None if key is None else jax.random.fold_in(key, i), i)
        if found.statistics_Q3S is not None:
            seen_Q3S = combine_statistics(seen_Q3S, found.statistics_Q3S)
        return (jax.tree.map(jnp.add, sums, (found.loss, found.grads)), seen_Q3S), found.output

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    nothing = (
        None
        if operands is None
        else jnp.broadcast_to(empty_statistics(), (len(step.quant.layers), 3, len(empty_statistics())))
    )
    ((loss, grads), statistics_Q3S), outputs = jax.lax.scan(
        micro_batch, (zeros, nothing), (windows.reshape(A, len(windows) // A, -1), jnp.arange(A))
    )
    output = outputs._replace(
        act_amax_N=outputs.act_amax_N.max(0), act_rms_N=jnp.sqrt(jnp.square(outputs.act_rms_N).mean(0))
    )
    return Gradients(loss / A, jax.tree.map(lambda g: g / A, grads), output, statistics_Q3S)


def _micro_gradients(step, loss_fn, gathered, operands, windows, key, i) -> Gradients:
    """`gradients` of micro-batch i, not split further."""
    # Said once more inside the loop over micro-batches, where it costs nothing: the partitioner forgets it.
    whole = gather(gathered, step.mesh)
    if operands is None:
        (loss, output), grads = jax.value_and_grad(loss_fn, has_aux=True)(whole, windows, key)
        return Gradients(loss, scatter(grads, step.mesh), output, None)

    def with_probes(params, g_probes):
        return loss_fn(params, windows, key, Quantized(operands(i), g_probes))

    (loss, output), (grads, of_g) = jax.value_and_grad(with_probes, argnums=(0, 1), has_aux=True)(
        whole, quantization.g_probes(step.quant)
    )
    statistics_Q3S = quantization.gather_statistics(step.quant, output.statistics, of_g)
    return Gradients(loss, scatter(grads, step.mesh), output._replace(statistics={}), statistics_Q3S)


def judge(step: Step, state: TrainState, found: Gradients) -> Health:
    """Statistics of the unclipped gradient, and whether a step can be made from it and from the state."""
    stats = metrics.gradient_stats(found.grads)
    grad_norm = jnp.sqrt(sum(stats.square_sum.values()))
    nonfinite_grads_S = jnp.stack(list(stats.nonfinite.values()))
    faults = quantization.faults(step.quant, state.quant) if step.quant is not None else {}
    finite = jnp.isfinite(found.loss) & jnp.isfinite(grad_norm) & (nonfinite_grads_S.sum() == 0)
    for _, counts in faults.values():
        finite &= counts.sum() == 0
    return Health(stats, grad_norm, nonfinite_grads_S, faults, finite)


def propose_update(step: Step, state: TrainState, inputs: Inputs, grads, health: Health, formats_Q3) -> Update:
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
        grids = quantization.weight_grids(step.quant, state.quant, formats_Q3, _weights(step, state.params))
        none = jax.tree.map(lambda leaf: None, state.params)
        extra = {
            "grids": with_weights(none, grids),
            "learning_rate": lr,
            "seed": stochastic_seed(inputs.seed, state.step, _OPTIMIZER_STREAM),
        }
    directions, opt_state = step.update_rule.update(clipped, state.opt_state, state.params, **extra)
    # Divided by the root of an infinite second moment an update is 0, and would pass for one.
    raw = jax.tree.map(
        lambda d, nu: jnp.where(jnp.isfinite(nu), -lr * d, jnp.nan), directions, optimizers.adam_moments(opt_state).nu
    )
    applied = jax.tree.map(lambda u: jnp.where(health.finite & jnp.isfinite(u), u, 0.0), raw)
    params = optax.apply_updates(state.params, applied)
    opt_state = jax.tree.map(lambda new, old: jnp.where(health.finite, new, old), opt_state, state.opt_state)
    return Update(lr, factor, raw, applied, params, opt_state)


def count_nonfinite(state: TrainState, update: Update, health: Health) -> Counts:
    """What of the update, the moments after it and the parameters before it is not finite, with their statistics."""
    layers = health.layers
    nonfinite_updates_S = jnp.stack(
        [
            sum(jnp.sum(~jnp.isfinite(u), dtype=jnp.float32) for u in arrays.values())
            for arrays in metrics.by_layer(update.raw).values()
        ]
    )
    # A damaged moment makes its update non-finite, so that healthy steps need not look at them.
    nonfinite_moments_S = jax.lax.cond(
        nonfinite_updates_S.sum() > 0,
        lambda: metrics.nonfinite_moments(optimizers.adam_moments(update.opt_state)),
        lambda: jnp.zeros(len(layers)),
    )
    nonfinite_updates_S = jnp.where(health.finite, nonfinite_updates_S, 0.0)
    param_stats = metrics.parameter_metrics(state.params)
    nonfinite_params_S = jnp.stack([param_stats[f"nonfinite_params/{layer}"] for layer in layers])
    update_stats = metrics.update_metrics(update.applied, param_stats)
    zero_update_S = jnp.stack([update_stats[f"zero_update/{layer}"] for layer in layers])
    bad = ~health.finite | (nonfinite_updates_S.sum() + nonfinite_params_S.sum() > 0)
    return Counts(
        nonfinite_updates_S, nonfinite_moments_S, nonfinite_params_S, zero_update_S, param_stats, update_stats, bad
    )


def apply_formats(
    step: Step, state: TrainState, params, updates, inputs: Inputs, statistics_Q3S, ok, bad
) -> AfterFormats:
    """What number formats do after the float32 update that led to `params`.

    Args:
      ok: whether the step was finite. bad: whether it counts towards the emergency shift.
    """
    quant = step.quant
    formats_Q3 = quantization.formats_at(inputs.formats, state.quant.level)
    level, streak, rises = quantization.next_level(quant, state.quant, bad)
    next_Q3 = quantization.formats_at(inputs.formats, level)
    history = quantization.push_history(quant, state.quant.amax_history_Q3H, statistics_Q3S, formats_Q3)
    if quant.saturate:
        history = jnp.where(ok, history, state.quant.amax_history_Q3H)
    # Where overflow becomes infinity, the amax that overflowed must enter, or every later step would overflow too.
    next_quant = state.quant._replace(amax_history_Q3H=history, level=level, bad_streak=streak)
    old, update_of = _weights(step, state.params), _weights(step, updates)
    grids = quantization.weight_grids(quant, state.quant, formats_Q3, old)
    if step.stored:
        at_rest, next_quant = store_weights(
            step,
            state,
            inputs.seed,
            next_quant,
            old,
            update_of,
            grids,
            quantization.weight_formats(quant, next_Q3),
            ok,
            rises,
        )
        params = with_weights(params, at_rest)
    entries = {}
    if step.stored or "ledger" in step.options.metric_groups:
        new = _weights(step, params)
        next_grids = quantization.weight_grids(quant, next_quant, next_Q3, new)
        entries, age = enter_ledger(step, state, next_quant, old, new, update_of, grids, next_grids, ok)
        next_quant = next_quant._replace(age=age)
    return AfterFormats(params, next_quant, entries, rises)


# Both treat matrices of one shape together (axis G): a fraction of the operations to compile and to launch.


def store_weights(step: Step, state: TrainState, seed, next_quant, old, update_of, grids, next_formats, ok, rises):
    """({layer: weights at rest after the update}, QuantState with their scales and residuals)."""
    weights, rest_scale, residual = {}, {}, {}
    for layers in quantization.by_shape(old):
        keys = [quantization.key_of(layer) for layer in layers]
        noise = owed = None
        if step.quant.weights_at_rest == "stochastic":
            noise = jnp.stack(
                [stochastic_seed(seed, state.step, _AT_REST_STREAM + step.stored.index(layer)) for layer in layers]
            )
        if step.quant.weights_at_rest == "error_feedback":
            owed = _stack([state.quant.residual[key] for key in keys])
        old_G, update_G, grid_G, format_G = (
            _stack([tree[layer] for layer in layers]) for tree in (old, update_of, grids, next_formats)
        )
        after = jax.vmap(partial(ledger.store, force=rises))(
            old_G, update_G, grid_G, format_G, residual=owed, seed=noise
        )
        # A step that is not finite changes nothing, unless the format itself changes after it. The scale before is
        # the state's: `grids` has another where that one cannot be used.
        scale_G = jnp.stack([state.quant.rest_scale[key] for key in keys]).reshape(grid_G.scale.shape)
        after = jax.tree.map(
            lambda new, before: jnp.where(ok | rises, new, before),
            after,
            ledger.Stored(old_G, owed, grid_G._replace(scale=scale_G)),
        )
        for i, (layer, key) in enumerate(zip(layers, keys)):
            weights[layer], rest_scale[key] = after.weights[i], after.grid.scale[i].reshape(())
            if owed is not None:
                residual[key] = after.residual[i]
    return weights, next_quant._replace(rest_scale=rest_scale, residual=residual)


def enter_ledger(step: Step, state: TrainState, next_quant, old, new, update_of, grids, next_grids, ok):
    """({layer: ledger entries}, {key: ages of the codes})."""
    entries, age = {}, {}
    for layers in quantization.by_shape(old):
        keys = [quantization.key_of(layer) for layer in layers]
        old_G, new_G, update_G, grid_G, next_G = (
            _stack([tree[layer] for layer in layers]) for tree in (old, new, update_of, grids, next_grids)
        )
        age_G = unlost = None
        if step.ages:
            age_G = _stack([state.quant.age[key] for key in keys])
        if step.quant.weights_at_rest == "error_feedback":
            unlost = _stack([next_quant.residual[key] != state.quant.residual[key] for key in keys])
        # Stored weights are counted on the grid they end on; operands on the one they were rounded on.
        sums_G, new_age_G = jax.vmap(ledger.entries)(
            old_G, new_G, update_G, next_G if step.stored else grid_G, age=age_G, unlost=unlost
        )
        flips_G = ledger.scale_flips(old_G if step.stored else new_G, grid_G, next_G)
        sums_G = ledger.with_scale_flips(sums_G, flips_G)
        for i, (layer, key) in enumerate(zip(layers, keys)):
            entries[layer] = sums_G[i]
            if step.ages:
                age[key] = jnp.where(ok, new_age_G[i], age_G[i])
    return entries, age


def watch(step: Step, state: TrainState, found: Gradients, health: Health, counts: Counts, entries) -> Watched:
    """The monitor after this step."""
    thresholds = step.options.thresholds
    overflow_names, overflow_O = (), None
    if step.quant is not None:
        overflow_names, overflow_O = quantization.overflow_of(step.quant, found.statistics_Q3S)
    lost_S = jnp.stack([ledger.lost_share(entries[layer]) for layer in step.stored]) if step.stored else None
    streaks, dead_metrics = stability.update_dead_streaks(
        state.monitor, health.stats.neuron_square_sum, thresholds, ok=~counts.bad
    )
    monitor, z, begins = stability.update_monitor(
        state.monitor,
        row_number=state.step + 1,
        loss=found.loss,
        bad=counts.bad,
        dead_streak=streaks,
        dead_shares=jnp.stack(list(dead_metrics.values())),
        zero_update_S=counts.zero_update_S,
        thresholds=thresholds,
        lost_S=lost_S,
        overflow_O=overflow_O,
    )
    # Elements that are all finite can still have a norm that is not.
    norm_overflow = jnp.float32(~jnp.isfinite(health.grad_norm) & (health.nonfinite_grads_S.sum() == 0))
    return Watched(monitor, z, begins, norm_overflow, dead_metrics, overflow_names)


def step_metrics(found: Gradients, health: Health, update: Update, counts: Counts, watched: Watched) -> dict:
    """The columns that every run has, whatever its metric groups."""
    row = {
        "loss": found.loss,
        "perplexity": jnp.exp(found.loss),
        "learning_rate": update.learning_rate,
        "grad_norm": health.grad_norm,
        "grad_norm_clipped": health.grad_norm * update.clip_factor,
        "loss_zscore": watched.loss_zscore,
        "nonfinite_loss": jnp.float32(~jnp.isfinite(found.loss)),
        "nonfinite_grads": health.nonfinite_grads_S.sum(),
        "nonfinite_params": counts.nonfinite_params_S.sum(),
        "nonfinite_moments": counts.nonfinite_moments_S.sum(),
        "nonfinite_updates": counts.nonfinite_updates_S.sum(),
    }
    return row | {kind: faulty.sum() for kind, (_, faulty) in health.faults.items()}


def group_metrics(
    step: Step, found: Gradients, health: Health, update: Update, counts: Counts, watched: Watched, entries
) -> dict:
    """The columns of the metric groups that are chosen."""
    o, groups, row = step.options, step.options.metric_groups, {}
    if "grad" in groups:
        row |= metrics.gradient_metrics(health.stats)
        row |= metrics.gradient_snr(optimizers.adam_moments(update.opt_state), beta1=o.beta1, beta2=o.beta2)
    if "update" in groups:
        row |= counts.update_stats
    if "param" in groups:
        row |= counts.param_stats
    if "dead" in groups:
        row |= watched.dead_metrics
    if "activation" in groups:
        row |= metrics.activation_metrics(found.output)
    if step.quant is not None and "format" in groups:
        row |= _sparse(quantization.format_metrics(step.quant, found.statistics_Q3S))
    if step.quant is not None and "ledger" in groups:
        row |= _sparse(ledger.ledger_metrics(entries, stored=bool(step.stored), ages=step.ages))
    return row


def shadow_metrics(step: Step, params, windows, number, seed, grads) -> dict:
    """Fidelity of the step's gradient, and of the bfloat16 one, to the float32 gradient; `sparse` columns."""

    def measure():
        reference = gradients(step, step.shadow, params, windows, number, seed).grads
        found = metrics.gradient_fidelity(grads, reference)
        if step.quant is not None:
            plain = gradients(step, step.plain, params, windows, number, seed).grads
            found |= metrics.gradient_fidelity(plain, reference, f"_{step.model.compute_dtype}")
        return _sparse(found)

    interval = step.options.shadow_interval
    if interval == 1:
        return measure()
    nothing = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), jax.eval_shape(measure))
    # Row k + 1 is the k-th update's: the shadow is taken at rows 1, 1 + interval, ...
    return jax.lax.cond(number % interval == 0, measure, lambda: nothing)


def alert_columns(health: Health, counts: Counts, watched: Watched, nonfinite_loss) -> dict:
    """{`alert/kind[/layer]`: value where the condition begins at this step, else 0} (see stability)."""
    layers, begins = health.layers, watched.begins
    columns = {
        "alert/nonfinite_loss": nonfinite_loss,
        "alert/nonfinite_grad_norm": watched.norm_overflow,
        "alert/loss_spike": begins["loss_spike"],
        "alert/divergence": begins["divergence"],
    }
    for kind, values, names in (
        ("nonfinite_grads", health.nonfinite_grads_S, layers),
        ("nonfinite_params", counts.nonfinite_params_S, layers),
        ("nonfinite_moments", counts.nonfinite_moments_S, layers),
        ("nonfinite_updates", counts.nonfinite_updates_S, layers),
        ("dead_layer", begins["dead_layer"], list(health.stats.neuron_square_sum)),
        ("update_stall", begins["update_stall"], layers),
    ):
        columns |= {f"alert/{kind}/{name}": values[i] for i, name in enumerate(names)}
    return columns


def format_alert_columns(step: Step, before, after: AfterFormats, watched: Watched, faults) -> dict:
    """Alerts that only formats raise: damaged histories, scales and residuals, clipping, stalls of stored weights, and
    the events of their scales and levels. `before`: the QuantState the step was made from."""
    columns = {
        f"alert/{kind}/{name}": counts[i] for kind, (names, counts) in faults.items() for i, name in enumerate(names)
    }
    for kind, names in (("overflow", watched.overflow_names), ("bit_stall", step.stored)):
        columns |= {f"alert/{kind}/{name}": watched.begins[kind][i] for i, name in enumerate(names)}
    for layer in step.stored:
        key = quantization.key_of(layer)
        moved = before.rest_scale[key] != after.quant.rest_scale[key]
        columns[f"alert/scale_moved/{layer}"] = jnp.where(moved, after.quant.rest_scale[key], 0.0)
    if step.quant.emergency_formats:
        columns["alert/format_shift"] = jnp.where(after.rises, after.quant.level, 0).astype(jnp.float32)
    return columns


def _weights(step, tree):
    """{layer: its weights} of a tree like the parameters, layers whose weights have a format."""
    return {layer: weights_of(tree, layer) for layer in step.weight_layers}


def _sparse(columns):
    return {SPARSE + name: value for name, value in columns.items()}


def _stack(trees):
    """Trees of arrays of equal shapes as one tree with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)
