"""The baseline shrunk so that many runs fit a laptop: a token is a byte, 0.4 million parameters.

Command:   python scripts/train.py --config configs/small.py
           python scripts/sweep.py --config configs/small.py --out runs/rates --axes="learning_rate=1e-3,2e-3;seed=0,1"
Time:      on two CPU cores about half a minute a run; in a format a minute, half of it compilation the first time.
Expected:  initial loss 5.4 to 5.7; on 942 EU acts the validation loss after 500 steps is 2.135.
"""

from altgrad_jax.config import Config, default_config, numbers_in


def get_config() -> Config:
    config = default_config()
    config.tokenizer = "bytes"
    config.n_layer, config.n_head, config.n_embd, config.block_size = 2, 4, 128, 128
    config.batch_size, config.max_steps, config.warmup_steps, config.learning_rate = 8, 500, 50, 2e-3
    config.checkpoint_interval, config.eval_interval, config.eval_windows = 250, 100, 64
    config.dead_neuron_window = 50
    config.run_name = "small"
    derive(config)
    return config


def derive(config: Config) -> None:
    """Names folder and tags by the settings; called again when flags have changed them."""
    config.checkpoint_dir = f"checkpoints/{config.run_name}"
    config.tags = ("small", numbers_in(config), config.tokenizer)
