"""train(config), also offered as altgrad_jax.train: the host loop around the compiled step. No numerics here.

Phases of a run: check every setting; find or prepare the data; find out whether the run folder is new, unfinished or
finished; compile; then dispatch after dispatch, each ending at the next evaluation or checkpoint or after about a
second; at the end the verdict.

A `Program` is what is compiled, with its data and the states it acts on; a `Run` is a folder with its record and its
checkpoints. One run is a program with one state; a sweep (sweep.py) gives a program many; the same loop drives both.

The loop waits for one small array a dispatch, which is what lets it look at the state it may have to save. A dispatch
of about a second makes that wait rare; rows are formatted and written on a thread meanwhile.

Several processes (distributed.py) run the same loop on their own devices. The lead keeps the record and decides what
depends on the clock or the disk; all of them save and restore together.

Order on the disk: the rows up to step k are flushed before checkpoint k is begun, so whatever checkpoint a resume
finds, the record reaches it.
"""

import contextlib
import dataclasses
import errno
import gc
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from altgrad_jax import config as settings
from altgrad_jax.data.dataset import HostStream, choose_windows, load_token_data, permute_windows
from altgrad_jax.data.prepare import banner, resolve
from altgrad_jax.errors import MachineError, Stopped, UserError
from altgrad_jax.models import flops
from altgrad_jax.models.gpt2 import GPTConfig, count_params
from altgrad_jax.numerics import rules, whatif
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.rounding import canary
from altgrad_jax.run import distributed, verdict
from altgrad_jax.run.alerts import rules_of
from altgrad_jax.run.checkpoint import list_steps, open_checkpoints, save_anomaly
from altgrad_jax.run.console import make_console
from altgrad_jax.run.device import (
    fits_on_device,
    git_commit,
    has_cudnn_attention,
    keep_autotune_results,
    use_autotune_results,
    use_compilation_cache,
    use_deterministic_operations,
    versions,
)
from altgrad_jax.run.goodput import Goodput, describe, total
from altgrad_jax.run.process import Interrupted, StopRequest, is_empty, lock_folder
from altgrad_jax.run.record import (
    MANIFEST,
    METRICS,
    TIMING_KEYS,
    Record,
    furthest_step,
    new_run_id,
    read_history,
    read_manifest,
    read_timing,
    write_manifest,
)
from altgrad_jax.run.sinks import open_sinks, require_sinks
from altgrad_jax.run.wandb import matching
from altgrad_jax.run.writer import ALERT, ALERT_VALUE, SPARSE, DispatchRecord, RunFacts, Writer
from altgrad_jax.step import quantization, stability
from altgrad_jax.step.mesh import FSDP, data_mesh, place, replicated
from altgrad_jax.step.program import make_step_functions, over_members
from altgrad_jax.step.update import Inputs, StepOptions

FINISHED, NOT_SAVED, STOPPED_NON_FINITE = 0, 1, 3
# What becomes one sentence when it happens to a file of the run.
DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)
# An interim checkpoint is due when half of a start's time is unsaved, from this on, up to config.checkpoint_seconds.
FIRST_INTERIM_SECONDS = 5.0
SAMPLE_TAG = "eurlex-sample"
# With steps_per_dispatch=0: rows of the metrics buffer, and the time a dispatch is steered to.
AUTO_DISPATCH_STEPS = 100
AUTO_DISPATCH_SECONDS = 1.0
# Logits that exist at once, beside GPTConfig's own choice, which is a CPU's: a GPU wants large products.
LOSS_TILE_BYTES_GPU = 2**30


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


def train(config, *, data_dir=None, workdir=None, resume="auto", age=0.0) -> Result:
    """Runs, or continues, the training that `config` describes; works in a script and in a notebook.

    Args:
      config: ConfigDict from config.default_config(), with any field changed.
      data_dir: folder of the token files; default data/<tokenizer>. Prepared there first where it is empty.
      workdir: the run's folder; default config.checkpoint_dir.
      resume: "auto" continues from the newest checkpoint that restores, if there is one; "never" demands an empty
        folder; a number continues from that step, and sets later checkpoints aside.
      age: seconds of start-up that came before this call and count as the run's: a script's process.process_age().

    Returns:
      Result.

    Raises:
      UserError: any setting, file or folder that cannot be used; before the first step.
    """
    goodput = Goodput(age)
    run_dir = Path(workdir or config.checkpoint_dir).expanduser().absolute()
    _refuse_arguments(config, resume)
    try:
        with disk_failures_told(lambda: _how_it_goes_on(run_dir, resume)):
            exit_code = _train(config, data_dir, run_dir, resume, goodput)
    except Interrupted as interruption:
        text = f"{interruption}: stopped while no step was under way; {_how_it_goes_on(run_dir, resume)}"
        if distributed.n_processes() > 1:
            raise Stopped(text, interruption.number) from None  # the others hear of it as of any refusal
        print(f"\n{text}", flush=True)
        exit_code = 128 + interruption.number
    return _result(exit_code, run_dir)


@contextlib.contextmanager
def disk_failures_told(how_it_goes_on):
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


def _how_it_goes_on(run_dir, resume):
    saved = list_steps(run_dir)
    how = "the same command" if resume == "auto" else "the same command with --resume=auto"
    goes_on = f"continues from checkpoint {max(saved)}" if saved else "starts again, for nothing was saved yet"
    return f"{how} {goes_on}"


def _train(config, data_dir, run_dir, resume, goodput):
    """Returns the exit code."""
    with contextlib.ExitStack() as resources:
        stop = resources.enter_context(StopRequest(shared=distributed.n_processes() > 1))
        distributed.require_equal(
            "the settings, folder and --resume",
            [settings.to_dict(config), str(run_dir), resume],
            "start all processes with one command line but for --process_id",
        )
        if distributed.from_lead(lambda: _claim(run_dir, config, resume, resources)):
            return FINISHED
        console = make_console(config.console, config.max_steps) if distributed.is_lead() else _Silent()
        resources.callback(console.close)
        run = Run(config, run_dir, resume, console, resources, stop=stop)
        if config.deterministic:
            use_deterministic_operations()
            if distributed.n_processes() == 1:
                use_autotune_results(run_dir, run.made_on(), console.message)
        use_compilation_cache()
        program = Program(config, data_dir, console, resources, goodput=goodput)
        run.open(program)
        console.message("compiling ...")
        run.writer.event("compiled", run.step, seconds=distributed.everywhere(program.compile))
        keep_autotune_results(run_dir)
        # Until here an interrupt has nothing to save, and simply ends the run; after the loop likewise.
        with stop.deferred():
            loop(program, [run], stop)
        exit_code = run.finish(stop)
        if distributed.is_lead():
            run.tell()
    return exit_code


def _refuse_arguments(config, resume):
    settings.validate(config)
    require_sinks(config)
    require_resume(resume)


def _claim(run_dir, config, resume, resources):
    """Locks the run folder; whether the run in it is finished already, which is told."""
    lock_folder(run_dir, resources)
    if resume != "auto" or not is_finished(run_dir, config):
        return False
    made = max(list_steps(run_dir))
    print(
        f"{run_dir} is finished: it has made {made} of max_steps={config.max_steps} steps; raise max_steps to go on, "
        "or give another --workdir to start a new run"
    )
    return True


def _result(exit_code, run_dir):
    if not distributed.is_lead():
        return Result(exit_code, run_dir, None, {})
    history = read_history(run_dir) if (run_dir / METRICS).exists() else {}  # interrupted before its first row
    return Result(exit_code, run_dir, None if exit_code > 128 else _read_verdict(run_dir), history)


class _Silent:
    """Console and writer of the processes that are not the lead: only what went wrong at this one is told."""

    def message(self, text):
        pass

    def alert(self, text):
        print(f"process {distributed.process_index()}: {text}", file=sys.stderr, flush=True)

    def submit(self, record):
        pass

    def flush(self):
        pass

    def event(self, name, step, **values):
        pass

    def close(self):
        pass


# ------------------------------------------------------------------------------------------------ before the first step


def require_resume(resume):
    """UserError unless it is a value of train's `resume`."""
    if resume not in ("auto", "never") and type(resume) is not int:
        raise UserError(
            f"resume={resume!r} cannot be used: give 'auto', 'never', or the step of a checkpoint such as 1000"
        )


def is_finished(run_dir, config):
    """Whether the folder holds the run that `config` describes, with all steps made; UserError if it holds another."""
    if not (run_dir / verdict.VERDICT).exists() or not (run_dir / MANIFEST).exists():
        return False
    steps = list_steps(run_dir)
    if not steps or max(steps) < config.max_steps:
        return False
    try:
        told = _read_verdict(run_dir)["max_steps"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False  # damaged: the resume, which makes no step, writes it anew
    if told != config.max_steps:
        return False
    _refuse_other_config(run_dir, read_manifest(run_dir), config)
    return True


def has_ended(run_dir, config):
    """Whether the run made all its steps, or stopped for good because it was not finite; UserError as is_finished."""
    if is_finished(run_dir, config):
        return True
    try:
        told = _read_verdict(run_dir)
        stopped = not told["finished"] and "non-finite steps in a row" in told["stopped"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    if stopped:
        _refuse_other_config(run_dir, read_manifest(run_dir), config)
    return stopped


def _read_verdict(run_dir):
    return json.loads((run_dir / verdict.VERDICT).read_bytes())


def _refuse_other_config(run_dir, manifest, config):
    lines = settings.config_difference(manifest["config"], settings.to_dict(config))
    if lines:
        raise UserError(
            f"{run_dir} was made with other settings, so it cannot be continued with these: "
            f"{'; '.join(lines)}. Set them back, or give another --workdir to start a new run"
        )


def _attention_kernel(config, device):
    """The attention implementation to compile: cuDNN where it can run and was not declined."""
    head_width = config.n_embd // config.n_head
    fits = has_cudnn_attention(device, head_width=head_width, compute_dtype=config.compute_dtype)
    if config.attention == "cudnn" and not fits:
        raise UserError(
            f"attention='cudnn' cannot run heads of {head_width} numbers on this machine's "
            f"{device.platform} ({device.device_kind}); it needs an NVIDIA GPU of compute capability 8.0 or more and "
            "heads of at most 128 numbers: set attention='auto' or 'xla'"
        )
    if config.attention == "auto":
        return "cudnn" if fits else "xla"
    return config.attention


def model_config(config, device):
    """The model that `config` describes, with the attention kernel for this device."""
    return GPTConfig(
        config.n_layer,
        config.n_head,
        config.n_embd,
        config.block_size,
        config.vocab_size,
        config.dropout,
        config.compute_dtype,
        _attention_kernel(config, device),
        **({} if device.platform == "cpu" else {"loss_tile_bytes": LOSS_TILE_BYTES_GPU}),
    )


def step_options(config, *, steps_per_dispatch, data_on_device=True):
    """The static choices of the step that `config` describes."""
    same_name = (
        "batch_size",
        "learning_rate",
        "max_steps",
        "warmup_steps",
        "grad_accum_steps",
        "schedule",
        "min_lr_ratio",
        "optimizer",
        "weight_decay",
        "beta1",
        "beta2",
        "adam_eps",
        "grad_clip",
        "data_seed",
        "use_shadow",
        "shadow_interval",
    )
    return StepOptions(
        **{name: config[name] for name in same_name},
        steps_per_dispatch=steps_per_dispatch,
        decay_steps=settings.decay_steps(config.decay_fraction, config.max_steps),
        thresholds=stability.Thresholds(**{name: config[name] for name in stability.Thresholds._fields}),
        metric_groups=settings.metric_groups(config.metrics),
        data_on_device=data_on_device,
        quant=quantization.options_of(config),
    )


def inputs_of(config):
    """What the run that `config` describes gives the compiled step as data."""
    quant = quantization.options_of(config)
    return Inputs(
        np.int32(config.seed),
        np.float32(config.learning_rate),
        None if quant is None else quantization.format_table(quant),
    )


def model_flops_per_step(config):
    """Floating-point operations of one update, by formula (flops.training_flops_per_token)."""
    return (
        config.batch_size
        * config.block_size
        * flops.training_flops_per_token(
            n_layer=config.n_layer, n_embd=config.n_embd, block_size=config.block_size, vocab_size=config.vocab_size
        )
    )


def require_wandb_keys(patterns, program):
    """UserError unless each of these patterns matches a name that the program's rows have."""
    names = program.row_names() if patterns else []
    for pattern in patterns:
        if not matching(names, [pattern]):
            guess = settings.nearest(
                pattern, {*names, *(f"{name.partition('/')[0]}/*" for name in names if "/" in name)}
            )
            hint = f"did you mean {guess}?" if guess else "the keys of metrics.jsonl are their names"
            raise UserError(
                f"wandb_keys={pattern} matches no metric of this run: give names or patterns such as loss "
                f"or grad_norm/*; {hint}"
            )


def require_float8_kernels(compiled, device, n_layers):
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


# ------------------------------------------------------------------------------------------------- what is compiled


@contextlib.contextmanager
def _without_garbage_collection():
    """Tracing makes millions of objects that live on; looking through them again and again took a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Program:
    """The compiled functions of one config, with their data and device, and the states they act on.

    Args:
      width: None for a run by itself, else how many runs are trained side by side ("lanes"): with `config` they share
        every setting that is not data to the program (see step.Inputs).
      member_loop: "map" or "vmap", how lanes are computed (step.over_members).
      devices: those used; default all. Lanes are split over them, or the batch of a single run.
      goodput: where the time of the process is booked.
    """

    def __init__(
        self, config, data_dir, console, resources, *, width=None, member_loop="map", devices=None, goodput=None
    ):
        self.config, self.console, self.resources, self.width = config, console, resources, width
        self.goodput = goodput or Goodput()
        self.member_loop = member_loop
        self._open_data(data_dir)
        self._build(member_loop, devices or jax.devices())
        self._certified, self._fed = {}, None
        distributed.everywhere(lambda: self.certify(self.quant))

    def _open_data(self, data_dir):
        config = self.config

        if not distributed.is_lead():
            distributed.gather(None)  # the lead may have to make what the others read
        prepared = resolve(data_dir, config.data_source, config.tokenizer)
        if distributed.is_lead():
            distributed.gather(None)
        if prepared.warnings:
            self.console.message(banner(prepared.warnings))
        self.data = load_token_data(
            prepared.dir, vocab_size=config.vocab_size, block_size=config.block_size, tokenizer=config.tokenizer
        )
        distributed.require_equal(
            "data with the fingerprint",
            self.data.fingerprint[:12],
            "give all processes the same token files with --data_dir",
        )
        self.extra_tags = (SAMPLE_TAG,) if prepared.is_sample else ()
        if prepared.is_sample:
            self.console.message(
                f"this run trains on the small sample and is tagged {SAMPLE_TAG}: its figures are not the baseline's"
            )
        self.val_windows, self.eval_batch_size = choose_windows(
            self.data.val_T, config.block_size, config.eval_windows, config.eval_batch_size
        )
        if len(self.val_windows) < config.eval_windows:
            self.console.message(
                f"eval_windows={config.eval_windows}, but the validation data holds "
                f"{self.data.n_val_windows}: each evaluation uses {len(self.val_windows)} of them, in "
                f"whole batches of {self.eval_batch_size}"
            )

    def _build(self, member_loop, devices):
        config = self.config
        # Runs side by side are independent: each is computed on one device, as if it had no other.
        self.devices = devices
        if self.width is not None and config.fsdp > 1:
            raise UserError(
                f"fsdp={config.fsdp} splits one run over devices, and runs side by side are each computed "
                "on one: leave fsdp at 1, or train this run by itself"
            )
        self.mesh = data_mesh(devices if self.width is None else devices[:1], config.fsdp)
        self.replicated = replicated(self.mesh)
        self.device = self.mesh.local_devices[0]
        if config.batch_size // config.grad_accum_steps % self.mesh.size:
            raise UserError(
                f"batch_size={config.batch_size} in grad_accum_steps={config.grad_accum_steps} parts cannot be split "
                f"over {self.mesh.size} devices: make batch_size / grad_accum_steps a multiple of it, or hide devices "
                "with CUDA_VISIBLE_DEVICES"
            )
        fits = all(distributed.gather(fits_on_device(len(self.data.train_T), self.device)))
        if config.data_placement == "device" and not fits:
            raise UserError(
                f"data_placement='device' cannot hold {len(self.data.train_T)} tokens in a quarter of the device's "
                "memory: set data_placement to auto or host"
            )
        self.on_device = fits if config.data_placement == "auto" else config.data_placement == "device"
        self.buffer_steps = min(config.steps_per_dispatch or AUTO_DISPATCH_STEPS, config.max_steps)
        options = step_options(config, steps_per_dispatch=self.buffer_steps, data_on_device=self.on_device)
        self.thresholds, self.quant = options.thresholds, options.quant
        with _without_garbage_collection():
            self.functions = make_step_functions(
                model_config(config, self.device),
                options,
                self.mesh,
                n_train_windows=self.data.n_train_windows,
                eval_batch_size=self.eval_batch_size,
                seed=config.seed,
            )
        self.members = None
        if self.width is not None:
            self.members = over_members(self.functions, devices, member_loop)
        self.column = {name: i for i, name in enumerate(self.functions.metric_names)}
        self.tokens_per_step = config.batch_size * config.block_size
        self.flops_per_step = model_flops_per_step(config)
        self.peak_flops = flops.peak_flops(self.device.device_kind, len(devices), config.compute_dtype)

    def certify(self, quant):
        """Proves on this device that rounding happens, and is the certified one, before anything is trained. Returns
        {format: certificate} of all formats that these options (None: no formats) may come to use."""
        if quant is None:
            return {}
        names = rules.names_used(quant.layers) + list(quant.emergency_formats)
        for name in names:
            if (name, quant.saturate) not in self._certified:
                self._certified[name, quant.saturate] = canary(get_format(name), saturate=quant.saturate)
        return {name: self._certified[name, quant.saturate] for name in names}

    def row_names(self):
        """Every name that a row of the record may have, those of its timing included."""
        names = [
            name.removeprefix(SPARSE)
            for name in self.functions.metric_names
            if not name.startswith((ALERT, ALERT_VALUE))
        ]
        windows = jax.ShapeDtypeStruct((self.eval_batch_size, self.config.block_size + 1), np.uint16)
        state = self.functions.abstract_state
        ranks, observed = jax.eval_shape(
            self.functions.diagnose, state.params, windows, state.quant, self.functions.inputs.formats
        )
        if observed is not None:
            nothing = jax.tree.map(lambda array: np.zeros(array.shape), observed)
            names += diagnosis(self.quant, 0, 0, nothing)[0]
        return [*names, "val_loss", "val_perplexity", *ranks, *TIMING_KEYS]

    def compile(self):
        """All programs, ahead of the first step: a call with other shapes is then an error, never a recompilation.
        Returns the seconds it took."""
        started = time.perf_counter()
        with self.goodput.spend("compile"):
            # While XLA compiles one, which takes no interpreter lock, the next is traced and compiled beside it.
            # Autotuning results go to one file, which wants one writer.
            threads = ThreadPoolExecutor(1 if self.config.deterministic else 3, thread_name_prefix="compile")
            try:
                with _without_garbage_collection():
                    compiling = [threads.submit(lowered.compile) for lowered in self.lower()]
                self.compiled = tuple(program.result() for program in compiling)
            finally:
                # Not waited for: a signal must not wait for a compiler.
                threads.shutdown(wait=False, cancel_futures=True)
            if self.quant is not None and self.quant.native:
                require_float8_kernels(self.compiled[0], self.device, len(self.quant.layers))
        return round(time.perf_counter() - started, 3)

    def lower(self):
        """Yields the lowered programs run (first, for it takes longest to compile), evaluate and diagnose."""
        config = self.config
        shape = (
            (len(self.data.train_T),)
            if self.on_device
            else (self.buffer_steps, config.batch_size, config.block_size + 1)
        )
        everywhere = self.replicated if self.members is None else self.members.replicated
        tokens = jax.ShapeDtypeStruct(shape, np.uint16, sharding=everywhere)

        def windows(n, sharding):
            return jax.ShapeDtypeStruct((n, config.block_size + 1), np.uint16, sharding=sharding)

        functions, state, inputs, n_steps = self.functions, self.functions.abstract_state, self.functions.inputs, ()
        if self.members is not None:
            functions, n_steps = self.members, (self.width,)
            state, inputs = (self.members.abstract(tree, self.width) for tree in (state, inputs))
        yield functions.run.lower(state, tokens, jax.ShapeDtypeStruct(n_steps, np.int32), inputs)
        yield functions.evaluate.lower(
            state.params, windows(len(self.val_windows), everywhere), state.quant, inputs.formats
        )
        # A diagnosis is rare: of runs side by side each is given its own.
        state, inputs = self.functions.abstract_state, self.functions.inputs
        yield self.functions.diagnose.lower(
            state.params, windows(self.eval_batch_size, self.replicated), state.quant, inputs.formats
        )

    def take(self, runs):
        """Takes the states of these runs, which have opened their folders; lane i is runs[i]."""
        self.runs = list(runs)
        for lane, run in enumerate(self.runs):
            run.lane = lane
        if self.members is None:
            (run,) = self.runs
            self.state, self.inputs = run.state, run.inputs
        else:
            # Lanes without a run are given the first one's state and no steps.
            filled = self.runs + self.runs[:1] * (self.width - len(self.runs))
            self.state, self.inputs = (
                self.members.stack([getattr(run, name) for run in filled]) for name in ("state", "inputs")
            )
        for run in self.runs:
            run.state = None  # donated by the first dispatch
        if self._fed is None:
            everywhere = self.replicated if self.members is None else self.members.replicated
            self.val_on_device = place(self.val_windows, everywhere)
            self.diagnosed_windows = place(self.val_windows[: self.eval_batch_size], self.replicated)
            self._fed = self.feed()

    def feed(self):
        """Function (first step, n) -> the token array on the device, or the batches [K, B, L+1] of those steps."""
        everywhere = self.replicated if self.members is None else self.members.replicated
        if self.on_device:
            tokens_T = place(np.asarray(self.data.train_T), everywhere)
            return lambda step, n: tokens_T
        config = self.config
        stream = HostStream(
            self.data.train_T, batch_size=config.batch_size, block_size=config.block_size, seed=config.data_seed
        )
        self.resources.callback(stream.close)
        batches_KBL = np.zeros((self.buffer_steps, config.batch_size, config.block_size + 1), np.uint16)

        def next_batches(step, n):
            batches_KBL[:n] = stream.get(step, n)
            return place(batches_KBL, everywhere)

        return next_batches

    def advance(self, runs, step, n):
        """Makes n updates from `step` in the lanes of these runs, fewer where one freezes.

        Returns:
          The rows of each run, float32 [made, M].
        """
        n_R = np.zeros(self.width or 1, np.int32)
        n_R[[run.lane for run in runs]] = n
        self.state, rows = self.compiled[0](
            self.state, self._fed(step, n), n_R[0] if self.members is None else n_R, self.inputs
        )
        # One transfer, and no operation on the device for what a comparison on the host decides: it waits meanwhile.
        monitor = self.state.monitor
        rows_RKM, bad_streak_R, first_bad_R = self._by_lane((rows, monitor.bad_streak, monitor.first_bad_step))
        frozen_R = stability.is_frozen(monitor._replace(bad_streak=bad_streak_R), self.thresholds)
        made = []
        for run in runs:
            rows_KM = rows_RKM[run.lane][:n]
            # Rows of steps that were not made, because the state froze, are NaN throughout.
            made.append(rows_KM[~np.isnan(rows_KM[:, self.column["learning_rate"]])])
            run.frozen, run.first_bad_step = bool(frozen_R[run.lane]), int(first_bad_R[run.lane])
        return made

    def _by_lane(self, tree):
        """Host arrays with a leading axis of lanes."""
        tree = jax.device_get(tree)
        return tree if self.members is not None else jax.tree.map(lambda leaf: np.asarray(leaf)[None], tree)

    def state_of(self, run):
        """The run's state, on the device."""
        return self.state if self.members is None else self.members.pick(self.state, run.lane)

    def look(self, runs, *, evaluate, diagnose):
        """For each run (metrics for the row of its step or None, lines for diagnostics.jsonl), of its present state."""
        losses_R = None
        if evaluate:
            losses_R = self._by_lane(
                self.compiled[1](self.state.params, self.val_on_device, self.state.quant, self.inputs.formats)
            )
        looks = []
        for run in runs:
            found, lines = {}, []
            if evaluate:
                loss = float(losses_R[run.lane])
                with np.errstate(over="ignore"):
                    found = {"val_loss": loss, "val_perplexity": float(np.exp(np.float32(loss)))}
            if diagnose:
                state = self.state_of(run)
                if self.members is not None:
                    state = jax.device_put(state, self.replicated)
                # One transfer: a scalar at a time would cost a wait each.
                ranks, observed = jax.device_get(
                    self.compiled[2](state.params, self.diagnosed_windows, state.quant, run.inputs.formats)
                )
                found |= {name: float(value) for name, value in ranks.items()}
                if observed is not None:
                    of_operands, lines = diagnosis(run.quant, int(state.quant.level), run.step, observed)
                    found |= of_operands
            looks.append((found or None, lines))
        return looks


def diagnosis(quant, level, step, observed):
    """({metric: value}, lines for diagnostics.jsonl) of one run's histograms, under the format in use at this level."""
    found, lines = {}, []
    for q, layer in enumerate(quant.layers):
        for i, (operand, name) in enumerate(zip(rules.OPERANDS, layer.wag)):
            if name:
                in_use = quant.emergency_formats[level - 1] if level else name
                counts = [array_Q3[q, i] for array_Q3 in observed]
                row, use = whatif.operand_row(*counts, get_format(in_use))
                lines.append({"step": step, "layer": layer.layer, "operand": operand} | row)
                found |= {f"{key}/{layer.layer}/{operand}": value for key, value in use.items()}
    return found, lines


# --------------------------------------------------------------------------------------------------- the loop


def loop(program, runs, stop):
    """Trains every run to max_steps, or to its first unrecoverable step, or all of them to a signal.

    Runs that were saved at an earlier step than others are brought up to them first.
    """
    config, goodput = program.config, program.goodput
    goodput.enter("other")
    program.take(runs)
    seconds_per_step = None
    interim = InterimSaves(config.checkpoint_seconds)

    fresh = [run for run in runs if run.step == 0 and not run.resumed]
    if fresh and not stop.number:
        started = time.perf_counter()
        with goodput.spend("evaluation"):
            looks = program.look(fresh, evaluate=True, diagnose=True)
        seconds = (time.perf_counter() - started) / len(fresh)
        for run, (evaluation, lines) in zip(fresh, looks, strict=True):
            with goodput.spend("logging_blocked"):
                run.writer.submit(
                    DispatchRecord(first_step=0, evaluation=evaluation, evaluation_s=seconds, diagnostics=lines)
                )

    while not stop.number and (going := [run for run in runs if run.goes_on]):
        step = min(run.step for run in going)
        behind = [run for run in going if run.step == step]
        n = dispatch_length(config, step, seconds_per_step, longest=program.buffer_steps)
        unsaved_too_long = interim.are_due() and not any(run.checkpoints.is_saving() for run in behind)
        if distributed.n_processes() > 1:
            # The length depends on the lead's clock; and a signal to one process stops all, at one step.
            lengths, received, due_by_clock = zip(*distributed.gather([n, stop.received, unsaved_too_long]))
            stop.agree(received)
            if stop.number:
                break
            n, unsaved_too_long = lengths[0], due_by_clock[0]
        started = time.perf_counter()
        with goodput.spend("step"):
            rows = program.advance(behind, step, n)
        ended = time.perf_counter()
        seconds_per_step = (ended - started) / max(1, *map(len, rows))
        for run, rows_KM in zip(behind, rows, strict=True):
            again = min(len(rows_KM), max(0, run.furthest - run.step))
            goodput.move("step", "replayed", (ended - started) / len(behind) * again / max(1, len(rows_KM)))
            run.step += len(rows_KM)
        step += n

        def due(interval):
            return step % interval == 0 or step == config.max_steps

        whole = [run for run in behind if not run.frozen]
        looks, seconds = {}, None
        if whole and (due(config.eval_interval) or due(config.diagnostic_interval)):
            with goodput.spend("evaluation"):
                looks = dict(
                    zip(
                        map(id, whole),
                        program.look(
                            whole, evaluate=due(config.eval_interval), diagnose=due(config.diagnostic_interval)
                        ),
                        strict=True,
                    )
                )
            seconds = (time.perf_counter() - ended) / len(whole)
        for run, rows_KM in zip(behind, rows, strict=True):
            evaluation, lines = looks.get(id(run), (None, []))
            # A run's own share of the time.
            run.record(
                rows_KM,
                evaluation,
                lines,
                seconds=(ended - started) / len(behind),
                look_seconds=seconds if evaluation else None,
            )
            if is_last(run) or due(config.checkpoint_interval):
                run.save()
            elif unsaved_too_long:
                run.save(interim=True)
        if unsaved_too_long or due(config.checkpoint_interval):
            interim.saved()
    for run in runs:
        if run.step > 0 and not run.is_saved():
            # Interrupted between two checkpoints, or the save at the last step failed: once more.
            run.save(interim=not is_last(run))


def is_last(run):
    """Whether the run ends with the step that it stands at."""
    return run.frozen or run.step == run.config.max_steps


class InterimSaves:
    """When to save between two checkpoint intervals: once half of the time since the start is unsaved, or `longest`
    seconds of it, but not in the first FIRST_INTERIM_SECONDS; 0 switches this off.

    Without it a run that is killed more often than it reaches an interval would never get anywhere. What a kill costs
    can be more by the dispatch and the save that are under way.
    """

    def __init__(self, longest, clock=time.monotonic):
        self._longest, self._clock = longest, clock
        self._started = self._saved = clock()

    def are_due(self):
        now = self._clock()
        half = max(FIRST_INTERIM_SECONDS, (now - self._started) / 2)
        return self._longest > 0 and now - self._saved >= min(self._longest, half)

    def saved(self):
        self._saved = self._clock()


def dispatch_length(config, step, seconds_per_step, *, longest):
    """Steps of the next dispatch: as many as take about a second, up to the next evaluation or checkpoint."""
    if not config.steps_per_dispatch:
        # The first dispatch is a single step: it tells how long one takes.
        longest = min(longest, max(1, int(AUTO_DISPATCH_SECONDS / seconds_per_step)) if seconds_per_step else 1)
    intervals = config.eval_interval, config.checkpoint_interval, config.diagnostic_interval
    to_next = [interval - step % interval for interval in intervals]
    return min(longest, *to_next, config.max_steps - step)


# ------------------------------------------------------------------------------------------------------ a run's folder


class Run:
    """A run's folder while it is trained into: manifest, record, checkpoints, W&B, and where the run stands.

    Attributes:
      step: updates made. frozen: whether so many steps in a row were non-finite that it stopped. resumed: whether it
        goes on from a checkpoint. lane: its place in the program. furthest: the last step an earlier start recorded.
    """

    def __init__(self, config, run_dir, resume, console, resources, *, stop, watch=None):
        """Refuses a folder that this run may not use, before anything expensive is done.

        Args:
          stop: the StopRequest; while a full disk is waited for, its signal ends the waiting.
          watch: what the record's writer tells its progress and alerts to; default the console.
        """
        self.config, self.run_dir, self.console, self.resources = config, run_dir, console, resources
        self.watch, self.stop = watch or console, stop
        self.quant = quantization.options_of(config)
        self.started = time.time()
        self.lane, self.frozen, self.first_bad_step, self.evaluation = 0, False, -1, None
        self.furthest, self.account = 0, None
        self.resume = resume
        self.manifest = distributed.from_lead(lambda: self._check_folder(resume))

    def _check_folder(self, resume):
        """Returns the manifest of the folder, where there is one."""
        run_dir, manifest = self.run_dir, None
        if resume == "never":
            if run_dir.exists() and not is_empty(run_dir):
                raise UserError(
                    f"{run_dir} is not empty and --resume=never starts anew: give an empty folder with "
                    "--workdir, or continue with --resume=auto"
                )
        elif (run_dir / MANIFEST).exists():
            manifest = read_manifest(run_dir)
            _refuse_other_config(run_dir, manifest, self.config)
        elif list_steps(run_dir) or (run_dir / METRICS).exists():
            raise UserError(
                f"{run_dir} holds a run without its {MANIFEST}: bring that file back, or give another "
                "--workdir to start a new run"
            )
        if isinstance(resume, int) and resume not in list_steps(run_dir):
            raise UserError(
                f"--resume={resume} names a checkpoint that {run_dir} does not hold; it has "
                f"{', '.join(map(str, list_steps(run_dir))) or 'none'}"
            )
        return manifest

    def made_on(self):
        """Device kind of the run's first start, None if this is it."""
        return self.manifest["starts"][0]["device"]["kind"] if self.manifest else None

    def open(self, program):
        """Restores the run's state, or starts it, and opens its record."""
        self.program, self.goodput = program, program.goodput
        if program.data.dir.absolute() == self.run_dir:
            raise UserError(
                f"{self.run_dir} holds the training data, so it cannot be the run's folder too: give another --workdir"
            )
        require_wandb_keys(self.config.wandb_keys, program)
        self.inputs = inputs_of(self.config)
        self.certificates = program.certify(self.quant)
        made_on, kind = self.made_on(), program.device.device_kind
        if self.config.deterministic and made_on not in (None, kind):
            self.console.message(
                f"this run was begun on {made_on} and goes on on {kind}: XLA chooses kernels of its "
                "own for each, so from here on its numbers may round otherwise"
            )
        self._restore_or_start()
        monitor = self.state.monitor
        self.frozen = bool(
            stability.is_frozen(monitor._replace(bad_streak=jax.device_get(monitor.bad_streak)), program.thresholds)
        )
        self._open_record()
        self._introduce()

    def _restore_or_start(self):
        config, run_dir, resume = self.config, self.run_dir, self.resume
        abstract_state = self.program.functions.abstract_state
        self.require_same_data(self.program)
        self.checkpoints = distributed.everywhere(lambda: open_checkpoints(run_dir, config.max_checkpoints))
        self.resources.callback(self.checkpoints.close)
        restored = None
        if isinstance(resume, int):
            state, meta = self.checkpoints.restore(resume, abstract_state)
            self._refuse_foreign(resume, meta)
            superseded = self.checkpoints.set_aside_newer_than(resume)
            if superseded:
                self.console.message(
                    f"checkpoints after step {resume} were set aside: {', '.join(map(str, superseded))}"
                )
            restored = resume, state
        elif self.manifest is not None:
            found = self.checkpoints.restore_newest(
                abstract_state,
                on_damaged=lambda step, reason: self.console.alert(
                    f"checkpoint {step} is damaged ({reason}); it is set aside and an older one is used"
                ),
            )
            if found is not None:
                self._refuse_foreign(found[0], found[2])
                restored = found[:2]
            else:
                distributed.from_lead(self._start_again)

        self.step, self.state = restored or (0, self.program.functions.init(config.seed, self.inputs.formats))
        self.resumed = restored is not None

    def require_same_data(self, program):
        """UserError if the folder's run was trained on other data than the program's."""
        data = program.data
        if self.manifest and self.manifest["data"]["fingerprint"] != data.fingerprint:
            raise UserError(
                f"{self.run_dir} was trained on other data (fingerprint {self.manifest['data']['fingerprint'][:12]}, "
                f"{data.dir} has {data.fingerprint[:12]}): give the --data_dir it was made with, or another "
                "--workdir to start a new run"
            )

    def _refuse_foreign(self, step, meta):
        """A checkpoint of another run, copied into this folder, would continue as if it were this one's."""
        fingerprint = self.program.data.fingerprint
        if meta.get("run_id") != self.manifest["run_id"] or meta.get("data_fingerprint") != fingerprint:
            raise UserError(
                f"checkpoint {step} in {self.run_dir} belongs to another run (id {meta.get('run_id')!r}, this folder's "
                f"manifest says {self.manifest['run_id']!r}): take it out of the folder, or give another --workdir"
            )

    def _start_again(self):
        """A folder with a manifest and no checkpoint: fine if none was ever saved, an error if they were taken away."""
        _, events = read_timing(self.run_dir)
        saved = [event["step"] for event in events if event.get("event") == "checkpoint"]
        if saved:
            raise UserError(
                f"{self.run_dir} holds the record of a run with checkpoints up to step {max(saved)}, but no checkpoint "
                "any more: bring one back, or give another --workdir to start a new run"
            )
        self.console.message("no checkpoint was saved in this folder yet: starting again at step 0")

    def _open_record(self):
        config, run_dir, program = self.config, self.run_dir, self.program
        self.manifest_was_new = self.manifest is None
        self.tags = list(config.tags + program.extra_tags)
        self.manifest = distributed.from_lead(self._write_manifest)
        self.run_id = self.manifest["run_id"]
        if not distributed.is_lead():
            self.writer, self.sinks = _Silent(), None
            return
        # What an earlier end said is no longer true.
        for name in (verdict.VERDICT, verdict.LOSS_PLOT):
            (run_dir / name).unlink(missing_ok=True)
        resume_step = self.step if self.resumed else (None if self.manifest_was_new else -1)
        self.furthest = furthest_step(run_dir)
        record = Record.open(run_dir, resume_step, log_interval=config.log_interval)
        self.writer = Writer(
            record,
            RunFacts(
                max_steps=config.max_steps,
                tokens_per_step=program.tokens_per_step,
                log_interval=config.log_interval,
                layer_interval=config.layer_interval,
                alert_interval=config.alert_interval,
                flops_per_step=program.flops_per_step,
                peak_flops=program.peak_flops,
            ),
            console=self.watch,
            rules=rules_of(config),
        )
        self.resources.callback(self.writer.close)
        self.resources.callback(self._account)  # after an exception; else finish() has done it
        self.sinks = open_sinks(
            config, run_dir, self.manifest, resume_step=resume_step, say=self.console.message, event=self.writer.event
        )
        # After finish() there is nothing left to close; after an exception this ends the dashboards' runs.
        self.resources.callback(self.sinks.close, drain_timeout=5.0)

    def _write_manifest(self):
        """Writes and returns what this run is. A resumed run keeps what was true at its start and adds how it was
        continued."""
        config, program = self.config, self.program
        start = {
            "time": round(self.started, 3),
            "step": self.step,
            "argv": sys.argv,
            "versions": versions(),
            "git": git_commit(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "device": {
                "platform": program.device.platform,
                "kind": program.device.device_kind,
                "count": len(program.devices),
            },
            "mesh": dict(program.mesh.shape),
            "processes": distributed.n_processes(),
        }
        if program.width is not None:
            # The times of this run's rows are its share of those of all.
            start["side_by_side"] = program.width
        manifest = self.manifest
        if self.manifest_was_new:
            manifest = {
                "run_id": new_run_id(),
                "starts": [],
                "data": {
                    "fingerprint": program.data.fingerprint,
                    "dir": str(program.data.dir.absolute()),
                    "meta": program.data.meta,
                    "placement": "device" if program.on_device else "host",
                    "eval_windows": len(program.val_windows),
                },
                "model": {
                    "parameters": count_params(program.functions.abstract_state.params),
                    "flops_per_step": program.flops_per_step,
                },
            }
            if self.quant is not None:
                manifest["formats"] = {
                    "layers": [dataclasses.asdict(layer) for layer in self.quant.layers],
                    "certificates": self.certificates,
                }
        manifest = manifest | {
            "config": settings.to_dict(config),
            "tags": self.tags,
            "starts": manifest["starts"] + [start],
        }
        write_manifest(self.run_dir, manifest)
        return manifest

    def _introduce(self):
        config, say = self.config, self.console.message
        meta = self.program.data.meta
        n_tokens = meta["n_tokens"]
        say(
            f"{config.run_name}: {self.manifest['model']['parameters']:,} parameters in {config.compute_dtype}, "
            f"{config.max_steps} steps of {config.batch_size} x {config.block_size} tokens"
        )
        if self.quant is not None:
            say(self._describe_formats())
        say(
            f"data: {meta['source']}, {n_tokens['train']:,} training and {n_tokens['val']:,} validation tokens, in "
            f"{self.program.data.dir}"
        )
        program, n = self.program, distributed.n_processes()
        say(
            f"device: {len(program.devices)} x {program.device.device_kind} ({program.device.platform})"
            + (f" of {n} processes" if n > 1 else "")
            + (f", parameters split over {config.fsdp}" if program.mesh.shape[FSDP] > 1 else "")
        )
        say(f"run folder: {self.run_dir}" + (f", continued from step {self.step}" if self.resumed else ""))

    def _describe_formats(self):
        """Which layers compute in which formats, in one line."""
        groups = {}
        for layer in self.quant.layers:
            groups.setdefault(layer.wag, []).append(layer.layer)
        shown = [
            f"{'/'.join(name or '-' for name in wag) if len(set(wag)) > 1 else wag[0]} in {len(layers)} layers"
            + ("" if len(groups) == 1 else f" ({layers[0]} ...)")
            for wag, layers in groups.items()
        ]
        return (
            f"formats (W/A/G): {', '.join(shown)}; scaling {self.config.scaling}, products {self.config.products}, "
            f"weights at rest {self.config.weights_at_rest}, optimizer {self.config.optimizer}; rounding certified "
            "on this device"
        )

    @property
    def goes_on(self):
        return not self.frozen and self.step < self.config.max_steps

    def record(self, rows_KM, evaluation, diagnostics, *, seconds, look_seconds):
        """Hands the rows of a dispatch to the writer; `step` stands behind the last of them."""
        first_row = self.step - len(rows_KM) + 1
        self.evaluation = evaluation
        with self.goodput.spend("logging_blocked"):
            self.writer.submit(
                DispatchRecord(
                    first_step=first_row,
                    names=self.program.functions.metric_names,
                    values=rows_KM,
                    seconds=seconds,
                    evaluation=evaluation,
                    evaluation_s=look_seconds or 0.0,
                    diagnostics=diagnostics,
                )
            )
        self._save_anomaly(first_row, rows_KM)
        self._tell_saves()

    def is_saved(self):
        """Whether there is a complete checkpoint of this step, once no save is under way."""
        with self.goodput.spend("save_blocked"):
            self.checkpoints.wait()
        self._tell_saves()
        return distributed.from_lead(lambda: self.step in self.checkpoints.steps())

    def _meta(self):
        return {
            "config": settings.to_dict(self.config),
            "data_fingerprint": self.program.data.fingerprint,
            "run_id": self.run_id,
            "step": self.step,
        }

    def save(self, *, interim=False):
        """Starts to save the run's state at this step."""
        with self.goodput.spend("logging_blocked"):
            self.writer.flush()
        val_loss = (self.evaluation or {}).get("val_loss")
        with self.goodput.spend("save_blocked"):
            self.checkpoints.save(self.step, self.program.state_of(self), self._meta(), val_loss, interim=interim)

    def _tell_saves(self):
        for outcome in self.checkpoints.check():
            if outcome.error:
                self.console.alert(f"{outcome.error}; training goes on and saves again at the next interval")
                self.writer.event("checkpoint_failed", outcome.step, reason=outcome.error)
            else:
                self.writer.event(
                    "checkpoint",
                    outcome.step,
                    bytes=outcome.n_bytes,
                    blocked_s=round(outcome.blocked_s, 4),
                    background_s=round(outcome.background_s, 3),
                )

    def _save_anomaly(self, first_row, rows_KM):
        """At the run's first non-finite step: the end state of its dispatch, and how to see that step again."""
        bad_row = self.first_bad_step
        if not first_row <= bad_row < first_row + len(rows_KM):
            return
        B = self.config.batch_size
        numbers = np.arange((bad_row - 1) * B, bad_row * B, dtype=np.uint32)
        windows = permute_windows(numbers, self.program.data.n_train_windows, self.config.data_seed, xp=np)
        row = rows_KM[bad_row - first_row]
        where = {
            name: float(row[i])
            for name, i in self.program.column.items()
            if name.startswith("alert/nonfinite") and row[i] != 0
        }
        cause = stability.locate({name: float(row[i]) for name, i in self.program.column.items()})
        with self.goodput.spend("logging_blocked"):
            self.writer.flush()
        with self.goodput.spend("save_blocked"):
            outcome = save_anomaly(
                self.run_dir,
                self.step,
                self.program.state_of(self),
                self._meta()
                | {
                    "first_bad_step": bad_row,
                    "cause": cause,
                    "windows": windows.tolist(),
                    "found": {name.removeprefix("alert/"): count for name, count in where.items()},
                },
            )
        self.writer.event(
            "anomaly", self.step, first_bad_step=bad_row, cause=cause, path=str(outcome.path), error=outcome.error
        )
        kept = outcome.error or f"the state at step {self.step} is kept in {outcome.path}"
        self.console.alert(f"step {bad_row} was not finite: {cause}; {kept}")

    # The end.

    def finish(self, stop, *, plot=True):
        """Writes the verdict and the plot of the loss, unless the run was interrupted, ends W&B, and returns the exit
        code. Whoever opened the record closes it."""
        self.exit_code = exit_code = self._exit_code(stop)
        if not distributed.is_lead():
            return exit_code
        with self.goodput.spend("logging_blocked"):
            self.writer.flush()
        interrupted = exit_code > 128
        self.verdict = None
        if not interrupted:
            reason = {
                FINISHED: None,
                NOT_SAVED: f"the checkpoint of step {self.step} could not be saved",
                STOPPED_NON_FINITE: f"{self.config.nan_patience} non-finite steps in a row, the last at step "
                f"{self.step}",
            }[exit_code]
            self.verdict = verdict.make_verdict(self.run_dir, stopped=reason)
            if plot:
                verdict.plot_loss(self.run_dir, title=self.config.run_name)
            verdict.write_verdict(self.run_dir, self.verdict)
        # A signal wants an answer within seconds; what W&B then lacks is sent when the run is resumed.
        with self.goodput.spend("logging_blocked"):
            self.sinks.close(drain_timeout=5.0 if stop.received else 300.0, summary=self.verdict)
        self._account()
        if self.account and self.verdict:
            # Once more: sending to W&B may have taken minutes, and a verdict does not wait for that.
            self.writer.flush()
            self.verdict["goodput"] = total(read_timing(self.run_dir)[1])
            verdict.write_verdict(self.run_dir, self.verdict)
        return exit_code

    def _account(self):
        """Records, once, where the time of this start went. Not of runs side by side, who have no time of their own."""
        if self.account is None and self.program.width is None:
            self.account = self.goodput.account()
            self.writer.event("goodput", self.step, **self.account)

    def tell(self):
        """Says how it went: where the time went, and the verdict, or how to resume."""
        self.console.message(describe(self.account))
        self.console.close()
        exit_code = self.exit_code
        if exit_code > 128:
            print(
                f"{signal.Signals(exit_code - 128).name}: stopped after step {self.step} of {self.config.max_steps}; "
                f"{_how_it_goes_on(self.run_dir, self.resume)}"
            )
        else:
            verdict.print_verdict(self.verdict, seconds=self.account["wall_s"])

    def _exit_code(self, stop):
        if self.frozen:
            return STOPPED_NON_FINITE
        if self.step > 0 and not self.is_saved():
            return NOT_SAVED
        return 128 + stop.number if stop.number and self.step < self.config.max_steps else FINISHED
