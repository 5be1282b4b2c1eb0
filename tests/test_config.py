"""The table of settings: its defaults, everything it must refuse, and what it says while doing so."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from campaigns import strategies
from ml_collections import config_dict

from altgrad_jax import cli
from altgrad_jax import config as settings
from altgrad_jax.config import FIELDS, RESUMABLE_FIELDS, default_config, from_dict, to_dict, validate
from altgrad_jax.errors import UserError
from altgrad_jax.numerics import optimizers
from altgrad_jax.step import quantization, stability

ROOT = Path(__file__).parents[1]

# The baseline as it was ordered, then what joined it.
ORDERED = {
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "block_size": 256,
    "vocab_size": 0,  # the tokenizer's own 50257
    "dropout": 0.0,
    "batch_size": 12,
    "learning_rate": 6e-4,
    "max_steps": 2000,
    "warmup_steps": 100,
    "grad_clip": 1.0,
    "use_fp8": False,
    "reference_gradient": False,
    "checkpoint_interval": 100,
    "checkpoint_dir": "checkpoints/bf16_baseline",
    "max_checkpoints": 3,
    "nan_patience": 10,
    "bit_stall_threshold": 0.5,
    "overflow_threshold": 0.01,
    "dead_neuron_threshold": 1e-8,
    "dead_neuron_window": 100,
    "log_interval": 1,
    "eval_interval": 100,
    "project": "altgrad",
    "run_name": "bf16-baseline",
    "tags": ("baseline", "bf16", "eurlex"),
    "seed": 42,
}
JOINED = {
    "compute_dtype": "bfloat16",
    "attention": "auto",
    "grad_accum_steps": 1,
    "schedule": "constant",
    "min_lr_ratio": 0.1,
    "decay_fraction": 0.2,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "adam_eps": 1e-8,
    "tokenizer": "gpt2",
    "data_source": "auto",
    "data_seed": 1337,
    "data_placement": "auto",
    "eval_windows": 128,
    "eval_batch_size": 16,
    "steps_per_dispatch": 0,
    "metrics": "all",
    "spike_window": 100,
    "spike_threshold": 8.0,
    "stall_window": 100,
    "val_patience": 3,
    "deterministic": False,
    "wandb_mode": "auto",
    "wandb_entity": "",
    "alert_interval": 100,
    "console": "auto",
}
# What joined with the number formats: records of schema version 1 lack these.
FORMAT_SETTINGS = {
    "formats": (),
    "scaling": "delayed",
    "amax_history": 16,
    "scale_rounding": "power_of_two",
    "operand_rounding": "nearest",
    "saturate": True,
    "products": "emulated",
    "weights_at_rest": "float32",
    "range_clip": 0.0,
    "emergency_formats": (),
    "emergency_patience": 3,
    "optimizer": "adamw",
}
NEW = {
    **FORMAT_SETTINGS,
    "reference_interval": 1,
    "diagnostic_interval": 100,
    "rank_threshold": 0.1,
    "rank_threshold_strict": 0.3,
    "layer_interval": 1,
    "wandb_group": "",
    "wandb_keys": (),
    "fsdp": 1,
    "checkpoint_seconds": 60.0,
    "loggers": ("wandb",),
    "xla_options": (),
    "recipe": (),
    "recipe_program": (),
    "model": "gpt2",
    "n_kv_head": 0,
    "tied_head": True,
    "qk_norm": False,
    "init_from": "",
    "moments": "float32",
    "moments_rounding": "nearest",
    "evaluate_all": False,
    "certify_draws": 0,
    "norm_gains": "float32",
    "smooth_swiglu": False,
    "oscillation_reset": 0,
    "oscillation_start": 0,
    "oscillation_threshold": 16.0,
}
WHOLE = [name for name, field in FIELDS.items() if field.kind is int]


def changed(**values) -> ml_collections.ConfigDict:
    """The baseline with any values at all, past the type checks of ml_collections."""
    return ml_collections.ConfigDict({**default_config().to_dict(), **values}, type_safe=False)


def refusal(**values) -> str:
    with pytest.raises(UserError) as caught:
        validate(changed(**values))
    return str(caught.value)


@pytest.mark.parametrize("name, value", [*ORDERED.items(), *JOINED.items(), *NEW.items()])
def test_default(name, value):
    got = default_config()[name]
    assert type(got) is type(value)
    assert got == value


def test_there_are_no_other_fields():
    assert set(FIELDS) == {*ORDERED, *JOINED, *NEW}
    assert len(FIELDS) == sum(len(group) for _, group in settings.GROUPS)  # no name stands in two places


def test_the_default_config_is_valid_locked_and_typed():
    config = default_config()
    validate(config)
    with pytest.raises(AttributeError):
        config.batchsize = 8
    with pytest.raises(TypeError):
        config.n_layer = 2.5


def test_a_field_cannot_be_changed_in_the_table():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FIELDS["seed"].default = 1
    with pytest.raises(TypeError):
        FIELDS["new"] = FIELDS["seed"]


# --- values that are wrong by themselves ----------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_refuses_what_its_limits_exclude_and_takes_the_rest(name):
    field = FIELDS[name]
    for bad in strategies.draw(strategies.bad_values_of(field), 20, of_seed=0):
        if not bad.is_flag:
            message = refusal(**{name: bad.value})
            assert message.startswith(f"{name}=") and "\n" not in message and len(message) < 400
            assert f"give {field.words} (the baseline has {field.default!r})" in message
    for value in strategies.draw(strategies.inside(field), 20, of_seed=0):
        assert settings.problem(field, value) is None


# Which then means something else.
MAY_BE_ZERO = {"vocab_size", "n_kv_head", "certify_draws", "diagnostic_interval", "oscillation_reset"}
# Limits that were chosen: the strategies above know only what the table says.
OUT_OF_RANGE = [
    *[
        (name, 0)
        for name in sorted(
            set(WHOLE) - {*MAY_BE_ZERO, "warmup_steps", "seed", "data_seed", "steps_per_dispatch", "oscillation_start"}
        )
    ],
    ("vocab_size", 1),
    ("vocab_size", 65537),
    ("spike_window", 19),
    ("dropout", 1 - 1e-12),
    ("beta2", 1 - 1e-12),
    ("learning_rate", 0.0),
    ("adam_eps", 1e-50),
    ("grad_clip", 1e-50),
    *[
        (name, value)
        for name in ("bit_stall_threshold", "overflow_threshold", "dead_neuron_threshold")
        for value in (0.0, 1e-50, 1.0000001)
    ],
    ("compute_dtype", "float16"),
    ("tags", ("a,b",)),
    ("tags", ("y" * 65,)),
    ("project", "a/b"),
    ("checkpoint_dir", "gs://bucket/run"),
    ("metrics", "grad,"),
    ("metrics", "all,grad"),
    ("scaling", "delayed,current"),
    ("scaling", "delayed, current, none"),
    ("loggers", ("wandb", "wandb")),
    ("loggers", ("mlflow",)),
    ("xla_options", ("xla_gpu_autotune_level",)),
    ("xla_options", ("xla_gpu_autotune_level=",)),
    ("xla_options", ("--xla_gpu_autotune_level=0",)),
    ("xla_options", ("xla_gpu_autotune_level=0 ",)),
    ("xla_options", ("xla_gpu_autotune_level=1,2",)),
]


@pytest.mark.parametrize("name, value", OUT_OF_RANGE)
def test_out_of_range(name, value):
    assert refusal(**{name: value}).startswith(f"{name}=")


@pytest.mark.parametrize(
    "values",
    [
        {"warmup_steps": 0},
        {"warmup_steps": 2000},
        {"grad_clip": 0.0},
        {"weight_decay": 0.0},
        {"dropout": 0.999},
        {"beta1": 0.0},
        {"bit_stall_threshold": 1.0},
        {"dead_neuron_threshold": 1e-18},
        {"seed": 0},
        {"seed": 2**31 - 1},
        {"vocab_size": 65536},
        {"max_steps": 1, "warmup_steps": 0},
        {"tags": ()},
        {"max_steps": 2**31 - 1, "batch_size": 1},
        {"max_checkpoints": 1},
        {"wandb_entity": "team"},
        {"batch_size": 12, "grad_accum_steps": 12},
        {"eval_windows": 16},
        {"metrics": "none"},
        {"metrics": "update,grad"},
        {"attention": "cudnn"},
        {"compute_dtype": "float32"},
        {"run_name": "Lauf ä #1"},
        {"tokenizer": "bytes", "vocab_size": 256},
        {"schedule": "cosine", "min_lr_ratio": 0.0},
        {"schedule": "wsd", "decay_fraction": 0.95},
        {"schedule": "wsd", "decay_fraction": 1.0, "warmup_steps": 0},
        {"reference_gradient": True},
        {"reference_gradient": True, "reference_interval": 50},
        {"xla_options": ("xla_gpu_enable_triton_gemm=false", "xla_gpu_autotune_level=0")},
        {"rank_threshold": 1.0},
        {"rank_threshold": 0.0},
        {"diagnostic_interval": 1},
        {"max_steps": 50, "warmup_steps": 50, "diagnostic_interval": 2**31 - 1},
    ],
)
def test_the_edges_of_what_is_allowed(values):
    validate(changed(**values))


def test_limits_are_those_of_float32():
    assert settings.FLOAT32_TINY == np.finfo(np.float32).tiny
    assert np.float32(settings.FLOAT32_BELOW_1) == np.nextafter(np.float32(1), np.float32(0))
    assert np.float32((1 + settings.FLOAT32_BELOW_1) / 2) == 1


def test_the_spike_window_holds_as_many_losses_as_the_monitor_needs():
    assert FIELDS["spike_window"].low == stability.MIN_LOSSES


# --- values that do not fit each other ------------------------------------------------------------


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"reference_gradient": True, "compute_dtype": "float32"},
            [
                "reference_gradient=True has nothing to compare",
                "use_fp8=False",
                "compute_dtype='float32'",
                "set reference_gradient=False",
            ],
        ),
        (
            {"reference_interval": 10},
            ["reference_interval=10 has no effect with reference_gradient=False: set reference_gradient to True, or"],
        ),
        (
            {"diagnostic_interval": 0, "rank_threshold": 0.5},
            [
                "rank_threshold=0.5 is about diagnoses, and diagnostic_interval=0 makes none: set",
                "leave rank_threshold at",
            ],
        ),
        (
            {"loggers": ("tensorboard",), "wandb_group": "x"},
            ["wandb_group='x' has no effect with loggers=('tensorboard',): set loggers to wandb or wandb,ten"],
        ),
        (
            {"metrics": "grad,format,ledger"},
            ["metrics='grad,format,ledger' names format, ledger", "use_fp8=False", "set use_fp8=True, or leave it out"],
        ),
        ({"n_head": 5}, ["n_embd=384", "n_head=5", "n_embd=385"]),
        ({"n_embd": 4}, ["n_embd=4", "n_head=6", "n_embd=6"]),
        ({"vocab_size": 50256}, ["vocab_size=50256", "'gpt2'", "50257"]),
        ({"vocab_size": 255, "tokenizer": "bytes"}, ["vocab_size=255", "'bytes'", "256"]),
        ({"attention": "cudnn", "compute_dtype": "float32"}, ["attention='cudnn'", "compute_dtype='float32'"]),
        ({"attention": "cudnn", "n_embd": 390, "n_head": 6}, ["attention='cudnn'", "65", "multiples of 8"]),
        ({"grad_accum_steps": 5}, ["batch_size=12", "grad_accum_steps=5"]),
        ({"grad_accum_steps": 24}, ["batch_size=12", "grad_accum_steps=24"]),
        ({"eval_batch_size": 24}, ["eval_windows=128", "eval_batch_size=24"]),
        ({"eval_windows": 8}, ["eval_windows=8", "eval_batch_size=16"]),
        ({"xla_options": ("xla_a=1", "xla_b=2", "xla_a=3")}, ["gives xla_a more than one value: give one"]),
        (
            {
                "use_fp8": True,
                "formats": ("E4M3", "block_*:G=E5M2"),
                "products": "native",
                "xla_options": ("xla_gpu_enable_triton_gemm=true",),
            },
            ["xla_gpu_enable_triton_gemm with products='native'", "leave it out, or set products='emulated'"],
        ),
        ({"max_steps": 2**30}, ["max_steps=1073741824", "batch_size=12", "32 bits"]),
        ({"batch_size": 2**20, "block_size": 2**11}, ["batch_size=1048576", "block_size=2048"]),
        (
            {"eval_batch_size": 2**20, "eval_windows": 2**20, "block_size": 2**11},
            ["eval_batch_size=1048576", "block_size=2048"],
        ),
        ({"warmup_steps": 2001}, ["warmup_steps=2001", "max_steps=2000"]),
        ({"max_steps": 50}, ["warmup_steps=100", "max_steps=50"]),
        ({"max_steps": 100, "schedule": "cosine"}, ["schedule='cosine'", "warmup_steps=100"]),
        ({"schedule": "wsd", "decay_fraction": 0.96}, ["decay_fraction=0.96", "1900", "warmup_steps=100"]),
        ({"schedule": "wsd", "decay_fraction": 1e-4}, ["decay_fraction=0.0001", "at least 1"]),
        ({"min_lr_ratio": 0.0}, ["min_lr_ratio=0.0 has no effect", "schedule='constant'"]),
        ({"decay_fraction": 0.5}, ["decay_fraction=0.5 has no effect", "schedule='constant'"]),
        ({"decay_fraction": 0.5, "schedule": "cosine"}, ["decay_fraction=0.5 has no", "schedule='cosine'"]),
    ],
)
def test_settings_that_do_not_fit_each_other(values, words):
    message = refusal(**values)
    assert "\n" not in message
    for word in words:
        assert word in message


OTHER = {
    "formats": ("E4M3",),
    "scaling": "current",
    "amax_history": 8,
    "scale_rounding": "float32",
    "operand_rounding": "stochastic",
    "saturate": False,
    "products": "native",
    "weights_at_rest": "nearest",
    "range_clip": 1.0,
    "emergency_formats": ("E3M4",),
    "emergency_patience": 5,
    "optimizer": "grid",
}


@pytest.mark.parametrize("name", FORMAT_SETTINGS)
def test_nothing_about_formats_is_ignored_without_formats(name):
    assert FIELDS[name].accepts(OTHER[name]) and OTHER[name] != FIELDS[name].default
    message = refusal(**{name: OTHER[name]})
    why = {
        "emergency_patience": "with emergency_formats=(): set ",
        "amax_history": "without formats or a recipe: leave it out",
    }.get(name, "with use_fp8=False: set ")
    assert message.startswith(f"{name}={OTHER[name]!r} has no effect {why}") and "\n" not in message


SPLIT = ("E4M3", "block_*:G=E5M2")  # what native products can compute with


@pytest.mark.parametrize(
    "values, words",
    [
        ({"formats": ()}, ["use_fp8=True needs to know the formats: set formats, for example --config.formats=E4M3"]),
        ({"formats": ("E4M9",)}, ["formats has a rule 'E4M9'", "give one of E4M3"]),
        ({"formats": ("block_6/*=E4M3",)}, ["pattern 'block_6/*' fits no layer", "block_5/mlp_down"]),
        ({"formats": ("E4M3", "*=none")}, ["formats=('E4M3', '*=none') gives no layer a format", "set use_fp8=False"]),
        # Blocks along the axes that the products contract.
        (
            {"scaling": "1x32", "n_embd": 400, "n_head": 8},
            ["scaling='1x32'", "operand W of block_0/attn_qkv", "400 numbers", "blocks of 32", "or another scaling"],
        ),
        (
            {"scaling": "delayed,1x128,delayed", "n_embd": 64, "n_head": 4},
            ["operand A of block_0/attn_qkv", "64 numbers", "blocks of 128"],
        ),
        (
            {"scaling": "delayed,delayed,1x128", "n_embd": 64, "n_head": 4},
            ["operand G of block_0/attn_qkv", "192 numbers"],
        ),  # N, the outputs
        ({"scaling": "delayed,delayed,1x32", "formats": ("head=E4M3",)}, ["operand G of head", "50257 numbers"]),
        # What nobody would read.
        (
            {"amax_history": 8, "scaling": "current"},
            ["amax_history=8 has no effect", "scaling='current'", "set scaling=delayed"],
        ),
        (
            {"amax_history": 8, "scaling": "current,delayed,delayed", "formats": ("block_*:W=E4M3",)},
            ["amax_history=8 has no effect"],
        ),
        (
            {"amax_history": 8, "formats": ("block_*:W=E4M3",), "weights_at_rest": "nearest"},
            ["amax_history=8 has no effect"],
        ),
        (
            {"scaling": "delayed,delayed,current", "formats": ("block_*:WA=E4M3",)},
            ["scaling='delayed,delayed,current' asks for current of G", "give G a format, or delayed in this place"],
        ),
        (
            {"operand_rounding": "stochastic,nearest,nearest", "formats": ("block_*:AG=E4M3",)},
            ["asks for stochastic of W", "give W a format, or nearest in this place"],
        ),
        (
            {"operand_rounding": "stochastic,nearest,nearest", "weights_at_rest": "nearest"},
            [
                "operand_rounding='stochastic,nearest,nearest' has no effect on W",
                "weights_at_rest='nearest'",
                "give nearest for W",
            ],
        ),
        (
            {"metrics": "grad,ledger", "formats": ("block_*:AG=E4M3",)},
            ["metrics='grad,ledger' names ledger", "none to W", "leave ledger out"],
        ),
        (
            {"emergency_patience": 5},
            ["emergency_patience=5 has no effect with emergency_formats=()", "set emergency_formats"],
        ),
        (
            {"weights_at_rest": "nearest", "formats": ("block_*:AG=E4M3",)},
            ["weights_at_rest='nearest' is about weights", "none to W", "give W a format too"],
        ),
        (
            {"optimizer": "ulp_adamw", "formats": ("block_*:A=E4M3",)},
            ["optimizer='ulp_adamw' is about weights", "give W a format too"],
        ),
        ({"range_clip": 1.0, "scaling": "current"}, ["range_clip=1.0 acts on the delayed scale", "set range_clip=0"]),
        ({"range_clip": 1.0, "formats": ("block_*:WA=E4M3",)}, ["range_clip=1.0", "give G a format"]),
        # What cannot be done.
        (
            {"scale_rounding": "float32", "scaling": "delayed,rowwise,delayed"},
            [
                "scale_rounding='float32' needs one scale",
                "scaling='delayed,rowwise,delayed' has many",
                "delayed, current, none",
                "scale_rounding='power_of_two'",
            ],
        ),
        (
            {"saturate": False, "formats": ("E4M3", "head=E1M6")},
            ["E1M6 cannot be used with saturate=False", "set saturate=True"],
        ),
        (
            {"saturate": False, "formats": ("E5M2",), "emergency_formats": ("E2M5",)},
            ["E2M5 cannot be used with saturate=False"],
        ),
        (
            {"weights_at_rest": "nearest", "scaling": "current"},
            ["weights_at_rest='nearest'", "scaling='current' of W", "give W scaling delayed"],
        ),
        ({"weights_at_rest": "stochastic", "scaling": "rowwise,delayed,delayed"}, ["scaling='rowwise' of W"]),
        (
            {"weights_at_rest": "error_feedback", "scale_rounding": "float32"},
            [
                "weights_at_rest='error_feedback' needs scales that are powers of two",
                "set scale_rounding='power_of_two'",
            ],
        ),
        (
            {"optimizer": "grid", "weights_at_rest": "stochastic"},
            ["optimizer='grid'", "weights_at_rest='stochastic'", "give nearest or float32"],
        ),
        ({"optimizer": "grid", "weights_at_rest": "error_feedback"}, ["weights_at_rest='error_feedback'"]),
        # Native products.
        (
            {"products": "native", "formats": SPLIT, "emergency_formats": ("BF16",)},
            ["products='native' computes in fixed formats", "leave emergency_formats out", "products='emulated'"],
        ),
        (
            {"products": "native", "formats": SPLIT, "scaling": "1x32"},
            ["products='native' takes one scale", "scaling='1x32' has many", "delayed, current, none"],
        ),
        (
            {"products": "native", "formats": ("E3M4",)},
            [
                "products='native' can compute with E4M3 and E5M2",
                "not with E3M4 in block_0/attn_qkv",
                "change formats",
                "products='emulated'",
            ],
        ),
        (
            {"products": "native", "formats": (*SPLIT, "block_3/mlp_up:A=none")},
            ["an operand that has no format in block_3/mlp_up"],
        ),
        (
            {"products": "native", "formats": ("E5M2",)},
            [
                "products='native' cannot multiply two E5M2 operands",
                "block_0/attn_qkv",
                "--config.formats=E4M3,block_*:G=E5M2",
                "products='emulated'",
            ],
        ),
        (
            {"products": "native", "formats": ("E4M3", "block_1/*:WG=E5M2")},
            ["two E5M2 operands, which block_1/attn_qkv has"],
        ),
        # Emergency formats.
        ({"emergency_formats": ("E4M9",)}, ["emergency_formats: there is no number format 'E4M9': give one of E4M3"]),
        (
            {"emergency_formats": ("E5M2",)},
            ["emergency_formats=('E5M2',) must have more mantissa bits", "than E4M3", "they have 2 after 3"],
        ),
        ({"emergency_formats": ("E3M4", "P3109_P5")}, ["they have 4, 4 after 3"]),
        ({"formats": SPLIT, "emergency_formats": ("E4M3_IEEE",)}, ["than E4M3, E5M2", "they have 3 after 3"]),
    ],
)
def test_format_settings_that_do_not_fit_each_other(values, words):
    message = refusal(**{"use_fp8": True, "formats": ("E4M3",), **values})
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"formats": ("E4M3", "head=E3M4")},
        {"formats": ("block_*:W=E4M3",), "weights_at_rest": "error_feedback"},
        {"scaling": "1x32"},
        {"scaling": "1x128"},
        {"scaling": "current,rowwise,1x32"},
        {"scaling": "1x32", "vocab_size": 50272, "formats": ("head=E4M3",)},
        {"scaling": "1x32,1x32,delayed", "formats": ("head=E4M3",)},
        {"scaling": "1x32", "formats": ("head:WA=E4M3",)},  # the 50257 outputs of the head are blocks of G alone
        {"scaling": "current", "operand_rounding": "stochastic", "formats": ("block_*:WA=E4M3",)},
        {"amax_history": 1, "scaling": "current,delayed,current"},
        {"scale_rounding": "float32", "scaling": "none"},
        {"operand_rounding": "stochastic", "weights_at_rest": "stochastic"},
        {"operand_rounding": "nearest,nearest,stochastic"},
        {"saturate": False},
        {"saturate": False, "formats": ("P3109_P4",)},
        {"products": "native", "formats": SPLIT},
        {"products": "native", "formats": ("E4M3",), "scale_rounding": "float32", "scaling": "current"},
        {"products": "native", "formats": SPLIT, "weights_at_rest": "stochastic", "optimizer": "ulp_adamw"},
        {"optimizer": "grid", "weights_at_rest": "nearest"},
        {"optimizer": "grid"},
        {"range_clip": 2.0},
        {"emergency_formats": ("E3M4", "BF16", "FP16"), "emergency_patience": 1},
        {"metrics": "format,ledger"},
        {"reference_gradient": True, "reference_interval": 7, "compute_dtype": "float32"},
        {"formats": ("FP16",)},
    ],
)
def test_format_settings_that_fit(values):
    validate(changed(**{"use_fp8": True, "formats": ("E4M3",), **values}))


def test_every_choice_is_one_that_computes():
    assert set(settings.FORMAT_GROUPS) <= set(settings.METRIC_GROUPS)
    for name in FIELDS["optimizer"].choices:
        assert optimizers.make(name, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, is_quantized=lambda params: {})
    for at_rest in FIELDS["weights_at_rest"].choices:
        options = quantization.options_of(changed(use_fp8=True, formats=("E4M3",), weights_at_rest=at_rest))
        assert bool(options.stored) == (at_rest != "float32")


def test_a_choice_for_all_operands_or_one_for_each():
    assert settings.for_operands("current") == ("current",) * 3
    assert settings.for_operands("current,none,1x32") == ("current", "none", "1x32")


def test_every_wrong_setting_is_told_at_once():
    lines = refusal(n_layer=0, seed=-1, tags=("a,b",)).split("\n")
    assert lines[0] == "3 settings cannot be used:"
    assert [line.split("=")[0] for line in lines[1:]] == ["  - n_layer", "  - seed", "  - tags"]


def test_missing_and_unknown_fields():
    values = default_config().to_dict()
    del values["seed"]
    with pytest.raises(UserError, match="^the setting seed is missing"):
        validate(ml_collections.ConfigDict(values))
    with pytest.raises(UserError, match="^there is no setting 'batchsize'; did you mean batch_size"):
        validate(changed(batchsize=8))
    with pytest.raises(UserError, match="^there is no setting 'zzz'; --help lists them all"):
        validate(changed(zzz=8))


@pytest.mark.parametrize(
    "typo, name",
    [
        ("lr", "learning_rate"),
        ("batchsize", "batch_size"),
        ("batch-size", "batch_size"),
        ("N_LAYER", "n_layer"),
        ("model.n_head", "n_head"),
        ("wd", "weight_decay"),
        ("qqq", None),
    ],
)
def test_nearest_field(typo, name):
    assert settings.nearest_field(typo) == name


@pytest.mark.parametrize("not_a_config", [None, {}, 3, [("seed", 1)]])
def test_something_else_than_a_config(not_a_config):
    with pytest.raises(UserError, match="ConfigDict"):
        validate(not_a_config)


def test_a_placeholder_that_was_never_filled():
    for placeholder in (config_dict.placeholder(int), config_dict.required_placeholder(int)):
        with pytest.raises(UserError, match=r"^seed=None \(NoneType\) cannot be used"):
            validate(changed(seed=placeholder))


# --- what gives way to what is set ----------------------------------------------------------------


@pytest.mark.parametrize(
    "values, given, changes",
    [
        # What was set: as a flag, or, from Python, unlike the default.
        ({"max_steps": 12}, None, {"warmup_steps": 1}),
        ({"max_steps": 50}, None, {"warmup_steps": 5}),
        ({"max_steps": 1, "schedule": "cosine"}, None, {"warmup_steps": 0}),
        ({"max_steps": 50, "schedule": "cosine"}, None, {"warmup_steps": 5}),
        ({"max_steps": 2, "schedule": "wsd"}, None, {"decay_fraction": 0.5, "warmup_steps": 1}),
        ({"max_steps": 50, "schedule": "wsd", "decay_fraction": 1.0}, None, {"warmup_steps": 0}),
        ({"schedule": "wsd", "warmup_steps": 1900}, None, {"decay_fraction": 0.05}),
        ({"eval_windows": 2}, None, {"eval_batch_size": 2}),
        ({"eval_windows": 100}, None, {"eval_batch_size": 10}),
        ({"eval_batch_size": 24}, None, {"eval_windows": 144}),
        ({"n_embd": 64}, None, {"n_head": 4}),
        ({"tokenizer": "bytes"}, None, {"vocab_size": 256}),
        ({"formats": ("E4M3",)}, None, {"use_fp8": True}),
        # A config file counts more than a default and less than a flag.
        ({"warmup_steps": 20, "max_steps": 12}, {"max_steps"}, {"warmup_steps": 1}),
        ({"warmup_steps": 20, "max_steps": 12}, {"max_steps", "seed"}, {"warmup_steps": 1}),
        ({"batch_size": 4, "grad_accum_steps": 6}, {"batch_size"}, {"grad_accum_steps": 4}),
        ({"vocab_size": 256}, {"tokenizer"}, {"vocab_size": 50257}),
        ({"formats": ("E4M3",), "optimizer": "grid"}, {"use_fp8"}, {"formats": (), "optimizer": "adamw"}),
        ({"schedule": "constant", "decay_fraction": 0.5}, {"schedule"}, {"decay_fraction": 0.2}),
        # Nothing to fit.
        ({}, None, {}),
        ({"max_steps": 100}, None, {}),
        ({"vocab_size": 50304}, None, {}),
    ],
)
def test_what_nobody_set_gives_way(values, given, changes):
    config = changed(**values)
    before = config.to_dict()
    fitted, said = settings.fitted(config, given)
    validate(fitted)
    vocabulary = {"vocab_size": fitted.vocab_size} if "vocab_size" not in values else {}
    assert fitted.to_dict() == before | vocabulary | changes and config.to_dict() == before and fitted.is_locked
    told = {name for name in changes if name in values or name != "vocab_size"}
    assert {sentence.partition("=")[0] for sentence in said} == told and len(said) == len(told)
    assert settings.fitted(fitted, given)[1] == []


@pytest.mark.parametrize(
    "values, given",
    [
        ({"max_steps": 12, "warmup_steps": 20}, None),
        ({"max_steps": 12}, {"max_steps", "warmup_steps"}),
        ({"warmup_steps": 3000}, None),  # the length of a run is nobody else's to decide
        ({"grad_accum_steps": 5}, None),
        ({"n_head": 5}, None),
        ({"eval_windows": 2, "eval_batch_size": 4}, None),
        ({"formats": ("E4M3",)}, {"use_fp8", "formats"}),
        ({"scaling": "current"}, None),
        ({"vocab_size": 100}, None),
        ({"max_steps": 0}, None),
        ({"seed": "x", "max_steps": 5}, None),
    ],
)
def test_what_was_set_is_never_changed(values, given):
    config = changed(**values)
    fitted, said = settings.fitted(config, given)
    assert said == [] and all(fitted[name] == value for name, value in values.items())
    with pytest.raises(UserError):
        validate(fitted)


# --- to JSON and back, and what may change on resume ----------------------------------------------


def test_json_round_trip_is_exact():
    config = changed(learning_rate=0.1 + 0.2, tags=("ä", "b"), schedule="wsd")
    back = from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert back.to_dict() == config.to_dict()
    assert all(type(back[name]) is field.kind for name, field in FIELDS.items())
    assert back.is_locked


@pytest.mark.parametrize(
    "change, word",
    [
        ({"zzz": 1}, "zzz"),
        ({"seed": "42"}, "seed"),
        ({"tags": "a"}, "tags"),
        ({"n_head": 5}, "n_head"),
    ],
)
def test_from_dict_refuses_what_cannot_be_run(change, word):
    with pytest.raises(UserError, match=word):
        from_dict({**to_dict(default_config()), **change})


def test_what_may_differ_on_resume():
    assert RESUMABLE_FIELDS == {
        "max_steps",
        "checkpoint_interval",
        "eval_interval",
        "log_interval",
        "project",
        "run_name",
        "tags",
        "wandb_mode",
        "wandb_entity",
        "alert_interval",
        "console",
        "checkpoint_dir",
        "max_checkpoints",
        "steps_per_dispatch",
        "fsdp",
        "diagnostic_interval",
        "certify_draws",
        "rank_threshold",
        "rank_threshold_strict",
        "layer_interval",
        "wandb_group",
        "wandb_keys",
        "checkpoint_seconds",
        "loggers",
    }
    old = to_dict(default_config())
    for name, field in FIELDS.items():
        other = {int: 7, float: 0.25, str: "other", bool: not field.default, tuple: ["other"]}[field.kind]
        lines = settings.config_difference(old, {**old, name: other})
        if name in RESUMABLE_FIELDS:
            assert lines == []
        else:
            shown = old[name], other
            assert lines == [f"{name}: {shown[0]!r} in the run, {shown[1]!r} now"]


def test_difference_after_json_is_empty():
    config = default_config()
    as_read = json.loads(json.dumps(to_dict(config)))
    assert settings.config_difference(as_read, config.to_dict()) == []
    assert settings.config_difference(config.to_dict(), as_read) == []
    assert settings.config_difference({**as_read, "other": [1, 2]}, {**as_read, "other": (1, 2)}) == []


def test_difference_lists_fields_in_order_and_names_absent_ones():
    old = to_dict(default_config())
    new = {**old, "seed": 1, "n_layer": 2}
    del new["beta1"]
    old["retired"] = 3
    assert settings.config_difference(old, new) == [
        "n_layer: 6 in the run, 2 now",
        "beta1: 0.9 in the run, not a setting now",
        "seed: 42 in the run, 1 now",
        "retired: 3 in the run, not a setting now",
    ]


def test_a_record_of_version_1_is_one_with_the_defaults():
    to_5 = settings.ADDED_IN_2 | settings.ADDED_IN_3 | settings.ADDED_IN_4 | settings.ADDED_IN_5
    assert to_5 | settings.ADDED_IN_6 | settings.ADDED_IN_7 | settings.ADDED_IN_8 == set(NEW)
    model = {"model", "n_kv_head", "tied_head", "qk_norm"}
    assert settings.ADDED_IN_6 == {"evaluate_all", "init_from"} | model and settings.ADDED_IN_7 == {"certify_draws"}
    resets = {"oscillation_reset", "oscillation_start", "oscillation_threshold"}
    assert settings.ADDED_IN_8 == {"norm_gains", "smooth_swiglu"} | resets
    assert settings.ADDED_IN_3 == {"checkpoint_seconds"} and settings.ADDED_IN_4 == {"loggers"}
    assert settings.ADDED_IN_5 == {"xla_options", "recipe", "recipe_program", "moments", "moments_rounding"}
    new = to_dict(default_config())
    old = {name: value for name, value in new.items() if name not in NEW}
    assert from_dict(old).to_dict() == default_config().to_dict()
    assert settings.upgraded(old) == new
    assert settings.config_difference(old, new) == []
    assert settings.config_difference(old, {**new, "use_fp8": True, "formats": ["E4M3"], "diagnostic_interval": 5}) == [
        "use_fp8: False in the run, True now",
        "formats: [] in the run, ['E4M3'] now",
    ]
    # What version 1 had must be there, and what a newer record says counts.
    for name in (*ORDERED, *JOINED):
        damaged = {other: value for other, value in old.items() if other != name}
        with pytest.raises(UserError, match=f"^the setting {name} is missing"):
            from_dict(damaged)
        expected = [] if name in RESUMABLE_FIELDS else [f"{name}: not a setting of the run, {new[name]!r} now"]
        assert settings.config_difference(damaged, new) == expected
    quantized = {**new, "use_fp8": True, "formats": ["E4M3"], "amax_history": 4}
    assert from_dict(quantized).amax_history == settings.upgraded(quantized)["amax_history"] == 4


def problems_of(values):
    return settings.problems(settings.values_of(changed(**values)))


def test_a_pass_over_one_token_is_refused_in_bfloat16():
    small = dict(block_size=1, batch_size=4, eval_batch_size=4, eval_windows=4)
    assert problems_of(small) == [] == problems_of(small | {"batch_size": 1, "compute_dtype": "float32"})
    for values, name in (
        ({"batch_size": 1}, "batch_size / grad_accum_steps"),
        ({"grad_accum_steps": 4}, "batch_size / grad_accum_steps"),
        ({"eval_batch_size": 1}, "eval_batch_size"),
        ({"evaluate_all": True}, "with evaluate_all the batch of a window"),
    ):
        (text,) = problems_of(small | values)
        assert text.startswith(f"block_size=1 and {name} of 1 make passes over a single token") and "float32" in text


def test_settings_of_before_version_6_have_todays_names_and_words():
    new = to_dict(changed(use_fp8=True, formats=("E4M3",), scaling="current,rowwise,1x32", reference_gradient=True))
    old = {name: value for name, value in new.items() if name not in ("reference_gradient", "reference_interval")}
    old |= {"use_shadow": True, "shadow_interval": 1, "scaling": "tensor,channel,block32", "optimizer": "ulp_adamw"}
    assert settings.upgraded(old) == new | {"optimizer": "ulp_adamw_mean"}
    assert settings.wrong_values(old) == [] and from_dict(old).optimizer == "ulp_adamw_mean"
    assert settings.upgraded(settings.upgraded(old)) == settings.upgraded(old)
    # The same name is another optimizer now.
    assert settings.config_difference(old, new | {"optimizer": "ulp_adamw"}) == [
        "optimizer: 'ulp_adamw_mean' in the run, 'ulp_adamw' now"
    ]
    assert settings.unknown_field("use_shadow").endswith("did you mean reference_gradient?")


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_max_steps_is_fixed_where_it_shapes_the_learning_rate(schedule):
    old = to_dict(changed(schedule=schedule))
    (line,) = settings.config_difference(old, {**old, "max_steps": 3000})
    assert line.startswith("max_steps: 2000 in the run, 3000 now") and schedule in line


def test_max_steps_is_fixed_where_a_recipe_holds_from_a_share_of_it():
    old = to_dict(changed(recipe=("mxfp8", "bf16@0.8")))
    (line,) = settings.config_difference(old, {**old, "max_steps": 3000})
    assert line.startswith("max_steps: 2000 in the run, 3000 now (with bf16@0.8 it changes")
    old = to_dict(changed(recipe=("mxfp8", "bf16@1600")))
    assert settings.config_difference(old, {**old, "max_steps": 3000}) == []


def test_metric_groups():
    assert settings.metric_groups("all") == settings.METRIC_GROUPS
    assert settings.metric_groups("none") == ()
    assert settings.metric_groups("param,grad") == ("grad", "param")


def test_decay_steps():
    assert settings.decay_steps(0.2, 2000) == 400
    assert settings.decay_steps(1.0, 7) == 7


# --- the help text --------------------------------------------------------------------------------


def test_help_describes_every_field():
    lines = settings.describe().split("\n")
    assert max(map(len, lines)) <= 100
    for name, field in FIELDS.items():
        default = ",".join(field.default) if field.kind is tuple else str(field.default)
        left = f"  {name}={default}"
        assert sum(line.startswith((left + " ", left + "\n")) or line == left for line in lines) == 1, name
    text = " ".join(settings.describe().split())
    for field in FIELDS.values():
        assert field.meaning in text
    for title, _ in settings.GROUPS:
        assert title in lines


def test_help_says_that_no_overflow_is_watched_without_8_bits():
    meaning = FIELDS["overflow_threshold"].meaning
    assert "quantized" in meaning and "use_fp8=False" in meaning


# --- the config files -----------------------------------------------------------------------------

DIFFERS_FROM_THE_BASELINE = {
    "bf16_baseline": {},
    "smoke": {
        "tokenizer": "bytes",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        "block_size": 64,
        "batch_size": 8,
        "max_steps": 200,
        "warmup_steps": 20,
        "checkpoint_interval": 50,
        "eval_interval": 50,
        "eval_windows": 32,
        "dead_neuron_window": 20,
        "run_name": "smoke",
        "checkpoint_dir": "checkpoints/smoke",
        "tags": ("smoke", "bf16", "bytes"),
    },
}


@pytest.mark.parametrize("name, differences", DIFFERS_FROM_THE_BASELINE.items())
def test_a_config_file_differs_only_where_it_says(name, differences):
    config = cli.load_config(str(ROOT / f"configs/{name}.py"))
    validate(config)
    assert config.is_locked
    assert config.to_dict() == {**default_config().to_dict(), **differences}


def test_config_files_do_not_share_a_folder_or_a_name():
    files = sorted((ROOT / "configs").glob("*.py"))
    assert set(DIFFERS_FROM_THE_BASELINE) <= {file.stem for file in files}
    for file in files:
        docstring = file.read_text().split('"""')[1]
        for part in (f"--config configs/{file.name}", "Command:", "Time:", "Expected:"):
            assert part in docstring, (file.name, part)
    configs = [cli.load_config(str(ROOT / f"configs/{name}.py")) for name in DIFFERS_FROM_THE_BASELINE]
    assert len({config.run_name for config in configs}) == len(configs)
    assert len({config.checkpoint_dir for config in configs}) == len(configs)


def test_jax_is_not_imported():
    code = "import sys, altgrad_jax.cli; sys.exit(bool({'jax', 'flax', 'wandb', 'optax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


LLAMA = {"model": "llama", "smooth_swiglu": True}


@pytest.mark.parametrize(
    "values, words",
    [
        ({"smooth_swiglu": True}, "smooth_swiglu=True has no effect with model='gpt2'"),
        (LLAMA, "has no effect without formats or a recipe"),
        (LLAMA | {"use_fp8": True, "formats": ("E4M3",), "products": "native"}, "products='native' takes one scale"),
        (LLAMA | {"use_fp8": True, "formats": ("block_*/attn_*=E4M3",)}, "which give A of mlp_down none"),
        (LLAMA | {"recipe": ("bf16", "mxfp8:dgrad@10")}, "which quantizes no input of a layer"),
        (LLAMA | {"recipe": ("bf16", "ufp4@10")}, "which recipe='ufp4' mixes by a Hadamard transform"),
        ({"norm_gains": "mxfp8", "n_embd": 48}, "do not divide the norms of n_embd = 48 numbers"),
        ({"norm_gains": "mxfp8", "model": "llama", "qk_norm": True, "n_head": 24}, "n_embd / n_head = 16 numbers"),
        ({"norm_gains": "nvfp4"}, "norm_gains='nvfp4' cannot be used: give one of float32, mxfp8"),
    ],
)
def test_smooth_swiglu_and_norm_gains_are_refused_where_they_cannot_be_honoured(values, words):
    assert words in refusal(**values)


def test_smooth_swiglu_goes_with_formats_and_recipes():
    validate(changed(vocab_size=50257, **LLAMA, use_fp8=True, formats=("E4M3",)))
    validate(changed(vocab_size=50257, **LLAMA, recipe=("bf16", "mxfp8@10"), norm_gains="mxfp8_floor"))
