"""Rank against NumPy's singular values in float64, histograms against counting with the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.models.model import init_params
from altgrad_jax.numerics import formats, histograms, whatif
from altgrad_jax.numerics.formats import FORMATS
from altgrad_jax.numerics.rounding import Grid, format_params
from altgrad_jax.run.alerts import RankFalling
from altgrad_jax.step import metrics

rank_health = jax.jit(histograms.rank_health)
code_histogram = jax.jit(histograms.code_histogram)


def by_svd(w):
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    return {
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
        "spectral_norm": s[0],
    }


def floats(values):
    return {name: float(value) for name, value in values.items()}


def with_spectrum(s):
    """A float32 matrix [80, 64] with these singular values."""
    rng = np.random.default_rng(5)
    u, v = np.linalg.qr(rng.standard_normal((80, 64)))[0], np.linalg.qr(rng.standard_normal((64, 64)))[0]
    return ((u * s) @ v).astype(np.float32)


# Close values at every distance at which a number of squarings could be too small: one, some, and all but the first.
SPECTRA = {
    f"{k} at 1 - {gap:g}": np.concatenate([[1], np.full(k, 1 - gap), np.linspace(0.9, 0, 63 - k)])
    for k in (1, 10, 63)
    for gap in (1e-6, 1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 1e-3, 3e-3, 1e-2, 1e-1)
}
SPECTRA |= {
    "equal": np.ones(64),
    "even": np.linspace(1, 0.99, 64),
    "power": np.arange(1, 65) ** -1.0,
    "rank one": np.eye(64)[0],
}


@pytest.mark.parametrize("s", SPECTRA.values(), ids=SPECTRA)
def test_rank_of_close_singular_values(s):
    w = with_spectrum(s)
    got, expected = floats(rank_health(w)), by_svd(w)
    assert got["spectral_norm"] == pytest.approx(expected["spectral_norm"], rel=1e-4)
    assert got["stable_rank"] == pytest.approx(expected["stable_rank"], rel=2e-4)
    assert got["participation_ratio"] == pytest.approx(expected["participation_ratio"], rel=1e-5)


def test_rank_where_the_first_direction_shows_in_no_single_column():
    """diag-like: the second value owns a column of the Gram matrix, the first is spread thinly over all others."""
    q = np.eye(64)
    q[:63, :63] = np.linalg.qr(np.column_stack([np.ones(63), np.random.default_rng(0).standard_normal((63, 62))]))[0]
    s = np.full(64, 0.5)
    s[0], s[63] = 1, 1 - 1e-4
    w = (q * s).T.astype(np.float32)
    assert floats(rank_health(w)) == pytest.approx(by_svd(w), rel=2e-5)


@pytest.mark.parametrize("shape", [(384, 384), (384, 1536), (1000, 96), (5, 3), (1, 7)])
def test_rank_of_initial_weights(shape):
    w = (0.02 * np.random.default_rng(2).standard_normal(shape)).astype(np.float32)
    assert floats(rank_health(w)) == pytest.approx(by_svd(w), rel=1e-5)


def test_the_gram_matrix_is_that_of_the_smaller_side():
    for shape in ((50257, 8), (8, 50257)):
        compiled = rank_health.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 10_000_000


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-60, 2.0**60, 2.0**117])
def test_rank_does_not_depend_on_the_unit(scale):
    w = np.random.default_rng(3).standard_normal((32, 16)).astype(np.float32)
    base, scaled = floats(rank_health(w)), floats(rank_health(w * np.float32(scale)))
    assert scaled == pytest.approx({**base, "spectral_norm": base["spectral_norm"] * scale}, rel=1e-6)


def test_rank_of_nothing_and_of_what_is_broken():
    assert set(floats(rank_health(np.zeros((8, 4), np.float32))).values()) == {0.0}
    for value in (np.nan, np.inf, -np.inf):
        w = np.ones((8, 4), np.float32)
        w[3, 2] = value
        assert all(np.isnan(value) for value in floats(rank_health(w)).values())


def test_rank_metrics_cover_kernels_and_the_token_table():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=40)
    rng = np.random.default_rng(8)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
        jax.eval_shape(lambda: init_params(config, 0)),
    )
    got = floats(jax.jit(metrics.rank_metrics)(params))
    layers = ["embed"] + [
        f"block_{i}/{part}" for i in range(2) for part in ("attn_qkv", "attn_out", "mlp_up", "mlp_down")
    ]
    assert set(got) == {
        f"{name}/{layer}" for layer in layers for name in ("stable_rank", "participation_ratio", "spectral_norm")
    }
    for layer, w in (
        ("embed", params["embed"]["embedding"]),
        ("block_1/mlp_down", params["block_1"]["mlp_down"]["kernel"]),
    ):
        expected = by_svd(np.asarray(w))
        assert {name: got[f"{name}/{layer}"] for name in expected} == pytest.approx(expected, rel=1e-5)


def oracle_codes(fmt, v, scale, saturate=True):
    codes = formats.encode(fmt, v[np.isfinite(v)].astype(np.float64) * scale, saturate=saturate)
    return np.bincount(np.where(codes == 128, 0, codes) if fmt.has_negative_zero else codes, minlength=256)


def values(n=5000):
    """Numbers from far below to far above every format, zeros of both signs, and some that are not finite."""
    rng = np.random.default_rng(4)
    wide = rng.choice([-1, 1], n) * 2.0 ** rng.uniform(-75, 75, n)
    near = rng.standard_normal(n)
    return np.concatenate([wide, near, [0.0, -0.0, 0.0, np.nan, np.inf, -np.inf]]).astype(np.float32)


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.bits == 8], ids=lambda fmt: fmt.name)
def test_codes_are_counted_as_the_oracle_encodes_them(fmt):
    numbers = values()
    for v, scale in ((numbers, 1.0), (numbers, 2.0**-5), (numbers, 2.0**40), (formats.midpoints(fmt), 1.0)):
        got = np.asarray(code_histogram(v, Grid(format_params(fmt), np.float32(scale))))
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, oracle_codes(fmt, v, scale))


@pytest.mark.parametrize("name", ["E5M2", "E4M3", "E3M4", "P3109_P4"])
def test_codes_without_saturation(name):
    fmt, v = FORMATS[name], values()
    got = code_histogram(v, Grid(format_params(fmt, saturate=False), np.float32(1)))
    np.testing.assert_array_equal(got, oracle_codes(fmt, v, 1.0, saturate=False))


def test_counts_beyond_the_whole_numbers_of_float32():
    """2^24 + 3 equal elements in one counter: a float32 counter that adds ones stops at 2^24."""
    v = jnp.ones(2**24 + 3, jnp.float32)
    assert int(jnp.max(jax.jit(histograms.magnitude_histogram)(v))) == 2**24 + 3


def test_code_use():
    counts = np.zeros(256, np.int32)
    counts[[0, 5, 130, 255]] = [8, 4, 2, 2]
    got = floats(jax.jit(histograms.code_use)(counts, 253))
    assert got == pytest.approx({"codes_used": 4, "codes_used_share": 4 / 253, "code_entropy": 1.75})
    counts = np.random.default_rng(0).integers(0, 10**6, 256).astype(np.int32)
    p = counts / counts.sum()
    assert floats(histograms.code_use(counts, 255))["code_entropy"] == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-6)
    assert set(floats(histograms.code_use(np.zeros(256, np.int32), 255)).values()) == {0.0}
    assert floats(histograms.code_use(np.eye(256, dtype=np.int32)[3], 255))["code_entropy"] == 0


def test_magnitudes():
    rng = np.random.default_rng(6)
    edges = np.float32([2.0**e * (2 - 2.0**-b) for e in (-137, -126, -125, -3, 0, 9, 127) for b in range(9)])
    powers = np.ldexp(np.float32(1), np.arange(-149, -120))
    v = np.concatenate(
        [
            values(),
            edges,
            np.nextafter(edges, np.float32(0)),
            powers,
            np.float32([1e-42, -1e-45]),
            rng.integers(0, 0x7F800000, 3000, dtype=np.uint32).view(np.float32),
        ]
    ).reshape(1, -1, 1)
    expected = np.zeros(whatif.N_BINS, int)
    for size in np.abs(v.ravel().astype(np.float64)):
        if np.isnan(size):
            index = 2219
        elif np.isinf(size):
            index = 2218
        elif size == 0:
            index = 0
        else:
            mantissa, exponent = np.frexp(size)  # size = mantissa 2^exponent, mantissa in (1, 2] from here on
            mantissa, exponent = (2.0, exponent - 2) if mantissa == 0.5 else (2 * mantissa, exponent - 1)
            j = next(j for j in range(8) if j == 7 or mantissa <= 2 - 2.0 ** -(j + 1))
            index = 2 + 8 * (exponent + 149) + j
        expected[index] += 1
    got = np.asarray(jax.jit(histograms.magnitude_histogram)(v))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected)


def begun(rule, ranks, step=100):
    """[(layer, share)] of the alerts that begin with these stable ranks."""
    alerts = rule.begins(step, {f"stable_rank/{layer}": value for layer, value in ranks.items()})
    assert all(alert["kind"] == "rank_falling" for alert in alerts)
    return [(alert["layer"], alert["value"]) for alert in alerts]


def test_rank_falling_begins_once_and_is_rearmed():
    rule = RankFalling(0.5, 0.7)
    seen = [begun(rule, {"block_0/mlp_up": value}) for value in (100, 51, 49, 40, 50, 49.5)]
    assert seen == [[], [], [("block_0/mlp_up", 0.49)], [], [], [("block_0/mlp_up", 0.495)]]


def test_rank_falling_is_strict_where_rank_cannot_be_made_good():
    layers = ("embed", "block_3/attn_out", "block_3/mlp_down", "block_3/attn_qkv", "block_3/mlp_up")
    rule = RankFalling(0.5, 0.7)
    assert begun(rule, dict.fromkeys(layers, 10.0)) == []
    assert begun(rule, dict.fromkeys(layers, 6.5)) == [(layer, 0.65) for layer in layers[:3]]
    assert begun(rule, dict.fromkeys(layers, 4.5)) == [(layer, 0.45) for layer in layers[3:]]


def test_rank_falling_passes_over_what_is_not_a_number():
    rule = RankFalling(0.5, 0.7)
    for value in (np.nan, np.inf, 0.0, 100.0, 40.0):
        found = begun(rule, {"a": value})
    assert found == [("a", 0.4)]
    assert begun(rule, {"a": np.nan}) == [] and begun(rule, {"a": 40.0}) == []  # still the same alert
    never = RankFalling(0.0, 0.0)
    assert begun(never, {"a": 9.0}) == begun(never, {"a": 0.0}) == []
    assert begun(rule, {}) == [] and begun(rule, {"new": 1.0}) == []


def test_rank_falling_decides_the_same_after_a_resume():
    """Live values are float32, the record holds their shortest decimals; a value may equal the threshold exactly."""
    rng = np.random.default_rng(7)
    rows = [
        (
            step,
            {
                layer: np.float32(rng.choice([0.3, 0.15, 0.21, 0.149999, 0.2100001, np.nan, rng.random()]))
                for layer in ("embed", "block_0/mlp_up")
            },
        )
        for step in range(60)
    ]
    record = [(step, {layer: float(str(value)) for layer, value in values.items()}) for step, values in rows]
    whole = RankFalling(0.5, 0.7)
    decided = [begun(whole, {layer: float(value) for layer, value in values.items()}) for _, values in rows]
    assert sum(map(len, decided)) > 5
    for cut in range(60):
        resumed = RankFalling(0.5, 0.7)
        for _, values in record[:cut]:
            begun(resumed, values)
        assert [begun(resumed, values) for _, values in record[cut:]] == decided[cut:]
