"""What each of the eight formats would have flushed to zero in a run's operands, from its stored histograms.

    python scripts/what_if.py checkpoints/e5m2
    python scripts/what_if.py checkpoints/e5m2 --step 500 --layers

A share is that of all elements, in percent, at the scale that maps the operand's largest magnitude to the format's
range. A run in any format has the histograms; formats=BF16 trains exactly as the baseline does and has them too.
"""

from altgrad_jax.cli import ArgumentParser, run_script, whole_number
from altgrad_jax.numerics.formats import DEFAULT_8BIT
from altgrad_jax.numerics.whatif import of_diagnoses
from altgrad_jax.run.record import read_diagnostics


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--step", type=whole_number, help="which diagnosis (default: the last)")
    parser.add_argument("--layers", action="store_true", help="a row for every layer, not only all together")
    return parser.parse_args(argv)


def main(args):
    step, rows = of_diagnoses(read_diagnostics(args.run), args.step)
    print(f"underflow at step {step}, % of elements\n")
    print(f"{'layer':<20} operand " + " ".join(f"{name:>8}" for name in DEFAULT_8BIT))
    for row in rows:
        if args.layers or row["layer"] == "all":
            shares = " ".join(f"{100 * row[name][0]:>8.3g}" for name in DEFAULT_8BIT)
            print(f"{row['layer']:<20} {row['operand']:<7} {shares}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
