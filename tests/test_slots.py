"""One quantized operand, against ml_dtypes, gfloat, plain searches and the NumPy reference."""

from functools import partial

import gfloat
import gfloat.formats
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from altgrad_jax.numerics import recipe_reference as reference
from altgrad_jax.numerics import scales
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.recipes import RECIPES, SlotSpec
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.numerics.slot_quantization import Features, dequantized, quantize_slot
from altgrad_jax.numerics.slots import slot_of

ELEMENTS = ("E4M3", "E5M2", "E2M3", "E3M2", "E2M1", "E1M2", "INT8", "INT4")
MX_RULES = scales.RULES[:4]
R, C = 64, 512
FULL = Features(rotation=0, requantize=False, shared=False)
NV = SlotSpec("E2M1", "UE4M3", "1x16", "two_level")
TRACES = []


@partial(jax.jit, static_argnames="axis")
def quantized(v, slot, axis):
    """The values of a matrix by a slot, one program for every spec."""
    TRACES.append(axis)
    return dequantized(quantize_slot(v, slot, axis, FULL)[0], axis)


def blocks(seed=0, spread=20):
    """float32 [R, C] whose elements and blocks have very different sizes; some blocks are zero."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((R, C)) * 2.0 ** rng.uniform(-spread, spread, (R, C // 32)).repeat(32, 1)
    v *= 2.0 ** -rng.exponential(2, (R, C))
    v[3, 64:128] = 0
    v[5] = np.float32(2.0) ** rng.integers(-9, 9, C)  # amaxes that are powers of two
    return v.astype(np.float32)


def assert_same(got, want):
    """Equal to the bit, but for the sign of zero: NaN equals NaN."""
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want, np.float64).astype(np.float32))


def exponent_by_search(v, fmt, rule):
    """e of a block's decode scale by the rule's own words, in Python floats."""
    largest_power = 2.0 ** (fmt.maxexp - 1)
    if rule == "rceil":
        return next(e for e in range(-126, 127) if v <= fmt.max * 2.0**e)
    if rule == "ceil":
        return next(e for e in range(-126, 127) if v <= largest_power * 2.0**e)
    if rule == "even":
        below = 2.0 ** next(e for e in range(127, -127, -1) if 2.0**e <= v)
        steps = v / below * 2**fmt.mantissa_bits
        v = round(steps) * below / 2**fmt.mantissa_bits  # Python rounds halves to even
    return next(e for e in range(126, -127, -1) if largest_power * 2.0**e <= v)


@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_scales_against_a_search_in_numpy_and_jax(name):
    fmt = get_format(name)
    rng = np.random.default_rng(2)
    amax = 2.0 ** rng.uniform(-90, 90, 100)
    edges = fmt.max * 2.0 ** np.arange(-40, 40, 5.0)
    amax = np.concatenate([amax, edges, 2.0 ** np.arange(-60, 60, 7.0)]).astype(np.float32)
    amax = np.concatenate([amax, np.nextafter(amax, np.float32(0)), np.nextafter(amax, np.float32(np.inf))])
    for index, rule in enumerate(MX_RULES):
        want = [exponent_by_search(float(v), fmt, rule) for v in amax]
        np.testing.assert_array_equal(scales.mx_exponent(amax, fmt.max, fmt.mantissa_bits, index), want)
        in_jax = scales.mx_exponent(
            amax, fmt.max, fmt.mantissa_bits, index, xp=jnp, bitcast=jax.lax.bitcast_convert_type
        )
        np.testing.assert_array_equal(in_jax, want)
        np.testing.assert_array_equal(reference.exponent(amax, fmt.max, fmt, rule), want)
    assert scales.mx_exponent(np.float32([0, 1e-40]), fmt.max, fmt.mantissa_bits, scales.RCEIL).tolist() == [-126] * 2
    np.testing.assert_array_equal(scales.power_of_two(np.int32([-126, 0, 126])), np.float32([2.0**-126, 1, 2.0**126]))


def test_two_levels_of_scales_are_alike_in_numpy_and_jax():
    rng = np.random.default_rng(9)
    amax = np.float32(2) ** rng.uniform(-100, 100, 500).astype(np.float32)
    amax[:3] = 0, np.inf, 2.0**-120
    tensor = scales.tensor_scale(amax, 6.0, 448.0)
    assert tensor[:3].tolist() == [1, 1, np.finfo(np.float32).max] and tensor.dtype == np.float32
    np.testing.assert_allclose(tensor[3:] * amax[3:].astype(np.float64), 2688, rtol=2e-7)
    of_block = amax[3:] * np.float32(2.0) ** -rng.integers(0, 12, 497).astype(np.float32)
    for factor in (1.0, scales.FOUR_SIX):
        block = scales.block_scale(of_block, tensor[3:], 6.0, factor)
        np.testing.assert_allclose(block, 448 * factor * of_block.astype(np.float64) / amax[3:], rtol=1e-6)
        np.testing.assert_array_equal(scales.block_scale(of_block, tensor[3:], 6.0, factor, xp=jnp), block)
        in_this_order = np.float32(factor) * (of_block * (tensor[3:] * (np.float32(1) / np.float32(6))))
        np.testing.assert_array_equal(block, in_this_order)
    block[:5] = 0
    encode = scales.encode_scale(block, tensor[3:])
    assert not encode[:5].any() and np.all(encode[5:] > 0)
    np.testing.assert_array_equal(scales.encode_scale(block, tensor[3:], xp=jnp), encode)
    np.testing.assert_array_equal(scales.tensor_scale(amax, 6.0, 448.0, xp=jnp), tensor)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_blocks_are_those_of_a_float64_loop(name, axis):
    v = blocks(1).T if axis == 0 else blocks(1)
    for rule in MX_RULES:
        for block in ("1x32", "32x32", "1x128"):
            spec = SlotSpec(name, "E8M0", block, rule)
            assert_same(quantized(v, slot_of(spec), axis), reference.quantize(v, spec, axis))


@pytest.mark.parametrize("name", ["mxfp4_e2m1", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_mx_blocks_by_floor_are_gfloat_s(name):
    info = getattr(gfloat.formats, f"format_info_{name}")
    v = blocks(3)[:8]
    spec = SlotSpec(name.rpartition("_")[2].upper(), "E8M0", "1x32", "floor")
    ours = np.asarray(quantized(np.tile(v, (R // 8, 1)), slot_of(spec), 1))[:8].reshape(-1, 32)
    for block, got in zip(v.astype(np.float64).reshape(-1, 32), ours, strict=True):
        if np.any(block):
            np.testing.assert_array_equal(got, gfloat.quantize_block(info, block, gfloat.compute_scale_amax))


def nvfp4_by_casts(v, target=6.0, bound=448.0, four_six=False):
    """float32 values of 1x16 blocks along the last axis: Transformer Engine's order, and the dtypes of ml_dtypes."""
    f32, largest = np.float32, np.finfo(np.float32).max
    amax = np.abs(v).max()
    tensor = min(f32(bound) * f32(target) / amax, largest)
    grouped = v.reshape(-1, 16)
    unrounded = np.abs(grouped).max(1, keepdims=True) * (tensor * (f32(1) / f32(target)))

    def candidate(scale):
        block = scale.astype(ml_dtypes.float8_e4m3fn).astype(f32)
        with np.errstate(divide="ignore", over="ignore"):
            encode = np.where(block > 0, np.minimum(f32(1) / (block * (f32(1) / tensor)), largest), 0).astype(f32)
        q = np.clip(grouped * encode, f32(-6), f32(6)).astype(ml_dtypes.float4_e2m1fn).astype(f32)
        return q * block * (f32(1) / tensor)

    six = candidate(np.minimum(unrounded, f32(bound)))
    if four_six:
        four = candidate(f32(1.5) * unrounded)
        errors = [np.square(np.float64(c) - grouped).sum(1, keepdims=True) for c in (six, four)]
        six = np.where(errors[1] < errors[0], four, six)
    return six.reshape(v.shape)


@pytest.mark.parametrize("four_six", [False, True])
def test_nvfp4_is_that_of_casts(four_six):
    v = blocks(4, spread=12)  # down to scales that are subnormal and zero
    spec = SlotSpec("E2M1", "UE4M3", "1x16", "two_level", bound=256.0 if four_six else 448.0,
                    correction="four_six" if four_six else "none")  # fmt: skip
    got = np.asarray(quantized(v, slot_of(spec), 1))
    np.testing.assert_array_equal(got, nvfp4_by_casts(v, bound=spec.bound, four_six=four_six))
    assert_same(got, reference.quantize(v, spec, 1))
    scale = np.abs(v).reshape(-1, 16).max(1) / np.abs(v).max() * 448
    assert (scale < 2.0**-10).sum() > 10 and ((scale > 2.0**-9) & (scale < 2.0**-6)).sum() > 100


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("element, scale", [("E2M1", "UE4M3"), ("E1M2", "UE4M3"), ("E2M1", "UE5M3"), ("INT4", "UE4M3")])
def test_two_levels_are_the_reference(element, scale, axis):
    v = blocks(5, spread=5).T if axis == 0 else blocks(5, spread=5)
    for block in ("1x16", "16x16"):
        for more in ({}, {"correction": "four_six", "bound": 256.0}, {"rounding": "stochastic", "headroom": 16 / 17}):
            spec = SlotSpec(element, scale, block, "two_level", **more)
            seed = np.uint32([7, 8])
            assert_same(quantized(v, slot_of(spec, seed), axis), reference.quantize(v, spec, axis, seed))


def test_scales_per_row_and_tensor_are_the_reference():
    v = blocks(6, spread=9)
    for spec in (
        SlotSpec("E4M3", "float32", "rowwise", "float32"),
        SlotSpec("E5M2", "float32", "tensor", "float32"),
        SlotSpec("E4M3", "power_of_two", "rowwise"),
        SlotSpec("E4M3", "E8M0", "1x32", "floor", "stochastic"),
    ):
        assert_same(quantized(v, slot_of(spec, (3, 4)), 1), reference.quantize(v, spec, 1, (3, 4)))
    delayed = SlotSpec("E4M3", "float32", "tensor", "float32", amax="delayed")
    given = slot_of(delayed)._replace(given=np.float32(3.7))
    got = np.asarray(quantized(v, given, 1))
    assert_same(got, reference.quantize(v, delayed, 1, given=np.float32(3.7)))
    assert np.abs(got).max() == np.float32(448 * (np.float32(1) / (np.float32(448) / np.float32(3.7))))  # it clips


def test_what_is_zero_largest_or_not_finite():
    ones = np.ones((R, C), np.float32)
    for spec in (NV, SlotSpec("E4M3", "E8M0", "1x32", "floor"), SlotSpec("E2M1", "E8M0", "1x32", "rceil")):
        slot = slot_of(spec)
        assert not np.any(quantized(0 * ones, slot, 1))
        lone = 0 * ones
        lone[0, :2] = 1.0, 0.25
        assert_same(quantized(lone, slot, 1), lone)
        largest = ones * np.float32(2.0**127)
        assert_same(quantized(largest, slot, 1), reference.quantize(largest, spec, 1))
        tiny = ones * np.float32(2.0**-100)
        assert_same(quantized(tiny, slot, 1), reference.quantize(tiny, spec, 1))
        for bad in (np.nan, np.inf, -np.inf):
            broken = ones.copy()
            broken[2, 40] = bad
            got = np.asarray(quantized(broken, slot, 1))
            np.testing.assert_array_equal(got[2, 40], bad)
            spoiled = np.isnan(got) | np.isinf(got)
            # MX: the block of 32. Two levels: an infinite amax leaves no scale to any block but zero's.
            assert np.all(spoiled[2, 32:64]) if spec is not NV else np.all(spoiled[2, 32:48])
            if spec is not NV:
                assert spoiled.sum() == 32
            elif np.isnan(bad):
                assert spoiled.all()


def test_one_program_quantizes_by_every_spec():
    """Of each axis: the tests above compiled no more, whatever the format, the rule, the block and the rounding."""
    for axis in (0, 1):
        quantized(blocks(0) if axis else blocks(0).T, slot_of(NV), axis)
    TRACES.clear()
    for spec in {spec for recipe in RECIPES.values() for spec in recipe.slots}:
        quantized(blocks(0), slot_of(spec), 1)
    assert not TRACES


# The specs whose rounding is unbiased: stochastic, and nothing clips.
UNBIASED = [SlotSpec("E2M1", "UE4M3", "1x16", "two_level", "stochastic", headroom=16 / 17),
            SlotSpec("E2M1", "E8M0", "1x32", "floor", "stochastic", shrink=4 / 3),
            SlotSpec("E4M3", "E8M0", "1x32", "rceil", "stochastic")]  # fmt: skip


@pytest.mark.parametrize("spec", UNBIASED, ids=lambda spec: spec.rule + spec.element)
def test_stochastic_slots_are_unbiased(spec):
    n, v = 256, np.random.default_rng(8).standard_normal((R, C)).astype(np.float32)
    seeds = jax.vmap(lambda step: stochastic_seed(0, step, 0))(jnp.arange(n))
    total, square = np.zeros((R, C)), np.zeros((R, C))
    for seed in np.asarray(seeds):
        q = np.asarray(quantized(v, slot_of(spec, seed), 1), np.float64)
        total, square = total + q, square + q**2
    mean, variance = total / n, square / n - (total / n) ** 2
    loose = variance > 0.01 * variance.max()
    z = ((mean - v) / np.sqrt(np.where(loose, variance, 1) / n))[loose]
    assert (
        loose.sum() > 10_000 and abs(z.mean()) < 5 / np.sqrt(z.size) and np.abs(z).max() < 6 and abs(z.std() - 1) < 0.1
    )
    clipped = slot_of(SlotSpec("E2M1", "E8M0", "1x32", "floor", "stochastic"))  # without the factor it is biased
    assert np.sum(np.asarray(quantized(v, clipped, 1)) * v) / np.sum(v * v) < 0.999
