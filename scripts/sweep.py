"""Train many runs that differ in some settings, in as few compiled programs as there can be.

  python scripts/sweep.py --config configs/matrix.py --out runs/matrix
  python scripts/sweep.py --config configs/small.py --out runs/s --axes="formats=none,E4M3,mxfp8;seed=1,2,3"
  python scripts/sweep.py --config configs/matrix.py --out runs/matrix --dry_run       # what it would do
  python scripts/sweep.py --config configs/matrix.py --out runs/matrix --shard=2/8     # one of eight machines
  python scripts/sweep.py --config configs/matrix.py --out runs/matrix --launch=slurm --jobs=8 --minutes=240

The members are those of get_sweep(config) in the config file, a list of {setting: value}, or the grid of --axes. Each
is a run folder below --out, as scripts/train.py writes it. The same command again goes on where it stopped. Before it
starts, it says what scripts/report.py would lack.
"""

import sys

import installed  # noqa: F401
from absl import flags

from altgrad_jax import cli
from altgrad_jax.errors import UserError

FLAGS = cli.new_flags(device=True, data_dir=True)
flags.DEFINE(cli.FOLDER, "out", "runs/sweep", "folder of the run folders", flag_values=FLAGS)
flags.DEFINE_string(
    "axes",
    None,
    "grid in place of get_sweep(): SETTING=VALUE,VALUE;SETTING=VALUE,...; formats takes none and recipes too",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "member_loop",
    "auto",
    ("auto", "map", "vmap"),
    "map = one after the other in the program, to the bit as alone; vmap = together; auto = map on a CPU, else vmap",
    flag_values=FLAGS,
)
flags.DEFINE_integer("width", 0, "runs side by side; 0 = as many as fit", 0, 65536, flag_values=FLAGS)
flags.DEFINE_float(
    "memory",
    0.0,
    "GiB that a program may take on each device; 0 = most of what there is",
    0.0,
    1e6,
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "shard",
    "auto",
    "slice i of n of the members, as i/n; auto = from SLURM's or JAX's variables, else all",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "cpu_devices",
    1,
    "devices that a CPU is divided into, each of which trains members of its own",
    1,
    65536,
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "launch",
    "none",
    ("none", "slurm", "local"),
    "slurm, local = start --jobs jobs, each with a slice of the members, in SLURM's queue or on this machine",
    flag_values=FLAGS,
)
flags.DEFINE_integer("jobs", 1, "with --launch: how many jobs", 1, 10**5, flag_values=FLAGS)
flags.DEFINE_integer(
    "minutes", 60, "with --launch: after which a job saves and is put into the queue again", 1, 10**6, flag_values=FLAGS
)
flags.DEFINE_string(
    "slurm", "", "with --launch=slurm: options of sbatch, such as partition=gpu,gpus-per-node=1", flag_values=FLAGS
)
flags.DEFINE_bool("dry_run", False, "only say what would be trained, in which memory and time", flag_values=FLAGS)


def run(config, *, device, out, axes, shard, launch, jobs, minutes, slurm, **options):
    from altgrad_jax.config import to_dict
    from altgrad_jax.report.needs import lacking
    from altgrad_jax.run import sweep
    from altgrad_jax.run.device import use_device
    from altgrad_jax.run.signals import process_age

    use_device(device)
    points = sweep.parse_axes(axes) if axes is not None else cli.sweep_of(config)
    members = sweep.make_members(config, points, out)
    for sentence in lacking([to_dict(member.config) for member in members]):
        print(f"note: the report: {sentence}", file=sys.stderr)
    if launch != "none":
        return _launch(launch, out, jobs, minutes, slurm, len(members), options["dry_run"])
    if jobs > 1 or slurm:
        raise UserError("--jobs and --slurm have no effect without --launch: add --launch=slurm or --launch=local")
    return sweep.sweep(members, out, shard=sweep.shard_of(shard), age=process_age(), **options)


def _launch(cluster, out, jobs, minutes, slurm, n_members, dry_run):
    from altgrad_jax.run import launch

    if dry_run or jobs > n_members:
        wrong = "--dry_run starts no job: leave --launch out" if dry_run else f"--jobs={jobs}: give {n_members} at most"
        raise UserError(f"{wrong} ({n_members} members)")
    if slurm and cluster != "slurm":
        raise UserError(f"--slurm={slurm} has no effect with --launch={cluster}: leave it out, or give --launch=slurm")
    options = launch.parse_options(slurm)
    return launch.launch(cluster, launch.this_command(), out, jobs=jobs, minutes=minutes, options=options)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, config=True)
