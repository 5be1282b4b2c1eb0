"""The built-in models, the only place that knows flax."""
