"""What each of the eight formats would have flushed to zero in a run's operands, from its stored histograms.

    python scripts/what_if.py checkpoints/e5m2
    python scripts/what_if.py checkpoints/e5m2 --step 500 --layers

A share is that of all elements, in percent, at the scale that maps the operand's largest magnitude to the format's
range. A run in any format has the histograms; formats=BF16 trains exactly as the baseline does and has them too.
"""

import installed  # noqa: F401
from absl import flags

from altgrad_jax import cli
from altgrad_jax.numerics.formats import DEFAULT_8BIT
from altgrad_jax.numerics.whatif import of_diagnoses
from altgrad_jax.run.record import read_diagnostics

ARGUMENTS = ("run",)
FLAGS = cli.new_flags()
flags.DEFINE_integer("step", None, "which diagnosis (default: the last)", flag_values=FLAGS)
flags.DEFINE_bool("layers", False, "a row for every layer, not only all together", flag_values=FLAGS)


def run(*, run, step, layers):
    step, rows = of_diagnoses(read_diagnostics(run), step)
    print(f"underflow at step {step}, % of elements\n")
    print(f"{'layer':<20} operand " + " ".join(f"{name:>8}" for name in DEFAULT_8BIT))
    for row in rows:
        if layers or row["layer"] == "all":
            shares = " ".join(f"{100 * row[name][0]:>8.3g}" for name in DEFAULT_8BIT)
            print(f"{row['layer']:<20} {row['operand']:<7} {shares}")


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, arguments=ARGUMENTS)
