"""Time the training step: what metrics, record, formats and dispatches cost; sizes, other implementations, limits.

  python scripts/bench.py --config configs/bf16_baseline.py --quick
  python scripts/bench.py --config configs/bf16_baseline.py --json=bench.json
  python scripts/bench.py --config configs/bf16_baseline.py --suite=scaling
  python scripts/bench.py --config configs/bf16_baseline.py --suite=formats --format=E5M2
  python scripts/bench.py --config configs/bf16_baseline.py --suite=recipes --recipes=te_current,mxfp8,nvfp4
  python scripts/bench.py --config configs/bf16_baseline.py --suite=metrics --profile=trace

Everything in a table is timed once per round, in an order drawn anew; a ratio is the median over rounds of ratios
within a round. The bare step computes gradient, clipping and AdamW and measures nothing but its loss; "all metrics" is
the training as it is without formats. How to read the tables: docs/benchmark.md.
"""

import contextlib
import os

import installed  # noqa: F401
from absl import flags

from altgrad_jax import cli
from altgrad_jax.bench import peers
from altgrad_jax.errors import UserError

SUITES = ("metrics", "dispatch", "sizes", "formats", "recipes", "attention", "rounding", "scaling")
RULE = f"some of {', '.join(SUITES)} joined by commas, or all (all but scaling)"


def suites(text):
    names = set(text.split(","))
    if not names <= {*SUITES, "all"}:
        raise ValueError
    return names | (set(SUITES) - {"scaling"} if "all" in names else set())


FLAGS = cli.new_flags(device=True)
flags.DEFINE(cli.Parser(suites, RULE), "suite", "all", RULE, flag_values=FLAGS)
flags.DEFINE_bool(
    "quick",
    False,
    "two minutes on two CPU cores: fewer rows, a smaller batch; what was cut is reported",
    flag_values=FLAGS,
)
flags.DEFINE_string("format", "E4M3", "the format of the suite `formats`", flag_values=FLAGS)
flags.DEFINE_string("recipes", "mxfp8,nvfp4", "the recipes of the suite `recipes`, joined by commas", flag_values=FLAGS)
flags.DEFINE_string(
    "rows", None, "shell patterns of the rows to time, joined by commas; by default all", flag_values=FLAGS
)
flags.DEFINE_integer(
    "rounds", None, "how often every row is timed; by default 5, on a GPU 9", 1, 100_000, flag_values=FLAGS
)
flags.DEFINE_integer(
    "steps_per_round",
    None,
    "training steps of a row in one round; by default 1, on a GPU 25",
    1,
    100_000,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "budget_s", None, "seconds that all may take; what does not fit is left out by name", 1, 100_000, flag_values=FLAGS
)
flags.DEFINE_bool(
    "deterministic", False, "GPU: only operations that repeat to the bit, in every row", flag_values=FLAGS
)
flags.DEFINE_enum(
    "peers",
    None,
    ("torch", "none"),
    "other implementations of the same step; by default torch where it is installed",
    flag_values=FLAGS,
)
NANOGPT = cli.Parser(peers.require_nanogpt, "the folder of a nanoGPT checkout, which holds its model.py")
flags.DEFINE(NANOGPT, "nanogpt", None, "folder of a nanoGPT checkout, timed as a further peer", flag_values=FLAGS)
flags.DEFINE(
    cli.FOLDER,
    "profile",
    None,
    "folder for a trace of the row `all metrics`, for Perfetto or xprof",
    flag_values=FLAGS,
)
flags.DEFINE(cli.OUTPUT_FILE, "json", None, "file for all figures, every single timing included", flag_values=FLAGS)


def run(config, **values):
    if config.model != "gpt2" and (values["peers"] == "torch" or values["nanogpt"]):
        raise UserError(
            f"model={config.model!r} has no peers, which are implementations of GPT-2: give --peers=none and no "
            "--nanogpt, or set model='gpt2'"
        )
    if values["peers"] == "torch" and not peers.torch_importable():
        raise UserError(
            f"--peers=torch needs torch and transformers, which are not installed: {peers.INSTALL}, or "
            "give --peers=none"
        )
    from altgrad_jax.run.device import use_deterministic_operations, use_device

    use_device(values.pop("device"))
    if values["deterministic"]:
        use_deterministic_operations()
    # So that a peer's process finds room on the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from altgrad_jax.bench import report

    with contextlib.ExitStack() as resources:
        return report.run(config, values, resources)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, config=True)
