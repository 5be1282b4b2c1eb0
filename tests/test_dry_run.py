"""What a dry run says, and that it leaves nothing behind."""

import re
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_training import command, make_data, tiny

from altgrad_jax import train
from altgrad_jax.errors import UserError
from altgrad_jax.run import setup
from altgrad_jax.run.dry_run import dry_run
from altgrad_jax.step import program


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def tree_of(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_it_says_what_a_run_takes_and_makes_no_folder(data_dir, tmp_path, capsys):
    run_dir = tmp_path / "not" / "there"
    assert dry_run(tiny(), data_dir=data_dir, workdir=run_dir) == 0
    assert not run_dir.parent.exists()
    said = capsys.readouterr().out
    # GPT-2 by hand: 16 wide, one block, a position for each of 16 tokens, 256 token ids.
    block = 16 * 48 + 48 + 16 * 16 + 16 + 16 * 64 + 64 + 64 * 16 + 16
    assert f"parameters: {4096 + 256 + block + 3 * 2 * 16:,}\n" in said
    sizes = re.search(r"memory on each device: training step ([\d.]+) MiB, evaluation ([\d.]+) MiB, diag", said)
    assert sizes and all(float(size) > 0 for size in sizes.groups())
    per_token = 6 * (12 * 16**2 + 256 * 16) + 12 * 16 * 16
    assert f"operations of a step: {4 * 16 * per_token / 1e9:,.4g} GFLOP by formula" in said
    assert "predicted: no time, because the peak of this device is not known" in said
    assert "there is room" in said and f"next: a new run of 40 steps in {run_dir}" in said


def test_a_known_device_is_predicted_from_its_peak_and_the_assumption_is_named(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(setup.flops, "peak_flops", lambda *_: 1e12)
    dry_run(tiny(), data_dir=data_dir, workdir=tmp_path / "x")
    flops = 4 * 16 * (6 * (12 * 16**2 + 256 * 16) + 12 * 16 * 16)
    said = capsys.readouterr().out
    assert f"predicted: {1e3 * flops / 0.3e12:.3g} ms a step" in said and "MFU 30%: supposing" in said


def test_it_says_where_a_run_would_go_on_and_touches_nothing(data_dir, tmp_path, capsys):
    run_dir = tmp_path / "run"
    train(tiny(max_steps=20), data_dir=data_dir, workdir=run_dir)
    before = tree_of(run_dir)

    def said(resume="auto", **changes):
        capsys.readouterr()
        assert dry_run(tiny(**changes), data_dir=data_dir, workdir=run_dir, resume=resume) == 0
        return capsys.readouterr().out

    assert "next: nothing" in said(max_steps=20)
    assert "next: resume at step 20 of 40, from a checkpoint that verifies" in said()
    assert "next: resume at step 10 of 40" in said(resume=10)
    with pytest.raises(UserError, match="is not empty"):
        said(resume="never")
    with pytest.raises(UserError, match="learning_rate"):
        said(learning_rate=1e-3)
    with pytest.raises(UserError, match="other data"):
        dry_run(tiny(), data_dir=make_data(tmp_path, seed=1), workdir=run_dir)
    assert tree_of(run_dir) == before
    victim = max(
        (path for path in (run_dir / "20" / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = np.frombuffer(victim.read_bytes(), np.uint8).copy()
    content[len(content) // 2] ^= 1
    victim.write_bytes(content.tobytes())
    before = tree_of(run_dir)
    text = said()
    assert "checkpoint 20 is damaged" in text and "next: resume at step 10 of 40" in text
    assert tree_of(run_dir) == before


@pytest.mark.parametrize(
    "option, words",
    [
        ("xla_no_such=1", "No such compile option: 'xla_no_such'"),
        ("xla_gpu_enable_triton_gemm=perhaps", "'perhaps' is not a valid bool value"),
    ],
)
def test_an_option_that_the_compiler_does_not_know_is_one_sentence(data_dir, tmp_path, option, words):
    with pytest.raises(UserError) as caught:
        dry_run(tiny(xla_options=(option,)), data_dir=data_dir, workdir=tmp_path / "x")
    said = str(caught.value)
    assert said.startswith(f"XLA refuses xla_options={option} (") and words in said and "\n" not in said


def test_an_option_that_the_compiler_knows_is_taken(data_dir, tmp_path, monkeypatch):
    taken = []
    compile_lowered = program.compile_lowered
    monkeypatch.setattr(program, "compile_lowered", lambda *given: taken.append(given[1]) or compile_lowered(*given))
    options = ("xla_gpu_enable_triton_gemm=false", "xla_gpu_command_buffer_scheduling_mode=CONCURRENT")
    dry_run(tiny(xla_options=options), data_dir=data_dir, workdir=tmp_path / "x")
    wanted = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    assert taken == [wanted] * 3


def test_a_device_that_is_only_compiled_for_tells_nothing_of_its_memory():
    def memory_stats():
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: MemoryStats is only supported for addressable devices.")

    assert setup._memory_limit(SimpleNamespace(memory_stats=memory_stats)) == 2**33
    assert setup._memory_limit(SimpleNamespace(memory_stats=lambda: None)) == 2**33
    assert setup._memory_limit(SimpleNamespace(memory_stats=lambda: {"bytes_limit": 5})) == 5


def test_the_script_takes_the_bare_flag(data_dir, tmp_path):
    done = subprocess.run([*command(data_dir, tmp_path / "x"), "--dry_run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "next: a new run" in done.stdout and not (tmp_path / "x").exists() and "\x1b" not in done.stdout
    done = subprocess.run([*command(data_dir, tmp_path / "x", n_embd=15), "--dry_run"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: n_embd=15 cannot be split")
    done = subprocess.run([*command(data_dir, tmp_path / "x"), "--dry_run=perhaps"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --dry_run=perhaps cannot be used: give true or false\n"


def test_token_files_that_it_had_to_write_are_told(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("altgrad_jax.run.dry_run.has_tokens", lambda folder: False)
    dry_run(tiny(), data_dir=data_dir, workdir=tmp_path / "x")
    said = capsys.readouterr().out
    assert f"token files were written to {data_dir}" in said and "nothing was trained; leave" in said
