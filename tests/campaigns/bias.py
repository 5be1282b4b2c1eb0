"""What certificates cost: step time with them at the default interval, interleaved with runs without.

    python tests/campaigns/bias.py DATA OUT

What they predict is campaigns/court.py's; the map is scripts/precision_map.py --train.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from altgrad_jax import config as settings  # noqa: E402
from altgrad_jax.run.verdict import read_verdict  # noqa: E402


def small(**changes):
    """configs/small.py without logging."""
    config = settings.default_config()
    own = dict(tokenizer="bytes", n_layer=2, n_head=4, n_embd=128, block_size=128, batch_size=8, max_steps=300,
               warmup_steps=30, learning_rate=2e-3, checkpoint_interval=300, eval_interval=100, eval_windows=64,
               dead_neuron_window=50, loggers=("tensorboard",), console="quiet", metrics="format")  # fmt: skip
    config.update(own | changes)
    return config


def cost(data, out, rounds=3):
    """Prints what one certificate costs over the 100 steps of the default interval, with and without alternating."""
    from altgrad_jax.run.train import train

    seconds, of_steps = {0: [], 16: []}, []
    for i in range(rounds):
        for draws in (0, 16) if i % 2 == 0 else (16, 0):
            config = small(recipe=("nvfp4",), certify_draws=draws, max_steps=200, run_name=f"cost-{draws}-{i}",
                           metrics="none", checkpoint_interval=10**6, eval_interval=10**6)  # fmt: skip
            started = time.perf_counter()
            train(config, data_dir=data, workdir=Path(out) / config.run_name)
            verdict = read_verdict(Path(out) / config.run_name)
            seconds[draws].append(verdict["goodput"]["step_s"] + verdict["goodput"]["evaluation_s"])
            of_steps += [verdict["goodput"]["step_s"]] * (draws == 0)
            print(draws, i, round(seconds[draws][-1], 2), round(time.perf_counter() - started, 1), flush=True)
    # Three certificates, at 0, 100 and 200 updates.
    shares = [(b - a) / 3 / (s / 2) for a, b, s in zip(seconds[0], seconds[16], of_steps, strict=True)]
    print(
        f"a certificate over 100 steps: {', '.join(f'{share:.1%}' for share in shares)}, median "
        f"{statistics.median(shares):.1%}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out")
    args = parser.parse_args()
    cost(args.data, args.out)


if __name__ == "__main__":
    main()
