"""Every setting of a run: its name, default, meaning, unit and allowed values, in one table.

The settings are flat and the table below is the only place that lists them: the default ConfigDict, the
checks, the help text, and the rule for what may change on resume all read it. A setting that cannot be
honoured is an error before the first step, never ignored.

ml_collections checks less than it seems to. It accepts NaN and infinity, True where a whole number belongs,
None and NumPy scalars for anything, and ("a,b",) for two tags; so `validate` looks at every value again, and
asks for exactly the Python type of the default. Many limits below are those of float32 and int32, the types
in which the numbers enter the compiled step: there an `adam_eps` of 1e-50 would be 0, and a `beta2` of
0.9999999999 would be 1.

No jax here, so that `--help` and every complaint about a setting come at once.
"""

import difflib
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_collections

from altgrad_jax.errors import LIST_ITEM, UserError
from altgrad_jax.numerics import rules
from altgrad_jax.numerics.formats import get_format, require_overflow_code

# A ConfigDict with the settings of this file. (To a type checker every attribute of a ConfigDict is a union of all.)
Config = Any

INT32_MAX = 2**31 - 1
FLOAT32_TINY = 2.0**-126  # the smallest normal float32; compiled code may flush what is below to 0
FLOAT32_BELOW_1 = 1 - 2.0**-24
VOCABULARY_OF = MappingProxyType({"gpt2": 50257, "bytes": 256})  # token ids each tokenizer can produce
METRIC_GROUPS = ("grad", "update", "param", "dead", "activation", "format", "ledger")
FORMAT_GROUPS = ("format", "ledger")  # exist only with use_fp8
SCALINGS = ("delayed", "tensor", "channel", "block32", "block128", "none")
AT_REST = ("float32", "nearest", "stochastic", "error_feedback")
OPTIMIZERS = ("adamw", "ulp_precondition_before_adam", "ulp_adamw", "grid")

# What people type for a field whose name is too far away for a spelling match.
_SHORT_NAMES = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size"}


@dataclass(frozen=True)
class Rule:
    """What a field accepts: words that complete "give ...", the test, and the words shortened for --help.

    The test only ever sees a value of the field's type. Empty `brief`: the meaning says enough.
    """

    words: str
    accepts: Callable[[Any], bool]
    brief: str = ""


@dataclass(frozen=True)
class Field:
    """One setting. Its type is the type of its default."""

    name: str
    default: bool | int | float | str | tuple[str, ...]
    rule: Rule
    meaning: str
    resumable: bool = False  # may differ from the checkpoint's value when a run is resumed

    @property
    def kind(self) -> type:
        return type(self.default)


def _whole(low: int, high: int = INT32_MAX) -> Rule:
    brief = f"{low} or more" if high == INT32_MAX else f"{low} to {high}"
    return Rule(f"a whole number from {low} to {high}", lambda value: low <= value <= high, brief)


def _number(low: float, high: float) -> Rule:
    brief = f"{low:g} to {high:g}"
    return Rule(f"a number from {brief}", lambda value: low <= value <= high, brief)


def _one_of(*choices: str) -> Rule:
    return Rule("one of " + ", ".join(choices), lambda value: value in choices, " | ".join(choices))


_YES_NO = Rule("True or False", lambda value: True)
_POSITIVE_SHARE = Rule(
    "a number above 0 and at most 1, in float32", lambda value: FLOAT32_TINY <= value <= 1, "above 0, to 1"
)
_SQUARED_SHARE = _number(1e-18, 1)  # its square must be a normal float32
_BELOW_ONE = Rule("a number from 0 to below 1, in float32", lambda value: 0 <= value <= FLOAT32_BELOW_1, "0 to below 1")
_CLIP = Rule("0 (off) or a number from 1e-30 to 1e+30", lambda value: value == 0 or 1e-30 <= value <= 1e30, "0 or more")


def _is_name(text: str, longest: int = 128) -> bool:
    # "None" is what a flag makes of an attempt to unset a string.
    return text.isprintable() and text == text.strip() and 0 < len(text) <= longest and text != "None"


_NAME = Rule("1 to 128 printable characters, without blanks around them and not the word None", _is_name)
_PROJECT = Rule(
    "1 to 128 printable characters, none of them /\\#?%: (W&B refuses those)",
    lambda value: _is_name(value) and not set(value) & set("/\\#?%:"),
)
_ENTITY = Rule("a W&B user or team name, or an empty string", lambda value: value == "" or _is_name(value))
_GROUP = Rule("1 to 128 printable characters, or an empty string", lambda value: value == "" or _is_name(value))
_FOLDER = Rule(
    "the path of a local folder (printable characters, no blanks around them, no scheme such as gs://, no ~name of "
    "an unknown user)",
    # expanduser leaves the ~ of a user that there is not.
    lambda value: _is_name(value, longest=4096) and "://" not in value and os.path.expanduser(value)[0] != "~",
)
_TAGS = Rule(
    'a tuple of different tags such as ("a", "b"), each of 1 to 64 printable characters without a comma',
    lambda value: (
        len(set(value)) == len(value)
        and all(type(tag) is str and _is_name(tag, longest=64) and "," not in tag for tag in value)
    ),
)


_PATTERNS = Rule(
    'a tuple of different patterns of metric names such as ("loss", "val_*"), each printable and without a comma',
    lambda value: (
        len(set(value)) == len(value)
        and all(type(pattern) is str and _is_name(pattern) and "," not in pattern for pattern in value)
    ),
    "patterns",
)


def _names_groups(value: str) -> bool:
    groups = value.split(",")
    return value in ("all", "none") or (len(set(groups)) == len(groups) and set(groups) <= set(METRIC_GROUPS))


def _for_operands(*choices: str) -> Rule:
    """One choice for all operands, or three for W, A and G."""
    return Rule(
        f"one of {', '.join(choices)}, or three of them for W, A and G joined by commas",
        lambda value: len(value.split(",")) in (1, 3) and set(value.split(",")) <= set(choices),
        " | ".join(choices) + "; or three for W, A, G",
    )


_FORMATS = Rule(
    "rules such as E5M2, block_*/mlp_*=E3M4 or block_*:G=E5M2 (altgrad_jax/format_rules.py), each once",
    lambda value: len(set(value)) == len(value) and all(type(rule) is str and _is_name(rule) for rule in value),
    "rules",
)
_FORMAT_NAMES = Rule(
    "names of formats such as E3M4, each once",
    lambda value: len(set(value)) == len(value) and all(type(name) is str and _is_name(name) for name in value),
    "names",
)
_METRICS = Rule(f"all, none, or some of {', '.join(METRIC_GROUPS)} joined by commas, each once", _names_groups)


# The upper limits of sizes are not promises that such a model fits a device; beyond them a value is a slip.
GROUPS: tuple[tuple[str, tuple[Field, ...]], ...] = (
    (
        "Model (GPT-2)",
        (
            Field("n_layer", 6, _whole(1, 1024), "transformer blocks"),
            Field("n_head", 6, _whole(1, 65536), "attention heads of a block; must divide n_embd"),
            Field("n_embd", 384, _whole(1, 65536), "width: numbers that stand for one token"),
            Field("block_size", 256, _whole(1, 2**20), "tokens the model sees at once (its context)"),
            Field(
                "vocab_size",
                50257,
                _whole(2, 65536),
                "rows of the embedding table; at least the tokenizer's own size (gpt2 50257, bytes 256)",
            ),
            Field("dropout", 0.0, _BELOW_ONE, "share of activations set to 0 in training; 0 = off"),
        ),
    ),
    (
        "Number formats and attention",
        (
            Field(
                "compute_dtype",
                "bfloat16",
                _one_of("bfloat16", "float32"),
                "type of the operands of every matrix product; sums, parameters and moments are float32",
            ),
            Field(
                "attention",
                "auto",
                _one_of("auto", "xla", "cudnn"),
                "attention kernel; auto = cuDNN where the device and the sizes allow it, else XLA",
            ),
            Field(
                "use_fp8",
                False,
                _YES_NO,
                "train in number formats: round the operands of the products as `formats` says",
            ),
            Field(
                "formats",
                (),
                _FORMATS,
                "which operands get which format; a name alone means every linear layer of the blocks",
            ),
            Field(
                "scaling",
                "delayed",
                _for_operands(*SCALINGS),
                "what an operand's scale comes from: earlier amaxes; its own, for the whole tensor, for every "
                "output channel or token, or for blocks of neighbours; or no scale",
            ),
            Field("amax_history", 16, _whole(1, 65536), "updates whose largest amax gives a delayed scale"),
            Field(
                "scale_rounding",
                "power_of_two",
                _one_of("power_of_two", "float32"),
                "whether scales are rounded down to powers of two",
            ),
            Field(
                "operand_rounding",
                "nearest",
                _for_operands("nearest", "stochastic"),
                "how operands are rounded; an evaluation rounds to nearest",
            ),
            Field(
                "saturate",
                True,
                _YES_NO,
                "what is too large becomes the largest number; False: infinity or NaN, where the format has one",
            ),
            Field(
                "products",
                "emulated",
                _one_of("emulated", "native"),
                "emulated = exact operands in compute_dtype, any format; native = float8 products, E4M3 and E5M2",
            ),
            Field(
                "weights_at_rest",
                "float32",
                _one_of(*AT_REST),
                "weights that have a format: a float32 master, or stored on the format's grid and updated by "
                "rounding to nearest, stochastically, or with error feedback",
            ),
            Field(
                "range_clip",
                0.0,
                _number(0, 1e6),
                "0 (off), or the amax of G that counts is at most this times its rms times the format's range",
            ),
            Field(
                "emergency_formats",
                (),
                _FORMAT_NAMES,
                "formats with more and more mantissa bits, changed to in turn after emergency_patience bad "
                "updates in a row (non-finite, loss spike or divergence); none = off",
            ),
            Field("emergency_patience", 3, _whole(1), "bad updates in a row that shift the format"),
            Field(
                "use_shadow",
                False,
                _YES_NO,
                "compare the gradient with the float32 one of the same parameters and batch, layer by layer",
            ),
            Field("shadow_interval", 1, _whole(1), "updates between two such comparisons; the first is compared"),
        ),
    ),
    (
        "Data",
        (
            Field("tokenizer", "gpt2", _one_of("gpt2", "bytes"), "gpt2 (byte pairs) or bytes (one token a byte)"),
            Field(
                "data_source",
                "auto",
                _one_of("auto", "prepared", "eurlex57k", "lex_glue", "sample"),
                "where text comes from; auto = prepared files if there, else eurlex57k, else the small sample",
            ),
            Field("data_seed", 1337, _whole(0), "decides the order of the training windows"),
            Field(
                "data_placement",
                "auto",
                _one_of("auto", "device", "host"),
                "where the tokens lie; auto = on the device if they fit, else streamed from the host",
            ),
        ),
    ),
    (
        "Optimization",
        (
            Field("batch_size", 12, _whole(1, 2**20), "sequences (windows of block_size tokens) in one update"),
            Field(
                "grad_accum_steps",
                1,
                _whole(1, 2**20),
                "equal micro-batches batch_size is computed in, one after the other; must divide it",
            ),
            Field("max_steps", 2000, _whole(1), "updates in the whole run", resumable=True),
            Field(
                "optimizer",
                "adamw",
                _one_of(*OPTIMIZERS),
                "adamw; or of the format-aware ones: gradient preconditioned by ULPs before Adam; steps in ULPs "
                "of the weight after Adam; whole codes of the weight's grid",
            ),
            Field("learning_rate", 6e-4, _number(1e-12, 100), "peak learning rate"),
            Field(
                "warmup_steps",
                100,
                _whole(0),
                "updates over which the learning rate rises linearly to its peak; at most max_steps",
            ),
            Field(
                "schedule",
                "constant",
                _one_of("constant", "cosine", "wsd"),
                "after the warm-up: constant; cosine down to the end; wsd = constant, then a linear decay",
            ),
            Field("min_lr_ratio", 0.1, _number(0, 1), "last learning rate / peak, for cosine and wsd"),
            Field("decay_fraction", 0.2, _POSITIVE_SHARE, "share of max_steps over which wsd decays"),
            Field(
                "weight_decay",
                0.1,
                _number(0, 1000),
                "decoupled decay (times the learning rate) of every array with 2 or more axes",
            ),
            Field("beta1", 0.9, _BELOW_ONE, "decay of Adam's first moment per update"),
            Field("beta2", 0.95, _BELOW_ONE, "decay of Adam's second moment per update"),
            Field("adam_eps", 1e-8, _number(1e-30, 1), "added to the root of the second moment"),
            Field("grad_clip", 1.0, _CLIP, "global L2 norm that gradients are scaled down to; 0 = off"),
            Field("seed", 42, _whole(0), "decides the initial parameters and the dropout masks"),
        ),
    ),
    (
        "Evaluation",
        (
            Field(
                "eval_interval",
                100,
                _whole(1),
                "updates between two evaluations; one is also made at step 0 and at the end",
                resumable=True,
            ),
            Field(
                "eval_windows",
                128,
                _whole(1, 2**24),
                "validation sequences of one evaluation, the same ones every time",
            ),
            Field(
                "eval_batch_size",
                16,
                _whole(1, 2**20),
                "validation sequences computed at once; must divide eval_windows",
            ),
        ),
    ),
    (
        "Metrics and the stability monitor",
        (
            Field(
                "metrics",
                "all",
                _METRICS,
                f"statistics per layer: all, none, or of {', '.join(METRIC_GROUPS)}, joined by commas",
            ),
            Field(
                "nan_patience",
                10,
                _whole(1),
                "updates in a row with a non-finite loss or gradient after which the run stops (exit code 3)",
            ),
            Field(
                "bit_stall_threshold",
                0.5,
                _POSITIVE_SHARE,
                "alert when a layer's mean share of updates that are exactly 0, or that its stored weights lost, "
                "exceeds this",
            ),
            Field("stall_window", 100, _whole(1, 2**20), "updates that this mean is taken over"),
            Field(
                "overflow_threshold",
                0.01,
                _POSITIVE_SHARE,
                "alert when a larger share of a quantized operand's values is clipped; with use_fp8=False no "
                "layer is quantized and there is none to watch",
            ),
            Field(
                "diagnostic_interval",
                100,
                _whole(1),
                "updates between two diagnoses: rank of the weights; with formats, use of codes, histograms",
                resumable=True,
            ),
            Field(
                "rank_threshold",
                0.1,
                _number(0, 1),
                "alert when a layer's stable rank falls below this share of its first value after the warm-up; 0 = off",
                resumable=True,
            ),
            Field(
                "rank_threshold_strict",
                0.3,
                _number(0, 1),
                "the same for the head and the projections into the residual stream",
                resumable=True,
            ),
            Field(
                "dead_neuron_threshold",
                1e-8,
                _SQUARED_SHARE,
                "L2 norm of an output unit's unclipped gradient below which the unit counts as silent",
            ),
            Field("dead_neuron_window", 100, _whole(1), "silent updates in a row after which a unit is dead"),
            Field(
                "spike_window",
                100,
                _whole(20, 2**16),
                "losses that a loss's robust z-score looks back on; fewer than 20 say too little",
            ),
            Field("spike_threshold", 8.0, _number(0.1, 1e6), "robust z-score above which a loss is a spike"),
            Field(
                "val_patience",
                3,
                _whole(1, 2**16),
                "rises of the validation loss in a row that are flagged as divergence",
            ),
        ),
    ),
    (
        "Checkpoints",
        (
            Field(
                "checkpoint_interval",
                100,
                _whole(1),
                "updates between two checkpoints; the last step always gets one",
                resumable=True,
            ),
            Field(
                "checkpoint_seconds",
                60.0,
                _number(0, 1e6),
                "seconds of unsaved training after which one is made between two of them, sooner after a start "
                "(once half of it is unsaved, at least 5 s); it is replaced by the next; 0 = off",
                resumable=True,
            ),
            Field(
                "checkpoint_dir",
                "checkpoints/bf16_baseline",
                _FOLDER,
                "the run's folder: checkpoints, record, plot, verdict; --workdir replaces it",
                resumable=True,
            ),
            Field(
                "max_checkpoints",
                3,
                _whole(1, 2**16),
                "checkpoints kept: the one with the best validation loss and the newest",
                resumable=True,
            ),
        ),
    ),
    (
        "Logging",
        (
            Field(
                "log_interval",
                1,
                _whole(1),
                "updates between two rows of the record and of W&B; a row with an evaluation or an alert, and "
                "the last one, are always kept",
                resumable=True,
            ),
            Field(
                "layer_interval",
                1,
                _whole(1),
                "updates between two rows that carry the statistics of every layer, from the first on; the rows "
                "between have only those of the whole model",
                resumable=True,
            ),
            Field(
                "alert_interval",
                100,
                _whole(1),
                "least updates between two alerts of one kind on console and W&B; the record keeps all",
                resumable=True,
            ),
            Field("project", "altgrad", _PROJECT, "W&B project", resumable=True),
            Field("run_name", "bf16-baseline", _NAME, "name of the run in W&B and the record", resumable=True),
            Field(
                "tags", ("baseline", "bf16", "eurlex"), _TAGS, "W&B tags; as a flag: --config.tags=a,b", resumable=True
            ),
            Field(
                "wandb_mode",
                "auto",
                _one_of("auto", "online", "offline", "disabled"),
                "auto = online where W&B finds credentials, else offline",
                resumable=True,
            ),
            Field("wandb_entity", "", _ENTITY, "W&B user or team; empty = the account's own", resumable=True),
            Field("wandb_group", "", _GROUP, "W&B group; empty = none", resumable=True),
            Field(
                "wandb_keys",
                (),
                _PATTERNS,
                "metrics that W&B gets, by name or shell-style pattern (loss, val_*, grad_norm/*; * also matches /); "
                "empty = all; the local record has all in any case",
                resumable=True,
            ),
            Field(
                "console",
                "auto",
                _one_of("auto", "plain", "quiet"),
                "auto = one live line on a terminal, plain lines when piped; quiet = alerts and messages",
                resumable=True,
            ),
        ),
    ),
    (
        "Execution",
        (
            Field(
                "steps_per_dispatch",
                0,
                _whole(0, 2**16),
                "most updates in one call of the device; 0 = as many as take about one second",
                resumable=True,
            ),
            Field(
                "fsdp",
                1,
                _whole(1, 2**16),
                "devices that parameters and optimizer state are split over; must divide the visible devices, "
                "which all share the batch",
                resumable=True,
            ),
            Field(
                "deterministic",
                False,
                _YES_NO,
                "GPU: only operations that repeat to the bit (slower); a CPU always repeats",
            ),
        ),
    ),
)

FIELDS: Mapping[str, Field] = MappingProxyType({field.name: field for _, group in GROUPS for field in group})
RESUMABLE_FIELDS = frozenset(field.name for field in FIELDS.values() if field.resumable)


def default_config() -> ml_collections.ConfigDict:
    """The baseline: every field at its default, locked (no new names) and type-safe."""
    return _build({name: field.default for name, field in FIELDS.items()})


def _build(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(dict(values))
    config.lock()
    return config


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError unless every field is there, has its type, is in its range and fits the others.

    The message is one sentence; if several settings are wrong it has one line for each of them.
    """
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
    _raise_for(problems(values))


def _raise_for(found: list[str]) -> None:
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        raise UserError(LIST_ITEM.join([f"{len(found)} settings cannot be used:", *found]))


def problems(values: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing wrong with `values` (name -> value), an empty list if it can be run."""
    found = [unknown_field(str(name)) for name in values if name not in FIELDS]
    for name, field in FIELDS.items():
        if name not in values:
            found.append(f"the setting {name} is missing: start from altgrad_jax.config.default_config()")
        elif problem := _problem(field, values[name]):
            found.append(problem)
    return found or _conflicts(values)  # how fields fit together is a question only once each is right


def wrong_values(values: Mapping[str, Any]) -> list[str]:
    """One sentence for each of `values`, as JSON holds them, that its field cannot have; no word on other names."""
    values = _from_json(values)
    found = (_problem(field, values[name]) for name, field in FIELDS.items() if name in values)
    return [problem for problem in found if problem]


def _problem(field: Field, value: Any) -> str | None:
    if type(value) is not field.kind:
        return cannot_use(field, f"{show(value)} ({type(value).__name__})")
    return None if field.rule.accepts(value) else cannot_use(field, show(value))


def cannot_use(field: Field, shown: str) -> str:
    """The sentence that refuses a value of `field`; `shown` is that value as text."""
    baseline = show(field.default)
    return f"{field.name}={shown} cannot be used: give {field.rule.words} (the baseline has {baseline})"


def unknown_field(name: str) -> str:
    """The sentence that refuses a name that no field has, with the nearest one that exists."""
    guess = nearest_field(name)
    hint = f"did you mean {guess}?" if guess else "--help lists them all"
    return f"there is no setting {show(name)}; {hint}"


def nearest_field(name: str) -> str | None:
    """The field whose name is spelt most like `name`, or None if none is near."""
    plain = name.rsplit(".", 1)[-1].replace("-", "_").lower()
    return _SHORT_NAMES.get(plain) or nearest(plain, FIELDS)


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
    found = []

    found += _format_conflicts(c)

    if c.n_embd % c.n_head:
        found.append(
            f"n_embd={c.n_embd} cannot be split over n_head={c.n_head} heads: n_embd must be a multiple of "
            f"n_head, for example n_embd={math.ceil(c.n_embd / c.n_head) * c.n_head}"
        )
    if c.vocab_size < VOCABULARY_OF[c.tokenizer]:
        found.append(
            f"vocab_size={c.vocab_size} is too small for tokenizer={c.tokenizer!r}, whose token ids go up to "
            f"{VOCABULARY_OF[c.tokenizer] - 1}: set vocab_size to {VOCABULARY_OF[c.tokenizer]} or more"
        )
    if c.attention == "cudnn" and c.compute_dtype != "bfloat16":
        found.append(
            f"attention='cudnn' cannot work with compute_dtype={c.compute_dtype!r}, for cuDNN's kernel takes "
            "16-bit operands only: set attention='xla' or compute_dtype='bfloat16'"
        )
    if c.attention == "cudnn" and c.n_embd // c.n_head % 8:
        found.append(
            f"attention='cudnn' cannot work with heads of n_embd / n_head = {c.n_embd // c.n_head} numbers, "
            "for cuDNN's kernel takes multiples of 8 only: set attention='xla' or change n_embd or n_head"
        )

    if c.batch_size % c.grad_accum_steps:
        found.append(
            f"batch_size={c.batch_size} cannot be split into grad_accum_steps={c.grad_accum_steps} equal "
            "micro-batches: grad_accum_steps must divide batch_size"
        )
    if c.eval_windows % c.eval_batch_size:
        found.append(
            f"eval_windows={c.eval_windows} cannot be split into batches of "
            f"eval_batch_size={c.eval_batch_size}: eval_batch_size must divide eval_windows"
        )
    if c.max_steps * c.batch_size > INT32_MAX:
        found.append(
            f"max_steps={c.max_steps} times batch_size={c.batch_size} is {c.max_steps * c.batch_size} "
            f"training windows, but they are numbered in 32 bits: keep the product at {INT32_MAX} or below"
        )
    for name in ("batch_size", "eval_batch_size"):
        if c[name] * (c.block_size + 1) > INT32_MAX:
            found.append(
                f"{name}={c[name]} windows of block_size={c.block_size} tokens are too many to index in 32 "
                f"bits: keep {name} * (block_size + 1) at {INT32_MAX} or below"
            )

    decay = decay_steps(c.decay_fraction, c.max_steps)
    if c.warmup_steps > c.max_steps:
        found.append(
            f"warmup_steps={c.warmup_steps} is more than max_steps={c.max_steps}, so the learning rate would "
            f"never reach its peak: set warmup_steps to {c.max_steps} or less"
        )
    elif c.schedule == "cosine" and c.warmup_steps == c.max_steps:
        found.append(
            f"schedule='cosine' has no update left to decay over, for warmup_steps={c.warmup_steps} is all "
            f"of max_steps={c.max_steps}: set warmup_steps below max_steps"
        )
    elif c.schedule == "wsd" and not 1 <= decay <= c.max_steps - c.warmup_steps:
        found.append(
            f"decay_fraction={c.decay_fraction} of max_steps={c.max_steps} is a decay over {decay} updates, "
            f"but schedule='wsd' needs at least 1 and has {c.max_steps - c.warmup_steps} after "
            f"warmup_steps={c.warmup_steps}: change decay_fraction or warmup_steps"
        )
    # A value that the schedule does not read would be ignored in silence.
    readers = {"min_lr_ratio": ("cosine", "wsd"), "decay_fraction": ("wsd",)}
    for name, schedules in readers.items():
        default = FIELDS[name].default
        if c.schedule not in schedules and c[name] != default:
            found.append(
                f"{name}={c[name]} has no effect with schedule={c.schedule!r}: set schedule to "
                f"{' or '.join(schedules)}, or leave {name} at {default}"
            )
    return found


# Settings that only a run in number formats reads.
_FORMAT_FIELDS = (
    "formats",
    "scaling",
    "amax_history",
    "scale_rounding",
    "operand_rounding",
    "saturate",
    "products",
    "weights_at_rest",
    "range_clip",
    "emergency_formats",
    "emergency_patience",
    "optimizer",
)


def for_operands(value: str) -> tuple[str, str, str]:
    """A setting with one choice or three, as the choices of W, A and G."""
    choices = tuple(value.split(","))
    return choices * 3 if len(choices) == 1 else choices


def _format_conflicts(c) -> list[str]:
    """What is wrong between the settings of number formats."""
    found = []
    if c.use_shadow and not c.use_fp8 and c.compute_dtype == "float32":
        found.append(
            "use_shadow=True has nothing to compare: with use_fp8=False and compute_dtype='float32' the "
            "gradient is its own shadow: set use_shadow=False"
        )
    if not c.use_shadow and c.shadow_interval != FIELDS["shadow_interval"].default:
        found.append(f"shadow_interval={c.shadow_interval} has no effect with use_shadow=False: set use_shadow=True")
    if not c.use_fp8:
        asked = [group for group in c.metrics.split(",") if group in FORMAT_GROUPS]
        if asked:
            found.append(
                f"metrics={c.metrics!r} names {', '.join(asked)}, which use_fp8=False leaves nothing to "
                "measure: set use_fp8=True, or leave it out"
            )
        for name in _FORMAT_FIELDS:
            if c[name] != FIELDS[name].default:
                more = " and optimizer='adamw' is the baseline's" if name == "optimizer" else ""
                found.append(
                    f"{name}={show(c[name])} has no effect with use_fp8=False{more}: set use_fp8=True"
                    + ("" if name == "formats" else " and formats, or leave it out")
                )
        return found
    if not c.formats:
        return [*found, "use_fp8=True needs to know the formats: set formats, for example --config.formats=E4M3"]
    try:
        layers = rules.resolve_rules(c.formats, c.n_layer)
    except UserError as error:
        return [*found, str(error)]
    scaling = for_operands(c.scaling)
    names = rules.names_used(layers)
    for layer in layers:
        sizes = rules.contracted_sizes(layer.layer, c.n_embd, c.vocab_size)
        for operand, name, way, size in zip("WAG", layer.wag, scaling, (sizes[0], *sizes)):
            block = int(way.removeprefix("block")) if way.startswith("block") else 1
            if name and size % block:
                found.append(
                    f"scaling={c.scaling!r} cannot split operand {operand} of {layer.layer}, which has {size} "
                    f"numbers along its contracted axis, into blocks of {block}: give a model whose "
                    "dimensions are multiples of it, or another scaling"
                )
                break
        if found:
            break
    found += _unread_conflicts(c, layers, scaling)
    one_scale = all(way in ("delayed", "tensor", "none") for way in scaling)
    if c.scale_rounding == "float32" and not one_scale:
        found.append(
            f"scale_rounding='float32' needs one scale for each operand, and scaling={c.scaling!r} has many: "
            "give delayed, tensor or none, or scale_rounding='power_of_two'"
        )
    if not c.saturate:
        for name in [*names, *c.emergency_formats]:
            try:
                require_overflow_code(get_format(name))
            except UserError as error:
                found.append(str(error))
    if c.products == "native":
        found += _native_conflicts(c, layers, one_scale)
    stored_or_aware = [name for name in ("weights_at_rest", "optimizer") if c[name] != FIELDS[name].default]
    if stored_or_aware and not any(layer.w for layer in layers):
        name = stored_or_aware[0]
        found.append(
            f"{name}={c[name]!r} is about weights in a number format, and formats={c.formats!r} gives none to "
            "W: give W a format too"
        )
    if c.weights_at_rest != "float32":
        if scaling[0] != "delayed":
            found.append(
                f"weights_at_rest={c.weights_at_rest!r} stores weights on a grid with a scale of its own, so "
                f"scaling={scaling[0]!r} of W would have no effect: give W scaling delayed"
            )
        if c.scale_rounding != "power_of_two":
            found.append(
                f"weights_at_rest={c.weights_at_rest!r} needs scales that are powers of two, or stored "
                "weights would be rounded again as operands: set scale_rounding='power_of_two'"
            )
    if c.optimizer == "grid" and c.weights_at_rest not in ("float32", "nearest"):
        found.append(
            f"optimizer='grid' moves weights by whole codes, rounding its steps stochastically itself, so "
            f"weights_at_rest={c.weights_at_rest!r} would have nothing to round: give nearest or float32"
        )
    if c.range_clip and (scaling[2] != "delayed" or not any(layer.g for layer in layers)):
        found.append(
            f"range_clip={c.range_clip} acts on the delayed scale of output gradients, and there is none: "
            "give G a format and scaling delayed, or set range_clip=0"
        )
    return found + _emergency_conflicts(c, names)


def _unread_conflicts(c, layers, scaling) -> list[str]:
    """Choices for operands that no layer rounds, which nothing would read."""
    found = []
    has_format = [any(layer.wag[i] for layer in layers) for i in range(3)]
    for name in ("scaling", "operand_rounding"):
        default = FIELDS[name].default
        for operand, choice, exists in zip("WAG", for_operands(c[name]), has_format):
            if "," in c[name] and choice != default and not exists:
                found.append(
                    f"{name}={c[name]!r} asks for {choice} of {operand}, and formats={c.formats!r} gives it "
                    f"no format: give {operand} a format, or {default} in this place"
                )
    # Stored weights have a scale of their own, and are not rounded again.
    stored = c.weights_at_rest != "float32"
    if stored and c.operand_rounding.startswith("stochastic,"):
        found.append(
            f"operand_rounding={c.operand_rounding!r} has no effect on W with weights_at_rest="
            f"{c.weights_at_rest!r}, whose weights are on their grid already: give nearest for W"
        )
    delayed = [way == "delayed" and exists for way, exists in zip(scaling, has_format)]
    if not any(delayed[1 if stored else 0 :]) and c.amax_history != FIELDS["amax_history"].default:
        found.append(
            f"amax_history={c.amax_history} has no effect with scaling={c.scaling!r}, which takes no scale of "
            "any operand from earlier amaxes: set scaling=delayed, or leave it out"
        )
    if "ledger" in c.metrics.split(",") and not has_format[0]:
        found.append(
            f"metrics={c.metrics!r} names ledger, which is about weights in a number format, and "
            f"formats={c.formats!r} gives none to W: give W a format too, or leave ledger out"
        )
    return found


def _native_conflicts(c, layers, one_scale) -> list[str]:
    if c.emergency_formats:
        return [
            "products='native' computes in fixed formats, so emergency_formats cannot change them: set "
            "products='emulated', or leave emergency_formats out"
        ]
    if not one_scale:
        return [
            f"products='native' takes one scale for each operand, and scaling={c.scaling!r} has many: give "
            "delayed, tensor or none, or products='emulated'"
        ]
    for layer in layers:
        wrong = [name for name in layer.wag if name not in rules.FLOAT8]
        if wrong:
            return [
                f"products='native' can compute with {' and '.join(rules.FLOAT8)} for each of W, A and G, "
                f"not with {wrong[0] or 'an operand that has no format'} in {layer.layer}: change formats, or set "
                "products='emulated'"
            ]
        if layer.wag.count("E5M2") > 1:
            return [
                f"products='native' cannot multiply two E5M2 operands, which {layer.layer} has: give W and A E4M3 "
                "and G E5M2 (--config.formats=E4M3,block_*:G=E5M2), or set products='emulated'"
            ]
    return []


def _emergency_conflicts(c, names) -> list[str]:
    if not c.emergency_formats:
        if c.emergency_patience != FIELDS["emergency_patience"].default:
            return [
                f"emergency_patience={c.emergency_patience} has no effect without emergency_formats: name the "
                "formats to shift to"
            ]
        return []
    try:
        bits = [
            max(get_format(name).mantissa_bits for name in names),
            *(get_format(name).mantissa_bits for name in c.emergency_formats),
        ]
    except UserError as error:
        return [f"emergency_formats: {error}"]
    if any(after <= before for before, after in zip(bits, bits[1:])):
        return [
            f"emergency_formats={c.emergency_formats!r} must have more mantissa bits from one to the next than "
            f"{', '.join(names)}: they have {', '.join(map(str, bits[1:]))} after {bits[0]}"
        ]
    return []


def decay_steps(decay_fraction: float, max_steps: int) -> int:
    """Updates over which schedule "wsd" decays: the last `decay_fraction` of `max_steps`, rounded."""
    return round(decay_fraction * max_steps)


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
    tuples = {name for name, field in FIELDS.items() if field.kind is tuple}
    return {
        name: tuple(value) if name in tuples and isinstance(value, list) else value for name, value in values.items()
    }


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# Settings that records of schema version 1 lack. With their defaults, training goes on as in those runs; what is
# measured besides may be more.
ADDED_IN_2 = frozenset(
    {
        *_FORMAT_FIELDS,
        "shadow_interval",
        "diagnostic_interval",
        "rank_threshold",
        "rank_threshold_strict",
        "layer_interval",
        "wandb_group",
        "wandb_keys",
        "fsdp",
    }
)
# And that records of schema version 1 and 2 lack.
ADDED_IN_3 = frozenset({"checkpoint_seconds"})


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a record of any schema version (as JSON holds them), with what it could not have yet."""
    return {name: _as_json(FIELDS[name].default) for name in sorted(ADDED_IN_2 | ADDED_IN_3)} | dict(values)


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each field that forbids resuming the run made with `old` under `new`; none if it may go on.

    Either may come from `to_dict` or from JSON. Fields of RESUMABLE_FIELDS may differ, with one exception:
    under schedule "cosine" or "wsd", max_steps decides learning rates of updates that are already made.
    """
    old = upgraded(old)
    schedule = old.get("schedule")
    free = RESUMABLE_FIELDS if schedule == "constant" else RESUMABLE_FIELDS - {"max_steps"}
    names = [*FIELDS, *sorted((set(old) | set(new)) - set(FIELDS))]
    lines = []
    for name in names:
        before, now = _as_json(old.get(name)), _as_json(new.get(name))
        if name in free or (name in old) == (name in new) and before == now:
            continue
        words_before = f"{show(before)} in the run" if name in old else "not a setting of the run"
        words_now = f"{show(now)} now" if name in new else "not a setting now"
        why = f" (with schedule={schedule!r} it changes the learning rate)" if name == "max_steps" else ""
        lines.append(f"{name}: {words_before}, {words_now}{why}")
    return lines


def describe() -> str:
    """Every field with its default, meaning and allowed values, grouped; lines of at most 100 characters."""
    margin = 30
    lines = []
    for title, group in GROUPS:
        lines += ["", title]
        for field in group:
            left = f"  {field.name}={_as_flag(field.default)}{' *' if field.resumable else ''}"
            allowed = f" [{field.rule.brief}]" if field.rule.brief else ""
            text = textwrap.wrap(
                field.meaning + allowed, width=100 - margin, break_long_words=False, break_on_hyphens=False
            )
            if len(left) >= margin:
                lines.append(left)
            else:
                lines.append(left.ljust(margin) + text.pop(0))
            lines += [" " * margin + line for line in text]
    return "\n".join(lines[1:])


def _as_flag(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
