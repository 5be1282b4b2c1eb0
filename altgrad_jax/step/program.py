"""The compiled functions of a run: init, a dispatch of training steps, evaluation, diagnosis; for one run or for many.

What they compute of one update is `update`'s. This module says what is jitted and donated, where results lie, and how
steps are strung together. One dispatch runs up to `steps_per_dispatch` steps in a loop whose bound is a traced number,
so one compiled program serves every remainder; the rows of metrics are written into one preallocated [steps, metrics]
array, the one thing the host fetches of every dispatch (beside two counters of the monitor).

The batch of update k is windows k*batch_size ... (k+1)*batch_size - 1 of the run's sequence of windows, which depends
on the data seed alone (data.dataset.permute_windows), an argument of the program. All index arithmetic of a dispatch is
done once, before its loop. After `nan_patience` non-finite steps in a row the loop ends early and the state changes no
more.

The functions that are compiled are at the top, pure, with their static choices as first arguments;
`make_step_functions` and `over_members` give them to jax.jit, and a `Program` compiles them ahead of the first step.

Axes: B batch, L block_size, K steps of a dispatch, M metrics, E evaluation windows, R runs, Q quantized layers.
"""

import contextlib
import dataclasses
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from altgrad_jax.data.dataset import gather_windows, permute_windows
from altgrad_jax.errors import UserError
from altgrad_jax.models.config import ModelConfig
from altgrad_jax.models.linear import Quantized
from altgrad_jax.numerics import histograms
from altgrad_jax.numerics.cross_entropy import padded
from altgrad_jax.numerics.products import Rule, empty_statistics, named_statistics
from altgrad_jax.step import certify, metrics, quantization, recipe, stability, update
from altgrad_jax.step.mesh import Device, constrain, gather, over_batch, replicated
from altgrad_jax.step.update import Inputs, Step, StepOptions, TrainState, state_shardings

# ------------------------------------------------------------------------------------------------ what is compiled


def run(step: Step, names, state: TrainState, data, n_steps, inputs: Inputs):
    """A dispatch of n_steps updates: (state, float32 [K, M]); see StepFunctions.run. `names`: the metrics of a row."""
    o = step.options
    K, B, block_size = o.steps_per_dispatch, o.batch_size, step.plain.block_size
    index_KB = None
    if o.data_on_device:
        numbers = state.step.astype(jnp.uint32) * B + jnp.arange(K * B, dtype=jnp.uint32)
        index_KB = permute_windows(numbers, step.n_train_windows, inputs.data_seed, xp=jnp).reshape(K, B)

    def body(carry):
        i, state, rows_KM = carry
        windows = data[i] if index_KB is None else gather_windows(data, index_KB[i], block_size, xp=jnp)
        state, row = update.train_step(step, state, windows, inputs)
        return i + 1, state, rows_KM.at[i].set(row.values)

    def goes_on(carry):
        i, state, _ = carry
        return (i < n_steps) & ~stability.is_frozen(state.monitor, o.thresholds)

    rows_KM = jnp.full((K, len(names)), jnp.nan, jnp.float32)
    start = jnp.int32(0), update.stacked(step, state), rows_KM
    _, state, rows_KM = jax.lax.while_loop(goes_on, body, start)
    return update.unstacked(step, state), rows_KM


def evaluate(model: ModelConfig, batch_size, mesh, operands_of, params, windows, *formats):
    """float32 mean loss over windows [E, L+1] in nats per token; see make_evaluate."""
    layout = replicated(mesh)
    if batch_size % mesh.size == 0:
        layout, model = over_batch(mesh), _split_over(model, mesh)

    def batch_loss(batch):
        return update.loss(model, params, constrain(batch, layout, mesh), None, quantized)[0]

    params = gather(params, mesh)  # once for all batches
    quantized = Quantized(operands_of(*formats), {}) if model.rules else None
    return jax.lax.map(batch_loss, windows.reshape(-1, batch_size, windows.shape[-1])).mean()


def window_losses(model: ModelConfig, batch_size, mesh, operands_of, params, windows, *formats):
    """float32 [E]: the loss of each window [E, L+1] in nats per token, every window a forward pass by itself."""
    # So many at once that their logits keep within the limit.
    logits = 4 * model.block_size * padded(model.vocab_size)
    at_once = min(batch_size, max(1, model.loss_tile_bytes // logits))
    params = gather(params, mesh)
    quantized = Quantized(operands_of(*formats), {}) if model.rules else None

    def loss(window):
        return update.loss(model, params, window[None], None, quantized)[0]

    return jax.lax.map(loss, windows, batch_size=at_once)


class Observed(NamedTuple):
    """Histograms of the quantized operands (see numerics.histograms); zeros for an operand without a format."""

    codes_Q3C: jax.Array  # int32, by 8-bit code; means nothing for a format of more bits
    magnitudes_Q3N: jax.Array  # int32, by whatif's bins
    scale_Q3: jax.Array  # float32, the smallest where an operand has several
    amax_Q3: jax.Array  # float32


def _split_over(model: ModelConfig, mesh) -> ModelConfig:
    """The model for batches that are split over all devices: each device holds its part of the logits alone."""
    return dataclasses.replace(model, loss_tile_bytes=model.loss_tile_bytes * mesh.size)


def diagnose(step: Step, params, windows, quant_state=None, table=None):
    """({name: scalar}, Observed or None) of the parameters and a batch [B, L+1]; see StepFunctions.diagnose.

    Operands are rounded to nearest, as in an evaluation. Rank statistics: metrics.rank_metrics.
    """
    plain, quant = step.plain, step.quant
    params = gather(params, step.mesh)
    found = metrics.rank_metrics(params)
    if quant is None:
        return found, None
    rules = quantization.quantized_model(plain, quant).rules
    model = dataclasses.replace(
        plain,
        rules=tuple(
            (group, dataclasses.replace(rule, observe=histograms.observe))
            for group, rule in rules
            if isinstance(rule, Rule)
        ),
    )
    groups, operands = step.groups, update.operands_at(plain, quant, None, quant_state, table)
    nothing = jnp.zeros(2 * histograms.HISTOGRAMS, jnp.float32)
    probes = {
        group: jnp.concatenate([probe_n, jnp.broadcast_to(nothing, (len(probe_n), *nothing.shape))], axis=1)
        for group, probe_n in quantization.g_probes(groups).items()
    }

    def loss(params, probes):
        return update.loss(model, params, windows, None, Quantized(operands, probes))

    (_, output), (_, of_g) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, probes)
    vectors_Q3S = quantization.gather_statistics(
        groups, output.statistics, of_g, jnp.concatenate([empty_statistics(), nothing])
    )
    fields_Q3S, rest_Q3 = jnp.split(vectors_Q3S, [len(empty_statistics())], axis=-1)
    named = named_statistics(fields_Q3S)
    return found, Observed(*histograms.observed(rest_Q3), named["encode_scale"], named["amax"])


# --------------------------------------------------------------------------------------------------------- one run


class StepFunctions(NamedTuple):
    """What `make_step_functions` returns.

    init: (seed, table, params) -> TrainState. `table`: the formats; left out where there are none, here and below.
      `params`: the weights to start from, in place of fresh ones.
    run: (TrainState, data, n_steps, Inputs) -> (TrainState, float32 [K, M]); the state is donated. `data` is the uint16
      token file as a device array, or with data_on_device=False the batches uint16 [K, B, L+1]. Rows from n_steps on,
      and after the step at which the state froze, are NaN. n_steps <= steps_per_dispatch.
    evaluate: (params, windows uint16 [E, L+1], state.quant, table) -> float32 mean loss in nats per token, by the
      forward pass of the training: quantized where it is, without dropout, every operand rounded to nearest.
    window_losses: (params, windows uint16 [E, L+1], state.quant, table) -> float32 [E], `evaluate` of each by itself.
    diagnose: (params, windows uint16 [B, L+1], state.quant, table) -> ({name: float32 scalar}, Observed or None): the
      rank of the weights, and with formats how a forward and backward pass over these windows uses them.
    certify: (params, windows uint16 [B, L+1], seed, state.quant, table) -> Certificate; None without certify_draws.
    abstract_state: the state's shapes, dtypes and shardings, for restoring.
    metric_names: M names, in the order of the columns.
    inputs: the Inputs that the options and the seed ask for, NumPy.
    step: the static choices, of which all this is made.
    """

    init: Callable
    run: Callable
    evaluate: Callable
    window_losses: Callable
    diagnose: Callable
    certify: Callable | None
    abstract_state: TrainState
    metric_names: tuple
    inputs: Inputs
    step: Step


def make_step_functions(
    model_config: ModelConfig, options: StepOptions, mesh, *, n_train_windows, eval_batch_size, seed
):
    """Builds the compiled functions of a run; compiles nothing yet.

    Args: those of Step, `model_config` without rules; and the seed for `StepFunctions.inputs`. The limit of the loss's
    logits in `model_config` is that of one device.
    """
    plain = quantization.layout(model_config, options.quant)
    if options.recipe is not None:
        platform = mesh.devices.flat[0].platform
        options = dataclasses.replace(options, recipe=recipe.for_platform(options.recipe, platform))
    step = Step(plain, options, mesh, n_train_windows, eval_batch_size)
    inputs = update.inputs_of(options, seed)
    init = partial(update.init, step)
    shapes = jax.eval_shape(init, 0, inputs.formats)
    shardings = state_shardings(shapes, mesh)
    abstract_state = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, shardings
    )
    split = dataclasses.replace(step, plain=_split_over(step.plain, mesh))
    names = _metric_names(split, abstract_state, inputs)
    return StepFunctions(
        init=jax.jit(init, out_shardings=shardings),
        run=jax.jit(partial(run, split, names), donate_argnums=0, out_shardings=(shardings, replicated(mesh))),
        evaluate=make_evaluate(step.model, eval_batch_size, mesh, _operands_of(step)),
        window_losses=jax.jit(
            partial(window_losses, step.model, eval_batch_size, mesh, _operands_of(step)),
            out_shardings=replicated(mesh),
        ),
        diagnose=make_diagnose(step),
        certify=make_certify(step, options.certify_draws) if options.certify_draws else None,
        abstract_state=abstract_state,
        metric_names=names,
        inputs=inputs,
        step=step,
    )


def _operands_of(step: Step) -> Callable:
    return partial(update.operands_at, step.plain, step.quant, step.recipe)


def _metric_names(step, state, inputs):
    """The names of a row, in the order in which the step makes them."""
    shape = step.options.batch_size, step.plain.block_size + 1
    windows = jax.ShapeDtypeStruct(shape, jnp.uint16, sharding=replicated(step.mesh))
    return jax.eval_shape(partial(_first_row, step), state, windows, inputs).names


def _first_row(step, state, windows, inputs):
    return update.train_step(step, update.stacked(step, state), windows, inputs)[1]


def make_evaluate(model: ModelConfig, eval_batch_size, mesh, operands_of=lambda operands: operands):
    """evaluate(params, windows [E, L+1], *formats) -> float32 mean loss in nats per token, compiled.

    The windows are taken eval_batch_size at a time (it must divide E), and the means of these equal batches averaged.
    A batch is split over the mesh where its size allows.

    Args:
      operands_of: traced function of `formats` that gives {layer: Operands} for the layers in model.rules; by default
        they are passed as they are.
    """
    return jax.jit(partial(evaluate, model, eval_batch_size, mesh, operands_of), out_shardings=replicated(mesh))


def make_diagnose(step: Step):
    """diagnose(params, windows [B, L+1], state.quant, table), compiled."""
    return jax.jit(partial(diagnose, step), out_shardings=replicated(step.mesh))


def make_certify(step: Step, n_draws: int):
    """certify(params, windows [B, L+1], seed, state.quant, table), compiled."""
    certify.require_windows(step)
    return jax.jit(partial(certify.certify, step, n_draws), out_shardings=replicated(step.mesh))


# ------------------------------------------------------------------------------------------------------- many runs


class MemberFunctions(NamedTuple):
    """What `over_members` returns: functions of StepFunctions for R runs at once.

    run: (TrainStates [R, ...], data, n_steps int32 [R], Inputs [R, ...]) -> (TrainStates, float32 [R, K, M]).
    evaluate: (params [R, ...], windows, state.quant [R, ...], formats [R, ...]) -> float32 [R]. window_losses: [R, E].
    stack: (list of trees, one a run) -> tree [R, ...] on the devices. pick: (tree [R, ...], r) -> tree of run r.
    abstract: (tree of one run, R) -> shapes, dtypes and shardings of R of them. replicated: sharding of shared arrays.
    """

    run: Callable
    evaluate: Callable
    window_losses: Callable
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
    step, names = functions.step, functions.metric_names
    mesh = jax.make_mesh((len(devices),), ("run",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    by_run = NamedSharding(mesh, PartitionSpec("run"))
    operands_of = _operands_of(step)
    run_each = _on_devices(lambda data, state, n, inputs: run(step, names, state, data, n, inputs), mesh, member_loop)
    evaluate_each, window_losses_each = (
        _on_devices(partial(_windows_first, of_windows, step, operands_of), mesh, member_loop)
        for of_windows in (evaluate, window_losses)
    )

    def stack(trees):
        return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves), by_run), *jax.device_get(trees))

    def abstract(tree, n_runs):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((n_runs, *np.shape(leaf)), leaf.dtype, sharding=by_run), tree
        )

    return MemberFunctions(
        run=jax.jit(
            lambda state_R, data, n_R, inputs_R: run_each(data, state_R, n_R, inputs_R),
            donate_argnums=0,
            out_shardings=by_run,
        ),
        evaluate=jax.jit(
            lambda params_R, windows, *formats: evaluate_each(windows, params_R, *formats), out_shardings=by_run
        ),
        window_losses=jax.jit(
            lambda params_R, windows, *formats: window_losses_each(windows, params_R, *formats), out_shardings=by_run
        ),
        stack=stack,
        abstract=abstract,
        replicated=replicated(mesh),
        pick=jax.jit(
            lambda tree, r: jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, r, keepdims=False), tree),
            out_shardings=replicated(mesh),
        ),
    )


def _windows_first(of_windows, step: Step, operands_of, windows, params, *formats):
    """evaluate or window_losses of one run, what all runs share first."""
    return of_windows(step.model, step.eval_batch_size, step.mesh, operands_of, params, windows, *formats)


def _on_devices(function, mesh, member_loop):
    """function(shared, *trees of a run) for every run: (shared, *trees [R, ...]), the runs split over the devices."""

    def each(shared, *trees_R):
        if member_loop == "vmap":
            return jax.vmap(partial(function, shared))(*trees_R)
        return jax.lax.map(lambda trees: function(shared, *trees), trees_R)

    if mesh.size == 1:
        return each

    def call(shared, *trees_R):
        specs = PartitionSpec(), *[PartitionSpec("run")] * len(trees_R)
        return jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("run"), check_vma=False)(
            shared, *trees_R
        )

    return call


# ------------------------------------------------------------------------------------------------- ahead of the steps


class Dispatch(NamedTuple):
    """What the host fetches of a dispatch, in one transfer; the first axis are the runs."""

    rows_RKM: np.ndarray  # float32; NaN where a step was not made
    frozen_R: np.ndarray  # bool: so many steps in a row were non-finite that the run makes no more
    first_bad_R: np.ndarray  # int32: the row of the first non-finite step, -1 while there is none


class Program:
    """The compiled functions of one run, or of `width` runs that are trained side by side, each in its lane.

    A program knows no run and owns no state: whoever trains holds the states [R, ...] (of a run by itself: the state)
    and the Inputs, and passes them to each call.

    Args:
      functions: from make_step_functions; for runs side by side, for a mesh of one device.
      n_train_tokens, n_val_windows: sizes of the data. n_all_windows: of window_losses; 0 where they are not asked for.
      diagnoses: whether diagnose is asked for.
      width: None for a run by itself, else the number of lanes.
      member_loop: "map" or "vmap", how lanes are computed (over_members). devices: over which lanes are split.
      xla_options: NAME=VALUE, for the compiler.
    """

    def __init__(
        self,
        functions: StepFunctions,
        *,
        n_train_tokens: int,
        n_val_windows: int,
        n_all_windows: int = 0,
        diagnoses: bool = True,
        width: int | None = None,
        member_loop: str = "map",
        devices: Sequence[Device] = (),
        xla_options: Sequence[str] = (),
    ):
        self.functions, self.width, self.member_loop = functions, width, member_loop
        self.members = None if width is None else over_members(functions, devices, member_loop)
        # Of arrays that all lanes read, and of what a single run is given.
        self.replicated = replicated(functions.step.mesh)
        self.shared = self.replicated if self.members is None else self.members.replicated
        self.column = {name: i for i, name in enumerate(functions.metric_names)}
        self._n_train_tokens, self._n_val_windows, self._n_all_windows = n_train_tokens, n_val_windows, n_all_windows
        self.compiled: dict[str, jax.stages.Compiled] = {}
        self._diagnoses = diagnoses
        self._xla_options = tuple(xla_options)

    def lower(self) -> Iterator[tuple[str, jax.stages.Lowered]]:
        """Yields (name, lowered program): run (first, because it takes longest to compile) and evaluate, and diagnose,
        window_losses and certify where they are asked for."""
        functions, step = self.functions, self.functions.step
        options, length = step.options, step.plain.block_size + 1
        shape = (options.steps_per_dispatch, options.batch_size, length)
        tokens = jax.ShapeDtypeStruct(
            (self._n_train_tokens,) if options.data_on_device else shape, np.uint16, sharding=self.shared
        )
        val_windows = jax.ShapeDtypeStruct((self._n_val_windows, length), np.uint16, sharding=self.shared)
        diagnosed = jax.ShapeDtypeStruct((step.eval_batch_size, length), np.uint16, sharding=self.replicated)
        state, inputs = functions.abstract_state, functions.inputs
        lanes, state_R, inputs_R = (functions, state, inputs)
        if self.members is not None:
            lanes = self.members
            state_R, inputs_R = (self.members.abstract(tree, self.width) for tree in (state, inputs))
        n_R = jax.ShapeDtypeStruct(() if self.width is None else (self.width,), np.int32)
        yield "run", lanes.run.lower(state_R, tokens, n_R, inputs_R)
        yield "evaluate", lanes.evaluate.lower(state_R.params, val_windows, state_R.quant, inputs_R.formats)
        # A diagnosis is rare: of runs side by side each is given its own.
        if self._diagnoses:
            yield "diagnose", functions.diagnose.lower(state.params, diagnosed, state.quant, inputs.formats)
        if self._n_all_windows:
            every = jax.ShapeDtypeStruct((self._n_all_windows, length), np.uint16, sharding=self.shared)
            losses = lanes.window_losses.lower(state_R.params, every, state_R.quant, inputs_R.formats)
            yield "window_losses", losses
        if functions.certify is not None:
            certified = functions.certify.lower(state.params, diagnosed, inputs.seed, state.quant, inputs.formats)
            yield "certify", certified

    def compile(self, n_threads: int = 3) -> None:
        """Compiles all programs: a later call with other shapes is then an error, never a compilation.

        While XLA compiles one program, which takes no interpreter lock, the next is traced beside it.
        """
        step = self.functions.step
        options = compiler_options(step.quant, step.mesh.local_devices[0].platform, self._xla_options)
        threads = ThreadPoolExecutor(n_threads, thread_name_prefix="compile")
        try:
            with without_garbage_collection():
                compiling = {name: threads.submit(compile_lowered, lowered, options) for name, lowered in self.lower()}
            self.compiled = {name: program.result() for name, program in compiling.items()}
        finally:
            # Not waited for: a signal must not wait for a compiler.
            threads.shutdown(wait=False, cancel_futures=True)
        if step.quant is not None and step.quant.native:
            require_float8_kernels(self.compiled["run"], step.mesh.local_devices[0], len(step.quant.layers))

    def stack(self, trees: Sequence[Any]) -> Any:
        """States or Inputs of the runs, in the order of their lanes, as the program takes them; a lane without a run is
        given the first one's."""
        if self.members is None or self.width is None:
            (tree,) = trees
            return tree
        return self.members.stack([*trees, *[trees[0]] * (self.width - len(trees))])

    def state_of(self, state: TrainState, lane: int) -> TrainState:
        """The state of one run, on the device."""
        return state if self.members is None else self.members.pick(state, lane)

    def advance(self, state: TrainState, tokens, n_R, inputs: Inputs) -> tuple[TrainState, Dispatch]:
        """Makes n_R[lane] updates in every lane, fewer where one freezes. The state is donated.

        Args:
          tokens: the uint16 token file, or the batches of these steps (StepFunctions.run). n_R: int32 [R].
        """
        state, rows = self.compiled["run"](state, tokens, n_R if self.members is not None else n_R[0], inputs)
        # One transfer, and no operation on the device for what a comparison on the host decides: it waits meanwhile.
        monitor = state.monitor
        rows_RKM, bad_streak_R, first_bad_R = self._by_lane((rows, monitor.bad_streak, monitor.first_bad_step))
        frozen_R = stability.is_frozen(
            monitor._replace(bad_streak=bad_streak_R), self.functions.step.options.thresholds
        )
        return state, Dispatch(rows_RKM, np.asarray(frozen_R), first_bad_R)

    def evaluate(self, state: TrainState, windows, inputs: Inputs) -> np.ndarray:
        """Mean validation loss of every lane, float32 [R], nats per token."""
        return self._by_lane(self.compiled["evaluate"](state.params, windows, state.quant, inputs.formats))

    def window_losses(self, state: TrainState, windows, inputs: Inputs) -> np.ndarray:
        """Loss of every window in every lane, float32 [R, E], nats per token."""
        return self._by_lane(self.compiled["window_losses"](state.params, windows, state.quant, inputs.formats))

    def diagnose(self, state: TrainState, windows, inputs: Inputs) -> tuple[dict, Observed | None]:
        """StepFunctions.diagnose of one run's state and Inputs, as NumPy."""
        if self.members is not None:
            state = jax.device_put(state, self.replicated)
        # One transfer: a scalar at a time would cost a wait each.
        return jax.device_get(self.compiled["diagnose"](state.params, windows, state.quant, inputs.formats))

    def certify(self, state: TrainState, windows, inputs: Inputs) -> certify.Certificate:
        """The certificate of one run's state and Inputs, as NumPy."""
        if self.members is not None:
            state = jax.device_put(state, self.replicated)
        return jax.device_get(self.compiled["certify"](state.params, windows, inputs.seed, state.quant, inputs.formats))

    def take_note(self, state: TrainState, lane: int, inputs: Inputs, exhausted: bool) -> TrainState:
        """The states of all lanes after a certificate of one run (its Inputs) found the format exhausted or not."""
        before = state.quant
        own = jax.device_get(before if self.members is None else jax.tree.map(lambda leaf: leaf[lane], before))
        after = recipe.after_certificate(inputs.formats, own, exhausted)
        if after is own:
            return state

        def set_in(whole, new):
            if self.members is not None:
                whole_R = np.array(whole)
                whole_R[lane] = new
                new = whole_R
            return jax.device_put(np.asarray(new), whole.sharding)

        changed = {name: set_in(getattr(before, name), getattr(after, name)) for name in ("begun", "exhausted_streak")}
        return state._replace(quant=before._replace(**changed))

    def _by_lane(self, tree):
        """Host arrays with a leading axis of lanes."""
        tree = jax.device_get(tree)
        return tree if self.members is not None else jax.tree.map(lambda leaf: np.asarray(leaf)[None], tree)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Tracing makes millions of objects that live on; looking through them again and again took a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def compiler_options(
    quant: quantization.QuantOptions | None, platform: str, xla_options: Sequence[str] = ()
) -> dict[str, bool | str]:
    """What XLA is asked of a run's programs, beside its defaults.

    Native products on a GPU are to be calls of cuBLASLt, all of them: else XLA makes kernels of its own where it finds
    these faster, and who multiplies in a run, and how sums are made, depends on the machine.

    Args:
      quant: the number formats. platform: of the devices, as jax names it. xla_options: NAME=VALUE; these come last.
    """
    options: dict[str, bool | str] = {}
    if platform == "gpu" and quant is not None and quant.native:
        options["xla_gpu_enable_triton_gemm"] = False
    for name, _, value in (item.partition("=") for item in xla_options):
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def compile_lowered(lowered: jax.stages.Lowered, options: dict[str, bool | str]) -> jax.stages.Compiled:
    """The program, compiled with these options; UserError where XLA knows one of them or its value not."""
    try:
        return lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"No such compile option: '.*'|While setting option .*", str(error))
        if found is None:
            raise
        raise UserError(
            f"XLA refuses xla_options={','.join(f'{name}={value}' for name, value in options.items())} "
            f"({found[0].rstrip('.')}): give options that this version of jaxlib has, with values of their type, or "
            "leave them out"
        ) from None


def require_float8_kernels(compiled, device: Device, n_layers: int) -> None:
    """On a GPU: UserError unless the compiled step multiplies in float8, three products a quantized layer.

    XLA falls back to another product without a word, and the run would then not compute what it says.
    """
    if device.platform != "gpu":
        return
    found = compiled.as_text().count("__cublas$lt$matmul$f8")
    if found < 3 * n_layers:
        raise UserError(
            f"products='native' needs {3 * n_layers} float8 products and the program compiled for "
            f"{device.device_kind} has {found}: it takes an NVIDIA GPU of the Ada or Hopper generation or "
            "later; set products='emulated'"
        )
