"""The console commands of an installation: each runs the script of its name, as `python scripts/NAME.py` does.

The scripts are in the wheel, or beside the package in a checkout (`files.shipped`).
"""

import runpy
import sys
from functools import partial

from altgrad_jax import cli
from altgrad_jax.files import shipped


def _run(name: str) -> None:
    folder = shipped("scripts")
    sys.path.insert(0, str(folder))
    cli.command = f"altgrad-{name.replace('_', '-')}"
    runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")


train = partial(_run, "train")
sweep = partial(_run, "sweep")
report = partial(_run, "report")
evaluate = partial(_run, "evaluate")
sample = partial(_run, "sample")
prepare_data = partial(_run, "prepare_data")
export_hf = partial(_run, "export_hf")
bench = partial(_run, "bench")
inspect_program = partial(_run, "inspect_program")
what_if = partial(_run, "what_if")
