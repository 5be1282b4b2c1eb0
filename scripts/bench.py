"""Time the training step: what metrics, record, formats and dispatches cost; sizes, other implementations, limits.

  python scripts/bench.py --config configs/bf16_baseline.py --quick
  python scripts/bench.py --config configs/bf16_baseline.py --json=bench.json
  python scripts/bench.py --config configs/bf16_baseline.py --suite=scaling
  python scripts/bench.py --config configs/bf16_baseline.py --suite=formats --format=E5M2
  python scripts/bench.py --config configs/bf16_baseline.py --suite=metrics --profile=trace

Everything in a table is timed once per round, in an order drawn anew; a ratio is the median over rounds of ratios
within a round. The bare step computes gradient, clipping and AdamW and measures nothing but its loss; "all metrics" is
the training as it is without formats. How to read the tables: docs/benchmark.md.
"""

import contextlib
import os
import re
import sys

from altgrad_jax import cli
from altgrad_jax.bench import peers
from altgrad_jax.errors import UserError

YES_NO = ("quick", "deterministic")  # may be given without a value


def whole(flag):
    def parse(text):
        if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= 100_000:
            raise UserError(f"--{flag}={text} cannot be used: give a whole number from 1 to 100000")
        return int(text)

    return parse


def yes_no(flag):
    def parse(text):
        if text not in ("yes", "no"):
            raise UserError(f"--{flag}={text} cannot be used: give yes or no")
        return text == "yes"

    return parse


def suites(text):
    known = ("metrics", "dispatch", "sizes", "formats", "attention", "rounding", "scaling")
    if not set(text.split(",")) <= {*known, "all"}:
        raise UserError(
            f"--suite={text} cannot be used: give {', '.join(known)}, some of them joined by commas, or "
            "all (all but scaling)"
        )
    return set(text.split(",")) | (set(known) - {"scaling"} if "all" in text.split(",") else set())


def peer(text):
    if text not in ("none", "torch"):
        raise UserError(f"--peers={text} cannot be used: give none or torch")
    if text == "torch" and not peers.torch_importable():
        raise UserError(
            f"--peers=torch needs torch and transformers, which are not installed: {peers.INSTALL}, or "
            "give --peers=none"
        )
    return text


def run(config, **flags):
    if flags["deterministic"]:
        from altgrad_jax.run.device import use_deterministic_operations

        use_deterministic_operations()
    # So that a peer's process finds room on the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from altgrad_jax.bench import report

    with contextlib.ExitStack() as resources:
        return report.run(config, flags, resources)


FLAGS = (
    cli.Flag(
        "suite",
        "all",
        "metrics, dispatch, sizes, formats, attention, rounding, scaling, some of them joined by "
        "commas, or all (all but scaling)",
        suites,
    ),
    cli.Flag(
        "quick",
        "no",
        "two minutes on two CPU cores: fewer rows, a smaller batch, and what was cut is said",
        yes_no("quick"),
    ),
    cli.Flag("format", "E4M3", "the format of the suite `formats`"),
    cli.Flag("rounds", None, "how often every row is timed; by default 5, on a GPU 9", whole("rounds")),
    cli.Flag(
        "steps_per_round",
        None,
        "training steps of a row in one round; by default 1, on a GPU 25",
        whole("steps_per_round"),
    ),
    cli.Flag("budget_s", None, "seconds that all may take; what does not fit is left out by name", whole("budget_s")),
    cli.Flag(
        "deterministic", "no", "GPU: only operations that repeat to the bit, in every row", yes_no("deterministic")
    ),
    cli.Flag(
        "peers",
        None,
        "torch or none: other implementations of the same step; by default torch where it is installed",
        peer,
    ),
    cli.Flag("nanogpt", None, "folder of a nanoGPT checkout, timed as a further peer", peers.require_nanogpt),
    cli.Flag(
        "profile",
        None,
        "folder for a trace of the row `all metrics`, whose operations are then listed",
        cli.folder("profile"),
    ),
    cli.Flag("json", None, "file for all figures, every single timing included", cli.output_file("json")),
)

if __name__ == "__main__":
    cli.main(
        run,
        flags=FLAGS,
        usage=__doc__,
        argv=[f"{text}=yes" if text.lstrip("-") in YES_NO else text for text in sys.argv[1:]],
    )
