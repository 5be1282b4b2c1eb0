"""Our Llama against transformers' LlamaForCausalLM, both ways through files on disk, and exported tokenizers.

Carries the mark `oracle`, as test_hf_oracle does. Nothing is downloaded: models are random.
"""

import jax
import numpy as np
import pytest
from test_hf_oracle import assert_equal_logits, far_from_uniform, their_logits, torch, transformers

from altgrad_jax.data.hf_tokenizer import require_vocabulary, tokenizer_files
from altgrad_jax.data.tokenizer import get_tokenizer
from altgrad_jax.models import hf
from altgrad_jax.models.llama import LlamaConfig
from altgrad_jax.models.model import forward, init_params, model_config

pytestmark = pytest.mark.oracle
__all__ = ["torch", "transformers"]  # fixtures

SIZES = dict(n_layer=2, n_head=4, n_embd=64, block_size=48, vocab_size=503, compute_dtype="float32")
KINDS = {
    "tied": dict(),
    "own head": dict(tied_head=False),
    "grouped": dict(n_kv_head=2, tied_head=False),
    "one head of keys, tied": dict(n_kv_head=1),
}
EACH_KIND = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
TOKENS_BL = np.random.default_rng(1).integers(0, 503, (3, 49))


def our_logits(params, config):
    return np.asarray(forward(config, params, TOKENS_BL[:, :-1]).logits)


@EACH_KIND
def test_transformers_computes_our_logits_and_loads_what_it_saves(transformers, torch, tmp_path, options):
    config, rng = LlamaConfig(**SIZES, **options), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: far_from_uniform(leaf, rng), jax.eval_shape(lambda: init_params(config, 0)))
    hf.write_folder(tmp_path / "out", *hf.to_hf(params, config))
    model, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert sum(array.numel() for array in model.parameters()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert_equal_logits(our_logits(params, config), their_logits(torch, model.eval(), TOKENS_BL))
    model.save_pretrained(tmp_path / "back", safe_serialization=True)
    got, settings = hf.from_hf(*hf.read_folder(tmp_path / "back"))
    assert model_config(hf.UNSAID | settings) == config
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


@EACH_KIND
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_we_compute_transformers_logits_from_its_folder(transformers, torch, tmp_path, options, dtype):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=options.get("n_kv_head", 4),
            hidden_size=64,
            intermediate_size=192,  # 8/3 of 64, rounded up to a multiple of 32
            max_position_embeddings=48,
            vocab_size=503,
            tie_word_embeddings=options.get("tied_head", True),
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs", safe_serialization=True)
    # Read again, for .to() rounds the angles of the rotation with the weights.
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    params, settings = hf.from_hf(*hf.read_folder(tmp_path / "theirs"))
    config = model_config(hf.UNSAID | settings)
    assert config == LlamaConfig(**SIZES, **options)
    # A bfloat16 file holds float32 numbers; from there both compute in float32.
    assert_equal_logits(our_logits(params, config), their_logits(torch, model, TOKENS_BL))


TEXTS = (
    "",
    "The Council shall adopt the Regulation.",
    "  two  blanks, a\ttab,\r\nnew lines\n\n and    many   ",
    "it's 1234567 €, naïve 中文 русский \U0001f600\u0301 \x00\x7f",
    "before<|endoftext|>after <|endoftext|>",
    " ".join(f"Article {i}: (a) the Member States'll re-use {i / 7:.5f}%;" for i in range(200)),
)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_auto_tokenizer_of_an_export_encodes_as_the_project_does(transformers, tmp_path, name, kind):
    config = model_config(hf.UNSAID | SIZES | {"model": kind, "n_kv_head": 0, "tied_head": True, "dropout": 0.0})
    params = jax.tree.map(np.asarray, init_params(config, 0))
    hf.write_folder(tmp_path / "out", *hf.to_hf(params, config), tokenizer_files(name, 48))
    ours, theirs = get_tokenizer(name), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(theirs), theirs.eos_token_id, theirs.model_max_length) == (ours.vocab_size, ours.eot, 48)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text, truncation=False, verbose=False)["input_ids"] == ids
        assert theirs.decode(ids) == text == ours.decode(ids)
    theirs.save_pretrained(tmp_path / "saved")
    assert require_vocabulary(tmp_path / "saved", name)
