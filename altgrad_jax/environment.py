"""What a run stands on: the device and what it can do, the compiler's settings, versions, the commit."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import jax

from altgrad_jax.data.sources import default_cache_dir
from altgrad_jax.errors import UserError

DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"
PACKAGES = ("altgrad-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections", "wandb",
            "tiktoken")


def use_deterministic_operations():
    """Asks XLA for operations that repeat to the bit, which must happen before jax first touches a GPU."""
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC_FLAG in flags:
        return
    try:
        started = jax._src.xla_bridge.backends_are_initialized()  # jax has no public way to ask
    except AttributeError:
        started = False
    if started and jax.default_backend() != "cpu":
        raise UserError("deterministic=True came too late: jax has already started on this device; set it before the "
                        f"first jax computation of the process, or start with XLA_FLAGS={DETERMINISTIC_FLAG}")
    os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC_FLAG}".strip()


def use_compilation_cache():
    """Keeps compiled programs beside the downloads, so that a second start, or a resume, does not compile again. jax's
    own setting (JAX_COMPILATION_CACHE_DIR) comes first."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))


def has_cudnn_attention(device, *, head_width, compute_dtype):
    """Whether cuDNN's attention runs on this device: NVIDIA, Ampere or newer, bfloat16, heads of at most 128 numbers in
    multiples of 8."""
    return (device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
            and float(getattr(device, "compute_capability", 0)) >= 8.0 and compute_dtype == "bfloat16"
            and head_width % 8 == 0 and head_width <= 128)


def fits_on_device(n_tokens, device):
    """Whether the token file may lie on the device: positions are 32-bit, and it may take a quarter of its memory."""
    limit = (device.memory_stats() or {}).get("bytes_limit", 2 ** 33)
    return n_tokens < 2 ** 31 and 2 * n_tokens <= limit // 4


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
