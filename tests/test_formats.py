"""The formats' facts and the float64 oracle, against printed specifications, ml_dtypes and gfloat."""

import importlib.util
import json
import math
from pathlib import Path

import gfloat
import ml_dtypes
import numpy as np
import pytest
import rounding_oracles

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import formats
from altgrad_jax.numerics.formats import (
    FORMATS,
    FloatFormat,
    certificate,
    decode,
    decode_scale,
    encode,
    get_format,
    get_scale_format,
)

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)


@pytest.mark.parametrize(
    "name, largest, smallest, n_finite",
    [
        ("E0M7", 127 / 128, 1 / 128, 255),
        ("E1M6", 3.96875, 1 / 32, 255),
        ("E2M5", 7.875, 1 / 32, 255),
        ("E3M4", 15.5, 2.0**-6, 223),
        ("E4M3", 448, 2.0**-9, 253),
        ("E5M2", 57344, 2.0**-16, 247),
        ("E6M1", 1.5 * 2**32, 2.0**-31, 255),
        ("E7M0", 2.0**64, 2.0**-62, 255),
        ("E4M3_IEEE", 240, 2.0**-9, 239),
        ("E3M4_FINITE", 31, 2.0**-6, 255),
        ("E4M3_FINITE", 480, 2.0**-9, 255),
        ("BF16", 3.3895313892515355e38, 2.0**-133, 65279),
        ("FP16", 65504, 2.0**-24, 63487),
        ("E0M15", 1 - 2.0**-15, 2.0**-15, 65535),
        ("E2M1", 6, 0.5, 15),
        ("E2M3", 7.5, 0.125, 63),
        ("E3M2", 28, 0.0625, 63),
        ("E1M2", 3.5, 0.5, 15),
        ("INT4", 7, 1, 15),
        ("INT8", 127, 1, 255),
    ],
)
def test_ranges_are_those_of_the_specifications(name, largest, smallest, n_finite):
    fmt = get_format(name)
    assert (fmt.max, fmt.smallest_subnormal, fmt.n_finite, fmt.min) == (largest, smallest, n_finite, -largest)


@pytest.mark.parametrize("name, dtype", rounding_oracles.DTYPES.items())
def test_properties_mean_what_numpy_means_by_them(name, dtype):
    fmt, info = get_format(name), ml_dtypes.finfo(dtype)
    for prop in ("bits", "nmant", "nexp", "minexp", "maxexp"):
        assert getattr(fmt, prop) == getattr(info, prop), prop
    for prop in ("max", "min", "eps", "smallest_normal", "smallest_subnormal"):
        assert getattr(fmt, prop) == float(getattr(info, prop)), prop


@every_format
def test_the_numbers_are_the_codes_in_order(fmt):
    values = decode(fmt, np.arange(fmt.max_code + 1))
    assert values[0] == 0 and values[-1] == fmt.max and values[1] == fmt.smallest_subnormal
    assert np.all(np.diff(values) > 0)
    assert np.log2(fmt.max) < fmt.maxexp <= np.log2(fmt.max) + 1
    if fmt.exponent_bits:
        assert fmt.smallest_normal in values
    else:
        assert math.isnan(fmt.smallest_normal) and np.all(np.diff(values) == values[1])


@every_format
def test_decode_agrees_with_gfloat_on_every_code(fmt):
    codes = np.arange(2**fmt.bits)
    with np.errstate(over="ignore"):
        info = rounding_oracles.gfloat_info(fmt)
        theirs = np.array([gfloat.decode_float(info, int(code)).fval for code in codes])
    ours = decode(fmt, codes)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours[ours == 0]), np.signbit(theirs[theirs == 0]))
    assert fmt.has_nan == bool(np.isnan(theirs).any()) and fmt.has_inf == bool(np.isinf(theirs).any())


@pytest.mark.parametrize("name, dtype", rounding_oracles.DTYPES.items())
def test_decode_and_encode_agree_with_ml_dtypes_on_every_code(name, dtype):
    fmt = get_format(name)
    unsigned = np.uint8 if fmt.bits <= 8 else np.uint16
    codes = np.arange(2**fmt.bits).astype(unsigned)
    values = decode(fmt, codes)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(values, codes.view(dtype).astype(np.float64))
    exact = ~np.isnan(values)
    np.testing.assert_array_equal(encode(fmt, values[exact], saturate=not fmt.has_nan), codes[exact])


@every_format
def test_encode_returns_every_code_that_is_no_nan(fmt):
    codes = np.arange(2**fmt.bits)
    values = decode(fmt, codes)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(encode(fmt, values[finite]), codes[finite])


def test_ties_go_to_the_even_code():
    def nearest(name, x):
        return formats.round_reference(get_format(name), x).tolist()

    assert nearest("E7M0", [3, 6, 12, -3, -6]) == [2, 8, 8, -2, -8]
    assert nearest("P3109_P1", [3, 6, 12]) == [4, 4, 16]  # its bias has the other parity
    assert nearest("E0M7", np.array([0.5, 1.5, 2.5, -0.5]) / 128) == [0, 2 / 128, 2 / 128, 0]
    assert nearest("E4M3", [2.0**-10, 3 * 2.0**-10, 17, 19]) == [0, 2.0**-8, 16, 20]


def test_the_carry_from_the_largest_subnormal_is_the_smallest_normal():
    fmt = get_format("E5M2")
    largest_subnormal = 3 * 2.0**-16
    assert formats.round_reference(fmt, (largest_subnormal + fmt.smallest_normal) / 2) == fmt.smallest_normal


def test_overflow_saturates_or_becomes_what_the_format_has():
    def rounded(name, x, saturate):
        return float(formats.round_reference(get_format(name), x, saturate=saturate))

    assert rounded("E4M3", 464, False) == 448 and math.isnan(rounded("E4M3", 464.1, False))
    assert rounded("E5M2", 61439, False) == 57344 and rounded("E5M2", 61440, False) == math.inf
    assert rounded("E5M2", -math.inf, True) == -57344
    assert encode(get_format("P3109_P3"), -1e9, saturate=False) == 0xFF
    with pytest.raises(UserError, match="E2M5 cannot be used with saturate=False"):
        rounded("E2M5", 1, False)


def test_nan_and_the_zeros():
    assert encode(get_format("E4M3"), np.nan) == 0x7F and encode(get_format("P3109_P4"), np.nan) == 0x80
    assert encode(get_format("E4M3"), -0.0) == 0x80 and encode(get_format("P3109_P4"), -1e-9) == 0
    with pytest.raises(UserError, match="E7M0 has no code for NaN"):
        encode(get_format("E7M0"), np.nan)
    assert np.isnan(formats.round_reference(get_format("E7M0"), np.nan))
    with pytest.raises(UserError, match="from 0 to 255"):
        decode(get_format("E7M0"), 256)


def test_a_wrong_name_lists_the_right_ones_nearest_first():
    with pytest.raises(UserError, match="'e4m3_iee': give one of E4M3_IEEE, .*E0M7.*P3109_P8.*BF16"):
        get_format("e4m3_iee")
    with pytest.raises(UserError, match="give one of E0M7, E1M6"):
        get_format(None)
    assert get_format("E8M7") is get_format("BF16") and get_format("E5M10") is get_format("FP16")


@pytest.mark.parametrize(
    "alias, name",
    [
        ("FP4", "E2M1"),
        ("float4_e2m1fn", "E2M1"),
        ("FP6", "E2M3"),
        ("float6_e2m3fn", "E2M3"),
        ("float6_e3m2fn", "E3M2"),
        ("float8_e4m3fn", "E4M3"),
        ("float8_e5m2", "E5M2"),
        ("float8_e4m3", "E4M3_IEEE"),
        ("float8_e3m4", "E3M4"),
        ("bfloat16", "BF16"),
        ("float16", "FP16"),
        ("e0m7_finite", "E0M7_FINITE"),
    ],
)
def test_the_field_s_names_in_any_case(alias, name):
    for spelling in (alias, alias.upper(), alias.lower(), alias.title()):
        assert get_format(spelling) is FORMATS[name]
    dtype = getattr(ml_dtypes, alias, None)
    assert dtype is None or dtype is rounding_oracles.DTYPES[name]


def test_ties_of_e2m1_are_those_of_the_specification():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    assert formats.round_reference(get_format("E2M1"), ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert decode(get_format("E2M1"), np.arange(8)).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_integers_have_the_codes_of_the_even_splits():
    for integer, split, step in (("INT8", "E1M6", 32), ("INT4", "E1M2", 2)):
        codes = np.arange(2 ** get_format(integer).bits)
        np.testing.assert_array_equal(decode(get_format(integer), codes), step * decode(get_format(split), codes))
        assert np.abs(decode(get_format(integer), codes)).max() == 2 ** (get_format(integer).bits - 1) - 1


def test_scale_formats_are_those_of_ml_dtypes_and_no_element_formats():
    codes = np.arange(256).astype(np.uint8)
    e8m0 = decode_scale(get_scale_format("float8_E8M0fnu"), codes)
    np.testing.assert_array_equal(e8m0, codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64))
    ue4m3 = decode_scale(get_scale_format("ue4m3"), codes[:128])
    np.testing.assert_array_equal(ue4m3, codes[:128].view(ml_dtypes.float8_e4m3fn).astype(np.float64))
    ue5m3 = decode_scale(get_scale_format("UE5M3"), codes)
    assert ue5m3[1] == 2.0**-17 and ue5m3[254] == 114688 and np.isnan(ue5m3[255])
    for name in ("UE4M3", "UE5M3"):
        fmt = get_scale_format(name)
        values = decode_scale(fmt, codes[: 2 ** (fmt.exponent_bits + 3) - 1])
        np.testing.assert_array_equal(formats.round_reference(fmt.grid, values), values)
    for name in ("E8M0", "ue4m3", "UE5M3", "float8_e8m0fnu"):
        with pytest.raises(UserError, match="is a format of block scales, not of elements: give an element format"):
            get_format(name)
    with pytest.raises(UserError, match="no scale format 'E4M3': give one of E8M0, UE4M3, UE5M3"):
        get_scale_format("E4M3")
    with pytest.raises(UserError, match="codes of UE4M3 are whole numbers from 0 to 127"):
        decode_scale(get_scale_format("UE4M3"), 128)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(formats, "_REGISTERED", {})


def test_a_format_of_one_s_own(registry):
    mine = FloatFormat("E3M3", 3, 3, 3, 30.0, has_inf=False)
    assert formats.register_format(mine) is mine and formats.register_format(mine) is mine
    assert get_format("e3m3") is mine and "E3M3" not in FORMATS
    again = formats.from_facts(json.loads(json.dumps(formats.facts(mine))))
    assert again == mine and certificate(again) == certificate(mine)
    with pytest.raises(UserError, match="give one of .*E3M3"):
        get_format("E3M33")
    assert formats.register_format(FORMATS["E4M3"]) is FORMATS["E4M3"]


@pytest.mark.parametrize(
    "name, E, M, bias, largest, has_inf, words",
    [
        ("E4M3", 4, 3, 8, 224.0, False, "E4M3 already stands for another format"),
        ("fp4", 2, 1, 2, 3.0, False, "fp4 already stands for another"),
        ("E8M0", 7, 0, 63, 2.0, False, "E8M0 already stands for another"),
        ("9M3", 4, 3, 7, 448.0, False, "'9M3' cannot name a format"),
        ("E9M3", 9, 3, 7, 448.0, False, "at most 8 exponent bits"),
        ("E4M3X", 4, 3, 7.5, 448.0, False, "bias 7.5: give whole numbers"),
        ("E8M8", 8, 8, 127, 448.0, False, "2 to 16 bits"),
        ("E4M3_LOW", 4, 3, 130, 2.0**-120, False, "smallest numbers are no normal numbers of float32"),
        ("E4M3_ODD", 4, 3, 7, 447.0, False, "max_finite=447.0, which is none of its numbers below"),
        ("E4M3_NEG", 4, 3, 7, -448.0, False, "max_finite=-448.0"),
        ("E4M3_FULL", 4, 3, 7, 480.0, True, "no code left for infinity beyond 480.0"),
    ],
)
def test_facts_that_make_no_format_are_refused(registry, name, E, M, bias, largest, has_inf, words):
    with pytest.raises(UserError, match=words) as error:
        formats.register_format(FloatFormat(name, E, M, bias, largest, has_inf))
    assert "\n" not in str(error.value) and not formats._REGISTERED


def test_facts_by_other_keys_are_refused():
    with pytest.raises(UserError, match="has the facts name, exponent_bits, .*, not name, bits"):
        formats.from_facts({"name": "E4M3", "bits": 8})


def test_certificates_tell_formats_apart_and_grids_alike_together():
    hashes = {name: certificate(fmt)["image_sha256"] for name, fmt in FORMATS.items()}
    same = {frozenset(other for other in hashes if hashes[other] == hashes[name]) for name in hashes}
    assert {group for group in same if len(group) > 1} == {
        frozenset({name, f"{name}_FINITE"}) for name in ("E0M7", "E1M6", "E2M5", "E6M1", "E7M0")
    } | {frozenset({"P3109_P7", "P3109_P8"})}
    for name in ("E4M3", "E5M2"):
        assert certificate(get_format(name), saturate=False)["image_sha256"] != hashes[name]


def test_the_certified_image_is_that_of_bfloat16_by_code_little_endian():
    x = np.arange(2**16).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    fmt = get_format("E5M2")
    assert formats.image_hash(rounding_oracles.cast(fmt, x, True)) == certificate(fmt)["image_sha256"]
    negative_nan = np.uint32([0xFFC00001, 0x3F800000]).view(np.float32)
    assert formats.image_hash(negative_nan) == formats.image_hash(np.float32([np.nan, 1]))


@every_format
def test_midpoints_lie_midway_and_half_of_their_codes_are_odd(fmt):
    values = formats.decode(fmt, np.arange(fmt.max_code + 1))
    x = formats.midpoints(fmt)
    n = fmt.max_code + 2
    np.testing.assert_array_equal(x[: n - 1], values)
    np.testing.assert_array_equal(x[n : 2 * n - 2] - values[:-1], values[1:] - x[n : 2 * n - 2])
    codes = encode(fmt, x[n : 2 * n - 2])
    assert np.all(codes % 2 == 0) and len(np.unique(codes)) >= fmt.max_code // 2
    assert len(x) == 6 * (2 * n - 1)
    if fmt.mantissa_bits > 7:
        np.testing.assert_array_equal(formats.image_inputs(fmt), x)


def test_the_generated_page_is_that_of_the_table():
    root = Path(__file__).parent.parent
    spec = importlib.util.spec_from_file_location("make_format_docs", root / "scripts" / "make_format_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (root / "docs" / "formats.md").read_text() == script.page(), "run python scripts/make_format_docs.py"
