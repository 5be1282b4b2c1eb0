"""Operands, scales, histories and metrics of a run's formats, held to NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_products_formats import reference_quantize, reference_scale

from altgrad_jax.config import default_config
from altgrad_jax.numerics.formats import get_format, round_reference
from altgrad_jax.numerics.products import FIELDS, SCALINGS, Statistics, empty_statistics, quant_dot
from altgrad_jax.numerics.rounding import format_params, stochastic_seed, to_grid
from altgrad_jax.numerics.rules import resolve_rules
from altgrad_jax.step import quantization
from altgrad_jax.step.quantization import QuantOptions

# Different formats for the operands; attn_out has none at all, mlp_up none for W, the head for W alone.
RULES = ("E4M3", "block_*:G=E5M2", "block_0/attn_out=none", "block_0/mlp_up:W=none", "block_0/mlp_*:A=E3M4",
         "head:W=E2M5")  # fmt: skip
LAYERS = resolve_rules(RULES, 1)
WAG = {"block_0/attn_qkv": ("E4M3", "E4M3", "E5M2"), "block_0/mlp_up": (None, "E3M4", "E5M2"),
       "block_0/mlp_down": ("E4M3", "E3M4", "E5M2"), "head": ("E2M5", None, None)}  # fmt: skip
SHAPES = {"block_0/attn_qkv": (32, 96), "block_0/mlp_down": (128, 32), "head": (64, 32)}


def options_for(**choices):
    return QuantOptions(layers=LAYERS, **choices)


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {layer: (0.02 * rng.standard_normal(shape)).astype(np.float32) for layer, shape in SHAPES.items()}


init_state = jax.jit(quantization.init_state, static_argnames=("options", "ages"))


def fresh(options, ages=True):
    table = quantization.format_table(options)
    return table, *init_state(options, weights(), quantization.formats_at(table, 0), ages)


def fields(**values):
    return np.float32([values.get(name, start) for name, start in zip(FIELDS, empty_statistics(), strict=True)])


def test_the_layers_are_those_of_the_rules():
    assert {layer.layer: layer.wag for layer in LAYERS} == WAG


@pytest.mark.parametrize("saturate", [True, False])
def test_the_table_holds_the_format_of_every_operand_at_every_level(saturate):
    """Operands without a format have BF16's entries at every level."""
    options = options_for(emergency_formats=("E3M4", "BF16"), saturate=saturate)
    if not saturate:
        layers = resolve_rules(("E4M3", "block_*:G=E5M2", "block_0/mlp_up:W=none"), 1)
        options = dataclasses.replace(options, layers=layers)
    table = quantization.format_table(options)
    assert {leaf.shape for leaf in table} == {(3, len(options.layers), 3)}
    for q, layer in enumerate(options.layers):
        for i, name in enumerate(layer.wag):
            for level, at_level in enumerate((name, "E3M4", "BF16")):
                at_level = "BF16" if name is None else at_level
                expected = format_params(get_format(at_level), saturate=saturate or name is None)
                got = quantization.formats_at(table, level)
                np.testing.assert_array_equal([leaf[q, i] for leaf in got], list(expected))  # one overflow is NaN


def test_the_rule_of_a_layer_has_the_choices_of_its_operands():
    options = options_for(scaling=("channel", "tensor", "delayed"))
    for layer, rule in quantization.rules(options):
        assert (rule.w, rule.a, rule.g) == options.scaling and layer in WAG
        assert rule.power_of_two and rule.native is None and not rule.float32_operands
    wide = dict(quantization.rules(QuantOptions(resolve_rules(("E4M3", "head:W=FP16"), 1))))
    assert {layer for layer, rule in wide.items() if rule.float32_operands} == {"head"}
    shifts = quantization.rules(options_for(emergency_formats=("FP16",)))
    assert all(rule.float32_operands for _, rule in shifts)
    native = QuantOptions(resolve_rules(("E4M3", "block_*:G=E5M2"), 1), native=True, power_of_two=False)
    for _, rule in quantization.rules(native):
        assert rule.native == ("float8_e4m3fn", "float8_e4m3fn", "float8_e5m2") and not rule.power_of_two


def test_options_are_read_from_the_settings_of_a_run():
    config = default_config()
    assert quantization.options_of(config) is None
    config.use_fp8, config.formats, config.n_layer = True, RULES, 1
    assert quantization.options_of(config) == QuantOptions(LAYERS, emergency_patience=3)
    config.update(
        scaling="tensor,delayed,block32",
        scale_rounding="float32",
        saturate=False,
        products="native",
        operand_rounding="nearest,stochastic,nearest",
        weights_at_rest="stochastic",
        range_clip=2.0,
        amax_history=7,
        emergency_formats=("E3M4",),
        emergency_patience=5,
    )
    assert quantization.options_of(config) == QuantOptions(
        LAYERS,
        scaling=("tensor", "delayed", "block32"),
        amax_history=7,
        power_of_two=False,
        stochastic=(False, True, False),
        saturate=False,
        native=True,
        weights_at_rest="stochastic",
        range_clip=2.0,
        emergency_formats=("E3M4",),
        emergency_patience=5,
    )


@pytest.mark.parametrize("at_rest", ["float32", "nearest", "stochastic", "error_feedback"])
def test_a_fresh_state_stores_the_weights_on_their_grid(at_rest):
    options = options_for(weights_at_rest=at_rest, amax_history=5)
    _, state, stored = fresh(options)
    assert options.weight_layers == tuple(SHAPES)
    assert options.stored == (() if at_rest == "float32" else tuple(SHAPES)) and set(stored) == set(options.stored)
    for layer, w in weights().items():
        key = layer.replace("/", ".")
        assert state.age[key].dtype == jnp.uint16 and state.age[key].shape == w.shape and not state.age[key].any()
        if at_rest == "float32":
            continue
        scale = reference_scale(float(np.abs(w).max()), get_format(WAG[layer][0]))
        assert float(state.rest_scale[key]) == scale
        np.testing.assert_array_equal(stored[layer], round_reference(get_format(WAG[layer][0]), w * scale) / scale)
    keys = {layer.replace("/", ".") for layer in SHAPES}
    assert set(state.age) == keys and set(state.residual) == (keys if at_rest == "error_feedback" else set())
    assert set(state.rest_scale) == (keys if stored else set())
    for leaf in state.residual.values():
        assert leaf.dtype == jnp.bfloat16 and not leaf.any()
    assert state.amax_history_Q3H.shape == (len(LAYERS), 3, 5) and not state.amax_history_Q3H.any()
    assert state.level == state.bad_streak == 0
    assert fresh(options, ages=False)[1].age == {}


def test_stored_weights_are_used_as_they_are():
    """At their own scale, whatever the history says, and not rounded again, not even stochastically."""
    options = options_for(weights_at_rest="nearest", stochastic=(True, True, True))
    table, state, stored = fresh(options)
    state = state._replace(amax_history_Q3H=state.amax_history_Q3H + 3e-3)  # a scale at which W would clip
    operands = quantization.operands(options, state, quantization.formats_at(table, 0), stochastic_seed(0, 1, 2))

    @jax.jit
    def used(w_of, operands_of):
        """Every W as it enters a product, the other operand being the identity, and its statistics."""
        eye = {layer: jnp.eye(w.shape[1 if layer == "head" else 0]) for layer, w in w_of.items()}
        return {layer: quant_dot(eye[layer], w, operands=operands_of[layer]._replace(a=None, g=None),
                                 rule=dict(quantization.rules(options))[layer], w_is_NK=layer == "head")
                for layer, w in w_of.items()}  # fmt: skip

    for layer, (y, stats) in used(stored, operands).items():
        assert operands[layer].w.seed is None
        assert operands[layer].w.scale == state.rest_scale[layer.replace("/", ".")]
        np.testing.assert_array_equal(y, stored[layer].T if layer == "head" else stored[layer])
        assert dict(zip(FIELDS, stats.w))["noise"] == 0


@pytest.mark.parametrize("power_of_two", [True, False])
def test_delayed_scales_come_from_the_largest_amax_of_the_history(power_of_two):
    options = options_for(power_of_two=power_of_two, amax_history=4, emergency_formats=("E3M4",))
    table, state, _ = fresh(options)
    history = np.random.default_rng(3).lognormal(-3, 3, state.amax_history_Q3H.shape).astype(np.float32)
    history[2, 1] = 0
    state = state._replace(amax_history_Q3H=jnp.asarray(history))
    for level in (0, 1):
        operands = quantization.operands(options, state, quantization.formats_at(table, level))
        assert list(operands) == list(WAG)
        for q, (layer, names) in enumerate(WAG.items()):
            for i, (name, operand) in enumerate(zip(names, operands[layer], strict=True)):
                if name is None:
                    assert operand is None
                    continue
                fmt, amax = get_format("E3M4" if level else name), history[q, i].max()
                assert list(operand.format) == list(format_params(fmt)) and operand.seed is None
                expected = reference_scale(float(amax), fmt) if power_of_two else fmt.max_finite / float(amax or 1)
                assert float(operand.scale) == pytest.approx(expected if amax else 0.0, rel=0 if power_of_two else 1e-6)


def test_every_stochastic_operand_of_every_pass_has_its_own_noise():
    options = options_for(stochastic=(True, False, True))
    table, state, _ = fresh(options)
    formats_Q3 = quantization.formats_at(table, 0)
    seen = set()
    for step, micro_batch in ((0, 0), (0, 1), (1, 0)):
        seed = stochastic_seed(42, step, micro_batch)
        operands = quantization.operands(options, state, formats_Q3, seed)
        found = [operand.seed for layer in operands.values() for operand in (layer.w, layer.g) if operand is not None]
        assert all(layer.a is None or layer.a.seed is None for layer in operands.values())
        seen |= {tuple(np.asarray(seed).tolist()) for seed in found}
        again = quantization.operands(options, state, formats_Q3, seed)
        jax.tree.map(np.testing.assert_array_equal, operands, again)
    assert len(seen) == 3 * 6  # three passes; three layers with a W and three with a G
    evaluation = quantization.operands(options, state, formats_Q3)
    assert all(operand is None or operand.seed is None for layer in evaluation.values() for operand in layer)


def statistics(seed=0):
    """[Q, 3, S] of operands of different sizes, clipped, and {(layer, operand): (v, q, where it clips)} in float64."""
    rng = np.random.default_rng(seed)
    vectors = np.stack([np.stack([empty_statistics()] * 3)] * len(LAYERS))
    raw = {}
    for q, (layer, names) in enumerate(WAG.items()):
        for i, name in enumerate(names):
            if name is None:
                continue
            v = (rng.standard_normal((4 + 5 * q, 6 + 7 * i)) * 10.0**-q).astype(np.float32)
            v[0, :2], v[1, 0] = 0, 40 * 10.0**-q
            given = reference_scale(float(np.abs(v).max() / 20), get_format(name))
            quantized, found = reference_quantize(v, get_format(name), "delayed", 1, given)
            vectors[q, i] = fields(**found)
            raw[layer, "WAG"[i]] = v.astype(np.float64), quantized, get_format(name).max_finite / given
    return jnp.asarray(vectors), raw


def test_the_history_takes_the_amaxes_of_the_update():
    options = options_for(amax_history=3)
    vectors, raw = statistics()
    table, state, _ = fresh(options)
    history = np.arange(4 * 3 * 3, dtype=np.float32).reshape(4, 3, 3)
    vectors = vectors.at[0, 0, 0].set(np.nan).at[3, 0, 0].set(np.inf)
    got = quantization.push_history(options, jnp.asarray(history), vectors, quantization.formats_at(table, 0))
    for q, (layer, names) in enumerate(WAG.items()):
        for i, name in enumerate(names):
            amax = np.abs(raw[layer, "WAG"[i]][0]).max().astype(np.float32) if name else np.float32(0)
            expected = [*history[q, i, 1:], amax]
            if (q, i) in ((0, 0), (3, 0)):  # not finite: as it was
                expected = history[q, i]
            np.testing.assert_array_equal(got[q, i], expected)


@pytest.mark.parametrize("factor", [1e-9, 1.0])
def test_range_clip_limits_the_amax_of_g_by_its_rms_times_the_range(factor):
    options = options_for(amax_history=2, range_clip=factor)
    vectors, raw = statistics()
    table, state, _ = fresh(options)
    formats_Q3 = quantization.formats_at(table, 0)
    got = quantization.push_history(options, state.amax_history_Q3H, vectors, formats_Q3)
    fmt = get_format("E5M2")
    limited = 0
    for q, layer in enumerate(WAG):
        for i, operand in enumerate("WAG"):
            if (layer, operand) not in raw:
                continue
            v = raw[layer, operand][0]
            expected = np.abs(v).max()
            if operand == "G":
                limit = factor * fmt.max_finite / fmt.smallest_subnormal * np.sqrt(np.mean(v**2))
                limited += limit < expected
                expected = min(expected, limit)
            assert float(got[q, i, -1]) == pytest.approx(expected, rel=1e-5), (layer, operand)
    assert limited == {1e-9: 3, 1.0: 0}[factor]
    for value in (np.nan, np.inf):
        spoilt = vectors.at[:, 2, 0].set(value).at[:, 2, list(FIELDS).index("signal")].set(value)
        kept = quantization.push_history(options, got, spoilt, formats_Q3)
        np.testing.assert_array_equal(kept[:, 2], got[:, 2])


def ladder(bad, patience, n_levels):
    """Levels after each update, by a plain loop."""
    level, streak, levels = 0, 0, []
    for is_bad in bad:
        streak = streak + 1 if is_bad else 0
        if streak >= patience and level < n_levels:
            level, streak = level + 1, 0
        levels.append(level)
    return levels


@pytest.mark.parametrize("patience", [1, 3])
def test_the_level_rises_once_after_so_many_bad_updates_in_a_row(patience):
    options = options_for(emergency_formats=("E3M4", "BF16"), emergency_patience=patience)
    _, state, _ = fresh(options)
    bad = [0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    levels, rose = [], []
    for is_bad in bad:
        before = int(state.level)
        level, streak, rises = quantization.next_level(options, state, jnp.bool_(is_bad))
        state = state._replace(level=level, bad_streak=streak)
        assert level.dtype == streak.dtype == jnp.int32 and bool(rises) == (int(level) == before + 1)
        levels.append(int(level))
        rose.append(bool(rises))
    assert levels == ladder(bad, patience, 2) and max(levels) == 2
    assert sum(rose) == 2


def test_without_emergency_formats_nothing_is_counted():
    options = options_for()
    _, state, _ = fresh(options)
    assert [int(v) for v in quantization.next_level(options, state, jnp.bool_(True))] == [0, 0, 0]


def decibels(v, q):
    return 10 * np.log10((v**2).sum() / ((q - v) ** 2).sum())


def without_of(operand, at_rest):
    """Statistics that do not apply: A is scaled by its own amax, which clips nothing; stored W is not rounded again."""
    if operand == "W" and at_rest == "nearest":
        return {"overflow", "underflow", "clipped_energy", "sqnr_db"}
    return {"overflow", "clipped_energy"} if operand == "A" else set()


@pytest.mark.parametrize("at_rest", ["float32", "nearest"])
def test_format_metrics_by_layer_and_over_all_elements(at_rest):
    options = options_for(scaling=("delayed", "tensor", "delayed"), weights_at_rest=at_rest)
    vectors, raw = statistics()
    found = quantization.format_metrics(options, vectors)
    expected, together = {}, {}
    for (layer, operand), (v, q, limit) in raw.items():
        size = np.abs(v)
        clipped = np.maximum(size - limit, 0)
        values = {"overflow": (size > limit).mean(), "underflow": ((v != 0) & (q == 0)).mean(),
                  "clipped_energy": (clipped**2).sum() / (v**2).sum(), "sqnr_db": decibels(v, q), "amax": size.max(),
                  "scale": vectors[list(WAG).index(layer), "WAG".index(operand), 1],
                  "dynamic_range": np.log2(size.max() / size[size > 0].min())}  # fmt: skip
        expected |= {f"{name}/{layer}/{operand}": value for name, value in values.items()
                     if name not in without_of(operand, at_rest)}  # fmt: skip
        together.setdefault(operand, []).append((v.ravel(), q.ravel(), np.full(v.size, limit)))
    for operand, parts in together.items():
        v, q, limit = (np.concatenate(part) for part in zip(*parts))
        clipped = np.maximum(np.abs(v) - limit, 0)
        values = {"overflow": (clipped > 0).mean(), "underflow": ((v != 0) & (q == 0)).mean(),
                  "clipped_energy": (clipped**2).sum() / (v**2).sum(), "sqnr_db": decibels(v, q)}  # fmt: skip
        expected |= {f"{name}/all/{operand}": value for name, value in values.items()
                     if name not in without_of(operand, at_rest)}  # fmt: skip
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=2e-5, abs=1e-12), name
    by_layer = [found[f"overflow/{layer}/G"] for layer, operand in raw if operand == "G"]
    assert abs(np.mean(by_layer) - found["overflow/all/G"]) > 5e-4  # the mean of layers is something else


def test_what_can_be_clipped_is_watched():
    options = options_for(scaling=("delayed", "tensor", "none"), weights_at_rest="nearest")
    vectors, raw = statistics()
    names, shares = quantization.overflow_of(options, vectors)
    assert names == [f"{layer}/G" for layer, wag in WAG.items() if wag[2]]
    for name, share in zip(names, shares, strict=True):
        v, _, limit = raw[tuple(name.rsplit("/", 1))]
        assert float(share) == pytest.approx((np.abs(v) > limit).mean(), rel=1e-6) and share > 0
    first = vectors
    for field in ("exposed", "clipped"):  # at the first update every scale comes from the own amax
        first = first.at[..., list(FIELDS).index(field)].set(0)
    assert not quantization.overflow_of(options, first)[1].any()
    names, shares = quantization.overflow_of(options_for(scaling=("tensor",) * 3), vectors)
    assert names == [] and shares.shape == (0,)


def test_statistics_are_gathered_by_layer_and_operand():
    options = options_for()
    vectors, _ = statistics()
    forward = {layer: Statistics(*(vectors[q, i] if names[i] else None for i in (0, 1)))
               for q, (layer, names) in enumerate(WAG.items())}  # fmt: skip
    backward = {layer: vectors[q, 2] for q, (layer, names) in enumerate(WAG.items()) if names[2]}
    assert set(quantization.g_probes(options)) == set(backward)
    np.testing.assert_array_equal(quantization.gather_statistics(options, forward, backward), vectors)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_grids_of_the_weights_are_those_of_the_product(scaling):
    options = options_for(scaling=(scaling, "delayed", "delayed"))
    table, state, _ = fresh(options)
    state = state._replace(amax_history_Q3H=state.amax_history_Q3H.at[:, 0].set(0.05))
    if scaling.startswith("block128"):
        options = dataclasses.replace(options, layers=LAYERS[2:3])
        table = quantization.format_table(options)
        state = state._replace(amax_history_Q3H=state.amax_history_Q3H[2:3])

    @jax.jit
    def rounded(state, formats_Q3, w_of):
        grids = quantization.weight_grids(options, state, formats_Q3, w_of)
        return {layer: (to_grid(w_of[layer], grid), grid.scale) for layer, grid in grids.items()}

    found = rounded(state, quantization.formats_at(table, 0), weights())
    assert set(found) == set(options.weight_layers)
    for layer, (q, scale) in found.items():
        w, fmt = weights()[layer], get_format(WAG[layer][0])
        given = reference_scale(0.05, fmt)
        expected, fields = reference_quantize(w, fmt, scaling, 1 if layer == "head" else 0, given)
        np.testing.assert_array_equal(q, expected)
        assert scale.min() == fields["scale"] and (scaling != "delayed" or scale == given)


def test_layers_of_one_shape_are_grouped_in_the_order_of_the_model():
    shapes = {"a": (2, 3), "b": (4, 3), "c": (2, 3), "d": (3, 2), "head": (2, 3)}
    groups = quantization.by_shape({name: np.zeros(shape) for name, shape in shapes.items()})
    assert groups == [["a", "c"], ["b"], ["d"], ["head"]]  # the head's scales lie along another axis
