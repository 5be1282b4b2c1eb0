"""Which numbers a format has: facts, and slow obvious arithmetic in float64 that everything faster is held to.

A format splits its bits into one sign bit, E exponent bits and M mantissa bits. The last E + M bits are the
*magnitude code* c, with exponent field e = c >> M and mantissa field m = c mod 2^M. Its value is

    e = 0:  m / 2^M * 2^(1 - bias)            zero and the subnormals
    e > 0:  (1 + m / 2^M) * 2^(e - bias)      the normals

so codes rise with their values, and neighbouring codes are neighbouring numbers. E = 0 leaves only the first line: a
fixed-point grid. M = 0 leaves only zero and powers of two. Codes above that of `max_finite` are no finite numbers: the
first is the infinity of formats that have one, the others are NaN.

Rounding to nearest resolves a tie to the even *code*, in every format. Where M >= 1 this is the usual even mantissa;
where M = 0 it is the even exponent field: E7M0 rounds 3 to 2 and 6 to 8.

Overflow saturates by default: whatever would round beyond `max_finite`, infinities included, becomes `max_finite` (the
saturating mode of the OCP specification). Without saturation it becomes infinity, or NaN in formats without infinity;
formats that have neither cannot be used so. NaN stays NaN: a format without a NaN code keeps it in its float32 image,
where a run must be able to see it, and has no code for it.

A *scale format* holds block scales and nothing else: no sign, and E8M0 no zero either. It is no element format.

Names ignore case, and the field's other names are aliases. A user's own format is registered by its facts.

Sources: Micikevicius et al. 2022, and OCP 8-bit Floating Point Specification 1.0, for E4M3 and E5M2; OCP Microscaling
Formats 1.0 for E2M1, E2M3, E3M2 and E8M0; IEEE 754-2019 for the IEEE-like splits; the interim report of IEEE P3109 for
its 8-bit family, as read by the library gfloat.
"""

import dataclasses
import difflib
import functools
import hashlib
import math
import re

import numpy as np

from altgrad_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """One number format. The fields are plain facts; the properties follow from them, named as in numpy.finfo.

    name: as in FORMATS. exponent_bits, mantissa_bits: E and M. bias: of the exponent field. max_finite: the largest
    finite number. has_inf: whether the code after it is infinity. has_negative_zero: whether sign and zero magnitude
    are -0; where not (P3109), that code is NaN and every zero is +0.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_finite: float
    has_inf: bool
    has_negative_zero: bool = True

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def n_magnitudes(self) -> int:
        """Codes of one sign."""
        return 2 ** (self.exponent_bits + self.mantissa_bits)

    @property
    def max_code(self) -> int:
        """Magnitude code of `max_finite`."""
        return int(np.searchsorted(_values(self), self.max_finite))

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN."""
        return not self.has_negative_zero or self.max_code + self.has_inf < self.n_magnitudes - 1

    @property
    def nmant(self) -> int:
        """Bits of the mantissa field."""
        return self.mantissa_bits

    @property
    def nexp(self) -> int:
        """Bits of the exponent field."""
        return self.exponent_bits

    @property
    def minexp(self) -> int:
        """Exponent of the smallest normal number; the grid is even below 2^minexp, its step 2^(minexp - M)."""
        return 1 - self.bias

    @property
    def maxexp(self) -> int:
        """The smallest power of two that is larger than `max`, as an exponent."""
        return math.frexp(self.max_finite)[1]

    @property
    def max(self) -> float:
        """The largest finite number."""
        return self.max_finite

    @property
    def min(self) -> float:
        """The most negative finite number."""
        return -self.max_finite

    @property
    def smallest_normal(self) -> float:
        """The smallest normal number; NaN where there are no normal numbers (E = 0)."""
        return math.ldexp(1.0, self.minexp) if self.exponent_bits else math.nan

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number (where M = 0 it is the smallest normal number, for there are no others)."""
        return math.ldexp(1.0, self.minexp - self.mantissa_bits)

    @property
    def eps(self) -> float:
        """Spacing of the numbers from 1.0 upwards."""
        return math.ldexp(1.0, max(self.minexp, 0) - self.mantissa_bits)

    @property
    def n_finite(self) -> int:
        """How many different finite numbers there are; 0 and -0 are one."""
        return 2 * self.max_code + 1


def _ieee(name: str, exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    """Top exponent field kept for infinity and NaN, as in IEEE 754."""
    bias = 2 ** (exponent_bits - 1) - 1
    return FloatFormat(name, exponent_bits, mantissa_bits, bias, (2 - 2.0**-mantissa_bits) * 2.0**bias, has_inf=True)


def _finite(name: str, exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    """Every code a number. The bias is that of IEEE 754, except that E = 0 is a grid of k / 2^M."""
    bias = 2 ** (exponent_bits - 1) - 1 if exponent_bits else 1
    largest = (2 - 2.0**-mantissa_bits) * 2.0 ** (2**exponent_bits - 1 - bias)
    if not exponent_bits:
        largest = 1 - 2.0**-mantissa_bits
    return FloatFormat(name, exponent_bits, mantissa_bits, bias, largest, has_inf=False)


def _p3109(precision: int) -> FloatFormat:
    """The signed 8-bit format of IEEE P3109 with infinities and this precision (M + 1).

    One NaN, in the place of -0; one infinity of each sign, in the highest code. P8 has no exponent field.
    """
    exponent_bits, mantissa_bits = 8 - precision, precision - 1
    bias = 2 ** (exponent_bits - 1) if exponent_bits else 0
    code = 2**7 - 2
    return FloatFormat(
        f"P3109_P{precision}",
        exponent_bits,
        mantissa_bits,
        bias,
        float(_value_of(code, mantissa_bits, bias)),
        has_inf=True,
        has_negative_zero=False,
    )


def _value_of(code, mantissa_bits, bias):
    """float64 value of magnitude codes as if all were finite numbers, by the two lines at the top of this module."""
    code = np.asarray(code)
    exponent, mantissa = code >> mantissa_bits, code % 2**mantissa_bits
    fraction = mantissa / 2.0**mantissa_bits
    return np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))


def _integer(bits: int) -> FloatFormat:
    """The whole numbers of -(2^(bits-1) - 1) to 2^(bits-1) - 1: symmetric, without the lone -2^(bits-1).

    Its codes are those of E1M(bits-2), whose numbers are all a multiple of one step; here that step is 1.
    """
    mantissa_bits = bits - 2
    return FloatFormat(f"INT{bits}", 1, mantissa_bits, 1 - mantissa_bits, 2.0 ** (bits - 1) - 1, has_inf=False)


_DEFAULTS = (
    _finite("E0M7", 0, 7),
    _finite("E1M6", 1, 6),
    _finite("E2M5", 2, 5),
    _ieee("E3M4", 3, 4),
    FloatFormat("E4M3", 4, 3, bias=7, max_finite=448.0, has_inf=False),
    _ieee("E5M2", 5, 2),
    _finite("E6M1", 6, 1),
    _finite("E7M0", 7, 0),
)
DEFAULT_8BIT = tuple(fmt.name for fmt in _DEFAULTS)
FORMATS = {
    fmt.name: fmt
    for fmt in (
        *_DEFAULTS,
        _finite("E2M1", 2, 1),
        _finite("E1M2", 1, 2),
        _integer(4),
        _finite("E2M3", 2, 3),
        _finite("E3M2", 3, 2),
        _integer(8),
        _ieee("E4M3_IEEE", 4, 3),
        *(_finite(f"E{e}M{7 - e}_FINITE", e, 7 - e) for e in range(8)),
        *(_p3109(precision) for precision in range(1, 9)),
        _ieee("BF16", 8, 7),
        _ieee("FP16", 5, 10),
        _ieee("E4M11", 4, 11),
        _ieee("E7M8", 7, 8),
        _finite("E0M15", 0, 15),
    )
}
ALIASES = {
    "E8M7": "BF16",
    "bfloat16": "BF16",
    "E5M10": "FP16",
    "float16": "FP16",
    "FP4": "E2M1",
    "float4_e2m1fn": "E2M1",
    "FP6": "E2M3",
    "float6_e2m3fn": "E2M3",
    "float6_e3m2fn": "E3M2",
    "float8_e4m3fn": "E4M3",
    "float8_e5m2": "E5M2",
    "float8_e4m3": "E4M3_IEEE",
    "float8_e3m4": "E3M4",
}
_REGISTERED: dict[str, FloatFormat] = {}


@dataclasses.dataclass(frozen=True)
class ScaleFormat:
    """A format of block scales: unsigned, its code of all ones NaN. Fields as in FloatFormat.

    grid: the element format whose positive numbers are these, so that rounding onto it rounds a scale; None for E8M0,
    which has only powers of two and no zero: code c is 2^(c - bias).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_finite: float
    grid: FloatFormat | None


SCALE_FORMATS = {
    fmt.name: fmt
    for fmt in (
        ScaleFormat("E8M0", 8, 0, 127, 2.0**127, grid=None),
        ScaleFormat("UE4M3", 4, 3, 7, 448.0, grid=FORMATS["E4M3"]),
        ScaleFormat("UE5M3", 5, 3, 15, 114688.0, grid=FloatFormat("UE5M3", 5, 3, 15, 114688.0, has_inf=False)),
    )
}
SCALE_ALIASES = {"float8_e8m0fnu": "E8M0"}


def get_format(name: str) -> FloatFormat:
    """The element format of this name, in any case; UserError with the names that exist, the nearest first."""
    known = {fmt.upper(): fmt for fmt in (*FORMATS, *_REGISTERED)}
    known |= {alias.upper(): fmt for alias, fmt in ALIASES.items()}
    plain = str(name).upper().replace("-", "_")
    if isinstance(name, str) and name.upper() in known:
        found = known[name.upper()]
        return FORMATS.get(found) or _REGISTERED[found]
    if plain in _scale_names():
        raise UserError(f"{name!r} is a format of block scales, not of elements: give an element format such as E4M3")
    names = [*FORMATS, *_REGISTERED]
    foreign = re.match(r"(?:FLOAT[468]|FP[468])_(E\d+M\d+)", plain)  # as torch and ml_dtypes spell float8_e4m3fn
    near = difflib.get_close_matches(plain, [*names, *ALIASES], n=3, cutoff=0.5)
    if foreign and foreign[1] in names:
        near = [foreign[1]]
    listed = ", ".join([*near, *(other for other in names if other not in near)])
    listed = re.sub("P3109_P1, .*P3109_P8", "P3109_P1 to P3109_P8", listed)
    raise UserError(f"there is no number format {str(name)[:40]!r}: give one of {listed}")


def _scale_names():
    """{name in capitals: name} of the scale formats and their aliases."""
    own = {name: name for name in SCALE_FORMATS}
    return {name.upper(): fmt for name, fmt in (own | SCALE_ALIASES).items()}


def get_scale_format(name: str) -> ScaleFormat:
    """The scale format of this name, in any case; UserError with the names that exist."""
    found = _scale_names().get(str(name).upper())
    if found is None:
        raise UserError(f"there is no scale format {str(name)[:40]!r}: give one of {', '.join(SCALE_FORMATS)}")
    return SCALE_FORMATS[found]


def decode_scale(fmt: ScaleFormat, code) -> np.ndarray:
    """float64 values of scale codes (whole numbers from 0 to 2^(E+M) - 1, of any shape); the last code is NaN."""
    code, last = np.asarray(code), 2 ** (fmt.exponent_bits + fmt.mantissa_bits) - 1
    if code.dtype.kind not in "iu" or code.size and not (0 <= code.min() and code.max() <= last):
        raise UserError(f"codes of {fmt.name} are whole numbers from 0 to {last}")
    code = code.astype(np.int64)
    value = _value_of(code, fmt.mantissa_bits, fmt.bias) if fmt.grid else 2.0 ** (code - np.float64(fmt.bias))
    return np.where(code == last, np.nan, value)


def register_format(fmt: FloatFormat) -> FloatFormat:
    """Makes a format of one's own known to `get_format`, for this process, and returns it.

    Registering the same facts again changes nothing. UserError, one sentence, for facts that make no format, and for a
    name that already stands for other facts.
    """
    _check_facts(fmt)
    taken = {
        name.upper(): (FORMATS | _REGISTERED)[ALIASES.get(name, name)] for name in (*FORMATS, *_REGISTERED, *ALIASES)
    }
    if fmt.name.upper() in _scale_names() or taken.get(fmt.name.upper(), fmt) != fmt:
        raise UserError(f"the name {fmt.name} already stands for another format: give yours a name of its own")
    if fmt.name not in FORMATS:
        _REGISTERED[fmt.name] = fmt
    return fmt


def registered(names) -> dict[str, dict]:
    """{name: facts} of those among these formats that are a user's own; what a record keeps, so that `known_again` can
    make them known to another process."""
    return {name: facts(_REGISTERED[name]) for name in dict.fromkeys(names) if name in _REGISTERED}


def known_again(kept) -> None:
    """Registers the formats of a record; UserError where a name stands for other facts in this process."""
    for of_format in (kept or {}).values():
        register_format(from_facts(of_format))


def facts(fmt: FloatFormat) -> dict:
    """What a format is, as plain values that JSON holds; `from_facts` makes the format of them again."""
    return dataclasses.asdict(fmt)


def from_facts(facts: dict) -> FloatFormat:
    """The format of these facts; UserError for missing or unknown keys, and for facts that make no format."""
    expected = [field.name for field in dataclasses.fields(FloatFormat)]
    if sorted(facts) != sorted(expected):
        raise UserError(f"a number format has the facts {', '.join(expected)}, not {', '.join(map(str, facts))}")
    fmt = FloatFormat(**facts)
    _check_facts(fmt)
    return fmt


def _check_facts(fmt):
    """Raises UserError unless the facts are a format that rounding.py can round to."""
    whole = all(type(value) is int for value in (fmt.exponent_bits, fmt.mantissa_bits, fmt.bias))
    if not (isinstance(fmt.name, str) and re.fullmatch(r"[A-Za-z]\w{0,31}", fmt.name, re.ASCII)):
        raise UserError(f"{str(fmt.name)[:40]!r} cannot name a format: begin with a letter, then letters, digits and _")
    if not (whole and 0 <= fmt.exponent_bits <= 8 and 0 <= fmt.mantissa_bits <= 15 and 2 <= fmt.bits <= 16):
        raise UserError(
            f"{fmt.name} has {fmt.exponent_bits} exponent bits, {fmt.mantissa_bits} mantissa bits and the bias "
            f"{fmt.bias}: give whole numbers, at most 8 exponent bits, and 2 to 16 bits with the sign"
        )
    if not (fmt.minexp == -126 or -126 + fmt.mantissa_bits <= fmt.minexp <= 127):
        raise UserError(
            f"{fmt.name} has the bias {fmt.bias}, and its smallest numbers are no normal numbers of float32: "
            "give one that leaves the smallest at 2^-126 or above"
        )
    largest = fmt.max_finite
    if not (isinstance(largest, (int, float)) and 0 < largest < 2.0**128 and largest in _values(fmt)[:-1]):
        raise UserError(
            f"{fmt.name} has max_finite={largest}, which is none of its numbers below 2^128: give the largest one"
        )
    if fmt.has_inf and fmt.max_code == fmt.n_magnitudes - 1:
        raise UserError(f"{fmt.name} has no code left for infinity beyond {largest}: set has_inf=False")


@functools.cache
def _values(fmt: FloatFormat) -> np.ndarray:
    """float64 [n_magnitudes + 1], by magnitude code, every code read as a number, and one beyond the last.

    The number after `max_finite` decides what overflows, so it is needed even where it has no code of its own.
    """
    values = _value_of(np.arange(fmt.n_magnitudes + 1), fmt.mantissa_bits, fmt.bias)
    values.flags.writeable = False
    return values


def decode(fmt: FloatFormat, code) -> np.ndarray:
    """float64 values, of the shape of `code`: whole numbers from 0 to 2^bits - 1, the sign in the highest bit."""
    code = np.asarray(code)
    if code.dtype.kind not in "iu" or code.size and not (0 <= code.min() and code.max() < 2**fmt.bits):
        raise UserError(f"codes of {fmt.name} are whole numbers from 0 to {2**fmt.bits - 1}")
    code = code.astype(np.int64)
    negative, magnitude = code >= fmt.n_magnitudes, code % fmt.n_magnitudes
    value = _values(fmt)[magnitude]
    value = np.where(magnitude > fmt.max_code, np.nan, value)
    if fmt.has_inf:
        value = np.where(magnitude == fmt.max_code + 1, np.inf, value)
    value = np.where(negative, -value, value)
    if not fmt.has_negative_zero:
        value = np.where(negative & (magnitude == 0), np.nan, value)
    return value


def encode(fmt: FloatFormat, x, *, saturate: bool = True) -> np.ndarray:
    """Codes (int64, of the shape of x) of the numbers nearest to x, ties to the even code.

    Args:
      x: anything numpy reads as float64. A float32 or narrower x is decided exactly: the midpoint of two neighbours has
        at most 17 significant bits.
      saturate: False lets overflow become infinity, or NaN in formats without infinity.

    Raises:
      UserError: x holds a NaN and the format has none; or saturate=False and it has neither infinity nor NaN.
    """
    magnitude, negative, is_nan = _nearest(fmt, x, saturate)
    if is_nan.any() and not fmt.has_nan:
        raise UserError(f"{fmt.name} has no code for NaN: every code is a finite number")
    if not fmt.has_negative_zero:
        negative = negative & (magnitude != 0)
    code = magnitude + fmt.n_magnitudes * negative
    return np.where(is_nan, _nan_code(fmt), code)


def round_reference(fmt: FloatFormat, x, *, saturate: bool = True) -> np.ndarray:
    """float64 numbers of the format nearest to x: decode(encode(x)), with NaN kept NaN in every format."""
    magnitude, negative, is_nan = _nearest(fmt, x, saturate)
    value = _values(fmt)[magnitude]
    value = np.where(magnitude > fmt.max_code, np.inf, value)
    value = np.where(negative, -value, value)
    if not fmt.has_negative_zero:
        value = np.where(value == 0, 0.0, value)
    return np.where(is_nan, np.nan, value)


def _nearest(fmt, x, saturate):
    """Magnitude codes, signs, and where the result is NaN. Overflow: max_code, or else max_code + 1 or NaN."""
    if not saturate:
        require_overflow_code(fmt)
    with np.errstate(invalid="ignore"):  # some NaN codes of narrow types are signalling ones
        x = np.asarray(x, np.float64)
    size = np.where(np.isnan(x), 0, np.abs(x))
    values = _values(fmt)[: fmt.max_code + 2]
    below = np.clip(np.searchsorted(values, size, side="right") - 1, 0, fmt.max_code)  # the last value <= size
    midpoint = (values[below] + values[below + 1]) / 2
    up = (size > midpoint) | ((size == midpoint) & (below % 2 == 1))
    magnitude = below + up
    overflow = magnitude > fmt.max_code
    if saturate:
        return np.where(overflow, fmt.max_code, magnitude), np.signbit(x), np.isnan(x)
    return magnitude, np.signbit(x), np.isnan(x) | (overflow & (not fmt.has_inf))


def _nan_code(fmt):
    return fmt.n_magnitudes if not fmt.has_negative_zero else fmt.n_magnitudes - 1


def require_overflow_code(fmt: FloatFormat) -> None:
    """UserError unless the format has a code that can stand for overflow."""
    if not (fmt.has_inf or fmt.has_nan):
        raise UserError(
            f"{fmt.name} cannot be used with saturate=False, for all its codes are finite numbers: set saturate=True"
        )


def image_inputs(fmt: FloatFormat) -> np.ndarray:
    """float32 inputs, in order, whose roundings identify how a format was implemented.

    M <= 7: the 65,536 numbers of bfloat16 by code. M > 7: `midpoints`, for bfloat16 numbers would hardly be rounded.
    """
    if fmt.mantissa_bits > 7:
        return midpoints(fmt)
    return (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)


def midpoints(fmt: FloatFormat) -> np.ndarray:
    """float32 inputs at which rounding onto a format changes its mind, the overflow threshold included.

    With n = max_code + 2 (one number beyond the largest): the numbers with codes 0 to n - 1, the n - 1 midpoints
    between them, the float32 numbers one ulp above each of these in the same order, those one ulp below (zero's is
    zero), and the negatives of all. Everything is exact in float32; after BF16's largest number comes infinity.
    """
    numbers = _values(fmt)[: fmt.max_code + 2]
    between = (numbers[:-1] + numbers[1:]) / 2
    with np.errstate(over="ignore"):
        bits = np.concatenate([numbers, between]).astype(np.float32).view(np.uint32)
    bits = np.concatenate([bits, bits + 1, np.where(bits == 0, 0, bits - 1)])
    return np.concatenate([bits, bits | 0x80000000]).astype(np.uint32).view(np.float32)


def image_hash(image_N: np.ndarray) -> str:
    """sha256 of float32 numbers as little-endian bytes, every NaN as 0x7fc00000."""
    bits = np.ascontiguousarray(image_N, np.float32).view(np.uint32)
    bits = np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint32(0x7FC00000), bits)
    return hashlib.sha256(bits.astype("<u4").tobytes()).hexdigest()


@functools.cache
def _oracle_hash(fmt, saturate):
    return image_hash(round_reference(fmt, image_inputs(fmt), saturate=saturate).astype(np.float32))


def certificate(fmt: FloatFormat, *, saturate: bool = True) -> dict:
    """What a run stores about a format: its constants, its rules, and the hash of its image by the float64 oracle."""
    return {
        **dataclasses.asdict(fmt),
        "has_nan": fmt.has_nan,
        "smallest_subnormal": fmt.smallest_subnormal,
        "ties": "even code",
        "overflow": "saturates" if saturate else "infinity" if fmt.has_inf else "NaN",
        "image_inputs": "bfloat16 codes" if fmt.mantissa_bits <= 7 else "numbers, midpoints, and float32 neighbours",
        "image_sha256": _oracle_hash(fmt, saturate),
    }


def critical_inputs(fmt: FloatFormat) -> dict[str, np.ndarray]:
    """float32 inputs on which rounding onto this format is tried, by name of the set.

    All of bfloat16; all of float16; `midpoints`; and float32's own edges: every power of two, the ends of the subnormal
    and normal ranges, infinity and NaN, of both signs.
    """
    special = [0, 1, 2, 0x7FFFFF, 0x800000, 0x800001, 0x7F7FFFFF, 0x7F800000, 0x7FC00000]
    powers_of_two = [*(1 << n for n in range(23)), *(n << 23 for n in range(1, 255))]
    edges = np.array([*special, *powers_of_two], np.uint32)
    return {
        "bfloat16": (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32),
        "float16": np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32),
        "midpoints": midpoints(fmt),
        "edges": np.concatenate([edges, edges | 0x80000000]).astype(np.uint32).view(np.float32),
    }
