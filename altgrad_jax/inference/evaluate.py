"""The loss of a checkpoint on validation data."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from altgrad_jax.data.dataset import choose_windows, load_token_data, open_token_file
from altgrad_jax.errors import UserError
from altgrad_jax.inference.generate import load_model
from altgrad_jax.numerics.kv_cache import cache_spec
from altgrad_jax.run.environment import fixed_options
from altgrad_jax.run.record import MANIFEST, read_manifest
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.program import make_evaluate


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token, its exponential, and what it was measured on."""

    val_loss: float
    val_perplexity: float
    n_windows: int
    n_tokens: int
    file: Path


@fixed_options()
def evaluate_checkpoint(
    path, *, step=None, data_dir=None, token_file=None, all_windows=False, kv_cache=None
) -> Evaluation:
    """The loss of a checkpoint on the validation data it was trained with, or on any token file.

    On val.bin of the run's own data this is the val_loss of the run's record: to the bit on the same CPU, to rounding
    on a GPU, where training may use cuDNN's attention and this uses XLA's.

    Args:
      path: run folder, or one checkpoint in it. step: which checkpoint of the folder; None: the newest.
      data_dir: folder of prepared token files, whose val.bin is used; None: the one in the run's manifest.
      token_file: a file of uint16 or uint32 tokens of the model's tokenizer instead.
      all_windows: every window of the file instead of the run's fixed choice of eval_windows.
      kv_cache: the number format in which keys and values are read, as `numerics.kv_cache.cache_spec` has it.

    Raises:
      UserError: the checkpoint or the tokens cannot be used, or the loss is not finite.
    """
    params, config, settings, operands = load_model(path, step)
    if kv_cache is not None:
        config = dataclasses.replace(config, kv_cache=cache_spec(kv_cache, config.head_width))
    if token_file is not None:
        file = token_file
        tokens_T = open_token_file(
            file, vocab_size=config.vocab_size, block_size=config.block_size, tokenizer=settings["tokenizer"]
        )
    else:
        data = load_token_data(
            data_dir or data_dir_of(Path(path)),
            vocab_size=config.vocab_size,
            block_size=config.block_size,
            tokenizer=settings["tokenizer"],
        )
        tokens_T, file = data.val_T, data.dir / "val.bin"
    windows, batch_size = choose_windows(
        tokens_T, config.block_size, None if all_windows else settings["eval_windows"], settings["eval_batch_size"]
    )
    loss = float(make_evaluate(config, batch_size, data_mesh(jax.devices()[:1]))(params, windows, operands))
    if not np.isfinite(loss):
        raise UserError(
            f"the loss of {path} on {file} is {loss}, so its weights are of no use: give an "
            "earlier checkpoint with --step"
        )
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.float32(loss)))
    return Evaluation(loss, perplexity, len(windows), windows[:, 1:].size, Path(file))


def data_dir_of(path):
    """Where the run that wrote this checkpoint found its data, by its manifest."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / MANIFEST).exists():
            found = read_manifest(folder)["data"].get("dir")
            if not isinstance(found, str):
                raise UserError(
                    f"{folder / MANIFEST} has dir {found!r} for its data where a path is expected: name "
                    "the data with --data_dir, or a token file with --tokens"
                )
            return found
    raise UserError(
        f"{path} belongs to no run that says what it was trained on: name the data with --data_dir, or a "
        "token file with --tokens"
    )
