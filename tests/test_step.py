"""The compiled step against a plain optax loop, and the properties a run is built on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_jax.data.dataset import gather_windows, permute_windows
from altgrad_jax.models.gpt2 import GPT, GPTConfig
from altgrad_jax.step import stability
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.program import make_step_functions
from altgrad_jax.step.update import StepOptions

MODEL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=61)
FLOAT32 = dataclasses.replace(MODEL, compute_dtype="float32")
THRESHOLDS = stability.Thresholds(
    nan_patience=3,
    bit_stall_threshold=0.5,
    dead_neuron_threshold=1e-8,
    dead_neuron_window=5,
    spike_window=30,
    spike_threshold=8.0,
    stall_window=5,
)
TOKENS_T = np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16)
N_WINDOWS = (len(TOKENS_T) - 1) // MODEL.block_size
N_STEPS = 12


@functools.cache  # so that no program is traced and compiled by two tests
def make(model=MODEL, eval_batch_size=4, **overrides):
    options = dict(
        batch_size=4,
        steps_per_dispatch=N_STEPS,
        learning_rate=1e-2,
        max_steps=100,
        warmup_steps=5,
        thresholds=THRESHOLDS,
        data_seed=7,
    )
    options |= overrides
    return make_step_functions(
        model,
        StepOptions(**options),
        data_mesh(jax.devices()[:1]),
        n_train_windows=N_WINDOWS,
        eval_batch_size=eval_batch_size,
        seed=3,
    )


def placed(functions, state):
    """A state where a run keeps it: jax compiles anew for one that lies elsewhere."""
    return jax.tree.map(lambda leaf, kept: jax.device_put(leaf, kept.sharding), state, functions.abstract_state)


def train(functions, dispatches, data=TOKENS_T, state=None):
    """State and rows after dispatches of the given lengths."""
    state = functions.init(42) if state is None else state
    state, rows, data = placed(functions, state), [], jnp.asarray(data)
    for n in dispatches:
        state, rows_KM = functions.run(state, data, n, functions.inputs)
        rows.append(np.asarray(rows_KM)[:n])
    return state, np.concatenate(rows)


def column(functions, rows, name):
    return rows[:, functions.metric_names.index(name)]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def functions():
    return make()


@pytest.fixture(scope="module")
def trained(functions):
    return train(functions, [N_STEPS])


def windows_of(step, batch_size=4):
    numbers = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint32)
    return gather_windows(TOKENS_T, permute_windows(numbers, N_WINDOWS, 7), MODEL.block_size)


def test_the_step_is_a_plain_optax_loop_in_float32():
    """Twelve steps of float32 training against value_and_grad, clip_by_global_norm and optax.adamw."""
    functions = make(FLOAT32)
    state, rows = train(functions, [N_STEPS])

    def loss_fn(params, windows):
        logits = GPT(FLOAT32).apply({"params": params}, windows[:, :-1]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            lambda k: 1e-2 * jnp.minimum(1.0, (k + 1) / 5),
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
        ),
    )
    params = functions.init(42).params
    opt_state = optimizer.init(params)
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    for k in range(N_STEPS):
        loss, grads = value_and_grad(params, windows_of(k).astype(np.int32))
        assert column(functions, rows, "loss")[k] == pytest.approx(float(loss), rel=1e-5)
        assert column(functions, rows, "grad_norm")[k] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        assert column(functions, rows, "update_norm/embed")[k] == pytest.approx(
            float(optax.tree.norm(updates["embed"])), rel=1e-4
        )
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, params)
    assert int(state.step) == int(state.opt_state[0].count) == N_STEPS


@pytest.mark.parametrize("dispatches", [[1] * 12, [2] * 6, [8, 4], [5, 7]])
def test_the_length_of_a_dispatch_changes_no_bit(functions, trained, dispatches):
    state, rows = train(functions, dispatches)
    assert_same(state, trained[0])
    np.testing.assert_array_equal(rows, trained[1])


def test_one_compilation_serves_every_dispatch(functions):
    train(functions, [1])
    compiled = functions.run._cache_size()  # tests of other files call the same functions, with other arrays
    train(functions, [5, 3, 2, 1])
    assert functions.run._cache_size() == compiled


def test_metrics_can_be_turned_off_without_moving_the_training(functions, trained):
    bare = make(metric_groups=())
    state, rows = train(bare, [N_STEPS])
    assert len(bare.metric_names) < len(functions.metric_names) / 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, trained[0].params)
    np.testing.assert_allclose(column(bare, rows, "loss"), column(functions, trained[1], "loss"), rtol=1e-5)


def test_gradient_accumulation_is_the_same_update():
    """In float32, where rounding is out of the way."""
    steps = make(FLOAT32), make(FLOAT32, grad_accum_steps=4)
    one, four = (train(functions, [4])[1] for functions in steps)
    np.testing.assert_allclose(one[0, :5], four[0, :5], rtol=1e-5)
    for name in ("loss", "grad_norm", "grad_norm/block_1/mlp_down", "act_amax/block_0", "act_rms/block_1"):
        of_one, of_four = (column(functions, rows, name) for functions, rows in zip(steps, (one, four)))
        np.testing.assert_allclose(of_four, of_one, rtol=1e-3, err_msg=name)


def test_every_layer_has_every_metric(functions, trained):
    layers = [
        "embed",
        "pos_embed",
        *(
            f"block_{i}/{part}"
            for i in range(2)
            for part in ("ln_1", "attn_qkv", "attn_out", "ln_2", "mlp_up", "mlp_down")
        ),
        "ln_f",
    ]
    for statistic in (
        "grad_norm",
        "grad_max",
        "grad_snr",
        "nonfinite_grads",
        "param_norm",
        "nonfinite_params",
        "update_norm",
        "update_ratio",
        "zero_update",
    ):
        column_name = f"sparse/{statistic}/" if statistic == "grad_snr" else f"{statistic}/"
        assert [name for name in functions.metric_names if name.startswith(column_name)] == [
            f"{column_name}{layer}" for layer in layers
        ]
    of_snr = np.array([name.startswith("sparse/grad_snr/") for name in functions.metric_names])
    finite = np.isfinite(trained[1])
    assert finite[1:].all() and finite[0].tolist() == (~of_snr).tolist()  # one gradient has no spread


def test_loss_falls_and_starts_at_an_even_guess(functions, trained):
    losses = column(functions, trained[1], "loss")
    assert losses[0] == pytest.approx(np.log(61), abs=0.05)
    repeated = np.tile(np.arange(61, dtype=np.uint16), 33)[:2000]
    losses = column(functions, train(functions, [12, 12, 12], data=repeated)[1], "loss")
    assert losses[-1] < 0.6 * losses[0]


def test_evaluation_is_the_mean_loss_whatever_the_batch(functions):
    windows = np.concatenate([windows_of(k) for k in range(4)])
    params = functions.init(42).params
    logits = GPT(MODEL).apply({"params": params}, windows[:, :-1].astype(np.int32)).logits
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].astype(np.int32)).mean()
    for size in (1, 4):
        assert make(eval_batch_size=size).evaluate(params, windows) == pytest.approx(float(expected), rel=1e-6)


def test_the_seed_of_the_data_and_of_the_run_are_independent(functions, trained):
    other = make(data_seed=8)
    state = other.init(42)
    assert_same(state.params, functions.init(42).params)
    _, rows_KM = functions.run(state, jnp.asarray(TOKENS_T), 1, other.inputs)
    assert column(functions, rows_KM, "loss")[0] != column(functions, trained[1], "loss")[0]


# What a non-finite step does. `spoil` damages one element of the state before the dispatch.


def spoiled(functions, where, value=np.nan):
    state = functions.init(42)
    state, _ = functions.run(state, jnp.asarray(TOKENS_T), 2, functions.inputs)
    path, index = where

    def change(key_path, leaf):
        return leaf.at[index].set(value) if jax.tree_util.keystr(key_path) == path else leaf

    changed = jax.tree_util.tree_map_with_path(change, state)
    assert sum(not np.isfinite(leaf).all() for leaf in jax.tree.leaves((changed.params, changed.opt_state))) == 1
    return changed


def test_a_non_finite_parameter_changes_nothing_is_located_and_stops_the_run(functions):
    before = jax.device_get(spoiled(functions, (".params['block_1']['mlp_up']['kernel']", (0, 3))))
    state, rows_KM = functions.run(placed(functions, before), jnp.asarray(TOKENS_T), 6, functions.inputs)
    rows = np.asarray(rows_KM)
    assert_same(state.params, before.params)
    assert_same(state.opt_state, before.opt_state)
    # Patience is 3: steps 3, 4, 5 are made, then the loop ends although six were asked for.
    assert int(state.step) == 5 and int(state.monitor.bad_streak) == 3 and int(state.monitor.first_bad_step) == 3
    made = ~np.isnan(column(functions, rows, "learning_rate"))
    assert made.tolist() == [True] * 3 + [False] * (N_STEPS - 3)
    assert column(functions, rows, "nonfinite_params/block_1/mlp_up")[0] == 1
    assert column(functions, rows, "alert/nonfinite_params/block_1/mlp_up")[0] == 1
    assert column(functions, rows, "alert/nonfinite_params/block_0/mlp_up")[0] == 0
    assert column(functions, rows, "nonfinite_loss")[0] == 1


def test_a_frozen_state_stays_frozen(functions):
    state = spoiled(functions, (".params['embed']['embedding']", (5, 5)))
    state, _ = functions.run(state, jnp.asarray(TOKENS_T), 6, functions.inputs)
    before = jax.device_get(state)
    after, rows_KM = functions.run(state, jnp.asarray(TOKENS_T), 6, functions.inputs)
    assert_same(after, before)
    assert np.isnan(rows_KM).all()


def test_a_damaged_moment_harms_only_its_own_element(functions):
    clean, _ = functions.run(functions.init(42), jnp.asarray(TOKENS_T), 3, functions.inputs)
    state = spoiled(functions, (".opt_state[0].mu['block_0']['attn_out']['kernel']", (2, 1)))
    state, rows_KM = functions.run(state, jnp.asarray(TOKENS_T), 1, functions.inputs)
    rows = np.asarray(rows_KM)[:1]
    assert column(functions, rows, "alert/nonfinite_updates/block_0/attn_out")[0] == 1
    assert column(functions, rows, "nonfinite_updates")[0] == 1
    assert int(state.monitor.bad_steps) == 1
    kernel, expected = (np.asarray(s.params["block_0"]["attn_out"]["kernel"]) for s in (state, clean))
    differs = kernel != expected
    assert np.isfinite(kernel).all() and differs.sum() == 1 and differs[2, 1]


def test_a_non_finite_gradient_norm_counts_as_a_bad_step():
    """Without clipping a huge loss scale overflows the norm while every element is finite."""
    functions = make(dataclasses.replace(MODEL, n_layer=1), grad_clip=0.0, metric_groups=())
    state = functions.init(42)
    params = jax.tree.map(lambda p: p, state.params)
    params["ln_f"]["scale"] = params["ln_f"]["scale"] * 1e30
    before = jax.device_get(state._replace(params=params))
    state, _ = functions.run(jax.device_put(before), jnp.asarray(TOKENS_T), 1, functions.inputs)
    assert int(state.monitor.bad_steps) == 1 and int(state.step) == 1
    assert_same(state.params, before.params)
    assert int(state.opt_state[0].count) == 0


def test_the_run_recovers_after_fewer_bad_steps_than_patience(functions):
    state = functions.init(42)
    bad = state.monitor._replace(bad_streak=jnp.int32(2), bad_steps=jnp.int32(2))
    state, _ = train(functions, [4], state=state._replace(monitor=bad))
    assert int(state.monitor.bad_streak) == 0 and int(state.monitor.bad_steps) == 2 and int(state.step) == 4
