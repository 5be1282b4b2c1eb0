"""What a checkpoint costs, where its time goes, and what other ways to write it would cost; interleaved, as ratios.

  python scripts/bench_checkpoint.py --config configs/bf16_baseline.py --folder=/tmp/bench --rounds=9

Parts: each part of a save alone. Layouts: Orbax writing the same arrays in other layouts. Saves: 8 whole saves begun
one after the other as fast as the loop is let, by how many may be under way together. Every variant runs once a round,
in another order each time; a ratio is the median over rounds of variant / present way in the same round. The folder's
disk is what is measured; it is left empty.
"""

from absl import flags

from altgrad_jax import cli

FLAGS = cli.new_flags(device=True)
flags.DEFINE(cli.FOLDER, "folder", "bench_checkpoint", "an empty folder on the disk to measure", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 9, "how often every variant is timed", 1, 1000, flag_values=FLAGS)


def run(config, *, device, folder, rounds):
    from altgrad_jax.bench.checkpoint import bench_checkpoint
    from altgrad_jax.run.device import use_device

    use_device(device)
    bench_checkpoint(config, folder=folder, rounds=rounds)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, config=True)
