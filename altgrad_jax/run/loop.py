"""The host loop around the compiled step: dispatch after dispatch, each ending at the next evaluation or checkpoint or
after about a second, or several with many runs side by side. No numerics here.

The loop owns the states of the runs it trains, one or many side by side. It waits for one small array a dispatch, which
is what lets it look at the state it may have to save. A dispatch of about a second makes that wait rare; rows are
formatted and written on a thread meanwhile.

Several processes (processes.py) run the same loop on their own devices. What depends on the clock, the disk or a signal
is decided by the lead or by all of them together.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from altgrad_jax.config import Config
from altgrad_jax.run import processes
from altgrad_jax.run.folder import RunFolder
from altgrad_jax.run.goodput import Goodput
from altgrad_jax.run.look import diagnosis, evaluation_of
from altgrad_jax.run.setup import Feed, Setup
from altgrad_jax.run.signals import StopRequest
from altgrad_jax.run.writer import DispatchRecord
from altgrad_jax.step.certify import is_exhausted, metrics_of
from altgrad_jax.step.mesh import place
from altgrad_jax.step.program import Dispatch, Program
from altgrad_jax.step.update import Inputs, TrainState

# An interim checkpoint is due when half of a start's time is unsaved, from this on, up to config.checkpoint_seconds.
FIRST_INTERIM_SECONDS = 5.0
# With steps_per_dispatch=0: the time a dispatch is steered to, for each run side by side, and at most. What the host
# does between two dispatches it does for each of them; and a signal is heard between two dispatches.
AUTO_DISPATCH_SECONDS, LONGEST_DISPATCH_SECONDS = 1.0, 8.0


class InterimSaves:
    """When to save between two checkpoint intervals: once half of the time since the start is unsaved, or `longest`
    seconds of it, but not in the first FIRST_INTERIM_SECONDS; 0 switches this off.

    Without it a run that is killed more often than it reaches an interval would never get anywhere. What a kill costs
    can be more by the dispatch and the save that are under way.
    """

    def __init__(self, longest: float, clock: Callable[[], float] = time.monotonic):
        self._longest, self._clock = longest, clock
        self._started = self._saved = clock()

    def are_due(self) -> bool:
        now = self._clock()
        half = max(FIRST_INTERIM_SECONDS, (now - self._started) / 2)
        return self._longest > 0 and now - self._saved >= min(self._longest, half)

    def saved(self) -> None:
        self._saved = self._clock()


@dataclasses.dataclass
class Training:
    """Where the loop stands.

    Attributes:
      runs: the run of each lane. state, inputs: of all lanes, as the program takes them; each dispatch replaces
        `state`. seconds_per_step: of the last dispatch, None before the first.
    """

    program: Program
    config: Config
    runs: Sequence[RunFolder]
    state: TrainState
    inputs: Inputs
    feed: Feed
    val_windows: jax.Array
    diagnosed_windows: jax.Array
    goodput: Goodput
    interim: InterimSaves
    device_thread: ThreadPoolExecutor
    seconds_per_step: float | None = None

    def compute(self, function: Callable, *arguments):
        """function(*arguments), which waits for the device; meanwhile the main thread can answer signals."""
        return self.device_thread.submit(function, *arguments).result()


def loop(
    setup: Setup,
    program: Program,
    runs: Sequence[RunFolder],
    states: Sequence[TrainState],
    stop: StopRequest,
    goodput: Goodput,
) -> None:
    """Trains every run to max_steps, or to its first unrecoverable step, or all of them to a signal.

    Runs that were saved at an earlier step than others are brought up to them first.

    Args:
      states: of the runs; they are donated to the program.
    """
    goodput.enter("other")
    feed = Feed(setup, program)
    windows = setup.data.val_windows
    training = Training(
        program,
        setup.config,
        runs,
        program.stack(states),
        program.stack([run.inputs for run in runs]),
        feed,
        place(windows, program.shared),
        place(windows[: setup.data.eval_batch_size], program.replicated),
        goodput,
        InterimSaves(setup.config.checkpoint_seconds),
        ThreadPoolExecutor(1, thread_name_prefix="device"),
    )
    del states
    try:
        look_at_the_start(training, stop)
        while not stop.number and (going := [lane for lane, run in enumerate(runs) if run.goes_on]):
            step = min(runs[lane].step for lane in going)
            behind = [lane for lane in going if runs[lane].step == step]
            n, save_interim = agree_on_a_dispatch(training, stop, behind, step)
            if n > 0:
                dispatch(training, behind, step, n, save_interim)
        evaluate_every_window(training, setup.data.all_windows)
        for lane, run in enumerate(runs):
            if run.step > 0 and not run.is_saved():
                # Interrupted between two checkpoints, or the save at the last step failed: once more.
                run.save(program.state_of(training.state, lane), interim=run.goes_on)
    finally:
        feed.close()
        training.device_thread.shutdown(wait=False)


def look_at_the_start(training: Training, stop: StopRequest) -> None:
    """Evaluates and diagnoses the runs that start, at step 0."""
    fresh = [lane for lane, run in enumerate(training.runs) if run.step == 0 and not run.resumed]
    if not fresh or stop.number:
        return
    started = time.perf_counter()
    with training.goodput.spend("evaluation"):
        looks = look(training, fresh, evaluate=True, diagnose=training.config.diagnostic_interval > 0)
    seconds = (time.perf_counter() - started) / len(fresh)
    for lane in fresh:
        evaluation, lines = looks[lane]
        training.runs[lane].record(
            DispatchRecord(first_step=0, evaluation=evaluation, evaluation_s=seconds, diagnostics=lines)
        )


def evaluate_every_window(training: Training, windows: np.ndarray | None) -> None:
    """Keeps the loss of every validation window of the runs that have made all their steps; windows: None for none."""
    ended = [lane for lane, run in enumerate(training.runs) if run.step == training.config.max_steps]
    if windows is None or not ended:
        return
    program = training.program
    with training.goodput.spend("evaluation"):
        losses_RE = training.compute(
            program.window_losses, training.state, place(windows, program.shared), training.inputs
        )
        for lane in ended:
            training.runs[lane].keep_window_losses(losses_RE[lane])


def agree_on_a_dispatch(training: Training, stop: StopRequest, behind: Sequence[int], step: int) -> tuple[int, bool]:
    """(updates of the next dispatch, whether an interim save comes after it), the same in all processes; 0 updates
    where one of them was told to stop."""
    longest = training.program.functions.step.options.steps_per_dispatch
    n = dispatch_length(training.config, step, training.seconds_per_step, longest=longest, n_runs=len(behind))
    is_saving = any(training.runs[lane].checkpoints.is_saving() for lane in behind)
    save_interim = training.interim.are_due() and not is_saving
    if processes.n_processes() > 1:
        # The length depends on the lead's clock; and a signal to one process stops all, at one step.
        lengths, received, due = zip(*processes.gather([n, stop.received, save_interim]), strict=True)
        stop.agree(list(received))
        n, save_interim = lengths[0], due[0]
    return (0, False) if stop.number else (n, save_interim)


def dispatch_length(config: Config, step: int, seconds_per_step: float | None, *, longest: int, n_runs: int = 1) -> int:
    """Steps of the next dispatch: as many as take about a second, up to the next evaluation or checkpoint.

    With runs side by side a second for each, up to LONGEST_DISPATCH_SECONDS. seconds_per_step: of all of them together.
    """
    if not config.steps_per_dispatch:
        seconds = min(n_runs * AUTO_DISPATCH_SECONDS, LONGEST_DISPATCH_SECONDS)
        # The first dispatch is a single step, which shows how long one takes.
        longest = min(longest, max(1, int(seconds / seconds_per_step)) if seconds_per_step else 1)
    intervals = config.eval_interval, config.checkpoint_interval, config.diagnostic_interval
    to_next = [interval - step % interval for interval in intervals if interval]
    return min(longest, *to_next, config.max_steps - step)


def dispatch(training: Training, behind: Sequence[int], step: int, n: int, save_interim: bool) -> None:
    """Makes n updates from `step` in these lanes; then evaluates, records and saves what is due."""
    config, goodput, runs = training.config, training.goodput, training.runs
    n_R = np.zeros(training.program.width or 1, np.int32)
    n_R[list(behind)] = n
    started = time.perf_counter()
    with goodput.spend("step"):
        tokens = training.feed.at(step, n)
        training.state, fetched = training.compute(
            training.program.advance, training.state, tokens, n_R, training.inputs
        )
    ended = time.perf_counter()
    rows = {lane: take_note(training, fetched, lane, n, (ended - started) / len(behind)) for lane in behind}
    training.seconds_per_step = (ended - started) / max(1, *map(len, rows.values()))
    step += n

    whole = [lane for lane in behind if not runs[lane].frozen]
    evaluate, diagnose = (is_due(config, step, config[name]) for name in ("eval_interval", "diagnostic_interval"))
    looks, look_seconds = {}, None
    if whole and (evaluate or diagnose):
        with goodput.spend("evaluation"):
            looks = look(training, whole, evaluate=evaluate, diagnose=diagnose)
        look_seconds = (time.perf_counter() - ended) / len(whole)
    for lane in behind:
        evaluation, lines = looks.get(lane, (None, []))
        record(training, lane, rows[lane], evaluation, lines, (ended - started) / len(behind), look_seconds)
        if not runs[lane].goes_on or is_due(config, step, config.checkpoint_interval):
            runs[lane].save(training.program.state_of(training.state, lane))
        elif save_interim:
            runs[lane].save(training.program.state_of(training.state, lane), interim=True)
    if save_interim or is_due(config, step, config.checkpoint_interval):
        training.interim.saved()


def take_note(training: Training, fetched: Dispatch, lane: int, n: int, seconds: float) -> np.ndarray:
    """The rows that a lane made, float32 [made, M], after its run has taken note of them."""
    run, rows_KM = training.runs[lane], fetched.rows_RKM[lane][:n]
    # Rows of steps that were not made, because the state froze, are NaN throughout.
    rows_KM = rows_KM[~np.isnan(rows_KM[:, training.program.column["learning_rate"]])]
    again = min(len(rows_KM), max(0, run.furthest - run.step))
    training.goodput.move("step", "replayed", seconds * again / max(1, len(rows_KM)))
    run.advanced(len(rows_KM), frozen=bool(fetched.frozen_R[lane]), first_bad_step=int(fetched.first_bad_R[lane]))
    return rows_KM


def is_due(config: Config, step: int, interval: int) -> bool:
    """Whether what happens every `interval` updates, and at the end, happens after `step` updates; 0: never."""
    return interval > 0 and (step % interval == 0 or step == config.max_steps)


def look(
    training: Training, lanes: Sequence[int], *, evaluate: bool, diagnose: bool
) -> dict[int, tuple[dict[str, float] | None, list[dict]]]:
    """{lane: (metrics for the row of its step or None, lines for diagnostics.jsonl)}, of the present state."""
    program, looks = training.program, {}
    losses_R = None
    if evaluate:
        losses_R = training.compute(program.evaluate, training.state, training.val_windows, training.inputs)
    for lane in lanes:
        run, found, lines = training.runs[lane], {}, []
        if losses_R is not None:
            found = evaluation_of(losses_R[lane])
        if diagnose:
            state = program.state_of(training.state, lane)
            ranks, observed = training.compute(program.diagnose, state, training.diagnosed_windows, run.inputs)
            found |= {name: float(value) for name, value in ranks.items()}
            if observed is not None and run.quant is not None and state.quant is not None:
                of_operands, lines = diagnosis(run.quant, int(state.quant.level), run.step, observed)
                found |= of_operands
            if program.functions.certify is not None:
                found |= certificate(training, lane, state)
        looks[lane] = (found or None, lines)
    return looks


def certificate(training: Training, lane: int, state: TrainState) -> dict[str, float]:
    """{metric: value} of the certificate of a lane's present state, of which the lane's recipe takes note."""
    program, inputs = training.program, training.runs[lane].inputs
    measured = training.compute(program.certify, state, training.diagnosed_windows, inputs)
    found = metrics_of(measured, program.functions.step)
    training.state = program.take_note(training.state, lane, inputs, is_exhausted(found))
    return found


def record(
    training: Training,
    lane: int,
    rows_KM: np.ndarray,
    evaluation: dict[str, float] | None,
    diagnostics: list[dict],
    seconds: float,
    look_seconds: float | None,
) -> None:
    """Records a lane's rows, and keeps the state of its run's first non-finite step.

    Args:
      seconds, look_seconds: the lane's own share of the time of the steps and of the look.
    """
    run, names = training.runs[lane], training.program.functions.metric_names
    first_row = run.step - len(rows_KM) + 1
    run.record(
        DispatchRecord(
            first_step=first_row,
            names=names,
            values=rows_KM,
            seconds=seconds,
            evaluation=evaluation,
            evaluation_s=look_seconds or 0.0,
            diagnostics=diagnostics,
        )
    )
    if first_row <= run.first_bad_step <= run.step:
        row = dict(zip(names, map(float, rows_KM[run.first_bad_step - first_row]), strict=True))
        run.save_anomaly(training.program.state_of(training.state, lane), row)
