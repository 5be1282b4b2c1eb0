"""Train a GPT on EU legislation, or continue a run.

  python scripts/train.py --config configs/bf16_baseline.py
  python scripts/train.py --config configs/smoke.py --config.batch_size=4 --workdir=runs/small-batch
  srun python scripts/train.py --config configs/bf16_baseline.py --distributed=auto   (docs/scaling.md)

Exit codes: 0 finished, 2 a setting or file cannot be used, 3 stopped by non-finite steps, 130 or 143 interrupted and
saved (the same command continues).
"""

from altgrad_jax import cli


def run(config, *, data_dir, workdir, resume, **processes):
    # Only now: --help and every complaint about a setting come without waiting for jax.
    from altgrad_jax.distributed import joined
    from altgrad_jax.training import train

    with joined(**processes):
        return train(config, data_dir=data_dir, workdir=workdir, resume=resume).exit_code


if __name__ == "__main__":
    cli.main(run, usage=__doc__, flags=(*cli.TRAIN_FLAGS, *cli.PROCESS_FLAGS))
