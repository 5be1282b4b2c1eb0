"""Hugging Face folders: names and layout, the way there and back, and everything that must be refused."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from altgrad_jax import cli
from altgrad_jax.errors import UserError
from altgrad_jax.models import hf
from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.models.model import init_params

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=12, vocab_size=31, dropout=0.25, compute_dtype="float32")
SCRIPT = Path(__file__).parents[1] / "scripts" / "export_hf.py"


@pytest.fixture(scope="module")
def params():
    tree = jax.jit(init_params, static_argnums=0)(TINY, 0)
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)  # so that no two arrays, biases and scales included, are alike
    return jax.tree.unflatten(structure, [rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture
def exported(params):
    return hf.to_hf(params, TINY)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("export_hf", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype == np.float32
        np.testing.assert_array_equal(x, y)


def test_names_shapes_and_layout_are_gpt2s(params, exported):
    tensors, _ = exported
    want = {
        "transformer.wte.weight": (31, 8),
        "transformer.wpe.weight": (12, 8),
        "transformer.ln_f.weight": (8,),
        "transformer.ln_f.bias": (8,),
    }
    for i in range(2):
        for layer, shape in {
            "ln_1": (8,),
            "attn.c_attn": (8, 24),
            "attn.c_proj": (8, 8),
            "ln_2": (8,),
            "mlp.c_fc": (8, 32),
            "mlp.c_proj": (32, 8),
        }.items():
            want |= {
                f"transformer.h.{i}.{layer}.weight": shape,
                f"transformer.h.{i}.{layer}.bias": shape[-1:],
            }
    assert {name: array.shape for name, array in tensors.items()} == want
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}
    block = params["block_1"]
    for name, array in [
        ("attn.c_attn.weight", block["attn_qkv"]["kernel"]),
        ("ln_2.weight", block["ln_2"]["scale"]),
        ("mlp.c_proj.weight", block["mlp_down"]["kernel"]),
        ("ln_1.bias", block["ln_1"]["bias"]),
    ]:
        np.testing.assert_array_equal(tensors["transformer.h.1." + name], array)


def test_config_json_says_what_transformers_needs(exported):
    _, config_json = exported
    wanted = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "n_positions": 12,
        "vocab_size": 31,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.25,
        "embd_pdrop": 0.25,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    assert {name: config_json[name] for name in wanted} == wanted


def test_end_of_text_is_named_where_the_vocabulary_has_it():
    for vocab_size, token in [(50256, None), (50257, 50256)]:
        config = GPTConfig(n_layer=1, n_head=1, n_embd=1, block_size=1, vocab_size=vocab_size)
        zeros = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(lambda: init_params(config, 0))
        )
        _, config_json = hf.to_hf(zeros, config)
        assert (config_json["bos_token_id"], config_json["eos_token_id"]) == (token, token)


def test_folder_and_back_is_the_identity(params, exported, tmp_path):
    hf.write_folder(tmp_path / "a" / "out", *exported)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "a" / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert len({path.stat().st_mode for path in (tmp_path / "a" / "out").iterdir()}) == 1
    got, sizes = hf.from_hf(*hf.read_folder(tmp_path / "a" / "out"))
    assert_same_tree(got, params)
    assert GPTConfig(**sizes, compute_dtype="float32") == TINY


def test_old_files_have_no_prefix_and_carry_masks_and_the_head(params, exported):
    tensors = {name.removeprefix("transformer."): array for name, array in exported[0].items()}
    tensors |= {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 12, 12), np.uint8)),
        "h.1.attn.masked_bias": np.float32(-1e4),
        "lm_head.weight": tensors["wte.weight"].copy(),
    }
    got, _ = hf.from_hf(tensors, exported[1])
    assert_same_tree(got, params)


def test_missing_config_fields_stand_for_transformers_defaults(params, exported):
    sizes = {name: exported[1][name] for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
    got, kwargs = hf.from_hf(exported[0], sizes)
    assert_same_tree(got, params)
    assert kwargs["dropout"] == 0.1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_become_float32(exported, tmp_path, dtype):
    hf.write_folder(tmp_path / "out", {name: array.astype(dtype) for name, array in exported[0].items()}, exported[1])
    got, _ = hf.from_hf(*hf.read_folder(tmp_path / "out"))
    table = got["embed"]["embedding"]
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, exported[0]["transformer.wte.weight"].astype(dtype).astype(np.float32))


def test_shards_are_read(params, exported, tmp_path):
    hf.write_folder(tmp_path / "out", *exported)
    (tmp_path / "out" / "model.safetensors").unlink()
    names = sorted(exported[0])
    weight_map = {}
    for i, part in enumerate((names[:5], names[5:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({name: exported[0][name] for name in part}, tmp_path / "out" / file)
        weight_map |= {name: file for name in part}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    got, _ = hf.from_hf(*hf.read_folder(tmp_path / "out"))
    assert_same_tree(got, params)
    (tmp_path / "out" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        hf.read_folder(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../secret.safetensors"}}')
    with pytest.raises(UserError, match="weight_map"):
        hf.read_folder(tmp_path / "out")


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "gptj"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 31),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("quantization_config", {"bits": 8}),
        ("pruned_heads", {"0": [1]}),
        ("embd_pdrop", 0.5),
        ("resid_pdrop", None),
        ("n_layer", None),
        ("n_embd", 0),
        ("n_head", 3),
        ("n_head", True),
        ("vocab_size", "31"),
        ("n_positions", 1.5),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_field(exported, field, value):
    with pytest.raises(UserError, match=field):
        hf.from_hf(exported[0], exported[1] | {field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"n_inner": 32},
        {"activation_function": "gelu_pytorch_tanh"},
        {"n_ctx": 12},
        {"attn_pdrop": 0.1},
        {"reorder_and_upcast_attn": True},
    ],
)
def test_a_config_that_means_the_same_is_accepted(params, exported, fields):
    assert_same_tree(hf.from_hf(exported[0], exported[1] | fields)[0], params)


def test_weights_that_do_not_fit_are_refused(exported):
    tensors, config_json = exported
    name = "transformer.h.1.mlp.c_fc.weight"
    with pytest.raises(UserError, match=r"no array h\.1\.mlp\.c_fc\.weight"):
        hf.from_hf({key: array for key, array in tensors.items() if key != name}, config_json)
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight has shape \[32, 8\]"):
        hf.from_hf(tensors | {name: tensors[name].T}, config_json)
    with pytest.raises(UserError, match="h.2.ln_1.weight"):
        hf.from_hf(tensors | {"transformer.h.2.ln_1.weight": np.ones(8, np.float32)}, config_json)
    with pytest.raises(UserError, match="lm_head"):
        hf.from_hf(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, config_json)


def test_a_folder_that_cannot_be_read_is_refused(exported, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        hf.read_folder(tmp_path / "nowhere")
    folder = tmp_path / "out"
    hf.write_folder(folder, *exported)
    weights = (folder / "model.safetensors").read_bytes()
    for content in (weights[:-1], weights[:100], b"", b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            hf.read_folder(folder)
    safetensors.numpy.save_file({"transformer.wte.weight": np.ones((3, 2), np.int8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="I8"):
        hf.read_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        hf.read_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        hf.read_folder(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="JSON object"):
        hf.read_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is missing"):
        hf.read_folder(folder)


def test_a_pickle_is_never_opened(exported, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(exported[1]))
    # A pickle that would create a file if it were loaded.
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/ran'\ntR.")
    with pytest.raises(UserError, match="convert it with transformers' save_pretrained"):
        hf.read_folder(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_overwritten_and_a_failed_write_leaves_nothing(exported, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        hf.write_folder(tmp_path / "full", *exported)
    with pytest.raises(UserError, match="not an empty folder"):
        hf.write_folder(tmp_path / "full" / "notes.txt", *exported)
    (tmp_path / "empty").mkdir()
    hf.write_folder(tmp_path / "empty", *exported)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(hf.json, "dumps", fail)
    with pytest.raises(UserError, match="half cannot be written .disk full"):
        hf.write_folder(tmp_path / "half", *exported)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def run(script, arguments):
    _, values = cli.parse(arguments, script.FLAGS, config=False, arguments=script.ARGUMENTS)
    script.run(**values)


def test_script_imports_a_folder_and_exports_the_same(params, exported, tmp_path, script, capsys):
    hf.write_folder(tmp_path / "in", exported[0], exported[1] | {"attn_pdrop": 0.1})
    arguments = ["--import", str(tmp_path / "in"), str(tmp_path / "run")]
    with pytest.raises(UserError, match="--tokenizer"):
        run(script, arguments)
    # A vocabulary of 31 is smaller than any tokenizer's.
    with pytest.raises(UserError, match="vocab_size=31 is too small"):
        run(script, [*arguments, "--tokenizer", "bytes"])
    assert not (tmp_path / "run").exists()

    config = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=12, vocab_size=256, compute_dtype="float32")
    params = params | {"embed": {"embedding": np.random.default_rng(1).standard_normal((256, 8)).astype(np.float32)}}
    hf.write_folder(tmp_path / "in256", *hf.to_hf(params, config))
    run(script, ["--import", str(tmp_path / "in256"), str(tmp_path / "run")])
    assert "step 0" in capsys.readouterr().out
    with pytest.raises(UserError, match="not an empty folder"):
        run(script, ["--import", str(tmp_path / "in256"), str(tmp_path / "run")])

    run(script, [str(tmp_path / "run"), str(tmp_path / "out"), "--step", "0"])
    tensors, config_json = hf.read_folder(tmp_path / "out")
    got, sizes = hf.from_hf(tensors, config_json)
    assert_same_tree(got, jax.tree.map(np.asarray, params))
    assert GPTConfig(**sizes, compute_dtype="float32") == config
    assert config_json["altgrad_tokenizer"] == "bytes"
    with pytest.raises(UserError, match="step 7"):
        run(script, [str(tmp_path / "run"), str(tmp_path / "other"), "--step", "7"])


@pytest.mark.parametrize("arguments", [["--import", "a", "b", "--step", "1"], ["a", "b", "--tokenizer", "gpt2"]])
def test_script_refuses_flags_that_it_would_ignore(script, arguments):
    with pytest.raises(UserError, match="cannot be used|only for"):
        run(script, arguments)


@pytest.mark.parametrize(
    "config_json, tokenizer",
    [
        ({"vocab_size": 50257}, "gpt2"),
        ({"vocab_size": 50304}, "gpt2"),
        ({"vocab_size": 256}, "bytes"),
        ({"vocab_size": 300, "altgrad_tokenizer": "bytes"}, "bytes"),
    ],
)
def test_tokenizer_of_an_imported_model(config_json, tokenizer):
    assert hf.tokenizer_of(config_json) == tokenizer


def test_to_hf_takes_device_arrays(params, exported):
    on_device = jax.tree.map(jnp.asarray, params)
    for name, array in hf.to_hf(on_device, TINY)[0].items():
        assert isinstance(array, np.ndarray) and array.flags.c_contiguous
        np.testing.assert_array_equal(array, exported[0][name])


@pytest.mark.parametrize("weight_map", ['{"a": 5}', '{"a": ""}', '{"a": ".."}'])
def test_an_index_that_names_no_file_is_refused(tmp_path, weight_map):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(UserError, match="weight_map that does not name files"):
        hf.read_folder(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/out cannot be written .*give another folder"):
        hf.write_folder(tmp_path / "file" / "out", {}, {})


def test_a_tokenizer_that_is_no_name_is_passed_over():
    assert hf.tokenizer_of({"altgrad_tokenizer": ["bytes"], "vocab_size": 256}) == "bytes"
