"""The baseline by a published recipe of low-precision training, and nothing else changed.

Command:   python scripts/train.py --config configs/recipe.py:nvfp4
           python scripts/train.py --config configs/recipe.py:nvfp4,bf16@0.8
           python scripts/train.py --config configs/recipe.py:mxfp8:backward
           python scripts/train.py --config configs/recipe.py:mxfp8_attention,bf16@bad3
Argument:  RECIPE[_attention][:PART][,RECIPE@WHEN ...]: a recipe (docs/recipes.md lists them), in the products of
           attention too, in one part of the layer's products only (fprop, dgrad, wgrad, backward), and from which
           update, or share of the run, or after how many bad updates in a row, another one holds.
Time:      longer than the baseline's: every operand is rounded for each product, and measured.
Expected:  a gap to the baseline that depends on the recipe.
"""

from altgrad_jax.config import Config, default_config
from altgrad_jax.numerics.recipes import get_recipe, parse_schedule

# Transformer Engine's length of the history of a delayed scale.
DELAYED_HISTORY = 1024


def get_config(argument: str) -> Config:
    config = default_config()
    config.recipe = tuple(argument.split(","))
    slots = [slot for phase in parse_schedule(config.recipe, 10**9) for slot in get_recipe(phase.recipe).slots]
    if any(slot.amax == "delayed" for slot in slots):
        config.amax_history = DELAYED_HISTORY
    derive(config)
    return config


def derive(config: Config) -> None:
    """Names the run by its recipe; called again when flags have changed it."""
    name = "-".join(config.recipe).replace(":", "-").replace("@", "-at-")
    config.run_name = name
    config.checkpoint_dir = f"checkpoints/{name}"
    config.tags = ("recipe", "eurlex", name)
