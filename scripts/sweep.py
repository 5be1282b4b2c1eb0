"""Train many runs that differ in some settings, in as few compiled programs as there can be.

  python scripts/sweep.py --config configs/matrix.py --out runs/matrix
  python scripts/sweep.py --config configs/small.py --out runs/s --axes="learning_rate=1e-3,2e-3;seed=0,1,2"
  python scripts/sweep.py --config configs/matrix.py --out runs/matrix --dry_run=yes   # what it would do
  python scripts/sweep.py --config configs/matrix.py --out runs/matrix --shard=2/8     # one of eight machines

The members are those of get_sweep(config) in the config file, a list of {setting: value}, or the grid of --axes. Each
is a run folder below --out, as scripts/train.py writes it. The same command again goes on where it stopped.
"""

import re

from altgrad_jax import cli
from altgrad_jax.errors import UserError


def whole(flag, low):
    def parse(text):
        if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= 65536:
            raise UserError(f"--{flag}={text} cannot be used: give a whole number from {low} to 65536")
        return int(text)

    return parse


def gibibytes(text):
    try:
        if 0 <= float(text) < 1e6:
            return float(text)
    except ValueError:
        pass
    raise UserError(f"--memory={text} cannot be used: give a number of GiB, such as 8, or 0 for most of what there is")


def run(config, *, out, axes, shard, **options):
    from altgrad_jax.run import sweep
    from altgrad_jax.run.signals import process_age

    points = sweep.parse_axes(axes) if axes else cli.sweep_of(config)
    members = sweep.make_members(config, points, out)
    return sweep.sweep(members, out, shard=sweep.shard_of(shard), age=process_age(), **options)


FLAGS = (
    cli.Flag("out", "runs/sweep", "folder of the run folders", cli.folder("out")),
    cli.Flag("axes", None, "grid in place of get_sweep(): SETTING=VALUE,VALUE;SETTING=VALUE,..."),
    cli.Flag(
        "member_loop",
        "auto",
        "map = one after the other in the program, to the bit as alone; vmap = together; "
        "auto = map on a CPU, vmap on a GPU",
    ),
    cli.Flag("width", "0", "runs side by side; 0 = as many as fit", whole("width", 0)),
    cli.Flag("memory", "0", "GiB that a program may take on each device; 0 = most of what there is", gibibytes),
    cli.Flag("shard", "auto", "slice i of n of the members, as i/n; auto = from SLURM's or JAX's variables, else all"),
    cli.Flag(
        "cpu_devices",
        "1",
        "devices that a CPU is divided into, each of which trains members of its own",
        whole("cpu_devices", 1),
    ),
    cli.DRY_RUN,
    cli.Flag("data_dir", "data/{tokenizer}", "folder of the token files", cli.folder("data_dir")),
)

if __name__ == "__main__":
    cli.main(run, flags=FLAGS, usage=__doc__)
