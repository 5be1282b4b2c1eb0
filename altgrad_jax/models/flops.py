"""How much arithmetic a token costs, and how much the device can do: the two halves of MFU."""

import re
from typing import Any

from altgrad_jax.numerics.layers import HEAD, matrix_sizes

# Dense bfloat16 peak with float32 accumulation, FLOP/s, from the vendors' datasheets. The longest match wins.
PEAK_BF16_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def training_flops_per_token(*, n_layer: int, n_embd: int, block_size: int, **sizes: Any) -> int:
    """Floating-point operations of forward and backward for one token, counted as PaLM does (Chowdhery et al. 2022,
    appendix B): 6 per weight of every matrix product, the head included, and 12 n_layer n_embd block_size for the
    two attention products over the full, unmasked square.

    Args:
      sizes: the other arguments of layers.matrix_sizes.
    """
    matrices = {part: K * N for part, (K, N) in matrix_sizes(n_embd=n_embd, **sizes).items()}
    head = matrices.pop(HEAD)
    return 6 * (n_layer * sum(matrices.values()) + head) + 12 * n_layer * n_embd * block_size


def peak_flops(device_kind: str, n_devices: int, compute_dtype: str) -> float | None:
    """Peak FLOP/s of the devices together, or None where it is not known (CPUs, other devices, parts of
    devices, float32)."""
    if compute_dtype != "bfloat16":
        return None
    if "MIG" in device_kind or "Laptop" in device_kind:
        return None
    matches = [name for name in PEAK_BF16_FLOPS if re.match(re.escape(name) + r"(?!\w)", device_kind)]
    return n_devices * PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None
