"""What is asked of XLA before it starts. No GPU here: what the flags then do is not tested."""

import json
import os
import subprocess
import sys

import pytest
from test_training import make_data, tiny

from altgrad_jax import train
from altgrad_jax.run import device
from altgrad_jax.run.folder import RunFolder
from altgrad_jax.step.program import Program

DUMP, LOAD = "--xla_gpu_dump_autotune_results_to", "--xla_gpu_load_autotune_results_from"


@pytest.fixture
def gpu_is_expected(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    monkeypatch.setattr(device, "expects_nvidia_gpu", lambda: True)
    monkeypatch.setattr(device, "_backend_is_started", lambda: False)
    monkeypatch.setattr(device, "nvidia_model", lambda: "NVIDIA H100 80GB HBM3")


def flags_after(run_dir, made_on, said=None):
    os.environ["XLA_FLAGS"] = "--xla_a=1"
    device.use_autotune_results(run_dir, made_on, pytest.fail if said is None else said.append)
    return os.environ["XLA_FLAGS"]


def test_kernels_are_written_down_once_and_read_on_the_same_kind_of_gpu(gpu_is_expected, tmp_path, monkeypatch):
    path = tmp_path / device.AUTOTUNE
    part = tmp_path / ".autotune.part"
    assert flags_after(tmp_path, None) == f"--xla_a=1 {DUMP}={part}"
    device.keep_autotune_results(tmp_path)  # XLA wrote nothing
    assert not path.exists()
    part.write_text("results")
    device.keep_autotune_results(tmp_path)
    assert path.read_text() == "results" and not part.exists()
    for made_on in (None, "NVIDIA H100 80GB HBM3", "H100 80GB HBM3"):
        assert flags_after(tmp_path, made_on) == f"--xla_a=1 {LOAD}={path}"
    assert flags_after(tmp_path, "NVIDIA A100-SXM4-80GB") == "--xla_a=1"
    monkeypatch.setattr(device, "nvidia_model", lambda: None)  # XLA itself goes by the device then
    assert LOAD in flags_after(tmp_path, "NVIDIA A100-SXM4-80GB")
    said = []
    monkeypatch.setattr(device, "_backend_is_started", lambda: True)
    assert flags_after(tmp_path, None, said) == "--xla_a=1" and "jax had already started" in said[0]


def test_flags_given_by_hand_come_first_and_without_a_gpu_there_are_none(gpu_is_expected, tmp_path, monkeypatch):
    os.environ["XLA_FLAGS"] = f"{LOAD}=/elsewhere"
    device.use_autotune_results(tmp_path, None, pytest.fail)
    assert os.environ["XLA_FLAGS"] == f"{LOAD}=/elsewhere"
    monkeypatch.undo()
    monkeypatch.setenv("XLA_FLAGS", "")
    assert not device.expects_nvidia_gpu()  # the tests ask jax for the CPU
    assert flags_after(tmp_path, None) == "--xla_a=1"


def test_the_flags_stand_in_the_manifest_and_another_device_is_told(gpu_is_expected, tmp_path, monkeypatch, capsys):
    data_dir, run_dir = make_data(tmp_path), tmp_path / "run"

    def compiled(self, n_threads):
        (run_dir / ".autotune.part").write_text("results")
        os.environ["XLA_FLAGS"] = ""
        raise RuntimeError("far enough")

    monkeypatch.setattr(Program, "compile", compiled)
    monkeypatch.setattr(RunFolder, "restore_or_start", stands_at_step_0)

    def start():
        with pytest.raises(RuntimeError, match="far enough"):
            train(tiny(deterministic=True), data_dir=data_dir, workdir=run_dir)
        return json.loads((run_dir / "manifest.json").read_text())

    manifest = start()
    assert "goes on on" not in capsys.readouterr().out
    manifest["starts"][0]["device"]["kind"] = "NVIDIA H100 80GB HBM3"
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    device.keep_autotune_results(run_dir)
    first, second = (start["xla_flags"] for start in start()["starts"])
    assert first == (
        f"--xla_gpu_enable_triton_gemm=false {device.DETERMINISTIC_FLAG} {DUMP}={run_dir / '.autotune.part'}"
    )
    assert second == f"{device.DETERMINISTIC_FLAG} {LOAD}={run_dir / device.AUTOTUNE}"
    assert capsys.readouterr().out.count("was begun on NVIDIA H100 80GB HBM3 and goes on on cpu") == 1


def stands_at_step_0(self, resources):
    """In place of RunFolder.restore_or_start: with other flags jax would compile the initialization anew."""
    return self.setup.functions.abstract_state


def test_a_cpu_takes_the_flags_without_harm(tmp_path):
    folder = tmp_path / "with a blank"
    folder.mkdir()
    flags = f"{device.DETERMINISTIC_FLAG} {DUMP}={device._quoted(folder / 'x')} {LOAD}={device._quoted(folder / 'y')}"
    script = "import jax, jax.numpy as jnp; print(jax.jit(lambda x: x @ x)(jnp.ones((4, 4)))[0, 0])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags}
    )
    assert done.returncode == 0 and done.stdout == "4.0\n" and not list(folder.iterdir()), done.stderr
