"""Train a GPT on EU legislation, or continue a run.

  python scripts/train.py --config configs/bf16_baseline.py
  python scripts/train.py --config configs/smoke.py --config.batch_size=4 --workdir=runs/small-batch
  python scripts/train.py --config configs/bf16_baseline.py --dry_run    # memory, time and disk it would take
  srun python scripts/train.py --config configs/bf16_baseline.py --distributed=auto   (docs/scaling.md)

Exit codes: 0 finished, 1 a disk failed or the last checkpoint was not saved, 2 a setting or file cannot be used, 3
stopped by non-finite steps, 130, 143 or 129 interrupted and saved (the same command continues; docs/faults.md).
"""

import re

import installed  # noqa: F401
from absl import flags

from altgrad_jax import cli
from altgrad_jax.config import INT32_MAX


def resume_choice(text):
    if text in ("auto", "never"):
        return text
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > INT32_MAX:
        raise ValueError
    return int(text)


FLAGS = cli.new_flags(device=True, data_dir=True)
flags.DEFINE(
    cli.FOLDER, "workdir", None, "folder of this run, in place of the config's checkpoint_dir", flag_values=FLAGS
)
RESUME = "auto (go on from the newest checkpoint, if any), never (start anew), or the step of a checkpoint such as 1000"
flags.DEFINE(
    cli.Parser(resume_choice, RESUME),
    "resume",
    "auto",
    "auto = go on from the newest checkpoint that restores, if there is one; never = start anew, in an empty folder; a "
    "number = go on from that step's checkpoint",
    flag_values=FLAGS,
)
flags.DEFINE_bool("dry_run", False, "only say what would be trained, in which memory and time", flag_values=FLAGS)
# How several processes that train one run find each other.
flags.DEFINE_enum(
    "distributed",
    "off",
    ("off", "auto"),
    "auto = one of the processes of the SLURM, Open MPI or Kubernetes job around it",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, with the next two for processes that are started by hand",
    flag_values=FLAGS,
)
flags.DEFINE_integer("num_processes", None, "how many processes train the run together", 1, 10**6, flag_values=FLAGS)
flags.DEFINE_integer("process_id", None, "which of them this is, from 0", 0, 10**6, flag_values=FLAGS)


def run(config, *, device, data_dir, workdir, resume, dry_run, **processes):
    # Only now: --help and every complaint about a setting come without waiting for jax.
    from altgrad_jax.run.device import use_device
    from altgrad_jax.run.processes import joined

    use_device(device)
    with joined(**processes):
        if dry_run:
            from altgrad_jax.run.dry_run import dry_run

            return dry_run(config, data_dir=data_dir, workdir=workdir, resume=resume)
        from altgrad_jax.run.signals import process_age
        from altgrad_jax.run.train import train

        return train(config, data_dir=data_dir, workdir=workdir, resume=resume, age=process_age()).exit_code


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, config=True)
