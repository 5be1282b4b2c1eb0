"""The baseline with attention, MLP and head in formats of their own: BF16, E3M4 and BF16 unless said otherwise.

Command:   python scripts/train.py --config configs/mixed.py
           python scripts/train.py --config configs/mixed.py:E4M3,E5M2,none
Argument:  ATTENTION,MLP,HEAD: the format of attn_qkv and attn_out, of mlp_up and mlp_down, and of the output head;
           `none` leaves a part in bfloat16 without a format.
Time:      longer than the baseline's, for operands are rounded and measured; not measured for this model.
Expected:  not measured for this split; docs/results/formats-small.md has whole models in one format.
"""

from altgrad_jax.config import Config, default_config
from altgrad_jax.errors import UserError
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.rules import NONE


def get_config(argument: str = "BF16,E3M4,BF16") -> Config:
    parts = argument.split(",")
    if len(parts) != 3:
        raise UserError(
            f"configs/mixed.py:{argument} names {len(parts)} formats: give three, for attention, MLP and "
            "head, such as BF16,E3M4,none"
        )
    names = [NONE if part.lower() == NONE else get_format(part).name for part in parts]
    config = default_config()
    config.use_fp8 = True
    config.formats = tuple(
        f"{pattern}={name}" for pattern, name in zip(("block_*/attn_*", "block_*/mlp_*", "head"), names)
    )
    config.tags = ("mixed", "eurlex")
    derive(config)
    return config


def derive(config: Config) -> None:
    """Names the run by its formats; called again when flags have changed them."""
    config.run_name = "mixed-" + "-".join(rule.rpartition("=")[2].lower() for rule in config.formats)
    config.checkpoint_dir = f"checkpoints/{config.run_name}"
