"""What a run takes from its surroundings: jax's options, the environment, matplotlib's settings, its streams. No GPU
here: what XLA's flags for one do is not tested."""

import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import make_data, tiny

from altgrad_jax import train
from altgrad_jax.errors import UserError
from altgrad_jax.inference.evaluate import evaluate_checkpoint
from altgrad_jax.inference.generate import generate
from altgrad_jax.run import device, dry_run, environment, sweep, verdict
from altgrad_jax.run.console import make_console
from altgrad_jax.run.folder import RunFolder
from altgrad_jax.step.program import Program

ROOT = Path(__file__).parent.parent

BY_HAND = "--xla_gpu_enable_triton_gemm=false"


def test_the_flags_stand_in_the_manifest_and_another_device_is_told(tmp_path, monkeypatch, capsys):
    data_dir, run_dir = make_data(tmp_path), tmp_path / "run"
    monkeypatch.setenv("XLA_FLAGS", BY_HAND)

    def compiled(self):
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
    assert [start["xla_flags"] for start in start()["starts"]] == [f"{BY_HAND} {device.DETERMINISTIC_FLAG}"] * 2
    assert capsys.readouterr().out.count("was begun on NVIDIA H100 80GB HBM3 and goes on on cpu") == 1


def stands_at_step_0(self, resources):
    """In place of RunFolder.restore_or_start: with other flags jax would compile the initialization anew."""
    return self.setup.functions.abstract_state


# --- jax's options and the environment's variables --------------------------------------------------------------------

# Another value for each option, as a user might set it.
OTHERWISE = {
    "jax_default_prng_impl": "rbg",
    "jax_legacy_prng_key": "error",
    "jax_random_seed_offset": 7,
    "jax_explicit_x64_dtypes": "error",
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_matmul_precision": "bfloat16",
    "jax_optimization_level": "O1",
    "jax_exec_time_optimization_effort": 1.0,
    "jax_memory_fitting_effort": 1.0,
    "jax_memory_fitting_level": "O0",
} | {name: "raise" for name in environment.FIXED if "error_checking" in name}
OTHERWISE |= {name: "disallow" for name in environment.FIXED if "transfer_guard" in name}


@pytest.fixture
def options():
    """jax.config, put back after the test."""
    before = {name: jax.config.values[name] for name in environment.FIXED if name in jax.config.values}
    yield before
    for name, value in before.items():
        jax.config.update(name, value)


def test_every_fixed_option_has_its_value_within_and_that_of_the_user_after(options, capsys):
    for name in options:
        asked = OTHERWISE.get(name, not environment.FIXED[name])
        jax.config.update(name, asked)
        with environment.fixed_options():
            assert environment._plain(jax.config.values[name]) == environment._plain(environment.FIXED[name]), name
        assert environment._plain(jax.config.values[name]) == environment._plain(asked), name
        assert f"{name}={environment._plain(asked)}" in capsys.readouterr().err
        for changed, value in options.items():  # jax_transfer_guard is three more
            jax.config.update(changed, value)
    with environment.fixed_options():
        assert capsys.readouterr().err == ""


def test_an_option_set_by_a_context_around_a_run_is_refused(options):
    with jax.numpy_rank_promotion("raise"), pytest.raises(UserError, match="jax_numpy_rank_promotion=raise is set by"):
        with environment.fixed_options():
            pass


def test_what_is_neither_fixed_nor_harmless_is_recorded_and_not_continued_under_another_value(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_dump_to=/tmp/x --xla_a=2 --xla_force_host_platform_device_count=2")
    values = {"jax_of_a_newer_version": "x", "jax_log_compiles": True, "jax_enable_x64": False, "jax_platforms": "cpu"}
    monkeypatch.setattr(environment, "_options", lambda: values)
    assert environment.recorded() == {"jax_of_a_newer_version": "x"}
    fixed_otherwise = values | {"jax_enable_x64": True}  # as a loop of a user's own may have it
    monkeypatch.setattr(environment, "_options", lambda: fixed_otherwise)
    assert environment.recorded() == {"jax_of_a_newer_version": "x", "jax_enable_x64": "true"}
    monkeypatch.setattr(environment, "_options", lambda: values)
    start = {
        "environment": environment.recorded(),
        "versions": {"jax": jax.__version__},
        "xla_flags": "--xla_a=2 --xla_b=1",
    }
    environment.refuse_other(tmp_path, {"starts": [start, {}]})

    def refusal(**changes):
        with pytest.raises(UserError, match="was begun in another environment") as caught:
            environment.refuse_other(tmp_path, {"starts": [start | changes]})
        return str(caught.value)

    assert "XLA_FLAGS: none in the run, --xla_a=2 --xla_b=1 now" in refusal(xla_flags="")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert "NVIDIA_TF32_OVERRIDE: not set in the run, 1 now. Set that back" in refusal()
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    values["jax_of_a_newer_version"] = "y"
    assert "jax_of_a_newer_version: x in the run, y now" in refusal()
    # Defaults change with versions, and older records say nothing.
    environment.refuse_other(tmp_path, {"starts": [start | {"versions": {"jax": "0.1"}}]})
    environment.refuse_other(tmp_path, {"starts": [{"xla_flags": "--xla_a=2 --xla_b=1"}]})
    environment.refuse_other(tmp_path, {"starts": []})


HOSTILE = {
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_DEBUG_NANS": "1",
    "JAX_DISABLE_JIT": "1",
    "JAX_TRANSFER_GUARD": "disallow",
    "PYTHONIOENCODING": "ascii",
}


NAME = "a$\\frac{$b \u00e9"
# What a run does with numbers before its step, and with matplotlib and its streams after it.
ENDS = """
import hashlib, json, sys
import jax
import jax.numpy as jnp
from altgrad_jax import cli
from altgrad_jax.run import environment, verdict
from altgrad_jax.run.console import make_console

@environment.fixed_options()
def numbers():
    draws = jax.random.normal(jax.random.key(42), (3, 2)) * jnp.arange(3)[:, None] + jnp.ones(2)
    return str(draws.dtype), hashlib.sha256((draws @ draws.T - jnp.inf * 0).tobytes()).hexdigest()

def end(folder, name):
    print(numbers())
    print(hashlib.sha256(verdict.plot_loss(folder, title=name).read_bytes()).hexdigest())
    make_console("auto", 2).message(name)
"""


def test_numbers_plot_and_console_are_the_same_in_a_hostile_environment(record, tmp_path, capsys):
    here: dict = {}
    exec(ENDS, here)
    here["end"](record, NAME)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    code = f"{ENDS}\ncli.run_script(lambda: end({str(record)!r}, {NAME!r}))"
    done = subprocess.run(
        [sys.executable, "-OO", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | HOSTILE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out.replace("\u00e9", "\\xe9")
    assert all(f"{name.lower()}=" in done.stderr for name in HOSTILE if name.startswith("JAX_")), done.stderr


def test_all_that_computes_has_fixed_options(options, capsys, tmp_path):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for function, argument in (
        (train, {}),
        (sweep.sweep, []),
        (dry_run.dry_run, {}),
        (evaluate_checkpoint, tmp_path),
        (generate, None),
    ):
        with pytest.raises(Exception):  # noqa: B017  # of any kind: the arguments are wrong
            function(argument)
        if function is not generate:  # its arguments are refused by Python itself
            assert "jax_numpy_rank_promotion=raise is not followed" in capsys.readouterr().err, function
    assert "fixed_options" in inspect.getclosurevars(generate).nonlocals["self"].func.__name__


@pytest.mark.parametrize("variable", ["JAX_ENABLE_X64=maybe", "JAX_DEFAULT_PRNG_IMPL=dice", "JAX_PLATFORMS=cuda"])
def test_what_jax_refuses_in_the_environment_is_one_sentence(variable, tmp_path):
    name, _, value = variable.partition("=")
    words = [sys.executable, ROOT / "scripts/sample.py", tmp_path]
    environ = os.environ | {"PYTHONPATH": str(ROOT), name: value}
    done = subprocess.run(words, capture_output=True, text=True, env=environ)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert name.lower() in done.stderr.lower() and value in done.stderr


# --- the last metre ---------------------------------------------------------------------------------------------------


class Bare:
    """A stream with nothing but `write`, which fails as told."""

    def __init__(self, error=None):
        self.error, self.text = error, ""

    def write(self, text):
        if self.error is not None:
            raise self.error
        self.text += text


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "bare": Bare,
    "pipe": lambda: Bare(BrokenPipeError()),
    "full": lambda: Bare(OSError(28, "full")),
    "closed": closed,
    "none": lambda: None,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    "latin": lambda: io.TextIOWrapper(io.BytesIO(), encoding="latin-1"),
}


@pytest.mark.parametrize("mode", ["auto", "live", "plain", "quiet"])
@pytest.mark.parametrize("kind", STREAMS)
def test_no_stream_fails_a_run_or_hides_its_verdict(kind, mode, monkeypatch):
    stream = STREAMS[kind]()
    monkeypatch.setattr(sys, "stdout", stream)
    console = make_console(mode, 2)
    console.update(1, 2.0, 3.0, 4.0)
    console.alert("\u221e \ud800")
    console.close()
    facts = dict.fromkeys(("steps", "max_steps", "first_nonfinite_step", "initial_loss", "final_loss"), 1)
    facts |= dict.fromkeys(("best_val_loss", "final_perplexity", "final_val_perplexity", "loss_first", "loss_last"))
    facts |= {"verdict": "sound \u20ac", "sound": True, "finished": True, "loss_fell": True, "tokens_per_s": None}
    facts |= {"nonfinite_steps": 0, "validation": [], "alerts": {}, "checkpoints": [], "anomalies": []}
    paths = dict.fromkeys(("record", "loss_plot", "verdict"), "/nowhere")
    verdict.print_verdict(facts | {"paths": paths}, seconds=1.0)
    if kind == "bare":
        assert "sound \u20ac" in stream.text
    if kind in ("ascii", "latin"):
        stream.flush()
        assert b"sound \\u20ac" in stream.buffer.getvalue() and b"\\u221e \\ud800" in stream.buffer.getvalue()


def test_a_script_without_standard_streams_ends_as_it_would_with_them(tmp_path):
    script = (
        "import os, sys\nfrom altgrad_jax import cli\n"
        "def f():\n    print('x'); print('e', file=sys.stderr)\n    number = os.open(sys.argv[1], os.O_CREAT)\n"
        "    return 7 if number > 2 else 8\ncli.run_script(f)\n"
    )
    for ends in (">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full"):
        command = f'exec "$0" -c "$1" "$2" {ends}'
        words = ["sh", "-c", command, sys.executable, script, tmp_path / "file"]
        environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
        done = subprocess.run(words, capture_output=True, env=environ)
        assert done.returncode == 7, (ends, done.stderr)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2, "learning_rate": 1, "grad_norm": 1}\n')
    return folder


@settings(max_examples=4, deadline=None)
@given(title=st.text(st.sampled_from("\\{}_^%#&a \u00e9"), max_size=12).map("${}\\frac{{$b".format))
def test_a_plot_is_drawn_under_any_title(record, title):
    assert verdict.plot_loss(record, title=title).stat().st_size > 1000


def test_a_plot_that_cannot_be_drawn_is_told_and_raises_nothing(tmp_path):
    said = []
    verdict.try_to_plot(tmp_path / "no_record", "run", said.append)
    assert said[0].startswith("warning: loss.png was not drawn (UserError: ") and "its record are complete" in said[0]
