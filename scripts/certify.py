"""Where the error of a run's recipe comes from: bias and variance of every product of every layer (docs/bias.md).

    python scripts/certify.py checkpoints/nvfp4 --draws 256
    python scripts/certify.py checkpoints/nvfp4 --reference float32 --json
    python scripts/certify.py checkpoints/bf16_baseline --recipe nvfp4
    python scripts/certify.py checkpoints/bf16_baseline --recipe mxfp8 --recipe mxfp4 --recipe nvfp4     # side by side
    python scripts/certify.py checkpoints/nvfp4 --oscillation 50

Bias is what no averaging removes. BIASED stands where it is shown: beyond 1e-5 and five standard errors.
--oscillation makes so many more updates, of which it keeps nothing, and tells whether rounded weights tremble.
"""

import json

from absl import flags

from altgrad_jax import cli
from altgrad_jax.errors import UserError
from altgrad_jax.numerics.bias import REFERENCES

ARGUMENTS = ("checkpoint",)
FLAGS = cli.new_flags(device=True)
flags.DEFINE_integer("draws", 256, "draws of every product, 2 to 4096", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "checkpoint of the run folder (default: the newest)", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "recipe", [], "recipe to look at the weights by (default: the run's own); may be repeated", flag_values=FLAGS
)
flags.DEFINE_string("data_dir", None, "folder of token files; its val.bin is used", flag_values=FLAGS)
flags.DEFINE_enum(
    "reference", "straight_through", REFERENCES, "exact products of the forward pass's own operands, or of the "
    "unquantized ones", flag_values=FLAGS
)  # fmt: skip
flags.DEFINE_integer("oscillation", None, "updates to watch the rounded weights over, instead", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "all of it as JSON", flag_values=FLAGS)


def run(*, checkpoint, device, draws, step, recipe, data_dir, reference, oscillation, json):
    if not 2 <= draws <= 4096:
        raise UserError(f"--draws={draws} cannot be used: give a whole number from 2 to 4096")
    # Here, so that --help does not wait for jax.
    from altgrad_jax.inference.certify import (
        as_json,
        certify_checkpoint,
        certify_recipes,
        comparison_lines,
        table_lines,
    )
    from altgrad_jax.run.device import use_device

    use_device(device)
    if oscillation is not None:
        if oscillation < 1 or recipe:
            raise UserError(
                f"--oscillation={oscillation} watches weights of the run's own recipe: give 1 or more, without --recipe"
            )
        from altgrad_jax.inference.oscillation import oscillation_of

        layers = oscillation_of(checkpoint, oscillation, checkpoint=step, data_dir=data_dir)
        lines = [f"{layer:<22}" + "  ".join(f"{k} {v:.3g}" for k, v in of.items()) for layer, of in layers.items()]
        print(_json(layers) if json else "\n".join(lines))
        return
    if len(recipe) > 1:
        several = certify_recipes(checkpoint, recipe, draws, checkpoint=step, data_dir=data_dir)
        lines = comparison_lines(several, REFERENCES.index(reference))
        print(_json({name: as_json(found) for name, found in several.items()}) if json else "\n".join(lines))
        return
    found = certify_checkpoint(checkpoint, draws, checkpoint=step, data_dir=data_dir, items=recipe)
    if json:
        print(_json(as_json(found)))
        return
    print("\n".join(table_lines(found, REFERENCES.index(reference))))
    print()
    for name in ("grad_total_bias", "grad_total_variance", "grad_noise_ratio", "grad_signal_to_error"):
        print(f"{name:<22}{found.metrics.get(name, float('nan')):.4g}")


def _json(value):
    return json.dumps(value, indent=2)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, arguments=ARGUMENTS)
