"""Shares read from one histogram, against rounding each element by the float64 oracle."""

import json

import jax
import numpy as np
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import formats, whatif
from altgrad_jax.numerics.formats import FORMATS, get_format
from altgrad_jax.numerics.histograms import magnitude_histogram
from altgrad_jax.numerics.scales import scale_for

EXACT = [fmt for fmt in FORMATS.values() if fmt.bits == 8]


def at_thresholds():
    """Every number at which an 8-bit format changes its mind at scale 1, its float32 neighbours, and scaled copies."""
    values = []
    for fmt in EXACT:
        values += [fmt.max, fmt.smallest_subnormal / 2, fmt.smallest_subnormal]
    values = np.float32(values)
    values = np.concatenate([values, np.nextafter(values, np.float32(0)), np.nextafter(values, np.float32(np.inf))])
    return np.concatenate([values * np.float32(s) for s in (1, -1, 2.0**-9, 2.0**11)])


def tensors():
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore", under="ignore"):
        heavy = (1e-3 * rng.standard_normal(20_000) / np.abs(rng.standard_normal(20_000)) ** 3).astype(np.float32)
        bits = rng.integers(0, 0x7F800000, 20_000, dtype=np.uint32).view(np.float32)
    gaussian = (0.02 * rng.standard_normal(20_000)).astype(np.float32)
    return {
        "gaussian": gaussian,
        "heavy": heavy,
        "bits": bits,
        "thresholds": at_thresholds(),
        "zeros": np.where(rng.random(20_000) < 0.4, np.float32(-0.0), heavy),
        "broken": np.concatenate([gaussian, np.float32([np.inf, -np.inf, np.nan, 1e-42, -1e-45])]),
    }


TENSORS = tensors()
histogram = jax.jit(magnitude_histogram)
HISTOGRAMS = {}


def histogram_of(name):
    if name not in HISTOGRAMS:
        HISTOGRAMS[name] = np.asarray(histogram(TENSORS[name]))
    return HISTOGRAMS[name]


def by_rounding(fmt, v, scale):
    scaled = v.astype(np.float64) * scale
    flushed = (formats.round_reference(fmt, scaled) == 0) & (v.view(np.uint32) << 1 != 0)
    return {"underflow": flushed.mean(), "overflow": (np.abs(scaled) > fmt.max).mean()}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("fmt", EXACT, ids=lambda fmt: fmt.name)
def test_shares_are_those_of_rounding_every_element(fmt, name):
    v, counts = TENSORS[name], histogram_of(name)
    fits = float(scale_for(np.abs(v[np.isfinite(v)]).max(), fmt))
    for scale in {1.0, 2.0**-9, 2.0**11, 2.0**-120, 2.0**120, fits, fits * 16, fits / 1024}:
        assert whatif.what_if(counts, fmt, scale) == pytest.approx(by_rounding(fmt, v, scale), abs=1e-12)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt.bits != 8], ids=lambda fmt: fmt.name)
def test_other_formats_miss_only_what_the_module_says(fmt):
    v = np.abs(TENSORS["heavy"])
    for scale in (1.0, 2.0**14, float(scale_for(v.max(), fmt))):
        got, expected = whatif.what_if(histogram_of("heavy"), fmt, scale), by_rounding(fmt, v, scale)
        limit = fmt.max / scale
        missed = ((v > limit) & (v <= limit * (1 + 2.0**-7))).mean() if fmt.mantissa_bits > 7 else 0
        assert expected["overflow"] - missed - 1e-12 <= got["overflow"] <= expected["overflow"] + 1e-12
        assert got["underflow"] == pytest.approx(expected["underflow"], abs=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "heavy", "zeros", "broken"])
def test_the_best_scale_loses_no_more_than_any_other(name):
    v, counts = TENSORS[name], histogram_of(name)
    amax = np.abs(v[np.isfinite(v)]).max()
    rows = whatif.what_if_table(whatif.sparse(counts), amax)
    assert [row["name"] for row in rows] == list(formats.DEFAULT_8BIT)
    for row in rows:
        fmt = get_format(row["name"])
        assert row["scale"] == float(scale_for(amax, fmt))
        assert by_rounding(fmt, v, row["scale"]) == pytest.approx({k: row[k] for k in ("underflow", "overflow")})
        best = by_rounding(fmt, v, row["best_scale"])
        assert best == pytest.approx({k: row[f"best_{k}"] for k in ("underflow", "overflow")})
        lost = {s: sum(by_rounding(fmt, v, s).values()) for s in 2.0 ** np.arange(-20, 90)}
        assert sum(best.values()) == min(lost.values())
        equal = [s for s, share in lost.items() if share == sum(best.values())]
        assert row["best_scale"] == min(equal, key=lambda s: (abs(np.log2(s / row["scale"])), s))


def test_a_heavy_tail_is_better_clipped():
    """One outlier of 2^20 among ones: at its scale, all else flushes in E4M3; without it, nothing does."""
    v = np.float32([2.0**20] + 999 * [1.0])
    row = whatif.what_if_table(np.asarray(histogram(v)), 2.0**20)[formats.DEFAULT_8BIT.index("E4M3")]
    assert (row["scale"], row["underflow"], row["overflow"]) == (2.0**-12, 0.999, 0)
    assert (row["best_scale"], row["best_underflow"], row["best_overflow"]) == (2.0**-9, 0, 0.001)


def test_a_histogram_survives_the_record():
    for counts in (*map(histogram_of, TENSORS), np.zeros(5, int), np.arange(4), np.int32([0, 7, 0, 0, 1, 0])):
        stored = whatif.sparse(counts)
        again = json.loads(json.dumps(stored))
        assert again == stored
        np.testing.assert_array_equal(whatif.dense(again), counts)
    stored = whatif.sparse([0, 7, 0, 0, 1] + 5 * [0] + [2])
    assert stored == {"bins": 11, "first": [1, 10], "counts": [[7, 0, 0, 1], [2]]}
    assert len(json.dumps(whatif.sparse(histogram_of("zeros")))) < 2000


def test_an_empty_tensor_has_no_shares():
    assert all(np.isnan(share) for share in whatif.what_if(np.zeros(whatif.N_BINS), get_format("E4M3"), 1.0).values())


@pytest.mark.parametrize("scale", [0.0, -1.0, 3.0, np.inf, np.nan])
def test_a_scale_is_a_power_of_two(scale):
    with pytest.raises(UserError, match="power of two"):
        whatif.what_if(histogram_of("gaussian"), get_format("E4M3"), scale)


def test_another_histogram_is_refused():
    with pytest.raises(UserError, match="2220"):
        whatif.what_if(np.zeros(256), get_format("E4M3"), 1.0)
