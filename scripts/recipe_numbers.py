"""Reproduce numbers that papers print, or that follow from their definitions, with the compiled slots.

  python scripts/recipe_numbers.py     # some minutes on two cores

Prints a Markdown table. Relative errors are |q - x|^2 / |x|^2.
"""

import functools
import platform
from typing import Any

import numpy as np
from absl import flags

from altgrad_jax import cli
from altgrad_jax.numerics.recipes import SlotSpec


@functools.cache
def program():
    """Values of a matrix by a slot, rotated along axis 1 or not."""
    import jax

    from altgrad_jax.numerics.slot_quantization import Features, dequantized, quantize_slot

    features = Features(requantize=False, shared=False, rotation=16)
    return jax.jit(lambda v, slot: dequantized(quantize_slot(v, slot, 1, features)[0], 1))


def quantized(v, spec, seed=(1, 2), signs=None):
    from altgrad_jax.numerics.slots import slot_of

    slot = slot_of(spec, seed)
    return np.asarray(program()(v, slot if signs is None else slot._replace(signs=signs)), np.float64)


def relative(q, x):
    return float(np.sum((q - x) ** 2) / np.sum(np.square(x, dtype=np.float64)))


def nv(block="1x16", element="E2M1", **more):
    return SlotSpec(element, "UE4M3", block, "two_level", **more)


SR: dict[str, Any] = {"rounding": "stochastic"}
ROOM: dict[str, Any] = SR | {"headroom": 16 / 17}
FOUR_SIX: dict[str, Any] = {"correction": "four_six", "bound": 256.0}
NVFP4 = (("nearest, 1x16", nv(), 9.04), ("4/6, 1x16", nv(**FOUR_SIX), 7.57), ("nearest, 16x16", nv("16x16"), 12.41),
         ("4/6, 16x16", nv("16x16", **FOUR_SIX), 12.39), ("stochastic, headroom 16/17", nv(**ROOM), 23.54))  # fmt: skip
MX = {  # element: floor, rceil, even, ceil
    "E4M3": (0.863, 0.705, 0.762, 0.704), "E5M2": (2.91, 2.79, None, None), "E2M3": (0.806, 0.803, 0.796, 1.328),
    "E3M2": (2.91, 2.79, None, None), "E2M1": (13.2, 13.3, 12.51, 20.80)}  # fmt: skip


def errors_of_blocks(rng):
    """(what, measured, expected, digits of it) of Gaussian elements, errors times 1000."""
    x = rng.standard_normal((1024, 4096)).astype(np.float32)
    for what, spec, expected in NVFP4:
        yield f"NVFP4 {what}: error x 1000", 1e3 * relative(quantized(x, spec), x), expected, 2
    for element, values in MX.items():
        for rule, expected in zip(("floor", "rceil", "even", "ceil"), values, strict=True):
            if expected is not None:
                error = 1e3 * relative(quantized(x, SlotSpec(element, "E8M0", "1x32", rule)), x)
                yield f"MX {element} {rule}: error x 1000", error, expected, len(str(expected).partition(".")[2])
    rows, columns = quantized(x, nv()), quantized(x.T.copy(), nv()).T
    yield "NVFP4: copies along rows and columns, share that differs", float(np.mean(rows != columns)), 0.77, 2
    yield "NVFP4: distance of the copies over the error", relative(rows, columns) / relative(rows, x), 2.0, 0


def heavy_tails(rng):
    draws = [rng.standard_t(3, (1024, 4096)).astype(np.float32) for _ in range(8)]
    for element, transform, expected in (("E2M1", "none", 8.18), ("E1M2", "none", 13.01), ("E2M1", "rht16_fixed", 9.69),
                                         ("E1M2", "rht16_fixed", 6.00)):  # fmt: skip
        spec = nv(element=element, transform=transform)
        found = [relative(quantized(x, spec), x if transform == "none" else rotated(x)) for x in draws]
        yield f"Student t(3), {element}, {transform}: error x 1000", 1e3 * float(np.mean(found)), expected, 2


def rotated(x):
    """x as slots with fixed signs see it."""
    from altgrad_jax.numerics import hadamard

    return np.asarray(hadamard.rotated(x, hadamard.matrix(np.int32(16), hadamard.fixed_signs(16), 16), 1))


def averages(rng, first, second, counts, redrawn=False):
    """{n: relative error of the mean of n products} of Gaussian operands [96, 256], quantized anew each time."""
    from altgrad_jax.numerics.hadamard import drawn_signs

    a, b = (rng.standard_normal((96, 256)).astype(np.float32) for _ in range(2))
    exact, total, found = a.astype(np.float64) @ b.T.astype(np.float64), 0.0, {}
    for n in range(1, max(counts) + 1):
        keys = rng.integers(0, 2**32, (3, 2), dtype=np.uint32)
        signs = np.asarray(drawn_signs(keys[2], np.int32(16))) if redrawn else None
        total = total + quantized(a, first, keys[0], signs) @ quantized(b, second, keys[1], signs).T
        if n in counts:
            found[n] = relative(total / n, exact)
    return found


def means(rng, repeats):
    """Errors of means of stochastic products: error bits are -log4 of the relative error."""
    found = [averages(rng, nv(**ROOM), nv(**ROOM), (1, 4, 16)) for _ in range(4 * repeats)]
    for n, expected in ((1, 2.197), (4, 3.196), (16, 4.196)):
        yield f"mean of {n} products: error bits", -np.log2(np.mean([f[n] for f in found])) / 2, expected, 3
    turned: dict[str, Any] = {"transform": "rht16_fixed"}
    fixed = [averages(rng, nv(**turned), nv(**turned, **SR), (256,))[256] for _ in range(repeats)]
    yield "wgrad, 256 draws, fixed signs: error", float(np.mean(fixed)), 8.96e-3, 5
    redrawn = [averages(rng, nv(**turned), nv(**turned, **ROOM), (256,), True)[256] for _ in range(repeats)]
    yield "wgrad, 256 draws, redrawn signs: error", float(np.mean(redrawn)), 1.6e-4, 5
    for what, more, expected in (("amax to 6, which clips", SR, 2.6e-4), ("headroom 16/17", ROOM, 4.7e-5)):
        error = [averages(rng, nv(**more), nv(**more), (1024,))[1024] for _ in range(max(repeats // 2, 1))]
        yield f"mean of 1024 products, {what}: error", float(np.mean(error)), expected, 5 if expected > 1e-4 else 6


def run(*, repeats, seed):
    import jax

    rng = np.random.default_rng(seed)
    print("| number | measured | expected | difference |\n|---|---|---|---|")
    outside = 0
    for part in (errors_of_blocks(rng), heavy_tails(rng), means(rng, repeats)):
        for what, measured, expected, digits in part:
            # A number printed with few digits is known to half of its last one.
            allowed = max(0.01 * expected, 0.5 * 10.0**-digits)
            outside += abs(measured - expected) > allowed
            print(f"| {what} | {measured:.4g} | {expected:g} | {measured / expected - 1:+.2%} |", flush=True)
    print(f"\n{outside} outside 1% and half of the last printed digit. {platform.machine()}, jax {jax.__version__}.")


if __name__ == "__main__":
    FLAGS = cli.new_flags()
    flags.DEFINE_integer(
        "repeats", 6, "operands that errors of means are averaged over", lower_bound=1, flag_values=FLAGS
    )
    flags.DEFINE_integer("seed", 0, "of the inputs", flag_values=FLAGS)
    cli.main(run, FLAGS, usage=__doc__)
