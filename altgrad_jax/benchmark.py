"""What a training step costs, and what each part of it adds.

These machines are noisy, so a figure alone means little: every variant is run once per round, one after the other, and
a variant's cost is the median over rounds of its ratio to the bare step *of the same round*. Compilation and the
first, warming step are reported apart.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from altgrad_jax import flops, optimizer
from altgrad_jax.config import METRIC_GROUPS
from altgrad_jax.data.dataset import gather_windows
from altgrad_jax.errors import UserError
from altgrad_jax.model import GPT, init_params
from altgrad_jax.step import data_mesh, make_loss, make_step_functions
from altgrad_jax.training import model_config, model_flops_per_step, step_options

BARE = "bare step"
N_WINDOWS = 399  # of random tokens: their values do not matter to the time, the data file's size hardly
METRIC_VARIANTS = {"monitor only": "none", **{f"+ {group}": group for group in METRIC_GROUPS}, "all metrics": "all"}


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
      to the bare step), ratio_low and ratio_high (its quartiles), compile_s, first_dispatch_s, n_metrics, mfu (only
      where the device's peak is known), rounds_s (every timing, seconds per step).
    """
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
            n_metrics = 1
        else:
            with (changed := config.copy_and_resolve_references()).unlocked():
                changed.update(changes)
            functions = make_step_functions(
                model_config(changed, device), step_options(changed, steps_per_dispatch=steps_per_round), mesh,
                n_train_windows=N_WINDOWS, eval_batch_size=1, seed=config.seed)
            init, run, n_metrics = functions.init, functions.run, len(functions.metric_names)
        state = init(config.seed)
        started = time.perf_counter()
        run = run.lower(state, tokens_T, np.int32(1)).compile()
        compiled = time.perf_counter()
        state, out = run(state, tokens_T, np.int32(1))
        np.asarray(out)
        rows.append({"name": name, "compile_s": compiled - started, "first_dispatch_s": time.perf_counter() - compiled,
                     "n_metrics": n_metrics, "rounds_s": []})
        running.append([run, state])
        say(f"{name}: compiled in {compiled - started:.1f} s")
    for number in range(rounds):
        for row, pair in zip(rows, running, strict=True):
            started = time.perf_counter()
            pair[1], out = pair[0](pair[1], tokens_T, np.int32(steps_per_round))
            np.asarray(out)
            row["rounds_s"].append((time.perf_counter() - started) / steps_per_round)
        say(f"round {number + 1} of {rounds}: " + ", ".join(f"{1e3 * row['rounds_s'][-1]:.1f}" for row in rows) + " ms")
    peak = flops.peak_flops(device.device_kind, mesh.size, config.compute_dtype)
    for row in rows:
        seconds = statistics.median(row["rounds_s"])
        ratios = [own / base for own, base in zip(row["rounds_s"], rows[0]["rounds_s"], strict=True)]
        row["ms_per_step"] = 1e3 * seconds
        row["tokens_per_s"] = config.batch_size * config.block_size / seconds
        row["ratio"], row["ratio_low"], row["ratio_high"] = np.percentile(ratios, [50, 25, 75]).tolist()
        if peak:
            row["mfu"] = model_flops_per_step(config) / seconds / peak
    return rows


def format_table(rows):
    """The rows as an aligned table of plain text, ready for Markdown."""
    lines = ["| variant | ms/step | tokens/s | ratio (quartiles) | metrics | compile s |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['name']} | {row['ms_per_step']:.2f} | {row['tokens_per_s']:,.0f} | {row['ratio']:.3f} "
                     f"({row['ratio_low']:.3f}-{row['ratio_high']:.3f}) | {row['n_metrics']} "
                     f"| {row['compile_s']:.1f} |")
    return "\n".join(lines)
