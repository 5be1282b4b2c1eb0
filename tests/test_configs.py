"""The config files of number formats: each is the baseline with what its argument names, refusing the rest at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad_jax import cli
from altgrad_jax.config import default_config, validate
from altgrad_jax.errors import UserError
from altgrad_jax.numerics.formats import ALIASES, DEFAULT_8BIT, FORMATS
from altgrad_jax.numerics.rules import AT_REST, OPTIMIZERS, resolve_rules

ROOT = Path(__file__).parents[1]
NAMES = {"run_name", "checkpoint_dir", "tags"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(spec):
    """(config, {name: value} where it differs from the baseline)."""
    config = cli.load_config(f"configs/{spec}")
    validate(config)
    assert config.is_locked
    baseline = default_config()
    assert list(config) == list(baseline)
    return config, {name: config[name] for name in config if config[name] != baseline[name]}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_changes_nothing_but_the_format(name):
    config, differs = load(f"fp8.py:{name}")
    shown = name.lower()
    assert differs == {
        "use_fp8": True,
        "formats": (name,),
        "run_name": shown,
        "checkpoint_dir": f"checkpoints/{shown}",
        "tags": (shown, "eurlex"),
    }
    layers = resolve_rules(config.formats, config.n_layer)
    assert len(layers) == 4 * config.n_layer and {layer.wag for layer in layers} == {(name,) * 3}
    assert "head" not in {layer.layer for layer in layers}


@pytest.mark.parametrize(
    "choices, settings",
    [((optimizer,), {"optimizer": optimizer}) for optimizer in OPTIMIZERS]
    + [((at_rest,), {"weights_at_rest": at_rest}) for at_rest in AT_REST]
    + [
        (("ulp_adamw", "stochastic"), {"optimizer": "ulp_adamw", "weights_at_rest": "stochastic"}),
        (("nearest", "grid"), {"optimizer": "grid", "weights_at_rest": "nearest"}),
    ],
)
def test_an_optimizer_and_weights_change_nothing_else(choices, settings):
    config, differs = load(":".join(["fp8.py", ",".join(["E5M2", *choices])]))
    settings = {name: value for name, value in settings.items() if value != default_config()[name]}
    unlike = [settings[name] for name in ("optimizer", "weights_at_rest") if name in settings]
    run_name = "-".join(["e5m2", *unlike])
    assert differs == {
        "use_fp8": True,
        "formats": ("E5M2",),
        "run_name": run_name,
        "checkpoint_dir": f"checkpoints/{run_name}",
        "tags": ("e5m2", "eurlex", *unlike),
        **settings,
    }


def test_an_alias_is_the_format_it_stands_for():
    for alias, name in ALIASES.items():
        assert load(f"fp8.py:{alias}")[1] == load(f"fp8.py:{name}")[1]


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("mixed.py", {"attn": "BF16", "mlp": "E3M4", "head": "BF16"}),
        ("mixed.py:E4M3,E5M2,none", {"attn": "E4M3", "mlp": "E5M2"}),
        ("mixed.py:None,E8M7,E1M6", {"mlp": "BF16", "head": "E1M6"}),
    ],
)
def test_parts_change_nothing_but_their_formats(spec, expected):
    config, differs = load(spec)
    assert set(differs) == {"use_fp8", "formats"} | NAMES and config.use_fp8
    found = {layer.layer: set(layer.wag) for layer in resolve_rules(config.formats, config.n_layer)}
    parts = {"attn": ("attn_qkv", "attn_out"), "mlp": ("mlp_up", "mlp_down")}
    layers = {
        f"block_{i}/{part}": {expected[kind]}
        for kind in parts
        if kind in expected
        for part in parts[kind]
        for i in range(config.n_layer)
    }
    assert found == layers | ({"head": {expected["head"]}} if "head" in expected else {})
    assert config.checkpoint_dir == f"checkpoints/{config.run_name}"


@pytest.mark.parametrize(
    "spec, recipe, run_name, more",
    [
        ("nvfp4", ("nvfp4",), "nvfp4", {}),
        ("nvfp4,bf16@0.8", ("nvfp4", "bf16@0.8"), "nvfp4-bf16-at-0.8", {}),
        ("mxfp8:backward", ("mxfp8:backward",), "mxfp8-backward", {}),
        ("te_delayed", ("te_delayed",), "te_delayed", {"amax_history": 1024}),
        ("bf16,te_delayed@100", ("bf16", "te_delayed@100"), "bf16-te_delayed-at-100", {"amax_history": 1024}),
    ],
)
def test_a_recipe_changes_nothing_but_the_recipe(spec, recipe, run_name, more):
    _, differs = load(f"recipe.py:{spec}")
    names = {"run_name": run_name, "checkpoint_dir": f"checkpoints/{run_name}", "tags": ("recipe", "eurlex", run_name)}
    assert differs == {"recipe": recipe, **names, **more}


def test_no_two_runs_share_a_folder():
    specs = [
        "recipe.py:mxfp8",
        "recipe.py:mxfp8:backward",
        "recipe.py:mxfp8,bf16@0.8",
        "recipe.py:mxfp8,bf16@8",
        "bf16_baseline.py",
        "mixed.py",
        "mixed.py:E4M3,E5M2,none",
        "fp8.py:E4M3,grid",
        "fp8.py:E4M3,nearest",
        "fp8.py:E4M3,grid,nearest",
        *(f"fp8.py:{name}" for name in FORMATS),
    ]
    configs = [load(spec)[0] for spec in specs]
    for name in ("run_name", "checkpoint_dir"):
        assert len({config[name] for config in configs}) == len(specs)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("fp8.py", ["needs an argument", "configs/fp8.py:ARGUMENT"]),
        ("fp8.py:", ["no number format ''", "E4M3"]),
        ("fp8.py:e4m_3", ["no number format 'e4m_3': give one of E4M3"]),
        ("fp8.py:E4M3,adam", ["configs/fp8.py:E4M3,adam asks for 'adam'", *OPTIMIZERS, *AT_REST]),
        ("fp8.py:E4M3,", ["asks for ''"]),
        ("fp8.py:E4M3,grid,ulp_adamw", ["configs/fp8.py:E4M3,grid,ulp_adamw gives optimizer twice"]),
        ("fp8.py:E4M3,adamw,grid", ["gives optimizer twice"]),
        ("fp8.py:E4M3,float32,nearest", ["gives weights_at_rest twice"]),
        (
            "fp8.py:E4M3,grid,stochastic",
            ["optimizer='grid'", "weights_at_rest='stochastic'", "give nearest or float32"],
        ),
        ("mixed.py:E4M3", ["configs/mixed.py:E4M3 names 1 formats: give three", "BF16,E3M4,none"]),
        ("mixed.py:E4M3,E4M3,E4M3,E4M3", ["names 4 formats"]),
        ("mixed.py:E4M3,E9M9,none", ["no number format 'E9M9'"]),
        ("mixed.py:none,none,none", ["gives no layer a format", "set use_fp8=False"]),
        ("recipe.py", ["needs an argument", "configs/recipe.py:ARGUMENT"]),
        ("recipe.py:", ["there is no recipe ''", "nvfp4"]),
        ("recipe.py:nvfp5", ["there is no recipe 'nvfp5': give one of nvfp4"]),
        ("recipe.py:nvfp4:sideways", ["recipe nvfp4 has no part 'sideways'", "backward"]),
        ("recipe.py:nvfp4,bf16", ["recipe has an item 'bf16'", "bf16@0.8"]),
        ("recipe.py:nvfp4,bf16@5000", ["begins at update 5000", "before max_steps=2000"]),
    ],
)
def test_refused(spec, words):
    with pytest.raises(UserError) as caught:
        load(spec)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# From the command line, where an import of jax would be an error: a mistake is told at once.


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["configs/fp8.py:E4M9"], ["no number format 'E4M9': give one of E4M3", *DEFAULT_8BIT, "BF16"]),
        (
            ["configs/fp8.py:E3M4", "--config.products=native"],
            [
                "products='native' can compute with E4M3 and E5M2",
                "not with E3M4 in block_0/attn_qkv",
                "products='emulated'",
            ],
        ),
        (
            ["configs/fp8.py:E4M3", "--config.scaling=1x128", "--config.n_embd=192"],
            ["scaling='1x128'", "block_0/attn_qkv", "192 numbers", "blocks of 128", "another scaling"],
        ),
        (["configs/mixed.py:E4M3,E4M3,E4M3", "--config.scaling=1x32"], ["operand G of head", "50257 numbers"]),
        (["configs/recipe.py:quartet_2", "--config.n_embd=192"], ["recipe quartet_2", "multiples of 128 and N is 576"]),
    ],
)
def test_the_command_line_refuses_in_one_line_without_jax(tmp_path, arguments, words):
    (tmp_path / "jax.py").write_text("raise ImportError('jax was imported')\n")
    process = subprocess.run(
        [sys.executable, "scripts/train.py", "--config", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    for word in words:
        assert word in process.stderr


def test_jax_would_be_missed(tmp_path):
    """The trap of the test above works: a config that can be run does import jax."""
    (tmp_path / "jax.py").write_text("raise ImportError('jax was imported')\n")
    process = subprocess.run(
        [sys.executable, "scripts/train.py", "--config", "configs/fp8.py:E4M3", f"--workdir={tmp_path}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert process.returncode == 1 and "jax was imported" in process.stderr


def test_the_matrix_is_whole():
    """Every arm over all pairs of seeds at every rate that its question needs, in few programs."""
    from altgrad_jax.run.sweep import make_groups, make_members

    config = cli.load_config("configs/matrix.py")
    points = cli.sweep_of(config)
    members = make_members(config, points, "runs/matrix")
    assert len(members) == len(points)
    assert len(make_groups(members)) == 10
    assert all(member.config.data_seed == member.config.seed and member.config.evaluate_all for member in members)
    cells = {}
    for member in members:
        layers = {layer.wag for layer in resolve_rules(member.config.formats, 2)} if member.config.use_fp8 else {None}
        (wag,) = layers
        names = "compute_dtype weights_at_rest optimizer scale_rounding scaling"
        cell = wag, *(member.config[name] for name in names.split())
        cells.setdefault(cell, {}).setdefault(member.config.learning_rate, set()).add(member.config.seed)
    own = {name: {2e-3 if name == "E0M7" else 4e-3: 8} for name in DEFAULT_8BIT}
    ablated = {name for wag, *_ in cells if wag and "BF16" in wag for name in wag} - {"BF16"}
    for (wag, compute, at_rest, _, scales, scaling), rates in cells.items():
        n_seeds = {rate: len(seeds) for rate, seeds in rates.items()}
        (name,) = {*(wag or ())} - {"BF16"} or {None}
        if compute == "float32":
            assert n_seeds == {2e-3: 8, 4e-3: 8}
        elif name is None:
            assert n_seeds == {1e-3: 8, 2e-3: 8, 4e-3: 8, 8e-3: 8}
        elif name == "E1M6":
            assert n_seeds == {2e-3: 1}
        elif (at_rest, scales, scaling) == ("float32", "power_of_two", "delayed") and "BF16" not in wag:
            assert n_seeds == {2e-3: 8, 4e-3: 8, 8e-3: 2}
        else:
            assert n_seeds == own[name]
    assert len(cells) == 2 + 7 * 6 + 1 + 3 * len(ablated) and ablated == {"E0M7", "E7M0"}


@pytest.mark.parametrize(
    "argument, sizes, seeds",
    [("gpt2", [17, 3, 1], range(1, 9)), ("again", [17, 3, 1], range(9, 15)), ("llama", [17, 1], range(1, 5))],
)
def test_the_court_is_whole(argument, sizes, seeds):
    """Every recipe with every pair of seeds, whole seeds one after the other, in one program; few others beside it."""
    from altgrad_jax.run.sweep import make_groups, make_members

    config = cli.load_config(f"configs/court.py:{argument}")
    members = make_members(config, cli.sweep_of(config), "runs/court")
    assert all(member.config.data_seed == member.config.seed for member in members)
    groups = [[member.config for member in group] for group in make_groups(members)]
    for group, n_arms in zip(groups, sizes, strict=True):
        arms = {(member.recipe, member.compute_dtype) for member in group}
        assert len(arms) == n_arms and len({m.recipe_program for m in group}) == 1
        assert [member.seed for member in group] == [seed for seed in seeds for _ in range(n_arms)]
    assert {member.compute_dtype for member in groups[-1]} == {"float32"}
    pilot = cli.load_config("configs/court.py:pilot")
    rates = {point["learning_rate"] for point in cli.sweep_of(pilot)}
    assert pilot.schedule == "constant" and min(rates) < config.learning_rate < max(rates)


def test_a_small_court_has_three_recipes_and_three_pairs():
    config = cli.load_config("configs/court.py:small")
    points = cli.sweep_of(config)
    assert len(points) == 9 and {point["seed"] for point in points} == {1, 2, 3} and config.max_steps == 400
    config.tags = ("mine",)
    with pytest.raises(UserError, match="takes its members from a tag"):
        cli.sweep_of(config)
    sized = cli.sweep_of(cli.load_config("configs/court.py:sizes"))
    assert len(sized) == 24 and {point["seed"] for point in sized} == {*range(9, 15)}
    deep = cli.load_config("configs/court.py:deep")
    points_of_deep = cli.sweep_of(deep)
    assert len(points_of_deep) == 13 * 8 and (deep.n_layer, deep.max_steps) == (3, 1500)
    assert {point["seed"] for point in points_of_deep} == {*range(15, 23)}
    assert {point["recipe"] for point in points} == {("bf16",), ("mxfp8",), ("nvfp4~head",)}
