"""Time the training step with its metrics on and off and in a number format, interleaved in one run, as ratios.

  python scripts/bench.py --config configs/bf16_baseline.py
  python scripts/bench.py --config configs/bf16_baseline.py --suite=formats --format=E5M2
  python scripts/bench.py --config configs/bf16_baseline.py --rounds=20 --steps_per_round=25 --json=bench.json

Every variant is timed once per round; a ratio is the median over rounds of variant / bare step in the same round. The
bare step computes gradient, clipping and AdamW and measures nothing but its loss; "all metrics" is the training as it
is without formats. Suites: metrics (each group of them), formats (an 8-bit step, each group of its statistics, the
shadow), rounding (beside an elementwise multiply), all.
"""

import json
import platform

from altgrad_jax import cli
from altgrad_jax.errors import UserError
from altgrad_jax.formats import get_format


def whole(flag):
    def parse(text):
        if not text.isdecimal() or not 1 <= int(text) <= 100_000:
            raise UserError(f"--{flag}={text} cannot be used: give a whole number from 1 to 100000")
        return int(text)

    return parse


def suite(text):
    if text not in ("metrics", "formats", "rounding", "all"):
        raise UserError(f"--suite={text} cannot be used: give metrics, formats, rounding or all")
    return text


def run(config, *, suite, rounds, steps_per_round, **paths):
    import jax

    from altgrad_jax import benchmark

    if paths["json"]:
        try:
            file = open(paths["json"], "w")
        except OSError as error:
            raise UserError(f"--json={paths['json']} cannot be written ({error.strerror}): give another file") from None
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {config.batch_size} x {config.block_size} tokens a "
          f"step, {rounds} rounds of {steps_per_round} steps", flush=True)
    rows, rounding = [], []
    variants = {}
    if suite in ("metrics", "all"):
        variants |= benchmark.METRIC_VARIANTS
    if suite in ("formats", "all"):
        native = jax.default_backend() == "gpu"
        variants |= {benchmark.ALL_METRICS: {}} | benchmark.format_variants(get_format(paths["format"]).name, native)
    if variants:
        rows = benchmark.bench_steps(config, variants, rounds=rounds, steps_per_round=steps_per_round,
                                     say=lambda text: print(text, flush=True))
        print("\n" + benchmark.format_table(rows))
    if suite in ("rounding", "all"):
        for elements in (2**18, 2**22, 2**24):
            rounding += benchmark.bench_rounding(elements, rounds=40)
        print("\n" + benchmark.rounding_table(rounding))
    if paths["json"]:
        facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": platform.python_version(),
                 "config": dict(config.items()), "rows": rows, "rounding": rounding}
        json.dump(facts, file, indent=1)
        file.close()
        print(f"\nwritten to {paths['json']}")
    return 0


FLAGS = (
    cli.Flag("suite", "all", "metrics, formats, rounding or all", suite),
    cli.Flag("format", "E4M3", "the format of the suite `formats`"),
    cli.Flag("rounds", "7", "how often every variant is timed", whole("rounds")),
    cli.Flag("steps_per_round", "1", "training steps in one timed dispatch", whole("steps_per_round")),
    cli.Flag("json", None, "file for all figures, every single timing included"),
)

if __name__ == "__main__":
    cli.main(run, flags=FLAGS, usage=__doc__)
