"""Tests run on the CPU backend, without network, whatever the machine offers."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["WANDB_MODE"] = "disabled"  # a test that wants W&B asks for a mode itself
for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY"):
    os.environ.pop(name, None)
