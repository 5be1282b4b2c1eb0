"""Weights that oscillate set to the centre of their bin: against NumPy, over a resume, in a run's record."""

import shutil

import jax
import numpy as np
import pytest
from test_recipe_step import SMALL, Bench
from test_training import make_data, rows_of, state_bytes, tiny

from altgrad_jax import train
from altgrad_jax.config import problems, values_of
from altgrad_jax.models.parameters import weights_of
from altgrad_jax.numerics import recipe_reference
from altgrad_jax.numerics.oscillation import Reset
from altgrad_jax.numerics.recipes import get_recipe

RECIPE, THRESHOLD = "mxfp4~head~block_1/*", 1.5
SETTINGS = dict(oscillation_reset=8, oscillation_start=1, oscillation_threshold=THRESHOLD)  # watches updates 1 and 2
LAYERS = [f"block_{i}/{part}" for i in range(2) for part in ("attn_qkv", "attn_out", "mlp_up", "mlp_down")]


@pytest.fixture(scope="module")
def resetting():
    return Bench(recipe=(RECIPE, "bf16@5"), **SETTINGS)


def test_what_oscillated_in_a_window_is_at_the_centre_of_its_bin(resetting):
    """Against NumPy from the weights of a run without resets, whose program may round an update otherwise."""
    plain, kept, state = Bench(recipe=(RECIPE, "bf16@5")), [], None
    for _ in range(3):
        state, _ = plain.train((RECIPE, 0), n=1, state=state)
        kept.append(state)
    found, rows = resetting.train((RECIPE, 0), n=3)
    spec, n_reset, n_weights = get_recipe(RECIPE).fprop_w, 0, 0
    for layer in LAYERS:
        w = [np.asarray(weights_of(of.params, layer)) for of in kept]
        q = [recipe_reference.quantize(one, spec, 0).astype(np.float32) for one in w]
        moved, rounded = (np.abs(v[1] - v[0]) + np.abs(v[2] - v[1]) for v in (w, q))
        oscillates = (rounded >= np.float32(THRESHOLD) * moved) & (rounded > 0) & layer.startswith("block_0/")
        expected = np.where(oscillates, q[2], w[2])
        np.testing.assert_allclose(weights_of(found.params, layer), expected, rtol=1e-5, atol=1e-8)
        n_reset, n_weights = n_reset + oscillates.sum(), n_weights + oscillates.size
    assert 0 < n_reset < n_weights / 2
    np.testing.assert_array_equal(rows["weights_reset"], [np.nan, np.nan, n_reset])
    assert all(not np.any(total) for total in jax.tree.leaves((found.quant.moved, found.quant.rounded_moved)))


def test_a_state_within_a_window_goes_on_to_the_same_bits(resetting):
    whole, _ = resetting.train((RECIPE, 0), n=4)
    half, _ = resetting.train((RECIPE, 0), n=2)
    assert any(np.any(total) for total in jax.tree.leaves(half.quant.moved))
    again, _ = resetting.train((RECIPE, 0), n=2, state=half)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_a_run_resumed_within_a_window_ends_in_the_same_bytes(tmp_path):
    """Updates 0 to 3 are watched; the checkpoint lies in their middle."""
    small = SMALL | dict(n_layer=1, metrics="none", checkpoint_interval=2, steps_per_dispatch=2)
    config = tiny(**small, recipe=("mxfp4",), oscillation_reset=16, oscillation_threshold=THRESHOLD)
    data_dir = make_data(tmp_path)
    assert train(config, data_dir=data_dir, workdir=tmp_path / "run").exit_code == 0
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if row.get("weights_reset")] == [4]
    assert any(name.startswith("quant/rounded_moved") for name in state_bytes(tmp_path / "run", 2))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert train(config, data_dir=data_dir, workdir=tmp_path / "again", resume=2).exit_code == 0
    assert rows_of(tmp_path / "again") == rows and state_bytes(tmp_path / "again", 6) == state_bytes(
        tmp_path / "run", 6
    )


def test_the_first_quarter_of_a_period_is_watched():
    """TetraJet-v2's own settings: of every 200 updates the first 50."""
    watched, ends = zip(*(map(bool, Reset(200, 8000, 8.0).watches(number)) for number in range(7900, 8400)))
    assert [7900 + i for i, at in enumerate(ends) if at] == [8049, 8249]
    assert sum(watched) == 100 and not any(watched[:100]) and watched[100] and not watched[150]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(oscillation_reset=200), "oscillation_reset=200 has no effect with recipe=()"),
        (dict(recipe=("mxfp8",), oscillation_threshold=8.0), "has no effect with oscillation_reset=0"),
        (dict(recipe=("mxfp8",), oscillation_reset=8, oscillation_start=99, max_steps=100), "resets after update 101"),
        (dict(recipe=("mxfp8",), oscillation_reset=8, fsdp=2), "watches whole weights, and fsdp=2 splits them: set"),
    ],
)
def test_resets_that_cannot_be(changes, sentence):
    (found,) = problems(values_of(tiny(n_embd=32, block_size=32, **changes)))
    assert sentence in found
