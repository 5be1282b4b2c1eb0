"""The bfloat16 reference run: a 30-million-parameter GPT-2 on EU legislation, 2000 updates of 12 x 256 tokens.

Command:   python scripts/train.py --config configs/bf16_baseline.py
Time:      0.57 TFLOP a step by count: seconds a step on two CPU cores (hours in all), minutes in all on one
           data-centre GPU, most of it start-up.
Expected:  initial loss 10.7 to 11.0 (an even guess over 50,257 tokens is 10.82); reference expectation after
           2000 steps: training loss 5 to 7, perplexity 200 to 1000.

Every field, its meaning and its unit stand in altgrad_jax/config.py, whose defaults are this run.
"""

import ml_collections

from altgrad_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    return default_config()
