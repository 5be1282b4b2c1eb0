"""A run of a Llama by a recipe that starts from weights: its record, its resume, and what reads its checkpoint."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_initial import SIZES, write
from test_training import make_data, rows_of, state_bytes, tiny

from altgrad_jax import train
from altgrad_jax.errors import UserError
from altgrad_jax.inference.evaluate import evaluate_checkpoint
from altgrad_jax.inference.generate import generate, load_model
from altgrad_jax.models.linear import Quantized
from altgrad_jax.models.llama import LlamaConfig
from altgrad_jax.models.model import forward
from altgrad_jax.models.parameters import count_params
from altgrad_jax.run.checkpoint import load_arrays
from altgrad_jax.run.dry_run import dry_run
from altgrad_jax.run.initial import parameters_sha256
from altgrad_jax.run.sweep import program_key

OPTIONS = dict(n_kv_head=1, tied_head=False)
# One program for all tests of this file.
CHANGES = dict(
    OPTIONS,
    model="llama",
    n_embd=32,
    block_size=32,
    recipe=("mxfp8",),
    metrics="grad",
    max_steps=4,
    warmup_steps=1,
    eval_interval=4,
    checkpoint_interval=2,
    diagnostic_interval=4,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(Hugging Face folder, its weights)"""
    folder = tmp_path_factory.mktemp("source") / "folder"
    return folder, write(folder, LlamaConfig(**SIZES, **OPTIONS))


@pytest.fixture(scope="module")
def still(source, data_dir, tmp_path_factory):
    """A run from the folder with a learning rate of next to nothing."""
    run = tmp_path_factory.mktemp("still") / "run"
    config = tiny(**CHANGES, init_from=str(source[0]), learning_rate=1e-12, weight_decay=0.0)
    assert train(config, data_dir=data_dir, workdir=run).exit_code == 0
    return run


def test_a_run_starts_from_the_weights_and_says_which(source, still):
    folder, params = source
    arrays, meta = load_arrays(still, None, ("params/",))
    for x, y in zip(jax.tree.leaves(arrays["params"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-8)  # Adam's update is about the learning rate
    manifest = json.loads((still / "manifest.json").read_text())
    assert manifest["init_from"] == {"path": str(folder), "kind": "huggingface", "sha256": parameters_sha256(params)}
    assert manifest["starts"][0]["step"] == 0 and meta["step"] == 4
    assert manifest["model"]["parameters"] == count_params(params)


def test_a_run_from_a_run_is_resumed_to_the_bit_and_never_starts_from_other_weights(still, data_dir, tmp_path):
    source, whole, cut = tmp_path / "source", tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(still, source)
    config = tiny(**CHANGES, init_from=str(source))
    train(config, data_dir=data_dir, workdir=whole)
    began_from = json.loads((whole / "manifest.json").read_text())["init_from"]
    assert (began_from["kind"], began_from["step"]) == ("checkpoint", 4)
    assert began_from["sha256"] == parameters_sha256(load_arrays(source, None, ("params/",))[0]["params"])
    assert rows_of(whole)[-1]["loss"] < rows_of(whole)[1]["loss"] - 0.02

    # Killed after its second checkpoint, a run goes on without its source, and ends in the same bits.
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "4")
    (cut / "verdict.json").unlink()
    shutil.rmtree(source)
    train(config, data_dir=data_dir, workdir=cut)
    assert state_bytes(cut, 4) == state_bytes(whole, 4)
    # Without a checkpoint it would have to start again, from what is gone.
    shutil.rmtree(cut)
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("[0-9]*", "timing.jsonl", "verdict.json"))
    with pytest.raises(UserError, match="holds no weights: give a Hugging Face folder"):
        train(config, data_dir=data_dir, workdir=cut)
    write(source, LlamaConfig(**SIZES, **OPTIONS), seed=9)
    with pytest.raises(UserError, match="began from other weights"):
        train(config, data_dir=data_dir, workdir=cut)


def test_members_that_differ_in_their_source_share_a_program():
    a, b = (program_key(tiny(**CHANGES, init_from=path)) for path in ("a", "b"))
    assert a == b != program_key(tiny(**CHANGES | {"tied_head": True}))


def test_every_layer_is_measured(still):
    row = rows_of(still)[-1]
    parts = ("norm_1", "attn_qkv", "attn_out", "norm_2", "mlp_gate", "mlp_up", "mlp_down")
    for layer in (*(f"block_0/{part}" for part in parts), "embed", "norm_f", "head"):
        assert row[f"grad_norm/{layer}"] > 0, layer
        if "norm" not in layer:
            assert row[f"stable_rank/{layer}"] >= 1, layer


def test_evaluation_and_text_are_those_of_the_run(still, data_dir):
    found = evaluate_checkpoint(still, data_dir=data_dir).val_loss
    assert np.float32(found) == np.float32(rows_of(still)[-1]["val_loss"])
    params, config, _, operands = load_model(still)
    text = generate(params, config, [84, 104], max_new_tokens=4, temperature=0.0, operands=operands)
    # The first new token is the most likely one of a pass without a cache.
    logits_LV = forward(config, params, np.array([[84, 104]]), quantized=Quantized(operands, {})).logits[0]
    assert text.shape == (4,) and text[0] == np.argmax(logits_LV[-1])


def test_a_dry_run_counts_what_it_has(data_dir, tmp_path, capsys):
    dry_run(tiny(**CHANGES), data_dir=data_dir, workdir=tmp_path / "run")
    said = capsys.readouterr().out
    # 32 wide, two heads of queries and one of keys and values, an MLP of 96.
    attention, mlp, norms = 32 * 64 + 32 * 32, 3 * 32 * 96, 3 * 32
    assert f"parameters: {2 * 8192 + attention + mlp + norms:,}\n" in said
    per_token = 6 * (attention + mlp + 8192) + 12 * 32 * 32
    assert f"operations of a step: {4 * 32 * per_token / 1e9:,.4g} GFLOP by formula" in said


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model="llama", n_head=4, n_kv_head=3), "n_kv_head=3 cannot be shared by n_head=4"),
        (dict(model="llama", n_embd=6, n_head=2), "cannot rotate heads of n_embd / n_head = 3"),
        (dict(qk_norm=True), "qk_norm=True has no effect with model='gpt2'"),
        (dict(model="llama", recipe=("mxfp8",), n_embd=16, block_size=32), "mlp_down|attn_qkv"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data_dir, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train(tiny(**changes), data_dir=data_dir, workdir=tmp_path / "run")


def test_a_run_with_both_options_is_resumed_to_the_bit_and_logs_its_gains(data_dir, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config = tiny(**CHANGES, smooth_swiglu=True, norm_gains="mxfp8_floor")
    assert train(config, data_dir=data_dir, workdir=whole).exit_code == 0
    row = rows_of(whole)[-1]
    assert 0 <= row["gain_top_code/all"] <= 1 and 0 <= row["gain_one_value/block_0/norm_1"] <= 1
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "4")
    (cut / "verdict.json").unlink()
    train(config, data_dir=data_dir, workdir=cut)
    assert state_bytes(cut, 4) == state_bytes(whole, 4)
    found = evaluate_checkpoint(whole, data_dir=data_dir).val_loss
    assert np.float32(found) == np.float32(row["val_loss"])
