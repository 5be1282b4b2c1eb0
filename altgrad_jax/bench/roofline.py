"""What the device allows: FLOPs, bytes and memory of a step beside the peaks, stated and measured. No jax.

`flops` of a step is the formula (flops.training_flops_per_token: matrix products only, attention over the full square):
it is the same for every program and every peer that does the same work. XLA's own analysis counts the body of a loop
once, and the blocks of the model and the tiles of the loss are loops.

`bytes_least` is what must move, if no cache holds the model: per parameter 40 bytes of float32 state, namely

    8   weights read by the forward and by the backward pass
    8   gradients written, and read by the update, which waits for the global norm of all of them
    24  weights, first and second moment read and written by the update

Activations, logits, metrics and tokens are counted as nothing, so it is a lower figure; where a model fits a cache
(fewer than some millions of parameters) it is none.

floor = max(flops / peak, bytes_least / bandwidth), with peak and bandwidth as *measured* in the same round; `gap` =
step / floor, `mfu` = flops / step / peak with the vendor's peak where flops.peak_flops knows it, else the measured one.
The measured peak of bfloat16 is the best of all products timed in the round, float32 ones too (their operands can hold
bfloat16 numbers); of float32, the best float32 one.
"""

import math
import os

from altgrad_jax.bench.timing import Unavailable, quartiles
from altgrad_jax.numerics.layers import HEAD, matrix_sizes

BYTES_LEAST_PER_PARAMETER = 40
GIB = 2**30


def parameters_of(
    *, n_layer, n_embd, block_size, vocab_size, model="gpt2", n_head=1, n_kv_head=0, tied_head=True, qk_norm=False
):
    """Scalars in a model, biases and norms included; the arguments are settings."""
    sizes = matrix_sizes(model=model, n_embd=n_embd, vocab_size=vocab_size, n_head=n_head, n_kv_head=n_kv_head)
    table = math.prod(sizes.pop(HEAD))
    matrices = sum(K * N for K, N in sizes.values())
    if model == "gpt2":
        biases = sum(N for _, N in sizes.values())
        return n_layer * (matrices + biases + 4 * n_embd) + table + (block_size + 2) * n_embd
    norms = 2 * n_embd + (2 * n_embd // n_head if qk_norm else 0)
    return n_layer * (matrices + norms) + n_embd + (table if tied_head else 2 * table)


def memory_bytes(compiled):
    """Arguments, results and temporary arrays that are alive together in one dispatch, shared buffers once; or None."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def free_memory(memory_stats):
    """Bytes still free: of the device by its memory_stats(), else (a CPU) of the machine; None if not known."""
    if memory_stats and "bytes_limit" in memory_stats:
        return memory_stats["bytes_limit"] - memory_stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def require_memory(needed, free):
    """Unavailable, if it is known that `needed` bytes are more than are free."""
    if needed is not None and free is not None and needed > free:
        raise Unavailable(f"it needs {needed / GIB:.1f} GiB and {free / GIB:.1f} GiB are free")


def peaks_of(probes):
    """({dtype: [FLOP/s a round]}, [bytes/s a round]) from the probes' entries (facts: dtype and flops, or bytes)."""
    rates = [(e.facts["dtype"], [e.facts["flops"] / s for s in e.seconds]) for e in probes if "flops" in e.facts]
    products = {}
    for dtype, usable in (("bfloat16", ("bfloat16", "float32")), ("float32", ("float32",))):
        chosen = [rate for name, rate in rates if name in usable]
        if chosen:
            products[dtype] = [max(of_round) for of_round in zip(*chosen, strict=True)]
    copies = [[e.facts["bytes"] / s for s in e.seconds] for e in probes if "bytes" in e.facts]
    return products, [max(of_round) for of_round in zip(*copies, strict=True)]


def roofline_facts(seconds, *, flops, bytes_least, peaks, bandwidths, stated=None):
    """{mfu, mfu_of, floor_ms, floor_by, gap, gap_low, gap_high} of one row.

    Args:
      seconds: timings of the row, seconds a step, one a round. peaks, bandwidths: measured in the same rounds.
      stated: the vendor's peak in FLOP/s, or None.
    """
    floors = [max(flops / peak, bytes_least / bandwidth) for peak, bandwidth in zip(peaks, bandwidths, strict=True)]
    by_flops = sum(flops / peak > bytes_least / band for peak, band in zip(peaks, bandwidths, strict=True))
    low, gap, high = quartiles([own / floor for own, floor in zip(seconds, floors, strict=True)])
    mfu = quartiles([flops / own / (stated or peak) for own, peak in zip(seconds, peaks, strict=True)])[1]
    return {
        "mfu": mfu,
        "mfu_of": "stated" if stated else "measured",
        "floor_ms": 1e3 * quartiles(floors)[1],
        "floor_by": "flops" if 2 * by_flops >= len(floors) else "bytes",
        "gap": gap,
        "gap_low": low,
        "gap_high": high,
    }


def cpu_count():
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
