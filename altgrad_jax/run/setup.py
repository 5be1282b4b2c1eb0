"""What is ready before the first step: the data, the step functions for the devices at hand, the certificates."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from altgrad_jax.config import Config
from altgrad_jax.data.dataset import HostStream, TokenData, choose_windows, gather_windows, load_token_data
from altgrad_jax.data.prepare import banner, resolve
from altgrad_jax.errors import UserError
from altgrad_jax.models import flops
from altgrad_jax.numerics import recipe_certificate, rules
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.recipes import get_recipe
from altgrad_jax.numerics.rounding import canary
from altgrad_jax.run import processes
from altgrad_jax.step.from_config import flops_per_step, model_config, step_options
from altgrad_jax.step.mesh import Device, data_mesh, place
from altgrad_jax.step.program import Program, StepFunctions, make_step_functions, without_garbage_collection
from altgrad_jax.step.quantization import QuantOptions
from altgrad_jax.step.recipe import RecipeOptions

SAMPLE_TAG = "eurlex-sample"
# With steps_per_dispatch=0: rows of the metrics buffer.
AUTO_DISPATCH_STEPS = 100


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Verified token files, and the windows that every evaluation looks at.

    Attributes:
      val_windows: uint16 [E, block_size + 1]. eval_batch_size: windows per forward pass; divides E.
      all_windows: every validation window, in the order of the file, for evaluate_all; None without it.
      tags: what the data add to the tags of a run.
    """

    tokens: TokenData
    val_windows: np.ndarray
    eval_batch_size: int
    tags: tuple[str, ...]
    all_windows: np.ndarray | None = None


def open_data(config: Config, data_dir, say: Callable[[str], None]) -> TrainingData:
    """The data that `config` asks for, prepared in data_dir first where it is empty (by the lead of several processes).

    Raises:
      UserError: the data cannot be had, are damaged, or do not fit the model.
    """
    find = functools.partial(resolve, data_dir, config.data_source, config.tokenizer)
    # The lead first, because it may have to make what the others read.
    prepared = processes.everywhere(find if processes.is_lead() else lambda: None) or find()
    if prepared.warnings:
        say(banner(prepared.warnings))
    tokens = load_token_data(
        prepared.dir, vocab_size=config.vocab_size, block_size=config.block_size, tokenizer=config.tokenizer
    )
    processes.require_equal(
        "data with the fingerprint", tokens.fingerprint[:12], "give all processes the same token files with --data_dir"
    )
    if prepared.is_sample:
        say(f"this run trains on the small sample and is tagged {SAMPLE_TAG}: its figures are not the baseline's")
    windows, batch_size = choose_windows(tokens.val_T, config.block_size, config.eval_windows, config.eval_batch_size)
    if len(windows) < config.eval_windows:
        say(
            f"eval_windows={config.eval_windows}, but the validation data holds {tokens.n_val_windows}: each "
            f"evaluation uses {len(windows)} of them, in whole batches of {batch_size}"
        )
    every = None
    if config.evaluate_all:
        every = np.asarray(gather_windows(tokens.val_T, np.arange(tokens.n_val_windows), config.block_size))
    tags = (SAMPLE_TAG,) if prepared.is_sample else ()
    return TrainingData(tokens, np.asarray(windows), batch_size, tags, every)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What runs of one compiled program share.

    Attributes:
      config: of one of the runs; the others differ in nothing that the program sees. devices: those used.
      side_by_side: whether the runs are lanes of one program, each computed on one device.
    """

    config: Config
    data: TrainingData
    functions: StepFunctions
    devices: tuple[Device, ...]
    side_by_side: bool

    @property
    def device(self) -> Device:
        return self.functions.step.mesh.local_devices[0]

    @property
    def on_device(self) -> bool:
        """Whether the tokens lie on the device; else they are streamed from the host."""
        return self.functions.step.options.data_on_device

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.block_size

    @property
    def flops_per_step(self) -> float:
        return flops_per_step(self.config)

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of the devices together, None where it is not known."""
        return flops.peak_flops(self.device.device_kind, len(self.devices), self.config.compute_dtype)

    def program(self, width: int | None = None, member_loop: str = "map") -> Program:
        """The program of these runs, not compiled yet. width: lanes, where there are any."""
        return Program(
            self.functions,
            n_train_tokens=len(self.data.tokens.train_T),
            n_val_windows=len(self.data.val_windows),
            n_all_windows=0 if self.data.all_windows is None else len(self.data.all_windows),
            diagnoses=self.config.diagnostic_interval > 0,
            width=width,
            member_loop=member_loop,
            devices=self.devices,
            xla_options=self.config.xla_options,
        )


def set_up(
    config: Config,
    data: TrainingData,
    say: Callable[[str], None],
    *,
    devices: Sequence[Device] | None = None,
    side_by_side: bool = False,
) -> Setup:
    """Builds the step functions of `config` for the devices (default: all); compiles nothing yet."""
    devices = list(jax.devices() if devices is None else devices)
    if not side_by_side:
        devices = usable_devices(config, devices, say)
    elif config.fsdp > 1:
        raise UserError(
            f"fsdp={config.fsdp} splits one run over devices, and runs side by side are each computed on one: leave "
            "fsdp at 1, or train this run by itself"
        )
    # Runs side by side are independent: each is computed on one device, as if it had no other.
    mesh = data_mesh(devices[:1] if side_by_side else devices, config.fsdp)
    device = mesh.local_devices[0]
    options = step_options(
        config,
        steps_per_dispatch=min(config.steps_per_dispatch or AUTO_DISPATCH_STEPS, config.max_steps),
        data_on_device=_lies_on_device(config, len(data.tokens.train_T), device),
    )
    with without_garbage_collection():
        functions = make_step_functions(
            model_config(config, device),
            options,
            mesh,
            n_train_windows=data.tokens.n_train_windows,
            eval_batch_size=data.eval_batch_size,
            seed=config.seed,
        )
    processes.everywhere(lambda: (certify(functions.step.quant), certify_recipes(functions.step.recipe)))
    return Setup(config, data, functions, tuple(devices), side_by_side)


def usable_devices(config: Config, devices: list[Device], say: Callable[[str], None]) -> list[Device]:
    """As many of the devices as the batch of an update can be split over, in whole sequences."""
    micro_batch = config.batch_size // config.grad_accum_steps
    sizes = [n for n in range(1, len(devices) + 1) if micro_batch % n == 0 and n % config.fsdp == 0]
    n = max(sizes, default=0)
    if n == len(devices):
        return devices
    batch = f"batch_size={config.batch_size}" + (
        f" in grad_accum_steps={config.grad_accum_steps} parts" if config.grad_accum_steps > 1 else ""
    )
    if n == 0 or processes.n_processes() > 1:
        raise UserError(
            f"{batch} cannot be split over {len(devices)} devices"
            + (f" of which fsdp={config.fsdp} share the parameters" if config.fsdp > 1 else "")
            + ": make batch_size / grad_accum_steps a multiple of their number, or hide devices with "
            "CUDA_VISIBLE_DEVICES"
        )
    say(f"{n} of {len(devices)} devices are used, because {batch} cannot be split over more; a multiple of them can")
    return devices[:n]


def _lies_on_device(config: Config, n_tokens: int, device: Device) -> bool:
    # Positions are 32-bit, and the tokens may take a quarter of the memory.
    limit = _memory_limit(device)
    fits = all(processes.gather(n_tokens < 2**31 and 2 * n_tokens <= limit // 4))
    if config.data_placement == "device" and not fits:
        raise UserError(
            f"data_placement='device' cannot hold {n_tokens} tokens in a quarter of the device's memory: set "
            "data_placement to auto or host"
        )
    return fits if config.data_placement == "auto" else config.data_placement == "device"


def _memory_limit(device: Device) -> int:
    """Bytes of the device's memory; 8 GiB where it does not tell: a CPU, or one that is only compiled for."""
    try:
        stats = device.memory_stats()
    except jax.errors.JaxRuntimeError:
        stats = None
    return (stats or {}).get("bytes_limit", 2**33)


def certify(quant: QuantOptions | None) -> dict[str, dict]:
    """Proves on this device, before anything is trained, that every format the options may come to use is rounded to as
    it is certified. Returns {format: certificate}."""
    if quant is None:
        return {}
    names = [*rules.names_used(quant.layers), *quant.emergency_formats]
    return {name: _certificate(name, quant.saturate) for name in names}


@functools.cache
def _certificate(name: str, saturate: bool) -> dict:
    return canary(get_format(name), saturate=saturate)


def certify_recipes(options: RecipeOptions | None) -> dict[str, dict | None]:
    """Proves on this device, before anything is trained, that the run's recipes quantize as they are defined. Returns
    {recipe: certificate}, None for one that quantizes nothing."""
    return {} if options is None else {phase.recipe: _recipe_certificate(phase.recipe) for phase in options.schedule}


@functools.cache
def _recipe_certificate(name: str) -> dict | None:
    return recipe_certificate.certify(get_recipe(name))


class Feed:
    """What each dispatch reads of the training tokens: the file on the device, or batches streamed from the host."""

    def __init__(self, setup: Setup, program: Program):
        config, self._shared = setup.config, program.shared
        train_T = setup.data.tokens.train_T
        self._stream = self._tokens = None
        if setup.on_device:
            self._tokens = place(np.asarray(train_T), self._shared)
            return
        self._stream = HostStream(
            train_T, batch_size=config.batch_size, block_size=config.block_size, seed=config.data_seed
        )
        n_steps = setup.functions.step.options.steps_per_dispatch
        self._batches_KBL = np.zeros((n_steps, config.batch_size, config.block_size + 1), np.uint16)

    def at(self, step: int, n: int) -> Any:
        """The argument `tokens` of Program.advance for the n updates from `step` on."""
        if self._stream is None:
            return self._tokens
        self._batches_KBL[:n] = self._stream.get(step, n)
        return place(self._batches_KBL, self._shared)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
