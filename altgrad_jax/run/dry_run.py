"""What a run would take and do, said before it is begun: memory, time, disk, and the step it would go on from."""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax

from altgrad_jax import config as settings
from altgrad_jax.data.prepare import has_tokens
from altgrad_jax.errors import UserError
from altgrad_jax.models.parameters import count_params
from altgrad_jax.run.checkpoint import SAVES_AT_ONCE, DamagedCheckpoint, list_steps, restore_path
from altgrad_jax.run.console import make_console
from altgrad_jax.run.device import use_compilation_cache, use_deterministic_operations
from altgrad_jax.run.environment import fixed_options
from altgrad_jax.run.folder import Claim, claim, is_finished, require_resume
from altgrad_jax.run.goodput import Goodput
from altgrad_jax.run.initial import initial_for
from altgrad_jax.run.look import require_wandb_keys
from altgrad_jax.run.setup import Setup, open_data, set_up
from altgrad_jax.run.sinks import require_sinks
from altgrad_jax.run.train import compile_program
from altgrad_jax.step.program import Program

# Share of a known device's peak that the prediction supposes. Nothing was measured on one: small models reach less, for
# their kernels are short, large ones more.
ASSUMED_EFFICIENCY = 0.3
_PROGRAMS = {
    "run": "training step",
    "evaluate": "evaluation",
    "diagnose": "diagnosis",
    "window_losses": "every window",
    "certify": "certificate",
}


@fixed_options()
def dry_run(config, *, data_dir=None, workdir=None, resume="auto"):
    """Says what training.train would do with the same arguments: compiles everything, trains nothing, and writes
    nothing but the token files, where there are none yet. Settings and files that train would refuse are refused
    alike. Returns exit code 0."""
    config, notes = settings.fitted(config)
    settings.validate(config)
    require_sinks(config)
    require_resume(resume)
    run_dir = Path(workdir or config.checkpoint_dir).expanduser().absolute()
    exists = _nearest_folder(run_dir)
    console = make_console("plain", config.max_steps)
    say = console.message
    for note in notes:
        say(f"note: {note}")
    if resume == "auto" and is_finished(run_dir, config):
        say(f"next: nothing, for {run_dir} is finished with {config.max_steps} steps")
        return 0
    claimed = claim(config, run_dir, resume)
    if config.deterministic:
        use_deterministic_operations()
    use_compilation_cache()
    had_tokens = has_tokens(data_dir or Path("data") / config.tokenizer)
    setup = set_up(config, open_data(config, data_dir, say), say)
    require_wandb_keys(config.wandb_keys, setup)
    if config.init_from and claimed.manifest is None:
        source = initial_for(config, setup.functions.abstract_state.params).source
        say(f"weights: from {source['path']}, sha256 {source['sha256'][:12]}")
    claimed.require_same_data(setup)
    say(f"device: {len(setup.devices)} x {setup.device.device_kind} ({setup.device.platform})")
    program = setup.program()
    compile_program(program, console, Goodput())
    for line in (
        *describe_state(setup),
        describe_memory(program),
        *describe_speed(setup),
        describe_disk(setup, run_dir, exists),
        f"next: {_next(setup, claimed, say)}",
    ):
        say(line)
    if not had_tokens:
        say(f"token files were written to {setup.data.tokens.dir}, and the run will use them")
    say(f"nothing was trained{' or written' if had_tokens else ''}; leave --dry_run out to begin")
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


def describe_state(setup: Setup) -> Iterator[str]:
    """Lines: the parameters, and what a state takes."""
    state = setup.functions.abstract_state
    yield f"parameters: {count_params(state.params):,}"
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


def describe_memory(program: Program) -> str:
    """Line: what each compiled program takes on a device."""
    sizes = (f"{_PROGRAMS[name]} {_mebibytes(program_bytes(found))}" for name, found in program.compiled.items())
    return f"memory on each device: {', '.join(sizes)}"


def describe_speed(setup: Setup) -> Iterator[str]:
    """Lines: operations of a step, and on a device whose peak is known how long it may take."""
    yield f"operations of a step: {setup.flops_per_step / 1e9:,.4g} GFLOP by formula"
    if setup.peak_flops:
        seconds = setup.flops_per_step / (ASSUMED_EFFICIENCY * setup.peak_flops)
        yield (
            f"predicted: {_duration(seconds)} a step, {setup.tokens_per_step / seconds:,.0f} tokens/s, MFU "
            f"{ASSUMED_EFFICIENCY:.0%}: supposing that share of the stated peak of "
            f"{setup.peak_flops / 1e12:,.0f} TFLOP/s, which is an assumption and not a measurement"
        )
    else:
        yield "predicted: no time, because the peak of this device is not known; scripts/bench.py measures a step"


def describe_disk(setup: Setup, run_dir: Path, exists: Path) -> str:
    """Line: bytes of a checkpoint, of all that are kept, and whether the disk has room."""
    config, n_bytes = setup.config, _bytes_of(setup.functions.abstract_state)
    saves = math.ceil(config.max_steps / config.checkpoint_interval)
    kept, writing = min(config.max_checkpoints, saves), min(SAVES_AT_ONCE, saves)
    interim = int(config.checkpoint_seconds > 0)
    # Those being written are there before older ones go.
    needed = n_bytes * max(0, kept + interim + writing - len(list_steps(run_dir)))
    free = shutil.disk_usage(exists).free
    return (
        f"checkpoints: {_mebibytes(n_bytes)} each at most, {kept} kept{', one interim' * interim} and "
        f"{writing} being written; "
        f"{_mebibytes(needed)} more are needed in {run_dir}, and {_mebibytes(free)} are free: "
        + ("there is room" if needed <= free else "NOT ENOUGH ROOM")
    )


def _next(setup: Setup, claimed: Claim, say) -> str:
    """What training would begin with."""
    config = setup.config
    if claimed.manifest is None:
        return f"a new run of {config.max_steps} steps in {claimed.run_dir}"
    steps = [claimed.resume] if isinstance(claimed.resume, int) else reversed(list_steps(claimed.run_dir))
    for step in steps:
        try:
            restore_path(claimed.run_dir / str(step), setup.functions.abstract_state)
        except DamagedCheckpoint as error:
            if isinstance(claimed.resume, int):
                raise
            say(f"checkpoint {step} is damaged ({error.reason}); it would be set aside")
            continue
        return f"resume at step {step} of {config.max_steps}, from a checkpoint that verifies, in {claimed.run_dir}"
    return f"start again at step 0 in {claimed.run_dir}, where no checkpoint can be used"


def _mebibytes(n_bytes):
    return f"{n_bytes / 2**20:,.1f} MiB"


def _duration(seconds):
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
