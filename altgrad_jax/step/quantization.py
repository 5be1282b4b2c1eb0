"""The number formats of a run: which operands have one, with which scale at this step, and what it did to them.

Static choices are a `QuantOptions`. The formats themselves are data: `format_table` turns their names into arrays that
the compiled step takes as an argument, so one program trains in any formats of at most 7 mantissa bits. What changes
from step to step (amax histories, the level of the emergency shift, the scales of stored weights) is a `QuantState`
inside the training state: saved, restored and resumed with it.

Delayed scaling (Micikevicius et al. 2022): the scale of an operand comes from the largest amax of the last `history`
updates. Before the first update, and while all were zero, it comes from the operand's own amax. A non-finite step
leaves histories as they are. With saturate=False its finite amaxes enter, because an overflow may have made the step
non-finite.

Two interventions, both off by default:

range_clip c > 0  limits the amax that enters the history of G to c * R * rms(G), where R = min(largest finite, 2^16) /
                  smallest positive number of the format. At c = 1 outliers can push the rms of a gradient down to the
                  smallest number of the format and no further. Values beyond the largest number saturate.
emergency shift   after `emergency_patience` bad updates in a row, every quantized operand changes to the next format of
                  `emergency_formats`, without compiling anything. Bad: not finite, or a loss spike, or divergence.

Axes: Q quantized layers, 3 operands (W, A, G), H history, S statistics fields, E levels (1 + emergency formats).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.config import for_operands
from altgrad_jax.numerics import products
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.products import (
    FIELDS,
    Operand,
    Operands,
    Rule,
    combine_statistics,
    empty_statistics,
    scale_for,
)
from altgrad_jax.numerics.rounding import FormatParams, Grid, format_params, stochastic_seed, to_grid
from altgrad_jax.numerics.rules import FLOAT8, HEAD, OPERANDS, LayerFormats, resolve_rules
from altgrad_jax.numerics.scales import LARGEST_SCALED


@dataclass(frozen=True)
class QuantOptions:
    """Static choices, by their names in the config.

    layers: the quantized layers with the names of their formats (rules.resolve_rules). scaling, stochastic: of
    W, A and G.
    """

    layers: tuple[LayerFormats, ...]
    scaling: tuple[str, str, str] = ("delayed", "delayed", "delayed")
    amax_history: int = 16
    power_of_two: bool = True
    stochastic: tuple[bool, bool, bool] = (False, False, False)
    saturate: bool = True
    native: bool = False
    weights_at_rest: str = "float32"
    range_clip: float = 0.0
    emergency_formats: tuple[str, ...] = ()
    emergency_patience: int = 0

    @property
    def stored(self) -> tuple[str, ...]:
        """Layers whose weights are stored on their format's grid."""
        if self.weights_at_rest == "float32":
            return ()
        return self.weight_layers

    @property
    def weight_layers(self) -> tuple[str, ...]:
        """Layers whose weights have a format."""
        return tuple(layer.layer for layer in self.layers if layer.w)


def options_of(config: Mapping[str, Any]) -> QuantOptions | None:
    """The options that a run's settings (a mapping, as in the config or a checkpoint) ask for; None without formats."""
    if not config["use_fp8"]:
        return None
    w, a, g = for_operands(config["operand_rounding"])
    same_name = ("amax_history", "saturate", "weights_at_rest", "range_clip", "emergency_patience")
    return QuantOptions(
        layers=resolve_rules(tuple(config["formats"]), config["n_layer"]),
        scaling=for_operands(config["scaling"]),
        power_of_two=config["scale_rounding"] == "power_of_two",
        stochastic=(w == "stochastic", a == "stochastic", g == "stochastic"),
        native=config["products"] == "native",
        emergency_formats=tuple(config["emergency_formats"]),
        **{name: config[name] for name in same_name},
    )


class QuantState(NamedTuple):
    """What the formats carry from step to step. Dicts are keyed by layer with `/` written as `.`."""

    amax_history_Q3H: jax.Array  # float32, oldest first
    level: jax.Array  # int32: 0, or which of the emergency formats is in use
    bad_streak: jax.Array  # int32: bad updates in a row
    rest_scale: dict  # float32 scalars: of stored weights
    residual: dict  # bfloat16 [K, N]: what error feedback still owes
    age: dict  # uint16 [K, N]: updates since the weight's code last changed, at most 65535


def key_of(layer: str) -> str:
    """A layer's name as a key of the state: checkpoints use `/` between levels."""
    return layer.replace("/", ".")


def rules(options: QuantOptions) -> tuple[tuple[str, Rule], ...]:
    """The static rule of each quantized layer, for GPTConfig."""
    out = []
    for layer in options.layers:
        names = [name for name in layer.wag if name] + list(options.emergency_formats)
        wide = any(get_format(name).mantissa_bits > 7 for name in names)
        native = None
        if options.native:
            assert layer.w and layer.a and layer.g, "the config refuses native products with an operand of no format"
            native = FLOAT8[layer.w], FLOAT8[layer.a], FLOAT8[layer.g]
        w, a, g = options.scaling
        out.append(
            (layer.layer, Rule(w, a, g, float32_operands=wide, power_of_two=options.power_of_two, native=native))
        )
    return tuple(out)


def format_table(options: QuantOptions) -> FormatParams:
    """The formats as data: NumPy arrays [E, Q, 3]. An operand without one has BF16's entries, which are not read."""

    def params(name):
        return format_params(get_format(name or "BF16"), saturate=options.saturate or name is None)

    levels = [[[params(name) for name in layer.wag] for layer in options.layers]]
    levels += [
        [[params(name if own else None) for own in layer.wag] for layer in options.layers]
        for name in options.emergency_formats
    ]
    return jax.tree.map(
        lambda *leaves: np.stack(leaves).reshape(len(levels), len(options.layers), 3),
        *[entry for level in levels for row in level for entry in row],
    )


def _at(params, *index):
    return FormatParams(*(field[index] for field in params))


def formats_at(table: FormatParams, level) -> FormatParams:
    """The formats in use at a level: arrays [Q, 3]."""
    return _at(table, level)


def by_shape(weights: dict) -> list[list[str]]:
    """The layers grouped by the shape of their weights, in the order of the model.

    The head is a group of its own, because its table has the output axis first.
    """
    groups = {}
    for layer, w in weights.items():
        groups.setdefault((w.shape, layer == HEAD), []).append(layer)
    return list(groups.values())


def weight_formats(options: QuantOptions, formats_Q3: FormatParams) -> dict:
    """{layer: FormatParams of its weights}, layers whose weights have a format."""
    return {layer.layer: _at(formats_Q3, q, 0) for q, layer in enumerate(options.layers) if layer.w}


def init_state(options: QuantOptions, weights: dict, formats_Q3: FormatParams, ages: bool) -> tuple[QuantState, dict]:
    """(state, {layer: weights as they are stored}) of a fresh run. `weights`: of the layers whose W has a format.

    Args:
      ages: whether to keep the age of every weight's code, for the ledger.
    """
    params = weight_formats(options, formats_Q3)
    rest_scale, stored = {}, {}
    for layer in options.stored:
        scale = scale_for(jnp.max(jnp.abs(weights[layer])), params[layer])
        rest_scale[key_of(layer)] = scale
        stored[layer] = to_grid(weights[layer], Grid(params[layer], scale))
    residual = options.stored if options.weights_at_rest == "error_feedback" else ()
    state = QuantState(
        amax_history_Q3H=jnp.zeros((len(options.layers), 3, options.amax_history), jnp.float32),
        level=jnp.int32(0),
        bad_streak=jnp.int32(0),
        rest_scale=rest_scale,
        residual={key_of(layer): jnp.zeros(weights[layer].shape, jnp.bfloat16) for layer in residual},
        age={key_of(layer): jnp.zeros(weights[layer].shape, jnp.uint16) for layer in options.weight_layers if ages},
    )
    return state, stored


def operands(options: QuantOptions, state: QuantState, formats_Q3: FormatParams, seed=None) -> dict[str, Operands]:
    """{layer: Operands} of the forward and backward pass from this state.

    Args:
      seed: uint32 [2], fresh for every pass, for the operands that are rounded stochastically; None rounds all of them
        to nearest, as an evaluation does.
    """
    scale_Q3 = products.delayed_scale(state.amax_history_Q3H, formats_Q3, options.power_of_two)
    out = {}
    for q, layer in enumerate(options.layers):
        members = []
        for i, name in enumerate(layer.wag):
            if name is None:
                members.append(None)
                continue
            at_rest = i == 0 and layer.layer in options.stored
            scale = state.rest_scale[key_of(layer.layer)] if at_rest else scale_Q3[q, i]
            # Weights that are stored on the grid are not rounded a second time.
            noise = None
            if options.stochastic[i] and seed is not None and not at_rest:
                noise = stochastic_seed(seed[0], seed[1], 3 * q + i)
            members.append(Operand(_at(formats_Q3, q, i), scale, noise))
        out[layer.layer] = Operands(*members)
    return out


def g_probes(options: QuantOptions) -> dict:
    """{layer: float32 [S]}: the arguments whose gradients are the statistics of the output gradients."""
    return {layer.layer: empty_statistics() for layer in options.layers if layer.g}


def no_statistics(options: QuantOptions) -> jax.Array:
    """float32 [Q, 3, S] that changes nothing when combined with the statistics of a pass."""
    return jnp.broadcast_to(empty_statistics(), (len(options.layers), 3, len(empty_statistics())))


def gather_statistics(options: QuantOptions, forward: dict, backward: dict, nothing=None) -> jax.Array:
    """float32 [Q, 3, S] from the forward pass's {layer: Statistics} and the probes' gradients {layer: [S]}; `nothing`
    (default: empty_statistics) for operands without a format."""
    nothing = jnp.asarray(empty_statistics()) if nothing is None else nothing
    rows = []
    for layer in options.layers:
        found = (*forward[layer.layer], backward.get(layer.layer))
        rows.append(jnp.stack([nothing if vector is None else vector for vector in found]))
    return jnp.stack(rows)


def push_history(options: QuantOptions, history_Q3H, statistics_Q3S, formats_Q3: FormatParams) -> jax.Array:
    """The amax histories after an update with these statistics."""
    field = {name: statistics_Q3S[..., i] for i, name in enumerate(FIELDS)}
    amax_Q3 = field["amax"]
    if options.range_clip:
        reach = jnp.minimum(formats_Q3.max_finite, LARGEST_SCALED) * jnp.exp2(
            (formats_Q3.mantissa_bits - formats_Q3.min_exponent).astype(jnp.float32)
        )
        limit = options.range_clip * reach * jnp.sqrt(field["signal"] / jnp.maximum(field["count"], 1))
        limit = jnp.where(jnp.isnan(limit), jnp.inf, limit)  # 0 times a range beyond float32
        amax_Q3 = amax_Q3.at[:, 2].set(jnp.minimum(amax_Q3, limit)[:, 2])
    return products.push_amax(history_Q3H, amax_Q3)


def faults(options: QuantOptions, state: QuantState) -> dict[str, tuple[Sequence[str], jax.Array]]:
    """Values of the state from which no step can be made: {kind of alert: (layers or `layer/operand`, float32 counts)}.

    nonfinite_amax: in the histories that a scale comes from. nonfinite_scale: of stored weights, not finite or not
    above 0. nonfinite_residual: of error feedback. Only kinds that the options have.
    """
    read = [
        (q, i)
        for q, layer in enumerate(options.layers)
        for i in range(3)
        if layer.wag[i] and options.scaling[i] == "delayed" and not (i == 0 and layer.layer in options.stored)
    ]
    rows, columns = np.array(read, int).reshape(-1, 2).T
    count_Q3 = jnp.sum(~jnp.isfinite(state.amax_history_Q3H), axis=-1, dtype=jnp.float32)
    names = [f"{options.layers[q].layer}/{OPERANDS[i]}" for q, i in read]
    found: dict[str, tuple[Sequence[str], jax.Array]] = {"nonfinite_amax": (names, count_Q3[rows, columns])}
    if options.stored:
        scales = jnp.stack([state.rest_scale[key_of(layer)] for layer in options.stored])
        found["nonfinite_scale"] = options.stored, jnp.float32(~(jnp.isfinite(scales) & (scales > 0)))
    if options.stored and options.weights_at_rest == "error_feedback":
        counts = [jnp.sum(~jnp.isfinite(state.residual[key_of(layer)]), dtype=jnp.float32) for layer in options.stored]
        found["nonfinite_residual"] = options.stored, jnp.stack(counts)
    return found


def next_level(options: QuantOptions, state: QuantState, bad) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(level, bad streak, whether the level rose) after an update that was `bad` or not."""
    if not options.emergency_formats:
        return state.level, state.bad_streak, jnp.bool_(False)
    streak = jnp.where(bad, state.bad_streak + 1, 0)
    rises = (streak >= options.emergency_patience) & (state.level < len(options.emergency_formats))
    return state.level + rises, jnp.where(rises, 0, streak), rises


def _applies(options: QuantOptions, layer: LayerFormats, i: int, statistic: str) -> bool:
    """Whether a statistic says anything about an operand.

    A scale from the operand's own amax clips nothing by construction, and stored weights are not rounded again.
    """
    if i == 0 and layer.layer in options.stored:
        return statistic in ("amax", "scale", "dynamic_range")
    return options.scaling[i] in ("delayed", "none") or statistic not in ("overflow", "clipped_energy")


def format_metrics(options: QuantOptions, statistics_Q3S) -> dict[str, jax.Array]:
    """{`statistic/layer/W|A|G`: float32} by products.named_statistics, and `statistic/all/W|A|G`, which is taken over
    all elements of all quantized layers together (overflow, underflow, clipped_energy, sqnr_db)."""
    named = products.named_statistics(statistics_Q3S)
    out = {}
    for q, layer in enumerate(options.layers):
        for i, operand in enumerate(OPERANDS):
            if layer.wag[i]:
                out |= {
                    f"{name}/{layer.layer}/{operand}": values_Q3[q, i]
                    for name, values_Q3 in named.items()
                    if _applies(options, layer, i, name)
                }
    for i, operand in enumerate(OPERANDS):
        rows = [q for q, layer in enumerate(options.layers) if layer.wag[i]]
        if rows:
            total_S = statistics_Q3S[rows[0], i]
            for q in rows[1:]:
                total_S = combine_statistics(total_S, statistics_Q3S[q, i])
            total = products.named_statistics(total_S)
            out |= {
                f"{name}/all/{operand}": total[name]
                for name in ("overflow", "underflow", "clipped_energy", "sqnr_db")
                if _applies(options, options.layers[rows[0]], i, name)
            }
    return out


def overflow_watched(options: QuantOptions) -> list[tuple[int, int]]:
    """[(q, i)]: layer number and operand of all that can be clipped."""
    return [
        (q, i)
        for q, layer in enumerate(options.layers)
        for i in range(3)
        if layer.wag[i] and _applies(options, layer, i, "overflow")
    ]


def overflow_of(options: QuantOptions, statistics_Q3S) -> tuple[list[str], jax.Array]:
    """(names `layer/operand`, float32 shares of clipped elements, 0 where not applicable) for the monitor."""
    overflow_Q3 = products.named_statistics(statistics_Q3S)["overflow"]
    where = overflow_watched(options)
    names = [f"{options.layers[q].layer}/{OPERANDS[i]}" for q, i in where]
    shares = jnp.stack([overflow_Q3[q, i] for q, i in where]) if where else jnp.zeros(0, jnp.float32)
    return names, jnp.where(jnp.isnan(shares), 0.0, shares)


def weight_grids(options: QuantOptions, state: QuantState, formats_Q3: FormatParams, weights: dict) -> dict[str, Grid]:
    """{layer: Grid} that the weights were rounded on as operands, or are stored on, at this step."""
    used = operands(options, state, formats_Q3)
    rule_of = dict(rules(options))
    grids = {}
    for layer in options.weight_layers:
        w = used[layer].w
        assert w is not None, "these layers have a format for W"
        scale = products.weight_scale(weights[layer], w, rule_of[layer], w_is_NK=layer == HEAD)
        grids[layer] = Grid(w.format, scale)
    return grids
