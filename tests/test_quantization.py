"""Operands, scales, histories and metrics of a run's formats, held to NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_products_formats import reference_quantize, reference_scale

from altgrad_jax.config import default_config
from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.models.stacking import layers_of
from altgrad_jax.numerics.formats import get_format, round_reference
from altgrad_jax.numerics.products import FIELDS, SCALINGS, Statistics, empty_statistics, quant_dot
from altgrad_jax.numerics.rounding import format_params, stochastic_seed, to_grid
from altgrad_jax.numerics.rules import resolve_rules
from altgrad_jax.step import quantization
from altgrad_jax.step.quantization import QuantOptions

# Different formats for the operands and in the two blocks, which are one segment all the same; attn_out has none at
# all, mlp_up none for W, the head for W alone.
RULES = ("E4M3", "block_*:G=E5M2", "block_1/*:W=E3M4", "block_*/attn_out=none", "block_*/mlp_up:W=none",
         "block_0/mlp_*:A=E3M4", "block_1/mlp_up:G=E4M3", "head:W=E2M5")  # fmt: skip
LAYERS = resolve_rules(RULES, 2)
WAG = {"block_0/attn_qkv": ("E4M3", "E4M3", "E5M2"), "block_0/mlp_up": (None, "E3M4", "E5M2"),
       "block_0/mlp_down": ("E4M3", "E3M4", "E5M2"), "block_1/attn_qkv": ("E3M4", "E4M3", "E5M2"),
       "block_1/mlp_up": (None, "E4M3", "E4M3"), "block_1/mlp_down": ("E3M4", "E4M3", "E5M2"),
       "head": ("E2M5", None, None)}  # fmt: skip
SHAPES = {"block_0/attn_qkv": (32, 96), "block_0/mlp_down": (128, 32), "block_1/attn_qkv": (32, 96),
          "block_1/mlp_down": (128, 32), "head": (64, 32)}  # fmt: skip
PLAIN = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=64)
SEGMENTS = ((0, 2),)


def groups_of(options):
    return quantization.groups(options, options.segments(PLAIN.n_layer))


def rules_of(options):
    """{layer: Rule} of a model of two blocks."""
    return by_layer(
        dict(quantization.quantized_model(quantization.layout(PLAIN, options), options).rules), lambda r, _: r
    )


def by_layer(tree, member=lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)):
    """{layer: its members} of a dictionary keyed by group."""
    return {layer: member(tree[group], i) for group in tree for i, layer in enumerate(layers_of(group))}


def by_group(tree, groups):
    """{group: members stacked} of a dictionary keyed by layer."""
    return {
        group.name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[layer] for layer in layers_of(group.name)))
        for group in groups
        if layers_of(group.name)[0] in tree
    }


def operands_of(options, state, formats_Q3, *seed):
    """{layer: Operands}, in the order of the layers, from a state that is not stacked."""
    stacked = quantization.stacked(state, SEGMENTS)
    found = by_layer(quantization.operands(options, groups_of(options), stacked, formats_Q3, *seed))
    return {layer.layer: found[layer.layer] for layer in options.layers}


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
    options = options_for(scaling=("rowwise", "current", "delayed"))
    assert set(rules_of(options)) == set(WAG)
    for rule in rules_of(options).values():
        assert (rule.w, rule.a, rule.g) == options.scaling
        assert rule.power_of_two and rule.native is None and not rule.float32_operands
    for wide in ("head", "block_1/mlp_up"):
        rules = rules_of(QuantOptions(resolve_rules(("E4M3", f"{wide}:W=FP16"), 2)))
        assert {layer for layer, rule in rules.items() if rule.float32_operands} == {wide}
    shifts = rules_of(options_for(emergency_formats=("FP16",)))
    assert set(shifts) == set(WAG) and all(rule.float32_operands for rule in shifts.values())
    native = QuantOptions(resolve_rules(("E4M3", "block_*:G=E5M2"), 2), native=True, power_of_two=False)
    for rule in rules_of(native).values():
        assert rule.native == ("float8_e4m3fn", "float8_e4m3fn", "float8_e5m2") and not rule.power_of_two


def test_options_are_read_from_the_settings_of_a_run():
    config = default_config()
    assert quantization.options_of(config) is None
    config.use_fp8, config.formats, config.n_layer = True, RULES, 2
    assert quantization.options_of(config) == QuantOptions(LAYERS, emergency_patience=3)
    config.update(
        scaling="current,delayed,1x32",
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
        scaling=("current", "delayed", "1x32"),
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
    operands = operands_of(options, state, quantization.formats_at(table, 0), stochastic_seed(0, 1, 2))

    @jax.jit
    def used(w_of, operands_of):
        """Every W as it enters a product, the other operand being the identity, and its statistics."""
        eye = {layer: jnp.eye(w.shape[1 if layer == "head" else 0]) for layer, w in w_of.items()}
        return {layer: quant_dot(eye[layer], w, operands=operands_of[layer]._replace(a=None, g=None),
                                 rule=rules_of(options)[layer], w_is_NK=layer == "head")
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
        operands = operands_of(options, state, quantization.formats_at(table, level))
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
        operands = operands_of(options, state, formats_Q3, seed)
        found = [operand.seed for layer in operands.values() for operand in (layer.w, layer.g) if operand is not None]
        assert all(layer.a is None or layer.a.seed is None for layer in operands.values())
        seen |= {tuple(np.asarray(seed).tolist()) for seed in found}
        again = operands_of(options, state, formats_Q3, seed)
        jax.tree.map(np.testing.assert_array_equal, operands, again)
    assert len(seen) == 3 * (5 + 6)  # three passes; five layers with a W and six with a G
    evaluation = operands_of(options, state, formats_Q3)
    assert all(operand is None or operand.seed is None for layer in evaluation.values() for operand in layer)


def test_the_noise_of_an_operand_does_not_depend_on_the_groups():
    """It is that of its layer's number and of the operand's, so that a run does not depend on how blocks are taken."""
    options = options_for(stochastic=(True, True, True))
    table, state, _ = fresh(options)
    seed = stochastic_seed(1, 2, 3)
    found = operands_of(options, state, quantization.formats_at(table, 0), seed)
    for q, layer in enumerate(WAG):
        for i, operand in enumerate(found[layer]):
            if operand is not None:
                np.testing.assert_array_equal(operand.seed, stochastic_seed(seed[0], seed[1], 3 * q + i))
    apart = quantization.groups(options, ((0, 1), (1, 2)))
    of_blocks = by_layer(
        quantization.operands(
            options, apart, quantization.stacked(state, ((0, 1), (1, 2))), quantization.formats_at(table, 0), seed
        )
    )
    for layer in WAG:
        jax.tree.map(np.testing.assert_array_equal, of_blocks[layer], found[layer])


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
    history = np.arange(7 * 3 * 3, dtype=np.float32).reshape(7, 3, 3)
    vectors = vectors.at[0, 0, 0].set(np.nan).at[6, 0, 0].set(np.inf)
    got = quantization.push_history(options, jnp.asarray(history), vectors, quantization.formats_at(table, 0))
    for q, (layer, names) in enumerate(WAG.items()):
        for i, name in enumerate(names):
            amax = np.abs(raw[layer, "WAG"[i]][0]).max().astype(np.float32) if name else np.float32(0)
            expected = [*history[q, i, 1:], amax]
            if (q, i) in ((0, 0), (6, 0)):  # not finite: as it was
                expected = history[q, i]
            np.testing.assert_array_equal(got[q, i], expected)


@pytest.mark.parametrize("factor", [1e-9, 1.0])
def test_range_clip_limits_the_amax_of_g_by_its_rms_times_the_range(factor):
    options = options_for(amax_history=2, range_clip=factor)
    vectors, raw = statistics()
    table, state, _ = fresh(options)
    formats_Q3 = quantization.formats_at(table, 0)
    got = quantization.push_history(options, state.amax_history_Q3H, vectors, formats_Q3)
    limited = 0
    for q, layer in enumerate(WAG):
        for i, operand in enumerate("WAG"):
            if (layer, operand) not in raw:
                continue
            v = raw[layer, operand][0]
            expected = np.abs(v).max()
            if operand == "G":
                fmt = get_format(WAG[layer][2])
                limit = factor * fmt.max_finite / fmt.smallest_subnormal * np.sqrt(np.mean(v**2))
                limited += limit < expected
                expected = min(expected, limit)
            assert float(got[q, i, -1]) == pytest.approx(expected, rel=1e-5), (layer, operand)
    assert limited == {1e-9: 6, 1.0: 0}[factor]
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
    options = options_for(scaling=("delayed", "current", "delayed"), weights_at_rest=at_rest)
    vectors, raw = statistics()
    columns = quantization.format_metrics(options, vectors)
    found = dict(zip(columns.names, columns.values, strict=True))
    expected, together = {}, {}
    for (layer, operand), (v, q, limit) in raw.items():
        size = np.abs(v)
        clipped = np.maximum(size - limit, 0)
        values = {"overflow": (size > limit).mean(), "underflow": ((v != 0) & (q == 0)).mean(),
                  "clipped_energy": (clipped**2).sum() / (v**2).sum(), "sqnr_db": decibels(v, q), "amax": size.max(),
                  "encode_scale": vectors[list(WAG).index(layer), "WAG".index(operand), 1],
                  "dynamic_range": np.log2(size.max() / size[size > 0].min())}  # fmt: skip
        expected |= {f"{name}/{layer}/{operand}": value for name, value in values.items()
                     if name not in without_of(operand, at_rest)}  # fmt: skip
        together.setdefault(operand, []).append((v.ravel(), q.ravel(), np.full(v.size, limit)))
    for operand, parts in together.items():
        sizes, ratios = [len(v) for v, _, _ in parts], {"clipped_energy": [], "sqnr_db": []}
        for v, q, limit in parts:
            ratios["clipped_energy"].append((np.maximum(np.abs(v) - limit, 0) ** 2).sum() / (v**2).sum())
            ratios["sqnr_db"].append(((q - v) ** 2).sum() / (v**2).sum())
        by_size = {name: np.average(shares, weights=sizes) for name, shares in ratios.items()}
        v, q, limit = (np.concatenate(part) for part in zip(*parts))
        clipped = np.maximum(np.abs(v) - limit, 0)
        values = {"overflow": (clipped > 0).mean(), "underflow": ((v != 0) & (q == 0)).mean(),
                  "clipped_energy": (clipped**2).sum() / (v**2).sum(), "sqnr_db": decibels(v, q),
                  "clipped_energy_by_size": by_size["clipped_energy"],
                  "sqnr_db_by_size": -10 * np.log10(by_size["sqnr_db"])}  # fmt: skip
        expected |= {f"{name}/all/{operand}": value for name, value in values.items()
                     if name.removesuffix("_by_size") not in without_of(operand, at_rest)}  # fmt: skip
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=2e-5, abs=1e-12), name
    parts = quantization.format_metrics(options, vectors, micro_batches=4)
    for name, value in zip(parts.names, parts.values, strict=True):  # of the gradient of the batch's mean loss
        statistic, factor = name.partition("/")[0], {"amax": 1 / 4, "encode_scale": 4}
        assert value == found[name] * (factor.get(statistic, 1) if name.endswith("/G") else 1), name
    by_layer = [found[f"overflow/{layer}/G"] for layer, operand in raw if operand == "G"]
    assert abs(np.mean(by_layer) - found["overflow/all/G"]) > 5e-4  # the mean of layers is something else


def test_what_can_be_clipped_is_watched():
    options = options_for(scaling=("delayed", "current", "none"), weights_at_rest="nearest")
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
    names, shares = quantization.overflow_of(options_for(scaling=("current",) * 3), vectors)
    assert names == [] and shares.shape == (0,)


def test_statistics_are_gathered_by_layer_and_operand():
    options = options_for()
    groups = groups_of(options)
    vectors, _ = statistics()
    forward = {layer: Statistics(*(vectors[q, i] if names[i] else None for i in (0, 1)))
               for q, (layer, names) in enumerate(WAG.items())}  # fmt: skip
    backward = {layer: vectors[q, 2] for q, (layer, names) in enumerate(WAG.items()) if names[2]}
    probes = quantization.g_probes(groups)
    assert set(by_layer(probes)) == set(backward)
    assert all((probe == empty_statistics()).all() for probe in probes.values())
    of_groups = by_group(forward, groups), by_group(backward, groups)
    np.testing.assert_array_equal(quantization.gather_statistics(groups, *of_groups), vectors)
    nothing = jnp.arange(len(FIELDS) * 1.0)
    filled = np.array(vectors)
    filled[[[names[i] is None for i in range(3)] for names in WAG.values()]] = nothing
    np.testing.assert_array_equal(quantization.gather_statistics(groups, *of_groups, nothing), filled)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_grids_of_the_weights_are_those_of_the_product(scaling):
    options = options_for(scaling=(scaling, "delayed", "delayed"))
    table, state, _ = fresh(options)
    amax = np.float32(0.05 * 1.5 ** np.arange(len(LAYERS)))  # another scale for most layers
    state = state._replace(amax_history_Q3H=state.amax_history_Q3H.at[:, 0].set(amax[:, None]))
    if scaling.startswith("1x128"):
        rows = np.array([q for q, layer in enumerate(WAG) if layer.endswith("mlp_down")])
        options = dataclasses.replace(options, layers=tuple(LAYERS[q] for q in rows))
        table = quantization.format_table(options)
        state = state._replace(amax_history_Q3H=state.amax_history_Q3H[rows])
    groups, model = groups_of(options), quantization.quantized_model(quantization.layout(PLAIN, options), options)

    @jax.jit
    def rounded(state, formats_Q3, w_of):
        stacked = quantization.stacked(state, SEGMENTS)
        grids = quantization.weight_grids(model, options, groups, stacked, formats_Q3, w_of)
        return {group: (jax.vmap(to_grid)(w_of[group], grid), grid.scale) for group, grid in grids.items()}

    w_of = {layer: w for layer, w in weights().items() if layer in options.weight_layers}
    found = by_layer(rounded(state, quantization.formats_at(table, 0), by_group(w_of, groups)))
    assert set(found) == set(options.weight_layers)
    for layer, (q, scale) in found.items():
        w, fmt = w_of[layer], get_format(WAG[layer][0])
        given = reference_scale(float(amax[list(WAG).index(layer)]), fmt)
        expected, fields = reference_quantize(w, fmt, scaling, 1 if layer == "head" else 0, given)
        np.testing.assert_array_equal(q, expected)
        assert scale.min() == fields["scale"] and (scaling != "delayed" or scale == given)


@pytest.mark.parametrize(
    "rules, choices, segments",
    [
        (("E4M3",), {}, ((0, 4),)),
        (("E4M3", "block_1/*=E5M2", "block_2/*:G=E3M4"), {}, ((0, 4),)),  # other formats, the same computation
        (("E4M3", "block_0/*=none"), {}, ((0, 1), (1, 4))),
        (("E4M3", "block_1/mlp_up:W=none"), {}, ((0, 1), (1, 2), (2, 4))),
        (("E4M3", "block_3/mlp_up:W=FP16"), {}, ((0, 3), (3, 4))),  # float32 operands
        (("E4M3", "block_3/mlp_up:W=FP16"), {"emergency_formats": ("FP16",)}, ((0, 4),)),
        (("block_*/mlp_up=E4M3", "block_1/mlp_up=none", "block_1/mlp_down=E4M3"), {}, ((0, 1), (1, 2), (2, 4))),
        (("E4M3", "block_2/*:G=E5M2"), {"native": True}, ((0, 2), (2, 3), (3, 4))),  # a native product has its dtypes
        (("head=E4M3",), {}, ((0, 4),)),
    ],
)
def test_neighbouring_blocks_are_taken_together_where_they_are_computed_alike(rules, choices, segments):
    options = QuantOptions(resolve_rules(rules, 4), **choices)
    assert options.segments(4) == segments
    plain = dataclasses.replace(PLAIN, n_layer=4)
    assert quantization.layout(plain, options) == dataclasses.replace(plain, split=segments)
    assert quantization.layout(plain, None) == plain and plain.segments == ((0, 4),)


def test_groups_hold_the_layers_of_one_name_in_a_segment():
    options = QuantOptions(resolve_rules(("E4M3", "block_*/mlp_up:W=none", "block_0/attn_qkv=none", "head:W=E5M2"), 3))
    groups = quantization.groups(options, options.segments(3))
    no_w = (False, True, True)
    assert [(group.name, layers_of(group.name), group.has) for group in groups] == [
        ("block_0:1/attn_out", ("block_0/attn_out",), (True,) * 3),
        ("block_0:1/mlp_up", ("block_0/mlp_up",), no_w),
        ("block_0:1/mlp_down", ("block_0/mlp_down",), (True,) * 3),
        ("block_1:3/attn_qkv", ("block_1/attn_qkv", "block_2/attn_qkv"), (True,) * 3),
        ("block_1:3/attn_out", ("block_1/attn_out", "block_2/attn_out"), (True,) * 3),
        ("block_1:3/mlp_up", ("block_1/mlp_up", "block_2/mlp_up"), no_w),
        ("block_1:3/mlp_down", ("block_1/mlp_down", "block_2/mlp_down"), (True,) * 3),
        ("head", ("head",), (True, False, False)),
    ]
    rows = {layer.layer: q for q, layer in enumerate(options.layers)}
    numbers = np.arange(len(rows))
    for group in groups:
        assert group.rows == tuple(rows[layer] for layer in layers_of(group.name))
        np.testing.assert_array_equal(group.of(numbers), group.rows)
        assert group.key == group.name.replace("/", ".")
    tree = {"a": numbers, "b": np.stack([numbers, -numbers], axis=1)}
    again = quantization.in_layer_order(groups, [group.of(tree) for group in groups])
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_formats_of_weights_are_stacked_by_group():
    options = options_for()
    formats_Q3 = quantization.formats_at(quantization.format_table(options), 0)
    found = by_layer(quantization.weight_formats(groups_of(options), formats_Q3))
    assert set(found) == set(SHAPES)
    for layer, params in found.items():
        assert list(params) == list(format_params(get_format(WAG[layer][0])))


def test_faults_of_the_state_are_named_by_layer():
    """Whichever way the layers are grouped, each fault is counted at its layer."""
    options = options_for(weights_at_rest="error_feedback", amax_history=3)
    _, state, _ = fresh(options)
    history = state.amax_history_Q3H.at[4, 2, 1].set(np.nan).at[4, 2, 2].set(np.inf).at[0, 0].set(np.nan)
    residual = state.residual | {"block_1.mlp_down": state.residual["block_1.mlp_down"].at[2, 3].set(np.nan)}
    scales = {"block_0.mlp_down": 0.0, "head": np.inf, "block_1.attn_qkv": -1.0}
    state = state._replace(
        amax_history_Q3H=history,
        residual=residual,
        rest_scale=state.rest_scale | {key: jnp.float32(value) for key, value in scales.items()},
    )
    for segments in (SEGMENTS, ((0, 1), (1, 2))):
        groups = quantization.groups(options, segments)
        found = {
            kind: {name: float(count) for name, count in zip(names, counts, strict=True) if count}
            for kind, (names, counts) in quantization.faults(
                options, groups, quantization.stacked(state, segments)
            ).items()
        }
        assert found == {
            "nonfinite_amax": {"block_1/mlp_up/G": 2},  # no scale of stored weights comes from a history
            "nonfinite_scale": {"block_0/mlp_down": 1, "block_1/attn_qkv": 1, "head": 1},
            "nonfinite_residual": {"block_1/mlp_down": 1},
        }
