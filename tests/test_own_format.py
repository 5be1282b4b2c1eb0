"""A user's own number format: kept in the record, and known to processes that have not registered it."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax import Recorder, instrument
from altgrad_jax.errors import UserError
from altgrad_jax.numerics.formats import FloatFormat, facts, known_again, register_format, registered
from altgrad_jax.run.folder import own_formats
from altgrad_jax.run.record import read_manifest
from altgrad_jax.step.from_config import step_options

ROOT = Path(__file__).parent.parent
HALF4 = FloatFormat("HALF4", 3, 1, bias=3, max_finite=24.0, has_inf=False)


def test_the_record_makes_the_format_known_to_other_processes(tmp_path):
    register_format(HALF4)
    params, x = {"w": np.eye(8, dtype=np.float32)}, np.ones((8, 8), np.float32)
    inst = instrument(lambda params, x: jnp.mean((x @ params["w"]) ** 2), params, x, recipe="half4")
    with Recorder(tmp_path / "run", inst, data="ones", max_steps=1) as recorder:
        recorder.row(1.0)
        recorder.evaluation(1.0)
        recorder.diagnose(inst.histograms(params, x, inst.init(params)))
    assert read_manifest(tmp_path / "run")["formats"]["registered"] == {"HALF4": facts(HALF4)}
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    known = (
        "import sys; from altgrad_jax.run.record import read_manifest; from altgrad_jax.numerics.formats import *\n"
        f"read_manifest({str(tmp_path / 'run')!r}); print(get_format('HALF4'))"
    )
    report = [str(ROOT / "scripts" / "report.py"), str(tmp_path / "run"), "-o", str(tmp_path / "page.md")]
    for command in (["-c", known], report):
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "HALF4" in (tmp_path / "page.md").read_text()


def test_manifest_and_checkpoints_of_a_run_hold_its_own_formats():
    from test_training import tiny

    register_format(HALF4)
    options = step_options(tiny(use_fp8=True, formats=("E4M3", "block_0/mlp_up:W=HALF4")), steps_per_dispatch=1)
    assert own_formats(options.quant) == {"registered": {"HALF4": facts(HALF4)}}
    options = step_options(tiny(use_fp8=True, formats=("E4M3",)), steps_per_dispatch=1)
    assert own_formats(options.quant) == own_formats(None) == {}


def test_a_record_with_other_facts_under_the_name_is_refused():
    register_format(HALF4)
    known_again(registered(["E4M3", "HALF4"]))
    with pytest.raises(UserError, match="the name HALF4 already stands for another format"):
        known_again({"HALF4": facts(HALF4) | {"max_finite": 16.0}})
