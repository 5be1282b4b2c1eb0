"""altgrad_jax: in which number format can a transformer be trained, and what does each one cost?

from altgrad_jax import default_config, train
result = train(default_config())
"""

from typing import TYPE_CHECKING

from altgrad_jax.config import default_config

if TYPE_CHECKING:
    from altgrad_jax.run.train import train

__all__ = ["default_config", "train"]


def __getattr__(name):
    # On demand, so that importing the package, as --help does, does not import jax.
    if name == "train":
        from altgrad_jax.run.train import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
