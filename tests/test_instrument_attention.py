"""Products of two activations under `instrument`: attention with the six slots of a recipe in each of its products."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from instrumented import ATTENTION, SEQUENCES, D, L, M, attention, normal, pair_by_hand, plain, plain_pair
from test_instrument import KEY, differing, step

from altgrad_jax import instrument
from altgrad_jax.numerics.recipes import SLOTS


def test_attention_equals_that_written_by_hand():
    """Products of two activations in a loop over layers: six slots each, every head a matrix of its own."""
    words, recipe = jax.random.key_data(KEY), "nvfp4_attention:wgrad"
    plain_loss = partial(attention, plain, plain_pair)
    inst = instrument(plain_loss, ATTENTION, SEQUENCES, recipe=recipe, keep=("qkv", "out"), statistics=False)
    (loss, _), grads, _, _ = step(inst, ATTENTION, SEQUENCES)
    hand = partial(attention, plain, partial(pair_by_hand, recipe, words))
    assert differing((loss, grads), jax.jit(jax.value_and_grad(hand))(ATTENTION, SEQUENCES)) == 0

    inst = instrument(plain_loss, ATTENTION, SEQUENCES, recipe="mxfp8_attention", keep=("qkv/1",))
    assert inst.layers.names == ("qkv", "activations", "activations#2", "out") and not inst.layers.not_covered
    np.testing.assert_allclose(inst.layers.covered, 1)
    assert inst.quantized == (
        *("qkv/0", "activations/0", "activations#2/0", "out/0"),
        *("activations/1", "activations#2/1", "out/1"),
    )
    names = jax.eval_shape(inst.value_and_grad, ATTENTION, SEQUENCES, inst.init(ATTENTION))[3].names
    assert {f"sqnr_db/activations#2/{i}/{slot}" for i in range(L) for slot in SLOTS} <= set(names)


def test_values_stand_where_weights_do():
    """einsum hands the product of softmax and values over with its operands exchanged."""

    def loss_fn(params, batch):
        q = batch["x"] @ params["w"]
        p = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, q))
        return jnp.mean(jnp.einsum("bts,bsd->bdt", p, q) ** 2)

    batch = {"x": normal(0, 1, M, 2 * D)}
    found = instrument(loss_fn, {"w": normal(1, 2 * D, 2 * D)}, batch, recipe="mxfp8_attention", keep=()).layers.found
    assert [(row.name, row.M, row.K, row.N) for row in found[1:]] == [
        ("activations", M, 2 * D, M),
        ("activations#2", M, M, 2 * D),
    ]
