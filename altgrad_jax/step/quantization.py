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

Within a dispatch, layers of one name in neighbouring blocks are a group, and what is said of them has a leading axis
(models.stacking): dictionaries of weights, operands and grids are keyed by group there.

Axes: Q quantized layers, 3 operands (W, A, G), H history, S statistics fields, E levels (1 + emergency formats), n
layers of a group.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.config import for_operands
from altgrad_jax.models.config import ModelConfig
from altgrad_jax.models.stacking import Segments, group_of, layers_of, stack
from altgrad_jax.numerics import products
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.layers import HEAD
from altgrad_jax.numerics.products import (
    FIELDS,
    Operand,
    Operands,
    Rule,
    empty_statistics,
    scale_for,
)
from altgrad_jax.numerics.rounding import FormatParams, Grid, format_params, stochastic_seed, to_grid
from altgrad_jax.numerics.rules import FLOAT8, OPERANDS, LayerFormats, resolve_rules
from altgrad_jax.numerics.scales import LARGEST_SCALED
from altgrad_jax.numerics.sums import combine_all
from altgrad_jax.step.metrics import BY_SIZE, Columns, joined, mean_by_size, over, scalars, sqnr_db_by_size


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

    def segments(self, n_layer: int) -> Segments:
        """Runs of neighbouring blocks whose layers are computed alike, whatever their formats' names."""
        kinds = [
            tuple(
                (row.layer.partition("/")[2], [name is not None for name in row.wag], _rule(self, row))
                for row in self.layers
                if row.layer.startswith(f"block_{i}/")
            )
            for i in range(n_layer)
        ]
        firsts = [i for i in range(n_layer) if i == 0 or kinds[i] != kinds[i - 1]]
        return tuple(zip(firsts, [*firsts[1:], n_layer]))


def options_of(config: Mapping[str, Any]) -> QuantOptions | None:
    """The options that a run's settings (a mapping, as in the config or a checkpoint) ask for; None without formats."""
    if not config["use_fp8"]:
        return None
    w, a, g = for_operands(config["operand_rounding"])
    same_name = ("amax_history", "saturate", "weights_at_rest", "range_clip", "emergency_patience")
    return QuantOptions(
        layers=resolve_rules(tuple(config["formats"]), config["n_layer"], config["model"]),
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
    """A layer's or a group's name as a key of the state: checkpoints use `/` between levels."""
    return layer.replace("/", ".")


@dataclass(frozen=True)
class Group:
    """Quantized layers of one name in a segment.

    rows: where they stand among QuantOptions.layers. has: whether W, A and G have a format.
    """

    name: str
    rows: tuple[int, ...]
    has: tuple[bool, bool, bool]

    @property
    def key(self) -> str:
        """Its name as a key of the state."""
        return key_of(self.name)

    def of(self, array_Q):
        """The entries [n, ...] of these layers in an array or a tree of arrays [Q, ...]."""
        first, *others = self.rows
        step = others[0] - first if others else 1
        assert self.rows == tuple(range(first, first + step * len(self.rows), step)), "blocks of a segment are alike"
        where = slice(first, first + step * len(self.rows), step)
        return jax.tree.map(lambda leaf: leaf[where], array_Q)


def groups(options: QuantOptions, segments: Segments) -> tuple[Group, ...]:
    """The groups of quantized layers, in the order in which the model first reaches them."""
    return grouped([row.layer for row in options.layers], [_has_format(row) for row in options.layers], segments)


def _has_format(row: LayerFormats) -> tuple[bool, bool, bool]:
    return row.w is not None, row.a is not None, row.g is not None


def grouped(layers: Sequence[str], has: Sequence[tuple[bool, bool, bool]], segments: Segments) -> tuple[Group, ...]:
    """The groups of these layers; `has`: whether W, A and G of each have a format."""
    rows: dict[str, list[int]] = {}
    for q, layer in enumerate(layers):
        rows.setdefault(group_of(layer, segments), []).append(q)
    return tuple(Group(name, tuple(at), has[at[0]]) for name, at in rows.items())


def in_layer_order(groups: Sequence[Group], parts_n: Sequence[Any]) -> Any:
    """Arrays [Q, ...] from the groups' arrays [n, ...], or from trees of them."""
    order = np.argsort([q for group in groups for q in group.rows], kind="stable")
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *parts_n)


def _rule(options: QuantOptions, layer: LayerFormats) -> Rule:
    """The static rule of a quantized layer."""
    names = [name for name in layer.wag if name] + list(options.emergency_formats)
    wide = any(get_format(name).mantissa_bits > 7 for name in names)
    native = None
    if options.native:
        assert layer.w and layer.a and layer.g, "the config refuses native products with an operand of no format"
        native = FLOAT8[layer.w], FLOAT8[layer.a], FLOAT8[layer.g]
    w, a, g = options.scaling
    return Rule(w, a, g, float32_operands=wide, power_of_two=options.power_of_two, native=native)


def quantized_model(plain: ModelConfig, options: QuantOptions) -> ModelConfig:
    """The model with the rules of its quantized layers."""
    found = {group_of(row.layer, plain.segments): _rule(options, row) for row in options.layers}
    return dataclasses.replace(plain, rules=tuple(found.items()))


def layout(plain: ModelConfig, options: QuantOptions | None) -> ModelConfig:
    """The model whose blocks are taken together as these formats allow."""
    return plain if options is None else dataclasses.replace(plain, split=options.segments(plain.n_layer))


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


def weight_formats(groups: Sequence[Group], formats_Q3: FormatParams) -> dict:
    """{group: FormatParams [n] of its weights}, groups whose weights have a format."""
    return {group.name: _at(group.of(formats_Q3), slice(None), 0) for group in groups if group.has[0]}


def init_state(options: QuantOptions, weights: dict, formats_Q3: FormatParams, ages: bool) -> tuple[QuantState, dict]:
    """(state, {layer: weights as they are stored}) of a fresh run, every layer by its own name.

    Args:
      weights: {layer: float32 [K, N]} of the layers whose W has a format.
      ages: whether to keep the age of every weight's code, for the ledger.
    """
    row = {layer.layer: q for q, layer in enumerate(options.layers)}
    rest_scale, stored = {}, {}
    for layer in options.stored:
        fmt = _at(formats_Q3, row[layer], 0)
        scale = scale_for(jnp.max(jnp.abs(weights[layer])), fmt)
        rest_scale[key_of(layer)] = scale
        stored[layer] = to_grid(weights[layer], Grid(fmt, scale))
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


_OF_WEIGHTS = ("rest_scale", "residual", "age")


def stacked(state: QuantState, segments: Segments) -> QuantState:
    """A state whose dictionaries are keyed by group, with arrays [n, ...]; a layer by itself gets n = 1 too."""
    return stack_fields(state, segments, _OF_WEIGHTS)


def unstacked(state: QuantState) -> QuantState:
    """The inverse of `stacked`."""
    return unstack_fields(state, _OF_WEIGHTS)


def stack_fields(state: Any, segments: Segments, names: Sequence[str]) -> Any:
    """`stacked`, of these fields of a NamedTuple."""

    def with_axis(tree):
        return {key: value if ":" in key else value[None] for key, value in stack(tree, segments).items()}

    return state._replace(**{name: with_axis(getattr(state, name)) for name in names})


def unstack_fields(state: Any, names: Sequence[str]) -> Any:
    """The inverse of `stack_fields`."""

    def by_layer(tree):
        return {layer: value[k] for key, value in tree.items() for k, layer in enumerate(layers_of(key))}

    return state._replace(**{name: by_layer(getattr(state, name)) for name in names})


def operands(
    options: QuantOptions, groups: Sequence[Group], state: QuantState, formats_Q3: FormatParams, seed=None
) -> dict[str, Operands]:
    """{group: Operands, leaves [n, ...]} of the forward and backward pass from this state.

    Args:
      state: stacked; only scales are read.
      seed: uint32 [2], fresh for every pass, for the operands that are rounded stochastically; None rounds all of them
        to nearest, as an evaluation does.
    """
    scale_Q3 = products.delayed_scale(state.amax_history_Q3H, formats_Q3, options.power_of_two)
    out = {}
    for group in groups:
        params_n3, scale_n3 = group.of((formats_Q3, scale_Q3))
        members = []
        for i in range(3):
            if not group.has[i]:
                members.append(None)
                continue
            at_rest = i == 0 and options.weights_at_rest != "float32"
            scale_n = state.rest_scale[group.key] if at_rest else scale_n3[:, i]
            # Weights that are stored on the grid are not rounded a second time.
            noise = None
            if options.stochastic[i] and seed is not None and not at_rest:
                noise = noise_of(seed, [3 * q + i for q in group.rows])
            members.append(Operand(_at(params_n3, slice(None), i), scale_n, noise))
        out[group.name] = Operands(*members)
    return out


def noise_of(seed, streams: Sequence[int]) -> jax.Array:
    """uint32 [n, 2]: the seeds of stochastic rounding of n tensors, each a stream of its own."""
    return jax.vmap(stochastic_seed, in_axes=(None, None, 0))(seed[0], seed[1], np.array(streams, np.uint32))


def g_probes(groups: Sequence[Group]) -> dict:
    """{group: float32 [n, S]}: the arguments whose gradients are the statistics of the output gradients."""
    return {group.name: np.stack([empty_statistics()] * len(group.rows)) for group in groups if group.has[2]}


def no_statistics(options: QuantOptions) -> jax.Array:
    """float32 [Q, 3, S] that changes nothing when combined with the statistics of a pass."""
    return jnp.broadcast_to(empty_statistics(), (len(options.layers), 3, len(empty_statistics())))


def gather_statistics(groups: Sequence[Group], forward: dict, backward: dict, nothing=None) -> jax.Array:
    """float32 [Q, 3, S] from the forward pass's {group: Statistics [n, S]} and the probes' gradients {group: [n, S]};
    `nothing` (default: empty_statistics) for operands without a format."""
    nothing = jnp.asarray(empty_statistics()) if nothing is None else nothing
    parts = []
    for group in groups:
        found = (*forward[group.name], backward.get(group.name))
        absent = jnp.broadcast_to(nothing, (len(group.rows), *nothing.shape))
        parts.append(jnp.stack([absent if vectors is None else vectors for vectors in found], axis=1))
    return in_layer_order(groups, parts)


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


def faults(
    options: QuantOptions, groups: Sequence[Group], state: QuantState
) -> dict[str, tuple[Sequence[str], jax.Array]]:
    """Values of the state from which no step can be made: {kind of alert: (layers or `layer/operand`, float32 counts)}.

    nonfinite_amax: in the histories that a scale comes from. nonfinite_scale: of stored weights, not finite or not
    above 0. nonfinite_residual: of error feedback. Only kinds that the options have. `state`: stacked.
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
        with_weights = [group for group in groups if group.has[0]]
        scales = in_layer_order(with_weights, [state.rest_scale[group.key] for group in with_weights])
        found["nonfinite_scale"] = options.stored, jnp.float32(~(jnp.isfinite(scales) & (scales > 0)))
        if options.weights_at_rest == "error_feedback":
            counts = [
                jnp.sum(~jnp.isfinite(state.residual[group.key]), axis=(1, 2), dtype=jnp.float32)
                for group in with_weights
            ]
            found["nonfinite_residual"] = options.stored, in_layer_order(with_weights, counts)
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
        return statistic in ("amax", "encode_scale", "dynamic_range")
    return options.scaling[i] in ("delayed", "none") or statistic not in ("overflow", "clipped_energy")


def format_metrics(options: QuantOptions, statistics_Q3S, micro_batches: int = 1) -> Columns:
    """`statistic/layer/W|A|G` by products.named_statistics, and `statistic/all/W|A|G`, which is taken over all elements
    of all quantized layers together (overflow, underflow, clipped_energy, sqnr_db).

    So shares are weighted by size there, clipped_energy and sqnr_db by energy; clipped_energy_by_size and
    sqnr_db_by_size are means over the layers, weighted by size (metrics.sqnr_db_by_size).

    Args:
      micro_batches: of an update. A micro-batch's loss is its own mean, so its G is that many times the gradient of the
        batch's mean loss: `amax` and `encode_scale` of G are given as those of the latter.
    """
    out, of_layers = [], products.named_statistics(statistics_Q3S)
    if micro_batches > 1:
        of_layers["amax"] = of_layers["amax"].at[:, 2].divide(micro_batches)
        of_layers["encode_scale"] = of_layers["encode_scale"].at[:, 2].multiply(micro_batches)
    for name, values_Q3 in of_layers.items():
        where = [
            (q, i)
            for q, layer in enumerate(options.layers)
            for i in range(3)
            if layer.wag[i] and _applies(options, layer, i, name)
        ]
        rows, columns = np.array(where, int).reshape(-1, 2).T
        operands = [f"{options.layers[q].layer}/{OPERANDS[i]}" for q, i in where]
        out.append(over(operands, {name: values_Q3[rows, columns]}))
    for i, operand in enumerate(OPERANDS):
        rows = [q for q, layer in enumerate(options.layers) if layer.wag[i]]
        if rows:
            total = _of_all(statistics_Q3S[np.array(rows), i])
            own = [name for name in total if _applies(options, options.layers[rows[0]], i, name.removesuffix(BY_SIZE))]
            out.append(scalars({f"{name}/all/{operand}": total[name] for name in own}))
    return joined(out)


def _of_all(statistics_QS) -> dict[str, jax.Array]:
    """{statistic: float32 scalar} of one operand over all layers together."""
    total = products.named_statistics(combine_all(FIELDS, statistics_QS))
    f = {name: statistics_QS[:, i] for i, name in enumerate(FIELDS)}
    return {name: total[name] for name in ("overflow", "underflow", "clipped_energy", "sqnr_db")} | {
        f"clipped_energy{BY_SIZE}": mean_by_size(f["excess"] / f["signal"], f["signal"], f["count"]),
        f"sqnr_db{BY_SIZE}": sqnr_db_by_size(f["signal"], f["noise"], f["count"]),
    }


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
    rows, columns = np.array(where, int).reshape(-1, 2).T
    shares = overflow_Q3[rows, columns]
    return names, jnp.where(jnp.isnan(shares), 0.0, shares)


def weight_grids(
    model: ModelConfig, options: QuantOptions, groups: Sequence[Group], state: QuantState, formats_Q3, weights: dict
) -> dict[str, Grid]:
    """{group: Grid, leaves [n, ...]} that the weights {group: [n, K, N]} were rounded on as operands, or are stored on,
    at this step. `model`: with its rules."""
    used = operands(options, groups, state, formats_Q3)
    rule_of: dict[str, Any] = dict(model.rules)
    grids = {}
    for group in groups:
        if group.has[0]:
            w = used[group.name].w
            assert w is not None, "these layers have a format for W"
            scale_of = partial(products.weight_scale, rule=rule_of[group.name], w_is_NK=group.name == HEAD)
            grids[group.name] = Grid(w.format, jax.vmap(scale_of)(weights[group.name], w))
    return grids
