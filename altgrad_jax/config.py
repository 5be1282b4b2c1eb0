"""Every setting of a run: its name, default, meaning, unit and allowed values, in one table.

The settings are flat, and the table below is the only place that lists them: the default ConfigDict, the checks, the
help text, the tests' strategies and the rule for what may change on resume all read it. The limits are data. A setting
that cannot be honoured is an error before the first step; it is never ignored.

ml_collections checks less than it seems to: it accepts NaN, True where a whole number belongs, and None for anything.
So `validate` looks at every value again, and asks for exactly the Python type of the default. Many limits are those of
float32 and int32, the types in which numbers enter the compiled step: an `adam_eps` of 1e-50 would be 0 there.

No jax here, so that `--help` and every complaint about a setting come at once.
"""

import dataclasses
import difflib
import math
import os
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_collections

from altgrad_jax import conflicts
from altgrad_jax.conflicts import INT32_MAX, decay_steps
from altgrad_jax.conflicts import for_operands as for_operands
from altgrad_jax.data.tokenizer import TOKENIZERS, is_file_name, vocabulary_size
from altgrad_jax.errors import LIST_ITEM, UserError
from altgrad_jax.numerics.layers import MODELS
from altgrad_jax.numerics.recipes import GAINS
from altgrad_jax.numerics.rules import AT_REST, MOMENTS, OPTIMIZERS, ROUNDINGS, SCALINGS, SCHEDULES

# A ConfigDict with the settings of this file. (To a type checker every attribute of a ConfigDict is a union of all.)
Config = Any

FLOAT32_TINY = 2.0**-126  # the smallest normal float32; compiled code may flush what is below to 0
FLOAT32_BELOW_1 = 1 - 2.0**-24
METRIC_GROUPS = ("grad", "update", "param", "dead", "activation", "format", "ledger")
FORMAT_GROUPS = ("format", "ledger")  # exist only with use_fp8, format with a recipe too

# What people type for a field whose name is too far away for a spelling match.
_SHORT_NAMES = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size"}
# Settings of records before schema version 6 under their names of today, and the words that `scaling` had.
RENAMED_IN_6 = {"use_shadow": "reference_gradient", "shadow_interval": "reference_interval"}
_SCALING_BEFORE_6 = {"tensor": "current", "channel": "rowwise", "block32": "1x32", "block128": "1x128"}
_EDGES = {FLOAT32_TINY: "above 0", FLOAT32_BELOW_1: "below 1"}


@dataclass(frozen=True)
class Text:
    """What a text may be. `words` complete "give ..."."""

    longest: int = 128
    optional: bool = False  # may be empty
    without: str = ""  # characters that it may not hold
    check: Callable[[str], bool] | None = None  # what else must be true of it
    about: str = ""  # `check` in words

    def accepts(self, text: str) -> bool:
        if not text:
            return self.optional
        # "None" is what a flag makes of an attempt to unset a string.
        plain = text.isprintable() and text == text.strip() and len(text) <= self.longest and text != "None"
        return plain and not set(text) & set(self.without) and (self.check is None or self.check(text))

    @property
    def words(self) -> str:
        without = f", none of them {self.without.replace(',', 'a comma')}" if self.without else ""
        plain = f"1 to {self.longest} printable characters{without}, not the word None and no blanks around them"
        return (self.about or plain) + (", or an empty string" if self.optional else "")


@dataclass(frozen=True)
class Field:
    """One setting. Its type is the type of its default.

    Attributes:
      low, high: of a number; both are allowed.
      zero: what an exact 0 means that is allowed below `low`.
      choices: of a text, or of each item of a tuple; empty: any that `text` accepts.
      per_operand: one of the choices for all operands, or three joined by commas for W, A and G.
      only_with: (setting, its values that make this one matter); without one of them this must keep its default.
        No values: every value but its default.
      resumable: may differ from the checkpoint's value when a run is resumed.
    """

    name: str
    default: bool | int | float | str | tuple[str, ...]
    meaning: str
    low: float | None = None
    high: float = INT32_MAX
    zero: str = ""
    choices: tuple[str, ...] = ()
    per_operand: bool = False
    text: Text = Text()
    only_with: tuple[str, tuple[Any, ...]] | None = None
    resumable: bool = False

    @property
    def kind(self) -> type:
        return type(self.default)

    def accepts(self, value: Any) -> bool:
        """Whether a value of the field's type is in its limits."""
        if self.low is not None:
            return self.low <= value <= self.high or bool(self.zero) and value == 0
        if self.kind is bool:
            return True
        items = (value,)
        if self.kind is tuple:
            if not all(type(item) is str for item in value) or len(set(value)) < len(value):
                return False
            items = value
        elif self.per_operand:
            items = value.split(",")
            if len(items) not in (1, 3):
                return False
        return all(item in self.choices if self.choices else self.text.accepts(item) for item in items)

    @property
    def words(self) -> str:
        """What may be given, as the end of a sentence that begins with "give"."""
        if self.low is not None:
            number = "a whole number" if self.kind is int else "a number"
            return f"{f'0 ({self.zero}) or ' if self.zero else ''}{number} from {_edge(self.low)} to {_edge(self.high)}"
        if self.kind is bool:
            return "True or False"
        if self.kind is tuple:
            each = f"one of {', '.join(self.choices)}" if self.choices else self.text.words
            return f"different items, each {each}"
        if self.choices:
            three = ", or three of them for W, A and G joined by commas" if self.per_operand else ""
            return f"one of {', '.join(self.choices)}{three}"
        return self.text.words

    @property
    def brief(self) -> str:
        """`words` in short, for --help; empty where the meaning says enough."""
        if self.low is not None:
            whole = self.kind is int and self.high == INT32_MAX
            limits = f"{_edge(self.low)} or more" if whole else f"{_edge(self.low)} to {_edge(self.high)}"
            return f"0, {limits}" if self.zero else limits
        return " | ".join(self.choices) + ("; or three for W, A, G" if self.per_operand else "")


def _edge(limit: float) -> str:
    return _EDGES.get(limit, str(limit) if isinstance(limit, int) else f"{limit:g}")


def _is_local_folder(path: str) -> bool:
    return "://" not in path and os.path.expanduser(path)[0] != "~"  # it leaves the ~ of a user that there is not


def _names_groups(text: str) -> bool:
    groups = text.split(",")
    return text in ("all", "none") or (len(set(groups)) == len(groups) and set(groups) <= set(METRIC_GROUPS))


PROJECT = Text(without="/\\#?%:")  # W&B refuses those
ENTITY = Text(optional=True)
FOLDER = Text(
    longest=4096,
    check=_is_local_folder,
    about="the path of a local folder (printable characters, no blanks around them, no scheme such as gs://, no ~name "
    "of an unknown user)",
)
OPTIONAL_FOLDER = dataclasses.replace(FOLDER, optional=True)
GROUPS_OF_METRICS = Text(
    check=_names_groups, about=f"all, none, or some of {', '.join(METRIC_GROUPS)} joined by commas, each once"
)
ITEM = Text(without=",")
RECIPE = Text(longest=4096, without=",")  # it may name many layers
TAG = Text(longest=64, without=",")
TOKENIZER = Text(
    longest=4096,
    check=lambda text: text in TOKENIZERS or is_file_name(text),
    about=f"one of {', '.join(TOKENIZERS)}, or the path of a tokenizer.json",
)
XLA_OPTION = Text(
    without=",",
    check=lambda text: re.fullmatch(r"xla_[a-z0-9_]+=[^\s=]+", text) is not None,
    about="an option of XLA's compiler as NAME=VALUE, without blanks or commas, whose name begins with xla_",
)
LLAMA = ("model", ("llama",))
FP8, REFERENCE = ("use_fp8", (True,)), ("reference_gradient", (True,))
WANDB = ("loggers", (("wandb",), ("wandb", "tensorboard"), ("tensorboard", "wandb")))

# The upper limits of sizes are not promises that such a model fits a device; beyond them a value is a slip.
# fmt: off
GROUPS: tuple[tuple[str, tuple[Field, ...]], ...] = (
    ("Model", (
        Field("model", "gpt2", "gpt2, or llama: RMSNorm, rotary positions, SwiGLU, no biases (docs/models.md)",
              choices=MODELS),
        Field("n_layer", 6, "transformer blocks", low=1, high=1024),
        Field("n_head", 6, "attention heads of a block; must divide n_embd", low=1, high=65536),
        Field("n_embd", 384, "width: numbers that stand for one token", low=1, high=65536),
        Field("block_size", 256, "tokens the model sees at once (its context)", low=1, high=2**20),
        Field("vocab_size", 0, "rows of the embedding table; at least the tokenizer's own size (gpt2 50257, bytes "
              "256), which 0 stands for", low=2, high=65536, zero="the tokenizer's own size"),
        Field("n_kv_head", 0, "attention heads of keys and values (grouped queries); must divide n_head; 0 = n_head",
              low=0, high=65536, only_with=LLAMA),
        Field("tied_head", True, "the output head multiplies with the embedding table; False: with a table of its own",
              only_with=LLAMA),
        Field("qk_norm", False, "queries and keys are normalized, head by head, before they are rotated",
              only_with=LLAMA),
        Field("smooth_swiglu", False, "the input of mlp_down is scaled by columns before it is quantized, and scaled "
              "back after (Smooth-SwiGLU)", only_with=LLAMA),
        Field("norm_gains", "float32", "gains of the norms in the forward pass: as they are, or in blocks of 32 as the "
              "weights of this recipe", choices=("float32", *GAINS)),
        Field("init_from", "", "folder of weights to start from, in place of random ones: of Hugging Face (GPT-2 or "
              "Llama), of a run, or a checkpoint; parameters only, the run starts at step 0", text=OPTIONAL_FOLDER),
        Field("dropout", 0.0, "share of activations set to 0 in training; 0 = off", low=0, high=FLOAT32_BELOW_1),
    )),
    ("Number formats and attention", (
        Field("compute_dtype", "bfloat16", "type of the operands of every matrix product; sums, parameters and "
              "moments are float32", choices=("bfloat16", "float32")),
        Field("attention", "auto", "attention kernel; auto = cuDNN where the device and the sizes allow it, else XLA",
              choices=("auto", "xla", "cudnn")),
        Field("use_fp8", False, "train in number formats: round the operands of the products as `formats` says"),
        Field("formats", (), "which operands get which format; a name alone means every linear layer of the blocks",
              text=ITEM, only_with=FP8),
        Field("scaling", "delayed", "what an operand's scale comes from: earlier amaxes; its current one, for the "
              "whole tensor, for every output channel or token, or for blocks of neighbours; or no scale",
              choices=SCALINGS, per_operand=True, only_with=FP8),
        Field("amax_history", 16, "updates whose largest amax gives a delayed scale, in formats and in recipes",
              low=1, high=65536),
        Field("scale_rounding", "power_of_two", "whether scales are rounded down to powers of two",
              choices=("power_of_two", "float32"), only_with=FP8),
        Field("operand_rounding", "nearest", "how operands are rounded; an evaluation rounds to nearest",
              choices=ROUNDINGS, per_operand=True, only_with=FP8),
        Field("saturate", True, "what is too large becomes the largest number; False: infinity or NaN, where the "
              "format has one", only_with=FP8),
        Field("products", "emulated", "emulated = exact operands in compute_dtype, any format; native = float8 "
              "products, E4M3 and E5M2", choices=("emulated", "native"), only_with=FP8),
        Field("weights_at_rest", "float32", "weights that have a format: a float32 master, or stored on the format's "
              "grid and updated by rounding to nearest, stochastically, or with error feedback",
              choices=AT_REST, only_with=FP8),
        Field("range_clip", 0.0, "0 (off), or the amax of G that counts is at most this times its rms times the "
              "format's range", low=0, high=1e6, only_with=FP8),
        Field("emergency_formats", (), "formats with more and more mantissa bits, changed to in turn after "
              "emergency_patience bad updates in a row (non-finite, loss spike or divergence); none = off",
              text=ITEM, only_with=FP8),
        Field("emergency_patience", 3, "bad updates in a row that shift the format",
              low=1, only_with=("emergency_formats", ())),
        Field("recipe", (), "how every operand of every product is quantized: a named recipe such as mxfp8 or nvfp4 "
              "(docs/recipes.md), then more with the update, the share of max_steps or the bad updates in a row "
              "from which each holds: nvfp4,bf16@0.8 or nvfp4,bf16@bad3; ~LAYER[:PRODUCT] keeps some high",
              text=RECIPE),
        Field("recipe_program", (), "more recipes that the compiled program can follow; a sweep sets it, so that its "
              "members share one program", text=RECIPE, only_with=("recipe", ())),
        Field("certify_draws", 0, "draws of a certificate at every diagnosis (docs/bias.md): what of each product's "
              "error averages out and what stays; give 16; 0 = off",
              low=2, high=4096, zero="off", only_with=("recipe", ()), resumable=True),
        Field("oscillation_reset", 0, "period in updates: in its first quarter weights are watched, and then set to "
              "the centre of their bin where they oscillate (docs/bias.md); 0 = off",
              low=4, high=10**9, zero="off", only_with=("recipe", ())),
        Field("oscillation_start", 0, "update from which that is done",
              low=0, only_with=("oscillation_reset", ())),
        Field("oscillation_threshold", 16.0, "how far a weight's rounding must have moved, over how far the weight "
              "did, to oscillate", low=1, high=1e6, only_with=("oscillation_reset", ())),
        Field("reference_gradient", False, "compare the gradient with the float32 one of the same parameters and "
              "batch, layer by layer"),
        Field("reference_interval", 1, "updates between two such comparisons; the first is compared",
              low=1, only_with=REFERENCE),
    )),
    ("Data", (
        Field("tokenizer", "gpt2", "gpt2 (byte pairs), bytes (one token a byte), or the path of a tokenizer.json",
              text=TOKENIZER),
        Field("data_source", "auto", "where text comes from; auto = prepared files if there, else eurlex57k, else "
              "the small sample", choices=("auto", "prepared", "eurlex57k", "lex_glue", "sample")),
        Field("data_seed", 1337, "decides the order of the training windows", low=0),
        Field("data_placement", "auto", "where the tokens lie; auto = on the device if they fit, else streamed from "
              "the host", choices=("auto", "device", "host")),
    )),
    ("Optimization", (
        Field("batch_size", 12, "sequences (windows of block_size tokens) in one update", low=1, high=2**20),
        Field("grad_accum_steps", 1, "equal micro-batches batch_size is computed in, one after the other; must "
              "divide it", low=1, high=2**20),
        Field("max_steps", 2000, "updates in the whole run", low=1, resumable=True),
        Field("optimizer", "adamw", "adamw; or of the format-aware ones: gradient preconditioned by ULPs before "
              "Adam; steps in ULPs of the weight after Adam (of AdamW's RMS, or mean size); whole codes of its grid",
              choices=OPTIMIZERS, only_with=FP8),
        Field("learning_rate", 0.0006, "peak learning rate", low=1e-12, high=100),
        Field("warmup_steps", 100, "updates over which the learning rate rises linearly to its peak; at most "
              "max_steps", low=0),
        Field("schedule", "constant", "after the warm-up: constant; cosine down to the end; wsd = constant, then a "
              "linear decay", choices=SCHEDULES),
        Field("min_lr_ratio", 0.1, "last learning rate / peak, for cosine and wsd",
              low=0, high=1, only_with=("schedule", ("cosine", "wsd"))),
        Field("decay_fraction", 0.2, "share of max_steps over which wsd decays",
              low=FLOAT32_TINY, high=1, only_with=("schedule", ("wsd",))),
        Field("weight_decay", 0.1, "decoupled decay (times the learning rate) of every array with 2 or more axes",
              low=0, high=1000),
        Field("beta1", 0.9, "decay of Adam's first moment per update", low=0, high=FLOAT32_BELOW_1),
        Field("beta2", 0.95, "decay of Adam's second moment per update", low=0, high=FLOAT32_BELOW_1),
        Field("adam_eps", 1e-08, "added to the root of the second moment", low=1e-30, high=1),
        Field("moments", "float32", "form in which Adam's two moments are kept between updates (emulated: it saves no "
              "memory): E4M3 with a scale for each block of 128 or 256 numbers, or the dynamic 8-bit map",
              choices=MOMENTS),
        Field("moments_rounding", "nearest", "how the moments are rounded to that form",
              choices=ROUNDINGS, only_with=("moments", ())),
        Field("grad_clip", 1.0, "global L2 norm that gradients are scaled down to; 0 = off",
              low=1e-30, high=1e30, zero="off"),
        Field("seed", 42, "decides the initial parameters and the dropout masks", low=0),
    )),
    ("Evaluation", (
        Field("eval_interval", 100, "updates between two evaluations; one is also made at step 0 and at the end",
              low=1, resumable=True),
        Field("eval_windows", 128, "validation sequences of one evaluation, the same ones every time",
              low=1, high=2**24),
        Field("eval_batch_size", 16, "validation sequences computed at once; must divide eval_windows",
              low=1, high=2**20),
        Field("evaluate_all", False, "at the end of the run also evaluate every validation sequence, and record the "
              "loss of each in window_losses.json"),
    )),
    ("Metrics and the stability monitor", (
        Field("metrics", "all", f"statistics per layer: {GROUPS_OF_METRICS.about}", text=GROUPS_OF_METRICS),
        Field("nan_patience", 10, "updates in a row with a non-finite loss or gradient after which the run stops "
              "(exit code 3)", low=1),
        Field("bit_stall_threshold", 0.5, "alert when a layer's mean share of updates that are exactly 0 or lost, "
              "or that its stored weights lose, exceeds this", low=FLOAT32_TINY, high=1),
        Field("stall_window", 100, "updates that this mean is taken over", low=1, high=2**20),
        Field("overflow_threshold", 0.01, "alert when a larger share of a quantized operand's values is clipped; "
              "with use_fp8=False no layer is quantized and there is none to watch", low=FLOAT32_TINY, high=1),
        Field("diagnostic_interval", 100, "updates between two diagnoses: rank of the weights; with formats, use of "
              "codes, histograms; 0 = never", low=1, zero="never", resumable=True),
        Field("rank_threshold", 0.1, "alert when a layer's stable rank falls below this share of its first value "
              "after the warm-up; 0 = off", low=0, high=1, resumable=True),
        Field("rank_threshold_strict", 0.3, "the same for the head and the projections into the residual stream",
              low=0, high=1, resumable=True),
        Field("dead_neuron_threshold", 1e-08, "L2 norm of an output unit's unclipped gradient below which the unit "
              "counts as silent", low=1e-18, high=1.0),
        Field("dead_neuron_window", 100, "silent updates in a row after which a unit is dead", low=1),
        Field("spike_window", 100, "losses that a loss's robust z-score looks back on; fewer than 20 say too little",
              low=20, high=2**16),
        Field("spike_threshold", 8.0, "robust z-score above which a loss is a spike", low=0.1, high=1e6),
        Field("val_patience", 3, "rises of the validation loss in a row that are flagged as divergence",
              low=1, high=2**16),
    )),
    ("Checkpoints", (
        Field("checkpoint_interval", 100, "updates between two checkpoints; the last step always gets one",
              low=1, resumable=True),
        Field("checkpoint_seconds", 60.0, "seconds of unsaved training after which one is made between two of them, "
              "sooner after a start (once half of it is unsaved, at least 5 s); it is replaced by the next; 0 = off",
              low=0, high=1e6, resumable=True),
        Field("checkpoint_dir", "checkpoints/bf16_baseline", "the run's folder: checkpoints, record, plot, verdict; "
              "--workdir replaces it", text=FOLDER, resumable=True),
        Field("max_checkpoints", 3, "checkpoints kept: the one with the best validation loss and the newest",
              low=1, high=2**16, resumable=True),
    )),
    ("Logging", (
        Field("log_interval", 1, "updates between two rows of the record and of W&B; a row with an evaluation or an "
              "alert, and the last one, are always kept", low=1, resumable=True),
        Field("layer_interval", 1, "updates between two rows that carry the statistics of every layer, from the "
              "first on; the rows between have only those of the whole model", low=1, resumable=True),
        Field("alert_interval", 100, "least updates between two alerts of one kind on console and W&B; the record "
              "keeps all", low=1, resumable=True),
        Field("project", "altgrad", "W&B project", text=PROJECT, resumable=True),
        Field("run_name", "bf16-baseline", "name of the run in W&B and the record", resumable=True),
        Field("tags", ("baseline", "bf16", "eurlex"), "W&B tags; as a flag: --config.tags=a,b",
              text=TAG, resumable=True),
        Field("wandb_mode", "auto", "auto = online where W&B finds credentials, else offline",
              choices=("auto", "online", "offline", "disabled"), resumable=True),
        Field("wandb_entity", "", "W&B user or team; empty = the account's own", text=ENTITY, resumable=True,
              only_with=WANDB),
        Field("wandb_group", "", "W&B group; empty = none", text=ENTITY, resumable=True, only_with=WANDB),
        Field("wandb_keys", (), "metrics that W&B gets, by name or shell-style pattern (loss, val_*, grad_norm/*; * "
              "also matches /); empty = all; the local record has all in any case", text=ITEM, resumable=True,
              only_with=WANDB),
        Field("loggers", ("wandb",), "where rows go besides the local record",
              choices=("wandb", "tensorboard"), resumable=True),
        Field("console", "auto", "auto = one live line on a terminal, plain lines when piped; quiet = alerts and "
              "messages", choices=("auto", "plain", "quiet"), resumable=True),
    )),
    ("Execution", (
        Field("steps_per_dispatch", 0, "most updates in one call of the device; 0 = as many as take about one second, "
              "in a sweep up to eight",
              low=0, high=2**16, resumable=True),
        Field("fsdp", 1, "devices that parameters and optimizer state are split over; must divide the visible "
              "devices, which all share the batch", low=1, high=2**16, resumable=True),
        Field("deterministic", False, "GPU: only operations that repeat to the bit (slower); a CPU always repeats"),
        Field("xla_options", (), "options for XLA's compiler, each NAME=VALUE, such as "
              "xla_gpu_command_buffer_scheduling_mode=CONCURRENT", text=XLA_OPTION),
    )),
)
# fmt: on

FIELDS: Mapping[str, Field] = MappingProxyType({field.name: field for _, group in GROUPS for field in group})
RESUMABLE_FIELDS = frozenset(field.name for field in FIELDS.values() if field.resumable)


def default_config() -> Config:
    """The baseline: every field at its default, locked (no new names) and type-safe."""
    return _build({name: field.default for name, field in FIELDS.items()})


def _build(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(dict(values))
    config.lock()
    return config


# ------------------------------------------------------------------------------------------------------- what is wrong


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError unless every field is there, has its type, is in its limits and fits the others.

    The message is one sentence; if several settings are wrong it has one line for each of them.
    """
    _raise_for(problems(values_of(config)))


def values_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """{name: value} of whatever a config holds; UserError for something else than a config."""
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"a config must be the ConfigDict that default_config() returns, not a {type(config).__name__}; "
            "build one from plain values with altgrad_jax.config.from_dict"
        )
    try:
        names = config.keys()
    except TypeError:  # it sorts them
        raise UserError("the config has a setting whose name is no text: give only names that --help lists") from None
    values = {}
    for name in names:
        try:
            values[name] = config[name]
        except Exception:  # a required placeholder that was never set
            values[name] = None
    return values


def _raise_for(found: list[str]) -> None:
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        raise UserError(LIST_ITEM.join([f"{len(found)} settings cannot be used:", *found]))


def problems(values: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing wrong with `values` (name -> value), an empty list if it can be run."""
    return _single_problems(values) or _conflicts(values)  # how fields fit together is a question only once each fits


def _single_problems(values: Mapping[str, Any]) -> list[str]:
    found = [unknown_field(str(name)) for name in values if name not in FIELDS]
    for name, field in FIELDS.items():
        if name not in values:
            found.append(f"the setting {name} is missing: start from altgrad_jax.config.default_config()")
        elif text := problem(field, values[name]):
            found.append(text)
    return found


def wrong_values(values: Mapping[str, Any]) -> list[str]:
    """One sentence for each of `values`, as JSON holds them, that its field cannot have; no word on other names."""
    values = _from_json(upgraded(values))
    found = (problem(field, values[name]) for name, field in FIELDS.items() if name in values)
    return [text for text in found if text]


def problem(field: Field, value: Any) -> str | None:
    """The sentence that refuses `value`, or None if the field may have it."""
    if type(value) is not field.kind:
        return cannot_use(field, f"{show(value)} ({type(value).__name__})")
    return None if field.accepts(value) else cannot_use(field, show(value))


def cannot_use(field: Field, shown: str) -> str:
    """The sentence that refuses a value of `field`; `shown` is that value as text."""
    return f"{field.name}={shown} cannot be used: give {field.words} (the baseline has {show(field.default)})"


def unknown_field(name: str) -> str:
    """The sentence that refuses a name that no field has, with the nearest one that exists."""
    guess = nearest_field(name)
    hint = f"did you mean {guess}?" if guess else "--help lists them all"
    return f"there is no setting {show(name)}; {hint}"


def nearest_field(name: str) -> str | None:
    """The field whose name is spelt most like `name`, or None if none is near."""
    plain = name.rsplit(".", 1)[-1].replace("-", "_").lower()
    return _SHORT_NAMES.get(plain) or RENAMED_IN_6.get(plain) or nearest(plain, FIELDS)


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate spelt most like `word`, or None if none is near."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return close[0] if close else None


def show(value: Any) -> str:
    """`value` as one line of at most about 80 characters, whatever it is."""
    try:
        text = repr(value).replace("\n", " ")
    except Exception:  # Python refuses to print a whole number of more than 4300 digits
        return f"<a {type(value).__name__} that cannot be printed>"
    return text if len(text) <= 80 else text[:60] + "..."


def _conflicts(values: Mapping[str, Any]) -> list[str]:
    """What is wrong between fields that are right by themselves."""
    c = ml_collections.FrozenConfigDict(values)
    return [
        *_without_effect(c),
        *conflicts.of_sizes(c),
        *conflicts.of_one_token(c),
        *conflicts.of_schedule(c),
        *conflicts.of_moments(c),
        *conflicts.of_gains(c),
        *conflicts.of_smooth_swiglu(c),
        *conflicts.of_formats(c),
        *conflicts.of_xla_options(c),
        *conflicts.of_recipe(c),
    ]


def _matters(field: Field, values: Mapping[str, Any]) -> bool:
    """Whether anything reads this field, as far as `only_with` tells."""
    if field.only_with is None:
        return True
    other, allowed = field.only_with
    return values[other] in allowed if allowed else values[other] != FIELDS[other].default


def _without_effect(c: Any) -> Iterator[str]:
    """Values that nothing would read: they would be ignored in silence."""
    for name, field in FIELDS.items():
        if field.only_with and c[name] != field.default and not _matters(field, c):
            other, allowed = field.only_with
            words = (",".join(value) if isinstance(value, tuple) else str(value) for value in allowed)
            to = f" to {' or '.join(words)}" if allowed else ""
            yield (
                f"{name}={show(c[name])} has no effect with {other}={show(c[other])}: set {other}{to}, or leave {name} "
                f"at {show(field.default)}"
            )
    for name in ("rank_threshold", "rank_threshold_strict", "certify_draws"):
        if not c.diagnostic_interval and c[name] != FIELDS[name].default:
            yield (
                f"{name}={show(c[name])} is about diagnoses, and diagnostic_interval=0 makes none: set "
                f"diagnostic_interval, or leave {name} at {show(FIELDS[name].default)}"
            )
    asked = [group for group in c.metrics.split(",") if group in FORMAT_GROUPS and not (c.recipe and group == "format")]
    if asked and not c.use_fp8:
        yield (
            f"metrics={c.metrics!r} names {', '.join(asked)}, which use_fp8=False leaves nothing to "
            "measure: set use_fp8=True, or leave it out"
        )
    exact = c.compute_dtype == "float32" and c.norm_gains == "float32"
    if c.reference_gradient and not (c.use_fp8 or c.recipe) and exact:
        yield (
            "reference_gradient=True has nothing to compare: with use_fp8=False and compute_dtype='float32' the "
            "gradient is its own reference: set reference_gradient=False"
        )


# --------------------------------------------------------------------------------------- what follows from what is set


def fitted(config: ml_collections.ConfigDict, given: Collection[str] | None = None) -> tuple[Config, list[str]]:
    """The config with settings that nobody set fitted to those that somebody set, and a sentence for each.

    A setting gives way to one that was set closer to the start: a default to the config file, both to a flag. What was
    given never changes; contradictions among settings of one rank stay, and `validate` refuses them. A vocab_size of 0
    becomes the tokenizer's own. A config with a value that its field cannot have comes back as it is.

    Args:
      config: ConfigDict; it is not changed.
      given: names that were given as flags; None: every setting that differs from its default.
    """
    values = values_of(config)
    if _single_problems(values):
        return config, []
    unlike = {name for name, field in FIELDS.items() if values[name] != field.default}
    given = unlike if given is None else given
    rank = {name: 2 if name in given else int(name in unlike) for name in FIELDS}
    said = []
    for fit in (_fit_formats, _fit_model, _fit_batches, _fit_schedule):
        for name, others, value, why in fit(values):
            if rank[name] < max(rank[other] for other in others):
                said.append(f"{name}={show(value)} is used, because {name}={show(values[name])} {why}")
                values[name] = value
    values["vocab_size"] = values["vocab_size"] or vocabulary_size(values["tokenizer"])
    return _build(values), said


# A setting that could give way, the settings one of which must have been set closer, its new value, and why.
_Fit = Iterator[tuple[str, tuple[str, ...], Any, str]]


def _fit_formats(c: dict[str, Any]) -> _Fit:
    if c["formats"] and not c["use_fp8"]:
        yield "use_fp8", ("formats",), True, f"leaves formats={show(c['formats'])} without effect"
    for name, field in FIELDS.items():
        if field.only_with and c[name] != field.default and not _matters(field, c):
            other = field.only_with[0]
            yield name, (other,), field.default, f"has no effect with {other}={show(c[other])}"


def _fit_model(c: dict[str, Any]) -> _Fit:
    if c["n_embd"] % c["n_head"]:
        heads = _largest_divisor(c["n_embd"], c["n_head"])
        yield "n_head", ("n_embd",), heads, f"does not divide n_embd={c['n_embd']}"
    own = vocabulary_size(c["tokenizer"])
    if 0 < c["vocab_size"] < own:
        yield "vocab_size", ("tokenizer",), own, f"is too small for tokenizer={c['tokenizer']!r}"


def _fit_batches(c: dict[str, Any]) -> _Fit:
    for part, whole in (("grad_accum_steps", "batch_size"), ("eval_batch_size", "eval_windows")):
        if c[whole] % c[part]:
            yield part, (whole,), _largest_divisor(c[whole], c[part]), f"does not divide {whole}={c[whole]}"
    size = c["eval_batch_size"]
    if c["eval_windows"] % size:
        more = math.ceil(c["eval_windows"] / size) * size
        yield "eval_windows", ("eval_batch_size",), more, f"is no multiple of eval_batch_size={size}"


def _fit_schedule(c: dict[str, Any]) -> _Fit:
    steps, wsd = c["max_steps"], c["schedule"] == "wsd"
    if wsd and not decay_steps(c["decay_fraction"], steps):
        yield "decay_fraction", ("max_steps", "schedule"), 1 / steps, f"of max_steps={steps} is no update"
    room = steps - (decay_steps(c["decay_fraction"], steps) if wsd else c["schedule"] == "cosine")
    if c["warmup_steps"] > room:
        shorter = min(max(1, steps // 10), room)
        others = ("max_steps", "schedule", "decay_fraction")
        yield "warmup_steps", others, shorter, f"does not fit into max_steps={steps} with schedule={c['schedule']!r}"
    left = steps - c["warmup_steps"]
    if wsd and 1 <= left < decay_steps(c["decay_fraction"], steps):
        why = f"of max_steps={steps} does not fit behind warmup_steps={c['warmup_steps']}"
        yield "decay_fraction", ("warmup_steps", "max_steps"), left / steps, why


def _largest_divisor(number: int, most: int) -> int:
    return next(part for part in range(min(number, most), 0, -1) if number % part == 0)


# ----------------------------------------------------------------------------------------------------- JSON and records


def numbers_in(config: Any) -> str:
    """What a run computes in, for names: "bf16", "float32", or its formats such as "e4m3-block-g-e5m2"."""
    if config.use_fp8:
        return re.sub("[^a-z0-9_]+", "-", "-".join(config.formats).lower()).strip("-")
    return "bf16" if config.compute_dtype == "bfloat16" else config.compute_dtype


def metric_groups(metrics: str) -> tuple[str, ...]:
    """The groups that the field `metrics` (valid) names, in the order of METRIC_GROUPS."""
    if metrics == "all":
        return METRIC_GROUPS
    return tuple(group for group in METRIC_GROUPS if group in metrics.split(","))


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The settings as JSON holds them: tuples become lists. `from_dict` turns them back."""
    return {name: _as_json(config[name]) for name in FIELDS}


def from_dict(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The locked ConfigDict of `values`, as `to_dict` or JSON gives them; UserError unless it is valid."""
    values = _from_json(upgraded(values))
    _raise_for(problems(values))
    return _build(values)


def _from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) and name in FIELDS and FIELDS[name].kind is tuple else value
        for name, value in values.items()
    }


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# Settings that records of schema version 1 lack. With their defaults, training goes on as in those runs; what is
# measured besides may be more.
ADDED_IN_2 = frozenset(
    "formats scaling amax_history scale_rounding operand_rounding saturate products weights_at_rest range_clip "
    "emergency_formats emergency_patience optimizer reference_interval diagnostic_interval rank_threshold "
    "rank_threshold_strict layer_interval wandb_group wandb_keys fsdp".split()
)
# And those that records of all versions before 3, 4, 5, 6, 7 and 8 lack.
ADDED_IN_3 = frozenset({"checkpoint_seconds"})
ADDED_IN_4 = frozenset({"loggers"})
ADDED_IN_5 = frozenset({"xla_options", "recipe", "recipe_program", "moments", "moments_rounding"})
ADDED_IN_6 = frozenset({"evaluate_all", "model", "n_kv_head", "tied_head", "qk_norm", "init_from"})
ADDED_IN_7 = frozenset({"certify_draws"})
ADDED_IN_8 = frozenset(
    {"norm_gains", "smooth_swiglu", "oscillation_reset", "oscillation_start", "oscillation_threshold"}
)


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a record of any schema version (as JSON holds them) as those of today: under today's names, and
    with what it could not have yet.

    A record of before version 6 is known by its names; its optimizer ulp_adamw is ulp_adamw_mean today.
    """
    added = sorted(ADDED_IN_2 | ADDED_IN_3 | ADDED_IN_4 | ADDED_IN_5 | ADDED_IN_6 | ADDED_IN_7 | ADDED_IN_8)
    values = dict(values)
    if values.keys() & RENAMED_IN_6.keys():
        values = {RENAMED_IN_6.get(name, name): value for name, value in values.items()}
        if isinstance(scaling := values.get("scaling"), str):
            values["scaling"] = ",".join(_SCALING_BEFORE_6.get(way, way) for way in scaling.split(","))
        if values.get("optimizer") == "ulp_adamw":
            values["optimizer"] = "ulp_adamw_mean"
    return {name: _as_json(FIELDS[name].default) for name in added} | values


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each field that forbids resuming the run made with `old` under `new`; none if it may go on.

    Either may come from `to_dict` or from JSON. Fields of RESUMABLE_FIELDS may differ, with two exceptions: under
    schedule "cosine" or "wsd", max_steps decides learning rates of updates that are already made, and under a recipe
    that holds from a share of the run it decides which recipe they followed.
    """
    old = upgraded(old)
    schedule, free, why_not = old.get("schedule"), RESUMABLE_FIELDS, ""
    if schedule != "constant":
        why_not = f"with schedule={schedule!r} it changes the learning rate"
    elif shares := [item for item in old.get("recipe") or () if "." in item.partition("@")[2]]:
        why_not = f"with {shares[0]} it changes which updates follow which recipe"
    if why_not:
        free = free - {"max_steps"}
    names = [*FIELDS, *sorted((set(old) | set(new)) - set(FIELDS))]
    lines = []
    for name in names:
        before, now = _as_json(old.get(name)), _as_json(new.get(name))
        if name in free or (name in old) == (name in new) and before == now:
            continue
        words_before = f"{show(before)} in the run" if name in old else "not a setting of the run"
        words_now = f"{show(now)} now" if name in new else "not a setting now"
        why = f" ({why_not})" if name == "max_steps" and why_not else ""
        lines.append(f"{name}: {words_before}, {words_now}{why}")
    return lines


# ---------------------------------------------------------------------------------------------------------- for --help


def describe() -> str:
    """Every field with its default, meaning and allowed values, grouped; lines of at most 100 characters."""
    lines = []
    for title, group in GROUPS:
        lines += ["", title]
        for field in group:
            default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            allowed = f" [{field.brief}]" if field.brief else ""
            lines += entry(f"{field.name}={default}{' *' if field.resumable else ''}", field.meaning + allowed)
    return "\n".join(lines[1:])


def entry(left: str, text: str, margin: int = 30) -> list[str]:
    """Lines of --help of at most 100 characters: `left` in its margin, and `text` beside it."""
    lines = textwrap.wrap(text, width=100 - margin, break_long_words=False, break_on_hyphens=False)
    head = [f"  {left}"] if len(left) + 2 >= margin else [f"  {left}".ljust(margin) + lines.pop(0)]
    return head + [" " * margin + line for line in lines]
