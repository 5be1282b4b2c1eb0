"""Every example runs as its page says, and ends in its table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad_jax import report

ROOT = Path(__file__).parent.parent
EXAMPLES = {
    "flax_mlp.py": (
        ["--steps", "3", "--formats", "E2M1", "--record", "RECORD"],
        ["params/Dense_1/kernel", "SQNR in dB", "E2M1"],
    ),
    "plain_scan_transformer.py": (
        ["--steps", "2", "--recipe", "mxfp8"],
        ["mxfp8 (3 of 4)", "product of two activations", "blocks/down/3"],
    ),
    "equinox_transformer.py": (["--recipe", "mxfp8", "--blocks", "1"], ["0/mlp/layers/0/weight", "gradient off by"]),
}


def test_all_examples_are_here():
    # test_initial.py runs finetune_gpt2.py, which needs a folder of weights.
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, "finetune_gpt2.py"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs(name, tmp_path):
    arguments, words = EXAMPLES[name]
    arguments = [str(tmp_path) if argument == "RECORD" else argument for argument in arguments]
    source = (ROOT / "examples" / name).read_text()
    assert len(source.splitlines()) < 80
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words), done.stdout
    if "--record" in arguments:
        comparison = report.build([tmp_path]).c
        assert [arm.format for arm in comparison.arms] == ["BF16", "E2M1"] and comparison.gaps
