"""Weights to and from the Hugging Face folder format: config.json and model.safetensors.

The layouts are those of transformers' GPT2LMHeadModel and LlamaForCausalLM. GPT-2's Conv1D stores a weight as [inputs,
outputs], which is how our kernels lie; its q, k and v stand side by side in c_attn in our order. Llama's Linear stores
[outputs, inputs], so its weights are transposed, and q, k and v are three arrays, side by side in our attn_qkv. A tied
head is not written, and a file that carries one must carry the same numbers.

Everything that would make transformers compute another function than ours (activation, epsilon, MLP width,
attention scaling, cross attention, another rotation) is refused on import by the name of its field. What only concerns
training is carried where we have it: `dropout` is GPT-2's resid_pdrop and embd_pdrop, and Llama has none. Our models do
not drop attention probabilities, so attn_pdrop is written as 0 and not read.

Only safetensors files are read: a pickle (pytorch_model.bin) can run code when it is opened.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from altgrad_jax.conflicts import VOCABULARY_OF
from altgrad_jax.errors import UserError
from altgrad_jax.files import read_json, require_file, writing
from altgrad_jax.models import model as models
from altgrad_jax.models.config import ModelConfig
from altgrad_jax.models.gpt2 import LAYER_NORM_EPS
from altgrad_jax.models.llama import RMS_NORM_EPS, ROPE_THETA, LlamaConfig
from altgrad_jax.numerics.layers import HEAD, MODELS, hidden_width, matrix_sizes

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GPT2_END_OF_TEXT = 50256
TOKENIZER_KEY = "altgrad_tokenizer"  # our own key in config.json; transformers keeps what it does not know

# Settings of which a config.json says nothing, for a model that computes what transformers does.
UNSAID = {"compute_dtype": "float32", "norm_gains": "float32", "qk_norm": False, "smooth_swiglu": False}

_PREFIX = {"gpt2": "transformer.", "llama": "model."}
TITLES = {"gpt2": "GPT-2", "llama": "Llama"}
_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
_HEAD_ARRAY = "lm_head.weight"
# Sizes are read under these names; the right-hand side is the setting.
_SIZES = {
    "gpt2": {
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_positions": "block_size",
        "vocab_size": "vocab_size",
    },
    "llama": {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
        "max_position_embeddings": "block_size",
        "vocab_size": "vocab_size",
    },
}
# Fields that change the function: the value a missing field stands for in transformers, which is also the one
# we have.
_FIXED = {
    "gpt2": {
        "model_type": "gpt2",
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "llama": {
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": RMS_NORM_EPS,
        "attention_bias": False,
        "mlp_bias": False,
    },
}
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function
_GPT2_LAYERS = {
    "ln_1": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_out": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp_up": "mlp.c_fc",
    "mlp_down": "mlp.c_proj",
}
_LLAMA_LAYERS = {
    "attn_out": "self_attn.o_proj",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "mlp_down": "mlp.down_proj",
}
_ARRAYS = {"kernel": "weight", "scale": "weight", "bias": "bias", "embedding": "weight"}
# Causal masks and rotation frequencies that old files store beside the weights; they are constants.
_CONSTANT = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_READABLE = ("F64", "F32", "F16", "BF16")


class _Entry(NamedTuple):
    """One of our arrays and those of Hugging Face that it is made of, side by side along our last axis.

    names: without prefix. shapes: there. transposed: whether they lie the other way round there.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool = False


def _gpt2_entries(config: ModelConfig) -> Iterator[_Entry]:
    D = config.n_embd
    widths = matrix_sizes(n_embd=D, vocab_size=config.vocab_size)
    yield _Entry(("embed", "embedding"), ("wte.weight",), ((config.vocab_size, D),))
    yield _Entry(("pos_embed", "embedding"), ("wpe.weight",), ((config.block_size, D),))
    for i in range(config.n_layer):
        for layer, hf_layer in _GPT2_LAYERS.items():
            shapes = {"scale": (D,), "bias": (D,)}
            if layer in widths:
                shapes = {"kernel": widths[layer], "bias": widths[layer][1:]}
            for array, shape in shapes.items():
                yield _Entry((f"block_{i}", layer, array), (f"h.{i}.{hf_layer}.{_ARRAYS[array]}",), (shape,))
    yield _Entry(("ln_f", "scale"), ("ln_f.weight",), ((D,),))
    yield _Entry(("ln_f", "bias"), ("ln_f.bias",), ((D,),))


def _llama_entries(config: LlamaConfig) -> Iterator[_Entry]:
    D, kv = config.n_embd, config.kv_heads * config.head_width
    sizes = matrix_sizes(n_embd=D, vocab_size=config.vocab_size, model="llama")
    table = ((config.vocab_size, D),)
    yield _Entry(("embed", "embedding"), ("embed_tokens.weight",), table)
    for i in range(config.n_layer):
        block, there = f"block_{i}", f"layers.{i}"
        qkv = tuple(f"{there}.self_attn.{x}_proj.weight" for x in "qkv")
        yield _Entry((block, "norm_1", "scale"), (f"{there}.input_layernorm.weight",), ((D,),))
        yield _Entry((block, "attn_qkv", "kernel"), qkv, ((D, D), (kv, D), (kv, D)), transposed=True)
        yield _Entry((block, "norm_2", "scale"), (f"{there}.post_attention_layernorm.weight",), ((D,),))
        for layer, hf_layer in _LLAMA_LAYERS.items():
            names = (f"{there}.{hf_layer}.weight",)
            yield _Entry((block, layer, "kernel"), names, (sizes[layer][::-1],), transposed=True)
    yield _Entry(("norm_f", "scale"), ("norm.weight",), ((D,),))
    if not config.tied_head:
        yield _Entry((HEAD, "embedding"), (_HEAD_ARRAY,), table)


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    """Every array of the model."""
    return _llama_entries(config) if isinstance(config, LlamaConfig) else _gpt2_entries(config)


def _prefixed(name: str, model: str) -> str:
    return name if name == _HEAD_ARRAY else _PREFIX[model] + name


def to_hf(params, config: ModelConfig) -> tuple[dict, dict]:
    """Our parameters as (tensors, config_json) of a GPT2LMHeadModel or a LlamaForCausalLM.

    Args:
      params: nested dict of float32 arrays, as model.init_params makes it.
      config: the sizes they were made with.

    Returns:
      {"transformer.wte.weight": float32 [vocab_size, n_embd], ...} and the dict for config.json.

    Raises:
      UserError: a model that transformers' class cannot hold.
    """
    if isinstance(config, LlamaConfig) and config.qk_norm:
        raise UserError(
            "a model with qk_norm=True cannot be exported, because LlamaForCausalLM does not normalize queries and "
            "keys: train with qk_norm=False to export"
        )
    tensors = {}
    for entry in _entries(config):
        leaf = params
        for key in entry.path:
            leaf = leaf[key]
        leaf = np.asarray(leaf, np.float32)
        leaf = leaf.T if entry.transposed else leaf
        first_of = np.cumsum([shape[0] for shape in entry.shapes])[:-1]
        for name, shape, part in zip(entry.names, entry.shapes, np.split(leaf, first_of), strict=True):
            assert part.shape == shape, (entry.path, part.shape, shape)
            tensors[_prefixed(name, config.name)] = np.ascontiguousarray(part)
    config_json = _FIXED[config.name] | {
        hf_name: getattr(config, name) for hf_name, name in _SIZES[config.name].items()
    }
    config_json |= _llama_json(config) if isinstance(config, LlamaConfig) else _gpt2_json(config)
    # transformers' default for both is a token that a smaller vocabulary does not have.
    end_of_text = GPT2_END_OF_TEXT if config.vocab_size > GPT2_END_OF_TEXT else None
    common = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "use_cache": True, "dtype": "float32"}
    return tensors, config_json | {"initializer_range": 0.02} | common


def _gpt2_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [_CLASSES["gpt2"]],
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


def _llama_json(config: LlamaConfig) -> dict[str, Any]:
    return {
        "architectures": [_CLASSES["llama"]],
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": hidden_width(config.n_embd, "llama"),
        "tie_word_embeddings": config.tied_head,
        "attention_dropout": 0.0,
        # As transformers 5 writes it, and before.
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "rope_theta": ROPE_THETA,
    }


def from_hf(tensors: dict, config_json: dict) -> tuple[dict, dict]:
    """The inverse of `to_hf`, for any GPT-2 or Llama that computes what our model computes.

    Args:
      tensors: {name: float array}, names with or without the prefix "transformer." (GPT-2) or "model." (Llama).
      config_json: the content of config.json.

    Returns:
      (params, settings): nested dict of float32 NumPy arrays, and the settings that describe the model: n_layer,
      n_head, n_embd, block_size, vocab_size, dropout, and of a Llama model, n_kv_head, tied_head.

    Raises:
      UserError: a field of the config that we cannot honour, a missing or unknown array, one that has two names, a
        wrong shape, a number that is not finite, an untied head of a GPT-2.
    """
    sizes = settings_of(config_json)
    model = sizes.get("model", "gpt2")
    config = models.model_config(UNSAID | {"model": model} | sizes)
    tensors = _without_prefix(tensors, _PREFIX[model])
    params: dict[str, Any] = {}
    for entry in _entries(config):
        parts = [_take(tensors, name, shape, config) for name, shape in zip(entry.names, entry.shapes, strict=True)]
        array = np.concatenate(parts)
        parent = params
        for key in entry.path[:-1]:
            parent = parent.setdefault(key, {})
        parent[entry.path[-1]] = np.ascontiguousarray(array.T) if entry.transposed else array
    head = tensors.pop(_HEAD_ARRAY, None)
    unknown = sorted(name for name in tensors if not _CONSTANT.fullmatch(name))
    if unknown:
        raise UserError(
            f"the weights hold {len(unknown)} arrays that {TITLES[model]} does not have, the first being "
            f"{unknown[0]}; only a plain {_CLASSES[model]} (without adapters) can be imported."
        )
    table = params["embed"]["embedding"]
    if head is not None and not np.array_equal(np.asarray(head).astype(np.float32), table):
        raise UserError(
            "the weights hold an lm_head.weight that differs from the table of the embedding, but config.json ties the "
            "two; only models with equal ones can be imported so."
        )
    return params, sizes


def _without_prefix(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, array in tensors.items():
        short = name.removeprefix(prefix)
        if short in found:
            raise UserError(
                f"the weights hold the array {short} under two names, with and without {prefix!r}: take one of the two "
                "out of the file."
            )
        found[short] = array
    return found


def _take(tensors: dict[str, Any], name: str, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """Takes one array out of `tensors`, as float32."""
    if name not in tensors:
        raise UserError(
            f"the weights have no array {name}, which a {TITLES[config.name]} of {config.n_layer} blocks needs; check "
            "that config.json belongs to them."
        )
    array = np.asarray(tensors.pop(name))
    if array.shape != shape:
        raise UserError(
            f"the array {name} has shape {list(array.shape)} but config.json asks for {list(shape)}; "
            "check that config.json belongs to the weights."
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is refused
        array = array.astype(np.float32)
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise UserError(
            f"the array {name} holds {bad} numbers that are NaN or infinite in float32, from which nothing can be "
            "trained or computed: give weights that are finite."
        )
    return array


def tokenizer_of(config_json: Mapping[str, Any]) -> str | None:
    """The tokenizer that a model was trained with, as its config.json tells by our own key or by its vocabulary."""
    recorded = config_json.get(TOKENIZER_KEY)
    if isinstance(recorded, str) and recorded in VOCABULARY_OF:
        return recorded
    # GPT-2's vocabulary is often padded to a multiple of 64.
    names = {size: name for name, size in VOCABULARY_OF.items()} | {50304: "gpt2"}
    return names.get(config_json["vocab_size"])


def settings_of(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a config.json stands for, after refusing what we cannot honour; see `from_hf`."""
    model = config_json.get("model_type", "gpt2")
    if model not in MODELS:
        raise UserError(
            f"config.json has model_type = {model!r}, but only {' or '.join(map(repr, MODELS))} can be imported: give "
            "such a model."
        )
    for field, wanted in _FIXED[model].items():
        _require(config_json, field, config_json.get(field, wanted), wanted)
    for field in ("quantization_config", "pruned_heads"):
        if config_json.get(field):
            raise UserError(
                f"config.json has {field}, which cannot be imported; give the full model in float32, float16 "
                "or bfloat16."
            )
    sizes = {name: _whole_number(config_json, field) for field, name in _SIZES[model].items()}
    if sizes["n_embd"] % sizes["n_head"]:
        names = {name: field for field, name in _SIZES[model].items()}
        raise UserError(
            f"config.json has {names['n_embd']} = {sizes['n_embd']}, which {names['n_head']} = {sizes['n_head']} must "
            "divide and does not."
        )
    return sizes | (_llama_settings(config_json, sizes) if model == "llama" else _gpt2_settings(config_json, sizes))


def _require(config_json: Mapping[str, Any], field: str, value: Any, *wanted: Any) -> None:
    if value not in wanted:
        raise UserError(
            f"config.json has {field} = {value!r}, but only {' or '.join(map(repr, wanted))} can be imported: give a "
            "model that has it, for the one here computes nothing else."
        )


def _whole_number(config_json: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config_json.get(field, default)
    if type(value) is not int or value < 1:
        raise UserError(f"config.json has {field} = {value!r}, but the model needs a positive whole number.")
    return value


def _gpt2_settings(config_json: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    _require(config_json, "activation_function", config_json.get("activation_function", "gelu_new"), *_TANH_GELUS)
    inner = config_json.get("n_inner")
    if inner not in (None, 4 * sizes["n_embd"]):
        raise UserError(
            f"config.json has n_inner = {inner!r}, but only null or 4 n_embd = {4 * sizes['n_embd']} can be "
            "imported: give a model of that width."
        )
    dropouts = [config_json.get(field, 0.1) for field in ("resid_pdrop", "embd_pdrop")]
    if dropouts[0] != dropouts[1]:
        raise UserError(
            f"config.json has resid_pdrop = {dropouts[0]!r} and embd_pdrop = {dropouts[1]!r}, but there is "
            "one dropout here; make them equal."
        )
    if type(dropouts[0]) not in (int, float) or not 0 <= dropouts[0] < 1:
        raise UserError(f"config.json has resid_pdrop = {dropouts[0]!r}, but it must be a number from 0 to below 1.")
    return {"dropout": float(dropouts[0])}


def _llama_settings(config_json: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    D, H = sizes["n_embd"], sizes["n_head"]
    # transformers' own default of the width of the MLP is that of the 7B model.
    _require(config_json, "intermediate_size", config_json.get("intermediate_size", 11008), hidden_width(D, "llama"))
    _require(config_json, "head_dim", config_json.get("head_dim"), None, D // H)
    rope = config_json.get("rope_parameters") or config_json.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json has rope_parameters = {rope!r}, but it must be an object.")
    _require(config_json, "rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    _require(config_json, "rope_theta", rope.get("rope_theta", config_json.get("rope_theta", ROPE_THETA)), ROPE_THETA)
    n_kv_head = _whole_number(config_json, "num_key_value_heads", H)
    if H % n_kv_head:
        raise UserError(
            f"config.json has num_key_value_heads = {n_kv_head}, which must divide num_attention_heads = {H} and does "
            "not."
        )
    tied = config_json.get("tie_word_embeddings", False)
    _require(config_json, "tie_word_embeddings", tied, True, False)
    return {"model": "llama", "n_kv_head": n_kv_head if n_kv_head < H else 0, "tied_head": tied, "dropout": 0.0}


def write_folder(folder, tensors: dict, config_json: dict, files: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes `to_hf`'s result as a new folder; it appears complete or not at all.

    Args:
      files: {name: text} of what else lies in it, such as the tokenizer (data.hf_tokenizer).

    Raises:
      UserError: `folder` exists and is not an empty folder, or cannot be written.
    """
    folder = refuse_occupied(folder)
    unfinished = folder.parent / f".{folder.name}.{os.getpid()}.unfinished"
    with writing(folder, "give another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        _fill(folder, unfinished, tensors, config_json, files)


def _fill(folder, unfinished, tensors, config_json, files):
    try:
        # transformers looks for this word; it means row-major arrays, which is what NumPy writes.
        try:
            safetensors.numpy.save_file(tensors, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # its own class for a full disk, too
            raise OSError(str(error)) from None
        (unfinished / CONFIG_FILE).write_text(json.dumps(config_json, indent=2, sort_keys=True) + "\n")
        for name, text in files.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        # safetensors makes a file for its owner alone; this gives it the usual rights.
        shutil.copymode(unfinished / CONFIG_FILE, unfinished / WEIGHTS_FILE)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def refuse_occupied(folder) -> Path:
    """`folder` made absolute, if nothing is overwritten by writing there; else UserError."""
    folder = Path(folder).absolute()
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; nothing is overwritten, so give another path.")
    return folder


def read_folder(folder) -> tuple[dict, dict]:
    """(tensors, config_json) of a folder with config.json and model.safetensors, or its shards.

    Arrays of float16, bfloat16 and float64 come as they are in the file.

    Raises:
      UserError: the folder or a file is missing or damaged, the weights are a pickle, or an array is not
        floating point.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds {CONFIG_FILE} and {WEIGHTS_FILE}.")
    config_json = _read_json(folder / CONFIG_FILE)
    if (folder / WEIGHTS_FILE).is_file():
        files = [WEIGHTS_FILE]
    elif (folder / INDEX_FILE).is_file():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not files or not all(
            isinstance(file, str) and file == Path(file).name and file not in ("", "..") for file in files
        ):
            raise UserError(
                f"{folder / INDEX_FILE} has a weight_map that does not name files of the folder; download "
                "the folder again."
            )
    elif list(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has its weights as a pickle ({next(folder.glob('*.bin')).name}), which can run code "
            "when it is opened; convert it with transformers' save_pretrained(..., safe_serialization=True)."
        )
    else:
        raise UserError(f"{folder} has no {WEIGHTS_FILE}; give a folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}.")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(files)):
        found = _read_safetensors(folder / file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(
                f"{folder} holds the array {twice[0]} in {file} and in another file of the weights; download the "
                "folder again."
            )
        tensors |= found
    return tensors, config_json


def _read_json(path):
    content = read_json(path, "give a Hugging Face folder, or download it again")
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__} where a JSON object is expected; download the folder again."
        )
    return content


def _read_safetensors(path):
    tensors = {}
    require_file(path, "download the folder again")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():
                kind = file.get_slice(name).get_dtype()
                if _CONSTANT.fullmatch(name.removeprefix("transformer.").removeprefix("model.")):
                    continue
                if kind not in _READABLE:
                    raise UserError(
                        f"{path} stores {name} as {kind}, but only {', '.join(_READABLE)} can be imported: give "
                        "weights that are not quantized."
                    )
                tensors[name] = file.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); download the folder again.") from None
    return tensors
