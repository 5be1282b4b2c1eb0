"""train(config), also offered as altgrad_jax.train.

Phases of a run: check every setting; find out whether the run folder is new, unfinished or finished; find or prepare
the data; compile; restore; loop; at the end the verdict.
"""

import contextlib
import dataclasses
import errno
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from altgrad_jax import config as settings
from altgrad_jax.config import Config
from altgrad_jax.errors import MachineError
from altgrad_jax.run import device, processes, verdict
from altgrad_jax.run.checkpoint import list_steps
from altgrad_jax.run.console import QuietConsole, make_console, tell
from altgrad_jax.run.environment import fixed_options
from altgrad_jax.run.folder import (
    FINISHED,
    claim,
    how_it_goes_on,
    is_finished,
    open_run,
    require_resume,
)
from altgrad_jax.run.goodput import Goodput
from altgrad_jax.run.lock import locked
from altgrad_jax.run.look import require_wandb_keys
from altgrad_jax.run.loop import loop
from altgrad_jax.run.record import METRICS, read_history
from altgrad_jax.run.setup import open_data, set_up
from altgrad_jax.run.signals import Interrupted, StopRequest
from altgrad_jax.run.sinks import require_sinks
from altgrad_jax.step.program import Program

# What becomes one sentence when it happens to a file of the run.
DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)


@dataclasses.dataclass(frozen=True)
class Result:
    """What train() returns.

    Attributes:
      exit_code: 0 finished; 1 the last checkpoint could not be saved; 3 stopped after nan_patience non-finite steps in
        a row; 128 + signal number if interrupted.
      run_dir: the run's folder.
      verdict: the contents of verdict.json; None if interrupted.
      history: {metric: float array over the recorded rows}, "step" included; NaN where a row lacks the metric.
    Of several processes only the first has the last two; the others have None and {}.
    """

    exit_code: int
    run_dir: Path
    verdict: dict | None
    history: dict[str, np.ndarray]


@fixed_options()
def train(
    config: Config,
    *,
    data_dir: str | Path | None = None,
    workdir: str | Path | None = None,
    resume: str | int = "auto",
    age: float = 0.0,
) -> Result:
    """Runs, or continues, the training that `config` describes; works in a script and in a notebook.

    Args:
      config: ConfigDict from config.default_config(), with any field changed.
      data_dir: folder of the token files; default data/TOKENIZER. Prepared there first where it is empty.
      workdir: the run's folder; default config.checkpoint_dir.
      resume: "auto" continues from the newest checkpoint that restores, if there is one; "never" demands an empty
        folder; a number continues from that step, and sets later checkpoints aside.
      age: seconds of start-up that came before this call and count as the run's: a script's signals.process_age().

    Returns:
      Result.

    Raises:
      UserError: any setting, file or folder that cannot be used; before the first step.
    """
    device.require_no_fork()
    goodput = Goodput(age)
    config, notes = settings.fitted(config)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    run_dir = Path(workdir or config.checkpoint_dir).expanduser().absolute()
    settings.validate(config)
    require_sinks(config)
    require_resume(resume)
    device.use_device("auto")
    try:
        with disk_failures_as_one_sentence(lambda: how_it_goes_on(run_dir, resume)):
            exit_code = _train(config, data_dir, run_dir, resume, goodput)
    except Interrupted as interruption:
        tell(f"\n{interruption}: stopped while no step was under way; {how_it_goes_on(run_dir, resume)}")
        if processes.n_processes() > 1:
            raise  # the others wait for this process, and its end ends them
        exit_code = 128 + interruption.number
    return _result(exit_code, run_dir)


@contextlib.contextmanager
def disk_failures_as_one_sentence(how_it_goes_on: Callable[[], str]) -> Iterator[None]:
    """Makes one sentence, a MachineError, of a full, read-only or failing disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FAILURES:
            raise
        raise MachineError(
            f"{error.filename or 'a file of the run'} cannot be written ({error.strerror}): put that "
            f"right; then {how_it_goes_on()}"
        ) from error


def _train(config: Config, data_dir, run_dir: Path, resume: str | int, goodput: Goodput) -> int:
    """Returns the exit code."""
    with contextlib.ExitStack() as resources:
        stop = resources.enter_context(StopRequest(shared=processes.n_processes() > 1))
        lead = processes.is_lead()
        if config.deterministic:
            device.use_deterministic_operations()
        processes.require_equal(
            "the settings, folder and --resume",
            [settings.to_dict(config), str(run_dir), resume],
            "start all processes with one command line but for --process_id",
        )
        processes.everywhere(lambda: resources.enter_context(locked(run_dir)) if lead else None)
        if processes.from_lead(lambda: resume == "auto" and _report_finished(run_dir, config)):
            return FINISHED
        console = make_console(config.console, config.max_steps) if lead else QuietConsole(sys.stderr)
        resources.callback(console.close)
        claimed = claim(config, run_dir, resume)
        device.use_compilation_cache()
        data = open_data(config, data_dir, console.message)
        claimed.require_same_data(setup := set_up(config, data, console.message))
        require_wandb_keys(config.wandb_keys, setup)
        program = setup.program()
        run, state = resources.enter_context(open_run(claimed, setup, console, goodput))
        seconds = compile_program(program, console, goodput)
        run.event("compiled", run.step, seconds=seconds)
        # Until here an interrupt has nothing to save, and simply ends the run; after the loop likewise.
        with stop.deferred():
            loop(setup, program, [run], [state], stop, goodput)
        exit_code = run.finish(stop.number)
        if lead:
            run.report()
    return exit_code


def compile_program(program: Program, console, goodput: Goodput) -> float:
    """Compiles in every process, while the console shows that it is alive. Returns the seconds it took."""
    started = time.perf_counter()
    with goodput.spend("compile"), console.working("compiling"):
        processes.everywhere(program.compile)
    return round(time.perf_counter() - started, 3)


def _report_finished(run_dir: Path, config: Config) -> bool:
    """Whether the run in the folder is finished already, which is said."""
    if not is_finished(run_dir, config):
        return False
    made = max(list_steps(run_dir))
    tell(
        f"{run_dir} is finished: it has made {made} of max_steps={config.max_steps} steps; raise max_steps to go on, "
        "or give another --workdir to start a new run"
    )
    return True


def _result(exit_code: int, run_dir: Path) -> Result:
    if not processes.is_lead():
        return Result(exit_code, run_dir, None, {})
    # A run that was interrupted before its first row has no record.
    history = read_history(run_dir) if (run_dir / METRICS).exists() else {}
    return Result(exit_code, run_dir, None if exit_code > 128 else verdict.read_verdict(run_dir), history)
