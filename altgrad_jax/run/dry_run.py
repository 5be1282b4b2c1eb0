"""What a run would take and do, said before it is begun: memory, time, disk, and the step it would go on from."""

import contextlib
import math
import os
import shutil
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError
from altgrad_jax.run.checkpoint import SAVES_AT_ONCE, DamagedCheckpoint, list_steps, restore_path
from altgrad_jax.run.console import make_console
from altgrad_jax.run.device import use_compilation_cache, use_deterministic_operations
from altgrad_jax.run.process import StopRequest
from altgrad_jax.run.sinks import require_sinks
from altgrad_jax.run.training import Program, Run, is_finished, require_resume, require_wandb_keys

# Share of a known device's peak that the prediction supposes. Nothing was measured on one: small models reach less, for
# their kernels are short, large ones more.
ASSUMED_EFFICIENCY = 0.3
_GROUPS = ("embed", "pos_embed", "attn", "mlp", "ln")
_GROUP_NAMES = {"attn": "attention", "mlp": "MLP", "ln": "layer norms"}


def dry_run(config, *, data_dir=None, workdir=None, resume="auto"):
    """Says what training.train would do with the same arguments: compiles everything, trains nothing, and writes
    nothing into the run folder. Settings and files that train would refuse are refused alike. Returns exit code 0."""
    settings.validate(config)
    require_sinks(config)
    require_resume(resume)
    run_dir = Path(workdir or config.checkpoint_dir).expanduser().absolute()
    exists = _nearest_folder(run_dir)
    console = make_console("plain", config.max_steps)
    say = console.message
    if resume == "auto" and is_finished(run_dir, config):
        say(f"next: nothing, for {run_dir} is finished with {config.max_steps} steps")
        return 0
    with contextlib.ExitStack() as resources:
        run = Run(config, run_dir, resume, console, resources, stop=StopRequest())
        if config.deterministic:
            use_deterministic_operations()
        use_compilation_cache()
        program = Program(config, data_dir, console, resources)
        require_wandb_keys(config.wandb_keys, program)
        run.require_same_data(program)
        say(f"device: {len(program.devices)} x {program.device.device_kind} ({program.device.platform})")
        say("compiling ...")
        say(f"compiled in {program.compile():.1f} s")
        for line in (
            *describe_parameters(program),
            *describe_memory(program),
            *describe_speed(program),
            describe_disk(program, run_dir, exists),
            f"next: {_next(program, run, say)}",
        ):
            say(line)
    say("nothing was trained or written; leave --dry_run out to begin")
    return 0


def _nearest_folder(run_dir):
    """The run folder or the nearest of its parents that exists; UserError where a run could not be written there."""
    exists = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not exists.is_dir():
        raise UserError(f"{exists} is a file: give a folder with --workdir")
    if not os.access(exists, os.W_OK | os.X_OK):
        raise UserError(f"{run_dir} cannot be written to (no permission to write): give another folder with --workdir")
    return exists


def _bytes_of(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe_parameters(program):
    """Lines: the parameters by group, and what a state takes."""
    sizes = dict.fromkeys(_GROUPS, 0)
    state = program.functions.abstract_state
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]:
        parts = [key.key for key in path]
        layer = next(part for part in parts if not part.startswith("block_"))
        sizes[layer if layer in sizes else layer.partition("_")[0]] += math.prod(leaf.shape)
    yield (
        f"parameters: {sum(sizes.values()):,} ("
        + ", ".join(f"{_GROUP_NAMES.get(name, name)} {size:,}" for name, size in sizes.items())
        + ")"
    )
    parts = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "number formats": state.quant,
        "monitor": (state.step, state.monitor),
    }
    yield (
        f"state: {_mebibytes(_bytes_of(state))} ("
        + ", ".join(f"{name} {_mebibytes(_bytes_of(tree))}" for name, tree in parts.items() if _bytes_of(tree))
        + ")"
    )


def program_bytes(compiled):
    """Bytes that a compiled program takes on each device while it runs."""
    analysis = compiled.memory_analysis()
    return (
        analysis.temp_size_in_bytes
        + analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def describe_memory(program):
    """Lines: a table of what each compiled program takes on a device."""
    columns = "arguments", "outputs", "temporaries", "aliased", "together"
    yield f"{'MiB on each device':<20}" + "".join(f"{name:>13}" for name in columns)
    for name, compiled in zip(("training step", "evaluation", "diagnosis"), program.compiled, strict=True):
        m = compiled.memory_analysis()
        sizes = (
            m.argument_size_in_bytes,
            m.output_size_in_bytes,
            m.temp_size_in_bytes,
            m.alias_size_in_bytes,
            program_bytes(compiled),
        )
        yield f"{name:<20}" + "".join(f"{size / 2**20:>13,.1f}" for size in sizes)


def describe_speed(program):
    """Lines: operations of a step, and how long it may take."""
    cost = program.compiled[0].cost_analysis() or {}
    formula, counted = program.flops_per_step, cost.get("flops", 0.0) * program.mesh.size
    yield (
        f"operations of a step: {formula / 1e9:,.4g} GFLOP by formula"
        + (
            f", {counted / 1e9:,.4g} in the compiled program (every operation, the body of a loop once)"
            if counted
            else ""
        )
    )
    tokens = program.tokens_per_step
    if program.peak_flops:
        seconds = formula / (ASSUMED_EFFICIENCY * program.peak_flops)
        yield (
            f"predicted: {_duration(seconds)} a step, {tokens / seconds:,.0f} tokens/s, MFU "
            f"{ASSUMED_EFFICIENCY:.0%}: supposing that share of the stated peak of "
            f"{program.peak_flops / 1e12:,.0f} TFLOP/s, which is an assumption and not a measurement"
        )
        return
    n_bytes = cost.get("bytes accessed", 0.0)
    if program.on_device:
        n_bytes -= 2 * len(program.data.train_T)  # counted whole, though a step reads a few windows
    rate, copy = measure_product(program), measure_copy(program)
    in_products = formula / program.mesh.size / rate
    seconds = in_products + max(0.0, n_bytes) / copy
    yield (
        f"predicted: {_duration(seconds)} a step, {tokens / seconds:,.0f} tokens/s, {in_products / seconds:.0%} of "
        "the time in products"
    )
    yield (
        f"  supposing, as the peak of this device is not known, products at {rate / 1e9:,.0f} GFLOP/s and memory at "
        f"{copy / 1e9:.3g} GB/s, as just measured here, one after the other, and {n_bytes / 2**20:,.0f} MiB a step, "
        "as the compiler counts"
    )


def measure_product(program, repeats=5):
    """FLOP/s of one device in the model's own products, those of the MLP and of the head weighted as the model has
    them."""
    c = program.config
    tokens = c.batch_size // c.grad_accum_steps // program.mesh.size * c.block_size
    seconds, n_flops = 0.0, 0.0
    for width, weight in ((4 * c.n_embd, 3 * c.n_layer), (c.vocab_size, 2)):
        a_TC = jax.device_put(jnp.ones((tokens, c.n_embd), c.compute_dtype), program.device)
        b_CN = jax.device_put(jnp.ones((c.n_embd, width), c.compute_dtype), program.device)
        seconds += weight * _time(
            lambda a_TC=a_TC, b_CN=b_CN: jnp.matmul(a_TC, b_CN, preferred_element_type=jnp.float32), repeats
        )
        n_flops += weight * 2 * tokens * c.n_embd * width
    return n_flops / seconds


def measure_copy(program, repeats=5):
    """Bytes/s of one device, read and written, in a copy as large as the MLP's activation."""
    c = program.config
    tokens = c.batch_size // c.grad_accum_steps // program.mesh.size * c.block_size
    activation_TH = jax.device_put(jnp.ones((tokens, 4 * c.n_embd), jnp.float32), program.device)
    return 2 * activation_TH.nbytes / _time(lambda: jnp.copy(activation_TH), repeats)


def _time(function, repeats):
    """Median seconds of a call, after one that compiles."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(function())
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def describe_disk(program, run_dir, exists):
    """Line: bytes of a checkpoint, of all that are kept, and whether the disk has room."""
    config, n_bytes = program.config, _bytes_of(program.functions.abstract_state)
    saves = math.ceil(config.max_steps / config.checkpoint_interval)
    kept, writing = min(config.max_checkpoints, saves), min(SAVES_AT_ONCE, saves)
    interim = int(config.checkpoint_seconds > 0)
    # Those being written are there before older ones go.
    needed = n_bytes * max(0, kept + interim + writing - len(list_steps(run_dir)))
    free = shutil.disk_usage(exists).free
    return (
        f"checkpoints: {_mebibytes(n_bytes)} each at most, {kept} kept{', one interim' * interim} and up to "
        f"{writing} being written; "
        f"{_mebibytes(needed)} more are needed in {run_dir}, and {_mebibytes(free)} are free: "
        + ("there is room" if needed <= free else "NOT ENOUGH ROOM")
    )


def _next(program, run, say):
    """What training would begin with."""
    config = program.config
    if run.manifest is None:
        return f"a new run of {config.max_steps} steps in {run.run_dir}"
    steps = [run.resume] if isinstance(run.resume, int) else reversed(list_steps(run.run_dir))
    for step in steps:
        try:
            restore_path(run.run_dir / str(step), program.functions.abstract_state)
        except DamagedCheckpoint as error:
            if isinstance(run.resume, int):
                raise
            say(f"checkpoint {step} is damaged ({error.reason}); it would be set aside")
            continue
        return f"resume at step {step} of {config.max_steps}, from a checkpoint that verifies, in {run.run_dir}"
    return f"start again at step 0 in {run.run_dir}, where no checkpoint can be used"


def _mebibytes(n_bytes):
    return f"{n_bytes / 2**20:,.1f} MiB"


def _duration(seconds):
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
