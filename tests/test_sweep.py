"""Sweeps: what is compiled together, and that a member's folder is the one it would have by itself."""

import contextlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import make_data, rows_of, state_bytes, tiny

from altgrad_jax import cli, train
from altgrad_jax.errors import UserError
from altgrad_jax.inference.evaluate import evaluate_checkpoint
from altgrad_jax.inference.generate import load_model
from altgrad_jax.run import sweep
from altgrad_jax.run.checkpoint import list_steps
from altgrad_jax.run.folder import RunFolder
from altgrad_jax.run.loop import dispatch_length
from altgrad_jax.run.record import read_timing, read_window_losses
from altgrad_jax.run.setup import open_data, set_up
from altgrad_jax.run.sweep import axis, grid, make_members, only, program_key
from altgrad_jax.step.from_config import flops_per_step
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.program import Program, make_evaluate

ROOT = Path(__file__).parent.parent
FORMAT = dict(use_fp8=True, metrics="format", weights_at_rest="stochastic")
# One layer has formats, for each makes a program larger.
E5M2_G = tuple(f"block_*/mlp_up:{operand}={name}" for operand, name in zip("WAG", ("BF16", "BF16", "E5M2")))
POINTS = [
    {"run_name": "bf16-a", "seed": 1},
    {"run_name": "E4M3", "formats": ("block_*/mlp_up=E4M3",), "seed": 1, **FORMAT},
    {"run_name": "bf16-b", "seed": 2, "data_seed": 2, "learning_rate": 1e-3},
    {"run_name": "E5M2-G", "formats": E5M2_G, "seed": 3, "data_seed": 3, "learning_rate": 1e-3, **FORMAT},
    {"run_name": "E7M0", "formats": ("block_*/mlp_up=E7M0",), "seed": 2, **FORMAT},
]
# Where losses alone are compared: programs that are made sooner.
LEAN = dict(metrics="none", diagnostic_interval=0)
SHORT = dict(max_steps=20, checkpoint_interval=10, layer_interval=4, evaluate_all=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def swept(data_dir, tmp_path_factory):
    """(folder, compiled programs, what was printed) of a sweep with two groups, the second in two chunks."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    with counted_compiles() as compiled:
        assert sweep.sweep(make_members(tiny(**SHORT), POINTS, out), out, data_dir=data_dir, width=2) == 0
    return out, compiled


@contextlib.contextmanager
def counted_compiles():
    """Widths of the programs compiled meanwhile, and in how many chunks each was used."""
    counts = {"compiled": [], "chunks": 0}
    compile_, loop = Program.compile, sweep.loop

    def counting(self):
        counts["compiled"].append(self.width)
        compile_(self)
        # Ahead of time: a call with other shapes or types is an error, so that nothing else can compile.
        assert all(isinstance(program, jax.stages.Compiled) for program in self.compiled.values())

    def counting_loop(*args):
        counts["chunks"] += 1
        return loop(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compile", counting)
        patch.setattr(sweep, "loop", counting_loop)
        yield counts


def test_one_program_a_group(swept):
    assert swept[1] == {"compiled": [2, 2], "chunks": 3}


@pytest.mark.parametrize("name", ["bf16-b", "E5M2-G"])
def test_a_member_equals_its_run_alone(swept, data_dir, tmp_path, name):
    """To the bit: record, diagnostics and every array of every checkpoint."""
    (point,) = [point for point in POINTS if point["run_name"] == name]
    train(tiny(**SHORT | point), data_dir=data_dir, workdir=tmp_path / name)
    for file in ("metrics.jsonl", "diagnostics.jsonl", "window_losses.json"):
        own, alone = (folder / name / file for folder in (swept[0], tmp_path))
        assert own.exists() == alone.exists() and (not own.exists() or own.read_bytes() == alone.read_bytes())
    assert list_steps(swept[0] / name) == list_steps(tmp_path / name) == [10, 20]
    for step in (10, 20):
        assert state_bytes(swept[0] / name, step) == state_bytes(tmp_path / name, step)


@pytest.mark.parametrize("name", ["bf16-b", "E4M3"])
def test_the_loss_of_every_validation_window_is_recorded_at_the_end(swept, name):
    step, losses = read_window_losses(swept[0] / name)
    found = evaluate_checkpoint(swept[0] / name, all_windows=True)
    verdict = json.loads((swept[0] / name / "verdict.json").read_text())
    assert step == 20 and verdict["all_windows"]["windows"] == len(losses) >= found.n_windows > 4
    assert verdict["all_windows"]["mean_loss"] == pytest.approx(losses.astype(np.float64).mean(), rel=1e-9)
    # That one leaves the last incomplete batch out. Windows differ from each other.
    assert losses[: found.n_windows].mean() == pytest.approx(found.val_loss, rel=0.05) and losses.std() > 1e-3
    params, config, _, operands = load_model(swept[0] / name)
    data = json.loads((swept[0] / name / "manifest.json").read_text())["data"]["dir"]
    tokens_T = np.fromfile(Path(data) / "val.bin", "<u2")
    for i in (0, len(losses) - 1):
        window = tokens_T[i * config.block_size : (i + 1) * config.block_size + 1][None]
        alone = make_evaluate(config, 1, data_mesh(jax.devices()[:1]))(params, window, operands)
        assert losses[i] == pytest.approx(float(alone), rel=1e-4)


def test_a_member_s_folder_is_a_run_s(swept, data_dir):
    folder = swept[0] / "E4M3"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config"]["run_name"] == "E4M3" and manifest["config"]["wandb_group"] == "out"
    assert list(manifest["formats"]["certificates"]) == ["E4M3"]
    assert manifest["starts"][0]["side_by_side"] == 2
    result = train(tiny(**SHORT | POINTS[1] | {"wandb_group": "out"}), data_dir=data_dir, workdir=folder)
    assert result.exit_code == 0 and result.verdict["steps"] == 20
    plan = json.loads((swept[0] / "sweep.json").read_text())
    assert list(plan["members"]) == [point["run_name"] for point in POINTS]
    assert plan["members"]["E7M0"]["formats"] == ["block_*/mlp_up=E7M0"]


def test_rows_between_carry_no_layers(swept):
    rows = rows_of(swept[0] / "E4M3")
    with_layers = [row["step"] for row in rows if any(key.startswith("sqnr_db/block") for key in row)]
    assert with_layers == [1, 5, 9, 13, 17, 20] and all("loss" in row for row in rows[1:])
    evaluated = (0, 20)
    assert not any("/" in key for row in rows if row["step"] not in (*with_layers, *evaluated) for key in row)


def test_times_are_shares(swept):
    rows, _ = read_timing(swept[0] / "E4M3")
    other, _ = read_timing(swept[0] / "E5M2-G")
    assert [row["step_time_s"] for row in rows] == [row["step_time_s"] for row in other]


def test_the_same_command_trains_nothing_twice(swept, data_dir, capsys):
    out = swept[0]
    before = {path: path.read_bytes() for path in out.rglob("metrics.jsonl")}
    with counted_compiles() as compiled:
        assert sweep.sweep(make_members(tiny(**SHORT), POINTS, out), out, data_dir=data_dir, width=2) == 0
    assert compiled == {"compiled": [], "chunks": 0}
    assert before == {path: path.read_bytes() for path in out.rglob("metrics.jsonl")}
    assert "5 members of 5 at their end" in capsys.readouterr().out


def test_a_member_of_other_settings_is_refused(swept, data_dir):
    points = [POINTS[0] | {"learning_rate": 5e-3}]
    with pytest.raises(UserError, match="was made with other settings.*learning_rate: 0.003 in the run, 0.005 now"):
        sweep.sweep(make_members(tiny(**SHORT), points, swept[0]), swept[0], data_dir=data_dir)


class Killed(BaseException):
    pass


def test_a_killed_sweep_goes_on_to_the_bit(swept, data_dir, tmp_path, monkeypatch):
    """Killed when one member of the pair has checkpoint 10 and the other has not; then again after step 10."""
    out = tmp_path / "out"
    save = RunFolder.save

    def killed_at(step, name):
        def watched(self, state):
            if self.step == step and self.config.run_name == name:
                raise Killed
            save(self, state)

        return watched

    for step, name in ((10, "E5M2-G"), (20, "E4M3")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(RunFolder, "save", killed_at(step, name))
            sweep.sweep(make_members(tiny(**SHORT), POINTS, out), out, data_dir=data_dir, width=2)
        assert list_steps(out / "E4M3") == [10]
        assert list_steps(out / "E5M2-G") == ([] if step == 10 else [10])
    with open(out / "E4M3" / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "lo')
    assert sweep.sweep(make_members(tiny(**SHORT), POINTS, out), out, data_dir=data_dir, width=2) == 0
    for point in POINTS:
        name = point["run_name"]
        assert (out / name / "metrics.jsonl").read_bytes() == (swept[0] / name / "metrics.jsonl").read_bytes()
        assert state_bytes(out / name, 20) == state_bytes(swept[0] / name, 20)


def test_an_interrupted_sweep_saves_and_says_how_to_go_on(swept, data_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    loop = sweep.loop

    def interrupted(setup, program, runs, states, stop, goodput):
        advance = program.advance

        def then_stop(*args):
            stop.number = 15
            return advance(*args)

        program.advance = then_stop
        loop(setup, program, runs, states, stop, goodput)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "loop", interrupted)
        assert sweep.sweep(make_members(tiny(**SHORT), POINTS[:1], out), out, data_dir=data_dir) == 128 + 15
    assert list_steps(out / "bf16-a") == [1]
    assert "stopped after" in (said := capsys.readouterr().out) and "0 of 1 members" in said
    assert sweep.sweep(make_members(tiny(**SHORT), POINTS[:1], out), out, data_dir=data_dir) == 0
    assert (out / "bf16-a" / "metrics.jsonl").read_bytes() == (swept[0] / "bf16-a" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("member_loop", ["map", "vmap"])
def test_a_member_that_is_not_finite_freezes_and_the_others_go_on(
    swept, data_dir, tmp_path, monkeypatch, capsys, member_loop
):
    out = tmp_path / "out"
    start = RunFolder.restore_or_start

    def spoiled(self, resources):
        state = start(self, resources)
        if self.config.run_name == "bf16-a":
            params = jax.tree.map(jnp.copy, state.params)
            params["embed"]["embedding"] = params["embed"]["embedding"].at[3, 3].set(np.nan)
            state = state._replace(params=params)
        return state

    points = [POINTS[0], POINTS[2]]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "restore_or_start", spoiled)
        assert (
            sweep.sweep(make_members(tiny(**SHORT), points, out), out, data_dir=data_dir, member_loop=member_loop) == 0
        )
    assert [row["step"] for row in rows_of(out / "bf16-a")] == [0, 1, 2, 3]
    assert "3 non-finite steps in a row" in capsys.readouterr().out
    if member_loop == "map":
        assert (out / "bf16-b" / "metrics.jsonl").read_bytes() == (swept[0] / "bf16-b" / "metrics.jsonl").read_bytes()
    else:
        assert len(rows_of(out / "bf16-b")) == 21
    # It has come to its end, and is not tried again.
    with counted_compiles() as compiled:
        assert sweep.sweep(make_members(tiny(**SHORT), points, out), out, data_dir=data_dir) == 0
    assert compiled["compiled"] == []


def test_vmap_agrees_with_map_within_its_tolerance(swept, data_dir, tmp_path):
    """bfloat16 products summed in another order: losses of 20 steps within 1%, and equal at the first."""
    out = tmp_path / "out"
    points = [point | LEAN for point in (*POINTS[:2], POINTS[3])]
    sweep.sweep(make_members(tiny(**SHORT), points, out), out, data_dir=data_dir, member_loop="vmap")
    for name in ("E4M3", "E5M2-G", "bf16-a"):
        losses, exact = ([row["loss"] for row in rows_of(folder / name)[1:]] for folder in (out, swept[0]))
        assert losses[0] == pytest.approx(exact[0], rel=1e-6)
        np.testing.assert_allclose(losses, exact, rtol=1e-2)


def test_tokens_from_the_host_make_the_same_runs(swept, data_dir, tmp_path):
    out = tmp_path / "out"
    config = tiny(**SHORT, data_placement="host")
    sweep.sweep(make_members(config, POINTS[::2][:2], out), out, data_dir=data_dir)
    for name in ("bf16-a", "bf16-b"):
        assert (out / name / "metrics.jsonl").read_bytes() == (swept[0] / name / "metrics.jsonl").read_bytes()


def test_two_devices_train_two_members_at_a_time(swept, data_dir, tmp_path):
    """A process of its own, in which the CPU is two devices; three members, so that one device has an idle lane."""
    (tmp_path / "config.py").write_text(f"""
from altgrad_jax.config import default_config
def get_config():
    config = default_config()
    config.update({ {name: value for name, value in tiny(**SHORT).to_dict().items()}!r})
    return config
def get_sweep(config):
    return {[POINTS[i] | LEAN for i in (1, 3, 4)]!r}
""")
    command = [
        sys.executable,
        ROOT / "scripts" / "sweep.py",
        f"--config={tmp_path / 'config.py'}",
        f"--out={tmp_path / 'out'}",
        f"--data_dir={data_dir}",
        "--cpu_devices=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "4 side by side in 1 chunk" in done.stdout
    for name in ("E4M3", "E5M2-G", "E7M0"):
        losses, exact = ([row["loss"] for row in rows_of(folder / name)[1:]] for folder in (tmp_path / "out", swept[0]))
        np.testing.assert_allclose(losses, exact, rtol=1e-3)
        manifest = json.loads((tmp_path / "out" / name / "manifest.json").read_text())
        assert manifest["starts"][0]["device"]["count"] == 2
    # jax has started in this process, and on one device.
    with pytest.raises(UserError, match="cpu_devices=2 came too late"):
        sweep.sweep(make_members(tiny(**SHORT), POINTS[:1], tmp_path / "x"), tmp_path / "x", cpu_devices=2)


# ------------------------------------------------------------------------------------------------- members and groups


def test_a_grid_is_every_combination_with_a_name_of_its_parts():
    points = grid(
        [{"run_name": "bf16"}, {"use_fp8": True, "formats": ("E4M3",), "run_name": "E4M3"}],
        axis("learning_rate", (1e-3, 2e-3), lambda lr: f"lr{lr:g}"),
        axis("seed", (0, 1)),
    )
    assert [point["run_name"] for point in points] == [
        f"{arm}-lr{lr}-seed{seed}" for arm, lr, seed in itertools.product(("bf16", "E4M3"), ("0.001", "0.002"), (0, 1))
    ]
    assert points[-1] == {
        "use_fp8": True,
        "formats": ("E4M3",),
        "learning_rate": 2e-3,
        "seed": 1,
        "run_name": "E4M3-lr0.002-seed1",
    }
    with pytest.raises(UserError, match="two axes of a grid set seed"):
        grid(axis("seed", (0, 1)), axis("seed", (2,)))


def test_axes_from_text():
    points = sweep.parse_axes("formats=E4M3,block_*:W=E4M3+block_*:G=E5M2; seed=0,1")
    assert [(point["formats"], point["seed"]) for point in points] == [
        (("E4M3",), 0),
        (("E4M3",), 1),
        (("block_*:W=E4M3", "block_*:G=E5M2"), 0),
        (("block_*:W=E4M3", "block_*:G=E5M2"), 1),
    ]
    members = make_members(tiny(n_embd=64), sweep.parse_axes("formats=none,E4M3,mxfp8;seed=1,2,3"), "out")
    numbers = [(m.config.use_fp8, m.config.formats, m.config.recipe, m.config.seed) for m in members]
    kinds = (False, (), ()), (True, ("E4M3",), ()), (False, (), ("mxfp8",))
    assert numbers == [(*kind, seed) for kind in kinds for seed in (1, 2, 3)]
    for text, words in (("seed", "give SETTING=VALUE"), ("sed=1", "did you mean seed"), ("seed=x", "seed=x cannot be")):
        with pytest.raises(UserError, match=words):
            sweep.parse_axes(text)


@pytest.mark.parametrize(
    "points, words",
    [
        ([], "has no members"),
        ([{"seed": 1}], "has no name"),
        ([{"run_name": "a/b"}], "cannot name a folder"),
        ([{"run_name": "a", "seed": 1}, {"run_name": "a", "seed": 2}], "'a' is the name of two members"),
        ([{"run_name": "a", "seed": 1}, {"run_name": "b", "seed": 1}], "members a and b have the same settings"),
        ([{"run_name": "a", "learning_rat": 1.0}], "member a: there is no setting 'learning_rat'; did you mean"),
        ([{"run_name": "a", "learning_rate": -1.0}], "member a: learning_rate=-1.0 cannot be used"),
        ([{"run_name": "a", "n_embd": 15}], "member a: n_embd=15 cannot be split"),
    ],
)
def test_wrong_points_are_refused_by_name(tmp_path, points, words):
    with pytest.raises(UserError, match=words):
        make_members(tiny(), points, tmp_path)


@pytest.mark.parametrize(
    "changes, same",
    [
        ({"seed": 9, "learning_rate": 1.0, "run_name": "x", "tags": ("y",)}, True),
        ({"formats": ("E0M7",)}, True),
        ({"formats": only("A", "E5M2")}, True),
        ({"formats": ("BF16",)}, True),
        ({"formats": ("block_*:W=E4M3",)}, False),
        ({"formats": ("FP16",)}, False),
        ({"weights_at_rest": "nearest"}, False),
        ({"optimizer": "ulp_adamw"}, False),
        ({"max_steps": 41}, False),
        ({"eval_interval": 10}, False),
        ({"data_seed": 1}, True),
        ({"emergency_formats": ("E2M5",), "emergency_patience": 2}, False),
        ({"products": "native"}, False),
    ],
)
def test_which_members_share_a_program(changes, same):
    base = dict(use_fp8=True, formats=("E4M3",))
    assert (program_key(tiny(**base)) == program_key(tiny(**base | changes))) is same


def test_batches_from_the_host_are_of_one_data_seed(data_dir, tmp_path, monkeypatch):
    streamed = dict(data_placement="host")
    assert program_key(tiny(**streamed)) != program_key(tiny(**streamed, data_seed=1))
    monkeypatch.setattr("altgrad_jax.run.setup._memory_limit", lambda device: 100)
    members = make_members(tiny(), [{"run_name": f"d{seed}", "data_seed": seed} for seed in (1, 2)], tmp_path)
    with pytest.raises(UserError, match="several data_seed.*set data_placement=host"):
        sweep.sweep(members, tmp_path, data_dir=data_dir)


def test_an_ablation_names_all_operands():
    assert only("WA", "E3M4") == ("block_*:W=E3M4", "block_*:A=E3M4", "block_*:G=BF16")


# ----------------------------------------------------------------------------------------------------- slices


def test_slices_are_disjoint_whole_and_keep_programs_together(tmp_path):
    points = grid(
        [{"run_name": "bf16"}, {"run_name": "E4M3", "formats": ("E4M3",), "use_fp8": True}], axis("seed", range(7))
    )
    points = points[::2] + points[1::2]  # the groups interleaved
    members = make_members(tiny(), points, tmp_path)
    for n in (1, 2, 3, 5, 20):
        slices = [sweep.take_shard(members, i, n) for i in range(n)]
        names = [member.name for part in slices for member in part]
        assert sorted(names) == sorted(member.name for member in members)
        assert max(map(len, slices)) - min(map(len, slices)) <= 1
        assert sum(len(sweep.make_groups(part)) for part in slices) <= 2 + n - 1


@pytest.mark.parametrize(
    "text, environ, expected",
    [
        ("2/8", {}, (1, 8)),
        ("1/1", {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (0, 1)),
        ("auto", {}, (0, 1)),
        ("auto", {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
            },
            (2, 4),
        ),
        ("auto", {"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}, (1, 2)),
    ],
)
def test_slices_from_flags_and_clusters(text, environ, expected):
    assert sweep.shard_of(text, environ) == expected


@pytest.mark.parametrize(
    "text, environ",
    [
        ("0/2", {}),
        ("3/2", {}),
        ("2", {}),
        ("a/b", {}),
        ("auto", {"SLURM_PROCID": "x", "SLURM_NTASKS": "4"}),
        ("auto", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2"}),
    ],
)
def test_slices_that_are_none_are_refused(text, environ):
    with pytest.raises(UserError, match="give.*i/n"):
        sweep.shard_of(text, environ)


def test_two_slices_make_one_sweep(swept, data_dir, tmp_path):
    out = tmp_path / "out"
    points = [POINTS[0], POINTS[2]]
    members = make_members(tiny(**SHORT), points, out)
    for i in range(2):
        assert sweep.sweep(members, out, data_dir=data_dir, shard=(i, 2)) == 0
        assert sorted(path.name for path in out.iterdir()) == [*["bf16-a", "bf16-b"][: i + 1], "sweep.json"]
    for name in ("bf16-a", "bf16-b"):
        assert (out / name / "metrics.jsonl").read_bytes() == (swept[0] / name / "metrics.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------------- memory and plan


@pytest.mark.parametrize(
    "n_members, n_devices, per_lane, once, limit, asked, width",
    [
        (10, 1, 10, 5, 105, 0, 10),
        (10, 1, 10, 5, 85, 0, 5),
        (10, 1, 10, 5, 34, 0, 2),
        (3, 2, 10, 0, 1000, 0, 4),
        (300, 1, 1, 0, 1e6, 0, 60),
        (10, 1, 10, 5, 20, 4, 4),
        (2, 1, 10, 5, 1000, 8, 2),
        (10, 4, 10, 0, 20, 0, 8),
    ],
)
def test_how_many_run_side_by_side(n_members, n_devices, per_lane, once, limit, asked, width):
    assert sweep.choose_width(n_members, n_devices, per_lane, once, limit, asked) == width


def test_a_member_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="a member needs about 2.0 GiB and 1.0 GiB may be used"):
        sweep.choose_width(4, 1, 2**30, 2**30, 2**30)


@pytest.mark.parametrize(
    "changes, member_loop",
    [({}, "vmap"), (dict(FORMAT, formats=("E4M3",)), "map"), (dict(batch_size=8, block_size=64), "vmap")],
)
def test_the_estimate_of_memory_is_near_what_is_compiled(data_dir, changes, member_loop):
    config = tiny(**dict(n_embd=64, n_layer=2, batch_size=16) | changes)
    setup = set_up(config, open_data(config, data_dir, print), print, side_by_side=True)
    per_lane, once = sweep.lane_bytes(setup, member_loop=member_loop)
    analysis = next(setup.program(4, member_loop).lower())[1].compile().memory_analysis()
    n_bytes = (
        analysis.temp_size_in_bytes
        + analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    assert 1 / 3 < (4 * per_lane + once) / n_bytes < 3


def test_a_dry_run_tells_the_plan_and_makes_nothing(data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    members = make_members(tiny(**SHORT), POINTS, out)
    assert sweep.sweep(members, out, data_dir=data_dir, dry_run=True, width=2) == 0
    said = capsys.readouterr().out
    assert not out.exists()
    flops = 2 * 20 * flops_per_step(tiny())
    assert "group 1 of 2: 2 members (bf16-a, bf16-b), 2 side by side in 1 chunk, " in said
    assert f"{flops / 1e12:,.3g} TFLOP; 20 steps of 4 x 16 tokens" in said
    assert re.search(
        r"group 2 of 2: compiled in 0:0\d:\d\d; \d+ MiB as compiled; \S+ s for a step of 2, so about 0:", said
    )


def test_the_config_file_s_sweep_is_found(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from altgrad_jax.config import default_config\ndef get_config():\n    return default_config()\n"
        "def get_sweep(config):\n    return [{'run_name': 'a', 'seed': config.seed + 1}]\n"
    )
    config = cli.load_config(str(file))
    assert cli.sweep_of(config) == [{"run_name": "a", "seed": 43}]
    file.write_text(file.read_text().rsplit("\n", 2)[0] + "\n    return {}\n")
    with pytest.raises(UserError, match="must return a list"):
        cli.sweep_of(cli.load_config(str(file)))
    file.write_text(file.read_text().split("def get_sweep")[0])
    with pytest.raises(UserError, match="has no function get_sweep"):
        cli.sweep_of(cli.load_config(str(file)))


@pytest.mark.parametrize(
    "n_runs, seconds_per_step, steps",
    [(1, None, 1), (1, 0.05, 20), (1, 3.0, 1), (4, 0.2, 20), (34, 1.0, 8), (34, 0.01, 100), (34, 9.0, 1)],
)
def test_a_dispatch_is_longer_with_runs_side_by_side(n_runs, seconds_per_step, steps):
    config = tiny(max_steps=1000, eval_interval=1000, checkpoint_interval=1000, diagnostic_interval=0)
    found = dispatch_length(config, 0, seconds_per_step, longest=100, n_runs=n_runs)
    assert found == steps
    assert dispatch_length(config, 995, seconds_per_step, longest=100, n_runs=n_runs) == min(steps, 5)
    fixed = tiny(max_steps=1000, eval_interval=1000, checkpoint_interval=1000, steps_per_dispatch=7)
    assert dispatch_length(fixed, 0, seconds_per_step, longest=7, n_runs=n_runs) == 7
