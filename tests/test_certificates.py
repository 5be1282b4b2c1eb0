"""Certificates where they are used: the trigger of a schedule, the alert, any loss function, the record of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bias import FLOAT32, measured, normal
from test_training import make_data, rows_of, tiny

from altgrad_jax import instrument, train
from altgrad_jax.config import problems, values_of
from altgrad_jax.errors import UserError
from altgrad_jax.inference import certify as certificates
from altgrad_jax.inference.certify import as_json, certify_checkpoint, certify_recipes, comparison_lines, table_lines
from altgrad_jax.inference.oscillation import oscillation_of
from altgrad_jax.inference.precision_map import cells_of, scores_of
from altgrad_jax.numerics import bias
from altgrad_jax.run.alerts import FormatExhausted
from altgrad_jax.run.checkpoint import load_arrays
from altgrad_jax.step import recipe

# --------------------------------------------------------------------------------------------- an exhausted format


def test_certificates_in_a_row_change_the_recipe():
    config = tiny(recipe=("mxfp8", "rowwise@bad9", "bf16@exhausted2"), certify_draws=2, n_embd=32, block_size=32)
    options = recipe.options_of(config)
    table, state, phases = recipe.table_of(options), recipe.init_state(options), []
    state = state._replace(begun=jnp.int32(1))
    for exhausted in (True, False, True, True, True):
        state = recipe.after_certificate(table, state, exhausted)
        phases.append(int(recipe.phase_at(table, state)))
    assert phases == [1, 1, 1, 2, 2]
    assert int(state.exhausted_streak) == 1  # after a change the count begins anew
    # An update between them changes neither.
    after = recipe.InUse(options, (), state, table, 0, 5).after(None, jnp.bool_(True), False)
    assert (int(after.begun), int(after.exhausted_streak)) == (2, int(state.exhausted_streak))


def test_the_alert_begins_below_the_root_of_three_and_is_armed_again():
    rule = FormatExhausted()
    found = [rule.begins(k, {"grad_signal_to_error": value}) for k, value in enumerate((2, 1.7, 1.6, 1.74, 1.0))]
    assert [bool(alerts) for alerts in found] == [False, True, False, False, True]
    assert found[1] == [{"kind": "format_exhausted", "layer": None, "value": 1.7}]
    assert rule.begins(9, {"val_loss": 3.0}) == []


# ------------------------------------------------------------------------------------------------ any loss function


def test_any_loss_function_has_a_certificate():
    """A loop over two layers, one of them kept: as that layer alone; and nothing is drawn twice."""
    params = {"w": 0.1 * normal(2, 64, 64, seed=6)}
    batch = normal(64, 64, seed=7)

    def loss(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.mean(jnp.square(jax.lax.scan(layer, x, params["w"])[0]))

    own = instrument(loss, params, batch, recipe="nvfp4_redrawn:wgrad", keep=["w/1"])
    found = own.certify(params, batch, key=jax.random.key(0), draws=32)
    assert list(found) == ["w/0", "w/1"]
    assert found["w/1"].variance[FLOAT32].max() < 1e-8 and not found["w/1"].bias[FLOAT32].max() > 1e-5
    x, w = batch.astype(np.float64), params["w"].astype(np.float64)
    y = np.tanh(x @ w[0])
    z = np.tanh(y @ w[1])
    g = (2 * z / z.size * (1 - z**2)) @ w[1].T * (1 - y**2)
    alone = measured("nvfp4_redrawn:wgrad", 32, *(v.astype(np.float32) for v in (x, w[0], g)))[0]
    np.testing.assert_allclose(found["w/0"].variance[FLOAT32], alone.variance[FLOAT32], rtol=0.3, atol=1e-6)
    np.testing.assert_allclose(found["w/0"].bias[FLOAT32], alone.bias[FLOAT32], atol=2e-4)
    with pytest.raises(UserError, match="only a recipe has a certificate"):
        instrument(loss, params, batch, recipe="E4M3").certify(params, batch, key=jax.random.key(0))


# ---------------------------------------------------------------------------------------------------------- whole runs


def without_diagnoses(*args):
    arrays, meta = load_arrays(*args)
    return arrays, meta | {"config": meta["config"] | {"diagnostic_interval": 0, "certify_draws": 0}}


def test_certificates_of_a_run_are_in_its_record_and_may_end_its_recipe(tmp_path):
    """At every diagnosis; here all gradients are less than their error, so that the second phase begins with the
    second certificate. What looks at a checkpoint follows the recipe that its next update would."""
    config = tiny(n_embd=32, block_size=32, max_steps=4, warmup_steps=1, eval_interval=4, checkpoint_interval=2,
                  diagnostic_interval=2, metrics="none", recipe=("nvfp4_redrawn:wgrad~head", "bf16@exhausted2"),
                  certify_draws=4)  # fmt: skip
    data_dir, run_dir = make_data(tmp_path), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bias, "EXHAUSTED", 1e9)
        assert train(config, data_dir=data_dir, workdir=run_dir).exit_code == 0
    rows = {row["step"]: row for row in rows_of(run_dir)}
    assert [rows[k]["recipe_phase"] for k in range(1, 5)] == [0, 0, 1, 1]
    found = {k: row["grad_bias/block_0/mlp_up/wgrad"] for k, row in rows.items() if "grad_total_bias" in row}
    assert sorted(found) == [0, 2, 4] and abs(found[4]) < 1e-5 < rows[2]["grad_variance/all/wgrad"]
    assert rows[2]["grad_variance/all/dgrad"] < 1e-8 and "grad_persistent_bias/all/dgrad" not in rows[2]
    again = certify_checkpoint(run_dir, 4, checkpoint=2)
    assert again.metrics["grad_total_variance"] < 1e-8  # bfloat16 holds from there on
    assert len(table_lines(again)) == 2 + 3 * 5 and "BIASED" not in table_lines(again)[-1]
    assert as_json(again)["layers"]["all"]["dgrad"]["float32"]["persistent"] is None
    items = "nvfp4_redrawn:wgrad~head", "mxfp4~head"
    with pytest.MonkeyPatch.context() as patch:  # a run without diagnoses can be certified too
        patch.setattr(certificates, "load_arrays", without_diagnoses)
        several = certify_recipes(run_dir, items, 4, checkpoint=2)
    drawn, rounded = (several[item].biases["all"] for item in items)
    assert drawn.variance[FLOAT32, 2] > 1e-3 > 1e-7 > rounded.variance[FLOAT32].max()
    assert abs(drawn.bias[FLOAT32, 0]) < 1e-5 < 1e-3 < rounded.bias[FLOAT32].min()
    heading, titles, *lines = comparison_lines(several)
    assert [line.split()[0] for line in lines] == list(items) and len(lines[0].split()) == 1 + 6 + 4
    scores = scores_of(run_dir, "mxfp4:fprop", draws=2)
    assert set(scores.harm) | set(scores.error) == set(cells_of(1))
    assert max(scores.error.values()) < 1e-4 and any(mean for mean, _ in scores.harm.values())
    watched = oscillation_of(run_dir, 3, checkpoint=2)["block_0/mlp_up"]
    assert watched["weight_flips"] > 0.5  # of weights in bfloat16


def test_what_certificates_need_is_said():
    few = dict(certify_draws=16, recipe=("tetrajet_v2",), eval_windows=2, eval_batch_size=2)
    (sentence,) = problems(values_of(tiny(**few, block_size=8)))
    assert sentence.startswith("certify_draws=16 looks at 4 windows of 8 tokens") and "eval_batch_size=4" in sentence
    (sentence,) = problems(values_of(tiny(recipe=("mxfp8", "bf16@exhausted3"), block_size=32, n_embd=32)))
    assert sentence.endswith("waits for certificates, and certify_draws=0 makes none: set certify_draws=16")
