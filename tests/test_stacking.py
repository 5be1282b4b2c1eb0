"""Blocks taken together: the layout of their arrays, and that a step computes what it does with blocks apart."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_products_formats import reference_scale
from test_step import THRESHOLDS

from altgrad_jax.models import stacking
from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.models.model import forward, init_params
from altgrad_jax.models.parameters import weights_of
from altgrad_jax.numerics import optimizers
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.products import Operand, Operands, Rule, empty_statistics, quant_dot
from altgrad_jax.numerics.rounding import format_params
from altgrad_jax.numerics.rules import resolve_rules
from altgrad_jax.step import quantization, update
from altgrad_jax.step.mesh import DATA, FSDP, data_mesh, split_like_parameters
from altgrad_jax.step.quantization import QuantOptions, format_table

MODEL = GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=64, compute_dtype="float32")
PARTS = ("attn_qkv", "attn_out", "mlp_up", "mlp_down")
APART = ((0, 1), (1, 2), (2, 3))
WINDOWS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (4, MODEL.block_size + 1)).astype(np.uint16)
fresh_params = jax.jit(init_params, static_argnums=0)


def filled(tree, seed=0):
    """The tree with a different number in every element of every array, as far as its dtype allows."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.integers(0, 2**15, leaf.shape).astype(leaf.dtype), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def step_of(plain=MODEL, **options):
    options = (
        dict(
            batch_size=4, steps_per_dispatch=1, learning_rate=1e-2, max_steps=10, warmup_steps=1, thresholds=THRESHOLDS
        )
        | options
    )
    return update.Step(plain, update.StepOptions(**options), data_mesh(jax.devices()[:1]), 10, 4)


# The layout.


def test_names_of_groups():
    assert stacking.segment_key(2, 5) == "block_2:5"
    assert stacking.layers_of("block_2:5/mlp_up") == ("block_2/mlp_up", "block_3/mlp_up", "block_4/mlp_up")
    assert stacking.layers_of("block_9:11") == ("block_9", "block_10")
    assert stacking.layers_of("block_9:11.ln_1") == ("block_9.ln_1", "block_10.ln_1")
    assert stacking.layers_of("head") == ("head",)
    segments = ((0, 2), (2, 12))
    for layer in ("embed", "ln_f", "head", "block_1/mlp_up", "block_2.mlp_up", "block_11"):
        assert layer in stacking.layers_of(stacking.group_of(layer, segments))
    assert stacking.group_of("block_11.mlp_up", segments) == "block_2:12.mlp_up"
    with pytest.raises(ValueError, match="block_12"):
        stacking.group_of("block_12/ln_1", segments)


@pytest.mark.parametrize("segments", [((0, 12),), ((0, 1), (1, 11), (11, 12)), tuple((i, i + 1) for i in range(12))])
def test_parameters_are_stacked_and_unstacked(segments):
    """Twelve blocks, of which block_10 must not come before block_2."""
    params = filled(jax.eval_shape(partial(init_params, dataclasses.replace(MODEL, n_layer=12), 0)))
    stacked = stacking.stack(params, segments)
    assert set(stacked) == {"embed", "pos_embed", "ln_f"} | {f"block_{a}:{b}" for a, b in segments}
    for first, end in segments:
        group = stacked[f"block_{first}:{end}"]
        for part, arrays in params["block_0"].items():
            for name in arrays:
                expected = np.stack([params[f"block_{i}"][part][name] for i in range(first, end)])
                np.testing.assert_array_equal(group[part][name], expected)
    assert_same(stacking.unstack(stacked), params)
    assert_same(stacking.stack(stacking.unstack(stacked), segments), stacked)
    in_a_tuple = stacking.stack((params, {"count": np.int32(3)}, ()), segments)  # as in an optimizer's state
    assert_same(in_a_tuple, (stacked, {"count": np.int32(3)}, ()))
    is_stacked = stacking.stacked_arrays(in_a_tuple)
    for path, found in jax.tree_util.tree_flatten_with_path(is_stacked)[0]:
        assert found == any(str(getattr(key, "key", "")).startswith("block_") for key in path), path


SOME = ("E4M3", "block_1/attn_out=none", "block_1/mlp_up:W=none", "block_0/*=none", "head=E5M2")
STATES = {
    "without formats": {},
    "adamw": dict(quant=QuantOptions(resolve_rules(("E4M3",), 3))),
    "ulp_adamw": dict(
        quant=QuantOptions(resolve_rules(SOME, 3), weights_at_rest="error_feedback"), optimizer="ulp_adamw"
    ),
    "grid": dict(quant=QuantOptions(resolve_rules(SOME, 3), weights_at_rest="stochastic"), optimizer="grid"),
    "grid of one part": dict(quant=QuantOptions(resolve_rules(("block_*/mlp_up=E4M3",), 3)), optimizer="grid"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_is_stacked_and_unstacked(name):
    """Whatever the optimizer keeps, and whichever layers have formats."""
    options = STATES[name]
    quant = options.get("quant")
    step = step_of(quantization.layout(MODEL, quant), **options)
    table = None if quant is None else format_table(quant)
    state = filled(jax.eval_shape(partial(update.init, step, 0), table))
    stacked = update.stacked(step, state)
    assert_same(update.unstacked(step, stacked), state)
    assert step.plain.segments == (
        ((0, 1), (1, 2), (2, 3)) if quant and quant.layers[0].layer[:7] != "block_0" else ((0, 3),)
    )
    # The optimizer's own state of stacked parameters has this form, so that it can go on from it.
    assert jax.tree.structure(stacked.opt_state) == jax.tree.structure(
        jax.eval_shape(step.update_rule.init, stacked.params)
    )
    for first, end in step.plain.segments:
        for layer, streak in stacked.monitor.dead_streak.items():
            if layer.startswith(f"block_{first}:{end}/"):
                assert streak.shape[0] == end - first
    if quant is not None:
        groups = [group for group in step.groups if group.has[0]]
        assert set(stacked.quant.age) == {group.key for group in groups}
        for group in groups:
            for i, layer in enumerate(stacking.layers_of(group.name)):
                age = state.quant.age[quantization.key_of(layer)]
                np.testing.assert_array_equal(stacked.quant.age[group.key][i], age)
        assert set(stacked.quant.rest_scale) == ({group.key for group in groups} if quant.stored else set())


# What a model computes, against a loop over its blocks.


def norm(x, arrays):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * arrays["scale"] + arrays["bias"]


def loop_loss(params, probes, windows, operands, rules):
    """(loss, ({layer: Statistics}, largest magnitudes)) of a GPT-2 as a loop; all keyed by layer."""
    tokens, targets = windows[:, :-1].astype(int), windows[:, 1:].astype(int)
    statistics, amax = {}, []

    def product(layer, x, w, w_is_NK=False):
        if layer not in rules:
            return quant_dot(x, w, w_is_NK=w_is_NK, compute_dtype="float32")
        y, statistics[layer] = quant_dot(
            x,
            w,
            w_is_NK=w_is_NK,
            compute_dtype="float32",
            rule=rules[layer],
            operands=operands[layer],
            g_probe=probes.get(layer),
        )
        return y

    def linear(block, part, x):
        arrays = params[f"block_{block}"][part]
        return product(f"block_{block}/{part}", x, arrays["kernel"]) + arrays["bias"]

    x = params["embed"]["embedding"][tokens] + params["pos_embed"]["embedding"][: tokens.shape[1]]
    B, L, D = x.shape
    for i in range(MODEL.n_layer):
        block = params[f"block_{i}"]
        qkv = linear(i, "attn_qkv", norm(x, block["ln_1"])).reshape(B, L, 3, MODEL.n_head, D // MODEL.n_head)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("blhc,bthc->bhlt", q, k, precision="highest") / np.sqrt(D // MODEL.n_head)
        scores = jnp.where(np.tril(np.ones((L, L), bool)), scores, -jnp.inf)
        a = jnp.einsum("bhlt,bthc->blhc", jax.nn.softmax(scores), v, precision="highest").reshape(B, L, D)
        x = x + linear(i, "attn_out", a)
        x = x + linear(i, "mlp_down", jax.nn.gelu(linear(i, "mlp_up", norm(x, block["ln_2"])), approximate=True))
        amax.append(jnp.abs(x).max())
    logits = product("head", norm(x, params["ln_f"]), params["embed"]["embedding"], w_is_NK=True)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return -chosen.mean(), (statistics, jnp.stack(amax))


def operands_by_hand(options, history_Q3H):
    """{layer: Operands} with the scales of these histories."""

    def operand(name, amax):
        fmt = None if name is None else get_format(name)
        return fmt and Operand(format_params(fmt), np.float32(reference_scale(float(amax), fmt)))

    return {
        layer.layer: Operands(*(operand(name, history_Q3H[q, i].max()) for i, name in enumerate(layer.wag)))
        for q, layer in enumerate(options.layers)
    }


@pytest.mark.parametrize(
    "rules, segments",
    [
        (("E4M3", "block_0/*=none"), ((0, 1), (1, 3))),
        (("E4M3", "block_2/*=E5M2", "block_1/*:G=E3M4", "head=E4M3"), ((0, 3),)),
        (("block_*/mlp_up=E4M3", "block_1/mlp_up:G=none", "block_2/attn_out:W=E3M4"), APART),
    ],
)
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
def test_a_pass_is_that_of_a_loop_over_the_blocks(rules, segments, unroll):
    """Loss, gradients, activations and the statistics of every operand, with scales that differ from block to block."""
    options = QuantOptions(resolve_rules(rules, 3), amax_history=2)
    plain = dataclasses.replace(quantization.layout(MODEL, options), unroll=unroll)
    step = step_of(plain, quant=options)
    assert step.plain.segments == segments
    table = format_table(options)
    state = jax.jit(update.init, static_argnums=0)(step, 0, table)
    params = jax.tree.map(lambda p: p * 5 if p.ndim == 2 else p + 0.1, state.params)
    history = np.float32(np.random.default_rng(1).uniform(0.02, 2, state.quant.amax_history_Q3H.shape))
    state = state._replace(params=params, quant=state.quant._replace(amax_history_Q3H=jnp.asarray(history)))
    inputs = update.Inputs(np.int32(0), np.float32(1e-2), table)

    @jax.jit
    def by_step(state, inputs):
        stacked = update.stacked(step, state)
        formats = update.formats_of(step, stacked, inputs)
        found = update.gradients(step, step.model, stacked.params, update.Batch(WINDOWS, state.step, 0), formats)
        return found._replace(grads=stacking.unstack(found.grads))

    rule_of = {layer.layer: Rule("delayed", "delayed", "delayed") for layer in options.layers}
    probes = {layer.layer: empty_statistics() for layer in options.layers if layer.g}
    by_loop = jax.jit(jax.value_and_grad(partial(loop_loss, rules=rule_of), argnums=(0, 1), has_aux=True))
    found = by_step(state, inputs)
    (loss, (forward, amax)), (grads, of_g) = by_loop(params, probes, WINDOWS, operands_by_hand(options, history))
    np.testing.assert_allclose(found.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(found.output.act_amax_N, amax, rtol=1e-5)
    assert jax.tree.structure(found.grads) == jax.tree.structure(grads)
    for (path, got), want in zip(
        jax.tree_util.tree_flatten_with_path(found.grads)[0], jax.tree.leaves(grads), strict=True
    ):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 1e-4 or np.linalg.norm(want) < 1e-6, (jax.tree_util.keystr(path), error)
    absent = np.asarray(empty_statistics())
    for q, layer in enumerate(options.layers):
        expected = (*forward[layer.layer], of_g.get(layer.layer))
        for i, vector in enumerate(expected):
            assert (vector is None) == (layer.wag[i] is None)
            vector = absent if vector is None else vector
            # The smallest number of a sum is as uncertain as the sum's largest numbers allow.
            atol = 2e-7 * np.abs(vector[0])
            np.testing.assert_allclose(
                found.statistics[q, i], vector, rtol=1e-4, atol=atol, err_msg=f"{layer.layer} {i}"
            )


def test_dropout_masks_are_a_block_s_own_whichever_way_the_blocks_are_taken():
    config = dataclasses.replace(MODEL, dropout=0.5)
    params = fresh_params(config, 0)
    params = {name: params["block_0"] if name.startswith("block_") else leaf for name, leaf in params.items()}
    key, tokens = jax.random.key(3), WINDOWS[:, :-1]
    found = [
        jax.jit(partial(forward, dataclasses.replace(config, split=split, unroll=unroll)))(
            params, tokens, dropout_key=key
        )
        for split, unroll in (((), False), ((), True), (APART, False), (((0, 1), (1, 3)), False))
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other.logits, found[0].logits, rtol=1e-4, atol=1e-6)

    @partial(jax.jit, static_argnums=0)
    def alone(i, x_BLD):
        """What a block adds to a stream of which nothing else is left."""
        blocks = jax.tree.map(jnp.zeros_like, params)
        blocks = blocks | {
            "embed": {"embedding": jnp.tile(x_BLD, (config.vocab_size, 1))},
            f"block_{i}": jax.tree.map(lambda p: p + 0.5, params[f"block_{i}"]),
        }
        return forward(config, blocks, tokens, dropout_key=key, head=False)

    # The blocks have the same parameters, so that only their masks can make the difference.
    seen = [float(alone(i, jnp.ones(config.n_embd)).act_rms_N[-1]) for i in range(3)]
    assert len(set(seen)) == 3


# A whole step.


def test_a_step_is_the_same_whether_blocks_are_stacked_or_apart():
    """Rows and state after two updates, with formats in two of the three blocks."""
    quant = QuantOptions(
        resolve_rules(
            ("block_*/mlp_down=E4M3", "block_*/attn_qkv:A=E4M3", "block_2/mlp_down:W=E5M2", "block_0/*=none"), 3
        ),
        weights_at_rest="error_feedback",
        stochastic=(False, True, True),
    )
    assert quant.segments(3) == ((0, 1), (1, 3)) and quant.stored == ("block_1/mlp_down", "block_2/mlp_down")
    table = format_table(quant)
    inputs = update.Inputs(np.int32(0), np.float32(1e-2), table)
    ended = []
    for split in (quant.segments(3), APART):
        step = step_of(
            dataclasses.replace(MODEL, split=split),
            quant=quant,
            optimizer="ulp_adamw",
            adam_eps=1e-3,
            metric_groups=("update", "format", "ledger"),
        )
        one_step = jax.jit(partial(update.train_step, step))
        state, rows = jax.jit(lambda table, step=step: update.stacked(step, update.init(step, 0, table)))(table), []
        for _ in range(2):
            state, row = one_step(state, WINDOWS, inputs)
            rows.append(row)
        ended.append((update.unstacked(step, state), rows))
    (state, rows), (other, other_rows) = ended
    # The gradient of a key's bias is zero but for rounding, which differs: a share of attn_qkv's elements.
    uncertain = 1 / (3 * (MODEL.n_embd + 1))
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row.names == other_row.names and len(row.names) > 150
        for name, got, want in zip(row.names, np.asarray(row.values), np.asarray(other_row.values), strict=True):
            assert got == pytest.approx(
                want, rel=1e-3, abs=uncertain if "zero_update" in name else 1e-6, nan_ok=True
            ), name
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for (path, got), want in zip(jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(other), strict=True):
        name = jax.tree_util.keystr(path)
        assert got.dtype == want.dtype, name
        np.testing.assert_allclose(
            np.float64(got),
            np.float64(want),
            rtol=1e-4,
            atol=uncertain if "zero_update" in name else 1e-6,
            err_msg=name,
        )


def test_the_axis_of_layers_makes_no_matrix_of_a_bias():
    params = filled(jax.eval_shape(partial(init_params, MODEL, 0)))
    stacked = stacking.stack(params, ((0, 1), (1, 3)))
    decayed = optimizers.is_decayed(stacked, stacking.stacked_arrays)
    for path, found in jax.tree_util.tree_flatten_with_path(decayed)[0]:
        assert found == (path[-1].key in ("kernel", "embedding")), path
    settings = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    grids = jax.tree.map(lambda leaf: None, stacked)
    for name in optimizers.OPTIMIZERS:
        none = jax.tree.map(lambda leaf: False, stacked)
        rule = optimizers.make(name, **settings, is_quantized=none, stacked=stacking.stacked_arrays)
        zeros = jax.tree.map(jnp.zeros_like, stacked)
        extra = dict(grids=grids, learning_rate=1.0, seed=np.uint32([1, 2]))
        direction, _ = rule.update(zeros, rule.init(stacked), stacked, **extra)
        expected = jax.tree.map(lambda w, d: np.float32(0.1) * w if d else 0 * w, stacked, decayed)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), direction, expected)


@pytest.mark.parametrize("fsdp", [2, 4])
def test_stacked_arrays_are_split_over_fsdp_like_those_of_a_block(fsdp):
    """Of 512 blocks, so that the axis of layers would be the longest, and biases together large."""
    config = dataclasses.replace(MODEL, n_embd=128)
    one = jax.eval_shape(partial(init_params, config, 0))
    n = 512
    apart = {name: leaf for name, leaf in one.items() if name not in ("block_1", "block_2")}
    together = dict(apart) | {
        f"block_0:{n}": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype), apart["block_0"])
    }
    del together["block_0"]
    mesh = jax.sharding.AbstractMesh((1, fsdp), (DATA, FSDP))
    of_apart, of_together = split_like_parameters(mesh, apart), split_like_parameters(mesh, together)
    in_two = 0
    for part, arrays in apart["block_0"].items():
        for name, leaf in arrays.items():
            alone = tuple(of_apart["block_0"][part][name].spec)
            stacked = tuple(of_together[f"block_0:{n}"][part][name].spec)
            assert stacked == ((None, *alone) if alone else ()), (part, name)
            assert bool(alone) == (leaf.ndim == 2)
            in_two += bool(alone)
    assert in_two == 4
    assert of_together["embed"] == of_apart["embed"] and of_together["ln_f"] == of_apart["ln_f"]


def test_weights_of_a_group_are_those_of_its_layers():
    params = filled(jax.eval_shape(partial(init_params, MODEL, 0)))
    stacked = stacking.stack(params, ((0, 1), (1, 3)))
    for part in PARTS:
        expected = np.stack([weights_of(params, f"block_{i}/{part}") for i in (1, 2)])
        np.testing.assert_array_equal(weights_of(stacked, f"block_1:3/{part}"), expected)
