"""A run of a Llama with all its options in number formats: its record, and what reads its checkpoint."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import make_data, rows_of, tiny

from altgrad_jax import train
from altgrad_jax.errors import UserError
from altgrad_jax.inference.evaluate import evaluate_checkpoint
from altgrad_jax.inference.generate import generate, load_model
from altgrad_jax.models.linear import Quantized
from altgrad_jax.models.model import forward
from altgrad_jax.models.parameters import count_params
from altgrad_jax.run.dry_run import dry_run

CHANGES = dict(
    model="llama",
    n_embd=32,
    n_kv_head=1,
    tied_head=False,
    qk_norm=True,
    use_fp8=True,
    formats=("E4M3", "head=E4M3", "block_*/mlp_gate:G=E5M2"),
    weights_at_rest="nearest",
    metrics="grad,format",
    max_steps=6,
    warmup_steps=2,
    eval_interval=6,
    checkpoint_interval=6,
    diagnostic_interval=6,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """(folder of the run, its rows)"""
    folder = tmp_path_factory.mktemp("llama") / "run"
    assert train(tiny(**CHANGES), data_dir=data_dir, workdir=folder).exit_code == 0
    return folder, rows_of(folder)


def test_every_layer_is_measured_and_the_loss_falls(run):
    folder, rows = run
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.1
    parts = ("attn_qkv", "attn_out", "mlp_gate", "mlp_up", "mlp_down")
    for layer in (*(f"block_0/{part}" for part in parts), "head"):
        for operand in "WAG":
            assert rows[-1][f"amax/{layer}/{operand}"] > 0
        for name in (f"stable_rank/{layer}", f"grad_norm/{layer}", f"codes_used/{layer}/W"):
            assert rows[-1][name] > 0, name
    for layer in ("block_0/q_norm", "block_0/norm_2", "norm_f", "embed"):
        assert rows[-1][f"grad_norm/{layer}"] > 0
    params = load_model(folder).params
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"]["parameters"] == count_params(params)
    assert [layer["layer"] for layer in manifest["formats"]["layers"]][:3] == [f"block_0/{part}" for part in parts[:3]]


def test_evaluation_and_text_are_those_of_the_run(run, data_dir):
    folder, rows = run
    assert np.float32(evaluate_checkpoint(folder, data_dir=data_dir).val_loss) == np.float32(rows[-1]["val_loss"])
    numpy_params, config, _, operands = load_model(folder)
    params = jax.device_put(numpy_params)
    text = generate(params, config, [84, 104], max_new_tokens=10, temperature=0.0, operands=operands)

    @jax.jit
    def logits(tokens_BL):
        return forward(config, params, tokens_BL, quantized=Quantized(operands, {})).logits

    tokens = [84, 104]
    for _ in range(10):  # without a cache
        padded = jnp.zeros((1, config.block_size), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
        tokens.append(int(jnp.argmax(logits(padded)[0, len(tokens) - 1])))
    assert tokens[2:] == text.tolist()


def test_a_dry_run_counts_what_it_has(data_dir, tmp_path, capsys):
    dry_run(tiny(**CHANGES), data_dir=data_dir, workdir=tmp_path / "run")
    said = capsys.readouterr().out
    groups = re.search(r"parameters: [\d,]+ \((.*)\)", said)
    # 32 wide, two heads of which one of keys and values, an MLP of 96.
    attention, mlp, norms = 32 * 64 + 32 * 32, 3 * 32 * 96, 3 * 32 + 2 * 16
    assert groups and groups[1] == f"embed 8,192, attention {attention:,}, MLP {mlp:,}, norms {norms}, head 8,192"
    per_token = 6 * (attention + mlp + 8192) + 12 * 32 * 16
    assert f"operations of a step: {4 * 16 * per_token / 1e9:,.4g} GFLOP by formula" in said


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
