"""The training step by recipes: its columns, what is kept high, schedules, delayed scales, randomness; and whole runs.

One program, which can follow four recipes in two phases, serves most of these tests: what a run follows is data.
"""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sweep import counted_compiles
from test_training import make_data, rows_of, state_bytes, tiny

from altgrad_jax import train
from altgrad_jax.config import validate
from altgrad_jax.data.dataset import gather_windows, permute_windows
from altgrad_jax.errors import UserError
from altgrad_jax.inference.evaluate import evaluate_checkpoint
from altgrad_jax.inference.generate import generate, load_model
from altgrad_jax.models.parameters import weights_of
from altgrad_jax.numerics import recipe_reference
from altgrad_jax.numerics.recipes import SLOTS, Phase, get_recipe, parse_schedule
from altgrad_jax.numerics.slot_statistics import N_BINS
from altgrad_jax.run import sweep
from altgrad_jax.run.checkpoint import list_steps
from altgrad_jax.run.sweep import axis, make_groups, make_members
from altgrad_jax.step import recipe
from altgrad_jax.step.from_config import model_config, step_options
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.program import make_step_functions

SMALL = dict(
    n_layer=2, n_embd=32, block_size=32, max_steps=6, warmup_steps=2, checkpoint_interval=3, eval_interval=3,
    diagnostic_interval=6, eval_windows=4, amax_history=16, metrics="format",
)  # fmt: skip
PROGRAM = ("bf16", "mxfp8", "nvfp4_redrawn", "te_delayed")
HISTORY, N_STEPS, N_WINDOWS = 2, 5, 100
TWO_PARTS = dict(batch_size=8, grad_accum_steps=2)
TOKENS_T = np.random.default_rng(0).integers(0, 256, 32 * (N_WINDOWS + 1)).astype(np.uint16)
PARTS = ("attn_qkv", "attn_out", "mlp_up", "mlp_down")
LAYERS = [f"block_{i}/{part}" for i in range(2) for part in PARTS]
OF_BLOCKS = {"zero_scale", "clipped", "decode_scale_log2_mean",
             "decode_scale_log2_std", "decode_scale_log2_min", "decode_scale_log2_max",
             "top_code"}  # fmt: skip
OF_SLOT = OF_BLOCKS | {"underflow", "shrinkage", "sqnr_db", "amax", "copy_distance", "kurtosis"}
OF_ALL = {"zero_scale", "clipped", "top_code", "underflow", "shrinkage", "sqnr_db", "sqnr_db_by_size",
          "copy_distance"}  # fmt: skip


def make(n_devices=1, **changes):
    config = tiny(**SMALL | changes)
    validate(config)
    return make_step_functions(
        model_config(config, jax.devices()[0]),
        step_options(config, steps_per_dispatch=N_STEPS),
        data_mesh(jax.devices()[:n_devices]),
        n_train_windows=N_WINDOWS,
        eval_batch_size=4,
        seed=3,
    )


class Bench:
    """A compiled step that trains by any schedule of its recipes, which is data."""

    def __init__(self, **changes):
        self.functions = make(**changes)
        self.fresh = jax.device_get(self.functions.init(42, self.functions.inputs.formats))

    def table(self, *schedule):
        """A schedule of (recipe, first update); one recipe alone holds for ever."""
        schedule = schedule if len(schedule) == 2 else (*schedule, (schedule[0][0], 10**6))
        options = self.functions.step.recipe
        assert options is not None
        return recipe.table_of(dataclasses.replace(options, schedule=tuple(Phase(*phase) for phase in schedule)))

    def train(self, *schedule, n=N_STEPS, state=None, seed=3):
        """(state, {column: float32 [n]})."""
        inputs = self.functions.inputs._replace(seed=np.int32(seed), formats=self.table(*schedule))
        # The state is donated.
        state = jax.tree.map(jnp.array, self.fresh if state is None else state)
        state, rows_KM = self.functions.run(state, jnp.asarray(TOKENS_T), np.int32(n), inputs)
        names = [name.removeprefix("sparse/") for name in self.functions.metric_names]
        return jax.device_get(state), dict(zip(names, np.asarray(rows_KM)[:n].T))


@pytest.fixture(scope="module")
def bench():
    return Bench(recipe=("mxfp8", "bf16@3"), recipe_program=PROGRAM, amax_history=HISTORY, **TWO_PARTS)


@pytest.fixture(scope="module")
def trained(bench):
    """{recipe: rows of 5 updates}"""
    return {name: bench.train((name, 0))[1] for name in PROGRAM}


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def first_batch(n=8):
    numbers = permute_windows(np.arange(n, dtype=np.uint32), N_WINDOWS, tiny().data_seed, xp=np)
    return np.asarray(gather_windows(jnp.asarray(TOKENS_T), jnp.asarray(numbers), 32))


def first_input(params, windows):
    """float32 [tokens, width]: what block_0/attn_qkv is given, without dropout."""
    x = params["embed"]["embedding"][windows[:, :-1]] + params["pos_embed"]["embedding"][:32]
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    norm = params["block_0"]["ln_1"]
    return (x * norm["scale"] + norm["bias"]).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- the columns


def test_every_statistic_of_every_slot_is_there_and_says_what_it_can(trained):
    for name, rows in trained.items():
        spec_of = dict(zip(SLOTS, get_recipe(name).slots))
        for layer in LAYERS:
            kept = name == "bf16" or name == "nvfp4_redrawn" and layer.startswith("block_1/")
            for slot in SLOTS:
                ending = f"/{layer}/{slot}"
                named = {column.removesuffix(ending) for column in rows if column.endswith(ending)}
                found = named - {"alert/nonfinite_amax"}
                assert found == OF_SLOT
                nothing = OF_BLOCKS if kept else set()
                nothing = nothing | ({"copy_distance"} if slot in SLOTS[:3] else set())
                for statistic in OF_SLOT:
                    values = rows[f"{statistic}/{layer}/{slot}"]
                    if kept and statistic == "sqnr_db":
                        # Infinite where nothing is rounded: attention takes the gradient of qkv in bfloat16.
                        assert not np.isnan(values).any()
                        continue
                    assert (np.isnan(values) if statistic in nothing else np.isfinite(values)).all(), (statistic, slot)
                if kept:
                    assert (rows[f"sqnr_db/{layer}/{slot}"] > 45).all()
                elif spec_of[slot].element == "E2M1":
                    assert (rows[f"sqnr_db/{layer}/{slot}"] < 25).all()
        for slot in SLOTS:
            bins = np.stack([rows[f"scale_bin_{i}/all/{slot}"] for i in range(N_BINS)])
            assert np.isnan(bins).all() if name == "bf16" else bins.sum(0) == pytest.approx(1, rel=1e-5)
            assert {column.split("/")[0] for column in rows if column.endswith(f"/all/{slot}")} >= OF_ALL
        assert not any("head" in column for column in rows if column.startswith("sqnr"))


def assert_by_hand(rows, layer, slot, parts, spec, axis):
    """The statistics of an operand's micro-batches, quantized one by one, against float64."""
    q = np.concatenate([recipe_reference.quantize(part, spec, axis) for part in parts])
    v = np.concatenate(parts).astype(np.float64)
    sqnr, shrinkage = 10 * np.log10((v**2).sum() / ((q - v) ** 2).sum()), 1 - (v * q).sum() / (v**2).sum()
    assert rows[f"sqnr_db/{layer}/{slot}"][0] == pytest.approx(sqnr, abs=5e-3)
    assert rows[f"underflow/{layer}/{slot}"][0] == pytest.approx(np.mean((q == 0) & (v != 0)), abs=2e-4)
    assert rows[f"shrinkage/{layer}/{slot}"][0] == pytest.approx(shrinkage, abs=1e-5)
    assert rows[f"amax/{layer}/{slot}"][0] == pytest.approx(np.abs(v).max(), rel=1e-6)


def test_the_statistics_are_those_of_the_operands_of_both_micro_batches(bench, trained):
    params, layer = bench.fresh.params, "block_0/attn_qkv"
    x, w = np.split(first_input(params, first_batch()), 2), [np.asarray(weights_of(params, layer))]
    mxfp8, nvfp4, te = (get_recipe(name) for name in PROGRAM[1:])
    assert_by_hand(trained["mxfp8"], layer, "fprop.x", x, mxfp8.fprop_x, 1)
    assert_by_hand(trained["mxfp8"], layer, "fprop.w", w, mxfp8.fprop_w, 0)
    assert_by_hand(trained["mxfp8"], layer, "dgrad.w", w, mxfp8.dgrad_w, 1)
    assert_by_hand(trained["mxfp8"], layer, "wgrad.x", x, mxfp8.wgrad_x, 0)
    assert_by_hand(trained["nvfp4_redrawn"], layer, "fprop.x", x, nvfp4.fprop_x, 1)
    assert_by_hand(trained["nvfp4_redrawn"], layer, "fprop.w", w, nvfp4.fprop_w, 0)
    assert_by_hand(trained["te_delayed"], layer, "fprop.x", x, te.fprop_x, 1)


# --------------------------------------------------------------------------------------------------------- the schedule


def test_a_schedule_is_its_recipes_one_after_the_other(bench, trained):
    whole, rows = bench.train(("mxfp8", 0), ("bf16", 3))
    np.testing.assert_array_equal(rows["recipe_phase"], [0, 0, 0, 1, 1])
    before, first = bench.train(("mxfp8", 0), n=3)
    after, second = bench.train(("bf16", 0), n=2, state=before)
    assert_same(whole, after)
    for name in set(rows) - {"recipe_phase"}:
        np.testing.assert_array_equal(rows[name], np.concatenate([first[name], second[name]]), err_msg=name)
    equal = rows["loss"] == trained["mxfp8"]["loss"]
    assert equal[:3].all() and not equal[3:].any()
    assert rows["sqnr_db/all/fprop.x"][2] < 40 < 45 < rows["sqnr_db/all/fprop.x"][3]


def test_an_evaluation_follows_the_schedule(bench):
    state, _ = bench.train(("mxfp8", 0), n=3)
    windows, loss = first_batch(), bench.functions.evaluate
    tables = [bench.table(("mxfp8", 0), ("bf16", 3)), bench.table(("mxfp8", 0)), bench.table(("bf16", 0))]
    for number, alike in ((2, 1), (3, 2)):
        quant = state.quant._replace(number=np.int32(number))
        scheduled, mxfp8, bf16 = (float(loss(state.params, windows, quant, table)) for table in tables)
        assert scheduled == (scheduled, mxfp8, bf16)[alike] and mxfp8 != bf16


def test_from_half_of_the_run_on_in_the_backward_pass_only(bench):
    schedule = parse_schedule(("nvfp4_redrawn", "nvfp4_redrawn:backward@0.5"), 4)
    assert schedule == (Phase("nvfp4_redrawn", 0), Phase("nvfp4_redrawn:backward", 2))
    rows = bench.train(*schedule, n=4)[1]
    for slot in SLOTS:
        high = np.isnan(rows[f"clipped/block_0/mlp_up/{slot}"])
        np.testing.assert_array_equal(high, [False, False, *[slot.startswith("fprop")] * 2])
        assert np.isnan(rows[f"clipped/block_1/mlp_up/{slot}"]).all()


def test_phases_begin_by_number_or_by_bad_updates_whichever_comes_first():
    """By the numbers of updates and flags of badness alone; the phase that each update follows."""
    config = tiny(**SMALL | {"recipe": ("mxfp8", "bf16@bad2", "te_current@9", "rowwise@bad1"), "max_steps": 20})
    options = recipe.options_of(config)
    assert options is not None and options.waits
    table, state, followed, shifts = recipe.table_of(options), recipe.init_state(options), [], []
    bad = [k in (1, 3, 4, 5, 7, 12, 13) for k in range(16)]
    for k in range(16):
        in_use = recipe.InUse(options, (), state, table, 0, k)
        followed.append(int(in_use.phase))
        shifts.append(int(in_use.begins(bad[k])))
        state = in_use.after(None, jnp.bool_(True), bad[k])
    # One bad update is not two in a row, and after a shift the count begins anew.
    assert followed == [0] * 5 + [1] * 4 + [2] * 4 + [3] * 3
    assert [(k, phase) for k, phase in enumerate(shifts) if phase] == [(4, 1), (12, 3)]


@pytest.fixture(scope="module")
def waiting():
    """A step in bfloat16 that goes on by rows of E4M3 after two bad updates in a row."""
    return Bench(n_layer=1, recipe=("bf16", "rowwise@bad2"), metrics="none", batch_size=4)


def test_bad_updates_in_a_row_change_the_recipe(waiting):
    inputs = waiting.functions.inputs
    names = [name.removeprefix("sparse/") for name in waiting.functions.metric_names]

    def train(state, n):
        state, rows_KM = waiting.functions.run(jax.tree.map(jnp.array, state), jnp.asarray(TOKENS_T), n, inputs)
        return jax.device_get(state), dict(zip(names, np.asarray(rows_KM)[:n].T))

    sound, _ = train(waiting.fresh, 2)
    assert sound.quant.begun == sound.quant.bad_streak == 0
    spoiled = jax.tree.map(np.copy, sound)
    spoiled.params["ln_f"]["scale"][3] = np.nan
    after, rows = train(spoiled, 3)
    assert rows["recipe_phase"].tolist() == [0, 0, 1] and rows["alert/format_shift"].tolist() == [0, 1, 0]
    assert after.quant.begun == 1
    # The recipe that holds now is computed, and an evaluation follows it.
    mended, rows = train(sound._replace(quant=after.quant), 1)
    assert rows["recipe_phase"] == 1 and rows["loss"] != train(sound, 1)[1]["loss"]
    losses = [
        float(waiting.functions.evaluate(sound.params, first_batch(4), state.quant, inputs.formats))
        for state in (sound, after)
    ]
    assert losses[0] != losses[1]


# ------------------------------------------------------------------------------------------------------- delayed scales


def test_a_delayed_scale_is_of_the_updates_before(bench, trained):
    rows, name = trained["te_delayed"], "block_0/mlp_up"
    for slot, largest in (("fprop.x", 448.0), ("fprop.w", 448.0), ("dgrad.g", 57344.0), ("wgrad.x", 448.0)):
        amax = rows[f"amax/{name}/{slot}"].astype(np.float64)
        of = [amax[0], *(max(amax[max(0, k - HISTORY) : k]) for k in range(1, N_STEPS))]
        expected = np.log2(np.divide(of, largest))
        assert rows[f"decode_scale_log2_max/{name}/{slot}"] == pytest.approx(expected, abs=1e-5)
        # At first each micro-batch has its own.
        assert rows[f"decode_scale_log2_min/{name}/{slot}"][1:] == pytest.approx(expected[1:], abs=1e-5)
    assert len(set(rows[f"decode_scale_log2_max/{name}/dgrad.g"])) > 2
    assert (trained["te_delayed"]["clipped/all/dgrad.g"][1:] > 0).any()  # what grew since


def test_a_step_that_is_not_finite_leaves_the_history(bench):
    state, _ = bench.train(("te_delayed", 0), n=2)
    spoiled = jax.tree.map(np.copy, state)
    spoiled.params["embed"]["embedding"][:, 0] = np.nan
    after, rows = bench.train(("te_delayed", 0), n=1, state=spoiled)
    assert np.isnan(rows["loss"][0]) and after.quant.number == 3
    np.testing.assert_array_equal(after.quant.amax_history_Q6H, state.quant.amax_history_Q6H)
    sound, _ = bench.train(("te_delayed", 0), n=1, state=state)
    assert np.all(sound.quant.amax_history_Q6H[:, :, -1] != state.quant.amax_history_Q6H[:, :, -1])


# ----------------------------------------------------------------------------------------------------------- randomness


def test_signs_and_rounding_are_drawn_for_every_update_and_seed(bench):
    """wgrad.x is rounded to nearest after redrawn signs; dgrad.g is rounded stochastically and not rotated."""
    schedule, names = ("nvfp4_redrawn", 0), [f"sqnr_db/block_0/mlp_up/{slot}" for slot in ("wgrad.x", "dgrad.g")]
    of = bench.train(schedule, n=1)[1]
    again, other = (bench.train(schedule, n=1, seed=seed)[1] for seed in (3, 4))
    later = bench.train(schedule, n=1, state=bench.fresh._replace(step=np.int32(1)))[1]
    fixed = [bench.train(("mxfp8", 0), n=1, seed=seed)[1] for seed in (3, 4)]
    for name in names:
        assert of[name] == again[name] and of[name] != other[name] and of[name] != later[name]
        assert fixed[0][name] == fixed[1][name]
    forward = "sqnr_db/block_0/attn_qkv/fprop.x"
    assert of[forward] == other[forward] and of["loss"] == other["loss"]


def test_two_dispatches_are_one(bench):
    whole, rows = bench.train(("nvfp4_redrawn", 0))
    half, _ = bench.train(("nvfp4_redrawn", 0), n=2)
    resumed, rest = bench.train(("nvfp4_redrawn", 0), n=3, state=half)
    assert_same(whole, resumed)
    np.testing.assert_array_equal(rows["loss"][2:], rest["loss"])


# --------------------------------------------------------------------------------------------------------- other steps


def test_bf16_is_the_baseline():
    """To float32's last bits: it is another program, which may sum otherwise. A rounding would show as 2^-9."""
    states, rows = [], []
    for name in ((), ("bf16",)):
        functions = make(recipe=name, n_layer=1, metrics="grad")
        state = functions.init(42, functions.inputs.formats)
        state, rows_KM = functions.run(state, jnp.asarray(TOKENS_T), np.int32(1), functions.inputs)
        states.append(jax.device_get((state.params, state.opt_state)))
        rows.append(dict(zip(functions.metric_names, np.asarray(rows_KM)[0])))
    for of_baseline, of_recipe in zip(*map(jax.tree.leaves, states)):
        np.testing.assert_allclose(of_recipe, of_baseline, rtol=0, atol=1e-6 * np.abs(of_baseline).max())
    assert set(rows[0]) == set(rows[1])
    assert rows[0]["loss"] == rows[1]["loss"]
    for name, value in rows[0].items():
        np.testing.assert_allclose(rows[1][name], value, rtol=1e-6, err_msg=name)


def losses_on_two_devices():
    """Prints the losses of a program of its own, which can follow one recipe."""
    functions = make(2, recipe=("nvfp4_redrawn",), metrics="none", **TWO_PARTS)
    state = functions.init(42, functions.inputs.formats)
    _, rows_KM = functions.run(state, jnp.asarray(TOKENS_T), np.int32(N_STEPS), functions.inputs)
    print(json.dumps(np.asarray(rows_KM)[:, functions.metric_names.index("loss")].tolist()))


def test_two_devices_train_as_one(trained):
    script = (
        "import jax; jax.config.update('jax_num_cpu_devices', 2); "
        "import test_recipe_step; test_recipe_step.losses_on_two_devices()"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    two, one = json.loads(process.stdout.splitlines()[-1]), trained["nvfp4_redrawn"]["loss"]
    assert two[0] == pytest.approx(one[0], rel=1e-5) and two == pytest.approx(one, rel=2e-3)
    assert two[-1] < two[0]


# ----------------------------------------------------------------------------------------------------------- whole runs

RUN = SMALL | dict(n_layer=1, metrics="grad", steps_per_dispatch=3, dropout=0.1)
NAMES = ("bf16", "mxfp8", "te_delayed")


def points(*names):
    return axis("recipe", [(name,) for name in names], label=lambda value: value[0])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def swept(data_dir, tmp_path_factory):
    """The folder of a sweep, and what it compiled."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    with counted_compiles() as compiled:
        assert sweep.sweep(make_members(tiny(**RUN), points(*NAMES), out), out, data_dir=data_dir, width=3) == 0
    return SimpleNamespace(folder=out, compiled=compiled)


def test_recipes_of_a_sweep_share_one_program(swept, tmp_path):
    assert swept.compiled == {"compiled": [3], "chunks": 1}
    losses = {name: [row["loss"] for row in rows_of(swept.folder / name)[1:]] for name in NAMES}
    assert len({tuple(values) for values in losses.values()}) == 3
    manifest = json.loads((swept.folder / "mxfp8" / "manifest.json").read_text())
    assert manifest["config"]["recipe_program"] == sorted(NAMES)
    assert list(manifest["recipes"]) == ["mxfp8"]
    certificate = manifest["recipes"]["mxfp8"]["certificate"]
    assert certificate["n_wrong"] == 0 and certificate["tolerance"] == "equal"
    assert json.loads((swept.folder / "bf16" / "manifest.json").read_text())["recipes"]["bf16"]["certificate"] is None
    four = make_members(tiny(**SMALL), points("bf16", "mxfp8", "nvfp4", "te_current"), tmp_path)
    assert [len(group) for group in make_groups(four)] == [4]
    # Another number of phases, and sums over tiles, are other programs.
    more = points("bf16", "mxfp8") + [{"recipe": ("mxfp8", "bf16@3"), "run_name": "two"}]
    assert [len(group) for group in make_groups(make_members(tiny(**SMALL), more, tmp_path))] == [2, 1]
    tiled = points("bf16", "mxfp8", "deepseek_v3")
    config = tiny(**SMALL | {"n_embd": 128})
    assert [len(group) for group in make_groups(make_members(config, tiled, tmp_path))] == [2, 1]


def test_a_member_equals_its_run_alone_and_a_resumed_one(swept, data_dir, tmp_path):
    config = tiny(**RUN, recipe=("mxfp8",), recipe_program=tuple(sorted(NAMES)), wandb_group="out", run_name="mxfp8")
    own = swept.folder / "mxfp8"
    shutil.copytree(own, tmp_path / "run")
    before = rows_of(own)
    result = train(config, data_dir=data_dir, workdir=tmp_path / "run", resume=3)
    assert result.exit_code == 0 and rows_of(tmp_path / "run") == before
    alone = train(config, data_dir=data_dir, workdir=tmp_path / "alone")
    assert alone.exit_code == 0 and rows_of(tmp_path / "alone") == before
    for folder in ("run", "alone"):
        assert list_steps(tmp_path / folder) == list_steps(own) == [3, 6]
        assert state_bytes(tmp_path / folder, 6) == state_bytes(own, 6)


def test_a_sweep_with_one_more_recipe_keeps_what_is_finished(swept, data_dir, monkeypatch):
    before = {path: path.read_bytes() for path in swept.folder.rglob("metrics.jsonl")}
    members = make_members(tiny(**RUN), points(*NAMES, "mxfp8_e5m2g"), swept.folder)
    groups = make_groups(members)
    assert [[member.name for member in group] for group in groups] == [list(NAMES), ["mxfp8_e5m2g"]]
    monkeypatch.setattr(sweep, "loop", lambda *args: pytest.fail("trained"))
    with counted_compiles() as compiled:
        assert sweep.sweep(members[:3], swept.folder, data_dir=data_dir) == 0
    assert compiled["compiled"] == []
    assert before == {path: path.read_bytes() for path in swept.folder.rglob("metrics.jsonl")}


def test_a_run_s_folder_is_evaluated_and_continued_as_it_was_trained(swept, data_dir):
    for name in ("mxfp8", "te_delayed"):
        folder = swept.folder / name
        found = evaluate_checkpoint(folder, data_dir=data_dir)
        assert found.val_loss == pytest.approx(rows_of(folder)[-1]["val_loss"], rel=1e-6)
    params, config, _, operands = load_model(swept.folder / "mxfp8")
    more = functools.partial(generate, params, config, np.arange(40) + 60, max_new_tokens=8, temperature=0)
    assert len(more(operands=operands)) == 8 and len(operands) > 0


# -------------------------------------------------------------------------------------------------------- the refusals


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(recipe=("mxfp8",), use_fp8=True, formats=("E4M3",)), ["recipe=('mxfp8',) and use_fp8=True both"]),
        (dict(recipe=("nvfp5",)), ["no recipe 'nvfp5': give one of nvfp4"]),
        (dict(recipe=("mxfp8",), recipe_program=("mx",)), ["no recipe 'mx': give one of mxfp"]),
        (dict(recipe=("mxfp8@3",)), ["an item 'mxfp8@3': give the first recipe alone"]),
        (dict(recipe=("mxfp8", "bf16")), ["an item 'bf16'", "bf16@0.8"]),
        (dict(recipe=("mxfp8", "bf16@x")), ["an item 'bf16@x'"]),
        (dict(recipe=("mxfp8", "bf16@0")), ["begins at update 0, which is not after 0"]),
        (dict(recipe=("mxfp8", "bf16@6")), ["begins at update 6", "before max_steps=6"]),
        (dict(recipe=("mxfp8", "bf16@0.99")), ["begins at update 6"]),
        (dict(recipe=("mxfp8:all",)), ["recipe mxfp8 has no part 'all': give one of fprop"]),
        (dict(recipe=("mxfp8",), n_embd=48), ["mxfp8 cannot quantize fprop.x of block_0/attn_qkv", "32", "K is 48"]),
        (dict(recipe=("mxfp8",), recipe_program=("quartet_2",)), ["recipe quartet_2 cannot quantize"]),
        (dict(recipe=("mxfp8",), block_size=4), ["cannot quantize wgrad.x", "M is 16", "tokens of a micro-batch"]),
        (dict(recipe=("mxfp8",), amax_history=8), ["amax_history=8 has no effect with recipe=('mxfp8',)"]),
        (dict(amax_history=8), ["amax_history=8 has no effect without formats or a recipe"]),
        (dict(recipe_program=("mxfp8",)), ["recipe_program=('mxfp8',) has no effect with recipe=()"]),
        (dict(recipe=("mxfp8",), metrics="ledger"), ["names ledger"]),
    ],
)
def test_refused_in_one_sentence(changes, words):
    with pytest.raises(UserError) as caught:
        validate(tiny(**SMALL | {"metrics": "grad"} | changes))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
