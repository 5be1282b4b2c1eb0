"""altgrad_jax: in which number format can a transformer be trained, and what does each one cost?

from altgrad_jax import default_config, train
result = train(default_config())

train            a run of the built-in model
instrument       any JAX loss function under a recipe or in number formats
measure          norms of gradients, parameters and updates for such a loop
Recorder         the record of a training loop of one's own, which report.py reads
stored_weights   weights at rest on a format's grid, as an optax transformation
ledger           what becomes of each update, likewise
format_aware     optimizers that know the weights' format, likewise
quantize         one's own arrays onto the grid of a format
Formats, Recipe  what `instrument` takes besides names
"""

from importlib import import_module
from typing import TYPE_CHECKING

from altgrad_jax.config import default_config

if TYPE_CHECKING:
    from altgrad_jax.instrumentation.api import instrument
    from altgrad_jax.instrumentation.measure import measure
    from altgrad_jax.instrumentation.numbers import Formats
    from altgrad_jax.instrumentation.transformations import format_aware, ledger, stored_weights
    from altgrad_jax.numerics.quantize import quantize
    from altgrad_jax.numerics.recipes import Recipe
    from altgrad_jax.run.recorder import Recorder
    from altgrad_jax.run.train import train

__all__ = [
    "Formats",
    "Recipe",
    "Recorder",
    "default_config",
    "format_aware",
    "instrument",
    "ledger",
    "measure",
    "quantize",
    "stored_weights",
    "train",
]

_HOME = {
    "Formats": "altgrad_jax.instrumentation.numbers",
    "Recipe": "altgrad_jax.numerics.recipes",
    "Recorder": "altgrad_jax.run.recorder",
    "format_aware": "altgrad_jax.instrumentation.transformations",
    "instrument": "altgrad_jax.instrumentation.api",
    "ledger": "altgrad_jax.instrumentation.transformations",
    "measure": "altgrad_jax.instrumentation.measure",
    "quantize": "altgrad_jax.numerics.quantize",
    "stored_weights": "altgrad_jax.instrumentation.transformations",
    "train": "altgrad_jax.run.train",
}


def __getattr__(name):
    # On demand, so that importing the package, as --help does, does not import jax.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
