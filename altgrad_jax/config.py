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
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_collections

from altgrad_jax.errors import UserError

INT32_MAX = 2**31 - 1
FLOAT32_TINY = 2.0**-126  # the smallest normal float32; compiled code may flush what is below to 0
FLOAT32_BELOW_1 = 1 - 2.0**-24
VOCABULARY_OF = MappingProxyType({"gpt2": 50257, "bytes": 256})  # token ids each tokenizer can produce
METRIC_GROUPS = ("grad", "update", "param", "dead", "activation")

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
_BELOW_ONE = Rule(
    "a number from 0 to below 1, in float32", lambda value: 0 <= value <= FLOAT32_BELOW_1, "0 to below 1"
)
_CLIP = Rule(
    "0 (off) or a number from 1e-30 to 1e+30", lambda value: value == 0 or 1e-30 <= value <= 1e30, "0 or more"
)


def _is_name(text: str, longest: int = 128) -> bool:
    # "None" is what a flag makes of an attempt to unset a string.
    return text.isprintable() and text == text.strip() and 0 < len(text) <= longest and text != "None"


_NAME = Rule("1 to 128 printable characters, without blanks around them and not the word None", _is_name)
_PROJECT = Rule(
    "1 to 128 printable characters, none of them /\\#?%: (W&B refuses those)",
    lambda value: _is_name(value) and not set(value) & set("/\\#?%:"),
)
_ENTITY = Rule("a W&B user or team name, or an empty string", lambda value: value == "" or _is_name(value))
_FOLDER = Rule(
    "the path of a local folder (printable characters, no blanks around them, no scheme such as gs://)",
    lambda value: _is_name(value, longest=4096) and "://" not in value,
)
_TAGS = Rule(
    'a tuple of different tags such as ("a", "b"), each of 1 to 64 printable characters without a comma',
    lambda value: len(set(value)) == len(value)
    and all(type(tag) is str and _is_name(tag, longest=64) and "," not in tag for tag in value),
)


def _names_groups(value: str) -> bool:
    groups = value.split(",")
    return value in ("all", "none") or (len(set(groups)) == len(groups) and set(groups) <= set(METRIC_GROUPS))


_METRICS = Rule(
    f"all, none, or some of {', '.join(METRIC_GROUPS)} joined by commas, each once", _names_groups
)


# The upper limits of sizes are not promises that such a model fits a device; beyond them a value is a slip.
GROUPS: tuple[tuple[str, tuple[Field, ...]], ...] = (
    ("Model (GPT-2)", (
        Field("n_layer", 6, _whole(1, 1024), "transformer blocks"),
        Field("n_head", 6, _whole(1, 65536), "attention heads of a block; must divide n_embd"),
        Field("n_embd", 384, _whole(1, 65536), "width: numbers that stand for one token"),
        Field("block_size", 256, _whole(1, 2**20), "tokens the model sees at once (its context)"),
        Field("vocab_size", 50257, _whole(2, 65536),
              "rows of the embedding table; at least the tokenizer's own size (gpt2 50257, bytes 256)"),
        Field("dropout", 0.0, _BELOW_ONE, "share of activations set to 0 in training; 0 = off"),
    )),
    ("Number formats and attention", (
        Field("compute_dtype", "bfloat16", _one_of("bfloat16", "float32"),
              "type of the operands of every matrix product; sums, parameters and moments are float32"),
        Field("attention", "auto", _one_of("auto", "xla", "cudnn"),
              "attention kernel; auto = cuDNN where the device and the sizes allow it, else XLA"),
        Field("use_fp8", False, _YES_NO, "train in 8 bits; not in this version, so it must stay False"),
        Field("use_shadow", False, _YES_NO,
              "compare 8-bit gradients with float32 ones; not in this version, so it must stay False"),
    )),
    ("Data", (
        Field("tokenizer", "gpt2", _one_of("gpt2", "bytes"), "gpt2 (byte pairs) or bytes (one token a byte)"),
        Field("data_source", "auto", _one_of("auto", "prepared", "eurlex57k", "lex_glue", "sample"),
              "where text comes from; auto = prepared files if there, else eurlex57k, else the small sample"),
        Field("data_seed", 1337, _whole(0), "decides the order of the training windows"),
        Field("data_placement", "auto", _one_of("auto", "device", "host"),
              "where the tokens lie; auto = on the device if they fit, else streamed from the host"),
    )),
    ("Optimization", (
        Field("batch_size", 12, _whole(1, 2**20), "sequences (windows of block_size tokens) in one update"),
        Field("grad_accum_steps", 1, _whole(1, 2**20),
              "equal micro-batches batch_size is computed in, one after the other; must divide it"),
        Field("max_steps", 2000, _whole(1), "updates in the whole run", resumable=True),
        Field("learning_rate", 6e-4, _number(1e-12, 100), "peak learning rate of AdamW"),
        Field("warmup_steps", 100, _whole(0),
              "updates over which the learning rate rises linearly to its peak; at most max_steps"),
        Field("schedule", "constant", _one_of("constant", "cosine", "wsd"),
              "after the warm-up: constant; cosine down to the end; wsd = constant, then a linear decay"),
        Field("min_lr_ratio", 0.1, _number(0, 1), "last learning rate / peak, for cosine and wsd"),
        Field("decay_fraction", 0.2, _POSITIVE_SHARE, "share of max_steps over which wsd decays"),
        Field("weight_decay", 0.1, _number(0, 1000),
              "decoupled decay (times the learning rate) of every array with 2 or more axes"),
        Field("beta1", 0.9, _BELOW_ONE, "decay of Adam's first moment per update"),
        Field("beta2", 0.95, _BELOW_ONE, "decay of Adam's second moment per update"),
        Field("adam_eps", 1e-8, _number(1e-30, 1), "added to the root of the second moment"),
        Field("grad_clip", 1.0, _CLIP, "global L2 norm that gradients are scaled down to; 0 = off"),
        Field("seed", 42, _whole(0), "decides the initial parameters and the dropout masks"),
    )),
    ("Evaluation", (
        Field("eval_interval", 100, _whole(1),
              "updates between two evaluations; one is also made at step 0 and at the end", resumable=True),
        Field("eval_windows", 128, _whole(1, 2**24),
              "validation sequences of one evaluation, the same ones every time"),
        Field("eval_batch_size", 16, _whole(1, 2**20),
              "validation sequences computed at once; must divide eval_windows"),
    )),
    ("Metrics and the stability monitor", (
        Field("metrics", "all", _METRICS,
              f"statistics per layer: all, none, or of {', '.join(METRIC_GROUPS)}, joined by commas"),
        Field("nan_patience", 10, _whole(1),
              "updates in a row with a non-finite loss or gradient after which the run stops (exit code 3)"),
        Field("bit_stall_threshold", 0.5, _POSITIVE_SHARE,
              "alert when a layer's mean share of updates that are exactly 0 exceeds this"),
        Field("stall_window", 100, _whole(1, 2**20), "updates that this mean is taken over"),
        Field("overflow_threshold", 0.01, _POSITIVE_SHARE,
              "alert when a larger share of a quantized layer's values is clipped; with use_fp8=False no "
              "layer is quantized and there is none to watch"),
        Field("dead_neuron_threshold", 1e-8, _SQUARED_SHARE,
              "L2 norm of an output unit's unclipped gradient below which the unit counts as silent"),
        Field("dead_neuron_window", 100, _whole(1), "silent updates in a row after which a unit is dead"),
        Field("spike_window", 100, _whole(20, 2**16),
              "losses that a loss's robust z-score looks back on; fewer than 20 say too little"),
        Field("spike_threshold", 8.0, _number(0.1, 1e6), "robust z-score above which a loss is a spike"),
        Field("val_patience", 3, _whole(1, 2**16),
              "rises of the validation loss in a row that are flagged as divergence"),
    )),
    ("Checkpoints", (
        Field("checkpoint_interval", 100, _whole(1),
              "updates between two checkpoints; the last step always gets one", resumable=True),
        Field("checkpoint_dir", "checkpoints/bf16_baseline", _FOLDER,
              "the run's folder: checkpoints, record, plot, verdict; --workdir replaces it", resumable=True),
        Field("max_checkpoints", 3, _whole(1, 2**16),
              "checkpoints kept: the one with the best validation loss and the newest", resumable=True),
    )),
    ("Logging", (
        Field("log_interval", 1, _whole(1),
              "updates between two rows of the record and of W&B; a row with an evaluation or an alert, and "
              "the last one, are always kept", resumable=True),
        Field("alert_interval", 100, _whole(1),
              "least updates between two alerts of one kind on console and W&B; the record keeps all",
              resumable=True),
        Field("project", "altgrad", _PROJECT, "W&B project", resumable=True),
        Field("run_name", "bf16-baseline", _NAME, "name of the run in W&B and the record", resumable=True),
        Field("tags", ("baseline", "bf16", "eurlex"), _TAGS, "W&B tags; as a flag: --config.tags=a,b",
              resumable=True),
        Field("wandb_mode", "auto", _one_of("auto", "online", "offline", "disabled"),
              "auto = online where W&B finds credentials, else offline", resumable=True),
        Field("wandb_entity", "", _ENTITY, "W&B user or team; empty = the account's own", resumable=True),
        Field("console", "auto", _one_of("auto", "plain", "quiet"),
              "auto = one live line on a terminal, plain lines when piped; quiet = alerts and messages",
              resumable=True),
    )),
    ("Execution", (
        Field("steps_per_dispatch", 0, _whole(0, 2**16),
              "most updates in one call of the device; 0 = as many as take about one second", resumable=True),
        Field("deterministic", False, _YES_NO,
              "GPU: only operations that repeat to the bit (slower); a CPU always repeats"),
    )),
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
    values = {}
    for name in config.keys():
        try:
            values[name] = config[name]
        except Exception:  # a required placeholder that was never set
            values[name] = None
    _raise_for(problems(values))


def _raise_for(found: list[str]) -> None:
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        raise UserError("\n  - ".join([f"{len(found)} settings cannot be used:", *found]))


def problems(values: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing wrong with `values` (name -> value), an empty list if it can be run."""
    found = [unknown_field(str(name)) for name in values if name not in FIELDS]
    for name, field in FIELDS.items():
        if name not in values:
            found.append(f"the setting {name} is missing: start from altgrad_jax.config.default_config()")
        elif type(values[name]) is not field.kind:
            found.append(cannot_use(field, f"{show(values[name])} ({type(values[name]).__name__})"))
        elif not field.rule.accepts(values[name]):
            found.append(cannot_use(field, show(values[name])))
    return found or _conflicts(values)  # how fields fit together is a question only once each is right


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

    if c.use_fp8:
        found.append(
            "use_fp8=True asks for 8-bit training, which this version does not contain; it trains in "
            "compute_dtype (bfloat16 or float32): set use_fp8=False"
        )
    if c.use_shadow:
        found.append(
            "use_shadow=True asks to compare 8-bit gradients with float32 ones, and this version computes no "
            "8-bit gradients: set use_shadow=False"
        )

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
    tuples = {name for name, field in FIELDS.items() if field.kind is tuple}
    values = {
        name: tuple(value) if name in tuples and isinstance(value, list) else value
        for name, value in values.items()
    }
    _raise_for(problems(values))
    return _build(values)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each field that forbids resuming the run made with `old` under `new`; none if it may go on.

    Either may come from `to_dict` or from JSON. Fields of RESUMABLE_FIELDS may differ, with one exception:
    under schedule "cosine" or "wsd", max_steps decides learning rates of updates that are already made.
    """
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
