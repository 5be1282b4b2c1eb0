"""The products of quantized operands, their scales and their statistics, held to NumPy in float64."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import histograms
from altgrad_jax.numerics import products as module
from altgrad_jax.numerics.formats import DEFAULT_8BIT, decode, encode, get_format, round_reference
from altgrad_jax.numerics.products import (
    FIELDS,
    SCALINGS,
    Operand,
    Operands,
    Rule,
    combine_statistics,
    delayed_scale,
    empty_statistics,
    named_statistics,
    push_amax,
    quant_dot,
    weight_gradient,
)
from altgrad_jax.numerics.rounding import format_params, stochastic_seed

M, K, N = 8, 256, 384
# What a caller might have kept from earlier steps: too large a scale for W (it clips), fitting for A, small for G.
GIVEN = {"w": 4.0, "a": 0.5, "g": 0.25}


def given_scale(fmt, operand):
    return np.float32(GIVEN[operand] * 2.0 ** np.floor(np.log2(min(fmt.max_finite, 2.0**16))))


def matrices(seed=0):
    """x, w [K, N], g: rows and columns of very different sizes, so that every scaling gives its own result."""
    rng = np.random.default_rng(seed)

    def matrix(rows, columns):
        spread = 2.0 ** (rng.uniform(-4, 0, (rows, 1)) + rng.uniform(-4, 0, (1, columns)))
        return (rng.standard_normal((rows, columns)) * spread).astype(np.float32)

    w_KN = matrix(K, N)
    w_KN[::7, ::5] = 0
    return matrix(M, K), w_KN, matrix(M, N)


def reference_scale(amax, fmt):
    """The largest power of two s with amax * s <= min(largest finite, 2^16), searched for."""
    target, s = min(fmt.max_finite, 2.0**16), 1.0
    if not 0 < amax < np.inf:
        return s
    while amax * s <= target:
        s *= 2
    while amax * s > target:
        s /= 2
    return s


def reference_quantize(v, fmt, scaling, axis, given=0.0):
    """(q, statistics by field) in float64. `axis`: the contracted one."""
    v = v.astype(np.float64)
    if scaling == "none" or scaling == "delayed" and given > 0:
        s = np.full_like(v, 1.0 if scaling == "none" else given)
        exposed = v.size
    else:
        size = {"rowwise": v.shape[axis], "1x32": 32, "1x128": 128}.get(scaling)
        exposed = 0
        lines = np.abs(np.moveaxis(v, axis, 0))
        s = np.empty_like(lines)
        if size:
            for start in range(0, len(lines), size):
                s[start : start + size] = [reference_scale(a, fmt) for a in lines[start : start + size].max(0)]
        else:
            s[:] = reference_scale(lines.max(), fmt)
        s = np.moveaxis(s, 0, axis)
    q = round_reference(fmt, v * s) / s
    clipped = np.clip(v, -fmt.max_finite / s, fmt.max_finite / s)
    size = np.abs(v)
    return q, {
        "amax": size.max(), "scale": s.min(), "smallest": size[size > 0].min(), "count": v.size, "exposed": exposed,
        "clipped": (size > fmt.max_finite / s).sum(), "flushed": ((v != 0) & (q == 0)).sum(),
        "signal": (v**2).sum(), "noise": ((q - v) ** 2).sum(), "excess": ((v - clipped) ** 2).sum(),
    }  # fmt: skip


def bfloat16(v):
    return v.astype(ml_dtypes.bfloat16).astype(np.float64)


def assert_product(got, a, b):
    """got is a @ b up to float32 accumulation of exact operands: a small multiple of the sum's largest rounding."""
    assert got.dtype == jnp.float32
    assert product_error(got, a, b) < 1


def product_error(got, a, b):
    bound = 2.0**-21 * (np.abs(a) @ np.abs(b)) + 2.0**-149
    return (np.abs(np.asarray(got, np.float64) - a @ b) / bound).max()


TRACES = []


def products(x, w_KN, g, operands, rule, w_is_NK=False):
    """y, dx, dw [K, N], statistics of (W, A, G)."""
    TRACES.append((rule, w_is_NK))
    w = w_KN.T if w_is_NK else w_KN
    probe = None if operands.g is None else empty_statistics()

    def layer(x, w, probe):
        return quant_dot(x, w, w_is_NK=w_is_NK, operands=operands, rule=rule, g_probe=probe)

    y, vjp, stats = jax.vjp(layer, x, w, probe, has_aux=True)
    dx, dw, g_stats = vjp(g)
    return y, dx, dw.T if w_is_NK else dw, (stats.w, stats.a, g_stats)


compiled = jax.jit(products, static_argnames=("rule", "w_is_NK"))


def same_for_all(fmt, scaled=True):
    scales = {name: given_scale(fmt, name) if scaled else np.float32(0) for name in "wag"}
    return Operands(**{name: Operand(format_params(fmt), scale) for name, scale in scales.items()})


def assert_statistics(got_S, want):
    got = dict(zip(FIELDS, np.asarray(got_S), strict=True))
    for field in ("amax", "scale", "smallest", "count", "exposed", "clipped", "flushed"):
        assert got[field] == np.float32(want[field]), field
    for field in ("signal", "noise", "excess"):
        np.testing.assert_allclose(got[field], want[field], rtol=1e-5, err_msg=field)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("w_is_NK", [False, True])
def test_products_and_statistics_of_all_formats_from_one_program(scaling, w_is_NK):
    x, w, g = matrices()
    rule = Rule(scaling, scaling, scaling)
    n_traces = len(TRACES)
    for name in DEFAULT_8BIT:
        fmt = get_format(name)
        operands = same_for_all(fmt)
        y, dx, dw, stats = compiled(x, w, g, operands, rule, w_is_NK)
        (qw, w_stats), (qx, a_stats), (qg, g_stats) = (
            reference_quantize(v, fmt, scaling, axis, operand.scale)
            for v, axis, operand in zip((w, x, g), (0, 1, 1), operands)
        )
        assert_product(y, qx, qw)
        assert_product(dx, qg, qw.T)
        assert_product(dw, qx.T, qg)
        for got, want in zip(stats, (w_stats, a_stats, g_stats)):
            assert_statistics(got, want)
    assert len(TRACES) <= n_traces + 1


def test_the_bound_tells_quantized_operands_from_others_in_every_product():
    """Backward products of unquantized operands, of either kind, are not within the bound that the others keep."""
    x, w, g = matrices()
    for name in DEFAULT_8BIT:
        fmt = get_format(name)
        _, dx, dw, _ = compiled(x, w, g, same_for_all(fmt), Rule("current", "current", "current"))
        qw, qx, qg = (reference_quantize(v, fmt, "current", 1)[0] for v in (w, x, g))
        assert product_error(dx, qg, qw.T) < 1 < 100 < product_error(dx, qg, bfloat16(w).T)
        assert product_error(dw, qx.T, qg) < 1 < 100 < product_error(dw, bfloat16(x).T, qg)
        assert 100 < product_error(dx, bfloat16(g), qw.T)


def test_the_scalings_differ():
    x, w, g = matrices()
    fmt = get_format("E2M5")
    results = [np.asarray(compiled(x, w, g, same_for_all(fmt), Rule(*[s] * 3))[0]) for s in SCALINGS]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one != other).any()


def test_each_operand_has_its_own_format_and_scaling_or_none():
    x, w, g = matrices()
    formats = {"w": get_format("E3M4"), "a": get_format("E4M3"), "g": get_format("E5M2")}
    rules = {"w": "rowwise", "a": "1x32", "g": "current"}
    for present in ("w", "a", "g", "wa", "wag"):
        operands = Operands(**{name: Operand(format_params(formats[name])) for name in present})
        y, dx, dw, stats = compiled(x, w, g, operands, Rule(**rules))
        q = {
            name: reference_quantize(v, formats[name], rules[name], axis)[0] if name in present else bfloat16(v)
            for name, v, axis in (("w", w, 0), ("a", x, 1), ("g", g, 1))
        }
        assert_product(y, q["a"], q["w"])
        assert_product(dx, q["g"], q["w"].T)
        assert_product(dw, q["a"].T, q["g"])
        assert [s is not None for s in stats] == [name in present for name in "wag"]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_bfloat16_as_a_traced_format_is_the_path_without_formats_bit_for_bit(scaling):
    x, w, g = matrices()
    bf16 = get_format("E8M7")
    operands = Operands(*(Operand(format_params(bf16, saturate=False), given_scale(bf16, name)) for name in "wag"))
    traced = compiled(x, w, g, operands, Rule(*[scaling] * 3))
    y, vjp = jax.jit(lambda x, w: jax.vjp(quant_dot, x, w))(x, w)
    for got, want in zip(traced, (y, *jax.jit(vjp)(g))):
        np.testing.assert_array_equal(np.asarray(got).view(np.int32), np.asarray(want).view(np.int32))


def test_e1m6_is_e0m7():
    x, w, g = matrices()
    for scaling in set(SCALINGS) - {"none"}:
        one, other = (
            compiled(x, w, g, same_for_all(get_format(name), scaled=False), Rule(*[scaling] * 3))
            for name in ("E0M7", "E1M6")
        )
        for a, b in zip(one[:3], other[:3]):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["FP16", "E4M11", "E7M8", "E0M15"])
def test_wide_formats_take_float32_operands(name):
    x, w, g = matrices()
    fmt = get_format(name)
    operands = Operands(w=Operand(format_params(fmt)), g=Operand(format_params(fmt)))
    y, dx, dw, _ = compiled(x, w, g, operands, Rule("current", "current", "current", float32_operands=True))
    qw, qx, qg = reference_quantize(w, fmt, "current", 0)[0], bfloat16(x), reference_quantize(g, fmt, "current", 1)[0]
    assert_product(y, qx, qw)
    assert_product(dx, qg, qw.T)
    assert_product(dw, qx.T, qg)
    with pytest.raises(UserError, match="float32_operands=True"):
        products(x, w, g, operands, Rule())


def test_delayed_scaling_clips_and_says_how_much():
    x, w, g = matrices()
    fmt = get_format("E4M3")
    before = np.float32([0, np.abs(x).max() / 8, 0])  # activations have grown eightfold
    scale = delayed_scale(before, format_params(fmt))
    operands = Operands(a=Operand(format_params(fmt), scale))
    y, _, _, (_, a_stats, _) = compiled(x, w, g, operands, Rule())
    limit = fmt.max_finite / float(scale)
    assert_product(y, reference_quantize(x, fmt, "delayed", 1, float(scale))[0], bfloat16(w))
    named = named_statistics(a_stats)
    share = (np.abs(x) > limit).mean()
    assert 0 < share < 1
    np.testing.assert_allclose(named["overflow"], share, rtol=1e-6)
    energy = np.square(np.maximum(np.abs(x) - limit, 0), dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum()
    np.testing.assert_allclose(named["clipped_energy"], energy, rtol=1e-5)


def test_delayed_scaling_without_a_history_takes_the_current_amax():
    x, w, g = matrices()
    operands = same_for_all(get_format("E5M2"), scaled=False)
    results = (compiled(x, w, g, operands, rule)[:3] for rule in (Rule(), Rule(*["current"] * 3)))
    for got, want in zip(*results):
        np.testing.assert_array_equal(got, want)
    assert delayed_scale(np.zeros(3, np.float32), operands.w.format) == 0


def test_history():
    history_H = np.float32([3, 1, 2])
    np.testing.assert_array_equal(push_amax(history_H, jnp.float32(0.5)), [1, 2, 0.5])
    for amax in (np.inf, np.nan):
        np.testing.assert_array_equal(push_amax(history_H, jnp.float32(amax)), history_H)
    params = format_params(get_format("E4M3"))
    assert delayed_scale(history_H, params) == 128  # 448 / 3 = 149
    many = delayed_scale(np.stack([history_H, history_H * 4, history_H * 0]), params)
    np.testing.assert_array_equal(many, [128, 32, 0])


def test_named_statistics():
    x, w, g = matrices()
    fmt = get_format("E3M4")
    _, _, _, stats = compiled(x, w, g, same_for_all(fmt), Rule("delayed", "current", "none"))
    w_named, a_named, g_named = (named_statistics(s) for s in stats)
    qx = reference_quantize(x, fmt, "current", 1)[0]
    x, g = x.astype(np.float64), g.astype(np.float64)
    assert np.isnan(a_named["overflow"]) and not np.isnan(w_named["overflow"]) and g_named["overflow"] == 0
    np.testing.assert_allclose(a_named["sqnr_db"], 10 * np.log10((x**2).sum() / ((qx - x) ** 2).sum()), rtol=1e-5)
    np.testing.assert_allclose(a_named["dynamic_range"], np.log2(np.abs(x).max() / np.abs(x).min()), rtol=1e-5)
    np.testing.assert_allclose(g_named["underflow"], ((g != 0) & (round_reference(fmt, g) == 0)).mean(), rtol=1e-6)
    assert g_named["encode_scale"] == 1 and a_named["amax"] == np.float32(np.abs(x).max())


def test_zeros_and_non_finite_values():
    x, w, g = matrices()
    fmt = get_format("E4M3")
    for scaling in SCALINGS:
        rule = Rule(*[scaling] * 3)
        y, dx, dw, (_, a_stats, _) = compiled(x * 0, w, g, same_for_all(fmt), rule)
        assert not np.any(y) and not np.any(dw) and np.isfinite(dx).all()
        assert dict(zip(FIELDS, a_stats))["flushed"] == 0
        for bad in (np.inf, np.nan):
            spoilt = x.copy()
            spoilt[3, 5] = bad
            y, _, _, (_, a_stats, _) = compiled(spoilt, np.abs(w) + 1, g, same_for_all(fmt), rule)
            finite = np.isfinite(np.asarray(y)).all(-1)
            assert not finite[3] and finite.sum() == M - 1  # seen, where the baseline shows it
            assert not np.isfinite(a_stats[0])


def test_clipped_values_keep_their_gradient_and_statistics_have_none():
    x, w, g = matrices()
    operands = same_for_all(get_format("E4M3"))
    operands = operands._replace(a=operands.a._replace(scale=np.float32(2.0**20)))
    assert named_statistics(compiled(x, w, g, operands, Rule())[3][1])["overflow"] > 0.5

    @jax.jit
    @jax.grad
    def gradient(x, weight):
        y, stats = quant_dot(x, w, operands=operands)
        return jnp.sum(y * g) + weight * (jnp.sum(stats.w) + jnp.sum(stats.a))

    got = gradient(x, 0.0)
    np.testing.assert_array_equal(got, gradient(x, 1.0))
    assert np.count_nonzero(got) == got.size


def micro_batch_loss(w, probe, x, target, operands):
    y, stats = quant_dot(x, w, operands=operands, g_probe=probe)
    return 0.5 * jnp.sum(jnp.square(y - target)), stats


def test_statistics_of_micro_batches_combine_to_those_of_the_batch():
    x, w, target = matrices()
    operands = same_for_all(get_format("E3M4"))
    operands = operands._replace(g=operands.g._replace(scale=np.float32(8)))  # G clips
    gradient = jax.jit(jax.value_and_grad(micro_batch_loss, argnums=(0, 1), has_aux=True))

    @jax.jit
    def accumulated(w, x, target, operands):
        def body(carry, batch):
            dw, a_stats, g_stats = carry
            (_, stats), (dw_part, g_part) = gradient(w, empty_statistics(), *batch, operands)
            return (dw + dw_part, combine_statistics(a_stats, stats.a), combine_statistics(g_stats, g_part)), None

        start = (jnp.zeros_like(w), jnp.asarray(empty_statistics()), jnp.asarray(empty_statistics()))
        return lax.scan(body, start, (x.reshape(4, 2, K), target.reshape(4, 2, N)))[0]

    dw, a_stats, g_stats = accumulated(w, x, target, operands)
    (_, stats), (whole_dw, whole_g) = gradient(w, empty_statistics(), x, target, operands)
    np.testing.assert_allclose(dw, whole_dw, rtol=0, atol=1e-5 * np.abs(whole_dw).max())
    fmt = get_format("E3M4")
    assert_statistics(a_stats, reference_quantize(x, fmt, "delayed", 1, operands.a.scale)[1])
    np.testing.assert_allclose(a_stats, stats.a, rtol=1e-5)
    np.testing.assert_allclose(g_stats, whole_g, rtol=1e-5)
    assert g_stats[list(FIELDS).index("clipped")] > 0


def test_layers_under_scan_have_a_probe_each():
    x, w, target = matrices()
    layers = np.stack([w[:, :K], w[:, -K:]]) / 4
    operands = same_for_all(get_format("E4M3"), scaled=False)

    def scanned(layers, probes):
        def body(h, layer):
            w, probe = layer
            h, stats = quant_dot(h, w, operands=operands, g_probe=probe)
            return jax.nn.gelu(h), stats

        h, stats = lax.scan(body, x, (layers, probes))
        return jnp.sum(h * target[:, :K]), stats

    def unrolled(layers, probes):
        h, stats = x, []
        for i in range(2):
            h, layer_stats = quant_dot(h, layers[i], operands=operands, g_probe=probes[i])
            h = jax.nn.gelu(h)
            stats.append(layer_stats)
        return jnp.sum(h * target[:, :K]), jax.tree.map(lambda *s: jnp.stack(s), *stats)

    probes = np.stack([empty_statistics()] * 2)
    (grads, stats), (want_grads, want_stats) = (
        jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(layers, probes) for f in (scanned, unrolled)
    )
    for got, want in zip(jax.tree.leaves((grads, stats)), jax.tree.leaves((want_grads, want_stats))):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert (grads[1][0] != grads[1][1]).any() and (grads[1][:, 0] > 0).all()


def test_combining_with_nothing_changes_nothing():
    _, _, _, stats = compiled(*matrices(), same_for_all(get_format("E5M2")), Rule())
    both = combine_statistics(jnp.stack(stats[:2]), empty_statistics()[None])
    np.testing.assert_array_equal(both, jnp.stack(stats[:2]))


@pytest.mark.parametrize("scaling", ["delayed", "rowwise", "1x32"])
def test_formats_and_scales_under_vmap(scaling):
    x, w, g = matrices()
    members = [same_for_all(get_format(name)) for name in DEFAULT_8BIT]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    run = partial(compiled, x, w, g, rule=Rule(*[scaling] * 3))
    together = jax.jit(jax.vmap(lambda operands: run(operands=operands)))(stacked)
    for i, operands in enumerate(members):
        for got, want in zip(jax.tree.leaves(together), jax.tree.leaves(run(operands=operands))):
            np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-5)


def test_errors_name_the_fix():
    x, w, g = matrices()
    operands = same_for_all(get_format("E4M3"))
    with pytest.raises(UserError, match="no scaling 'row' for A: give one of delayed, current"):
        Rule(a="row")
    with pytest.raises(UserError, match="1x128 cannot scale operand G, .* 64 elements: .* multiples of 128"):
        compiled(x, w[:, :64], g[:, :64], operands, Rule(g="1x128"))
    with pytest.raises(UserError, match="g_probe"):
        quant_dot(x, w, operands=Operands(), g_probe=empty_statistics())


# The program without formats, word for word but for the weight gradient, which has tests of its own: the reference of
# every comparison may not move.
def _product(a, b, contract_a, contract_b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((contract_a,), (contract_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _plain_dot(x_MK, w, w_is_NK, compute_dtype):
    return _forward(x_MK, w, w_is_NK, compute_dtype)[0]


def _forward(x_MK, w, w_is_NK, compute_dtype):
    x_MK, w = x_MK.astype(compute_dtype), w.astype(compute_dtype)
    return _product(x_MK, w, 1, 1 if w_is_NK else 0), (x_MK, w)


def _backward(w_is_NK, compute_dtype, operands, g_MN):
    x_MK, w = operands
    g_MN = g_MN.astype(compute_dtype)
    dx_MK = _product(g_MN, w, 1, 0 if w_is_NK else 1)
    return dx_MK, weight_gradient(x_MK, g_MN, w_is_NK)


_plain_dot.defvjp(_forward, _backward)


def before(x, w, *, w_is_NK=False, compute_dtype=jnp.bfloat16):
    y_MN = _plain_dot(x.reshape(-1, x.shape[-1]), w, w_is_NK, jnp.dtype(compute_dtype))
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])


@pytest.mark.parametrize("w_is_NK", [False, True])
@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_without_formats_the_program_is_what_it_was(w_is_NK, compute_dtype):
    x, w, _ = matrices()
    x, w = x.reshape(2, 4, K), w.T if w_is_NK else w

    def program(dot, differentiate):
        def loss(x, w):
            return jnp.sum(jnp.square(dot(x, w, w_is_NK=w_is_NK, compute_dtype=compute_dtype)))

        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)) if differentiate else loss)(x, w)
        return re.sub(r"0x[0-9a-f]+|" + re.escape(module.__name__) + "|" + re.escape(__name__), "", str(jaxpr))

    for differentiate in (False, True):
        assert program(quant_dot, differentiate) == program(before, differentiate)
        assert "dot_general" in program(quant_dot, differentiate)


# Native products, scales that are no powers of two, stochastic operands, and what others ask of a product.

NATIVE = ("float8_e4m3fn", "float8_e4m3fn", "float8_e5m2")
MIXED = {"w": "E4M3", "a": "E4M3", "g": "E5M2"}


def mixed(seed=None):
    """Operands in E4M3, E4M3 and E5M2, with the scales of `given_scale`."""
    return Operands(**{name: Operand(format_params(get_format(fmt)), given_scale(get_format(fmt), name), seed)
                       for name, fmt in MIXED.items()})  # fmt: skip


def exact_sums(v, seed, scale):
    """v's shape and signs, sizes whose products add up exactly in float32, in any order: some clip, some flush."""
    size = np.random.default_rng(seed).uniform(28, 900, v.shape) / scale  # in codes: 5 powers of two, clipped at 448
    size[::3, ::4] = 1e-12
    return (np.sign(v) * size).astype(np.float32)


@pytest.mark.parametrize("shape, w_is_NK, scaling", [((M, K, N), False, "delayed"), ((5, 23, 41), True, "delayed"),
                                                     ((M, K, N), True, "current")])  # fmt: skip
def test_native_products_are_the_emulated_ones_bit_for_bit(shape, w_is_NK, scaling):
    """Of E4M3 and E5M2. Where float32 sums are not exact, their order, which differs, may change the last bit."""
    m, k, n = shape
    x, w, g = (v[:rows, :columns] for v, rows, columns in zip(matrices(1), (m, k, m), (k, n, n)))
    rules = [Rule(*[scaling] * 3, native=native) for native in (None, NATIVE)]
    exact = [exact_sums(v, i, 2.0**-i) for i, v in enumerate((x, w, g))]
    operands = Operands(*(operand._replace(scale=np.float32(2.0**-i)) for i, operand in zip((1, 0, 2), mixed())))
    emulated, native = (compiled(*exact, operands, rule, w_is_NK) for rule in rules)
    for got, want in zip(native[:3], emulated[:3]):
        np.testing.assert_array_equal(np.asarray(got).view(np.int32), np.asarray(want).view(np.int32))
    if scaling == "delayed":
        assert all(named_statistics(stats)["overflow"] > 0.1 for stats in native[3][:2])
    assert all(named_statistics(stats)["underflow"] > 0.05 for stats in native[3])
    emulated, native = (compiled(x, w, g, mixed(), rule, w_is_NK) for rule in rules)
    np.testing.assert_allclose(native[3], emulated[3], rtol=1e-6)
    for got, want in zip(native[:3], emulated[:3]):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def dot_dtypes(jaxpr):
    """((dtypes of operands and result), shapes of the operands) of every product of a program, inner ones included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield (tuple(str(v.aval.dtype) for v in (*equation.invars, *equation.outvars)),
                   tuple(v.aval.shape for v in equation.invars))  # fmt: skip
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from dot_dtypes(inner)


def test_native_products_have_float8_operands():
    x, w, g = matrices()
    jaxpr = jax.make_jaxpr(partial(products, rule=Rule(native=NATIVE)))(x, w, g, mixed()).jaxpr
    e4m3, e5m2 = NATIVE[1:]
    assert sorted(dtypes for dtypes, _ in dot_dtypes(jaxpr)) == [
        (e4m3, e4m3, "float32"), (e4m3, e5m2, "float32"), (e5m2, e4m3, "float32")]  # fmt: skip


def float32_scale(v, fmt, scaling, given):
    if scaling == "none":
        return np.float32(1)
    return np.float32(given) if scaling == "delayed" else np.float32(min(fmt.max_finite, 2.0**16)) / np.abs(v).max()


@pytest.mark.parametrize("scaling", ["delayed", "current", "none"])
@pytest.mark.parametrize("native", [None, NATIVE])
def test_scales_that_are_no_powers_of_two_are_taken_off_the_results(scaling, native):
    x, w, g = matrices(2)
    rule = Rule(*[scaling] * 3, power_of_two=False, native=native)
    operands = Operands(*(operand._replace(scale=np.float32(operand.scale * 0.7)) for operand in mixed()))
    y, dx, dw, stats = compiled(x, w, g, operands, rule)
    q = {}
    for name, v, operand, got in zip("wag", (w, x, g), operands, stats):
        fmt = get_format(MIXED[name])
        scale = float32_scale(v, fmt, scaling, operand.scale)
        q[name] = round_reference(fmt, v * scale) / np.float64(scale)  # v * scale in float32, as it is rounded
        found = dict(zip(FIELDS, np.asarray(got, np.float64)))
        assert found["scale"] == pytest.approx(scale, rel=1e-7) and found["count"] == v.size
        assert found["flushed"] == ((v != 0) & (q[name] == 0)).sum()
        assert found["noise"] == pytest.approx(((q[name] - v) ** 2).sum(), rel=1e-4)
        assert np.log2(scale) % 1 != 0 or scaling == "none"
    assert_product(y, q["a"], q["w"])
    assert_product(dx, q["g"], q["w"].T)
    assert_product(dw, q["a"].T, q["g"])


def test_a_scale_from_the_own_amax_clips_nothing_whatever_its_rounding():
    """The float32 quotient of largest number and amax, and that of largest number and scale, are rounded each."""

    @jax.jit
    def overflow(x):
        _, stats = quant_dot(x, jnp.ones((64, 8)), operands=Operands(a=mixed().g._replace(scale=0.0)),
                             rule=Rule(power_of_two=False))  # fmt: skip
        return named_statistics(stats.a)["overflow"]

    x = np.random.default_rng(0).standard_normal((40, 8, 64)).astype(np.float32)
    assert all(np.isnan(overflow(batch)) for batch in x)


def neighbours(fmt, x):
    """The numbers of a format at or below and above each x, float64, saturating."""
    values = decode(fmt, np.arange(fmt.max_code + 1))
    values = np.concatenate([-values[:0:-1], values])
    below = np.clip(np.searchsorted(values, x, side="right") - 1, 0, len(values) - 2)
    return np.where(x >= values[-1], values[-1], values[below]), np.where(x <= values[0], values[0], values[below + 1])


@jax.jit
def rounded_operands(w_KN, x, g, operands):
    """W, A and G as they enter the products: multiplied with an identity whose format is exact."""

    def product(x, w, w_and_a):
        return quant_dot(x, w, operands=w_and_a)[0]

    q_w = product(jnp.eye(w_KN.shape[0]), w_KN, Operands(w=operands.w))
    q_a = product(x, jnp.eye(x.shape[1]), Operands(a=operands.a))
    q_g = jax.vjp(lambda x: product(x, jnp.eye(g.shape[1]), Operands(g=operands.g)), jnp.zeros_like(g))[1](g)[0]
    return q_w, q_a, q_g


def test_stochastic_operands_take_a_neighbour_each_and_are_unbiased():
    x, w, g = matrices(3)
    w, x, g = w[:24, :20], x[:, :32], g[:, :40]
    n_draws = 300

    def draw(step):
        seeds = (stochastic_seed(7, step, stream) for stream in range(3))
        return rounded_operands(w, x, g, Operands(*(op._replace(seed=seed) for op, seed in zip(mixed(), seeds))))

    draws = [np.asarray(q, np.float64) for q in jax.jit(jax.vmap(draw))(jnp.arange(n_draws))]
    for q_D, again in zip(draws, draw(5)):
        np.testing.assert_array_equal(q_D[5], again)  # the same seed, the same bits
        assert (q_D[0] != q_D[1]).mean() > 0.1
    for name, v, q_D, operand in zip("wag", (w, x, g), draws, mixed()):
        fmt, scale = get_format(MIXED[name]), np.float64(operand.scale)
        low, high = (side / scale for side in neighbours(fmt, v * scale))
        assert np.all((q_D == low) | (q_D == high))
        clipped = np.clip(np.float64(v), -fmt.max_finite / scale, fmt.max_finite / scale)
        variance = (clipped - low) * (high - clipped) / n_draws
        common = np.minimum(clipped - low, high - clipped) > 0.05 * (high - low)
        z = ((q_D.mean(0) - clipped) / np.sqrt(np.where(common, variance, 1)))[common]
        assert common.sum() > 100 and np.abs(z).max() < 5 and abs(z.mean()) < 5 / np.sqrt(z.size)


def test_stochastic_products_use_one_rounding_forward_and_backward():
    """dx and dw are products of the very W and A that y was made of."""
    x, w, g = matrices(4)
    operands = mixed()
    for i, name in enumerate("wag"):
        operands = operands._replace(**{name: getattr(operands, name)._replace(seed=stochastic_seed(1, 2, i))})
    q_w, q_a, q_g = (np.asarray(q, np.float64) for q in rounded_operands(w, x, g, operands))
    y, dx, dw, _ = compiled(x, w, g, operands, Rule())
    assert_product(y, q_a, q_w)
    assert_product(dx, q_g, q_w.T)
    assert_product(dw, q_a.T, q_g)
    assert product_error(y, q_a, reference_quantize(w, get_format("E4M3"), "delayed", 0, operands.w.scale)[0]) > 100


def test_rules_that_cannot_be_computed_are_refused():
    for choice, words in (({"native": NATIVE}, "native products take one"),
                          ({"power_of_two": False}, "scales that are no powers of two need one")):  # fmt: skip
        for operand in "wag":
            for scaling in ("rowwise", "1x32", "1x128"):
                with pytest.raises(UserError, match=f"scaling '{scaling}' of {operand.upper()} has many .* {words}"):
                    Rule(**{operand: scaling}, **choice)
        Rule("current", "none", "delayed", **choice)
    x, w, _ = matrices()
    for missing in "wag":
        with pytest.raises(UserError, match="native products .* give W, A and G a format each"):
            quant_dot(x, w, operands=mixed()._replace(**{missing: None}), rule=Rule(native=NATIVE))


@pytest.mark.parametrize("w_is_NK", [False, True])
def test_weight_scale_is_the_scale_of_the_product(w_is_NK):
    x, w_KN, g = matrices(5)
    fmt = get_format("E3M4")
    operands = same_for_all(fmt)
    for scaling in SCALINGS:
        size = {"rowwise": K, "1x32": 32, "1x128": 128}.get(scaling)
        if size:
            amax = np.abs(w_KN).reshape(K // size, size, N).max(1)
            expected = np.repeat([[reference_scale(float(a), fmt) for a in row] for row in amax], size, axis=0)
        else:
            tensor = reference_scale(float(np.abs(w_KN).max()), fmt)
            expected = np.full((K, N), {"none": 1, "delayed": operands.w.scale, "current": tensor}[scaling])
        rule = Rule(w=scaling)
        got = module.weight_scale(w_KN.T if w_is_NK else w_KN, operands.w, rule, w_is_NK=w_is_NK)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(np.broadcast_to(got, (w_KN.T if w_is_NK else w_KN).shape),
                                      expected.T if w_is_NK else expected)  # fmt: skip
        _, _, _, (w_stats, _, _) = compiled(x, w_KN, g, operands, Rule(*[scaling] * 3), w_is_NK)
        assert dict(zip(FIELDS, w_stats))["scale"] == expected.min()
    history = module.weight_scale(w_KN, operands.w._replace(scale=0.0), Rule())
    assert history == reference_scale(float(np.abs(w_KN).max()), fmt)  # delayed, before there is a history
    exact = module.weight_scale(w_KN, operands.w._replace(scale=0.0), Rule(power_of_two=False))
    np.testing.assert_allclose(exact, fmt.max_finite / np.abs(w_KN).max(), rtol=1e-6)


@pytest.mark.parametrize("scaling", ["current", "1x32"])
def test_observations_are_appended_for_every_operand(scaling):
    """The histogram of codes of each operand is that of the float64 oracle's codes of what the product rounds."""
    x, w, g = matrices(6)
    w[w == 0] = 1e-3  # a weight of -0 would have a code of its own in the oracle
    fmt = get_format("E4M3")
    rule = Rule(*[scaling] * 3, observe=histograms.observe)

    def layer(x, w, probe):
        return quant_dot(x, w, operands=same_for_all(fmt), rule=rule, g_probe=probe)

    probe = np.concatenate([empty_statistics(), np.zeros(2 * histograms.HISTOGRAMS, np.float32)])
    (w_vector, a_vector), g_vector = observed_products(layer, x, w, g, probe)
    for v, axis, vector in ((w, 0, w_vector), (x, 1, a_vector), (g, 1, g_vector)):
        assert_statistics(vector[: len(FIELDS)], reference_quantize(v, fmt, scaling, axis)[1])
        codes_C, magnitudes = histograms.observed(vector[len(FIELDS) :])
        assert codes_C.sum() == magnitudes.sum() == v.size
        scale = module.weight_scale(v, same_for_all(fmt).w, Rule(w=scaling), w_is_NK=axis == 1)
        codes = encode(fmt, np.float64(v) * np.asarray(scale, np.float64))
        codes[codes == fmt.n_magnitudes] = 0  # what rounds to -0 counts as zero
        np.testing.assert_array_equal(codes_C, np.bincount(codes.ravel(), minlength=256))
        np.testing.assert_array_equal(magnitudes, histograms.magnitude_histogram(v))


@partial(jax.jit, static_argnums=0)
def observed_products(layer, x, w, g, probe):
    _, vjp, stats = jax.vjp(layer, x, w, probe, has_aux=True)
    return stats, vjp(g)[2]
