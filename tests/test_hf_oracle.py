"""Our GPT-2 against transformers' GPT2LMHeadModel, both ways through files on disk.

Needs torch and transformers (the extra `oracle`), and so carries the mark `oracle`: `make test` leaves it out
and .ci/run runs it. A missing package is a failure, never a skip. Nothing is downloaded: models are random.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.models import hf
from altgrad_jax.models.gpt2 import GPT, GPTConfig
from altgrad_jax.models.model import init_params

pytestmark = pytest.mark.oracle

CONFIG = GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=48, vocab_size=503, compute_dtype="float32")


@pytest.fixture(scope="module")
def transformers():
    # Set before the import, which reads it: a test must not reach for the network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


def far_from_uniform(leaf, rng):
    """A random array that makes attention and predictions uneven, biases and scales included."""
    values = rng.standard_normal(leaf.shape) * (0.15 if leaf.ndim == 2 else 0.1)
    return (values + (1.0 if leaf.ndim == 1 else 0.0)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: far_from_uniform(leaf, rng), jax.eval_shape(lambda: init_params(CONFIG, 0)))


@pytest.fixture(scope="module")
def tokens_BL():
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, CONFIG.block_size + 1))


def our_loss(params, config, tokens_BL):
    log_probability_BLV = jax.nn.log_softmax(GPT(config).apply({"params": params}, tokens_BL[:, :-1]).logits)
    return -jnp.mean(jnp.take_along_axis(log_probability_BLV, tokens_BL[:, 1:, None], -1))


def our_logits(params, config, tokens_BL):
    return np.asarray(GPT(config).apply({"params": params}, tokens_BL[:, :-1]).logits)


def their_logits(torch, model, tokens_BL):
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BL[:, :-1])).logits.numpy()


def assert_equal_logits(ours, theirs):
    assert np.abs(theirs).max() > 1
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-4


def test_transformers_computes_our_logits_from_an_exported_folder(transformers, torch, params, tokens_BL, tmp_path):
    hf.write_folder(tmp_path / "out", *hf.to_hf(params, CONFIG))
    model, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    assert_equal_logits(our_logits(params, CONFIG, tokens_BL), their_logits(torch, model.eval(), tokens_BL))


def test_loss_and_every_gradient_are_transformers(transformers, torch, params, tokens_BL, tmp_path):
    hf.write_folder(tmp_path / "out", *hf.to_hf(params, CONFIG))
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    # The last token is nobody's input here but would be theirs, so the loss is taken from the logits.
    logits = model(torch.from_numpy(tokens_BL[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens_BL[:, 1:]).flatten())
    loss.backward()
    got_loss, got = jax.value_and_grad(our_loss)(params, CONFIG, tokens_BL)
    assert abs(float(got_loss) - loss.item()) < 1e-5
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    ours, _ = hf.to_hf(got, CONFIG)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert np.abs(ours[name] - gradient).max() < 1e-5, name
        assert np.abs(ours[name] - gradient).max() < 1e-3 * max(np.abs(gradient).max(), 1e-4), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_we_compute_transformers_logits_from_its_folder(transformers, torch, tokens_BL, tmp_path, dtype):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=3,
            n_head=4,
            n_embd=64,
            n_positions=48,
            vocab_size=503,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    params, sizes = hf.from_hf(*hf.read_folder(tmp_path / "theirs"))
    assert sizes == {
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 64,
        "block_size": 48,
        "vocab_size": 503,
        "dropout": 0.1,
    }
    config = GPTConfig(**sizes, compute_dtype="float32")
    # A bfloat16 file holds float32 numbers; from there both compute in float32.
    assert_equal_logits(our_logits(params, config, tokens_BL), their_logits(torch, model.float(), tokens_BL))


def test_an_import_of_an_export_by_transformers_is_the_identity(transformers, params, tmp_path):
    hf.write_folder(tmp_path / "ours", *hf.to_hf(params, CONFIG))
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    got, sizes = hf.from_hf(*hf.read_folder(tmp_path / "theirs"))
    assert GPTConfig(**sizes, compute_dtype="float32") == CONFIG
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)


def test_transformers_keeps_our_own_key_in_the_config(transformers, params, tmp_path):
    tensors, config_json = hf.to_hf(params, CONFIG)
    hf.write_folder(tmp_path / "ours", tensors, config_json | {"altgrad_tokenizer": "bytes"})
    assert transformers.GPT2Config.from_pretrained(tmp_path / "ours").altgrad_tokenizer == "bytes"
