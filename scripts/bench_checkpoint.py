"""What a checkpoint costs, where its time goes, and what other ways to write it would cost; interleaved, as ratios.

  python scripts/bench_checkpoint.py --config configs/bf16_baseline.py --folder=/tmp/bench --rounds=9

Parts: each part of a save alone. Layouts: Orbax writing the same arrays in other layouts. Saves: 8 whole saves begun
one after the other as fast as the loop is let, by how many may be under way together. Every variant runs once a round,
in another order each time; a ratio is the median over rounds of variant / present way in the same round. The folder's
disk is what is measured; it is left empty.
"""

import re

from altgrad_jax import cli
from altgrad_jax.errors import UserError


def whole(text):
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= 1000:
        raise UserError(f"--rounds={text} cannot be used: give a whole number from 1 to 1000")
    return int(text)


def run(config, *, folder, rounds):
    from altgrad_jax.bench.checkpoint import bench_checkpoint

    bench_checkpoint(config, folder=folder, rounds=rounds)
    return 0


FLAGS = (
    cli.Flag("folder", "bench_checkpoint", "an empty folder on the disk to measure", cli.folder("folder")),
    cli.Flag("rounds", "9", "how often every variant is timed", whole),
)

if __name__ == "__main__":
    cli.main(run, flags=FLAGS, usage=__doc__)
