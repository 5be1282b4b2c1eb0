"""What rounding onto a format costs, as a ratio to an elementwise multiply of the same array.

  python scripts/bench_rounding.py
  python scripts/bench_rounding.py --elements=16777216 --rounds=50

The variants run one after the other in every round, each round in another order; a ratio is the median over rounds of
variant / multiply in the same round. E4M3, saturating; the format is traced data, so all formats cost alike.
"""

import argparse
import random
import statistics
import time

from altgrad_jax.cli import run_script
from altgrad_jax.errors import UserError


def bench_rounding(n_elements, *, rounds, repeats=3):
    """Rows {name, ms, ratio, ratio_low, ratio_high}: medians over `rounds`, and the quartiles of the ratio."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from altgrad_jax.formats import get_format
    from altgrad_jax.quantize import format_params, round_to_format, stochastic_seed

    params = format_params(get_format("E4M3"))
    seed = stochastic_seed(0, 1, 2)
    x = jax.device_put(np.random.default_rng(0).normal(size=(n_elements // 256, 256)).astype(np.float32))
    variants = {
        "multiply": lambda x, params, seed: x * params.max_finite,
        "multiply again (noise of this table)": lambda x, params, seed: x * params.max_finite,
        "nearest": lambda x, params, seed: round_to_format(x, params),
        "stochastic": lambda x, params, seed: round_to_format(x, params, seed=seed),
        "clip, cast to float8_e4m3fn and back": lambda x, params, seed: jnp.clip(x, -448, 448)
        .astype(jnp.float8_e4m3fn)
        .astype(jnp.float32),
        "threefry bits alone": lambda x, params, seed: jax.random.bits(jax.random.wrap_key_data(seed), x.shape),
    }
    compiled = {name: jax.jit(function).lower(x, params, seed).compile() for name, function in variants.items()}
    seconds = {name: [] for name in compiled}
    shuffled, order = list(compiled), random.Random(0)
    for number in range(rounds + 1):  # round 0 warms up
        order.shuffle(shuffled)
        for name in shuffled:
            started = time.perf_counter()
            for _ in range(repeats):
                compiled[name](x, params, seed).block_until_ready()
            if number:
                seconds[name].append((time.perf_counter() - started) / repeats)
    rows = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["multiply"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {"name": name, "ms": 1e3 * statistics.median(own), "ratio": middle, "ratio_low": low, "ratio_high": high}
        )
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--elements", type=int, default=2**22, help="of the array (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    return parser.parse_args(argv)


def main(args):
    import jax

    if args.elements < 256 or args.rounds < 2:
        raise UserError(f"--elements={args.elements} --rounds={args.rounds} cannot be used: give 256 and 2, or more")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.elements:,} float32, {args.rounds} rounds\n")
    print("| variant | ms | ratio to a multiply (quartiles) |\n|---|---|---|")
    for row in bench_rounding(args.elements, rounds=args.rounds):
        quartiles = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
        print(f"| {row['name']} | {row['ms']:.3f} | {row['ratio']:.2f} ({quartiles}) |")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
