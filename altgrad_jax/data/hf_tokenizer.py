"""Tokenizers as Hugging Face folders hold them: written for an export, compared for an import.

tokenizer.json is a whole byte-level BPE; `AutoTokenizer` reads it and encodes as `get_tokenizer(name)` does. No text is
special here, so `split_special_tokens` is set: a text that contains <|endoftext|> is thirteen characters there, too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from altgrad_jax.data.tokenizer import (
    END_OF_TEXT,
    byte_alphabet,
    get_tokenizer,
    gpt2_vocabulary,
    is_file_name,
    rank_files_dir,
)
from altgrad_jax.errors import UserError
from altgrad_jax.files import open_file, read_json

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"  # the older form, which GPT-2's folders have beside it
_FIX = "download the folder again"


def vocabulary(name: str) -> tuple[Any, list[str]]:
    """({token: id}, merges as "first second") of a tokenizer, each byte by its printable stand-in.

    Of `bytes` every id is its byte, without merges; 255 occurs in no text and is the separator. Of a tokenizer.json
    they are as its model has them.
    """
    if is_file_name(name):
        return _of_file(Path(name))
    if name == "gpt2":
        return gpt2_vocabulary(rank_files_dir())
    return {character: byte for character, byte in byte_alphabet().items() if byte != 255} | {END_OF_TEXT: 255}, []


def tokenizer_files(name: str, block_size: int) -> dict[str, str]:
    """{file name: text} of the tokenizer `name` for a model that sees `block_size` tokens."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    if is_file_name(name):
        tokenizer = get_tokenizer(name)
        config |= dict.fromkeys(("bos_token", "eos_token"), tokenizer.decode([tokenizer.eot]))
        text = Path(name).read_text(encoding="utf-8")
        return {TOKENIZER_FILE: text, TOKENIZER_CONFIG_FILE: json.dumps(config, indent=2) + "\n"}
    vocab, merges = vocabulary(name)
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": name == "gpt2"}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": get_tokenizer(name).eot, "content": END_OF_TEXT, **special}],
        "normalizer": None,
        "pre_tokenizer": levels,
        "post_processor": None,
        "decoder": levels,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return {
        TOKENIZER_FILE: json.dumps(document, ensure_ascii=False),
        TOKENIZER_CONFIG_FILE: json.dumps(config, indent=2) + "\n",
    }


def require_vocabulary(folder: Path, name: str) -> bool:
    """Whether the folder has files of a tokenizer; UserError where their vocabulary is not that of `name`."""
    found = []
    if (folder / TOKENIZER_FILE).exists():
        found.append((TOKENIZER_FILE, *_of_file(folder / TOKENIZER_FILE)))
    if (folder / VOCAB_FILE).exists():
        with open_file(folder / MERGES_FILE, _FIX) as file:
            lines = file.read().decode("utf-8", errors="replace").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        found.append((VOCAB_FILE, read_json(folder / VOCAB_FILE, _FIX), merges))
    vocab, merges = vocabulary(name)
    for file, their_vocab, their_merges in found:
        if their_vocab != vocab or their_merges != merges:
            raise UserError(
                f"{folder / file} holds another vocabulary than the tokenizer {name!r}, so the tokens would mean other "
                f"texts to the model: give a model that was trained with the tokenizer {name!r}, or name its own one."
            )
    return bool(found)


def _of_file(path: Path) -> tuple[Any, list[str]]:
    model = _object(_object(read_json(path, _FIX)).get("model"))
    return model.get("vocab"), _joined(model.get("merges"))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _joined(merges: Any) -> list[str]:
    """Merges as "first second": newer files have pairs."""
    if not isinstance(merges, list):
        return []
    return [" ".join(map(str, merge)) if isinstance(merge, list) else str(merge) for merge in merges]
