"""What a run stands on: the device and what it can do, the compiler's settings, versions, the commit."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

import jax

from altgrad_jax.data.sources import default_cache_dir
from altgrad_jax.errors import UserError

DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"
AUTOTUNE = "autotune.textproto"  # in the run folder: which kernel XLA chose for each product
_AUTOTUNE_PART = ".autotune.part"
_DUMP_FLAG, _LOAD_FLAG = "--xla_gpu_dump_autotune_results_to", "--xla_gpu_load_autotune_results_from"
PACKAGES = (
    "altgrad-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "ml-collections",
    "wandb",
    "tiktoken",
)


def _backend_is_started():
    try:
        return jax._src.xla_bridge.backends_are_initialized()  # pyright: ignore[reportAttributeAccessIssue]  # jax has no public way to ask
    except AttributeError:
        return False


_forked_from_jax = False


def _note_fork():
    global _forked_from_jax
    _forked_from_jax = _backend_is_started()


os.register_at_fork(after_in_child=_note_fork)


def require_no_fork():
    """UserError in a process that was forked from one in which jax had started: without its threads jax hangs."""
    if _forked_from_jax:
        raise UserError(
            "this process was forked from one in which jax had started, and jax would hang here: start it anew, with "
            "multiprocessing.get_context('spawn'), or as a script"
        )


def use_deterministic_operations():
    """Asks XLA for operations that repeat to the bit, which must happen before jax first touches a GPU."""
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC_FLAG in flags:
        return
    if _backend_is_started() and jax.default_backend() != "cpu":
        raise UserError(
            "deterministic=True came too late: jax has already started on this device; set it before the "
            f"first jax computation of the process, or start with XLA_FLAGS={DETERMINISTIC_FLAG}"
        )
    os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC_FLAG}".strip()


def use_device(name: str) -> None:
    """Has jax compute where --device says, before it starts; UserError where a GPU is asked for and there is none.

    Args:
      name: "cpu", "gpu", or "auto": what JAX_PLATFORMS says, else the best there is.
    """
    if name != "auto":
        jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda,cpu"}[name])
    platforms = _platforms()
    if {"cuda", "gpu"} & set(platforms.split(",")) and not expects_nvidia_gpu():
        by = "--device=gpu" if name == "gpu" else f"JAX_PLATFORMS={platforms}"
        raise UserError(
            f"{by} asks for a GPU, and jax finds no NVIDIA driver or no plugin for it: install jax[cuda12] or "
            "jax[cuda13] on a machine with a GPU, or give --device=cpu"
        )


def _platforms() -> str:
    """The platforms that jax is told to use, in order; empty where it chooses."""
    return jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]  # made at run time


def expects_nvidia_gpu():
    """Whether jax will compute on an NVIDIA GPU, as far as can be known without starting it."""
    platforms = _platforms()
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    plugin = any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))
    return bool(plugin) and any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg")))


def nvidia_model():
    """The first NVIDIA GPU's name as its driver gives it, without starting jax; None where it does not tell."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(":")
                if name.strip() == "Model":
                    return value.strip()
    return None


def use_autotune_results(run_dir, made_on, say):
    """Has XLA write down which kernels it chose by timing, or take those that the run's first start wrote down.

    Deterministic operations repeat to the bit only with the same kernels. Call it before jax starts, and
    `keep_autotune_results` when all is compiled. Without a GPU it does nothing. Untested on a GPU.

    Both flags are part of jax's cache key, with the path: the first start in a folder finds nothing in the cache of
    compiled programs, so it does choose and write; the first resume compiles once more, with the choices of the file.

    Args:
      made_on: device kind of the run's first start, None if this is it. Choices for another kind are not taken.
      say: called with one line where the choices cannot be kept.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if not expects_nvidia_gpu() or any(flag in flags for flag in (_DUMP_FLAG, _LOAD_FLAG)):
        return  # flags given by hand come first
    if _backend_is_started():
        say(
            "which kernels XLA chooses is not kept with this run, for jax had already started: another start may "
            "choose others, which round otherwise"
        )
        return
    path, model = run_dir / AUTOTUNE, nvidia_model()
    (run_dir / _AUTOTUNE_PART).unlink(missing_ok=True)  # of a killed start, or of compilations after all programs
    if not path.exists():
        flag = f"{_DUMP_FLAG}={_quoted(run_dir / _AUTOTUNE_PART)}"
    elif None in (made_on, model) or _plain(made_on) == _plain(model):
        flag = f"{_LOAD_FLAG}={_quoted(path)}"
    else:
        return
    os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def keep_autotune_results(run_dir):
    """Makes what XLA wrote down until now the run's: whole, or not at all."""
    with contextlib.suppress(FileNotFoundError):
        (run_dir / _AUTOTUNE_PART).replace(run_dir / AUTOTUNE)


def _plain(gpu):
    return gpu.casefold().removeprefix("nvidia ")


def _quoted(path):
    return f"'{path}'" if " " in str(path) else str(path)


def use_compilation_cache():
    """Keeps compiled programs beside the downloads, so that a second start, or a resume, does not compile again. jax's
    own setting (JAX_COMPILATION_CACHE_DIR) comes first."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))


def git_commit():
    """{"commit": hash, "dirty": bool} of the checkout this code runs from, or None outside one."""
    here = Path(__file__).resolve().parent

    def git(*arguments):
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)

    try:
        commit = git("rev-parse", "HEAD")
        if commit.returncode or git("ls-files", "--error-unmatch", __file__).returncode:
            return None
        return {"commit": commit.stdout.strip(), "dirty": bool(git("status", "--porcelain").stdout.strip())}
    except (OSError, subprocess.TimeoutExpired):
        return None


def versions():
    """{package: version} of what computes here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
