"""Train a GPT on EU legislation, or continue a run.

  python scripts/train.py --config configs/bf16_baseline.py
  python scripts/train.py --config configs/smoke.py --config.batch_size=4 --workdir=runs/small-batch
  python scripts/train.py --config configs/bf16_baseline.py --dry_run    # memory, time and disk it would take
  srun python scripts/train.py --config configs/bf16_baseline.py --distributed=auto   (docs/scaling.md)

Exit codes: 0 finished, 1 a disk failed or the last checkpoint was not saved, 2 a setting or file cannot be used, 3
stopped by non-finite steps, 130, 143 or 129 interrupted and saved (the same command continues; docs/faults.md).
"""

from altgrad_jax import cli


def run(config, *, data_dir, workdir, resume, dry_run, **processes):
    # Only now: --help and every complaint about a setting come without waiting for jax.
    from altgrad_jax.run.processes import joined

    with joined(**processes):
        if dry_run:
            from altgrad_jax.run.dry_run import dry_run

            return dry_run(config, data_dir=data_dir, workdir=workdir, resume=resume)
        from altgrad_jax.run.signals import process_age
        from altgrad_jax.run.train import train

        return train(config, data_dir=data_dir, workdir=workdir, resume=resume, age=process_age()).exit_code


if __name__ == "__main__":
    cli.main(run, flags=(*cli.TRAIN_FLAGS, cli.DRY_RUN, *cli.PROCESS_FLAGS), usage=__doc__)
