"""From a config to the static choices of a step: the model, the options, the data of the program."""

from typing import Any

from altgrad_jax import config as settings
from altgrad_jax.config import Config
from altgrad_jax.errors import UserError
from altgrad_jax.models import flops
from altgrad_jax.models import model as models
from altgrad_jax.models.config import ModelConfig
from altgrad_jax.numerics.recipes import half_batch
from altgrad_jax.step import quantization, recipe, stability, update
from altgrad_jax.step.mesh import Device
from altgrad_jax.step.update import Inputs, StepOptions

# Logits that exist at once, beside ModelConfig's own choice, which is a CPU's: a GPU wants large products.
LOSS_TILE_BYTES_GPU = 2**30
# Options of the step that are settings of the same name.
_SAME_NAME = (
    "batch_size",
    "learning_rate",
    "max_steps",
    "warmup_steps",
    "grad_accum_steps",
    "schedule",
    "min_lr_ratio",
    "optimizer",
    "weight_decay",
    "beta1",
    "beta2",
    "adam_eps",
    "moments",
    "moments_rounding",
    "grad_clip",
    "data_seed",
    "reference_gradient",
    "reference_interval",
    "certify_draws",
)


def model_config(config: Config, device: Device) -> ModelConfig:
    """The model that `config` describes, with the attention kernel for this device."""
    # Without a loop over its blocks the step is one CUDA graph.
    of_gpu: dict[str, Any] = {"loss_tile_bytes": LOSS_TILE_BYTES_GPU, "unroll": True}
    return models.model_config(
        config, attention=attention_kernel(config, device), **({} if device.platform == "cpu" else of_gpu)
    )


def attention_kernel(config: Config, device: Device) -> str:
    """The attention implementation to compile: cuDNN where it can run and was not declined."""
    head_width = config.n_embd // config.n_head
    fits = has_cudnn_attention(device, head_width=head_width, compute_dtype=config.compute_dtype)
    if config.attention == "cudnn" and not fits:
        raise UserError(
            f"attention='cudnn' cannot run heads of {head_width} numbers on this machine's "
            f"{device.platform} ({device.device_kind}); it needs an NVIDIA GPU of compute capability 8.0 or more and "
            "heads of at most 128 numbers: set attention='auto' or 'xla'"
        )
    if config.attention == "auto":
        return "cudnn" if fits else "xla"
    return config.attention


def has_cudnn_attention(device: Device, *, head_width: int, compute_dtype: str) -> bool:
    """Whether cuDNN's attention runs on this device: NVIDIA, Ampere or newer, bfloat16, heads of at most 128 numbers in
    multiples of 8."""
    return (
        device.platform == "gpu"
        and any(name in device.client.platform_version.lower() for name in ("cuda", "nvidia"))
        and float(getattr(device, "compute_capability", 0)) >= 8.0
        and compute_dtype == "bfloat16"
        and head_width % 8 == 0
        and head_width <= 128
    )


def step_options(config: Config, *, steps_per_dispatch: int, data_on_device: bool = True) -> StepOptions:
    """The static choices of the step that `config` describes."""
    return StepOptions(
        **{name: config[name] for name in _SAME_NAME},
        steps_per_dispatch=steps_per_dispatch,
        decay_steps=settings.decay_steps(config.decay_fraction, config.max_steps),
        thresholds=stability.Thresholds(**{name: config[name] for name in stability.Thresholds._fields}),
        metric_groups=settings.metric_groups(config.metrics),
        data_on_device=data_on_device,
        quant=quantization.options_of(config),
        recipe=recipe.options_of(config),
        certify_half=half_batch(recipe.known_recipes(config), config.batch_size, config.block_size),
    )


def inputs_of(config: Config) -> Inputs:
    """What the run that `config` describes gives the compiled step as data."""
    return update.inputs_of(step_options(config, steps_per_dispatch=1), config.seed)


def flops_per_step(config: Config) -> float:
    """Floating-point operations of one update, by formula (flops.training_flops_per_token)."""
    names = "model", "n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size"
    per_token = flops.training_flops_per_token(**{name: config[name] for name in names})
    return config.batch_size * config.block_size * per_token
