"""The project's programs, compiled for NVIDIA GPUs that need not exist.

jax's CUDA plugin compiles for a description of a card (`cards`) where there is neither card nor driver. The step
functions are made by `run.setup.set_up`, exactly as a training makes them, with devices that can only be compiled for.
What this cannot do: choose kernels by timing them (autotuning), build cuDNN's plans, run anything.

The variables of `cards.ENVIRONMENT` must be set before jax is imported.
"""

import contextlib
import importlib.metadata
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from altgrad_jax.bench.cards import Card
from altgrad_jax.bench.gpu_report import UNITS, Compiled
from altgrad_jax.config import Config
from altgrad_jax.data.dataset import TokenData
from altgrad_jax.errors import UserError
from altgrad_jax.run.device import use_deterministic_operations
from altgrad_jax.run.setup import Setup, TrainingData, set_up
from altgrad_jax.step.mesh import Device
from altgrad_jax.step.program import compile_lowered, compiler_options

PROGRAMS = tuple(UNITS)
PLUGIN = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
INSTALL = 'pip install -e ".[gpu-program]"'
CUDNN = 91000  # version that the lowering of attention is told; the targets name the same
_THUNKS = "*thunk_sequence_after_thunk_passes.txt"
TRAIN_TOKENS = 10_866_001  # those that the baseline's results were made with


def require_plugin() -> None:
    """UserError unless what compiles for a CUDA device is installed, in jax's own version."""
    versions = {}
    for name in ("jax", "jaxlib", *PLUGIN):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed, and compiling for a GPU needs it: {INSTALL}") from None
    jax_version = versions["jax"]
    for name in ("jaxlib", *PLUGIN[:2]):
        if versions[name] != jax_version:
            raise UserError(
                f"{name} has version {versions[name]} and jax {jax_version}, and they must be equal: "
                f'pip install "jax=={jax_version}" "jaxlib=={jax_version}" "{PLUGIN[0]}=={jax_version}" '
                f'"{PLUGIN[1]}=={jax_version}"'
            )


def devices_of(card: Card, n_devices: int = 1, per_host: int = 8) -> list[Device]:
    """Devices that can be compiled for, `per_host` of them on each host.

    UserError where they do not make whole hosts.
    """
    if n_devices > per_host and n_devices % per_host:
        raise UserError(
            f"--devices={n_devices} are no whole hosts of {per_host}: give a multiple of {per_host}, or --per_host"
        )
    hosts = max(1, n_devices // per_host)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=card.target, topology=f"1x{hosts}x{n_devices // hosts}"
    )
    return list(topology.devices)


@contextlib.contextmanager
def assumed_cudnn() -> Iterator[None]:
    """A context in which jax lowers cuDNN's attention without a cuDNN to ask for its version."""
    import jax._src.cudnn.fused_attention_stablehlo as attention  # jax has no public way to say it

    with (
        mock.patch.object(attention, "check_cudnn_version", lambda: CUDNN),
        mock.patch.object(attention, "check_compute_capability", lambda *_: True),
        mock.patch.object(attention, "is_cuda_compute_capability_equal", lambda *_: False),
    ):
        yield


def set_up_for(config: Config, devices: list[Device], *, n_train_tokens: int = TRAIN_TOKENS) -> Setup:
    """The step functions of a run on these devices, with data of this size that are never read.

    UserError where the batch cannot be split over all of them.
    """
    micro_batch = config.batch_size // config.grad_accum_steps
    if micro_batch % len(devices):
        raise UserError(
            f"--devices={len(devices)} cannot share {micro_batch} sequences at a time: give --config.batch_size a "
            f"multiple, such as {len(devices) * config.batch_size}"
        )
    if config.deterministic:
        use_deterministic_operations()
    length = config.block_size + 1
    nothing = np.broadcast_to(np.zeros((), np.uint16), (n_train_tokens,))
    tokens = TokenData(
        dir=Path(),
        train_T=nothing,
        val_T=nothing[: config.eval_windows * length],
        meta={},
        fingerprint="",
        n_train_windows=(n_train_tokens - 1) // config.block_size,
        n_val_windows=config.eval_windows,
    )
    windows = np.broadcast_to(np.zeros((), np.uint16), (config.eval_windows, length))
    with assumed_cudnn():
        return set_up(config, TrainingData(tokens, windows, config.eval_batch_size, ()), print, devices=devices)


def compile_for(setup: Setup, program: str = "run") -> Compiled:
    """Compiles one of PROGRAMS for the devices of `setup`."""
    step = setup.functions.step
    options = compiler_options(step.quant, "gpu", setup.config.xla_options)
    with assumed_cudnn():
        lowered = next(lowered for name, lowered in setup.program().lower() if name == program)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu-program-") as folder, _nothing_cached():
        compiled = compile_lowered(lowered, options | {"xla_dump_to": folder})
        seconds = time.perf_counter() - started
        thunks = [path.read_text() for path in sorted(Path(folder).glob(_THUNKS))]
    native = len(step.quant.layers) if step.quant is not None and step.quant.native else 0
    graphs = graphs_of(thunks[-1] if thunks else "")
    return Compiled(
        program, compiled.as_text() or "", _memory(compiled.memory_analysis()), graphs, options, seconds, native
    )


@contextlib.contextmanager
def _nothing_cached() -> Iterator[None]:
    """A context in which jax neither keeps compiled programs on the disk nor looks for them: without the device it can
    write them, and not read them."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    _use_cache(False)
    try:
        yield
    finally:
        _use_cache(before)


def _use_cache(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # what jax remembers of whether there is one


def graphs_of(thunks: str) -> tuple[int, ...]:
    """For each CUDA graph, the operations in it, from XLA's list of what the host starts: one a line, those of a graph
    or a loop indented below it."""
    found, inside = [], None
    for line in thunks.splitlines():
        operation = re.match(r"^( *)\d+: (k\w+)", line)
        if operation is None:
            continue
        depth = len(operation[1])
        if inside is not None and depth > inside:
            found[-1] += 1
            continue
        inside = None
        if operation[2] == "kCommandBuffer":
            found.append(0)
            inside = depth
    return tuple(found)


def _memory(stats: Any) -> dict[str, int]:
    names = ("argument", "output", "temp", "alias")
    sizes = {name: getattr(stats, f"{name}_size_in_bytes") for name in names}
    return sizes | {"together": sum(sizes.values()) - 2 * sizes["alias"]}
