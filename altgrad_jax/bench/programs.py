"""Our own compiled programs as rows to be timed: the training step and the bare one, products and copies, rounding.

Every program runs on one device, the first. Programs that act on a state of the same shape share one, so that many
fit into memory together: what a state holds does not matter to the time, and each step donates it to the next.
"""

import contextlib
import functools
import os
import random
import statistics
import tempfile
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from altgrad_jax import config as settings
from altgrad_jax.bench import roofline
from altgrad_jax.bench.timing import Entry, Unavailable, quartiles
from altgrad_jax.data.dataset import gather_windows
from altgrad_jax.errors import UserError
from altgrad_jax.models.model import init_params
from altgrad_jax.numerics import optimizers
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.rounding import format_params, round_to_format, stochastic_seed
from altgrad_jax.run.alerts import rules_of
from altgrad_jax.run.record import Record
from altgrad_jax.run.setup import Feed, open_data, set_up
from altgrad_jax.run.writer import DispatchRecord, RunFacts, Writer
from altgrad_jax.step import update
from altgrad_jax.step.from_config import flops_per_step, model_config, step_options
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.program import compile_lowered, compiler_options, make_step_functions, require_float8_kernels

N_WINDOWS = 399  # of random tokens: their values do not matter to the time, the data file's size hardly


def device():
    """The device that everything runs on."""
    return jax.devices()[0]


def changed(config, changes):
    """A validated copy of the config with some fields changed."""
    with (copy := config.copy_and_resolve_references()).unlocked():
        copy.update(changes)
    settings.validate(copy)
    return copy


@contextlib.contextmanager
def memory_errors(clear=lambda: None):
    """Turns the device's lack of memory into Unavailable, after `clear`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        clear()
        raise Unavailable(f"the device's memory is too small ({str(error).splitlines()[0][:120]})") from None


def require_plain(config):
    """UserError for configs whose ratios to the bare step would mislead."""
    if config.use_fp8 or config.recipe:
        raise UserError(
            "the benchmark sets the number formats itself: give it a config without formats and recipe, and name a "
            "format with --format"
        )
    if config.dropout or config.grad_accum_steps > 1 or config.deterministic:
        raise UserError(
            "the benchmark's bare step has no dropout, gradient accumulation or deterministic operations, "
            "so ratios to it would mislead: leave dropout=0, grad_accum_steps=1, deterministic=False (the "
            "flag --deterministic asks for such operations in every row)"
        )


def bare_run(config, device) -> tuple[Any, Any]:
    """(init, run) of a training step that measures nothing but its loss, which the full step is compared with.

    Same model, same product, same gradient, clipping and AdamW, in the same kind of loop; no monitor, no metrics.
    """
    loss_fn = functools.partial(update.loss, model_config(config, device))
    adam = optax.chain(
        # 0 means off, where optax would scale everything to 0.
        optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity(),
        optimizers.adamw(beta1=config.beta1, beta2=config.beta2, eps=config.adam_eps, weight_decay=config.weight_decay),
        optax.scale(-config.learning_rate),
    )

    def init(seed):
        params = init_params(model_config(config, device), seed)
        return params, adam.init(params), jnp.int32(0)

    def run(state, tokens_T, n_steps):
        def body(i, carry):
            (params, opt_state, step), _ = carry
            numbers = step * config.batch_size + jnp.arange(config.batch_size)
            windows = gather_windows(tokens_T, numbers % N_WINDOWS, config.block_size, xp=jnp)
            (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, windows, None)
            updates, opt_state = adam.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, step + 1), loss

        return jax.lax.fori_loop(0, n_steps, body, (state, jnp.float32(0)))

    return jax.jit(init), jax.jit(run, donate_argnums=0)


class Bench:
    """What programs of one section share: token arrays, states, and the programs compiled before."""

    def __init__(self):
        self._states, self._tokens, self._compiled = {}, {}, {}
        self._locks, self._lock = {}, threading.Lock()

    def step(self, config, *, buffer_steps, bare=False):
        """The compiled Step of a config; compiled once for equal ones."""
        names = [name for name in settings.FIELDS if name not in ("run_name", "tags", "checkpoint_dir")]
        key = (bare, buffer_steps, *(config[name] for name in names))
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # rows that share a program ask for it at the same time
            if key not in self._compiled:
                with memory_errors():
                    self._compiled[key] = Step(self, config, buffer_steps, bare)
        return self._compiled[key]

    def tokens(self, config):
        """uint16 [T] random tokens on the device."""
        key = config.vocab_size, config.block_size
        with self._lock:
            if key not in self._tokens:
                self._tokens[key] = jax.device_put(
                    np.random.default_rng(0)
                    .integers(0, min(config.vocab_size, 2**16), (N_WINDOWS + 1) * config.block_size)
                    .astype(np.uint16)
                )
            return self._tokens[key]

    def holder(self, key, init):
        """A list with the one state that all programs of this kind of state share."""
        if key not in self._states:
            self._states[key] = [init()]
        return self._states[key]

    def has(self, key):
        return key in self._states

    def free(self):
        """Lets go of all states, not of the programs."""
        self._states.clear()


class Step:
    """A compiled K-step loop of one config.

    Attributes:
      facts: compile_s, n_metrics, memory_bytes.
    """

    def __init__(self, bench, config, buffer_steps, bare):
        self.bench, self.config, self.bare, self.buffer_steps = bench, config, bare, buffer_steps
        own, quant = device(), None
        if bare:
            init, run = bare_run(config, own)
            abstract, arguments = jax.eval_shape(init, config.seed), ()
            self._init, self.names = lambda: init(config.seed), ("loss",)
        else:
            options = step_options(config, steps_per_dispatch=buffer_steps)
            functions = make_step_functions(
                model_config(config, own),
                options,
                data_mesh([own]),
                n_train_windows=N_WINDOWS,
                eval_batch_size=1,
                seed=config.seed,
            )
            run, abstract, arguments = functions.run, functions.abstract_state, (functions.inputs,)
            self._init = lambda: functions.init(
                config.seed, *(() if functions.inputs.formats is None else (functions.inputs.formats,))
            )
            self.names = functions.metric_names
            quant = options.quant
        self._arguments = arguments
        self._key = (
            bare,
            str(jax.tree.structure(abstract)),
            tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(abstract)),
        )
        self._state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        tokens_T = bench.tokens(config)
        started = time.perf_counter()
        lowered = run.lower(abstract, tokens_T, np.int32(1), *arguments)
        self.compiled = compile_lowered(lowered, compiler_options(quant, own.platform, config.xla_options))
        self.facts = {
            "compile_s": time.perf_counter() - started,
            "n_metrics": len(self.names),
            "memory_bytes": roofline.memory_bytes(self.compiled),
        }
        if quant is not None and quant.native:
            require_float8_kernels(self.compiled, own, len(quant.layers))

    def prepare(self):
        """Makes the state, unless there is one; Unavailable if the memory is too small for it and the program."""
        needed = max(self.facts["memory_bytes"] or 0, self._state_bytes)  # the state is among the program's arguments
        if self.bench.has(self._key):
            needed -= self._state_bytes
        roofline.require_memory(needed, roofline.free_memory(device().memory_stats()))
        with memory_errors(self.bench.free):
            jax.block_until_ready(self.bench.holder(self._key, self._init))

    def dispatch(self, n):
        """Makes n <= buffer_steps steps; the rows float32 [n, M] on the host (bare: the loss)."""
        with memory_errors(self.bench.free):
            holder = self.bench.holder(self._key, self._init)
            holder[0], out = self.compiled(holder[0], self.bench.tokens(self.config), np.int32(n), *self._arguments)
            rows = np.asarray(out)
        if self.bare:
            return rows
        if np.isnan(rows[n - 1, self.names.index("learning_rate")]):
            self.bench.free()
            raise Unavailable("it froze on non-finite steps, so there are no steps to be timed")
        return rows[:n]

    def monitor(self):
        """The stability monitor as the last dispatch left it."""
        return self.bench.holder(self._key, self._init)[0].monitor

    def entry(self, name, *, steps, steps_per_dispatch):
        """An Entry: `steps` steps in dispatches of `steps_per_dispatch`."""

        def run():
            for done in range(0, steps, steps_per_dispatch):
                self.dispatch(min(steps_per_dispatch, steps - done))

        return Entry(name, run, steps, self.prepare, facts=dict(self.facts, steps_per_dispatch=steps_per_dispatch))

    def logged_entry(self, name, resources, *, steps, steps_per_dispatch):
        """As `entry`, with the record of a training: the counters it looks at are fetched too, and rows go to a Writer
        with a metrics.jsonl and timing.jsonl in a temporary folder.

        As in training, the writer's thread works on the rows of one dispatch while the next is computed: each timed
        dispatch begins by handing over the rows of the one before, the first one those of the round before.
        """
        config = self.config
        folder = resources.enter_context(tempfile.TemporaryDirectory())
        writer = Writer(
            Record.open(os.path.join(folder, "run")),
            RunFacts(
                max_steps=10**9,
                tokens_per_step=config.batch_size * config.block_size,
                log_interval=config.log_interval,
                layer_interval=config.layer_interval,
                alert_interval=config.alert_interval,
                flops_per_step=flops_per_step(config),
            ),
            rules=rules_of(config),
        )
        resources.callback(writer.close)
        waiting, made = [], 0

        def dispatch(n):
            nonlocal made
            if waiting:
                writer.submit(waiting.pop())
            started = time.perf_counter()
            rows_KM = self.dispatch(n)
            monitor = self.monitor()
            jax.device_get((monitor.bad_streak, monitor.first_bad_step))
            waiting.append(
                DispatchRecord(
                    first_step=made + 1,
                    names=self.names,
                    values=rows_KM,
                    seconds=time.perf_counter() - started,
                )
            )
            made += len(rows_KM)

        def run():
            for done in range(0, steps, steps_per_dispatch):
                dispatch(min(steps_per_dispatch, steps - done))

        return Entry(
            name,
            run,
            steps,
            self.prepare,
            lambda: writer.flush(fsync=False),
            dict(self.facts, steps_per_dispatch=steps_per_dispatch),
        )


# ------------------------------------------------------------------------------------------------- the device's limits


@functools.cache
def _copy_program():
    # In place, for on a CPU fresh memory costs more than the copy (pages that are touched for the first time). Adding a
    # number that is not known when it is compiled: a plain copy would be optimized away.
    return jax.jit(lambda x, zero: x + zero, donate_argnums=0)


@functools.cache
def _product_program(dtype):
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.DEFAULT
    return jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32))


def _copy_in_numpy(target, source, copies):
    for _ in range(copies):
        np.copyto(target, source)


def probe_sizes(quick=False):
    """(n of the square products, products a timing, bytes of the copied array, copies a timing) for the device."""
    if device().platform == "cpu":
        return (1024, 4, 2**26, 2) if quick else (2048, 3, 2**28, 2)
    return 8192, 10, 2**30, 10


def probes(sizes):
    """Entries whose facts turn their times into the device's rates: products in bfloat16 and float32 that accumulate in
    float32, and reading and writing, once each, every element of an array that no cache holds."""
    n, repeats, size, copies = sizes
    array = [jnp.zeros(size // 4, jnp.float32)]

    def entry(name, function, repeats, **facts):
        def run():
            out = None
            for _ in range(repeats):
                out = function()
            jax.block_until_ready(out)

        return Entry(name, run, repeats, facts=facts)

    def copy():
        array[0] = _copy_program()(array[0], np.float32(0))
        return array[0]

    entries = []
    for dtype in ("bfloat16", "float32"):
        a, b = (jnp.asarray(np.random.default_rng(i).normal(size=(n, n)), dtype) for i in range(2))
        entries.append(
            entry(
                f"product, {dtype}",
                functools.partial(_product_program(dtype), a, b),
                repeats,
                dtype=dtype,
                flops=2 * n**3,
            )
        )
    entries.append(entry("copy", copy, copies, bytes=2 * size))
    if device().platform == "cpu":
        # The C library's copy goes around the caches, which a compiled loop does not.
        source, target = np.zeros(size // 4, np.float32), np.ones(size // 4, np.float32)
        entries.append(
            Entry(
                "copy, numpy",
                functools.partial(_copy_in_numpy, target, source, copies),
                copies,
                facts={"bytes": 2 * size},
            )
        )
    return entries


# ------------------------------------------------------------------------------------------------- several runs in one


def bench_members(config, widths, member_loops, *, data_dir, rounds, steps_per_round=2, say=lambda text: None):
    """Times a training step of several runs in one program against the step of one run alone, interleaved.

    Args:
      widths: runs side by side. member_loops: "map", "vmap" or both (step.over_members).

    Returns:
      Rows {name, width, s_per_step, ratio, ratio_low, ratio_high, rounds_s, compile_s}: of all its runs together;
      ratios are medians and quartiles over rounds to the first row, one run alone.
    """
    rows, programs = [], []
    with contextlib.ExitStack() as resources:
        data = open_data(config, data_dir, say)
        for loop, width in [(None, None), *((loop, width) for loop in member_loops for width in widths)]:
            name = "one run alone" if width is None else f"{width} runs, {loop}"
            setup = set_up(config, data, say, devices=jax.devices()[:1], side_by_side=width is not None)
            program = setup.program(width, loop or "map")
            started = time.perf_counter()
            program.compile()
            compile_s = round(time.perf_counter() - started, 3)
            state = program.functions.init(config.seed, program.functions.inputs.formats)
            feed = Feed(setup, program)
            resources.callback(feed.close)
            state, inputs = program.stack([state]), program.stack([program.functions.inputs])
            programs.append([program, state, inputs, feed.at(0, 1)])
            rows.append({"name": name, "width": width or 1, "compile_s": compile_s, "rounds_s": []})
            say(f"{name}: compiled in {compile_s:.1f} s")
        for number in range(rounds + 1):  # round 0 warms up
            for row, entry in zip(rows, programs, strict=True):
                program, state, inputs, tokens = entry
                n_R = np.full(program.width or 1, steps_per_round, np.int32)
                started = time.perf_counter()
                entry[1], _ = program.advance(state, tokens, n_R, inputs)
                if number:
                    row["rounds_s"].append((time.perf_counter() - started) / steps_per_round)
    for row in rows:
        ratios = [own / one for own, one in zip(row["rounds_s"], rows[0]["rounds_s"], strict=True)]
        row["s_per_step"] = statistics.median(row["rounds_s"])
        row["ratio_low"], row["ratio"], row["ratio_high"] = quartiles(ratios)
    return rows


def bench_rounding(n_elements, *, rounds, repeats=3):
    """What rounding onto a format costs beside an elementwise multiply of the same array.

    The variants run one after the other in every round, each round in another order. E4M3, saturating; the format is
    traced data, so all formats cost alike.

    Returns:
      Rows {name, ms, ratio, ratio_low, ratio_high}: medians over `rounds`, and the quartiles of the ratio.
    """
    params, seed = format_params(get_format("E4M3")), stochastic_seed(0, 1, 2)
    x = jax.device_put(np.random.default_rng(0).normal(size=(n_elements // 256, 256)).astype(np.float32))
    variants = {
        "multiply": lambda x, params, seed: x * params.max_finite,
        "multiply again (noise of this table)": lambda x, params, seed: x * params.max_finite,
        "nearest": lambda x, params, seed: round_to_format(x, params),
        "stochastic": lambda x, params, seed: round_to_format(x, params, seed=seed),
        "clip, cast to float8_e4m3fn and back": lambda x, params, seed: (
            jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32)
        ),
    }
    compiled = {name: jax.jit(function).lower(x, params, seed).compile() for name, function in variants.items()}
    seconds = {name: [] for name in compiled}
    shuffled, order = list(compiled), random.Random(0)
    for number in range(rounds + 1):  # round 0 warms up
        order.shuffle(shuffled)
        for name in shuffled:
            started = time.perf_counter()
            for _ in range(repeats):
                compiled[name](x, params, seed).block_until_ready()
            if number:
                seconds[name].append((time.perf_counter() - started) / repeats)
    rows = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["multiply"], strict=True)]
        low, middle, high = quartiles(ratios)
        rows.append(
            {
                "name": name,
                "elements": n_elements,
                "ms": 1e3 * statistics.median(own),
                "ratio": middle,
                "ratio_low": low,
                "ratio_high": high,
            }
        )
    return rows
