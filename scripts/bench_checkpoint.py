"""What saving and restoring checkpoints costs, here and in another checkout; alternating, as ratios.

  python scripts/bench_checkpoint.py --config configs/bf16_baseline.py --folder=/tmp/bench --rounds=5 --against=../old

Each checkout runs once a round in a process of its own, first in every other round. A ratio is the median over rounds
of here / there. The folder's disk is what is measured; it is left empty.
"""

import re

from altgrad_jax import cli
from altgrad_jax.errors import UserError


def whole(text):
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= 1000:
        raise UserError(f"--rounds={text} cannot be used: give a whole number from 1 to 1000")
    return int(text)


def run(config, *, folder, rounds, against):
    from altgrad_jax.bench.checkpoint import bench_checkpoint

    bench_checkpoint(config, folder=folder, rounds=rounds, against=against)
    return 0


FLAGS = (
    cli.Flag("folder", "bench_checkpoint", "an empty folder on the disk to measure", cli.folder("folder")),
    cli.Flag("rounds", "5", "how often every checkout is timed", whole),
    cli.Flag("against", None, "another checkout of this project to compare with", cli.folder("against")),
)

if __name__ == "__main__":
    cli.main(run, flags=FLAGS, usage=__doc__)
