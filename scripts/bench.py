"""Time the training step with its metrics on and off, interleaved in one run, as ratios.

  python scripts/bench.py --config configs/bf16_baseline.py
  python scripts/bench.py --config configs/bf16_baseline.py --rounds=20 --steps_per_round=25 --json=bench.json

Every variant is timed once per round; a ratio is the median over rounds of variant / bare step in the same round. The
bare step computes gradient, clipping and AdamW and measures nothing but its loss.
"""

import json
import platform

from altgrad_jax import cli
from altgrad_jax.errors import UserError


def whole(flag):
    def parse(text):
        if not text.isdecimal() or not 1 <= int(text) <= 100_000:
            raise UserError(f"--{flag}={text} cannot be used: give a whole number from 1 to 100000")
        return int(text)

    return parse


def run(config, *, rounds, steps_per_round, **paths):
    import jax

    from altgrad_jax import benchmark

    if paths["json"]:
        try:
            file = open(paths["json"], "w")
        except OSError as error:
            raise UserError(f"--json={paths['json']} cannot be written ({error.strerror}): give another file") from None
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {config.batch_size} x {config.block_size} tokens a "
          f"step, {rounds} rounds of {steps_per_round} steps", flush=True)
    variants = {name: {"metrics": groups} for name, groups in benchmark.METRIC_VARIANTS.items()}
    rows = benchmark.bench_steps(config, variants, rounds=rounds, steps_per_round=steps_per_round,
                                 say=lambda text: print(text, flush=True))
    print("\n" + benchmark.format_table(rows))
    if paths["json"]:
        facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": platform.python_version(),
                 "config": {name: value for name, value in config.items()}, "rows": rows}
        json.dump(facts, file, indent=1)
        file.close()
        print(f"\nwritten to {paths['json']}")
    return 0


FLAGS = (
    cli.Flag("rounds", "7", "how often every variant is timed", whole("rounds")),
    cli.Flag("steps_per_round", "1", "training steps in one timed dispatch", whole("steps_per_round")),
    cli.Flag("json", None, "file for all figures, every single timing included"),
)

if __name__ == "__main__":
    cli.main(run, flags=FLAGS, usage=__doc__)
