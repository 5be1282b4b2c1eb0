"""Runs that start from weights: what is taken, what the record keeps of it, and what is refused."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_training import make_data, tiny

from altgrad_jax import train
from altgrad_jax.data.hf_tokenizer import require_vocabulary, tokenizer_files
from altgrad_jax.errors import UserError
from altgrad_jax.models import hf
from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.models.llama import LlamaConfig
from altgrad_jax.models.model import init_params
from altgrad_jax.run.initial import initial_for, read_initial

SIZES = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=256, compute_dtype="float32")
RUN = dict(n_embd=32, max_steps=4, warmup_steps=1, eval_interval=4, checkpoint_interval=2, diagnostic_interval=4)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def write(folder, config, seed=0):
    """A Hugging Face folder with a model of random weights and the tokenizer `bytes`; returns the weights."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    params = jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape) + (leaf.ndim == 1)).astype(np.float32), shapes
    )
    tensors, config_json = hf.to_hf(params, config)
    files = tokenizer_files("bytes", config.block_size)
    hf.write_folder(folder, tensors, config_json | {"altgrad_tokenizer": "bytes"}, files)
    return params


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "folder"
    return folder, write(folder, GPTConfig(**SIZES))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_gpt2_takes_its_first_positions(gpt2):
    folder, params = gpt2
    shapes = jax.eval_shape(lambda: init_params(GPTConfig(**SIZES | {"block_size": 16}), 0))
    found = initial_for(tiny(**RUN, init_from=str(folder)), shapes).params
    assert_same(found, params | {"pos_embed": {"embedding": params["pos_embed"]["embedding"][:16]}})


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_layer=2), r"n_layer=1 \(here 2\): set --config.n_layer=1, or give other weights"),
        (dict(model="llama"), r"model='gpt2' \(here 'llama'\)"),
        (dict(block_size=64), "32 learned positions, fewer than block_size=64: set block_size to 32"),
        (dict(init_from="nowhere"), "nowhere' holds no weights"),
    ],
)
def test_weights_of_another_model_are_refused(gpt2, data_dir, tmp_path, changes, words):
    config = tiny(**{**RUN, "init_from": str(gpt2[0]), **changes})
    with pytest.raises(UserError, match=words):
        train(config, data_dir=data_dir, workdir=tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_llama_folder_and_back_is_the_identity(tmp_path):
    """Grouped queries, a head of its own, and fewer kinds of arrays than GPT-2."""
    for name, options in {"grouped": dict(n_kv_head=1, tied_head=False), "plain": {}}.items():
        params = write(tmp_path / name, config := LlamaConfig(**SIZES, **options))
        got = read_initial(tmp_path / name)
        assert_same(got.params, params)
        assert jax.tree.structure(got.params) == jax.tree.structure(params)
        settings = {k: v for k, v in got.settings.items() if k not in ("model", "tokenizer")}
        assert LlamaConfig(**settings, compute_dtype="float32") == config
        assert got.settings["model"] == "llama" and got.settings["tokenizer"] == "bytes"
    with pytest.raises(UserError, match="qk_norm=True cannot be exported"):
        hf.to_hf(params, LlamaConfig(**SIZES, qk_norm=True))


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 1e-5),
        ("intermediate_size", 100),
        ("head_dim", 8),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 10000.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500000.0}),
        ("attention_bias", True),
        ("num_key_value_heads", 0),
        ("model_type", "mistral"),
    ],
)
def test_a_llama_that_computes_another_function_is_refused_by_name(field, value):
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(lambda: init_params(LlamaConfig(**SIZES), 0))
    )
    tensors, config_json = hf.to_hf(params, LlamaConfig(**SIZES))
    hf.from_hf(tensors, config_json)
    with pytest.raises(UserError, match=field.replace("rope_parameters", "rope_")):
        hf.from_hf(tensors, config_json | {field: value})


def test_damaged_weights_are_refused_in_one_sentence(gpt2, tmp_path):
    tensors, config_json = hf.read_folder(gpt2[0])
    bad = tensors["transformer.wte.weight"].copy()
    bad[3, 4] = np.nan
    with pytest.raises(UserError, match="wte.weight holds 1 numbers that are NaN or infinite"):
        hf.from_hf(tensors | {"transformer.wte.weight": bad}, config_json)
    huge = tensors["transformer.ln_f.bias"].astype(np.float64)
    huge[0] = 1e300  # finite in the file, infinite here
    with pytest.raises(UserError, match="ln_f.bias holds 1 numbers"):
        hf.from_hf(tensors | {"transformer.ln_f.bias": huge}, config_json)
    with pytest.raises(UserError, match="array wte.weight under two names"):
        hf.from_hf(tensors | {"wte.weight": bad}, config_json)

    shards = tmp_path / "shards"
    shards.mkdir()
    names = sorted(tensors)
    for i, part in enumerate((names[:5], names[4:]), 1):
        safetensors.numpy.save_file({name: tensors[name] for name in part}, shards / f"part-{i}.safetensors")
    (shards / "config.json").write_text(json.dumps(config_json))
    weight_map = {name: f"part-{1 + (i > 4)}.safetensors" for i, name in enumerate(names)}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=f"array {names[4]} in part-2.safetensors and in another file"):
        hf.read_folder(shards)


def test_another_vocabulary_is_refused(gpt2, data_dir, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(gpt2[0], folder)
    assert require_vocabulary(folder, "bytes")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["a"], document["model"]["vocab"]["b"] = 98, 97
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="tokenizer.json holds another vocabulary than the tokenizer 'bytes'"):
        train(tiny(**RUN, init_from=str(folder)), data_dir=data_dir, workdir=tmp_path / "run")
    # GPT-2's own: as one file, and as the two older ones.
    for name, text in tokenizer_files("gpt2", 8).items():
        (folder / name).write_text(text)
    assert require_vocabulary(folder, "gpt2")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"], ""]))
    assert require_vocabulary(folder, "gpt2")
    model["merges"][:2] = model["merges"][1::-1]
    (folder / "merges.txt").write_text("\n".join(model["merges"]))
    with pytest.raises(UserError, match="vocab.json holds another vocabulary than the tokenizer 'gpt2'"):
        require_vocabulary(folder, "gpt2")
    for name in ("tokenizer.json", "vocab.json"):
        (folder / name).unlink()
    assert not require_vocabulary(folder, "gpt2")


def test_the_example_fine_tunes_in_bfloat16_and_mxfp8(gpt2, data_dir, tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[1] / "examples" / "finetune_gpt2.py"
    words = [str(gpt2[0]), f"--data_dir={data_dir}", f"--out={tmp_path}", "--steps=8", "--learning_rate=3e-3"]
    monkeypatch.setattr(sys, "argv", [str(script), *words, "--block_size=32"])
    runpy.run_path(str(script), run_name="__main__")
    head, *rows = capsys.readouterr().out.strip().splitlines()[-3:]
    assert head.split() == ["numbers", "loss", "before", "after", "than", "bfloat16"]
    losses = {name: [float(number) for number in numbers] for name, *numbers in map(str.split, rows)}
    assert list(losses) == ["bfloat16", "mxfp8"]
    for before, after, _ in losses.values():
        assert after < before - 0.05
    assert 0 < abs(losses["mxfp8"][0] - losses["bfloat16"][0]) < 0.05  # other numbers, nearly the same model
