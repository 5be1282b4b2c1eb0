"""The recipe of a run: six quantized slots per linear layer, as data of the step, and what they carry along.

A recipe says how each operand of each product of a linear layer is quantized (numerics.recipes). What the compiled
program can do is the union of what its recipes ask (`RecipeOptions.features`); which recipe a run follows, in which
layers and from which update on is a `RecipeTable`, data. So one program serves every recipe of a sweep, and a schedule
that changes the recipe compiles nothing. A phase may also wait for bad updates (`update.counts_towards_shift`).

Slots whose amax is delayed are given the largest of the last `amax_history` updates; where there was none, their own.

Axes: P phases of the schedule, Q quantized layers, 6 slots (recipes.SLOTS), H history, S len(slot_statistics.FIELDS),
n layers of a group.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.models.config import ModelConfig
from altgrad_jax.models.stacking import Segments, group_of
from altgrad_jax.numerics import slot_statistics, slots
from altgrad_jax.numerics.layers import HEAD, all_products, is_attention
from altgrad_jax.numerics.oscillation import Reset
from altgrad_jax.numerics.products import push_amax
from altgrad_jax.numerics.recipes import SLOTS, Phase, Recipe, get_recipe, in_layers, kept_high, parse_schedule
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.numerics.slot_quantization import Features, Slot, in_tensor_basis, quantize_slot
from altgrad_jax.numerics.sums import combine, combine_all
from altgrad_jax.step.metrics import BY_SIZE, Columns, joined, over, sqnr_db_by_size
from altgrad_jax.step.quantization import Group, grouped, in_layer_order, stack_fields, unstack_fields

# Where the rows of a forward and of a backward vector stand among SLOTS.
_ORDER = np.argsort([*slots.FORWARD, *slots.BACKWARD])
_OF_ALL = ("zero_scale", "clipped", "top_code", "underflow", "shrinkage", "sqnr_db", "copy_distance")


@dataclass(frozen=True)
class RecipeOptions:
    """Static choices of a program with recipes.

    names: the layers that some recipe of the program quantizes, in the order of the model. features: of the six slots.
    schedule: the run's phases. delayed: whether some amax of the program is of earlier steps. amax_history: how many of
    them count. model: as in the setting. reset: of weights that oscillate; None: never.
    """

    names: tuple[str, ...]
    n_layer: int
    features: tuple[Features, ...]
    schedule: tuple[Phase, ...]
    delayed: bool = False
    amax_history: int = 1
    model: str = "gpt2"
    reset: Reset | None = None

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The run's recipes."""
        return tuple(get_recipe(phase.recipe) for phase in self.schedule)

    @property
    def waits(self) -> bool:
        """Whether some phase waits for bad updates, or for certificates of an exhausted format."""
        return any(phase.waits for phase in self.schedule)

    @property
    def counts_exhausted(self) -> bool:
        """Whether some phase waits for certificates of an exhausted format."""
        return any(phase.exhausted for phase in self.schedule)


class RecipeTable(NamedTuple):
    """A run's recipes as data."""

    slots: Slot  # leaves [P, Q, 6, ...]
    delayed_PQ6: Any  # bool
    start_P: Any  # int32: the update from which a phase holds
    bad_P: Any = None  # int32: bad updates in a row after which it does, 0 for none; None where no phase waits
    exhausted_P: Any = None  # int32: the same of certificates of an exhausted format


class RecipeState(NamedTuple):
    """What recipes carry from step to step."""

    amax_history_Q6H: jax.Array  # float32, oldest first; 0 where no update was made
    number: jax.Array  # int32: of the next update, which decides what recipe of the schedule holds
    # Where a phase waits: int32, the last phase that began so, and how many bad updates, and certificates of an
    # exhausted format, there were in a row.
    begun: Any = None
    bad_streak: Any = None
    exhausted_streak: Any = None
    # With RecipeOptions.reset: {group: float32 like its weights}, how far they and their rounding moved in this window.
    moved: Any = None
    rounded_moved: Any = None


_OF_WEIGHTS = ("moved", "rounded_moved")


def known_recipes(config: Mapping[str, Any]) -> list[Recipe]:
    """The recipes that the program of these settings can follow, each once."""
    phases = parse_schedule(tuple(config["recipe"]), config["max_steps"])
    asked = [*(phase.recipe for phase in phases), *config["recipe_program"]]
    return [get_recipe(name) for name in dict.fromkeys(asked)]


def options_of(config: Mapping[str, Any]) -> RecipeOptions | None:
    """The options that a run's settings ask for; None without a recipe."""
    if not config["recipe"]:
        return None
    schedule = parse_schedule(tuple(config["recipe"]), config["max_steps"])
    known = known_recipes(config)
    n_layer, model = config["n_layer"], config["model"]
    variants = [variant for recipe in known for variant in dict.fromkeys(in_layers(recipe, n_layer, model).values())]
    kept = [set(kept_high(recipe, n_layer, model)) for recipe in known]
    quantizes = [any(not spec.high for spec in recipe.slots) for recipe in known]
    names = tuple(
        layer
        for layer in all_products(n_layer, model)
        if not (layer == HEAD or is_attention(layer))
        or any(layer not in high and own for high, own in zip(kept, quantizes))
    )
    delayed = any(spec.amax == "delayed" for recipe in known for spec in recipe.slots)
    measured = config["metrics"] == "all" or "format" in config["metrics"].split(",")
    return RecipeOptions(
        names=names,
        n_layer=n_layer,
        features=slots.features_of([slots.slots_of(recipe) for recipe in variants], statistics=measured or delayed),
        schedule=schedule,
        delayed=delayed,
        amax_history=config["amax_history"] if delayed else 1,
        model=model,
        reset=Reset(*(config[f"oscillation_{name}"] for name in ("reset", "start", "threshold")))
        if config["oscillation_reset"]
        else None,
    )


def for_platform(options: RecipeOptions, platform: str) -> RecipeOptions:
    """The options for a device: what a slot does not use is skipped by a branch on a CPU, and computed and dropped
    elsewhere. (Which is faster on a GPU was not measured.)"""
    of_slots = tuple(dataclasses.replace(features, lazy=platform == "cpu") for features in options.features)
    return dataclasses.replace(options, features=of_slots)


def table_of(options: RecipeOptions) -> RecipeTable:
    """The run's recipes as NumPy arrays. A layer that a recipe keeps high has slots that quantize nothing."""
    phases, delayed = [], []
    for recipe in options.recipes:
        own = in_layers(recipe, options.n_layer, options.model)
        slots_of = {variant: slots.slots_of(variant) for variant in own.values()}
        rows = [slots_of[own[layer]] for layer in options.names]
        phases.append(jax.tree.map(lambda *leaves: np.stack(leaves), *rows))
        delayed.append([[spec.amax == "delayed" for spec in own[layer].slots] for layer in options.names])
    return RecipeTable(
        jax.tree.map(lambda *leaves: np.stack(leaves), *phases),
        np.array(delayed, bool),
        np.array([phase.start for phase in options.schedule], np.int32),
        np.array([phase.bad for phase in options.schedule], np.int32) if options.waits else None,
        np.array([phase.exhausted for phase in options.schedule], np.int32) if options.counts_exhausted else None,
    )


def quantized_model(plain: ModelConfig, options: RecipeOptions) -> ModelConfig:
    """The model with the features of its quantized layers."""
    found = {group_of(layer, plain.segments): options.features for layer in options.names}
    return dataclasses.replace(plain, rules=tuple(found.items()))


def groups(options: RecipeOptions, segments: Segments) -> tuple[Group, ...]:
    """The groups of quantized layers, in the order in which the model first reaches them."""
    return grouped(options.names, [(False, False, False)] * len(options.names), segments)


def init_state(options: RecipeOptions) -> RecipeState:
    """The state of a fresh run."""
    history = jnp.zeros((len(options.names), len(SLOTS), options.amax_history), jnp.float32)
    state = RecipeState(history, jnp.int32(0))
    if options.waits:
        state = state._replace(begun=jnp.int32(0), bad_streak=jnp.int32(0))
    return state._replace(exhausted_streak=jnp.int32(0)) if options.counts_exhausted else state


def stacked(state: RecipeState, segments: Segments) -> RecipeState:
    """quantization.stacked"""
    return state if state.moved is None else stack_fields(state, segments, _OF_WEIGHTS)


def unstacked(state: RecipeState) -> RecipeState:
    """The inverse of `stacked`."""
    return state if state.moved is None else unstack_fields(state, _OF_WEIGHTS)


def phase_at(table: RecipeTable, state: RecipeState) -> jax.Array:
    """int32: which phase of the schedule the next update follows, from 0."""
    begun_P = state.number >= jnp.asarray(table.start_P)
    if table.bad_P is None:
        return jnp.maximum(jnp.sum(begun_P) - 1, 0)
    return jnp.maximum(jnp.max(jnp.where(begun_P, jnp.arange(len(begun_P)), 0)), state.begun)


def after_certificate(table: RecipeTable, state: RecipeState, exhausted: bool) -> RecipeState:
    """The state after a certificate that found the format exhausted or not; a phase may begin by it."""
    if table.exhausted_P is None:
        return state
    next_phase = phase_at(table, state) + 1
    waits_for = jnp.pad(jnp.asarray(table.exhausted_P), (0, 1))[next_phase]
    streak = jnp.where(exhausted, state.exhausted_streak + 1, 0)
    begins = (waits_for > 0) & (streak >= waits_for)
    return state._replace(
        begun=jnp.where(begins, next_phase, state.begun).astype(jnp.int32),
        exhausted_streak=jnp.where(begins, 0, streak).astype(jnp.int32),
    )


def slots_of_phase(table: RecipeTable, state: RecipeState) -> Slot:
    """The slots of the recipe that the next update follows, before any random numbers: leaves [Q, 6, ...]."""
    phase = phase_at(table, state)
    slots_Q6, delayed_Q6 = jax.tree.map(lambda leaf: jnp.asarray(leaf)[phase], (table.slots, table.delayed_PQ6))
    return slots_Q6._replace(given=jnp.where(delayed_Q6, jnp.max(state.amax_history_Q6H, axis=-1), 0.0))


def slots_at(options: RecipeOptions, state: RecipeState, table: RecipeTable, seed=None) -> Slot:
    """The slots of a pass from this state: leaves [Q, 6, ...].

    Args:
      seed: uint32 [2], fresh for every pass; None rounds everything to nearest and draws no signs, as an evaluation
        does.
    """
    slots_Q6 = slots_of_phase(table, state)
    if seed is None:
        return slots_Q6._replace(stochastic=jnp.zeros_like(slots_Q6.stochastic))
    seeds_Q2 = jax.vmap(stochastic_seed, in_axes=(None, None, 0))(
        seed[0], seed[1], np.arange(len(options.names), dtype=np.uint32)
    )
    return jax.vmap(slots.redraw)(slots_Q6, seeds_Q2)


def forward_copy(options: RecipeOptions, layer: str, slots_6: Slot, w) -> jax.Array:
    """Weights of a layer or group, w float32 [K, N], as the forward pass multiplies them: float32 values.

    Args:
      slots_6: its slots, leaves [6, ...].
    """
    axis, features, slot = int(layer == HEAD), options.features[1], jax.tree.map(lambda leaf: leaf[1], slots_6)
    quantized, _ = quantize_slot(w, slot, axis, features, jnp.bfloat16)
    return in_tensor_basis(quantized, slot, axis, features)


def operands(groups: Sequence[Group], slots_Q6: Slot) -> dict[str, Slot]:
    """{group: Slot, leaves [n, 6, ...]}, what the layers of the model are given."""
    return {group.name: group.of(slots_Q6) for group in groups}


def format_metrics(layers: Sequence[str], statistics_Q6S, micro_batches: int = 1) -> Columns:
    """`statistic/layer/slot` by slot_statistics.named, and `statistic/all/slot` over all layers together, with the
    histogram of their scales as `scale_bin_i/all/slot`.

    So shares are weighted by size there, shrinkage, sqnr_db and copy_distance by energy; sqnr_db_by_size is of a mean
    over the layers, weighted by size (metrics.sqnr_db_by_size).

    Args:
      micro_batches: of an update; amax and scales of G are those of the gradient of the batch's mean loss, as in
        quantization.format_metrics.
    """
    named = slot_statistics.named(statistics_Q6S)
    if micro_batches > 1:
        parts_6 = np.where([slot.endswith(".g") for slot in SLOTS], np.float32(micro_batches), np.float32(1))
        named["amax"] /= parts_6
        for end in ("mean", "min", "max"):
            named[f"decode_scale_log2_{end}"] -= np.log2(parts_6)
    of_layers = [f"{layer}/{slot}" for layer in layers for slot in SLOTS]
    own = {name: value for name, value in named.items() if name != "scale_histogram"}
    total = slot_statistics.named(combine_all(slot_statistics.FIELDS, statistics_Q6S))
    f = {name: statistics_Q6S[..., i] for i, name in enumerate(slot_statistics.FIELDS)}
    total[f"sqnr_db{BY_SIZE}"] = sqnr_db_by_size(f["signal"], f["noise"], f["count"])
    of_all = [f"all/{slot}" for slot in SLOTS]
    bins = {f"scale_bin_{i}": total["scale_histogram"][:, i] for i in range(slot_statistics.N_BINS)}
    return joined(
        [
            over(of_layers, {name: value.reshape(-1) for name, value in own.items()}),
            over(of_all, {name: total[name] for name in (*_OF_ALL, f"sqnr_db{BY_SIZE}")} | bins),
        ]
    )


class InUse(NamedTuple):
    """The recipe of an update, before it is made. Its methods are those that a pass asks of number formats too."""

    options: RecipeOptions
    groups: tuple[Group, ...]
    state: RecipeState
    table: RecipeTable
    seed: Any  # int32: of the run
    number: Any  # int32: of the update

    @property
    def phase(self) -> jax.Array:
        """int32: which phase of the schedule the update follows, from 0."""
        return phase_at(self.table, self.state)

    def operands(self, micro_batch) -> dict[str, Slot]:
        """{group: Slot} of the training pass over the micro-batch of this number."""
        seed = stochastic_seed(self.seed, self.number, micro_batch)
        return operands(self.groups, slots_at(self.options, self.state, self.table, seed))

    @property
    def measured(self) -> bool:
        """Whether the program computes statistics."""
        return self.options.features[0].statistics

    def probes(self) -> dict:
        """{group: float32 [n, 3, S]}: the arguments whose gradients are the statistics of the backward slots."""
        if not self.measured:
            return {}
        return {group.name: np.stack([slots.empty_statistics()] * len(group.rows)) for group in self.groups}

    def gather(self, forward: dict, backward: dict):
        """float32 [Q, 6, S] from the forward pass's {group: [n, 3, S]} and the probes' gradients; None without."""
        if not self.measured:
            return None
        both = (jnp.concatenate([forward[group.name], backward[group.name]], axis=1) for group in self.groups)
        return in_layer_order(self.groups, [part[:, _ORDER] for part in both])

    def no_statistics(self):
        """float32 [Q, 6, S] that changes nothing when combined; None without statistics."""
        if not self.measured:
            return None
        shape = len(self.options.names), len(SLOTS), len(slot_statistics.FIELDS)
        return jnp.broadcast_to(slot_statistics.empty(), shape)

    def combine(self, a, b) -> jax.Array:
        """The statistics of two micro-batches as those of both."""
        return combine(slot_statistics.FIELDS, a, b)

    def faults(self) -> dict[str, tuple[Sequence[str], jax.Array]]:
        """Values of the state from which no step can be made: nonfinite_amax of `layer/slot`, with a delayed amax."""
        if not self.options.delayed:
            return {}
        names = [f"{layer}/{slot}" for layer in self.options.names for slot in SLOTS]
        count_Q6 = jnp.sum(~jnp.isfinite(self.state.amax_history_Q6H), axis=-1, dtype=jnp.float32)
        return {"nonfinite_amax": (names, count_Q6.reshape(-1))}

    def begins(self, bad) -> jax.Array:
        """int32: the phase that begins after this update because it was `bad`; 0 for none."""
        next_phase = self.phase + 1
        waits_for = jnp.pad(self.table.bad_P, (0, 1))[next_phase]
        return jnp.where((waits_for > 0) & bad & (self.state.bad_streak + 1 >= waits_for), next_phase, 0)

    def after(self, statistics_Q6S, finite, bad) -> RecipeState:
        """The state after an update with these statistics; a step that is not finite leaves the history as it was."""
        state = self.state._replace(number=self.state.number + 1)
        if self.options.waits:
            begins = self.begins(bad)
            streak = jnp.where(bad & (begins == 0), self.state.bad_streak + 1, 0)
            state = state._replace(begun=jnp.maximum(self.state.begun, begins), bad_streak=streak)
        if statistics_Q6S is None or not self.options.delayed:
            return state
        amax_Q6 = statistics_Q6S[..., list(slot_statistics.FIELDS).index("amax")]
        pushed = push_amax(self.state.amax_history_Q6H, amax_Q6)
        return state._replace(amax_history_Q6H=jnp.where(finite, pushed, self.state.amax_history_Q6H))


def in_use(options: RecipeOptions | None, groups, state, table, seed, number) -> InUse | None:
    """The recipe of the update from this state; None without any."""
    return None if options is None else InUse(options, groups, state, table, seed, number)
