"""What saving and restoring checkpoints costs, here and in another checkout; alternating, as ratios.

  python scripts/bench_checkpoint.py --config configs/bf16_baseline.py --folder=/tmp/bench --rounds=5 --against=../old

Each checkout runs once a round in a process of its own, first in every other round. A ratio is the median over rounds
of here / there. The folder's disk is what is measured; it is left empty.
"""

from absl import flags

from altgrad_jax import cli

FLAGS = cli.new_flags(device=True)
flags.DEFINE(cli.FOLDER, "folder", "bench_checkpoint", "an empty folder on the disk to measure", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "how often every checkout is timed", 1, 1000, flag_values=FLAGS)
flags.DEFINE(cli.FOLDER, "against", None, "another checkout of this project to compare with", flag_values=FLAGS)


def run(config, *, device, folder, rounds, against):
    from altgrad_jax.bench.checkpoint import bench_checkpoint
    from altgrad_jax.run.device import use_device

    use_device(device)
    bench_checkpoint(config, folder=folder, rounds=rounds, against=against)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, config=True)
