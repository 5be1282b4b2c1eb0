"""The training state and the compiled functions that act on it: init, a dispatch of training steps, evaluation.

`make_step_functions` closes over every static choice and returns functions of arrays. One dispatch runs up to
`steps_per_dispatch` steps in a loop whose bound is a traced number, so one compiled program serves every remainder; the
rows of metrics are written into one preallocated [steps, metrics] array, the one thing the host fetches of every
dispatch (beside two counters of the monitor).

The batch of update k is windows k*batch_size ... (k+1)*batch_size - 1 of the run's sequence of windows, which depends
on the data seed alone (data.dataset.permute_windows). All index arithmetic of a dispatch is done once, before its loop.

What a non-finite step does: nothing but be counted. A loss, gradient or gradient norm that is not finite leaves
parameters, moments and Adam's count as they were; `state.step` advances. An update element that is not finite although
loss and gradient are (a damaged moment) is not applied, the others are, and the step counts as non-finite. After
`nan_patience` such steps in a row the loop ends early and the state changes no more.

Axes: B batch, L block_size, K steps of a dispatch, A micro-batches, M metrics, S layers, E evaluation windows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from altgrad_jax import metrics, optimizer, stability
from altgrad_jax.config import METRIC_GROUPS
from altgrad_jax.data.dataset import gather_windows, permute_windows
from altgrad_jax.model import GPT, GPTConfig, init_params


class TrainState(NamedTuple):
    """Everything a run is, between two steps. `step` = updates attempted."""

    step: jax.Array  # int32
    params: Any  # nested dict of float32
    opt_state: Any
    monitor: stability.Monitor


@dataclass(frozen=True)
class StepOptions:
    """Static choices of a training step; names and units as in the config."""

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


class StepFunctions(NamedTuple):
    """What `make_step_functions` returns.

    init: seed -> TrainState.
    run: (TrainState, data, n_steps) -> (TrainState, float32 [K, M]); the state is donated. `data` is the uint16 token
      file as a device array, or with data_on_device=False the batches uint16 [K, B, L+1]. Rows from n_steps on, and
      after the step at which the state froze, are NaN. n_steps <= steps_per_dispatch.
    evaluate: (params, windows uint16 [E, L+1]) -> float32 mean loss in nats per token.
    abstract_state: the state's shapes, dtypes and shardings, for restoring.
    metric_names: M names, in the order of the columns.
    """

    init: Callable
    run: Callable
    evaluate: Callable
    abstract_state: TrainState
    metric_names: tuple


def token_loss(logits_BLV, targets_BL):
    """Cross entropy in nats per token, float32 [B, L], through a float32 log-sum-exp."""
    target_logit_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BLV, axis=-1) - target_logit_BL


def make_loss(model: GPT):
    """loss(params, windows [B, L+1], dropout key or None) -> (mean loss, GPTOutput without logits)."""

    def loss(params, windows, dropout_key):
        tokens_BL, targets_BL = windows[:, :-1].astype(jnp.int32), windows[:, 1:].astype(jnp.int32)
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        output = model.apply({"params": params}, tokens_BL, train=dropout_key is not None, rngs=rngs)
        return token_loss(output.logits, targets_BL).mean(), output._replace(logits=None)

    return loss


def make_evaluate(model_config: GPTConfig, eval_batch_size, mesh):
    """evaluate(params, windows [E, L+1]) -> float32 mean loss in nats per token, compiled.

    The windows are taken eval_batch_size at a time (it must divide E), and the means of these equal batches averaged.
    A batch is split over the mesh where its size allows.
    """
    loss_fn = make_loss(GPT(model_config))
    split = NamedSharding(mesh, PartitionSpec("data" if eval_batch_size % mesh.size == 0 else None))

    def batch_loss(params, batch):
        return loss_fn(params, jax.lax.with_sharding_constraint(batch, split), None)[0]

    def evaluate(params, windows):
        batches = windows.reshape(-1, eval_batch_size, windows.shape[-1])
        return jax.lax.map(lambda batch: batch_loss(params, batch), batches).mean()

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))


def data_mesh(devices=None):
    """A mesh with one axis, `data`, over the given (default: all) devices. One device is the mesh of size 1."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def make_step_functions(model_config: GPTConfig, options: StepOptions, mesh, *, n_train_windows, eval_batch_size, seed):
    """Builds the compiled functions of a run; compiles nothing yet.

    Args:
      mesh: from data_mesh; its size must divide batch_size / grad_accum_steps.
      n_train_windows: windows in the training data, for the order of the epochs.
      eval_batch_size: evaluation windows per forward pass; must divide the number of windows given to evaluate.
      seed: of the dropout masks (the initialization's is an argument of init).
    """
    model = GPT(model_config)
    loss_fn = make_loss(model)
    o = options
    adam = optimizer.adamw(beta1=o.beta1, beta2=o.beta2, eps=o.adam_eps, weight_decay=o.weight_decay)
    groups = o.metric_groups
    replicated, over_batch = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    K, B, block_size = o.steps_per_dispatch, o.batch_size, model_config.block_size

    def init(seed):
        params = init_params(model_config, seed)
        monitor = stability.init_monitor(o.thresholds, metrics.neuron_layers(params), len(metrics.by_layer(params)))
        return TrainState(jnp.int32(0), params, adam.init(params), monitor)

    def gradients(params, windows, step):
        """Mean loss, mean gradient and activation statistics over the batch, in A equal micro-batches."""
        key = jax.random.fold_in(jax.random.key(seed), step) if model_config.dropout > 0 else None
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        if o.grad_accum_steps == 1:
            (loss, output), grads = value_and_grad(params, windows, key)
            return loss, grads, output

        def micro_batch(carry, item):
            windows, i = item
            windows = jax.lax.with_sharding_constraint(windows, over_batch)
            result = value_and_grad(params, windows, None if key is None else jax.random.fold_in(key, i))
            (loss, output), grads = result
            return jax.tree.map(jnp.add, carry, (loss, grads)), output

        A = o.grad_accum_steps
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        (loss, grads), outputs = jax.lax.scan(micro_batch, zeros, (windows.reshape(A, B // A, -1), jnp.arange(A)))
        output = outputs._replace(act_amax_N=outputs.act_amax_N.max(0),
                                  act_rms_N=jnp.sqrt(jnp.square(outputs.act_rms_N).mean(0)))
        return loss / A, jax.tree.map(lambda g: g / A, grads), output

    def train_step(state, windows):
        """One update; returns the next state and its row of metrics as {name: float32 scalar}."""
        loss, grads, output = gradients(state.params, windows, state.step)
        stats = metrics.gradient_stats(grads)
        grad_norm = jnp.sqrt(sum(stats.square_sum.values()))
        nonfinite_grads_S = jnp.stack(list(stats.nonfinite.values()))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (nonfinite_grads_S.sum() == 0)
        factor = optimizer.clip_factor(grad_norm, o.grad_clip)
        lr = optimizer.learning_rate(state.step, peak=o.learning_rate, warmup_steps=o.warmup_steps,
                                     max_steps=o.max_steps, schedule=o.schedule, min_lr_ratio=o.min_lr_ratio,
                                     decay_steps=o.decay_steps)

        clipped = jax.tree.map(lambda g: g * factor, grads)
        directions, opt_state = adam.update(clipped, state.opt_state, state.params)
        raw_updates = jax.tree.map(lambda d: -lr * d, directions)
        updates = jax.tree.map(lambda u: jnp.where(finite & jnp.isfinite(u), u, 0.0), raw_updates)
        params = optax.apply_updates(state.params, updates)
        opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), opt_state, state.opt_state)

        layers = list(stats.square_sum)
        nonfinite_updates_S = jnp.stack([sum(jnp.sum(~jnp.isfinite(u), dtype=jnp.float32) for u in arrays.values())
                                         for arrays in metrics.by_layer(raw_updates).values()])
        nonfinite_updates_S = jnp.where(finite, nonfinite_updates_S, 0.0)
        param_stats = metrics.parameter_metrics(state.params)
        nonfinite_params_S = jnp.stack([param_stats[f"nonfinite_params/{layer}"] for layer in layers])
        update_stats = metrics.update_metrics(updates, param_stats)
        zero_update_S = jnp.stack([update_stats[f"zero_update/{layer}"] for layer in layers])
        bad = ~finite | (nonfinite_updates_S.sum() + nonfinite_params_S.sum() > 0)

        streaks, dead_metrics = stability.update_dead_streaks(state.monitor, stats.neuron_square_sum, o.thresholds,
                                                              ok=~bad)
        monitor, z, begins = stability.update_monitor(
            state.monitor, row_number=state.step + 1, loss=loss, bad=bad, dead_streak=streaks,
            dead_shares=jnp.stack(list(dead_metrics.values())), zero_update_S=zero_update_S, thresholds=o.thresholds)

        # Elements that are all finite can still have a norm that is not.
        norm_overflow = jnp.float32(~jnp.isfinite(grad_norm) & (nonfinite_grads_S.sum() == 0))
        row = {"loss": loss, "perplexity": jnp.exp(loss), "learning_rate": lr, "grad_norm": grad_norm,
               "grad_norm_clipped": grad_norm * factor, "loss_zscore": z,
               "nonfinite_loss": jnp.float32(~jnp.isfinite(loss)),
               "nonfinite_grads": nonfinite_grads_S.sum(), "nonfinite_params": nonfinite_params_S.sum(),
               "nonfinite_updates": nonfinite_updates_S.sum()}
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
        row |= _alert_columns(begins, layers, list(stats.neuron_square_sum), row["nonfinite_loss"], norm_overflow,
                              nonfinite_grads_S,
                              nonfinite_params_S, nonfinite_updates_S)
        return TrainState(state.step + 1, params, opt_state, monitor), row

    abstract_state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
                                  jax.eval_shape(init, 0))
    names = []

    def packed_step(state, windows):
        state, row = train_step(state, windows)
        names[:], row_M = metrics.pack(row)
        return state, row_M

    abstract_windows = jax.ShapeDtypeStruct((B, block_size + 1), jnp.uint16)
    n_metrics = jax.eval_shape(packed_step, abstract_state, abstract_windows)[1].shape[0]

    def run(state, data, n_steps):
        if o.data_on_device:
            numbers = state.step.astype(jnp.uint32) * B + jnp.arange(K * B, dtype=jnp.uint32)
            index_KB = permute_windows(numbers, n_train_windows, o.data_seed, xp=jnp).reshape(K, B)

        def body(carry):
            i, state, rows_KM = carry
            windows = gather_windows(data, index_KB[i], block_size, xp=jnp) if o.data_on_device else data[i]
            if o.grad_accum_steps == 1:
                windows = jax.lax.with_sharding_constraint(windows, over_batch)
            state, row_M = packed_step(state, windows)
            return i + 1, state, rows_KM.at[i].set(row_M)

        def goes_on(carry):
            i, state, _ = carry
            return (i < n_steps) & ~stability.is_frozen(state.monitor, o.thresholds)

        rows_KM = jnp.full((K, n_metrics), jnp.nan, jnp.float32)
        _, state, rows_KM = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, rows_KM))
        return state, rows_KM

    return StepFunctions(init=jax.jit(init, out_shardings=replicated),
                         run=jax.jit(run, donate_argnums=0, out_shardings=replicated),
                         evaluate=make_evaluate(model_config, eval_batch_size, mesh),
                         abstract_state=abstract_state, metric_names=tuple(names))


def _alert_columns(begins, layers, neuron_layers, nonfinite_loss, norm_overflow, nonfinite_grads_S, nonfinite_params_S,
                   nonfinite_updates_S):
    """{`alert/kind[/layer]`: value where the condition begins at this step, else 0} (see stability)."""
    columns = {"alert/nonfinite_loss": nonfinite_loss, "alert/nonfinite_grad_norm": norm_overflow,
               "alert/loss_spike": begins["loss_spike"], "alert/divergence": begins["divergence"]}
    for kind, values, names in (("nonfinite_grads", nonfinite_grads_S, layers),
                                ("nonfinite_params", nonfinite_params_S, layers),
                                ("nonfinite_updates", nonfinite_updates_S, layers),
                                ("dead_layer", begins["dead_layer"], neuron_layers),
                                ("update_stall", begins["update_stall"], layers)):
        columns |= {f"alert/{kind}/{name}": values[i] for i, name in enumerate(names)}
    return columns
