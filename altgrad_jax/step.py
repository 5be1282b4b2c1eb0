"""The training state and the compiled functions that act on it: init, a dispatch of training steps, evaluation.

`make_step_functions` closes over every static choice and returns functions of arrays. One dispatch runs up to
`steps_per_dispatch` steps in a loop whose bound is a traced number, so one compiled program serves every remainder; the
rows of metrics are written into one preallocated [steps, metrics] array, the one thing the host fetches of every
dispatch (beside two counters of the monitor).

The batch of update k is windows k*batch_size ... (k+1)*batch_size - 1 of the run's sequence of windows, which depends
on the data seed alone (data.dataset.permute_windows). All index arithmetic of a dispatch is done once, before its loop.

What a non-finite step does: nothing but be counted. A loss, gradient or gradient norm that is not finite, or an amax
history, scale or residual from which no step can be made, leaves parameters, moments and Adam's count as they were;
`state.step` advances. A damaged moment shows only in the update, which is then under way: its element is not applied,
the others are, and the step counts as non-finite. After `nan_patience` such steps in a row the loop ends early and the
state changes no more.

Seed, learning rate and number formats are data: `run` takes them as `Inputs`, so that runs which differ in nothing
else share one compiled program, and `over_members` trains many of them in one. `init` and `evaluate` take the table of
formats (quantization.format_table), and the state carries what they remember. Without formats neither exists, and the
program is the baseline's. The shadow is the gradient of the same parameters on the same batch in float32 and without
formats, computed beside the step's own.

Columns named `sparse/NAME` stand for the metric NAME where they are not NaN: it was not measured at that step, or does
not apply.

Axes: B batch, L block_size, K steps of a dispatch, A micro-batches, M metrics, S layers, E evaluation windows, R runs.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from altgrad_jax import diagnostics, ledger, metrics, optimizer, quantization, stability
from altgrad_jax.config import METRIC_GROUPS
from altgrad_jax.cross_entropy import cross_entropy, tied_cross_entropy
from altgrad_jax.data.dataset import gather_windows, permute_windows
from altgrad_jax.mesh import constrain, gather, over_batch, replicated, scatter, split_like_parameters
from altgrad_jax.model import GPT, GPTConfig, Quantized, init_params, weights_of, with_weights
from altgrad_jax.quant_dot import combine_statistics, empty_statistics, named_statistics
from altgrad_jax.quantize import FormatParams, stochastic_seed

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


class StepFunctions(NamedTuple):
    """What `make_step_functions` returns.

    init: (seed, table) -> TrainState. `table`: the formats; left out where there are none, here and below.
    run: (TrainState, data, n_steps, Inputs) -> (TrainState, float32 [K, M]); the state is donated. `data` is the uint16
      token file as a device array, or with data_on_device=False the batches uint16 [K, B, L+1]. Rows from n_steps on,
      and after the step at which the state froze, are NaN. n_steps <= steps_per_dispatch.
    evaluate: (params, windows uint16 [E, L+1], state.quant, table) -> float32 mean loss in nats per token, by the
      forward pass of the training: quantized where it is, without dropout, every operand rounded to nearest.
    diagnose: (params, windows uint16 [B, L+1], state.quant, table) -> ({name: float32 scalar}, Observed or None): the
      rank of the weights, and with formats how a forward and backward pass over these windows uses them.
    abstract_state: the state's shapes, dtypes and shardings, for restoring.
    metric_names: M names, in the order of the columns.
    inputs: the Inputs that the options and the seed ask for, NumPy.
    """

    init: Callable
    run: Callable
    evaluate: Callable
    diagnose: Callable
    abstract_state: TrainState
    metric_names: tuple
    inputs: Inputs


def make_loss(model: GPT):
    """loss(params, windows [B, L+1], dropout key or None, Quantized or None) -> (mean, GPTOutput without hidden and
    logits). All logits exist at once only where the head's product is quantized."""
    config = model.config
    whole = "head" in dict(config.rules)

    def loss(params, windows, dropout_key, quantized=None):
        tokens_BL, targets_BL = windows[:, :-1].astype(jnp.int32), windows[:, 1:].astype(jnp.int32)
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        output = model.apply({"params": params}, tokens_BL, train=dropout_key is not None, rngs=rngs,
                             quantized=quantized, head=whole)
        if whole:
            mean = cross_entropy(output.logits, targets_BL)
        else:
            mean = tied_cross_entropy(output.hidden, weights_of(params, "head"), targets_BL,
                                      compute_dtype=config.compute_dtype, tile_bytes=config.loss_tile_bytes)
        return mean, output._replace(hidden=None, logits=None)

    return loss


def make_evaluate(model_config: GPTConfig, eval_batch_size, mesh, operands_of=lambda operands: operands):
    """evaluate(params, windows [E, L+1], *formats) -> float32 mean loss in nats per token, compiled.

    The windows are taken eval_batch_size at a time (it must divide E), and the means of these equal batches averaged.
    A batch is split over the mesh where its size allows.

    Args:
      operands_of: traced function of `formats` that gives {layer: Operands} for the layers in model_config.rules; by
        default they are passed as they are.
    """
    loss_fn = make_loss(GPT(model_config))
    layout = over_batch(mesh) if eval_batch_size % mesh.size == 0 else replicated(mesh)

    def batch_loss(params, batch, quantized):
        return loss_fn(params, constrain(batch, layout, mesh), None, quantized)[0]

    def evaluate(params, windows, *formats):
        params = gather(params, mesh)  # once for all batches
        quantized = Quantized(operands_of(*formats), {}) if model_config.rules else None
        batches = windows.reshape(-1, eval_batch_size, windows.shape[-1])
        return jax.lax.map(lambda batch: batch_loss(params, batch, quantized), batches).mean()

    return jax.jit(evaluate, out_shardings=replicated(mesh))


class Observed(NamedTuple):
    """Histograms of the quantized operands (see diagnostics); zeros for an operand without a format."""

    codes_Q3C: jax.Array  # int32, by 8-bit code; means nothing for a format of more bits
    magnitudes_Q3N: jax.Array  # int32, by whatif's bins
    scale_Q3: jax.Array  # float32, the smallest where an operand has several
    amax_Q3: jax.Array  # float32


def make_diagnose(model_config: GPTConfig, quant: quantization.QuantOptions | None, mesh):
    """diagnose(params, windows [B, L+1], state.quant, table) -> ({name: scalar}, Observed or None), compiled.

    Operands are rounded to nearest, as in an evaluation. Rank statistics: diagnostics.rank_metrics.
    """
    plain = dataclasses.replace(model_config, rules=())

    def diagnose(params, windows, quant_state=None, table=None):
        params = gather(params, mesh)
        found = diagnostics.rank_metrics(params)
        if quant is None:
            return found, None
        config = dataclasses.replace(plain, rules=tuple(
            (layer, dataclasses.replace(rule, observe=diagnostics.observe))
            for layer, rule in quantization.rules(quant)))
        operands = quantization.operands(quant, quant_state, quantization.formats_at(table, quant_state.level))
        nothing = jnp.zeros(2 * diagnostics.HISTOGRAMS, jnp.float32)
        probes = {layer: jnp.concatenate([probe, nothing]) for layer, probe in quantization.g_probes(quant).items()}
        loss_fn = make_loss(GPT(config))

        def loss(params, probes):
            return loss_fn(params, windows, None, Quantized(operands, probes))

        (_, output), (_, of_g) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, probes)
        vectors_Q3S = quantization.gather_statistics(quant, output.statistics, of_g,
                                                     jnp.concatenate([empty_statistics(), nothing]))
        fields_Q3S, rest_Q3 = jnp.split(vectors_Q3S, [len(empty_statistics())], axis=-1)
        named = named_statistics(fields_Q3S)
        return found, Observed(*diagnostics.observed(rest_Q3), named["scale"], named["amax"])

    return jax.jit(diagnose, out_shardings=replicated(mesh))


def state_shardings(state, mesh):
    """The sharding of every array of a TrainState (of arrays or of their shapes)."""
    out = jax.tree.map(lambda leaf: replicated(mesh), state)
    quant = state.quant and out.quant._replace(residual=split_like_parameters(mesh, state.quant.residual),
                                               age=split_like_parameters(mesh, state.quant.age))
    return out._replace(params=split_like_parameters(mesh, state.params),
                        opt_state=split_like_parameters(mesh, state.opt_state), quant=quant)


def make_step_functions(model_config: GPTConfig, options: StepOptions, mesh, *, n_train_windows, eval_batch_size, seed):
    """Builds the compiled functions of a run; compiles nothing yet.

    Args:
      mesh: from mesh.data_mesh; its size must divide batch_size / grad_accum_steps.
      n_train_windows: windows in the training data, for the order of the epochs.
      eval_batch_size: evaluation windows per forward pass; must divide the number of windows given to evaluate.
      seed: for `StepFunctions.inputs`.
    """
    o = options
    quant = o.quant
    plain_config = dataclasses.replace(model_config, rules=())
    if quant is not None:
        model_config = dataclasses.replace(model_config, rules=quantization.rules(quant))
    loss_fn, plain_loss_fn = make_loss(GPT(model_config)), make_loss(GPT(plain_config))
    shadow_loss_fn = make_loss(GPT(dataclasses.replace(plain_config, compute_dtype="float32", attention="xla")))
    groups = o.metric_groups
    stored = quant.stored if quant else ()
    ages = quant is not None and "ledger" in groups
    split = partial(constrain, shardings=over_batch(mesh), mesh=mesh)
    K, B, block_size = o.steps_per_dispatch, o.batch_size, model_config.block_size

    def is_quantized(params):
        """Tree of booleans: the weight matrices that have a format."""
        no = jax.tree.map(lambda leaf: False, params)
        return with_weights(no, dict.fromkeys(quant.weight_layers if quant else (), True))

    update_rule = optimizer.make(o.optimizer, beta1=o.beta1, beta2=o.beta2, eps=o.adam_eps,
                                 weight_decay=o.weight_decay, is_quantized=is_quantized)

    def operands_at(quant_state, table):
        """Operands of a pass from this state, every one rounded to nearest."""
        return quantization.operands(quant, quant_state, quantization.formats_at(table, quant_state.level))

    def init(seed, table=None):
        params = init_params(model_config, seed)
        quant_state = None
        if quant is not None:
            weights = {layer: weights_of(params, layer) for layer in quant.weight_layers}
            quant_state, at_rest = quantization.init_state(quant, weights, quantization.formats_at(table, 0), ages)
            params = with_weights(params, at_rest)
        monitor = stability.init_monitor(o.thresholds, metrics.neuron_layers(params), len(metrics.by_layer(params)),
                                         len(stored), len(quantization.overflow_watched(quant)) if quant else 0)
        return TrainState(jnp.int32(0), params, update_rule.init(params), monitor, quant_state)

    def gradients(loss_fn, params, windows, step, seed, operands=None):
        """Mean loss, mean gradient, model output, and with `operands` the statistics [Q, 3, S], over the batch in A
        equal micro-batches. `operands`: micro-batch number -> {layer: Operands}."""
        key = jax.random.fold_in(jax.random.key(seed), step) if model_config.dropout > 0 else None
        gathered = gather(params, mesh)

        def value_and_grad(windows, key, i):
            # Said once more inside the loop over micro-batches, where it costs nothing: the partitioner forgets it.
            whole = gather(gathered, mesh)
            if operands is None:
                result, grads = jax.value_and_grad(loss_fn, has_aux=True)(whole, windows, key)
                return result, scatter(grads, mesh), None

            def with_probes(params, g_probes):
                return loss_fn(params, windows, key, Quantized(operands(i), g_probes))

            (loss, output), (grads, of_g) = jax.value_and_grad(with_probes, argnums=(0, 1), has_aux=True)(
                whole, quantization.g_probes(quant))
            statistics_Q3S = quantization.gather_statistics(quant, output.statistics, of_g)
            return (loss, output._replace(statistics={})), scatter(grads, mesh), statistics_Q3S

        if o.grad_accum_steps == 1:
            (loss, output), grads, statistics_Q3S = value_and_grad(windows, key, 0)
            return loss, grads, output, statistics_Q3S

        def micro_batch(carry, item):
            windows, i = item
            windows = split(windows)
            sums, seen_Q3S = carry
            sums = constrain(sums, layout, mesh)
            result = value_and_grad(windows, None if key is None else jax.random.fold_in(key, i), i)
            (loss, output), grads, statistics_Q3S = result
            if statistics_Q3S is not None:
                seen_Q3S = combine_statistics(seen_Q3S, statistics_Q3S)
            return (jax.tree.map(jnp.add, sums, (loss, grads)), seen_Q3S), output

        A = o.grad_accum_steps
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        layout = replicated(mesh), split_like_parameters(mesh, params)
        nothing = None if operands is None else jnp.broadcast_to(empty_statistics(),
                                                                 (len(quant.layers), 3, len(empty_statistics())))
        ((loss, grads), statistics_Q3S), outputs = jax.lax.scan(
            micro_batch, (zeros, nothing), (windows.reshape(A, B // A, -1), jnp.arange(A)))
        output = outputs._replace(act_amax_N=outputs.act_amax_N.max(0),
                                  act_rms_N=jnp.sqrt(jnp.square(outputs.act_rms_N).mean(0)))
        return loss / A, jax.tree.map(lambda g: g / A, grads), output, statistics_Q3S

    def shadow_metrics(params, windows, step, seed, grads):
        """Fidelity of the step's gradient, and of the bfloat16 one, to the float32 gradient; `sparse` columns."""

        def measure():
            reference = gradients(shadow_loss_fn, params, windows, step, seed)[1]
            found = metrics.gradient_fidelity(grads, reference)
            if quant is not None:
                plain = gradients(plain_loss_fn, params, windows, step, seed)[1]
                found |= metrics.gradient_fidelity(plain, reference, f"_{model_config.compute_dtype}")
            return {SPARSE + name: value for name, value in found.items()}

        if o.shadow_interval == 1:
            return measure()
        nothing = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), jax.eval_shape(measure))
        # Row k + 1 is the k-th update's: the shadow is taken at rows 1, 1 + interval, ...
        return jax.lax.cond(step % o.shadow_interval == 0, measure, lambda: nothing)

    def apply_formats(state, params, updates, inputs, statistics_Q3S, ok, bad):
        """What number formats do after the float32 update that led to `params`.

        Returns (parameters, with stored weights on their grids; the next QuantState; {layer: ledger entries}; whether
        the emergency level rose).
        """
        formats_Q3 = quantization.formats_at(inputs.formats, state.quant.level)
        level, streak, rises = quantization.next_level(quant, state.quant, bad)
        next_Q3 = quantization.formats_at(inputs.formats, level)
        history = quantization.push_history(quant, state.quant.amax_history_Q3H, statistics_Q3S, formats_Q3)
        if quant.saturate:
            history = jnp.where(ok, history, state.quant.amax_history_Q3H)
        # Where overflow becomes infinity, the amax that overflowed must enter, or every later step would overflow too.
        next_quant = state.quant._replace(amax_history_Q3H=history, level=level, bad_streak=streak)
        old = {layer: weights_of(state.params, layer) for layer in quant.weight_layers}
        update_of = {layer: weights_of(updates, layer) for layer in quant.weight_layers}
        grids = quantization.weight_grids(quant, state.quant, formats_Q3, old)
        if stored:
            at_rest, next_quant = store_weights(state, inputs.seed, next_quant, old, update_of, grids,
                                                quantization.weight_formats(quant, next_Q3), ok, rises)
            params = with_weights(params, at_rest)
        entries = {}
        if stored or "ledger" in groups:
            new = {layer: weights_of(params, layer) for layer in quant.weight_layers}
            next_grids = quantization.weight_grids(quant, next_quant, next_Q3, new)
            entries, age = enter_ledger(state, next_quant, old, new, update_of, grids, next_grids, ok)
            next_quant = next_quant._replace(age=age)
        return params, next_quant, entries, rises

    # Both treat matrices of one shape together (axis G): a fraction of the operations to compile and to launch.

    def store_weights(state, seed, next_quant, old, update_of, grids, next_formats, ok, rises):
        """({layer: weights at rest after the update}, QuantState with their scales and residuals)."""
        weights, rest_scale, residual = {}, {}, {}
        for layers in quantization.by_shape(old):
            keys = [quantization.key_of(layer) for layer in layers]
            noise = owed = None
            if quant.weights_at_rest == "stochastic":
                noise = jnp.stack([stochastic_seed(seed, state.step, _AT_REST_STREAM + stored.index(layer))
                                   for layer in layers])
            if quant.weights_at_rest == "error_feedback":
                owed = _stack([state.quant.residual[key] for key in keys])
            old_G, update_G, grid_G, format_G = (_stack([tree[layer] for layer in layers])
                                                 for tree in (old, update_of, grids, next_formats))
            after = jax.vmap(partial(ledger.store, force=rises))(old_G, update_G, grid_G, format_G, residual=owed,
                                                                 seed=noise)
            # A step that is not finite changes nothing, unless the format itself changes after it. The scale before is
            # the state's: `grids` has another where that one cannot be used.
            scale_G = jnp.stack([state.quant.rest_scale[key] for key in keys]).reshape(grid_G.scale.shape)
            after = jax.tree.map(lambda new, before: jnp.where(ok | rises, new, before), after,
                                 ledger.Stored(old_G, owed, grid_G._replace(scale=scale_G)))
            for i, (layer, key) in enumerate(zip(layers, keys)):
                weights[layer], rest_scale[key] = after.weights[i], after.grid.scale[i].reshape(())
                if owed is not None:
                    residual[key] = after.residual[i]
        return weights, next_quant._replace(rest_scale=rest_scale, residual=residual)

    def enter_ledger(state, next_quant, old, new, update_of, grids, next_grids, ok):
        """({layer: ledger entries}, {key: ages of the codes})."""
        entries, age = {}, {}
        for layers in quantization.by_shape(old):
            keys = [quantization.key_of(layer) for layer in layers]
            old_G, new_G, update_G, grid_G, next_G = (_stack([tree[layer] for layer in layers])
                                                      for tree in (old, new, update_of, grids, next_grids))
            age_G = unlost = None
            if ages:
                age_G = _stack([state.quant.age[key] for key in keys])
            if quant.weights_at_rest == "error_feedback":
                unlost = _stack([next_quant.residual[key] != state.quant.residual[key] for key in keys])
            # Stored weights are counted on the grid they end on; operands on the one they were rounded on.
            sums_G, new_age_G = jax.vmap(ledger.entries)(old_G, new_G, update_G, next_G if stored else grid_G,
                                                         age=age_G, unlost=unlost)
            flips_G = ledger.scale_flips(old_G if stored else new_G, grid_G, next_G)
            sums_G = ledger.with_scale_flips(sums_G, flips_G)
            for i, (layer, key) in enumerate(zip(layers, keys)):
                entries[layer] = sums_G[i]
                if ages:
                    age[key] = jnp.where(ok, new_age_G[i], age_G[i])
        return entries, age

    def train_step(state, windows, inputs):
        """One update; returns the next state and its row of metrics as {name: float32 scalar}."""
        state = constrain(state, state_shardings(state, mesh), mesh)
        seed, operands, formats_Q3 = inputs.seed, None, None
        if quant is not None:
            formats_Q3 = quantization.formats_at(inputs.formats, state.quant.level)

            def operands(micro_batch):
                noise = None
                if any(quant.stochastic):
                    noise = stochastic_seed(seed, state.step, micro_batch)
                return quantization.operands(quant, state.quant, formats_Q3, noise)

        loss, grads, output, statistics_Q3S = gradients(loss_fn, state.params, windows, state.step, seed,
                                                          operands)
        stats = metrics.gradient_stats(grads)
        grad_norm = jnp.sqrt(sum(stats.square_sum.values()))
        nonfinite_grads_S = jnp.stack(list(stats.nonfinite.values()))
        quant_faults = quantization.faults(quant, state.quant) if quant is not None else {}
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (nonfinite_grads_S.sum() == 0)
        for _, counts in quant_faults.values():
            finite &= counts.sum() == 0
        factor = optimizer.clip_factor(grad_norm, o.grad_clip)
        lr = optimizer.learning_rate(state.step, peak=inputs.learning_rate, warmup_steps=o.warmup_steps,
                                     max_steps=o.max_steps, schedule=o.schedule, min_lr_ratio=o.min_lr_ratio,
                                     decay_steps=o.decay_steps)

        clipped = jax.tree.map(lambda g: g * factor, grads)
        extra = {}
        if o.optimizer != "adamw":
            grids = quantization.weight_grids(quant, state.quant, formats_Q3, {
                layer: weights_of(state.params, layer) for layer in quant.weight_layers})
            none = jax.tree.map(lambda leaf: None, state.params)
            extra = {"grids": with_weights(none, grids), "learning_rate": lr,
                     "seed": stochastic_seed(seed, state.step, _OPTIMIZER_STREAM)}
        directions, opt_state = update_rule.update(clipped, state.opt_state, state.params, **extra)
        # Divided by the root of an infinite second moment an update is 0, and would pass for one.
        raw_updates = jax.tree.map(lambda d, nu: jnp.where(jnp.isfinite(nu), -lr * d, jnp.nan), directions,
                                   optimizer.adam_moments(opt_state).nu)
        updates = jax.tree.map(lambda u: jnp.where(finite & jnp.isfinite(u), u, 0.0), raw_updates)
        params = optax.apply_updates(state.params, updates)
        opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), opt_state, state.opt_state)

        layers = list(stats.square_sum)
        nonfinite_updates_S = jnp.stack([sum(jnp.sum(~jnp.isfinite(u), dtype=jnp.float32) for u in arrays.values())
                                         for arrays in metrics.by_layer(raw_updates).values()])
        # A damaged moment makes its update non-finite, so that healthy steps need not look at them.
        nonfinite_moments_S = jax.lax.cond(
            nonfinite_updates_S.sum() > 0, lambda: metrics.nonfinite_moments(optimizer.adam_moments(opt_state)),
            lambda: jnp.zeros(len(layers)))
        nonfinite_updates_S = jnp.where(finite, nonfinite_updates_S, 0.0)
        param_stats = metrics.parameter_metrics(state.params)
        nonfinite_params_S = jnp.stack([param_stats[f"nonfinite_params/{layer}"] for layer in layers])
        update_stats = metrics.update_metrics(updates, param_stats)
        zero_update_S = jnp.stack([update_stats[f"zero_update/{layer}"] for layer in layers])
        bad = ~finite | (nonfinite_updates_S.sum() + nonfinite_params_S.sum() > 0)

        quant_state, entries, rises = state.quant, {}, jnp.bool_(False)
        if quant is not None:
            # Judged by the losses before this one, for the monitor comes later: it wants to know what was lost.
            spike = stability.robust_z(loss, state.monitor.losses_W) > o.thresholds.spike_threshold
            params, quant_state, entries, rises = apply_formats(
                state, params, updates, inputs, statistics_Q3S, ok=finite,
                bad=bad | spike | state.monitor.active["divergence"])
        overflow_names, overflow_O = quantization.overflow_of(quant, statistics_Q3S) if quant else ((), None)
        lost_S = jnp.stack([ledger.lost_share(entries[layer]) for layer in stored]) if stored else None

        streaks, dead_metrics = stability.update_dead_streaks(state.monitor, stats.neuron_square_sum, o.thresholds,
                                                              ok=~bad)
        monitor, z, begins = stability.update_monitor(
            state.monitor, row_number=state.step + 1, loss=loss, bad=bad, dead_streak=streaks,
            dead_shares=jnp.stack(list(dead_metrics.values())), zero_update_S=zero_update_S, thresholds=o.thresholds,
            lost_S=lost_S, overflow_O=overflow_O)

        # Elements that are all finite can still have a norm that is not.
        norm_overflow = jnp.float32(~jnp.isfinite(grad_norm) & (nonfinite_grads_S.sum() == 0))
        row = {"loss": loss, "perplexity": jnp.exp(loss), "learning_rate": lr, "grad_norm": grad_norm,
               "grad_norm_clipped": grad_norm * factor, "loss_zscore": z,
               "nonfinite_loss": jnp.float32(~jnp.isfinite(loss)),
               "nonfinite_grads": nonfinite_grads_S.sum(), "nonfinite_params": nonfinite_params_S.sum(),
               "nonfinite_moments": nonfinite_moments_S.sum(), "nonfinite_updates": nonfinite_updates_S.sum()}
        row |= {kind: counts.sum() for kind, (_, counts) in quant_faults.items()}
        if "grad" in groups:
            row |= metrics.gradient_metrics(stats)
            row |= metrics.gradient_snr(optimizer.adam_moments(opt_state), beta1=o.beta1, beta2=o.beta2)
        if "update" in groups:
            row |= update_stats
        if "param" in groups:
            row |= param_stats
        if "dead" in groups:
            row |= dead_metrics
        if "activation" in groups:
            row |= metrics.activation_metrics(output)
        if quant is not None and "format" in groups:
            row |= {SPARSE + name: value for name, value in quantization.format_metrics(quant, statistics_Q3S).items()}
        if quant is not None and "ledger" in groups:
            row |= {SPARSE + name: value for name, value in ledger.ledger_metrics(
                entries, stored=bool(stored), ages=ages).items()}
        if o.use_shadow:
            row |= shadow_metrics(state.params, windows, state.step, seed, grads)
        if quant is not None and quant.emergency_formats:
            row["format_level"] = state.quant.level.astype(jnp.float32)
        row |= _alert_columns(begins, layers, list(stats.neuron_square_sum), row["nonfinite_loss"], norm_overflow,
                              nonfinite_grads_S, nonfinite_params_S, nonfinite_moments_S, nonfinite_updates_S)
        if quant is not None:
            row |= _format_alert_columns(begins, stored, overflow_names, quant, state.quant, quant_state, rises,
                                         quant_faults)
        state = TrainState(state.step + 1, params, opt_state, monitor, quant_state)
        return constrain(state, state_shardings(state, mesh), mesh), row

    given = Inputs(np.int32(seed), np.float32(o.learning_rate),
                   None if quant is None else quantization.format_table(quant))
    shapes = jax.eval_shape(init, 0, given.formats)
    shardings = state_shardings(shapes, mesh)
    abstract_state = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes,
                                  shardings)
    names = []

    def packed_step(state, windows, inputs):
        state, row = train_step(state, windows, inputs)
        names[:], row_M = metrics.pack(row)
        return state, row_M

    abstract_windows = jax.ShapeDtypeStruct((B, block_size + 1), jnp.uint16)
    n_metrics = jax.eval_shape(packed_step, abstract_state, abstract_windows, given)[1].shape[0]

    def run(state, data, n_steps, inputs):
        if o.data_on_device:
            numbers = state.step.astype(jnp.uint32) * B + jnp.arange(K * B, dtype=jnp.uint32)
            index_KB = permute_windows(numbers, n_train_windows, o.data_seed, xp=jnp).reshape(K, B)

        def body(carry):
            i, state, rows_KM = carry
            windows = gather_windows(data, index_KB[i], block_size, xp=jnp) if o.data_on_device else data[i]
            if o.grad_accum_steps == 1:
                windows = split(windows)
            state, row_M = packed_step(state, windows, inputs)
            return i + 1, state, rows_KM.at[i].set(row_M)

        def goes_on(carry):
            i, state, _ = carry
            return (i < n_steps) & ~stability.is_frozen(state.monitor, o.thresholds)

        rows_KM = jnp.full((K, n_metrics), jnp.nan, jnp.float32)
        _, state, rows_KM = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, rows_KM))
        return state, rows_KM

    return StepFunctions(init=jax.jit(init, out_shardings=shardings),
                         run=jax.jit(run, donate_argnums=0, out_shardings=(shardings, replicated(mesh))),
                         evaluate=make_evaluate(model_config, eval_batch_size, mesh, operands_at),
                         diagnose=make_diagnose(model_config, quant, mesh),
                         abstract_state=abstract_state, metric_names=tuple(names), inputs=given)


class MemberFunctions(NamedTuple):
    """What `over_members` returns: functions of StepFunctions for R runs at once.

    run: (TrainStates [R, ...], data, n_steps int32 [R], Inputs [R, ...]) -> (TrainStates, float32 [R, K, M]).
    evaluate: (params [R, ...], windows, state.quant [R, ...], formats [R, ...]) -> float32 [R].
    stack: (list of trees, one a run) -> tree [R, ...] on the devices. pick: (tree [R, ...], r) -> tree of run r.
    abstract: (tree of one run, R) -> shapes, dtypes and shardings of R of them. replicated: sharding of shared arrays.
    """

    run: Callable
    evaluate: Callable
    stack: Callable
    pick: Callable
    abstract: Callable
    replicated: NamedSharding


def over_members(functions: StepFunctions, devices, member_loop="map"):
    """The functions of a single run for R runs that differ in their Inputs, seed of the initialization and steps made.

    The runs are split over the devices, which must divide R, and on each device taken

    map: one after the other: each computes what it computes alone, to the bit.
    vmap: together, in batched products, whose sums round in another order; for a GPU that one run leaves idle.

    The data are one array for all. A run that freezes makes no more updates, whatever the others do.

    Args:
      functions: made for a mesh of one device.
    """
    mesh = jax.make_mesh((len(devices),), ("run",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    by_run = NamedSharding(mesh, PartitionSpec("run"))

    def each(function, shared, *trees_R):
        """function(shared, *trees of a run) for every run."""
        if member_loop == "vmap":
            return jax.vmap(partial(function, shared))(*trees_R)
        return jax.lax.map(lambda trees: function(shared, *trees), trees_R)

    def on_devices(function):
        """The same, with runs split over the devices; `function` takes what is shared first."""
        every = partial(each, function)
        if len(devices) == 1:
            return every

        def call(shared, *trees_R):
            specs = PartitionSpec(), *[PartitionSpec("run")] * len(trees_R)
            return jax.shard_map(every, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("run"), check_vma=False)(
                shared, *trees_R)

        return call

    # The functions behind their jit, which asks for the shardings of a run by itself.
    run, evaluate = functions.run.__wrapped__, functions.evaluate.__wrapped__
    run_each = on_devices(lambda data, state, n, inputs: run(state, data, n, inputs))
    evaluate_each = on_devices(lambda windows, params, *formats: evaluate(params, windows, *formats))

    def stack(trees):
        return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves), by_run), *jax.device_get(trees))

    def abstract(tree, n_runs):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n_runs, *np.shape(leaf)), leaf.dtype, sharding=by_run),
                            tree)

    return MemberFunctions(
        run=jax.jit(lambda state_R, data, n_R, inputs_R: run_each(data, state_R, n_R, inputs_R), donate_argnums=0,
                    out_shardings=by_run),
        evaluate=jax.jit(lambda params_R, windows, *formats: evaluate_each(windows, params_R, *formats),
                         out_shardings=by_run),
        stack=stack, abstract=abstract, replicated=replicated(mesh),
        pick=jax.jit(lambda tree, r: jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, r, keepdims=False),
                                                  tree), out_shardings=replicated(mesh)))


def _stack(trees):
    """Trees of arrays of equal shapes as one tree with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


def _alert_columns(begins, layers, neuron_layers, nonfinite_loss, norm_overflow, nonfinite_grads_S, nonfinite_params_S,
                   nonfinite_moments_S, nonfinite_updates_S):
    """{`alert/kind[/layer]`: value where the condition begins at this step, else 0} (see stability)."""
    columns = {"alert/nonfinite_loss": nonfinite_loss, "alert/nonfinite_grad_norm": norm_overflow,
               "alert/loss_spike": begins["loss_spike"], "alert/divergence": begins["divergence"]}
    for kind, values, names in (("nonfinite_grads", nonfinite_grads_S, layers),
                                ("nonfinite_params", nonfinite_params_S, layers),
                                ("nonfinite_moments", nonfinite_moments_S, layers),
                                ("nonfinite_updates", nonfinite_updates_S, layers),
                                ("dead_layer", begins["dead_layer"], neuron_layers),
                                ("update_stall", begins["update_stall"], layers)):
        columns |= {f"alert/{kind}/{name}": values[i] for i, name in enumerate(names)}
    return columns


def _format_alert_columns(begins, stored, overflow_names, quant, before, after, rises, faults):
    """Alerts that only formats raise: damaged histories, scales and residuals, clipping, stalls of stored weights, and
    the events of their scales and levels."""
    columns = {f"alert/{kind}/{name}": counts[i] for kind, (names, counts) in faults.items()
               for i, name in enumerate(names)}
    for kind, names in (("overflow", overflow_names), ("bit_stall", stored)):
        columns |= {f"alert/{kind}/{name}": begins[kind][i] for i, name in enumerate(names)}
    for layer in stored:
        key = quantization.key_of(layer)
        moved = before.rest_scale[key] != after.rest_scale[key]
        columns[f"alert/scale_moved/{layer}"] = jnp.where(moved, after.rest_scale[key], 0.0)
    if quant.emergency_formats:
        columns["alert/format_shift"] = jnp.where(rises, after.level, 0).astype(jnp.float32)
    return columns
