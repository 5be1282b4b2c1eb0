"""The built-in models, the only place that knows flax. `model` finds them by name; a model is a block and its ends."""
