"""GPT-2 weights to and from the Hugging Face folder format: config.json and model.safetensors.

The layout is that of transformers' GPT2LMHeadModel. Its Conv1D stores a weight as [inputs, outputs], which is
how our kernels lie, so nothing is transposed; its q, k and v stand side by side in c_attn in our order. The
output head is the embedding table in both, so lm_head is not written, and a file that carries one must carry
the same numbers.

Everything that would make transformers compute another function than ours (activation, epsilon, MLP width,
attention scaling, cross attention) is refused on import by the name of its field. What only concerns training
is carried where we have it: `dropout` is transformers' resid_pdrop and embd_pdrop. Our model does not drop
attention probabilities, so attn_pdrop is written as 0 and not read.

Only safetensors files are read: a pickle (pytorch_model.bin) can run code when it is opened.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from altgrad_jax.errors import UserError
from altgrad_jax.files import read_json, require_file, writing
from altgrad_jax.models.gpt2 import LAYER_NORM_EPS, GPTConfig

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GPT2_END_OF_TEXT = 50256

# Sizes are read under these names; the right-hand side is the GPTConfig argument.
_SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
}
# Fields that change the function: the value a missing field stands for in transformers, which is also the one
# we have.
_FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": LAYER_NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function
_LAYERS = {
    "ln_1": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_out": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp_up": "mlp.c_fc",
    "mlp_down": "mlp.c_proj",
}
_ARRAYS = {"kernel": "weight", "scale": "weight", "bias": "bias", "embedding": "weight"}
# Causal masks that old files store beside the weights; they are constants.
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_READABLE = ("F64", "F32", "F16", "BF16")


def _entries(config: GPTConfig):
    """(path in our parameters, Hugging Face name without prefix, shape) of every array."""
    D = config.n_embd
    widths = {"attn_qkv": (D, 3 * D), "attn_out": (D, D), "mlp_up": (D, 4 * D), "mlp_down": (4 * D, D)}
    yield ("embed", "embedding"), "wte.weight", (config.vocab_size, D)
    yield ("pos_embed", "embedding"), "wpe.weight", (config.block_size, D)
    for i in range(config.n_layer):
        for layer, hf_layer in _LAYERS.items():
            shapes = {"scale": (D,), "bias": (D,)}
            if layer in widths:
                shapes = {"kernel": widths[layer], "bias": widths[layer][1:]}
            for array, shape in shapes.items():
                yield (f"block_{i}", layer, array), f"h.{i}.{hf_layer}.{_ARRAYS[array]}", shape
    yield ("ln_f", "scale"), "ln_f.weight", (D,)
    yield ("ln_f", "bias"), "ln_f.bias", (D,)


def to_hf(params, config: GPTConfig) -> tuple[dict, dict]:
    """Our parameters as (tensors, config_json) of a GPT2LMHeadModel.

    Args:
      params: nested dict of float32 arrays, as model.init_params makes it.
      config: the sizes they were made with.

    Returns:
      {"transformer.wte.weight": float32 [vocab_size, n_embd], ...} and the dict for config.json.
    """
    tensors = {}
    for path, name, shape in _entries(config):
        leaf = params
        for key in path:
            leaf = leaf[key]
        leaf = np.ascontiguousarray(leaf, np.float32)
        assert leaf.shape == shape, (path, leaf.shape, shape)
        tensors["transformer." + name] = leaf
    config_json = {
        "architectures": ["GPT2LMHeadModel"],
        **_FIXED,
        **{hf_name: getattr(config, name) for hf_name, name in _SIZES.items()},
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
    }
    # transformers' default for both is 50256, which a smaller vocabulary does not have.
    end_of_text = GPT2_END_OF_TEXT if config.vocab_size > GPT2_END_OF_TEXT else None
    config_json |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return tensors, config_json


def from_hf(tensors: dict, config_json: dict) -> tuple[dict, dict]:
    """The inverse of `to_hf`, for any GPT-2 that computes what our model computes.

    Args:
      tensors: {name: float array}, names with or without the prefix "transformer.".
      config_json: the content of config.json.

    Returns:
      (params, sizes): nested dict of float32 NumPy arrays, and the arguments n_layer, n_head, n_embd,
      block_size, vocab_size and dropout of a GPTConfig.

    Raises:
      UserError: a field of the config that we cannot honour, a missing or unknown array, a wrong shape, an
        untied head.
    """
    sizes = _sizes_of(config_json)
    config = GPTConfig(**sizes)
    tensors = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    head = tensors.pop("lm_head.weight", None)
    params = {}
    for path, name, shape in _entries(config):
        if name not in tensors:
            raise UserError(
                f"the weights have no array {name}, which a GPT-2 of {config.n_layer} blocks needs; check "
                "that config.json belongs to them."
            )
        array = np.asarray(tensors.pop(name))
        if array.shape != shape:
            raise UserError(
                f"the array {name} has shape {list(array.shape)} but config.json asks for {list(shape)}; "
                "check that config.json belongs to the weights."
            )
        parent = params
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
        parent[path[-1]] = array.astype(np.float32)
    unknown = sorted(name for name in tensors if not _MASK.fullmatch(name))
    if unknown:
        raise UserError(
            f"the weights hold {len(unknown)} arrays that GPT-2 does not have, the first being {unknown[0]}; "
            "only a plain GPT2LMHeadModel (without adapters) can be imported."
        )
    if head is not None and not np.array_equal(np.asarray(head).astype(np.float32), params["embed"]["embedding"]):
        raise UserError(
            "the weights hold an lm_head.weight that differs from wte.weight, but the output head here is "
            "the embedding table; only models with tied embeddings can be imported."
        )
    return params, sizes


def _sizes_of(config_json) -> dict[str, Any]:
    """The GPTConfig arguments of a config.json, after refusing what we cannot honour."""
    for field, wanted in _FIXED.items():
        value = config_json.get(field, wanted)
        if value != wanted:
            raise UserError(
                f"config.json has {field} = {value!r}, but only {wanted!r} can be imported: give a model that "
                "has it, for the one here computes nothing else."
            )
    activation = config_json.get("activation_function", "gelu_new")
    if activation not in _TANH_GELUS:
        raise UserError(
            f"config.json has activation_function = {activation!r}, but only {' or '.join(_TANH_GELUS)} can "
            "be imported: give a model that has it, for the one here computes nothing else."
        )
    for field in ("quantization_config", "pruned_heads"):
        if config_json.get(field):
            raise UserError(
                f"config.json has {field}, which cannot be imported; give the full model in float32, float16 "
                "or bfloat16."
            )
    sizes = {}
    for field, name in _SIZES.items():
        value = config_json.get(field)
        if type(value) is not int or value < 1:
            raise UserError(f"config.json has {field} = {value!r}, but the model needs a positive whole number.")
        sizes[name] = value
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(
            f"config.json has n_embd = {sizes['n_embd']}, which n_head = {sizes['n_head']} must divide and does not."
        )
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
    return sizes | {"dropout": float(dropouts[0])}


def write_folder(folder, tensors: dict, config_json: dict) -> None:
    """Writes `to_hf`'s result as a new folder; it appears complete or not at all.

    Raises:
      UserError: `folder` exists and is not an empty folder, or cannot be written.
    """
    folder = refuse_occupied(folder)
    unfinished = folder.parent / f".{folder.name}.{os.getpid()}.unfinished"
    with writing(folder, "give another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        _fill(folder, unfinished, tensors, config_json)


def _fill(folder, unfinished, tensors, config_json):
    try:
        # transformers looks for this word; it means row-major arrays, which is what NumPy writes.
        try:
            safetensors.numpy.save_file(tensors, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # its own class for a full disk, too
            raise OSError(str(error)) from None
        (unfinished / CONFIG_FILE).write_text(json.dumps(config_json, indent=2, sort_keys=True) + "\n")
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
    tensors = {}
    for file in sorted(set(files)):
        tensors |= _read_safetensors(folder / file)
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
                if _MASK.fullmatch(name.removeprefix("transformer.")):
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
