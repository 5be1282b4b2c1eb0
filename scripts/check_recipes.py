"""Quantize millions of blocks by every element format, scale format, rule and block shape, and count what is wrong.

  python scripts/check_recipes.py                     # 10^7 blocks, some minutes on two cores
  python scripts/check_recipes.py --rounds=1          # a third of them

The compiled slots are held to numerics/recipe_reference.py: float64, and NumPy's float32 where a definition rounds in
it. (Tests hold both to ml_dtypes and gfloat.) A block counts as wrong if any of its numbers differs in any bit.
Prints a Markdown table.
"""

import platform
from functools import partial

import numpy as np
from absl import flags

from altgrad_jax import cli

ELEMENTS = ("E2M1", "E1M2", "INT4", "E2M3", "E3M2", "INT8", "E4M3", "E5M2", "E3M4", "E2M5")
ROWS, COLUMNS = 128, 4096


def specs():
    """Every slot that is checked: MX rules and blocks; two levels with both scale formats and 4/6; rows and tensors."""
    from altgrad_jax.numerics.recipes import SlotSpec

    for element in ELEMENTS:
        for rule in ("floor", "rceil", "ceil", "even"):
            yield from (SlotSpec(element, "E8M0", block, rule) for block in ("1x32", "1x16", "32x32", "128x128"))
        yield SlotSpec(element, "E8M0", "1x32", "floor", "stochastic", shrink=4 / 3)
        yield from (SlotSpec(element, "float32", block, "float32") for block in ("rowwise", "tensor"))
    for element in ("E2M1", "E1M2", "INT4", "E2M3", "E3M2", "E4M3"):
        for scale in ("UE4M3", "UE5M3"):
            for block in ("1x16", "16x16"):
                yield SlotSpec(element, scale, block, "two_level")
                yield SlotSpec(element, scale, block, "two_level", "stochastic", headroom=16 / 17)
                yield SlotSpec(element, scale, block, "two_level", correction="four_six", bound=256.0)


def inputs(rng):
    """float32 [ROWS, COLUMNS]: Gaussian, heavy-tailed, or on float32 numbers around the grid; sizes spread by block."""
    kind = rng.integers(3)
    v = rng.standard_normal((ROWS, COLUMNS)) if kind else rng.standard_t(2, (ROWS, COLUMNS))
    if kind == 2:  # ties and their neighbours
        v = np.round(v * 8) / 8 * (1 + rng.integers(-1, 2, v.shape) * 2.0**-23)
    spread = rng.choice([0, 4, 15])
    v = v * 2.0 ** np.round(rng.uniform(-spread, spread, (ROWS, COLUMNS // 16))).repeat(16, 1)
    v[rng.integers(ROWS), : COLUMNS // 2] = 0
    return v.astype(np.float32)


def corners(per_block, sides, axis):
    """One number of each block."""
    along, across = (side or per_block.shape[a] for side, a in zip(sides, (axis, 1 - axis)))
    return per_block[::along, ::across] if axis == 0 else per_block[::across, ::along]


def count(v, got, want, spec, axis):
    """(blocks, wrong ones, ties): a block of 4/6 whose two candidates are equally good but for float32's rounding of
    the errors is a tie, and may be either."""
    from altgrad_jax.numerics.recipe_reference import over_blocks

    differs = corners(over_blocks(got != want, spec.sides, axis, np.logical_or), spec.sides, axis)
    if spec.correction != "four_six" or not differs.any():
        return differs.size, int(differs.sum()), 0
    errors = (np.square(q.astype(np.float64) - v) for q in (got, want))
    ours, best = (corners(over_blocks(error, spec.sides, axis, np.add), spec.sides, axis) for error in errors)
    ties = differs & (np.abs(ours - best) <= 1e-6 * best)
    return differs.size, int(differs.sum() - ties.sum()), int(ties.sum())


def check(rounds, seed):
    """{(rule, scale, block): ([blocks, wrong, ties], elements)} over all specs."""
    import jax

    from altgrad_jax.numerics import recipe_reference as reference
    from altgrad_jax.numerics.slot_quantization import Features, dequantized, quantize_slot
    from altgrad_jax.numerics.slots import slot_of

    features = Features(rotation=0, eden=False)

    @partial(jax.jit, static_argnames="axis")
    def values(v, slot, axis):
        return dequantized(quantize_slot(v, slot, axis, features)[0], axis)

    rng, found = np.random.default_rng(seed), {}
    for i in range(rounds):
        axis = 1 if i % 3 else 0
        for spec in specs():
            v = inputs(rng) if axis else inputs(rng).T.copy()
            key = rng.integers(0, 2**32, 2, dtype=np.uint32)
            got = np.asarray(values(v, slot_of(spec, key), axis))
            want = reference.quantize(v, spec, axis, key).astype(np.float32)
            name = spec.rule + (" stochastic" if spec.rounding == "stochastic" else "")
            name += " 4/6" if spec.correction == "four_six" else ""
            counts, elements = found.setdefault((name, spec.scale, spec.block), (np.zeros(3, int), set()))
            counts += count(v, got, want, spec, axis)
            elements.add(spec.element)
    return found


def run(*, rounds, seed):
    import jax

    found = check(rounds, seed)
    print("| rule | scale | block | elements | blocks | wrong | ties |\n|---|---|---|---|---|---|---|")
    for (rule, scale, block), ((blocks, wrong, ties), elements) in found.items():
        listed = " ".join(name for name in ELEMENTS if name in elements)
        print(f"| {rule} | {scale} | {block} | {listed} | {blocks:,} | {wrong} | {ties} |")
    blocks, wrong, ties = np.sum([counts for counts, _ in found.values()], axis=0)
    print(f"\n{blocks:,} blocks, {wrong} wrong, {ties} ties of 4/6 decided by float32's rounding of the errors.")
    print(f"One program for each axis. {platform.machine()}, jax {jax.__version__}.")


if __name__ == "__main__":
    FLAGS = cli.new_flags()
    flags.DEFINE_integer("rounds", 3, "how many matrices for each spec", lower_bound=1, flag_values=FLAGS)
    flags.DEFINE_integer("seed", 0, "of the inputs", flag_values=FLAGS)
    cli.main(run, FLAGS, usage=__doc__)
