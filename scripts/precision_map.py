"""Which products of which layers to keep in bfloat16 under a recipe (docs/bias.md).

    python scripts/precision_map.py checkpoints/nvfp4                            # scores of one checkpoint, no training
    python scripts/precision_map.py checkpoints/bf16 --recipe mxfp4 --share 0.25
    python scripts/precision_map.py runs/small --recipe mxfp4 --train runs/map --seeds 5    # confirmed by trainings

With --train, the recipe, bfloat16, maps of several costs, the rules of thumb, random maps of equal cost, and the best
cells left out and left in by themselves are trained from the run's settings, once for each pair of a seed and a data
seed, as one sweep: the same command goes on with it. The result stands in map.json there, and in map.png as a curve.
"""

from pathlib import Path

from absl import flags

from altgrad_jax import cli
from altgrad_jax.errors import UserError

ARGUMENTS = ("checkpoint",)
FLAGS = cli.new_flags(device=True)
flags.DEFINE_string("recipe", None, "recipe (default: the run's first)", flag_values=FLAGS)
flags.DEFINE_float("share", 0.15, "share of the multiplications of the map that is shown", flag_values=FLAGS)
flags.DEFINE_integer("draws", 16, "draws of the certificate", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "checkpoint of the run folder (default: the newest)", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "folder of token files (default: the run's)", flag_values=FLAGS)
flags.DEFINE(cli.FOLDER, "train", None, "confirm by trainings, in this folder", flag_values=FLAGS)
flags.DEFINE_integer("seeds", 5, "with --train: seeds of each training", flag_values=FLAGS)
flags.DEFINE_integer("first_seed", 0, "with --train: the first of them", flag_values=FLAGS)
flags.DEFINE_integer("cells", 2, "with --train: the best cells, each left out and in by itself", flag_values=FLAGS)
flags.DEFINE_integer("max_steps", None, "with --train: updates (default: the run's)", flag_values=FLAGS)


def run(*, checkpoint, device, recipe, share, draws, step, data_dir, train, seeds, first_seed, cells, max_steps):
    if not 0 < share <= 1:
        raise UserError(f"--share={share} cannot be used: give a number above 0, up to 1")
    for name, value, least in (
        ("draws", draws, 2),
        ("seeds", seeds, 1),
        ("first_seed", first_seed, 0),
        ("cells", cells, 0),
    ):
        if value < least:
            raise UserError(f"--{name}={value} cannot be used: give {least} or more")
    # Here, so that --help does not wait for jax.
    from altgrad_jax.inference.map_trainings import MAP, confirm, show
    from altgrad_jax.report import draw_map
    from altgrad_jax.run.device import use_device

    use_device(device)
    choices = dict(checkpoint=step, data_dir=data_dir)
    if train is None:
        show(checkpoint, recipe, share, draws, **choices)
        return None
    pairs = range(first_seed, first_seed + seeds)
    code = confirm(checkpoint, recipe, share, draws, train, pairs, cells, max_steps, **choices)
    if not code:
        draw_map(Path(train) / MAP)
    return code


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, arguments=ARGUMENTS)
