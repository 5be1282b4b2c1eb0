"""What a training step costs, and what each part of it adds: metrics, number formats, rounding.

These machines are noisy, so a figure alone means little: every variant is run once per round, one after the other, and
a variant's cost is the median over rounds of its ratio to the bare step *of the same round*. Compilation and the
first, warming step are reported apart.
"""

import contextlib
import random
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from altgrad_jax import config as settings
from altgrad_jax import flops, optimizer
from altgrad_jax.config import FORMAT_GROUPS, METRIC_GROUPS
from altgrad_jax.console import make_console
from altgrad_jax.data.dataset import gather_windows
from altgrad_jax.errors import UserError
from altgrad_jax.formats import get_format
from altgrad_jax.mesh import data_mesh
from altgrad_jax.model import GPT, init_params
from altgrad_jax.quantize import format_params, round_to_format, stochastic_seed
from altgrad_jax.step import make_loss, make_step_functions
from altgrad_jax.training import Program, model_config, model_flops_per_step, step_options

BARE = "bare step"
N_WINDOWS = 399  # of random tokens: their values do not matter to the time, the data file's size hardly
ALL_METRICS = "all metrics"
METRIC_VARIANTS = {
    "monitor only": {"metrics": "none"},
    **{f"+ {group}": {"metrics": group} for group in METRIC_GROUPS if group not in FORMAT_GROUPS},
    ALL_METRICS: {"metrics": "all"}}


def format_variants(fmt, native=False):
    """Variants of the step in a number format; each "+" adds to the formatted step alone or to all its statistics."""
    base = {"use_fp8": True, "formats": (fmt,)}
    rows = {
        f"{fmt} alone": base | {"metrics": "none"},
        f"{fmt} + operand statistics": base | {"metrics": "format"},
        f"{fmt} + update ledger": base | {"metrics": "ledger"},
        f"{fmt} + all statistics": base | {"metrics": "all"},
        f"{fmt} + all, scaling from own amax": base | {"scaling": "tensor"},
        f"{fmt} + all, weights stored, stochastic": base | {"weights_at_rest": "stochastic"},
        f"{fmt} + all + shadow with noise floor": base | {"use_shadow": True},
    }
    if native:
        float8 = base | {"formats": ("E4M3", "block_*:G=E5M2")}
        rows |= {"E4M3/E5M2 + all, emulated": float8, "E4M3/E5M2 + all, native": float8 | {"products": "native"}}
    return rows


def bare_run(config, device):
    """A training step that measures nothing but its loss: gradient, clipping, AdamW, in the same kind of loop.

    What the full step is compared with. Same model, same product, same optimizer; no monitor, no metrics.
    """
    loss_fn = make_loss(GPT(model_config(config, device)))
    adam = optax.chain(
        # 0 means off, where optax would scale everything to 0.
        optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity(),
        optimizer.adamw(beta1=config.beta1, beta2=config.beta2, eps=config.adam_eps, weight_decay=config.weight_decay),
        optax.scale(-config.learning_rate))

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


def bench_steps(config, variants, *, rounds, steps_per_round, say=lambda text: None):
    """Times a training step in several variants of one config, interleaved.

    Args:
      config: ConfigDict, the common part.
      variants: {name: {field: value}}; all are compared with `bare_run`, which is added as the first row.
      rounds: how often each variant is timed. steps_per_round: steps in one timed dispatch.
      say: called with a line of text as things happen.

    Returns:
      A list of dicts, one per variant: name, ms_per_step (median), tokens_per_s, ratio (median over rounds of the ratio
      to the bare step), ratio_low and ratio_high (its quartiles), baseline_ratio (the same to the row "all metrics",
      where there is one), compile_s, first_dispatch_s, n_metrics, mfu (only where the device's peak is known), rounds_s
      (every timing, seconds per step).
    """
    if config.use_fp8:
        raise UserError("the benchmark sets the number formats itself: give it a config without, and name one with "
                        "--format")
    if config.dropout or config.grad_accum_steps > 1 or config.deterministic:
        raise UserError("the benchmark's bare step has no dropout, gradient accumulation or deterministic operations, "
                        "so ratios to it would mislead: leave dropout=0, grad_accum_steps=1, deterministic=False")
    tokens_T = jax.device_put(np.random.default_rng(0).integers(
        0, min(config.vocab_size, 2 ** 16), (N_WINDOWS + 1) * config.block_size).astype(np.uint16))
    mesh = data_mesh()
    device = mesh.devices.flat[0]
    rows, running = [], []
    for name, changes in {BARE: None, **variants}.items():
        if changes is None:
            init, run = bare_run(config, device)
            n_metrics, formats, inputs = 1, (), ()
        else:
            with (changed := config.copy_and_resolve_references()).unlocked():
                changed.update(changes)
            settings.validate(changed)
            options = step_options(changed, steps_per_dispatch=steps_per_round)
            functions = make_step_functions(model_config(changed, device), options, mesh, n_train_windows=N_WINDOWS,
                                            eval_batch_size=1, seed=config.seed)
            init, run, n_metrics = functions.init, functions.run, len(functions.metric_names)
            formats, inputs = (functions.inputs.formats,), (functions.inputs,)
        state = init(config.seed, *formats)
        started = time.perf_counter()
        run = run.lower(state, tokens_T, np.int32(1), *inputs).compile()
        compiled = time.perf_counter()
        state, out = run(state, tokens_T, np.int32(1), *inputs)
        np.asarray(out)
        rows.append({"name": name, "compile_s": compiled - started, "first_dispatch_s": time.perf_counter() - compiled,
                     "n_metrics": n_metrics, "rounds_s": []})
        running.append([run, state, inputs])
        say(f"{name}: compiled in {compiled - started:.1f} s")
    for number in range(rounds):
        for row, pair in zip(rows, running, strict=True):
            started = time.perf_counter()
            pair[1], out = pair[0](pair[1], tokens_T, np.int32(steps_per_round), *pair[2])
            np.asarray(out)
            row["rounds_s"].append((time.perf_counter() - started) / steps_per_round)
        say(f"round {number + 1} of {rounds}: " + ", ".join(f"{1e3 * row['rounds_s'][-1]:.1f}" for row in rows) + " ms")
    peak = flops.peak_flops(device.device_kind, mesh.size, config.compute_dtype)
    baseline = next((row["rounds_s"] for row in rows if row["name"] == ALL_METRICS), None)
    for row in rows:
        seconds = statistics.median(row["rounds_s"])
        ratios = [own / base for own, base in zip(row["rounds_s"], rows[0]["rounds_s"], strict=True)]
        row["ms_per_step"] = 1e3 * seconds
        row["tokens_per_s"] = config.batch_size * config.block_size / seconds
        row["ratio"], row["ratio_low"], row["ratio_high"] = np.percentile(ratios, [50, 25, 75]).tolist()
        if baseline:
            row["baseline_ratio"] = statistics.median(a / b for a, b in zip(row["rounds_s"], baseline, strict=True))
        if peak:
            row["mfu"] = model_flops_per_step(config) / seconds / peak
    return rows


def format_table(rows):
    """The rows as an aligned table of plain text, ready for Markdown."""
    lines = ["| variant | ms/step | tokens/s | / bare step (quartiles) | / all metrics | metrics | compile s |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        baseline = f"{row['baseline_ratio']:.3f}" if "baseline_ratio" in row else "-"
        lines.append(f"| {row['name']} | {row['ms_per_step']:.2f} | {row['tokens_per_s']:,.0f} | {row['ratio']:.3f} "
                     f"({row['ratio_low']:.3f}-{row['ratio_high']:.3f}) | {baseline} | {row['n_metrics']} "
                     f"| {row['compile_s']:.1f} |")
    return "\n".join(lines)


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
        for loop, width in [(None, None), *((loop, width) for loop in member_loops for width in widths)]:
            name = "one run alone" if width is None else f"{width} runs, {loop}"
            program = Program(config, data_dir, make_console("quiet", 1), resources, width=width,
                              member_loop=loop or "map", devices=jax.devices()[:1])
            compile_s = program.compile()
            state = program.functions.init(config.seed, program.functions.inputs.formats)
            inputs = program.functions.inputs
            if width is not None:
                state, inputs = (program.members.stack([tree] * width) for tree in (state, inputs))
            programs.append([program, state, inputs, program.feed()(0, 1)])
            rows.append({"name": name, "width": width or 1, "compile_s": compile_s, "rounds_s": []})
            say(f"{name}: compiled in {compile_s:.1f} s")
        for number in range(rounds + 1):  # round 0 warms up
            for row, entry in zip(rows, programs, strict=True):
                program, state, inputs, data = entry
                n = np.int32(steps_per_round) if program.width is None else np.full(program.width, steps_per_round,
                                                                                    np.int32)
                started = time.perf_counter()
                entry[1], out = program.compiled[0](state, data, n, inputs)
                np.asarray(out)
                if number:
                    row["rounds_s"].append((time.perf_counter() - started) / steps_per_round)
    for row in rows:
        ratios = [own / one for own, one in zip(row["rounds_s"], rows[0]["rounds_s"], strict=True)]
        row["s_per_step"] = statistics.median(row["rounds_s"])
        row["ratio_low"], row["ratio"], row["ratio_high"] = np.percentile(ratios, [25, 50, 75]).tolist()
    return rows


def members_table(rows):
    """The rows of bench_members as a table in Markdown."""
    lines = ["| program | s a step of all | / one run alone (quartiles) | / as many alone | compile s |",
             "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {row['name']} | {row['s_per_step']:.4f} | {row['ratio']:.2f} ({row['ratio_low']:.2f}-"
                              f"{row['ratio_high']:.2f}) | {row['ratio'] / row['width']:.2f} | {row['compile_s']:.1f} |"
                              for row in rows])


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
        "clip, cast to float8_e4m3fn and back": lambda x, params, seed: jnp.clip(x, -448, 448)
        .astype(jnp.float8_e4m3fn).astype(jnp.float32),
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
        low, middle, high = np.percentile(ratios, [25, 50, 75]).tolist()
        rows.append({"name": name, "elements": n_elements, "ms": 1e3 * statistics.median(own), "ratio": middle,
                     "ratio_low": low, "ratio_high": high})
    return rows


def rounding_table(rows):
    """The rows of bench_rounding as a table in Markdown."""
    lines = ["| elements | variant | ms | / multiply (quartiles) |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {row['elements']:,} | {row['name']} | {row['ms']:.3f} | {row['ratio']:.2f} "
                              f"({row['ratio_low']:.2f}-{row['ratio_high']:.2f}) |" for row in rows])
