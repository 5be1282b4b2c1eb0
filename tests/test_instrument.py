"""`instrument`: which products it finds, that it changes nothing without a recipe, and that with one it equals the same
model written with quant_dot or slot_dot by hand, to the bit."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cpu_devices
from instrumented import BATCH, MODELS, ByHand, D, E, F, L, M, normal
from jax import lax

from altgrad_jax import Formats, instrument
from altgrad_jax.errors import UserError

KEY = jax.random.key(3)
NONE = ()


def differing(a, b):
    """Elements of two trees that differ in a bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)))
    return sum(int(np.sum(np.asarray(x).view(np.uint32) != np.asarray(y).view(np.uint32))) for x, y in pairs)


def step(inst, params, batch=BATCH, key=KEY):
    return jax.jit(inst.value_and_grad)(params, batch, inst.init(params), key=key)


@pytest.mark.parametrize(
    "name, recipe", [*((name, recipe) for name in MODELS for recipe in (None, "E4M3")), ("stacked", "nvfp4")]
)
def test_equals_the_model_written_by_hand(name, recipe):
    model = MODELS[name]
    inst = instrument(model.plain, model.params, BATCH, recipe=recipe, keep=model.keep, statistics=False)
    hand = model.by_hand(recipe, jax.random.key_data(KEY)) if recipe else model.plain
    (loss, _), grads, _, _ = step(inst, model.params)
    assert differing((loss, grads), jax.jit(jax.value_and_grad(hand))(model.params, BATCH)) == 0


def everything(params, batch):
    """Products that are not covered, each for a reason of its own, and one that is."""
    x, image = batch["x"], batch["x"].reshape(1, M, D, 1)

    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    y = x @ params["covered"]
    y += x @ (params["norm"] / jnp.sqrt(jnp.sum(params["norm"] ** 2)))
    y += x @ (params["w"] + params["a"] @ params["b"])
    y += own(x, params["own"])
    y += jnp.einsum("md,mdf->mf", x, params["experts"][batch["y"] % E])
    y += lax.ragged_dot(x, params["ragged"], jnp.array([M // 2, M // 2]))
    y += lax.conv_general_dilated(image, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[
        0, ..., 0
    ]
    y += lax.stop_gradient(lax.while_loop(lambda h: h[0, 0] > 1e9, lambda h: h @ params["loop"], x))
    y += (x @ x.T) @ x + x @ np.eye(D, dtype=np.float32)
    return jnp.mean(y**2)


def square(*seeds):
    return {name: normal(i, D, D) for i, name in enumerate(seeds)}


def test_what_is_not_covered_is_named_with_the_reason():
    params = square("covered", "norm", "w", "own", "loop")
    params |= {"a": normal(7, D, 4), "b": normal(8, 4, D), "experts": normal(5, E, D, D), "ragged": normal(6, 2, D, D)}
    params["kernel"] = normal(9, 3, 3, 1, 1)
    layers = instrument(everything, params, BATCH, recipe="E4M3").layers
    assert layers.names == ("covered",)
    assert {(row.name, row.reason) for row in layers.not_covered} == {
        ("norm", "used after integer_pow"),
        ("a, b", "product of two parameters"),
        ("a, b, w", "used after dot_general"),
        ("own", "inside custom_vjp_call"),
        ("experts", "rows chosen by data"),
        ("ragged", "ragged_dot_general"),
        ("kernel", "conv_general_dilated"),
        ("loop", "inside while"),
        ("", "product of two activations"),
        ("", "one operand is a constant"),
    }
    total = layers.found[0].share + sum(row.share for row in layers.not_covered)
    np.testing.assert_allclose(total, 1)
    assert layers.found[0].where.startswith("test_instrument.py:") and "everything" in str(layers)


def test_table_of_stacked_layers():
    model = MODELS["stacked"]
    layers = instrument(model.plain, model.params, BATCH, recipe="mxfp8", keep=("head", "up/1")).layers
    flops = 2 * M * D * F * L
    assert [(row.name, row.count, row.M, row.K, row.N, row.numbers) for row in layers.found] == [
        ("blocks/up", L, M, D, F, "mxfp8 (1 of 2)"),
        ("blocks/down", L, M, F, D, "mxfp8"),
        ("head", 1, M, D, D, "kept"),
    ]
    np.testing.assert_allclose(layers.found[0].share, flops / (2 * flops + 2 * M * D * D))
    assert "blocks/up" in str(layers) and "32 x 32 x 64" in str(layers)


def branches(params, batch):
    """A weight in each branch of a cond, and one inside a shard_map over one device."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(lambda x, w: jnp.tanh(x @ w), mesh=mesh, in_specs=spec, out_specs=spec[0])
    h = mapped(batch["x"], params["mapped"])
    h = lax.cond(batch["y"][0] == 0, lambda h: h @ params["yes"], lambda h: h @ params["no"], h)
    return jnp.mean(h**2)


def test_a_branch_that_is_not_taken_has_no_statistics():
    params = square("mapped", "yes", "no")
    inst = instrument(branches, params, BATCH, recipe="E4M3")
    (loss, _), grads, _, statistics = step(inst, params)

    def hand(params, batch):
        dot = partial(ByHand("E4M3", {"": 0}), "")
        return jnp.mean(dot(jnp.tanh(dot(batch["x"], params["mapped"])), params["yes"]) ** 2)

    assert differing((loss, grads), jax.jit(jax.value_and_grad(hand))(params, BATCH)) == 0
    for operand in "WAG":
        assert all(np.isfinite(statistics[f"sqnr_db/{name}/{operand}"]) for name in ("yes", "mapped"))
        assert np.isnan(statistics[f"sqnr_db/no/{operand}"]) and statistics[f"amax/no/{operand}"] == 0
        assert statistics[f"encode_scale/no/{operand}"] == np.inf  # the least of none


def narrow(params, batch):
    """A model in bfloat16: einsum is a call in which only the cast operands are to be seen."""
    h = jnp.einsum("md,df->mf", batch["x"].astype(jnp.bfloat16), params["up"].astype(jnp.bfloat16))
    return jnp.mean((h.astype(jnp.float32)) ** 2)


def test_operands_of_a_bfloat16_model_are_rounded_once():
    x = np.full((M, D), 1 + 2.0**-4 + 2.0**-10, np.float32)  # above the tie of E4M3 at 1; in bfloat16 the tie, to even
    batch, params = {"x": x}, {"up": np.eye(D, dtype=np.float32)}
    _, _, _, statistics = step(instrument(narrow, params, batch, recipe="E4M3"), params, batch)
    noise = 10 * np.log10(x[0, 0] ** 2 / (1.125 - x[0, 0]) ** 2)
    np.testing.assert_allclose(statistics["sqnr_db/up/A"], noise, rtol=1e-4)


def test_delayed_scales_are_state():
    params, batch = {"w": normal(0, D, D)}, {"x": normal(1, M, D), "y": BATCH["y"]}
    formats = Formats("E4M3", "E4M3", "E5M2", scaling="delayed", amax_history=2)

    def loss_fn(params, batch):
        return jnp.mean((batch["x"] @ params["w"]) ** 2)

    inst = instrument(loss_fn, params, batch, recipe=formats)
    take = jax.jit(inst.value_and_grad, donate_argnums=2)
    state, seen = inst.init(params), []
    for factor in (1, 4, 0.5, np.inf):
        _, _, state, statistics = take(params, batch | {"x": batch["x"] * np.float32(factor)}, state)
        seen.append(
            (float(statistics["encode_scale/w/A"]), float(statistics["amax/w/A"]), np.array(state.amax_history[0, 1]))
        )
    amax = np.abs(batch["x"]).max()
    # The scale of an amax, by hand: the largest power of two with amax * s <= 448.
    of = [2.0 ** np.floor(np.log2(448 / (amax * f))) for f in (1, 4)]
    assert [scale for scale, _, _ in seen] == [of[0], of[0], of[1], of[1]]
    np.testing.assert_array_equal(seen[1][2], [amax, 4 * amax])
    np.testing.assert_array_equal(seen[3][2], seen[2][2])  # a step that is not finite changes no history


def test_maps_over_members():
    model = MODELS["recurrent"]
    inst = instrument(model.plain, model.params, BATCH, recipe="E4M3")
    members = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), model.params)
    take = jax.vmap(inst.value_and_grad, in_axes=(0, None, None))
    (loss, _), grads, _, statistics = jax.jit(take)(members, BATCH, inst.init(model.params))
    for i in range(2):
        own = jax.tree.map(lambda leaf: leaf[i], members)
        (one, _), own_grads, _, own_statistics = step(inst, own)
        np.testing.assert_allclose(loss[i], one, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, atol=1e-5), grads, own_grads)
        np.testing.assert_allclose(statistics.values[i], own_statistics.values, rtol=1e-3)


def two_layers(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["body"]) @ params["head"]) ** 2), {"n": M}


PAIR = square("body", "head")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(recipe="nvfp5"), "there is no recipe or number format 'nvfp5'"),
        (dict(recipe="nvfp4"), "keep=.'lm_head',."),
        (dict(recipe="E4M3", keep=("tail",)), "pattern 'tail' that fits no layer: the layers are body, head"),
        (dict(recipe="E4M3", keep="head"), "give patterns in brackets"),
        (dict(recipe="E4M3", keep=("*",)), "has no product"),
        (dict(recipe=Formats("E4M3", "E4M3", "E4M3", scaling="1x128")), "1x128 cannot scale W of body"),
        (dict(recipe="deepseek_v3", keep=("head",)), "fprop.x of body.*, or name the layer in keep"),
    ],
)
def test_refuses_in_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        instrument(two_layers, PAIR, BATCH, **arguments)


def test_refuses_a_step_that_it_cannot_make():
    inst = instrument(two_layers, PAIR, BATCH, recipe="nvfp4", keep=("head",))
    with pytest.raises(UserError, match="give value_and_grad a key"):
        inst.value_and_grad(PAIR, BATCH, inst.init(PAIR))
    with pytest.raises(UserError, match="parameters have another structure"):
        inst.init({"body": PAIR["body"]})
    with pytest.raises(UserError, match="M is 8"):
        inst.value_and_grad(PAIR, {"x": BATCH["x"][:8]}, inst.init(PAIR), key=KEY)
    with pytest.raises(UserError, match="formats hold for all of a stack"):
        model = MODELS["stacked"]
        instrument(model.plain, model.params, BATCH, recipe="E4M3", keep=("up/0",))


def test_aux_is_returned():
    inst = instrument(two_layers, PAIR, BATCH)
    (loss, aux), grads, state, statistics = jax.jit(inst.value_and_grad)(PAIR, BATCH, inst.init(PAIR))
    assert aux == {"n": M} and statistics.names == () and state.amax_history is None
    plain = jax.jit(jax.value_and_grad(lambda *args: two_layers(*args)[0]))
    assert differing((loss, grads), plain(PAIR, BATCH)) == 0


TWO_DEVICES = """
import jax, numpy as np
from instrumented import BATCH, M
from test_instrument import PAIR, step, two_layers
from altgrad_jax import instrument
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
spec = jax.sharding.PartitionSpec
placed = {"x": jax.device_put(BATCH["x"], jax.sharding.NamedSharding(mesh, spec("data"))), "y": BATCH["y"]}

def mapped(params, batch):
    def half(x, w):
        return jax.lax.pmean(jax.numpy.mean((x @ w) ** 2), "data")
    return jax.shard_map(half, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec())(batch["x"], params["w"])

split = instrument(two_layers, PAIR, BATCH, recipe="E4M3")
(loss, _), grads, _, seen = step(split, PAIR, placed)
(other, _), own, _, known = step(split, PAIR)
np.testing.assert_allclose(loss, other, rtol=1e-6)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8, rtol=1e-5), grads, own)
np.testing.assert_allclose(seen.values, known.values, rtol=1e-4)

params = {"w": PAIR["body"]}
inst = instrument(mapped, params, BATCH, recipe="E4M3")
_, _, _, seen = step(inst, params, placed)
assert seen.names and inst.layers.found[0].M == M // 2
np.testing.assert_array_equal(seen["amax/w/A"], np.abs(BATCH["x"]).max())  # of both devices
halves = np.abs(BATCH["x"]).reshape(2, -1).max(1)
np.testing.assert_array_equal(seen["encode_scale/w/A"], 2.0 ** np.floor(np.log2(448 / halves)).min())
"""


def test_two_devices():
    """A batch split over devices by jit, and a shard_map, whose devices have scales of their own."""
    here = Path(__file__).parent
    env = os.environ | {"XLA_FLAGS": cpu_devices(2), "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run([sys.executable, "-W", "error", "-c", TWO_DEVICES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
