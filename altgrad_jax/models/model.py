"""The models by name: what the rest of the project asks a model for, by its config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from altgrad_jax.models.attention import KVCache
from altgrad_jax.models.config import ModelConfig
from altgrad_jax.models.gpt2 import GPT, GPTConfig
from altgrad_jax.models.linear import Quantized
from altgrad_jax.models.llama import Llama, LlamaConfig
from altgrad_jax.models.transformer import ModelOutput, Transformer

_MODELS: dict[str, tuple[type[ModelConfig], type[Transformer]]] = {
    "gpt2": (GPTConfig, GPT),
    "llama": (LlamaConfig, Llama),
}
# Fields of a ModelConfig that no setting decides alone.
_NOT_SETTINGS = {"attention", "rules", "loss_tile_bytes", "unroll", "split", "kv_cache"}


def model_config(settings: Mapping[str, Any], **choices: Any) -> ModelConfig:
    """The ModelConfig that a run's settings describe.

    Args:
      choices: fields that are choices of a machine: attention, loss_tile_bytes, unroll.
    """
    kind = _MODELS[settings["model"]][0]
    return kind(**{name: settings[name] for name in setting_names(settings["model"])}, **choices)


def setting_names(model: str) -> tuple[str, ...]:
    """The settings that describe a model, beside `model` itself."""
    return tuple(field.name for field in dataclasses.fields(_MODELS[model][0]) if field.name not in _NOT_SETTINGS)


def module_of(config: ModelConfig) -> Transformer:
    """The flax module of a config."""
    return _MODELS[config.name][1](config)


def init_params(config: ModelConfig, seed) -> Any:
    """Fresh float32 parameters as a nested dict; a pure function of (config, seed), whatever the formats."""
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    return module_of(dataclasses.replace(config, rules=())).init(jax.random.key(seed), tokens_BL)["params"]


def forward(
    config: ModelConfig,
    params,
    tokens_BL,
    *,
    dropout_key=None,
    cache: KVCache | None = None,
    position=0,
    quantized: Quantized | None = None,
    head=True,
) -> ModelOutput:
    """The model applied to tokens, as a pure function; arguments as in `Transformer.__call__`.

    Args:
      params: as `init_params` makes them. dropout_key: of this pass; None turns dropout off.
    """
    output = module_of(config).apply(
        {"params": params},
        tokens_BL,
        train=dropout_key is not None,
        cache=cache,
        position=position,
        quantized=quantized,
        head=head,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return output  # pyright: ignore[reportReturnType] (linen's stub adds the tuple of a call with `mutable`)
