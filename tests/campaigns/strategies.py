"""Settings that are wrong, and settings that are right, made from the limits of the fields.

hypothesis draws them, by the seed alone and without a database. What a limit *should* be is no question here: that a
value outside it is refused, and one inside accepted, by every way that a setting can be given.
"""

import math
import tempfile
from typing import Any, NamedTuple

import ml_collections
from hypothesis import HealthCheck, Phase, configuration, given, seed, settings
from hypothesis import strategies as st

from altgrad_jax import config
from altgrad_jax.config import FIELDS, Field

WRONG_FOR_ALL = (None, {}, [1], ("x", 3), math.nan, 1j, b"1", 10**5000)
WRONG_FOR = {
    bool: (0, 1, "False", 0.0),
    int: (True, 1.0, "1", math.inf),
    float: (True, 1, "0.5", math.inf, -math.inf),
    str: (1, True, 0.5, ("a",)),
    tuple: ("", "a", ("a", "a"), ("",), (" a",), ("a\n",), (1,), (("a",),), 5),
}
WRONG_TEXTS = ("None", " a", "a ", "a\nb", "a\0b", "\x1b[31m", "\ud800", "x" * 5000)
WRONG_FLAGS = {  # what stands behind the "=" of a flag and is no value of the type
    bool: ("", "2", "maybe", "None", "true,false"),
    int: ("", "x", "1.5", "1e3", "nan", "None", "True", "1,2", "9" * 5000, "1 2"),
    float: ("", "x", "1,5", "None", "True", "1e", "nan", "inf", "1e999"),
    str: (),
    tuple: ("a,,b", "a,a"),
}


class Bad(NamedTuple):
    """A value that the setting `name` must not have; as the text of a flag if `is_flag`."""

    name: str
    value: Any
    is_flag: bool = False


def outside(field: Field) -> st.SearchStrategy:
    """Values of the field's type outside its limits."""
    if field.low is not None:
        zero = (lambda value: value != 0) if field.zero else (lambda value: True)
        if field.kind is int:
            return (st.integers(max_value=int(field.low) - 1) | st.integers(min_value=int(field.high) + 1)).filter(zero)
        below, above = math.nextafter(field.low, -math.inf), math.nextafter(field.high, math.inf)
        return (st.floats(max_value=below) | st.floats(min_value=above)).filter(zero)
    if field.kind is bool:
        return st.integers()
    if field.kind is tuple:
        return st.sampled_from((("a,b",), ("x" * (field.text.longest + 1),), *(("ok", text) for text in WRONG_TEXTS)))
    if field.choices:
        near = [field.choices[0].upper(), f"{field.choices[0]} ", f"{field.choices[0]},", "", *WRONG_TEXTS]
        return (st.sampled_from(near) | st.text(max_size=12)).filter(lambda text: not field.accepts(text))
    more = [f"a{letter}b" for letter in field.text.without] + ["x" * (field.text.longest + 1)]
    more += ["gs://a/b", "~no-such-user/x"] if field.text is config.FOLDER else []
    more += ["grad,", "all,grad"] if field.text is config.GROUPS_OF_METRICS else []
    return st.sampled_from([*WRONG_TEXTS, *more, *([] if field.text.optional else [""])])


def inside(field: Field) -> st.SearchStrategy:
    """Values of the field inside its limits, edges often."""
    if field.low is not None:
        low, high = field.kind(field.low), field.kind(field.high)
        between = st.integers(low, high) if field.kind is int else st.floats(low, high)
        return st.sampled_from([low, high, *([field.kind(0)] if field.zero else [])]) | between
    if field.kind is bool:
        return st.booleans()
    if field.kind is tuple:
        options = ("xla_gpu_autotune_level=0", "xla_gpu_enable_latency_hiding_scheduler=true")
        free = options if field.text is config.XLA_OPTION else ("E4M3", "a-b", "ä")
        return st.lists(st.sampled_from(field.choices or free), unique=True).map(tuple)
    if field.per_operand:
        three = st.tuples(*[st.sampled_from(field.choices)] * 3).map(",".join)
        return st.sampled_from(field.choices) | three
    free = ("none", "update,grad") if field.text is config.GROUPS_OF_METRICS else (field.default, "x", "Lauf ä")
    return st.sampled_from(field.choices or free)


def bad_values_of(field: Field) -> st.SearchStrategy[Bad]:
    """Wrong values of a field, in every way that one can be given."""
    wrong_type = st.sampled_from((*WRONG_FOR[field.kind], *WRONG_FOR_ALL))
    found = (wrong_type | outside(field)).map(lambda value: Bad(field.name, value))
    texts = WRONG_FLAGS[field.kind]
    return found | st.sampled_from(texts).map(lambda text: Bad(field.name, text, True)) if texts else found


def bad_values() -> st.SearchStrategy[Bad]:
    """Wrong values of any field."""
    return st.sampled_from(list(FIELDS.values())).flatmap(bad_values_of)


def good_values() -> st.SearchStrategy[tuple[str, Any]]:
    """(name, value inside the limits of that field)."""
    return st.sampled_from(list(FIELDS.values())).flatmap(lambda field: st.tuples(st.just(field.name), inside(field)))


def give(bad: Bad, config_file: str) -> None:
    """Gives a Bad to the program, which must raise UserError. config_file: one that is right by itself."""
    if bad.is_flag:
        from altgrad_jax import cli

        cli.parse([f"--config={config_file}", f"--config.{bad.name}={bad.value}"], cli.new_flags())
    else:
        values = {name: field.default for name, field in FIELDS.items()} | {bad.name: bad.value}
        config.validate(ml_collections.ConfigDict(values))


def draw(strategy: st.SearchStrategy, n: int, *, of_seed: int) -> list:
    """At most n different examples, the same for the same seed."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        configuration.set_hypothesis_home_dir(home)  # it keeps files of its own even without a database

        @seed(of_seed)
        @settings(
            max_examples=3 * n,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def collect(example):
            found.setdefault(config.show(example), example)

        try:
            collect()
        finally:
            configuration.set_hypothesis_home_dir(None)
    return list(found.values())[:n]
