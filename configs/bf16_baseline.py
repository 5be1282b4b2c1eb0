"""The bfloat16 reference: a GPT-2 of 30 million parameters, EU legislation, 2000 updates of 12 x 256 tokens.

Command:   python scripts/train.py --config configs/bf16_baseline.py
Time:      0.57 TFLOP an update by count. Measured on two CPU cores: 3.8 s an update, two hours in all. Not
           measured on a GPU.
Expected:  initial loss 10.7 to 11.0 (an even guess over 50,257 tokens is 10.82); reference expectation after
           2000 steps: training loss 5 to 7, perplexity 200 to 1000. Measured on 942 EU acts: 10.918 at the
           first step, validation loss 4.670 (perplexity 107) after 300 (docs/results/baseline-cpu).

Every field with its meaning and unit stands in altgrad_jax/config.py, whose defaults are this run.
"""

from altgrad_jax.config import Config, default_config, numbers_in


def get_config() -> Config:
    return default_config()


def derive(config: Config) -> None:
    """Names the run by the numbers it computes in, when flags have changed them."""
    numbers = numbers_in(config)
    config.run_name = f"{numbers}-baseline"
    config.checkpoint_dir = f"checkpoints/{config.run_name.replace('-', '_')}"
    config.tags = ("baseline", numbers, "eurlex")
