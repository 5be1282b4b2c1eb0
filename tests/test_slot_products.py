"""The three products of named recipes against float64, today's shared scheme to the bit, one program, statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import recipe_reference as reference
from altgrad_jax.numerics import slot_statistics
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.products import Operand, Operands, Rule, quant_dot
from altgrad_jax.numerics.recipes import RECIPES, SLOTS, Recipe, SlotSpec, get_recipe
from altgrad_jax.numerics.rounding import format_params, stochastic_seed
from altgrad_jax.numerics.slot_quantization import Features, rotate
from altgrad_jax.numerics.slots import (
    BACKWARD,
    FORWARD,
    at,
    empty_statistics,
    features_of,
    named_slot_statistics,
    redraw,
    slot_dot,
    slots_of,
)
from altgrad_jax.numerics.sums import combine

M, K, N = 128, 256, 128
NAMED = {name: slots_of(recipe) for name, recipe in RECIPES.items()}
UNION = features_of(list(NAMED.values()))
SEED = np.uint32([11, 12])
TRACES = []


def matrices(seed=0):
    """x, w [K, N], g whose rows and columns have very different sizes."""
    rng = np.random.default_rng(seed)

    def matrix(rows, columns, size):
        spread = 2.0 ** (rng.uniform(-3, 3, (rows, 1)) + rng.uniform(-3, 3, (1, columns)))
        return (rng.standard_normal((rows, columns)) * spread * size).astype(np.float32)

    return matrix(M, K, 1), matrix(K, N, 0.02), matrix(M, N, 1e-4)


@partial(jax.jit, static_argnames=("features", "w_is_NK", "dtype"))
def products(x, w_KN, g, slots, features, w_is_NK=False, dtype="bfloat16"):
    """y, dx, dw [K, N], and the statistics of FORWARD and BACKWARD."""
    TRACES.append(w_is_NK)
    probe = empty_statistics() if features[0].statistics else None

    def layer(x, w, probe):
        return slot_dot(x, w, slots, features, probe, w_is_NK, dtype)

    y, vjp, forward = jax.vjp(layer, x, w_KN.T if w_is_NK else w_KN, probe, has_aux=True)
    dx, dw, backward = vjp(g)
    return y, dx, dw.T if w_is_NK else dw, forward, backward


drawn = jax.jit(redraw)
rotated = jax.jit(partial(rotate, size=128), static_argnames="axis")


def reference_operands(x, w, g, recipe, slots):
    slots = jax.tree.map(np.asarray, slots)

    def turn(v, i, axis):
        return np.asarray(rotated(v, at(slots, i), axis=axis))

    return reference.operands(x, w, g, recipe, slots.seed, turn, slots.given)


def assert_products(got, operands):
    """Up to float32 accumulation of exact operands: a small multiple of the sum's largest rounding."""
    xf, wf, gd, wd, xw, gw = operands
    for name, y, a, b in zip(("fprop", "dgrad", "wgrad"), got, (xf, gd, xw.T), (wf, wd.T, gw), strict=False):
        assert y.dtype == jnp.float32
        bound = 2.0**-20 * (np.abs(a) @ np.abs(b)) + 2.0**-149
        assert (np.abs(np.asarray(y, np.float64) - a @ b) / bound).max() < 1, name


@pytest.mark.parametrize("name", RECIPES)
def test_the_products_are_those_of_the_reference(name):
    x, w, g = matrices()
    slots = NAMED[name]
    if name == "te_delayed":  # amaxes of earlier steps: x clips, g does not fill its range
        amaxes = [np.abs(v).max() * factor for v, factor in ((x, 0.5), (w, 1), (g, 3), (w, 1), (x, 0.5), (g, 3))]
        slots = slots._replace(given=np.float32(amaxes))
    slots = drawn(slots, SEED)
    operands = reference_operands(x, w, g, RECIPES[name], slots)
    assert_products(products(x, w, g, slots, UNION), operands)
    # The comparison would see a single element that went to the wrong neighbour.
    operands[0] = operands[0].copy()
    operands[0][3, 5] *= 1.05
    with pytest.raises(AssertionError, match="fprop"):
        assert_products(products(x, w, g, slots, UNION), operands)


def test_one_program_computes_every_recipe():
    x, w, g = matrices()
    products(x, w, g, drawn(NAMED["bf16"], SEED), UNION)
    TRACES.clear()
    for slots in NAMED.values():
        products(x, w, g, drawn(slots, SEED), UNION)
    assert not TRACES and hash(UNION) == hash(features_of(list(NAMED.values())))


SMALL = ("nvfp4", "mxfp8", "deepseek_v3")


def test_a_weight_with_its_outputs_first_gives_the_same():
    x, w, g = matrices(1)
    features = features_of([NAMED[name] for name in SMALL])
    for name in SMALL:
        slots = drawn(NAMED[name], SEED)
        operands = reference_operands(x, w, g, RECIPES[name], slots)
        assert_products(products(x, w, g, slots, features, w_is_NK=True), operands)


def test_without_lazy_branches_and_in_float32():
    x, w, g = matrices(2)
    features = features_of([NAMED["quartet_2"]], lazy=False)
    slots = drawn(NAMED["quartet_2"], SEED)
    operands = reference_operands(x, w, g, RECIPES["quartet_2"], slots)
    assert_products(products(x, w, g, slots, features, dtype="float32"), operands)


def shared(fmt_w, fmt_a, fmt_g, scale, block, rule, rounding="nearest"):
    """Today's scheme as a recipe: every tensor is rounded once and used twice."""
    w, a, g = (SlotSpec(fmt, scale, block, rule, rounding) for fmt in (fmt_w, fmt_a, fmt_g))
    again = [SlotSpec(s.element, scale, block, rule, rounding, source="shared") for s in (w, a, g)]
    return Recipe("shared", a, w, g, *again)


TODAY = [("current", "power_of_two", "tensor", "rceil", True), ("rowwise", "power_of_two", "rowwise", "rceil", True),
         ("1x32", "E8M0", "1x32", "rceil", True), ("1x128", "power_of_two", "1x128", "rceil", True),
         ("current", "float32", "tensor", "float32", False)]  # fmt: skip
TODAY_UNION = features_of(
    [
        slots_of(shared("E4M3", "E4M3", "E5M2", *choice[1:4], rounding))
        for choice in TODAY
        for rounding in ("nearest", "stochastic")
    ]
)


@partial(jax.jit, static_argnames="rule")
def today(x, w, g, operands, rule):
    y, vjp, _ = jax.vjp(lambda x, w: quant_dot(x, w, operands=operands, rule=rule), x, w, has_aux=True)
    return y, *vjp(g)


@pytest.mark.parametrize("scaling, scale, block, rule, power_of_two", TODAY)
def test_today_s_shared_scheme_is_a_member_to_the_bit(scaling, scale, block, rule, power_of_two):
    x, w, g = matrices(3)
    for names, rounding in ((("E4M3", "E3M4", "E5M2"), "nearest"), (("E5M2", "E4M3", "E6M1"), "stochastic")):
        seeds = [np.asarray(stochastic_seed(1, 2, i)) if rounding == "stochastic" else None for i in range(3)]
        operands = Operands(*(Operand(format_params(get_format(n)), 0.0, seed) for n, seed in zip(names, seeds)))
        want = today(x, w, g, operands, Rule(scaling, scaling, scaling, power_of_two=power_of_two))
        slots = slots_of(shared(*names, scale, block, rule, rounding))
        if rounding == "stochastic":
            slots = slots._replace(seed=np.stack([seeds[i] for i in (1, 0, 2, 0, 1, 2)]))
        for a, b in zip(products(x, w, g, slots, TODAY_UNION), want, strict=False):
            np.testing.assert_array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


def test_signs_and_keys_of_a_step():
    nvfp4 = drawn(NAMED["nvfp4_redrawn"], SEED)
    other = drawn(NAMED["nvfp4_redrawn"], SEED + 1)
    assert len({tuple(seed) for seed in np.asarray(nvfp4.seed)}) == 6 and not np.any(nvfp4.seed == other.seed)
    np.testing.assert_array_equal(nvfp4.signs[4], nvfp4.signs[5])  # both operands of a product
    assert np.any(nvfp4.signs[4] != other.signs[4])
    np.testing.assert_array_equal(drawn(NAMED["nvfp4"], SEED).signs, NAMED["nvfp4"].signs)


STATISTICAL = ("nvfp4", "mxfp8_floor", "te_current")
MEASURED = features_of([NAMED[name] for name in STATISTICAL], statistics=True)
UNMEASURED = features_of([NAMED[name] for name in STATISTICAL])


def measured(name, x, w, g):
    slots = drawn(NAMED[name], SEED)
    y, dx, dw, forward, backward = products(x, w, g, slots, MEASURED)
    return slots, (y, dx, dw), forward, backward


@pytest.mark.parametrize("name", STATISTICAL)
def test_statistics_are_those_of_float64_and_change_nothing(name):
    x, w, g = matrices(4)
    x[:, 32:48] = 0
    slots, got, forward, backward = measured(name, x, w, g)
    for a, b in zip(got, products(x, w, g, slots, UNMEASURED), strict=False):
        np.testing.assert_array_equal(a, b)
    assert forward.shape == backward.shape == (3, len(slot_statistics.FIELDS))
    found = named_slot_statistics(forward, backward)
    assert tuple(found) == SLOTS
    operands = reference_operands(x, w, g, RECIPES[name], slots)
    tensors, axes = (x, w, g, w, x, g), (1, 0, 1, 1, 0, 0)
    for i, (slot, q) in enumerate(zip(SLOTS, operands, strict=True)):
        spec, v, stats = RECIPES[name].slots[i], tensors[i], {k: np.asarray(s) for k, s in found[slot].items()}
        if spec.rotation:
            v = np.asarray(rotated(v, at(jax.tree.map(np.asarray, slots), i), axis=axes[i]))
        v = v.astype(np.float64)
        assert stats["amax"] == np.float32(np.abs(v).max())
        assert stats["underflow"] == pytest.approx(np.mean((q == 0) & (v != 0)), abs=1e-7)
        assert stats["shrinkage"] == pytest.approx(1 - (v * q).sum() / (v * v).sum(), abs=1e-6)
        assert stats["sqnr_db"] == pytest.approx(10 * np.log10((v**2).sum() / ((q - v) ** 2).sum()), abs=1e-3)
        assert stats["kurtosis"] == pytest.approx(np.mean(v**4) / np.mean(v**2) ** 2, rel=1e-4)
        if i < 3:
            assert np.isnan(stats["copy_distance"])
        elif spec.source == "shared":
            assert stats["copy_distance"] == 0
        else:
            first = operands[{3: 1, 4: 0, 5: 2}[i]]
            again = reference_unrotated(q, slots, i, axes[i]) if spec.rotation else q
            assert stats["copy_distance"] == pytest.approx(((again - first) ** 2).sum() / (v**2).sum(), rel=1e-3)


def reference_unrotated(q, slots, i, axis):
    matrix = np.asarray(jax.jit(rotate, static_argnames=("axis", "size"))(np.eye(128, dtype=np.float32), at(slots, i),
                                                                         axis=1, size=128), np.float64)  # fmt: skip
    blocks = np.kron(np.eye(q.shape[axis] // 128), matrix)
    return q @ blocks.T if axis == 1 else blocks @ q


def test_statistics_of_scales():
    """Of MX by floor, whose scales are powers of two and some amaxes clipped; of NVFP4, some of which are zero."""
    x, w, g = matrices(5)
    x[:, 32:64] = 0
    x[7] *= 1e-6
    mx, nv = (named_slot_statistics(measured(name, x, w, g)[2])["fprop.x"] for name in ("mxfp8_floor", "nvfp4"))
    amax = np.abs(x).reshape(M, -1, 32).max(-1).astype(np.float64)
    exponent = reference.exponent(amax, 448.0, get_format("E4M3"), "floor")
    assert mx["zero_scale"] == 0 and mx["clipped"] == pytest.approx(np.mean(amax > 448 * 2.0**exponent))
    assert (
        0 < mx["clipped"] < 0.5
        and mx["decode_scale_log2_min"] == -126
        and mx["decode_scale_log2_max"] == exponent.max()
    )
    assert mx["decode_scale_log2_mean"] == pytest.approx(exponent.mean(), rel=1e-5)
    assert mx["decode_scale_log2_std"] == pytest.approx(exponent.std(), rel=1e-3)
    want = np.bincount(np.minimum(exponent.max() - exponent, 15).ravel(), minlength=16) / exponent.size
    np.testing.assert_allclose(mx["scale_histogram"], want, atol=1e-6)
    q = reference.quantize(x, RECIPES["mxfp8_floor"].fprop_x, 1).reshape(M, -1, 32)
    assert mx["top_code"] == pytest.approx(np.mean(np.abs(q) == 448 * 2.0 ** exponent[..., None]), abs=1e-7)

    amax = np.abs(x).reshape(M, -1, 16).max(-1)
    zero = amax / np.abs(x).max() * 448 < 2.0**-10
    assert nv["zero_scale"] == pytest.approx(zero.mean()) and zero.mean() > 2 / 16
    assert nv["scale_histogram"].sum() == pytest.approx(1) and nv["scale_histogram"].shape == (16,)


def test_statistics_of_a_slot_that_is_not_quantized_and_of_two_micro_batches():
    x, w, g = matrices(6)
    slots = jax.tree.map(np.array, NAMED["nvfp4"])
    slots.high[[0, 1, 3]] = True
    slots.source[3] = 0
    stats = named_slot_statistics(products(x, w, g, slots, MEASURED)[3])["fprop.x"]
    assert all(np.isnan(stats[name]) for name in ("zero_scale", "clipped", "decode_scale_log2_mean", "top_code"))
    assert 50 < stats["sqnr_db"] < 60 and stats["underflow"] == 0  # bfloat16's

    # Blocks lie within rows, so two micro-batches together are quantized as one batch of both.
    parts = [matrices(seed)[0] for seed in (6, 7)]
    vectors = [measured("mxfp8_floor", part, w, g)[2] for part in parts]
    both = named_slot_statistics(combine(slot_statistics.FIELDS, *vectors))["fprop.x"]
    alone = [named_slot_statistics(vector)["fprop.x"] for vector in vectors]
    v = np.concatenate(parts).astype(np.float64)
    q = reference.quantize(np.concatenate(parts), RECIPES["mxfp8_floor"].fprop_x, 1)
    assert both["amax"] == np.abs(v).max() and both["underflow"] == pytest.approx(np.mean((q == 0) & (v != 0)))
    assert both["sqnr_db"] == pytest.approx(10 * np.log10((v**2).sum() / ((q - v) ** 2).sum()), abs=1e-3)
    assert both["shrinkage"] == pytest.approx(1 - (v * q).sum() / (v * v).sum(), abs=1e-6)
    for name, of_both in (
        ("decode_scale_log2_min", min),
        ("decode_scale_log2_max", max),
        ("clipped", np.mean),
        ("kurtosis", np.mean),
    ):
        assert both[name] == pytest.approx(of_both([float(stats[name]) for stats in alone]), rel=1e-6), name
    np.testing.assert_array_equal(combine(slot_statistics.FIELDS, empty_statistics(), vectors[0]), vectors[0])


def test_what_is_refused():
    x, w, _ = matrices()
    with pytest.raises(UserError, match="g_probe asks for statistics that this program does not compute"):
        slot_dot(x, w, NAMED["mxfp8"], UNMEASURED, empty_statistics())
    with pytest.raises(ValueError, match="has 40 elements: give a multiple of 16"):
        slot_dot(x[:, :40], w[:40], NAMED["mxfp8"], UNMEASURED)


def test_features_are_what_the_recipes_ask():
    bf16, nvfp4 = (features_of([NAMED[name]]) for name in ("bf16", "nvfp4"))
    assert bf16[0] == Features((0,), (0,), ("power_of_two",), False, False, False, False, False, 0)
    assert nvfp4[0].kinds == ("two_level",) and UNION[0].kinds == ("power_of_two", "float32", "two_level")
    assert nvfp4[3].shared and not nvfp4[1].shared and nvfp4[4].rotation == 16 and nvfp4[1].across == (16,)
    assert [f.stochastic for f in nvfp4] == [False, False, True, False, False, True]
    assert UNION[0].tiles and UNION[0].along == (16, 32, 128, 0) and UNION[4].rotation == 128
    assert not features_of([NAMED["deepseek_pow2"]])[0].tiles
    layers = jax.tree.map(lambda a, b: np.stack([a, b]), NAMED["bf16"], NAMED["nvfp4"])
    assert features_of([layers]) == nvfp4
    assert FORWARD + BACKWARD == (0, 1, 4, 2, 3, 5) and get_recipe("nvfp4") is RECIPES["nvfp4"]
