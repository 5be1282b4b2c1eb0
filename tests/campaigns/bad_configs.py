"""Settings that are known to be wrong, and settings at their edges that are known to be right.

The oracle is what the user is told: the words of each setting's rule ("a whole number from 1 to 1024"), read here as
text. The program's own tests of values are never asked, so that a test which says something else than its words shows.
A rule whose words are not understood is an AssertionError: a new setting needs its wrong values written down here.

hypothesis draws the cases, by the seed alone and without a database. numpy and hypothesis, no jax.
"""

import math
import re
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError

WAYS = ("dict", "ConfigDict", "flag")


@dataclass(frozen=True)
class BadValue:
    """A value that `name` must not have. way: how it is given, one of WAYS; for a flag it is the text.

    problem: "wrong type" or "out of range".
    """

    name: str
    way: str
    value: Any
    problem: str

    @property
    def shown(self):
        """The beginning of the value as a refusal must show it; empty where Python itself cannot print it."""
        if isinstance(self.value, dict) and self.way == "ConfigDict":
            return ""  # which makes a ConfigDict of it
        try:
            text = repr(self.value)
        except ValueError:  # a whole number of more digits than Python prints
            return ""
        return text.strip("'\"")[:30] if self.way == "flag" else text[:30]

    @property
    def text(self):
        return f"{self.name}: {settings.show(self.value)} ({type(self.value).__name__}) by {self.way}"


def _bounds(words):
    """(low, high) of a rule about numbers by its words, else None; both are allowed values."""
    if found := re.fullmatch(r"a (?:whole )?number from (\S+) to ([0-9.e+]+)", words):
        return float(found[1]), float(found[2])
    if words == "a number above 0 and at most 1, in float32":
        return float(np.finfo(np.float32).tiny), 1.0
    if words == "a number from 0 to below 1, in float32":
        return 0.0, float(np.nextafter(np.float32(1), np.float32(0)))
    if words.startswith("0 (off) or a number from 1e-30 to 1e+30"):
        return 1e-30, 1e30
    return None


def _choices(words):
    """The choices of a rule by its words, else None."""
    if words == "True or False":
        return ("True", "False")
    found = re.fullmatch(r"one of (.*?)(, or three of them for W, A and G joined by commas)?", words)
    return tuple(found[1].split(", ")) if found else None


# Wrong values of settings that are free text, by the beginning of their rule's words.
_NOT_NAMES = ("", " ", " a", "a ", "a\n", "a\nb", "a\0b", "\x1b[31m", "\ud800", "x" * 5000)
_WRONG_TEXTS = {
    "1 to 128 printable characters, without": (*_NOT_NAMES, "None", "x" * 129),
    "1 to 128 printable characters, none of": (
        *_NOT_NAMES,
        "None",
        "x" * 129,
        "a/b",
        "a\\b",
        "#1",
        "why?",
        "5%",
        "a:b",
    ),
    "1 to 128 printable characters, or an empty": (*_NOT_NAMES[1:], "None", "x" * 129),
    "a W&B user or team name, or an empty": (*_NOT_NAMES[1:], "None", "x" * 129),
    "the path of a local folder": (*_NOT_NAMES, "None", "x" * 4097, "gs://bucket/run", "s3://b", "file:///tmp/x"),
    "all, none, or some of": (
        "",
        "All",
        "grad,",
        "grad,grad",
        "grad, update",
        "all,grad",
        "none,grad",
        "loss",
        "grad;dead",
        "x" * 5000,
    ),
    "a tuple of different tags": (
        ("a", "a"),
        ("a,b",),
        ("",),
        (" a",),
        ("x" * 65,),
        (1,),
        (None,),
        (("a",),),
        ("a\n",),
    ),
    "a tuple of different patterns": (
        ("loss", "loss"),
        ("a,b",),
        ("",),
        ("a ",),
        (1,),
        (b"a",),
        ("a\0",),
        ("x" * 129,),
    ),
    "rules such as E5M2": (("E4M3", "E4M3"), ("",), (" E4M3",), (4,), (None,), ("E4M3\n",), ("x" * 129,)),
    "names of formats such as E3M4": (("E3M4", "E3M4"), ("",), ("E3M4 ",), (3.4,), (["E3M4"],), ("\tE3M4",)),
}
_WRONG_TYPES = {
    bool: (0, 1, 1.0, None, "True", "yes", "", [], [True], np.True_, math.nan),
    int: (
        True,
        1.0,
        1.5,
        math.nan,
        math.inf,
        "3",
        "",
        None,
        [3],
        (3,),
        {"a": 1},
        3j,
        b"3",
        np.int64(3),
        np.float32(3),
        np.array(3),
    ),
    float: (True, 1, 0, "0.1", "", None, [0.1], (0.1,), {"a": 0.1}, 1j, b"0.1", np.float64(0.1), np.float32(0.1)),
    str: (0, 1, True, None, 1.5, math.nan, b"auto", [], ["auto"], ("auto",), {"auto": 1}, np.str_("auto")),
    tuple: ("", "a", "E4M3", None, 0, True, {"a": 1}, b"a", frozenset("a"), np.array(["a"]), 1.5),
}
# What stands behind the "=" of a flag, where the type makes it wrong.
_WRONG_FLAG_TEXTS = {
    bool: ("", "2", "maybe", "None", "nein", "-1", "true,false", "\u0661"),
    int: (
        "",
        "x",
        "1.5",
        "1e3",
        "0x10",
        "nan",
        "inf",
        "None",
        "True",
        "1,2",
        "--1",
        "1 2",
        "\u0663",
        "\uff11",
        "\u00b2",
        "1e999",
        "9" * 5000,
        "[1]",
        "1\x00",
        "1_",
        "$(id)",
    ),
    float: (
        "",
        "x",
        "nan",
        "-nan",
        "inf",
        "-inf",
        "Infinity",
        "1e999",
        "-1e999",
        "1,5",
        "None",
        "True",
        "0x1p3",
        "1e",
        "1 2",
        "\u0661.5",
        "1j",
        "9" * 5000,
    ),
}


def _outside(bounds, kind, draw, st):
    low, high = bounds
    if kind is int:
        low, high = int(low), int(high)
        return draw(
            st.one_of(
                st.integers(max_value=low - 1),
                st.integers(min_value=high + 1),
                st.sampled_from([low - 1, high + 1, -high, 2**31, 2**32 + 1, 2**63, 10**5000]).filter(
                    lambda value: not low <= value <= high
                ),
            )
        )
    values = [math.nan, math.inf, -math.inf, -1e-300, -1.0, -high, 1e308, math.nextafter(high, math.inf)]
    if low:
        # A clip of exactly 0 is "off", the one number below its range that is right.
        values += [math.nextafter(low, 0.0), low / 1e6, 5e-324, -low]
    return draw(
        st.one_of(
            st.sampled_from(values),
            st.floats(max_value=-5e-324, allow_infinity=False),
            st.floats(min_value=math.nextafter(high, math.inf), allow_infinity=False),
        )
    )


def _other_words(choices, several, draw, st):
    near = [choice.upper() for choice in choices if choice.upper() not in choices]
    near += [choice + " " for choice in choices] + [",".join(choices[:2]), "", "None", "auto,", "\x00", "x" * 5000]
    if several:
        near += [
            ",".join([choices[0]] * 4),
            f"{choices[0]},x,{choices[0]}",
            f"{choices[0]}, {choices[0]}, {choices[0]}",
        ]
    return draw(
        st.one_of(st.sampled_from(near), st.text(max_size=12)).filter(
            lambda text: (
                text not in choices
                and not (several and set(text.split(",")) <= set(choices) and len(text.split(",")) == 3)
            )
        )
    )


def bad_values(st):
    """Strategy of BadValue; `st` is hypothesis.strategies."""

    @st.composite
    def make(draw):
        field = draw(st.sampled_from(list(settings.FIELDS.values())))
        words, kind = field.rule.words, field.kind
        if draw(st.booleans()):
            way = draw(st.sampled_from(WAYS if kind in _WRONG_FLAG_TEXTS else WAYS[:2]))
            values = _WRONG_FLAG_TEXTS[kind] if way == "flag" else _WRONG_TYPES[kind]
            return BadValue(field.name, way, draw(st.sampled_from(values)), "wrong type")
        bounds, choices = _bounds(words), _choices(words)
        if kind is bool:
            return BadValue(field.name, "dict", draw(st.integers() | st.text(max_size=5)), "wrong type")
        if bounds:
            value = _outside(bounds, kind, draw, st)
        elif choices:
            value = _other_words(choices, "three of them" in words, draw, st)
        else:
            wrong = [texts for begin, texts in _WRONG_TEXTS.items() if words.startswith(begin)]
            assert len(wrong) == 1, f"no wrong values are known for {field.name}: {words}"
            value = draw(st.sampled_from(wrong[0]))
        way = draw(st.sampled_from(WAYS))
        if way == "flag":
            if kind is tuple or isinstance(value, int) and abs(value) > 10**4000:
                way = "dict"  # a flag cannot write every tuple, nor Python a number of that length
            elif kind is not str:
                value = repr(value)
        return BadValue(field.name, way, value, "out of range")

    return make()


def give(bad, config_file):
    """Gives a BadValue to the program, which must raise UserError. config_file: one that is right by itself."""
    if bad.way == "flag":
        from altgrad_jax import cli

        return cli.parse([f"--config={config_file}", f"--config.{bad.name}={bad.value}"], cli.TRAIN_FLAGS)
    values = {**settings.to_dict(settings.default_config()), bad.name: bad.value}
    if bad.way == "dict":
        return settings.from_dict(values)
    values = {name: settings.FIELDS[name].default for name in settings.FIELDS} | {bad.name: bad.value}
    return settings.validate(settings.ml_collections.ConfigDict(values))


CONFIG_FILE = "configs/smoke.py"

# Settings that are right by themselves and contradict each other; texts that the refusal must contain.
# Each is a function of a number from 0 to 99.
_FP8 = {"use_fp8": True, "formats": ("E4M3",)}
CONFLICTS = (
    (lambda n: {"n_head": n + 2, "n_embd": 3 * (n + 2) + 1}, "n_embd", "n_head"),
    (lambda n: {"tokenizer": "bytes", "vocab_size": 2 + n % 254}, "vocab_size", "tokenizer", "256"),
    (lambda n: {"vocab_size": 50256 - n}, "vocab_size", "50257"),
    (lambda n: {"attention": "cudnn", "compute_dtype": "float32"}, "attention", "compute_dtype"),
    (lambda n: {"attention": "cudnn", "n_head": 1, "n_embd": 8 * n + 1}, "attention", "multiples of 8"),
    (lambda n: {"batch_size": n + 3, "grad_accum_steps": n + 2}, "batch_size", "grad_accum_steps"),
    (lambda n: {"grad_accum_steps": 13 + n}, "batch_size", "grad_accum_steps"),
    (lambda n: {"eval_windows": 2 * (n + 2) + 1, "eval_batch_size": n + 2}, "eval_windows", "eval_batch_size"),
    (lambda n: {"eval_batch_size": 129 + n}, "eval_windows", "eval_batch_size"),
    (lambda n: {"max_steps": 2**31 - 1 - n, "batch_size": 2}, "max_steps", "batch_size", "2147483647"),
    (
        lambda n: {"batch_size": 2**20, "max_steps": 1, "warmup_steps": 0, "block_size": 2048 + n},
        "batch_size",
        "block_size",
    ),
    (lambda n: {"eval_batch_size": 2**20, "eval_windows": 2**20, "block_size": 2048 + n}, "eval_batch_size"),
    (lambda n: {"warmup_steps": 2001 + n}, "warmup_steps", "max_steps"),
    (lambda n: {"max_steps": 1 + n % 99}, "warmup_steps", "max_steps"),
    (lambda n: {"schedule": "cosine", "warmup_steps": 100 + n, "max_steps": 100 + n}, "cosine", "warmup_steps"),
    (lambda n: {"schedule": "wsd", "decay_fraction": 1e-9 * (n + 1)}, "decay_fraction", "wsd"),
    (lambda n: {"schedule": "wsd", "decay_fraction": 1.0, "warmup_steps": 1 + n}, "decay_fraction", "warmup_steps"),
    (lambda n: {"min_lr_ratio": 0.2 + n / 1000}, "min_lr_ratio", "schedule"),
    (lambda n: {"decay_fraction": 0.3 + n / 1000}, "decay_fraction", "schedule"),
    (lambda n: {"use_fp8": True}, "use_fp8", "formats"),
    (lambda n: {"formats": ("E4M3",)}, "formats", "use_fp8"),
    (lambda n: {"amax_history": 17 + n}, "amax_history", "use_fp8"),
    (lambda n: {"range_clip": 1.0 + n}, "range_clip", "use_fp8"),
    (lambda n: {"metrics": "ledger"}, "metrics", "ledger"),
    (lambda n: {"use_shadow": True, "compute_dtype": "float32"}, "use_shadow", "compute_dtype"),
    (lambda n: {"shadow_interval": 2 + n}, "shadow_interval", "use_shadow"),
    (lambda n: {"use_fp8": True, "formats": (f"E{9 + n}M9",)}, "M9"),
    (lambda n: {"use_fp8": True, "formats": (f"block_{6 + n}/*=E4M3",)}, "block_"),
    (lambda n: {"use_fp8": True, "formats": ("block_*:X=E4M3",)}, "X"),
    (lambda n: {"use_fp8": True, "formats": ("=",)}, "="),
    (lambda n: {**_FP8, "emergency_patience": 4 + n}, "emergency_patience", "emergency_formats"),
    (lambda n: {**_FP8, "emergency_formats": ("E5M2",)}, "emergency_formats", "mantissa"),
    (lambda n: {**_FP8, "emergency_formats": (f"E{9 + n}M9",)}, "emergency_formats", "M9"),
    (lambda n: {**_FP8, "scaling": "block128", "n_head": 1, "n_embd": 129 + n % 100}, "scaling", "blocks of 128"),
    (lambda n: {**_FP8, "scaling": "channel", "scale_rounding": "float32"}, "scale_rounding", "scaling"),
    (lambda n: {"use_fp8": True, "formats": ("E7M0",), "saturate": False}, "E7M0"),
    (lambda n: {"use_fp8": True, "formats": ("E3M4",), "products": "native"}, "products", "E3M4"),
    (lambda n: {"use_fp8": True, "formats": ("E5M2",), "products": "native"}, "products", "E5M2"),
    (lambda n: {**_FP8, "scaling": "tensor", "weights_at_rest": "nearest"}, "weights_at_rest", "scaling"),
    (lambda n: {**_FP8, "scaling": "tensor", "amax_history": 17 + n}, "amax_history", "scaling"),
    (lambda n: {**_FP8, "optimizer": "grid", "weights_at_rest": "stochastic"}, "optimizer", "weights_at_rest"),
    (lambda n: {"use_fp8": True, "formats": ("block_*:G=E4M3",), "optimizer": "grid"}, "optimizer"),
    (lambda n: {"optimizer": "grid"}, "optimizer", "use_fp8"),
)


# What must stand beside a value for the two to fit, where a small model in bfloat16 does not.
_SMALL = dict(
    tokenizer="bytes",
    vocab_size=256,
    n_layer=1,
    n_head=1,
    n_embd=128,
    block_size=1,
    batch_size=1,
    max_steps=9,
    warmup_steps=0,
    eval_windows=16,
    eval_batch_size=1,
)
_BESIDE = {
    "n_head": lambda v: {"n_embd": v},
    "n_embd": lambda v: {"n_head": 1},
    "batch_size": lambda v: {"max_steps": 1},
    "grad_accum_steps": lambda v: {"batch_size": v, "max_steps": 1},
    "eval_batch_size": lambda v: {"eval_windows": v},
    "warmup_steps": lambda v: {"max_steps": max(1, v)},
    "min_lr_ratio": lambda v: {"schedule": "cosine"},
    "decay_fraction": lambda v: {"schedule": "wsd", "max_steps": 2**31 - 1},
    "tokenizer": lambda v: {"vocab_size": 65536},
    "shadow_interval": lambda v: {"use_shadow": True},
    "emergency_patience": lambda v: {**_FP8, "emergency_formats": ("E3M4",)},
    **{
        name: lambda v: _FP8
        for name in (
            "amax_history",
            "range_clip",
            "scaling",
            "scale_rounding",
            "operand_rounding",
            "saturate",
            "weights_at_rest",
            "optimizer",
        )
    },
    "use_fp8": lambda v: _FP8 if v else {},
    "products": lambda v: {"use_fp8": True, "formats": ("E4M3", "block_*:G=E5M2")},
}
# Edges that no other setting goes with: a smaller vocabulary than every tokenizer's, a decay over less than one update.
_SMALLEST = {"vocab_size": 256, "decay_fraction": 1e-9}


def good_values(st):
    """Strategy of (name, value, all settings): at an edge of its range or inside, and to be accepted."""
    names = [name for name, field in settings.FIELDS.items() if _bounds(field.rule.words) or _choices(field.rule.words)]

    @st.composite
    def make(draw):
        field = settings.FIELDS[draw(st.sampled_from(names))]
        if field.kind in (int, float):
            low, high = _bounds(field.rule.words)
            low = max(low, _SMALLEST.get(field.name, low))
            inside = st.integers(int(low), int(high)) if field.kind is int else st.floats(low, high)
            off = [0.0] if "(off)" in field.rule.words else []
            value = draw(st.sampled_from([field.kind(low), field.kind(high), *off]) | inside)
        else:
            choices = _choices(field.rule.words)
            if "three of them" in field.rule.words and draw(st.booleans()):
                choices = (",".join(draw(st.tuples(*[st.sampled_from(choices)] * 3))),)
            value = draw(st.sampled_from(choices))
            value = value == "True" if field.kind is bool else value
        beside = _BESIDE.get(field.name, lambda v: {})(value)
        return field.name, value, {**_SMALL, **beside, field.name: value}

    return make()


def draw_conflicts(n, *, seed):
    """n of CONFLICTS, all of them where n allows: [(settings, texts that the refusal must contain)]."""
    drawn = draw(
        lambda st: st.tuples(st.integers(0, len(CONFLICTS) - 1), st.integers(0, 99)), 4 * n, seed=seed, key=repr
    )
    # Those of one kind are spread out, so that few are of many kinds.
    turn, keyed = {}, []
    for which, number in drawn:
        turn[which] = turn.get(which, -1) + 1
        keyed.append((turn[which], which, number))
    found = {}
    for _, which, number in sorted(keyed):
        make, *names = CONFLICTS[which]
        found.setdefault(repr(make(number)), (make(number), tuple(names)))
    return list(found.values())[:n]


def give_together(changes):
    """Gives settings that contradict each other to the program, which must raise UserError."""
    settings.from_dict({**settings.to_dict(settings.default_config()), **changes})


def accept(values):
    """Gives settings that are right to the program, which must not raise."""
    config = settings.default_config()
    config.update(values)
    settings.validate(config)
    settings.from_dict(settings.to_dict(config))


def draw(strategy, n, *, seed, key):
    """n different examples of a strategy (fewer where there are not so many), the same for the same seed.

    Args:
      strategy: function of hypothesis.strategies. key: of an example, by which two count as the same.
    """
    try:
        import hypothesis
        import hypothesis.configuration
    except ImportError:
        raise UserError(
            "the bad settings are drawn by the package 'hypothesis', which is not installed: run pip "
            'install "altgrad-jax[dev]"'
        ) from None
    found = {}
    with tempfile.TemporaryDirectory() as home:
        hypothesis.configuration.set_hypothesis_home_dir(home)  # it keeps files of its own even without a database
        try:
            for attempt in range(20):

                @hypothesis.seed(1000 * seed + attempt)
                @hypothesis.settings(
                    max_examples=max(10, n),
                    database=None,
                    deadline=None,
                    phases=[hypothesis.Phase.generate],
                    suppress_health_check=list(hypothesis.HealthCheck),
                )
                @hypothesis.given(strategy(hypothesis.strategies))
                def collect(example):
                    found.setdefault(key(example), example)

                collect()
                if len(found) >= n:
                    break
        finally:
            hypothesis.configuration.set_hypothesis_home_dir(None)
    return list(found.values())[:n]
