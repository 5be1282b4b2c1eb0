"""The stability monitor: counters that travel in the training state, conditions decided inside the jitted step.

Nothing here needs the host: each condition is a comparison of reductions with a threshold from the config, and what
leaves the step is a column `alert/kind` or `alert/kind/layer` that is 0 except at the step where the condition
*begins*, where it holds the value that crossed the threshold. Because the counters are state, a resumed run raises the
same alerts at the same steps.

kind               begins when                                                                          value
nonfinite_loss     the loss is NaN or infinite                                                          1
nonfinite_grads    a gradient element of the layer is                                                   how many
nonfinite_grad_norm  the global gradient norm overflows although every element is finite                1
nonfinite_params   a parameter of the layer is                                                          how many
nonfinite_moments  a first or second moment of the layer is, or a second one is negative                how many
nonfinite_updates  an element of the layer's update is, or has such a moment, all else finite           how many
nonfinite_amax     an amax of an operand's history is, where a scale comes from it                      how many
nonfinite_scale    the scale of a layer's stored weights is, or is not above 0                          1
nonfinite_residual an element of a layer's residual (error feedback) is                                 how many
loss_spike         robust z-score of the loss against the last `spike_window` above spike_threshold     z-score
divergence         median of the last `spike_window` losses rises above the run's first loss            median
dead_layer         every neuron of the layer is dead                                                    share (1)
update_stall       share of the layer's elements whose update is 0, or lost because the weight is       mean
                   stored on a grid (ledger, lost_update), mean over `stall_window` steps, above
                   bit_stall_threshold
bit_stall          lost_update of a layer whose weights are stored on a grid, likewise                  mean
overflow           share of an operand's elements that are clipped above overflow_threshold             share

The non-finite kinds begin anew at every step they hold; the others are re-armed when their condition ends. One fault
raises many of them, as a parameter that is NaN makes every gradient so: `locate` names the first cause.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Fewer losses than this say nothing about their spread.
MIN_LOSSES = 20
NORMAL_MAD = 1.4826  # standard deviation of a normal variable over its median absolute deviation


class Thresholds(NamedTuple):
    """The monitor's settings, by their names in the config."""

    nan_patience: int
    bit_stall_threshold: float
    dead_neuron_threshold: float
    dead_neuron_window: int
    spike_window: int
    spike_threshold: float
    stall_window: int
    overflow_threshold: float = 0.01


class Monitor(NamedTuple):
    """Counters carried from step to step. W windows, S layers in the model's order."""

    bad_streak: jax.Array  # int32: non-finite steps in a row, up to now
    bad_steps: jax.Array  # int32: non-finite steps in all
    first_bad_step: jax.Array  # int32: row number of the first one, -1 before it
    seen: jax.Array  # int32: finite steps seen
    initial_loss: jax.Array  # float32: the first finite loss, NaN before it
    losses_W: jax.Array  # float32 [spike_window]: ring of the last finite losses, NaN where empty
    # Of int32 [outputs], in the order of neuron_layers: steps in a row below the threshold. Within a dispatch
    # {group: [n, outputs]}.
    dead_streak: tuple | dict
    zero_update_WS: jax.Array  # float32 [stall_window, layers]: ring of shares of updates that are 0 or lost
    active: dict  # {kind: bool or bool [layers]}: condition held at the last step
    lost_WS: jax.Array | None = None  # float32 [stall_window, layers with stored weights]: ring of lost_update


def init_monitor(
    thresholds: Thresholds, neurons: dict[str, int], n_layers: int, n_stored: int = 0, n_operands: int = 0
) -> Monitor:
    """A fresh monitor.

    Args:
      neurons: {layer: outputs} as metrics.neuron_layers gives it. n_stored: layers whose weights are stored on a grid.
      n_operands: operands whose clipping is watched.
    """
    no = jnp.zeros((), bool)
    formats = {}
    if n_stored:
        formats["bit_stall"] = jnp.zeros(n_stored, bool)
    if n_operands:
        formats["overflow"] = jnp.zeros(n_operands, bool)
    return Monitor(
        bad_streak=jnp.int32(0),
        bad_steps=jnp.int32(0),
        first_bad_step=jnp.int32(-1),
        seen=jnp.int32(0),
        initial_loss=jnp.float32(jnp.nan),
        losses_W=jnp.full(thresholds.spike_window, jnp.nan, jnp.float32),
        dead_streak=tuple(jnp.zeros(n, jnp.int32) for n in neurons.values()),
        zero_update_WS=jnp.zeros((thresholds.stall_window, n_layers), jnp.float32),
        active={
            "loss_spike": no,
            "divergence": no,
            "dead_layer": jnp.zeros(len(neurons), bool),
            "update_stall": jnp.zeros(n_layers, bool),
            **formats,
        },
        lost_WS=jnp.zeros((thresholds.stall_window, n_stored), jnp.float32) if n_stored else None,
    )


def is_frozen(monitor: Monitor, thresholds: Thresholds) -> jax.Array:
    """Whether so many steps in a row were non-finite that the run must stop; the state no longer changes."""
    return monitor.bad_streak >= thresholds.nan_patience


def robust_z(loss, losses_W) -> jax.Array:
    """(loss - median) / (1.4826 * MAD) of the finite entries of losses_W; 0 while there are fewer than MIN_LOSSES.

    The spread is floored at 0.1% of the median so that a plateau does not turn rounding into spikes.
    """
    median = jnp.nanmedian(losses_W)
    spread = NORMAL_MAD * jnp.nanmedian(jnp.abs(losses_W - median))
    z = (loss - median) / jnp.maximum(spread, 1e-3 * jnp.abs(median))
    return jnp.where(jnp.sum(jnp.isfinite(losses_W)) >= MIN_LOSSES, z, 0.0)


def update_dead_streaks(
    dead_streak: dict, neuron_square_sum: dict, thresholds: Thresholds, ok
) -> tuple[dict, dict[str, jax.Array]]:
    """({group: new streaks int32 [n, outputs]}, {group: share of neurons that were below the threshold all along [n]}).

    A neuron is an output column of a kernel with its bias; what is compared with dead_neuron_threshold is the L2 norm
    of its unclipped gradient. A non-finite step (`ok` false) says nothing and changes no streak.

    Args:
      dead_streak, neuron_square_sum: {group: [n, outputs]} (models.stacking), int32 and float32.
    """
    streaks, shares = {}, {}
    for group, squares in neuron_square_sum.items():
        old = dead_streak[group]
        # The cap keeps the counter from wrapping on endless runs.
        new = jnp.where(
            squares < thresholds.dead_neuron_threshold**2, jnp.minimum(old + 1, thresholds.dead_neuron_window), 0
        )
        streaks[group] = jnp.where(ok, new, old)
        shares[group] = jnp.mean(streaks[group] >= thresholds.dead_neuron_window, axis=1, dtype=jnp.float32)
    return streaks, shares


def _push(ring, slot, value, ok):
    return ring.at[slot % ring.shape[0]].set(jnp.where(ok, value, ring[slot % ring.shape[0]]))


def update_monitor(
    monitor: Monitor,
    *,
    row_number,
    loss,
    bad,
    dead_streak: tuple | dict,
    dead_shares,
    stalled_S,
    thresholds: Thresholds,
    lost_S=None,
    overflow_O=None,
) -> tuple[Monitor, jax.Array, dict[str, jax.Array]]:
    """The monitor after one step, with the alerts that begin at it.

    Args:
      row_number: int32, the step's row (state.step + 1).
      loss: float32 scalar. bad: bool, whether the step was non-finite in any way.
      dead_streak: from update_dead_streaks.
      dead_shares: float32 [layers with neurons]; stalled_S: float32 [layers], shares of updates that are 0
        or lost.
      lost_S: float32 [layers with stored weights]; overflow_O: float32 [operands]. None where init_monitor had none.

    Returns:
      (monitor, loss_zscore, {kind: float32 scalar or vector over layers}).
    """
    ok = ~bad
    slot = monitor.seen
    z = jnp.where(ok, robust_z(loss, monitor.losses_W), 0.0)
    losses_W = _push(monitor.losses_W, slot, loss, ok)
    median = jnp.nanmedian(losses_W)
    initial_loss = jnp.where(jnp.isnan(monitor.initial_loss) & ok, loss, monitor.initial_loss)
    zero_update_WS = _push(monitor.zero_update_WS, slot, stalled_S, ok)
    seen = slot + ok
    mean_stalled_S = jnp.where(seen >= thresholds.stall_window, zero_update_WS.mean(0), 0.0)

    values = {"loss_spike": z, "divergence": median, "dead_layer": dead_shares, "update_stall": mean_stalled_S}
    holds = {
        "loss_spike": z > thresholds.spike_threshold,
        "divergence": (median > initial_loss) & (seen >= MIN_LOSSES),
        "dead_layer": dead_shares >= 1.0,
        "update_stall": mean_stalled_S > thresholds.bit_stall_threshold,
    }
    lost_WS = monitor.lost_WS
    if lost_WS is not None:
        lost_WS = _push(lost_WS, slot, lost_S, ok)
        values["bit_stall"] = jnp.where(seen >= thresholds.stall_window, lost_WS.mean(0), 0.0)
        holds["bit_stall"] = values["bit_stall"] > thresholds.bit_stall_threshold
    if overflow_O is not None and "overflow" in monitor.active:
        values["overflow"], holds["overflow"] = overflow_O, overflow_O > thresholds.overflow_threshold
    # A non-finite step decides nothing about the other conditions: they stay as they were.
    holds = {kind: jnp.where(ok, now, monitor.active[kind]) for kind, now in holds.items()}
    begins = {kind: jnp.where(now & ~monitor.active[kind], values[kind], 0.0) for kind, now in holds.items()}
    first_bad = jnp.where((monitor.first_bad_step < 0) & bad, row_number, monitor.first_bad_step)
    new = Monitor(
        bad_streak=jnp.where(bad, monitor.bad_streak + 1, 0),
        bad_steps=monitor.bad_steps + bad,
        first_bad_step=first_bad.astype(jnp.int32),
        seen=seen,
        initial_loss=initial_loss,
        losses_W=losses_W,
        dead_streak=dead_streak,
        zero_update_WS=zero_update_WS,
        active=holds,
        lost_WS=lost_WS,
    )
    return new, z, begins


# Faults of the state, as they are called; in causal order, for all of them are there before the forward pass.
_STATE_FAULTS = {
    "nonfinite_params": ("non-finite parameter{s}", "in"),
    "nonfinite_moments": ("unusable moment{s} of the optimizer", "in"),
    "nonfinite_amax": ("non-finite amax{es}", "in the history of"),
    "nonfinite_scale": ("unusable scale{s}", "of the stored weights of"),
    "nonfinite_residual": ("non-finite residual{s}", "of the stored weights of"),
}


def locate(row: dict) -> str | None:
    """The first cause, in causal order, of a step that was not finite: one sentence without its full stop.

    What the state held before the step comes first; then the forward pass, by the first block whose output is not
    finite; then the backward pass, which runs from the last layer to the first, so that the last layer with non-finite
    gradients is where they began; then the gradient's norm and the update. Without the `activation` metrics it is not
    known where in the forward pass a loss became non-finite.

    Args:
      row: {name: number} of the step's columns, metrics and alerts (`alert/kind[/layer]`), layers in the model's order.

    Returns:
      The sentence; None for a finite step.
    """

    def found(kind):
        prefix = f"alert/{kind}/"
        return {
            name.removeprefix(prefix): int(value)
            for name, value in row.items()
            if name.startswith(prefix) and value != 0
        }

    for kind, (what, where) in _STATE_FAULTS.items():
        if counts := found(kind):
            total = sum(counts.values())
            many = total > 1
            return f"{total} {what.format(s='s' * many, es='es' * many)} {where} {_named(list(counts))}"
    activations = {name.removeprefix("act_amax/"): value for name, value in row.items() if name.startswith("act_amax/")}
    for block, value in activations.items():
        if not math.isfinite(value):
            return f"activations that are not finite, from {block} on"
    if row["alert/nonfinite_loss"]:
        return (
            "a loss that is not finite while the activations of every block are: the head or the batch"
            if activations
            else "a loss that is not finite (activations were not recorded)"
        )
    if counts := found("nonfinite_grads"):
        *later, first = counts
        return f"{counts[first]} non-finite gradient element{'s' * (counts[first] > 1)} in {first}" + (
            f", and backward from there in {len(later)} more layer{'s' * (len(later) > 1)}" if later else ""
        )
    if row["alert/nonfinite_grad_norm"]:
        return "a gradient norm that overflows while every element is finite"
    if counts := found("nonfinite_updates"):
        return f"non-finite updates in {_named(list(counts))} while loss, gradient and moments are finite"
    return None


def _named(places, most=3):
    more = len(places) - most
    return ", ".join(places[:most]) + (f" and {more} more" if more > 0 else "")
