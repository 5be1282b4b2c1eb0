"""NaN and infinities put into a training at every place they can come from, and how it answers.

An answer is right only if all of this holds:

- The step at which the fault is there is counted as non-finite, and no step before it.
- stability.locate, from that step's row alone, names the layer (and the operand) that was damaged.
- The rest of the state is unharmed: every array equals, bit by bit, what it was before the step, but for the step's
  number and the counters of bad steps. With saturate=False the amax histories may take finite amaxes. Of a step with a
  damaged moment everything must equal, bit by bit, what the step without damage makes, but for the weight (with the
  optimizer `grid`, the weights) whose update came from it, which stays.
- The policy holds. Once the fault is over, or repaired, the training goes on as if that batch had not been seen: two
  more steps lead, bit by bit, to the state that the same steps without the fault lead to. A fault that stays freezes
  the state after `nan_patience` steps.

How a fault gets in. A state is a tree of arrays: one element is set. Faults of a batch ride on the batch as data: the
first token of a window holds, above the token itself, which fault it brings, and the loss that the step is built from
is wrapped to act on it. So one compiled program serves all faults of one set of options, and what is compared ran in
the same program.

`run` goes through all of them, with several sets of options, and through whole trainings, which must say what
happened on the console, in the anomaly checkpoint and in the verdict.
"""

import contextlib
import io
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax import train
from altgrad_jax.config import default_config
from altgrad_jax.data.prepare import prepare
from altgrad_jax.data.sources import local
from altgrad_jax.data.tokenizer import get_tokenizer
from altgrad_jax.models import linear as linear_module
from altgrad_jax.models import transformer
from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.models.stacking import is_stacked, layers_of
from altgrad_jax.numerics.rules import resolve_rules
from altgrad_jax.run import setup
from altgrad_jax.run.checkpoint import read_document
from altgrad_jax.run.folder import FINISHED, STOPPED_NON_FINITE
from altgrad_jax.step import metrics, program, stability, update
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.quantization import QuantOptions
from campaigns.runs import Part
from campaigns.runs import table as markdown_table

KINDS = {"NaN": np.nan, "+Inf": np.inf, "-Inf": -np.inf}
LARGE = "1e30"  # finite, but no norm that it is part of
BROUGHT = KINDS | {LARGE: 1e30}  # what a batch can bring
CODE = 256  # a first token is token + CODE * (0, or 1 + len(BROUGHT) * site + kind)
PATIENCE = 3
BEFORE = 3  # clean steps before the fault
SIZE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=61)
BATCH, PARTS = 8, 4

FORMATS = resolve_rules(("E4M3", "block_1/mlp_down:G=E5M2"), SIZE["n_layer"])
# Error feedback first: it alone has every kind of state.
OPTIONS = {
    "weights at rest: error_feedback": dict(
        quant=QuantOptions(FORMATS, weights_at_rest="error_feedback", amax_history=4), grad_accum_steps=PARTS
    ),
    "baseline": dict(grad_accum_steps=PARTS),
    "float32 master, saturate=False": dict(quant=QuantOptions(FORMATS, saturate=False, amax_history=4)),
    "weights at rest: stochastic, ulp_adamw": dict(
        quant=QuantOptions(FORMATS, weights_at_rest="stochastic"), optimizer="ulp_adamw"
    ),
    "weights at rest: nearest, grid": dict(
        quant=QuantOptions(FORMATS, weights_at_rest="nearest", emergency_formats=("E3M4",), emergency_patience=9),
        optimizer="grid",
        grad_clip=0.0,
    ),
}
# All kinds of state in as small a program as has them.
QUICK = {
    "two layers, weights at rest: error_feedback": dict(
        quant=QuantOptions(
            resolve_rules(("block_*/mlp_up=E4M3",), SIZE["n_layer"]), weights_at_rest="error_feedback", amax_history=4
        ),
        grad_accum_steps=PARTS,
        metric_groups=("activation",),
    )
}


class Row(NamedTuple):
    """One fault. `wrong`: what was not as it must be, one sentence for each; empty where all was."""

    options: str
    kind: str
    place: str  # what was damaged, without the layer
    layer: str  # layer or layer/operand, empty for a place that has none
    detected: str
    located: str
    rest: str
    policy: str
    wrong: tuple


# ------------------------------------------------------------------------------------------- faults that a batch brings


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_gradient(x, fault, index):
    """x, whose gradient has `fault` added at `index`; None: to the first element of each entry of the first axis."""
    return x


def _in_gradient_forward(x, fault, index):
    return x, fault


def _in_gradient_backward(index, fault, g):
    where = (slice(None), *(0,) * (g.ndim - 1)) if index is None else index
    return g.at[where].add(fault), jnp.zeros_like(fault)


_in_gradient.defvjp(_in_gradient_forward, _in_gradient_backward)


def _sites(params):
    """[(place, layer)]: where a batch can bring a fault, in the order of their codes, also of stacked parameters."""
    layers, linear = metrics.layer_names(params), list(metrics.neuron_layers(params))
    return [
        ("loss", ""),
        *(("gradient", layer) for layer in layers),
        *(("output", layer) for layer in linear),
        *(("output's gradient", layer) for layer in linear),
    ]


@contextlib.contextmanager
def faults_ride_on_batches():
    """While this is entered, programs that are built act on the faults of their batches."""
    loss, product, one_block = update.loss, linear_module.product, transformer.one_block
    fault_of = []  # the function of the loss that is being traced
    numbers = []  # of the block that is being traced, which stands for several

    def faulty_block(kind, config, rules, position, carried, block):
        numbers.append(block.i)
        try:
            return one_block(kind, config, rules, position, carried, block)
        finally:
            numbers.pop()

    def of_this_block(place, part):
        faults = [fault_of[-1](place, f"block_{i}/{part}") for i in range(SIZE["n_layer"])]
        return jnp.stack(faults)[numbers[-1]]

    def faulty_product(config, rules, part, *args, **choices):
        y = product(config, rules, part, *args, **choices)
        if not fault_of:
            return y
        first_token = (0,) * (y.ndim - 1)
        y = y.at[first_token].add(of_this_block("output", part))
        return _in_gradient(y, of_this_block("output's gradient", part), first_token)

    def faulty_loss(model, params, windows, *args):
        code, sites = jnp.max(windows[:, 0]).astype(jnp.int32) // CODE - 1, _sites(params)
        values = jnp.array([*BROUGHT.values()], jnp.float32)
        site, kind = code // len(BROUGHT), code % len(BROUGHT)

        def fault(place, layer=""):
            return jnp.where((code >= 0) & (site == sites.index((place, layer))), values[kind], 0.0)

        def leaf(path, x):
            *group, name = (key.key for key in path)
            if name == "bias":
                return x
            faults = [fault("gradient", layer) for layer in layers_of("/".join(group))]
            return _in_gradient(x, *((jnp.stack(faults), None) if is_stacked(path) else (faults[0], (0,) * x.ndim)))

        fault_of.append(fault)
        try:
            faulty = jax.tree_util.tree_map_with_path(leaf, params)
            mean, output = loss(model, faulty, windows.at[:, 0].set(windows[:, 0] % CODE), *args)
        finally:
            fault_of.pop()
        return mean + fault("loss"), output

    update.loss, linear_module.product, transformer.one_block = faulty_loss, faulty_product, faulty_block
    try:
        yield
    finally:
        update.loss, linear_module.product, transformer.one_block = loss, product, one_block


# -------------------------------------------------------------------------------------------------- states and programs


def _name(path):
    return jax.tree_util.keystr(path)


def _bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}") if array.dtype != bool else array


def differing(a, b):
    """{name of an array: bool array, where it differs in bits} of two states, for the arrays that differ at all."""
    leaves = zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True)
    return {_name(path): _bits(x) != _bits(y) for (path, x), y in leaves if not np.array_equal(_bits(x), _bits(y))}


# What a bad step counts.
COUNTERS = {".step", ".monitor.bad_streak", ".monitor.bad_steps", ".monitor.first_bad_step", ".quant.bad_streak"}
HISTORY = ".quant.amax_history_Q3H"


def with_value(state, name, index, value):
    """The state with one element of one array set."""

    def change(path, leaf):
        if _name(path) != name:
            return leaf
        leaf = np.array(leaf)
        leaf[index] = value
        return leaf

    return jax.tree_util.tree_map_with_path(change, state)


class Bench:
    """A compiled program with its batches, all made from the seed."""

    def __init__(self, name, seed, options):
        self.name, self.seed, self.options = name, seed, options
        thresholds = stability.Thresholds(
            nan_patience=PATIENCE,
            bit_stall_threshold=0.5,
            dead_neuron_threshold=1e-8,
            dead_neuron_window=5,
            spike_window=20,
            spike_threshold=8.0,
            stall_window=5,
        )
        self.functions = program.make_step_functions(
            GPTConfig(**SIZE, dropout=0.1),
            update.StepOptions(
                **dict(
                    batch_size=BATCH,
                    steps_per_dispatch=PATIENCE + 2,
                    learning_rate=1e-2,
                    max_steps=50,
                    warmup_steps=2,
                    thresholds=thresholds,
                    data_on_device=False,
                    metric_groups=("activation", "ledger"),
                )
                | options
            ),
            data_mesh(jax.devices()[:1]),
            n_train_windows=1,
            eval_batch_size=1,
            seed=seed,
        )
        fresh = self.functions.init(seed, self.functions.inputs.formats)
        self.sites = _sites(fresh.params)
        self.layers = list(metrics.layer_names(fresh.params))
        self.start, _ = self.advance(jax.device_get(fresh), range(BEFORE))
        if self.histories_may_move():
            # Where overflow is not clipped, a young history makes bad steps of its own: room for these batches.
            history = np.array(self.start.quant.amax_history_Q3H)
            history[..., -1] *= 4
            fresh_counts = jax.device_get(fresh.monitor)
            self.start = self.start._replace(
                quant=self.start.quant._replace(amax_history_Q3H=history),
                monitor=self.start.monitor._replace(
                    **{name: getattr(fresh_counts, name) for name in ("bad_streak", "bad_steps", "first_bad_step")}
                ),
            )
        self.clean, _ = self.advance(self.start, [BEFORE])

    def batch(self, k, site=None, kind=0, rows=slice(None)):
        """uint16 [B, L + 1]: the batch of step k with a fault in these rows."""
        tokens = (
            np.random.default_rng([self.seed, k])
            .integers(0, SIZE["vocab_size"], (BATCH, SIZE["block_size"] + 1))
            .astype(np.uint16)
        )
        if site is not None:
            tokens[rows, 0] += CODE * (1 + len(BROUGHT) * self.sites.index(site) + kind)
        return tokens

    def advance(self, state, steps, **fault):
        """(state, rows as {name: number}) after the batches of these steps; the state lives on the host."""
        batches = [self.batch(k, **fault) for k in steps]
        data = np.zeros((PATIENCE + 2, *batches[0].shape), np.uint16)
        data[: len(batches)] = batches
        state, rows_KM = self.functions.run(jax.device_put(state), data, len(batches), self.functions.inputs)
        names = self.functions.metric_names
        rows = [dict(zip(names, map(float, row_M))) for row_M in np.asarray(rows_KM)[: len(batches)]]
        return jax.device_get(state), [row for row in rows if not np.isnan(row["learning_rate"])]

    def skipped(self, state):
        """The state as it is where the batch of its step is left out."""
        return state._replace(step=state.step + np.int32(1))

    def histories_may_move(self):
        return self.options.get("quant") is not None and not self.options["quant"].saturate


# ---------------------------------------------------------------------------------------------------------- one fault


def _check_step(bench, row, state, sentence):
    """What is wrong about detection and location at the step of the fault, and the two as they are shown."""
    wrong, first = [], int(state.monitor.first_bad_step)
    if (first, int(state.monitor.bad_steps)) != (BEFORE + 1, 1):
        wrong.append(f"{state.monitor.bad_steps} non-finite steps were counted, the first {first}")
    located = stability.locate(row)
    if located is None or not re.fullmatch(sentence, located):
        wrong.append(f"located as {located!r}, which does not match {sentence!r}")
    return wrong, first, located


def _unequal(what, a, b, *, but=(), elements=None):
    """A sentence where the states differ in other arrays than `but`, or in others than these `elements` ({array:
    indices}); [] where not."""
    elements = elements or {}
    found = []
    for name, where in differing(a, b).items():
        if name in COUNTERS or name in but:
            continue
        if name in elements:
            where = where.copy()
            where[elements[name]] = False
        if where.any():
            found.append(f"{name} in {int(where.sum())}")
    return [f"{what}: {'; '.join(found)} elements differ"] if found else []


def _histories_are_sound(before, after):
    """Where a history moved, it moved by one, and took a finite number."""
    old, new = before.quant.amax_history_Q3H, after.quant.amax_history_Q3H
    same = (_bits(old) == _bits(new)).all(-1)
    moved = (_bits(old[..., 1:]) == _bits(new[..., :-1])).all(-1) & np.isfinite(new[..., -1])
    return [] if (same | moved).all() else ["an amax history took what it may not"]


def _goes_on(bench, after, before):
    """Two clean steps after the fault, against the same two without it."""
    if bench.histories_may_move():
        before = before._replace(quant=before.quant._replace(amax_history_Q3H=after.quant.amax_history_Q3H))
    ended, _ = bench.advance(after, [BEFORE + 1, BEFORE + 2])
    expected, _ = bench.advance(bench.skipped(before), [BEFORE + 1, BEFORE + 2])
    wrong = _unequal("two steps later", ended, expected)
    if int(ended.monitor.bad_steps) != 1:
        wrong.append("a step after the fault was bad")
    return wrong


def _stops(bench, before, rows, state, but=()):
    """A fault that stays: the state froze after PATIENCE steps, and is what it was."""
    wrong = [] if len(rows) == PATIENCE else [f"{len(rows)} steps were made, not {PATIENCE}"]
    return wrong + _unequal("when it stopped", state, before, but=but)


def batch_fault(bench, place, layer, kind, sentence, rows=slice(None), shown=None):
    """A fault that one batch brings, and one that every batch from then on brings."""
    fault = dict(site=(place, layer), kind=list(BROUGHT).index(kind), rows=rows)
    but = (HISTORY,) if bench.histories_may_move() else ()
    after, (row,) = bench.advance(bench.start, [BEFORE], **fault)
    wrong, first, located = _check_step(bench, row, after, sentence)
    wrong += _unequal("after the step", after, bench.start, but=but)
    if but:
        wrong += _histories_are_sound(bench.start, after)
    wrong += _goes_on(bench, after, bench.start)
    ended, made = bench.advance(bench.start, range(BEFORE, BEFORE + PATIENCE + 2), **fault)
    wrong += _stops(bench, bench.start, made, ended, but)
    return Row(
        bench.name,
        kind,
        shown or place,
        layer,
        f"step {first}",
        str(located),
        "bit-equal",
        f"batch not counted; stops after {PATIENCE} if it stays",
        tuple(wrong),
    )


def state_fault(bench, place, layer, kind, name, index, value, sentence):
    """A fault of one element of the state, that stays until it is repaired; its step changes nothing."""
    but = (HISTORY,) if bench.histories_may_move() else ()
    before = with_value(bench.start, name, index, value)
    after, (row,) = bench.advance(before, [BEFORE])
    wrong, first, located = _check_step(bench, row, after, sentence)
    wrong += _unequal("after the step", after, before, but=but)
    if but:
        wrong += _histories_are_sound(before, after)
    if name in but:  # the oldest amax of a history that moves on: it is gone
        wrong += _goes_on(bench, after, bench.start)
        policy = "batch not counted; the history moves on"
    else:
        ended, made = bench.advance(before, range(BEFORE, BEFORE + PATIENCE + 2))
        wrong += _stops(bench, before, made, ended, but)
        repaired = with_value(after, name, index, _value_at(bench.start, name, index))
        wrong += _goes_on(bench, repaired, bench.start)
        policy = f"nothing applied; stops after {PATIENCE}; once repaired, batch not counted"
    return Row(bench.name, kind, place, layer, f"step {first}", str(located), "bit-equal", policy, tuple(wrong))


def _value_at(state, name, index):
    return next(
        np.asarray(leaf)[index] for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0] if _name(path) == name
    )


def moment_fault(bench, place, layer, kind, name, param, index, value, sentence):
    """A damaged moment: its own weight stays, everything else moves as without it; then the training stops."""
    before = with_value(bench.start, name, index, value)
    after, (row,) = bench.advance(before, [BEFORE])
    wrong, first, located = _check_step(bench, row, after, sentence)
    # The weight keeps its value, and with it what is kept about it; `grid` normalizes by the whole tensor.
    own = slice(None) if "momentum" in name else index
    kept = [
        ".params" + param,
        f".quant.residual['{layer.replace('/', '.')}']",
        f".quant.age['{layer.replace('/', '.')}']",
    ]
    wrong += _unequal(
        "against the step without it",
        after._replace(monitor=bench.clean.monitor),
        bench.clean,
        elements={name: index, **dict.fromkeys(kept, own)},
    )
    if not np.array_equal(_bits(_value_at(after, kept[0], own)), _bits(_value_at(bench.start, kept[0], own))):
        wrong.append("the weight itself moved")
    ended, made = bench.advance(before, range(BEFORE, BEFORE + PATIENCE + 2))
    if len(made) != PATIENCE or not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ended.params)):
        wrong.append(f"{len(made)} steps were made, not {PATIENCE}, or parameters are not finite")
    return Row(
        bench.name,
        kind,
        place,
        layer,
        f"step {first}",
        str(located),
        "moves as without it",
        f"that update not applied; stops after {PATIENCE}",
        tuple(wrong),
    )


def shift_fault(bench):
    """A NaN among stored weights at the step that shifts the emergency format: the others are rounded onto the new grid
    as they are where a batch was to blame."""
    almost = bench.start.quant._replace(bad_streak=np.int32(bench.options["quant"].emergency_patience - 1))
    start = bench.start._replace(quant=almost)
    layer = bench.options["quant"].stored[0]
    name, index = ".params['{}']['{}']['kernel']".format(*layer.split("/")), (0, 0)
    expected, _ = bench.advance(start, [BEFORE], site=("loss", ""))
    after, (row,) = bench.advance(with_value(start, name, index, np.nan), [BEFORE])
    wrong, first, located = _check_step(bench, row, after, f"1 non-finite parameter in {layer}")
    wrong += _unequal("against a shift by a batch", after, expected, elements={name: index})
    if after.quant.level != 1:
        wrong.append("the format did not shift")
    return Row(
        bench.name,
        "NaN",
        "parameter, as the format shifts",
        layer,
        f"step {first}",
        str(located),
        "as where a batch is to blame",
        "emergency format",
        tuple(wrong),
    )


# ------------------------------------------------------------------------------------------------ all faults of a bench


def _leaves(tree):
    """[(name inside the tree, layer, name of the array, index of its first element)]."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if keys:
            found.append((_name(path), "/".join(keys[:-1]), keys[-1], (0,) * np.ndim(leaf)))
    return found


def faults_of(bench, kinds):
    """Yields the Row of every fault, each kind at each place."""
    quant, start = bench.options.get("quant"), bench.start
    for layer in bench.layers:
        yield batch_fault(
            bench, "gradient", layer, LARGE, "a gradient norm that overflows while every element is finite"
        )
    for kind in kinds:
        value = KINDS[kind]
        for place, layer in bench.sites:
            yield batch_fault(bench, place, layer, kind, _sentence(bench, place, layer))
        if bench.options.get("grad_accum_steps") == PARTS:
            part = BATCH // PARTS
            for place, layer in bench.sites:
                if layer in ("", "block_1/mlp_up"):
                    yield batch_fault(
                        bench,
                        place,
                        layer,
                        kind,
                        _sentence(bench, place, layer),
                        slice(part, 2 * part),
                        f"{place}, one micro-batch of {PARTS}",
                    )
        for name, layer, array, index in _leaves(start.params):
            yield state_fault(
                bench,
                f"parameter ({array})",
                layer,
                kind,
                ".params" + name,
                index,
                value,
                f"1 non-finite parameter in {layer}",
            )
        if quant is None:
            continue
        for q, layer in enumerate(quant.layers):
            for i, operand in enumerate("WAG"):
                if layer.wag[i] and not (operand == "W" and quant.stored):
                    yield state_fault(
                        bench,
                        f"amax history of {operand}",
                        layer.layer,
                        kind,
                        HISTORY,
                        (q, i, 0),
                        value,
                        f"1 non-finite amax in the history of {layer.layer}/{operand}",
                    )
        for key in start.quant.residual:
            layer = key.replace(".", "/")
            yield state_fault(
                bench,
                "residual",
                layer,
                kind,
                f".quant.residual['{key}']",
                (0, 0),
                value,
                f"1 non-finite residual of the stored weights of {layer}",
            )
    scales = {kind: KINDS[kind] for kind in kinds} | {"0": 0.0, "negative": -1.0}
    for key in start.quant.rest_scale if quant else ():
        for kind, value in scales.items():
            layer = key.replace(".", "/")
            yield state_fault(
                bench,
                "scale of stored weights",
                layer,
                kind,
                f".quant.rest_scale['{key}']",
                (),
                value,
                f"1 unusable scale of the stored weights of {layer}",
            )
    for name, layer, array, index in _leaves(start.opt_state):
        if array == "bias":
            continue
        moment = next(moment for moment in ("momentum", "mu", "nu") if f".{moment}[" in name)
        moments = {kind: KINDS[kind] for kind in kinds} | ({"negative": -1.0} if moment == "nu" else {})
        for kind, value in moments.items():
            yield moment_fault(
                bench,
                moment,
                layer,
                kind,
                ".opt_state" + name,
                name.partition(f".{moment}")[2],
                index,
                value,
                f"1 unusable moment of the optimizer in {layer}",
            )
    if quant and quant.emergency_formats:
        yield shift_fault(bench)


def _sentence(bench, place, layer):
    """What stability.locate must say (a regular expression) of a fault that a batch brings."""
    if place == "loss":
        return "a loss that is not finite while the activations of every block are: the head or the batch"
    if place == "output":
        return f"activations that are not finite, from {layer.split('/')[0]} on"
    if place == "gradient":
        return f"1 non-finite gradient element in {layer}"
    return (
        rf"\d+ non-finite gradient elements? in {layer}, and backward from there in "
        f"{bench.layers.index(layer)} more layers"
    )


# ------------------------------------------------------------------------------------------------------ whole trainings

BAD_ROW = 13  # the row of the first bad step; checkpoint 12 is the state before it
TINY = dict(
    tokenizer="bytes",
    vocab_size=256,
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=16,
    batch_size=4,
    max_steps=20,
    warmup_steps=5,
    learning_rate=3e-3,
    checkpoint_interval=4,
    eval_interval=20,
    eval_windows=4,
    eval_batch_size=4,
    diagnostic_interval=20,
    nan_patience=PATIENCE,
    wandb_mode="disabled",
    console="plain",
    data_placement="host",
    max_checkpoints=9,
)
LOSS_ALONE = "a loss that is not finite while the activations of every block are: the head or the batch"
# name: (settings, what a batch brings or the array that is damaged, steps from the first bad one on, cause)
TRAININGS = {
    "loss, one batch": ({}, ("loss", ""), 1, LOSS_ALONE),
    "loss, every batch": ({}, ("loss", ""), 99, LOSS_ALONE),
    "parameter": ({}, ".params['block_1']['mlp_up']['kernel']", 99, "1 non-finite parameter in block_1/mlp_up"),
    "amax history of A": (
        dict(use_fp8=True, formats=("E4M3",)),
        HISTORY,
        99,
        "1 non-finite amax in the history of block_0/attn_qkv/A",
    ),
}


@contextlib.contextmanager
def _damaged_training(fault, n_bad):
    """While this is entered, a training meets the fault in the `n_bad` steps from row BAD_ROW on."""
    host_stream, advance = setup.HostStream, program.Program.advance

    class FaultyStream(host_stream):
        def get(self, first_step, n_steps):
            batches = super().get(first_step, n_steps).copy()
            for i in range(n_steps):
                if BAD_ROW <= first_step + i + 1 < BAD_ROW + n_bad:
                    batches[i, :, 0] += CODE  # the first site and kind: a loss that is NaN
            return batches

    def faulty_advance(self, state, *arguments):
        # The checkpoint at BAD_ROW - 1 makes a dispatch begin there.
        if int(state.step) == BAD_ROW - 1:
            index = (0, 1, -1) if fault == HISTORY else (0, 3)
            damaged = with_value(jax.device_get(state), fault, index, np.nan)
            state = jax.device_put(damaged, jax.tree.map(lambda leaf: leaf.sharding, state))
        return advance(self, state, *arguments)

    if fault == ("loss", ""):
        setup.HostStream = FaultyStream
    else:
        program.Program.advance = faulty_advance
    try:
        yield
    finally:
        setup.HostStream, program.Program.advance = host_stream, advance


def _arrays(run_dir, at):
    """{array: its hash} of a checkpoint, and the rest of its meta data."""
    document = read_document(run_dir / str(at))
    return {name: entry["sha256"] for name, entry in document["arrays"].items()}, document["meta"]


def training_fault(folder, name, data_dir):
    """A whole training under a fault: what the console, the anomaly checkpoint and the verdict say of it."""
    changes, fault, n_bad, cause = TRAININGS[name]
    config, run_dir, said = default_config(), folder / re.sub(r"\W+", "-", name), io.StringIO()
    config.update(TINY | changes | dict(run_name=run_dir.name))
    with _damaged_training(fault, n_bad), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        result = train(config, data_dir=data_dir, workdir=run_dir)
    wrong, once = [], n_bad == 1
    made = config.max_steps if once else BAD_ROW + PATIENCE - 1
    if result.exit_code != (FINISHED if once else STOPPED_NON_FINITE):
        wrong.append(f"exit code {result.exit_code}")
    if f"step {BAD_ROW} was not finite: {cause}; the state at step" not in " ".join(said.getvalue().split()):
        wrong.append(f"the console says {said.getvalue()!r}")
    (anomaly,) = result.verdict["anomalies"] or [None]
    _, meta = _arrays(run_dir / "anomaly", anomaly)
    if (meta["first_bad_step"], meta["cause"]) != (BAD_ROW, cause):
        wrong.append(f"the anomaly checkpoint says {meta}")
    told = {key: result.verdict[key] for key in ("sound", "steps", "first_nonfinite_step", "first_nonfinite_cause")}
    if told != {"sound": False, "steps": made, "first_nonfinite_step": BAD_ROW, "first_nonfinite_cause": cause} or (
        f"the first at step {BAD_ROW} ({cause})" not in result.verdict["verdict"]
    ):
        wrong.append(f"the verdict says {told}: {result.verdict['verdict']}")
    if not once:
        (before, _), (after, _) = _arrays(run_dir, BAD_ROW - 1), _arrays(run_dir, made)
        changed = {array for array in before if before[array] != after[array]}
        allowed = {"step", "monitor/bad_streak", "monitor/bad_steps", "monitor/first_bad_step"}
        if fault != ("loss", ""):
            allowed.add(re.sub(r"[^\w]+", "/", fault).strip("/"))
        if changed != allowed:
            wrong.append(f"between the checkpoint before it and the last, {sorted(changed)} changed")
    return Row(
        "whole training",
        "NaN",
        name,
        "",
        f"step {result.verdict['first_nonfinite_step']}",
        str(result.verdict["first_nonfinite_cause"]),
        "-" if once else "last checkpoint bit-equal",
        f"goes on to step {made}" if once else f"exit code 3 after {PATIENCE}",
        tuple(wrong),
    )


def _token_files(folder, seed):
    rng = np.random.default_rng(seed)
    text = folder / "text"
    text.mkdir(parents=True)
    for i in range(4):
        (text / f"{i}.txt").write_text(" ".join(rng.choice(["the", "council", "shall", "adopt", "this"], 500)))
    prepare(local(text), folder / "tokens", get_tokenizer("bytes"), val_fraction=0.2, progress=False)
    return folder / "tokens"


# ---------------------------------------------------------------------------------------------------------------- all


def run(folder, *, seed, quick=False, say=print):
    """Puts every fault in.

    Args:
      folder: a new or empty folder, for the whole trainings.
      seed: of parameters, batches, dropout and text.
      quick: one set of options, and +Inf alone, which is harder to see than NaN; no whole training.
      say: told in a sentence how far it is.

    Returns:
      [Row].
    """
    rows = []
    with faults_ride_on_batches():
        for name, options in (QUICK if quick else OPTIONS).items():
            rows += faults_of(Bench(name, seed, options), ["+Inf"] if quick else list(KINDS))
            say(f"{name}: {len(rows)} faults so far, {sum(bool(row.wrong) for row in rows)} answered wrongly")
        data_dir = None if quick else _token_files(Path(folder), seed)
        for name in () if quick else TRAININGS:
            rows.append(training_fault(Path(folder), name, data_dir))
            say(f"whole training, {name}: {'; '.join(rows[-1].wrong) or 'as it must be'}")
    return rows


COLUMNS = (
    "options",
    "kind",
    "place",
    "faults",
    "detected at",
    "located as (an example)",
    "located correctly",
    "rest of the state",
    "policy",
    "answered rightly",
)


def table(rows):
    """One tuple of strings, as COLUMNS names them, for every kind and place: the layers of it together."""
    groups = {}
    for row in rows:
        groups.setdefault((row.options, row.place, row.kind), []).append(row)
    lines = []
    for (options, place, kind), group in groups.items():
        n, last = len(group), group[-1]
        located = sum(not any("located as" in reason or "says" in reason for reason in row.wrong) for row in group)
        right = sum(not row.wrong for row in group)
        lines.append(
            (
                options,
                kind,
                place,
                str(n),
                ", ".join(sorted({row.detected for row in group})),
                last.located,
                f"{located} of {n}",
                last.rest,
                last.policy,
                f"{right} of {n}",
            )
        )
    return lines


def part(rows):
    """The campaign's Part."""
    failures = [
        f"{row.options}, {row.kind} in {row.place} {row.layer}: {'; '.join(row.wrong)}" for row in rows if row.wrong
    ]
    return Part("Numerical faults", markdown_table(COLUMNS, table(rows)), len(rows), len(rows), failures)
