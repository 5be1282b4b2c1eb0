"""The baseline shrunk to prove the whole path on a laptop: a token is a byte, about 0.1 million parameters.

Command:   python scripts/train.py --config configs/smoke.py
Time:      22 s on two CPU cores, 14 of them compilation, which a second start finds in a cache.
Expected:  initial loss 5.4 to 5.7 (an even guess over 256 bytes is 5.55), falling at once; on 942 EU acts the
           validation loss after 200 steps is 2.665.
"""

from altgrad_jax.config import Config, default_config, numbers_in


def get_config() -> Config:
    config = default_config()
    config.tokenizer = "bytes"
    config.n_layer, config.n_head, config.n_embd, config.block_size = 2, 2, 64, 64
    config.batch_size, config.max_steps, config.warmup_steps = 8, 200, 20
    config.checkpoint_interval, config.eval_interval, config.eval_windows = 50, 50, 32
    config.dead_neuron_window = 20
    config.run_name = "smoke"
    derive(config)
    return config


def derive(config: Config) -> None:
    """Names folder and tags by the settings; called again when flags have changed them."""
    config.checkpoint_dir = f"checkpoints/{config.run_name}"
    config.tags = ("smoke", numbers_in(config), config.tokenizer)
