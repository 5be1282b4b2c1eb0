"""The weights that a run starts from (setting `init_from`): a Hugging Face folder, a run, or one of its checkpoints.

Only parameters are taken. The run begins at step 0 with fresh moments, scales and histories, and keeps what it started
from in its manifest: the folder, the checkpoint's step, and a sha256 of the parameters.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from altgrad_jax.config import Config, show, upgraded, wrong_values
from altgrad_jax.data.hf_tokenizer import require_vocabulary
from altgrad_jax.errors import UserError
from altgrad_jax.models import hf
from altgrad_jax.models.model import setting_names
from altgrad_jax.numerics.layers import MODELS
from altgrad_jax.run.checkpoint import load_arrays, resolve_checkpoint

# Settings of a model that are no part of its weights.
_FREE = {"dropout", "compute_dtype", "block_size", "norm_gains", "smooth_swiglu"}


class Initial(NamedTuple):
    """Weights to start from.

    params: nested dict of NumPy float32 arrays. settings: of the model they belong to, and its tokenizer where that is
    known. source: what the manifest keeps of them.
    """

    params: dict
    settings: dict[str, Any]
    source: dict[str, Any]


def read_initial(path: str | Path) -> Initial:
    """The weights in a Hugging Face folder, a run folder (its newest checkpoint) or a checkpoint.

    Raises:
      UserError: there are none, they are damaged, not finite, or of a model that is not known here.
    """
    path = Path(path).expanduser().absolute()
    if (path / hf.CONFIG_FILE).is_file():
        tensors, config_json = hf.read_folder(path)
        params, settings = hf.from_hf(tensors, config_json)
        tokenizer = hf.tokenizer_of(config_json)
        settings = {"model": "gpt2"} | settings | ({"tokenizer": tokenizer} if tokenizer else {})
        source = {"path": str(path), "kind": "huggingface", "sha256": parameters_sha256(params)}
        return Initial(params, settings, source)
    try:
        checkpoint = resolve_checkpoint(path)
    except UserError:
        raise UserError(
            f"init_from={str(path)!r} holds no weights: give a Hugging Face folder ({hf.CONFIG_FILE} and "
            f"{hf.WEIGHTS_FILE}), a run folder with a checkpoint, or a checkpoint"
        ) from None
    arrays, meta = load_arrays(checkpoint, None, ("params/",))
    settings = upgraded(meta.get("config", {}))
    if "params" not in arrays or wrong_values(settings) or settings["model"] not in MODELS:
        raise UserError(f"init_from={str(path)!r} has no parameters of a known model: give a checkpoint of a training")
    _require_finite(arrays["params"], path)
    names = (*setting_names(settings["model"]), "model", "tokenizer")
    source = {"path": str(checkpoint), "kind": "checkpoint", "step": meta.get("step", 0)}
    return Initial(
        arrays["params"],
        {name: settings[name] for name in names},
        source | {"sha256": parameters_sha256(arrays["params"])},
    )


def initial_for(config: Config, abstract_params: Any) -> Initial:
    """The weights that `config.init_from` names, for the model of `config`.

    A GPT-2 may have fewer positions than its source: it takes the first ones.

    Raises:
      UserError: as read_initial; or they belong to a model of another shape or with another tokenizer.
    """
    initial = read_initial(config.init_from)
    wanted = {name: value for name, value in initial.settings.items() if name not in _FREE}
    different = [name for name, value in wanted.items() if config[name] != value]
    if different:
        words = ", ".join(f"{name}={show(wanted[name])} (here {show(config[name])})" for name in different)
        flags = " ".join(f"--config.{name}={wanted[name]}" for name in different)
        raise UserError(f"init_from={config.init_from!r} is a model with {words}: set {flags}, or give other weights")
    if initial.source["kind"] == "huggingface":
        require_vocabulary(Path(initial.source["path"]), config.tokenizer)
    params = initial.params
    if "pos_embed" in params:
        table_TD = params["pos_embed"]["embedding"]
        if len(table_TD) < config.block_size:
            raise UserError(
                f"init_from={config.init_from!r} has {len(table_TD)} learned positions, fewer than "
                f"block_size={config.block_size}: set block_size to {len(table_TD)} or less"
            )
        params = params | {"pos_embed": {"embedding": table_TD[: config.block_size]}}
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params)
    if jax.tree.map(lambda leaf: leaf.shape, params) != shapes:
        raise UserError(f"init_from={config.init_from!r} has not the arrays of the model that its settings describe")
    return initial._replace(params=params)


def parameters_sha256(params: Any) -> str:
    """sha256 over all parameters: for each array in the order of their names `name shape` and its float32 bytes, little
    endian, in C order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {list(leaf.shape)}".encode())
        digest.update(np.ascontiguousarray(leaf, "<f4").tobytes())
    return digest.hexdigest()


def _require_finite(params: Mapping[str, Any], path: Path) -> None:
    for where, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        bad = leaf.size - np.count_nonzero(np.isfinite(leaf))
        if bad:
            name = jax.tree_util.keystr(where, simple=True, separator="/")
            raise UserError(
                f"the array {name} of {path} holds {bad} numbers that are NaN or infinite, from which nothing can be "
                "trained: give an earlier checkpoint"
            )
