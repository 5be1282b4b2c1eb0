"""Ends a script with one sentence where this Python lacks what it needs. The scripts import it before all else."""

import importlib.util
import os
import sys

NEEDED = ("altgrad_jax", "absl", "ml_collections", "jax")


def problem(here):
    """The sentence, or None where all is there. here: the folder of the checkout."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    python = os.path.join(here, ".venv", "bin", "python")
    if os.path.exists(python):
        fix = f"give the command with {os.path.relpath(python)}, or activate its environment first"
    else:
        fix = "run `make train` once, which installs everything into .venv, or `pip install .` into this Python"
    return f"{missing[0]} is not installed for {sys.executable}: {fix}"


if sentence := problem(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))):
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
