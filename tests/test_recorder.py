"""`Recorder`: a training loop of one's own leaves the record of a built-in run, and what reads that reads it too."""

import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from instrumented import BATCH, MODELS
from test_instrument_gpt2 import mean_loss, plain_dot
from test_training import tiny

from altgrad_jax import Recorder, instrument, measure, report, train
from altgrad_jax.errors import UserError
from altgrad_jax.models import linear, stacking
from altgrad_jax.models.model import init_params
from altgrad_jax.report.runs import Arm
from altgrad_jax.run import verdict
from altgrad_jax.run.record import read_diagnostics, read_manifest, read_rows
from altgrad_jax.step import quantization
from altgrad_jax.step.from_config import model_config, step_options
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.program import make_step_functions

ROOT = Path(__file__).parent.parent
STEPS, RATE = 25, 0.5
MODEL = MODELS["recurrent"]
measured = jax.jit(measure)


@pytest.fixture(scope="module")
def made():
    """{recipe: (instrument, compiled step)}."""
    found = {}
    for recipe in ("BF16", "E4M3"):
        inst = instrument(MODEL.plain, MODEL.params, BATCH, recipe=recipe)
        found[recipe] = inst, jax.jit(inst.value_and_grad)
    return found


def own_loop(folder, made, recipe, seed=0, first=0, last=STEPS, spoil=-1, **options):
    """A loop as a user writes it: steps `first` to `last`; the loss of step `spoil` is NaN."""
    inst, step = made[recipe]
    params, state = jax.tree.map(lambda w: w * np.float32(1 + seed / 100), MODEL.params), inst.init(MODEL.params)
    options |= {"learning_rate": RATE, "seed": seed, "batch_size": 1, "block_size": 32}
    with Recorder(folder, inst, data="normal", max_steps=STEPS, **options) as recorder:
        for i in range(last):
            (loss, _), grads, state, statistics = step(params, BATCH, state)
            updates = jax.tree.map(lambda g: np.float32(-RATE) * g, grads)
            norms = measured(grads=grads, params=params, updates=updates)
            params = jax.tree.map(jnp.add, params, updates)
            if i < first:
                continue
            recorder.row(jnp.nan if i == spoil else loss, statistics, norms, learning_rate=RATE)
            if i % 5 == 4:
                recorder.evaluation(float(loss))
            if i == STEPS - 1 and recipe != "BF16":
                recorder.diagnose(inst.histograms(params, BATCH, state))
    return recorder


@pytest.fixture(scope="module")
def folders(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    for recipe in ("BF16", "E4M3"):
        for seed in (0, 1):
            own_loop(root / f"{recipe}-{seed}", made, recipe, seed)
    return root


def test_the_report_compares_such_folders(folders, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), str(folders), "-o", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "Gap to BF16 in nats per token" in done.stdout and "E4M3" in done.stdout
    page = (tmp_path / "page.md").read_text()
    assert "4 runs (4 finished). Recorded by a loop of their own. The model: 1,056 parameters, " in page
    comparison = report.build([folders]).c
    last = {seed: list(read_rows(folders / f"E4M3-{seed}"))[-1]["val_loss"] for seed in (0, 1)}
    assert comparison.losses(Arm("E4M3"), RATE) == {(seed, 1337): np.float32(loss) for seed, loss in last.items()}
    codes = sum(line["codes"].sum() for line in read_diagnostics(folders / "E4M3-0"))
    w, x = MODEL.params["w"].size, BATCH["x"].size
    assert codes == 2 * (w + 2 * x)  # two rounds of the loop, each with W, A and G


def test_verdicts(folders, made, tmp_path):
    own_loop(tmp_path / "short", made, "BF16", last=9, spoil=6)
    found = report.build([folders]).c.all_runs[0].verdict
    assert found["sound"] and found["steps"] == STEPS and found["tokens_per_s"] > 0
    rows = list(read_rows(tmp_path / "short"))
    assert rows[6]["alerts"] == [{"kind": "nonfinite_loss", "layer": None, "value": 1.0}]
    text = (tmp_path / "short" / "verdict.json").read_text()
    assert '"not sound: stopped after 9 of 25 steps; 1 non-finite step, the first at step 7"' in text


def test_a_resumed_loop_leaves_the_same_bytes(folders, made, tmp_path):
    own_loop(tmp_path / "run", made, "E4M3", last=23)
    own_loop(tmp_path / "run", made, "E4M3", first=21, resume_step=21)
    for name in ("metrics.jsonl", "diagnostics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (folders / "E4M3-0" / name).read_bytes()
    assert [start["step"] for start in read_manifest(tmp_path / "run")["starts"]] == [0, 21]
    assert list(read_rows(tmp_path / "run"))[-1]["loss_zscore"] != 0  # of more losses than those since the resume


def test_a_plot_that_fails_does_not_take_the_verdict(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verdict, "plot_loss", lambda *args, **how: 1 / 0)
    recorder = Recorder(tmp_path / "run", made["BF16"][0], data="normal", max_steps=1)
    recorder.row(1.0)
    assert recorder.close()["steps"] == 1 and (tmp_path / "run" / "verdict.json").exists()
    assert "loss.png was not drawn (ZeroDivisionError" in capsys.readouterr().out


def test_what_jax_was_told_is_recorded_and_may_not_differ_on_resume(made, tmp_path):
    inst = made["E4M3"][0]
    with jax.default_matmul_precision("highest"):
        with Recorder(tmp_path / "run", inst, data="normal", max_steps=2) as recorder:
            recorder.row(1.0)
    environment = read_manifest(tmp_path / "run")["starts"][0]["environment"]
    assert environment["jax_default_matmul_precision"] == "highest"
    with pytest.raises(UserError, match="jax_default_matmul_precision: highest in the run, not set now"):
        Recorder(tmp_path / "run", inst, data="normal", max_steps=2, resume_step=1)


def test_has_the_columns_of_a_built_in_run(tmp_path, monkeypatch):
    """By the names of stacked parameters; test_instrument_gpt2.py compares the numbers of these columns."""
    config = tiny(use_fp8=True, formats=("E4M3",), scaling="current", metrics="grad,format")
    device = jax.devices()[0]
    options = step_options(config, steps_per_dispatch=1)
    model = quantization.layout(model_config(config, device), options.quant)
    names = make_step_functions(
        model, options, data_mesh([device]), n_train_windows=8, eval_batch_size=4, seed=0
    ).metric_names
    built_in = {name.removeprefix("sparse/") for name in names if not name.startswith("alert")}
    for part in ("attn_qkv", "attn_out", "mlp_up", "mlp_down"):
        built_in = {name.replace(f"/block_0/{part}/", f"/block_0:1/{part}/kernel/0/") for name in built_in}

    monkeypatch.setattr(linear, "quant_dot", plain_dot)
    params = jax.eval_shape(lambda: stacking.stack(init_params(model, 0), model.segments))
    windows = jax.ShapeDtypeStruct((4, 17), np.uint16)
    inst = instrument(partial(mean_loss, dataclasses.replace(model, rules=())), params, windows, recipe="E4M3")
    _, grads, _, statistics = jax.eval_shape(inst.value_and_grad, params, windows, inst.init(params))
    columns = statistics, jax.eval_shape(measure, grads=grads)
    with Recorder(tmp_path, inst, data="bytes", max_steps=1) as recorder:
        recorder.row(1.0, *(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), part) for part in columns))
    own = set(next(read_rows(tmp_path)))
    of_operands = {name for name in built_in if name.endswith(("/W", "/A", "/G"))}
    assert len(of_operands) > 50 and of_operands <= own
    assert {"loss", "loss_zscore", "grad_norm", "nonfinite_grads", "nonfinite_loss"} <= own & built_in


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(recipe="mxfp8"), "takes recipe from the instrument"),
        (dict(learning_rat=0.1), "there is no setting 'learning_rat'; did you mean learning_rate"),
        (dict(learning_rate=-1.0), "learning_rate=-1.0 cannot be used"),
        (dict(log_interval=10), "writes every row"),
        (dict(resume_step=3), "is not a run folder"),
    ],
)
def test_refuses_in_one_sentence(options, words, made, tmp_path):
    with pytest.raises(UserError, match=words):
        Recorder(tmp_path / "run", made["E4M3"][0], data="normal", max_steps=STEPS, **options)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_refuses_what_does_not_fit_the_run(folders, made, tmp_path):
    inst = made["E4M3"][0]
    with pytest.raises(UserError, match="already holds a run"):
        Recorder(folders / "E4M3-0", inst, data="normal", max_steps=STEPS)
    with pytest.raises(UserError, match="holds another run, for data"):
        Recorder(folders / "E4M3-0", inst, data="other", max_steps=STEPS, resume_step=3)
    with pytest.raises(UserError, match="Recorder.*give another --workdir"):
        train(tiny(), workdir=folders / "E4M3-0")
    with Recorder(tmp_path / "run", inst, data="normal", max_steps=1) as recorder:
        with pytest.raises(UserError, match="a row has 'alert/x' already"):
            recorder.row(1.0, **{"alert/x": 1.0})
        recorder.row(1.0)
        with pytest.raises(UserError, match="a row more"):
            recorder.row(1.0)
    # Runs of other products are not compared.
    other = MODELS["stacked"]
    with Recorder(tmp_path / "other", instrument(other.plain, other.params, BATCH), data="normal", max_steps=1) as one:
        one.row(1.0)
    with pytest.raises(UserError, match="cannot be compared, for the model's products"):
        report.build([tmp_path])
