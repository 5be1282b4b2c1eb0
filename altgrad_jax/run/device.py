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
PACKAGES = "altgrad-jax jax jaxlib flax optax orbax-checkpoint numpy ml-collections wandb tiktoken".split()


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
    """Asks XLA for operations that repeat to the bit, which must happen before jax first touches a GPU.

    Under this flag XLA chooses its kernels without timing them, so every start has the same ones (xla.proto).
    """
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
