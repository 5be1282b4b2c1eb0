"""Try rounding onto formats on all 2^32 float32 numbers, nearest and stochastic, and count what is wrong.

  python scripts/exhaustive_rounding.py                       # the eight 8-bit formats
  python scripts/exhaustive_rounding.py --formats=BF16,FP16   # others; --formats=all
  python scripts/exhaustive_rounding.py --overflow            # infinity or NaN on overflow, where a format has them

What must come out follows from intervals of float32 bit patterns: number k of a format is the answer from the midpoint
below it to the midpoint above it, a midpoint itself belonging to the even code. A stochastic result must be one of the
two neighbours, and a number on the grid must stay. Every finished chunk of 2^24 inputs is written to the progress file
at once, and a second start goes on from there: delete the file, or name another, after changing the arithmetic.
"""

import json
import os
import sys
import time

import numpy as np
from absl import flags

from altgrad_jax import cli
from altgrad_jax.errors import UserError
from altgrad_jax.files import writing

CHUNK, N_CHUNKS = 2**24, 2**8
INFINITY, NAN = 0x7F800000, 0x7FC00000


def first_inputs(fmt, rounding):
    """Bit patterns [max_code + 1] from which codes 1, ..., max_code + 1 are the answer (stochastic: the lower one)."""
    from altgrad_jax.numerics import formats

    values = formats.decode(fmt, np.arange(fmt.max_code + 1))
    values = np.append(values, fmt.max + 2.0 ** (max(fmt.maxexp - 1, fmt.minexp) - fmt.mantissa_bits))
    if rounding == "stochastic":
        with np.errstate(over="ignore"):
            return values[1:].astype(np.float32).view(np.uint32).astype(np.int64)
    midpoint = ((values[:-1] + values[1:]) / 2).astype(np.float32).view(np.uint32).astype(np.int64)
    code_above = np.arange(1, fmt.max_code + 2)
    return midpoint + code_above % 2


def check_chunk(fmt, rounding, saturate, rounded, start):
    """Mismatches among the inputs with bit patterns start ... start + CHUNK - 1, which `rounded` (uint32) answers."""
    from altgrad_jax.numerics import formats

    sign, low = start & 0x80000000, start & 0x7FFFFFFF
    numbers = formats.decode(fmt, np.arange(fmt.max_code + 1)).astype(np.float32).view(np.uint32)
    over = numbers[-1] if saturate else np.uint32(INFINITY if fmt.has_inf else NAN)
    begins = np.append(first_inputs(fmt, rounding), INFINITY + 1)
    counts = np.diff(np.concatenate([[0], np.clip(begins - low, 0, CHUNK), [CHUNK]]))
    answer = np.concatenate([numbers, [over, NAN]]).astype(np.uint32) ^ np.uint32(sign)
    if not fmt.has_negative_zero:
        answer[0] = 0
    lower = np.repeat(answer, counts)
    differs = rounded != lower
    if rounding == "nearest":
        return int(np.count_nonzero(differs))
    upper = np.repeat(np.append(answer[1:], answer[-1]), counts)
    on_grid = np.arange(start, start + CHUNK, dtype=np.uint32) == lower
    return int(np.count_nonzero(differs & ((rounded != upper) | on_grid)))


FLAGS = cli.new_flags(device=True)
flags.DEFINE_list("formats", None, "names, or all (default: the eight 8-bit splits)", flag_values=FLAGS)
flags.DEFINE_list("rounding", "nearest,stochastic", "one or both", flag_values=FLAGS)
flags.DEFINE_bool("overflow", False, "do not saturate", flag_values=FLAGS)
flags.DEFINE_string("progress", ".cache/exhaustive_rounding.jsonl", "file of finished chunks", flag_values=FLAGS)


def run(*, device, formats, rounding, overflow, progress):
    import jax

    from altgrad_jax.numerics.formats import DEFAULT_8BIT, FORMATS, get_format
    from altgrad_jax.numerics.rounding import format_params, round_to_format, stochastic_seed
    from altgrad_jax.run.device import use_device

    use_device(device)
    chosen = [get_format(name) for name in (FORMATS if formats == ["all"] else formats or DEFAULT_8BIT)]
    if overflow:
        chosen = [fmt for fmt in chosen if fmt.has_inf or fmt.has_nan]
    if not set(rounding) <= {"nearest", "stochastic"}:
        raise UserError(
            f"--rounding={','.join(rounding)} cannot be used: give nearest, stochastic, or both with a comma"
        )
    with writing(progress, "give another file with --progress"):
        os.makedirs(os.path.dirname(progress) or ".", exist_ok=True)
    done = {}
    if os.path.exists(progress):
        with open(progress) as file:
            whole = [line for line in file if line.endswith("]\n")]  # a killed run may leave half a line
        with open(progress, "w") as file:
            file.writelines(whole)
        done = {tuple(key): wrong for *key, wrong in map(json.loads, whole)}

    def rounded(start, params, seed):
        bits = start + jax.lax.iota(np.uint32, CHUNK)
        x = jax.lax.bitcast_convert_type(bits, np.float32)
        return jax.lax.bitcast_convert_type(round_to_format(x, params, seed=seed), np.uint32)

    compiled = jax.jit(rounded)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| format | rounding | overflow | inputs | mismatches |\n|---|---|---|---|---|", flush=True)
    wrong = 0
    for fmt in chosen:
        params = format_params(fmt, saturate=not overflow)
        for way in rounding:
            began = time.monotonic()
            for chunk in range(N_CHUNKS):
                key = (fmt.name, way, not overflow, chunk)
                if key in done:
                    continue
                seed = stochastic_seed(1, chunk, 0) if way == "stochastic" else None
                out = np.asarray(compiled(np.uint32(chunk * CHUNK), params, seed))
                done[key] = check_chunk(fmt, way, not overflow, out, chunk * CHUNK)
                with open(progress, "a") as file:
                    file.write(json.dumps([*key, done[key]]) + "\n")
            total = sum(done[fmt.name, way, not overflow, chunk] for chunk in range(N_CHUNKS))
            wrong += total
            shown = "as the format has it" if overflow else "saturates"
            print(f"| {fmt.name} | {way} | {shown} | {N_CHUNKS * CHUNK:,} | {total:,} |", flush=True)
            print(f"{fmt.name} {way}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__)
