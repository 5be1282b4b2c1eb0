"""The model held to a float64 NumPy GPT-2, and the properties a GPT-2 must have."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_gpt2
import pytest

from altgrad_jax.models.attention import empty_cache
from altgrad_jax.models.gpt2 import GPT, GPTConfig
from altgrad_jax.models.model import init_params
from altgrad_jax.models.parameters import count_params

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=31, compute_dtype="float32")
TINY_BF16 = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=31, compute_dtype="bfloat16")
BASELINE = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=50257)


def random_params(config, seed=0):
    """Parameters with every array random, biases and scales too, and attention far from uniform."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        values = rng.standard_normal(leaf.shape) * {"kernel": 0.3, "embedding": 0.5}.get(name, 0.2)
        return jnp.asarray(values + (name == "scale"), jnp.float32)

    return jax.tree.map_with_path(fill, jax.eval_shape(partial(init_params, config, 0)))


def random_batch(config, seed=1, batch=3):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, config.block_size + 1))
    return tokens[:, :-1], tokens[:, 1:]


@partial(jax.jit, static_argnums=0)
def fresh_params(config, seed):
    return init_params(config, seed)


@partial(jax.jit, static_argnums=1)
def logits_of(params, config, tokens_BL):
    return GPT(config).apply({"params": params}, tokens_BL).logits


@partial(jax.jit, static_argnums=1)
def loss_and_gradients(params, config, tokens_BL, targets_BL):
    return jax.value_and_grad(loss_fn)(params, config, tokens_BL, targets_BL)


def loss_fn(params, config, tokens_BL, targets_BL):
    logits_BLV = GPT(config).apply({"params": params}, tokens_BL).logits
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), targets_BL[..., None], -1))


def to_bfloat16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def test_the_oracle_has_the_right_gradients():
    """The hand-written backward pass against central differences of its own float64 forward pass."""
    params = numpy_gpt2.as_float64(random_params(TINY))
    tokens_BL, targets_BL = random_batch(TINY, batch=2)
    _, _, gradients = numpy_gpt2.run(params, tokens_BL, TINY.n_head, targets_BL)
    rng = np.random.default_rng(2)
    for name, leaf in numpy_gpt2.flat(params).items():
        direction = rng.standard_normal(leaf.shape)
        losses = []
        for sign in (1, -1):
            leaf += sign * 1e-5 * direction
            losses.append(numpy_gpt2.run(params, tokens_BL, TINY.n_head, targets_BL)[1])
            leaf -= sign * 1e-5 * direction
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(np.sum(direction * numpy_gpt2.flat(gradients)[name]), rel=1e-5, abs=1e-9), name


def test_float32_logits_loss_and_gradients_are_the_oracles():
    params = random_params(TINY)
    tokens_BL, targets_BL = random_batch(TINY)
    logits_BLV, loss, gradients = numpy_gpt2.run(params, tokens_BL, TINY.n_head, targets_BL)
    assert np.abs(logits_BLV).max() > 1
    np.testing.assert_allclose(logits_of(params, TINY, tokens_BL), logits_BLV, rtol=0, atol=1e-4)
    got_loss, got = loss_and_gradients(params, TINY, tokens_BL, targets_BL)
    assert abs(got_loss - loss) < 1e-5
    got, want = numpy_gpt2.flat(got), numpy_gpt2.flat(gradients)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-5, err_msg=name)


def test_bfloat16_logits_loss_and_gradients_are_the_oracles_with_rounded_operands():
    params = random_params(TINY_BF16)
    tokens_BL, targets_BL = random_batch(TINY_BF16)
    exact_BLV, _, _ = numpy_gpt2.run(params, tokens_BL, TINY_BF16.n_head)
    logits_BLV, loss, gradients = numpy_gpt2.run(params, tokens_BL, TINY_BF16.n_head, targets_BL, rounding=to_bfloat16)
    got_BLV = np.asarray(logits_of(params, TINY_BF16, tokens_BL))
    assert got_BLV.dtype == np.float32

    def rms(x):
        return np.sqrt(np.mean(np.square(x)))

    # What is left against the emulation are values that float32 and float64 round to different bfloat16
    # neighbours.
    assert rms(got_BLV - logits_BLV) < 0.25 * rms(exact_BLV - logits_BLV)
    assert rms(got_BLV - logits_BLV) < 2e-3 * rms(logits_BLV)
    got_loss, got = loss_and_gradients(params, TINY_BF16, tokens_BL, targets_BL)
    assert abs(got_loss - loss) < 1e-2
    got, want = numpy_gpt2.flat(got), numpy_gpt2.flat(gradients)
    for name in want:
        assert rms(got[name] - want[name]) < 2e-2 * rms(want[name]), name


def test_bfloat16_gradients_are_float32_and_off_the_bfloat16_grid():
    params = random_params(TINY_BF16)
    _, gradients = loss_and_gradients(params, TINY_BF16, *random_batch(TINY_BF16))
    for name, gradient in numpy_gpt2.flat(gradients).items():
        assert gradient.dtype == np.float32
        # Biases are left out: a key bias has gradient zero but for rounding, which leaves few bits.
        if gradient.ndim == 2:
            non_zero = gradient[gradient != 0]
            assert (non_zero == to_bfloat16(non_zero)).mean() < 0.1, name


def test_baseline_has_the_number_of_parameters_of_the_reference():
    shapes = jax.eval_shape(partial(init_params, BASELINE, 0))
    assert count_params(shapes) == 30_044_544
    assert count_params({name: shapes[name] for name in shapes if "embed" not in name}) == 10_647_552


def test_parameter_names_and_shapes():
    shapes = jax.eval_shape(partial(init_params, TINY, 0))
    leaves = {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes)}
    D = TINY.n_embd
    want = {"embed/embedding": (31, D), "pos_embed/embedding": (12, D), "ln_f/scale": (D,), "ln_f/bias": (D,)}
    for i in range(2):
        for layer, inputs, outputs in [
            ("attn_qkv", D, 3 * D),
            ("attn_out", D, D),
            ("mlp_up", D, 4 * D),
            ("mlp_down", 4 * D, D),
        ]:
            want |= {f"block_{i}/{layer}/kernel": (inputs, outputs), f"block_{i}/{layer}/bias": (outputs,)}
        for layer in ("ln_1", "ln_2"):
            want |= {f"block_{i}/{layer}/scale": (D,), f"block_{i}/{layer}/bias": (D,)}
    assert leaves == want


def test_init_is_gpt2s():
    config = GPTConfig(n_layer=6, n_head=2, n_embd=64, block_size=64, vocab_size=512)
    params = numpy_gpt2.flat(fresh_params(config, 3))
    for name, leaf in params.items():
        assert leaf.dtype == np.float32
        kind = name.rsplit("/", 1)[1]
        if kind == "scale":
            assert (leaf == 1).all()
        elif kind == "bias":
            assert (leaf == 0).all()
        else:
            residual = name.split("/")[1] in ("attn_out", "mlp_down")
            std = 0.02 / np.sqrt(12) if residual else 0.02
            # the sample's standard deviation has relative error 1/sqrt(2 n); five of those
            assert leaf.std() == pytest.approx(std, rel=5 / np.sqrt(2 * leaf.size)), name
            assert abs(leaf.mean()) < 5 * std / np.sqrt(leaf.size), name
    kernels = [params[f"block_{i}/mlp_up/kernel"] for i in range(2)]
    assert not np.array_equal(*kernels)


def test_init_depends_on_the_seed_alone():
    same, other = fresh_params(TINY, 5), fresh_params(TINY, 6)
    for a, b, c in zip(*(jax.tree.leaves(tree) for tree in (fresh_params(TINY, 5), same, other))):
        np.testing.assert_array_equal(a, b)
        assert a.ndim == 1 or not np.array_equal(a, c)


def test_initial_loss_is_that_of_a_uniform_guess():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300)
    loss = jax.jit(loss_fn, static_argnums=1)(fresh_params(config, 0), config, *random_batch(config))
    assert loss == pytest.approx(np.log(300), abs=0.05)


@pytest.mark.parametrize("config", [TINY, TINY_BF16], ids=["float32", "bfloat16"])
def test_a_later_token_changes_no_earlier_logit(config):
    params, (tokens_BL, _) = random_params(config), random_batch(config)
    before_BLV = np.asarray(logits_of(params, config, tokens_BL))
    for t in range(config.block_size):
        changed_BL = tokens_BL.copy()
        changed_BL[:, t] = (changed_BL[:, t] + 1) % config.vocab_size
        after_BLV = np.asarray(logits_of(params, config, changed_BL))
        np.testing.assert_array_equal(after_BLV[:, :t], before_BLV[:, :t])
        assert (after_BLV[:, t] != before_BLV[:, t]).any()


def test_logits_have_zero_gradient_with_respect_to_later_positions():
    params, (tokens_BL, _) = random_params(TINY), random_batch(TINY)

    def early_logits(positions_TD, t):
        altered = params | {"pos_embed": {"embedding": positions_TD}}
        return GPT(TINY).apply({"params": altered}, tokens_BL).logits[:, t].sum()

    for t in (0, 5, 11):
        gradient_TD = np.asarray(jax.grad(early_logits)(params["pos_embed"]["embedding"], t))
        assert (gradient_TD[t + 1 :] == 0).all()
        assert (gradient_TD[: t + 1] != 0).all()


@pytest.mark.parametrize("prefill", [1, 5, 12])
def test_cache_gives_the_logits_of_the_full_forward_pass(prefill):
    params, (tokens_BL, _) = random_params(TINY), random_batch(TINY)
    full_BLV = logits_of(params, TINY, tokens_BL)
    apply = jax.jit(
        lambda tokens, cache, position: GPT(TINY).apply({"params": params}, tokens, cache=cache, position=position)
    )
    out = apply(tokens_BL[:, :prefill], empty_cache(TINY, batch=3), 0)
    pieces = [out.logits]
    for t in range(prefill, TINY.block_size):
        out = apply(tokens_BL[:, t : t + 1], out.cache, t)
        pieces.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full_BLV, rtol=0, atol=2e-5)


def test_dropout_drops_in_training_only():
    config = GPTConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=31, dropout=0.5, compute_dtype="float32"
    )
    params, (tokens_BL, _) = random_params(config), random_batch(config)

    @jax.jit
    def logits(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return GPT(config).apply({"params": params}, tokens_BL, train=True, rngs=rngs).logits

    np.testing.assert_array_equal(logits(0), logits(0))
    assert np.abs(logits(0) - logits(1)).max() > 0.1
    without = GPT(TINY).apply({"params": params}, tokens_BL).logits
    assert np.abs(logits(0) - without).max() > 0.1
    np.testing.assert_array_equal(GPT(config).apply({"params": params}, tokens_BL).logits, without)


def test_zero_dropout_needs_no_rng():
    params, (tokens_BL, _) = random_params(TINY), random_batch(TINY)
    np.testing.assert_array_equal(
        GPT(TINY).apply({"params": params}, tokens_BL, train=True).logits,
        GPT(TINY).apply({"params": params}, tokens_BL).logits,
    )


def test_activation_statistics_are_those_of_the_residual_stream():
    """A model without its last block has that block's input as its residual stream."""
    params, (tokens_BL, _) = random_params(TINY), random_batch(TINY)
    out = GPT(TINY).apply({"params": params}, tokens_BL)
    assert out.act_amax_N.shape == out.act_rms_N.shape == (2,)
    assert out.cache is None
    stream_BLD = np.zeros((*tokens_BL.shape, TINY.n_embd))
    reference = numpy_gpt2.as_float64(params)
    for b, tokens_L in enumerate(tokens_BL):
        stream_BLD[b] = reference["embed"]["embedding"][tokens_L] + reference["pos_embed"]["embedding"]
    for i in range(2):
        for b in range(len(tokens_BL)):
            block = numpy_gpt2.Block(reference[f"block_{i}"], TINY.n_head, lambda x: x)
            stream_BLD[b] = block.forward(stream_BLD[b])
        assert out.act_amax_N[i] == pytest.approx(np.abs(stream_BLD).max(), rel=1e-5)
        assert out.act_rms_N[i] == pytest.approx(np.sqrt(np.mean(stream_BLD**2)), rel=1e-5)
