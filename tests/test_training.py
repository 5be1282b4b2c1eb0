"""Whole runs of a tiny model: what they leave, how they end, and that a resumed one equals an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cpu_devices

from altgrad_jax import default_config, train
from altgrad_jax.data.prepare import prepare
from altgrad_jax.data.sources import local
from altgrad_jax.data.tokenizer import get_tokenizer
from altgrad_jax.errors import UserError
from altgrad_jax.run import loop
from altgrad_jax.run.checkpoint import list_steps, load_arrays, read_document, restore_path
from altgrad_jax.run.folder import RunFolder

ROOT = Path(__file__).parent.parent
TINY = dict(
    tokenizer="bytes",
    vocab_size=256,
    n_layer=1,
    n_head=2,
    n_embd=16,
    block_size=16,
    batch_size=4,
    max_steps=40,
    warmup_steps=5,
    learning_rate=3e-3,
    checkpoint_interval=10,
    eval_interval=20,
    eval_windows=8,
    eval_batch_size=4,
    diagnostic_interval=20,
    dead_neuron_window=5,
    nan_patience=3,
    run_name="tiny",
    tags=("tiny",),
    wandb_mode="disabled",
    console="plain",
)


def make_data(folder, seed=0):
    """Token files of pseudo-sentences: learnable, and different for every seed."""
    rng = np.random.default_rng(seed)
    words = ["the", "council", "shall", "adopt", "article", "of", "regulation", "member", "states", "and"]
    source = folder / f"text-{seed}"
    source.mkdir()
    for i in range(12):
        (source / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)))
    prepare(local(source), folder / f"tokens-{seed}", get_tokenizer("bytes"), val_fraction=0.2, progress=False)
    return folder / f"tokens-{seed}"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def tiny(**changes):
    config = default_config()
    config.update({**TINY, **changes})
    return config


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """An uninterrupted run."""
    return train(tiny(), data_dir=data_dir, workdir=tmp_path_factory.mktemp("whole") / "run")


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def state_bytes(run_dir, step):
    """Every array of a checkpoint as it was hashed when it was written."""
    return read_document(run_dir / str(step))["arrays"]


def assert_equal_runs(a, b, step=40):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert state_bytes(a, step) == state_bytes(b, step)


def test_a_run_leaves_its_record_checkpoints_plot_and_verdict(whole):
    assert whole.exit_code == 0
    rows = rows_of(whole.run_dir)
    assert [row["step"] for row in rows] == list(range(41))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 20, 40]
    assert list(rows[0])[:3] == ["step", "val_loss", "val_perplexity"]
    ranks = ("stable_rank/", "participation_ratio/", "spectral_norm/")
    assert all(name.startswith(ranks) for name in list(rows[0])[3:])
    assert [row["step"] for row in rows if "stable_rank/embed" in row] == [0, 20, 40]
    losses = whole.history["loss"][1:]
    assert losses[0] == pytest.approx(np.log(256), abs=0.1) and losses[-5:].mean() < losses[:5].mean() - 0.3
    assert len(list_steps(whole.run_dir)) == 3 and max(list_steps(whole.run_dir)) == 40
    assert whole.verdict["sound"] and json.loads((whole.run_dir / "verdict.json").read_text()) == whole.verdict
    assert (whole.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((whole.run_dir / "manifest.json").read_text())
    assert manifest["config"]["learning_rate"] == 3e-3 and manifest["starts"][0]["versions"]["jax"] == jax.__version__
    timing = [json.loads(line) for line in (whole.run_dir / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timing if "step_time_s" in row] == list(range(1, 41))


def test_a_run_may_have_no_diagnoses(whole, data_dir, tmp_path):
    """Their rows then lack the rank of weights, and nothing else is different."""
    run = train(tiny(diagnostic_interval=0), data_dir=data_dir, workdir=tmp_path / "run")
    assert run.exit_code == 0 and run.verdict["sound"]
    ranks = ("stable_rank/", "participation_ratio/", "spectral_norm/")
    without = [
        {name: value for name, value in row.items() if not name.startswith(ranks)} for row in rows_of(whole.run_dir)
    ]
    assert rows_of(run.run_dir) == without


def test_the_rows_hold_every_layer(whole):
    row = rows_of(whole.run_dir)[10]
    for layer in ("embed", "block_0/attn_qkv", "ln_f"):
        for statistic in (
            "grad_norm",
            "grad_max",
            "grad_snr",
            "param_norm",
            "update_norm",
            "update_ratio",
            "zero_update",
            "nonfinite_grads",
            "nonfinite_params",
        ):
            assert isinstance(row[f"{statistic}/{layer}"], float)
    assert {"dead_neurons/block_0/mlp_up", "act_amax/block_0", "act_rms/block_0", "loss_zscore"} <= set(row)
    assert not [name for name in row if name.startswith("alert")]


def test_two_runs_are_equal_to_the_byte(whole, data_dir, tmp_path):
    again = train(tiny(steps_per_dispatch=3), data_dir=data_dir, workdir=tmp_path / "again")
    assert_equal_runs(whole.run_dir, again.run_dir)


def test_tokens_streamed_from_the_host_give_the_same_run(whole, data_dir, tmp_path):
    again = train(tiny(data_placement="host"), data_dir=data_dir, workdir=tmp_path / "host")
    assert_equal_runs(whole.run_dir, again.run_dir)


def test_a_run_continued_in_pieces_equals_the_whole(whole, data_dir, tmp_path):
    for max_steps in (20, 40):
        result = train(tiny(max_steps=max_steps), data_dir=data_dir, workdir=tmp_path / "pieces")
        assert result.exit_code == 0
    assert_equal_runs(whole.run_dir, result.run_dir)


def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_used(whole, data_dir, tmp_path, capsys):
    run_dir = tmp_path / "damaged"
    train(tiny(max_steps=20), data_dir=data_dir, workdir=run_dir)
    victim = max(
        (path for path in (run_dir / "20" / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    capsys.readouterr()
    train(tiny(), data_dir=data_dir, workdir=run_dir)
    assert "checkpoint 20 is damaged" in capsys.readouterr().out
    assert_equal_runs(whole.run_dir, run_dir)


def test_going_back_to_a_step_sets_later_checkpoints_aside(whole, data_dir, tmp_path):
    run_dir = tmp_path / "back"
    shutil.copytree(whole.run_dir, run_dir)
    train(tiny(), data_dir=data_dir, workdir=run_dir, resume=20)
    assert sorted(path.name for path in (run_dir / "superseded").iterdir()) == ["30-1", "40-1"]
    assert_equal_runs(whole.run_dir, run_dir)


def test_a_finished_run_has_nothing_left_to_do(whole, data_dir, capsys):
    before = (whole.run_dir / "timing.jsonl").read_bytes()
    again = train(tiny(), data_dir=data_dir, workdir=whole.run_dir)
    assert again.exit_code == 0 and "is finished" in capsys.readouterr().out
    assert (whole.run_dir / "timing.jsonl").read_bytes() == before


def test_resume_refuses_another_config_other_data_and_a_missing_step(whole, data_dir, tmp_path):
    with pytest.raises(UserError, match=r"learning_rate: 0.003 in the run, 0.001 now.*beta2"):
        train(tiny(learning_rate=1e-3, beta2=0.99), data_dir=data_dir, workdir=whole.run_dir)
    with pytest.raises(UserError, match="trained on other data"):
        train(tiny(max_steps=50), data_dir=make_data(tmp_path, seed=1), workdir=whole.run_dir)
    with pytest.raises(UserError, match="not empty"):
        train(tiny(), data_dir=data_dir, workdir=whole.run_dir, resume="never")
    with pytest.raises(UserError, match=r"--resume=7 names a checkpoint.*it has .*40"):
        train(tiny(), data_dir=data_dir, workdir=whole.run_dir, resume=7)
    assert max(list_steps(whole.run_dir)) == 40


def test_a_folder_that_cannot_be_a_run_is_refused(data_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        train(tiny(), data_dir=data_dir, workdir=tmp_path / "file")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="without its manifest"):
        train(tiny(), data_dir=data_dir, workdir=tmp_path / "half")


def test_two_processes_cannot_train_into_one_folder(data_dir, tmp_path):
    """The second one is told, and the first one's record stays its own."""
    process = start(data_dir, tmp_path / "run", **LONG)
    wait_for_rows(process, tmp_path / "run", 2)
    with pytest.raises(UserError, match="is being trained into by another process"):
        train(tiny(**LONG), data_dir=data_dir, workdir=tmp_path / "run")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(401))


def test_a_run_whose_checkpoints_were_taken_away_is_not_started_again_silently(data_dir, tmp_path, capsys):
    run_dir = tmp_path / "bare"
    train(tiny(max_steps=20), data_dir=data_dir, workdir=run_dir)
    for step in list_steps(run_dir):
        shutil.rmtree(run_dir / str(step))
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="checkpoints up to step 20, but no checkpoint any more"):
        train(tiny(), data_dir=data_dir, workdir=run_dir)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    # A run that died before its first checkpoint may start again, and says so.
    timing = run_dir / "timing.jsonl"
    timing.write_text("".join(line + "\n" for line in timing.read_text().splitlines() if '"checkpoint"' not in line))
    train(tiny(max_steps=20), data_dir=data_dir, workdir=run_dir)
    assert "no checkpoint was saved in this folder yet: starting again at step 0" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused(whole, data_dir, tmp_path):
    run_dir = tmp_path / "mixed"
    train(tiny(max_steps=20), data_dir=data_dir, workdir=run_dir)
    shutil.copytree(whole.run_dir / "40", run_dir / "40")
    with pytest.raises(UserError, match="checkpoint 40 in .* belongs to another run"):
        train(tiny(max_steps=60), data_dir=data_dir, workdir=run_dir)


def test_an_old_verdict_is_not_believed(data_dir, tmp_path):
    """A run continued past its end, killed after its last checkpoint and before its verdict."""
    run_dir = tmp_path / "old"
    train(tiny(max_steps=20), data_dir=data_dir, workdir=run_dir)
    old = (run_dir / "verdict.json").read_bytes()
    train(tiny(), data_dir=data_dir, workdir=run_dir)
    (run_dir / "verdict.json").write_bytes(old)
    result = train(tiny(), data_dir=data_dir, workdir=run_dir)
    assert result.exit_code == 0 and result.verdict["steps"] == 40
    # Nor does a damaged one stand in the way; and what may change on resume is recorded.
    (run_dir / "verdict.json").write_text("{")
    result = train(tiny(tags=("tiny", "again")), data_dir=data_dir, workdir=run_dir)
    assert result.verdict["steps"] == 40
    assert json.loads((run_dir / "manifest.json").read_text())["tags"] == ["tiny", "again"]


def test_a_last_checkpoint_that_cannot_be_saved_is_not_a_success(data_dir, tmp_path, monkeypatch, capsys):
    from altgrad_jax.run import checkpoint

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    result = train(tiny(max_steps=20), data_dir=data_dir, workdir=tmp_path / "full")
    assert result.exit_code == 1 and not result.verdict["sound"]
    assert "the checkpoint of step 20 could not be saved" in result.verdict["verdict"]
    assert "No space left on device" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(tmp_path / "full")] == list(range(21))


def test_a_warning_about_the_data_is_shown_whole(data_dir, tmp_path, monkeypatch, capsys):
    from altgrad_jax.data.prepare import PreparedData, read_meta
    from altgrad_jax.run import setup

    monkeypatch.setattr(
        setup,
        "resolve",
        lambda *_: PreparedData(data_dir, read_meta(data_dir), True, ("This is the small sample, not the corpus.",)),
    )
    result = train(tiny(max_steps=20), workdir=tmp_path / "sample")
    assert "This is the small sample, not the corpus." in capsys.readouterr().out
    manifest = json.loads((result.run_dir / "manifest.json").read_text())
    assert manifest["tags"] == ["tiny", "eurlex-sample"]


@pytest.mark.parametrize("resume", ["Never", "40", True, None])
def test_the_api_takes_no_other_resume(data_dir, tmp_path, resume):
    with pytest.raises(UserError, match="resume=.* cannot be used"):
        train(tiny(), data_dir=data_dir, workdir=tmp_path / "x", resume=resume)


def test_settings_that_the_device_or_data_cannot_honour_are_refused(data_dir, tmp_path):
    with pytest.raises(UserError, match="attention='cudnn' cannot run heads of 8 numbers on this machine's cpu"):
        train(tiny(attention="cudnn"), data_dir=data_dir, workdir=tmp_path / "a")
    with pytest.raises(UserError, match="use_fp8"):
        train(tiny(use_fp8=True), data_dir=data_dir, workdir=tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "pattern, guess",
    [
        ("val_los", "val_loss"),
        ("grad_nrm/*", "grad_norm/*"),
        ("stable_rank/embd", "stable_rank/embed"),
        ("zzz", "metrics.jsonl"),
    ],
)
def test_a_wandb_key_that_no_metric_has_is_refused_before_the_first_step(data_dir, tmp_path, pattern, guess):
    with pytest.raises(UserError, match="wandb_keys=.* matches no metric of this run") as error:
        train(tiny(wandb_keys=("loss", pattern)), data_dir=data_dir, workdir=tmp_path / "keys")
    assert guess in str(error.value) and str(pattern) in str(error.value)
    assert not (tmp_path / "keys").exists()


def test_short_validation_data_is_used_whole_and_said(data_dir, tmp_path, capsys):
    result = train(
        tiny(max_steps=20, eval_windows=4096, eval_batch_size=64),
        data_dir=data_dir,
        workdir=tmp_path / "short",
    )
    assert "eval_windows=4096, but the validation data holds" in capsys.readouterr().out
    assert np.isfinite(result.history["val_loss"][-1])


def test_non_finite_steps_are_located_kept_and_end_the_run(data_dir, tmp_path, monkeypatch, capsys):
    """A NaN put into one parameter after 20 steps: three bad steps, an anomaly checkpoint, exit code 3."""
    run_dir = tmp_path / "nan"
    train(tiny(max_steps=20), data_dir=data_dir, workdir=run_dir)
    restore = RunFolder.restore_or_start

    def restore_and_spoil(self, resources):
        state = restore(self, resources)
        params = jax.tree.map(jnp.copy, state.params)
        params["block_0"]["mlp_up"]["kernel"] = params["block_0"]["mlp_up"]["kernel"].at[1, 2].set(np.nan)
        return state._replace(params=params)

    monkeypatch.setattr(RunFolder, "restore_or_start", restore_and_spoil)
    result = train(tiny(), data_dir=data_dir, workdir=run_dir)
    assert result.exit_code == 3
    rows = rows_of(run_dir)
    assert [row["step"] for row in rows] == list(range(24))
    assert {"kind": "nonfinite_params", "layer": "block_0/mlp_up", "value": 1.0} in rows[21]["alerts"]
    assert rows[21]["loss"] == "NaN"
    assert not result.verdict["sound"] and result.verdict["first_nonfinite_step"] == 21
    assert result.verdict["nonfinite_steps"] == 3 and result.verdict["checkpoints"][-1] == 23
    (anomaly,) = (run_dir / "anomaly").iterdir()
    meta = read_document(anomaly)["meta"]
    assert meta["first_bad_step"] == 21 and len(meta["windows"]) == 4
    assert meta["found"]["nonfinite_params/block_0/mlp_up"] == 1.0
    cause = "1 non-finite parameter in block_0/mlp_up"
    assert meta["cause"] == result.verdict["first_nonfinite_cause"] == cause
    assert f"the first at step 21 ({cause})" in result.verdict["verdict"]
    said = capsys.readouterr().out
    assert "nonfinite_params in block_0/mlp_up" in said
    assert f"step 21 was not finite: {cause}; the state at step" in " ".join(said.split())
    # Resumed, it says the same again instead of training on.
    monkeypatch.undo()
    assert train(tiny(), data_dir=data_dir, workdir=run_dir).exit_code == 3


# In a process of its own: signals, kill -9, the command line.


def command(data_dir, run_dir, **changes):
    flags = [
        f"--config.{name}={','.join(value) if isinstance(value, tuple) else value}"
        for name, value in {**TINY, "console": "plain", **changes}.items()
    ]
    return [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        "--config",
        str(ROOT / "configs" / "smoke.py"),
        f"--data_dir={data_dir}",
        f"--workdir={run_dir}",
        *flags,
    ]


def start(*args, **changes):
    return subprocess.Popen(
        command(*args, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_for_rows(process, run_dir, n):
    deadline = time.monotonic() + 120
    record = run_dir / "metrics.jsonl"
    while not record.exists() or record.read_bytes().count(b"\n") < n:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)


LONG = dict(max_steps=400, checkpoint_interval=40, eval_interval=80, steps_per_dispatch=2, metrics="none")


@pytest.fixture(scope="module")
def long_run(data_dir, tmp_path_factory):
    return train(tiny(**LONG), data_dir=data_dir, workdir=tmp_path_factory.mktemp("long") / "run")


def test_sigterm_saves_says_how_to_go_on_and_nothing_is_lost(long_run, data_dir, tmp_path):
    run_dir = tmp_path / "term"
    process = start(data_dir, run_dir, **LONG)
    wait_for_rows(process, run_dir, 50)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    stopped_at = max(list_steps(run_dir))
    assert f"the same command continues from checkpoint {stopped_at}" in output
    assert not (run_dir / "verdict.json").exists()
    assert rows_of(run_dir)[-1]["step"] == stopped_at < 400
    process = start(data_dir, run_dir, **LONG)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"continued from step {stopped_at}" in output and "\x1b" not in output
    assert_equal_runs(long_run.run_dir, run_dir, step=400)


def test_a_second_signal_leaves_at_once_even_while_the_device_computes(data_dir, tmp_path):
    """One dispatch of this run takes minutes; both signals are answered while it computes."""
    endless = {
        **LONG,
        "max_steps": 10**6,
        "checkpoint_interval": 10**6,
        "eval_interval": 10**6,
        "diagnostic_interval": 10**6,
        "steps_per_dispatch": 60000,
    }
    process = start(data_dir, tmp_path / "run", **endless)
    wait_for_rows(process, tmp_path / "run", 1)  # the evaluation before the first dispatch
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and time.monotonic() - sent < 10
    assert "SIGINT: saving after this dispatch" in output


def test_two_devices_train_as_one(whole, data_dir, tmp_path):
    """The batch split over a mesh of two: the same losses but for the order of the sums."""
    process = subprocess.Popen(
        command(data_dir, tmp_path / "two", metrics="none"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": cpu_devices(2)},
    )
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0 and "device: 2 x cpu" in output, output
    losses = [row["loss"] for row in rows_of(tmp_path / "two")[1:]]
    np.testing.assert_allclose(losses, whole.history["loss"][1:], rtol=5e-3)


def test_a_mistake_on_the_command_line_is_one_sentence(data_dir, tmp_path):
    process = start(data_dir, tmp_path / "x", n_embd=15)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.startswith("error: n_embd=15 cannot be split") and output.count("\n") == 1


def test_the_checkpoint_restores_as_the_state_that_made_it(whole):
    from altgrad_jax.step.from_config import model_config, step_options
    from altgrad_jax.step.mesh import data_mesh
    from altgrad_jax.step.program import make_step_functions

    functions = make_step_functions(
        model_config(tiny(), jax.devices()[0]),
        step_options(tiny(), steps_per_dispatch=1),
        data_mesh(),
        n_train_windows=100,
        eval_batch_size=4,
        seed=42,
    )
    state, meta = restore_path(whole.run_dir / "40", functions.abstract_state)
    assert int(state.step) == meta["step"] == 40
    arrays, _ = load_arrays(whole.run_dir, None, ("params/",))
    jax.tree.map(np.testing.assert_array_equal, state.params, arrays["params"])


def test_evaluating_a_checkpoint_gives_the_records_validation_loss(whole, data_dir):
    from altgrad_jax.inference.evaluate import evaluate_checkpoint

    recorded = rows_of(whole.run_dir)[40]
    for arguments in ({}, {"data_dir": data_dir}, {"token_file": data_dir / "val.bin"}):
        result = evaluate_checkpoint(whole.run_dir, **arguments)
        assert np.float32(result.val_loss) == np.float32(recorded["val_loss"])
        assert np.float32(result.val_perplexity) == np.float32(recorded["val_perplexity"])
        assert (result.n_windows, result.n_tokens) == (8, 8 * 16)
    assert evaluate_checkpoint(whole.run_dir / "20").val_loss == pytest.approx(rows_of(whole.run_dir)[20]["val_loss"])
    everything = evaluate_checkpoint(whole.run_dir, all_windows=True)
    available = ((data_dir / "val.bin").stat().st_size // 2 - 1) // 16
    assert everything.n_windows == available - available % 4  # whole batches of eval_batch_size
    with pytest.raises(UserError, match="missing.bin is missing: give a file of uint16 tokens"):
        evaluate_checkpoint(whole.run_dir, token_file=data_dir / "missing.bin")


# Between two intervals.


def test_at_least_half_of_the_time_is_saved_and_all_but_the_longest_wait():
    from altgrad_jax.run.loop import InterimSaves

    now, saved_at = 0.0, []
    saves = InterimSaves(60.0, clock=lambda: now)
    for second in range(1, 401):
        now = float(second)
        if saves.are_due():
            saves.saved()
            saved_at.append(second)
        assert second - (saved_at or [0])[-1] <= max(5, min(60, second / 2))
    assert saved_at == [5, 10, 20, 40, 80, 140, 200, 260, 320, 380]
    assert not InterimSaves(0.0, clock=lambda: 1e9 * now).are_due()


def test_interim_checkpoints_change_nothing_and_are_gone_at_the_end(whole, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "FIRST_INTERIM_SECONDS", 0.0)
    saved = []
    save = RunFolder.save

    def told(self, state, *, interim=False):
        saved.append((self.step, interim))
        save(self, state, interim=interim)

    monkeypatch.setattr(RunFolder, "save", told)
    run_dir = tmp_path / "often"
    result = train(tiny(checkpoint_seconds=1e-6, steps_per_dispatch=3), data_dir=data_dir, workdir=run_dir)
    assert {interim for step, interim in saved if step % 10} == {True}
    assert {interim for step, interim in saved if step % 10 == 0} == {False}
    assert_equal_runs(whole.run_dir, result.run_dir)
    assert list_steps(run_dir) == list_steps(whole.run_dir)
