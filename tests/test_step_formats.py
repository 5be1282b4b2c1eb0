"""The compiled step in number formats: one program for all of them, and what it does to weights, scales and gradients.

Operands without a history are scaled by their own amax.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt2
import pytest
from test_metrics import by_layer
from test_optimizers import reference_ulp
from test_products_formats import dot_dtypes, neighbours, reference_quantize, reference_scale
from test_step import TOKENS_T, assert_same, column, make, windows_of

from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.models.linear import Quantized
from altgrad_jax.models.parameters import weights_of, with_weights
from altgrad_jax.models.stacking import group_of, layers_of
from altgrad_jax.numerics.formats import encode, get_format, round_reference
from altgrad_jax.numerics.optimizers import OPTIMIZERS, adam_moments
from altgrad_jax.numerics.products import FIELDS, Operand, Operands
from altgrad_jax.numerics.rounding import FormatParams, format_params
from altgrad_jax.numerics.rules import resolve_rules
from altgrad_jax.step import quantization, update
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.program import make_evaluate
from altgrad_jax.step.quantization import QuantOptions, format_table, key_of

MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=64)
GROUPS = ("format", "ledger")
EVERYWHERE = QuantOptions(resolve_rules(("E4M3", "head=E4M3"), 1))
ALL_LAYERS = EVERYWHERE.weight_layers
# Not all layers in the programs that are compiled whole, for every operand costs compile time.
MASTER = QuantOptions(resolve_rules(("block_0/attn_qkv=E4M3", "block_0/mlp_down=E4M3", "head=E4M3"), 1), amax_history=2)
MASTER_LAYERS = MASTER.weight_layers
# Two matrices of one shape, which the step treats together, in different formats.
TWO_BLOCKS = dataclasses.replace(MODEL, n_layer=2)
STORED = QuantOptions(resolve_rules(("block_*/mlp_down=E4M3", "block_1/mlp_down:W=E5M2"), 2))
STORED_FORMATS = {"block_0/mlp_down": "E4M3", "block_1/mlp_down": "E5M2"}
SHIFTED = dataclasses.replace(STORED, weights_at_rest="nearest", emergency_formats=("E3M4",), emergency_patience=2)


def build(model=MODEL, **options):
    return make(model, **dict(eval_batch_size=1, grad_clip=0.3, metric_groups=GROUPS) | options)


def named(options, *names, **choices):
    """The table with one format, or one per level, for every operand that has any."""

    def renamed(name):
        return tuple(
            dataclasses.replace(layer, **{op: name for op, own in zip("wag", layer.wag) if own})
            for layer in options.layers
        )

    return format_table(dataclasses.replace(options, layers=renamed(names[0]), emergency_formats=names[1:], **choices))


def fresh(functions, *table):
    return jax.device_get(functions.init(42, *table))


EQUAL_WINDOWS = np.tile(np.arange(8, dtype=np.uint16), len(TOKENS_T) // 8)


def advance(functions, state, n, *table, data=TOKENS_T):
    """(state, rows) after n updates; states live on the host, for `run` is given theirs."""
    inputs = functions.inputs._replace(formats=table[0] if table else functions.inputs.formats)
    state, rows_KM = functions.run(jax.device_put(state), jnp.asarray(data), n, inputs)
    return jax.device_get(state), np.asarray(rows_KM)[:n]


@pytest.fixture(scope="module")
def plain():
    return build()


@pytest.fixture(scope="module")
def master():
    """With the reference gradient, so that whatever equals a run without one proves that it moves nothing."""
    return build(quant=MASTER, reference_gradient=True, reference_interval=3)


@pytest.fixture(scope="module")
def shifted():
    return build(TWO_BLOCKS, quant=SHIFTED, metric_groups=(*GROUPS, "update"))


@pytest.fixture(scope="module")
def accumulated():
    """Rounds G stochastically, so that the noise of two micro-batches shows."""
    options = dataclasses.replace(MASTER, stochastic=(False, False, True))
    return build(quant=options, grad_accum_steps=2, metric_groups=("format",), optimizer="grid")


NAMES = ("E5M2", "E3M4", "E7M0", "E0M7", "E1M6")


@pytest.fixture(scope="module")
def runs(master):
    """{format: (state, rows)} of ten updates with a float32 master, all by one compiled program."""
    tables = {name: named(MASTER, name) for name in NAMES} | {"BF16": named(MASTER, "BF16", saturate=False)}
    return {name: advance(master, fresh(master, table), 10, table) for name, table in tables.items()}


def on_grid(name, scale, w):
    scale = float(np.reshape(scale, ()))
    return round_reference(get_format(name), np.float64(w) * scale) / scale


# One program, and what it computes.


def test_bfloat16_as_a_format_trains_like_the_baseline_bit_for_bit(plain, master, runs):
    """The one with the reference gradient, the other without."""
    state, rows = advance(plain, fresh(plain), 10)
    quantized, quantized_rows = runs["BF16"]
    np.testing.assert_array_equal(column(master, quantized_rows, "loss"), column(plain, rows, "loss"))
    assert_same(quantized.params, state.params)
    assert_same(quantized.opt_state, state.opt_state)


def test_one_program_serves_every_format(master, runs):
    losses = {name: column(master, rows, "loss") for name, (_, rows) in runs.items()}
    assert master.run._cache_size() == 1
    for name, loss in losses.items():
        assert np.isfinite(loss).all()
        for other in set(losses) - {name, "E1M6" if name == "E0M7" else "E0M7" if name == "E1M6" else name}:
            assert (loss[1:] != losses[other][1:]).all()


def test_e0m7_and_e1m6_train_alike_to_the_bit(master, runs):
    """With scales from amaxes they are one grid; codes and scales have other names, so those statistics differ."""
    (one, one_rows), (other, other_rows) = (runs[name] for name in ("E0M7", "E1M6"))
    assert_same(one.params, other.params)
    assert_same(one.opt_state, other.opt_state)
    for name in ("loss", "sparse/sqnr_db/all/G", "sparse/flip", "sparse/update_gain"):
        np.testing.assert_array_equal(column(master, one_rows, name), column(master, other_rows, name))
    np.testing.assert_array_equal(
        column(master, one_rows, "sparse/encode_scale/head/W") * 4,
        column(master, other_rows, "sparse/encode_scale/head/W"),
    )


def bfloat16(v):
    return np.asarray(jnp.asarray(v, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32), np.float64)


def by_own_amax(name):
    return lambda v: reference_quantize(v, get_format(name), "current", 0)[0]


def reference_run(monkeypatch, params, windows, name, attention_rounding):
    """numpy_gpt2 with every operand of the linear layers in a format, scaled by its own amax sequence by sequence."""
    attention = numpy_gpt2.Attention
    with monkeypatch.context() as patch:
        patch.setattr(numpy_gpt2, "Attention", lambda n_head, _: attention(n_head, attention_rounding))
        windows = windows.astype(int)
        return numpy_gpt2.run(params, windows[:, :-1], 2, windows[:, 1:], by_own_amax(name))[1:]


def loud(params):
    """Matrices ten times as large as at the start, so that the rounding of activations shows in the loss."""
    return jax.tree.map(lambda p: np.float32(10 * p) if p.ndim == 2 else p, params)


def first_operands(options, params, table):
    """{group: Operands} before there is any history."""
    formats_Q3 = quantization.formats_at(table, 0)
    weights = {layer: weights_of(params, layer) for layer in options.weight_layers}
    state, _ = quantization.init_state(options, weights, formats_Q3, False)
    return update.operands_at(MODEL, options, None, state, table)


def by_layer_of(tree):
    """{layer: array} of a dictionary {group: array [n, ...]}."""
    return {layer: array[i] for group, array in tree.items() for i, layer in enumerate(layers_of(group))}


@pytest.fixture(scope="module")
def params(plain):
    return loud(fresh(plain).params)


@pytest.fixture(scope="module")
def gradient_of():
    """(loss, gradients, {layer: statistics of G}) of a model with float32 attention and a format in every layer."""
    config = quantization.quantized_model(dataclasses.replace(MODEL, compute_dtype="float32"), EVERYWHERE)

    @jax.jit
    def gradient(params, windows, table):
        operands = first_operands(EVERYWHERE, params, table)

        def of_probes(params, probes):
            return update.loss(config, params, windows, None, Quantized(operands, probes))

        (mean, _), (grads, of_g) = jax.value_and_grad(of_probes, argnums=(0, 1), has_aux=True)(
            params, quantization.g_probes(quantization.groups(EVERYWHERE, MODEL.segments))
        )
        return mean, grads, by_layer_of(of_g)

    return gradient


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E0M7"])
def test_loss_and_gradients_are_those_of_a_straight_through_gpt_in_float64(monkeypatch, params, gradient_of, name):
    """Operands are rounded, once, and nothing else is: not the gradients of the weights, nor those of the biases."""
    window = windows_of(0)[:1]
    loss, grads, of_g = jax.device_get(gradient_of(params, window, named(EVERYWHERE, name)))
    expected_loss, expected = reference_run(monkeypatch, params, window, name, lambda v: v)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    unrounded = numpy_gpt2.run(params, window[:, :-1].astype(int), 2, window[:, 1:].astype(int))[2]
    for path, g in numpy_gpt2.flat(grads).items():
        want, other = numpy_gpt2.flat(expected)[path], numpy_gpt2.flat(unrounded)[path]
        error = np.linalg.norm(g - want)
        assert error < 1e-4 * np.linalg.norm(want), path
        assert path.startswith("pos") or error < 0.02 * np.linalg.norm(g - other), path
    for layer in ALL_LAYERS:
        g = np.asarray(weights_of(grads, layer))
        assert np.mean(on_grid(name, reference_scale(np.abs(g).max(), get_format(name)), g) == g) < 0.5
        n_outputs = weights_of(params, layer).shape[0 if layer == "head" else 1]
        assert dict(zip(FIELDS, of_g[layer]))["count"] == window[:, 1:].size * n_outputs


def test_weights_that_lie_on_the_grid_already_give_the_same_gradient_bit_for_bit(params, gradient_of):
    """What the backward products use is what the forward ones did."""
    rounded = {layer: np.float32(by_own_amax("E4M3")(weights_of(params, layer))) for layer in ALL_LAYERS}
    del rounded["head"]  # lookups in this table round nothing
    table = named(EVERYWHERE, "E4M3")
    changed = with_weights(params, rounded)
    assert_same(*(gradient_of(weights, windows_of(1)[:1], table) for weights in (params, changed)))
    assert all((w != weights_of(params, layer)).mean() > 0.9 for layer, w in rounded.items())


def test_an_evaluation_is_the_quantized_forward_pass(monkeypatch, params, plain):
    windows, table = windows_of(3), named(EVERYWHERE, "E5M2")
    config = quantization.quantized_model(MODEL, EVERYWHERE)
    evaluate = make_evaluate(config, 1, data_mesh(jax.devices()[:1]))
    loss = float(evaluate(params, windows, jax.jit(first_operands, static_argnums=0)(EVERYWHERE, params, table)))
    assert loss == pytest.approx(reference_run(monkeypatch, params, windows, "E5M2", bfloat16)[0], rel=1e-5)
    assert abs(loss - float(plain.evaluate(params, windows))) > 1e-3


def test_an_evaluation_takes_the_scales_of_the_training(params, master, runs):
    state, _ = runs["E5M2"]
    history = np.float32(np.random.default_rng(0).uniform(0.01, 0.1, state.quant.amax_history_Q3H.shape))
    fmt = get_format("E5M2")
    operands = {group_of(layer, MODEL.segments): Operands(*(
                    Operand(FormatParams(*(np.stack([field]) for field in format_params(fmt))),
                            np.float32([reference_scale(amax, fmt)]))
                    for amax in history[q].max(-1)))
                for q, layer in enumerate(MASTER_LAYERS)}  # fmt: skip
    model = quantization.quantized_model(MODEL, MASTER)
    by_hand = jax.jit(lambda params, windows: update.loss(model, params, windows, None, Quantized(operands, {}))[0])
    expected = np.mean([float(by_hand(params, window[None])) for window in windows_of(3)])
    quant, table = state.quant._replace(amax_history_Q3H=history), named(MASTER, "E5M2")
    assert float(master.evaluate(params, windows_of(3), quant, table)) == pytest.approx(expected, rel=1e-6)
    assert float(master.evaluate(params, windows_of(3), state.quant, table)) != pytest.approx(expected, rel=1e-3)


def stacked_start(step, table):
    return update.stacked(step, update.init(step, 0, table))


def test_products_without_a_format_have_the_baseline_s_operands():
    """And those with one have bfloat16 operands, too: every product of the program has the dtypes of the baseline's."""
    programs = []
    baseline = build()
    for quant in (None, EVERYWHERE, dataclasses.replace(MASTER, weights_at_rest="nearest")):
        step = dataclasses.replace(baseline.step, options=dataclasses.replace(baseline.step.options, quant=quant))
        inputs = baseline.inputs._replace(formats=quant and format_table(quant))
        state = jax.eval_shape(functools.partial(stacked_start, step), inputs.formats)
        jaxpr = jax.make_jaxpr(functools.partial(update.train_step, step))(state, windows_of(0), inputs)
        programs.append(list(dot_dtypes(jaxpr.jaxpr)))
    assert programs[0] == programs[1] == programs[2]
    assert len(programs[0]) == 4 * len(ALL_LAYERS) + 6  # weight gradients stand there twice, for a CPU and for others
    for (a, b, _), shapes in programs[0]:
        assert "bfloat16" in (a, b) and (a == b or len(shapes[0]) > 2)  # dq and dk of attention take a float32 operand


# What a step writes down.


def codes(name, scale, w):
    fmt = get_format(name)
    code = encode(fmt, np.float64(w) * float(scale))
    return np.where(code >= fmt.n_magnitudes, fmt.n_magnitudes - code, code)


def test_the_ledger_of_a_float32_master(master):
    """Against the parameters before and after each of five updates; the scale of W changes on the way."""
    table, name = named(MASTER, "E4M3"), "E4M3"
    fmt, state = get_format(name), fresh(master, table)
    history = np.array(state.quant.amax_history_Q3H)
    history[:, 0] = [[3.0, 0.5]]  # amaxes of two earlier updates, soon forgotten
    state = state._replace(quant=state.quant._replace(amax_history_Q3H=history))
    ages = {layer: np.zeros(weights_of(state.params, layer).shape) for layer in MASTER_LAYERS}
    scale_flips = 0
    for _ in range(5):
        before = state
        state, rows = advance(master, state, 1, table)
        moved_everywhere = []
        for q, layer in enumerate(MASTER_LAYERS):
            w, new_w = (weights_of(s.params, layer) for s in (before, state))
            scale, next_scale = (
                reference_scale(float(s.quant.amax_history_Q3H[q, 0].max()), fmt) for s in (before, state)
            )
            assert state.quant.amax_history_Q3H[q, 0, -1] == np.abs(w).max()
            moved = codes(name, scale, w) != codes(name, scale, new_w)
            ages[layer] = np.where(moved, 0, ages[layer] + 1)
            jumped = on_grid(name, scale, new_w) != on_grid(name, next_scale, new_w)
            arrived = on_grid(name, scale, new_w) - on_grid(name, scale, w)
            u = np.float64(new_w) - w
            scale_flips += jumped.sum()
            moved_everywhere.append(moved.ravel())
            np.testing.assert_array_equal(state.quant.age[key_of(layer)], ages[layer])
            for statistic, value in {
                "flip": moved.mean(),
                "scale_flip": jumped.mean(),
                "code_age": ages[layer].mean(),
                "update_gain": (u * arrived).sum() / (u * u).sum(),
            }.items():
                got = column(master, rows, f"sparse/{statistic}/{layer}")[0]
                assert got == pytest.approx(value, rel=1e-4, abs=1e-6), (statistic, layer)
        assert column(master, rows, "sparse/flip")[0] == pytest.approx(np.concatenate(moved_everywhere).mean())
    assert scale_flips > 0


def test_micro_batches_have_the_statistics_of_the_whole_batch(master, accumulated, runs):
    """From the same scales. G is that of each micro-batch's mean loss, so twice as large in two of them."""
    table = named(MASTER, "E0M7")
    state = runs["E0M7"][0]
    history = np.array(state.quant.amax_history_Q3H)
    history[:, 1] *= 0.4  # A clips
    history[:, 2] = 0
    quant = state.quant._replace(amax_history_Q3H=history)
    whole, rows = advance(master, state._replace(quant=quant), 1, table)
    start = fresh(accumulated, table)._replace(step=state.step, params=state.params, quant=quant._replace(age={}))
    parts, part_rows = advance(accumulated, start, 1, table)
    amax, part_amax = (s.quant.amax_history_Q3H[..., -1] for s in (whole, parts))
    np.testing.assert_array_equal(part_amax[:, 0], amax[:, 0])
    np.testing.assert_allclose(part_amax[:, 1], amax[:, 1], rtol=1e-5)
    np.testing.assert_allclose(part_amax[:, 2], 2 * amax[:, 2], rtol=0.2)
    assert part_amax[MASTER_LAYERS.index("head"), 2] == 2 * amax[MASTER_LAYERS.index("head"), 2]
    assert column(accumulated, part_rows, "sparse/amax/head/G") == column(master, rows, "sparse/amax/head/G")
    assert column(accumulated, part_rows, "sparse/amax/head/W") == column(master, rows, "sparse/amax/head/W")
    for layer in (*MASTER_LAYERS, "all"):
        for operand in "WA":  # shares and energies of both halves together, by their numbers of elements
            for statistic in ("underflow", "overflow", "clipped_energy", "sqnr_db"):
                name = f"sparse/{statistic}/{layer}/{operand}"
                one, two = column(master, rows, name)[0], column(accumulated, part_rows, name)[0]
                assert two == pytest.approx(one, rel=2e-3, abs=1e-6), name
                assert operand == "W" or statistic == "sqnr_db" or one > 0, name
    share = column(master, rows, "sparse/overflow/block_0/attn_qkv/A")[0]
    assert column(master, rows, "alert/overflow/block_0/attn_qkv/A")[0] == share > 0.01
    assert column(master, rows, "alert/overflow/block_0/attn_qkv/G")[0] == 0


def test_micro_batches_have_a_noise_of_their_own(accumulated):
    """All windows of these data are equal: were the noise, too, both would flush as many elements, an even number."""
    table, odd, in_all = named(MASTER, "E0M7"), 0, 0
    for step in range(5):
        start = fresh(accumulated, table)._replace(step=np.int32(step))
        _, rows = advance(accumulated, start, 1, table, data=EQUAL_WINDOWS)
        for layer in MASTER_LAYERS:
            n_outputs = 64 if layer == "head" else weights_of(start.params, layer).shape[1]
            flushed = column(accumulated, rows, f"sparse/underflow/{layer}/G")[0] * 32 * n_outputs
            assert flushed == pytest.approx(round(flushed), abs=1e-2)
            odd, in_all = odd + round(flushed) % 2, in_all + flushed
    assert odd > 0 and in_all > 100


# The reference gradient.


def elements(tree):
    return np.concatenate([np.ravel(v) for _, v in sorted(numpy_gpt2.flat(tree).items())]).astype(np.float64)


def fidelity(g, r):
    return {"grad_cosine": g @ r / np.sqrt((g @ g) * (r @ r)), "grad_flushed": ((g == 0) & (r != 0)).mean(),
            "grad_sqnr_db": 10 * np.log10((r @ r) / ((g - r) @ (g - r)))}  # fmt: skip


def first_gradient(functions, start, *table):
    """Of the first update: its first moment is 0.1 of the clipped gradient."""
    state, rows = advance(functions, start, 1, *table)
    factor = column(functions, rows, "grad_norm_clipped")[0] / column(functions, rows, "grad_norm")[0]
    assert factor < 0.9
    return jax.tree.map(lambda m: m / (np.float32(1 - 0.9) * factor), state.opt_state[0].mu)


def test_the_step_is_compared_with_the_float64_gradient(plain, master, runs):
    table = named(MASTER, "E5M2")
    rows = runs["E5M2"][1]
    compared = column(master, rows, "sparse/grad_cosine")
    assert np.flatnonzero(np.isfinite(compared)).tolist() == [0, 3, 6, 9]
    start = fresh(master, table)
    gradient, baseline = first_gradient(master, start, table), first_gradient(plain, fresh(plain))
    tokens, targets = windows_of(0)[:, :-1].astype(int), windows_of(0)[:, 1:].astype(int)
    reference = numpy_gpt2.run(start.params, tokens, 2, targets)[2]
    for suffix, found in (("", gradient), ("_bfloat16", baseline)):
        parts = [("", found, reference)]
        parts += [(f"/{layer}", arrays, by_layer(reference)[layer]) for layer, arrays in by_layer(found).items()]
        for layer, g, r in parts:
            for statistic, value in fidelity(elements(g), elements(r)).items():
                got = column(master, rows, f"sparse/{statistic}{suffix}{layer}")[0]
                assert got == pytest.approx(value, rel=1e-3, abs=2e-3), (statistic, suffix, layer)
    assert compared[0] < 0.999 < column(master, rows, "sparse/grad_cosine_bfloat16")[0]


# Weights at rest, and every optimizer.

AT_REST = {"stochastic": ("ulp_adamw", {"saturate": False}),
           "error_feedback": ("ulp_precondition_before_adam", {"stochastic": (False, True, True)})}  # fmt: skip


@functools.cache
def at_rest(way):
    """(functions, options) of a way of storing weights, each with another optimizer."""
    optimizer, choices = AT_REST[way]
    options = dataclasses.replace(STORED, weights_at_rest=way, **choices)
    return build(TWO_BLOCKS, quant=options, optimizer=optimizer, metric_groups=("ledger",)), options


def assert_on_grid(state, formats):
    for layer, name in formats.items():
        w = weights_of(state.params, layer)
        np.testing.assert_array_equal(w, on_grid(name, state.quant.rest_scale[key_of(layer)], w), err_msg=layer)
        assert np.unique(w).size > 20


@pytest.mark.parametrize("way", AT_REST)
def test_stored_weights_stay_on_their_grid_and_runs_repeat(way):
    functions, options = at_rest(way)
    table = format_table(options)
    start = fresh(functions, table)
    assert_on_grid(start, STORED_FORMATS)
    state, rows = advance(functions, start, 5, table)
    assert_on_grid(state, STORED_FORMATS)
    again, again_rows = advance(functions, start, 5, table)
    assert_same(again, state)
    np.testing.assert_array_equal(again_rows, rows)
    assert np.isfinite(elements(state.params)).all() and np.isfinite(column(functions, rows, "loss")).all()
    owed = way == "error_feedback"
    assert set(state.quant.residual) == ({key_of(layer) for layer in STORED_FORMATS} if owed else set())
    for key, residual in state.quant.residual.items():
        assert residual.dtype == jnp.bfloat16 and np.mean(np.float32(residual) != 0) > 0.5, key
    for layer in STORED_FORMATS:
        assert (weights_of(state.params, layer) != weights_of(start.params, layer)).any()
    for layer in ("block_0/attn_qkv", "block_0/attn_out", "block_1/mlp_up", "head"):
        w = weights_of(state.params, layer)
        assert np.mean(on_grid("E4M3", reference_scale(np.abs(w).max(), get_format("E4M3")), w) == w) < 0.1


def test_training_rounds_operands_stochastically_where_it_is_asked_to(shifted):
    """From one initial state; how weights are kept does not show in the first loss."""
    losses = []
    for functions, options in ((shifted, SHIFTED), at_rest("stochastic"), at_rest("error_feedback")):
        table = format_table(options)
        losses.append(column(functions, advance(functions, fresh(functions, table), 1, table)[1], "loss")[0])
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize("way", ["nearest", *AT_REST])
def test_stored_weights_of_e0m7_and_e1m6_are_the_same(shifted, way):
    """Noise included: of the weights where they are rounded stochastically, of A and G with error feedback."""
    functions, options = (shifted, SHIFTED) if way == "nearest" else at_rest(way)
    ended = []
    for name in ("E0M7", "E1M6"):
        table = named(options, name, *options.emergency_formats, saturate=True)
        ended.append(advance(functions, fresh(functions, table), 6, table))
    (one, one_rows), (other, other_rows) = ended
    one_loss, other_loss = (column(functions, rows, "loss") for rows in (one_rows, other_rows))
    if way == "error_feedback":  # its optimizer tells mantissas of 7 and 6 bits apart from the first update on
        assert one_loss[0] == other_loss[0]
    else:
        assert_same(one.params, other.params)
        np.testing.assert_array_equal(one_loss, other_loss)


def adam_step(state, layer, rate, ulps=None):
    """The update that led to this state, from its moments and the weights before, float64 and without weight decay."""
    moments = adam_moments(state.opt_state)
    mu, nu = (np.float64(weights_of(tree, layer)) for tree in (moments.mu, moments.nu))
    count = int(moments.count)
    direction = mu / (1 - 0.9**count) / (np.sqrt(nu / (1 - 0.95**count)) + 1e-8)
    if ulps is not None:
        u = np.maximum(ulps / ulps.max(), 2.0**-8)
        direction = direction * u / np.sqrt(np.mean(u**2))
    return -rate * direction


def updates_of(functions, start, n, table, formats, in_ulps=False):
    """For n updates, one by one: (state before, state after, row, {layer: update in float64})."""
    for _ in range(n):
        state, rows = advance(functions, start, 1, table)
        rate, updates = column(functions, rows, "learning_rate")[0], {}
        for layer, name in formats.items():
            w, scale = weights_of(start.params, layer), start.quant.rest_scale[key_of(layer)]
            ulps = reference_ulp(name, scale, w) if in_ulps else None
            updates[layer] = adam_step(state, layer, rate, ulps) - rate * 0.1 * w
        yield start, state, rows, updates
        start = state


def test_nearest_stores_the_number_nearest_to_the_weight_and_its_update(shifted, warm):
    for before, after, _, updates in updates_of(shifted, warm[0], 3, format_table(SHIFTED), STORED_FORMATS):
        for layer, name in STORED_FORMATS.items():
            expected = on_grid(name, after.quant.rest_scale[key_of(layer)], weights_of(before.params, layer)
                               + updates[layer])  # fmt: skip
            assert np.mean(weights_of(after.params, layer) == expected) > 0.99  # but for ties in float32


def test_error_feedback_keeps_the_rest_of_every_update_and_counts_only_what_it_lost():
    functions, options = at_rest("error_feedback")
    table = format_table(options)
    start, _ = advance(functions, fresh(functions, table), 2, table)
    for before, after, rows, updates in updates_of(functions, start, 3, table, STORED_FORMATS):
        for layer, name in STORED_FORMATS.items():
            w, new_w = (np.float64(weights_of(state.params, layer)) for state in (before, after))
            owed, still_owed = (np.float64(state.quant.residual[key_of(layer)]) for state in (before, after))
            sum_of_all = w + owed + updates[layer]
            rounding = 2.0**-8 * np.abs(still_owed).max()
            np.testing.assert_allclose(new_w + still_owed, sum_of_all, rtol=1e-4, atol=rounding)
            scale = after.quant.rest_scale[key_of(layer)]
            stayed = codes(name, scale, w) == codes(name, scale, new_w)
            lost = column(functions, rows, f"sparse/lost_update/{layer}")[0]
            assert lost == pytest.approx(np.mean(stayed & (owed == still_owed) & (updates[layer] != 0)), abs=1e-6)


def test_stochastic_storing_is_unbiased_with_noise_of_its_own_for_every_layer_and_update():
    """Whether each weight was rounded up, against the fraction of its way to the next number."""
    functions, options = at_rest("stochastic")
    table, z = format_table(options), {}
    steps = updates_of(functions, fresh(functions, table), 2, table, STORED_FORMATS, in_ulps=True)
    for step, (before, after, _, updates) in enumerate(steps):
        for layer, name in STORED_FORMATS.items():
            scale = float(after.quant.rest_scale[key_of(layer)])
            target = (weights_of(before.params, layer) + updates[layer]) * scale
            low, high = neighbours(get_format(name), target)
            new_w = np.float64(weights_of(after.params, layer)) * scale
            between = high > low  # not beyond the largest number, and not on one
            share = np.divide(target - low, high - low, out=np.zeros_like(target), where=between)
            settled = np.minimum(share, 1 - share) < 1e-3  # where float32 may see another neighbour
            assert np.all((new_w == low) | (new_w == high) | settled)
            score = np.where(settled, 0, ((new_w == high) - share) / np.sqrt(np.clip(share * (1 - share), 1e-4, 1)))
            z[layer, step] = (np.sign(target) * score).ravel()  # noise adds to magnitudes
            assert np.mean((new_w == high) != (share > 0.5)) > 0.02
            assert abs(score.mean()) < 5 / np.sqrt(score.size)
    pairs = [((layer, 0), (layer, 1)) for layer in STORED_FORMATS]
    pairs += [tuple((layer, step) for layer in STORED_FORMATS) for step in range(2)]
    for one, other in pairs:
        assert abs(np.corrcoef(z[one], z[other])[0, 1]) < 5 / np.sqrt(z[one].size), (one, other)


def test_stochastic_operands_have_another_noise_at_every_update():
    """All windows of these data are equal, so that only the noise can make the loss of an update differ."""
    for way, differs in (("error_feedback", True), ("stochastic", False)):
        functions, options = at_rest(way)
        table = format_table(options)
        losses = []
        for step in (0, 1, 7):
            start = fresh(functions, table)._replace(step=np.int32(step))
            losses.append(column(functions, advance(functions, start, 1, table, data=EQUAL_WINDOWS)[1], "loss")[0])
        assert len(set(losses)) == (3 if differs else 1)


def test_the_optimizers_not_tried_above_run_and_repeat(accumulated):
    assert {optimizer for optimizer, _ in AT_REST.values()} | {"adamw", "grid", "ulp_adamw_mean"} == set(OPTIMIZERS)
    table = named(MASTER, "E4M3")
    start = fresh(accumulated, table)
    state, rows = advance(accumulated, start, 5, table)
    assert np.isfinite(elements(state.params)).all() and np.isfinite(column(accumulated, rows, "loss")).all()
    assert_same(advance(accumulated, start, 5, table)[0], state)
    for layer in ALL_LAYERS:  # weights with a grid move by whole ULPs, some of them not at all
        still = np.mean(weights_of(state.params, layer) == weights_of(start.params, layer))
        assert (still > 0.01) == (layer in MASTER_LAYERS), (layer, still)


def test_an_evaluation_rounds_to_nearest_where_training_rounds_stochastically(shifted):
    functions, options = at_rest("error_feedback")
    table = format_table(options)
    state = fresh(functions, table)
    params, windows = loud(state.params), windows_of(2)
    quant = state.quant._replace(rest_scale={key: scale / 16 for key, scale in state.quant.rest_scale.items()})
    loss = float(functions.evaluate(params, windows, quant, table))
    quant = quant._replace(residual={}, age={})
    nearest = shifted.evaluate(params, windows, quant, format_table(SHIFTED))
    assert loss == float(nearest)


# Bad steps.


def spoilt(state, value=np.nan):
    """The state with one element of the final LayerNorm damaged, which no format touches."""
    params = jax.tree.map(np.array, state.params)
    params["ln_f"]["scale"][3] = value
    return state._replace(params=params)


def assert_only_counted(before, after, saturate=True):
    """Without saturation the histories do take the amaxes that are finite."""
    assert_same(after.params, before.params)
    assert_same(after.opt_state, before.opt_state)
    if not saturate:
        after = after._replace(quant=after.quant._replace(amax_history_Q3H=before.quant.amax_history_Q3H))
    assert_same(after.quant, before.quant)
    assert int(after.step) == int(before.step) + 1 and int(after.monitor.bad_steps) == 1


def test_a_non_finite_step_changes_no_weight_no_history_and_no_age(master, runs):
    table = named(MASTER, "E5M2")
    for value in (np.nan, np.inf):
        before = spoilt(runs["E5M2"][0], value)
        after, rows = advance(master, before, 1, table)
        assert column(master, rows, "nonfinite_loss")[0] == 1
        assert_only_counted(before, after)
    repaired = after._replace(params=runs["E5M2"][0].params)
    later, rows = advance(master, repaired, 2, table)
    assert np.isfinite(column(master, rows, "loss")).all() and int(later.monitor.bad_steps) == 1
    assert (later.quant.amax_history_Q3H != repaired.quant.amax_history_Q3H).any()


@pytest.mark.parametrize("way", AT_REST)
def test_a_non_finite_step_changes_no_stored_weight_no_scale_and_no_residual(way):
    functions, options = at_rest(way)
    table = format_table(options)
    state, _ = advance(functions, fresh(functions, table), 2, table)
    before = spoilt(state)
    after, _ = advance(functions, before, 1, table)
    assert_only_counted(before, after, options.saturate)
    later, rows = advance(functions, after._replace(params=state.params), 2, table)
    assert np.isfinite(column(functions, rows, "loss")).all()
    assert_on_grid(later, STORED_FORMATS)


def test_without_saturation_a_history_that_is_too_small_costs_one_update():
    """What overflows becomes NaN in E4M3. Its amax must enter all the same, or later updates would overflow as well."""
    functions, options = at_rest("stochastic")
    table = format_table(options)
    start, _ = advance(functions, fresh(functions, table), 2, table)
    history = np.array(start.quant.amax_history_Q3H)
    activations = next(q for q, layer in enumerate(options.layers) if layer.a)
    amax = history[activations, 1].max()
    history[activations, 1] = 1e-6
    start = start._replace(quant=start.quant._replace(amax_history_Q3H=history))
    state, rows = advance(functions, start, 1, table)
    assert column(functions, rows, "nonfinite_loss")[0] == 1
    assert_only_counted(start, state, saturate=False)
    assert state.quant.amax_history_Q3H[activations, 1, -1] == pytest.approx(amax, rel=0.5)
    state, rows = advance(functions, state, 2, table)
    assert np.isfinite(column(functions, rows, "loss")).all() and int(state.monitor.bad_steps) == 1


# The emergency shift.


def with_losses(state, losses, initial_loss):
    return state._replace(
        monitor=state.monitor._replace(
            losses_W=np.float32(losses), seen=np.int32(len(losses)), initial_loss=np.float32(initial_loss)
        )
    )


def bad_states(state):
    """States whose next updates are bad, by what makes them so, and at which of them the level rises."""
    low = 1e-3 * np.random.default_rng(0).uniform(1, 1.1, 30)
    return {
        "non-finite": (spoilt(state), 2),
        "spike": (with_losses(state, low, 9.0), 2),
        "divergence": (with_losses(state, np.full(30, 4.2), 0.5), 3),
    }  # by the alarms of the update before


@pytest.fixture(scope="module")
def warm(shifted):
    table = format_table(SHIFTED)
    return advance(shifted, fresh(shifted, table), 3, table)


def test_good_updates_shift_nothing(shifted, warm):
    state, rows = warm
    assert state.quant.level == state.quant.bad_streak == 0
    assert not column(shifted, rows, "format_level").any() and not column(shifted, rows, "alert/format_shift").any()
    assert_on_grid(state, STORED_FORMATS)


UPDATE = ("update_norm", "zero_update", "requested_update_norm", "requested_zero_update")


def test_what_stored_weights_lost_raises_an_alert(shifted, warm):
    """Four updates that lost everything and this one; the ring begins at the slot that this update fills."""
    state, table = warm[0], format_table(SHIFTED)
    lost_WS, zero_WS = (np.ones_like(ring) for ring in (state.monitor.lost_WS, state.monitor.zero_update_WS))
    monitor = state.monitor._replace(lost_WS=lost_WS, zero_update_WS=zero_WS, seen=np.int32(10))
    after, rows = advance(shifted, state._replace(monitor=monitor), 1, table)
    for layer in STORED_FORMATS:
        lost = column(shifted, rows, f"sparse/lost_update/{layer}")[0]
        assert column(shifted, rows, f"alert/bit_stall/{layer}")[0] == pytest.approx((4 + lost) / 5) and lost < 1
        # A stored weight that did not move is a stalled update, though another was asked for.
        of_layer = "embed" if layer == "head" else layer
        one = {name: column(shifted, rows, f"{name}/{of_layer}")[0] for name in UPDATE}
        w, new_w = (np.float64(weights_of(s.params, layer)) for s in (state, after))
        group, _, part = of_layer.rpartition("/")
        arrays = after.params[group][part] if group else after.params[part]
        share = w.size / elements(arrays).size
        assert one["zero_update"] == pytest.approx(one["requested_zero_update"] + share * lost, abs=1e-6)
        assert one["zero_update"] == pytest.approx(np.sum(w == new_w) / elements(arrays).size, rel=1e-5)
        assert one["zero_update"] > one["requested_zero_update"] + 0.02
        assert column(shifted, rows, f"alert/update_stall/{of_layer}")[0] == pytest.approx((4 + one["zero_update"]) / 5)
        biases = 0 if part == "embed" else np.linalg.norm(arrays["bias"] - (state.params[group][part])["bias"])
        assert one["update_norm"] == pytest.approx(np.hypot(np.linalg.norm(new_w - w), biases), rel=1e-4)
        assert one["update_norm"] != pytest.approx(one["requested_update_norm"], rel=1e-3)
    assert column(shifted, rows, "update_norm/ln_f") == column(shifted, rows, "requested_update_norm/ln_f")


@pytest.mark.parametrize("factor", [1 / 8, 1.0, 4.0])
def test_the_ledger_of_stored_weights_whose_scale_moves(shifted, warm, factor):
    """From a grid that is too coarse, fitting, or too fine to hold the largest weights."""
    before, params = warm[0], warm[0].params
    scales = {key: np.float32(scale * factor) for key, scale in before.quant.rest_scale.items()}
    if factor < 1:
        coarse = {layer: np.float32(on_grid(name, scales[key_of(layer)], weights_of(params, layer)))
                  for layer, name in STORED_FORMATS.items()}  # fmt: skip
        params = with_weights(params, coarse)
    before = before._replace(params=params, quant=before.quant._replace(rest_scale=scales))
    after, rows = advance(shifted, before, 1, format_table(SHIFTED))
    for layer, name in STORED_FORMATS.items():
        key = key_of(layer)
        w, new_w = (weights_of(state.params, layer) for state in (before, after))
        scale = after.quant.rest_scale[key]
        assert (scale != scales[key]) == (factor != 1)
        moved = codes(name, scale, w) != codes(name, scale, new_w)
        jumped = on_grid(name, scales[key], w) != on_grid(name, scale, w)
        assert 0 < moved.mean() < 1 and jumped.any() == (factor > 1)
        ages = np.where(moved, 0, before.quant.age[key] + 1)
        np.testing.assert_array_equal(after.quant.age[key], ages)
        for statistic, value in {
            "flip": moved.mean(),
            "lost_update": 1 - moved.mean(),
            "scale_flip": jumped.mean(),
            "code_age": ages.mean(),
        }.items():
            got = column(shifted, rows, f"sparse/{statistic}/{layer}")[0]
            assert got == pytest.approx(value, rel=1e-5, abs=1e-6), (statistic, layer)


@pytest.mark.parametrize("kind", ["non-finite", "spike", "divergence"])
def test_bad_updates_in_a_row_shift_every_operand_to_the_next_format(shifted, warm, kind):
    table = format_table(SHIFTED)
    start, n = bad_states(warm[0])[kind]
    waiting, _ = advance(shifted, start, n - 1, table)
    assert waiting.quant.level == 0 and waiting.quant.bad_streak == 1
    shifted_state, rows = advance(shifted, start, n, table)
    assert shifted_state.quant.level == 1 and shifted_state.quant.bad_streak == 0
    assert column(shifted, rows, "format_level").tolist() == [0] * n  # what these updates were computed in
    assert column(shifted, rows, "alert/format_shift").tolist() == [0] * (n - 1) + [1]
    # Stored weights lie on the new grid, at a scale of their own.
    assert_on_grid(shifted_state, dict.fromkeys(STORED_FORMATS, "E3M4"))
    fmt = get_format("E3M4")
    for layer in STORED_FORMATS:
        w, key = weights_of(shifted_state.params, layer), key_of(layer)
        assert np.abs(w).max() * shifted_state.quant.rest_scale[key] <= fmt.max_finite
        assert column(shifted, rows, f"alert/scale_moved/{layer}")[-1] == shifted_state.quant.rest_scale[key]
        if kind == "non-finite":  # no update was applied, so these are the old weights, rounded
            old = weights_of(start.params, layer)
            scale = reference_scale(float(np.abs(old).max()), fmt)
            assert shifted_state.quant.rest_scale[key] == scale
            np.testing.assert_array_equal(w, on_grid("E3M4", scale, old))
    # From there on the run, and an evaluation, is that of a table which says E3M4 throughout.
    healthy = shifted_state._replace(monitor=warm[0].monitor)
    if kind == "non-finite":
        healthy.params["ln_f"] = warm[0].params["ln_f"]
    after, rows = advance(shifted, healthy, 4, table)
    other = healthy._replace(quant=healthy.quant._replace(level=np.int32(0)))
    expected, expected_rows = advance(shifted, other, 4, named(SHIFTED, "E3M4", "E3M4"))
    np.testing.assert_array_equal(column(shifted, rows, "loss"), column(shifted, expected_rows, "loss"))
    assert_same(after.params, expected.params)
    losses = [shifted.evaluate(state.params, windows_of(2), state.quant, of) for state, of in
              ((after, table), (expected, named(SHIFTED, "E3M4", "E3M4")))]  # fmt: skip
    assert losses[0] == losses[1]
    assert (column(shifted, rows, "format_level") == 1).all() and not column(shifted, rows, "alert/format_shift").any()
    assert shifted.run._cache_size() == 1


def test_a_shift_chooses_the_scale_of_stored_weights_anew(shifted):
    """Also where the old one would do: the first format ends at 240 and the second at 448, not twice as far."""
    table = named(SHIFTED, "E4M3_IEEE", "E4M3")
    start = spoilt(fresh(shifted, table))
    state, _ = advance(shifted, start, 2, table)
    assert state.quant.level == 1
    doubled = []
    for layer in STORED_FORMATS:
        scale, w = state.quant.rest_scale[key_of(layer)], weights_of(start.params, layer)
        assert scale == reference_scale(float(np.abs(w).max()), get_format("E4M3"))
        doubled.append(scale == 2 * start.quant.rest_scale[key_of(layer)])
    assert any(doubled)


def test_the_last_format_is_kept(shifted, warm):
    """Bad updates that no level is left for change nothing more."""
    state = warm[0]._replace(quant=warm[0].quant._replace(level=np.int32(1)))
    low = 1e-3 * np.random.default_rng(0).uniform(1, 1.1, 30)
    state, rows = advance(shifted, with_losses(state, low, 9.0), 5, format_table(SHIFTED))
    assert state.quant.level == 1 and state.quant.bad_streak == 5
    assert not column(shifted, rows, "alert/format_shift").any()


# Settings that must go together.


def test_stored_weights_need_no_ledger_among_the_metrics():
    functions = build(TWO_BLOCKS, quant=dataclasses.replace(STORED, weights_at_rest="nearest"), metric_groups=())
    assert not any(name.startswith("sparse/lost_update") for name in functions.metric_names)


def test_scales_per_channel_of_a_head_that_has_the_shape_of_another_layer():
    functions = build(quant=dataclasses.replace(MASTER, scaling=("rowwise", "current", "current")))
    assert "sparse/flip/head" in functions.metric_names
